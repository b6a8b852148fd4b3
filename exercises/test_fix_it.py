"""A test for each bug in fix_it.py. It says what is wrong and how it shows, not where.

    pytest exercises/test_fix_it.py           # all
    pytest exercises/test_fix_it.py -k bug3   # one

Each tests one thing, in tiny models with random weights, or in the small BERT where the bug is in
build(): fixing one bug changes no other test. The last test compares a whole step with diffcse.py's
and passes when all bugs are fixed. The module under test is the fixture `fix_it` of conftest.py.
"""

import copy
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import diffcse
from bert import Bert, BertConfig, BertForMaskedLM, load_bert
from data import Batch, Tokenizer, mask_tokens
from embed import encode
from engine.hub import find_model
from engine.tokens import TokenizedSentences

SENTENCES = [
    "Return the largest element of an array.",
    "Open a file and read all of its lines into a list, one after another.",
    "Sort it.",
    "The hyperbolic tangent of each element.",
    "Join the strings with a separator between them.",
    "Close the connection to the server.",
    "Draw random numbers.",
    "Whether two tensors are equal, element for element, within a tolerance given as a number.",
]
TOKENIZER = Tokenizer(find_model("assets/small-bert"))
Tensors = tuple[Tensor, Tensor, Tensor]


def wrong(number: int, what: str) -> None:
    """End a test with one message and no traceback, which would show the line."""
    pytest.fail(f"bug {number}: {what}", pytrace=False)


def tiny(fix_it: ModuleType) -> nn.Module:
    """The trainer's model with a hidden size of 32, without dropout."""
    cfg = BertConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(1)
    return fix_it.Model(Bert(cfg), BertForMaskedLM(cfg), Bert(cfg), TOKENIZER.sep_id)


def make_batch(padding: int = 0) -> Tensors:
    """x, mask, x_masked of SENTENCES, (R, T) each, with `padding` more columns than necessary.

    The second view lacks the last word: without dropout the two views would be equal.
    """
    views = ((sentence, sentence.rpartition(" ")[0]) for sentence in SENTENCES)
    sentences = TokenizedSentences(views, TOKENIZER, max_length=32)
    x, mask = sentences.rows(np.arange(len(SENTENCES)))
    x_masked, _ = mask_tokens(x, TOKENIZER, 0.3, "all", torch.Generator().manual_seed(2))
    values = TOKENIZER.pad_id, False, TOKENIZER.pad_id
    return tuple(F.pad(t, (0, padding), value=v) for t, v in zip((x, mask, x_masked), values))


