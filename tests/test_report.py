"""lab/report.py: groups and means against numpy, every number of the page, escapes, mistakes."""

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
from scipy.stats import binned_statistic, rankdata, spearmanr

from diffcse import PRESETS
from embed import DiffCSE
from engine.errors import UserError, run_main
from eval_sts import load_set, make_score
from lab import report
from lab.ablations import AblationConfig

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"
VOID = {"meta", "br", "hr", "img", "link", "input"}
COLUMNS = ("STSB-dev", "STS12", "average")


class Page(HTMLParser):
    """A parsed page: tables as rows of cells (text, class), captions, attributes, visible text.

    Fails if tags are not balanced.
    """

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

    def tables_with(self, column: str) -> list[list]:
        return [t for t in self.tables if column in [cell for cell, _ in t[0]]]

    def rows(self, column: str) -> dict[str, list[str]]:
        """First cell -> other cells, of the first table that has this column."""
        rows = {}
        for (title, _), *cells in self.tables_with(column)[0]:
            rows[title] = [cell.replace("\u00a0", " ") for cell, _ in cells]
        return rows


def make_run(
    folder: Path,
    finished: bool = True,
    best: bool = False,
    steps: int = 40,
    old: bool = False,
    **settings,
) -> Path:
    """A run's folder with random numbers, logged at steps 1, 10, 20, ...

    old: with the first edition's names.
    """
    preset = AblationConfig(**asdict(PRESETS["small"]))
    cfg = replace(preset, **{"model": str(SMALL), "steps": 40, **settings})
    rng = np.random.default_rng([cfg.seed, int(1e6 * cfg.lam), int(1e6 * cfg.temperature)])
    folder.mkdir(parents=True)
    config = asdict(cfg)
    if old:
        config |= {"mask": config.pop("masking"), "dtype": "fp32", "compile": None}
    (folder / "config.json").write_text(json.dumps(config))
    loss, accuracy = ("difference", "accuracy_original")
    if old:
        loss, accuracy = ("replaced_token" if cfg.seed == 1 else "prediction", "accuracy_kept")
    log = [{"seconds": 1.0, "step": 0, "score": 50.0}]
    for step in [1, *range(10, steps + 1, 10)]:
        contrastive, difference, a, b = rng.random(4).tolist()
        row = {"seconds": 2.0 * step, "step": step, "lr": 1e-3, "contrastive": contrastive}
        if cfg.lam:
            row |= {loss: difference, "accuracy_replaced": None if step == 1 else a, accuracy: b}
        log.append(row)
        if step > 1:
            score = float(60 + rng.random())
            log.append({"seconds": 2.0 * step, "step": step, "score": score})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    if finished:
        best_score = max((row["score"], row["step"]) for row in log[1:] if "score" in row)
        results = {
            "config": "small",
            "seed": cfg.seed,
            "before": dict.fromkeys(COLUMNS, 48.5),
            "before_first_last": dict.fromkeys(COLUMNS, 39.25),
            "after": {name: 100 * float(rng.random()) for name in COLUMNS},
            "dev_before": 50.0,
            "dev_best": best_score[0],
            "best_step": best_score[1],
            "minutes": 1.25 + cfg.seed,
            "command": f"python diffcse.py --config small --seed {cfg.seed} --out-dir {folder}",
            "machine": {"python": "3.11.7", "torch": "2.6.0", "device": "cpu", "threads": 1},
        }
        (folder / "results.json").write_text(json.dumps(results))
    if best:
        (folder / "best").symlink_to(SMALL)
    return folder


@pytest.fixture
def make(monkeypatch, capsys, tmp_path):
    """The command, in this process: (page, its HTML, standard output, the JSON)."""

    def run(*words):
        out, numbers = tmp_path / "page.html", tmp_path / "page.json"
        argv = ["lab.report", *map(str, words), "--out", str(out), "--json", str(numbers)]
        monkeypatch.setattr(sys, "argv", argv)
        report.main()
        html = out.read_text()
        return Page(html), html, capsys.readouterr().out, json.loads(numbers.read_text())

    return run


