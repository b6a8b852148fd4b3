"""A run's folder, log and checkpoints; how it is stopped and resumed.

    runs/demo-1/
        config.json        settings; --resume refuses others
        log.jsonl          one line per log_every steps and per evaluation
        best/              the best model so far, for embed.py, sentence-transformers, transformers
                           (lab.pretrain: the last one evaluated)
        state.safetensors  the state from which a run resumes exactly, with a copy of log.jsonl and
                           best/; deleted at the end
        results.json       written last: a run that has it is finished

Without this file training would work, and print nothing, keep nothing and start from step 0.
Only the main process writes. Batches, masks and dropout are functions of (seed, step), so no random
state is kept.
"""

import contextlib
import errno
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm  # in a notebook, a widget

from engine import distributed
from engine.checkpoint import (
    STATE,
    Metrics,
    checksums,
    file_tensors,
    load_state,
    load_state_dict,
    locked,
    new_folder,
    restore_files,
    save_state,
    state_dict,
)
from engine.cli import LOCATIONS, flag, near_runs, program
from engine.device import machine
from engine.errors import UserError, write_atomically
from engine.hub import ROOT, local_folder
from engine.model_folder import MAX_LENGTH, LoadedModel, model_card, save_model
from engine.tokens import TokenizedSentences


def with_absolute_paths(cfg):
    """The settings with local paths made absolute, so that a run can be resumed from any folder.

    Names on the Hub, and files of this repository such as assets/small-bert, keep their names.
    """
    values, changes = asdict(cfg), {}
    if values.get("data"):
        changes["data"] = os.path.abspath(os.path.expanduser(values["data"]))
    for name in (name for name in LOCATIONS if name in values):
        path = Path(os.path.expanduser(value := values[name]))
        is_folder = name in ("model", "generator")  # and --score dev is no file, even beside one
        exists = path.is_dir() if is_folder else path.suffix != "" and path.is_file()
        if value and exists and path.resolve() != (ROOT / value).resolve():
            changes[name] = os.path.abspath(path)
    return replace(cfg, **changes)


