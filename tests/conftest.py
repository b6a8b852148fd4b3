"""Tests never reach for the network: what is not in the repository or an installed package is skipped with a reason."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tests start subprocesses after tokenising
os.environ["OMP_NUM_THREADS"] = "1"  # models this small are slower on several threads
