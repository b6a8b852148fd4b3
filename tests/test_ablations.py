"""The ablations: worked by hand, written a second time on transformers' modules, their edits beside difflib's; their flags; two ranks."""

import copy
import difflib
import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F

from test_step import Words, random_model
from test_step import their_step as step_of_the_paper

import bert
import diffcse
import ranks
from diffcse import Room, UserError
from lab import ablations

ROOT = Path(__file__).parent.parent

# ----------------------------------------------------------------------------------------------------------------
# By hand: two numbers are a vector. h is that of a sentence's first word; D's state is (0, A[word]) + h, and h itself at [CLS]

A = [0.1, 9.0, 9.0, 0.5, -0.25, 9.0, 1.0, -1.0, 0.75, -2.0, 1.5, 0.25]  # of the ids 0 to 11, of which words are those from 6
C = [(5, 5), (5, 5), (5, 5), (5, 5), (5, 5), (5, 5), (0.3, -0.4), (0.0, 2.0), (0.8, 0.6), (1.0, 0.0), (0.28, 0.96), (-0.96, 0.28)]
H0, H1 = 0.3, -0.4  # h of a sentence that begins with the word 6


class Few(Words):
    vocab_size = 12


class Table(nn.Module):
    """In an encoder's place: the words' vectors, and what it has read. At [CLS] is that of the first word, or h, which is then added everywhere."""

    cfg = SimpleNamespace(hidden_size=2, initializer_range=0.02)

    def __init__(self, vectors):
        super().__init__()
        self.embeddings, self.read = nn.Module(), []
        self.embeddings.word = nn.Embedding.from_pretrained(torch.tensor(vectors, dtype=torch.float64), freeze=False)

    def forward(self, ids, mask, cls_vector=None, tokens=None, wanted=None):
        self.read.append([row[: sum(real)] for row, real in zip(ids.tolist(), mask.tolist())])
        states = self.embeddings.word(ids)  # (R, T, 2)
        first = states[:, 1] if cls_vector is None else cls_vector
        states = torch.cat([first[:, None], states[:, 1:] + (0 if cls_vector is None else cls_vector[:, None])], 1)
        listed = tokens if wanted is None else wanted
        return states if listed is None else states.flatten(0, 1)[listed]


class Filler(nn.Module):
    """In the generator's place: these words, one after the other."""

    def __init__(self, words):
        super().__init__()
        self.words, self.read = words, []

    def fill(self, ids, mask, tokens, wanted, vocabulary, temperature):
        assert vocabulary == Few.vocab_size and len(wanted) == len(self.words)
        self.read.append([row[: sum(real)] for row, real in zip(ids.tolist(), mask.tolist())])
        return torch.tensor(self.words, dtype=torch.int64)


class TimesWords(nn.Module):
    """In the place of a masked-LM head."""

    def forward(self, states, words):
        return states @ words.T


def same(bias: bool = True) -> nn.Linear:
    """A layer that changes nothing yet."""
    linear = nn.Linear(2, 2, bias).double()
    linear.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)} if bias else {"weight": torch.eye(2)})
    return linear


def by_hand(rows, fill, masked=None, selected=None, head=None, V=2, **changes):
    """The step of these rows, two views of each sentence; by default an edit of the first view alone, and lam 1. -> model, its sums, its loss after backward."""
    cfg = diffcse.Config(**{"lam": 1.0, "views": "first", "edit_scope": "masked", "temperature": 0.5} | changes)
    width = max(map(len, rows))
    x, x_masked = (torch.tensor([row + [Words.pad] * (width - len(row)) for row in these]) for these in (rows, masked or rows))
    selected = x_masked == Words.mask if selected is None else torch.tensor(selected)
    D = Table([(0, a) for a in A]) if cfg.edit_as == "difference" else None
    model = diffcse.TrainingModel(cfg, Table(C), Few, Filler(fill) if fill is not None else None, D, lambda _: head or same())
    model.projector = same(bias=False)
    model.loss, model.sums = model(x, x != Words.pad, x_masked, selected, V)
    model.loss.backward()
    model.grads = {name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None}
    model.taught = {i for i, g in enumerate(model.grads["encoder.embeddings.word.weight"]) if any(abs(v) > 1e-12 for v in g)}  # words whose vector f learns
    return model


def softplus(s: float) -> float:
    return math.log(1 + math.exp(s))


def sigmoid(s: float) -> float:
    return 1 / (1 + math.exp(-s))


def told_apart(ids: list[int], changed: list[int], h0: float = H0, h1: float = H1) -> tuple[float, float]:
    """The loss of "changed or not" at these ids of x'', the first of which is [CLS], and how it grows with h1 (with h0 it falls)."""
    surer = [(0 if t == 0 else A[word]) + h1 - h0 for t, word in enumerate(ids)]  # of changed than of kept
    losses = [softplus(-s) if c else softplus(s) for s, c in zip(surer, changed)]
    return sum(losses) / len(ids), sum(sigmoid(s) - c for s, c in zip(surer, changed)) / len(ids)


def chances(s: float) -> list[float]:
    """Of every word where the head gives it s times its A."""
    return [math.exp(s * a) / sum(math.exp(s * b) for b in A) for a in A]


def near(got, want) -> None:
    """Equal numbers, or lists of them."""
    got = [t.item() if isinstance(t, torch.Tensor) else t for t in got] if isinstance(got, list) else got
    got, want = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (got, want))
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-14), (got, want)


def h_learns(model, grad: float, word: int = 6) -> None:
    """The gradient of that sentence's h is (-grad, grad), and reaches projector and encoder."""
    near(model.grads["encoder.embeddings.word.weight"][word], [-grad, grad])
    near(model.grads["projector.weight"], [[-grad * C[word][0], -grad * C[word][1]], [grad * C[word][0], grad * C[word][1]]])


@pytest.mark.parametrize("pads", [True, False])
def test_replaced_tokens_by_hand(pads):
    """7 became 9, and 8 was guessed: it is not replaced. The longer second view pads the first, which alone is edited."""
    model = by_hand([[2, 6, 7, 8, 3], [2, 6, 7, 8, 10, 3]], [9, 8], [[2, 6, 4, 4, 3], [2, 6, 7, 8, 4, 3]], pads_in_loss=pads)
    loss, grad = told_apart([2, 6, 9, 8, 3] + [0] * pads, [0, 0, 1, 0, 0] + [0] * pads)
    near(model.loss, loss)
    h_learns(model, grad)
    assert model.predict is diffcse.difference_prediction
    assert model.discriminator.read == [[[2, 6, 9, 8, 3]]] and model.generator.read == [[[2, 6, 4, 4, 3]]]
    assert (model.sums["share_replaced"], model.sums["share_replaced/"]) == (1, 5)
    assert (model.sums["accuracy_replaced"], model.sums["accuracy_replaced/"]) == (0, 1)  # A[9] is -2: "kept"
    assert (model.sums["accuracy_kept"], model.sums["accuracy_kept/"]) == (2, 4)  # A[6] and A[8] are above H0 - H1 = 0.7: "replaced"


