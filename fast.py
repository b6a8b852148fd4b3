"""What makes it fast on a CPU: three functions, each equal to a plain one of PyTorch, which is taken wherever it is as good.

    linear      F.linear, by oneDNN, forward and back: PyTorch multiplies fp32 by MKL, which is slower on some CPUs
    dropout     F.dropout, whose random numbers are 16 bits each and not a float
    best_words  the argmax (or a draw) of a product with the vocabulary, a few rows at a time: the logits are never all there

The rest of what is saved is in bert.py: padding, and last layers of tokens that nobody asks for (Bert.forward).
Not here: GPUs, whose PyTorch functions are as fast; there a step is one graph (graph.py).
"""

import platform
from functools import cache

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
    return (x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0 and has_onednn()
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling())  # fmt: skip


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
