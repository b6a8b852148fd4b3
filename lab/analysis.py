"""What the vectors of a model are like: the paper's Tables 9, 10, 11 and Figure 2 of any models, and AskUbuntu.

    python -m lab.analysis neighbours   MODEL... --query "A man is playing a guitar."     # Table 9
    python -m lab.analysis retrieval    MODEL...                                          # Table 10
    python -m lab.analysis uniformity   MODEL...                                          # Table 11
    python -m lab.analysis distribution MODEL... --out results/figures/distribution       # Figure 2
    python -m lab.analysis ratings      MODEL... --out results/figures/ratings            # rating against cosine
    python -m lab.analysis askubuntu    MODEL... --data DIR                               # duplicate questions, ranked

All but the last are about the test set of STS-B, 1,379 pairs. MODEL, --pooler, --data and --json are as in eval_sts.py.

Letters: P pairs, n = 2 P sentences (as they stand: one that occurs twice counts twice), D numbers of a vector.
Reference: paper sections 6.1 to 6.4 and appendix C; none of the published code does this.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from bert import UserError, write_atomically
from data import find_senteval, read_lines, run_main
from embed import encode, open_model, unit
from eval_sts import Pairs, count, load_set, model_flags
from lab.plots import figure, load_pyplot, save

Encoder = Callable[[list[str]], np.ndarray]

QUERIES = ("you can do it , too .", "this is not a problem .", "i think that is not a bad idea .")  # the paper's Table 9

# ----------------------------------------------------------------------------------------------------------------
# Measures. u, v: (P, D) unit vectors of the left and right sentences


def neighbours(query: np.ndarray, corpus: np.ndarray, k: int) -> list[tuple[int, float]]:
    """The k most similar rows and their cosines, best first. Shapes: (D,), (n, D)."""
    scores = corpus @ query
    return [(int(i), float(scores[i])) for i in np.argsort(-scores, kind="stable")[:k]]


def recall(u: np.ndarray, v: np.ndarray, ratings: np.ndarray, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall@k x 100 of Table 10: does a sentence of a pair rated 5.0 find the other among all n?

    Each of both sentences is a query: only so the paper's 77.84 % is a number of hits (151 of 2 x 97; of 97 it is none).
    The query's own place does not count; of equally similar sentences the one that is looked for comes first.
    """
    corpus, P = np.concatenate([u, v]), len(u)
    pairs = np.flatnonzero(np.asarray(ratings) == 5)
    if not len(pairs):
        raise UserError("retrieval: no pair is rated 5.0")
    ranks = []
    for query, other in [(i, i + P) for i in pairs] + [(i + P, i) for i in pairs]:
        scores = corpus @ corpus[query]
        scores[query] = -np.inf
        ranks.append(1 + np.count_nonzero(scores > scores[other] + 1e-9))  # equal sentences differ in the last bit
    return {f"recall@{k}": 100 * float(np.mean(np.array(ranks) <= k)) for k in ks}


def alignment(u: np.ndarray, v: np.ndarray, ratings: np.ndarray, threshold: float) -> float:
    """Mean |u - v|^2 over the pairs rated above the threshold (Wang and Isola 2020). Smaller is better."""
    positive = np.asarray(ratings) > threshold
    if not positive.any():
        raise UserError(f"alignment: no pair is rated above {threshold:g}")
    return float(((u - v)[positive] ** 2).sum(1).mean())


