"""Write it: twelve exercises, from the cosine matrix to a run that is resumed exactly.

    pytest exercises -k ex03        # checks the third; a message says what is wrong

Write each function in place of its `raise`; most need 3 to 10 lines, the longest 20. The docstring says what goes in and
comes out, with an example worked by hand. EXERCISES.md says what each is for, and has hints folded away. You need nothing
but torch, numpy and Python's own modules. Inputs must not be changed. The solutions are the repository's own functions:
answers.py says which.

Letters: B sentences, R rows of a batch, T tokens of a row with padding, D numbers of a vector, V words of the vocabulary,
H attention heads of d numbers each, P pairs, h the sentence vector.
"""

import json  # noqa: F401  (for you)
import math  # noqa: F401

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: F401
from torch import Tensor

# ----------------------------------------------------------------------------------------------------------------
# Session 1: the losses


def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Exercise 1. The cosine of every row of a with every row of b, without a loop.

    Shapes: float tensors a (n, D), b (m, D) -> (n, m): row i, column j is the cosine of a[i] and b[j].
    A row of zeros has no direction: its cosines are 0. Do not make a tensor of n * m * D numbers on the way.

        a = [[3, 4],      b = [[1,  0],      ->  [[0.6, -0.8, 1.0],
             [0, 2]]           [0, -5],           [0.0, -1.0, 0.8]]
                               [6,  8]]
    """
    raise NotImplementedError("exercise 1: cosine_matrix is not written yet")


def contrastive_loss(h: Tensor, temperature: float) -> Tensor:
    """Exercise 2. The contrastive loss of SimCSE and DiffCSE (paper section 3, equation 1).

    Sentence i has two views, h[i, 0] and h[i, 1]. First views ask and second views answer: among the second views of all
    sentences, which one is mine? The score of an answer is its cosine divided by the temperature. The loss of a sentence is
    minus the log of the softmax probability of its own second view, the loss of the batch is the mean over its sentences.
    Only this direction is used: second views do not ask. The loss must stay finite at a temperature of 0.001.
    Shapes: h (B, 2, D) float -> () float, with gradient to both views.

        h[0] = [[1, 0], [1, 0]], h[1] = [[0, 1], [0.6, 0.8]], temperature 0.5
        cosines [[1, 0.6], [0, 0.8]], scores [[2, 1.2], [0, 1.6]]
        sentence 0: -log softmax of the score 2 in its row, log(1 + e^-0.8) = 0.3711
        sentence 1: -log softmax of the score 1.6 in its row, log(1 + e^-1.6) = 0.1839; the loss is 0.2775
    """
    raise NotImplementedError("exercise 2: contrastive_loss is not written yet")


def mask_tokens(ids: Tensor, special: Tensor, mask_id: int, vocab_size: int, ratio: float,
                generator: torch.Generator) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Exercise 3. BERT's masking, 80/10/10: from x to x'.

    Every token that is not special is selected with probability `ratio`, each by its own draw, so that their number varies.
    Of the selected tokens, each again by its own draw, 80 % become mask_id, 10 % become a random id (any from 0 to
    vocab_size - 1, special ones included), and 10 % stay what they are; all of these count as selected. All random numbers
    come from `generator` (torch.rand(..., generator=generator)), so that one seed gives the same masks again.
    Shapes: ids (R, T) int64; special (R, T) bool, True at [CLS], [SEP] and padding -> x' (R, T) int64, selected (R, T) bool.

        ids = [[2, 57, 91, 64, 3, 0]], special = [[True, False, False, False, True, True]], mask_id 4, ratio 0.5
        one possible result: selected = [[False, True, False, True, False, False]], x' = [[2, 4, 91, 64, 3, 0]]
        (57 was masked; 64 was selected and stayed, as one selected token in ten does)
    """
    raise NotImplementedError("exercise 3: mask_tokens is not written yet")


def edit_sentences(generator: nn.Module, x: Tensor, x_masked: Tensor, mask: Tensor) -> Tensor:
    """Exercise 4. From x' to x'', as the published code does it.

    generator(x_masked, mask) is a masked language model and gives logits (R, T, V). x'' has the token with the highest logit
    at EVERY position, masked or not, with two exceptions: position 0 keeps x's [CLS], and padding has id 0. Call the generator
    with gradients switched off, and in the mode that it is in (train or eval).
    Shapes: x, x_masked (R, T) int64, mask (R, T) bool, False at padding -> x'' (R, T) int64.

        x = [[1, 5, 6, 2, 0]], x_masked = [[1, 3, 6, 2, 0]], mask = [[True, True, True, True, False]]
        tokens with the highest logits [[4, 7, 6, 2, 9]] -> x'' = [[1, 7, 6, 2, 0]]
    """
    raise NotImplementedError("exercise 4: edit_sentences is not written yet")


