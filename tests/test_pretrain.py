"""Pretraining: text, vocabulary, rows, counting, losses, the held-out score, runs."""

import itertools
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, one_line, read_log
from torch.nn.utils.rnn import pad_sequence

from bert import load_bert, read_safetensors, save_bert
from data import Batch, Tokenizer, mask_tokens
import diffcse
from diffcse import derive_seed
from engine.errors import UserError
from engine.tokens import TokenizedSentences
from lab import counting, held_out, pretrain, rows as rows_py, running_text

SMALL = ROOT / "assets" / "small-bert"
WORDS = """the a of and king queen river castle ship sea old young saw built crossed near under from
    city wall north south""".split()


def make_paragraphs(count: int) -> list[str]:
    """Random sentences of WORDS, a few in each paragraph."""
    rng, rows = random.Random(0), []
    for _ in range(count):
        lengths = [rng.randint(3, 12) for _ in range(rng.randint(1, 4))]
        rows.append(" ".join(" ".join(rng.choices(WORDS, k=k)).capitalize() + "." for k in lengths))
    return rows


@pytest.fixture
def text(tmp_path) -> Path:
    path, rows = tmp_path / "text.txt", make_paragraphs(600)
    documents = ["\n".join(rows[i : i + 3]) for i in range(0, 600, 3)]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture
def small(text):
    """Tokenizer and rows of that text."""
    documents, _ = running_text.hold_out(running_text.read_documents([str(text)]))
    tokenizer = rows_py.train_vocabulary(documents, 100)
    return tokenizer, rows_py.Rows(documents, tokenizer, 0)


@pytest.fixture
def run(text, command, monkeypatch):
    """run(out, **flags); None leaves a flag out."""
    monkeypatch.setattr(pretrain, "WARM_UP", 4)

    def run(out: Path | None, **changes):
        flags = {"text": text, "steps": 3, "out": out, "vocab": 100, "layers": 1, "hidden": 64}
        flags |= {"device": "cpu", "eval-every": 4, "log-every": 3} | changes
        given = {name: value for name, value in flags.items() if value is not None}
        words = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
        return command(pretrain.main, *itertools.chain.from_iterable(words))

    return run


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("[!.]*") if file.is_file()]  # not .lock
    return {str(file): file.read_bytes() for file in files}


def make_batch(rows: list[list[int]], tokenizer: Tokenizer) -> Batch:
    """Padded and masked rows."""
    x = pad_sequence(list(map(torch.tensor, rows)), True, tokenizer.pad_id)
    masked = mask_tokens(x, tokenizer, 0.2, "80-10-10", torch.Generator().manual_seed(0))
    return Batch(x, x != tokenizer.pad_id, *masked, views=1)


# ------------------------------------------------------------------------------------------- text


