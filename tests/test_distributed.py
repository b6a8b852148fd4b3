"""Two and four processes with parts of a batch compute what one computes with all of it."""

import json
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
from conftest import ROOT, random_sentences

import bert
import diffcse
from data import Batch
from engine import distributed

READINGS = {
    "published": {},
    "paper": {
        "edit_scope": "masked",
        "pads_in_loss": False,
        "views": "first",
        "protect_sep": True,
    },
    "sum": {"reduction": "sum", "lam": 0.01},
    "simcse": {"lam": 0.0, "projector": "tanh"},
    "triples": {"hard_negative_weight": 0.3},
}
STEPS = 20


class Tokens:
    pad_id, cls_id, sep_id, mask_id, unk_id, vocab_size = 0, 2, 3, 4, 5, 60


def train_in_process(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        meeting = f"file://{folder}/meeting-{processes}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    for reading in READINGS:
        train_reading(reading, f"{folder}/{reading}-{processes}.pt")
    if processes > 1:
        dist.destroy_process_group()


def make_batch(step: int, V: int) -> Batch:
    """8, 4, 12, ... sentences of 3 to 11 tokens."""
    rng = torch.Generator().manual_seed(step)
    R = (8, 4, 12)[step % 3] * V
    lengths = torch.randint(3, 12, (R,), generator=rng)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    x = torch.randint(6, 60, mask.shape, generator=rng).masked_fill(~mask, Tokens.pad_id)
    x[:, 0], x[torch.arange(R), lengths - 1] = Tokens.cls_id, Tokens.sep_id
    selected = mask & (x > 5) & (torch.rand(mask.shape, generator=rng) < 0.4)
    return Batch(x, mask, x.masked_fill(selected, Tokens.mask_id), selected, V)


def train_reading(reading: str, path: str) -> None:
    """In fp64, without dropout. Saves each step's metrics, the first gradients, the weights."""
    torch.manual_seed(0)
    V = 3 if reading == "triples" else 2
    settings = {"lam": 0.3, "temperature": 0.1, "lr": 1e-3, "generator_dropout": False}
    cfg = diffcse.Config(**settings | READINGS[reading])

    def config(layers: int) -> bert.BertConfig:
        sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=60)
        dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return bert.BertConfig(
            num_hidden_layers=layers,
            max_position_embeddings=16,
            initializer_range=0.2,
            **sizes,
            **dropout,
        )

    parts = [bert.Bert(config(2))]
    if cfg.lam:
        parts += [bert.BertForMaskedLM(config(1)), bert.Bert(config(2))]
    model = diffcse.DiffCSEModel(cfg, Tokens, *parts).double().train()
    optimizer = diffcse.make_optimizer(model)
    curve, first = [], {}
    for step in range(STEPS):
        batch = make_batch(step, V).shard()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        metrics = diffcse.train_step(model, optimizer, scaler, None, batch)
        row = {}
        for name, values in metrics.items():
            pair = torch.stack([torch.as_tensor(v).double() for v in values])
            total, count = distributed.all_reduce_sum(pair)
            row[name] = float(total / count)
        curve.append(row)
        if step == 0:
            grads = {name: p.grad for name, p in model.named_parameters()}
            first = {name: grad.clone() for name, grad in grads.items() if grad is not None}
    if distributed.world_size() > 1:  # the same update everywhere
        sums = torch.stack([p.double().sum() for p in model.parameters()])
        everywhere = [torch.zeros_like(sums) for _ in range(distributed.world_size())]
        dist.all_gather(everywhere, sums)
        assert all(torch.equal(other, everywhere[0]) for other in everywhere)
    if distributed.is_main():
        torch.save((curve, first, model.state_dict()), path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    train_in_process(0, 1, str(folder))
    start_method = "fork" if sys.platform == "linux" else "spawn"
    for processes in (2, 4):
        args = (processes, str(folder))
        mp.start_processes(train_in_process, args, nprocs=processes, start_method=start_method)
    return folder


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("reading", READINGS)
def test_parts_of_a_batch_give_what_the_whole_gives(reading, processes, trained):
    curve, first, state = torch.load(trained / f"{reading}-1.pt")
    assert len({round(row["loss"], 4) for row in curve}) > STEPS / 2
    curve_n, first_n, state_n = torch.load(trained / f"{reading}-{processes}.pt")
    for row, row_n in zip(curve, curve_n):
        assert row_n == pytest.approx(row, rel=1e-6, abs=1e-12)
    assert first.keys() == first_n.keys()
    for name in first:
        assert (first[name] - first_n[name]).norm() <= 1e-6 * first[name].norm() + 1e-12, name
    for name in state:
        if not name.endswith("key.bias"):  # its gradient is rounding error, which AdamW scales up
            distance = (state[name] - state_n[name]).double().norm()
            assert distance <= 1e-6 * state[name].double().norm() + 1e-8, name


def run_flags(tmp_path: Path) -> list[str]:
    texts = random_sentences(50, 1, 2)
    (tmp_path / "text.txt").write_text("\n".join(texts) + "\n")
    rows = [f"{a}\t{b}\t{i % 5}\n" for i, (a, b) in enumerate(zip(texts[:9], texts[9:]))]
    (tmp_path / "pairs.tsv").write_text("a\tb\tscore\n" + "".join(rows))
    flags = f"--config small --train-file {tmp_path}/text.txt --score {tmp_path}/pairs.tsv"
    flags += " --steps 6 --batch-size 8 --eval-every 3 --log-every 1 --dropout 0 --lr 1e-4"
    return (flags + " --no-generator-dropout --device cpu --amp off").split()


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 diffcse.py".split()


def test_torchrun_gives_the_run_of_one_process(tmp_path):
    """The command itself: one folder, one log (the same but for the times), one table."""
    logs = {}
    for name, program in (("one", ["diffcse.py"]), ("two", TORCHRUN)):
        command = [
            sys.executable,
            *program,
            *run_flags(tmp_path),
            "--out-dir",
            f"{tmp_path}/{name}",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("6 steps of 8") == 1
        assert done.stdout.count("minutes. The model of step") == 1
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs[name] = [json.loads(line) for line in lines]
    assert "cpu x 2, fp32" in done.stdout and len(logs["one"]) == len(logs["two"]) > 6
    for row, other in zip(logs["one"], logs["two"]):
        for times in ("seconds", "sentences_per_second"):
            row.pop(times, None), other.pop(times, None)
        assert row == pytest.approx(other, rel=1e-3, abs=1e-3)  # fp32, six steps of AdamW


def test_torchrun_can_be_stopped(tmp_path):
    flags = [*run_flags(tmp_path), "--steps", "1000", "--out-dir", f"{tmp_path}/stopped"]
    command = [sys.executable, *TORCHRUN, *flags]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "stopped" / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 4:
        assert running.poll() is None
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    errors = running.communicate(timeout=120)[1]
    assert errors.count("resume with: python diffcse.py --resume") == 1, errors
    assert int(re.search(r"stopped after step (\d+)", errors)[1]) >= 2
    assert (tmp_path / "stopped" / "state.safetensors").is_file()


def test_shards_are_equal_and_a_remainder_is_left_out(monkeypatch):
    assert distributed.shard(7) == slice(0, 7)
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank, expected in enumerate([slice(0, 2), slice(2, 4), slice(4, 6)]):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert distributed.shard(7) == expected
        x = torch.arange(28).view(14, 2)  # 7 sentences in 2 views
        batch = Batch(x, x.bool(), x, x.bool())
        assert torch.equal(batch.shard().x, x[2 * expected.start : 2 * expected.stop])
