"""How fast: ours against the same work on transformers and sentence-transformers, in turn in one process; and what a large index and a large corpus cost.

    python -m lab.bench step --text FILE [--sizes mini,minilm,base] [--readings published,paper] [--rounds 5] [--steps 3] [--device cpu] [--amp off] [--json FILE]
    python -m lab.bench without --text FILE [--size mini] [--readings published,paper] [--rounds 5] [--steps 2] [--json FILE]   # what each part gives
    python -m lab.bench evaluate MODEL --data DIR [--rounds 5] [--json FILE]
    python -m lab.bench gpu --text FILE [--json FILE]                # in less than ten minutes all that is said of a GPU
    python -m lab.bench encode MODEL --text FILE [--sentences 20000] [--rounds 5] [--json FILE]
    python -m lab.bench search --text FILE [--sentences 1000000] [--width 256] [--json FILE]
    python -m lab.bench corpus --text FILE [--sentences 100000,1000000,10000000] [--json FILE]

A figure of speed is a ratio: the machine's own moods meet both. All but without, search and corpus want `pip install -r requirements-dev.txt`.
"""

import argparse
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import diffcse
import fast
from bert import Bert, BertConfig, BertForMaskedLM, UserError, read_json, save_bert, write_atomically
from config import PRESETS
from data import TokenizedSentences, Tokenizer, find_model, read_lines, run_main, shuffled, tokens_path
from embed import MAX_LENGTH, DiffCSE, Opened, encode, open_model, save_model
from eval_sts import FILES, count, listed
from lab.reproduce import ROOT
from lab.steps import READINGS, SIZES, WITHOUT, Sizes, batches, flops, ours, theirs, whole_vocabulary


