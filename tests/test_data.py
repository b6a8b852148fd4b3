"""data.py and engine/tokens.py: the tokenizer against transformers', sentence files good and bad,
masking, batches, and token ids on disk.
"""

import csv
import errno
import gzip
import inspect
import itertools
import json
import lzma
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT, SPECIAL_WORDS, one_line
from transformers import AutoTokenizer, BertTokenizerFast, RobertaTokenizerFast

import data
from bert import ModelError, read_safetensors, write_safetensors
from data import Batch, Tokenizer, mask_tokens, read_lines, read_sentences
from engine import distributed, tokens
from engine.errors import UserError
from engine.tokens import TokenizedSentences

SMALL = ROOT / "assets" / "small-bert"
RNG = random.Random(7)
RANGES = (32, 127), (0, 0x3000), (0x10000, 0x1FFFF)
NASTY = [
    *("", "   ", "\t\n\r ", "A plain sentence.", "don't -- 3.14, $5!", "x" * 300, "word " * 10_000),
    *("Ünïcödé ÀÉÎ ŐŰ İstanbul ß ﬁ №", "e\u0301 versus \u00e9, \u212b", "عربى ไทย עברית"),
    *("漢字かな交じり文 한국어 中", "emoji 🙂👩‍👩‍👧‍👦 🇫🇷", "unknown qzxjkvqzx ☃ \U0010ffff \ufffd"),
    "control \x00\x01\x07\x1b\x7f \u200b\u200d\ufeff \x85 \u2028 \x0c end",
    *("[MASK] [CLS] [SEP] [PAD] [UNK] [mask] ##ing", "<s> </s> <pad> <unk> tail"),
    *("".join(chr(RNG.randrange(*RNG.choice(RANGES))) for _ in range(50)) for _ in range(100)),
]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(SMALL)


def write_folder(folder: Path, **files: str) -> Path:
    """A model folder; vocab_txt="..." becomes vocab.txt."""
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return folder


def rows_of(path: Path, content: str | bytes) -> list[tuple[str, ...]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_sentences(path))


# ------------------------------------------------------------------------------------------------
# Tokenizer


def assert_same_ids(ours: Tokenizer, theirs) -> None:
    for max_length in (2, 3, 32, 100_000):  # the last one after short ones: nothing is truncated
        ids = ours(NASTY, max_length)
        assert ids == theirs(NASTY, truncation=True, max_length=max_length)["input_ids"]
        assert max(map(len, ids)) <= max_length
    assert max(map(len, ids)) > 10_000
    names = [f"{name}_id" for name in ("cls", "sep", "pad", "mask", "unk")]
    their_ids = [getattr(theirs, name.replace("_id", "_token_id")) for name in names]
    assert ours.special_ids == [getattr(ours, name) for name in names] == their_ids
    assert ours.vocab_size == len(theirs) == len(ours.vocabulary())


CONFIGS = [None, {"do_lower_case": False}, {"do_lower_case": False, "strip_accents": True}]
CONFIGS += [{"strip_accents": False}]


@pytest.mark.parametrize("config", CONFIGS)
def test_vocab_txt_alone_equals_transformers(tmp_path, config):
    shutil.copy(SMALL / "vocab.txt", tmp_path)
    if config:
        write_folder(tmp_path, tokenizer_config_json=json.dumps(config))
    assert_same_ids(Tokenizer(tmp_path), BertTokenizerFast.from_pretrained(tmp_path))


def test_vocab_json_and_merges_equal_transformers(tmp_path):
    bpe = tokenizers.ByteLevelBPETokenizer()
    text = ["The quick brown fox, 3.14 times!", "Hello world, it's a naïve café."] * 3
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(text, vocab_size=350, show_progress=False, special_tokens=special)
    bpe.save_model(str(tmp_path))
    ours = Tokenizer(tmp_path)
    assert_same_ids(ours, RobertaTokenizerFast.from_pretrained(tmp_path))
    # roberta-base's <mask> includes the space before it, which these two files do not say.
    assert ours(["a <mask> b"], 32) == ours(["a<mask> b"], 32)
    assert ours.mask_id in ours(["a <mask>"], 32)[0]


