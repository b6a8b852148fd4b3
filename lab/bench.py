"""How fast: ours against the same work on transformers and sentence-transformers.

    python -m lab.bench step                        # a training step, against transformers
    python -m lab.bench encode MODEL                # 1,000 sentences of Wikipedia
    python -m lab.bench evaluate MODEL --data DIR   # a score during training: STS-B dev

Each side of a comparison is a process of its own, and the sides take turns. The table has for each
side: the median of a round's seconds, the peak memory in MB, and how many times as fast the first
side is (median and range over the rounds). "result" shows that the sides do the same work: a step's
loss, the largest difference from sentence-transformers' vectors in fp32, or a score. --json FILE
has every number. MODEL must be a folder for sentence-transformers, such as a run's.
"""

import itertools
import json
import multiprocessing
import random
import re
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import read_lines
from embed import DiffCSE, encode
from engine.cli import Parser, comma_list, positive_int
from engine.device import machine, pick_device
from engine.errors import run_main, write_atomically
from engine.hub import find_model
from engine.model_folder import load_model
from eval_sts import make_score
from lab.steps import READINGS, SIZES, TEXT, step_side
from lab.tables import format_table

# ------------------------------------------------------------------------------------------------
# Sides that take turns

work: Callable  # in the process of a side: what is measured


def prepare(side: Callable[[], Callable]) -> None:
    global work
    work = side()


def work_once() -> dict:
    started = time.perf_counter()
    result = work()
    seconds = round(time.perf_counter() - started, 4)
    return {"seconds": seconds, "MB": peak_memory(), "result": result}


