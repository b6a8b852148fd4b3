"""Watch a long training run: does its memory grow, and do its files stay open?

    python -m lab.soak [--minutes 60] [--json FILE] -- --config small --train-file FILE ...

What follows -- are flags of diffcse.py; choose --steps so large that the run does not finish. Every
30 seconds the run's resident memory and open files are read from Linux's /proc. At the end the run
gets SIGTERM, as from the time limit of a queue, so its exit code should be 143.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from engine.cli import Parser, positive_int
from engine.errors import run_main, write_atomically

ROOT = Path(__file__).parent.parent


def look(pid: int) -> dict[str, int]:
    """Resident memory in MB, and the number of open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return {"MB": int(resident) // 1024, "files": len(list(Path(f"/proc/{pid}/fd").iterdir()))}


def main() -> None:
    parser = Parser(prog="python -m lab.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=positive_int, default=60, help="(default: 60)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("flags", nargs="+", metavar="FLAG", help="of diffcse.py, after --")
    args = parser.parse_args()
    process = subprocess.Popen([sys.executable, str(ROOT / "diffcse.py"), *args.flags])
    started, rows = time.monotonic(), []
    while process.poll() is None and time.monotonic() - started < 60 * args.minutes:
        time.sleep(30)
        if process.poll() is None:
            minute = round((time.monotonic() - started) / 60, 1)
            rows.append({"minute": minute, **look(process.pid)})
    process.send_signal(signal.SIGTERM)
    result = {
        "flags": args.flags,
        "exit_code": process.wait(),
        "minute_5": next((row for row in rows if row["minute"] >= 5), None),
        "end": rows[-1] if rows else None,
        "most_MB": max((row["MB"] for row in rows), default=None),
        "rows": rows[::10],
    }
    print(json.dumps(result))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
