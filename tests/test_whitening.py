"""lab/whitening.py: covariance 1, equality with scikit-learn, the command."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from sklearn.decomposition import PCA

import eval_sts
from engine.errors import UserError
from lab import whitening

SMALL = Path(__file__).parent.parent / "assets" / "small-bert"


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


def test_whitening_by_itself_is_fitted_on_both_sides_of_the_set():
    rng = np.random.default_rng(7)
    u, v = rng.normal(size=(30, 4)) + 5, rng.normal(size=(30, 4)) - 2
    white = np.concatenate(whitening.whiten_self(u, v))
    np.testing.assert_allclose(np.cov(white.T), np.eye(4), atol=1e-8)
    gold, sentences = list(range(30)), [f"s{i}" for i in range(60)]
    vectors = dict(zip(sentences, np.concatenate([u, v])))
    sets = {"X": (sentences[:30], sentences[30:], gold)}
    scores = eval_sts.score_pairs(
        lambda s: np.stack([vectors[x] for x in s]), sets, whitening.whiten_self
    )
    cosines = [1 - scipy.spatial.distance.cosine(a, b) for a, b in zip(white[:30], white[30:])]
    expected = 100 * scipy.stats.spearmanr(cosines, gold).statistic
    assert scores["X"] == pytest.approx(expected, abs=1e-9)


def test_command_prints_a_row_without_whitening_and_one_for_each_source(
    made, tmp_path, monkeypatch, capsys
):
    text, words = tmp_path / "text.txt", "a man dog plays red guitar the".split()
    lines = [" ".join(random.Random(i).choices(words, k=5)) for i in range(400)]
    text.write_text("\n".join(lines) + "\n")
    options = ["--pooler", "mean,max", "--with", f"self,{text}", "--json", str(tmp_path / "r.json")]
    args = ["whitening", str(SMALL), "--data", str(made), *options]
    monkeypatch.setattr(sys, "argv", args)
    whitening.main()
    rows = [json.loads(line) for line in (tmp_path / "r.json").read_text().splitlines()]
    out = capsys.readouterr().out
    assert [row.get("whitened") for row in rows] == [None, "self", str(text)] * 2
    assert rows[0]["STS12"] != rows[1]["STS12"] != rows[2]["STS12"] != rows[3]["STS12"]
    labels = ["mean", "mean, white by itself", "mean, white by text.txt", "max"]
    assert all(f"{SMALL} ({label}) " in out for label in labels)
    assert out.count("development: ") == 6
