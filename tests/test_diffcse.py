"""The method in diffcse.py: losses, edit, gradients, one update; and the repository's own rules."""

import ast
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, VOCABULARY, make_model
from torch import Tensor

import bert
import diffcse
from data import Batch
from diffcse import Config, contrastive_loss, edit_sentences, replaced_token_loss

# ------------------------------------------------------------------------------------------------
# Contrastive loss and projector


@pytest.mark.parametrize("V", [2, 3])
def test_contrastive_loss_equals_multiple_negatives_ranking_loss(V):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    peer = losses.MultipleNegativesRankingLoss(None, scale=20.0)
    for seed in range(20):
        torch.manual_seed(seed)
        B, D = int(torch.randint(1, 12, ())), int(torch.randint(1, 40, ()))
        lengths = 10.0 ** torch.randint(-3, 3, (B, V, 1))
        h = torch.randn(B, V, D, dtype=torch.float64) * lengths
        loss, metrics = contrastive_loss(h, 0.05)
        expected = peer.compute_loss_from_embeddings(list(h.unbind(1)), None)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        cosines = F.cosine_similarity(h[:, None, 0], h[None, :, 1], dim=-1)
        others = cosines[~torch.eye(B, dtype=torch.bool)]
        for name, values in ("positive", cosines.diagonal()), ("negative", others):
            total, count = metrics[f"{name}_cosine"]
            torch.testing.assert_close(total, values.sum())
            assert count == max(len(values), 1)  # one sentence has no negatives


def test_losses_are_fp32_under_autocast_and_of_bf16():
    h, labels = torch.randn(8, 3, 16).bfloat16(), torch.rand(8, 3) < 0.5

    def losses(h: Tensor) -> tuple[Tensor, Tensor]:
        rtd = replaced_token_loss(h[..., :2], labels, torch.ones_like(labels), True, "mean")
        return contrastive_loss(h, 0.05)[0], rtd[0]

    expected = losses(h.double())
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for found in (losses(h), losses(h.float())):
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, check_dtype=False)


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
    assert names == ["0.weight", "1.weight", "1.bias", "3.weight"]  # the last norm has none
    assert projector[3].weight.std().item() == pytest.approx(0.02, rel=0.1)  # BERT's


def test_the_tanh_projector_starts_at_berts_initialisation():
    projector, cls = diffcse.make_projector("tanh", 64, 0.02), torch.randn(9, 64)
    weight = projector[0].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    torch.testing.assert_close(projector(cls), (cls @ weight.T).tanh())  # the bias starts at 0


# ------------------------------------------------------------------------------------------------
# Edit, discriminator and model


def model_and_batch(tiny: Path, **settings) -> tuple[diffcse.DiffCSEModel, Batch]:
    """Without dropout, in fp64; 8 of the tiny model's sentences."""
    torch.manual_seed(3)
    settings = {"dropout": 0.0, "generator_dropout": False, "mask_ratio": 0.5, **settings}
    files = {"model": str(tiny), "generator": str(tiny), "train_file": str(tiny / "text.txt")}
    cfg = Config(batch_size=8, **files | settings)
    model = diffcse.DiffCSEModel.from_pretrained(cfg)
    batch = diffcse.draw_batch(model.load_sentences(), model.tokenizer, cfg, step=0)
    return model.double().train(), batch


def loss_and_gradient(model: diffcse.DiffCSEModel, batch: Batch) -> tuple[float, Tensor]:
    model.zero_grad()
    loss, _ = model(batch)
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("changes", [{}, {"views": "first"}, {"pads_in_loss": False}], ids=str)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_gpus_static_shape_has_the_loss_of_the_batchs_own_width(tiny, family, changes):
    """Padded to max_length; without Batch.width, the padding counts (official issue 25)."""
    model, batch = model_and_batch(tiny, lam=1.0, **changes)
    if family == "roberta":  # positions are counted, and x'' has id 0 at padding
        for module in (model.encoder, model.discriminator, model.generator.bert):
            module.embeddings.padding_offset = 1
    padded = batch.pad(32, model.tokenizer.pad_id)
    assert padded.x.shape[1] == 32 > batch.x.shape[1]
    loss, gradient = loss_and_gradient(model, batch)
    padded_loss, padded_gradient = loss_and_gradient(model, padded)
    assert padded_loss == pytest.approx(loss, rel=1e-12)
    assert float((gradient - padded_gradient).norm() / gradient.norm()) < 1e-10
    wide_loss, _ = loss_and_gradient(model, replace(padded, width=None))
    assert (abs(wide_loss - loss) > 1e-3) == ("pads_in_loss" not in changes)


