"""The paper's tables: every row some flags of diffcse.py, over several seeds. Tables 1, 3 to 8 and 15, and the search of appendix A.

    python -m lab.reproduce --table 3 --seeds 0,1,2 --data DIR --train-file FILE --text paragraphs --amp bf16
    python -m lab.reproduce --table all --budget 3h --seeds 0,1,2 --data DIR ...

Its own flags are listed by -h; every other one is diffcse.py's and goes to all runs. Each run is an ordinary one of diffcse.py, and its command is printed.
What has been run is not run again, also where two tables share it, and what was stopped is resumed: a stopped sweep goes on by the same command.
First come all rows with the first seed, then with the second: where the budget ends, every row has had as many.

Rows with a grid (Table 1) are searched first, field after field, by STS-B dev alone and with a seed of its own, 100; SEARCH, the grid of appendix A, is all its combinations.
Under --out: tables/NAME.json with every number, command and seed, README.md with the tables beside the paper's figures and what became of its findings;
tables/CONFIG/FLAGS/seedN holds the config.json, log.jsonl, results.json and transfer.json of a run (of Table 1 tables/1/CONFIG/ROW/seedN).
Transfer: average accuracy on the development items of the seven tasks, eval_transfer.py --mode fast, which is how the published code watches it in training (SPEC 7.1).
Not here: Tables 2 and 9 to 11 (eval_transfer.py, lab/analysis.py).
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

from bert import UserError, read_json, write_atomically
from config import MAY_CHANGE, PRESETS, Config, load_preset, parse_args
from data import Tokenizer, find_model, find_text, read_with_next, run_main
from diffcse import load_generator
from eval_sts import TEST_SETS

ROOT = Path(__file__).parent.parent
SEARCH_SEED = 100

# ----------------------------------------------------------------------------------------------------------------
# The tables


@dataclass
class Row:
    name: str
    flags: dict[str, object] = field(default_factory=dict)  # what differs from the preset
    paper: tuple[float | None, ...] = ()  # bert-base's figures in the same columns
    grid: tuple[str, ...] = ()  # which fields of GRID it is searched over


@dataclass
class Table:
    title: str
    rows: list[Row]
    findings: tuple[tuple[str, str], ...] = ()  # of two rows the one that is better in the paper, and the other
    columns: tuple[str, ...] = ("STSB-dev", "transfer-dev")
    score: str = "dev"  # the test sets stay shut


COLUMNS = ("STSB-dev", *TEST_SETS, "average")
FIRST_LAST = (None, 39.70, 59.38, 49.67, 66.03, 66.19, 53.87, 62.06, 56.70)
GRID = {"lr": (1e-4, 3e-4, 1e-3), "lam": (0.005, 0.05, 0.5), "mask_ratio": (0.30, 0.15)}  # the first of each is where a search begins
BASELINE = "SimCSE with BatchNorm"
TABLE_1 = [
    Row("SimCSE (tanh)", {"lam": 0.0, "projector": "tanh"}, (81.47, 68.40, 82.41, 74.38, 80.91, 78.56, 76.85, 72.23, 76.25), ("lr",)),
    Row(BASELINE, {"lam": 0.0}, (82.22,), ("lr",)),
    Row("DiffCSE, published", {}, (84.56, 72.28, 84.43, 76.47, 83.90, 80.54, 80.59, 71.23, 78.49), ("lr", "lam", "mask_ratio")),
    Row("DiffCSE, the paper's reading", {"edit": "sample", "edit_scope": "masked", "pads_in_loss": "off", "generator_dropout": "off"},
        grid=("lr", "lam", "mask_ratio")),
]  # fmt: skip
SIMCSE_RATE = {"small": {"lr": 3e-4}}  # Table 1's search; the others have a preset of SimCSE
APPENDIX_A = {"batch_size": (64, 128), "lr": (2e-6, 3e-6, 5e-6, 7e-6, 1e-5), "mask_ratio": (0.15, 0.20, 0.30, 0.40), "lam": (0.1, 0.05, 0.01, 0.005, 0.001)}
SMALL_RATES = (3e-5, 1e-4, 3e-4, 5e-4, 1e-3)  # in the place of those, for a small encoder
GENERATORS = [("bert-large-uncased", (82.93, 85.88)), ("bert-base-uncased", (83.63, 85.85)), ("distilbert-base-uncased", (84.56, 85.95)),
              ("google/bert_uncased_L-8_H-512_A-8", (82.25, 85.80)), ("google/bert_uncased_L-4_H-512_A-8", (82.64, 85.66)),
              ("google/bert_uncased_L-4_H-256_A-4", (82.12, 85.90)), ("google/bert_uncased_L-2_H-128_A-2", (81.40, 85.23))]  # fmt: skip
MASKS = {0.15: 84.48, 0.20: 84.04, 0.25: 84.49, 0.30: 84.56, 0.40: 84.48, 0.50: 83.91}
LAMBDAS = {0.0: 82.22, 0.0001: 83.90, 0.0005: 84.40, 0.001: 84.24, 0.005: 84.56, 0.01: 83.44, 0.05: 84.11, 0.1: 83.66}
SMALL_GENERATORS = ("runs/generator-weak", "runs/generator-medium", "assets/small-bert", "runs/generator-strong")


def simcse(config: str) -> dict[str, object]:
    """What makes a preset SimCSE: no difference prediction, tanh, and the rate and epochs that are SimCSE's own there."""
    if config in SIMCSE_RATE or not config.startswith(("bert", "roberta")):
        own = SIMCSE_RATE.get(config, {})
    else:
        own = {name: getattr(PRESETS["simcse_" + config.partition("_")[0]], name) for name in ("lr", "epochs", "batch_size")}
    return {"lam": 0.0, "projector": "tanh"} | {name: value for name, value in own.items() if value != getattr(PRESETS[config], name)}


