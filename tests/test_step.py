"""A whole DiffCSE step, written a second time on transformers' modules: the loss and every gradient must be equal."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

import bert
import diffcse

R, T, D, WORDS = 6, 9, 32, 60


class Words:
    """The ids that a tokenizer would give; of another number than BERT's, so that none can be hard-coded."""

    pad, cls, sep, mask, unk, vocab_size = 1, 2, 3, 4, 5, WORDS
    special_ids = [1, 2, 3, 4, 5]


def random_model(family: str, mlm: bool, tmp_path, name: str):
    """A transformers model with random weights, norms and biases included, and ours loaded from its folder."""
    sizes = dict(vocab_size=WORDS, pad_token_id=Words.pad, initializer_range=0.3)
    if family == "distilbert":
        cfg = transformers.DistilBertConfig(dim=D, n_layers=2, n_heads=4, hidden_dim=64, dropout=0, attention_dropout=0,
                                            max_position_embeddings=40, **sizes)  # fmt: skip
        theirs = transformers.DistilBertForMaskedLM(cfg)
    else:
        Config = transformers.RobertaConfig if family == "roberta" else transformers.BertConfig
        cfg = Config(hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, hidden_dropout_prob=0,
                     attention_probs_dropout_prob=0, max_position_embeddings=40, **sizes)  # fmt: skip
        kinds = {("bert", True): transformers.BertForMaskedLM, ("bert", False): transformers.BertModel,
                 ("roberta", True): transformers.RobertaForMaskedLM, ("roberta", False): transformers.RobertaModel}  # fmt: skip
        theirs = kinds[family, mlm](cfg)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / name)
    return theirs.double(), bert.load_bert(tmp_path / name, mlm=mlm).double()


def their_step(cfg, V, encoder, projector, generator, discriminator, head, x, mask, x_masked, selected):
    """Written from the paper and SPEC 0, with loops where they make it plainer. Returns the loss."""
    h = projector(encoder(input_ids=x, attention_mask=mask.long()).last_hidden_state[:, 0])
    loss = 0.0
    for i in range(len(x) // V):  # InfoNCE by hand: sentence i's second view among all second (and third) views
        u = h[V * i]
        logits = [F.cosine_similarity(u, h[V * j + 1], dim=0) / cfg.temperature for j in range(len(x) // V)]
        if V == 3:
            logits += [F.cosine_similarity(u, h[V * j + 2], dim=0) / cfg.temperature + cfg.hard_negative_weight * (i == j)
                       for j in range(len(x) // V)]  # fmt: skip
        loss = loss + (torch.logsumexp(torch.stack(logits), 0) - logits[i]) / (len(x) // V)
    if cfg.lam == 0:
        return loss
    with torch.no_grad():
        edited = generator(input_ids=x_masked, attention_mask=mask.long()).logits.argmax(-1)
    for r in range(len(x)):
        for t in range(T):
            if cfg.edit_scope == "masked" and not selected[r, t] or cfg.protect_sep and x[r, t] == Words.sep:
                edited[r, t] = x[r, t]
            edited[r, t] = 0 if not mask[r, t] else Words.cls if t == 0 else edited[r, t]
    hook = discriminator.embeddings.register_forward_hook(lambda m, i, out: torch.cat([h[:, None], out[:, 1:]], 1))
    logits = head(discriminator(input_ids=edited, attention_mask=mask.long()).last_hidden_state)
    hook.remove()
    terms = []
    for r in range(0, len(x), V if cfg.views == "first" else 1):
        for t in range(T):
            if mask[r, t] or cfg.pads_in_loss:
                terms.append(F.cross_entropy(logits[r, t], (mask[r, t] & (edited[r, t] != x[r, t])).long()))
    assert any(t > 0 for t in terms)
    return loss + cfg.lam * (torch.stack(terms).mean() if cfg.reduction == "mean" else torch.stack(terms).sum())


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("changes", [
    {}, {"lam": 0.0}, {"edit_scope": "masked"}, {"pads_in_loss": False}, {"reduction": "sum", "lam": 0.01}, {"views": "first"},
    {"protect_sep": True}, {"projector": "tanh"}, {"V": 3, "hard_negative_weight": 0.7}, {"V": 3, "views": "first"},
    {"edit_scope": "masked", "pads_in_loss": False, "reduction": "sum", "views": "first", "protect_sep": True, "generator_dropout": False},
], ids=lambda c: ",".join(c) or "published")  # fmt: skip
def test_step_equals_one_written_on_transformers(family, changes, tmp_path):
    torch.manual_seed(len(str(changes)))
    V = changes.get("V", 2)
    cfg = diffcse.Config(**{"lam": 0.5} | {k: v for k, v in changes.items() if k != "V"})
    encoder, our_encoder = random_model(family, False, tmp_path, "f")
    discriminator, our_discriminator = random_model(family, False, tmp_path, "d")
    generator, our_generator = random_model("distilbert" if family == "bert" else family, True, tmp_path, "g")
    ours = diffcse.TrainingModel(cfg, our_encoder, Words, our_generator if cfg.lam else None, our_discriminator if cfg.lam else None)
    ours.double().train()
    projector = copy.deepcopy(ours.projector)
    head = copy.deepcopy(ours.head) if cfg.lam else None

    x = torch.randint(6, WORDS, (R, T))
    mask = torch.arange(T) < torch.tensor([9, 4, 7, 2, 9, 5])[:, None]
    x[:, 0] = Words.cls
    x[torch.arange(R), mask.sum(1) - 1] = Words.sep
    x[~mask] = Words.pad
    selected = (torch.rand(R, T) < 0.4) & mask & (x > 5)
    x_masked = torch.where(selected, Words.mask, x)

    expected = their_step(cfg, V, encoder, projector, generator, discriminator, head, x, mask, x_masked, selected)
    expected.backward()
    loss, _ = ours(x, mask, x_masked, selected, V)
    loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-9)

    def gradients(model) -> dict:  # transformers' pooler and MLM head take no part and have none
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def as_theirs(model) -> dict:  # our gradients under Hugging Face's names
        names = bert.FAMILIES[family].encoder
        return {bert._their_name(n, names): g for n, g in gradients(model).items()}

    pairs = [(as_theirs(our_encoder), gradients(encoder)), (gradients(ours.projector), gradients(projector))]
    if cfg.lam:
        pairs += [(as_theirs(our_discriminator), gradients(discriminator)), (gradients(ours.head), gradients(head))]
        assert not gradients(ours.generator)
    for got, want in pairs:
        got = {n: g for n, g in got.items() if not n.startswith("pooler")}
        assert got.keys() == want.keys() and got
        for name in want:
            g, w = got[name], want[name]
            if name.endswith("embeddings.weight"):  # transformers drops the gradient of the padding word's row
                g[Words.pad], w[Words.pad] = 0, 0
            error = (g - w).norm() / w.norm().clamp_min(1e-12)
            assert error < 1e-5 or (g - w).norm() < 1e-10, (name, float(error))