def test_masked_tokens_by_hand():
    """Conditional MLM: 6 was chosen and left, 7 masked, 8 made 9 (80-10-10). D reads that, not a generator's words, and says what stood there."""
    for pads in (True, False):  # which are not masked: no difference
        model = by_hand([[2, 6, 7, 8, 10, 3], [2, 6, 3]], None, [[2, 6, 4, 9, 10, 3], [2, 6, 3]], [[0, 1, 1, 1, 0, 0], [0] * 6], TimesWords(),
                        objective="masked", pads_in_loss=pads)  # fmt: skip
        loss = grad = right = 0
        for there, truth in ((6, 6), (4, 7), (9, 8)):
            s, p = A[there] + H1, chances(A[there] + H1)
            loss += (math.log(sum(math.exp(s * a) for a in A)) - s * A[truth]) / 3
            grad += (sum(q * a for q, a in zip(p, A)) - A[truth]) / 3
            right += p.index(max(p)) == truth
        near(model.loss, loss)
        near(model.grads["encoder.embeddings.word.weight"][6], [0, grad])  # h0 says nothing of words here
        assert model.discriminator.read == [[[2, 6, 4, 9, 10, 3]]]
        assert (model.sums["accuracy_masked"], model.sums["accuracy_masked/"]) == (right, 3)


def test_corrected_tokens_by_hand():
    """Conditional corrective LM: at masked places p = p_kept [it is the same] + (1 - p_kept) p_word; p_kept learns from "replaced or not" alone."""
    head = nn.ModuleDict({"copy": same(), "words": TimesWords()})
    model = by_hand([[2, 6, 7, 8, 10, 3]] * 2, [9, 8], [[2, 6, 4, 4, 10, 3]] * 2, head=head, objective="corrected")
    detection, grad = told_apart([2, 6, 9, 8, 10, 3], [0, 0, 1, 0, 0, 0])
    words = grad_words = right = 0
    for there, truth in ((9, 7), (8, 8)):
        kept, q = 1 - sigmoid(A[there] + H1 - H0), chances(A[there] + H1)
        p = kept * (there == truth) + (1 - kept) * q[truth]
        words -= math.log(p) / 2
        grad_words -= (1 - kept) * q[truth] * (A[truth] - sum(r * a for r, a in zip(q, A))) / p / 2  # kept does not move with h
        right += q.index(max(q)) == truth
    near(model.loss, detection + words)
    near(model.grads["encoder.embeddings.word.weight"][6], [-grad, grad + grad_words])
    near(model.grads["head.copy.bias"], [-grad, grad])  # of the detection alone
    assert (model.sums["share_replaced"], model.sums["share_replaced/"], model.sums["accuracy_words"], model.sums["accuracy_words/"]) == (1, 6, right, 2)
    assert model.discriminator.read == [[[2, 6, 9, 8, 10, 3]]]


@pytest.mark.parametrize("edit,drawn,fill,edited,changed", [
    ("insert", [0, 0, 1, 0, 0, 1, 0, 0], [9, 6], [2, 6, 9, 7, 8, 6, 10, 3], [0, 0, 1, 0, 0, 1, 0, 0]),
    ("insert", [0, 1, 0, 0, 0, 0, 1, 0], [6, 10], [2, 6, 6, 7, 8, 10, 10, 3], [0, 1, 0, 0, 0, 0, 1, 0]),  # the very word beside it: it is put in all the same
    ("insert", [0, 0, 0, 1, 1, 0, 0, 0], [2, 3], [2, 6, 7, 2, 3, 8, 10, 3], [0, 0, 0, 1, 1, 0, 0, 0]),
    ("delete", [0, 0, 1, 1, 0, 0], None, [2, 6, 10, 3], [0, 0, 1, 0]),  # two gone at one place
    ("delete", [0, 0, 1, 0, 1, 0], None, [2, 6, 8, 3], [0, 0, 1, 1]),  # the last word's is seen at [SEP]
])  # fmt: skip
def test_insertion_and_deletion_by_hand(edit, drawn, fill, edited, changed, monkeypatch):
    monkeypatch.setattr(ablations, "draw", lambda among, number: torch.tensor([drawn]).bool() if number.tolist() == [2] else None)
    model = by_hand([[2, 6, 7, 8, 10, 3]] * 2, fill, [[2, 6, 4, 8, 10, 3]] * 2, head=nn.ModuleDict({edit: same()}), edit_with=edit, mask_ratio=0.5,
                    pads_in_loss=False)  # fmt: skip
    loss, grad = told_apart(edited, changed)
    near(model.loss, loss)
    h_learns(model, grad)
    assert model.discriminator.read == [[edited]]
    assert (model.sums["share_replaced"], model.sums["share_replaced/"]) == (sum(changed), len(edited))
    if edit == "insert":  # the generator sees the sentence with [MASK]s put in, none of its own words masked
        rest = iter([2, 6, 7, 8, 10, 3])
        assert model.generator.read == [[[4 if d else next(rest) for d in drawn]]]


# Cosines of the first views, which begin with 6 and 7, with the second views, 8 and 10, and with edits that begin with 9 and 11
SECONDS, EDITS = [[0.0, -0.6], [0.6, 0.96]], [[0.6, -0.8], [0.0, 0.28]]


def exp(cosine: float) -> float:
    return math.exp(cosine / 0.5)


def against_edits(edit_as: str, words: list[int], **changes):
    """Two sentences, their first words masked and made these."""
    rows = [[2, 6, 3], [2, 8, 3], [2, 7, 10, 3], [2, 10, 3]]
    return by_hand(rows, words, [[2, 4, 3], [2, 8, 3], [2, 4, 10, 3], [2, 10, 3]], edit_as=edit_as, projector="tanh", **changes)


