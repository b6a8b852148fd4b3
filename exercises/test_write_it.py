"""Checks of write_it.py: pytest exercises -k ex03. Each fails with what is wrong, in the exercise's own words."""

import ast
import inspect
import json
import math
import struct
import textwrap

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bert import Bert, BertConfig, Grid, write_safetensors


def fail(message: str):
    pytest.fail(message, pytrace=False)


def compare(got, expected, what: str, mistakes: dict[str, object] | None = None, tolerance: float = 1e-5) -> None:
    """Fails where got is not expected: with the known mistakes whose value it is, else with where they differ most."""
    if not isinstance(got, (Tensor, np.ndarray, np.generic, float, int)):
        fail(f"{what}: it returned {'nothing (is a return missing?)' if got is None else f'a {type(got).__name__}'}")
    found, wanted = doubles(got), doubles(expected)
    if alike(found, wanted, tolerance):
        return
    if known := [message for message, value in (mistakes or {}).items() if alike(found, value, tolerance)]:
        fail(f"{what}: " + "; or ".join(known))
    if found.shape != wanted.shape:
        fail(f"{what}: the shape is {tuple(found.shape)} where {tuple(wanted.shape)} is expected")
    if not found.isfinite().all():
        fail(f"{what}: {int((~found.isfinite()).sum())} of {found.numel()} numbers are NaN or infinite")
    difference = (found - wanted).abs()
    place = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape)) if difference.ndim else ()
    digits = 6 if f"{found[place].item():.6g}" != f"{wanted[place].item():.6g}" else 12  # float32 where float64 came in
    fail(f"{what}: {found[place].item():.{digits}g}{f' at {list(place)}' if place else ''} where {wanted[place].item():.{digits}g} is expected")


def compare_cases(function, cases: dict[str, tuple], tolerance: float = 1e-5) -> None:
    """compare() for each case, {what: (inputs by name, expected, mistakes)}; of several mistakes those are named that explain all cases.

    The inputs must stay what they are.
    """
    answers, known = {}, None
    for what, (inputs, _, mistakes) in cases.items():
        try:
            with Untouched(**{name: value for name, value in inputs.items() if isinstance(value, (Tensor, np.ndarray))}):
                answers[what] = function(*inputs.values())
        except Exception:
            if not answers:
                raise
            break  # what it says of those before comes first
        explain = {message for message, value in mistakes.items() if alike(answers[what], value, tolerance)}
        known = explain if known is None else known & explain
    for what, (inputs, expected, mistakes) in cases.items():
        got = answers[what] if what in answers else function(*inputs.values())
        compare(got, expected, what, {message: value for message, value in mistakes.items() if message in known} or mistakes, tolerance)


def doubles(x) -> Tensor:
    return x.detach().double() if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x, float))


def alike(got, value, tolerance: float) -> bool:
    got, value = doubles(got), doubles(value)
    return got.shape == value.shape and torch.allclose(got, value, rtol=tolerance, atol=tolerance, equal_nan=True)


class Untouched:
    """Within it, the inputs must stay what they are: `with Untouched(a=a, b=b):`"""

    def __init__(self, **inputs):
        self.inputs, self.before = inputs, {name: value.clone() if isinstance(value, Tensor) else value.copy() for name, value in inputs.items()}

    def __enter__(self):
        pass

    def __exit__(self, error, *_):
        for name, value in self.inputs.items():
            if error is None and not bool((value == self.before[name]).all()):
                fail(f"{name} itself was changed: whoever gave it may need it still. Work on a copy")


def pair_of(got, names: str):
    if not isinstance(got, tuple) or len(got) != 2:
        fail(f"two things are to be returned, {names}; it returned {type(got).__name__ if got is not None else 'nothing'}")
    return got


def loops(function) -> bool:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, (ast.For, ast.While, ast.comprehension)) for node in ast.walk(tree))


class Largest(TorchFunctionMode):
    """Notes how many numbers the largest tensor has that a function of PyTorch's returns meanwhile."""

    numel = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.cosine_similarity:  # it makes the cube inside
            self.numel = max(self.numel, math.prod(torch.broadcast_shapes(*(t.shape for t in args[:2]))))
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return made


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ----------------------------------------------------------------------------------------------------------------
# 1 to 4: the losses


def test_ex01_cosine_matrix(write_it):
    random = torch.Generator().manual_seed(1)
    cases = {"the worked example": (torch.tensor([[3.0, 4], [0, 2]]), torch.tensor([[1.0, 0], [0, -5], [6, 8]])),
             "5 and 5 random vectors": tuple(torch.randn(5, 7, generator=random) * 10 ** (0.3 * torch.randn(5, 1, generator=random)) for _ in range(2))}  # fmt: skip
    checked = {}
    for what, (a, b) in cases.items():
        dots, over_a, over_b = a @ b.T, a.norm(dim=1), b.norm(dim=1)
        expected = dots / (over_a[:, None] * over_b)
        checked[what] = {"a": a, "b": b}, expected, {
            "it is transposed: rows are to be a's, columns b's": expected.T,
            "these are products, not cosines: both vectors are to be brought to length 1": dots,
            "only a's vectors are brought to length 1": dots / over_a[:, None],
            "only b's vectors are brought to length 1": dots / over_b,
            "it is normalised over the wrong dimension: a row is a vector, a column is not": (a / a.norm(dim=0)) @ (b / b.norm(dim=0)).T}  # fmt: skip
    compare_cases(write_it.cosine_matrix, checked)
    a[2] = 0
    compare(write_it.cosine_matrix(a, b), expected * (a != 0).any(1)[:, None], "with a row of zeros in a",
            {"a row of zeros gives NaN: its length is 0, and 0 / 0 is no number": torch.where((a != 0).any(1)[:, None], expected, torch.nan)})  # fmt: skip
    tiny = write_it.cosine_matrix(torch.full((1, 4), 1e-6), torch.full((1, 4), 1e-6))
    compare(tiny, torch.ones(1, 1), "two short vectors, of length 2e-6, of one direction",
            {"a short vector is a direction all the same: what is put under the division, so that zeros do not divide, is too large": tiny})  # fmt: skip


