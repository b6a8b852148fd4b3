"""From text to batches: the tokenizer, sentence files, batches, and BERT's masking.

    tokenizer = Tokenizer("assets/small-bert")
    tokenizer(["a sentence"], max_length=32)                    # lists of ids, with [CLS] and [SEP]
    x_masked, selected = mask_tokens(x, tokenizer, 0.3, "80-10-10", rng)

Shapes: B sentences, V views each (2: the sentence twice, or a pair; 3: with a hard negative),
R = B * V rows (row V*i + v is view v of sentence i), T tokens including padding.
Not here: filtering or deduplication of sentences (the published code does neither).
"""

import csv
import gzip
import itertools
import json
import lzma
import shlex
import sys
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import distributed
from engine.errors import UserError
from engine.tokenizer_folder import load_tokenizer

# ------------------------------------------------------------------------------------------------
# Tokenizer


class Tokenizer:
    """A model folder's tokenizer; it gives the ids that transformers' AutoTokenizer gives.

    Attributes: vocab_size, the largest id + 1; special_ids; cls_id, sep_id, pad_id, unk_id;
    mask_id, which only training needs (None: the vocabulary has none).
    Raises: UserError for a folder without one, a broken file, or an unsupported tokenizer.
    """

    def __init__(self, folder: str | Path):
        self.backend, ids = load_tokenizer(Path(folder))
        self.backend.no_truncation()
        self.vocab_size = max(self.vocabulary().values()) + 1
        self.cls_id, self.sep_id, self.pad_id = ids["cls_token"], ids["sep_token"], ids["pad_token"]
        self.unk_id, self.mask_id = ids["unk_token"], ids["mask_token"]
        self.special_ids = sorted({i for i in ids.values() if i is not None})

    def __call__(self, sentences: list[str], max_length: int) -> list[list[int]]:
        """Ids of each sentence, at most max_length including [CLS] and [SEP]."""
        if max_length < 2:
            raise UserError(f"max_length is {max_length}: [CLS] and [SEP] alone take 2")
        try:
            rows = [encoding.ids for encoding in self.backend.encode_batch_fast(sentences)]
        except TypeError:  # a Python string may hold half of a character
            damaged = next(s for s in sentences if s != s.encode("utf-8", "replace").decode())
            raise UserError(f"{damaged!r:.80} is not valid Unicode: a lone surrogate") from None
        # Cut here: the backend's own truncation is a setting, which threads would share
        cut = max_length - 1
        return [row if len(row) <= max_length else [*row[:cut], self.sep_id] for row in rows]

    def vocabulary(self) -> dict[str, int]:
        return self.backend.get_vocab()

    def check_fits(self, folder: str | Path, vocab_size: int) -> "Tokenizer":
        if self.vocab_size > vocab_size:
            token, last = max(self.vocabulary().items(), key=lambda item: item[1])
            raise UserError(f"{folder}: {token!r} has id {last}; the model has {vocab_size} ids")
        return self

    def check_mask(self, model: str | Path) -> "Tokenizer":
        if self.mask_id is None:
            raise UserError(f"{model}: the vocabulary has no mask token, which is needed")
        return self

    def save(self, folder: Path, max_length: int) -> None:
        """tokenizer.json, and a tokenizer_config.json with the class that takes all of it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), "utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        tokens = {i: token for token, i in self.vocabulary().items()}
        named = {*self.backend.get_added_tokens_decoder(), self.pad_id}  # others would be added
        for role in ("cls", "sep", "pad", "mask", "unk"):
            if (i := getattr(self, f"{role}_id")) in named:
                config[f"{role}_token"] = tokens[i]  # id_to_token may return it in lower case
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------
# Sentence files

STARTS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16"}
STARTS |= {b"\xfe\xff": "UTF-16", b"\0": "UTF-16BE"}  # how a file in another encoding begins
CSV_ERRORS = {  # the csv module's words, and ours
    "unexpected end": "a quote in the row that begins here is never closed",
    "expected after": 'text after a closing quote; a quote inside a quoted cell is written as ""',
    "new-line": r"a carriage return inside the row; if all lines end so: tr '\r' '\n' < OLD > NEW",
}


def file_format(path: Path) -> tuple[str, str]:
    """(".csv", ".gz"): suffix and compression in lower case; "" for one that is missing."""
    name = path.name.lower()
    packed = Path(name).suffix if name.endswith((".gz", ".xz")) else ""
    return Path(name.removesuffix(packed)).suffix, packed


def how_to_convert(path: Path, line: bytes) -> str:
    """The likely encoding of a line that is not UTF-8, and the command that converts its file."""
    suffix, packed = file_format(path)
    show = {".gz": "gunzip -c", ".xz": "unxz -c"}.get(packed, "cat") + " " + shlex.quote(str(path))
    other = "UTF-16LE" if b"\0" in line else "cp1252"  # which has the letters of Latin-1, and more
    other = next((STARTS[start] for start in STARTS if line.startswith(start)), other)
    return f"if it is {other}: {show} | iconv -f {other} -t UTF-8 > fixed{suffix}"


def read_lines(path: Path, encoding: str = "utf-8", keep_ends: bool = False) -> Iterator[str]:
    """Lines without their ends; of standard input if the path is "-".

    Only \\n ends a line; the reader of the published run also cut at form feeds and the like.
    Raises: UserError with file and line if the text is not UTF-8.
    """
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(file_format(path)[1], open)
    name = "standard input" if str(path) == "-" else path
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode(encoding).removeprefix("\ufeff" if number == 1 else "")
                if number == 1 and (i := line.find(b"\0")) >= 0:  # UTF-16 may be valid UTF-8
                    raise UnicodeDecodeError(encoding, line, i, i + 1, "NUL")
                yield text if keep_ends else text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} line {number}: not UTF-8 (byte 0x{error.object[error.start]:02x} at column "
            f"{error.start + 1}); {how_to_convert(path, error.object)}"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read {name}: {error.args[-1]}") from None


def read_table(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line number, cells) of the rows of a .csv or .tsv, header first, without blank lines.

    A .csv is quoted as in RFC 4180; in a .tsv a quote is a character. An empty cell becomes a space
    (official train.py). Raises: UserError that names the line.
    """
    is_tsv, columns, number = file_format(path)[0] == ".tsv", 0, 1
    quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
    csv.field_size_limit(2**31 - 1)  # of the whole process; long sentences are cut later
    rows = csv.reader(read_lines(path, keep_ends=True), strict=True, **quoting)
    try:
        for row in rows:
            if not columns and len(row) == 1 and {"\t", ";"} & set(row[0]):
                raise csv.Error("the header has a tab or ;, but .csv needs commas, and .tsv tabs")
            if not columns and row and all(cell[:1] == cell[-1:] == '"' for cell in row):
                raise csv.Error("the header is in quotes, but a .tsv has none: write a .csv")
            if not columns and len(row) > 1 and not all(row):
                raise csv.Error("a column has no name; pandas: to_csv(index=False) leaves it out")
            columns = columns or len(row)
            if columns > 3:
                raise csv.Error(f"{columns} columns; expected 1, 2 (pair) or 3 (hard negative)")
            if row and len(row) != columns:
                raise csv.Error(f"{len(row)} columns, but the header has {columns}")
            if row:
                yield number, tuple(cell or " " for cell in row)
            number = rows.line_num + 1
    except csv.Error as error:
        reason = next((CSV_ERRORS[words] for words in CSV_ERRORS if words in str(error)), error)
        raise UserError(f"{path} line {number}: {reason}") from None


