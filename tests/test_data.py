"""data.py and engine/tokens.py: the tokenizer against transformers', sentence files good and bad,
masking, batches, and token ids on disk.
"""

import csv
import errno
import gzip
import inspect
import itertools
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NASTY, ROOT, SPECIAL_WORDS, one_line

import data
from bert import read_json, read_safetensors, write_safetensors
from data import Batch, Tokenizer, mask_tokens, read_lines, read_sentences
from engine import distributed, tokens
from engine.errors import UserError
from engine.tokens import TokenizedSentences

SMALL = ROOT / "assets" / "small-bert"


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(SMALL)


def write_folder(folder: Path, **files: str) -> Path:
    """A model folder; vocab_txt="..." becomes vocab.txt."""
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------------------
# Sentence files

ODD = "\r  two \x0c\x85\u2028\u2029\x1c\x0b still two\t\r"  # only \n ends a line
LINES = f'\ufefffirst\n\n{ODD}\r\nthree, "quoted\n\n\ufefflast without newline'.encode()
LINE_ROWS = ["first", "", ODD, 'three, "quoted', "", "\ufefflast without newline"]
GOOD_FILES = [
    ("a.txt", LINES, LINE_ROWS),
    ("a.txt.gz", gzip.compress(LINES, mtime=0), LINE_ROWS),
    ("a.txt.xz", lzma.compress(LINES), LINE_ROWS),
    ("a.csv", b'header\nplain\n"a, ""b""\nc"\nlast', ["plain", 'a, "b"\nc', "last"]),
    ("a.csv", b'h\n\na\n\n""\n\n', ["a", " "]),  # a blank line is no sentence, an empty cell is
    ("a.csv", b"a,b\r\nx,\r\n,y\r\n", [("x", " "), (" ", "y")]),
    ("a.csv", "\ufeffa,b,c\nx,y,z\n,,\n".encode(), [("x", "y", "z"), (" ", " ", " ")]),
    ("a.csv", b'\n\r\nh\n\n"1\r\n2"\nsay "hi"\r\r\n', ["1\r\n2", 'say "hi"']),  # blank before h
    ("a.tsv", b'a\tb\r\nx, y\t"z\r\n\n\t\nu;"\tv"\n', [("x, y", '"z'), (" ", " "), ('u;"', 'v"')]),
    ("a.csv", b"h\n" + b"x" * 200_000, ["x" * 200_000]),  # longer than the csv module's limit
    ("a.tsv", b"h\n" + b"x" * 200_000, ["x" * 200_000]),
    ("A.TXT", b"h\nx\0y\n", ["h", "x\0y"]),  # a tokenizer drops or knows NUL, as it does others
    ("A.Csv.GZ", gzip.compress(b"h\nx\n", mtime=0), ["x"]),
    ("A.TSV.XZ", lzma.compress(b"h\nx\n"), ["x"]),
    ("a.txt", b"", []),
    ("a.csv", b"", []),
    ("a.tsv", b"a\tb\n", []),
]


@pytest.mark.parametrize("name, content, rows", GOOD_FILES)
def test_sentence_files(tmp_path, name, content, rows):
    (tmp_path / name).write_bytes(content)
    expected = [row if isinstance(row, tuple) else (row,) for row in rows]
    assert list(read_sentences(tmp_path / name)) == expected


