"""What makes it fast. Three functions, each equal to a plain one of PyTorch, which is taken wherever it is as good; and a GPU's step as one graph.

    linear      F.linear, by oneDNN, forward and back: on a CPU PyTorch multiplies fp32 by MKL, which is slower on some
    dropout     F.dropout, whose random numbers on a CPU are 16 bits each and not a float
    best_words  the argmax (or a draw) of a product with the vocabulary, on a CPU a few rows at a time: the logits are never all there
    Captured    a training step as a CUDA graph

The rest of what is saved is in bert.py: padding, and last layers of tokens that nobody asks for (Bert.forward).
"""

import platform
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def has_onednn() -> bool:
    """Whether PyTorch was built with oneDNN for this CPU, and has the operations that its own compiler calls it by."""
    return (torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise"))  # fmt: skip


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether linear() is worth oneDNN: fp32 on a CPU, and neither autocast nor a compiler has its own plan."""
    return (not torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
            and x.numel() > 0 and not torch.is_autocast_enabled("cpu") and has_onednn())  # fmt: skip


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
        ctx.gelu = gelu
        ctx.save_for_backward(x, weight)
        return product(F.gelu(x) if gelu else x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), rows = ctx.saved_tensors, grad.flatten(0, -2)  # (n, out)
        into = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        if ctx.gelu:  # computed once more: kept, it would be a quarter of a layer's memory
            into, x = None if into is None else torch.ops.aten.gelu_backward(into, x), F.gelu(x)
        return (into, rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None,  # MKL is as fast at this one
                rows.sum(0) if ctx.needs_input_grad[2] else None, None)  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x @ weight.T + bias, or of GELU(x). Shapes: (..., in), (out, in), (out,) -> (..., out)."""
    if by_onednn(x, weight):
        return _Linear.apply(x, weight, bias, gelu)
    return F.linear(F.gelu(x) if gelu else x, weight, bias)


def _kept(like: Tensor, p: float) -> Tensor:
    """True with probability 1 - p, to the next 1/65,536. A draw of 64 bits decides on four numbers. Shapes: any -> the same, bool."""
    draws = torch.empty((like.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    return (draws.view(torch.int16)[: like.numel()] >= round(p * 65536) - 32768).view(like.shape)


def _times(x: Tensor, kept: Tensor, p: float) -> Tensor:
    return kept.view(torch.uint8).to(x.dtype).mul_(x).mul_(1 / (1 - round(p * 65536) / 65536))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        ctx.p, kept = p, _kept(x, p)
        ctx.save_for_backward(kept)  # a byte for each, no floats
        return _times(x, kept, p)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _times(grad, *ctx.saved_tensors, ctx.p), None


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zeros with probability p (to 1/65,536), the rest scaled so that the mean stays. From torch's own random numbers. Shapes: any -> the same."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not training or p == 0:
        return F.dropout(x, p, training)
    return _Dropout.apply(x, p)


ROWS = 256  # whose logits are held at a time on a CPU: with 30,000 words 31 MB


@torch.no_grad()
def best_words(x: Tensor, words: Tensor, bias: Tensor, temperature: float | None = None) -> Tensor:
    """The word with the largest logit, or with a temperature one drawn from their softmax. Shapes: (n, D), (V, D), (V,) -> (n,) int64."""
    best = []
    for rows in x.split(ROWS if x.device.type == "cpu" else max(1, len(x))):
        logits = linear(rows, words, bias)  # (rows, V)
        if temperature is None:
            best.append(logits.argmax(-1))
        else:  # a draw by inverting the distribution: one random number a row, where Gumbel's way takes one a word
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
            reached = logits.softmax(-1).cumsum(-1)  # (rows, V), ends at 1 but for rounding
            draw = torch.rand(len(rows), 1, device=x.device, dtype=reached.dtype) * reached[:, -1:]
            best.append(torch.searchsorted(reached, draw, right=True).squeeze(1).clamp_max(len(words) - 1))
    return torch.cat(best) if best else x.new_zeros(0, dtype=torch.int64)


def why_not_compiled(device: torch.device) -> str:
    """What torch.compile lacks on this machine; empty: nothing."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch.utils._triton import has_triton

        get_cpp_compiler()
        header = Path(sysconfig.get_path("include")) / "Python.h"
        if not header.exists():
            return f"PyTorch's compiler wants {header}, of Python's package for developers"
        if device.type == "cuda" and not has_triton():
            return "PyTorch's compiler wants triton, and a card that it knows"
    except Exception as error:  # torch's own kind, of a private name
        return f"PyTorch's compiler cannot work here ({str(error).splitlines()[0][:100]})"
    return ""


class Captured:
    """A training step as one CUDA graph for each shape of its batch: the host launches one thing and not thousands.

    step(batch, room) -> dict of (), as diffcse.train_step. The first batch of a shape is computed as usual, which also is the warm-up that
    a capture wants; the second is captured, which computes nothing, and replayed. So every batch is computed once, as without graphs.
    What changes from step to step must be in the batch or in tensors that are there before: weights, moments, the rate.
    """

    def __init__(self, step: Callable[..., dict[str, Tensor]]):
        self.step, self.graphs = step, {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # one pool: graphs are never replayed at once

    def __call__(self, batch: tuple[Tensor, ...], room: tuple) -> dict[str, Tensor]:
        key = (room, *(tensor.shape for tensor in batch))
        if key not in self.graphs:
            self.graphs[key] = None
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                sums = self.step(batch, room)
            torch.cuda.current_stream().wait_stream(self.stream)
            return sums
        if self.graphs[key] is None:
            graph, inputs = torch.cuda.CUDAGraph(), tuple(tensor.clone() for tensor in batch)
            with torch.compiler.set_stance("eager_on_recompile"), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                sums = self.step(inputs, room)
                values = torch.stack([value.float() for value in sums.values()])
            self.graphs[key] = graph, inputs, list(sums), values
        graph, inputs, names, values = self.graphs[key]
        for mine, given in zip(inputs, batch):
            mine.copy_(given, non_blocking=True)
        graph.replay()
        return dict(zip(names, values.clone().unbind()))  # the next replay writes over them
