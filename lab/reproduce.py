"""The paper's Tables 1, 3 to 8 and 15 over several seeds, beside the paper's figures.

    python -m lab.reproduce --table 3 --seeds 0,1,2 --data DIR --train-file FILE --text paragraphs
    python -m lab.reproduce --table all --budget 3h --seeds 0,1,2 --data DIR ...

Every row is a few flags of diffcse.py or lab/ablations.py. Flags that -h does not list go to all
runs. Each run is an ordinary one, and its command is printed. Finished runs are not repeated, even
if two tables share them, and interrupted ones are resumed: the same command continues a sweep. All
rows run with the first seed, then with the second, so a budget that ends early leaves rows with
equally many seeds. Rows of Table 1 are searched first, one setting after the other, by STS-B dev
with seed 100. Transfer is the average accuracy on development items of the seven tasks
(`lab.transfer --mode fast`), which the published code computes during training.

Files below --out: README.md, the tables beside the paper's figures; table_N_CONFIG.json, every
number with its seed, command and machine; and the runs, CONFIG/SCORE/FLAGS/seedN/ with config.json,
log.jsonl, results.json and transfer.json. Models are deleted.
Not here: Table 2 (lab/transfer.py), Tables 9 to 11 (lab/analysis.py).
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from bert import ModelError, read_json
from data import Tokenizer
from diffcse import PRESETS, Config, load_generator
from engine.cli import Parser, comma_list, flag, make_parser, parse, positive_int
from engine.errors import UserError, run_main, write_atomically
from engine.hub import find_model
from eval_sts import TEST_SETS
from lab.ablations import AblationConfig
from lab.tables import format_table

# ------------------------------------------------------------------------------------------------
# The tables

Flags = dict[str, object]


@dataclass
class Row:
    name: str
    flags: Flags  # differences from the preset
    paper: tuple[float | None, ...] = ()  # bert-base's figures, in the table's columns
    search: tuple[str, ...] = ()  # settings that are searched
    scores: str = "after"  # key in results.json
    runs: list[dict] = field(default_factory=list, init=False)  # their results.json


@dataclass
class Table:
    title: str
    rows: list[Row]
    references: tuple[str, ...]  # all other rows are compared with these, and with SAME_RECIPE
    columns: tuple[str, ...] = ("STSB-dev", "transfer-dev")
    score: str = "dev"  # dev: the test sets are never loaded


SIMCSE = {"recipe": "simcse"}  # expanded by `resolve`
BATCHNORM = SIMCSE | {"projector": "batchnorm"}
READING = {"edit": "sample", "edit_scope": "masked", "pads_in_loss": False}
READING |= {"generator_dropout": False}
FIRST_LAST = (None, 39.70, 59.38, 49.67, 66.03, 66.19, 53.87, 62.06, 56.70)
TANH = (81.47, 68.40, 82.41, 74.38, 80.91, 78.56, 76.85, 72.23, 76.25)
DIFFCSE = (84.56, 72.28, 84.43, 76.47, 83.90, 80.54, 80.59, 71.23, 78.49)
SETTINGS = ("lr", "lam", "mask_ratio")
TABLE_1 = [
    Row("first-last average, before", SIMCSE, FIRST_LAST, ("lr",), "before_first_last"),
    Row("[CLS], before", SIMCSE, (), ("lr",), "before"),
    Row("SimCSE (tanh)", SIMCSE, TANH, ("lr",)),
    Row("SimCSE with BatchNorm", BATCHNORM, (82.22,), ("lr",)),
    Row("DiffCSE, published", {}, DIFFCSE, SETTINGS),
    Row("DiffCSE, the paper's reading", READING, (), SETTINGS),
]
SAME_RECIPE = Row("SimCSE, the same recipe", {"lam": 0.0})
NEXT, BOTH, MASKED = {"condition_on": "next"}, {"condition_on": "both"}, {"objective": "masked"}
TABLE_3 = [
    SAME_RECIPE,
    Row("SimCSE", SIMCSE, (81.47, 83.91)),
    Row("DiffCSE", {}, (84.56, 85.95)),
    Row("without contrastive loss", {"contrastive": False}, (54.48, 83.46)),
    Row("edit of the next sentence", NEXT, (82.91, 85.83)),
    Row("edit of both", BOTH, (83.41, 85.82)),
    Row("conditional MLM, same sentence", MASKED, (83.08, 84.43)),
    Row("conditional MLM, next sentence", MASKED | NEXT, (75.82, 85.68)),
    Row("conditional MLM, both", MASKED | BOTH, (82.88, 84.82)),
    Row("conditional corrective LM", {"objective": "corrected"}, (79.79, 85.30)),
]
REPLACE = {"mask_ratio": 0.15}
INSERT, DELETE = REPLACE | {"edit_with": "insert"}, REPLACE | {"edit_with": "delete"}
TABLE_4 = [
    SAME_RECIPE,
    Row("DiffCSE: MLM 15 %", REPLACE, (84.48, 85.95)),
    Row("DiffCSE: insert 15 %", INSERT, (82.20, 85.96)),
    Row("DiffCSE: delete 15 %", DELETE, (82.59, 85.97)),
    Row("all three", REPLACE | {"edit_with": "all"}, (82.80, 85.92)),
]
TABLE_5 = [
    Row("DiffCSE with BatchNorm", {}, (84.56, 85.95)),
    Row("DiffCSE without", {"projector": "tanh"}, (83.23, 85.24)),
    Row("SimCSE with BatchNorm", BATCHNORM, (82.22, 85.66)),
    Row("SimCSE without", SIMCSE, (81.47, 83.91)),
]
TABLE_6 = [SAME_RECIPE, Row("SimCSE", SIMCSE, (81.47, 83.91))]  # and a row for each generator
RATIOS = {0.15: 84.48, 0.20: 84.04, 0.25: 84.49, 0.30: 84.56, 0.40: 84.48, 0.50: 83.91}
TABLE_7 = [SAME_RECIPE]
TABLE_7 += [Row(f"{ratio:.0%}", {"mask_ratio": ratio}, (dev,)) for ratio, dev in RATIOS.items()]
LAMBDAS = {0.0: 82.22, 0.0001: 83.90, 0.0005: 84.40, 0.001: 84.24}
LAMBDAS |= {0.005: 84.56, 0.01: 83.44, 0.05: 84.11, 0.1: 83.66}
TABLE_8 = [Row(f"{lam:g}", {"lam": lam}, (dev,)) for lam, dev in LAMBDAS.items()]
POSITIVE = SIMCSE | {"edit_as": "positive", "lam": 1.0}
NEGATIVE = SIMCSE | {"edit_as": "negative", "lam": 1.0}
TABLE_15 = [
    SAME_RECIPE,
    Row("SimCSE", SIMCSE, (81.47, 83.91)),
    Row("one more positive: MLM 15 %", POSITIVE | REPLACE, (73.59, 83.33)),
    Row("one more positive: insert 15 %", POSITIVE | INSERT, (80.39, 83.92)),
    Row("one more positive: delete 15 %", POSITIVE | DELETE, (78.58, 81.80)),
    Row("one more negative: MLM 15 %", NEGATIVE | REPLACE, (83.02, 84.49)),
    Row("one more negative: insert 15 %", NEGATIVE | INSERT, (55.65, 79.86)),
    Row("one more negative: delete 15 %", NEGATIVE | DELETE, (55.13, 82.56)),
    *TABLE_4[1:4],
]
STS, DEV = ("STSB-dev", *TEST_SETS, "average"), ("STSB-dev",)
OWN_GENERATORS = ("distilbert-base-uncased", "distilroberta-base", "assets/small-bert")  # presets'
BEFORE_AND_BASELINE = ("[CLS], before", "SimCSE with BatchNorm")
TABLES = {
    "1": Table("the seven STS sets", TABLE_1, BEFORE_AND_BASELINE, STS, "stsb"),
    "3": Table("what is predicted, and given which sentence", TABLE_3, ("DiffCSE",)),
    "4": Table("how a sentence is edited", TABLE_4, ("DiffCSE: MLM 15 %",)),
    "5": Table("the projector", TABLE_5, ("DiffCSE with BatchNorm", "SimCSE without")),
    "6": Table("the generator", TABLE_6, OWN_GENERATORS),
    "7": Table("the mask ratio", TABLE_7, ("30%",), DEV),
    "8": Table("lambda", TABLE_8, ("0", "0.005"), DEV),
    "15": Table("how an edit is used", TABLE_15, ("SimCSE",)),
}
GENERATORS = {
    "bert-large-uncased": (82.93, 85.88),
    "bert-base-uncased": (83.63, 85.85),
    "distilbert-base-uncased": (84.56, 85.95),
    "google/bert_uncased_L-8_H-512_A-8": (82.25, 85.80),
    "google/bert_uncased_L-4_H-512_A-8": (82.64, 85.66),
    "google/bert_uncased_L-4_H-256_A-4": (82.12, 85.90),
    "google/bert_uncased_L-2_H-128_A-2": (81.40, 85.23),
}
SMALL_GENERATORS = ["runs/generator-weak", "runs/generator-medium", "assets/small-bert"]
SMALL_GENERATORS += ["runs/generator-strong"]

SEARCH_SEED = 100
GRID = {  # appendix A, and the rate of SimCSE
    "lr": (2e-6, 3e-6, 5e-6, 7e-6, 1e-5, 3e-5),
    "lam": (0.1, 0.05, 0.01, 0.005, 0.001),
    "mask_ratio": (0.15, 0.20, 0.30, 0.40),
}
SMALL_GRID = {"lr": (1e-4, 3e-4, 1e-3), "lam": (0.005, 0.05, 0.5), "mask_ratio": (0.30, 0.15)}
SMALL = PRESETS["small"].model
RECIPES = {  # of SimCSE, for each model
    "bert-base-uncased": PRESETS["simcse_bert"],
    "roberta-base": PRESETS["simcse_roberta"],
    SMALL: replace(PRESETS["small"], lam=0.0, projector="tanh", lr=3e-4),
}


def resolve(flags: Flags, config: str) -> Flags:
    """SimCSE's recipe is written out, and the preset's own values are left out.

    Flags name a run, so equal runs need equal flags.
    """
    preset = PRESETS[config]
    if "recipe" in flags:
        names = ("lam", "projector", "lr", "epochs", "batch_size")
        recipe = {name: getattr(RECIPES[preset.model], name) for name in names}
        flags = recipe | {name: value for name, value in flags.items() if name != "recipe"}
    return {name: value for name, value in flags.items() if value != getattr(preset, name, None)}


def tables_of(config: str, generators: list[str]) -> dict[str, Table]:
    """TABLES with the flags of a preset, and with these generators in Table 6."""
    more = [Row(name, {"generator": name}, GENERATORS.get(name, ())) for name in generators]
    tables = {}
    for number, table in TABLES.items():
        rows = table.rows + more * (number == "6")
        rows = [replace(row, flags=resolve(row.flags, config)) for row in rows]
        tables[number] = replace(table, rows=rows)
    return tables


# ------------------------------------------------------------------------------------------------
# The runs

PARSER = make_parser(AblationConfig, PRESETS)


@dataclass
class Sweep:
    """Runs of a preset, a few processes at a time, until all are done or no time is left."""

    out: Path
    config: str
    more: list[str]  # flags of all runs
    jobs: int = 1
    deadline: float = math.inf  # by time.monotonic()
    longest: float = 0.0  # minutes of the longest run
    processes: list[subprocess.Popen] = field(default_factory=list)
    stopped: bool = False

    def map(self, function: Callable, items: Iterable[tuple]) -> list:
        """function(*item) of each item, `jobs` at a time. After an error nothing else starts."""
        pool = ThreadPoolExecutor(self.jobs)  # a thread only waits for its process
        try:
            futures = [pool.submit(function, *item) for item in items]
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C, too
            self.stopped = True
            for process in self.processes:
                process.terminate()  # it finishes its step, saves its state and ends
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def execute(self, program: list[str], words: list[str]) -> None:
        """Print and run a command. Raises: UserError if it fails."""
        print(f"python {shlex.join(program + words)}\n", end="", flush=True)  # one write: threads
        process = subprocess.Popen(
            [sys.executable, *program, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C reaches it once, by terminate()
        )
        self.processes.append(process)
        if self.stopped:
            process.terminate()
        error = process.communicate()[1].rstrip().rpartition("\n")[2].removeprefix("error: ")
        if process.returncode:
            code = f"{program[-1]}, exit code {process.returncode}"
            raise UserError(f"{error} ({code}; after fixing this, the same command continues)")

    def words(self, flags: Flags, seed: int, score: str) -> list[str]:
        words = ["--config", self.config]
        for name, value in flags.items():
            words += [flag(name), str(value)]
        return [*words, *self.more, "--score", score, "--seed", str(seed)]

    def folder(self, flags: Flags, seed: int, score: str) -> Path:
        name = ",".join(f"{name}={value}" for name, value in sorted(flags.items()))
        return self.out / self.config / score / (name.replace("/", "-") or "preset") / f"seed{seed}"

    def run(self, flags: Flags, seed: int, score: str, with_transfer: bool = False) -> dict | None:
        """Results of a run, which is started or resumed if necessary. None: no time is left."""
        folder, words = self.folder(flags, seed, score), self.words(flags, seed, score)
        best, results, transfer = (folder / f for f in ("best", "results.json", "transfer.json"))
        started, exists = time.monotonic(), (folder / "config.json").is_file()
        try:  # --resume refuses a run that has other settings
            cfg = parse_words(words + ["--resume", str(folder)] * exists)
        except UserError as error:
            raise UserError(f"{error}. For other settings, use another --out") from None
        if not results.is_file() or (with_transfer and not transfer.is_file()):
            if started + 60 * self.longest > self.deadline:
                return None
            if not exists or (results.is_file() and not best.is_dir()):  # its model is needed again
                shutil.rmtree(folder, ignore_errors=True)
                exists = False
            if not results.is_file():
                words += ["--resume" if exists else "--out-dir", str(folder)]
                self.execute(program_of(cfg), words)
            if with_transfer:
                words = [str(best), "--mode", "fast", "--json", str(transfer)]
                words += ["--data", cfg.data] * bool(cfg.data)
                words += ["--amp", "bf16"] * (cfg.amp == "bf16")
                self.execute(["-m", "lab.transfer"], words)
        shutil.rmtree(best, ignore_errors=True)  # a table needs the numbers, not fifty models
        content = read_json(results)
        if transfer.is_file():
            content["after"]["transfer-dev"] = read_json(transfer)["dev"]["average"]
        elapsed = (time.monotonic() - started) / 60
        self.longest = max(self.longest, elapsed, content["minutes"])
        return content

    def search(self, row: Row) -> Flags | None:
        """The row's flags, searched one setting after the other. None: no time is left."""
        chosen, grid = row.flags, SMALL_GRID if PRESETS[self.config].model == SMALL else GRID
        for name in row.search:
            options = [resolve(chosen | {name: value}, self.config) for value in grid[name]]
            results = [self.run(flags, SEARCH_SEED, "dev") for flags in options]
            if None in results:
                return None
            scores = [result["dev_best"] for result in results]
            best = int(np.argmax(scores))
            chosen = options[best]
            text = ", ".join(f"{value:g}: {score:.2f}" for value, score in zip(grid[name], scores))
            print(f"{row.name}: {name} {text} -> {grid[name][best]:g}\n", end="", flush=True)
        return chosen

    def plan(self, folders: Iterable[Path]) -> str:
        """How many runs there are, and how long they take."""
        files = [folder / "results.json" for folder in folders]
        done = [read_json(file)["minutes"] for file in files if file.is_file()]
        text, left = f"{len(files)} runs, {len(done)} of them done", len(files) - len(done)
        if done and left:
            text += f"; the others take about {np.mean(done) * left / self.jobs:.0f} minutes"
        return text


