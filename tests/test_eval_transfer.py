"""eval_transfer.py: both protocols against scikit-learn and plain torch, SentEval's files good and bad, the command line."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold

import data
import eval_transfer
from bert import UserError
from eval_transfer import L2, MODES, Mode, Task

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"

# ------------------------------------------------------------------------------- SentEval's protocol, a second time


def peer_fit(X, y, classes, l2, mode, dev=None):
    """One classifier as SentEval trains it, with torch's own layer, loss, optimiser and weight decay. -> its best state."""
    np.random.seed(1111)
    torch.manual_seed(1111)
    layer = torch.nn.Linear(X.shape[1], classes).double()
    optimizer = {"Adam": torch.optim.Adam, "RMSprop": torch.optim.RMSprop}[mode.optimizer](layer.parameters(), weight_decay=l2)
    if dev is None:
        order = np.random.permutation(len(X))
        cut = int(0.05 * len(X))
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
            going = count < mode.tenacity
            count += 1
    return best[0], lambda Z: (Z @ best[1]["weight"].T + best[1]["bias"]).argmax(1)


def peer_evaluate(task: Task, X: torch.Tensor, mode: Mode):
    """Development and test accuracy, and the predictions; X without the constant."""
    y, bounds = torch.from_numpy(task.labels), np.cumsum([0, *task.splits])
    classes = int(y.max()) + 1

    def folds(labels):
        return list(StratifiedKFold(mode.folds, shuffle=True, random_state=1111).split(np.zeros(len(labels)), labels))

    def choose(train, pairs):
        scores = [round(100 * np.mean([peer_fit(X[a], y[a], classes, l2, mode, (X[b], y[b]))[0] for a, b in pairs(train)]), 2) for l2 in L2]
        return L2[int(np.argmax(scores))], max(scores)

    predicted = torch.full((len(y),), -1)
    if len(task.splits) == 1:
        outer = folds(y)
    else:
        outer = [(np.arange(task.splits[0]), np.arange(bounds[-2], bounds[-1]))]
    devs, tests = [], []
    for train, test in outer:
        if len(task.splits) == 3:
            dev = np.arange(bounds[1], bounds[2])
            l2, score = choose(train, lambda t: [(t, dev)])  # noqa: B023
            predict = peer_fit(X[train], y[train], classes, l2, mode, (X[dev], y[dev]))[1]
        else:
            l2, score = choose(train, lambda t: [(t[a], t[b]) for a, b in folds(y[t])])
            predict = peer_fit(X[train], y[train], classes, l2, mode)[1]
        predicted[test] = predict(X[test])
        devs.append(score)
        tests.append(round(100 * np.mean((predicted[test] == y[test]).numpy()), 2))
    return round(np.mean(devs), 2), round(np.mean(tests), 2), predicted.numpy()


