"""One training step, twice: ours, and as a careful engineer writes it on transformers.

lab/bench.py times both. Settings, sizes, vocabulary, batches, optimizer and update are the same;
weights are random. The peer's loss equals ours (tests/test_bench.py).
"""

import itertools
import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bert import DISTILBERT_CONFIG, Bert, BertConfig, BertForMaskedLM
from data import Batch, Tokenizer, mask_tokens
from diffcse import Config, DiffCSEModel, make_optimizer, make_projector, train_step
from engine import fast
from engine.checkpoint import Metrics
from engine.hub import find_model
from engine.tokens import TokenizedSentences

VOCAB_SIZE = 30_522  # bert-base's


def bert_config(layers: int, D: int, heads: int, family: str = "bert") -> BertConfig:
    return BertConfig(family, VOCAB_SIZE, D, layers, heads, 4 * D)


SIZES = {  # (encoder and discriminator, generator)
    "tiny": (bert_config(1, 32, 2), bert_config(1, 32, 2, "distilbert")),  # for tests
    "mini": (bert_config(4, 256, 4), bert_config(4, 256, 4)),
    "minilm": (bert_config(6, 384, 12), bert_config(6, 384, 12)),
    "base": (bert_config(12, 768, 12), bert_config(6, 768, 12, "distilbert")),
}
EDIT = dict(masking="all", edit="sample", edit_scope="masked", protect_sep=True, views="first")
READINGS = {
    "published": Config(),
    "paper": Config(**EDIT, generator_dropout=False, pads_in_loss=False),
}
AMPS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def whole_vocabulary() -> Tokenizer:
    """The small BERT's tokenizer with unused words up to bert-base's number."""
    tokenizer = Tokenizer(find_model("assets/small-bert"))
    backend = json.loads(tokenizer.backend.to_str())
    unused = range(tokenizer.vocab_size, VOCAB_SIZE)
    backend["model"]["vocab"] |= {f"[unused{i}]": i for i in unused}
    tokenizer.backend = tokenizers.Tokenizer.from_str(json.dumps(backend))
    tokenizer.vocab_size = VOCAB_SIZE
    return tokenizer


def make_batches(lines: list[str], cfg: Config, tokenizer: Tokenizer, count: int) -> list[Batch]:
    """Batches of random lines, masked."""
    B, rng = cfg.batch_size, torch.Generator().manual_seed(0)
    chosen = random.Random(0).choices(lines, k=count * B)
    sentences = TokenizedSentences(((line,) for line in chosen), tokenizer, cfg.max_length)
    batches = []
    for i in range(count):
        x, mask = sentences.rows(np.arange(i * B, (i + 1) * B))
        batches.append(Batch(x, mask, *mask_tokens(x, tokenizer, cfg.mask_ratio, cfg.masking, rng)))
    return batches


# ------------------------------------------------------------------------------------------------
# The peer


