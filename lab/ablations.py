"""The paper's ablations (Tables 3, 4 and 15): other losses in place of the difference prediction.

    python -m lab.ablations --config small --objective masked               # Table 3
    python -m lab.ablations --config small --edit-with insert               # Table 4
    python -m lab.ablations --config small --edit-as negative --lam 1       # Table 15

Without flags it trains as diffcse.py does. Each loss is a function (model, h, batch) -> loss,
metrics, called where diffcse.py calls difference_loss. None of their code was published; where the
paper is silent, the docstring names the choice. Scores are the paper's, bert-base, STS-B dev /
average transfer dev. DiffCSE has 84.56 / 85.95, SimCSE 81.47 / 83.91, SimCSE with BatchNorm
82.22 / 85.66.
Shapes: as in diffcse.py; n positions, W words of the vocabulary.
Not here: ablations by flags of diffcse.py. --no-contrastive has 54.48 / 83.46 (Table 3);
--projector is Table 5, --generator 6, --mask-ratio 7, --lam 8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bert import MLMHead, load_bert
from data import Batch
from diffcse import (
    Config,
    DiffCSEModel,
    at_least_fp32,
    edit_sentences,
    main,
    replaced_token_loss,
)
from engine import distributed, hub
from engine.checkpoint import Metrics
from engine.errors import UserError, run_main
from engine.pretrained import load_encoder, load_generator
from engine.tokens import TokenizedSentences
from lab.running_text import read_running_text, read_with_next

Loss = tuple[Tensor, Metrics]
Edit = tuple[Tensor, Tensor, Tensor]  # x_edited (R, T'') ids, changed (R, T'') bool, mask (R, T'')


def log_ratio(loss: Tensor, name: str, flags: Tensor) -> Metrics:
    """The loss, and the share of flags that are set. Shapes: (), (n,) bool."""
    return {"difference": (loss.detach(), 1), name: (flags.sum(), len(flags))}


# ------------------------------------------------------------------------------------------------
# What the discriminator predicts (Table 3)


def masked_loss(model: "AblationModel", h: Tensor, batch: Batch) -> Loss:
    """Conditional masked language model: the discriminator reads x' and h, and predicts the
    masked tokens.

    Table 3: 83.08 / 84.43; of the next sentence, which is CMLM (Yang et al. 2020), 75.82 / 85.68;
    of both 82.88 / 84.82. The discriminator's head is the pretrained model's masked-LM head, which
    is trained, too. There is no generator. The loss is the mean over masked positions.
    """
    states = model.discriminator(batch.x_masked, batch.mask, cls_vector=h)[batch.selected]  # (n, D)
    logits = model.mlm_head(states, model.discriminator.embeddings.word.weight)  # (n, W)
    target = batch.x[batch.selected]
    loss = F.cross_entropy(at_least_fp32(logits), target, reduction="sum")
    loss = distributed.reduce_loss(loss, batch.selected.sum())
    return loss, log_ratio(loss, "accuracy_masked", logits.argmax(-1) == target)


def corrected_loss(model: "AblationModel", h: Tensor, batch: Batch) -> Loss:
    """Conditional corrective language model: the discriminator reads x'' and h, detects replaced
    tokens, and predicts the tokens of x at masked positions.

    Table 3: 79.79 / 85.30. As in COCO-LM (Meng et al. 2021, section 3), a token is copied from x''
    with the probability that it is original, and otherwise drawn from the vocabulary:
        p(x_t) = p_original [x_t = x''_t] + (1 - p_original) p_token(x_t)
    Only the replaced-token loss trains p_original. The two losses are added with equal weight.
    """
    selected, target = batch.selected, batch.x[batch.selected]  # (R, T), (n,)
    x_edited, replaced = edit_sentences(model.generator, batch, model.tokenizer, model.cfg)
    states = model.discriminator(x_edited, batch.mask, cls_vector=h)  # (R, T, D)
    detection = model.head(states)  # (R, T, 2)
    settings = model.cfg.pads_in_loss, model.cfg.reduction
    detection_loss, metrics = replaced_token_loss(detection, replaced, batch.mask, *settings)
    logits = model.mlm_head(states[selected], model.discriminator.embeddings.word.weight)  # (n, W)
    log_token = at_least_fp32(logits).log_softmax(-1).gather(1, target[:, None]).squeeze(1)  # (n,)
    log_detection = at_least_fp32(detection.detach()[selected]).log_softmax(-1)  # (n, 2)
    log_original, log_replaced = log_detection.unbind(-1)
    log_drawn = log_replaced + log_token
    log_copied_or_drawn = torch.logaddexp(log_original, log_drawn)
    log_p = torch.where(x_edited[selected] == target, log_copied_or_drawn, log_drawn)
    loss = detection_loss + distributed.reduce_loss(-log_p.sum(), selected.sum())
    return loss, metrics | log_ratio(loss, "accuracy_masked", logits.argmax(-1) == target)


# ------------------------------------------------------------------------------------------------
# How a sentence is edited (Table 4). Edits of different rows are drawn independently.


def replace(model: "AblationModel", batch: Batch) -> Edit:
    """The paper's own edit: masked tokens, filled by the generator. Changed are the tokens that
    differ from x. Table 4, "MLM 15%": 84.48 / 85.95."""
    x_edited, replaced = edit_sentences(model.generator, batch, model.tokenizer, model.cfg)
    return x_edited, replaced, batch.mask


@torch.no_grad()
def insert(model: "AblationModel", batch: Batch) -> Edit:
    """[MASK]s at random positions between [CLS] and [SEP], mask_ratio of the length, filled by the
    generator. Changed are the inserted tokens. Table 4: 82.20 / 85.96.

    All other tokens are those of x, whatever --edit-scope is.
    """
    cfg, x, lengths = model.cfg, batch.x, batch.mask.sum(1)
    count = random_count(lengths - 2, cfg.mask_ratio)  # (R,)
    lengths_edited = lengths + count
    positions = torch.arange(int(lengths_edited.max()), device=x.device)  # (T'',)
    mask = positions < lengths_edited[:, None]  # (R, T'')
    inserted = random_subset(inner(mask), count)  # (R, T'')
    source = ((~inserted).cumsum(1) - 1).clamp_max(x.shape[1] - 1)  # (R, T''): positions in x
    with_masks = x.gather(1, source).masked_fill(inserted, model.tokenizer.mask_id) * mask
    temperature = cfg.edit_temperature if cfg.edit == "sample" else None
    return model.generator.predict_tokens(with_masks, mask, inserted, temperature), inserted, mask


def delete(model: "AblationModel", batch: Batch) -> Edit:
    """mask_ratio of the tokens are deleted. Changed are the tokens, perhaps [SEP], that follow a
    deleted one. Table 4: 82.59 / 85.97."""
    x, mask = batch.x, batch.mask
    deleted = random_subset(inner(mask), random_count(mask.sum(1) - 2, model.cfg.mask_ratio))
    follows = F.pad(deleted, (1, -1))  # (R, T): the token before was deleted
    order = deleted.byte().argsort(dim=1, stable=True)  # (R, T): deleted tokens last
    mask_edited = (mask & ~deleted).gather(1, order)
    return x.gather(1, order) * mask_edited, follows.gather(1, order) & mask_edited, mask_edited


def inner(mask: Tensor) -> Tensor:
    """All tokens but [CLS] and [SEP]. Shapes: (R, T) bool -> (R, T) bool."""
    position = torch.arange(mask.shape[1], device=mask.device)
    return (position > 0) & (position < mask.sum(1, keepdim=True) - 1)


def random_count(lengths: Tensor, ratio: float) -> Tensor:
    """ratio * lengths, rounded up or down at random so that the mean is exact. Shapes: (R,)."""
    count = (ratio * lengths + torch.rand(lengths.shape, device=lengths.device)).floor().long()
    return torch.minimum(count, (ratio * lengths.double()).ceil().long())  # fp32 may round up


def random_subset(candidates: Tensor, count: Tensor) -> Tensor:
    """`count` of each row's candidates, all equally likely. Shapes: (R, T) bool, (R,) -> (R, T)."""
    draws = torch.rand(candidates.shape, device=candidates.device)
    rank = draws.masked_fill(~candidates, 2).argsort(1).argsort(1)  # (R, T): other tokens are last
    return candidates & (rank < count[:, None])