def made(seed: int, splits: list[int], classes: int, width: int = 5, noise: float = 1.5) -> tuple[Task, torch.Tensor]:
    """Items of overlapping classes of uneven size; features of very different size."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, size=sum(splits), p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    centres = rng.normal(size=(classes, width))
    X = (centres[labels] + noise * rng.normal(size=(len(labels), width))) * np.logspace(-1, 1, width) + 3
    return Task([[]], labels, splits), torch.from_numpy(X)


def with_constant(X: torch.Tensor) -> torch.Tensor:
    return torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)


QUICK = {"Adam": Mode(3, "Adam", 16, 2, 2), "RMSprop": Mode(4, "RMSprop", 32, 1, 1)}


@pytest.mark.parametrize("optimizer", QUICK)
@pytest.mark.parametrize("splits, classes", [([203], 2), ([151], 3), ([170, 61], 4), ([180, 50, 70], 2)])
def test_senteval_protocol_equals_plain_torch_to_the_last_item(optimizer, splits, classes):
    for seed in range(2):
        task, X = made(seed, splits, classes)
        scores, predicted = eval_transfer.evaluate(task, with_constant(X), eval_transfer.fit_senteval, QUICK[optimizer])
        dev, test, peer = peer_evaluate(task, X, QUICK[optimizer])
        assert predicted.tolist() == peer.tolist()
        assert scores == {"dev": dev, "test": test}


def test_a_fit_stops_as_published_and_at_200_epochs_at_the_latest():
    """The count of looks without gain is never reset, and one fit's end leaves the others as they are."""
    task, X = made(5, [120], 2)
    folds = eval_transfer.stratified_folds(task.labels, 4)
    y, grid = torch.from_numpy(task.labels), np.tile(L2, (4, 1))
    for mode in (Mode(4, "Adam", 30, 0, 1), Mode(4, "Adam", 30, 10**6, 40), Mode(4, "RMSprop", 30, 3, 7)):
        weights, best = eval_transfer.fit_senteval(with_constant(X), y, 2, folds, grid, mode)
        for f, (train, dev) in enumerate(folds):
            for i, l2 in enumerate(L2):
                accuracy, predict = peer_fit(X[train], y[train], 2, l2, mode, (X[dev], y[dev]))
                assert best[f, i] == pytest.approx(accuracy, abs=1e-12)
                assert torch.equal((with_constant(X) @ weights[f, :, i]).argmax(1), predict(X))


# ----------------------------------------------------------------------------------------------- the exact protocol


@pytest.mark.parametrize("classes", [2, 5])
def test_lbfgs_protocol_is_scikit_learns_logistic_regression(classes):
    task, X = made(7, [160], classes)
    X, y = with_constant(X), torch.from_numpy(task.labels)
    folds = eval_transfer.stratified_folds(task.labels, 3)
    weights, best = eval_transfer.fit_lbfgs(X, y, classes, folds, np.tile(L2, (3, 1)), MODES["test"])
    for f, (train, dev) in enumerate(folds):
        for i, l2 in enumerate(L2):
            # SentEval's softmax has a vector for each class, also of two: half of the penalty of one logit's vector each.
            C = 1 / (l2 * len(train)) * (2 if classes == 2 else 1)
            peer = LogisticRegression(C=C, fit_intercept=False, tol=1e-10, max_iter=100_000, solver="newton-cg").fit(X[train].numpy(), y[train].numpy())
            ours = (X @ weights[f, :, i]).softmax(1).numpy()
            np.testing.assert_allclose(ours, peer.predict_proba(X.numpy()), atol=1e-4)
            assert best[f, i] == pytest.approx((ours[dev].argmax(1) == task.labels[dev]).mean(), abs=1e-12)


