"""lab/pretrain.py: text, vocabulary, batches, counting, both losses, the held-out score, runs."""

import itertools
import json
import lzma
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from bert import BertConfig, BertForMaskedLM, load_bert, read_safetensors, save_bert
from data import Tokenizer
from engine.errors import UserError, run_main
from engine.checkpoint import STATE, save_state
from lab import pretrain

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"
WORDS = """the a of and king queen river castle ship sea old young saw built crossed near under from
    city wall north south""".split()


def make_paragraphs(n: int) -> list[str]:
    """Random sentences of WORDS, a few in each paragraph."""
    rng, rows = random.Random(0), []
    for _ in range(n):
        lengths = [rng.randint(3, 12) for _ in range(rng.randint(1, 4))]
        sentences = [" ".join(rng.choices(WORDS, k=k)).capitalize() + "." for k in lengths]
        rows.append(" ".join(sentences))
    return rows


@pytest.fixture
def text(tmp_path) -> Path:
    path, rows = tmp_path / "text.txt", make_paragraphs(600)
    documents = ["\n".join(rows[i : i + 3]) for i in range(0, 600, 3)]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture
def small(text, tmp_path):
    """Tokenizer and rows of that text."""
    documents, _ = pretrain.hold_out(pretrain.read_documents([str(text)]), 0)
    tokenizer = pretrain.train_vocabulary(documents, 100, tmp_path / "vocabulary")
    return tokenizer, pretrain.make_rows(documents, tokenizer, 0)


def flags(source, out, **changes) -> list[str]:
    """A value True is a flag without a value, None leaves a default flag out."""
    options = {"text": source, "minutes": 0.03, "out": out, "vocab": 100, "layers": 1}
    options |= {"hidden": 64, "device": "cpu"} | changes
    words = []
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


@pytest.fixture
def run(monkeypatch, capsys):
    """The command, in this process: (exit code, standard output, standard error)."""

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lab.pretrain", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            run_main(pretrain.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return command


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    files = folder.glob("[!.]*")  # not .lock
    return {file.name: file.read_bytes() for file in files}


# ------------------------------------------------------------------------------------------- text


def test_empty_lines_separate_documents(tmp_path):
    (tmp_path / "a.txt").write_text("\n\none\ntwo \n\n \t\nthree\n", encoding="utf-8")
    with lzma.open(tmp_path / "b.txt.xz", "wt", encoding="utf-8") as file:
        file.write("four\nfive")  # no empty line: a list of sentences
    documents = pretrain.read_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.txt.xz")])
    assert documents == [["one", "two"], ["three"], ["four"], ["five"]]


@pytest.mark.parametrize("sizes", [[1] * 50, [3] * 40, [1, 2, 30, 4] * 20, [1] * 20_000])
def test_held_out_paragraphs_are_of_whole_documents_and_not_trained_on(sizes):
    names = itertools.count()
    documents = [[str(next(names)) for _ in range(size)] for size in sizes]
    kept, held_out = pretrain.hold_out(documents, seed=1)
    assert len(held_out) == min(1000, math.ceil(sum(sizes) / 10))
    trained_on = {paragraph for document in kept for paragraph in document}
    assert not trained_on & set(held_out)
    touched = [document for document in documents if set(document) & set(held_out)]
    assert len(kept) + len(touched) == len(documents)
    assert not any(trained_on & set(document) for document in touched)
    assert pretrain.hold_out(documents, seed=1) == (kept, held_out)
    assert pretrain.hold_out(documents, seed=2)[1] != held_out


@pytest.mark.parametrize(
    "content, message",
    [("", "no text"), (" \n\n\t\n", "no text"), ("only one line", "more are needed")],
)
def test_too_little_text(tmp_path, content, message):
    (tmp_path / "little.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        pretrain.hold_out(pretrain.read_documents([str(tmp_path / "little.txt")]), 0)


def test_transformers_reads_the_vocabulary(small, tmp_path):
    tokenizer, _ = small
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "vocabulary")
    assert tokenizer.vocab_size == len(theirs) == 100
    for role in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(tokenizer, f"{role}_id") == getattr(theirs, f"{role}_token_id")
    for text in ["The king saw a Río.", "", "unknown ☃ words, 3.14", "[MASK] of the castle"]:
        assert tokenizer([text], 64)[0] == theirs(text)["input_ids"]


