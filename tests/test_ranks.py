"""Two and four processes with parts of a batch compute what one computes with all of it."""

import json
import random
import re
import signal
import subprocess
import sys
import time
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


def all_readings(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    for reading in READINGS:
        steps(rank, world, reading, folder)
    if world > 1:
        dist.destroy_process_group()


def steps(rank: int, world: int, reading: str, folder: str) -> None:
    """20 steps in fp64, without dropout, of batches of 8, 2, 10, 4, ... sentences; every loss, norm and in the end every weight to a file."""
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
        n = (8, 2, 10, 4)[step % 4]  # 2 sentences leave two of four ranks without any
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
        torch.save((curve, first, model.state_dict()), f"{folder}/{reading}-{world}.pt")  # BatchNorm's running means are in it


@pytest.fixture(scope="module")
def made_by_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    all_readings(0, 1, str(folder))
    for world in (2, 4):
        mp.start_processes(all_readings, (world, str(folder)), nprocs=world, start_method="fork" if sys.platform == "linux" else "spawn")
    return folder


@pytest.mark.parametrize("reading", READINGS)
def test_parts_of_a_batch_give_what_the_whole_gives(reading, made_by_ranks):
    tmp_path = made_by_ranks
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
                assert (state[name] - state_n[name]).double().norm() <= 1e-6 * state[name].double().norm() + 1e-8, name


def test_torchrun_gives_the_run_of_one_process_and_can_be_stopped(tmp_path):
    """The command itself: the same log but for the speed; one folder, one log, one table."""
    words = "a the man cat dog plays eats guitar fish red in on reads old city".split()
    pick = random.Random(1)
    sentences = [" ".join(pick.choices(words, k=pick.randrange(2, 12))) for _ in range(50)]
    (tmp_path / "text.txt").write_text("\n".join(sentences) + "\n")
    (tmp_path / "pairs.tsv").write_text("a\tb\tscore\n" + "".join(f"{a}\t{b}\t{pick.random():.2f}\n" for a, b in zip(sentences[:9], sentences[9:])))
    flags = ["--config", "small", "--train-file", str(tmp_path / "text.txt"), "--score", str(tmp_path / "pairs.tsv"), "--steps", "7", "--batch-size", "8",
             "--eval-every", "3", "--log-every", "1", "--dropout", "0", "--no-generator-dropout", "--lr", "1e-4", "--device", "cpu"]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "diffcse.py"]
    logs = {}
    for name, command in (("one", [sys.executable, "diffcse.py"]), ("two", torchrun)):
        done = subprocess.run([*command, *flags, "--out-dir", str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("7 steps of 8") == 1 and done.stdout.count("minutes. The model of step") == 1
        logs[name] = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    assert " on cpu x 2 (fp32)" in done.stdout and len(logs["one"]) == len(logs["two"]) > 7
    for a, b in zip(logs["one"], logs["two"]):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "sentences_per_second"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3), key  # fp32, through seven steps of AdamW

    running = subprocess.Popen([*torchrun, *flags, "--steps", "1000", "--out-dir", str(tmp_path / "stopped")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "stopped" / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 4:
        assert running.poll() is None
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    errors = running.communicate(timeout=120)[1]
    assert errors.count("To go on: python diffcse.py --resume") == 1, errors
    step = int(re.search(r"stopped after step (\d+) of 1000", errors)[1])
    assert (tmp_path / "stopped" / "state.safetensors").is_file() and step >= 2


def test_parts_are_everything_once_and_alike():
    for n in (0, 1, 3, 7, 64):
        for world in (1, 2, 4, 5):
            parts = [slice(n * r // world, n * (r + 1) // world) for r in range(world)]
            assert [i for part in parts for i in range(n)[part]] == list(range(n))
            assert max(p.stop - p.start for p in parts) - min(p.stop - p.start for p in parts) <= 1
    assert ranks.part(7) == slice(0, 7) and ranks.world() == 1 and ranks.rank() == 0
