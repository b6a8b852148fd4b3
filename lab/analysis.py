"""Properties of embeddings: the paper's Tables 9, 10 and 11 and Figure 2.

    python -m lab.analysis neighbours   MODEL... --query "A man is playing a guitar."  # Table 9
    python -m lab.analysis retrieval    MODEL...                                       # Table 10
    python -m lab.analysis uniformity   MODEL...                                       # Table 11
    python -m lab.analysis distribution MODEL... --out results/figures/distribution    # Figure 2

They use the STS-B test set, 1,379 pairs. MODEL and the other flags are eval_sts.py's.

Shapes: P pairs, n = 2 P sentences (one that occurs twice counts twice), D hidden size.
Reference: paper sections 6.1 to 6.4 and appendix C; the published code has none of this.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from embed import POOLINGS, l2_normalize
from engine.cli import Parser, add_model_flags, positive_int
from engine.errors import UserError, run_main, write_atomically
from engine.hub import find_senteval
from eval_sts import Encoder, Pairs, load_encoders, load_set
from lab import plots

QUERIES = ("you can do it , too .", "this is not a problem .", "i think that is not a bad idea .")

# ------------------------------------------------------------------------------------------------
# Measures. u, v: (P, D) unit vectors of the left and right sentences


def nearest(
    query: str, corpus: list[str], vectors: dict[str, np.ndarray], k: int
) -> list[tuple[str, float]]:
    """The k most similar sentences, without the query itself, and their cosines, best first."""
    others = [sentence for sentence in corpus if sentence != query]
    cosines = np.stack([vectors[sentence] for sentence in others]) @ vectors[query]
    return [(others[i], float(cosines[i])) for i in np.argsort(-cosines, kind="stable")[:k]]


def recall(u: np.ndarray, v: np.ndarray, ratings: np.ndarray, ks=(1, 5, 10)) -> dict[str, float]:
    """Recall@k x 100 of Table 10: a sentence of a pair rated 5.0 finds the other one among all n.

    Both sentences of a pair are queries: the paper's 77.84 % is 151 of 2 x 97, and no fraction of
    97. The query itself does not count; of equally similar sentences the other one comes first.
    """
    corpus, P = np.concatenate([u, v]), len(u)
    pairs = np.flatnonzero(np.asarray(ratings) == 5)
    if not len(pairs):
        raise UserError("retrieval: no pair is rated 5.0")
    ranks = []
    for query, other in [(i, i + P) for i in pairs] + [(i + P, i) for i in pairs]:
        cosines = corpus @ corpus[query]
        cosines[query] = -np.inf
        better = cosines > cosines[other] + 1e-9  # equal sentences differ in the last bit
        ranks.append(1 + np.count_nonzero(better))
    return {f"recall@{k}": 100 * float(np.mean(np.array(ranks) <= k)) for k in ks}


def alignment(u: np.ndarray, v: np.ndarray, ratings: np.ndarray, threshold: float) -> float:
    """Mean |u - v|^2 of pairs rated above the threshold (Wang and Isola 2020). Lower is better."""
    positive = np.asarray(ratings) > threshold
    if not positive.any():
        raise UserError(f"alignment: no pair is rated above {threshold:g}")
    return float(((u - v)[positive] ** 2).sum(1).mean())


def uniformity(u: np.ndarray, v: np.ndarray) -> float:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of the n sentences. Lower is better."""
    corpus = np.concatenate([u, v])
    squared = 2 - 2 * (corpus @ corpus.T)  # |x - y|^2 of unit vectors
    return float(np.log(np.exp(-2 * squared[np.triu_indices(len(corpus), 1)]).mean()))


# ------------------------------------------------------------------------------------------------
# The commands: of a model, the numbers for --json and the text to print


def vectors_of(encoder: Encoder, sentences: Iterable[str]) -> dict[str, np.ndarray]:
    """The unit vector (D,), float64, of each sentence. Raises: UserError for NaN or infinity."""
    unique = list(dict.fromkeys(sentences))
    vectors = encoder(unique).astype(np.float64)
    if not np.isfinite(vectors).all():
        raise UserError("the model's vectors have NaN or infinity (diverged? lower --lr)")
    return dict(zip(unique, l2_normalize(vectors)))


