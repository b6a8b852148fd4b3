"""lab/report.py: groups, every number of the page against numpy and scipy, escapes, mistakes."""

import json
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from diffcse import PRESETS
from embed import DiffCSE
from eval_sts import load_set, make_score
from lab import plots, report
from lab.ablations import AblationConfig

pytest.importorskip("matplotlib", reason="charts need matplotlib")
SMALL = Path(__file__).parent.parent / "assets" / "small-bert"
COLUMNS = ("STSB-dev", "STS12", "average")
BEFORE = f"before: {SMALL}, cls_before_pooler"


class Page(HTMLParser):
    """A parsed page: tables as rows of cells, charts' names, visible text. Tags must balance."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.open, self.tables, self.charts, self.text = html, [], [], [], ""
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            assert tag == "td" or dict(attrs)["scope"] in ("row", "col")
        elif tag == "svg":
            self.charts.append(dict(attrs)["aria-label"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if "style" not in self.open:
            self.text += data

    def rows(self, column: str) -> dict[str, list[str]]:
        """First cell -> other cells, of the first table that has this column."""
        table = next(table for table in self.tables if column in table[0])
        return {title: cells for title, *cells in table[1:]}


def make_run(
    folder: Path, finished: bool = True, best: bool = False, program: str = "diffcse.py", **settings
) -> Path:
    """A run's folder with random numbers, logged at steps 1, 10, 20, 30, 40."""
    preset = AblationConfig(**asdict(PRESETS["small"]))
    cfg = replace(preset, **{"model": str(SMALL), "steps": 40, **settings})
    rng = np.random.default_rng([cfg.seed, int(1e6 * cfg.lam)])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(cfg)))
    log = [{"seconds": 1.0, "step": 0, "score": 50.0}]
    for step in (1, 10, 20, 30, 40) if finished else (1, 10, 20):
        row = {"seconds": 2.0 * step, "step": step, "contrastive": rng.random()}
        if cfg.lam:
            row |= {"difference": rng.random(), "accuracy_replaced": None}
        log += [row, {"seconds": 2.0 * step, "step": step, "score": 60 + rng.random()}]
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
    lr = {"lr": 1e-3}
    different = [{"lam": 0.0, **lr}, {"lam": 0.0, **lr, "projector": "tanh"}]
    different.append({"program": "exercises/detached.py"})
    runs = []
    for i, changes in enumerate(equal + different):
        runs.append(report.read_run(str(make_run(tmp_path / str(i), **changes))))
    (one,) = report.group_runs(runs[:4])
    assert (one.letter, one.name) == ("A", "small")
    assert [run.cfg["seed"] for run in one.runs] == [1, 2, 42, 50]
    groups = report.group_runs(runs)
    assert [(g.letter, g.name, len(g.runs)) for g in groups] == [
        ("A", "lr 0.0001, projector batchnorm, lam 0.05, program diffcse.py", 4),
        ("B", "lr 0.001, projector batchnorm, lam 0, program diffcse.py", 1),
        ("C", "lr 0.001, projector tanh, lam 0, program diffcse.py", 1),
        ("D", "lr 0.0001, projector batchnorm, lam 0.05, program detached.py", 1),
    ]
    path = tmp_path / "0" / "config.json"  # a field of another version
    path.write_text(json.dumps(json.loads(path.read_text()) | {"my_field": [True]}))
    runs[0] = report.read_run(str(path.parent))
    assert [g.name for g in report.group_runs(runs[:2])] == ["my_field default", "my_field [True]"]


