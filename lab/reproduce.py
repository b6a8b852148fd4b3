"""The paper's Tables 1, 3 to 8 and 15 over several seeds, beside the paper's figures.

    python -m lab.reproduce --table 3 --seeds 0,1,2 --data DIR --train-file FILE --text paragraphs
    python -m lab.reproduce --table all --budget 3h --seeds 0,1,2 --data DIR ...

A row is a few flags of diffcse.py or lab/ablations.py. Flags that -h does not list go to all runs;
with other ones, use another --out. Runs are ordinary ones, and their commands are printed. Finished
runs are not repeated, even if two tables share them, and interrupted ones are resumed: the same
command continues a sweep. All rows run with the first seed, then with the second, so a budget that
ends early leaves rows with equally many seeds. Rows of Table 1 are searched first, one setting
after the other, by STS-B dev with seed 100.

Files below --out: README.md, the tables beside the paper's figures; table_N_CONFIG.json, every
number with its seed, command and machine; the runs, without their models.
Not here: Table 2 (lab/transfer.py), Tables 9 to 11 (lab/analysis.py).
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from bert import read_json
from data import Tokenizer
from diffcse import PRESETS, Config
from engine.cli import Parser, comma_list, flag, make_parser, parse, positive_int
from engine.errors import UserError, run_main, write_atomically
from engine.hub import find_model
from engine.pretrained import load_generator
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
    runs: list[dict] = field(default_factory=list, init=False)  # scores, seed, command, ...


@dataclass
class Table:
    title: str
    rows: list[Row]
    references: tuple[str, ...]  # all other rows are compared with these, and with SAME_RECIPE
    columns: tuple[str, ...] = ("STSB-dev", "transfer-dev")
    score: str = "dev"  # dev: the test sets are never loaded


SIMCSE = {"recipe": "simcse", "lam": 0.0, "projector": "tanh"}  # `resolve` adds the rest
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
OWN_RECIPE = Row("SimCSE", SIMCSE, (81.47, 83.91))
NEXT, BOTH, MASKED = {"condition_on": "next"}, {"condition_on": "both"}, {"objective": "masked"}
TABLE_3 = [
    SAME_RECIPE,
    OWN_RECIPE,
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
    SAME_RECIPE,
    Row("DiffCSE with BatchNorm", {}, (84.56, 85.95)),
    Row("DiffCSE without", {"projector": "tanh"}, (83.23, 85.24)),
    Row("SimCSE with BatchNorm", BATCHNORM, (82.22, 85.66)),
    Row("SimCSE without", SIMCSE, (81.47, 83.91)),
]
TABLE_6 = [SAME_RECIPE, OWN_RECIPE]  # and a row for each generator
RATIOS = {0.15: 84.48, 0.20: 84.04, 0.25: 84.49, 0.30: 84.56, 0.40: 84.48, 0.50: 83.91}
TABLE_7 = [Row(f"{ratio:.0%}", {"mask_ratio": ratio}, (dev,)) for ratio, dev in RATIOS.items()]
LAMBDAS = {0.0: 82.22, 0.0001: 83.90, 0.0005: 84.40, 0.001: 84.24}
LAMBDAS |= {0.005: 84.56, 0.01: 83.44, 0.05: 84.11, 0.1: 83.66}
TABLE_8 = [Row(f"{lam:g}", {"lam": lam}, (dev,)) for lam, dev in LAMBDAS.items()]
POSITIVE = SIMCSE | {"edit_as": "positive", "lam": 1.0}
NEGATIVE = SIMCSE | {"edit_as": "negative", "lam": 1.0}
TABLE_15 = [
    SAME_RECIPE,
    OWN_RECIPE,
    Row("one more positive: MLM 15 %", POSITIVE | REPLACE, (73.59, 83.33)),
    Row("one more positive: insert 15 %", POSITIVE | INSERT, (80.39, 83.92)),
    Row("one more positive: delete 15 %", POSITIVE | DELETE, (78.58, 81.80)),
    Row("one more negative: MLM 15 %", NEGATIVE | REPLACE, (83.02, 84.49)),
    Row("one more negative: insert 15 %", NEGATIVE | INSERT, (55.65, 79.86)),
    Row("one more negative: delete 15 %", NEGATIVE | DELETE, (55.13, 82.56)),
    *TABLE_4[1:4],
]
BASELINES = ("[CLS], before", "SimCSE with BatchNorm")
STS = ("STSB-dev", *TEST_SETS, "average")
OWN_GENERATORS = ("distilbert-base-uncased", "distilroberta-base", "assets/small-bert")  # presets'
TABLES = {
    "1": Table("the seven STS sets", TABLE_1, BASELINES, STS, "stsb"),
    "3": Table("what is predicted, and given which sentence", TABLE_3, ("DiffCSE",)),
    "4": Table("how a sentence is edited", TABLE_4, ("DiffCSE: MLM 15 %",)),
    "5": Table("the projector", TABLE_5, ("DiffCSE with BatchNorm", "SimCSE without")),
    "6": Table("the generator", TABLE_6, OWN_GENERATORS),
    "7": Table("the mask ratio", [SAME_RECIPE, *TABLE_7], ("30%",)),
    "8": Table("lambda", TABLE_8, ("0", "0.005")),
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
SMALL = PRESETS["small"].model
SMALL_GENERATORS = ["runs/generator-weak", "runs/generator-medium", SMALL, "runs/generator-strong"]

SEARCH_SEED = 100
GRID = {  # appendix A, and the rate of SimCSE
    "lr": (2e-6, 3e-6, 5e-6, 7e-6, 1e-5, 3e-5),
    "lam": (0.1, 0.05, 0.01, 0.005, 0.001),
    "mask_ratio": (0.15, 0.20, 0.30, 0.40),
}
SMALL_GRID = {"lr": (1e-4, 3e-4, 1e-3), "lam": (0.005, 0.05, 0.5), "mask_ratio": (0.30, 0.15)}
RECIPES = {  # of SimCSE, besides lam and projector
    "bert-base-uncased": {"lr": 3e-5, "epochs": 1},
    "roberta-base": {"lr": 1e-5, "epochs": 1, "batch_size": 512},
    SMALL: {"lr": 1e-4},
}


def resolve(flags: Flags, config: str) -> Flags:
    """SimCSE's recipe is written out, and the preset's own values are left out.

    Flags name a run, so equal runs need equal flags.
    """
    preset = PRESETS[config]
    if "recipe" in flags:
        flags = RECIPES[preset.model] | {n: v for n, v in flags.items() if n != "recipe"}
    return {n: v for n, v in flags.items() if v != getattr(preset, n, None)}


def tables_of(config: str, generators: list[str]) -> dict[str, Table]:
    """TABLES with the flags of a preset, and with these generators in Table 6."""
    tables, more = {}, [Row(g, {"generator": g}, GENERATORS.get(g, ())) for g in generators]
    for number, table in TABLES.items():
        rows = table.rows + more * (number == "6")
        rows = [replace(row, flags=resolve(row.flags, config)) for row in rows]
        tables[number] = replace(table, rows=rows)
    return tables


# ------------------------------------------------------------------------------------------------
# The runs

PARSER = make_parser(AblationConfig, PRESETS)


def parse_words(words: list[str]) -> AblationConfig:
    return parse(AblationConfig, PRESETS, words, PARSER)[1]


@dataclass
class Sweep:
    """Runs of a preset, until no time is left."""

    out: Path
    config: str
    more: list[str]  # flags of all runs
    transfer: bool = False
    jobs: int = 1
    deadline: float = math.inf  # by time.monotonic()
    longest: float = 0.0  # minutes of the longest run

    def execute(self, program: list[str], words: list[str]) -> None:
        """Print and run a command. Raises: UserError if it fails."""
        command = [*program, *words]
        print(f"python {shlex.join(command)}\n", end="", flush=True)  # one write: threads
        ended = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if ended.returncode:
            self.deadline = -math.inf  # no other run starts
            error = ended.stderr.rstrip().rpartition("\n")[2].removeprefix("error: ")
            code = f"exit code {ended.returncode}; after fixing this, the same command continues"
            raise UserError(f"{program[-1]}: {error} ({code})")

    def words(self, flags: Flags, seed: int, score: str) -> list[str]:
        words = ["--config", self.config]
        for name, value in flags.items():
            words += [flag(name), str(value)]
        return [*words, *self.more, "--score", score, "--seed", str(seed)]

    def folder(self, flags: Flags, seed: int, score: str) -> Path:
        name = ",".join(f"{name}={value}" for name, value in sorted(flags.items()))
        return self.out / self.config / score / (name.replace("/", "-") or "preset") / f"seed{seed}"

    def run(self, flags: Flags, seed: int, score: str) -> dict | None:
        """Results of a run, which is started or resumed if necessary. None: no time is left."""
        folder, words = self.folder(flags, seed, score), self.words(flags, seed, score)
        best, results, transfer = (folder / f for f in ("best", "results.json", "transfer.json"))
        started, exists = time.monotonic(), (folder / "config.json").is_file()
        cfg = parse_words(words + ["--resume", str(folder)] * exists)  # refuses other settings
        with_transfer = self.transfer and score == "dev" and seed != SEARCH_SEED
        if not results.is_file() or (with_transfer and not transfer.is_file()):
            if started + 60 * self.longest > self.deadline:
                return None
            if not exists or (results.is_file() and not best.is_dir()):  # its model is needed again
                shutil.rmtree(folder, ignore_errors=True)
                exists = False
            if not results.is_file():
                plain = AblationConfig(**{f.name: getattr(cfg, f.name) for f in fields(Config)})
                program = ["diffcse.py"] if cfg == plain else ["-m", "lab.ablations"]
                self.execute(program, [*words, "--resume" if exists else "--out-dir", str(folder)])
            if with_transfer:
                words = [str(best), "--mode", "fast", "--json", str(transfer), "--data", cfg.data]
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
            chosen = options[int(np.argmax(scores))]
            text = ", ".join(f"{value:g}: {score:.2f}" for value, score in zip(grid[name], scores))
            print(f"{row.name}: {name} {text}\n", end="", flush=True)
        return chosen


def run_tables(sweep: Sweep, tables: dict[str, Table], seeds: list[int]) -> None:
    """Give each row its runs, and its flags if they are searched (None: no time was left)."""
    rows = [(table, row) for table in tables.values() for row in table.rows]
    with ThreadPoolExecutor(sweep.jobs) as pool:  # a thread only waits for its process
        searches = {str((row.flags, row.search)): row for _, row in rows}  # rows share searches
        found = dict(zip(searches, pool.map(sweep.search, searches.values())))
        for _, row in rows:
            row.flags = found[str((row.flags, row.search))]
        rows = [(table, row) for table, row in rows if row.flags is not None]
        runs = [(row, (row.flags, seed, table.score)) for seed in seeds for table, row in rows]
        shared = {sweep.folder(*run): run for _, run in runs}
        done = sum((folder / "results.json").is_file() for folder in shared)
        print(f"{len(shared)} runs, {done} of them done", flush=True)
        results = dict(zip(shared, pool.map(lambda run: sweep.run(*run), shared.values())))
    names = ("seed", "best_step", "precision", "minutes", "command", "machine")
    for row, run in runs:
        if result := results[sweep.folder(*run)]:
            row.runs.append(result[row.scores] | {name: result[name] for name in names})


# ------------------------------------------------------------------------------------------------
# The report

NOTE = """# Tables

