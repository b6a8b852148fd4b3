"""Tests of write_it.py: pytest exercises -k ex03. A failure says what is wrong, in words.

Each test compares an answer with the worked example and with another computation on random input.
Beside the expected value it computes the values of common mistakes, so that it can name them.
"""

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

from bert import Bert, BertConfig, write_safetensors


def fail(message: str):
    pytest.fail(message, pytrace=False)


def compare(
    got, expected, what: str, mistakes: dict[str, object] | None = None, tolerance: float = 1e-5
) -> None:
    """Fail if got is not expected: name the mistakes that give got, else the largest difference.

    mistakes: from a message to the value of an answer with that mistake.
    """
    if got is None:
        fail(f"{what}: it returned nothing (is a return missing?)")
    if not isinstance(got, (Tensor, np.ndarray, np.generic, float, int)):
        fail(f"{what}: it returned a {type(got).__name__}")
    found, wanted = to_doubles(got), to_doubles(expected)
    if is_close(found, wanted, tolerance):
        return
    mistakes = mistakes or {}
    if known := [m for m, value in mistakes.items() if is_close(found, value, tolerance)]:
        fail(f"{what}: " + "; or ".join(known))
    if found.shape != wanted.shape:
        fail(f"{what}: the shape is {tuple(found.shape)}; expected {tuple(wanted.shape)}")
    if not found.isfinite().all():
        broken = int((~found.isfinite()).sum())
        fail(f"{what}: {broken} of {found.numel()} numbers are NaN or infinite")
    difference = (found - wanted).abs()
    position = tuple(map(int, np.unravel_index(int(difference.argmax()), difference.shape)))
    f, w = found[position].item(), wanted[position].item()
    digits = 6 if f"{f:.6g}" != f"{w:.6g}" else 12  # such as float32 in place of float64
    where = f" at {list(position)}" if position else ""
    fail(f"{what}: {f:.{digits}g}{where}; expected {w:.{digits}g}")


def compare_cases(function, cases: dict[str, tuple], tolerance: float = 1e-5) -> None:
    """compare() for each case, {what: (inputs by name, expected, mistakes)}.

    A mistake that explains all cases is named first. The inputs must not change.
    """
    answers, known = {}, None
    for what, (inputs, _, mistakes) in cases.items():
        tensors = {n: x for n, x in inputs.items() if isinstance(x, (Tensor, np.ndarray))}
        try:
            with Unchanged(**tensors):
                answers[what] = function(*inputs.values())
        except Exception:
            if not answers:
                raise
            break  # first compare the earlier cases
        explains = {m for m, x in mistakes.items() if is_close(answers[what], x, tolerance)}
        known = explains if known is None else known & explains
    for what, (inputs, expected, mistakes) in cases.items():
        got = answers[what] if what in answers else function(*inputs.values())
        best = {m: value for m, value in mistakes.items() if m in known}
        compare(got, expected, what, best or mistakes, tolerance)


def to_doubles(x) -> Tensor:
    return x.detach().double() if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x, float))


def is_close(got, value, tolerance: float) -> bool:
    got, value = to_doubles(got), to_doubles(value)
    same_shape = got.shape == value.shape
    return same_shape and torch.allclose(got, value, rtol=tolerance, atol=tolerance, equal_nan=True)


class Unchanged:
    """The inputs must not change inside the block: `with Unchanged(a=a, b=b):`"""

    def __init__(self, **inputs):
        self.inputs = inputs
        self.before = {name: torch.as_tensor(x).clone() for name, x in inputs.items()}

    def __enter__(self):
        pass

    def __exit__(self, error, *_):
        for name, value in self.inputs.items():
            if error is None and not bool((torch.as_tensor(value) == self.before[name]).all()):
                fail(f"{name} itself was changed: the caller may still need it. Use a copy")


def unpack_two(got, names: str):
    if not isinstance(got, tuple) or len(got) != 2:
        returned = "nothing" if got is None else type(got).__name__
        fail(f"it must return two values, {names}; it returned {returned}")
    return got


def has_loop(function) -> bool:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, (ast.For, ast.While, ast.comprehension)) for node in ast.walk(tree))


class Largest(TorchFunctionMode):
    """Inside the block, records the size of the largest tensor that a PyTorch function returns."""

    numel = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.cosine_similarity:  # it creates the cube internally
            shape = torch.broadcast_shapes(*(t.shape for t in args[:2]))
            self.numel = max(self.numel, math.prod(shape))
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return made


def normalized(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ------------------------------------------------------------------------------------------------
# 1 to 4: the losses


def test_ex01_cosine_matrix(write_it):
    rng = torch.Generator().manual_seed(1)

    def vectors():  # of many lengths
        return torch.randn(5, 7, generator=rng) * 10 ** (0.3 * torch.randn(5, 1, generator=rng))

    a, b = torch.tensor([[3.0, 4], [0, 2]]), torch.tensor([[1.0, 0], [0, -5], [6, 8]])
    inputs = {"the worked example": (a, b), "5 and 5 random vectors": (vectors(), vectors())}
    cases = {}
    for what, (a, b) in inputs.items():
        dots, norms_a, norms_b = a @ b.T, a.norm(dim=1)[:, None], b.norm(dim=1)
        expected = dots / (norms_a * norms_b)
        mistakes = {
            "it is transposed: a's vectors are the rows, b's the columns": expected.T,
            "these are dot products, not cosines: normalize both vectors": dots,
            "only a's vectors are normalized": dots / norms_a,
            "only b's vectors are normalized": dots / norms_b,
            "it is normalized over the wrong dimension: each row is a vector": (
                (a / a.norm(dim=0)) @ (b / b.norm(dim=0)).T
            ),
        }
        cases[what] = {"a": a, "b": b}, expected, mistakes
    compare_cases(write_it.cosine_matrix, cases)
    a[2] = 0
    not_zero = (a != 0).any(1)[:, None]
    got, nan = write_it.cosine_matrix(a, b), torch.where(not_zero, expected, torch.nan)
    mistakes = {"a row of zeros gives NaN: 0 / 0 is undefined": nan}
    compare(got, expected * not_zero, "with a row of zeros in a", mistakes)
    tiny = write_it.cosine_matrix(torch.full((1, 4), 1e-6), torch.full((1, 4), 1e-6))
    message = (
        "the number that prevents a division by zero is too large: a short vector has a cosine"
    )
    what = "two short vectors, of length 2e-6, in the same direction"
    compare(tiny, torch.ones(1, 1), what, {message: tiny})


def test_ex01_without_loops_or_a_cube(write_it):
    n, m, D = 40, 50, 60
    with Largest() as largest:
        got = write_it.cosine_matrix(torch.ones(n, D), torch.ones(m, D))
    if tuple(got.shape) != (n, m):
        fail(f"the shape is {tuple(got.shape)}; expected ({n}, {m})")
    if has_loop(write_it.cosine_matrix):
        fail("there is a loop in it; one matrix product computes all cosines")
    if largest.numel >= n * m * D:
        fail(
            f"it creates a tensor of {n} x {m} x {D} numbers: for 10,000 sentences of 768 numbers "
            "that is 300 GB. Normalize first; then one matrix product computes all cosines"
        )


def simclr(h: Tensor, temperature: float) -> Tensor:
    z, B = F.normalize(h, dim=-1).transpose(0, 1).flatten(0, 1), len(h)  # (2B, D)
    itself = torch.eye(2 * B, dtype=torch.bool)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, (torch.arange(2 * B) + B) % (2 * B))