@pytest.fixture
def error(monkeypatch, capsys):
    """The command's error, which is one line."""

    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["lab.report", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            run_main(report.main)
        text = capsys.readouterr().err
        assert exit.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1
        return text

    return run


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------- numbers


def test_groups_are_runs_with_equal_settings(tmp_path):
    """Seed, folders and logging are not compared; lam and projector distinguish four groups."""
    others = {"log_every": 3, "eval_every": 7, "device": "cpu", "compile": True, "out_dir": "x"}
    equal = [{"seed": 2, **others, "save_minutes": 1.0}, {"seed": 1, "data": "elsewhere"}, {}]
    lr = {"lr": 1e-3}
    different = [{"lam": 0.0, **lr}, {"lam": 0.0, **lr, "projector": "tanh"}, {"lam": 0.5, **lr}]
    runs = []
    for i, changes in enumerate(equal + different):
        runs.append(report.read_run(str(make_run(tmp_path / str(i), **changes))))
    (one,) = report.group_runs(runs[:3])
    assert (one.name, one.label) == ("small", "small")
    assert [run.cfg.seed for run in one.runs] == [1, 2, 42]
    groups = report.group_runs(runs)
    assert [g.label for g in groups] == [
        "A: lam 0.05, projector batchnorm",
        "B: lam 0, projector batchnorm",
        "C: lam 0, projector tanh",
        "D: lam 0.5, projector batchnorm",
    ]
    assert [len(g.runs) for g in groups] == [3, 1, 1, 1] and len({g.css for g in groups}) == 4
    assert report.differing([g.settings for g in groups]) == ["lr", "projector", "lam"]


def test_many_groups_have_different_names():
    rng = np.random.default_rng(0)
    choices = {"lr": [1e-3, 1e-4], "lam": [0.0, 0.1, 0.2], "projector": ["tanh", "batchnorm"]}
    choices |= {"dropout": [None, 0.0], "edit": ["argmax", "sample"]}
    for _ in range(50):
        cfgs = []
        for _ in range(rng.integers(1, 9)):
            values = {name: v[rng.integers(len(v))] for name, v in choices.items()}
            cfgs.append(AblationConfig(**values))
        groups = report.group_runs([report.Run("x", cfg, [], {}) for cfg in cfgs])
        different = {tuple(asdict(cfg).values()) for cfg in cfgs}
        assert len(groups) == len(different) == len({g.name for g in groups})


def test_another_program_is_another_group():
    """A copy of diffcse.py may have the same config. lab/ablations.py computes the same."""
    runs = []
    programs = ("/some/where/diffcse.py", "-m lab.ablations", "exercises/detached.py")
    for program in programs:
        for seed in (0, 1):
            results = {"command": f"python {program} --config demo", "config": "demo"}
            cfg = AblationConfig(seed=seed)
            runs.append(report.Run(f"{program}{seed}", cfg, [], results))
    groups = report.group_runs(runs)
    found = [(g.name, len(g.runs)) for g in groups]
    assert found == [("program diffcse.py", 4), ("program detached.py", 2)]
    assert "program" not in report.settings_part(report.group_runs(runs[:4]))
    assert "detached.py" in report.settings_part(report.group_runs(runs[4:]))


def test_curves_equal_numpy_and_an_unfinished_run_ends_early(tmp_path):
    """The first edition's logs and configs are read too."""
    folders, logs = [], []
    for seed in range(3):
        kind = {"steps": 20, "finished": False} if seed == 2 else {"old": True}
        folders.append(make_run(tmp_path / str(seed), seed=seed, **kind))
        logs.append(read_log(folders[-1]))
    runs = [report.read_run(str(folder)) for folder in folders]
    assert len(report.group_runs(runs)) == 1
    for field, names in {
        "score": {"score"},
        "contrastive": {"contrastive"},
        "difference": {"difference", "prediction", "replaced_token"},
        "accuracy_replaced": {"accuracy_replaced"},
        "accuracy_original": {"accuracy_original", "accuracy_kept"},
    }.items():
        values = [{r["step"]: r[n] for r in log for n in names & set(r)} for log in logs]
        c = report.curve(runs, field)
        steps = {"score": [0, 10, 20, 30, 40], "accuracy_replaced": [10, 20, 30, 40]}
        assert c["steps"] == steps.get(field, [1, 10, 20, 30, 40])
        assert c["runs"] == [2 if step > 20 else 3 for step in c["steps"]]
        for step, mean, std in zip(c["steps"], c["mean"], c["std"]):
            there = [v[step] for v in values if step in v]
            assert mean == pytest.approx(np.mean(there), abs=1e-6)
            assert std == pytest.approx(np.std(there), abs=1e-6)
    nothing = {"steps": [], "mean": [], "std": [], "runs": []}
    assert report.curve(runs, "grad_norm") == nothing
    uneven = []
    for every in (10, 15):
        log = [{"step": step, "score": float(step)} for step in range(0, 61, every)]
        uneven.append(report.Run("", AblationConfig(), log, {}))
    assert report.curve(uneven, "score")["steps"] == [0, 30, 60]


def test_the_table_is_mean_and_population_standard_deviation(tmp_path):
    folders = [make_run(tmp_path / str(i), seed=i, finished=i < 3) for i in range(4)]
    runs = [report.read_run(str(folder)) for folder in folders]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders[:3]]
    table = report.table_of(runs)  # without the unfinished run
    for name in COLUMNS:
        values = [result["after"][name] for result in results]
        assert table[name] == {
            "mean": pytest.approx(np.mean(values), abs=1e-6),
            "std": pytest.approx(np.std(values), abs=1e-6),
            "each": pytest.approx(values, abs=1e-6),
        }
    assert table["best_step"]["each"] == [result["best_step"] for result in results]
    assert report.table_of(runs[:1])["average"]["std"] is None
    last = report.table_of(runs[3:])  # from its log
    best = max(read_log(folders[3])[1:], key=lambda row: row.get("score", 0))
    assert set(last) == {"dev_before", "dev_best", "best_step", "minutes"}
    assert last["dev_best"]["each"] == [round(best["score"], 6)]
    assert last["best_step"]["each"] == [best["step"]]
    assert last["minutes"]["mean"] == round(80 / 60, 2)


