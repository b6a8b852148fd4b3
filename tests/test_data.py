"""data.py and engine/tokens.py: the tokenizer against transformers', sentence files good and bad,
masking, batches, and token ids on disk.
"""

import csv
import errno
import gzip
import importlib.util
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
from transformers import AutoTokenizer, BertTokenizerFast, RobertaTokenizerFast

import data
from bert import ModelError, read_safetensors, write_safetensors
from data import Batch, Tokenizer, mask_tokens, read_lines, read_sentences
from diffcse import Config, draw_batch
from engine import distributed, tokens
from engine.errors import UserError
from engine.tokens import TokenizedSentences

ROOT = Path(__file__).parent.parent
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
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(SMALL)


def folder_of(tmp_path: Path, **files: str) -> Path:
    """A model folder; vocab_txt="..." becomes vocab.txt."""
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (tmp_path / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return tmp_path


def rows_of(path: Path, content: str | bytes) -> list[tuple[str, ...]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_sentences(path))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


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
    assert sorted(ours.special_ids) == sorted(theirs.all_special_ids)
    assert ours.vocab_size == len(theirs) == len(ours.vocabulary())


def test_tokenizer_json_equals_transformers(small):
    assert_same_ids(small, AutoTokenizer.from_pretrained(SMALL))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"strip_accents": False},
    ],
)
def test_vocab_txt_alone_equals_transformers(tmp_path, config):
    shutil.copy(SMALL / "vocab.txt", tmp_path)
    if config:
        folder_of(tmp_path, tokenizer_config_json=json.dumps(config))
    assert_same_ids(Tokenizer(tmp_path), BertTokenizerFast.from_pretrained(tmp_path))


def test_vocab_json_and_merges_equal_transformers(tmp_path):
    bpe = tokenizers.ByteLevelBPETokenizer()
    text = ["The quick brown fox, 3.14 times!", "Hello world, it's a naïve café."] * 3
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(text, vocab_size=350, show_progress=False, special_tokens=special)
    bpe.save_model(str(tmp_path))
    ours = Tokenizer(tmp_path)
    assert ours.special_ids == [0, 2, 1, 4, 3]  # RoBERTa's order of cls, sep, pad, mask, unk
    assert_same_ids(ours, RobertaTokenizerFast.from_pretrained(tmp_path))
    # roberta-base's <mask> includes the space before it, which these two files do not say.
    assert ours(["a <mask> b"], 32) == ours(["a<mask> b"], 32)
    assert ours.mask_id in ours(["a <mask>"], 32)[0]


def test_settings_inside_tokenizer_json_do_not_pad_or_truncate(tmp_path, small):
    backend = tokenizers.Tokenizer.from_file(str(SMALL / "tokenizer.json"))
    backend.enable_padding(length=64)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path)(NASTY, 100) == small(NASTY, 100)


def test_a_call_leaves_the_tokenizer_as_it_was(small):
    """A failed one, too: what is saved, and what names the cache, has no truncation."""
    before = small.backend.to_str()
    small(["a b c"], 4)
    with pytest.raises(UserError, match="not valid Unicode: a lone surrogate") as error:
        small(["fine", "half of \ud83d"], 4)
    assert one_line(error) and small.backend.to_str() == before
    with pytest.raises(UserError, match=r"max_length is 1: \[CLS\] and \[SEP\] alone take 2"):
        small(["a"], 1)


def test_what_was_saved_is_saved_the_same_again(tmp_path, small):
    small.save(tmp_path / "one", 64)
    Tokenizer(tmp_path / "one").save(tmp_path / "two", 64)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert_same_ids(small, AutoTokenizer.from_pretrained(tmp_path / "two"))


