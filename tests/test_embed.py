"""embed.py: every pooling against transformers, encode(), the tool, and its command line."""

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
from bert import ModelError
from data import Tokenizer
from engine import index
from engine.errors import UserError, run_main

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"
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
def tokenizer() -> Tokenizer:
    return Tokenizer(SMALL)


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
    small, tokenizer, reference, pooling, monkeypatch
):
    """Batches and chunks of any size, unsorted lengths, an empty sentence, one of 10,000 words."""
    expected = np.stack([BY_HAND[pooling](*outputs) for outputs in reference])
    for batch_size, chunk_size in ((1, 1 << 14), (7, 5), (3, 1), (100, 1 << 14)):
        monkeypatch.setattr(embed, "ENCODE_CHUNK_SIZE", chunk_size)
        ours = embed.encode(small, tokenizer, NASTY, pooling, batch_size)
        assert ours.dtype == np.float32 and ours.shape == expected.shape
        close(ours, expected)


def test_normalising_truncating_and_nothing_to_encode(small, tokenizer):
    plain, unit = (embed.encode(small, tokenizer, NASTY, normalize=on) for on in (False, True))
    close(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), 1e-6)
    zeros = embed.l2_normalize(np.array([[0.0, 0.0], [3.0, 4.0]]))
    assert zeros.tolist() == [[0, 0], [0.6, 0.8]]
    assert embed.encode(small, tokenizer, []).shape == (0, small.cfg.hidden_size)
    whole = embed.encode(small, tokenizer, ["the cat plays the guitar"])
    cut = embed.encode(small, tokenizer, ["the cat plays the guitar"], max_length=4)
    close(cut, embed.encode(small, tokenizer, ["the cat"]), 1e-6)  # [CLS] the cat [SEP]
    assert not np.allclose(cut, whole, atol=1e-3)
    too_long = embed.encode(small, tokenizer, ["cat " * 500], max_length=10_000)
    close(too_long, embed.encode(small, tokenizer, ["cat " * 126]))  # 128 positions


def test_dropout_is_off_inside_and_the_mode_is_restored_even_after_an_error(small, tokenizer):
    expected = embed.encode(small, tokenizer, NASTY[:5])
    small.train()
    try:
        assert (embed.encode(small, tokenizer, NASTY[:5]) == expected).all()
        with pytest.raises(UserError, match="pooling 'nonsense' is unknown; known are cls, "):
            embed.encode(small, tokenizer, ["a"], "nonsense")
        assert all(module.training for module in small.modules())
    finally:
        small.eval()
    embed.encode(small, tokenizer, ["a"])
    assert not any(module.training for module in small.modules())


@pytest.mark.parametrize("pooling", ["cls_before_pooler", "mean", "max"])
def test_bf16_is_close_to_fp32(tool, pooling):
    """Converted weights and mixed precision: unit vectors within 5e-3."""
    half = embed.DiffCSE(SMALL, "cpu", pooling, dtype="bf16")
    assert half.bert.layers[0].up.weight.dtype == torch.bfloat16
    expected = embed.encode(tool.bert, tool.tokenizer, NASTY, pooling, normalize=True)
    mixed = embed.encode(
        tool.bert, tool.tokenizer, NASTY, pooling, normalize=True, amp=torch.bfloat16
    )
    for vectors in (half.encode(NASTY, return_numpy=True, max_length=128), mixed):
        assert vectors.dtype == np.float32 and 0 < abs(vectors - expected).max()
        close(vectors, expected, 5e-3)


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