def test_lbfgs_protocol_evaluates_like_nested_scikit_learn():
    task, X = made(9, [150], 2)
    X, mode = with_constant(X), Mode(3, "Adam", 16, 2, 2)
    scores, predicted = eval_transfer.evaluate(task, X, eval_transfer.fit_lbfgs, mode)
    folds = StratifiedKFold(3, shuffle=True, random_state=1111)

    def fitted(train, l2):
        return LogisticRegression(C=2 / (l2 * len(train)), fit_intercept=False, tol=1e-10, max_iter=100_000).fit(X[train], task.labels[train])

    devs, tests = [], []
    for train, test in folds.split(X, task.labels):
        pairs = [(train[a], train[b]) for a, b in folds.split(X[train], task.labels[train])]
        means = [round(100 * np.mean([fitted(a, l2).score(X[b], task.labels[b]) for a, b in pairs]), 2) for l2 in L2]
        order = np.random.RandomState(1111).permutation(len(train))  # the items that senteval stops by train here neither
        model = fitted(train[order[len(train) // 20 :]], L2[int(np.argmax(means))])
        assert predicted[test].tolist() == model.predict(X[test]).tolist()
        devs.append(max(means))
        tests.append(round(100 * model.score(X[test], task.labels[test]), 2))
    assert scores == {"dev": pytest.approx(np.mean(devs), abs=0.005), "test": pytest.approx(np.mean(tests), abs=0.005)}


# ------------------------------------------------------------------------------------------------------------ folds


@pytest.mark.parametrize("k", [2, 5, 10])
def test_folds_are_scikit_learns(k):
    rng = np.random.default_rng(k)
    for classes in (2, 3, 6):
        for _ in range(20):
            labels = np.concatenate([np.arange(classes).repeat(k), rng.choice(classes, size=rng.integers(0, 300))])
            rng.shuffle(labels)
            theirs = StratifiedKFold(k, shuffle=True, random_state=1111).split(labels, labels)
            for (train, test), (a, b) in zip(eval_transfer.stratified_folds(labels, k), theirs, strict=True):
                assert train.tolist() == a.tolist() and test.tolist() == b.tolist()


def test_too_few_items_of_a_class_for_the_folds_is_a_user_error():
    with pytest.raises(UserError, match="3 folds, but a class has only 2 items"):
        eval_transfer.stratified_folds(np.array([0, 0, 0, 0, 1, 1]), 3)


def test_f1_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(2, size=(2, 500))
    scored = np.where(np.arange(500) < 300, predicted, -1)  # the others are training items
    assert eval_transfer.f1(labels, scored) == pytest.approx(100 * f1_score(labels[:300], predicted[:300]), abs=1e-12)
    assert eval_transfer.f1(np.zeros(4, int), np.zeros(4, int)) == 0


# ------------------------------------------------------------------------------------------------------------ files

TOY = {  # every form of file, small; counts beside them
    "CR/custrev.pos": "good\n\nvery  good\n", "CR/custrev.neg": "bad\nso bad\n",
    "SST/binary/sentiment-train": "fine film .\t1\nno \t0\n", "SST/binary/sentiment-dev": "a\t1\n", "SST/binary/sentiment-test": "\u2028b c\t0\n",
    "TREC/train_5500.label": "NUM:dist How far ?\nDESC:def What is caf\xe9 ?\n", "TREC/TREC_10.label": "ABBR:exp What ?\n",
    "MRPC/msr_paraphrase_train.txt": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t3\t4\t"a b c\td\r\n0\t3\t4\te\tf g\r\n',
    "MRPC/msr_paraphrase_test.txt": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t3\t4\th\ti\n",
}  # fmt: skip
TOY_COUNTS = {"CR": (2, 3), "SST2": (2, 1, 1), "TREC": (2, 1), "MRPC": (2, 1), "MR": (1, 1)}


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(eval_transfer, "COUNTS", TOY_COUNTS)
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode("latin-1" if "TREC" in name else "utf-8"))
    return tmp_path


def test_files_are_read_and_sorted_as_senteval_does(toy):
    """By words, then label; an empty line is an item; words joined by one space; pairs by the words of both."""

    def load(name):
        task = eval_transfer.load_task(name, toy)
        return task.sentences, task.labels.tolist(), task.splits

    assert load("CR") == ([["", "bad", "good", "so bad", "very good"]], [1, 0, 1, 0, 1], [5])
    assert load("SST2") == ([["no", "fine film .", "a", "b c"]], [0, 1, 1, 0], [2, 1, 1])
    assert load("TREC") == ([["How far ?", "What is caf\xe9 ?", "What ?"]], [5, 1, 0], [2, 1])
    assert load("MRPC") == ([["e", '"a b c', "h"], ["f g", "d", "i"]], [0, 1, 1], [2, 1])


@pytest.mark.parametrize("name, file, old, new, says", [
    ("CR", "CR/custrev.neg", "bad\nso bad\n", "bad\n", "custrev.neg: 1 items, published are 2"),
    ("SST2", "SST/binary/sentiment-train", "no \t0", "no \t2", "sentiment-train line 2: not a sentence, a tab and 0 or 1"),
    ("SST2", "SST/binary/sentiment-dev", "a\t1", "a 1", "sentiment-dev line 1: not a sentence"),
    ("TREC", "TREC/train_5500.label", "DESC:def", "DESK:def", "train_5500.label line 2: 'DESK:def' is none of ABBR"),
    ("TREC", "TREC/train_5500.label", "NUM:dist", "NUM", "train_5500.label line 1: 'NUM'"),
    ("MRPC", "MRPC/msr_paraphrase_test.txt", "h\ti", "h", "msr_paraphrase_test.txt line 2: not 0 or 1, two numbers"),
    ("MRPC", "MRPC/msr_paraphrase_test.txt", "1\t3\t4\th\ti\n", "", "0 items, published are 1"),
    ("SST2", "SST/binary/sentiment-test", "b c", "\udce9", "sentiment-test: cannot be read"),
])  # fmt: skip
def test_damaged_tasks_are_user_errors_that_name_the_place(toy, name, file, old, new, says):
    text = (toy / file).read_bytes().decode("latin-1")
    assert text.count(old) == 1
    (toy / file).write_bytes(text.replace(old, new).encode("latin-1", "surrogateescape"))
    with pytest.raises(UserError) as error:
        eval_transfer.load_task(name, toy)
    assert says in str(error.value) and str(toy) in str(error.value) and "\n" not in str(error.value)


def test_features_of_sentences_and_of_pairs():
    vectors = {"a": np.array([1.0, 2.0], np.float32), "b": np.array([3.0, -1.0], np.float32)}
    assert eval_transfer.features(Task([["a", "b"]], np.array([0, 1]), [2]), vectors).tolist() == [[1, 2, 1], [3, -1, 1]]
    assert eval_transfer.features(Task([["a"], ["b"]], np.array([1]), [1]), vectors).tolist() == [[2, 3, 3, -2, 1]]


# ----------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def counted(tmp_path, monkeypatch) -> Path:
    """CR, TREC and MRPC of made sentences, of sizes that ten folds are possible with."""
    rng = np.random.default_rng(3)

    def sentences(count, words):
        return [" ".join(rng.choice(words.split(), size=rng.integers(1, 7))) for _ in range(count)]

    good, bad = "good film a the nice very", "bad film a the dull very"
    files = {"CR/custrev.pos": sentences(60, good), "CR/custrev.neg": sentences(50, bad),
             "TREC/train_5500.label": [f"{c}:x {s}" for c in ("NUM", "LOC") for s in sentences(30, good if c == "NUM" else bad)],
             "TREC/TREC_10.label": [f"NUM:x {s}" for s in sentences(20, good)]}  # fmt: skip
    for name, lines in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    (tmp_path / "STS").mkdir()
    monkeypatch.setattr(eval_transfer, "COUNTS", eval_transfer.COUNTS | {"CR": (50, 60), "TREC": (60, 20)})
    return tmp_path


@pytest.mark.parametrize("protocol", eval_transfer.PROTOCOLS)
def test_command_prints_a_table_and_says_what_is_missing(counted, monkeypatch, capsys, protocol):
    report = counted / "report.json"
    words = ["--data", str(counted), "--protocol", protocol, "--mode", "fast", "--json", str(report), "--tasks", "MR,CR,TREC"]
    monkeypatch.setattr(sys, "argv", ["eval_transfer.py", str(SMALL), *words])
    eval_transfer.main()
    captured, row = capsys.readouterr(), json.loads(report.read_text())
    assert "MR is left out" in captured.err and "rt-polarity" in captured.err and captured.out.splitlines()[0].split() == [*eval_transfer.TASKS, "Avg."]
    assert captured.out.splitlines()[-1].startswith("Avg. is of CR, TREC only")
    assert "MR" not in row and row["average"] == round((row["CR"] + row["TREC"]) / 2, 2) and row["CR"] > 70 and row["protocol"] == protocol
    assert f"{row['CR']:8.2f}" in captured.out and f"{row['dev']['TREC']:8.2f}" in captured.out


@pytest.mark.parametrize("options, says", [
    (["--tasks", ""], "'' is unknown; known are MR, CR"), (["--tasks", "MRR"], "'MRR' is unknown"), (["--pooler", "men"], "'men' is unknown"),
    (["--batch-size", "0"], "at least 1"), (["--tasks", "MR"], "holds none of the sets"), (["--data", "/no/such"], "no folder STS"),
])  # fmt: skip
def test_bad_options_exit_2(counted, monkeypatch, capsys, options, says):
    monkeypatch.setattr(sys, "argv", ["eval_transfer.py", str(SMALL), "--data", str(counted), *options])
    with pytest.raises(SystemExit) as exit:
        data.run_main(eval_transfer.main)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and says in captured.err and captured.out == "" and "Traceback" not in captured.err


def test_vectors_with_nan_are_a_user_error(counted, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_transfer.py", str(SMALL), "--data", str(counted), "--tasks", "CR"])
    monkeypatch.setattr(eval_transfer, "encode", lambda bert, tokenizer, sentences, *_: np.full((len(sentences), 3), np.nan))
    with pytest.raises(UserError, match="NaN or infinity"):
        eval_transfer.main()


def test_help_runs_as_a_command():
    done = subprocess.run([sys.executable, str(ROOT / "eval_transfer.py"), "-h"], capture_output=True, text=True)
    assert done.returncode == 0 and "--protocol" in done.stdout


# ----------------------------------------------------------------------------------------------- real data, if here


def test_every_real_task_has_its_published_size(senteval):
    tasks = {name: eval_transfer.load_task(name, senteval) for name in eval_transfer.TASKS}
    assert {name: task.splits for name, task in tasks.items()} == {
        "MR": [10662], "CR": [3775], "SUBJ": [10000], "MPQA": [10606], "SST2": [67349, 872, 1821], "TREC": [5452, 500], "MRPC": [4076, 1725]}  # fmt: skip
    assert all(len(side) == len(task.labels) == sum(task.splits) for task in tasks.values() for side in task.sentences)


def test_subj_cut_to_20_lines_is_refused(senteval, tmp_path):
    """The archive of before September 2021, with which SUBJ is near 99.6."""
    (tmp_path / "SUBJ").mkdir()
    for name in ("subj.objective", "subj.subjective"):
        lines = (senteval / "SUBJ" / name).read_text("latin-1").split("\n")
        (tmp_path / "SUBJ" / name).write_text("\n".join(lines[: 20 if name == "subj.subjective" else None]) + "\n" * (name == "subj.subjective"), "latin-1")
    with pytest.raises(UserError, match="subj.subjective: 20 items, published are 5000"):
        eval_transfer.load_task("SUBJ", tmp_path)


def compare(model: str, folder: str, mode: str, tasks: str = ",".join(eval_transfer.TASKS)) -> None:
    """Tasks of a real model by our protocols and by the peer above: a line of JSON each. All seven take an hour on one core.

    PYTHONPATH=. python tests/test_eval_transfer.py assets/small-bert DIR test
    """
    bert, tokenizer, *_ = eval_transfer.open_model(model)
    for name in tasks.split(","):
        task = eval_transfer.load_task(name, data.find_senteval(folder))
        unique = list(dict.fromkeys(s for side in task.sentences for s in side))
        X = eval_transfer.features(task, dict(zip(unique, eval_transfer.encode(bert, tokenizer, unique))))
        row, predictions = {"model": model, "mode": mode, "task": name}, {}
        for protocol, fit in eval_transfer.PROTOCOLS.items():
            started = time.perf_counter()
            scores, predictions[protocol] = eval_transfer.evaluate(task, X, fit, MODES[mode])
            row[protocol] = {**scores, "seconds": round(time.perf_counter() - started, 1)}
        started = time.perf_counter()
        dev, test, predicted = peer_evaluate(task, X[:, :-1], MODES[mode])
        row["peer"] = {"dev": float(dev), "test": float(test), "seconds": round(time.perf_counter() - started, 1)}
        row |= {"test_items": int((predicted >= 0).sum()), "differ_from_peer": int((predicted != predictions["senteval"]).sum())}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    compare(*sys.argv[1:])
