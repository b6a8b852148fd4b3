"""diffcse.py, what test_step.py and test_diffcse.py leave open: real STS scoring in a run, the loop, whole-model invariances, hard inputs."""

import dataclasses
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F

import bert
import data
import diffcse
import embed
import eval_sts
from bert import UserError
from config import PRESETS, Config, parse_args, parse_field
from diffcse import contrastive_loss

ROOT = Path(diffcse.__file__).parent
SMALL = ROOT / "assets" / "small-bert"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the a dog cat house tree runs sleeps eats big small red blue and in on . ,".split()]


def sentences(n, seed, least=0):
    r = random.Random(seed)
    return [" ".join(r.choices(WORDS[5:], k=r.randint(least, 12))) for _ in range(n)]


def make_model(folder, vocab_size=len(WORDS), **sizes):
    torch.manual_seed(0)
    cfg = bert.BertConfig(**dict(vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                 max_position_embeddings=40, initializer_range=0.2) | sizes)  # fmt: skip
    model = bert.BertForMaskedLM(cfg)
    bert.save_bert(model, folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    (folder / "text.txt").write_text("".join(s + "\n" for s in sentences(33, 1)))  # 2 batches of 16, and one of 1
    return folder


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """run(**changes): train on the tiny model, scored on a made SentEval folder in which every set has 8 pairs."""
    monkeypatch.setattr(eval_sts, "YEARS", {year: {"one": 8} for year in eval_sts.YEARS})
    monkeypatch.setattr(eval_sts, "FILES", {name: (path, 8) for name, (path, _) in eval_sts.FILES.items()})
    files = {}
    for year in eval_sts.YEARS:
        files[f"STS/{year}-en-test/STS.input.one.txt"], files[f"STS/{year}-en-test/STS.gs.one.txt"] = "{a}\t{b}\n", "{s}\n"
    for name, (path, _) in eval_sts.FILES.items():
        files[path] = "g\tf\ty\t1\t{s}\t{a}\t{b}\n" if name.startswith("STSB") else "1\t{a}\t{b}\t{s}\n"
    for i, (path, line) in enumerate(files.items()):
        pairs = zip(sentences(8, 10 + i, 1), sentences(8, 50 + i, 1), random.Random(i).sample(range(50), 8))
        text = "".join(line.format(a=a, b=b, s=s / 10) for a, b, s in pairs)
        (tmp_path / "senteval" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "senteval" / path).write_text("header\n" * path.startswith("SICK") + text)

    def run(**changes):
        options = dict(model=str(tiny), generator=str(tiny), train_file=str(tiny / "text.txt"), data=str(tmp_path / "senteval"), batch_size=16,
                       steps=5, eval_every=2, log_every=1, lr=1e-2, out_dir=str(tmp_path / "out"), lam=0.05, device="cpu")  # fmt: skip
        return diffcse.train(Config(**options | changes).check())

    return run


def log_of(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def same_weights(a, b) -> bool:
    a, b = (bert.read_safetensors(folder / "best" / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def spy_on_steps(monkeypatch) -> list[dict]:
    """What every train_step of the runs to come was given, and the norm of the gradient it stepped with."""
    steps, real = [], diffcse.train_step

    def train_step(model, optimizer, scaler, batch, room, V, amp):
        lr = optimizer.param_groups[0]["lr"]
        given = [t.clone() for t in batch]
        G = None if model.generator is None else {n: t.clone() for n, t in model.generator.state_dict().items()}
        sums = real(model, optimizer, scaler, batch, room, V, amp)
        assert all(map(torch.equal, given, batch))  # x is never changed
        if G is not None:
            assert all(torch.equal(t, G[n]) for n, t in model.generator.state_dict().items()) and not any(p.requires_grad for p in model.generator.parameters())
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        steps.append(dict(batch=given, V=V, lr=lr, clipped=float(norm), unclipped=float(sums["grad_norm"]), model=model, optimizer=optimizer))
        return sums

    monkeypatch.setattr(diffcse, "train_step", train_step)
    return steps


# ------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("V", [2, 3])
def test_gradient_of_the_contrastive_loss_equals_sentence_transformers(V):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason="needs sentence-transformers")
    torch.manual_seed(V)
    h = torch.randn(9, V, 12, dtype=torch.float64, requires_grad=True)
    theirs = losses.MultipleNegativesRankingLoss(None, scale=20.0).compute_loss_from_embeddings(list(h.unbind(1)), None)
    expected, ours = (torch.autograd.grad(loss, h)[0] for loss in (theirs, contrastive_loss(h, 0.05)[0]))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_sizes_of_the_losses_before_training():
    """Random views of many dimensions: log B. The small BERT: two dropouts of a sentence are found; kept or replaced is guessed, about ln 2."""
    torch.manual_seed(0)
    assert contrastive_loss(torch.randn(64, 2, 20_000), 0.05)[0].item() == pytest.approx(math.log(64), rel=0.03)
    same = torch.randn(64, 1, 200).repeat(1, 2, 1)
    assert contrastive_loss(same, 0.05)[0] < 1e-3
    torch.manual_seed(0)
    model, tokenizer = diffcse.build(Config(model=str(SMALL), generator=str(SMALL)))
    text = [(line,) for line in (ROOT / "LICENSE").read_text().split("\n") if line.strip()][:16]
    ids, mask = data.TokenizedSentences(text, tokenizer, 32).batch(np.arange(16))
    batch = (ids, mask, *data.mask_tokens(ids, tokenizer, 0.3, "80-10-10", torch.Generator().manual_seed(0)))
    with torch.no_grad():
        _, sums = model.train()(*batch)
    assert sums["contrastive"] < math.log(16) and abs(float(sums["prediction"]) - math.log(2)) < 0.3
    assert sums["positive_cosine"] > sums["negative_cosine"] + 0.05 and 0 < sums["share_replaced"] < sums["share_replaced/"] == mask.sum()


def test_projector_by_hand_over_all_rows_together():
    torch.manual_seed(0)
    projector, c = diffcse.make_projector("batchnorm", 24, 0.02).double().train(), torch.randn(14, 24, dtype=torch.float64) * 5 + 3
    with torch.no_grad():
        projector[1].weight.normal_(), projector[1].bias.normal_()

    def normalise(x):
        return (x - x.mean(0)) / (((x - x.mean(0)) ** 2).mean(0) + 1e-5).sqrt()  # biased variance

    inner = (normalise(c @ projector[0].weight.T) * projector[1].weight + projector[1].bias).clamp_min(0)
    torch.testing.assert_close(projector(c), normalise(inner @ projector[3].weight.T), rtol=1e-10, atol=1e-10)
    assert [n for n, _ in projector.named_parameters()] == ["0.weight", "1.weight", "1.bias", "3.weight"]  # no biases, no affine at the end
    assert all(bn.momentum == 0.1 and bn.track_running_stats for bn in (projector[1], projector[4]))


# -------------------------------------------------------------------------------------------------- the whole model


def model_and_batch(tiny, **switches):
    torch.manual_seed(3)
    model, tokenizer = diffcse.build(Config(model=str(tiny), generator=str(tiny), dropout=0.0, generator_dropout=False, **switches))
    ids, mask = data.TokenizedSentences(data.read_sentences(tiny / "text.txt"), tokenizer, 32).batch(np.arange(8))
    masked, selected = data.mask_tokens(ids, tokenizer, 0.5, "80-10-10", torch.Generator().manual_seed(0))
    return model.double().train(), (ids, mask, masked, selected)


@pytest.mark.parametrize("pads_in_loss", [True, False])
def test_more_padding_changes_loss_and_gradients_only_with_pads_in_loss(tiny, pads_in_loss):
    """SPEC 3, official issue 25: the same batch, 7 columns of padding wider."""
    model, batch = model_and_batch(tiny, pads_in_loss=pads_in_loss, lam=1.0)
    wider = [F.pad(t, (0, 7), value=0) for t in batch]
    results = []
    for tensors in (batch, wider):
        model.zero_grad()
        loss, sums = model(*tensors)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), sums))
    (loss, gradient, sums), (loss_wide, gradient_wide, sums_wide) = results
    error = float((gradient - gradient_wide).norm() / gradient.norm())
    if pads_in_loss:
        assert abs(loss - loss_wide) > 1e-3 and error > 1e-2
    else:
        assert abs(loss - loss_wide) < 1e-12 and error < 1e-10
    for name in ("share_replaced", "share_replaced/", "accuracy_replaced", "accuracy_kept", "accuracy_kept/", "contrastive"):  # the log never counts padding
        assert float(sums[name]) == pytest.approx(float(sums_wide[name]), abs=1e-9)


