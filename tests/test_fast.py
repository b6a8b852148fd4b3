"""Fast equals plain: each operation beside PyTorch's, then the whole training step."""

import math
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import bert
import diffcse
from data import Batch
from engine import fast

NO_DROPOUT = 1e-7  # a rate that takes the fast path and drops nothing: fewer than 1 of 65,536


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


# ------------------------------------------------------------------------------------------------
# The operations


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_dropout_has_its_rate_its_mean_and_its_gradient(p):
    torch.manual_seed(1)
    x = torch.ones(401, 1003, requires_grad=True)
    with fast.FastCPU():
        y = nn.Dropout(p)(x)
    assert y.grad_fn.name() == "DropoutBackward"
    y.backward(torch.full_like(y, 2.0))
    n, dropped = y.numel(), int((y == 0).sum())
    assert abs(dropped - n * p) < 5 * math.sqrt(n * p * (1 - p))
    kept = y.detach() != 0
    expected = torch.full((n - dropped,), 1 / (1 - p))
    torch.testing.assert_close(y.detach()[kept], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(x.grad, 2 * y.detach())  # the same elements are dropped
    torch.manual_seed(1)
    assert torch.equal(fast.Dropout.apply(x, p), y) and not torch.equal(fast.Dropout.apply(x, p), y)
    assert fast.Dropout.apply(torch.ones(1_000_000), NO_DROPOUT).all()


def test_the_four_elements_of_one_random_number_are_independent():
    torch.manual_seed(2)
    dropped = (fast.Dropout.apply(torch.ones(200_000, 4), 0.1) == 0).double()
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(200_000)
    assert (dropped.mean(0) - 0.1).abs().max() < 5 * math.sqrt(0.09 / 200_000)
    neighbours = torch.stack([dropped[:-1, 3], dropped[1:, 0]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 5 / math.sqrt(200_000)


def results(function, inputs: list[Tensor], enabled: bool) -> list[Tensor]:
    """The function's value, and the gradients of its inputs."""
    with fast.operations(enabled, torch.device("cpu")):
        y = function(*inputs)
    return [y, *torch.autograd.grad(y.sin().sum(), inputs)]


@pytest.mark.parametrize("queries", [1, 6])  # 1: the encoder's last layer in training
def test_attention_equals_pytorchs(queries):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 2, n, 8, requires_grad=True) for n in (queries, 6, 6)]
    mask = (torch.arange(6) < torch.tensor([[6], [1], [4]]))[:, None, None, :]
    function = partial(F.scaled_dot_product_attention, attn_mask=mask, dropout_p=NO_DROPOUT)
    for ours, expected in zip(results(function, inputs, True), results(function, inputs, False)):
        assert relative(ours, expected) < 1e-6
    zeros, ones = torch.zeros(1, 1, 101, 1), torch.ones(1, 1, 101, 1)
    mean = float(fast.attention(zeros[:, :, :1], zeros, ones, None, 0.5))
    assert 1e-3 < abs(mean - 1) < 0.5  # the weights are dropped


@pytest.mark.parametrize("shape, out", [((5, 7), 3), ((4, 6, 16), 48), ((1, 1), 1), ((9, 33), 257)])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_pytorchs(shape, out, strided, bias, monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: True)
    torch.manual_seed(0)
    x = torch.randn(shape).mT if strided else torch.randn(shape)
    inputs = [x, torch.randn(out, x.shape[-1]), *[torch.randn(out)] * bias]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    ours, plain = (results(F.linear, inputs, enabled) for enabled in (True, False))
    assert ours[0].grad_fn.name() == "LinearBackward" != plain[0].grad_fn.name()
    assert all(relative(*pair) < 1e-5 for pair in zip(ours, plain))


def test_the_rest_is_left_to_pytorch(monkeypatch):
    """Dropout in eval mode and at rate 0; products in fp64, under autocast and of nothing."""
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: True)
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    q = torch.randn(2, 3, 4, 5, requires_grad=True)
    expected = F.scaled_dot_product_attention(q, q, q)
    with fast.FastCPU():
        assert torch.equal(nn.Dropout(0.5).eval()(x), x) and torch.equal(nn.Dropout(0.0)(x), x)
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, dropout_p=0.0), expected)
        assert F.linear(x.double(), weight.double()).grad_fn.name() != "LinearBackward"
        assert F.linear(x[:0], weight).shape == (0, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, weight).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------
# The whole step