def test_ex01_without_loops_or_a_cube(write_it):
    n, m, D = 40, 50, 60
    with Largest() as largest:
        got = write_it.cosine_matrix(torch.ones(n, D), torch.ones(m, D))
    if tuple(got.shape) != (n, m):
        fail(f"the shape is {tuple(got.shape)} where ({n}, {m}) is expected")
    if loops(write_it.cosine_matrix):
        fail("there is a loop in it; a matrix product does all of it at once")
    if largest.numel >= n * m * D:
        fail(f"a tensor of {n} x {m} x {D} numbers is made on the way: for 10,000 sentences of 768 numbers that is 300 GB. "
             "Normalise first; then one matrix product gives all cosines")  # fmt: skip


def simclr(h: Tensor, temperature: float) -> Tensor:
    z, B = F.normalize(h, dim=-1).transpose(0, 1).flatten(0, 1), len(h)  # (2B, D)
    scores = (z @ z.T / temperature).masked_fill(torch.eye(2 * B, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(scores, (torch.arange(2 * B) + B) % (2 * B))


def test_ex02_contrastive_loss_by_hand(write_it):
    h = torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [0.6, 0.8]]])
    scores = torch.tensor([[1, 0.6], [0, 0.8]]) / 0.5

    def nll(scores):
        return -scores.log_softmax(1).diagonal()

    compare(write_it.contrastive_loss(h, 0.5), torch.tensor((math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-1.6))) / 2), "the worked example", {
        "it is multiplied by the temperature where it is to be divided by it": nll(scores / 4).mean(),
        "the temperature has no effect": nll(scores / 2).mean(),
        "the similarity matrix is transposed: the first views ask, so the softmax of sentence i is over the second views of all": nll(scores.T).mean(),
        "both directions are averaged; here first views ask and second views answer, and that is all": (nll(scores).mean() + nll(scores.T).mean()) / 2,
        "it is the sum over the sentences; it is to be the mean": nll(scores).sum(),
        "probabilities are given to a function that takes scores: the softmax is taken twice": nll(scores.softmax(1)).mean(),
        "it is one loss for each sentence; it is to be their mean": nll(scores),
        "the sign is wrong: it is MINUS the log of the probability": -nll(scores).mean(),
        "a sentence's own second view is missing below the fraction: the softmax is over all second views, its own among them":
            -(scores.diagonal() - scores.masked_fill(torch.eye(2).bool(), -torch.inf).logsumexp(1)).mean(),
        "every view asks among all 2B - 1 others, as in SimCLR; here first views ask and second views answer": simclr(h, 0.5),
    })  # fmt: skip


def test_ex02_contrastive_loss_of_random_vectors(write_it):
    random = torch.Generator().manual_seed(2)
    for B, D, temperature in ((2, 3, 0.05), (9, 16, 0.05), (33, 8, 1.0)):
        h = (torch.randn(B, 2, D, generator=random, dtype=torch.float64) * 5).requires_grad_()
        scores = F.cosine_similarity(h[:, None, 0], h[None, :, 1], dim=-1) / temperature  # (B, B)
        expected = F.cross_entropy(scores, torch.arange(B))
        got = write_it.contrastive_loss(h, temperature)
        raw = h[:, 0] @ h[:, 1].T / temperature
        compare(got, expected, f"{B} random sentences, temperature {temperature}", {
            "these are products, not cosines: vectors are to be brought to length 1": F.cross_entropy(raw, torch.arange(B)),
            "the similarity matrix is transposed: first views ask, second views answer": F.cross_entropy(scores.T, torch.arange(B)),
            "it is multiplied by the temperature": F.cross_entropy(scores * temperature**2, torch.arange(B)),
            "probabilities are given to a function that takes scores: the softmax is taken twice": F.cross_entropy(scores.softmax(1), torch.arange(B))}, 1e-6)  # fmt: skip
        if not got.requires_grad:
            fail("no gradient comes back from the loss: something on the way was detached, or made without gradient")
        (mine,), (theirs,) = torch.autograd.grad(got, h), torch.autograd.grad(expected, h)
        detached = {"the second views get no gradient: they are detached": torch.stack([theirs[:, 0], 0 * theirs[:, 1]], 1),
                    "the first views get no gradient: they are detached": torch.stack([0 * theirs[:, 0], theirs[:, 1]], 1)}  # fmt: skip
        compare(mine, theirs, "the loss is right, and its gradient is not", detached)


def test_ex02_contrastive_loss_at_low_temperature(write_it):
    h = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(3))
    got = write_it.contrastive_loss(h, 0.001)
    expected = F.cross_entropy(F.cosine_similarity(h[:, None, 0], h[None, :, 1], dim=-1) / 0.001, torch.arange(6))
    compare(got, expected, "temperature 0.001", {
        "e^1000 is more than a float holds, and inf / inf is no number. Take a log softmax as one function": torch.tensor(torch.nan),
        "e^-1000 is less than a float holds, and log 0 is infinite. Take a log softmax as one function": torch.tensor(torch.inf)})  # fmt: skip


def masked_by(write_it, ids, special, seed=0, ratio=0.3):
    before = ids.clone()
    got = pair_of(write_it.mask_tokens(ids, special, 4, 1000, ratio, torch.Generator().manual_seed(seed)), "x' and selected")
    if not torch.equal(ids, before):
        fail("ids themselves were changed: x is needed afterwards to tell what was replaced, so x' is to be a copy")
    return got


def sentences_of(R: int, T: int) -> tuple[Tensor, Tensor]:
    """Ids from 5 on, [CLS] 2, [SEP] 3, padding 0 -> ids, special."""
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 1000, (R, T), generator=random)
    lengths = torch.randint(3, T + 1, (R, 1), generator=random)
    at = torch.arange(T)
    ids = torch.where(at >= lengths, 0, torch.where(at == lengths - 1, 3, ids))
    ids[:, 0] = 2
    return ids, ids < 5


def test_ex03_mask_touches_no_special_token(write_it):
    ids, special = sentences_of(300, 20)
    x_masked, selected = masked_by(write_it, ids, special, ratio=0.9)
    if tuple(x_masked.shape) != tuple(ids.shape) or tuple(selected.shape) != tuple(ids.shape) or selected.dtype != torch.bool:
        fail(f"x' of shape {tuple(x_masked.shape)}, selected of shape {tuple(selected.shape)} and type {selected.dtype}: both are to be {tuple(ids.shape)}, selected bool")
    for name, id in {"[CLS]": 2, "[SEP]": 3, "padding": 0}.items():
        if (selected & (ids == id)).any():
            fail(f"the mask touches {name}: {int((selected & (ids == id)).sum())} of {int((ids == id).sum())} are selected; special tokens never are")
        if (x_masked != ids)[ids == id].any():
            fail(f"the mask touches {name}: it is another token in x', though not selected")
    if (x_masked != ids)[~selected].any():
        fail("tokens that are not selected are others in x'")


