"""lab/ablations.py: by hand; beside a second implementation on transformers' modules; insertions
and deletions beside difflib; flags; two processes."""

import copy
import difflib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
import transformers

import bert
import diffcse
from data import Batch
from engine import cli, distributed
from engine.errors import UserError
from engine.run import Run
from lab import ablations
from lab.ablations import AblationConfig, AblationModel, delete, insert

ROOT = Path(__file__).parent.parent
SMALL_BERT = str(ROOT / "assets" / "small-bert")


class Words:
    """A tokenizer's ids. They are not BERT's, so a hard-coded id is noticed."""

    pad_id, cls_id, sep_id, mask_id, unk_id, vocab_size = 1, 2, 3, 4, 5, 60
    special_ids = [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------------------
# By hand, with D = 2. h is the vector C of a sentence's first word. The discriminator's state is
# (0, A[word]) + h, and h itself at position 0. Words are the ids from 6.

A = [0.1, 9.0, 9.0, 0.5, -0.25, 9.0, 1.0, -1.0, 0.75, -2.0, 1.5, 0.25]
C = [(5, 5)] * 6 + [(0.3, -0.4), (0.0, 2.0), (0.8, 0.6), (1.0, 0.0), (0.28, 0.96), (-0.96, 0.28)]
H0, H1 = C[6]
EMBEDDINGS = "encoder.embeddings.word.weight"


class Table(nn.Module):
    """In place of a Bert. `read` records the rows that it has read."""

    cfg = SimpleNamespace(hidden_size=2, initializer_range=0.02)

    def __init__(self, vectors):
        super().__init__()
        self.embeddings, self.read = nn.Module(), []
        vectors = torch.tensor(vectors, dtype=torch.float64)
        self.embeddings.word = nn.Embedding.from_pretrained(vectors, freeze=False)

    def forward(self, ids, mask, cls_vector=None, cls_only=False):
        self.read.append([row[m].tolist() for row, m in zip(ids, mask)])
        states = self.embeddings.word(ids)  # (R, T, 2)
        first = states[:, 1] if cls_vector is None else cls_vector
        rest = states[:, 1:] + (0 if cls_vector is None else cls_vector[:, None])
        states = torch.cat([first[:, None], rest], 1)
        return states[:, :1] if cls_only else states


class Filler(nn.Module):
    """In place of the generator: predicts these words, one after the other."""

    def __init__(self, words):
        super().__init__()
        self.words, self.read = words, []

    def predict_tokens(self, ids, mask, positions, temperature=None):
        self.read.append([row[m].tolist() for row, m in zip(ids, mask)])
        assert int(positions.sum()) == len(self.words)
        return ids.masked_scatter(positions, torch.tensor(self.words, dtype=torch.int64))


class TiedHead(nn.Module):
    """In place of a masked-LM head."""

    def forward(self, states, word_embeddings):
        return states @ word_embeddings.T


def identity(bias: bool = True) -> nn.Linear:
    linear = nn.Linear(2, 2, bias).double()
    parameters = {"weight": torch.eye(2), "bias": torch.zeros(2)}
    linear.load_state_dict({name: parameters[name] for name in linear.state_dict()})
    return linear


def by_hand(rows, words, masked=None, selected=None, V=2, **changes):
    """The model after one step's backward pass, with .loss, .metrics, .grads, and .trained: the
    words whose vector in the encoder has a gradient. The first views are edited, and lam is 1."""
    defaults = {"lam": 1.0, "views": "first", "edit_scope": "masked", "temperature": 0.5}
    if changes.get("condition_on", "same") != "same":
        defaults["text"] = "paragraphs"
    cfg = AblationConfig(**defaults | changes)
    width = max(map(len, rows))
    x, x_masked = (
        torch.tensor([row + [Words.pad_id] * (width - len(row)) for row in texts])
        for texts in (rows, masked or rows)
    )
    selected = x_masked == Words.mask_id if selected is None else torch.tensor(selected).bool()
    discriminator = Table([(0, a) for a in A]) if cfg.edit_as == "difference" else None
    generator = None if words is None else Filler(words)
    model = AblationModel(cfg, Words, Table(C), generator, discriminator, mlm_head=TiedHead())
    model.projector = identity(bias=False)
    if discriminator:
        model.head = model.head and identity()
        model.heads = nn.ModuleDict({name: identity() for name in model.heads})
    loss, model.metrics = model(Batch(x, x != Words.pad_id, x_masked, selected, V))
    loss.backward()
    model.loss = loss.detach()
    model.grads = {n: p.grad.tolist() for n, p in model.named_parameters() if p.grad is not None}
    rows_with_grad = enumerate(model.grads[EMBEDDINGS])
    model.trained = {i for i, grad in rows_with_grad if max(map(abs, grad)) > 1e-12}
    return model


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def detection(ids: list[int], changed: list[int]) -> tuple[float, float]:
    """The loss of "changed or not" at these ids of x'', and its derivative by h[1]. That by h[0]
    is its negative."""
    logits = [(A[i] if t else 0) + H1 - H0 for t, i in enumerate(ids)]
    losses = [softplus(-s) if c else softplus(s) for s, c in zip(logits, changed)]
    slopes = [sigmoid(s) - c for s, c in zip(logits, changed)]
    return sum(losses) / len(ids), sum(slopes) / len(ids)


def word_probabilities(state: float) -> list[float]:
    return [math.exp(state * a) / sum(math.exp(state * b) for b in A) for a in A]


def assert_near(got, want) -> None:
    got, want = (torch.as_tensor(v, dtype=torch.float64) for v in (got, want))
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-14), (got, want)


def assert_counts(model, **expected: tuple[int, int]) -> None:
    for name, counts in expected.items():
        assert tuple(map(int, model.metrics[name])) == counts, name


