"""One step of DiffCSE, twice: ours, and as one would write it on transformers; and how many products either makes by the book.

lab/bench.py times them. The switches are the same on both sides, and so are sizes, words and batches; that both have the same
loss and gradients is what tests/test_step.py says of a third copy, which is written to be plain. Weights are random.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import diffcse
import fast
from bert import Bert, BertConfig, BertForMaskedLM, Grid
from config import parse_field
from data import TokenizedSentences, Tokenizer, find_model, mask_tokens, read_lines, shuffled
from lab.reproduce import TABLE_1

WORDS = 30_522  # bert-base's vocabulary


def shape(layers: int, D: int, heads: int, family: str = "bert") -> BertConfig:
    return BertConfig(family, WORDS, D, layers, heads, 4 * D)


SIZES = {  # encoder and discriminator; generator
    "mini": (shape(4, 256, 4), shape(4, 256, 4)),
    "minilm": (shape(6, 384, 12), shape(6, 384, 12)),
    "base": (shape(12, 768, 12), shape(6, 768, 12, "distilbert")),
}
Sizes = tuple[BertConfig, BertConfig]
PAPER = TABLE_1[-1].flags | {"mask": "all", "views": "first", "protect_sep": "on"}  # and GUIDE's other switches, but for the sum, which costs the same
READINGS = {"published": diffcse.Config(), "paper": diffcse.Config(**{name: parse_field(name, value) for name, value in PAPER.items()})}


def flops(encoder: BertConfig, generator: BertConfig, cfg: diffcse.Config, R: int, T: int) -> int:
    """Multiplications and additions of the products in a textbook step of R rows of T tokens, padding included; backward is twice forward.

    Ours makes fewer than are counted here: none of padding, of last layers that nobody asks for, of logits that nobody reads.
    So its share of the machine's peak by this count is the useful work's, as of the other side, and not how busy the machine is.
    """

    def forward(bert: BertConfig, rows: int) -> int:
        D = bert.hidden_size
        linear = 4 * D * D + 2 * D * bert.intermediate_size  # parameters of a layer
        return bert.num_hidden_layers * rows * T * (2 * linear + 4 * T * D)  # 4TD: a token's scores, and what it reads by them

    D, edited = encoder.hidden_size, R if cfg.views == "both" else R // 2
    projector = 2 * R * 4 * D * D
    contrastive = 2 * (R // 2) ** 2 * D
    discriminator = forward(encoder, edited) + edited * T * 2 * 2 * D
    guesses = forward(generator, edited) + edited * T * 2 * (D * D + D * generator.vocab_size)
    return 3 * (forward(encoder, R) + projector + contrastive + discriminator) + guesses


def whole_vocabulary() -> Tokenizer:
    """The small BERT's tokenizer with words of no text up to bert-base's number, so that as many logits are computed."""
    tokenizer = Tokenizer(find_model("assets/small-bert"))
    raw = json.loads(tokenizer.backend.to_str())
    raw["model"]["vocab"] |= {f"[unused{i}]": i for i in range(tokenizer.vocab_size, WORDS)}
    tokenizer.backend, tokenizer.vocab_size = tokenizers.Tokenizer.from_str(json.dumps(raw)), WORDS
    return tokenizer


def batches(text: str, cfg: diffcse.Config, tokenizer: Tokenizer, device: torch.device) -> Iterator[tuple[tuple[Tensor, ...], diffcse.Room]]:
    """Batches of the text's first sentences, masked, without end, and their room. Shapes: x (R, T), mask, x_masked, selected likewise."""
    lines = islice((line for line in read_lines(Path(text)) if line.strip()), 20_000)
    sentences, random = TokenizedSentences(((line,) for line in lines), tokenizer, cfg.max_length), torch.Generator().manual_seed(0)
    for start in itertools.count(0, cfg.batch_size):
        x, mask = sentences.batch(shuffled(np.arange(start, start + cfg.batch_size) % len(sentences), len(sentences), 0, 0))
        batch = (x, mask, *mask_tokens(x, tokenizer, cfg.mask_ratio, cfg.mask, random))
        room = diffcse.padded_room(cfg, tokenizer, batch, 2, cfg.batch_size) if device.type == "cuda" else diffcse.Room()
        yield tuple(t.to(device) for t in batch), room


def ours(sizes: Sizes, cfg: diffcse.Config, tokenizer: Tokenizer, device: torch.device, amp: torch.dtype | None, compiled: bool = False) -> Callable:
    """A function that makes a step of a batch and its room; random weights, all else as in diffcse.fit."""
    encoder, generator = sizes
    model = diffcse.TrainingModel(cfg, Bert(encoder), tokenizer, BertForMaskedLM(generator), Bert(encoder)).to(device).train()
    return diffcse.stepper(model, 2, amp, compiled)[2]


