"""The documentation that every machine with Python, NumPy and PyTorch has, as sentences to learn from.

    python docs.py                      # counts, and a few samples of each

    documentation_sentences(exclude)    the English sentences of docstrings and language reference: a corpus
    same_function_pairs()               a function as two libraries' authors sum it up: a retrieval benchmark
    documentation_entries()             (dotted name, what it does): something to search in

All three go the same way: objects (imported, never called) -> docstrings -> paragraphs -> sentences -> those
that read as English. Every walk is in a fixed order: the result depends on the installed versions only.

Not here: a reStructuredText parser (a dozen regular expressions and a strict filter at the end do: a good
sentence lost costs little), private names, submodules of torch that TORCH does not list.
"""

import contextlib
import importlib
import inspect
import io
import pkgutil
import random
import re
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations
from types import ModuleType

import numpy as np

from data import find_senteval
from embed import unit
from eval_sts import cosine, load_set, score_pairs, spearman

# ------------------------------------------------------------------------------------------------------------
# Objects -> docstrings

# Importing these opens windows or browsers, prints, or touches the terminal or the installation; those of the
# last two lines are of no use: tests, codecs that are all alike, second copies of os, os.path and math.
SKIP = set("""this antigravity idlelib turtle turtledemo tkinter lib2to3 distutils ensurepip pip msilib venv
    site readline rlcompleter f2py
    test tests conftest encodings pydoc_data core matlib
    nt posix ntpath posixpath genericpath cmath""".split())

TORCH = ["torch"] + ["torch." + name for name in """linalg fft special nn nn.functional nn.init nn.utils
    nn.utils.rnn nn.utils.parametrizations nn.utils.parametrize nn.utils.prune nn.attention nn.parallel
    optim optim.lr_scheduler optim.swa_utils distributions autograd autograd.functional autograd.forward_ad
    autograd.graph utils.data utils.checkpoint utils.hooks sparse nested masked signal.windows amp cuda mps
    xpu accelerator backends random hub jit func fx futures library overrides package profiler serialization
    storage multiprocessing distributed testing monitor compiler ao.quantization""".split()]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, nothing printed: deprecated modules warn when imported, deprecated objects when seen."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


def import_quietly(name: str) -> ModuleType | None:
    """The module, or None if it cannot be imported here: another platform's, or one that asks to exit."""
    try:
        with quiet():
            return importlib.import_module(name)
    except (Exception, SystemExit):
        return None


def public_modules(name: str) -> Iterator[ModuleType]:
    """The module called name and, in sorted order, everything public under it."""
    module = import_quietly(name)
    if module is not None:
        yield module
        for child in sorted(info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))):
            if not child.startswith("_") and child not in SKIP:
                yield from public_modules(f"{name}.{child}")


def attribute(thing: object, name: str) -> object:
    """getattr() that never fails: objects may compute attributes, and fail where a device is missing."""
    try:
        return getattr(thing, name, None)
    except Exception:
        return None


def docstring(thing: object) -> str:
    """Its own docstring, not the one that an instance has from its class (a constant, say); "" for none."""
    doc = attribute(thing, "__doc__")
    return inspect.cleandoc(doc) if isinstance(doc, str) and doc != type(thing).__doc__ else ""


def members(owner: object) -> list[tuple[str, object]]:
    """Public (name, object), sorted; by vars(), as getattr() could import lazily or run a property."""
    return sorted(((k, v) for k, v in vars(owner).items() if not k.startswith("_")), key=lambda pair: pair[0])


def lives_in(thing: object, name: str, module: ModuleType) -> bool:
    """Whether it is at home there, not just imported. Many C functions do not say where they are from."""
    if isinstance(thing, ModuleType) or name.endswith("Tensor") and name != "Tensor":    # FloatTensor: a copy
        return False
    home = attribute(thing, "__module__")
    library = module.__name__.partition(".")[0]
    return (name in getattr(module, "__all__", ()) or home in (None, module.__name__)
            or library in ("numpy", "torch") and str(home).partition(".")[0] == library)


