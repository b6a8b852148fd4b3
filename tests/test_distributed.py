"""Several processes with parts of a batch compute what one computes with all of it."""

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
from conftest import ROOT, random_sentences, read_log

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
STEPS, PROCESSES = 20, 4
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 diffcse.py".split()


def train_in_process(rank: int, tiny: str, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    outcomes = {reading: train_reading(reading, tiny, folder) for reading in READINGS}
    if rank == 0:
        torch.save(outcomes, f"{folder}/outcomes.pt")
    dist.destroy_process_group()


def train_reading(reading: str, tiny: str, folder: str) -> tuple[list[dict], dict, dict]:
    """In fp64, without dropout: each step's metrics, the first gradients, the final weights."""
    torch.manual_seed(0)
    settings = dict(lam=0.3, temperature=0.1, lr=1e-3, dropout=0.0, generator_dropout=False)
    settings |= dict(model=tiny, generator=tiny, train_file=f"{folder}/text.txt", batch_size=12)
    if reading == "triples":
        settings["train_file"] = f"{folder}/triples.tsv"
    cfg = diffcse.Config(**settings | READINGS[reading])
    model = diffcse.DiffCSEModel.from_pretrained(cfg).double().train()
    sentences = model.load_sentences()
    optimizer = diffcse.make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    curve, gradients = [], {}
    for step in range(STEPS):
        batch = diffcse.draw_batch(sentences, model.tokenizer, cfg, step).shard()
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
def trained(tiny, tmp_path_factory) -> tuple[dict, dict]:
    """What one process and what several have computed, by reading. Batches of 12, 12 and 8."""
    folder, texts = tmp_path_factory.mktemp("processes"), random_sentences(34, 1, 1)
    (folder / "text.txt").write_text("\n".join(texts[2:]))
    rows = [f"{a}\t{b}\t{c}\n" for a, b, c in zip(texts, texts[1:], texts[2:])]
    (folder / "triples.tsv").write_text("a\tb\tc\n" + "".join(rows))
    args = (str(tiny), str(folder))
    alone = {reading: train_reading(reading, *args) for reading in READINGS}
    start_method = "fork" if sys.platform == "linux" else "spawn"
    mp.start_processes(train_in_process, args, nprocs=PROCESSES, start_method=start_method)
    return alone, torch.load(folder / "outcomes.pt")


@pytest.mark.parametrize("reading", READINGS)
def test_parts_of_a_batch_give_what_the_whole_gives(reading, trained):
    (curve, *expected), (curve_n, *found) = (outcomes[reading] for outcomes in trained)
    assert len({round(row["loss"], 4) for row in curve}) > STEPS / 2
    for row, row_n in zip(curve, curve_n):
        assert row_n == pytest.approx(row, rel=1e-6, abs=1e-12)
    for tensors, tensors_n, rounding in zip(expected, found, (1e-12, 1e-8)):
        assert tensors.keys() == tensors_n.keys()
        for name, tensor in tensors.items():
            if not name.endswith("key.bias"):  # its gradient is rounding error
                distance = (tensor - tensors_n[name]).double().norm()
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
    x = torch.arange(28).view(14, 2)  # 7 sentences in 2 views
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank, expected in enumerate([x[:4], x[4:8], x[8:12]]):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert torch.equal(Batch(x, x.bool(), x, x.bool()).shard().x, expected)