def parse_words(words: list[str]) -> AblationConfig:
    return parse(AblationConfig, PRESETS, words, PARSER)[1]


def program_of(cfg: AblationConfig) -> list[str]:
    """diffcse.py, unless a setting is one that only lab/ablations.py has."""
    defaults = {f.name: f.default for f in fields(cfg) if not hasattr(Config, f.name)}
    return ["diffcse.py"] if cfg == replace(cfg, **defaults) else ["-m", "lab.ablations"]


def run_tables(
    sweep: Sweep, tables: dict[str, Table], seeds: list[int], scored: Iterable[Flags] = ()
) -> None:
    """Give each row its runs, and its flags if they are searched (None: no time was left).

    scored: flags of the rows that need transfer scores.
    """
    rows = [row for table in tables.values() for row in table.rows]
    searches = {f"{row.flags} {row.search}": row for row in rows}  # rows share searches and runs
    chosen = sweep.map(sweep.search, [(row,) for row in searches.values()])
    chosen = dict(zip(searches, chosen))
    for row in rows:
        row.flags = chosen[f"{row.flags} {row.search}"]
    runs = [
        (row, (row.flags, seed, table.score, table.score == "dev" and row.flags in scored))
        for seed in seeds
        for table in tables.values()
        for row in table.rows
        if row.flags is not None
    ]
    by_folder = {sweep.folder(*run[:3]): run for _, run in runs}
    print(sweep.plan(by_folder), flush=True)
    results = dict(zip(by_folder, sweep.map(sweep.run, by_folder.values())))
    for row, run in runs:
        if result := results[sweep.folder(*run[:3])]:
            row.runs.append(result)