def test_empty_lines_separate_documents(tmp_path):
    (tmp_path / "a.txt").write_text("\n\none\ntwo \n\n \t\nthree\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("\nfive\nsix\n\n", encoding="utf-8")  # none between lines
    with lzma.open(tmp_path / "b.txt.xz", "wt", encoding="utf-8") as file:
        file.write("four\nfive")  # no empty line: a list of sentences
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt.xz", "c.txt")]
    expected = [["one", "two"], ["three"], ["four"], ["five"], ["five"], ["six"]]
    assert running_text.read_documents(names) == expected


@pytest.mark.parametrize("sizes", [[1] * 50, [3] * 40, [1, 2, 30, 4] * 20, [1] * 20_000])
def test_held_out_paragraphs_are_of_whole_documents_and_not_trained_on(sizes):
    names = itertools.count()
    documents = [[str(next(names)) for _ in range(size)] for size in sizes]
    kept, scored = running_text.hold_out(documents)
    assert len(scored) == min(1000, math.ceil(sum(sizes) / 10))
    touched = [document for document in documents if set(document) & set(scored)]
    assert sorted(kept + touched) == sorted(documents)  # no document in both
    assert running_text.hold_out(documents) == (kept, scored)


@pytest.mark.parametrize("documents", [[], [["only one"]], [["one", "two", "three"]]])
def test_too_little_text(documents):
    with pytest.raises(UserError) as error:
        running_text.hold_out(documents)
    assert f"too few documents: {len(documents)}" in one_line(error)


def unpack(rows: TokenizedSentences) -> list[list[int]]:
    return [rows.ids[a:b].tolist() for a, b in itertools.pairwise(rows.starts)]


@pytest.mark.parametrize("longest", [8, 16, 64])
def test_rows_are_whole_sentences_in_order_within_a_document(small, text, monkeypatch, longest):
    tokenizer, _ = small
    monkeypatch.setattr(rows_py, "MAX_LENGTH", longest)
    documents = running_text.read_documents([str(text)])
    documents += [["x " * 300], ["One two."] * 40, ["Alone."], []]
    made = rows_py.Rows(documents, tokenizer, seed=4)
    # No row has sentences of two documents, or would have had space for the next sentence
    limits = iter(np.random.default_rng([4, 3]).integers(longest // 4, longest + 1, len(made)))
    expected = []
    for document in documents:
        document = [s for paragraph in document for s in running_text.split_sentences(paragraph)]
        lengths, sentences = [len(i) - 2 for i in tokenizer(document, longest)], list(document)
        rows = []
        while sentences:
            row, space = [sentences.pop(0)], next(limits) - 2 - lengths.pop(0)
            while sentences and lengths[0] <= space:
                row.append(sentences.pop(0))
                space -= lengths.pop(0)
            rows.append(" ".join(row))
        expected += rows
    assert unpack(made) == tokenizer(expected, longest) and next(limits, None) is None


@pytest.mark.parametrize("pool", [16_384, 200])
def test_batches_have_every_row_once_per_epoch(small, pool, monkeypatch):
    monkeypatch.setattr(rows_py, "POOL", pool)
    rows = small[1]
    lengths, expected = np.diff(rows.starts), list(range(len(rows)))
    drawn, batches = rows.draw(300, seed=3), []
    while sum(map(len, batches)) < len(expected):
        batches.append(next(drawn))
    assert sorted(np.concatenate(batches)) == expected
    sizes = [lengths[batch].sum() for batch in batches]
    assert max(sizes) < 300 + 2 * 64 and np.median(sizes) > 230
    padded = [len(batch) * lengths[batch].max() for batch in batches]
    assert sum(padded) < (1.05 if pool > 200 else 1.2) * sum(sizes)
    assert abs(np.corrcoef([lengths[b].mean() for b in batches], range(len(batches)))[0, 1]) < 0.4
    again = list(itertools.islice(rows.draw(300, seed=3), 2 * len(batches)))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again))
    second = again[len(batches) :]  # another epoch, another order
    assert [batch.tolist() for batch in second] != [batch.tolist() for batch in batches]


# --------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("most", [20_000_000, 5_000])
def test_positive_pmi_equals_counting_by_hand(small, most, monkeypatch):
    monkeypatch.setattr(counting, "MAX_TOKENS", most)
    tokenizer, rows = small
    pairs, W, seen = Counter(), tokenizer.vocab_size, 0
    for ids in unpack(rows):
        ids = ids[: max(0, most - seen)]
        seen += len(ids)
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
    np.testing.assert_allclose(counting.positive_pmi(rows, tokenizer), expected, atol=1e-5)


def test_a_new_model_starts_from_the_counts(small):
    tokenizer, rows = small
    torch.manual_seed(0)
    vectors = counting.word_vectors(rows, tokenizer, 64)
    strength = vectors.norm(dim=0)
    assert strength.max() < 3 * strength.min()  # 4,000 times without the rotation
    counts = np.bincount(rows.ids, minlength=100)
    model = pretrain.new_model(vectors, counting.log_frequency(counts), pad_id=0, layers=1)
    words = model.bert.embeddings.word.weight.detach().double()
    assert words.std().item() == pytest.approx(0.05, rel=0.01)
    U, S, _ = torch.linalg.svd(counting.positive_pmi(rows, tokenizer).double())  # the exact one
    expected = U[:, :64] @ S[:64].diag() @ U[:, :64].T  # the inner products of U sqrt(S)
    products = words @ words.T
    products, expected = products / products.norm(), expected / expected.norm()
    np.testing.assert_allclose(products, expected, atol=1e-4)
    bias, counts = model.head.bias.detach(), counts + 1
    np.testing.assert_allclose(bias, np.log(counts / counts.sum()), atol=1e-5)
    assert not model.training and model.cfg.hidden_dropout_prob == 0.1
    assert model.max_length == 128


def test_word_weights_fall_with_frequency():
    tokenizer = Tokenizer(SMALL)
    texts = [("the the the cat",), ("the dog the ☃",)]
    counts = np.bincount(TokenizedSentences(texts, tokenizer, 40).ids, minlength=8192)
    weights = counting.word_weights(counts, tokenizer.special_ids)
    ids = [tokenizer.vocabulary()[word] for word in ("the", "cat", "house")]
    assert weights[tokenizer.special_ids].tolist() == [0] * 5
    rare = counting.RARE  # 7 words that are not special tokens; 5 of them are "the"
    expected = [rare / (rare + 5 / 7), rare / (rare + 1 / 7), 1]
    np.testing.assert_allclose(weights[ids], expected, rtol=1e-6)


# ----------------------------------------------------------------------------------------- losses


@pytest.fixture(scope="module")
def theirs():
    return transformers.BertForMaskedLM.from_pretrained(SMALL).float().eval()


def test_losses_equal_transformers_and_a_loop(theirs):
    tokenizer, model = Tokenizer(SMALL), load_bert(SMALL, mlm=True)
    texts = ["A man is playing a guitar.", "", "The the THE cat!", "Ünïcödé ☃ unknown", "x" * 200]
    rows, special = tokenizer(texts, 40), tokenizer.special_ids
    batch = make_batch(rows, tokenizer)
    torch.manual_seed(1)
    weights = torch.rand(tokenizer.vocab_size)
    weights[special] = 0
    training = pretrain.Pretraining(pretrain.PretrainConfig(), model, weights)
    assert training.cls_weight == 0.1
    training.cls_weight = 0.7
    loss, metrics = training(batch)
    labels = torch.where(batch.selected, batch.x, -100)
    out = theirs(input_ids=batch.x_masked, attention_mask=batch.mask.long(), labels=labels)
    log_p = out.logits[:, 0].log_softmax(-1)
    words = [(i, t) for i, row in enumerate(rows) for t in row if t not in special]
    total = sum(weights[token] for _, token in words)
    cls = -sum(weights[word[1]] * log_p[word] for word in words) / total
    expected = {"mlm": out.loss, "cls": cls, "loss": out.loss + 0.7 * cls}
    for name, value in expected.items():
        assert metrics[name][0].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-5)
        assert metrics[name][1] == 1
    assert loss.item() == metrics["loss"][0].item()
    ours, others = model.bert, theirs.bert
    a, b = ours.embeddings.word.weight, others.embeddings.word_embeddings.weight
    c, d = ours.layers[0].up.weight, others.encoder.layer[0].intermediate.dense.weight
    gradients = torch.autograd.grad(loss, (a, c))
    for x, y in zip(gradients, torch.autograd.grad(expected["loss"], (b, d))):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    batch.x = batch.x.where(torch.isin(batch.x, torch.tensor(special)), tokenizer.unk_id)
    assert training(batch)[1]["cls"][0].item() == 0  # no weight: not NaN
    batch.selected[:] = False
    assert training(batch)[0].item() == 0


