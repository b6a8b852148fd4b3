"""A whole DiffCSE trainer on one page. It runs, its numbers look like numbers, and eight mistakes are in it: mend them.

    python exercises/fix_it.py                         # about half a minute: the small BERT learns from Python's documentation
    python exercises/fix_it.py --lam 5 --json log.json # --steps, --batch-size, --lr and --seed too
    pytest exercises/test_fix_it.py                    # a test for each mistake says what is wrong, and not where

Each mistake is one to three lines. This docstring, the functions' own and the log's names are right: they say what is meant.
Of two runs with one seed, step 7 has the same sentences, masks and dropout: their logs can be laid side by side.

One step, in the order of this file:
    x          a batch of sentences, each of them in two rows that follow each other             ids (R, T)
    h          = projector(encoder f(x) at [CLS]), BatchNorm over all rows of the step           (R, D)
    x_masked   x', 30 % of the tokens of x behind [MASK]
    x_edited   x'', the fixed generator G's best token everywhere (the paper: where x is masked); [CLS], [SEP], padding stay
    replaced   x'' != x, what the discriminator D says of each of the sentence's tokens; there h stands in the place of [CLS]
    loss       = contrastive + lam * replaced-token loss, and both teach f
A sentence's vector, afterwards and for every score, is f's [CLS] before the projector.

The log (--json has these names and all digits):
    contrastive, prediction             the two losses, each a mean
    positive_cosine, negative_cosine    of a sentence's two h's, and of the h's of two sentences: "cosines + -"
    share_replaced                      of the sentences' tokens: "replaced"
    accuracy_replaced, accuracy_kept    what share of the replaced tokens, and of the others, D gets right
    score                               MRR x 100 of finding a function by its namesake's summary (docs.py); step 0: untrained

Letters: B sentences, R = 2B rows, T tokens with padding, D hidden size, lam the paper's lambda.
Not here: everything that diffcse.py has and a step does not need: switches, GPUs, resuming, a best model that is kept.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bert.py and the others lie one folder up

from bert import Bert, BertForMaskedLM, load_bert, write_atomically
from data import TokenizedSentences, Tokenizer, find_model, mask_tokens, run_main, shuffled
from embed import encode

MODEL = "assets/small-bert"  # encoder, generator and discriminator all start here
TEMPERATURE, MASK_RATIO, MAX_LENGTH = 0.05, 0.30, 32
LOG_EVERY, SCORE_EVERY = 5, 10  # steps


def contrastive_loss(h: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE: which of the batch's second views is mine? (paper equation 1) Cosines, sharpened by a low temperature.

    Shapes: h (B, 2, D) -> loss (), cosines (B, B) of first with second views.
    """
    z = F.normalize(h, dim=-1)
    cosines = z[:, 0] @ z[:, 1].T  # (B, B)
    loss = F.cross_entropy(cosines * temperature, torch.arange(len(h)))
    return loss, cosines.detach()


@torch.no_grad()
def edit(generator: BertForMaskedLM, x: Tensor, x_masked: Tensor, mask: Tensor, sep: int) -> tuple[Tensor, Tensor]:
    """x'' = G(x'), and which of its tokens are not those of x. [CLS], [SEP] and padding are never edited.

    Shapes: x, x_masked (R, T) ids, mask (R, T) bool -> x_edited (R, T) ids, replaced (R, T) bool.
    """
    words = generator(x_masked, mask).argmax(-1)  # (R, T)
    x_edited = torch.where(mask & (x != sep), words, x)
    replaced = x_edited != x  # a masked token that G restores is not replaced
    x_edited[:, 0] = x[:, 0]  # G knows no [CLS]: it was never asked for one
    return x_edited, replaced


