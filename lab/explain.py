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
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert import Bert
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
from engine.checkpoint import load_state, load_state_dict
from engine.errors import UserError, run_main
from engine.tokens import TokenizedSentences
from lab.tables import format_table

OTHERS = (
    "A dog is chasing a ball in the park .",
    "The president gave a speech on Monday .",
    "Water boils at a hundred degrees .",
    "She has played the guitar since she was ten .",
    "The train to Paris leaves in an hour .",
    "Prices rose by two percent last year .",
    "A kitten lay on the rug .",
)


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


def make_batch(model: DiffCSEModel, sentence: str, step: int = 0) -> tuple[list[str], Batch]:
    """The sentence, then OTHERS; and their batch of that step. Raises: UserError if it is empty."""
    sentence = " ".join(sentence.split())
    if not sentence:
        raise UserError("the sentence is empty")
    texts, cfg = [sentence, *(other for other in OTHERS if other != sentence)], model.cfg
    sentences = InOrder([(text,) for text in texts], model.tokenizer, cfg.max_length)
    return texts, draw_batch(sentences, model.tokenizer, replace(cfg, batch_size=len(texts)), step)


def wrapped(text: str) -> str:
    lines = textwrap.wrap(text, 100, replace_whitespace=False, break_on_hyphens=False)
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


def describe_contrastive(h: Tensor, texts: list[str], temperature: float) -> tuple[str, float]:
    """The text and the loss. Shapes: h (B, 2, D)."""
    loss = contrastive_loss(h, temperature)[0].item()
    cosines = F.cosine_similarity(h[:1, 0], h[:, 1])  # (B,): the first view, all second views
    logits = cosines / temperature
    rows = []
    for text, cosine, logit, p in zip(texts, cosines, logits, logits.softmax(0)):
        text = textwrap.shorten(text, 60, placeholder=" ...") + "   <- its own" * (not rows)
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
        f"contrastive loss: {loss:.4f} (guessing: log {B} = {math.log(B):.4f})."
    )
    return f"{before}\n\n{format_table(head, rows)}\n\n{after}", loss


def describe_difference(model: DiffCSEModel, h: Tensor, batch: Batch) -> tuple[list[str], float]:
    """Paragraphs about DiffCSEModel.difference_loss, and the loss. Shapes: h (R, D)."""
    cfg, word = model.cfg, partial(token, model.tokenizer)
    if cfg.views == "first":
        h, batch = h[:: batch.views], batch.first_views()
    x_edited, replaced = edit_sentences(model.generator, batch, model.tokenizer, cfg)
    rng_state = torch.get_rng_state()
    logits = model.head(model.discriminator(x_edited, batch.mask, cls_vector=h))  # (R, T, 2)
    torch.set_rng_state(rng_state)  # the same dropout again
    logits_without = model.head(model.discriminator(x_edited, batch.mask))
    loss, loss_without = (
        replaced_token_loss(each, replaced, batch.mask, cfg.pads_in_loss, cfg.reduction)[0].item()
        for each in (logits, logits_without)
    )
    losses = F.cross_entropy(logits[0], replaced[0].long(), reduction="none")  # (T,)
    rows = []
    for t in range(int(batch.mask[0].sum())):
        masked = word(batch.x_masked[0, t]) + " *" * bool(batch.selected[0, t])
        cells = [t, word(batch.x[0, t]), masked, word(x_edited[0, t]) if t else "h"]
        cells.append("replaced" if replaced[0, t] else "original")
        cells += [f"{100 * each[0, t].softmax(-1)[1]:.1f} %" for each in (logits, logits_without)]
        rows.append([*cells, f"{losses[t]:.3f}"])
    head = ["t", "x", "x' masked", "x'' edited", "label", "with h", "without h", "loss"]
    mixture = " (one in ten is a random word, one in ten is unchanged)"
    counted = "positions (padding is original)" if cfg.pads_in_loss else "tokens"
    guessing = f", guessing log 2 = {math.log(2):.4f}" if cfg.reduction == "mean" else ""
    paragraphs = [
        "2. Difference prediction. In x', some tokens are masked, with a *"
        f"{mixture * (cfg.masking == '80-10-10')}. The generator predicts "
        f"{'all tokens' if cfg.edit_scope == 'all' else 'the masked tokens'} of x'; its "
        f"{'best' if cfg.edit == 'argmax' else 'sampled'} tokens make x''. The discriminator "
        "reads x'' with h in place of [CLS], and predicts for each token the probability that it "
        "was replaced (with h):",
        "Without h, the discriminator reads the [CLS] of x'', as in ELECTRA. Training does not use "
        "that column.",
        f"The {cfg.reduction} of the loss over all {counted} of all edited sentences: "
        f"{loss:.4f} (without h {loss_without:.4f}{guessing}).",
    ]
    if cfg.views == "both":
        edit = " ".join(word(i) for i in x_edited[1, 1 : len(rows)])
        paragraphs.append(f"The second view has its own mask and edit: h {edit}")
    before, *after = map(wrapped, paragraphs)
    return [before, format_table(head, rows), *after], loss


