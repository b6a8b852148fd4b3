"""A small BERT from raw text: vocabulary, masked language model, a folder for transformers.

    python -m lab.pretrain --text wiki.txt.xz --minutes 160 --out runs/my-bert
    python -m lab.pretrain --resume runs/my-bert
    python -m lab.pretrain --text wiki.txt.xz --minutes 5 --model assets/small-bert --layers 1 \
        --hidden 64 --out runs/weak                  # a small generator with the same vocabulary

Prints and logs the loss on held-out paragraphs; the model is in best/. The learning rate is
constant until seven tenths of the minutes are over, and only then the number of steps is fixed. So
two runs on one machine are the same until there; with `--steps N` they are the same to the end.
Not here: BERT's next-sentence loss, several GPUs, languages without spaces.

Shapes: B rows, T tokens including padding, D hidden size, W words of the vocabulary.
"""

import contextlib
import itertools
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bert import BertConfig, BertForMaskedLM, save_bert
from data import Batch, Tokenizer, corrupt
from diffcse import derive_seed, train_step
from engine import cli, fast
from engine.checkpoint import Metrics
from engine.device import pick_device
from engine.errors import UserError, atomic_folder, run_main
from engine.hub import find_model
from engine.run import Run
from engine.tokens import TokenizedSentences
from lab.held_out import hold_out, read_documents, score_held_out
from lab.running_text import split_sentences

CHARACTERS = 200  # in the vocabulary; others are [UNK]
MAX_LENGTH = 64  # tokens of a row, including [CLS] and [SEP]; 98 % of sentences are shorter
SINGLE, SINGLE_LENGTH = 0.1, 32  # the last steps' share and length: rows as in later training
WARM_UP = 400  # steps in which the rate rises
MASK_RATIO = 0.20
LAST = 0.3  # share of the steps in which the rate and the larger weight of [CLS] fall to 0
CLS_WEIGHT = (0.1, 4.0)  # of the losses of [CLS], before and in the last steps
NEXT_WEIGHT = 1.5  # of the next row's words, beside the row's own
RARE = 3e-4  # a word of this frequency counts half as much in that loss as a very rare word
WINDOW = 5  # words on each side that count as co-occurring