@pytest.mark.parametrize("views, pads", [("both", True), ("both", False), ("first", True), ("first", False)])
def test_sum_is_the_mean_times_the_positions_counted(tiny, views, pads):
    loss = {}
    for reduction in ("mean", "sum"):
        model, batch = model_and_batch(tiny, views=views, pads_in_loss=pads, reduction=reduction, lam=1.0)
        loss[reduction] = float(model(*batch)[1]["prediction"])
    counted = batch[0] if pads else batch[0][batch[1]]
    share = counted.numel() / (2 if views == "first" else 1)  # the two views of a file of one column are of one length
    assert loss["sum"] == pytest.approx(share * loss["mean"], rel=1e-12)


def test_the_discriminators_gradient_never_enters_the_generator_and_each_view_has_its_own_edit(tiny):
    """Views of one sentence are masked apart, so their edits differ; every edit keeps [CLS] and gives padding the id 0."""
    model, (x, mask, masked, selected) = model_and_batch(tiny)
    assert torch.equal(x[::2], x[1::2]) and not torch.equal(selected[::2], selected[1::2])
    edited, replaced = diffcse.edit_sentences(model.generator, x, masked, selected, mask, model.tokenizer, model.cfg)
    assert not torch.equal(edited[::2], edited[1::2])
    assert (edited[:, 0] == model.tokenizer.cls).all() and not edited[~mask].any()
    assert torch.equal(replaced, (edited != x) & mask) and not replaced[:, 0].any() and not replaced[~mask].any()
    assert (replaced & ~selected)[:, 1:].any()  # published: also where nothing was masked


