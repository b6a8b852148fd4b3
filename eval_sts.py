"""Semantic textual similarity: do cosines rank sentence pairs as people do?

    python eval_sts.py MODEL... [--pooler mean] [--data DIR] [--json FILE] [--detail]

Spearman's correlation from scratch, and the seven test sets of the paper's Table 1, scored as
published: STS12-16 in the "all" setting, one correlation over all pairs of a year. Scores are times
100. Development sets (STS-B dev, SICK-R trial) are for choosing settings and checkpoints.

Shapes: P pairs of a set, D hidden size.
Not here: whitening, transfer tasks and the paper's analyses of embeddings (see lab/).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data import file_format, read_lines, read_table
from embed import POOLINGS, encode
from engine.cli import Parser, add_model_flags
from engine.errors import UserError, run_main, write_atomically
from engine.hub import ROOT, find_senteval, find_text
from engine.model_folder import load_model
from engine.device import pick_device

# ------------------------------------------------------------------------------------------------
# Spearman's correlation: Pearson's correlation of the ranks


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank: [30, 10, 30, 20] -> [3.5, 1, 3.5, 2]."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()  # the highest rank in each group of equal values
    return (last - (counts - 1) / 2)[group.reshape(-1)]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, from -1 to 1, with average ranks. Shapes: (P,), (P,).

    Raises: UserError where it is undefined: fewer than 2 pairs, all values equal, NaN, infinity.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise UserError(f"Spearman needs 2 or more pairs of values, not {a.shape} and {b.shape}")
    for values in (a, b):
        if broken := np.count_nonzero(~np.isfinite(values)):
            raise UserError(f"{broken} of {len(values)} values are NaN or infinite (diverged?)")
        if (values == values[0]).all():
            raise UserError(f"Spearman is undefined: all values are {values[0]:g} (collapsed?)")
    a, b = average_ranks(a), average_ranks(b)
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row; 0 for a zero vector. Shapes: (P, D), (P, D) -> (P,) float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms == 0, 1, norms)


# ------------------------------------------------------------------------------------------------
# The sets. A set is three lists of P: left sentences, right sentences, ratings

Pairs = tuple[list[str], list[str], list[float]]
SUB_SOURCES = """
STS12 MSRpar 750 MSRvid 750 SMTeuroparl 459 surprise.OnWN 750 surprise.SMTnews 399
STS13 FNWN 189 headlines 750 OnWN 561
STS14 deft-forum 450 deft-news 300 headlines 750 images 750 OnWN 750 tweet-news 750
STS15 answers-forums 375 answers-students 750 belief 375 headlines 750 images 750
STS16 answer-answer 254 headlines 249 plagiarism 230 postediting 244 question-question 209
"""
YEARS = {  # sub-sources and their numbers of rated pairs
    year: dict(zip(items[::2], map(int, items[1::2])))
    for year, *items in map(str.split, SUB_SOURCES.strip().split("\n"))
}
FILES = {  # path, number of pairs
    "STSB": ("STS/STSBenchmark/sts-test.csv", 1379),
    "STSB-dev": ("STS/STSBenchmark/sts-dev.csv", 1500),
    "STSB-train": ("STS/STSBenchmark/sts-train.csv", 5749),
    "SICKR": ("SICK/SICK_test_annotated.txt", 4927),
    "SICKR-dev": ("SICK/SICK_trial.txt", 500),
    "SICKR-train": ("SICK/SICK_train.txt", 4500),
}
NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")  # no nan, no 1_0
TEST_SETS = (*YEARS, "STSB", "SICKR")  # the columns of the paper's Table 1


class MissingSet(UserError):
    """A set's file does not exist. The command line skips the set; a damaged file is an error."""


def read_set_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    if not path.is_file():
        raise MissingSet(f"{path} is missing: --data has only a part of SentEval's data")
    return list(read_lines(path, encoding))


