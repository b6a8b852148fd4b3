"""lab/pretrain.py: text, vocabulary, batches, counting, both losses, the held-out score, runs."""

import itertools
import json
import lzma
import math
import os
import random
import re
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, one_line, read_log
from torch.nn.utils.rnn import pad_sequence

from bert import load_bert, read_safetensors, save_bert
from data import Batch, Tokenizer
from diffcse import derive_seed
from engine.checkpoint import load_state, locked, save_state
from engine.errors import UserError
from engine.tokens import TokenizedSentences
from lab import pretrain

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
def small(text, tmp_path):
    """Tokenizer and rows of that text."""
    documents, _ = pretrain.hold_out(pretrain.read_documents([str(text)]), 0)
    tokenizer = pretrain.train_vocabulary(documents, 100, tmp_path / "vocabulary")
    return tokenizer, pretrain.make_rows(documents, tokenizer, 0)


@pytest.fixture
def start(small, tmp_path) -> Path:
    """A model of 1 layer of 64 with that vocabulary."""
    torch.manual_seed(0)
    save_bert(pretrain.new_model(*small, layers=1, hidden=64), tmp_path / "start")
    small[0].save(tmp_path / "start", 128)
    return tmp_path / "start"


@pytest.fixture
def run(text, command, monkeypatch):
    """run(out, **flags), by a clock on which a step takes a second.

    True is a flag without a value, None leaves a default flag out.
    """
    ticks = itertools.count()
    monkeypatch.setattr(pretrain, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))

    def run(out: Path, steps: float = 3, **changes):
        flags = {"text": text, "minutes": steps / 60, "out": out, "vocab": 100, "layers": 1}
        flags |= {"hidden": 64, "device": "cpu"} | changes
        given = {name: value for name, value in flags.items() if value is not None}
        words = [[f"--{name}"] + [value] * (value is not True) for name, value in given.items()]
        return command(pretrain.main, *itertools.chain.from_iterable(words))

    return run


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("[!.]*") if file.is_file()]  # not .lock
    return {str(file): file.read_bytes() for file in files}


def make_batch(rows: list[list[int]], tokenizer: Tokenizer) -> Batch:
    """Padded rows, masked by mask_words."""
    x = pad_sequence(list(map(torch.tensor, rows)), True, tokenizer.pad_id)
    continues, rng = pretrain.continuing_pieces(tokenizer), torch.Generator().manual_seed(0)
    masked = pretrain.mask_words(x, tokenizer, continues, rng)
    return Batch(x, x != tokenizer.pad_id, *masked, views=1)


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
    touched = [document for document in documents if set(document) & set(held_out)]
    assert sorted(kept + touched) == sorted(documents)  # no document in both
    assert pretrain.hold_out(documents, seed=1) == (kept, held_out)
    assert pretrain.hold_out(documents, seed=2)[1] != held_out


@pytest.mark.parametrize("documents", [[], [["only one"]], [["one", "two", "three"]]])
def test_too_little_text(documents):
    with pytest.raises(UserError) as error:
        pretrain.hold_out(documents, 0)
    assert f"{len(documents)} documents are too few" in one_line(error)


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
    # has sentences of two documents, or would have had space for the next sentence at any limit.
    limits = iter(np.random.default_rng([4, 3]).integers(longest // 4, longest + 1, len(rows)))
    remaining = iter(rows)
    for document in documents:
        sentences = [s for paragraph in document for s in pretrain.split_sentences(paragraph)]
        pieces = [tokenizer([s], longest)[0][1:-1] for s in sentences]
        while pieces:
            expected, limit = pieces.pop(0), next(limits) - 2
            while pieces and len(expected) + len(pieces[0]) <= limit:
                expected = expected + pieces.pop(0)
            assert next(remaining)[1:-1] == expected
    assert next(remaining, None) is None


def test_batches_have_every_row_once_per_epoch(small, monkeypatch):
    _, rows = small
    monkeypatch.setattr(pretrain, "BATCH_TOKENS", 300)
    lengths = np.diff(rows.starts)
    drawn, batches = pretrain.draw_batches(rows, seed=3), []
    while sum(map(len, batches)) < len(rows):
        batches.append(next(drawn))
    assert sorted(np.concatenate(batches)) == list(range(len(rows)))
    sizes = [lengths[batch].sum() for batch in batches]
    assert max(sizes) < 300 + 2 * lengths.max() and np.mean(sizes) > 250
    padded = [len(batch) * lengths[batch].max() for batch in batches]
    assert sum(padded) < 1.05 * sum(sizes)
    assert abs(np.corrcoef([lengths[b].mean() for b in batches], range(len(batches)))[0, 1]) < 0.3
    again = list(itertools.islice(pretrain.draw_batches(rows, seed=3), 2 * len(batches)))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again))
    second = again[len(batches) :]  # another epoch, another order
    assert [batch.tolist() for batch in second] != [batch.tolist() for batch in batches]
    x, mask = rows.rows(batches[0])
    assert len(x) == len(batches[0]) and mask.sum() == sizes[0]  # one view of each


