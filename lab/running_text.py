"""Running text: documents, their sentences, a vocabulary, rows of ids.

A file has one paragraph or sentence per line, and an empty line between documents.
Not here: languages other than English; a check that the file keeps its sentences in order.
"""

import itertools
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from data import Tokenizer, file_format, read_lines
from engine.errors import UserError
from engine.tokens import TokenizedSentences

HELD_OUT = 1000  # paragraphs, in whole documents, that are only scored
CHARACTERS = 200  # in the vocabulary; others are [UNK]
MAX_LENGTH = 64  # tokens of a row, including [CLS] and [SEP]; 98 % of sentences are shorter
ABBREVIATIONS = frozenset(
    """Mr Mrs Ms Dr Prof St Mt Ft Gen Col Lt Capt Maj Sgt Cmdr Adm Gov Sen Rep Rev Hon Fr Sr Jr
    Messrs Mme Bros vs v c ca cf fl b d e.g i.e viz approx al eds vol Vol vols pp Nos Op op
    Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec""".split()
)
NUMBERED = frozenset("No no Nr p pt Pt Fig fig Sec sec Ch ch Art art".split())  # before a number
INITIALS = re.compile(r"(\w\.)*[^\W\d_]")
SENTENCE_END = re.compile(r"""([.!?]+)["'”’»)\]]*\s+(?=["'“‘«(\[]*(\w))""")


def split_sentences(paragraph: str) -> list[str]:
    """Cut after . ! or ? and white space, if a capital letter or a digit follows.

    Closing quotes and brackets stay with their sentence. No cut after a full stop that may belong
    to its word: one of ABBREVIATIONS, initials ("J. Smith", "U.S. Senate"), or "No. 5".
    A rule for English. Its errors were counted by hand: results/splitter.json.
    """
    sentences, start = [], 0
    for end in SENTENCE_END.finditer(paragraph):
        mark, following = end.groups()
        if not (following.isupper() or following.isdigit()):
            continue
        word = paragraph[start : end.start()].rpartition(" ")[2].lstrip("\"'“‘«([")
        numbered = word in NUMBERED and following.isdigit()
        if mark == "." and (word in ABBREVIATIONS or numbered or INITIALS.fullmatch(word)):
            continue
        sentences.append(paragraph[start : end.end()].rstrip())
        start = end.end()
    return [sentence for sentence in (*sentences, paragraph[start:].rstrip()) if sentence]


def read_with_next(path: str | Path) -> Iterator[tuple[str, str]]:
    """Each sentence with the next one of its document, streamed; the last one is left out."""
    if file_format(Path(path))[0] != ".txt":
        raise UserError(f"{path}: running text must be a .txt file (also .gz, .xz)")
    previous = ""
    for line in read_lines(Path(path)):
        for sentence in split_sentences(line.strip()):
            if previous:
                yield previous, sentence
            previous = sentence
        if not line.strip():
            previous = ""


def read_running_text(path: str | Path) -> Iterator[tuple[str]]:
    """The same sentences without the next ones, so that runs with and without them compare."""
    return ((sentence,) for sentence, _ in read_with_next(path))


# ------------------------------------------------------------------------------------------------
# For pretraining: documents -> vocabulary -> rows of ids


def read_documents(paths: Sequence[str]) -> list[list[str]]:
    """The paragraphs of each document. In a file without empty lines, every line is a document."""
    documents = []
    for path in paths:
        lines = [line.strip() for line in read_lines(Path(path))]
        if all(lines):
            documents += [[line] for line in lines]
        else:
            documents += [list(group) for full, group in itertools.groupby(lines, bool) if full]
    return documents


def hold_out(documents: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """Documents to train on, and HELD_OUT paragraphs of others, or a tenth of all if that is less.

    Raises: UserError if no document is left to train on.
    """
    order = np.random.default_rng([0, 0]).permutation(len(documents)).tolist()
    count = min(HELD_OUT, math.ceil(sum(map(len, documents)) / 10))
    held_out = []
    while order and len(held_out) < count:
        held_out += documents[order.pop(0)]
    if not order:
        raise UserError(f"{len(documents)} documents are too few (an empty line ends a document)")
    return [documents[i] for i in order], held_out[:count]


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
        raise UserError(f"--vocab is {size}, but the text has only {len(vocabulary)} pieces twice")
    words = sorted(vocabulary, key=vocabulary.get)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        return Tokenizer(folder)


class Rows(TokenizedSentences):
    """Consecutive sentences of a document joined to rows: long rows teach words by their context.

    A length is drawn for each row, between a quarter of MAX_LENGTH and MAX_LENGTH tokens; the row
    takes sentences until the next one would exceed it.
    Attributes: following, the number of the next row; for the last one of a document, its own.
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
        kept[self.starts[:-1][~begins]] = False  # [CLS] of a sentence that continues a row
        kept[self.starts[:-1][~begins] - 1] = False  # and the [SEP] before it
        starts = np.append(self.starts[:-1][begins], len(self.ids))
        self.starts = np.append(0, kept.cumsum())[starts]
        self.ids = self.ids[kept]
        last = np.cumsum(list(map(len, documents))) - 1  # sentence of each document
        self.following = np.arange(1, len(self) + 1)
        self.following[begins.cumsum()[last] - 1] -= 1

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
            for start in range(0, len(order), 16_384):
                pool = order[start : start + 16_384]
                pool = pool[np.argsort(lengths[pool], kind="stable")]
                cuts = np.flatnonzero(np.diff(lengths[pool].cumsum() // batch_size)) + 1
                batches = np.split(pool, cuts)
                for i in rng.permutation(len(batches)):
                    yield batches[i]
