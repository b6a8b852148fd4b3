"""lab/analysis.py: measures by hand and against a double loop, and the commands.
And lab/plots.py: what is drawn."""

import json
import math
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, fake_ipython
from scipy.stats import binned_statistic

import eval_sts
from bert import ModelError
from embed import DiffCSE, l2_normalize
from engine.errors import UserError
from lab import analysis, plots

pytest.importorskip("matplotlib", reason="plots need matplotlib")
SMALL = ROOT / "assets" / "small-bert"


def random_pairs(seed: int, P: int = 40, D: int = 6):
    """Unit vectors of pairs, some sentences twice, and ratings with some of 5 and on the bounds."""
    rng = np.random.default_rng(seed)
    u, v = l2_normalize(rng.normal(size=(P, D))), l2_normalize(rng.normal(size=(P, D)))
    v[: P // 2] = l2_normalize(u[: P // 2] + 0.3 * rng.normal(size=(P // 2, D)))
    u[3], v[7], v[9] = u[0], u[0], u[1]  # a sentence that occurs several times
    return u, v, rng.choice([0, 1, 2.5, 4, 4.0001, 5], size=P)


def test_recall_equals_a_double_loop():
    for seed in range(20):
        u, v, ratings = random_pairs(seed)
        corpus, ranks, P = [*u, *v], [], len(u)
        queries = [i for i, rating in enumerate(ratings) if rating == 5]
        for query, other in [pair for i in queries for pair in ((i, i + P), (i + P, i))]:
            cosines = [sum(a * b for a, b in zip(corpus[query], x)) for x in corpus]
            ranks.append(
                1 + sum(c > cosines[other] + 1e-9 for i, c in enumerate(cosines) if i != query)
            )
        shares = {f"recall@{k}": sum(rank <= k for rank in ranks) for k in (1, 5, 10)}
        expected = {name: 100 * hits / len(ranks) for name, hits in shares.items()}
        assert analysis.recall(u, v, ratings) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(UserError, match="no pair is rated 5.0"):
        analysis.recall(u, v, np.full(len(u), 4.9))


def test_alignment_and_uniformity_equal_a_double_loop():
    def squared(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b))

    for seed in range(10):
        u, v, ratings = random_pairs(seed)
        for threshold in (4, 2.5):
            distances = [squared(*row[:2]) for row in zip(u, v, ratings) if row[2] > threshold]
            expected = sum(distances) / len(distances)
            found = analysis.alignment(u, v, ratings, threshold)
            assert found == pytest.approx(expected, abs=1e-12)
        corpus = [*u, *v]
        pairs = [(a, b) for i, a in enumerate(corpus) for j, b in enumerate(corpus) if i != j]
        expected = math.log(sum(math.exp(-2 * squared(*pair)) for pair in pairs) / len(pairs))
        assert analysis.uniformity(u, v) == pytest.approx(expected, abs=1e-12)


def test_nearest_is_without_the_query_and_ties_keep_their_order():
    vectors = {"a": [0.6, 0.8], "b": [1, 0], "c": [0.6, 0.8], "d": [-1, 0], "q": [1, 0]}
    vectors = {name: np.array(vector) for name, vector in vectors.items()}
    found = analysis.nearest("q", list("abqcd"), vectors, 3)
    assert found == [("b", 1.0), ("a", 0.6), ("c", 0.6)]


# ------------------------------------------------------------------------------------- the commands