def test_a_folder_without_tokenizer_config_is_saved_with_one(tmp_path):
    shutil.copy(SMALL / "vocab.txt", tmp_path)
    Tokenizer(tmp_path).save(tmp_path / "saved", 77)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.model_max_length == 77
    assert_same_ids(Tokenizer(tmp_path), theirs)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no tokenizer"),
        ({"vocab_json": "{}"}, "no tokenizer"),  # merges.txt is missing
        ({"tokenizer_json": '{"broken": '}, "cannot be read"),
        ({"tokenizer_json": "{}"}, "cannot be read"),
        ({"vocab_txt": ""}, "cannot be read"),
        ({"vocab_txt": "\n".join([*SPECIAL[:4], "a"])}, r"no \[MASK\]"),
        ({"vocab_txt": "\n".join([*SPECIAL[1:], "a"])}, r"no \[PAD\]"),
        ({"vocab_txt": "\n".join(SPECIAL), "tokenizer_config_json": "{"}, "tokenizer_config.json"),
        ({"vocab_json": '{"a": 0}', "merges_txt": "#version: 0.2\n"}, "no <s>"),
        (
            {"vocab_json": '{"a": 0, "<s>": 1, "</s>": 2}', "merges_txt": "#version: 0.2\na b\n"},
            "cannot be read",
        ),
    ],
)
def test_bad_tokenizer_folders_are_user_errors(tmp_path, files, message):
    with pytest.raises((UserError, ModelError), match=message) as error:
        Tokenizer(folder_of(tmp_path, **files))
    assert str(tmp_path) in one_line(error)


def test_a_vocabulary_too_large_for_the_model_is_refused(small):
    assert small.check_fits("F", small.vocab_size) is small
    with pytest.raises(UserError, match="^F: .* do not belong together"):
        small.check_fits("F", small.vocab_size - 1)


# ------------------------------------------------------------------------------------------------
# Sentence files


def test_txt_splits_at_newlines_only_and_keeps_empty_lines(tmp_path):
    odd = "  two \x0c\x85\u2028\u2029\x1c\x0b still two\t"
    text = f'\ufefffirst\n\n{odd}\r\nthree, "quoted\n\nlast without newline'
    expected = [(s,) for s in ("first", "", odd, 'three, "quoted', "", "last without newline")]
    assert rows_of(tmp_path / "a.txt", text) == expected
    assert rows_of(tmp_path / "a.txt.gz", gzip.compress(text.encode())) == expected
    assert rows_of(tmp_path / "a.txt.xz", lzma.compress(text.encode())) == expected
    later = rows_of(tmp_path / "b.txt", "one\n\ufefftwo\n")
    assert later == [("one",), ("\ufefftwo",)]  # a byte order mark is one only at the start


def test_csv_and_tsv_columns_quotes_and_empty_cells(tmp_path):
    text = 'header\nplain\n"a, ""b""\nc"\nlast'
    assert rows_of(tmp_path / "one.csv", text) == [("plain",), ('a, "b"\nc',), ("last",)]
    assert rows_of(tmp_path / "two.csv", "a,b\r\nx,\r\n,y\r\n") == [("x", " "), (" ", "y")]
    text = "\ufeffa,b,c\nx,y,z\n,,\n"
    assert rows_of(tmp_path / "three.csv", text) == [("x", "y", "z"), (" ", " ", " ")]
    text = 'a\tb\nx, y\t"tab\there"\n'
    assert rows_of(tmp_path / "two.tsv", text) == [("x, y", "tab\there")]
    assert rows_of(tmp_path / "two.tsv.gz", gzip.compress(b"a\tb\nx\ty\n")) == [("x", "y")]


def test_a_blank_csv_line_is_no_sentence_and_an_empty_cell_is_one(tmp_path):
    assert rows_of(tmp_path / "one.csv", 'h\n\na\n\n""\n\n') == [("a",), (" ",)]
    assert rows_of(tmp_path / "two.tsv", "h\ti\n\na\tb\n\n\t\n") == [("a", "b"), (" ", " ")]


@pytest.mark.parametrize(
    "name, content",
    [
        ("e.txt", b""),
        ("e.csv", b""),
        ("header.tsv", b"a\tb\n"),
        ("e.txt.gz", gzip.compress(b"")),
        ("e.txt.xz", lzma.compress(b"")),
    ],
)
def test_empty_files_have_no_rows(tmp_path, name, content):
    assert rows_of(tmp_path / name, content) == []


LONG = b"some words of a sentence\n" * 5000


@pytest.mark.parametrize(
    "name, content, message",
    [
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
        ("a.json", b"{}", "'.json'"),
        ("sentences", b"x", "expected .txt, .csv or .tsv"),
        ("a.gz", b"x", "expected .txt, .csv or .tsv"),
    ],
)
def test_bad_sentence_files_are_user_errors_with_file_and_line(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / name, content)
    assert message in one_line(error) and str(tmp_path / name) in one_line(error)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.csv.xz"])
def test_a_missing_file_is_a_user_error(tmp_path, name):
    with pytest.raises(UserError, match=f"^cannot read .*{name}: No such file"):
        list(read_sentences(tmp_path / name))


