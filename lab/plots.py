"""Plots in one style, for files and for HTML pages. Needs matplotlib (pip install matplotlib).

    python -m lab.plots runs/small-bert-1 --field held_out_loss --against tokens --out runs/loss
    python -m lab.plots report.json --field h_gap --out runs/h_gap
    python -m lab.plots report.json --field score --against lam --out runs/lam

The first draws a run, the second each group of runs of `lab.report --json`, the third their last
values. A .png and a .svg are written. The functions plot_* take data and return a figure;
lab/analysis.py, lab/report.py and exercises/tour.ipynb use them.

Shapes: P pairs of sentences.
"""

import contextlib
import io
import itertools
import json
import re
import sys
import threading
from html import escape
from pathlib import Path

import numpy as np

from bert import ModelError, read_json
from data import read_lines
from engine.cli import Parser
from engine.errors import UserError, run_main

WIDTH = 3.3  # inches: a column of a two-column paper
COLOURS = "#2a7ab8 #d0600f #17936f #b8529b #8d7416 #d23b52 #7a6fd0 #7f7f7f".split()  # on any page
DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (9, 3), (3, 1, 1, 1), (1, 3), (12, 2, 3, 2))

Panel = tuple[str, np.ndarray, np.ndarray]  # title, cosines (P,), ratings (P,)


