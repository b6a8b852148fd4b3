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


def whiten(u: np.ndarray, v: np.ndarray, fitted: tuple | None = None) -> tuple:
    """A set's embeddings, with the mean and matrix of other vectors or (None) with its own.

    Shapes: (P, D), (P, D) -> (P, K), (P, K).
    """
    mean, matrix = fitted or whitening(np.concatenate([u, v]))
    return (u - mean) @ matrix, (v - mean) @ matrix


def look_up(vectors: dict[str, np.ndarray], sentences: list[str]) -> np.ndarray:
    return np.stack([vectors[s] for s in sentences])


def main() -> None:
    parser = Parser("python -m lab.whitening", description="Whitened embeddings on the STS sets")
    add_model_flags(parser, POOLINGS)
    text = f"self, or a sentence file, of which {MAX_SENTENCES:,} are read (default: self)"
    parser.add_argument("--with", dest="sources", metavar="SOURCE,...", default="self", help=text)
    args = parser.parse_args()
    sources, texts = args.sources.split(","), {}
    for file in set(sources) - {"self"}:
        rows = read_sentences(find_text(file, args.data))
        texts[file] = [row[0] for row in islice(rows, MAX_SENTENCES)]
    names = (*eval_sts.TEST_SETS, "STSB-dev", "SICKR-dev")
    sets = eval_sts.load_sets(names, eval_sts.load_set, find_senteval(args.data))
    sentences = list(dict.fromkeys(s for left, right, _ in sets.values() for s in left + right))
    rows, reports = {}, []
    for name, pooling, encoder in eval_sts.load_encoders(args):
        vectors = dict(zip(sentences, encoder(sentences)))  # the same for every row
        for source in ("", *sources):
            transform = whiten if source else None
            if source in texts:
                transform = partial(whiten, fitted=whitening(encoder(texts[source])))
            scores = eval_sts.score_pairs(partial(look_up, vectors), sets, transform)
            label = f", white by {Path(source).name}" if source else ""
            rows[f"{name} ({pooling}{label})"] = scores
            report = {"model": name, "pooler": pooling, "amp": args.amp}
            report |= {"whitened": source} if source else {}
            reports.append(report | scores | {"average": eval_sts.average(scores)})
    eval_sts.print_scores(rows)
    if args.json:
        write_atomically(args.json, "".join(json.dumps(report) + "\n" for report in reports))


if __name__ == "__main__":
    run_main(main)