# ----------------------------------------------------------------------------------------------------------------
# Session 2: the discriminator, and what it is made of


def replaced_token_loss(logits: Tensor, x: Tensor, x_edited: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Exercise 5. Which tokens of x'' were replaced, and the loss of the discriminator that predicts it (the paper's L_RTD).

    A token is replaced where x'' differs from x; padding never is. logits[..., 0] is the logit of "kept", logits[..., 1] of
    "replaced". The loss is the mean over the real tokens (mask True, position 0 among them) of minus the log softmax of the
    right class; padding has no part in it.
    Shapes: logits (R, T, 2), x, x_edited (R, T) int64, mask (R, T) bool -> replaced (R, T) bool, loss () with gradient.

        x = [[1, 5, 6, 0]], x'' = [[1, 7, 6, 0]], mask = [[True, True, True, False]] -> replaced = [[False, True, False, False]]
        logits = [[[2, 0], [0, 1], [0, 0], [-1, 1]]]
        -> losses log(1 + e^-2) = 0.1269, log(1 + e^-1) = 0.3133, log 2 = 0.6931, none; the mean of the three is 0.3778
    """
    raise NotImplementedError("exercise 5: replaced_token_loss is not written yet")


def read_with_h(bert, ids: Tensor, mask: Tensor, h: Tensor) -> Tensor:
    """Exercise 6. The discriminator's forward pass: BERT reads x'' with h in the place of its [CLS].

    bert.embed(ids) gives the embeddings, (R, T) -> (R, T, D), after their LayerNorm and dropout. bert.layers is the list of
    layers, each a function of states and mask, (R, T, D), (R, T) -> (R, T, D). At position 0 the first layer reads h and
    nothing but h. The gradient must reach h, and the embeddings of the other positions. Do not write into the tensor that
    bert.embed gave: PyTorch may still need it for the backward pass.
    Shapes: ids (R, T) int64, mask (R, T) bool, h (R, D) -> the last layer's states (R, T, D).

        without any layers, R = 1, D = 2: embeddings [[[5, 5], [1, 2], [3, 4]]], h = [[7, 8]] -> [[[7, 8], [1, 2], [3, 4]]]
    """
    raise NotImplementedError("exercise 6: read_with_h is not written yet")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Exercise 7. Scaled dot-product attention with a padding mask (Vaswani et al. 2017), written out.

    Each query reads the values of all keys that are real tokens, weighted by the softmax over keys of q k / sqrt(d). A key at
    padding has weight 0 for every query, whatever the scores. Queries at padding are computed like the others. Every row has
    a real token. (F.scaled_dot_product_attention does all of it: it is for comparing.)
    Shapes: q, k, v (B, H, T, d), mask (B, T) bool, False at padding -> (B, H, T, d).

        B = H = d = 1, T = 3: q = [0, 1, 1], k = [1, 0, 5], v = [10, 20, 99], mask = [True, True, False]
        query 0: scores [0, 0], weights [1/2, 1/2] -> 15
        queries 1 and 2: scores [1, 0], weights [0.7311, 0.2689] -> 12.6894
    """
    raise NotImplementedError("exercise 7: attention is not written yet")


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}  # for exercise 8


def read_safetensors(path) -> dict[str, Tensor]:
    """Exercise 8. The tensors of a safetensors file, byte by byte: the format that pretrained weights are kept in.

    The file is: 8 bytes, the header's length n as an unsigned integer, lowest byte first; n bytes, the header, JSON in UTF-8;
    all other bytes are the data. The header maps each tensor's name to
        {"dtype": a key of DTYPES, "shape": [...], "data_offsets": [begin, end]}
    with bytes counted from where the DATA begins; tensors need not lie in the header's order. The name "__metadata__" is no
    tensor. Numbers lie row by row, lowest byte first. A shape may be [] (one number) or have a 0 in it (no numbers at all,
    which torch.frombuffer refuses). Raises: ValueError where the file ends before its length field, its header or the last
    byte of a tensor does.

        {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} is 54 = 0x36 characters. The file: the bytes
        36 00 00 00 00 00 00 00, the header, and at byte 62 of the file, which is byte 0 of the data,
        00 00 C0 3F 00 00 00 C0, so a = [1.5, -2]
    """
    raise NotImplementedError("exercise 8: read_safetensors is not written yet")


# ----------------------------------------------------------------------------------------------------------------
# Session 3: is it any good, and can it be stopped?


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Exercise 9. Spearman's rank correlation, written out: Pearson's correlation of the ranks.

    Equal values share the mean of the ranks they take up. Neither list is constant.
    Shapes: (P,), (P,) float64 -> a float between -1 and 1.

        a = [20, 10, 80, 20, 40]: ranks [2.5, 1, 5, 2.5, 4];  b = [4, 2, 1, 5, 3]: ranks [4, 2, 1, 5, 3]
        minus their mean 3: [-0.5, -2, 2, -0.5, 1] and [1, -1, -2, 2, 0] -> -3.5 / sqrt(9.5 * 10) = -0.3591
    """
    raise NotImplementedError("exercise 9: spearman is not written yet")


def alignment_and_uniformity(u: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    """Exercise 10. Two numbers about an embedding space (Wang and Isola 2020; the paper's Table 11). Smaller is better for both.

    Alignment: the mean of |u_i - v_i|^2 over the P pairs. Uniformity: put all n = 2P vectors in one list; the log of the mean
    of exp(-2 |x - y|^2) over all pairs of two different rows of it. Two rows may hold the same vector and are a pair then too;
    a row is not paired with itself.
    Shapes: u, v (P, D) float64, rows of length 1 -> two floats.

        u = [[1, 0], [1, 0]], v = [[1, 0], [0, 1]]: squared distances of the pairs 0 and 2 -> alignment 1
        of the 6 pairs among four rows three are 0 apart, three 2: uniformity log((3 * 1 + 3 * e^-4) / 6) = -0.6750
    """
    raise NotImplementedError("exercise 10: alignment_and_uniformity is not written yet")


def recall_at_k(u: np.ndarray, v: np.ndarray, k: int) -> float:
    """Exercise 11. How often a sentence finds its partner among its k nearest, in per cent (the paper's Table 10).

    u_i and v_i are partners. Each of the 2P sentences asks in turn, those of u and those of v; what it may find are all the
    others of both lists, but not itself. Near means a high cosine. Ties count in the partner's favour.
    Shapes: u, v (P, D) float64, rows of length 1 -> a float from 0 to 100.

        u = [[1, 0], [0, 1]], v = [[0.6, 0.8], [-1, 0]], k = 1
        u_0's cosines are u_1: 0, v_0: 0.6, v_1: -1. The nearest is v_0, its partner: right
        u_1: u_0: 0, v_0: 0.8, v_1: 0. The nearest is v_0: wrong         v_0: u_0: 0.6, u_1: 0.8, v_1: -0.6: wrong
        v_1: u_0: -1, u_1: 0, v_0: -0.6. The nearest is u_1: right       -> 50
        with k = 2 v_0 finds u_0 too, and u_1 finds v_1, which is as near as u_0 -> 100
    """
    raise NotImplementedError("exercise 11: recall_at_k is not written yet")


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Exercise 12, first half. All tensors that the rest of a run depends on, as a dict with names of your choice: a checkpoint.

    A safetensors file holds tensors and nothing else, so all values are tensors; they need not be copies, as the file is
    written at once. A run that is stopped after any step and goes on from this in a new process must come to the same
    weights, to the last bit, as one that was never stopped. The new process makes model and optimizer by the same code as
    before, and seeds each step by its number (torch.manual_seed), so random state need not be kept. There is no scheduler.
    Do not count on AdamW: keep whatever the optimizer holds. A parameter that had no gradient yet has no state there; what
    belongs to which parameter must survive that.

        nn.Linear(1, 1) and SGD without momentum: the weight and the bias. With AdamW: for each of the two also its two
        moments and its count of steps, which the bias correction reads.
    """
    raise NotImplementedError("exercise 12: state_of is not written yet")


def restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Exercise 12, second half. Puts back what state_of returned, into a newly made model and optimizer.

    The optimizer was given model.parameters() and goes on holding those very tensors: put values into them, do not put other
    tensors in their place.
    """
    raise NotImplementedError("exercise 12: restore is not written yet")
