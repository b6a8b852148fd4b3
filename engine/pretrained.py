"""The pretrained models that a run starts from, and whether they fit each other.

Without this file, a generator of another vocabulary would make edits that mean nothing.
"""

import torch

from bert import Bert, BertForMaskedLM, load_bert
from data import Tokenizer
from embed import check_pooling
from engine import hub
from engine.errors import UserError


def load_encoder(cfg) -> tuple[Tokenizer, Bert]:
    folder = hub.find_model(cfg.model)
    tokenizer, encoder = Tokenizer(folder), load_bert(folder, dropout=cfg.dropout)
    if cfg.max_length > encoder.max_length:
        raise UserError(f"--max-length is above the {encoder.max_length} positions of {cfg.model}")
    check_pooling(encoder, cfg.pooling)
    return tokenizer.check_mask(folder).check_fits(folder, encoder.cfg.vocab_size), encoder


def load_generator(cfg, tokenizer: Tokenizer) -> BertForMaskedLM:
    """The generator, which must share the encoder's vocabulary: its output ids are compared."""
    folder = hub.find_model(cfg.generator)
    generator = load_bert(folder, mlm=True)
    if Tokenizer(folder).vocabulary() != tokenizer.vocabulary():
        raise UserError(
            f"--generator {cfg.generator} has another vocabulary than --model {cfg.model}; use "
            "distilbert-base-uncased with bert-base-uncased, distilroberta-base with roberta-base"
        )
    W, max_length = generator.cfg.vocab_size, generator.bert.max_length
    if W < tokenizer.vocab_size or max_length < cfg.max_length:
        raise UserError(
            f"--generator {cfg.generator} has {W} words and {max_length} positions; at least "
            f"{tokenizer.vocab_size} and {cfg.max_length} (--max-length) are needed"
        )
    generator.head.bias.data[tokenizer.vocab_size :] = -torch.inf  # ids that no token has
    return generator