Written by `lab/reproduce.py` from `table_*.json`, which have every run's numbers, seed, command and
machine. Ours are mean ± standard deviation over the seeds, the paper's figures in brackets are of
one run of bert-base each. A difference of the paper *holds* if every seed has its sign and the mean
exceeds the standard deviation of both rows and of the difference itself. It is *the other way
round* if the same is true with the opposite sign. RESULTS.md discusses the tables.
"""
Cell = tuple[dict[int, float], float | None]  # a score for each seed; the paper's


def spread(cell: Cell) -> str:
    """Mean ± standard deviation, or one number if all seeds agree, and the paper's figure."""
    values, figure = list(cell[0].values()), cell[1]
    text = f"{np.mean(values):.2f}" if values else "-"
    text += f" ± {np.std(values):.2f}" if len(set(values)) > 1 else ""
    return text + (f" ({figure:.2f})" if figure else "")


def verdict(cell: Cell, reference: Cell) -> str:
    """Cell minus reference, against the spread of both over the seeds, and of the difference."""
    (ours, figure), (others, other_figure) = cell, reference
    seeds = [seed for seed in ours if seed in others]
    if not seeds:
        return ""
    values = np.array([[scores[seed] for seed in seeds] for scores in (ours, others)])
    difference = values[0] - values[1]
    mean, std = difference.mean(), difference.std()
    text = f"{mean:+.2f}" + f" ± {std:.2f}" * (len(seeds) > 1)
    if None in (figure, other_figure):
        return text
    paper = figure - other_figure
    if len(seeds) == 1:
        result = "one seed, inconclusive"
    elif abs(mean) <= max(std, *values.std(1)) or len(set(np.sign(difference))) > 1:
        result = "within the seeds' spread"
    else:
        result = "holds" if mean * paper > 0 else "the other way round"
    return f"{text} ({paper:+.2f}): {result}"


