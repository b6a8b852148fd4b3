"""embed.py: every pooling against transformers, encode(), the tool, and its command line."""

import copy
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

import bert
import diffcse
import embed
import engine.index
from bert import ModelError
from data import Tokenizer
from engine.errors import UserError, run_main
from engine.index import Index
from engine.model_folder import load_model, save_model

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"
TOKENIZER = Tokenizer(SMALL)
RNG = random.Random(3)
WORDS = "the a cat dog plays guitar slowly in near 3.14 café 漢字 qzxjkv 🙂 , !".split()
NASTY = ["", "   ", "Café ÀÉ 漢字 🙂 \x00\x07 \u2028", "[MASK] [SEP] end", "word " * 10_000]
NASTY += ["same", "same", "x" * 200]
NASTY += [" ".join(RNG.choices(WORDS, k=RNG.randrange(1, 60))) for _ in range(30)]
RNG.shuffle(NASTY)  # lengths in no order, duplicates apart


@pytest.fixture(scope="module")
def small() -> bert.Bert:
    """The small model with a random pooler, which its file does not have."""
    model = bert.load_bert(SMALL)
    torch.manual_seed(0)
    D = model.cfg.hidden_size
    model.pooler = torch.nn.Linear(D, D).requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def tool() -> embed.DiffCSE:
    return embed.DiffCSE(SMALL, device="cpu")


@pytest.fixture(scope="module")
def reference(small):
    """transformers' hidden states and pooler output of each NASTY sentence, without padding."""
    theirs = BertModel.from_pretrained(SMALL, dtype=torch.float32, attn_implementation="eager")
    theirs.eval().pooler.dense.load_state_dict(small.pooler.state_dict())
    encode = AutoTokenizer.from_pretrained(SMALL)
    outputs = []
    with torch.no_grad():
        for sentence in NASTY:
            inputs = encode(sentence, truncation=True, max_length=128, return_tensors="pt")
            out = theirs(**inputs, output_hidden_states=True)
            outputs.append(([x[0].numpy() for x in out.hidden_states], out.pooler_output[0]))
    return outputs


def close(a, b, atol=1e-5) -> None:
    np.testing.assert_allclose(a, b, atol=atol, rtol=0)


# ------------------------------------------------------------------------------------------------
# encode

BY_HAND = {  # from hidden states X (each (T, D)) and the pooler's output
    "cls": lambda X, pooled: pooled,
    "cls_before_pooler": lambda X, pooled: X[-1][0],
    "mean": lambda X, pooled: X[-1].mean(0),
    "max": lambda X, pooled: X[-1].max(0),
    "avg_first_last": lambda X, pooled: (X[0].mean(0) + X[4].mean(0)) / 2,
    "avg_layer1_last": lambda X, pooled: (X[1].mean(0) + X[4].mean(0)) / 2,
    "avg_top2": lambda X, pooled: (X[3].mean(0) + X[4].mean(0)) / 2,
}


@pytest.mark.parametrize("pooling", embed.POOLINGS)
def test_every_pooling_equals_transformers_in_the_order_given(
    small, reference, pooling, monkeypatch
):
    """Batches and chunks of any size, unsorted lengths, an empty sentence, one of 10,000 words."""
    expected = np.stack([BY_HAND[pooling](*outputs) for outputs in reference])
    for batch_size, chunk_size in ((1, 1 << 14), (7, 5), (3, 1), (100, 1 << 14)):
        monkeypatch.setattr(embed, "ENCODE_CHUNK_SIZE", chunk_size)
        ours = embed.encode(small, TOKENIZER, NASTY, pooling, batch_size)
        assert ours.dtype == np.float32 and ours.shape == expected.shape
        close(ours, expected)


