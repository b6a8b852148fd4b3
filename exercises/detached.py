"""diffcse.py with h detached before the discriminator: its loss does not train the encoder.

    python exercises/detached.py --config exercises/explore.json --lam 500   # diffcse.py's flags

Experiment 5 of EXERCISES.md, and an example of how to try a change without editing a file: a
subclass of the model overrides one method.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of diffcse.py

from diffcse import DiffCSEModel, main
from engine.errors import run_main


class Detached(DiffCSEModel):
    def difference_loss(self, h, batch):
        return super().difference_loss(h.detach(), batch)


if __name__ == "__main__":
    run_main(lambda: main(model_class=Detached))
