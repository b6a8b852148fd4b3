"""Whole runs: scored on STS sets, every model family, the loop, odd and bad input, the command."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import ROOT, SPECIAL_WORDS, VOCABULARY, WORDS, make_model, random_sentences, read_log

import bert
import diffcse
import embed
import eval_sts
from diffcse import PRESETS, Config
from engine.cli import parse
from engine.errors import UserError

SMALL = str(ROOT / "assets" / "small-bert")


def weights_of(folder: Path) -> dict[str, list]:
    tensors = bert.read_safetensors(folder / "best" / "model.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def spy_on_steps(monkeypatch) -> list[dict]:
    """What each train_step of the runs to come receives, and its gradient's norm after clipping."""
    steps, train_step = [], diffcse.train_step

    def spy(model, optimizer, scaler, amp, batch):
        before = [t.clone() for t in batch.tensors()]
        metrics = train_step(model, optimizer, scaler, amp, batch)
        assert all(map(torch.equal, before, batch.tensors()))  # x is never changed
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        steps.append(
            {
                "batch": batch,
                "lr": optimizer.param_groups[0]["lr"],
                "norm": float(torch.stack(norms).norm()),
                "norm_before_clipping": float(metrics["grad_norm"][0]),
                "model": model,
                "optimizer": optimizer,
            }
        )
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


def test_the_saved_model_is_the_same_in_transformers(train_tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    train_tiny(max_length=40)
    best = tmp_path / "out" / "best"
    texts = ["the dog runs .", "", "a cat and a tree in the big red house", "unknown words"]
    model = embed.DiffCSE(str(best), device="cpu")
    ours = model.encode(texts, normalize_to_unit=False)
    tokens = transformers.AutoTokenizer.from_pretrained(best)(
        texts, padding=True, return_tensors="pt"
    )
    peer = transformers.AutoModel.from_pretrained(best, add_pooling_layer=False).eval()
    expected = peer(**tokens).last_hidden_state[:, 0].detach()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_longer_max_length_is_saved_with_the_model(tmp_path, monkeypatch):
    """A model trained with --max-length 256 reads 256 tokens afterwards."""
    folder = tmp_path / "long"
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    cfg = bert.BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=300, **sizes)
    bert.save_bert(bert.Bert(cfg), folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    text, pairs = tmp_path / "text.txt", tmp_path / "pairs.tsv"
    text.write_text("\n".join(random_sentences(20, 0)))
    pairs.write_text("a\tb\tc\nthe dog\tthe cat\t1\nbig\tsmall\t2\nred\tblue\t3\n")
    settings = dict(model=str(folder), train_file=str(text), score=str(pairs), steps=1, lam=0.0)
    out = str(tmp_path / "out")
    diffcse.train(Config(max_length=256, device="cpu", out_dir=out, batch_size=4, **settings))
    assert embed.DiffCSE(out, device="cpu").max_length == 256


@pytest.mark.parametrize(
    "family, pooler",
    [("bert", True), ("bert", False), ("roberta", True), ("distilbert", False)],
)
def test_every_family_trains_and_its_best_model_loads_everywhere(
    train_tiny, tmp_path, family, pooler
):
    """The generator is of another family if the vocabulary allows it. RoBERTa: <s> 0, <pad> 1."""
    transformers = pytest.importorskip("transformers")
    roberta = family == "roberta"
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else SPECIAL_WORDS
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    unknown, cls, sep, pad = (
        ("<unk>", "<s>", "</s>", "<pad>") if roberta else ("[UNK]", "[CLS]", "[SEP]", "[PAD]")
    )
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = (sep, vocabulary[sep]), (cls, vocabulary[cls])
    backend.post_processor = tokenizers.processors.BertProcessing(*ends)
    sizes = dict(
        vocab_size=len(vocabulary),
        pad_token_id=vocabulary[pad],
        max_position_embeddings=40,
        initializer_range=0.2,
        **dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32),
        **dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    )
    configs = {
        "bert": transformers.BertConfig,
        "roberta": transformers.RobertaConfig,
        "distilbert": transformers.DistilBertConfig,
    }
    other = {"bert": "distilbert", "roberta": "roberta", "distilbert": "bert"}[family]
    pooling = {} if family == "distilbert" else {"add_pooling_layer": pooler}
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_config(configs[family](**sizes), **pooling)
    generator = transformers.AutoModelForMaskedLM.from_config(configs[other](**sizes))
    for name, model in (("encoder", encoder), ("generator", generator)):
        model.save_pretrained(tmp_path / name)
        backend.save(str(tmp_path / name / "tokenizer.json"))
    pooling_name = "cls" if pooler else "cls_before_pooler"
    folders = {"model": str(tmp_path / "encoder"), "generator": str(tmp_path / "generator")}
    results = train_tiny(**folders, pooling=pooling_name)
    best = tmp_path / "out" / "best"
    model = embed.DiffCSE(str(best), device="cpu")
    assert model.pooler == pooling_name and (model.bert.pooler is not None) == pooler

    model = embed.DiffCSE(str(best), device="cpu", pooler="cls_before_pooler")
    texts = random_sentences(5, 3)
    rows = [torch.tensor(ids) for ids in model.tokenizer(texts, 20)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, vocabulary[pad])
    peer = transformers.AutoModel.from_pretrained(best, **pooling).eval()
    expected = peer(ids, attention_mask=(ids != vocabulary[pad]).long()).last_hidden_state[:, 0]
    ours = model.encode(texts, normalize_to_unit=False)
    torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-5)
    assert results["best_step"] > 0


