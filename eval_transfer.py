"""Transfer: what can a linear classifier read from vectors that stay as they are? The seven tasks of the paper's Table 2.

    python eval_transfer.py MODEL... [--pooler mean] [--tasks MR,CR] [--data DIR] [--json FILE]
    python eval_transfer.py MODEL --protocol senteval           # as published; --mode fast: as published in training

A protocol is how one linear layer is fitted to items of known class; everything around it is the same for both, and
SentEval's to the letter (SPEC 7.5): which items train, which choose the weight of the L2 penalty, which are scored.
    senteval: Adam or RMSprop from one random start, until the accuracy on the items that choose has failed to grow
        some times. What the published figures are made with.
    lbfgs: the same function of the weights, the mean cross-entropy plus l2/2 |W|^2, brought to its minimum. No start,
        no order of items, no stopping: nothing of chance, and faster.
All fits of a task are one problem: their weights stand beside each other in one tensor.

Letters: N items, D features of an item, the constant 1 for the bias included, C classes, F fits, L weights of the penalty.
Differs: in float64, where SentEval has float32; so the same vectors give the same table on every machine.
Not here: MLP classifiers, SNLI, image-caption retrieval and SentEval's probing tasks.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bert import UserError, write_atomically
from data import find_senteval, run_main
from embed import encode, open_model
from eval_sts import average, format_table, listed, load_sets, model_flags, read_set_lines

SEED = 1111  # of folds, weights and order, in every run of SentEval

# ----------------------------------------------------------------------------------------------------------------
# The tasks


@dataclass
class Task:
    """Sentences and labels of all splits, one after the other; each split sorted as SentEval does, which decides the folds."""

    sentences: list[list[str]]  # one list of N; two of pairs
    labels: np.ndarray  # (N,), from 0
    splits: list[int]  # items of: all (cross-validated) | train, test | train, development, test


CLASSES = {"MR": ("MR/rt-polarity.neg", "MR/rt-polarity.pos"), "CR": ("CR/custrev.neg", "CR/custrev.pos"),
           "SUBJ": ("SUBJ/subj.subjective", "SUBJ/subj.objective"), "MPQA": ("MPQA/mpqa.neg", "MPQA/mpqa.pos")}  # fmt: skip
SPLITS = {"SST2": ("SST/binary/sentiment-train", "SST/binary/sentiment-dev", "SST/binary/sentiment-test"),
          "TREC": ("TREC/train_5500.label", "TREC/TREC_10.label"),
          "MRPC": ("MRPC/msr_paraphrase_train.txt", "MRPC/msr_paraphrase_test.txt")}  # fmt: skip
COUNTS = {  # items of each file (SPEC 7.5, and counted in the files themselves)
    "MR": (5331, 5331), "CR": (1368, 2407), "SUBJ": (5000, 5000), "MPQA": (7294, 3312),
    "SST2": (67349, 872, 1821), "TREC": (5452, 500), "MRPC": (4076, 1725),
}  # fmt: skip
TASKS = (*CLASSES, *SPLITS)  # the columns of the paper's Table 2
TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def load_task(name: str, senteval: Path) -> Task:
    """One task by its name in TASKS. Raises: UserError that names a missing file, an odd line, or a wrong number of items."""
    encoding = "utf-8" if name in ("SST2", "MRPC") else "latin-1"
    files = []  # of each file its rows: (sentences..., label)
    for label, (file, expected) in enumerate(zip((CLASSES | SPLITS)[name], COUNTS[name])):
        path = senteval / file
        lines = read_set_lines(path, encoding)[1 if name == "MRPC" else 0 :]
        if name in CLASSES:
            rows = [
                (line, label) for line in lines
            ]  # an empty line is an item too: CR and MPQA have some
        else:
            rows = [
                _row(name, line, f"{path} line {number}")
                for number, line in enumerate(lines, 2 if name == "MRPC" else 1)
            ]
        if len(rows) != expected:
            raise UserError(
                f"{path}: {len(rows)} items, published are {expected}: the download is damaged or another version"
            )
        files.append([(*(text.split() for text in texts), label) for *texts, label in rows])
    if name in CLASSES:
        files = [files[1] + files[0]]  # SentEval's order: positive items first
    rows = [
        row
        for split in files
        for row in sorted(split, key=lambda row: (*map(len, row[:-1]), row[-1]))
    ]
    *columns, labels = zip(*rows)
    return Task(
        [[" ".join(words) for words in column] for column in columns],
        np.array(labels),
        [len(split) for split in files],
    )


def _row(name: str, line: str, where: str) -> tuple[str | int, ...]:
    """Sentence or sentences and label of one line."""
    if name == "TREC":  # COARSE:fine question
        kind, _, question = line.partition(" ")
        if (coarse := kind.partition(":")[0]) in TREC_CLASSES and ":" in kind:
            return question, TREC_CLASSES.index(coarse)
        raise UserError(
            f"{where}: {kind!r} is none of {', '.join(TREC_CLASSES)} with a colon and a finer class"
        )
    cells = line.strip().split("\t")
    cells, label = (cells[:1], cells[-1]) if name == "SST2" else (cells[3:], cells[0])
    if label not in ("0", "1") or len(cells) != (1 if name == "SST2" else 2):
        raise UserError(
            f"{where}: not "
            + (
                "a sentence, a tab and 0 or 1"
                if name == "SST2"
                else "0 or 1, two numbers and two sentences, tabs between"
            )
        )
    return *cells, int(label)


def features(task: Task, vectors: dict[str, np.ndarray]) -> Tensor:
    """What the classifier sees: the vector u; of a pair |u - v| and u * v. A 1 at the end carries the bias. Shapes: -> (N, D)."""
    u, *v = (
        torch.from_numpy(np.stack([vectors[s] for s in side])).double() for side in task.sentences
    )
    X = torch.cat([(u - v[0]).abs(), u * v[0]], 1) if v else u
    return torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)


# ----------------------------------------------------------------------------------------------------------------
# Protocols: X (N, D), y (N,), F fits with their items to train on and to choose by, l2 (F, L)
#     -> weights (F, D, L, C), accuracies on the items that choose (F, L)

L2 = np.array([1e-5, 1e-4, 1e-3, 1e-2])


@dataclass
class Mode:
    """SentEval's settings: test makes published tables, fast is what published training is watched with (SPEC 7.1)."""

    folds: int
    optimizer: str
    batch: int
    tenacity: int  # a fit ends with its (tenacity + 1)-th look that shows nothing better; the count is never reset
    epochs: int  # between two looks