def read_sentences(path: str | Path) -> Iterator[tuple[str, ...]]:
    """Rows (sentence,), (anchor, positive) or (anchor, positive, hard negative), streamed.

    .txt has a sentence a line; empty lines count, as in the published code. .csv and .tsv have a
    header line and 1 to 3 columns. Each may end in .gz or .xz. Raises: UserError with the line.
    """
    path = Path(path)
    suffix, _ = file_format(path)
    if suffix == ".txt":
        yield from ((line,) for line in read_lines(path))
    elif suffix in (".csv", ".tsv"):
        yield from (cells for _, cells in itertools.islice(read_table(path), 1, None))
    else:
        raise UserError(f"{path}: expected .txt, .csv or .tsv (also .gz, .xz), not {suffix!r}")


# ------------------------------------------------------------------------------------------------
# Batches


@dataclass
class Batch:
    """One step's sentences.

    Shapes: x, x_masked (R, T) ids; mask (R, T) bool, True at tokens; selected (R, T) bool, the
    positions at which x_masked was masked.
    """

    x: Tensor
    mask: Tensor
    x_masked: Tensor
    selected: Tensor
    views: int = 2
    width: int | None = None  # of the longest row, if T is larger (None: T)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.mask, self.x_masked, self.selected

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device) for t in self.tensors()), self.views, self.width)

    def take(self, rows: slice, views: int) -> "Batch":
        return Batch(*(t[rows] for t in self.tensors()), views, self.width)

    def first_views(self) -> "Batch":
        return self.take(slice(None, None, self.views), 1)

    def shard(self) -> "Batch":
        """This process's part. All parts are equally large; remaining sentences are left out."""
        part = distributed.shard(len(self.x) // self.views)
        return self.take(slice(part.start * self.views, part.stop * self.views), self.views)

    def pad(self, T: int, pad_id: int) -> "Batch":
        """Wider, up to T tokens."""
        width, values = self.x.shape[1], (pad_id, False, pad_id, False)
        tensors = [F.pad(t, (0, T - width), value=v) for t, v in zip(self.tensors(), values)]
        return Batch(*tensors, self.views, width)


def mask_tokens(
    x: Tensor, tokenizer: Tokenizer, ratio: float, masking: str, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x' (paper section 3). Each token is selected with probability `ratio`, special ones never.

    masking "all": selected tokens become [MASK] (the paper's x' = m * x). "80-10-10" (the code's
    and BERT's): 80 % of them do, 10 % become a random id (special ones included), 10 % stay.
    Shapes: x (R, T) ids -> x_masked (R, T), a copy; selected (R, T) bool.
    """
    special = torch.isin(x, torch.tensor(tokenizer.special_ids))
    selected = (torch.rand(x.shape, generator=rng) < ratio) & ~special
    x_masked = torch.where(selected, tokenizer.mask_id, x)
    if masking == "80-10-10":
        not_masked = selected & (torch.rand(x.shape, generator=rng) >= 0.8)
        random_ids = torch.randint(tokenizer.vocab_size, x.shape, generator=rng)
        random = torch.rand(x.shape, generator=rng) < 0.5
        x_masked = torch.where(not_masked, torch.where(random, random_ids, x), x_masked)
    return x_masked, selected
