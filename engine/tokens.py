"""Token ids on disk: a safetensors file, memory-mapped.

Without this file a run would tokenise its sentences each time it starts (a minute for a million)
and keep them in memory.
"""

import hashlib
import inspect
import itertools
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor
from tqdm import tqdm

from bert import ModelError, read_safetensors, write_safetensors
from data import Tokenizer, read_sentences
from engine.errors import UserError, atomic_file
from engine.hub import cache_folder

TOKENIZE_CHUNK_SIZE = 10_000  # rows at a time

Reader = Callable[[Path], Iterable[tuple[str, ...]]]


def tokens_path(path: Path, tokenizer: Tokenizer, max_length: int, reader: Reader) -> Path:
    """The cache of a file's tokens. It has another name after any change of the file, the tokenizer
    or the source of its reader."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    key = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, max_length, reader.__name__]
    key += [tokenizers.__version__, tokenizer.backend.to_str()]
    key += [inspect.getsource(sys.modules[name]) for name in ("data", reader.__module__)]
    return cache_folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.tokens"


def tokenize(
    rows: Iterable[tuple[str, ...]], tokenizer: Tokenizer, max_length: int
) -> dict[str, Tensor]:
    """ids: of all sentences, one after the other; starts: of each sentence, and the end of the
    last; columns: sentences per row; checksum: of the others."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    ids, lengths, columns = [np.zeros(0, dtype)], [0], 1
    rows = iter(tqdm(rows, desc="tokenising", unit=" rows", leave=False, disable=None))
    while chunk := list(itertools.islice(rows, TOKENIZE_CHUNK_SIZE)):
        columns = len(chunk[0])
        encoded = tokenizer(list(itertools.chain.from_iterable(chunk)), max_length)
        lengths += map(len, encoded)
        ids.append(np.fromiter(itertools.chain.from_iterable(encoded), dtype))
    tensors = {
        "ids": torch.tensor(np.concatenate(ids)),
        "starts": torch.tensor(lengths).cumsum(0),
        "columns": torch.tensor(columns),
    }
    return tensors | {"checksum": torch.tensor(checksum(tensors))}


def checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in ("ids", "starts", "columns"):
        value = zlib.crc32(tensors[name].numpy(), value)
    return value


def cached_tokens(
    source: Path, tokenizer: Tokenizer, max_length: int, reader: Reader
) -> dict[str, Tensor]:
    """tokenize(reader(source)), memory-mapped. A file is tokenised only once."""
    path = tokens_path(source, tokenizer, max_length, reader)
    try:
        tensors = read_safetensors(path)
        if tensors["checksum"] == checksum(tensors):
            return tensors
    except (ModelError, KeyError):  # missing or damaged
        pass
    tensors = tokenize(reader(source), tokenizer, max_length)
    advice = f"it caches the tokens of {source}; set XDG_CACHE_HOME=DIR to use another folder"
    with atomic_file(path, advice) as temporary:
        write_safetensors(temporary, tensors)
    return read_safetensors(path)


class TokenizedSentences:
    """All rows of a sentence file (or of an iterable) as ids. Length: the number of rows.

    A file of one column gives V = 2 views that share one copy; with `views` given, the columns are
    repeated as often as needed. Raises: UserError for a file that cannot be read.
    """

    def __init__(
        self,
        source: Path | Iterable[tuple[str, ...]],
        tokenizer: Tokenizer,
        max_length: int,
        reader: Reader = read_sentences,
        views: int | None = None,
    ):
        self.pad_id = tokenizer.pad_id
        if isinstance(source, Path):
            tensors = cached_tokens(source, tokenizer, max_length, reader)
        else:
            tensors = tokenize(source, tokenizer, max_length)
        self.ids, self.starts = tensors["ids"].numpy(), tensors["starts"].numpy()
        self.columns, self.checksum = int(tensors["columns"]), int(tensors["checksum"])
        self.views = views or max(2, self.columns)
        self.last_order: tuple = (None, None)

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.columns

    def batches_per_epoch(self, batch_size: int) -> int:
        return math.ceil(len(self) / batch_size)

    def shuffled(self, seed: int, epoch: int) -> np.ndarray:
        """The rows' order in an epoch, a function of (seed, epoch) alone. Shapes: -> (rows,)."""
        if self.last_order[0] != (seed, epoch):
            order = np.random.default_rng([seed, epoch]).permutation(len(self))
            self.last_order = ((seed, epoch), order)
        return self.last_order[1]

    def rows(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Shapes: indices (B,) -> x (R, T) int64, mask (R, T) bool; T is the longest row's."""
        columns = np.arange(self.views) % self.columns
        sentences = (indices[:, None] * self.columns + columns).reshape(-1)  # (R,)
        starts, ends = self.starts[sentences], self.starts[sentences + 1]
        mask = np.arange((ends - starts).max()) < (ends - starts)[:, None]  # (R, T)
        x = np.full(mask.shape, self.pad_id, np.int64)
        x[mask] = np.concatenate([self.ids[start:end] for start, end in zip(starts, ends)])
        return torch.from_numpy(x), torch.from_numpy(mask)
