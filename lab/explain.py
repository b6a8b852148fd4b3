"""One training step of one sentence, with all its numbers. Nothing is trained or written.

    python -m lab.explain --config demo "The cat sat on the mat ."           # a run's first step
    python -m lab.explain --resume runs/demo-1 "The cat sat on the mat ."    # a stopped run's next

The sentence and OTHERS form the batch. It goes through the functions of diffcse.py in their order,
with the seeds of the step, so the numbers are the step's own.
Shapes: as in diffcse.py; rows 0 and 1 are the sentence's two views.
Not here: the ablations' steps, hard negatives, mixed precision, GPUs.
"""

import math
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch, Tokenizer
from diffcse import (
    PRESETS,
    Config,
    DiffCSEModel,
    contrastive_loss,
    derive_seed,
    draw_batch,
    edit_sentences,
    make_optimizer,
    replaced_token_loss,
)
from engine import cli, fast
from engine.errors import UserError, run_main
from engine.checkpoint import load_state, load_state_dict
from engine.tokens import TokenizedSentences

OTHERS = (
    "A dog is chasing a ball in the park .",
    "The president gave a speech on Monday .",
    "Water boils at a hundred degrees .",
    "She has played the guitar since she was ten .",
    "The train to Paris leaves in an hour .",
    "Prices rose by two percent last year .",
    "A kitten lay on the rug .",
)
WIDTH = 100  # columns of text


# ------------------------------------------------------------------------------------------------
# The step


def load_model(cfg: Config) -> tuple[DiffCSEModel, int]:
    """The model before a step, and that step's number. Raises: UserError for a finished run."""
    torch.manual_seed(cfg.seed)
    model = DiffCSEModel.from_pretrained(cfg)
    if not cfg.resume:
        return model.train(), 0
    tensors, state = load_state(Path(cfg.resume))
    if "step" not in state:
        raise UserError(
            f"--resume {cfg.resume}: it has no saved step. A finished run keeps its encoder only; "
            "stop a run with Ctrl-C before its end, and explain that"
        )
    load_state_dict(tensors, model, make_optimizer(model))
    return model.train(), state["step"]


class InOrder(TokenizedSentences):
    def shuffled(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(len(self))


class Difference(NamedTuple):
    """The discriminator's part of a step, of the edited rows."""

    batch: Batch
    x_edited: Tensor  # (R, T)
    replaced: Tensor  # (R, T) bool
    logits: Tensor  # (R, T, 2)
    logits_without: Tensor  # (R, T, 2), without h
    loss: float
    loss_without: float


class Step(NamedTuple):
    cosines: Tensor  # (B,) of the sentence's first view with all second views
    contrastive: float
    difference: Difference | None  # None: SimCSE


@torch.no_grad()
def compute_step(model: DiffCSEModel, batch: Batch) -> Step:
    """DiffCSEModel.forward, with its intermediate results."""
    cfg = model.cfg
    h = model.projector(model.encoder(batch.x, batch.mask, cls_only=True)[:, 0])  # (R, D)
    contrastive, _ = contrastive_loss(h.unflatten(0, (-1, batch.views)), cfg.temperature)
    cosines = F.cosine_similarity(h[:1], h[1 :: batch.views])  # (B,)
    if cfg.lam == 0:
        return Step(cosines, contrastive.item(), None)
    if cfg.views == "first":
        h, batch = h[:: batch.views], batch.first_views()
    x_edited, replaced = edit_sentences(model.generator, batch, model.tokenizer, cfg)
    before = torch.get_rng_state()
    logits = model.head(model.discriminator(x_edited, batch.mask, cls_vector=h))
    torch.set_rng_state(before)  # the same dropout again
    logits_without = model.head(model.discriminator(x_edited, batch.mask))
    losses = [
        replaced_token_loss(each, replaced, batch.mask, cfg.pads_in_loss, cfg.reduction)[0].item()
        for each in (logits, logits_without)
    ]
    difference = Difference(batch, x_edited, replaced, logits, logits_without, *losses)
    return Step(cosines, contrastive.item(), difference)


# ------------------------------------------------------------------------------------------------
# The text


def columns(head: list[str], rows: Iterable[list[str]], sides: str) -> str:
    """A text table. sides: "<" or ">" for each column, the alignment of its cells."""
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = (zip(row, sides, widths) for row in table)
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in line).rstrip() for line in lines
    )


def wrapped(text: str) -> str:
    lines = textwrap.wrap(text, WIDTH, replace_whitespace=False, break_on_hyphens=False)
    return "\n".join(lines)


def token(tokenizer: Tokenizer, i: int) -> str:
    return tokenizer.backend.id_to_token(int(i)) or f"#{int(i)}"


def describe_sentence(sentence: str, tokenizer: Tokenizer, ids: Tensor, max_length: int) -> str:
    """Shapes: ids (T,), without padding."""
    tokens = " ".join(token(tokenizer, i) for i in ids)
    lines = [wrapped(f"The sentence: {sentence}"), wrapped(f"Its {len(ids)} tokens: {tokens}")]
    encoding = tokenizer.backend.encode(sentence)  # not truncated
    if rest := encoding.tokens[len(ids) - 1 : -1]:
        lines.append(wrapped(f"Cut off by --max-length {max_length}: {' '.join(rest)}"))
    spans = zip(encoding.ids, encoding.offsets)
    if unknown := [sentence[slice(*span)] for i, span in spans if i == tokenizer.unk_id]:
        name = token(tokenizer, tokenizer.unk_id)
        lines.append(wrapped(f"{name} stands for {', '.join(unknown)}: not in the vocabulary."))
    return "\n".join(lines)