def test_ex03_mask_is_drawn_from_the_generator(write_it):
    ids, special = sentences_of(50, 20)
    first = masked_by(write_it, ids, special, seed=1)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again, other = masked_by(write_it, ids, special, seed=1), masked_by(write_it, ids, special, seed=2)
    torch.set_rng_state(state)
    if not all(map(torch.equal, first, again)):
        fail("one seed gives two different masks: all random numbers are to come from `generator`, also those for the random ids")
    if torch.equal(first[1], other[1]):
        fail("two seeds give one mask: the random numbers do not come from `generator`")
    x_masked, selected = masked_by(write_it, ids, special, ratio=1.0)
    if (x_masked[selected] != 4).any() and not ((selected & (x_masked == 4)).any(1) & (selected & (x_masked != 4)).any(1)).any():
        fail("in a sentence all selected tokens are masked, or none is: each of them is to have its own draw again")
    together = masked_by(write_it, ids[:1].repeat(200, 1), special[:1].repeat(200, 1))[1]
    if len(together.unique(dim=0)) == 1:
        fail("all rows are masked at the same places: every row has draws of its own, the two views of a sentence too")


def test_ex03_mask_shares(write_it):
    ids, special = sentences_of(2000, 24)
    n = int((~special).sum())

    def share(count: int, of: int, expected: float, what: str) -> None:
        if of == 0 or abs(count / of - expected) > 5 * math.sqrt(expected * (1 - expected) / of):
            fail(f"{what}: {count / max(of, 1):.3f} of {of:,}, where {expected:.3f} is expected")

    for ratio in (0.3, 0.15):
        x_masked, selected = masked_by(write_it, ids, special, ratio=ratio)
        s = int(selected.sum())
        if abs(s / n - 0.9 * ratio) < 0.1 * abs(s / n - ratio):
            fail(f"{s / n:.3f} of the tokens are selected where {ratio:.3f} is expected: do those that were selected and stayed count?")
        share(s, n, ratio, "the share of tokens that are selected")
        if (selected.sum(1) == ((~special).sum(1) * ratio).round().long()).float().mean() > 0.7:
            fail("every sentence has the same share selected: each token is to have its own draw, so that the number varies")
        became_mask, stayed = selected & (x_masked == 4), selected & (x_masked == ids)
        if abs(float(stayed.sum() / s) - 0.18) < 0.01:
            fail("18 % of the selected stay and 2 % are random: what is not masked is to be halved, half of it random and half as it was")
        if abs(float(stayed.sum() / s) - 0.02) < 0.01:
            fail("2 % of the selected stay and 18 % are random: what is not masked is to be halved, half of it random and half as it was")
        share(int(became_mask.sum()), s, 0.8, "the share of selected tokens that became [MASK]")
        share(int(stayed.sum()), s, 0.1, "the share of selected tokens that stay what they are")
        others = x_masked[selected & ~became_mask & ~stayed]
        if len(others.unique()) < 0.7 * len(others) / (1 + len(others) / 1000):
            fail("the random tokens are few different ones: each is to have its own draw from the vocabulary")
        if len(others) and (int(others.min()) < 0 or int(others.max()) >= 1000):
            fail(f"a random id of {int(others.max())} in a vocabulary of 1,000: ids go from 0 to 999")
    x_masked, selected = write_it.mask_tokens(torch.full((500, 40), 9), torch.zeros(500, 40, dtype=torch.bool), 4, 8, 1.0, torch.Generator().manual_seed(3))
    drawn = sorted(set(x_masked[selected].tolist()) - {4, 9})
    if drawn != [0, 1, 2, 3, 5, 6, 7]:
        fail(f"of a vocabulary of 8 the random ids are {drawn} (besides [MASK], 4): any from 0 to 7 is to come, and none above")
    for ratio, what in ((0.0, "nothing"), (1.0, "every token that is not special")):
        if not torch.equal(masked_by(write_it, ids, special, ratio=ratio)[1], ~special & (ratio == 1)):
            fail(f"with a ratio of {ratio:g} {what} is to be selected")


class Guess(nn.Module):
    """A generator whose best token is that of the table for the token it sees; it has a weight, so that a gradient could flow."""

    def __init__(self, words: int = 60):
        super().__init__()
        self.table = (torch.arange(words) * 7 + 13) % words
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []  # of each call: ids, mask, whether in train mode, whether with gradients

    def forward(self, ids, mask):
        self.seen.append((ids, mask, self.training, torch.is_grad_enabled()))
        return F.one_hot(self.table[ids], len(self.table)).float() * self.weight


def test_ex04_edit(write_it):
    random = torch.Generator().manual_seed(6)
    x = torch.randint(5, 60, (40, 12), generator=random)
    mask = torch.arange(12) < torch.randint(3, 13, (40, 1), generator=random)
    x = torch.where(mask, x, 9)  # RoBERTa's padding, say, is not 0
    x[:, 0] = torch.where(torch.arange(40) % 2 == 0, 1, 4)
    x[torch.arange(40), mask.sum(1) - 1] = 2
    selected = (torch.rand(x.shape, generator=random) < 0.3) & mask & (x > 2)
    x_masked = torch.where(selected, 3, x)
    before, masked_before, generator = x.clone(), x_masked.clone(), Guess()
    try:
        got = write_it.edit_sentences(generator, x, x_masked, mask)
        if not torch.is_grad_enabled():
            fail("gradients are still switched off afterwards, and nothing could be trained any more: use `with torch.no_grad():`")
    finally:
        torch.set_grad_enabled(True)
    if not generator.training or not all(training for _, _, training, _ in generator.seen):
        fail("the generator was put in eval mode; it is to be called in the mode that it is in (published, in train mode, with its dropout)")
    if not torch.equal(x, before) or not torch.equal(x_masked, masked_before):
        fail(f"{'x_masked' if torch.equal(x, before) else 'x'} itself was changed: x'' is to be a tensor of its own")
    if not generator.seen:
        fail("the generator was not asked")

    if torch.equal(generator.seen[-1][0], x):
        fail("the generator was given x; it is to fill in x', where tokens are masked")

    def edit(best, where=None):
        best = best if where is None else torch.where(where, best, x)
        best = torch.where(mask, best, 0)
        return torch.cat([x[:, :1], best[:, 1:]], 1)

    best = generator.table[x_masked]
    compare(got, edit(best), "x''", {
        "position 0 is that of x', where it may be masked; x's own is to be kept": torch.cat([x_masked[:, :1], edit(best)[:, 1:]], 1),
        "only masked tokens are the generator's; that is the paper's reading. The published code takes its token everywhere": edit(best, selected),
        "position 0 has the generator's token: [CLS] is to be put back": torch.where(mask, best, 0),
        "padding has the generator's tokens: it is to have id 0": torch.cat([x[:, :1], best[:, 1:]], 1),
        "padding is as it was in x: it is to have id 0": torch.where(mask, edit(best), x),
        "position 0 has the first row's [CLS]: every row keeps its own": torch.cat([x[:1, :1].expand(40, 1), edit(best)[:, 1:]], 1),
        "position 0 has the generator's token, and so has padding: [CLS] is to be put back, and padding to be 0": best,
        "[SEP] is kept; the published code lets the generator write over it": torch.where(x == 2, x, edit(best)),
    })  # fmt: skip
    if got.requires_grad or got.dtype != torch.int64:
        fail("x'' is to be ids, int64, without gradient")
    seen = generator.seen[-1][1]
    if seen is None or not torch.equal(seen.bool(), mask):
        fail("the generator was not given the mask: it would read the padding")


