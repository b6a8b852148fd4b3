"""lab/reads_h.py: what the discriminator is given, and a discriminator that is trained alone."""

import json
from pathlib import Path

import pytest
import torch

from bert import read_safetensors
from diffcse import draw_batch
from engine.errors import UserError
from lab import reads_h
from lab.reads_h import ReadsHConfig, ReadsHModel


def flags(tiny: Path, out: Path, *more: str) -> list[str]:
    (out.parent / "pairs.tsv").write_text("a\tb\tscore\nthe cat\ta cat\t5\nthe dog\ta house\t1\n")
    words = f"--config small --model {tiny} --generator {tiny} --train-file {tiny}/text.txt"
    words += f" --score {out.parent}/pairs.tsv --steps 4 --eval-every 2 --batch-size 8"
    words += f" --device cpu --amp off --lr 1e-2 --lam 1 --out-dir {out}"
    return [*words.split(), *more]


def model_and_batch(tiny: Path, **settings) -> tuple[ReadsHModel, object]:
    torch.manual_seed(0)
    files = {"model": str(tiny), "generator": str(tiny), "train_file": str(tiny / "text.txt")}
    fixed = {"dropout": 0.0, "generator_dropout": False, "contrastive": False, "lam": 1.0}
    cfg = ReadsHConfig(batch_size=8, **files | fixed | settings)
    model = ReadsHModel.from_pretrained(cfg)
    return model.train(), draw_batch(model.load_sentences(), model.tokenizer, cfg, step=0)


@pytest.mark.parametrize("objective", ["replaced", "masked"])
@pytest.mark.parametrize("given", ["own", "other", "detached", "none"])
def test_what_the_discriminator_is_given(tiny, given, objective):
    """And whose h gets the gradient of a sentence's loss."""
    model, batch = model_and_batch(tiny, given=given, objective=objective)
    seen = []

    def record(ids, mask, cls_vector=None):
        seen.append(cls_vector)
        return forward(ids, mask, cls_vector)

    forward, model.discriminator.forward = model.discriminator.forward, record
    if given == "other" and objective == "masked":
        batch.selected[:] = False
        batch.selected[:2, 1] = True  # of the first sentence
    cls = model.encoder(batch.x, batch.mask)[:, 0]
    h = model.projector(cls).detach().requires_grad_()
    loss, _ = model.difference_loss(h, batch)
    loss.backward()
    expected = {"own": h, "detached": h, "other": torch.cat([h[-2:], h[:-2]]), "none": None}[given]
    assert seen[0] is expected is None or torch.equal(seen[0], expected)
    assert (h.grad is not None) == (given in ("own", "other"))
    if given == "other" and objective == "masked":
        reached = h.grad.abs().sum(1).nonzero().flatten().tolist()
        assert reached == [len(h) - 2, len(h) - 1]

    with torch.no_grad():
        model.eval().difference_loss(h, batch)  # as h_gap calls it
    assert seen[1] is None if given == "none" else torch.equal(seen[1], h)
    assert (model.h_gap(batch) == 0) == (given == "none")


def test_a_discriminator_trained_alone_and_a_run_that_starts_from_it(tiny, tmp_path, command):
    alone, words = tmp_path / "alone", ["--only-d", "--objective", "masked", "--seed", "3"]
    done = command(reads_h.main, *flags(tiny, alone, *words))
    assert done.code == 0, done.err
    saved = read_safetensors(alone / "d.safetensors")
    torch.manual_seed(3)
    cfg = ReadsHConfig(**json.loads((alone / "config.json").read_text()))
    start = ReadsHModel.from_pretrained(cfg).d_tensors()
    assert saved.keys() == start.keys()
    for name, tensor in saved.items():
        is_fixed = name.startswith("projector") and "running" not in name and "tracked" not in name
        assert torch.equal(tensor, start[name]) == is_fixed or name.endswith("key.bias"), name
    encoders = [read_safetensors(f / "model.safetensors") for f in (tiny, alone / "best")]
    for name, tensor in encoders[1].items():
        assert torch.equal(tensor, encoders[0][name].to(tensor.dtype)), name

    tanh = ["--lam", "0", "--projector", "tanh"]
    cfg = reads_h.cli.parse(ReadsHConfig, reads_h.PRESETS, flags(tiny, alone, *tanh))[1]
    cfg.d_from = str(alone)
    with pytest.raises(UserError, match="its projector has another shape"):
        ReadsHModel.from_pretrained(cfg)
    for more in ([], ["--lam", "0"], ["--objective", "masked", "--seed", "4"]):
        cfg = reads_h.cli.parse(ReadsHConfig, reads_h.PRESETS, flags(tiny, alone, *more))[1]
        cfg.d_from = str(alone)
        loaded = ReadsHModel.from_pretrained(cfg).d_tensors()
        shared = loaded.keys() & saved.keys()
        assert len(shared) > 6 and all(torch.equal(loaded[name], saved[name]) for name in shared)
    done = command(reads_h.main, *flags(tiny, tmp_path / "all", "--d-from", str(alone)))
    assert done.code == 0, done.err


def test_the_first_layers_of_d(tiny):
    model, batch = model_and_batch(tiny, d_layers=1)
    assert len(model.discriminator.layers) == 1 < len(model.encoder.layers)
    kept, first = model.discriminator.layers[0], model.encoder.layers[0]
    assert torch.equal(kept.up.weight, first.up.weight)
    model(batch)[0].backward()


MISTAKES = [
    ("--d-from no", "no: not a finished run of --only-d (no d.safetensors)"),
    ("--only-d --lam 0", "--only-d needs --lam above 0"),
    ("--d-layers 0", "--d-layers is 0; it must be at least 1"),
    ("--d-layers 9", "--d-layers is 9, but --model has 2 layers"),
    ("--edit-as positive", "--edit-as positive has no discriminator"),
    ("--given none --views first", "--given none excludes --views first"),
]


@pytest.mark.parametrize("words, message", MISTAKES)
def test_mistakes_are_one_line(tiny, tmp_path, command, words, message):
    done = command(reads_h.main, *flags(tiny, tmp_path / "out", *words.split()))
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_d_of_another_size_is_refused(tiny, tmp_path, command):
    words = flags(tiny, tmp_path / "alone", "--only-d", "--d-layers", "1")
    assert command(reads_h.main, *words).code == 0
    words = flags(tiny, tmp_path / "out", "--d-from", str(tmp_path / "alone"))
    done = command(reads_h.main, *words)
    assert done.code == 2 and "its discriminator has another shape" in done.err
