"""The paper's ablations: what stands in the place of the difference prediction. None of their code was published.

    python diffcse.py --config small --objective masked                # Table 3: conditional masked language model
    python diffcse.py --config small --edit-with insert                # Table 4
    python diffcse.py --config small --edit-as negative --lam 1        # Table 15

Each is a function with the signature of diffcse.difference_prediction, (model, h, batch, V, room) -> loss, shares for the log:
    masked_tokens, corrected_tokens      what is predicted (Table 3)
    difference, positive, negative       what an edited sentence is used for (Table 15); the edit is one of
        replace, insert, delete          (Table 4)
    of_next                              any of them for the next sentence in place of h's own (Table 3)
    mean_of                              several at once

Where the paper says nothing the choice is in the docstring. Scores are the paper's, bert-base, STS-B dev / average transfer dev,
where DiffCSE has 84.56 / 85.95, SimCSE 81.47 / 83.91, and SimCSE with BatchNorm 82.22 / 85.66.
Letters: as in diffcse.py; n places. Edits of different rows are drawn independently, from torch's random numbers.
Not here: what needs no code of its own. --no-contrastive 54.48 / 83.46 (Table 3), --projector (Table 5), --generator (6), --mask-ratio (7), --lam (8).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import ranks
from bert import Bert, load_bert, places
from diffcse import Config, Prediction, Room, TrainingModel, discriminate, edit_sentences, edited_rows, replaced_token_loss, widen

# ----------------------------------------------------------------------------------------------------------------
# What is predicted (Table 3)


def mean_at(losses: Tensor) -> Tensor:
    """The mean over the places of all ranks; each adds its own. Shapes: (n,) -> ()."""
    return losses.sum() / ranks.total(torch.tensor(len(losses), device=losses.device)).clamp_min(1)


def masked_tokens(model: TrainingModel, h: Tensor, batch: tuple[Tensor, ...], V: int, room: Room) -> Prediction:
    """Conditional masked language model: D sees x' and h, and says what stood at the masked places.

    Table 3: 83.08 / 84.43, for the next sentence (which is Yang et al. 2020, CMLM) 75.82 / 85.68, for both 82.88 / 84.82.
    D's head is the pretrained model's own, trained on with it; no generator is needed. The loss is the mean over the masked places.
    """
    edited = edited_rows(model.cfg, V)
    h, x, mask, x_masked, selected = (t[edited] for t in (h, *batch))
    where = places(selected)  # (n,)
    states = model.discriminator(x_masked, mask, cls_vector=h, tokens=places(mask), wanted=where)  # (n, D)
    logits = model.head(states, model.discriminator.embeddings.word.weight)  # (n, vocabulary)
    truth = x.flatten()[where]
    right = (logits.argmax(-1) == truth).sum()
    return mean_at(F.cross_entropy(widen(logits), truth, reduction="none")), {"accuracy_masked": (right, torch.tensor(len(where), device=x.device))}


def corrected_tokens(model: TrainingModel, h: Tensor, batch: tuple[Tensor, ...], V: int, room: Room) -> Prediction:
    """Conditional corrective language model: D sees x'' and h, says which tokens were replaced, and what stood at the places that were masked.

    Table 3: 79.79 / 85.30. Meng et al. 2021 (COCO-LM), section 3: the word is copied from x'' with the probability that it was kept, else drawn from the vocabulary,
        p(x_t) = p_kept [x_t = x''_t] + (1 - p_kept) p_word(x_t)
    at masked places, where p_kept is not taught by this; it is by the replaced-token loss. The two are added with equal weight (each is a mean).
    """
    edited = edited_rows(model.cfg, V)
    h, x, mask, x_masked, selected = (t[edited] for t in (h, *batch))
    x_edited, replaced = edit_sentences(model.generator, x, x_masked, selected, mask, model.tokenizer, model.cfg, room)
    states = model.discriminator(x_edited, mask, cls_vector=h)  # (R, T, D)
    kept_or_not = model.head["copy"](states)  # (R, T, 2)
    detection = replaced_token_loss(kept_or_not, replaced, mask, model.cfg.pads_in_loss, model.cfg.reduction)
    where = places(selected)  # (n,)
    truth, at = x.flatten()[where], states.flatten(0, 1)[where]  # (n,), (n, D)
    words = widen(model.head["words"](at, model.discriminator.embeddings.word.weight)).log_softmax(-1)  # (n, vocabulary)
    kept, not_kept = widen(kept_or_not.detach().flatten(0, 1)[where]).log_softmax(-1).unbind(-1)  # (n,), (n,): log p
    drawn = not_kept + words.gather(1, truth[:, None])[:, 0]  # (n,)
    log_p = torch.where(x_edited.flatten()[where] == truth, torch.logaddexp(kept, drawn), drawn)
    right = (words.argmax(-1) == truth).sum()
    return detection + mean_at(-log_p), {"share_replaced": (replaced.sum(), mask.sum()), "accuracy_words": (right, torch.tensor(len(where), device=x.device))}


# ----------------------------------------------------------------------------------------------------------------
# How a sentence is edited (Table 4): -> x'' (R, T'') ids, changed (R, T'') bool, which is what D is asked, mask (R, T'')

Edit = tuple[Tensor, Tensor, Tensor]


def replace(model: TrainingModel, x: Tensor, mask: Tensor, x_masked: Tensor, selected: Tensor, room: Room) -> Edit:
    """Masked tokens, filled in by the generator: the paper's own. Changed are the tokens that are others than before. Table 4, "MLM 15%": 84.48 / 85.95."""
    x_edited, replaced = edit_sentences(model.generator, x, x_masked, selected, mask, model.tokenizer, model.cfg, room)
    return x_edited, replaced, mask


