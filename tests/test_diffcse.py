"""The method in diffcse.py: losses, edit, gradients, one update; and the repository's own rules."""

import ast
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bert
import diffcse
from bert import BertForMaskedLM
from data import Batch
from diffcse import Config, contrastive_loss, edit_sentences, replaced_token_loss

ROOT = Path(diffcse.__file__).parent
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)

# ------------------------------------------------------------------------------------------------
# Contrastive loss and projector


@pytest.mark.parametrize("V", [2, 3])
def test_contrastive_loss_equals_multiple_negatives_ranking_loss(V):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    peer = losses.MultipleNegativesRankingLoss(None, scale=20.0)
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        B, D = (
            int(torch.randint(2, 12, (), generator=rng)),
            int(torch.randint(1, 40, (), generator=rng)),
        )
        lengths = 10.0 ** torch.randint(-3, 3, (B, V, 1), generator=rng)
        h = torch.randn(B, V, D, generator=rng, dtype=torch.float64) * lengths
        h.requires_grad_()
        loss, metrics = contrastive_loss(h, 0.05)
        expected = peer.compute_loss_from_embeddings(list(h.unbind(1)), None)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        gradients = [torch.autograd.grad(value, h)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        cosines = F.cosine_similarity(h[:, None, 0], h[None, :, 1], dim=-1)
        positive, count = metrics["positive_cosine"]
        torch.testing.assert_close(positive / count, cosines.diagonal().mean().detach())
        negative, count = metrics["negative_cosine"]
        others = cosines[~torch.eye(B, dtype=torch.bool)].mean().detach()
        torch.testing.assert_close(negative / count, others)


def test_contrastive_loss_by_hand():
    """Orthogonal sentences with equal views: logits (20, 0), so the loss is log(1 + e^-20)."""
    h = torch.eye(2)[:, None].repeat(1, 2, 1)
    assert contrastive_loss(h, 0.05)[0].item() == pytest.approx(math.log1p(math.exp(-20)), abs=1e-7)
    assert contrastive_loss(h[:1], 0.05)[0] == 0  # one sentence has no negatives
    torch.manual_seed(0)
    unrelated = torch.randn(256, 2, 4096)
    assert contrastive_loss(unrelated, 1.0)[0].item() == pytest.approx(math.log(256), abs=0.01)


def test_hard_negative_weight_is_added_to_a_sentences_own_negative():
    h = torch.randn(4, 3, 8, dtype=torch.float64)
    z = F.normalize(h, dim=-1)
    logits = torch.cat([z[:, 0] @ z[:, 1].T, z[:, 0] @ z[:, 2].T], 1) / 0.1
    logits[range(4), range(4, 8)] += 2.5
    expected = F.cross_entropy(logits, torch.arange(4))
    torch.testing.assert_close(contrastive_loss(h, 0.1, 2.5)[0], expected)


def test_projector_by_hand_over_all_rows_together():
    torch.manual_seed(0)
    projector = diffcse.make_projector("batchnorm", 24, 0.02).double().train()
    cls = torch.randn(14, 24, dtype=torch.float64) * 5 + 3
    with torch.no_grad():
        projector[1].weight.normal_(), projector[1].bias.normal_()

    def normalise(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    inner = normalise(cls @ projector[0].weight.T) * projector[1].weight + projector[1].bias
    expected = normalise(inner.clamp_min(0) @ projector[3].weight.T)
    torch.testing.assert_close(projector(cls), expected, rtol=1e-10, atol=1e-10)
    names = [name for name, _ in projector.named_parameters()]
    assert names == ["0.weight", "1.weight", "1.bias", "3.weight"]
    assert all(projector[i].momentum == 0.1 and projector[i].track_running_stats for i in (1, 4))


@pytest.mark.parametrize("kind", ["batchnorm", "tanh"])
def test_projector_starts_at_berts_initialisation(kind):
    linear = diffcse.make_projector(kind, 64, 0.02)[0]
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert linear.bias is None if kind == "batchnorm" else not linear.bias.any()


# ------------------------------------------------------------------------------------------------
# Edit and replaced-token loss

TOKENS = types.SimpleNamespace(cls_id=2, sep_id=3, pad_id=0, mask_id=4, unk_id=1, vocab_size=10)


class FixedLogits(BertForMaskedLM):
    """A generator whose logits are the same everywhere."""

    def __init__(self, logits: Tensor):
        super().__init__(bert.BertConfig("bert", len(logits), 4, 0, 1, 4))
        self.logits = logits
        self.head.forward = lambda states, words: self.logits.expand(len(states), -1)
        self.bert.forward = lambda ids, mask: ids[..., None].expand(*ids.shape, 4).float()


def edit(generator: BertForMaskedLM, **settings) -> list:
    x = torch.tensor([[2, 5, 6, 7, 3, 0], [2, 8, 3, 0, 0, 0]])
    mask, selected = x != 0, torch.zeros_like(x, dtype=torch.bool)
    selected[:, 1] = True
    batch, before = Batch(x, mask, torch.where(selected, 4, x), selected), x.clone()
    x_edited, replaced = edit_sentences(generator, batch, TOKENS, Config(**settings))
    assert torch.equal(x, before)
    assert not replaced[:, 0].any() and not replaced[~mask].any() and not x_edited[~mask].any()
    assert torch.equal(replaced, (x_edited != x) & mask)
    return x_edited.tolist()


def test_edit_switches():
    always_8 = FixedLogits(F.one_hot(torch.tensor(8), 10).float())
    # As published: at every position, [SEP] too. The 8 of the second row is not replaced.
    assert edit(always_8) == [[2, 8, 8, 8, 8, 0], [2, 8, 8, 0, 0, 0]]
    assert edit(always_8, protect_sep=True) == [[2, 8, 8, 8, 3, 0], [2, 8, 3, 0, 0, 0]]
    assert edit(always_8, edit_scope="masked") == [[2, 8, 6, 7, 3, 0], [2, 8, 3, 0, 0, 0]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_generators_probabilities(temperature):
    torch.manual_seed(0)
    logits, n = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf]), 20_000
    x = torch.ones(1, n + 1, dtype=torch.long)
    cfg = Config(edit="sample", edit_temperature=temperature)
    batch = Batch(x, x.bool(), x, x.bool())
    x_edited, _ = edit_sentences(FixedLogits(logits), batch, TOKENS, cfg)
    share = torch.bincount(x_edited[0, 1:], minlength=5) / n
    p = (logits / temperature).softmax(0)
    assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-12).all()