def test_a_saved_tokenizer_equals_transformers_and_is_saved_the_same_again(tmp_path, small):
    """Settings inside tokenizer.json do not pad or truncate, and a call leaves none there."""
    backend = tokenizers.Tokenizer.from_file(str(SMALL / "tokenizer.json"))
    backend.enable_padding(length=64)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    odd = Tokenizer(tmp_path)
    before = odd.backend.to_str()
    assert_same_ids(odd, AutoTokenizer.from_pretrained(SMALL))
    assert odd.backend.to_str() == before == small.backend.to_str()
    odd.save(tmp_path / "one", 77)
    Tokenizer(tmp_path / "one").save(tmp_path / "two", 88)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert theirs.model_max_length == 77  # of the tokenizer_config.json that was missing
    assert_same_ids(small, theirs)


def test_mistakes_of_a_call_are_user_errors(small):
    before = small.backend.to_str()
    with pytest.raises(UserError, match=r"'half of .* is not valid Unicode: a lone surr") as error:
        small(["fine", "half of \ud83d"], 4)
    assert one_line(error) and small.backend.to_str() == before
    with pytest.raises(UserError, match=r"max_length is 1: \[CLS\] and \[SEP\] alone take 2"):
        small(["a"], 1)
    assert small.check_fits("F", small.vocab_size) is small
    with pytest.raises(UserError, match="^F: .* do not belong together"):
        small.check_fits("F", small.vocab_size - 1)


MERGES = "#version: 0.2\n"
BAD_TOKENIZERS = [
    ({}, "no tokenizer"),
    ({"vocab_json": "{}"}, "no tokenizer"),  # merges.txt is missing
    ({"tokenizer_json": "{}"}, "cannot be read"),
    ({"vocab_txt": ""}, "cannot be read"),
    ({"vocab_txt": "\n".join([*SPECIAL_WORDS[:4], "a"])}, r"no \[MASK\]"),
    ({"vocab_txt": "\n".join([*SPECIAL_WORDS[1:], "a"])}, r"no \[PAD\]"),
    ({"vocab_txt": "", "tokenizer_config_json": "{"}, "tokenizer_config.json"),
    ({"vocab_json": '{"a": 0}', "merges_txt": MERGES}, "no <s>"),
    ({"vocab_json": '{"a": 0}', "merges_txt": MERGES + "a b\n"}, "cannot be read"),
]


@pytest.mark.parametrize("files, message", BAD_TOKENIZERS)
def test_bad_tokenizer_folders_are_user_errors(tmp_path, files, message):
    with pytest.raises((UserError, ModelError), match=message) as error:
        Tokenizer(write_folder(tmp_path, **files))
    assert str(tmp_path) in one_line(error)


# ------------------------------------------------------------------------------------------------
# Sentence files

ODD = "  two \x0c\x85\u2028\u2029\x1c\x0b still two\t"  # only \n ends a line
LINES = f'\ufefffirst\n\n{ODD}\r\nthree, "quoted\n\n\ufefflast without newline'.encode()
LINE_ROWS = ["first", "", ODD, 'three, "quoted', "", "\ufefflast without newline"]
GOOD_FILES = [
    ("a.txt", LINES, LINE_ROWS),
    ("a.txt.gz", gzip.compress(LINES), LINE_ROWS),
    ("a.txt.xz", lzma.compress(LINES), LINE_ROWS),
    ("a.csv", 'header\nplain\n"a, ""b""\nc"\nlast', ["plain", 'a, "b"\nc', "last"]),
    ("a.csv", 'h\n\na\n\n""\n\n', ["a", " "]),  # a blank line is no sentence, an empty cell is
    ("a.csv", "a,b\r\nx,\r\n,y\r\n", [("x", " "), (" ", "y")]),
    ("a.csv", "\ufeffa,b,c\nx,y,z\n,,\n", [("x", "y", "z"), (" ", " ", " ")]),
    ("a.tsv", 'a\tb\nx, y\t"tab\there"\n\n\t\n', [("x, y", "tab\there"), (" ", " ")]),
    ("a.tsv.gz", gzip.compress(b"a\tb\nx\ty\n"), [("x", "y")]),
    ("a.txt", b"", []),
    ("a.csv", b"", []),
    ("a.tsv", b"a\tb\n", []),
]