def assert_h_grad(model, grad: float) -> None:
    """The gradient of the first h is (-grad, grad), and reaches projector and encoder."""
    assert_near(model.grads[EMBEDDINGS][6], [-grad, grad])
    row = [grad * c for c in C[6]]
    assert_near(model.grads["projector.weight"], [[-g for g in row], row])


@pytest.mark.parametrize("pads", [True, False])
def test_masked_tokens_by_hand(pads):
    """6 was selected and left, 7 masked, and 8 became 9 (80-10-10); no generator changes that."""
    rows, masked = [[2, 6, 7, 8, 10, 3], [2, 6, 3]], [[2, 6, 4, 9, 10, 3], [2, 6, 3]]
    selected = [[0, 1, 1, 1, 0, 0], [0] * 6]
    model = by_hand(rows, None, masked, selected, objective="masked", pads_in_loss=pads)
    loss = grad = correct = 0
    for token, target in ((6, 6), (4, 7), (9, 8)):
        p = word_probabilities(A[token] + H1)
        loss -= math.log(p[target]) / 3
        grad += (sum(q * a for q, a in zip(p, A)) - A[target]) / 3
        correct += p.index(max(p)) == target
    assert_near(model.loss, loss)
    assert_near(model.grads[EMBEDDINGS][6], [0, grad])
    assert model.discriminator.read == [[[2, 6, 4, 9, 10, 3]]]
    assert_counts(model, accuracy_masked=(correct, 3))


def test_corrected_tokens_by_hand():
    """p = p_original [same token] + (1 - p_original) p_token; it does not train p_original."""
    rows, masked = [[2, 6, 7, 8, 10, 3]] * 2, [[2, 6, 4, 4, 10, 3]] * 2
    model = by_hand(rows, [9, 8], masked, objective="corrected")
    loss, grad = detection([2, 6, 9, 8, 10, 3], [0, 0, 1, 0, 0, 0])
    token_loss = token_grad = correct = 0
    for token, target in ((9, 7), (8, 8)):
        original, q = 1 - sigmoid(A[token] + H1 - H0), word_probabilities(A[token] + H1)
        p = original * (token == target) + (1 - original) * q[target]
        slope = q[target] * (A[target] - sum(r * a for r, a in zip(q, A)))
        token_loss -= math.log(p) / 2
        token_grad -= (1 - original) * slope / p / 2
        correct += q.index(max(q)) == target
    assert_near([model.loss, model.metrics["difference"][0]], [loss + token_loss] * 2)
    assert_near(model.grads[EMBEDDINGS][6], [-grad, grad + token_grad])
    assert_near(model.grads["head.bias"], [-grad, grad])  # of the detection alone
    assert_counts(model, share_replaced=(1, 6), accuracy_masked=(correct, 2))
    assert model.discriminator.read == [[[2, 6, 9, 8, 10, 3]]]


@pytest.mark.parametrize(
    "edit, drawn, words, edited, changed",
    [
        ("insert", "00100100", [9, 6], [2, 6, 9, 7, 8, 6, 10, 3], "00100100"),
        ("insert", "01000010", [6, 10], [2, 6, 6, 7, 8, 10, 10, 3], "01000010"),  # the neighbours
        ("insert", "00011000", [2, 3], [2, 6, 7, 2, 3, 8, 10, 3], "00011000"),
        ("delete", "001100", None, [2, 6, 10, 3], "0010"),  # two at one position
        ("delete", "001010", None, [2, 6, 8, 3], "0011"),  # the last word: [SEP] is changed
    ],
)
def test_insertion_and_deletion_by_hand(edit, drawn, words, edited, changed, monkeypatch):
    drawn, changed = [int(c) for c in drawn], [int(c) for c in changed]

    def subset(candidates, count):
        assert count.tolist() == [2]
        return torch.tensor([drawn]).bool()

    monkeypatch.setattr(ablations, "random_subset", subset)
    rows, masked = [[2, 6, 7, 8, 10, 3]] * 2, [[2, 6, 4, 8, 10, 3]] * 2
    model = by_hand(rows, words, masked, edit_with=edit, mask_ratio=0.5, pads_in_loss=False)
    loss, grad = detection(edited, changed)
    assert_near(model.loss, loss)
    assert_h_grad(model, grad)
    assert model.discriminator.read == [[edited]]
    assert_counts(model, share_replaced=(sum(changed), len(edited)))
    if edit == "insert":  # the generator reads all of the sentence's own words
        rest = iter(rows[0])
        assert model.generator.read == [[[4 if d else next(rest) for d in drawn]]]


# Cosines of first views (which begin with 6 and 7) with second views (8 and 10) and edits (9, 11)
SECONDS, EDITS = [[0.0, -0.6], [0.6, 0.96]], [[0.6, -0.8], [0.0, 0.28]]


def exp(cosines: list[float]) -> float:
    return sum(math.exp(cosine / 0.5) for cosine in cosines)


def info_nce(rows: list[list[float]]) -> float:
    return sum(math.log(exp(row) / exp([row[i]])) for i, row in enumerate(rows)) / 2


def against_edits(edit_as: str, words: list[int], **changes):
    """Two sentences, whose first words are masked and become these."""
    rows, masked = ([[2, i, 3], [2, 8, 3], [2, j, 10, 3], [2, 10, 3]] for i, j in ((6, 7), (4, 4)))
    return by_hand(rows, words, masked, edit_as=edit_as, projector="tanh", **changes)


