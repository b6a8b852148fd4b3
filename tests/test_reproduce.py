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
from lab.reproduce import SAME_RECIPE, Sweep, parse_words, tables_of

BEST = {"lr": 3e-4, "lam": 0.5, "mask_ratio": 0.15}  # of fake_runs


@pytest.fixture
def fake_runs(monkeypatch):
    """Sweep.execute, replaced by a function with a known optimum; a list of its calls."""
    calls = []

    def execute(sweep, program, words):
        if program == ["-m", "lab.transfer"]:
            folder = Path(words[0]).parent
            assert (folder / "best").is_dir() and words[1:3] == ["--mode", "fast"]
            calls.append(folder)
            Path(words[4]).write_text(json.dumps({"dev": {"average": 80 + int(folder.name[4:])}}))
            return
        cfg = parse_words(words)
        calls.append(cfg)
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
        settings = asdict(cfg) | {"out_dir": ""}
        (Path(cfg.out_dir) / "config.json").write_text(json.dumps(settings))
        (Path(cfg.out_dir) / "results.json").write_text(json.dumps(result))

    monkeypatch.setattr(Sweep, "execute", execute)
    return calls


def run_tables(out, *numbers, seeds=(0, 1), scored=("3", "5"), **options) -> dict:
    """The tables with their runs."""
    tables = tables_of("small", reproduce.SMALL_GENERATORS)
    flags = [row.flags for number in scored for row in tables[number].rows]
    tables = {number: tables[number] for number in numbers}
    sweep = Sweep(out, "small", ["--train-file", "x.txt", "--text", "paragraphs"], **options)
    reproduce.run_tables(sweep, tables, list(seeds), flags)
    return tables


def render(number, table) -> str:
    return reproduce.render(reproduce.to_json(number, "small", table, "the command"))


def test_rows_of_table_1_are_searched_on_dev_then_run_with_the_seeds(fake_runs, tmp_path):
    table = run_tables(tmp_path, "1", seeds=[0, 1, 2])["1"]
    scores = [cfg.score for cfg in fake_runs if cfg.seed == reproduce.SEARCH_SEED]
    # SimCSE: 3 rates. DiffCSE: 3 rates, 2 more lambdas, 1 more mask ratio.
    assert scores == ["dev"] * (3 + 3 + 6 + 6)
    assert [cfg.score for cfg in fake_runs[len(scores) :]] == ["stsb"] * 4 * 3
    for row in table.rows:
        assert len(row.search) == (1 if row.flags["lam"] == 0 else 3)
        assert {name: row.flags[name] for name in row.search}.items() <= BEST.items()
        assert [run["seed"] for run in row.runs] == [0, 1, 2]

    text = render("1", table)
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in text.splitlines()]
    cells = {name: cells for name, *cells in filter(None, rows)}
    assert cells["DiffCSE, published"][:2] == ["70.01 ± 0.01 (84.56)", "71.01 ± 0.01 (72.28)"]
    assert cells["DiffCSE, published"][9] == "3"
    assert cells["first-last average, before"][:2] == ["2.00", "2.00 (39.70)"]
    assert cells["[CLS], before"][0] == "1.00"
    assert cells["DiffCSE, published − [CLS], before"][0] == "+69.01 ± 0.01"
    gain = cells["DiffCSE, published − SimCSE with BatchNorm"]
    assert gain[0] == "+0.00 ± 0.00 (+2.34): within the seeds' spread"
    assert gain[1:9] == ["+0.00 ± 0.00"] * 8 and text.count(" − ") == 5 + 4
    count = len(fake_runs)
    assert render("1", run_tables(tmp_path, "1", seeds=[0, 1, 2], jobs=3)["1"]) == text
    assert len(fake_runs) == count


@pytest.mark.parametrize("jobs", [1, 4])
def test_tables_share_runs_and_transfer_is_scored_once(fake_runs, tmp_path, capsys, jobs):
    found = run_tables(tmp_path, "8", "3", "5", jobs=jobs)
    runs = [cfg for cfg in fake_runs if not isinstance(cfg, Path)]
    # 8 lambdas; 10 rows of Table 3 and 4 of Table 5, of which 2 and 2 are in another table
    assert len(runs) == len({str(cfg) for cfg in runs}) == 2 * 18
    assert {cfg.score for cfg in runs} == {"dev"} and {cfg.text for cfg in runs} == {"paragraphs"}
    assert len(fake_runs) - len(runs) == 2 * (10 + 2)
    assert not list(tmp_path.rglob("best"))
    same = found["8"].rows[6].runs
    assert found["3"].rows[2].runs == found["5"].rows[0].runs == same
    assert [run["after"]["transfer-dev"] for run in same] == [80, 81]
    if jobs == 1:  # every row with the first seed, then with the second
        assert [cfg.seed for cfg in runs] == [0] * 18 + [1] * 18
    shutil.rmtree(next(tmp_path.rglob("lam=0.1/seed1")))
    capsys.readouterr()
    assert run_tables(tmp_path, "5", "3", "8", jobs=jobs) == {n: found[n] for n in "538"}
    assert len(fake_runs) == 2 * (18 + 12) + 1
    minutes = f"the others take about {2 / jobs:.0f} minutes"
    assert capsys.readouterr().out == f"36 runs, 35 of them done; {minutes}\n"