@cache
@quiet()
def docstrings() -> tuple[tuple[str, str], ...]:
    """(dotted name, docstring) of all there is, each docstring once, under the first of its names."""
    stdlib = sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIP)
    modules = [m for name in ["builtins", "math", *stdlib, "numpy"] for m in public_modules(name)]
    modules += map(import_quietly, ["os.path", *TORCH])
    first_name: dict[str, str] = {}
    for module in filter(None, modules):
        path = re.sub(r"^(posix|nt)path$", "os.path", module.__name__)
        prefix = "" if path == "builtins" else path + "."
        first_name.setdefault(docstring(module), path)
        own = [(name, thing) for name, thing in members(module) if lives_in(thing, name, module)]
        for name, thing in own:    # before the methods: random.shuffle is Random.shuffle
            first_name.setdefault(docstring(thing), prefix + name)
        for name, thing in own:
            for method, function in members(thing) if inspect.isclass(thing) else ():
                first_name.setdefault(docstring(function), f"{prefix}{name}.{method}")
    return tuple((name, doc) for doc, name in first_name.items() if doc)


# ------------------------------------------------------------------------------------------------------------
# Docstrings -> paragraphs -> sentences

SIGNATURE = re.compile(r"[\w.]+\(.*(\)|,|->.*|\]|:)$")                             # add(x1, x2, /, out=None)
NOT_PROSE = re.compile(r">>>|\.\.\.|In \[|\+[-=]|\||.*(::=|\w {4,}\w|\t)|[^\w\s]{3,}$")
UNDERLINE = re.compile(r"\s*([-=~^*#+])\1{2,}$")
DIRECTIVE = re.compile(r"\.\. *(?:([\w:-]+):: *)?(.*)")
PROSE_INSIDE = {"note", "warning", "important", "tip", "versionadded", "versionchanged", "deprecated"}
NUMPY_LABEL = re.compile(r"[\w*, .]{1,60} : ")                                   # axis : int, optional
BULLET = re.compile(r"(?:[-*+•]|\(?(?:\d+|[a-zA-Z#])[.)]) +")
LABEL = re.compile(r"[`*\w.,]{1,30} ?(\((\([^()]*\)|[^()])*\))?(: +| +--? +|:$)|"    # dim (int): where
                   r"[\w.]+\(.*?\)( -> [\w ]+)?( -- |\. +)(?=[A-Z])")             # d.clear() -> None.  Remove


def paragraphs(doc: str) -> Iterator[str]:
    """Blocks of prose, each on one line; code, tables, grammar, signatures, headings and labels left out.

    A paragraph ends at a blank line, a list item or label, or where the indentation changes; all that is
    indented under "::" or a directive for code or mathematics is skipped. One cut too many does no harm: half
    a sentence does not pass for one.
    """
    lines = [*doc.splitlines(), ""]
    text: list[str] = []
    indent = 0                                        # of the line before
    skipped_under: int | None = None                  # the indentation of the line that began what is skipped
    hanging = False                                   # that line began an item: this one may be indented
    labelled = False                                  # the paragraph began with a label: so may this line
    for line, below in zip(lines, [*lines[1:], ""]):
        stripped, here = line.strip(), len(line) - len(line.lstrip())
        if skipped_under is not None and (not stripped or here > skipped_under):
            continue
        skipped_under = None
        directive = DIRECTIVE.match(stripped)
        label = BULLET.match(stripped) or (not text or labelled and here <= indent) and LABEL.match(stripped)
        prose = not (directive or NUMPY_LABEL.match(stripped) or NOT_PROSE.match(stripped)
                     or UNDERLINE.match(below) or not text and not label and SIGNATURE.match(stripped))
        if text and (not stripped or not prose or label or here < indent or here > indent and not hanging):
            yield " ".join(text)
            text = []
        rest = stripped[label.end() if label else 0:]
        if prose and rest:
            text.append(rest)
        elif directive and directive[1] in PROSE_INSIDE and directive[2]:
            text.append(directive[2])
        if stripped.endswith("::") or directive and directive[1] not in PROSE_INSIDE:
            skipped_under = here
            if text:                                  # what follows the code is not its going on
                yield " ".join(text)
                text = []
        indent, hanging = here, bool(label or directive)
        labelled = hanging or labelled and bool(text)


