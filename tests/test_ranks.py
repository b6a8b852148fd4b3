"""Two and four processes with parts of a batch compute what one computes with all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import bert
import diffcse
import ranks

ROOT = Path(__file__).parent.parent
READINGS = {
    "published": {}, "paper": {"edit_scope": "masked", "pads_in_loss": False, "views": "first", "protect_sep": True},
    "sum": {"reduction": "sum", "lam": 0.01}, "simcse": {"lam": 0.0, "projector": "tanh"}, "triples": {"hard_negative_weight": 0.3},
}  # fmt: skip
STEPS = 20


class Words:
    pad, cls, sep, mask, unk, vocab_size = 0, 2, 3, 4, 5, 60
    special_ids = [0, 2, 3, 4, 5]


def steps(rank: int, world: int, reading: str, folder: str) -> None:
    """20 steps in fp64, without dropout, of batches of 7, 1, 9, 3, ... sentences; every loss, norm and in the end every weight to a file."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(world)}
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{reading}-{world}", rank=rank, world_size=world)
    torch.manual_seed(0)
    V, cfg = 3 if reading == "triples" else 2, diffcse.Config(**{"lam": 0.3, "dropout": 0.0, "generator_dropout": False, "temperature": 0.1} | READINGS[reading])
    sizes = dict(vocab_size=60, hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16, initializer_range=0.2)
    f, d = (bert.Bert(bert.BertConfig(num_hidden_layers=2, **sizes)) for _ in range(2))
    g = bert.BertForMaskedLM(bert.BertConfig(num_hidden_layers=1, **sizes))
    model = diffcse.TrainingModel(cfg, f, Words, g if cfg.lam else None, d if cfg.lam else None).double().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, fused=True)
    curve = []
    for step in range(STEPS):
        random = torch.Generator().manual_seed(step)
        n = (7, 1, 9, 3)[step % 4] + 1
        lengths = torch.randint(3, 12, (n * V,), generator=random)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        x = torch.randint(6, 60, mask.shape, generator=random).masked_fill(~mask, Words.pad)
        x[:, 0] = Words.cls
        x[torch.arange(n * V), lengths - 1] = Words.sep
        selected = mask & (x > 5) & (torch.rand(mask.shape, generator=random) < 0.4)
        part = ranks.part(n)
        batch = tuple(t[part.start * V : part.stop * V] for t in (x, mask, x.masked_fill(selected, Words.mask), selected))
        sums = diffcse.train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch, diffcse.Room(sentences=n), V, None)
        curve.append({name: float(value) for name, value in sums.items()})
        if step == 0:
            first = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            first = {name: grad.clone() for name, grad in first.items()}
    if world > 1:
        weights = [torch.zeros(4, dtype=torch.float64) for _ in range(world)]
        dist.all_gather(weights, torch.stack([p.double().sum() for p in model.parameters()])[:4])
        assert all(torch.equal(w, weights[0]) for w in weights)  # the same update everywhere
    if rank == 0:
        state = {name: tensor for name, tensor in model.state_dict().items()}  # BatchNorm's running means are in it
        torch.save((curve, first, state), f"{folder}/{reading}-{world}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("reading", READINGS)
def test_parts_of_a_batch_give_what_the_whole_gives(reading, tmp_path):
    for world in (1, 2, 4):
        mp.spawn(steps, (world, reading, str(tmp_path)), nprocs=world)
    curve, first, state = torch.load(tmp_path / f"{reading}-1.pt")
    assert len({round(row["loss"], 4) for row in curve}) > STEPS / 2
    for world in (2, 4):
        curve_n, first_n, state_n = torch.load(tmp_path / f"{reading}-{world}.pt")
        for row, row_n in zip(curve, curve_n):
            assert row.keys() == row_n.keys()
            for name in row:
                assert abs(row[name] - row_n[name]) <= 1e-6 * abs(row[name]) + 1e-12, name
        assert first.keys() == first_n.keys()
        for name in first:
            assert (first[name] - first_n[name]).norm() <= 1e-6 * first[name].norm() + 1e-12, name
        for name in state:
            if not name.endswith("key.bias"):  # its gradient is rounding alone, which AdamW makes a step of
                assert (state[name] - state_n[name]).double().norm() <= 1e-6 * state[name].double().norm(), name


def test_parts_are_everything_once_and_alike():
    for n in (0, 1, 3, 7, 64):
        for world in (1, 2, 4, 5):
            parts = [slice(n * r // world, n * (r + 1) // world) for r in range(world)]
            assert [i for part in parts for i in range(n)[part]] == list(range(n))
            assert max(p.stop - p.start for p in parts) - min(p.stop - p.start for p in parts) <= 1
    assert ranks.part(7) == slice(0, 7) and ranks.world() == 1 and ranks.rank() == 0
