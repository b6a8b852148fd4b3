"""lab/report.py: groups, means and spreads against numpy, every number of the page, what is escaped, what is missing, what is wrong."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

import docs
from bert import UserError
from config import PRESETS, Config
from data import run_main
from embed import DiffCSE
from eval_sts import load_set
from lab import report

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"
VOID = {"meta", "br", "hr", "img", "link", "input"}
COLUMNS = ("STSB-dev", "STS12", "average")


class Page(HTMLParser):
    """A page taken apart: tables as rows of cells (text, class); captions; attributes. Fails where tags are not balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tables, self.attributes, self.words, self.svgs = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.attributes += [(tag, name, value) for name, value in attrs.items()]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(["", attrs.get("class", "")])
            assert tag == "td" or attrs["scope"] in ("row", "col")
        elif tag == "svg" and "role" in attrs:
            assert attrs["role"] == "img" and attrs["aria-label"]
            self.svgs.append(attrs["aria-label"])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1][0] += data
        if "style" not in self.open:
            self.words.append(data)

    def text(self) -> str:
        return "".join(self.words).replace("\u00a0", " ")

    def rows(self, head: str) -> dict[str, list[str]]:
        """Heading -> cells, of the first table that has this column."""
        table = next(t for t in self.tables if head in [cell for cell, _ in t[0]])
        return {row[0][0]: [cell.replace("\u00a0", " ") for cell, _ in row[1:]] for row in table}


def make_run(folder: Path, ended: bool = True, best: bool = False, steps: int = 40, old: bool = False, **settings) -> Path:
    """A run's folder with numbers of its own: what fit() writes, at steps 1, 10, 20, ... ; old: with the names of earlier logs."""
    cfg = replace(PRESETS["small"], **{"model": str(SMALL), "steps": 40, **settings})
    rng = np.random.default_rng([cfg.seed, int(1e6 * cfg.lam), int(1e6 * cfg.temperature)])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(cfg)))
    log = [{"seconds": 1.0, "step": 0, "score": 50.0}]
    for step in [1, *range(10, steps + 1, 10)]:
        row = {"contrastive": float(rng.random()), "prediction": float(rng.random()), "accuracy_replaced": None if step == 1 else float(rng.random())}
        if old:
            row["replaced_token"] = row.pop("prediction")
        log.append({"seconds": 2.0 * step, "step": step, "lr": 1e-3, **(row if cfg.lam else {"contrastive": row["contrastive"]})})
        if step > 1:
            log.append({"seconds": 2.0 * step, "step": step, "score": float(60 + rng.random())})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    if ended:
        scores = [(row["score"], row["step"]) for row in log[1:] if "score" in row]
        after = {name: 100 * float(rng.random()) for name in COLUMNS}
        (folder / "results.json").write_text(json.dumps({
            "config": "small", "seed": cfg.seed, "before": dict.fromkeys(COLUMNS, 48.5), "before_first_last": dict.fromkeys(COLUMNS, 39.25), "after": after,
            "dev_before": 50.0, "dev_best": max(scores)[0], "best_step": max(scores)[1], "steps": 40, "minutes": 1.25 + cfg.seed,
            "command": f"python diffcse.py --config small --seed {cfg.seed} --out-dir {folder}", "machine": {"python": "3.11.7", "torch": "2.6.0", "device": "cpu", "threads": 1},
        }))  # fmt: skip
    if best:
        (folder / "best").symlink_to(SMALL)
    return folder


@pytest.fixture
def make(monkeypatch, capsys, tmp_path):
    """The command in this process: (page, its text, what was printed, the JSON)."""
    def run(*words):
        out, numbers = tmp_path / "page.html", tmp_path / "page.json"
        monkeypatch.setattr(sys, "argv", ["lab.report", *map(str, words), "--out", str(out), "--json", str(numbers)])
        report.main()
        return Page(out.read_text()), out.read_text(), capsys.readouterr().out, json.loads(numbers.read_text())

    return run


