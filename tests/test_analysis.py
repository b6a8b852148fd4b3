"""lab/analysis.py: measures by hand and against a double loop, AskUbuntu's files, the commands."""

import gzip
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score

import eval_sts
from embed import l2_normalize
from engine.errors import UserError, run_main
from lab import analysis

ROOT = Path(__file__).parent.parent
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


def test_recall_by_hand():
    """Angles in degrees: pair A is 0 and 10, pair B is 12 and 90; A is rated 5. Nearest to 0 is 10;
    nearest to 10 is 12, then 0. So 1 of 2 at k = 1, and 2 of 2 at k = 5."""

    def at(*degrees):
        return np.stack([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])

    scores = analysis.recall(at(0, 12), at(10, 90), np.array([5.0, 1.0]))
    assert scores == {"recall@1": 50, "recall@5": 100, "recall@10": 100}
    with pytest.raises(UserError, match="no pair is rated 5.0"):
        analysis.recall(at(0, 12), at(10, 90), np.array([4.9, 1.0]))


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


def test_alignment_and_uniformity_by_hand():
    """u = (1, 0), v = (0, 1): |u - v|^2 = 2 and log exp(-4) = -4. For equal vectors 0 and 0."""
    u, v = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert analysis.alignment(u, v, np.array([5.0]), 4) == pytest.approx(2)
    assert analysis.uniformity(u, v) == pytest.approx(-4)
    assert analysis.alignment(u, u, np.array([5.0]), 4) == 0
    assert analysis.uniformity(u, u) == pytest.approx(0)
    with pytest.raises(UserError, match="no pair is rated above 4"):
        analysis.alignment(u, v, np.array([4.0]), 4)


def test_rank_scores_by_hand_and_equal_scikit_learn():
    """Hits at ranks 2 and 4: precision 1/2 and 2/4, average 1/2; reciprocal rank 1/2."""
    expected = {"MAP": 50, "MRR": 50, "P@1": 0, "P@5": 40}
    assert analysis.rank_scores([False, True, False, True, False, False]) == expected
    rng = np.random.default_rng(0)
    for _ in range(100):
        hits = rng.random(20) < 0.3
        hits[rng.integers(20)] = True
        scores, ours = -np.arange(20), analysis.rank_scores(hits.tolist())
        assert ours["MAP"] == pytest.approx(100 * average_precision_score(hits, scores), abs=1e-9)
        theirs = label_ranking_average_precision_score([hits], [scores])
        assert ours["MAP"] == pytest.approx(100 * theirs, abs=1e-9)
        assert ours["MRR"] == pytest.approx(100 / (1 + hits.argmax()))
        assert ours["P@5"] == pytest.approx(100 * hits[:5].mean())


def test_neighbours_are_the_most_similar_and_ties_keep_their_order():
    corpus = np.array([[0.6, 0.8], [1, 0], [0.6, 0.8], [-1, 0]])
    found = analysis.neighbours(np.array([1.0, 0.0]), corpus, 3)
    assert found == [(1, 1.0), (0, 0.6), (2, 0.6)]


def test_groups_of_ratings():
    ratings = np.array([0, 0.99, 1, 2.5, 3.999, 4, 5])
    assert analysis.group(ratings).tolist() == [0, 0, 1, 2, 3, 4, 4]


# -------------------------------------------------------------------------------------- AskUbuntu


@pytest.fixture
def askubuntu(tmp_path) -> Path:
    """Files in the public format; the second row of test.txt has no duplicate."""
    text = "\n".join(f"{i}\ttitle {i} of a question\tbody {i} , long" for i in range(10, 40))
    (tmp_path / "text_tokenized.txt.gz").write_bytes(gzip.compress(text.encode()))
    candidates = [" ".join(map(str, range(11 + s, 31 + s))) for s in (0, 5, 9)]
    (tmp_path / "test.txt").write_text(
        f"10\t12 15\t{candidates[0]}\t1.5 2\n10\t\t{candidates[1]}\t3\n20\t30\t{candidates[2]}\t3\n"
    )
    (tmp_path / "dev.txt").write_text(f"10\t12\t{candidates[0]}\t1\n")
    return tmp_path


def test_askubuntu_is_read_and_rows_without_a_duplicate_are_skipped(askubuntu):
    rows = analysis.read_askubuntu(askubuntu, "test")
    assert [row[0] for row in rows] == ["title 10 of a question", "title 20 of a question"]
    assert [len(row[1]) for row in rows] == [20, 20] and rows[0][1][1] == "title 12 of a question"
    assert [np.flatnonzero(row[2]).tolist() for row in rows] == [[1, 4], [10]]
    packed = askubuntu / "text_tokenized.txt.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert analysis.read_askubuntu(askubuntu, "test") == rows


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("20\t30", "99\t30", "test.txt line 3: question 99 is not in text_tokenized.txt.gz"),
        ("10\t12 15", "10 12 15", "test.txt line 1: question 10 12 15"),
        ("10\t12 15\t", "10\t", "test.txt line 1: question 1.5"),
        (None, "10\t11", "test.txt line 1: 2 columns"),
        (None, "10\t\t11\t1", "no row has a duplicate"),
    ],
)
def test_damaged_askubuntu_is_a_user_error(askubuntu, old, new, message):
    text = (askubuntu / "test.txt").read_text()
    (askubuntu / "test.txt").write_text(text.replace(old, new, 1) if old else new + "\n")
    with pytest.raises(UserError) as error:
        analysis.read_askubuntu(askubuntu, "test")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_askubuntu_without_its_text_says_where_to_find_it(tmp_path):
    with pytest.raises(UserError, match="no text_tokenized.txt.gz in it; it comes from https"):
        analysis.read_askubuntu(tmp_path, "test")