def test_ex04_edit_makes_no_graph(write_it):
    generator = Guess()
    write_it.edit_sentences(generator, torch.tensor([[1, 5, 2]]), torch.tensor([[1, 3, 2]]), torch.ones(1, 3, dtype=torch.bool))
    if any(gradients for *_, gradients in generator.seen):
        fail("the generator ran with gradients on: it is fixed, and the memory for going back through it is wasted")


# ----------------------------------------------------------------------------------------------------------------
# 5 to 8: the discriminator


def test_ex05_replaced_token_loss(write_it):
    def check(x, x_edited, mask, logits, what):
        differs = x != x_edited
        each, turned = (F.cross_entropy(logits.flatten(0, 1), labels.long().flatten(), reduction="none").view(x.shape) for labels in (differs & mask, ~differs & mask))
        with Untouched(x=x, x_edited=x_edited, mask=mask):
            replaced, loss = pair_of(write_it.replaced_token_loss(logits, x, x_edited, mask), "replaced and the loss")
        if isinstance(replaced, Tensor) and replaced.dtype != torch.bool:
            fail(f"replaced is of type {replaced.dtype}; bool is wanted")
        compare(replaced, differs & mask, f"replaced, of {what}", {
            "padding counts as replaced where its ids differ": differs,
            "it is the other way round: True where a token was replaced": ~differs & mask,
            "padding is where mask is False, not where an id is 0": differs & (x_edited != 0)})  # fmt: skip
        compare(loss, each[mask].mean(), f"the loss of {what}", {
            "padding counts as kept, as in the published code; here it is the mean over real tokens": each.mean(),
            "padding is left out of the sum, and counts in the number that it is divided by": (each * mask).mean(),
            "it is the sum; it is to be the mean over the real tokens": each[mask].sum(),
            "it is the mean of the sentences' means, in which a long sentence's tokens count less": ((each * mask).sum(1) / mask.sum(1)).mean(),
            "the classes are turned round: the first logit speaks for kept, the second for replaced": turned[mask].mean(),
            "only replaced tokens count; the kept ones are to be recognised too": each[differs & mask].mean(),
            "position 0 is left out; it counts as the others do": each[:, 1:][mask[:, 1:]].mean(),
            "probabilities are given to a function that takes logits: the softmax is taken twice": F.cross_entropy(logits[mask].softmax(-1), (differs & mask)[mask].long()),
            "only the second logit is looked at; the first one speaks too": F.binary_cross_entropy_with_logits(logits[..., 1][mask], (differs & mask)[mask].to(logits)),
            "logits of 0 at padding still have a loss of log 2 each: leave those places out": F.cross_entropy((logits * mask[..., None]).flatten(0, 1), (differs & mask).long().flatten())})  # fmt: skip
        if not loss.requires_grad:
            fail("no gradient comes back from the loss")
        (grad,) = torch.autograd.grad(loss, logits)
        if grad[~mask].any():
            fail("the loss has a gradient at padding: it has no part in it")

    by_hand = torch.tensor([[[2.0, 0], [0, 1], [0, 0], [-1, 1]]]).requires_grad_()
    check(torch.tensor([[1, 5, 6, 0]]), torch.tensor([[1, 7, 6, 0]]), torch.tensor([[True, True, True, False]]), by_hand, "the worked example")
    random = torch.Generator().manual_seed(7)
    for R, T in ((1, 2), (5, 9), (16, 32)):
        mask = torch.arange(T) < torch.randint(2, T + 1, (R, 1), generator=random)
        x = torch.randint(0, 5, (R, T), generator=random)
        x_edited = torch.where(mask, torch.randint(0, 5, (R, T), generator=random), 0)  # padding differs from x too, and is not replaced
        check(x, x_edited, mask, (3 * torch.randn(R, T, 2, generator=random, dtype=torch.float64)).requires_grad_(), f"{R} random rows of {T}")
        check(x, x_edited, mask, (300 * torch.randn(R, T, 2, generator=random)).requires_grad_(), f"{R} rows of {T} with large logits, whose e^x no float holds")


class Parts:
    """A tiny BERT as exercise 6 sees it, and whole."""

    def __init__(self, layers: int = 2):
        torch.manual_seed(8)
        self.whole = Bert(BertConfig(vocab_size=40, hidden_size=12, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=20,
                                     max_position_embeddings=16, initializer_range=0.3)).eval()  # fmt: skip
        self.layers = [lambda x, mask, layer=layer: layer(x.flatten(0, 1), Grid(*mask.shape, mask, None, None)).view_as(x) for layer in self.whole.layers]
        self.given = None

    def embed(self, ids: Tensor) -> Tensor:
        self.given = self.whole.embeddings(ids).view(*ids.shape, -1)
        self.copy = self.given.detach().clone()
        return self.given


