"""The loss and every gradient of a step equal those of a second, plain step on transformers."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

import bert
import diffcse
from data import Batch

R, T, D, W = 6, 9, 32, 60


class Words:
    """A tokenizer's ids. They differ from BERT's, so that none can be hard-coded."""

    pad_id, cls_id, sep_id, mask_id, unk_id, vocab_size = 1, 2, 3, 4, 5, W
    special_ids = [1, 2, 3, 4, 5]


CLASSES = {
    ("bert", True): transformers.BertForMaskedLM,
    ("bert", False): transformers.BertModel,
    ("roberta", True): transformers.RobertaForMaskedLM,
    ("roberta", False): transformers.RobertaModel,
}


def random_model(family: str, mlm: bool, folder):
    """transformers' model with random weights, norms and biases included, and ours of its files."""
    sizes = dict(vocab_size=W, pad_token_id=Words.pad_id, max_position_embeddings=40)
    sizes |= dict(initializer_range=0.3)
    if family == "distilbert":
        sizes |= dict(dim=D, n_layers=2, n_heads=4, hidden_dim=64, dropout=0, attention_dropout=0)
        theirs = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes))
    else:
        sizes |= dict(hidden_size=D, num_hidden_layers=2, num_attention_heads=4)
        sizes |= dict(intermediate_size=64, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        cfg = transformers.RobertaConfig if family == "roberta" else transformers.BertConfig
        theirs = CLASSES[family, mlm](cfg(**sizes))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(folder)
    return theirs.double(), bert.load_bert(folder, mlm=mlm).double()


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
    x = torch.randint(6, W, (R, T))
    mask = torch.arange(T) < torch.tensor([9, 4, 7, 2, 9, 5])[:, None]
    x[:, 0] = Words.cls_id
    x[torch.arange(R), mask.sum(1) - 1] = Words.sep_id
    x[~mask] = Words.pad_id
    selected = (torch.rand(R, T) < 0.4) & mask & (x > 5)
    return Batch(x, mask, torch.where(selected, Words.mask_id, x), selected, V)


def gradients(model) -> dict:
    """transformers' pooler and MLM head take no part and have none."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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
    encoder, our_encoder = random_model(family, False, tmp_path / "f")
    discriminator, our_discriminator = random_model(family, False, tmp_path / "d")
    generator_family = "distilbert" if family == "bert" else family
    generator, our_generator = random_model(generator_family, True, tmp_path / "g")
    parts = (our_generator, our_discriminator) if cfg.lam else ()
    ours = diffcse.DiffCSEModel(cfg, Words, our_encoder, *parts).double().train()
    projector = copy.deepcopy(ours.projector)
    head = copy.deepcopy(ours.head) if cfg.lam else None
    batch = random_batch(V)

    theirs = (encoder, projector, generator, discriminator, head)
    expected = their_step(cfg, V, *theirs, batch)
    expected.backward()
    loss, _ = ours(batch)
    loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-9)

    def under_their_names(model) -> dict:
        return {bert.hf_name(name, family, ""): g for name, g in gradients(model).items()}

    pairs = [
        (under_their_names(our_encoder), gradients(encoder)),
        (gradients(ours.projector), gradients(projector)),
    ]
    if cfg.lam:
        pairs.append((under_their_names(our_discriminator), gradients(discriminator)))
        pairs.append((gradients(ours.head), gradients(head)))
        assert not gradients(ours.generator)
    for ours_of, theirs_of in pairs:
        ours_of = {name: g for name, g in ours_of.items() if not name.startswith("pooler")}
        assert ours_of.keys() == theirs_of.keys() and ours_of
        for name in theirs_of:
            g, w = ours_of[name], theirs_of[name]
            if name.endswith("embeddings.weight"):  # transformers drops the padding row's gradient
                g[Words.pad_id], w[Words.pad_id] = 0, 0
            error = (g - w).norm() / w.norm().clamp_min(1e-12)
            assert error < 1e-5 or (g - w).norm() < 1e-10, (name, float(error))
