"""The paper's Tables 1, 3 to 8 and 15, and the search of its appendix A, over several seeds.

    python -m lab.reproduce --table 3 --seeds 0,1,2 --data DIR --train-file FILE --text paragraphs
    python -m lab.reproduce --table all --budget 3h --seeds 0,1,2 --data DIR ...

Every row is a few flags of diffcse.py or lab/ablations.py; flags that are not listed by -h go to
all runs. Each run is an ordinary one, and its command is printed. Finished runs are not repeated,
even if two tables share them, and an interrupted run is resumed: to continue a sweep, give the
same command again. All rows run with the first seed, then with the second, so a budget that ends
early leaves rows with equally many seeds.

Rows with a grid (Table 1) are searched first, one field after the other, by STS-B dev with seed
100. The table "search" is all combinations of appendix A's grid.
Files below --out: tables/NAME.json (every number, command and seed), README.md (the tables beside
the paper's figures), and for each run tables/CONFIG/FLAGS/seedN (Table 1: tables/1/CONFIG/ROW/
seedN) with config.json, log.jsonl, results.json and transfer.json.
Transfer is the average accuracy on development items of the seven tasks, `lab.transfer --mode
fast`, which the published code computes during training.
Not here: Table 2 (lab/transfer.py), Tables 9 to 11 (lab/analysis.py).
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path

import numpy as np

from bert import read_json
from data import Tokenizer
from diffcse import PRESETS, Config, load_generator
from engine.cli import MAY_CHANGE, Parser, flag, load_preset, parse, positive_int
from engine.errors import UserError, run_main, write_atomically
from engine.hub import ROOT, find_model
from eval_sts import TEST_SETS
from lab.ablations import AblationConfig

SEARCH_SEED = 100
ABLATION_FIELDS = {f.name for f in fields(AblationConfig)} - {f.name for f in fields(Config)}

# ------------------------------------------------------------------------------------------------
# The tables


@dataclass
class Row:
    name: str
    flags: dict[str, object] = field(default_factory=dict)  # differences from the preset
    paper: tuple[float | None, ...] = ()  # bert-base's figures in the same columns
    grid: tuple[str, ...] = ()  # fields of GRID that are searched


@dataclass
class Table:
    title: str
    rows: list[Row]
    findings: list[tuple[str, str]] = field(default_factory=list)  # the better row in the paper
    columns: tuple[str, ...] = ("STSB-dev", "transfer-dev")
    score: str = "dev"  # test sets are never loaded


COLUMNS = ("STSB-dev", *TEST_SETS, "average")
DEV = ("STSB-dev",)
SIMCSE = (81.47, 83.91)
FIRST_LAST = (None, 39.70, 59.38, 49.67, 66.03, 66.19, 53.87, 62.06, 56.70)
TANH = (81.47, 68.40, 82.41, 74.38, 80.91, 78.56, 76.85, 72.23, 76.25)
DIFFCSE = (84.56, 72.28, 84.43, 76.47, 83.90, 80.54, 80.59, 71.23, 78.49)
GRID = {"lr": (1e-4, 3e-4, 1e-3), "lam": (0.005, 0.05, 0.5), "mask_ratio": (0.30, 0.15)}
READING = {"edit": "sample", "edit_scope": "masked", "pads_in_loss": False}
READING |= {"generator_dropout": False}
BASELINE = "SimCSE with BatchNorm"
TABLE_1 = [
    Row("SimCSE (tanh)", {"lam": 0.0, "projector": "tanh"}, TANH, ("lr",)),
    Row(BASELINE, {"lam": 0.0}, (82.22,), ("lr",)),
    Row("DiffCSE, published", {}, DIFFCSE, tuple(GRID)),
    Row("DiffCSE, the paper's reading", READING, grid=tuple(GRID)),
]
SIMCSE_LR = {"small": 3e-4}  # of Table 1's search; the other presets have their own SimCSE
APPENDIX_A = {
    "batch_size": (64, 128),
    "lr": (2e-6, 3e-6, 5e-6, 7e-6, 1e-5),
    "mask_ratio": (0.15, 0.20, 0.30, 0.40),
    "lam": (0.1, 0.05, 0.01, 0.005, 0.001),
}
SMALL_LR = (3e-5, 1e-4, 3e-4, 5e-4, 1e-3)  # instead, for a small encoder
GENERATORS = {
    "bert-large-uncased": (82.93, 85.88),
    "bert-base-uncased": (83.63, 85.85),
    "distilbert-base-uncased": (84.56, 85.95),
    "google/bert_uncased_L-8_H-512_A-8": (82.25, 85.80),
    "google/bert_uncased_L-4_H-512_A-8": (82.64, 85.66),
    "google/bert_uncased_L-4_H-256_A-4": (82.12, 85.90),
    "google/bert_uncased_L-2_H-128_A-2": (81.40, 85.23),
}
WEAK_TO_STRONG = ("runs/generator-weak", "runs/generator-medium", "assets/small-bert")
SMALL_GENERATORS = (*WEAK_TO_STRONG, "runs/generator-strong")
MASKS = {0.15: 84.48, 0.20: 84.04, 0.25: 84.49, 0.30: 84.56, 0.40: 84.48, 0.50: 83.91}
LAMBDAS = {0.0: 82.22, 0.0001: 83.90, 0.0005: 84.40, 0.001: 84.24}
LAMBDAS |= {0.005: 84.56, 0.01: 83.44, 0.05: 84.11, 0.1: 83.66}
EDITS = {"MLM 15 %": {}, "insert 15 %": {"edit_with": "insert"}}
EDITS |= {"delete 15 %": {"edit_with": "delete"}}
OURS = [(84.48, 85.95), (82.20, 85.96), (82.59, 85.97)]  # DiffCSE with these edits
POSITIVES = [(73.59, 83.33), (80.39, 83.92), (78.58, 81.80)]
NEGATIVES = [(83.02, 84.49), (55.65, 79.86), (55.13, 82.56)]


def simcse_flags(config: str) -> dict[str, object]:
    """A preset's flags for SimCSE: no difference prediction, tanh, SimCSE's lr and epochs."""
    flags = {"lam": 0.0, "projector": "tanh"}
    if is_bert(config):
        simcse = PRESETS["simcse_" + config.partition("_")[0]]
        flags |= {name: getattr(simcse, name) for name in ("lr", "epochs", "batch_size")}
    elif config in SIMCSE_LR:
        flags["lr"] = SIMCSE_LR[config]
    return changed(config, flags)


def is_bert(config: str) -> bool:
    return config.startswith(("bert", "roberta"))


def changed(config: str, flags: dict[str, object]) -> dict[str, object]:
    """Without the preset's own values: flags name a run, and equal runs need equal flags."""
    preset = PRESETS[config]
    return {name: value for name, value in flags.items() if value != getattr(preset, name, None)}