# ------------------------------------------------------------------------------------------------
# The report

NOTE = """# Tables

Written by `lab/reproduce.py` from `table_*.json`, which have every run's numbers, seed, command and
machine. Ours are mean ± standard deviation over the seeds, the paper's figures in brackets are of
one run of bert-base each. A difference of the paper *holds* if every seed has its sign and the mean
exceeds the standard deviation of both rows and of the difference itself. It is *the other way
round* if the same is true with the opposite sign. RESULTS.md discusses the tables.
"""


def to_json(number: str, config: str, table: Table, command: str) -> dict:
    rows = []
    for row in table.rows:
        runs = []
        for result in row.runs:
            scores = {c: result[row.scores][c] for c in table.columns if c in result[row.scores]}
            names = ("seed", "best_step", "precision", "minutes", "command", "machine")
            runs.append(scores | {name: result[name] for name in names})
        rows.append({"name": row.name, "flags": row.flags, "paper": row.paper, "runs": runs})
    names = {"table": number, "config": config, "title": table.title, "command": command}
    return names | {"columns": table.columns, "rows": rows}


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, or one number if all seeds agree."""
    if not values:
        return "-"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values):.2f}" if np.ptp(values) > 0 else "")


def verdict(row: dict, other: dict, column: str) -> str:
    """Row minus other, seed by seed, against the spread of both rows and of the difference."""
    seeds = [seed for seed in row["runs"] if seed in other["runs"]]
    if not seeds:
        return ""
    values = np.array([[r["runs"][seed][column] for seed in seeds] for r in (row, other)])
    difference = values[0] - values[1]
    mean, std = difference.mean(), difference.std()
    text = f"{mean:+.2f}" + f" ± {std:.2f}" * (len(seeds) > 1)
    figures = row["paper"].get(column), other["paper"].get(column)
    if None in figures:
        return text
    paper = figures[0] - figures[1]
    text += f" ({paper:+.2f})"
    if len(seeds) == 1:
        return f"{text}: one seed, inconclusive"
    if abs(mean) <= max(std, *values.std(1)) or len(set(np.sign(difference))) > 1:
        return f"{text}: within the seeds' spread"
    return f"{text}: " + ("holds" if mean * paper > 0 else "the other way round")


def render(saved: dict) -> str:
    """Markdown of a table's JSON: its rows, then their differences from the reference rows."""
    number, names = saved["table"], saved["columns"]
    rows = {}
    for row in saved["rows"]:
        runs = {run["seed"]: run for run in row["runs"]}
        rows[row["name"]] = {"runs": runs, "paper": dict(zip(names, row["paper"]))}
    all_runs = [run for row in rows.values() for run in row["runs"].values()]
    columns = [column for column in names if all(column in run for run in all_runs)]
    lines, differences = [], []
    for name, row in rows.items():
        cells = []
        for column in columns:
            ours = [run[column] for run in row["runs"].values()]
            paper = row["paper"].get(column)
            cells.append(spread(ours) + (f" ({paper:.2f})" if paper else ""))
        lines.append([name, *cells, len(row["runs"])])
    references = SAME_RECIPE.name, *TABLES[number].references
    references = [name for name in references if name in rows]
    for i, reference in enumerate(references):
        for name in (name for name in rows if name not in references[: i + 1]):
            cells = [verdict(rows[name], rows[reference], column) for column in columns]
            if any(cells):
                differences.append([f"{name} − {reference}", *cells])
    title = f"## Table {number}: {saved['title']} (`{saved['config']}`)"
    head = ["difference, seed by seed", *columns]
    parts = [title, f"    {saved['command']}", format_table(["", *columns, "seeds"], lines)]
    parts += [format_table(head, differences)] * bool(differences)
    return "\n\n".join(parts) + "\n"


