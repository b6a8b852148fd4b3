"""Transfer tasks: what can a linear classifier read from frozen embeddings? (paper, Table 2)

    python -m lab.transfer MODEL... [--pooler mean] [--tasks MR,CR] [--data DIR] [--json FILE]
    python -m lab.transfer MODEL --protocol senteval     # as published; --mode fast: as in training

Data, folds and selection follow facebookresearch/SentEval (`senteval/tools/validation.py`,
`classifier.py`). A protocol is how one linear layer is fitted:
    senteval: Adam or RMSprop from one random start, with early stopping, as in published tables.
    lbfgs: the minimum of the same loss. It has no randomness, and is faster.

Shapes: N items, D features including a constant 1 for the bias, C classes, F fits, L values of l2.
Differs: float64 where SentEval has float32. Not here: MLP classifiers, SNLI, probing tasks.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embed import POOLINGS
from engine.cli import Parser, add_model_flags, comma_list
from engine.errors import UserError, run_main, write_atomically
from engine.hub import find_senteval
from eval_sts import average, format_table, load_encoders, load_sets, read_set_lines

# ------------------------------------------------------------------------------------------------
# The tasks

SST = "SST/binary/sentiment-"
FILES = {  # files of each task and their numbers of items
    "MR": {"MR/rt-polarity.neg": 5331, "MR/rt-polarity.pos": 5331},
    "CR": {"CR/custrev.neg": 1368, "CR/custrev.pos": 2407},
    "SUBJ": {"SUBJ/subj.subjective": 5000, "SUBJ/subj.objective": 5000},
    "MPQA": {"MPQA/mpqa.neg": 7294, "MPQA/mpqa.pos": 3312},
    "SST2": {f"{SST}train": 67349, f"{SST}dev": 872, f"{SST}test": 1821},
    "TREC": {"TREC/train_5500.label": 5452, "TREC/TREC_10.label": 500},
    "MRPC": {"MRPC/msr_paraphrase_train.txt": 4076, "MRPC/msr_paraphrase_test.txt": 1725},
}
TASKS = tuple(FILES)  # the columns of the paper's Table 2
LINES = {  # pattern and labels, where a file is a split; the other tasks have a file for each class
    "SST2": (r"(?P<text>[^\t]*)\t(?P<label>[01])", ["0", "1"]),
    "TREC": (r"(?P<label>[A-Z]+):\S* (?P<text>.*)", ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]),
    "MRPC": (r"(?P<label>[01])\t\d+\t\d+\t(?P<text>[^\t]*)\t(?P<text2>[^\t]*)", ["0", "1"]),
}


@dataclass
class Task:
    """All splits in sequence, each sorted as in SentEval, because the order decides the folds."""

    sentences: list[list[str]]  # one list of N; two for a task of pairs
    labels: np.ndarray  # (N,), from 0
    splits: list[int]  # sizes: all (cross-validation), or train, test, or train, dev, test


def load_task(name: str, senteval: Path) -> Task:
    """One of TASKS. Raises: MissingSet; UserError for an unreadable line or a wrong count."""
    splits, header = [], int(name == "MRPC")
    for number_of_file, (file, expected) in enumerate(FILES[name].items()):
        path, rows = senteval / file, []  # rows: (words, ..., label)
        lines = read_set_lines(path, "utf-8" if name in ("SST2", "MRPC") else "latin-1")
        for number, line in enumerate(lines[header:], 1 + header):
            label, texts = number_of_file, {"text": line}  # an empty line of CR or MPQA is an item
            if name in LINES:
                pattern, labels = LINES[name]
                match = re.fullmatch(pattern, line.strip())
                if not match or match["label"] not in labels:
                    raise UserError(f"{path} line {number}: not a line of {name}: {line[:50]!r}")
                texts = match.groupdict()
                label = labels.index(texts.pop("label"))
            rows.append((*(text.split() for text in texts.values()), label))
        if len(rows) != expected:
            raise UserError(f"{path}: {len(rows)} items, published are {expected}")
        splits.append(rows)
    if name not in LINES:
        splits = [splits[0] + splits[1]]
    for rows in splits:
        rows.sort(key=lambda row: (*map(len, row[:-1]), row[-1]))
    *columns, labels = zip(*sum(splits, []))
    sentences = [[" ".join(words) for words in column] for column in columns]
    return Task(sentences, np.array(labels), [len(rows) for rows in splits])


def features(task: Task, vectors: dict[str, np.ndarray]) -> Tensor:
    """The classifier's input: the embedding u, or |u - v| and u * v; then 1. Shapes: -> (N, D)."""
    sides = [np.stack([vectors[s] for s in side]) for side in task.sentences]
    u, *v = (torch.from_numpy(side).double() for side in sides)
    X = torch.cat([(u - v[0]).abs(), u * v[0]], 1) if v else u
    return F.pad(X, (0, 1), value=1.0)