def padded(self: Bert, ids: Tensor, mask=None, cls_vector=None, all_layers=False, tokens=None, wanted=None) -> Tensor:
    """Bert.forward that computes padding too."""
    x = FORWARD(self, ids, mask, cls_vector, all_layers, None, wanted)
    return x if tokens is None or wanted is not None else x.flatten(0, 1)[tokens]


def whole_last_layer(self: Bert, ids: Tensor, mask=None, cls_vector=None, all_layers=False, tokens=None, wanted=None) -> Tensor:
    """Bert.forward that computes its last layer for every token."""
    x = FORWARD(self, ids, mask, cls_vector, all_layers, tokens, None)
    return x if wanted is None else Grid(*ids.shape, mask, tokens, None).spread(x.flatten(0, -2), tokens).flatten(0, 1)[wanted]


FORWARD, LINEAR, ADAMW = Bert.forward, fast.linear, torch.optim.AdamW
WITHOUT = {  # what makes a step fast on a CPU: how to do without it
    "padding left out": (Bert, "forward", padded),
    "last layers where they are read": (Bert, "forward", whole_last_layer),
    "oneDNN's products": (fast, "has_onednn", lambda: False),
    "dropout by 16 bits": (fast, "dropout", F.dropout),
    "logits of 256 tokens at a time": (fast, "ROWS", 1 << 30),
    "GELU computed twice": (fast, "linear", lambda x, weight, bias, gelu=False: LINEAR(F.gelu(x) if gelu else x, weight, bias)),
    "AdamW and clipping in one pass": (torch.optim, "AdamW", lambda *args, **settings: ADAMW(*args, **settings | {"fused": False})),
}  # fmt: skip


def theirs(sizes: Sizes, cfg: diffcse.Config, tokenizer: Tokenizer, device: torch.device, amp: torch.dtype | None) -> Callable:
    """The same on transformers' modules and PyTorch's, as one would write it with the paper at hand, with the same switches."""
    import transformers

    encoder, generator = (transformers.AutoConfig.for_model(**size.to_dict()) for size in sizes)
    D = encoder.hidden_size
    f, d = (transformers.AutoModel.from_config(encoder, add_pooling_layer=False).to(device).train() for _ in range(2))
    g = transformers.AutoModelForMaskedLM.from_config(generator).to(device).train(cfg.generator_dropout).requires_grad_(False)
    projector = nn.Sequential(nn.Linear(D, 2 * D, bias=False), nn.BatchNorm1d(2 * D), nn.ReLU(),
                              nn.Linear(2 * D, D, bias=False), nn.BatchNorm1d(D, affine=False)).to(device)  # fmt: skip
    head = nn.Linear(D, 2).to(device)
    parameters = [p for module in (f, d, projector, head) for p in module.parameters()]
    optimizer, scaler = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.0), torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    h = None  # of the step, for the hook
    d.embeddings.register_forward_hook(lambda module, inputs, out: torch.cat([h[:, None], out[:, 1:]], 1))

    def loss(x: Tensor, mask: Tensor, x_masked: Tensor, selected: Tensor) -> Tensor:
        nonlocal h
        h = projector(f(input_ids=x, attention_mask=mask.long()).last_hidden_state[:, 0])
        u, v = F.normalize(h.view(-1, 2, D), dim=-1).unbind(1)
        contrastive = F.cross_entropy(u @ v.T / cfg.temperature, torch.arange(len(u), device=device))
        if cfg.views == "first":
            x, mask, x_masked, selected, h = x[::2], mask[::2], x_masked[::2], selected[::2], h[::2]
        with torch.no_grad():
            logits = g(input_ids=x_masked, attention_mask=mask.long()).logits
            edited = logits.argmax(-1) if cfg.edit == "argmax" else torch.multinomial(logits.float().softmax(-1).flatten(0, 1), 1).view_as(x)
            edited = torch.where(selected, edited, x) if cfg.edit_scope == "masked" else edited
            edited = torch.where(x == tokenizer.sep, x, edited) if cfg.protect_sep else edited
            edited[:, 0] = tokenizer.cls
            edited = edited * mask
            labels = ((edited != x) & mask).long()
            labels = labels if cfg.pads_in_loss else labels.masked_fill(~mask, -100)
        said = head(d(input_ids=edited, attention_mask=mask.long()).last_hidden_state)
        return contrastive + cfg.lam * F.cross_entropy(said.flatten(0, 1), labels.flatten())

    def step(batch: tuple[Tensor, ...], room: diffcse.Room) -> None:
        with torch.autocast(device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
            value = loss(*batch)
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, cfg.clip)
        scaler.step(optimizer)
        scaler.update()

    return step