def test_a_step_clips_the_gradient_and_decays_matrices(small):
    tokenizer, rows = small
    torch.manual_seed(0)
    vectors = torch.randn(100, 64)
    mlm = pretrain.new_model(vectors, torch.zeros(100), pad_id=0, layers=1)
    cfg = pretrain.PretrainConfig(clip=0.5)
    model = pretrain.Pretraining(cfg, mlm, torch.rand(100))
    x, mask = rows.rows(np.arange(8))
    batch = make_batch([row[m].tolist() for row, m in zip(x, mask)], tokenizer)
    named = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    loss = model(batch)[0]
    gradients = dict(zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True)))
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert norm > 1
    optimizer = pretrain.make_optimizer(model, lr=0.01)
    metrics = diffcse.train_step(model, optimizer, torch.amp.GradScaler(enabled=False), None, batch)
    assert metrics["loss"][0].item() == pytest.approx(loss.item(), abs=1e-5)
    for name, p in named.items():
        g, decay = 0.5 * gradients[name] / norm, 0.01 * (p.ndim > 1)
        np.testing.assert_allclose(p.grad, g, atol=1e-6)
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * p.grad / (p.grad.abs() + 1e-6)
        np.testing.assert_allclose(p.detach(), expected.detach(), atol=1e-7)