def test_normalising_truncating_and_nothing_to_encode(small):
    plain, unit = (embed.encode(small, TOKENIZER, NASTY, normalize=on) for on in (False, True))
    close(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), 1e-6)
    zeros = embed.l2_normalize(np.array([[0.0, 0.0], [3.0, 4.0]]))
    assert zeros.tolist() == [[0, 0], [0.6, 0.8]]
    assert embed.encode(small, TOKENIZER, []).shape == (0, small.cfg.hidden_size)
    whole = embed.encode(small, TOKENIZER, ["the cat plays the guitar"])
    cut = embed.encode(small, TOKENIZER, ["the cat plays the guitar"], max_length=4)
    close(cut, embed.encode(small, TOKENIZER, ["the cat"]), 1e-6)  # [CLS] the cat [SEP]
    assert not np.allclose(cut, whole, atol=1e-3)
    too_long = embed.encode(small, TOKENIZER, ["cat " * 500], max_length=10_000)
    close(too_long, embed.encode(small, TOKENIZER, ["cat " * 126]))  # 128 positions


def test_dropout_is_off_inside_and_the_mode_is_restored(small):
    expected = embed.encode(small, TOKENIZER, NASTY[:5])
    small.train()
    try:
        assert (embed.encode(small, TOKENIZER, NASTY[:5]) == expected).all()
        with pytest.raises(UserError, match="pooling 'nonsense' is unknown; known are cls, "):
            embed.encode(small, TOKENIZER, ["a"], "nonsense")
        assert all(module.training for module in small.modules())
    finally:
        small.eval()
    embed.encode(small, TOKENIZER, ["a"])
    assert not any(module.training for module in small.modules())


@pytest.mark.parametrize("pooling", embed.POOLINGS)
def test_bf16_is_close_to_fp32(small, pooling):
    """Mixed precision, with and without converted weights, and a model that is bf16 throughout."""
    expected = embed.encode(small, TOKENIZER, NASTY, pooling, normalize=True)
    mixed = embed.encode(small, TOKENIZER, NASTY, pooling, normalize=True, amp=torch.bfloat16)
    whole = copy.deepcopy(small).to(torch.bfloat16)
    whole = embed.encode(whole, TOKENIZER, NASTY, pooling, normalize=True)
    pairs = [(mixed, 5e-3), (whole, 2e-2)]
    if pooling != "cls":
        tool = embed.DiffCSE(SMALL, "cpu", pooling, dtype="bf16")
        assert tool.bert.layers[0].up.weight.dtype == torch.bfloat16
        pairs.append((tool.encode(NASTY, return_numpy=True), 5e-3))
    for vectors, tolerance in pairs:
        assert vectors.dtype == np.float32 and 0 < abs(vectors - expected).max()
        close(vectors, expected, tolerance)


# ------------------------------------------------------------------------------------------------
# class DiffCSE


def test_encode_shapes_and_kinds(tool):
    assert diffcse.DiffCSE is embed.DiffCSE
    D = tool.bert.cfg.hidden_size
    one, kept = tool.encode("a cat"), tool.encode("a cat", keepdim=True)
    several = tool.encode(["a cat", "a dog", ""])
    assert one.shape == (D,) and kept.shape == (1, D) and several.shape == (3, D)
    assert tool.encode([]).shape == (0, D)
    assert all(isinstance(v, torch.Tensor) and v.device.type == "cpu" for v in (one, several))
    assert isinstance(tool.encode("a cat", return_numpy=True), np.ndarray)
    close(several[0], one, 1e-6)
    close(several.norm(dim=1), 1, 1e-6)
    raw = tool.encode("a cat", normalize_to_unit=False, return_numpy=True)
    close(raw, embed.encode(tool.bert, tool.tokenizer, ["a cat"])[0], 1e-6)
    assert abs(np.linalg.norm(raw) - 1) > 0.1


def test_similarity_shapes_and_values(tool):
    queries, keys = ["a cat plays", "the guitar"], ["a dog", "a cat", "3.14"]
    raw = tool.encode(queries + keys, True, normalize_to_unit=False).astype(np.float64)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    expected = unit[:2] @ unit[2:].T
    close(tool.similarity(queries, keys), expected)
    close(tool.similarity(queries[0], keys), expected[0])
    close(tool.similarity(queries, keys[0]), expected[:, :1])
    assert type(tool.similarity(queries[0], keys[0])) is float
    assert tool.similarity(queries[1], keys[2]) == pytest.approx(expected[1, 2], abs=1e-5)
    close(tool.similarity(queries, 5 * raw[2:]), expected)  # vectors of any length
    close(tool.similarity(queries[0], torch.tensor(raw[2])), expected[0, :1])
    with pytest.raises(ValueError, match="size 5 is different from 192"):
        tool.similarity("a", np.zeros((2, 5)))