class Stop:
    """The first Ctrl-C or SIGTERM is only noted, in `signal`; a second one acts at once."""

    signal = 0

    def __enter__(self) -> "Stop":
        self.handlers = {}
        with contextlib.suppress(ValueError):  # only a main thread handles signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame) -> None:
        self.signal = number
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun repeats the terminal's signal
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Run:
    """`with Run(cfg, name, device, amp) as run:`. The training loop calls it; it never drives.

    Attributes: folder; step, the number of steps taken; best, best_step; pending, the metrics of
    the steps since the last line of the log. lab/pretrain.py subclasses this.
    """

    SAVED = """name command settings checksums step best best_step scores h_gap
        earlier_seconds""".split()
    CHECKED = {  # metrics that must be finite
        "contrastive": "the contrastive loss",
        "difference": "the discriminator's loss",
        "grad_norm": "the gradient",
    }
    UNIT = "sentences"  # of cfg.batch_size

    def __init__(self, cfg, name: str, device: torch.device, amp: torch.dtype | None):
        self.cfg, self.device, self.name = cfg, device, name
        self.precision = str(amp).removeprefix("torch.") if amp else "fp32"
        self.command = shlex.join(["python", *sys.orig_argv[1:]])
        settings = asdict(with_absolute_paths(cfg))
        settings |= dict.fromkeys({"out", "out_dir", "resume"} & settings.keys(), "")
        self.settings = json.dumps(settings, indent=2) + "\n"
        self.folder: Path | None = None
        self.step, self.best, self.best_step = 0, -math.inf, 0
        self.scores: dict[str, dict[str, float]] = {}  # before training
        self.pending: list[Metrics] = []
        self.h_gap: float | None = None  # None: no discriminator
        self.earlier_seconds = 0.0
        self.began = self.saved = self.logged = time.monotonic()
        self.stack = contextlib.ExitStack()
        self.bar = tqdm(disable=True)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.stack.close()
        if isinstance(error, OSError) and self.folder:
            # Before the first step, discard() may have deleted it
            again = f"resume with: {self.resume_command()}" if self.folder.exists() else "try again"
            reason = f"cannot write to {self.folder}: {error.strerror or error}"
            raise UserError(f"{reason}. After fixing this, {again}") from None

    def resume_command(self) -> str:
        return f"{program()} --resume {shlex.quote(str(self.folder))}"

    def take_folder(self) -> None:
        """Create the folder, or lock that of --resume. Raises: UserError."""
        cfg, folder = self.cfg, None
        if distributed.is_main():
            folder = locked(Path(cfg.resume)) if cfg.resume else new_folder(cfg.out_dir, self.name)
            folder = self.stack.enter_context(folder)
        self.folder = distributed.broadcast(folder)
        if (self.folder / "results.json").is_file():
            finished = f"{self.folder} is a finished run: it has a results.json"
            raise UserError(finished + near_runs(self.folder))

    def begin(
        self, model, optimizer, scaler, sentences: TokenizedSentences, score, total: int
    ) -> None:
        """Create the folder, or continue from its state. Raises: UserError."""
        cfg, count = self.cfg, len(sentences)
        if count < 2:
            raise UserError(f"{cfg.train_file} has {count} sentences; at least 2 are needed")
        if min(count, cfg.batch_size) < (processes := distributed.world_size()):
            raise UserError(f"{processes} processes need as many sentences per step (--batch-size)")
        if count < cfg.batch_size and distributed.is_main():
            note = f"{count} sentences, fewer than --batch-size {cfg.batch_size}; a step uses all"
            print(f"note: {cfg.train_file} has {note}", file=sys.stderr)
        about = f"{count:,} sentences, {total:,} steps of {cfg.batch_size}"
        self.start(model, optimizer, scaler, checksums(model, sentences, score), total, about)

    def start(
        self, model, optimizer, scaler, inputs: dict[str, int], total: int, about: str
    ) -> None:
        """begin() for any model. inputs: checksums by setting; total: steps."""
        cfg, main = self.cfg, distributed.is_main()
        self.model, self.optimizer, self.scaler, self.total = model, optimizer, scaler, total
        if not self.folder:
            self.take_folder()
        self.stop = self.stack.enter_context(Stop())
        tensors, state = load_state(self.folder)
        if tensors and "checksums" not in state:
            raise UserError(f"{self.folder} is a run of an earlier version; start a new one")
        if cfg.resume:
            self.settings = (self.folder / "config.json").read_text(encoding="utf-8")
        self.checksums = inputs
        self.check_unchanged(state)
        vars(self).update({name: state[name] for name in self.SAVED if name in state})
        if tensors:
            self.pending = load_state_dict(tensors, model, optimizer)
            if scaler.is_enabled() and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
        self.first_step = self.step
        if not main:
            return
        if restored := restore_files(self.folder, tensors):
            print(f"note: restored from {STATE}: {', '.join(restored)}", file=sys.stderr)
        if not cfg.resume:
            write_atomically(self.folder / "config.json", self.settings)
        elif not self.step:
            print(f"note: {self.folder} has no saved step: it starts again", file=sys.stderr)
        if not state:
            save_state(self.folder, {}, {"name": self.name, "command": self.command})
        log = open(self.folder / "log.jsonl", "ab" if self.step else "wb", buffering=0)
        self.log_file = self.stack.enter_context(log)
        if not cfg.resume:
            self.stack.callback(self.discard)
        processes = distributed.world_size()
        devices = f"{self.device.type}{f' x {processes}' * (processes > 1)}, {self.precision}"
        start = f", from step {self.step}" * (self.step > 0)
        print(f"{self.name}: {about}, {devices}, seed {cfg.seed}, in {self.folder}{start}")
        initial, total = self.step * cfg.batch_size, self.total * cfg.batch_size
        unit = f" {self.UNIT}"
        self.bar = tqdm(initial=initial, total=total, unit=unit, unit_scale=True, disable=None)
        self.stack.callback(self.bar.close)
        self.logged = time.monotonic()

    def check_unchanged(self, state: dict) -> None:
        """Raises: UserError if something that the run reads again is not what it was."""
        for name, value in self.checksums.items():
            if state.get("checksums", {}).get(name, value) != value:
                given = getattr(self.cfg, name)
                given = " ".join(given) if isinstance(given, tuple) else given
                raise UserError(
                    f"{flag(name)} {given} is not what {self.folder} started "
                    "with, so the run cannot be resumed exactly (a file of pairs keeps its name)"
                )
        if state.get("settings", self.settings) != self.settings:
            config = self.folder / "config.json"
            advice = "undo the edit, or use it for a new run: --config"
            raise UserError(f"{config} has changed since the run started; {advice} {config}")

    def is_in_place(self) -> bool:
        """Whether the folder is the one in which begin() opened the log."""
        try:
            found = os.stat(self.folder / "log.jsonl")
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self.log_file.fileno()))

    def check_folder(self) -> None:
        """Before a write. Raises: UserError if the folder was renamed or deleted during the run."""
        if self.is_in_place():
            if self.best_step and not (self.folder / "best").is_dir():
                best = f"{self.folder / 'best'} was deleted during the run"
                raise UserError(f"{best}; to restore it: {self.resume_command()}")
            return
        number = self.log_file.fileno()
        if os.fstat(number).st_nlink == 0:
            raise UserError(
                f"{self.folder} was deleted during the run, or moved to another disk. A folder "
                f"that has config.json and {STATE} can be resumed: {program()} --resume FOLDER"
            )
        renamed = Path(os.path.realpath(f"/proc/self/fd/{number}")).parent  # Linux alone has it
        name = shlex.quote(str(renamed)) if renamed.is_dir() else "ITS_NEW_NAME"
        raise UserError(
            f"{self.folder} was renamed during the run; resume with: {program()} --resume {name}"
        )

    def discard(self) -> None:
        """Empty the folder of a run that ended before its first step. new_folder deletes it."""
        if self.step == 0 and self.is_in_place():
            self.log_file.close()
            with contextlib.suppress(OSError):  # the folder stays if it has other files
                for name in ("config.json", "log.jsonl", STATE):
                    (self.folder / name).unlink(missing_ok=True)

    def seconds(self) -> float:
        return round(self.earlier_seconds + time.monotonic() - self.began, 1)

    def add(self, metrics: Metrics) -> None:
        """The metrics of one step."""
        self.pending.append(metrics)
        self.step += 1
        self.bar.update(self.cfg.batch_size)

    def log_due(self) -> bool:
        return self.step == 1 or self.step % self.cfg.log_every == 0 or self.eval_due()

    def eval_due(self) -> bool:
        return self.step % self.cfg.eval_every == 0 or self.step == self.total

    def save_due(self) -> bool:
        minutes = (time.monotonic() - self.saved) / 60
        return minutes >= self.cfg.save_minutes or self.step == self.total

    def check_finite(self) -> None:
        """Raises: UserError that names the step at which the run diverged."""
        advice = "try a lower --lr, or --amp off. " + (
            f"{self.folder / 'best'} is the model of step {self.best_step}"
            if self.best_step
            else "No model was saved yet"
        )
        if self.scaler.is_enabled():  # fp16: an overflow is a step that the scaler skips
            if self.scaler.get_scale() < 1:
                raise UserError(f"fp16 overflowed at all steps up to {self.step}: {advice}")
            return
        for i, metrics in enumerate(self.pending, self.step - len(self.pending) + 1):
            for name, label in self.CHECKED.items():
                if name in metrics and not math.isfinite(metrics[name][0]):
                    raise UserError(f"{label} is NaN or infinite at step {i}: {advice}")

    def log(self, **row: float | None) -> None:
        """Append a line to log.jsonl."""
        if not distributed.is_main():
            return
        self.check_folder()
        line = (json.dumps({"seconds": self.seconds(), **row}) + "\n").encode()
        if self.log_file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def log_metrics(self, lr: float) -> None:
        """The means of the metrics since the last line; of a ratio, over all counts.

        Raises: UserError if a loss or the gradient is NaN or infinite.
        """
        self.check_finite()
        row = {}
        for name in self.pending[-1]:
            values = [
                [torch.as_tensor(v, device=self.device) for v in m[name]] for m in self.pending
            ]
            sums = torch.stack([torch.stack(v).float() for v in values]).sum(0)  # (2,)
            total, count = distributed.all_reduce_sum(sums).tolist()
            mean = total / count if count else math.nan
            row[name] = round(mean, 6) if math.isfinite(mean) else None  # JSON has no NaN
        taken, now = min(len(self.pending), self.step - self.first_step), time.monotonic()
        speed = taken * self.cfg.batch_size / max(now - self.logged, 1e-6)
        self.log(step=self.step, lr=lr, **{f"{self.UNIT}_per_second": round(speed, 1)}, **row)
        self.bar.set_postfix_str(f"loss {row['loss'] or math.nan:.4f}", refresh=False)
        self.pending, self.logged = [], now

    def log_scores(self, scores: dict[str, float], title: str, h_gap: float | None = None) -> None:
        """The scores of an evaluation. The time since the last log_metrics is not training."""
        comment = " (before training)" if self.step == 0 else ""
        if self.step and self.is_best(scores):
            is_below = scores["score"] <= self.scores["dev_before"]["score"]
            comment = f" (best so far{', below step 0' * is_below})"
        if self.step == 0:
            self.scores["dev_before"] = scores
        row = dict(scores)
        if h_gap is not None:
            row["h_gap"] = self.h_gap = round(h_gap, 6) if math.isfinite(h_gap) else None  # no NaN
        self.log(step=self.step, **row)
        self.bar.write(f"step {self.step:>6}  {title}: {scores['score']:.2f}{comment}")
        self.logged = time.monotonic()

    def is_best(self, scores: dict[str, float]) -> bool:
        return scores["score"] > self.best

    def best_model(self) -> LoadedModel:
        encoder = self.model.encoder
        max_length = min(encoder.max_length, max(self.cfg.max_length, MAX_LENGTH))
        return LoadedModel(encoder, self.model.tokenizer, self.cfg.pooling, max_length)

    def save_best(self, scores: dict[str, float]) -> None:
        self.best, self.best_step = scores["score"], self.step
        card = self.card({"before": self.scores["dev_before"], "after": scores})
        save_model(self.best_model(), self.folder / "best", card, run_config=self.settings)

    def card(self, columns: dict[str, dict[str, float]]) -> str:
        rows = [f"| x 100 | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for key in columns["after"]:
            values = [f"{scores.get(key, math.nan):.2f}" for scores in columns.values()]
            rows.append(f"| {key} | {' | '.join(values)} |")
        circumstances = ", ".join(f"{k} {v}" for k, v in machine(self.device).items())
        text = (
            f"Trained by DiffCSE (Chuang et al., NAACL 2022) from `{self.cfg.model}`, config "
            f"`{self.name}`, seed {self.cfg.seed}, step {self.best_step}.\n\n"
            f"    {self.command}\n\n" + "\n".join(rows) + f"\n\nWith {circumstances}."
        )
        base = "" if local_folder(self.cfg.model) else self.cfg.model.partition("@")[0]
        return model_card(self.folder.name, self.best_model(), text, base)

    def save(self) -> None:
        """The state from which the run resumes exactly."""
        if distributed.is_main():
            self.check_finite()
            self.check_folder()
            state = {name: getattr(self, name) for name in self.SAVED}
            state |= {"earlier_seconds": self.seconds(), "scaler": self.scaler.state_dict()}
            tensors = state_dict(self.model, self.optimizer, self.pending)
            save_state(self.folder, tensors | file_tensors(self.folder), state)
        self.saved = time.monotonic()

    def stop_requested(self) -> bool:
        """Whether Ctrl-C or SIGTERM has reached any process."""
        self.stop.signal = distributed.all_reduce_max(self.stop.signal)
        return self.stop.signal > 0

    def save_or_stop(self) -> None:
        """Save if it is time. After Ctrl-C or SIGTERM, save and end the process."""
        stop = self.stop_requested()
        if self.save_due() or stop:
            self.save()
        if stop:
            self.exit()

    def exit(self) -> None:
        """End the process after a request to stop, once the main process has saved."""
        distributed.all_reduce_max(0)
        if distributed.is_main():
            self.bar.close()
            resume = f"resume with: {self.resume_command()}"
            print(f"stopped after step {self.step}; {resume}", file=sys.stderr)
        sys.exit(128 + self.stop.signal)

    def finish(self, after: dict[str, float], table: Callable) -> dict:
        """Complete best/README.md, write results.json, print. Returns the content of results.json.

        after: the best model's scores; table: from named scores to text.
        """
        self.bar.close()
        self.check_folder()
        before, first_last = self.scores["before"], self.scores["first_last"]
        rows = {"before, first-last average": first_last, "before": before, "after": after}
        write_atomically(self.folder / "best" / "README.md", self.card(rows))
        results = {
            "before": before,
            "before_first_last": first_last,
            "after": after,
            "dev_before": self.scores["dev_before"]["score"],
            "dev_best": self.best,
            "best_step": self.best_step,
            "h_gap": self.h_gap,
            "fast": self.cfg.fast,
            "compile": self.cfg.compile,
        }
        results = self.close(results)
        print(table(rows))
        if self.best <= results["dev_before"]:
            print("no step scored above the initial model")
        print(
            f"{results['minutes']:.1f} minutes. The model of step {self.best_step} is in "
            f"{self.folder / 'best'}, the numbers in {self.folder / 'results.json'}"
        )
        return results

    def close(self, results: dict) -> dict:
        """Write results.json with the run's circumstances, and delete the state."""
        results = {
            "config": self.name,
            "folder": str(self.folder),
            "seed": self.cfg.seed,
            **results,
            "steps": self.step,
            "minutes": round(self.seconds() / 60, 2),
            "command": self.command,
            "precision": self.precision,
            "machine": machine(self.device),
        }
        write_atomically(self.folder / "results.json", json.dumps(results, indent=2) + "\n")
        (self.folder / STATE).unlink()
        return results
