"""Tests need no network: what is missing on a machine is skipped with a reason."""

import os
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tests start subprocesses after tokenising
os.environ["OMP_NUM_THREADS"] = "1"  # models this small are slower on several threads
CACHE = tempfile.TemporaryDirectory(prefix="diffcse-tests-")  # removed when Python ends
os.environ["XDG_CACHE_HOME"] = CACHE.name  # the user's own cache is left alone

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def senteval() -> Path:
    """The real evaluation sets, where this machine has them."""
    folder = Path(os.environ.get("DIFFCSE_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; DIFFCSE_SHARED names another place")
    from engine.hub import find_senteval  # after the variables above are set

    return find_senteval(str(folder))


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """All STS sets at their published sizes, made of 40 sentences, so that encoding is quick."""
    import eval_sts

    root, rng = tmp_path_factory.mktemp("senteval"), random.Random(4)
    sentences = [
        " ".join(
            rng.choices(
                "a the man cat dog plays eats guitar fish red in on".split(), k=rng.randrange(3, 9)
            )
        )
        for _ in range(40)
    ]

    def pair() -> tuple[str, str, str]:
        a, b = rng.choices(sentences, k=2)
        return (
            a,
            b,
            f"{len({*a.split()} & {*b.split()}) + rng.random():.1f}",
        )  # a score that means something

    def write(path: str, lines: list[str]) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("\n".join(lines) + "\n")

    for year, sources in eval_sts.YEARS.items():
        for source, count in sources.items():
            rows = [(*pair()[:2], "")] * 5 + [pair() for _ in range(count)]
            write(f"STS/{year}-en-test/STS.input.{source}.txt", [f"{a}\t{b}" for a, b, _ in rows])
            write(f"STS/{year}-en-test/STS.gs.{source}.txt", [score for _, _, score in rows])
    for name, (path, count) in eval_sts.FILES.items():
        rows = [pair() for _ in range(count)]
        if name.startswith("STSB"):
            write(
                path, [f"genre\tfile\tyear\t{i}\t{s}\t{a}\t{b}" for i, (a, b, s) in enumerate(rows)]
            )
        else:
            write(
                path,
                ["header", *(f"{i}\t{a}\t{b}\t{s}\tNEUTRAL" for i, (a, b, s) in enumerate(rows))],
            )
    return root


def fake_ipython(display, shell=None) -> dict:
    """For sys.modules, in place of IPython and its display function."""
    ipython = ModuleType("IPython")
    ipython.get_ipython, ipython.version_info = lambda: shell, (9, 0)  # matplotlib reads it
    return {"IPython": ipython, "IPython.display": SimpleNamespace(display=display)}


# ------------------------------------------------------------------------------------------------
# A tiny model, and runs on it

SPECIAL_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the a dog cat house tree runs sleeps eats big small red blue and in on . ,".split()
VOCABULARY = SPECIAL_WORDS + WORDS


def random_sentences(count: int, seed: int, min_words: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(min_words, 12))) for _ in range(count)]


