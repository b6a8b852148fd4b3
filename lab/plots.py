"""Plots of runs, as PNG and SVG. Needs matplotlib (pip install matplotlib).

python -m lab.plots pretraining --out results/pretrain/held_out
python -m lab.plots steps RUN... --out runs/steps
"""

import itertools
import json
from pathlib import Path

import numpy as np

from data import read_lines
from engine.cli import Parser
from engine.errors import UserError, run_main

RESULTS = Path(__file__).parent.parent / "results"
WIDTH = 3.3  # inches: a column of a two-column paper
DASHES = ((1, 0), (4, 2), (1, 1), (4, 1, 1, 1), (6, 1), (2, 3))  # lines differ without colour


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in read_lines(path)]


def load_pyplot():
    """matplotlib.pyplot with our settings. Raises: UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"font.size": 8, "axes.grid": True, "grid.color": "0.9"}
    pyplot.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    pyplot.rcParams |= {"legend.frameon": False, "svg.hashsalt": "diffcse"}
    return pyplot


def figure(rows: int = 1, height: float = 2.2, columns: int = 1):
    """An empty figure of one column's width."""
    size, shared = (WIDTH, height * rows), {"sharex": True, "sharey": columns > 1}
    return load_pyplot().subplots(rows, columns, figsize=size, layout="constrained", **shared)


def save(fig, out: str) -> None:
    for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
        path = Path(out).with_suffix(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=200, metadata=metadata)
        print(path)


def pretraining(out: str) -> None:
    """Held-out loss and accuracy per word against tokens seen, with other models as lines."""
    log = read_log(RESULTS / "pretrain" / "log.jsonl")
    models = read_log(RESULTS / "pretrain" / "held_out.jsonl")
    others = [row for row in models if row["model"] != "assets/small-bert"]
    fig, axes = figure(rows=2)
    tokens = [row["tokens"] / 1e6 for row in log]
    labels = ("held-out loss, nats per word", "held-out accuracy, %")
    for axis, name, label, scale in zip(axes, ("loss", "accuracy"), labels, (1, 100)):
        values = [scale * row[name] for row in log]
        axis.plot(tokens, values, color="black", label="assets/small-bert")
        for other, dashes in zip(others, DASHES[1:]):
            axis.axhline(scale * other[name], color="0.4", dashes=dashes, label=other["model"])
        axis.set_ylabel(label)
    axes[0].legend()
    axes[1].set_xlabel("tokens seen, millions")
    save(fig, out)


def read_curves(folder: Path) -> np.ndarray:
    """(step, score) of a run, or of the runs in its folders seed*. Shapes: -> (runs, scores, 2).

    Raises: UserError if the folder has no run, or runs that were scored at different steps.
    """
    log = folder / "log.jsonl"
    logs = [log] if log.is_file() else sorted(folder.glob("seed*/log.jsonl"))
    curves = [[(r["step"], r["score"]) for r in read_log(log) if "score" in r] for log in logs]
    if not curves or not all(curves):
        raise UserError(f"{folder}: no log.jsonl with scores, nor seed*/log.jsonl")
    if len({tuple(step for step, _ in curve) for curve in curves}) > 1:
        raise UserError(f"{folder}: its runs were scored at different steps")
    return np.array(curves)


def steps(out: str, folders: list[str], labels: list[str] | None = None) -> None:
    """The development score against steps: for each folder the mean of its runs, and a band of one
    standard deviation."""
    labels = labels or [Path(folder).name for folder in folders]
    if len(labels) != len(folders):
        raise UserError(f"--labels: {len(labels)} labels for {len(folders)} folders")
    curves = [read_curves(Path(folder)) for folder in folders]
    fig, axis = figure(height=2.2 + 0.2 * len(curves))
    for label, runs, dashes in zip(labels, curves, itertools.cycle(DASHES)):
        x, mean, std = runs[0, :, 0], runs[:, :, 1].mean(0), runs[:, :, 1].std(0)
        (line,) = axis.plot(x, mean, dashes=dashes, label=label)
        axis.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.15, lw=0)
    axis.set(xlabel="steps", ylabel="development score x 100")
    fig.legend(loc="outside lower center")
    save(fig, out)


def main() -> None:
    parser = Parser(prog="python -m lab.plots", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="plot", required=True, metavar="PLOT")
    out = {"required": True, "metavar": "FILE", "help": "without suffix: .png and .svg are written"}
    text = "held-out loss of the small BERT"
    commands.add_parser("pretraining", help=text, description=text).add_argument("--out", **out)
    text = "score against step of several runs"
    sub = commands.add_parser("steps", help=text, description=text)
    sub.add_argument("folders", metavar="RUN", nargs="+", help="a run, or a folder with seed*/")
    sub.add_argument("--labels", nargs="+", metavar="LABEL", help="(default: the folders' names)")
    sub.add_argument("--out", **out)
    args = parser.parse_args()
    if args.plot == "steps":
        steps(args.out, args.folders, args.labels)
    else:
        pretraining(args.out)


if __name__ == "__main__":
    run_main(main)