def tables(config: str, generators: list[str]) -> dict[str, Table]:
    """Every table by its number, for a preset. paper: development scores of bert-base."""
    simcse, own = simcse_flags(config), PRESETS[config].generator
    with_batchnorm = {name: value for name, value in simcse.items() if name != "projector"}
    row_simcse, row_diffcse = Row("SimCSE", simcse, SIMCSE), Row("DiffCSE", {}, (84.56, 85.95))
    by_next, by_both = {"condition_on": "next"}, {"condition_on": "both"}
    masked, of_15 = {"objective": "masked"}, {"mask_ratio": 0.15}
    table_3 = [
        row_simcse,
        row_diffcse,
        Row("without contrastive loss", {"contrastive": False}, (54.48, 83.46)),
        Row("edit of the next sentence", by_next, (82.91, 85.83)),
        Row("of both", by_both, (83.41, 85.82)),
        Row("conditional MLM, same sentence", masked, (83.08, 84.43)),
        Row("conditional MLM, next sentence", masked | by_next, (75.82, 85.68)),
        Row("conditional MLM, both", masked | by_both, (82.88, 84.82)),
        Row("conditional corrective LM", {"objective": "corrected"}, (79.79, 85.30)),
    ]

    def edits(use: str, paper: list[tuple[float, float]], **flags: object) -> list[Row]:
        return [
            Row(f"{use}: {name}", flags | of_15 | edit, figures)
            for (name, edit), figures in zip(EDITS.items(), paper)
        ]

    ours = edits("DiffCSE", OURS)
    positive = edits("one more positive", POSITIVES, **simcse | {"edit_as": "positive", "lam": 1.0})
    negative = edits("one more negative", NEGATIVES, **simcse | {"edit_as": "negative", "lam": 1.0})
    all_edits = Row("all three", {"edit_with": "all"} | of_15, (82.80, 85.92))
    projectors = [
        Row("DiffCSE with BatchNorm", {}, (84.56, 85.95)),
        Row("DiffCSE without", {"projector": "tanh"}, (83.23, 85.24)),
        Row("SimCSE with BatchNorm", with_batchnorm, (82.22, 85.66)),
        Row("SimCSE without", simcse, SIMCSE),
    ]
    by_generator = {
        name: Row(name, {"generator": name}, GENERATORS.get(name, ())) for name in generators
    }
    masks = [Row(f"{ratio:.0%}", {"mask_ratio": ratio}, (dev,)) for ratio, dev in MASKS.items()]
    lams = [Row(f"{lam:g}", {"lam": lam}, (dev,)) for lam, dev in LAMBDAS.items()]
    grid = APPENDIX_A if is_bert(config) else APPENDIX_A | {"lr": SMALL_LR}
    points = [dict(zip(grid, values)) for values in product(*grid.values())]
    search = [Row(", ".join(f"{k} {v:g}" for k, v in point.items()), point) for point in points]

    def beats(better: Row, *worse: Row) -> list[tuple[str, str]]:
        return [(better.name, row.name) for row in worse if row is not better]

    pairs_3 = beats(row_diffcse, *table_3[:6], table_3[8]) + beats(*table_3[5:7])
    pairs_5 = beats(*projectors[:3]) + beats(projectors[1], projectors[3])
    pairs_5 += beats(*projectors[2:])
    pairs_6 = beats(by_generator[own], *by_generator.values()) if own in by_generator else []
    pairs_15 = [(a.name, b.name) for a, *others in zip(ours, positive, negative) for b in others]
    pairs_15 += beats(row_simcse, *positive) + beats(negative[0], row_simcse)
    edited = [*ours, all_edits]
    named = {
        "3": Table("what is predicted, and given which sentence", table_3, pairs_3),
        "4": Table("how a sentence is edited", edited, beats(*edited)),
        "5": Table("the projector", projectors, pairs_5),
        "6": Table("the generator", [row_simcse, *by_generator.values()], pairs_6),
        "7": Table("the mask ratio", masks, beats(masks[3], *masks), DEV),
        "8": Table("lambda", lams, beats(lams[4], *lams), DEV),
        "15": Table("how an edit is used", [row_simcse, *positive, *negative, *ours], pairs_15),
        "search": Table("appendix A's grid, by STS-B dev", search, [], DEV),
    }
    for table in named.values():
        table.rows = [replace(row, flags=changed(config, row.flags)) for row in table.rows]
    return named | {"1": Table("the seven STS sets", TABLE_1, [], COLUMNS, "stsb")}