def needs(library: str, command: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise UserError(f"{command} wants {library.replace('_', '-')}: pip install -r requirements-dev.txt")


def read_text(path: str) -> list[str]:
    lines = [line for line in read_lines(Path(path)) if line.strip()]
    if not lines:
        raise UserError(f"{path}: no sentences in it")
    return lines


def timed(work) -> tuple[float, object]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def spread(values: Iterable[float]) -> dict[str, float]:
    values = sorted(values)
    return {"median": round(statistics.median(values), 3), "least": round(values[0], 3), "most": round(values[-1], 3)}


def limited(seconds: int, work: Callable, *arguments):
    if seconds:
        signal.alarm(seconds)  # ends this process, in the middle of a compiler too
    return work(*arguments)


def alone(work: Callable, *arguments, seconds: int = 0):
    """work(*arguments) in a process of its own, of whose memory nothing is another's. seconds: which it must not last (0: any); else BrokenProcessPool."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(limited, seconds, work, *arguments).result()


def bench_encode(args: argparse.Namespace) -> dict:
    """Sentences per second of DiffCSE.encode and SentenceTransformer.encode, each with its own defaults, and their ratio."""
    needs("sentence_transformers", "encode")
    from sentence_transformers import SentenceTransformer

    lines = read_text(args.text)
    sentences = random.Random(args.seed).sample(lines, min(args.sentences, len(lines)))
    ours = DiffCSE(args.model, device="cpu")
    theirs = SentenceTransformer(str(find_model(args.model)), device="cpu")
    tokens = [len(ids) for ids in ours.tokenizer(sentences, ours.max_length)]
    ours.encode(sentences[:256]), theirs.encode(sentences[:256])  # what is only done once
    rounds = []
    for i in range(args.rounds):
        a, u = timed(lambda: ours.encode(sentences, return_numpy=True))
        b, v = timed(lambda: theirs.encode(sentences, normalize_embeddings=True))
        rounds.append({"ours": round(len(sentences) / a, 1), "sentence_transformers": round(len(sentences) / b, 1), "ratio": round(b / a, 3)})
        print(f"round {i + 1}: {rounds[-1]}", flush=True)
    return {"model": args.model, "sentences": len(sentences), "tokens": dict(zip(("5%", "median", "95%", "longest"), np.percentile(tokens, [5, 50, 95, 100]).tolist())),
            "ratio": spread(row["ratio"] for row in rounds), "largest_difference": float(abs(u - v).max()),
            "rounds": rounds}  # fmt: skip


def peak() -> int:
    """The most memory this process has had, in MB (on Linux; elsewhere in the system's own unit)."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux a new process' ru_maxrss begins at its parent's
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def build(folder: Path, text: str, sentences: int) -> dict:
    tool, lines = DiffCSE(folder, device="cpu"), read_text(text)
    base = peak()
    numbered = [f"{lines[i % len(lines)]} {i // len(lines)}" for i in range(sentences)]
    seconds, _ = timed(lambda: tool.build_index(numbered))
    saving = {dtype: round(timed(lambda: tool.save_index(folder / dtype, dtype))[0], 2) for dtype in ("fp32", "fp16")}  # noqa: B023
    return {"build_seconds": round(seconds, 1), "save_seconds": saving, "MB_before": base, "MB_peak": peak()}


def search(folder: Path, dtype: str, text: str) -> dict:
    tool, queries = DiffCSE(folder, device="cpu"), list(islice(read_lines(Path(text)), 64))
    base = peak()
    loading, _ = timed(lambda: tool.load_index(folder / dtype))
    first, _ = timed(lambda: tool.search(queries[0]))
    one = [timed(lambda: tool.search(query))[0] for query in queries[:20]]  # noqa: B023
    many, _ = timed(lambda: tool.search(queries))
    return {"file_MB": round((folder / dtype).stat().st_size / 1e6), "load_seconds": round(loading, 2), "first_query_seconds": round(first, 3),
            "query_seconds": {"median": round(statistics.median(one), 3), "most": round(max(one), 3)}, "64_queries_seconds": round(many, 2),
            "MB_before": base, "MB_peak": peak()}  # fmt: skip


def bench_search(args: argparse.Namespace) -> dict:
    """A random one-layer encoder of the width, its vectors of numbered lines; building and searching in a process each."""
    result = {"sentences": args.sentences, "width": args.width}
    with tempfile.TemporaryDirectory() as temporary:
        folder, tokenizer = Path(temporary), Tokenizer(find_model("assets/small-bert"))
        torch.manual_seed(args.seed)
        bert = Bert(BertConfig(vocab_size=tokenizer.vocab_size, hidden_size=args.width, num_hidden_layers=1, num_attention_heads=4,
                               intermediate_size=args.width, initializer_range=0.2))  # fmt: skip
        save_model(Opened(bert, tokenizer, "mean", MAX_LENGTH), folder)
        for name, work, arguments in (("build", build, (folder, args.text, args.sentences)),
                                      ("fp32", search, (folder, "fp32", args.text)), ("fp16", search, (folder, "fp16", args.text))):  # fmt: skip
            result[name] = alone(work, *arguments)
            print(f"{name}: {result[name]}", flush=True)
    return result


def tokenise(text: Path) -> dict:
    os.environ["XDG_CACHE_HOME"] = str(text.parent)
    tokenizer, base = Tokenizer(find_model("assets/small-bert")), peak()
    seconds, sentences = timed(lambda: TokenizedSentences(text, tokenizer, 32))
    size = tokens_path(text, tokenizer, 32).stat().st_size
    return {"sentences": len(sentences), "text_bytes_per_sentence": round(text.stat().st_size / len(sentences), 1), "tokens_per_sentence": round(len(sentences.ids) / len(sentences), 2),
            "bytes_per_sentence": round(size / len(sentences), 1), "tokenise_seconds": round(seconds, 1), "MB_before": base, "MB_peak": peak()}  # fmt: skip


def draw(text: Path, batches: int = 1000) -> dict:
    os.environ["XDG_CACHE_HOME"] = str(text.parent)
    tokenizer, base = Tokenizer(find_model("assets/small-bert")), peak()
    opening, sentences = timed(lambda: TokenizedSentences(text, tokenizer, 32))
    n = len(sentences)
    rows = [timed(lambda: shuffled(np.arange(64 * i, 64 * i + 64) % n, n, 0, 0)) for i in range(batches)]  # noqa: B023
    drawn = [timed(lambda: sentences.batch(chosen))[0] for _, chosen in rows]  # noqa: B023
    return {"open_seconds": round(opening, 4), "shuffle_ms": round(1e3 * statistics.mean(seconds for seconds, _ in rows), 3),
            "batch_ms": {"mean": round(1e3 * statistics.mean(drawn), 3), "most": round(1e3 * max(drawn), 3)}, "MB_before": base, "MB_peak": peak()}  # fmt: skip


def write_numbered(path: Path, lines: list[str], size: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{line} {i}\n" for i, line in enumerate(islice(cycle(lines), size)))


def bench_corpus(args: argparse.Namespace) -> dict:
    """The text again and again, its lines numbered, as a file of each size: tokenised in one process, opened again and batches of 64 drawn in another."""
    result: dict = {"sizes": []}
    lines = read_text(args.text)
    for size in args.sentences:
        with tempfile.TemporaryDirectory() as temporary:
            text = Path(temporary) / "text.txt"
            write_numbered(text, lines, size)
            row = {work.__name__: alone(work, text) for work in (tokenise, draw)}
            result["sizes"].append(row)
            print(row, flush=True)
    return result


# ----------------------------------------------------------------------------------------------------------------
# A step of training, against the same on transformers

SIDES = {"ours": ours, "transformers": theirs}
AMPS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH = {"cpu": 2048, "cuda": 16384}  # of the matrices whose product is the peak


def steps_of(step: Callable, block: Iterable, device: torch.device) -> None:
    for batch in block:
        step(*batch)
    if device.type == "cuda":
        torch.cuda.synchronize()


def product_peak(device: torch.device, amp: torch.dtype | None) -> float:
    """The most FLOP a second: of large products of this type, by the faster of PyTorch's and oneDNN's."""
    n = WIDTH[device.type]
    x, weight = (torch.randn(n, n, device=device, dtype=amp) for _ in range(2))
    products = [F.linear, *[fast.product] * fast.by_onednn(x, weight)]
    return 2 * n**3 / min(timed(partial(steps_of, lambda: product(x, weight), [()], device))[0] for product in products for _ in range(4))  # noqa: B023


def compare(sizes: Sizes, reading: str, text: str, device: torch.device, amps: tuple[str, str], compiled: bool, rounds: int, steps: int) -> dict:
    """Both sides' steps of the same batches, in blocks in turn. amps: ours and theirs; the peak is that of the first."""
    cfg, tokenizer = READINGS[reading], whole_vocabulary()
    torch.manual_seed(0)
    step = {"ours": ours(sizes, cfg, tokenizer, device, AMPS[amps[0]], compiled), "transformers": theirs(sizes, cfg, tokenizer, device, AMPS[amps[1]])}
    draw = batches(text, cfg, tokenizer, device)
    warm = list(islice(draw, 1 if device.type == "cpu" else 20))  # a GPU's graphs are made for each room that comes
    for side in SIDES:
        steps_of(step[side], warm, device)
    seconds, work, peaks = {side: [] for side in SIDES}, [], []
    for _ in range(rounds):
        block = list(islice(draw, steps))
        work.append(sum(flops(*sizes, cfg, *batch[0].shape) for batch, _ in block))
        peaks.append(product_peak(device, AMPS[amps[0]]))
        for side in SIDES:
            seconds[side].append(timed(partial(steps_of, step[side], block, device))[0])
    median = {side: statistics.median(seconds[side]) for side in SIDES}
    return {"ratio": spread(b / a for a, b in zip(*seconds.values())), "rounds": {side: [round(s, 4) for s in seconds[side]] for side in SIDES},
            "ms_per_step": {side: round(1e3 * median[side] / steps, 2) for side in SIDES},
            "sentences_per_second": {side: round(steps * cfg.batch_size / median[side], 1) for side in SIDES},
            "gflop_per_step": round(work[-1] / steps / 1e9, 3), "peak_gflops": round(max(peaks) / 1e9, 1),
            "share_of_peak": {side: round(statistics.median(w / s for w, s in zip(work, seconds[side])) / max(peaks), 3) for side in SIDES}}  # fmt: skip


def memory(side: str, sizes: Sizes, reading: str, text: str, device: torch.device, amp: str) -> int:
    """MB of three steps of one side, on a GPU the card's."""
    cfg, tokenizer = READINGS[reading], whole_vocabulary()
    steps_of(SIDES[side](sizes, cfg, tokenizer, device, AMPS[amp]), islice(batches(text, cfg, tokenizer, device), 3), device)
    return torch.cuda.max_memory_allocated() >> 20 if device.type == "cuda" else peak()


def row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells: str) -> None:
    row(*cells), row(*["---"] * len(cells))


def ranged(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def told(result: dict) -> list[str]:
    """Of what compare() returns, the cells that every table has."""
    share = result["share_of_peak"]
    return [ranged(result["ratio"]), f"{100 * share['ours']:.0f} and {100 * share['transformers']:.0f} %"]


def bench_step(args: argparse.Namespace) -> dict:
    """One step of 64 sentences of 32 tokens: times as fast as on transformers, memory, and shares of the machine's peak."""
    needs("transformers", "step")
    device, _ = diffcse.pick_device(diffcse.Config(device=args.device, amp=args.amp))
    read_text(args.text)
    header("size", "reading", "ratio (rounds)", "share of peak", "sentences/s", "MB", "ratio of MB")
    rows = []
    for size, reading in itertools.product(args.sizes, args.readings):
        both = alone(compare, SIZES[size], reading, args.text, device, (args.amp, args.amp), False, args.rounds, args.steps)
        MB = {side: alone(memory, side, SIZES[size], reading, args.text, device, args.amp) for side in SIDES}
        rows.append({"size": size, "reading": reading, **both, "MB": MB, "MB_ratio": round(MB["transformers"] / MB["ours"], 2)})
        row(size, reading, *told(both), *(" and ".join(map(str, pair.values())) for pair in (both["sentences_per_second"], MB)), rows[-1]["MB_ratio"])
    return {"device": args.device, "amp": args.amp, "rows": rows, "transformers": version("transformers")}


def without(name: str) -> AbstractContextManager:
    """Inside, ours is made and does its steps without that part of what makes it fast."""
    return patch.object(*WITHOUT[name]) if name else nullcontext()


def compare_without(sizes: Sizes, reading: str, text: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each round's steps: of ours ("") and of ours without each part in turn."""
    cfg, tokenizer, device, step = READINGS[reading], whole_vocabulary(), torch.device("cpu"), {}
    draw = batches(text, cfg, tokenizer, device)
    blocks = [list(islice(draw, 1)), *(list(islice(draw, steps)) for _ in range(rounds))]
    seconds: dict[str, list[float]] = {name: [] for name in ("", *WITHOUT)}
    for block in blocks:
        for name in seconds:
            with without(name):
                if name not in step:
                    torch.manual_seed(0)
                    step[name] = ours(sizes, cfg, tokenizer, device, None)
                seconds[name].append(timed(partial(steps_of, step[name], block, device))[0])
    return {name: values[1:] for name, values in seconds.items()}


def memory_without(name: str, *arguments) -> int:
    with without(name):
        return memory("ours", *arguments)


def bench_without(args: argparse.Namespace) -> dict:
    """What a step costs without each part of what makes it fast on a CPU."""
    read_text(args.text)
    sizes, rows = SIZES[args.size], []
    for reading in args.readings:
        seconds = alone(compare_without, sizes, reading, args.text, args.rounds, args.steps)
        header("reading", "without", "times as slow (rounds)", "ms a step", "MB")
        for name, values in seconds.items():
            MB = alone(memory_without, name, sizes, reading, args.text, torch.device("cpu"), "off")
            rows.append({"reading": reading, "without": name, "ratio": spread(b / a for a, b in zip(seconds[""], values)),
                         "ms_per_step": round(1e3 * statistics.median(values) / args.steps), "MB": MB})  # fmt: skip
            row(reading, name or "(nothing)", ranged(rows[-1]["ratio"]), rows[-1]["ms_per_step"], MB)
    return {"size": args.size, "rows": rows}


def bench_evaluate(args: argparse.Namespace) -> dict:
    """What training spends on a score, STS-B dev: by StsScore and by sentence-transformers' evaluator."""
    needs("sentence_transformers", "evaluate")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    score, opened = diffcse.StsScore(diffcse.Config(data=args.data, score="dev")), open_model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        save_model(opened, Path(folder))  # so that its pooling is ours
        model = SentenceTransformer(folder, device="cpu")
    evaluator = EmbeddingSimilarityEvaluator(*score.dev_sets["STSB-dev"], batch_size=128, similarity_fn_names=["cosine"], write_csv=False)
    work = {"ours": lambda: score.dev(partial(encode, opened.bert, opened.tokenizer, pooling=opened.pooling)),
            "sentence_transformers": lambda: {"STSB-dev": 100 * float(evaluator(model)["spearman_cosine"])}}  # fmt: skip
    seconds: dict[str, list[float]] = {side: [] for side in work}
    header("round", "ratio", "seconds")
    for i in range(args.rounds + 1):
        took, scores = zip(*(timed(work[side]) for side in work))
        if i:  # after one that counts for nothing
            for side, value in zip(work, took):
                seconds[side].append(round(value, 3))
            row(i, f"{took[1] / took[0]:.2f}", f"{took[0]:.2f} and {took[1]:.2f}")
    difference = abs(scores[0]["STSB-dev"] - scores[1]["STSB-dev"])
    if difference > 0.1:  # where many pairs are alike, rounding decides on their order
        raise UserError(f"{args.model}: the scores differ by {difference:.3f}: not the same work")
    ratio = spread(b / a for a, b in zip(*seconds.values()))
    row("all", ranged(ratio), f"scores within {difference:.1g}")
    return {"model": args.model, "pooling": opened.pooling, "ratio": ratio, "seconds": seconds, "scores": scores[0], "largest_difference": difference,
            "sentence_transformers": version("sentence-transformers")}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# All that is said of a GPU

KINDS = [("bf16", True), ("bf16", False), ("fp16", True), ("fp16", False)]  # ours: mixed precision, compiled
STOPPING = 40  # seconds that a run is given to end in


def make_schedule(folder: Path, text: str, sizes: Sizes, sentences: int) -> None:
    """Everything a run of bert_sts reads, with random weights and made-up scores, below the folder."""
    encoder, generator = sizes
    lines, tokenizer = read_text(text), whole_vocabulary()
    save_model(Opened(Bert(encoder), tokenizer, "cls_before_pooler", MAX_LENGTH), folder / "encoder")
    save_bert(BertForMaskedLM(generator), folder / "generator")
    tokenizer.save(folder / "generator", MAX_LENGTH)
    write_numbered(folder / "text.txt", lines, sentences)
    short = (" ".join(line.split()[:12]) for line in cycle(lines))  # as long as what is scored
    for name in ("STSB-dev", "SICKR-dev"):
        path, pairs = FILES[name]
        row = "\t\t\t\t{score}\t{a}\t{b}\n" if name == "STSB-dev" else "\t{a}\t{b}\t{score}\n"
        rows = [row.format(a=next(short), b=next(short), score=i % 6) for i in range(pairs)]
        write_atomically(folder / path, "header\n" * (name == "SICKR-dev") + "".join(rows))


def extrapolated(log: Path, total: int) -> dict:
    """Of a run's log.jsonl: its steps so far, and the minutes that all would take, the first hundred as they were and the rest as the others."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows = [row for row in rows if "loss" in row]
    if len(rows) < 3:
        return {"steps": rows[-1]["step"] if rows else 0, "of": total, "minutes": None}
    (_, first, *_, last) = rows  # the very first step compiles
    rate = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    return {"steps": last["step"], "of": total, "minutes": round((first["seconds"] + rate * (total - first["step"])) / 60, 1)}


def schedule(text: str, device: torch.device, sizes: Sizes, sentences: int, left: Callable[[], float]) -> dict:
    """The whole of bert_sts, by diffcse.py, or as much of it as there is time for. left: how many seconds are."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, flags = Path(temporary), {"score": "dev", "device": device.type}
        make_schedule(folder, text, sizes, sentences)
        flags |= {"model": folder / "encoder", "generator": folder / "generator", "train-file": folder / "text.txt", "data": folder, "out-dir": folder / "run"}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        with open(folder / "said", "w") as said:
            run = subprocess.Popen([sys.executable, "diffcse.py", "--config", "bert_sts", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said,
                                   env={**os.environ, "XDG_CACHE_HOME": temporary})  # fmt: skip
        for seconds, end in ((max(1, left() - STOPPING), run.terminate), (STOPPING, run.kill)):
            try:
                run.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                end()
        run.wait()
        total = 2 * math.ceil(sentences / PRESETS["bert_sts"].batch_size)
        if run.returncode not in (0, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL):
            raise UserError(f"exit code {run.returncode}: " + (folder / "said").read_text().strip().rpartition("\n")[2])
        if run.returncode:
            return extrapolated(folder / "run" / "log.jsonl", total)
        return {"steps": total, "of": total, "minutes": read_json(folder / "run" / "results.json")["minutes"]}


def bf16_peak(device: torch.device) -> dict:
    return {"bf16_gflops": round(product_peak(device, torch.bfloat16) / 1e9, 1)}


def gpu(text: str, device: torch.device, sizes: Sizes, seconds: float = 540, sentences: int = 1_000_000, rounds: int = 5, steps: int = 20) -> dict:
    """Each part is printed as soon as it is known, and what fails or lasts too long is told and left out: the next call may be long in coming."""
    ends = time.monotonic() + seconds

    def left() -> float:
        return ends - time.monotonic()

    def part(work: Callable, *arguments, most: int = 0) -> dict:
        """What it returns. most: seconds, in a process of its own."""
        try:
            return alone(work, *arguments, seconds=max(1, int(min(most, left() - STOPPING)))) if most else work(*arguments)
        except BrokenProcessPool:
            return {"failed": f"ended after {most} seconds, or by the system"}
        except Exception as error:  # of a compiler, a driver, a run: any
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}

    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    result: dict = {"card": name, "peak": part(bf16_peak, device, most=60), "step": []}
    print(f"{name}: {result['peak']}", flush=True)
    header("ours", "ratio to fp16 on transformers (rounds)", "share of peak", "ms a step")
    for i, (amp, compiled) in enumerate(KINDS):
        if i == 2:  # the other precision with what time is left
            result["schedule"] = part(schedule, text, device, sizes, sentences, lambda: left() - 60)
            print(f"bert_sts, {sentences:,} sentences: {result['schedule']}", flush=True)
        found = part(compare, sizes, "published", text, device, (amp, "fp16"), compiled, rounds, steps, most=180 if compiled else 60)
        result["step"].append({"amp": amp, "compiled": compiled, **found})
        cells = [found["failed"]] if "failed" in found else [*told(found), " and ".join(map(str, found["ms_per_step"].values()))]
        row(amp + ", compiled" * compiled, *cells)
    return result


def bench_gpu(args: argparse.Namespace) -> dict:
    """bert-base on the first CUDA card: products, steps against transformers, and the whole schedule."""
    needs("transformers", "gpu")
    if not torch.cuda.is_available():
        raise UserError("gpu: this PyTorch finds no CUDA card")
    read_text(args.text)
    return {**gpu(args.text, torch.device("cuda"), SIZES["base"]), "transformers": version("transformers")}


def number(default: int) -> dict:
    return {"type": count, "default": default, "help": "(default: %(default)s)"}


def names(known: Iterable[str]) -> dict:
    known = list(known)
    return {"type": listed(known), "default": known, "metavar": "NAME,...", "help": f"(default: {','.join(known)})"}


TEXT = {"required": True, "metavar": "FILE", "help": "one sentence a line"}
SEED = {"type": int, "default": 0}
BENCHES = {
    "step": (bench_step, "a step of training, against transformers", {"--text": TEXT, "--sizes": names(SIZES), "--readings": names(READINGS), "--rounds": number(5), "--steps": number(3),
             "--device": {"choices": ["cpu", "cuda"], "default": "cpu"}, "--amp": {"choices": list(AMPS), "default": "off"}}),
    "without": (bench_without, "a step without each part of what makes it fast", {"--text": TEXT, "--size": {"choices": list(SIZES), "default": "mini", "help": "(default: %(default)s)"},
                "--readings": names(READINGS), "--rounds": number(5), "--steps": number(2)}),
    "evaluate": (bench_evaluate, "a score during training, against sentence-transformers",
                 {"model": {"metavar": "MODEL"}, "--data": {"required": True, "metavar": "DIR", "help": "folder with SentEval's data"}, "--rounds": number(5)}),
    "gpu": (bench_gpu, "in less than ten minutes all that is said of a GPU", {"--text": TEXT}),
    "encode": (bench_encode, "encoding, against sentence-transformers", {"model": {"metavar": "MODEL"}, "--text": TEXT, "--sentences": number(20_000), "--rounds": number(5), "--seed": SEED}),
    "search": (bench_search, "building and searching a large index",
               {"--text": TEXT, "--sentences": number(1_000_000), "--width": number(256) | {"help": "numbers in a vector (default: %(default)s)"}, "--seed": SEED}),
    "corpus": (bench_corpus, "tokenising a large corpus and drawing batches of it",
               {"--text": TEXT, "--sentences": {"type": lambda text: [count(size) for size in text.split(",")], "default": "100000,1000000,10000000", "help": "(default: %(default)s)"}}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.bench", description="How fast, against the libraries.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text, flags) in BENCHES.items():
        sub = commands.add_parser(name, help=text, allow_abbrev=False)
        for flag, options in flags.items():
            sub.add_argument(flag, **options)
        sub.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    on = torch.device("cuda" if args.command == "gpu" else getattr(args, "device", "cpu"))
    result = {"command": args.command, **BENCHES[args.command][0](args), "command_line": shlex.join(["python", "-m", "lab.bench", *sys.argv[1:]]), "machine": diffcse.machine(on)}
    print(json.dumps(result, indent=2))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
