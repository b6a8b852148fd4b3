"""A small BERT from raw text: vocabulary, masked language model, a folder for transformers.

    python -m lab.pretrain --text wiki.txt.xz --minutes 140 --out runs/my-bert
    python -m lab.pretrain --text wiki.txt.xz --score runs/my-bert assets/small-bert
    python -m lab.pretrain --text wiki.txt.xz --start assets/small-bert --layers 2 --hidden 64 \
        --minutes 5 --out runs/weak                  # a small generator with the same vocabulary

In the order of this file: documents, a WordPiece vocabulary, rows of ids, initial word embeddings,
two losses, training for a given time. Choices that suit a small budget and sentence embeddings
(trials: results/pretrain/trials.jsonl):
    Rows are one sentence or a few, of many lengths, because the encoder is for sentences.
    [CLS] has a loss of its own: it predicts the words of its sentence, above all the rare ones.
        This loss has a small weight at first and a large one later.
    Word embeddings start as the truncated SVD of the corpus' positive pointwise mutual information
        (Levy and Goldberg 2014), the output bias as log frequency.
    Whole words are masked: a piece is too easy to guess from the rest of its word.
    No dropout, no next-sentence loss; the vocabulary product at masked positions only.

Text: UTF-8, one paragraph or sentence per line, an empty line between documents; also .gz and .xz.
The learning rate follows the clock, so two runs of a command differ; the data and its order depend
on the seed only. Not here: several GPUs, gradient accumulation, languages without spaces.

Shapes: B rows, T tokens including padding, D hidden size, W words of the vocabulary.
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from bert import BertConfig, BertForMaskedLM, load_bert, read_config, save_bert
from data import TOKENIZER_FILES, Tokenizer, corrupt, read_lines
from diffcse import derive_seed
from engine.checkpoint import (
    LOCK,
    STATE,
    load_state,
    load_state_dict,
    locked,
    new_folder,
    save_state,
    state_dict,
)
from engine.cli import Parser
from engine.device import pick_device
from engine.errors import UserError, run_main, write_atomically
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
SETTINGS = ("text", "start", "vocab", "layers", "hidden", "seed")  # a resumed run keeps them
PROGRESS = ("step", "tokens", "seconds", "log")  # of a saved run

# ------------------------------------------------------------------------------------------------
# Text -> documents -> vocabulary -> rows of ids


def read_documents(paths: list[str]) -> list[list[str]]:
    """The paragraphs of each document. Raises: UserError if all files are empty.

    Empty lines separate documents. In a file without any, such as a list of sentences, every line
    is a document.
    """
    documents = []
    for path in paths:
        lines = [line.strip() for line in read_lines(Path(path))]
        if all(lines):
            documents += [[line] for line in lines]
        else:
            documents += [list(group) for full, group in itertools.groupby(lines, bool) if full]
    if not documents:
        raise UserError(f"{', '.join(paths)}: no text")
    return documents


def hold_out(documents: list[list[str]], seed: int) -> tuple[list[list[str]], list[str]]:
    """Documents to train on, and HELD_OUT paragraphs of others, or a tenth of all if that is less.

    Raises: UserError if no document is left to train on.
    """
    wanted = min(HELD_OUT, math.ceil(sum(map(len, documents)) / 10))
    order = np.random.default_rng([seed, 0]).permutation(len(documents))
    sizes = np.cumsum([len(documents[i]) for i in order])
    first = int(np.searchsorted(sizes, wanted)) + 1  # the first document to train on
    held_out = [paragraph for i in order[:first] for paragraph in documents[i]]
    if first == len(documents):
        raise UserError(
            f"the text has {first} documents ({len(held_out)} lines), and some are held out: more "
            "are needed, with an empty line between them"
        )
    return [documents[i] for i in order[first:]], held_out[:wanted]


def train_vocabulary(documents: list[list[str]], size: int, folder: Path) -> Tokenizer:
    """A lower-cased WordPiece vocabulary of exactly `size`, in the files of transformers."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    wordpiece = tokenizers.BertWordPieceTokenizer(lowercase=True)
    wordpiece.train_from_iterator(
        (paragraph for document in documents for paragraph in document),
        vocab_size=size,
        min_frequency=2,
        limit_alphabet=min(400, size // 4),
        special_tokens=special,
        show_progress=sys.stderr.isatty(),
    )
    if (found := wordpiece.get_vocab_size()) != size:
        raise UserError(
            f"--vocab is {size}, but only {found} pieces occur twice in the text; use more text, "
            f"or --vocab {found} or fewer"
        )
    backend = wordpiece._tokenizer
    sep, cls = (("[SEP]", special.index("[SEP]")), ("[CLS]", special.index("[CLS]")))
    backend.post_processor = tokenizers.processors.BertProcessing(sep, cls)
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    config |= {"model_max_length": 2 * MAX_LENGTH}
    config |= {f"{token.strip('[]').lower()}_token": token for token in special}
    vocabulary = backend.get_vocab()
    words = "".join(f"{word}\n" for word in sorted(vocabulary, key=vocabulary.get))
    write_atomically(folder / "vocab.txt", words)
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_atomically(folder / "tokenizer.json", backend.to_str(pretty=True))
    return Tokenizer(folder)


def make_rows(documents: list[list[str]], tokenizer: Tokenizer, seed: int) -> TokenizedSentences:
    """Rows of ids: [CLS], one or more consecutive sentences of a document, [SEP].

    A length is drawn for each row, between a quarter of MAX_LENGTH and MAX_LENGTH. The row takes
    sentences until the next one would exceed it. Long rows teach words by their context; short
    ones are like the sentences that are encoded later.
    """
    counts = []  # sentences of each document

    def all_sentences() -> Iterator[tuple[str]]:
        for document in documents:
            sentences = [s for paragraph in document for s in split_sentences(paragraph)]
            counts.append(len(sentences))
            yield from ((sentence,) for sentence in sentences)

    rows = TokenizedSentences(all_sentences(), tokenizer, MAX_LENGTH, views=1)
    rng = np.random.default_rng([seed, 3])
    limits = rng.integers(MAX_LENGTH // 4, MAX_LENGTH + 1, len(rows)).tolist()
    starts_document = set(np.cumsum([0, *counts]).tolist())
    starts_row, space = [], 0
    for i, length in enumerate((np.diff(rows.starts) - 2).tolist()):
        if i in starts_document or length > space:
            starts_row.append(i)
            space = limits[len(starts_row) - 1] - 2
        space -= length
    keep = np.ones(len(rows.ids), bool)  # all ids but [SEP] [CLS] between two sentences of a row
    inner = np.setdiff1d(np.arange(len(rows)), starts_row)
    keep[rows.starts[inner]] = keep[rows.starts[inner] - 1] = False
    kept_before = np.concatenate([[0], keep.cumsum()])
    rows.ids, rows.starts = rows.ids[keep], kept_before[rows.starts[[*starts_row, -1]]]
    return rows


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


def mask_words(
    x: Tensor, tokenizer: Tokenizer, continues: Tensor, ratio: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """BERT's masking of whole words: all pieces of a word are selected, or none.

    continues (W,) bool: the ids that continue a word (##ing).
    Shapes: x (B, T) ids -> x_masked (B, T), selected (B, T) bool.
    """
    special = torch.isin(x, torch.tensor(tokenizer.special_ids))
    word = (~continues[x]).cumsum(1).sub(1).clamp_min(0)  # (B, T): a token's word, from 0
    selected = (torch.rand(x.shape, generator=rng) < ratio).gather(1, word) & ~special
    return corrupt(x, selected, tokenizer, "80-10-10", rng), selected


def continuing_pieces(tokenizer: Tokenizer) -> Tensor:
    """Which ids continue a word. Shapes: -> (W,) bool."""
    ids = [i for piece, i in tokenizer.vocabulary().items() if piece.startswith("##")]
    return torch.isin(torch.arange(tokenizer.vocab_size), torch.tensor(ids))


# ------------------------------------------------------------------------------------------------
# Initial weights


def positive_pmi(
    rows: TokenizedSentences, tokenizer: Tokenizer, max_tokens: int = 20_000_000
) -> Tensor:
    """How much more often than by chance two words occur within WINDOW. Shapes: -> (W, W).

    max(0, log p(a, b) / p(a) p(b)), with the context's p(b) smoothed by the power 0.75, without
    special tokens. Takes 12 W^2 bytes, 0.8 GB for 8,192 words.
    """
    W = tokenizer.vocab_size
    ids = rows.ids[:max_tokens].astype(np.int64)
    row = np.repeat(np.arange(len(rows)), np.diff(rows.starts))[:max_tokens]
    is_word = ~np.isin(ids, tokenizer.special_ids)
    flat = np.zeros(W * W, np.float32)
    for distance in range(1, WINDOW + 1):
        left, right = slice(None, -distance), slice(distance, None)
        counted = (row[left] == row[right]) & is_word[left] & is_word[right]
        pairs = (ids[left] * W + ids[right])[counted]
        for start in range(0, len(pairs), 4_000_000):
            flat += np.bincount(pairs[start : start + 4_000_000], minlength=W * W)
    counts = torch.from_numpy(flat).view(W, W)
    counts = counts + counts.T
    p_a = counts.sum(1) / counts.sum()
    p_b = counts.sum(0).pow(0.75) / counts.sum(0).pow(0.75).sum()
    chance = (p_a[:, None] * p_b).clamp_min(1e-30)  # where it is 0, so is the count
    return (counts / counts.sum() / chance).clamp_(min=1).log_()


def new_model(
    tokenizer: Tokenizer, rows: TokenizedSentences, layers: int, hidden: int
) -> BertForMaskedLM:
    """Random weights, except for the word embeddings and the output bias.

    Its config has BERT's dropout of 0.1, for a later training. This file trains in eval mode.
    """
    cfg = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=2 * MAX_LENGTH,
        pad_token_id=tokenizer.pad_id,
    )
    model, W = BertForMaskedLM(cfg), cfg.vocab_size
    U, S, _ = torch.svd_lowrank(positive_pmi(rows, tokenizer), q=min(hidden + 32, W), niter=4)
    rotation = torch.linalg.qr(torch.randn(hidden, hidden))[0]  # all coordinates equally strong
    vectors = (U * S.sqrt())[:, :hidden] @ rotation
    counts = torch.from_numpy(np.bincount(rows.ids, minlength=W) + 1).float()
    with torch.no_grad():
        model.bert.embeddings.word.weight.copy_(0.05 * vectors / vectors.std())
        model.head.bias.copy_((counts / counts.sum()).log())
    return model.eval()


# ------------------------------------------------------------------------------------------------
# Losses and held-out score


def word_weights(rows: TokenizedSentences, tokenizer: Tokenizer) -> Tensor:
    """Weights in the loss of [CLS]: RARE / (RARE + frequency), 0 for special tokens. Shapes: (W,).

    Frequent words such as "the" say little about a sentence (Arora et al. 2017, SIF).
    """
    counts = np.bincount(rows.ids, minlength=tokenizer.vocab_size).astype(np.float64)
    counts[tokenizer.special_ids] = 0
    weights = RARE / (RARE + counts / counts.sum())
    weights[tokenizer.special_ids] = 0
    return torch.from_numpy(weights).float()


def compute_losses(
    model: BertForMaskedLM,
    x: Tensor,
    x_masked: Tensor,
    selected: Tensor,
    mask: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """The masked-LM loss, and the loss of predicting the sentence's words from [CLS] alone.

    Masked words are predicted from their neighbours, so the masked LM does not train [CLS]. Here
    the same head at position 0 predicts all words of the sentence, as in a paragraph vector (Le
    and Mikolov 2014, PV-DBOW).
    Shapes: x, x_masked (B, T); selected, mask (B, T) bool; weights (W,) -> (), ().
    """
    states = model.bert(x_masked, mask)  # (B, T, D)
    embeddings = model.bert.embeddings.word.weight  # (W, D)
    mlm_loss = F.cross_entropy(model.head(states[selected], embeddings).float(), x[selected])
    log_p = model.head(states[:, 0], embeddings).float().log_softmax(-1)  # (B, W)
    weight = weights[x]  # (B, T)
    return mlm_loss, -(weight * log_p.gather(1, x)).sum() / weight.sum().clamp_min(1e-9)


def choose_words(
    tokenizer: Tokenizer, paragraphs: list[str], max_length: int
) -> list[tuple[Tensor, list[list[int]]]]:
    """The ids of each stretch of 32 words, and the positions of each word that is masked.

    15 % of the words are chosen, the same ones for every lower-cased WordPiece vocabulary; words
    with other letters than a to z are left out.
    """
    stretches = []
    for words in map(str.split, paragraphs):
        stretches += [" ".join(words[i : i + 32]) for i in range(0, len(words), 32)]
    chosen, rng = [], np.random.default_rng(0)
    for text, encoding in zip(stretches, tokenizer.backend.encode_batch(stretches)):
        spans: dict[int, list[int]] = {}  # word -> its positions
        for position, word in enumerate(encoding.word_ids):
            if word is not None:  # [CLS] and [SEP]
                spans.setdefault(word, []).append(position)
        masked = []
        for span, draw in zip(spans.values(), rng.random(len(spans))):
            word = text[encoding.offsets[span[0]][0] : encoding.offsets[span[-1]][1]]
            if draw < 0.15 and word.isascii() and word.isalpha() and span[-1] < max_length:
                masked.append(span)
        chosen.append((len(text), torch.tensor(encoding.ids[:max_length]), masked))
    chosen.sort(key=lambda row: row[0])  # similar lengths together, in the same order for all
    return [row[1:] for row in chosen]


@torch.no_grad()
def score_held_out(
    model: BertForMaskedLM, tokenizer: Tokenizer, paragraphs: list[str]
) -> tuple[Tensor, Tensor]:
    """Loss and correctness of each masked word of unseen text, comparable across vocabularies.

    All pieces of a word are masked. Returns: the loss in nats, summed over the word's pieces, and
    whether every piece is correct. Shapes: n words -> (n,), (n,) bool.
    """
    device, embeddings = model.bert.device, model.bert.embeddings.word.weight
    losses, correct = [], []
    rows = choose_words(tokenizer, paragraphs, model.max_length)
    for start in range(0, len(rows), 128):
        ids, spans = zip(*rows[start : start + 128])
        x = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_id)
        word, count = torch.full(x.shape, -1), 0  # (B, T): the number of a position's masked word
        for row, masked in enumerate(spans):
            for span in masked:
                word[row, span], count = count, count + 1
        masked, mask = word >= 0, x != tokenizer.pad_id  # (B, T)
        x_masked = x.masked_fill(masked, tokenizer.mask_id)
        states = model.bert(x_masked.to(device), mask.to(device))[masked.to(device)]
        log_p = model.head(states, embeddings).float().log_softmax(-1).cpu()  # (pieces, W)
        target, word = x[masked], word[masked]
        wrong = (log_p.argmax(-1) != target).float()
        losses.append(
            torch.zeros(count).index_add(0, word, -log_p.gather(1, target[:, None])[:, 0])
        )
        correct.append(torch.zeros(count).index_add(0, word, wrong) == 0)
    return torch.cat(losses), torch.cat(correct)


def held_out_row(losses: Tensor, correct: Tensor) -> dict[str, float]:
    """Means over words: loss in nats, accuracy; and the number of words. Shapes: (n,), (n,)."""
    loss, accuracy = losses.mean().item(), correct.float().mean().item()
    return {"loss": round(loss, 4), "accuracy": round(accuracy, 4), "words": len(correct)}


# ------------------------------------------------------------------------------------------------
# Training


def lr_at(progress: float) -> float:
    """The learning rate after this share of the time: a linear rise, then a linear fall to 0."""
    return LR * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def cls_weight_at(progress: float) -> float:
    """The weight of the [CLS] loss: small, then large and falling to 0."""
    small, large = CLS_WEIGHT
    return small if progress < CLS_START else large * (1 - progress) / (1 - CLS_START)


def train_step(
    model: BertForMaskedLM,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Tensor,
    progress: float,
    amp: torch.dtype | None,
) -> tuple[float, float]:
    """One update after this share of the time. batch: x, x_masked, selected, mask of
    compute_losses. Returns: both losses."""
    device = model.bert.device
    # In bf16 on a CPU, a step with plain attention takes a quarter less time at these lengths.
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with plain, torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        mlm_loss, cls_loss = compute_losses(model, *(t.to(device) for t in batch), weights)
    for group in optimizer.param_groups:
        group["lr"] = lr_at(progress)
    optimizer.zero_grad(set_to_none=True)
    (mlm_loss + cls_weight_at(progress) * cls_loss).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return mlm_loss.item(), cls_loss.item()


@contextlib.contextmanager
def run_folder(args: argparse.Namespace) -> Iterator[tuple[dict[str, Tensor], dict]]:
    """Hold --out, and give the state that --resume continues from (empty: a new run).

    Raises: UserError if flags and folder do not fit. A folder that another program made is never
    written to. --overwrite replaces the files of this program and keeps all others.
    """
    out = Path(args.out)
    is_new = not out.is_dir() or all(file.name == LOCK for file in out.iterdir())
    if is_new and args.resume:
        raise UserError(f"--out {out} has no run to resume")
    if not (is_new or args.resume or args.overwrite):
        raise UserError(f"--out {out} exists: --resume continues its run, --overwrite replaces it")
    if not is_new and "pretrain" not in load_state(out)[1]:
        raise UserError(
            f"--out {out} was not made by lab.pretrain (no state of it in {STATE}), so it is "
            "neither resumed nor overwritten; use another folder"
        )
    with new_folder(args.out, "") if is_new else locked(out):
        tensors, state = load_state(out) if args.resume else ({}, {})
        if args.resume:
            check_resume(args, state)
        yield tensors, state


def check_resume(args: argparse.Namespace, state: dict) -> None:
    for name in SETTINGS:
        before, now = state["pretrain"][name], getattr(args, name)
        if before != now:
            raise UserError(f"--{name} is {now or 'none'}, but the run has {before or 'none'}")
    if state["seconds"] >= args.minutes * 60:
        raise UserError(
            f"{args.out} has been trained for {state['seconds'] / 60:.1f} minutes; to continue, "
            "give a larger --minutes"
        )


class Pretraining:
    """One run. args: the flags of main(); tensors, state: of run_folder."""

    def __init__(self, args: argparse.Namespace, tensors: dict[str, Tensor], state: dict):
        self.args, self.out, self.budget = args, Path(args.out), args.minutes * 60
        device, amp = pick_device(args.device, "auto")
        self.amp = None if amp == torch.float16 else amp  # fp16 needs a gradient scaler
        torch.manual_seed(args.seed)
        start = load_bert(find_model(args.start), mlm=True) if args.start else None
        documents, self.held_out = hold_out(read_documents(args.text), args.seed)
        with tempfile.TemporaryDirectory() as folder:  # --out is written after the first step
            if source := self.out if state else args.start and find_model(args.start):
                self.tokenizer = Tokenizer(source)
            else:
                self.tokenizer = train_vocabulary(documents, args.vocab, Path(folder))
            self.tokenizer_files = {f.name: f.read_bytes() for f in self.tokenizer.files}
        self.rows = make_rows(documents, self.tokenizer, args.seed)
        size = args.layers, args.hidden
        if state:
            self.model = load_bert(self.out, mlm=True)
        elif start and size == (start.cfg.num_hidden_layers, start.cfg.hidden_size):
            self.model = start
        else:
            self.model = new_model(self.tokenizer, self.rows, *size)
        self.model.to(device)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=LR, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True
        )
        self.step, self.tokens, self.seconds, self.log = 0, 0, 0.0, []  # seconds: of training
        if state:
            load_state_dict(tensors, self.model, self.optimizer)
            self.step, self.tokens, self.seconds, self.log = (state[name] for name in PROGRESS)
        parameters = sum(p.numel() for p in self.model.parameters())
        print(
            f"{len(self.rows):,} rows of {len(self.rows.ids):,} tokens, {len(self.held_out):,} "
            f"paragraphs held out; {parameters:,} parameters on {device.type}, "
            f"{str(self.amp or 'fp32').removeprefix('torch.')}",
            flush=True,
        )

    def save(self) -> None:
        """The state, then the model in fp16. Each file is whole or not written."""
        tensors = state_dict(self.model, self.optimizer, [])
        run_state = {"pretrain": {name: getattr(self.args, name) for name in SETTINGS}}
        save_state(self.out, tensors, run_state | {name: getattr(self, name) for name in PROGRESS})
        with tempfile.TemporaryDirectory() as folder:
            save_bert(self.model, folder, torch.float16)
            files = {f.name: f.read_bytes() for f in Path(folder).iterdir()}
        files["log.jsonl"] = "".join(json.dumps(row) + "\n" for row in self.log)
        for name in set(TOKENIZER_FILES) - self.tokenizer_files.keys():  # of an overwritten run
            (self.out / name).unlink(missing_ok=True)
        for name, content in (files | self.tokenizer_files).items():
            write_atomically(self.out / name, content)
        self.saved = self.seconds

    def score(self, mlm_loss: float = math.nan, cls_loss: float = math.nan) -> None:
        """A line of log.jsonl, from the held-out paragraphs and the means of recent losses."""
        row = {"step": self.step, "tokens": self.tokens, "minutes": round(self.seconds / 60, 2)}
        row |= held_out_row(*score_held_out(self.model, self.tokenizer, self.held_out))
        if self.step:
            row["tokens_per_second"] = round(self.tokens / self.seconds)
            row |= {"mlm": round(mlm_loss, 4), "cls": round(cls_loss, 4)}
        self.log.append(row)
        left = max(self.budget - self.seconds, 0) / 60
        self.bar.write(
            f"{self.tokens / 1e6:7.2f} M tokens, {left:5.1f} minutes left: held-out loss "
            f"{row['loss']:.3f} per word, accuracy {row['accuracy']:.1%}"
        )

    def train(self) -> None:
        """Raises: UserError if the budget is shorter than a step, or the loss diverges."""
        weights = word_weights(self.rows, self.tokenizer).to(self.model.bert.device)
        continues = continuing_pieces(self.tokenizer)
        bar_format = "{percentage:3.0f}% |{bar}| {remaining} left{postfix}"
        total, initial = round(self.budget), round(self.seconds)
        self.bar = tqdm(total=total, initial=initial, disable=None, bar_format=bar_format)
        self.saved, recent = self.seconds, deque(maxlen=100)
        if not self.step:
            self.score()
        batches = itertools.islice(draw_batches(self.rows, self.args.seed), self.step, None)
        with self.bar, Stop() as stop:
            while self.seconds < self.budget and not stop.signal:
                started = time.monotonic()
                x, mask = self.rows.rows(next(batches))
                rng = torch.Generator().manual_seed(derive_seed(self.args.seed, 2, self.step))
                x_masked, selected = mask_words(x, self.tokenizer, continues, MASK_RATIO, rng)
                progress, batch = self.seconds / self.budget, (x, x_masked, selected, mask)
                step = train_step(self.model, self.optimizer, batch, weights, progress, self.amp)
                recent.append(step)
                self.step, self.tokens = self.step + 1, self.tokens + int(mask.sum())
                self.seconds += time.monotonic() - started
                self.check_step(*step)
                mlm_loss, cls_loss = np.mean(recent, axis=0).tolist()
                self.bar.n = min(round(self.seconds), total)
                self.bar.set_postfix_str(
                    f", {self.tokens / self.seconds:,.0f} tokens/s, loss {mlm_loss:.3f}, "
                    f"[CLS] {cls_loss:.3f}"
                )
                last = self.seconds >= self.budget or stop.signal
                if last or int(progress * 20) < int(self.seconds / self.budget * 20):
                    self.score(mlm_loss, cls_loss)
                if last or self.seconds - self.saved > 300:
                    self.save()
        done = f"{self.seconds / 60:.1f} of {self.args.minutes:g} minutes"
        if stop.signal:
            print(f"stopped after {done}; to continue, add --resume", file=sys.stderr)
            sys.exit(128 + stop.signal)
        print(f"{self.out}: {self.tokens:,} tokens in {self.step:,} steps, {done}")

    def check_step(self, mlm_loss: float, cls_loss: float) -> None:
        if self.step == 1 and self.seconds >= self.budget:
            raise UserError(
                f"--minutes {self.args.minutes:g} is shorter than one step, which takes "
                f"{self.seconds:.1f} seconds on this machine"
            )
        if not math.isfinite(mlm_loss + cls_loss):
            raise UserError(
                f"the loss is NaN or infinite at step {self.step}; {self.out} has the last saved "
                "state, for --resume"
            )


# ------------------------------------------------------------------------------------------------
# Command line


def score_models(args: argparse.Namespace) -> None:
    """A JSON line for each model; from the second on with its difference from the first."""
    held_out = hold_out(read_documents(args.text), args.seed)[1]
    first = None
    for name in args.score:
        folder = find_model(name)
        model = load_bert(folder, mlm=True).to(pick_device(args.device, "off")[0])
        losses, correct = score_held_out(model, Tokenizer(folder), held_out)
        row = {"model": name, **held_out_row(losses, correct)}
        if first is None:
            first = losses
        elif len(first) == len(losses):  # word by word
            difference = losses - first
            standard_error = difference.std().item() / math.sqrt(len(losses))
            row["loss_minus_first"] = round(difference.mean().item(), 4)
            row["standard_error"] = round(standard_error, 4)
        print(json.dumps(row), flush=True)


def parse_args() -> argparse.Namespace:
    parser = Parser(
        "python -m lab.pretrain", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text, also .gz and .xz")
    add("--minutes", type=float, help="of training; reading and counting take some more")
    add("--out", metavar="DIR", help="folder for the model, log.jsonl and the run's state")
    add("--score", nargs="+", metavar="MODEL", help="score these models on held-out paragraphs")
    add("--start", default="", metavar="MODEL", help="vocabulary, and weights if the size is equal")
    add("--vocab", type=int, help="WordPiece vocabulary (default: 8192)")
    add("--layers", type=int, help="(default: 4, or those of --start)")
    add("--hidden", type=int, help="hidden size, 64 per head (default: 192, or that of --start)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    args = parser.parse_args()
    if not args.score:
        check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Fill in the defaults that --start decides. Raises: UserError."""
    if args.minutes is None or args.out is None:
        raise UserError("--minutes and --out are needed (or --score)")
    sizes = {"vocab": 8192, "layers": 4, "hidden": 192}
    if args.start:
        if args.vocab:
            raise UserError("--vocab and --start exclude each other: --start has a vocabulary")
        cfg = read_config(find_model(args.start))
        sizes = {"vocab": cfg.vocab_size, "layers": cfg.num_hidden_layers}
        sizes["hidden"] = cfg.hidden_size
    for name, default in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for name, valid, expected in [
        ("minutes", 0 < args.minutes < math.inf, "above 0"),
        ("vocab", 32 <= args.vocab <= 65_536, "between 32 and 65536"),
        ("layers", args.layers >= 1, "at least 1"),
        ("seed", 0 <= args.seed < 2**63, "at least 0"),
        ("hidden", args.hidden >= 64 and args.hidden % 64 == 0, "a multiple of 64"),
        ("hidden", args.hidden <= args.vocab, "at most --vocab"),
    ]:
        if not valid:
            raise UserError(f"--{name} is {getattr(args, name):g}; it must be {expected}")


def main() -> None:
    args = parse_args()
    if args.score:
        return score_models(args)
    with run_folder(args) as (tensors, state):
        Pretraining(args, tensors, state).train()


if __name__ == "__main__":
    run_main(main)