def nll(logits: Tensor) -> Tensor:
    return -logits.log_softmax(1).diagonal()


TRANSPOSED = "the matrix is transposed: row i is first view i, and the softmax is over second views"
TWICE = "the softmax is applied twice: the loss function takes logits, not probabilities"


def test_ex02_contrastive_loss_by_hand(write_it):
    h = torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [0.6, 0.8]]])
    logits = torch.tensor([[1, 0.6], [0, 0.8]]) / 0.5
    expected = (math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-1.6))) / 2
    others = logits.masked_fill(torch.eye(2).bool(), -torch.inf)
    mistakes = {
        "it is multiplied by the temperature; divide by it": nll(logits / 4).mean(),
        "the temperature has no effect": nll(logits / 2).mean(),
        TRANSPOSED: nll(logits.T).mean(),
        "both directions are averaged; only first views are queries": (
            (nll(logits).mean() + nll(logits.T).mean()) / 2
        ),
        "it is the sum over sentences; expected the mean": nll(logits).sum(),
        TWICE: nll(logits.softmax(1)).mean(),
        "it is one loss for each sentence; expected their mean": nll(logits),
        "the sign is wrong: it is the NEGATIVE log of the probability": -nll(logits).mean(),
        "the own second view is missing from the softmax's denominator": (
            -(logits.diagonal() - others.logsumexp(1)).mean()
        ),
        "all 2B - 1 other views are candidates, as in SimCLR; expected only second views": (
            simclr(h, 0.5)
        ),
    }
    got = write_it.contrastive_loss(h, 0.5)
    compare(got, torch.tensor(expected), "the worked example", mistakes)


def test_ex02_contrastive_loss_of_random_vectors(write_it):
    rng = torch.Generator().manual_seed(2)
    for B, D, temperature in ((2, 3, 0.05), (9, 16, 0.05), (33, 8, 1.0)):
        h = (torch.randn(B, 2, D, generator=rng, dtype=torch.float64) * 5).requires_grad_()
        logits = F.cosine_similarity(h[:, None, 0], h[None, :, 1], dim=-1) / temperature  # (B, B)
        products, own = h[:, 0] @ h[:, 1].T / temperature, torch.arange(B)
        expected = F.cross_entropy(logits, own)
        got = write_it.contrastive_loss(h, temperature)
        mistakes = {
            "these are dot products, not cosines: normalize": F.cross_entropy(products, own),
            TRANSPOSED: F.cross_entropy(logits.T, own),
            "it is multiplied by the temperature": F.cross_entropy(logits * temperature**2, own),
            TWICE: F.cross_entropy(logits.softmax(1), own),
        }
        what = f"{B} random sentences, temperature {temperature}"
        compare(got, expected, what, mistakes, 1e-6)
        if not got.requires_grad:
            fail("the loss has no gradient: something was detached, or computed without gradients")
        (mine,), (theirs,) = torch.autograd.grad(got, h), torch.autograd.grad(expected, h)
        first, second = theirs.unbind(1)
        detached = {
            "the second views have no gradient: they are detached": (
                torch.stack([first, 0 * second], 1)
            ),
            "the first views have no gradient: they are detached": (
                torch.stack([0 * first, second], 1)
            ),
        }
        compare(mine, theirs, "the loss is correct, its gradient is not", detached)


def test_ex02_contrastive_loss_at_low_temperature(write_it):
    h = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(3))
    got = write_it.contrastive_loss(h, 0.001)
    cosines = F.cosine_similarity(h[:, None, 0], h[None, :, 1], dim=-1)
    expected = F.cross_entropy(cosines / 0.001, torch.arange(6))
    advice = "Use a function that computes the log softmax in one step"
    mistakes = {
        f"e^1000 overflows, and inf / inf is NaN. {advice}": torch.tensor(torch.nan),
        f"e^-1000 underflows, and log 0 is infinite. {advice}": torch.tensor(torch.inf),
    }
    compare(got, expected, "temperature 0.001", mistakes)


def masked_by(write_it, ids, special, seed=0, ratio=0.3):
    before, generator = ids.clone(), torch.Generator().manual_seed(seed)
    got = write_it.mask_tokens(ids, special, 4, 1000, ratio, generator)
    got = unpack_two(got, "x' and selected")
    if not torch.equal(ids, before):
        fail("ids itself was changed: x is needed later to find the replaced tokens; return a copy")
    return got


def random_sentences(R: int, T: int) -> tuple[Tensor, Tensor]:
    """Ids from 5 on, [CLS] 2, [SEP] 3, padding 0 -> ids, special."""
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 1000, (R, T), generator=rng)
    lengths = torch.randint(3, T + 1, (R, 1), generator=rng)
    position = torch.arange(T)
    ids = torch.where(position >= lengths, 0, torch.where(position == lengths - 1, 3, ids))
    ids[:, 0] = 2
    return ids, ids < 5


def test_ex03_mask_touches_no_special_token(write_it):
    ids, special = random_sentences(300, 20)
    x_masked, selected = masked_by(write_it, ids, special, ratio=0.9)
    shapes = {tuple(ids.shape), tuple(x_masked.shape), tuple(selected.shape)}
    if len(shapes) > 1 or selected.dtype != torch.bool:
        fail(
            f"x' has the shape {tuple(x_masked.shape)}, selected {tuple(selected.shape)} and type "
            f"{selected.dtype}; expected {tuple(ids.shape)} for both, and bool"
        )
    for name, id in {"[CLS]": 2, "[SEP]": 3, "padding": 0}.items():
        if count := int((selected & (ids == id)).sum()):
            of = int((ids == id).sum())
            fail(f"it touches {name}: {count} of {of} are selected; special tokens never are")
        if (x_masked != ids)[ids == id].any():
            fail(f"it touches {name}: it is another token in x', though it is not selected")
    if (x_masked != ids)[~selected].any():
        fail("some tokens differ in x' though they are not selected")


