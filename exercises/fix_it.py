"""A DiffCSE trainer on one page. It runs and its log looks plausible, but it has eight bugs.

    python exercises/fix_it.py                          # half a minute, on Wikipedia's sentences
    python exercises/fix_it.py --lam 5 --json log.json  # also --steps, --batch-size, --lr, --seed
    pytest exercises/test_fix_it.py                     # a test per bug: what is wrong, not where

Each bug is one to three lines. All docstrings and the names in the log are correct: they say what
is meant. Step 7 of two runs with the same seed has the same sentences, masks and dropout, so their
logs can be compared line by line.

One step, in the order of this file:
    x          a batch of sentences, each in two rows that follow each other        ids (R, T)
    h          = projector(encoder f(x) at [CLS]), BatchNorm over all rows          (R, D)
    x_masked   x', x with 30 % of its tokens replaced by [MASK]
    x_edited   x'', the most likely token of the frozen generator G at every position (in the
               paper: at masked ones); [CLS], [SEP] and padding are never edited
    replaced   x'' != x, the labels of the discriminator D, which reads h in place of [CLS]
    loss       = contrastive + lam * replaced-token loss; both train f (lam: the paper's lambda)
A sentence's vector, for every score, is f's [CLS] before the projector.

The log (--json keeps these names and all digits):
    contrastive, difference             the two losses, each a mean
    positive_cosine, negative_cosine    between the two h of a sentence, and between the h of two
                                        sentences: "cosines + -"
    share_replaced                      share of the tokens that are replaced: "replaced"
    accuracy_replaced, _original        share of the replaced, and of the original tokens, that D
                                        labels correctly
    score                               Spearman x 100 on rated image captions; step 0: untrained

Shapes: B sentences, R = 2B rows, T tokens including padding, D hidden size.
Not here: settings, GPUs, resuming, and keeping the best model, for all of which see diffcse.py.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of bert.py

from bert import Bert, BertForMaskedLM, load_bert
from data import Tokenizer, mask_tokens, read_sentences
from embed import encode
from engine.errors import run_main, write_atomically
from engine.hub import find_model, find_text
from engine.tokens import TokenizedSentences
from eval_sts import make_score

MODEL = "assets/small-bert"  # encoder, generator and discriminator start here
TRAIN_FILE = "assets/wikipedia_20k.txt.xz"
TEMPERATURE, MASK_RATIO, MAX_LENGTH = 0.05, 0.30, 32
LOG_EVERY, SCORE_EVERY = 5, 10  # steps


def contrastive_loss(h: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE: find a sentence's second view among all second views (paper, equation 1).

    A low temperature sharpens the softmax over the cosines.
    Shapes: h (B, 2, D) -> loss (), cosines (B, B) of first views with second views.
    """
    z = F.normalize(h, dim=-1)
    cosines = z[:, 0] @ z[:, 1].T  # (B, B)
    loss = F.cross_entropy(cosines * temperature, torch.arange(len(h)))
    return loss, cosines.detach()


@torch.no_grad()
def edit(
    generator: BertForMaskedLM, x: Tensor, x_masked: Tensor, mask: Tensor, sep_id: int
) -> tuple[Tensor, Tensor]:
    """x'' = G(x'), and its tokens that differ from x. [CLS], [SEP], padding are never edited.

    Shapes: x, x_masked (R, T) ids, mask (R, T) bool -> x_edited (R, T) ids, replaced (R, T) bool.
    """
    predicted = generator(x_masked, mask).argmax(-1)  # (R, T)
    x_edited = torch.where(mask & (x != sep_id), predicted, x)
    replaced = x_edited != x  # a masked token that G restores is not replaced
    x_edited[:, 0] = x[:, 0]  # G was never trained to predict [CLS]
    return x_edited, replaced