@pytest.mark.parametrize("words", [[9, 11], [11, 9]])
def test_positive_and_negative_edits_by_hand(words):
    edits = [row if words[0] == 9 else row[::-1] for row in EDITS]
    contrastive = sum(math.log(sum(map(exp, SECONDS[i])) / exp(SECONDS[i][i])) for i in (0, 1)) / 2
    found = sum(math.log(sum(map(exp, edits[i])) / exp(edits[i][i])) for i in (0, 1)) / 2
    pushed = sum(math.log((sum(map(exp, SECONDS[i])) + sum(map(exp, edits[i]))) / sum(map(exp, SECONDS[i]))) for i in (0, 1)) / 2
    for views in ("first", "both"):  # of h there is one edit in any case: that of the first view
        model = against_edits("positive", words, views=views, lam=0.7)
        near([model.loss, model.sums["prediction"], model.sums["contrastive"]], [contrastive + 0.7 * found, found, contrastive])
        assert model.encoder.read == [[[2, 6, 3], [2, 8, 3], [2, 7, 10, 3], [2, 10, 3]], [[2, words[0], 3], [2, words[1], 10, 3]]]
        assert model.taught == {6, 7, 8, 9, 10, 11} and model.discriminator is None and not hasattr(model, "head")
        assert (model.sums["accuracy_edits"], model.sums["accuracy_edits/"]) == (2 if words[0] == 9 else 0, 2)
        model = against_edits("negative", words, views=views, lam=0.7)
        near([model.loss, model.sums["prediction"], model.sums["contrastive"]], [contrastive + 0.7 * pushed, pushed, contrastive])
        assert (model.sums["share_nearer"], model.sums["share_nearer/"]) == (1 if words[0] == 9 else 0, 2)  # 0.6 > 0, but not 0.28 > 0.96
    assert against_edits("positive", words, contrastive=False).taught == {6, 7, 9, 11}  # without second views
    assert against_edits("negative", words, contrastive=False).taught == {6, 7, 8, 9, 10, 11}


def test_without_the_contrastive_loss_the_prediction_alone_teaches_and_the_other_is_still_told():
    rows, masked = [[2, 6, 7, 3], [2, 8, 3], [2, 7, 8, 3], [2, 10, 3]], [[2, 6, 4, 3], [2, 8, 3], [2, 4, 8, 3], [2, 10, 3]]
    on, off = (by_hand(rows, [9, 10], masked, lam=0.3, contrastive=contrastive) for contrastive in (True, False))
    (loss_6, grad_6), (loss_7, grad_7) = told_apart([2, 6, 9, 3], [0, 0, 1, 0]), told_apart([2, 10, 8, 3], [0, 1, 0, 0], 0.0, 2.0)
    prediction = (loss_6 + loss_7) / 2
    contrastive = sum(math.log(sum(map(exp, SECONDS[i])) / exp(SECONDS[i][i])) for i in (0, 1)) / 2
    for model in (on, off):
        near([model.sums["contrastive"], model.sums["prediction"]], [contrastive, prediction])
    near([on.loss, on.sums["loss"], off.loss, off.sums["loss"]], [contrastive + 0.3 * prediction] * 2 + [0.3 * prediction] * 2)
    assert on.taught == {6, 7, 8, 10} and off.taught == {6, 7}  # the first views, which are edited
    for word, grad in ((6, grad_6), (7, grad_7)):
        near(off.grads["encoder.embeddings.word.weight"][word], [-0.3 * grad / 2, 0.3 * grad / 2])


def test_next_and_both_sentences_by_hand():
    """D reads the edit of the next sentence beside h of this one, and f never reads the next."""
    rows, masked = [[2, 6, 7, 3], [2, 7, 8, 10, 3]] * 2, [[2, 6, 4, 3], [2, 4, 8, 10, 3]] * 2
    own, following = told_apart([2, 6, 9, 3], [0, 0, 1, 0]), told_apart([2, 9, 8, 10, 3], [0, 1, 0, 0, 0])
    for whose, edited, (loss, grad), shares in [
        ("next", [[2, 9, 8, 10, 3]], following, (1, 5)), ("both", [[2, 6, 9, 3], [2, 9, 8, 10, 3]], [(a + b) / 2 for a, b in zip(own, following)], (2, 9)),
    ]:  # fmt: skip
        model = by_hand(rows, [9], masked, head=nn.ModuleDict({"replace": same()}), V=4, condition_on=whose, pads_in_loss=False)
        near(model.loss, loss)
        h_learns(model, grad)
        assert model.taught == {6} and model.encoder.read == [rows[::2]] and model.discriminator.read == [[row] for row in edited]
        assert (model.sums["share_replaced"], model.sums["share_replaced/"]) == shares
    q = chances(A[4] + H1)
    model = by_hand(rows, None, masked, head=TimesWords(), V=4, condition_on="next", objective="masked")
    near(model.loss, -math.log(q[7]))
    near(model.grads["encoder.embeddings.word.weight"][6], [0, sum(r * a for r, a in zip(q, A)) - A[7]])
    assert model.taught == {6}


def test_the_contrastive_loss_does_not_depend_on_the_next_sentences():
    losses = []
    for following in ([2, 8, 9, 3], [2, 10, 3]):
        rows = [[2, 6, 3], following, [2, 8, 3], following, [2, 7, 3], following, [2, 10, 3], following]
        model = by_hand(rows, [9, 10, 9, 10], [row[:1] + [4] + row[2:] if row is following else row for row in rows], views="both", V=4,
                        head=nn.ModuleDict({"replace": same()}), condition_on="next")  # fmt: skip
        losses.append((float(model.sums["contrastive"].detach()), float(model.sums["prediction"])))
    near(losses[0][0], sum(math.log(sum(map(exp, SECONDS[i])) / exp(SECONDS[i][i])) for i in (0, 1)) / 2)
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


# ----------------------------------------------------------------------------------------------------------------
# Insertion and deletion beside an alignment that knows nothing of what was drawn


def editing(ratio: float, fill) -> SimpleNamespace:
    """What insert and delete need of a model. fill: what the generator writes."""
    cfg = diffcse.Config(mask_ratio=ratio)
    return SimpleNamespace(cfg=cfg, tokenizer=Words, generator=SimpleNamespace(fill=fill))


