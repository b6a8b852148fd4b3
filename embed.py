"""Sentences to vectors, and what one does with vectors: similarity and search.

    from diffcse import DiffCSE
    model = DiffCSE("runs/demo-1/best")
    model.encode("a sentence")                      # (D,)
    model.similarity("a man plays", ["he plays"])   # (1,)
    model.build_index(["one", "two"]); model.search("uno", top_k=1, threshold=0)

Reference: SPEC 7.2 (poolers), SPEC 9 (the published tool, whose list queries ignored threshold and top_k).
Not here: adding to an index or keeping it on disk, approximate search, and a command line.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bert import Bert, UserError, load_bert
from data import Tokenizer, find_model, read_lines

POOLINGS = ("cls", "cls_before_pooler", "mean", "max", "avg_first_last", "avg_layer1_last", "avg_top2")


def open_model(name: str) -> tuple[Bert, Tokenizer]:
    """What encode() needs, of a model folder, a run's folder or a Hub name."""
    folder = find_model(name)
    bert = load_bert(folder)
    return bert, Tokenizer(folder).check_fits(folder, bert.cfg.vocab_size)


def check_pooling(bert: Bert, pooling: str) -> None:
    """Raises: UserError if there is no such pooling, or not for this model."""
    if pooling not in POOLINGS:
        raise UserError(f"pooling {pooling!r} is unknown; known are {', '.join(POOLINGS)}")
    if pooling == "cls" and bert.pooler is None:
        raise UserError("pooling 'cls' needs the model's own pooler and its file has none; use 'cls_before_pooler'")


