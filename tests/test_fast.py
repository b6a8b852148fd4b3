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


def run_steps(tiny, lam: float, dropout: float, count: int = 1, **options) -> tuple[Tensor, Tensor]:
    """Losses of `count` batches, and the gradient of the last. options: of fast.accelerate."""
    torch.manual_seed(5)
    files = dict(model=str(tiny), generator=str(tiny), train_file=str(tiny / "text.txt"))
    settings = dict(lam=lam, temperature=0.5, dropout=dropout, generator_dropout=False)
    cfg = diffcse.Config(**files, **settings, batch_size=11)
    model = diffcse.DiffCSEModel.from_pretrained(cfg).train()
    sentences, losses = model.load_sentences(), []

    def step(batch: Batch) -> None:
        model.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        losses.append(loss.detach())

    step = fast.accelerate(step, model, **options)
    for i in range(count):
        step(diffcse.draw_batch(sentences, model.tokenizer, cfg, i))
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.stack(losses), torch.cat(gradients)


@pytest.mark.parametrize("lam, calls, layers", [(0.5, 4, 6), (0.0, 2, 2)])
def test_a_fast_step_is_the_plain_step(lam, calls, layers, tiny, monkeypatch):
    """In fp32. Operations are replaced, not classes: an edit of bert.Layer is what runs."""
    called, attention, forward = [], fast.attention, bert.Layer.forward
    monkeypatch.setattr(fast, "attention", lambda *args: called.append("fast") or attention(*args))
    edited = lambda self, *args: called.append("layer") or forward(self, *args)  # noqa: E731
    monkeypatch.setattr(bert.Layer, "forward", edited)
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    plain_losses, plain_gradient = run_steps(tiny, lam, NO_DROPOUT, enabled=False)
    assert called == ["layer"] * layers
    losses, gradient = run_steps(tiny, lam, NO_DROPOUT)
    assert (called.count("layer"), called.count("fast")) == (2 * layers, calls)
    assert relative(losses, plain_losses) < 1e-6 and relative(gradient, plain_gradient) < 1e-5


# ------------------------------------------------------------------------------------------------
# torch.compile


def test_a_compiled_step_is_the_plain_step(tiny, monkeypatch):
    """With the front end alone: the C++ compiler is slow."""
    if reason := fast.why_not_compile():
        pytest.skip(reason)
    compile_layer = lambda self: nn.Module.compile(self, backend="aot_eager")  # noqa: E731
    monkeypatch.setattr(bert.Layer, "compile", compile_layer)
    plain = run_steps(tiny, 0.5, 0.0, count=3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run_steps(tiny, 0.5, 0.0, count=3, compile=True)
    torch.compiler.set_stance("default")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    for ours, expected in zip(compiled, plain):
        assert relative(ours, expected) < 1e-5


def test_compile_without_a_compiler_is_one_line_and_the_run_continues(tiny, monkeypatch, capsys):
    monkeypatch.setattr(fast, "why_not_compile", lambda: "no compiler")
    run_steps(tiny, 0.0, 0.1, compile=True)
    assert capsys.readouterr().err == "--compile: no compiler; the run continues without\n"