def test_commands_print_and_write_the_same_numbers(made, tmp_path, command):
    """Table 9's neighbours, Table 10's recall and Table 11, of the same vectors."""
    path, poolers = tmp_path / "r.json", ["mean", "cls_before_pooler"]

    def run(*words) -> tuple[str, list[dict]]:
        done = command(analysis.main, *words, "--json", path)
        assert done.code == 0, done.err
        return done.out, [json.loads(line) for line in path.read_text().splitlines()]

    for name, keys, digits in [
        ("retrieval", ("recall@1", "recall@10"), 2),
        ("uniformity", ("alignment", "uniformity"), 3),
    ]:
        words = [name, SMALL, "--pooler", ",".join(poolers), "--data", made, "--amp", "bf16"]
        out, rows = run(*words)
        assert [row["pooler"] for row in rows] == poolers
        for row, line in zip(rows, out.splitlines(), strict=True):
            assert all(f"{key} {row[key]:.{digits}f}" in line for key in keys)
    query = "the cat eats fish"
    out, (row,) = run("neighbours", SMALL, "--query", query, "--top-k", 2, "--data", made)
    left, right, ratings = eval_sts.load_set("STSB", made)
    model = DiffCSE(SMALL, device="cpu")
    model.build_index(list(dict.fromkeys(left + right)))
    assert [name for name, _ in row[query]] == [s for s, _ in model.search(query, top_k=2)]
    assert all(f"{cosine:.2f}  {text}" in out for text, cosine in row[query])
    out, (row,) = run("distribution", SMALL, "--data", made, "--out", tmp_path / "plot")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    u, v = (model.encode(side, return_numpy=True).astype(np.float64) for side in (left, right))
    bins = binned_statistic(ratings, (u * v).sum(1), "mean", bins=5)
    means = [value["mean"] for key, value in row.items() if "-" in key and isinstance(value, dict)]
    assert means == pytest.approx(bins.statistic, abs=1e-5)
    assert f"rated {bins.bin_edges[4]:.3g}-{bins.bin_edges[5]:.3g}: {means[4]:.2f}" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["retrieval", SMALL, "--pooler", "men"], "'men' is unknown"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "required: command"),
        (["neighbours", SMALL, "--top-k", "0"], "--top-k: '0' is not a positive integer"),
        (["retrieval", SMALL, "--data", "/no/such"], "no folder STS"),
        (["uniformity", SMALL, "--threshold", "50"], "no pair is rated above 50"),
        (["distribution", SMALL], "required: --out"),
        (["distribution", SMALL, "--out", "x", "--labels", "a", "b"], "2 labels for 1 panels"),
    ],
)
def test_mistakes_are_one_line(made, command, words, message):
    data = ["--data", made] if words[1:] and "--data" not in words else []
    done = command(analysis.main, *words, *data)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_vectors_with_nan_are_a_user_error(made, monkeypatch, command):
    def broken(bert, tokenizer, sentences, **_):
        return np.full((len(sentences), 3), np.nan)

    monkeypatch.setattr(eval_sts, "encode", broken)
    done = command(analysis.main, "uniformity", SMALL, "--data", made)
    assert done.code == 2 and "NaN or infinity" in done.err


def test_the_papers_97_pairs_and_2758_sentences(senteval):
    pairs = analysis.load_set("STSB", senteval)
    assert pairs[2].count(5) == 97 and len(pairs[0] + pairs[1]) == 2758
    assert analysis.QUERIES[0] in pairs[0]


# -------------------------------------------------------------------------------------------- plots


def test_mean_curve_equals_numpy():
    """Runs end at different steps. A step counts for the runs that have a value there."""
    rng = np.random.default_rng(0)
    values = {0: [*rng.random(4)], 3: [0.5], 10: [*rng.random(2)], 20: [*rng.random(3)]}
    logs = [[{"step": 5, "y": 1.0}, {"step": 7, "x": None}] for _ in range(4)]
    for step, numbers in reversed(values.items()):
        for log, x in zip(logs, numbers):
            log.append({"step": step, "x": x})
    curve = plots.mean_curve(logs, "x")
    assert curve["steps"] == list(values) and curve["runs"] == [4, 1, 2, 3]
    for name, function in (("mean", np.mean), ("std", np.std)):
        assert curve[name] == pytest.approx([function(x) for x in values.values()], abs=1e-6)
    assert plots.mean_curve(logs, "z") == {"steps": [], "mean": [], "std": [], "runs": []}