def test_the_page_has_every_number(tmp_path, make):
    """Of the finished runs: mean and population standard deviation, and every run's."""
    kinds = [{"lam": 0.0, "seed": i} for i in (2, 0, 1)] + [{"seed": 0}, {"lam": 0.5, "seed": 1}]
    folders = [str(make_run(tmp_path / str(i), **kind)) for i, kind in enumerate(kinds)]
    results = [json.loads((Path(folder) / "results.json").read_text()) for folder in folders]
    unfinished = str(make_run(tmp_path / "short", finished=False, lam=0.0, seed=3))
    page, done, numbers = make(*folders, unfinished, folders[0])  # a run named twice counts once
    rows, runs = page.rows("average"), page.rows("run")
    assert rows[BEFORE] == ["48.50", "48.50", "48.50", "50.00", "-", "-", "-"]
    assert rows["before, first-last average"] == ["39.25"] * 3 + ["-"] * 4
    assert unfinished not in runs and f"{unfinished} has not finished (step 20)" in page.text
    groups = [("A: lam 0", [1, 2, 0]), ("B: lam 0.05", [3]), ("C: lam 0.5", [4])]
    for (title, members), group in zip(groups, numbers["groups"], strict=True):
        own = [results[i] for i in members]
        for i, name in enumerate((*COLUMNS, "dev_best")):
            values = [result["after"].get(name, result["dev_best"]) for result in own]
            mean, std = np.mean(values), np.std(values) if len(own) > 1 else None
            column = group["table"][name]
            assert [column["mean"], *column["each"]] == pytest.approx([mean, *values], abs=1e-6)
            assert column["std"] == (std and pytest.approx(std, abs=1e-6))
            assert rows[title][i] == f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")
            assert [runs[folders[j]][i] for j in members] == [f"{value:.2f}" for value in values]
        steps = " ".join(map(str, sorted({result["best_step"] for result in own})))
        seeds, minutes = group["seeds"], sum(result["minutes"] for result in own)
        assert rows[title][4:] == [steps, " ".join(map(str, seeds)), f"{minutes:.2f}"]
        assert group["commands"] == [result["command"] for result in own]
        assert group["differs"] == {"lam": kinds[members[0]].get("lam", 0.05)}
        assert f"{title[:1]}: {group['name']}" == title and group["commands"][0] in page.text
        printed = next(line for line in done.out.splitlines() if title in line)
        assert printed.strip("| ").split(" | ")[-1].strip() == rows[title][-1]
    assert [group["seeds"] for group in numbers["groups"]] == [[0, 1, 2, 3], [0], [1]]
    assert page.rows("setting")["lam"] == ["0", "0.05", "0.5"]
    assert page.rows("setting")["batch_size"] == ["64"] * 3
    for curve in ("score", "contrastive", "difference"):
        logs = [plots.read_log(tmp_path / name / "log.jsonl") for name in ("1", "2", "0", "short")]
        assert numbers["groups"][0]["curves"][curve] == plots.mean_curve(logs, curve)


def test_unfinished_runs_alone(tmp_path, make):
    page, done, numbers = make(make_run(tmp_path / "r", finished=False))
    assert page.rows("dev best")["A: run"] == ["-", "-", "42", "-"]
    assert numbers["groups"][0]["curves"]["score"]["steps"] == [0, 1, 10, 20]
    assert numbers["groups"][0]["table"] == {} and "No run has a saved model" in page.text
    (tmp_path / "r" / "log.jsonl").write_text("")
    page, _, _ = make(tmp_path / "r")
    assert "(step 0)" in page.text and page.charts == []


def test_markup_in_names_and_queries_is_escaped(tmp_path, make, made):
    folder = tmp_path / '<script>alert("1")<' / "script>&amp;\"'"
    query = "<script>alert('query')</script> \"quoted\" & <b>"
    page, _, numbers = make(make_run(folder, best=True), "--data", made, "--query", query, "a cat")
    assert query in page.text and str(folder) in page.text
    assert numbers["groups"][0]["runs"] == [str(folder)]
    assert "<script" not in page.html.lower() and page.html.count("&lt;script&gt;") > 2
    assert "& <b>" not in page.html and 'alert("' not in page.html