def test_ex06_h_in_place_of_cls(write_it):
    random = torch.Generator().manual_seed(9)
    for layers, R, T in ((1, 2, 5), (3, 4, 9), (0, 1, 3)):
        bert = Parts(layers)
        ids = torch.randint(0, 40, (R, T), generator=random)
        mask = torch.arange(T) < torch.randint(2, T + 1, (R, 1), generator=random)
        h = torch.randn(R, 12, generator=random).requires_grad_()
        embedded = bert.embed(ids).detach()

        def through(x):
            for layer in bert.layers:  # noqa: B023
                x = layer(x, mask)  # noqa: B023
            return x

        def again(x, before=False):
            for layer in bert.layers:  # noqa: B023
                x = torch.cat([h.detach()[:, None], x[:, 1:]], 1) if before else x  # noqa: B023
                x = layer(x, mask)  # noqa: B023
                x = x if before else torch.cat([h.detach()[:, None], x[:, 1:]], 1)  # noqa: B023
            return x

        def whole_of(x):
            for layer in bert.layers:  # noqa: B023
                x = layer(x, torch.ones_like(mask))  # noqa: B023
            return x

        put = torch.cat([h.detach()[:, None], embedded[:, 1:]], 1)
        last = through(embedded)
        with torch.no_grad():
            mistakes = {
                "h is not there: [CLS] is still [CLS]": last,
                "h was added to [CLS]; it is to stand in its place, so that nothing of [CLS] is left": through(torch.cat([put[:, :1] + embedded[:, :1], put[:, 1:]], 1)),
                "h stands at every position": through(h[:, None].expand_as(put)),
                "h was put in front, so that all tokens are one place further on": through(torch.cat([h[:, None], embedded[:, :-1]], 1)),
                "h stands at the last position": through(torch.cat([embedded[:, :-1], h[:, None]], 1)),
                "h was put in after the layers; no token has read it": torch.cat([h[:, None], last[:, 1:]], 1),
                "the layers have not all been gone through": put if layers else last + 1,
                "h was put in again after a layer; only the first layer reads it as it is": again(put) if layers else last + 1,
                "h was put in again before each layer; only the first layer reads it as it is": again(put, before=True) if layers > 1 else last + 1,
                "the layers were not given the mask": last + 1 if not layers else whole_of(put),
                "the tokens after h were embedded one place too early: embed all ids, then replace": through(torch.cat([h[:, None], bert.whole.embeddings(ids[:, 1:]).view(R, T - 1, -1)], 1)),
            }  # fmt: skip
        try:
            got = write_it.read_with_h(bert, ids, mask, h)
        except NotImplementedError:
            raise
        except RuntimeError as error:
            got = error
        if isinstance(got, RuntimeError) and str(T + 1) in str(got) or isinstance(got, Tensor) and got.shape[1:2] == (T + 1,):
            fail("h stands before [CLS], and the sentence is one place longer; it is to stand in [CLS]'s place")
        if isinstance(got, RuntimeError):
            raise got
        real = mask[..., None]
        wanted = bert.whole(ids, mask, cls_vector=h)
        compare(got * real if isinstance(got, Tensor) and got.shape == put.shape else got, wanted * real, f"{layers} layer{'s' * (layers != 1)}",
                {message: value * real for message, value in mistakes.items()})  # fmt: skip
        if not torch.equal(bert.given.detach(), bert.copy):
            fail("what bert.embed gave was overwritten: going back, PyTorch may need it. Make a new tensor, of h and the other positions")
        weights = torch.randn(got.shape, generator=random) * real
        if not got.requires_grad or (grad := torch.autograd.grad((got * weights).sum(), h, retain_graph=True, allow_unused=True)[0]) is None:
            fail("no gradient reaches h: it is through h that the discriminator teaches the encoder. It must not be detached")
        word = bert.whole.embeddings.word.weight
        expected = torch.autograd.grad((wanted * weights).sum(), (h, word))
        compare(grad, expected[0], "the gradient of h", tolerance=1e-4)
        of_words = torch.autograd.grad((got * weights).sum(), word, allow_unused=True)[0]
        compare(torch.zeros_like(word) if of_words is None else of_words, expected[1], "the gradient of the word embeddings", {
            "none reaches the other positions' embeddings: they were detached, or made without gradient": torch.zeros_like(word)}, tolerance=1e-4)  # fmt: skip


def test_ex07_attention(write_it):
    random = torch.Generator().manual_seed(10)
    q, k, v = (torch.tensor(numbers).view(1, 1, 3, 1) for numbers in ([0.0, 1, 1], [1.0, 0, 5], [10.0, 20, 99]))
    cases = {"the worked example": (q, k, v, torch.tensor([[True, True, False]]))}
    for B, H, T, d in ((1, 1, 2, 3), (3, 2, 5, 4), (4, 3, 16, 8)):
        mask = torch.arange(T) < torch.randint(1, T, (B, 1), generator=random)
        cases[f"B {B}, H {H}, T {T}, d {d}"] = (*(2 * torch.randn(B, H, T, d, generator=random) for _ in range(3)), mask)
    checked = {}
    for what, (q, k, v, mask) in cases.items():
        keys, queries, d = mask[:, None, None, :], mask[:, None, :, None], q.shape[-1]
        scores = q @ k.transpose(-1, -2)
        scaled = scores / d**0.5

        def read(scores, dim=-1):
            return scores.softmax(dim) @ v  # noqa: B023

        right = read(scaled.masked_fill(~keys, -torch.inf))
        checked[what] = {"q": q, "k": k, "v": v, "mask": mask}, right, {
            "the scores are divided by the root of T, the number of tokens; it is to be by that of d": read((scores / q.shape[2] ** 0.5).masked_fill(~keys, -torch.inf)),
            "the output is divided by sqrt(d); the scores are to be, before the softmax": read(scores.masked_fill(~keys, -torch.inf)) / d**0.5,
            "queries at padding were set to 0; they are computed like the others": right * queries,
            "the mask is laid over queries and keys; it is only the keys at padding that nobody may read": read(scaled.masked_fill(~keys | ~queries, -1e9)),
            "padding has the score 0 for all queries at padding too: the mask is to keep out keys": read(scaled.masked_fill(~queries, 0)),
            "the mask has no effect: padding is read like a token": read(scaled),
            "the scores are not divided by sqrt(d)": read(scores.masked_fill(~keys, -torch.inf)),
            "the scores are divided by d; it is to be by the root of d": read((scores / d).masked_fill(~keys, -torch.inf)),
            "the scores are multiplied by sqrt(d)": read((scores * d**0.5).masked_fill(~keys, -torch.inf)),
            "padding has the score 0, and e^0 is 1: it is read. It is to have minus infinity": read(scaled.masked_fill(~keys, 0)),
            "the weights of padding are set to 0 after the softmax, and the others no longer sum to 1": (scaled.softmax(-1) * keys) @ v,
            "the softmax is over the queries; each query's weights, over the keys, are to sum to 1": read(scaled.masked_fill(~keys, -torch.inf), -2),
            "the mask is laid over the queries; it is the keys at padding that nobody may read": read(scaled.masked_fill(~queries, -torch.inf)),
            "the mask is laid over the queries: it is the keys at padding that nobody may read": read(scaled.masked_fill(~queries, -1e9)),
            "the softmax is over the queries: each query's weights, over the keys, are to sum to 1": read(scaled.masked_fill(~keys, -1e9), -2),
            "the mask is turned round: padding is read and the tokens are not": read(scaled.masked_fill(keys, -torch.inf)),
        }  # fmt: skip
    compare_cases(write_it.attention, checked)
    first, long = (torch.randn(1, 1, 4, 2, generator=random) for _ in range(2))
    long = torch.cat([first, 1e8 * long], 2)
    compare(write_it.attention(long, long, long, torch.arange(8)[None] < 4)[:, :, :4], F.scaled_dot_product_attention(first, first, first),
            "the same sentence with wild numbers at its padding, where tokens must read as before (NaN: the softmax has seen the padding's scores)")
    far = torch.full((1, 1, 4, 1), 20.0)
    values = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 4, 1)
    compare(write_it.attention(far, -far, values, torch.tensor([[True, True, True, False]])), torch.full((1, 1, 4, 1), 2.0),
            "scores of -400 for all tokens: a padding's score must be lower than any, minus infinity")  # fmt: skip


