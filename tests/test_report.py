"""lab/report.py: groups, every number of the page against numpy and scipy, escapes, mistakes."""

import json
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.stats import rankdata, spearmanr

from diffcse import PRESETS
from embed import DiffCSE
from eval_sts import load_set, make_score
from lab import plots, report
from lab.ablations import AblationConfig

pytest.importorskip("matplotlib", reason="charts need matplotlib")
SMALL = ROOT / "assets" / "small-bert"
COLUMNS = ("STSB-dev", "STS12", "average")
BEFORE = f"before: {SMALL}, cls_before_pooler"


class Page:
    """A page: tables as rows of cells, charts' names, visible text. XML is stricter than HTML."""

    def __init__(self, html: str):
        self.html = html
        root = ElementTree.fromstring(re.sub("<meta.*?>|xlink:", "", html))
        tables = [table.iter("tr") for table in root.iter("table")]
        self.tables = [[["".join(c.itertext()).strip() for c in row] for row in t] for t in tables]
        self.charts = [svg.get("aria-label") for svg in root.iter("svg")]
        self.headings = [heading.text for heading in root.iter("h3")]
        self.text = "".join(root.find("body").itertext())


def make_run(folder: Path, finished=True, best=False, program="diffcse.py", **settings) -> Path:
    """A run's folder with random numbers, logged at steps 1, 10, 20, 30, 40."""
    preset = AblationConfig(**asdict(PRESETS["small"]))
    cfg = replace(preset, **{"model": str(SMALL), "steps": 40, **settings})
    rng = np.random.default_rng([cfg.seed, int(1e6 * cfg.lam)])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(cfg)))
    log = [{"step": 0, "score": 50.0}]
    for step in (1, 10, 20, 30, 40) if finished else (1, 10, 20):
        row = {"step": step, "contrastive": rng.random()}
        if cfg.lam:
            row |= {"difference": rng.random(), "accuracy_replaced": None}
        log += [row, {"step": step, "score": 60 + rng.random()}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    results = {
        "config": "small",
        "before": dict.fromkeys(COLUMNS, 48.5),
        "before_first_last": dict.fromkeys(COLUMNS, 39.25),
        "after": {name: 100 * rng.random() for name in COLUMNS},
        "dev_before": 50.0,
        "dev_best": 60 + rng.random(),
        "best_step": int(10 * rng.integers(1, 5)),
        "minutes": 1.25 + cfg.seed,
        "command": f"python {program} --config small --seed {cfg.seed} --out-dir {folder}",
        "machine": {"python": "3.11.7", "device": "cpu"},
    }
    if finished:
        (folder / "results.json").write_text(json.dumps(results))
    if best:
        (folder / "best").symlink_to(SMALL)
    return folder


@pytest.fixture
def make(command, tmp_path):
    """The command: its page, what it printed, its JSON."""

    def run(*words):
        out, numbers = tmp_path / "page.html", tmp_path / "page.json"
        done = command(report.main, *words, "--out", out, "--json", numbers)
        assert done.code == 0, done.err
        return Page(out.read_text()), done, json.loads(numbers.read_text())

    return run


def test_groups_are_runs_with_equal_settings(tmp_path):
    """Seed, folders and logging are not compared. A copy of diffcse.py may have the same config;
    lab/ablations.py computes the same."""
    others = {"log_every": 3, "eval_every": 7, "device": "cpu", "compile": True, "out_dir": "x"}
    equal = [{"seed": 2, **others, "save_minutes": 1.0}, {"seed": 1, "data": "elsewhere"}, {}]
    equal.append({"program": "-m lab.ablations", "seed": 50})
    different = [{"lam": 0.0, "lr": 1e-3}, {"lam": 0.0, "lr": 1e-3, "projector": "tanh"}]
    different.append({"program": "exercises/detached.py"})
    folders = [
        str(make_run(tmp_path / str(i), **changes)) for i, changes in enumerate(equal + different)
    ]
    runs = [report.read_run(folder) for folder in folders]
    (one,) = report.group_runs(runs[:4])
    assert (one.letter, one.name) == ("A", "small")
    assert [run.cfg["seed"] for run in one.runs] == [1, 2, 42, 50]
    assert [(g.letter, g.name, len(g.runs)) for g in report.group_runs(runs)] == [
        ("A", "lr 0.0001, projector batchnorm, lam 0.05, program diffcse.py", 4),
        ("B", "lr 0.001, projector batchnorm, lam 0, program diffcse.py", 1),
        ("C", "lr 0.001, projector tanh, lam 0, program diffcse.py", 1),
        ("D", "lr 0.0001, projector batchnorm, lam 0.05, program detached.py", 1),
    ]
    path = tmp_path / "0" / "config.json"
    new = {"a_new_field": [True], "contrastive": False, "model": ""}
    path.write_text(json.dumps(json.loads(path.read_text()) | new))
    names = [g.name for g in report.group_runs([report.read_run(folders[0]), runs[1]])]
    assert names[0] == f"model {SMALL}, contrastive on, a_new_field default"
    assert names[1] == "model none, contrastive off, a_new_field [True]"


def test_the_page_has_every_number(tmp_path, make):
    """Of the finished runs: mean and population standard deviation, and every run's."""
    kinds = [{"lam": 0.0, "seed": i} for i in (2, 0, 1)] + [{"seed": 0}, {"lam": 0.5, "seed": 1}]
    folders = [str(make_run(tmp_path / str(i), **kind)) for i, kind in enumerate(kinds)]
    results = [json.loads((Path(folder) / "results.json").read_text()) for folder in folders]
    unfinished = str(make_run(tmp_path / "short", finished=False, lam=0.0, seed=3))
    page, done, numbers = make(*folders, unfinished, folders[0])  # a run named twice counts once
    scores, settings = page.tables
    rows = {title: cells for title, *cells in scores}
    names = [*COLUMNS, "dev_best", "best_step", "minutes"]
    assert rows[""] == ["seeds", *names]
    assert rows[BEFORE] == ["-", "48.50", "48.50", "48.50", "50.00", "-", "-"]
    assert rows[f"before: {SMALL}, first-last average"] == ["-"] + ["39.25"] * 3 + ["-"] * 3
    assert f"Not finished, so not in this table: {unfinished}." in page.text
    groups = [("A: lam 0", [1, 2, 0]), ("B: lam 0.05", [3]), ("C: lam 0.5", [4])]
    for (title, members), group in zip(groups, numbers["groups"], strict=True):
        own = [results[i] for i in members]
        assert list(group["table"]) == names
        for name, cell in zip(names, rows[title][1:], strict=True):
            values = [(result | result["after"])[name] for result in own]
            mean, std = np.mean(values), np.std(values) if len(own) > 1 else None
            column = group["table"][name]
            assert [column["mean"], *column["each"]] == pytest.approx([mean, *values], abs=1e-6)
            assert column["std"] == (std and pytest.approx(std, abs=1e-6))
            assert cell == f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")
        assert rows[title][0] == " ".join(map(str, group["seeds"]))
        assert group["commands"] == [result["command"] for result in own]
        assert f"{title[:1]}: {group['name']}" == title and group["commands"][0] in page.text
        printed = next(line for line in done.out.splitlines() if title in line)
        assert [cell.strip() for cell in printed.strip("|").split("|")] == [title, *rows[title]]
    assert [group["seeds"] for group in numbers["groups"]] == [[0, 1, 2, 3], [0], [1]]
    assert numbers["groups"][0]["runs"] == [folders[1], folders[2], folders[0], unfinished]
    assert settings[0] == ["setting", "A", "B", "C"]
    assert ["lam", "0", "0.05", "0.5"] in settings and ["batch_size", *["64"] * 3] in settings
    assert page.text.count(str(results[0]["machine"])) == 1
    for curve in ("score", "contrastive", "difference"):
        logs = [plots.read_log(tmp_path / name / "log.jsonl") for name in ("1", "2", "0", "short")]
        assert numbers["groups"][0]["curves"][curve] == plots.mean_curve(logs, curve)


def test_unfinished_runs_alone(tmp_path, make):
    page, _, numbers = make(make_run(tmp_path / "r", finished=False))
    assert page.tables[0] == [["", "seeds"], ["A: run", "42"]]
    assert numbers["groups"][0]["curves"]["score"]["steps"] == [0, 1, 10, 20]
    assert numbers["groups"][0]["table"] == {} and "No run has a saved model" in page.text
    (tmp_path / "r" / "log.jsonl").write_text("")
    assert make(tmp_path / "r")[0].charts == []


def test_markup_in_names_and_queries_is_escaped(tmp_path, make, made):
    folder = tmp_path / '<script>alert("1")<' / "script>&amp;\"'"
    query = "<script>alert('query')</script> \"quoted\" & <b>"
    model = tmp_path / '"><b>&'
    model.symlink_to(SMALL)
    run = make_run(folder, best=True, model=str(model))
    page, _, _ = make(run, "--data", made, "--query", query, "a cat")
    assert query in page.headings and str(folder) in page.text
    assert f"before: {model}, cls_before_pooler" in page.charts
    assert "<script" not in page.html.lower() and "<b>&" not in page.html


def test_the_page_is_complete_and_loads_nothing(tmp_path, make, made):
    folders = [make_run(tmp_path / f"{x}", lam=x, best=True) for x in (0.0, 0.5)]
    page, done, _ = make(*folders, "--data", made)
    text = page.html.lower().replace(str(tmp_path), "")
    assert not re.search(r"https?:|//|<script|src=|@import|url\((?!#)|<link|<iframe", text)
    assert re.findall(r"<h(\d)", text)[:2] == ["1", "2"] and "$" not in text
    assert all(table and len({len(row) for row in table}) == 1 for table in page.tables)
    assert page.charts == ["score", "contrastive", "difference", BEFORE, "A", "B"]
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):", text))
    assert text.count('" fill="currentcolor" role="img"') == len(page.charts)
    assert text.count("currentcolor") > 50 and "#000000" not in text and done.err == ""
    names = re.findall(r' id="(\w+)"', text)
    assert all(name[0] in "mp" and len(name) == 11 for name in names)  # a hash of what they name
    size = f"{len(page.html.encode()) / 1000:.0f} kB"
    assert done.out.splitlines()[-1] == f"{tmp_path / 'page.html'}: {size}"


