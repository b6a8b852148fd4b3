"""A small BERT from raw text: vocabulary, masked language model, a folder for transformers.

    python -m lab.pretrain --text wiki.txt.xz --out runs/my-bert
    python -m lab.pretrain --resume runs/my-bert
    python -m lab.pretrain --text wiki.txt.xz --steps 1000 --model assets/small-bert --layers 1 \
        --hidden 64 --out runs/weak                  # a small generator with the same vocabulary

Prints and logs the loss on held-out paragraphs; the model is in best/. On one CPU, and with as many
threads, the same command makes the same model. What was tried besides is in RESULTS.md.
Not here: BERT's next-sentence loss, several GPUs, scripts other than Latin (lab/held_out.py).

Shapes: B rows, T tokens including padding, D hidden size, W words of the vocabulary.
"""

import contextlib
import math
import os
import time
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bert import BertConfig, BertForMaskedLM, save_bert
from data import Batch, Tokenizer
from diffcse import train_step
from engine import cli, fast
from engine.checkpoint import Metrics
from engine.device import pick_device
from engine.errors import UserError, atomic_folder, run_main
from engine.run import Run
from lab.counting import log_frequency, word_vectors, word_weights
from lab.held_out import score_held_out
from lab.rows import MAX_LENGTH, read_rows

WARM_UP = 400  # steps over which the rate rises, at most a tenth of all
CLS_WEIGHT, LAST_CLS_WEIGHT = 0.1, 4.0  # of the loss at [CLS]
LAST = 0.3  # last share of the steps: the weight jumps to LAST_CLS_WEIGHT, then falls to 0


@dataclass
class PretrainConfig:
    """Settings of a run. Each field is a command-line flag, and its comment is the flag's help."""

    text: tuple[str, ...] = ()  # UTF-8 text, also .gz, .xz; an empty line ends a document
    steps: int = 4000  # number of steps
    out: str = ""  # folder of the run (default: runs/small-bert-1, ...)
    resume: str = ""  # folder of an interrupted run
    vocab: int = 8192  # size of the vocabulary, without --model
    model: str = ""  # take the vocabulary of this model; memory grows with its square
    layers: int = 4  # number of encoder layers
    hidden: int = 192  # hidden size; an attention head for each 64
    lr: float = 1.5e-3  # peak learning rate; it rises, then falls to 0
    clip: float = 1.0  # maximum norm of the gradient
    batch_size: int = 4096  # about this many tokens a step, without padding
    seed: int = 0  # of weights, rows, batches and masks
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # mixed precision; auto: if it is fast
    eval_every: int = 500  # steps between evaluations on the held-out paragraphs
    log_every: int = 500  # steps between lines of log.jsonl
    save_minutes: float = 5.0  # minutes between checkpoints

    def __post_init__(self) -> None:
        self.text = tuple(os.path.abspath(os.path.expanduser(path)) for path in self.text)
        at_least_1 = ("steps", "layers", "batch_size", "eval_every", "log_every")
        rules = [
            ("vocab", self.vocab >= 100, "at least 100"),
            ("hidden", self.hidden >= 64 and self.hidden % 64 == 0, "a multiple of 64"),
            ("save_minutes", self.save_minutes >= 0, "0 or larger"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63"),
            *((n, 0 < getattr(self, n) < math.inf, "positive, finite") for n in ("lr", "clip")),
            *((name, getattr(self, name) >= 1, "at least 1") for name in at_least_1),
        ]
        cli.check(self, rules)

    @property
    def out_dir(self) -> str:
        return self.out


# ------------------------------------------------------------------------------------------------
# The model and its losses


def new_model(vectors: Tensor, bias: Tensor, pad_id: int, layers: int) -> BertForMaskedLM:
    """Random weights, but the words' embeddings and the output bias are what counting gives.

    Shapes: vectors (W, D), bias (W,). The config has BERT's dropout of 0.1, for a later training;
    here the model stays in eval mode.
    """
    W, D = vectors.shape
    # Twice MAX_LENGTH, so that longer text can be encoded; those positions stay untrained
    cfg = BertConfig("bert", W, D, layers, D // 64, 4 * D, 2 * MAX_LENGTH, pad_token_id=pad_id)
    model = BertForMaskedLM(cfg)
    with torch.no_grad():
        model.bert.embeddings.word.weight.copy_(0.05 * vectors / vectors.std())
        model.head.bias.copy_(bias)
    return model.eval()


class Pretraining(nn.Module):
    """What a step trains: a masked LM whose [CLS] predicts the words of its row.

    Masked words are predicted from their neighbours, so the masked LM does not train [CLS]. So its
    head is also applied at position 0, to predict all words of the row, as in a paragraph vector
    (Le and Mikolov 2014, PV-DBOW); frequent words count less.
    """

    def __init__(self, cfg: PretrainConfig, mlm: BertForMaskedLM, weights: Tensor):
        super().__init__()
        self.cfg, self.mlm, self.cls_weight = cfg, mlm, CLS_WEIGHT
        self.register_buffer("weights", weights, persistent=False)  # (W,) of words

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Shapes: batch (B, T) -> loss (), metrics."""
        x, selected = batch.x, batch.selected
        # In bf16 on a CPU, a step with plain attention takes a quarter less time at these lengths.
        with sdpa_kernel(SDPBackend.MATH) if x.device.type == "cpu" else contextlib.nullcontext():
            states = self.mlm.bert(batch.x_masked, batch.mask)  # (B, T, D)
        embeddings = self.mlm.bert.embeddings.word.weight  # (W, D)
        logits = self.mlm.head(states[selected], embeddings)  # (masked, W)
        mlm_loss = F.cross_entropy(logits.float(), x[selected], reduction="sum")
        mlm_loss = mlm_loss / selected.sum().clamp_min(1)  # a short batch may have none
        log_p = self.mlm.head(states[:, 0], embeddings).float().log_softmax(-1)  # (B, W)
        weights = self.weights[x]  # (B, T)
        cls_loss = -(weights * log_p.gather(1, x)).sum() / weights.sum().clamp_min(1e-9)
        loss = mlm_loss + self.cls_weight * cls_loss
        losses = {"loss": loss, "mlm": mlm_loss, "cls": cls_loss}
        return loss, {name: (value.detach(), 1) for name, value in losses.items()}


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW, with weight decay for matrices only."""
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01}
    others = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, others], lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