# ---------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("longest", [8, 16, 64])
def test_rows_are_whole_sentences_in_order_within_a_document(small, text, monkeypatch, longest):
    tokenizer, _ = small
    monkeypatch.setattr(pretrain, "MAX_LENGTH", longest)
    documents = pretrain.read_documents([str(text)])
    documents += [[""], ["x " * 300], ["One. Two. Three. " * 40]]
    made = pretrain.make_rows(documents, tokenizer, seed=4)
    rows = [made.ids[a:b].tolist() for a, b in itertools.pairwise(made.starts)]
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    assert all(row[0] == cls and row[-1] == sep and len(row) <= longest for row in rows)
    assert not any({cls, sep, tokenizer.pad_id} & set(row[1:-1]) for row in rows)
    # Row by row they are the sentences of the documents, each cut to the longest length, and no row
    # has sentences of two documents.
    i = 0
    for document in documents:
        sentences = [s for paragraph in document for s in pretrain.split_sentences(paragraph)]
        expected = sum([tokenizer([s], longest)[0][1:-1] for s in sentences], [])
        found = []
        while len(found) < len(expected):
            found += rows[i][1:-1]
            i += 1
        assert found == expected
    assert i == len(rows)
    again = pretrain.make_rows(documents, tokenizer, seed=4)
    assert np.array_equal(again.starts, made.starts)
    if longest == 64:
        lengths = np.diff(made.starts)
        assert (lengths < 32).sum() > 50 and (lengths >= 48).sum() > 20  # of many lengths


def test_batches_have_every_row_once_per_epoch(small, monkeypatch):
    _, rows = small
    monkeypatch.setattr(pretrain, "BATCH_TOKENS", 300)
    lengths = np.diff(rows.starts)
    batches, count = [], 0
    for batch in pretrain.draw_batches(rows, seed=3):
        batches.append(batch)
        count += len(batch)
        if count == len(rows):
            break
    assert sorted(np.concatenate(batches)) == list(range(len(rows)))
    sizes = [lengths[batch].sum() for batch in batches]
    assert max(sizes) < 300 + 2 * lengths.max() and np.mean(sizes) > 250
    padded = [len(batch) * lengths[batch].max() for batch in batches]
    assert sum(padded) < 1.05 * sum(sizes)
    again = list(itertools.islice(pretrain.draw_batches(rows, seed=3), 2 * len(batches)))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again))
    second = again[len(batches) :]  # another epoch, another order
    assert [batch.tolist() for batch in second] != [batch.tolist() for batch in batches]
    x, mask = rows.rows(batches[0])
    assert len(x) == len(batches[0]) and mask.sum() == sizes[0]  # one view of each


def test_whole_words_are_masked_with_all_their_pieces():
    tokenizer = Tokenizer(SMALL)
    sentence = "unbelievable misunderstandings of electroencephalography and cats"
    x = torch.tensor(tokenizer([sentence] * 4000, 64))
    continues = pretrain.continuing_pieces(tokenizer)
    assert continues[x[0]].sum() > 4  # long words have several pieces
    rng = torch.Generator().manual_seed(0)
    x_masked, selected = pretrain.mask_words(x, tokenizer, continues, 0.3, rng)
    words, previous = tokenizer.backend.encode(sentence).word_ids, None
    for position, word in enumerate(words):
        here, before = selected[:, position], selected[:, position - 1]
        if word is None:
            assert not here.any()
        elif word == previous:
            assert torch.equal(here, before)
        else:
            assert abs(here.float().mean() - 0.3) < 0.03  # a word is as likely as a token
            assert previous is None or not torch.equal(here, before)
        previous = word
    masked = (x_masked == tokenizer.mask_id)[selected].float().mean()
    assert abs(masked - 0.8) < 0.02 and torch.equal(x_masked[~selected], x[~selected])