def sentences_of(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[CLS], words that are all different, [SEP], padding."""
    mask = torch.arange(int(lengths.max()) + 2) < lengths[:, None]  # two columns of padding alone
    x = torch.stack([6 + torch.randperm(54)[: mask.shape[1]] for _ in lengths])
    x[:, 0] = Words.cls
    x[torch.arange(len(x)), lengths - 1] = Words.sep
    return x.masked_fill(~mask, Words.pad), mask


@pytest.mark.parametrize("edit", [ablations.insert, ablations.delete], ids=lambda e: e.__name__)
def test_what_is_called_changed_is_what_difflib_finds(edit):
    torch.manual_seed(1)
    changes = 0

    def fill(ids, mask, tokens, wanted, vocabulary, temperature):
        assert torch.equal(tokens, bert.places(mask)) and torch.equal(wanted, bert.places(ids == Words.mask)) and vocabulary == Words.vocab_size
        return torch.randint(60, 99, wanted.shape)  # words that no sentence has: else the alignment would not be unique

    for ratio in [0.0, 0.9, *torch.rand(38).mul(0.9).tolist()]:
        lengths = torch.cat([torch.tensor([2, 3]), torch.randint(2, 41, (23,))])
        x, mask = sentences_of(lengths)
        before = x.clone()
        x_edited, changed, mask_edited = edit(editing(ratio, fill), x, mask, x, mask, Room())
        assert torch.equal(x, before) and x_edited.shape == changed.shape == mask_edited.shape
        assert changed.dtype == mask_edited.dtype == torch.bool and x_edited.dtype == torch.int64
        assert not (x_edited[~mask_edited].any() or changed[~mask_edited].any())  # padding: id 0, not changed
        for row in range(len(x)):
            n = int(mask_edited[row].sum())
            a, b, labels = x[row, : lengths[row]].tolist(), x_edited[row, :n].tolist(), changed[row, :n].tolist()
            assert mask_edited[row, :n].all() and (b[0], b[-1]) == (Words.cls, Words.sep) and 0 not in b
            assert math.floor(ratio * (len(a) - 2)) <= abs(n - len(a)) <= math.ceil(ratio * (len(a) - 2))
            expected = [False] * n
            for what, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
                assert what in ("equal", edit.__name__)
                if what == "insert":
                    expected[b1:b2] = [True] * (b2 - b1)
                elif what == "delete":
                    expected[b1] = True
                    assert a2 > a1
            assert labels == expected
            changes += n != len(a)
    assert changes > 700


def drawn_at(edit, ratio: float, n: int, rows: int = 20_000) -> torch.Tensor:
    """Which of n words are deleted, or which places between [CLS] and [SEP] hold inserted ones (n and what is inserted). Shapes: (rows, places) bool."""
    x = torch.cat([torch.tensor([Words.cls]), 6 + torch.arange(n), torch.tensor([Words.sep])]).repeat(rows, 1)
    model = editing(ratio, lambda ids, mask, tokens, wanted, vocabulary, temperature: torch.full(wanted.shape, 77))
    x_edited, changed, _ = edit(model, x, x > 0, x, x > 0, Room())
    if edit is ablations.insert:
        return changed[:, 1:-1]
    return torch.stack([(x_edited != word).all(1) for word in range(6, 6 + n)], 1)


@pytest.mark.parametrize("edit", [ablations.insert, ablations.delete], ids=lambda e: e.__name__)
def test_mask_ratio_of_the_tokens_in_the_mean_and_each_place_equally_often(edit):
    torch.manual_seed(2)
    for ratio, n in ((0.3, 7), (0.15, 5), (0.5, 4), (0.9, 1)):
        drawn = drawn_at(edit, ratio, n)
        numbers = drawn.sum(1)
        assert set(numbers.tolist()) == {math.floor(ratio * n), math.ceil(ratio * n)}
        assert abs(float(numbers.double().mean()) / n - ratio) < 5 * 0.5 / n / math.sqrt(len(drawn))  # numbers differ by one: deviation 0.5 at most
        for number in set(numbers.tolist()):
            rows = drawn[numbers == number]
            among = n if edit is ablations.delete else n + number
            often = rows[:, :among].double().mean(0)
            assert (often - number / among).abs().max() < 5 * 0.5 / math.sqrt(len(rows))
    patterns = drawn_at(edit, 0.5, 4) if edit is ablations.delete else drawn_at(edit, 1.0, 2)  # two of four: six ways
    ways = [float((patterns[:, i] & patterns[:, j]).double().mean()) for i, j in itertools.combinations(range(4), 2)]
    assert max(abs(way - 1 / 6) for way in ways) < 5 * 0.4 / math.sqrt(len(patterns))


def test_the_next_number_above_or_below_and_no_other():
    torch.manual_seed(3)
    of = torch.arange(40).repeat(500)
    for share in (0.0, 0.15, 0.3, 0.5, 0.9):
        number = ablations.how_many(of, share)
        exact = share * of.double()
        assert ((number - exact).abs() < 1).all() and abs(float((number - exact).mean())) < 5 * 0.5 / math.sqrt(len(of))


# ----------------------------------------------------------------------------------------------------------------
# The whole step, written a second time on transformers' modules


def their_edit(edit: str, cfg, generator, x: list, x_masked: list, selected: list, drawn: list | None) -> tuple[list, list]:
    """x'' of one sentence without padding, and which of its tokens are changed. drawn: which places of x'' are put in, or which of x are taken out."""

    def best(ids: list) -> list:
        with torch.no_grad():
            return generator(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()

    if edit == "delete":
        kept = [t for t in range(len(x)) if not drawn[t]]
        return [x[t] for t in kept], [t > 0 and drawn[t - 1] for t in kept]
    if edit == "insert":
        drawn, rest = drawn[: len(x) + sum(drawn)], iter(x)
        with_masks = [Words.mask if new else next(rest) for new in drawn]
        return [word if new else old for new, old, word in zip(drawn, with_masks, best(with_masks))], drawn
    words = [x[t] if t == 0 or cfg.edit_scope == "masked" and not selected[t] else word for t, word in enumerate(best(x_masked))]
    return words, [a != b for a, b in zip(words, x)]


def their_ablation(cfg, theirs, x, mask, x_masked, selected, draws):
    """Written from the paper and the docstrings. draws: what the code drew, in its order. Returns the loss."""
    texts = 1 if cfg.condition_on == "same" else 2
    own, own_mask = x[::texts], mask[::texts]
    h = theirs.projector(theirs.encoder(input_ids=own, attention_mask=own_mask.long()).last_hidden_state[:, 0])
    contrastive = step_of_the_paper(replace(cfg, lam=0.0), 2, theirs.encoder, theirs.projector, None, None, None, own, own_mask, None, None)
    losses, every = [], 2 if cfg.views == "first" or cfg.edit_as != "difference" else 1
    for edit in ["replace", "insert", "delete"] if cfg.edit_with == "all" else [cfg.edit_with]:
        for text in {"same": [0], "next": [1], "both": [0, 1]}[cfg.condition_on]:
            rows = [i * texts + text for i in range(0, len(own), every)]
            told = h[::every]
            if cfg.objective == "masked":
                ids, real, changed = x_masked[rows], mask[rows], None
            else:
                drawn = next(draws) if edit != "replace" else None
                edits = [their_edit(edit, cfg, theirs.generator, *(t[r, mask[r]].tolist() for t in (x, x_masked, selected)), drawn and drawn[i])
                         for i, r in enumerate(rows)]  # fmt: skip
                width = max(len(words) for words, _ in edits) if edit == "insert" else x.shape[1]
                ids = torch.tensor([words + [0] * (width - len(words)) for words, _ in edits])
                changed = [c + [False] * (width - len(c)) for _, c in edits]
                real = torch.tensor([[t < len(words) for t in range(width)] for words, _ in edits])
            if cfg.edit_as != "difference":
                h_edited = theirs.projector(theirs.encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state[:, 0])
                loss = 0.0
                for i in range(len(rows)):
                    seconds, near = (sum(torch.exp(F.cosine_similarity(told[i], other, dim=0) / cfg.temperature) for other in others)
                                     for others in (h[1::2], h_edited))  # fmt: skip
                    if cfg.edit_as == "positive":
                        loss = loss + torch.log(near) - F.cosine_similarity(told[i], h_edited[i], dim=0) / cfg.temperature
                    else:
                        loss = loss + torch.log(seconds + near) - torch.log(seconds)
                losses.append(loss / len(rows))
                continue
            D = theirs.discriminator
            hook = D.embeddings.register_forward_hook(lambda m, i, out, told=told: torch.cat([told[:, None], out[:, 1:]], 1))
            states = D(input_ids=ids, attention_mask=real.long()).last_hidden_state
            hook.remove()
            at_masks = [(i, r, t) for i, r in enumerate(rows) for t in range(x.shape[1]) if selected[r, t]]
            if cfg.objective == "masked":
                losses.append(sum(F.cross_entropy(theirs.words(states[i, t]), x[r, t]) for i, r, t in at_masks) / len(at_masks))
                continue
            logits = theirs.head["copy" if cfg.objective == "corrected" else edit](states)
            terms = [F.cross_entropy(logits[i, t], torch.tensor(int(changed[i][t]))) for i in range(len(rows)) for t in range(ids.shape[1])
                     if real[i, t] or cfg.pads_in_loss]  # fmt: skip
            loss = sum(terms) / (len(terms) if cfg.reduction == "mean" else 1)
            for i, r, t in at_masks if cfg.objective == "corrected" else []:
                kept, not_kept = logits[i, t].detach().softmax(0)
                p = kept * (ids[i, t] == x[r, t]) + not_kept * theirs.words(states[i, t]).softmax(0)[x[r, t]]
                loss = loss - torch.log(p) / len(at_masks)
            losses.append(loss)
    return cfg.contrastive * contrastive + cfg.lam * sum(losses) / len(losses)


def nasty_batch(rows: int) -> tuple[torch.Tensor, ...]:
    """Rows of all lengths, of [CLS] [SEP] alone too, with padding and words that come again."""
    lengths = torch.tensor([9, 4, 7, 2, 9, 5, 2, 8, 3, 3, 6, 2]).repeat(2)[:rows]
    mask = torch.arange(9) < lengths[:, None]
    x = torch.randint(6, 16, mask.shape).masked_fill(~mask, Words.pad)
    x[:, 0] = Words.cls
    x[torch.arange(rows), lengths - 1] = Words.sep
    selected = (torch.rand(x.shape) < 0.4) & (x > 5)
    x_masked = torch.where(selected & (torch.rand(x.shape) < 0.8), Words.mask, x)  # some are chosen and left
    return x, mask, x_masked, selected


def gradients(model, names: dict[str, str] | None = None) -> dict[str, torch.Tensor]:
    """Those that there are; under Hugging Face's names where their table is given."""
    return {bert._their_name(n, names) if names else n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.startswith("pooler")}


def assert_alike(got: dict, want: dict) -> None:
    assert got.keys() == want.keys() and got
    for name in want:
        g, w = got[name].clone(), want[name].clone()
        if name.endswith("embeddings.weight"):  # transformers drops the gradient of the padding word's row
            g[Words.pad], w[Words.pad] = 0, 0
        assert (g - w).norm() < 1e-5 * w.norm() or (g - w).norm() < 1e-10, name


PAPER = {"edit_scope": "masked", "pads_in_loss": False, "views": "first"}


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("changes", [
    {"objective": "masked"}, {"objective": "masked", "views": "first", "condition_on": "next"}, {"objective": "masked", "condition_on": "both"},
    {"objective": "corrected"}, {"objective": "corrected", **PAPER}, {"objective": "corrected", **PAPER, "condition_on": "both", "contrastive": False},
    {"edit_as": "positive"}, {"edit_as": "positive", "projector": "tanh", **PAPER}, {"edit_as": "positive", "condition_on": "next"},
    {"edit_as": "negative"}, {"edit_as": "negative", "projector": "tanh", **PAPER}, {"edit_as": "negative", "condition_on": "both", "contrastive": False},
    {"condition_on": "next"}, {"condition_on": "both", **PAPER}, {"condition_on": "both", "pads_in_loss": False}, {"contrastive": False},
    {"edit_with": "insert"}, {"edit_with": "insert", **PAPER}, {"edit_with": "insert", "edit_as": "negative"}, {"edit_with": "insert", "condition_on": "next"},
    {"edit_with": "delete"}, {"edit_with": "delete", **PAPER}, {"edit_with": "delete", "edit_as": "positive", "projector": "tanh"},
    {"edit_with": "all", "condition_on": "both", "reduction": "sum"}, {"edit_with": "all", "views": "first"}, {"edit_with": "all", "edit_as": "negative"},
], ids=lambda c: ",".join(str(v) for v in c.values()))  # fmt: skip
def test_step_equals_one_written_on_transformers(family, changes, tmp_path, monkeypatch):
    torch.manual_seed(len(str(changes)))
    cfg = diffcse.Config(**{"lam": 0.5, "temperature": 0.3, "mask_ratio": 0.4} | changes)
    mlm = cfg.objective != "replaced"
    encoder, our_encoder = random_model(family, False, tmp_path, "f")
    discriminator, _ = random_model(family, mlm, tmp_path, "d")
    generator, our_generator = random_model("distilbert" if family == "bert" else family, True, tmp_path, "g")
    ours = diffcse.TrainingModel(cfg, our_encoder, Words, our_generator if cfg.generates() else None,
                                 *(ablations.discriminator(cfg, tmp_path / "d") if cfg.ablated() else [bert.load_bert(tmp_path / "d")]))  # fmt: skip
    ours.double().train()
    draws, draw = [], ablations.draw
    monkeypatch.setattr(ablations, "draw", lambda *a: (draws.append(draw(*a)), draws[-1])[1])
    head = copy.deepcopy(getattr(ours, "head", None))  # the parts that are not transformers'
    theirs = SimpleNamespace(encoder=encoder, projector=copy.deepcopy(ours.projector), generator=generator, discriminator=discriminator,
                             head={"replace": head} if isinstance(head, nn.Linear) else head)  # fmt: skip
    if mlm:
        theirs.discriminator, theirs.words = (discriminator.bert, discriminator.cls) if family == "bert" else (discriminator.roberta, discriminator.lm_head)

    batch = nasty_batch(6 if cfg.condition_on == "same" else 12)
    loss, sums = ours(*batch, V=2 if cfg.condition_on == "same" else 4)
    loss.backward()
    expected = their_ablation(cfg, theirs, *batch, (drawn.tolist() for drawn in draws))
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-9) and torch.allclose(sums["loss"], expected, rtol=1e-9)
    assert bool(draws) == (cfg.edit_with != "replace")

    names = bert.FAMILIES[family]
    assert_alike(gradients(ours.encoder, names.encoder), gradients(encoder))
    assert_alike(gradients(ours.projector), gradients(theirs.projector))
    assert not gradients(ours.generator) if cfg.generates() else ours.generator is None
    if cfg.edit_as != "difference":
        assert ours.discriminator is None and head is None
        return
    assert_alike(gradients(ours.discriminator, names.encoder), gradients(theirs.discriminator))
    if mlm:
        words = ours.head if cfg.objective == "masked" else ours.head["words"]
        assert_alike(gradients(words, names.head), {n: g for n, g in gradients(discriminator).items() if not n.startswith(names.prefix)})
    if cfg.objective == "corrected":
        assert_alike(gradients(ours.head["copy"]), gradients(head["copy"]))
    if cfg.objective == "replaced":
        assert_alike(gradients(ours.head), gradients(head))