def test_a_run_is_repeated_if_transfer_needs_its_deleted_model(fake_runs, tmp_path):
    run_tables(tmp_path, "5", seeds=[0], scored=[])
    assert len(fake_runs) == 4
    run_tables(tmp_path, "5", seeds=[0])
    assert len(fake_runs) == 4 + 4 + 4
    folder = fake_runs[-1]
    (folder / "transfer.json").unlink()  # as if it had been stopped before transfer
    (folder / "best").mkdir()
    run_tables(tmp_path, "5", seeds=[0])
    assert fake_runs[4 + 4 + 4 :] == [folder]


def test_no_run_starts_that_would_exceed_the_budget(fake_runs, tmp_path, monkeypatch, command):
    now, fake = [1000.0], Sweep.execute

    def two_minutes(*args):
        now[0] += 120
        fake(*args)

    def seeds(number, minutes) -> list[list[int]]:
        deadline = now[0] + 60 * minutes
        table = run_tables(tmp_path, number, scored=[], deadline=deadline)[number]
        assert "| - (84.56) |" in render(number, table) or number == "7"
        return [[run["seed"] for run in row.runs] for row in table.rows]

    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Sweep, "execute", two_minutes)
    assert seeds("7", 7) == [[0], [0], [0], [], [], [], []]
    assert seeds("7", 1) == [[0], [0], [0], [], [], [], []]  # finished runs say how long runs take
    assert seeds("7", 18) == [[0, 1]] * 5 + [[0]] * 2
    assert seeds("1", 7) == [[]] * 6  # enough for a row's search
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # leave pytest's handlers alone
    count, words = len(fake_runs), "--table 5 --seeds 0 --transfer none --budget 1m --out".split()
    out = command(reproduce.main, *words, tmp_path / "other").out
    assert len(fake_runs) == count + 1 and "The budget left out 3 runs; " in out


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
        ([2, 3], [1, 1, 7], 2.0, "+1.50 ± 0.50 (+2.00): holds"),  # two common seeds
        ([2, 3], [1, 1], None, "+1.50 ± 0.50"),
        ([2, 3], [], 2.0, ""),
    ],
)
def test_a_finding_holds_if_every_seed_agrees_beyond_the_spread(ours, others, paper, expected):
    row, other = (
        {"runs": {seed: {"x": value} for seed, value in enumerate(values)}, "paper": {"x": figure}}
        for values, figure in ((ours, paper and 50 + paper), (others, 50.0))
    )
    assert reproduce.verdict(row, other, "x") == expected


@pytest.mark.parametrize("config", ["small", "bert_sts", "roberta_sts"])
def test_rows_are_different_runs_and_references_are_rows(config):
    own = PRESETS[config].generator
    more = "--text paragraphs --train-file x.txt --seed 7 --score captions".split()
    sweep = Sweep(Path(), config, more)  # the sweep's seed and score prevail
    for number, table in tables_of(config, [own, "other"]).items():
        words = [sweep.words(row.flags, 3, table.score) for row in table.rows]
        configs = {row.name: parse_words(w) for row, w in zip(table.rows, words)}
        different = {str(cfg) for cfg in configs.values()}
        assert len(different) == len(table.rows) - 2 * (number == "1")  # its "before" rows
        assert {(cfg.seed, cfg.score) for cfg in configs.values()} == {(3, table.score)}
        assert {len(row.paper) for row in table.rows} <= {0, 1, len(table.columns)}
        references = {name for name in table.references if name in configs}
        assert references == ({own} if number == "6" else set(table.references))
        if number in ("3", "4", "6", "7", "15"):
            assert table.rows[0].name == SAME_RECIPE.name and table.rows[0].flags == {"lam": 0.0}


def test_simcse_has_its_own_recipe_and_ablations_their_own_program():
    simcse = {"lam": 0.0, "projector": "tanh"}
    assert tables_of("bert_sts", [])["3"].rows[1].flags == simcse | {"lr": 3e-5, "epochs": 1}
    assert tables_of("small", [])["3"].rows[1].flags == simcse | {"lr": 3e-4}
    for words, program in [
        (["--lam", "0", "--contrastive", "on"], "diffcse.py"),
        (["--text", "paragraphs"], "lab.ablations"),
        (["--edit-with", "insert"], "lab.ablations"),
    ]:
        assert reproduce.program_of(parse_words(["--config", "small", *words]))[-1] == program
    for figures in [reproduce.FIRST_LAST, reproduce.TANH, reproduce.DIFFCSE]:
        assert np.mean(figures[1:-1]) == pytest.approx(figures[-1], abs=0.006)


