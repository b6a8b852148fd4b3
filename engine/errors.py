"""Messages for people, and files that are never half-written.

Without this file a user's mistake would be a traceback, and a full disk or `kill -9` could leave
half a file.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bert import ModelError


class UserError(ValueError):
    """A mistake of the user's: one line that says what is wrong, where, and how to fix it."""


def run_main(main: Callable[[], object]) -> None:
    """Run a command. A user's mistake is one line on stderr and exit code 2; Ctrl-C is 130."""
    try:
        main()
    except (UserError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            os._exit(2)  # other processes may wait for this one; torchrun stops them
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, such as `head`, has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def atomic_file(
    path: str | Path,
    advice: str = "an earlier version is unharmed",
    replace: Callable[[Path, Path], object] = Path.replace,
) -> Iterator[Path]:
    """A temporary path beside `path`; the file written there replaces it if the block succeeds.

    Raises: UserError, with the advice, if the disk refuses.
    """
    path = Path(path)
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
