"""Whole runs: scored on STS sets, every model family, the loop, odd and bad input."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SPECIAL_WORDS,
    VOCABULARY,
    make_model,
    one_line,
    random_pair,
    random_sentences,
    read_log,
)

import bert
import diffcse
import embed
import eval_sts
from diffcse import PRESETS, Config
from engine import run as runs
from engine.cli import parse
from engine.errors import UserError

SMALL = str(ROOT / "assets" / "small-bert")


def spy_on_steps(monkeypatch) -> list[dict]:
    """Each step's model, optimizer, batch, rate, metrics, and gradient norm after clipping."""
    steps, train_step = [], diffcse.train_step

    def spy(model, optimizer, scaler, amp, batch):
        before = [t.clone() for t in batch.tensors()]
        metrics = train_step(model, optimizer, scaler, amp, batch)
        assert all(map(torch.equal, before, batch.tensors()))  # x is never changed
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        step = dict(model=model, optimizer=optimizer, batch=batch, metrics=metrics)
        lr = optimizer.param_groups[0]["lr"]
        steps.append(step | {"lr": lr, "norm": float(torch.stack(norms).norm())})
        return metrics

    monkeypatch.setattr(diffcse, "train_step", spy)
    return steps


# ------------------------------------------------------------------------------------------------
# Results


def test_a_run_from_its_first_log_line_to_its_results(train_tiny, tmp_path, capsys):
    results, out = train_tiny(), tmp_path / "out"
    assert results == json.loads((out / "results.json").read_text())
    log = read_log(out)
    names = {*eval_sts.TEST_SETS, "STSB-dev", "average"}
    assert set(results["before"]) == set(results["after"]) == names
    assert set(results["before_first_last"]) == names
    scored = [row for row in log if "score" in row]
    assert [row["step"] for row in scored] == [0, 2, 4, 5]
    assert all(row["score"] == row["STSB-dev"] for row in scored)
    best = max(scored[1:], key=lambda row: row["score"])  # the first of equals
    assert (results["best_step"], results["dev_best"]) == (best["step"], best["score"])
    assert results["after"]["STSB-dev"] == results["dev_best"]
    assert results["before"]["STSB-dev"] == results["dev_before"] == log[0]["score"]
    assert (results["precision"], results["fast"], results["compile"]) == ("fp32", True, False)

    row = log[1]
    assert row["loss"] == pytest.approx(row["contrastive"] + 0.05 * row["difference"], abs=1e-5)
    assert 0.3 < row["difference"] < 1.5 and 0 < row["share_replaced"] <= 1 and row["grad_norm"] > 0
    assert row["positive_cosine"] < 0.999  # dropout makes the two views differ
    assert Config(**json.loads((out / "config.json").read_text())).lam == 0.05
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
    assert "no step scored above the initial model" in capsys.readouterr().out


def test_score_dev_never_opens_the_test_sets(train_tiny, tmp_path):
    """Only STS-B dev is needed: not SICK-R dev either."""
    whole = train_tiny(out_dir=str(tmp_path / "whole"))
    for path in (tmp_path / "senteval").rglob("*"):
        if path.is_file() and path.name != "sts-dev.csv":
            path.unlink()
    results = train_tiny(score="dev")
    assert set(results["before"]) == set(results["after"]) == {"STSB-dev"}
    for key in ("dev_before", "dev_best", "best_step"):
        assert results[key] == whole[key]


def test_the_length_that_is_saved_with_the_model(train_tiny, tmp_path, monkeypatch):
    """The usual one, or that of training if it is larger: at most the model's 40 positions."""
    for usual, trained, saved in ((128, 32, 40), (20, 32, 32), (20, 10, 20)):
        monkeypatch.setattr(runs, "MAX_LENGTH", usual)
        out = str(tmp_path / f"{usual}-{trained}")
        train_tiny(max_length=trained, steps=1, out_dir=out)
        assert embed.DiffCSE(out, device="cpu").max_length == saved