def test_ex03_mask_is_drawn_from_the_generator(write_it):
    ids, special = random_sentences(50, 20)
    first = masked_by(write_it, ids, special, seed=1)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again = masked_by(write_it, ids, special, seed=1)
    other = masked_by(write_it, ids, special, seed=2)
    torch.set_rng_state(state)
    if not all(map(torch.equal, first, again)):
        fail(
            "one seed gives two different results: all random numbers must come from `generator`, "
            "those for the random ids, too"
        )
    if torch.equal(first[1], other[1]):
        fail("two seeds select the same tokens: the random numbers must come from `generator`")
    x_masked, selected = masked_by(write_it, ids, special, ratio=1.0)
    became_mask, stayed_or_random = selected & (x_masked == 4), selected & (x_masked != 4)
    if stayed_or_random.any() and not (became_mask.any(1) & stayed_or_random.any(1)).any():
        fail(
            "in a sentence either all selected tokens become [MASK] or none does: draw once more "
            "for each token"
        )
    repeated = masked_by(write_it, ids[:1].repeat(200, 1), special[:1].repeat(200, 1))[1]
    if len(repeated.unique(dim=0)) == 1:
        fail("all rows are masked at the same positions: draw for each row and position")


def check_share(count: int, of: int, expected: float, what: str) -> None:
    """Fail if count / of is more than five standard deviations from expected."""
    if of == 0 or abs(count / of - expected) > 5 * math.sqrt(expected * (1 - expected) / of):
        fail(f"{what}: {count / max(of, 1):.3f} of {of:,}; expected {expected:.3f}")


def check_shares(ids: Tensor, special: Tensor, x_masked: Tensor, selected: Tensor, ratio: float):
    n, s = int((~special).sum()), int(selected.sum())
    if abs(s / n - 0.9 * ratio) < 0.1 * abs(s / n - ratio):
        fail(
            f"{s / n:.3f} of the tokens are selected; expected {ratio:.3f}. Do the tokens that are "
            "selected and stay count as selected?"
        )
    check_share(s, n, ratio, "the share of selected tokens")
    rounded = ((~special).sum(1) * ratio).round().long()
    if (selected.sum(1) == rounded).float().mean() > 0.7:
        fail(
            "the same share of every sentence is selected: draw for each token on its own, so that "
            "the number varies"
        )
    became_mask, stayed = selected & (x_masked == 4), selected & (x_masked == ids)
    half = "split the tokens that do not become [MASK] in halves"
    if abs(float(stayed.sum() / s) - 0.18) < 0.01:
        fail(f"18 % of the selected tokens stay and 2 % are random: {half}")
    if abs(float(stayed.sum() / s) - 0.02) < 0.01:
        fail(f"2 % of the selected tokens stay and 18 % are random: {half}")
    check_share(int(became_mask.sum()), s, 0.8, "the share of selected tokens that became [MASK]")
    check_share(int(stayed.sum()), s, 0.1, "the share of selected tokens that stay")
    random = x_masked[selected & ~became_mask & ~stayed]
    if len(random.unique()) < 0.7 * len(random) / (1 + len(random) / 1000):
        fail("the random ids have few different values: draw one from the vocabulary per token")
    if len(random) and (int(random.min()) < 0 or int(random.max()) >= 1000):
        fail(f"a random id is {int(random.max())} in a vocabulary of 1,000: ids are 0 to 999")


def test_ex03_mask_shares(write_it):
    ids, special = random_sentences(2000, 24)
    for ratio in (0.3, 0.15):
        x_masked, selected = masked_by(write_it, ids, special, ratio=ratio)
        check_shares(ids, special, x_masked, selected, ratio)
    nines, none_special = torch.full((500, 40), 9), torch.zeros(500, 40, dtype=torch.bool)
    generator = torch.Generator().manual_seed(3)
    x_masked, selected = write_it.mask_tokens(nines, none_special, 4, 8, 1.0, generator)
    drawn = sorted(set(x_masked[selected].tolist()) - {4, 9})
    if drawn != [0, 1, 2, 3, 5, 6, 7]:
        fail(
            f"in a vocabulary of 8 the random ids are {drawn} (besides [MASK], 4): expected any "
            "from 0 to 7, and none above"
        )
    for ratio, what in ((0.0, "no token"), (1.0, "every token that is not special")):
        selected = masked_by(write_it, ids, special, ratio=ratio)[1]
        if not torch.equal(selected, ~special & (ratio == 1)):
            fail(f"with a ratio of {ratio:g}, {what} must be selected")


class TableGenerator(nn.Module):
    """A generator whose prediction depends on the input token alone. It has a trainable weight."""

    def __init__(self, W: int = 60):
        super().__init__()
        self.table = (torch.arange(W) * 7 + 13) % W
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = []  # ids, mask, in train mode, with gradients

    def forward(self, ids, mask):
        self.calls.append((ids, mask, self.training, torch.is_grad_enabled()))
        return F.one_hot(self.table[ids], len(self.table)).float() * self.weight


def check_generator_calls(generator: TableGenerator, x: Tensor, mask: Tensor) -> None:
    if not generator.training or not all(training for _, _, training, _ in generator.calls):
        fail("the generator is in eval mode; leave it in its mode (the paper's run: train mode)")
    if not generator.calls:
        fail("the generator was not called")
    ids, given_mask = generator.calls[-1][:2]
    if torch.equal(ids, x):
        fail("the generator was given x; it must read x', in which tokens are masked")
    if given_mask is None or not torch.equal(given_mask.bool(), mask):
        fail("the generator was not given the mask: it would read padding")