# ------------------------------------------------------------------------------------------------
# One run


def words_of(flags: dict[str, object], config: str, more: list[str]) -> list[str]:
    """Command-line words."""
    words = ["--config", config]
    for name, value in flags.items():
        words += [flag(name), str(value)]
    return words + more


def parse_flags(words: list[str]) -> AblationConfig:
    return parse(AblationConfig, PRESETS, words)[1]


def program_of(cfg: AblationConfig) -> list[str]:
    if any(getattr(cfg, name) != getattr(AblationConfig, name) for name in ABLATION_FIELDS):
        return ["-m", "lab.ablations"]
    return ["diffcse.py"]


class Processes:
    """The running processes, so that they can be stopped."""

    def __init__(self):
        self.running: set[subprocess.Popen] = set()
        self.stopped = False

    def run(self, program: list[str], words: list[str]) -> None:
        """Print and run a command. Raises: UserError if it fails, KeyboardInterrupt if stopped."""
        if self.stopped:
            raise KeyboardInterrupt
        print(f"python {shlex.join(program + words)}\n", end="", flush=True)  # atomic with --jobs
        process = subprocess.Popen(
            [sys.executable, *program, *words],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # stop() passes on a terminal's Ctrl-C, once
        )
        self.running.add(process)
        try:
            error = process.communicate()[1].rstrip()
        finally:
            self.running.discard(process)
        if self.stopped or process.returncode in (130, 143):
            raise KeyboardInterrupt
        last = error.rpartition("\n")[2]
        if process.returncode == 2 and last.startswith("error: "):
            error = last.removeprefix("error: ")
        if process.returncode:
            raise UserError(
                f"{error} ({program[-1]}, exit code {process.returncode}; after fixing this, the "
                "same command continues)"
            )

    def stop(self) -> None:
        """Each process finishes its step, saves its state and ends."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()
        for process in list(self.running):
            process.wait()


PROCESSES = Processes()


def run(
    flags: dict[str, object], folder: Path, config: str, more: list[str], keep_model: bool = False
) -> dict:
    """results.json of a run, which is started or resumed if necessary. Raises: UserError."""
    words = words_of(flags, config, more)
    cfg = parse_flags(words)
    if (folder / "config.json").is_file():
        check_same_run(folder, cfg)
    if (folder / "results.json").is_file():
        return read_json(folder / "results.json")
    path = os.path.relpath(folder, ROOT)
    if (folder / "config.json").is_file():
        words = ["--resume", path]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its config
        words += ["--out-dir", path]
    PROCESSES.run(program_of(cfg), words)
    if not keep_model:
        shutil.rmtree(folder / "best")  # a table needs the numbers, not fifty models
    return read_json(folder / "results.json")


def check_same_run(folder: Path, cfg: AblationConfig) -> None:
    may_differ = {*MAY_CHANGE, "out_dir"}
    try:
        there = load_preset(AblationConfig, PRESETS, str(folder / "config.json"))
        names = [f.name for f in fields(cfg) if f.name not in may_differ]
        other = [name for name in names if getattr(there, name) != getattr(cfg, name)]
        reason = f"its {other[0]} is {getattr(there, other[0])!r}" if other else ""
    except UserError as error:  # of an earlier version, perhaps
        reason = str(error)
    if reason:
        raise UserError(
            f"{folder} has a run with other settings ({reason}): use another --out, or delete it"
        )


def transfer(folder: Path, more: list[str]) -> dict:
    """transfer.json: accuracies of the run's best model, which is then deleted."""
    file = folder / "transfer.json"
    if not file.is_file():
        cfg = parse_flags(["--config", "small", *more])
        best, out = (os.path.relpath(path, ROOT) for path in (folder / "best", file))
        words = [best, "--mode", "fast", "--json", out]
        words += ["--data", cfg.data] * bool(cfg.data) + ["--amp", "bf16"] * (cfg.amp == "bf16")
        PROCESSES.run(["-m", "lab.transfer"], words)
    shutil.rmtree(folder / "best", ignore_errors=True)
    return read_json(file)


