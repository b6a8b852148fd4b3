"""Whitening: embeddings with mean 0 and covariance 1, on the seven STS sets (paper, Table 1).

    python -m lab.whitening MODEL... --pooler avg_first_last --with self
    python -m lab.whitening MODEL... --with self,enwiki_100k.txt     # or fitted on a sentence file

Each model has a row as it is and a row for each entry of --with. "self" is fitted on the sentences
that are scored, without their ratings. The other flags are those of eval_sts.py.

Shapes: N sentences, P pairs, D hidden size, K <= D kept directions.
Reference: Su et al. 2021, "Whitening Sentence Representations for Better Semantics and Faster
Retrieval".
"""

import json
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

import eval_sts
from data import read_sentences
from embed import POOLINGS
from engine.cli import Parser, add_model_flags
from engine.errors import UserError, run_main, write_atomically
from engine.hub import find_senteval, find_text

MAX_SENTENCES = 10_000  # read from each sentence file


def whitening(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and matrix: (x - mean) @ matrix has covariance 1. Shapes: (N, D) -> (D,), (D, K).

    K < D if the vectors have no variance in some directions. Raises: UserError for NaN or infinity.
    """
    vectors = vectors.astype(np.float64)
    if not np.isfinite(vectors).all():
        raise UserError("whitening: the model's embeddings have NaN or infinite values")
    mean = vectors.mean(0)
    variance, axes = np.linalg.eigh(np.cov(vectors.T))
    keep = variance > 1e-10 * variance.max()
    return mean, axes[:, keep] / np.sqrt(variance[keep])


def whiten(
    u: np.ndarray, v: np.ndarray, fitted: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A set's embeddings, with the mean and matrix of other vectors or (None) with its own.

    Shapes: (P, D), (P, D) -> (P, K), (P, K).
    """
    mean, matrix = fitted or whitening(np.concatenate([u, v]))
    return (u - mean) @ matrix, (v - mean) @ matrix


def score_model(
    encoder: eval_sts.Encoder, sets: dict[str, eval_sts.Pairs], texts: dict[str, list[str] | None]
) -> dict[str, eval_sts.Scores]:
    """The scores without whitening ("") and with each entry of --with."""
    sentences = list(dict.fromkeys(s for left, right, _ in sets.values() for s in left + right))
    vectors = dict(zip(sentences, encoder(sentences)))  # the same for every row

    def look_up(sentences: list[str]) -> np.ndarray:
        return np.stack([vectors[s] for s in sentences])

    scores = {"": eval_sts.score_pairs(look_up, sets)}
    for source, text in texts.items():
        fitted = whitening(encoder(text)) if text is not None else None
        scores[source] = eval_sts.score_pairs(look_up, sets, partial(whiten, fitted=fitted))
    return scores


def main() -> None:
    parser = Parser("python -m lab.whitening", description="Whitened embeddings on the STS sets")
    add_model_flags(parser, POOLINGS)
    text = f"self, or a sentence file, of which {MAX_SENTENCES:,} are read (default: self)"
    parser.add_argument("--with", dest="sources", metavar="SOURCE,...", default="self", help=text)
    args = parser.parse_args()
    texts, labels = {}, {"": "", "self": ", white by itself"}
    for source in args.sources.split(","):
        texts[source] = None
        if source != "self":
            rows = read_sentences(find_text(source, args.data))
            texts[source] = [row[0] for row in islice(rows, MAX_SENTENCES)]
            labels[source] = f", white by {Path(source).name}"
    names = (*eval_sts.TEST_SETS, "STSB-dev", "SICKR-dev")
    sets = eval_sts.load_sets(names, eval_sts.load_set, find_senteval(args.data))
    rows, reports = {}, []
    for name, pooling, encoder in eval_sts.load_encoders(args):
        for source, scores in score_model(encoder, sets, texts).items():
            rows[f"{name} ({pooling}{labels[source]})"] = scores
            report = {"model": name, "pooler": pooling, "amp": args.amp}
            report |= {"whitened": source} if source else {}
            reports.append(report | scores | {"average": eval_sts.average(scores)})
    eval_sts.print_scores(rows)
    if args.json:
        write_atomically(args.json, "".join(json.dumps(report) + "\n" for report in reports))


if __name__ == "__main__":
    run_main(main)