def test_search_shapes_and_errors(tmp_path):
    fresh = embed.DiffCSE(SMALL, device="cpu")
    for use in (lambda: fresh.search("a"), lambda: fresh.save_index(tmp_path / "i")):
        with pytest.raises(UserError, match="build_index"):
            use()
    (tmp_path / "index.txt").write_text("a cat \nune fenêtre\t\n\nthe guitar", encoding="utf-8")
    fresh.build_index(str(tmp_path / "index.txt"))
    assert fresh.index.sentences == ["a cat", "une fenêtre", "", "the guitar"]
    best = [("the guitar", pytest.approx(1, abs=1e-5))]
    assert fresh.search("the guitar", threshold=0.999) == best
    fresh.build_index(NASTY)
    queries = ["a cat plays", "guitar", "漢字"]
    for query, hits in zip(queries, fresh.search(queries, threshold=-1, top_k=1000), strict=True):
        cosines = sorted(fresh.similarity(query, NASTY), reverse=True)
        close([cosine for _, cosine in hits], cosines)
        assert sorted(s for s, _ in hits) == sorted(s.rstrip() for s in NASTY)
        default = [(s, pytest.approx(c, abs=1e-6)) for s, c in hits[:5] if c >= 0.6]
        assert fresh.search(query) == default
    assert fresh.search([]) == []
    fresh.build_index(tmp_path / "index.txt")
    uses = [fresh.build_index, fresh.add_to_index, fresh.encode, fresh.search]
    uses += [lambda x: fresh.similarity("a", x), lambda x: fresh.similarity(x, "a")]
    for bad, says in [
        (["the one", None], "sentence 1 of 2 is None; expected a str"),
        ([3.5], "sentence 0 of 1 is 3.5"),
        (["a", "b \ud800"], "'b .ud800' is not valid Unicode"),
        (None, "expected a list of sentences"),
    ]:
        for use in uses:
            with pytest.raises(UserError, match=says):
                use(bad)
    with pytest.raises(UserError, match="expected a list of sentences, found 'a cat'"):
        embed.encode(fresh.bert, fresh.tokenizer, "a cat")
    with pytest.raises(UserError, match="none.txt"):
        fresh.build_index(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="max_length is 0"):
        fresh.encode("a", max_length=0)
    for top_k in (-1, 2.5, None):
        with pytest.raises(UserError, match="top_k is"):
            fresh.search("a", top_k=top_k)
    assert fresh.search("the guitar", threshold=0.999) == best  # the index is still whole
    fresh.build_index(s for s in ["the one"])  # any iterable; replaces the index
    assert [s for s, _ in fresh.search("a cat", threshold=-1)] == ["the one"]
    fresh.build_index([])
    assert fresh.search("a") == [] and fresh.search(["a", "b"], threshold=-1) == [[], []]