def plain(text: str) -> str:
    """text as a reader sees it: without reStructuredText's roles, quotes, emphasis, links, footnotes."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|mathcal|operatorname)\s*\{+([^{}]*)\}+", r"\1", text)
    text = re.sub(r":[\w:+-]+:`~[^`<]*?(\w+)`", r"\1", text)                     # :func:`~torch.nn.Linear`
    text = re.sub(r"(?::[\w:+-]+:)?`+!?([^`]+?)(?:\s*<[^`<>]*>)?`+_{0,2}", r"\1", text)
    text = re.sub(r"\s*\[[\w#*]+\]_", "", text)                                  # a footnote's mark
    text = re.sub(r"(?<![\w*])(\*\*?)(\w[^*]*?)\1(?![\w*])", r"\2", text)
    text = text.translate({0x201c: '"', 0x201d: '"', 0x2018: "'", 0x2019: "'", 0x00a0: " "})
    return " ".join(text.split())


# A sentence goes on after these, whatever follows: e.g. NumPy.
ABBREVIATION = re.compile(r"(?:^|[\s(\"'])(?:e\.?g|i\.?e|vs|cf|viz|fig|eq|no|dr|mr|vol|resp|approx|sec)\.$",
                          re.IGNORECASE)


def sentences(paragraph: str) -> list[str]:
    """Cut after . ? or ! and a blank, except after an abbreviation: np.array and 1.5 have no blank."""
    found, start = [], 0
    for end in re.finditer(r"[.?!][\"')\]]*\s+", paragraph):
        so_far, rest = paragraph[start:end.end()].strip(), paragraph[end.end():]
        if not ABBREVIATION.search(so_far) and not (so_far.endswith(("etc.", "al.")) and rest[:1].islower()):
            found.append(so_far)
            start = end.end()
    return [*found, paragraph[start:].strip()]


WORD = re.compile(r"[\"'(]*[A-Za-z]+(?:[-'/][A-Za-z]+)*[\"'),;:.?!]*$")
MATHS = re.compile(r"[\\{}~^@#$%`]|::|\.\.\.|://|__|>>>")
SYMBOLS = re.compile(r"[<>=|*+]|->|\w\(\w|, [A-Z]\.|\b(?:pp|vol|ed|et al|ISBN|doi|arXiv)\b")
HALF = re.compile(r"(If|When|As|Or|And|Unless)\b[^,]*$")        # "Raises ValueError: If x is empty."
FUNCTION_WORDS = set("""a an the this that these it its is are was be been has have can may will should must
    does do of in on to for from by with as at into if when which not and or than you""".split())


def reads_as_english(text: str) -> bool:
    """Whether it looks like a whole sentence: mostly words, some of them function words, hardly a symbol."""
    tokens = text.split()
    words = [token.strip("\"'(),;:.?!") for token in tokens if WORD.match(token)]
    return (readable(text) and not SYMBOLS.search(text) and not HALF.match(text)
            and text.endswith((".", "?", "!", '."', ".)"))
            and 5 <= len(tokens) <= 40 and len(words) >= 0.8 * len(tokens)
            and sum(word[0].isupper() for word in words) <= 0.5 * len(words)
            and any(word.lower() in FUNCTION_WORDS for word in words))


def readable(text: str) -> bool:
    """Less than that, for summaries: a capital first, more words than formulas, what opens is closed."""
    tokens = text.split()
    return (bool(re.match(r"[\"'(]?[A-Z]", text)) and not MATHS.search(text) and 3 <= len(tokens) <= 40
            and sum(bool(WORD.match(token)) for token in tokens) >= 0.6 * len(tokens)
            and text.count("(") == text.count(")") and text.count("[") == text.count("]")
            and text.count('"') % 2 == 0)


def normal(text: str) -> str:
    """What sentences have in common that differ in case, blanks and punctuation only."""
    return " ".join(re.findall(r"\w+", text.lower()))


# ------------------------------------------------------------------------------------------------------------
# What is made of them


def documentation_sentences(exclude: Iterable[str] = ()) -> list[str]:
    """About 20,000 different English sentences in a fixed order; none is in exclude, as normal() compares."""
    topics = import_quietly("pydoc_data.topics")    # the language reference; some builds leave it out
    reference = [text for _, text in sorted(topics.topics.items())] if topics else []
    seen = {normal(plain(sentence)) for sentence in exclude}
    found = []
    for doc in reference + [doc for _, doc in docstrings()]:
        for paragraph in paragraphs(doc):
            for sentence in sentences(plain(paragraph)):
                if reads_as_english(sentence) and normal(sentence) not in seen:
                    seen.add(normal(sentence))
                    found.append(sentence)
    return found


USELESS = re.compile(r"(See|When|Alias for field|Alternate|Deprecated|Same as|In-place version|Refer to|"
                     r"Scalar method identical|This (\w+ )?is (an? )?(alias|deprecated|equivalent))\b")
ALIAS = re.compile(r"Alias (?:for|of) [\w.]*?(\w+)$")


def summary(doc: str) -> str:
    """The first sentence of a docstring's prose, without its period; "" if it is not one or says nothing."""
    prose = (paragraph for paragraph in paragraphs(doc) if not paragraph[0].islower())  # a signature goes on
    first = sentences(plain(next(prose, "")))[0]
    good = readable(first) and not first.endswith(":") and not USELESS.match(first)
    return first.removesuffix(".") if good else ""


