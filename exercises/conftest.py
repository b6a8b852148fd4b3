"""What is checked: write_it.py and fix_it.py, or (--answers reference) the repository's code."""

import importlib

import pytest
import torch

torch.set_num_threads(1)  # tensors this small are slower on several


def pytest_addoption(parser):
    parser.addoption(
        "--answers",
        choices=("mine", "reference"),
        default="mine",
        help="what is checked: your files, or the repository's own functions",
    )


@pytest.fixture
def write_it(request):
    mine = request.config.getoption("--answers") == "mine"
    return importlib.import_module("write_it" if mine else "answers")


@pytest.fixture
def fix_it(request):
    if request.config.getoption("--answers") == "mine":
        return importlib.import_module("fix_it")
    return importlib.import_module("mends").all_mended()
