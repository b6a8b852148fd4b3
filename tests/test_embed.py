"""embed.py: every pooling against transformers, encode(), the class, and its command line."""

import copy
import io
import json
import random
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line
from transformers import AutoTokenizer, BertModel

import bert
import diffcse
import embed
import engine.index
from data import Tokenizer
from engine.errors import UserError
from engine.index import Index
from engine.model_folder import DTYPES, load_model, model_card, save_model

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


@pytest.fixture
def tool() -> embed.DiffCSE:
    return diffcse.DiffCSE(SMALL, device="cpu")  # also the root module's


@pytest.fixture(scope="module")
def reference(small):
    """transformers' hidden states and pooler output of each NASTY sentence, without padding."""
    theirs = BertModel.from_pretrained(SMALL, attn_implementation="eager").float()
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
def test_every_pooling_equals_transformers(small, reference, pooling, monkeypatch):
    """Batches and chunks of any size, unsorted lengths, an empty sentence, one of 10,000 words.

    In training mode, which comes back. bf16, mixed or throughout, is close.
    """
    expected = np.stack([BY_HAND[pooling](*outputs) for outputs in reference])
    training, bf16 = copy.deepcopy(small).train(), copy.deepcopy(small).to(torch.bfloat16)
    for batch_size, chunk_size in ((1, 1 << 14), (7, 5), (100, 1 << 14)):
        monkeypatch.setattr(embed, "ENCODE_CHUNK_SIZE", chunk_size)
        close(embed.encode(training, TOKENIZER, NASTY, pooling, batch_size), expected)
    assert all(module.training for module in training.modules())
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    cases = ((small, None, 0, 1e-5), (small, torch.bfloat16, 1e-4, 5e-3), (bf16, None, 1e-4, 2e-2))
    for model, amp, least, most in cases:
        vectors = embed.encode(model, TOKENIZER, NASTY, pooling, normalize=True, amp=amp)
        assert vectors.dtype == np.float32 and least < abs(vectors - unit).max() < most
    assert not any(module.training for module in small.modules())


def test_nothing_to_encode_a_vector_of_zeros_and_an_error(small):
    assert embed.l2_normalize(np.array([[0.0, 0], [3, 4]])).tolist() == [[0, 0], [0.6, 0.8]]
    assert embed.encode(small, TOKENIZER, []).shape == (0, small.cfg.hidden_size)
    training = copy.deepcopy(small).train()
    with pytest.raises(UserError, match="pooling 'nonsense' is unknown; known are cls, "):
        embed.encode(training, TOKENIZER, ["a"], "nonsense")
    assert all(module.training for module in training.modules())


# ------------------------------------------------------------------------------------------------
# class DiffCSE


def test_shapes_and_values_of_encode_and_similarity(tool):
    queries, keys = ["a cat plays", "the guitar"], ["a dog", "a cat", "3.14"]
    raw = tool.encode(queries + keys, True, normalize_to_unit=False).astype(np.float64)
    close(raw, embed.encode(tool.bert, tool.tokenizer, queries + keys))
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    for text, shape, options in (
        (queries, (2, 192), {}),
        (queries[0], (192,), {}),
        (queries[0], (1, 192), {"keepdim": True}),
    ):
        vectors = tool.encode(text, **options)
        assert isinstance(vectors, torch.Tensor) and vectors.shape == shape
        close(vectors, unit[:2] if len(text) == 2 else unit[0].reshape(shape))
    expected = unit[:2] @ unit[2:].T
    close(tool.similarity(queries, keys), expected)
    close(tool.similarity(queries[0], keys), expected[0])
    close(tool.similarity(queries, keys[0]), expected[:, :1])
    assert type(tool.similarity(queries[0], keys[0])) is float
    assert tool.similarity(queries[1], keys[2]) == pytest.approx(expected[1, 2], abs=1e-5)
    close(tool.similarity(queries, 5 * raw[2:]), expected)  # vectors of any length
    close(tool.similarity(queries[0], torch.tensor(raw[2])), expected[0, :1])


def test_search_is_similarity_sorted(tool):
    tool.build_index(["replaced"])
    tool.build_index(sentence for sentence in NASTY[:9])  # any iterable
    tool.add_to_index(NASTY[9:])
    queries = ["a cat plays", "guitar", "漢字"]
    for query, hits in zip(queries, tool.search(queries, threshold=-1, top_k=1000), strict=True):
        close([cosine for _, cosine in hits], sorted(tool.similarity(query, NASTY), reverse=True))
        assert sorted(s for s, _ in hits) == sorted(s.rstrip() for s in NASTY)
        default = [(s, pytest.approx(c, abs=1e-6)) for s, c in hits[:5] if c >= 0.6]
        assert tool.search(query) == default
    tool.build_index([])
    assert tool.search([]) == tool.search("a") == [] and tool.search(["a", "b"]) == [[], []]