# ------------------------------------------------------------------------------------------------
# All runs


class OutOfTime(Exception):
    """The next run would not end within the budget."""


class Sweep:
    """The runs of some tables, one or a few at a time, until all are done or the budget is spent.

    with_transfer: numbers of tables whose runs are scored on transfer tasks. budget: in minutes.
    """

    def __init__(
        self,
        out: Path,
        config: str,
        more: list[str],
        generators: list[str],
        with_transfer: list[str],
        budget: float | None = None,
    ):
        self.out, self.config, self.more = out, config, more
        self.tables = tables(config, generators)
        self.transfer_flags = [
            r.flags for number in with_transfer for r in self.tables[number].rows
        ]
        self.deadline = None if budget is None else time.monotonic() + 60 * budget
        self.chosen: dict[tuple[str, str], dict[str, object]] = {}  # (table, row): searched flags
        self.minutes: list[float] = []  # of finished runs
        self.locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def folder(self, number: str, row: Row, flags: dict[str, object], seed: int) -> Path:
        """Of a run. All tables share it, except for Table 1, whose runs load the test sets."""
        name = f"1/{self.config}/{slug(row.name)}" if number == "1" else self.config
        folder = self.out / "tables" / name
        return (folder if number == "1" else folder / flags_slug(flags)) / f"seed{seed}"

    def wants_transfer(self, flags: dict[str, object], seed: int, score: str) -> bool:
        return score == "dev" and seed != SEARCH_SEED and flags in self.transfer_flags

    def run_once(self, flags: dict[str, object], seed: int, score: str, folder: Path) -> dict:
        """The run's results, with "transfer" if a table needs it. Raises: OutOfTime, UserError."""
        with self.locks[str(folder)]:  # two rows may be the same run
            wanted = self.wants_transfer(flags, seed, score)
            finished = (folder / "results.json").is_file()
            done = finished and ((folder / "transfer.json").is_file() or not wanted)
            if not done and self.deadline:
                if time.monotonic() + 60 * max(self.minutes, default=0) > self.deadline:
                    raise OutOfTime
            if finished and not done and not (folder / "best").is_dir():
                shutil.rmtree(folder)  # its model is needed again: the same run makes it
            started = time.monotonic()
            flags = flags | {"seed": seed, "score": score}
            results = run(flags, folder, self.config, self.more, keep_model=wanted)
            if wanted:
                results |= {"transfer": transfer(folder, self.more)}
            if not done:
                self.minutes.append((time.monotonic() - started) / 60)
            return results

    def search(self, number: str, row: Row) -> dict[str, object]:
        """The row's flags with the grid's values that are best on STS-B dev, field by field."""
        chosen = row.flags | {name: GRID[name][0] for name in row.grid}
        if not row.grid:
            return chosen
        parent = self.folder(number, row, {}, 0).parent
        for name in row.grid:
            scores = {}
            for value in GRID[name]:
                flags = chosen | {name: value}
                folder = "_".join(f"{field}={flags[field]:g}" for field in row.grid)
                folder = parent / "search" / folder
                scores[value] = self.run_once(flags, SEARCH_SEED, "dev", folder)["dev_best"]
            chosen[name] = max(scores, key=scores.get)
            text = ", ".join(f"{value:g}: {score:.2f}" for value, score in scores.items())
            print(f"{row.name}: {name} {text} -> {chosen[name]:g}\n", end="", flush=True)
        write_atomically(parent / "chosen.json", json.dumps(chosen, indent=2) + "\n")
        return chosen

    def run_row(self, number: str, row: Row, seed: int) -> dict | None:
        """None: the budget is spent."""
        try:
            with self.locks[f"{number} {row.name}"]:  # another seed of the row may be searching
                if (number, row.name) not in self.chosen:
                    self.chosen[number, row.name] = self.search(number, row)
            flags = self.chosen[number, row.name]
            folder = self.folder(number, row, flags, seed)
            return self.run_once(flags, seed, self.tables[number].score, folder)
        except OutOfTime:
            return None

    def plan(self, numbers: list[str], seeds: list[int], jobs: int) -> str:
        """The number of runs, and the time that they take. Table 1's search comes on top."""
        folders = {
            self.folder(number, row, row.flags, seed)
            for number in numbers
            for row in self.tables[number].rows
            for seed in seeds_of(number, seeds)
        }
        done = [folder for folder in folders if (folder / "results.json").is_file()]
        self.minutes += [read_json(folder / "results.json")["minutes"] for folder in done]
        text, left = f"{len(folders)} runs, {len(done)} of them done", len(folders) - len(done)
        if self.minutes and left:
            each = float(np.mean(self.minutes)) / jobs
            text += f"; the others take about {each * left:.0f} minutes, {each:.1f} each"
            if self.deadline:
                minutes = (self.deadline - time.monotonic()) / 60
                text += f": about {min(left, int(minutes / max(each, 1e-3)))} of them fit"
        return text

    def run_all(self, numbers: list[str], seeds: list[int], jobs: int) -> dict[str, dict]:
        """Table -> row -> seed -> results; runs that did not fit the budget are missing."""
        tasks = {}  # (table, row, seed), the first seed of every row first
        for i in range(len(seeds)):
            for number in numbers:
                for row in self.tables[number].rows:
                    for seed in seeds_of(number, seeds)[i : i + 1]:
                        tasks[number, row.name, seed] = row
        pool = ThreadPoolExecutor(jobs)  # the runs are processes; a thread only waits
        futures = [pool.submit(self.run_row, task[0], row, task[2]) for task, row in tasks.items()]
        try:
            found = [future.result() for future in futures]
        except BaseException:
            PROCESSES.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nothing else starts
        results = {number: {row.name: {} for row in self.tables[number].rows} for number in numbers}
        for (number, name, seed), result in zip(tasks, found):
            if result is not None:
                results[number][name][seed] = result
        return results


