"""One page about one or several runs: what differs, the curves, the scores, and what their models think of sentences.

    python -m lab.report runs/demo-1                                     # writes report.html
    python -m lab.report RUN... --out FILE.html --json FILE              # runs that differ in their seed only: mean and spread
    python -m lab.report RUN... --data DIR --query "A man is playing a guitar."

RUN is what python diffcse.py leaves in its folder; one that has not ended, or has no best/, shows what is there. The page
is a single file that asks for nothing else: HTML and SVG, no script, no font, no library. The small model takes
some 5 seconds on two cores to be asked about STS-B dev, and as many about the documentation.

Letters: P pairs, n sentences, D numbers of a vector.
Reference: paper Figure 2 and Table 9, here of STS-B dev or, without it, of the documentation on this machine.
Not here: the test sets' sentences (who chooses by this page must not have seen them); downloads; plots for a paper (lab/plots.py).
"""

import argparse
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert import UserError, read_json, write_atomically
from config import MAY_CHANGE, PRESETS, Config, load_preset
from data import find_senteval, read_lines, run_main
from embed import encode, open_model
from eval_sts import average_ranks, load_set, spearman
from lab.analysis import QUERIES, group, neighbours, vectors_of
from lab.explain import columns as columns_of_text

# ----------------------------------------------------------------------------------------------------------------
# Runs, and groups of them

SAME = {"seed", "out_dir", *MAY_CHANGE}  # runs that differ in these only are one group
FACTS = ("dev_before", "dev_best", "best_step", "minutes")  # of a run, beside its scores after training
HOLDS = ("config", "before", "after", *FACTS, "command", "machine")  # what is read of results.json
CURVES = {  # a field of log.jsonl: what it is, and what to look for
    "score": "dev score x 100, which chooses the best checkpoint; dotted: the start",
    "contrastive": "contrastive loss: starts near log B where the views tell nothing (4.16 for 64 sentences)",
    "prediction": "the discriminator's loss, a mean over tokens: 0.69 = log 2 is guessing",
    "positive_cosine": "of one sentence's two dropouts: should rise",
    "negative_cosine": "of different sentences: should stay near 0; where it rises, the vectors collapse",
    "accuracy_replaced": "replaced tokens that the discriminator finds: 0 where it calls all of them kept",
    "accuracy_kept": "kept tokens that it calls kept: near 1 is easy, most are kept",
    "share_replaced": "of all tokens: what the generator changed, and what there is to find",
    "grad_norm": "length of the gradient before clipping: peaks are steps that went astray",
}


class Run(NamedTuple):
    folder: str  # as the command names it
    cfg: Config
    log: list[dict]
    results: dict  # {}: the run has not ended


class Group(NamedTuple):
    name: str  # what tells it from the others
    label: str  # with its letter, where there are others
    css: str  # the class that colours it
    runs: list[Run]  # by their seeds
    settings: dict[str, object]  # of each of them


def read_run(folder: str) -> Run:
    """Raises: UserError where there is no run in the folder, or a file of it is damaged."""
    path = Path(folder)
    for name in ("config.json", "log.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{folder}: no run in it (no {name}); a run's folder is what python diffcse.py --config demo writes, runs/demo-1 say")
    log = []
    for number, line in enumerate(read_lines(path / "log.jsonl"), 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path / 'log.jsonl'} line {number}: not a line of a run's log, which is JSON with a step in it") from None
        if "replaced_token" in row:  # its name in older logs
            row["prediction"] = row.pop("replaced_token")
        log.append(row)
    results = read_json(path / "results.json") if (path / "results.json").is_file() else {}
    if results and (missing := [key for key in HOLDS if key not in results]):
        raise UserError(f"{path / 'results.json'}: no {missing[0]!r} in it")
    return Run(folder, load_preset(str(path / "config.json")), log, results)


def settings(run: Run) -> dict[str, object]:
    """What one run may differ in from another: its config, and the program, where somebody's own stood in the place of diffcse.py."""
    program = re.search(r"[^\s/\\]+\.py\b", run.results.get("command", ""))
    return {name: value for name, value in asdict(run.cfg).items() if name not in SAME} | {"program": program[0] if program else "diffcse.py"}