# --------------------------------------------------------------------------------------- counting


def test_positive_pmi_equals_counting_by_hand(small):
    tokenizer, rows = small
    pairs, W = Counter(), tokenizer.vocab_size
    for start, end in itertools.pairwise(rows.starts):
        ids = rows.ids[start:end].tolist()
        for a, b in itertools.permutations(range(len(ids)), 2):
            if abs(a - b) <= 5 and not {ids[a], ids[b]} & set(tokenizer.special_ids):
                pairs[ids[a], ids[b]] += 1
    total = sum(pairs.values())
    of_word = [sum(n for (a, _), n in pairs.items() if a == word) for word in range(W)]
    smoothed = sum(n**0.75 for n in of_word)
    expected = np.zeros((W, W))
    for (a, b), n in pairs.items():
        chance = (of_word[a] / total) * (of_word[b] ** 0.75 / smoothed)
        expected[a, b] = max(0, math.log(n / total / chance))
    assert (expected > 0).sum() > 50
    np.testing.assert_allclose(pretrain.positive_pmi(rows, tokenizer), expected, atol=1e-5)


def test_a_new_model_starts_from_the_counts(small):
    tokenizer, rows = small
    torch.manual_seed(0)
    model = pretrain.new_model(tokenizer, rows, layers=1, hidden=64)
    words = model.bert.embeddings.word.weight.detach().double()
    assert words.std().item() == pytest.approx(0.05, rel=0.01)
    U, S, _ = torch.linalg.svd(pretrain.positive_pmi(rows, tokenizer).double())  # the exact one
    expected = U[:, :64] @ S[:64].diag() @ U[:, :64].T  # the inner products of U sqrt(S)
    products = words @ words.T
    products, expected = products / products.norm(), expected / expected.norm()
    np.testing.assert_allclose(products, expected, atol=1e-4)
    counts = np.bincount(rows.ids, minlength=100) + 1
    bias = model.head.bias.detach()
    np.testing.assert_allclose(bias, np.log(counts / counts.sum()), atol=1e-5)
    assert not model.training and model.cfg.hidden_dropout_prob == 0.1


# ----------------------------------------------------------------------------------------- losses


@pytest.fixture(scope="module")
def theirs():
    return transformers.BertForMaskedLM.from_pretrained(SMALL, dtype=torch.float32).eval()


def test_losses_equal_transformers_and_a_loop(theirs):
    tokenizer, model = Tokenizer(SMALL), load_bert(SMALL, mlm=True)
    texts = ["A man is playing a guitar.", "", "The the THE cat!", "Ünïcödé ☃ unknown", "x" * 200]
    rows = tokenizer(texts, 40)
    T, special = max(map(len, rows)), torch.tensor(tokenizer.special_ids)
    x = torch.tensor([row + [tokenizer.pad_id] * (T - len(row)) for row in rows])
    mask, rng = x != tokenizer.pad_id, torch.Generator().manual_seed(0)
    continues = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    x_masked, selected = pretrain.mask_words(x, tokenizer, continues, 0.4, rng)
    weights = torch.rand(tokenizer.vocab_size, generator=rng)
    weights[special] = 0
    mlm_loss, cls_loss = pretrain.compute_losses(model, x, x_masked, selected, mask, weights)
    labels = torch.where(selected, x, -100)
    out = theirs(input_ids=x_masked, attention_mask=mask.long(), labels=labels)
    assert mlm_loss.item() == pytest.approx(out.loss.item(), abs=1e-5)
    log_p = out.logits[:, 0].log_softmax(-1)
    words = [(i, token) for i, row in enumerate(rows) for token in row if token not in special]
    expected = np.average(
        [-log_p[word].item() for word in words], weights=[weights[token] for _, token in words]
    )
    assert cls_loss.item() == pytest.approx(expected, abs=1e-5)
    only_special = x.where(torch.isin(x, special), tokenizer.unk_id)  # without weight: 0, not NaN
    losses = pretrain.compute_losses(model, only_special, x_masked, selected, mask, weights)
    assert losses[1].item() == 0