def seeds_of(number: str, seeds: list[int]) -> list[int]:
    return [SEARCH_SEED] if number == "search" else seeds


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")


def flags_slug(flags: dict[str, object]) -> str:
    """A folder's name from the flags, in the order of the config's fields."""
    texts = []
    for name in (f.name for f in fields(AblationConfig) if f.name in flags):
        value = flags[name]
        text = f"{value:g}" if isinstance(value, float) else str(value).replace("/", "-")
        texts.append(f"{name}={text}")
    return ",".join(texts) or "preset"


# ------------------------------------------------------------------------------------------------
# Reports


def value_of(result: dict, column: str) -> float | None:
    if column == "transfer-dev":
        return result["transfer"]["dev"]["average"] if "transfer" in result else None
    return result["after"][column]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, or one number if all seeds agree."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values):.2f}" if np.ptp(values) > 0 else "")


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *(row + [""] * (len(head) - len(row)) for row in rows)]
    return [f"| {' | '.join(row)} |" for row in rows]


def verdict(better: list[float], worse: list[float], paper: float | None) -> str:
    """A difference of two rows, seed by seed, against the spread of both rows and of itself."""
    differences = np.subtract(better, worse)
    mean, std = differences.mean(), differences.std()
    text = f"{mean:+.2f}" + f" ± {std:.2f}" * (len(differences) > 1)
    if not paper:
        return text
    if len(differences) < 2:
        return f"{text}, one seed: inconclusive"
    one_sign = len(set(np.sign(differences))) == 1
    if abs(mean) <= max(np.std(better), np.std(worse), std) or not one_sign:
        return f"{text}: within the seeds' spread"
    return f"{text}: " + ("holds" if mean * paper > 0 else "the other way round")