def test_whole_words_are_masked_with_all_their_pieces():
    tokenizer = Tokenizer(SMALL)
    sentence = "unbelievable misunderstandings of electroencephalography and cats"
    batch = make_batch(tokenizer([sentence] * 4000, 64), tokenizer)
    words, previous = tokenizer.backend.encode(sentence).word_ids, None
    assert len(words) - len(set(words)) > 4  # long words have several pieces
    for position, word in enumerate(words):
        here, before = batch.selected[:, position], batch.selected[:, position - 1]
        if word is None:
            assert not here.any()
        elif word == previous:
            assert torch.equal(here, before)
        else:
            assert abs(here.float().mean() - 0.2) < 0.03  # a word is as likely as a token
            assert previous is None or not torch.equal(here, before)
        previous = word
    masked = (batch.x_masked == tokenizer.mask_id)[batch.selected].float().mean()
    assert abs(masked - 0.8) < 0.02
    assert torch.equal(batch.x_masked[~batch.selected], batch.x[~batch.selected])


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


def test_word_weights_fall_with_frequency():
    tokenizer = Tokenizer(SMALL)
    texts = [("the the the cat",), ("the dog the ☃",)]
    weights = pretrain.word_weights(TokenizedSentences(texts, tokenizer, 40), tokenizer)
    ids = [tokenizer.vocabulary()[word] for word in ("the", "cat", "house")]
    assert weights[tokenizer.special_ids].tolist() == [0] * 5
    rare = pretrain.RARE  # 7 words that are not special tokens; 5 of them are "the"
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
    weights = torch.rand(tokenizer.vocab_size, generator=torch.Generator().manual_seed(1))
    weights[special] = 0
    losses = pretrain.compute_losses(model, batch, weights)
    labels, mask = torch.where(batch.selected, batch.x, -100), batch.mask.long()
    out = theirs(input_ids=batch.x_masked, attention_mask=mask, labels=labels)
    log_p = out.logits[:, 0].log_softmax(-1)
    words = [(i, token) for i, row in enumerate(rows) for token in row if token not in special]
    total = sum(weights[token] for _, token in words)
    expected = out.loss, -sum(weights[word[1]] * log_p[word] for word in words) / total
    ours, others = model.bert, theirs.bert
    for mine, other in zip(losses, expected):
        assert mine.item() == pytest.approx(other.item(), abs=1e-5)
        a, b = ours.embeddings.word.weight, others.embeddings.word_embeddings.weight
        c, d = ours.layers[0].up.weight, others.encoder.layer[0].intermediate.dense.weight
        gradients = torch.autograd.grad(mine, (a, c), retain_graph=True)
        for x, y in zip(gradients, torch.autograd.grad(other, (b, d), retain_graph=True)):
            np.testing.assert_allclose(x, y, atol=1e-5)
    batch.x = batch.x.where(torch.isin(batch.x, torch.tensor(special)), tokenizer.unk_id)
    assert pretrain.compute_losses(model, batch, weights)[1].item() == 0  # no weight: not NaN


