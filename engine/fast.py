"""Faster operations on a CPU, substituted under plain modules.

    step = accelerate(step, model)         # F.dropout, attention and F.linear are the ones below
    with operations(True, ids.device): states = bert(ids, mask)

The modules stay PyTorch's and bert.py's: an edit there is what runs. Without this file training is
the same but slower, and dropout draws other random numbers. Why these three: PyTorch draws a float
for each element of a dropout mask; attention has (B, H, T, T) of them; and PyTorch multiplies fp32
with MKL, which is slow on an AMD.
"""

import contextlib
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bert import Layer


def keep_mask(like: Tensor, p: float) -> Tensor:
    """True with probability 1 - p, to the next 1/65,536. One random int64 decides on four."""
    draws = torch.empty((like.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    return (draws.view(torch.int16)[: like.numel()] >= round(p * 65536) - 32768).view(like.shape)


class Dropout(torch.autograd.Function):
    """F.dropout in training. Keeps one byte per element for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        ctx.scale, kept = 1 / (1 - round(p * 65536) / 65536), keep_mask(x, p).view(torch.uint8)
        ctx.save_for_backward(kept)
        return kept.to(x.dtype).mul_(x).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return kept.to(grad.dtype).mul_(grad).mul_(ctx.scale), None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, dropout on the weights. Shapes: (B, H, T, d) -> (B, H, T, d)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, T)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return Dropout.apply(scores.softmax(-1), p) @ v


@cache
def mkl_is_slow() -> bool:
    """Whether oneDNN's product is the faster one; on an Intel it gains nothing."""
    cpu = Path("/proc/cpuinfo")  # of Linux
    amd = cpu.is_file() and "AuthenticAMD" in cpu.read_text()
    return amd and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(torch.autograd.Function):
    """F.linear in fp32, by oneDNN. Shapes: (..., in), (out, in), (out,) -> (..., out)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), rows = ctx.saved_tensors, grad.flatten(0, -2)  # (n, out)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], "")
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t() @ x.flatten(0, -2)  # MKL is as fast at this one
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


def is_fp32_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return fp32 and x.device.type == "cpu" and x.numel() > 0


class FastCPU(TorchFunctionMode):
    """Inside `with FastCPU():`, calls of these functions on the CPU go to the ones above."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and mkl_is_slow() and is_fp32_on_cpu(*args):
            return Linear.apply(*args, *[None] * (3 - len(args)))
        if func is F.dropout and args[0].device.type == "cpu":
            if kwargs["training"] and kwargs["p"] > 0:  # nn.Dropout passes its settings by name
                return Dropout.apply(args[0], kwargs["p"])
        if func is F.scaled_dot_product_attention and args[0].device.type == "cpu":
            if kwargs.get("dropout_p", 0.0) > 0:
                return attention(*args, kwargs.get("attn_mask"), kwargs["dropout_p"])
        return func(*args, **kwargs)


def operations(enabled: bool, device: torch.device) -> contextlib.AbstractContextManager:
    return FastCPU() if enabled and device.type == "cpu" else contextlib.nullcontext()


def accelerate(
    step: Callable, model: nn.Module, enabled: bool = True, compile: bool = False
) -> Callable:
    """The same step, faster. compile: torch.compile each layer; needs a C++ compiler."""
    if compile:
        reason = why_not_compile()
        if not reason:
            return compiled(step, model)
        print(f"--compile: {reason}; the run continues without", file=sys.stderr)

    def fast_step(batch):
        with operations(enabled, batch.x.device):
            return step(batch)

    return fast_step


def compiled(step: Callable, model: nn.Module) -> Callable:
    torch._dynamo.config.cache_size_limit = 64  # layers share one graph per call signature
    for module in model.modules():
        if isinstance(module, Layer):
            module.compile()
    torch.compiler.set_stance("force_eager")  # evaluation has batches of many shapes

    def compiled_step(batch):
        with torch.compiler.set_stance("default"):
            return step(batch)

    return compiled_step


def why_not_compile() -> str:
    """What torch.compile lacks on this machine, or an empty string."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # of a private type
        return f"torch.compile needs a C++ compiler ({str(error).splitlines()[0][:80]})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"torch.compile needs {header} (package python3-dev)"
