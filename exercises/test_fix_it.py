"""A test for each mistake in fix_it.py. It says what is wrong and how it shows, and not where.

    pytest exercises/test_fix_it.py           # all
    pytest exercises/test_fix_it.py -k bug3   # one

Each looks at one thing, in tiny models with random weights, or in the small BERT where it is about what build() loads: mending
one mistake changes no other's test. The last holds a whole step beside one of diffcse.py, and passes when nothing is left.
Not here: the module that is tested, which the fixture `fix_it` gives.
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
from data import TokenizedSentences, Tokenizer, find_model, mask_tokens
from embed import encode

SENTENCES = [
    "Return the largest element of an array.", "Open a file and read all of its lines into a list, one after another.",
    "Sort it.", "The hyperbolic tangent of each element.", "Join the strings with a separator between them.",
    "Close the connection to the server.", "Draw random numbers.",
    "Whether two tensors are equal, element for element, within a tolerance that is given as a number."]  # fmt: skip
TOKENIZER = Tokenizer(find_model("assets/small-bert"))
Batch = tuple[Tensor, Tensor, Tensor]


def wrong(number: int, what: str) -> None:
    """Ends a test with one sentence and no traceback, which would show the line."""
    pytest.fail(f"bug {number}: {what}", pytrace=False)


def tiny(fix_it: ModuleType) -> nn.Module:
    """The trainer's model, of 32 numbers a token and without dropout."""
    cfg = BertConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    torch.manual_seed(1)
    return fix_it.Model(Bert(cfg), BertForMaskedLM(cfg), Bert(cfg), TOKENIZER.sep)


def made_batch(padding: int = 0) -> Batch:
    """x, mask, x_masked of SENTENCES, each in two rows, with so much padding more than the longest needs. (R, T) each.

    Without dropout two views would be equal, and a step would not show all that it does: here the second lacks its last word.
    """
    views = ((sentence, sentence.rpartition(" ")[0]) for sentence in SENTENCES)
    x, mask = TokenizedSentences(views, TOKENIZER, max_length=32).batch(np.arange(len(SENTENCES)))
    x_masked, _ = mask_tokens(x, TOKENIZER, 0.3, "all", torch.Generator().manual_seed(2))
    filled = ((x, TOKENIZER.pad), (mask, False), (x_masked, TOKENIZER.pad))
    return tuple(F.pad(t, (0, padding), value=value) for t, value in filled)


def gradients(module: nn.Module) -> Tensor:
    """All of a module's gradients, one after another; none are zeros."""
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in module.parameters()])


def one_step(fix_it: ModuleType, model: nn.Module, batch: Batch, lam: float = 0.5) -> dict[str, float]:
    """A step of rate 0: it leaves gradients, and the weights as they are. Returns its row of the log."""
    model.train()
    torch.manual_seed(3)
    return fix_it.step(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, lam)


# ----------------------------------------------------------------------------------------------------------------
# One mistake each


def test_bug1_temperature(fix_it):
    h = torch.eye(8)[:, None].expand(8, 2, 8)  # a sentence's two h's are equal, and two sentences have nothing in common
    loss = float(fix_it.contrastive_loss(h, 0.05)[0])
    expected = float(torch.log1p(7 * torch.exp(torch.tensor(-1 / 0.05))))
    if abs(loss - expected) > 1e-4:
        wrong(1, f"8 sentences whose two vectors are equal, and unlike all others, have a contrastive loss of {loss:.4f} at "
                 f"temperature 0.05, and it should be {expected:.4f}. Where vectors tell nothing it is log 8 = 2.0794: "
                 "a low temperature does not sharpen the cosines")  # fmt: skip


def test_bug2_encoder_learns_from_both(fix_it):
    found = []
    for lam in (0.0, 1000.0):
        one_step(fix_it, model := tiny(fix_it), made_batch(), lam)
        found.append((gradients(model.encoder), gradients(model.discriminator)))
    (encoder, _), (encoder_too, discriminator) = found
    if discriminator.norm() == 0:
        wrong(2, "the discriminator has no gradient at lam 1000: it learns nothing")
    if (encoder_too - encoder).norm() <= 1e-4 * encoder.norm():
        wrong(2, "the encoder's gradient is the same for lam 0 and lam 1000: the difference prediction teaches it nothing, "
                 "though the discriminator learns")  # fmt: skip


def test_bug3_cls_is_no_edit(fix_it):
    (x, mask, x_masked), generator = made_batch(), tiny(fix_it).generator
    with torch.no_grad():
        generator.head.bias[TOKENIZER.mask] += 1e4  # a generator that has one word for everything
    x_edited, replaced = fix_it.edit(generator, x, x_masked, mask, TOKENIZER.sep)
    if not torch.equal(x_edited[:, 0], x[:, 0]):
        wrong(3, "the edited sentences do not begin with [CLS]")
    if count := int(replaced[:, 0].sum()):
        wrong(3, f"position 0 counts as replaced in {count} of {len(x)} rows, though [CLS] (in the discriminator: h) stands "
                 "there, edited or not: what is called replaced is not what is seen to differ")  # fmt: skip
    if not torch.equal(replaced, (x_edited != x) & mask):
        wrong(3, "`replaced` is not where x'' differs from x")
    if int(replaced.sum()) != int((mask & (x != TOKENIZER.sep)).sum()) - len(x):
        wrong(3, "a generator that has one word for everything does not replace every token but [CLS], [SEP] and padding")