LONG = b"some words of a sentence\n" * 5000
BAD_FILES = [
    ("a.csv", b"a,b\nx,y\n\nx,y,z\n", "line 4: 3 columns, but the header has 2"),
    ("a.csv", b'a,b\n"x\n1",y\nonly\n', "line 4: 1 columns, but the header has 2"),
    ("a.tsv", b"a\tb\tc\td\n", "line 1: 4 columns"),
    ("a.csv", b"s0,s1,\nA,B,\n", "line 1: a column has no name"),
    ("a.tsv", b'"a"\t"b"\n"x"\t"y"\n', "line 1: the header is in quotes, but a .tsv has none"),
    ("a.csv", b",sentence\n0,A cat.\n", "line 1: a column has no name; pandas: to_csv(index"),
    ("a.csv", b"a\nx\ry\n", "line 2: a carriage return inside the row; if all"),
    ("a.tsv", b"a\tb\rx\ty\r", "line 1: a carriage return inside the row; if all"),
    ("a.csv", b'a\n"1\n2"\n\n"not\nclosed\n', "line 5: a quote in the row that begins here is ne"),
    ("a.csv", b'a,b\nx,y\n"open,z\nu,v\n"w",t\n', "line 3: text after a closing quote; a quote"),
    ("a.csv", b"a\tb\nx\ty\n", "line 1: the header has a tab or ;"),
    ("a.csv", b"\na;b\nx;y\n", "line 2: the header has a tab or ;"),
    ("a.txt", b"fine\nalso \xc3\xa9\ncaf\xe9 x\n", "line 3: not UTF-8 (byte 0xe9 at column 4)"),
    ("a.txt.gz", gzip.compress(b"x\n\xff", mtime=0), "line 2: not UTF-8 (byte 0xff at column 1)"),
    ("a.txt.gz", gzip.compress(LONG, mtime=0)[:-20], "cannot read"),
    ("a.txt.xz", lzma.compress(LONG)[:-40], "cannot read"),
    ("a.txt.gz", b"not compressed\n", "cannot read"),
    ("a.txt.xz", b"not compressed\n", "cannot read"),
    ("a.txt", None, "No such file"),
    ("a.json", b"{}", "expected .txt, .csv or .tsv (also .gz, .xz), not '.json'"),
    ("sentences", b"x", "not ''"),
    ("a.gz", b"x", "not ''"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_bad_sentence_files_are_user_errors_with_file_and_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_sentences(tmp_path / name))
    assert message in one_line(error) and str(tmp_path / name) in one_line(error)


def random_table(rng: random.Random, is_csv: bool) -> str:
    """Mostly a table: quoted and bare cells, blank lines, and some characters out of place."""
    columns, end, text = rng.randint(1, 3), rng.choice(["\n", "\r\n"]), rng.choice(["", "\ufeff"])
    noise = rng.choice([0, 0, 0, 0.02])
    for _ in range(rng.randint(0, 6)):
        cells = []
        for _ in range(columns):
            cell = "".join(rng.choices(["a", "é ", '"', "\t", ",", "\r\n", "\n", "\r"], k=3))
            plain = "".join(c for c in cell if c not in "\t\r\n" and not (is_csv and c in '",'))
            is_quoted = is_csv and rng.random() < 0.5
            cells.append('"' + cell.replace('"', '""') + '"' if is_quoted else plain)
        text += ("," if is_csv else "\t").join(cells) + end * rng.choice([1, 1, 1, 2])
    return "".join(c + rng.choice('\r",\t') * (rng.random() < noise) for c in text)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_1000_random_tables_are_read_as_by_the_csv_module_or_refused_in_one_line(tmp_path, name):
    rng, path, read = random.Random(3), tmp_path / name, 0
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if name == "a.tsv" else {}
    for _ in range(1000):
        path.write_bytes(random_table(rng, name == "a.csv").encode())
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                header, *rows = [*filter(None, csv.reader(file, strict=True, **dialect))] or [[]]
            is_fine = {*map(len, rows)} <= {len(header)} and len(header) <= 3
        except csv.Error:
            is_fine = False
        try:
            ours = list(read_sentences(path))
            assert is_fine and ours == [tuple(cell or " " for cell in row) for row in rows]
            read += 1
        except UserError as error:
            message, content = str(error), path.read_bytes()
            assert re.fullmatch(rf"{re.escape(str(path))} line \d+: [^\r\n]+", message)
            cr = re.search(rb"\r+[^\r\n]", content) and "carriage return" in message
            assert not is_fine or cr or re.search("the header (has|is)|no name", message)
    assert read > 600


ENCODINGS = [("utf-16-le", "\ufeff", "UTF-16"), ("utf-16-be", "\ufeff", "UTF-16")]
ENCODINGS += [("utf-32-le", "\ufeff", "UTF-32"), ("utf-32-be", "\ufeff", "UTF-32")]
ENCODINGS += [(name.lower(), "", name) for name in ("UTF-16LE", "UTF-16BE", "cp1252")]


TOOLS = ("iconv", "gunzip", "unxz")


@pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="needs iconv, gunzip and unxz")
@pytest.mark.parametrize("codec, mark, other", ENCODINGS)
def test_the_advised_command_converts_a_file_in_another_encoding(tmp_path, codec, mark, other):
    content = f"{mark}h\n“café”\n".encode(codec)
    packs = [("it's a.TXT", bytes), ("a.csv.gz", gzip.compress), ("A.TSV.XZ", lzma.compress)]
    for name, pack in packs:
        (tmp_path / name).write_bytes(pack(content))
        with pytest.raises(UserError, match=r"not UTF-8 \(byte 0x") as error:
            list(read_sentences(tmp_path / name))
        _, command = one_line(error).split(f"; if it is {other}: ")
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        fixed = tmp_path / f"fixed{Path(name.lower()).suffixes[0]}"
        assert list(read_sentences(fixed))[-1] == ("“café”",)


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_files_are_streamed_so_a_late_error_does_not_stop_the_first_rows(tmp_path, name):
    (tmp_path / name).write_bytes(b"good\n" * 1001 + b"\xff\n")
    rows = read_sentences(tmp_path / name)
    assert list(itertools.islice(rows, 1000)) == [("good",)] * 1000
    with pytest.raises(UserError, match="line 1002"):
        list(rows)


