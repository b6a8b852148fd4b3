"""DiffCSE: difference-based contrastive learning for sentence embeddings, without labels.

    python diffcse.py --config demo         # a few minutes on a laptop, nothing downloaded
    python diffcse.py --config bert_sts     # the paper's model (wants a GPU)
    python diffcse.py --resume runs/demo-1  # go on with a run that was stopped, to the same end
    python diffcse.py --config demo --explain "The cat sat on the mat ."     # one step, with all its numbers
    python diffcse.py -h                    # every field of Config is a flag

One training step, in the order of this file:
    x          a sentence, twice in a batch                           ids (B*V, T)
    h          = projector(encoder f(x) at [CLS]); two dropouts, two h's, which the contrastive loss pulls together
    x_masked   x', some tokens of x behind [MASK]
    x_edited   x'', what the generator G puts in their place; G is fixed
    replaced   x'' != x: what the discriminator D must say of every token of x''. It sees x only through h,
               which stands where x'' had its [CLS]: so h must hold all of x that tells it from x''.
    loss       = contrastive + lam * replaced-token loss               (paper section 3)
Afterwards only f is kept, and a sentence's vector is f's [CLS] before the projector.

Letters: B sentences, V views of each, R = B*V rows, T tokens with padding, D hidden size, lam the paper's lambda.
Reference: Chuang et al., NAACL 2022. SPEC sections in brackets describe the published code: where it differs from
the paper the default is the code, and one switch of Config gives the paper's reading.
Not here: gradient accumulation (in-batch negatives do not accumulate). Several GPUs: ranks.py.
"""

import errno
import importlib
import json
import math
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fast
import ranks
from bert import Bert, BertForMaskedLM, Layer, UserError, load_bert, places, write_atomically
from config import Config, parse_args
from data import (TokenizedSentences, Tokenizer, find_model, find_senteval, find_text, local_folder, mask_tokens,
                  read_running_text, read_with_next, run_main, shuffled)  # fmt: skip
from embed import (MAX_LENGTH, RUN_CONFIG, DiffCSE, Opened, check_pooling, encode,  # noqa: F401  (`from diffcse import
                   model_card, save_model)  # fmt: skip  DiffCSE` is how the tool is reached)
from eval_sts import TEST_SETS, average, format_table, load_set, read_pairs, score_pairs
from run import STATE, Stop, load_state, locked, new_folder, restore, save_state, state_of

# ----------------------------------------------------------------------------------------------------------------
# 1. The contrastive loss: two dropouts of one sentence are a positive pair, the batch's other sentences negatives


def make_projector(kind: str, D: int, std: float) -> nn.Module:
    """From [CLS] to h, (R, D) -> (R, D) (paper appendix A, SPEC 4). Weights start at N(0, std), not at BERT's pooler."""
    if kind == "tanh":
        projector = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    else:  # BatchNorm over all rows of the step, both views together
        projector = nn.Sequential(
            nn.Linear(D, 2 * D, bias=False), nn.BatchNorm1d(2 * D), nn.ReLU(),
            nn.Linear(2 * D, D, bias=False), nn.BatchNorm1d(D, affine=False))  # fmt: skip
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return projector