def safetensors_bytes(tensors: dict, order=None, pad: int = 0, metadata: bool = True) -> bytes:
    """Written by hand, so that names and places are as wanted: the header's order need not be the data's."""
    header, data = {"__metadata__": {"format": "pt"}} if metadata else {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() and tensor.ndim else struct.pack("<f", tensor) if tensor.numel() else b""
        kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = dict(sorted(header.items(), key=lambda item: item[0] if order is None else order.index(item[0])))
    text = json.dumps(header, ensure_ascii=False).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + data


def test_ex08_safetensors_by_hand(write_it, tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path = tmp_path / "hand.safetensors"
    path.write_bytes(bytes.fromhex("3600000000000000") + header + bytes.fromhex("0000C03F000000C0"))
    try:
        got = write_it.read_safetensors(path)
    except ValueError as error:
        got = error
    if isinstance(got, ValueError):
        fail(f"the worked example is whole, and a ValueError was raised: {got} (is the length read with its lowest byte first?)")
    if not isinstance(got, dict) or list(got) != ["a"]:
        fail(f"the worked example holds one tensor, a; it returned {sorted(got) if isinstance(got, dict) else type(got).__name__}")
    if not isinstance(got["a"], Tensor):
        fail(f"a is a {type(got['a']).__name__}; a torch.Tensor is wanted")
    compare(got["a"], torch.tensor([1.5, -2.0]), "the worked example", {
        "offsets are counted from the data's beginning, not from the file's": torch.frombuffer(bytearray(path.read_bytes()[:8]), dtype=torch.float32),
        "offsets are counted from the data's beginning, which is after the header AND the 8 bytes of its length":
            torch.frombuffer(bytearray(path.read_bytes()[54:62]), dtype=torch.float32)})  # fmt: skip


def test_ex08_safetensors_of_every_kind(write_it, tmp_path):
    random = torch.Generator().manual_seed(11)
    tensors = {
        "z.weight": torch.randn(3, 5, generator=random),
        "ids": torch.randint(-(2**40), 2**40, (7,), generator=random),
        "half": torch.randn(4, 1, 2, generator=random).half(),
        "brain": torch.randn(6, generator=random).bfloat16(),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "ünï": torch.randn(2, generator=random),
    }  # fmt: skip
    path = tmp_path / "all.safetensors"
    for content in (safetensors_bytes(tensors, metadata=False), safetensors_bytes(tensors), safetensors_bytes(tensors, order=["ünï", "one", "__metadata__", "ids", "none", "brain", "half", "z.weight"], pad=5)):
        path.write_bytes(content)
        try:
            got = write_it.read_safetensors(path)
        except (KeyError, TypeError) as error:
            got = error
        if isinstance(got, Exception) and b"__metadata__" not in content:
            raise got
        if isinstance(got, Exception) or "__metadata__" in got:
            fail("__metadata__ is no tensor: it holds notes, and is to be left out")
        if sorted(got) != sorted(tensors):
            fail(f"the file holds {sorted(tensors)}; it returned {sorted(got)}")
        for name, tensor in tensors.items():
            if got[name].dtype != tensor.dtype:
                fail(f"{name} is of type {got[name].dtype}; the file says {tensor.dtype}")
            if tuple(got[name].shape) != tuple(tensor.shape):
                fail(f"{name} has the shape {tuple(got[name].shape)}; the file says {tuple(tensor.shape)}" + " (one number, no dimension)" * (tensor.ndim == 0))
            compare(got[name].double(), tensor.double(), f"{name}, {tensor.dtype} (tensors need not lie in the header's order)", tolerance=0)
    write_safetensors(path, {"w": torch.arange(6.0).view(2, 3)})  # the repository's own writer
    compare(write_it.read_safetensors(path)["w"], torch.arange(6.0).view(2, 3), "a file of the repository's writer", {
        "numbers lie row by row; this is column by column": torch.arange(6.0).view(3, 2).T})  # fmt: skip


def test_ex08_safetensors_cut_short(write_it, tmp_path):
    whole, path = safetensors_bytes({"a": torch.ones(8), "b": torch.ones(8)}, metadata=False), tmp_path / "short.safetensors"
    for size in (0, 5, 8, 40, len(whole) - 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        raised = None
        try:
            write_it.read_safetensors(path)
        except NotImplementedError:
            raise
        except Exception as error:
            raised = error
        if isinstance(raised, ValueError):
            continue
        if raised is not None:
            fail(f"a file cut short after {size} of {len(whole)} bytes raises {type(raised).__name__}; a ValueError that says what is wrong is wanted")
        fail(f"a file cut short after {size} of {len(whole)} bytes is read as if it were whole; a ValueError is wanted")


# ----------------------------------------------------------------------------------------------------------------
# 9 to 12: is it any good, and can it be stopped?


def ranks_of(values, kind: str = "average") -> np.ndarray:
    values = np.asarray(values, float)
    if kind == "in order":
        return np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1.0
    if kind == "dense":
        return np.unique(values, return_inverse=True)[1] + 1.0
    less, equal = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
    return less + {"average": (equal + 1) / 2, "lowest": 1, "highest": equal}[kind]


def test_ex09_spearman(write_it):
    rng = np.random.default_rng(12)
    pairs = {"the worked example": np.array([[20.0, 10, 80, 20, 40], [4, 2, 1, 5, 3]])}
    for P, levels in ((2, 1000), (20, 4), (50, 6), (300, 11), (300, 10**6)):
        ab = rng.integers(0, levels, (2, P)).astype(float)
        ab[0, : P // 2] += ab[1, : P // 2]
        assert ab.std(1).all()  # of a list that is all equal there is no correlation
        pairs[f"{P} pairs, values among {levels}"] = ab
    cases = {}
    for what, (a, b) in pairs.items():
        with_ranks = {kind: np.corrcoef(ranks_of(a, kind), ranks_of(b, kind))[0, 1] for kind in ("average", "in order", "dense", "lowest", "highest")}
        d, order = ranks_of(a) - ranks_of(b), np.corrcoef(np.argsort(a, kind="stable"), np.argsort(b, kind="stable"))[0, 1]
        cases[what] = {"a": a, "b": b}, with_ranks["average"], {
            "argsort says which element comes first, not which rank the first element has": order,
            "equal values are ranked in the order in which they stand; they are to share the mean of their ranks": with_ranks["in order"],
            "equal values are ranked densely (1, 2, 2, 3); they are to share the mean of their ranks (1, 2.5, 2.5, 4)": with_ranks["dense"],
            "equal values have the lowest of their ranks; they are to share the mean": with_ranks["lowest"],
            "equal values have the highest of their ranks; they are to share the mean": with_ranks["highest"],
            "this is Pearson's correlation of the values themselves; Spearman's is of their ranks": np.corrcoef(a, b)[0, 1],
            "the formula 1 - 6 sum d^2 / (n (n^2 - 1)) holds only without ties": 1 - 6 * (d @ d) / (len(a) * (len(a) ** 2 - 1)),
            "the sign is turned round": -with_ranks["average"]}  # fmt: skip
    compare_cases(write_it.spearman, cases, 1e-9)


def test_ex10_alignment_and_uniformity(write_it):
    rng = np.random.default_rng(13)
    cases = {"the worked example": (np.array([[1.0, 0], [1, 0]]), np.array([[1.0, 0], [0, 1]]))}
    for P, D in ((2, 2), (10, 5), (120, 16)):
        u = unit(rng.normal(size=(P, D)))
        v = unit(u + 0.3 * unit(rng.normal(size=(P, D))))
        v[0] = u[0]  # the same vector at two places
        cases[f"{P} pairs"] = u, v
    for what, (u, v) in cases.items():
        x, P = np.concatenate([u, v]), len(u)
        distance, between = np.linalg.norm(x[:, None] - x, axis=-1), np.linalg.norm(u - v, axis=1)
        upper = distance[np.triu_indices(2 * P, 1)]
        with Untouched(u=u, v=v):
            align, uniform = pair_of(write_it.alignment_and_uniformity(u, v), "alignment and uniformity")
        partners = np.triu(np.ones((2 * P, 2 * P), bool), 1) & ~np.eye(2 * P, k=P, dtype=bool)
        compare(align, (between**2).mean(), f"alignment, {what}", {
            "distances are to be squared": between.mean(), "it is the sum; the mean over pairs is wanted": (between**2).sum(),
            "it is the mean over all numbers; |u - v|^2 is the sum of the D squared differences of a pair": ((u - v) ** 2).mean(),
            "it is 1 - cosine; |u - v|^2 is twice that": (between**2).mean() / 2}, 1e-9)  # fmt: skip
        compare(uniform, np.log(np.exp(-2 * upper**2).mean()), f"uniformity, {what}", {
            "a row is paired with itself, at distance 0": np.log(np.exp(-2 * distance**2).mean()),
            "a row is paired with itself, once, at distance 0": np.log(np.exp(-2 * distance[np.triu_indices(2 * P)] ** 2).mean()),
            "pairs of equal rows are left out: two rows may hold the same vector, and are a pair": np.log(np.exp(-2 * distance[distance > 1e-9] ** 2).mean()),
            "distances are to be squared": np.log(np.exp(-2 * upper).mean()),
            "the factor 2 is missing: exp(-2 |x - y|^2)": np.log(np.exp(-(upper**2)).mean()),
            "it is the mean of the logs; the log of the mean is wanted": (-2 * upper**2).mean(),
            "the log is missing": np.exp(-2 * upper**2).mean(),
            "it is the mean of u's and v's own; the rows of both lists are to be in one": np.mean([np.log(np.exp(-2 * part[np.triu_indices(P, 1)] ** 2).mean()) for part in (distance[:P, :P], distance[P:, P:])]),
            "the sum over pairs is divided by n * n; there are n (n - 1) / 2 pairs": np.log(np.exp(-2 * upper**2).sum() / (2 * P) ** 2),
            "the sum over pairs, each twice, is divided by n * n; there are n (n - 1) of them": np.log(2 * np.exp(-2 * upper**2).sum() / (2 * P) ** 2),
            "the pairs of partners are left out: they are pairs of rows as all others": np.log(np.exp(-2 * distance[partners] ** 2).mean()),
            "only u is looked at; all 2P vectors are meant": np.log(np.exp(-2 * distance[:P, :P][np.triu_indices(P, 1)] ** 2).mean()),
            "only pairs of a u with a v are looked at; all 2P vectors are meant": np.log(np.exp(-2 * distance[:P, P:] ** 2).mean())}, 1e-9)  # fmt: skip


def recalls(u, v, k: int) -> dict[str, float]:
    """Recall as it is, under "", and as mistakes make it."""
    x, P = np.concatenate([u, v]), len(u)
    cosines = x @ x.T
    partner = (np.arange(2 * P) + P) % (2 * P)
    own = cosines[np.arange(2 * P), partner][:, None]
    closer = cosines > own + 1e-9
    np.fill_diagonal(closer, False)
    ranks, itself = closer.sum(1) + 1, (cosines > own + 1e-9).sum(1) + 1
    as_near = (np.abs(cosines - own) <= 1e-9) & ~np.eye(2 * P, dtype=bool)
    across = (cosines[:P, P:] > own[:P] + 1e-9).sum(1) + 1
    return {
        "": 100 * (ranks <= k).mean(),
        "a sentence finds itself, as the nearest of all: it is to be left out": 100 * (itself <= k).mean(),
        "only the sentences of u ask; those of v are to ask too": 100 * (ranks[:P] <= k).mean(),
        "only the sentences of v ask; those of u are to ask too": 100 * (ranks[P:] <= k).mean(),
        "u looks only among v; all the others of both lists may be found": 100 * (across <= k).mean(),
        "each looks only in the other list; all the others of both may be found":
            100 * np.concatenate([across <= k, (cosines[P:, :P] > own[P:] + 1e-9).sum(1) + 1 <= k]).mean(),
        "it is a share; per cent is wanted": (ranks <= k).mean(),
        "k is off by one: the partner may be the k-th": 100 * (ranks < k).mean(),
        "k is off by one: the partner may be the k-th, not the one after": 100 * (ranks <= k + 1).mean(),
        "others that are exactly as near come before the partner; the partner is to come first": 100 * (ranks + as_near.sum(1) - 1 <= k).mean(),
    }  # fmt: skip


def test_ex11_recall(write_it):
    u, v = np.array([[1.0, 0], [0, 1]]), np.array([[0.6, 0.8], [-1, 0]])
    assert (recalls(u, v, 1)[""], recalls(u, v, 2)[""]) == (50, 100)
    inputs = {"the worked example, k = 1": (u, v, 1), "the worked example, k = 2": (u, v, 2)}
    rng = np.random.default_rng(14)
    corners = np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])  # of a tetrahedron: all cosines are negative
    corners = unit(corners + 0.1 * rng.normal(size=(4, 3)))
    inputs["four vectors, all cosines of which are negative"] = (corners[:2], corners[2:], 1)
    for P, noise, k in ((3, 0.5, 1), (40, 0.7, 1), (40, 0.9, 5), (150, 0.8, 10), (30, 0.4, 30)):
        u = unit(rng.normal(size=(P, 6)))
        v = unit(u + noise * rng.normal(size=(P, 6)))
        if P == 40:  # the same sentence several times: ties
            u[:10], v[:10] = u[0], v[0]
        inputs[f"{P} pairs, k = {k}"] = (u, v, k)
    cases = {}
    for what, (u, v, k) in inputs.items():
        mistakes = recalls(u, v, k)
        cases[what] = {"u": u, "v": v, "k": k}, mistakes.pop(""), mistakes
    compare_cases(write_it.recall_at_k, cases)


def newly_made(seed: int, momentum: bool = False, frozen: bool = False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
    model[0].weight.requires_grad_(not frozen)  # it has no state then, and those after it do
    if momentum:
        return model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return model, torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.99))


def train(model, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(1000 + step)  # batch and dropout are functions of the step
        loss = (model(torch.randn(16, 4)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_ex12_resume_exactly(write_it):
    for stop, end, momentum, frozen in ((1, 3, False, False), (6, 11, False, False), (2, 5, True, False), (2, 5, False, True)):
        straight, optimizer = newly_made(0, momentum, frozen)
        train(straight, optimizer, 0, end)

        model, optimizer = newly_made(0, momentum, frozen)
        train(model, optimizer, 0, stop)
        try:
            tensors = write_it.state_of(model, optimizer)
        except KeyError as error:
            tensors = error
        if isinstance(tensors, KeyError):
            fail(f"state_of looked for {tensors}, which this optimizer or parameter has not: keep whatever state there is")
        if not isinstance(tensors, dict) or not tensors:
            fail(f"a dict of names and tensors is wanted; state_of returned {type(tensors).__name__ if not isinstance(tensors, dict) else 'an empty one'}")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                fail(f"{name!r} is a {type(tensor).__name__}: a safetensors file holds names and tensors, and nothing else")
        tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}  # as a file would hold them

        other, fresh = newly_made(1, momentum, frozen)
        before = [id(p) for p in other.parameters()]
        try:
            write_it.restore(tensors, other, fresh)
        except KeyError as error:
            tensors = error
        if isinstance(tensors, KeyError):
            fail(f"restore looked for {tensors}, which this optimizer or parameter has not: put back whatever state was there")
        if [id(p) for p in other.parameters()] != before or [id(p) for p in fresh.param_groups[0]["params"]] != before:
            fail("the model has other parameters now than the optimizer holds: put the values into those that are there")
        for (name, a), b in zip(model.named_parameters(), other.parameters()):
            if not torch.equal(a, b):
                fail(f"right after restore the weight {name} is not what it was")
        for (name, a), b in zip(model.named_buffers(), other.buffers()):
            if not torch.equal(a, b):
                fail(f"the buffer {name} of BatchNorm was not kept: parameters() has only what is trained; its running statistics are state too")
        for i, (a, b) in enumerate(zip(model.parameters(), other.parameters())):
            had, has = optimizer.state[a], fresh.state.get(b, {})
            if not had and not has:
                continue
            if not had:
                fail(f"parameter {i}, which had no gradient, has a state after restore: what belongs to which parameter was mixed up")
            if not has and len(tensors) > len(model.state_dict()):
                fail(f"{len(tensors)} tensors were kept, and the optimizer has none of them: its state is by whole numbers (0, 1, ...), "
                     "and names must mean the same in a new process")  # fmt: skip
            if not has:
                fail("the optimizer begins anew: its moments, and AdamW's count of steps, are state too")
            for name in had:
                if name not in has:
                    fail(f"the optimizer's {name} of parameter {i} was not put back")
                if not torch.equal(torch.as_tensor(had[name]), torch.as_tensor(has[name])):
                    why = " (the bias correction reads it)" if name == "step" else ""
                    fail(f"the optimizer's {name} of parameter {i} is {float(torch.as_tensor(has[name]).flatten()[0]):g} after restore, and was {float(torch.as_tensor(had[name]).flatten()[0]):g}{why}")
        train(other, fresh, stop, end)
        for (name, a), (_, b) in zip(straight.state_dict().items(), other.state_dict().items()):
            if not torch.equal(a, b):
                fail(f"resumed after step {stop}, {name} is another at step {end} than in the run that was never stopped")


def test_ex12_the_smallest_run(write_it):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tensors = write_it.state_of(model, optimizer)
    other = nn.Linear(1, 1)
    write_it.restore({name: tensor.detach().clone() for name, tensor in tensors.items()}, other, torch.optim.SGD(other.parameters(), lr=0.1))
    if not torch.equal(model.weight, other.weight) or not torch.equal(model.bias, other.bias):
        fail("nn.Linear(1, 1) and SGD: weight and bias were not put back")
