"""lab/analysis.py: every measure by hand and against a double loop, AskUbuntu's files good and bad, the commands."""

import gzip
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score

import data
from bert import UserError
from embed import unit
from lab import analysis

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"


def random_pairs(seed: int, P: int = 40, D: int = 6):
    """Unit vectors of pairs, some sentences twice, and ratings with some of 5 and on the borders."""
    rng = np.random.default_rng(seed)
    u, v = unit(rng.normal(size=(P, D))), unit(rng.normal(size=(P, D)))
    v[: P // 2] = unit(u[: P // 2] + 0.3 * rng.normal(size=(P // 2, D)))
    u[3], v[7], v[9] = u[0], u[0], u[1]  # a sentence in several places
    return u, v, rng.choice([0, 1, 2.5, 4, 4.0001, 5], size=P)


def test_recall_equals_a_double_loop():
    for seed in range(20):
        u, v, ratings = random_pairs(seed)
        places, ranks = [*u, *v], []
        for i, rating in enumerate(ratings):
            if rating == 5:
                for query, other in ((i, i + len(u)), (i + len(u), i)):
                    wanted = sum(a * b for a, b in zip(places[query], places[other]))
                    better = [p for p in range(len(places)) if p != query and sum(a * b for a, b in zip(places[query], places[p])) > wanted + 1e-9]
                    ranks.append(1 + len(better))
        expected = {f"recall@{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
        assert analysis.recall(u, v, ratings) == pytest.approx(expected, abs=1e-12)


def test_recall_by_hand():
    """On a circle, in degrees: pair A 0 and 10, pair B 12 and 90. Of A rated 5: from 0 the nearest is 10; from 10 it is 12,
    then 0. So 1 of 2 at 1, and 2 of 2 at 5."""
    def at(*degrees):
        return np.stack([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])

    scores = analysis.recall(at(0, 12), at(10, 90), np.array([5.0, 1.0]))
    assert scores == {"recall@1": 50, "recall@5": 100, "recall@10": 100}
    with pytest.raises(UserError, match="no pair is rated 5.0"):
        analysis.recall(at(0, 12), at(10, 90), np.array([4.9, 1.0]))


def test_alignment_and_uniformity_equal_a_double_loop():
    for seed in range(10):
        u, v, ratings = random_pairs(seed)
        for threshold in (4, 2.5):
            distances = [sum((x - y) ** 2 for x, y in zip(a, b)) for a, b, rating in zip(u, v, ratings) if rating > threshold]
            assert analysis.alignment(u, v, ratings, threshold) == pytest.approx(sum(distances) / len(distances), abs=1e-12)
        places, terms = [*u, *v], []
        for i in range(len(places)):
            for j in range(len(places)):
                if i != j:
                    terms.append(math.exp(-2 * sum((x - y) ** 2 for x, y in zip(places[i], places[j]))))
        assert analysis.uniformity(u, v) == pytest.approx(math.log(sum(terms) / len(terms)), abs=1e-12)


def test_alignment_and_uniformity_by_hand():
    """u = (1, 0), v = (0, 1): |u - v|^2 = 2. Both pairs of places are 2 apart: log exp(-4) = -4. One point: 0 and 0."""
    u, v = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert analysis.alignment(u, v, np.array([5.0]), 4) == pytest.approx(2)
    assert analysis.uniformity(u, v) == pytest.approx(-4)
    assert analysis.alignment(u, u, np.array([5.0]), 4) == 0 and analysis.uniformity(u, u) == pytest.approx(0)
    with pytest.raises(UserError, match="no pair is rated above 4"):
        analysis.alignment(u, v, np.array([4.0]), 4)


def test_rank_scores_by_hand_and_against_scikit_learn():
    """Hits at 2 and 4: precision 1/2 and 2/4, average 1/2; reciprocal rank 1/2; none at 1, 2 of the first 5."""
    assert analysis.rank_scores([False, True, False, True, False, False]) == {"MAP": 50, "MRR": 50, "P@1": 0, "P@5": 40}
    rng = np.random.default_rng(0)
    for _ in range(100):
        hits = rng.random(20) < 0.3
        hits[rng.integers(20)] = True
        scores, ours = -np.arange(20), analysis.rank_scores(hits.tolist())
        assert ours["MAP"] == pytest.approx(100 * average_precision_score(hits, scores), abs=1e-9)
        assert ours["MAP"] == pytest.approx(100 * label_ranking_average_precision_score([hits], [scores]), abs=1e-9)
        assert ours["MRR"] == pytest.approx(100 / (1 + hits.argmax())) and ours["P@5"] == pytest.approx(100 * hits[:5].mean())


def test_neighbours_are_the_most_similar_and_ties_keep_their_order():
    corpus = np.array([[0.6, 0.8], [1, 0], [0.6, 0.8], [-1, 0]])
    assert analysis.neighbours(np.array([1.0, 0.0]), corpus, 3) == [(1, 1.0), (0, 0.6), (2, 0.6)]


def test_groups_of_ratings():
    assert analysis.group(np.array([0, 0.99, 1, 2.5, 3.999, 4, 5])).tolist() == [0, 0, 1, 2, 3, 4, 4]


# -------------------------------------------------------------------------------------------------------- AskUbuntu


@pytest.fixture
def askubuntu(tmp_path) -> Path:
    """The public files' form; the second row of test has nothing similar."""
    texts = "\n".join(f"{i}\ttitle {i} of a question\tbody {i} , long" for i in range(10, 40)) + "\n"
    (tmp_path / "text_tokenized.txt.gz").write_bytes(gzip.compress(texts.encode()))
    candidates = [" ".join(map(str, range(11 + s, 31 + s))) for s in (0, 5, 9)]
    (tmp_path / "test.txt").write_text(f"10\t12 15\t{candidates[0]}\t1.5 2\n10\t\t{candidates[1]}\t3\n20\t30\t{candidates[2]}\t3\n")
    (tmp_path / "dev.txt").write_text(f"10\t12\t{candidates[0]}\t1\n")
    return tmp_path


def test_askubuntu_is_read_and_rows_without_a_positive_are_skipped(askubuntu):
    rows = analysis.read_askubuntu(askubuntu, "test")
    assert [row[0] for row in rows] == ["title 10 of a question", "title 20 of a question"]
    assert [len(row[1]) for row in rows] == [20, 20] and rows[0][1][1] == "title 12 of a question"
    assert np.flatnonzero(rows[0][2]).tolist() == [1, 4] and np.flatnonzero(rows[1][2]).tolist() == [10]


@pytest.mark.parametrize("old, new, says", [
    ("20\t30", "99\t30", "test.txt line 3: question 99 is not in text_tokenized.txt.gz"), ("10\t12 15", "10 12 15", "test.txt line 1: question 10 12 15"),
    ("10\t12 15\t", "10\t", "test.txt line 1: question 1.5"), (None, "10\t11", "test.txt line 1: 2 cells"), (None, "10\t\t11\t1", "no row has a similar"),
])  # fmt: skip
def test_damaged_askubuntu_is_a_user_error(askubuntu, old, new, says):
    text = (askubuntu / "test.txt").read_text()
    (askubuntu / "test.txt").write_text(text.replace(old, new, 1) if old else new + "\n")
    with pytest.raises(UserError) as error:
        analysis.read_askubuntu(askubuntu, "test")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_askubuntu_without_its_text_says_where_it_comes_from(tmp_path):
    with pytest.raises(UserError, match="no text_tokenized.txt.gz in it; it comes from https"):
        analysis.read_askubuntu(tmp_path, "test")


# ----------------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def sts(tmp_path_factory) -> Path:
    """STS-B test at its size, of few sentences; as similar as they share words."""
    root, rng = tmp_path_factory.mktemp("sts"), np.random.default_rng(1)
    words = "a the man cat dog plays eats guitar fish red in on".split()
    sentences = [" ".join(rng.choice(words, size=rng.integers(3, 8))) for _ in range(60)]
    lines = []
    for i in range(1379):
        a, b = rng.choice(sentences, size=2)
        lines.append(f"g\tf\ty\t{i}\t{5 * len({*a.split()} & {*b.split()}) / len({*a.split()} | {*b.split()}):.1f}\t{a}\t{b}")
    (root / "STS/STSBenchmark").mkdir(parents=True)
    (root / "STS/STSBenchmark/sts-test.csv").write_text("\n".join(lines) + "\n")
    return root


def run(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr(sys, "argv", ["lab.analysis", *map(str, words)])
    analysis.main()
    return capsys.readouterr().out


def test_commands_print_and_write_the_same_numbers(sts, askubuntu, tmp_path, monkeypatch, capsys):
    report = tmp_path / "r.json"
    for command, keys in (("retrieval", ("recall@1", "recall@10")), ("uniformity", ("alignment", "uniformity"))):
        out = run(monkeypatch, capsys, command, SMALL, "--pooler", "mean,cls_before_pooler", "--data", sts, "--json", report)
        rows = [json.loads(line) for line in report.read_text().splitlines()]
        assert [row["pooler"] for row in rows] == ["mean", "cls_before_pooler"] and len(out.splitlines()) == 2
        digits = 3 if command == "uniformity" else 2
        assert all(f"{key} {row[key]:.{digits}f}" in text for row, text in zip(rows, out.splitlines()) for key in keys)
    out = run(monkeypatch, capsys, "neighbours", SMALL, "--query", "the cat eats fish", "--top-k", 2, "--data", sts, "--json", report)
    found = json.loads(report.read_text())["the cat eats fish"]
    assert len(found) == 2 and all(f"{cosine:.2f}  {text}" in out for text, cosine in found) and found[0][1] >= found[1][1]
    out = run(monkeypatch, capsys, "askubuntu", SMALL, "--data", askubuntu, "--json", report)
    assert "(2 queries)" in out and 0 < json.loads(report.read_text())["MAP"] <= 100


def test_vectors_with_nan_are_a_user_error(sts, monkeypatch):
    monkeypatch.setattr(analysis, "encode", lambda bert, tokenizer, sentences, **_: np.full((len(sentences), 3), np.nan))
    monkeypatch.setattr(sys, "argv", ["lab.analysis", "uniformity", str(SMALL), "--data", str(sts)])
    with pytest.raises(UserError, match="NaN or infinity"):
        analysis.main()


def test_plots_are_written(sts, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="plots: pip install matplotlib")
    for command in ("distribution", "ratings"):
        out = run(monkeypatch, capsys, command, SMALL, "--pooler", "mean,cls_before_pooler", "--data", sts, "--out", tmp_path / command)
        assert "rated 4-5" in out and (tmp_path / f"{command}.png").stat().st_size > 5000 and (tmp_path / f"{command}.svg").is_file()


@pytest.mark.parametrize("words, says", [
    (["retrieval", SMALL, "--pooler", "men"], "'men' is unknown"), (["nonsense"], "invalid choice: 'nonsense'"), ([], "required: command"),
    (["neighbours", SMALL, "--top-k", "0"], "--top-k: '0' is not a whole number of at least 1"), (["retrieval", SMALL, "--data", "/no/such"], "no folder STS"),
    (["uniformity", SMALL, "--threshold", "5"], "no pair is rated above 5"), (["ratings", SMALL], "required: --out"),
    (["ratings", SMALL, "--out", "x", "--labels", "a", "b"], "--labels: 2 for 1 panels"),
])  # fmt: skip
def test_mistakes_exit_2(sts, monkeypatch, capsys, words, says):
    monkeypatch.setattr(sys, "argv", ["lab.analysis", *map(str, words), *(["--data", str(sts)] if "--data" not in words and words[1:] else [])])
    with pytest.raises(SystemExit) as exit:
        data.run_main(analysis.main)
    assert exit.value.code == 2 and says in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- real data, if here


def test_the_papers_97_pairs_and_2758_sentences(senteval):
    pairs = analysis.load_set("STSB", senteval)
    assert pairs[2].count(5) == 97 and len(pairs[0] + pairs[1]) == 2758 and analysis.QUERIES[0] in pairs[0]