def load_set(name: str, senteval: Path) -> Pairs:
    """One set: a name in YEARS or FILES, a sub-source ("STS13/OnWN"), or "SICKR-all".

    Words are joined by one space, as in SentEval's `sts.py`.
    Raises: MissingSet; UserError for an unreadable line or a wrong number of pairs.
    """
    if name == "SICKR-all":  # 9,927 pairs, which MTEB calls SICK-R
        splits = [load_set(split, senteval) for split in ("SICKR-train", "SICKR-dev", "SICKR")]
        return tuple(sum(columns, []) for columns in zip(*splits))
    year, _, source = name.partition("/")
    rows = []  # ("FILE line N", [left, right, rating])
    if year in YEARS:
        counts = {source: YEARS[year][source]} if source else YEARS[year]
        expected, folder = sum(counts.values()), senteval / "STS" / f"{year}-en-test"
        for source in counts:
            path, gold = (folder / f"STS.{kind}.{source}.txt" for kind in ("input", "gs"))
            lines, ratings = read_set_lines(path), read_set_lines(gold)
            if len(lines) < len(ratings):
                raise UserError(f"{path} has {len(lines)} lines, {gold.name} has {len(ratings)}")
            for number, (line, rating) in enumerate(zip(lines, ratings), 1):
                if rating.strip():  # most pairs of STS15 and STS16 have no rating
                    rows.append((f"{path} line {number}", [*line.split("\t")[:2], rating]))
    else:  # quote characters have no meaning: STS-B has unpaired ones
        path, expected = senteval / FILES[name][0], FILES[name][1]
        columns, header = ((5, 6, 4), 0) if name.startswith("STSB") else ((1, 2, 3), 1)
        for number, line in enumerate(read_set_lines(path)[header:], 1 + header):
            cells = dict(enumerate(line.split("\t")))
            rows.append((f"{path} line {number}", [cells[i] for i in columns if i in cells]))
    left, right, ratings = to_pairs(rows)
    if len(rows) != expected:
        raise UserError(f"{name} in {senteval}: {len(rows)} rated pairs, published are {expected}")
    return [" ".join(s.split()) for s in left], [" ".join(s.split()) for s in right], ratings


def read_pairs(path: Path) -> Pairs:
    """Your own pairs: a .tsv or .csv with a header and two columns of sentences, one of ratings."""
    rows = [(f"{path} line {number}", cells) for number, cells in read_table(path)]
    if rows and NUMBER.fullmatch(rows[0][1][-1]):
        raise UserError(f"{rows[0][0]} is a pair; put a header above: sentence1, sentence2, score")
    pairs = to_pairs(rows[1:])
    if len(pairs[2]) < 2:
        raise UserError(f"{path}: {len(pairs[2])} pairs; at least 2 are needed for a ranking")
    return pairs


def to_pairs(rows: Iterable[tuple[str, Sequence[str]]]) -> Pairs:
    """Of ("FILE line N", [left, right, rating]). Raises: UserError that names the line."""
    left, right, ratings = [], [], []
    for where, cells in rows:
        if len(cells) != 3:
            raise UserError(f"{where}: {len(cells)} of 3 columns: two sentences and a score")
        if not NUMBER.fullmatch(cells[2]):
            raise UserError(f"{where}: the score {cells[2]!r} is not a number")
        left.append(cells[0])
        right.append(cells[1])
        ratings.append(float(cells[2]))
    return left, right, ratings


def load_sets(names: Iterable[str], load: Callable, senteval: Path) -> dict:
    """The sets that exist. A missing one is a line on stderr. Raises: UserError if all are."""
    sets = {}
    for name in names:
        try:
            sets[name] = load(name, senteval)
        except MissingSet as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    if not sets:
        raise UserError(f"{senteval} has none of the sets")
    return sets


# ------------------------------------------------------------------------------------------------
# Scoring, and the command line

Scores = dict[str, float]
Encoder = Callable[[list[str]], np.ndarray]  # n sentences -> (n, D)
Transform = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None


def score_pairs(encoder: Encoder, sets: dict[str, Pairs], transform: Transform = None) -> Scores:
    """Spearman x 100 of each set. A sentence that occurs several times is encoded once.

    transform: applied to a set's embeddings before their cosine, (P, D), (P, D) -> the same.
    """
    sentences = dict.fromkeys(s for left, right, _ in sets.values() for s in left + right)
    vectors, index = encoder(list(sentences)), {s: i for i, s in enumerate(sentences)}
    scores = {}
    for name, (left, right, ratings) in sets.items():
        u, v = (vectors[[index[s] for s in side]] for side in (left, right))  # (P, D)
        try:
            if transform:
                u, v = transform(u, v)
            scores[name] = 100 * spearman(cosine(u, v), ratings)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return scores


def average(scores: Scores, columns: Iterable[str] = TEST_SETS) -> float | None:
    """The paper's Avg.: mean of the printed columns (two decimals). None if no column exists."""
    printed = [round(scores[name], 2) for name in columns if name in scores]
    return round(sum(printed) / len(printed), 2) if printed else None


def format_table(rows: dict[str, Scores], columns: Sequence[str] = TEST_SETS) -> str:
    """A line for each labelled row. If there are several columns, the last is their average."""
    heads = [*columns, "Avg."] if len(columns) > 1 else columns
    width, widths = max(map(len, rows)), [max(8, len(head) + 2) for head in heads]
    lines = [" " * width + "".join(map(str.rjust, heads, widths))]
    for label, scores in rows.items():
        values = [*map(scores.get, columns), average(scores, columns)][: len(heads)]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"{label:<{width}}" + "".join(map(str.rjust, cells, widths)))
    if len(present := [name for name in columns if name in scores]) < len(columns):
        lines.append(f"Avg. is of {', '.join(present)} only, not of all {len(columns)} sets")
    return "\n".join(lines)


