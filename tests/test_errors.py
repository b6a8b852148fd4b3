"""engine/errors.py: one line for a mistake; files and folders that are whole or unchanged."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bert import ModelError
from engine import errors
from engine.errors import UserError, atomic_file, atomic_folder, restore_folder, write_atomically

ROOT = Path(__file__).parent.parent
FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(error: BaseException):
    raise error


def contents(folder: Path) -> dict[str, str]:
    """Text of each file below a folder, hidden ones included."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


# ------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("what is wrong"), 2, "error: what is wrong\n"),
        (ModelError("no weights"), 2, "error: no weights\n"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
    ],
)
def test_run_main_turns_mistakes_into_one_line_and_an_exit_code(capsys, error, code, message):
    with pytest.raises(SystemExit) as stop:
        errors.run_main(lambda: fail(error))
    assert stop.value.code == code and capsys.readouterr() == ("", message)


@pytest.mark.parametrize("error", [ZeroDivisionError(), ValueError("a bug")])
def test_run_main_hides_no_bug(error):
    with pytest.raises(type(error)):
        errors.run_main(lambda: fail(error))
    assert errors.run_main(lambda: None) is None


def run_code(code: str, **environment: str) -> subprocess.Popen:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from engine.errors import *\n{code}"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment, **pipes)


def test_a_reader_that_stops_is_no_error():
    process = run_code("run_main(lambda: [print(i) for i in range(100_000)])")
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""


def test_one_of_several_processes_ends_at_once():
    """It does not wait for a thread that waits for other processes."""
    process = run_code(
        "import threading, time; threading.Thread(target=time.sleep, args=[300]).start()\n"
        "def main(): raise UserError('no such file')\n"
        "run_main(main)",
        WORLD_SIZE="2",
    )
    assert process.communicate(timeout=60) == ("", "error: no such file\n")
    assert process.returncode == 2


# ------------------------------------------------------------------------------------------------
# Files and folders


def write_file(tmp_path: Path, text: str, error: BaseException | None = None) -> None:
    with atomic_file(tmp_path / "it", "some advice") as new:
        new.write_text(text)
        if error:
            raise error


def write_folder(tmp_path: Path, text: str, error: BaseException | None = None) -> None:
    with atomic_folder(tmp_path / "it") as new:
        (new / "below").mkdir()
        (new / "below" / text).write_text(text)
        if error:
            raise error


WRITERS = pytest.mark.parametrize("write", [write_file, write_folder])


@WRITERS
@pytest.mark.parametrize("error", [RuntimeError("oops"), FULL, KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_version_and_nothing_else(tmp_path, write, error):
    write(tmp_path, "old")
    before = contents(tmp_path)
    with pytest.raises(UserError if error is FULL else type(error)) as raised:
        write(tmp_path, "half of the new", error)
    assert error is not FULL or "it: No space left on device" in str(raised.value)
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["it"]
    write(tmp_path, "new")
    assert list(contents(tmp_path).values()) == ["new"] and os.listdir(tmp_path) == ["it"]


def at_call(monkeypatch, module, name: str, number: int, action: Callable[[], None]) -> None:
    """Before call number `number` of module.name, do `action`."""
    real, calls = getattr(module, name), []

    def replacement(*args, **options):
        calls.append(args)
        if len(calls) == number:
            action()
        return real(*args, **options)

    monkeypatch.setattr(module, name, replacement)


@pytest.mark.parametrize(
    "write, name, number",
    [
        (write_file, "fsync", 1),
        (write_file, "replace", 1),
        (write_folder, "fsync", 1),
        *((write_folder, "rename", number) for number in (1, 2)),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_the_old_version(
    tmp_path, monkeypatch, write, name, number
):
    write(tmp_path, "old")
    before = contents(tmp_path)
    at_call(monkeypatch, os, name, number, lambda: fail(FULL))
    with pytest.raises(UserError, match="^cannot write .*it: No space left on device") as raised:
        write(tmp_path, "new")
    assert write is write_folder or str(raised.value).endswith("; some advice")
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["it"]


def test_write_atomically_renames_into_place_and_makes_folders(tmp_path):
    write_atomically(tmp_path / "f", "old")
    os.link(tmp_path / "f", tmp_path / "another name")
    write_atomically(tmp_path / "f", b"new")
    assert contents(tmp_path) == {"f": "new", "another name": "old"}  # not overwritten
    write_atomically(tmp_path / "new/folder/g", "é")
    assert (tmp_path / "new/folder/g").read_bytes() == "é".encode()
    with pytest.raises(UserError, match="cannot write .*f/h: "):  # f is a file
        write_atomically(tmp_path / "f" / "h", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "write, module, name, number, left",
    [
        (write_file, os, "fsync", 1, "old"),
        (write_file, os, "replace", 1, "old"),
        (write_folder, os, "fsync", 1, "old"),
        (write_folder, os, "rename", 1, "old"),
        (write_folder, os, "rename", 2, "neither"),  # restore_folder brings the old one back
        (write_folder, shutil, "rmtree", 3, "new"),  # of the old version
    ],
)
def test_a_kill_at_any_moment_leaves_a_whole_version(
    tmp_path, monkeypatch, write, module, name, number, left
):
    write(tmp_path, "old")
    pid = os.fork()
    if pid == 0:
        try:
            kill = partial(os.kill, os.getpid(), signal.SIGKILL)
            at_call(monkeypatch, module, name, number, kill)
            write(tmp_path, "new")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "it").exists() == (left != "neither")
    restore_folder(tmp_path / "it")
    left = "new" if left == "new" else "old"
    assert contents(tmp_path)["it" if write is write_file else f"it/below/{left}"] == left
    assert not list(tmp_path.glob("*.earlier"))


@pytest.mark.parametrize("killed_before", ["the second rename", "the old version was deleted"])
def test_the_next_replacement_repairs_a_killed_one(tmp_path, killed_before):
    write_folder(tmp_path, "old")
    os.rename(tmp_path / "it", tmp_path / ".it.earlier")
    if killed_before != "the second rename":
        (tmp_path / "it").mkdir()
    write_folder(tmp_path, "new")
    assert contents(tmp_path) == {"it/below/new": "new"}
