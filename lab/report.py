"""One HTML page about one or several runs: scores, curves, and what their models do.

    python -m lab.report RUN...                                # writes report.html
    python -m lab.report RUN... --out FILE.html --json FILE    # and the numbers
    python -m lab.report RUN... --data DIR --query "A man is playing a guitar."

RUN is a run's folder. Runs that differ in their seeds only are one group. An unfinished run, or one
without best/, is shown as far as it goes. The page is one file without scripts and needs no
network; its charts need matplotlib. The table of scores is also printed.

Shapes: P pairs.
Reference: paper Figure 2 and Table 9, here of development pairs.
Not here: test sets' sentences, which whoever selects by this page must not see; downloads.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert import ModelError, read_json
from embed import encode
from engine.cli import MAY_CHANGE, Parser, add_encoder_flags
from engine.device import pick_device
from engine.errors import UserError, run_main, write_atomically
from engine.model_folder import load_model
from eval_sts import Encoder, Pairs, average_ranks, make_score, spearman
from lab import plots
from lab.ablations import AblationConfig
from lab.analysis import nearest, vectors_of
from lab.tables import format_table

NOT_COMPARED = {"seed", "out_dir", *MAY_CHANGE}  # runs that differ only in these are one group
REQUIRED = ("before", "after", "dev_before", "dev_best", "best_step", "minutes", "command")
CURVES = {  # fields of log.jsonl, and what to look for
    "score": "dev score x 100, which selects the best model",
    "contrastive": "contrastive loss: log B if the views tell nothing (4.16 for 64 sentences)",
    "difference": "loss of the discriminator, per token: log 2 = 0.69 is guessing",
    "positive_cosine": "of a sentence's two views: should rise",
    "negative_cosine": "of different sentences: should stay near 0; if it rises, vectors collapse",
    "accuracy_replaced": "share of replaced tokens that D finds: 0 if it calls all original",
    "accuracy_original": "share of original tokens that D calls original: near 1 is easy",
    "share_replaced": "share of tokens that the generator changed",
    "grad_norm": "gradient norm before clipping; a peak is an unusual step",
}

# ------------------------------------------------------------------------------------------------
# Runs, and groups of them


class Run(NamedTuple):
    folder: str  # as on the command line
    cfg: dict[str, object]
    log: list[dict]
    results: dict  # {}: the run has not finished


class Group(NamedTuple):
    letter: str
    name: str  # the settings that differ between groups
    runs: list[Run]  # by seed


def read_run(folder: str) -> Run:
    """Raises: UserError or ModelError if the folder has no run, or a file of it is damaged."""
    path, results = Path(folder), {}
    for name in ("config.json", "log.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{folder}: not a run's folder such as runs/demo-1 (no {name})")
    cfg = asdict(AblationConfig()) | read_json(path / "config.json")
    if (path / "results.json").is_file():
        results = read_json(path / "results.json")
        if missing := [key for key in REQUIRED if key not in results]:
            raise UserError(f"{path / 'results.json'}: {missing[0]!r} is missing")
    return Run(folder, cfg, plots.read_log(path / "log.jsonl"), results)


def settings(run: Run) -> dict[str, object]:
    """What may differ between groups: the config, and a program other than diffcse.py."""
    program = re.search(r"[^\s/\\]+\.py\b", run.results.get("command", ""))
    cfg = {name: value for name, value in run.cfg.items() if name not in NOT_COMPARED}
    return cfg | {"program": program[0] if program else "diffcse.py"}


def group_runs(runs: list[Run]) -> list[Group]:
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.cfg["seed"]):
        found.setdefault(json.dumps(settings(run)), []).append(run)
    names, groups = differing([same[0] for same in found.values()]), []
    for i, same in enumerate(found.values()):
        name = ", ".join(f"{name} {shown(settings(same[0]).get(name))}" for name in names)
        name = name or same[0].results.get("config", "run")
        groups.append(Group(chr(ord("A") + i), name, same))
    return groups


def differing(runs: list[Run]) -> list[str]:
    """The settings in which runs differ, in the order of the config."""
    each = [settings(run) for run in runs]
    names = dict.fromkeys(name for values in each for name in values)
    return [name for name in names if len({shown(values.get(name)) for values in each}) > 1]


def shown(value: object) -> str:
    """A setting as on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def table_of(each: list[dict[str, float]]) -> dict[str, dict]:
    """Mean, population standard deviation (None of one value) and the values of each score."""
    table = {}
    for name in dict.fromkeys(name for scores in each for name in scores):
        values = np.round([scores[name] for scores in each if name in scores], 6)
        std = round(float(values.std()), 6) if len(values) > 1 else None
        table[name] = {"mean": round(float(values.mean()), 6), "std": std, "each": values.tolist()}
    return table