def tables(config: str, generators: list[str]) -> dict[str, Table]:
    """Every table by its number, for a preset. Paper: bert-base's development scores."""
    baseline, with_batchnorm = simcse(config), {name: value for name, value in simcse(config).items() if name != "projector"}
    edits = {"MLM 15 %": "replace", "insert 15 %": "insert", "delete 15 %": "delete"}

    def used(how: str, paper: list[tuple[float, float]], **flags: object) -> list[Row]:
        return [Row(f"{how}: {name}", flags | {"mask_ratio": 0.15} | ({"edit_with": edit} if edit != "replace" else {}), figures)
                for (name, edit), figures in zip(edits.items(), paper)]  # fmt: skip

    ours = [(84.48, 85.95), (82.20, 85.96), (82.59, 85.97)]
    known = dict(GENERATORS)
    own = PRESETS[config].generator
    grid = APPENDIX_A if config.startswith(("bert", "roberta")) else APPENDIX_A | {"lr": SMALL_RATES}

    def changed(row: Row) -> Row:  # flags that say what the preset says are left out: the same run is one run
        return replace(row, flags={name: value for name, value in row.flags.items() if value != getattr(PRESETS[config], name)})

    named = {
        "3": Table("what is predicted, from whose vector", [
            Row("SimCSE", baseline, (81.47, 83.91)), Row("DiffCSE", {}, (84.56, 85.95)), Row("without contrastive loss", {"contrastive": False}, (54.48, 83.46)),
            Row("edit of the next sentence", {"condition_on": "next"}, (82.91, 85.83)), Row("of both", {"condition_on": "both"}, (83.41, 85.82)),
            Row("conditional MLM, same sentence", {"objective": "masked"}, (83.08, 84.43)),
            Row("conditional MLM, next sentence", {"objective": "masked", "condition_on": "next"}, (75.82, 85.68)),
            Row("conditional MLM, both", {"objective": "masked", "condition_on": "both"}, (82.88, 84.82)),
            Row("conditional corrective LM", {"objective": "corrected"}, (79.79, 85.30))],
            tuple(("DiffCSE", other) for other in ("SimCSE", "without contrastive loss", "edit of the next sentence", "of both", "conditional MLM, same sentence",
                                                   "conditional corrective LM")) + (("conditional MLM, same sentence", "conditional MLM, next sentence"),)),
        "4": Table("how a sentence is edited", [*used("DiffCSE", ours), Row("all three", {"mask_ratio": 0.15, "edit_with": "all"}, (82.80, 85.92))],
                   tuple(("DiffCSE: MLM 15 %", other) for other in ("DiffCSE: insert 15 %", "DiffCSE: delete 15 %", "all three"))),
        "5": Table("the projector", [
            Row("DiffCSE with BatchNorm", {}, (84.56, 85.95)), Row("DiffCSE without", {"projector": "tanh"}, (83.23, 85.24)),
            Row("SimCSE with BatchNorm", with_batchnorm, (82.22, 85.66)), Row("SimCSE without", baseline, (81.47, 83.91))],
            (("DiffCSE with BatchNorm", "DiffCSE without"), ("SimCSE with BatchNorm", "SimCSE without"), ("DiffCSE with BatchNorm", "SimCSE with BatchNorm"),
             ("DiffCSE without", "SimCSE without"))),
        "6": Table("the generator", [Row("SimCSE", baseline, (81.47, 83.91)),
                                     *(Row(name, {} if name == own else {"generator": name}, known.get(name, ())) for name in generators)],
                   tuple((own, other) for other in generators if other != own and own in generators)),
        "7": Table("the mask ratio", [Row(f"{ratio:.0%}", {"mask_ratio": ratio}, (score,)) for ratio, score in MASKS.items()],
                   tuple(("30%", f"{ratio:.0%}") for ratio in MASKS if ratio != 0.30), COLUMNS[:1]),
        "8": Table("lambda", [Row(f"{lam:g}", {"lam": lam}, (score,)) for lam, score in LAMBDAS.items()],
                   tuple(("0.005", f"{lam:g}") for lam in LAMBDAS if lam != 0.005), COLUMNS[:1]),
        "15": Table("what an edit is used for", [
            Row("SimCSE", baseline, (81.47, 83.91)),
            *used("one more positive", [(73.59, 83.33), (80.39, 83.92), (78.58, 81.80)], **baseline | {"edit_as": "positive", "lam": 1.0}),
            *used("one more negative", [(83.02, 84.49), (55.65, 79.86), (55.13, 82.56)], **baseline | {"edit_as": "negative", "lam": 1.0}),
            *used("DiffCSE", ours)],
            tuple((f"DiffCSE: {edit}", f"one more {use}: {edit}") for edit in edits for use in ("positive", "negative"))
            + tuple(("SimCSE", f"one more positive: {edit}") for edit in edits) + (("one more negative: MLM 15 %", "SimCSE"),)),
        "search": Table("appendix A's grid, by STS-B dev", [
            Row(", ".join(f"{name} {value:g}" for name, value in zip(grid, values)), dict(zip(grid, values))) for values in product(*grid.values())], (), COLUMNS[:1]),
    }  # fmt: skip
    return {number: replace(table, rows=[changed(row) for row in table.rows]) for number, table in named.items()} | {
        "1": Table("the seven STS sets", TABLE_1, (), COLUMNS, "stsb")}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# One run


