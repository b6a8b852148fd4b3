"""lab/transfer.py: both protocols against scikit-learn and plain torch, data files, the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from engine.errors import UserError
from lab import transfer
from lab.transfer import L2, MODES, Mode, Task

SMALL = ROOT / "assets" / "small-bert"

# ----------------------------------------------------------- SentEval's protocol, one fit at a time


def plain_fit(X, y, classes, l2, mode, dev=None):
    """SentEval's classifier with torch's own layer, loss and weight decay. -> accuracy, predict"""
    np.random.seed(1111)
    torch.manual_seed(1111)
    layer = torch.nn.Linear(X.shape[1], classes).double()
    optimizer = getattr(torch.optim, mode.optimizer)(layer.parameters(), weight_decay=l2)
    if dev is None:
        order, cut = np.random.permutation(len(X)), int(0.05 * len(X))
        dev, X, y = (X[order[:cut]], y[order[:cut]]), X[order[cut:]], y[order[cut:]]
    best, count, epoch, going = (-1.0, None), 0, 0, True
    while going and epoch <= 200:
        for _ in range(mode.epochs):
            order = np.random.permutation(len(X))
            for start in range(0, len(X), mode.batch):
                rows = order[start : start + mode.batch]
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(layer(X[rows]), y[rows]).backward()
                optimizer.step()
        epoch += mode.epochs
        accuracy = (layer(dev[0]).argmax(1) == dev[1]).double().mean().item()
        if accuracy > best[0]:
            best = accuracy, {name: value.clone() for name, value in layer.state_dict().items()}
        else:
            going = count < mode.patience
            count += 1
    return best[0], lambda Z: (Z @ best[1]["weight"].T + best[1]["bias"]).argmax(1)


def plain_evaluate(task: Task, X: torch.Tensor, mode: Mode):
    """As transfer.evaluate; X without the constant."""
    y, bounds = torch.from_numpy(task.labels), np.cumsum([0, *task.splits])
    classes = int(y.max()) + 1

    def folds(labels):
        splitter = StratifiedKFold(mode.folds, shuffle=True, random_state=1111)
        return list(splitter.split(np.zeros(len(labels)), labels))

    if len(task.splits) == 1:
        outer = folds(y)
    else:
        outer = [(np.arange(task.splits[0]), np.arange(bounds[-2], bounds[-1]))]
    devs, tests = [], []
    for train, test in outer:
        if len(task.splits) == 3:
            dev = np.arange(bounds[1], bounds[2])
            pairs, validation = [(train, dev)], (X[dev], y[dev])
        else:
            pairs, validation = [(train[a], train[b]) for a, b in folds(y[train])], None
        scores = [
            [plain_fit(X[a], y[a], classes, l2, mode, (X[b], y[b]))[0] for a, b in pairs]
            for l2 in transfer.L2
        ]
        scores = [round(100 * np.mean(row), 2) for row in scores]
        l2 = transfer.L2[int(np.argmax(scores))]
        predicted = plain_fit(X[train], y[train], classes, l2, mode, validation)[1](X[test])
        devs.append(max(scores))
        tests.append(round(100 * np.mean((predicted == y[test]).numpy()), 2))
    return round(np.mean(devs), 2), round(np.mean(tests), 2)


def made_task(seed: int, splits: list[int], classes: int) -> tuple[Task, torch.Tensor]:
    """Overlapping classes of different sizes; features of very different scales."""
    rng, weights = np.random.default_rng(seed), np.arange(1, classes + 1)
    labels = rng.choice(classes, size=sum(splits), p=weights / weights.sum())
    centres = rng.normal(size=(classes, 5))
    X = centres[labels] + 1.5 * rng.normal(size=(len(labels), 5))
    return Task([[]], labels, splits), torch.from_numpy(X * np.logspace(-1, 1, 5) + 3)


def with_constant(X: torch.Tensor) -> torch.Tensor:
    return torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)


QUICK = {"Adam": Mode(3, "Adam", 16, 2, 2), "RMSprop": Mode(4, "RMSprop", 32, 1, 1)}


@pytest.mark.parametrize("optimizer", QUICK)
@pytest.mark.parametrize(
    "splits, classes", [([203], 2), ([151], 3), ([170, 61], 4), ([180, 50, 70], 2)]
)
def test_senteval_protocol_equals_plain_torch(optimizer, splits, classes, monkeypatch):
    monkeypatch.setattr(transfer, "L2", np.array([3, 1e-5, 1e-2, 0.3]))  # the choice matters
    for seed in range(3):
        task, X = made_task(seed, splits, classes)
        ours = transfer.evaluate(task, with_constant(X), transfer.fit_senteval, QUICK[optimizer])
        assert ours == plain_evaluate(task, X, QUICK[optimizer])


def test_a_fit_stops_as_published_and_after_200_epochs_at_the_latest(monkeypatch):
    """Evaluations without gain are counted without reset; a stopped fit does not affect others."""
    task, X = made_task(5, [120], 2)
    folds, y = transfer.stratified_folds(task.labels, 4), torch.from_numpy(task.labels)
    steps, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (steps.append(1), step(self)))
    for settings in (("Adam", 30, 0, 1), ("Adam", 30, 10**6, 40), ("RMSprop", 30, 3, 7)):
        mode, grid = Mode(4, *settings), np.tile(L2, (4, 1))
        steps.clear()
        weights, best = transfer.fit_senteval(with_constant(X), y, 2, folds, grid, mode)
        if mode.epochs == 40:  # 240 epochs: at 200 it still goes on
            sizes = {len(train) for train, _ in folds}  # fits of a size are stepped together
            assert len(steps) == 240 * sum(math.ceil(size / 30) for size in sizes)
        for f, (train, dev) in enumerate(folds):
            for i, l2 in enumerate(L2):
                plain = plain_fit(X[train], y[train], 2, l2, mode, (X[dev], y[dev]))
                assert best[f, i] == pytest.approx(plain[0], abs=1e-12)
                assert torch.equal((with_constant(X) @ weights[f, :, i]).argmax(1), plain[1](X))


# --------------------------------------------------------------------------- the exact protocol


@pytest.mark.parametrize("classes", [2, 5])
def test_lbfgs_protocol_is_scikit_learns_logistic_regression(classes):
    task, X = made_task(7, [160], classes)
    X, y = with_constant(X), torch.from_numpy(task.labels)
    folds = transfer.stratified_folds(task.labels, 3)
    fits = [*folds, (folds[0][0], None)]  # the last without its own validation items
    weights, best = transfer.fit_lbfgs(X, y, classes, fits, np.tile(L2, (4, 1)), MODES["test"])
    for f, (train, dev) in enumerate(fits):
        if dev is None:  # 5 % of the training items
            order = train[np.random.RandomState(1111).permutation(len(train))]
            dev, train = order[: len(train) // 20], order[len(train) // 20 :]
        for i, l2 in enumerate(L2):
            # SentEval has weights for each of 2 classes: half the penalty of one logit's weights.
            C = 1 / (l2 * len(train)) * (2 if classes == 2 else 1)
            settings = {"fit_intercept": False, "tol": 1e-10, "max_iter": 100_000}
            peer = LogisticRegression(C=C, solver="newton-cg", **settings)
            peer.fit(X[train].numpy(), y[train].numpy())
            ours = (X @ weights[f, :, i]).softmax(1).numpy()
            np.testing.assert_allclose(ours, peer.predict_proba(X.numpy()), atol=1e-4)
            accuracy = (ours[dev].argmax(1) == task.labels[dev]).mean()
            assert best[f, i] == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize("k", [2, 5, 10])
def test_folds_are_scikit_learns(k):
    rng = np.random.default_rng(k)
    for classes in np.repeat((2, 3, 6), 20):
        more = rng.choice(classes, size=rng.integers(0, 300))
        labels = rng.permutation(np.concatenate([np.arange(classes).repeat(k), more]))
        theirs = StratifiedKFold(k, shuffle=True, random_state=1111).split(labels, labels)
        for ours, pair in zip(transfer.stratified_folds(labels, k), theirs, strict=True):
            assert [x.tolist() for x in ours] == [x.tolist() for x in pair]


# ---------------------------------------------------------------------------------------- files

TOY = {
    "CR/custrev.neg": "bad\nso bad\n",
    "CR/custrev.pos": "good\n\nvery  good\n",
    "SST/binary/sentiment-train": "fine film .\t1\nno \t0\n",
    "SST/binary/sentiment-dev": "a\t1\n",
    "SST/binary/sentiment-test": "\u2028b c\t0\n",
    "TREC/train_5500.label": "NUM:dist How far ?\nDESC:def What is caf\xe9 ?\n",
    "TREC/TREC_10.label": "ABBR:exp What ?\n",
    "MRPC/msr_paraphrase_train.txt": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t3\t4\t"a b c\td\r\n0\t3\t4\te\tf g\r\n',
    "MRPC/msr_paraphrase_test.txt": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t3\t4\th\ti\n",
}
COUNTS = {"CR": (2, 3), "SST2": (2, 1, 1), "TREC": (2, 1), "MRPC": (2, 1), "MR": (1, 1)}


def set_counts(monkeypatch, counts: dict[str, tuple[int, ...]]) -> None:
    changed = {name: dict(zip(transfer.FILES[name], counts[name])) for name in counts}
    monkeypatch.setattr(transfer, "FILES", transfer.FILES | changed)


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    set_counts(monkeypatch, COUNTS)
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode("latin-1" if "TREC" in name else "utf-8"))
    return tmp_path


def test_files_are_read_and_sorted_as_in_senteval(toy):
    """Sorted by numbers of words, then label. An empty line is an item."""
    for name, expected in {
        "CR": ([["", "bad", "good", "so bad", "very good"]], [1, 0, 1, 0, 1], [5]),
        "SST2": ([["no", "fine film .", "a", "b c"]], [0, 1, 1, 0], [2, 1, 1]),
        "TREC": ([["How far ?", "What is caf\xe9 ?", "What ?"]], [5, 1, 0], [2, 1]),
        "MRPC": ([["e", '"a b c', "h"], ["f g", "d", "i"]], [0, 1, 1], [2, 1]),
    }.items():
        task = transfer.load_task(name, toy)
        assert (task.sentences, task.labels.tolist(), task.splits) == expected


@pytest.mark.parametrize(
    "name, file, old, new, message",
    [
        ("CR", "CR/custrev.neg", "bad\nso bad", "bad", "custrev.neg: 1 items, published are 2"),
        ("SST2", "SST/binary/sentiment-train", "no \t0", "no \t2", "sentiment-train line 2: not a"),
        ("SST2", "SST/binary/sentiment-dev", "a\t1", "a 1", "sentiment-dev line 1: not a line of"),
        ("SST2", "SST/binary/sentiment-test", "b c", "\udce9", "sentiment-test line 1: not UTF-8"),
        ("TREC", "TREC/train_5500.label", "DESC:", "DESK:", "line 2: not a line of TREC: 'DESK:"),
        ("TREC", "TREC/train_5500.label", "NUM:dist", "NUM", "train_5500.label line 1: not a line"),
        ("MRPC", "MRPC/msr_paraphrase_test.txt", "h\ti", "h", "paraphrase_test.txt line 2: not a"),
        ("MRPC", "MRPC/msr_paraphrase_test.txt", "1\t3\t4\th\ti\n", "", "0 items, published are 1"),
        ("MR", None, "", "", "rt-polarity.neg is missing"),
    ],
)
def test_damaged_tasks_are_user_errors_that_name_the_line(toy, name, file, old, new, message):
    if file:
        content = (toy / file).read_bytes().decode("latin-1")
        assert content.count(old) == 1
        (toy / file).write_bytes(content.replace(old, new).encode("latin-1", "surrogateescape"))
    with pytest.raises(UserError) as error:
        transfer.load_task(name, toy)
    assert message in one_line(error) and str(toy) in one_line(error)


def test_features_of_sentences_and_of_pairs():
    vectors, labels = {"a": np.float32([1, 2]), "b": np.float32([3, -1])}, np.array([0, 1])
    single, pair = Task([["a", "b"]], labels, [2]), Task([["a"], ["b"]], labels[:1], [1])
    assert transfer.features(single, vectors).tolist() == [[1, 2, 1], [3, -1, 1]]
    assert transfer.features(pair, vectors).tolist() == [[2, 3, 3, -2, 1]]


# ---------------------------------------------------------------------------------- the command


@pytest.fixture
def counted(tmp_path, monkeypatch) -> Path:
    """CR and TREC with enough random sentences for ten folds."""
    rng = np.random.default_rng(3)

    def sentences(kind, count):
        words = f"{kind} film a the very".split()
        return [" ".join(rng.choice(words, size=rng.integers(1, 7))) for _ in range(count)]

    questions = [f"NUM:x {s}" for s in sentences("good nice", 50)]
    for name, lines in {
        "CR/custrev.pos": sentences("good nice", 60),
        "CR/custrev.neg": sentences("bad dull", 50),
        "TREC/train_5500.label": questions[:30] + [f"LOC:x {s}" for s in sentences("bad dull", 30)],
        "TREC/TREC_10.label": questions[30:],
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    (tmp_path / "STS").mkdir()
    set_counts(monkeypatch, {"CR": (50, 60), "TREC": (60, 20)})
    return tmp_path


@pytest.mark.parametrize("protocol", transfer.PROTOCOLS)
def test_command_prints_a_table_and_names_missing_tasks(counted, command, protocol):
    report, options = counted / "report.json", ("--mode", "fast", "--tasks", "MR,CR,TREC")
    settings = ("--data", counted, "--protocol", protocol, "--json", report)
    done = command(transfer.main, SMALL, *settings, *options)
    row, lines = json.loads(report.read_text()), done.out.splitlines()
    assert done.code == 0 and "MR is left out" in done.err and "rt-polarity" in done.err
    assert lines[0].split() == [*transfer.TASKS, "Avg."]
    assert lines[-1].startswith("Avg. is of CR, TREC only")
    assert row["average"] == np.round((row["CR"] + row["TREC"]) / 2, 2) and "MR" not in row
    assert row["CR"] > 70 and row["protocol"] == protocol and row["amp"] == "off"
    assert f"{row['CR']:8.2f}" in lines[1] and f"{row['dev']['TREC']:8.2f}" in lines[2]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", ""], "'' is unknown; choose from MR, CR"),
        (["--tasks", "MRR"], "'MRR' is unknown"),
        (["--tasks", "MR"], "has none of the sets"),
        (["--data", "/no/such"], "no folder STS"),
        (["--tasks", "CR"], "a model: its embeddings are NaN or infinite"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(counted, monkeypatch, command, options, message):
    broken = [("a model", "cls", lambda sentences: np.full((len(sentences), 3), np.nan))]
    monkeypatch.setattr(transfer, "load_encoders", lambda args: broken)
    done = command(transfer.main, SMALL, "--data", counted, *options)
    assert done.code == 2 and message in done.err and done.out == ""
    assert "Traceback" not in done.err


# ---------------------------------------------------------------------- real data, if available


def test_every_real_task_has_its_published_size(senteval):
    tasks = {name: transfer.load_task(name, senteval) for name in transfer.TASKS}
    sizes = {"MR": [10662], "CR": [3775], "SUBJ": [10000], "MPQA": [10606]}
    sizes |= {"SST2": [67349, 872, 1821], "TREC": [5452, 500], "MRPC": [4076, 1725]}
    assert {name: task.splits for name, task in tasks.items()} == sizes
    for task in tasks.values():
        assert all(len(side) == len(task.labels) == sum(task.splits) for side in task.sentences)