def group_runs(runs: list[Run]) -> list[Group]:
    """Runs of the same settings together, named by the fewest that tell the groups apart."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(settings(run).values()), []).append(run)
    of = [sorted(some, key=lambda run: run.cfg.seed) for some in found.values()]
    if len(of) == 1:
        name = preset_of(runs) or Path(runs[0].folder).resolve().name
        return [Group(name, name, "g1", of[0], settings(runs[0]))]
    those, names = [settings(some[0]) for some in of], []

    def told_apart(by: list[str]) -> int:
        return len({tuple(one[name] for name in by) for one in those})

    while told_apart(names) < len(of):
        names.append(max(differing(those), key=lambda name: told_apart([*names, name])))
    titles = [", ".join(f"{name} {shown(one[name])}" for name in names) for one in those]
    return [Group(title, f"{chr(65 + i % 26)}: {title}", f"g{i % len(DASHES) + 1}", some, one) for i, (title, some, one) in enumerate(zip(titles, of, those))]


def differing(those: list[dict[str, object]]) -> list[str]:
    """The settings in which the groups differ, in the order of Config."""
    return [name for name in those[0] if len({one[name] for one in those}) > 1]


def preset_of(runs: Iterable[Run]) -> str:
    """The preset that all of them began with; "" where they differ, or none has ended and says so."""
    names = {run.results["config"] for run in runs if run.results}
    return names.pop() if len(names) == 1 else ""


def shown(value: object) -> str:
    """A setting as it is typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value) or "none"


def curve(runs: list[Run], field: str) -> dict[str, list]:
    """Mean and standard deviation of a field of the log at each step. Shapes: four lists (n,); empty where no log has it.

    A step counts where all runs that came so far have it: an unfinished run just ends, and the others go on.
    """
    of = [{row["step"]: row[field] for row in run.log if isinstance(row.get(field), (int, float)) and math.isfinite(row[field])} for run in runs]
    ends, at = [max(values, default=-1) for values in of], {}
    for step in sorted(set().union(*of)):
        there = [values.get(step) for values, end in zip(of, ends) if step <= end]
        if None not in there:
            at[step] = there
    return {"steps": list(at), "mean": [round(float(np.mean(values)), 6) for values in at.values()],
            "std": [round(float(np.std(values)), 6) for values in at.values()], "runs": [len(values) for values in at.values()]}  # fmt: skip


def scores_of(run: Run) -> dict[str, float]:
    """The numbers of one run: its table's columns, or so far as the log of an unfinished run has them."""
    if run.results:
        after = {name: value for name, value in run.results["after"].items() if name != "score"}  # a second name of mrr
        return {**after, **{key: run.results[key] for key in FACTS}}
    scores = [(row["score"], row["step"]) for row in run.log if row.get("score") is not None]
    best = max(scores[1:], key=lambda pair: pair[0], default=None)  # of equal ones the first, as in training
    return {**({"dev_before": scores[0][0]} if scores else {}), **({"dev_best": best[0], "best_step": best[1]} if best else {}),
            "minutes": round(max((row.get("seconds", 0) for row in run.log), default=0) / 60, 2)}  # fmt: skip


def table_of(runs: list[Run]) -> dict[str, dict]:
    """Each column's mean, population standard deviation (None: of one run) and values; of the runs that have ended, if any has."""
    each = [scores_of(run) for run in ([run for run in runs if run.results] or runs)]
    columns = {name: [scores[name] for scores in each if name in scores] for name in dict.fromkeys(name for scores in each for name in scores)}
    return {name: {"mean": round(float(np.mean(values)), 6), "std": round(float(np.std(values)), 6) if len(values) > 1 else None,
                   "each": [round(value, 6) for value in values]} for name, values in columns.items()}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# What the models are asked: pairs, sentences, queries


class Material(NamedTuple):
    what: str
    left: list[str]
    right: list[str]
    ratings: np.ndarray  # (P,)
    kinds: list[str]  # what the groups of ratings that group() makes are called, from the lowest
    corpus: dict[str, str]  # a sentence: how it is shown
    queries: tuple[str, ...]


def find_material(data: str, runs: list[Run]) -> Material:
    """STS-B dev of the folder `data`, or of one that a run was given and that is there; else the pairs of the documentation."""
    for folder in [data] if data else dict.fromkeys(run.cfg.data for run in runs if run.cfg.data):
        try:
            left, right, ratings = load_set("STSB-dev", find_senteval(folder))
        except UserError:
            if data:
                raise
            continue  # the run was made elsewhere
        what = f"STS-B dev, {len(left):,} pairs rated by people from 0 to 5; its test set stays shut."
        kinds = [f"{low}-{low + 1}" for low in range(5)]
        return Material(what, left, right, np.array(ratings), kinds, {s: s for s in left + right}, QUERIES)
    import docs  # imports hundreds of modules to read what is written about them: only where nothing better is there

    score = docs.DocsScore()
    a, b = score.asked(0)  # the half that chooses; the other one is for the table
    left, right = [score.left[i] for i in (*a, *a)], [score.right[i] for i in (*a, *b)]
    what = (f"Two libraries' summaries of the same function, and of another one: {len(left)} pairs of the half that chooses the checkpoint. "
            "(With --data DIR, which holds STS/, this is about STS-B dev.)")  # fmt: skip
    entries = {summary: f"{name}: {summary}" for name, summary in docs.documentation_entries() if zlib.crc32(name.encode()) % 4 == 0}  # a quarter: seconds, not minutes
    return Material(what, left, right, np.repeat([1.0, 0.0], len(a)), ["another function", "same function"], entries, docs.QUESTIONS)


