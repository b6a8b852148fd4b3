"""Plots of runs, as PNG and SVG. Needs matplotlib (pip install matplotlib), which nothing else here does.

    python -m lab.plots pretraining --out results/pretrain/held_out
    python -m lab.plots steps RUN... --out runs/steps
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from bert import UserError
from data import read_lines, run_main

RESULTS = Path(__file__).parent.parent / "results"
WIDTH = 3.3  # inches: a column of a two-column paper


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in read_lines(path)]


def load_pyplot():
    """matplotlib.pyplot with our settings. Raises: UserError where it is not installed; so call it before the work."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "diffcse",
                        "axes.grid": True, "grid.color": "0.9", "legend.frameon": False}  # fmt: skip
    return pyplot


def figure(rows: int = 1, height: float = 2.2, columns: int = 1):
    """An empty figure of one column's width, readable in greyscale: lines differ by dashes, not by colour alone."""
    return load_pyplot().subplots(rows, columns, figsize=(WIDTH, height * rows), sharex=True, sharey=columns > 1, layout="constrained")


def save(fig, out: str) -> None:
    for suffix in ("png", "svg"):
        path = Path(out).with_suffix("." + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=200, metadata={"Date": None} if suffix == "svg" else None)
        print(path)


def pretraining(out: str) -> None:
    """Held-out loss and accuracy a word against tokens seen, with the models they are compared with as lines."""
    log, others = read_log(RESULTS / "pretrain" / "log.jsonl"), read_log(RESULTS / "pretrain" / "held_out.jsonl")
    fig, axes = figure(rows=2)
    tokens = [row["tokens"] / 1e6 for row in log]
    for axis, name, label, scale in zip(axes, ("loss", "accuracy"), ("held-out loss, nats a word", "held-out words right, %"), (1, 100)):
        axis.plot(tokens, [scale * row[name] for row in log], color="black", label="assets/small-bert")
        for other, dashes in zip([row for row in others if row["model"] != "assets/small-bert"], ((4, 2), (1, 1), (4, 1, 1, 1))):
            axis.axhline(scale * other[name], color="0.4", dashes=dashes, label=other["model"])
        axis.set_ylabel(label)
    axes[0].legend()
    axes[1].set_xlabel("tokens seen, millions")
    save(fig, out)


def steps(out: str, folders: list[str], labels: list[str] | None = None) -> None:
    """The development score against steps, a line for each folder: a run's, or one of several seeds' runs, with their spread as a band.

    Raises: UserError where a folder holds no run, or its runs were scored at different steps.
    """
    if labels and len(labels) != len(folders):
        raise UserError(f"--labels: {len(labels)} for {len(folders)} folders")
    lines = {}
    for folder, label in zip(map(Path, folders), labels or [Path(folder).name for folder in folders]):
        logs = [folder / "log.jsonl"] if (folder / "log.jsonl").is_file() else sorted(folder.glob("seed*/log.jsonl"))
        curves = [[(row["step"], row["score"]) for row in read_log(log) if "score" in row] for log in logs]
        if not curves or not all(curves) or len({tuple(step for step, _ in curve) for curve in curves}) != 1:
            raise UserError(f"{folder}: " + ("runs scored at different steps" if curves and all(curves) else "no log.jsonl with scores, nor seed*/log.jsonl"))
        lines[label] = np.array(curves)  # (seeds, scores, 2)
    fig, axis = figure(height=2.2 + 0.2 * len(lines))
    for (label, curves), dashes in zip(lines.items(), itertools.cycle(((1, 0), (4, 2), (1, 1), (4, 1, 1, 1), (6, 1), (2, 3)))):
        at, mean, spread = curves[0, :, 0], curves[:, :, 1].mean(0), curves[:, :, 1].std(0)
        (drawn,) = axis.plot(at, mean, dashes=dashes, label=label)
        axis.fill_between(at, mean - spread, mean + spread, color=drawn.get_color(), alpha=0.15, lw=0)
    axis.set(xlabel="steps", ylabel="development score x 100")
    fig.legend(loc="outside lower center")  # nowhere inside is free of lines
    save(fig, out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.plots", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="plot", required=True)
    for name, text in {"pretraining": "held-out loss of the small BERT", "steps": "score against step of several runs"}.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == "steps":
            command.add_argument("folders", metavar="RUN", nargs="+", help="a run's folder, or one that holds seed*/")
            command.add_argument("--labels", nargs="+", metavar="LABEL", help="(default: the folders' names)")
        command.add_argument("--out", required=True, metavar="FILE", help="without an ending: .png and .svg are written")
    args = parser.parse_args()
    if args.plot == "steps":
        steps(args.out, args.folders, args.labels)
    else:
        pretraining(args.out)


if __name__ == "__main__":
    run_main(main)