def report(number: str, table: Table, results: dict[str, dict[int, dict]]) -> list[str]:
    """Lines of Markdown: the table beside the paper's figures, then the paper's findings."""
    if number == "1":
        return report_1(results)
    if number == "search":
        scores = [
            (r["after"]["STSB-dev"], name) for name in results for r in results[name].values()
        ]
        best = sorted(scores, reverse=True)[:10]
        return markdown(["", "STS-B dev"], [[name, f"{score:.2f}"] for score, name in best])
    all_runs = [result for runs in results.values() for result in runs.values()]
    columns = [c for c in table.columns if all(value_of(r, c) is not None for r in all_runs)]
    titles = {"STSB-dev": "STS-B dev", "transfer-dev": "transfer dev"}
    head, rows, findings = [""], [], []
    for column in columns:
        head += [titles[column], "paper"]
    for row in table.rows:
        cells, runs = [row.name], results[row.name]
        for i, column in enumerate(columns):
            ours = [value_of(result, column) for result in runs.values()]
            cells += [spread(ours) if ours else "", f"{row.paper[i]:.2f}" if row.paper[i:] else ""]
        rows.append([*cells, str(len(runs))])
    paper = {row.name: row.paper for row in table.rows}
    for names in table.findings:
        seeds = [seed for seed in results[names[0]] if seed in results[names[1]]]
        for i, column in enumerate(columns if seeds else []):
            better, worse = ([value_of(results[n][s], column) for s in seeds] for n in names)
            both = all(paper[name][i:] for name in names)
            published = paper[names[0]][i] - paper[names[1]][i] if both else None
            text = f"{published:+.2f}" if both else ""
            says = verdict(better, worse, published)
            findings.append([" − ".join(names), titles[column], text, says])
    lines = markdown([*head, "seeds"], rows)
    if findings:
        lines += ["", *markdown(["difference, seed by seed", "on", "paper", "here"], findings)]
    return lines