def test_one_step_equals_adamw_by_hand(small):
    """The gradient of both losses, clipped to 1; decay of matrices; the rate of the schedule."""
    tokenizer, rows = small
    torch.manual_seed(0)
    model = pretrain.new_model(tokenizer, rows, layers=1, hidden=64)
    x, mask = rows.rows(np.arange(8))
    batch = make_batch([row[m].tolist() for row, m in zip(x, mask)], tokenizer)
    weights, named = torch.rand(100), dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    losses = pretrain.compute_losses(model, batch, weights)
    loss = losses[0] + 2 * losses[1]  # 4, after half of the time in which it falls
    gradients = dict(zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True)))
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert norm > 1.5
    optimizer = pretrain.make_optimizer(model)
    returned = pretrain.train_step(model, optimizer, batch, weights, 0.85, None)
    assert returned == pytest.approx([loss.item() for loss in losses], abs=1e-5)
    lr = pretrain.LR * 0.15 / 0.94
    for name, p in named.items():
        g, decay = gradients[name] / norm, 0.01 * (p.ndim > 1)
        np.testing.assert_allclose(p.grad, g, atol=1e-6)
        expected = before[name] * (1 - lr * decay) - lr * p.grad / (p.grad.abs() + 1e-6)
        np.testing.assert_allclose(p.detach(), expected.detach(), atol=1e-7)


def test_the_schedule():
    progress = [0, 0.03, 0.06, 0.53, 0.7 - 1e-9, 0.7, 0.85, 1]
    lr, cls_weight = zip(*map(pretrain.schedule, progress))
    expected = np.array([0, 0.5, 1, 0.5, 0.3 / 0.94, 0.3 / 0.94, 0.15 / 0.94, 0])
    np.testing.assert_allclose(lr, pretrain.LR * expected, atol=1e-10)
    np.testing.assert_allclose(cls_weight, [0.1] * 5 + [4, 2, 0], atol=1e-10)


def test_the_held_out_score_equals_a_loop_on_transformers(theirs):
    tokenizer, model = Tokenizer(SMALL), load_bert(SMALL, mlm=True)
    known = """The city is the capital of the United States and one of the most important cities in
        the world. He was born in New York."""
    odd = """Señor Ünïcödé wrote 3,141 extraordinarily unpronounceable words about xylophones ☃
        quietly."""
    long = [" ".join(["a"] * n + ["antidisestablishmentarianism"] * 25) for n in (1, 2)]
    text = [*make_paragraphs(12), *[known] * 10, *[odd] * 3, *long * 20, ""]  # words end at 128
    result = pretrain.score_held_out(model, tokenizer, text)

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
    finished = run(out, 40)
    log = read_log(out)
    assert finished.code == 0 and f"loss {log[-1]['loss']}" in finished.out, finished.err
    assert [row["step"] for row in log] == [0, *range(2, 41, 2)]
    assert log[-1]["loss"] < log[0]["loss"] - 0.1 and log[-1]["minutes"] == 0.67
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


