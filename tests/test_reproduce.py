"""lab/reproduce.py: the search, shared runs, budgets, verdicts, and a real sweep."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, one_line
from diffcse import PRESETS
from engine.errors import UserError
from eval_sts import TEST_SETS
from lab import reproduce
from lab.reproduce import RECIPES, SAME_RECIPE, Sweep, parse_words, tables_of

BEST = {"lr": 3e-4, "lam": 0.5, "mask_ratio": 0.15}  # of fake_runs
PARAGRAPHS = "--train-file x.txt --text paragraphs --data D --amp bf16".split()


@pytest.fixture
def fake_runs(monkeypatch):
    """Sweep.execute, replaced by a function with a known optimum; a list of its calls."""
    calls = []

    def execute(sweep, program, words):
        if program == ["-m", "lab.transfer"]:
            folder = Path(words[0]).parent
            assert (folder / "best").is_dir() and words[1:3] == ["--mode", "fast"]
            assert words[5:] == ["--data", "D", "--amp", "bf16"]
            calls.append(folder)
            Path(words[4]).write_text(json.dumps({"dev": {"average": 80 + int(folder.name[4:])}}))
            return
        cfg = parse_words(words)
        calls.append(cfg)
        is_plain = cfg.text == "sentences" and not cfg.is_ablation
        assert program == (["diffcse.py"] if is_plain else ["-m", "lab.ablations"])
        dev = 70 + 0.01 * cfg.seed
        for name, best in BEST.items():
            if cfg.lam or name == "lr":
                dev -= abs(np.log(getattr(cfg, name) / best))
        names = ("STSB-dev", *TEST_SETS, "average") if cfg.score == "stsb" else ("STSB-dev",)
        result = {"before": dict.fromkeys(names, 1), "before_first_last": dict.fromkeys(names, 2)}
        result |= {"after": {name: dev + i for i, name in enumerate(names)}, "dev_best": dev}
        result |= {"seed": cfg.seed, "minutes": 2.0, "command": " ".join(words)}
        result |= dict.fromkeys(("best_step", "machine", "precision"))
        (Path(cfg.out_dir) / "best").mkdir(parents=True)
        for name, value in ("config", asdict(cfg) | {"out_dir": ""}), ("results", result):
            (Path(cfg.out_dir) / f"{name}.json").write_text(json.dumps(value))

    monkeypatch.setattr(Sweep, "execute", execute)
    return calls


def run_tables(out, *numbers, seeds=(0, 1), more=PARAGRAPHS, **options) -> dict:
    """The tables with their runs."""
    tables = tables_of("small", reproduce.SMALL_GENERATORS)
    tables = {number: tables[number] for number in numbers}
    reproduce.run_tables(Sweep(out, "small", more, **options), tables, list(seeds))
    return tables


def test_rows_of_table_1_are_searched_on_dev_then_run_with_the_seeds(fake_runs, tmp_path):
    options = {"seeds": [0, 1, 2], "more": [], "transfer": True}
    table = run_tables(tmp_path, "1", **options)["1"]
    scores = [cfg.score for cfg in fake_runs if cfg.seed == reproduce.SEARCH_SEED]
    # SimCSE: 3 rates. DiffCSE: 3 rates, 2 more lambdas, 1 more mask ratio.
    assert scores == ["dev"] * (3 + 3 + 6 + 6)
    assert [cfg.score for cfg in fake_runs[len(scores) :]] == ["stsb"] * 4 * 3
    for row in table.rows:
        assert len(row.search) == (1 if row.flags["lam"] == 0 else 3)
        assert {name: row.flags[name] for name in row.search}.items() <= BEST.items()
        assert [run["seed"] for run in row.runs] == [0, 1, 2]
        if len(row.paper) > 1:  # the paper's average is that of its figures
            assert np.mean(row.paper[1:-1]) == pytest.approx(row.paper[-1], abs=0.006)
    first_last, cls, *_, published, _ = [row.runs[2] for row in table.rows]
    assert (first_last["average"], cls["average"]) == (2, 1)
    assert published["STSB-dev"] == 70.02 and published["average"] == 78.02
    count = len(fake_runs)
    assert run_tables(tmp_path, "1", jobs=3, **options)["1"] == table
    assert len(fake_runs) == count


@pytest.mark.parametrize("jobs", [1, 4])
def test_tables_share_runs(fake_runs, tmp_path, capsys, jobs):
    found = run_tables(tmp_path, "8", "3", "5", jobs=jobs, transfer=True)
    runs = [cfg for cfg in fake_runs if not isinstance(cfg, Path)]
    # 8 lambdas; 10 rows of Table 3 and 5 of Table 5, of which 2 and 4 are in another table
    assert len(runs) == len({str(cfg) for cfg in runs}) == len(fake_runs) // 2 == 2 * 17
    assert {cfg.score for cfg in runs} == {"dev"} and {cfg.text for cfg in runs} == {"paragraphs"}
    assert not list(tmp_path.rglob("best"))
    assert found["3"].rows[1].flags == {"lam": 0.0, "projector": "tanh"}
    same = found["8"].rows[6].runs
    assert found["3"].rows[2].runs == found["5"].rows[1].runs == same
    assert [run["transfer-dev"] for run in same] == [80, 81]
    if jobs == 1:  # every row with the first seed, then with the second
        assert [cfg.seed for cfg in runs] == [0] * 17 + [1] * 17
    shutil.rmtree(next(tmp_path.rglob("lam=0.1/seed1")))
    capsys.readouterr()
    assert run_tables(tmp_path, "5", "3", jobs=jobs) == {n: found[n] for n in "53"}
    run_tables(tmp_path, "8", jobs=jobs)
    assert len(fake_runs) == 2 * 2 * 17 + 1
    assert capsys.readouterr().out == "22 runs, 22 of them done\n16 runs, 15 of them done\n"


def test_a_run_is_repeated_if_transfer_needs_its_deleted_model(fake_runs, tmp_path):
    for transfer, runs in [(False, 4), (True, 4 + 4 + 4), (True, 4 + 4 + 4)]:
        run_tables(tmp_path, "5", seeds=[0], transfer=transfer)
        assert len(fake_runs) == runs
    folder = fake_runs[-1]
    (folder / "transfer.json").unlink()  # as if it had been stopped before transfer
    (folder / "best").mkdir()
    run_tables(tmp_path, "5", seeds=[0], transfer=True)
    assert fake_runs[4 + 4 + 4 :] == [folder]


def test_no_run_starts_that_would_exceed_the_budget(fake_runs, tmp_path, monkeypatch, command):
    now, fake = [1000.0], Sweep.execute

    def two_minutes(*args):
        now[0] += 120
        fake(*args)

    def seeds(number, minutes) -> list[list[int]]:
        deadline = now[0] + 60 * minutes
        table = run_tables(tmp_path, number, deadline=deadline)[number]
        return [[run["seed"] for run in row.runs] for row in table.rows]

    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Sweep, "execute", two_minutes)
    assert seeds("7", 7) == [[0], [0], [0], [], [], [], []]
    assert seeds("7", 1) == [[0], [0], [0], [], [], [], []]  # finished runs say how long runs take
    assert seeds("7", 18) == [[0, 1]] * 5 + [[0]] * 2
    assert seeds("1", 7) == [[]] * 6  # enough for a row's search
    count, words = len(fake_runs), "--table 4 --seeds 0 --budget 7m --out".split()
    out = command(reproduce.main, *words, tmp_path / "other").out
    assert len(fake_runs) == count + 3 and "The budget left out 2 runs; " in out
    assert " - (82.59) |" in out


@pytest.mark.parametrize(
    "ours, others, paper, expected",
    [
        ([2.0, 2.2, 1.8], [1, 1, 1], 2.0, "+1.00 ± 0.16 (+2.00): holds"),
        ([0.0, -0.2, 0.2], [1, 1, 1], 2.0, "-1.00 ± 0.16 (+2.00): the other way round"),
        ([0.0, -0.2], [1, 1], -0.5, "-1.10 ± 0.10 (-0.50): holds"),
        ([2.0, 0.9, 2.0], [1, 1, 1], 2.0, "+0.63 ± 0.52 (+2.00): within the seeds' spread"),
        ([4, 2, 2], [1, 1.9, 1.9], 2.0, "+1.07 ± 1.37 (+2.00): within the seeds' spread"),
        ([5.1, 7.1, 9.1], [5, 7, 9], 2.0, "+0.10 ± 0.00 (+2.00): within the seeds' spread"),
        ([2], [1], 2.0, "+1.00 (+2.00): one seed, inconclusive"),
        ([2, 3], [1, 1, 7], None, "+1.50 ± 0.50"),  # two common seeds
        ([2, 3], [], 2.0, ""),
    ],
)
def test_a_finding_holds_if_every_seed_agrees_beyond_the_spread(ours, others, paper, expected):
    cell = dict(enumerate(ours)), paper and 50 + paper
    assert reproduce.verdict(cell, (dict(enumerate(others)), 50.0)) == expected


def test_the_readme_of_results_is_rendered_from_its_tables(tmp_path):
    for file in (ROOT / "results" / "tables").glob("table_*.json"):
        shutil.copy(file, tmp_path)
    reproduce.write_readme(tmp_path)
    assert (tmp_path / "README.md").read_text() == (ROOT / "results" / "README.md").read_text()


@pytest.mark.parametrize("config", ["small", "bert_sts", "roberta_sts"])
def test_rows_are_different_runs_and_references_are_rows(config):
    own, more = PRESETS[config].generator, [*PARAGRAPHS, "--seed", "7", "--score", "captions"]
    sweep = Sweep(Path(), config, more)  # the sweep's seed and score prevail
    for number, table in tables_of(config, [own, "other"]).items():
        words = [sweep.words(row.flags, 3, table.score) for row in table.rows]
        configs = {row.name: parse_words(w) for row, w in zip(table.rows, words)}
        different = len({str(cfg) for cfg in configs.values()})
        same = 2 * (number == "1")  # its "before" rows
        same += number == "5" and config == "small"  # SimCSE's own recipe is the preset's
        assert different == len(table.rows) - same
        assert {(cfg.seed, cfg.score) for cfg in configs.values()} == {(3, table.score)}
        references = {name for name in table.references if name in configs}
        assert references == ({own} if number == "6" else set(table.references))
        if number in ("3", "4", "5", "6", "7", "15"):
            assert table.rows[0].name == SAME_RECIPE.name and table.rows[0].flags == {"lam": 0.0}


@pytest.mark.parametrize("config", ["bert", "roberta"])
def test_simcse_has_the_recipe_of_its_preset(config):
    settings = asdict(PRESETS[f"{config}_sts"])
    settings |= tables_of(f"{config}_sts", [])["3"].rows[1].flags | {"mask_ratio": 0.3}
    assert settings == asdict(PRESETS[f"simcse_{config}"])
    assert {cfg.model for cfg in PRESETS.values()} == set(RECIPES)


def test_a_stopped_sweep_is_continued_by_the_same_command(tmp_path, made, command, monkeypatch):
    (tmp_path / "text.txt").write_text("".join(f"sentence number {i}\n" for i in range(200)))
    out = tmp_path / "out"
    flags = {"table": 5, "seeds": 0, "out": out, "data": made, "jobs": 2}
    flags |= {"train-file": tmp_path / "text.txt", "steps": 20, "batch-size": 8, "eval-every": 20}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    argv = [sys.executable, "-m", "lab.reproduce", *words]
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    first = subprocess.Popen(argv, cwd=ROOT, **options)
    while not any('"step": 1,' in log.read_text() for log in out.rglob("log.jsonl")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    error = first.communicate(timeout=60)[1]
    assert first.returncode == 130 and error == "\nstopped\n"
    begun, done = (len(list(out.rglob(name))) for name in ("config.json", "results.json"))
    assert begun > done and any(out.rglob("state.safetensors"))

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    second = command(reproduce.main, *words)
    assert second.code == 0 and second.out.startswith(f"4 runs, {done} of them done")
    assert second.out.count(" --resume ") == begun - done
    assert second.out.count("python diffcse.py --config small ") == 4 - done
    assert second.out.split("## ")[1].rstrip() in (out / "README.md").read_text()
    assert "    python -m lab.reproduce --table 5 " in second.out and " 0 |" not in second.out
    assert len(list(out.rglob("results.json"))) == 4 and not list(out.rglob("best"))
    third = command(reproduce.main, *words, "--lr", "1e-3")
    assert third.code == 2 and "--lr is 0.001, but the run has 0.0001" in third.err


def test_after_an_error_no_run_starts(tmp_path, monkeypatch):
    """The second run fails at once, while the first one is running."""
    program, log = tmp_path / "python", tmp_path / "log"
    slow, error = 'case "$*" in *"--lam 0.0"*) sleep 1; esac', "printf 'note\nerror: no FILE\n' >&2"
    program.write_text(f"#!/bin/sh\necho $* >> {log}\n{slow}\n{error}\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(UserError) as raised:
        run_tables(tmp_path / "out", "7", more=[], jobs=2)
    advice = "(exit code 3; after fixing this, the same command continues)"
    assert one_line(raised) == f"diffcse.py: no FILE {advice}"
    assert len(log.read_text().splitlines()) == 2


def test_mistakes_are_one_line(tmp_path, tiny, command):
    for words, message in [
        ("--seeds 0,x", "--seeds: invalid integers value: '0,x'"),
        ("--seeds 0,100", "100 is the seed of the search"),
        ("--lamda 0.1", "did you mean --lam"),
        ("--budget soon", "--budget: invalid minutes value: 'soon'"),
        ("--table 9", "--table: '9' is unknown; choose from 1, 3, 4,"),
        ("--table 3", "--text paragraphs"),
        ("--table 6 --generators no/such/one", "no/such/one: no such model folder"),
        (f"--table 6 --generators {tiny}", "has another vocabulary than --model"),
    ]:
        result = command(reproduce.main, "--table", 5, "--out", tmp_path / "out", *words.split())
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1, words
    assert not (tmp_path / "out").exists()
    assert [reproduce.minutes(text) for text in ("3h", "90m", "1.5h")] == [180, 90, 90]
    assert reproduce.numbers("all") == list(reproduce.TABLES)[1:]
    assert reproduce.integers("2,0,2") == [0, 2]