def words_of(flags: dict[str, object], config: str, more: list[str]) -> list[str]:
    return ["--config", config, *(word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))), *more]


class Processes:
    """What is at work now, so that it can be told to stop."""

    def __init__(self):
        self.running: set[subprocess.Popen] = set()
        self.stopped = False

    def run(self, argv: list[str]) -> None:
        """To its end. Raises: UserError with what it says where it fails, KeyboardInterrupt where it or the sweep is stopped."""
        if self.stopped:
            raise KeyboardInterrupt
        process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True)  # a terminal's Ctrl-C is passed on once, by stop
        self.running.add(process)
        try:
            said = process.communicate()[1]
        finally:
            self.running.discard(process)
        if self.stopped or process.returncode in (130, 143):
            raise KeyboardInterrupt
        if process.returncode == 2 and said.splitlines()[-1:] and said.splitlines()[-1].startswith("error: "):
            raise UserError(f"{said.splitlines()[-1].removeprefix('error: ')} ({argv[0]}; with that mended the same command goes on from there)")
        if process.returncode:
            raise UserError(f"{said.rstrip()}\n{argv[0]} ended with exit code {process.returncode}; the same command goes on from there")

    def stop(self) -> None:
        """Each finishes its step, saves its state and ends."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()
        for process in list(self.running):
            process.wait()


PROCESSES = Processes()


def run(flags: dict[str, object], folder: Path, config: str, more: list[str], keep_model: bool = False) -> dict:
    """One run of diffcse.py, or what is left of it from before; its results.json. Raises: UserError."""
    words = words_of(flags, config, more)
    wanted = parse_args(words)[1]
    if (folder / "config.json").is_file():
        there = load_preset(str(folder / "config.json"))  # fields that came later are as they were then: at their defaults
        other = [f.name for f in fields(Config) if f.name not in (*MAY_CHANGE, "out_dir") and getattr(there, f.name) != getattr(wanted, f.name)]
        if other:
            raise UserError(f"{folder} holds a run with other settings (its {other[0]} is {getattr(there, other[0])!r}): name another --out, or delete that folder")
    if (folder / "results.json").is_file():
        return read_json(folder / "results.json")
    if (folder / "config.json").is_file():
        words = ["--resume", os.path.relpath(folder, ROOT)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it had a config
        words += ["--out-dir", os.path.relpath(folder, ROOT)]
    print("python diffcse.py " + " ".join(words) + "\n", end="", flush=True)  # in one piece: rows may run beside each other
    PROCESSES.run(["diffcse.py", *words])
    if not keep_model:
        shutil.rmtree(folder / "best")  # a table needs the numbers, not fifty models
    return read_json(folder / "results.json")


def transfer(folder: Path, more: list[str]) -> dict:
    """Accuracies of the run's best model on development items, which is then deleted; transfer.json. Raises: UserError."""
    file = folder / "transfer.json"
    if not file.is_file():
        cfg = parse_args(["--config", "small", *more])[1]
        words = ["eval_transfer.py", os.path.relpath(folder / "best", ROOT), "--mode", "fast", "--json", os.path.relpath(file, ROOT),
                 *(["--data", cfg.data] if cfg.data else []), *(["--amp", "bf16"] if cfg.amp == "bf16" else [])]  # fmt: skip
        print("python " + " ".join(words) + "\n", end="", flush=True)
        PROCESSES.run(words)
    shutil.rmtree(folder / "best", ignore_errors=True)
    return read_json(file)