def uniformity(u: np.ndarray, v: np.ndarray) -> float:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of places x != y among the n sentences. Smaller is better."""
    corpus = np.concatenate([u, v])
    squared = 2 - 2 * (corpus @ corpus.T)  # |x - y|^2 of unit vectors
    return float(np.log(np.exp(-2 * squared[np.triu_indices(len(corpus), 1)]).mean()))


def rank_scores(positive: list[bool]) -> dict[str, float]:
    """Of one ranked list, best first: average precision, reciprocal rank, precision at 1 and at 5, x 100."""
    hits = np.asarray(positive, bool)
    ranks = np.flatnonzero(hits) + 1
    return {"MAP": 100 * float(np.mean(np.arange(1, len(ranks) + 1) / ranks)), "MRR": 100 / float(ranks[0]),
            "P@1": 100 * float(hits[0]), "P@5": 20 * float(hits[:5].sum())}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# AskUbuntu (Lei et al. 2016), as the TSDAE paper and sentence-transformers' examples use it: titles only


def read_askubuntu(folder: Path, split: str) -> list[tuple[str, list[str], list[bool]]]:
    """Rows of query, candidates, and which of those are duplicates of it; rows without any are skipped.

    Files: text_tokenized.txt.gz (id, title, body), dev.txt and test.txt (query, similar, candidates, BM25 scores), tabs between.
    Raises: UserError that names file and line.
    """
    titles = {}
    texts = next((path for name in ("text_tokenized.txt.gz", "text_tokenized.txt") if (path := folder / name).is_file()), None)
    if texts is None:
        raise UserError(f"{folder}: no text_tokenized.txt.gz in it; it comes from https://github.com/taolei87/askubuntu")
    for number, line in enumerate(read_lines(texts), 1):
        cells = line.split("\t")
        if len(cells) < 2:
            raise UserError(f"{texts} line {number}: {len(cells)} cells where id, title and body are expected")
        titles[cells[0]] = cells[1]
    rows = []
    for number, line in enumerate(read_lines(folder / f"{split}.txt"), 1):
        cells = line.split("\t")
        where = f"{folder / f'{split}.txt'} line {number}"
        if len(cells) < 3:
            raise UserError(f"{where}: {len(cells)} cells where query, similar and candidates are expected")
        query, similar, candidates = cells[0], set(cells[1].split()), cells[2].split()
        if unknown := [name for name in [query, *candidates] if name not in titles]:
            raise UserError(f"{where}: question {unknown[0]} is not in {texts.name}")
        positive = [name in similar for name in candidates]
        if any(positive):
            rows.append((titles[query], [titles[name] for name in candidates], positive))
    if not rows:
        raise UserError(f"{folder / f'{split}.txt'}: no row has a similar question")
    return rows


# ----------------------------------------------------------------------------------------------------------------
# The commands: of one model, what is printed and what goes into --json


def vectors_of(encoder: Encoder, sentences: Iterable[str]) -> dict[str, np.ndarray]:
    """Sentence -> unit vector, float64, (D,). Raises: UserError where the model is broken."""
    unique = list(dict.fromkeys(sentences))
    vectors = encoder(unique).astype(np.float64)
    if not np.isfinite(vectors).all():
        raise UserError("the model's vectors hold NaN or infinity (did training diverge? try a lower --lr)")
    return dict(zip(unique, unit(vectors)))


def sides(encoder: Encoder, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u, v and the ratings of a set."""
    vectors = vectors_of(encoder, pairs[0] + pairs[1])
    u, v = (np.stack([vectors[s] for s in side]) for side in pairs[:2])
    return u, v, np.array(pairs[2])


def line(numbers: dict[str, float], digits: int = 2) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in numbers.items())


def run_neighbours(encoder: Encoder, pairs: Pairs, args: argparse.Namespace) -> tuple[dict, str]:
    vectors, text, found = vectors_of(encoder, [*pairs[0], *pairs[1], *(args.query or QUERIES)]), "", {}
    for query in args.query or QUERIES:
        corpus = [s for s in dict.fromkeys(pairs[0] + pairs[1]) if s != query]  # itself is no news
        best = neighbours(vectors[query], np.stack([vectors[s] for s in corpus]), args.top_k)
        found[query] = [(corpus[i], round(cosine, 4)) for i, cosine in best]
        text += f"\n{query}" + "".join(f"\n    {cosine:.2f}  {sentence}" for sentence, cosine in found[query])
    return found, text


def run_retrieval(encoder: Encoder, pairs: Pairs, args: argparse.Namespace) -> tuple[dict, str]:
    numbers = recall(*sides(encoder, pairs))
    return numbers, f"{line(numbers)} (queries: both sentences of {pairs[2].count(5)} pairs; among {2 * len(pairs[2]):,})"


def run_uniformity(encoder: Encoder, pairs: Pairs, args: argparse.Namespace) -> tuple[dict, str]:
    u, v, ratings = sides(encoder, pairs)
    numbers = {"alignment": alignment(u, v, ratings, args.threshold), "uniformity": uniformity(u, v)}
    return numbers, f"{line(numbers, 3)} (positive: the {(ratings > args.threshold).sum()} pairs rated above {args.threshold:g})"


def run_cosines(encoder: Encoder, pairs: Pairs, args: argparse.Namespace) -> tuple[dict, str]:
    u, v, ratings = sides(encoder, pairs)
    cosines = (u * v).sum(1)
    groups = {f"{low}-{low + 1}": cosines[group(ratings) == low] for low in range(5)}
    numbers = {name: {"pairs": len(c), "mean": float(c.mean()), "std": float(c.std())} for name, c in groups.items()}
    args.drawn.append((cosines, ratings))
    return numbers, ", ".join(f"rated {name}: {n['mean']:.2f} ± {n['std']:.2f}" for name, n in numbers.items())


def run_askubuntu(encoder: Encoder, questions: list, args: argparse.Namespace) -> tuple[dict, str]:
    vectors = vectors_of(encoder, (text for query, candidates, _ in questions for text in (query, *candidates)))
    each = []
    for query, candidates, positive in questions:
        order = neighbours(vectors[query], np.stack([vectors[c] for c in candidates]), len(candidates))
        each.append(rank_scores([positive[i] for i, _ in order]))
    numbers = {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}
    return numbers, f"{line(numbers)} ({len(questions)} queries)"