def test_percentiles_equal_scipy_and_the_worst_pairs_a_sort():
    rng = np.random.default_rng(3)
    for n in (2, 7, 100):
        values = rng.integers(0, 6, n) / 5
        expected = (rankdata(values) - 0.5) / n * 100
        assert report.percentiles(values) == pytest.approx(expected, abs=1e-12)
    assert report.most_wrong(np.array([0.0, -3, 5, 1, -40, 2]), k=2) == ([2, 5], [4, 1])
    assert report.most_wrong(np.array([1.0, 0, -1])) == ([0], [2])


def test_groups_of_ratings():
    ratings = [0, 0.99, 1, 2.5, 3.999, 4, 5]
    material = report.make_material("", list("abcdefg"), list("hijklmn"), ratings)
    assert material.groups.tolist() == [0, 0, 1, 2, 3, 4, 4]
    assert material.kinds == ["0-1", "1-2", "2-3", "3-4", "4-5"]
    material = report.make_material("", ["a", "b", "c"], ["d", "e", "f"], [-1.0, 0, 1])
    assert material.groups.tolist() == [0, 2, 4] and material.kinds[0] == "-1--0.6"


def test_ticks_are_round_and_inside():
    rng = np.random.default_rng(5)
    for _ in range(300):
        low = float(rng.normal()) * 10.0 ** rng.integers(-3, 2)
        high = low + float(rng.random() + 0.01) * 10.0 ** rng.integers(-3, 5)
        values, texts = zip(*report.ticks(low, high))
        step, margin = values[1] - values[0], 1e-6 * (high - low)
        digit = round(step / 10 ** math.floor(math.log10(step) + 1e-6), 3)
        assert 2 <= len(values) <= 7 and digit in (1, 2, 5)
        assert low - margin <= values[0] and values[-1] <= high + margin
        numbers = [float(text.replace(",", "")) for text in texts]
        assert numbers == pytest.approx(values, abs=1e-9 + margin)
    texts = [text for _, text in report.ticks(0, 31250)]
    assert texts == ["0", "10,000", "20,000", "30,000"]


# --------------------------------------------------------------------------------------- the page