def test_a_stopped_sweep_is_continued_by_the_same_command(tmp_path, made, command, monkeypatch):
    (tmp_path / "text.txt").write_text("".join(f"sentence number {i}\n" for i in range(200)))
    out, pipe = tmp_path / "out", subprocess.PIPE
    flags = {"table": 5, "transfer": "none", "seeds": 0, "out": out, "data": made, "jobs": 2}
    flags |= {"train-file": tmp_path / "text.txt", "steps": 20, "batch-size": 8, "eval-every": 20}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    argv = [sys.executable, "-m", "lab.reproduce", *words]
    options = {"stdout": pipe, "stderr": pipe, "text": True, "start_new_session": True}
    first = subprocess.Popen(argv, cwd=ROOT, **options)
    while not any('"step": 1,' in log.read_text() for log in out.rglob("log.jsonl")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    error = first.communicate(timeout=60)[1]
    assert first.returncode == 130
    assert error == "\nstopped; the same command continues, and nothing is lost\n"
    begun, done = (len(list(out.rglob(name))) for name in ("config.json", "results.json"))
    assert begun > done
    assert any(file.stat().st_size > 1e6 for file in out.rglob("state.safetensors"))

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    second = command(reproduce.main, *words)
    assert second.code == 0 and second.err == ""
    assert second.out.startswith(f"4 runs, {done} of them done")
    assert second.out.count(" --resume ") == begun - done
    assert second.out.count("python diffcse.py --config small ") == 4 - done
    assert second.out.split("## ")[1].rstrip() in (out / "README.md").read_text()
    saved = json.loads((out / "table_5_small.json").read_text())
    assert saved["command"].startswith("python -m lab.reproduce --table 5 ")
    assert [len(row["runs"]) for row in saved["rows"]] == [1] * 4
    assert len(list(out.rglob("results.json"))) == 4 and not list(out.rglob("best"))
    third = command(reproduce.main, *words, "--lr", "1e-3")
    assert third.code == 2 and "--lr is 0.001, but the run has 0.0001" in third.err
    assert third.err.endswith(". For other settings, use another --out\n")


def test_after_an_error_other_processes_are_stopped_and_none_starts(tmp_path):
    started, late = tmp_path / "started", tmp_path / "late"
    programs = [
        f"while not p({str(started)!r}).exists(): pass\nsys.exit('note\\nerror: no FILE')",
        f"p({str(started)!r}).touch(); time.sleep(60)",
        "time.sleep(60)",
        f"p({str(late)!r}).touch()",
    ]
    head = "import sys, time; from pathlib import Path as p\n"
    sweep = Sweep(tmp_path, "small", [], jobs=2)
    with pytest.raises(UserError) as error:
        sweep.map(sweep.execute, [(["-c"], [head + program]) for program in programs])
    advice = "(-c, exit code 1; after fixing this, the same command continues)"
    assert one_line(error) == f"no FILE {advice}" and not late.exists()
    codes = {process.args[2].removeprefix(head): process.returncode for process in sweep.processes}
    assert codes.pop(programs[0]) == 1 and set(codes.values()) == {-signal.SIGTERM}


def test_mistakes_are_one_line(tmp_path, command):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "assets" / "small-bert", other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"the":', '"thee":'))
    for words, message in [
        ("--seeds 0,x", "--seeds: invalid integers value: '0,x'"),
        ("--seeds 0,100", "100 is the seed of the search"),
        ("--lamda 0.1", "did you mean --lam"),
        ("--jobs 0", "--jobs: '0' is not a positive integer"),
        ("--budget soon", "--budget: invalid minutes value: 'soon'"),
        ("--table 9", "--table: '9' is unknown; choose from 1, 3, 4, 5, 6, 7, 8, 15,"),
        ("--transfer 2", "--transfer: '2' is unknown"),
        ("--table 3", "--text paragraphs"),
        ("--table 6 --generators no/such/one", "Table 6: no/such/one: no such model folder"),
        (f"--table 6 --generators {other}", "has another vocabulary than --model"),
    ]:
        result = command(reproduce.main, "--table", 5, "--out", tmp_path / "out", *words.split())
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1, words
    assert not (tmp_path / "out").exists()
    assert [reproduce.minutes(text) for text in ("3h", "90m", "1.5h")] == [180, 90, 90]
    assert reproduce.numbers("all") == ["3", "4", "5", "6", "7", "8", "15"]
    assert reproduce.numbers("none") == [] and reproduce.integers("2,0,2") == [0, 2]
