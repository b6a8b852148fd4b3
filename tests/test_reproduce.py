"""lab/reproduce.py: the search, the tables, budgets, and real runs that are skipped or resumed."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffcse import Config
from engine.errors import UserError, run_main
from eval_sts import TEST_SETS
from lab import reproduce

ROOT = Path(__file__).parent.parent
BEST = {"lr": 3e-4, "lam": 0.05, "mask_ratio": 0.15}  # in fake_runs


@pytest.fixture
def fake_runs(monkeypatch):
    """`run` and `transfer` replaced by functions with a known optimum; a list of their calls."""
    calls = []

    def run(flags, folder, config, more, keep_model=False):
        if (folder / "results.json").is_file():
            return json.loads((folder / "results.json").read_text())
        calls.append(dict(flags))
        dev = 70 + 0.01 * flags["seed"]
        for name, best in BEST.items():
            if flags.get("lam", 1) or name == "lr":
                dev -= abs(np.log(flags.get(name, getattr(Config, name)) / best))
        names = (*TEST_SETS, "average")
        after = {"STSB-dev": dev} | {name: dev + i for i, name in enumerate(names)}
        before, first_last = dict.fromkeys(after, 1.0), dict.fromkeys(after, 2.0)
        result = {"after": after, "before": before, "before_first_last": first_last}
        result |= {"dev_best": dev, "minutes": 2.0, "best_step": 20, "machine": {}}
        result["command"] = " ".join(reproduce.words_of(flags, config, more))
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(result))
        if keep_model:
            (folder / "best").mkdir()
        return result

    def transfer(folder, more):
        if not (folder / "transfer.json").is_file():
            calls.append({"transfer": folder})
            (folder / "best").rmdir()
            content = {"dev": {"average": 80 + int(folder.name[4:])}}
            (folder / "transfer.json").write_text(json.dumps(content))
        return json.loads((folder / "transfer.json").read_text())

    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(reproduce, "transfer", transfer)
    return calls


def make_sweep(out, config="bert_sts", budget=None, with_transfer=("3", "5")):
    generators = list(reproduce.GENERATORS)
    return reproduce.Sweep(out, config, [], generators, list(with_transfer), budget)


def test_rows_of_table_1_are_searched_on_dev_then_run_with_the_seeds(fake_runs, tmp_path):
    def table(jobs: int) -> str:
        sweep = make_sweep(tmp_path)
        results = sweep.run_all(["1"], [0, 1, 2], jobs)["1"]
        return "\n".join(reproduce.report("1", sweep.tables["1"], results))

    text = table(jobs=1)
    folder = tmp_path / "tables" / "1" / "bert_sts"
    for row in reproduce.TABLE_1:
        chosen = json.loads((folder / reproduce.slug(row.name) / "chosen.json").read_text())
        assert chosen == row.flags | {name: BEST[name] for name in row.grid}
    searching = [flags for flags in fake_runs if flags["seed"] == reproduce.SEARCH_SEED]
    others = [flags for flags in fake_runs if flags not in searching]
    assert {flags["score"] for flags in searching} == {"dev"}
    assert {flags["score"] for flags in others} == {"stsb"}
    assert {flags["seed"] for flags in others} == {0, 1, 2}
    # SimCSE: 3 rates. DiffCSE: 3 rates, 2 more lambdas, 1 more mask ratio.
    assert len(searching) == 3 + 3 + 6 + 6 and len(others) == 4 * 3
    count = len(fake_runs)
    assert table(jobs=3) == text and len(fake_runs) == count  # nothing is run twice

    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert all(row.count("|") == 11 for row in rows)
    mean, std = 70.01, np.std([0, 0.01, 0.02])
    i = next(i for i, row in enumerate(rows) if row.startswith("| DiffCSE, published"))
    assert f"| {mean:.2f} ± {std:.2f} |" in rows[i] and f"| {mean + 7:.2f} ± {std:.2f} |" in rows[i]
    paper = [float(x) for x in re.findall(r"\*(\d+\.\d+)\*", rows[i + 1])]
    assert len(paper) == 9 and paper[-1] == 78.49
    for figures in [reproduce.FIRST_LAST, reproduce.TANH, reproduce.DIFFCSE]:
        assert np.mean(figures[1:-1]) == pytest.approx(figures[-1], abs=0.006)
    assert rows[2].startswith("| first-last average, before | 2.00 | ")
    assert rows[4].startswith("| [CLS], before | 1.00 | ")
    start = "| DiffCSE, published minus "
    gain = next(row for row in rows if row.startswith(start + reproduce.BASELINE))
    assert gain.count("+0.00 ± 0.00") == 9
    gain = next(row for row in rows if row.startswith(start + "[CLS], before"))
    assert f"+{mean - 1:.2f} ± {std:.2f}" in gain


@pytest.mark.parametrize("jobs", [1, 4])
def test_tables_share_runs_and_transfer_is_scored_once(fake_runs, tmp_path, jobs):
    found = make_sweep(tmp_path, "small").run_all(["8", "3", "5"], [0, 1], jobs)
    runs = [flags for flags in fake_runs if "seed" in flags]
    # 8 lambdas, 9 rows of Table 3, 4 of Table 5; all have the preset, two have SimCSE (tanh).
    assert len(runs) == len({json.dumps(flags, sort_keys=True) for flags in runs}) == 2 * 18
    assert {flags["score"] for flags in runs} == {"dev"}
    assert len(fake_runs) - len(runs) == 2 * (9 + 2)
    same = found["8"]["0.05"]
    assert found["3"]["DiffCSE"] == found["5"]["DiffCSE with BatchNorm"] == same
    assert same[1]["transfer"]["dev"]["average"] == 81
    if jobs == 1:  # every row with the first seed, then with the second
        assert [flags["seed"] for flags in runs] == [0] * 18 + [1] * 18
    again = make_sweep(tmp_path, "small").run_all(["5", "3", "8"], [0, 1], jobs)
    assert again == found and len(fake_runs) == 2 * (18 + 11)
    shutil.rmtree(next(tmp_path.rglob("lam=0.1/seed1")))
    plan = make_sweep(tmp_path, "small").plan(["3", "5", "8"], [0, 1], 1)
    assert plan == "36 runs, 35 of them done; the others take about 2 minutes, 2.0 each"


def test_a_run_is_repeated_if_transfer_needs_its_deleted_model(fake_runs, tmp_path):
    make_sweep(tmp_path, with_transfer=()).run_all(["5"], [0], 1)
    assert len(fake_runs) == 4
    make_sweep(tmp_path).run_all(["5"], [0], 1)
    assert len(fake_runs) == 4 + 4 + 4


def test_no_run_starts_that_would_exceed_the_budget(fake_runs, tmp_path, monkeypatch):
    now, fake = [1000.0], reproduce.run
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])

    def two_minutes(flags, folder, *args, **more):
        now[0] += 0 if (folder / "results.json").is_file() else 120
        return fake(flags, folder, *args, **more)

    def seeds(sweep) -> list[list[int]]:
        return [sorted(runs) for runs in sweep.run_all(["7"], [0, 1], 1)["7"].values()]

    monkeypatch.setattr(reproduce, "run", two_minutes)
    assert seeds(make_sweep(tmp_path, budget=7.0)) == [[0], [0], [0], [], [], []]
    sweep = make_sweep(tmp_path, budget=17.0)
    plan = "12 runs, 3 of them done; the others take about 18 minutes, 2.0 each"
    assert sweep.plan(["7"], [0, 1], 1) == f"{plan}: about 8 of them fit"
    assert seeds(sweep) == [[0, 1]] * 5 + [[0]]


@pytest.mark.parametrize(
    "better, worse, paper, expected",
    [
        ([2.0, 2.2, 1.8], [1, 1, 1], 2.0, "+1.00 ± 0.16: holds"),
        ([0.0, -0.2, 0.2], [1, 1, 1], 2.0, "-1.00 ± 0.16: the other way round"),
        ([0.0, -0.2], [1, 1], -0.5, "-1.10 ± 0.10: holds"),
        ([2.0, 0.9, 2.0], [1, 1, 1], 2.0, "+0.63 ± 0.52: within the seeds' spread"),
        ([4.0, 1.1, 1.1], [1, 1, 1], 2.0, "+1.07 ± 1.37: within the seeds' spread"),
        ([2], [1], 2.0, "+1.00, one seed: inconclusive"),
        ([2, 3], [1, 1], None, "+1.50 ± 0.50"),
        # the spread of the rows themselves is larger
        ([5.1, 7.1, 9.1], [5.0, 7.0, 9.0], 2.0, "+0.10 ± 0.00: within the seeds' spread"),
    ],
)
def test_a_finding_holds_if_every_seed_agrees_beyond_the_spread(better, worse, paper, expected):
    assert reproduce.verdict(better, worse, paper) == expected


def test_tables_are_written_with_every_number_beside_the_papers(fake_runs, tmp_path):
    sweep = make_sweep(tmp_path, "small")
    found = sweep.run_all(["5", "search"], [0, 1], 1)
    for number in ("search", "5"):
        table = sweep.tables[number]
        text = reproduce.write_table(tmp_path, number, "small", table, found[number], "command")
    saved = json.loads((tmp_path / "tables" / "table_5_small.json").read_text())
    assert saved["command"] == "command"
    assert [row["name"] for row in saved["rows"]] == [row.name for row in sweep.tables["5"].rows]
    for row in saved["rows"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1] and len(row["paper"]) == 2
        assert "--seed 1" in row["runs"][1]["command"]
        assert [run["transfer-dev"] for run in row["runs"]] == [80, 81]
    assert "| DiffCSE with BatchNorm | " in text
    assert "| 84.56 | 80.50 ± 0.50 | 85.95 | 2 |" in text
    finding = "| DiffCSE with BatchNorm − SimCSE with BatchNorm | STS-B dev | +2.34 | "
    assert finding in text
    grid = reproduce.APPENDIX_A | {"lr": reproduce.SMALL_LR}
    assert len(fake_runs) == 2 * 4 * 2 + math.prod(map(len, grid.values()))
    seeds = {flags["seed"] for flags in fake_runs if "batch_size" in flags}
    assert seeds == {reproduce.SEARCH_SEED}
    readme = (tmp_path / "README.md").read_text()
    assert readme.index("## Table 5: the projector (`small`)") < readme.index("## Search: ")
    assert text.split("\n\n", 1)[1] in readme


def test_rows_have_valid_flags_and_findings_are_of_their_rows():
    more = ["--text", "paragraphs", "--train-file", "x.txt"]
    for config in ("small", "bert_sts"):
        for number, table in reproduce.tables(config, list(reproduce.GENERATORS)).items():
            for row in table.rows[:12]:  # the search has 200
                reproduce.parse_flags(reproduce.words_of(row.flags, config, more))
                if number != "1":
                    assert reproduce.changed(config, row.flags) == row.flags
                    assert len(row.paper) in (0, len(table.columns))
            names = {name for pair in table.findings for name in pair}
            assert names <= {row.name for row in table.rows}
    expected = {"lam": 0.0, "projector": "tanh", "lr": 3e-5, "epochs": 1}
    assert reproduce.simcse_flags("bert_sts") == expected
    tables = reproduce.tables("bert_sts", list(reproduce.GENERATORS))
    counts = [len(tables[number].findings) for number in ("3", "4", "5", "6", "7", "8", "15")]
    assert counts == [7, 3, 4, 6, 5, 7, 10]
    assert ("conditional MLM, same sentence",) * 2 not in tables["3"].findings


@pytest.mark.parametrize(
    "words, program",
    [
        ([], "diffcse.py"),
        (["--lam", "0"], "diffcse.py"),
        (["--contrastive", "off"], "diffcse.py"),
        (["--text", "paragraphs"], "lab.ablations"),
        (["--objective", "masked"], "lab.ablations"),
        (["--edit-with", "insert"], "lab.ablations"),
    ],
)
def test_ablations_have_a_program_of_their_own(words, program):
    cfg = reproduce.parse_flags(["--config", "small", *words])
    assert reproduce.program_of(cfg)[-1] == program


def test_a_real_run_is_not_repeated_and_an_interrupted_one_is_resumed(tmp_path, capfd):
    train_file, pairs = tmp_path / "text.txt", tmp_path / "pairs.tsv"
    train_file.write_text("".join(f"sentence number {i} of some\n" for i in range(40)))
    rows = "".join(f"number {i}\tnumber {i * i}\t{i}\n" for i in range(9))
    pairs.write_text("a\tb\tscore\n" + rows)
    flags = {"lam": 0.0, "steps": 1, "seed": 3, "train_file": train_file, "score": pairs}
    folder, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"

    def files() -> list[str]:
        return sorted(path.name for path in folder.glob("[!.]*"))

    result = reproduce.run(flags, folder, "small", [])
    assert result["seed"] == 3 and files() == ["config.json", "log.jsonl", "results.json"]
    log.unlink()
    assert reproduce.run(flags, folder, "small", []) == result and not log.exists()
    with pytest.raises(UserError, match=r"a run with other settings \(its lr is 0.0001\)"):
        reproduce.run(flags, folder, "small", ["--lr", "1e-3"])
    with pytest.raises(UserError, match=r"nowhere.txt.*\(diffcse.py, exit code 2; after fixing"):
        missing = flags | {"train_file": "nowhere.txt"}
        reproduce.run(missing, tmp_path / "other", "small", [])
    (folder / "results.json").unlink()  # as if it had been killed
    capfd.readouterr()
    assert reproduce.run(flags, folder, "small", [])["after"] == result["after"]
    assert "python diffcse.py --resume " in capfd.readouterr().out
    old = json.loads((folder / "config.json").read_text()) | {"dtype": "fp32"}
    (folder / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="unknown field 'dtype'.*use another --out"):
        reproduce.run(flags, folder, "small", [])


def test_a_stopped_sweep_is_continued_by_the_same_command(tmp_path, made):
    (tmp_path / "text.txt").write_text("".join(f"sentence number {i}\n" for i in range(200)))
    flags = {"table": 5, "transfer": "none", "seeds": 0, "out": tmp_path / "out", "data": made}
    flags |= {"train-file": tmp_path / "text.txt", "steps": 8, "batch-size": 8}
    flags |= {"save-minutes": 0, "eval-every": 8}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    argv = [sys.executable, "-m", "lab.reproduce", *words]
    pipe, folder = subprocess.PIPE, tmp_path / "out" / "tables" / "small"
    first = subprocess.Popen(argv, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    done, started = (folder / name / "seed0" for name in ("preset", "projector=tanh"))
    log = started / "log.jsonl"
    while not log.is_file() or '"step": 1,' not in log.read_text():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.terminate()
    _, error = first.communicate(timeout=60)
    assert first.returncode == 130
    assert error == "\nstopped; the same command continues, and nothing is lost\n"
    assert not (started / "results.json").is_file()
    assert (started / "state.safetensors").is_file()
    before = (done / "results.json").stat().st_mtime_ns
    second = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0 and second.stderr == "", second.stderr
    assert second.stdout.startswith("4 runs, 1 of them done; the others take about ")
    assert second.stdout.count("python diffcse.py --resume") == 1
    assert second.stdout.count("python diffcse.py --config") == 2
    assert (done / "results.json").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seeds", "0,x"], "--seeds is '0,x'"),
        (["--seeds", "0,100"], "100 is the seed of the search"),
        (["--lamda", "0.1"], "did you mean --lam"),
        (["--jobs", "0"], "--jobs: '0' is not a positive integer"),
        (["--budget", "soon"], "--budget is 'soon'; it must be hours or minutes"),
        (["--table", "9"], "--table 9: unknown table; known are all, 3, 4, 5, 6, 7, 8, 15, search"),
        (["--transfer", "2"], "--transfer 2: unknown table"),
        (["--table", "3"], "--condition-on is next; it must be same"),
        (["--table", "6", "--generators", "nowhere/at/all"], "nowhere/at/all is missing"),
        (["--table", "6", "--generators", "OTHER"], "has another vocabulary than --model"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "assets" / "small-bert", other)
    text = (other / "tokenizer.json").read_text()
    assert '"the":' in text
    (other / "tokenizer.json").write_text(text.replace('"the":', '"thee":'))
    words = [str(other) if word == "OTHER" else word for word in words]
    argv = ["lab.reproduce", "--table", "5", "--out", str(tmp_path), *words]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        run_main(reproduce.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "tables").exists()
