"""lab/whitening.py: covariance 1, equality with scikit-learn, the command."""

import json
from functools import partial

import numpy as np
import pytest
from scipy.spatial.distance import cosine
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

import eval_sts
from conftest import ROOT, random_sentences
from engine.errors import UserError
from lab import whitening

SMALL = ROOT / "assets" / "small-bert"


def test_whitened_vectors_have_mean_0_and_covariance_1_as_in_scikit_learn():
    rng = np.random.default_rng(5)
    vectors = (rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8)) + 3).astype(np.float32)
    mean, matrix = whitening.whitening(vectors)
    white = (vectors - mean) @ matrix
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(np.cov(white.T), np.eye(8), atol=1e-8)
    theirs = PCA(whiten=True).fit_transform(vectors.astype(np.float64))
    np.testing.assert_allclose(white @ white.T, theirs @ theirs.T, atol=1e-6)  # up to a rotation


def test_whitening_leaves_out_directions_without_variance():
    rng = np.random.default_rng(6)
    flat = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 7))  # 7 numbers, 3 dimensions
    mean, matrix = whitening.whitening(flat)
    assert matrix.shape == (7, 3)
    np.testing.assert_allclose(np.cov(((flat - mean) @ matrix).T), np.eye(3), atol=1e-8)
    with pytest.raises(UserError, match="NaN"):
        whitening.whitening(np.full((3, 3), np.nan))


@pytest.mark.parametrize("source", ["both sides of the set", "other vectors"])
def test_scores_are_those_of_vectors_that_scikit_learn_whitens(source):
    rng = np.random.default_rng(7)
    u, v, others = rng.normal(size=(30, 4)) + 5, rng.normal(size=(30, 4)) - 2, rng.random((90, 4))
    fitted = whitening.whitening(others) if source == "other vectors" else None
    sentences, gold = [f"s{i}" for i in range(60)], list(range(30))
    vectors = dict(zip(sentences, np.concatenate([u, v])))

    transform = partial(whitening.whiten, fitted=fitted)
    sets = {"X": (sentences[:30], sentences[30:], gold)}
    pca = PCA(whiten=True).fit(np.concatenate([u, v]) if fitted is None else others)
    cosines = [1 - cosine(*pair) for pair in zip(pca.transform(u), pca.transform(v))]
    expected = 100 * spearmanr(cosines, gold).statistic
    assert eval_sts.score_pairs(partial(whitening.look_up, vectors), sets, transform)[
        "X"
    ] == pytest.approx(expected, abs=1e-9)


def test_command_has_a_row_without_whitening_and_one_for_each_source(
    made, tmp_path, command, monkeypatch
):
    text, file = tmp_path / "text.txt", tmp_path / "rows.json"
    text.write_text("\n".join(random_sentences(400, 3, 1)) + "\n")
    fit, fitted_on = whitening.whitening, set()
    record = lambda vectors: (fitted_on.add(len(vectors)), fit(vectors))[1]  # noqa: E731
    monkeypatch.setattr(whitening, "whitening", record)
    monkeypatch.setattr(whitening, "MAX_SENTENCES", 123)
    options = ["--pooler", "mean,max", "--with", f"self,{text}", "--data", made, "--json", file]
    out = command(whitening.main, SMALL, *options).out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row.get("whitened") for row in rows] == [None, "self", str(text)] * 2
    assert [row["pooler"] for row in rows] == ["mean"] * 3 + ["max"] * 3
    assert len({row["STS12"] for row in rows}) == 6
    assert [row["average"] for row in rows] == [eval_sts.average(row) for row in rows]
    labels = ["mean", "mean, white by self", "mean, white by text.txt", "max"]
    assert all(f"{SMALL} ({label}) " in out for label in labels)
    assert out.count("development: ") == 6 and 123 in fitted_on
