"""data.py: the tokenizer against transformers', sentence files good and bad, batches, masking, and where things come from."""

import csv
import errno
import gzip
import io
import itertools
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import scipy.stats
import tokenizers
import torch
from transformers import AutoTokenizer, BertTokenizerFast, RobertaTokenizerFast

import data
from bert import UserError

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"
RNG = random.Random(7)
NASTY = [
    "", "   ", "\t\n\r ", "A plain sentence.", "Ünïcödé ÀÉÎ ŐŰ İstanbul ß ﬁ №", "e\u0301 versus \u00e9, \u212b",
    "漢字かな交じり文 한국어 中",
    "emoji 🙂👩‍👩‍👧‍👦 🇫🇷", "control \x00\x01\x07\x1b\x7f \u200b\u200d\ufeff \x85 \u2028 \x0c end",
    "[MASK] [CLS] [SEP] [PAD] [UNK] [mask] ##ing",
    "<s> </s> <pad> <unk> tail", "unknown qzxjkvqzx ☃ \U0010ffff \ufffd", "x" * 300, "word " * 10_000, "don't -- 3.14, $5!", "عربى ไทย עברית",
    *("".join(chr(RNG.choice([RNG.randrange(32, 127), RNG.randrange(0x3000), RNG.randrange(0x10000, 0x1FFFF)])) for _ in range(50)) for _ in range(100)),
]  # fmt: skip


@pytest.fixture(scope="module")
def small() -> data.Tokenizer:
    return data.Tokenizer(SMALL)


def folder_of(tmp_path, **files) -> Path:
    """A model folder; vocab_txt="..." becomes vocab.txt."""
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (tmp_path / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return tmp_path


def rows_of(path, content: str | bytes) -> list[tuple[str, ...]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(data.read_sentences(path))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------- tokenizer


def assert_same_ids(ours: data.Tokenizer, theirs) -> None:
    for max_length in (2, 3, 32, 100_000):  # a long one after a short one: no truncation is left over
        ids = ours(NASTY, max_length)
        assert ids == theirs(NASTY, truncation=True, max_length=max_length)["input_ids"]
        assert max(map(len, ids)) <= max_length
    assert max(map(len, ids)) > 10_000  # the last pass truncated nothing
    names = ("cls", "sep", "pad", "mask", "unk")
    assert ours.special_ids == [getattr(ours, name) for name in names] == [getattr(theirs, f"{name}_token_id") for name in names]
    assert sorted(ours.special_ids) == sorted(theirs.all_special_ids) and ours.vocab_size == len(theirs)


def test_tokenizer_json_equals_transformers(small):
    assert_same_ids(small, AutoTokenizer.from_pretrained(SMALL))


@pytest.mark.parametrize("config", [{}, {"do_lower_case": False}, {"do_lower_case": False, "strip_accents": True}, {"strip_accents": False}])
def test_vocab_txt_alone_equals_transformers(tmp_path, config):
    shutil.copy(SMALL / "vocab.txt", tmp_path)
    if config:
        folder_of(tmp_path, tokenizer_config_json=json.dumps(config))
    assert_same_ids(data.Tokenizer(tmp_path), BertTokenizerFast.from_pretrained(tmp_path))


def test_byte_level_bpe_folder_equals_transformers_roberta(tmp_path):
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["The quick brown fox, 3.14 times!", "Hello world, it's a naïve café."] * 3, vocab_size=350, show_progress=False,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])  # fmt: skip
    bpe.save_model(str(tmp_path))
    ours = data.Tokenizer(tmp_path)
    assert ours.special_ids == [0, 2, 1, 4, 3]  # RoBERTa's order of cls, sep, pad, mask, unk
    assert_same_ids(ours, RobertaTokenizerFast.from_pretrained(tmp_path))
    # roberta-base's own <mask> swallows the space before it; a folder without tokenizer.json does not tell transformers so.
    assert ours(["a <mask> b"], 32) == ours(["a<mask> b"], 32) and ours.mask in ours(["a <mask>"], 32)[0]


def test_settings_inside_tokenizer_json_do_not_pad_or_truncate(tmp_path, small):
    backend = tokenizers.Tokenizer.from_file(str(SMALL / "tokenizer.json"))
    backend.enable_padding(length=64)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert data.Tokenizer(tmp_path)(NASTY, 100) == small(NASTY, 100)


@pytest.mark.parametrize("files, says", [
    ({}, "no tokenizer"),
    ({"vocab_json": "{}"}, "no tokenizer"),  # merges.txt is missing
    ({"tokenizer_json": '{"broken": '}, "cannot be read"),
    ({"tokenizer_json": "{}"}, "cannot be read"),
    ({"vocab_txt": ""}, "cannot be read"),
    ({"vocab_txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n"}, r"no \[MASK\]"),
    ({"vocab_txt": "[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"}, r"no \[PAD\]"),
    ({"vocab_txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", "tokenizer_config_json": "{"}, "tokenizer_config.json line 1"),
    ({"vocab_json": '{"a": 0}', "merges_txt": "#version: 0.2\n"}, "no <s>"),
    ({"vocab_json": '{"a": 0, "<s>": 1, "</s>": 2}', "merges_txt": "#version: 0.2\na b\n"}, "cannot be read"),
])  # fmt: skip
def test_bad_tokenizer_folders_are_user_errors(tmp_path, files, says):
    with pytest.raises(UserError, match=says) as error:
        data.Tokenizer(folder_of(tmp_path, **files))
    assert str(tmp_path) in one_line(error)


