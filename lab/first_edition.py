"""The first edition's sides of lab/bench.py: step, encode and evaluate with `--baseline DIR`.

lab/worker.py runs in DIR, a checkout of the first edition, so that `diffcse`, `embed` and `lab`
are its modules.
"""

import itertools
from collections.abc import Callable
from functools import partial

import diffcse
import torch
from lab import steps
from worker import encode_work

import embed

AMPS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def step_side(size: str, reading: str, amp: str, device: str, batches: str, **_) -> Callable:
    sizes, cfg, tokenizer = steps.SIZES[size], steps.READINGS[reading], steps.whole_vocabulary()
    step = steps.ours(sizes, cfg, tokenizer, torch.device(device), AMPS[amp])
    draw = itertools.cycle([[t.to(device) for t in batch] for batch in torch.load(batches)])
    return lambda: step(tuple(next(draw)), diffcse.Room())["loss"]


def encode_side(model: str, sentences: str, out: str) -> Callable:
    tool = embed.DiffCSE(model, device="cpu")
    return encode_work(partial(tool.encode, return_numpy=True), sentences, out)


def evaluate_side(model: str, data: str, amp: str) -> Callable:
    score, opened = (
        diffcse.StsScore(diffcse.Config(data=data, score="dev")),
        embed.open_model(model),
    )
    encoder = partial(embed.encode, opened.bert, opened.tokenizer, pooling=opened.pooling)

    def work() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp == "bf16"):
            return score.dev(encoder)["score"]

    return work