def edit_as_tokens(
    tokenizer: Tokenizer, batch: Batch, x_edited: Tensor, replaced: Tensor, p: Tensor
) -> dict[str, list]:
    """x, x' and x'' of row 0 for plots.plot_tokens. Shapes: x_edited, replaced, p (R, T).

    Masked tokens are shaded in x'. In x'' the shade is p, the discriminator's probability of
    "replaced", and a mark says where that is right or wrong: found, missed, false alarm.
    """
    word, real = partial(token, tokenizer), batch.mask[0]
    rows = (batch.x, batch.x_masked, x_edited, batch.selected, replaced, p)
    x, x_masked, x_edited, selected, replaced, p = (row[0, real].tolist() for row in rows)
    marks = {(True, True): "found", (True, False): "missed", (False, True): "false alarm"}
    marks = [marks.get((label, q > 0.5), "") for label, q in zip(replaced, p)]
    return {
        "x": [(word(i), 0.0, "") for i in x],
        "x'": [(word(i), float(is_masked), "") for i, is_masked in zip(x_masked, selected)],
        "x''": list(zip(["h", *map(word, x_edited[1:])], p, marks)),
    }


@torch.no_grad()
def attention_to_first(bert: Bert, ids: Tensor, mask: Tensor, cls_vector: Tensor) -> Tensor:
    """How much of its attention each token gives to position 0, mean of the heads, no dropout.

    Shapes: ids, mask (R, T), cls_vector (R, D) -> (L, R, T) for L layers.
    """
    training, weights = bert.training, []
    states = bert.eval()(ids, mask, cls_vector, all_layers=True)
    bert.train(training)
    for layer, x in zip(bert.layers, states):
        attention = layer.attention
        q, k = (f(x).unflatten(2, (attention.heads, -1)) for f in (attention.query, attention.key))
        scores = torch.einsum("rqhd,rkhd->rhqk", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        weights.append(scores.softmax(-1)[..., 0].mean(1))
    return torch.stack(weights)


@torch.no_grad()
def describe_losses(model: DiffCSEModel, texts: list[str], is_new: bool, batch: Batch) -> list[str]:
    """Paragraphs about DiffCSEModel.forward, in its order."""
    cfg = model.cfg
    h = model.projector(model.encoder(batch.x, batch.mask, cls_only=True)[:, 0])  # (R, D)
    text, contrastive = describe_contrastive(h.unflatten(0, (-1, 2)), texts, cfg.temperature)
    if cfg.lam == 0:
        return [text, "2. With --lam 0 this is the whole loss: SimCSE."]
    paragraphs, difference = describe_difference(model, h, batch)
    if is_new:
        paragraphs.append("The discriminator's last layer is new: before training, it guesses.")
    contrastive *= cfg.contrastive
    total = (
        f"3. loss = contrastive + lam * difference = {contrastive:.4f} + {cfg.lam:g} * "
        f"{difference:.4f} = {contrastive + cfg.lam * difference:.4f}"
    )
    return [text, *paragraphs, total]


def explain(cfg: Config, sentence: str) -> str:
    """The text. Raises: UserError for an empty sentence or a finished run."""
    model, step = load_model(cfg)
    texts, batch = make_batch(model, sentence, step)
    run = f" of the run in {cfg.resume}" if cfg.resume else ""
    title = f"Step {step + 1}{run}, seed {cfg.seed}: {len(texts)} sentences with 2 views each."
    ids = batch.x[0][batch.mask[0]]
    text = describe_sentence(texts[0], model.tokenizer, ids, cfg.max_length)
    torch.manual_seed(derive_seed(cfg.seed, step, 1))  # dropout
    describe = fast.accelerate(partial(describe_losses, model, texts, step == 0), model, cfg.fast)
    return "\n\n".join([title, text, *describe(batch)])


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