def test_ex04_edit(write_it):
    rng = torch.Generator().manual_seed(6)
    x = torch.randint(5, 60, (40, 12), generator=rng)
    mask = torch.arange(12) < torch.randint(3, 13, (40, 1), generator=rng)
    x = torch.where(mask, x, 9)  # padding is not id 0 in every model
    x[:, 0] = torch.where(torch.arange(40) % 2 == 0, 1, 4)
    x[torch.arange(40), mask.sum(1) - 1] = 2
    selected = (torch.rand(x.shape, generator=rng) < 0.3) & mask & (x > 2)
    x_masked = torch.where(selected, 3, x)
    x_before, masked_before, generator = x.clone(), x_masked.clone(), TableGenerator()
    try:
        got = write_it.edit_sentences(generator, x, x_masked, mask)
        if not torch.is_grad_enabled():
            fail("gradients are still switched off afterwards: use `with torch.no_grad():`")
    finally:
        torch.set_grad_enabled(True)
    if not torch.equal(x, x_before) or not torch.equal(x_masked, masked_before):
        name = "x_masked" if torch.equal(x, x_before) else "x"
        fail(f"{name} itself was changed: x'' must be a new tensor")
    check_generator_calls(generator, x, mask)

    def with_cls(cls, rest):
        return torch.cat([cls, rest[:, 1:]], 1)

    best = generator.table[x_masked]
    kept_cls = with_cls(x[:, :1], best)
    right = torch.where(mask, kept_cls, 0)
    only_masked = torch.where(mask, torch.where(selected, kept_cls, x), 0)
    mistakes = {
        "position 0 is from x', where it may be masked; keep x's": with_cls(x_masked[:, :1], right),
        "only masked tokens are replaced: the paper's reading. The published code replaces "
        "every token": only_masked,
        "position 0 has the generator's token; keep x's [CLS]": torch.where(mask, best, 0),
        "padding has the generator's tokens; expected id 0": kept_cls,
        "padding is as in x; expected id 0": torch.where(mask, kept_cls, x),
        "position 0 has the first row's [CLS]; keep each row's own": (
            with_cls(x[:1, :1].expand(40, 1), right)
        ),
        "position 0 and padding have the generator's tokens; keep [CLS], set padding to 0": best,
        "[SEP] is kept; the published code replaces it, too": torch.where(x == 2, x, right),
    }
    compare(got, right, "x''", mistakes)
    if got.requires_grad or got.dtype != torch.int64:
        fail("x'' must be ids, int64, without a gradient")


def test_ex04_edit_makes_no_graph(write_it):
    generator, mask = TableGenerator(), torch.ones(1, 3, dtype=torch.bool)
    write_it.edit_sentences(generator, torch.tensor([[1, 5, 2]]), torch.tensor([[1, 3, 2]]), mask)
    if any(gradients for *_, gradients in generator.calls):
        fail("the generator ran with gradients: it is frozen, so their memory is wasted")


# ------------------------------------------------------------------------------------------------
# 5 to 8: the discriminator


def wrong_token_losses(logits: Tensor, replaced: Tensor, mask: Tensor) -> dict[str, Tensor]:
    labels = replaced.long()
    swapped = (~replaced & mask).long()

    def losses(logits, labels):  # (R, T)
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return each.view(labels.shape)

    each = losses(logits, labels)
    zero_logits = losses(logits * mask[..., None], labels)
    probabilities = logits[mask].softmax(-1)
    second, target = logits[..., 1][mask], replaced[mask].to(logits)
    return {
        "padding counts as original, as in the published code; expected the mean over tokens": (
            each.mean()
        ),
        "padding is left out of the sum, but counts in the number it is divided by": (
            (each * mask).mean()
        ),
        "it is the sum; expected the mean over tokens": each[mask].sum(),
        "it is the mean of the sentences' means; expected the mean over all tokens": (
            ((each * mask).sum(1) / mask.sum(1)).mean()
        ),
        "the classes are swapped: the first logit is of original, the second of replaced": (
            losses(logits, swapped)[mask].mean()
        ),
        "only replaced tokens count; original ones count, too": each[replaced].mean(),
        "position 0 is left out; it counts like the others": each[:, 1:][mask[:, 1:]].mean(),
        TWICE: F.cross_entropy(probabilities, labels[mask]),
        "only the second logit is used; the softmax is over both": (
            F.binary_cross_entropy_with_logits(second, target)
        ),
        "logits of 0 at padding still have a loss of log 2 each: leave these positions out": (
            zero_logits.mean()
        ),
    }


def check_token_loss(write_it, x, x_edited, mask, logits, what):
    differs = x != x_edited
    expected = F.cross_entropy(logits[mask], (differs & mask)[mask].long())
    with Unchanged(x=x, x_edited=x_edited, mask=mask):
        got = write_it.replaced_token_loss(logits, x, x_edited, mask)
    replaced, loss = unpack_two(got, "replaced and the loss")
    if isinstance(replaced, Tensor) and replaced.dtype != torch.bool:
        fail(f"replaced has the type {replaced.dtype}; expected bool")
    mistakes = {
        "padding counts as replaced where its ids differ": differs,
        "it is inverted: True where a token was replaced": ~differs & mask,
        "padding is where mask is False, not where an id is 0": differs & (x_edited != 0),
    }
    compare(replaced, differs & mask, f"replaced, {what}", mistakes)
    mistakes = wrong_token_losses(logits, differs & mask, mask)
    compare(loss, expected, f"the loss, {what}", mistakes)
    if not loss.requires_grad:
        fail("the loss has no gradient")
    (grad,) = torch.autograd.grad(loss, logits)
    if grad[~mask].any():
        fail("the loss has a gradient at padding, which must be ignored")


def test_ex05_replaced_token_loss(write_it):
    x, x_edited = torch.tensor([[1, 5, 6, 0]]), torch.tensor([[1, 7, 6, 0]])
    mask = torch.tensor([[True, True, True, False]])
    logits = torch.tensor([[[2.0, 0], [0, 1], [0, 0], [-1, 1]]]).requires_grad_()
    check_token_loss(write_it, x, x_edited, mask, logits, "the worked example")
    rng = torch.Generator().manual_seed(7)
    for R, T in ((1, 2), (5, 9), (16, 32)):
        mask = torch.arange(T) < torch.randint(2, T + 1, (R, 1), generator=rng)
        x = torch.randint(0, 5, (R, T), generator=rng)  # differs from x'' at padding, too
        x_edited = torch.where(mask, torch.randint(0, 5, (R, T), generator=rng), 0)
        logits = torch.randn(R, T, 2, generator=rng, dtype=torch.float64)
        large = (300 * torch.randn(R, T, 2, generator=rng)).requires_grad_()
        inputs = (write_it, x, x_edited, mask)
        check_token_loss(*inputs, (3 * logits).requires_grad_(), f"{R} random rows of {T}")
        check_token_loss(*inputs, large, f"{R} rows of {T} with large logits: e^x overflows")


