"""Fast equals plain: each operation beside PyTorch's, then the whole training step."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import VOCABULARY
from torch import Tensor

import bert
import diffcse
from data import Batch, Tokenizer, mask_tokens
from engine import fast

NO_DROPOUT = 1e-7  # a rate that takes the fast path and drops nothing: fewer than 1 of 65,536


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


# ------------------------------------------------------------------------------------------------
# Dropout and attention


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


def test_the_four_elements_of_one_random_number_are_independent():
    torch.manual_seed(2)
    dropped = (fast.Dropout.apply(torch.ones(200_000, 4), 0.1) == 0).double()
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(200_000)
    assert (dropped.mean(0) - 0.1).abs().max() < 5 * math.sqrt(0.09 / 200_000)
    neighbours = torch.stack([dropped[:-1, 3], dropped[1:, 0]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 5 / math.sqrt(200_000)


def test_nothing_is_substituted_in_eval_mode_and_at_rate_0():
    x = torch.randn(5, 3)
    with fast.FastCPU():
        assert torch.equal(nn.Dropout(0.5).eval()(x), x) and torch.equal(nn.Dropout(0.0)(x), x)
        q = torch.randn(2, 3, 4, 5, requires_grad=True)
        y = F.scaled_dot_product_attention(q, q, q, dropout_p=0.0)
    assert torch.equal(y, F.scaled_dot_product_attention(q, q, q))
    assert fast.Dropout.apply(torch.zeros(0, 3), 0.5).shape == (0, 3)


@pytest.mark.parametrize("queries", [1, 6])  # 1: the encoder's last layer in training
def test_attention_equals_pytorchs(queries):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 8, requires_grad=True) for n in (queries, 6, 6))
    mask = (torch.arange(6) < torch.tensor([[6], [1], [4]]))[:, None, None, :]
    results = []
    for mode in (False, True):
        with fast.FastCPU() if mode else torch.enable_grad():
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=NO_DROPOUT)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (q, k, v))))
    for ours, expected in zip(*results):
        assert relative(ours, expected) < 1e-6


@pytest.mark.parametrize(
    "shape, out", [((5, 7), 3), ((4, 6, 16), 48), ((1, 1), 1), ((130, 33), 257)]
)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_pytorchs(shape, out, strided, bias, monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: True)
    torch.manual_seed(0)
    x = torch.randn(shape).mT if strided else torch.randn(shape)
    x.requires_grad_()
    weight = torch.randn(out, x.shape[-1], requires_grad=True)
    inputs = [x, weight, *[torch.randn(out, requires_grad=True)] * bias]
    results = []
    for enabled in (True, False):
        with fast.operations(enabled, x.device):
            y = F.linear(*inputs)
        assert (y.grad_fn.name() == "LinearBackward") == enabled
        results.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    for ours, expected in zip(*results):
        assert relative(ours, expected) < 1e-5


def test_linear_leaves_fp64_autocast_and_empty_inputs_to_pytorch(monkeypatch):
    monkeypatch.setattr(fast, "mkl_is_slow", lambda: True)
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    with fast.operations(True, x.device):
        assert F.linear(x.double(), weight.double()).grad_fn.name() != "LinearBackward"
        assert F.linear(x[:0], weight).shape == (0, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, weight).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------
# The whole step

READINGS = {
    "published": {},
    "paper": {
        "edit_scope": "masked",
        "pads_in_loss": False,
        "views": "first",
        "protect_sep": True,
        "masking": "all",
    },
    "simcse": {"lam": 0.0},
}


def make_parts(family: str, reading: str, tiny, dropout: float) -> diffcse.DiffCSEModel:
    """A model with random weights of that family; its generator is of another family."""

    def config(model_type: str, layers: int) -> bert.BertConfig:
        return bert.BertConfig(
            model_type=model_type,
            vocab_size=len(VOCABULARY),
            hidden_size=24,
            num_hidden_layers=layers,
            num_attention_heads=3,
            intermediate_size=40,
            max_position_embeddings=40,
            initializer_range=0.2,
            type_vocab_size=0 if model_type == "distilbert" else 2,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )

    torch.manual_seed(5)
    cfg = diffcse.Config(**{"lam": 0.5, "temperature": 0.5} | READINGS[reading])
    parts = [bert.Bert(config(family, 2))]
    if cfg.lam:
        generator = bert.BertForMaskedLM(
            config("bert" if family == "distilbert" else "distilbert", 1)
        )
        parts += [generator, bert.Bert(config(family, 2))]
    return diffcse.DiffCSEModel(cfg, Tokenizer(tiny), *parts).train()


def make_batch(model: diffcse.DiffCSEModel, seed: int, max_length: int = 32) -> Batch:
    """Pairs of different sentences of 3 to max_length tokens, both lengths included."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, max_length + 1, (12,), generator=rng)
    lengths[:2] = torch.tensor([3, max_length])
    mask = torch.arange(max_length) < lengths[:, None]
    x = torch.randint(5, len(VOCABULARY), mask.shape, generator=rng) * mask
    x[:, 0], x[torch.arange(12), lengths - 1] = model.tokenizer.cls_id, model.tokenizer.sep_id
    cfg = model.cfg
    return Batch(x, mask, *mask_tokens(x, model.tokenizer, cfg.mask_ratio, cfg.masking, rng))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("reading", READINGS)
