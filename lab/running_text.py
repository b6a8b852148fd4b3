"""Running text: paragraphs to sentences, each with the next one (`python -m lab.ablations`).

The file has one paragraph or sentence per line, and an empty line between documents.
Not here: languages other than English; a check that the file keeps its sentences in order.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data import file_format, read_lines
from engine.errors import UserError

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
