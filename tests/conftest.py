"""Tests never reach for the network: what is not in the repository or an installed package is skipped with a reason."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tests start subprocesses after tokenising
os.environ["OMP_NUM_THREADS"] = "1"  # models this small are slower on several threads

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def senteval() -> Path:
    """The real evaluation sets, where this machine has them."""
    folder = Path(os.environ.get("DIFFCSE_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; DIFFCSE_SHARED names another place")
    import data  # after the lines above

    return data.find_senteval(str(folder))