# ------------------------------------------------------------------------------------------------
# How the edited sentence is used (Table 15)


def difference_loss(model: "AblationModel", h: Tensor, batch: Batch, edit: Callable) -> Loss:
    """The discriminator reads x'' and h, and labels each token as changed or not. "Equivariance
    (Ours)" in Table 15. Each edit has its own head."""
    if edit is replace:
        return DiffCSEModel.difference_loss(model, h, batch)
    cfg, (x_edited, changed, mask) = model.cfg, edit(model, batch)
    logits = model.heads[edit.__name__](model.discriminator(x_edited, mask, cls_vector=h))
    return replaced_token_loss(logits, changed, mask, cfg.pads_in_loss, cfg.reduction)


def compare(model: "AblationModel", h: Tensor, batch: Batch, edit: Callable) -> tuple[Tensor, ...]:
    """Logits of first views with second views, and of first views with edits (of first views).

    Encoder and projector see the edits in a pass of their own, so BatchNorm's statistics are those
    of edits. Shapes: h (R, D) -> (b, B), (b, B), (b,) the columns of a row's own sentence; b
    sentences of this process, B of all.
    """
    views, temperature = batch.views, model.cfg.temperature
    x_edited, _, mask = edit(model, batch.first_views())
    cls = distributed.all_gather(model.encoder(x_edited, mask, cls_only=True)[:, 0])  # (B, D)
    B = len(cls)
    h_edited = model.projector(cls if B > 1 else cls.repeat(2, 1))[:B]  # BatchNorm needs two rows
    rows = h[::views], distributed.all_gather(h[1::views]), h_edited
    with torch.autocast(h.device.type, enabled=False):  # as in contrastive_loss
        first, second, edits = (F.normalize(at_least_fp32(t), dim=-1, eps=1e-8) for t in rows)
        own = distributed.own_rows(torch.arange(B, device=h.device))
        return first @ second.T / temperature, first @ edits.T / temperature, own