def test_bug4_scored_vector(fix_it):
    model = tiny(fix_it)
    expected = encode(model.encoder, TOKENIZER, SENTENCES)
    vectors = np.asarray(fix_it.embed(model, TOKENIZER, SENTENCES))
    if vectors.shape != expected.shape or not np.allclose(vectors, expected, atol=1e-4):
        wrong(4, "the vectors that are scored are not the encoder's [CLS]: something that training alone should have stands "
                 "behind it, so that even the score of step 0 is not the pretrained model's")  # fmt: skip


def test_bug5_dropout_after_scores(fix_it, capsys):
    every = fix_it.SCORE_EVERY
    def score(encoder) -> dict[str, float]:
        return {"score": float(encoder(SENTENCES).mean())}

    rows = fix_it.train(SENTENCES, score, steps=every + 2, batch_size=4, lr=0.0, lam=0.05, seed=0)
    capsys.readouterr()  # the log itself
    agree = [row["step"] for row in rows if row.get("positive_cosine", 0.0) > 0.99999]
    if agree:
        wrong(5, f"the two views of a sentence have a cosine of 1.0000 from step {agree[0]} on (scores were made at steps 0 and "
                 f"{every}): they are to differ by dropout, and there is none any more")  # fmt: skip


def test_bug6_padding_has_no_loss(fix_it):
    model = tiny(fix_it)
    own, wide = (one_step(fix_it, model, made_batch(padding))["prediction"] for padding in (0, 24))
    if abs(own - wide) > 1e-4:
        wrong(6, f"the replaced-token loss of the same sentences is {own:.4f} padded to their longest and {wide:.4f} padded by "
                 "24 more: padding counts in the mean, and there is nothing to be said about it")  # fmt: skip


def test_bug7_one_batchnorm(fix_it):
    one_step(fix_it, model := tiny(fix_it), made_batch())
    counted = {int(module.num_batches_tracked) for module in model.modules() if isinstance(module, nn.BatchNorm1d)}
    if counted != {1}:
        wrong(7, f"in one step BatchNorm has counted {max(counted, default=0)} batches: its mean and variance are not those of "
                 "all rows of the step, both views together")  # fmt: skip


def test_bug8_fixed_generator(fix_it):
    model, tokenizer = fix_it.build()
    before = copy.deepcopy(model.encoder.state_dict())
    model.train()
    fix_it.step(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), made_batch(), 0.05)
    fixed = load_bert(find_model("assets/small-bert"), mlm=True).state_dict()
    moved = [name for name, p in model.generator.state_dict().items() if not torch.equal(p, fixed[name])]
    if moved:
        wrong(8, f"after one step {len(moved)} of the generator's {len(fixed)} tensors are not those of its folder any more: "
                 "it is to stay fixed")  # fmt: skip
    if all(torch.equal(p, before[name]) for name, p in model.encoder.state_dict().items()):
        wrong(8, "now the encoder does not move either")


# ----------------------------------------------------------------------------------------------------------------
# Everything


def test_mended(fix_it):
    """A step's loss and gradients are those of diffcse.TrainingModel with the same weights, in fp32, without dropout."""
    model, (x, mask, x_masked) = tiny(fix_it), made_batch(padding=3)
    cfg = diffcse.Config(lam=0.5, temperature=fix_it.TEMPERATURE, mask="all", edit_scope="all", protect_sep=True,
                         pads_in_loss=False, dropout=0.0)  # fmt: skip
    parts = copy.deepcopy(model)
    theirs = diffcse.TrainingModel(cfg, parts.encoder, TOKENIZER, parts.generator, parts.discriminator).train()
    theirs.projector, theirs.head = parts.projector, parts.head
    row = one_step(fix_it, model, (x, mask, x_masked), cfg.lam)
    loss, sums = theirs(x, mask, x_masked, x_masked != x)
    loss.backward()
    differ = []
    for name, expected in (("loss", sums["loss"]), ("contrastive", sums["contrastive"]), ("prediction", sums["prediction"])):
        if abs(row[name] - float(expected)) > 1e-5 * max(1.0, abs(float(expected))):
            differ.append(f"{name} {row[name]:.6f} and not {float(expected):.6f}")
    for name in ("encoder", "projector", "discriminator", "head"):
        got, expected = gradients(getattr(model, name)), gradients(getattr(theirs, name))
        if (error := float((got - expected).norm() / expected.norm())) > 1e-5:
            differ.append(f"gradient of the {name}, by {100 * error:.3g} % of its length")
    if differ:
        pytest.fail(f"not mended yet: a step is not that of diffcse.py with the same weights: {'; '.join(differ)}", pytrace=False)
