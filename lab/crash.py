"""A training that is killed at random moments and resumed, again and again: it must end as one that nothing happened to.

    python -m lab.crash [--kills 50] [--json results/crash.json]

Each round kills a run with SIGKILL at a random moment of its life, resumes it, perhaps kills it again, and lets it end: weights, log and scores
must then equal the undisturbed run's, bit for bit but for times. The run saves its state at every step, so that many kills meet a write.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bert import read_safetensors, write_atomically
from data import run_main
from eval_sts import count
from run import STATE

ROOT = Path(__file__).parent.parent
TIMES = ("seconds", "sentences_per_second", "minutes")


def make(folder: Path) -> list[str]:
    """A small training: its flags. The text and the pairs are this repository's own words."""
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    lines = [" ".join(words[i : i + 9]) for i in range(0, 1800, 9)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    pairs = [(a, b, len({*a.split()} & {*b.split()}) + i / 100) for i, (a, b) in enumerate(zip(lines[:20], lines[1:]))]
    (folder / "pairs.tsv").write_text("a\tb\talike\n" + "".join(f"{a}\t{b}\t{s}\n" for a, b, s in pairs if "\t" not in a + b and '"' not in a + b), encoding="utf-8")
    return ["--config", "small", "--train-file", str(folder / "text.txt"), "--score", str(folder / "pairs.tsv"), "--batch-size", "8", "--steps", "12",
            "--eval-every", "4", "--log-every", "3", "--save-minutes", "0"]  # fmt: skip


def start(*flags: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "diffcse.py"), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"a run ended with {process.returncode}: {error}")


def outcome(folder: Path) -> dict:
    """All that two runs must have in common: weights, log and results, without times."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    del results["command"]
    weights = read_safetensors(folder / "best" / "model.safetensors")
    return {"log": [{key: value for key, value in row.items() if key not in TIMES} for row in log],
            "results": {key: value for key, value in results.items() if key not in TIMES},
            "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.crash", description="Kill a training at random moments, resume it, compare the end.", allow_abbrev=False)
    parser.add_argument("--kills", type=count, default=50, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    moments, kills, started = random.Random(args.seed), [], time.time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = make(folder)
        begun = time.perf_counter()
        finish(start(*flags, "--out-dir", str(folder / "whole")))
        life = time.perf_counter() - begun
        expected = outcome(folder / "whole")
        while len(kills) < args.kills:
            out = folder / "run"
            shutil.rmtree(out, ignore_errors=True)
            command = [*flags, "--out-dir", str(out)]
            while True:
                process = start(*command)
                if len(kills) == args.kills or moments.random() < 0.4 and command[0] == "--resume":
                    break
                time.sleep(moments.uniform(0, life))
                process.send_signal(signal.SIGKILL)
                process.communicate()
                if process.returncode == 0:  # it was faster
                    break
                files = {file.name for file in out.rglob("*")} if out.is_dir() else set()
                kills.append({"in_a_write": any(name.endswith(".tmp") for name in files), "had_a_state": STATE in files, "had_a_best": "best" in files})
                if (out / "results.json").is_file():  # it had ended but for its last breath
                    break
                command = ["--resume", str(out)] if (out / "config.json").is_file() else [*flags, "--out-dir", str(out)]
            if process.poll() is None:
                finish(process)
            same = outcome(out)
            for part in expected:
                if same[part] != expected[part]:
                    raise SystemExit(f"after kill {len(kills)} ({kills[-1]}) the {part} of the resumed run differ; it is in {shutil.copytree(out, 'crashed')}")
            print(f"{len(kills)} kills, the end is the same", flush=True)
    result = {"kills": len(kills), **{key: sum(kill[key] for kill in kills) for key in kills[0]}, "all_ends_equal": True, "minutes": round((time.time() - started) / 60, 1),
              "seconds_of_an_undisturbed_run": round(life, 1)}  # fmt: skip
    print(json.dumps(result))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