def group(ratings: np.ndarray) -> np.ndarray:
    """0 to 4 for ratings of 0-1 to 4-5; one on a border belongs to the upper. Shapes: (P,) -> (P,)."""
    return np.minimum(ratings, 4).astype(int)


def draw(command: str, labels: list[str], drawn: list[tuple[np.ndarray, np.ndarray]], out: str) -> None:
    """A panel for each model: of distribution the density of the cosine for each group of ratings, of ratings every pair."""
    fig, axes = figure(columns=len(drawn), height=2.8)
    edges = np.linspace(min(cosines.min() for cosines, _ in drawn), 1, 31)
    middles = (edges[1:] + edges[:-1]) / 2
    shares = [[np.histogram(cosines[group(ratings) == low], edges)[0] / max(1, (group(ratings) == low).sum()) for low in range(5)]
              for cosines, ratings in drawn]  # fmt: skip
    for axis, label, (cosines, ratings), of_group in zip(np.atleast_1d(axes), labels, drawn, shares):
        axis.grid(axis="y", visible=False)
        if command == "ratings":
            axis.scatter(cosines, ratings, s=3, color="black", alpha=0.25, linewidths=0)
        else:
            for low, share in enumerate(of_group):
                height = low + 1.2 * share / np.max(shares)  # tall ones reach into the row above, which lies behind them
                axis.fill_between(middles, low, height, color="0.75", lw=0, zorder=9 - low)
                axis.plot(middles, height, color="black", lw=0.8, zorder=9 - low)
                if (inside := cosines[group(ratings) == low]).size:
                    axis.plot([np.median(inside)] * 2, [low, low + 0.2], color="black", lw=1.5, zorder=9 - low)
            axis.set_yticks(range(5), [f"{low}-{low + 1}" for low in range(5)])
        axis.set_xlabel("cosine similarity")
        axis.set_ylabel("human rating")
        axis.set_title(label, fontsize=8)
        axis.label_outer()
    save(fig, out)


COMMANDS = {
    "neighbours": (run_neighbours, "Table 9: the sentences of STS-B test that are nearest to some queries"),
    "retrieval": (run_retrieval, "Table 10: recall of the other sentence of a pair rated 5.0, among all"),
    "uniformity": (run_uniformity, "Table 11: alignment and uniformity"),
    "distribution": (run_cosines, "Figure 2: the distribution of cosine similarity by human rating"),
    "ratings": (run_cosines, "human rating against cosine similarity, every pair a point"),
    "askubuntu": (run_askubuntu, "duplicate questions among 20 candidates: MAP, MRR, P@1, P@5"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.analysis", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        model_flags(command)
        if name == "neighbours":
            command.add_argument("--query", action="append", help="a sentence; may be given several times (default: the paper's three)")
            command.add_argument("--top-k", type=count, default=3, help="(default: 3)")
        if name == "uniformity":
            command.add_argument("--threshold", type=float, default=4, help="pairs rated above it are positive (default: 4)")
        if name in ("distribution", "ratings"):
            command.add_argument("--out", required=True, metavar="FILE", help="without an ending: .png and .svg are written")
            command.add_argument("--labels", nargs="+", metavar="LABEL", help="titles of the panels (default: the models' names)")
            command.set_defaults(drawn=[])
        if name == "askubuntu":
            command.add_argument("--split", choices=("dev", "test"), default="test", help="(default: test)")
            command.add_argument("--max-length", type=count, default=32, help="tokens of a title (default: 32)")
    args = parser.parse_args()
    if args.command in ("distribution", "ratings"):
        load_pyplot()
    if (titles := getattr(args, "labels", None)) and len(titles) != len(args.models) * len(args.pooler):
        raise UserError(f"--labels: {len(titles)} for {len(args.models) * len(args.pooler)} panels")
    if args.command == "askubuntu":
        texts = read_askubuntu(Path(args.data).expanduser(), args.split)
    else:
        texts = load_set("STSB", find_senteval(args.data))
    labels, reports = [], []
    for model, pooler in product(args.models, args.pooler):
        bert, tokenizer, own, _ = open_model(model)
        pooler = pooler or own
        encoder = partial(encode, bert, tokenizer, pooling=pooler, batch_size=args.batch_size, max_length=getattr(args, "max_length", None))
        numbers, text = COMMANDS[args.command][0](encoder, texts, args)
        labels.append(f"{model} ({pooler})")
        print(f"{labels[-1]}: {text}", flush=True)
        reports.append({"model": model, "pooler": pooler, "command": args.command, **numbers})
    if args.command in ("distribution", "ratings"):
        short = [Path(model).name + f"\n{pooler}" * (len(args.pooler) > 1) for model, pooler in product(args.models, args.pooler)]
        draw(args.command, args.labels or short, args.drawn, args.out)
    if args.json:
        write_atomically(args.json, "".join(json.dumps(report) + "\n" for report in reports))


if __name__ == "__main__":
    run_main(main)