# ----------------------------------------------------------------------------------------------------------------
# All of them


class OutOfTime(Exception):
    """The next run would not end within the budget."""


class Sweep:
    """The runs of some tables, one after the other or a few beside each other, until all are there or the budget is spent."""

    def __init__(self, out: Path, config: str, more: list[str], generators: list[str], with_transfer: list[str], budget: float | None = None):
        self.out, self.config, self.more = out, config, more
        self.tables = tables(config, generators)
        self.with_transfer = [{**row.flags, "seed": 0, "score": "dev"} for number in with_transfer for row in self.tables[number].rows]
        self.deadline = None if budget is None else time.time() + 60 * budget
        self.chosen: dict[tuple[str, str], dict[str, object]] = {}  # of table and row: its flags, searched
        self.minutes: list[float] = []  # of runs of this sweep, or there before
        self.locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def folder(self, number: str, row: Row, flags: dict[str, object]) -> Path:
        """Where a run with these flags (seed among them) lies: one place for all tables, but for those of Table 1, which are scored on test sets besides."""
        base = self.out / "tables" / (f"1/{self.config}/{slug(row.name)}" if number == "1" else self.config)
        return base / (f"seed{flags['seed']}" if number == "1" else f"{flags_slug(flags)}/seed{flags['seed']}")

    def once(self, flags: dict[str, object], folder: Path) -> dict:
        """The run's numbers, with transfer where a table wants it. Raises: OutOfTime, UserError."""
        with self.locks[str(folder)]:  # two rows may be the same run. (Of keys that are strings a defaultdict makes one lock each, whichever thread asks.)
            wants = flags.get("score") == "dev" and flags["seed"] != SEARCH_SEED and {**flags, "seed": 0, "score": "dev"} in self.with_transfer
            done = (folder / "results.json").is_file() and ((folder / "transfer.json").is_file() or not wants)
            if not done and self.deadline and time.time() + 60 * max(self.minutes, default=0) > self.deadline:
                raise OutOfTime
            if (folder / "results.json").is_file() and not done and not (folder / "best").is_dir():
                shutil.rmtree(folder)  # its model is needed once more: the same run makes it again
            started = time.time()
            results = run(flags, folder, self.config, self.more, keep_model=wants)
            if wants:
                results |= {"transfer": transfer(folder, self.more)}
            if not done:
                self.minutes.append((time.time() - started) / 60)
            return results

    def search(self, number: str, row: Row) -> dict[str, object]:
        """The row's flags with the values of its grid that are best on STS-B dev, field after field, with the search's own seed."""
        chosen = dict(row.flags) | {name: GRID[name][0] for name in row.grid}
        for name in row.grid:
            scores = {}
            for value in GRID[name]:
                flags = chosen | {name: value}
                values = "_".join(f"{field}={flags[field]:g}" for field in row.grid)
                folder = self.folder(number, row, {"seed": 0}).parent / "search" / values
                scores[value] = self.once(flags | {"seed": SEARCH_SEED, "score": "dev"}, folder)["dev_best"]
            chosen[name] = max(scores, key=scores.get)
            print(f"{row.name}: {name} " + ", ".join(f"{value:g}: {score:.2f}" for value, score in scores.items()) + f" -> {chosen[name]:g}\n", end="", flush=True)
        if row.grid:
            write_atomically(self.folder(number, row, {"seed": 0}).parent / "chosen.json", json.dumps(chosen, indent=2) + "\n")
        return chosen

    def one(self, number: str, row: Row, seed: int) -> dict | None:
        """One run of one row; None where the budget is spent."""
        try:
            with self.locks[f"{number} {row.name}"]:  # another seed of the row may be searching
                if (number, row.name) not in self.chosen:
                    self.chosen[number, row.name] = self.search(number, row)
                flags = dict(self.chosen[number, row.name])
            score = {} if self.tables[number].score == "stsb" else {"score": "dev"}
            flags |= {"seed": seed, **score}
            return self.once(flags, self.folder(number, row, flags))
        except OutOfTime:
            return None

    def plan(self, numbers: list[str], seeds: list[int], jobs: int) -> str:
        """How much there is to do, and how long it takes by what was measured before. Table 1's search comes on top."""
        folders = {}
        for number in numbers:
            for row in self.tables[number].rows:
                for seed in seeds_of(number, seeds):
                    folders[self.folder(number, row, row.flags | {"seed": seed})] = None
        done = [folder for folder in folders if (folder / "results.json").is_file()]
        self.minutes += [read_json(folder / "results.json")["minutes"] for folder in done]
        text = f"{len(folders)} runs, {len(done)} of them done"
        if self.minutes and len(done) < len(folders):
            each = float(np.mean(self.minutes)) / jobs
            text += f"; the others take about {each * (len(folders) - len(done)):.0f} minutes, {each:.1f} each"
            if self.deadline:
                text += f": about {min(len(folders) - len(done), int((self.deadline - time.time()) / 60 / max(each, 1e-3)))} of them fit"
        return text

    def all(self, numbers: list[str], seeds: list[int], jobs: int) -> dict[str, dict[str, dict[int, dict]]]:
        """Table -> row -> seed -> results; what did not fit is not there."""
        tasks = list(dict.fromkeys((number, row.name, seed) for i in range(len(seeds)) for number in numbers
                                   for row in self.tables[number].rows for seed in seeds_of(number, seeds)[i : i + 1]))  # fmt: skip
        rows = {(number, row.name): row for number in numbers for row in self.tables[number].rows}
        pool = ThreadPoolExecutor(jobs)  # the runs are processes; a thread only waits
        futures = [pool.submit(self.one, number, rows[number, name], seed) for number, name, seed in tasks]
        try:
            found = [future.result() for future in futures]
        except BaseException:
            PROCESSES.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # after a mistake or Ctrl-C nothing further begins
        results: dict[str, dict[str, dict[int, dict]]] = {number: {row.name: {} for row in self.tables[number].rows} for number in numbers}
        for (number, name, seed), result in zip(tasks, found):
            if result is not None:
                results[number][name][seed] = result
        return results


