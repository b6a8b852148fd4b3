"""The paper's tables, on a model that a laptop can train: every row some flags of diffcse.py, over several seeds.

    python -m lab.reproduce --table 1 --seeds 0,1,2,3,4 --data DIR --amp bf16

--table, --config, --seeds, --jobs and --out are its own flags; every other one is diffcse.py's and goes to all runs.

For each row the fields of its grid are chosen first, one after the other, by STS-B dev alone (--score dev) and with a seed
of their own, 100; every row gets the same search. Then the row is run with the seeds asked for. Each run is an ordinary one
of diffcse.py, whose command is printed; what has been run is not run again, so a stopped table goes on where it was.
Left under --out: config.json, log.jsonl and results.json of every run, chosen.json, and the table as Markdown.

Reference: paper Table 1; appendix A for the search. Not here: Tables 2 to 15.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from bert import UserError, read_json, write_atomically
from data import run_main
from diffcse import PRESETS, load_preset, parse_args
from eval_sts import TEST_SETS

ROOT = Path(__file__).parent.parent
SEARCH_SEED = 100


@dataclass
class Row:
    name: str
    flags: dict[str, object] = field(default_factory=dict)  # what differs from the preset
    grid: tuple[str, ...] = ()  # which fields of GRID it is searched over
    paper: tuple[float, ...] = ()  # the paper's bert-base in the same row: STS-B dev (Table 3), then Table 1's columns


GRID = {"lr": (1e-4, 3e-4, 1e-3), "lam": (0.005, 0.05, 0.5), "mask_ratio": (0.15, 0.30)}
BASELINE = "SimCSE with BatchNorm"
TABLE_1 = [
    Row("SimCSE (tanh)", {"lam": 0.0, "projector": "tanh"}, ("lr",), (81.47, 68.40, 82.41, 74.38, 80.91, 78.56, 76.85, 72.23, 76.25)),
    Row(BASELINE, {"lam": 0.0}, ("lr",), (82.22,)),
    Row("DiffCSE, published", {}, ("lr", "lam", "mask_ratio"), (84.56, 72.28, 84.43, 76.47, 83.90, 80.54, 80.59, 71.23, 78.49)),
    Row("DiffCSE, the paper's reading",
        {"edit": "sample", "edit_scope": "masked", "pads_in_loss": "off", "generator_dropout": "off"}, ("lr", "lam", "mask_ratio")),
]  # fmt: skip
COLUMNS = ("STSB-dev", *TEST_SETS, "average")
FIRST_LAST = ("", 39.70, 59.38, 49.67, 66.03, 66.19, 53.87, 62.06, 56.70)


def run(flags: dict[str, object], folder: Path, config: str, more: list[str]) -> dict:
    """One run of diffcse.py, or what is left of it from before; its results.json. Raises: UserError."""
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = ["--config", config, *words, *more]
    wanted = asdict(parse_args(words)[1])
    if (folder / "results.json").is_file():
        if asdict(load_preset(str(folder / "config.json"))) != wanted:  # fields that came later are as they were then: at their defaults
            raise UserError(f"{folder} holds a run with other settings: name another --out, or delete that folder")
        return read_json(folder / "results.json")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    print("python diffcse.py " + " ".join(words) + "\n", end="", flush=True)  # in one piece: rows may run beside each other
    done = subprocess.run([sys.executable, "diffcse.py", *words, "--out-dir", os.path.relpath(folder, ROOT)], cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"that run ended with exit code {done.returncode}; the same command goes on with the table from there")
    shutil.rmtree(folder / "best")  # a table needs the numbers, not fifty models
    return read_json(folder / "results.json")


def search(row: Row, out: Path, config: str, more: list[str]) -> dict[str, object]:
    """The row's flags with the values of its grid that are best on STS-B dev, with the search's own seed."""
    chosen = dict(row.flags)
    for name in row.grid:
        scores = {}
        for value in GRID[name]:
            flags = chosen | {name: value}
            values = "_".join(f"{field}={flags.get(field, getattr(PRESETS[config], field)):g}" for field in row.grid)
            scores[value] = run(flags | {"seed": SEARCH_SEED, "score": "dev"}, out / slug(row) / "search" / values, config, more)["dev_best"]
        best = max(scores, key=scores.get)
        print(f"{row.name}: {name} " + ", ".join(f"{value:g}: {score:.2f}" for value, score in scores.items()) + f" -> {best:g}\n", end="", flush=True)
        chosen[name] = best
    return chosen


def slug(row: Row) -> str:
    return "".join(c if c.isalnum() else "_" for c in row.name.lower()).strip("_")


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; where all seeds agree, the number alone."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values):.2f}" if np.ptp(values) > 0 else "")


def line(name: str, columns: list[str]) -> str:
    return f"| {name} | " + " | ".join(columns + [""] * (len(COLUMNS) - len(columns))) + " |"


def table_1(out: Path, config: str, more: list[str], seeds: list[int], jobs: int = 1) -> str:
    """Table 1: Spearman x 100 on STS-B dev, which chose, and on the seven STS sets. Runs what is missing."""

    def results_of(row: Row) -> list[dict]:
        flags = search(row, out, config, more)
        write_atomically(out / slug(row) / "chosen.json", json.dumps(flags, indent=2) + "\n")
        return [run(flags | {"seed": seed}, out / slug(row) / f"seed{seed}", config, more) for seed in seeds]

    pool = ThreadPoolExecutor(jobs)  # the runs are processes; a thread only waits for those of its row
    try:
        results = dict(zip([row.name for row in TABLE_1], pool.map(results_of, TABLE_1)))
    finally:
        pool.shutdown(cancel_futures=True)  # after a mistake or Ctrl-C no further row begins

    def ours(name: str, key: str) -> list[list[float]]:
        return [[result[key][column] for result in results[name]] for column in COLUMNS]

    def paper(values: tuple[float | str, ...]) -> str:
        return line("*the paper's bert-base*", [f"*{value:.2f}*" if value else "" for value in values])

    lines = [line("", [*COLUMNS[:-1], "Avg."]), "|---" * (len(COLUMNS) + 1) + "|"]
    shown = [("first-last average, before", TABLE_1[0].name, "before_first_last", FIRST_LAST),  # before: the same in every run
             ("[CLS], before", TABLE_1[0].name, "before", ()), *((row.name, row.name, "after", row.paper) for row in TABLE_1)]  # fmt: skip
    for label, name, key, published in shown:
        lines.append(line(label, [spread(values) for values in ours(name, key)]))
        lines += [paper(published)] * bool(published)
    lines += ["", "Seed by seed, mean ± standard deviation of the difference:", "", line("", [*COLUMNS[:-1], "Avg."]), lines[1]]
    for row in TABLE_1[1:]:  # against the start; DiffCSE against its fair baseline
        pairs = [("[CLS], before", ours(row.name, "before"))]
        if row.flags.get("lam") != 0:
            pairs.append((BASELINE, ours(BASELINE, "after")))
        for label, theirs in pairs:
            differences = [np.subtract(a, b).tolist() for a, b in zip(ours(row.name, "after"), theirs)]
            lines.append(line(f"{row.name} minus {label}", [f"{np.mean(d):+.2f} ± {np.std(d):.2f}" for d in differences]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.reproduce", description=__doc__.split("\n\n")[0],
                                     epilog="Every other flag is one of diffcse.py and goes to all runs.", allow_abbrev=False)  # fmt: skip
    parser.add_argument("--table", choices=["1"], required=True)
    parser.add_argument("--config", choices=PRESETS, default="small", help="preset of diffcse.py that the rows change (default: small)")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="(default: 0,1,2,3,4)")
    parser.add_argument("--out", default="results/tables", metavar="DIR", help="(default: results/tables)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at a time, each with its share of the cores (default: 1)")
    args, more = parser.parse_known_args()
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}: it must be at least 1")
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))  # the runs inherit it
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds is {args.seeds!r}: it must be whole numbers with commas between, as 0,1,2") from None
    if SEARCH_SEED in seeds:
        raise UserError(f"--seeds: {SEARCH_SEED} is the seed of the search; take others")
    out = Path(args.out) / args.table / args.config
    parse_args(["--config", args.config, *more])  # mistakes are told before the first run
    text = table_1(out, args.config, more, seeds, args.jobs)
    write_atomically(out / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_main(main)