MODES = {"test": Mode(10, "Adam", 64, 5, 4), "fast": Mode(5, "RMSprop", 128, 3, 2)}
MAX_EPOCHS = 200
Fits = list[
    tuple[np.ndarray, np.ndarray | None]
]  # items to train on, items to choose by; None: keep some of the former aside


def accuracies(X: Tensor, y: Tensor, weights: Tensor, items: list[np.ndarray]) -> np.ndarray:
    """Share of each fit's own items that are right. Shapes: weights (F, D, L, C) -> (F, L)."""
    right = [
        torch.einsum("nd,dlc->nlc", X[i], w).argmax(-1) == y[i, None]
        for w, i in zip(weights, items)
    ]
    return np.stack([r.double().mean(0).numpy() for r in right])


def keep_aside(train: np.ndarray, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Where no items are named to choose by: every 20th of those to train on, drawn at random. Shapes: (A, n) -> (A, n - m), (A, m)."""
    order = random.permutation(train.shape[1])
    m = train.shape[1] // 20
    return train[:, order[m:]], train[:, order[:m]]


def fit_senteval(
    X: Tensor, y: Tensor, classes: int, fits: Fits, l2: np.ndarray, mode: Mode
) -> tuple[Tensor, np.ndarray]:
    """Gradient steps until the accuracy on the items that choose stops growing; the weights where it was highest.

    The seed is set anew for every fit, so those with as many items share start and order, and are stepped together.
    """
    weights, best = (
        torch.zeros(len(fits), X.shape[1], l2.shape[1], classes, dtype=X.dtype),
        np.full(l2.shape, -1.0),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        layer = nn.Linear(X.shape[1] - 1, classes)
    start = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().T.to(X.dtype)  # (D, C)
    truth = F.one_hot(y, classes).to(X.dtype)  # (N, C)
    sizes = [len(train) for train, _ in fits]
    for size in sorted(set(sizes)):
        alive = np.flatnonzero(np.array(sizes) == size)  # the fits that still go on
        random = np.random.RandomState(SEED)
        train = np.stack([fits[f][0] for f in alive])  # (A, n)
        choose = [fits[f][1] for f in alive]
        if choose[0] is None:
            train, choose = keep_aside(train, random)
            choose = list(choose)
        train, penalty = torch.from_numpy(train), torch.from_numpy(l2[alive])[:, None, :, None]
        w = start[:, None].expand(len(alive), -1, l2.shape[1], -1).clone()  # (A, D, L, C)
        optimizer = getattr(torch.optim, mode.optimizer)(
            [w], lr={"Adam": 1e-3, "RMSprop": 1e-2}[mode.optimizer]
        )
        misses, epoch = np.zeros((len(alive), l2.shape[1]), int), 0
        while len(alive) and epoch <= MAX_EPOCHS:
            for _ in range(mode.epochs):
                order = torch.from_numpy(random.permutation(train.shape[1]))
                for batch in order.split(mode.batch):
                    items = train[:, batch]  # (A, B)
                    x = X[items]  # (A, B, D)
                    logits = (x @ w.flatten(2)).unflatten(2, w.shape[2:])  # (A, B, L, C)
                    error = logits.softmax(-1) - truth[items][:, :, None]
                    w.grad = (x.mT @ error.flatten(2)).unflatten(2, w.shape[2:]) / len(
                        batch
                    ) + penalty * w
                    optimizer.step()
            epoch += mode.epochs
            now, going = accuracies(X, y, w, choose), misses <= mode.tenacity
            better = going & (now > best[alive])
            misses += going & ~better
            best[alive] = np.where(better, now, best[alive])
            weights[alive] = torch.where(
                torch.from_numpy(better)[:, None, :, None], w, weights[alive]
            )
            keep = (misses <= mode.tenacity).any(1)
            if not keep.all():  # the others are done: take them out of every tensor
                alive, misses, choose = (
                    alive[keep],
                    misses[keep],
                    [items for items, k in zip(choose, keep) if k],
                )
                mask = torch.from_numpy(keep)
                train, penalty, w.data = train[mask], penalty[mask], w.data[mask]
                w.grad = None
                for name, value in optimizer.state[w].items():
                    if value.ndim:  # not the count of steps
                        optimizer.state[w][name] = value[mask]
    return weights, best


def minimum(X: Tensor, truth: Tensor, share: Tensor, l2: float) -> Tensor:
    """W of P problems, each with its own share of every item in the loss, at the least sum of cross-entropies + l2/2 |W|^2.

    All logits are one product X W. The search is in coordinates in which the curvature is near 1 in every direction (it is at
    most X'X / 2N + l2, Boehning 1992): in those of the features, of very different size, it would be long.
    Shapes: X (N, D), truth (N, C), share (N, P) -> (D, P, C).
    """
    one = torch.eye(X.shape[1], dtype=X.dtype)
    L = torch.linalg.cholesky(X.T @ X / (4 * len(X)) + l2 * one)
    Z = torch.linalg.solve_triangular(
        L, X.T, upper=False
    ).T  # X = Z L', so X W = Z V where V = L' W
    inverse = torch.linalg.solve_triangular(L, one, upper=False)
    penalty = l2 * inverse @ inverse.T  # l2 |W|^2 = V' penalty V
    V = torch.zeros(X.shape[1], share.shape[1], truth.shape[1], dtype=X.dtype)

    def loss() -> Tensor:
        log_p = (Z @ V.flatten(1)).unflatten(1, V.shape[1:]).log_softmax(-1)  # (N, P, C)
        decay = (penalty @ V.flatten(1)).unflatten(1, V.shape[1:])
        error = (log_p.exp() - truth[:, None]) * share[:, :, None]
        V.grad = (Z.T @ error.flatten(1)).unflatten(1, V.shape[1:]) + decay
        return (V * decay).sum() / 2 - (log_p * truth[:, None] * share[:, :, None]).sum()

    torch.optim.LBFGS(
        [V],
        max_iter=2000,
        tolerance_grad=1e-6,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    ).step(loss)
    return torch.linalg.solve_triangular(L.T, V.flatten(1), upper=True).unflatten(1, V.shape[1:])


def fit_lbfgs(
    X: Tensor, y: Tensor, classes: int, fits: Fits, l2: np.ndarray, mode: Mode
) -> tuple[Tensor, np.ndarray]:
    """The minimum of mean cross-entropy + l2/2 |W|^2, the bias included, as SentEval's weight decay does; mode does not matter.

    What senteval keeps aside to stop by does not train here either, though nothing stops: the protocols see the same items.
    """
    weights = torch.zeros(len(fits), X.shape[1], l2.shape[1], classes, dtype=X.dtype)
    share, chosen_by = torch.zeros(len(X), len(fits), dtype=X.dtype), []
    for f, (train, choose) in enumerate(fits):
        if choose is None:
            train, choose = (
                items[0] for items in keep_aside(train[None], np.random.RandomState(SEED))
            )
        share[train, f] = 1 / len(train)
        chosen_by.append(choose)
    truth = F.one_hot(y, classes).to(X.dtype)  # (N, C)
    for value in np.unique(l2):
        of_fit, of_l2 = np.nonzero(l2 == value)
        weights[of_fit, :, of_l2] = minimum(X, truth, share[:, of_fit], value).movedim(1, 0)
    return weights, accuracies(X, y, weights, chosen_by)


PROTOCOLS: dict[str, Callable] = {"lbfgs": fit_lbfgs, "senteval": fit_senteval}

# ----------------------------------------------------------------------------------------------------------------
# Which items train, which choose, which are scored


def stratified_folds(labels: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """k times (the other items, the fold's items), each class spread evenly and at random: scikit-learn's StratifiedKFold.

    Raises: UserError where a class has fewer items than there are folds.
    """
    _, first, kind = np.unique(labels, return_index=True, return_inverse=True)
    kind = np.argsort(np.argsort(first))[kind]  # classes in order of appearance
    if np.bincount(kind).min() < k:
        raise UserError(f"{k} folds, but a class has only {np.bincount(kind).min()} items")
    random, fold, in_order = np.random.RandomState(SEED), np.empty(len(kind), int), np.sort(kind)
    for c in range(len(first)):
        share = np.repeat(np.arange(k), [np.count_nonzero(in_order[i::k] == c) for i in range(k)])
        random.shuffle(share)
        fold[kind == c] = share
    return [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(k)]


def evaluate(
    task: Task, X: Tensor, fit: Callable, mode: Mode
) -> tuple[dict[str, float], np.ndarray]:
    """Accuracy x 100 on development and test items, and the class predicted for every test item, (N,), -1 for others.

    One part of all items is scored after the other: ten folds, or the test split. The rest trains, and chooses its weight of
    the penalty, by folds of its own or by the development split. dev is the accuracy by which was chosen.
    """
    y = torch.from_numpy(task.labels)
    classes, bounds = int(y.max()) + 1, np.cumsum([0, *task.splits])
    parts = [np.arange(a, b) for a, b in zip(bounds, bounds[1:])]
    outer = (
        stratified_folds(task.labels, mode.folds) if len(parts) == 1 else [(parts[0], parts[-1])]
    )
    if len(parts) == 3:
        inner, final = [[(parts[0], parts[1])]], [(parts[0], parts[1])]
    else:
        inner = [
            [(train[a], train[b]) for a, b in stratified_folds(task.labels[train], mode.folds)]
            for train, _ in outer
        ]
        final = [(train, None) for train, _ in outer]
    grid = np.tile(L2, (len(outer) * len(inner[0]), 1))
    scores = fit(X, y, classes, sum(inner, []), grid, mode)[1].reshape(
        len(outer), len(inner[0]), len(L2)
    )
    scores = np.round(
        100 * scores.mean(1), 2
    )  # (outer, L): rounded before the best is taken, the weakest penalty of equals
    weights, _ = fit(X, y, classes, final, L2[scores.argmax(1)][:, None], mode)
    predicted = np.full(len(y), -1)
    for (_, test), w in zip(outer, weights):
        predicted[test] = (X[test] @ w[:, 0]).argmax(-1).numpy()
    tests = [np.round(100 * np.mean(predicted[test] == task.labels[test]), 2) for _, test in outer]
    return {
        "dev": float(np.round(scores.max(1).mean(), 2)),
        "test": float(np.round(np.mean(tests), 2)),
    }, predicted


def f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """F1 x 100 of class 1 among the items predicted. Shapes: (N,), (N,)."""
    both = np.sum((labels == 1) & (predicted == 1))
    return float(200 * both / max(1, np.sum(labels[predicted >= 0] == 1) + np.sum(predicted == 1)))


# ----------------------------------------------------------------------------------------------------------------
# The command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="eval_transfer.py",
        description="Score models on the seven transfer tasks (accuracy x 100).",
        allow_abbrev=False,
    )
    model_flags(parser)
    parser.add_argument(
        "--tasks",
        type=listed(TASKS),
        default=TASKS,
        metavar="TASK,...",
        help=f"of {', '.join(TASKS)} (default: all)",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="lbfgs",
        help="how the classifier is fitted (default: lbfgs)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="test",
        help="test: 10 folds; fast: 5 folds, what training is watched with (default: test)",
    )
    parser.add_argument(
        "--amp",
        choices=("off", "bf16"),
        default="off",
        help="bf16: vectors in mixed precision, faster where the processor has it (default: off)",
    )
    args = parser.parse_args()
    tasks = load_sets(
        [name for name in TASKS if name in args.tasks], load_task, find_senteval(args.data)
    )
    rows, reports = {}, []
    for model, pooler in product(args.models, args.pooler):
        bert, tokenizer, own, _ = open_model(model)
        pooler = pooler or own
        sentences = list(
            dict.fromkeys(s for task in tasks.values() for side in task.sentences for s in side)
        )
        with torch.autocast(bert.device.type, dtype=torch.bfloat16, enabled=args.amp == "bf16"):
            encoded = encode(bert, tokenizer, sentences, pooler, args.batch_size)
        if not np.isfinite(encoded).all():
            raise UserError(
                f"{model}: its vectors hold NaN or infinity (did training diverge? try a lower --lr)"
            )
        vectors = dict(zip(sentences, encoded))
        dev, test, seconds, more = {}, {}, {}, {}
        for name, task in tasks.items():
            started = time.perf_counter()
            scores, predicted = evaluate(
                task, features(task, vectors), PROTOCOLS[args.protocol], MODES[args.mode]
            )
            dev[name], test[name], seconds[name] = (
                scores["dev"],
                scores["test"],
                round(time.perf_counter() - started, 1),
            )
            if name == "MRPC":
                more["MRPC_f1"] = round(f1(task.labels, predicted), 2)
            print(
                f"{model} ({pooler}), {name}: dev {dev[name]:.2f}, test {test[name]:.2f}, {seconds[name]:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        label = f"{model} ({pooler})"
        rows |= {label: test, f"{label}, dev": dev}
        reports.append({"model": model, "pooler": pooler, "protocol": args.protocol, "mode": args.mode, "amp": args.amp, **test, **more,
                        "average": average(test, TASKS), "dev": {**dev, "average": average(dev, TASKS)}, "seconds": seconds})  # fmt: skip
    print(format_table(rows, TASKS))
    if args.json:
        write_atomically(args.json, "".join(json.dumps(report) + "\n" for report in reports))


if __name__ == "__main__":
    run_main(main)
