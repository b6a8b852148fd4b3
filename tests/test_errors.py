"""engine/errors.py: one line for a mistake; files and folders that are whole or unchanged."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from bert import ModelError
from engine.errors import (
    UserError,
    atomic_file,
    atomic_folder,
    restore_folder,
    run_main,
    write_atomically,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(error: BaseException):
    raise error


# ------------------------------------------------------------------------------------------------
# Commands


def test_run_main_turns_mistakes_into_one_line_and_hides_no_bug(command, monkeypatch):
    for error, code, message in (
        (UserError("what is wrong"), 2, "error: what is wrong\n"),
        (ModelError("no weights"), 2, "error: no weights\n"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
    ):
        assert command(partial(fail, error)) == (code, "", message)
    for bug in (ValueError("a bug"), RuntimeError("a bug")):
        with pytest.raises(type(bug), match="a bug"):
            command(partial(fail, bug))
    monkeypatch.setenv("WORLD_SIZE", "2")  # other processes may wait, and threads for them
    monkeypatch.setattr(os, "_exit", lambda code: fail(SystemExit(f"at once {code}")))
    assert command(partial(fail, UserError("it"))) == ("at once 2", "", "error: it\n")


@pytest.mark.parametrize(
    "allocate, size",
    [
        (lambda: torch.empty(1 << 50), " (allocating 4503599627370496 bytes)"),
        (lambda: np.empty(1 << 58), " (allocating 2.00 EiB)"),
        (lambda: fail(MemoryError()), ""),
        (
            lambda: fail(
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.\n")
            ),
            " (allocating 2.50 GiB)",
        ),
        (lambda: fail(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")), ""),
        (lambda: fail(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")), ""),
    ],
)
def test_a_lack_of_memory_is_one_line_that_names_flags(command, allocate, size):
    code, out, err = command(allocate)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: out of memory{size}: lower --batch-size or --max-length, ")


def test_a_reader_that_stops_is_no_error():
    code = "from engine.errors import run_main; run_main(lambda: [print(i) for i in range(99_999)])"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""


@pytest.mark.parametrize("encoding, shown", [("ascii", "\\xe9 \\u6f22"), ("utf-8", "é 漢")])
def test_output_that_the_terminal_cannot_show_is_escaped(monkeypatch, encoding, shown):
    """A lone surrogate too: a byte of a file's name."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding, newline="")
    monkeypatch.setattr(sys, "stdout", stdout)
    run_main(lambda: print("a é 漢 \udcff", flush=True))
    assert stdout.buffer.getvalue().decode(encoding) == f"a {shown} \\udcff\n"
    monkeypatch.setattr(sys, "stdout", None)  # closed
    run_main(lambda: print("a"))


# ------------------------------------------------------------------------------------------------
# Files and folders


def contents(folder: Path) -> dict[str, str]:
    """Text of each file below a folder, hidden ones included."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def write_file(tmp_path: Path, text: str) -> None:
    with atomic_file(tmp_path / "it", "some advice") as new:
        new.write_text(text)


def write_folder(tmp_path: Path, text: str) -> None:
    with atomic_folder(tmp_path / "it") as new:
        (new / "below").mkdir()
        (new / "below" / text).write_text(text)


MOMENTS = [  # a call, and the version that a kill before it leaves
    (write_file, Path, "write_text", 1, "old"),
    (write_file, os, "fsync", 1, "old"),
    (write_file, os, "replace", 1, "old"),
    (write_folder, Path, "write_text", 1, "old"),
    (write_folder, os, "fsync", 1, "old"),
    (write_folder, os, "rename", 1, "old"),
    (write_folder, os, "rename", 2, "neither"),  # restore_folder brings the old one back
    (write_folder, shutil, "rmtree", 3, "new"),  # of the old version
]


def at_call(monkeypatch, owner, name: str, number: int, action: Callable[[], None]) -> None:
    """Before call number `number` of owner.name, do `action`."""
    real, calls = getattr(owner, name), []

    def replacement(*args, **options):
        calls.append(args)
        if len(calls) == number:
            action()
        return real(*args, **options)

    monkeypatch.setattr(owner, name, replacement)


@pytest.mark.parametrize("error", [RuntimeError("oops"), FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("write, owner, name, number, _", MOMENTS[:-1])
def test_a_failed_write_leaves_the_old_version_and_nothing_else(
    tmp_path, monkeypatch, write, owner, name, number, _, error
):
    write(tmp_path, "old")
    before = contents(tmp_path)
    at_call(monkeypatch, owner, name, number, lambda: fail(error))
    with pytest.raises(UserError if error is FULL else type(error)) as raised:
        write(tmp_path, "new")
    if error is FULL:
        advice = "some advice" if write is write_file else "an earlier version is unharmed"
        message = f"cannot write {tmp_path / 'it'}: No space left on device; {advice}"
        assert str(raised.value) == message
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["it"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("write, owner, name, number, left", MOMENTS)
def test_a_kill_at_any_moment_leaves_a_whole_version(
    tmp_path, monkeypatch, write, owner, name, number, left, again
):
    """restore_folder repairs, and so does the next replacement, by a process of the same number."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    write(tmp_path, "old")
    pid = os.fork()
    if pid == 0:
        try:
            at_call(monkeypatch, owner, name, number, partial(signal.raise_signal, signal.SIGKILL))
            write(tmp_path, "new")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "it").exists() == (left != "neither")
    left = "newer" if again else left.replace("neither", "old")
    if again:
        write(tmp_path, left)
        assert os.listdir(tmp_path) == ["it"]
    restore_folder(tmp_path / "it")
    visible = {name: text for name, text in contents(tmp_path).items() if name[0] != "."}
    assert visible == {"it" if write is write_file else f"it/below/{left}": left}
    assert not list(tmp_path.glob("*.earlier"))


def test_write_atomically_renames_into_place_and_makes_folders(tmp_path):
    write_atomically(tmp_path / "f", "old")
    os.link(tmp_path / "f", tmp_path / "another name")
    write_atomically(tmp_path / "f", b"new")
    assert contents(tmp_path) == {"f": "new", "another name": "old"}  # not overwritten
    write_atomically(tmp_path / "new/folder/g", "é")
    assert (tmp_path / "new/folder/g").read_bytes() == "é".encode()
    with pytest.raises(UserError, match="cannot write .*f/h: "):  # f is a file
        write_atomically(tmp_path / "f" / "h", "")