def test_lambda_0_updates_the_encoder_as_simcse_with_batchnorm_from_the_same_random_numbers(tiny):
    """SPEC 13.5, with dropout on: encoder, projector, InfoNCE, clip and AdamW written out."""
    torch.manual_seed(5)
    model, tokenizer = diffcse.build(Config(model=str(tiny), generator="no such generator", lam=0.0))
    torch.manual_seed(5)
    encoder, projector = bert.load_bert(tiny).train(), diffcse.make_projector("batchnorm", 16, 0.2).train()
    ids, mask = data.TokenizedSentences(data.read_sentences(tiny / "text.txt"), tokenizer, 32).batch(np.arange(8))
    parameters = [*encoder.parameters(), *projector.parameters()]
    theirs, ours = (torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.0) for ps in (parameters, model.train().parameters()))
    torch.manual_seed(9)
    diffcse.train_step(model, ours, torch.amp.GradScaler("cpu", enabled=False), (ids, mask, ids, mask), None, 2, None)
    torch.manual_seed(9)
    c = encoder(ids, mask, tokens=bert.places(mask), wanted=torch.arange(16) * ids.shape[1])  # so that dropout throws the same dice
    z = F.normalize(projector(c), dim=-1)
    loss = F.cross_entropy(z[::2] @ z[1::2].T / 0.05, torch.arange(8))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    theirs.step()
    for (name, p), q in zip(model.encoder.named_parameters(), encoder.parameters()):
        if not name.endswith("key.bias"):  # its gradient is rounding alone
            assert (p - q).norm() <= 1e-4 * 1e-3 * p.numel() ** 0.5, name  # of a step of 1e-3 in every number


# -------------------------------------------------------------------------------------------------------- the loop


def test_a_run_scored_by_sts_from_its_first_row_to_its_results(run, tmp_path):
    results, out = run(), tmp_path / "out"
    log = log_of(out)
    names = {*eval_sts.TEST_SETS, "STSB-dev", "SICKR-dev", "average"}
    assert set(results["before"]) == set(results["after"]) == set(results["before_first_last"]) == names
    scored = [row for row in log if "score" in row]
    assert [row["step"] for row in scored] == [0, 2, 4, 5] and all(row["score"] == row["STSB-dev"] for row in scored)
    assert results["best_step"] == max(scored[1:], key=lambda row: row["score"])["step"]  # max: the first of equals
    assert results["dev_best"] == results["after"]["STSB-dev"] and results["before"]["STSB-dev"] == results["dev_before"] == log[0]["score"]
    sets = {name: eval_sts.load_set(name, tmp_path / "senteval") for name in ("STS12", "SICKR")}
    best = embed.DiffCSE(str(out / "best"), device="cpu")
    for name, score in eval_sts.score_pairs(lambda s: best.encode(s, return_numpy=True), sets).items():
        assert score == pytest.approx(results["after"][name], abs=1e-6)