def write_readme(out: Path) -> None:
    """README.md, of all JSON files in the folder."""
    saved = [read_json(file) for file in out.glob("table_*.json")]
    saved.sort(key=lambda table: (int(table["table"]), table["config"]))
    write_atomically(out / "README.md", "\n".join([NOTE, *map(render, saved)]))


# ------------------------------------------------------------------------------------------------
# Command line


def minutes(text: str) -> float:
    return float(text[:-1]) if text.endswith("m") else 60 * float(text.removesuffix("h"))


def integers(text: str) -> list[int]:
    return sorted({int(word) for word in text.split(",")})


def numbers(text: str) -> list[str]:
    names = {"all": ",".join(number for number in TABLES if number != "1"), "none": ""}
    text = names.get(text, text)
    return comma_list(list(TABLES))(text) if text else []


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    description = __doc__.split("\n")[0]
    parser = Parser("python -m lab.reproduce", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--table", required=True, type=numbers, metavar="N,...", help="or all (all but 1)")
    add("--config", choices=PRESETS, default="small", help="preset of the rows (default: small)")
    add("--seeds", type=integers, default="0,1,2", metavar="N,...", help="(default: 0,1,2)")
    budget = "such as 3h or 90m: start no run that would exceed it"
    add("--budget", type=minutes, default=math.inf, metavar="TIME", help=budget)
    transfer = "tables with transfer scores, or none (default: 3,5)"
    add("--transfer", type=numbers, default="3,5", metavar="N,...", help=transfer)
    generators = "rows of Table 6: masked language models"
    add("--generators", type=lambda text: text.split(","), metavar="MODEL,...", help=generators)
    add("--out", type=Path, default="runs/tables", metavar="DIR", help="(default: runs/tables)")
    add("--jobs", type=positive_int, default=1, metavar="N", help="runs at a time (default: 1)")
    return parser.parse_known_args()


def check(sweep: Sweep, tables: dict[str, Table]) -> None:
    """Find mistakes before the first run. Raises: UserError."""
    for number, table in tables.items():
        for row in table.rows:
            cfg = parse_words(sweep.words(row.flags, 0, table.score))
            if number == "6" and cfg.lam > 0:
                try:
                    load_generator(cfg, Tokenizer(find_model(cfg.model)))
                except (UserError, ModelError) as error:
                    hint = "--generators names others; RESULTS.md says how ours were made"
                    raise UserError(f"Table 6: {error}. {hint}") from None


def main() -> None:
    args, more = parse_args()
    if SEARCH_SEED in args.seeds:
        raise UserError(f"--seeds: {SEARCH_SEED} is the seed of the search; use others")
    is_small = PRESETS[args.config].model == SMALL
    generators = args.generators or (SMALL_GENERATORS if is_small else list(GENERATORS))
    tables = tables_of(args.config, generators)
    scored = [row.flags for number in args.transfer for row in tables[number].rows]
    tables = {number: tables[number] for number in args.table}
    deadline = time.monotonic() + 60 * args.budget
    sweep = Sweep(args.out, args.config, more, args.jobs, deadline)
    check(sweep, tables)
    if args.jobs > 1:  # the runs share the cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_tables(sweep, tables, args.seeds, scored)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues, and nothing is lost", file=sys.stderr)
        sys.exit(130)
    command, missing = shlex.join(["python", "-m", "lab.reproduce", *sys.argv[1:]]), 0
    for number, table in tables.items():
        saved = to_json(number, args.config, table, command)
        file = args.out / f"table_{number}_{args.config}.json"
        write_atomically(file, json.dumps(saved, indent=1) + "\n")
        print("\n" + render(saved))
        missing += sum(len(args.seeds) - len(row.runs) for row in table.rows)
    write_readme(args.out)
    if missing:
        print(f"The budget left out {missing} runs; the same command continues.")


if __name__ == "__main__":
    run_main(main)