def test_vocabulary_too_large_for_the_model_is_refused(small):
    assert small.check_fits("F", small.vocab_size) is small and len(small.vocabulary()) == small.vocab_size
    with pytest.raises(UserError, match="do not belong together"):
        small.check_fits("F", small.vocab_size - 1)


# ----------------------------------------------------------------------------------------------- sentence files


def test_txt_splits_at_newlines_only_and_keeps_empty_lines(tmp_path):
    text = "\ufefffirst\n\n  two \x0c\x85\u2028\u2029\x1c\x0b still two\t\r\nthree, \"quoted\n\nlast without newline"
    expected = ["first", "", "  two \x0c\x85\u2028\u2029\x1c\x0b still two\t", 'three, "quoted', "", "last without newline"]
    assert rows_of(tmp_path / "a.txt", text) == [(s,) for s in expected]
    assert rows_of(tmp_path / "b.txt", "one\n\ufefftwo\n") == [("one",), ("\ufefftwo",)]  # only a file's start can hold a BOM
    assert rows_of(tmp_path / "c.txt.gz", gzip.compress(text.encode())) == rows_of(tmp_path / "d.txt.xz", lzma.compress(text.encode()))
    assert rows_of(tmp_path / "c.txt.gz", gzip.compress(text.encode())) == [(s,) for s in expected]


def test_csv_and_tsv_columns_quotes_and_empty_cells(tmp_path):
    assert rows_of(tmp_path / "one.csv", 'header\nplain\n\n"a, ""b""\nc"\nlast') == [("plain",), (" ",), ('a, "b"\nc',), ("last",)]
    assert rows_of(tmp_path / "two.csv", "a,b\r\nx,\r\n,y\r\n") == [("x", " "), (" ", "y")]
    assert rows_of(tmp_path / "three.csv", "\ufeffa,b,c\nx,y,z\n,,\n") == [("x", "y", "z"), (" ", " ", " ")]
    assert rows_of(tmp_path / "two.tsv", 'a\tb\nx, y\t"tab\there"\n') == [("x, y", "tab\there")]
    assert rows_of(tmp_path / "two.tsv.gz", gzip.compress(b"a\tb\nx\ty\n", mtime=0)) == [("x", "y")]


@pytest.mark.parametrize("name, content", [("e.txt", b""), ("e.csv", b""), ("header.tsv", b"a\tb\n"),
                                           ("e.txt.gz", gzip.compress(b"", mtime=0)), ("e.txt.xz", lzma.compress(b""))])  # fmt: skip
def test_empty_files_have_no_rows(tmp_path, name, content):
    assert rows_of(tmp_path / name, content) == []


LONG = b"some words of a sentence\n" * 5000


@pytest.mark.parametrize("name, content, says", [
    ("a.csv", b"a,b\nx,y\n\nx,y,z\n", "line 4: 3 columns where the header has 2"),
    ("a.csv", b'a,b\n"x\n1",y\nonly\n', "line 4: 1 columns where the header has 2"),  # the quoted newline counts
    ("a.tsv", b"a\tb\tc\td\n", "line 1: 4 columns"),
    ("a.csv", b"a\nx\ry\n", "line 2"),
    ("a.csv", b"a\n" + b"x" * 200_000, "line 2"),  # the csv module's own limit
    ("a.txt", b"fine\nalso \xc3\xa9\ncaf\xe9 x\n", "line 3: not UTF-8 (byte 0xe9 at column 4)"),
    ("a.txt.gz", gzip.compress(b"fine\n\xff", mtime=0), "line 2: not UTF-8 (byte 0xff at column 1)"),
    ("a.csv", b"a\nfine\nx\x80", "line 3: not UTF-8 (byte 0x80 at column 2)"),
    ("a.txt.gz", gzip.compress(LONG)[:-20], "cannot be read"),
    ("a.txt.xz", lzma.compress(LONG)[:-40], "cannot be read"),
    ("a.txt.gz", b"not compressed\n", "cannot be read"),
    ("a.txt.xz", b"not compressed\n", "cannot be read"),
    ("a.json", b"{}", "'.json'"), ("sentences", b"x", "no ending"), ("a.gz", b"x", "no ending"),
])  # fmt: skip
def test_bad_sentence_files_are_user_errors_with_file_and_line(tmp_path, name, content, says):
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / name, content)
    assert says in one_line(error) and str(tmp_path / name) in one_line(error)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.csv.xz"])
def test_missing_file_is_a_user_error(tmp_path, name):
    with pytest.raises(UserError, match="is not there"):
        list(data.read_sentences(tmp_path / name))


@pytest.mark.parametrize("name, header, bad", [("a.txt", b"", b"\xff\n"), ("a.csv", b"h\n", b"two,cells\n"), ("a.txt.gz", b"", b"\xff\n")])
def test_files_are_streamed_so_a_late_error_does_not_stop_the_first_rows(tmp_path, name, header, bad):
    content = header + b"good\n" * 1000 + bad
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = data.read_sentences(tmp_path / name)
    assert list(itertools.islice(rows, 1000)) == [("good",)] * 1000
    with pytest.raises(UserError, match=f"line {1001 + bool(header)}"):
        next(rows)