@pytest.mark.parametrize("use_faiss", [False, True])
def test_search_equals_brute_force(tmp_path, monkeypatch, use_faiss):
    """Added in parts, saved, loaded, added to. Small integers: exact scores, with many ties."""
    if use_faiss:
        pytest.importorskip("faiss", reason="faiss is optional: pip install faiss-cpu")
    monkeypatch.setattr(engine.index, "INDEX_CHUNK_SIZE", 7)
    rng, probe = torch.Generator().manual_seed(0), torch.eye(16)[0]
    sentences = [f"{i} \x00\n 漢字 🙂" for i in range(260)]  # any str can be kept
    vectors, queries = (torch.randint(-2, 3, (n, 16), generator=rng).float() for n in (260, 20))
    index = Index(16, use_faiss)
    for part in (slice(0, 100), slice(100, 101), slice(101, 250)):
        index.add(sentences[part], vectors[part])
    for dtype in DTYPES:  # the second is saved over the mapped file
        index.save(tmp_path / "index", probe, dtype)
        index = Index.load(tmp_path / "index", probe, use_faiss)
        assert index.vectors[0].dtype == DTYPES[dtype] and (index.faiss is not None) == use_faiss
    index.add(sentences[250:], vectors[250:])
    for threshold, top_k in ((6, 5), (-99, 1), (-99, 0), (6, 999), (99, 5), (-99, 999)):
        found = index.search(queries, threshold, top_k)
        for hits, row in zip(found, (queries @ vectors.T).numpy(), strict=True):
            order = [j for j in np.argsort(-row, kind="stable") if row[j] >= threshold]
            expected = [(sentences[j], row[j]) for j in order[:top_k]]
            if use_faiss:  # its ties are in any order
                assert all(row[sentences.index(text)] == score for text, score in hits)
                hits, expected = ([score for _, score in pairs] for pairs in (hits, expected))
            assert hits == expected
    assert all(type(score) is float for _, score in found[0])


def test_an_index_of_another_model_or_pooler_and_a_damaged_one_are_refused(tmp_path):
    """bf16, fp32 and an fp16 file of one model accept each other's index."""
    path, mine = tmp_path / "index", embed.DiffCSE(SMALL, "cpu", dtype="bf16")
    assert mine.bert.layers[0].up.weight.dtype == torch.bfloat16
    mine.build_index(NASTY)
    mine.save_index(path)
    [(sentence, cosine)] = mine.search("a cat plays", threshold=-1, top_k=1)
    model = load_model(SMALL)
    save_model(model, tmp_path / "fp16", dtype="fp16")
    torch.manual_seed(0)
    for p in model.bert.parameters():  # as a few steps of training
        p.data += 1e-2 * p.data.std() * torch.randn_like(p) if p.numel() > 1 else 0
    save_model(model, tmp_path / "near")
    for name in (SMALL, tmp_path / "fp16"):
        other = embed.DiffCSE(name, "cpu")
        other.load_index(path)
        hit = (sentence, pytest.approx(cosine, abs=5e-3))
        assert other.search("a cat plays", threshold=-1, top_k=1) == [hit]
    for name, pooler in ((SMALL, "mean"), (tmp_path / "near", None)):
        with pytest.raises(UserError, match="made by another model or pooler"):
            embed.DiffCSE(name, "cpu", pooler).load_index(path)
    with pytest.raises(UserError, match="its vectors have 192 numbers, the model's 64"):
        Index.load(path, torch.ones(64))
    whole = bert.read_safetensors(path)
    for damage in (
        {"vectors": whole["vectors"][:2]},
        {"vectors": whole["vectors"].long()},
        {"sentences": torch.zeros(4, dtype=torch.uint8)},  # not JSON
        {"probe": torch.tensor(1.0)},
    ):
        bert.write_safetensors(tmp_path / "damaged", whole | damage)
        with pytest.raises(UserError, match="damaged is not an index that save_index wrote"):
            Index.load(tmp_path / "damaged", whole["probe"])


MISTAKES = [
    (lambda m: embed.encode(m.bert, m.tokenizer, "a cat"), "a list of sentences, found 'a cat'"),
    (lambda m: m.encode(["the one", None]), "sentence 1 of 2 is None; expected a str"),
    (lambda m: m.build_index(None), "expected a list of sentences, found None"),
    (lambda m: m.search("a", top_k=-1), "top_k is -1"),
    (lambda m: m.search("a", top_k=2.5), "top_k is 2.5"),
    (lambda m: m.add_to_index(["a", "b \ud800"]), "'b \\ud800' is not valid Unicode"),
    (lambda m: m.build_index(["a"], use_faiss=True), "pip install faiss-cpu"),
    (lambda m: m.load_index("/dev/null/x"), "/dev/null/x: no such index"),
    (lambda m: m.load_index(SMALL / "README.md"), "README.md cannot be read"),
    (lambda m: m.load_index(SMALL / "model.safetensors"), "is not an index"),
    (lambda m: m.save_index("/dev/null/x", "int8"), "dtype is 'int8'; it must be fp32 or fp16"),
    (lambda m: embed.DiffCSE(SMALL, "cpu").save_index("/dev/null/x"), "call build_index"),
    (lambda m: embed.DiffCSE(SMALL, "cpu").search("a"), "call build_index"),
    (lambda m: embed.DiffCSE(SMALL, "cpu", "cls"), "needs a model with a pooler"),
    (lambda m: embed.DiffCSE(SMALL, "cpu", dtype="fp16"), "'fp16'; it must be fp32 or bf16"),
]


