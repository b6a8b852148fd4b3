"""diffcse.py with h detached before the discriminator sees it: no gradient of the difference prediction reaches the encoder.

    python exercises/detached.py --config demo --lam 5     # all flags of diffcse.py

Experiment 5 of EXERCISES.md, and an example of how to try a change without editing a file: one function is put in the
place of another, and everything else is as it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, Python looks beside the script only

import diffcse  # noqa: E402
from data import run_main  # noqa: E402

attached = diffcse.discriminate


def detached(model, head, h, *others):
    return attached(model, head, h.detach(), *others)


if __name__ == "__main__":
    diffcse.discriminate = detached
    run_main(diffcse.main)
