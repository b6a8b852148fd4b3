"""Does the discriminator D read h, and does that help the encoder? Runs with another h, or D alone.

    # 1. D and its head alone, encoder and projector fixed: when does D start to read h?
    python -m lab.reads_h --config small --only-d --objective masked --mask-ratio 0.6 --lam 1 \
        --lr 5e-4 --steps 600 --out-dir runs/d
    # 2. Everything, from that D, with the h of its own sentence or with something else in its place
    python -m lab.reads_h --config small --d-from runs/d --given own --lam 1 --out-dir runs/own
    python -m lab.reads_h --config small --d-from runs/d --given other --lam 1 --out-dir runs/other
    python -m lab.report runs/own runs/other       # scores, and the curve of h_gap

The runs of a comparison differ in `--given` alone, or in `--lam 0`. A run of `--only-d` leaves its
D in d.safetensors, with the projector through which D reads h; `--d-from` needs the same `--model`.
h_gap (diffcse.py) compares a sentence's own h with another's, whatever D was trained with.
Not in the paper, where no ablation removes, shuffles or detaches h. Not here: several processes.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from bert import read_safetensors, write_safetensors
from data import Batch
from diffcse import PRESETS, train
from engine import cli
from engine.checkpoint import Metrics
from engine.errors import UserError, atomic_file, run_main
from lab.ablations import AblationConfig, AblationModel

Given = Literal["own", "other", "detached", "none"]
D_FILE = "d.safetensors"
PARTS = ("projector", "discriminator", "head", "heads", "mlm_head")  # in D_FILE


@dataclass
class ReadsHConfig(AblationConfig):
    """Settings of a run."""

    given: Given = "own"  # what D reads: h, another sentence's, h without gradient, or only [CLS]
    only_d: bool = False  # train D and its head alone
    d_from: str = ""  # a run of --only-d, whose D and projector this run starts from
    d_layers: int | None = None  # the first layers of D that are kept (default: all)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_from:
            self.d_from = os.path.abspath(os.path.expanduser(self.d_from))
        if self.edit_as != "difference":
            raise UserError(f"--edit-as {self.edit_as} has no discriminator")
        if self.given == "none" and self.views == "first":
            raise UserError("--given none excludes --views first")
        if self.only_d and self.lam == 0:
            raise UserError("--only-d needs --lam above 0: its loss is lam * difference")
        cli.check(self, [("d_layers", self.d_layers is None or self.d_layers >= 1, "at least 1")])


class ReadsHModel(AblationModel):
    """AblationModel whose D is given something else than h, or is trained alone."""

    @classmethod
    def from_pretrained(cls, cfg: ReadsHConfig) -> "ReadsHModel":
        model = super().from_pretrained(cfg)
        if model.discriminator is not None and cfg.d_layers:
            if cfg.d_layers > (layers := len(model.discriminator.layers)):
                raise UserError(f"--d-layers is {cfg.d_layers}, but --model has {layers} layers")
            model.discriminator.layers = model.discriminator.layers[: cfg.d_layers]
        if cfg.d_from and not cfg.resume:  # a run's state has D
            model.load_d(Path(cfg.d_from) / D_FILE)
        if cfg.only_d:
            model.encoder.requires_grad_(False)
            model.projector.requires_grad_(False)
        return model

    def d_tensors(self) -> dict[str, Tensor]:
        state = self.state_dict()
        return {name: state[name] for name in state if name.partition(".")[0] in PARTS}

    def load_d(self, path: Path) -> None:
        """A head that the file lacks, because D had another objective, stays new.

        With lam 0 there is no D: the run has the same projector.
        """
        if not path.is_file():
            raise UserError(f"--d-from {path.parent}: not a finished run of --only-d (no {D_FILE})")
        saved, own = read_safetensors(path), self.d_tensors()
        for part in ("projector", "discriminator"):
            shapes = [
                {name: tensor.shape for name, tensor in tensors.items() if name.startswith(part)}
                for tensors in (saved, own)
            ]
            if shapes[1] and shapes[0] != shapes[1]:
                raise UserError(f"--d-from {path.parent}: its {part} has another shape")
        for name in own.keys() & saved.keys():
            own[name].copy_(saved[name])

    def difference_loss(self, h: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        given = self.cfg.given
        if given == "none":
            h = None  # the embedding of [CLS] stays
        elif given == "other" and self.training:  # h_gap, in eval mode, gives it both
            h = h.roll(batch.views, 0)
        elif given == "detached":
            h = h.detach()
        return super().difference_loss(h, batch)


def run(cfg: ReadsHConfig, name: str) -> tuple[dict, ReadsHModel]:
    """train, with the model after its last step. With only_d, D is written to D_FILE.

    Raises: UserError, as train.
    """
    made = []

    class Kept(ReadsHModel):
        @classmethod
        def from_pretrained(cls, cfg: ReadsHConfig) -> ReadsHModel:
            made.append(super().from_pretrained(cfg))
            return made[-1]

    results = train(cfg, name, Kept)
    if cfg.only_d:  # after a kill from here on, start again
        with atomic_file(Path(results["folder"]) / D_FILE) as path:
            write_safetensors(path, made[-1].d_tensors())
    return results, made[-1]


def main() -> None:
    name, cfg = cli.parse(ReadsHConfig, PRESETS)
    results, _ = run(cfg, name)
    if cfg.only_d:
        print(f"The discriminator is in {Path(results['folder']) / D_FILE}")


if __name__ == "__main__":
    run_main(main)