@pytest.mark.parametrize("use_faiss, chunk", [(False, 7), (False, 1 << 16), (True, 1 << 16)])
def test_search_equals_brute_force(tmp_path, monkeypatch, use_faiss, chunk):
    """Added in parts, saved, loaded, added to. Small integers: exact scores, with many ties."""
    if use_faiss:
        pytest.importorskip("faiss", reason="faiss is optional: pip install faiss-cpu")
    monkeypatch.setattr(engine.index, "INDEX_CHUNK_SIZE", chunk)
    rng, probe = torch.Generator().manual_seed(0), torch.eye(16)[0]
    sentences = [str(i) for i in range(260)]
    vectors = torch.randint(-2, 3, (260, 16), generator=rng).float()
    queries = torch.randint(-2, 3, (20, 16), generator=rng).float()
    index, parts = Index(16, use_faiss), (slice(0, 100), slice(100, 101), slice(101, 250))
    for part in parts:
        index.add(sentences[part], vectors[part])
    for dtype in (None, "fp32", "fp16"):
        if dtype:
            index.save(tmp_path / "index", probe, dtype)
            index = Index.load(tmp_path / "index", probe, use_faiss)
            index.save(tmp_path / "index", probe, dtype)  # over the mapped file
        if dtype == "fp16":
            index.add(sentences[250:], vectors[250:])
        scores = (queries @ vectors[: len(index.sentences)].T).numpy()
        for threshold, top_k in ((6, 5), (-99, 1), (-99, 0), (6, 999), (99, 5), (-99, 999)):
            found = index.search(queries, threshold, top_k)
            for hits, row in zip(found, scores, strict=True):
                order = [j for j in np.argsort(-row, kind="stable") if row[j] >= threshold]
                expected = [(str(j), row[j]) for j in order[:top_k]]
                if use_faiss:  # its ties are in any order
                    assert all(row[int(sentence)] == score for sentence, score in hits)
                    hits, expected = ([score for _, score in pairs] for pairs in (hits, expected))
                assert hits == expected
    assert all(type(score) is float for _, score in found[0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_index_of_another_model_or_pooler_is_refused(tool, tmp_path, dtype):
    """bf16 and fp32 of one model accept each other's index."""
    path, mine = tmp_path / "index", embed.DiffCSE(SMALL, "cpu", dtype=dtype)
    mine.build_index(NASTY)
    mine.save_index(path)
    [(sentence, cosine)] = mine.search("a cat plays", threshold=-1, top_k=1)
    near = load_model(SMALL)
    save_model(near, tmp_path / "fp16", dtype="fp16")
    torch.manual_seed(0)
    for p in near.bert.parameters():  # as a few steps of training
        p.data += 1e-2 * p.data.std() * torch.randn_like(p) if p.numel() > 1 else 0
    save_model(near, tmp_path / "near")
    for name in (SMALL, tmp_path / "fp16"):
        for dtype in ("fp32", "bf16"):
            other = embed.DiffCSE(name, "cpu", dtype=dtype)
            other.load_index(path)
            hit = (sentence, pytest.approx(cosine, abs=5e-3))
            assert other.search("a cat plays", threshold=-1, top_k=1) == [hit]
    for name, pooler in ((SMALL, "mean"), (tmp_path / "near", None)):
        for dtype in ("fp32", "bf16"):
            with pytest.raises(UserError, match="made by another model or pooler"):
                embed.DiffCSE(name, "cpu", pooler, dtype).load_index(path)
    with pytest.raises(UserError, match="its vectors have 192 numbers, the model's 64"):
        Index.load(path, torch.ones(64))


def test_files_that_are_not_an_index_are_refused(tool, tmp_path):
    sentences = ["a cat", "a line\nof two", "\x00 漢字 🙂"]  # any str can be kept
    tool.build_index(sentences)
    tool.save_index(tmp_path / "index")
    tool.load_index(tmp_path / "index")
    assert tool.index.sentences == sentences
    refused = {"text": "text cannot be read", "none": "no such index"}
    (tmp_path / "text").write_text("a cat\n" * 10)
    whole = bert.read_safetensors(tmp_path / "index")
    for name, tensors in {
        "weights": {"a": torch.zeros(3)},
        "short": whole | {"vectors": whole["vectors"][:2]},
        "wide": whole | {"vectors": whole["vectors"][:, :5].clone()},
        "ints": whole | {"vectors": whole["vectors"].long()},
        "json": whole | {"sentences": torch.zeros(4, dtype=torch.uint8)},
        "probe": whole | {"probe": whole["probe"][:7]},
    }.items():
        bert.write_safetensors(tmp_path / name, tensors)
        refused[name] = f"{name} is not an index"
    before = tool.index
    for name, says in refused.items():
        with pytest.raises((UserError, ModelError), match=says):
            tool.load_index(tmp_path / name)
    assert tool.index is before
    with pytest.raises(UserError, match="dtype is 'int8'; it must be fp32 or fp16"):
        tool.save_index(tmp_path / "x", "int8")


def test_missing_faiss_and_unknown_settings(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    tool.build_index(["kept"])
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        tool.build_index(["a"], use_faiss=True)
    assert tool.index.sentences == ["kept"]
    for options, says in [
        ({"pooler": "cls"}, "needs a model with a pooler"),
        ({"pooler": "nonsense"}, "is unknown"),
        ({"dtype": "fp16"}, "dtype is 'fp16'; it must be fp32 or bf16"),
    ]:
        with pytest.raises(UserError, match=says):
            embed.DiffCSE(SMALL, device="cpu", **options)


# ------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture
def command_line(monkeypatch, capsys):
    """command_line("search", ...): what embed.py prints. Nothing else may be printed."""

    def run(*args, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        embed.main()
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def test_the_command_line_encodes_searches_and_compares(tool, command_line, tmp_path):
    """Files, pipes and typed questions; text and JSON lines; the numbers of the class."""
    lines = ["the cat plays", "une fenêtre", "", "漢字 🙂", "a guitar"]
    text, file, out = "\n".join(lines), tmp_path / "a.txt", tmp_path / "v.npy"
    file.write_text(text + "\n", encoding="utf-8")
    expected = tool.encode(lines, return_numpy=True)
    assert command_line("encode", SMALL, file, "--out", out, "--device", "cpu") == ""
    close(np.load(out), expected, 1e-6)
    command_line("encode", SMALL, file, "--out", out, "--amp", "bf16")
    assert 1e-6 < abs(np.load(out) - expected).max() < 5e-3
    printed = command_line("encode", SMALL, "-", "--no-normalize", stdin=text)
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["sentence"] for row in rows] == lines
    close([row["vector"] for row in rows], tool.encode(lines, normalize_to_unit=False))
    cosines = tool.similarity("a cat", ["a dog", "une fenêtre"])
    printed = command_line("similarity", SMALL, "a cat", "a dog", "une fenêtre")
    assert printed == "".join(f"{cosine:.4f}\n" for cosine in cosines)
    row = json.loads(command_line("similarity", SMALL, "a cat", "a dog", "--json"))
    cosine = pytest.approx(float(cosines[0]), abs=1e-6)
    assert row == {"a": "a cat", "b": "a dog", "cosine": cosine}

    tool.build_index(lines)
    hits = tool.search("a cat", threshold=-1, top_k=3)
    found = "".join(f"{cosine:.4f}\t{sentence}\n" for sentence, cosine in hits)
    assert command_line("search", SMALL, file, "a cat", "--top-k", 3) == found
    args = [sys.executable, ROOT / "embed.py", "search", SMALL, "-", "a cat", "--top-k", "3"]
    done = subprocess.run(args, input=text, capture_output=True, encoding="utf-8")  # in a pipe
    assert (done.returncode, done.stdout, done.stderr) == (0, found, "")
    saved = tmp_path / "a.safetensors"
    assert "5 sentences" in command_line("index", SMALL, file, saved, "--dtype", "fp16")
    args = ["search", SMALL, saved, "--json", "--threshold", hits[1][1] - 0.01]
    printed = command_line(*args, stdin="a cat\n\n漢字 🙂\n")
    rows = [json.loads(line) for line in printed.splitlines()]
    expected = [("a cat", hits[0][0]), ("a cat", hits[1][0]), ("漢字 🙂", "漢字 🙂")]
    assert [(row["question"], row["sentence"]) for row in rows][:3] == expected
    assert rows[0]["cosine"] == pytest.approx(hits[0][1], abs=1e-3)


@pytest.mark.parametrize(
    "args, says",
    [
        (["encode", "/none/such", "-"], "/none/such: no such model folder"),
        (["encode", SMALL, "/none/such.txt"], "/none/such.txt"),
        (["search", SMALL, "-"], "cannot both come from standard input"),
        (["search", SMALL, "/none.safetensors", "a"], "/none.safetensors: no such index"),
        (["encode", SMALL, "-", "--out", "/none/such/v.npy"], "cannot write"),
        (["encode", SMALL, "-", "--pooler", "cls"], "needs a model with a pooler"),
        (["encode", SMALL, "-", "--amp", "fp8"], "--amp: invalid choice: 'fp8'"),
        (["encode", SMALL, "-"], "standard input line 2: not UTF-8"),
    ],
)
def test_command_line_mistakes_are_one_line_and_exit_2(args, says, monkeypatch, capsys):
    if "/none/such/v.npy" in args and os.access("/", os.W_OK):
        args = [*args[:-1], "/proc/none/v.npy"]  # root may write anywhere else
    stdin = b"a\nb \xff\n" if says.startswith("standard input") else b"a\n"
    monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, args)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as exit:
        run_main(embed.main)
    printed = capsys.readouterr()
    assert exit.value.code == 2 and says in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
