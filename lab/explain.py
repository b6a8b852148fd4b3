"""One training step of one sentence, with all its numbers: what diffcse.py --explain prints.

    python diffcse.py --config demo --explain "The cat sat on the mat ."              # the first step of a run
    python diffcse.py --resume runs/demo-1 --explain "The cat sat on the mat ."       # the next step of one that was stopped

The sentence and the OTHERS go through the functions of diffcse.py in the order of a step; nothing is trained, and nothing written.

Letters: as in diffcse.py; row 0 is the sentence's first view, row 1 its second.
Not here: the ablations' steps, and --hard-negative-weight, which wants a file of three columns.
"""

import math
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert import UserError, places
from config import Config
from data import TokenizedSentences, Tokenizer, mask_tokens
from diffcse import build, contrastive_loss, edit_sentences, edited_rows, replaced_token_loss, seed_of, stepper
from run import load_state, restore

OTHERS = ("A dog is chasing a ball in the park .", "The president gave a speech on Monday .", "Water boils at a hundred degrees .",
          "She has played the guitar since she was ten .", "The train to Paris leaves in an hour .", "Prices rose by two percent last year .",
          "A kitten lay on the rug .")  # fmt: skip


def columns(head: list[str], rows: Iterable[list[str]], sides: str) -> str:
    """Lines of text. sides: "<" or ">" for each column, where its cells stand."""
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return "\n".join("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)).rstrip() for row in table)


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, subsequent_indent="    ", replace_whitespace=False, break_on_hyphens=False)


def unknown(tokenizer: Tokenizer, sentence: str) -> list[str]:
    """What of the sentence stands as [UNK] in the batch."""
    encoding = tokenizer.backend.encode(sentence)
    return [sentence[start:end] for i, (start, end) in zip(encoding.ids, encoding.offsets) if i == tokenizer.unk]