def gradients(module: nn.Module) -> Tensor:
    """All gradients of a module in one vector; a missing gradient is zero."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


def one_step(
    fix_it: ModuleType, model: nn.Module, batch: Tensors, lam: float = 0.5
) -> dict[str, float]:
    """A step of rate 0: it computes gradients and keeps the weights. Returns its log line."""
    model.train()
    torch.manual_seed(3)
    return fix_it.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, lam)


# ------------------------------------------------------------------------------------------------
# One bug each


def test_bug1_temperature(fix_it):
    h = torch.eye(8)[:, None].expand(8, 2, 8)  # views of a sentence equal, sentences orthogonal
    loss = float(fix_it.contrastive_loss(h, 0.05)[0])
    expected = float(torch.log1p(7 * torch.exp(torch.tensor(-1 / 0.05))))
    if abs(loss - expected) > 1e-4:
        wrong(
            1,
            f"the contrastive loss of 8 sentences whose two views are equal, and orthogonal to all "
            f"others, is {loss:.4f} at temperature 0.05; it should be {expected:.4f}. Vectors "
            "without any information give log 8 = 2.0794. A low temperature does not sharpen the "
            "softmax",
        )


def test_bug2_encoder_learns_from_both(fix_it):
    found = []
    for lam in (0.0, 1000.0):
        one_step(fix_it, model := tiny(fix_it), make_batch(), lam)
        found.append((gradients(model.encoder), gradients(model.discriminator)))
    (encoder, _), (encoder_large_lam, discriminator) = found
    if discriminator.norm() == 0:
        wrong(2, "the discriminator has no gradient at lam 1000: it learns nothing")
    if (encoder_large_lam - encoder).norm() <= 1e-4 * encoder.norm():
        wrong(
            2,
            "the encoder's gradient is the same for lam 0 and lam 1000: the difference prediction "
            "does not train the encoder, though it trains the discriminator",
        )


def test_bug3_cls_is_no_edit(fix_it):
    (x, mask, x_masked), generator = make_batch(), tiny(fix_it).generator
    with torch.no_grad():
        generator.head.bias[TOKENIZER.mask_id] += 1e4  # it predicts the same token everywhere
    x_edited, replaced = fix_it.edit(generator, x, x_masked, mask, TOKENIZER.sep_id)
    if not torch.equal(x_edited[:, 0], x[:, 0]):
        wrong(3, "the edited sentences do not begin with [CLS]")
    if count := int(replaced[:, 0].sum()):
        wrong(
            3,
            f"position 0 is labelled replaced in {count} of {len(x)} rows, though x'' has [CLS] "
            "there, as x has: the labels do not describe the x'' that the discriminator reads",
        )
    if not torch.equal(replaced, (x_edited != x) & mask):
        wrong(3, "`replaced` is not where x'' differs from x")
    if int(replaced.sum()) != int((mask & (x != TOKENIZER.sep_id)).sum()) - len(x):
        wrong(
            3,
            "a generator that predicts the same token everywhere does not replace every token "
            "except [CLS], [SEP] and padding",
        )


def test_bug4_scored_vector(fix_it):
    model = tiny(fix_it)
    expected = encode(model.encoder, TOKENIZER, SENTENCES)
    vectors = np.asarray(fix_it.embed(model, TOKENIZER, SENTENCES))
    if vectors.shape != expected.shape or not np.allclose(vectors, expected, atol=1e-4):
        wrong(
            4,
            "the vectors that are scored are not the encoder's [CLS]: a module that is for "
            "training only is applied to them, so even the score of step 0 is not the pretrained "
            "model's",
        )


def test_bug5_dropout_after_scores(fix_it, capsys):
    every = fix_it.SCORE_EVERY

    def score(encoder) -> dict[str, float]:
        return {"score": float(encoder(SENTENCES).mean())}

    rows = [(sentence,) for sentence in SENTENCES]
    log = fix_it.train(rows, score, steps=every + 2, batch_size=4, lr=0.0, lam=0.05, seed=0)
    capsys.readouterr()  # discard the printed log
    equal = [line["step"] for line in log if line.get("positive_cosine", 0.0) > 0.99999]
    if equal:
        wrong(
            5,
            f"the two views of a sentence have a cosine of 1.0000 from step {equal[0]} on (scores "
            f"were computed at steps 0 and {every}): they should differ by dropout, which is off",
        )


def test_bug6_padding_has_no_loss(fix_it):
    model = tiny(fix_it)
    losses = [one_step(fix_it, model, make_batch(padding))["difference"] for padding in (0, 24)]
    if abs(losses[0] - losses[1]) > 1e-4:
        wrong(
            6,
            f"the replaced-token loss of the same sentences is {losses[0]:.4f} padded to the "
            f"longest, and {losses[1]:.4f} padded by 24 more: padding counts in the mean",
        )


def test_bug7_one_batchnorm(fix_it):
    one_step(fix_it, model := tiny(fix_it), make_batch())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    counted = {int(norm.num_batches_tracked) for norm in norms}
    if counted != {1}:
        wrong(
            7,
            f"in one step BatchNorm has counted {max(counted, default=0)} batches: its mean and "
            "variance are not those of all rows of the step, both views together",
        )


def test_bug8_frozen_generator(fix_it):
    model, _ = fix_it.build()
    before = copy.deepcopy(model.encoder.state_dict())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    fix_it.train_step(model, optimizer, make_batch(), 0.05)
    fixed = load_bert(find_model("assets/small-bert"), mlm=True).state_dict()
    generator = model.generator.state_dict()
    moved = [name for name in fixed if not torch.equal(generator[name], fixed[name])]
    if moved:
        wrong(
            8,
            f"after one step {len(moved)} of the generator's {len(fixed)} tensors differ from its "
            "folder's: it should stay frozen",
        )
    if all(torch.equal(p, before[name]) for name, p in model.encoder.state_dict().items()):
        wrong(8, "now the encoder is frozen, too")


# ------------------------------------------------------------------------------------------------
# All bugs


def test_mended(fix_it):
    """A step's losses and gradients are those of diffcse.DiffCSEModel with the same weights."""
    model, (x, mask, x_masked) = tiny(fix_it), make_batch(padding=3)
    cfg = diffcse.Config(
        lam=0.5,
        temperature=fix_it.TEMPERATURE,
        masking="all",
        edit_scope="all",
        protect_sep=True,
        pads_in_loss=False,
        dropout=0.0,
    )
    copied = copy.deepcopy(model)
    parts = copied.encoder, copied.generator, copied.discriminator
    theirs = diffcse.DiffCSEModel(cfg, TOKENIZER, *parts).train()
    theirs.projector, theirs.head = copied.projector, copied.head
    line = one_step(fix_it, model, (x, mask, x_masked), cfg.lam)
    loss, metrics = theirs(Batch(x, mask, x_masked, x_masked != x))
    loss.backward()
    differences = []
    for name in ("loss", "contrastive", "difference"):
        expected = float(metrics[name][0])
        if abs(line[name] - expected) > 1e-5 * max(1.0, abs(expected)):
            differences.append(f"{name} is {line[name]:.6f} instead of {expected:.6f}")
    for name in ("encoder", "projector", "discriminator", "head"):
        found, expected = gradients(getattr(model, name)), gradients(getattr(theirs, name))
        if (error := float((found - expected).norm() / expected.norm())) > 1e-5:
            differences.append(f"the gradient of the {name} differs by {100 * error:.3g} %")
    if differences:
        listed = "; ".join(differences)
        pytest.fail(f"bugs are left: a step is not that of diffcse.py: {listed}", pytrace=False)
