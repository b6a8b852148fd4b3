"""Kill a training run at random moments and resume it: it must end as an undisturbed run does.

    python -m lab.crash [--kills 50] [--json FILE]

Each round kills a run with SIGKILL at a random moment, resumes it, perhaps kills it again, and lets
it end. Weights, log and scores must equal the undisturbed run's bit for bit, except for times. The
run saves its state at every step, so that many kills hit a write.
"""

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bert import read_safetensors
from data import read_lines
from engine.cli import Parser, positive_int
from engine.errors import run_main, write_atomically
from engine.checkpoint import STATE

ROOT = Path(__file__).parent.parent
MAY_DIFFER = ("seconds", "sentences_per_second", "minutes", "command", "folder")


def make(folder: Path) -> list[str]:
    """Flags of a small run on a part of the demo's sentences and pairs."""
    sources = {"text.txt": "wikipedia_20k.txt.xz", "pairs.tsv": "sts_captions_dev.tsv"}
    for name, source in sources.items():
        lines = itertools.islice(read_lines(ROOT / "assets" / source), 200)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = ["--train-file", str(folder / "text.txt"), "--score", str(folder / "pairs.tsv")]
    steps = ["--batch-size", "8", "--steps", "12", "--eval-every", "4", "--log-every", "3"]
    return ["--config", "small", *files, *steps, "--save-minutes", "0"]


def start(*flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "diffcse.py"), *flags]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=ROOT, **pipes)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"a run ended with {process.returncode}: {error}")


def outcome(folder: Path) -> dict:
    """What two equal runs have in common: weights, log and results."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    weights = read_safetensors(folder / "best" / "model.safetensors")
    return {
        "log": [{key: row[key] for key in row if key not in MAY_DIFFER} for row in rows],
        "results": {key: results[key] for key in results if key not in MAY_DIFFER},
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
    }


def run_with_kills(out: Path, flags: list[str], life: float, moments, most: int) -> list[dict]:
    """One run that is killed at most that often, and ends. Returns what each kill met."""
    shutil.rmtree(out, ignore_errors=True)
    begin, kills = [*flags, "--out-dir", str(out)], []
    command = begin
    while True:
        process = start(*command)
        if len(kills) == most or (command is not begin and moments.random() < 0.4):
            break
        time.sleep(moments.uniform(0, life))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # it ended first
            break
        files = {file.name for file in out.rglob("*")} if out.is_dir() else set()
        kills.append(
            {
                "in_a_write": any(name.endswith(".tmp") for name in files),
                "had_a_state": STATE in files,
                "had_a_best": "best" in files,
            }
        )
        if "results.json" in files:  # it was about to exit
            break
        command = ["--resume", str(out)] if "config.json" in files else begin
    if process.poll() is None:
        finish(process)
    return kills


def main() -> None:
    parser = Parser(prog="python -m lab.crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=positive_int, default=50, help="(default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    moments, started, kills = random.Random(args.seed), time.monotonic(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary), Path(temporary, "run")
        flags = make(folder)
        finish(start(*flags, "--out-dir", str(folder / "undisturbed")))
        life, expected = time.monotonic() - started, outcome(folder / "undisturbed")
        while len(kills) < args.kills:
            kills += run_with_kills(out, flags, life, moments, args.kills - len(kills))
            ended = outcome(out)
            if wrong := [part for part in expected if ended[part] != expected[part]]:
                kept = shutil.copytree(out, "crashed")
                raise SystemExit(f"after kill {len(kills)} other {', '.join(wrong)}: {kept}")
            print(f"{len(kills)} kills, the end is the same", flush=True)
    counts = {name: sum(kill[name] for kill in kills) for name in kills[0]}
    result = {"kills": len(kills), **counts, "all_ends_equal": True}
    result["minutes"] = round((time.monotonic() - started) / 60, 1)
    result["seconds_of_an_undisturbed_run"] = round(life, 1)
    print(json.dumps(result))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