@torch.no_grad()
def insert(model: TrainingModel, x: Tensor, mask: Tensor, x_masked: Tensor, selected: Tensor, room: Room) -> Edit:
    """[MASK]s put in at mask_ratio of the length, anywhere between [CLS] and [SEP], and filled in by the generator. Changed are the tokens put in. Table 4: 82.20 / 85.96.

    The generator writes nowhere else, whatever --edit-scope says: what is not put in is x.
    """
    lengths, number = mask.sum(1), how_many(mask.sum(1) - 2, model.cfg.mask_ratio)  # (R,), (R,)
    at = torch.arange(int((lengths + number).max()) if len(x) else x.shape[1], device=x.device)  # (T'',)
    mask_edited = at < (lengths + number)[:, None]  # (R, T'')
    inserted = draw(inner(mask_edited), number)  # (R, T'')
    before = ((~inserted).cumsum(1) - 1).clamp_max(x.shape[1] - 1)  # (R, T''): where the others stood in x
    with_masks = x.gather(1, before).masked_fill(inserted, model.tokenizer.mask) * mask_edited
    temperature = model.cfg.edit_temperature if model.cfg.edit == "sample" else None
    words = model.generator.fill(with_masks, mask_edited, places(mask_edited), places(inserted), model.tokenizer.vocab_size, temperature)  # (n,)
    return with_masks.masked_scatter(inserted, words), inserted, mask_edited


def delete(model: TrainingModel, x: Tensor, mask: Tensor, x_masked: Tensor, selected: Tensor, room: Room) -> Edit:
    """mask_ratio of the tokens taken out. Changed are the tokens, [SEP] among them, right before which one or more are gone. Table 4: 82.59 / 85.97."""
    deleted = draw(inner(mask), how_many(mask.sum(1) - 2, model.cfg.mask_ratio))  # (R, T)
    gone_before = F.pad(deleted, (1, -1))  # (R, T): at the next token
    order = (deleted | ~mask).byte().argsort(dim=1, stable=True)  # (R, T): what stays comes first
    mask_edited = (mask & ~deleted).gather(1, order)
    return x.gather(1, order) * mask_edited, gone_before.gather(1, order) & mask_edited, mask_edited


def inner(mask: Tensor) -> Tensor:
    """All tokens but the first, [CLS], and the last, [SEP]. Shapes: (R, T) bool -> (R, T) bool."""
    at = torch.arange(mask.shape[1], device=mask.device)
    return (at > 0) & (at < mask.sum(1, keepdim=True) - 1)


def how_many(of: Tensor, share: float) -> Tensor:
    """Whole numbers that are share * of in the mean, the next below or above. Shapes: (R,) -> (R,)."""
    drawn = (share * of + torch.rand(of.shape, device=of.device)).floor().long()
    return torch.minimum(drawn, (share * of.double()).ceil().long())  # 15 + 0.99999994 is 16 in fp32


def draw(among: Tensor, number: Tensor) -> Tensor:
    """As many of each row's places as `number` says, all equally likely. Shapes: (R, T) bool, (R,) -> (R, T) bool."""
    order = torch.rand(among.shape, device=among.device).masked_fill(~among, 2).argsort(1).argsort(1)  # (R, T): places in a random order, others last
    return among & (order < number[:, None])


# ----------------------------------------------------------------------------------------------------------------
# What an edit is used for (Table 15)


def difference(model: TrainingModel, h: Tensor, batch: tuple[Tensor, ...], V: int, room: Room, edit: Callable[..., Edit]) -> Prediction:
    """D sees x'' and h, and says of every token whether it is changed. "Equivariance (Ours)" in Table 15. Each edit has a head of its own."""
    edited = edited_rows(model.cfg, V)
    h, *rows = (t[edited] for t in (h, *batch))
    x_edited, changed, mask = edit(model, *rows, room)
    return discriminate(model, model.head[edit.__name__], h, x_edited, changed, mask, room)