def test_the_page_has_every_number_of_the_json(tmp_path, make):
    folders = [make_run(tmp_path / "one", lam=2.0)]
    for lam in (0.5, 0.0):
        folders[:0] = [make_run(tmp_path / f"{lam}-{i}", lam=lam, seed=i) for i in range(3)]
    page, html, printed, numbers = make(*folders)
    groups = numbers["groups"]
    assert [g["name"] for g in groups] == ["lam 0", "lam 0.5", "lam 2"]
    assert [g["differs"] for g in groups] == [{"lam": 0.0}, {"lam": 0.5}, {"lam": 2.0}]
    table, runs, names = page.rows("average"), page.rows("run"), (*COLUMNS, "dev_best")
    assert table["before"][:4] == ["48.50", "48.50", "48.50", "50.00"]
    first_last = table["before, first-last average"]
    assert first_last[:4] == ["39.25", "39.25", "39.25", "-"]
    for g, label in zip(groups, ("A: lam 0", "B: lam 0.5", "C: lam 2")):
        t, seeds = g["table"], g["seeds"]
        for name, cell in zip(names, table[label]):
            spread = f" ± {t[name]['std']:.2f}" if len(seeds) > 1 else ""
            assert cell == f"{t[name]['mean']:.2f}{spread}"
        steps = " ".join(map(str, sorted(set(t["best_step"]["each"]))))
        expected = [steps, " ".join(map(str, seeds)), f"{g['minutes']:.2f}"]
        assert table[label][4:] == expected
        for i, folder in enumerate(g["runs"]):
            cells = [f"{t[name]['each'][i]:.2f}" for name in names]
            cells += [str(t["best_step"]["each"][i]), str(seeds[i])]
            assert runs[folder] == [*cells, f"{t['minutes']['each'][i]:.2f}"]
        assert all(command in page.text() for command in g["commands"])
        for field, c in g["curves"].items():
            text = f"{label}: from {c['mean'][0]:.4g} to {c['mean'][-1]:.4g} at step 40"
            assert any(s.startswith(f"{field} over") and text in s for s in page.svgs)
        line = next(line for line in printed.splitlines() if line.startswith(label))
        for number in (t["dev_best"]["mean"], t["average"]["mean"], g["minutes"]):
            assert f"{number:.2f}" in line
    assert page.rows("setting")["lam"] == ["0", "0.5", "2"]
    assert "difference" not in groups[0]["curves"]
    size = f"{len(html.encode()) / 1000:.0f} kB"
    assert printed.splitlines()[-1] == f"{tmp_path / 'page.html'}: 3 groups, 7 runs, {size}"
    assert "after: average" in printed and "No run has a saved model" in page.text()


def test_the_drawn_points_are_the_means(tmp_path, make):
    """The positions of ticks and their numbers turn points back into values."""
    folders = [make_run(tmp_path / str(seed), seed=seed) for seed in range(3)]
    _, html, _, numbers = make(*folders)

    def points(kind: str, svg: str) -> np.ndarray:
        outline = re.search(rf'class="{kind}" d="M([^"Z]*)', svg)[1]
        return np.array([point.split(",") for point in outline.split("L")], float)

    x_tick = r'class="axis" d="M([\d.]+),\S+v4"/><text[^>]*>([\d,]+)<'
    y_tick = r'class="rule" d="M48,([\d.]+)H.*?>([-\d.]+)</text>'
    for field, c in numbers["groups"][0]["curves"].items():
        svg = re.search(rf'aria-label="{field} over steps.*?</svg>', html, re.DOTALL)[0]
        xs, ys = (np.array(re.findall(tick, svg), float) for tick in (x_tick, y_tick))
        to_x, to_y = np.polyfit(*xs.T, 1), np.polyfit(*ys.T, 1)
        close = abs(to_y[0]) * 0.2  # positions have one decimal
        line, band = points("line", svg), points("band", svg)
        assert np.polyval(to_x, line[:, 0]) == pytest.approx(c["steps"], abs=0.2)
        assert np.polyval(to_y, line[:, 1]) == pytest.approx(c["mean"], abs=close)
        edge = [*np.add(c["mean"], c["std"]), *np.subtract(c["mean"], c["std"])[::-1]]
        assert np.polyval(to_y, band[:, 1]) == pytest.approx(edge, abs=close)