def test_the_page_is_complete_and_loads_nothing(tmp_path, make, made):
    folders = [make_run(tmp_path / f"{x}", lam=x, best=True) for x in (0.0, 0.5)]
    page, done, _ = make(*folders, "--data", made)
    text = page.html.lower().replace(str(tmp_path), "")
    assert not re.search(r"https?:|//|<script|src=|@import|url\((?!#)|<link|<iframe", text)
    assert re.findall(r"<h(\d)", text)[:2] == ["1", "2"] and "$" not in text
    assert all(table and len({len(row) for row in table}) == 1 for table in page.tables)
    assert page.charts == ["score", "contrastive", "difference", BEFORE, "A", "B"]
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):", text))
    assert text.count("currentcolor") > 50 and "#000000" not in text and done.err == ""
    names = re.findall(r' id="(\w+)"', text)
    assert all(name[0] in "mp" and len(name) == 11 for name in names)  # a hash of what they name
    size = f"{len(page.html.encode()) / 1000:.0f} kB"
    assert done.out.splitlines()[-1] == f"{tmp_path / 'page.html'}: {size}"


def test_without_matplotlib_there_are_no_charts(tmp_path, make, made, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page, done, _ = make(make_run(tmp_path / "r", best=True), "--data", made)
    assert page.charts == [] and "Most telling pairs" in page.text
    message = "plots need matplotlib: pip install matplotlib"
    assert page.text.count(message) == 1 and done.err == f"no charts: {message}\n"


def test_similarities_and_neighbours_are_the_models(tmp_path, make, made, monkeypatch):
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
    assert page.html.count(f"Spearman x 100: {100 * rho:.2f}") == 3  # before and both: one model
    assert "Of STSB-dev, 1,500 rated pairs" in page.text
    for ((_, x, y),), lowest in drawn:
        assert x == pytest.approx(cosines, abs=1e-6) and y.tolist() == ratings
        assert lowest == pytest.approx(cosines.min(), abs=1e-6)

    model.build_index(list(dict.fromkeys(left + right)))
    tables = [table for table in page.tables if table[0] == ["", BEFORE, "A", "B"]]
    for table, text in zip(tables, (query, known), strict=True):
        found = model.search(text, threshold=-1, top_k=6)  # a sentence is not its own neighbour
        expected = [f"{cosine:.2f} {s}" for s, cosine in found if s != text][:5]
        assert [row[1:] for row in table[1:]] == [[cell] * 3 for cell in expected]

    by_cosine, by_rating = (100 * (rankdata(x) - 0.5) / len(x) for x in (cosines, ratings))
    pairs = [f"{a}\n{b}" for a, b in zip(left, right)]
    similar, different, *others = (t for t in page.tables if t[0][0] == "pair")
    assert len(others) == 5 and similar[0][1:] == [
        "rating",
        "percentile by rating",
        BEFORE,
        "A",
        "B",
    ]
    for table, sign in ((similar, 1), (different, -1)):
        difference = sign * (by_cosine - by_rating)
        shown = []
        for pair, rating, *percentiles in table[1:]:
            i = [f"{a} {b:.2f}" for a, b in zip(pairs, ratings)].index(f"{pair} {rating}")
            assert percentiles == [f"{by_rating[i]:.1f}"] + [f"{by_cosine[i]:.1f}"] * 3
            shown.append(difference[i])
        assert shown == pytest.approx(sorted(difference, reverse=True)[:5], abs=1e-9)


def test_models_that_differ_are_marked():
    """Sentences in one column only, and pairs with the widest percentiles, of three models."""
    sentences, answers = [f"sentence {i}" for i in range(8)], []
    for name, cosines, found in [
        ("x", [0.1, 0.2, 0.3, 0.4], "ab"),
        ("y", [0.1, 0.4, 0.3, 0.2], "ac"),
        ("z", [0.2, 0.1, 0.3, 0.4], "ab"),
    ]:
        nearest = [[(sentence, 0.5) for sentence in found]]
        answers.append(report.Answers(name, np.array(cosines), 1.0, nearest))
    (table,) = Page(report.neighbours_part(answers, ["q"])).tables
    assert [row[1:] for row in table[1:]] == [["0.50 a"] * 3, ["0.50 b", "0.50 * c", "0.50 b"]]
    pairs = sentences[:4], sentences[4:], [0.0, 1, 2, 3]
    head, *rows = Page(report.pairs_part(answers, pairs)).tables[-1]
    assert head == ["pair", "rating", "percentile by rating", "x", "y", "z"]
    assert rows[0] == ["sentence 1\nsentence 5", "1.00", "37.5", "37.5", "87.5", "12.5"]
    assert [row[1] for row in rows] == ["1.00", "3.00", "0.00", "2.00"]
    (table,) = Page(report.neighbours_part(answers[:1], ["q"])).tables
    assert [row[1:] for row in table[1:]] == [["0.50 a"], ["0.50 b"]]


def test_without_data_the_pairs_are_those_that_selected_the_model(tmp_path, make):
    """And the captions if they are on another machine. A model that is missing is left out."""
    pairs = tmp_path / "pairs.tsv"
    texts = ["a cat", "a dog", "the guitar", "a red fish", "a man eats"]
    rows = [f"{a}\t{b}\t{i * 3 % 7}" for i, (a, b) in enumerate(zip(texts, texts[1:]))]
    pairs.write_text("a\tb\tscore\n" + "\n".join(rows) + "\n")
    folder = make_run(tmp_path / "own", best=True, score=str(pairs), model="nowhere/at-all")
    page, _, _ = make(folder)
    encoder = partial(DiffCSE(SMALL, device="cpu").encode, return_numpy=True)
    expected = make_score(str(pairs), "").dev(encoder)["score"]
    assert "Of pairs.tsv, 4 rated pairs." in page.text and page.charts[-1] == "A"
    assert f"Spearman x 100: {expected:.2f}" in page.text
    assert re.findall("<h3>(.*)</h3>", page.html)[:3] == texts[:3]
    assert re.search("Left out: before: nowhere/at-all, cls_before_pooler: '?nowhere", page.text)
    for score in ("captions", "stsb", "docs"):  # docs: of an older version
        name, _ = report.find_pairs("", {"score": score, "data": "/no/such/folder"})
        assert name == "captions-dev"


def test_test_sets_are_never_loaded(made, monkeypatch):
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


DAMAGED = [  # a file, what it has; the error
    ("config.json", None, "not a run's folder such as runs/demo-1 (no config.json)"),
    ("log.jsonl", None, "(no log.jsonl)"),
    ("log.jsonl", b'{"step": 1}\n{"step": 1, "sco', "log.jsonl line 2: not JSON"),
    ("log.jsonl", b'{"step": 50, "x": "\xe9"}\n', "log.jsonl line 1: not UTF-8"),
    ("config.json", b'["lr"]', "config.json cannot be read: expected dict, found list"),
    ("results.json", b'{"config": "small",\n "seed"', "results.json cannot be read"),
    ("results.json", b'{"config": "small"}', "results.json: 'before' is missing"),
]


@pytest.mark.parametrize("name, content, message", DAMAGED)
def test_damaged_runs_are_a_one_line_error(tmp_path, command, name, content, message):
    path = make_run(tmp_path / "run") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    done = command(report.main, path.parent, "--out", tmp_path / "x.html")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_mistakes_are_a_one_line_error(tmp_path, command, made):
    folder = make_run(tmp_path / "run", best=True)
    for words, message in [
        (["--out", tmp_path], f"cannot write {tmp_path}"),
        (["--data", tmp_path], "no folder STS in it"),
        (["--nonsense"], "--nonsense"),
    ]:
        done = command(report.main, folder, "--data", made, "--out", tmp_path / "x.html", *words)
        assert done.code == 2 and message in done.err and done.err.count("\n") == 1