@quiet()
def summaries(*spaces: str) -> dict[str, str]:
    """Summaries of the functions in a library's modules and classes by name; of two with one, the first."""
    found: dict[str, str] = {}
    for path in spaces:
        parent, _, last = path.rpartition(".")
        space = import_quietly(path) or getattr(import_quietly(parent), last)
        for name, thing in members(space):
            text = summary(docstring(thing)) if callable(thing) and not inspect.isclass(thing) else ""
            if text and ALIAS.match(found.get(name, "Alias for it")):
                found[name] = text
    for name, text in found.items():                  # torch.multiply: "Alias for torch.mul": what mul says
        alias = ALIAS.match(text)
        found[name] = found.get(alias[1], "") if alias else text
    return {name: text for name, text in found.items() if text and not ALIAS.match(text)}


# One name, two meanings: torch.select takes a slice of a tensor, numpy.select chooses among arrays.
OTHER_MEANING = {"select", "typename", "repeat"}


def same_function_pairs() -> list[tuple[str, str, str]]:
    """(name, summary, summary) of functions that two libraries have under one name, sorted by name.

    The summaries are the first two that differ, of those by PyTorch, NumPy, math and statistics. A name whose
    summary another name has already is left out: it is an alias.
    """
    libraries = [summaries("torch.linalg", "torch", "torch.fft", "torch.special", "torch.Tensor"),
                 summaries("numpy.linalg", "numpy", "numpy.fft", "numpy.ndarray"),
                 summaries("math"), summaries("statistics")]
    pairs, seen = [], set()
    for name in sorted(set().union(*libraries) - OTHER_MEANING):
        texts = [library[name] for library in libraries if name in library]
        two = next(((a, b) for a, b in combinations(texts, 2) if normal(a) != normal(b)), ())
        if two and not seen & set(map(normal, two)):
            seen |= set(map(normal, two))
            pairs.append((name, *two))
    return pairs


def documentation_entries() -> list[tuple[str, str]]:
    """(dotted name, summary) of some thousand functions, classes and methods, each summary once."""
    found: dict[str, str] = {}
    for name, doc in docstrings():
        text = summary(doc)
        if text and not ALIAS.match(text):
            found.setdefault(text, name)
    return [(name, text) for text, name in found.items()]


# ----------------------------------------------------------------------------------------------------------------
# The score: what two teams wrote about the same function should lie close together


def training_sentences() -> list[str]:
    """The corpus of the demo: documentation_sentences() without the summaries that are scored."""
    return documentation_sentences(exclude=[text for _, *texts in same_function_pairs() for text in texts])


