"""An hour of training, watched: does memory grow, are files left open?

    python -m lab.soak [--minutes 60] [--json results/soak.json] -- --config small --train-file FILE --steps 1000000 ...

What follows -- are diffcse.py's flags. Every 30 seconds the run's resident memory and open files are read (from Linux's /proc); at the end it is
asked to stop (SIGTERM), as a queue's time limit would.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from bert import write_atomically
from data import run_main
from eval_sts import count

ROOT = Path(__file__).parent.parent


def look(pid: int) -> dict:
    """Resident memory in MB, and how many files are open."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return {"MB": resident // 1024, "files": len(list(Path(f"/proc/{pid}/fd").iterdir()))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.soak", description="A training watched for memory and files that it does not give back.", allow_abbrev=False)
    parser.add_argument("--minutes", type=count, default=60, help="(default: %(default)s)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("flags", nargs="+", metavar="FLAG", help="of diffcse.py, after --")
    args = parser.parse_args()
    process = subprocess.Popen([sys.executable, str(ROOT / "diffcse.py"), *args.flags])
    started, seen = time.time(), []
    while process.poll() is None and time.time() - started < 60 * args.minutes:
        time.sleep(30)
        if process.poll() is None:
            seen.append({"minute": round((time.time() - started) / 60, 1), **look(process.pid)})
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    result = {"flags": args.flags, "exit_code": code, "minute_5": next((row for row in seen if row["minute"] >= 5), None), "end": seen[-1] if seen else None,
              "most_MB": max((row["MB"] for row in seen), default=None), "seen": seen[::10]}  # fmt: skip
    print(json.dumps(result))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
