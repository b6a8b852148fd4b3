"""From text to batches: the tokenizer, sentence files, batches, BERT's masking, and where models and data come from.

Letters: B sentences in a batch, V views of each (2: the sentence twice, or a pair; 3: with a hard negative),
T tokens in a row, padding included. Rows are sentence-major: row V*i + v is view v of sentence i (SPEC 0).

Everything random here is a function of (seed, epoch) or (seed, step), so a resumed run needs no saved state.

Not here: JSON-lines files; filtering or deduplication of the user's sentences (the published code does neither);
several workers (sentences are tokenised once, up front, so that a batch is two array look-ups).
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import mmap
import os
import re
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tokenizers
import torch
from torch import Tensor
from tqdm import tqdm

from bert import UserError, read_json, write_atomically

# ----------------------------------------------------------------------------------------------------------------
# Tokenizer


class Tokenizer:
    """A model folder's tokenizer: tokenizer.json, else vocab.txt (WordPiece), else vocab.json + merges.txt (BPE).

    Attributes: cls, sep, pad, mask, unk: ids; special_ids: those five; files: what to copy into a saved model.
    Raises: UserError for a folder without one, a broken file, or a vocabulary without the special tokens.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.files = [p for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
                                     "vocab.json", "merges.txt") if (p := folder / name).is_file()]  # fmt: skip
        found = {p.name for p in self.files}
        try:
            if "tokenizer.json" in found:
                self.backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            elif "vocab.txt" in found:
                config = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in found else {}
                self.backend = tokenizers.BertWordPieceTokenizer(
                    str(folder / "vocab.txt"), lowercase=config.get("do_lower_case", True),
                    strip_accents=config.get("strip_accents"))._tokenizer  # fmt: skip
            elif {"vocab.json", "merges.txt"} <= found:
                self.backend = _byte_level_bpe(folder)
            else:
                raise UserError(f"{folder} holds no tokenizer: neither tokenizer.json, nor vocab.txt, nor vocab.json with merges.txt")
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{folder}: its tokenizer cannot be read ({error})") from None
        self.backend.no_padding()  # files may carry settings of their own: padding is our batches' business
        self.backend.no_truncation()
        self.vocab_size = self.backend.get_vocab_size()
        style = ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]") if self.backend.token_to_id("[CLS]") is not None else \
                ("<s>", "</s>", "<pad>", "<mask>", "<unk>")  # fmt: skip
        ids = [self.backend.token_to_id(token) for token in style]
        if None in ids:
            raise UserError(f"{folder}: the vocabulary has no {style[ids.index(None)]}")
        self.cls, self.sep, self.pad, self.mask, self.unk = ids
        self.special_ids = ids
        self.last: tuple = ([], 0, [])  # what was asked last, and its answer: a training run evaluates the same sentences again and again

    def __call__(self, sentences: list[str], max_length: int) -> list[list[int]]:
        """Ids of each sentence, [CLS] and [SEP] included in the at most max_length (SPEC 1.2). Runs in parallel."""
        if max_length < 2:
            raise UserError(f"max_length is {max_length}: [CLS] and [SEP] alone take 2")
        if self.last[:2] != (sentences, max_length):
            self.last = (sentences[:], max_length, self._ids(sentences, max_length))
        return self.last[2]

    def _ids(self, sentences: list[str], max_length: int) -> list[list[int]]:
        self.backend.enable_truncation(max_length)
        try:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(sentences)]
        except TypeError:  # a str in Python may hold half of a character
            bad = next(s for s in sentences if any("\ud800" <= c <= "\udfff" for c in s))
            raise UserError(f"{bad!r:.80} cannot be written as UTF-8: it holds a lone surrogate, of a damaged or wrongly decoded text") from None

    def vocabulary(self) -> dict[str, int]:
        return self.backend.get_vocab()

    def save(self, folder: Path, max_length: int) -> None:
        """Its files for transformers: the old ones, tokenizer.json as it works here, and what must be said about it if nothing was."""
        for file in self.files:
            if file.name != "tokenizer.json":
                write_atomically(folder / file.name, file.read_bytes())
        self.backend.no_truncation()
        write_atomically(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        if not any(file.name == "tokenizer_config.json" for file in self.files):
            names = ("cls_token", "sep_token", "pad_token", "mask_token", "unk_token")
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, "clean_up_tokenization_spaces": False,
                      "model_input_names": ["input_ids", "attention_mask"],
                      **{name: self.backend.id_to_token(i) for name, i in zip(names, self.special_ids)}}  # fmt: skip
            write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def check_fits(self, folder: str | Path, vocab_size: int) -> "Tokenizer":
        """Itself, if a model of that many words can embed every id; else UserError."""
        if self.vocab_size > vocab_size:
            raise UserError(f"{folder}: the tokenizer knows {self.vocab_size} tokens, the model's vocab_size is {vocab_size}: "
                            "they do not belong together")  # fmt: skip
        return self


