"""Write it: twelve exercises, from the cosine matrix to a run that resumes exactly.

    pytest exercises -k ex03        # tests the third; the message says what is wrong

Replace each `raise` by a function body; most need 3 to 10 lines, the longest 20. The docstring
gives inputs, outputs and an example worked by hand. EXERCISES.md says what each is for, and has
hints. You need torch, numpy and the standard library only. Never change the inputs. The solutions
are the repository's own functions, see answers.py.

Shapes: B sentences, R rows of a batch, T tokens of a row including padding, D numbers of a vector,
W words of the vocabulary, H attention heads of d numbers each, P pairs; h is the sentence vector.
"""

import json  # noqa: F401  (for you)
import math  # noqa: F401

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: F401
from torch import Tensor

# ------------------------------------------------------------------------------------------------
# Session 1: the losses


def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Exercise 1. The cosine of every row of a with every row of b, without a loop.

    Shapes: float tensors a (n, D), b (m, D) -> (n, m); row i, column j is the cosine of a[i], b[j].
    The cosines of a row of zeros are 0. Do not create a tensor of n * m * D numbers.

        a = [[3, 4],      b = [[1,  0],      ->  [[0.6, -0.8, 1.0],
             [0, 2]]           [0, -5],           [0.0, -1.0, 0.8]]
                               [6,  8]]
    """
    raise NotImplementedError("exercise 1: cosine_matrix is not written yet")


def contrastive_loss(h: Tensor, temperature: float) -> Tensor:
    """Exercise 2. The contrastive loss of SimCSE and DiffCSE (paper section 3, equation 1).

    Sentence i has two views, h[i, 0] and h[i, 1]. Each first view is a query: which of the second
    views of all sentences is of the same sentence? The logits are cosines divided by the
    temperature. A sentence's loss is the negative log of the softmax probability of its own second
    view; the batch's loss is the mean over sentences. Second views are not queries. The loss must
    be finite at a temperature of 0.001.
    Shapes: h (B, 2, D) float -> () float, with a gradient to both views.

        h[0] = [[1, 0], [1, 0]], h[1] = [[0, 1], [0.6, 0.8]], temperature 0.5
        cosines [[1, 0.6], [0, 0.8]], logits [[2, 1.2], [0, 1.6]]
        sentence 0: -log softmax of the logit 2 in its row, log(1 + e^-0.8) = 0.3711
        sentence 1: -log softmax of the logit 1.6 in its row, log(1 + e^-1.6) = 0.1839
        loss 0.2775
    """
    raise NotImplementedError("exercise 2: contrastive_loss is not written yet")


def mask_tokens(
    ids: Tensor,
    special: Tensor,
    mask_id: int,
    vocab_size: int,
    ratio: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Exercise 3. BERT's masking, 80/10/10: from x to x'.

    Each token that is not special is selected with probability `ratio`, independently, so the
    number of selected tokens varies. Of the selected tokens, again independently, 80 % become
    mask_id, 10 % become a random id (any from 0 to vocab_size - 1, special ones included), and 10 %
    stay unchanged; all of them count as selected. All random numbers come from `generator`
    (torch.rand(..., generator=generator)), so the same seed gives the same result.
    Shapes: ids (R, T) int64; special (R, T) bool, True at [CLS], [SEP] and padding
    -> x' (R, T) int64, selected (R, T) bool.

        ids = [[2, 57, 91, 64, 3, 0]], special = [[True, False, False, False, True, True]]
        mask_id 4, ratio 0.5; one possible result:
        selected = [[False, True, False, True, False, False]], x' = [[2, 4, 91, 64, 3, 0]]
        (57 was masked; 64 was selected and stayed, as one selected token in ten does)
    """
    raise NotImplementedError("exercise 3: mask_tokens is not written yet")


def edit_sentences(generator: nn.Module, x: Tensor, x_masked: Tensor, mask: Tensor) -> Tensor:
    """Exercise 4. From x' to x'', as in the published code.

    generator(x_masked, mask) is a masked language model and returns logits (R, T, W). x'' has the
    token with the highest logit at EVERY position, masked or not, with two exceptions: position 0
    keeps x's [CLS], and padding has id 0. Call the generator without gradients, and leave it in its
    mode (train or eval).
    Shapes: x, x_masked (R, T) int64, mask (R, T) bool, False at padding -> x'' (R, T) int64.

        x = [[1, 5, 6, 2, 0]], x_masked = [[1, 3, 6, 2, 0]]
        mask = [[True, True, True, True, False]]
        tokens with the highest logits [[4, 7, 6, 2, 9]] -> x'' = [[1, 7, 6, 2, 0]]
    """
    raise NotImplementedError("exercise 4: edit_sentences is not written yet")