def seeds_of(number: str, seeds: list[int]) -> list[int]:
    return [SEARCH_SEED] if number == "search" else seeds


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")


def flags_slug(flags: dict[str, object]) -> str:
    """A folder's name that says the flags, in the order of Config."""
    typed = {f.name: flags[f.name] for f in fields(Config) if f.name in flags and f.name not in ("seed", "score")}
    texts = (f"{name}={value:g}" if isinstance(value, float) else f"{name}={str(value).replace('/', '-')}" for name, value in typed.items())
    return ",".join(texts) or "preset"


# ----------------------------------------------------------------------------------------------------------------
# What came of it


def value_of(result: dict, column: str) -> float | None:
    if column == "transfer-dev":
        return result["transfer"]["dev"]["average"] if "transfer" in result else None
    return result["after"][column]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; where all seeds agree, the number alone."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values):.2f}" if np.ptp(values) > 0 else "")


def line(cells: list[str], count: int) -> str:
    return "| " + " | ".join([*cells, *[""] * (count + 1 - len(cells))]) + " |"


def verdict(better: list[float], worse: list[float], paper: float | None) -> str:
    """What became of a difference of two rows, seed by seed, against the spread of either row and of the difference."""
    differences = np.subtract(better, worse)
    text = f"{differences.mean():+.2f}" + f" ± {differences.std():.2f}" * (len(differences) > 1)
    if not paper:
        return text
    if len(differences) < 2:
        return f"{text}, one seed: no telling"
    beyond = abs(differences.mean()) > max(np.std(better), np.std(worse), differences.std()) and len(set(np.sign(differences))) == 1
    return f"{text}: " + ("within the seeds' spread" if not beyond else "holds" if differences.mean() * paper > 0 else "the other way round")


