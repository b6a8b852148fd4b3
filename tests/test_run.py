"""Resuming ends where an uninterrupted run ends, bit for bit; stopping, locks, full disks, NaN."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_log

import bert
import diffcse
from diffcse import PRESETS, Config
from engine import checkpoint
from engine import run as runs
from engine.cli import parse
from engine.device import pick_device
from engine.errors import UserError


class Crash(Exception):
    pass


def before_step(monkeypatch, number: int, action) -> list:
    """Call `action` at the start of the step of that number, from 1. Returns the steps taken."""
    train_step, steps = diffcse.train_step, []

    def wrapped(*args):
        steps.append(0)
        if len(steps) == number:
            action()
        return train_step(*args)

    monkeypatch.setattr(diffcse, "train_step", wrapped)
    return steps


def crash_at(monkeypatch, number: int) -> None:
    train_step = diffcse.train_step

    def crash() -> None:
        monkeypatch.setattr(diffcse, "train_step", train_step)
        raise Crash

    before_step(monkeypatch, number, crash)


def outcome(folder: Path) -> tuple:
    """Everything that two equal runs have in common."""
    results = json.loads((folder / "results.json").read_text())
    results = {k: v for k, v in results.items() if k not in ("minutes", "command", "folder")}
    weights = bert.read_safetensors(folder / "best" / "model.safetensors")
    return read_log(folder), results, {name: t.tolist() for name, t in weights.items()}


METHODS = {
    "published": {},
    "paper": {
        "edit": "sample",
        "edit_scope": "masked",
        "pads_in_loss": False,
        "generator_dropout": False,
        "views": "first",
    },
    "simcse": {"lam": 0.0, "projector": "tanh"},
    "bf16": {"amp": "bf16", "projector": "tanh"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_crashed_at_any_step_ends_as_one_that_did_not(
    train_tiny, tmp_path, monkeypatch, method
):
    """Log lines of several steps, epochs of 3 steps, a short last batch."""
    settings = dict(log_every=2, eval_every=3, steps=7, save_minutes=0, **METHODS[method])
    whole = tmp_path / "whole"
    train_tiny(**settings, out_dir=str(whole))
    for crashes in ([2], [3], [4], [6], [1, 2, 2, 2, 2, 2, 2]):
        out = tmp_path / f"crashed{crashes}"
        for i, step in enumerate(crashes):
            crash_at(monkeypatch, step)
            with pytest.raises(Crash):
                train_tiny(**settings, **({"resume": str(out)} if i else {"out_dir": str(out)}))
            assert (out / checkpoint.STATE).is_file() and not (out / "results.json").exists()
        torch.manual_seed(99), torch.rand(7)  # no random state is needed
        train_tiny(**settings, resume=str(out), out_dir="")
        assert outcome(out) == outcome(whole)
        assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()
        names = [{file.name for file in folder.iterdir()} for folder in (out, whole)]
        assert names[0] == names[1] and checkpoint.STATE not in names[0]
    assert [row["step"] for row in read_log(out)] == [0, 1, 2, 3, 3, 4, 6, 6, 7, 7]


def test_an_old_state_costs_steps_and_nothing_else(train_tiny, tmp_path, monkeypatch):
    """The state is of step 2, the crash at step 6: later log lines and models are made again."""
    settings = dict(log_every=1, eval_every=2, steps=8)
    train_tiny(**settings, out_dir=str(tmp_path / "whole"))
    saved, save_state = [], runs.save_state
    monkeypatch.setattr(
        runs, "save_state", lambda *a: saved.append(a[2].get("step")) or save_state(*a)
    )
    monkeypatch.setattr(runs.Run, "save_due", lambda self: self.step in (2, self.total))
    crash_at(monkeypatch, 7)
    with pytest.raises(Crash):
        train_tiny(**settings)
    assert saved == [None, 2] and read_log(tmp_path / "out")[-1]["step"] == 6
    train_tiny(**settings, resume=str(tmp_path / "out"))
    assert saved == [None, 2, 8] and outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_save_minutes(train_tiny, tmp_path, monkeypatch):
    """On a clock that counts: no state before the time has passed."""
    saved, now, save_state = [], [0.0], runs.save_state
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        runs, "save_state", lambda *a: saved.append(a[2].get("step")) or save_state(*a)
    )
    before_step(monkeypatch, 3, lambda: now.__setitem__(0, 301.0))
    train_tiny(save_minutes=5.0)
    assert saved == [None, 3, 5]


def test_only_settings_that_change_no_number_may_change(train_tiny, tiny, tmp_path, monkeypatch):
    crash_at(monkeypatch, 3)
    with pytest.raises(Crash):
        train_tiny(save_minutes=0)
    out = str(tmp_path / "out")
    for argv, message in [
        (["--resume", out, "--lam", "0"], "--lam is 0.0, but the run has 0.05"),
        (
            ["--resume", out, "--lr", "0.1"],
            "A resumed run keeps its settings, except: data, device",
        ),
        (["--resume", str(tmp_path / "none")], "no run there"),
        (["--config", "demo", "--resume", out], "but the run has"),
    ]:
        with pytest.raises(UserError) as error:
            parse(Config, PRESETS, argv)
        assert message in str(error.value)
    name, cfg = parse(
        Config, PRESETS, ["--resume", out, "--eval-every", "3", "--save-minutes", "9"]
    )
    assert (name, cfg.eval_every, cfg.save_minutes, cfg.resume) == ("run", 3, 9, out)
    text = tmp_path / "other.txt"
    text.write_text((tiny / "text.txt").read_text().replace("the", "a"))
    with pytest.raises(UserError, match="other.txt has changed since .*out started"):
        train_tiny(resume=out, train_file=str(text))
    with pytest.raises(
        UserError, match="out has an unfinished run; resume it with: python .*--resume"
    ):
        train_tiny()
    train_tiny(resume=out, eval_every=3)
    evaluated = [row["step"] for row in read_log(tmp_path / "out") if "score" in row]
    assert evaluated == [0, 2, 3, 5]  # every 2 steps, then every 3, and the last
    files = [file for file in (tmp_path / "out").iterdir() if file.is_file()]
    before = {file: file.read_bytes() for file in files if file.name != checkpoint.LOCK}
    with pytest.raises(UserError, match="is a finished run"):
        train_tiny(resume=out)
    with pytest.raises(UserError, match="is not empty"):
        train_tiny()
    assert before == {file: file.read_bytes() for file in before}


def test_a_kill_before_the_first_state_starts_again(train_tiny, tmp_path):
    train_tiny(out_dir=str(tmp_path / "whole"))
    out, again = tmp_path / "out", tmp_path / "again"
    out.mkdir()
    (out / ".config.json.1.tmp").write_text("{")  # killed in its first write
    train_tiny()
    assert outcome(out) == outcome(tmp_path / "whole")
    again.mkdir()
    (again / "config.json").write_bytes((out / "config.json").read_bytes())
    (again / "log.jsonl").write_text('{"step": 0}\n')
    train_tiny(resume=str(again), out_dir="")
    assert outcome(again) == outcome(tmp_path / "whole")


def test_a_kill_while_best_is_replaced_loses_no_model(train_tiny, tmp_path, monkeypatch):
    """Between the two renames, the earlier model has another name; resuming restores it."""
    train_tiny(out_dir=str(tmp_path / "whole"), save_minutes=0)
    crash_at(monkeypatch, 4)
    with pytest.raises(Crash):
        train_tiny(save_minutes=0)
    out = tmp_path / "out"
    os.rename(out / "best", out / ".best.earlier")
    train_tiny(resume=str(out), save_minutes=0)
    assert outcome(out) == outcome(tmp_path / "whole") and not (out / ".best.earlier").exists()


# ------------------------------------------------------------------------------------------------
# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(train_tiny, tmp_path, monkeypatch, capsys, number):
    train_tiny(out_dir=str(tmp_path / "whole"))
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    steps = before_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as exit:
        train_tiny()
    out = tmp_path / "out"
    assert exit.value.code == 128 + number and len(steps) == 3
    assert "stopped after step 3; resume with: python" in capsys.readouterr().err
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    train_tiny(resume=str(out))
    assert outcome(out) == outcome(tmp_path / "whole")


def test_a_second_signal_stops_at_once(train_tiny, tmp_path, monkeypatch):
    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before_step(monkeypatch, 3, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(save_minutes=0)
    assert checkpoint.load_state(tmp_path / "out")[1]["step"] == 2  # the last one, whole


# ------------------------------------------------------------------------------------------------
# The disk


def test_a_full_disk_is_one_line_and_the_old_state_stays(train_tiny, tmp_path, monkeypatch):
    """No space in the middle of the third state: the second is intact, and the run resumes."""
    train_tiny(out_dir=str(tmp_path / "whole"))
    write, states = checkpoint.write_safetensors, []

    def write_until_full(path, tensors) -> None:
        states.append(0)
        write(path, tensors)
        if len(states) == 4:  # the first has no step
            os.truncate(path, 100)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_safetensors", write_until_full)
    message = "cannot write .*state.safetensors: No space left on device; after fixing this, resume"
    with pytest.raises(UserError, match=message):
        train_tiny(save_minutes=0)
    out = tmp_path / "out"
    assert checkpoint.load_state(out)[1]["step"] == 2
    assert not list(out.glob(".*.tmp"))
    train_tiny(resume=str(out))
    assert outcome(out) == outcome(tmp_path / "whole")


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    """/dev/full in place of the log: one line, no traceback."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    out, text, pairs = tmp_path / "out", tmp_path / "text.txt", tmp_path / "pairs.tsv"
    out.mkdir()
    (out / "log.jsonl").symlink_to("/dev/full")
    text.write_text("".join(f"the cat number {i}\n" for i in range(40)))
    pairs.write_text("a\tb\tc\n" + "".join(f"cat {i}\tdog {i * i}\t{i}\n" for i in range(9)))
    small = "assets/small-bert"
    cfg = Config(small, small, str(text), score=str(pairs), steps=2, batch_size=4)
    (out / "config.json").write_text(json.dumps(asdict(cfg)))
    command = [sys.executable, str(ROOT / "diffcse.py"), "--resume", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert f"cannot write to {out}: " in done.stderr
    assert f"resume with: python diffcse.py --resume {out}" in done.stderr


def test_a_folder_that_is_deleted_stops_the_run(train_tiny, tmp_path, monkeypatch):
    steps = before_step(monkeypatch, 3, lambda: shutil.rmtree(tmp_path / "out"))
    with pytest.raises(UserError, match="out was deleted during the run"):
        train_tiny(save_minutes=0)
    assert len(steps) == 3 and not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_and_a_dead_process_holds_none(tmp_path):
    script = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from engine import checkpoint
        with checkpoint.locked(Path({str(tmp_path)!r})):
            print("held", flush=True)
            time.sleep(60)"""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    for enter in (
        lambda: checkpoint.locked(tmp_path),
        lambda: checkpoint.new_folder(str(tmp_path), "x"),
    ):
        with pytest.raises(UserError, match=rf"in use by another run \(process {holder.pid}\)"):
            with enter():
                pass
    holder.kill()
    holder.wait()
    with checkpoint.new_folder(str(tmp_path), "x") as folder:
        assert folder == tmp_path


def test_numbered_folders_are_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with checkpoint.new_folder("", "demo") as first, checkpoint.new_folder("", "demo") as second:
        assert (str(first), str(second)) == ("runs/demo-1", "runs/demo-2")


@pytest.mark.parametrize(
    "content, message", [(b"12", "damaged"), (None, "not a run's state; delete it to start again")]
)
def test_a_damaged_state_is_refused(tmp_path, content, message):
    bert.write_safetensors(
        tmp_path / checkpoint.STATE, {"run_state": torch.zeros(3, dtype=torch.uint8)}
    )
    if content is not None:
        (tmp_path / checkpoint.STATE).write_bytes(content)
    with pytest.raises(UserError, match=message):
        checkpoint.load_state(tmp_path)


# ------------------------------------------------------------------------------------------------
# NaN


@pytest.mark.parametrize(
    "name, message",
    [
        ("contrastive", "the contrastive loss is NaN or infinite at step 4"),
        ("difference", "the discriminator's loss is NaN or infinite at step 4"),
        ("grad_norm", "the gradient is NaN or infinite at step 4"),
    ],
)
def test_nan_stops_the_run_and_the_last_good_state_stays(
    train_tiny, tmp_path, monkeypatch, name, message
):
    train_step, steps = diffcse.train_step, []

    def nan_at_step_4(*args):
        metrics = train_step(*args)
        steps.append(0)
        return metrics | {name: (torch.tensor(math.nan), 1)} if len(steps) == 4 else metrics

    monkeypatch.setattr(diffcse, "train_step", nan_at_step_4)
    advice = ": try a lower --lr, or --amp off. .*best is the model of step 2"
    with pytest.raises(UserError, match=message + advice):
        train_tiny(save_minutes=0, log_every=3)
    tensors, state = checkpoint.load_state(tmp_path / "out")
    assert state["step"] == 3
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 1e-40}, {"lr": 1e30}, {"lr": 1e30, "log_every": 1000, "lam": 0.0}],
    ids=str,
)
def test_divergence_by_a_real_cause_names_its_step(train_tiny, tmp_path, changes):
    with pytest.raises(UserError, match="at step") as error:
        train_tiny(**dict(log_every=4, steps=20) | changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "results.json").exists()
    read_log(tmp_path / "out")  # without NaN


def test_an_fp16_overflow_is_a_skipped_step_and_endless_overflow_stops_the_run(tmp_path):
    run = runs.Run(Config(), "run", torch.device("cpu"), torch.float16)
    run.folder, run.step = tmp_path, 7
    run.pending = [{"contrastive": (math.nan, 1), "grad_norm": (math.inf, 1)}]
    run.scaler = torch.amp.GradScaler("cpu", enabled=True)
    run.scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    run.check_finite()
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 0.5})
    with pytest.raises(UserError, match="fp16 overflowed at all steps up to 7: try a lower --lr"):
        run.check_finite()


# ------------------------------------------------------------------------------------------------
# Device and precision


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    cpu = torch.device("cpu")
    assert pick_device("auto", "off") == (cpu, None)
    assert pick_device("cpu", "bf16") == (cpu, torch.bfloat16)
    with pytest.raises(UserError, match=r"--device cuda is not available \(available: cpu\)"):
        pick_device("cuda", "auto")
    with pytest.raises(UserError, match="--amp fp16 does not work on cpu; use off or bf16"):
        pick_device("cpu", "fp16")


@pytest.mark.parametrize("avx512, amx", [(False, False), (True, False), (False, True)])
def test_auto_is_bf16_where_the_cpu_multiplies_it(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    expected = torch.bfloat16 if avx512 or amx else None
    assert pick_device("cpu", "auto") == (torch.device("cpu"), expected)