def test_the_cls_loss_has_a_small_weight_then_a_large_one_that_falls():
    weights = [pretrain.cls_weight_at(progress) for progress in np.linspace(0, 1, 11)]
    np.testing.assert_allclose(weights, [0.1] * 7 + [4, 8 / 3, 4 / 3, 0], atol=1e-12)


def test_word_weights_fall_with_frequency():
    tokenizer = Tokenizer(SMALL)
    texts = [("the the the cat",), ("the dog the ☃",)]
    weights = pretrain.word_weights(pretrain.TokenizedSentences(texts, tokenizer, 40), tokenizer)
    ids = [tokenizer.vocabulary()[word] for word in ("the", "cat", "house")]
    assert weights[tokenizer.special_ids].tolist() == [0] * 5
    rare = pretrain.RARE  # 7 words that are not special tokens; 5 of them are "the"
    expected = [rare / (rare + 5 / 7), rare / (rare + 1 / 7), 1]
    np.testing.assert_allclose(weights[ids], expected, rtol=1e-6)


def test_both_losses_have_a_gradient_in_the_encoder():
    x = torch.tensor(Tokenizer(SMALL)(["the cat sat on the mat"], 20))
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig("bert", 8192, 64, 1, 1, 64))
    mask = torch.ones_like(x, dtype=torch.bool)
    selected = mask.clone().fill_(False)
    selected[0, 2] = True
    for number in (0, 1):
        model.zero_grad()
        losses = pretrain.compute_losses(model, x, x, selected, mask, torch.ones(8192))
        losses[number].backward()
        assert model.bert.layers[0].up.weight.grad.norm() > 1e-6


def test_the_held_out_score_equals_a_loop_on_transformers(theirs):
    tokenizer, model = Tokenizer(SMALL), load_bert(SMALL, mlm=True)
    known = """The city is the capital of the United States and one of the most important cities in
        the world. He was born in New York."""
    odd = """Señor Ünïcödé wrote 3,141 extraordinarily unpronounceable words about xylophones ☃
        quietly."""
    long = " ".join(["antidisestablishmentarianism"] * 50)
    text = [*make_paragraphs(12), *[known] * 10, *[odd] * 3, long, ""]
    result = pretrain.held_out_row(*pretrain.score_held_out(model, tokenizer, text))

    # The same words, found without word_ids: later pieces of a word begin with ##.
    fast = transformers.AutoTokenizer.from_pretrained(SMALL)
    rng, losses, correct = np.random.default_rng(0), [], []
    for words in map(str.split, text):
        for start in range(0, len(words), 32):
            stretch = " ".join(words[start : start + 32])
            split = fast.backend_tokenizer.pre_tokenizer.pre_tokenize_str(stretch.lower())
            ids, spans = fast(stretch)["input_ids"], []
            for position, piece in enumerate(fast.convert_ids_to_tokens(ids)[1:-1], 1):
                if piece.startswith("##"):
                    spans[-1].append(position)
                else:
                    spans.append([position])
            chosen = zip(spans, split, rng.random(len(spans)) < 0.15, strict=True)
            spans = [s for s, (word, _), yes in chosen if yes and re.fullmatch("[a-z]+", word)]
            spans = [span for span in spans if span[-1] < 128]
            x = torch.tensor([ids])[:, :128]
            x_masked = x.clone()
            x_masked[0, sum(spans, [])] = tokenizer.mask_id
            with torch.no_grad():
                log_p = theirs(input_ids=x_masked).logits[0].log_softmax(-1)
            for span in spans:
                losses.append(-sum(log_p[p, x[0, p]].item() for p in span))
                correct.append(all(log_p[p].argmax() == x[0, p] for p in span))
    assert len(losses) == result["words"] >= 40 and any(correct)
    assert result["loss"] == pytest.approx(np.mean(losses), abs=1e-3)
    assert result["accuracy"] == pytest.approx(np.mean(correct), abs=1e-3)


