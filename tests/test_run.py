"""Resuming ends where an uninterrupted run ends, bit for bit; stopping, locks, full disks, NaN."""

import errno
import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import read_log

import bert
import diffcse
from diffcse import Config
from engine import checkpoint
from engine import run as runs
from engine.device import pick_device
from engine.errors import UserError


def before_step(monkeypatch, number: int, action) -> None:
    """Call `action` at the start of the next run's step of that number, from 1."""
    train_step, steps = diffcse.train_step, []

    def wrapped(*args):
        steps.append(0)
        if len(steps) == number:
            monkeypatch.setattr(diffcse, "train_step", train_step)
            action()
        return train_step(*args)

    monkeypatch.setattr(diffcse, "train_step", wrapped)


def crash_at(step: int, monkeypatch, train, **changes) -> None:
    before_step(monkeypatch, step, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(**changes)


def outcome(folder: Path) -> tuple:
    """Everything that two equal runs have in common."""
    results = json.loads((folder / "results.json").read_text())
    results = {k: v for k, v in results.items() if k not in ("minutes", "command", "folder")}
    return read_log(folder), results, (folder / "best" / "model.safetensors").read_bytes()


def check_resumed(train, tmp_path: Path, **changes) -> None:
    """Resume the run in "out": it ends as one that was not stopped."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    torch.manual_seed(99)  # no random state is needed
    train(resume=str(out), out_dir="", **changes)
    if not whole.exists():
        train(out_dir=str(whole), **changes)
    assert outcome(out) == outcome(whole)
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}


METHODS = {
    "published": {},
    "paper": dict(edit="sample", edit_scope="masked", generator_dropout=False, views="first"),
    "simcse": dict(lam=0.0, projector="tanh"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_crash_at_any_step_changes_nothing(train_tiny, tmp_path, monkeypatch, method):
    """Log lines of several steps, epochs of 3 steps, a short last batch."""
    settings = dict(log_every=4, eval_every=4, steps=7, save_minutes=0, **METHODS[method])
    out = tmp_path / "out"
    for crashes in ([5], [1, 2, 2, 2, 2, 2, 2]):
        for i, step in enumerate(crashes):
            crash_at(step, monkeypatch, train_tiny, **settings, resume=str(out) if i else "")
            assert (out / checkpoint.STATE).is_file() and not (out / "results.json").exists()
            if (out / "best").exists():  # as a kill between replace_folder's two renames leaves it
                os.rename(out / "best", out / ".best.earlier")
        check_resumed(train_tiny, tmp_path, **settings)
        assert [row["step"] for row in read_log(out)] == [0, 1, 4, 4, 7, 7]
        assert not (out / checkpoint.STATE).exists()
        shutil.rmtree(out)


def test_save_minutes_and_an_old_state(train_tiny, tmp_path, monkeypatch):
    """On a clock that counts. Later log lines and models than the state's are made again."""
    now, saved, save_state = [0.0], [], runs.save_state

    def spy(folder, tensors, state) -> None:
        saved.append(state.get("step"))  # the first state has none
        save_state(folder, tensors, state)

    monkeypatch.setattr(runs, "save_state", spy)
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    before_step(monkeypatch, 2, lambda: now.__setitem__(0, 300.0))
    crash_at(7, monkeypatch, train_tiny, steps=8, save_minutes=5.0)
    assert saved == [None, 2] and read_log(tmp_path / "out")[-1]["step"] == 6
    check_resumed(train_tiny, tmp_path, steps=8, save_minutes=5.0)
    assert saved[2:] == [8, None, 8]


def test_changed_text_and_folders_with_a_run_are_refused(train_tiny, tiny, tmp_path, monkeypatch):
    crash_at(3, monkeypatch, train_tiny, save_minutes=0)
    out, text = tmp_path / "out", tmp_path / "other.txt"
    text.write_text((tiny / "text.txt").read_text().replace("the", "a"))
    with pytest.raises(UserError, match="other.txt has changed since .*out started"):
        train_tiny(resume=str(out), train_file=str(text))
    with pytest.raises(UserError, match="out has an unfinished run; resume .*: python .*--resume"):
        train_tiny()
    train_tiny(resume=str(out), eval_every=3)
    evaluated = [row["step"] for row in read_log(out) if "score" in row]
    assert evaluated == [0, 2, 3, 5]  # every 2 steps, then every 3, and the last
    before = outcome(out)
    for changes, message in ({"resume": str(out)}, "is a finished run"), ({}, "is not empty"):
        with pytest.raises(UserError, match=message):
            train_tiny(**changes)
    assert outcome(out) == before


def test_numbered_folders(train_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [train_tiny(out_dir="", steps=1)["folder"] for _ in range(2)]
    assert folders == ["runs/run-1", "runs/run-2"]


def test_a_kill_before_the_first_state_starts_again(train_tiny, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    out.mkdir()
    (out / ".config.json.1.tmp").write_text("{")  # killed in its first write
    train_tiny()
    shutil.copytree(out, whole)
    for file in ("results.json", "best/model.safetensors"):
        (out / file).unlink()
    check_resumed(train_tiny, tmp_path)


# ------------------------------------------------------------------------------------------------
# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(train_tiny, tmp_path, monkeypatch, capsys, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    before_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as exit:
        train_tiny()
    assert exit.value.code == 128 + number
    assert "stopped after step 3; resume with: python" in capsys.readouterr().err
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    check_resumed(train_tiny, tmp_path)


def test_a_second_signal_stops_at_once(train_tiny, tmp_path, monkeypatch):
    interrupt = partial(os.kill, os.getpid(), signal.SIGINT)
    before_step(monkeypatch, 3, lambda: (interrupt(), interrupt()))
    with pytest.raises(KeyboardInterrupt):
        train_tiny(save_minutes=0)
    assert checkpoint.load_state(tmp_path / "out")[1]["step"] == 2  # the last one, whole


# ------------------------------------------------------------------------------------------------
# The disk


@pytest.mark.parametrize(
    "module, name, message",
    [
        (checkpoint, "write_safetensors", "write .*state.safetensors: {}; .* resume the run in "),
        (runs, "save_state", "write to .*out: {}. .*resume with: python .* --resume .*out$"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_resumes(
    train_tiny, tmp_path, monkeypatch, module, name, message
):
    error = "No space left on device"

    def write_half(path, *_) -> None:
        if not path.is_dir():
            path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, error)

    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda: patch.setattr(module, name, write_half))
        with pytest.raises(UserError, match="^cannot " + message.format(error)):
            train_tiny(save_minutes=0)
    check_resumed(train_tiny, tmp_path, save_minutes=0)


def test_a_folder_that_is_deleted_stops_the_run(train_tiny, tmp_path, monkeypatch):
    before_step(monkeypatch, 3, lambda: shutil.rmtree(tmp_path / "out"))
    with pytest.raises(UserError, match="out was deleted during the run"):
        train_tiny(save_minutes=0)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    in_use = rf"in use by another run \(process {os.getpid()}\)"
    with checkpoint.locked(tmp_path):
        for second in (checkpoint.locked(tmp_path), checkpoint.new_folder(str(tmp_path), "x")):
            with pytest.raises(UserError, match=in_use):
                second.__enter__()
    with checkpoint.new_folder(str(tmp_path), "x") as folder:
        assert folder == tmp_path


def test_a_damaged_state_is_refused(tmp_path):
    state = tmp_path / checkpoint.STATE
    bert.write_safetensors(state, {"run_state": torch.zeros(3).byte()})  # not JSON
    for content in (state.read_bytes(), b"12"):
        state.write_bytes(content)
        with pytest.raises(UserError, match="damaged, or not a run's state; delete it to start"):
            checkpoint.load_state(tmp_path)


# ------------------------------------------------------------------------------------------------
# NaN


@pytest.mark.parametrize("name", ["contrastive", "difference", "grad_norm"])
def test_nan_stops_the_run_and_the_last_good_state_stays(train_tiny, tmp_path, monkeypatch, name):
    train_step, nan = diffcse.train_step, {}
    monkeypatch.setattr(diffcse, "train_step", lambda *args: train_step(*args) | nan)
    before_step(monkeypatch, 4, lambda: nan.update({name: (torch.tensor(math.nan), 1)}))
    message = (
        f"^{runs.CHECKED[name]} is NaN or infinite at step 4: try a lower --lr, or --amp off. "
    )
    with pytest.raises(UserError, match=message + ".*best is the model of step 2$"):
        train_tiny(save_minutes=0, log_every=3)
    assert read_log(tmp_path / "out")[-1]["step"] == 3  # without NaN
    tensors, state = checkpoint.load_state(tmp_path / "out")
    assert state["step"] == 3
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_an_fp16_overflow_is_a_skipped_step_and_endless_overflow_stops_the_run(tmp_path):
    run = runs.Run(Config(), "run", torch.device("cpu"), torch.float16)
    run.folder, run.step = tmp_path, 7
    run.pending = [{"contrastive": (math.nan, 1), "grad_norm": (math.inf, 1)}]
    run.scaler = torch.amp.GradScaler("cpu", enabled=True)
    run.scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    run.check_finite()
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 0.5})
    message = "^fp16 overflowed at all steps up to 7: try a lower --lr.* No model was saved yet$"
    with pytest.raises(UserError, match=message):
        run.check_finite()


# ------------------------------------------------------------------------------------------------
# Device and precision


@pytest.mark.parametrize(
    "device, amp, hardware, expected",
    [
        ("cpu", "bf16", "", "cpu torch.bfloat16"),
        ("auto", "auto", "", "cpu None"),
        ("cpu", "auto", "_is_avx512_bf16_supported", "cpu torch.bfloat16"),
        ("cpu", "auto", "_is_amx_tile_supported", "cpu torch.bfloat16"),
        ("auto", "auto", "cuda", "cuda torch.float16"),
        ("auto", "auto", "cuda bf16", "cuda torch.bfloat16"),
        ("auto", "auto", "mps", "mps None"),
        ("cuda", "auto", "", "--device cuda is not available (available: cpu)"),
        ("cpu", "fp16", "cuda", "--amp fp16 does not work on cpu; use off or bf16"),
    ],
)
def test_pick_device(monkeypatch, device, amp, hardware, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in hardware)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: "bf16" in hardware)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: hardware == "mps")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: hardware == name, raising=False)
    try:
        picked = "{} {}".format(*pick_device(device, amp))
    except UserError as error:
        picked = str(error)
    assert picked == expected
