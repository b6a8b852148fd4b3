"""A run's folder: new or taken up again, one process at a time, its state written and read, and how a run is stopped.

    runs/demo-1/
        config.json          what the run is; --resume refuses another
        log.jsonl            appended to; a resumed run first cuts off what its state does not know of
        best/                the best model so far, a folder for embed.py and others
        state.safetensors    everything else that the rest of the run depends on; gone when it has ended
        results.json         written last: a run that has it is finished

State is tensors and one JSON object in a safetensors file: nothing in it can run code, and it is mapped, not copied.
Not here: what else a run is made of (diffcse.py).
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from bert import UserError, read_safetensors, write_safetensors

STATE = "state.safetensors"
LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """The folder, held for this process. The system lets go of it when the process ends, however it ends.

    Raises: UserError where another process holds it. (On Windows nothing is held: the library for it is Unix's.)
    """
    try:
        file = open(folder / LOCK, "a+")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}") from None
    with file:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                    raise BlockingIOError  # its last holder has just removed it, and another may hold a new one
            except OSError:
                file.seek(0)
                raise UserError(f"{folder} is in use by another run (process {file.read().strip() or 'unknown'}): "
                                "wait for it, or name another --out-dir") from None  # fmt: skip
        with contextlib.suppress(OSError):  # on a full disk others are not told who holds it
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()


@contextlib.contextmanager
def new_folder(out_dir: str, name: str) -> Iterator[Path]:
    """An empty folder for a new run, held: out_dir, or the next of runs/NAME-1, -2, ... What holds anything is never written over: UserError."""
    try:
        if out_dir:
            folder = Path(os.path.expanduser(out_dir))
            if str(folder).startswith("~"):
                raise UserError(f"--out-dir {folder}: there is no such user")
            if folder.exists() and not folder.is_dir():
                raise UserError(f"--out-dir {folder} is there already and not an empty folder; name another")
            folder.mkdir(parents=True, exist_ok=True)
        else:
            number = 1
            while True:  # mkdir says no to all but one of two runs that begin together
                folder = Path("runs") / f"{name}-{number}"
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(parents=True)
                    break
                number += 1
    except OSError as error:
        raise UserError(f"--out-dir {folder} cannot be made: {error.strerror}") from None
    with locked(folder):
        left = [file.name for file in folder.iterdir() if file.name != LOCK and not file.name.endswith(".tmp")]  # a killed write's
        if "config.json" in left and "results.json" not in left:
            raise UserError(f"--out-dir {folder} holds a run that has not ended: go on with it by python diffcse.py --resume {folder}, or name another")
        if left:
            raise UserError(f"--out-dir {folder} is there already and not an empty folder; name another, or delete it")
        yield folder


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Whole or not at all, in place of the last one. Raises: UserError if the disk says no."""
    text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    write_safetensors(folder / STATE, {**tensors, "facts": text})


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict] | None:
    """What save_state wrote, or None: the run was stopped before it had a state, and begins again. Raises: UserError for a damaged one."""
    if not (folder / STATE).is_file():
        return None
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(folder / STATE).items()}  # the file is about to be replaced
    try:
        return tensors, json.loads(tensors.pop("facts").numpy().tobytes())
    except (KeyError, ValueError):
        raise UserError(f"{folder / STATE} is no state of a run; delete it to begin the run again") from None


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, window: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors that the rest of a run depends on. window: what each step since the last line of the log has to say for the next.

    Not the generator: it is as its folder has it. Nor random numbers: batches, masks and dropout are functions of (seed, epoch) and (seed, step).
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if not name.startswith("generator.")}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
    return tensors | {f"window.{name}": torch.stack([sums[name].float() for sums in window]) for name in (window[0] if window else ())}


def restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """What state_of has told, put back. Returns the window."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "window": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    generator = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("generator.")}
    model.load_state_dict(parts["model"] | generator)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        i, _, kind = name.partition(".")
        moments.setdefault(int(i), {})[kind] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    device = next(model.parameters()).device
    window = {name: tensor.to(device) for name, tensor in parts["window"].items()}
    return [dict(zip(window, row)) for row in zip(*window.values())]


class Stop:
    """Within `with Stop() as stop:` the first Ctrl-C or SIGTERM is only noted, in stop.signal; a second one acts at once."""

    def __enter__(self) -> "Stop":
        self.signal = 0
        self.before = {}
        with contextlib.suppress(ValueError):  # only a main thread may ask for signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame) -> None:
        self.signal = number
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun sends what the terminal has sent once more, and itself kills who does not stop
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not what was before: a shell lets its background jobs ignore it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("\nstopping after this step; once more stops at once", file=sys.stderr, flush=True)

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