def scores_of(runs: list[Run]) -> dict[str, dict]:
    """table_of the best models' scores, of the finished runs."""
    names = ("dev_best", "best_step", "minutes")
    results = [run.results for run in runs if run.results]
    return table_of([row["after"] | {name: row[name] for name in names} for row in results])


# ------------------------------------------------------------------------------------------------
# What the models compute: cosines of rated pairs, and neighbours of queries


class Answers(NamedTuple):
    label: str
    cosines: np.ndarray  # (P,)
    spearman: float  # x 100
    found: list[list[tuple[str, float]]]  # for each query: sentences and their cosines


def find_pairs(data: str, cfg: dict) -> tuple[str, Pairs]:
    """STS-B dev of the folder `data`; else the development pairs that selected the runs' models;
    else, if they are not on this machine, the image captions in assets/."""
    if data:
        score = make_score("dev", data)
    else:
        try:
            score = make_score("dev" if cfg["score"] == "stsb" else cfg["score"], cfg["data"])
        except UserError:
            score = make_score("captions", "")
    ((name, pairs),) = score.dev_set.items()
    return name, pairs


def ask(label: str, encoder: Encoder, pairs: Pairs, queries: list[str]) -> Answers:
    """Raises: UserError if the model has diverged."""
    left, right, ratings = pairs
    vectors = vectors_of(encoder, [*left, *right, *queries])
    cosines = np.array([vectors[a] @ vectors[b] for a, b in zip(left, right)])
    corpus = list(dict.fromkeys(left + right))
    found = [nearest(query, corpus, vectors, 5) for query in queries]
    return Answers(label, cosines, 100 * spearman(cosines, ratings), found)


def percentiles(values: Sequence[float]) -> np.ndarray:
    """The rank of each value, from 0 to 100; equal values share their mean. Shapes: (P,)."""
    return 100 * (average_ranks(np.asarray(values)) - 0.5) / len(values)


# ------------------------------------------------------------------------------------------------
# HTML. Text is escaped here


def element(tag: str, text: object, attributes: str = "") -> str:
    return f"<{tag}{attributes}>{escape(str(text))}</{tag}>\n"


def section(title: str, text: str) -> str:
    return element("h2", title) + element("p", text)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], css: str) -> str:
    """The first cell of a row is its title. css: numbers (to the right) or texts."""
    lines = ["".join(element("th", cell, ' scope="col"') for cell in head)]
    for title, *cells in rows:
        row_title = element("th", title, ' scope="row"')
        lines.append(row_title + "".join(element("td", cell) for cell in cells))
    first, *others = (f"<tr>{line}</tr>\n" for line in lines)
    content = f"<thead>{first}</thead><tbody>{''.join(others)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="{css}">{content}</table></div>\n'


def folded(summary: str, content: str) -> str:
    return f"<details>{element('summary', summary)}{content}</details>\n"


def grid(charts: Iterable[tuple[str, str, str]]) -> str:
    """charts: title, text and SVG of each."""
    figures = ""
    for title, text, svg in charts:
        caption = element("b", title) + escape(text)
        figures += f"<figure><figcaption>{caption}</figcaption>{svg}</figure>\n"
    return f'<div class="grid">{figures}</div>\n'


def fill_template(title: str, content: str) -> str:
    template = Path(__file__).with_suffix(".html").read_text("utf-8")
    return template.replace("$TITLE", escape(title)).replace("$CONTENT", content)


# ------------------------------------------------------------------------------------------------
# The parts of the page


def plus_minus(column: dict | None) -> str:
    if column is None:
        return "-"
    return f"{column['mean']:.2f}" + ("" if column["std"] is None else f" ± {column['std']:.2f}")


def start_of(run: Run) -> str:
    return f"before: {run.cfg['model']}, {run.cfg['pooling']}"