@pytest.mark.parametrize("name, content, rows", GOOD_FILES)
def test_sentence_files(tmp_path, name, content, rows):
    expected = [row if isinstance(row, tuple) else (row,) for row in rows]
    assert rows_of(tmp_path / name, content) == expected


LONG = b"some words of a sentence\n" * 5000
BAD_FILES = [
    ("a.csv", b"a,b\nx,y\n\nx,y,z\n", "line 4: 3 columns, but the header has 2"),
    ("a.csv", b'a,b\n"x\n1",y\nonly\n', "line 4: 1 columns, but the header has 2"),
    ("a.tsv", b"a\tb\tc\td\n", "line 1: 4 columns"),
    ("a.csv", b"\na,b\n", "line 1: 0 columns"),
    ("a.csv", b"a\nx\ry\n", "line 2"),
    ("a.csv", b'a\n"not closed\n', "line 2"),
    ("a.csv", b"a\n" + b"x" * 200_000, "line 2"),  # the csv module's limit
    ("a.txt", b"fine\nalso \xc3\xa9\ncaf\xe9 x\n", "line 3: not UTF-8 (byte 0xe9 at column 4)"),
    ("a.txt.gz", gzip.compress(b"x\n\xff"), "line 2: not UTF-8 (byte 0xff at column 1)"),
    ("a.csv", b"a\nfine\nx\x80", "line 3: not UTF-8 (byte 0x80 at column 2)"),
    ("a.txt.gz", gzip.compress(LONG)[:-20], "cannot read"),
    ("a.txt.xz", lzma.compress(LONG)[:-40], "cannot read"),
    ("a.txt.gz", b"not compressed\n", "cannot read"),
    ("a.txt.xz", b"not compressed\n", "cannot read"),
    ("a.json", b"{}", "expected .txt, .csv or .tsv (also .gz, .xz), not '.json'"),
    ("sentences", b"x", "not ''"),
    ("a.gz", b"x", "not ''"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_bad_sentence_files_are_user_errors_with_file_and_line(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / name, content)
    assert message in one_line(error) and str(tmp_path / name) in one_line(error)
    (tmp_path / name).unlink()
    if "expected" not in message and "not ''" not in message:
        with pytest.raises(UserError, match=f"^cannot read .*{name}: No such file"):
            list(read_sentences(tmp_path / name))


@pytest.mark.parametrize("name, header", [("a.txt", b""), ("a.csv", b"h\n"), ("a.txt.gz", b"")])
def test_files_are_streamed_so_a_late_error_does_not_stop_the_first_rows(tmp_path, name, header):
    content = header + b"good\n" * 1000 + b"\xff\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = read_sentences(tmp_path / name)
    assert list(itertools.islice(rows, 1000)) == [("good",)] * 1000
    with pytest.raises(UserError, match=f"line {1001 + bool(header)}"):
        next(rows)


# ------------------------------------------------------------------------------------------------
# Masking


def mask(small, x, ratio=0.3, masking="80-10-10", seed=0):
    return mask_tokens(x, small, ratio, masking, torch.Generator().manual_seed(seed))


def test_masking_rates_and_special_tokens_are_never_masked(small):
    rng = torch.Generator().manual_seed(5)
    x = torch.randint(small.vocab_size, (3000, 128), generator=rng)
    is_special = torch.rand(x.shape, generator=rng) < 0.2  # also [UNK] and padding
    kinds = torch.randint(5, (int(is_special.sum()),), generator=rng)
    x[is_special] = torch.tensor(small.special_ids)[kinds]
    special = torch.isin(x, torch.tensor(small.special_ids))
    before = x.clone()
    x_masked, selected = mask(small, x)
    assert torch.equal(x, before) and x_masked.shape == x.shape and selected.dtype == torch.bool
    assert not (selected & special).any() and torch.equal(x_masked[~selected], x[~selected])

    def assert_rate(hits: torch.Tensor, p: float) -> None:
        n = hits.numel()
        assert abs(int(hits.sum()) - n * p) < 4 * (n * p * (1 - p)) ** 0.5

    W = small.vocab_size
    assert_rate(selected[~special], 0.3)
    new, old = x_masked[selected], x[selected]
    is_mask = new == small.mask_id
    assert_rate(is_mask, 0.8 + 0.1 / W)  # a random id can be [MASK], too
    assert_rate(new == old, 0.1 + 0.1 / W)
    changed = new[~is_mask & (new != old)]  # uniform over the vocabulary
    assert_rate(changed < W // 2, 0.5)
    assert changed.min() < 50 and changed.max() >= W - 50
    assert torch.isin(changed, torch.tensor(small.special_ids)).any()
    free = ~special[:, 1:] & ~special[:, :-1]  # neighbours are selected independently
    assert_rate((selected[:, 1:] & selected[:, :-1])[free], 0.09)


@pytest.mark.parametrize("masking", ["80-10-10", "all"])
def test_two_views_get_two_masks_and_one_seed_gives_one_result(small, masking):
    x = torch.tensor(small(["the long road to the old town in the north of the country"] * 40, 32))
    state = torch.get_rng_state()
    x_masked, selected = mask(small, x, 0.3, masking)
    assert (selected[0::2] != selected[1::2]).any(1).sum() >= 18  # of 20 pairs of views
    again, other = mask(small, x, 0.3, masking), mask(small, x, 0.3, masking, seed=1)
    assert torch.equal(again[0], x_masked) and torch.equal(again[1], selected)
    assert not torch.equal(other[1], selected)
    assert torch.equal(torch.get_rng_state(), state)  # dropout's generator is not touched
    if masking == "all":
        assert torch.equal(x_masked, x.masked_fill(selected, small.mask_id))


# ------------------------------------------------------------------------------------------------
# Batches


def make_batch(sentences: int, views: int = 2) -> Batch:
    x = torch.arange(1, sentences * views * 5 + 1).reshape(-1, 5)
    return Batch(x, x % 3 > 0, x + 100, x % 2 > 0, views)


@pytest.mark.parametrize("V", [2, 3])
def test_parts_of_a_padded_batch(V):
    narrow = make_batch(4, V)
    batch = narrow.pad(8, 77)
    for part, rows, views in [
        (batch, slice(None), V),
        (batch.to(torch.device("cpu")), slice(None), V),
        (batch.shard(), slice(None), V),  # one process
        (batch.take(slice(V, 3 * V), V), slice(V, 3 * V), V),  # the sentences 1 and 2
        (batch.first_views(), slice(None, None, V), 1),
    ]:
        assert (part.views, part.width) == (views, 5)
        paddings = (77, False, 77, False)
        for ours, old, padding in zip(part.tensors(), narrow.tensors(), paddings, strict=True):
            assert ours.dtype == old.dtype and torch.equal(ours[:, :5], old[rows])
            assert ours.shape[1] == 8 and (ours[:, 5:] == padding).all()


@pytest.mark.parametrize("sentences, processes, size", [(8, 2, 4), (8, 3, 2), (3, 3, 1)])
def test_processes_have_equal_parts_and_a_remainder_is_left_out(
    monkeypatch, sentences, processes, size
):
    batch, parts = make_batch(sentences), []
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(batch.shard().x)
    assert all(len(part) == 2 * size for part in parts)
    assert torch.equal(torch.cat(parts), batch.x[: 2 * size * processes])


def test_a_last_batch_with_fewer_sentences_than_processes_is_left_out(small, monkeypatch):
    sentences = TokenizedSentences([("a",)] * 17, small, 32)
    for processes, expected in [(1, [5, 3, 2, 1, 1]), (2, [4, 2, 1, 1, 1])]:
        monkeypatch.setattr(distributed, "world_size", lambda n=processes: n)
        assert [sentences.batches_per_epoch(size) for size in (4, 8, 16, 17, 64)] == expected


# ------------------------------------------------------------------------------------------------
# Tokenised sentences


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 69, 1024, 22_063])
def test_an_epoch_has_every_row_once_in_an_order_of_its_seed_and_number_alone(small, rows):
    sentences = TokenizedSentences([("a",)] * rows, small, 3)
    keys = [(1, 2), (1, 3), (2, 2), (2, 1), (1, 0), (0, 1), (2**63 - 1, 10**6)]
    orders = [sentences.shuffled(*key) for key in keys]
    assert sentences.shuffled(*keys[-1]) is orders[-1]  # drawn once
    for order in orders:
        assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(rows))
    if rows > 3:
        assert len({tuple(order) for order in orders}) == len(keys)
    np.random.seed(99), torch.manual_seed(99)
    other = TokenizedSentences([("",)] * rows, small, 4)
    assert all(np.array_equal(other.shuffled(*key), order) for key, order in zip(keys, orders))