def positive_loss(model: "AblationModel", h: Tensor, batch: Batch, edit: Callable) -> Loss:
    """A second positive: a first view must find its edit among all edits, as it must find its
    second view. Weighted by lam. Table 15: MLM 73.59 / 83.33, insert 80.39 / 83.92, delete
    78.58 / 81.80."""
    _, logits, own = compare(model, h, batch, edit)
    loss = F.cross_entropy(logits, own)
    return loss, log_ratio(loss, "accuracy_edits", logits.argmax(-1) == own)


def negative_loss(model: "AblationModel", h: Tensor, batch: Batch, edit: Callable) -> Loss:
    """All edits are additional negatives, like SimCSE's hard negatives. Table 15: MLM
    83.02 / 84.49, insert 55.65 / 79.86, delete 55.13 / 82.56.

    The loss is the amount by which they increase InfoNCE, softplus(log(sum over edits) - log(sum
    over second views)). So with lam 1 (and two views) the total is contrastive_loss with edits as
    third views.
    """
    seconds, edits, own = compare(model, h, batch, edit)
    loss = F.softplus(edits.logsumexp(1) - seconds.logsumexp(1)).mean()
    nearer = edits.gather(1, own[:, None]) > seconds.gather(1, own[:, None])
    return loss, log_ratio(loss, "share_nearer", nearer)  # edits nearer than the second view


# ------------------------------------------------------------------------------------------------
# The model

OBJECTIVES = {"masked": masked_loss, "corrected": corrected_loss}
USES = {"difference": difference_loss, "positive": positive_loss, "negative": negative_loss}
EDITS = {
    "replace": [replace],
    "insert": [insert],
    "delete": [delete],
    "all": [replace, insert, delete],  # Table 4, "combining all": 82.80 / 85.92
}
Text = Literal["sentences", "paragraphs"]
Objective = Literal["replaced", "masked", "corrected"]
Whose = Literal["same", "next", "both"]
EditWith = Literal["replace", "insert", "delete", "all"]
EditAs = Literal["difference", "positive", "negative"]


@dataclass
class AblationConfig(Config):
    """Settings of an ablation."""

    text: Text = "sentences"  # paragraphs: running text, with empty lines between documents
    objective: Objective = "replaced"  # what is predicted; corrected: replaced and masked tokens
    condition_on: Whose = "same"  # the sentence whose edit is read beside h (next: in the text)
    edit_with: EditWith = "replace"  # how a sentence is edited, at mask_ratio of its tokens
    edit_as: EditAs = "difference"  # difference: for the discriminator; else contrastive

    def __post_init__(self) -> None:
        super().__post_init__()
        edit = self.edit_with, self.edit_as
        if self.lam == 0 and self.is_ablation:
            raise UserError("--lam is 0; an ablation's lam must be larger than 0")
        if self.condition_on != "same" and self.text != "paragraphs":
            raise UserError(f"--condition-on {self.condition_on} needs --text paragraphs")
        if self.objective != "replaced" and edit != ("replace", "difference"):
            raise UserError(f"--objective {self.objective} excludes --edit-with and --edit-as")

    @property
    def is_ablation(self) -> bool:
        choices = self.objective, self.condition_on, self.edit_with, self.edit_as
        return choices != ("replaced", "same", "replace", "difference")