def says(capsys, monkeypatch, *words) -> str:
    """The one line of an error."""
    monkeypatch.setattr(sys, "argv", ["lab.report", *map(str, words)])
    with pytest.raises(SystemExit) as exit:
        run_main(report.main)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1
    return error


# -------------------------------------------------------------------------------------------------------- numbers


def test_groups_are_of_runs_that_differ_in_what_is_not_computed(tmp_path):
    """Seed, folders and how often one looks make no group; of lr, lam and projector two tell four groups apart."""
    more = [{}, {"seed": 1, "data": "elsewhere"}, {"seed": 2, "log_every": 3, "eval_every": 7, "device": "cpu", "compile": False, "out_dir": "x", "save_minutes": 1.0}]
    runs = [report.read_run(str(make_run(tmp_path / f"a{i}", **settings))) for i, settings in enumerate(more[::-1])]
    (one,) = report.group_runs(runs)
    assert (one.name, one.label) == ("small", "small") and [run.cfg.seed for run in one.runs] == [1, 2, 42]
    others = [{"lam": 0.0, "lr": 1e-3}, {"lam": 0.0, "lr": 1e-3, "projector": "tanh"}, {"lam": 0.5, "lr": 1e-3}]
    runs += [report.read_run(str(make_run(tmp_path / f"b{i}", **settings))) for i, settings in enumerate(others)]
    groups = report.group_runs(runs)
    assert [g.label for g in groups] == ["A: lam 0.05, projector batchnorm", "B: lam 0, projector batchnorm", "C: lam 0, projector tanh", "D: lam 0.5, projector batchnorm"]
    assert [len(g.runs) for g in groups] == [3, 1, 1, 1] and len({g.css for g in groups}) == 4
    assert report.differing([report.settings(g.runs[0]) for g in groups]) == ["lr", "projector", "lam"]


def test_many_groups_are_all_told_apart():
    rng = np.random.default_rng(0)
    for _ in range(50):
        choices = {"lr": [1e-3, 1e-4], "lam": [0.0, 0.1, 0.2], "projector": ["tanh", "batchnorm"], "dropout": [None, 0.0], "edit": ["argmax", "sample"]}
        configs = [Config(**{name: values[rng.integers(len(values))] for name, values in choices.items()}) for _ in range(rng.integers(1, 9))]
        groups = report.group_runs([report.Run("x", cfg, [], {}) for cfg in configs])
        different = {tuple(asdict(cfg).values()) for cfg in configs}
        assert len(groups) == len(different) == len({g.name for g in groups})


def test_curves_equal_numpy_and_an_unfinished_run_just_ends(tmp_path):
    folders = [make_run(tmp_path / str(seed), seed=seed, steps=20 if seed == 2 else 40, ended=seed != 2, old=seed == 1) for seed in range(3)]
    runs = [report.read_run(str(folder)) for folder in folders]
    for field in ("score", "contrastive", "prediction", "accuracy_replaced"):
        names = {field, "replaced_token"} if field == "prediction" else {field}
        values = [{row["step"]: row[name] for line in (folder / "log.jsonl").read_text().splitlines() for row in [json.loads(line)] for name in names & set(row)}
                  for folder in folders]  # fmt: skip
        c = report.curve(runs, field)
        steps = {"score": [0, 10, 20, 30, 40], "accuracy_replaced": [10, 20, 30, 40]}.get(field, [1, 10, 20, 30, 40])
        assert c["steps"] == steps and c["runs"] == [2 if step > 20 else 3 for step in steps]
        for step, mean, std in zip(c["steps"], c["mean"], c["std"]):
            there = [v[step] for v in values if step in v]
            assert (mean, std) == (pytest.approx(np.mean(there), abs=1e-6), pytest.approx(np.std(there), abs=1e-6))
    assert report.curve(runs, "grad_norm") == {"steps": [], "mean": [], "std": [], "runs": []}
    uneven = [report.Run("", Config(), [{"step": s, "score": float(s)} for s in range(0, 61, every)], {}) for every in (10, 15)]
    assert report.curve(uneven, "score")["steps"] == [0, 30, 60]