def score_tables(groups: list[Group]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Column titles; rows of models before training and of groups; rows of finished runs."""
    runs, starts = [run for g in groups for run in g.runs if run.results], {}
    sets = list(dict.fromkeys(name for run in runs for name in run.results["after"]))

    def row(title: str, numbers: dict[str, dict], runs: list[Run]) -> list[str]:
        cells = [plus_minus(numbers.get(name)) for name in (*sets, "dev_best")]
        steps, minutes = (numbers.get(key, {}).get("each", []) for key in ("best_step", "minutes"))
        steps, seeds = sorted(set(map(int, steps))), [run.cfg["seed"] for run in runs]
        cells += [" ".join(map(str, values)) or "-" for values in (steps, seeds)]
        return [title, *cells, f"{sum(minutes):.2f}" if minutes else "-"]

    for run in runs:
        before = run.results["before"] | {"dev_best": run.results["dev_before"]}
        starts.setdefault(start_of(run), [before, run.results.get("before_first_last", {})])
    rows = []
    for title, (before, first_last) in starts.items():
        rows.append(row(title, table_of([before]), []))
        rows.append(row("before, first-last average", table_of([first_last]), []))
    rows += [row(f"{g.letter}: {g.name}", scores_of(g.runs), g.runs) for g in groups]
    head = ["", *sets, "dev best", "step of best", "seeds", "minutes"]
    return head, rows, [row(run.folder, scores_of([run]), [run]) for run in runs]


def scores_part(groups: list[Group], head: list[str], rows: list, each: list) -> str:
    runs = [run for g in groups for run in g.runs]
    text = (
        "Spearman x 100 of the best model: mean ± standard deviation over seeds, and the minutes "
        "of all. Dev best selected the model, so it is slightly too high."
    )
    for run in runs:
        if not run.results:
            step = max((row["step"] for row in run.log), default=0)
            text += f" {run.folder} has not finished (step {step:,}), so it is not in this table."
    names = dict.fromkeys([*differing(runs), *settings(runs[0])])
    values = [[n, *(shown(settings(g.runs[0]).get(n)) for g in groups)] for n in names]
    commands = [run.results["command"] for run in runs if run.results]
    machines = dict.fromkeys(str(run.results.get("machine")) for run in runs if run.results)
    letters = [g.letter for g in groups]
    return (
        section("Scores", text)
        + table(head, rows, "numbers")
        + folded("Every run", table(["run", *head[1:]], each, "numbers"))
        + folded("Settings", table(["setting", *letters], values, "texts"))
        + folded("Commands and machines", element("pre", "\n".join([*commands, *machines])))
    )


def curves_part(curves: dict[str, dict[str, dict]]) -> str:
    """curves: field -> letter -> mean_curve's."""
    charts = []
    for field, text in CURVES.items():
        if any(c["steps"] for c in curves[field].values()):
            fig = plots.plot_curves(list(curves[field]), list(curves[field].values()))
            charts.append((field, text, plots.to_svg(fig, field)))
    text = "Means over a group's seeds, with a band of one standard deviation."
    return section("Curves", text) + grid(charts)


def models_part(groups: list[Group], args: argparse.Namespace, has_charts: bool) -> str:
    """Similarity by rating, neighbours, and most telling pairs, of the saved models."""
    models = {}
    for g in groups:
        saved = [run for run in g.runs if (Path(run.folder) / "best").is_dir()]
        for run in saved[:1]:
            models = {start_of(run): (run.cfg["model"], run.cfg["pooling"])} | models
            models[g.letter] = (run.folder, run.cfg["pooling"])
    if not models:
        return element("p", "No run has a saved model (best/), so there are no examples.")
    name, pairs = find_pairs(args.data, groups[0].runs[0].cfg)
    P, answers, notes = len(pairs[0]), [], ""
    queries = args.query or [pairs[0][i] for i in (0, P // 3, 2 * P // 3)]
    device, amp = pick_device(args.device, args.amp)
    for label, (folder, pooling) in models.items():
        try:
            model = load_model(folder)
            settings = {"pooling": pooling, "amp": amp}
            encoder = partial(encode, model.bert.to(device), model.tokenizer, **settings)
            answers.append(ask(label, encoder, pairs, queries))
        except (UserError, ModelError) as error:  # it may be on another machine
            notes += element("p", f"Left out: {label}: {error}")
    if not answers:
        return notes
    text = (
        f"Of {name}, {P:,} rated pairs. A row is the distribution of the cosine of pairs with "
        "similar ratings; the mark is its median. In a good model the rows move to the right as "
        "the rating rises, and overlap little; how far to the right all of them are is "
        "irrelevant. A group's model is that of the lowest seed."
    )
    charts, lowest = [], min(a.cosines.min() for a in answers)
    for a in answers if has_charts else []:
        fig = plots.plot_ridges([("", a.cosines, np.array(pairs[2]))], lowest)
        charts.append((a.label, f"Spearman x 100: {a.spearman:.2f}", plots.to_svg(fig, a.label)))
    head = section("Similarity by rating", text) + notes + grid(charts)
    return head + neighbours_part(answers, queries) + pairs_part(answers, pairs)


def neighbours_part(answers: list[Answers], queries: list[str]) -> str:
    text = "The sentences with the highest cosine; a star marks one that is in no other column."
    content = section("Nearest neighbours", text)
    for number, query in enumerate(queries):
        found = [a.found[number] for a in answers]
        sentences, rows = [sentence for column in found for sentence, _ in column], []
        for rank, row in enumerate(zip(*found), 1):
            stars = ["* " * (len(answers) > 1 and sentences.count(s) == 1) for s, _ in row]
            cells = [f"{cosine:.2f} {star}{s}" for star, (s, cosine) in zip(stars, row)]
            rows.append([rank, *cells])
        content += element("h3", query) + table(["", *(a.label for a in answers)], rows, "texts")
    return content


def pairs_part(answers: list[Answers], pairs: Pairs) -> str:
    by_rating = percentiles(pairs[2])  # (P,)
    by_cosine = np.stack([percentiles(a.cosines) for a in answers])  # (models, P)
    head = ["pair", "rating", "percentile by rating", *(a.label for a in answers)]

    def pairs_table(title: str, differences: np.ndarray) -> str:
        rows = []
        for i in np.argsort(-differences, kind="stable")[:5]:
            numbers = [f"{percentile:.1f}" for percentile in (by_rating[i], *by_cosine[:, i])]
            rows.append([f"{pairs[0][i]}\n{pairs[1][i]}", f"{pairs[2][i]:.2f}", *numbers])
        return element("h3", title) + table(head, rows, "numbers")

    text = (
        "Pairs whose rank by cosine differs most from their rank by rating. A percentile is the "
        "share of all pairs that are less similar, by rating or by a model's cosine."
    )
    content = section("Most telling pairs", text)
    for a, own in zip(answers, by_cosine):
        content += pairs_table(f"{a.label}: too similar", own - by_rating)
        content += pairs_table(f"{a.label}: too different", by_rating - own)
    if len(answers) > 1:
        content += pairs_table("The models differ most", np.ptp(by_cosine, axis=0))
    return content


# ------------------------------------------------------------------------------------------------
# Command line


def parse_args() -> argparse.Namespace:
    parser = Parser("python -m lab.report", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="a run's folder")
    add("--out", metavar="FILE", default="report.html", help="(default: report.html)")
    add("--data", metavar="DIR", default="", help="folder with STS/: use STS-B dev's pairs")
    add("--query", metavar="TEXT", nargs="+", action="extend", help="show these neighbours")
    add("--json", metavar="FILE", help="also write the groups' numbers")
    add_encoder_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # use models in the Hub's cache, download nothing
    folders = {Path(name).resolve(): name for name in args.runs}  # each once
    groups = group_runs([read_run(name) for name in folders.values()])
    curves = {
        field: {g.letter: plots.mean_curve([run.log for run in g.runs], field) for g in groups}
        for field in CURVES
    }
    head, rows, each = score_tables(groups)
    print(format_table(head, rows), flush=True)
    content = scores_part(groups, head, rows, each)
    try:
        plots.load_pyplot()
        has_charts = True
        content += curves_part(curves)
    except UserError as error:  # no matplotlib
        has_charts = False
        content += element("p", f"No charts: {error}")
        print(f"no charts: {error}", file=sys.stderr)
    content += models_part(groups, args, has_charts)
    page = fill_template(f"DiffCSE: {Path(args.out).stem}", content)
    write_atomically(args.out, page)
    if args.json:
        numbers = {"score": groups[0].runs[0].cfg["score"], "groups": to_json(groups, curves)}
        write_atomically(args.json, json.dumps(numbers, indent=1) + "\n")
    print(f"{args.out}: {len(page.encode()) / 1000:.0f} kB")


def to_json(groups: list[Group], curves: dict[str, dict[str, dict]]) -> list[dict]:
    names, rows = differing([g.runs[0] for g in groups]), []
    for g in groups:
        values = settings(g.runs[0])
        rows.append(
            {
                "name": g.name,
                "differs": {name: values.get(name) for name in names},
                "seeds": [run.cfg["seed"] for run in g.runs],
                "runs": [run.folder for run in g.runs],
                "commands": [run.results["command"] for run in g.runs if run.results],
                "curves": {field: curves[field][g.letter] for field in CURVES},
                "table": scores_of(g.runs),
            }
        )
    return rows


if __name__ == "__main__":
    run_main(main)