def report(number: str, table: Table, results: dict[str, dict[int, dict]]) -> list[str]:
    """A table as Markdown, the paper's figures beneath or beside ours, then its findings."""
    columns = [c for c in table.columns if all(value_of(r, c) is not None for runs in results.values() for r in runs.values())]  # not what another table has asked of some

    def values(name: str, column: str, key: str = "after") -> list[float]:
        return [r[key][column] if key != "after" else value_of(r, column) for r in results[name].values()]

    if number == "1":
        return table_1(results, values)
    if number == "search":
        best = sorted(((values(row.name, "STSB-dev")[0], row.name) for row in table.rows if results[row.name]), reverse=True)
        return [line(["", "STS-B dev"], 1), "|---" * 2 + "|", *(line([name, f"{score:.2f}"], 1) for score, name in best[:10])]
    heads = [head for column in columns for head in ({"STSB-dev": "STS-B dev", "transfer-dev": "transfer dev"}[column], "paper")]
    lines = [line(["", *heads, "seeds"], len(heads) + 1), "|---" * (len(heads) + 2) + "|"]
    for row in table.rows:
        cells = [row.name]
        for i, column in enumerate(columns):
            ours = values(row.name, column)
            cells += [spread(ours) if ours else "", f"{row.paper[i]:.2f}" if len(row.paper) > i else ""]
        lines.append(line([*cells, str(len(results[row.name]))], len(heads) + 1))
    paper = {row.name: row.paper for row in table.rows}
    findings = []
    for better, worse in table.findings:
        seeds = [seed for seed in results[better] if seed in results[worse]]
        for i, (column, head) in enumerate(zip(columns, heads[::2])):
            if seeds:
                published = paper[better][i] - paper[worse][i] if min(len(paper[better]), len(paper[worse])) > i else None
                says = verdict(*([value_of(results[name][seed], column) for seed in seeds] for name in (better, worse)), published)
                findings.append(line([f"{better} − {worse}", head, f"{published:+.2f}" if published is not None else "", says], 3))
    if findings:
        lines += ["", line(["difference, seed by seed", "on", "paper", "here"], 3), "|---" * 4 + "|", *findings]
    return lines


