"""Semantic textual similarity: does the cosine of two vectors rank sentence pairs as people do?

    python eval_sts.py MODEL... [--pooler mean] [--data DIR] [--json FILE]
    python eval_sts.py MODEL --detail                                      # every sub-source and split
    python eval_sts.py MODEL --pooler avg_first_last --whiten self         # the rows of Table 1 that need no training

Spearman's correlation from scratch, the seven test sets of the paper's Table 1 (STS12-16, STS-B, SICK-R) read and
scored as published: for STS12-16 one correlation over all pairs of a year, sub-sources concatenated ("all", SPEC
7.4), times 100. Development sets (STS-B dev, SICK-R trial) are for choosing settings and checkpoints.

Letters: P pairs of a set, D numbers of a vector.
Not here: transfer tasks (eval_transfer.py); the paper's analyses of vectors (lab/analysis.py).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path

import numpy as np

from bert import UserError, write_atomically
from data import find_senteval, find_text, read_sentences, run_main
from embed import POOLINGS, encode, open_model

WHITENING_SENTENCES = 10_000  # of a file that whitening is fitted on

# ----------------------------------------------------------------------------------------------------------------
# Spearman's correlation: Pearson's, of the ranks


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of the ranks they take up. Shapes: (P,) -> (P,) float64.

    [30, 10, 30, 20] -> [3.5, 1, 3.5, 2]
    """
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()  # the highest rank in each group of equals
    return (last - (counts - 1) / 2)[group.reshape(-1)]


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation. Shapes: (P,), (P,)."""
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def spearman(a, b) -> float:
    """Spearman's rank correlation, between -1 and 1, ties by average ranks. Shapes: (P,), (P,).

    Raises: UserError where it is undefined: fewer than two pairs, all values equal, NaN or infinity.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise UserError(f"Spearman needs two lists of one length, 2 or more; got the shapes {a.shape} and {b.shape}")
    for values in (a, b):
        if not np.isfinite(values).all():
            raise UserError(f"Spearman: {(~np.isfinite(values)).sum()} of {len(values)} values are NaN or infinite: the model's "
                            "vectors are broken (did training diverge? try a lower --lr)")  # fmt: skip
        if (values == values[0]).all():
            raise UserError(f"Spearman is undefined: all {len(values)} values are {values[0]:g} (has the model collapsed to one vector?)")
    return pearson(average_ranks(a), average_ranks(b))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row; 0 where a vector is all zeros, as published. Shapes: (P, D), (P, D) -> (P,) float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms == 0, 1, norms)


# ----------------------------------------------------------------------------------------------------------------
# The sets. A set is three lists of one length: left sentences, right sentences, people's scores

Pairs = tuple[list[str], list[str], list[float]]

YEARS = {  # sub-sources and their scored pairs (SPEC 7.4)
    "STS12": {"MSRpar": 750, "MSRvid": 750, "SMTeuroparl": 459, "surprise.OnWN": 750, "surprise.SMTnews": 399},
    "STS13": {"FNWN": 189, "headlines": 750, "OnWN": 561},
    "STS14": {"deft-forum": 450, "deft-news": 300, "headlines": 750, "images": 750, "OnWN": 750, "tweet-news": 750},
    "STS15": {"answers-forums": 375, "answers-students": 750, "belief": 375, "headlines": 750, "images": 750},
    "STS16": {"answer-answer": 254, "headlines": 249, "plagiarism": 230, "postediting": 244, "question-question": 209},
}
FILES = {  # path, pairs
    "STSB": ("STS/STSBenchmark/sts-test.csv", 1379),
    "STSB-dev": ("STS/STSBenchmark/sts-dev.csv", 1500),
    "STSB-train": ("STS/STSBenchmark/sts-train.csv", 5749),
    "SICKR": ("SICK/SICK_test_annotated.txt", 4927),
    "SICKR-dev": ("SICK/SICK_trial.txt", 500),
    "SICKR-train": ("SICK/SICK_train.txt", 4500),
}
TEST_SETS = (*YEARS, "STSB", "SICKR")  # the columns of the paper's Table 1


