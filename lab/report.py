"""One HTML page about one or several runs: settings, curves, scores, and what their models do.

    python -m lab.report runs/demo-1                               # writes report.html
    python -m lab.report RUN... --out FILE.html --json FILE        # equal but for the seed: a group
    python -m lab.report RUN... --data DIR --query "A man is playing a guitar."

RUN is a run's folder; for an unfinished run, or one without best/, the page shows what exists. The
page is one file of HTML and SVG, without scripts, fonts or libraries, and needs no network. Scoring
a small model on STS-B dev takes about 5 seconds on two cores.

Shapes: P pairs, n sentences, D hidden size.
Reference: paper Figure 2 and Table 9, here of development pairs.
Not here: test sets' sentences, which whoever selects by this page must not see; downloads; plots
for a paper (lab/plots.py).
"""

import argparse
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert import ModelError, read_json
from data import read_lines
from diffcse import PRESETS, Config
from embed import encode
from engine.cli import MAY_CHANGE, Parser, add_encoder_flags, parse_field
from engine.errors import UserError, run_main, write_atomically
from engine.model_folder import load_model
from engine.device import pick_device
from eval_sts import average_ranks, make_score, spearman
from lab.ablations import AblationConfig
from lab.analysis import neighbours, vectors_of
from lab.explain import columns as text_table

# ------------------------------------------------------------------------------------------------
# Runs, and groups of them

NOT_COMPARED = {"seed", "out_dir", *MAY_CHANGE}  # runs that differ only in these are one group
FACTS = ("dev_before", "dev_best", "best_step", "minutes")  # of a run, beside its scores
REQUIRED = ("config", "before", "after", *FACTS, "command", "machine")  # keys of results.json
CURVES = {  # fields of log.jsonl, and what to look for
    "score": "dev score x 100, which selects the best model; dotted: before training",
    "contrastive": "contrastive loss: log B if the views tell nothing (4.16 for 64 sentences)",
    "difference": "loss of the discriminator, per token: log 2 = 0.69 is guessing",
    "positive_cosine": "of a sentence's two views: should rise",
    "negative_cosine": "of different sentences: should stay near 0; if it rises, vectors collapse",
    "accuracy_replaced": "share of replaced tokens that D finds: 0 if it calls all original",
    "accuracy_original": "share of original tokens that D calls original: near 1 is easy",
    "share_replaced": "share of tokens that the generator changed",
    "grad_norm": "gradient norm before clipping; a peak is an unusual step",
}
FIRST_EDITION = {  # names in older runs
    "mask": "masking",
    "replaced_token": "difference",
    "prediction": "difference",
    "accuracy_kept": "accuracy_original",
}


class Run(NamedTuple):
    folder: str  # as on the command line
    cfg: AblationConfig
    log: list[dict]
    results: dict  # {}: the run has not finished


class Group(NamedTuple):
    name: str  # the settings that distinguish it from the others
    label: str  # with a letter, if there are several groups
    css: str  # the class with its colour
    runs: list[Run]  # by seed
    settings: dict[str, object]


def rename(row: dict) -> dict:
    return {FIRST_EDITION.get(name, name): value for name, value in row.items()}


