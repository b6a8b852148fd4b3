"""The paper's tables, on a model that a laptop can train: every row some flags of diffcse.py, over several seeds.

    python -m lab.reproduce --table 1 --seeds 0,1,2,3,4 --data DIR --amp bf16

--table, --config, --seeds and --out are its own flags; every other one is diffcse.py's and goes to all runs.

For each row the fields of its grid are chosen first, one after the other, by STS-B dev alone (--score dev) and with a seed
of their own, 100; every row gets the same search. Then the row is run with the seeds asked for. Each run is an ordinary one
of diffcse.py, whose command is printed; what has been run is not run again, so a stopped table goes on where it was.
Left under --out: config.json, log.jsonl and results.json of every run, chosen.json, and the table as Markdown.

Reference: paper Table 1; appendix A for the search. Not here: Tables 2 to 15.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from bert import UserError, read_json, write_atomically
from data import run_main
from diffcse import PRESETS, parse_args
from eval_sts import TEST_SETS

ROOT = Path(__file__).parent.parent
SEARCH_SEED = 100


@dataclass
class Row:
    name: str
    flags: dict[str, object] = field(default_factory=dict)  # what differs from the preset
    grid: tuple[str, ...] = ()  # which fields of GRID it is searched over
    paper: tuple[float, ...] = ()  # the paper's bert-base in the same row


GRID = {"lr": (3e-5, 1e-4, 3e-4), "lam": (0.005, 0.05, 0.5), "mask_ratio": (0.15, 0.30)}
TABLE_1 = [
    Row("SimCSE (tanh)", {"lam": 0.0, "projector": "tanh"}, ("lr",), (68.40, 82.41, 74.38, 80.91, 78.56, 76.85, 72.23, 76.25)),
    Row("SimCSE with BatchNorm", {"lam": 0.0}, ("lr",)),
    Row("DiffCSE, published", {}, ("lr", "lam", "mask_ratio"), (72.28, 84.43, 76.47, 83.90, 80.54, 80.59, 71.23, 78.49)),
    Row("DiffCSE, the paper's reading",
        {"edit": "sample", "edit_scope": "masked", "pads_in_loss": "off", "generator_dropout": "off"}, ("lr", "lam", "mask_ratio")),
]  # fmt: skip
FIRST_LAST = (39.70, 59.38, 49.67, 66.03, 66.19, 53.87, 62.06, 56.70)


def run(flags: dict[str, object], folder: Path, config: str, more: list[str]) -> dict:
    """One run of diffcse.py, or what is left of it from before; its results.json. Raises: UserError."""
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = ["--config", config, *words, *more]
    wanted = asdict(parse_args(words)[1])
    if (folder / "results.json").is_file():
        if read_json(folder / "config.json") != wanted:
            raise UserError(f"{folder} holds a run with other settings: name another --out, or delete that folder")
        return read_json(folder / "results.json")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    print("python diffcse.py " + " ".join(words), flush=True)
    done = subprocess.run([sys.executable, "diffcse.py", *words, "--out-dir", str(folder.absolute())], cwd=ROOT, stdout=subprocess.DEVNULL)
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
        print(f"{row.name}: {name} " + ", ".join(f"{value:g}: {score:.2f}" for value, score in scores.items()) + f" -> {best:g}", flush=True)
        chosen[name] = best
    return chosen


def slug(row: Row) -> str:
    return "".join(c if c.isalnum() else "_" for c in row.name.lower()).strip("_")


def cells(results: list[dict], key: str) -> list[str]:
    """Mean ± standard deviation of each column over the seeds; where all seeds agree, the number alone."""
    columns = [[result[key][name] for result in results] for name in (*TEST_SETS, "average")]
    return [f"{np.mean(c):.2f}" + (f" ± {np.std(c):.2f}" if np.std(c) > 0 else "") for c in columns]


def table_1(out: Path, config: str, more: list[str], seeds: list[int]) -> str:
    """Table 1: Spearman x 100 on the seven STS sets. Runs what is missing."""
    lines = ["| | STS-B dev | " + " | ".join(TEST_SETS) + " | Avg. |", "|---" * 10 + "|"]
    all_results = []
    for row in TABLE_1:
        flags = search(row, out, config, more)
        write_atomically(out / slug(row) / "chosen.json", json.dumps(flags, indent=2) + "\n")
        results = [run(flags | {"seed": seed}, out / slug(row) / f"seed{seed}", config, more) for seed in seeds]
        dev = [result["dev_best"] for result in results]
        line = f"| {row.name} | {np.mean(dev):.2f} ± {np.std(dev):.2f} | " + " | ".join(cells(results, "after")) + " |"
        all_results.append((line, row.paper, results))
    first = all_results[0][2][:1]  # the start is the same for every row and seed
    lines += [f"| first-last average, before | | {' | '.join(cells(first, 'before_first_last'))} |", paper_line(FIRST_LAST)]
    lines += [f"| [CLS], before | {first[0]['dev_before']:.2f} | {' | '.join(cells(first, 'before'))} |"]
    for line, paper, _ in all_results:
        lines += [line] + [paper_line(paper)] * bool(paper)
    return "\n".join(lines)


def paper_line(values: tuple[float, ...]) -> str:
    return "| *the paper's bert-base* | | " + " | ".join(f"*{value:.2f}*" for value in values) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.reproduce", description=__doc__.split("\n\n")[0],
                                     epilog="Every other flag is one of diffcse.py and goes to all runs.", allow_abbrev=False)  # fmt: skip
    parser.add_argument("--table", choices=["1"], required=True)
    parser.add_argument("--config", choices=PRESETS, default="small", help="preset of diffcse.py that the rows change (default: small)")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="(default: 0,1,2,3,4)")
    parser.add_argument("--out", default="results/tables", metavar="DIR", help="(default: results/tables)")
    args, more = parser.parse_known_args()
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds is {args.seeds!r}: it must be whole numbers with commas between, as 0,1,2") from None
    if SEARCH_SEED in seeds:
        raise UserError(f"--seeds: {SEARCH_SEED} is the seed of the search; take others")
    out = Path(args.out) / args.table / args.config
    parse_args(["--config", args.config, *more])  # mistakes are told before the first run
    text = table_1(out, args.config, more, seeds)
    write_atomically(out / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_main(main)