def test_pads_in_loss_and_reduction():
    logits, mask = torch.randn(3, 6, 2), torch.arange(6) < torch.tensor([[6], [4], [2]])
    replaced = (torch.rand(3, 6) < 0.5) & mask
    wider = F.pad(logits, (0, 0, 0, 3)), F.pad(replaced, (0, 3)), F.pad(mask, (0, 3))
    narrow = logits, replaced, mask

    def loss(tensors: tuple, pads_in_loss: bool, reduction: str = "mean") -> float:
        return replaced_token_loss(*tensors, pads_in_loss, reduction)[0].item()

    assert loss(wider, False) == pytest.approx(loss(narrow, False))
    assert loss(wider, True) != pytest.approx(loss(narrow, True))  # as published
    by_hand = [-logits[i, t].log_softmax(0)[int(replaced[i, t])] for i, t in mask.nonzero()]
    assert loss(narrow, False, "sum") == pytest.approx(float(sum(by_hand)), rel=1e-5)
    for pads, count in ((True, 18), (False, 12)):
        expected = count * loss(narrow, pads)
        assert loss(narrow, pads, "sum") == pytest.approx(expected, rel=1e-6)


def test_metrics_of_the_discriminator_by_hand():
    """Tokens: replaced and found, replaced and missed, original and found; then padding."""
    logits = torch.tensor([[[0.0, 9.0], [9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]])
    replaced = torch.tensor([[True, True, False, False]])
    mask = torch.tensor([[True, True, True, False]])
    _, metrics = replaced_token_loss(logits, replaced, mask, True, "mean")
    assert {name: tuple(map(int, metrics[name])) for name in metrics if name != "difference"} == {
        "share_replaced": (2, 3),
        "accuracy_replaced": (1, 2),
        "accuracy_original": (1, 1),
    }


# ------------------------------------------------------------------------------------------------
# The model


def model_and_batch(tiny: Path, **settings) -> tuple[diffcse.DiffCSEModel, Batch]:
    """Without dropout, in fp64; 8 of the tiny model's sentences."""
    torch.manual_seed(3)
    settings = {"dropout": 0.0, "generator_dropout": False, "mask_ratio": 0.5, **settings}
    cfg = Config(
        model=str(tiny),
        generator=str(tiny),
        train_file=str(tiny / "text.txt"),
        batch_size=8,
        **settings,
    )
    model = diffcse.DiffCSEModel.from_pretrained(cfg)
    batch = diffcse.draw_batch(model.load_sentences(), model.tokenizer, cfg, step=0)
    return model.double().train(), batch


def loss_and_gradient(model: diffcse.DiffCSEModel, batch: Batch) -> tuple[float, Tensor, dict]:
    model.zero_grad()
    loss, metrics = model(batch)
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients), metrics