def difference_loss(
    model: "Model", h: Tensor, x_edited: Tensor, replaced: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """D labels each token as original or replaced: the mean cross-entropy over tokens.

    Shapes: h (R, D); x_edited (R, T) ids; replaced, mask (R, T) bool -> (), columns of the log.
    """
    logits = model.head(model.discriminator(x_edited, mask, cls_vector=h.detach()))  # (R, T, 2)
    loss = F.cross_entropy(logits.flatten(0, 1), replaced.flatten().long())  # class 1: replaced
    predicted, original = logits.argmax(-1).bool(), mask & ~replaced  # (R, T)
    return loss, {
        "share_replaced": float(replaced.sum() / mask.sum()),
        "accuracy_replaced": float((predicted & replaced).sum() / replaced.sum().clamp_min(1)),
        "accuracy_original": float((~predicted & original).sum() / original.sum().clamp_min(1)),
    }


class Model(nn.Module):
    """Encoder f, projector, generator G, discriminator D and its head. G is never trained."""

    def __init__(self, encoder: Bert, generator: BertForMaskedLM, discriminator: Bert, sep_id: int):
        super().__init__()
        D = encoder.cfg.hidden_size
        self.encoder, self.generator, self.discriminator = encoder, generator, discriminator
        self.sep_id = sep_id
        self.projector = nn.Sequential(
            nn.Linear(D, 2 * D, bias=False),
            nn.BatchNorm1d(2 * D),
            nn.ReLU(),
            nn.Linear(2 * D, D, bias=False),
            nn.BatchNorm1d(D, affine=False),
        )
        self.head = nn.Linear(D, 2)

    def forward(
        self, x: Tensor, mask: Tensor, x_masked: Tensor, lam: float
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch and its line of the log. Shapes: x, x_masked, mask (R, T) -> ()."""
        cls = self.encoder(x, mask)[:, 0]  # (R, D): dropout makes a sentence's two rows differ
        h = torch.stack([self.projector(cls[0::2]), self.projector(cls[1::2])], dim=1)  # (B, 2, D)
        contrastive, cosines = contrastive_loss(h, TEMPERATURE)
        x_edited, replaced = edit(self.generator, x, x_masked, mask, self.sep_id)
        difference, columns = difference_loss(self, h.flatten(0, 1), x_edited, replaced, mask)
        loss = contrastive + lam * difference
        positive, B = cosines.trace(), len(cosines)
        return loss, {
            "loss": loss.item(),
            "contrastive": contrastive.item(),
            "positive_cosine": float(positive / B),
            "negative_cosine": float((cosines.sum() - positive) / (B * B - B)),
            "difference": difference.item(),
            **columns,
        }


def train_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor],
    lam: float,
) -> dict[str, float]:
    """One update of all but G. batch: x, mask, x_masked, each (R, T). Returns a line of the log."""
    loss, line = model(*batch, lam)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return line


def embed(model: Model, tokenizer: Tokenizer, sentences: list[str]) -> np.ndarray:
    """The vectors that are scored, without dropout. Shapes: n sentences -> (n, D)."""
    model.eval()
    vectors = torch.from_numpy(encode(model.encoder, tokenizer, sentences))
    with torch.no_grad():
        vectors = model.projector(vectors)  # where the cosines were trained
    return vectors.numpy()


def build() -> tuple[Model, Tokenizer]:
    """The model with pretrained weights, and its tokenizer."""
    folder = find_model(MODEL)
    generator, discriminator = load_bert(folder, mlm=True), load_bert(folder)
    encoder = generator.bert  # the MLM head is on top of it
    tokenizer = Tokenizer(folder)
    return Model(encoder, generator, discriminator, tokenizer.sep_id), tokenizer


def train(
    rows: list[tuple[str, ...]],
    score: Callable,
    steps: int = 40,
    batch_size: int = 32,
    lr: float = 3e-5,
    lam: float = 0.05,
    seed: int = 0,
) -> list[dict]:
    """A whole run. Returns the log: a line for each step, some of them with a score.

    score: from an encoder (n sentences -> (n, D)) to {"score": float}.
    """
    torch.manual_seed(seed)  # of the new layers, projector and head
    model, tokenizer = build()
    sentences = TokenizedSentences(rows, tokenizer, MAX_LENGTH)
    # edit() gives G no gradient, so the optimizer does not change it
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def evaluate(step: int) -> float:
        value = score(partial(embed, model, tokenizer))["score"]
        print(f"step {step:>4}  score {value:.2f}", flush=True)
        return value

    log = [{"step": 0, "score": evaluate(0)}]
    model.train()
    for step in range(1, steps + 1):
        torch.manual_seed(100_000 * seed + step)  # of masks and dropout
        per_epoch = len(sentences) // batch_size * batch_size
        epoch, start = divmod((step - 1) * batch_size, per_epoch)
        indices = sentences.shuffled(seed, epoch)[start : start + batch_size]
        x, mask = sentences.rows(indices)  # (R, T)
        x_masked, _ = mask_tokens(x, tokenizer, MASK_RATIO, "all", torch.default_generator)
        log.append({"step": step, **train_step(model, optimizer, (x, mask, x_masked), lam)})
        if step == 1 or step % LOG_EVERY == 0:
            print(format_line(log[-1]), flush=True)
        if step % SCORE_EVERY == 0:
            log[-1]["score"] = evaluate(step)
    return log


def format_line(line: dict[str, float]) -> str:
    return (
        f"step {line['step']:>4}  contrastive {line['contrastive']:.6f}"
        f"  cosines + {line['positive_cosine']:.4f} - {line['negative_cosine']:.4f}"
        f"  difference {line['difference']:.4f}  replaced {line['share_replaced']:.3f}"
        f"  accuracy_replaced {line['accuracy_replaced']:.3f}"
        f" _original {line['accuracy_original']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small DiffCSE, with eight bugs.")
    settings = {"steps": 40, "batch-size": 32, "lr": 3e-5, "lam": 0.05, "seed": 0}
    for name, value in settings.items():
        help = f"(default: {value})"
        parser.add_argument(f"--{name}", type=type(value), default=value, help=help)
    parser.add_argument("--json", metavar="FILE", help="write the log with all digits")
    args = vars(parser.parse_args())
    file = args.pop("json")
    log = train(list(read_sentences(find_text(TRAIN_FILE))), make_score("captions", "").dev, **args)
    if file:
        write_atomically(file, json.dumps({"settings": args, "log": log}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
