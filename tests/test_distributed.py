"""Two and four processes with parts of a batch compute what one computes with all of it."""

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
from conftest import ROOT, Words, random_sentences, read_log

import bert
import diffcse
from data import Batch
from engine import distributed

READINGS = {
    "published": {},
    "paper": dict(edit_scope="masked", pads_in_loss=False, views="first", protect_sep=True),
    "sum": dict(reduction="sum", lam=0.01),
    "simcse": dict(lam=0.0, projector="tanh"),
    "triples": dict(hard_negative_weight=0.3),
}
STEPS = 20
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 diffcse.py".split()


def train_in_process(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        meeting = f"file://{folder}/meeting-{processes}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    for reading in READINGS:
        outcome = train_reading(reading)
        if rank == 0:
            torch.save(outcome, f"{folder}/{reading}-{processes}.pt")
    if processes > 1:
        dist.destroy_process_group()


def make_batch(step: int, V: int) -> Batch:
    """8, 4, 12, ... sentences of 3 to 11 tokens."""
    rng = torch.Generator().manual_seed(step)
    R = (8, 4, 12)[step % 3] * V
    lengths = torch.randint(3, 12, (R,), generator=rng)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    x = torch.randint(6, 60, mask.shape, generator=rng).masked_fill(~mask, Words.pad_id)
    x[:, 0], x[torch.arange(R), lengths - 1] = Words.cls_id, Words.sep_id
    selected = mask & (x > 5) & (torch.rand(mask.shape, generator=rng) < 0.4)
    return Batch(x, mask, x.masked_fill(selected, Words.mask_id), selected, V)


def train_reading(reading: str) -> tuple[list[dict], dict, dict]:
    """In fp64, without dropout: each step's metrics, the first gradients, the final weights."""
    torch.manual_seed(0)
    settings = {"lam": 0.3, "temperature": 0.1, "lr": 1e-3, "generator_dropout": False}
    cfg = diffcse.Config(**settings | READINGS[reading])
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=60)
    sizes |= dict(max_position_embeddings=16, num_hidden_layers=2, initializer_range=0.2)
    config = bert.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    parts = [bert.BertForMaskedLM(config), bert.Bert(config)] if cfg.lam else []
    model = diffcse.DiffCSEModel(cfg, Words, bert.Bert(config), *parts).double().train()
    optimizer = diffcse.make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    curve, gradients = [], {}
    for step in range(STEPS):
        batch = make_batch(step, V=3 if reading == "triples" else 2).shard()
        metrics = diffcse.train_step(model, optimizer, scaler, None, batch)
        row = {}
        for name, values in metrics.items():
            pair = torch.stack([torch.as_tensor(v).double() for v in values])
            total, count = distributed.all_reduce_sum(pair)
            row[name] = float(total / count)
        curve.append(row)
        if step == 0:
            trained = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
            gradients = {name: p.grad.clone() for name, p in trained}
    sums = torch.stack([p.sum() for p in model.parameters()])
    assert torch.equal(sums, distributed.broadcast(sums))  # the same update everywhere
    return curve, gradients, model.state_dict()


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
    curve, gradients, state = torch.load(trained / f"{reading}-1.pt")
    assert len({round(row["loss"], 4) for row in curve}) > STEPS / 2
    curve_n, gradients_n, state_n = torch.load(trained / f"{reading}-{processes}.pt")
    for row, row_n in zip(curve, curve_n):
        assert row_n == pytest.approx(row, rel=1e-6, abs=1e-12)
    assert gradients.keys() == gradients_n.keys()
    for expected, found, rounding in (gradients, gradients_n, 1e-12), (state, state_n, 1e-8):
        for name, tensor in expected.items():
            if not name.endswith("key.bias"):  # its gradient is rounding error
                distance = (tensor - found[name]).double().norm()
                assert distance <= 1e-6 * tensor.double().norm() + rounding, name


def command(tmp_path: Path, program: list[str], out: str, steps: int) -> list[str]:
    texts = random_sentences(50, 1, 2)
    (tmp_path / "text.txt").write_text("\n".join(texts) + "\n")
    rows = [f"{a}\t{b}\t{i % 5}\n" for i, (a, b) in enumerate(zip(texts[:9], texts[9:]))]
    (tmp_path / "pairs.tsv").write_text("a\tb\tscore\n" + "".join(rows))
    flags = f"--config small --train-file {tmp_path}/text.txt --score {tmp_path}/pairs.tsv"
    flags += f" --out-dir {tmp_path / out} --steps {steps} --batch-size 8 --eval-every 3 --lr 1e-4"
    flags += " --log-every 1 --dropout 0 --no-generator-dropout --device cpu --amp off"
    return [sys.executable, *program, *flags.split()]


def test_torchrun_gives_the_run_of_one_process(tmp_path):
    """The command itself: one folder, one log (the same but for the times), one table."""
    logs = []
    for out, program in (("one", ["diffcse.py"]), ("two", TORCHRUN)):
        words = command(tmp_path, program, out, steps=6)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("6 steps of 8") == 1
        assert done.stdout.count("minutes. The model of step") == 1
        logs.append(read_log(tmp_path / out))
    assert "cpu x 2, fp32" in done.stdout and len(logs[0]) == len(logs[1]) > 6
    for row, other in zip(*logs):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-3)  # fp32, six steps of AdamW


def test_torchrun_can_be_stopped(tmp_path):
    words = command(tmp_path, TORCHRUN, "stopped", steps=1000)
    running = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
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
