"""Masked language models on held-out paragraphs: loss and accuracy per word.

    python -m lab.held_out runs/my-bert/best assets/small-bert --text wiki.txt.xz

HELD_OUT paragraphs of shuffled documents, or a tenth of all if that is less; `lab.pretrain` does
not train on them if it is given the same files in the same order.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F

from bert import BertForMaskedLM, load_bert
from data import Tokenizer
from engine.cli import Parser
from engine.device import pick_device
from engine.errors import UserError, run_main
from engine.hub import find_model
from lab.running_text import hold_out, read_documents


@torch.no_grad()
def score_held_out(model: BertForMaskedLM, tokenizer: Tokenizer, paragraphs: list[str]) -> dict:
    """Loss and accuracy per masked word of unseen text, comparable across vocabularies.

    15 % of the words of each stretch of 32 are masked, with all their pieces: the same words for
    every lower-cased WordPiece vocabulary, but for words past max_length. Only words of a to z are
    scored. A word's loss, in nats, is the sum over its pieces; it is correct if every piece is.
    """
    stretches = []
    for words in map(str.split, paragraphs):
        stretches += [" ".join(words[i : i + 32]) for i in range(0, len(words), 32)]
    device, embeddings = model.bert.device, model.bert.embeddings.word.weight
    rng, losses, correct = np.random.default_rng(0), [], []
    for text, encoding in zip(stretches, tokenizer.backend.encode_batch(stretches)):
        words = []  # positions of the pieces of each masked word
        count = len(set(encoding.word_ids) - {None})  # None: [CLS] and [SEP]
        for i in np.flatnonzero(rng.random(count) < 0.15).tolist():
            word = text[slice(*encoding.word_to_chars(i))]
            first, end = encoding.word_to_tokens(i)
            if word.isascii() and word.isalpha() and end <= model.max_length:
                words.append(range(first, end))
        masked = torch.tensor([i for word in words for i in word], dtype=torch.long, device=device)
        x = torch.tensor([encoding.ids[: model.max_length]], device=device)  # (1, T)
        x_masked = x.index_fill(1, masked, tokenizer.mask_id)
        states = model.bert(x_masked, torch.ones_like(x, dtype=torch.bool))[0, masked]
        logits = model.head(states, embeddings).float()  # (pieces, W)
        piece_losses = F.cross_entropy(logits, x[0, masked], reduction="none")
        piece_correct = logits.argmax(-1) == x[0, masked]
        sizes = list(map(len, words))
        losses += [word.sum().item() for word in piece_losses.split(sizes)]
        correct += [word.all().item() for word in piece_correct.split(sizes)]
    if not losses:
        raise UserError("the held-out paragraphs have no word to score: too short, or not a to z")
    means = {"loss": round(np.mean(losses), 4), "accuracy": round(np.mean(correct), 4)}
    return means | {"words": len(losses)}


def main() -> None:
    parser = Parser("python -m lab.held_out", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a folder with a masked-LM head, or a Hub name")
    add("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text, also .gz and .xz")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    args = parser.parse_args()
    held_out = hold_out(read_documents(args.text))[1]
    for name in args.models:
        folder = find_model(name)
        model = load_bert(folder, mlm=True).to(pick_device(args.device, "off")[0])
        tokenizer = Tokenizer(folder).check_mask(name).check_fits(folder, model.cfg.vocab_size)
        row = score_held_out(model, tokenizer, held_out)
        print(json.dumps({"model": name, **row}), flush=True)


if __name__ == "__main__":
    run_main(main)