def test_without_matplotlib_there_are_no_charts(tmp_path, make, made, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page, _, _ = make(make_run(tmp_path / "r", best=True), "--data", made)
    assert page.charts == [] and "Most telling pairs" in page.text
    assert page.text.count("plots need matplotlib: pip install matplotlib") == 5


def test_similarities_neighbours_and_pairs_are_the_models(tmp_path, make, made, monkeypatch):
    left, right, ratings = load_set("STSB-dev", made)
    known, query, drawn = left[0], "the cat eats fish", []
    draw = plots.plot_ridges
    monkeypatch.setattr(plots, "plot_ridges", lambda *args: drawn.append(args) or draw(*args))
    folders = [make_run(tmp_path / "a", best=True, seed=7), make_run(tmp_path / "b", seed=1)]
    folders += [make_run(tmp_path / "c", lam=0.9, best=True), make_run(tmp_path / "d", seed=8)]
    (folders[-1] / "best").mkdir()  # not read: A's model is that of its lowest seed, 7
    page, _, _ = make(*folders, "--data", made, "--query", query, known)
    model = DiffCSE(SMALL, device="cpu")
    u, v = (model.encode(side, return_numpy=True).astype(np.float64) for side in (left, right))
    cosines = (u * v).sum(1)
    rho = spearmanr(cosines, ratings)[0]
    printed = list(map(float, re.findall(r"Spearman x 100: ([\d.]+)", page.html)))
    assert printed == pytest.approx([100 * rho] * 3, abs=0.02)  # before and both: one model
    assert "Of STSB-dev, 1,500 rated pairs" in page.text
    for ((_, x, y),), lowest in drawn:
        assert x == pytest.approx(cosines, abs=1e-6) and y.tolist() == ratings
        assert lowest == pytest.approx(cosines.min(), abs=1e-6)

    model.build_index(list(dict.fromkeys(left + right)))
    tables = [table for table in page.tables if table[0] == ["", BEFORE, "A", "B"]]
    for table, text in zip(tables, (query, known), strict=True):
        found = model.search(text, threshold=-1, top_k=6)  # a sentence is not its own neighbour
        expected = [f"{cosine:.2f} {s}" for s, cosine in found if s != text][:5]
        assert table[1:] == [[str(i + 1), *[cell] * 3] for i, cell in enumerate(expected)]

    by_cosine, by_rating = rankdata(cosines), rankdata(ratings)
    keys = [f"{a}\n{b} {rating:.2f}" for a, b, rating in zip(left, right, ratings)]
    tables = [table for table in page.tables if table[0] == ["pair", "rating", BEFORE, "A", "B"]]
    titles = [f"{label}: too {s}" for label in (BEFORE, "A", "B") for s in ("similar", "different")]
    assert page.headings == [query, known, *titles]
    for i, table in enumerate(tables):
        difference, shown = (-1) ** i * (by_cosine - by_rating), []
        for pair, rating, *numbers in table[1:]:
            j = keys.index(f"{pair} {rating}")
            assert numbers == [f"{cosines[j]:.2f}"] * 3
            shown.append(difference[j])
        assert shown == pytest.approx(sorted(difference, reverse=True)[:5], abs=1e-9)


def test_models_that_differ_have_their_own_columns():
    pairs, angles = (["q", "b"], ["c", "d"], [0.5, 4]), {"x": (0, 1, 2, 3), "y": (0, 3, 2.5, 0.5)}
    vectors = {
        label: {s: np.array([np.cos(angle), np.sin(angle)]) for s, angle in zip("qbcd", own)}
        for label, own in angles.items()
    }
    content = report.neighbours_part(vectors, pairs, ["q"])
    cosines = {"x": np.array([0.1, 0.2]), "y": np.array([0.4, 0.3])}
    content += report.pairs_part(cosines, pairs)
    neighbours, *tables = Page(f"<html><body>{content}</body></html>").tables
    assert neighbours[0] == ["", "x", "y"]
    assert neighbours[1:] == [
        ["1", "0.54 b", "0.88 d"],
        ["2", "-0.42 c", "-0.80 c"],
        ["3", "-0.99 d", "-0.99 b"],
    ]
    rows = [["q\nc", "0.50", "0.10", "0.40"], ["b\nd", "4.00", "0.20", "0.30"]]
    assert [table[1:] for table in tables] == [rows, rows, rows, rows[::-1]]


def test_without_data_the_pairs_are_those_that_selected_the_model(tmp_path, make):
    """A model that is missing is left out."""
    pairs = tmp_path / "pairs.tsv"
    texts = ["a cat", "a dog", "the guitar", "a red fish", "a man eats", "cheese", "a car"]
    rows = [f"{a}\t{b}\t{i * 3 % 7}" for i, (a, b) in enumerate(zip(texts, texts[1:]))]
    pairs.write_text("a\tb\tscore\n" + "\n".join(rows) + "\n")
    folder = make_run(tmp_path / "own", best=True, score=str(pairs), model="nowhere/at-all")
    page, _, _ = make(folder)
    encoder = partial(DiffCSE(SMALL, device="cpu").encode, return_numpy=True)
    expected = make_score(str(pairs), "").dev(encoder)["score"]
    assert "Of pairs.tsv, 6 rated pairs." in page.text and page.charts[-1] == "A"
    assert f"Spearman x 100: {expected:.2f}" in page.text
    assert page.headings[:3] == texts[:6:2]
    assert "Left out: before: nowhere/at-all, cls_before_pooler: " in page.text


def test_test_sets_are_never_loaded(made, monkeypatch):
    """And the captions are used if the pairs are on another machine."""
    for score in ("captions", "stsb", "docs"):  # docs: of an older version
        cfg = {"score": score, "data": "/no/such/folder"}
        assert report.find_pairs("", cfg)[0] == "captions-dev"
    asked = []
    monkeypatch.setattr(report, "make_score", lambda *args: asked.append(args) or make_score(*args))
    for data, own in (("", made), (made, "elsewhere")):
        assert report.find_pairs(data, {"score": "stsb", "data": own})[0] == "STSB-dev"
    assert asked == [("dev", made)] * 2


def test_a_diverged_model_is_left_out(tmp_path, make, made, monkeypatch):
    used = []

    def broken(bert, tokenizer, sentences, **settings):
        used.append(settings)
        return np.full((len(sentences), 3), np.nan)

    monkeypatch.setattr(report, "encode", broken)
    folder = make_run(tmp_path / "r", best=True, pooling="mean")
    page, _, _ = make(folder, "--data", made, "--device", "cpu", "--amp", "bf16")
    assert page.text.count("the model's vectors have NaN or infinity") == 2
    assert "Most telling pairs" not in page.text
    assert used == [{"pooling": "mean", "amp": torch.bfloat16}] * 2


MISTAKES = [  # a file of the run, what it has; words; the error
    ("config.json", None, [], "not a run's folder such as runs/demo-1 (no config.json)"),
    ("log.jsonl", None, [], "(no log.jsonl)"),
    ("log.jsonl", b'{"step": 1}\n{"step": 1, "sco', [], "log.jsonl line 2: not JSON"),
    ("log.jsonl", b'{"step": 50, "x": "\xe9"}\n', [], "log.jsonl line 1: not UTF-8"),
    ("config.json", b'["lr"]', [], "config.json cannot be read: expected dict, found list"),
    ("results.json", b'{"config": "small",\n "seed"', [], "results.json cannot be read"),
    ("more", b"", ["--out", "run"], "cannot write run"),
    ("more", b"", ["--data", "."], "no folder STS in it"),
    ("more", b"", ["--nonsense"], "--nonsense"),
]


@pytest.mark.parametrize("name, content, words, message", MISTAKES)
def test_mistakes_are_one_line(tmp_path, command, monkeypatch, name, content, words, message):
    monkeypatch.chdir(tmp_path)
    path = make_run(tmp_path / "run", score="captions") / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    done = command(report.main, "run", *words)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert not Path("report.html").exists()
