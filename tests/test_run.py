"""run.py and resuming: an interrupted run ends as an uninterrupted one, bit for bit; stopping, locks, full disks, losses that are no numbers."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_training import log_of, run, same_weights, tiny  # noqa: F401  (fixtures)

import bert
import diffcse
import run as runs
from bert import UserError
from config import Config, parse_args

ROOT = Path(diffcse.__file__).parent


class Crash(Exception):
    pass


def crash_at(monkeypatch, steps: int, error=Crash) -> None:
    """The next process dies before its step of that number: train_step raises."""
    real, made = diffcse.train_step, []

    def train_step(*args, **more):
        if len(made) == steps:
            monkeypatch.setattr(diffcse, "train_step", real)
            raise error
        made.append(0)
        return real(*args, **more)

    monkeypatch.setattr(diffcse, "train_step", train_step)


def outcome(folder: Path) -> tuple:
    results = json.loads((folder / "results.json").read_text())
    return log_of(folder), {key: value for key, value in results.items() if key not in ("minutes", "command")}


METHODS = [{}, {"edit": "sample", "edit_scope": "masked", "pads_in_loss": False, "generator_dropout": False, "views": "first"},
           {"lam": 0.0, "projector": "tanh"}, {"amp": "bf16", "projector": "tanh"}]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=["published", "paper", "simcse", "bf16"])
def test_a_run_that_died_at_any_step_ends_as_one_that_did_not(run, tmp_path, monkeypatch, method):  # noqa: F811
    """Log lines of several steps, epochs, a short last batch: killed before every step, once after the other, and at each alone."""
    options = dict(log_every=2, eval_every=3, steps=7, save_minutes=0, **method)  # 3 steps an epoch
    run(**options, out_dir=str(tmp_path / "whole"))
    for deaths in ([1], [2], [3], [5], [0, 1, 1, 1, 1, 1, 1]):
        out = tmp_path / f"died{deaths}"
        for i, steps in enumerate(deaths):
            crash_at(monkeypatch, steps)
            with pytest.raises(Crash):
                run(**options, **({"resume": str(out)} if i else {"out_dir": str(out)}))
            assert (out / runs.STATE).is_file() and not (out / "results.json").exists()
        torch.manual_seed(99), torch.rand(7)  # whatever happened since
        run(**options, resume=str(out), out_dir="")
        assert outcome(out) == outcome(tmp_path / "whole") and same_weights(out, tmp_path / "whole")
        assert (out / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()
        assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in (tmp_path / "whole").iterdir()) and not (out / runs.STATE).exists()
    assert [line["step"] for line in log_of(out)] == [0, 1, 2, 3, 4, 6, 6, 7, 7]


def test_states_that_are_old_cost_steps_and_nothing_else(run, tmp_path, monkeypatch):  # noqa: F811
    """The state is of step 2 and the run dies at step 6: log lines and a best model that it does not know of are made once more."""
    options = dict(log_every=1, eval_every=2, steps=8)
    run(**options, out_dir=str(tmp_path / "whole"))
    out, now = tmp_path / "out", [0.0]
    real = diffcse.save_state

    def clock() -> float:
        now[0] += 0.001
        return now[0]

    monkeypatch.setattr(diffcse.time, "time", clock)

    def save_state(folder, tensors, facts):
        real(folder, tensors, facts)
        saved.append(facts.get("step"))

    saved: list = []
    monkeypatch.setattr(diffcse, "save_state", save_state)
    step = diffcse.train_step

    def train_step(*args, **more):
        now[0] += 200 if len(saved) == 1 else 0  # 5 minutes are over after two steps, and never again
        return step(*args, **more)

    monkeypatch.setattr(diffcse, "train_step", train_step)
    crash_at(monkeypatch, 6)
    with pytest.raises(Crash):
        run(**options, out_dir=str(out))
    assert saved == [None, 2] and log_of(out)[-1]["step"] == 6
    monkeypatch.setattr(diffcse, "train_step", step)
    run(**options, resume=str(out))
    assert saved == [None, 2, 8] and outcome(out) == outcome(tmp_path / "whole") and same_weights(out, tmp_path / "whole")


def test_only_what_changes_no_number_may_change(run, tiny, tmp_path, monkeypatch):  # noqa: F811
    crash_at(monkeypatch, 2)
    with pytest.raises(Crash):
        run(save_minutes=0)
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"lr is 0.01 there and 0.1 here; lam is 0.05 there and 0.0 here. A run goes on as it began; data, device, "):
        parse_args(["--resume", out, "--lam", "0", "--lr", "0.1"])
    with pytest.raises(UserError, match="model is .* there and 'assets/small-bert' here"):
        parse_args(["--config", "demo", "--resume", out])
    name, cfg = parse_args(["--resume", out, "--eval-every", "3", "--log-every", "1", "--save-minutes", "9", "--device", "cpu"])
    assert (name, cfg.eval_every, cfg.save_minutes, cfg.resume) == ("run", 3, 9, out)
    for folder, says in [(tmp_path / "none", "there is no run in it$"), (tmp_path, "it can be the --out-dir of a new one")]:
        with pytest.raises(UserError, match=says):
            parse_args(["--resume", str(folder)])
    text = tmp_path / "other.txt"
    text.write_text((tiny / "text.txt").read_text().replace("the", "a"))
    with pytest.raises(UserError, match="the sentences of .*other.txt are not those that this run began with"):
        run(resume=out, train_file=str(text))
    with pytest.raises(UserError, match="out holds a run that has not ended: go on with it by python diffcse.py --resume "):
        run()
    run(resume=out, eval_every=3)
    assert [row["step"] for row in log_of(tmp_path / "out") if "score" in row] == [0, 2, 3, 5]  # every 2, then every 3 and the last
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()}
    with pytest.raises(UserError, match="holds a run that has ended"):
        run(resume=out)
    with pytest.raises(UserError, match="is there already and not an empty folder"):
        run()
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()}


def test_what_a_kill_left_before_the_first_state_is_begun_again(run, tmp_path):  # noqa: F811
    run(out_dir=str(tmp_path / "whole"))
    out = tmp_path / "out"
    out.mkdir()
    (out / ".config.json.1.tmp").write_text("{")  # killed within its first write: nothing to resume, but no obstacle
    run()
    assert outcome(out) == outcome(tmp_path / "whole")
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_bytes((out / "config.json").read_bytes())  # killed before the first state
    (again / "log.jsonl").write_text('{"step": 0}\n')
    run(resume=str(again), out_dir="")
    assert outcome(again) == outcome(tmp_path / "whole") and same_weights(again, out)


# --------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(run, tmp_path, monkeypatch, capsys, number):  # noqa: F811
    run(out_dir=str(tmp_path / "whole"))
    real, made, before = diffcse.train_step, [], [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def train_step(*args, **more):
        made.append(0)
        if len(made) == 3:
            os.kill(os.getpid(), number)
        return real(*args, **more)

    monkeypatch.setattr(diffcse, "train_step", train_step)
    with pytest.raises(SystemExit) as exit:
        run()
    out = tmp_path / "out"
    assert exit.value.code == 128 + number and len(made) == 3
    assert f"stopped after step 3 of 5. To go on: python diffcse.py --resume {out}" in capsys.readouterr().err
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]  # as they were
    run(resume=str(out))
    assert outcome(out) == outcome(tmp_path / "whole") and same_weights(out, tmp_path / "whole")


def test_a_second_signal_stops_at_once(run, tmp_path, monkeypatch):  # noqa: F811
    real, made = diffcse.train_step, []

    def train_step(*args, **more):
        made.append(0)
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **more)

    monkeypatch.setattr(diffcse, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        run(save_minutes=0)
    state = bert.read_safetensors(tmp_path / "out" / runs.STATE)
    assert json.loads(state["facts"].numpy().tobytes())["step"] == 2  # the last one, whole


# ----------------------------------------------------------------------------------------------------- the disk


def test_a_full_disk_is_one_line_and_the_old_state_stays(run, tmp_path, monkeypatch):  # noqa: F811
    """No space left in the middle of the third state: the second is still there and the run goes on from it."""
    run(out_dir=str(tmp_path / "whole"))
    real, states = os.fsync, []

    def fsync(fd):
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".tmp") and "state" in os.readlink(f"/proc/self/fd/{fd}"):
            states.append(0)
            if len(states) == 4:  # the first has no step in it
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("asks /proc which file is written")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="state.safetensors could not be written: No space left on device; what was there before is unharmed"):
        run(save_minutes=0)
    out = tmp_path / "out"
    assert runs.load_state(out)[1]["step"] == 2
    assert not list(out.glob("*.tmp")) and not list(out.glob(".*.tmp"))
    run(resume=str(out))
    assert outcome(out) == outcome(tmp_path / "whole") and same_weights(out, tmp_path / "whole")


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    """/dev/full, as a log: no traceback from the write, nor from the close."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.jsonl").symlink_to("/dev/full")
    words = tmp_path / "text.txt"
    words.write_text("".join(f"the cat number {i}\n" for i in range(40)))
    (tmp_path / "pairs.tsv").write_text("a\tb\tc\n" + "".join(f"cat {i}\tdog {i * i}\t{i}\n" for i in range(9)))
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(Config(
        model="assets/small-bert", generator="assets/small-bert", train_file=str(words), score=str(tmp_path / "pairs.tsv"), steps=2, batch_size=4))))  # fmt: skip
    done = subprocess.run([sys.executable, str(ROOT / "diffcse.py"), "--resume", str(out)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert f"{out} cannot be written to any more: " in done.stderr and f"When it can: python diffcse.py --resume {out}" in done.stderr


def test_a_folder_that_is_deleted_stops_the_run(run, tmp_path, monkeypatch):  # noqa: F811
    real, made = diffcse.train_step, []

    def train_step(*args, **more):
        made.append(0)
        if len(made) == 3:
            shutil.rmtree(tmp_path / "out")
        return real(*args, **more)

    monkeypatch.setattr(diffcse, "train_step", train_step)
    with pytest.raises(UserError, match="out was deleted while the run wrote to it: training stopped"):
        run(save_minutes=0)
    assert len(made) == 3 and not (tmp_path / "out").exists()


def test_two_runs_in_one_folder_the_second_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    """The lock is the system's: a process that is killed lets go of it."""
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(f"""
        import sys, time; sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path; import run
        with run.locked(Path({str(tmp_path)!r})): print("held", flush=True); time.sleep(60)""")], stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    for enter in (lambda: runs.locked(tmp_path), lambda: runs.new_folder(str(tmp_path), "x")):
        with pytest.raises(UserError, match=rf"is in use by another run \(process {holder.pid}\)"), enter():
            pass
    holder.kill()
    holder.wait()
    with runs.new_folder(str(tmp_path), "x") as folder:
        assert folder == tmp_path


def test_numbered_folders_are_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with runs.new_folder("", "demo") as first, runs.new_folder("", "demo") as second:
        assert (str(first), str(second)) == ("runs/demo-1", "runs/demo-2")


@pytest.mark.parametrize("content, says", [
    (b"12", "not a whole safetensors file"), (None, "is no state of a run; delete it to begin the run again")])
def test_a_damaged_state_is_refused(tmp_path, content, says):
    bert.write_safetensors(tmp_path / runs.STATE, {"facts": torch.zeros(3, dtype=torch.uint8)})
    if content is not None:
        (tmp_path / runs.STATE).write_bytes(content)
    with pytest.raises(UserError, match=says):
        runs.load_state(tmp_path)


# -------------------------------------------------------------------------------------------- losses that are no numbers


@pytest.mark.parametrize("what, says", [("contrastive", "the contrastive loss is not a number at step 4"), ("prediction", "the loss of the discriminator is not"),
                                        ("grad_norm", "the gradient is not a number at step 4")])  # fmt: skip
def test_a_loss_that_is_no_number_stops_the_run_and_the_last_good_state_stays(run, tmp_path, monkeypatch, what, says):  # noqa: F811
    real, made = diffcse.train_step, []

    def train_step(*args, **more):
        sums = real(*args, **more)
        made.append(0)
        return sums | {what: torch.tensor(math.nan)} if len(made) == 4 else sums

    monkeypatch.setattr(diffcse, "train_step", train_step)
    with pytest.raises(UserError, match=says + ".*best holds the model of step 2. Try a lower --lr, or --amp off"):
        run(save_minutes=0, log_every=3)
    assert runs.load_state(tmp_path / "out")[1]["step"] == 3
    assert all(t.isfinite().all() for name, t in runs.load_state(tmp_path / "out")[0].items() if t.is_floating_point())


def test_in_fp16_an_overflow_is_a_step_less_and_overflow_without_end_stops_the_run():
    scaler = torch.amp.GradScaler("cuda" if torch.cuda.is_available() else "cpu", enabled=True)
    nan = {"contrastive": torch.tensor(math.nan), "grad_norm": torch.tensor(math.inf)}
    scaler._lazy_init_scale_growth_tracker(torch.device("cpu")) if not torch.cuda.is_available() else None
    diffcse.check_finite([nan], 7, scaler, "kept")
    scaler.load_state_dict(scaler.state_dict() | {"scale": 0.5})
    with pytest.raises(UserError, match="fp16 overflows at every step up to 7, at any scale: training stopped; kept. Try a lower --lr"):
        diffcse.check_finite([nan], 7, scaler, "kept")


def test_config_has_the_two_fields():
    assert Config(save_minutes=0.5).check().resume == ""
    with pytest.raises(UserError, match="--save-minutes is -1: it must be 0 or above"):
        Config(save_minutes=-1).check()