def peak_memory() -> int:
    """In MB: of the card if it is used, else of this process (0 without Linux's /proc)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() >> 20
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else "VmHWM: 0"
    return int(re.search(r"VmHWM:\s+(\d+)", text)[1]) >> 10


def take_turns(sides: dict[str, Callable], rounds: int) -> dict[str, dict]:
    """The last answer of each side's work_once, with the seconds of all rounds.

    The order is reversed from round to round. The first round is a warm-up and is not counted.
    """
    seconds, answers = {name: [] for name in sides}, {}
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = {n: stack.enter_context(ProcessPoolExecutor(1, spawn)) for n in sides}
        for name, side in sides.items():
            pools[name].submit(prepare, side).result()
        for i in range(rounds + 1):
            for name in list(sides)[:: 1 if i % 2 else -1]:
                answers[name] = pools[name].submit(work_once).result()
                seconds[name].append(answers[name]["seconds"])
    return {name: answers[name] | {"seconds": seconds[name][1:]} for name in sides}


def compare(cases: Iterable[tuple[dict, dict[str, Callable]]], rounds: int) -> list[dict]:
    """For each case (labels, sides) a row: its labels, and what the sides measured."""
    rows = []
    for labels, sides in cases:
        print("measuring:", *labels.values(), *sides, sep="  ", file=sys.stderr)
        measured = take_turns(sides, rounds)
        first = next(iter(measured.values()))["seconds"]
        for side in measured.values():
            ratios = [theirs / ours for ours, theirs in zip(first, side["seconds"])]
            ratio = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            side["first_is_times_as_fast"] = ratio
        rows.append({"labels": labels, "sides": measured})
    return rows


def make_table(rows: list[dict]) -> str:
    """A line for each side of each row."""
    lines = []
    for row in rows:
        for name, side in row["sides"].items():
            seconds, ratio = statistics.median(side["seconds"]), side["first_is_times_as_fast"]
            ratio = "{median:.2f} ({least:.2f} to {most:.2f})".format(**ratio)
            figures = (f"{seconds:.3f}", side["MB"], f"{side['result']:.4g}", ratio)
            lines.append([*row["labels"].values(), name, *figures])
    head = ["side", "seconds", "MB", "result", "first is times as fast"]
    return format_table([*rows[0]["labels"], *head], lines)


def bench_step(args: Namespace) -> list[dict]:
    names, cases = ["fast on", "fast off", *["compiled"] * args.compile, "transformers"], []
    for size, reading, amp in itertools.product(args.sizes, READINGS, args.amps):
        labels = {"size": size, "reading": reading, "amp": amp}
        settings = labels | {"device": args.device, "steps": args.steps}
        cases.append((labels, {name: partial(step_side, name, **settings) for name in names}))
    rows = compare(cases, args.rounds)
    for name in names:
        ratios = [row["sides"][name]["first_is_times_as_fast"]["median"] for row in rows]
        print(f"mean speed-up over {name}: {statistics.geometric_mean(ratios):.2f}")
    return rows


# ------------------------------------------------------------------------------------------------
# Encoding and evaluation, against sentence-transformers


def encode_side(model: str, amp: str, sentences: list[str]) -> Callable[[], np.ndarray]:
    tool = DiffCSE(model, "cpu", dtype="fp32" if amp == "off" else amp)
    return lambda: tool.encode(sentences, return_numpy=True)


def peer_encode_side(model: str, amp: str, sentences: list[str]) -> Callable[[], np.ndarray]:
    from sentence_transformers import SentenceTransformer

    settings = {"dtype": torch.bfloat16 if amp == "bf16" else torch.float32}
    peer = SentenceTransformer(model, device="cpu", model_kwargs=settings)
    return partial(peer.encode, sentences, normalize_embeddings=True)


def bench_encode(args: Namespace) -> list[dict]:
    model, cases = str(find_model(args.model)), []
    sentences = random.Random(0).sample(list(read_lines(TEXT)), args.sentences)
    for amp in ("off", "bf16"):
        sides = {"ours": encode_side, "sentence-transformers": peer_encode_side}
        sides = {name: partial(side, model, amp, sentences) for name, side in sides.items()}
        cases.append(({"amp": amp}, sides))
    rows = compare(cases, args.rounds)
    reference = rows[0]["sides"]["sentence-transformers"]["result"]
    for side in (side for row in rows for side in row["sides"].values()):
        side["result"] = float(np.abs(side["result"] - reference).max())
    return rows


def evaluate_side(model: str, data: str, amp: str) -> Callable[[], float]:
    loaded, score = load_model(model), make_score("dev", data)
    settings = {"pooling": loaded.pooling, "batch_size": 128, "amp": pick_device("cpu", amp)[1]}
    encoder = partial(encode, loaded.bert, loaded.tokenizer, **settings)  # as in training
    return lambda: score.dev(encoder)["score"]


def peer_evaluate_side(model: str, data: str) -> Callable[[], float]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import evaluation

    peer = SentenceTransformer(model, device="cpu")
    (pairs,) = make_score("dev", data).dev_set.values()
    settings = {"batch_size": 128, "similarity_fn_names": ["cosine"], "write_csv": False}
    evaluator = evaluation.EmbeddingSimilarityEvaluator(*pairs, **settings)
    return lambda: 100 * evaluator(peer)["spearman_cosine"]


def bench_evaluate(args: Namespace) -> list[dict]:
    settings = {"model": str(find_model(args.model)), "data": args.data}
    sides = {f"ours, {amp}": partial(evaluate_side, **settings, amp=amp) for amp in ("off", "bf16")}
    sides["sentence-transformers, off"] = partial(peer_evaluate_side, **settings)
    return compare([({}, sides)], args.rounds)


COMMANDS = {"step": bench_step, "encode": bench_encode, "evaluate": bench_evaluate}


def main() -> None:
    parser = Parser(prog="python -m lab.bench", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("model", metavar="MODEL", nargs="?", help="of encode and evaluate: a folder or Hub name")
    add("--data", metavar="DIR", default="", help="of evaluate: SentEval's data")
    add("--sentences", type=positive_int, default=1000, help="of encode (default: 1000)")
    add("--sizes", type=comma_list(list(SIZES)), default="mini,minilm", help="of step")
    add("--amps", type=comma_list(["off", "bf16", "fp16"]), default="off,bf16", help="as --sizes")
    add("--steps", type=positive_int, default=3, help="as --sizes: per round (default: 3)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of step")
    add("--compile", action="store_true", help="of step: also ours with torch.compile")
    add("--rounds", type=positive_int, default=5, help="(default: 5)")
    add("--json", metavar="FILE", help="also write every number")
    args = parser.parse_args()
    if args.command in ("encode", "evaluate") and not args.model:
        parser.error(f"{args.command} needs a MODEL")
    rows = COMMANDS[args.command](args)
    print(make_table(rows))
    if args.json:
        command = shlex.join(["python", "-m", "lab.bench", *sys.argv[1:]])
        result = {"command": command, "machine": machine(torch.device(args.device)), "rows": rows}
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