def report_1(results: dict[str, dict[int, dict]]) -> list[str]:
    head, first = ["", *COLUMNS[:-1], "Avg."], TABLE_1[0].name
    shown = [  # scores before training are the same in every run
        ("first-last average, before", first, "before_first_last", FIRST_LAST),
        ("[CLS], before", first, "before", ()),
        *((row.name, row.name, "after", row.paper) for row in TABLE_1),
    ]
    rows = []
    for label, name, key, published in shown:
        if runs := results[name].values():
            rows.append([label, *(spread([r[key][c] for r in runs]) for c in COLUMNS)])
        if runs and published:
            rows.append(
                ["*the paper's bert-base*", *(f"*{x:.2f}*" if x else "" for x in published)]
            )
    lines, rows = markdown(head, rows), []
    for row in TABLE_1[1:]:  # minus the start; DiffCSE also minus its baseline
        pairs = [("[CLS], before", row.name, "before")]
        pairs += [(BASELINE, BASELINE, "after")] * (row.flags.get("lam") != 0)
        for label, name, key in pairs:
            ours, others = results[row.name], results[name]
            cells = [f"{row.name} minus {label}"]
            for c in COLUMNS:
                gains = [ours[s]["after"][c] - others[s][key][c] for s in ours if s in others]
                cells += [f"{np.mean(gains):+.2f} ± {np.std(gains):.2f}"] * bool(gains)
            rows += [cells] * (len(cells) > 1)
    title = "Seed by seed, mean ± standard deviation of the difference:"
    return [*lines, "", title, "", *markdown(head, rows)]


NOTE = """# Tables

Written by `lab/reproduce.py` from `tables/*.json`, which have every run's numbers, seed, command
and machine. The paper's figures are of one run of bert-base each. Ours are mean ± standard
deviation over the seeds. A difference of the paper *holds* if every seed has its sign and the mean
exceeds the standard deviation of both rows and of the difference itself. It is *the other way
round* if the same is true with the opposite sign. RESULTS.md discusses the tables.
"""


def write_table(
    out: Path, number: str, config: str, table: Table, results: dict, command: str
) -> str:
    """Write tables/NAME.json, and README.md from all of them. Returns the table as text."""
    name = f"table_{number}_{config}" if number != "search" else f"search_{config}"
    lines, rows = report(number, table, results), []
    for row in table.rows:
        runs = []
        for seed, result in results[row.name].items():
            values = {column: value_of(result, column) for column in table.columns}
            kept = {key: result[key] for key in ("best_step", "minutes", "command", "machine")}
            values = {column: value for column, value in values.items() if value is not None}
            runs.append({"seed": seed, **values, **kept})
        rows.append({"name": row.name, "flags": row.flags, "paper": row.paper, "runs": runs})
    content = {"table": number, "config": config, "title": table.title, "command": command}
    content |= {"columns": table.columns, "rows": rows, "markdown": lines}
    write_atomically(out / "tables" / f"{name}.json", json.dumps(content, indent=1) + "\n")
    text, files = [NOTE], (out / "tables").glob("*.json")
    for file in sorted(files, key=lambda p: (int((re.findall(r"\d+", p.stem) or [99])[0]), p)):
        saved = read_json(file)
        title = "Search" if saved["table"] == "search" else f"Table {saved['table']}"
        title = f"## {title}: {saved['title']} (`{saved['config']}`)"
        text.append("\n".join([title, "", f"    {saved['command']}", "", *saved["markdown"], ""]))
    write_atomically(out / "README.md", "\n".join(text))
    missing = [row.name for row in table.rows if not results[row.name]]
    title = f"Table {number}: {table.title}" if number != "search" else table.title
    return "\n".join([title, "", *lines, *[f"not run: {', '.join(missing)}"] * bool(missing)])