def write_log(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that the commands save."""
    figures, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda fig, out: figures.append(fig) or save(fig, out))
    return figures


def test_curves_are_means_and_deviations():
    logs = [[60, 62, 64], [61, 63, 67]], [[50, 55]]
    curves = []
    for values in logs:
        rows = [[{"step": 20 * i, "score": x} for i, x in enumerate(log)] for log in values]
        curves.append(plots.mean_curve(rows, "score"))
    fig = plots.plot_curves(["a", "b"], curves)
    (axis,) = fig.axes
    lines = [line.get_xydata().tolist() for line in axis.lines]
    assert lines == [[[0, 60.5], [20, 62.5], [40, 65.5]], [[0, 50], [20, 55]]]
    band = axis.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (60, 67)  # 60.5 - 0.5, 65.5 + 1.5
    assert [text.get_text() for text in fig.legends[0].texts] == ["a", "b"]
    assert axis.get_xlabel() == "steps"
    styles = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in axis.lines}
    assert len(styles) == 2


def test_a_field_of_runs_is_drawn_against_another(tmp_path, command, drawn):
    for name, start in {"old": 5, "new": 4}.items():
        rows = [{"step": 1, "loss": 7.0}]
        rows += [{"step": i, "tokens": 1e6 * i, "held_out_loss": start - i} for i in range(3)]
        write_log(tmp_path / name / "log.jsonl", rows)
    out = tmp_path / "new" / "curves"
    words = [tmp_path / "old", tmp_path / "new", "--field", "held_out_loss", "--out", out]
    done = command(plots.main, *words, "--against", "tokens")
    assert done.out.split() == [f"{out}.png", f"{out}.svg"]
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    assert [list(line.get_ydata()) for line in axis.lines] == [[5, 4, 3], [4, 3, 2]]
    assert [list(line.get_xdata()) for line in axis.lines] == [[0, 1e6, 2e6]] * 2
    assert [line.get_label() for line in axis.lines] == ["old", "new"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("tokens", "held_out_loss")
    assert command(plots.main, *words).code == 0
    assert [list(line.get_xdata()) for line in drawn[1].axes[0].lines] == [[0, 1, 2]] * 2
    for more in (["--against", "tokenz"], ["--field", "held_out_los"]):
        done = command(plots.main, *words, *more)
        assert (done.code, done.err.count("\n")) == (2, 1) and more[1] in done.err


def test_last_values_of_a_report_are_drawn_against_a_setting(tmp_path, command, drawn):
    """Sorted by the setting, one line for each file."""
    for name, mean in {"own_h": 70, "other_h": 80}.items():
        groups = []
        for lam in (5.0, 0.0, 1.0):
            curve = {"steps": [0, 10], "mean": [1, mean - lam], "std": [0, lam / 10]}
            settings = {"lam": lam, "seed": 0}
            groups.append({"name": f"lam {lam}", "settings": settings, "curves": {"score": curve}})
        (tmp_path / f"{name}.json").write_text(json.dumps({"groups": groups}))
    words = [tmp_path / "own_h.json", tmp_path / "other_h.json", "--field", "score"]
    words += ["--out", tmp_path / "lam", "--against"]
    assert command(plots.main, *words, "lam").code == 0
    (axis,) = drawn[0].axes
    points = [line.get_xydata().tolist() for line in axis.lines]
    assert points == [[[0, y], [1, y - 1], [5, y - 5]] for y in (70, 80)]
    assert axis.collections[0].get_paths()[0].get_extents().y1 == 70
    assert [line.get_label() for line in axis.lines] == ["own h", "other h"]
    done = command(plots.main, *words, "lambda")
    assert done.code == 2 and "no lambda beside score" in done.err


def test_a_field_of_a_report_is_drawn(tmp_path, command, drawn):
    curve = {"steps": [0, 10], "mean": [0.0, 0.5], "std": [0.0, 0.1], "runs": [2, 2]}
    none = {"steps": [], "mean": [], "std": [], "runs": []}
    named = [{"name": "given own", "curves": {"h_gap": curve}}, {"name": "lam 0", "curves": {}}]
    content = {"groups": [*named, {"name": "none", "curves": {"h_gap": none}}]}
    (report := tmp_path / "report.json").write_text(json.dumps(content))
    (single := tmp_path / "one_group.json").write_text(json.dumps({"groups": named[:1]}))
    words = [report, single, "--field", "h_gap", "--out", tmp_path / "gap"]
    assert command(plots.main, *words).out.split()[0] == f"{tmp_path / 'gap'}.png"
    (axis,) = drawn[0].axes
    assert [line.get_xydata().tolist() for line in axis.lines] == [[[0, 0], [10, 0.5]]] * 2
    assert axis.get_ylabel() == "h_gap"
    labels = [text.get_text() for text in drawn[0].legends[0].texts]
    assert labels == ["given own", "one group"]
    words.remove(single)
    for text in ("{}", content["groups"].clear() or json.dumps(content)):
        report.write_text(text)
        done = command(plots.main, *words)
        assert (done.code, done.err.count("\n")) == (2, 1) and "no h_gap in " in done.err


def test_ridges_are_the_densities_of_the_groups():
    """Against numpy and scipy. A cosine may exceed 1 by rounding."""
    rng = np.random.default_rng(0)
    ratings = np.concatenate([[0, 0.99, 1, 2.5, 3.999, 4, 5], rng.uniform(0, 3.9, 100)])
    groups, names = plots.group_ratings(ratings)
    assert groups[:7].tolist() == [0, 0, 1, 2, 3, 4, 4]
    assert names == ["0-1", "1-2", "2-3", "3-4", "4-5"]
    assert plots.group_ratings(np.array([-1.0, 0, 1]))[0].tolist() == [0, 2, 4]
    cosines = rng.uniform(0.3, 0.9, len(ratings))
    cosines[6] = 1 + 1e-12
    panels = [("x", cosines, ratings), ("y", np.full(3, 0.5), np.array([0.0, 1, 5]))]
    medians = binned_statistic(ratings, cosines, "median", bins=5).statistic
    for words, lowest in (([], cosines.min()), ([0.2], 0.2)):
        fig = plots.plot_ridges(panels, *words)
        edges = np.linspace(lowest, 1, 31)
        counts = [np.histogram(np.minimum(cosines[groups == i], 1), edges)[0] for i in range(5)]
        density = [count / count.sum() for count in counts]
        lines = fig.axes[0].lines
        for i in range(5):
            ridge, median = lines[2 * i].get_ydata(), lines[2 * i + 1].get_xydata()
            assert ridge == pytest.approx(i + 0.95 * density[i] / np.max(density))
            assert median.ravel() == pytest.approx([medians[i], i, medians[i], i + 0.25])
        assert lines[0].get_xdata() == pytest.approx((edges[1:] + edges[:-1]) / 2)
    assert len(fig.axes[1].lines) == 5 + 3  # an empty group has no median
    assert [text.get_text() for text in fig.axes[0].get_yticklabels()] == names
    assert [axis.get_title() for axis in fig.axes] == ["x", "y"]
    assert [axis.get_xlabel() for axis in fig.axes] == ["cosine similarity"] * 2
    assert [axis.get_ylabel() for axis in fig.axes] == ["human rating", ""]


def test_colours_are_readable_on_white_and_on_black():
    """WCAG 2.2, 1.4.11: a contrast of 3 with the page's two backgrounds."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for colour in plots.COLOURS:
        light, own, dark = (luminance(c) + 0.05 for c in ("#fdfdfb", colour, "#16181c"))
        assert light / own >= 3 and own / dark >= 3, colour
    assert len(set(plots.COLOURS)) == len(set(plots.DASHES)) == 8


# ------------------------------------------------------------------------------------------------
# What the notebook draws


def test_tokens_are_aligned_do_not_overlap_and_stay_on_the_page():
    rng = np.random.default_rng(0)
    words = ["a" * int(n) for n in rng.integers(1, 12, 40)]
    words += ["привет", "##s", "[MASK]", "$x$", "$\\frac$"]  # not read as a formula
    tokens = [(word, float(rng.random()), rng.choice(["", "false alarm"])) for word in words]
    others = [("b", float(i % 2), "") for i in range(len(words))]
    fig = plots.plot_tokens({"one": tokens, "two": others})
    fig.canvas.draw()
    texts = {True: [], False: []}  # tokens, and titles, marks and numbers
    for text in fig.axes[0].texts:
        texts[text.get_family() == ["monospace"]].append(text)
    assert [text.get_text() for text in texts[True]] == words + ["b"] * len(words)
    rest = [text.get_text() for text in texts[False] if text.get_text()]
    blocks = rest.count("one")
    assert blocks == rest.count("two") > 1
    assert [t for t in rest if t == "false alarm"] == [mark for *_, mark in tokens if mark]
    assert [t for t in rest if t[0].isdigit()] == [f"{shade:.2f}" for _, shade, _ in tokens]
    boxes = [text.get_window_extent() for text in texts[True]]
    for text in fig.axes[0].texts:
        box = text.get_window_extent()
        assert not text.get_text() or (0 <= box.x0 and box.x1 <= fig.bbox.x1)
        assert not text.get_text() or (0 <= box.y0 and box.y1 <= fig.bbox.y1)
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])
        if i < len(words):
            assert abs(one.x0 - boxes[i + len(words)].x0) < 1
    with pytest.raises(ValueError):
        plots.plot_tokens({"one": tokens, "two": others[1:]})