def discriminate(model: "Model", h: Tensor, x_edited: Tensor, replaced: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
    """D says of every token of the sentences whether it was replaced: the mean cross-entropy over them, and shares for the log.

    Shapes: h (R, D); x_edited (R, T) ids; replaced, mask (R, T) bool -> (), dict.
    """
    logits = model.head(model.discriminator(x_edited, mask, cls_vector=h.detach()))  # (R, T, 2)
    loss = F.cross_entropy(logits.flatten(0, 1), replaced.flatten().long())  # class 0: kept, 1: replaced
    said, kept = logits.argmax(-1).bool(), mask & ~replaced  # (R, T)
    return loss, {
        "share_replaced": float(replaced.sum() / mask.sum()),
        "accuracy_replaced": float((said & replaced).sum() / replaced.sum().clamp_min(1)),
        "accuracy_kept": float((~said & kept).sum() / kept.sum().clamp_min(1)),
    }


class Model(nn.Module):
    """Encoder f, projector, generator G, discriminator D and its head. f alone is kept; G stays what it is."""

    def __init__(self, encoder: Bert, generator: BertForMaskedLM, discriminator: Bert, sep: int):
        super().__init__()
        D = encoder.cfg.hidden_size
        self.encoder, self.generator, self.discriminator, self.sep = encoder, generator, discriminator, sep
        self.projector = nn.Sequential(
            nn.Linear(D, 2 * D, bias=False), nn.BatchNorm1d(2 * D), nn.ReLU(),
            nn.Linear(2 * D, D, bias=False), nn.BatchNorm1d(D, affine=False))  # fmt: skip
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor, mask: Tensor, x_masked: Tensor, lam: float) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch, and its row of the log. Shapes: x, x_masked (R, T) ids, mask (R, T) bool -> (), dict."""
        cls = self.encoder(x, mask)[:, 0]  # (R, D): a sentence's two rows differ by their dropout
        h = torch.stack([self.projector(cls[0::2]), self.projector(cls[1::2])], dim=1)  # (B, 2, D)
        contrastive, cosines = contrastive_loss(h, TEMPERATURE)
        x_edited, replaced = edit(self.generator, x, x_masked, mask, self.sep)
        prediction, shares = discriminate(self, h.flatten(0, 1), x_edited, replaced, mask)
        loss = contrastive + lam * prediction
        own, B = cosines.trace(), len(cosines)
        return loss, {
            "loss": loss.item(), "contrastive": contrastive.item(), "positive_cosine": float(own / B),
            "negative_cosine": float((cosines.sum() - own) / (B * B - B)), "prediction": prediction.item(), **shares}  # fmt: skip


def step(model: Model, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor], lam: float) -> dict[str, float]:
    """One update of all but G. batch: x, mask, x_masked, each (R, T). Returns its row of the log."""
    loss, row = model(*batch, lam)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return row


def embed(model: Model, tokenizer: Tokenizer, sentences: list[str]) -> np.ndarray:
    """The vectors that are scored, made without dropout. Shapes: n sentences -> (n, D)."""
    model.eval()
    vectors = torch.from_numpy(encode(model.encoder, tokenizer, sentences))
    with torch.no_grad():
        vectors = model.projector(vectors)  # to where the cosines were trained
    return vectors.numpy()


def build() -> tuple[Model, Tokenizer]:
    """The model with pretrained weights."""
    folder = find_model(MODEL)
    generator, discriminator = load_bert(folder, mlm=True), load_bert(folder)
    encoder = generator.bert  # the MLM head sits on top of it
    tokenizer = Tokenizer(folder)
    return Model(encoder, generator, discriminator, tokenizer.sep), tokenizer


def train(sentences: list[str], score, steps: int = 40, batch_size: int = 32, lr: float = 3e-5, lam: float = 0.05,
          seed: int = 0) -> list[dict]:  # fmt: skip
    """A whole run. Returns the log: a row for each step, and in some of them the score.

    score: what says of a function from n sentences to (n, D) how good it is, as {"score": float}.
    """
    torch.manual_seed(seed)  # projector and head start from it
    model, tokenizer = build()
    data = TokenizedSentences(((sentence,) for sentence in sentences), tokenizer, MAX_LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)  # G is not trained: edit() gives it no gradient

    def scored() -> float:
        value = score(partial(embed, model, tokenizer))["score"]
        print(f"step {number:>4}  score {value:.2f}", flush=True)
        return value

    number = 0
    rows = [{"step": 0, "score": scored()}]
    model.train()
    for number in range(1, steps + 1):
        torch.manual_seed(100_000 * seed + number)  # masks and dropout: two runs with one seed differ by nothing else
        epoch, first = divmod((number - 1) * batch_size, len(data) // batch_size * batch_size)
        x, mask = data.batch(shuffled(np.arange(first, first + batch_size), len(data), seed, epoch))  # (R, T)
        x_masked, _ = mask_tokens(x, tokenizer, MASK_RATIO, "all", torch.default_generator)
        rows.append({"step": number, **step(model, optimizer, (x, mask, x_masked), lam)})
        if number == 1 or number % LOG_EVERY == 0:
            row = rows[-1]
            print(f"step {number:>4}  contrastive {row['contrastive']:.6f}"
                  f"  cosines + {row['positive_cosine']:.4f} - {row['negative_cosine']:.4f}"
                  f"  prediction {row['prediction']:.4f}  replaced {row['share_replaced']:.3f}"
                  f"  accuracy_replaced {row['accuracy_replaced']:.3f} _kept {row['accuracy_kept']:.3f}", flush=True)  # fmt: skip
        if number % SCORE_EVERY == 0:
            rows[-1]["score"] = scored()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small DiffCSE, wrongly.")
    for name, default in (("steps", 40), ("batch-size", 32), ("lr", 3e-5), ("lam", 0.05), ("seed", 0)):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"(default: {default})")
    parser.add_argument("--json", metavar="FILE", help="keep the log's rows here, with all their digits")
    args = vars(parser.parse_args())
    file = args.pop("json")
    import docs  # imports hundreds of modules to read what is written about them: about ten seconds

    rows = train(docs.training_sentences(), docs.DocsScore().dev, **args)
    if file:
        write_atomically(file, json.dumps({"settings": args, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