def test_the_table_is_mean_and_population_standard_deviation(tmp_path):
    folders = [make_run(tmp_path / str(seed), seed=seed, ended=seed < 3) for seed in range(4)]
    runs = [report.read_run(str(folder)) for folder in folders]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders[:3]]
    t = report.table_of(runs)  # the unfinished run does not count
    for name in COLUMNS:
        of = [r["after"][name] for r in results]
        assert t[name] == {"mean": pytest.approx(np.mean(of), abs=1e-6), "std": pytest.approx(np.std(of), abs=1e-6), "each": pytest.approx(of, abs=1e-6)}
    assert t["best_step"]["each"] == [r["best_step"] for r in results]
    assert report.table_of(runs[:1])["average"]["std"] is None
    last = report.table_of(runs[3:])  # and alone it has what its log says
    scores = [row for row in map(json.loads, (folders[3] / "log.jsonl").read_text().splitlines()) if row.get("step") and "score" in row]
    best = max(scores, key=lambda row: row["score"])
    assert set(last) == {"dev_before", "dev_best", "best_step", "minutes"} and last["dev_best"]["each"] == [round(best["score"], 6)]
    assert last["best_step"]["each"] == [best["step"]] and last["minutes"]["mean"] == round(80 / 60, 2)


def test_percentiles_equal_scipy_and_the_worst_pairs_a_sort():
    rng = np.random.default_rng(3)
    for n in (2, 7, 100):
        values = rng.integers(0, 6, n) / 5
        assert report.percentiles(values) == pytest.approx((rankdata(values) - 0.5) / n * 100, abs=1e-12)
    alike, different = report.most_wrong(np.array([0.0, -3, 5, 1, -40, 2]), k=2)
    assert (alike, different) == ([2, 5], [4, 1]) and report.most_wrong(np.array([1.0, 0, -1])) == ([0], [2])


def test_ticks_are_round_and_inside():
    rng = np.random.default_rng(5)
    for _ in range(300):
        low = float(rng.normal()) * 10.0 ** rng.integers(-3, 2)
        high = low + float(rng.random() + 0.01) * 10.0 ** rng.integers(-3, 5)
        values = [value for value, _ in report.ticks(low, high)]
        step = values[1] - values[0]
        assert 2 <= len(values) <= 7 and round(step / 10 ** math.floor(math.log10(step) + 1e-6), 3) in (1, 2, 5) and low - 1e-6 * (high - low) <= values[0] and values[-1] <= high + 1e-6 * (high - low)
        assert [float(text.replace(",", "")) for _, text in report.ticks(low, high)] == pytest.approx(values, abs=1e-9 + 1e-6 * (high - low))
    assert [text for _, text in report.ticks(0, 31250)] == ["0", "10,000", "20,000", "30,000"]


# ------------------------------------------------------------------------------------------------------- the page


def test_every_number_of_the_json_is_the_pages(tmp_path, make):
    folders = [make_run(tmp_path / f"{lam}-{seed}", lam=lam, seed=seed) for lam in (0.0, 0.5) for seed in range(3)] + [make_run(tmp_path / "one", lam=2.0)]
    page, text, printed, numbers = make(*folders)
    assert [g["name"] for g in numbers["groups"]] == ["lam 0", "lam 0.5", "lam 2"] and [g["differs"] for g in numbers["groups"]] == [{"lam": 0.0}, {"lam": 0.5}, {"lam": 2.0}]
    table, each = page.rows("average"), page.rows("run")
    assert table["before"][:4] == ["48.50", "48.50", "48.50", "50.00"] and table["before, first-last average"][:4] == ["39.25", "39.25", "39.25", "-"]
    for g, label in zip(numbers["groups"], ("A: lam 0", "B: lam 0.5", "C: lam 2")):
        for name, cell in zip((*COLUMNS, "dev_best"), table[label]):
            column = g["table"][name]
            assert cell == f"{column['mean']:.2f}" + (f" ± {column['std']:.2f}" if len(g["seeds"]) > 1 else "")
        assert table[label][4:] == [" ".join(map(str, sorted(set(g["table"]["best_step"]["each"])))), " ".join(map(str, g["seeds"])), f"{g['minutes']:.2f}"]
        for i, folder in enumerate(g["runs"]):
            assert each[folder] == [*(f"{g['table'][name]['each'][i]:.2f}" for name in (*COLUMNS, "dev_best")), str(g["table"]["best_step"]["each"][i]),
                                    str(g["seeds"][i]), f"{g['table']['minutes']['each'][i]:.2f}"]  # fmt: skip
        assert all(command in page.text() for command in g["commands"])
        for field, c in g["curves"].items():
            assert any(label.startswith(field) and f"from {c['mean'][0]:.4g} to {c['mean'][-1]:.4g} at step 40" in label for label in page.svgs)
        line = next(line for line in printed.splitlines() if line.startswith(label))
        assert f"{g['table']['dev_best']['mean']:.2f}" in line and f"{g['table']['average']['mean']:.2f}" in line and f"{g['minutes']:.2f}" in line
    assert page.rows("setting")["lam"] == ["0", "0.5", "2"] and "prediction" not in numbers["groups"][0]["curves"]
    assert printed.splitlines()[-1] == f"{tmp_path / 'page.html'}: 3 groups, 7 runs, {len(text.encode()) / 1000:.0f} kB"
    assert "after: average" in printed and "No run here has kept its model" in page.text()


