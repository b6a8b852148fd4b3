"""lab/bench.py, lab/steps.py and lab/crash.py: that the sides do the same work and take turns, and
that a damaged run is noticed. Their figures are for people to read."""

import itertools
import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from bert import load_bert, write_safetensors
from data import Tokenizer
from diffcse import PRESETS, Config, DiffCSEModel
from engine import cli, fast
from engine.errors import UserError
from engine.model_folder import load_model, save_model
from lab import bench, crash, steps

SMALL_BERT = ROOT / "assets" / "small-bert"


# ------------------------------------------------------------------------------------------------
# A step's sides


@pytest.mark.parametrize("reading", steps.READINGS)
def test_the_peers_loss_equals_ours(reading, tmp_path):
    pytest.importorskip("transformers", reason="the peer is written on it")
    cfg = replace(steps.READINGS[reading], edit="argmax", batch_size=6, lam=0.5)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    rates["initializer_range"] = 0.3
    encoder, generator = (replace(config, **rates) for config in steps.SIZES["tiny"])
    tokenizer = Tokenizer(SMALL_BERT)
    torch.manual_seed(1)
    peer = steps.Peer(cfg, tokenizer.sep_id, encoder, generator).train()
    parts = []
    for name in ("encoder", "generator", "discriminator"):
        getattr(peer, name).save_pretrained(tmp_path / name)
        parts.append(load_bert(tmp_path / name, mlm=name == "generator"))
    ours = DiffCSEModel(cfg, tokenizer, *parts).train()
    peer.projector, peer.head = ours.projector, ours.head
    for batch in steps.make_batches(cfg, tokenizer, 2):
        batch = batch.take(torch.randperm(12), 2)  # views that differ without dropout
        expected, loss = (model(batch)[1]["loss"][0] for model in (ours, peer))
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_each_way_of_a_step_has_its_operations(monkeypatch):
    called, settings = set(), ("tiny", "paper", "off", "cpu")
    for name, owner, attribute in (
        ("dropout", fast.Dropout, "apply"),
        ("attention", fast, "attention"),
        ("linear", fast.Linear, "apply"),
    ):

        def call(x, *args, name=name, original=getattr(owner, attribute)):
            called.add("attention" if x.dim() == 4 else name)  # it drops out its weights
            return original(x, *args)

        monkeypatch.setattr(owner, attribute, call)
    expected = {"fast off": set(), "fast on": {"dropout", "attention"}}
    expected["fast on"] |= {"linear"} if fast.mkl_is_slow() else set()
    for side, operations in expected.items():
        called.clear()
        steps.step_side(side, *settings, 1)()
        assert called == operations, side
    one_step = steps.step_side("fast off", *settings, 1)
    one_step()
    second_loss = one_step()
    assert steps.step_side("fast off", *settings, 2)() == second_loss


# ------------------------------------------------------------------------------------------------
# Taking turns, and the commands


def write_name(file: str, name: str) -> int:
    """The n-th call takes n tenths of a second."""
    with open(file, "a+") as out:
        out.write(name)
        time.sleep(out.tell() / 10)
    return os.getpid()


def test_sides_are_processes_that_take_turns(tmp_path):
    """In alternating order. The first round is a warm-up and is not counted."""
    calls = str(tmp_path / "calls")
    a, b = bench.take_turns({n: partial(partial, write_name, calls, n) for n in "ab"}, 2).values()
    assert Path(calls).read_text() == "ba" + "ab" + "ba"
    assert len({a["result"], b["result"], os.getpid()}) == 3
    for side, least in ((a, [0.3, 0.6]), (b, [0.4, 0.5])):
        assert len(side["seconds"]) == 2
        assert all(seconds >= low for seconds, low in zip(side["seconds"], least))
    with pytest.raises(UserError, match="nowhere: no such model folder"):
        bench.take_turns({"a": partial(bench.evaluate_side, "/nowhere", "", "off")}, 1)