def make_model(folder: Path, vocab_size: int = len(VOCABULARY)):
    """A masked LM of 2 layers of 16, saved with its vocab.txt."""
    import torch

    import bert

    torch.manual_seed(0)
    cfg = bert.BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    model = bert.BertForMaskedLM(cfg)
    bert.save_bert(model, folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """make_model's folder, and 33 sentences in text.txt: two batches of 16, and one of 1."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    (folder / "text.txt").write_text("".join(s + "\n" for s in random_sentences(33, 1)))
    return folder


def write_small_senteval(folder: Path, monkeypatch) -> None:
    """A SentEval folder in which each set has 8 pairs."""
    import eval_sts

    monkeypatch.setattr(eval_sts, "YEARS", {year: {"one": 8} for year in eval_sts.YEARS})
    files = {name: (path, 8) for name, (path, _) in eval_sts.FILES.items()}
    monkeypatch.setattr(eval_sts, "FILES", files)
    lines = {}
    for year in eval_sts.YEARS:
        lines[f"STS/{year}-en-test/STS.input.one.txt"] = "{a}\t{b}\n"
        lines[f"STS/{year}-en-test/STS.gs.one.txt"] = "{score}\n"
    for name, (path, _) in files.items():
        is_stsb = name.startswith("STSB")
        lines[path] = "g\tf\ty\t1\t{score}\t{a}\t{b}\n" if is_stsb else "1\t{a}\t{b}\t{score}\n"
    for i, (path, line) in enumerate(lines.items()):
        scores = random.Random(i).sample(range(50), 8)
        pairs = zip(random_sentences(8, 10 + i, 1), random_sentences(8, 50 + i, 1), scores)
        text = "".join(line.format(a=a, b=b, score=score / 10) for a, b, score in pairs)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("header\n" * path.startswith("SICK") + text)


@pytest.fixture
def train_tiny(tiny, tmp_path, monkeypatch):
    """train_tiny(**changes): a run of 5 steps in tmp_path/"out"."""
    import diffcse

    write_small_senteval(tmp_path / "senteval", monkeypatch)

    def train(**changes) -> dict:
        settings = {
            "model": str(tiny),
            "generator": str(tiny),
            "train_file": str(tiny / "text.txt"),
            "data": str(tmp_path / "senteval"),
            "batch_size": 16,
            "steps": 5,
            "eval_every": 2,
            "log_every": 1,
            "lr": 1e-2,
            "out_dir": str(tmp_path / "out"),
            "lam": 0.05,
            "device": "cpu",
            "amp": "off",
        }
        return diffcse.train(diffcse.Config(**settings | changes))

    return train


def read_log(folder: Path) -> list[dict]:
    """log.jsonl without times. NaN is not JSON."""
    import json

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = (folder / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


# ------------------------------------------------------------------------------------------------
# What several files' tests use


def need_transformers_5() -> None:
    """Version 4 builds some tokenizers otherwise, and loses the bias of a RoBERTa's head; the
    sentence-transformers of its time strip sentences."""
    if int(version("transformers").split(".")[0]) < 5:
        pytest.skip("compares with transformers 5")


def one_line(error: pytest.ExceptionInfo) -> str:
    """An error's message, which must be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


class Finished(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys):
    """command(main, *words): a program in this process, as `python -m` would run it."""
    from engine.errors import run_main

    def run(main, *words) -> Finished:
        name = main.__module__.replace(".", "/") + ".py"
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        try:
            run_main(main)
        except SystemExit as end:
            return Finished(end.code or 0, *capsys.readouterr())
        return Finished(0, *capsys.readouterr())

    return run


class Words:
    """A tokenizer's ids. They differ from BERT's, so that none can be hard-coded."""

    pad_id, cls_id, sep_id, mask_id, unk_id, vocab_size = 1, 2, 3, 4, 5, 60
    special_ids = [1, 2, 3, 4, 5]


def random_pair(family: str, mlm: bool, folder: Path):
    """A random model of transformers, norms and biases included, and bert.py's of its files.

    float64, without dropout, 2 layers of 32.
    """
    import torch
    import transformers

    import bert

    sizes = {"vocab_size": Words.vocab_size, "pad_token_id": Words.pad_id}
    sizes |= {"max_position_embeddings": 40, "initializer_range": 0.3}
    if family == "distilbert":
        sizes |= {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        sizes |= {"dropout": 0, "attention_dropout": 0}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 64}
        sizes |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    name = bert.FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**sizes)
    theirs = getattr(transformers, name + ("ForMaskedLM" if mlm else "Model"))(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs.double().eval(), bert.load_bert(folder, mlm=mlm).double()


# Text that tokenizers and readers stumble on
RNG = random.Random(7)
RANGES = (32, 127), (0, 0x3000), (0x10000, 0x1FFFF)
NASTY = [
    *("", "   ", "\t\n\r ", "A plain sentence.", "don't -- 3.14, $5!", "x" * 300, "word " * 10_000),
    *("Ünïcödé ÀÉÎ ŐŰ İstanbul ß ﬁ №", "e\u0301 versus \u00e9, \u212b", "عربى ไทย עברית"),
    *("漢字かな交じり文 한국어 中", "emoji 🙂👩‍👩‍👧‍👦 🇫🇷", "unknown qzxjkvqzx ☃ \U0010ffff \ufffd"),
    "control \x00\x01\x07\x1b\x7f \u200b\u200d\ufeff \x85 \u2028 \x0c end",
    *("[MASK] [CLS] [SEP] [PAD] [UNK] [mask] ##ing", "<s> </s> <pad> <unk> tail"),
    *("".join(chr(RNG.randrange(*RNG.choice(RANGES))) for _ in range(50)) for _ in range(100)),
]