@pytest.mark.parametrize("views", ["first", "both"])  # only first views are edited in any case
@pytest.mark.parametrize("words", [[9, 11], [11, 9]])
def test_positive_and_negative_edits_by_hand(words, views):
    edits = [row if words[0] == 9 else row[::-1] for row in EDITS]
    pushed = [math.log((exp(s) + exp(e)) / exp(s)) for s, e in zip(SECONDS, edits)]
    for edit_as, loss in (("positive", info_nce(edits)), ("negative", sum(pushed) / 2)):
        model = against_edits(edit_as, words, views=views, lam=0.7)
        metrics = [model.loss, model.metrics["difference"][0], model.metrics["contrastive"][0]]
        assert_near(metrics, [info_nce(SECONDS) + 0.7 * loss, loss, info_nce(SECONDS)])
        read = [[2, 6, 3], [2, 8, 3], [2, 7, 10, 3], [2, 10, 3]]
        assert model.encoder.read == [read, [[2, words[0], 3], [2, words[1], 10, 3]]]
        assert model.trained == {6, 7, 8, 9, 10, 11} and model.discriminator is None
        if edit_as == "positive":
            assert_counts(model, accuracy_edits=(2 if words[0] == 9 else 0, 2))
        else:  # 0.6 > 0, but not 0.28 > 0.96
            assert_counts(model, share_nearer=(1 if words[0] == 9 else 0, 2))
    # Without the contrastive loss, positives do not depend on second views.
    assert against_edits("positive", words, contrastive=False).trained == {6, 7, 9, 11}
    assert against_edits("negative", words, contrastive=False).trained == {6, 7, 8, 9, 10, 11}


def test_next_and_both_sentences_by_hand():
    """The discriminator reads the next sentence's edit and this one's h; the encoder does not
    read the next sentence."""
    rows, masked = [[2, 6, 7, 3], [2, 7, 8, 10, 3]] * 2, [[2, 6, 4, 3], [2, 4, 8, 10, 3]] * 2
    own, following = [2, 6, 9, 3], [2, 9, 8, 10, 3]
    results = detection(own, [0, 0, 1, 0]), detection(following, [0, 1, 0, 0, 0])
    both = [(a + b) / 2 for a, b in zip(*results)]
    for whose, read, (loss, grad), counts in (
        ("next", [[following]], results[1], (1, 5)),
        ("both", [[own], [following]], both, (2, 9)),
    ):
        model = by_hand(rows, [9], masked, V=4, condition_on=whose, pads_in_loss=False)
        assert_near(model.loss, loss)
        assert_h_grad(model, grad)
        assert model.trained == {6} and model.encoder.read == [rows[::2]]
        assert model.discriminator.read == read
        assert_counts(model, share_replaced=counts)
    q = word_probabilities(A[4] + H1)
    model = by_hand(rows, None, masked, V=4, condition_on="next", objective="masked")
    assert_near(model.loss, -math.log(q[7]))
    assert_near(model.grads[EMBEDDINGS][6], [0, sum(r * a for r, a in zip(q, A)) - A[7]])
    assert model.trained == {6}


@pytest.mark.parametrize("objective", ["masked", "corrected"])
def test_no_masked_token_gives_no_loss_and_finite_gradients(objective):
    words = [] if objective == "corrected" else None
    model = by_hand([[2, 6, 7, 3]] * 2, words, objective=objective)
    assert_near(model.loss, 0 if words is None else detection([2, 6, 7, 3], [0] * 4)[0])
    assert all(map(math.isfinite, model.grads[EMBEDDINGS][6]))


# ------------------------------------------------------------------------------------------------
# Insertion and deletion beside an alignment that does not know the random numbers


def editing(ratio: float, predict_tokens) -> SimpleNamespace:
    """The part of a model that insert and delete need."""
    generator = SimpleNamespace(predict_tokens=predict_tokens)
    cfg = AblationConfig(mask_ratio=ratio)
    return SimpleNamespace(cfg=cfg, tokenizer=Words, generator=generator)


def sentences_of(lengths: torch.Tensor) -> Batch:
    """[CLS], distinct words, [SEP], padding; two columns are padding in all rows."""
    mask = torch.arange(int(lengths.max()) + 2) < lengths[:, None]
    x = torch.stack([6 + torch.randperm(54)[: mask.shape[1]] for _ in lengths])
    x[:, 0] = Words.cls_id
    x[torch.arange(len(x)), lengths - 1] = Words.sep_id
    x = x.masked_fill(~mask, Words.pad_id)
    return Batch(x, mask, x, mask)


def difflib_changes(a: list[int], b: list[int], edit: str) -> list[bool]:
    changed = [False] * len(b)
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        assert kind in ("equal", edit)
        if kind == "insert":
            changed[b1:b2] = [True] * (b2 - b1)
        elif kind == "delete":
            changed[b1] = True
            assert a2 > a1
    return changed


@pytest.mark.parametrize("edit", [insert, delete], ids=lambda edit: edit.__name__)
def test_changed_tokens_are_those_that_difflib_finds(edit):
    torch.manual_seed(1)
    changes = 0

    def predict_tokens(ids, mask, positions, temperature):
        assert torch.equal(positions, ids == Words.mask_id)
        new_words = torch.randint(60, 99, ids.shape)  # in no sentence: the alignment is unique
        return torch.where(positions, new_words, ids)

    for ratio in [0.0, 0.9, *torch.rand(38).mul(0.9).tolist()]:
        lengths = torch.cat([torch.tensor([2, 3]), torch.randint(2, 41, (23,))])
        batch = sentences_of(lengths)
        before = batch.x.clone()
        x_edited, changed, mask = edit(editing(ratio, predict_tokens), batch)
        assert torch.equal(batch.x, before) and x_edited.shape == changed.shape == mask.shape
        assert changed.dtype == mask.dtype == torch.bool and x_edited.dtype == torch.int64
        assert not (x_edited[~mask].any() or changed[~mask].any())  # padding: id 0, not changed
        for row in range(len(before)):
            n = int(mask[row].sum())
            a, b = before[row, : lengths[row]].tolist(), x_edited[row, :n].tolist()
            assert mask[row, :n].all() and (b[0], b[-1]) == (Words.cls_id, Words.sep_id)
            assert 0 not in b
            exact = ratio * (len(a) - 2)
            assert math.floor(exact) <= abs(n - len(a)) <= math.ceil(exact)
            assert changed[row, :n].tolist() == difflib_changes(a, b, edit.__name__)
            changes += n != len(a)
    assert changes > 700