def test_every_command(command, tmp_path, made, monkeypatch):
    """In this process. The first side needs 3 and 4 seconds, the second 6 and 10, or 4 times that
    in each second row."""
    module = "sentence_transformers.sentence_transformer"  # since their version 5
    pytest.importorskip(module, reason="what ours is compared with")

    factors = itertools.cycle([1, 4])

    def take_turns(sides: dict, rounds: int) -> dict:
        measured, factor = {}, next(factors)
        times = ([3, 4], [6 * factor, 10 * factor], [1, 1], [1, 1])
        for (name, side), seconds in zip(sides.items(), times):
            bench.prepare(side)
            measured[name] = bench.work_once() | {"seconds": seconds}
        return measured

    def run(*words) -> tuple[list[dict], str]:
        finished = command(bench.main, *words, "--rounds", 1, "--json", tmp_path / "out.json")
        assert finished.code == 0, finished.err
        result = json.loads((tmp_path / "out.json").read_text())
        lines = [line for line in finished.out.splitlines() if line.startswith("| ")]
        assert len(lines) == 2 + sum(len(row["sides"]) for row in result["rows"])
        assert " 3.500 | " in lines[2] and " 1.00 (1.00 to 1.00) |" in lines[2]
        assert " 8.000 | " in lines[3] and " 2.25 (2.00 to 2.50) |" in lines[3]
        assert result["command"].startswith(f"python -m lab.bench {words[0]}")
        assert result["machine"]["torch"] == torch.__version__
        return result["rows"], finished.out

    monkeypatch.setattr(bench, "take_turns", take_turns)
    rows, out = run("step", "--sizes", "tiny", "--amps", "off", "--steps", 1)
    assert [row["labels"]["reading"] for row in rows] == ["published", "paper"]
    assert all(list(row["sides"]) == ["fast on", "fast off", "transformers"] for row in rows)
    assert "mean speed-up over fast off: 4.50\n" in out

    model = tmp_path / "model"
    save_model(load_model(SMALL_BERT)._replace(pooling="mean"), model)
    (fp32, bf16), _ = run("encode", model, "--sentences", 20)
    assert bf16["labels"] == {"amp": "bf16"}
    assert fp32["sides"]["sentence-transformers"]["result"] == 0
    assert 0 < fp32["sides"]["ours"]["result"] < 1e-5 < bf16["sides"]["ours"]["result"] < 0.01
    (row,), _ = run("evaluate", model, "--data", made)
    off, amp, peer = (side["result"] for side in row["sides"].values())
    assert off == pytest.approx(peer, abs=0.01) and 0 < abs(off - amp) < 0.1

    for words, message in (
        (["encode"], "encode needs a MODEL"),
        (["step", "--amps", "int8"], "'int8' is unknown; choose from off, bf16, fp16"),
    ):
        finished = command(bench.main, *words, "--rounds", 1)
        assert finished.code == 2 and message in finished.err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------
# lab/crash.py


def test_memory_and_open_files_of_a_process(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("reads Linux's /proc")
    before = crash.look(os.getpid())
    with open(tmp_path / "a", "w"), open(tmp_path / "b", "w"):
        assert crash.look(os.getpid())["files"] == before["files"] + 2 and before["MB"] > 10
    assert before["MB"] <= bench.peak_memory() < 10_000


def test_everything_but_times_is_compared_after_a_crash(tmp_path):
    (tmp_path / "best").mkdir()

    def outcome(score=1.0, loss=2.0, weight=3.0, seconds=4.0) -> dict:
        weights = {"w": torch.tensor([weight])}
        write_safetensors(tmp_path / "best" / "model.safetensors", weights)
        row = {"step": 1, "loss": loss, "seconds": seconds, "sentences_per_second": seconds}
        (tmp_path / "log.jsonl").write_text(json.dumps(row) + "\n")
        results = {"after": score, "minutes": seconds, "command": str(seconds)}
        (tmp_path / "results.json").write_text(json.dumps(results))
        return crash.outcome(tmp_path)

    assert outcome(seconds=9.0) == outcome()
    assert all(outcome(**{part: 9.0}) != outcome() for part in ("score", "loss", "weight"))
    assert cli.parse(Config, PRESETS, crash.make_flags(tmp_path))[1].save_minutes == 0
    assert len((tmp_path / "text.txt").read_text(encoding="utf-8").splitlines()) == 200
