"""Several processes that train one model: N of them with B / N sentences each compute what one
computes with B.

    torchrun --nproc-per-node N diffcse.py --config ...

Every process draws the whole batch and encodes its part. The vectors of all are gathered, with
their gradient, so projector, BatchNorm and contrastive loss see the whole batch; edits and their
discrimination stay with the sentence's process. The main process logs, evaluates and saves.
With one process every function here is an identity. Not here: sharded weights, and overlap of
communication with the backward pass.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The processes that torchrun has started can communicate inside the block."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # the main one may be evaluating
    try:
        yield
    finally:
        if not isinstance(sys.exc_info()[1], Exception):
            dist.destroy_process_group()  # after an error it would wait for the other processes


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Others wait until the main process has downloaded and tokenised."""
    if not is_main():
        all_reduce_max(0)
    yield
    if is_main():
        all_reduce_max(0)


def broadcast(value):
    """The main process's value, on every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def all_reduce_max(number: int) -> int:
    if world_size() == 1:
        return number
    numbers = torch.tensor([number])  # on the CPU: no GPU is waited for
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Without gradient. Shapes: any -> the same."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """The mean over processes, without gradient. Shapes: any -> the same."""
    return x if world_size() == 1 else all_reduce_sum(x) / world_size()


def reduce_loss(total: Tensor, count: Tensor | None) -> Tensor:
    """A sum over this process's tokens as a loss whose gradient, averaged over processes, is that
    of the mean over all tokens (0 without any), or with count None of their sum.

    Shapes: (), () -> ().
    """
    if count is not None:
        total = total / all_reduce_sum(count).clamp_min(1)
    return total * world_size()


class AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return own_rows(all_reduce_sum(grad))  # what each process's loss says about these rows


def all_gather(x: Tensor) -> Tensor:
    """All processes' rows in order, with gradient. Shapes: (R, D) -> (R * processes, D)."""
    return x if world_size() == 1 else AllGather.apply(x)


def shard(size: int) -> slice:
    """This process's equal part of `size` things; a remainder belongs to none."""
    part = size // world_size()
    return slice(rank() * part, (rank() + 1) * part)


def own_rows(x: Tensor) -> Tensor:
    """The inverse of all_gather. Shapes: (R * processes, D) -> (R, D)."""
    return x[shard(len(x))]


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """In one message."""
    if world_size() > 1:
        gradients = [parameter.grad for parameter in parameters]
        flat = mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, average in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(average.view_as(gradient))