def test_a_search_never_opens_the_test_sets(run, tmp_path, capsys):
    whole, before = run(), log_of(tmp_path / "out")
    for path in (tmp_path / "senteval").rglob("*"):
        if path.is_file() and path.name not in ("sts-dev.csv", "SICK_trial.txt"):
            path.unlink()
    results = run(score="dev", out_dir=str(tmp_path / "search"))
    assert set(results["before"]) == set(results["after"]) == {"STSB-dev", "SICKR-dev"}
    assert results["dev_best"] == whole["dev_best"] and results["best_step"] == whole["best_step"]
    scores = [[row["score"] for row in rows if "score" in row] for rows in (before, log_of(tmp_path / "search"))]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("family, pooler", [("bert", True), ("bert", False), ("roberta", True), ("distilbert", False)])
def test_every_family_trains_and_its_best_model_loads_everywhere(run, tmp_path, family, pooler):
    """With and without a pooler of its own; the generator is another family's where that is allowed. RoBERTa's ids: <s> 0, <pad> 1."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-dev.txt)")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if family == "roberta" else WORDS[:5]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS[5:]])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=special[3] if family == "roberta" else "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    cls, sep = ("<s>", "</s>") if family == "roberta" else ("[CLS]", "[SEP]")
    backend.post_processor = tokenizers.processors.BertProcessing((sep, vocabulary[sep]), (cls, vocabulary[cls]))
    pad = vocabulary["<pad>" if family == "roberta" else "[PAD]"]
    sizes = dict(vocab_size=len(vocabulary), pad_token_id=pad, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                 dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40, initializer_range=0.2)  # fmt: skip
    config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig, "distilbert": transformers.DistilBertConfig}
    other = "roberta" if family == "roberta" else "bert" if family == "distilbert" else "distilbert"
    torch.manual_seed(0)
    keep = {} if family == "distilbert" else {"add_pooling_layer": pooler}
    models = {"f": transformers.AutoModel.from_config(config[family](**sizes), **keep), "g": transformers.AutoModelForMaskedLM.from_config(config[other](**sizes))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        backend.save(str(tmp_path / name / "tokenizer.json"))
    results = run(model=str(tmp_path / "f"), generator=str(tmp_path / "g"), pooling="cls" if pooler else "cls_before_pooler")
    best = tmp_path / "out" / "best"
    assert embed.DiffCSE(str(best), device="cpu").pooler == ("cls" if pooler else "cls_before_pooler")  # as the run scored it
    ours, text = embed.DiffCSE(str(best), device="cpu", pooler="cls_before_pooler"), sentences(5, 3)
    ids, mask = (torch.tensor([row[i] for row in (lambda e: [(r + [pad] * (20 - len(r)), [1] * len(r) + [0] * (20 - len(r))) for r in e])(ours.tokenizer(text, 20))])
                 for i in (0, 1))  # fmt: skip
    theirs = transformers.AutoModel.from_pretrained(best, **keep).eval()(ids, attention_mask=mask).last_hidden_state[:, 0]
    torch.testing.assert_close(ours.encode(text, normalize_to_unit=False), theirs.detach(), rtol=0, atol=1e-5)
    assert (ours.bert.pooler is not None) == pooler and results["best_step"] > 0


def test_the_loop_is_adamw_clipping_and_a_line_to_zero_over_every_sentence(run, tiny, tmp_path, monkeypatch):
    """All that train() chooses: steps, rates, batches, masks, optimizer; then its weights from torch's parts by hand."""
    steps = spy_on_steps(monkeypatch)
    changes = dict(steps=None, epochs=2, dropout=0.0, generator_dropout=False, eval_every=100, seed=7)
    run(**changes)
    assert data.tokens_path(tiny / "text.txt", data.Tokenizer(tiny), 32).is_file()  # for the next run
    assert [len(s["batch"][0]) for s in steps] == [32, 32, 2] * 2  # 33 sentences, 2 views; the short batch is kept, even of one sentence
    assert [s["lr"] for s in steps] == pytest.approx([1e-2 * (6 - t) / 6 for t in range(6)])
    assert [row["lr"] for row in log_of(tmp_path / "out") if "lr" in row] == pytest.approx([s["lr"] for s in steps])
    rows = [[tuple(ids[mask].tolist()) for s in epoch for ids, mask in zip(*s["batch"][:2])] for epoch in (steps[:3], steps[3:])]
    assert sorted(rows[0]) == sorted(rows[1]) and rows[0] != rows[1]  # every sentence once in an epoch, in another order
    assert any(s["unclipped"] > 1 for s in steps) and all(s["clipped"] <= 1 + 1e-5 for s in steps)
    group, trained = steps[0]["optimizer"].param_groups[0], steps[0]["model"]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0, (0.9, 0.999), 1e-8)
    assert {id(p) for p in group["params"]} == {id(p) for n, p in trained.named_parameters() if not n.startswith("generator.")}

    torch.manual_seed(7)
    twin, _ = diffcse.build(Config(model=str(tiny), generator=str(tiny), lam=0.05, dropout=0.0, generator_dropout=False))
    twin.train()
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], weight_decay=0.0)
    for t, s in enumerate(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - t / 6)
        optimizer.zero_grad()
        twin(*s["batch"])[0].backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    for name, p in bert.load_bert(tmp_path / "out" / "best").state_dict().items():
        if not name.endswith("key.bias") and name != "layers.1.norm.bias":  # rounding alone: softmax, BatchNorm take away what they add
            distance = (p - twin.encoder.state_dict()[name]).norm() / p.numel() ** 0.5
            assert distance < 1e-3 * 1e-2, name  # of a step of 1e-2 in every number