# ------------------------------------------------------------------------------------------------
# Command line


def to_minutes(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hm])", text)
    if not match or not float(match[1]):
        raise UserError(f"--budget is {text!r}; it must be hours or minutes, such as 3h or 90m")
    return float(match[1]) * (60 if match[2] == "h" else 1)


def check(sweep: Sweep, numbers: list[str]) -> None:
    """Find mistakes before the first run. Raises: UserError."""
    for number in numbers:
        for row in sweep.tables[number].rows:
            cfg = parse_flags(words_of(row.flags, sweep.config, sweep.more))
            if number == "6" and cfg.lam > 0:
                try:
                    find_model(cfg.generator)
                except UserError:
                    raise UserError(
                        f"Table 6: {cfg.generator} is missing; RESULTS.md says how to make it, and "
                        "--generators names others"
                    ) from None
                load_generator(cfg, Tokenizer(find_model(cfg.model)))


def parse_args() -> tuple[argparse.Namespace, Sweep]:
    numbers = list(tables("small", []))
    parser = Parser(
        "python -m lab.reproduce", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--table", required=True, metavar="N,...", help="or all (all but 1 and search)")
    add("--config", choices=PRESETS, default="small", help="preset of the rows (default: small)")
    add("--seeds", default="0,1,2", help="(default: 0,1,2)")
    add("--budget", metavar="TIME", help="such as 3h or 90m: start no run that would exceed it")
    add("--transfer", default="3,5", metavar="N,...", help="tables with transfer scores, or none")
    add("--generators", metavar="MODEL,...", help="rows of Table 6: masked language models")
    add("--out", default="results", metavar="DIR", help="(default: results)")
    add("--jobs", type=positive_int, default=1, metavar="N", help="runs at a time (default: 1)")
    args, more = parser.parse_known_args()
    args.table = args.table.split(",")
    if args.table == ["all"]:
        args.table = [number for number in numbers if number not in ("1", "search")]
    args.transfer = [] if args.transfer == "none" else args.transfer.split(",")
    for name in ("table", "transfer"):
        if unknown := [number for number in getattr(args, name) if number not in numbers]:
            known = ", ".join(numbers)
            raise UserError(f"--{name} {unknown[0]}: unknown table; known are all, {known}")
    try:
        args.seeds = list(dict.fromkeys(map(int, args.seeds.split(","))))
    except ValueError:
        raise UserError(f"--seeds is {args.seeds!r}; expected integers such as 0,1,2") from None
    if SEARCH_SEED in args.seeds:
        raise UserError(f"--seeds: {SEARCH_SEED} is the seed of the search; use others")
    generators = list(GENERATORS if is_bert(args.config) else SMALL_GENERATORS)
    if args.generators:
        generators = args.generators.split(",")
    budget = to_minutes(args.budget) if args.budget else None
    sweep = Sweep(Path(args.out), args.config, more, generators, args.transfer, budget)
    check(sweep, args.table)
    return args, sweep


def main() -> None:
    args, sweep = parse_args()
    if args.jobs > 1:  # the runs share the cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    print(sweep.plan(args.table, args.seeds, args.jobs), flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = sweep.run_all(args.table, args.seeds, args.jobs)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues, and nothing is lost", file=sys.stderr)
        sys.exit(130)
    command, left = shlex.join(["python", "-m", "lab.reproduce", *sys.argv[1:]]), []
    for number in args.table:
        table, found = sweep.tables[number], results[number]
        print("\n" + write_table(sweep.out, number, args.config, table, found, command))
        for name, runs in found.items():
            seeds = [seed for seed in seeds_of(number, args.seeds) if seed not in runs]
            left += [f"Table {number}, {name}, seed {seed}" for seed in seeds]
    if left:
        print(f"\nnot run within the budget ({len(left)}): " + "; ".join(left))


if __name__ == "__main__":
    run_main(main)