def drawn_positions(edit, ratio: float, n: int, rows: int = 20_000) -> torch.Tensor:
    """Which of n words are deleted, or which tokens between [CLS] and [SEP] are inserted.

    Shapes: -> (rows, n or more) bool.
    """
    words = 6 + torch.arange(n)
    x = torch.cat([torch.tensor([Words.cls_id]), words, torch.tensor([Words.sep_id])])
    x = x.repeat(rows, 1)
    model = editing(ratio, lambda ids, mask, positions, temperature: ids)
    x_edited, changed, _ = edit(model, Batch(x, x > 0, x, x > 0))
    if edit is insert:
        return changed[:, 1:-1]
    return torch.stack([(x_edited != word).all(1) for word in words], 1)


@pytest.mark.parametrize("edit", [insert, delete], ids=lambda edit: edit.__name__)
def test_counts_have_mask_ratio_as_their_mean_and_positions_are_equally_likely(edit):
    torch.manual_seed(2)
    for ratio, n in ((0.3, 7), (0.15, 5), (0.5, 4), (0.9, 1)):
        drawn = drawn_positions(edit, ratio, n)
        counts = drawn.sum(1)
        assert set(counts.tolist()) == {math.floor(ratio * n), math.ceil(ratio * n)}
        error = abs(float(counts.double().mean()) / n - ratio)
        assert error < 5 * 0.5 / n / math.sqrt(len(drawn))  # the deviation is at most 0.5
        for count in set(counts.tolist()):
            rows = drawn[counts == count]
            candidates = n if edit is delete else n + count
            often = rows[:, :candidates].double().mean(0)
            assert (often - count / candidates).abs().max() < 5 * 0.5 / math.sqrt(len(rows))
    patterns = drawn_positions(edit, *((0.5, 4) if edit is delete else (1.0, 2)))  # 2 of 4
    pairs = itertools.combinations(range(4), 2)
    shares = [float((patterns[:, i] & patterns[:, j]).double().mean()) for i, j in pairs]
    assert max(abs(share - 1 / 6) for share in shares) < 5 * 0.4 / math.sqrt(len(patterns))


def test_random_counts_are_the_next_integers_with_an_exact_mean(monkeypatch):
    torch.manual_seed(3)
    lengths = torch.arange(40).repeat(500)
    for ratio in (0.0, 0.15, 0.3, 0.5, 0.9):
        error = ablations.random_count(lengths, ratio) - ratio * lengths.double()
        assert (error.abs() < 1).all() and abs(float(error.mean())) < 5 * 0.5 / len(lengths) ** 0.5
    monkeypatch.setattr(torch, "rand", lambda shape, device: torch.full(shape, 1 - 2**-24))
    lengths = torch.arange(2000)  # the largest draw never gives more than the ceiling
    for ratio in torch.linspace(0, 1, 41).tolist():
        ceiling = [math.ceil(ratio * n) for n in lengths.tolist()]
        assert ablations.random_count(lengths, ratio).tolist() == ceiling


# ------------------------------------------------------------------------------------------------
# The whole step, written a second time on transformers' modules


def random_model(family: str, mlm: bool, folder: Path):
    """A transformers model with random weights, norms and biases too, and bert.py's copy of it."""
    sizes = dict(vocab_size=60, pad_token_id=Words.pad_id, initializer_range=0.3)
    sizes["max_position_embeddings"] = 40
    name = bert.FAMILIES[family]
    if family == "distilbert":
        sizes |= dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, dropout=0, attention_dropout=0)
    else:
        sizes |= dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        sizes |= dict(intermediate_size=64, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, name + ("ForMaskedLM" if mlm else "Model"))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.double(), bert.load_bert(folder, mlm=mlm).double()