# ------------------------------------------------------------------------------------------------
# The loop


def test_the_loop_is_adamw_clipping_and_linear_decay_over_every_sentence(
    train_tiny, tiny, tmp_path, monkeypatch
):
    """All that train() chooses: steps, rates, batches, masks; then its weights by torch's parts."""
    steps = spy_on_steps(monkeypatch)
    no_dropout = dict(dropout=0.0, generator_dropout=False)
    train_tiny(steps=None, epochs=2, eval_every=100, seed=7, **no_dropout)
    # 33 sentences in 2 views; the short last batch is kept, even with one sentence
    assert [len(s["batch"].x) for s in steps] == [32, 32, 2] * 2
    rates = [1e-2 * (6 - t) / 6 for t in range(6)]
    assert [s["lr"] for s in steps] == pytest.approx(rates)
    log = [row["lr"] for row in read_log(tmp_path / "out") if "lr" in row]
    assert log == pytest.approx(rates)

    def sentences(steps: list[dict]) -> list[tuple]:
        batches = [step["batch"] for step in steps]
        return [tuple(x[m].tolist()) for b in batches for x, m in zip(b.x, b.mask)]

    first, second = sentences(steps[:3]), sentences(steps[3:])
    assert sorted(first) == sorted(second) and first != second  # each once, in another order
    assert any(s["norm_before_clipping"] > 1 for s in steps)
    assert all(s["norm"] <= 1 + 1e-5 for s in steps)
    group, model = steps[0]["optimizer"].param_groups[0], steps[0]["model"]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0, (0.9, 0.999), 1e-8)
    trained = {id(p) for n, p in model.named_parameters() if not n.startswith("generator.")}
    assert {id(p) for p in group["params"]} == trained

    torch.manual_seed(7)
    cfg = Config(model=str(tiny), generator=str(tiny), lam=0.05, **no_dropout)
    twin = diffcse.DiffCSEModel.from_pretrained(cfg).train()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step, lr in zip(steps, rates):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        twin(step["batch"])[0].backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    expected = twin.encoder.state_dict()
    for name, p in bert.load_bert(tmp_path / "out" / "best").state_dict().items():
        # Their gradients are rounding error: softmax and BatchNorm remove what they add.
        if not name.endswith("key.bias") and name != "layers.1.norm.bias":
            distance = (p - expected[name]).norm() / p.numel() ** 0.5
            assert distance < 1e-3 * 1e-2, name  # of a step of 1e-2 in every number


def test_masks_are_a_function_of_seed_and_step(train_tiny, tmp_path, monkeypatch):
    """With equal sentences, so that only the mask distinguishes two batches."""
    text = tmp_path / "same.txt"
    text.write_text("the small dog runs and the big cat sleeps in a tree\n" * 16)
    steps = spy_on_steps(monkeypatch)
    for name, changes in (
        ("a", {}),
        ("b", {"lam": 0.5, "lr": 1e-4, "edit": "sample"}),
        ("c", {"seed": 43}),
    ):
        train_tiny(out_dir=str(tmp_path / name), train_file=str(text), steps=4, **changes)
    a, b, c = ([s["batch"].selected for s in steps[i : i + 4]] for i in (0, 4, 8))
    assert all(map(torch.equal, a, b))
    assert len({tuple(selected.flatten().tolist()) for selected in a + c}) == 8


def test_a_saved_config_repeats_its_run_and_another_seed_does_not(train_tiny, tmp_path):
    train_tiny(seed=3, edit="sample")
    out = tmp_path / "out"
    argv = ["--config", str(out / "config.json"), "--out-dir", str(tmp_path / "again")]
    cfg = parse(Config, PRESETS, argv)[1]
    diffcse.train(cfg)
    assert read_log(out) == read_log(tmp_path / "again")
    assert weights_of(out) == weights_of(tmp_path / "again")
    diffcse.train(replace(cfg, seed=4, out_dir=str(tmp_path / "other")))
    assert read_log(out) != read_log(tmp_path / "other")


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