# ------------------------------------------------------------------------------------------------
# Masking


def assert_rate(hits: torch.Tensor, p: float) -> None:
    n = hits.numel()
    assert abs(int(hits.sum()) - n * p) < 4 * (n * p * (1 - p)) ** 0.5


def test_masking(small):
    rng, W, special_ids = torch.Generator(), small.vocab_size, torch.tensor(small.special_ids)
    x = torch.randint(W, (3000, 128), generator=rng.manual_seed(5))
    drawn = special_ids[torch.randint(5, x.shape, generator=rng)]  # also [UNK] and padding
    x = torch.where(torch.rand(x.shape, generator=rng) < 0.2, drawn, x)
    special, before, state = torch.isin(x, special_ids), x.clone(), torch.get_rng_state()

    def mask(masking="80-10-10", seed=0):
        return mask_tokens(x, small, 0.3, masking, rng.manual_seed(seed))

    x_masked, selected = mask()
    assert selected.dtype == torch.bool and not (selected & special).any()
    assert torch.equal(x, before) and torch.equal(x_masked[~selected], x[~selected])
    assert_rate(selected[~special], 0.3)
    for s, free in ((selected, ~special), (selected.T, ~special.T)):  # rows and columns differ
        assert_rate((s[1:] & s[:-1])[free[1:] & free[:-1]], 0.09)
    new, old = x_masked[selected], x[selected]
    is_mask = new == small.mask_id
    assert_rate(is_mask, 0.8 + 0.1 / W)  # a random id can be [MASK], too
    assert_rate(new == old, 0.1 + 0.1 / W)
    changed = new[~is_mask & (new != old)]  # uniform over the vocabulary
    assert_rate(changed < W // 2, 0.5)
    assert changed.min() < 50 and changed.max() >= W - 50 and torch.isin(changed, special_ids).any()

    assert all(map(torch.equal, mask(), (x_masked, selected)))  # a function of the seed
    assert not torch.equal(mask(seed=1)[1], selected)
    all_masked = x.masked_fill(selected, small.mask_id)
    assert all(map(torch.equal, mask("all"), (all_masked, selected)))
    assert torch.equal(torch.get_rng_state(), state)  # dropout's generator is not touched


# ------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("V", [2, 3])
def test_parts_of_a_padded_batch(V):
    x = torch.arange(1, 4 * V * 5 + 1).view(-1, 5)
    narrow = Batch(x, x % 3 > 0, x + 100, x % 2 > 0, V)
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


def test_a_last_batch_with_fewer_sentences_than_processes_is_left_out(small, monkeypatch):
    sentences = TokenizedSentences([("a",)] * 17, small, 32)
    for processes, expected in [(1, [5, 3, 2, 1, 1]), (2, [4, 2, 1, 1, 1])]:
        monkeypatch.setattr(distributed, "world_size", lambda n=processes: n)
        assert [sentences.batches_per_epoch(size) for size in (4, 8, 16, 17, 64)] == expected


# ------------------------------------------------------------------------------------------------
# Tokenised sentences


def test_an_epoch_has_every_row_once_in_an_order_of_its_seed_and_number_alone(small):
    keys = [(1, 2), (1, 3), (2, 2), (2, 1), (1, 0), (0, 1), (2**63 - 1, 10**6)]
    sentences = TokenizedSentences([("a",)] * 1025, small, 3)
    orders = [sentences.shuffled(*key) for key in keys]
    assert sentences.shuffled(*keys[-1]) is orders[-1]  # drawn once
    assert len({tuple(order) for order in orders}) == len(keys)
    np.random.seed(99), torch.manual_seed(99)
    other = TokenizedSentences([("",)] * 1025, small, 4)
    for key, order in zip(keys, orders):
        assert np.array_equal(np.sort(order), np.arange(1025))
        assert np.array_equal(other.shuffled(*key), order)


# ------------------------------------------------------------------------------------------------
# Token ids on disk


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffcse"


@pytest.fixture
def build(cache, tmp_path, small, monkeypatch):
    """build(source, tokenizer, ...): the sentences, and the sizes of the tokenizer's calls."""
    text, calls, real = tmp_path / "text.txt", [], Tokenizer.__call__
    text.write_text("".join(f"sentence {i} of {'several ' * (i % 7)}words\n" for i in range(100)))

    def call(self, sentences, max_length):
        calls.append(len(sentences))
        return real(self, sentences, max_length)

    def build(source=text, tokenizer=small, max_length=16, **options):
        calls.clear()
        return TokenizedSentences(source, tokenizer, max_length, **options), calls[:]

    monkeypatch.setattr(Tokenizer, "__call__", call)
    return build


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Tokenizer:
    """More tokens than 16 bits can count."""
    words = [*SPECIAL_WORDS[::-1], *(f"w{i}" for i in range(70_000))]  # [PAD] is not 0
    return Tokenizer(write_folder(tmp_path_factory.mktemp("large"), vocab_txt="\n".join(words)))


@pytest.mark.parametrize("columns, views", [(1, 2), (2, 2), (3, 3), (2, 4)])
@pytest.mark.parametrize("name, dtype", [("small", np.uint16), ("large", np.int32)])
def test_rows_equal_direct_tokenisation_from_memory_and_from_disk(
    tmp_path, cache, build, monkeypatch, request, columns, views, name, dtype
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
        sentences, calls = build(source, tokenizer, views=views if views == 4 else None)
        assert calls == ([10 * columns] * 9 + [9 * columns])[:count]
        assert (len(sentences), sentences.columns, sentences.views) == (99, columns, views)
        x, mask = sentences.rows(indices)
        assert [row[m].tolist() for row, m in zip(x, mask)] == expected
        assert x.shape == mask.shape == (len(indices) * views, max(map(len, expected)))
        assert (sentences.ids.dtype, x.dtype, mask.dtype) == (dtype, torch.int64, torch.bool)
        assert (x[~mask] == tokenizer.pad_id).all()
        assert (mask.long().diff(dim=1) <= 0).all()  # padding on the right
    assert len(list(cache.iterdir())) == 1


def test_another_text_tokenizer_or_length_is_another_entry(tmp_path, build, monkeypatch):
    words = list(read_json(SMALL / "tokenizer.json")["model"]["vocab"])
    words.remove("of")
    other = Tokenizer(write_folder(tmp_path, vocab_txt="\n".join(words)))
    text, link = tmp_path / "text.txt", tmp_path / "link.txt"
    link.symlink_to(text)
    monkeypatch.chdir(tmp_path)
    checksums, stat, content = set(), text.stat(), text.read_text()

    def is_new(**changes) -> bool:
        sentences, calls = build(**changes)
        checksums.add(sentences.checksum)
        return len(calls) > 0

    variants = [{}, {"max_length": 8}, {"tokenizer": other}]
    assert [is_new(**variant) for variant in variants] == [True] * 3 and len(checksums) == 3
    again = [*variants, {"source": link}, {"source": Path("text.txt")}]
    assert not any([is_new(**variant) for variant in again])
    assert not is_new(source=Path(shutil.copy(text, tmp_path / "copy.txt")))  # content counts
    table = Path(shutil.copy(text, tmp_path / "copy.csv"))
    assert is_new(source=table) and len(checksums) == 4  # and so does the kind of file
    same_size = content.replace("sentence 7 ", "sentence 8 ")
    for count, new in enumerate((same_size, content + "one more\n"), 5):
        text.write_text(new)
        os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync and tar may
        assert is_new() and len(checksums) == count


def backwards(path: Path):
    return ((line[::-1],) for line in read_lines(path))


def doubled(path: Path):
    return ((line + line,) for line in read_lines(path))


def test_a_changed_reader_is_another_entry(build, monkeypatch):
    """Its name counts, and the source of its module and of data.py, which it may call."""
    real, readers, built = inspect.getsource, (backwards, doubled, read_sentences), []
    for changed in (None, sys.modules[__name__], data, None):
        monkeypatch.setattr(inspect, "getsource", lambda m, c=changed: real(m) + "#" * (m is c))
        built += [build(reader=reader) for reader in readers]
    is_new = [len(calls) > 0 for _, calls in built]
    assert is_new == [True] * 5 + [False] + [True] * 3 + [False] * 3  # read_sentences is data's
    checksums = [sentences.checksum for sentences, _ in built]
    assert checksums == checksums[:3] * 4 and len(set(checksums)) == 3


def test_a_damaged_entry_is_made_again(cache, build):
    expected = build()[0].ids.tolist()
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(entry).items()}
    starts = tensors["starts"] - (torch.arange(101) == 100).long()
    other_bit = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]  # of the ids
    damaged = [b"", whole[:-1], b"no safetensors", other_bit]
    for changes in [{name: None} for name in tensors] + [{"starts": starts}]:
        kept = {n: t for n, t in (tensors | changes).items() if t is not None}
        write_safetensors(entry, kept)
        damaged.append(entry.read_bytes())
    for content in damaged:
        entry.write_bytes(content)
        assert build()[0].ids.tolist() == expected and entry.read_bytes() == whole


def test_an_empty_file_is_kept_and_a_missing_one_refused(tmp_path, cache, build):
    (tmp_path / "empty.txt").touch()
    for _ in range(2):
        assert len(build(tmp_path / "empty.txt")[0]) == 0
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(UserError, match="cannot read .*none.txt: No such file"):
        build(tmp_path / "none.txt")


def test_no_place_for_the_tokens_is_a_user_error(cache, build, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left.*text.txt.*XDG_CACHE_HOME=DIR") as error:
        build()
    assert str(cache) in one_line(error) and list(cache.iterdir()) == []


def test_the_cache_is_in_the_home_folder_without_xdg_cache_home(tmp_path, monkeypatch):
    for unset in ({}, {"XDG_CACHE_HOME": ""}):
        monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path), **unset})
        assert tokens.cache_folder() == tmp_path / ".cache" / "diffcse"