def load_pyplot():
    """matplotlib.pyplot with our settings. Raises: UserError if it is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    lines = pyplot.cycler(color=COLOURS, linestyle=[(0, dashes) for dashes in DASHES])
    pyplot.rcParams |= {"font.size": 8, "legend.frameon": False, "axes.prop_cycle": lines}
    pyplot.rcParams |= {"axes.grid": True, "grid.color": "black", "grid.alpha": 0.1}
    pyplot.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "diffcse"}
    return pyplot


def figure(rows: int = 1, columns: int = 1, height: float = 2.2):
    """An empty figure of one column's width, and its axes (rows, columns)."""
    fig = load_pyplot().Figure(figsize=(WIDTH, height * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)


def save(fig, out: str) -> None:
    for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
        path = Path(f"{out}{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=200, metadata=metadata)
        print(path)


def to_svg(fig, description: str) -> str:
    """An <svg> element for an HTML page: black and the font become those of the page's text."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    fig.savefig(file, format="svg", transparent=True, metadata=metadata)
    size, content = re.search(r'viewBox="(.*?)".*?</defs>(.*)', file.getvalue(), re.DOTALL).groups()
    content = re.sub(r' id="[\w.]+_\d+"| font-family: [^;]*;', "", content)  # ids are not unique
    content = content.replace("#000000", "currentColor")
    label = f'role="img" aria-label="{escape(description)}"'
    return f'<svg viewBox="{size}" fill="currentColor" {label}>{content}'


# ------------------------------------------------------------------------------------------------
# Curves of runs


def read_log(path: Path) -> list[dict]:
    """The rows of a .jsonl file. Raises: UserError that names a damaged line."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path} line {number}: not JSON") from None
    return rows


def mean_curve(logs: list[list[dict]], field: str) -> dict[str, list]:
    """Mean and standard deviation of a field at each step, over the runs that logged it there."""
    values = {}  # step -> a number of each run
    for row in itertools.chain(*logs):
        if row.get(field) is not None:
            values.setdefault(row["step"], []).append(row[field])
    curve = {"steps": sorted(values), "mean": [], "std": [], "runs": []}
    for step in curve["steps"]:
        curve["mean"].append(round(float(np.mean(values[step])), 6))
        curve["std"].append(round(float(np.std(values[step])), 6))
        curve["runs"].append(len(values[step]))
    return curve


def plot_curves(labels: list[str], curves: list[dict[str, list]], field: str = ""):
    """A line for each of mean_curve's, with a band of one standard deviation."""
    columns = max(1, 40 // max(map(len, labels)))  # of the legend
    fig, ((axis,),) = figure(height=2.2 + 0.2 * len(curves) / columns)
    for label, curve in zip(labels, curves):
        steps, mean, std = (np.array(curve[name]) for name in ("steps", "mean", "std"))
        (line,) = axis.plot(steps, mean, label=label, marker="." if len(steps) == 1 else "")
        axis.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.15, lw=0)
    axis.set(xlabel="steps", ylabel=field)
    fig.legend(loc="outside upper center", ncols=columns)
    return fig


# ------------------------------------------------------------------------------------------------
# Cosines and ratings of pairs (paper Figure 2)


def group_ratings(ratings: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Five groups of equal width, for ratings from 0 to 5 "0-1" to "4-5"; a rating between two
    groups is in the upper. Shapes: (P,) -> (P,) groups from 0; their names."""
    edges = np.linspace(ratings.min(), ratings.max(), 6)
    groups = np.clip(np.searchsorted(edges, ratings, side="right") - 1, 0, 4)
    return groups, [f"{a:.3g}-{b:.3g}" for a, b in zip(edges, edges[1:])]


def plot_ridges(panels: list[Panel], lowest: float = 1):
    """The distribution of the cosine in each group of ratings, and its median.

    The axis starts at the lowest cosine, or at `lowest` if that is lower.
    """
    edges = np.linspace(min(lowest, *(cosines.min() for _, cosines, _ in panels)), 1, 31)
    middles = (edges[1:] + edges[:-1]) / 2
    fig, (axes,) = figure(columns=len(panels), height=2.6)
    for axis, (title, cosines, ratings) in zip(axes, panels):
        axis.set(xlabel="cosine similarity", ylabel="human rating")
        axis.set_title(title, fontsize=8)
        axis.label_outer()
        groups, names = group_ratings(ratings)
        in_group = [np.minimum(cosines[groups == i], 1) for i in range(5)]  # rounding exceeds 1
        densities = [np.histogram(c, edges)[0] / max(1, len(c)) for c in in_group]
        for i, (c, density) in enumerate(zip(in_group, densities)):
            height = i + 0.95 * density / np.max(densities)
            axis.fill_between(middles, i, height, color="black", alpha=0.25, lw=0)
            axis.plot(middles, height, color="black", linestyle="-", lw=0.8)
            if len(c):
                axis.plot([np.median(c)] * 2, [i, i + 0.25], color="black", linestyle="-", lw=2)
        axis.grid(axis="y", visible=False)
        axis.set_yticks(range(5), names)
    return fig


# ------------------------------------------------------------------------------------------------
# A training step (exercises/tour.ipynb)


def plot_tokens(lines: dict[str, list[tuple[str, float, str]]], columns: int = 76):
    """Versions of a sentence with equally many tokens, one below the other.

    A token is (text, shade, mark). Its background is darker, the larger the shade from 0 to 1,
    which is printed below it if it is neither; the mark stands above. After `columns` characters
    all lines break.
    """
    places, x, block = [], 0.0, 0  # of each token
    for column in zip(*lines.values(), strict=True):
        width = max(max(len(text), 0.8 * len(mark)) for text, _, mark in column) + 2
        if x and x + width > columns:
            x, block = 0.0, block + 1
        places.append((x, block))
        x += width
    height = 2.6 * len(lines) + 0.6  # of a block
    size = (columns + 8) / 12, height * (block + 1) / 6
    fig = load_pyplot().Figure(figsize=size)
    limits = {"xlim": (-6, columns + 2), "ylim": (height * (block + 1) - 1.5, -1.5)}
    axis = fig.add_axes((0, 0, 1, 1), **limits)
    axis.axis("off")
    for i, (title, tokens) in enumerate(lines.items()):
        for first in range(block + 1):
            axis.text(-5, first * height + 2.6 * i, title, va="center", weight="bold")
        for (x, block_of_token), (text, shade, mark) in zip(places, tokens):
            y = block_of_token * height + 2.6 * i
            # Light enough that black text is legible at a shade of 1, in print too
            box = {"facecolor": (1 - 0.75 * shade, 1 - 0.5 * shade, 1 - 0.15 * shade), "lw": 0.3}
            style = {"family": "monospace", "bbox": box | {"pad": 1.5}, "parse_math": False}
            axis.text(x, y, text, va="center", **style)
            axis.text(x, y - 1, mark, va="center", fontsize=7)
            axis.text(x, y + 1, f"{shade:.2f}" * (0 < shade < 1), va="center", fontsize=6)
    return fig


def plot_matrix(
    values: np.ndarray, rows: list[str], columns: list[str], title: str, darkest: float = 1
):
    """A number in each cell, on a background that is darker, the larger it is, up to `darkest`."""
    values = np.asarray(values)
    height, width = values.shape
    fig = load_pyplot().Figure(figsize=(2.4 + 0.42 * width, 0.8 + 0.3 * height))
    axis = fig.add_subplot()
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1.5 * darkest, aspect="auto")
    for i, j in np.ndindex(*values.shape):
        axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=6)
    axis.set_xticks(range(width), columns, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(height), rows)
    axis.grid(visible=False)
    axis.set_title(title, fontsize=8)
    fig.tight_layout()
    return fig


def plain_errors() -> None:
    """In a notebook: a user's mistake is one line, not a traceback."""
    from IPython import get_ipython

    def show(shell, kind, error, traceback, tb_offset=None) -> None:
        print(f"error: {error}", file=sys.stderr)

    get_ipython().set_custom_exc((UserError, ModelError), show)


@contextlib.contextmanager
def following(folders: dict[str, str], field: str, seconds: float = 2.0):
    """In a notebook: a curve of a field for each label's run, drawn again as the runs go on."""
    from IPython.display import display

    done = threading.Event()

    def draw():
        logs = [Path(folder) / "log.jsonl" for folder in folders.values()]
        curves = [mean_curve([read_log(log)] if log.is_file() else [], field) for log in logs]
        return plot_curves(list(folders), curves, field)

    def draw_again() -> None:
        while not done.wait(seconds):
            handle.update(draw())

    handle = display(draw(), display_id=True)
    thread = threading.Thread(target=draw_again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        handle.update(draw())


# ------------------------------------------------------------------------------------------------
# Command line


def curves_of(path: Path, field: str, against: str) -> dict[str, dict[str, list]]:
    """Curves by label: a run's field, a report's for each group, or its ends over a setting."""
    label = path.stem.replace("_", " ")
    if path.is_dir():
        rows = [row for row in read_log(path / "log.jsonl") if field in row]
        x, y = [row[against] for row in rows], [row[field] for row in rows]
        return {label: {"steps": x, "mean": y, "std": [0] * len(y)}} if y else {}
    saved = read_json(path).get("groups", [])
    groups = [group for group in saved if group["curves"].get(field, {}).get("steps")]
    curves = {group["name"]: group["curves"][field] for group in groups}
    if groups and against != "step":
        ends = zip(groups, curves.values())
        ends = sorted((g["settings"][against], c["mean"][-1], c["std"][-1]) for g, c in ends)
        return {label: dict(zip(("steps", "mean", "std"), map(list, zip(*ends))))}
    return {label: curves.popitem()[1]} if len(saved) == 1 and curves else curves


def main() -> None:
    parser = Parser("python -m lab.plots", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", type=Path, help="a run's folder, or a report's JSON")
    add("--field", required=True, help="a field of log.jsonl")
    add(
        "--against",
        default="step",
        help="another field, or a setting in which a report's groups differ",
    )
    add("--out", required=True, metavar="FILE", help="without suffix: .png and .svg are written")
    args, curves = parser.parse_args(), {}
    for path in args.files:
        try:
            curves |= curves_of(path, args.field, args.against)
        except KeyError:
            raise UserError(f"{path}: no {args.against} beside {args.field}") from None
    if not curves:
        raise UserError(f"no {args.field} in {', '.join(map(str, args.files))}")
    fig = plot_curves(list(curves), list(curves.values()))
    (axis,) = fig.axes
    axis.set(xlabel="λ" if args.against == "lam" else args.against, ylabel=args.field)
    if args.against == "lam":  # over decades, and 0
        axis.set_xscale("symlog", linthresh=0.01)
    save(fig, args.out)


if __name__ == "__main__":
    run_main(main)