def test_training_learns(small):
    tokenizer, rows = small
    torch.manual_seed(0)
    model = pretrain.new_model(tokenizer, rows, layers=1, hidden=64)
    optimizer, rng = torch.optim.AdamW(model.parameters()), torch.Generator().manual_seed(0)
    weights, continues = torch.ones(100), torch.zeros(100, dtype=torch.bool)
    curve = []
    for batch in itertools.islice(pretrain.draw_batches(rows, 0), 60):
        x, mask = rows.rows(batch)
        masked = pretrain.mask_words(x, tokenizer, continues, 0.2, rng)
        step = pretrain.train_step(model, optimizer, (x, *masked, mask), weights, 0.1, None)
        curve.append(step)
    first, last = np.mean(curve[:5], axis=0), np.mean(curve[-5:], axis=0)
    assert (last < first - 0.1).all(), (first, last)


def test_the_learning_rate_rises_and_falls():
    lr = [pretrain.lr_at(progress) for progress in np.linspace(0, 1, 1001)]
    assert lr[0] == 0 and max(lr) == pytest.approx(pretrain.LR) and lr[-1] == pytest.approx(0)
    peak = int(np.argmax(lr))
    assert (np.diff(lr[: peak + 1]) > 0).all() and (np.diff(lr[peak:]) < 0).all()


# ------------------------------------------------------------------------------------- whole runs


def test_a_run_starts_from_another_model_or_from_its_vocabulary_alone(text, tmp_path, run):
    first = tmp_path / "first"
    assert run(*flags(text, first))[0] == 0
    held_out = read_log(first)[-1]["loss"]
    options = {"start": first, "minutes": 0.02, "layers": None, "hidden": None}

    def start(name: str, **more) -> tuple[float, int]:
        """The first held-out loss, and the number of layers."""
        code, _, error = run(*flags(text, tmp_path / name, **options | {"vocab": None} | more))
        assert code == 0, error
        assert Tokenizer(tmp_path / name).vocabulary() == Tokenizer(first).vocabulary()
        layers = load_bert(tmp_path / name, mlm=True).cfg.num_hidden_layers
        return read_log(tmp_path / name)[0]["loss"], layers

    assert start("same") == (pytest.approx(held_out, abs=1e-3), 1)  # its file is in fp16
    loss, layers = start("deeper", layers=2)
    assert loss > held_out + 0.1 and layers == 2
    code, _, error = run(*flags(text, tmp_path / "no", **options))
    assert code == 2 and "--vocab and --start exclude each other" in error


def test_a_run_is_read_by_transformers_and_resumed_and_overwritten(text, tmp_path, run):
    out = tmp_path / "model"
    code, printed, error = run(*flags(text, out))
    assert code == 0 and "minutes left: held-out loss" in printed, error
    log = read_log(out)
    assert log[0]["step"] == 0 and log[-1]["tokens"] > 0 and log[-1]["loss"] < log[0]["loss"]
    their_class = transformers.BertForMaskedLM
    theirs, info = their_class.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x = torch.tensor(Tokenizer(out)(["the king saw a castle"], 20))
    with torch.no_grad():
        ours, logits = load_bert(out, mlm=True)(x), theirs.eval()(input_ids=x).logits
    np.testing.assert_allclose(ours, logits, atol=1e-5)
    saved = read_safetensors(out / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}  # computed in fp32
    automatic = their_class.from_pretrained(out, dtype="auto")
    assert next(automatic.parameters()).dtype == torch.float32

    before = contents(out)
    for changes, message in [
        ({}, "exists: --resume continues its run, --overwrite replaces it"),
        ({"resume": True}, "to continue, give a larger --minutes"),
        ({"resume": True, "minutes": 1, "layers": 2}, "--layers is 2, but the run has 1"),
    ]:
        code, _, error = run(*flags(text, out, **changes))
        assert code == 2 and message in error and contents(out) == before

    code, _, error = run(*flags(text, out, resume=True, minutes=0.06))
    more = read_log(out)
    assert code == 0 and more[: len(log)] == log and more[-1]["step"] > log[-1]["step"], error
    assert more[-1]["minutes"] > log[-1]["minutes"]
    (out / "notes").write_text("mine")
    code, _, error = run(*flags(text, out, overwrite=True, minutes=0.02))
    assert code == 0 and read_log(out)[-1]["minutes"] < 0.04, error
    assert (out / "notes").read_text() == "mine"