def table_1(results: dict[str, dict[int, dict]], values) -> list[str]:
    def paper(figures: tuple[float | None, ...]) -> str:
        return line(["*the paper's bert-base*", *(f"*{value:.2f}*" if value else "" for value in figures)], len(COLUMNS))

    lines = [line(["", *COLUMNS[:-1], "Avg."], len(COLUMNS)), "|---" * (len(COLUMNS) + 1) + "|"]
    shown = [("first-last average, before", TABLE_1[0].name, "before_first_last", FIRST_LAST),  # before: the same in every run
             ("[CLS], before", TABLE_1[0].name, "before", ()), *((row.name, row.name, "after", row.paper) for row in TABLE_1)]  # fmt: skip
    for label, name, key, published in shown:
        if results[name]:
            lines.append(line([label, *(spread(values(name, column, key)) for column in COLUMNS)], len(COLUMNS)))
            lines += [paper(published)] * bool(published)
    lines += ["", "Seed by seed, mean ± standard deviation of the difference:", "", *lines[:2]]
    for row in TABLE_1[1:]:  # against the start; DiffCSE against its fair baseline
        pairs = [("[CLS], before", row.name, "before")] + [(BASELINE, BASELINE, "after")] * (row.flags.get("lam") != 0)
        for label, name, key in pairs:
            seeds = [seed for seed in results[row.name] if seed in results[name]]
            if seeds:
                differences = [[results[row.name][s]["after"][c] - results[name][s][key][c] for s in seeds] for c in COLUMNS]
                lines.append(line([f"{row.name} minus {label}", *(f"{np.mean(d):+.2f} ± {np.std(d):.2f}" for d in differences)], len(COLUMNS)))
    return lines


def write_table(out: Path, number: str, config: str, table: Table, results: dict[str, dict[int, dict]], command: str) -> str:
    """tables/NAME.json, and README.md anew from all that are there. Returns the table's text."""
    name = f"table_{number}_{config}" if number != "search" else f"search_{config}"
    lines = report(number, table, results)
    rows = [{"name": row.name, "flags": row.flags, "paper": row.paper,
             "runs": [{"seed": seed, **{c: value_of(r, c) for c in table.columns if value_of(r, c) is not None},
                       "best_step": r["best_step"], "minutes": r["minutes"], "command": r["command"], "machine": r["machine"]}
                      for seed, r in results[row.name].items()]} for row in table.rows]  # fmt: skip
    missing = [f"{row.name}" for row in table.rows if not results[row.name]]
    content = {"table": number, "config": config, "title": table.title, "command": command, "columns": table.columns, "rows": rows, "markdown": lines}
    write_atomically(out / "tables" / f"{name}.json", json.dumps(content, indent=1) + "\n")
    text = [f"# Tables\n\nWritten by `lab/reproduce.py` from `tables/*.json`, where every run's numbers, seed, command and machine are; {PAPER_NOTE}\n"]
    for file in sorted((out / "tables").glob("*.json"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)] or [99]):
        saved = read_json(file)
        heading = "Search" if saved["table"] == "search" else f"Table {saved['table']}"
        text.append(f"## {heading}: {saved['title']} (`{saved['config']}`)\n\n    {saved['command']}\n\n" + "\n".join(saved["markdown"]) + "\n")
    write_atomically(out / "README.md", "\n".join(text))
    return "\n".join([f"Table {number}: {table.title}" if number != "search" else table.title, "", *lines] + [f"not run: {', '.join(missing)}"] * bool(missing))


PAPER_NOTE = ("the paper's figures are bert-base's, of one run each. Mean ± standard deviation over the seeds. A difference of the paper *holds* where every seed has its sign and the "
              "mean is larger than the standard deviation of either row and of the difference itself, and is *the other way round* where that is so with the other sign. "
              "What it means: the project's RESULTS.md.")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# The command