def test_nothing_masked_is_no_loss_and_no_gradient_but_zero():
    for objective, head in (("masked", TimesWords()), ("corrected", nn.ModuleDict({"copy": same(), "words": TimesWords()}))):
        model = by_hand([[2, 6, 7, 3]] * 2, [] if objective == "corrected" else None, head=head, objective=objective)
        near(model.loss, 0 if objective == "masked" else told_apart([2, 6, 7, 3], [0] * 4)[0])
        assert all(math.isfinite(v) for v in model.grads["encoder.embeddings.word.weight"][6])


# ----------------------------------------------------------------------------------------------------------------
# What they are in terms of each other


def tiny_model(seed: int = 0, **changes) -> diffcse.TrainingModel:
    """A model of random weights in fp64, without dropout, with all the heads that the config asks for."""
    torch.manual_seed(seed)
    cfg = diffcse.Config(**{"lam": 0.3, "dropout": 0.0, "generator_dropout": False, "temperature": 0.1, "mask_ratio": 0.4} | changes)
    sizes = dict(vocab_size=60, hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=24, initializer_range=0.3)
    f, d = (bert.Bert(bert.BertConfig(num_hidden_layers=2, **sizes)) for _ in range(2))
    g, words = (bert.BertForMaskedLM(bert.BertConfig(num_hidden_layers=1, **sizes)) for _ in range(2))
    heads = {"masked": lambda D: words.head, "corrected": lambda D: nn.ModuleDict({"copy": nn.Linear(D, 2), "words": words.head}),
             "replaced": lambda D: nn.ModuleDict({edit.__name__: nn.Linear(D, 2) for edit in ablations.EDITS[cfg.edit_with]})}  # fmt: skip
    g, d = g if cfg.generates() else None, d if cfg.edit_as == "difference" else None
    return diffcse.TrainingModel(cfg, f, Words, g, d, heads[cfg.objective] if cfg.ablated() else None).double().train()


