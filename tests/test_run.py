"""Resuming ends where an uninterrupted run ends, bit for bit; stopping, locks, full disks, NaN."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, one_line, random_sentences, read_log

import bert
import diffcse
import eval_sts
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
    """As a kill: nothing is tidied up."""
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "discard", lambda self: None)
        before_step(patch, step, lambda: 1 / 0)
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
    with pytest.raises(UserError, match="--train-file .*other.txt is not what .*out started with"):
        train_tiny(resume=str(out), train_file=str(text))
    with pytest.raises(UserError, match="out has an unfinished run; resume .*: python .*--resume"):
        train_tiny()
    shutil.copytree(out, tmp_path / "out-simcse")
    train_tiny(resume=str(out), eval_every=3)
    evaluated = [row["step"] for row in read_log(out) if "score" in row]
    assert evaluated == [0, 2, 3, 5]  # every 2 steps, then every 3, and the last
    before = outcome(out)
    finished = "is a finished run: it has a results.json; did you mean .*out-simcse"
    for changes, message in ({"resume": str(out)}, finished), ({}, "is not empty"):
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


def make_another(out: Path) -> None:
    out.mkdir()
    (out / "log.jsonl").touch()


RENAMED, DELETED = "out was renamed during .* --resume .*{}$", "out was deleted during the run, or"
MOVES = {  # what a user does to "out" during a run: the message, and where the run then resumes
    "renamed": (lambda out, new: out.rename(new), RENAMED, "new"),
    "renamed, another made": (
        lambda out, new: (out.rename(new), make_another(out)),
        RENAMED,
        "new",
    ),
    "to another disk": (
        lambda *two: (shutil.copytree(*two), shutil.rmtree(two[0])),
        DELETED,
        "new",
    ),
    "deleted": (lambda out, new: shutil.rmtree(out), DELETED, None),
    "deleted, another made": (
        lambda out, new: (shutil.rmtree(out), make_another(out)),
        DELETED,
        None,
    ),
    "log deleted": (lambda out, new: (out / "log.jsonl").unlink(), DELETED, "out"),
    "best deleted": (lambda out, new: shutil.rmtree(out / "best"), "best was deleted", "out"),
}


@pytest.mark.parametrize("eval_every", [1, 3])  # noticed by log(), by save()
@pytest.mark.parametrize("name", MOVES)
def test_a_folder_that_is_moved_stops_the_run_and_resumes(
    train_tiny, tmp_path, monkeypatch, name, eval_every
):
    move, message, resumes = MOVES[name]
    out, new = tmp_path / "out", tmp_path / "new"
    settings = dict(save_minutes=0, steps=8, eval_every=eval_every, log_every=3)
    monkeypatch.setattr(runs.Run, "is_best", lambda self, scores: True)
    before_step(monkeypatch, 5, lambda: move(out, new))
    has_proc = Path("/proc/self/fd").is_dir()
    with pytest.raises(
        UserError, match=message.format("/new" if has_proc else " ITS_NEW_NAME")
    ) as error:
        train_tiny(**settings)
    assert one_line(error)
    if resumes != "out":
        assert not [file for file in out.rglob("*") if file.stat().st_size]
        shutil.rmtree(out, ignore_errors=True)
    if resumes == "new":
        new.rename(out)
    if resumes:
        assert checkpoint.load_state(out)[1]["step"] == 4
        check_resumed(train_tiny, tmp_path, **settings)


def test_a_folder_that_is_moved_at_the_end_has_no_results(train_tiny, tmp_path, monkeypatch):
    """The last scoring takes minutes. The new folder under the old name is left alone."""
    out, new, test = tmp_path / "out", tmp_path / "new", eval_sts.Score.test

    def score(self, encoder):
        if (out / "best").exists() and checkpoint.load_state(out)[1]["step"] == 5:
            out.rename(new), out.mkdir()
        return test(self, encoder)

    monkeypatch.setattr(eval_sts.Score, "test", score)
    with pytest.raises(UserError, match="out was renamed during the run"):
        train_tiny()
    assert not any(out.iterdir()) and not (new / "results.json").exists()
    out.rmdir(), new.rename(out)
    monkeypatch.setattr(eval_sts.Score, "test", test)
    check_resumed(train_tiny, tmp_path)


def test_a_run_without_a_step_deletes_no_other_folder(train_tiny, tmp_path, monkeypatch):
    out, new = tmp_path / "out", tmp_path / "new"
    mine = out / "config.json"
    before_step(monkeypatch, 1, lambda: (out.rename(new), out.mkdir(), mine.touch(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train_tiny()
    assert mine.exists() and (new / "state.safetensors").exists()


@pytest.mark.parametrize("reason", ["equal ratings", "no memory", "Ctrl-C"])
def test_a_run_without_a_step_leaves_nothing_behind(train_tiny, tmp_path, monkeypatch, reason):
    (tmp_path / "pairs.tsv").write_text("a\tb\ts\nthe cat\ta dog\t3\nthe dog\ta cat\t3\n")
    changes = {"score": str(tmp_path / "pairs.tsv")} if reason == "equal ratings" else {}
    if reason == "no memory":
        before_step(monkeypatch, 1, lambda: torch.empty(1 << 50))
    if reason == "Ctrl-C":
        before_step(monkeypatch, 1, lambda: [signal.raise_signal(signal.SIGINT) for _ in "12"])
    with pytest.raises((UserError, RuntimeError, KeyboardInterrupt)):
        train_tiny(**changes)
    assert not (tmp_path / "out").exists()
    train_tiny()


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
# Moved, damaged, or resumed from elsewhere


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory) -> tuple[Path, tuple]:
    """A folder with inputs and a run that was killed in step 5; and the end of an unharmed one.

    The model of step 2 is the best, so the rest of the run does not write best/ again.
    """
    home = tmp_path_factory.mktemp("killed") / "home"
    shutil.copytree(tiny, home / "model")
    (home / "model" / "text.txt").rename(home / "text.txt")
    pairs = zip(random_sentences(9, 2, 1), random_sentences(9, 3, 1), range(9))
    lines = ["a\tb\tscore\n", *("{}\t{}\t{}\n".format(*pair) for pair in pairs)]
    (home / "pairs.tsv").write_text("".join(lines))
    settings = dict(model="model", generator="model", train_file="text.txt", score="pairs.tsv")
    settings |= dict(batch_size=16, steps=6, eval_every=2, log_every=3, save_minutes=0, lr=1e-2)

    def train(folder: str) -> dict:
        return diffcse.train(Config(**settings, out_dir=folder, device="cpu", amp="off"))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)  # the paths are relative
        patch.setattr(runs.Run, "is_best", lambda self, scores: self.step == 2)
        train("../whole")
        crash_at(5, patch, train, folder="run")
    shutil.copytree(home, home.with_name("copy"))
    return home, outcome(home.with_name("whole"))


@pytest.fixture
def resume(killed, tmp_path, monkeypatch, command):
    """resume(folder, *flags): its exit code and stderr, and the number of steps taken.

    resume.home() puts the run and its inputs back.
    """
    steps, train_step = [], diffcse.train_step
    monkeypatch.setattr(
        diffcse, "train_step", lambda *args: (steps.append(0), train_step(*args))[1]
    )
    monkeypatch.setattr(runs.Run, "is_best", lambda self, scores: self.step == 2)

    def call(folder: Path, *flags) -> tuple[int, str, int]:
        steps.clear()
        code, _, err = command(diffcse.main, "--resume", folder, *flags)
        if code == 0:
            assert outcome(Path(folder)) == killed[1]
        else:
            lines = [line for line in err.splitlines() if not line.startswith("note: ")]
            assert code == 2 and steps == [] and len(lines) == 1 and lines[0][:7] == "error: ", err
        return code, err, len(steps)

    def home() -> Path:
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(killed[0])
        shutil.copytree(killed[0].with_name("copy"), killed[0])
        return killed[0]

    call.home = home
    return call


def test_random_accidents_end_as_an_unharmed_run_or_in_one_line(resume, tmp_path, monkeypatch):
    """Moving, deleting a file, truncating one, resuming from elsewhere, in any combination."""
    codes, actions = [], ["move run", "move inputs", "delete", "truncate", "elsewhere"]
    for seed in range(30):
        rng, home = random.Random(seed), resume.home()
        run, model, flags = home / "run", home / "model", []
        done = rng.sample(actions, rng.randint(1, 3))
        files = rng.sample(sorted(file for file in home.rglob("*") if file.is_file()), 2)
        print(seed, done, [str(file.relative_to(home)) for file in files])
        if "delete" in done:
            files[0].unlink()
        if "truncate" in done:
            os.truncate(files[1], rng.randrange(1 + files[1].stat().st_size))
        if "move inputs" in done:
            model = model.rename(home / "moved")
            flags = ["--model", model, "--generator", model] * (rng.random() < 0.7)
        if "move run" in done:
            run = run.rename(home / f"run of {seed}")
        monkeypatch.chdir(tmp_path if "elsewhere" in done else home)
        codes.append(resume(os.path.relpath(run), *flags)[0])
    assert codes.count(0) > 10 and codes.count(2) > 5


@pytest.mark.parametrize("file", ["log.jsonl", "best", "best/modules.json", "best/README.md"])
def test_log_and_best_are_restored_from_the_state(resume, file):
    path = resume.home() / "run" / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, err, steps = resume(path.parents[file.count("/")])
    assert (code, steps) == (0, 2)
    assert err.startswith("note: restored from state.safetensors: ") and file in err
    assert path.exists()


def test_a_later_best_model_than_the_states_is_replaced(resume):
    """As a crash between a new best model and the next state leaves it."""
    best = resume.home() / "run" / "best" / "model.safetensors"
    weights = bert.read_safetensors(best)
    bert.write_safetensors(best, {name: tensor + 1 for name, tensor in weights.items()})
    assert resume(best.parents[1])[0] == 0


@pytest.mark.parametrize("name", ["state.safetensors", "state.safetensors of step 0"])
def test_a_run_without_a_saved_step_starts_again(resume, name):
    run = resume.home() / "run"
    (run / "state.safetensors").unlink()
    if "step 0" in name:
        checkpoint.save_state(run, {}, {"name": "run", "command": ""})
    code, err, steps = resume(run)
    assert (code, steps) == (0, 6) and "run has no saved step: it starts again" in err


def test_a_resumed_run_that_is_refused_keeps_its_folder(resume, monkeypatch):
    run = resume.home() / "run"
    (run / "state.safetensors").unlink()
    before = {file.name for file in run.rglob("*")}
    monkeypatch.setattr(eval_sts.Score, "test", lambda self, encoder: torch.empty(1 << 50))
    assert resume(run)[0] == 2 and before < {file.name for file in run.rglob("*")}


def change_weights(home: Path) -> None:
    path = home / "model" / "model.safetensors"
    weights = bert.read_safetensors(path)
    bert.write_safetensors(path, {name: tensor + 0.01 for name, tensor in weights.items()})


def replace_text(name: str, old: str, new: str, home: Path) -> None:
    text = (home / name).read_text()
    assert old in text
    (home / name).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "change, message",
    [
        (change_weights, "--generator .*model is not what .*run started with, so the run cannot"),
        (partial(replace_text, "model/vocab.txt", "tree", "trees"), "--model .*model is not what"),
        (partial(replace_text, "model/config.json", "0.1", "0.2"), "--model .*model is not what"),
        (partial(replace_text, "text.txt", "the", "a"), "--train-file .*text.txt is not what"),
        (partial(replace_text, "pairs.tsv", "\t3\n", "\t4\n"), "--score .*pairs.tsv is not what"),
        (partial(replace_text, "run/config.json", "0.01", "0.02"), "config.json has changed since"),
        (
            lambda home: (home / "run/config.json").unlink(),
            "restore it: cp .*best/run_config.json ",
        ),
    ],
)
def test_what_a_resumed_run_reads_again_must_be_the_same(resume, change, message):
    home = resume.home()
    change(home)
    code, err, _ = resume(home / "run")
    assert code == 2 and re.search(message, err), err


def test_files_that_moved_are_named_and_their_content_counts(resume):
    home = resume.home()
    for file, flag in (("model", "model"), ("text.txt", "train-file"), ("pairs.tsv", "score")):
        moved = (home / file).rename(home / f"moved-{file}")
        code, err, _ = resume(home / "run")
        assert code == 2 and f"{home / file} does not exist; if it was moved, add --{flag}" in err
        moved.rename(home / file)
    flags, other = [], home / "other"
    other.mkdir()
    for file, flag in (("text.txt", "train-file"), ("pairs.tsv", "score"), ("model", "model")):
        flags += [f"--{flag}", (home / file).rename(other / file)]
    assert resume(home / "run", *flags, "--generator", flags[-1])[0] == 0


def test_a_state_writes_no_file_outside_its_folder(tmp_path):
    for name in ("../x", "best/../../x", str(tmp_path / "x")):
        with pytest.raises(UserError, match="outside the folder"):
            checkpoint.restore_files(tmp_path / "run", {f"file.{name}": torch.zeros(1).byte()})
    assert not any(tmp_path.iterdir())


def test_saved_paths_are_absolute_unless_the_repository_has_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for file in ("text.txt", "home/pairs.tsv", "roberta-base/config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "dev").mkdir()
    names = dict(model="assets/small-bert", generator="roberta-base", train_file="text.txt")
    cfg = runs.with_absolute_paths(Config(**names, score="~/pairs.tsv", data="data"))
    saved = [cfg.model, cfg.generator, cfg.train_file, cfg.score, cfg.data]
    absolute = [str(tmp_path / n) for n in ("roberta-base", "text.txt", "home/pairs.tsv", "data")]
    assert saved == ["assets/small-bert", *absolute]
    cfg = runs.with_absolute_paths(Config(model="bert-base-uncased", score="dev"))
    assert (cfg.model, cfg.score, cfg.data) == ("bert-base-uncased", "dev", "")
    monkeypatch.chdir(ROOT)
    assert runs.with_absolute_paths(Config(model="assets/small-bert")).model == "assets/small-bert"


# ------------------------------------------------------------------------------------------------
# NaN


@pytest.mark.parametrize("name", ["contrastive", "difference", "grad_norm"])
def test_nan_stops_the_run_and_the_last_good_state_stays(train_tiny, tmp_path, monkeypatch, name):
    train_step, nan = diffcse.train_step, {}
    monkeypatch.setattr(diffcse, "train_step", lambda *args: train_step(*args) | nan)
    before_step(monkeypatch, 4, lambda: nan.update({name: (torch.tensor(math.nan), 1)}))
    message = (
        f"^{runs.Run.CHECKED[name]} is NaN or infinite at step 4: try a lower --lr, or --amp off. "
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


def test_a_state_with_another_byte_is_refused(tmp_path):
    """safetensors itself notices only other sizes."""
    tensors = {"model.a": torch.randn(5, 3), "pending.loss": torch.randn(2).double()}
    checkpoint.save_state(tmp_path, tensors | {"model.b": torch.tensor(3)}, {"step": 4})
    assert checkpoint.load_state(tmp_path)[1]["step"] == 4
    path = tmp_path / checkpoint.STATE
    content = bytearray(path.read_bytes())
    place = content.index(tensors["model.a"].numpy().tobytes())
    content[place + 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="state.safetensors: damaged, or not a run's state"):
        checkpoint.load_state(tmp_path)