def reference_edit(edit: str, scope: str, generator, row: dict, drawn: list | None):
    """x'' of one sentence without padding, and which tokens are changed. drawn: the inserted
    positions of x'', or the deleted ones of x."""

    def best(ids: list) -> list:
        with torch.no_grad():
            return generator(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()

    x, n = row["x"], len(row["x"])
    if edit == "delete":
        kept = [t for t in range(n) if not drawn[t]]
        return [x[t] for t in kept], [t > 0 and drawn[t - 1] for t in kept]
    if edit == "insert":
        drawn, rest = drawn[: n + sum(drawn)], iter(x)
        with_masks = [Words.mask_id if new else next(rest) for new in drawn]
        words = zip(drawn, with_masks, best(with_masks))
        return [word if new else old for new, old, word in words], drawn
    editable = [t > 0 and (scope == "all" or row["selected"][t]) for t in range(n)]
    words = [new if e else old for e, new, old in zip(editable, best(row["x_masked"]), x)]
    return words, [a != b for a, b in zip(words, x)]


def cls_of(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask.long()).last_hidden_state[:, 0]


def log_sum_exp(vector, others, temperature: float):
    cosines = [F.cosine_similarity(vector, other, dim=0) for other in others]
    return torch.logsumexp(torch.stack(cosines) / temperature, 0)


def reference_loss(cfg, modules, batch: Batch, draws):
    """The total loss, from the paper and the docstrings. draws: the code's random subsets."""
    texts = 1 if cfg.condition_on == "same" else 2
    h = modules.projector(cls_of(modules.encoder, batch.x[::texts], batch.mask[::texts]))
    firsts, seconds, tau = h[::2], h[1::2], cfg.temperature
    contrastive = sum(
        log_sum_exp(first, seconds, tau) - F.cosine_similarity(first, second, dim=0) / tau
        for first, second in zip(firsts, seconds)
    ) / len(firsts)
    every = 2 if cfg.views == "first" or cfg.edit_as != "difference" else 1
    losses = []
    for edit in ["replace", "insert", "delete"] if cfg.edit_with == "all" else [cfg.edit_with]:
        for text in {"same": [0], "next": [1], "both": [0, 1]}[cfg.condition_on]:
            rows = slice(text, None, texts * every)
            part = Batch(*(t[rows] for t in batch.tensors()))
            losses.append(
                reference_difference(cfg, modules, part, h[::every], seconds, edit, draws)
            )
    return cfg.contrastive * contrastive + cfg.lam * sum(losses) / len(losses)


def reference_difference(cfg, modules, batch: Batch, h, seconds, edit: str, draws):
    R, T = batch.x.shape
    selected = [(r, t) for r in range(R) for t in range(T) if batch.selected[r, t]]
    if cfg.objective == "masked":
        states = read_with_h(modules.discriminator, batch.x_masked, batch.mask, h)
        logits = torch.stack([modules.mlm_head(states[r, t]) for r, t in selected])
        return F.cross_entropy(logits, torch.stack([batch.x[r, t] for r, t in selected]))
    drawn = next(draws) if edit != "replace" else [None] * R
    edits = []
    for r in range(R):
        names = ("x", "x_masked", "selected")
        row = {name: getattr(batch, name)[r, batch.mask[r]].tolist() for name in names}
        edits.append(reference_edit(edit, cfg.edit_scope, modules.generator, row, drawn[r]))
    width = max(len(words) for words, _ in edits) if edit == "insert" else T
    ids = torch.tensor([words + [0] * (width - len(words)) for words, _ in edits])
    changed = torch.tensor([c + [False] * (width - len(c)) for _, c in edits]).long()
    mask = torch.tensor([[t < len(words) for t in range(width)] for words, _ in edits])
    if cfg.edit_as != "difference":
        h_edited = modules.projector(cls_of(modules.encoder, ids, mask))
        return reference_contrast(cfg, h, seconds, h_edited)
    states = read_with_h(modules.discriminator, ids, mask, h)
    logits = modules.heads[edit](states)
    counted = torch.ones_like(mask) if cfg.pads_in_loss else mask
    loss = F.cross_entropy(logits[counted], changed[counted], reduction=cfg.reduction)
    for r, t in selected if cfg.objective == "corrected" else []:
        original, replaced = logits[r, t].detach().softmax(0)
        drawn_p = modules.mlm_head(states[r, t]).softmax(0)[batch.x[r, t]]
        p = original * (ids[r, t] == batch.x[r, t]) + replaced * drawn_p
        loss = loss - torch.log(p) / len(selected)
    return loss


def read_with_h(discriminator, ids, mask, h):
    """The states, with h in place of the embedding of [CLS]."""
    hook = discriminator.embeddings.register_forward_hook(
        lambda module, inputs, out: torch.cat([h[:, None], out[:, 1:]], 1)
    )
    states = discriminator(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    hook.remove()
    return states


def reference_contrast(cfg, h, seconds, h_edited):
    loss, tau = 0.0, cfg.temperature
    for vector, edited in zip(h, h_edited):
        to_seconds, to_edits = (log_sum_exp(vector, others, tau) for others in (seconds, h_edited))
        if cfg.edit_as == "positive":
            loss = loss + to_edits - F.cosine_similarity(vector, edited, dim=0) / tau
        else:
            loss = loss + torch.logaddexp(to_seconds, to_edits) - to_seconds
    return loss / len(h)


def nasty_batch(rows: int, views: int = 2) -> Batch:
    """Rows of many lengths, also [CLS] [SEP] alone, with padding and repeated words."""
    lengths = torch.tensor([9, 4, 7, 2, 9, 5, 2, 8, 3, 3, 6, 2]).repeat(2)[:rows]
    mask = torch.arange(9) < lengths[:, None]
    x = torch.randint(6, 16, mask.shape).masked_fill(~mask, Words.pad_id)
    x[:, 0] = Words.cls_id
    x[torch.arange(rows), lengths - 1] = Words.sep_id
    selected = (torch.rand(x.shape) < 0.4) & (x > 5)
    x_masked = torch.where(selected & (torch.rand(x.shape) < 0.8), Words.mask_id, x)
    return Batch(x, mask, x_masked, selected, views)


def gradients(model, rename=lambda name: name) -> dict[str, torch.Tensor]:
    parameters = model.named_parameters()
    grads = {rename(name): p.grad for name, p in parameters if p.grad is not None}
    return {name: grad for name, grad in grads.items() if not name.startswith("pooler")}


def assert_same_gradients(got: dict, want: dict) -> None:
    assert got.keys() == want.keys() and got
    for name in want:
        g, w = got[name].clone(), want[name].clone()
        if name.endswith("embeddings.weight"):  # transformers drops that of the padding word
            g[Words.pad_id], w[Words.pad_id] = 0, 0
        assert (g - w).norm() < 1e-5 * w.norm() or (g - w).norm() < 1e-10, name


PAPER = {"edit_scope": "masked", "pads_in_loss": False, "views": "first"}
CASES = [
    {"objective": "masked"},
    {"objective": "masked", "views": "first", "condition_on": "next"},
    {"objective": "masked", "condition_on": "both"},
    {"objective": "corrected"},
    {"objective": "corrected", **PAPER},
    {"objective": "corrected", **PAPER, "condition_on": "both", "contrastive": False},
    {"edit_as": "positive"},
    {"edit_as": "positive", "projector": "tanh", **PAPER},
    {"edit_as": "positive", "condition_on": "next"},
    {"edit_as": "negative"},
    {"edit_as": "negative", "projector": "tanh", **PAPER},
    {"edit_as": "negative", "condition_on": "both", "contrastive": False},
    {"condition_on": "next"},
    {"condition_on": "both", **PAPER},
    {"condition_on": "both", "pads_in_loss": False},
    {"contrastive": False},
    {"edit_with": "insert"},
    {"edit_with": "insert", **PAPER},
    {"edit_with": "insert", "edit_as": "negative"},
    {"edit_with": "insert", "condition_on": "next"},
    {"edit_with": "delete"},
    {"edit_with": "delete", **PAPER},
    {"edit_with": "delete", "edit_as": "positive", "projector": "tanh"},
    {"edit_with": "all", "condition_on": "both", "reduction": "sum"},
    {"edit_with": "all", "views": "first"},
    {"edit_with": "all", "edit_as": "negative"},
]


def name_of(changes: dict) -> str:
    return ",".join(map(str, changes.values()))


def config(**changes) -> AblationConfig:
    defaults = {"lam": 0.5, "temperature": 0.3, "mask_ratio": 0.4, "text": "paragraphs"}
    return AblationConfig(**defaults | changes)


def needs_generator(cfg: AblationConfig) -> bool:
    return cfg.objective != "masked" and cfg.edit_with != "delete"


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("changes", CASES, ids=name_of)
def test_step_equals_one_written_on_transformers(family, changes, tmp_path, monkeypatch):
    torch.manual_seed(len(str(changes)))
    cfg = config(**changes)
    mlm, difference = cfg.objective != "replaced", cfg.edit_as == "difference"
    generators = "distilbert" if family == "bert" else family
    encoder, our_encoder = random_model(family, False, tmp_path / "f")
    discriminator, our_discriminator = random_model(family, mlm, tmp_path / "d")
    generator, our_generator = random_model(generators, True, tmp_path / "g")
    models = [our_generator if needs_generator(cfg) else None, None]
    if difference:
        models[1] = our_discriminator.bert if mlm else our_discriminator
    mlm_head = our_discriminator.head if mlm else None
    model = AblationModel(cfg, Words, our_encoder, *models, mlm_head=mlm_head).double().train()
    draws, draw = [], ablations.random_subset
    monkeypatch.setattr(
        ablations, "random_subset", lambda *a: (draws.append(draw(*a)), draws[-1])[1]
    )

    theirs = SimpleNamespace(encoder=encoder, generator=generator, discriminator=discriminator)
    theirs.projector = copy.deepcopy(model.projector)
    if difference:
        theirs.heads = copy.deepcopy(nn.ModuleDict({"replace": model.head, **model.heads}))
    if mlm:
        names = ("bert", "cls") if family == "bert" else ("roberta", "lm_head")
        theirs.discriminator, theirs.mlm_head = (getattr(discriminator, name) for name in names)

    batch = nasty_batch(6, 2) if cfg.condition_on == "same" else nasty_batch(12, 4)
    loss, metrics = model(batch)
    loss.backward()
    expected = reference_loss(cfg, theirs, batch, (drawn.tolist() for drawn in draws))
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-9)
    assert torch.allclose(metrics["loss"][0], expected, rtol=1e-9)
    assert bool(draws) == (cfg.edit_with != "replace")

    def renamed(name: str) -> str:
        return bert.hf_name(name, family, "")

    assert_same_gradients(gradients(model.encoder, renamed), gradients(encoder))
    assert_same_gradients(gradients(model.projector), gradients(theirs.projector))
    assert model.generator is None or not gradients(model.generator)
    if not difference:
        return
    assert_same_gradients(gradients(model.discriminator, renamed), gradients(theirs.discriminator))
    if mlm:
        grads = gradients(discriminator)
        head = {n: g for n, g in grads.items() if not n.startswith(f"{family}.")}
        assert_same_gradients(gradients(model.mlm_head, lambda n: renamed(f"head.{n}")), head)
    if cfg.objective != "masked":
        ours = nn.ModuleDict({"replace": model.head, **model.heads})
        assert_same_gradients(gradients(ours), gradients(theirs.heads))


# ------------------------------------------------------------------------------------------------
# Padding to a static shape, and two processes


def tiny_model(seed: int = 0, **changes) -> AblationModel:
    """Random weights, fp64, no dropout."""
    torch.manual_seed(seed)
    cfg = config(**{"lam": 0.3, "temperature": 0.1, "generator_dropout": False} | changes)
    sizes = dict(vocab_size=60, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(max_position_embeddings=24, initializer_range=0.3)
    sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    two, one = (bert.BertConfig(num_hidden_layers=n, **sizes) for n in (2, 1))
    encoder, discriminator = bert.Bert(two), bert.Bert(two)
    generator, mlm = bert.BertForMaskedLM(one), bert.BertForMaskedLM(one)
    models = [generator if needs_generator(cfg) else None]
    models.append(discriminator if cfg.edit_as == "difference" else None)
    mlm_head = mlm.head if cfg.objective != "replaced" else None
    return AblationModel(cfg, Words, encoder, *models, mlm_head=mlm_head).double().train()


@pytest.mark.parametrize("changes", CASES, ids=name_of)
def test_a_static_shape_changes_nothing(changes):
    """On a GPU, batches are padded to --max-length."""
    model = tiny_model(**changes)
    batch = nasty_batch(6, 2) if model.cfg.condition_on == "same" else nasty_batch(12, 4)
    losses = []
    for wide in (batch, batch.pad(20, Words.pad_id)):
        torch.manual_seed(5)
        losses.append(model(wide)[0])
    assert torch.allclose(*losses, rtol=1e-9)


def results_of(process: int, processes: int, folder: str) -> None:
    """Metrics and averaged gradients, of 4 sentences, of 2, and of 2 of which one has no masks."""
    torch.set_num_threads(1)
    if processes > 1:
        meet = f"file://{folder}/meet"
        dist.init_process_group("gloo", init_method=meet, rank=process, world_size=processes)
    results = {}
    for name, changes in zip(map(str, CASES), CASES):
        model = tiny_model(**changes)
        views = 2 if model.cfg.condition_on == "same" else 4
        for B, masks in ((4, True), (2, True), (2, False)):
            torch.manual_seed(B)
            batch = nasty_batch(B * views, views)
            if not masks:
                batch.selected[:views] = False
            torch.manual_seed(process)
            model.zero_grad()
            loss, metrics = model(batch.shard())
            loss.backward()
            distributed.average_gradients([p for p in model.parameters() if p.grad is not None])
            tensors = {f"gradient of {at}": grad.clone() for at, grad in gradients(model).items()}
            for metric, pair in metrics.items():
                total, count = (distributed.all_reduce_sum(torch.as_tensor(v)) for v in pair)
                tensors[metric] = total / count.clamp_min(1)
            results[name, B, masks] = tensors
    if processes > 1:
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{processes}-{process}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("processes"))
    results_of(0, 1, folder)
    method = "fork" if sys.platform == "linux" else "spawn"
    mp.start_processes(results_of, (2, folder), nprocs=2, start_method=method)
    return [torch.load(f"{folder}/{name}.pt") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("changes", CASES, ids=name_of)
def test_two_processes_compute_what_one_computes(changes, results):
    """Each draws its own insertions and deletions: with them, only the two agree."""
    one, first, second = results
    keys = [key for key in one if key[0] == str(changes)]
    assert len(keys) == 3
    for key, process in itertools.product(keys, (first, second)):
        expected = second if "edit_with" in changes else one
        assert expected[key].keys() == process[key].keys()
        assert any(at.startswith("gradient of encoder") for at in process[key])
        for at, want in expected[key].items():
            assert want.isfinite().all()
            assert (process[key][at] - want).norm() <= 1e-9 * want.norm() + 1e-12, (key, at)


# ------------------------------------------------------------------------------------------------
# The flags

SMALL = ["--config", "small", "--model", SMALL_BERT, "--generator", SMALL_BERT]


def parse(*flags: str) -> AblationConfig:
    return cli.parse(AblationConfig, diffcse.PRESETS, [*SMALL, *flags])[1]


def built(*flags: str) -> AblationModel:
    return AblationModel.from_pretrained(parse(*flags))


def parts(model: AblationModel) -> set[str]:
    names = ("generator", "discriminator", "head", "mlm_head")
    return {name for name in names if getattr(model, name, None)} | set(getattr(model, "heads", {}))


def real_batch(model: AblationModel) -> Batch:
    views = 2 if model.cfg.condition_on == "same" else 4
    batch = nasty_batch(12, views)
    ids = torch.tensor([0, *model.tokenizer.special_ids, *range(1000, 1030)])
    ids[1:6] = torch.tensor(model.tokenizer.special_ids)[[2, 0, 1, 3, 4]]  # pad, cls, sep, mask
    batch.x, batch.x_masked = ids[batch.x], ids[batch.x_masked]
    return batch


@pytest.mark.parametrize(
    "flags, expected, loaded",  # loaded: of each model that is read, whether with an MLM head
    [
        ("", "generator discriminator head", [0, 0, 1]),
        ("--no-contrastive", "generator discriminator head", [0, 0, 1]),
        ("--lam 0", "", [0]),
        ("--objective masked", "discriminator mlm_head", [0, 1]),
        ("--objective corrected", "generator discriminator head mlm_head", [0, 1, 1]),
        ("--edit-with insert", "generator discriminator insert", [0, 1, 0]),
        ("--edit-with delete", "discriminator delete", [0, 0]),
        ("--edit-with all", "generator discriminator head insert delete", [0, 1, 0]),
        ("--edit-as positive", "generator", [0, 1]),
        ("--edit-as positive --edit-with delete", "", [0]),
        ("--edit-as negative --edit-with delete", "", [0]),
        ("--edit-as negative --edit-with all", "generator", [0, 1]),
        ("--text paragraphs --condition-on next", "generator discriminator head", [0, 1, 0]),
        (
            "--text paragraphs --condition-on both --objective masked",
            "discriminator mlm_head",
            [0, 1],
        ),
    ],
)
def test_flags_load_the_models_that_they_need_and_train_them(flags, expected, loaded, monkeypatch):
    read, load, flags = [], bert.load_bert, flags.split()

    def load_bert(folder, mlm=False, dropout=None):
        read.append(mlm)
        return load(folder, mlm, dropout)

    monkeypatch.setattr(diffcse, "load_bert", load_bert)
    monkeypatch.setattr(ablations, "load_bert", load_bert)
    model, expected = built(*flags, "--dropout", "0.3"), set(expected.split())
    assert parts(model) == expected and read == loaded
    trained = [each for each in (model.encoder, model.discriminator) if each]
    assert {each.cfg.hidden_dropout_prob for each in trained} == {0.3}
    if "generator" in expected:
        with pytest.raises(UserError, match="nowhere"):
            built(*flags, "--generator", "./nowhere")
    else:
        built(*flags, "--generator", "./nowhere")
    loss, metrics = model.train()(real_batch(model))
    loss.backward()
    assert loss.isfinite() and ("difference" in metrics) == ("--lam" not in flags)
    grads = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0]
    trained = {name.removeprefix("heads.").partition(".")[0] for name in grads}
    assert trained == {"encoder", "projector"} | expected - {"generator"}
    assert model.cfg.is_ablation == (flags not in ([], ["--no-contrastive"], ["--lam", "0"]))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--condition-on next", "--text paragraphs"),
        ("--condition-on both --objective masked", "--text paragraphs"),
        ("--objective masked --edit-with insert", "--objective is masked"),
        ("--objective corrected --edit-as negative", "--objective is corrected"),
        ("--no-contrastive --lam 0", "--contrastive is False"),
        ("--edit-with insert --lam 0", "--lam is 0.0"),
        ("--objective masked --lam 0", "--lam is 0.0"),
        ("--edit-as negative --lam 0", "--lam is 0.0"),
        ("--text paragraphs --condition-on both --lam 0", "--lam is 0.0"),
        ("--objective words", "replaced, masked, corrected"),
        ("--edit-with shuffle", "replace, insert, delete, all"),
        ("--edit-as neutral", "difference, positive, negative"),
        ("--edit-wiht all", "did you mean --edit-with"),
    ],
)
def test_flags_that_exclude_each_other_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        parse(*flags.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_sentence_with_insertions_must_fit_the_models():
    for edit in ("insert", "all"):  # 0.3 of 118 words are 35.4
        with pytest.raises(UserError, match=r"--max-length is 120\b.*\b156\b.*128"):
            built("--max-length", "120", "--edit-with", edit)
    inserting = ("--edit-with", "insert", "--mask-ratio", "0.28")
    with pytest.raises(UserError, match=r"--max-length is 101\b.*\b129\b.*128"):  # 27.7
        built("--max-length", "101", *inserting)
    model = built("--max-length", "100", *inserting)  # 27.4: 128 tokens at most
    x, mask = torch.full((16, 100), 1000), torch.ones(16, 100, dtype=torch.bool)
    x[:, 0], x[:, -1] = model.tokenizer.cls_id, model.tokenizer.sep_id
    x_edited, changed, _ = insert(model, Batch(x, mask, x, mask))
    assert x_edited.shape[1] == 128 and set(changed.sum(1).tolist()) == {27, 28}
    built("--max-length", "128", "--edit-with", "delete")


@pytest.mark.parametrize("objective", ["masked", "corrected"])
def test_the_masked_language_model_is_the_pretrained_one(objective):
    pretrained = bert.load_bert(SMALL_BERT, mlm=True)
    model = built("--objective", objective)
    for ours, theirs in ((model.mlm_head, pretrained.head), (model.discriminator, pretrained.bert)):
        states = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)
        assert all(p.requires_grad for p in ours.parameters())
    words = [part.embeddings.word.weight for part in (model.discriminator, model.encoder)]
    assert words[0].data_ptr() != words[1].data_ptr()


