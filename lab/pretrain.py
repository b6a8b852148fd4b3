"""A small BERT from raw text: vocabulary, masked language model, a folder for transformers.

    python -m lab.pretrain --text wiki.txt.xz --minutes 140 --out runs/my-bert
    python -m lab.pretrain --text wiki.txt.xz --score runs/my-bert assets/small-bert
    python -m lab.pretrain --text wiki.txt.xz --start assets/small-bert --layers 2 --hidden 64 \
        --minutes 5 --out runs/weak                  # a small generator with the same vocabulary

Prints and logs the loss on held-out paragraphs; --out gets log.jsonl, best/ with the model, and the
state for --resume. The learning rate follows the clock, and the training of a vocabulary breaks
ties at random, so two runs of a command differ. Trials: results/pretrain/trials.jsonl.
Not here: next-sentence loss, several GPUs, gradient accumulation, languages without spaces.

Shapes: B rows, T tokens including padding, D hidden size, W words of the vocabulary.
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bert import BertConfig, BertForMaskedLM, load_bert, read_config, save_bert
from data import Batch, Tokenizer, corrupt, read_lines
from diffcse import derive_seed
from engine import checkpoint, errors
from engine.cli import Parser, positive_int
from engine.device import pick_device
from engine.errors import UserError, atomic_folder, restore_folder, run_main, write_atomically
from engine.hub import find_model
from engine.run import Stop
from engine.tokens import TokenizedSentences
from lab.running_text import split_sentences

HELD_OUT = 1000  # paragraphs, in whole documents, that are only scored
MAX_LENGTH = 64  # tokens of a row, including [CLS] and [SEP]; 98 % of sentences are shorter
BATCH_TOKENS = 4096  # tokens of a step, without padding
LR, WARM_UP = 1.5e-3, 0.06  # peak learning rate; the share of the time in which it rises
MASK_RATIO = 0.20
CLS_START = 0.7  # share of the time after which the loss of [CLS] has its large weight
CLS_WEIGHT = (0.1, 4.0)  # of that loss, before and after; the second falls to 0
RARE = 3e-4  # a word of this frequency counts half as much in that loss as a very rare word
WINDOW = 5  # words on each side that count as co-occurring
SETTINGS = ("text", "start", "vocab", "layers", "hidden", "seed")  # of a run; --resume keeps them

# ------------------------------------------------------------------------------------------------
# Text -> documents -> vocabulary -> rows of ids


def read_documents(paths: list[str]) -> list[list[str]]:
    """The paragraphs of each document. In a file without empty lines, every line is a document."""
    documents = []
    for path in paths:
        lines = [line.strip() for line in read_lines(Path(path))]
        if all(lines):
            documents += [[line] for line in lines]
        else:
            documents += [list(group) for full, group in itertools.groupby(lines, bool) if full]
    return documents


def hold_out(documents: list[list[str]], seed: int) -> tuple[list[list[str]], list[str]]:
    """Documents to train on, and HELD_OUT paragraphs of others, or a tenth of all if that is less.

    Raises: UserError if no document is left to train on.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(documents)).tolist()
    count = min(HELD_OUT, math.ceil(sum(map(len, documents)) / 10))
    held_out = []
    while order and len(held_out) < count:
        held_out += documents[order.pop(0)]
    if not order:
        raise UserError(f"{len(documents)} documents are too few (an empty line ends a document)")
    return [documents[i] for i in order], held_out[:count]


