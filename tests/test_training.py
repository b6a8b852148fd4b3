"""Whole runs: results, model families, the loop, odd and bad input."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, VOCABULARY, make_model, one_line, random_pair, read_log

import bert
import diffcse
import embed
import eval_sts
from engine import demo
from engine import run as runs
from engine.errors import UserError

SMALL = str(ROOT / "assets" / "small-bert")

# ------------------------------------------------------------------------------------------------
# Results


def test_a_run_from_its_first_log_line_to_its_results(train_tiny, tmp_path, capsys):
    results, out = train_tiny(), tmp_path / "out"
    assert results == json.loads((out / "results.json").read_text())
    names = {*eval_sts.TEST_SETS, "STSB-dev", "average"}
    assert all({*results[k]} == names for k in ("before", "after", "before_first_last"))
    log = read_log(out)
    scored = [row for row in log if "score" in row]
    assert [row["step"] for row in scored] == [0, 2, 4, 5]
    assert all(row["score"] == row["STSB-dev"] for row in scored)
    best = max(scored[1:], key=lambda row: row["score"])  # the first of equals
    assert (results["best_step"], results["dev_best"]) == (best["step"], best["score"])
    assert results["after"]["STSB-dev"] == results["dev_best"]
    assert results["before"]["STSB-dev"] == results["dev_before"] == log[0]["score"]
    assert (results["precision"], results["fast"], results["compile"]) == ("fp32", True, False)

    gaps = {row["step"]: row["h_gap"] for row in log if "h_gap" in row}
    assert [*gaps] == [2, 4, 5] and gaps[5] == results["h_gap"] and 0 not in gaps.values()

    row = log[1]
    assert row["loss"] == pytest.approx(row["contrastive"] + 0.05 * row["difference"], abs=1e-5)
    assert row["positive_cosine"] < 0.999  # dropout makes the two views differ
    assert json.loads((out / "config.json").read_text())["lam"] == 0.05
    table = capsys.readouterr().out
    assert "before, first-last average" in table and f"step {best['step']} is in {out}" in table

    model = embed.DiffCSE(str(out / "best"), device="cpu")
    sets = {name: eval_sts.load_set(name, tmp_path / "senteval") for name in ("STS12", "SICKR")}
    scores = eval_sts.score_pairs(lambda s: model.encode(s, return_numpy=True), sets)
    assert scores == pytest.approx({name: results["after"][name] for name in sets}, abs=1e-6)
    assert not list(out.rglob("*.tmp"))


def test_only_a_strictly_better_model_is_kept(train_tiny, tmp_path, monkeypatch, capsys):
    values = iter([7.0, 5.0, 5.0, 4.0])  # before training; then steps 2, 4 and 5
    monkeypatch.setattr(eval_sts.Score, "dev", lambda self, encoder: {"score": next(values)})
    results = train_tiny()
    scores = results["dev_before"], results["dev_best"], results["best_step"]
    assert scores == (7.0, 5.0, 2)
    printed = capsys.readouterr().out
    assert printed.count("5.00 (best so far, below step 0)") == 1
    assert "no step scored above the initial model" in printed


def test_the_demo_shows_its_baseline_and_nearest_sentences(tiny, tmp_path, command):
    pairs = "a\tb\tscore\nthe cat\ta cat\t5\nthe dog\ta house\t1\nred tree\tblue tree\t3\n"
    (tmp_path / "pairs.tsv").write_text(pairs)
    files = ["--model", tiny, "--generator", tiny, "--train-file", tiny / "text.txt"]
    files += ["--score", tmp_path / "pairs.tsv", "--out-dir", tmp_path / "out"]
    steps = ["--steps", "2", "--batch-size", "8", "--device", "cpu", "--amp", "off"]
    done = command(diffcse.main, "--config", "demo", *files, *steps)
    assert done.code == 0, done.err
    runs = [json.loads((tmp_path / f / "results.json").read_text()) for f in ("out", "out-simcse")]
    rows = {"first-last": runs[0]["before_first_last"], "before)": runs[0]["before"]}
    rows |= {"SimCSE": runs[1]["after"], "DiffCSE": runs[0]["after"]}
    table = done.out[done.out.index("Spearman x 100 on the test pairs") :]
    for name, scores in rows.items():
        (line,) = [line for line in table.splitlines() if name in line]
        assert line.split()[-1] == f"{scores['pairs.tsv']:.2f}"
    for folder, label in ((tiny, "before"), (tmp_path / "out", "after")):
        model = embed.DiffCSE(folder, device="cpu")
        model.build_index(tiny / "text.txt")
        for query in demo.QUERIES:
            for sentence, cosine in model.search(query, threshold=-1, top_k=demo.TOP_K):
                assert f"  {label:<7}{cosine:.2f}  {sentence}" in table


def test_score_dev_never_opens_the_test_sets(train_tiny, tmp_path):
    """Only STS-B dev is needed: not SICK-R dev either."""
    for path in (tmp_path / "senteval").rglob("*"):
        if path.is_file() and path.name != "sts-dev.csv":
            path.unlink()
    results = train_tiny(score="dev")
    assert set(results["before"]) == set(results["after"]) == {"STSB-dev"}


def test_the_length_that_is_saved_with_the_model(train_tiny, tmp_path, monkeypatch):
    """The usual one, or that of training if it is larger: at most the model's 40 positions."""
    for usual, trained, saved in ((128, 32, 40), (20, 32, 32), (20, 10, 20)):
        monkeypatch.setattr(runs, "MAX_LENGTH", usual)
        out = str(tmp_path / f"{usual}-{trained}")
        train_tiny(max_length=trained, steps=1, out_dir=out)
        assert embed.DiffCSE(out, device="cpu").max_length == saved