def test_new_layers_start_alike_for_a_seed_in_every_ablation():
    def start(*flags: str, seed: int = 7) -> dict:
        torch.manual_seed(seed)
        return built(*flags).state_dict()

    plain = start()
    torch.manual_seed(7)
    core = diffcse.DiffCSEModel.from_pretrained(parse()).state_dict()
    assert core.keys() == plain.keys() and all(torch.equal(core[n], plain[n]) for n in core)
    names = [name for name in plain if name.startswith(("projector", "encoder"))]
    assert len(names) > 50
    for flags in (
        *("--objective masked", "--objective corrected", "--edit-with all", "--edit-as negative"),
        *("--text paragraphs --condition-on both", "--lam 0"),
    ):
        other = start(*flags.split())
        assert all(torch.equal(plain[name], other[name]) for name in names)
        assert torch.equal(other.get("head.weight", plain["head.weight"]), plain["head.weight"])
    assert not torch.equal(start(seed=8)["projector.0.weight"], plain["projector.0.weight"])


@pytest.mark.parametrize("use", ["positive", "negative"])
@pytest.mark.parametrize("projector", ["batchnorm", "tanh"])
def test_a_batch_of_one_sentence_has_a_finite_loss(use, projector):
    model = built("--edit-as", use, "--projector", projector).train()
    x = torch.tensor(model.tokenizer(["a man plays the guitar"] * 2, 32))
    mask = torch.ones_like(x, dtype=torch.bool)
    loss, metrics = model(Batch(x, mask, x, mask))
    loss.backward()
    assert all(torch.as_tensor(value).isfinite() for value, _ in metrics.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert use == "negative" or metrics["difference"][0] == 0


# ------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    lines = [f"The {a} man plays {b}." for a in ("old", "young") for b in ("chess", "piano", "go")]
    (folder / "text.txt").write_text("\n".join(lines))
    pairs = ["a\tb\tscore", "the cat\tthe dog\t3", "red\tblue\t1", "one two\tone two three\t5"]
    (folder / "pairs.tsv").write_text("\n".join(pairs))
    paths = ["--train-file", str(folder / "text.txt"), "--score", str(folder / "pairs.tsv")]
    return [*paths, "--steps", "4", "--batch-size", "4", "--log-every", "1"]


def log_of(folder: Path) -> list[dict]:
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    timing = ("seconds", "sentences_per_second")
    return [{name: v for name, v in row.items() if name not in timing} for row in rows]


def test_the_command_with_default_flags_computes_what_diffcse_computes(files, tmp_path):
    command = [sys.executable, "-m", "lab.ablations", *SMALL, *files, "--out-dir"]
    done = subprocess.run([*command, tmp_path / "lab"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = [*SMALL, *files, "--out-dir", str(tmp_path / "core")]
    diffcse.train(cli.parse(diffcse.Config, diffcse.PRESETS, arguments)[1])
    assert log_of(tmp_path / "lab") == log_of(tmp_path / "core")


@pytest.mark.parametrize("whose, views, columns", [("same", 2, 1), ("next", 4, 2), ("both", 4, 2)])
def test_paragraphs_are_read_with_the_next_sentences_where_they_are_needed(
    whose, views, columns, files
):
    model = built("--text", "paragraphs", "--condition-on", whose, *files)
    sentences = model.load_sentences()
    assert (len(sentences), sentences.views, sentences.columns) == (5, views, columns)


def test_a_stopped_ablation_resumes_to_the_same_end(files, tmp_path, monkeypatch, capsys):
    """Running text with next sentences, and random edits."""
    flags = [*files, "--text", "paragraphs", "--condition-on", "both", "--edit-with", "all"]
    diffcse.train(parse(*flags, "--out-dir", str(tmp_path / "whole")), "run", AblationModel)
    assert "5 sentences" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_requested", lambda run: run.step == 2)
        with pytest.raises(SystemExit):
            diffcse.train(parse(*flags, "--out-dir", str(tmp_path / "cut")), "run", AblationModel)
    resume = ["--resume", str(tmp_path / "cut")]
    with pytest.raises(UserError, match="python -m lab.ablations --resume"):
        cli.parse(diffcse.Config, diffcse.PRESETS, resume)
    cfg = cli.parse(AblationConfig, diffcse.PRESETS, resume)[1]
    diffcse.train(cfg, "run", AblationModel)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