def test_a_fast_step_is_the_plain_step(family, reading, tiny, monkeypatch):
    """fp32, --fast on and off: losses to 1e-6, gradients to 1e-5."""
    calls = []
    attention = fast.attention
    monkeypatch.setattr(fast, "attention", lambda *args: calls.append(0) or attention(*args))
    results = []
    for enabled in (True, False):
        model = make_parts(family, reading, tiny, NO_DROPOUT)

        def step(batch, model=model):
            model.zero_grad()
            loss, metrics = model(batch)
            loss.backward()
            return metrics | {"loss": (loss.detach(), 1)}

        step = fast.accelerate(step, model, enabled)
        calls.clear()
        metrics = step(make_batch(model, 6))
        assert len(calls) == (0 if not enabled else 5 if model.cfg.lam else 2)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((metrics, gradients))
    (metrics, gradients), (plain_metrics, plain_gradients) = results
    assert metrics.keys() == plain_metrics.keys() and gradients.keys() == plain_gradients.keys()
    for name, (total, count) in metrics.items():
        plain_total, plain_count = map(float, plain_metrics[name])
        assert float(count) == plain_count
        # Cosines of both signs cancel in their sum, so theirs is an absolute tolerance.
        tolerance = 1e-6 * (plain_count if "cosine" in name else abs(plain_total))
        assert abs(float(total) - plain_total) <= tolerance, name
    ours, plain = (
        torch.cat([g[n].flatten() for n in gradients]) for g in (gradients, plain_gradients)
    )
    assert relative(ours, plain) < 1e-5


def test_an_edit_of_bert_is_what_runs(tiny, monkeypatch):
    """Operations are substituted, not classes: a student's Layer.forward changes the fast step."""

    def loss_of_step() -> float:
        model = make_parts("bert", "published", tiny, 0.1)
        step = fast.accelerate(lambda batch: float(model(batch)[0].detach()), model)
        torch.manual_seed(0)
        return step(make_batch(model, 6))

    before = loss_of_step()
    assert loss_of_step() == before
    forward = bert.Layer.forward
    edited = lambda self, x, mask, cls_only=False: 2 * forward(self, x, mask, cls_only)  # noqa: E731
    monkeypatch.setattr(bert.Layer, "forward", edited)
    assert loss_of_step() != before


# ------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("backend, reading", [("inductor", "simcse"), ("aot_eager", "published")])
def test_a_compiled_step_is_the_plain_step(backend, reading, tiny, monkeypatch):
    """One reading with the C++ compiler, which is slow; the other with the front end alone."""
    if backend == "inductor" and (reason := fast.why_not_compile()):
        pytest.skip(reason)
    compile_layer = lambda self: nn.Module.compile(self, backend=backend)  # noqa: E731
    monkeypatch.setattr(bert.Layer, "compile", compile_layer)
    results = []
    for compiled in (False, True):
        model = make_parts("bert", reading, tiny, 0.0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

        def step(batch, model=model):
            model.zero_grad()
            loss, metrics = model(batch)
            loss.backward()
            return metrics

        step = fast.accelerate(step, model, compile=compiled)
        results.append([step(make_batch(model, seed, 16)) for seed in range(3)])
        torch.compiler.set_stance("default")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    for plain, compiled in zip(*results):
        for name in plain:
            ours, expected = (float(m[name][0]) for m in (compiled, plain))
            assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_compile_without_a_compiler_is_one_line_and_the_run_continues(tiny, monkeypatch, capsys):
    monkeypatch.setattr(
        fast, "why_not_compile", lambda: "torch.compile needs a C++ compiler (none)"
    )
    model = make_parts("bert", "simcse", tiny, 0.1)
    step = fast.accelerate(lambda batch: "stepped", model, compile=True)
    assert step(make_batch(model, 0)) == "stepped"
    message = "--compile: torch.compile needs a C++ compiler (none); the run continues without\n"
    assert capsys.readouterr().err == message
