"""The solutions of write_it.py: the repository's own functions, under the exercises' names.

    pytest exercises --answers reference      # the same checks against these

Look when you are through, or stuck: where each comes from is in its line, and the function there is the solution, with what
a whole program needs besides. What is written here only turns one signature into the other.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import bert as bert_py
import data
import diffcse
import eval_sts
import run
from config import Config
from embed import unit
from lab import analysis


def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(unit(a.numpy()) @ unit(b.numpy()).T)  # embed.unit, as docs.retrieval_scores and DiffCSE.search use it


def contrastive_loss(h: Tensor, temperature: float) -> Tensor:
    return diffcse.contrastive_loss(h, temperature)[0]


def mask_tokens(ids: Tensor, special: Tensor, mask_id: int, vocab_size: int, ratio: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokenizer = SimpleNamespace(special_ids=sorted(set(ids[special].tolist())), mask=mask_id, vocab_size=vocab_size)
    return data.mask_tokens(ids, tokenizer, ratio, "80-10-10", generator)


def edit_sentences(generator, x: Tensor, x_masked: Tensor, mask: Tensor) -> Tensor:
    def fill(ids, mask, tokens, where, vocab_size, temperature):  # as BertForMaskedLM.fill, which makes logits only where they are asked for
        return generator(ids, mask).flatten(0, 1)[where].argmax(-1)

    return diffcse.edit_sentences(SimpleNamespace(fill=fill), x, x_masked, mask, mask, SimpleNamespace(vocab_size=None), Config())[0]


def replaced_token_loss(logits: Tensor, x: Tensor, x_edited: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    replaced = (x_edited != x) & mask  # the last line of diffcse.edit_sentences
    return replaced, diffcse.replaced_token_loss(logits, replaced, mask, pads_in_loss=False)


def read_with_h(bert, ids: Tensor, mask: Tensor, h: Tensor) -> Tensor:
    return bert.whole(ids, mask, cls_vector=h)  # bert.Bert.forward


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return bert_py.attention(q, k, v, mask, dropout=0.0)


read_safetensors = bert_py.read_safetensors
spearman = eval_sts.spearman


def alignment_and_uniformity(u: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    return analysis.alignment(u, v, ratings=np.full(len(u), 5.0), threshold=4), analysis.uniformity(u, v)


def recall_at_k(u: np.ndarray, v: np.ndarray, k: int) -> float:
    return analysis.recall(u, v, ratings=np.full(len(u), 5.0), ks=(k,))[f"recall@{k}"]


def state_of(model, optimizer) -> dict[str, Tensor]:
    return run.state_of(model, optimizer, window=[])


def restore(tensors: dict[str, Tensor], model, optimizer) -> None:
    run.restore(tensors, model, optimizer)
