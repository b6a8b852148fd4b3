"""Several processes that train one model: N ranks with B/N sentences each compute what one rank with B does.

    torchrun --nproc-per-node N diffcse.py --config ...

Every rank draws the whole batch and its masks, and encodes its own part of it. The vectors of all are then gathered, with their
gradient, so that projector, BatchNorm and contrastive loss see the whole batch on every rank; the edits and their discrimination stay
with the rank that has the sentence. Gradients are added up, and all ranks make the same update. Rank 0 alone logs, evaluates and saves.

All of it does nothing where there is one process.
Not here: gradients sent while the backward pass still runs, and weights kept in parts: bert-base fits on one GPU.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun has started know each other."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))  # rank 0 may be evaluating
    try:
        yield
    finally:
        if not isinstance(sys.exc_info()[1], Exception):  # else the others are at work: they would have to come for a farewell
            dist.destroy_process_group()


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """The others come when it is through: what it has fetched and tokenised is there then."""
    if rank() > 0:
        largest(0)
    yield
    if rank() == 0:
        largest(0)


def from_rank_0(value):
    """What rank 0 has, on every rank."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def largest(number: int) -> int:
    """Over all ranks, by way of the CPU: no GPU is waited for."""
    if world() == 1:
        return number
    numbers = torch.tensor([number])
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def part(n: int, rows: int = 1) -> slice:
    """Which of n things, of so many rows each, are this rank's: parts in the order of the ranks, whose lengths differ by at most one thing. May be none."""
    return slice(n * rank() // world() * rows, n * (rank() + 1) // world() * rows)


def total(x: Tensor) -> Tensor:
    """The sum over all ranks, without gradient. Shapes: any -> the same."""
    if world() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def add_up(tensors: list[Tensor]) -> None:
    """Each in place of its sum over all ranks, in one message."""
    if world() > 1:
        flat = total(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, sum_ in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(sum_.view_as(tensor))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: slice, n: int) -> Tensor:
        ctx.rows = rows
        whole = x.new_zeros(n, x.shape[1])
        whole[rows] = x
        return total(whole)  # the others have zeros there

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return total(grad)[ctx.rows], None, None  # what every rank's loss says of this rank's rows


def gather(x: Tensor, rows: slice, n: int) -> Tensor:
    """This rank's rows and all others', in order, with their gradient. Shapes: (r, D) -> (n, D)."""
    return x if world() == 1 else _Gather.apply(x, rows, n)