def minutes(text: str) -> float:
    """3h, 90m, 1.5h. Raises: UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hm])", text)
    if not match or not float(match[1]):
        raise UserError(f"--budget is {text!r}: it must be hours or minutes, as 3h or 90m")
    return float(match[1]) * (60 if match[2] == "h" else 1)


def check(sweep: Sweep, wanted: list[str], more: list[str]) -> None:
    """Mistakes are told before the first run. Raises: UserError."""
    for number in wanted:
        for row in sweep.tables[number].rows:
            cfg = parse_args(words_of(row.flags, sweep.config, more))[1]
            if number == "6" and cfg.lam > 0:
                folder = find_model(cfg.model)
                try:
                    find_model(cfg.generator)
                except UserError:
                    raise UserError(f"Table 6: {cfg.generator} is not there; RESULTS.md says how lab/pretrain.py makes generators, and --generators names others") from None
                load_generator(cfg, folder, Tokenizer(folder))
    if cfg.text == "paragraphs" and any("condition_on" in row.flags for number in wanted for row in sweep.tables[number].rows):
        next(read_with_next(find_text(cfg.train_file, cfg.data)), None)  # is it in order?


def main() -> None:
    numbers = list(tables("small", []))
    parser = argparse.ArgumentParser(prog="lab.reproduce", description=__doc__.split("\n\n")[0],
                                     epilog="Every other flag is one of diffcse.py and goes to all runs.", allow_abbrev=False)  # fmt: skip
    parser.add_argument("--table", required=True, metavar="N,...", help=f"of {', '.join(numbers)}, or all (but for 1 and search)")
    parser.add_argument("--config", choices=PRESETS, default="small", help="preset of diffcse.py that the rows change (default: small)")
    parser.add_argument("--seeds", default="0,1,2", help="(default: 0,1,2)")
    parser.add_argument("--budget", metavar="TIME", help="as 3h or 90m: begin no run that would not end within it, and say what was left out")
    parser.add_argument("--transfer", default="3,5", metavar="N,...", help="tables whose runs are scored on transfer tasks too, or none (default: 3,5)")
    parser.add_argument("--generators", metavar="MODEL,...", help="rows of Table 6: masked language models with the encoder's vocabulary")
    parser.add_argument("--out", default="results", metavar="DIR", help="(default: results)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each with its share of the cores (default: 1)")
    args, more = parser.parse_known_args()
    wanted = [n for n in numbers if n not in ("1", "search")] if args.table == "all" else args.table.split(",")
    with_transfer = [] if args.transfer == "none" else args.transfer.split(",")
    for flag, asked in ("table", wanted), ("transfer", with_transfer):
        if unknown := [n for n in asked if n not in numbers]:
            raise UserError(f"--{flag} {unknown[0]}: there is no such table here; there are {', '.join(numbers)}" + ", and all" * (flag == "table"))
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}: it must be at least 1")
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))  # the runs inherit it
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in args.seeds.split(",")))
    except ValueError:
        raise UserError(f"--seeds is {args.seeds!r}: it must be whole numbers with commas between, as 0,1,2") from None
    if SEARCH_SEED in seeds:
        raise UserError(f"--seeds: {SEARCH_SEED} is the seed of the search; take others")
    generators = args.generators.split(",") if args.generators else list(SMALL_GENERATORS) if args.config in ("small", "demo") else [name for name, _ in GENERATORS]
    sweep = Sweep(Path(args.out), args.config, more, generators, with_transfer, minutes(args.budget) if args.budget else None)
    check(sweep, wanted, more)
    print(sweep.plan(wanted, seeds, args.jobs), flush=True)

    def stop(*_) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        results = sweep.all(wanted, seeds, args.jobs)
    except KeyboardInterrupt:
        print("\nstopped: nothing is lost, and the same command goes on", file=sys.stderr)
        sys.exit(130)
    command = shlex.join(["python", "-m", "lab.reproduce", *sys.argv[1:]])
    left = []
    for number in wanted:
        print("\n" + write_table(Path(args.out), number, args.config, sweep.tables[number], results[number], command))
        left += [f"Table {number}, {name}, seed {seed}" for name, runs in results[number].items() for seed in seeds_of(number, seeds) if seed not in runs]
    if left:
        print(f"\nleft out for want of time ({len(left)}; the same command goes on): " + "; ".join(left))


if __name__ == "__main__":
    run_main(main)