def test_the_drawn_points_are_the_means(tmp_path, make):
    """From the places of the ticks and their numbers back to values: what is drawn is what the JSON says."""
    _, text, _, numbers = make(*(make_run(tmp_path / str(seed), seed=seed) for seed in range(3)))
    for field, c in numbers["groups"][0]["curves"].items():
        svg = re.search(rf'aria-label="{field} over steps.*?</svg>', text, re.DOTALL)[0]
        ys = [(float(y), float(number)) for y, number in re.findall(r'class="rule" d="M48,([\d.]+)H.*?>([-\d.]+)</text>', svg)]
        xs = [(float(x), float(number)) for x, number in re.findall(r'class="axis" d="M([\d.]+),\S+v4"/><text[^>]*>([\d,]+)<', svg)]
        points = np.array([pair.split(",") for pair in re.search(r'class="line" d="M([^"]*)"', svg)[1].split("L")], float)
        band = np.array([pair.split(",") for pair in re.search(r'class="band" d="M([^"]*)Z"', svg)[1].split("L")], float)
        to_x, to_y = np.polyfit(*zip(*xs), 1), np.polyfit(*zip(*ys), 1)
        close = abs(to_y[0]) * 0.2  # places have one decimal, the ticks' too
        assert np.polyval(to_x, points[:, 0]) == pytest.approx(c["steps"], abs=0.2)
        assert np.polyval(to_y, points[:, 1]) == pytest.approx(c["mean"], abs=close)
        edge = np.add(c["mean"], c["std"]).tolist() + np.subtract(c["mean"], c["std"])[::-1].tolist()
        assert np.polyval(to_y, band[:, 1]) == pytest.approx(edge, abs=close)


def test_what_is_hostile_is_text(tmp_path, make, made):
    folder = tmp_path / '<script>alert("1")<' / "script>&amp;\"'"
    query = "<script>alert('query')</script> \"quoted\" & <b>"
    page, text, _, numbers = make(make_run(folder, best=True), "--data", made, "--query", query, "the cat eats fish")
    assert query in page.text() and str(folder) in page.text() and numbers["groups"][0]["runs"] == [str(folder)]
    assert f"--out-dir {folder}" in page.text() and "<script" not in text.lower() and "& <b>" not in text and "alert(\"" not in text
    page, text, _, _ = make(make_run(tmp_path / "<script>", ended=False))  # its folder is then its name, in title, legend and drawings
    assert "<script" not in text.lower() and text.count("&lt;script&gt;") > 5 and "DiffCSE: <script>" in page.text()