def test_the_schedule():
    cfg, found = pretrain.PretrainConfig(steps=10_000, lr=2.0), {}
    run = pretrain.PretrainRun(cfg, "small-bert", torch.device("cpu"), None)
    run.total = cfg.steps
    for run.step in (0, 99, 383, 400, 5000, 6999, 7001, 8500, 9999):
        found[run.step] = run.schedule()
    run.total, run.step = 100, 4
    assert run.schedule() == (1, 0.1)  # a warm-up of 10 steps
    rates, weights = zip(*found.values())
    falling = [1.92, 1, 0.6002, 0.5998, 0.3, 0.0002]
    assert rates == pytest.approx([2 / 400, 0.5, 1.92, *falling])
    assert weights == pytest.approx([0.1] * 6 + [4 * 2999 / 3000, 2, 4 / 3000])


def test_the_held_out_score_equals_a_loop_on_transformers(theirs):
    tokenizer, model = Tokenizer(SMALL), load_bert(SMALL, mlm=True)
    known = """The city is the capital of the United States and one of the most important cities in
        the world. He was born in New York."""
    odd = """Señor Ünïcödé wrote 3,141 extraordinarily unpronounceable words about xylophones ☃
        quietly."""
    long = [" ".join(["a"] * n + ["antidisestablishmentarianism"] * 25) for n in (1, 2)]
    text = [*make_paragraphs(12), *[known] * 10, *[odd] * 3, *long * 20, ""]  # words end at 128
    result = held_out.score_held_out(model, tokenizer, text)

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
    assert result["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert result["accuracy"] == pytest.approx(np.mean(correct), abs=1e-4)


# ------------------------------------------------------------------------------------- whole runs


def test_a_run_is_read_by_transformers(tmp_path, run):
    out = tmp_path / "model"
    finished = run(out, steps=40)
    log = [row for row in read_log(out) if "held_out_loss" in row]
    assert finished.code == 0 and f"held_out_loss {log[-1]['held_out_loss']}" in finished.out
    assert [row["step"] for row in log] == list(range(0, 41, 4))
    assert log[-1]["held_out_loss"] < log[0]["held_out_loss"] - 0.1
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 40 and results["tokens"] == log[-1]["tokens"]
    assert results["held_out_loss"] == log[-1]["held_out_loss"]
    best = out / "best"
    tokenizer, fast = Tokenizer(best), transformers.AutoTokenizer.from_pretrained(best)
    assert tokenizer.vocab_size == len(fast) == 100
    for sentence in ["The king saw a Río.", "", "unknown ☃ words, 3.14", "[MASK] of the castle"]:
        assert tokenizer([sentence], 64)[0] == fast(sentence)["input_ids"]
    x = torch.tensor(tokenizer(["the king saw a castle"], 20))
    theirs = transformers.BertForMaskedLM.from_pretrained(best).float().eval()
    with torch.no_grad():
        np.testing.assert_allclose(load_bert(best, mlm=True)(x), theirs(x).logits, atol=1e-5)
    saved = read_safetensors(best / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}  # computed in fp32


def numbers(out: Path) -> list[dict]:
    """The log without the clock."""
    return [
        {name: value for name, value in row.items() if "second" not in name}
        for row in read_log(out)
    ]


def test_a_stopped_run_is_resumed_exactly(tmp_path, run, command, monkeypatch):
    out = {name: tmp_path / name for name in ("whole", "early", "late")}
    assert run(out["whole"], steps=23, seed=7).code == 0
    plain_step, steps, schedule = pretrain.train_step, [], []

    def step(model, optimizer, *args):
        schedule.append((optimizer.param_groups[1]["lr"], model.cls_weight))
        steps.append(args)
        if len(steps) in (7, 23 + 22):  # before and after the weight of [CLS] changes
            os.kill(os.getpid(), signal.SIGTERM)
        return plain_step(model, optimizer, *args)

    monkeypatch.setattr(pretrain, "train_step", step)
    for name, stopped_at in (("early", 7), ("late", 22)):
        code, _, error = run(out[name], steps=23, seed=7)
        assert code == 143 and f"stopped after step {stopped_at}; resume with: " in error
        done = command(pretrain.main, "--resume", out[name])
        assert done.code == 0 and f"from step {stopped_at}" in done.out
        assert numbers(out[name]) == numbers(out["whole"])
        models = [(out[n] / "best/model.safetensors").read_bytes() for n in (name, "whole")]
        assert models[0] == models[1]
    assert len(steps) == 46 and schedule[:23] == schedule[23:]
    expected = [1.5e-3 * min((i + 1) / 2.3, 1 - i / 23) for i in range(23)]
    assert [lr for lr, _ in schedule[:23]] == pytest.approx(expected)
    falling = [4 * (1 - i / 23) / 0.3 for i in range(17, 23)]
    assert [weight for _, weight in schedule[:23]] == pytest.approx([0.1] * 17 + falling)
    batches = [args[-1] for args in steps[:23]]
    assert read_log(out["whole"])[-1]["tokens"] == sum(b.mask.sum() for b in batches)
    tokenizer = Tokenizer(out["whole"] / "best")
    for number, batch in enumerate(batches):
        rng = torch.Generator().manual_seed(derive_seed(7, 2, number))
        x_masked, selected = mask_tokens(batch.x, tokenizer, 0.2, "80-10-10", rng)
        assert torch.equal(batch.x_masked, x_masked) and torch.equal(batch.selected, selected)


def test_a_resumed_run_needs_the_same_text(tmp_path, run, command, text):
    def stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return {name: (torch.zeros(()), 1) for name in ("loss", "mlm", "cls", "grad_norm")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "train_step", stop)
        assert run(tmp_path / "model", steps=22).code == 143
    before = contents(tmp_path / "model")
    assert "has an unfinished run; resume it with: " in run(tmp_path / "model").err
    refused = command(pretrain.main, "--resume", tmp_path / "model", "--steps", 50)
    assert "--steps is 50, but the run has 22" in refused.err
    documents, scored = text.read_text(), running_text.read_documents([str(text)])
    scored = running_text.hold_out(scored)[1]
    trained = next(line for line in documents.splitlines() if line and line not in scored)
    more, other = documents + "\n\nOne more.\n", documents.replace(scored[0], "Other.", 1)
    for changed in (more, other, documents.replace(trained, trained + " More.", 1)):
        text.write_text(changed)
        refused = command(pretrain.main, "--resume", tmp_path / "model")
        assert refused.code == 2 and f"--text {text} is not what" in refused.err
        assert contents(tmp_path / "model") == before


def test_a_run_takes_the_vocabulary_of_another_model(tmp_path, run):
    assert run(tmp_path / "model", model=SMALL, vocab=None).code == 0
    assert Tokenizer(tmp_path / "model" / "best").vocabulary() == Tokenizer(SMALL).vocabulary()
    assert load_bert(tmp_path / "model" / "best", mlm=True).cfg.hidden_size == 64


def test_a_finished_run_is_not_resumed_and_no_model_is_no_folder(
    tmp_path, run, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # Path("") is the current folder
    assert run(tmp_path / "model").code == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model"] == ""
    assert "is a finished run" in command(pretrain.main, "--resume", tmp_path / "model").err


def test_rows_are_of_the_paragraphs_that_are_not_held_out(text):
    tokenizer, rows, held = rows_py.read_rows((str(text),), "", 100, 4)
    documents, scored = running_text.hold_out(running_text.read_documents([str(text)]))
    expected = rows_py.Rows(documents, tokenizer, 4)
    assert held == scored and unpack(rows) == unpack(expected)
    assert unpack(rows) != unpack(rows_py.Rows(documents, tokenizer, 5))
    numbers = next(expected.draw(300, 4))
    assert torch.equal(next(rows.batches(300, 4, 0)).x, expected.rows(numbers)[0])


def test_the_seed_is_of_the_first_weights_too(tmp_path, run):
    for seed in (0, 1):
        assert run(tmp_path / f"{seed}", steps=1, seed=seed).code == 0
    first = [read_log(tmp_path / f"{seed}")[0]["held_out_loss"] for seed in (0, 1)]
    assert first[0] != first[1]


def test_a_run_killed_before_its_results_ends_alike(tmp_path, run, command):
    assert run(tmp_path / "whole").code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.PretrainRun, "close", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "killed")
    assert command(pretrain.main, "--resume", tmp_path / "killed").code == 0
    results = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")
    ]
    assert results[0]["held_out_loss"] == results[1]["held_out_loss"]
    assert results[0]["tokens"] == results[1]["tokens"]
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def test_the_vocabulary_is_the_same_every_time(text):
    """The library alone breaks ties at random."""
    documents = [[row, "Ünïcödé ☃ 漢字 naïve"] for row in make_paragraphs(100)]
    found = [rows_py.train_vocabulary(documents, 120).vocabulary() for _ in range(5)]
    assert all(vocabulary == found[0] for vocabulary in found)
    words = sorted(found[0], key=found[0].get)
    assert words[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(words) == 120
    assert {"king", "ship", "##n"} <= set(words) and "☃" in words


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab": 4000}, r"--vocab is 4000, but only \d+ pieces occur twice"),
        ({"vocab": 20}, "--vocab is 20; it must be at least 100"),
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"lr": 0}, "--lr is 0.0; it must be positive, finite"),
        ({"clip": "nan"}, "--clip is nan"),
        ({"hidden": 100}, "--hidden is 100; it must be a multiple of 64"),
        ({"hidden": 128}, "--hidden is 128; it must be at most"),
        ({"layers": 0}, "--layers is 0; it must be at least 1"),
        ({"seed": -1}, "--seed is -1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"text": None}, "--text is missing"),
        ({"text": "nowhere.txt"}, "cannot read .*nowhere.txt"),
        ({"model": "nowhere/at/all"}, "no such model"),
        ({"model": SMALL, "hidden": 8256}, "--hidden is 8256; it must be at most the size .* 8192"),
        ({"save_minutes": "nan"}, "--save-minutes is nan"),
        ({"resume": "nowhere"}, "--resume nowhere: no run there"),
        ({"lam": 1}, "unknown argument --lam"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, run, changes, message):
    code, _, error = run(**{"out": tmp_path / "model"} | changes)
    assert code == 2 and not (tmp_path / "model").exists()
    assert re.search(message, error) and error.count("\n") == 1


def test_a_run_that_diverges_names_the_step(tmp_path, run, monkeypatch):
    losses = iter([1.0] * 7 + [math.nan])

    def step(*args):
        loss = torch.tensor(next(losses))
        return {name: (loss, 1) for name in ("loss", "mlm", "cls", "grad_norm")}

    monkeypatch.setattr(pretrain, "train_step", step)
    code, _, error = run(tmp_path / "model", steps=40)
    assert code == 2 and "the masked-LM loss is NaN or infinite at step 8: try a lower" in error
    assert "best is the model of step 4" in error


def test_a_run_that_fails_in_its_first_step_leaves_nothing(tmp_path, run, monkeypatch):
    monkeypatch.setattr(pretrain, "train_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("Город стоит на реке.", "no word to score"),
        ("☃", "no two words occur together"),
        ("a", "no two words occur together"),
    ],
)
def test_texts_without_enough_words(tmp_path, run, text, words, message):
    text.write_text("\n\n".join([words] * 100))
    code, _, error = run(tmp_path / "model", model=SMALL, vocab=None)
    assert code == 2 and error.count("\n") == 1 and not (tmp_path / "model").exists()
    assert message in error