def test_without_out_dir_runs_are_numbered(train_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_tiny(out_dir="", steps=1), train_tiny(out_dir="", steps=1)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["run-1", "run-2"]


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
        ({"generator": SMALL}, "another vocabulary"),
        ({"max_length": 41}, "has 40 positions"),
        ({"model": "no/such/model"}, "no/such/model: no such model folder"),
        ({"device": "cuda"}, "is not available"),
        ({"amp": "fp16"}, "does not work on cpu; use off or bf16"),
        ({"train_file": "none.txt"}, "none.txt: no such file"),
        ({"pooling": "cls"}, "pooler"),
        ({"out_dir": "x" * 300}, "cannot create --out-dir"),
        ({"train_file": "~no-such-user/x.txt"}, "no-such-user"),
        ({"model": "~no-such-user/m"}, "no-such-user"),
        ({"data": "~no-such-user"}, "no-such-user"),
        ({"generator": "EMPTY"}, "config.json"),
        ({"model": "NO_WEIGHTS"}, "neither model.safetensors"),
        ({"model": "LARGE_VOCABULARY"}, "do not belong together"),
        ({"out_dir": "A_FILE"}, "A_FILE"),
        ({"data": "EMPTY"}, "no folder STS"),
        ({"train_file": "EMPTY.txt"}, "0 sentences; at least 2"),
        ({"train_file": "ONE.txt"}, "1 sentences; at least 2"),
        ({"train_file": "LATIN1.txt"}, "line 2: not UTF-8"),
        ({"hard_negative_weight": 1.0}, "--hard-negative-weight needs .*3 columns"),
        ({"score": "nonsense"}, "--score is nonsense"),
        ({"score": "none.tsv"}, "none.tsv: no such file"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    train_tiny, tiny, tmp_path, changes, message
):
    if changes == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    for name in ("EMPTY", "NO_WEIGHTS"):
        (tmp_path / name).mkdir()
    for file in ("config.json", "vocab.txt"):
        (tmp_path / "NO_WEIGHTS" / file).write_bytes((tiny / file).read_bytes())
    make_model(tmp_path / "LARGE_VOCABULARY")
    (tmp_path / "LARGE_VOCABULARY" / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"]))
    files = {"A_FILE": b"mine", "EMPTY.txt": b"", "ONE.txt": b"one\n", "LATIN1.txt": b"a\nb\xff\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    paths = {path.name: str(path) for path in tmp_path.iterdir()}
    changes = {key: paths.get(value, value) for key, value in changes.items()}
    with pytest.raises((UserError, bert.ModelError), match=message) as error:
        train_tiny(**changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and (tmp_path / "A_FILE").read_text() == "mine"


# ------------------------------------------------------------------------------------------------
# The command, and another language


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config", "bert_st"], "bert_sts"),
        (["--config", "demo", "--lerning-rate", "1"], "unknown argument --lerning-rate"),
        (["--config", "demo", "--batch-sise", "3"], "did you mean --batch-size?"),
        (["--config", "demo", "--lr"], "--lr"),
        (["--config", "missing.json"], "missing.json"),
        (["--config", "demo", "--amp", "fp16", "--device", "cpu"], "--amp fp16"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(argv, message):
    command = [sys.executable, str(ROOT / "diffcse.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_own_text_and_pairs_in_another_language(tmp_path, monkeypatch):
    """Chinese, from a vocabulary of characters to a search: nothing assumes English."""
    rng = random.Random(3)
    characters = sorted(
        set("今天天气很好我们去公园散步小猫喜欢吃鱼他昨天买了一本新书老师在教室里讲课")
    )
    lines = ["".join(rng.choices(characters, k=rng.randint(3, 15))) + "。" for _ in range(60)]
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    vocabulary = [*SPECIAL_WORDS, *characters, "。"]
    cfg = bert.BertConfig(
        vocab_size=len(vocabulary), max_position_embeddings=40, initializer_range=0.3, **sizes
    )
    bert.save_bert(bert.BertForMaskedLM(cfg), tmp_path / "zh")
    (tmp_path / "zh" / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (tmp_path / "zh" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [(a, b, len({*a} & {*b})) for a, b in zip(lines[:30], lines[30:])]
    pairs = "a\tb\tsimilarity\n" + "".join(f"{a}\t{b}\t{score}\n" for a, b, score in rows)
    (tmp_path / "pairs.tsv").write_text(pairs, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = dict(batch_size=8, steps=4, eval_every=2, lr=1e-3, out_dir="out", device="cpu")
    files = dict(model="zh", generator="zh", train_file="text.txt", score="pairs.tsv")
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