def encode_pairs(encoder: Encoder, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u (P, D), v (P, D) and the ratings (P,) of a set."""
    vectors = vectors_of(encoder, pairs[0] + pairs[1])
    u, v = (np.stack([vectors[s] for s in side]) for side in pairs[:2])
    return u, v, np.array(pairs[2])


def join(numbers: dict[str, float], digits: int = 2) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in numbers.items())


def run_neighbours(encoder: Encoder, pairs: Pairs, args: argparse.Namespace) -> tuple[dict, str]:
    queries, text, found = args.query or QUERIES, "", {}
    vectors = vectors_of(encoder, [*pairs[0], *pairs[1], *queries])
    corpus = list(dict.fromkeys(pairs[0] + pairs[1]))
    for query in queries:
        best = nearest(query, corpus, vectors, args.top_k)
        found[query] = [(sentence, round(cosine, 4)) for sentence, cosine in best]
        text += f"\n{query}" + "".join(f"\n    {cosine:.2f}  {s}" for s, cosine in found[query])
    return found, text


def run_retrieval(encoder: Encoder, pairs: Pairs, args: argparse.Namespace) -> tuple[dict, str]:
    numbers, ratings = recall(*encode_pairs(encoder, pairs)), pairs[2]
    queries = f"queries: both sentences of {ratings.count(5)} pairs; among {2 * len(ratings):,}"
    return numbers, f"{join(numbers)} ({queries})"


def run_uniformity(encoder: Encoder, pairs: Pairs, args: argparse.Namespace) -> tuple[dict, str]:
    u, v, ratings = encode_pairs(encoder, pairs)
    aligned = alignment(u, v, ratings, args.threshold)
    numbers = {"alignment": aligned, "uniformity": uniformity(u, v)}
    positive = f"{(ratings > args.threshold).sum()} pairs rated above {args.threshold:g}"
    return numbers, f"{join(numbers, 3)} (positive: the {positive})"


def run_cosines(encoder: Encoder, pairs: Pairs, args: argparse.Namespace) -> tuple[dict, str]:
    u, v, ratings = encode_pairs(encoder, pairs)
    cosines, numbers, text = (u * v).sum(1), {}, []
    groups, names = plots.group_ratings(ratings)
    for i, name in enumerate(names):
        c = cosines[groups == i]
        numbers[name] = {"pairs": len(c), "mean": c.mean(), "std": c.std()}
        text.append(f"rated {name}: {c.mean():.2f} ± {c.std():.2f}")
    args.drawn.append((cosines, ratings))
    return numbers, ", ".join(text)


COMMANDS = {
    "neighbours": (run_neighbours, "Table 9: sentences of the STS-B test set nearest to queries"),
    "retrieval": (run_retrieval, "Table 10: recall of the other sentence of a pair rated 5.0"),
    "uniformity": (run_uniformity, "Table 11: alignment and uniformity"),
    "distribution": (run_cosines, "Figure 2: distribution of the cosine by human rating"),
}


def parse_args() -> argparse.Namespace:
    parser = Parser(
        "python -m lab.analysis", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_model_flags(command, POOLINGS)
        add = command.add_argument
        if name == "neighbours":
            add("--query", action="append", help="repeatable (default: the paper's three)")
            add("--top-k", type=positive_int, default=3, help="(default: 3)")
        if name == "uniformity":
            add("--threshold", type=float, default=4, help="of positive pairs (default: 4)")
        if name == "distribution":
            add("--out", required=True, metavar="FILE", help="without suffix: FILE.png, FILE.svg")
            add("--labels", nargs="+", metavar="LABEL", help="titles (default: the models' names)")
            command.set_defaults(drawn=[])
    args = parser.parse_args()
    panels = len(args.models) * len(args.pooler)
    if (labels := getattr(args, "labels", None)) and len(labels) != panels:
        raise UserError(f"--labels: {len(labels)} labels for {panels} panels")
    return args


def main() -> None:
    args = parse_args()
    if args.command == "distribution":
        plots.load_pyplot()  # is matplotlib installed?
    pairs = load_set("STSB", find_senteval(args.data))
    titles, reports = [], []
    for name, pooling, encoder in load_encoders(args):
        numbers, text = COMMANDS[args.command][0](encoder, pairs, args)
        print(f"{name} ({pooling}): {text}", flush=True)
        titles.append(Path(name).name + f"\n{pooling}" * (len(args.pooler) > 1))
        reports.append({"model": name, "pooler": pooling, "command": args.command, **numbers})
    if args.command == "distribution":
        panels = [(title, *drawn) for title, drawn in zip(args.labels or titles, args.drawn)]
        plots.save(plots.plot_ridges(panels), args.out)
    if args.json:
        write_atomically(args.json, "".join(json.dumps(report) + "\n" for report in reports))


if __name__ == "__main__":
    run_main(main)