def render(saved: dict) -> str:
    """Markdown of a table's JSON: its rows, then their differences from the reference rows."""
    number, rows, columns = saved["table"], saved["rows"], saved["columns"]
    columns = [c for c in columns if all(c in run for row in rows for run in row["runs"])]
    cells = {}  # of each row, by column
    for row in rows:
        paper = dict(zip(saved["columns"], row["paper"]))
        scores = {c: {run["seed"]: run[c] for run in row["runs"]} for c in columns}
        cells[row["name"]] = {c: (scores[c], paper.get(c)) for c in columns}
    lines = [[r["name"], *map(spread, cells[r["name"]].values()), len(r["runs"])] for r in rows]
    references = [n for n in (SAME_RECIPE.name, *TABLES[number].references) if n in cells]
    differences = []
    for i, reference in enumerate(references):
        for name in [name for name in cells if name not in references[: i + 1]]:
            verdicts = [verdict(cells[name][c], cells[reference][c]) for c in columns]
            differences += [[f"{name} − {reference}", *verdicts]] * any(verdicts)
    title = f"## Table {number}: {saved['title']} (`{saved['config']}`)"
    parts = [title, f"    {saved['command']}", format_table(["", *columns, "seeds"], lines)]
    if differences:
        parts.append(format_table(["difference, seed by seed", *columns], differences))
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
    return comma_list(list(TABLES))("3,4,5,6,7,8,15" if text == "all" else text)