def test_the_page_is_whole_and_asks_for_nothing(tmp_path, make, made):
    page, text, _, _ = make(*(make_run(tmp_path / f"{lam}-{seed}", lam=lam, seed=seed, best=True) for lam in (0.0, 0.5) for seed in (0, 1)), "--data", made)
    assert not re.search(r"https?:|//|<script|src=|@import|url\(|<link|<iframe", text.lower().replace(str(tmp_path), "").replace("<!doctype", ""))
    assert ("html", "lang", "en") in page.attributes and any(name == "viewport" for _, _, name in page.attributes)
    assert [level for level in re.findall(r"<h(\d)", text)][:2] == ["1", "2"] and text.count("<h1") == 1
    assert all(table and len({len(row) for row in table}) == 1 for table in page.tables)  # as many cells in each row
    assert len(page.svgs) == 4 + 3 and text.count('class="letter') == 2 + 2 + 1 + 1
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):", text))


def test_what_the_models_think(tmp_path, make, made):
    """Spearman, the distribution, neighbours and most telling pairs against the model itself and scipy."""
    page, text, _, _ = make(make_run(tmp_path / "a", best=True), make_run(tmp_path / "b", lam=0.5, best=True), make_run(tmp_path / "c", lam=0.9),
                            "--data", made, "--query", "the cat eats fish", (known := load_set("STSB-dev", made)[0][0]))  # fmt: skip
    left, right, ratings = load_set("STSB-dev", made)
    model = DiffCSE(SMALL, device="cpu")
    u, v = (model.encode(side, return_numpy=True).astype(np.float64) for side in (left, right))
    cosines = (u * v).sum(1)
    assert text.count(f"Spearman x 100: {100 * spearmanr(cosines, ratings)[0]:.2f}") == 3  # before and both: it is the same model
    kinds = np.minimum(np.array(ratings), 4).astype(int)
    medians = "; ".join(f"{low}-{low + 1}: {np.median(cosines[kinds == low]):.2f}" for low in reversed(range(5)))
    assert any(label == f"before: medians of the cosine by rating, {medians}" for label in page.svgs)
    assert "Left out: C: lam 0.9: no run of it has kept its model" in page.text() and "its test set stays shut" in page.text()

    svg = re.search(r'aria-label="before: medians.*?</svg>', text, re.DOTALL)[0]
    edges = np.linspace(cosines.min(), 1, 31)
    density = np.stack([np.histogram(np.minimum(cosines[kinds == kind], 1), edges)[0] / (kinds == kind).sum() for kind in reversed(range(5))])  # (5, 30)
    outlines = [np.array([point.split(",") for point in d.split("L")], float) for d in re.findall(r'class="ridge" d="M([^"]*)"', svg)]
    heights = np.stack([outline[0, 1] - outline[1:-1, 1] for outline in outlines])
    assert heights / 54 == pytest.approx(density / density.max(), abs=0.002) and [o[0, 1] for o in outlines] == sorted(o[0, 1] for o in outlines)

    model.build_index(list(dict.fromkeys(left + right)))
    tables = [t for t in page.tables if [cell for cell, _ in t[0]] == ["", "before", "A: lam 0.05", "B: lam 0.5"]]
    for table, query in zip(tables, ("the cat eats fish", known)):  # a query that is there itself is not its neighbour
        found = [f"{cosine:.2f}\u00a0{sentence}" for sentence, cosine in model.search(query, threshold=-1, top_k=6) if sentence != query][:5]
        assert [[cell for cell, _ in row[1:]] for row in table[1:]] == [[text] * 3 for text in found] and not any(css for row in table for _, css in row)

    by_cosine, by_rating = (100 * (rankdata(values) - 0.5) / len(values) for values in (cosines, ratings))
    alike, different = [t for t in page.tables if "percentile by cosine" in [cell for cell, _ in t[0]]][:2]
    for t, order in ((alike, np.argsort(by_rating - by_cosine)), (different, np.argsort(by_cosine - by_rating))):
        apart = [abs(float(row[4][0]) - float(row[3][0])) for row in t[1:]]
        assert apart == pytest.approx(np.abs(by_cosine - by_rating)[order[:5]], abs=0.11) and len(apart) == 5
        for (sentences, _), (rating, _), (cosine, _), *_ in t[1:]:
            i = next(i for i in range(len(left)) if f"{left[i]}\n{right[i]}" == sentences and f"{ratings[i]:.2f}" == rating)
            assert f"{cosines[i]:.2f}" == cosine


