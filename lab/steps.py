"""One training step, twice: ours, and as a careful engineer writes it on transformers.

lab/bench.py times both. Settings, sizes, batches, optimizer and update are the same; weights are
random. The peer's loss equals ours (tests/test_bench.py). Not here: a run, with its log and scores.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bert import Bert, BertConfig, BertForMaskedLM
from data import Batch, Tokenizer, read_sentences
from diffcse import Config, DiffCSEModel, draw_batch, make_optimizer, make_projector, train_step
from engine import fast
from engine.checkpoint import Metrics
from engine.device import pick_device
from engine.hub import ROOT, find_model
from engine.tokens import TokenizedSentences

TEXT = ROOT / "assets" / "wikipedia_20k.txt.xz"


def bert_config(layers: int, D: int, heads: int) -> BertConfig:
    return BertConfig("bert", 30_522, D, layers, heads, 4 * D)  # as many words as bert-base


SIZES = {  # (encoder and discriminator, generator)
    "tiny": (bert_config(1, 32, 2), bert_config(1, 32, 2)),  # for tests
    "mini": (bert_config(4, 256, 4), bert_config(4, 256, 4)),
    "minilm": (bert_config(6, 384, 12), bert_config(6, 384, 12)),
    "base": (bert_config(12, 768, 12), bert_config(6, 768, 12)),
}
PAPER = {"masking": "all", "edit": "sample", "edit_scope": "masked", "protect_sep": True}
PAPER |= {"views": "first", "generator_dropout": False, "pads_in_loss": False}
READINGS = {"published": Config(), "paper": Config(**PAPER)}


def make_batches(cfg: Config, tokenizer: Tokenizer, count: int) -> list[Batch]:
    """Batches of a run on sentences of Wikipedia. Their ids are the small BERT's."""
    rows = itertools.islice(read_sentences(TEXT), count * cfg.batch_size)
    sentences = TokenizedSentences(rows, tokenizer, cfg.max_length)
    return [draw_batch(sentences, tokenizer, cfg, step) for step in range(count)]


class Peer(nn.Module):
    """DiffCSE on transformers' modules, with the paper at hand and an eye on speed.

    The vocabulary product is computed at edited positions alone, 256 at a time.
    """

    def __init__(self, cfg: Config, sep_id: int, encoder: BertConfig, generator: BertConfig):
        super().__init__()
        import transformers

        config = transformers.BertConfig(**asdict(encoder))
        self.cfg, self.sep_id = cfg, sep_id
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)
        self.discriminator = transformers.BertModel(config, add_pooling_layer=False)
        config = transformers.BertConfig(**asdict(generator))
        self.generator = transformers.BertForMaskedLM(config).requires_grad_(False)
        self.projector = make_projector("batchnorm", encoder.hidden_size, 0.02)
        self.head = nn.Linear(encoder.hidden_size, 2)
        self.discriminator.embeddings.register_forward_hook(self.replace_cls)

    def replace_cls(self, module: nn.Module, inputs: tuple, states: Tensor) -> Tensor:
        return torch.cat([self.h[:, None].to(states.dtype), states[:, 1:]], dim=1)

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
        labels = (edited != x).long()
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
        self.generator.train(cfg.generator_dropout)
        output = self.generator.bert(input_ids=x_masked, attention_mask=mask.long())
        edited, predicted = x.clone(), []
        for states in output.last_hidden_state[editable].split(256):  # (n, D)
            logits = self.generator.cls(states)  # (n, W)
            if cfg.edit == "argmax":
                predicted.append(logits.argmax(-1))
            else:
                predicted.append(torch.multinomial(logits.float().softmax(-1), 1).squeeze(1))
        edited[editable] = torch.cat(predicted)
        return edited


def step_side(
    side: str, size: str, reading: str, amp: str, device: str, steps: int
) -> Callable[[], float]:
    """Some steps as a side of lab/bench.py: transformers, fast on, fast off, or compiled. The work
    returns the last step's loss."""
    cfg, tokenizer = READINGS[reading], Tokenizer(find_model("assets/small-bert"))
    (encoder, generator), (device, dtype) = SIZES[size], pick_device(device, amp)
    batches = make_batches(cfg, tokenizer, 16)
    torch.manual_seed(0)
    if side == "transformers":
        model = Peer(cfg, tokenizer.sep_id, encoder, generator)
    else:
        parts = Bert(encoder), BertForMaskedLM(generator), Bert(encoder)
        model = DiffCSEModel(cfg, tokenizer, *parts)
        if device.type == "cuda":  # as in training
            batches = [batch.pad(cfg.max_length, tokenizer.pad_id) for batch in batches]
    model.to(device).train()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step = partial(train_step, model, make_optimizer(model), scaler, dtype)
    step = fast.accelerate(step, model, side == "fast on", side == "compiled")
    draw = itertools.cycle([batch.to(device) for batch in batches])

    def work() -> float:
        for _ in range(steps):
            metrics = step(next(draw))
        return float(metrics["loss"][0])

    return work
