"""diffcse.py --explain: its numbers are those of the step itself, whatever the sentence."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import diffcse
from bert import UserError
from config import Config, load_preset, parse_args
from data import TokenizedSentences, mask_tokens
from lab import explain

ROOT = Path(__file__).parent.parent
DEMO = load_preset("demo")
SENTENCES = {
    "plain": "The cat sat on the mat .",
    "capitals": "THE PRESIDENT OF FRANCE MET ANGELA MERKEL IN BERLIN",
    "forty": " ".join(f"{word} and" for word in "one two three four five six seven eight nine ten red green blue black white king queen house river road".split()),
    "unknown": "Snow ☃ falls on 東 Zürich 🦊 .",
    "one word": "x",
    "one of the others": explain.OTHERS[0],
}  # fmt: skip


def step_of(cfg: Config) -> dict[str, float]:
    """The same step by TrainingModel.forward itself."""
    torch.manual_seed(cfg.seed)
    model, tokenizer = diffcse.build(cfg)
    model.train()
    batch = dict.fromkeys([" ".join(cfg.explain.split()), *explain.OTHERS])
    x, mask = TokenizedSentences(((s,) for s in batch), tokenizer, cfg.max_length).batch(np.arange(len(batch)))
    x_masked, selected = mask_tokens(x, tokenizer, cfg.mask_ratio, cfg.mask, torch.Generator().manual_seed(diffcse.seed_of(cfg.seed, 0, 1)))
    torch.manual_seed(diffcse.seed_of(cfg.seed, 0, 2))
    return {name: float(value) for name, value in model(x, mask, x_masked, selected)[1].items()}


PAPER = {"edit": "sample", "edit_scope": "masked", "mask": "all", "generator_dropout": False, "pads_in_loss": False, "views": "first", "protect_sep": True}


@pytest.mark.parametrize("name, changes", [*((name, {}) for name in SENTENCES), ("plain", PAPER), ("plain", {"reduction": "sum"}), ("unknown", {"lam": 0.0}),
                                           ("plain", {"lam": 0.3, "contrastive": False}), ("forty", {"seed": 7, "projector": "tanh", "max_length": 64})])  # fmt: skip
def test_the_numbers_are_those_of_the_step(name, changes):
    cfg = replace(DEMO, explain=SENTENCES[name], **changes).check()
    text, sums = explain.explain(cfg), step_of(cfg)
    contrastive = float(re.search(r"is the contrastive loss: (\S+)", text)[1])
    assert math.isclose(contrastive, sums["contrastive"], abs_tol=6e-5)
    if cfg.lam == 0:
        assert "that is the whole loss: SimCSE" in text and "generator" not in text
        return
    prediction = float(re.search(r"of all edited sentences: (\S+)", text)[1])
    total = float(re.search(r"= (\S+)$", text)[1])
    assert math.isclose(prediction, sums["prediction"], rel_tol=1e-4, abs_tol=6e-5) and math.isclose(total, sums["loss"], rel_tol=1e-4, abs_tol=6e-5)
    assert ("The second view" in text) == (cfg.views == "both")


def table_of(text: str) -> list[dict[str, str]]:
    """The second table's rows, by column: cells stand at least two blanks apart."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "x'' edited" in line)
    names = ["t", *re.split(r"\s{2,}", lines[start].strip())]
    rows = []
    for line in lines[start + 1 :]:
        if not line.strip():
            return rows
        rows.append(dict(zip(names, re.split(r"\s{2,}", line.strip()), strict=True)))
    return rows


@pytest.mark.parametrize("name", SENTENCES)
def test_the_table_can_be_followed(name):
    text = explain.explain(replace(DEMO, explain=SENTENCES[name]))
    rows = table_of(text)
    assert [row["t"] for row in rows] == [str(t) for t in range(len(rows))] and len(rows) <= 32
    assert (rows[0]["x"], rows[0]["x'' edited"], rows[0]["label"], rows[-1]["x"]) == ("[CLS]", "h", "kept", "[SEP]")
    for row in rows[1:]:
        assert (row["label"] == "replaced") == (row["x"] != row["x'' edited"]), row
        assert row["x' masked"] == row["x"] or row["x' masked"].endswith(" *"), row  # other tokens only where it is marked
        share = float(row["D with h"].rstrip(" %")) / 100
        assert abs(-math.log(share if row["label"] == "replaced" else 1 - share) - float(row["loss"])) < 0.01, row
    assert max(map(len, text.splitlines())) <= 150
    assert ("Cut off by --max-length 32" in text) == (name == "forty") and ("stands for ☃, 🦊" in text) == (name == "unknown")
    assert name != "capitals" or ("merkel" not in rows[0]["x"] and [row["x"] for row in rows[1:4]] == ["the", "president", "of"] and "THE PRESIDENT" in text)
    assert name != "forty" or "Cut off by --max-length 32: black" in text or re.search(r"Cut off by --max-length 32: \w+", text)


def test_two_explanations_are_alike_and_another_seed_is_another():
    once, again, other = (explain.explain(replace(DEMO, explain="A red house .", seed=seed)) for seed in (1, 1, 2))
    assert once == again != other


@pytest.mark.parametrize("changes, message", [
    ({"explain": "   "}, "no word in it"), ({"objective": "masked"}, "paper's own step"), ({"edit_with": "delete"}, "paper's own step")])  # fmt: skip
def test_what_cannot_be_explained(changes, message):
    with pytest.raises(UserError, match=message):
        explain.explain(replace(DEMO, **{"explain": "x y"} | changes))


def test_the_command_and_a_run_that_was_stopped(tmp_path):
    """As in the README; then with the state of a run: its own step, its own discriminator."""
    done = subprocess.run([sys.executable, "diffcse.py", "--config", "demo", "--explain", SENTENCES["plain"]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout == explain.explain(replace(DEMO, explain=SENTENCES["plain"])) + "\n"
    out = tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the {a} man plays {b} ." for a in "old young tall".split() for b in "guitar chess football piano".split()))
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("a\tb\tscore\nthe cat\tthe dog\t3\nred\tblue\t1\none two\tone two three\t5\n")
    words = ["--config", "demo", "--train-file", str(text), "--score", str(pairs), "--steps", "400", "--batch-size", "4", "--save-minutes", "0",
             "--eval-every", "400", "--lr", "1e-3", "--out-dir", str(out)]  # fmt: skip
    run = subprocess.Popen([sys.executable, "diffcse.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").is_file() or (out / "log.jsonl").read_text().count("\n") < 3:
        assert run.poll() is None, run.stderr.read()
    run.terminate()
    run.communicate()
    assert run.returncode == 143
    _, cfg = parse_args(["--resume", str(out), "--explain", SENTENCES["plain"]])
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    told = explain.explain(cfg)
    assert f"of the run in {out}" in told and "is new" not in told and int(re.match(r"Step (\d+)", told)[1]) > 2
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before  # nothing was trained or written
    (out / "state.safetensors").unlink()
    with pytest.raises(UserError, match="it has no state. A run that has ended keeps its encoder only"):
        explain.explain(cfg)