def model_and_batches(tiny, lam: float, dropout: float) -> tuple[diffcse.DiffCSEModel, list[Batch]]:
    torch.manual_seed(5)
    files = dict(model=str(tiny), generator=str(tiny), train_file=str(tiny / "text.txt"))
    settings = dict(lam=lam, temperature=0.5, dropout=dropout, generator_dropout=False)
    cfg = diffcse.Config(**files, **settings, batch_size=11)
    model = diffcse.DiffCSEModel.from_pretrained(cfg).train()
    sentences = model.load_sentences()
    return model, [diffcse.draw_batch(sentences, model.tokenizer, cfg, i) for i in range(3)]


def backward_step(model: diffcse.DiffCSEModel):
    def step(batch: Batch) -> dict:
        model.zero_grad()
        loss, metrics = model(batch)
        loss.backward()
        return metrics

    return step


@pytest.mark.parametrize("lam, calls", [(0.5, 4), (0.0, 2)])
def test_a_fast_step_is_the_plain_step(lam, calls, tiny, monkeypatch):
    """fp32, --fast on and off: losses to 1e-6, gradients to 1e-5."""
    called, attention, steps = [], fast.attention, []
    monkeypatch.setattr(fast, "attention", lambda *args: called.append(0) or attention(*args))
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    for enabled in (False, True):
        model, batches = model_and_batches(tiny, lam, NO_DROPOUT)
        metrics = fast.accelerate(backward_step(model), model, enabled)(batches[0])
        assert len(called) == calls * enabled
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        steps.append((metrics, gradients))
    (plain_metrics, plain_gradients), (metrics, gradients) = steps
    assert metrics.keys() == plain_metrics.keys() and gradients.keys() == plain_gradients.keys()
    for name, (total, count) in metrics.items():
        plain_total, plain_count = map(float, plain_metrics[name])
        assert float(count) == plain_count
        # Cosines of both signs cancel in their sum, so theirs is an absolute tolerance.
        tolerance = 1e-6 * (plain_count if "cosine" in name else abs(plain_total))
        assert abs(float(total) - plain_total) <= tolerance, name
    flat = [torch.cat([g[n].flatten() for n in gradients]) for g in (gradients, plain_gradients)]
    assert relative(*flat) < 1e-5


def test_an_edit_of_bert_is_what_runs(tiny, monkeypatch):
    """Operations are substituted, not classes: a student's Layer.forward changes the fast step."""

    def loss_of_step() -> float:
        model, batches = model_and_batches(tiny, 0.5, 0.1)
        torch.manual_seed(0)
        return float(fast.accelerate(backward_step(model), model)(batches[0])["loss"][0])

    before = loss_of_step()
    assert loss_of_step() == before
    forward = bert.Layer.forward
    edited = lambda self, x, mask, cls_only=False: 2 * forward(self, x, mask, cls_only)  # noqa: E731
    monkeypatch.setattr(bert.Layer, "forward", edited)
    assert loss_of_step() != before


# ------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("backend, lam", [("inductor", 0.0), ("aot_eager", 0.5)])
def test_a_compiled_step_is_the_plain_step(backend, lam, tiny, monkeypatch):
    """SimCSE with the C++ compiler, which is slow; DiffCSE with the front end alone."""
    if backend == "inductor" and (reason := fast.why_not_compile()):
        pytest.skip(reason)
    compile_layer = lambda self: nn.Module.compile(self, backend=backend)  # noqa: E731
    monkeypatch.setattr(bert.Layer, "compile", compile_layer)
    steps = []
    for compiled in (False, True):
        model, batches = model_and_batches(tiny, lam, 0.0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step = fast.accelerate(backward_step(model), model, compile=compiled)
        steps.append([step(batch) for batch in batches])
        torch.compiler.set_stance("default")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    for plain, compiled in zip(*steps):
        for name in plain:
            ours, expected = (float(m[name][0]) for m in (compiled, plain))
            assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_compile_without_a_compiler_is_one_line_and_the_run_continues(tiny, monkeypatch, capsys):
    monkeypatch.setattr(fast, "why_not_compile", lambda: "torch.compile needs a C++ compiler (x)")
    model, batches = model_and_batches(tiny, 0.0, 0.1)
    assert "loss" in fast.accelerate(backward_step(model), model, compile=True)(batches[0])
    message = "--compile: torch.compile needs a C++ compiler (x); the run continues without\n"
    assert capsys.readouterr().err == message
