"""Fast equals plain: each function beside the one of PyTorch that it stands for, work left out beside work done, a whole step beside itself."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

from test_step import Words

import bert
import diffcse
import fast

SHAPES = [((5, 7), 3), ((4, 6, 16), 48), ((1, 1), 1), ((130, 33), 257), ((3, 2, 2, 8), 5)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@pytest.mark.parametrize("shape,out", SHAPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_linear_equals_pytorchs_forward_and_back(shape, out, gelu, strided):
    torch.manual_seed(out)
    x, weight, bias = torch.randn(shape) * 3, torch.randn(out, shape[-1]), torch.randn(out) * 10
    if strided:
        x, weight = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2], torch.randn(shape[-1], out).t()
    results = []
    for work in (lambda x, w, b: fast.linear(x, w, b, gelu), lambda x, w, b: F.linear(F.gelu(x) if gelu else x, w, b)):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        if strided:
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = work(*leaves)
        grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), leaves)
        results.append((y.detach(), *grads))
    for got, want in zip(*results):
        assert got.shape == want.shape and relative(got, want) < 1e-6


def test_linear_leaves_fp64_autocast_and_nothing_at_all_to_pytorch(monkeypatch):
    monkeypatch.setattr(fast, "product", lambda *a: pytest.fail("oneDNN was asked"))
    w, b = torch.randn(3, 4), torch.randn(3)
    assert fast.linear(torch.randn(2, 4).double(), w.double(), b.double()).dtype == torch.float64
    assert fast.linear(torch.zeros(0, 4), w, b).shape == (0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.linear(torch.randn(2, 4), w, b).dtype == torch.bfloat16


def test_linear_makes_only_the_gradients_that_are_asked_for():
    x, w, b = torch.randn(2, 4), torch.randn(3, 4, requires_grad=True), torch.randn(3)
    fast.linear(x, w, b, gelu=True).sum().backward()
    assert x.grad is None and b.grad is None and relative(w.grad, F.gelu(x).sum(0).expand(3, 4)) < 1e-6


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_dropout_has_its_rate_its_mean_and_its_gradient(p):
    torch.manual_seed(1)
    x = torch.ones(401, 1003, requires_grad=True)
    y = fast.dropout(x, p, True)
    y.backward(torch.full_like(y, 2.0))
    n, dropped = y.numel(), int((y == 0).sum())
    assert abs(dropped - n * p) < 5 * math.sqrt(n * p * (1 - p))
    kept = y.detach() != 0
    torch.testing.assert_close(y.detach()[kept], torch.full((n - dropped,), 1 / (1 - p)), rtol=1e-4, atol=0)
    torch.testing.assert_close(x.grad, 2 * y.detach())  # the same places
    torch.manual_seed(1)
    assert torch.equal(fast.dropout(x, p, True), y) and not torch.equal(fast.dropout(x, p, True), y)  # from torch's numbers


def test_dropouts_four_numbers_of_a_draw_do_not_know_of_each_other():
    torch.manual_seed(2)
    dropped = (fast.dropout(torch.ones(200_000, 4), 0.1, True) == 0).double()
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(200_000)
    assert (dropped.mean(0) - 0.1).abs().max() < 5 * math.sqrt(0.09 / 200_000)
    assert abs(float(torch.corrcoef(torch.stack([dropped[:-1, 3], dropped[1:, 0]]))[0, 1])) < 5 / math.sqrt(200_000)


def test_dropout_rests_out_of_training_and_at_rate_0():
    x = torch.randn(5, 3)
    assert torch.equal(fast.dropout(x, 0.5, False), x) and torch.equal(fast.dropout(x, 0.0, True), x)
    assert fast.dropout(torch.zeros(0, 3), 0.5, True).shape == (0, 3)


@pytest.mark.parametrize("n", [0, 1, fast.ROWS - 1, fast.ROWS, fast.ROWS + 1, 3 * fast.ROWS + 5])
def test_best_words_equal_the_argmax_of_all_logits(n):
    torch.manual_seed(n)
    x, words, bias = torch.randn(n, 8), torch.randn(300, 8), torch.randn(300)
    assert torch.equal(fast.best_words(x, words, bias), (x.double() @ words.double().T + bias.double()).argmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_best_words_draws_as_the_softmax_says(temperature):
    torch.manual_seed(3)
    n = 200_000
    x, words = torch.randn(1, 6), torch.randn(7, 6)
    bias = torch.tensor([0, 0, -torch.inf, 1, -torch.inf, -3, -torch.inf])
    drawn = torch.cat([fast.best_words(x.expand(fast.ROWS * 10, 6), words, bias, temperature) for _ in range(n // (fast.ROWS * 10) + 1)])[:n]
    expected = n * ((x @ words.T + bias) / temperature).softmax(-1)[0]
    counts = drawn.bincount(minlength=7)
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    chi_square = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    assert chi_square < 20.5  # 3 degrees of freedom: passed in all but 1 of 7,000


# ---------------------------------------------------------------------------------------------------- work left out


def model(family: str, seed: int = 0) -> bert.Bert:
    torch.manual_seed(seed)
    cfg = bert.BertConfig(model_type=family, vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
                          max_position_embeddings=40, pad_token_id=1, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    return bert.Bert(cfg).train()


def batch(R: int = 6, T: int = 9):
    x = torch.randint(6, 60, (R, T))
    mask = torch.arange(T) < torch.tensor([9, 4, 7, 2, 9, 5] * (R // 6))[:, None]
    x[:, 0] = Words.cls
    x[torch.arange(R), mask.sum(1) - 1] = Words.sep
    return x.masked_fill(~mask, Words.pad), mask


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("room", [0, 7])  # places beyond the real ones, as on a GPU
@pytest.mark.parametrize("told", [False, True])
def test_a_model_without_padding_is_the_model_with_it(family, room, told):
    """The states and the gradients of real tokens, of all and of those wanted, without and with a vector in place of [CLS]."""
    f = model(family).double()
    x, mask = batch()
    h = torch.randn(6, 32, dtype=torch.float64, requires_grad=True) if told else None
    chosen = mask & (torch.rand(mask.shape) < 0.5)
    weights = torch.randn(*mask.shape, 32, dtype=torch.float64)

    def gradients(loss) -> list:
        parameters = [*f.parameters()] + [h] * told
        return [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]

    plain = f(x, mask, h)  # (R, T, D)
    for where in (mask, chosen, torch.arange(9).expand(6, 9) == 0):
        want = gradients((f(x, mask, h) * weights)[where].sum())
        for tokens, wanted in [(bert.places(mask, int(mask.sum()) + room), None), (bert.places(mask, int(mask.sum()) + room), bert.places(where)),
                               (None, bert.places(where))]:  # fmt: skip
            states = f(x, mask, h, tokens=tokens, wanted=wanted)  # (n, D)
            at = tokens if wanted is None else wanted
            use = where.flatten()[at]
            torch.testing.assert_close(states[use], plain[where], rtol=0, atol=1e-5)
            got = gradients((states * weights.view(-1, 32)[at])[use].sum())
            assert len(got) == len(want)
            for g, w in zip(got, want):
                assert (g - w).norm() <= 1e-12 * w.norm() + 1e-12


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_one_padded_token_that_leaks_would_be_seen(family):
    """What stands in the padding, and how much of it there is, changes nothing; that attention reads one padded place more would."""
    f = model(family)
    x, mask = batch()
    firsts = torch.arange(6) * 9
    c = f(x, mask, tokens=bert.places(mask), wanted=firsts)
    wider, wider_mask = F.pad(x, (0, 3), value=Words.pad), F.pad(mask, (0, 3))
    torch.testing.assert_close(f(wider, wider_mask, tokens=bert.places(wider_mask), wanted=torch.arange(6) * 12), c, rtol=0, atol=1e-5)
    if family != "roberta":  # whose positions are counted by what is not the padding's id
        rubbish = torch.where(mask, x, torch.randint(6, 60, x.shape))
        torch.testing.assert_close(f(rubbish, mask, tokens=bert.places(mask, 54), wanted=firsts), c, rtol=0, atol=1e-5)
    leak = mask.clone()
    leak[3, 2] = True
    leaked = f(x, leak, tokens=bert.places(leak), wanted=firsts)
    assert (leaked[3] - c[3]).abs().max() > 1e-2
    torch.testing.assert_close(leaked[[0, 1, 2, 4, 5]], c[[0, 1, 2, 4, 5]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"edit_scope": "masked", "pads_in_loss": False, "views": "first", "protect_sep": True}, {"lam": 0.0}],
                         ids=["published", "paper", "simcse"])  # fmt: skip
@pytest.mark.parametrize("room", [None, diffcse.Room(54, 54, 54)], ids=["exact", "room"])
def test_a_fast_step_is_the_plain_step(how, room, monkeypatch):
    """fp32 by oneDNN, without padding, beside fp64 by PyTorch with all of it: the loss, every sum and every gradient within 1e-5."""
    results = []
    for plain in (False, True):
        torch.manual_seed(5)
        cfg = diffcse.Config(**{"lam": 0.5, "temperature": 0.5} | how)
        G = bert.BertForMaskedLM(model("distilbert", 2).cfg)
        ours = diffcse.TrainingModel(cfg, model("bert", 1), Words, G if cfg.lam else None, model("bert", 1) if cfg.lam else None).train()
        torch.manual_seed(6)
        x, mask = batch()
        selected = mask & (torch.rand(mask.shape) < 0.4) & (x > 5)
        x_masked = x.masked_fill(selected, Words.mask)
        if plain:
            monkeypatch.setattr(diffcse, "places", lambda where, count=None: torch.arange(where.numel()))
            ours.double()
        small = room and (room if cfg.views == "both" else diffcse.Room(room.tokens, 27, 27))
        loss, sums = ours(x, mask, x_masked, selected, 2, None if plain else small)
        loss.backward()
        results.append((loss.detach(), sums, {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}))
    (loss, sums, grads), (loss_plain, sums_plain, grads_plain) = results
    assert abs(loss - loss_plain) < 1e-5 * abs(loss_plain)
    assert sums.keys() == sums_plain.keys() and grads.keys() == grads_plain.keys()
    for name in sums:
        torch.testing.assert_close(sums[name].double(), sums_plain[name].double(), rtol=1e-5, atol=1e-6)
    fast_way, plain_way = (torch.cat([g[name].double().flatten() for name in grads]) for g in (grads, grads_plain))
    assert relative(fast_way, plain_way) < 1e-5


# ---------------------------------------------------------------------------------------------------- compiled, captured


@pytest.mark.parametrize("backend, lam, dropout", [("inductor", 0.0, 0.0), ("aot_eager", 0.5, 0.0), ("aot_eager", 0.5, 0.1)])
def test_a_compiled_step_is_the_plain_step(backend, lam, dropout, monkeypatch):
    """By PyTorch's compiler on the CPU, without a break in its graphs; for all of a step by its front end alone, as C++ takes minutes.

    The generator's dropout, a rate that the other models do not have, throws other dice there: then what does not hang on edits is equal.
    """
    if backend == "inductor" and (why_not := fast.why_not_compiled(torch.device("cpu"))):
        pytest.skip(why_not)
    monkeypatch.setattr(bert.Layer, "compile", lambda self: torch.nn.Module.compile(self, backend=backend))
    results = []
    for compiled in (False, True):
        torch.manual_seed(5)
        cfg = diffcse.Config(lam=lam, temperature=0.5)
        G = bert.BertForMaskedLM(model("distilbert", 2).cfg)
        G.bert.set_dropout(dropout)
        ours = diffcse.TrainingModel(cfg, model("bert", 1), Words, G if lam else None, model("bert", 1) if lam else None).train()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        optimizer, _, step = diffcse.stepper(ours, 2, None, compiled)
        diffcse.set_rate(optimizer, 0.0 if dropout else 1e-4)
        curve = []
        for seed in range(3):
            torch.manual_seed(seed)
            x, mask = batch()
            selected = mask & (torch.rand(mask.shape) < 0.4) & (x > 5)
            curve.append(step((x, mask, x.masked_fill(selected, Words.mask), selected), None))
        results.append(curve)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    for plain, other in zip(*results):
        for name in ("contrastive", "positive_cosine", "negative_cosine", "share_replaced/") if dropout else plain:
            torch.testing.assert_close(other[name], plain[name], rtol=1e-4, atol=1e-5)
        assert other["loss"].isfinite()


class FakeGraph:
    """Stands for a CUDA graph: what its capture has noted is done at each replay, and written over what the last one wrote."""

    def replay(self) -> None:
        self.values.copy_(self.work())


def test_a_captured_step_computes_every_batch_once(monkeypatch):
    """On a GPU the shapes of a batch and its room have a graph each. Here by a stand-in: each step is done once, on its own batch, none on another's."""
    done, capturing = [], []

    @contextlib.contextmanager
    def graph(made, pool, stream):
        capturing.append(made)
        yield
        capturing.clear()

    class Stream:
        def wait_stream(self, other) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)

    def step(batch, room):
        def work() -> torch.Tensor:
            done.append((room, batch[0].tolist()))
            return torch.stack([batch[0].sum(), batch[0].max()]).float()

        if not capturing:
            return dict(zip(("sum", "max"), work()))
        capturing[0].work = work
        return {"sum": torch.zeros(()), "max": torch.zeros(())}

    real = torch.stack

    def stack(tensors):  # the tensor that a replay writes to
        values = real(tensors)
        if capturing:
            capturing[0].values = values
        return values

    monkeypatch.setattr(fast.torch, "stack", stack)
    captured, given, got = fast.Captured(step), [], []
    for i, (n, room) in enumerate([(3, 1), (3, 1), (4, 1), (3, 1), (3, 2), (4, 1), (3, 2), (4, 1), (3, 1)]):
        x = torch.arange(n) * (i + 1)
        given.append((room, x.tolist()))
        got.append(captured((x,), room))
    assert done == given and len(captured.graphs) == 3
    for (_, x), sums in zip(given, got):  # also those of earlier steps: nothing was written over
        assert {name: float(value) for name, value in sums.items()} == {"sum": sum(x), "max": max(x)}
