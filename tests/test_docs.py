"""docs.py: the corpus and the pairs are what they should be, the score is right, and the demo runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import docs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return docs.training_sentences()


def test_there_is_enough_and_it_reads_as_english(corpus):
    """Counts differ by versions of Python, NumPy and PyTorch; these bounds leave room."""
    assert len(corpus) > 12_000 and len(docs.same_function_pairs()) > 150 and len(docs.documentation_entries()) > 4_000
    assert len({docs.normal(sentence) for sentence in corpus}) == len(corpus)
    for sentence in corpus:
        assert 5 <= len(sentence.split()) <= 40 and re.search(r"[.?!][\"')]?$", sentence) and not re.search(r"[\\{}`|]|::|>>>", sentence)
    assert sum(bool(re.search(r"\b(the|a|is|of|to)\b", sentence)) for sentence in corpus) > 0.85 * len(corpus)


def test_what_is_scored_is_not_trained_on(corpus):
    scored = {docs.normal(text) for _, *texts in docs.same_function_pairs() for text in texts}
    assert len(scored) == 2 * len(docs.same_function_pairs())  # no summary serves two functions
    assert not scored & {docs.normal(sentence) for sentence in corpus}
    assert len(docs.documentation_sentences(exclude=[corpus[7].upper().rstrip(".")])) >= len(corpus) and corpus[7] not in docs.documentation_sentences([corpus[7].upper()])


def test_the_same_on_every_run():
    code = "import docs, hashlib; print(hashlib.sha256(repr((docs.training_sentences(), docs.same_function_pairs(), docs.documentation_entries())).encode()).hexdigest())"
    hashes = set()
    for seed in ("1", "2"):
        shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": seed})
        assert shown.returncode == 0 and shown.stderr == "", shown.stderr  # and importing all that prints nothing
        hashes.add(shown.stdout)
    assert len(hashes) == 1


@pytest.mark.parametrize("doc, sentences", [
    ("Return the sum.\n\nParameters\n----------\nx : int\n    The number of things\n    that are there.", ["Return the sum.", "The number of things that are there."]),
    ("f(x) -> y\n\nUse :func:`~a.g`, e.g. on ``x``. It is *fast*.\n\n>>> f(1)", ["Use g, e.g. on x.", "It is fast."]),
    ("Words::\n\n    code here\n    more code\n\nAfter it.", ["Words::", "After it."]),
])  # fmt: skip
def test_docstrings_to_sentences(doc, sentences):
    assert [s for p in docs.paragraphs(doc) for s in docs.sentences(docs.plain(p))] == sentences


def test_retrieval_scores_by_hand():
    """Cosines of a's rows with b's: row 0 finds its partner second, row 1 first, row 2 ties with another: no luck counts."""
    a, b = np.eye(3) * [[2.0], [1], [5]], np.array([[0.6, 0, 0.8], [0, 3, 0], [0.8, 0, 0.6]])
    forward = docs.retrieval_scores(a, b, np.array([0]))  # cosines .6, 0, .8: rank 2 of 3; from b's side .6, 0, .8: rank 2
    assert forward["mrr"] == 50 and forward["recall@1"] == 0 and forward["recall@5"] == 100
    assert docs.retrieval_scores(a, b, np.array([1])) == {"mrr": 100, "recall@1": 100, "recall@5": 100, "recall@10": 100}
    assert docs.retrieval_scores(np.ones((4, 2)), np.ones((4, 2)), np.arange(4))["mrr"] == 25  # all alike: the last of four


def test_halves_are_disjoint_and_a_perfect_encoder_scores_100():
    score = docs.DocsScore()
    P = len(score.left)
    which = {text: i for side in (score.left, score.right) for i, text in enumerate(side)}
    perfect = score.test(lambda texts: np.eye(P)[[which[text] for text in texts]])
    assert perfect["mrr"] == perfect["recall@1"] == 100 and perfect["spearman"] == pytest.approx(100)
    assert 0.35 < score.half.mean() < 0.65


def test_the_demo(tmp_path):
    """The README's command, shortened: scores before and after, three questions answered, a model that loads."""
    command = [sys.executable, "diffcse.py", "--config", "demo", "--steps", "3", "--batch-size", "8", "--out-dir", str(tmp_path / "run")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stderr == "", shown.stderr
    for words in ("before", "after", "recall@10", "how do I reverse a list?", "save an array to a file?", "find the largest element?", "minutes"):
        assert words in shown.stdout
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