def compare(model: TrainingModel, h: Tensor, batch: tuple[Tensor, ...], V: int, room: Room, edit: Callable[..., Edit]) -> tuple[Tensor, Tensor, Tensor]:
    """h of every sentence's first view, its second view, and an edit of it, as logits of the first with all of the other two.

    f and the projector see the edits in a pass of their own (BatchNorm's means are then those of edits). Shapes: h (R, D), R = b V -> (b, B), (b, B), (b,) the number
    of each of the b sentences of this rank among all B.
    """
    x_edited, _, mask = edit(model, *(t[::V] for t in batch), room)
    B = room.sentences or len(x_edited)
    rows = ranks.part(B)
    c = model.encode(x_edited, mask, rows, B)  # (B, D)
    h_edited = model.projector(c if B > 1 else c.repeat(2, 1))[:B]  # (B, D); BatchNorm knows no single row, and makes this one zero
    with torch.autocast(h.device.type, enabled=False):
        first, second, edits = (F.normalize(widen(t), dim=-1, eps=1e-8) for t in (h[::V], ranks.gather(h[1::V].contiguous(), rows, B), h_edited))
        return first @ second.T / model.cfg.temperature, first @ edits.T / model.cfg.temperature, torch.arange(B, device=h.device)[rows]


def positive(model: TrainingModel, h: Tensor, batch: tuple[Tensor, ...], V: int, room: Room, edit: Callable[..., Edit]) -> Prediction:
    """A sentence's first view must find its edit among all edits, as it must find its second view. Added with weight lam.

    Table 15: MLM 73.59 / 83.33, insert 80.39 / 83.92, delete 78.58 / 81.80.
    """
    _, logits, own = compare(model, h, batch, V, room, edit)
    found = (logits.argmax(-1) == own).sum()
    loss = F.cross_entropy(logits, own, reduction="sum") / (room.sentences or len(own))
    return loss, {"accuracy_edits": (found, torch.tensor(len(own), device=h.device))}


def negative(model: TrainingModel, h: Tensor, batch: tuple[Tensor, ...], V: int, room: Room, edit: Callable[..., Edit]) -> Prediction:
    """The edits of all sentences are negatives beside the other sentences, as SimCSE's hard negatives are.

    Table 15: MLM 83.02 / 84.49, insert 55.65 / 79.86, delete 55.13 / 82.56. The loss is what they add to InfoNCE: log(sum over both) - log(sum over second views) =
    softplus(log(sum over edits) - log(sum over second views)). So with lam 1 the whole is contrastive_loss with edits as third views
    (where the train file has no third column).
    """
    seconds, edits, own = compare(model, h, batch, V, room, edit)
    loss = F.softplus(edits.logsumexp(1) - seconds.logsumexp(1)).sum() / (room.sentences or len(own))
    nearer = (edits.gather(1, own[:, None]) > seconds.gather(1, own[:, None])).sum()
    return loss, {"share_nearer": (nearer, torch.tensor(len(own), device=h.device))}  # edits that are nearer than the second view


# ----------------------------------------------------------------------------------------------------------------
# Whose edit (Table 3), and several at once


def of_next(model: TrainingModel, h: Tensor, batch: tuple[Tensor, ...], V: int, room: Room, predict: Callable[..., Prediction], row: int) -> Prediction:
    """The same with the edit of the next sentence beside h (row 1), or of h's own (row 0): rows of the batch take turns. Table 3: next 82.91 / 85.83, both 83.41 / 85.82."""
    return predict(model, h, tuple(t[row::2] for t in batch), V, room)


def mean_of(model: TrainingModel, h: Tensor, batch: tuple[Tensor, ...], V: int, room: Room, predictions: list[Callable[..., Prediction]]) -> Prediction:
    """The mean of the losses, so that lam means the same; counts together. Table 4, "combining all": 82.80 / 85.92."""
    losses, counts = zip(*(predict(model, h, batch, V, room) for predict in predictions))
    return sum(losses) / len(losses), {name: tuple(map(sum, zip(*(count[name] for count in counts)))) for name in counts[0]}


OBJECTIVES = {"masked": masked_tokens, "corrected": corrected_tokens}
USES = {"difference": difference, "positive": positive, "negative": negative}
EDITS = {"replace": [replace], "insert": [insert], "delete": [delete], "all": [replace, insert, delete]}


def pick(cfg: Config) -> Callable[..., Prediction]:
    """What stands in the place of diffcse.difference_prediction."""
    if cfg.objective in OBJECTIVES:
        predictions = [OBJECTIVES[cfg.objective]]
    else:
        predictions = [partial(USES[cfg.edit_as], edit=edit) for edit in EDITS[cfg.edit_with]]
    if cfg.condition_on != "same":
        texts = [1] if cfg.condition_on == "next" else [0, 1]
        predictions = [partial(of_next, predict=predict, row=row) for predict in predictions for row in texts]
    return partial(mean_of, predictions=predictions)


def discriminator(cfg: Config, folder: Path) -> tuple[Bert | None, Callable[[int], nn.Module] | None]:
    """D and what makes its head from its size, each None where there is none. Raises: UserError for a model without a masked-LM head where that is D's."""
    if cfg.edit_as != "difference":
        return None, None
    if cfg.objective == "replaced":
        return load_bert(folder), lambda D: nn.ModuleDict({edit.__name__: nn.Linear(D, 2) for edit in EDITS[cfg.edit_with]})
    mlm = load_bert(folder, mlm=True)
    return mlm.bert, lambda D: mlm.head if cfg.objective == "masked" else nn.ModuleDict({"copy": nn.Linear(D, 2), "words": mlm.head})
