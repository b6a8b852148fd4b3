"""Running text: documents and their sentences.

A file has one paragraph or sentence per line, and an empty line between documents.
Not here: languages other than English; a check that the file keeps its sentences in order.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data import file_format, read_lines
from engine.errors import UserError

HELD_OUT = 1000  # paragraphs, in whole documents, that are only scored
ABBREVIATIONS = frozenset(
    """Mr Mrs Ms Dr Prof St Mt Ft Gen Col Lt Capt Maj Sgt Cmdr Adm Gov Sen Rep Rev Hon Fr Sr Jr
    Messrs Mme Bros vs ca cf fl viz approx al eds vol Vol vols pp Nos Op op
    Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec""".split()
)
NUMBERED = frozenset("No no Nr pt Pt Fig fig Sec sec Ch ch Art art".split())  # before a number
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


def read_documents(paths: Sequence[str]) -> list[list[str]]:
    """The paragraphs of each document. If no empty line separates lines of a file, each line is a
    document."""
    documents = []
    for path in paths:
        lines = [line.strip() for line in read_lines(Path(path))]
        groups = [list(group) for full, group in itertools.groupby(lines, bool) if full]
        documents += groups if len(groups) > 1 else [[line] for group in groups for line in group]
    return documents


def hold_out(documents: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """Documents to train on, and HELD_OUT paragraphs of others, or a tenth of all if that is less.

    The other paragraphs of the last held-out document are not used.
    Raises: UserError if no document is left to train on.
    """
    order = np.random.default_rng([0, 0]).permutation(len(documents)).tolist()
    count = min(HELD_OUT, math.ceil(sum(map(len, documents)) / 10))
    held_out = []
    while order and len(held_out) < count:
        held_out += documents[order.pop(0)]
    if not order:
        raise UserError(f"too few documents: {len(documents)} (an empty line ends a document)")
    return [documents[i] for i in order], held_out[:count]
