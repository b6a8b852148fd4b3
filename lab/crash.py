"""Two long tests of a training run: kill it at random moments, or watch its memory for an hour.

    python -m lab.crash [--kills 50] [--json FILE]
    python -m lab.crash --soak 60 [--json FILE]

A run is killed (SIGKILL) and resumed until it ends. Its weights, log and scores must equal an
undisturbed run's bit for bit, except for times. It saves its state at every step, so that many
kills hit a write.

--soak MINUTES: every 30 seconds the resident memory and the open files of an endless run are read
from Linux's /proc. At the end the run gets SIGTERM, as from a queue: its exit code should be 143.
"""

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from bert import read_json
from data import read_lines
from engine.cli import Parser, positive_int
from engine.errors import run_main, write_atomically
from engine.hub import ROOT
from lab.plots import read_log

MAY_DIFFER = ("seconds", "sentences_per_second", "minutes", "command", "folder")


def make_flags(folder: Path) -> list[str]:
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
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen) -> None:
    if code := process.wait():
        raise SystemExit(f"a run ended with exit code {code}; its error is on stderr")


def outcome(folder: Path) -> dict:
    """What two equal runs have in common."""
    rows = [*read_log(folder / "log.jsonl"), read_json(folder / "results.json")]
    rows = [{key: row[key] for key in row if key not in MAY_DIFFER} for row in rows]
    return {"rows": rows, "weights": (folder / "best" / "model.safetensors").read_bytes()}


def kill(kills: int, folder: Path) -> dict:
    """Counts what the kills met. Raises: SystemExit if a run did not end as the undisturbed one."""
    rng, run, counts = random.Random(0), folder / "run", Counter()
    flags, started = make_flags(folder), time.monotonic()
    finish(start(*flags, "--out-dir", str(folder / "undisturbed")))
    life, expected = time.monotonic() - started, outcome(folder / "undisturbed")
    while True:
        resume = (run / "config.json").exists()
        process = start(*(["--resume", str(run)] if resume else [*flags, "--out-dir", str(run)]))
        is_spared = resume and rng.random() < 0.4
        if counts["kills"] < kills and not is_spared:
            time.sleep(rng.uniform(0, life))
            process.kill()
        if process.wait() == -signal.SIGKILL:
            counts["kills"] += 1
            counts["in_a_write"] += any(run.rglob("*.tmp"))
        else:
            finish(process)  # it ended before the kill, and must not have failed
        if not (run / "results.json").exists():
            continue
        ended = outcome(run)
        if wrong := [part for part in expected if ended[part] != expected[part]]:
            kept = shutil.copytree(run, "crashed")
            raise SystemExit(f"after kill {counts['kills']} other {', '.join(wrong)}: {kept}")
        print(f"{counts['kills']} kills, the end is the same", file=sys.stderr)
        if counts["kills"] == kills:
            return dict(counts) | {"all_ends_equal": True}
        shutil.rmtree(run)


def look(pid: int) -> dict[str, int]:
    """Resident memory in MB, and the number of open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return {"MB": int(resident) // 1024, "files": len(list(Path(f"/proc/{pid}/fd").iterdir()))}


def soak(minutes: int, folder: Path) -> dict:
    steps = ["--steps", "1000000000", "--eval-every", "200", "--save-minutes", "1"]
    process = start("--config", "demo", *steps, "--out-dir", str(folder / "run"))
    rows = []
    for half_minute in range(1, 2 * minutes + 1):
        time.sleep(30)
        if process.poll() is not None:
            raise SystemExit(f"the run ended early, with exit code {process.returncode}")
        rows.append({"minute": half_minute / 2} | look(process.pid))
    process.terminate()
    most = max(row["MB"] for row in rows)
    return {"exit_code": process.wait(), "most_MB": most, "end": rows[-1], "seen": rows[::10]}


def main() -> None:
    parser = Parser(prog="python -m lab.crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=positive_int, default=50, help="(default: 50)")
    parser.add_argument("--soak", type=positive_int, metavar="MINUTES", help="watch instead")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        test, size = (soak, args.soak) if args.soak else (kill, args.kills)
        result = test(size, Path(folder))
    result["minutes"] = round((time.monotonic() - started) / 60, 1)
    print(json.dumps(result))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