@dataclass
class Score:
    """How `diffcse.train` scores an encoder."""

    name: str
    dev_set: dict[str, Pairs]  # one set, which selects the best model
    test_sets: dict[str, Pairs]  # columns of the table; empty: the table shows dev_set

    def dev(self, encoder: Encoder) -> Scores:
        scores = score_pairs(encoder, self.dev_set)
        return {"score": next(iter(scores.values())), **scores}

    def test(self, encoder: Encoder) -> Scores:
        scores = score_pairs(encoder, self.dev_set | self.test_sets)
        return scores | {"average": average(scores)} if len(self.test_sets) > 1 else scores

    def table(self, rows: dict[str, Scores]) -> str:
        return format_table(rows, list(self.test_sets or self.dev_set))


def make_score(score: str, data: str) -> Score:
    """The score that `--score` names. data: folder with SentEval's data, or "" for the Hub.

    stsb: STS-B dev selects, the seven test sets are shown. dev: test sets are never loaded.
    captions: the rated image captions in assets/. FILE.tsv or .csv: your own pairs (read_pairs).
    """
    if score in ("stsb", "dev"):
        senteval = find_senteval(data)
        dev_set = {"STSB-dev": load_set("STSB-dev", senteval)}
        test_sets = {name: load_set(name, senteval) for name in TEST_SETS if score == "stsb"}
        return Score("STS-B dev, Spearman x 100", dev_set, test_sets)
    if score == "captions":
        dev, test = (ROOT / "assets" / f"sts_captions_{split}.tsv" for split in ("dev", "test"))
        dev_set, test_sets = {"captions-dev": read_pairs(dev)}, {"captions-test": read_pairs(test)}
        return Score("captions dev, Spearman x 100", dev_set, test_sets)
    if file_format(Path(score))[0] not in (".tsv", ".csv"):
        raise UserError(f"--score is {score}; it must be stsb, dev, captions, FILE.tsv or FILE.csv")
    path = find_text(score, data)
    return Score(f"{path.name}, Spearman x 100", {path.name: read_pairs(path)}, {})


def load_encoders(args: argparse.Namespace) -> Iterator[tuple[str, str, Encoder]]:
    """(model, pooling, encoder) of each MODEL and --pooler. args: flags of add_model_flags."""
    device, amp = pick_device(args.device, args.amp)
    for name in args.models:
        model = load_model(name)
        for pooling in (pooler or model.pooling for pooler in args.pooler):
            settings = {"pooling": pooling, "batch_size": args.batch_size, "amp": amp}
            yield name, pooling, partial(encode, model.bert.to(device), model.tokenizer, **settings)


def print_scores(rows: dict[str, Scores]) -> None:
    """The table of the test sets, and the scores of the development sets, where they exist."""
    if any(name in scores for scores in rows.values() for name in TEST_SETS):
        print(format_table(rows))
    titles = {"STSB-dev": "STS-B", "SICKR-dev": "SICK-R"}
    for label, scores in rows.items():
        dev = [f"{titles[name]} {scores[name]:.2f}" for name in titles if name in scores]
        if dev:
            print("development: " + ", ".join(dev) + f" ({label})" * (len(rows) > 1))


def main() -> None:
    parser = Parser("eval_sts.py", description="Score the seven STS sets", allow_abbrev=False)
    add_model_flags(parser, POOLINGS)
    parser.add_argument("--detail", action="store_true", help="also every sub-source and split")
    args = parser.parse_args()
    names = [*TEST_SETS, "STSB-dev", "SICKR-dev"]
    if args.detail:
        names += [f"{year}/{source}" for year in YEARS for source in YEARS[year]]
        names += ["STSB-train", "SICKR-train", "SICKR-all"]
    sets = load_sets(names, load_set, find_senteval(args.data))
    rows, reports = {}, []
    for name, pooling, encoder in load_encoders(args):
        rows[f"{name} ({pooling})"] = scores = score_pairs(encoder, sets)
        report = {"model": name, "pooler": pooling, "amp": args.amp}
        reports.append(report | scores | {"average": average(scores)})
    print_scores(rows)
    if args.detail:
        for label, scores in rows.items():
            print("", label, *(f"{key:<24}{x:6.2f}" for key, x in scores.items()), sep="\n")
    if args.json:
        write_atomically(args.json, "".join(json.dumps(report) + "\n" for report in reports))


if __name__ == "__main__":
    run_main(main)
