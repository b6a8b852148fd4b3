"""diffcse.py: the losses, the edit, a run from end to end, the command line, and bad input. (The step: test_step.py.)"""

import ast
import dataclasses
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import bert
import config
import data
import diffcse
import embed
import fast
from bert import UserError
from config import PRESETS, Config, parse_args, parse_field
from diffcse import contrastive_loss, edit_sentences, replaced_token_loss

ROOT = Path(__file__).parent.parent
SMALL = str(ROOT / "assets" / "small-bert")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the a dog cat house tree runs sleeps eats big small red blue and in on . ,".split()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model folder of 2 layers of 16 with a vocabulary of 23, and 50 sentences beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    cfg = bert.BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                          max_position_embeddings=40, initializer_range=0.2)  # fmt: skip
    bert.save_bert(bert.BertForMaskedLM(cfg), folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text("".join(" ".join(rng.choice(WORDS[5:], rng.integers(0, 12))) + "\n" for _ in range(50)))
    return folder


class Score:
    """Stands for STS: scores as given, one after the other; the encoder is asked all the same."""

    name = "made score"
    values = [1.0, 2.0, 3.0]

    def __init__(self, cfg):
        self.left = list(self.values)

    def dev(self, encoder):
        vectors = encoder(["the dog runs .", "a big house"])
        return {"score": self.left.pop(0) if self.left else float(vectors[0, 0])}

    def test(self, encoder):
        return {"first": float(encoder(["the cat"])[0, 0])}

    def report(self, rows):
        return str(rows)


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """run(**changes): train on the tiny model, scored by Score."""
    monkeypatch.setattr(diffcse, "StsScore", Score)

    def run(**changes):
        options = dict(model=str(tiny), generator=str(tiny), train_file=str(tiny / "text.txt"), batch_size=16, steps=5, eval_every=2,
                       log_every=2, lr=1e-3, out_dir=str(tmp_path / "out"), lam=0.05, device="cpu")  # fmt: skip
        return diffcse.train(Config(**options | changes).check())

    return run


def log_of(folder) -> list[dict]:
    def no_nan(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=no_nan) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("V", [2, 3])
def test_contrastive_loss_equals_multiple_negatives_ranking_loss(V):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        B, D = int(torch.randint(2, 12, (), generator=g)), int(torch.randint(1, 40, (), generator=g))
        h = torch.randn(B, V, D, generator=g, dtype=torch.float64) * 10.0 ** torch.randint(-3, 3, (B, V, 1), generator=g)
        theirs = MultipleNegativesRankingLoss(None, scale=20.0).compute_loss_from_embeddings(list(h.unbind(1)), None)
        loss, cosines, positive = contrastive_loss(h, 0.05)
        torch.testing.assert_close(loss, theirs, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(cosines, F.cosine_similarity(h[:, None, 0], h[None, :, 1], dim=-1))
        torch.testing.assert_close(positive, cosines.diagonal())


def test_contrastive_loss_by_hand():
    """Two sentences at right angles, views equal: each row of logits is (20, 0), and -log softmax is log(1 + e^-20)."""
    h = torch.eye(2)[:, None].repeat(1, 2, 1)
    assert contrastive_loss(h, 0.05)[0].item() == pytest.approx(math.log1p(math.exp(-20)), abs=1e-7)
    assert contrastive_loss(h[:1], 0.05)[0] == 0  # alone, a sentence has nothing to be told from
    torch.manual_seed(0)
    assert contrastive_loss(torch.randn(256, 2, 4096), 1.0)[0].item() == pytest.approx(math.log(256), abs=0.01)  # views that tell nothing


def test_hard_negative_weight_is_added_to_a_sentences_own_negative_only():
    h = torch.randn(4, 3, 8, dtype=torch.float64)
    z = F.normalize(h, dim=-1)
    logits = torch.cat([z[:, 0] @ z[:, 1].T, z[:, 0] @ z[:, 2].T], 1) / 0.1
    logits[range(4), range(4, 8)] += 2.5
    torch.testing.assert_close(contrastive_loss(h, 0.1, 2.5)[0], F.cross_entropy(logits, torch.arange(4)))


def test_pads_in_loss_and_reduction():
    logits, mask = torch.randn(3, 6, 2), torch.arange(6) < torch.tensor([[6], [4], [2]])
    replaced = (torch.rand(3, 6) < 0.5) & mask
    wider = [F.pad(t, (0, 0, 0, 3)) if t.dim() == 3 else F.pad(t, (0, 3)) for t in (logits, replaced, mask)]
    assert replaced_token_loss(*wider, pads_in_loss=False) == pytest.approx(replaced_token_loss(logits, replaced, mask, False).item())
    assert replaced_token_loss(*wider) != pytest.approx(replaced_token_loss(logits, replaced, mask).item())  # as published
    for pads, count in ((True, 18), (False, 12)):
        mean, total = (replaced_token_loss(logits, replaced, mask, pads, how) for how in ("mean", "sum"))
        assert total.item() == pytest.approx(count * mean.item(), rel=1e-6)


def test_batchnorm_projector_makes_every_dimension_mean_0_and_variance_1():
    torch.manual_seed(0)
    projector = diffcse.make_projector("batchnorm", 64, 0.02).train()
    h = projector(5 + 3 * torch.randn(32, 64))
    assert h.mean(0).abs().max() < 1e-5 and (h.var(0, unbiased=False) - 1).abs().max() < 2e-2
    assert not projector[-1].affine and projector[1].affine and projector[0].weight.shape == (128, 64) and projector[0].bias is None
    assert projector[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    tanh = diffcse.make_projector("tanh", 64, 0.02)
    assert tanh[0].weight.std().item() == pytest.approx(0.02, rel=0.1) and not tanh[0].bias.any() and isinstance(tanh[1], torch.nn.Tanh)


# ------------------------------------------------------------------------------------------------------ the edit


class Fixed(torch.nn.Module):
    """A generator that always gives the same logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def fill(self, ids, mask, tokens, wanted, vocabulary, temperature):
        return fast.best_words(torch.zeros(len(wanted), 1), torch.zeros(vocabulary, 1), self.logits, temperature)


TOKENS = types.SimpleNamespace(cls=2, sep=3, pad=0, mask=4, unk=1, vocab_size=10, special_ids=[0, 1, 2, 3, 4])


def edit(generator, **switches):
    x = torch.tensor([[2, 5, 6, 7, 3, 0], [2, 8, 3, 0, 0, 0]])
    mask, selected = x != 0, torch.tensor([[0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    before = x.clone()
    edited, replaced = edit_sentences(generator, x, torch.where(selected, 4, x), selected, mask, TOKENS, Config(**switches))
    assert torch.equal(x, before) and not replaced[:, 0].any() and not replaced[~mask].any() and not edited[~mask].any()
    assert torch.equal(replaced, (edited != x) & mask)
    return edited.tolist()


def test_edit_switches():
    always_8 = Fixed(F.one_hot(torch.tensor(8), 10).float())
    assert edit(always_8) == [[2, 8, 8, 8, 8, 0], [2, 8, 8, 0, 0, 0]]  # published: everywhere, [SEP] too; the 8 is not "replaced"
    assert edit(always_8, protect_sep=True) == [[2, 8, 8, 8, 3, 0], [2, 8, 3, 0, 0, 0]]
    assert edit(always_8, edit_scope="masked") == [[2, 8, 6, 7, 3, 0], [2, 8, 3, 0, 0, 0]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_generators_probabilities(temperature):
    torch.manual_seed(0)
    logits, n = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf]), 20_000
    x = torch.ones(1, n + 1, dtype=torch.long)
    cfg = Config(edit="sample", edit_temperature=temperature)
    tokens = types.SimpleNamespace(**{**vars(TOKENS), "vocab_size": 5})
    edited, _ = edit_sentences(Fixed(logits), x, x, x.bool(), x.bool(), tokens, cfg)
    share = torch.bincount(edited[0, 1:], minlength=5) / n
    p = (logits / temperature).softmax(0)
    assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-12).all()


# ------------------------------------------------------------------------------------------------------- gradients


def training_model(tiny, **switches):
    torch.manual_seed(3)
    model, tokenizer = diffcse.build(Config(model=str(tiny), generator=str(tiny), **switches))
    ids, mask = data.TokenizedSentences(data.read_sentences(tiny / "text.txt"), tokenizer, 32).batch(np.arange(8))
    masked, selected = data.mask_tokens(ids, tokenizer, 0.5, "80-10-10", torch.Generator().manual_seed(0))
    return model.train(), (ids, mask, masked, selected)


def test_gradient_of_the_difference_reaches_the_encoder_through_h_alone(tiny, monkeypatch):
    def encoder_gradient():
        model, batch = training_model(tiny, lam=1.0)
        monkeypatch.setattr(diffcse, "contrastive_loss", lambda h, *_: (h.sum() * 0, h.detach().sum(-1), h.detach().sum(-1).sum(0)))
        before = [p.clone() for p in model.generator.parameters()]
        model(*batch)[0].backward()
        assert all(p.grad is None for p in model.generator.parameters())
        assert all(map(torch.equal, before, model.generator.parameters()))
        assert model.head.weight.grad.abs().sum() > 0
        return sum(float(p.grad.abs().sum()) for p in model.encoder.parameters() if p.grad is not None)

    assert encoder_gradient() > 1e-6
    forward = bert.Bert.forward
    monkeypatch.setattr(bert.Bert, "forward", lambda self, ids, mask=None, cls_vector=None, **more: forward(
        self, ids, mask, cls_vector if cls_vector is None else cls_vector.detach(), **more))  # fmt: skip
    assert encoder_gradient() == 0


@pytest.mark.parametrize("dropout, differ", [(True, True), (False, False)])
def test_generator_dropout_switch(tiny, dropout, differ):
    model, (ids, mask, masked, selected) = training_model(tiny, generator_dropout=dropout)
    logits = [model.generator(masked, mask) for _ in range(2)]
    assert model.encoder.training and model.generator.training == dropout
    assert torch.equal(*logits) != differ


def test_lambda_0_is_simcse_and_builds_nothing_else(tiny):
    model, batch = training_model(tiny, lam=0.0, dropout=0.0)
    assert model.generator is None and model.discriminator is None and not hasattr(model, "head")
    diffcse.build(Config(model=str(tiny), generator="no such generator", lam=0.0))
    h = model.projector(model.encoder(*batch[:2])[:, 0])
    assert torch.allclose(model(*batch)[0], contrastive_loss(h.view(8, 2, -1), 0.05)[0])


def test_step_is_adamw_without_weight_decay_after_clipping(tiny):
    model, batch = training_model(tiny, dropout=0.0, generator_dropout=False, projector="tanh", clip=0.1)
    twin, _ = training_model(tiny, dropout=0.0, generator_dropout=False, projector="tanh", clip=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    model.double(), twin.double()
    moments = {}
    for t, lr in ((1, 3e-3), (2, 2e-3), (3, 1e-3)):
        diffcse.set_rate(optimizer, lr)
        sums = diffcse.train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch, None, 2, None)
        twin.zero_grad()
        twin(*batch)[0].backward()
        grads = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        torch.testing.assert_close(sums["grad_norm"], norm)
        assert norm > 0.1
        for name, p in twin.named_parameters():
            if name in grads:  # Adam by hand, of the gradient scaled down to the norm 0.1
                g = grads[name] * 0.1 / (norm + 1e-6)
                m, v = moments.get(name, (0, 0))
                m, v = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                p.data -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if not name.endswith("key.bias"):  # softmax does not see it: its gradient is rounding, which Adam makes large
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))])
def test_step_under_bf16_is_near_fp32(tiny, device):
    model, batch = training_model(tiny, dropout=0.0, generator_dropout=False)
    model, batch = model.to(device), [t.to(device) for t in batch]
    plain = model(*batch)[0]
    with torch.autocast(device, torch.bfloat16):
        half = model(*batch)[0]
    assert half != plain
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------------------ whole runs


def test_a_run_leaves_a_model_a_log_and_results(run, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Score, "values", [7.0, 5.0, 5.0, 4.0])  # before; then steps 2, 4 and the last, 5
    results, out = run(), tmp_path / "out"
    assert results == json.loads((out / "results.json").read_text())
    assert (results["dev_before"], results["dev_best"], results["best_step"]) == (7.0, 5.0, 2)  # only what is strictly better is kept
    assert "training did not beat its start" in capsys.readouterr().out
    log = log_of(out)
    assert log[0]["step"] == 0 and log[0]["score"] == 7.0 and [row["step"] for row in log if "score" in row] == [0, 2, 4, 5]
    assert {row["step"]: row["lr"] for row in log if "lr" in row} == pytest.approx({1: 1e-3, 2: 8e-4, 4: 4e-4, 5: 2e-4})  # full rate first
    row = log[1]
    assert row["loss"] == pytest.approx(row["contrastive"] + 0.05 * row["prediction"], abs=1e-5)
    assert 0.3 < row["prediction"] < 1.5 and 0 < row["share_replaced"] <= 1 and 0 <= row["accuracy_kept"] <= 1 and row["grad_norm"] > 0
    assert Config(**json.loads((out / "config.json").read_text())).lam == 0.05

    sentences = ["the dog runs .", "", "a cat and a tree in the big red house", "unknown words"]
    ours = embed.DiffCSE(str(out / "best"), device="cpu").encode(sentences, normalize_to_unit=False)
    tokens = transformers.AutoTokenizer.from_pretrained(out / "best")(sentences, padding=True, return_tensors="pt")
    theirs = transformers.AutoModel.from_pretrained(out / "best", add_pooling_layer=False).eval()(**tokens).last_hidden_state[:, 0]
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-5)
    assert results["after"]["first"] == pytest.approx(embed.DiffCSE(str(out / "best"), "cpu").encode("the cat", normalize_to_unit=False)[0].item(), abs=1e-6)
    assert not list(out.rglob("*.tmp"))


def test_one_seed_decides_everything(run, tmp_path):
    def what_came_out(name, **changes):
        run(out_dir=str(tmp_path / name), **changes)
        rows = [{k: v for k, v in row.items() if "second" not in k} for row in log_of(tmp_path / name)]
        return rows, bert.read_safetensors(tmp_path / name / "best" / "model.safetensors")

    (log1, weights1), (log2, weights2), (log3, _) = what_came_out("1", seed=1), what_came_out("2", seed=1), what_came_out("3", seed=2)
    assert log1 == log2 and all(torch.equal(weights1[n], weights2[n]) for n in weights1) and log1 != log3


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_files_with_one_two_and_three_columns_train(run, tmp_path, columns):
    rows = [",".join(["the dog runs", "a dog runs", "the house ."][:columns])] * 20 + [",".join(["a red tree", "a tree", ""][:columns])] * 20
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,c"[: 2 * columns - 1], *rows]) + "\n")
    assert run(train_file=str(tmp_path / "rows.csv"), views="first")["best_step"] > 0


@pytest.mark.parametrize("text, says", [("", "no sentences"), ("one alone\n", "at least 2"), (b"good\nb\xffd\n", "line 2: not UTF-8")])
def test_train_files_that_cannot_be_used(run, tmp_path, text, says):
    (tmp_path / "bad.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=says):
        run(train_file=str(tmp_path / "bad.txt"))
    assert not (tmp_path / "out").exists()  # nothing is begun before it can be done


def test_odd_train_files_that_can(run, tmp_path, capsys):
    """Shorter than a batch, empty lines, ten thousand words, no final newline."""
    (tmp_path / "odd.txt").write_text("\n\nthe dog\n" + "big " * 10_000 + "\n\na cat")
    assert run(train_file=str(tmp_path / "odd.txt"))["steps"] == 5
    assert "6 sentences, fewer than --batch-size 16" in capsys.readouterr().err


def test_a_loss_that_is_not_a_number_at_once(run, monkeypatch):
    monkeypatch.setattr(diffcse, "contrastive_loss", lambda h, *_: (h.sum() * math.nan, h.sum(-1), h.sum(-1).sum(0)))
    with pytest.raises(UserError, match="step 1: .*no model had been kept yet"):
        run()


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_model(run, tmp_path, monkeypatch):
    steps, forward = [], diffcse.TrainingModel.forward

    def break_at_step_4(self, *args):
        steps.append(1)
        loss, sums = forward(self, *args)
        return (loss * math.nan, sums | {"loss": loss.detach() * math.nan}) if len(steps) == 4 else (loss, sums)

    monkeypatch.setattr(diffcse.TrainingModel, "forward", break_at_step_4)
    with pytest.raises(UserError, match="not a number at step 4.*best holds the model of step 2"):
        run(steps=20, log_every=10, eval_every=2)
    assert torch.isfinite(embed.DiffCSE(str(tmp_path / "out" / "best"), "cpu").encode("a dog")).all()


@pytest.mark.parametrize("changes, says", [
    ({"generator": SMALL}, "another vocabulary"), ({"max_length": 41}, "position embeddings for 40"), ({"model": "no/such/model"}, "no such model folder"),
    ({"device": "cuda"}, "finds none"), ({"amp": "fp16"}, "is not for cpu; .* bf16"), ({"train_file": "none.txt"}, "no such sentence file"),
])  # fmt: skip
def test_parts_that_do_not_fit(run, changes, says):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(UserError, match=says):
        run(**changes)


def test_mixed_precision_on_a_cpu(run, tmp_path):
    run()
    run(amp="bf16", out_dir=str(tmp_path / "half"))
    plain, half = log_of(tmp_path / "out"), log_of(tmp_path / "half")
    assert [row["loss"] for row in plain if "loss" in row] != [row["loss"] for row in half if "loss" in row]
    assert half[1]["loss"] == pytest.approx(plain[1]["loss"], rel=0.05)  # the first step: the same weights, the same dropout
    assert {t.dtype for t in bert.load_bert(tmp_path / "half" / "best").state_dict().values()} == {torch.float32}
    assert diffcse.pick_device(Config(device="cpu")) == (torch.device("cpu"), None)  # bf16 only where asked for


def test_a_tokenizer_larger_than_the_model(run, tiny, tmp_path):
    folder = tmp_path / "model"
    bert.save_bert(bert.load_bert(tiny, mlm=True), folder)
    (folder / "vocab.txt").write_text("\n".join([*WORDS, "more"]))
    with pytest.raises(UserError, match="do not belong together"):
        run(model=str(folder))


def test_an_existing_run_is_never_written_over(run, tmp_path):
    run()
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(UserError, match="there already"):
        run()
    assert (tmp_path / "out" / "results.json").read_bytes() == before


# ------------------------------------------------------------------------------------------- presets and command line


def test_presets_are_the_papers():
    """Tables 12 and 13: rate, mask ratio, lambda, batch; everything else as published."""
    table = {"bert_sts": (7e-6, 0.30, 0.005, 64), "roberta_sts": (1e-5, 0.20, 0.005, 64),
             "bert_transfer": (2e-6, 0.15, 0.05, 64), "roberta_transfer": (3e-6, 0.15, 0.05, 128)}  # fmt: skip
    for name, numbers in table.items():
        c = PRESETS[name]
        assert (c.lr, c.mask_ratio, c.lam, c.batch_size) == numbers
        assert (c.epochs, c.temperature, c.max_length, c.clip, c.projector, c.seed, c.eval_every) == (2, 0.05, 32, 1.0, "batchnorm", 42, 125)
        assert (c.edit, c.edit_scope, c.mask, c.reduction, c.views) == ("argmax", "all", "80-10-10", "mean", "both")
        assert c.generator_dropout and c.pads_in_loss and not c.protect_sep and c.dropout is None
        assert (c.model, c.generator) == (("roberta-base", "distilroberta-base") if "roberta" in name else ("bert-base-uncased", "distilbert-base-uncased"))
    for name, lr, batch in (("simcse_bert", 3e-5, 64), ("simcse_roberta", 1e-5, 512)):
        c = PRESETS[name]
        assert (c.lr, c.batch_size, c.lam, c.projector, c.epochs) == (lr, batch, 0, "tanh", 1)


def test_every_field_is_a_flag_with_its_meaning():
    assert list(config.field_help()) == [field.name for field in dataclasses.fields(Config)]
    shown = subprocess.run([sys.executable, "diffcse.py", "-h"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and all("--" + f.name.replace("_", "-") in shown.stdout for f in dataclasses.fields(Config))
    assert all(name in shown.stdout for name in PRESETS)


def test_flags_and_saved_configs(tmp_path):
    name, cfg = parse_args(["--config", "bert_sts", "--protect-sep", "on", "--lr", "1e-4", "--steps", "7", "--mask", "all"])
    assert name == "bert_sts" and cfg == dataclasses.replace(PRESETS["bert_sts"], protect_sep=True, lr=1e-4, steps=7, mask="all")
    (tmp_path / "c.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    assert parse_args(["--config", str(tmp_path / "c.json")])[1] == cfg
    for saved, says in (({"lrr": 1}, "unknown field 'lrr'"), ({"lr": "fast"}, "--lr"), ({"steps": 1.5}, "whole number"), ({"seed": True}, "--seed")):
        (tmp_path / "c.json").write_text(json.dumps(saved))
        with pytest.raises(UserError, match=says) as error:
            parse_args(["--config", str(tmp_path / "c.json")])
        assert "c.json" in str(error.value)
    for words, expected in ((["--compile"], True), (["--no-compile"], False), (["--compile", "off"], False), (["--compile", "--steps", "3"], True), ([], None)):
        assert diffcse.parse_args(["--config", "demo", *words])[1].compile is expected
    assert diffcse.parse_args(["--config", "demo", "--no-generator-dropout"])[1].generator_dropout is False
    assert parse_field("dropout", None) is None and parse_field("generator_dropout", "off") is False and parse_field("steps", "12") == 12


@pytest.mark.parametrize("args, says", [
    (["--config", "bert_stss"], "one of bert_sts, bert_transfer"), ([], "--config demo"), (["--config", "demo", "--lerning-rate", "1"], "--lr"),
    (["--config", "demo", "--batch_sise", "3"], "--batch-size"), (["--config", "demo", "--batch-size", "1"], "at least 2"),
    (["--config", "demo", "--mask-ratio", "1.5"], "--mask-ratio"), (["--config", "demo", "--lr", "nan"], "--lr"), (["--config", "demo", "--edit", "max"], "argmax, sample"),
    (["--config", "demo", "--pads-in-loss", "perhaps"], "on or off"), (["--config", "demo", "--seed", "-1"], "--seed"), (["--config", "none.json"], "none.json"),
    (["--config", "demo", "--steps", "0"], "--steps"), (["--config", "demo", "--max-length", "2"], "--max-length"), (["--config", "demo", "--epochs", "x"], "whole number"),
])  # fmt: skip
def test_mistakes_on_the_command_line(args, says):
    with pytest.raises(UserError) as error:
        parse_args(args)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_is_one_line_and_exit_code_2():
    shown = subprocess.run([sys.executable, "diffcse.py", "--config", "nope"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 2 and shown.stdout == "" and shown.stderr.startswith("error: --config 'nope'") and shown.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------- the house


def test_imports_go_one_way_and_need_nothing_else():
    order = ["fast", "ranks", "bert", "data", "embed", "eval_sts", "eval_transfer", "docs", "run", "config", "diffcse"]
    outside = {"torch", "numpy", "tokenizers", "huggingface_hub", "tqdm"}
    lab = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "lab").glob("*.py"))  # sees all of the core
    for i, name in enumerate(order + lab):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        used = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        used |= {node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        extra = {"embed": {"faiss"}, "diffcse": {"lab"}, "lab/plots": {"matplotlib", "lab"}, "lab/analysis": {"lab"}, "lab/report": {"lab"}, "lab/bench": {"sentence_transformers", "lab"}, "lab/steps": {"transformers", "lab"}}.get(name, set())
        assert used - sys.stdlib_module_names <= outside | set(order[:i]) | extra, name


def test_compile_without_a_compiler_is_refused_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(fast, "why_not_compiled", lambda device: "PyTorch's compiler cannot work here (no g++)")
    with pytest.raises(UserError, match=r"--compile: PyTorch's compiler cannot work here \(no g\+\+\); --no-compile does without"):
        diffcse.train(Config(compile=True, device="cpu", out_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists() and diffcse.pick_device(Config(device="cpu"))[0].type == "cpu"
