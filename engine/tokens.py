"""Token ids on disk: a safetensors file, memory-mapped.

Without this file a run would tokenise its sentences each time it starts (a minute for a million)
and keep them in memory.
"""

import hashlib
import inspect
import itertools
import json
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
from data import Tokenizer, file_format, read_sentences
from engine import distributed
from engine.errors import UserError, atomic_file
from engine.hub import cache_folder

TOKENIZE_CHUNK_SIZE = 10_000  # rows at a time

Rows = Iterable[tuple[str, ...]]
Reader = Callable[[Path], Rows]
Tensors = dict[str, Tensor]


def tokens_path(path: Path, tokenizer: Tokenizer, max_length: int, reader: Reader) -> Path:
    """The cache of a file's tokens. Its name changes with the file's content and kind, the
    tokenizer and the reader's source."""
    content = hashlib.sha256()  # a second for 1.5 GB
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                content.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    key = [content.hexdigest(), file_format(path), max_length, reader.__name__]
    key += [tokenizers.__version__, tokenizer.backend.to_str()]
    key += [inspect.getsource(sys.modules[name]) for name in ("data", reader.__module__)]
    return cache_folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.tokens"


def tokenize(rows: Rows, tokenizer: Tokenizer, max_length: int) -> Tensors:
    """ids: of all sentences, one after the other; starts: of each sentence, and the end of the
    last; columns: sentences per row; checksum: of the others."""
    dtype = torch.uint16 if tokenizer.vocab_size <= 1 << 16 else torch.int32
    ids, lengths, columns = [torch.zeros(0, dtype=dtype)], [0], 1
    rows = iter(tqdm(rows, desc="tokenising", unit=" rows", leave=False, disable=None))
    while chunk := list(itertools.islice(rows, TOKENIZE_CHUNK_SIZE)):
        columns = len(chunk[0])
        encoded = tokenizer(list(itertools.chain.from_iterable(chunk)), max_length)
        lengths += map(len, encoded)
        ids.append(torch.tensor(list(itertools.chain.from_iterable(encoded)), dtype=dtype))
    tensors = {"ids": torch.cat(ids), "starts": torch.tensor(lengths).cumsum(0)}
    tensors["columns"] = torch.tensor(columns)
    return tensors | {"checksum": torch.tensor(checksum(tensors))}


def checksum(tensors: Tensors) -> int:
    """The sum of the CRC-32 of each tensor's name and bytes, without "checksum". 1 GB a second."""
    total = 0
    for name in tensors.keys() - {"checksum"}:
        flat = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
        total += zlib.crc32(flat.numpy(), zlib.crc32(name.encode()))
    return total


def cached_tokens(path: Path, tokenizer: Tokenizer, max_length: int, reader: Reader) -> Tensors:
    """tokenize(reader(path)), memory-mapped: a file is tokenised only once."""
    cache = tokens_path(path, tokenizer, max_length, reader)
    try:
        tensors = read_safetensors(cache)
        if int(tensors["checksum"]) == checksum(tensors):
            return tensors
    except (ModelError, KeyError):  # missing or damaged
        pass
    tensors = tokenize(reader(path), tokenizer, max_length)
    advice = f"it caches the tokens of {path}; set XDG_CACHE_HOME=DIR to use another folder"
    with atomic_file(cache, advice) as temporary:
        write_safetensors(temporary, tensors)
    return read_safetensors(cache)


class TokenizedSentences:
    """All rows of a sentence file (or of an iterable) as ids. Length: the number of rows.

    A file of one column gives V = 2 views that share one copy; with `views` given, the columns are
    repeated as often as needed. Raises: UserError for a file that cannot be read.
    """

    def __init__(
        self,
        source: Path | Rows,
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
        """A last batch is smaller; with fewer sentences than processes it is left out."""
        batches, rest = divmod(len(self), batch_size)
        return batches + (rest >= distributed.world_size())

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