class Answers(NamedTuple):
    label: str
    css: str
    cosines: np.ndarray  # (P,)
    spearman: float  # x 100
    found: list[list[tuple[str, float]]]  # of each query: sentences and their cosines


def ask(label: str, css: str, folder: str, pooling: str, material: Material, queries: Sequence[str], top_k: int = 5) -> Answers:
    """What one model thinks; each distinct sentence is encoded once. Raises: UserError where its vectors are not numbers."""
    bert, tokenizer, _, _ = open_model(folder)
    try:
        vectors = vectors_of(partial(encode, bert, tokenizer, pooling=pooling), [*material.left, *material.right, *material.corpus, *queries])
        u, v = (np.stack([vectors[s] for s in side]) for side in (material.left, material.right))  # (P, D)
        cosines = np.minimum((u * v).sum(1), 1)  # a sentence beside itself: the last bit may be above
        rho = 100 * spearman(cosines, material.ratings)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    found = []
    for query in queries:
        corpus = [s for s in material.corpus if s != query]  # itself is no news
        best = neighbours(vectors[query], np.stack([vectors[s] for s in corpus]), top_k)
        found.append([(material.corpus[corpus[i]], cosine) for i, cosine in best])
    return Answers(label, css, cosines, rho, found)


def percentiles(values: np.ndarray) -> np.ndarray:
    """Where each value stands among all, from 0 to 100; equal ones share their mean. Shapes: (P,) -> (P,)."""
    return 100 * (average_ranks(values) - 0.5) / len(values)


def most_wrong(apart: np.ndarray, k: int = 5) -> tuple[list[int], list[int]]:
    """The pairs thought too alike and too different, worst first. Shapes: (P,) percentile by cosine less that by rating."""
    return tuple([int(i) for i in np.argsort(-signed, kind="stable")[:k] if signed[i] > 0] for signed in (apart, -apart))


# ----------------------------------------------------------------------------------------------------------------
# SVG. Colour and dashes are the page's, by the class g1, g2, ... of a group; g0 is the start, of no group

DASHES = ("none", "7 3", "2 2", "8 3 2 3", "12 4", "4 2 1 2 1 2", "1 3", "16 3 4 3")  # what tells the groups apart in grey, with their letters
WIDTH, NARROW = 340, 280  # of a chart, of ridges: in the page their text is then nearly as large as the notes


def ticks(low: float, high: float, n: int = 5) -> list[tuple[float, str]]:
    """About n round numbers from low to high, and how they are written."""
    power = 10.0 ** math.floor(math.log10((high - low) / n))
    step = next(power * by for by in (1, 2, 5, 10) if power * by * n >= (high - low) * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(k * step, f"{k * step:,.{digits}f}") for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def path(xs: Iterable[float], ys: Iterable[float]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys))


