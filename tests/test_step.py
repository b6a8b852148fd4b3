"""The loss and every gradient of a step equal those of a second, plain step on transformers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import Words, random_pair

import bert
import diffcse
from data import Batch

pytest.importorskip("transformers", reason="the second step is written on it")
R, T = 6, 9


def their_contrastive_loss(cfg, V, h):
    """InfoNCE: sentence i's second view among all second (and third) views."""
    B, loss = len(h) // V, 0.0
    for i in range(B):
        u = h[V * i]
        logits = [F.cosine_similarity(u, h[V * j + 1], dim=0) / cfg.temperature for j in range(B)]
        if V == 3:
            for j in range(B):
                logit = F.cosine_similarity(u, h[V * j + 2], dim=0) / cfg.temperature
                logits.append(logit + cfg.hard_negative_weight * (i == j))
        loss = loss + (torch.logsumexp(torch.stack(logits), 0) - logits[i]) / B
    return loss


def their_step(cfg, V, encoder, projector, generator, discriminator, head, batch):
    """Written from the paper and the official cl_forward, with loops where they are plainer."""
    x, mask, x_masked, selected = batch.tensors()
    h = projector(encoder(input_ids=x, attention_mask=mask.long()).last_hidden_state[:, 0])
    loss = their_contrastive_loss(cfg, V, h)
    if cfg.lam == 0:
        return loss
    with torch.no_grad():
        edited = generator(input_ids=x_masked, attention_mask=mask.long()).logits.argmax(-1)
    for r in range(len(x)):
        for t in range(T):
            is_sep = cfg.protect_sep and x[r, t] == Words.sep_id
            if cfg.edit_scope == "masked" and not selected[r, t] or is_sep:
                edited[r, t] = x[r, t]
            edited[r, t] = 0 if not mask[r, t] else Words.cls_id if t == 0 else edited[r, t]
    hook = discriminator.embeddings.register_forward_hook(
        lambda module, inputs, out: torch.cat([h[:, None], out[:, 1:]], 1)
    )
    logits = head(discriminator(input_ids=edited, attention_mask=mask.long()).last_hidden_state)
    hook.remove()
    terms = []
    for r in range(0, len(x), V if cfg.views == "first" else 1):
        for t in range(T):
            if mask[r, t] or cfg.pads_in_loss:
                label = (mask[r, t] & (edited[r, t] != x[r, t])).long()
                terms.append(F.cross_entropy(logits[r, t], label))
    assert any(term > 0 for term in terms)
    terms = torch.stack(terms)
    return loss + cfg.lam * (terms.mean() if cfg.reduction == "mean" else terms.sum())


def random_batch(V: int) -> Batch:
    x = torch.randint(6, Words.vocab_size, (R, T))
    mask = torch.arange(T) < torch.tensor([9, 4, 7, 2, 9, 5])[:, None]
    x[:, 0] = Words.cls_id
    x[torch.arange(R), mask.sum(1) - 1] = Words.sep_id
    x[~mask] = Words.pad_id
    selected = mask & (torch.rand(R, T) < 0.4)  # special tokens too, unlike mask_tokens
    return Batch(x, mask, torch.where(selected, Words.mask_id, x), selected, V)


def gradients(model, rename=lambda name: name) -> dict[str, torch.Tensor]:
    """Of each parameter that takes part: not of poolers."""
    found = {rename(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in found:
        if name.endswith("embeddings.weight"):  # transformers drops the padding row's gradient
            found[name][Words.pad_id] = 0
    return found


PAPER = {"edit_scope": "masked", "pads_in_loss": False, "reduction": "sum", "views": "first"}
CHANGES = [
    {},
    {"lam": 0.0},
    {"edit_scope": "masked"},
    {"pads_in_loss": False},
    {"reduction": "sum", "lam": 0.01},
    {"views": "first"},
    {"protect_sep": True},
    {"projector": "tanh"},
    {"V": 3, "hard_negative_weight": 0.7},
    {"V": 3, "views": "first"},
    PAPER | {"protect_sep": True, "generator_dropout": False},
]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: ",".join(c) or "published")
def test_step_equals_one_written_on_transformers(family, changes, tmp_path):
    torch.manual_seed(len(str(changes)))
    V = changes.get("V", 2)
    cfg = diffcse.Config(**{"lam": 0.5} | {k: v for k, v in changes.items() if k != "V"})
    encoder, our_encoder = random_pair(family, False, tmp_path / "f")
    discriminator, our_discriminator = random_pair(family, False, tmp_path / "d")
    generator_family = "distilbert" if family == "bert" else family
    generator, our_generator = random_pair(generator_family, True, tmp_path / "g")
    parts = (our_generator, our_discriminator) if cfg.lam else ()
    ours = diffcse.DiffCSEModel(cfg, Words, our_encoder, *parts).double().train()
    projector = copy.deepcopy(ours.projector)
    head = copy.deepcopy(ours.head) if cfg.lam else None
    batch = random_batch(V)

    expected = their_step(cfg, V, encoder, projector, generator, discriminator, head, batch)
    expected.backward()
    loss, _ = ours(batch)
    loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-9)

    def hf_name(name: str) -> str:
        return bert.hf_name(name, family, "")

    pairs = [(gradients(our_encoder, hf_name), gradients(encoder))]
    pairs.append((gradients(ours.projector), gradients(projector)))
    if cfg.lam:
        pairs.append((gradients(our_discriminator, hf_name), gradients(discriminator)))
        pairs.append((gradients(ours.head), gradients(head)))
        assert not gradients(ours.generator)
    for found, wanted in pairs:
        assert found.keys() == wanted.keys() and found
        for name, gradient in wanted.items():
            error = (found[name] - gradient).norm()
            assert error <= 1e-5 * gradient.norm() or error < 1e-10, (name, float(error))