@dataclass
class PretrainConfig:
    """Settings of a run. Each field is a command-line flag, and its comment is the flag's help."""

    text: tuple[str, ...] = ()  # UTF-8 text, also .gz, .xz; an empty line ends a document
    minutes: float = 160.0  # of the run, with reading and counting
    steps: int | None = None  # exact number of steps, in place of minutes
    out: str = ""  # folder of the run (default: runs/small-bert-1, ...)
    resume: str = ""  # folder of an interrupted run
    vocab: int = 8192  # size of the vocabulary
    model: str = ""  # take the vocabulary of this model
    layers: int = 4  # of the encoder
    hidden: int = 256  # size of a state, 64 per head
    lr: float = 8e-4  # learning rate before it falls
    clip: float = 1.0  # maximum norm of the gradient
    batch_size: int = 4096  # tokens of a step, without padding
    seed: int = 0  # of weights, rows, batches and masks
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # mixed precision; auto: if it is fast
    eval_every: int = 1000  # steps between evaluations on the held-out paragraphs
    log_every: int = 1000  # steps between lines of log.jsonl
    save_minutes: float = 5.0  # minutes between checkpoints

    def __post_init__(self) -> None:
        self.text = tuple(os.path.abspath(os.path.expanduser(path)) for path in self.text)
        positive = ("minutes", "lr", "clip")
        at_least_1 = ("layers", "batch_size", "eval_every", "log_every")
        rules = [
            ("steps", self.steps is None or self.steps >= 1, "at least 1"),
            ("vocab", self.vocab >= 100, "at least 100"),
            ("hidden", self.hidden >= 64 and self.hidden % 64 == 0, "a multiple of 64"),
            ("hidden", self.model or self.hidden <= self.vocab, "at most --vocab"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63"),
            *((name, 0 < getattr(self, name) < math.inf, "positive, finite") for name in positive),
            *((name, getattr(self, name) >= 1, "at least 1") for name in at_least_1),
        ]
        cli.check(self, rules)

    @property
    def out_dir(self) -> str:
        return self.out


# ------------------------------------------------------------------------------------------------
# Text -> vocabulary -> rows of ids


def train_vocabulary(documents: list[list[str]], size: int) -> Tokenizer:
    """A lower-cased WordPiece vocabulary of exactly `size`.

    The library numbers single characters in random order, and with them breaks the ties between
    merges. So they are given here, by frequency, as if they were special tokens.
    """
    backend = tokenizers.BertWordPieceTokenizer(lowercase=True)._tokenizer
    paragraphs, raw, counts = list(itertools.chain.from_iterable(documents)), Counter(), Counter()
    for paragraph in paragraphs:
        raw.update(paragraph)
    for character, count in raw.items():
        for plain in backend.normalizer.normalize_str(character).split():
            counts.update(dict.fromkeys(plain, count))
    alphabet = sorted(counts, key=lambda c: (-counts[c], c))[: min(CHARACTERS, size // 4)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *alphabet]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=pieces + [f"##{c}" for c in alphabet],
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(paragraphs, trainer)
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if len(vocabulary) != size:
        raise UserError(f"--vocab is {size}, but the text has only {len(vocabulary)} pieces twice")
    words = sorted(vocabulary, key=vocabulary.get)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        return Tokenizer(folder)


def pack(documents: list[list[str]], lengths: Iterable[int], seed: int) -> list[list[str]]:
    """Consecutive sentences of a document joined to rows: long rows teach words by their context.

    A length is drawn for each row, between a quarter of MAX_LENGTH and MAX_LENGTH tokens; the row
    takes sentences until the next one would exceed it. lengths: of all sentences in order.
    """
    rng, lengths, packed = np.random.default_rng([seed, 3]), iter(lengths), []
    for sentences in documents:
        rows, space = [], -1  # -1: the first sentence begins a row
        for sentence, length in zip(sentences, lengths):
            if length - 2 > space:  # without [CLS] and [SEP]
                rows.append([])
                space = rng.integers(MAX_LENGTH // 4, MAX_LENGTH + 1) - 2
            rows[-1].append(sentence)
            space -= length - 2
        packed.append(list(map(" ".join, rows)))
    return packed


class Rows(TokenizedSentences):
    """The rows of documents, each with the number of the next one; the last one's is its own."""

    def __init__(self, documents: list[list[str]], tokenizer: Tokenizer):
        rows = ((row,) for row in itertools.chain.from_iterable(documents))
        super().__init__(rows, tokenizer, MAX_LENGTH, views=1)
        self.following = np.arange(1, len(self) + 1)
        self.following[np.cumsum(list(map(len, documents))) - 1] -= 1

    def draw(self, longest: int, cfg: PretrainConfig) -> Iterator[np.ndarray]:
        """The numbers of each step's rows, without end: rows of similar length, at most `longest`,
        about batch_size tokens.

        Each epoch's random order is cut into pools. A pool is sorted by length and cut into
        batches, which are taken in random order. So they have little padding, from all the text.
        """
        lengths = np.diff(self.starts)
        for epoch in itertools.count():
            rng = np.random.default_rng([cfg.seed, 1, epoch])
            order = rng.permutation(np.flatnonzero(lengths <= longest))
            for start in range(0, len(order), 16_384):
                pool = order[start : start + 16_384]
                pool = pool[np.argsort(lengths[pool], kind="stable")]
                cuts = np.flatnonzero(np.diff(lengths[pool].cumsum() // cfg.batch_size)) + 1
                batches = np.split(pool, cuts)
                for i in rng.permutation(len(batches)):
                    yield batches[i]


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
    rows: TokenizedSentences, tokenizer: Tokenizer, layers: int, hidden: int
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
# The model and its losses


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


class Pretraining(nn.Module):
    """What a step trains: a masked LM whose [CLS] tells the words of its row and of the next one.

    Masked words are predicted from their neighbours, so the masked LM does not train [CLS]. Here
    the same head at position 0 predicts all words of the row, as in a paragraph vector (Le and
    Mikolov 2014, PV-DBOW), and those of the next row (as in FastSent, Hill et al. 2016).
    """

    def __init__(self, cfg: PretrainConfig, mlm: BertForMaskedLM, weights: Tensor):
        super().__init__()
        self.cfg, self.mlm, self.cls_weight = cfg, mlm, CLS_WEIGHT[0]
        self.register_buffer("weights", weights, persistent=False)  # (W,) of words

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """batch.x, batch.mask: each row and its next one; x_masked, selected: the rows alone."""
        x, mask = batch.x[::2, : batch.width], batch.mask[::2, : batch.width]  # (B, T)
        x_masked, selected = batch.x_masked, batch.selected
        # In bf16 on a CPU, a step with plain attention takes a quarter less time at these lengths.
        plain = sdpa_kernel(SDPBackend.MATH) if x.device.type == "cpu" else contextlib.nullcontext()
        with plain:
            states = self.mlm.bert(x_masked, mask)  # (B, T, D)
        embeddings = self.mlm.bert.embeddings.word.weight  # (W, D)
        logits = self.mlm.head(states[selected], embeddings)  # (masked, W)
        mlm_loss = F.cross_entropy(logits.float(), x[selected], reduction="sum")
        mlm_loss = mlm_loss / selected.sum().clamp_min(1)  # a short batch may have none
        log_p = self.mlm.head(states[:, 0], embeddings).float().log_softmax(-1)  # (B, W)
        cls_loss = self.words_loss(log_p, x)
        next_loss = self.words_loss(log_p, batch.x[1::2])
        loss = mlm_loss + self.cls_weight * (cls_loss + NEXT_WEIGHT * next_loss)
        losses = {"loss": loss, "mlm": mlm_loss, "cls": cls_loss, "next": next_loss}
        return loss, {name: (value.detach(), 1) for name, value in losses.items()}

    def words_loss(self, log_p: Tensor, ids: Tensor) -> Tensor:
        """Shapes: log_p (B, W), ids (B, T) -> ()."""
        weight = self.weights[ids]  # (B, T)
        return -(weight * log_p.gather(1, ids)).sum() / weight.sum().clamp_min(1e-9)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW, with weight decay for matrices only."""
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01}
    others = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, others], lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


# ------------------------------------------------------------------------------------------------
# A run


class PretrainRun(Run):
    """A run whose number of steps, `total`, may be fixed on the way: see `fix_total`."""

    SAVED = [*Run.SAVED, "tokens", "total"]
    CHECKED = {"mlm": "the masked-LM loss", "loss": "the loss", "grad_norm": "the gradient"}
    UNIT = "tokens"
    tokens = 0  # seen so far

    def fix_total(self) -> None:
        """When the last part of the minutes begins, so does the last part of the steps."""
        if self.total is None and self.seconds() >= (1 - LAST) * 60 * self.cfg.minutes:
            self.total = round(self.step / (1 - LAST))
            self.bar.write(f"{self.total:,} steps; for the same model again: --steps {self.total}")

    def schedule(self) -> tuple[float, float]:
        """The learning rate, which rises, stays, and falls to 0; and the weight of [CLS]."""
        falling = min((1 - self.step / self.total) / LAST, 1.0) if self.total else 1.0
        small, large = CLS_WEIGHT
        lr = self.cfg.lr * min((self.step + 1) / WARM_UP, falling)
        return lr, small if falling == 1 else large * falling

    def batches(self, single: Rows, packed: Rows, tokenizer: Tokenizer) -> Iterator[Batch]:
        """The batch of each step from `step` on, a function of (seed, step)."""
        cfg, continues = self.cfg, continuing_pieces(tokenizer)
        rows, numbers = packed, itertools.islice(packed.draw(MAX_LENGTH, cfg), self.step, None)
        while True:
            first = math.ceil((1 - SINGLE) * self.total) if self.total else math.inf
            if rows is packed and self.step >= first:
                drawn = single.draw(SINGLE_LENGTH, cfg)
                rows, numbers = single, itertools.islice(drawn, self.step - first, None)
            batch = next(numbers)
            both = np.stack([batch, rows.following[batch]], 1).reshape(-1)  # (2B,)
            x, mask = rows.rows(both)
            width = int(mask[::2].sum(1).max())
            rng = torch.Generator().manual_seed(derive_seed(cfg.seed, 2, self.step))
            masked = mask_words(x[::2, :width], tokenizer, continues, rng)
            yield Batch(x, mask, *masked, views=2, width=width)

    def score(self, mlm: BertForMaskedLM, tokenizer: Tokenizer, held_out: list[str]) -> None:
        """Log the held-out score, and save the model in best/."""
        row = {f"held_out_{k}": v for k, v in score_held_out(mlm, tokenizer, held_out).items()}
        self.log(step=self.step, tokens=self.tokens, **row)
        numbers = ", ".join(f"{name} {value:,}" for name, value in row.items())
        minutes = self.seconds() / 60
        self.bar.write(f"step {self.step:>6}  {self.tokens:,} tokens, {minutes:.1f} min, {numbers}")
        with atomic_folder(self.folder / "best") as best:
            save_bert(mlm, best, torch.float16)
            tokenizer.save(best, mlm.max_length)
        self.best_step, self.scores, self.logged = self.step, row, time.monotonic()


def train(cfg: PretrainConfig, name: str) -> None:
    """A whole run, or the rest of one."""
    device, amp = pick_device(cfg.device, cfg.amp)
    with PretrainRun(cfg, name, device, amp) as run:
        run.take_folder()
        documents, held_out = hold_out(read_documents(cfg.text))
        if cfg.model:
            tokenizer = Tokenizer(find_model(cfg.model))
        else:
            tokenizer = train_vocabulary(documents, cfg.vocab)
        sentences = [[s for p in document for s in split_sentences(p)] for document in documents]
        single = Rows(sentences, tokenizer)
        packed = Rows(pack(sentences, np.diff(single.starts), cfg.seed), tokenizer)
        torch.manual_seed(cfg.seed)
        mlm = new_model(packed, tokenizer, cfg.layers, cfg.hidden).to(device)
        model = Pretraining(cfg, mlm, word_weights(packed, tokenizer)).to(device)
        optimizer = make_optimizer(model, cfg.lr)
        scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        step_fn = fast.accelerate(partial(train_step, model, optimizer, scaler, amp), model)
        about = f"{len(packed.ids):,} tokens in {len(packed):,} rows"
        run.start(model, optimizer, scaler, {"text": packed.checksum}, cfg.steps, about)
        if run.step == 0:
            run.score(mlm, tokenizer, held_out)
        batches = run.batches(single, packed, tokenizer)
        while run.step != run.total:
            batch = next(batches)
            lr, model.cls_weight = run.schedule()
            for group in optimizer.param_groups:
                group["lr"] = lr
            run.tokens += int(batch.mask[::2].sum())
            run.add(step_fn(batch.to(device)))
            run.fix_total()
            if run.log_due():
                run.log_metrics(lr)
            if run.eval_due():
                run.score(mlm, tokenizer, held_out)
            stop = run.stop_requested()  # Ctrl-C or SIGTERM
            if run.save_due() or stop:
                run.save()
            if stop:
                run.exit()
        run.bar.close()
        results = run.close({"tokens": run.tokens} | run.scores)
        print(f"{results['minutes']:.1f} minutes. The model is in {run.folder / 'best'}")


def main() -> None:
    name, cfg = cli.parse(PretrainConfig, {"small-bert": PretrainConfig()})
    if not cfg.text:
        raise UserError("--text is missing: one or more files")
    train(cfg, name)


if __name__ == "__main__":
    run_main(main)
