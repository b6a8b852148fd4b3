"""Messages for people, and files that are never half-written.

Without this file a user's mistake would be a traceback, and a full disk or `kill -9` could leave
half a file.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bert import ModelError

OUT_OF_MEMORY = "out of memory|allocate memory|ALLOC_FAILED"  # in errors of CUDA, MPS and the CPU


class UserError(ValueError):
    """A mistake of the user's: one line that says what is wrong, where, and how to fix it."""


def run_main(main: Callable[[], object]) -> None:
    """Run a command. A user's mistake is one line on stderr and exit code 2; Ctrl-C is 130."""
    with contextlib.suppress(AttributeError):  # stdout may be closed
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's, for an ASCII terminal
    try:
        main()
    except (UserError, ModelError, MemoryError, RuntimeError) as error:
        if not (message := message_of(error)):
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            os._exit(2)  # other processes may wait for this one; torchrun stops them
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, such as `head`, has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def message_of(error: BaseException) -> str:
    """The line for a user's mistake or a lack of memory; "" for a bug."""
    text = str(error)
    if isinstance(error, (UserError, ModelError)):
        return text
    if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, text):
        size = re.search(r"allocate (\d[\d.]* \w+)", text)
        return (
            f"out of memory{f' (allocating {size[1]})' if size else ''}: lower --batch-size or "
            "--max-length, or on a GPU try --device cpu; -h lists the flags of this command"
        )
    return ""


def expand_home(path: str | Path) -> Path:
    """The path with the home folder for ~. Raises: UserError if it is unknown, as in containers."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        reason = "no home folder is known; set HOME (or XDG_CACHE_HOME for the cache)"
        raise UserError(f"{path}: {reason}, or write a full path") from None


@contextlib.contextmanager
def atomic_file(
    path: str | Path,
    advice: str = "an earlier version is unharmed",
    replace: Callable[[Path, Path], object] = Path.replace,
) -> Iterator[Path]:
    """A temporary path beside `path`; the file written there replaces it if the block succeeds.

    Raises: UserError, with the advice, if the disk refuses.
    """
    path = expand_home(path)
    if not path.name:  # such as "." or "/"
        raise UserError(f"cannot write {path}: it is a folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in (temporary, *temporary.rglob("*")):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {advice}") from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder, which replaces `folder` if the block succeeds. Raises: as atomic_file."""
    with atomic_file(folder, replace=replace_folder) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process of the same number
        temporary.mkdir()
        yield temporary


def replace_folder(new: Path, folder: Path) -> None:
    """Two renames. A kill between them leaves the old folder under its other name."""
    restore_folder(folder)
    try:
        if folder.exists():
            os.rename(folder, folder.with_name(f".{folder.name}.earlier"))
        os.rename(new, folder)
    finally:
        restore_folder(folder)


def restore_folder(folder: Path) -> None:
    """After replace_folder: put the old folder back if the new one is missing, else delete it."""
    earlier = folder.with_name(f".{folder.name}.earlier")
    if folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)
    elif earlier.exists():
        os.rename(earlier, folder)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
