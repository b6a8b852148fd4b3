"""The paper's Tables 1, 3 to 8 and 15, and the search of its appendix A, over several seeds.

    python -m lab.reproduce --table 3 --seeds 0,1,2 --data DIR --train-file FILE --text paragraphs
    python -m lab.reproduce --table all --budget 3h --seeds 0,1,2 --data DIR ...

Every row is a few flags of diffcse.py or lab/ablations.py; flags that are not listed by -h go to
all runs. Each run is an ordinary one, and its command is printed. Finished runs are not repeated,
even if two tables share them, and an interrupted run is resumed: to continue a sweep, give the
same command again. All rows run with the first seed, then with the second, so a budget that ends
early leaves rows with equally many seeds.

Rows with a grid (Table 1) are searched first, one field after the other, by STS-B dev with seed
100. The table "search" is all combinations of appendix A's grid.
Files below --out: tables/NAME.json (every number, command and seed), README.md (the tables beside
the paper's figures), and for each run tables/CONFIG/FLAGS/seedN (Table 1: tables/1/CONFIG/ROW/
seedN) with config.json, log.jsonl, results.json and transfer.json.
Transfer is the average accuracy on development items of the seven tasks, `lab.transfer --mode
fast`, which the published code computes during training.
Not here: Table 2 (lab/transfer.py), Tables 9 to 11 (lab/analysis.py).
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path

import numpy as np

from bert import read_json
from data import Tokenizer
from diffcse import PRESETS, Config, load_generator
from engine.cli import MAY_CHANGE, Parser, flag, load_preset, parse
from engine.errors import UserError, run_main, write_atomically
from engine.hub import ROOT, find_model
from eval_sts import TEST_SETS
from lab.ablations import AblationConfig

SEARCH_SEED = 100
ABLATION_FIELDS = {f.name for f in fields(AblationConfig)} - {f.name for f in fields(Config)}

# ------------------------------------------------------------------------------------------------
# The tables


@dataclass
class Row:
    name: str
    flags: dict[str, object] = field(default_factory=dict)  # differences from the preset
    paper: tuple[float | None, ...] = ()  # bert-base's figures in the same columns
    grid: tuple[str, ...] = ()  # fields of GRID that are searched


@dataclass
class Table:
    title: str
    rows: list[Row]
    findings: list[tuple[str, str]] = field(default_factory=list)  # the better row in the paper
    columns: tuple[str, ...] = ("STSB-dev", "transfer-dev")
    score: str = "dev"  # test sets are never loaded


COLUMNS = ("STSB-dev", *TEST_SETS, "average")
DEV = ("STSB-dev",)
FIRST_LAST = (None, 39.70, 59.38, 49.67, 66.03, 66.19, 53.87, 62.06, 56.70)
TANH = (81.47, 68.40, 82.41, 74.38, 80.91, 78.56, 76.85, 72.23, 76.25)
DIFFCSE = (84.56, 72.28, 84.43, 76.47, 83.90, 80.54, 80.59, 71.23, 78.49)
GRID = {"lr": (1e-4, 3e-4, 1e-3), "lam": (0.005, 0.05, 0.5), "mask_ratio": (0.30, 0.15)}
READING = {"edit": "sample", "edit_scope": "masked", "pads_in_loss": False}
READING |= {"generator_dropout": False}
BASELINE = "SimCSE with BatchNorm"
TABLE_1 = [
    Row("SimCSE (tanh)", {"lam": 0.0, "projector": "tanh"}, TANH, ("lr",)),
    Row(BASELINE, {"lam": 0.0}, (82.22,), ("lr",)),
    Row("DiffCSE, published", {}, DIFFCSE, tuple(GRID)),
    Row("DiffCSE, the paper's reading", READING, grid=tuple(GRID)),
]
SIMCSE_LR = {"small": 3e-4}  # of Table 1's search; the other presets have their own SimCSE
APPENDIX_A = {
    "batch_size": (64, 128),
    "lr": (2e-6, 3e-6, 5e-6, 7e-6, 1e-5),
    "mask_ratio": (0.15, 0.20, 0.30, 0.40),
    "lam": (0.1, 0.05, 0.01, 0.005, 0.001),
}
SMALL_LR = (3e-5, 1e-4, 3e-4, 5e-4, 1e-3)  # instead, for a small encoder
GENERATORS = {
    "bert-large-uncased": (82.93, 85.88),
    "bert-base-uncased": (83.63, 85.85),
    "distilbert-base-uncased": (84.56, 85.95),
    "google/bert_uncased_L-8_H-512_A-8": (82.25, 85.80),
    "google/bert_uncased_L-4_H-512_A-8": (82.64, 85.66),
    "google/bert_uncased_L-4_H-256_A-4": (82.12, 85.90),
    "google/bert_uncased_L-2_H-128_A-2": (81.40, 85.23),
}
WEAK_TO_STRONG = ("runs/generator-weak", "runs/generator-medium", "assets/small-bert")
SMALL_GENERATORS = (*WEAK_TO_STRONG, "runs/generator-strong")
MASKS = {0.15: 84.48, 0.20: 84.04, 0.25: 84.49, 0.30: 84.56, 0.40: 84.48, 0.50: 83.91}
LAMBDAS = {0.0: 82.22, 0.0001: 83.90, 0.0005: 84.40, 0.001: 84.24}
LAMBDAS |= {0.005: 84.56, 0.01: 83.44, 0.05: 84.11, 0.1: 83.66}
EDITS = {"MLM 15 %": {}, "insert 15 %": {"edit_with": "insert"}}
EDITS |= {"delete 15 %": {"edit_with": "delete"}}
OURS = [(84.48, 85.95), (82.20, 85.96), (82.59, 85.97)]  # DiffCSE with these edits
POSITIVES = [(73.59, 83.33), (80.39, 83.92), (78.58, 81.80)]
NEGATIVES = [(83.02, 84.49), (55.65, 79.86), (55.13, 82.56)]


def is_bert(config: str) -> bool:
    return config.startswith(("bert", "roberta"))


def simcse_flags(config: str) -> dict[str, object]:
    """A preset's flags for SimCSE: no difference prediction, tanh, SimCSE's lr and epochs."""
    flags = {"lam": 0.0, "projector": "tanh"}
    if is_bert(config):
        simcse = PRESETS["simcse_" + config.partition("_")[0]]
        flags |= {name: getattr(simcse, name) for name in ("lr", "epochs", "batch_size")}
    elif config in SIMCSE_LR:
        flags["lr"] = SIMCSE_LR[config]
    return changes(config, flags)


def changes(config: str, flags: dict[str, object]) -> dict[str, object]:
    """Without flags that have the preset's values: the same run has the same flags."""
    preset = PRESETS[config]
    return {name: value for name, value in flags.items() if value != getattr(preset, name, None)}