def test_models_that_differ_are_marked(tmp_path, make, made, monkeypatch):
    """Three models made by hand: which sentence only one column has, and where their percentiles are furthest apart."""
    sentences = [f"sentence {i}" for i in range(8)]
    material = report.Material("what", sentences[:4], sentences[4:], np.array([0.0, 1, 2, 3]), ["low", "high", "top"], {s: s for s in sentences}, ("q",))
    answers = [report.Answers(name, css, np.array(c), 1.0, [[(s, 0.5) for s in found]])
               for name, css, c, found in (("x", "g0", [0.1, 0.2, 0.3, 0.4], "ab"), ("y", "g1", [0.1, 0.4, 0.3, 0.2], "ac"), ("z", "g2", [0.2, 0.1, 0.3, 0.4], "ab"))]  # fmt: skip
    (table,) = Page(report.neighbours_part(answers, ["q"])).tables
    assert [[css for _, css in row[1:]] for row in table[1:]] == [["", "", ""], ["", "only", ""]]
    last = Page(report.pairs_part(answers, material)).tables[-1]
    assert [cell for cell, _ in last[0]] == ["pair", "rating", "percentile by rating", "x", "y", "z"]
    assert [cell for cell, _ in last[1]] == ["sentence 1\nsentence 5", "1.00", "37.5", "37.5", "87.5", "12.5"] and len(last) == 5


def test_without_data_it_is_about_documentation(tmp_path, make, monkeypatch):
    """The pairs that choose the demo's checkpoint: same and other function; and its questions. A data folder that is not there is no data."""
    names = [f"name{i}" for i in range(24)]
    monkeypatch.setattr(docs, "same_function_pairs", lambda: [(name, f"Return the {name} of it", f"Compute {name}") for name in names])
    monkeypatch.setattr(docs, "documentation_entries", lambda: [(f"a.{name}", f"Return the {name}") for name in names])
    page, _, _, _ = make(make_run(tmp_path / "a", best=True, data="/no/such/folder"))
    score = docs.DocsScore()
    expected = score.dev(partial(DiffCSE(SMALL, device="cpu").encode, return_numpy=True))["spearman"]
    assert f"Spearman x 100: {expected:.2f}" in page.text() and f"{2 * (score.half == 0).sum()} pairs of the half that chooses" in page.text()
    assert all(question in page.text() for question in docs.QUESTIONS) and re.search(r"0\.\d\d a\.name\d+: Return the name", page.text())
    assert {row[1][0] for t in page.tables if t[0][0][0] == "pair" for row in t[1:]} <= {"same function", "another function"}


def test_a_program_of_ones_own_is_another_group():
    """exercises/detached.py has the same config as diffcse.py, and is not the same."""
    runs = [report.Run(f"{program}{seed}", Config(seed=seed), [], {"command": f"python {program} --config demo", "config": "demo"})
            for program in ("/some/where/diffcse.py", "diffcse.py", "exercises/detached.py") for seed in (0, 1)]  # fmt: skip
    groups = report.group_runs(runs)
    assert [(g.name, len(g.runs)) for g in groups] == [("program diffcse.py", 4), ("program detached.py", 2)]
    assert "program" not in report.differences(report.group_runs(runs[:4])) and "detached.py" in report.differences(report.group_runs(runs[4:]))


def test_a_run_that_has_not_ended(tmp_path, make):
    page, _, printed, numbers = make(make_run(tmp_path / "r", steps=20, ended=False))
    assert f"Not ended yet: {tmp_path / 'r'} (step 20 of 40)" in page.text() and numbers["groups"][0]["commands"] == []
    assert printed.splitlines()[1].split()[0] == "r" and page.rows("dev best")["r"][0] == f"{numbers['groups'][0]['table']['dev_best']['mean']:.2f}"
    (tmp_path / "r" / "log.jsonl").write_text("")
    page, _, _, _ = make(tmp_path / "r")
    assert "(step 0 of 40)" in page.text() and "Nothing has been logged yet." in page.text()