@pytest.mark.parametrize("pads_in_loss", [True, False])
def test_more_padding_changes_the_loss_only_with_pads_in_loss(tiny, pads_in_loss):
    """Official issue 25: the same batch, 7 columns wider."""
    model, batch = model_and_batch(tiny, pads_in_loss=pads_in_loss, lam=1.0)
    wider = Batch(*(F.pad(t, (0, 7)) for t in batch.tensors()))
    loss, gradient, metrics = loss_and_gradient(model, batch)
    wide_loss, wide_gradient, wide_metrics = loss_and_gradient(model, wider)
    error = float((gradient - wide_gradient).norm() / gradient.norm())
    if pads_in_loss:
        assert abs(loss - wide_loss) > 1e-3 and error > 1e-2
    else:
        assert abs(loss - wide_loss) < 1e-12 and error < 1e-10
    for name in ("share_replaced", "accuracy_replaced", "accuracy_original", "contrastive"):
        assert [float(v) for v in metrics[name]] == pytest.approx(
            [float(v) for v in wide_metrics[name]]
        )


@pytest.mark.parametrize("views", ["both", "first"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_gpus_static_shape_has_the_loss_of_the_batchs_own_width(tiny, tmp_path, family, views):
    """Padded to max_length, the published reading has the same loss and gradients."""
    model, batch = model_and_batch(tiny, lam=1.0, views=views)
    if family == "roberta":  # positions are counted, and x'' has id 0 at padding
        for module in (model.encoder, model.discriminator, model.generator.bert):
            module.embeddings.padding_offset = 1
    padded = batch.pad(32, model.tokenizer.pad_id)
    assert padded.x.shape[1] == 32 > batch.x.shape[1]
    loss, gradient, _ = loss_and_gradient(model, batch)
    padded_loss, padded_gradient, _ = loss_and_gradient(model, padded)
    assert padded_loss == pytest.approx(loss, rel=1e-12)
    assert float((gradient - padded_gradient).norm() / gradient.norm()) < 1e-10


@pytest.mark.parametrize(
    "views, pads", [("both", True), ("both", False), ("first", True), ("first", False)]
)
def test_sum_is_the_mean_times_the_positions_counted(tiny, views, pads):
    loss = {}
    for reduction in ("mean", "sum"):
        settings = {"views": views, "pads_in_loss": pads, "reduction": reduction, "lam": 1.0}
        model, batch = model_and_batch(tiny, **settings)
        loss[reduction] = float(model(batch)[1]["difference"][0])
    counted = batch.x.numel() if pads else int(batch.mask.sum())
    positions = counted / (2 if views == "first" else 1)
    assert loss["sum"] == pytest.approx(positions * loss["mean"], rel=1e-12)


def test_each_view_has_its_own_edit_and_only_cls_is_safe(tiny):
    model, batch = model_and_batch(tiny)
    x, mask = batch.x, batch.mask
    assert torch.equal(x[::2], x[1::2]) and not torch.equal(
        batch.selected[::2], batch.selected[1::2]
    )
    x_edited, replaced = edit_sentences(model.generator, batch, model.tokenizer, model.cfg)
    assert not torch.equal(x_edited[::2], x_edited[1::2])
    assert (x_edited[:, 0] == model.tokenizer.cls_id).all() and not x_edited[~mask].any()
    assert (replaced & ~batch.selected)[:, 1:].any()  # as published, also where nothing was masked


def test_h_replaces_cls_and_carries_the_discriminators_gradient(tiny, monkeypatch):
    """Without the contrastive loss, the encoder's only gradient comes through h."""

    def encoder_gradient() -> float:
        model, batch = model_and_batch(tiny, lam=1.0, contrastive=False)
        before = [p.clone() for p in model.generator.parameters()]
        model(batch)[0].backward()
        assert all(p.grad is None for p in model.generator.parameters())
        assert all(map(torch.equal, before, model.generator.parameters()))
        assert model.head.weight.grad.abs().sum() > 0
        gradients = [p.grad for p in model.encoder.parameters() if p.grad is not None]
        return sum(float(gradient.abs().sum()) for gradient in gradients)

    assert encoder_gradient() > 1e-6
    difference_loss = diffcse.DiffCSEModel.difference_loss
    detached = lambda self, h, batch: difference_loss(self, h.detach(), batch)  # noqa: E731
    monkeypatch.setattr(diffcse.DiffCSEModel, "difference_loss", detached)
    assert encoder_gradient() == 0


@pytest.mark.parametrize("dropout", [True, False])
def test_generator_dropout_switch(tiny, dropout):
    model, batch = model_and_batch(tiny, generator_dropout=dropout)
    logits = [model.generator(batch.x_masked, batch.mask) for _ in range(2)]
    assert model.encoder.training and model.generator.training == dropout
    assert torch.equal(*logits) != dropout


def test_lambda_0_is_simcse_and_builds_nothing_else(tiny):
    model, batch = model_and_batch(tiny, lam=0.0)
    assert model.generator is None and model.discriminator is None and not hasattr(model, "head")
    diffcse.DiffCSEModel.from_pretrained(replace(model.cfg, generator="no such generator"))
    h = model.projector(model.encoder(batch.x, batch.mask)[:, 0])
    expected = contrastive_loss(h.view(8, 2, -1), 0.05)[0]
    torch.testing.assert_close(model(batch)[0], expected, rtol=1e-9, atol=1e-12)


def test_losses_of_the_small_bert_before_training():
    """Two dropout views of a sentence are similar; the new head guesses: its loss is near ln 2."""
    small = str(ROOT / "assets" / "small-bert")
    cfg = Config(model=small, generator=small, train_file=str(ROOT / "LICENSE"), batch_size=16)
    torch.manual_seed(0)
    model = diffcse.DiffCSEModel.from_pretrained(cfg).train()
    lines = [(line,) for line in (ROOT / "LICENSE").read_text().split("\n") if line.strip()][:16]
    sentences = diffcse.TokenizedSentences(lines, model.tokenizer, 32)
    with torch.no_grad():
        _, metrics = model(diffcse.draw_batch(sentences, model.tokenizer, cfg, 0))
    means = {name: float(total) / float(count) for name, (total, count) in metrics.items()}
    assert means["contrastive"] < math.log(16)
    assert abs(means["difference"] - math.log(2)) < 0.3
    assert means["positive_cosine"] > means["negative_cosine"] + 0.05
    assert 0 < means["share_replaced"] < 1


# ------------------------------------------------------------------------------------------------
# One update


def test_step_is_adamw_without_weight_decay_after_clipping(tiny):
    settings = {"projector": "tanh", "clip": 0.1, "lr": 3e-3}
    model, batch = model_and_batch(tiny, **settings)
    twin, _ = model_and_batch(tiny, **settings)
    optimizer = diffcse.make_optimizer(model)
    moments = {}
    for t in (1, 2, 3):
        metrics = diffcse.train_step(model, optimizer, NO_SCALER, None, batch)
        twin.zero_grad()
        twin(batch)[0].backward()
        gradients = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        torch.testing.assert_close(metrics["grad_norm"][0], norm)
        assert norm > 0.1
        for name, p in twin.named_parameters():
            if name in gradients:  # Adam by hand, of the gradient clipped to the norm 0.1
                g = gradients[name] * 0.1 / (norm + 1e-6)
                m, v = moments.get(name, (0, 0))
                m, v = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                p.data -= 3e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if not name.endswith("key.bias"):  # its gradient is rounding error: softmax ignores it
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=name)


def test_a_scaled_loss_is_unscaled_before_clipping(tiny):
    """fp16's GradScaler: the same gradient norm and, after clipping, the same update."""
    results = []
    for enabled in (False, True):
        model, batch = model_and_batch(tiny, clip=1e-3)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1.0)  # sees the gradient's size
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        metrics = diffcse.train_step(model, optimizer, scaler, None, batch)
        results.append([metrics["grad_norm"][0], *(p.detach().clone() for p in model.parameters())])
    assert results[0][0] > 1e-3
    for plain, scaled in zip(*results):
        torch.testing.assert_close(plain, scaled, rtol=0, atol=1e-9)