def test_a_stopped_run_is_saved_and_resumed(text, tmp_path, run):
    out = tmp_path / "model"
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.pretrain", *flags(text, out, minutes=5)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if "5.0 minutes left" in line:
            break
    time.sleep(2)
    in_use = run(*flags(text, out, overwrite=True))
    assert in_use[0] == 2 and in_use[2].count("\n") == 1
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "to continue, add --resume" in error
    assert "Traceback" not in error
    steps = read_log(out)[-1]["step"]
    assert steps >= 1
    minutes = read_log(out)[-1]["minutes"] + 0.03
    assert run(*flags(text, out, resume=True, minutes=minutes))[0] == 0
    assert read_log(out)[-1]["step"] > steps


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab": 4000}, r"--vocab is 4000, but only \d+ pieces"),
        ({"minutes": 0.000001}, "shorter than one step"),
        ({"minutes": 0}, "--minutes is 0"),
        ({"minutes": "nan"}, "--minutes is nan"),
        ({"minutes": None}, "--minutes and --out are needed"),
        ({"hidden": 100}, "--hidden is 100"),
        ({"layers": 0}, "--layers is 0"),
        ({"text": "nowhere.txt"}, "cannot read nowhere.txt"),
        ({"resume": True}, "has no run to resume"),
        ({"score": "nowhere/at/all"}, "no such model"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(text, tmp_path, run, changes, message):
    code, _, error = run(*flags(text, tmp_path / "model", **changes))
    assert code == 2 and not contents(tmp_path / "model")
    assert re.search(message, error) and error.count("\n") == 1


def test_only_a_folder_of_this_program_is_overwritten(text, tmp_path, run):
    """And only once the new run has taken a step."""
    out = tmp_path / "model"
    out.mkdir()
    (out / "precious").write_text("mine")

    def refused(message: str, **changes) -> None:
        before = contents(out)
        code, _, error = run(*flags(text, out, **changes))
        assert code == 2 and message in error and error.count("\n") == 1
        assert contents(out) == before

    refused("was not made by lab.pretrain", overwrite=True)
    refused("was not made by lab.pretrain", resume=True)
    save_state(out, {}, {"name": "demo"})  # the state of another program
    refused("was not made by lab.pretrain", overwrite=True)
    (out / STATE).write_bytes(b"not a state")
    refused("damaged", overwrite=True)
    save_state(out, {}, {"pretrain": {}})
    for changes in ({"vocab": 4000}, {"minutes": 0.000001}):
        refused("is", overwrite=True, **changes)


def test_models_are_scored_without_training(text, tmp_path, run):
    model, tokenizer = load_bert(SMALL, mlm=True), Tokenizer(SMALL)
    held_out = pretrain.hold_out(pretrain.read_documents([str(text)]), 0)[1]
    expected = [pretrain.score_held_out(model, tokenizer, held_out)]
    torch.manual_seed(0)
    with torch.no_grad():
        model.head.bias += torch.randn(len(model.head.bias))
    save_bert(model, tmp_path / "other")
    for file in tokenizer.files:
        shutil.copy(file, tmp_path / "other")
    expected.append(pretrain.score_held_out(model, tokenizer, held_out))
    _, printed, _ = run("--text", text, "--score", SMALL, tmp_path / "other")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert rows[0] == {"model": str(SMALL), **pretrain.held_out_row(*expected[0])}
    difference = rows[1]["loss_minus_first"]
    assert difference == pytest.approx(rows[1]["loss"] - rows[0]["loss"], abs=2e-4)
    test = scipy.stats.ttest_rel(expected[1][0].numpy(), expected[0][0].numpy())
    assert difference / rows[1]["standard_error"] == pytest.approx(test.statistic, rel=1e-2)
