"""How fast: ours against the same work on transformers and sentence-transformers.

    python -m lab.bench step                        # a training step, against transformers
    python -m lab.bench fast                        # engine/fast.py: all operations but one
    python -m lab.bench encode MODEL                # 1,000 sentences of Wikipedia
    python -m lab.bench evaluate MODEL --data DIR   # a score during training: STS-B dev
    python -m lab.bench search                      # an index of a million sentences

Each side of a comparison is a process of its own, and the sides take turns. The table has for each
side: the median of a round's seconds, the peak memory in MB, and how many times as fast the first
side is (median and range over the rounds). "result" shows that the sides do the same work: a step's
loss, the largest difference from sentence-transformers' vectors in fp32, a score, or the sum of the
best cosines. --json FILE has every number. MODEL must be a folder for sentence-transformers, such
as a run's.

The libraries are those of requirements-dev.txt. sentence-transformers' other backends need more;
start `encode --backend onnx` or `openvino` with a Python that has them.
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
from tempfile import TemporaryDirectory

import numpy as np
import torch

from data import read_lines
from embed import DiffCSE, encode
from engine.cli import Parser, comma_list, positive_int
from engine.device import machine, pick_device
from engine.errors import UserError, run_main, write_atomically
from engine.hub import find_model
from engine.model_folder import load_model
from eval_sts import make_score
from lab.steps import OPERATIONS, READINGS, SIZES, TEXT, step_side
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
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds = round(time.perf_counter() - started, 4)
    return {"seconds": seconds, "MB": peak_memory(), "result": result}


def peak_memory() -> int:
    """The most memory that this process has had, in MB (the card's if it uses one).

    0 on a system without Linux's /proc.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() >> 20
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) >> 10


def take_turns(sides: dict[str, Callable], rounds: int) -> dict[str, dict]:
    """The last answer of each side's work_once, with the seconds of all rounds.

    The order is reversed from round to round. The first round is a warm-up and is not counted.
    """
    answers: dict[str, list[dict]] = {name: [] for name in sides}
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = {n: stack.enter_context(ProcessPoolExecutor(1, spawn)) for n in sides}
        for name, side in sides.items():
            pools[name].submit(prepare, side).result()
        for i in range(rounds + 1):
            for name in list(sides)[:: 1 if i % 2 else -1]:
                answers[name].append(pools[name].submit(work_once).result())
    seconds = {name: [row["seconds"] for row in rows[1:]] for name, rows in answers.items()}
    return {name: rows[-1] | {"seconds": seconds[name]} for name, rows in answers.items()}


def compare(cases: Iterable[tuple[dict, dict[str, Callable]]], rounds: int) -> list[dict]:
    """For each case (labels, sides) a row: labels, what the sides measured, and the ratios."""
    rows = []
    for labels, sides in cases:
        print("measuring:", *labels.values(), *sides, sep="  ", file=sys.stderr)
        measured = take_turns(sides, rounds)
        first, *others = measured
        ratios = {f"{first} / {name}": times_as_fast(measured, first, name) for name in others}
        rows.append(labels | {"times_as_fast": ratios, "sides": measured})
    return rows


def times_as_fast(measured: dict[str, dict], a: str, b: str) -> dict[str, float]:
    """The speed of a divided by that of b, over the rounds."""
    ratios = [y / x for x, y in zip(measured[a]["seconds"], measured[b]["seconds"])]
    ratios = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def make_table(rows: list[dict]) -> str:
    """A line for each side of each row."""
    labels = [name for name in rows[0] if name not in ("times_as_fast", "sides")]
    lines = []
    for row in rows:
        ratios = [
            "{median:.2f} ({least:.2f} to {most:.2f})".format(**ratio)
            for ratio in row["times_as_fast"].values()
        ]
        for (name, side), ratio in zip(row["sides"].items(), ["", *ratios]):
            seconds, result = statistics.median(side["seconds"]), side["result"]
            figures = (f"{seconds:.3f}", side["MB"], f"{result:.4g}", ratio)
            lines.append([*(row[label] for label in labels), name, *figures])
    head = [*labels, "side", "seconds", "MB", "result", "first is times as fast"]
    return format_table(head, lines)


# ------------------------------------------------------------------------------------------------
# A training step


def bench_step(args: Namespace) -> dict:
    names, cases = ["fast on", "fast off", *["compiled"] * args.compile, "transformers"], []
    if args.command == "fast":
        names = list(OPERATIONS)
    for size, reading, amp in itertools.product(args.sizes, args.readings, args.amps):
        labels = {"size": size, "reading": reading, "amp": amp}
        settings = labels | {"device": args.device, "steps": args.steps}
        cases.append((labels, {name: partial(step_side, name, **settings) for name in names}))
    rows = compare(cases, args.rounds)
    means = {}
    for pair in rows[0]["times_as_fast"]:
        medians = [row["times_as_fast"][pair]["median"] for row in rows]
        means[pair] = round(statistics.geometric_mean(medians), 3)
    return {"rows": rows, "geometric_means": means}


# ------------------------------------------------------------------------------------------------
# Encoding and evaluation, against sentence-transformers


def encode_side(model: str, amp: str, sentences: list[str]) -> Callable[[], np.ndarray]:
    tool = DiffCSE(model, "cpu", dtype="fp32" if amp == "off" else amp)
    return lambda: tool.encode(sentences, return_numpy=True)