def tiny_bert(layers: int) -> Bert:
    """.returned: the last output of its embeddings, and a copy of it."""
    torch.manual_seed(8)
    cfg = BertConfig(
        vocab_size=40,
        hidden_size=12,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    bert = Bert(cfg).eval()

    def remember(module, inputs, output):
        bert.returned = output, output.detach().clone()

    bert.embeddings.register_forward_hook(remember)
    return bert


@torch.no_grad()
def wrong_readings(bert: Bert, ids: Tensor, mask: Tensor, h: Tensor) -> dict[str, Tensor]:
    embedded, first = bert.embeddings(ids), h[:, None]  # (R, T, D), (R, 1, D)

    def put(x):
        return torch.cat([first, x[:, 1:]], 1)

    def read(x, mask=mask, before=False, after=False):
        for layer in bert.layers:
            x = layer(put(x) if before else x, mask)
            x = put(x) if after else x
        return x

    early = bert.embeddings(ids[:, 1:])
    added = torch.cat([embedded[:, :1] + first, embedded[:, 1:]], 1)
    again = "h replaced position 0 again"
    mistakes = {
        "h is not used: position 0 is still [CLS]": read(embedded),
        "h was added to [CLS]; replace [CLS], so that nothing of it is left": read(added),
        "h is at every position": read(first.expand_as(embedded)),
        "h was inserted, which moves all tokens by one position": (
            read(torch.cat([first, embedded[:, :-1]], 1))
        ),
        "h is at the last position": read(torch.cat([embedded[:, :-1], first], 1)),
        "h was put in after the layers; no token has read it": put(read(embedded)),
        "the tokens after h have the position embeddings of the token before: embed all ids, "
        "then replace": read(torch.cat([first, early], 1)),
    }
    if len(bert.layers) > 0:
        every = torch.ones_like(mask)
        mistakes |= {
            "not all layers were applied": put(embedded),
            f"{again} after a layer; only the first layer reads it": (
                read(put(embedded), after=True)
            ),
            "the layers were not given the mask": read(put(embedded), mask=every),
        }
    if len(bert.layers) > 1:
        mistakes[f"{again} before each layer; only the first layer reads it"] = read(
            embedded, before=True
        )
    return mistakes


def test_ex06_h_in_place_of_cls(write_it):
    rng = torch.Generator().manual_seed(9)
    for layers, R, T in ((1, 2, 5), (3, 4, 9), (0, 1, 3)):
        bert = tiny_bert(layers)
        ids = torch.randint(0, 40, (R, T), generator=rng)
        mask = torch.arange(T) < torch.randint(2, T + 1, (R, 1), generator=rng)
        h = torch.randn(R, 12, generator=rng).requires_grad_()
        mistakes, wanted = wrong_readings(bert, ids, mask, h), bert(ids, mask, cls_vector=h)
        got = error = None
        try:
            got = write_it.read_with_h(bert, ids, mask, h)
        except RuntimeError as raised:
            if isinstance(raised, NotImplementedError):
                raise
            error = raised
        longer = str(T + 1) in str(error) or isinstance(got, Tensor) and got.shape[1:2] == (T + 1,)
        if longer:
            fail("h is before [CLS], so the sentence is one token longer; replace [CLS] by h")
        if error:
            raise error
        real = mask[..., None]
        if isinstance(got, Tensor) and got.shape == wanted.shape:
            got, wanted = got * real, wanted * real
            mistakes = {message: value * real for message, value in mistakes.items()}
        compare(got, wanted, f"{layers} layer{'s' * (layers != 1)}", mistakes)
        returned, copy = bert.returned
        if not torch.equal(returned.detach(), copy):
            fail("the output of bert.embeddings was overwritten; create a new tensor instead")
        check_gradients(bert, got, wanted, h, torch.randn(got.shape, generator=rng))


def check_gradients(bert: Bert, got: Tensor, wanted: Tensor, h: Tensor, weights: Tensor) -> None:
    word, of_h = bert.embeddings.word.weight, None
    if got.requires_grad:
        scalar = (got * weights).sum()
        of_h, of_words = torch.autograd.grad(scalar, (h, word), allow_unused=True)
    if of_h is None:
        fail(
            "no gradient reaches h, by which the discriminator trains the encoder: is it detached?"
        )
    expected = torch.autograd.grad((wanted * weights).sum(), (h, word))
    compare(of_h, expected[0], "the gradient of h", tolerance=1e-4)
    of_words = torch.zeros_like(word) if of_words is None else of_words
    none = "none reaches the other positions: they were detached, or computed without gradients"
    mistakes = {none: torch.zeros_like(word)}
    what = "the gradient of the word embeddings"
    compare(of_words, expected[1], what, mistakes, tolerance=1e-4)


def wrong_attentions(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Values of common mistakes; the right value has the name ""."""
    keys, queries = mask[:, None, None, :], mask[:, None, :, None]
    T, d = q.shape[-2:]
    scores = q @ k.transpose(-1, -2)
    scaled = scores / d**0.5

    def read(scores, hidden=~keys, fill=-torch.inf, dim=-1):
        return scores.masked_fill(hidden, fill).softmax(dim) @ v

    root = "divide by sqrt(d)"
    over_queries = "the softmax is over queries; each query's weights over keys must sum to 1"
    at_queries = "the mask is applied to queries; it must hide the keys at padding"
    return {
        "": read(scaled),
        f"the scores are divided by sqrt(T), T being the number of tokens; {root}": (
            read(scores / T**0.5)
        ),
        "the output is divided by sqrt(d); divide the scores, before the softmax": (
            read(scores) / d**0.5
        ),
        "the outputs of queries at padding are 0; compute them like the others": (
            read(scaled) * queries
        ),
        "the mask is applied to keys and queries; it must hide only the keys at padding": (
            read(scaled, ~keys | ~queries, -1e9)
        ),
        "all scores of queries at padding are 0; the mask must hide keys": read(
            scaled, ~queries, 0
        ),
        "the mask has no effect: padding is read like a token": scaled.softmax(-1) @ v,
        "the scores are not divided by sqrt(d)": read(scores),
        f"the scores are divided by d; {root}": read(scores / d),
        f"the scores are multiplied by sqrt(d); {root}": read(scores * d**0.5),
        "padding has the score 0, and e^0 is 1: set it to minus infinity": read(scaled, ~keys, 0),
        "the weights of padding are set to 0 after the softmax, so the others no longer sum to 1": (
            (scaled.softmax(-1) * keys) @ v
        ),
        over_queries: read(scaled, dim=-2),
        at_queries: read(scaled, ~queries),
        f"{at_queries} ": read(scaled, ~queries, -1e9),
        f"{over_queries} ": read(scaled, ~keys, -1e9, -2),
        "the mask is inverted: padding is read and tokens are not": read(scaled, keys),
    }


def test_ex07_attention(write_it):
    rng = torch.Generator().manual_seed(10)
    numbers = ([0.0, 1, 1], [1.0, 0, 5], [10.0, 20, 99])
    mask = torch.tensor([[True, True, False]])
    inputs = {"the worked example": (*(torch.tensor(n).view(1, 1, 3, 1) for n in numbers), mask)}
    for B, H, T, d in ((1, 1, 2, 3), (3, 2, 5, 4), (4, 3, 16, 8)):
        mask = torch.arange(T) < torch.randint(1, T, (B, 1), generator=rng)
        q, k, v = (2 * torch.randn(B, H, T, d, generator=rng) for _ in range(3))
        inputs[f"B {B}, H {H}, T {T}, d {d}"] = (q, k, v, mask)
    cases = {}
    for what, tensors in inputs.items():
        mistakes = wrong_attentions(*tensors)
        cases[what] = dict(zip(("q", "k", "v", "mask"), tensors)), mistakes.pop(""), mistakes
    compare_cases(write_it.attention, cases)
    first, rest = (torch.randn(1, 1, 4, 2, generator=rng) for _ in range(2))
    long = torch.cat([first, 1e8 * rest], 2)
    got = write_it.attention(long, long, long, torch.arange(8)[None] < 4)[:, :, :4]
    expected = F.scaled_dot_product_attention(first, first, first)
    what = "a sentence with large numbers at its padding, which must change nothing"
    compare(got, expected, f"{what} (NaN: the softmax has seen the padding's scores)")
    far, values = torch.full((1, 1, 4, 1), 20.0), torch.tensor([1.0, 2, 3, 4]).view(1, 1, 4, 1)
    got = write_it.attention(far, -far, values, torch.tensor([[True, True, True, False]]))
    what = "scores of -400 for all tokens: padding's score must be lower than any, minus infinity"
    compare(got, torch.full((1, 1, 4, 1), 2.0), what)


def safetensors_bytes(tensors: dict, order=None, pad: int = 0, metadata: bool = True) -> bytes:
    """A file whose header has the given order, which need not be the data's."""
    header, data = {"__metadata__": {"format": "pt"}} if metadata else {}, b""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    for name, tensor in tensors.items():
        raw = b""
        if tensor.numel():
            raw = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        kind, shape = kinds[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        data += raw
    order = order or sorted(header)
    text = json.dumps({n: header[n] for n in order}, ensure_ascii=False).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + data


def test_ex08_safetensors_by_hand(write_it, tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path = tmp_path / "hand.safetensors"
    path.write_bytes(bytes.fromhex("3600000000000000") + header + bytes.fromhex("0000C03F000000C0"))
    error = None
    try:
        got = write_it.read_safetensors(path)
    except ValueError as raised:
        error = raised
    if error:
        fail(
            f"the worked example is complete, but it raised a ValueError: {error} (is the length "
            "read as little-endian?)"
        )
    if not isinstance(got, dict) or list(got) != ["a"]:
        returned = sorted(got) if isinstance(got, dict) else type(got).__name__
        fail(f"the worked example has one tensor, a; it returned {returned}")
    if not isinstance(got["a"], Tensor):
        fail(f"a is a {type(got['a']).__name__}; expected a torch.Tensor")
    raw = bytearray(path.read_bytes())
    from_file, from_header = (
        torch.frombuffer(raw[i : i + 8], dtype=torch.float32) for i in (0, 54)
    )
    mistakes = {
        "offsets are from the start of the data, not of the file": from_file,
        "the data starts after the header AND the 8 bytes of its length": from_header,
    }
    compare(got["a"], torch.tensor([1.5, -2.0]), "the worked example", mistakes)


def test_ex08_safetensors_of_every_kind(write_it, tmp_path):
    rng = torch.Generator().manual_seed(11)
    tensors = {
        "z.weight": torch.randn(3, 5, generator=rng),
        "ids": torch.randint(-(2**40), 2**40, (7,), generator=rng),
        "half": torch.randn(4, 1, 2, generator=rng).half(),
        "brain": torch.randn(6, generator=rng).bfloat16(),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "ünï": torch.randn(2, generator=rng),
    }
    path = tmp_path / "all.safetensors"
    order = ["ünï", "one", "__metadata__", "ids", "none", "brain", "half", "z.weight"]
    for content in (
        safetensors_bytes(tensors, metadata=False),
        safetensors_bytes(tensors),
        safetensors_bytes(tensors, order, pad=5),
    ):
        path.write_bytes(content)
        try:
            got = write_it.read_safetensors(path)
        except (KeyError, TypeError) as error:
            got = error
        if isinstance(got, Exception) and b"__metadata__" not in content:
            raise got
        if isinstance(got, Exception) or "__metadata__" in got:
            fail("__metadata__ is not a tensor: it holds notes; leave it out")
        check_tensors(got, tensors)
    matrix = torch.arange(6.0).view(2, 3)
    write_safetensors(path, {"w": matrix})  # the repository's own writer
    mistakes = {"numbers are in row-major order; this is column-major": matrix.view(3, 2).T}
    got = write_it.read_safetensors(path)["w"]
    compare(got, matrix, "a file of the repository's writer", mistakes)


def check_tensors(got: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    if sorted(got) != sorted(tensors):
        fail(f"the file holds {sorted(tensors)}; it returned {sorted(got)}")
    for name, tensor in tensors.items():
        if got[name].dtype != tensor.dtype:
            fail(f"{name} has the type {got[name].dtype}; expected {tensor.dtype}")
        if got[name].shape != tensor.shape:
            note = " (one number, no dimension)" * (tensor.ndim == 0)
            found, expected = tuple(got[name].shape), tuple(tensor.shape)
            fail(f"{name} has the shape {found}; expected {expected}{note}")
        what = f"{name}, {tensor.dtype} (the header may list tensors in any order)"
        compare(got[name].double(), tensor.double(), what, tolerance=0)


def test_ex08_safetensors_cut_short(write_it, tmp_path):
    tensors = {"a": torch.ones(8), "b": torch.ones(8)}
    whole, path = safetensors_bytes(tensors, metadata=False), tmp_path / "short.safetensors"
    for size in (0, 5, 8, 40, len(whole) - 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        raised, what = None, f"a file cut short after {size} of {len(whole)} bytes"
        try:
            write_it.read_safetensors(path)
        except NotImplementedError:
            raise
        except Exception as error:
            raised = error
        if raised is None:
            fail(f"{what} is read as if it were complete; expected a ValueError")
        if not isinstance(raised, ValueError):
            fail(f"{what} raises {type(raised).__name__}; expected a ValueError with a message")


# ------------------------------------------------------------------------------------------------
# 9 to 12: evaluation and checkpoints


def ranks_of(values, kind: str = "average") -> np.ndarray:
    values = np.asarray(values, float)
    if kind == "in order":
        return np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1.0
    if kind == "dense":
        return np.unique(values, return_inverse=True)[1] + 1.0
    less, equal = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
    return less + {"average": (equal + 1) / 2, "lowest": 1, "highest": equal}[kind]


def wrong_spearmans(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    def correlation(a, b):
        return np.corrcoef(a, b)[0, 1]

    def with_ranks(kind):
        return correlation(ranks_of(a, kind), ranks_of(b, kind))

    d, n = ranks_of(a) - ranks_of(b), len(a)
    order = correlation(np.argsort(a, kind="stable"), np.argsort(b, kind="stable"))
    mean = "expected the mean of their ranks"
    return {
        "argsort returns which element is first, not the rank of the first element": order,
        f"equal values are ranked in their order in the list; {mean}": with_ranks("in order"),
        f"equal values are ranked densely (1, 2, 2, 3); {mean} (1, 2.5, 2.5, 4)": (
            with_ranks("dense")
        ),
        f"equal values have the lowest of their ranks; {mean}": with_ranks("lowest"),
        f"equal values have the highest of their ranks; {mean}": with_ranks("highest"),
        "this is Pearson's correlation of the values; expected that of their ranks": (
            correlation(a, b)
        ),
        "the formula 1 - 6 sum d^2 / (n (n^2 - 1)) is valid only without ties": (
            1 - 6 * (d @ d) / (n * (n**2 - 1))
        ),
        "the sign is wrong": -with_ranks("average"),
    }


def test_ex09_spearman(write_it):
    rng = np.random.default_rng(12)
    pairs = {"the worked example": np.array([[20.0, 10, 80, 20, 40], [4, 2, 1, 5, 3]])}
    for P, levels in ((2, 1000), (20, 4), (50, 6), (300, 11), (300, 10**6)):
        ab = rng.integers(0, levels, (2, P)).astype(float)
        ab[0, : P // 2] += ab[1, : P // 2]
        assert ab.std(1).all()  # otherwise the correlation is undefined
        pairs[f"{P} pairs, {levels} different values"] = ab
    cases = {}
    for what, (a, b) in pairs.items():
        expected = np.corrcoef(ranks_of(a), ranks_of(b))[0, 1]
        cases[what] = {"a": a, "b": b}, expected, wrong_spearmans(a, b)
    compare_cases(write_it.spearman, cases, 1e-9)


def wrong_uniformities(distance: np.ndarray, P: int) -> dict[str, float]:
    """distance: between the 2P rows."""

    def uniformity(distance, factor=2):
        return np.log(np.exp(-factor * distance**2).mean())

    def upper(square, k=1):
        return square[np.triu_indices(len(square), k)]

    n, pairs = 2 * P, upper(distance)
    without_partners = distance[np.triu(~np.eye(n, k=P, dtype=bool), 1)]
    u, v, between = distance[:P, :P], distance[P:, P:], distance[:P, P:]
    return {
        "a row is paired with itself, at distance 0": uniformity(distance),
        "a row is paired with itself, once, at distance 0": uniformity(upper(distance, 0)),
        "pairs of rows with the same vector are left out; they count": (
            uniformity(distance[distance > 1e-9])
        ),
        "square the distances": np.log(np.exp(-2 * pairs).mean()),
        "the factor 2 is missing: exp(-2 |x - y|^2)": uniformity(pairs, 1),
        "it is the mean of the logs; expected the log of the mean": (-2 * pairs**2).mean(),
        "the log is missing": np.exp(-2 * pairs**2).mean(),
        "it is the mean of u's and v's own; expected one list of the rows of both": (
            np.mean([uniformity(upper(u)), uniformity(upper(v))])
        ),
        "the sum over pairs is divided by n * n; there are n (n - 1) / 2 pairs": (
            np.log(np.exp(-2 * pairs**2).sum() / n**2)
        ),
        "the sum over pairs, each twice, is divided by n * n; there are n (n - 1)": (
            np.log(2 * np.exp(-2 * pairs**2).sum() / n**2)
        ),
        "pairs of partners are left out; they count like others": uniformity(without_partners),
        "only u is used; expected all 2P vectors": uniformity(upper(u)),
        "only pairs of a u with a v are used; expected pairs of all 2P vectors": (
            uniformity(between)
        ),
    }


def test_ex10_alignment_and_uniformity(write_it):
    rng = np.random.default_rng(13)
    cases = {"the worked example": (np.array([[1.0, 0], [1, 0]]), np.array([[1.0, 0], [0, 1]]))}
    for P, D in ((2, 2), (10, 5), (120, 16)):
        u = normalized(rng.normal(size=(P, D)))
        v = normalized(u + 0.3 * normalized(rng.normal(size=(P, D))))
        v[0] = u[0]  # two rows with the same vector
        cases[f"{P} pairs"] = u, v
    for what, (u, v) in cases.items():
        x, between = np.concatenate([u, v]), np.linalg.norm(u - v, axis=1)
        distance = np.linalg.norm(x[:, None] - x, axis=-1)
        with Unchanged(u=u, v=v):
            got = write_it.alignment_and_uniformity(u, v)
        align, uniform = unpack_two(got, "alignment and uniformity")
        expected = (between**2).mean()
        mistakes = {
            "square the distances": between.mean(),
            "it is the sum over pairs; expected the mean": (between**2).sum(),
            "it is the mean over all numbers; |u - v|^2 is the sum of a pair's D squares": (
                ((u - v) ** 2).mean()
            ),
            "it is 1 - cosine; |u - v|^2 is twice that": expected / 2,
        }
        compare(align, expected, f"alignment, {what}", mistakes, 1e-9)
        upper = distance[np.triu_indices(len(x), 1)]
        expected = np.log(np.exp(-2 * upper**2).mean())
        mistakes = wrong_uniformities(distance, len(u))
        compare(uniform, expected, f"uniformity, {what}", mistakes, 1e-9)


def recalls(u, v, k: int) -> dict[str, float]:
    """Recall with common mistakes; the right value has the name ""."""
    x, P = np.concatenate([u, v]), len(u)
    cosines = x @ x.T
    partner = (np.arange(2 * P) + P) % (2 * P)
    own = cosines[np.arange(2 * P), partner][:, None]
    closer = cosines > own + 1e-9
    with_itself = closer.sum(1) + 1
    np.fill_diagonal(closer, False)
    ranks = closer.sum(1) + 1
    ties = ((np.abs(cosines - own) <= 1e-9) & ~np.eye(2 * P, dtype=bool)).sum(1) - 1
    from_u = (cosines[:P, P:] > own[:P] + 1e-9).sum(1) + 1
    from_v = (cosines[P:, :P] > own[P:] + 1e-9).sum(1) + 1

    def percent(ranks, k=k):
        return 100 * (ranks <= k).mean()

    return {
        "": percent(ranks),
        "a sentence finds itself, as the nearest of all: leave it out": percent(with_itself),
        "only the sentences of u are queries; those of v are, too": percent(ranks[:P]),
        "only the sentences of v are queries; those of u are, too": percent(ranks[P:]),
        "u is searched in v only; the candidates are all others of both lists": percent(from_u),
        "each list is searched in the other only; the candidates are all others of both": (
            percent(np.concatenate([from_u, from_v]))
        ),
        "it is a fraction; expected a percentage": (ranks <= k).mean(),
        "k is off by one: the partner may be the k-th": percent(ranks, k - 1),
        "k is off by one: the partner must be among the first k": percent(ranks, k + 1),
        "others that are equally near come first; the partner wins ties": percent(ranks + ties),
    }


def test_ex11_recall(write_it):
    u, v = np.array([[1.0, 0], [0, 1]]), np.array([[0.6, 0.8], [-1, 0]])
    assert (recalls(u, v, 1)[""], recalls(u, v, 2)[""]) == (50, 100)
    inputs = {f"the worked example, k = {k}": (u, v, k) for k in (1, 2)}
    rng = np.random.default_rng(14)
    corners = np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])  # of a tetrahedron
    corners = normalized(corners + 0.1 * rng.normal(size=(4, 3)))
    inputs["four vectors with negative cosines"] = corners[:2], corners[2:], 1
    for P, noise, k in ((3, 0.5, 1), (40, 0.7, 1), (40, 0.9, 5), (150, 0.8, 10), (30, 0.4, 30)):
        u = normalized(rng.normal(size=(P, 6)))
        v = normalized(u + noise * rng.normal(size=(P, 6)))
        if P == 40:  # several equal sentences: ties
            u[:10], v[:10] = u[0], v[0]
        inputs[f"{P} pairs, k = {k}"] = u, v, k
    cases = {}
    for what, (u, v, k) in inputs.items():
        mistakes = recalls(u, v, k)
        cases[what] = {"u": u, "v": v, "k": k}, mistakes.pop(""), mistakes
    compare_cases(write_it.recall_at_k, cases)


def new_model(seed: int, momentum: bool = False, frozen: bool = False):
    torch.manual_seed(seed)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)
    model = nn.Sequential(*layers)
    model[0].weight.requires_grad_(not frozen)  # then it has no state, unlike the later ones
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


def save(write_it, model, optimizer) -> dict[str, Tensor]:
    missing = None
    try:
        tensors = write_it.state_dict(model, optimizer)
    except KeyError as error:
        missing = error
    if missing:
        fail(
            f"state_dict looked for {missing}, which this optimizer or parameter does not have: "
            "save whatever state it has"
        )
    if not isinstance(tensors, dict) or not tensors:
        returned = "an empty one" if isinstance(tensors, dict) else type(tensors).__name__
        fail(f"expected a dict of tensors; state_dict returned {returned}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            fail(f"{name!r} is a {kind}: a safetensors file holds tensors and nothing else")
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}  # as in a file


def load(write_it, tensors: dict[str, Tensor], model, optimizer) -> None:
    before, missing = [id(p) for p in model.parameters()], None
    try:
        write_it.load_state_dict(tensors, model, optimizer)
    except KeyError as error:
        missing = error
    if missing:
        fail(
            f"load_state_dict looked for {missing}, which this optimizer or parameter does not "
            "have: load whatever state was saved"
        )
    of_optimizer = [id(p) for p in optimizer.param_groups[0]["params"]]
    if [id(p) for p in model.parameters()] != before or of_optimizer != before:
        fail("the model and the optimizer no longer share parameters: copy values into these")


def check_loaded(model, optimizer, other, fresh, saved: int) -> None:
    """other, fresh: the model and the optimizer into which `saved` tensors were loaded."""
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        if not torch.equal(a, b):
            fail(f"directly after load_state_dict the weight {name} differs")
    for (name, a), b in zip(model.named_buffers(), other.buffers()):
        if not torch.equal(a, b):
            fail(f"BatchNorm's buffer {name} was not saved: parameters() has only what is trained")
    for i, (a, b) in enumerate(zip(model.parameters(), other.parameters())):
        had, has = optimizer.state[a], fresh.state.get(b, {})
        if not had and has:
            fail(f"parameter {i} had no gradient, but has a state: the states were mixed up")
        if had and not has and saved > len(model.state_dict()):
            fail(
                f"{saved} tensors were saved, and the optimizer has none of them: its state is "
                "by whole numbers (0, 1, ...), and names must mean the same in a new process"
            )
        if had and not has:
            fail("the optimizer starts anew: save its moments, and AdamW's number of steps")
        for name in had:
            if name not in has:
                fail(f"the optimizer's {name} of parameter {i} was not loaded")
            old, new = (torch.as_tensor(state[name]).flatten() for state in (had, has))
            if not torch.equal(old, new):
                why = " (the bias correction reads it)" if name == "step" else ""
                values = f"{float(new[0]):g} after load_state_dict, {float(old[0]):g} before"
                fail(f"the optimizer's {name} of parameter {i} is {values}{why}")


def check_resumed(write_it, stop: int, end: int, momentum: bool, frozen: bool) -> None:
    straight, optimizer = new_model(0, momentum, frozen)
    train(straight, optimizer, 0, end)

    model, optimizer = new_model(0, momentum, frozen)
    train(model, optimizer, 0, stop)
    tensors = save(write_it, model, optimizer)
    other, fresh = new_model(1, momentum, frozen)
    load(write_it, tensors, other, fresh)
    check_loaded(model, optimizer, other, fresh, len(tensors))
    train(other, fresh, stop, end)
    for (name, a), b in zip(straight.state_dict().items(), other.state_dict().values()):
        if not torch.equal(a, b):
            fail(f"resumed after step {stop}, {name} at step {end} differs from the straight run's")


def test_ex12_resume_exactly(write_it):
    check_resumed(write_it, 1, 3, momentum=False, frozen=False)
    check_resumed(write_it, 6, 11, momentum=False, frozen=False)
    check_resumed(write_it, 2, 5, momentum=True, frozen=False)
    check_resumed(write_it, 2, 5, momentum=False, frozen=True)


def test_ex12_the_smallest_run(write_it):
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    tensors = save(write_it, model, torch.optim.SGD(model.parameters(), lr=0.1))
    load(write_it, tensors, other, torch.optim.SGD(other.parameters(), lr=0.1))
    if not torch.equal(model.weight, other.weight) or not torch.equal(model.bias, other.bias):
        fail("nn.Linear(1, 1) and SGD: weight and bias were not loaded")