@pytest.mark.parametrize(
    "family, generator, pooling",
    [
        ("bert", "distilbert", "cls"),
        ("roberta", "roberta", "cls"),
        ("distilbert", "bert", "cls_before_pooler"),
    ],
)
def test_every_family_trains_and_its_best_model_loads_in_transformers(
    train_tiny, tmp_path, family, generator, pooling
):
    """The generator is of another family if the vocabulary allows it. RoBERTa counts positions."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vocabulary = ["<unused>", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *VOCABULARY[5:]]
    for name, mlm in ((family, False), (generator, True)):
        random_pair(name, mlm, tmp_path / str(mlm))
        (tmp_path / str(mlm) / "vocab.txt").write_text("\n".join(vocabulary))
    folders = {"model": str(tmp_path / "False"), "generator": str(tmp_path / "True")}
    assert train_tiny(**folders, pooling=pooling)["best_step"] > 0
    best, texts = tmp_path / "out" / "best", random_sentences(5, 3)
    model = embed.DiffCSE(str(best), device="cpu")
    assert model.pooler == pooling
    rows = [torch.tensor(ids) for ids in model.tokenizer(texts, 20)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=1)
    peer = transformers.AutoModel.from_pretrained(best).eval()
    output = peer(ids, attention_mask=(ids != 1).long())
    expected = output.pooler_output if pooling == "cls" else output.last_hidden_state[:, 0]
    ours = model.encode(texts, normalize_to_unit=False)
    torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# The loop


def test_the_loop_takes_every_sentence_once_per_epoch_at_a_falling_rate(
    train_tiny, tmp_path, monkeypatch
):
    steps = spy_on_steps(monkeypatch)
    train_tiny(steps=None, epochs=2, eval_every=100, log_every=2, seed=7)
    # 33 sentences in 2 views; the short last batch is kept, even with one sentence
    assert [len(s["batch"].x) for s in steps] == [32, 32, 2] * 2
    rates = [1e-2 * (6 - t) / 6 for t in range(6)]
    assert [s["lr"] for s in steps] == pytest.approx(rates)

    def sentences(steps: list[dict]) -> list[tuple]:
        batches = [step["batch"] for step in steps]
        return [tuple(x[m].tolist()) for b in batches for x, m in zip(b.x, b.mask)]

    first, second = sentences(steps[:3]), sentences(steps[3:])
    assert sorted(first) == sorted(second) and first != second  # each once, in another order
    assert any(s["metrics"]["grad_norm"][0] > 1 for s in steps)
    assert all(s["norm"] <= 1 + 1e-5 for s in steps)
    group, model = steps[0]["optimizer"].param_groups[0], steps[0]["model"]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0, (0.9, 0.999), 1e-8)
    trained = {id(p) for n, p in model.named_parameters() if not n.startswith("generator.")}
    assert {id(p) for p in group["params"]} == trained
    rows = [row for row in read_log(tmp_path / "out") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    for row, since in zip(rows, (steps[:1], steps[1:2], steps[2:4], steps[4:])):
        assert row["lr"] == pytest.approx(since[-1]["lr"])
        for name in since[0]["metrics"]:  # the sums over steps divided by the counts
            total, count = (sum(float(s["metrics"][name][i]) for s in since) for i in (0, 1))
            assert row[name] == pytest.approx(total / count, abs=1e-5)


def test_masks_are_a_function_of_seed_and_step(train_tiny, tmp_path, monkeypatch):
    """With equal sentences, so that only the mask distinguishes two batches."""
    text = tmp_path / "same.txt"
    text.write_text("the small dog runs and the big cat sleeps in a tree\n" * 16)
    steps = spy_on_steps(monkeypatch)
    for i, changes in enumerate([{}, {"lam": 0.5, "lr": 1e-4, "edit": "sample"}, {"seed": 43}]):
        train_tiny(out_dir=str(tmp_path / f"run{i}"), train_file=str(text), steps=4, **changes)
    a, b, c = ([s["batch"].selected for s in steps[i : i + 4]] for i in (0, 4, 8))
    assert all(map(torch.equal, a, b))
    assert len({tuple(selected.flatten().tolist()) for selected in a + c}) == 8


def test_a_saved_config_repeats_its_run_and_another_seed_does_not(train_tiny, tmp_path):
    train_tiny(seed=3, edit="sample")
    out, again, other = (tmp_path / name for name in ("out", "again", "other"))
    cfg = parse(Config, PRESETS, ["--config", str(out / "config.json"), "--out-dir", str(again)])[1]
    diffcse.train(cfg)
    diffcse.train(replace(cfg, seed=4, out_dir=str(other)))
    assert read_log(out) == read_log(again) != read_log(other)
    weights = [(folder / "best" / "model.safetensors").read_bytes() for folder in (out, again)]
    assert weights[0] == weights[1]


def test_evaluating_more_often_does_not_change_training(train_tiny, tmp_path):
    losses = []
    for eval_every in (1, 5):
        out = tmp_path / f"every-{eval_every}"
        train_tiny(out_dir=str(out), eval_every=eval_every)
        losses.append([row["loss"] for row in read_log(out) if "loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_bf16_on_a_cpu(train_tiny, tmp_path):
    train_tiny()
    results = train_tiny(amp="bf16", out_dir=str(tmp_path / "half"))
    full, half = read_log(tmp_path / "out"), read_log(tmp_path / "half")
    assert [row.get("loss") for row in full] != [row.get("loss") for row in half]
    assert half[1]["loss"] == pytest.approx(full[1]["loss"], rel=0.05)  # same weights and dropout
    state = bert.load_bert(tmp_path / "half" / "best").state_dict()
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert results["precision"] == "bfloat16"


# ------------------------------------------------------------------------------------------------
# Odd and bad input


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_files_with_one_two_and_three_columns(train_tiny, tmp_path, columns):
    cells = [["the dog runs", "a dog runs", "the house ."], ["a red tree", "a tree", ""]]
    lines = [",".join("abc"[:columns]), *(",".join(row[:columns]) for row in cells * 20)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    changes = {"hard_negative_weight": 1.0} if columns == 3 else {}
    train_file = str(tmp_path / "rows.csv")
    assert train_tiny(train_file=train_file, views="first", **changes)["best_step"] > 0


def test_odd_train_files_that_train(train_tiny, tmp_path, capsys):
    """Shorter than a batch, empty lines, ten thousand words, no final newline."""
    (tmp_path / "odd.txt").write_text("\n\nthe dog\n" + "big " * 10_000 + "\n\na cat")
    assert train_tiny(train_file=str(tmp_path / "odd.txt"))["steps"] == 5
    assert "6 sentences, fewer than --batch-size 16" in capsys.readouterr().err


def test_a_generator_with_more_rows_than_the_tokenizer_has_words(train_tiny, tmp_path, monkeypatch):
    """Padded vocabularies are common: their rows never become a token of x''."""
    model = make_model(tmp_path / "padded", vocab_size=len(VOCABULARY) + 8)
    model.head.bias.data[len(VOCABULARY) :] = 50.0
    bert.save_bert(model, tmp_path / "padded")
    edited, edit_sentences = [], diffcse.edit_sentences
    spy = lambda *args: edited.append(edit_sentences(*args)) or edited[-1]  # noqa: E731
    monkeypatch.setattr(diffcse, "edit_sentences", spy)
    for edit in ("argmax", "sample"):
        out = str(tmp_path / edit)
        train_tiny(generator=str(tmp_path / "padded"), edit=edit, out_dir=out)
    assert max(int(x_edited.max()) for x_edited, _ in edited) < len(VOCABULARY)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "no/such/model"}, "no/such/model: no such model folder"),
        ({"model": "FEW_ROWS"}, "do not belong together"),
        ({"generator": "FEW_ROWS"}, "FEW_ROWS has 22 words and 40 positions; at least 23 and 32"),
        ({"generator": SMALL}, "another vocabulary"),
        ({"max_length": 41}, "--max-length is 41, but .* has 40 positions"),
        ({"pooling": "cls"}, "pooler"),
        ({"train_file": "none.txt"}, "none.txt: no such file"),
        ({"train_file": "EMPTY.txt"}, "0 sentences; at least 2"),
        ({"train_file": "ONE.txt"}, "1 sentences; at least 2"),
        ({"hard_negative_weight": 1.0}, "--hard-negative-weight needs .*3 columns"),
        ({"score": "nonsense"}, "--score is nonsense"),
        ({"data": "FEW_ROWS"}, "no folder STS"),
        ({"out_dir": "x" * 300}, "cannot create --out-dir"),
        ({"out_dir": "A_FILE"}, "A_FILE"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(train_tiny, tmp_path, changes, message):
    make_model(tmp_path / "FEW_ROWS", vocab_size=len(VOCABULARY) - 1)
    for name, content in {"A_FILE": "mine", "EMPTY.txt": "", "ONE.txt": "one\n"}.items():
        (tmp_path / name).write_text(content)
    paths = {path.name: str(path) for path in tmp_path.iterdir()}
    changes = {key: paths.get(value, value) for key, value in changes.items()}
    with pytest.raises((UserError, bert.ModelError), match=message) as error:
        train_tiny(**changes)
    assert one_line(error)
    assert not (tmp_path / "out").exists() and (tmp_path / "A_FILE").read_text() == "mine"


def test_own_text_and_pairs_in_another_language(tmp_path, monkeypatch):
    """Chinese, from a vocabulary of characters to a search: nothing assumes English."""
    monkeypatch.chdir(tmp_path)
    characters = sorted(
        {*"今天天气很好我们去公园散步小猫喜欢吃鱼他昨天买了一本新书老师在教室里讲课"}
    )
    rng = random.Random(3)
    lines = ["".join(rng.choices(characters, k=rng.randint(3, 15))) + "。" for _ in range(60)]
    vocabulary = [*SPECIAL_WORDS, *characters, "。"]
    make_model(Path("zh"), vocab_size=len(vocabulary))
    Path("zh/vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    Path("text.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [(a, b, len({*a} & {*b})) for a, b in zip(lines[:30], lines[30:])]
    pairs = "a\tb\tsimilarity\n" + "".join(f"{a}\t{b}\t{score}\n" for a, b, score in rows)
    Path("pairs.tsv").write_text(pairs, encoding="utf-8")
    files = dict(model="zh", generator="zh", train_file="text.txt", score="pairs.tsv")
    settings = dict(batch_size=8, steps=4, eval_every=2, lr=1e-3, out_dir="out", device="cpu")
    results = diffcse.train(Config(**files, **settings))
    model = embed.DiffCSE("out", device="cpu")
    assert not any(model.tokenizer.unk_id in ids for ids in model.tokenizer(lines, 40))
    assert results["after"].keys() == {"pairs.tsv"} and results["best_step"] in (2, 4)
    left, right, scores = zip(*rows)
    u, v = (model.encode(list(side), return_numpy=True) for side in (left, right))
    expected = 100 * eval_sts.spearman((u * v).sum(1), scores)
    assert results["after"]["pairs.tsv"] == pytest.approx(expected, abs=0.5)
    model.build_index(lines)
    assert model.search(lines[7], threshold=0.999)[0][0] == lines[7]