def test_a_matrix_has_its_numbers_in_the_cells():
    values = np.array([[1.0, -0.25], [0.333, 0.5]])
    (axis,) = plots.plot_matrix(values, ["a", "b"], ["c", "d"], "a title").axes
    cells = {text.get_position(): text.get_text() for text in axis.texts}
    assert cells == {(0, 0): "1.00", (1, 0): "-0.25", (0, 1): "0.33", (1, 1): "0.50"}
    assert [label.get_text() for label in axis.get_xticklabels()] == ["c", "d"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert axis.get_title() == "a title"


def test_a_run_is_followed_while_it_goes_on(tmp_path, monkeypatch):
    """In place of IPython's display. The last curve is drawn even after an error."""
    shown = []
    update = lambda fig: shown.append(fig.axes[0].lines[0].get_xydata().tolist())  # noqa: E731
    handle = SimpleNamespace(update=update)
    display = lambda fig, display_id: update(fig) or handle  # noqa: E731
    for name, module in fake_ipython(display).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ZeroDivisionError), plots.following({"run": str(tmp_path)}, "score", 0.01):
        write_log(tmp_path / "log.jsonl", [{"step": 0, "score": 70}])
        while [[0, 70]] not in shown:
            time.sleep(0.01)
        write_log(tmp_path / "log.jsonl", [{"step": 0, "score": 70}, {"step": 10, "score": 71}])
        raise ZeroDivisionError
    assert shown[0] == [] and shown[-1] == [[0, 70], [10, 71]]
    assert threading.active_count() == 1 or "draw_again" not in str(threading.enumerate())


def test_errors_in_a_notebook_are_one_line(monkeypatch, capsys):
    handlers = {}
    shell = SimpleNamespace(
        set_custom_exc=lambda kinds, show: handlers.update(dict.fromkeys(kinds, show))
    )
    for name, module in fake_ipython(None, shell).items():
        monkeypatch.setitem(sys.modules, name, module)
    plots.plain_errors()
    assert handlers.keys() == {UserError, ModelError}
    handlers[UserError](shell, UserError, UserError("the sentence is empty"), None, tb_offset=1)
    assert capsys.readouterr().err == "error: the sentence is empty\n"