@pytest.mark.parametrize("projector", ["tanh", "batchnorm"])
@pytest.mark.parametrize("edit", ["replace", "insert", "delete"])
def test_edits_are_third_views_as_negatives_and_second_views_as_positives(projector, edit):
    for edit_as in ("negative", "positive"):
        model = tiny_model(lam=1.0, edit_as=edit_as, edit_with=edit, projector=projector, pads_in_loss=False)
        batch = nasty_batch(12)
        torch.manual_seed(5)
        x_edited, _, mask_edited = getattr(ablations, edit)(model, *(t[::2] for t in batch), Room())
        h, h_edited = (model.projector(model.encoder(ids, mask)[:, 0]) for ids, mask in (batch[:2], (x_edited, mask_edited)))  # each its own pass
        first, second = h[::2], h[1::2]
        if edit_as == "negative":
            expected = diffcse.contrastive_loss(torch.stack([first, second, h_edited], 1), 0.1)[0]
        else:
            expected = sum(diffcse.contrastive_loss(torch.stack([first, other], 1), 0.1)[0] for other in (second, h_edited))
        expected.backward()
        want = gradients(model)
        model.zero_grad()
        torch.manual_seed(5)
        loss, _ = model(*batch)
        loss.backward()
        assert torch.allclose(loss, expected, rtol=1e-9)
        assert_alike(gradients(model), want)


def test_all_is_the_mean_of_three_losses_each_with_its_head():
    model = tiny_model(edit_with="all")
    batch, h = nasty_batch(6), torch.randn(6, 16, dtype=torch.float64)
    torch.manual_seed(5)
    loss, shares = model.predict(model, h, batch, 2, Room())
    loss.backward()
    want = {name: grad.clone() for name, grad in gradients(model.head).items()}
    torch.manual_seed(5)
    edits = [edit(model, *batch, Room()) for edit in (ablations.replace, ablations.insert, ablations.delete)]
    model.zero_grad()
    ones = [diffcse.discriminate(model, model.head[name], h, *edit, Room()) for name, edit in zip(("replace", "insert", "delete"), edits)]
    mean = sum(one for one, _ in ones) / 3
    mean.backward()
    assert len({round(float(one.detach()), 6) for one, _ in ones}) == 3 and torch.allclose(loss, mean, rtol=1e-9)
    assert_alike(gradients(model.head), want)
    assert len(want) == 6 and all(grad.norm() > 0 for grad in want.values())
    for name, share in shares.items():
        assert share == (sum(one[name][0] for _, one in ones), sum(one[name][1] for _, one in ones))
    assert int(shares["share_replaced"][1]) == sum(int(mask.sum()) for _, _, mask in edits)