def widen(t: Tensor) -> Tensor:
    """At least fp32: losses are computed there whatever autocast chose; the tests' fp64 stays."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def contrastive_loss(h: Tensor, temperature: float, hard_negative_weight: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """InfoNCE over the batch, in one direction (paper section 3, equation 1; SPEC 5).

    Shapes: h (B, V, D), V = 2 or 3 -> loss (), cosines (B, B) of first with second views, their diagonal (B,).
    With V = 3 the third views are hard negatives of every sentence. Equals sentence-transformers'
    MultipleNegativesRankingLoss with scale 1 / temperature. Starts near log B where the views tell nothing.
    """
    with torch.autocast(h.device.type, enabled=False):  # cosines / 0.05 in 8 bits of mantissa would be noise
        z = F.normalize(widen(h), dim=-1, eps=1e-8)  # (B, V, D)
        cosines = z[:, 0] @ z[:, 1].T  # (B, B)
        logits = cosines / temperature
        if h.shape[1] == 3:
            own = torch.eye(len(h), device=h.device)  # (B, B)
            logits = torch.cat([logits, z[:, 0] @ z[:, 2].T / temperature + hard_negative_weight * own], dim=1)  # (B, 2B)
        loss = F.cross_entropy(logits, torch.arange(len(h), device=h.device))
    return loss, cosines.detach(), cosines.detach().diagonal()


# ----------------------------------------------------------------------------------------------------------------
# 2. The edit: mask (data.mask_tokens), then let the generator fill in


class Room(NamedTuple):
    """How many places a step computes, padded to few numbers on a GPU, where each costs a graph. None: as many as there are."""

    tokens: int | None = None  # of the batch that the encoder reads
    edited: int | None = None  # of its rows that are edited
    asked: int | None = None  # of the generator
    sentences: int | None = None  # of all ranks together


@torch.no_grad()
def edit_sentences(generator: BertForMaskedLM, x: Tensor, x_masked: Tensor, selected: Tensor, mask: Tensor,
                   tokenizer: Tokenizer, cfg: Config, room: Room | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x'' = G(x') and which of its tokens are not those of x (paper section 3; SPEC 2).

    Shapes: x, x_masked (R, T) ids; selected, mask (R, T) bool -> x_edited (R, T) ids, replaced (R, T) bool.
    Position 0 and padding are never replaced. A masked token that G restores is not replaced either.
    """
    asked, room = asked_of(cfg, x, mask, selected, tokenizer), room or Room()
    where = places(asked, room.asked)  # (n,): G's last layer and its product with the vocabulary are made nowhere else
    temperature = cfg.edit_temperature if cfg.edit == "sample" else None
    words = generator.fill(x_masked, mask, places(mask, room.edited), where, tokenizer.vocab_size, temperature)  # (n,)
    filled = x.flatten().index_copy(0, where, words).view_as(x)  # (R, T)
    x_edited = torch.where(asked, filled, x)
    x_edited = x_edited * mask  # padding becomes id 0, as published; for RoBERTa that is <s>, which attention never sees
    return x_edited, (x_edited != x) & mask


def edited_rows(cfg: Config, V: int) -> slice:
    return slice(None) if cfg.views == "both" else slice(None, None, V)