@dataclass
class BatchWithNext(Batch):
    """A batch, and that of the next sentences, in the same order."""

    following: Batch | None = None


class AblationModel(DiffCSEModel):
    """DiffCSEModel with another difference_loss, the heads that it needs, and running text."""

    def __init__(self, cfg: AblationConfig, *parts, mlm_head: MLMHead | None = None):
        super().__init__(cfg, *parts)  # tokenizer, encoder, generator, discriminator
        self.mlm_head = mlm_head
        if self.discriminator is not None:
            D, edits = self.encoder.cfg.hidden_size, EDITS[cfg.edit_with]
            heads = {edit.__name__: nn.Linear(D, 2) for edit in edits if edit is not replace}
            self.heads = nn.ModuleDict(heads)
            if cfg.objective == "masked" or replace not in edits:
                self.head = None
        if cfg.objective != "replaced":
            self.losses = [OBJECTIVES[cfg.objective]]
        else:
            self.losses = [partial(USES[cfg.edit_as], edit=edit) for edit in EDITS[cfg.edit_with]]

    @classmethod
    def from_pretrained(cls, cfg: AblationConfig) -> "AblationModel":
        """Only the models that the ablation needs are looked for and loaded."""
        if not cfg.is_ablation:
            return super().from_pretrained(cfg)
        folder = hub.find_model(cfg.model)
        tokenizer, encoder = load_encoder(cfg)
        generator = discriminator = mlm_head = None
        if cfg.objective != "masked" and cfg.edit_with != "delete":
            generator = load_generator(cfg, tokenizer)
        if insert in EDITS[cfg.edit_with]:
            T = cfg.max_length + math.ceil(cfg.mask_ratio * (cfg.max_length - 2))
            if T > (limit := min(encoder.max_length, generator.max_length)):
                size = f"--max-length is {cfg.max_length}, with inserted tokens {T}"
                raise UserError(f"{size}, but --model or --generator has {limit} positions")
        if cfg.objective != "replaced":
            mlm = load_bert(folder, mlm=True, dropout=cfg.dropout)
            discriminator, mlm_head = mlm.bert, mlm.head
        elif cfg.edit_as == "difference":
            discriminator = load_bert(folder, dropout=cfg.dropout)
        return cls(cfg, tokenizer, encoder, generator, discriminator, mlm_head=mlm_head)

    def load_sentences(self) -> TokenizedSentences:
        cfg = self.cfg
        if cfg.text == "sentences":
            return super().load_sentences()
        path, is_alone = hub.find_text(cfg.train_file, cfg.data), cfg.condition_on == "same"
        reader, views = (read_running_text, 2) if is_alone else (read_with_next, 4)
        return TokenizedSentences(path, self.tokenizer, cfg.max_length, reader, views)

    def forward(self, batch: Batch) -> Loss:
        return super().forward(self.prepare(batch))

    def h_gap(self, batch: Batch) -> float | None:
        return super().h_gap(self.prepare(batch))

    def prepare(self, batch: Batch) -> Batch:
        """With next sentences, rows alternate: a sentence, its next one, and both once more.

        Ablations have shapes of their own: the columns of a GPU's static shape are left out.
        """
        if not self.cfg.is_ablation:
            return batch
        batch = Batch(*(t[:, : batch.width] for t in batch.tensors()), batch.views)
        if self.cfg.condition_on == "same":
            return batch
        own, following = (batch.take(slice(i, None, 2), 2) for i in (0, 1))
        return BatchWithNext(*own.tensors(), following=following)

    def difference_loss(self, h: Tensor, batch: Batch) -> Loss:
        """The mean of the losses, so that lam keeps its meaning; counts are added.

        With the next sentence's edit (Table 3): 82.91 / 85.83; with both 83.41 / 85.82.
        """
        cfg = self.cfg
        batches = [] if cfg.condition_on == "next" else [batch]
        if cfg.condition_on != "same":
            batches.append(batch.following)
        if cfg.views == "first" and cfg.edit_as == "difference":
            h, batches = h[:: batch.views], [each.first_views() for each in batches]
        losses, metrics = zip(*(loss(self, h, each) for loss in self.losses for each in batches))
        added = {key: tuple(map(sum, zip(*(m[key] for m in metrics)))) for key in metrics[0]}
        return sum(losses) / len(losses), added


if __name__ == "__main__":
    run_main(partial(main, AblationConfig, AblationModel))