# ------------------------------------------------------------------------------------------------
# Session 2: the discriminator and its parts


def replaced_token_loss(
    logits: Tensor, x: Tensor, x_edited: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Exercise 5. The discriminator's labels and its loss (the paper's L_RTD).

    A token is replaced where x'' differs from x; padding never is. logits[..., 0] is the logit of
    "original", logits[..., 1] of "replaced". The loss is the mean over tokens (mask True, position
    0 included) of the negative log softmax of the label. Padding is ignored.
    Shapes: logits (R, T, 2), x, x_edited (R, T) int64, mask (R, T) bool
    -> replaced (R, T) bool, loss () with a gradient.

        x = [[1, 5, 6, 0]], x'' = [[1, 7, 6, 0]], mask = [[True, True, True, False]]
        -> replaced = [[False, True, False, False]]
        logits = [[[2, 0], [0, 1], [0, 0], [-1, 1]]]
        -> losses log(1 + e^-2) = 0.1269, log(1 + e^-1) = 0.3133, log 2 = 0.6931; their mean 0.3778
    """
    raise NotImplementedError("exercise 5: replaced_token_loss is not written yet")


def read_with_h(bert, ids: Tensor, mask: Tensor, h: Tensor) -> Tensor:
    """Exercise 6. The discriminator's forward pass: BERT reads x'' with h in place of [CLS].

    bert.embeddings(ids) is (R, T) -> (R, T, D), after LayerNorm and dropout. bert.layers is the
    list of layers, each a function layer(x, mask) of (R, T, D), (R, T) -> (R, T, D). At position 0
    the first layer reads h alone. The gradient must reach h and the embeddings of the other
    positions. Do not write into the tensor that bert.embeddings returned: the backward pass may
    need it.
    Shapes: ids (R, T) int64, mask (R, T) bool, h (R, D) -> the last layer's output (R, T, D).

        without layers, R = 1, D = 2:
        embeddings [[[5, 5], [1, 2], [3, 4]]], h = [[7, 8]] -> [[[7, 8], [1, 2], [3, 4]]]
    """
    raise NotImplementedError("exercise 6: read_with_h is not written yet")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Exercise 7. Scaled dot-product attention with a padding mask (Vaswani et al. 2017).

    The output of a query is the mean of the values, weighted by the softmax over keys of
    q k / sqrt(d). A key at padding has weight 0 for every query, whatever its score. Queries at
    padding are computed like the others. Every row has at least one token.
    (F.scaled_dot_product_attention does all of this; write it out, and compare.)
    Shapes: q, k, v (B, H, T, d), mask (B, T) bool, False at padding -> (B, H, T, d).

        B = H = d = 1, T = 3: q = [0, 1, 1], k = [1, 0, 5], v = [10, 20, 99]
        mask = [True, True, False]
        query 0: scores [0, 0], weights [1/2, 1/2] -> 15
        queries 1 and 2: scores [1, 0], weights [0.7311, 0.2689] -> 12.6894
    """
    raise NotImplementedError("exercise 7: attention is not written yet")


# For exercise 8
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path) -> dict[str, Tensor]:
    """Exercise 8. The tensors of a safetensors file, the usual format of pretrained weights.

    The file is: 8 bytes, the header's length n as a little-endian unsigned integer; n bytes, the
    header, JSON in UTF-8; then the data. The header maps each tensor's name to
        {"dtype": a key of DTYPES, "shape": [...], "data_offsets": [begin, end]}
    in bytes from the start of the DATA; the header may list tensors in any order. The name
    "__metadata__" is not a tensor. Numbers are little-endian and in row-major order. A shape may be
    [] (one number) or contain 0 (no numbers, which torch.frombuffer refuses). Raises: ValueError
    if the file ends within its length field, its header or a tensor.

        {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} has 54 = 0x36 characters. The file:
        the bytes 36 00 00 00 00 00 00 00, the header, and from byte 62 of the file, which is byte 0
        of the data, 00 00 C0 3F 00 00 00 C0, so a = [1.5, -2]
    """
    raise NotImplementedError("exercise 8: read_safetensors is not written yet")