def pool(bert: Bert, ids: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector for each row (SPEC 7.2). Shapes: ids, mask (B, T) -> (B, D).

    cls_before_pooler: the last layer's [CLS], what DiffCSE is trained for; cls: that through the model's own
    pooler, tanh(W x + b); mean, max: over the last layer's real tokens, [CLS] and [SEP] included; avg_first_last,
    avg_layer1_last, avg_top2: mean over the tokens of (X_0 + X_N) / 2, (X_1 + X_N) / 2 and (X_N-1 + X_N) / 2, X_0 being
    the embeddings' output. Both of the first two are called "first-last": the paper's figures are of X_0.
    """
    check_pooling(bert, pooling)
    states = bert(ids, mask, all_layers=True)  # X_0 .. X_N, each (B, T, D)
    first_token = states[-1][:, 0]  # (B, D)
    if pooling == "cls_before_pooler":
        return first_token
    if pooling == "cls":
        return torch.tanh(bert.pooler(first_token))
    weight = mask[:, :, None].to(states[-1].dtype)  # (B, T, 1)
    if pooling == "max":
        return states[-1].masked_fill(weight == 0, -torch.inf).max(dim=1).values
    other = {"mean": -1, "avg_first_last": 0, "avg_layer1_last": 1, "avg_top2": -2}[pooling]
    return ((states[other] + states[-1]) / 2 * weight).sum(1) / weight.sum(1)


@torch.no_grad()
def encode(bert: Bert, tokenizer: Tokenizer, sentences: list[str], pooling: str = "cls_before_pooler",
           batch_size: int = 128, max_length: int | None = None, normalize: bool = False, progress: bool | None = None,
           ) -> np.ndarray:  # fmt: skip
    """Vectors of sentences, in their order, in fp32 and without dropout. Shapes: n sentences -> (n, D) float32.

    Sentences are encoded longest first, so that a batch holds like lengths and little padding, and a batch that is
    too large for the memory fails at once. max_length None: as long as the model's position embeddings allow.
    normalize: to unit length. progress None: a bar from 5,000 sentences on, where a person watches.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    ids = tokenizer(sentences, bert.max_length if max_length is None else min(max_length, bert.max_length))
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    vectors = np.zeros((len(ids), bert.cfg.hidden_size), np.float32)
    training = bert.training
    bert.eval()
    try:
        with tqdm(total=len(ids), desc="encoding", unit=" sentences", leave=False,
                  disable=None if (len(ids) >= 5000 if progress is None else progress) else True) as bar:  # fmt: skip
            for start in range(0, len(ids), batch_size):
                rows = order[start : start + batch_size]
                lengths = torch.tensor([len(ids[i]) for i in rows])
                mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
                batch = torch.full(mask.shape, tokenizer.pad)
                batch[mask] = torch.tensor([t for i in rows for t in ids[i]])
                vectors[rows] = pool(bert, batch.to(bert.device), mask.to(bert.device), pooling).float().cpu().numpy()
                bar.update(len(rows))
    finally:
        bert.train(training)
    return unit(vectors) if normalize else vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each vector at length 1; a vector of zeros stays."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms)


class DiffCSE:
    """A trained encoder as a tool (SPEC 9). name: a model folder or Hub name. pooler: one of POOLINGS."""

    def __init__(self, name: str, device: str | None = None, pooler: str | None = None):
        self.bert, self.tokenizer = open_model(str(name))
        self.bert.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.pooler = pooler or "cls_before_pooler"
        check_pooling(self.bert, self.pooler)
        self.sentences: list[str] = []
        self.index: np.ndarray | None = None  # (n, D), unit vectors

    def encode(self, sentence: str | list[str], return_numpy: bool = False, normalize_to_unit: bool = True,
               keepdim: bool = False, batch_size: int = 64, max_length: int = 128) -> Tensor | np.ndarray:  # fmt: skip
        """Shapes: one str -> (D,), or (1, D) with keepdim; a list of n -> (n, D). A CPU tensor, or an array."""
        single = isinstance(sentence, str)
        vectors = encode(self.bert, self.tokenizer, [sentence] if single else list(sentence), self.pooler,
                         batch_size, max_length, normalize_to_unit)  # fmt: skip
        vectors = vectors[0] if single and not keepdim else vectors
        return vectors if return_numpy else torch.from_numpy(vectors)

    def similarity(self, queries: str | list[str], keys: str | list[str] | np.ndarray | Tensor) -> float | np.ndarray:
        """Cosine. Shapes: list, list -> (n, m); str, list -> (m,); list, str -> (n, 1); str, str -> a float.

        keys may be vectors made before, (m, D).
        """
        if isinstance(keys, (np.ndarray, Tensor)):
            key_vectors = unit(np.atleast_2d(np.asarray(keys)))
        else:
            key_vectors = self.encode(keys, return_numpy=True, keepdim=True)
        scores = self.encode(queries, return_numpy=True) @ key_vectors.T  # (n, m) or (m,)
        return float(scores[0]) if isinstance(queries, str) and isinstance(keys, str) else scores

    def build_index(self, sentences: list[str] | str | Path, batch_size: int = 64) -> None:
        """Encode what will be searched: a list, or the path of a file with one sentence a line."""
        if isinstance(sentences, (str, Path)):
            sentences = list(read_lines(Path(sentences)))
        self.sentences = [sentence.rstrip() for sentence in sentences]
        self.index = self.encode(self.sentences, return_numpy=True, batch_size=batch_size)

    def search(self, queries: str | list[str], threshold: float = 0.6, top_k: int = 5) -> list:
        """The top_k most similar sentences at or above the threshold, best first, as (sentence, cosine).

        A list of queries gives a list of such lists. Raises: UserError before build_index.
        """
        if self.index is None:
            raise UserError("there is nothing to search yet: call build_index(sentences) first")
        if isinstance(queries, str):
            return self.search([queries], threshold, top_k)[0]
        if top_k < 0:
            raise UserError(f"top_k is {top_k}: it must be 0 or above")
        results = []
        for scores in self.encode(queries, return_numpy=True) @ self.index.T:  # each (n,)
            best = np.argsort(-scores, kind="stable")[:top_k]
            results.append([(self.sentences[i], float(scores[i])) for i in best if scores[i] >= threshold])
        return results