def test_metrics_of_the_discriminator_by_hand():
    """Tokens: replaced and found, replaced and missed, original and found; then padding."""
    logits = torch.tensor([[[0.0, 9.0], [9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]])
    replaced = torch.tensor([[True, True, False, False]])
    mask = torch.tensor([[True, True, True, False]])
    _, metrics = replaced_token_loss(logits, replaced, mask, True, "mean")
    counts = {name: tuple(map(int, metrics[name])) for name in metrics if name != "difference"}
    expected = {"share_replaced": (2, 3), "accuracy_replaced": (1, 2), "accuracy_original": (1, 1)}
    assert counts == expected


def test_masks_are_a_function_of_seed_and_step(tiny, tmp_path):
    """With equal sentences, so that only the mask distinguishes two batches."""
    text = tmp_path / "same.txt"
    text.write_text("the small dog runs and the big cat sleeps in a tree\n" * 16)
    model, _ = model_and_batch(tiny, train_file=str(text))
    sentences, drawn = model.load_sentences(), []
    for seed in (42, 42, 43):
        cfg = replace(model.cfg, seed=seed)
        batches = [diffcse.draw_batch(sentences, model.tokenizer, cfg, i) for i in range(4)]
        drawn.append([tuple(batch.selected.flatten().tolist()) for batch in batches])
    assert drawn[0] == drawn[1] and len({*drawn[0], *drawn[2]}) == 8


def test_the_generators_tokens_have_a_word_and_edit_temperature_is_of_sampling(
    tiny, tmp_path, monkeypatch
):
    """Padded vocabularies are common: their rows never become a token of x''."""
    generator = make_model(tmp_path, vocab_size=len(VOCABULARY) + 8)
    generator.head.bias.data[len(VOCABULARY) :] = 50.0
    bert.save_bert(generator, tmp_path)
    model, batch = model_and_batch(tiny, generator=str(tmp_path))
    temperatures, predict = [], model.generator.predict_tokens
    spy = lambda *args: temperatures.append(args[3]) or predict(*args)  # noqa: E731
    monkeypatch.setattr(model.generator, "predict_tokens", spy)
    for edit in ("argmax", "sample"):
        cfg = replace(model.cfg, edit=edit, edit_temperature=0.5)
        x_edited, _ = edit_sentences(model.generator, batch, model.tokenizer, cfg)
        assert x_edited.max() < len(VOCABULARY)
    assert temperatures == [None, 0.5]


def test_without_the_contrastive_loss_the_encoder_learns_through_h_alone(tiny):
    model, batch = model_and_batch(tiny, lam=0.7, contrastive=False)
    loss, metrics = model(batch)
    loss.backward()
    assert loss.item() == pytest.approx(0.7 * float(metrics["difference"][0]))
    assert model.encoder.embeddings.word.weight.grad.abs().sum() > 1e-6


@pytest.mark.parametrize("dropout", [True, False])
def test_generator_dropout_switch(tiny, dropout):
    model, batch = model_and_batch(tiny, generator_dropout=dropout)
    logits = [model.generator(batch.x_masked, batch.mask) for _ in range(2)]
    assert model.encoder.training and model.generator.training == dropout
    assert torch.equal(*logits) != dropout


def test_h_gap_by_hand(tiny):
    """Row by row: D's mean loss with the h of the sentence before, minus with its own."""
    model, batch = model_and_batch(tiny, generator_dropout=True, edit="sample", dropout=0.3)
    model.head.weight.data.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = model.h_gap(batch)
    assert model.training and model.generator.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    model.eval().projector.train()  # as in a step, by the batch's own statistics
    torch.manual_seed(model.cfg.seed)
    x_edited, replaced = edit_sentences(model.generator, batch, model.tokenizer, model.cfg)
    h = model.projector(model.encoder(batch.x, batch.mask)[:, 0])
    losses = {0: 0.0, 2: 0.0}  # by distance in rows: two views of a sentence
    for distance in losses:
        for row in range(len(h)):
            one = slice(row, row + 1)
            given = h[row - distance][None]
            states = model.discriminator(x_edited[one], batch.mask[one], cls_vector=given)
            log_p, labels = model.head(states)[0].log_softmax(-1), replaced[row].long()
            losses[distance] -= log_p.gather(1, labels[:, None]).sum().item()
    expected = (losses[2] - losses[0]) / batch.x.numel()
    assert abs(expected) > 1e-4
    assert found == pytest.approx(expected, rel=1e-6)


def test_h_gap_is_0_if_no_other_token_can_see_position_0(tiny):
    """Without position 0's own loss, which is of the label "original" in any case."""
    model, batch = model_and_batch(tiny)
    whole, attend = model.h_gap(batch), model.discriminator.forward

    def blind(x: Tensor, mask: Tensor, cls_vector: Tensor) -> Tensor:
        states = attend(x, mask & (torch.arange(x.shape[1]) > 0), cls_vector=cls_vector)
        seen.append(states[:, 1:])
        return states.index_fill(1, torch.tensor(0), 0.0)

    seen = []
    model.discriminator.forward = blind
    assert model.h_gap(batch) == 0 != whole
    assert torch.equal(*seen)


def test_lambda_0_builds_neither_generator_nor_discriminator(tiny):
    model, _ = model_and_batch(tiny, lam=0.0, generator="no such generator")
    assert model.generator is None and model.discriminator is None and not hasattr(model, "head")


# ------------------------------------------------------------------------------------------------
# One update


@pytest.mark.parametrize("scaled", [False, True])
def test_step_is_adamw_without_weight_decay_after_clipping(tiny, scaled):
    """scaled: with fp16's GradScaler, the same gradient norm and the same update."""
    settings = {"projector": "tanh", "clip": 0.1, "lr": 3e-3}
    model, batch = model_and_batch(tiny, **settings)
    twin, _ = model_and_batch(tiny, **settings)
    optimizer, moments = diffcse.make_optimizer(model), {}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    for t in (1, 2, 3):
        metrics = diffcse.train_step(model, optimizer, scaler, None, batch)
        twin.zero_grad()
        twin(batch)[0].backward()
        trained = {name: p for name, p in twin.named_parameters() if p.grad is not None}
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
        torch.testing.assert_close(metrics["grad_norm"][0], norm)
        assert norm > 0.1
        for name, p in trained.items():  # Adam by hand, of the gradient clipped to the norm 0.1
            g = p.grad * 0.1 / (norm + 1e-6)
            m, v = moments.get(name, (0, 0))
            m, v = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p.data -= 3e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if not name.endswith("key.bias"):  # its gradient is rounding error: softmax ignores it
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=name)


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
    order = """bert engine.errors engine.hub engine.tokenizer_folder engine.distributed data
        engine.tokens engine.cli engine.device engine.checkpoint engine.model_folder engine.fast
        engine.run engine.index embed eval_sts engine.demo engine.pretrained diffcse""".split()
    installed = {"torch", "numpy", "tokenizers", "huggingface_hub", "tqdm"}
    files = {*ROOT.glob("*.py"), *(ROOT / "engine").glob("*.py")} - {ROOT / "engine/__init__.py"}
    assert {ROOT / f"{name.replace('.', '/')}.py" for name in order} == files
    for i, name in enumerate(order):
        used = imports_of(ROOT / f"{name.replace('.', '/')}.py")
        allowed = set(order[:i]) | ({"faiss"} if name == "engine.index" else set())
        assert {n for n in used if n.partition(".")[0] not in installed} <= allowed, name
    assert {name.partition(".")[0] for name in imports_of(ROOT / "bert.py")} == {"torch"}