def test_markup_in_names_and_queries_is_escaped(tmp_path, make, made):
    folder = tmp_path / '<script>alert("1")<' / "script>&amp;\"'"
    query = "<script>alert('query')</script> \"quoted\" & <b>"
    words = ["--data", made, "--query", query, "the cat eats fish"]
    page, html, _, numbers = make(make_run(folder, best=True), *words)
    assert query in page.text() and str(folder) in page.text()
    assert numbers["groups"][0]["runs"] == [str(folder)]
    assert f"--out-dir {folder}" in page.text() and "<script" not in html.lower()
    assert "& <b>" not in html and 'alert("' not in html
    page, html, _, _ = make(make_run(tmp_path / "<script>", finished=False))  # also its name
    assert "<script" not in html.lower() and html.count("&lt;script&gt;") > 5
    assert "DiffCSE: <script>" in page.text()


def test_the_page_is_complete_and_loads_nothing(tmp_path, make, made):
    folders = []
    for lam, seed in [(0.0, 0), (0.0, 1), (0.5, 0), (0.5, 1)]:
        folders.append(make_run(tmp_path / f"{lam}-{seed}", lam=lam, seed=seed, best=True))
    page, html, _, _ = make(*folders, "--data", made)
    text = html.lower().replace(str(tmp_path), "")
    assert not re.search(r"https?:|//|<script|src=|@import|url\(|<link|<iframe", text)
    assert ("html", "lang", "en") in page.attributes and html.count("<h1") == 1
    assert any(name == "viewport" for _, _, name in page.attributes)
    assert re.findall(r"<h(\d)", html)[:2] == ["1", "2"]
    assert all(table and len({len(row) for row in table}) == 1 for table in page.tables)
    assert len(page.svgs) == 5 + 3 and html.count('class="letter') == 2 + 2 + 1 + 1 + 1
    variables = set(re.findall(r"(--\w+):", html))
    assert set(re.findall(r"var\((--\w+)\)", html)) <= variables


def test_similarities_and_neighbours_are_the_models(tmp_path, make, made):
    left, right, ratings = load_set("STSB-dev", made)
    known, query = left[0], "the cat eats fish"
    folders = [make_run(tmp_path / "a", best=True), make_run(tmp_path / "b", lam=0.5, best=True)]
    folders.append(make_run(tmp_path / "c", lam=0.9))
    page, html, _, _ = make(*folders, "--data", made, "--query", query, known)
    model = DiffCSE(SMALL, device="cpu")
    u, v = (model.encode(side, return_numpy=True).astype(np.float64) for side in (left, right))
    cosines = (u * v).sum(1)
    rho = spearmanr(cosines, ratings)[0]
    assert html.count(f"Spearman x 100: {100 * rho:.2f}") == 3  # before and both: one model
    bins = binned_statistic(ratings, cosines, "median", bins=5)  # ratings above 5: equal widths
    kinds, bounds, order = bins.binnumber - 1, bins.bin_edges, list(reversed(range(5)))
    medians = [f"{bounds[i]:.3g}-{bounds[i + 1]:.3g}: {bins.statistic[i]:.2f}" for i in order]
    assert f"before: medians of the cosine by rating, {'; '.join(medians)}" in page.svgs
    assert "Left out: C: lam 0.9: no run has a saved model" in page.text()
    assert "STS-B dev, 1,500 rated pairs" in page.text()

    svg = re.search(r'aria-label="before: medians.*?</svg>', html, re.DOTALL)[0]
    edges = np.linspace(cosines.min(), 1, 31)
    counts = [np.histogram(np.minimum(cosines[kinds == i], 1), edges)[0] for i in order]
    density = np.stack([c / (kinds == i).sum() for c, i in zip(counts, order)])  # (5, 30)
    outlines = []
    for d in re.findall(r'class="ridge" d="M([^"]*)"', svg):
        outlines.append(np.array([point.split(",") for point in d.split("L")], float))
    heights = np.stack([outline[0, 1] - outline[1:-1, 1] for outline in outlines])
    assert heights / 54 == pytest.approx(density / density.max(), abs=0.002)
    bases = [outline[0, 1] for outline in outlines]
    assert bases == sorted(bases)

    model.build_index(list(dict.fromkeys(left + right)))
    head = ["", "before", "A: lam 0.05", "B: lam 0.5"]
    tables = [t for t in page.tables if [cell for cell, _ in t[0]] == head]
    for table, text in zip(tables, (query, known)):  # a sentence is not its own neighbour
        found = model.search(text, threshold=-1, top_k=6)
        expected = [f"{cosine:.2f}\u00a0{s}" for s, cosine in found if s != text][:5]
        rows = [[cell for cell, _ in row[1:]] for row in table[1:]]
        assert rows == [[cell] * 3 for cell in expected]
        assert not any(css for row in table for _, css in row)

    by_cosine, by_rating = (100 * (rankdata(x) - 0.5) / len(x) for x in (cosines, ratings))
    difference = by_cosine - by_rating
    similar, different = page.tables_with("percentile by cosine")[:2]
    for table, order in [(similar, np.argsort(-difference)), (different, np.argsort(difference))]:
        shown = [abs(float(row[4][0]) - float(row[3][0])) for row in table[1:]]
        assert len(shown) == 5
        assert shown == pytest.approx(np.abs(difference)[order[:5]], abs=0.11)
        for (pair, _), (rating, _), (cosine, _), *_ in table[1:]:
            shown_pairs = zip(left, right, ratings)
            rows = [(f"{a}\n{b}", f"{r:.2f}") for a, b, r in shown_pairs]
            assert f"{cosines[rows.index((pair, rating))]:.2f}" == cosine