def retrieval_scores(a: np.ndarray, b: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    """How well a's rows find their partners among all of b's, and b's among a's, each x 100.

    Shapes: a, b (P, D), row i of both about the same function; queries: the rows that are asked for, (Q,) ints.
    The rank of a partner counts every other row that is at least as similar, so ties never help.
    """
    similarity = unit(a) @ unit(b).T  # (P, P)
    ranks = []
    for scores in (similarity, similarity.T):
        own = scores.diagonal()[queries, None]  # (Q, 1)
        ranks.append((scores[queries] >= own).sum(1))  # (Q,): its own row counts as 1
    ranks = np.concatenate(ranks)
    return {"mrr": 100 * float((1 / ranks).mean()), **{f"recall@{k}": 100 * float((ranks <= k).mean()) for k in (1, 5, 10)}}


class DocsScore:
    """Finding a function of NumPy by the summary of its namesake in PyTorch, `math` or `statistics`, and back.

    One half of the pairs, by a checksum of their names, is for choosing settings and the best checkpoint, the other
    for the table; the candidates are always all of them. `data`: a folder with STS-B: its dev set is scored too.
    """

    name = "same function in the other library, MRR x 100"

    def __init__(self, data: str = ""):
        names, self.left, self.right = zip(*same_function_pairs())
        self.half = np.array([zlib.crc32(name.encode()) % 2 for name in names])  # 0: to choose by, 1: to show
        self.sts = {"STSB-dev": load_set("STSB-dev", find_senteval(data))} if data else {}

    def dev(self, encoder) -> dict[str, float]:
        return self._scores(encoder, 0)

    def test(self, encoder) -> dict[str, float]:
        return self._scores(encoder, 1) | score_pairs(encoder, self.sts)

    def asked(self, half: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of a half, and for each another function's, far away in the alphabet. Shapes: (Q,), (Q,)."""
        queries = np.flatnonzero(self.half == half)
        return queries, (queries + len(self.left) // 2) % len(self.left)

    def _scores(self, encoder, half: int) -> dict[str, float]:
        P = len(self.left)
        vectors = encoder([*self.left, *self.right])
        a, b = vectors[:P], vectors[P:]  # (P, D) each
        queries, others = self.asked(half)
        scores = retrieval_scores(a, b, queries)
        cosines = np.concatenate([cosine(a[queries], b[queries]), cosine(a[queries], b[others])])
        same = np.repeat([1, 0], len(queries))
        return {"score": scores["mrr"], **scores, "spearman": 100 * spearman(cosines, same)}

    def report(self, rows: dict[str, dict[str, float]]) -> str:
        """A table, one row for each named result of test()."""
        columns = [name for name in next(iter(rows.values())) if name != "score"]
        width = max(map(len, rows))
        lines = [" " * width + "".join(f"{name:>11}" for name in columns)]
        lines += [f"{label:<{width}}" + "".join(f"{scores[name]:11.2f}" for name in columns) for label, scores in rows.items()]
        return "\n".join(lines)


QUESTIONS = ("how do I reverse a list", "save an array to a file", "find the largest element")


def answer_questions(encoder, top_k: int = 3) -> str:
    """The documentation that lies closest to each question, as text."""
    names, summaries = zip(*documentation_entries())
    vectors = unit(encoder([*QUESTIONS, *summaries]))
    lines = []
    for question, scores in zip(QUESTIONS, vectors[: len(QUESTIONS)] @ vectors[len(QUESTIONS) :].T):
        lines.append(f"{question}?")
        lines += [f"    {scores[i]:.2f}  {names[i]}: {summaries[i]}" for i in np.argsort(-scores, kind="stable")[:top_k]]
    return "\n".join(lines)


if __name__ == "__main__":
    pairs, entries = same_function_pairs(), documentation_entries()
    corpus = training_sentences()
    for title, rows in ("sentences", corpus), ("same-function pairs", pairs), ("entries", entries):
        print(f"{len(rows):,} {title}")
        for row in random.Random(0).sample(rows, min(len(rows), 5)):
            print("   ", row if isinstance(row, str) else " | ".join(row))
