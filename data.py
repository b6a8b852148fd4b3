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
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from bert import ModelError, read_json
from engine import distributed
from engine.errors import UserError

# ------------------------------------------------------------------------------------------------
# Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("vocab.txt", "vocab.json", "merges.txt")
ROLES = ("cls_token", "sep_token", "pad_token", "mask_token", "unk_token")
BERT_TOKENS = ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]")
ROBERTA_TOKENS = ("<s>", "</s>", "<pad>", "<mask>", "<unk>")


class Tokenizer:
    """A model folder's tokenizer: tokenizer.json, else vocab.txt, else vocab.json and merges.txt.

    Raises: UserError for a folder without one, a broken file, or missing special tokens.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        self.backend = load_tokenizer(folder, {file.name for file in self.files})
        self.backend.no_padding()
        self.backend.no_truncation()
        self.vocab_size = self.backend.get_vocab_size()
        self.special_ids = special_ids(self.backend, folder)
        self.cls_id, self.sep_id, self.pad_id, self.mask_id, self.unk_id = self.special_ids

    def __call__(self, sentences: list[str], max_length: int) -> list[list[int]]:
        """Ids of each sentence, at most max_length including [CLS] and [SEP]."""
        if max_length < 2:
            raise UserError(f"max_length is {max_length}: [CLS] and [SEP] alone take 2")
        self.backend.enable_truncation(max_length)
        try:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(sentences)]
        except TypeError:  # a Python string may hold half of a character
            damaged = next(s for s in sentences if s != s.encode("utf-8", "replace").decode())
            raise UserError(f"{damaged!r:.80} is not valid Unicode: a lone surrogate") from None
        finally:
            self.backend.no_truncation()

    def vocabulary(self) -> dict[str, int]:
        return self.backend.get_vocab()

    def check_fits(self, folder: str | Path, vocab_size: int) -> "Tokenizer":
        if self.vocab_size > vocab_size:
            sizes = f"{self.vocab_size} tokens, the model's vocab_size is {vocab_size}"
            raise UserError(f"{folder}: the tokenizer has {sizes}: they do not belong together")
        return self

    def save(self, folder: Path, max_length: int) -> None:
        """Files for transformers. A missing tokenizer_config.json is made."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), "utf-8")
        if not (folder / "tokenizer_config.json").is_file():
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": max_length,
                "model_input_names": ["input_ids", "attention_mask"],
                **dict(zip(ROLES, map(self.backend.id_to_token, self.special_ids))),
            }
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def special_ids(backend: tokenizers.Tokenizer, folder: Path) -> list[int]:
    tokens = BERT_TOKENS if backend.token_to_id("[CLS]") is not None else ROBERTA_TOKENS
    ids = [backend.token_to_id(token) for token in tokens]
    if None in ids:
        raise UserError(f"{folder}: the vocabulary has no {tokens[ids.index(None)]}")
    return ids


def load_tokenizer(folder: Path, found: set[str]) -> tokenizers.Tokenizer:
    try:
        if "tokenizer.json" in found:
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if "vocab.txt" in found:
            path = folder / "tokenizer_config.json"
            config = read_json(path) if path.name in found else {}
            return tokenizers.BertWordPieceTokenizer(
                str(folder / "vocab.txt"),
                lowercase=config.get("do_lower_case", True),
                strip_accents=config.get("strip_accents"),
            )._tokenizer
        if {"vocab.json", "merges.txt"} <= found:
            return load_roberta_tokenizer(folder)
    except (UserError, ModelError):
        raise
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{folder}: the tokenizer cannot be read ({error})") from None
    raise UserError(f"{folder} has no tokenizer.json, vocab.txt, or vocab.json with merges.txt")


def load_roberta_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    backend = tokenizers.ByteLevelBPETokenizer(*files)._tokenizer
    cls, sep, *_ = zip(ROBERTA_TOKENS, special_ids(backend, folder))  # raises if one is missing
    mask = tokenizers.AddedToken("<mask>", lstrip=True)
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", mask])
    backend.post_processor = tokenizers.processors.RobertaProcessing(sep, cls)
    return backend


# ------------------------------------------------------------------------------------------------
# Sentence files


def read_lines(path: Path) -> Iterator[str]:
    """Lines without their ends; of standard input if the path is "-".

    Only \\n ends a line; the reader of the published run also cut at form feeds and the like.
    Raises: UserError with file and line if the text is not UTF-8.
    """
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    name = "standard input" if str(path) == "-" else path
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} line {number}: not UTF-8 (byte 0x{error.object[error.start]:02x} at column "
            f"{error.start + 1}); if it is Latin-1: iconv -f latin1 -t utf8 {path.name} > fixed.txt"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read {name}: {error.args[-1]}") from None


def read_sentences(path: str | Path) -> Iterator[tuple[str, ...]]:
    """Rows (sentence,), (anchor, positive) or (anchor, positive, hard negative), streamed.

    .txt has a sentence a line; empty lines count, as in the published code. .csv and .tsv have a
    header line and 1 to 3 columns; an empty cell becomes a space (official train.py), and blank
    lines are skipped. Each may end in .gz or .xz. Raises: UserError that names the file and line.
    """
    path = Path(path)
    suffix = Path(path.stem).suffix if path.suffix in (".gz", ".xz") else path.suffix
    if suffix == ".txt":
        yield from ((line,) for line in read_lines(path))
        return
    if suffix not in (".csv", ".tsv"):
        raise UserError(f"{path}: expected .txt, .csv or .tsv (also .gz, .xz), not {suffix!r}")
    lines = (line + "\n" for line in read_lines(path))  # a quoted cell may span lines
    rows = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    try:
        columns = len(next(rows, [""]))
        if not 1 <= columns <= 3:
            raise csv.Error(f"{columns} columns; expected 1, 2 (pair) or 3 (with a hard negative)")
        for row in filter(None, rows):
            if len(row) != columns:
                raise csv.Error(f"{len(row)} columns, but the header has {columns}")
            yield tuple(cell or " " for cell in row)
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: {error}") from None


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
    """x' (paper section 3). Each token is masked with probability `ratio`, special ones never.

    Shapes: x (R, T) ids -> x_masked (R, T), a copy; selected (R, T) bool.
    """
    special = torch.isin(x, torch.tensor(tokenizer.special_ids))
    selected = (torch.rand(x.shape, generator=rng) < ratio) & ~special
    return corrupt(x, selected, tokenizer, masking, rng), selected


def corrupt(
    x: Tensor, selected: Tensor, tokenizer: Tokenizer, masking: str, rng: torch.Generator
) -> Tensor:
    """masking "all": selected tokens become [MASK] (the paper's x' = m * x). "80-10-10" (the code's
    and BERT's): 80 % of them do, 10 % become a random id (special ones included), 10 % stay.

    Shapes: x, selected (R, T) -> (R, T).
    """
    x_masked = torch.where(selected, tokenizer.mask_id, x)
    if masking == "80-10-10":
        not_masked = selected & (torch.rand(x.shape, generator=rng) >= 0.8)
        random_ids = torch.randint(tokenizer.vocab_size, x.shape, generator=rng)
        random = torch.rand(x.shape, generator=rng) < 0.5
        x_masked = torch.where(not_masked, torch.where(random, random_ids, x), x_masked)
    return x_masked