def edit_rows(use: str, paper: list[tuple[float, float]], **flags: object) -> list[Row]:
    return [
        Row(f"{use}: {name}", flags | {"mask_ratio": 0.15} | edit, figures)
        for (name, edit), figures in zip(EDITS.items(), paper)
    ]


def ablation_tables(simcse: dict[str, object]) -> dict[str, Table]:
    table_3 = [
        Row("SimCSE", simcse, (81.47, 83.91)),
        Row("DiffCSE", {}, (84.56, 85.95)),
        Row("without contrastive loss", {"contrastive": False}, (54.48, 83.46)),
        Row("edit of the next sentence", {"condition_on": "next"}, (82.91, 85.83)),
        Row("of both", {"condition_on": "both"}, (83.41, 85.82)),
        Row("conditional MLM, same sentence", {"objective": "masked"}, (83.08, 84.43)),
        Row("conditional MLM, next sentence", {"condition_on": "next"}, (75.82, 85.68)),
        Row("conditional MLM, both", {"condition_on": "both"}, (82.88, 84.82)),
        Row("conditional corrective LM", {"objective": "corrected"}, (79.79, 85.30)),
    ]
    for row in table_3[6:8]:
        row.flags["objective"] = "masked"
    same, following = table_3[5].name, table_3[6].name
    worse = [row.name for row in table_3 if row.name not in ("DiffCSE", following)]
    worse.remove("conditional MLM, both")
    table_4 = edit_rows("DiffCSE", OURS)
    table_4.append(Row("all three", {"mask_ratio": 0.15, "edit_with": "all"}, (82.80, 85.92)))
    table_15 = [
        Row("SimCSE", simcse, (81.47, 83.91)),
        *edit_rows("another positive", POSITIVES, **simcse | {"edit_as": "positive", "lam": 1.0}),
        *edit_rows("another negative", NEGATIVES, **simcse | {"edit_as": "negative", "lam": 1.0}),
        *edit_rows("DiffCSE", OURS),
    ]
    uses = [("DiffCSE: ", "another positive: "), ("DiffCSE: ", "another negative: ")]
    uses.append(("SimCSE", "another positive: "))
    findings = [
        (better + edit * better.endswith(" "), worse + edit) for better, worse in uses for edit in EDITS
    ]
    return {
        "3": Table(
            "what is predicted, and given which sentence",
            table_3,
            [*(("DiffCSE", name) for name in worse), (same, following)],
        ),
        "4": Table(
            "how a sentence is edited", table_4, [(table_4[0].name, r.name) for r in table_4[1:]]
        ),
        "15": Table(
            "how an edit is used", table_15, [*findings, ("another negative: MLM 15 %", "SimCSE")]
        ),
    }