def test_a_stopped_run_is_resumed_exactly(tmp_path, start, run, monkeypatch):
    whole, stopped, batches = tmp_path / "whole", tmp_path / "stopped", []
    options = {"start": start, "vocab": None, "layers": None, "hidden": None, "seed": 7}
    plain_step = pretrain.train_step

    def step(model, optimizer, batch, *args):
        batches.append(batch)
        if len(batches) == 24 + 7:  # not one of the twenty steps that are saved anyway
            os.kill(os.getpid(), signal.SIGTERM)
        return plain_step(model, optimizer, batch, *args)

    monkeypatch.setattr(pretrain, "train_step", step)
    assert run(whole, 24, **options).code == 0
    code, _, error = run(stopped, 24, **options)
    assert code == 143 and "to continue, add --resume" in error
    assert read_log(stopped)[-1]["step"] == 7
    before = contents(stopped)
    with locked(stopped):
        assert "is in use" in run(stopped, 24, resume=True, **options).err
    for changes, message in [
        (options, "is not empty; delete it"),
        ({"resume": True, "steps": 50}, "the run has {"),
    ]:
        refused = run(stopped, **changes)
        assert refused.code == 2 and message in refused.err and contents(stopped) == before
    (stopped / "best").rename(stopped / ".best.earlier")  # killed between two renames
    assert run(stopped, 24, resume=True, **options).code == 0
    assert [row for row in read_log(stopped) if row["step"] != 7] == read_log(whole)
    assert read_log(whole)[-1]["tokens"] == sum(batch.mask.sum() for batch in batches[:24])
    states = [load_state(out)[0] for out in (whole, stopped)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    continues = pretrain.continuing_pieces(tokenizer := Tokenizer(start))
    for number, batch in enumerate(batches[:24]):
        rng = torch.Generator().manual_seed(derive_seed(7, 2, number))
        expected = pretrain.mask_words(batch.x, tokenizer, continues, rng)
        assert torch.equal(batch.x_masked, expected[0])


def test_a_run_starts_from_another_model_or_from_its_vocabulary_alone(text, tmp_path, start, run):
    held_out = pretrain.hold_out(pretrain.read_documents([str(text)]), 0)[1]
    tokenizer = Tokenizer(start)
    for name, layers in (("same", 1), ("deeper", 2)):
        out = tmp_path / name
        assert run(out, start=start, vocab=None, layers=layers, hidden=None).code == 0
        assert Tokenizer(out / "best").vocabulary() == tokenizer.vocabulary()
        assert load_bert(out / "best", mlm=True).cfg.num_hidden_layers == layers
        expected = pretrain.score_held_out(load_bert(start, mlm=True), tokenizer, held_out)
        assert (read_log(out)[0]["loss"] == expected["loss"]) == (layers == 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab": 4000}, r"--vocab is 4000, but only \d+ pieces"),
        ({"minutes": 0}, "--minutes is 0; it must be above 0"),
        ({"minutes": "nan"}, "--minutes is nan"),
        ({"minutes": None}, "--minutes and --out are needed"),
        ({"hidden": 100}, "--hidden is 100; it must be a multiple of 64"),
        ({"hidden": 128}, "--hidden is 128; it must be at most --vocab"),
        ({"layers": 0}, "'0' is not a positive integer"),
        ({"seed": -1}, "--seed is -1"),
        ({"start": SMALL}, "not allowed with argument"),
        ({"text": "nowhere.txt"}, "cannot read nowhere.txt"),
        ({"out": ""}, "--minutes and --out are needed"),
        ({"resume": True}, "cannot write to .*: No such file"),
        ({"score": "nowhere/at/all"}, "no such model"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, run, changes, message):
    code, _, error = run(**{"out": tmp_path / "model"} | changes)
    assert code == 2 and not contents(tmp_path / "model")
    assert re.search(message, error) and error.count("\n") == 1


def test_a_run_is_saved_twenty_times_until_it_diverges(tmp_path, run, monkeypatch):
    losses = iter([(1.0, 2.0)] * 310 + [(math.nan, 1.0)])
    monkeypatch.setattr(pretrain, "train_step", lambda *args: next(losses))
    code, _, error = run(tmp_path / "model", 400)
    assert code == 2 and "NaN or infinite at step 311" in error
    assert load_state(tmp_path / "model")[1]["pretraining"]["step"] == 300
    log = read_log(tmp_path / "model")
    assert [row["step"] for row in log] == list(range(0, 301, 20))
    assert (log[-1]["mlm"], log[-1]["cls"]) == (1, 2)


def test_only_a_run_of_this_program_is_resumed(tmp_path, run):
    (tmp_path / "precious").write_text("mine")
    save_state(tmp_path, {}, {"name": "demo"})  # the state of another program
    before = contents(tmp_path)
    assert "has no run of lab.pretrain" in run(tmp_path, resume=True).err
    assert "is not empty" in run(tmp_path).err and contents(tmp_path) == before


def test_models_are_scored_without_training(text, tmp_path, command):
    model, tokenizer = load_bert(SMALL, mlm=True), Tokenizer(SMALL)
    held_out = pretrain.hold_out(pretrain.read_documents([str(text)]), 0)[1]
    expected = [{"model": str(SMALL), **pretrain.score_held_out(model, tokenizer, held_out)}]
    with torch.no_grad():
        model.head.bias += torch.randn(len(model.head.bias))
    save_bert(model, other := tmp_path / "other")
    tokenizer.save(other, 128)
    expected.append({"model": str(other), **pretrain.score_held_out(model, tokenizer, held_out)})
    printed = command(pretrain.main, "--text", text, "--score", SMALL, other).out
    assert [json.loads(line) for line in printed.splitlines()] == expected