# ------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("columns, views", [(1, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("chunk", [3, 2_000])  # the last of 3 is not full
def test_batches_equal_direct_tokenisation(small, columns, views, chunk):
    rows = [tuple(NASTY[(i * columns + c) % len(NASTY)] for c in range(columns)) for i in range(40)]
    sentences = data.TokenizedSentences(iter(rows), small, 16, chunk=chunk)
    assert (len(sentences), sentences.columns, sentences.views) == (40, columns, views)
    picked = np.array([0, 39, 7, 7, 12, 1])
    ids, mask = sentences.batch(picked)
    expected = [small([rows[i][v % columns]], 16)[0] for i in picked for v in range(views)]  # sentence-major
    assert [row[m].tolist() for row, m in zip(ids, mask)] == expected
    assert ids.shape == mask.shape == (len(picked) * views, max(map(len, expected))) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert (ids[~mask] == small.pad).all() and [int(m.sum()) for m in mask] == [len(e) for e in expected]
    assert (mask.long().diff(dim=1) <= 0).all()  # padding on the right only
    if columns == 1:
        assert torch.equal(ids[0::2], ids[1::2])


def test_empty_sentences_make_a_batch_and_no_rows_make_none(small):
    ids, mask = data.TokenizedSentences([("",), ("",)], small, 32).batch(np.array([1, 0]))
    assert ids.tolist() == [[small.cls, small.sep]] * 4 and mask.all()
    assert len(data.TokenizedSentences([], small, 32)) == 0


def test_large_ids_survive(tmp_path):
    """More than 65,536 words do not fit into 16 bits."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(70_000))]
    tokenizer = data.Tokenizer(folder_of(tmp_path, vocab_txt="\n".join(words)))
    ids, _ = data.TokenizedSentences([("w0 w69999",)], tokenizer, 8).batch(np.array([0]))
    assert ids[0].tolist() == [2, 5, 70_004, 3]


# --------------------------------------------------------------------------------------------- the cache of tokens


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffcse"


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"sentence {i} of {'several ' * (i % 7)}words\n" for i in range(100)))
    return tmp_path / "text.txt"


def contents(sentences: data.TokenizedSentences) -> tuple:
    ids, mask = sentences.batch(np.arange(len(sentences))[::-1])
    return len(sentences), sentences.columns, sentences.views, sentences.checksum(), sentences.ids.dtype, ids.tolist(), mask.tolist()


def spy(monkeypatch) -> list[int]:
    """How many sentences each call of a tokenizer was given."""
    calls, real = [], data.Tokenizer.__call__
    monkeypatch.setattr(data.Tokenizer, "__call__", lambda self, sentences, length: calls.append(len(sentences)) or real(self, sentences, length))
    return calls


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("words", [0, 70_000], ids=["16 bits", "32 bits"])
def test_a_file_gives_what_its_rows_give_and_is_tokenised_once(tmp_path, small, cache, monkeypatch, columns, words):
    tokenizer = small
    if words:
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(words)), *small.vocabulary()]
        tokenizer = data.Tokenizer(folder_of(tmp_path, vocab_txt="\n".join(dict.fromkeys(vocabulary))))
    path = tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[f"{NASTY[(i + c) % len(NASTY)]} w{i * 700}" for c in range(columns)] for i in range(100)])
    expected = contents(data.TokenizedSentences(data.read_sentences(path), tokenizer, 16))
    assert expected[:3] == (99, columns, max(2, columns)) and expected[4] == (np.int32 if words else np.uint16)
    assert contents(data.TokenizedSentences(data.read_sentences(path), tokenizer, 16, chunk=7)) == expected
    calls = spy(monkeypatch)
    assert contents(data.TokenizedSentences(path, tokenizer, 16, chunk=10)) == expected
    assert calls == [10 * columns] * 9 + [9 * columns] and len(list(cache.iterdir())) == 1
    assert contents(data.TokenizedSentences(path, tokenizer, 16)) == expected and len(calls) == 10
    assert data.TokenizedSentences(path, tokenizer, 15).checksum() != expected[3] and len(calls) == 11


def test_an_empty_file_is_kept_too(tmp_path, small, cache):
    (tmp_path / "empty.txt").touch()
    for _ in range(2):
        assert len(data.TokenizedSentences(tmp_path / "empty.txt", small, 16)) == 0
    with pytest.raises(UserError, match="none.txt cannot be read"):
        data.TokenizedSentences(tmp_path / "none.txt", small, 16)


def test_another_text_tokenizer_or_length_is_another_entry(tmp_path, small, cache, text, monkeypatch):
    calls, seen = spy(monkeypatch), set()

    def new(path=text, tokenizer=small, length=16) -> bool:
        before = len(calls)
        seen.add(data.TokenizedSentences(path, tokenizer, length).checksum())
        return len(calls) > before

    assert new() and not new()
    small(["a call for something else"], 9)
    assert not new() and new(length=8) and not new() and not new(length=8)
    words = [word for word in (SMALL / "vocab.txt").read_text(encoding="utf-8").splitlines() if word != "of"]
    other = data.Tokenizer(folder_of(tmp_path, vocab_txt="\n".join(words)))
    assert new(tokenizer=other) and not new(tokenizer=other) and len(seen) == 3
    (tmp_path / "link.txt").symlink_to(text)
    monkeypatch.chdir(tmp_path)
    assert not new(tmp_path / "link.txt") and not new(Path("text.txt")) and new(Path(shutil.copy(text, "copy.txt")))
    before = text.stat()
    text.write_text(text.read_text().replace("sentence 7 ", "sentence 8 "))  # of the same size
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert len(seen) == 3 and new() and len(seen) == 4
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns + 2))
    assert new() and len(seen) == 4
    text.write_text(text.read_text() + "one more\n")
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns + 2))
    assert new() and len(seen) == 5 and len(list(cache.iterdir())) == 7


DAMAGE = {
    "empty": lambda whole: b"", "short": lambda whole: whole[:20], "cut": lambda whole: whole[:-1], "a number less": lambda whole: whole[:-8],
    "half": lambda whole: whole[: len(whole) // 16 * 8], "more": lambda whole: whole + bytes(8), "zeros": lambda whole: bytes(len(whole)),
    "ones": lambda whole: b"\xff" * len(whole), "noise": lambda whole: random.Random(0).randbytes(len(whole)), "no ids": lambda whole: whole[8:],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again(small, cache, text, damage):
    expected = contents(data.TokenizedSentences(text, small, 16))
    entry, = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert contents(data.TokenizedSentences(text, small, 16)) == expected and entry.read_bytes() == whole


def test_a_run_goes_on_with_the_entry_it_opened(small, cache, text):
    sentences = data.TokenizedSentences(text, small, 16)
    expected = contents(sentences)
    shutil.rmtree(cache)
    assert contents(sentences) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("line 51: not UTF-8")])
def test_a_build_that_stops_leaves_nothing(small, cache, text, monkeypatch, error):
    def stops(path):
        yield from itertools.islice(rows(path), 50)
        raise error

    rows = data.read_sentences
    monkeypatch.setattr(data, "read_sentences", stops)
    with pytest.raises(error if isinstance(error, type) else UserError):
        data.TokenizedSentences(text, small, 16, chunk=10)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(data, "read_sentences", rows)
    assert len(data.TokenizedSentences(text, small, 16)) == 100


# A process that tokenises `text`; at row 50 it says so and waits until the folder holds as many files "here..." as it is told.
BUILD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import data
text, others = Path(sys.argv[2]), int(sys.argv[3])
real = data.read_sentences
def rows(path):
    for i, row in enumerate(real(path)):
        if i == 50:
            (text.parent / f"here{os.getpid()}").touch()
            while len(list(text.parent.glob("here*"))) < others: time.sleep(0.01)
        yield row
data.read_sentences = rows
sentences = data.TokenizedSentences(text, data.Tokenizer(data.find_model("assets/small-bert")), 16, chunk=10)
print(sentences.checksum(), int(sentences.batch(data.np.arange(100))[0].sum()))
"""


