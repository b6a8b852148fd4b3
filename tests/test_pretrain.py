"""lab/pretrain.py: text to documents to vocabulary to batches, counting, both losses, the held-out score, and whole runs."""

import itertools
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
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

from bert import BertConfig, BertForMaskedLM, UserError, load_bert, read_safetensors
from data import Tokenizer
from lab import pretrain

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"
WORDS = "the a of and king queen river castle ship sea old young saw built crossed near under from city wall north south".split()


def paragraphs(n: int, seed: int = 0) -> list[str]:
    """Sentences of a small, regular language: of the pairs (old, king), (young, queen) the second word follows the first."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        rows.append(" ".join(" ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 12))).capitalize() + "." for _ in range(rng.randint(1, 4))))
    return rows


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    rows = paragraphs(600)
    path.write_text("\n\n".join("\n".join(rows[i : i + 3]) for i in range(0, 600, 3)), encoding="utf-8")
    return path


@pytest.fixture
def small_run(text, tmp_path):
    """Vocabulary and sentences of the small language."""
    documents, held_out = pretrain.hold_out(pretrain.read_documents([str(text)]), 0)
    tokenizer = pretrain.train_vocabulary(documents, 100, tmp_path / "vocabulary")
    return tokenizer, pretrain.tokenize(documents, tokenizer, 0), held_out


def flags(source, out, **changes) -> list[str]:
    options = {"text": str(source), "minutes": "0.05", "out": str(out), "vocab": "100", "layers": "1", "hidden": "64", "device": "cpu"} | changes
    return [part for name, value in options.items() for part in ([f"--{name}"] if value is True else [f"--{name}", value])]


def run(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lab.pretrain", *argv], cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


# ---------------------------------------------------------------------------------------------------- text


def test_documents_are_parted_by_empty_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\n\none\ntwo \n\n \t\nthree\n", encoding="utf-8")
    with lzma.open(tmp_path / "b.txt.xz", "wt", encoding="utf-8") as file:
        file.write("four\nfive")
    documents = pretrain.read_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.txt.xz")])
    assert documents == [["one", "two"], ["three"], ["four"], ["five"]]  # b has no empty line: a list of sentences


@pytest.mark.parametrize("sizes", [[1] * 50, [3] * 40, [1, 2, 30, 4] * 20, [1] * 20_000])
def test_held_out_paragraphs_are_whole_documents_and_not_trained_on(sizes):
    names = itertools.count()
    documents = [[str(next(names)) for _ in range(size)] for size in sizes]
    kept, held_out = pretrain.hold_out(documents, seed=1)
    wanted = min(1000, math.ceil(sum(sizes) / 10))
    assert len(held_out) == wanted
    trained_on = {p for d in kept for p in d}
    assert not trained_on & set(held_out)
    touched = [d for d in documents if set(d) & set(held_out)]
    assert len(kept) + len(touched) == len(documents) and not any(trained_on & set(d) for d in touched)
    assert pretrain.hold_out(documents, seed=1) == (kept, held_out)
    assert pretrain.hold_out(documents, seed=2)[1] != held_out


def test_the_vocabulary_is_what_transformers_reads(small_run, tmp_path):
    tokenizer, _, _ = small_run
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "vocabulary")
    assert tokenizer.vocab_size == len(theirs) == 100
    assert (tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (
        theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id)  # fmt: skip
    for sentence in ["The king saw a Río.", "", "unknown ☃ words, 3.14", "[MASK] of the castle"]:
        assert tokenizer([sentence], 64)[0] == theirs(sentence)["input_ids"]


# ---------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("longest", [8, 16, 64])
def test_rows_are_whole_sentences_in_order_within_a_document(small_run, text, monkeypatch, longest):
    tokenizer, _, _ = small_run
    monkeypatch.setattr(pretrain, "MAX_LENGTH", longest)
    documents = pretrain.read_documents([str(text)])
    documents += [[""], ["x " * 300], ["One. Two. Three. " * 40]]
    rows = pretrain.tokenize(documents, tokenizer, seed=4)
    rows = [rows.ids[a:b].tolist() for a, b in itertools.pairwise(rows.starts)]
    assert all(row[0] == tokenizer.cls and row[-1] == tokenizer.sep and len(row) <= longest for row in rows)
    assert not any({tokenizer.cls, tokenizer.sep, tokenizer.pad} & set(row[1:-1]) for row in rows)
    # Row after row they are the sentences of the documents, each cut to the longest, and no row has those of two documents.
    at = 0
    for document in documents:
        wanted = [tokenizer([s], longest)[0][1:-1] for paragraph in document for s in pretrain.split_sentences(paragraph)]
        found = []
        while len(found) < sum(map(len, wanted)):  # an empty document has none
            found += rows[at][1:-1]
            at += 1
        assert found == sum(wanted, [])
    assert at == len(rows)
    assert pretrain.tokenize(documents, tokenizer, seed=4).starts.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
    if longest == 64:
        lengths = np.array([len(row) for row in rows])
        assert (lengths < 32).sum() > 50 and (lengths >= 48).sum() > 20  # of many lengths


def test_batches_hold_every_sentence_once_an_epoch(small_run, monkeypatch):
    _, sentences, _ = small_run
    monkeypatch.setattr(pretrain, "BATCH_TOKENS", 300)
    lengths = np.diff(sentences.starts)
    seen, parts = [], []
    for rows in pretrain.batches(sentences, seed=3):
        parts.append(rows)
        seen += rows.tolist()
        if len(seen) == len(sentences):
            break
    assert sorted(seen) == list(range(len(sentences)))
    sizes = [lengths[rows].sum() for rows in parts]
    assert max(sizes) < 300 + 2 * lengths.max() and np.mean(sizes) > 250
    padding = [len(rows) * lengths[rows].max() for rows in parts]
    assert sum(padding) < 1.05 * sum(sizes)
    again = list(itertools.islice(pretrain.batches(sentences, seed=3), 2 * len(parts)))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again))
    assert [r.tolist() for r in again[len(parts) :]] != [r.tolist() for r in parts]  # another epoch, another order
    ids, mask = sentences.batch(parts[0])
    assert len(ids) == len(parts[0]) and mask.sum() == sizes[0]  # one view of each


# ---------------------------------------------------------------------------------------------------- counting


def test_positive_pmi_against_counting_by_hand(small_run):
    tokenizer, sentences, _ = small_run
    pairs, V = Counter(), tokenizer.vocab_size
    for i in range(len(sentences)):
        ids = sentences.ids[sentences.starts[i] : sentences.starts[i + 1]].tolist()
        for a, b in itertools.permutations(range(len(ids)), 2):
            if abs(a - b) <= 5 and not {ids[a], ids[b]} & set(tokenizer.special_ids):
                pairs[ids[a], ids[b]] += 1
    total = sum(pairs.values())
    of_word = [sum(n for (a, _), n in pairs.items() if a == w) for w in range(V)]
    smoothed = sum(n**0.75 for n in of_word)
    expected = np.zeros((V, V))
    for (a, b), n in pairs.items():
        expected[a, b] = max(0, math.log(n / total / (of_word[a] / total) / (of_word[b] ** 0.75 / smoothed)))
    assert (expected > 0).sum() > 50
    np.testing.assert_allclose(pretrain.positive_pmi(sentences, tokenizer).numpy(), expected, atol=1e-5)


def test_a_new_model_starts_from_the_counts(small_run):
    tokenizer, sentences, _ = small_run
    torch.manual_seed(0)
    model = pretrain.new_model(tokenizer, sentences, layers=1, hidden=64)
    words = model.bert.embeddings.word.weight.double()
    assert words.std().item() == pytest.approx(0.05, rel=0.01)
    pmi = pretrain.positive_pmi(sentences, tokenizer).double()
    U, S, _ = torch.linalg.svd(pmi)  # the exact one; U sqrt(S) has the inner products U S U'
    magnitude = U[:, :64] @ S[:64].diag() @ U[:, :64].T
    products = words @ words.T
    np.testing.assert_allclose((products / products.norm()).detach().numpy(), (magnitude / magnitude.norm()).numpy(), atol=1e-4)
    counts = np.bincount(sentences.ids, minlength=100) + 1
    np.testing.assert_allclose(model.head.bias.detach().numpy(), np.log(counts / counts.sum()), atol=1e-5)


# ---------------------------------------------------------------------------------------------------- losses


@pytest.fixture(scope="module")
def theirs():
    return transformers.BertForMaskedLM.from_pretrained(SMALL, dtype=torch.float32).eval()


def test_losses_against_transformers_and_a_loop(theirs):
    tokenizer, model = Tokenizer(SMALL), load_bert(SMALL, mlm=True)
    rows = tokenizer(["A man is playing a guitar.", "", "The the the THE cat!", "Ünïcödé ☃ unknown", "x" * 200], 40)
    T = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad] * (T - len(row)) for row in rows])
    mask = ids != tokenizer.pad
    generator = torch.Generator().manual_seed(0)
    masked, selected = pretrain.mask_tokens(ids, tokenizer, 0.4, "80-10-10", generator)
    weights = torch.rand(tokenizer.vocab_size, generator=generator)
    weights[tokenizer.special_ids] = 0
    mlm, bag = pretrain.losses(model, ids, masked, selected, mask, weights)
    out = theirs(input_ids=masked, attention_mask=mask.long(), labels=torch.where(selected, ids, -100))
    assert mlm.item() == pytest.approx(out.loss.item(), abs=1e-5)
    log_p = out.logits[:, 0].log_softmax(-1)
    expected = [(-log_p[r, token].item(), weights[token].item()) for r, row in enumerate(rows) for token in row if token not in tokenizer.special_ids]
    surprisals, counts = zip(*expected)
    assert bag.item() == pytest.approx(np.average(surprisals, weights=counts), abs=1e-5)
    with torch.no_grad():  # rows of nothing but special tokens, which have no weight: 0, not nan
        only_special = ids.where(torch.isin(ids, torch.tensor(tokenizer.special_ids)), tokenizer.unk)
        assert pretrain.losses(model, only_special, masked, selected, mask, weights)[1].item() == 0


def test_weight_of_cls_is_small_then_large_then_falls_to_0():
    weights = [pretrain.bag_weight(done) for done in np.linspace(0, 1, 11)]
    np.testing.assert_allclose(weights, [0.1] * 7 + [4, 8 / 3, 4 / 3, 0], atol=1e-12)


def test_word_weights_fall_with_frequency():
    tokenizer = Tokenizer(SMALL)
    texts = ["the the the cat", "the dog the ☃"]
    sentences = pretrain.TokenizedSentences(((text,) for text in texts), tokenizer, 40)
    weights = pretrain.word_weights(sentences, tokenizer)
    the, cat, unseen = (tokenizer.vocabulary()[word] for word in ("the", "cat", "house"))
    assert weights[tokenizer.special_ids].tolist() == [0] * 5
    rare = pretrain.RARE  # 7 words that are no special token: 5 of them "the"
    np.testing.assert_allclose(weights[[the, cat, unseen]], [rare / (rare + 5 / 7), rare / (rare + 1 / 7), 1], rtol=1e-6)


def test_both_losses_reach_the_encoder():
    tokenizer = Tokenizer(SMALL)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=8192, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64))
    ids = torch.tensor(tokenizer(["the cat sat on the mat"], 20))
    selected = torch.zeros_like(ids, dtype=torch.bool)
    selected[0, 2] = True
    for number in (0, 1):
        model.zero_grad()
        pretrain.losses(model, ids, ids, selected, torch.ones_like(selected), torch.ones(8192))[number].backward()
        assert model.bert.layers[0].up.weight.grad.norm() > 1e-6


def test_held_out_score_against_a_loop_on_transformers(theirs):
    tokenizer, model = Tokenizer(SMALL), load_bert(SMALL, mlm=True)
    known = "The city is the capital of the United States and one of the most important cities in the world. He was born in New York."
    text = [*(paragraphs(12) + [known] * 10 + ["Señor Ünïcödé wrote 3,141 extraordinarily unpronounceable words about xylophones ☃ quietly."] * 3),
            " ".join(["antidisestablishmentarianism"] * 50), ""]  # fmt: skip
    result = pretrain.held_out_scores(*pretrain.held_out_words(model, tokenizer, text))

    # The same words, found without word_ids: the pieces of one are those that begin with ##.
    fast = transformers.AutoTokenizer.from_pretrained(SMALL)
    rng, losses, right = np.random.default_rng(0), [], []
    for paragraph in text:
        words = paragraph.split()
        for start in range(0, len(words), 32):
            stretch = " ".join(words[start : start + 32])
            whole = [w for w, _ in fast.backend_tokenizer.pre_tokenizer.pre_tokenize_str(stretch.lower())]
            ids = fast(stretch)["input_ids"]
            pieces, spans = fast.convert_ids_to_tokens(ids), []
            for position, piece in enumerate(pieces[1:-1], 1):
                if piece.startswith("##"):
                    spans[-1].append(position)
                else:
                    spans.append([position])
            assert len(spans) == len(whole)
            spans = [s for s, word, yes in zip(spans, whole, rng.random(len(spans)) < 0.15) if yes and re.fullmatch("[a-z]+", word)]
            spans = [s for s in spans if s[-1] < 128]
            row = torch.tensor([ids])[:, :128]
            hidden = row.clone()
            hidden[0, [p for s in spans for p in s]] = tokenizer.mask
            with torch.no_grad():
                log_p = theirs(input_ids=hidden).logits[0].log_softmax(-1)
            for span in spans:
                losses.append(-sum(log_p[p, row[0, p]].item() for p in span))
                right.append(all(log_p[p].argmax() == row[0, p] for p in span))
    assert len(losses) == result["words"] >= 40
    assert result["loss"] == pytest.approx(np.mean(losses), abs=1e-3) and result["accuracy"] == pytest.approx(np.mean(right), abs=1e-3)
    assert any(right)


def test_training_learns(small_run):
    tokenizer, sentences, _ = small_run
    torch.manual_seed(0)
    model = pretrain.new_model(tokenizer, sentences, layers=1, hidden=64).train()
    model.bert.set_dropout(0.0)
    optimizer = torch.optim.AdamW(model.parameters())
    generator, curve = torch.Generator().manual_seed(0), []
    for rows in itertools.islice(pretrain.batches(sentences, 0), 60):
        ids, mask = sentences.batch(rows)
        masked, selected = pretrain.mask_tokens(ids, tokenizer, 0.2, "80-10-10", generator)
        curve.append(pretrain.train_step(model, optimizer, (ids, masked, selected, mask), torch.ones(tokenizer.vocab_size), 0.1, bf16=False))
    first, last = np.mean(curve[:5], axis=0), np.mean(curve[-5:], axis=0)
    assert (last < first - 0.1).all(), (first, last)


def test_the_rate_rises_and_falls():
    shape = [pretrain.rate(done) for done in np.linspace(0, 1, 1001)]
    assert shape[0] == 0 and max(shape) == pytest.approx(pretrain.RATE) and shape[-1] == pytest.approx(0)
    peak = int(np.argmax(shape))
    assert (np.diff(shape[: peak + 1]) > 0).all() and (np.diff(shape[peak:]) < 0).all()


# ---------------------------------------------------------------------------------------------------- whole runs


def test_a_run_starts_from_another_model_or_from_its_vocabulary_alone(text, tmp_path):
    first = tmp_path / "first"
    assert run(*flags(text, first, minutes="0.03")).returncode == 0
    held = json.loads((first / "log.jsonl").read_text().splitlines()[-1])["loss"]
    options = {"start": str(first), "minutes": "0.02"}

    def made(out, **more) -> list[dict]:
        argv = flags(text, out, **options | more)
        for flag in ("--vocab", *({"--layers", "--hidden"} - {f"--{name}" for name in more})):
            del argv[argv.index(flag) : argv.index(flag) + 2]
        done = run(*argv)
        assert done.returncode == 0, done.stderr
        assert Tokenizer(out).vocabulary() == Tokenizer(first).vocabulary()
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    assert made(tmp_path / "on")[0]["loss"] == pytest.approx(held, abs=1e-3)  # fp16 in the file: it goes on where the other stands
    assert load_bert(tmp_path / "on", mlm=True).cfg == load_bert(first, mlm=True).cfg
    assert made(tmp_path / "deeper", layers="2")[0]["loss"] > held + 0.1 and load_bert(tmp_path / "deeper", mlm=True).cfg.num_hidden_layers == 2
    refused = run(*flags(text, tmp_path / "no", **options))
    assert refused.returncode == 2 and "--vocab is 100: the vocabulary is that of --start" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_run_leaves_a_folder_for_transformers_and_can_go_on(text, tmp_path):
    out = tmp_path / "model"
    done = run(*flags(text, out))
    assert done.returncode == 0, done.stderr
    assert "minutes left: held-out loss" in done.stdout
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 0 and rows[-1]["tokens"] > 0 and rows[-1]["loss"] < rows[0]["loss"]
    theirs, info = transformers.BertForMaskedLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor(Tokenizer(out)(["the king saw a castle"], 20))
    with torch.no_grad():
        ours = load_bert(out, mlm=True)(ids)
        np.testing.assert_allclose(ours, theirs.eval()(input_ids=ids).logits, atol=1e-5)
    assert {tensor.dtype for tensor in read_safetensors(out / "model.safetensors").values()} == {torch.float16}  # half the file, computed in fp32
    assert next(iter(transformers.BertForMaskedLM.from_pretrained(out, dtype="auto").parameters())).dtype == torch.float32

    before = {file.name: file.read_bytes() for file in out.iterdir()}
    refused = run(*flags(text, out))
    assert refused.returncode == 2 and "--resume" in refused.stderr and "--overwrite" in refused.stderr
    refused = run(*flags(text, out, resume=True))
    assert refused.returncode == 2 and "to go on, give more" in refused.stderr
    refused = run(*flags(text, out, resume=True, minutes="1", hidden="128"))
    assert refused.returncode == 2 and "--hidden is 128" in refused.stderr
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}

    resumed = run(*flags(text, out, resume=True, minutes="0.08"))
    assert resumed.returncode == 0, resumed.stderr
    more = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert more[: len(rows)] == rows and more[-1]["step"] > rows[-1]["step"] and more[-1]["minutes"] > rows[-1]["minutes"]
    replaced = run(*flags(text, out, overwrite=True, minutes="0.02"))
    assert replaced.returncode == 0, replaced.stderr
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["minutes"] < 0.04


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_stopped_run_is_saved_and_goes_on(text, tmp_path, number, code):
    out = tmp_path / "model"
    process = subprocess.Popen([sys.executable, "-m", "lab.pretrain", *flags(text, out, minutes="5")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
    for line in process.stdout:
        if "5.0 minutes left" in line:
            break
    time.sleep(2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "--resume goes on" in errors and "Traceback" not in errors
    steps = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert steps >= 1
    resumed = run(*flags(text, out, resume=True, minutes="0.08"))
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] > steps


@pytest.mark.parametrize("changes, message", [
    ({"vocab": "4000"}, r"--vocab is 4000, and the text has only \d+ pieces"),
    ({"minutes": "0.000001"}, "shorter than one step"),
    ({"minutes": "0"}, "--minutes is 0"),
    ({"minutes": "nan"}, "--minutes is nan"),
    ({"hidden": "100"}, "--hidden is 100"),
    ({"layers": "0"}, "--layers is 0"),
    ({"text": "nowhere.txt"}, "nowhere.txt is not there"),
    ({"resume": True}, "nothing to resume"),
])  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(text, tmp_path, changes, message):
    out = tmp_path / "model"
    done = run(*flags(text, out, **changes))
    assert done.returncode == 2 and not out.exists()
    assert re.search(message, done.stderr) and len(done.stderr.strip().splitlines()) == 1


def test_scoring_models_without_training(text, tmp_path):
    model, tokenizer = load_bert(SMALL, mlm=True), Tokenizer(SMALL)
    held_out = pretrain.hold_out(pretrain.read_documents([str(text)]), 0)[1]
    expected = [pretrain.held_out_words(model, tokenizer, held_out)]
    torch.manual_seed(0)
    with torch.no_grad():
        model.head.bias += torch.randn(len(model.head.bias))
    pretrain.save_bert(model, tmp_path / "other")
    for file in tokenizer.files:
        shutil.copy(file, tmp_path / "other")
    expected.append(pretrain.held_out_words(model, tokenizer, held_out))
    rows = [json.loads(line) for line in run("--text", str(text), "--score", str(SMALL), str(tmp_path / "other")).stdout.splitlines()]
    assert rows[0] == {"model": str(SMALL), **pretrain.held_out_scores(*expected[0])}
    test = scipy.stats.ttest_rel(expected[1][0].numpy(), expected[0][0].numpy())
    assert rows[1]["loss_minus_first"] == pytest.approx(rows[1]["loss"] - rows[0]["loss"], abs=2e-4)
    assert rows[1]["loss_minus_first"] / rows[1]["standard_error"] == pytest.approx(test.statistic, rel=1e-2)
    assert run("--text", str(text), "--score", "nowhere/at/all").returncode == 2
    assert "--minutes and --out are needed" in run("--text", str(text)).stderr


@pytest.mark.parametrize("content, message", [("", "no text in it"), (" \n\n\t\n", "no text in it"), ("only one line", "more are needed")])
def test_too_little_text(tmp_path, content, message):
    (tmp_path / "little.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        pretrain.hold_out(pretrain.read_documents([str(tmp_path / "little.txt")]), 0)


def test_overwriting_begins_only_when_the_new_run_works(text, tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "precious").write_text("mine")
    for changes in ({"vocab": "4000"}, {"minutes": "0.000001"}):
        assert run(*flags(text, out, overwrite=True, **changes)).returncode == 2
        assert (out / "precious").read_text() == "mine"
    assert "holds no state.pt" in run(*flags(text, out, resume=True)).stderr
    (out / "state.pt").write_bytes(b"not a state")
    assert "cannot be read" in run(*flags(text, out, resume=True)).stderr