@pytest.mark.parametrize("many", [False, True])  # the official tool ignores both for lists
def test_search_is_sorted_thresholded_inclusively_and_cut_at_top_k(tool, many):
    tool.build_index(NASTY)

    def search(**options) -> list[tuple[str, float]]:
        if many:
            return tool.search(["a cat plays", "guitar"], **options)[0]
        return tool.search("a cat plays", **options)

    everything = search(threshold=-1, top_k=1000)
    scores = [score for _, score in everything]
    assert scores == sorted(scores, reverse=True) and type(scores[0]) is float
    close(scores, sorted(tool.similarity("a cat plays", NASTY), reverse=True))
    assert sorted(s for s, _ in everything) == sorted(s.rstrip() for s in NASTY)
    assert search(threshold=-1, top_k=3) == everything[:3] and search(threshold=-1, top_k=0) == []
    at, above = scores[4], np.nextafter(np.float32(scores[4]), np.float32(2))
    for threshold in (at, above):
        assert search(threshold=threshold, top_k=1000) == [
            hit for hit in everything if hit[1] >= threshold
        ]
    assert search(threshold=1.5) == []
    assert search() == [hit for hit in everything[:5] if hit[1] >= 0.6]  # the official defaults


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
    assert [len(hits) for hits in fresh.search(["a", "b", "c"], -1, 2)] == [2, 2, 2]
    assert fresh.search([]) == []
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


def assert_hits(ours, cosines, sentences, threshold, top_k, rounding) -> None:
    """What search found against its definition. cosines[i][j]: of query i and sentence j.

    Cosines that differ only by rounding may be in either order.
    """
    for hits, row in zip(ours, cosines, strict=True):
        order = [j for j in np.argsort(-row, kind="stable") if row[j] >= threshold][:top_k]
        close([cosine for _, cosine in hits], row[order], rounding)
        cosine_of = dict(zip(sentences, row))
        for (sentence, cosine), j in zip(hits, order):
            assert cosine == pytest.approx(cosine_of[sentence], abs=rounding)
            assert sentence == sentences[j] or abs(row[j] - cosine_of[sentence]) < 2 * rounding


LINES = [" ".join(RNG.choices(WORDS, k=RNG.randrange(1, 12))) for _ in range(300)]
LINES += ["the same one"] * 7  # ties


@pytest.mark.parametrize("use_faiss, chunk", [(False, 7), (False, 1 << 16), (True, 1 << 16)])
def test_search_equals_brute_force(tool, tmp_path, monkeypatch, use_faiss, chunk):
    """An index that is built, added to, saved, loaded from the file, and added to again."""
    if use_faiss:
        pytest.importorskip("faiss", reason="faiss is optional: pip install faiss-cpu")
    monkeypatch.setattr(index, "INDEX_CHUNK_SIZE", chunk)
    queries = LINES[:10] + [" ".join(RNG.choices(WORDS, k=5)) for _ in range(9)] + ["the same one"]
    tool.build_index(LINES[:100], use_faiss=use_faiss)
    tool.add_to_index(LINES[100:101])
    (tmp_path / "rest.txt").write_text("\n".join(LINES[101:250]), encoding="utf-8")
    tool.add_to_index(str(tmp_path / "rest.txt"))
    for dtype in (None, "fp32", "fp16"):
        vectors = tool.encode(LINES[:250], return_numpy=True)
        rounding = 1e-5  # other sentences in a batch move a vector by 1e-7,
        if dtype:
            tool.save_index(tmp_path / dtype, dtype)
            tool.build_index(["another"])
            tool.load_index(tmp_path / dtype, use_faiss)
            tool.save_index(tmp_path / dtype, dtype)  # over the mapped file
        if dtype == "fp16":
            vectors, rounding = vectors.astype(np.float16), 1e-4  # ... to fp16's next number
        assert tool.index.sentences == LINES[:250]
        cosines = tool.encode(queries).double().numpy() @ vectors.T.astype(np.float64)
        for threshold, top_k in ((0.6, 5), (-1, 1), (0.9, 1000), (-1, 1000)):
            found = tool.search(queries, threshold, top_k)
            assert_hits(found, cosines, LINES[:250], threshold, top_k, rounding)
            found = [tool.search(queries[3], threshold, top_k)]
            assert_hits(found, cosines[3:4], LINES[:250], threshold, top_k, rounding)
    tool.add_to_index(LINES[250:])
    best = tool.search("the same one", threshold=0.99999)
    assert [s for s, _ in best] == ["the same one"] * 5
    assert len(tool.search("the same one", 0.99999, 100)) == 7