# ------------------------------------------------------------------------------------------------
# A run


class PretrainRun(Run):
    """A run that is scored on held-out paragraphs, and keeps its last model."""

    SAVED = [*Run.SAVED, "tokens"]
    CHECKED = {"mlm": "the masked-LM loss", "loss": "the loss", "grad_norm": "the gradient"}
    UNIT = "tokens"
    tokens = 0  # seen so far

    def schedule(self) -> tuple[float, float]:
        """The learning rate, and the weight of the loss at [CLS]."""
        left = 1 - self.step / self.total
        weight = CLS_WEIGHT if left > LAST else LAST_CLS_WEIGHT * left / LAST
        warm_up = min(WARM_UP, self.total / 10)
        return self.cfg.lr * min((self.step + 1) / warm_up, left), weight

    def score(self, mlm: BertForMaskedLM, tokenizer: Tokenizer, held_out: list[str]) -> None:
        """Log the held-out score and, after a step, save the model in best/."""
        row = {f"held_out_{k}": v for k, v in score_held_out(mlm, tokenizer, held_out).items()}
        self.log(step=self.step, tokens=self.tokens, **row)
        numbers = ", ".join(f"{name} {value:,}" for name, value in row.items())
        minutes = self.seconds() / 60
        self.bar.write(f"step {self.step:>6}  {self.tokens:,} tokens, {minutes:.1f} min, {numbers}")
        if self.step:
            with atomic_folder(self.folder / "best") as best:
                save_bert(mlm, best, torch.float16)
                tokenizer.save(best, mlm.max_length)
        self.best_step, self.scores, self.logged = self.step, row, time.monotonic()


def train(cfg: PretrainConfig, name: str) -> None:
    """A whole run, or the rest of one."""
    device, amp = pick_device(cfg.device, cfg.amp)
    with PretrainRun(cfg, name, device, amp) as run:
        run.take_folder()
        tokenizer, rows, held_out = read_rows(cfg.text, cfg.model, cfg.vocab, cfg.seed)
        inputs = {"text": rows.checksum + zlib.crc32("\n".join(held_out).encode())}
        torch.manual_seed(cfg.seed)
        counts = np.bincount(rows.ids, minlength=tokenizer.vocab_size)
        vectors = word_vectors(rows, tokenizer, cfg.hidden)
        mlm = new_model(vectors, log_frequency(counts), tokenizer.pad_id, cfg.layers)
        weights = word_weights(counts, tokenizer.special_ids)
        model = Pretraining(cfg, mlm, weights).to(device)
        optimizer = make_optimizer(model, cfg.lr)
        scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        step_fn = fast.accelerate(partial(train_step, model, optimizer, scaler, amp), model)
        about = f"{len(rows.ids):,} tokens in {len(rows):,} rows"
        run.start(model, optimizer, scaler, inputs, cfg.steps, about)
        if run.step == 0:
            run.score(mlm, tokenizer, held_out)
        batches = rows.batches(cfg.batch_size, cfg.seed, run.step)
        while run.step != run.total:
            batch = next(batches)
            lr, model.cls_weight = run.schedule()
            for group in optimizer.param_groups:
                group["lr"] = lr
            run.tokens += int(batch.mask.sum())
            run.add(step_fn(batch.to(device)))
            if run.log_due():
                run.log_metrics(lr)
            if run.eval_due():
                run.score(mlm, tokenizer, held_out)
            run.save_or_stop()  # on Ctrl-C or SIGTERM
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