def describe_contrastive(step: Step, texts: list[str], temperature: float) -> str:
    logits = step.cosines / temperature
    rows = []
    for i, (cosine, logit, p) in enumerate(zip(step.cosines, logits, logits.softmax(0))):
        text = textwrap.shorten(texts[i], 60, placeholder=" ...") + "   <- its own" * (i == 0)
        rows.append([f"{cosine:.3f}", f"{logit:.2f}", f"{100 * p:.2f} %", text])
    head = ["cosine", f"/ {temperature:g}", "softmax", "the second view of"]
    own, B = -logits.log_softmax(0)[0].item(), len(texts)
    before = wrapped(
        "1. Contrastive loss. The encoder reads each sentence twice, with different dropout. The "
        "projector turns each [CLS] state into an h. The loss asks which of all second views "
        "belongs to a first view. For the sentence's first view:"
    )
    after = wrapped(
        f"-log of the probability of its own is {own:.4f}. The mean over all {B} sentences is the "
        f"contrastive loss: {step.contrastive:.4f} (guessing: log {B} = {math.log(B):.4f})."
    )
    return f"{before}\n\n{columns(head, rows, '>>><')}\n\n{after}"


def describe_difference(step: Difference, tokenizer: Tokenizer, cfg: Config, new: bool) -> str:
    batch, word = step.batch, partial(token, tokenizer)
    losses = F.cross_entropy(step.logits[0], step.replaced[0].long(), reduction="none")  # (T,)
    rows = []
    for t in range(int(batch.mask[0].sum())):
        cells = [str(t), word(batch.x[0, t])]
        cells.append(word(batch.x_masked[0, t]) + " *" * bool(batch.selected[0, t]))
        cells.append(word(step.x_edited[0, t]) if t else "h")
        cells.append("replaced" if step.replaced[0, t] else "original")
        for logits in (step.logits, step.logits_without):
            cells.append(f"{100 * logits[0, t].softmax(-1)[1]:.1f} %")
        rows.append([*cells, f"{losses[t]:.3f}"])
    head = ["", "x", "x' masked", "x'' edited", "label", "with h", "without h", "loss"]
    mixture = " (one in ten is a random word, one in ten is unchanged)"
    counted = "positions (padding is original)" if cfg.pads_in_loss else "tokens"
    guessing = f", guessing log 2 = {math.log(2):.4f}" if cfg.reduction == "mean" else ""
    before = wrapped(
        "2. Difference prediction. In x', some tokens are masked, with a *"
        f"{mixture * (cfg.masking == '80-10-10')}. The generator predicts "
        f"{'all tokens' if cfg.edit_scope == 'all' else 'the masked tokens'} of x'; its "
        f"{'best' if cfg.edit == 'argmax' else 'sampled'} tokens make x''. The discriminator "
        "reads x'' with h in place of [CLS], and predicts for each token the probability that it "
        "was replaced (with h):"
    )
    after = [
        "Without h, the discriminator reads the [CLS] of x'', as in ELECTRA. Training does not use "
        "that column.",
        f"The {cfg.reduction} of the loss over all {counted} of all edited sentences: "
        f"{step.loss:.4f} (without h {step.loss_without:.4f}{guessing}).",
    ]
    if cfg.views == "both":
        edit = " ".join(word(i) for i in step.x_edited[1, 1 : len(rows)])
        after.append(f"The second view has its own mask and edit: h {edit}")
    if new:
        after.append("The discriminator's last layer is new: before training, it guesses.")
    return "\n\n".join([before, columns(head, rows, "><<<<>>>"), *map(wrapped, after)])


def explain(cfg: Config, sentence: str) -> str:
    """The text. Raises: UserError for an empty sentence or a finished run."""
    sentence = " ".join(sentence.split())
    if not sentence:
        raise UserError("the sentence is empty")
    model, number = load_model(cfg)
    tokenizer = model.tokenizer
    texts = [sentence, *(other for other in OTHERS if other != sentence)]
    sentences = InOrder([(text,) for text in texts], tokenizer, cfg.max_length)
    batch = draw_batch(sentences, tokenizer, replace(cfg, batch_size=len(texts)), number)
    torch.manual_seed(derive_seed(cfg.seed, number, 1))  # dropout
    step = fast.accelerate(partial(compute_step, model), model, cfg.fast)(batch)
    run = f" of the run in {cfg.resume}" if cfg.resume else ""
    paragraphs = [
        f"Step {number + 1}{run}, seed {cfg.seed}: {len(texts)} sentences with 2 views each.",
        describe_sentence(sentence, tokenizer, batch.x[0][batch.mask[0]], cfg.max_length),
        describe_contrastive(step, texts, cfg.temperature),
    ]
    if step.difference is None:
        return "\n\n".join([*paragraphs, "2. With --lam 0 this is the whole loss: SimCSE."])
    paragraphs.append(describe_difference(step.difference, tokenizer, cfg, new=number == 0))
    contrastive, difference = cfg.contrastive * step.contrastive, step.difference.loss
    paragraphs.append(
        f"3. loss = contrastive + lam * difference = {contrastive:.4f} + {cfg.lam:g} * "
        f"{difference:.4f} = {contrastive + cfg.lam * difference:.4f}"
    )
    return "\n\n".join(paragraphs)


def main() -> None:
    parser = cli.make_parser(Config, PRESETS)
    parser.usage = f"{cli.program()} --config NAME [--FIELD VALUE ...] SENTENCE"
    parser.description = "Print one training step of a sentence, with all its numbers."
    parser.add_argument("sentence", metavar="SENTENCE", nargs="+", help="quoted, or as words")
    sentence = " ".join(parser.parse_known_args()[0].sentence)
    _, cfg = cli.parse(Config, PRESETS, parser=parser)
    print(explain(cfg, sentence))


if __name__ == "__main__":
    run_main(main)