def test_of_equal_cosines_the_first_added_comes_first(tool):
    """Also at the cut: 3 of 40 that are all equal, in parts."""
    tool.build_index(["x"] * 10)
    for _ in range(3):
        tool.add_to_index(["x"] * 10)
    tool.index.sentences = [str(i) for i in range(40)]  # to tell them apart
    assert [s for s, _ in tool.search("x", top_k=3)] == ["0", "1", "2"]
    assert len(tool.search("x", top_k=100)) == 40


def perturbed(scale: float, dtype: str = "fp32") -> embed.DiffCSE:
    """The small model, a few steps of training away."""
    model = embed.DiffCSE(SMALL, "cpu", dtype=dtype)
    torch.manual_seed(0)
    for p in model.bert.parameters():
        p.data += scale * p.data.std() * torch.randn_like(p) if p.numel() > 1 else 0
    return model


def test_an_index_of_another_model_or_pooler_and_other_files_are_refused(tool, tmp_path):
    sentences = ["a cat", "a line\nof two", "\x00 漢字 🙂"]  # any str can be kept
    tool.build_index(sentences)
    path = tmp_path / "index.safetensors"
    tool.save_index(path)
    tool.load_index(path)
    assert tool.index.sentences == sentences
    narrow = embed.DiffCSE(SMALL, "cpu")
    narrow.encode = lambda sentence: torch.ones(64) / 8
    refused = [
        (embed.DiffCSE(SMALL, "cpu", pooler="mean"), path, "made by another model or pooler"),
        (embed.DiffCSE(SMALL, "cpu", "mean", "bf16"), path, "made by another model or pooler"),
        (perturbed(1e-2), path, "made by another model or pooler"),
        (narrow, path, "its vectors have 192 numbers, the model's 64"),
        (tool, tmp_path / "text", "damaged"),
        (tool, tmp_path / "none", "no such index"),
    ]
    (tmp_path / "text").write_text("a cat\n" * 10)
    whole = bert.read_safetensors(path)
    for name, tensors in {
        "weights": {"a": torch.zeros(3)},
        "short": whole | {"vectors": whole["vectors"][:2]},
        "wide": whole | {"vectors": whole["vectors"][:, :5].clone()},
        "ints": whole | {"vectors": whole["vectors"].long()},
        "json": whole | {"sentences": torch.zeros(4, dtype=torch.uint8)},
        "probe": whole | {"probe": whole["probe"][:7]},
    }.items():
        bert.write_safetensors(tmp_path / name, tensors)
        refused.append((tool, tmp_path / name, f"{name} is not an index"))
    for model, file, says in refused:
        before = model.index
        with pytest.raises((UserError, ModelError), match=says):
            model.load_index(file)
        assert model.index is before
    half = embed.DiffCSE(SMALL, "cpu")
    for p in half.bert.parameters():
        p.data = p.data.half().float()
    half.load_index(path)  # the same model, saved in fp16, is the same model
    with pytest.raises(UserError, match="dtype is 'int8'; it must be fp32 or fp16"):
        tool.save_index(tmp_path / "x", "int8")


def test_a_bf16_model_searches_the_index_of_its_fp32_model_and_back(tool, tmp_path):
    half = embed.DiffCSE(SMALL, "cpu", dtype="bf16")
    for ours, other in ((tool, half), (half, tool)):
        ours.build_index(NASTY)
        ours.save_index(tmp_path / "index")
        expected = ours.search("a cat plays", threshold=-1, top_k=1)
        other.load_index(tmp_path / "index")
        [(sentence, cosine)] = other.search("a cat plays", threshold=-1, top_k=1)
        assert sentence == expected[0][0] and cosine == pytest.approx(expected[0][1], abs=5e-3)
        with pytest.raises(UserError, match="made by another model or pooler"):
            perturbed(1e-1, "bf16").load_index(tmp_path / "index")


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