def test_lambda_0_updates_the_encoder_as_simcse_written_out(tiny):
    """With dropout on: encoder, projector, InfoNCE, clipping and AdamW, same random numbers."""
    cfg = Config(model=str(tiny), generator="none", lam=0.0, lr=1e-3)
    _, batch = model_and_batch(tiny)
    torch.manual_seed(5)
    model = diffcse.DiffCSEModel.from_pretrained(cfg).train()
    torch.manual_seed(5)
    encoder = bert.load_bert(tiny).train()
    projector = diffcse.make_projector("batchnorm", 16, 0.2).train()
    parameters = [*encoder.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    torch.manual_seed(9)
    diffcse.train_step(model, diffcse.make_optimizer(model), NO_SCALER, None, batch)
    torch.manual_seed(9)
    z = F.normalize(projector(encoder(batch.x, batch.mask, cls_only=True)[:, 0]), dim=-1)
    F.cross_entropy(z[::2] @ z[1::2].T / 0.05, torch.arange(8)).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    for (name, p), q in zip(model.encoder.named_parameters(), encoder.parameters()):
        if not name.endswith("key.bias"):  # its gradient is rounding error
            assert (p - q).norm() <= 1e-4 * 1e-3 * p.numel() ** 0.5, name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_step_under_bf16_is_near_fp32(tiny, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, batch = model_and_batch(tiny)
    model, batch = model.float().to(device), batch.to(torch.device(device))
    full = model(batch)[0]
    with torch.autocast(device, torch.bfloat16):
        half = model(batch)[0]
    assert half != full
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------------
# The repository's own rules


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules if node.module in ("engine", "lab") else {node.module}
    return {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}


def test_imports_go_one_way_and_need_nothing_else():
    """What a file of the core or the engine may import stands before it in this list."""
    order = """bert engine.errors engine.distributed data engine.hub engine.tokens engine.cli
        engine.device engine.checkpoint engine.model_folder engine.fast engine.run engine.index
        embed eval_sts engine.demo diffcse""".split()
    installed = {"torch", "numpy", "tokenizers", "huggingface_hub", "tqdm"}
    files = {*ROOT.glob("*.py"), *(ROOT / "engine").glob("*.py")} - {ROOT / "engine/__init__.py"}
    assert {ROOT / f"{name.replace('.', '/')}.py" for name in order} == files
    for i, name in enumerate(order):
        used = imports_of(ROOT / f"{name.replace('.', '/')}.py")
        allowed = set(order[:i]) | ({"faiss"} if name == "engine.index" else set())
        assert {n for n in used if n.partition(".")[0] not in installed} <= allowed, name
    assert {name.partition(".")[0] for name in imports_of(ROOT / "bert.py")} == {"torch"}