class MissingSet(UserError):
    """A file of a set is not there, so the set is left out; a damaged one is refused."""


def read_set_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """All lines of a file of SentEval's, without their ends. Raises: MissingSet, and UserError where it cannot be read."""
    try:
        # Only \n ends a line, not \x85 or a lone \r inside a sentence; SICK's test file ends its lines with \r\n.
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode(encoding).replace("\r\n", "\n")
        return text.removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise MissingSet(f"{path} is missing: --data names a folder that is not all of SentEval's") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def load_set(name: str, senteval: Path) -> Pairs:
    """One set by its name in YEARS or FILES, one sub-source of a year ("STS13/OnWN"), or the splits of SICK-R together ("SICKR-all").

    Words are joined by one space, as SentEval's batcher does (SPEC 7.3).

    Raises: UserError that names a missing file, a line that cannot be read, or a wrong number of pairs.
    """
    rows: list[tuple[str, str, str, str]] = []  # left, right, score, where it stands

    def table(path: Path, left: int, right: int, score: int, header: int) -> None:
        """Tab-separated and never quoted: 412 rows of STS-B hold lone quote characters."""
        for number, line in enumerate(read_set_lines(path)[header:], 1 + header):
            cells = line.split("\t")
            if len(cells) <= max(left, right, score):
                raise UserError(f"{path} line {number}: {len(cells)} cells where {max(left, right, score) + 1} are expected")
            rows.append((cells[left], cells[right], cells[score], f"{path} line {number}"))

    if name == "SICKR-all":  # 9,927 pairs: what MTEB calls SICK-R
        splits = [load_set(split, senteval) for split in ("SICKR-train", "SICKR-dev", "SICKR")]
        return tuple([cell for split in splits for cell in split[i]] for i in range(3))
    year, _, source = name.partition("/")
    if year in YEARS:
        sources = [source] if source else list(YEARS[year])
        expected = sum(YEARS[year][source] for source in sources)
        for source in sources:
            folder = senteval / "STS" / f"{year}-en-test"
            texts, scores = (read_set_lines(folder / f"STS.{kind}.{source}.txt") for kind in ("input", "gs"))
            if len(texts) < len(scores):
                raise UserError(f"{folder}: STS.input.{source}.txt has {len(texts)} lines, STS.gs.{source}.txt {len(scores)}")
            for number, (text, score) in enumerate(zip(texts, scores), 1):
                if score.strip():  # a pair nobody scored is no pair: most lines of STS15 and STS16
                    where = f"{folder / f'STS.input.{source}.txt'} line {number}"
                    if text.count("\t") < 1:
                        raise UserError(f"{where}: no tab between two sentences")
                    rows.append((*text.split("\t")[:2], score, where))
    else:
        path, expected = FILES[name]
        table(senteval / path, *((5, 6, 4, 0) if name.startswith("STSB") else (1, 2, 3, 1)))

    pairs: Pairs = ([], [], [])
    for left, right, score, where in rows:
        try:
            pairs[2].append(float(score))
            if not np.isfinite(pairs[2][-1]):
                raise ValueError
        except ValueError:
            raise UserError(f"{where}: the score {score!r} is not a number") from None
        pairs[0].append(" ".join(left.split()))
        pairs[1].append(" ".join(right.split()))
    if len(rows) != expected:
        raise UserError(f"{name} in {senteval}: {len(rows)} scored pairs, published are {expected}: "
                        "the download is damaged or another version")  # fmt: skip
    return pairs


def read_pairs(path: Path) -> Pairs:
    """Pairs of your own: a .tsv or .csv with a header line and three columns, two sentences and how alike they are, on any scale.

    Raises: UserError that names the file and the pair, or that there are fewer than 2.
    """
    pairs: Pairs = ([], [], [])
    for number, row in enumerate(read_sentences(path), 1):
        if len(row) != 3:
            raise UserError(f"{path}: {len(row)} columns; a pair is two sentences and a number")
        try:
            score = float(row[2])
        except ValueError:
            score = np.nan
        if not np.isfinite(score):
            raise UserError(f"{path} pair {number}: the score {row[2]!r} is not a number")
        for column, cell in zip(pairs, (row[0], row[1], score)):
            column.append(cell)
    if len(pairs[2]) < 2:
        raise UserError(f"{path}: {len(pairs[2])} pairs; at least 2 can be ranked")
    return pairs


