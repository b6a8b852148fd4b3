"""One side of a comparison, in a process of its own.

    python lab/worker.py lab.steps:step_side '{"side": "fast on", "size": "mini", ...}'

lab/bench.py starts it in the folder whose modules are measured. The named function prepares the
work and returns it as a function without arguments. Then each line of standard input is a number
of repetitions, and each answer is a line of JSON: the seconds that they took, the peak memory of
the process in MB, and what the last repetition returned.
"""

import importlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def peak_memory() -> int:
    """The most memory that this process has had, in MB; the card's if it uses one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() >> 20
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss of a new process starts at its parent's
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def encode_work(encode: Callable, sentences: str, out: str) -> Callable:
    """The work of encoding all sentences of a JSON file; their vectors are saved in `out`, once.

    Each call has another order: the ids of the last call are cached, and all sides must tokenise.
    """
    lines = json.loads(Path(sentences).read_text())
    np.save(out, encode(lines))

    def work() -> None:
        nonlocal lines
        lines = lines[1:] + lines[:1]
        encode(lines)

    return work


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output
    sys.path[:] = [os.getcwd(), *sys.path[1:], str(Path(__file__).parent)]
    module, _, name = sys.argv[1].partition(":")
    work = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            result = work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        answer = {"seconds": seconds, "MB": peak_memory(), "result": result}
        print(json.dumps(answer, default=float), file=answers, flush=True)


if __name__ == "__main__":
    main()