def build(text: Path, others: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILD, str(ROOT), str(text), str(others)], stdout=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_no_entry_and_a_later_one_takes_its_leavings_away(small, cache, text):
    process = build(text, 99)
    while not list(text.parent.glob("here*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    left, = cache.iterdir()
    assert left.name.startswith(".tokens-") and left.name.endswith(".tmp")
    assert len(data.TokenizedSentences(text, small, 16)) == 100
    assert left.is_file() and len(list(cache.iterdir())) == 2  # it might still be written to
    os.utime(left, (time.time() - 4000,) * 2)
    assert len(data.TokenizedSentences(text, small, 16)) == 100 and not left.exists() and len(list(cache.iterdir())) == 1


def test_two_builds_at_once_both_succeed(small, cache, text):
    processes = [build(text, 2), build(text, 2)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and len(list(text.parent.glob("here*"))) == 2
    sentences = data.TokenizedSentences(data.read_sentences(text), small, 16)
    assert said == [f"{sentences.checksum()} {int(sentences.batch(np.arange(100))[0].sum())}\n"] * 2
    assert [file.name for file in cache.iterdir()] == [data.tokens_path(text, small, 16).name]


def test_no_place_for_the_tokens_is_a_user_error(tmp_path, small, cache, text, monkeypatch):
    def says(reason: str) -> None:
        with pytest.raises(UserError, match=f"{reason}.*text.txt.*XDG_CACHE_HOME=DIR") as error:
            data.TokenizedSentences(text, small, 16)
        assert str(cache) in one_line(error)

    cache.parent.write_text("a file where the folder should be")
    says("Not a directory")
    cache.parent.unlink()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    says("No space left")
    assert list(cache.iterdir()) == []


def test_without_xdg_cache_home_it_is_in_the_home_folder(tmp_path, small, text, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unset()
        assert data.tokens_path(text, small, 16).parent == tmp_path / ".cache" / "diffcse"


def test_building_takes_no_more_memory_for_more_rows(tmp_path, small, cache):
    peaks = []
    for n in (2_000, 20_000):
        path = tmp_path / f"{n}.txt"
        path.write_text("some of the words in a sentence\n" * n)
        tracemalloc.start()
        data.TokenizedSentences(path, small, 16, chunk=500)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000  # the arrays of the larger take 500,000 bytes


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
import data
tokenizer = data.Tokenizer(data.find_model("assets/small-bert"))
def status(name): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
for n in map(int, sys.argv[3:]):  # entries of n sentences of 27 tokens, all 0: that part of the file is a hole
    text = Path(sys.argv[2]) / f"{n}.txt"
    text.touch()
    path = data.tokens_path(text, tokenizer, 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.seek(-(-n * 27 * 2 // 8) * 8)
        for i in range(0, n + 1, 100_000): file.write(27 * np.arange(i, min(i + 100_000, n + 1)))
        file.write(np.array([n, 1, 0]))
    sentences = data.TokenizedSentences(text, tokenizer, 32)
    assert len(sentences) == n
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
    before = status("VmRSS")
    for step in range(200):
        ids, mask = sentences.batch(data.shuffled(np.arange(64 * step, 64 * step + 64), n, 0, 0))
        assert ids.shape == (128, 27) and mask.all()
    print(status("VmHWM") - before)
    path.unlink()
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_batches_of_ten_million_sentences_take_no_more_memory_than_of_a_hundred_thousand(tmp_path, cache):
    command = [sys.executable, "-c", MEMORY, str(ROOT), str(tmp_path), "100000", "10000000"]
    few, many = map(float, subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split())
    assert many < few + 16, (few, many)  # MB: the pages of one batch. Of all 200 it would be some hundreds


# ------------------------------------------------------------------------------------------------------- shuffling


def order(rows: int, *key: int) -> np.ndarray:
    return data.shuffled(np.arange(rows), rows, *key)


@pytest.mark.parametrize("rows", [*range(1, 70), *(2**k + d for k in (8, 10, 13, 16) for d in (-1, 0, 1)), 99**2 - 1, 99**2, 99 * 100, 99 * 100 + 1, 22_063, 100_003])
def test_an_epoch_has_every_row_once(rows):
    for key in ((0, 0), (1, 2), (2**63 - 1, 10**6)):
        got = order(rows, *key)
        assert got.dtype == np.int64 and np.array_equal(np.sort(got), np.arange(rows))


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    keys = [(1, 2), (1, 3), (2, 2), (2, 1), (1, 0), (0, 1)]
    orders = [order(103, *key).tolist() for key in keys]
    assert len({tuple(o) for o in orders}) == len(keys)  # (1, 2) is not (2, 1)
    np.random.seed(99), torch.manual_seed(99)
    for size in (1, 10, 64):  # however it is cut
        assert [np.concatenate([data.shuffled(np.arange(i, min(i + size, 103)), 103, *key) for i in range(0, 103, size)]).tolist() for key in keys] == orders
    positions = np.array([5, 0, 99])
    assert data.shuffled(positions, 103, 1, 2).tolist() == [orders[0][i] for i in (5, 0, 99)] and positions.tolist() == [5, 0, 99]


@pytest.mark.parametrize("rows", [2, 3, 4, 5])
def test_every_order_of_few_rows_is_as_frequent_as_any(rows):
    seen = {o: 0 for o in itertools.permutations(range(rows))}
    for epoch in range(4000):
        seen[tuple(order(rows, epoch % 5, epoch).tolist())] += 1
    assert scipy.stats.chisquare([*seen.values()]).pvalue > 0.001


@pytest.mark.parametrize("rows", [9, 20, 37])
def test_every_row_comes_at_every_place_and_after_every_other(rows):
    trials = 4000
    at, after = np.zeros((rows, rows)), np.zeros((rows, rows))
    for epoch in range(trials):
        got = order(rows, 3, epoch)
        at[np.arange(rows), got] += 1
        after[got[:-1], got[1:]] += 1
    chi2 = ((at - trials / rows) ** 2).sum() / (trials / rows) * (rows - 1) / rows  # of (rows - 1)^2 degrees of freedom
    assert 0.001 < scipy.stats.chi2.sf(chi2, (rows - 1) ** 2) < 0.999
    pairs = after[~np.eye(rows, dtype=bool)]
    assert 0.0001 < scipy.stats.chisquare(pairs).pvalue < 0.9999 and not after.diagonal().any()


def test_a_large_order_looks_random():
    n = 1_000_000
    a, b, c = order(n, 42, 0), order(n, 42, 1), order(n, 43, 0)
    for x, y in [(np.arange(n), a), (a[:-1], a[1:]), (a[:-64], a[64:]), (a, b), (a, c), (np.arange(n) % 1000, a % 1000), (np.arange(n) % 1000, a // 1000)]:
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / n**0.5  # 4 standard errors
    assert (abs(np.diff(a)) == 1).sum() < 12 and (a == np.arange(n)).sum() < 8 and (a == b).sum() < 8  # Poisson, of mean 2, 1 and 1
    steps = np.bincount(np.diff(a) % n // 10_000, minlength=100)  # from one row to the next: everywhere alike
    assert 0.0001 < scipy.stats.chisquare(steps).pvalue < 0.9999
    inversions = (a[: n // 2] < a[n // 2 :]).mean()
    assert abs(inversions - 0.5) < 4 * (0.25 / (n // 2)) ** 0.5


def test_a_billion_rows_take_the_memory_of_a_batch():
    n = 1_000_000_000
    tracemalloc.start()
    batches = [data.shuffled(np.arange(i, i + 64), n, 42, 3) for i in (0, 64, n // 2, n - 64)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 and len(np.unique(batches)) == 256
    positions = np.concatenate([np.arange(200_000), np.random.default_rng(0).choice(n, 200_000, replace=False)])
    positions = np.unique(positions)
    rows = data.shuffled(positions, n, 42, 3)
    assert rows.min() >= 0 and rows.max() < n and len(np.unique(rows)) == len(rows)
    first = rows[:200_000]
    assert abs(np.corrcoef(positions[:200_000], first)[0, 1]) < 4 / 200_000**0.5 and abs(np.corrcoef(positions, rows)[0, 1]) < 4 / len(rows) ** 0.5
    for part in (first // (n // 100), first % 100, np.diff(first) % n // (n // 100)):
        assert 0.0001 < scipy.stats.chisquare(np.bincount(part, minlength=100)).pvalue < 0.9999


# ------------------------------------------------------------------------------------------------------ masking


def mask(small, ids, ratio=0.3, how="80-10-10", seed=0):
    return data.mask_tokens(ids, small, ratio, how, torch.Generator().manual_seed(seed))


def test_whole_words_are_masked_with_all_their_pieces(small):
    sentence = "unbelievable misunderstandings of electroencephalography and cats"
    ids = torch.tensor(small([sentence] * 4000, 64))
    pieces = torch.zeros(small.vocab_size, dtype=torch.bool)
    pieces[[i for word, i in small.vocabulary().items() if word.startswith("##")]] = True
    assert pieces[ids[0]].sum() > 4  # long words are in several pieces
    masked, selected = data.mask_tokens(ids, small, 0.3, "all", torch.Generator().manual_seed(0), pieces)
    words, word = small.backend.encode(sentence).word_ids, None
    for position, number in enumerate(words):
        if number is None:
            assert not selected[:, position].any()
        elif number == word:
            assert torch.equal(selected[:, position], selected[:, position - 1])
        else:
            assert abs(selected[:, position].float().mean() - 0.3) < 0.03  # a word is as likely as a token was
            assert word is None or not torch.equal(selected[:, position], selected[:, position - 1])
        word = number
    assert (masked[selected] == small.mask).all() and torch.equal(masked[~selected], ids[~selected])


def test_masking_rates_and_that_specials_are_left_alone(small):
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(small.vocab_size, (3000, 128), generator=rng)
    special = torch.rand(ids.shape, generator=rng) < 0.2
    ids[special] = torch.tensor(small.special_ids)[torch.randint(5, (int(special.sum()),), generator=rng)]  # [UNK] and padding too
    special = torch.isin(ids, torch.tensor(small.special_ids))
    before = ids.clone()
    masked, selected = mask(small, ids)
    assert torch.equal(ids, before) and masked.shape == ids.shape and selected.dtype == torch.bool
    assert not (selected & special).any() and torch.equal(masked[~selected], ids[~selected])

    def within_4_sigma(count: int, n: int, p: float) -> bool:
        return abs(count - n * p) < 4 * (n * p * (1 - p)) ** 0.5

    n, V = int(selected.sum()), small.vocab_size
    assert within_4_sigma(n, int((~special).sum()), 0.3)
    new, old = masked[selected], ids[selected]
    assert within_4_sigma(int((new == small.mask).sum()), n, 0.8 + 0.1 / V)  # a random id can be [MASK] as well
    assert within_4_sigma(int((new == old).sum()), n, 0.1 + 0.1 / V)
    changed = new[(new != small.mask) & (new != old)]
    assert within_4_sigma(int((changed < V // 2).sum()), len(changed), 0.5)  # uniform over the vocabulary's two halves
    assert changed.min() < 50 and changed.max() >= V - 50 and torch.isin(changed, torch.tensor(small.special_ids)).any()
    # independent positions: neighbours are selected together as often as chance says
    free = ~special[:, 1:] & ~special[:, :-1]
    assert within_4_sigma(int((selected[:, 1:] & selected[:, :-1] & free).sum()), int(free.sum()), 0.09)


def test_masking_all_writes_only_mask(small):
    ids = torch.randint(5, small.vocab_size, (50, 30))
    masked, selected = mask(small, ids, 0.5, "all")
    assert (masked[selected] == small.mask).all() and torch.equal(masked[~selected], ids[~selected]) and 0 < selected.float().mean() < 1


@pytest.mark.parametrize("how", ["80-10-10", "all"])
def test_two_views_get_two_masks_and_one_seed_gives_one_result(small, how):
    ids, _ = data.TokenizedSentences([("the long road to the old town in the north of the country",)], small, 32).batch(np.array([0]))
    ids = ids.repeat(20, 1)
    masked, selected = mask(small, ids, 0.3, how)
    assert (selected[0::2] != selected[1::2]).any(1).sum() >= 18  # of 20 pairs of views
    again, elsewhere = mask(small, ids, 0.3, how), mask(small, ids, 0.3, how, seed=1)
    assert torch.equal(again[0], masked) and torch.equal(again[1], selected) and not torch.equal(elsewhere[1], selected)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    mask(small, ids, 0.3, how)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator, dropout's, is not touched


def test_ratio_0_selects_nothing_and_1_everything_that_is_not_special(small):
    ids = torch.tensor([small(["an ordinary sentence"], 32)[0] + [small.pad] * 3])
    assert torch.equal(mask(small, ids, 0.0)[0], ids) and not mask(small, ids, 0.0)[1].any()
    masked, selected = mask(small, ids, 1.0, "all")
    assert torch.equal(selected, ~torch.isin(ids, torch.tensor(small.special_ids))) and (masked[selected] == small.mask).all()


# ------------------------------------------------------------------------------- where models and data come from


def test_find_model_takes_folders_first(tmp_path, monkeypatch):
    assert data.find_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert data.find_model("assets/small-bert").resolve() == SMALL.resolve()  # from any working directory
    for name in (str(tmp_path / "none"), "./none", "~/none-of-this", "a/b/c", str(SMALL / "config.json")):
        with pytest.raises(UserError, match="no such model folder"):
            data.find_model(name)


@pytest.mark.parametrize("find", [lambda: data.find_model("no-such-org/no-such-model"), lambda: data.find_model("bad name\n!!"),
                                  lambda: data.find_text("wiki1m_for_simcse.txt", ""), lambda: data.find_senteval("")])  # fmt: skip
def test_offline_every_lookup_points_to_the_demo(find, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="python diffcse.py --config demo") as error:
        find()
    assert one_line(error)


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_hub_models_come_as_safetensors_and_as_pickles_only_where_there_are_none(tmp_path, monkeypatch, weights):
    calls = []

    def snapshot_download(name, repo_type, revision, allow_patterns):
        assert (name, repo_type, revision) == ("org/name", "model", "v2")
        (tmp_path / "config.json").touch()
        calls.append(allow_patterns)
        if any(Path(weights).match(pattern) for pattern in allow_patterns):
            (tmp_path / weights).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert data.find_model("org/name@v2") == tmp_path and (tmp_path / weights).exists()
    assert "pytorch_model.bin" not in calls[0] and len(calls) == 1 + weights.endswith(".bin")
    assert all(any(Path(f).match(p) for p in calls[0]) for f in ("config.json", "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"))


def test_find_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    for path in ("here.txt", "inside/there.txt"):
        Path(path).touch()
    assert data.find_text("here.txt", "") == Path("here.txt") and data.find_text("there.txt", "inside") == Path("inside/there.txt")
    with pytest.raises(UserError, match="none.txt: no such sentence file, nor in inside"):
        data.find_text("none.txt", "inside")
    hub = tmp_path / "dataset" / "princeton-nlp" / "datasets-for-simcse"
    hub.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, repo_type, revision, allow_patterns: str(tmp_path / repo_type / repo))
    with pytest.raises(UserError, match="wiki1m_for_simcse.txt .data set princeton-nlp/datasets-for-simcse. is neither"):
        data.find_text("wiki1m_for_simcse.txt", "inside")  # the cache knows the data set, but not this file of it
    (hub / "wiki1m_for_simcse.txt").touch()
    assert data.find_text("wiki1m_for_simcse.txt", "inside") == hub / "wiki1m_for_simcse.txt"


@pytest.mark.parametrize("below", ["", "senteval", "SentEval/data/downstream", "downstream"])
def test_find_senteval_in_a_folder(tmp_path, below):
    with pytest.raises(UserError, match="no folder STS"):
        data.find_senteval(str(tmp_path))
    (tmp_path / below / "STS").mkdir(parents=True)
    assert data.find_senteval(str(tmp_path)) == tmp_path / below


def tar_of(path, *names) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    return path


def test_senteval_tar_is_unpacked_once(tmp_path, monkeypatch):
    tar = tar_of(tmp_path / "senteval.tar", "./senteval/STS/STS12-en-test/a.txt", "./senteval/SICK/b.txt")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tar.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = data.find_senteval("")
    assert (folder / "STS/STS12-en-test/a.txt").read_bytes() == b"abc" and (folder / "SICK/b.txt").exists()
    (folder / "SICK/b.txt").write_bytes(b"changed")
    assert data.find_senteval("") == folder and (folder / "SICK/b.txt").read_bytes() == b"changed"  # not unpacked again
    assert len(list((tmp_path / "cache/diffcse").iterdir())) == 1  # nothing temporary is left


@pytest.mark.parametrize("names", [["STS/a.txt", "../escaped.txt"], ["other/a.txt"], None])
def test_bad_senteval_tars_are_refused_and_leave_nothing(tmp_path, monkeypatch, names):
    tar = tmp_path / "deep" / "senteval.tar"
    tar.parent.mkdir()
    tar_of(tar, *names) if names else tar.write_bytes(b"not a tar")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tar.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="senteval.tar: (could not be unpacked|no folder STS)"):
        data.find_senteval("")
    assert not list(tmp_path.rglob("escaped.txt"))


# ------------------------------------------------------------------------------------------------ command lines


@pytest.mark.parametrize("error, code, says", [(UserError("what is wrong"), 2, "error: what is wrong\n"), (KeyboardInterrupt(), 130, "\nstopped\n")])
def test_run_main_turns_mistakes_into_one_line_and_an_exit_code(capsys, error, code, says):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        data.run_main(main)
    assert exit.value.code == code and capsys.readouterr() == ("", says)


def test_run_main_hides_no_bug():
    with pytest.raises(ZeroDivisionError):
        data.run_main(lambda: 1 / 0)
    assert data.run_main(lambda: None) is None


# ------------------------------------------------------------------------------------------------------ running text


@pytest.mark.parametrize("paragraph, sentences", [
    ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
    ('He said "Go." Then "(Stop.)" 5 men left. “So?” ‘No.’ (Yes.) Ünal came.', ['He said "Go."', 'Then "(Stop.)"', "5 men left.", "“So?”", "‘No.’", "(Yes.)", "Ünal came."]),
    ("Dr. No met Mr. J. R. R. Smith, Jr. Jones and the U.S. Senate at St. Ives in Feb. 1990.", None),
    ("See vol. 3, No. 5, pp. 7 and fig. 2, e.g. Berlin, cf. Paris et al. 1999, c. 1880.", None),
    ("Is it No. No. It is in 1990. It was.", ["Is it No.", "No.", "It is in 1990.", "It was."]),  # before a word "no" is a word
    ("He lives in CA. The rest came to him. it was late... and so on", ["He lives in CA.", "The rest came to him. it was late... and so on"]),
    ("Really?! Yes...  Well.\u00a0Good", ["Really?!", "Yes...", "Well.", "Good"]),
    ("", []), ("   ", []), ("No end", None),
])  # fmt: skip
def test_a_paragraph_is_cut_after_sentences_and_not_after_abbreviations(paragraph, sentences):
    assert data.split_sentences(paragraph) == ([paragraph] if sentences is None else sentences)


def test_the_splitter_is_the_one_whose_errors_were_counted():
    counted = json.loads((ROOT / "results" / "splitter.json").read_text())
    for place in counted["places"]:
        *cut, _ = data.split_sentences(f"{place['before']} {place['after']}")
        assert any(place["before"].endswith(sentence) for sentence in cut) == place["cut"], place
    wrong = [place["cut"] for place in counted["places"] if not place["right"]]
    assert len(counted["places"]) == counted["cut"] + counted["kept"] == 400 and [counted["cut wrongly"], counted["kept wrongly"]] == [wrong.count(True), wrong.count(False)]


@pytest.mark.parametrize("ending", [".txt", ".txt.xz"])
def test_running_text_is_sentences_with_the_next_one_of_their_document(tmp_path, small, cache, ending):
    path = tmp_path / f"text{ending}"
    content = b"\xef\xbb\xbfA one. B two.\nC three.\r\n\n\n  \nAlone.\n\nD four.  E five. \n"
    path.write_bytes(lzma.compress(content) if ending.endswith("xz") else content)
    pairs = [("A one.", "B two."), ("B two.", "C three."), ("D four.", "E five.")]
    assert list(data.read_with_next(path)) == pairs and list(data.read_running_text(path)) == [(a,) for a, _ in pairs]
    alone = data.TokenizedSentences(path, small, 16, data.read_running_text)
    both = data.TokenizedSentences(path, small, 16, data.read_with_next, views=4)
    assert len(alone) == len(both) == 3 and (alone.views, both.views) == (2, 4)
    assert len({file.name for file in cache.iterdir()}) == 2  # kept apart
    rows = np.array([2, 0])
    ids, mask = both.batch(rows)
    expected = [s for a, b in (pairs[2], pairs[0]) for s in (a, b, a, b)]
    assert [row[m].tolist() for row, m in zip(ids, mask)] == small(expected, 16)
    assert [row[m].tolist() for row, m in zip(*alone.batch(rows))] == small([s for s in expected if s in (pairs[2][0], pairs[0][0])], 16)


def test_running_text_that_was_shuffled_is_refused(tmp_path):
    rng = random.Random(0)
    topics = [[f"word{topic}{i}" for i in range(12)] for topic in range(60)]
    documents = [[" ".join(rng.sample(words, 5)).capitalize() + "." for _ in range(6)] for words in topics]
    (tmp_path / "ordered.txt").write_text("\n\n".join("\n".join(document) for document in documents))
    assert len(list(data.read_with_next(tmp_path / "ordered.txt"))) == 60 * 5
    sentences = [sentence for document in documents for sentence in document]
    rng.shuffle(sentences)
    (tmp_path / "shuffled.txt").write_text("\n".join(sentences))
    with pytest.raises(UserError, match=r"shuffled\.txt: its sentences have no more words in common with the next ones than with others: it was shuffled"):
        next(data.read_with_next(tmp_path / "shuffled.txt"))
    assert len(list(data.read_running_text(tmp_path / "shuffled.txt"))) == len(sentences) - 1  # nobody asks for the next one
    (tmp_path / "short.txt").write_text("\n".join(sentences[:100]))  # tells nothing
    assert len(list(data.read_with_next(tmp_path / "short.txt"))) == 99


@pytest.mark.parametrize("name", ["text.tsv", "text.csv.gz", "text", "text.xz", "txt"])
def test_running_text_is_no_table(tmp_path, name):
    with pytest.raises(UserError, match="running text is read from .txt"):
        next(data.read_running_text(tmp_path / name))


def test_real_text_is_in_order_and_the_shuffled_sentences_are_not(senteval):
    text = senteval.parent / "text"
    for name in ("enwiki_paragraphs.txt.xz", "simplewiki_paragraphs.txt.xz", "wiki1m_for_simcse.head.txt"):
        assert next(data.read_with_next(text / name))
    with pytest.raises(UserError, match="it was shuffled"):
        next(data.read_with_next(text / "enwiki_100k.txt"))
