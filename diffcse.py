"""DiffCSE: difference-based contrastive learning of sentence embeddings.

    python diffcse.py --config demo                 # two minutes on a laptop, no download
    python diffcse.py --config bert_sts             # the paper's model; needs a GPU
    python diffcse.py --resume runs/demo-1          # continue an interrupted run

One training step, in the order of this file:

    x          token ids; each sentence is in the batch twice, as two "views"             (R, T)
    h          projector(encoder(x) at [CLS]); dropout makes the two views differ         (R, D)
    x_masked   x': x with masked tokens, by default BERT's mixture of 80-10-10            (R, T)
    x_edited   x'': the frozen generator's prediction for x' at every position            (R, T)
    replaced   the discriminator's labels: where x'' differs from x                       (R, T)
    loss       contrastive(h) + lam * replaced-token detection on x'', conditioned on h

Only the encoder is kept. A sentence embedding is its [CLS], before the projector (appendix A).

Paper: Chuang et al., NAACL 2022; code: github.com/voidism/DiffCSE. Several GPUs: use torchrun.
Not here: gradient accumulation (BatchNorm and in-batch negatives would see a part of a batch).

Shapes: B sentences, V views each (files with 2 columns: a pair; with 3: a hard negative too),
R = B * V rows (row V*i + v is view v of sentence i), T tokens including padding, D hidden size.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bert import Bert, BertForMaskedLM, load_bert
from data import Batch, Tokenizer, mask_tokens
from embed import DiffCSE, encode  # noqa: F401  (users import DiffCSE)
from engine import cli, demo, distributed, fast, hub
from engine.errors import UserError, run_main
from engine.checkpoint import Metrics
from engine.device import pick_device
from engine.pretrained import load_encoder, load_generator
from engine.run import Run
from engine.tokens import TokenizedSentences
from eval_sts import make_score

# ------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Config:
    """Settings of a run. Each field is a command-line flag, and its comment is the flag's help.

    Where the paper and its published code differ, the default follows the code, and "paper:" names
    our reading of the paper.
    """

    # Models and data
    model: str = "bert-base-uncased"  # start of encoder and discriminator: a folder or Hub name
    generator: str = "distilbert-base-uncased"  # frozen masked LM with the encoder's vocabulary
    train_file: str = "wiki1m_for_simcse.txt"  # .txt, or .csv/.tsv with 1 to 3 columns; .gz, .xz
    data: str = ""  # folder with STS/, SICK/ and the train file (default: download from the Hub)
    score: str = "stsb"  # selects the best model: stsb, dev (no test sets), captions, or FILE.tsv
    out_dir: str = ""  # folder of the run (default: runs/PRESET-1, runs/PRESET-2, ...)
    resume: str = ""  # folder of an interrupted run
    seed: int = 42  # of batches, masks, dropout and newly initialised layers
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # mixed precision; auto: if it is fast
    fast: bool = True  # use engine/fast.py where it helps; off: plain PyTorch
    compile: bool = False  # torch.compile the layers; needs a C++ compiler

    # Optimisation: AdamW without weight decay, linear decay to 0, no warm-up
    epochs: int = 2  # passes over the train file
    steps: int | None = None  # total number of steps (default: as many as `epochs` takes)
    batch_size: int = 64  # sentences per step
    max_length: int = 32  # tokens per sentence, including [CLS] and [SEP]
    lr: float = 7e-6  # peak learning rate of everything that is trained
    clip: float = 1.0  # maximum norm of the gradient
    dropout: float | None = None  # of encoder and discriminator (default: the model's own)

    # Contrastive loss
    contrastive: bool = True  # off: the difference loss alone (ablation)
    projector: Literal["batchnorm", "tanh"] = "batchnorm"  # tanh: as in SimCSE
    temperature: float = 0.05  # divides the cosines
    hard_negative_weight: float = 0.0  # (SimCSE) added to the logit of a sentence's own one

    # Difference prediction
    lam: float = 0.005  # weight of the difference loss; 0: SimCSE with this projector
    mask_ratio: float = 0.30  # probability of masking a token
    masking: Literal["80-10-10", "all"] = "80-10-10"  # BERT's mixture; paper: all
    edit: Literal["argmax", "sample"] = "argmax"  # which prediction is taken; paper: sample
    edit_temperature: float = 1.0  # of `--edit sample`
    edit_scope: Literal["all", "masked"] = "all"  # positions that are edited; paper: masked
    generator_dropout: bool = True  # the frozen generator in train mode; paper: off
    protect_sep: bool = False  # never edit [SEP]; paper: on
    views: Literal["both", "first"] = "both"  # views that are edited; paper: first
    pads_in_loss: bool = True  # padding counts as "not replaced"; paper: off
    reduction: Literal["mean", "sum"] = "mean"  # over tokens; paper: sum (lower lam to match)

    # Evaluation, logging, checkpoints
    pooling: str = "cls_before_pooler"  # the embedding that is scored; training uses [CLS]
    eval_every: int = 125  # steps between evaluations; the best model is kept
    log_every: int = 100  # steps between lines of log.jsonl
    save_minutes: float = 5.0  # minutes between checkpoints

    def __post_init__(self) -> None:
        positive = ("lr", "temperature", "edit_temperature", "clip")
        at_least_1 = ("epochs", "eval_every", "log_every")
        rules = [
            ("batch_size", self.batch_size >= 2, "at least 2: one sentence has no negatives"),
            ("max_length", self.max_length >= 3, "at least 3: [CLS], one token, [SEP]"),
            ("mask_ratio", 0 <= self.mask_ratio <= 1, "between 0 and 1"),
            ("dropout", self.dropout is None or 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("lam", 0 <= self.lam < np.inf, "0 or larger"),
            ("hard_negative_weight", np.isfinite(self.hard_negative_weight), "finite"),
            ("contrastive", self.contrastive or self.lam > 0, "on if lam is 0"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1"),
            ("save_minutes", self.save_minutes >= 0, "0 or larger"),
            *((name, 0 < getattr(self, name) < np.inf, "positive, finite") for name in positive),
            *((name, getattr(self, name) >= 1, "at least 1") for name in at_least_1),
        ]
        cli.check(self, rules)


ROBERTA = dict(model="roberta-base", generator="distilroberta-base")
SIMCSE = dict(lam=0.0, projector="tanh", epochs=1)
SMALL = dict(model="assets/small-bert", generator="assets/small-bert", lr=1e-4, lam=0.05)
DEMO_DATA = dict(train_file="assets/wikipedia_20k.txt.xz", score="captions")

PRESETS = {
    # Paper Tables 12 and 13. bert_sts: 31,250 steps, STS-B dev 84.56, seven STS sets 78.49.
    "bert_sts": Config(),
    "bert_transfer": Config(lr=2e-6, mask_ratio=0.15, lam=0.05),
    "roberta_sts": Config(**ROBERTA, lr=1e-5, mask_ratio=0.20),
    "roberta_transfer": Config(**ROBERTA, lr=3e-6, mask_ratio=0.15, lam=0.05, batch_size=128),
    # The baseline of Gao et al. (2021), who report 76.25 and 76.57 on the seven STS sets.
    "simcse_bert": Config(**SIMCSE, lr=3e-5),
    "simcse_roberta": Config(**SIMCSE, **ROBERTA, lr=1e-5, batch_size=512),
    # The 3.4M-parameter BERT of this repository; the demo's sentences and pairs are in assets/.
    "small": Config(**SMALL, steps=100, eval_every=20, log_every=20),
    "demo": Config(**SMALL, **DEMO_DATA, steps=60, eval_every=10, log_every=10),
}

# ------------------------------------------------------------------------------------------------
# 1. Contrastive learning (paper section 3, equation 1)


def make_projector(kind: str, D: int, std: float) -> nn.Module:
    """The MLP from [CLS] to h, used during training only. Shapes: (R, D) -> (R, D)."""
    if kind == "tanh":
        projector = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    else:  # the paper's: BatchNorm over all rows of the batch, both views together
        projector = nn.Sequential(
            nn.Linear(D, 2 * D, bias=False),
            nn.BatchNorm1d(2 * D),
            nn.ReLU(),
            nn.Linear(2 * D, D, bias=False),
            nn.BatchNorm1d(D, affine=False),
        )
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)  # the published code ignores BERT's pooler
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return projector


def contrastive_loss(
    h: Tensor, temperature: float, hard_negative_weight: float = 0.0
) -> tuple[Tensor, Metrics]:
    """InfoNCE with in-batch negatives: find a sentence's second view among all second views.

    Shapes: h (B, V, D) -> (). With V = 3, all third views are additional (hard) negatives.
    Metrics are (sum, count) pairs: the log divides the sums over steps by the counts.
    """
    B, V, _ = h.shape
    with torch.autocast(h.device.type, enabled=False):  # bf16 is too coarse for cosine / 0.05
        z = F.normalize(at_least_fp32(h), dim=-1, eps=1e-8)  # (B, V, D)
        cosines = z[:, 0] @ z[:, 1].T  # (B, B)
        logits = cosines / temperature
        if V == 3:
            hard = z[:, 0] @ z[:, 2].T / temperature  # (B, B)
            hard = hard + hard_negative_weight * torch.eye(B, device=h.device)
            logits = torch.cat([logits, hard], dim=1)  # (B, 2B)
        loss = F.cross_entropy(logits, torch.arange(B, device=h.device))
    cosines = cosines.detach()
    positive = cosines.trace()
    return loss, {
        "contrastive": (loss.detach(), 1),
        "positive_cosine": (positive, B),
        "negative_cosine": (cosines.sum() - positive, max(B * B - B, 1)),  # B = 1: a last batch
    }


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------
# 2. Editing: x -> x' (data.mask_tokens) -> x''


@torch.no_grad()
def edit_sentences(
    generator: BertForMaskedLM, batch: Batch, tokenizer: Tokenizer, cfg: Config
) -> tuple[Tensor, Tensor]:
    """x'' = G(x'), and which of its tokens differ from x.

    Shapes: -> x_edited (R, T) ids, replaced (R, T) bool. Position 0 and padding are never replaced;
    neither is a masked token that the generator restores.
    """
    editable = (batch.mask if cfg.edit_scope == "all" else batch.selected).clone()  # (R, T)
    editable[:, 0] = False  # [CLS]: the discriminator reads h there
    if cfg.protect_sep:
        editable &= batch.x != tokenizer.sep_id
    temperature = cfg.edit_temperature if cfg.edit == "sample" else None  # None: argmax
    predicted = generator.predict_tokens(batch.x_masked, batch.mask, editable, temperature)
    x_edited = torch.where(editable, predicted, batch.x)  # elsewhere x, not x'
    x_edited = x_edited * batch.mask  # padding becomes id 0 (RoBERTa: <s>), as published
    return x_edited, (x_edited != batch.x) & batch.mask


# ------------------------------------------------------------------------------------------------
# 3. Difference prediction: replaced-token detection conditioned on h (paper section 3, L_RTD)


def replaced_token_loss(
    logits: Tensor, replaced: Tensor, mask: Tensor, pads_in_loss: bool, reduction: str
) -> tuple[Tensor, Metrics]:
    """Cross-entropy of "original" (class 0) against "replaced" (class 1) at every position.

    Position 0 counts, as "original", and by default so does padding (official issue 25).
    Shapes: logits (R, T, 2); replaced, mask (R, T) bool -> ().
    """
    labels = replaced.long()  # class 1: replaced
    if not pads_in_loss:
        labels = labels.masked_fill(~mask, -100)  # ignored by cross_entropy
    logits = at_least_fp32(logits)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = distributed.reduce_loss(loss, (labels != -100).sum() if reduction == "mean" else None)
    predicted = logits.argmax(-1).bool()
    original = mask & ~replaced
    return loss, {
        "difference": (loss.detach(), 1),
        "share_replaced": (replaced.sum(), mask.sum()),
        "accuracy_replaced": ((predicted & replaced).sum(), replaced.sum()),
        "accuracy_original": ((~predicted & original).sum(), original.sum()),
    }


# ------------------------------------------------------------------------------------------------
# 4. The model


class DiffCSEModel(nn.Module):
    """Everything a training step needs. Only `encoder` is kept afterwards.

    With lam = 0 there is no generator and no discriminator: SimCSE. lab/ablations.py subclasses
    this and overrides `from_pretrained`, `load_sentences` and `difference_loss`.
    """

    def __init__(
        self,
        cfg: Config,
        tokenizer: Tokenizer,
        encoder: Bert,
        generator: BertForMaskedLM | None = None,
        discriminator: Bert | None = None,
    ):
        super().__init__()
        D = encoder.cfg.hidden_size
        self.cfg, self.tokenizer = cfg, tokenizer
        self.encoder = encoder
        self.projector = make_projector(cfg.projector, D, encoder.cfg.initializer_range)
        self.generator, self.discriminator = generator, discriminator
        if generator is not None:
            generator.requires_grad_(False)
        if discriminator is not None:
            self.head = nn.Linear(D, 2)  # PyTorch's initialisation, one layer (ELECTRA has two)

    @classmethod
    def from_pretrained(cls, cfg: Config) -> "DiffCSEModel":
        """Encoder and discriminator start from the same weights and share none."""
        tokenizer, encoder = load_encoder(cfg)
        if cfg.lam == 0:
            return cls(cfg, tokenizer, encoder)
        discriminator = load_bert(hub.find_model(cfg.model), dropout=cfg.dropout)
        return cls(cfg, tokenizer, encoder, load_generator(cfg, tokenizer), discriminator)

    def train(self, mode: bool = True) -> "DiffCSEModel":
        super().train(mode)
        if self.generator is not None and not self.cfg.generator_dropout:
            self.generator.eval()  # by default its dropout is on, as in the published code
        return self

    def load_sentences(self) -> TokenizedSentences:
        cfg = self.cfg
        path = hub.find_text(cfg.train_file, cfg.data)
        sentences = TokenizedSentences(path, self.tokenizer, cfg.max_length)
        if cfg.hard_negative_weight and sentences.columns < 3:
            raise UserError(f"--hard-negative-weight needs 3 columns, but {path} has fewer")
        return sentences

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        cfg = self.cfg
        # Dropout draws a new mask for every row, so the two equal rows of a sentence get two h.
        cls = self.encoder(batch.x, batch.mask, cls_only=True)[:, 0]  # (R, D)
        # With several processes, projector and contrastive loss see the rows of all of them.
        h = self.projector(distributed.all_gather(cls))  # (R * processes, D)
        views = h.unflatten(0, (-1, batch.views))  # (B * processes, V, D)
        loss, metrics = contrastive_loss(views, cfg.temperature, cfg.hard_negative_weight)
        if cfg.lam > 0:
            difference, more = self.difference_loss(distributed.own_rows(h), batch)
            loss = cfg.lam * difference + (loss if cfg.contrastive else 0.0)
            metrics |= more
        return loss, metrics | {"loss": (loss.detach(), 1)}

    def difference_loss(self, h: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """The discriminator labels each token of x'' as original or replaced, given h.

        h is not detached: its gradient teaches the encoder to represent what the edit changed.
        """
        cfg = self.cfg
        if cfg.views == "first":
            h, batch = h[:: batch.views], batch.first_views()  # a row per sentence
        x_edited, replaced = edit_sentences(self.generator, batch, self.tokenizer, cfg)
        states = self.discriminator(x_edited, batch.mask, cls_vector=h)  # h in place of [CLS]
        logits, mask = self.head(states), batch.mask  # (R, T, 2), (R, T)
        # A GPU's batches are wider than their longest row (train); the loss ends where that does.
        logits, replaced, mask = (t[:, : batch.width] for t in (logits, replaced, mask))
        return replaced_token_loss(logits, replaced, mask, cfg.pads_in_loss, cfg.reduction)

    @torch.no_grad()
    def h_gap(self, batch: Batch) -> float | None:
        """How much the difference loss rises if each sentence's edit is judged by another's h.

        0: the discriminator does not use what h says of its sentence. Without dropout; seeds
        torch's generator, so that both losses are of the same edits. None: lam is 0.
        Not in the paper.
        """
        if self.discriminator is None:
            return None
        training, losses = self.training, []
        projector = deepcopy(self.eval().projector).train()  # this batch's statistics, as in a step
        cls = self.encoder(batch.x, batch.mask, cls_only=True)[:, 0]
        h = projector(distributed.all_gather(cls))
        for given in (h, h.roll(batch.views, 0)):
            torch.manual_seed(self.cfg.seed)  # of `--edit sample`
            losses.append(self.difference_loss(distributed.own_rows(given), batch)[0])
        self.train(training)
        return distributed.mean(losses[1] - losses[0]).item()


# ------------------------------------------------------------------------------------------------
# 5. Training


def train_step(
    model: DiffCSEModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    amp: torch.dtype | None,
    batch: Batch,
) -> Metrics:
    """One update. Without mixed precision, autocast and scaler do nothing."""
    optimizer.zero_grad(set_to_none=True)  # first, so that the forward pass can use the memory
    with torch.autocast(batch.x.device.type, dtype=amp, enabled=amp is not None):
        loss, metrics = model(batch)
    scaler.scale(loss).backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    distributed.average_gradients(parameters)  # before unscale_, so all processes see an overflow
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(parameters, model.cfg.clip)
    scaler.step(optimizer)  # fp16: skipped if a gradient overflowed
    scaler.update()
    return metrics | {"grad_norm": (grad_norm, 1)}


def draw_batch(
    sentences: TokenizedSentences, tokenizer: Tokenizer, cfg: Config, step: int
) -> Batch:
    """Batch number `step`. It depends on (seed, step) only, so resuming needs no random state."""
    epoch, i = divmod(step, sentences.batches_per_epoch(cfg.batch_size))
    order = sentences.shuffled(cfg.seed, epoch)
    indices = order[i * cfg.batch_size : (i + 1) * cfg.batch_size]  # (B,)
    x, mask = sentences.rows(indices)  # (R, T): each sentence V times, in adjacent rows
    rng = torch.Generator().manual_seed(derive_seed(cfg.seed, step, 0))
    x_masked, selected = mask_tokens(x, tokenizer, cfg.mask_ratio, cfg.masking, rng)  # each row's
    return Batch(x, mask, x_masked, selected, sentences.views)


def derive_seed(*numbers: int) -> int:
    """An independent random stream for each tuple; (seed, step, 0) is masks, 1 + rank dropout."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def make_optimizer(model: DiffCSEModel) -> torch.optim.AdamW:
    """AdamW for all but the generator, at one rate, without decay (official run_diffcse.sh)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = parameters[0].device.type in ("cpu", "cuda")
    lr, betas, eps = model.cfg.lr, (0.9, 0.999), 1e-8
    return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay=0.0, fused=fused)


def train(cfg: Config, name: str = "run", model_class: type[DiffCSEModel] = DiffCSEModel) -> dict:
    """A whole run. Returns the content of results.json; the main process's is complete."""
    device, amp = pick_device(cfg.device, cfg.amp)
    with distributed.process_group(device), Run(cfg, name, device, amp) as run:
        torch.manual_seed(cfg.seed)  # projector and head; batches and dropout are seeded by step
        with distributed.main_process_first():  # it downloads and tokenises
            model = model_class.from_pretrained(cfg).to(device).train()
            sentences = model.load_sentences()
            score = make_score(cfg.score, cfg.data)
        encoder, tokenizer = model.encoder, model.tokenizer
        total = cfg.steps or cfg.epochs * sentences.batches_per_epoch(cfg.batch_size)
        optimizer = make_optimizer(model)
        scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        step_fn = partial(train_step, model, optimizer, scaler, amp)
        step_fn = fast.accelerate(step_fn, model, cfg.fast, cfg.compile)
        options = {"pooling": cfg.pooling, "batch_size": 128, "fast": cfg.fast}  # short sentences
        embed = partial(encode, encoder, tokenizer, **options)
        embed_amp = partial(embed, amp=amp)  # encode() switches to eval mode, and back

        run.begin(model, optimizer, scaler, sentences, score, total)  # --resume: sets run.step
        # After the last one, so not trained on in a run below an epoch, whose last batch is short
        extra = total + ((total + 1) % sentences.batches_per_epoch(cfg.batch_size) == 0)
        gap_batch = draw_batch(sentences, tokenizer, cfg, extra).shard().to(device)
        if run.step == 0 and distributed.is_main():
            run.scores["before"] = score.test(embed)
            run.scores["first_last"] = score.test(partial(embed, pooling="avg_first_last"))
            run.log_scores(score.dev(embed_amp), score.name)

        for step in range(run.step, total):
            batch = draw_batch(sentences, tokenizer, cfg, step).shard().to(device)
            if device.type == "cuda":
                batch = batch.pad(cfg.max_length, tokenizer.pad_id)  # one static shape
            torch.manual_seed(derive_seed(cfg.seed, step, 1 + distributed.rank()))  # dropout
            lr = cfg.lr * (1 - step / total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            run.add(step_fn(batch))  # run.step is step + 1 from here on

            if run.log_due():
                run.log_metrics(lr)  # raises UserError if a loss is NaN or infinite
            if run.eval_due():
                h_gap = model.h_gap(gap_batch)  # of all processes
                if distributed.is_main():
                    scores = score.dev(embed_amp)
                    run.log_scores(scores, score.name, h_gap)
                    if run.is_best(scores):
                        run.save_best(scores)
            run.save_or_stop()  # on Ctrl-C or SIGTERM

        if not distributed.is_main():
            return {"config": run.name}
        encoder.load_state_dict(load_bert(run.folder / "best").state_dict())
        return run.finish(score.test(embed), score.table)  # writes results.json


def main(config_class: type = Config, model_class: type[DiffCSEModel] = DiffCSEModel) -> None:
    name, cfg = cli.parse(config_class, PRESETS)
    results = train(cfg, name, model_class)
    if results["config"] == "demo":
        simcse = replace(cfg, lam=0.0, resume="", out_dir=f"{results.get('folder')}-simcse")
        demo.show(cfg, results, train(simcse, "demo-simcse", model_class))


if __name__ == "__main__":
    run_main(main)
