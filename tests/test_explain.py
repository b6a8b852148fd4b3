"""lab/explain.py: its numbers are those of the training step, whatever the sentence."""

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
from data import Batch, mask_tokens
from diffcse import PRESETS, Config, DiffCSEModel, derive_seed
from engine import cli, fast
from engine.errors import UserError
from engine.checkpoint import load_state, load_state_dict
from engine.run import Run
from engine.tokens import TokenizedSentences
from lab import explain

ROOT = Path(__file__).parent.parent
DEMO = PRESETS["demo"]
SENTENCES = {
    "plain": "The cat sat on the mat .",
    "capitals": "THE PRESIDENT OF FRANCE MET ANGELA MERKEL IN BERLIN",
    "long": " and ".join(
        "one two three four five six seven eight nine ten red green blue black white king".split()
        + "queen house river road".split()
    ),
    "unknown": "Snow ☃ falls on 東 Zürich 🦊 .",
    "one word": "x",
    "one of the others": explain.OTHERS[0],
}


def step_metrics(cfg: Config, sentence: str) -> dict[str, float]:
    """The metrics of the same step, from DiffCSEModel.forward as train calls it."""
    torch.manual_seed(cfg.seed)
    model, step = DiffCSEModel.from_pretrained(cfg), 0
    if cfg.resume:
        tensors, state = load_state(Path(cfg.resume))
        load_state_dict(tensors, model, diffcse.make_optimizer(model))
        step = state["step"]
    texts = dict.fromkeys([" ".join(sentence.split()), *explain.OTHERS])
    sentences = TokenizedSentences([(text,) for text in texts], model.tokenizer, cfg.max_length)
    x, mask = sentences.rows(np.arange(len(texts)))
    rng = torch.Generator().manual_seed(derive_seed(cfg.seed, step, 0))
    masked = mask_tokens(x, model.tokenizer, cfg.mask_ratio, cfg.masking, rng)
    torch.manual_seed(derive_seed(cfg.seed, step, 1))
    _, metrics = fast.accelerate(model.train(), model, cfg.fast)(Batch(x, mask, *masked))
    return {name: float(total / count) for name, (total, count) in metrics.items()}


def assert_same_numbers(cfg: Config, sentence: str, text: str) -> None:
    metrics, text = step_metrics(cfg, sentence), " ".join(text.split())
    contrastive = float(re.search(r"is the contrastive loss: (\S+)", text)[1])
    assert math.isclose(contrastive, metrics["contrastive"], abs_tol=6e-5)
    if cfg.lam == 0:
        assert "this is the whole loss: SimCSE" in text and "generator" not in text
        return
    difference = float(re.search(r"of all edited sentences: (\S+)", text)[1])
    total = float(re.search(r"= (\S+)$", text)[1])
    assert math.isclose(difference, metrics["difference"], rel_tol=1e-4, abs_tol=6e-5)
    assert math.isclose(total, metrics["loss"], rel_tol=1e-4, abs_tol=6e-5)
    assert ("The second view" in text) == (cfg.views == "both")


PAPER = dict(edit="sample", edit_scope="masked", masking="all", generator_dropout=False)
PAPER |= dict(pads_in_loss=False, views="first", protect_sep=True)


@pytest.mark.parametrize(
    "name, changes",
    [
        *((name, {}) for name in SENTENCES),
        ("plain", PAPER),
        ("plain", {"reduction": "sum"}),
        ("plain", {"fast": False}),
        ("unknown", {"lam": 0.0}),
        ("plain", {"lam": 0.3, "contrastive": False}),
        ("long", {"seed": 7, "projector": "tanh", "max_length": 64}),
    ],
)
def test_numbers_are_those_of_the_step(name, changes):
    cfg, sentence = replace(DEMO, **changes), SENTENCES[name]
    assert_same_numbers(cfg, sentence, explain.explain(cfg, sentence))


def token_table(text: str) -> list[dict[str, str]]:
    """The second table's rows, by column. Cells are at least two spaces apart."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "x'' edited" in line)
    names = ["t", *re.split(r"\s{2,}", lines[start].strip())]
    rows = lines[start + 1 : lines.index("", start)]
    return [dict(zip(names, re.split(r"\s{2,}", row.strip()), strict=True)) for row in rows]


@pytest.mark.parametrize("name", SENTENCES)
def test_the_table_is_consistent(name):
    text = explain.explain(DEMO, SENTENCES[name])
    first, *rows = token_table(text)
    assert [first["t"], *(row["t"] for row in rows)] == [str(t) for t in range(len(rows) + 1)]
    assert [first[key] for key in ("x", "x'' edited", "label")] == ["[CLS]", "h", "original"]
    assert rows[-1]["x"] == "[SEP]" and len(rows) < 32
    for row in rows:
        assert (row["label"] == "replaced") == (row["x"] != row["x'' edited"]), row
        assert row["x' masked"] == row["x"] or row["x' masked"].endswith(" *"), row
        p = float(row["with h"].rstrip(" %")) / 100
        loss = -math.log(p if row["label"] == "replaced" else 1 - p)
        assert abs(loss - float(row["loss"])) < 0.01, row
    assert max(map(len, text.splitlines())) <= 100
    assert bool(re.search(r"Cut off by --max-length 32: \w+", text)) == (name == "long")
    assert ("[UNK] stands for ☃, 🦊" in text) == (name == "unknown")
    if name == "capitals":
        assert [row["x"] for row in rows[:3]] == ["the", "president", "of"]
        assert "THE PRESIDENT" in text


def test_explanations_depend_on_the_seed_alone():
    texts = [explain.explain(replace(DEMO, seed=seed), "A red house .") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_command(monkeypatch):
    command = ["-m", "lab.explain", "--config", "demo", SENTENCES["plain"]]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    expected = explain.explain(DEMO, SENTENCES["plain"]) + "\n"
    assert (done.returncode, done.stderr, done.stdout) == (0, "", expected)
    for words, message in (([], "required: SENTENCE"), (["  "], "the sentence is empty")):
        monkeypatch.setattr(sys, "argv", ["explain.py", "--config", "demo", *words])
        with pytest.raises(UserError, match=message):
            explain.main()


def test_the_next_step_of_a_stopped_run(tmp_path, monkeypatch):
    text, pairs, out = tmp_path / "text.txt", tmp_path / "pairs.tsv", tmp_path / "run"
    text.write_text("\n".join(f"the {a} man plays chess ." for a in "old young tall sad".split()))
    pairs.write_text("a\tb\tscore\nthe cat\tthe dog\t3\nred\tblue\t1\none two\tone two three\t5\n")
    cfg = replace(DEMO, train_file=str(text), score=str(pairs), batch_size=4, lr=1e-3)
    monkeypatch.setattr(Run, "stop_requested", lambda run: run.step == 3)
    with pytest.raises(SystemExit):
        diffcse.train(replace(cfg, out_dir=str(out)))
    _, cfg = cli.parse(Config, PRESETS, ["--resume", str(out)])
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    told = explain.explain(cfg, SENTENCES["plain"])
    assert told.startswith(f"Step 4 of the run in {out}") and "is new" not in told
    assert_same_numbers(cfg, SENTENCES["plain"], told)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    (out / "state.safetensors").unlink()
    with pytest.raises(UserError, match="no saved step. A finished run keeps its encoder only"):
        explain.explain(cfg, SENTENCES["plain"])