def test_models_that_differ_are_marked():
    """Sentences in one column only, and pairs with the widest percentiles, of three models."""
    sentences = [f"sentence {i}" for i in range(8)]
    material = report.make_material("", sentences[:4], sentences[4:], [0.0, 1, 2, 3])
    answers = []
    for name, cosines, found in [
        ("x", [0.1, 0.2, 0.3, 0.4], "ab"),
        ("y", [0.1, 0.4, 0.3, 0.2], "ac"),
        ("z", [0.2, 0.1, 0.3, 0.4], "ab"),
    ]:
        neighbours = [[(sentence, 0.5) for sentence in found]]
        answers.append(report.Answers(name, "g1", np.array(cosines), 1.0, neighbours))
    (table,) = Page(report.neighbours_part(answers, ["q"])).tables
    marks = [[css for _, css in row[1:]] for row in table[1:]]
    assert marks == [["", "", ""], ["", "only", ""]]
    last = Page(report.pairs_part(answers, material)).tables[-1]
    head, first, *others = ([cell for cell, _ in row] for row in last)
    assert head == ["pair", "rating", "percentile by rating", "x", "y", "z"]
    assert first == ["sentence 1\nsentence 5", "1.00", "37.5", "37.5", "87.5", "12.5"]
    assert len(others) == 3


def test_without_data_the_pairs_are_those_that_selected_the_model(tmp_path, make):
    """And the captions if they are on another machine."""
    pairs = tmp_path / "pairs.tsv"
    texts = ["a cat", "a dog", "the guitar", "a red fish", "a man eats"]
    rows = [f"{a}\t{b}\t{i * 3 % 7}" for i, (a, b) in enumerate(zip(texts, texts[1:]))]
    pairs.write_text("a\tb\tscore\n" + "\n".join(rows) + "\n")
    page, _, _, _ = make(make_run(tmp_path / "own", best=True, score=str(pairs)))
    encoder = partial(DiffCSE(SMALL, device="cpu").encode, return_numpy=True)
    expected = make_score(str(pairs), "").dev(encoder)["score"]
    assert "pairs.tsv, 4 rated pairs." in page.text()
    assert f"Spearman x 100: {expected:.2f}" in page.text()
    assert all(query in page.text() for query in texts[:3])
    for score in ("captions", "stsb", "docs"):  # docs: of the first edition
        folder = make_run(tmp_path / score, score=score, data="/no/such/folder")
        material = report.find_material("", [report.read_run(str(folder))])
        assert material.title == "captions-dev, 1,375 rated pairs."


def test_an_unfinished_run(tmp_path, make):
    page, _, printed, numbers = make(make_run(tmp_path / "r", steps=20, finished=False))
    (g,) = numbers["groups"]
    assert f"Not finished yet: {tmp_path / 'r'} (step 20 of 40)" in page.text()
    assert g["commands"] == [] and printed.splitlines()[1].split()[0] == "r"
    assert page.rows("dev best")["r"][0] == f"{g['table']['dev_best']['mean']:.2f}"
    (tmp_path / "r" / "log.jsonl").write_text("")
    page, _, _, _ = make(tmp_path / "r")
    assert "(step 0 of 40)" in page.text() and "Nothing has been logged yet." in page.text()