@pytest.mark.parametrize(
    "name, header, bad",
    [("a.txt", b"", b"\xff\n"), ("a.csv", b"h\n", b"two,cells\n"), ("a.txt.gz", b"", b"\xff\n")],
)
def test_files_are_streamed_so_a_late_error_does_not_stop_the_first_rows(
    tmp_path, name, header, bad
):
    content = header + b"good\n" * 1000 + bad
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
    special = torch.rand(x.shape, generator=rng) < 0.2  # also [UNK] and padding
    kinds = torch.randint(5, (int(special.sum()),), generator=rng)
    x[special] = torch.tensor(small.special_ids)[kinds]
    special = torch.isin(x, torch.tensor(small.special_ids))
    before = x.clone()
    x_masked, selected = mask(small, x)
    assert torch.equal(x, before) and x_masked.shape == x.shape and selected.dtype == torch.bool
    assert not (selected & special).any() and torch.equal(x_masked[~selected], x[~selected])

    def within_4_sigma(count: int, n: int, p: float) -> bool:
        return abs(count - n * p) < 4 * (n * p * (1 - p)) ** 0.5

    n, W = int(selected.sum()), small.vocab_size
    assert within_4_sigma(n, int((~special).sum()), 0.3)
    new, old = x_masked[selected], x[selected]
    is_mask = new == small.mask_id
    assert within_4_sigma(int(is_mask.sum()), n, 0.8 + 0.1 / W)  # a random id can be [MASK], too
    assert within_4_sigma(int((new == old).sum()), n, 0.1 + 0.1 / W)
    changed = new[~is_mask & (new != old)]  # uniform over the vocabulary
    assert within_4_sigma(int((changed < W // 2).sum()), len(changed), 0.5)
    assert changed.min() < 50 and changed.max() >= W - 50
    assert torch.isin(changed, torch.tensor(small.special_ids)).any()
    free = ~special[:, 1:] & ~special[:, :-1]  # neighbours are selected independently
    both = selected[:, 1:] & selected[:, :-1] & free
    assert within_4_sigma(int(both.sum()), int(free.sum()), 0.09)


def test_masking_all_writes_only_mask(small):
    x = torch.randint(5, small.vocab_size, (50, 30))
    x_masked, selected = mask(small, x, 0.5, "all")
    assert (x_masked[selected] == small.mask_id).all() and 0 < selected.float().mean() < 1
    assert torch.equal(x_masked[~selected], x[~selected])


@pytest.mark.parametrize("masking", ["80-10-10", "all"])
def test_two_views_get_two_masks_and_one_seed_gives_one_result(small, masking):
    x = torch.tensor(small(["the long road to the old town in the north of the country"] * 40, 32))
    x_masked, selected = mask(small, x, 0.3, masking)
    assert (selected[0::2] != selected[1::2]).any(1).sum() >= 18  # of 20 pairs of views
    torch.manual_seed(0)
    state = torch.get_rng_state()
    again, other = mask(small, x, 0.3, masking), mask(small, x, 0.3, masking, seed=1)
    assert torch.equal(again[0], x_masked) and torch.equal(again[1], selected)
    assert not torch.equal(other[1], selected)
    assert torch.equal(torch.get_rng_state(), state)  # dropout's generator is not touched


def test_ratio_0_selects_nothing_and_1_everything_that_is_not_special(small):
    x = torch.tensor([small(["an ordinary sentence"], 32)[0] + [small.pad_id] * 3])
    x_masked, selected = mask(small, x, 0.0)
    assert torch.equal(x_masked, x) and not selected.any()
    x_masked, selected = mask(small, x, 1.0, "all")
    assert torch.equal(selected, ~torch.isin(x, torch.tensor(small.special_ids)))
    assert (x_masked[selected] == small.mask_id).all()


# ------------------------------------------------------------------------------------------------
# Batches


def make_batch(sentences: int, views: int = 2, T: int = 5) -> Batch:
    x = torch.arange(1, sentences * views * T + 1).reshape(-1, T)
    return Batch(x, x % 3 > 0, x + 100, x % 2 > 0, views)


def same(a: Batch, b: Batch) -> bool:
    tensors = zip(a.tensors(), b.tensors(), strict=True)
    return all(torch.equal(*pair) for pair in tensors) and (a.views, a.width) == (b.views, b.width)


@pytest.mark.parametrize("V", [2, 3])
def test_parts_of_a_batch(V):
    batch = make_batch(4, V)
    first = batch.first_views()
    assert first.views == 1 and torch.equal(first.x, batch.x[::V])
    part = batch.take(slice(V, 3 * V), V)  # the sentences 1 and 2
    tensors = zip(part.tensors(), batch.tensors(), strict=True)
    assert part.views == V and all(torch.equal(a, b[V : 3 * V]) for a, b in tensors)
    assert torch.equal(first.take(slice(1, 3), 1).x_masked, part.first_views().x_masked)
    assert same(batch.to(torch.device("cpu")), batch) and same(batch.shard(), batch)
    wide = batch.pad(9, 0)
    for other in (wide.first_views(), wide.take(slice(0, V), V), wide.to(torch.device("cpu"))):
        assert other.width == wide.width == 5


def test_padding_keeps_the_width_and_masks_what_it_adds():
    batch = make_batch(3)
    wide = batch.pad(8, 77)
    assert wide.width == 5 and wide.views == 2 and wide.x.shape == (6, 8)
    for narrow, padded in zip(batch.tensors(), wide.tensors(), strict=True):
        assert torch.equal(padded[:, :5], narrow) and padded.dtype == narrow.dtype
    assert (wide.x[:, 5:] == 77).all() and (wide.x_masked[:, 5:] == 77).all()
    assert not wide.mask[:, 5:].any() and not wide.selected[:, 5:].any()


@pytest.mark.parametrize("sentences, processes, size", [(8, 2, 4), (8, 3, 2), (3, 3, 1)])
def test_processes_have_equal_parts_and_a_remainder_is_left_out(
    monkeypatch, sentences, processes, size
):
    batch = make_batch(sentences).pad(7, 0)
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(batch.shard())
    assert all(part.width == 5 and len(part.x) == 2 * size for part in parts)
    together = torch.cat([part.x for part in parts])
    assert torch.equal(together, batch.x[: 2 * size * processes])


def test_a_last_batch_with_fewer_sentences_than_processes_is_left_out(small, monkeypatch):
    sentences = TokenizedSentences([("a",)] * 17, small, 32)
    assert [sentences.batches_per_epoch(size) for size in (4, 8, 16, 17, 64)] == [5, 3, 2, 1, 1]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert [sentences.batches_per_epoch(size) for size in (4, 8, 16, 17, 64)] == [4, 2, 1, 1, 1]


def test_padding_does_not_change_a_batch(small):
    rows = [(f"sentence {i} of {'several ' * (i % 7)}words",) for i in range(20)]
    sentences, cfg = TokenizedSentences(rows, small, 32), Config(batch_size=8)
    for step in range(5):
        narrow = draw_batch(sentences, small, cfg, step)
        wide = narrow.pad(32, small.pad_id)
        T = narrow.x.shape[1]
        assert wide.x.shape[1] == 32 and wide.width == T < 32 and narrow.selected.any()
        for a, b in zip(narrow.tensors(), wide.tensors(), strict=True):
            assert torch.equal(a, b[:, :T])


# ------------------------------------------------------------------------------------------------
# Tokenised sentences


@pytest.mark.parametrize("columns, views", [(1, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("chunk", [3, 2_000])  # the last chunk of 3 is not full
def test_rows_equal_direct_tokenisation(small, monkeypatch, columns, views, chunk):
    monkeypatch.setattr(tokens, "TOKENIZE_CHUNK_SIZE", chunk)
    rows = [tuple(NASTY[(i * columns + c) % len(NASTY)] for c in range(columns)) for i in range(40)]
    sentences = TokenizedSentences(iter(rows), small, 16)
    assert (len(sentences), sentences.columns, sentences.views) == (40, columns, views)
    indices = np.array([0, 39, 7, 7, 12, 1])
    x, mask = sentences.rows(indices)
    expected = [small([rows[i][v % columns]], 16)[0] for i in indices for v in range(views)]
    assert [row[m].tolist() for row, m in zip(x, mask)] == expected
    assert x.shape == mask.shape == (len(indices) * views, max(map(len, expected)))
    assert x.dtype == torch.int64 and mask.dtype == torch.bool
    assert (x[~mask] == small.pad_id).all() and mask.sum(1).tolist() == list(map(len, expected))
    assert (mask.long().diff(dim=1) <= 0).all()  # padding on the right
    assert TokenizedSentences(rows, small, 16, views=4).rows(indices)[0].shape[0] == 6 * 4


def test_empty_sentences_make_a_batch_and_no_rows_make_none(small):
    x, mask = TokenizedSentences([("",), ("",)], small, 32).rows(np.array([1, 0]))
    assert x.tolist() == [[small.cls_id, small.sep_id]] * 4 and mask.all()
    assert len(TokenizedSentences([], small, 32)) == 0


@pytest.mark.parametrize("rows", [1, 2, 3, 69, 1024, 22_063])
def test_an_epoch_has_every_row_once_in_an_order_of_its_seed_and_number_alone(small, rows):
    sentences = TokenizedSentences([("a",)] * rows, small, 3)
    keys = [(1, 2), (1, 3), (2, 2), (2, 1), (1, 0), (0, 1), (2**63 - 1, 10**6)]
    orders = [sentences.shuffled(*key) for key in keys]
    for order in orders:
        assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(rows))
    if rows > 3:
        assert len({tuple(order) for order in orders}) == len(keys)
    np.random.seed(99), torch.manual_seed(99)
    other = TokenizedSentences([("another text",)] * rows, small, 4)
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


def contents(sentences: TokenizedSentences) -> tuple:
    x, mask = sentences.rows(np.arange(len(sentences))[::-1])
    attributes = len(sentences), sentences.columns, sentences.views, sentences.checksum
    return *attributes, sentences.ids.dtype, x.tolist(), mask.tolist()


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("words", [0, 70_000], ids=["16 bits", "32 bits"])
def test_a_file_gives_what_its_rows_give_and_is_tokenised_once(
    tmp_path, small, cache, calls, monkeypatch, columns, words
):
    tokenizer = small
    if words:  # more than 16 bits can count
        vocabulary = [*SPECIAL, *(f"w{i}" for i in range(words)), *small.vocabulary()]
        vocabulary = "\n".join(dict.fromkeys(vocabulary))
        tokenizer = Tokenizer(folder_of(tmp_path, vocab_txt=vocabulary))
    path = tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        for i in range(100):
            row = [f"{NASTY[(i + c) % len(NASTY)]} w{i * 700}" for c in range(columns)]
            csv.writer(file).writerow(row)
    expected = contents(TokenizedSentences(read_sentences(path), tokenizer, 16))
    assert expected[:3] == (99, columns, max(2, columns))
    assert expected[4] == (np.int32 if words else np.uint16)
    calls.clear()
    monkeypatch.setattr(tokens, "TOKENIZE_CHUNK_SIZE", 10)
    assert contents(TokenizedSentences(path, tokenizer, 16)) == expected
    assert calls == [10 * columns] * 9 + [9 * columns] and len(list(cache.iterdir())) == 1
    assert contents(TokenizedSentences(path, tokenizer, 16)) == expected and len(calls) == 10
    assert TokenizedSentences(path, tokenizer, 15).checksum != expected[3] and len(calls) == 20


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
    small(["a call for something else"], 9)
    assert not is_new() and is_new(length=8) and not is_new() and not is_new(length=8)
    words = (SMALL / "vocab.txt").read_text(encoding="utf-8").splitlines()
    words.remove("of")
    other = Tokenizer(folder_of(tmp_path, vocab_txt="\n".join(words)))
    assert is_new(tokenizer=other) and not is_new(tokenizer=other) and len(checksums) == 3
    (tmp_path / "link.txt").symlink_to(text)
    monkeypatch.chdir(tmp_path)
    assert not is_new(tmp_path / "link.txt") and not is_new(Path("text.txt"))
    assert is_new(Path(shutil.copy(text, "copy.txt")))
    stat, content = text.stat(), text.read_text()
    rewrite(content.replace("sentence 7 ", "sentence 8 "), 1)  # of the same size
    assert len(checksums) == 3 and is_new() and len(checksums) == 4
    rewrite(content.replace("sentence 7 ", "sentence 8 "), 2)
    assert is_new() and len(checksums) == 4
    rewrite(content + "one more\n", 2)
    assert is_new() and len(checksums) == 5 and len(list(cache.iterdir())) == 7


def test_a_changed_reader_is_another_entry(tmp_path, small, cache, text, calls, monkeypatch):
    """Its name and its module's source, in which the functions are that it calls."""
    source = """
from data import read_lines
def clean(line): return line
def lines(path): return ((clean(line),) for line in read_lines(path))
def first_line(path): yield next(lines(path))
"""

    def load(source: str):
        (tmp_path / "reader.py").write_text(source)
        spec = importlib.util.spec_from_file_location("reader", tmp_path / "reader.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "reader", module)
        spec.loader.exec_module(module)
        return module

    reader = load(source)
    by_name = [
        TokenizedSentences(text, small, 16, reader=read)
        for read in (read_sentences, reader.lines, reader.first_line, reader.lines)
    ]
    assert [len(sentences) for sentences in by_name] == [100, 100, 1, 100] and len(calls) == 3
    reader = load(source.replace("return line\n", "return line.upper() + '!'\n"))
    changed = TokenizedSentences(text, small, 16, reader=reader.lines)
    assert len(calls) == 4 and changed.checksum != by_name[1].checksum


def own_reader(path: Path):
    return ((line.upper(),) for line in read_lines(path))


def test_a_changed_read_lines_is_another_entry_for_every_reader(small, text, monkeypatch):
    def path() -> Path:
        return tokens.tokens_path(text, small, 16, own_reader)

    before, real = path(), inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda module: real(module) + "#" * (module is data))
    assert path() != before and path() == path()


DAMAGE = {
    "empty": lambda whole: b"",
    "short": lambda whole: whole[:20],
    "cut": lambda whole: whole[:-1],
    "half": lambda whole: whole[: len(whole) // 16 * 8],
    "more": lambda whole: whole + bytes(8),
    "zeros": lambda whole: bytes(len(whole)),
    "noise": lambda whole: random.Random(0).randbytes(len(whole)),
    "no start": lambda whole: whole[8:],
    "one other bit in the ids": lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again(small, cache, text, damage):
    expected = contents(TokenizedSentences(text, small, 16))
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert contents(TokenizedSentences(text, small, 16)) == expected
    assert entry.read_bytes() == whole


def test_an_entry_with_other_tensors_is_made_again(small, cache, text):
    expected = contents(TokenizedSentences(text, small, 16))
    (entry,) = cache.iterdir()
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(entry).items()}
    for name in tensors:
        write_safetensors(entry, {n: t for n, t in tensors.items() if n != name})
        assert contents(TokenizedSentences(text, small, 16)) == expected


def test_an_empty_file_is_kept_and_a_missing_one_refused(tmp_path, small, cache):
    (tmp_path / "empty.txt").touch()
    for _ in range(2):
        assert len(TokenizedSentences(tmp_path / "empty.txt", small, 16)) == 0
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(UserError, match="cannot read .*none.txt: No such file"):
        TokenizedSentences(tmp_path / "none.txt", small, 16)


def test_an_entry_that_is_deleted_or_replaced_stays_open(small, cache, text):
    sentences = TokenizedSentences(text, small, 16)
    expected = contents(sentences)
    shutil.rmtree(cache)
    assert contents(sentences) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("line 51: not UTF-8")])
def test_a_build_that_stops_leaves_nothing(small, cache, text, error):
    def broken(path):
        yield from itertools.islice(read_sentences(path), 50)
        raise error

    with pytest.raises(type(error)):
        TokenizedSentences(text, small, 16, reader=broken)
    assert not list(cache.glob("*"))


def test_two_builds_at_once_both_succeed(small, cache, text):
    """The second begins and ends while the first is reading."""
    inner = []

    def reader(path):
        rows = read_sentences(path)
        yield from itertools.islice(rows, 50)
        if not inner:
            inner.append(0)
            inner[0] = contents(TokenizedSentences(text, small, 16, reader=reader))
        yield from rows

    outer = contents(TokenizedSentences(text, small, 16, reader=reader))
    assert [outer] == inner and len(list(cache.iterdir())) == 1


def test_no_place_for_the_tokens_is_a_user_error(small, cache, text, monkeypatch):
    def check(reason: str) -> None:
        with pytest.raises(UserError, match=f"{reason}.*text.txt.*XDG_CACHE_HOME=DIR") as error:
            TokenizedSentences(text, small, 16)
        assert str(cache) in one_line(error)

    cache.parent.write_text("a file in place of the folder")
    check("Not a directory")
    cache.parent.unlink()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    check("No space left")
    assert list(cache.iterdir()) == []


def test_the_cache_is_in_the_home_folder_without_xdg_cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert tokens.cache_folder() == tmp_path / ".cache" / "diffcse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tokens.cache_folder() == tmp_path / ".cache" / "diffcse"
