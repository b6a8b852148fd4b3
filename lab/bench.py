"""How fast: ours against the same work on sentence-transformers, in turn in one process; and what a large index and a large corpus cost.

    python -m lab.bench encode MODEL --text FILE [--sentences 20000] [--rounds 5] [--json FILE]
    python -m lab.bench search --text FILE [--sentences 1000000] [--width 256] [--json FILE]
    python -m lab.bench corpus --text FILE [--sentences 100000,1000000,10000000] [--json FILE]

A figure of speed is a ratio: the machine's own moods meet both. Wants `pip install -r requirements-dev.txt` for encode.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from bert import Bert, BertConfig, UserError, write_atomically
from data import TokenizedSentences, Tokenizer, find_model, read_lines, run_main, shuffled, tokens_path
from embed import MAX_LENGTH, DiffCSE, Opened, save_model
from eval_sts import count


def read_text(path: str) -> list[str]:
    lines = [line for line in read_lines(Path(path)) if line.strip()]
    if not lines:
        raise UserError(f"{path}: no sentences in it")
    return lines


def timed(work) -> tuple[float, object]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def bench_encode(args: argparse.Namespace) -> dict:
    """Sentences per second of DiffCSE.encode and SentenceTransformer.encode, each with its own defaults, and their ratio."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("encode wants sentence-transformers: pip install -r requirements-dev.txt") from None
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
    ratios = sorted(row["ratio"] for row in rounds)
    return {"model": args.model, "sentences": len(sentences), "tokens": dict(zip(("5%", "median", "95%", "longest"), np.percentile(tokens, [5, 50, 95, 100]).tolist())),
            "ratio": {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}, "largest_difference": float(abs(u - v).max()),
            "rounds": rounds}  # fmt: skip


def peak() -> int:
    """The most memory this process has had, in MB (on Linux; elsewhere in the system's own unit)."""
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
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                result[name] = process.submit(work, *arguments).result()
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


def bench_corpus(args: argparse.Namespace) -> dict:
    """The text again and again, its lines numbered, as a file of each size: tokenised in one process, opened again and batches of 64 drawn in another."""
    result: dict = {"sizes": []}
    lines = read_text(args.text)
    for size in args.sentences:
        with tempfile.TemporaryDirectory() as temporary:
            text = Path(temporary) / "text.txt"
            with open(text, "w", encoding="utf-8") as file:
                file.writelines(f"{line} {i}\n" for i, line in enumerate(islice(cycle(lines), size)))
            row = {}
            for work in (tokenise, draw):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    row[work.__name__] = process.submit(work, text).result()
            result["sizes"].append(row)
            print(row, flush=True)
    return result


BENCHES = {
    "encode": (bench_encode, count, 20_000, "against sentence-transformers"),
    "search": (bench_search, count, 1_000_000, "building and searching a large index"),
    "corpus": (bench_corpus, lambda text: [count(size) for size in text.split(",")], "100000,1000000,10000000", "tokenising a large corpus and drawing batches of it"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.bench", description="How fast, against the libraries.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, kind, sentences, text) in BENCHES.items():
        sub = commands.add_parser(name, help=text, allow_abbrev=False)
        if name == "encode":
            sub.add_argument("model", metavar="MODEL")
            sub.add_argument("--rounds", type=count, default=5, help="(default: %(default)s)")
        if name == "search":
            sub.add_argument("--width", type=count, default=256, help="numbers in a vector (default: %(default)s)")
        sub.add_argument("--text", required=True, metavar="FILE", help="one sentence a line")
        sub.add_argument("--sentences", type=kind, default=sentences, help="(default: %(default)s)")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    result = {"command": args.command, **BENCHES[args.command][0](args), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}  # fmt: skip
    print(json.dumps(result, indent=2))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
