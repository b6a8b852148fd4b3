"""Exact search over sentence vectors, in memory or mapped from a file.

Without this file, searching would be sorting `vectors @ query`, and vectors would be computed
again each time. Not here: approximate search.

Shapes: n sentences, q queries, D hidden size. All vectors have unit length.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bert import read_safetensors, write_safetensors
from engine.errors import UserError, atomic_file
from engine.model_folder import DTYPES

INDEX_CHUNK_SIZE = 1 << 16  # vectors that are converted to fp32 at a time
QUERY_CHUNK_SIZE = 16  # queries that are searched at a time


class Index:
    """Sentences and their vectors. use_faiss: search with faiss.IndexFlatIP, which is exact too."""

    def __init__(self, D: int, use_faiss: bool = False):
        self.sentences: list[str] = []
        self.vectors: list[Tensor] = []  # in parts (n, D), fp32 or fp16
        self.faiss = None
        if use_faiss:
            try:
                import faiss
            except ImportError:
                raise UserError("use_faiss needs faiss: pip install faiss-cpu") from None
            self.faiss = faiss.IndexFlatIP(D)

    def add(self, sentences: list[str], vectors: Tensor) -> None:
        self.sentences += sentences
        self.vectors.append(vectors)
        if self.faiss is not None:
            self.faiss.add(vectors.float().numpy())

    def check_not_empty(self) -> None:
        if not self.vectors:
            raise UserError("no index: call build_index(sentences) or load_index(file) first")

    def search(
        self, queries: Tensor, threshold: float, top_k: int
    ) -> list[list[tuple[str, float]]]:
        """For each query at most top_k pairs (sentence, cosine >= threshold), best first.

        Ties are in the order of addition. Shapes: queries (q, D).
        """
        self.check_not_empty()
        if not isinstance(top_k, int) or top_k < 0:
            raise UserError(f"top_k is {top_k!r}; it must be an integer of at least 0")
        results = []
        for chunk in queries.split(QUERY_CHUNK_SIZE):
            for cosines, indices in self.candidates(chunk, top_k):
                found = np.flatnonzero(cosines >= threshold)
                if 0 < top_k < len(found):  # sort the best alone, and all that tie with the last
                    last = np.partition(cosines[found], -top_k)[-top_k]
                    found = found[cosines[found] >= last]
                best = found[np.argsort(-cosines[found], kind="stable")][:top_k]
                results.append([(self.sentences[indices[i]], float(cosines[i])) for i in best])
        return results

    def candidates(self, queries: Tensor, top_k: int) -> Iterator[tuple[np.ndarray, Sequence[int]]]:
        """For each query, cosines (m,) and the indices of those m sentences."""
        n = len(self.sentences)
        if self.faiss is not None and n and top_k:
            return zip(*self.faiss.search(queries.numpy(), min(top_k, n)))
        chunks = (chunk for part in self.vectors for chunk in part.split(INDEX_CHUNK_SIZE))
        cosines = torch.cat([queries @ chunk.float().T for chunk in chunks], dim=1)  # (q, n)
        return ((row, range(n)) for row in cosines.numpy())

    def save(self, path: str | Path, probe: Tensor, dtype: str = "fp32") -> None:
        """A safetensors file. probe (D,): a vector that identifies the model."""
        self.check_not_empty()
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; it must be {' or '.join(DTYPES)}")
        text = bytearray(json.dumps(self.sentences).encode())
        parts = [part.to(DTYPES[dtype]) for part in self.vectors]
        vectors = parts[0] if len(parts) == 1 else torch.cat(parts)  # one is not copied
        sentences = torch.frombuffer(text, dtype=torch.uint8)
        with atomic_file(path) as new:
            write_safetensors(new, {"vectors": vectors, "sentences": sentences, "probe": probe})

    @classmethod
    def load(cls, path: str | Path, probe: Tensor, use_faiss: bool = False) -> "Index":
        """What save wrote. The file is memory-mapped: only what a search reads is in memory.

        Raises: UserError or ModelError for another file, or another model's.
        """
        if not Path(path).is_file():
            raise UserError(f"{path}: no such index")
        index, tensors = cls(len(probe), use_faiss), read_safetensors(path)
        try:
            vectors, saved_probe = tensors["vectors"], tensors["probe"]
            sentences = json.loads(tensors["sentences"].numpy().tobytes())
            shape = (len(sentences), len(saved_probe))
            if vectors.dtype not in DTYPES.values() or vectors.shape != shape:
                raise ValueError
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{path} is not an index that save_index wrote") from None
        if saved_probe.shape != probe.shape:
            widths = f"its vectors have {shape[1]} numbers, the model's {len(probe)}"
            raise UserError(f"{path} was made by another model: {widths}")
        if not float(saved_probe @ probe) > 1 - 1e-5:
            raise UserError(f"{path} was made by another model or pooler; build it again")
        index.add(sentences, vectors)
        return index