def _byte_level_bpe(folder: Path) -> tokenizers.Tokenizer:
    """RoBERTa's tokenizer from vocab.json and merges.txt; as its tokenizer.json would say it."""
    backend = tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))._tokenizer
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    ids = {token: backend.token_to_id(token) for token in special}
    if None in ids.values():  # add_special_tokens would invent ids that the model has no rows for
        raise UserError(f"{folder}: the vocabulary has no {[token for token in special if ids[token] is None][0]}")
    backend.add_special_tokens([*special[:-1], tokenizers.AddedToken("<mask>", lstrip=True)])
    backend.post_processor = tokenizers.processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=False)  # fmt: skip
    return backend


# ----------------------------------------------------------------------------------------------------------------
# Sentences: files -> rows of 1, 2 or 3 strings


def read_lines(path: Path) -> Iterator[str]:
    """Lines without their ends, streamed; of standard input if the path is "-". Raises UserError with file and line where the text is not UTF-8."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    number, standard = 0, str(path) == "-"
    what = "standard input" if standard else path
    try:
        with nullcontext(sys.stdin.buffer) if standard else opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                # Only \n ends a line; the published run's reader also cut at form feeds and the like (SPEC 1.1).
                yield text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} line {number}: not UTF-8 (byte 0x{error.object[error.start]:02x} at column {error.start + 1}); "
                        f"if it is Latin-1: iconv -f latin1 -t utf8 {path.name} > fixed.txt") from None  # fmt: skip
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"{what} {reason}") from None


def read_sentences(path: str | Path) -> Iterator[tuple[str, ...]]:
    """Rows of a sentence file, streamed: (sentence,), (anchor, positive) or (anchor, positive, hard negative).

    .txt is one sentence a line, empty lines kept (SPEC 1.1); .csv and .tsv have a header line, and their number of
    columns decides. Each may end in .gz or .xz. An empty cell becomes one space, as in the published code.
    Raises: UserError that names the file and line.
    """
    path = Path(path)
    suffix = Path(path.stem).suffix if path.suffix in (".gz", ".xz") else path.suffix
    if suffix == ".txt":
        yield from ((line,) for line in read_lines(path))
        return
    if suffix not in (".csv", ".tsv"):
        raise UserError(f"{path}: sentences are read from .txt, .csv and .tsv (also .gz, .xz), not from {suffix or 'no ending'!r}")
    lines = (line + "\n" for line in read_lines(path))  # a quoted cell may span lines
    rows = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True)  # strict: an unclosed quote is an error
    try:
        header = next(rows, None)
        if header is None:
            return
        columns = len(header)
        if not 1 <= columns <= 3:
            raise UserError(f"{path} line 1: {columns} columns; 1 (sentence), 2 (pair) or 3 (pair, hard negative) are meant")
        for row in rows:
            if len(row) != columns and row:  # csv yields [] for an empty line
                raise UserError(f"{path} line {rows.line_num}: {len(row)} columns where the header has {columns}")
            yield tuple(cell or " " for cell in row or [""] * columns)
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: {error}") from None


ABBREVIATIONS = frozenset("""Mr Mrs Ms Dr Prof St Mt Ft Gen Col Lt Capt Maj Sgt Cmdr Adm Gov Sen Rep Rev Hon Fr Sr Jr Messrs Mme Bros vs v c ca cf fl b d e.g i.e
    viz approx al eds vol Vol vols pp Nos Op op Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec""".split())  # fmt: skip
NUMBERED = frozenset("No no Nr p pt Pt Fig fig Sec sec Ch ch Art art".split())  # abbreviations before a number, words elsewhere
SENTENCE_END = re.compile(r"""([.!?]+)["'”’»)\]]*\s+(?=["'“‘«(\[]*(\w))""")


def split_sentences(paragraph: str) -> list[str]:
    """Cut after . ! or ? (and closing quotes or brackets) and white space where a capital or a digit follows.

    Not after a full stop that may belong to its word: of a title or another of ABBREVIATIONS, of initials ("J. Smith", "U.S. Senate"), of "No. 5".
    A rule for English. Its errors were counted by hand: results/splitter.json.
    """
    sentences, start = [], 0
    for end in SENTENCE_END.finditer(paragraph):
        mark, following = end.groups()
        if not (following.isupper() or following.isdigit()):
            continue
        word = paragraph[start : end.start()].rpartition(" ")[2].lstrip("\"'“‘«([")
        if mark == "." and (word in ABBREVIATIONS or word in NUMBERED and following.isdigit() or re.fullmatch(r"(\w\.)*[^\W\d_]", word)):
            continue
        sentences.append(paragraph[start : end.end()].rstrip())
        start = end.end()
    return [sentence for sentence in (*sentences, paragraph[start:].rstrip()) if sentence]


def read_document_pairs(path: str | Path) -> Iterator[tuple[str, str]]:
    """Each sentence of running text with the one that follows it in the same document, streamed.

    The file has a paragraph a line, or a sentence, and an empty line between documents; .txt, .gz or .xz. A document's last
    sentence has no next one and is left out. Raises: UserError that names the file and line.
    """
    path, last = Path(path), ""
    if not path.name.removesuffix(path.suffix if path.suffix in (".gz", ".xz") else "").endswith(".txt"):
        raise UserError(f"{path}: running text is read from .txt (also .gz, .xz)")
    for line in read_lines(path):
        for sentence in split_sentences(line.strip()):
            if last:
                yield last, sentence
            last = sentence
        if not line.strip():
            last = ""


def read_running_text(path: str | Path) -> Iterator[tuple[str]]:
    """The same sentences, each alone: runs with and without their next ones see the same."""
    return ((sentence,) for sentence, _ in read_document_pairs(path))


def read_with_next(path: str | Path) -> Iterator[tuple[str, str]]:
    """read_document_pairs, if the text is in order. Raises: UserError where it is not.

    In order, a sentence has more long words in common with the next one than with one far away. Of the first 1,000 sentences of Wikipedia
    the difference is 20 times its standard error, of 200 it is 7 times or more, and of shuffled ones 2 at most. Fewer than 200 tell nothing.
    """
    pairs = read_document_pairs(path)
    first = list(itertools.islice(pairs, 1000))
    words = [[set(re.findall(r"\w{4,}", sentence.lower())) for sentence in pair] for pair in first]

    def common(i: int, j: int) -> float:
        a, b = words[i][0], words[j % len(words)][1]
        return len(a & b) / max(1, len(a | b))

    more = np.array([common(i, i) - common(i, i + len(words) // 2) for i in range(len(words))])
    if len(more) >= 200 and more.mean() <= 4 * more.std() / math.sqrt(len(more)):
        raise UserError(f"{path}: its sentences have no more words in common with the next ones than with others: it was shuffled. A text in "
                        "its own order is needed here, with an empty line between documents (wiki1m_for_simcse.txt is in order)")  # fmt: skip
    yield from itertools.chain(first, pairs)


def cache_folder() -> Path:
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "diffcse"


def tokens_path(path: Path, tokenizer: Tokenizer, max_length: int, read: Callable | None = None) -> Path:
    """Where the tokens of a sentence file are kept: another place once the file has changed, or read otherwise, or for another tokenizer or length."""
    try:
        facts = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    tokenizer.backend.no_truncation()  # the length it was last used with is no part of it
    layout = 1  # of write_tokens' files
    how = [read.__name__] if read else []
    key = [layout, *how, str(path.resolve()), facts.st_size, facts.st_mtime_ns, tokenizers.__version__, tokenizer.backend.to_str(), max_length]
    return cache_folder() / f"tokens-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}"


def id_type(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)


def write_tokens(rows: Iterable[tuple[str, ...]], tokenizer: Tokenizer, max_length: int, chunk: int, file: BinaryIO, spool: BinaryIO) -> None:
    """Rows as integers, streamed into a file: all ids, zeros up to a multiple of 8 bytes, then as int64 where each sentence starts and the
    last one ends, how many sentences there are, how many in a row, and the CRC-32 of all this.

    spool: an empty file that holds the starts while ids are still being written.
    """
    dtype, end, columns, crc = id_type(tokenizer), 0, 1, 0
    rows = iter(tqdm(rows, desc="tokenising", unit=" rows", unit_scale=True, leave=False, disable=None))

    def put(part: bytes | np.ndarray) -> None:
        nonlocal crc
        crc = zlib.crc32(part, crc)
        file.write(part)

    spool.write(bytes(8))  # the first starts at 0
    while some := list(itertools.islice(rows, chunk)):
        columns = len(some[0])
        encoded = tokenizer(list(itertools.chain.from_iterable(some)), max_length)
        ends = np.fromiter(map(len, encoded), np.int64, len(encoded)).cumsum()
        put(np.fromiter(itertools.chain.from_iterable(encoded), dtype, ends[-1]))
        spool.write(ends + end)
        end += int(ends[-1])
    put(bytes(-end * dtype.itemsize % 8))
    sentences = spool.tell() // 8 - 1
    spool.seek(0)
    for part in iter(lambda: spool.read(1 << 16), b""):
        put(part)
    put(np.array([sentences, columns], np.int64))
    file.write(np.array([crc], np.int64))


class TokenizedSentences:
    """All rows as integers: one flat array of ids and where each sentence starts. Length: the number of rows.

    Of rows they are in memory; a million Wikipedia sentences take about 60 MB. Of the Path of a sentence file they are on disk,
    tokenised only the first time, and mapped: memory does not grow with their number.
    A file of one column gives V = 2 views that share one copy. With `views` given there are that many, the columns over and over.
    read: what reads the file (None: read_sentences).
    Raises: UserError for a file that cannot be read, and where its tokens cannot be kept.
    """

    def __init__(self, source: Path | Iterable[tuple[str, ...]], tokenizer: Tokenizer, max_length: int,
                 read: Callable[[Path], Iterable[tuple[str, ...]]] | None = None, views: int | None = None, chunk: int = 2_000):  # fmt: skip
        self.pad, self.dtype, self.file, self.asked = tokenizer.pad, id_type(tokenizer), None, views
        if not isinstance(source, Path):
            memory = io.BytesIO()
            write_tokens(source, tokenizer, max_length, chunk, memory, io.BytesIO())
            self._take(memory.getbuffer())
            return

        def write(file: BinaryIO) -> None:
            with tempfile.TemporaryFile(dir=path.parent) as spool:
                write_tokens((read or read_sentences)(source), tokenizer, max_length, chunk, file, spool)

        path = tokens_path(source, tokenizer, max_length, read)
        for left in path.parent.glob(".tokens-*.tmp"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > 3600:  # a process that was killed: one that is alive writes every few seconds
                    left.unlink()
        try:
            self._open(path)
        except (OSError, ValueError):  # not there yet, or damaged
            write_atomically(path, write, f"it is to hold the tokens of {source}, and XDG_CACHE_HOME=DIR names another place for it")
            self._open(path)

    def _open(self, path: Path) -> None:
        self.file = open(path, "rb")
        self._map()

    def _map(self) -> None:
        """Maps the file anew. What was read of the last map goes with it, and no longer counts as this process' memory."""
        whole = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            whole.madvise(mmap.MADV_RANDOM)  # the next batch is elsewhere: nothing is read ahead
        self._take(whole)

    def _take(self, whole: mmap.mmap | memoryview) -> None:
        """The arrays of what write_tokens wrote, not copied. Raises: ValueError where its sizes do not go together."""
        numbers = np.frombuffer(whole, np.int64)
        sentences, self.columns, self.crc = numbers[-3:].tolist()
        self.starts = numbers[-4 - sentences : -3]
        if not 0 <= sentences <= len(numbers) - 4 or -(-int(self.starts[-1]) * self.dtype.itemsize // 8) + sentences + 4 != len(numbers):
            raise ValueError
        self.ids = np.frombuffer(whole, self.dtype, self.starts[-1])
        self.views = self.asked or max(2, self.columns)

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.columns

    def checksum(self) -> int:
        """Of every id and where sentences end: whether these are the sentences that a run began with."""
        return self.crc

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Shapes: rows (B,) -> ids (B*V, T) int64, mask (B*V, T) bool; T is the longest of these rows (SPEC 1.3)."""
        at = (rows[:, None] * self.columns + np.arange(self.views) % self.columns).reshape(-1)  # (B*V,)
        starts, ends = self.starts[at], self.starts[at + 1]  # (B*V,)
        mask = np.arange((ends - starts).max()) < (ends - starts)[:, None]  # (B*V, T)
        ids = np.full(mask.shape, self.pad, np.int64)
        ids[mask] = np.concatenate([self.ids[start:end] for start, end in zip(starts, ends)])
        if self.file:
            self._map()
        return torch.from_numpy(ids), torch.from_numpy(mask)


ROUNDS = 16  # 4 are enough for many rows (Luby and Rackoff); few want more: with 16 each of the 120 orders of 5 rows is as frequent as it should be within 2 %


def shuffled(positions: np.ndarray, rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows at these positions of an epoch's random order of range(rows). From (seed, epoch) alone, and without a list of that order.

    A Feistel network (Luby and Rackoff 1988) on the two digits of a position: in turn each is moved on by a hash of the other, which
    could be undone, so no two positions meet. The digits count to the least b^2 or b(b+1) that is rows or more; what lands
    above rows goes through again until it does not (Black and Rogaway 2002, cycle walking and unequal halves), a chance of 1/b.
    Shapes: positions (B,) -> (B,) int64.
    """
    a = math.isqrt(rows - 1) + 1
    b = -(-rows // a)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)

    def hashed(x: np.ndarray) -> np.ndarray:  # the finaliser of splitmix64 (Steele et al. 2014)
        x = (x ^ x >> 30) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> 27) * np.uint64(0x94D049BB133111EB)
        return x ^ x >> 31

    def once(x: np.ndarray) -> np.ndarray:
        left, right = x // b, x % b
        for even, odd in zip(keys[::2], keys[1::2]):
            left = (left + hashed(right + even) % a) % a
            right = (right + hashed(left + odd) % b) % b
        return left * b + right

    at = once(positions.astype(np.uint64))
    while (above := at >= rows).any():
        at[above] = once(at[above])
    return at.astype(np.int64)


def mask_tokens(ids: Tensor, tokenizer: Tokenizer, ratio: float, how: str, generator: torch.Generator,
                pieces: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """BERT's corruption of a padded batch (SPEC 1.4; paper section 3, where x' = m * x).

    Every token but the special ones ([UNK] among them) is selected with probability `ratio`, independently. how =
    "80-10-10": of the selected, 80 % become [MASK], 10 % a random id (specials possible), 10 % stay; "all": all [MASK].
    pieces: which ids of the vocabulary go on with a word (##ing); then words are selected, with all their pieces.
    Shapes: ids (R, T), pieces (V,) bool -> masked copy (R, T), selected (R, T) bool. ids itself is left as it is.
    """

    def chance(p: float) -> Tensor:
        return torch.rand(ids.shape, generator=generator) < p

    special = torch.isin(ids, torch.tensor(tokenizer.special_ids))
    selected = chance(ratio)
    if pieces is not None:
        selected = selected.gather(1, (~pieces[ids]).cumsum(1).sub(1).clamp_min(0))  # as the draw of the word's number says
    selected = selected & ~special
    masked = torch.where(selected, tokenizer.mask, ids)
    if how == "80-10-10":
        not_masked = selected & ~chance(0.8)
        random_ids = torch.randint(tokenizer.vocab_size, ids.shape, generator=generator)
        masked = torch.where(not_masked, torch.where(chance(0.5), random_ids, ids), masked)
    return masked, selected


# ----------------------------------------------------------------------------------------------------------------
# Where models and data come from: a path, or the Hugging Face Hub's cache

HUB_DATASET = "princeton-nlp/datasets-for-simcse"  # wiki1m_for_simcse.txt, nli_for_simcse.csv, senteval.tar


WHY_NOT = {  # what huggingface_hub raises, for people
    "GatedRepoError": "its owner gives access on request: ask on its page, then `hf auth login` or HF_TOKEN",
    "RepositoryNotFoundError": "there is none of that name, or it is private: `hf auth login` or HF_TOKEN gives access",
    "RevisionNotFoundError": "it has no such revision",
    "IncompleteSnapshotError": "the cache holds only a part of it, and there is no network or HF_HUB_OFFLINE is set",
    "LocalEntryNotFoundError": "no network, or HF_HUB_OFFLINE is set",
    "HFValidationError": "that cannot be a name there",
}


def _from_hub(what: str, repo: str, wanted: list[str], repo_type: str = "model", revision: str | None = None) -> Path:
    """A local folder with the wanted files of a Hub repository. Every way that can fail becomes one line.

    huggingface_hub looks where its own variables say: HF_HOME, HF_ENDPOINT (a mirror), HF_TOKEN, HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants, snapshot_download  # here, because importing it takes a while

    try:
        folder = Path(snapshot_download(repo, repo_type=repo_type, revision=revision, allow_patterns=wanted))
        if any(any(folder.glob(pattern)) for pattern in wanted):  # a cache may hold other files of it
            return folder
        reason = "none of its files is there"
    except Exception as error:  # its errors share no base class across versions: known by name
        names = [kind.__name__ for kind in type(error).__mro__]
        known = [WHY_NOT[name] for name in names if name in WHY_NOT]
        answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        if answer is not None and (not known or answer.status_code >= 500):
            known = [f"it answered {answer.status_code}"]
        reason = known[0] if known else f"{names[0]}: {error}".splitlines()[0][:200]
    raise UserError(f"{what} is neither a path here nor in the Hub's cache ({constants.HF_HUB_CACHE}), and could not be fetched from "
                    f"{constants.ENDPOINT}: {reason}; with a network try again, or run the demo, which needs none: "
                    "python diffcse.py --config demo")  # fmt: skip


def local_folder(name: str) -> Path | None:
    """The folder of that name, here or beside this file (assets/small-bert, from any working directory); None: there is none."""
    for path in (Path(os.path.expanduser(name)), Path(__file__).parent / name):  # unlike Path's, it leaves an unknown ~user as it is
        if os.path.isdir(path):  # unlike Path.is_dir, it takes a name of any length
            return path / "best" if os.path.isdir(path / "best") else path  # a run's folder holds its model there
    return None


def find_model(name: str) -> Path:
    """The folder of a model: a path, or the name of a Hub repository, whose needed files are fetched (or cached).

    NAME@REVISION is a branch, tag or commit of a Hub repository. A run's folder means its best/.
    Raises: UserError that says what is missing and where it would come from.
    """
    if folder := local_folder(name):
        return folder
    repo, _, revision = name.partition("@")
    if os.path.isfile(Path(__file__).parent / name) or os.path.isfile(name) or repo.count("/") > 1 or repo.startswith((".", "/", "~")) or len(name) > 200:
        raise UserError(f"{name}: no such model folder")
    source = {"repo": repo, "revision": revision or None}
    wanted = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
              "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json"]  # fmt: skip
    weights = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "[0-9]_*/model.safetensors"]
    folder = _from_hub(f"model {name!r}", wanted=wanted + weights, **source)
    if not list(folder.glob("model*.safetensors")):  # older repositories hold only pickles
        folder = _from_hub(f"model {name!r}", wanted=[*wanted, "pytorch_model.bin", "[0-9]_*/pytorch_model.bin"], **source)
    return folder


def _from_hub_dataset(name: str) -> Path:
    return _from_hub(f"{name} (data set {HUB_DATASET})", HUB_DATASET, [name], "dataset") / name


def find_text(name: str, data: str) -> Path:
    """A sentence file: a path, a name inside the folder `data`, or a file of the Hub data set (wiki1m_for_simcse.txt)."""
    for path in (Path(os.path.expanduser(name)), Path(os.path.expanduser(data)) / name):
        if os.path.isfile(path):
            return path
    if Path(name).name != name or name not in ("wiki1m_for_simcse.txt", "nli_for_simcse.csv"):
        raise UserError(f"{name}: no such sentence file" + (f", nor in {data}" if data else ""))
    return _from_hub_dataset(name)


def find_senteval(data: str) -> Path:
    """The folder that holds STS/ and SICK/: below `data` if given, else senteval.tar from the Hub, unpacked once."""
    if data:
        for below in ("", "senteval", "SentEval/data/downstream", "downstream"):
            folder = Path(os.path.expanduser(data)) / below
            if os.path.isdir(folder / "STS"):
                return folder
        raise UserError(f"{data}: no folder STS in it (looked also in senteval/ and SentEval/data/downstream/)")
    tar = _from_hub_dataset("senteval.tar")
    cache = cache_folder()
    unpacked = cache / f"senteval-{tar.resolve().name[:16]}"  # the Hub names a file in its cache by its hash
    if not unpacked.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            try:
                with tarfile.open(tar) as archive:
                    archive.extractall(Path(temporary) / "new", filter="data")  # no links or paths that lead outside
                os.rename(Path(temporary) / "new", unpacked)
            except (tarfile.TarError, OSError, EOFError) as error:
                if not unpacked.is_dir():  # else another process was faster
                    raise UserError(f"{tar}: could not be unpacked ({error}); delete it to fetch it again") from None
    for sts in sorted(unpacked.rglob("STS")):
        return sts.parent
    raise UserError(f"{tar}: no folder STS in it")


# ----------------------------------------------------------------------------------------------------------------
# Command lines


def run_main(main) -> None:
    """Run a command's main(): a user's mistake is one line on stderr and exit code 2, Ctrl-C is 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            os._exit(2)  # at once, and torchrun stops the other ranks: they may be waiting for this one
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