def test_a_saved_config_repeats_its_run(run, tmp_path):
    run(seed=3, edit="sample")
    _, cfg = parse_args(["--config", str(tmp_path / "out" / "config.json"), "--out-dir", str(tmp_path / "again")])
    diffcse.train(cfg)
    assert log_of(tmp_path / "out") == log_of(tmp_path / "again") and same_weights(tmp_path / "out", tmp_path / "again")


def test_looking_does_not_change_what_is_trained(run, tmp_path):
    """Scoring and logging more often spend no random numbers: the same losses at the same steps."""
    losses = []
    for name, eval_every in (("often", 1), ("seldom", 5)):
        run(out_dir=str(tmp_path / name), eval_every=eval_every)
        losses.append([row["loss"] for row in log_of(tmp_path / name) if "loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_masks_come_from_seed_and_step_alone(run, tmp_path, monkeypatch):
    """Of equal sentences, so that nothing but the mask can tell two batches apart."""
    (tmp_path / "same.txt").write_text("the small dog runs and the big cat sleeps in a tree\n" * 16)
    steps = spy_on_steps(monkeypatch)
    for name, changes in (("a", {}), ("b", dict(lam=0.5, lr=1e-4, edit="sample")), ("c", dict(seed=43))):
        run(out_dir=str(tmp_path / name), train_file=str(tmp_path / "same.txt"), steps=4, **changes)
    a, b, c = ([s["batch"][3] for s in steps[i : i + 4]] for i in (0, 4, 8))
    assert all(map(torch.equal, a, b))
    assert len({tuple(selected.flatten().tolist()) for selected in a + c}) == 8  # another one at each step, and with another seed


def test_a_scaled_loss_is_unscaled_before_it_is_clipped(tiny):
    """fp16's GradScaler, which also runs on the CPU: the same gradient norm and, after clipping, the same step."""
    results = []
    for scale in (False, True):
        model, batch = model_and_batch(tiny, clip=1e-3)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)  # unlike AdamW it sees the gradient's size
        sums = diffcse.train_step(model, optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scale), batch, None, 2, None)
        results.append([sums["grad_norm"], *(p.detach().clone() for p in model.parameters())])
    assert results[0][0] > 1e-3  # so that clipping matters
    for plain, scaled in zip(*results):
        torch.testing.assert_close(plain, scaled, rtol=0, atol=1e-9)