def explain(cfg: Config) -> str:
    """The text. Raises: UserError for a sentence without a word, an ablation, and a run whose discriminator is not there any more."""
    sentence = " ".join(cfg.explain.split())
    if not sentence:
        raise UserError("--explain: there is no word in it")
    if cfg.ablated():
        raise UserError("--explain shows the paper's own step, not those of --objective, --condition-on, --edit-with and --edit-as")
    torch.manual_seed(cfg.seed)
    model, tokenizer = build(cfg)
    state = load_state(Path(cfg.resume)) if cfg.resume else None
    if cfg.resume and (state is None or "step" not in state[1]):
        raise UserError(f"--resume {cfg.resume}: it has no state. A run that has ended keeps its encoder only; stop one by Ctrl-C before its end, and "
                        "explain that")  # fmt: skip
    step = 0
    if state:
        restore(state[0], model, stepper(model, 2, None)[0])
        step = state[1]["step"]
    model.train()
    batch = [sentence, *(other for other in OTHERS if other != sentence)]
    sentences = TokenizedSentences(((text,) for text in batch), tokenizer, cfg.max_length)
    x, mask = sentences.batch(np.arange(len(batch)))  # (R, T): rows 2i and 2i + 1 are the views of sentence i
    x_masked, selected = mask_tokens(x, tokenizer, cfg.mask_ratio, cfg.mask, torch.Generator().manual_seed(seed_of(cfg.seed, step, 1)))
    torch.manual_seed(seed_of(cfg.seed, step, 2))  # dropout

    def word(i: int) -> str:
        return tokenizer.backend.id_to_token(int(i)) or f"#{int(i)}"

    length = int(mask[0].sum())  # of the sentence, in tokens
    tokenizer.backend.no_truncation()
    uncut = tokenizer.backend.encode(sentence).tokens
    lines = [f"Step {step + 1}, seed {cfg.seed}" + f", of the run in {cfg.resume}" * bool(cfg.resume) + f". {len(batch)} sentences in 2 views each, at most {x.shape[1]} tokens long.",
             wrapped(f"\nThe sentence: {sentence}"), wrapped(f"Its {length} tokens: {' '.join(map(word, x[0, :length]))}")]  # fmt: skip
    if len(uncut) > length:
        lines.append(wrapped(f"Cut off by --max-length {cfg.max_length}: {' '.join(uncut[length - 1 : -1])}"))
    if strange := unknown(tokenizer, sentence):
        lines.append(f"{word(tokenizer.unk)} stands for {', '.join(strange)}: the vocabulary has no such word or sign.")

    with torch.no_grad():
        R = len(x)
        h = model.projector(model.encode(x, mask, slice(0, R), R))  # (R, D)
        contrastive, cosines, _ = contrastive_loss(h.view(R // 2, 2, -1), cfg.temperature)  # (), (B, B), (B,)
        scores = cosines[0] / cfg.temperature  # (B,)
        rows = [[f"{cosine:.3f}", f"{score:.2f}", f"{100 * p:.2f} %", textwrap.shorten(text, 80, placeholder=" ...") + "   <- its own" * (i == 0)]
                for i, (cosine, score, p, text) in enumerate(zip(cosines[0].tolist(), scores.tolist(), scores.softmax(0).tolist(), batch))]  # fmt: skip
        lines += ["\n1. Contrastive loss. The encoder f reads the sentence twice, each time with other dropout; the projector makes",
                  "of either [CLS] an h. Which of all second views is that of the sentence's first view?\n",
                  columns(["cosine", f"/ {cfg.temperature:g}", "softmax", "the second view of"], rows, ">>><"),
                  f"\n-log of its own share is {F.cross_entropy(scores[None], torch.zeros(1, dtype=torch.long)).item():.4f}; the mean over all {len(batch)} sentences, each asking so, is the contrastive loss: "
                  f"{contrastive.item():.4f}", f"(guessing has log {len(batch)} = {math.log(len(batch)):.4f})."]  # fmt: skip
        if cfg.lam == 0:
            return "\n".join([*lines, "\n2. With --lam 0 that is the whole loss: SimCSE."])

        edited = edited_rows(cfg, 2)
        h, x, mask, x_masked, selected = (t[edited] for t in (h, x, mask, x_masked, selected))
        x_edited, replaced = edit_sentences(model.generator, x, x_masked, selected, mask, tokenizer, cfg)

        def opinions(h: Tensor | None) -> Tensor:
            """As diffcse.discriminate makes them; where padding does not count D leaves it out, which moves its dropout. Shapes: (R, D) -> (R, T, 2)."""
            tokens = None if cfg.pads_in_loss else places(mask)
            logits = model.head(model.discriminator(x_edited, mask, cls_vector=h, tokens=tokens)).view(-1, 2)
            return (logits if tokens is None else logits.new_zeros(x.numel(), 2).index_copy(0, tokens, logits)).view(*x.shape, 2)

        before = torch.get_rng_state()
        logits = opinions(h)
        torch.set_rng_state(before)  # the same dropout again
        without = opinions(None)
        prediction = replaced_token_loss(logits, replaced, mask, cfg.pads_in_loss, cfg.reduction)
        losses = F.cross_entropy(logits.flatten(0, 1), replaced.long().flatten(), reduction="none").view_as(x)  # (R, T)
        blind = replaced_token_loss(without, replaced, mask, cfg.pads_in_loss, cfg.reduction)

    def percent(logits: Tensor) -> str:
        return f"{100 * logits.softmax(-1)[1].item():.1f} %"

    rows = [[str(t), word(x[0, t]), word(x_masked[0, t]) + " *" * bool(selected[0, t]), word(x_edited[0, t]) if t else "h",
             "replaced" if replaced[0, t] else "kept", percent(logits[0, t]), percent(without[0, t]), f"{losses[0, t]:.3f}"] for t in range(length)]  # fmt: skip
    lines += ["\n2. Difference prediction. In x' some tokens are masked (*), one of ten of them by another word, and one of ten as it was. The"
              if cfg.mask == "80-10-10" else "\n2. Difference prediction. In x' some tokens are masked (*). The",
              f"generator G makes x'' of it, by its {'best' if cfg.edit == 'argmax' else 'drawn'} word {'at every position' if cfg.edit_scope == 'all' else 'at the masked ones'}. The discriminator D reads x'' with h in the place of [CLS]",
              "and says how likely each token was replaced.\n",
              columns(["", "x", "x' masked", "x'' edited", "label", "D with h", "without h", "loss"], rows, "><<<<>>>"),
              "\nWithout h, D has the [CLS] of x'' to start from, as ELECTRA does; no training uses that column.",
              f"The {cfg.reduction} of the loss over all {'positions, padding among them as kept,' if cfg.pads_in_loss else 'tokens'} of all edited sentences: {prediction.item():.4f} "
              f"(without h {blind.item():.4f}, guessing log 2 = {math.log(2):.4f})."]  # fmt: skip
    if len(x) == R:
        lines.append(wrapped(f"The second view has a mask and an edit of its own: {' '.join(['h', *map(word, x_edited[1, 1:length])])}"))
    if step == 0:
        lines.append("D's last layer is new: before training its opinions are chance.")
    total = cfg.contrastive * contrastive + cfg.lam * prediction
    lines.append(f"\n3. loss = contrastive + lambda x prediction = {cfg.contrastive * contrastive.item():.4f} + {cfg.lam:g} x {prediction.item():.4f} = {total.item():.4f}")
    return "\n".join(lines)