# ------------------------------------------------------------------------------------------------
# Session 3: evaluation and checkpoints


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Exercise 9. Spearman's rank correlation: Pearson's correlation of the ranks.

    Equal values share the mean of their ranks. Neither list is constant.
    Shapes: (P,), (P,) float64 -> a float between -1 and 1.

        a = [20, 10, 80, 20, 40]: ranks [2.5, 1, 5, 2.5, 4]
        b = [4, 2, 1, 5, 3]: ranks [4, 2, 1, 5, 3]
        minus their mean 3: [-0.5, -2, 2, -0.5, 1] and [1, -1, -2, 2, 0]
        -> -3.5 / sqrt(9.5 * 10) = -0.3591
    """
    raise NotImplementedError("exercise 9: spearman is not written yet")


def alignment_and_uniformity(u: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    """Exercise 10. Two measures of an embedding space (Wang and Isola 2020; the paper's Table 11).

    Smaller is better for both. Alignment: the mean of |u_i - v_i|^2 over the P pairs. Uniformity:
    of all n = 2P vectors in one list, the log of the mean of exp(-2 |x - y|^2) over all pairs of
    two different rows. Two rows that hold the same vector are such a pair; a row is not paired with
    itself.
    Shapes: u, v (P, D) float64, rows of length 1 -> two floats.

        u = [[1, 0], [1, 0]], v = [[1, 0], [0, 1]]: squared distances 0 and 2 -> alignment 1
        of the 6 pairs of four rows, three have the squared distance 0 and three 2:
        uniformity log((3 * 1 + 3 * e^-4) / 6) = -0.6750
    """
    raise NotImplementedError("exercise 10: alignment_and_uniformity is not written yet")


def recall_at_k(u: np.ndarray, v: np.ndarray, k: int) -> float:
    """Exercise 11. How often a sentence's partner is among its k nearest (the paper's Table 10).

    u_i and v_i are partners. Each of the 2P sentences, of u and of v, is a query. Its candidates
    are all other sentences of both lists. Nearest means the highest cosine. The partner wins ties.
    Shapes: u, v (P, D) float64, rows of length 1 -> a percentage, a float from 0 to 100.

        u = [[1, 0], [0, 1]], v = [[0.6, 0.8], [-1, 0]], k = 1
        u_0: cosines u_1 0, v_0 0.6, v_1 -1. The nearest is v_0, its partner: found
        u_1: cosines u_0 0, v_0 0.8, v_1 0. The nearest is v_0: not found
        v_0: cosines u_0 0.6, u_1 0.8, v_1 -0.6. The nearest is u_1: not found
        v_1: cosines u_0 -1, u_1 0, v_0 -0.6. The nearest is u_1, its partner: found    -> 50
        with k = 2, v_0 finds u_0, and u_1 finds v_1, which is as near as u_0    -> 100
    """
    raise NotImplementedError("exercise 11: recall_at_k is not written yet")


def state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Exercise 12, first half. A checkpoint: all tensors that the rest of a run depends on.

    The names are your choice. All values must be tensors, because a safetensors file holds nothing
    else. They need not be copies, because the file is written at once. A run that is stopped after
    any step and continues from this checkpoint in a new process must reach the same weights, to the
    last bit, as a run that was not stopped. The new process creates model and optimizer by the same
    code, and seeds each step by its number (torch.manual_seed), so no random state is needed. There
    is no scheduler. Do not assume AdamW: save whatever state the optimizer has. A parameter without
    a gradient so far has no state; each other parameter must still get its own state back.

        nn.Linear(1, 1) and SGD without momentum: the weight and the bias. With AdamW also, for each
        of the two, its two moments and its number of steps, which the bias correction reads.
    """
    raise NotImplementedError("exercise 12: state_dict is not written yet")


def load_state_dict(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Exercise 12, second half. Load what state_dict returned into a new model and optimizer.

    The optimizer holds the tensors of model.parameters(): copy values into these tensors instead of
    replacing them.
    """
    raise NotImplementedError("exercise 12: load_state_dict is not written yet")