def test_mistakes_are_one_line_and_the_index_stays_whole(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    tool.build_index(["kept"])
    for use, says in MISTAKES:
        with pytest.raises((UserError, bert.ModelError)) as error:
            use(tool)
        assert says in one_line(error)
    assert [sentence for sentence, _ in tool.search("a", threshold=-1)] == ["kept"]


# ------------------------------------------------------------------------------------------------
# Command line


def test_the_command_line_encodes_searches_and_compares(tool, command, tmp_path, monkeypatch):
    """Files, pipes and typed questions; text and JSON lines; the numbers of the class."""

    def run(*words, stdin: str = "", code: int = 0) -> list:
        """Printed lines, those of JSON parsed; or the message of an error."""
        data = stdin.encode("utf-8", "surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        done = command(embed.main, *words)
        assert done.code == code and "" in (done.out, done.err)
        lines = (done.out + done.err).split("\n")[:-1]
        return [json.loads(line) if line[0] == "{" else line for line in lines]

    lines = ["the cat plays", "une fenêtre", "", "漢字 🙂", "a guitar", "9"]
    text, file, out = "\n".join(lines), tmp_path / "a.txt", tmp_path / "v.npy"
    file.write_text(text.replace("plays", "plays \t") + "\n", encoding="utf-8")  # rstrip
    expected = tool.encode(lines, return_numpy=True)
    assert run("encode", SMALL, file, "--out", out, "--device", "cpu") == []
    close(np.load(out), expected, 1e-6)
    run("encode", SMALL, file, "--out", out, "--amp", "bf16")
    assert 1e-6 < abs(np.load(out) - expected).max() < 5e-3
    rows = run("encode", SMALL, "-", "--no-normalize", stdin=text)
    assert [row["sentence"] for row in rows] == lines
    close([row["vector"] for row in rows], tool.encode(lines, normalize_to_unit=False))

    cosines = tool.similarity("a cat", ["a dog", "une fenêtre"])
    printed = run("similarity", SMALL, "a cat", "a dog", "une fenêtre")
    assert printed == [f"{cosine:.4f}" for cosine in cosines]
    [row] = run("similarity", SMALL, "a cat", "a dog", "--json")
    cosine = pytest.approx(float(cosines[0]), abs=1e-6)
    assert row == {"a": "a cat", "b": "a dog", "cosine": cosine}

    tool.build_index(lines)
    hits = tool.search("a cat", threshold=-1, top_k=6)
    found = [f"{cosine:.4f}\t{sentence}" for sentence, cosine in hits]
    assert run("search", SMALL, "-", "a cat", "--top-k", 6, stdin=text) == found
    saved, threshold = tmp_path / "a.safetensors", (hits[1][1] + hits[2][1]) / 2
    assert run("index", SMALL, file, saved, "--dtype", "fp16") == [f"{saved}: 6 sentences"]
    assert bert.read_safetensors(saved)["vectors"].dtype == torch.float16
    options = ("--json", "--threshold", threshold)
    rows = run("search", SMALL, saved, *options, stdin="a cat\n\n漢字 🙂\n")
    expected = [("a cat", hits[0][0]), ("a cat", hits[1][0]), ("漢字 🙂", "漢字 🙂")]
    assert [(row["question"], row["sentence"]) for row in rows][:3] == expected
    assert rows[0]["cosine"] == pytest.approx(hits[0][1], abs=1e-3)

    for words, says in (
        (("encode", SMALL, file, "--out", "/dev/null/v.npy"), "cannot write /dev/null/v.npy"),
        (("encode", SMALL, "-"), "standard input line 2: not UTF-8"),
        (("search", SMALL, "-"), "cannot both come from standard input"),
    ):
        [message] = run(*words, stdin="a\nb \udcff\n", code=2)
        assert says in message


def test_the_card_of_an_exported_run_names_the_pooling_that_was_exported(tmp_path, command):
    """It has the run's scores only if they are of this pooling."""
    model, run = load_model(SMALL), tmp_path / "run"
    card = model_card("a run", model, "Trained. | score | 77.70 |")
    save_model(model, run, card, run_config='{"pooling": "cls_before_pooler"}')
    pooling, source = "cls_before_pooler", run
    for i, words in enumerate(([], ["--pooler", "mean"], [], ["--pooler", "cls_before_pooler"])):
        pooling = words[1] if words else pooling
        out = tmp_path / str(i)
        assert command(embed.main, "export", source, out, *words).code == 0
        text, source = (out / "README.md").read_text(), out
        assert f"Pooling: `{pooling}`." in text and f'pooler="{pooling}"' in text
        assert text.count("Pooling: ") == text.count("pooler=") == 1 and f"{out.name}" in text
        assert ("77.70" in text) == (i == 0) and ("scores of its training" in text) == (i > 0)
    (run / "README.md").unlink()
    assert command(embed.main, "export", run, tmp_path / "new").code == 0
    assert "Pooling: `cls_before_pooler`." in (tmp_path / "new" / "README.md").read_text()