def test_a_run_named_twice_is_one_and_a_missing_start_is_left_out(tmp_path, make, made):
    folder = make_run(tmp_path / "r", best=True, model="nowhere/at-all")
    page, _, _, numbers = make(folder, f"{folder}/", "--data", made)
    assert numbers["groups"][0]["seeds"] == [42]
    assert re.search("Left out: before: '?nowhere/at-all", page.text())
    assert len([label for label in page.svgs if "medians" in label]) == 1


# ----------------------------------------------------------------------------------------- errors


def test_mistakes_are_one_line(tmp_path, monkeypatch, error, made):
    good = make_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    assert "not a run's folder such as runs/demo-1 (no config.json)" in error(tmp_path / "empty")
    (make_run(tmp_path / "no log") / "log.jsonl").unlink()
    assert "(no log.jsonl)" in error(tmp_path / "no log")
    for i, line in enumerate((b'{"step": 1, "sco', b"[1]", b'{"score": 1}', b"")):
        log = make_run(tmp_path / f"bad{i}") / "log.jsonl"
        log.write_bytes(log.read_bytes() + line + b"\n")
        assert f"{log} line 11: expected a JSON object with a step" in error(log.parent)
    log.write_bytes(log.read_bytes()[:-1] + b'{"step": 50, "x": "\xe9"}\n')
    assert "line 11: not UTF-8" in error(log.parent)
    (make_run(tmp_path / "half") / "results.json").write_text('{"config": "small",\n "seed"')
    assert "results.json cannot be read" in error(tmp_path / "half")
    (make_run(tmp_path / "part") / "results.json").write_text('{"config": "small"}')
    assert "results.json: 'before' is missing" in error(tmp_path / "part")
    (make_run(tmp_path / "cfg") / "config.json").write_text('{"lr": "fast"}')
    assert "config.json: --lr is 'fast'; it must be a number" in error(tmp_path / "cfg")
    make_run(tmp_path / "other", score="captions")
    text = error(good, tmp_path / "other")
    assert "is scored by stsb, " in text and "by captions: one page compares runs" in text
    for flag in ("--out", "--json"):
        text = error(good, flag, tmp_path / "nowhere" / "x")
        assert f"there is no folder {tmp_path / 'nowhere'}" in text
    assert "is a folder; expected a file" in error(good, "--out", tmp_path)
    kept, out = make_run(tmp_path / "kept", best=True), tmp_path / "x.html"
    assert "no folder STS in it" in error(kept, "--data", tmp_path, "--out", out)

    def broken(bert, tokenizer, sentences, **_):
        return np.full((len(sentences), 3), np.nan)

    monkeypatch.setattr(report, "encode", broken)
    monkeypatch.setattr(report, "starts_of", lambda groups: {})
    text = error(kept, "--data", made, "--out", out)
    assert f"{kept}: the model's vectors have NaN or infinity" in text and not out.exists()


def test_runs_of_another_config_are_read(tmp_path):
    """Unknown fields are ignored; a resumed run refuses them, a report need not."""
    folder = make_run(tmp_path / "r", objective="masked")
    config = json.loads((folder / "config.json").read_text()) | {"my_field": 3}
    (folder / "config.json").write_text(json.dumps(config))
    run = report.read_run(str(folder))
    assert report.settings(run)["objective"] == "masked"
    with pytest.raises(UserError, match="not a run's folder"):
        report.read_run(str(tmp_path))


# ---------------------------------------------------------------------------------------- command


def test_the_command(tmp_path, made):
    folders = []
    for seed in (0, 1):
        folder = tmp_path / f"run-{seed}"
        folders.append(str(make_run(folder, seed=seed, best=True, data=str(made))))
    command = [sys.executable, "-m", "lab.report", *folders]
    done = subprocess.run(
        [*command, "--out", "page.html", "--json", "page.json", "--device", "cpu", "--amp", "bf16"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    page = Page((tmp_path / "page.html").read_text())
    assert re.fullmatch(r"page\.html: 1 group, 2 runs, \d+ kB", done.stdout.splitlines()[-1])
    assert "STS-B dev, 1,500 rated pairs" in page.text()
    assert json.loads((tmp_path / "page.json").read_text())["groups"][0]["seeds"] == [0, 1]
    assert not list(tmp_path.glob(".*.tmp"))