# ------------------------------------------------------------------------------------------------
# Protocols: X (N, D), y (N,), F fits, l2 (F, L) -> weights (F, D, L, C), validation accuracy (F, L)

SEED = 1111  # of folds, weights and order, as in SentEval
L2 = np.array([1e-5, 1e-4, 1e-3, 1e-2])
Fits = list[tuple[np.ndarray, np.ndarray | None]]  # training and validation items (None: hold_out)


@dataclass
class Mode:
    """SentEval's settings: "test" for published tables, "fast" for evaluations during training."""

    folds: int
    optimizer: str
    batch: int
    patience: int  # evaluations without gain that a fit survives; the count is never reset
    epochs: int  # between evaluations


MODES = {"test": Mode(10, "Adam", 64, 5, 4), "fast": Mode(5, "RMSprop", 128, 3, 2)}


def accuracies(X: Tensor, y: Tensor, weights: Tensor, items: list[np.ndarray]) -> np.ndarray:
    """Accuracy of each fit on its own items. Shapes: weights (F, D, L, C) -> (F, L)."""
    predicted = [torch.einsum("nd,dlc->nlc", X[i], w).argmax(-1) for w, i in zip(weights, items)]
    correct = [p == y[i, None] for p, i in zip(predicted, items)]
    return np.stack([c.double().mean(0).numpy() for c in correct])