def test_a_vocabulary_must_have_a_mask_token(tmp_path, run, tiny):
    shutil.copytree(tiny, tmp_path / "tiny")
    words = (tiny / "vocab.txt").read_text().replace("[MASK]", "x")
    (tmp_path / "tiny" / "vocab.txt").write_text(words)
    code, _, error = run(tmp_path / "model", model=tmp_path / "tiny", vocab=None)
    assert code == 2 and f"{tmp_path / 'tiny'}: the vocabulary has no mask token" in error


def test_the_vocabulary_may_be_roberta_s(tmp_path, run):
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(make_paragraphs(50), 300, special_tokens=special, show_progress=False)
    folder, sentences = tmp_path / "roberta", ["The king saw a ship.", "", "a<mask> Ünï"]
    folder.mkdir()
    bpe.save_model(str(folder))
    for name, content in {"tokenizer_": {"tokenizer_class": "RobertaTokenizer"}, "": {}}.items():
        (folder / f"{name}config.json").write_text(json.dumps(content))
    assert run(tmp_path / "model", model=folder, vocab=None).code == 0
    best = tmp_path / "model" / "best"
    theirs = transformers.BertForMaskedLM.from_pretrained(best).float().eval()
    fast = transformers.AutoTokenizer.from_pretrained(best)
    assert Tokenizer(best).vocabulary() == Tokenizer(folder).vocabulary() == fast.get_vocab()
    batch = fast(sentences, return_tensors="pt", padding=True)
    assert Tokenizer(folder)(sentences, 64) == fast(sentences)["input_ids"]
    with torch.no_grad():
        logits = load_bert(best, mlm=True)(batch["input_ids"], batch["attention_mask"].bool())
        real = batch["attention_mask"].bool()
        np.testing.assert_allclose(logits[real], theirs(**batch).logits[real], atol=1e-5)


def test_nothing_but_an_empty_folder_is_written_to(tmp_path, run):
    (tmp_path / ".lock").write_text("mine")
    (tmp_path / "precious").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert "is not empty" in run(tmp_path).err and sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / ".lock").read_text() == "mine"


def test_models_are_scored(text, tmp_path, command):
    model, tokenizer = load_bert(SMALL, mlm=True), Tokenizer(SMALL)
    paragraphs = running_text.hold_out(running_text.read_documents([str(text)]))[1]
    expected = [{"model": str(SMALL), **held_out.score_held_out(model, tokenizer, paragraphs)}]
    with torch.no_grad():
        model.head.bias += torch.randn(len(model.head.bias))
    save_bert(model, other := tmp_path / "other")
    tokenizer.save(other, 128)
    expected.append({"model": str(other), **held_out.score_held_out(model, tokenizer, paragraphs)})
    printed = command(held_out.main, SMALL, other, "--text", text).out
    assert [json.loads(line) for line in printed.splitlines()] == expected
