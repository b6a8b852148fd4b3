"""The solutions of write_it.py: the repository's own functions, under the exercises' names.

    pytest exercises --answers reference      # the same tests of these

Look here when you have finished or are stuck. Each line names the function that is the solution;
the code here only converts between the two signatures.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import bert as bert_py
import data
import diffcse
import eval_sts
from embed import l2_normalize
from engine import checkpoint, fast
from lab import analysis


def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(l2_normalize(a.numpy()) @ l2_normalize(b.numpy()).T)


def contrastive_loss(h: Tensor, temperature: float) -> Tensor:
    return diffcse.contrastive_loss(h, temperature)[0]


def mask_tokens(
    ids: Tensor,
    special: Tensor,
    mask_id: int,
    vocab_size: int,
    ratio: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    special_ids = sorted(set(ids[special].tolist()))
    tokenizer = SimpleNamespace(special_ids=special_ids, mask_id=mask_id, vocab_size=vocab_size)
    return data.mask_tokens(ids, tokenizer, ratio, "80-10-10", generator)


def edit_sentences(generator, x: Tensor, x_masked: Tensor, mask: Tensor) -> Tensor:
    def predict_tokens(ids, mask, positions, temperature):  # of bert.BertForMaskedLM
        return torch.where(positions, generator(ids, mask).argmax(-1), ids)

    generator_with_predict = SimpleNamespace(predict_tokens=predict_tokens)
    batch = data.Batch(x, mask, x_masked, x_masked != x)
    return diffcse.edit_sentences(generator_with_predict, batch, None, diffcse.Config())[0]


def replaced_token_loss(
    logits: Tensor, x: Tensor, x_edited: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    replaced = (x_edited != x) & mask  # the last line of diffcse.edit_sentences
    return replaced, diffcse.replaced_token_loss(logits, replaced, mask, False, "mean")[0]


def read_with_h(bert, ids: Tensor, mask: Tensor, h: Tensor) -> Tensor:
    return bert(ids, mask, cls_vector=h)  # bert.Bert.forward


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    # bert.SelfAttention calls F.scaled_dot_product_attention; engine/fast.py has it written out.
    return fast.attention(q, k, v, mask[:, None, None, :], 0.0)


read_safetensors = bert_py.read_safetensors
spearman = eval_sts.spearman


def alignment_and_uniformity(u: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    ratings = np.full(len(u), 5.0)
    return analysis.alignment(u, v, ratings, threshold=4), analysis.uniformity(u, v)


def recall_at_k(u: np.ndarray, v: np.ndarray, k: int) -> float:
    return analysis.recall(u, v, np.full(len(u), 5.0), ks=(k,))[f"recall@{k}"]


def state_dict(model, optimizer) -> dict[str, Tensor]:
    return checkpoint.state_dict(model, optimizer, pending=[])


def load_state_dict(tensors: dict[str, Tensor], model, optimizer) -> None:
    checkpoint.load_state_dict(tensors, model, optimizer)