def hold_out(train: np.ndarray, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """A random 5 % of the training items for validation. Shapes: (F, n) -> (F, n - m), (F, m)."""
    order, m = rng.permutation(train.shape[1]), train.shape[1] // 20
    return train[:, order[m:]], train[:, order[:m]]


def fit_senteval(X: Tensor, y: Tensor, classes: int, fits: Fits, l2: np.ndarray, mode: Mode):
    """Gradient steps with early stopping: the weights of the highest validation accuracy.

    SentEval seeds every fit anew: fits with equally many items share start and order, and so steps.
    """
    weights = torch.zeros(len(fits), X.shape[1], l2.shape[1], classes, dtype=X.dtype)
    best, sizes = np.full(l2.shape, -1.0), np.array([len(train) for train, _ in fits])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        layer = torch.nn.Linear(X.shape[1] - 1, classes)
    start = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().T.to(X.dtype)  # (D, C)
    target = F.one_hot(y, classes).to(X.dtype)  # (N, C)
    for size in np.unique(sizes):
        f, rng = np.flatnonzero(sizes == size), np.random.RandomState(SEED)
        train, validation = np.stack([fits[i][0] for i in f]), [fits[i][1] for i in f]
        if validation[0] is None:
            train, validation = hold_out(train, rng)
        train, penalty = torch.from_numpy(train), torch.from_numpy(l2[f])[:, None, :, None]
        w = start[:, None].expand(len(f), -1, l2.shape[1], -1).clone()  # (F, D, L, C)
        lr = {"Adam": 1e-3, "RMSprop": 1e-2}[mode.optimizer]
        optimizer = getattr(torch.optim, mode.optimizer)([w], lr=lr)
        misses, epoch = np.zeros(l2[f].shape, int), 0
        while len(f) and epoch <= 200:  # as in SentEval
            for _ in range(mode.epochs):
                for batch in torch.from_numpy(rng.permutation(train.shape[1])).split(mode.batch):
                    x = X[train[:, batch]]  # (F, B, D)
                    p = torch.einsum("fbd,fdlc->fblc", x, w).softmax(-1)
                    error = (p - target[train[:, batch], None]) / len(batch)
                    w.grad = torch.einsum("fbd,fblc->fdlc", x, error) + penalty * w
                    optimizer.step()
            epoch += mode.epochs
            accuracy, going = accuracies(X, y, w, validation), misses <= mode.patience
            better = going & (accuracy > best[f])
            misses += going & ~better
            best[f] = np.where(better, accuracy, best[f])
            weights[f] = torch.where(torch.from_numpy(better)[:, None, :, None], w, weights[f])
            keep = (misses <= mode.patience).any(1)
            if not keep.all():  # remove fits that have stopped from all tensors
                f, misses, kept = f[keep], misses[keep], torch.from_numpy(keep)
                validation = [items for items, k in zip(validation, keep) if k]
                train, penalty, w.data, w.grad = train[kept], penalty[kept], w.data[kept], None
                optimizer.state[w] |= {k: v[kept] for k, v in optimizer.state[w].items() if v.ndim}
    return weights, best


def fit_lbfgs(X: Tensor, y: Tensor, classes: int, fits: Fits, l2: np.ndarray, mode: Mode):
    """The minimum of mean cross-entropy + l2/2 |W|^2, bias included (SentEval's weight decay).

    Items that hold_out removes are not trained on here either: both protocols see the same items.
    """
    weights = torch.zeros(len(fits), X.shape[1], l2.shape[1], classes, dtype=X.dtype)
    share, validation = torch.zeros(len(X), len(fits), dtype=X.dtype), []
    for f, (train, items) in enumerate(fits):
        if items is None:
            train, items = (i[0] for i in hold_out(train[None], np.random.RandomState(SEED)))
        share[train, f] = 1 / len(train)
        validation.append(items)
    target = F.one_hot(y, classes).to(X.dtype)  # (N, C)
    for value in np.unique(l2):
        f, i = np.nonzero(l2 == value)
        weights[f, :, i] = minimum(X, target, share[:, f], value).movedim(1, 0)
    return weights, accuracies(X, y, weights, validation)


def minimum(X: Tensor, target: Tensor, share: Tensor, l2: float) -> Tensor:
    """Weights that minimise each fit's cross-entropy, weighted by `share`, + l2/2 |W|^2.

    L-BFGS searches in coordinates U = R' W, where R R' = X'X / 4N + l2 I: the loss's curvature
    is near 1 in all of them (Boehning 1992), while the features have very different scales.
    Shapes: X (N, D), target (N, C), share (N, F) -> (D, F, C).
    """
    identity = torch.eye(X.shape[1], dtype=X.dtype)
    R = torch.linalg.cholesky(X.T @ X / (4 * len(X)) + l2 * identity)
    inverse = torch.linalg.solve_triangular(R.T, identity, upper=True)  # W = inverse U
    Z, penalty = X @ inverse, l2 * inverse.T @ inverse  # X W = Z U; l2 |W|^2 = U' penalty U
    U = torch.zeros(X.shape[1], share.shape[1], target.shape[1], dtype=X.dtype)

    def loss() -> Tensor:
        log_p = torch.einsum("nd,dfc->nfc", Z, U).log_softmax(-1)
        decay = torch.einsum("de,efc->dfc", penalty, U)
        error = (log_p.exp() - target[:, None]) * share[:, :, None]
        U.grad = torch.einsum("nd,nfc->dfc", Z, error) + decay
        return (U * decay).sum() / 2 - (log_p * target[:, None] * share[:, :, None]).sum()

    settings = {"max_iter": 2000, "history_size": 20, "line_search_fn": "strong_wolfe"}
    torch.optim.LBFGS([U], tolerance_grad=1e-6, tolerance_change=0, **settings).step(loss)
    return torch.einsum("de,efc->dfc", inverse, U)


PROTOCOLS: dict[str, Callable] = {"lbfgs": fit_lbfgs, "senteval": fit_senteval}


def stratified_folds(labels: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """k times (other items, the fold's items), classes spread evenly, as in scikit-learn."""
    _, first, kind = np.unique(labels, return_index=True, return_inverse=True)
    kind = np.argsort(np.argsort(first))[kind]  # classes in order of appearance
    rng, fold, in_order = np.random.RandomState(SEED), np.empty(len(kind), int), np.sort(kind)
    for c in range(len(first)):
        folds = np.repeat(np.arange(k), [np.sum(in_order[i::k] == c) for i in range(k)])
        rng.shuffle(folds)
        fold[kind == c] = folds
    return [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(k)]


def evaluate(task: Task, X: Tensor, fit: Callable, mode: Mode) -> tuple[float, float]:
    """Accuracy x 100 in validation and test.

    Test items are the test split, or each fold in turn. The weight of the penalty is selected on
    the development split, or by cross-validation within the training items.
    """
    y, labels = torch.from_numpy(task.labels), task.labels
    classes = int(y.max()) + 1
    parts = np.split(np.arange(len(y)), np.cumsum(task.splits)[:-1])
    outer = [(parts[0], parts[-1])] if len(parts) > 1 else stratified_folds(labels, mode.folds)
    if len(parts) == 3:
        inner = final = [(parts[0], parts[1])]
    else:
        final = [(train, None) for train, _ in outer]
        folds = [(train, stratified_folds(labels[train], mode.folds)) for train, _ in outer]
        inner = [(train[a], train[b]) for train, pairs in folds for a, b in pairs]
    _, scores = fit(X, y, classes, inner, np.tile(L2, (len(inner), 1)), mode)
    scores = scores.reshape(len(outer), -1, len(L2)).mean(1)
    scores = np.round(100 * scores, 2)  # as SentEval; of equal scores the smallest penalty wins
    weights, _ = fit(X, y, classes, final, L2[scores.argmax(1)][:, None], mode)
    tests = np.round(100 * accuracies(X, y, weights, [test for _, test in outer]), 2)
    return np.round(scores.max(1).mean(), 2), np.round(tests.mean(), 2)


def main() -> None:
    parser = Parser("python -m lab.transfer", description="Score seven tasks", allow_abbrev=False)
    add_model_flags(parser, POOLINGS)
    parser.add_argument("--tasks", type=comma_list(TASKS), default=TASKS, help=", ".join(TASKS))
    parser.add_argument("--protocol", choices=PROTOCOLS, default="lbfgs", help="(default: lbfgs)")
    parser.add_argument("--mode", choices=MODES, default="test", help="(default: test: 10 folds)")
    args = parser.parse_args()
    tasks, rows, reports = load_sets(args.tasks, load_task, find_senteval(args.data)), {}, []
    for model, pooling, encoder in load_encoders(args):
        label, dev, test = f"{model} ({pooling})", {}, {}
        sides = [side for task in tasks.values() for side in task.sentences]
        sentences = list(dict.fromkeys(s for side in sides for s in side))
        vectors = dict(zip(sentences, encoder(sentences)))
        if not np.isfinite(list(vectors.values())).all():
            raise UserError(f"{model}: its embeddings are NaN or infinite (did training diverge?)")
        for name, task in tasks.items():
            X = features(task, vectors)
            dev[name], test[name] = evaluate(task, X, PROTOCOLS[args.protocol], MODES[args.mode])
            done = f"{label}, {name}: dev {dev[name]:.2f}, test {test[name]:.2f}"
            print(done, file=sys.stderr, flush=True)
        rows |= {label: test, f"{label}, dev": dev}
        report = {"model": model, "pooler": pooling, "amp": args.amp, "protocol": args.protocol}
        report |= {"mode": args.mode, **test, "average": average(test, TASKS)}
        reports.append(report | {"dev": {**dev, "average": average(dev, TASKS)}})
    print(format_table(rows, TASKS))
    if args.json:
        write_atomically(args.json, "".join(json.dumps(report) + "\n" for report in reports))


if __name__ == "__main__":
    run_main(main)
