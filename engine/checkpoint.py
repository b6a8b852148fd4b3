"""A run's folder, held by one process, and the state from which the run resumes exactly.

The state is a safetensors file: tensors, one JSON object, and the bytes of log.jsonl and best/. No
code can run from it. Without this file two runs could write into one folder, and an interrupted one
would start again.
"""

import contextlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from bert import read_safetensors, write_safetensors
from engine.cli import program
from engine.errors import UserError, atomic_file, expand_home, restore_folder, write_atomically
from engine.tokens import checksum

STATE, LOCK = "state.safetensors", ".lock"
Metrics = dict[str, tuple[Tensor | float, Tensor | float]]  # (sum, count) of each


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Hold the folder for this process; the system releases it however the process ends.

    Raises: UserError if another process holds it. Windows has no such lock: nothing is held.
    """
    try:
        file = open(folder / LOCK, "a+")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    with file, contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by another run (process {file.read().strip()}); wait for it, "
                "or use another folder"
            ) from None
        with contextlib.suppress(OSError):  # the disk may be full
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield folder


@contextlib.contextmanager
def new_folder(out_dir: str, name: str) -> Iterator[Path]:
    """An empty folder, held: out_dir, or the next of runs/NAME-1, -2, ... Raises: UserError."""
    numbered = (Path("runs") / f"{name}-{i}" for i in itertools.count(1))
    folder = expand_home(out_dir) if out_dir else next(numbered)
    try:
        while not out_dir and folder.exists():
            folder = next(numbered)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}") from None
    if not (folder / "config.json").exists():  # not a run's: do not even lock it
        check_empty(folder)
    with locked(folder):
        check_empty(folder)
        try:
            yield folder
        finally:  # delete it if nothing was written
            with contextlib.suppress(OSError):
                if [file.name for file in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()


def check_empty(folder: Path) -> None:
    files = {f.name for f in folder.iterdir() if f.name != LOCK and f.suffix != ".tmp"}
    if "config.json" in files and "results.json" not in files:
        raise UserError(
            f"{folder} has an unfinished run; resume it with: {program()} "
            f"--resume {folder}, or use another folder"
        )
    if files:
        raise UserError(f"{folder} is not empty; delete it, or use another folder")


def save_state(folder: Path, tensors: dict[str, Tensor], run_state: dict) -> None:
    text = torch.frombuffer(bytearray(json.dumps(run_state).encode()), dtype=torch.uint8)
    tensors = tensors | {"run_state": text}
    with atomic_file(folder / STATE, f"after fixing this, resume the run in {folder}") as file:
        write_safetensors(file, tensors | {"checksum": torch.tensor(checksum(tensors))})


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """What save_state wrote; empty if the run was stopped before. Raises: UserError."""
    if not (folder / STATE).is_file():
        return {}, {}
    try:
        tensors = read_safetensors(folder / STATE)
        if int(tensors.pop("checksum")) != checksum(tensors):
            raise ValueError("a byte differs")
        return tensors, json.loads(tensors.pop("run_state").numpy().tobytes())
    except (KeyError, ValueError):
        reason = "damaged, or not a run's state; delete it to start again"
        raise UserError(f"{folder / STATE}: {reason}") from None


def file_tensors(folder: Path) -> dict[str, Tensor]:
    """The bytes of log.jsonl and of the files of best/, so that a resume needs neither."""
    files = [folder / "log.jsonl", *sorted((folder / "best").rglob("*"))]
    names = [file.relative_to(folder).as_posix() for file in files if file.is_file()]
    return {f"file.{n}": torch.from_numpy(np.fromfile(folder / n, np.uint8)) for n in names}


def restore_files(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """The inverse of file_tensors. Returns the names of files that were missing or different."""
    restore_folder(folder / "best")
    restored = []
    for name in (n.removeprefix("file.") for n in tensors if n.startswith("file.")):
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"{folder / STATE} has the file {name!r}, which is outside the folder")
        path, saved = folder / name, tensors[f"file.{name}"].numpy().tobytes()
        found = path.read_bytes() if path.is_file() else b""
        if found != saved:
            write_atomically(path, saved)
        if not found.startswith(saved):  # the log may have later lines
            restored.append(name)
    return restored


def checksums(model: nn.Module, sentences, score) -> dict[str, int]:
    """A checksum of each input that a resumed run reads again, by the name of its setting.

    Trained weights are in the state. sentences: TokenizedSentences. score: Score.
    """
    generator = getattr(model, "generator", None)  # None if lam is 0
    weights = checksum(generator.state_dict()) if generator else 0
    contents = {
        "model": [repr(model.encoder.cfg), sorted(model.tokenizer.vocabulary().items())],
        "generator": [repr(getattr(generator, "cfg", None)), weights],
        "train_file": sentences.checksum,
        "score": [score.dev_set, score.test_sets],
    }
    return {name: zlib.crc32(json.dumps(content).encode()) for name, content in contents.items()}


def state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, pending: list[Metrics]
) -> dict[str, Tensor]:
    """All tensors that the rest of a run depends on. The frozen generator is read from its folder.

    pending: the metrics of the steps since the last line of the log.
    """
    tensors = {
        f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("generator.")
    }
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
    for name in pending[0] if pending else ():
        rows = [torch.stack([torch.as_tensor(v).cpu().double() for v in m[name]]) for m in pending]
        tensors[f"pending.{name}"] = torch.stack(rows)  # (steps, 2)
    return tensors


def load_state_dict(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[Metrics]:
    """The inverse of state_dict. Returns `pending`."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "pending": {}, "file": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    names = [name for name in model.state_dict() if name.startswith("generator.")]
    model.load_state_dict(parts["model"] | {name: model.state_dict()[name] for name in names})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        i, _, kind = name.partition(".")
        moments.setdefault(int(i), {})[kind] = tensor.clone()  # not a view of the file
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    rows = parts["pending"]
    steps = len(next(iter(rows.values()))) if rows else 0
    return [{name: tuple(rows[name][i].clone()) for name in rows} for i in range(steps)]