# ------------------------------------------------------------------------------------------------
# Token ids on disk


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffcse"


@pytest.fixture
def text(tmp_path) -> Path:
    lines = [f"sentence {i} of {'several ' * (i % 7)}words\n" for i in range(100)]
    (tmp_path / "text.txt").write_text("".join(lines))
    return tmp_path / "text.txt"


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many sentences each call of a tokenizer was given."""
    calls, real = [], Tokenizer.__call__

    def call(self, sentences, max_length):
        calls.append(len(sentences))
        return real(self, sentences, max_length)

    monkeypatch.setattr(Tokenizer, "__call__", call)
    return calls


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Tokenizer:
    """More tokens than 16 bits can count."""
    words = [*SPECIAL_WORDS[::-1], *(f"w{i}" for i in range(70_000))]  # [PAD] is not 0
    return Tokenizer(write_folder(tmp_path_factory.mktemp("large"), vocab_txt="\n".join(words)))


@pytest.mark.parametrize("columns, views", [(1, 2), (2, 2), (3, 3), (2, 4)])
@pytest.mark.parametrize("name, dtype", [("small", np.uint16), ("large", np.int32)])
def test_rows_equal_direct_tokenisation_from_memory_and_from_disk(
    tmp_path, cache, calls, monkeypatch, request, columns, views, name, dtype
):
    """A file is tokenised once, in chunks of 10; the last one is not full."""
    monkeypatch.setattr(tokens, "TOKENIZE_CHUNK_SIZE", 10)
    tokenizer, path = request.getfixturevalue(name), tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        for i in range(100):
            row = [f"{NASTY[(i + c) % len(NASTY)]} w{i * 700}" for c in range(columns)]
            csv.writer(file).writerow(row)
    rows, indices = list(read_sentences(path)), np.array([0, 98, 7, 7, 12, 1])
    expected = [tokenizer([rows[i][v % columns]], 16)[0] for i in indices for v in range(views)]
    for source, count in [(iter(rows), 10), (path, 10), (path, 0)]:
        calls.clear()
        sentences = TokenizedSentences(source, tokenizer, 16, views=views if views == 4 else None)
        assert calls == ([10 * columns] * 9 + [9 * columns])[:count]
        assert (len(sentences), sentences.columns, sentences.views) == (99, columns, views)
        assert sentences.ids.dtype == dtype
        x, mask = sentences.rows(indices)
        assert [row[m].tolist() for row, m in zip(x, mask)] == expected
        assert x.shape == mask.shape == (len(indices) * views, max(map(len, expected)))
        assert x.dtype == torch.int64 and mask.dtype == torch.bool
        assert (x[~mask] == tokenizer.pad_id).all()
        assert (mask.long().diff(dim=1) <= 0).all()  # padding on the right
    assert len(list(cache.iterdir())) == 1


def test_another_text_tokenizer_or_length_is_another_entry(
    tmp_path, small, cache, text, calls, monkeypatch
):
    checksums = set()

    def is_new(path=text, tokenizer=small, length=16) -> bool:
        before = len(calls)
        checksums.add(TokenizedSentences(path, tokenizer, length).checksum)
        return len(calls) > before

    def rewrite(content: str, nanoseconds: int) -> None:
        text.write_text(content)
        os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns + nanoseconds))

    assert is_new() and not is_new()
    assert is_new(length=8) and not is_new(length=8)
    words = (SMALL / "vocab.txt").read_text(encoding="utf-8").splitlines()
    words.remove("of")
    other = Tokenizer(write_folder(tmp_path, vocab_txt="\n".join(words)))
    assert is_new(tokenizer=other) and not is_new(tokenizer=other) and len(checksums) == 3
    (tmp_path / "link.txt").symlink_to(text)
    monkeypatch.chdir(tmp_path)
    assert not is_new(tmp_path / "link.txt") and not is_new(Path("text.txt"))
    assert is_new(Path(shutil.copy2(text, "copy.txt"))) and len(checksums) == 3
    stat, content = text.stat(), text.read_text()
    rewrite(content.replace("sentence 7 ", "sentence 8 "), 1)  # of the same size
    assert is_new() and len(checksums) == 4
    rewrite(content + "one more\n", 1)  # at the same time
    assert is_new() and len(checksums) == 5


def backwards(path: Path):
    return ((line[::-1],) for line in read_lines(path))


def doubled(path: Path):
    return ((line + line,) for line in read_lines(path))


def test_a_changed_reader_is_another_entry(small, cache, text, calls, monkeypatch):
    """Its name counts, and the source of its module and of data.py, which it may call."""
    real, readers, checksums = inspect.getsource, (backwards, doubled, read_sentences), []
    for changed in (None, sys.modules[__name__], data, None):
        monkeypatch.setattr(inspect, "getsource", lambda m, c=changed: real(m) + "#" * (m is c))
        for reader in readers:
            checksums.append(TokenizedSentences(text, small, 16, reader=reader).checksum)
    assert len(calls) == 3 + 2 + 3 + 0  # read_sentences is not in this module
    assert checksums == checksums[:3] * 4 and len(set(checksums)) == 3


def test_a_damaged_entry_is_made_again(small, cache, text):
    expected = TokenizedSentences(text, small, 16).ids.tolist()
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(entry).items()}
    other_bit = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]  # of the ids
    damaged = [b"", whole[:-1], random.Random(0).randbytes(len(whole)), other_bit]
    for name in tensors:
        write_safetensors(entry, {n: t for n, t in tensors.items() if n != name})
        damaged.append(entry.read_bytes())
    tensors["starts"][-1] -= 1
    write_safetensors(entry, tensors)
    damaged.append(entry.read_bytes())
    for content in damaged:
        entry.write_bytes(content)
        ids = TokenizedSentences(text, small, 16).ids.tolist()
        assert ids == expected and entry.read_bytes() == whole


def test_an_empty_file_is_kept_and_a_missing_one_refused(tmp_path, small, cache):
    (tmp_path / "empty.txt").touch()
    for _ in range(2):
        assert len(TokenizedSentences(tmp_path / "empty.txt", small, 16)) == 0
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(UserError, match="cannot read .*none.txt: No such file"):
        TokenizedSentences(tmp_path / "none.txt", small, 16)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("line 51: not UTF-8")])
def test_a_build_that_stops_leaves_nothing(small, cache, text, error):
    def broken(path):
        yield from itertools.islice(read_sentences(path), 50)
        raise error

    with pytest.raises(type(error)):
        TokenizedSentences(text, small, 16, reader=broken)
    assert not list(cache.glob("*"))


def test_no_place_for_the_tokens_is_a_user_error(small, cache, text, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left.*text.txt.*XDG_CACHE_HOME=DIR") as error:
        TokenizedSentences(text, small, 16)
    assert str(cache) in one_line(error) and list(cache.iterdir()) == []


@pytest.mark.parametrize("unset", [{}, {"XDG_CACHE_HOME": ""}])
def test_the_cache_is_in_the_home_folder_without_xdg_cache_home(tmp_path, monkeypatch, unset):
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path), **unset})
    assert tokens.cache_folder() == tmp_path / ".cache" / "diffcse"
