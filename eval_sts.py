"""Semantic textual similarity: does the cosine of two vectors rank sentence pairs as people do?

    python eval_sts.py MODEL [--pooler mean] [--data DIR] [--json FILE]

Spearman's correlation from scratch, the seven test sets of the paper's Table 1 (STS12-16, STS-B, SICK-R) read and
scored as published: for STS12-16 one correlation over all pairs of a year, sub-sources concatenated ("all", SPEC
7.4), times 100. Development sets (STS-B dev, SICK-R trial) are for choosing settings and checkpoints.

Letters: P pairs of a set.
Not here: transfer tasks, correlations per sub-source, whitening.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bert import UserError, load_bert, write_atomically
from data import Tokenizer, find_model, find_senteval, run_main
from embed import POOLINGS, encode

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
    "SICKR": ("SICK/SICK_test_annotated.txt", 4927),
    "SICKR-dev": ("SICK/SICK_trial.txt", 500),
}
TEST_SETS = (*YEARS, "STSB", "SICKR")  # the columns of the paper's Table 1


def _read_lines(path: Path) -> list[str]:
    try:
        # Only \n ends a line, not \x85 or a lone \r inside a sentence; SICK's test file ends its lines with \r\n.
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        return text.removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: --data names a folder that is not all of SentEval's") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def load_set(name: str, senteval: Path) -> Pairs:
    """One set by its name in YEARS or FILES. Words are joined by one space, as SentEval's batcher does (SPEC 7.3).

    Raises: UserError that names a missing file, a line that cannot be read, or a wrong number of pairs.
    """
    rows: list[tuple[str, str, str, str]] = []  # left, right, score, where it stands

    def table(path: Path, left: int, right: int, score: int, header: int) -> None:
        """Tab-separated and never quoted: 412 rows of STS-B hold lone quote characters."""
        for number, line in enumerate(_read_lines(path)[header:], 1 + header):
            cells = line.split("\t")
            if len(cells) <= max(left, right, score):
                raise UserError(f"{path} line {number}: {len(cells)} cells where {max(left, right, score) + 1} are expected")
            rows.append((cells[left], cells[right], cells[score], f"{path} line {number}"))

    if name in YEARS:
        expected = sum(YEARS[name].values())
        for source in YEARS[name]:
            folder = senteval / "STS" / f"{name}-en-test"
            texts, scores = (_read_lines(folder / f"STS.{kind}.{source}.txt") for kind in ("input", "gs"))
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


# ----------------------------------------------------------------------------------------------------------------
# Scoring


def score_pairs(encoder: Callable[[list[str]], np.ndarray], sets: dict[str, Pairs]) -> dict[str, float]:
    """Spearman x 100 of each set; a sentence that occurs more than once, in whatever set, is encoded once.

    encoder: n sentences -> (n, D). This is all that training and evaluation know of each other.
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
            results[name] = 100 * spearman(cosine(u, v), scores)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return results


def average(scores: dict[str, float]) -> float:
    """The paper's Avg.: the mean of the columns as printed, with two decimals (SPEC 7.1)."""
    return round(sum(round(scores[name], 2) for name in TEST_SETS) / len(TEST_SETS), 2)


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Table 1's columns, a row for each named result."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>8}" for name in (*TEST_SETS, "Avg."))]
    for label, scores in rows.items():
        values = [*(scores[name] for name in TEST_SETS), average(scores)]
        lines.append(f"{label:<{width}}" + "".join(f"{value:8.2f}" for value in values))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="eval_sts.py", description="Score a model on the seven STS sets (Spearman x 100).")
    parser.add_argument("model", metavar="MODEL", help="a model folder or a Hub name")
    parser.add_argument("--pooler", choices=POOLINGS, default="cls_before_pooler", help="how a vector is made (default: %(default)s)")
    parser.add_argument("--data", metavar="DIR", default="", help="folder with STS/ and SICK/ (default: senteval.tar from the Hub)")
    parser.add_argument("--batch-size", type=int, default=128, help="sentences at a time (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}: it must be at least 1")
    folder = find_model(args.model)
    bert = load_bert(folder)
    tokenizer = Tokenizer(folder).check_fits(folder, bert.cfg.vocab_size)
    senteval = find_senteval(args.data)
    sets = {name: load_set(name, senteval) for name in (*TEST_SETS, "STSB-dev", "SICKR-dev")}
    scores = score_pairs(lambda sentences: encode(bert, tokenizer, sentences, args.pooler, args.batch_size), sets)
    print(format_table({f"{args.model} ({args.pooler})": scores}))
    print(f"development: STS-B {scores['STSB-dev']:.2f}, SICK-R {scores['SICKR-dev']:.2f}")
    if args.json:
        report = {"model": args.model, "pooler": args.pooler, **scores, "average": average(scores)}
        write_atomically(args.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
