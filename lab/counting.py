"""What counting the words of a text says about them: vectors and weights, without training.

SIF (Arora et al. 2017) makes a sentence's vector of them: the weighted mean of its words' vectors.
"""

import numpy as np
import torch
from torch import Tensor

from data import Tokenizer
from engine.errors import UserError
from engine.tokens import TokenizedSentences

RARE = 3e-4  # a word of this frequency weighs half as much as a very rare one
WINDOW = 5  # words on each side that count as co-occurring
MAX_TOKENS = 20_000_000  # from the text's start, in which pairs of words are counted


def positive_pmi(rows: TokenizedSentences, tokenizer: Tokenizer) -> Tensor:
    """Positive pointwise mutual information (PPMI) of words within WINDOW. Shapes: -> (W, W).

    max(0, log(p(a, b) / (p(a) p(b)))), p(b) smoothed by the power 0.75 (Levy, Goldberg and Dagan
    2015), without special tokens. The (W, W) arrays take 12 W^2 bytes, 0.8 GB for 8,192 words.
    """
    W = tokenizer.vocab_size
    ids = rows.ids[:MAX_TOKENS].astype(np.int64)
    row = np.searchsorted(rows.starts, np.arange(len(ids)), side="right")  # of each token
    is_word = ~np.isin(ids, tokenizer.special_ids)
    counts = np.zeros(W * W, np.float32)
    for distance in range(1, WINDOW + 1):
        left, right = slice(None, -distance), slice(distance, None)
        counted = (row[left] == row[right]) & is_word[left] & is_word[right]
        counts += np.bincount((ids[left] * W + ids[right])[counted], minlength=W * W)
    counts = torch.from_numpy(counts).view(W, W)
    counts = counts + counts.T
    p_a = counts.sum(1) / counts.sum()
    p_b = counts.sum(0).pow(0.75) / counts.sum(0).pow(0.75).sum()
    chance = (p_a[:, None] * p_b).clamp_min_(1e-30)  # where it is 0, so is the count
    return counts.div_(counts.sum()).div_(chance).clamp_(min=1).log_()


def word_vectors(rows: TokenizedSentences, tokenizer: Tokenizer, size: int) -> Tensor:
    """U sqrt(S) of the PMI's SVD (Levy and Goldberg 2014), rotated at random. Shapes: -> (W, size).

    The rotation makes all coordinates equally strong. Raises: UserError for a text of a few words.
    """
    if size > (W := tokenizer.vocab_size):
        raise UserError(f"--hidden is {size}; it must be at most the size of the vocabulary, {W}")
    pmi, q = positive_pmi(rows, tokenizer), min(size + 32, W)
    if not (pmi > 0).any():  # nor if it is NaN
        raise UserError(
            "--text is too short: no two words occur together more often than by chance"
        )
    U, S, _ = torch.svd_lowrank(pmi, q=q, niter=4)
    rotation = torch.linalg.qr(torch.randn(size, size))[0]
    return (U * S.sqrt())[:, :size] @ rotation


def log_frequency(counts: np.ndarray) -> Tensor:
    """Of each word, counting each once more, so that none is 0. Shapes: (W,) -> (W,)."""
    counts = torch.from_numpy(counts + 1).float()
    return (counts / counts.sum()).log()


def word_weights(counts: np.ndarray, special_ids: list[int]) -> Tensor:
    """RARE / (RARE + frequency), 0 for special tokens. Shapes: (W,) -> (W,).

    Frequent words such as "the" say little about a sentence (Arora et al. 2017, SIF).
    """
    is_word = ~np.isin(np.arange(len(counts)), special_ids)
    weights = is_word * RARE / (RARE + counts / counts[is_word].sum())
    return torch.from_numpy(weights).float()