@pytest.mark.parametrize(
    "case", ["bert distilbert cls", "roberta roberta cls", "distilbert bert cls_before_pooler"]
)
def test_every_family_trains(train_tiny, tmp_path, case):
    """The generator is of another family if the vocabulary allows it. RoBERTa counts positions."""
    pytest.importorskip("transformers")
    family, generator, pooling = case.split()
    vocabulary = ["<unused>", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *VOCABULARY[5:]]
    folders = {"model": str(tmp_path / "model"), "generator": str(tmp_path / "generator")}
    for name, (kind, folder) in zip((family, generator), folders.items()):
        random_pair(name, kind == "generator", Path(folder))
        (Path(folder) / "vocab.txt").write_text("\n".join(vocabulary))
        config = '{"tokenizer_class": "BertTokenizer"}'
        (Path(folder) / "tokenizer_config.json").write_text(config)
    assert train_tiny(**folders, pooling=pooling)["best_step"] > 0
    model = embed.DiffCSE(str(tmp_path / "out"), device="cpu")
    assert (model.bert.cfg.model_type, model.pooler) == (family, pooling)


# ------------------------------------------------------------------------------------------------
# The loop


def test_the_loop_takes_every_sentence_once_per_epoch_at_a_falling_rate(
    train_tiny, tmp_path, monkeypatch
):
    steps, train_step = [], diffcse.train_step

    def spy(model, optimizer, scaler, amp, batch):
        before = [t.clone() for t in batch.tensors()]
        metrics = train_step(model, optimizer, scaler, amp, batch)
        assert all(map(torch.equal, before, batch.tensors()))  # x is never changed
        sentences = [tuple(x[mask].tolist()) for x, mask in zip(batch.x, batch.mask)]
        steps.append((optimizer.param_groups[0]["lr"], metrics, sentences))
        return metrics

    monkeypatch.setattr(diffcse, "train_step", spy)
    train_tiny(steps=None, epochs=2, eval_every=100, log_every=2, seed=7)
    rates, metrics, sentences = zip(*steps)
    assert rates == pytest.approx([1e-2 * (6 - t) / 6 for t in range(6)])
    # 33 sentences in 2 views; the short last batch is kept, even with one sentence
    assert [*map(len, sentences)] == [32, 32, 2] * 2
    first, second = sum(sentences[:3], []), sum(sentences[3:], [])
    assert sorted(first) == sorted(second) and first != second  # each once, in another order
    rows = [row for row in read_log(tmp_path / "out") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    for row, since in zip(rows, (metrics[:1], metrics[1:2], metrics[2:4], metrics[4:])):
        assert row["lr"] == pytest.approx(rates[row["step"] - 1])
        for name in since[0]:  # the sums over steps divided by the counts
            total, count = (sum(float(m[name][i]) for m in since) for i in (0, 1))
            assert row[name] == pytest.approx(total / count, abs=1e-5)


def test_another_seed_changes_training_and_evaluating_more_often_does_not(train_tiny, tmp_path):
    losses = []
    for changes in ({}, {"eval_every": 1}, {"seed": 4}):
        folder = tmp_path / str(changes)
        train_tiny(out_dir=str(folder), edit="sample", **changes)
        losses.append([row["loss"] for row in read_log(folder) if "loss" in row])
    assert losses[0] == losses[1] != losses[2] and len(losses[0]) == 5


def test_bf16_on_a_cpu(train_tiny, tmp_path):
    train_tiny()
    results = train_tiny(amp="bf16", out_dir=str(tmp_path / "half"))
    full, half = (read_log(tmp_path / name)[1]["loss"] for name in ("out", "half"))
    assert full != half == pytest.approx(full, rel=0.05)  # same weights and dropout
    state = bert.load_bert(tmp_path / "half" / "best").state_dict()
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert results["precision"] == "bfloat16"


# ------------------------------------------------------------------------------------------------
# Odd and bad input


@pytest.mark.parametrize(
    "name, content, changes",
    [
        ("pairs.csv", "a,b\n" + "the dog,a dog\na red tree,a tree\n" * 20, {"views": "first"}),
        ("triples.csv", "a,b,c\n" + "the dog,a dog,\n" * 40, {"hard_negative_weight": 1.0}),
        # Shorter than a batch, empty lines, ten thousand words, no final newline
        ("odd.txt", "\n\nthe dog\n" + "big " * 10_000 + "\n\na cat", {}),
    ],
    ids=["pairs", "triples", "odd"],
)
def test_train_files_of_every_kind(train_tiny, tmp_path, capsys, name, content, changes):
    (tmp_path / name).write_text(content)
    assert train_tiny(train_file=str(tmp_path / name), **changes)["best_step"] > 0
    note = "6 sentences, fewer than --batch-size 16"
    assert (note in capsys.readouterr().err) == (name == "odd.txt")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "no/such/model"}, "no/such/model: no such model folder"),
        ({"model": "FEW_ROWS"}, "; the model has "),
        ({"generator": "FEW_ROWS"}, "FEW_ROWS has 22 words and 40 positions; at least 23 and 32"),
        ({"generator": SMALL}, "another vocabulary"),
        ({"max_length": 41}, "--max-length is above the 40 positions of "),
        ({"pooling": "cls"}, "pooler"),
        ({"train_file": "ONE.txt"}, "1 sentences; at least 2"),
        ({"hard_negative_weight": 1.0}, "--hard-negative-weight needs .*3 columns"),
        ({"out_dir": "A_FILE"}, "cannot create .*A_FILE"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(train_tiny, tmp_path, changes, message):
    make_model(tmp_path / "FEW_ROWS", vocab_size=len(VOCABULARY) - 1)
    (tmp_path / "A_FILE").write_text("mine")
    (tmp_path / "ONE.txt").write_text("one\n")
    paths = {path.name: str(path) for path in tmp_path.iterdir()}
    changes = {key: paths.get(value, value) for key, value in changes.items()}
    with pytest.raises((UserError, bert.ModelError), match=message) as error:
        train_tiny(**changes)
    assert one_line(error)
    assert not (tmp_path / "out").exists() and (tmp_path / "A_FILE").read_text() == "mine"