def train_vocabulary(documents: list[list[str]], size: int, folder: Path) -> Tokenizer:
    """A lower-cased WordPiece vocabulary of exactly `size`, saved in the folder as vocab.txt."""
    wordpiece = tokenizers.BertWordPieceTokenizer(lowercase=True)
    wordpiece.train_from_iterator(
        itertools.chain.from_iterable(documents),
        vocab_size=size,
        min_frequency=2,
        limit_alphabet=min(400, size // 4),
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=sys.stderr.isatty(),
    )
    if (found := wordpiece.get_vocab_size()) != size:
        raise UserError(f"--vocab is {size}, but only {found} pieces occur twice in the text")
    folder.mkdir()
    wordpiece.save_model(str(folder))
    return Tokenizer(folder)


def make_rows(documents: list[list[str]], tokenizer: Tokenizer, seed: int) -> TokenizedSentences:
    """Rows of ids: [CLS], one or more consecutive sentences of a document, [SEP].

    A length is drawn for each row, between a quarter of MAX_LENGTH and MAX_LENGTH. The row takes
    sentences until the next one would exceed it. Long rows teach words by their context, short
    ones are like the sentences that are encoded later.
    """
    rng = np.random.default_rng([seed, 3])

    def rows() -> Iterator[tuple[str]]:
        for paragraphs in documents:
            sentences = list(itertools.chain.from_iterable(map(split_sentences, paragraphs)))
            texts, space = [], -1  # -1: the first sentence begins a row
            for sentence, ids in zip(sentences, tokenizer(sentences, MAX_LENGTH)):
                length = len(ids) - 2  # without [CLS] and [SEP]
                if length > space:
                    texts.append([])
                    space = rng.integers(MAX_LENGTH // 4, MAX_LENGTH + 1) - 2
                texts[-1].append(sentence)
                space -= length
            yield from ((" ".join(text),) for text in texts)

    return TokenizedSentences(rows(), tokenizer, MAX_LENGTH, views=1)


# ------------------------------------------------------------------------------------------------
# Initial weights


def positive_pmi(rows: TokenizedSentences, tokenizer: Tokenizer) -> Tensor:
    """How much more often than by chance two words occur within WINDOW. Shapes: -> (W, W).

    max(0, log p(a, b) / p(a) p(b)), with the context's p(b) smoothed by the power 0.75, without
    special tokens, of the first 20 million tokens. Takes 12 W^2 bytes, 0.8 GB for 8,192 words.
    """
    W = tokenizer.vocab_size
    ids = rows.ids[:20_000_000].astype(np.int64)
    row = np.repeat(np.arange(len(rows)), np.diff(rows.starts))[: len(ids)]
    is_word = ~np.isin(ids, tokenizer.special_ids)
    counts = np.zeros(W * W, np.float32)
    for distance in range(1, WINDOW + 1):
        left, right = slice(None, -distance), slice(distance, None)
        counted = (row[left] == row[right]) & is_word[left] & is_word[right]
        counts += np.bincount((ids[left] * W + ids[right])[counted], minlength=W * W)
    counts = torch.from_numpy(counts).view(W, W)
    counts = counts + counts.T
    p_a = counts.sum(1) / counts.sum()
    p_b = counts.sum(0).pow(0.75) / counts.sum(0).pow(0.75).sum()
    chance = (p_a[:, None] * p_b).clamp_min(1e-30)  # where it is 0, so is the count
    return (counts / counts.sum() / chance).clamp_(min=1).log_()


def new_model(
    tokenizer: Tokenizer, rows: TokenizedSentences, layers: int, hidden: int
) -> BertForMaskedLM:
    """Random weights, but the words' embeddings are the SVD of their PMI (Levy and Goldberg 2014)
    and the output bias is their log frequency: a small budget starts from what counting gives.

    The config has BERT's dropout of 0.1, for a later training; here the model stays in eval mode.
    """
    W = tokenizer.vocab_size
    cfg = BertConfig(
        vocab_size=W,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=2 * MAX_LENGTH,
        pad_token_id=tokenizer.pad_id,
    )
    model = BertForMaskedLM(cfg)
    U, S, _ = torch.svd_lowrank(positive_pmi(rows, tokenizer), q=min(hidden + 32, W), niter=4)
    rotation = torch.linalg.qr(torch.randn(hidden, hidden))[0]  # all coordinates equally strong
    vectors = (U * S.sqrt())[:, :hidden] @ rotation
    counts = torch.from_numpy(np.bincount(rows.ids, minlength=W) + 1).float()
    with torch.no_grad():
        model.bert.embeddings.word.weight.copy_(0.05 * vectors / vectors.std())
        model.head.bias.copy_((counts / counts.sum()).log())
    return model.eval()


# ------------------------------------------------------------------------------------------------
# Batches and steps


def draw_batches(rows: TokenizedSentences, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of each step, without end: rows of similar length, about BATCH_TOKENS tokens.

    Each epoch's random order is cut into pools. A pool is sorted by length and cut into batches,
    which are taken in random order. So batches have little padding and come from all of the text.
    """
    lengths = np.diff(rows.starts)
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, 1, epoch])
        order = rng.permutation(len(rows))
        for start in range(0, len(order), 16_384):
            pool = order[start : start + 16_384]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            cuts = np.flatnonzero(np.diff(lengths[pool].cumsum() // BATCH_TOKENS)) + 1
            batches = np.split(pool, cuts)
            for i in rng.permutation(len(batches)):
                yield batches[i]


def continuing_pieces(tokenizer: Tokenizer) -> Tensor:
    """Which ids continue a word (##ing). Shapes: -> (W,) bool."""
    ids = [i for piece, i in tokenizer.vocabulary().items() if piece.startswith("##")]
    return torch.isin(torch.arange(tokenizer.vocab_size), torch.tensor(ids))


def mask_words(
    x: Tensor, tokenizer: Tokenizer, continues: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """BERT's masking, of whole words: a piece is too easy to guess from the rest of its word.

    Shapes: x (B, T) ids, continues (W,) bool -> x_masked (B, T), selected (B, T) bool.
    """
    special = torch.isin(x, torch.tensor(tokenizer.special_ids))
    word = (~continues[x]).cumsum(1).sub(1).clamp_min(0)  # (B, T): a token's word, from 0
    selected = (torch.rand(x.shape, generator=rng) < MASK_RATIO).gather(1, word) & ~special
    return corrupt(x, selected, tokenizer, "80-10-10", rng), selected


def word_weights(rows: TokenizedSentences, tokenizer: Tokenizer) -> Tensor:
    """Weights in the loss of [CLS]: RARE / (RARE + frequency), 0 for special tokens. Shapes: (W,).

    Frequent words such as "the" say little about a sentence (Arora et al. 2017, SIF).
    """
    counts = np.bincount(rows.ids, minlength=tokenizer.vocab_size)
    counts[tokenizer.special_ids] = 0
    weights = RARE / (RARE + counts / counts.sum())
    weights[tokenizer.special_ids] = 0
    return torch.from_numpy(weights).float()


def compute_losses(model: BertForMaskedLM, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The masked-LM loss, and the loss of predicting the sentence's words from [CLS] alone.

    Masked words are predicted from their neighbours, so the masked LM does not train [CLS]. Here
    the same head at position 0 predicts all words of the sentence, as in a paragraph vector (Le
    and Mikolov 2014, PV-DBOW). Shapes: weights (W,) -> (), ().
    """
    x, selected = batch.x, batch.selected  # (B, T)
    states = model.bert(batch.x_masked, batch.mask)  # (B, T, D)
    embeddings = model.bert.embeddings.word.weight  # (W, D)
    mlm_loss = F.cross_entropy(model.head(states[selected], embeddings).float(), x[selected])
    log_p = model.head(states[:, 0], embeddings).float().log_softmax(-1)  # (B, W)
    weight = weights[x]  # (B, T)
    return mlm_loss, -(weight * log_p.gather(1, x)).sum() / weight.sum().clamp_min(1e-9)


def schedule(progress: float) -> tuple[float, float]:
    """The learning rate, and the weight of the [CLS] loss, after this share of the time."""
    lr = LR * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))
    small, large = CLS_WEIGHT
    return lr, small if progress < CLS_START else large * (1 - progress) / (1 - CLS_START)


def make_optimizer(model: BertForMaskedLM) -> torch.optim.AdamW:
    """AdamW, with weight decay for matrices only."""
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01}
    others = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, others], lr=LR, betas=(0.9, 0.98), eps=1e-6, fused=True)


def train_step(
    model: BertForMaskedLM,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    weights: Tensor,
    progress: float,
    amp: torch.dtype | None,
) -> tuple[float, float]:
    """One update after this share of the time. Returns: both losses."""
    device, (lr, cls_weight) = model.bert.device, schedule(progress)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # In bf16 on a CPU, a step with plain attention takes a quarter less time at these lengths.
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with plain, torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        mlm_loss, cls_loss = compute_losses(model, batch.to(device), weights)
    optimizer.zero_grad()
    (mlm_loss + cls_weight * cls_loss).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return mlm_loss.item(), cls_loss.item()


# ------------------------------------------------------------------------------------------------
# Held-out score


@torch.no_grad()
def score_held_out(model: BertForMaskedLM, tokenizer: Tokenizer, paragraphs: list[str]) -> dict:
    """Loss and accuracy per masked word of unseen text, comparable across vocabularies.

    15 % of the words of each stretch of 32 are masked, with all their pieces, the same words for
    every lower-cased WordPiece vocabulary. Words with other letters than a to z are left out.
    A word's loss, in nats, is the sum over its pieces; it is correct if every piece is.
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
    means = {"loss": round(np.mean(losses), 4), "accuracy": round(np.mean(correct), 4)}
    return means | {"words": len(losses)}


# ------------------------------------------------------------------------------------------------
# A run


def load_run(args: argparse.Namespace, out: Path) -> tuple[dict[str, Tensor], dict]:
    """The run's tensors and progress, or those of a new run. Raises: UserError if flags differ."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    if not args.resume:
        return {}, {"settings": settings, "step": 0, "tokens": 0, "seconds": 0.0, "log": []}
    tensors, state = checkpoint.load_state(out)
    if "pretraining" not in state:
        raise UserError(f"--resume: {out} has no run of lab.pretrain")
    progress = state["pretraining"]
    if progress["settings"] != settings:
        raise UserError(f"--resume: the run has {progress['settings']}, the flags say {settings}")
    restore_folder(out / "best")
    return tensors, progress


def prepare(
    args: argparse.Namespace, out: Path
) -> tuple[Tokenizer, TokenizedSentences, list[str], BertForMaskedLM]:
    """Tokenizer, rows, held-out paragraphs, model. A new vocabulary is saved in best/."""
    documents, held_out = hold_out(read_documents(args.text), args.seed)
    if args.resume or args.start:
        folder = out / "best" if args.resume else find_model(args.start)
        model, tokenizer = load_bert(folder, mlm=True), Tokenizer(folder)
        size = model.cfg.num_hidden_layers, model.cfg.hidden_size
    else:
        tokenizer, size = train_vocabulary(documents, args.vocab, out / "best"), None
    rows = make_rows(documents, tokenizer, args.seed)
    torch.manual_seed(args.seed)
    if size != (args.layers, args.hidden):
        model = new_model(tokenizer, rows, args.layers, args.hidden)
    return tokenizer, rows, held_out, model


def train(args: argparse.Namespace, out: Path) -> None:
    """Train until the time is over. Raises: UserError if the loss diverges."""
    tensors, progress = load_run(args, out)
    device, amp = pick_device(args.device, "auto")
    amp = None if amp == torch.float16 else amp  # fp16 needs a gradient scaler
    tokenizer, rows, held_out, model = prepare(args, out)
    if progress.setdefault("checksum", rows.checksum) != rows.checksum:
        raise UserError(f"--resume: --text, or the vocabulary in {out / 'best'}, has changed")
    optimizer = make_optimizer(model.to(device))
    if args.resume:
        checkpoint.load_state_dict(tensors, model, optimizer)
    weights, continues = word_weights(rows, tokenizer).to(device), continuing_pieces(tokenizer)
    batches = itertools.islice(draw_batches(rows, args.seed), progress["step"], None)
    budget = args.minutes * 60
    print(f"{len(rows):,} rows of {len(rows.ids):,} tokens, on {device.type}", flush=True)

    def log_and_save(**losses: float) -> None:  # at the start, and 20 times
        row = {name: progress[name] for name in ("step", "tokens")}
        row["minutes"] = round(progress["seconds"] / 60, 2)
        row |= score_held_out(model, tokenizer, held_out) | losses
        progress["log"].append(row)
        print(", ".join(f"{name} {value:,}" for name, value in row.items()), flush=True)
        with atomic_folder(out / "best") as best:
            save_bert(model, best, torch.float16)
            tokenizer.save(best, model.max_length)
        lines = [json.dumps(row) + "\n" for row in progress["log"]]
        write_atomically(out / "log.jsonl", "".join(lines))
        state = checkpoint.state_dict(model, optimizer, [])
        checkpoint.save_state(out, state, {"pretraining": progress})

    with Stop() as stop:
        if not args.resume:
            log_and_save()
        while progress["seconds"] < budget and not stop.signal:
            started, share = time.monotonic(), progress["seconds"] / budget
            x, mask = rows.rows(next(batches))
            rng = torch.Generator().manual_seed(derive_seed(args.seed, 2, progress["step"]))
            batch = Batch(x, mask, *mask_words(x, tokenizer, continues, rng), views=1)
            mlm, cls = train_step(model, optimizer, batch, weights, share, amp)
            progress["step"] += 1
            progress["tokens"] += int(mask.sum())
            progress["seconds"] += time.monotonic() - started
            if not math.isfinite(mlm + cls):
                raise UserError(f"the loss is NaN or infinite at step {progress['step']}")
            if stop.signal or int(progress["seconds"] / budget * 20) > int(share * 20):
                log_and_save(mlm=round(mlm, 4), cls=round(cls, 4))
    if stop.signal:
        print("stopped; to continue, add --resume", file=sys.stderr)
        sys.exit(128 + stop.signal)


# ------------------------------------------------------------------------------------------------
# Command line


def score_models(args: argparse.Namespace) -> None:
    """A JSON line for each model."""
    held_out = hold_out(read_documents(args.text), args.seed)[1]
    for name in args.score:
        folder = find_model(name)
        model = load_bert(folder, mlm=True).to(pick_device(args.device, "off")[0])
        row = score_held_out(model, Tokenizer(folder), held_out)
        print(json.dumps({"model": name, **row}), flush=True)


def parse_args() -> argparse.Namespace:
    """Raises: UserError for flags that do not fit."""
    parser = Parser("python -m lab.pretrain", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text, also .gz and .xz")
    add("--minutes", type=float, help="of training; reading and counting take some more")
    add("--out", metavar="DIR", help="folder for the model, log.jsonl and the run's state")
    add("--score", nargs="+", metavar="MODEL", help="score these models on held-out paragraphs")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--start", default="", metavar="MODEL", help="vocabulary, weights if of equal size")
    either("--vocab", type=positive_int, help="size of a new vocabulary (default: 8192)")
    add("--layers", type=positive_int, help="(default: 4, or those of --start)")
    add("--hidden", type=positive_int, help="64 per head (default: 192, or that of --start)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    add("--resume", action="store_true", help="continue the run in --out")
    args = parser.parse_args()
    if args.score:
        return args
    if args.minutes is None or not args.out:
        raise UserError("--minutes and --out are needed (or --score)")
    default = BertConfig(vocab_size=8192, num_hidden_layers=4, hidden_size=192)
    cfg = read_config(find_model(args.start)) if args.start else default
    args.vocab = args.vocab or cfg.vocab_size
    args.layers = args.layers or cfg.num_hidden_layers
    args.hidden = args.hidden or cfg.hidden_size
    for name, valid, expected in [
        ("minutes", 0 < args.minutes < math.inf, "above 0"),
        ("hidden", args.hidden % 64 == 0, "a multiple of 64"),
        ("hidden", args.hidden <= args.vocab, "at most --vocab"),
        ("seed", 0 <= args.seed < 2**63, "at least 0"),
    ]:
        if not valid:
            raise UserError(f"--{name} is {getattr(args, name):g}; it must be {expected}")
    return args


def main() -> None:
    args = parse_args()
    if args.score:
        return score_models(args)
    out = errors.expand_home(args.out)
    with checkpoint.locked(out) if args.resume else checkpoint.new_folder(str(out), ""):
        train(args, out)


if __name__ == "__main__":
    run_main(main)