@pytest.mark.parametrize("changes", [{}, {"objective": "masked"}, {"objective": "corrected"}, {"edit_as": "negative"}], ids=str)
def test_both_is_the_mean_of_two_losses_and_the_log_has_the_ratio_of_sums(changes):
    both, following, own = (tiny_model(condition_on=whose, **changes) for whose in ("both", "next", "same"))
    following.load_state_dict(both.state_dict())
    own.load_state_dict({name if changes else name.replace("head.replace.", "head."): value for name, value in both.state_dict().items()})
    batch = nasty_batch(12)
    (_, sums), (_, one), (_, other) = both(*batch, V=4), own(*(t[::2] for t in batch), V=2), following(*batch, V=4)
    assert torch.allclose(sums["prediction"], (one["prediction"] + other["prediction"]) / 2, rtol=1e-9) and one["prediction"] != other["prediction"]
    assert torch.equal(sums["contrastive"], one["contrastive"]) and torch.equal(sums["contrastive"], other["contrastive"])
    counts = [name for name in sums if name.startswith(("share", "accuracy"))]
    assert counts and all(sums[name] == one[name] + other[name] for name in counts)
    row = diffcse.summarise([sums, other])
    for name in counts[::2]:
        above, below = (float(sums[n] + other[n]) for n in (name, name + diffcse.OF))
        assert row[name] == pytest.approx(above / below, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------
# The flags

SMALL = ["--config", "small", "--model", str(ROOT / "assets" / "small-bert"), "--generator", str(ROOT / "assets" / "small-bert")]


def built(*flags: str) -> diffcse.TrainingModel:
    return diffcse.build(diffcse.parse_args([*SMALL, *flags])[1])[0]


def parts(model) -> list[str]:
    return [type(part).__name__ for part in (model.generator, model.discriminator, getattr(model, "head", None))]


@pytest.mark.parametrize("flags,expected", [
    ("", "BertForMaskedLM Bert Linear"), ("--no-contrastive", "BertForMaskedLM Bert Linear"), ("--objective masked", "NoneType Bert MLMHead"),
    ("--objective corrected", "BertForMaskedLM Bert ModuleDict copy words"), ("--edit-with insert", "BertForMaskedLM Bert ModuleDict insert"),
    ("--edit-with delete", "NoneType Bert ModuleDict delete"), ("--edit-with all", "BertForMaskedLM Bert ModuleDict replace insert delete"),
    ("--edit-as positive", "BertForMaskedLM NoneType NoneType"), ("--edit-as negative --edit-with delete", "NoneType NoneType NoneType"),
    ("--edit-as negative --edit-with all", "BertForMaskedLM NoneType NoneType"),
    ("--text paragraphs --condition-on next", "BertForMaskedLM Bert ModuleDict replace"), ("--lam 0", "NoneType NoneType NoneType"),
    ("--text paragraphs --condition-on both --objective masked", "NoneType Bert MLMHead"),
])  # fmt: skip
def test_flags_build_what_they_need_and_train_it(flags, expected):
    model = built(*flags.split())
    assert parts(model) + (list(model.head) if isinstance(getattr(model, "head", None), nn.ModuleDict) else []) == expected.split()
    batch = nasty_batch(12)
    for ids in (batch[0], batch[2]):
        ids[ids == 1], ids[ids == 2], ids[ids == 3], ids[ids == 4] = 0, model.tokenizer.cls, model.tokenizer.sep, model.tokenizer.mask
    loss, sums = model.train()(*batch, V=2 * model.texts)
    loss.backward()
    assert loss.isfinite() and ("prediction" in sums) == ("--lam 0" not in flags)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    assert trained == {"encoder", "projector"} | {part for part in ("discriminator", "head") if getattr(model, part, None) is not None}
    if "all" in flags.split() and "ModuleDict" in expected:
        assert all(head.weight.grad.norm() > 0 for head in model.head.values())
    assert model.cfg.ablated() == (flags not in ("", "--no-contrastive", "--lam 0")) and (model.predict is diffcse.difference_prediction) != model.cfg.ablated()


@pytest.mark.parametrize("flags,told", [
    ("--condition-on next", "--text paragraphs"), ("--condition-on both --objective masked", "--text paragraphs"),
    ("--objective masked --edit-with insert", "--objective is masked"), ("--objective corrected --edit-as negative", "--objective is corrected"),
    ("--no-contrastive --lam 0", "--contrastive is False"), ("--contrastive off --lam 0", "--contrastive is False"),
    ("--edit-with insert --lam 0", "--lam is 0.0"), ("--objective masked --lam 0", "--lam is 0.0"), ("--edit-as negative --lam 0", "--lam is 0.0"),
    ("--text paragraphs --condition-on both --lam 0", "--lam is 0.0"),
    ("--text paragraphs --train-file docs", "--text is paragraphs"), ("--objective words", "replaced, masked, corrected"),
    ("--edit-with shuffle", "replace, insert, delete, all"), ("--edit-as neutral", "difference, positive, negative"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(flags, told):
    with pytest.raises(UserError) as refused:
        diffcse.parse_args([*SMALL, *flags.split()])
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_sentence_with_what_is_put_in_must_fit_the_model():
    for edit in ("insert", "all"):
        with pytest.raises(UserError, match=r"--max-length is 120\b.*\b156\b.*128"):  # 0.3 of 118 words are 35.4
            built("--max-length", "120", "--edit-with", edit)
    with pytest.raises(UserError, match=r"--max-length is 101\b.*\b129\b.*128"):  # 0.28 of 99 are 27.7
        built("--max-length", "101", "--edit-with", "insert", "--mask-ratio", "0.28")
    model = built("--max-length", "100", "--edit-with", "insert", "--mask-ratio", "0.28")  # 27.4: 128 tokens at most
    x = torch.full((16, 100), 1000)
    x[:, 0], x[:, -1], real = model.tokenizer.cls, model.tokenizer.sep, torch.ones(16, 100, dtype=torch.bool)
    x_edited, changed, _ = ablations.insert(model, x, real, x, real, Room())
    assert x_edited.shape[1] == 128 and set(changed.sum(1).tolist()) == {27, 28}
    built("--max-length", "128", "--edit-with", "delete")


def test_a_generator_is_looked_for_only_where_one_writes(tmp_path):
    nowhere = ["--generator", str(tmp_path / "nowhere")]
    for flags in ("--objective masked", "--edit-with delete", "--edit-with delete --edit-as positive", "--lam 0"):
        assert built(*nowhere, *flags.split()).generator is None
    for flags in ("", "--objective corrected", "--edit-with insert", "--edit-with all", "--edit-as negative"):
        with pytest.raises(UserError, match="nowhere"):
            built(*nowhere, *flags.split())


def test_no_discriminator_is_read_where_edits_are_compared_with_sentences(monkeypatch):
    read, load = [], bert.load_bert
    for module in (diffcse, ablations):
        monkeypatch.setattr(module, "load_bert", lambda folder, mlm=False: (read.append(mlm), load(folder, mlm))[1])
    for flags, models in (("", [0, 1, 0]), ("--edit-as positive", [0, 1]), ("--edit-as negative --edit-with delete", [0]), ("--objective masked", [0, 1]),
                          ("--edit-with all", [0, 1, 0]), ("--objective corrected", [0, 1, 1])):  # fmt: skip
        read.clear()
        built(*flags.split())
        assert read == models  # encoder, generator, discriminator: with a masked-LM head?


def test_the_masked_language_model_is_the_pretrained_one():
    pretrained = bert.load_bert(ROOT / "assets" / "small-bert", mlm=True)
    for objective in ("masked", "corrected"):
        model = built("--objective", objective)
        head = model.head if objective == "masked" else model.head["words"]
        for ours, theirs in ((head, pretrained.head), (model.discriminator, pretrained.bert)):
            assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
            assert all(p.requires_grad for p in ours.parameters())
        assert model.discriminator is not model.encoder and model.discriminator.embeddings.word.weight is not model.encoder.embeddings.word.weight


def test_without_these_flags_their_code_is_not_imported():
    code = """
import sys, torch, diffcse
for flags in [], ["--no-contrastive"], ["--lam", "0"], ["--edit-with", "delete"]:
    model, _ = diffcse.build(diffcse.parse_args(sys.argv[1:] + flags)[1])
    x = torch.full((4, 5), 9)
    model(x, x > 0, x, x > 0)[0].backward()
    print("lab.ablations" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, *SMALL], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False", "False", "False", "True"], done.stderr


def test_the_projector_starts_alike_for_a_seed_whatever_else_is_trained():
    def start(*flags: str) -> dict:
        torch.manual_seed(7)
        return built(*flags).state_dict()

    plain = start()
    for flags in ("--objective masked", "--objective corrected", "--edit-with all", "--edit-as negative", "--text paragraphs --condition-on both", "--lam 0"):
        other = start(*flags.split())
        names = [name for name in plain if name.startswith(("projector", "encoder"))]
        assert len(names) > 50 and all(torch.equal(plain[name], other[name]) for name in names)
        for head in ("head.replace", "head.copy"):
            assert head + ".weight" not in other or torch.equal(other[head + ".weight"], plain["head.weight"])
    torch.manual_seed(8)
    assert not torch.equal(built().projector[0].weight, plain["projector.0.weight"])


# ----------------------------------------------------------------------------------------------------------------
# Two ranks

COMPARED = {
    "masked": {"objective": "masked"}, "corrected": {"objective": "corrected", "pads_in_loss": False}, "both": {"condition_on": "both", "views": "first"},
    "masked-both": {"objective": "masked", "condition_on": "both"}, "positive": {"edit_as": "positive", "projector": "tanh"},
    "negative": {"edit_as": "negative", "projector": "tanh"}, "positive-batchnorm": {"edit_as": "positive"}, "negative-batchnorm": {"edit_as": "negative"},
    "alone": {"objective": "corrected", "contrastive": False, "condition_on": "next"}, "negative-both": {"edit_as": "negative", "condition_on": "both"},
}  # fmt: skip
DRAWN = {"insert": {"edit_with": "insert"}, "all": {"edit_with": "all"}, "deletions": {"edit_with": "delete", "edit_as": "negative", "projector": "tanh"}}


def on_ranks(rank: int, world: int, folder: str) -> None:
    """Losses and gradients of batches of few sentences: one sentence leaves the first of two ranks without any. BatchNorm of edits wants two."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = {}
    for name, changes in (COMPARED | DRAWN).items():
        model = tiny_model(**changes)
        V = 2 * model.texts
        for n in (4, 2 if model.cfg.edit_as != "difference" and model.cfg.projector == "batchnorm" else 1, 3):
            torch.manual_seed(n)
            batch = nasty_batch(n * V)
            torch.manual_seed(rank)
            model.zero_grad()
            loss, sums = model(*(t[ranks.part(n, V)] for t in batch), V, Room(sentences=n))
            loss.backward()
            grads = gradients(model)
            ranks.add_up(list(grads.values()))
            results[name, n] = {**sums, **{f"gradient of {at}": grad.clone() for at, grad in grads.items()}}
    if world > 1:
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{world}-{rank}.pt")


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(0, 1, str(folder))
    mp.start_processes(on_ranks, (2, str(folder)), nprocs=2, start_method="fork" if sys.platform == "linux" else "spawn")
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("name", COMPARED)
def test_two_ranks_give_what_one_gives(name, of_ranks):
    one, *two = of_ranks
    batches = [key for key in one if key[0] == name]
    assert len(batches) == 3 and all(any(at.startswith("gradient of") for at in one[key]) for key in batches)
    for key, rank in itertools.product(batches, two):
        assert one[key].keys() == rank[key].keys()
        for at, want in one[key].items():
            assert (rank[key][at] - want).norm() <= 1e-9 * want.norm() + 1e-12, (key, at)


@pytest.mark.parametrize("name", DRAWN)
def test_ranks_draw_their_own_edits_and_have_one_gradient(name, of_ranks):
    one, first, second = of_ranks
    for key in (key for key in one if key[0] == name):
        assert one[key].keys() == first[key].keys() == second[key].keys()
        assert all(torch.equal(first[key][at], second[key][at]) and value.isfinite().all() for at, value in first[key].items())


# ----------------------------------------------------------------------------------------------------------------
# At the edges


@pytest.mark.parametrize("use", ["positive", "negative"])
@pytest.mark.parametrize("projector", ["batchnorm", "tanh"])
def test_a_last_batch_of_one_sentence_has_a_finite_loss(use, projector):
    cfg = diffcse.parse_args(["--config", "small", "--edit-as", use, "--projector", projector])[1]
    model, tokenizer = diffcse.build(cfg)
    x = torch.tensor(tokenizer(["a man plays the guitar"] * 2, 32))
    mask = torch.ones_like(x, dtype=torch.bool)
    loss, sums = model.train()(x, mask, x, mask)
    loss.backward()
    assert all(value.isfinite() for value in sums.values()) and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert use == "negative" or sums["prediction"] == 0


def test_no_more_is_put_in_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, device=None: torch.full(shape, 1 - 2**-24))
    of, share = torch.arange(2000), torch.linspace(0, 1, 41).tolist()
    for ratio in share:
        assert ablations.how_many(of, ratio).tolist() == [math.ceil(ratio * n) for n in of.tolist()]


def test_an_installed_package_without_the_ablations_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lab", None)
    monkeypatch.delitem(sys.modules, "lab.ablations", raising=False)
    with pytest.raises(UserError, match="lab/ablations.py is beside diffcse.py in the repository; an installed package has it not"):
        diffcse.build(diffcse.parse_args(["--config", "small", "--edit-with", "insert"])[1])