# ----------------------------------------------------------------------------------------------------------------
# Scoring


Transform = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def score_pairs(encoder: Callable[[list[str]], np.ndarray], sets: dict[str, Pairs], transform: Transform | None = None) -> dict[str, float]:
    """Spearman x 100 of each set; a sentence that occurs more than once, in whatever set, is encoded once.

    encoder: n sentences -> (n, D). This is all that training and evaluation know of each other.
    transform: what is done to the vectors of a set's pairs before their cosine, (P, D), (P, D) -> the same.
    """
    unique: dict[str, int] = {}
    for left, right, _ in sets.values():
        for sentence in left + right:
            unique.setdefault(sentence, len(unique))
    vectors = encoder(list(unique))
    results = {}
    for name, (left, right, scores) in sets.items():
        u, v = (vectors[[unique[s] for s in side]] for side in (left, right))  # (P, D)
        try:
            results[name] = 100 * spearman(cosine(*(transform(u, v) if transform else (u, v))), scores)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return results


def whitening(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and matrix with which (x - mean) @ matrix has covariance 1 (Su et al. 2021). Shapes: (n, D) -> (D,), (D, K).

    K is D, or less where the vectors lie in fewer dimensions: what has no variance cannot be given one.
    """
    vectors = vectors.astype(np.float64)
    if not np.isfinite(vectors).all():
        raise UserError("whitening: the model's vectors hold NaN or infinity")
    mean = vectors.mean(0)
    variance, axes = np.linalg.eigh(np.cov(vectors.T))
    keep = variance > 1e-10 * variance.max()
    return mean, axes[:, keep] / np.sqrt(variance[keep])


def whiten(mean: np.ndarray, matrix: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (u - mean) @ matrix, (v - mean) @ matrix


def whiten_self(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A set's own vectors made white: fitted on the sentences that are scored, without their scores."""
    return whiten(*whitening(np.concatenate([u, v])), u, v)


def average(scores: dict[str, float], columns: Iterable[str] = TEST_SETS) -> float:
    """The paper's Avg.: the mean of the columns as printed, with two decimals (SPEC 7.1); of those that are there."""
    printed = [round(scores[name], 2) for name in columns if name in scores]
    return round(sum(printed) / len(printed), 2)


def format_table(rows: dict[str, dict[str, float]], columns: Sequence[str] = TEST_SETS) -> str:
    """A row for each named result, and what Avg. is the average of where a set is not there."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>8}" for name in (*columns, "Avg."))]
    for label, scores in rows.items():
        values = [*(scores.get(name) for name in columns), average(scores, columns)]
        lines.append(f"{label:<{width}}" + "".join(f"{'-':>8}" if value is None else f"{value:8.2f}" for value in values))
    there = [name for name in columns if name in scores]
    if len(there) < len(columns):
        lines.append(f"Avg. is of {', '.join(there)} only: not to be compared with an average of all {len(columns)}")
    return "\n".join(lines)


def format_detail(scores: dict[str, float]) -> str:
    """Of each year: "all", the means of its sub-sources weighted by their pairs and plain, and each; of the others each split."""
    lines = []
    for year, sources in YEARS.items():
        if year in scores:
            each = [scores[f"{year}/{source}"] for source in sources]
            means = f"all {scores[year]:.2f}, weighted mean {np.average(each, weights=list(sources.values())):.2f}, mean {np.mean(each):.2f}"
            lines.append(f"{year:<7}{means}: " + ", ".join(f"{source} {score:.2f}" for source, score in zip(sources, each)))
    for name in ("STSB", "SICKR"):
        splits = {"train": f"{name}-train", "dev": f"{name}-dev", "test": name, "all three": f"{name}-all"}
        lines.append(f"{name:<7}" + ", ".join(f"{split} {scores[key]:.2f}" for split, key in splits.items() if key in scores))
    return "\n".join(lines)


def load_sets(names: Iterable[str], load: Callable, senteval: Path) -> dict:
    """Those of the sets that are there; of the others a line on stderr. Raises: UserError where none is, or one is damaged."""
    sets = {}
    for name in names:
        try:
            sets[name] = load(name, senteval)
        except MissingSet as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    if not sets:
        raise UserError(f"{senteval} holds none of the sets")
    return sets


def count(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def listed(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: some of the known names with commas between."""

    def parse(text: str) -> list[str]:
        for name in (names := text.split(",")):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown; known are {', '.join(known)}, with commas between for several")
        return names

    return parse


def model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that scores models."""
    parser.add_argument("models", metavar="MODEL", nargs="+", help="a model folder, a run's folder or a Hub name")
    parser.add_argument("--pooler", type=listed(POOLINGS), default=[None], metavar="NAME,...",
                        help=f"how a vector is made: {', '.join(POOLINGS)} (default: the folder's own, else cls_before_pooler)")  # fmt: skip
    parser.add_argument("--data", metavar="DIR", default="", help="folder with SentEval's data (default: senteval.tar from the Hub)")
    parser.add_argument("--batch-size", type=count, default=128, help="sentences at a time (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there, a line for each row")


def main() -> None:
    parser = argparse.ArgumentParser(prog="eval_sts.py", description="Score models on the seven STS sets (Spearman x 100).", allow_abbrev=False)
    model_flags(parser)
    parser.add_argument("--whiten", metavar="WITH,...", type=lambda text: text.split(","), default=[], help="add a row with vectors made white, "
                        f"fitted on the sentences that are scored (self) or on the first {WHITENING_SENTENCES:,} of a sentence file")  # fmt: skip
    parser.add_argument("--detail", action="store_true", help="also every sub-source, and the train, dev and test splits")
    args = parser.parse_args()
    held_out = {name: [row[0] for row in islice(read_sentences(find_text(name, args.data)), WHITENING_SENTENCES)]
                for name in args.whiten if name != "self"}  # fmt: skip
    senteval = find_senteval(args.data)
    sets = load_sets((*TEST_SETS, "STSB-dev", "SICKR-dev"), load_set, senteval)
    if args.detail:
        sources = [f"{year}/{source}" for year in YEARS if year in sets for source in YEARS[year]]
        sets |= load_sets((*sources, "STSB-train", "SICKR-train", "SICKR-all"), load_set, senteval)
    rows, reports = {}, []
    for name, pooler in product(args.models, args.pooler):
        bert, tokenizer, own, _ = open_model(name)
        pooler = pooler or own
        encoder = partial(encode, bert, tokenizer, pooling=pooler, batch_size=args.batch_size)
        texts = list(dict.fromkeys(sentence for left, right, _ in sets.values() for sentence in left + right))
        vectors = dict(zip(texts, encoder(texts)))  # every row of this model and pooling needs the same
        for white in (None, *args.whiten):
            transform = None if white is None else whiten_self if white == "self" else partial(whiten, *whitening(encoder(held_out[white])))
            scores = score_pairs(lambda sentences: np.stack([vectors[s] for s in sentences]), sets, transform)  # noqa: B023
            by = "" if white is None else ", white by itself" if white == "self" else f", white by {Path(white).name}"
            rows[f"{name} ({pooler}{by})"] = scores
            reports.append({"model": name, "pooler": pooler, **({"whitened": white} if white else {}), **scores, "average": average(scores)})
    print(format_table(rows))
    for label, scores in rows.items():
        if args.detail:
            print(f"\n{label}\n{format_detail(scores)}")
        elif development := [f"{title} {scores[key]:.2f}" for title, key in (("STS-B", "STSB-dev"), ("SICK-R", "SICKR-dev")) if key in scores]:
            print("development: " + ", ".join(development) + f" ({label})" * (len(rows) > 1))
    if args.json:
        write_atomically(args.json, "".join(json.dumps(report) + "\n" for report in reports))


if __name__ == "__main__":
    run_main(main)