def chart(field: str, drawn: list[tuple[Group, dict]], height: int = 180) -> str:
    """A field of the log over steps: of each group the mean, and a band of a standard deviation around it. drawn: with what curve() says."""
    left, right, top, bottom = 48, WIDTH - 18, 8, height - 34
    low, high = (pick(m + sign * s for _, c in drawn for m, s in zip(c["mean"], c["std"])) for pick, sign in ((min, -1), (max, 1)))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
    low, high, last = low - margin, high + margin, max(c["steps"][-1] for _, c in drawn) or 1

    def x(step):
        return left + (right - left) * step / last

    def y(value):
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = [f'<path class="rule" d="M{left},{y(v):.1f}H{right}"/><text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{text}</text>'
             for v, text in ticks(low, high)]  # fmt: skip
    parts += [f'<path class="axis" d="M{x(v):.1f},{bottom}v4"/><text x="{x(v):.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>'
              for v, text in ticks(0, last) if v == int(v)]  # fmt: skip
    parts.append(f'<path class="axis" d="M{left},{bottom}H{right}"/><text x="{right}" y="{bottom + 29}" text-anchor="end">steps</text>')
    starts = {c["mean"][0] for _, c in drawn if c["steps"][0] == 0} if field == "score" else ()
    parts += [f'<path class="start" d="M{left},{y(start):.1f}H{right}"/>' for start in sorted(starts)]
    ends = []
    for g, c in drawn:
        xs, mean, std = np.array([x(step) for step in c["steps"]]), np.array(c["mean"]), np.array(c["std"])
        band = f'<path class="band" d="{path([*xs, *xs[::-1]], [*y(mean + std), *y(mean - std)[::-1]])}Z"/>' if std.any() else ""
        dot = f'<circle cx="{xs[0]:.1f}" cy="{y(mean[0]):.1f}" r="2.5"/>' * (len(xs) == 1)
        parts.append(f'<g class="{g.css}"><title>{escape(g.label)}</title>{band}{dot}<path class="line" d="{path(xs, y(mean))}"/></g>')
        ends.append([y(mean[-1]), xs[-1] + 5, g])
    for at in {at for _, at, _ in ends}:  # the letters at the lines' ends, pushed apart from the top down, then from the axis up
        column = sorted((end for end in ends if end[1] == at), key=lambda end: end[0])
        for above, here in zip(column, column[1:]):
            here[0] = max(here[0], above[0] + 12)
        column[-1][0] = min(column[-1][0], bottom - 2)
        for here, above in zip(column[::-1], column[-2::-1]):
            above[0] = min(above[0], here[0] - 12)
    parts += [f'<text class="letter {g.css}" x="{at:.1f}" y="{level + 4:.1f}">{g.label[0]}</text>' for level, at, g in ends if g.label != g.name]
    says = "; ".join(f"{g.label}: from {c['mean'][0]:.4g} to {c['mean'][-1]:.4g} at step {c['steps'][-1]}" for g, c in drawn)
    return svg(f"{field} over steps. {says}", WIDTH, height, parts)


def ridges(answers: Answers, material: Material, edges: np.ndarray, tallest: float) -> str:
    """How the cosine is distributed, a row for each group of ratings, the highest on top; ticks are medians (paper Figure 2)."""
    rows, row_height, top = len(material.kinds), 36, 22
    left, right, bottom = 14 + 6 * max(map(len, material.kinds)), NARROW - 10, top + row_height * rows
    xs = np.linspace(left, right, len(edges))
    parts, medians = [], []
    for row in reversed(range(rows)):  # from the back: tall ones reach into the row above, which lies behind them
        inside, base = answers.cosines[group(material.ratings) == row], bottom - row_height * row
        share = shares(inside, edges) / tallest
        outline = path([left, *(xs[1:] + xs[:-1]) / 2, right], [base, *(base - 1.5 * row_height * share), base])
        parts.append(f'<g class="{answers.css}"><path class="behind" d="{outline}Z"/><path class="ridge" d="{outline}"/>')
        if len(inside):
            medians.append(f"{material.kinds[row]}: {np.median(inside):.2f}")
            parts.append(f'<path class="median" d="M{np.interp(np.median(inside), edges, xs):.1f},{base}v-9"/>')
        parts.append(f'</g><text x="{left - 8}" y="{base - 1}" text-anchor="end">{escape(material.kinds[row])}</text>')
    for value, text in ticks(edges[0], 1):
        at = np.interp(value, edges, xs)
        parts.append(f'<path class="axis" d="M{at:.1f},{bottom + 2}v4"/><text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    return svg(f"{answers.label}: medians of the cosine by rating, {'; '.join(medians)}", NARROW, bottom + 24, parts)


def shares(cosines: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Of a group's pairs, how many fall between two edges. Shapes: (p,), (b,) -> (b - 1,)."""
    return np.histogram(cosines, edges)[0] / max(1, len(cosines))


def svg(says: str, width: int, height: int, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(says)}">{"".join(parts)}</svg>'


# ----------------------------------------------------------------------------------------------------------------
# The page

LIGHT = """--page: #fdfdfb; --ink: #1d1f23; --quiet: #5d626b; --rule: #e2e2dc; --c0: #5d626b;
    --c1: #0b5fa5; --c2: #b54800; --c3: #007356; --c4: #9a2c78; --c5: #735600; --c6: #b3123b; --c7: #4346b8; --c8: #006d7a;"""
DARK = """--page: #16181c; --ink: #e4e5e8; --quiet: #a0a5af; --rule: #31353c; --c0: #a0a5af;
    --c1: #6cb6ff; --c2: #ff9a57; --c3: #4fd1a5; --c4: #f08bd0; --c5: #e0c04a; --c6: #ff8095; --c7: #a9a7ff; --c8: #4ccfe0;"""
STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 70rem; padding: 2rem 1rem 4rem; background: var(--page); color: var(--ink); overflow-wrap: break-word;
    font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--rule); }}
