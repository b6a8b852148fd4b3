"""Text for pretraining: a vocabulary, rows of ids, masked batches.

Not here: languages without spaces.
"""

import itertools
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch

from data import Batch, Tokenizer, mask_tokens
from diffcse import derive_seed
from engine.errors import UserError
from engine.hub import find_model
from engine.tokens import TokenizedSentences
from lab.running_text import hold_out, read_documents, split_sentences

CHARACTERS = 200  # in the vocabulary; others are [UNK]
MAX_LENGTH = 64  # tokens of a row, including [CLS] and [SEP]; 98 % of sentences are shorter
MASK_RATIO = 0.20
POOL = 16_384  # rows that are sorted by length together


def train_vocabulary(documents: list[list[str]], size: int) -> Tokenizer:
    """A lower-cased WordPiece vocabulary of exactly `size`.

    The library numbers single characters in random order, and with them breaks the ties between
    merges. So they are given here, by frequency, as if they were special tokens.
    """
    backend = tokenizers.BertWordPieceTokenizer(lowercase=True)._tokenizer
    paragraphs, raw, counts = list(itertools.chain.from_iterable(documents)), Counter(), Counter()
    for paragraph in paragraphs:
        raw.update(paragraph)
    for character, count in raw.items():
        for plain in backend.normalizer.normalize_str(character).split():
            counts.update(dict.fromkeys(plain, count))
    alphabet = sorted(counts, key=lambda c: (-counts[c], c))[: min(CHARACTERS, size // 4)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *alphabet]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=pieces + [f"##{c}" for c in alphabet],
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(paragraphs, trainer)
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if len(vocabulary) != size:
        raise UserError(f"--vocab is {size}, but only {len(vocabulary)} pieces occur twice")
    words = sorted(vocabulary, key=vocabulary.get)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        return Tokenizer(folder)


class Rows(TokenizedSentences):
    """Consecutive sentences of a document joined to rows: long rows teach words by their context.

    A length is drawn for each row, between a quarter of MAX_LENGTH and MAX_LENGTH tokens. A row
    takes its first sentence, and further ones while they fit.
    """

    def __init__(self, documents: list[list[str]], tokenizer: Tokenizer, seed: int):
        """documents: the paragraphs of each."""
        documents = [[s for p in document for s in split_sentences(p)] for document in documents]
        sentences = ((sentence,) for document in documents for sentence in document)
        super().__init__(sentences, tokenizer, MAX_LENGTH, views=1)
        rng, lengths = np.random.default_rng([seed, 3]), iter(np.diff(self.starts) - 2)
        begins = []  # whether a sentence begins a row
        for document in documents:
            space = -1
            for _, length in zip(document, lengths):  # without [CLS] and [SEP]
                begins.append(length > space)
                if begins[-1]:
                    space = rng.integers(MAX_LENGTH // 4, MAX_LENGTH + 1) - 2
                space -= length
        begins = np.array(begins)
        kept = np.ones(len(self.ids), bool)
        cls = self.starts[:-1]  # position of each sentence's [CLS]
        kept[cls[~begins]] = False  # of a sentence that continues a row
        kept[cls[~begins] - 1] = False  # and the [SEP] before it
        starts = np.append(cls[begins], len(self.ids))
        self.starts = np.append(0, kept.cumsum())[starts]
        self.ids, self.tokenizer = self.ids[kept], tokenizer
        self.checksum = zlib.crc32(self.ids) + zlib.crc32(self.starts)

    def draw(self, batch_size: int, seed: int) -> Iterator[np.ndarray]:
        """The numbers of each step's rows, without end: rows of similar length, about batch_size
        tokens.

        Each epoch's random order is cut into pools. A pool is sorted by length and cut into
        batches, which are taken in random order. So they have little padding, from all the text.
        """
        lengths = np.diff(self.starts)
        for epoch in itertools.count():
            rng = np.random.default_rng([seed, 1, epoch])
            order = rng.permutation(len(self))
            for start in range(0, len(order), POOL):
                pool = order[start : start + POOL]
                pool = pool[np.argsort(lengths[pool], kind="stable")]
                cuts = np.flatnonzero(np.diff(lengths[pool].cumsum() // batch_size)) + 1
                batches = np.split(pool, cuts)
                for i in rng.permutation(len(batches)):
                    yield batches[i]

    def batches(self, batch_size: int, seed: int, first: int) -> Iterator[Batch]:
        """The batch of each step from `first` on, a function of (seed, step), without end."""
        drawn = itertools.islice(enumerate(self.draw(batch_size, seed)), first, None)
        for step, numbers in drawn:
            x, mask = self.rows(numbers)
            rng = torch.Generator().manual_seed(derive_seed(seed, 2, step))
            masked = mask_tokens(x, self.tokenizer, MASK_RATIO, "80-10-10", rng)
            yield Batch(x, mask, *masked, views=1)


def read_rows(
    files: tuple[str, ...], model: str, vocab: int, seed: int
) -> tuple[Tokenizer, Rows, list[str]]:
    """The vocabulary (of `model`, or else a new one), the rows, and the held-out paragraphs."""
    documents, held_out = hold_out(read_documents(files))
    if not model:
        tokenizer = train_vocabulary(documents, vocab)
    else:
        tokenizer = Tokenizer(find_model(model)).check_mask(model)
    return tokenizer, Rows(documents, tokenizer, seed), held_out