def main() -> None:
    description = __doc__.split("\n")[0]
    parser = Parser("python -m lab.reproduce", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--table", required=True, type=numbers, metavar="N,...", help="or all (all but 1)")
    add("--config", choices=PRESETS, default="small", help="preset of the rows (default: small)")
    add("--seeds", type=integers, default="0,1,2", metavar="N,...", help="(default: 0,1,2)")
    budget = "such as 3h or 90m: start no run that would exceed it"
    add("--budget", type=minutes, default=math.inf, metavar="TIME", help=budget)
    transfer = "also score development items of the seven tasks, as the published code does"
    add("--transfer", action="store_true", help=transfer)
    generators = "rows of Table 6: masked language models"
    add("--generators", type=lambda text: text.split(","), metavar="MODEL,...", help=generators)
    add("--out", type=Path, default="runs/tables", metavar="DIR", help="(default: runs/tables)")
    add("--jobs", type=positive_int, default=1, metavar="N", help="runs at a time (default: 1)")
    args, more = parser.parse_known_args()

    if SEARCH_SEED in args.seeds:
        raise UserError(f"--seeds: {SEARCH_SEED} is the seed of the search; use others")
    own = SMALL_GENERATORS if PRESETS[args.config].model == SMALL else list(GENERATORS)
    tables = tables_of(args.config, args.generators or own)
    tables = {number: tables[number] for number in args.table}
    deadline = time.monotonic() + 60 * args.budget
    sweep = Sweep(args.out, args.config, more, args.transfer, args.jobs, deadline)
    for number, table in tables.items():  # find mistakes before the first run
        for row in table.rows:
            cfg = parse_words(sweep.words(row.flags, 0, table.score))
            if number == "6" and cfg.lam > 0:
                load_generator(cfg, Tokenizer(find_model(cfg.model)))
    if args.jobs > 1:  # the runs share the cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    run_tables(sweep, tables, args.seeds)
    command, missing = shlex.join(["python", "-m", "lab.reproduce", *sys.argv[1:]]), 0
    for number, table in tables.items():
        saved = {"table": number, "config": args.config, "command": command, **asdict(table)}
        file = args.out / f"table_{number}_{args.config}.json"
        write_atomically(file, json.dumps(saved, indent=1) + "\n")
        print("\n" + render(saved))
        missing += sum(len(args.seeds) - len(row.runs) for row in table.rows)
    write_readme(args.out)
    if missing:
        print(f"The budget left out {missing} runs; the same command continues.")


if __name__ == "__main__":
    run_main(main)