# ----------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def sts(tmp_path_factory) -> Path:
    """An STS-B test set of the published size, of 60 sentences; the rating is their overlap."""
    root, rng = tmp_path_factory.mktemp("sts"), np.random.default_rng(1)
    words = "a the man cat dog plays eats guitar fish red in on".split()
    sentences = [" ".join(rng.choice(words, size=rng.integers(3, 8))) for _ in range(60)]
    lines = []
    for i in range(1379):
        a, b = rng.choice(sentences, size=2)
        overlap = len({*a.split()} & {*b.split()}) / len({*a.split()} | {*b.split()})
        lines.append(f"g\tf\ty\t{i}\t{5 * overlap:.1f}\t{a}\t{b}")
    (root / "STS/STSBenchmark").mkdir(parents=True)
    (root / "STS/STSBenchmark/sts-test.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def run(monkeypatch, capsys):
    """The command: what it prints to standard output."""

    def command(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["lab.analysis", *map(str, words)])
        analysis.main()
        return capsys.readouterr().out

    return command


def test_commands_print_and_write_the_same_numbers(sts, askubuntu, tmp_path, run):
    report = tmp_path / "r.json"
    poolers = ["mean", "cls_before_pooler"]
    for command, keys, digits in [
        ("retrieval", ("recall@1", "recall@10"), 2),
        ("uniformity", ("alignment", "uniformity"), 3),
    ]:
        words = [command, SMALL, "--pooler", ",".join(poolers), "--data", sts, "--json", report]
        lines = run(*words, "--amp", "bf16").splitlines()
        rows = [json.loads(line) for line in report.read_text().splitlines()]
        assert [row["pooler"] for row in rows] == poolers and len(lines) == 2
        for row, line in zip(rows, lines):
            assert all(f"{key} {row[key]:.{digits}f}" in line for key in keys)
    query = "the cat eats fish"
    words = ["neighbours", SMALL, "--query", query, "--top-k", 2, "--data", sts, "--json", report]
    out = run(*words)
    found = json.loads(report.read_text())[query]
    assert len(found) == 2 and found[0][1] >= found[1][1]
    assert all(f"{cosine:.2f}  {text}" in out for text, cosine in found)
    out = run("askubuntu", SMALL, "--data", askubuntu, "--json", report)
    assert "(2 queries)" in out and 0 < json.loads(report.read_text())["MAP"] <= 100


def test_vectors_with_nan_are_a_user_error(sts, monkeypatch, run):
    def broken(bert, tokenizer, sentences, **_):
        return np.full((len(sentences), 3), np.nan)

    monkeypatch.setattr(eval_sts, "encode", broken)
    with pytest.raises(UserError, match="NaN or infinity"):
        run("uniformity", SMALL, "--data", sts)


def test_plots_are_written(sts, tmp_path, run):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    for command in ("distribution", "ratings"):
        words = [command, SMALL, "--pooler", "mean,cls_before_pooler", "--data", sts]
        assert "rated 4-5" in run(*words, "--out", tmp_path / command)
        assert (tmp_path / f"{command}.png").stat().st_size > 5000
        assert (tmp_path / f"{command}.svg").is_file()


@pytest.mark.parametrize(
    "words, message",
    [
        (["retrieval", SMALL, "--pooler", "men"], "'men' is unknown"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "required: command"),
        (["neighbours", SMALL, "--top-k", "0"], "--top-k: '0' is not a positive integer"),
        (["retrieval", SMALL, "--data", "/no/such"], "no folder STS"),
        (["uniformity", SMALL, "--threshold", "5"], "no pair is rated above 5"),
        (["ratings", SMALL], "required: --out"),
        (["ratings", SMALL, "--out", "x", "--labels", "a", "b"], "2 labels for 1 panels"),
    ],
)
def test_mistakes_are_one_line(sts, monkeypatch, capsys, words, message):
    data = ["--data", sts] if words[1:] and "--data" not in words else []
    monkeypatch.setattr(sys, "argv", ["lab.analysis", *map(str, words + data)])
    with pytest.raises(SystemExit) as exit:
        run_main(analysis.main)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


def test_the_papers_97_pairs_and_2758_sentences(senteval):
    pairs = analysis.load_set("STSB", senteval)
    assert pairs[2].count(5) == 97 and len(pairs[0] + pairs[1]) == 2758
    assert analysis.QUERIES[0] in pairs[0]