def read_config(path: Path) -> AblationConfig:
    """A run's settings; fields that only older versions had are ignored. Raises: UserError."""
    known, values = {field.name for field in fields(AblationConfig)}, {}
    try:
        for name, value in rename(read_json(path)).items():
            if name in known and (name, value) != ("compile", None):
                values[name] = parse_field(AblationConfig, name, value)
        return AblationConfig(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_run(folder: str) -> Run:
    """Raises: UserError if the folder has no run, or a file of it is damaged."""
    path, log, results = Path(folder), [], {}
    for name in ("config.json", "log.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{folder}: not a run's folder such as runs/demo-1 (no {name})")
    for number, line in enumerate(read_lines(path / "log.jsonl"), 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            where = f"{path / 'log.jsonl'} line {number}"
            raise UserError(f"{where}: expected a JSON object with a step") from None
        log.append(rename(row))
    if (path / "results.json").is_file():
        results = read_json(path / "results.json")
        if missing := [key for key in REQUIRED if key not in results]:
            raise UserError(f"{path / 'results.json'}: {missing[0]!r} is missing")
    return Run(folder, read_config(path / "config.json"), log, results)


def settings(run: Run) -> dict[str, object]:
    """What may differ between groups: the config, and a program other than diffcse.py."""
    program = re.search(r"[^\s/\\]+\.py\b", run.results.get("command", ""))
    cfg = {name: value for name, value in asdict(run.cfg).items() if name not in NOT_COMPARED}
    return cfg | {"program": program[0] if program else "diffcse.py"}


def group_runs(runs: list[Run]) -> list[Group]:
    """Runs with equal settings, named by the fewest settings that distinguish the groups."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(settings(run).values()), []).append(run)
    groups = [sorted(group, key=lambda run: run.cfg.seed) for group in found.values()]
    if len(groups) == 1:
        name = preset_of(runs) or Path(runs[0].folder).resolve().name
        return [Group(name, name, "g1", groups[0], settings(runs[0]))]
    each, names = [settings(group[0]) for group in groups], []

    def distinguished(by: list[str]) -> int:
        return len({tuple(one[name] for name in by) for one in each})

    while distinguished(names) < len(groups):
        names.append(max(differing(each), key=lambda name: distinguished([*names, name])))
    titles = [", ".join(f"{name} {shown(one[name])}" for name in names) for one in each]
    return [
        Group(title, f"{chr(65 + i % 26)}: {title}", f"g{i % 8 + 1}", group, one)
        for i, (title, group, one) in enumerate(zip(titles, groups, each))
    ]


def differing(each: list[dict[str, object]]) -> list[str]:
    """The settings in which the groups differ, in the order of the config."""
    return [name for name in each[0] if len({one[name] for one in each}) > 1]


def preset_of(runs: Iterable[Run]) -> str:
    """The preset of all finished runs; "" if they differ or none has finished."""
    names = {run.results["config"] for run in runs if run.results}
    return names.pop() if len(names) == 1 else ""


def shown(value: object) -> str:
    """A setting as on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def curve(runs: list[Run], field: str) -> dict[str, list]:
    """Mean and standard deviation of a field at each step. Shapes: four lists (n,), maybe empty.

    A step counts if all runs that have come so far have it: an unfinished run ends early, and the
    others continue.
    """
    logs = []
    for run in runs:
        values = {row["step"]: row.get(field) for row in run.log if row.get(field) is not None}
        logs.append({step: value for step, value in values.items() if math.isfinite(value)})
    lasts, values_at = [max(values, default=-1) for values in logs], {}
    for step in sorted(set().union(*logs)):
        values = [values.get(step) for values, last in zip(logs, lasts) if step <= last]
        if None not in values:
            values_at[step] = values
    rows = values_at.values()
    mean, std = ([round(float(f(values)), 6) for values in rows] for f in (np.mean, np.std))
    return {"steps": list(values_at), "mean": mean, "std": std, "runs": list(map(len, rows))}


def scores_of(run: Run) -> dict[str, float]:
    """The columns of a run's table; of an unfinished run, those that its log has."""
    if run.results:
        return run.results["after"] | {key: run.results[key] for key in FACTS}
    scores = [(row["score"], row["step"]) for row in run.log if row.get("score") is not None]
    row = {"dev_before": scores[0][0]} if scores else {}
    if scores[1:]:  # of equal scores the first is kept, as in training
        row["dev_best"], row["best_step"] = max(scores[1:], key=lambda pair: pair[0])
    seconds = max((row.get("seconds", 0) for row in run.log), default=0)
    return row | {"minutes": round(seconds / 60, 2)}


def table_of(runs: list[Run]) -> dict[str, dict]:
    """Mean, population standard deviation (None for one run) and values of each column.

    Of the finished runs, if there are any.
    """
    each = [scores_of(run) for run in ([run for run in runs if run.results] or runs)]
    table = {}
    for name in dict.fromkeys(name for scores in each for name in scores):
        values = [scores[name] for scores in each if name in scores]
        mean, std = round(float(np.mean(values)), 6), round(float(np.std(values)), 6)
        values = [round(value, 6) for value in values]
        table[name] = {"mean": mean, "std": std if values[1:] else None, "each": values}
    return table


# ------------------------------------------------------------------------------------------------
# What the models compute: cosines of rated pairs, and neighbours of queries


class Material(NamedTuple):
    title: str
    left: list[str]
    right: list[str]
    ratings: np.ndarray  # (P,)
    groups: np.ndarray  # (P,) the group of each rating, from 0
    kinds: list[str]  # the groups' names
    corpus: list[str]  # each sentence once
    queries: list[str]


def make_material(title: str, left: list[str], right: list[str], ratings: list[float]) -> Material:
    """Five groups of equal width: 0-1 to 4-5, or between the lowest and the highest rating."""
    values = np.array(ratings)
    low, high = (0, 5) if values.min() >= 0 and values.max() <= 5 else (values.min(), values.max())
    edges = np.linspace(low, high, 6)
    groups = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, 4)
    kinds = [f"{a:.3g}-{b:.3g}" for a, b in zip(edges, edges[1:])]
    corpus, P = list(dict.fromkeys(left + right)), len(left)
    queries = [left[i] for i in (0, P // 3, 2 * P // 3)]
    return Material(title, left, right, values, groups, kinds, corpus, queries)


def find_material(data: str, runs: list[Run]) -> Material:
    """STS-B dev of the folder `data`; else the development pairs that selected the runs' models;
    else, if they are not on this machine, the image captions in assets/."""
    own = ("dev" if run.cfg.score == "stsb" else run.cfg.score for run in runs)
    scores = dict.fromkeys([*zip(own, (run.cfg.data for run in runs)), ("captions", "")])
    for score, folder in [("dev", data)] if data else scores:
        try:
            ((name, pairs),) = make_score(score, folder).dev_set.items()
            break
        except UserError:
            if data or score == "captions":
                raise
    name = {"STSB-dev": "STS-B dev"}.get(name, name)
    return make_material(f"{name}, {len(pairs[0]):,} rated pairs.", *pairs)


class Answers(NamedTuple):
    label: str
    css: str
    cosines: np.ndarray  # (P,)
    spearman: float  # x 100
    found: list[list[tuple[str, float]]]  # for each query: sentences and their cosines


def ask(
    label: str, css: str, folder: str, pooling: str, material: Material, args: argparse.Namespace
) -> Answers:
    """Cosines and neighbours of one model. Raises: UserError if it is missing or diverged."""
    device, amp = pick_device(args.device, args.amp)
    model = load_model(folder)
    bert = model.bert.to(device)
    encoder = partial(encode, bert, model.tokenizer, pooling=pooling, amp=amp)
    try:
        vectors = vectors_of(encoder, [*material.corpus, *material.queries])
        u, v = (np.stack([vectors[s] for s in side]) for side in (material.left, material.right))
        cosines = np.minimum((u * v).sum(1), 1)  # of equal sentences: rounding may exceed 1
        rho = 100 * spearman(cosines, material.ratings)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    found = []
    for query in material.queries:
        corpus = [s for s in material.corpus if s != query]
        best = neighbours(vectors[query], np.stack([vectors[s] for s in corpus]), 5)
        found.append([(corpus[i], cosine) for i, cosine in best])
    return Answers(label, css, cosines, rho, found)


def percentiles(values: np.ndarray) -> np.ndarray:
    """The rank of each value, from 0 to 100; equal values share their mean. Shapes: (P,)."""
    return 100 * (average_ranks(values) - 0.5) / len(values)


def most_wrong(difference: np.ndarray, k: int = 5) -> tuple[list[int], list[int]]:
    """The pairs that are too similar and too different, worst first.

    Shapes: (P,) percentile by cosine minus percentile by rating.
    """
    worst = []
    for signed in (difference, -difference):
        order = np.argsort(-signed, kind="stable")[:k]
        worst.append([int(i) for i in order if signed[i] > 0])
    return tuple(worst)


# ------------------------------------------------------------------------------------------------
# SVG. The classes g0 to g8 of report.css give a group its colour and dashes

WIDTH, NARROW = 340, 280  # of a chart and of ridges: their text is nearly as large as the notes


def ticks(low: float, high: float, n: int = 5) -> list[tuple[float, str]]:
    """About n round numbers from low to high, and their text."""
    power = 10.0 ** math.floor(math.log10((high - low) / n))
    step = next(power * by for by in (1, 2, 5, 10) if power * by * n >= (high - low) * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(k * step, f"{k * step:,.{digits}f}") for k in range(first, last + 1)]


def path(xs: Iterable[float], ys: Iterable[float]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys))


def svg_text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def svg(description: str, width: int, height: int, parts: list[str]) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
    return f"{head}{''.join(parts)}</svg>"


def x_axis(x, y: float, low: float, high: float, whole: bool) -> list[str]:
    """Ticks below y. x: from a value to its place. whole: at whole numbers only."""
    marks = [(x(v), text) for v, text in ticks(low, high) if not whole or v == int(v)]
    return [
        f'<path class="axis" d="M{at:.1f},{y}v4"/>{svg_text(at, y + 16, text, "middle")}'
        for at, text in marks
    ]


def chart(field: str, drawn: list[tuple[Group, dict]], height: int = 180) -> str:
    """A field over steps: the mean of each group, with a band of one standard deviation.

    drawn: groups and what curve() returns for them.
    """
    left, right, top, bottom = 48, WIDTH - 18, 8, height - 34
    low = min(m - s for _, c in drawn for m, s in zip(c["mean"], c["std"]))
    high = max(m + s for _, c in drawn for m, s in zip(c["mean"], c["std"]))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
    low, high, last = low - margin, high + margin, max(c["steps"][-1] for _, c in drawn) or 1

    def x(step):
        return left + (right - left) * step / last

    def y(value):
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = []
    for value, text in ticks(low, high):
        parts.append(f'<path class="rule" d="M{left},{y(value):.1f}H{right}"/>')
        parts.append(svg_text(left - 6, y(value) + 4, text, "end"))
    parts += x_axis(x, bottom, 0, last, whole=True)
    parts.append(f'<path class="axis" d="M{left},{bottom}H{right}"/>')
    parts.append(svg_text(right, bottom + 29, "steps", "end"))
    starts = {c["mean"][0] for _, c in drawn if c["steps"][0] == 0} if field == "score" else ()
    parts += [f'<path class="start" d="M{left},{y(v):.1f}H{right}"/>' for v in sorted(starts)]
    ends = []
    for g, c in drawn:
        xs, mean, std = x(np.array(c["steps"])), np.array(c["mean"]), np.array(c["std"])
        outline = path([*xs, *xs[::-1]], [*y(mean + std), *y(mean - std)[::-1]])
        band = f'<path class="band" d="{outline}Z"/>' if std.any() else ""
        dot = f'<circle cx="{xs[0]:.1f}" cy="{y(mean[0]):.1f}" r="2.5"/>' if len(xs) == 1 else ""
        line = f'<path class="line" d="{path(xs, y(mean))}"/>'
        parts.append(f'<g class="{g.css}"><title>{escape(g.label)}</title>{band}{dot}{line}</g>')
        ends.append([y(mean[-1]), xs[-1] + 5, g])
    for height_, at, g in spread_letters(ends, bottom):
        if g.label != g.name:
            letter = f'<text class="letter {g.css}" x="{at:.1f}" y="{height_ + 4:.1f}">'
            parts.append(f"{letter}{g.label[0]}</text>")
    ranges = [
        f"{g.label}: from {c['mean'][0]:.4g} to {c['mean'][-1]:.4g} at step {c['steps'][-1]}"
        for g, c in drawn
    ]
    return svg(f"{field} over steps. {'; '.join(ranges)}", WIDTH, height, parts)


def spread_letters(ends: list[list], bottom: float) -> list[list]:
    """Move letters at the ends of lines apart: (y, x, group) each, first down, then up."""
    for at in {at for _, at, _ in ends}:
        column = sorted((end for end in ends if end[1] == at), key=lambda end: end[0])
        for above, here in zip(column, column[1:]):
            here[0] = max(here[0], above[0] + 12)
        column[-1][0] = min(column[-1][0], bottom - 2)
        for here, above in zip(column[::-1], column[-2::-1]):
            above[0] = min(above[0], here[0] - 12)
    return ends


def densities(answers: Answers, material: Material, edges: np.ndarray) -> np.ndarray:
    """The share of each group's pairs between two edges. Shapes: (b,) -> (groups, b - 1)."""
    groups = [answers.cosines[material.groups == i] for i in range(len(material.kinds))]
    return np.stack([np.histogram(c, edges)[0] / max(1, len(c)) for c in groups])


def ridges(answers: Answers, material: Material, edges: np.ndarray, highest: float) -> str:
    """The distribution of the cosine, a row for each group of ratings, the highest on top.

    Ticks are medians (paper Figure 2).
    """
    rows, row_height, top = len(material.kinds), 36, 22
    left, right = 14 + 6 * max(map(len, material.kinds)), NARROW - 10
    bottom = top + row_height * rows
    xs = np.linspace(left, right, len(edges))
    density = densities(answers, material, edges) / highest
    parts, medians = [], []
    for row in reversed(range(rows)):  # a tall density overlaps the row above, which is behind it
        cosines, base = answers.cosines[material.groups == row], bottom - row_height * row
        ys = [base, *(base - 1.5 * row_height * density[row]), base]
        outline = path([left, *(xs[1:] + xs[:-1]) / 2, right], ys)
        parts.append(f'<g class="{answers.css}"><path class="behind" d="{outline}Z"/>')
        parts.append(f'<path class="ridge" d="{outline}"/>')
        if len(cosines):
            median = np.median(cosines)
            medians.append(f"{material.kinds[row]}: {median:.2f}")
            at = np.interp(median, edges, xs)
            parts.append(f'<path class="median" d="M{at:.1f},{base}v-9"/>')
        parts.append(f"</g>{svg_text(left - 8, base - 1, material.kinds[row], 'end')}")
    parts += x_axis(lambda v: np.interp(v, edges, xs), bottom + 2, edges[0], 1, whole=False)
    description = f"{answers.label}: medians of the cosine by rating, {'; '.join(medians)}"
    return svg(description, NARROW, bottom + 24, parts)


# ------------------------------------------------------------------------------------------------
# The page


def table(head: Sequence, rows: Iterable[Sequence], kind: str) -> str:
    """A cell is text, which is escaped here, or (text, class); a row's first cell is its title."""

    def cell(tag: str, value) -> str:
        text, css = value if isinstance(value, tuple) else (value, "")
        css = f" class={css}" if css else ""
        return f"<{tag}{css}>{escape(str(text))}</{tag[:2]}>"

    lines = []
    for first, *others in rows:
        cells = [cell('th scope="row"', first), *(cell("td", value) for value in others)]
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    top = "".join(cell('th scope="col"', value) for value in head)
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{''.join(lines)}</tbody></table></div>\n"
    )


def folded(summary: str, content: str) -> str:
    summary = f"<summary>{escape(summary)}</summary>"
    return f"<details>{summary}{content}</details>\n" if content else ""


def paragraph(text: str, css: str = "") -> str:
    return f"<p{f' class={css}' if css else ''}>{escape(text)}</p>\n"


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" + "s" * (n != 1)


def plus_minus(column: dict | None) -> str:
    if column is None:
        return "-"
    spread = "" if column["std"] is None else f" ±\u00a0{column['std']:.2f}"
    return f"{column['mean']:.2f}{spread}"


def minutes_of(g: Group) -> float:
    return round(sum(scores_of(run)["minutes"] for run in g.runs), 2)


def heading(groups: list[Group]) -> str:
    runs = [run for g in groups for run in g.runs]
    finished, seeds = [run for run in runs if run.results], sorted({r.cfg.seed for r in runs})
    keys, machines = ("device", "threads", "python", "torch", "numpy", "tokenizers"), []
    for run in finished:
        machine = run.results["machine"]
        machines.append(", ".join(f"{key} {machine.get(key, '?')}" for key in keys))
    facts = [
        counted(len(runs), "run"),
        counted(len(groups), "group"),
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
        f"score {runs[0].cfg.score}",
        *dict.fromkeys(machines),
        f"{sum(map(minutes_of, groups)):.1f} minutes in all",
    ]
    several = groups[0].name if len(groups) == 1 else "several configurations"
    text = f"<h1>{escape(f'DiffCSE: {preset_of(runs) or several}')}</h1>\n"
    text += paragraph(" · ".join(facts), "note")
    unfinished = []
    for run in runs:
        if not run.results:
            step = f"step {max((row['step'] for row in run.log), default=0):,}"
            total = f" of {run.cfg.steps:,}" if run.cfg.steps else ""
            unfinished.append(f"{run.folder} ({step}{total})")
    if unfinished:
        note = "A group's scores count such a run only if none has finished."
        text += paragraph(f"Not finished yet: {', '.join(unfinished)}. {note}")
    commands = [f"<pre>{escape(run.results['command'])}</pre>" for run in finished]
    return text + folded("Commands", "".join(commands))


def settings_part(groups: list[Group]) -> str:
    each, preset = [g.settings for g in groups], preset_of(run for g in groups for run in g.runs)
    names, title = differing(each), f"preset {preset}" if preset in PRESETS else "default"
    default = asdict(AblationConfig()) | asdict(PRESETS.get(preset, Config()))
    default["program"] = "diffcse.py"
    text = paragraph("One group: the runs differ in their seeds only.")
    if names:
        text = paragraph("Groups are named by the fewest settings that distinguish them.")
        rows = [(name, *(shown(one[name]) for one in each)) for name in names]
        text += table(["setting", *(g.label for g in groups)], rows, "plain")
    shared = {name: value for name, value in each[0].items() if name not in names}
    rows = [(n, shown(v), shown(default[n])) for n, v in shared.items() if v != default[n]]
    more = table(["setting", "here", title], rows, "plain") if rows else ""
    return f"<h2>Settings</h2>\n{text}{folded(f'Shared settings that differ from {title}', more)}"


def curves_part(groups: list[Group], curves: list[dict[str, dict]]) -> str:
    line = 'viewBox="0 0 48 12" aria-hidden="true"><path class="line" d="M0,6H48"/></svg>'
    legend, figures = "", ""
    for g in groups:
        runs = counted(len(g.runs), "run")
        legend += f'<li><svg class="{g.css}" {line}{escape(g.label)} ({runs})</li>\n'
    for field, text in CURVES.items():
        if drawn := [(g, c[field]) for g, c in zip(groups, curves) if field in c]:
            caption = f"<figcaption><b>{field}</b>{escape(text)}</figcaption>"
            figures += f"<figure>{caption}{chart(field, drawn)}</figure>\n"
    if not figures:
        return "<h2>Curves</h2>\n<p>Nothing has been logged yet.</p>\n"
    text = "A line for each run."
    if any(len(g.runs) > 1 for g in groups):
        text = "Means over a group's seeds, with a band of one standard deviation."
    grid = f"<ul class=legend>{legend}</ul>\n<div class=grid>{figures}</div>\n"
    return f"<h2>Curves</h2>\n{paragraph(text)}{grid}"


def starts_of(groups: list[Group]) -> dict[str, tuple[str, str]]:
    """Label -> (model, pooling) of each model before training."""
    cfgs = [g.runs[0].cfg for g in groups]
    found = list(dict.fromkeys((cfg.model, cfg.pooling) for cfg in cfgs))
    return {"before" + f", {m} ({p})" * (len(found) > 1): (m, p) for m, p in found}


def scores_part(groups: list[Group], tables: list[dict[str, dict]]) -> str:
    columns = [n for n in dict.fromkeys(n for t in tables for n in t) if n not in FACTS]

    def two_decimals(scores: dict, names: Iterable[str]) -> list[str]:
        return [f"{scores[name]:.2f}" if name in scores else "-" for name in names]

    rows, each = [], []
    for title, start in starts_of(groups).items():
        for run in (run for g in groups for run in g.runs if run.results):
            if (run.cfg.model, run.cfg.pooling) == start:
                before, first_last = run.results["before"], run.results.get("before_first_last", {})
                dev = f"{run.results['dev_before']:.2f}"
                rows.append([title, *two_decimals(before, columns), dev, *"---"])
                title = f"{title}, first-last average"
                rows.append([title, *two_decimals(first_last, columns), *"----"])
                break
    for g, t in zip(groups, tables):
        best_steps = sorted(set(t["best_step"]["each"])) if "best_step" in t else ["-"]
        cells = [plus_minus(t.get(name)) for name in (*columns, "dev_best")]
        cells += [" ".join(map(str, best_steps)), " ".join(str(run.cfg.seed) for run in g.runs)]
        rows.append([g.label, *cells, f"{minutes_of(g):.2f}"])
        for run in g.runs:
            scores = scores_of(run)
            cells = [*two_decimals(scores, (*columns, "dev_best")), scores.get("best_step", "-")]
            each.append([run.folder, *cells, run.cfg.seed, f"{scores['minutes']:.2f}"])
    head = [*columns, "dev best", "step of best", "seed", "minutes"]
    text = (
        "x 100, of the best model: mean ± standard deviation over seeds, and the minutes of all. "
        "Dev best selected the model, so it is slightly too high."
    )
    runs = folded("Every run", table(["run", *head], each, "numbers"))
    return f"<h2>Scores</h2>\n{paragraph(text)}{table(['', *head], rows, 'numbers')}{runs}"


def models_part(groups: list[Group], args: argparse.Namespace) -> str:
    """Similarity by rating, neighbours, and most telling pairs, of the saved models.

    A group's model is that of its lowest seed.
    """
    saved = {}
    for g in groups:
        folders = [run.folder for run in g.runs if (Path(run.folder) / "best").is_dir()]
        saved |= {g.label: folders[0]} if folders else {}
    if not saved:
        text = "No run has a saved model (best/), so similarities and neighbours are left out."
        return f"<h2>Models</h2>\n{paragraph(text)}"
    material, answers = find_material(args.data, [run for g in groups for run in g.runs]), []
    if args.query:
        material = material._replace(queries=list(dict.fromkeys(args.query)))
    missing = [f"{g.label}: no run has a saved model" for g in groups if g.label not in saved]
    for title, (model, pooling) in starts_of(groups).items():
        try:
            answers.append(ask(title, "g0", model, pooling, material, args))
        except (UserError, ModelError) as error:  # it may be on another machine
            missing.append(f"{title}: {error}")
    for g in groups:
        if g.label in saved:
            pooling = g.runs[0].cfg.pooling
            answers.append(ask(g.label, g.css, saved[g.label], pooling, material, args))
    text = (
        f"{material.title} A row is the distribution of the cosine of pairs with similar ratings; "
        "the tick is its median. In a good model the rows move to the right as the rating rises, "
        "and overlap little; how far to the right all of them are is irrelevant. Of a group, the "
        "model of the lowest seed is shown."
    )
    notes = "".join(paragraph(f"Left out: {reason}", "note") for reason in missing)
    head = f"<h2>Similarity by rating</h2>\n{paragraph(text)}{notes}"
    parts = ridges_grid(answers, material), neighbours_part(answers, material.queries)
    return head + "".join(parts) + pairs_part(answers, material)


def ridges_grid(answers: list[Answers], material: Material) -> str:
    bins = 31 if len(material.left) > 500 else 16
    edges = np.linspace(min(a.cosines.min() for a in answers), 1, bins)
    highest, figures = max(densities(a, material, edges).max() for a in answers), ""
    for a in answers:
        title = f"<figcaption><b>{escape(a.label)}</b></figcaption>"
        score = f"<figcaption>Spearman x 100: {a.spearman:.2f}</figcaption>"
        figures += f"<figure>{title}{ridges(a, material, edges, highest)}{score}</figure>\n"
    return f'<div class="small grid">{figures}</div>\n'


def neighbours_part(answers: list[Answers], queries: Sequence[str]) -> str:
    several = len(answers) > 1
    text = "The sentences with the highest cosine" + "; bold: in no other column" * several
    text = f"<h2>Nearest neighbours</h2>\n{paragraph(text + '.')}"
    for number, query in enumerate(queries):
        found = [a.found[number] for a in answers]
        sentences = [sentence for column in found for sentence, _ in column]
        rows = []
        for rank, row in enumerate(zip(*found), 1):
            cells = [
                (f"{cosine:.2f}\u00a0{s}", "only" if several and sentences.count(s) == 1 else "")
                for s, cosine in row
            ]
            rows.append([rank, *cells])
        head = ["", *(a.label for a in answers)]
        text += f"<h3>{escape(query)}</h3>\n{table(head, rows, 'texts')}"
    return text


def pairs_part(answers: list[Answers], material: Material) -> str:
    by_rating = percentiles(material.ratings)  # (P,)
    by_cosine = np.stack([percentiles(a.cosines) for a in answers])  # (models, P)

    def row(i: int, *numbers: str) -> list[str]:
        pair = f"{material.left[i]}\n{material.right[i]}"
        return [pair, f"{material.ratings[i]:.2f}", *numbers]

    text = (
        "Pairs whose rank by cosine differs most from their rank by rating. A percentile is the "
        "share of all pairs that are less similar, by rating or by cosine."
    )
    text = f"<h2>Most telling pairs</h2>\n{paragraph(text)}"
    head = ["pair", "rating", "cosine", "percentile by rating", "percentile by cosine"]
    for a, own in zip(answers, by_cosine):
        text += f"<details open><summary class=model>{escape(a.label)}</summary>\n"
        for title, found in zip(("Too similar", "Too different"), most_wrong(own - by_rating)):
            numbers = {i: (a.cosines[i], by_rating[i], own[i]) for i in found}
            rows = [row(i, f"{c:.2f}", f"{r:.1f}", f"{p:.1f}") for i, (c, r, p) in numbers.items()]
            text += f"<h3>{title}</h3>\n{table(head, rows, 'pairs')}"
        text += "</details>\n"
    if len(answers) > 1:
        widest = np.argsort(by_cosine.min(0) - by_cosine.max(0), kind="stable")[:5]
        rows = [
            row(i, f"{by_rating[i]:.1f}", *(f"{p:.1f}" for p in by_cosine[:, i])) for i in widest
        ]
        head = ["pair", "rating", "percentile by rating", *(a.label for a in answers)]
        text += f"<h3>Pairs on which the models differ most</h3>\n{table(head, rows, 'pairs')}"
    return text


STYLE = Path(__file__).with_suffix(".css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, parts: Iterable[str]) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{STYLE.read_text()}</style>
</head>
<body>
{"".join(parts)}</body>
</html>
"""


# ------------------------------------------------------------------------------------------------
# Command line


def summary(groups: list[Group], tables: list[dict[str, dict]]) -> str:
    """The main numbers as text, a row for each group."""
    columns = [name for t in tables for name in t if name not in FACTS]
    main = next((n for n in ("average", "captions-test", *columns) if n in columns), "-")
    rows = []
    for g, t in zip(groups, tables):
        numbers = [plus_minus(t.get(name)) for name in ("dev_before", "dev_best", main)]
        numbers = [text.replace("\u00a0", " ") for text in numbers]
        rows.append([g.label, *numbers, str(len(g.runs)), f"{minutes_of(g):.2f}"])
    head = ["", "dev before", "dev best", f"after: {main}", "seeds", "minutes"]
    return text_table(head, rows, "<>>>>>")


def parse_args() -> argparse.Namespace:
    parser = Parser("python -m lab.report", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="a run's folder")
    add("--out", metavar="FILE", default="report.html", help="(default: report.html)")
    add("--data", metavar="DIR", default="", help="folder with STS/: use STS-B dev's pairs")
    add("--query", metavar="TEXT", nargs="+", action="extend", help="show these neighbours")
    add("--json", metavar="FILE", help="also write the groups' numbers")
    add_encoder_flags(parser)
    args = parser.parse_args()
    for path in map(Path, filter(None, (args.out, args.json))):
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected a file")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
    return args


def main() -> None:
    args = parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # use models in the Hub's cache, download nothing
    folders = {Path(name).resolve(): name for name in args.runs}  # each once
    runs = [read_run(name) for name in folders.values()]
    for run in runs:
        if run.cfg.score != runs[0].cfg.score:
            raise UserError(
                f"{runs[0].folder} is scored by {runs[0].cfg.score}, {run.folder} by "
                f"{run.cfg.score}: one page compares runs with the same --score"
            )
    groups, curves = group_runs(runs), []
    for g in groups:
        all_curves = {field: curve(g.runs, field) for field in CURVES}
        curves.append({field: c for field, c in all_curves.items() if c["steps"]})
    tables = [table_of(g.runs) for g in groups]
    print(summary(groups, tables), flush=True)
    parts = [heading(groups), settings_part(groups), curves_part(groups, curves)]
    parts += [scores_part(groups, tables), models_part(groups, args)]
    text = page(f"DiffCSE: {', '.join(g.name for g in groups)}", parts)
    write_atomically(args.out, text)
    if args.json:
        content = {"score": runs[0].cfg.score, "groups": to_json(groups, curves, tables)}
        write_atomically(args.json, json.dumps(content, indent=1) + "\n")
    size = f"{len(text.encode()) / 1000:.0f} kB"
    print(f"{args.out}: {counted(len(groups), 'group')}, {counted(len(runs), 'run')}, {size}")


def to_json(groups: list[Group], curves: list[dict], tables: list[dict]) -> list[dict]:
    names, rows = differing([g.settings for g in groups]), []
    for g, c, t in zip(groups, curves, tables):
        row = {"name": g.name, "differs": {name: g.settings[name] for name in names}}
        row["seeds"] = [run.cfg.seed for run in g.runs]
        row["runs"] = [run.folder for run in g.runs]
        row["commands"] = [run.results["command"] for run in g.runs if run.results]
        rows.append(row | {"curves": c, "table": t, "minutes": minutes_of(g)})
    return rows


if __name__ == "__main__":
    run_main(main)