def test_a_run_named_twice_is_one_and_a_start_that_is_elsewhere_is_left_out(tmp_path, make, made):
    folder = make_run(tmp_path / "r", best=True, model="nowhere/at-all")
    page, _, _, numbers = make(folder, f"{folder}/", "--data", made)
    assert numbers["groups"][0]["seeds"] == [42] and "Left out: before: model 'nowhere/at-all'" in page.text()
    assert len([label for label in page.svgs if "medians" in label]) == 1


# --------------------------------------------------------------------------------------------------------- errors


def test_mistakes(tmp_path, monkeypatch, capsys, made):
    good = make_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: no run in it (no config.json); a run's folder is what python diffcse.py --config demo writes" in says(capsys, monkeypatch, tmp_path / "empty")
    (make_run(tmp_path / "no log") / "log.jsonl").unlink()
    assert "no run in it (no log.jsonl)" in says(capsys, monkeypatch, tmp_path / "no log")
    for i, line in enumerate(('{"step": 1, "sco', "[1]", '{"score": 1}', "")):
        with open(make_run(tmp_path / f"bad{i}") / "log.jsonl", "a") as log:
            log.write(line + "\n")
        assert f"{tmp_path / f'bad{i}' / 'log.jsonl'} line 11: not a line of a run's log" in says(capsys, monkeypatch, tmp_path / f"bad{i}")
    (make_run(tmp_path / "half") / "results.json").write_text('{"config": "small",\n "seed"')
    assert "results.json line 2: not JSON" in says(capsys, monkeypatch, tmp_path / "half")
    (make_run(tmp_path / "part") / "results.json").write_text('{"config": "small"}')
    assert "results.json: no 'before' in it" in says(capsys, monkeypatch, tmp_path / "part")
    make_run(tmp_path / "docs", score="docs")
    assert "is scored by stsb, " in (error := says(capsys, monkeypatch, good, tmp_path / "docs")) and "by docs: one page compares runs" in error
    assert f"no folder {tmp_path / 'nowhere'}" in says(capsys, monkeypatch, good, "--out", tmp_path / "nowhere" / "x.html")
    assert f"no folder {tmp_path / 'nowhere'}" in says(capsys, monkeypatch, good, "--json", tmp_path / "nowhere" / "x.json")
    assert "a file is meant, and this is a folder" in says(capsys, monkeypatch, good, "--out", tmp_path)
    kept = make_run(tmp_path / "kept", best=True)
    assert "no folder STS in it" in says(capsys, monkeypatch, kept, "--data", tmp_path, "--out", tmp_path / "x.html")
    monkeypatch.setattr(report, "encode", lambda bert, tokenizer, sentences, **_: np.full((len(sentences), 3), np.nan))
    monkeypatch.setattr(report, "starts_of", lambda groups: {})
    assert f"{kept}: the model's vectors hold NaN or infinity" in says(capsys, monkeypatch, kept, "--data", made, "--out", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_log_that_cannot_be_read_names_its_line(tmp_path):
    with open(make_run(tmp_path / "r") / "log.jsonl", "ab") as log:
        log.write(b'{"step": 50, "x": "\xe9"}\n')
    with pytest.raises(UserError, match="line 11: not UTF-8"):
        report.read_run(str(tmp_path / "r"))


# --------------------------------------------------------------------------------------------------------- command


def test_the_command(tmp_path, made):
    folders = [make_run(tmp_path / f"run-{seed}", seed=seed, best=True, data=str(made)) for seed in (0, 1)]
    command = [sys.executable, "-m", "lab.report", *map(str, folders), "--out", "page.html", "--json", "page.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    page = Page((tmp_path / "page.html").read_text())
    assert re.fullmatch(r"page\.html: 1 group, 2 runs, \d+ kB", done.stdout.splitlines()[-1]) and "STS-B dev, 1,500 pairs" in page.text()
    assert json.loads((tmp_path / "page.json").read_text())["groups"][0]["seeds"] == [0, 1]
    assert not list(tmp_path.glob(".*.tmp"))