h3, summary.model {{ color: var(--ink); font-size: 1rem; font-weight: 600; margin: 1.5rem 0 .25rem; }}
p {{ margin: .25rem 0 .75rem; max-width: 46rem; }}
.note, figcaption, summary {{ color: var(--quiet); font-size: .875rem; line-height: 1.4; }}
summary {{ cursor: pointer; margin: .5rem 0; }}
pre {{ white-space: pre-wrap; font-size: .8rem; margin: .5rem 0; overflow-wrap: anywhere; }}
.grid {{ --least: 20rem; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); gap: 1.5rem; }}
.grid.small {{ --least: 15rem; }}
figure {{ margin: 0; display: flex; flex-direction: column; justify-content: space-between; gap: .5rem; }}
figcaption b {{ color: var(--ink); display: block; font-size: .95rem; }}
svg {{ display: block; width: 100%; height: auto; overflow: visible; }}
svg text {{ font: 11px system-ui, sans-serif; font-variant-numeric: tabular-nums; fill: var(--quiet); }}
svg text.letter {{ font-weight: 700; fill: currentColor; }}
.rule, .axis, .start {{ fill: none; stroke: var(--quiet); }} .rule {{ stroke: var(--rule); }} .start {{ stroke-width: 1.2; stroke-dasharray: 1 3; }}
.line, .ridge, .median {{ fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }} .median {{ stroke-width: 2.5; }}
.ridge {{ fill: currentColor; fill-opacity: .2; stroke-width: 1.2; }} .behind {{ fill: var(--page); }}
.band, circle {{ fill: currentColor; }} .band {{ opacity: .16; }}
{" ".join(f".g{i} {{ color: var(--c{i}); }} .g{i} .line {{ stroke-dasharray: {dashes}; }}" for i, dashes in enumerate(("none", *DASHES)))}
.legend {{ list-style: none; padding: 0; margin: .5rem 0 1.25rem; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; font-size: .9rem; }}
.legend li {{ display: flex; align-items: center; gap: .5rem; }} .legend svg {{ flex: none; width: 3rem; }}
.scroll {{ overflow-x: auto; margin: .5rem 0 1rem; }}
table {{ border-collapse: collapse; font-size: .875rem; line-height: 1.35; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); white-space: pre-line; }}
thead th {{ vertical-align: bottom; color: var(--quiet); }}
.numbers tbody th {{ min-width: 8rem; }} .numbers :is(td, th) + :is(td, th) {{ padding: .35rem 0 .35rem .7rem; text-align: right; }}
.texts {{ width: 100%; }} .texts td {{ min-width: 11rem; padding-left: 2.2em; text-indent: -2.2em; overflow-wrap: anywhere; }}
.texts .only {{ font-weight: 700; }}
.pairs tbody th {{ min-width: 11rem; width: 100%; font-weight: 400; }} .pairs :is(td, th) + :is(td, th) {{ text-align: right; }}
@media print {{
  :root {{ color-scheme: light; {LIGHT} --page: #fff; }}
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  .grid.grid {{ grid-template-columns: repeat(2, 1fr); }}
  .scroll {{ overflow: visible; }}
  :is(td, th) {{ min-width: 0 !important; }}
  figure, tr, li {{ break-inside: avoid; }}
  h2, h3, thead, summary.model {{ break-after: avoid; }}
  details:not([open]) {{ display: none; }}
}}"""


def table(head: Sequence, rows: Iterable[Sequence], kind: str) -> str:
    """A cell is text, which is escaped here, or (text, class); the first of a row is its heading."""

    def cell(tag: str, value) -> str:
        text, name = value if isinstance(value, tuple) else (value, "")
        return f"<{tag}" + f" class={name}" * bool(name) + f">{escape(str(text))}</{tag[:2]}>"

    lines = ["<tr>" + cell('th scope="row"', first) + "".join(cell("td", value) for value in others) + "</tr>\n" for first, *others in rows]
    top = "".join(cell('th scope="col"', value) for value in head)
    return f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>\n{"".join(lines)}</tbody></table></div>\n'


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>\n" if content else ""


def counted(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def plus_minus(column: dict | None) -> str:
    if column is None:
        return "-"
    return f"{column['mean']:.2f}" + (f" ±\u00a0{column['std']:.2f}" if column["std"] is not None else "")  # a line may end before the sign


def minutes_of(g: Group) -> float:
    return round(sum(scores_of(run)["minutes"] for run in g.runs), 2)


def heading(groups: list[Group]) -> str:
    runs = [run for g in groups for run in g.runs]
    ended, seeds = [run for run in runs if run.results], sorted({run.cfg.seed for run in runs})
    machines = [run.results["machine"] for run in ended]
    keys = ("device", "threads", "python", "torch", "numpy", "tokenizers")
    line = [counted(len(runs), "run"), counted(len(groups), "group"), "seed" + "s" * (len(seeds) > 1) + " " + ", ".join(map(str, seeds)),
            f"score {runs[0].cfg.score}", *dict.fromkeys(", ".join(f"{key} {m.get(key, '?')}" for key in keys) for m in machines),
            f"{sum(map(minutes_of, groups)):.1f} minutes in all"]  # fmt: skip
    title = preset_of(runs) or (groups[0].name if len(groups) == 1 else "several configurations")
    text = f"<h1>{escape(f'DiffCSE: {title}')}</h1>\n<p class=note>{escape(' · '.join(line))}</p>\n"
    if len(ended) < len(runs):
        steps = [f"{run.folder} (step {max((row['step'] for row in run.log), default=0):,}" + f" of {run.cfg.steps:,}" * bool(run.cfg.steps) + ")"
                 for run in runs if not run.results]  # fmt: skip
        text += f"<p>{escape('Not ended yet: ' + ', '.join(steps))}. The scores count such a run only in a group where none has ended.</p>\n"
    return text + folded("The commands", "".join(f"<pre>{escape(run.results['command'])}</pre>" for run in ended))


def differences(groups: list[Group]) -> str:
    those, preset = [g.settings for g in groups], preset_of(run for g in groups for run in g.runs)
    names, default, what = differing(those), asdict(PRESETS.get(preset, Config())), f"the preset {preset}" if preset in PRESETS else "the defaults"
    text = "<p>Nothing but seeds: it is one group.</p>\n"
    if names:
        text = "<p>The groups are named by the fewest settings that tell them apart; these are all in which they differ.</p>\n"
        text += table(["setting", *(g.label for g in groups)], [(name, *(shown(one[name]) for one in those)) for name in names], "plain")
    others = [(name, shown(value), shown(default.get(name, "diffcse.py"))) for name, value in those[0].items()
              if name not in names and value != default.get(name, "diffcse.py")]  # fmt: skip
    more = folded(f"What all share, and what {what} would have", table(["setting", "here", what], others, "plain") if others else "")
    return f"<h2>What differs</h2>\n{text}{more}"


def curves_part(groups: list[Group], curves: list[dict[str, dict]]) -> str:
    legend = [f'<li><svg class="{g.css}" viewBox="0 0 48 12" aria-hidden="true"><path class="line" d="M0,6H48"/></svg>'
              f"{escape(g.label)} ({counted(len(g.runs), 'run')})</li>\n" for g in groups]  # fmt: skip
    figures = [f"<figure><figcaption><b>{field}</b>{escape(text)}</figcaption>{chart(field, drawn)}</figure>\n" for field, text in CURVES.items()
               if (drawn := [(g, of[field]) for g, of in zip(groups, curves) if field in of])]  # fmt: skip
    several = any(len(g.runs) > 1 for g in groups)
    text = "Means over a group's seeds, with a band of one standard deviation to both sides." if several else "A line for each run."
    drawn = f"<p>{text}</p>\n<ul class=legend>{''.join(legend)}</ul>\n<div class=grid>{''.join(figures)}</div>\n"
    return "<h2>Curves</h2>\n" + (drawn if figures else "<p>Nothing has been logged yet.</p>\n")


def starts_of(groups: list[Group]) -> dict[str, tuple[str, str]]:
    """The models before training and their poolings, by what they are called here."""
    found = list(dict.fromkeys((g.runs[0].cfg.model, g.runs[0].cfg.pooling) for g in groups))
    return {"before" + f", {model} ({pooling})" * (len(found) > 1): (model, pooling) for model, pooling in found}


def scores_part(groups: list[Group], tables: list[dict[str, dict]]) -> str:
    columns = [name for name in dict.fromkeys(name for t in tables for name in t) if name not in FACTS]

    def two_decimals(scores: dict, names: Iterable[str]) -> list[str]:
        return [f"{scores[name]:.2f}" if name in scores else "-" for name in names]

    rows: list[list] = []
    for label, start in starts_of(groups).items():
        before = next((run.results for g in groups for run in g.runs if run.results and (run.cfg.model, run.cfg.pooling) == start), None)
        if before:
            rows.append([label, *two_decimals(before["before"], columns), f"{before['dev_before']:.2f}", *"---"])
            rows.append([f"{label}, first-last average", *two_decimals(before.get("before_first_last", {}), columns), *"----"])
    for g, t in zip(groups, tables):
        steps = " ".join(map(str, sorted(set(t["best_step"]["each"])))) if "best_step" in t else "-"
        rows.append([g.label, *(plus_minus(t.get(name)) for name in (*columns, "dev_best")), steps,
                     " ".join(str(run.cfg.seed) for run in g.runs), f"{minutes_of(g):.2f}"])  # fmt: skip
    each = [[run.folder, *two_decimals(scores, (*columns, "dev_best")), scores.get("best_step", "-"), run.cfg.seed, f"{scores['minutes']:.2f}"]
            for g in groups for run in g.runs for scores in [scores_of(run)]]  # fmt: skip
    head = [*columns, "dev best", "step of best", "seed", "minutes"]
    return ("<h2>Scores</h2>\n<p>x 100, of the best checkpoint: mean ± standard deviation over seeds, and the minutes of all. "
            "Dev best is what the checkpoint was chosen by, and so a little too good.</p>\n"
            + table(["", *head], rows, "numbers") + folded("Every run", table(["run", *head], each, "numbers")))  # fmt: skip


def models_part(groups: list[Group], data: str, queries: Sequence[str]) -> str:
    """What needs a model: the distribution by rating, neighbours, most telling pairs. Of a group the kept model with the lowest seed."""
    kept = [(g, folder) for g in groups if (folder := next((run.folder for run in g.runs if (Path(run.folder) / "best").is_dir()), ""))]
    if not kept:
        return ("<h2>What the models think</h2>\n<p>No run here has kept its model (there is no best/): "
                "similarities, nearest neighbours and most telling pairs are left out.</p>\n")  # fmt: skip
    material, answers = find_material(data, [run for g in groups for run in g.runs]), []
    missing = [f"{g.label}: no run of it has kept its model" for g in groups if g.label not in {of.label for of, _ in kept}]
    queries = list(dict.fromkeys(queries or material.queries))
    for label, (model, pooling) in starts_of(groups).items():
        try:
            answers.append(ask(label, "g0", model, pooling, material, queries))
        except UserError as error:  # it may be on another machine
            missing.append(f"{label}: {error}")
    answers += [ask(g.label, g.css, folder, g.runs[0].cfg.pooling, material, queries) for g, folder in kept]
    notes = "".join(f"<p class=note>{escape('Left out: ' + text)}</p>\n" for text in missing)
    return (f"<h2>Similarity by rating</h2>\n<p>{escape(material.what)} A row is the distribution of the cosine of pairs rated alike, the tick its "
            "median. In a good model the rows move to the right as the rating rises, and overlap little; how far to the right all of them lie "
            f"tells nothing. Of a group the run with the lowest seed is asked.</p>\n{notes}"
            + ridges_grid(answers, material) + neighbours_part(answers, queries) + pairs_part(answers, material))  # fmt: skip


def ridges_grid(answers: list[Answers], material: Material) -> str:
    edges = np.linspace(min(a.cosines.min() for a in answers), 1, 31 if len(material.left) > 500 else 16)
    tallest = max(shares(a.cosines[group(material.ratings) == row], edges).max() for a in answers for row in range(len(material.kinds)))
    figures = [f"<figure><figcaption><b>{escape(a.label)}</b></figcaption>{ridges(a, material, edges, tallest)}"
               f"<figcaption>Spearman x 100: {a.spearman:.2f}</figcaption></figure>\n" for a in answers]  # fmt: skip
    return f'<div class="small grid">{"".join(figures)}</div>\n'


def neighbours_part(answers: list[Answers], queries: Sequence[str]) -> str:
    several = len(answers) > 1
    text = f"<h2>Nearest neighbours</h2>\n<p>The sentences with the highest cosine{'; bold: in no other column' * several}.</p>\n"
    for number, query in enumerate(queries):
        texts = [sentence for a in answers for sentence, _ in a.found[number]]
        rows = [[rank, *((f"{cosine:.2f}\u00a0{sentence}", "only" * (several and texts.count(sentence) == 1)) for sentence, cosine in row)]
                for rank, row in enumerate(zip(*(a.found[number] for a in answers)), 1)]  # fmt: skip
        text += f"<h3>{escape(query)}</h3>\n" + table(["", *(a.label for a in answers)], rows, "texts")
    return text


def pairs_part(answers: list[Answers], material: Material) -> str:
    rated, every = percentiles(material.ratings), np.stack([percentiles(a.cosines) for a in answers])  # (P,), (models, P)
    said = [f"{rating:.2f}" if len(material.kinds) > 2 else material.kinds[int(rating)] for rating in material.ratings]

    def row(i: int, *numbers: str) -> list[str]:
        return [f"{material.left[i]}\n{material.right[i]}", said[i], *numbers]

    text = ("<h2>Most telling pairs</h2>\n<p>Where a model's order of the pairs and the rating's are furthest apart. "
            "A percentile says how many of all pairs are less alike, by rating or by cosine.</p>\n")  # fmt: skip
    head = ["pair", "rating", "cosine", "percentile by rating", "percentile by cosine"]
    for a, own in zip(answers, every):
        text += f"<details open><summary class=model>{escape(a.label)}</summary>\n"
        for title, found in zip(("Too alike", "Too different"), most_wrong(own - rated)):
            rows = [row(i, f"{a.cosines[i]:.2f}", f"{rated[i]:.1f}", f"{own[i]:.1f}") for i in found]
            text += f"<h3>{title}</h3>\n" + table(head, rows, "pairs")
        text += "</details>\n"
    if len(answers) > 1:
        widest = np.argsort(every.min(0) - every.max(0), kind="stable")[:5]
        rows = [row(i, f"{rated[i]:.1f}", *(f"{p:.1f}" for p in every[:, i])) for i in widest]
        head = ["pair", "rating", "percentile by rating", *(a.label for a in answers)]
        text += "<h3>Where the models differ most</h3>\n<p>Each model's percentile of the pair.</p>\n" + table(head, rows, "pairs")
    return text


def page(title: str, parts: Iterable[str]) -> str:
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
            f"<title>{escape(title)}</title>\n<style>{STYLE}\n</style>\n</head>\n<body>\n{''.join(parts)}</body>\n</html>\n")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Command line


def summary(groups: list[Group], tables: list[dict[str, dict]]) -> str:
    """The page's main numbers as text, a row for each group."""
    columns = [name for t in tables for name in t if name not in FACTS]
    main = next((name for name in ("average", "mrr", *columns) if name in columns), "-")  # what one would be told first
    rows = []
    for g, t in zip(groups, tables):
        numbers = [plus_minus(t.get(name)) for name in ("dev_before", "dev_best", main)]
        rows.append([g.label, *(text.replace("\u00a0", " ") for text in numbers), str(len(g.runs)), f"{minutes_of(g):.2f}"])
    return columns_of_text(["", "dev before", "dev best", f"after: {main}", "seeds", "minutes"], rows, "<>>>>>")


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.report", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder; runs that differ in their seed only are one group")
    parser.add_argument("--out", metavar="FILE", default="report.html", help="the page (default: report.html)")
    parser.add_argument("--data", metavar="DIR", default="", help="folder with STS/: the models are asked about STS-B dev (default: the runs' own)")
    parser.add_argument("--query", metavar="TEXT", nargs="+", action="extend", help="sentences whose neighbours are shown (default: three)")
    parser.add_argument("--json", metavar="FILE", help="also write the groups' numbers there")
    args = parser.parse_args()
    for path in map(Path, filter(None, (args.out, args.json))):  # before the work
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(f"{path}: " + ("a file is meant, and this is a folder" if path.is_dir() else f"there is no folder {path.parent}"))
    os.environ["HF_HUB_OFFLINE"] = "1"  # a start that is in the Hub's cache is shown, and nothing fetched
    runs = [read_run(name) for name in {Path(name).resolve(): name for name in args.runs}.values()]  # named twice, it is still one
    if other := next((run for run in runs if run.cfg.score != runs[0].cfg.score), None):
        raise UserError(f"{runs[0].folder} is scored by {runs[0].cfg.score}, {other.folder} by {other.cfg.score}: "
                        "one page compares runs that are scored by the same thing")  # fmt: skip
    groups = group_runs(runs)
    curves = [{field: c for field in CURVES if (c := curve(g.runs, field))["steps"]} for g in groups]
    tables = [table_of(g.runs) for g in groups]
    print(summary(groups, tables), flush=True)
    parts = [heading(groups), differences(groups), curves_part(groups, curves), scores_part(groups, tables),
             models_part(groups, args.data, args.query or ())]  # fmt: skip
    text = page(f"DiffCSE: {', '.join(g.name for g in groups)}", parts)
    write_atomically(args.out, text)
    if args.json:
        names = differing([g.settings for g in groups])
        report = [{"name": g.name, "differs": {name: g.settings[name] for name in names}, "seeds": [run.cfg.seed for run in g.runs],
                   "runs": [run.folder for run in g.runs], "commands": [run.results["command"] for run in g.runs if run.results],
                   "curves": c, "table": t, "minutes": minutes_of(g)} for g, c, t in zip(groups, curves, tables)]  # fmt: skip
        write_atomically(args.json, json.dumps({"score": runs[0].cfg.score, "groups": report}, indent=1) + "\n")
    print(f"{args.out}: {counted(len(groups), 'group')}, {counted(len(runs), 'run')}, {len(text.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    run_main(main)