class Peer(nn.Module):
    """DiffCSE on transformers' modules, with the paper at hand and an eye on speed.

    The vocabulary product is computed at edited positions alone, 256 at a time.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer, sizes: tuple[BertConfig, BertConfig]):
        super().__init__()
        import transformers

        encoder, generator = sizes
        self.cfg, self.sep_id, config = cfg, tokenizer.sep_id, hf_config(encoder)
        self.encoder = transformers.AutoModel.from_config(config, add_pooling_layer=False)
        self.discriminator = transformers.AutoModel.from_config(config, add_pooling_layer=False)
        self.generator = transformers.AutoModelForMaskedLM.from_config(hf_config(generator))
        self.generator.requires_grad_(False)
        self.projector = make_projector("batchnorm", encoder.hidden_size, 0.02)
        self.head = nn.Linear(encoder.hidden_size, 2)
        self.discriminator.embeddings.register_forward_hook(self.replace_cls)

    def replace_cls(self, module: nn.Module, inputs: tuple, states: Tensor) -> Tensor:
        return torch.cat([self.h[:, None].to(states.dtype), states[:, 1:]], dim=1)

    def train(self, mode: bool = True) -> "Peer":
        super().train(mode)
        self.generator.train(mode and self.cfg.generator_dropout)
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        cfg, (x, mask, x_masked, selected) = self.cfg, batch.tensors()
        cls = self.encoder(input_ids=x, attention_mask=mask.long()).last_hidden_state[:, 0]
        self.h = self.projector(cls)
        z1, z2 = F.normalize(self.h.float().unflatten(0, (-1, 2)), dim=-1).unbind(1)  # (B, D)
        logits = z1 @ z2.T / cfg.temperature  # (B, B)
        contrastive = F.cross_entropy(logits, torch.arange(len(z1), device=x.device))
        if cfg.views == "first":
            x, mask, x_masked, selected = (t[::2] for t in (x, mask, x_masked, selected))
            self.h = self.h[::2]
        edited = self.edit(x, mask, x_masked, selected)
        labels = ((edited != x) & mask).long()
        if not cfg.pads_in_loss:
            labels = labels.masked_fill(~mask, -100)
        states = self.discriminator(input_ids=edited, attention_mask=mask.long()).last_hidden_state
        difference = F.cross_entropy(self.head(states).float().flatten(0, 1), labels.flatten())
        loss = contrastive + cfg.lam * difference
        return loss, {"loss": (loss.detach(), 1)}

    @torch.no_grad()
    def edit(self, x: Tensor, mask: Tensor, x_masked: Tensor, selected: Tensor) -> Tensor:
        """Shapes: (R, T) -> (R, T) ids."""
        cfg = self.cfg
        editable = (mask if cfg.edit_scope == "all" else selected).clone()
        editable[:, 0] = False
        if cfg.protect_sep:
            editable &= x != self.sep_id
        output = self.generator.base_model(input_ids=x_masked, attention_mask=mask.long())
        edited, predicted = x.clone(), []
        for states in output.last_hidden_state[editable].split(256):  # (n, D)
            logits = self.vocabulary_logits(states)
            if cfg.edit == "argmax":
                predicted.append(logits.argmax(-1))
            else:
                predicted.append(torch.multinomial(logits.float().softmax(-1), 1).squeeze(1))
        edited[editable] = torch.cat(predicted)
        return edited * mask

    def vocabulary_logits(self, states: Tensor) -> Tensor:
        """Shapes: (n, D) -> (n, W)."""
        generator = self.generator
        if hasattr(generator, "cls"):  # BERT
            return generator.cls(states)
        states = generator.activation(generator.vocab_transform(states))
        return generator.vocab_projector(generator.vocab_layer_norm(states))


def hf_config(cfg: BertConfig):
    import transformers

    settings = asdict(cfg) | {"hidden_act": "gelu"}
    if cfg.model_type == "distilbert":
        settings |= {theirs: settings[ours] for theirs, ours in DISTILBERT_CONFIG.items()}
    return transformers.AutoConfig.for_model(**settings)


# ------------------------------------------------------------------------------------------------
# Operations of engine/fast.py, one by one


class Operations(fast.FastCPU):
    """FastCPU without one function, or with oneDNN's linear where it is off by default."""

    def __init__(self, without: Callable | None = None, linear: bool = False):
        super().__init__()
        self.without, self.linear = without, linear

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is self.without:
            return func(*args, **(kwargs or {}))
        if func is F.linear and self.linear and fast.is_fp32_on_cpu(*args):
            return fast.Linear.apply(*args, *[None] * (3 - len(args)))
        return super().__torch_function__(func, types, args, kwargs)


OPERATIONS: dict[str, Callable] = {
    "all": Operations,
    "without dropout": partial(Operations, without=F.dropout),
    "without attention": partial(Operations, without=F.scaled_dot_product_attention),
    "without linear": partial(Operations, without=F.linear),
    "with linear": partial(Operations, linear=True),
}
del OPERATIONS["with linear" if fast.mkl_is_slow() else "without linear"]  # the same as "all"


# ------------------------------------------------------------------------------------------------
# Sides


def step_side(
    side: str, size: str, reading: str, amp: str, device: str, batches: str
) -> Callable[[], Tensor]:
    """One step as the work of lab/worker.py. batches: a file of lists of tuples of tensors.

    side: transformers, fast on, fast off, compiled, or one of OPERATIONS.
    """
    cfg, tokenizer, (encoder, generator) = READINGS[reading], whole_vocabulary(), SIZES[size]
    drawn = [Batch(*tensors) for tensors in torch.load(batches)]
    torch.manual_seed(0)
    if side == "transformers":
        model = Peer(cfg, tokenizer, SIZES[size])
    else:
        parts = Bert(encoder), BertForMaskedLM(generator), Bert(encoder)
        model = DiffCSEModel(cfg, tokenizer, *parts)
        if device == "cuda":  # as in training
            drawn = [batch.pad(cfg.max_length, tokenizer.pad_id) for batch in drawn]
    model.to(device).train()
    scaler = torch.amp.GradScaler(device, enabled=amp == "fp16")
    step = partial(train_step, model, make_optimizer(model), scaler, AMPS[amp])
    mode = OPERATIONS.get(side, nullcontext)
    step = fast.accelerate(step, model, side == "fast on", side == "compiled")
    draw = itertools.cycle([batch.to(torch.device(device)) for batch in drawn])

    def work() -> Tensor:
        with mode():
            return step(next(draw))["loss"][0]

    return work
