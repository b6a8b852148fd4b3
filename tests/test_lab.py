"""lab/reproduce.py: the search, the tables, what is skipped."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bert import UserError
from config import PRESETS, Config, parse_args
from data import run_main
from eval_sts import TEST_SETS
from lab import reproduce

ROOT = Path(__file__).parent.parent


@pytest.fixture
def fake_runs(monkeypatch):
    """diffcse.py and eval_transfer.py replaced by functions that know which values are best; what was run, in order."""
    ran = []

    def run(flags, folder, config, more, keep_model=False):
        if (folder / "results.json").is_file():
            return json.loads((folder / "results.json").read_text())
        ran.append(dict(flags))
        wanted = {"lr": 3e-4, "lam": 0.05, "mask_ratio": 0.15}
        dev = 70 - sum(abs(np.log(flags.get(name, getattr(Config, name)) / value)) for name, value in wanted.items() if flags.get("lam", 1) or name == "lr")
        dev += 0.01 * flags["seed"]
        columns = {"STSB-dev": dev} | {name: dev + i for i, name in enumerate((*TEST_SETS, "average"))}
        result = {"dev_best": dev, "dev_before": 50.0, "after": columns, "before": dict.fromkeys(columns, 1.0), "before_first_last": dict.fromkeys(columns, 2.0),
                  "minutes": 2.0, "best_step": 20, "command": " ".join(reproduce.words_of(flags, config, more)), "machine": {}}
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(result))
        if keep_model:
            (folder / "best").mkdir()
        return result

    def transfer(folder, more):
        if not (folder / "transfer.json").is_file():
            ran.append({"transfer of": folder})
            (folder / "best").rmdir()
            (folder / "transfer.json").write_text(json.dumps({"dev": {"average": 80 + int(folder.name[4:])}}))
        return json.loads((folder / "transfer.json").read_text())

    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(reproduce, "transfer", transfer)
    return ran


def sweep_of(out, config="bert_sts", budget=None, with_transfer=("3", "5")):
    return reproduce.Sweep(out, config, [], [name for name, _ in reproduce.GENERATORS], list(with_transfer), budget)


def test_each_row_is_searched_on_dev_then_run_with_the_seeds(fake_runs, tmp_path):
    def table(jobs=1):
        sweep = sweep_of(tmp_path)
        return "\n".join(reproduce.report("1", sweep.tables["1"], sweep.all(["1"], [0, 1, 2], jobs)["1"]))

    text = table()
    chosen = [json.loads((tmp_path / "tables" / "1" / "bert_sts" / reproduce.slug(row.name) / "chosen.json").read_text()) for row in reproduce.TABLE_1]
    assert [c["lr"] for c in chosen] == [3e-4] * 4
    assert all(c["lam"] == 0.05 and c["mask_ratio"] == 0.15 for c in chosen[2:]) and all(c["lam"] == 0 for c in chosen[:2])
    searching = [flags for flags in fake_runs if flags["seed"] == reproduce.SEARCH_SEED]
    assert all(flags["score"] == "dev" for flags in searching) and not any("score" in flags for flags in fake_runs if flags not in searching)
    assert {flags["seed"] for flags in fake_runs} - {reproduce.SEARCH_SEED} == {0, 1, 2}
    # SimCSE: 3 rates. DiffCSE: 3 rates, then 2 more lambdas and 1 more mask ratio (those it begins with are among the rates' runs).
    assert len(searching) == 3 + 3 + 6 + 6 and len(fake_runs) - len(searching) == 4 * 3
    count = len(fake_runs)
    assert table(jobs=3) == text and len(fake_runs) == count  # nothing is run twice

    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert all(row.count("|") == 11 for row in rows)
    dev = [70 + 0.01 * seed for seed in range(3)]
    diffcse = next(row for row in rows if row.startswith("| DiffCSE, published"))
    assert f"| {np.mean(dev):.2f} ± {np.std(dev):.2f} |" in diffcse and f"| {np.mean(dev) + 7:.2f} ± {np.std(dev):.2f} |" in diffcse
    paper = [float(x) for x in re.findall(r"\*(\d+\.\d+)\*", rows[rows.index(diffcse) + 1])]
    assert len(paper) == 9 and paper[-1] == 78.49
    for values in [reproduce.FIRST_LAST, *(row.paper for row in reproduce.TABLE_1 if len(row.paper) > 1)]:
        assert np.mean(values[1:-1]) == pytest.approx(values[-1], abs=0.006)
    assert rows[2].startswith("| first-last average, before | 2.00 | ") and rows[4].startswith("| [CLS], before | 1.00 | ")
    gain = next(row for row in rows if row.startswith("| DiffCSE, published minus SimCSE with BatchNorm"))
    assert gain.count("+0.00 ± 0.00") == 9
    gain = next(row for row in rows if row.startswith("| DiffCSE, published minus [CLS], before"))
    assert f"+{np.mean(dev) - 1:.2f} ± {np.std(dev):.2f}" in gain


@pytest.mark.parametrize("jobs", [1, 4])
def test_tables_share_their_runs_and_transfer_is_scored_once_where_a_table_wants_it(fake_runs, tmp_path, jobs):
    sweep = sweep_of(tmp_path, "small")
    found = sweep.all(["8", "3", "5"], [0, 1], jobs)
    runs = [flags for flags in fake_runs if "seed" in flags]
    # 8 lambdas, 9 rows of Table 3 and 4 of Table 5, of which the preset itself is in all three and SimCSE (tanh) in two
    assert len(runs) == len({json.dumps(flags, sort_keys=True) for flags in runs}) == 2 * (8 + 8 + 2) and all(flags["score"] == "dev" for flags in runs)
    assert len(fake_runs) - len(runs) == 2 * (9 + 2)
    assert found["3"]["DiffCSE"] == found["5"]["DiffCSE with BatchNorm"] == found["8"]["0.05"] and found["8"]["0.05"][1]["transfer"]["dev"]["average"] == 81
    assert jobs > 1 or [flags["seed"] for flags in runs] == [0] * 18 + [1] * 18  # every row with the first seed, then with the second
    again = sweep_of(tmp_path, "small").all(["5", "3", "8"], [0, 1], jobs)
    assert {number: again[number] for number in found} == found and len(fake_runs) == 2 * (18 + 11)
    shutil.rmtree(next(tmp_path.rglob("lam=0.1/seed1")))
    assert "36 runs, 35 of them done; the others take about 2 minutes, 2.0 each" in sweep_of(tmp_path, "small").plan(["3", "5", "8"], [0, 1], 1)


def test_a_run_whose_model_is_gone_is_made_again_where_transfer_wants_it(fake_runs, tmp_path):
    sweep_of(tmp_path, with_transfer=()).all(["5"], [0], 1)
    assert len(fake_runs) == 4
    sweep_of(tmp_path).all(["5"], [0], 1)
    assert len(fake_runs) == 4 + 4 + 4


def test_a_budget_begins_nothing_that_would_not_end_within_it(fake_runs, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(reproduce.time, "time", lambda: now[0])
    real = reproduce.run

    def two_minutes(flags, folder, *args, **more):
        now[0] += 0 if (folder / "results.json").is_file() else 120
        return real(flags, folder, *args, **more)

    monkeypatch.setattr(reproduce, "run", two_minutes)
    sweep = sweep_of(tmp_path, budget=7.0)
    found = sweep.all(["7"], [0, 1], 1)["7"]
    assert [sorted(runs) for runs in found.values()] == [[0], [0], [0], [], [], []]
    sweep = sweep_of(tmp_path, budget=17.0)
    assert sweep.plan(["7"], [0, 1], 1) == "12 runs, 3 of them done; the others take about 18 minutes, 2.0 each: about 8 of them fit"
    found = sweep.all(["7"], [0, 1], 1)["7"]
    assert [sorted(runs) for runs in found.values()] == [[0, 1]] * 5 + [[0]]


@pytest.mark.parametrize("better, worse, paper, says", [
    ([2.0, 2.2, 1.8], [1, 1, 1], 2.0, "+1.00 ± 0.16: holds"), ([0.0, -0.2, 0.2], [1, 1, 1], 2.0, "-1.00 ± 0.16: the other way round"),
    ([0.0, -0.2], [1, 1], -0.5, "-1.10 ± 0.10: holds"), ([2.0, 0.9, 2.0], [1, 1, 1], 2.0, "+0.63 ± 0.52: within the seeds' spread"),
    ([4.0, 1.1, 1.1], [1, 1, 1], 2.0, "+1.07 ± 1.37: within the seeds' spread"), ([2], [1], 2.0, "+1.00, one seed: no telling"), ([2, 3], [1, 1], None, "+1.50 ± 0.50"),
    ([5.1, 7.1, 9.1], [5.0, 7.0, 9.0], 2.0, "+0.10 ± 0.00: within the seeds' spread")])  # fmt: skip  the rows themselves move by more
def test_a_finding_holds_where_every_seed_says_so_beyond_their_spread(better, worse, paper, says):
    assert reproduce.verdict(better, worse, paper) == says


def test_tables_are_written_with_every_number_and_beside_the_papers(fake_runs, tmp_path):
    sweep = sweep_of(tmp_path, "small")
    found = sweep.all(["5", "search"], [0, 1], 1)
    for number in ("search", "5"):
        text = reproduce.write_table(tmp_path, number, "small", sweep.tables[number], found[number], "the command")
    saved = json.loads((tmp_path / "tables" / "table_5_small.json").read_text())
    assert saved["command"] == "the command" and [row["name"] for row in saved["rows"]] == [row.name for row in sweep.tables["5"].rows]
    for row in saved["rows"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1] and len(row["paper"]) == 2 and "--seed 1" in row["runs"][1]["command"]
        assert [run["transfer-dev"] for run in row["runs"]] == [80, 81]
    assert "| DiffCSE with BatchNorm | " in text and "| 84.56 | 80.50 ± 0.50 | 85.95 | 2 |" in text
    assert "| DiffCSE with BatchNorm − SimCSE with BatchNorm | STS-B dev | +2.34 | " in text
    best = reproduce.APPENDIX_A | {"lr": reproduce.SMALL_RATES}
    assert len(fake_runs) == 2 * 4 * 2 + math.prod(map(len, best.values())) and {f["seed"] for f in fake_runs if "batch_size" in f or "lr" in f} >= {reproduce.SEARCH_SEED}
    readme = (tmp_path / "README.md").read_text()
    assert readme.index("## Table 5: the projector (`small`)") < readme.index("## Search: ") and text.split("\n\n", 1)[1] in readme


def test_every_flag_of_every_row_is_one_of_diffcse_and_the_findings_are_of_its_rows():
    for config in ("small", "bert_sts", "roberta_sts", "demo"):
        for number, table in reproduce.tables(config, [name for name, _ in reproduce.GENERATORS]).items():
            for row in table.rows:
                parse_args(reproduce.words_of(row.flags, config, ["--text", "paragraphs", "--train-file", "x.txt"]))
                assert number == "1" or all(value != getattr(PRESETS[config], name) for name, value in row.flags.items())
            assert {name for pair in table.findings for name in pair} <= {row.name for row in table.rows}
            assert all(len(row.paper) in (0, len(table.columns)) for row in table.rows) or number == "1"
    assert set(reproduce.GRID) == {name for row in reproduce.TABLE_1 for name in row.grid}
    assert reproduce.simcse("bert_sts") == {"lam": 0.0, "projector": "tanh", "lr": 3e-5, "epochs": 1}


def test_a_real_run_leaves_its_numbers_and_no_model_and_one_that_was_stopped_is_resumed(tmp_path, capfd):
    (tmp_path / "text.txt").write_text("".join(f"sentence number {i} of some\n" for i in range(40)))
    (tmp_path / "pairs.tsv").write_text("a\tb\talike\n" + "".join(f"number {i}\tnumber {i * i}\t{i}\n" for i in range(9)))
    flags = {"lam": 0.0, "steps": 1, "seed": 3, "train_file": str(tmp_path / "text.txt"), "score": str(tmp_path / "pairs.tsv")}
    result = reproduce.run(flags, tmp_path / "run", "small", [])
    assert result["seed"] == 3 and sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "log.jsonl", "results.json"]
    (tmp_path / "run" / "log.jsonl").unlink()
    assert reproduce.run(flags, tmp_path / "run", "small", []) == result and not (tmp_path / "run" / "log.jsonl").exists()
    with pytest.raises(UserError, match=r"holds a run with other settings \(its lr is 0.0001\)"):
        reproduce.run(flags, tmp_path / "run", "small", ["--lr", "1e-3"])
    with pytest.raises(UserError, match=r"nowhere.txt.*\(diffcse.py; with that mended the same command goes on from there\)$"):
        reproduce.run(flags | {"train_file": "nowhere.txt"}, tmp_path / "other", "small", [])
    (tmp_path / "run" / "results.json").unlink()  # as if it had been killed: begun, and not ended
    capfd.readouterr()
    assert reproduce.run(flags, tmp_path / "run", "small", [])["after"] == result["after"]
    assert "python diffcse.py --resume " in capfd.readouterr().out


def test_a_sweep_that_is_stopped_goes_on_by_the_same_command(tmp_path, made):
    (tmp_path / "text.txt").write_text("".join(f"sentence number {i} of some\n" for i in range(200)))
    argv = [sys.executable, "-m", "lab.reproduce", "--table", "5", "--transfer", "none", "--seeds", "0", "--out", str(tmp_path / "out"), "--data", str(made),
            "--train-file", str(tmp_path / "text.txt"), "--steps", "8", "--batch-size", "8", "--save-minutes", "0", "--eval-every", "8"]  # fmt: skip
    first = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ended = tmp_path / "out" / "tables" / "small" / "preset" / "seed0"
    begun = ended.parent.parent / "projector=tanh" / "seed0" / "log.jsonl"
    while not begun.is_file() or '"step": 1,' not in begun.read_text():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.terminate()
    _, says = first.communicate(timeout=60)
    assert first.returncode == 130 and says == "\nstopped: nothing is lost, and the same command goes on\n"
    assert not (begun.parent / "results.json").is_file() and (begun.parent / "state.safetensors").is_file()
    before = (ended / "results.json").stat().st_mtime_ns
    second = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0 and second.stderr == "", second.stderr
    assert second.stdout.startswith("4 runs, 1 of them done; the others take about ")
    assert second.stdout.count("python diffcse.py --resume") == 1 and second.stdout.count("python diffcse.py --config") == 2
    assert (ended / "results.json").stat().st_mtime_ns == before and (tmp_path / "out" / "README.md").is_file()
    third = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert "python diffcse.py" not in third.stdout and "4 runs, 4 of them done" in third.stdout


@pytest.mark.parametrize("argv, message", [
    (["--seeds", "0,x"], "--seeds is '0,x'"),
    (["--seeds", "0,100"], "100 is the seed of the search"),
    (["--lamda", "0.1"], "did you mean --lam"),
    (["--jobs", "0"], "--jobs is 0"),
    (["--budget", "soon"], "--budget is 'soon': it must be hours or minutes, as 3h or 90m"),
    (["--table", "9"], "--table 9: there is no such table here; there are 3, 4, 5, 6, 7, 8, 15, search, 1, and all"),
    (["--transfer", "2"], "--transfer 2: there is no such table"),
    (["--table", "3"], "--condition-on is next: it must be same, unless --text paragraphs says that the train file keeps the order"),
    (["--table", "3", "--text", "paragraphs", "--train-file", "SHUFFLED"], "shuffled.txt: its sentences have no more words in common with the next ones than with others"),
    (["--table", "6", "--generators", "nowhere/at-all"], "Table 6: nowhere/at-all is not there; RESULTS.md says how lab/pretrain.py makes generators"),
    (["--table", "6", "--generators", "OTHER"], "has another vocabulary than --model assets/small-bert"),
])  # fmt: skip
def test_mistakes(argv, message, tmp_path, monkeypatch, capsys):
    words = [f"word{i:03}" for i in range(300)]
    (tmp_path / "shuffled.txt").write_text("".join(" ".join(random.Random(i).sample(words, 8)) + ".\n" for i in range(400)))
    shutil.copytree(ROOT / "assets" / "small-bert", tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    assert '"the":' in text
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace('"the":', '"thee":'))
    argv = [{"SHUFFLED": str(tmp_path / "shuffled.txt"), "OTHER": str(tmp_path / "other")}.get(word, word) for word in argv]
    monkeypatch.setattr(sys, "argv", ["lab.reproduce", "--table", "5", "--config", "small", "--out", str(tmp_path), *argv])
    with pytest.raises(SystemExit) as end:
        run_main(reproduce.main)
    says = capsys.readouterr().err
    assert end.value.code == 2 and message in says and len(says.splitlines()) == 1 and not (tmp_path / "tables").exists()
