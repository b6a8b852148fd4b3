"""One HTML page about one or several runs: scores, curves, and what their models do.

    python -m lab.report RUN...                                # writes report.html
    python -m lab.report RUN... --out FILE.html --json FILE    # and the numbers
    python -m lab.report RUN... --data DIR --query "A man is playing a guitar."

RUN is a run's folder. Runs that differ in their seeds only are one group. An unfinished run, or one
without best/, is shown as far as it goes. The page is one file without scripts and needs no
network; its charts need matplotlib. The table of scores is also printed.

Shapes: P pairs.
Not here: test sets' sentences, which whoever selects by this page must not see; downloads.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
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
from eval_sts import Pairs, average_ranks, make_score, spearman
from lab import plots
from lab.ablations import AblationConfig
from lab.analysis import nearest, vectors_of
from lab.tables import format_table

NOT_COMPARED = {"seed", "out_dir", "d_from", *MAY_CHANGE}  # may differ within a group
CURVES = {  # fields of log.jsonl, and what to look for
    "score": "dev score x 100, which selects the best model",
    "contrastive": "contrastive loss: log B if the views tell nothing (4.16 for 64 sentences)",
    "difference": "loss of the discriminator, per token: log 2 = 0.69 is guessing",
    "positive_cosine": "of a sentence's two views: should rise",
    "negative_cosine": "of different sentences: should stay near 0; if it rises, vectors collapse",
    "accuracy_replaced": "share of replaced tokens that D finds: 0 if it calls all original",
    "accuracy_original": "share of original tokens that D calls original: near 1 is easy",
    "h_gap": "rise of D's loss if it gets another sentence's h: 0 if D does not read h",
    "share_replaced": "share of tokens that the generator changed",
    "grad_norm": "gradient norm before clipping; a peak is an unusual step",
}

# ------------------------------------------------------------------------------------------------
# Runs, and groups of them


class Run(NamedTuple):
    folder: str  # as on the command line
    cfg: dict[str, object]
    settings: dict[str, str]  # what may differ between groups: cfg, and the program
    log: list[dict]
    results: dict  # {}: the run has not finished


class Group(NamedTuple):
    letter: str
    name: str  # the settings that differ between groups
    runs: list[Run]  # by seed
    curves: dict[str, dict[str, list]]  # plots.mean_curve of each field
    scores: dict[str, dict]  # summarize, of the finished runs


def read_run(folder: str) -> Run:
    """Raises: UserError or ModelError if the folder has no run, or a file of it is damaged."""
    path = Path(folder)
    for name in ("config.json", "log.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{folder}: not a run's folder such as runs/demo-1 (no {name})")
    cfg = asdict(AblationConfig()) | read_json(path / "config.json")
    results_file = path / "results.json"
    results = read_json(results_file) if results_file.is_file() else {}
    settings = {name: shown(value) for name, value in cfg.items() if name not in NOT_COMPARED}
    program = re.search(r"[^\s/\\]+\.py\b", results.get("command", ""))
    settings["program"] = program[0] if program else "diffcse.py"
    return Run(folder, cfg, settings, plots.read_log(path / "log.jsonl"), results)


def shown(value: object) -> str:
    """A setting as on the command line."""
    text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    return {"True": "on", "False": "off", "None": "default", "": "none"}.get(text, text)


def group_runs(runs: list[Run]) -> list[Group]:
    defaults = {name: "default" for run in runs for name in run.settings}
    runs = [run._replace(settings=defaults | run.settings) for run in runs]
    differing = [name for name in defaults if len({run.settings[name] for run in runs}) > 1]
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.cfg["seed"]):
        key = ", ".join(f"{name} {run.settings[name]}" for name in differing)
        found.setdefault(key, []).append(run)
    groups = []
    for i, (name, same) in enumerate(found.items()):
        name = name or same[0].results.get("config", "run")
        curves = {field: plots.mean_curve([run.log for run in same], field) for field in CURVES}
        scores = summarize([scores_of(run.results) for run in same if run.results])
        groups.append(Group(chr(ord("A") + i), name, same, curves, scores))
    return groups


def scores_of(results: dict) -> dict[str, float]:
    return results["after"] | {name: results[name] for name in ("dev_best", "best_step", "minutes")}


def summarize(each: list[dict[str, float]]) -> dict[str, dict]:
    """Mean, population standard deviation (None of one value) and the values of each score."""
    table = {}
    for name in dict.fromkeys(name for scores in each for name in scores):
        values = np.round([scores[name] for scores in each if name in scores], 6)
        std = round(float(values.std()), 6) if len(values) > 1 else None
        table[name] = {"mean": round(float(values.mean()), 6), "std": std, "each": values.tolist()}
    return table


# ------------------------------------------------------------------------------------------------
# HTML. Text is escaped here


def element(tag: str, text: object, attributes: str = "") -> str:
    return f"<{tag}{attributes}>{escape(str(text))}</{tag}>\n"


def section(title: str, text: str, charts: Sequence[str] = ()) -> str:
    grid = f'<div class="grid">{"".join(charts)}</div>\n' if charts else ""
    return element("h2", title) + element("p", text) + grid


def table(head: Sequence[str], rows: Iterable[Sequence[object]], css: str) -> str:
    """The first cell of a row is its title. css: numbers (to the right) or texts."""
    lines = ["".join(element("th", cell, ' scope="col"') for cell in head)]
    for title, *cells in rows:
        row_title = element("th", title, ' scope="row"')
        lines.append(row_title + "".join(element("td", cell) for cell in cells))
    first, *others = (f"<tr>{line}</tr>\n" for line in lines)
    content = f"<thead>{first}</thead><tbody>{''.join(others)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="{css}">{content}</table></div>\n'


def chart(title: str, text: str, plot: Callable, *data: object) -> str:
    try:
        svg = plots.to_svg(plot(*data), title)
    except UserError as error:  # no matplotlib
        svg = escape(str(error))
    caption = element("b", title) + escape(text)
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>\n"


# ------------------------------------------------------------------------------------------------
# Scores and curves


def start_of(run: Run) -> str:
    return f"before: {run.cfg['model']}, {run.cfg['pooling']}"


def score_table(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    """Column titles; rows of the models before training, and of the groups."""
    rows = {}  # title -> seeds, numbers
    for run in (run for g in groups for run in g.runs if run.results):
        before = run.results["before"] | {"dev_best": run.results["dev_before"]}
        first_last = run.results["before_first_last"]
        rows[start_of(run)] = ["-", summarize([before])]
        rows[f"before: {run.cfg['model']}, first-last average"] = ["-", summarize([first_last])]
    for g in groups:
        seeds = " ".join(str(run.cfg["seed"]) for run in g.runs)
        rows[f"{g.letter}: {g.name}"] = [seeds, g.scores]
    names = dict.fromkeys(name for g in groups for name in g.scores)
    head, lines = ["", "seeds", *names], []
    for title, (seeds, numbers) in rows.items():
        lines.append([title, seeds, *(plus_minus(numbers.get(name)) for name in names)])
    return head, lines


def plus_minus(column: dict | None) -> str:
    if column is None:
        return "-"
    spread = "" if column["std"] is None else f" ± {column['std']:.2f}"
    return f"{column['mean']:.2f}{spread}"


def scores_part(groups: list[Group], head: list[str], rows: list[list[str]]) -> str:
    text = (
        "Spearman x 100 of the best model: mean ± standard deviation over seeds. "
        "Dev best selected the model, so it is slightly too high."
    )
    runs = [run for g in groups for run in g.runs]
    if unfinished := [run.folder for run in runs if not run.results]:
        text += f" Not finished, so not in this table: {', '.join(unfinished)}."
    facts = [run.results[key] for key in ("command", "machine") for run in runs if run.results]
    values = [[name, *(g.runs[0].settings[name] for g in groups)] for name in runs[0].settings]
    details = table(["setting", *(g.letter for g in groups)], values, "texts")
    details += element("pre", "\n".join(dict.fromkeys(map(str, facts))))
    summary = element("summary", "Settings, commands and machines")
    content = section("Scores", text) + table(head, rows, "numbers")
    return content + f"<details>{summary}{details}</details>\n"


def curves_part(groups: list[Group]) -> str:
    charts, letters = [], [g.letter for g in groups]
    for field, text in CURVES.items():
        curves = [g.curves[field] for g in groups]
        if any(curve["steps"] for curve in curves):
            charts.append(chart(field, text, plots.plot_curves, letters, curves))
    text = "Means over a group's seeds, with a band of one standard deviation."
    return section("Curves", text, charts)


# ------------------------------------------------------------------------------------------------
# What the models compute: cosines of rated pairs, and neighbours of queries


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


def models_part(groups: list[Group], data: str, queries: list[str], device: str, amp: str) -> str:
    """Similarity by rating, neighbours, and most telling pairs, of the saved models."""
    models = {}
    for g in groups:
        for run in [run for run in g.runs if (Path(run.folder) / "best").is_dir()][:1]:
            models = {start_of(run): (run.cfg["model"], run.cfg["pooling"])} | models
            models[g.letter] = (run.folder, run.cfg["pooling"])
    name, pairs = find_pairs(data, groups[0].runs[0].cfg)
    left, right, ratings = pairs
    queries = queries or [left[i * len(left) // 3] for i in range(3)]
    torch_device, dtype = pick_device(device, amp)
    vectors, cosines, notes = {}, {}, ""  # vectors: model -> sentence -> (D,)
    for label, (folder, pooling) in models.items():
        try:
            model = load_model(folder)
            bert = model.bert.to(torch_device)
            encoder = partial(encode, bert, model.tokenizer, pooling=pooling, amp=dtype)
            own = vectors_of(encoder, [*left, *right, *queries])
        except (UserError, ModelError) as error:  # it may be on another machine, or have diverged
            notes += element("p", f"Left out: {label}: {error}")
        else:
            vectors[label] = own
            cosines[label] = np.array([own[a] @ own[b] for a, b in zip(left, right)])
    if not vectors:
        return notes or element("p", "No run has a saved model (best/), so there are no examples.")
    content = notes + similarity_part(name, cosines, ratings)
    return content + neighbours_part(vectors, pairs, queries) + pairs_part(cosines, pairs)


def similarity_part(name: str, cosines: dict[str, np.ndarray], ratings: list[float]) -> str:
    text = (
        f"Of {name}, {len(ratings):,} rated pairs. A row is the distribution of the cosine of "
        "pairs with similar ratings; the mark is its median. In a good model the rows move to the "
        "right as the rating rises, and overlap little; how far to the right all of them are is "
        "irrelevant. A group's model is that of the lowest seed."
    )
    charts, lowest = [], min(own.min() for own in cosines.values())
    for label, own in cosines.items():
        caption = f"Spearman x 100: {100 * spearman(own, ratings):.2f}"
        panels = [("", own, np.array(ratings))]
        charts.append(chart(label, caption, plots.plot_ridges, panels, lowest))
    return section("Similarity by rating", text, charts)


def neighbours_part(vectors: dict[str, dict], pairs: Pairs, queries: list[str]) -> str:
    content = section("Nearest neighbours", "The sentences with the highest cosine.")
    corpus = list(dict.fromkeys(pairs[0] + pairs[1]))
    for query in queries:
        found = [nearest(query, corpus, of, 5) for of in vectors.values()]
        columns = [[f"{cosine:.2f} {sentence}" for sentence, cosine in best] for best in found]
        rows = zip(range(1, 6), *columns)
        content += element("h3", query) + table(["", *vectors], rows, "texts")
    return content


def pairs_part(cosines: dict[str, np.ndarray], pairs: Pairs) -> str:
    text = "Pairs whose rank by cosine differs most from their rank by rating."
    content, head = section("Most telling pairs", text), ["pair", "rating", *cosines]
    for label, own in cosines.items():
        difference = average_ranks(own) - average_ranks(np.array(pairs[2]))  # (P,)
        for title, sign in (("too similar", -1), ("too different", 1)):
            rows = []
            for i in np.argsort(sign * difference, kind="stable")[:5]:
                numbers = [f"{values[i]:.2f}" for values in (pairs[2], *cosines.values())]
                rows.append([f"{pairs[0][i]}\n{pairs[1][i]}", *numbers])
            content += element("h3", f"{label}: {title}") + table(head, rows, "numbers")
    return content


# ------------------------------------------------------------------------------------------------
# Command line


def main() -> None:
    parser = Parser("python -m lab.report", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="a run's folder")
    add("--out", metavar="FILE", default="report.html", help="(default: report.html)")
    add("--data", metavar="DIR", default="", help="folder with STS/: use STS-B dev's pairs")
    add("--query", metavar="TEXT", nargs="+", action="extend", help="show these neighbours")
    add("--json", metavar="FILE", help="also write the groups' numbers")
    add_encoder_flags(parser)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # use models in the Hub's cache, download nothing
    folders = {Path(name).resolve(): name for name in args.runs}  # each once
    groups = group_runs([read_run(name) for name in folders.values()])
    head, rows = score_table(groups)
    print(format_table(head, rows), flush=True)
    content = scores_part(groups, head, rows) + curves_part(groups)
    content += models_part(groups, args.data, args.query, args.device, args.amp)
    template = Path(__file__).with_suffix(".html").read_text("utf-8")
    title = escape(f"DiffCSE: {Path(args.out).stem}")
    page = template.replace("$TITLE", title).replace("$CONTENT", content)
    write_atomically(args.out, page)
    if args.json:
        numbers = [
            {
                "name": g.name,
                "settings": g.runs[0].cfg,
                "seeds": [run.cfg["seed"] for run in g.runs],
                "runs": [run.folder for run in g.runs],
                "commands": [run.results["command"] for run in g.runs if run.results],
                "curves": g.curves,
                "table": g.scores,
            }
            for g in groups
        ]
        numbers = {"score": groups[0].runs[0].cfg["score"], "groups": numbers}
        write_atomically(args.json, json.dumps(numbers, indent=1) + "\n")
    print(f"{args.out}: {len(page.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    run_main(main)
