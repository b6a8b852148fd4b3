"""Plots of what is under results/, as PNG and SVG. Needs matplotlib (pip install matplotlib), which nothing else here does.

    python -m lab.plots pretraining --out results/pretrain/held_out
    python -m lab.plots table1 --out results/tables/1/small/dev
"""

import argparse
import json
from pathlib import Path

import numpy as np

from bert import UserError
from data import read_lines, run_main
from lab.reproduce import TABLE_1, slug

RESULTS = Path(__file__).parent.parent / "results"
WIDTH = 3.3  # inches: a column of a two-column paper


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in read_lines(path)]


def figure(rows: int = 1, height: float = 2.2):
    """An empty figure of one column's width, readable in greyscale: lines differ by dashes, not by colour alone."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "diffcse",
                        "axes.grid": True, "grid.color": "0.9", "legend.frameon": False}  # fmt: skip
    return pyplot.subplots(rows, 1, figsize=(WIDTH, height * rows), sharex=True, layout="constrained")


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


def table1(out: str) -> None:
    """STS-B dev against steps for every row of Table 1 on the small model: mean over the seeds, and their spread as a band."""
    fig, axis = figure(height=3)
    folder = RESULTS / "tables/1/small"
    runs = {row.name: [read_log(path) for path in sorted((folder / slug(row)).glob("seed*/log.jsonl"))] for row in TABLE_1}
    runs = {name: logs for name, logs in runs.items() if logs}
    if not runs:
        raise UserError(f"{folder} holds no runs: python -m lab.reproduce --table 1 makes them")
    for (name, logs), dashes in zip(runs.items(), ((1, 0), (4, 2), (1, 1), (4, 1, 1, 1))):
        steps = [entry["step"] for entry in logs[0] if "score" in entry]
        scores = np.array([[entry["score"] for entry in log if "score" in entry] for log in logs])  # (seeds, scores)
        (drawn,) = axis.plot(steps, scores.mean(0), dashes=dashes, label=name)
        axis.fill_between(steps, scores.mean(0) - scores.std(0), scores.mean(0) + scores.std(0), color=drawn.get_color(), alpha=0.15, lw=0)
    axis.set(xlabel="steps", ylabel="STS-B dev, Spearman x 100")
    fig.legend(loc="outside lower center")  # nowhere inside is free of lines
    save(fig, out)


def main() -> None:
    plots = {"pretraining": pretraining, "table1": table1}
    parser = argparse.ArgumentParser(prog="lab.plots", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("plot", choices=plots)
    parser.add_argument("--out", required=True, metavar="FILE", help="without an ending: .png and .svg are written")
    args = parser.parse_args()
    plots[args.plot](args.out)


if __name__ == "__main__":
    run_main(main)