def test_without_an_out_dir_runs_are_numbered(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(out_dir="", steps=1), run(out_dir="", steps=1)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["run-1", "run-2"]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("changes", [{"temperature": 1e-40}, {"lr": 1e30}, {"lr": 1e30, "eval_every": 1}, {"lr": 1e30, "log_every": 1000, "lam": 0.0}],
                         ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()))  # fmt: skip
def test_divergence_names_its_step(run, tmp_path, changes):
    """By a real cause: whatever notices first, the log or the score, says at which step."""
    with pytest.raises(UserError, match="step") as error:
        run(**dict(log_every=4, steps=20) | changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "results.json").exists()
    assert "NaN" not in (tmp_path / "out" / "log.jsonl").read_text()


def test_a_generator_with_more_rows_than_the_encoder(run, tiny, tmp_path):
    """Padded vocabularies are common: a row beyond the tokenizer's words must never become a token of x''."""
    folder = tmp_path / "padded"
    model = make_model(folder, vocab_size=len(WORDS) + 8)
    with torch.no_grad():
        model.head.bias[len(WORDS):] = 50.0
    bert.save_bert(model, folder)
    try:
        run(generator=str(folder))
    except UserError as error:  # refusing it is as good
        assert "generator" in str(error)


@pytest.mark.parametrize("changes, says", [
    ({"pooling": "cls"}, "pooler"), ({"out_dir": "x" * 300}, "out-dir"), ({"out_dir": "~no-such-user/x"}, "no-such-user"),
    ({"train_file": "~no-such-user/x.txt"}, "no-such-user"), ({"model": "~no-such-user/m"}, "no-such-user"), ({"data": "~no-such-user"}, "no-such-user"),
    ({"generator": "EMPTY"}, "config.json"), ({"model": "NO_WEIGHTS"}, "no weights"), ({"out_dir": "A_FILE"}, "not an empty folder"), ({"data": "EMPTY"}, "STS"),
])  # fmt: skip
def test_bad_paths_and_parts_are_user_errors_and_leave_nothing_behind(run, tiny, tmp_path, changes, says):
    for name in ("EMPTY", "NO_WEIGHTS"):
        (tmp_path / name).mkdir()
    (tmp_path / "A_FILE").write_text("mine")
    for file in ("config.json", "vocab.txt"):
        (tmp_path / "NO_WEIGHTS" / file).write_bytes((tiny / file).read_bytes())
    changes = {k: str(tmp_path / v) if v.isupper() else v for k, v in changes.items()}
    with pytest.raises(UserError, match=says) as error:
        run(**changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and (tmp_path / "A_FILE").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("name, value, expected", [
    ("lr", "1e-5", 1e-5), ("lr", 1, 1.0), ("steps", "10", 10), ("steps", 10.0, 10), ("steps", None, None), ("dropout", "0", 0.0), ("dropout", None, None),
    ("protect_sep", "ON", True), ("protect_sep", False, False), ("protect_sep", "no", False), ("edit", "sample", "sample"), ("seed", "9007199254740993", 2**53 + 1),
    ("steps", "1.5", UserError), ("steps", 1.5, UserError), ("steps", True, UserError), ("steps", "nan", UserError), ("steps", 10**400, UserError), ("steps", [1], UserError),
    ("steps", "9" * 5000, UserError), ("seed", None, UserError), ("lr", "", UserError), ("lr", "fast", UserError), ("lr", None, UserError), ("lr", False, UserError),
    ("lr", 10**400, UserError), ("protect_sep", 1, UserError), ("protect_sep", None, UserError), ("edit", "Sample", UserError), ("edit", ["sample"], UserError),
    ("model", 3, UserError), ("model", None, UserError), ("pooling", "avg", UserError),
])  # fmt: skip
def test_parse_field(name, value, expected):
    if expected is UserError:
        with pytest.raises(UserError, match="--" + name.replace("_", "-")) as error:
            parse_field(name, value)
        assert "\n" not in str(error.value)
    else:
        got = parse_field(name, value)
        assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("args, says", [
    (["--config", "bert_st"], "bert_sts"), (["--config", "demo", "--lerning-rate", "1"], "unknown flag --lerning-rate"), (["--config", "demo", "--lam=-1"], "--lam"),
    (["--config", "demo", "--lr"], "--lr"), (["--config", "demo", "--lr", "-1e-5"], "--lr"), (["--config"], "--config"), (["demo"], "unknown flag demo"),
    (["--config", "missing.json"], "missing.json"), (["--config", "demo", "--amp", "fp16", "--device", "cpu"], "--amp fp16"),
])  # fmt: skip
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(args, says):
    shown = subprocess.run([sys.executable, str(ROOT / "diffcse.py"), *args], capture_output=True, text=True)
    assert shown.returncode == 2 and shown.stdout == "" and "Traceback" not in shown.stderr
    assert shown.stderr.startswith("error: ") and shown.stderr.count("\n") == 1 and says in shown.stderr


def test_a_negative_number_is_a_flags_value():
    assert parse_args(["--config", "demo", "--hard-negative-weight", "-1e-1"])[1].hard_negative_weight == -0.1


def test_dataclass_and_presets_can_be_saved_and_read_back():
    for name, cfg in PRESETS.items():
        assert {f: parse_field(f, v) for f, v in json.loads(json.dumps(dataclasses.asdict(cfg))).items()} == dataclasses.asdict(cfg.check()), name


# ------------------------------------------------------------------------------- your own text, in another language


def test_own_text_and_pairs_in_another_language(tmp_path, monkeypatch):
    """Chinese, from a cased vocabulary of its characters to a model that is found again: nothing takes English for granted."""
    r = random.Random(3)
    characters = sorted(set("今天天气很好我们去公园散步小猫喜欢吃鱼他昨天买了一本新书老师在教室里讲课"))
    lines = ["".join(r.choices(characters, k=r.randint(3, 15))) + "。" for _ in range(60)]
    model = bert.BertForMaskedLM(bert.BertConfig(vocab_size=5 + len(characters) + 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                 intermediate_size=16, max_position_embeddings=40, initializer_range=0.3))  # fmt: skip
    bert.save_bert(model, tmp_path / "zh")
    (tmp_path / "zh" / "vocab.txt").write_text("\n".join([*WORDS[:5], *characters, "。"]), encoding="utf-8")
    (tmp_path / "zh" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [(a, b, len({*a} & {*b})) for a, b in zip(lines[:30], lines[30:])]
    (tmp_path / "pairs.tsv").write_text("a\tb\talike\n" + "".join(f"{a}\t{b}\t{s}\n" for a, b, s in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = Config(model="zh", generator="zh", train_file="text.txt", score="pairs.tsv", batch_size=8, steps=4, eval_every=2, lr=1e-3, out_dir="out", device="cpu")
    results = diffcse.train(config.check())
    tool = embed.DiffCSE("out", device="cpu")
    unknown = tool.tokenizer.unk
    assert not any(unknown in ids for ids in tool.tokenizer(lines, 40))
    assert results["after"].keys() == {"pairs.tsv"} and results["best_step"] in (2, 4)
    u, v = (tool.encode(list(side), return_numpy=True) for side in list(zip(*rows))[:2])
    assert results["after"]["pairs.tsv"] == pytest.approx(100 * eval_sts.spearman((u * v).sum(1), [s for *_, s in rows]), abs=0.5)
    tool.build_index(lines)
    assert tool.search(lines[7], threshold=0.999)[0][0] == lines[7]


@pytest.mark.parametrize("text, says", [
    ("a\tb\n1\t2\n", "2 columns; a pair is two sentences and a number"), ("a\tb\tc\nx\ty\tmuch\n", "pairs.tsv pair 1: the score 'much' is not a number"),
    ("a\tb\tc\nx\ty\t1\nx\ty\tnan\n", "pair 2: the score 'nan' is not a number"), ("a\tb\tc\nx\ty\t1\n", "1 pairs; at least 2 can be ranked")])  # fmt: skip
def test_bad_pairs_are_refused_with_file_and_pair(tmp_path, text, says):
    (tmp_path / "pairs.tsv").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        eval_sts.read_pairs(tmp_path / "pairs.tsv")
    assert "pairs.tsv" in str(error.value)


def test_a_score_that_is_neither_a_name_nor_a_file_of_pairs_is_refused():
    with pytest.raises(UserError, match="--score is nonsense: it must be stsb, dev, docs, or a .tsv or .csv of rated pairs"):
        Config(score="nonsense").check()
    with pytest.raises(UserError, match="none.tsv: no such sentence file"):
        diffcse.StsScore(Config(score="none.tsv"))