def peer_encode_side(
    model: str, amp: str, sentences: list[str], backend: str
) -> Callable[[], np.ndarray]:
    from sentence_transformers import SentenceTransformer

    settings: dict = {"dtype": torch.bfloat16} if backend == "torch" and amp == "bf16" else {}
    if backend == "openvino":  # by default it computes in bf16 where the hardware multiplies that
        settings = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32" if amp == "off" else amp}}
    peer = SentenceTransformer(model, device="cpu", backend=backend, model_kwargs=settings)
    return partial(peer.encode, sentences, normalize_embeddings=True)


def bench_encode(args: Namespace) -> dict:
    model, cases = str(find_model(args.model)), []
    sentences = random.Random(0).sample(list(read_lines(TEXT)), args.sentences)
    for amp in ("off", "bf16")[: 1 if args.backend == "onnx" else 2]:  # ONNX has fp32 only
        settings = {"model": model, "amp": amp, "sentences": sentences}
        ours = partial(encode_side, **settings)
        peer = partial(peer_encode_side, **settings, backend=args.backend)
        cases.append(({"amp": amp}, {"ours": ours, f"sentence-transformers {args.backend}": peer}))
    rows = compare(cases, args.rounds)
    *_, reference = (side["result"] for side in rows[0]["sides"].values())
    for side in (side for row in rows for side in row["sides"].values()):
        side["result"] = float(np.abs(side["result"] - reference).max())
    return {"sentences": args.sentences, "rows": rows}


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


def bench_evaluate(args: Namespace) -> dict:
    settings = {"model": str(find_model(args.model)), "data": args.data}
    sides = {f"ours, {amp}": partial(evaluate_side, **settings, amp=amp) for amp in ("off", "bf16")}
    sides["sentence-transformers, off"] = partial(peer_evaluate_side, **settings)
    rows = compare([({}, sides)], args.rounds)
    scores = [side["result"] for side in rows[0]["sides"].values()]
    if max(scores) - min(scores) > 0.1:
        raise UserError(f"the scores differ, so the sides do not do the same work: {scores}")
    return {"rows": rows}


# ------------------------------------------------------------------------------------------------
# A large index


def search_side(path: str, queries: list[str]) -> Callable[[], float]:
    tool = DiffCSE("assets/small-bert", "cpu")
    tool.load_index(path)
    return lambda: sum(best[0][1] for best in tool.search(queries, threshold=-1))


def bench_search(args: Namespace) -> dict:
    """Numbered lines of Wikipedia; one query and 64 queries at a time."""
    tool, lines = DiffCSE("assets/small-bert", "cpu"), list(read_lines(TEXT))
    numbered = [f"{lines[i % len(lines)]} {i // len(lines)}" for i in range(args.sentences)]
    started = time.perf_counter()
    tool.build_index(numbered)
    build_seconds = round(time.perf_counter() - started, 1)
    with TemporaryDirectory() as folder:
        paths = {f"index in {dtype}": f"{folder}/{dtype}" for dtype in ("fp32", "fp16")}
        for path in paths.values():
            tool.save_index(path, dtype=Path(path).name)
        cases = [
            ({"queries": n}, {s: partial(search_side, p, lines[:n]) for s, p in paths.items()})
            for n in (1, 64)
        ]
        rows = compare(cases, args.rounds)
    return {"sentences": args.sentences, "build_seconds": build_seconds, "rows": rows}


# ------------------------------------------------------------------------------------------------
# The command

COMMANDS = {"step": bench_step, "fast": bench_step, "encode": bench_encode}
COMMANDS |= {"evaluate": bench_evaluate, "search": bench_search}


def main() -> None:
    parser = Parser(prog="python -m lab.bench", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("model", metavar="MODEL", nargs="?", help="of encode and evaluate: a folder or Hub name")
    add("--data", metavar="DIR", default="", help="of evaluate: SentEval's data")
    add("--sentences", type=positive_int, help="of encode (1000) and search (1000000)")
    add("--backend", choices=["torch", "onnx", "openvino"], default="torch", help="of encode")
    add("--sizes", type=comma_list(list(SIZES)), default="mini,minilm", help="of step and fast")
    add("--readings", type=comma_list(list(READINGS)), default="published,paper", help="as --sizes")
    add("--amps", type=comma_list(["off", "bf16", "fp16"]), default="off,bf16", help="as --sizes")
    add("--steps", type=positive_int, default=3, help="as --sizes: per round (default: 3)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of step and fast")
    add("--compile", action="store_true", help="of step: also ours with torch.compile")
    add("--rounds", type=positive_int, default=5, help="(default: 5)")
    add("--json", metavar="FILE", help="also write every number")
    args = parser.parse_args()
    if args.command in ("encode", "evaluate") and not args.model:
        parser.error(f"{args.command} needs a MODEL")
    args.sentences = args.sentences or (1_000_000 if args.command == "search" else 1000)
    result = COMMANDS[args.command](args)
    print(make_table(result["rows"]))
    for pair, mean in result.get("geometric_means", {}).items():
        print(f"geometric mean, {pair}: {mean:.2f}")
    if args.json:
        command = {"command": shlex.join(["python", "-m", "lab.bench", *sys.argv[1:]])}
        result = command | result | {"machine": machine(torch.device(args.device))}
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
