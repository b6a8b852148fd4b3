"""Tests never reach for the network: what is not in the repository or an installed package is skipped with a reason."""

import os
import random
import tempfile
from pathlib import Path

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
    import data  # after the lines above

    return data.find_senteval(str(folder))


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """All STS sets at their published sizes, made of 40 sentences, so that a model is through with them at once."""
    import eval_sts

    root, rng = tmp_path_factory.mktemp("senteval"), random.Random(4)
    sentences = [" ".join(rng.choices("a the man cat dog plays eats guitar fish red in on".split(), k=rng.randrange(3, 9))) for _ in range(40)]

    def pair() -> tuple[str, str, str]:
        a, b = rng.choices(sentences, k=2)
        return a, b, f"{len({*a.split()} & {*b.split()}) + rng.random():.1f}"  # a score that means something

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
            write(path, [f"genre\tfile\tyear\t{i}\t{s}\t{a}\t{b}" for i, (a, b, s) in enumerate(rows)])
        else:
            write(path, ["header", *(f"{i}\t{a}\t{b}\t{s}\tNEUTRAL" for i, (a, b, s) in enumerate(rows))])
    return root