def asked_of(cfg: Config, x: Tensor, mask: Tensor, selected: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Where the generator's token is taken: not for [CLS], nor for padding. Shapes: x (R, T) ids; mask, selected (R, T) bool -> (R, T) bool."""
    asked = mask.clone() if cfg.edit_scope == "all" else selected.clone()
    asked[:, 0] = False
    return asked & (x != tokenizer.sep) if cfg.protect_sep else asked


def padded_room(cfg: Config, tokenizer: Tokenizer, batch: tuple[Tensor, ...], V: int, sentences: int, multiple: int = 512) -> Room:
    """The room of a batch that is still on the CPU. Shapes: batch: x, mask, x_masked, selected, each (R, T)."""
    if cfg.ablated():
        return Room(sentences=sentences)
    x, mask, _, selected = batch
    edited = edited_rows(cfg, V)
    asked = asked_of(cfg, x[edited], mask[edited], selected[edited], tokenizer)
    return Room(*(min(-(-int(where.sum()) // multiple) * multiple, where.numel()) for where in (mask, mask[edited], asked)), sentences)


# ----------------------------------------------------------------------------------------------------------------
# 3. The difference prediction: which tokens of x'' are not those of x?


Prediction = tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]  # a loss (), and shares for the log, each as numerator () and denominator ()


def replaced_token_loss(logits: Tensor, replaced: Tensor, mask: Tensor, pads_in_loss: bool = True,
                        reduction: str = "mean") -> Tensor:  # fmt: skip
    """Cross-entropy of "kept" (class 0) against "replaced" (1) at every position (paper section 3, L_RTD; SPEC 3).

    Shapes: logits (..., 2); replaced, mask (...) bool -> (). With pads_in_loss, as published, padding counts as
    kept, and the same sentences padded wider have another loss (official issue 25).
    """
    labels = replaced.long() if pads_in_loss else replaced.long().masked_fill(~mask, -100)  # -100: left out
    loss = F.cross_entropy(widen(logits).view(-1, 2), labels.flatten(), reduction="sum")
    return loss / ranks.total((labels != -100).sum()) if reduction == "mean" else loss  # the mean over all ranks' positions


def discriminate(model: "TrainingModel", head: nn.Module, h: Tensor, x_edited: Tensor, replaced: Tensor, mask: Tensor, room: Room) -> Prediction:
    """D reads x'' with h in place of its [CLS], and says of every token whether it was replaced (paper section 3).

    Shapes: h (R, D); x_edited (R, T) ids; replaced, mask (R, T) bool.
    """
    cfg = model.cfg
    tokens = None if cfg.pads_in_loss else places(mask, room.edited)  # (N,): what the loss is over
    # h is not detached: through it the discriminator's gradient teaches the encoder. That is the method.
    logits = head(model.discriminator(x_edited, mask, cls_vector=h, tokens=tokens)).view(-1, 2)  # (N, 2)
    if tokens is not None:
        replaced, mask = replaced.flatten()[tokens], mask.flatten()[tokens]
    loss = replaced_token_loss(logits, replaced, mask, cfg.pads_in_loss, cfg.reduction)
    said, replaced, mask = logits.argmax(-1).bool(), replaced.flatten(), mask.flatten()  # (N,)
    kept = mask & ~replaced
    return loss, {"share_replaced": (replaced.sum(), mask.sum()), "accuracy_replaced": ((said & replaced).sum(), replaced.sum()),
                  "accuracy_kept": ((~said & kept).sum(), kept.sum())}  # fmt: skip


def difference_prediction(model: "TrainingModel", h: Tensor, batch: tuple[Tensor, ...], V: int, room: Room) -> Prediction:
    """The paper's objective beside the contrastive one: which tokens of x'' = G(x') are not those of x? The ablations have this signature too.

    Shapes: h (R, D); batch: x, mask, x_masked, selected, each (R, T), rows sentence-major.
    """
    edited = edited_rows(model.cfg, V)
    h, x, mask, x_masked, selected = (t[edited] for t in (h, *batch))
    x_edited, replaced = edit_sentences(model.generator, x, x_masked, selected, mask, model.tokenizer, model.cfg, room)
    return discriminate(model, model.head, h, x_edited, replaced, mask, room)


def lab(name: str):
    """A module of lab/, which is imported only where it is asked for. Raises: UserError where this file was installed without it."""
    try:
        return importlib.import_module(f"lab.{name}")
    except ModuleNotFoundError:
        raise UserError(f"lab/{name}.py is beside diffcse.py in the repository; an installed package has it not") from None


# ----------------------------------------------------------------------------------------------------------------
# 4. All of it

OF = "/"  # "share/" is what "share" is a share of, both summed over steps before they are divided


class TrainingModel(nn.Module):
    """Encoder f, projector, generator G, discriminator D and its head: what a step needs. Only f is kept.

    G is frozen but, as published, in train mode, so that its dropout varies the edits. lam = 0 has no G and no D.
    """

    def __init__(self, cfg: Config, encoder: Bert, tokenizer: Tokenizer, generator: BertForMaskedLM | None = None,
                 discriminator: Bert | None = None, make_head: Callable[[int], nn.Module] | None = None):  # fmt: skip
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.predict = lab("ablations").pick(cfg) if cfg.ablated() else difference_prediction
        self.texts = 1 if cfg.condition_on == "same" else 2  # rows of a view: its sentence, then perhaps the next one
        D = encoder.cfg.hidden_size
        self.encoder = encoder
        self.projector = make_projector(cfg.projector, D, encoder.cfg.initializer_range)
        self.generator, self.discriminator = generator, discriminator
        if discriminator is not None:
            self.head = make_head(D) if make_head else nn.Linear(D, 2)  # bare, with PyTorch's own start, unlike ELECTRA's (SPEC 3)
        if generator is not None:
            generator.requires_grad_(False)
        for bert in (encoder, discriminator):
            if bert is not None and cfg.dropout is not None:
                bert.set_dropout(cfg.dropout)

    def train(self, mode: bool = True) -> "TrainingModel":
        super().train(mode)
        if self.generator is not None and not self.cfg.generator_dropout:
            self.generator.eval()
        return self

    def encode(self, x: Tensor, mask: Tensor, rows: slice, n: int, tokens: int | None = None) -> Tensor:
        """f at [CLS], the embedding that is used afterwards, of these rows and those of the other ranks. Shapes: x, mask (R, T) -> (n, D)."""
        firsts = torch.arange(len(x), device=x.device) * x.shape[1]  # (R,): where [CLS] stands
        return ranks.gather(self.encoder(x, mask, tokens=places(mask, tokens), wanted=firsts), rows, n)

    def forward(self, x: Tensor, mask: Tensor, x_masked: Tensor, selected: Tensor, V: int = 2, room: Room | None = None,
                ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The loss of one batch, and sums for the log.

        Shapes: x, x_masked (R, T) ids, mask, selected (R, T) bool, rows sentence-major -> (), dict of ().
        """
        cfg, room = self.cfg, room or Room()
        B = room.sentences or len(x) // V
        V //= self.texts
        rows = ranks.part(B, V)  # this rank's
        h = self.projector(self.encode(x[:: self.texts], mask[:: self.texts], rows, B * V, room.tokens))  # (R, D); f reads the sentences alone
        contrastive, cosines, positive = contrastive_loss(h.view(B, V, -1), cfg.temperature, cfg.hard_negative_weight)
        loss = cfg.contrastive * contrastive / ranks.world()  # all ranks compute it, and their gradients are added
        sums = {"loss": cfg.contrastive * contrastive.detach(), "contrastive": contrastive.detach(), "positive_cosine": positive.mean(),
                "negative_cosine": (cosines.sum() - positive.sum()) / max(B * B - B, 1)}  # fmt: skip
        if cfg.lam > 0:
            prediction, shares = self.predict(self, h[rows], (x, mask, x_masked, selected), V, room)
            loss = loss + cfg.lam * prediction
            counts = [prediction.detach(), *(count.to(prediction.dtype) for share in shares.values() for count in share)]
            prediction, *counts = ranks.total(torch.stack(counts)).unbind()
            names = [name for share in shares for name in (share, share + OF)]
            sums |= {"prediction": prediction, **dict(zip(names, counts)), "loss": sums["loss"] + cfg.lam * prediction}
        return loss, sums


def train_step(model: TrainingModel, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, batch: tuple[Tensor, ...],
               room: Room | None, V: int, amp: torch.dtype | None) -> dict[str, Tensor]:  # fmt: skip
    """One update, by the optimizer's rate. The same lines on every device: without amp, autocast and scaler do nothing (SPEC 6).

    Nothing here waits for the GPU. Returns the model's sums and the gradient's norm before clipping, still there.
    """
    with torch.autocast(batch[0].device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
        loss, sums = model(*batch, V, room)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    ranks.add_up(grads)
    scale = scaler.scale(torch.ones((), device=loss.device))
    sums["grad_norm"] = nn.utils.get_total_norm(grads) / scale  # of the gradient itself
    too_long = ((sums["grad_norm"] + 1e-6) / model.cfg.clip).clamp_min(1)
    if optimizer.defaults["fused"]:  # it divides by this, and by the scaler's factor, as it reads the gradients
        optimizer.grad_scale = too_long.float()
    else:
        torch._foreach_div_(grads, too_long)
    scaler.step(optimizer)  # fp16: skipped where a gradient overflowed
    scaler.update()
    return sums


def stepper(model: TrainingModel, V: int, amp: torch.dtype | None, compiled: bool = False,
            ) -> tuple[torch.optim.AdamW, torch.amp.GradScaler, Callable[..., dict[str, Tensor]]]:  # fmt: skip
    """The optimizer [6], the scaler of fp16, and train_step as step(batch, room), on a GPU as a CUDA graph if it is compiled."""
    device = model.encoder.device
    captured = compiled and device.type == "cuda" and ranks.world() == 1 and not model.cfg.ablated()  # whose shapes depend on draws
    lr = model.cfg.lr
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                                  lr=torch.tensor(lr, device=device) if captured else lr, capturable=captured, fused=device.type in ("cpu", "cuda"))  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    step = partial(train_step, model, optimizer, scaler, V=V, amp=amp)
    if captured:
        warnings.filterwarnings("ignore", ".*capturable=True")  # the first step of a shape is not captured, on purpose
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.specialize_float = True  # rates of dropout, which differ between models
        for module in model.modules():
            if isinstance(module, Layer):  # all are the same code: compiled once for each way in which it is called, and not once for each layer
                module.compile()
    return optimizer, scaler, fast.Captured(step) if captured else step


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # which a CUDA graph reads
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


# ----------------------------------------------------------------------------------------------------------------
# 5. The run: build, score, train, keep the best


def build(cfg: Config) -> tuple[TrainingModel, Tokenizer]:
    """The model with pretrained weights, checked to fit together. Raises: UserError that names what does not."""
    folder = find_model(cfg.model)
    encoder = load_bert(folder)
    tokenizer = Tokenizer(folder).check_fits(folder, encoder.cfg.vocab_size)
    check_pooling(encoder, cfg.pooling)
    if cfg.longest() > encoder.max_length:
        raise UserError(f"--max-length is {cfg.max_length}" + f", and --edit-with {cfg.edit_with} makes that {cfg.longest()}" * (cfg.longest() > cfg.max_length)
                        + f": {cfg.model} has position embeddings for {encoder.max_length} tokens")  # fmt: skip
    if cfg.lam == 0:
        return TrainingModel(cfg, encoder, tokenizer), tokenizer
    generator = load_generator(cfg, folder, tokenizer) if cfg.generates() else None
    if not cfg.ablated():
        return TrainingModel(cfg, encoder, tokenizer, generator, discriminator=load_bert(folder)), tokenizer
    return TrainingModel(cfg, encoder, tokenizer, generator, *lab("ablations").discriminator(cfg, folder)), tokenizer


def load_generator(cfg: Config, folder: Path, tokenizer: Tokenizer) -> BertForMaskedLM:
    """The generator for the encoder in that folder. Raises: UserError where they do not fit together."""
    generator_folder = find_model(cfg.generator)
    generator = load_bert(generator_folder, mlm=True)
    if generator_folder != folder and Tokenizer(generator_folder).vocabulary() != tokenizer.vocabulary():
        raise UserError(f"--generator {cfg.generator} has another vocabulary than --model {cfg.model}: ids are compared, so "
                        "take distilbert-base-uncased with bert-base-uncased, distilroberta-base with roberta-base")  # fmt: skip
    if generator.cfg.vocab_size < tokenizer.vocab_size or cfg.longest() > generator.bert.max_length:
        raise UserError(f"--generator {cfg.generator} has {generator.cfg.vocab_size} words and {generator.bert.max_length} "
                        f"positions: too few for a tokenizer of {tokenizer.vocab_size} and {cfg.longest()} tokens of a sentence (--max-length)")  # fmt: skip
    return generator


class StsScore:
    """STS-B dev chooses the checkpoint, or pairs of your own; the seven test sets are for before and after, and not for a search (--score dev)."""

    def __init__(self, cfg: Config):
        if cfg.score in ("stsb", "dev"):
            folder, self.name = find_senteval(cfg.data), "STS-B dev, Spearman x 100"
            self.dev_sets = {name: load_set(name, folder) for name in ("STSB-dev", "SICKR-dev")}  # the first chooses
            self.test_sets = {name: load_set(name, folder) for name in TEST_SETS if cfg.score == "stsb"}
        else:
            path = find_text(cfg.score, cfg.data)
            self.name, self.dev_sets, self.test_sets = f"{path.name}, Spearman x 100", {path.name: read_pairs(path)}, {}

    def dev(self, encoder) -> dict[str, float]:
        name = next(iter(self.dev_sets))  # nothing but what chooses is encoded
        scores = score_pairs(encoder, {name: self.dev_sets[name]})
        return {"score": scores[name], **scores}

    def test(self, encoder) -> dict[str, float]:
        scores = score_pairs(encoder, self.dev_sets | self.test_sets)
        return {**scores, "average": average(scores)} if self.test_sets else scores

    def report(self, rows: dict[str, dict[str, float]]) -> str:
        return format_table(rows) if self.test_sets else ""


def pick_device(cfg: Config) -> tuple[torch.device, torch.dtype | None]:
    """The device and the type of mixed precision (None: fp32). Raises: UserError where it is not there."""
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = next(n for n in ("cuda", "mps", "cpu") if here[n]) if cfg.device == "auto" else cfg.device
    if not here[name]:
        raise UserError(f"--device {name}: this PyTorch finds none; there is {', '.join(n for n in here if here[n])}")
    if (name, cfg.amp) in (("cpu", "fp16"), ("mps", "fp16"), ("mps", "bf16")):
        raise UserError(f"--amp {cfg.amp} is not for {name}; leave it at auto or off" + ", or take bf16" * (name == "cpu"))
    if cfg.compile and (why_not := fast.why_not_compiled(torch.device(name))):
        raise UserError(f"--compile: {why_not}; --no-compile does without")
    if cfg.amp == "off" or name != "cuda" and cfg.amp == "auto":
        return torch.device(name), None
    bf16 = cfg.amp == "bf16" or cfg.amp == "auto" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(name), torch.bfloat16 if bf16 else torch.float16


def about(facts: dict, cfg: Config, scores: dict[str, dict[str, float]], depends_on: dict) -> str:
    """What the best model's card says of its run: command, scores (a column for each of the dict), machine."""
    rows = ["| x 100 | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for key in scores["after"]:
        rows.append(f"| {key} | " + " | ".join(f"{column.get(key, math.nan):.2f}" for column in scores.values()) + " |")
    return (f"Trained by DiffCSE (Chuang et al., NAACL 2022) from `{cfg.model}`, config `{facts['name']}`, seed {cfg.seed}; this is step {facts['best_step']}. "
            f"`{RUN_CONFIG}` has every setting.\n\n    {facts['command']}\n\n" + "\n".join(rows)
            + "\n\nWith " + ", ".join(f"{key} {value}" for key, value in depends_on.items()) + ".")  # fmt: skip


def summarise(window: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """One line of the log: means over the steps since the last, and ratios of their counts. Waits for the GPU once."""
    names = list(window[-1])  # those of a resumed window stand in another order
    values = torch.stack([torch.stack([sums[name].float() for name in names]) for sums in window])  # (steps, names)
    row = dict(zip(names, values.cpu().double().mean(0).tolist()))
    for name in [name for name in row if name + OF in row]:
        of = row.pop(name + OF)
        row[name] = row[name] / of if of else math.nan
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN


def check_finite(window: list[dict[str, Tensor]], step: int, scaler: torch.amp.GradScaler, kept: str) -> None:
    """Raises: UserError that names the step and the loss where one of the steps since the last check is not a number. Waits for the GPU.

    step: that of the window's last. In fp16 an overflow is a step that the scaler skips; there a run is broken that skips them all.
    """
    advice = f"training stopped; {kept}. Try a lower --lr, or --amp off"
    if scaler.is_enabled():
        if scaler.get_scale() < 1:
            raise UserError(f"fp16 overflows at every step up to {step}, at any scale: {advice}")
        return
    what = {"contrastive": "the contrastive loss", "prediction": "the loss of the discriminator", "grad_norm": "the gradient"}
    names = [name for name in what if window and name in window[-1]]
    finite = torch.stack([torch.stack([sums[name].isfinite() for name in names]) for sums in window]).tolist() if window else []  # (steps, names)
    for i, row in enumerate(finite, step - len(window) + 1):
        if not all(row):
            raise UserError(f"{what[names[row.index(False)]]} is not a number at step {i}: {advice}")


def train(cfg: Config, name: str = "run") -> dict:
    """A whole run, from the pretrained model to results.json, or the rest of one (cfg.resume). Returns what results.json holds, on rank 0."""
    started = time.time()
    device, amp = pick_device(cfg)
    with ranks.joined(device), ExitStack() as stack:
        torch.manual_seed(cfg.seed)  # projector and head flow from it; batches, masks and dropout from (seed, epoch or step)
        with ranks.rank_0_first():
            model, tokenizer = build(cfg)
            if cfg.score == "docs" or cfg.train_file == "docs":
                import docs  # imports hundreds of modules to read what is written about them: only where asked for
            score = docs.DocsScore(cfg.data) if cfg.score == "docs" else StsScore(cfg)
            source = ((sentence,) for sentence in docs.training_sentences()) if cfg.train_file == "docs" else find_text(cfg.train_file, cfg.data)
            read = None if cfg.text == "sentences" else read_running_text if cfg.condition_on == "same" else read_with_next
            sentences = TokenizedSentences(source, tokenizer, cfg.max_length, read, 2 * model.texts if model.texts > 1 else None)
        if len(sentences) == 0:
            raise UserError(f"{cfg.train_file}: no sentences in it")
        if len(sentences) < 2:
            raise UserError(f"{cfg.train_file}: one sentence alone has no negatives to be told from; at least 2 are needed")
        if len(sentences) < cfg.batch_size and ranks.rank() == 0:
            print(f"note: {cfg.train_file} has {len(sentences)} sentences, fewer than --batch-size {cfg.batch_size}: "
                  "each step takes all of them", file=sys.stderr)  # fmt: skip
        model.to(device).train()
        out = None
        if ranks.rank() == 0:
            out = stack.enter_context(locked(Path(cfg.resume)) if cfg.resume else new_folder(cfg.out_dir, name))
        out = ranks.from_rank_0(out)
        try:
            results, rows = fit(cfg, name, out, model, score, sentences, amp, started)
        except OSError as error:  # of the log; other files say more themselves
            raise UserError(f"{out} cannot be written to any more: {error.strerror or error}. When it can: python diffcse.py --resume {out}") from None
    if not results:
        return results
    print("\n" + score.report(rows))
    if results["dev_best"] <= results["dev_before"]:
        print(f"training did not beat its start on {score.name}: {results['dev_before']:.2f} before, {results['dev_best']:.2f} at best")
    if cfg.score == "docs":
        print("\n" + docs.answer_questions(partial(encode, model.encoder, tokenizer, pooling=cfg.pooling)))
    print(f"\n{results['minutes']:.1f} minutes. The model of step {results['best_step']} is in {out / 'best'}, the numbers in {out}/results.json")
    return results


def fit(cfg: Config, name: str, out: Path, model: TrainingModel, score, sentences: TokenizedSentences, amp: torch.dtype | None,
        started: float) -> tuple[dict, dict[str, dict[str, float]]]:  # fmt: skip
    """The steps, in the run's folder `out`, from the first one or from where its state says. Returns results.json and its table's rows, on rank 0."""
    tokenizer, device, V, first = model.tokenizer, model.encoder.device, sentences.views, ranks.rank() == 0
    settings = json.dumps(asdict(replace(cfg, out_dir="", resume="")), indent=2) + "\n"
    tensors, facts = load_state(out) or ({}, {})
    if (out / "results.json").is_file():
        raise UserError(f"{out} holds a run that has ended: its results.json is there")
    text = sentences.checksum()
    facts = {"name": name, "command": shlex.join(["python", *sys.argv]), "text": text, "seconds": 0.0, **facts}
    if ranks.from_rank_0(facts["text"]) != text:
        raise UserError(f"{out}: the sentences of {cfg.train_file} are not those that this run began with: it could not come to the same end")
    if first and not cfg.resume:
        write_atomically(out / "config.json", settings)
    if first and not tensors:
        save_state(out, {}, facts)  # so that a run resumed from its very beginning has its name and command

    steps_per_epoch = math.ceil(len(sentences) / cfg.batch_size)
    total = cfg.steps or cfg.epochs * steps_per_epoch
    if first:
        print(f"{facts['name']}: {len(sentences):,} sentences, {total:,} steps of {cfg.batch_size} on {device.type}" + f" x {ranks.world()}" * (ranks.world() > 1)
              + f" ({str(amp).removeprefix('torch.') if amp else 'fp32'}), seed {cfg.seed}, into {out}"
              + f", from step {facts.get('step', 0)} on" * bool(cfg.resume))  # fmt: skip

    optimizer, scaler, make_step = stepper(model, V, amp, cfg.compile or cfg.compile is None and device.type == "cuda" and not fast.why_not_compiled(device))
    best_model = Opened(model.encoder, tokenizer, cfg.pooling, min(MAX_LENGTH, model.encoder.max_length))

    def encoder(texts: list[str], pooling: str = cfg.pooling) -> np.ndarray:
        return encode(model.encoder, tokenizer, texts, pooling)

    def in_training(texts: list[str]) -> np.ndarray:  # in mixed precision: it moves a Spearman x 100 by 0.01
        with torch.autocast(device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
            return encoder(texts)

    def card(scores: dict[str, dict[str, float]]) -> str:
        base_model = "" if local_folder(cfg.model) else cfg.model.partition("@")[0]
        return model_card(out.name, best_model, about(facts, cfg, scores, machine(device)), base_model)

    def seconds() -> float:
        return round(facts["seconds"] + time.time() - started, 1)

    def note(**row) -> None:
        line = (json.dumps({"seconds": seconds(), **row}) + "\n").encode()
        if log.write(line) < len(line):
            raise OSError(errno.ENOSPC, "No space left on device")

    with open(out / "log.jsonl" if first else os.devnull, "ab", buffering=0) as log, ExitStack() as stack:
        if first:
            log.truncate(facts.get("log", 0))  # lines of steps that are made once more
        window: list[dict[str, Tensor]] = []  # what train_step returned since the last line of the log
        bar = tqdm(total=total * cfg.batch_size, initial=facts.get("step", 0) * cfg.batch_size, unit=" sentences", unit_scale=True, disable=None if first else True)
        if "step" in facts:
            window = restore(tensors, model, optimizer)
            if scaler.is_enabled() and facts["scaler"]:  # a run may go on in another precision, on another device
                scaler.load_state_dict(facts["scaler"])
        elif not first:
            facts["step"] = 0
        else:
            facts |= {"before": score.test(encoder), "step": 0, "best": -math.inf, "best_step": 0}
            facts["first_last"] = score.test(lambda texts: encoder(texts, "avg_first_last"))  # the usual floor of Table 1
            facts["first"] = score.dev(in_training)
            note(step=0, **facts["first"])
            bar.write(f"step {0:>6}  {score.name}: {facts['first']['score']:.2f} (before training)")
        stop = stack.enter_context(Stop())  # from here on there is something to save
        tensors, saved, since, timed = {}, time.time(), time.time(), 0  # timed: how many of the window's steps this process made
        while (step := facts["step"]) < total:
            epoch, number = divmod(step, steps_per_epoch)
            positions = np.arange(number * cfg.batch_size, min((number + 1) * cfg.batch_size, len(sentences)))  # the last may be few (SPEC 1.3)
            rows = shuffled(positions, len(sentences), cfg.seed, epoch)
            x, mask = sentences.batch(rows)
            x_masked, selected = mask_tokens(x, tokenizer, cfg.mask_ratio, cfg.mask, torch.Generator().manual_seed(seed_of(cfg.seed, step, 1)))
            batch = tuple(t[ranks.part(len(rows), V)] for t in (x, mask, x_masked, selected))
            room = Room(sentences=len(rows))
            if device.type == "cuda":  # pinned memory: the host goes on while the last step is at work
                room = padded_room(cfg, tokenizer, batch, V, len(rows))
                batch = tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)
            else:
                batch = tuple(t.to(device) for t in batch)
            torch.manual_seed(seed_of(cfg.seed, step, 2 + ranks.rank()))  # dropout
            set_rate(optimizer, lr := cfg.lr * (total - step) / total)
            window.append(make_step(batch, room))
            facts["step"] = step = step + 1
            stop.signal = ranks.largest(stop.signal)
            if not first:
                window.clear()
                if stop.signal:
                    ranks.largest(0)  # rank 0 has saved: torchrun may kill it when another has ended
                    sys.exit(128 + stop.signal)
                continue
            timed += 1
            bar.update(cfg.batch_size)

            log_now = step % cfg.log_every == 0 or step in (1, total)
            eval_now = step % cfg.eval_every == 0 or step == total
            save_now = stop.signal or step == total or time.time() - saved >= 60 * cfg.save_minutes
            if not (log_now or eval_now or save_now):
                continue
            if not os.fstat(log.fileno()).st_nlink:  # writing would make the folder anew, without its config and log
                raise UserError(f"{out} was deleted while the run wrote to it: training stopped")
            kept = f"{out / 'best'} holds the model of step {facts['best_step']}" if facts["best_step"] else "no model had been kept yet"
            check_finite(window, step, scaler, kept)
            if log_now:
                row = summarise(window)
                speed = timed * cfg.batch_size / (time.time() - since)
                note(step=step, lr=lr, sentences_per_second=round(speed, 1), **row)
                bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
                window, since, timed = [], time.time(), 0
            scoring = time.time()
            if eval_now:
                try:
                    scores = score.dev(in_training)
                except UserError as error:  # vectors that cannot be ranked
                    raise UserError(f"step {step}: {error}; {kept}") from None
                note(step=step, **scores)
                better = scores["score"] > facts["best"]  # strictly (SPEC 6)
                bar.write(f"step {step:>6}  {score.name}: {scores['score']:.2f}" + " (best so far)" * better)
                if better:
                    facts |= {"best": scores["score"], "best_step": step}
                    save_model(best_model, out / "best", card({"before": facts["first"], "after": scores}), cfg.dtype)
                    write_atomically(out / "best" / RUN_CONFIG, settings)
            if save_now:
                os.fsync(log.fileno())  # what the state counts on
                save_state(out, state_of(model, optimizer, window),
                           facts | {"seconds": seconds(), "log": log.tell(), "scaler": scaler.state_dict()})  # fmt: skip
                saved = time.time()
            since += time.time() - scoring  # neither is training
            if stop.signal:
                bar.close()
                print(f"stopped after step {step} of {total}. To go on: python diffcse.py --resume {shlex.quote(str(out))}", file=sys.stderr, flush=True)
                with suppress(RuntimeError):  # the others wait for this, or have gone already
                    ranks.largest(0)
                sys.exit(128 + stop.signal)
        bar.close()

    if not first:
        return {}, {}
    model.encoder.load_state_dict(load_bert(out / "best").state_dict())
    rows = {"before": facts["before"], "before, first-last average": facts["first_last"], "after": score.test(encoder)}
    write_atomically(out / "best" / "README.md", card(rows))
    results = {
        "config": facts["name"], "seed": cfg.seed, "before": facts["before"], "before_first_last": facts["first_last"], "after": rows["after"],
        "dev_before": facts["first"]["score"], "dev_best": facts["best"], "best_step": facts["best_step"], "steps": total,
        "minutes": round(seconds() / 60, 2), "command": facts["command"], "machine": machine(device),
    }  # fmt: skip
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    (out / STATE).unlink()
    return results, rows


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers of a run depend on beside its config."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "tokenizers": tokenizers.__version__, "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count() or 1, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type}  # fmt: skip


def main() -> None:
    name, cfg = parse_args(sys.argv[1:])
    if cfg.explain:
        print(lab("explain").explain(cfg))
    else:
        train(cfg, name)


if __name__ == "__main__":
    run_main(main)
