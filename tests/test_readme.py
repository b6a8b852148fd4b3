"""The pages are true: commands are accepted, sessions print what is shown, names, links and
figures exist."""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from conftest import ROOT

from diffcse import PRESETS, Config
from engine.cli import flag, parse
from lab.ablations import AblationConfig
from lab.reads_h import ReadsHConfig

PAGES = ["README.md", "GUIDE.md", "RESULTS.md", "EXERCISES.md"]
PROGRAMS = ("python", "pytest", "torchrun", "pip", "python3", ".venv/bin/python", ".venv/bin/pip")
STARTS = "|".join([r"\$ ", "for ", "mkdir ", "printf ", *map(re.escape, PROGRAMS)])
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shell_blocks(page: str) -> list[str]:
    """Fenced and indented shell code; of a session, only the lines after "$ "."""
    text = (ROOT / page).read_text()
    indented = re.findall(r"(?:^ {4}\S.*\n?)+", FENCED.sub("", text), re.MULTILINE)
    indented = [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in indented]
    blocks = [block for block in FENCED.findall(text) + indented if re.match(STARTS, block)]
    return [
        "\n".join(line[2:] for line in block.splitlines() if line.startswith("$ "))
        if block.startswith("$ ")
        else block
        for block in blocks
    ]


def commands_of(page: str, tmp_path: Path) -> list[list[str]]:
    """The commands that a shell would start, by stand-ins that record their arguments."""
    calls = tmp_path / "calls"
    record = f"import json, sys\nopen({str(calls)!r}, 'a').write(json.dumps(sys.argv) + '\\n')\n"
    work, bin_folder = tmp_path / "work", tmp_path / "bin"
    bin_folder.mkdir()
    (work / ".venv/bin").mkdir(parents=True)
    for name in PROGRAMS:
        file = (work if "/" in name else bin_folder) / name
        file.write_text(f"#!{sys.executable}\n{record}")
        file.chmod(0o755)
    (work / ".venv/bin/activate").touch()
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    for block in shell_blocks(page):
        command = ["bash", "-eu", "-c", block]
        settings = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL)
        done = subprocess.run(command, cwd=work, env=environment, **settings)
        assert done.returncode == 0, (block, done.stderr)
    return [json.loads(line) for line in calls.read_text().splitlines()]


@cache
def help_of(module: str, *words: str) -> str:
    printed = io.StringIO()
    argv = patch.object(sys, "argv", [module, *words, "-h"])
    with argv, contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as exit:
        importlib.import_module(module).main()
    assert not exit.value.code, (module, words)
    return printed.getvalue()


def check_command(words: list[str]) -> str:
    """Raises unless the program accepts these words. Returns the program."""
    program, *words = words
    if Path(program).name == "torchrun":
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    if Path(program).name in ("pip", "python3") or words[:2] == ["-m", "pytest"]:
        return Path(program).name
    if Path(program).name == "pytest":
        assert words[0].split("/")[0] == "exercises" and (ROOT / words[0]).exists(), words[0]
        return "pytest"
    if words[0] == "-c":
        return "python"
    configs = {"diffcse.py": Config, "exercises/detached.py": Config}
    configs |= {"lab.ablations": AblationConfig, "lab.reads_h": ReadsHConfig}
    if words[0] == "-m" and words[1] in configs:
        words = words[1:]
    if words[0] in configs:
        if "--resume" not in words and "-h" not in words:  # a resumed run has to exist
            preset = ["--config", "demo"] * ("--config" not in words)  # a sentence may leave it out
            parse(configs[words[0]], PRESETS, [*preset, *words[1:]])
        return words[0]
    if words[0] == "-m":
        module, rest = words[1], words[2:]
    else:
        module, rest = words[0].removesuffix(".py").replace("/", "."), words[1:]
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    text = help_of(module)
    if rest and rest[0].isalpha() and re.search(rf"([{{,]|^ +){rest[0]}[,}}\s]", text, re.M):
        text += help_of(module, rest[0])
    if module == "lab.reproduce":  # it passes flags on
        text += " ".join(flag(field.name) for field in fields(AblationConfig))
    for word in rest:
        if word.startswith("--"):
            assert re.search(rf"(^|[\s,\[]){re.escape(word.split('=')[0])}\b", text), (module, word)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_accepted_by_its_program(page, tmp_path):
    inline = re.findall(r"`(python [^`]+)`", (ROOT / page).read_text())  # in sentences and tables
    inline = [shlex.split(command) for command in inline if "--config NAME" not in command]
    seen = {check_command(words) for words in commands_of(page, tmp_path) + inline}
    expected = {
        "README.md": {"diffcse.py", "embed", "eval_sts", "lab.report", "lab.explain", "python3"},
        "GUIDE.md": {"diffcse.py", "embed", "eval_sts", "lab.transfer", "lab.whitening"},
        "RESULTS.md": {"lab.pretrain", "lab.reproduce", "lab.reads_h"},
        "EXERCISES.md": {"diffcse.py", "exercises/detached.py", "pytest", "lab.report"},
    }
    assert expected[page] <= seen, seen


@pytest.mark.parametrize(
    "command, message",
    [
        ("python diffcse.py --config demo --lamda 1", "unknown argument"),
        ("python eval_sts.py M --no-such", "no-such"),
        ("python -m lab.nothing", "lab.nothing"),
        ("pytest nowhere", "nowhere"),
    ],
)
def test_a_wrong_command_is_noticed(command, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        check_command(command.split())


def test_the_readmes_session_prints_what_is_shown(tmp_path):
    blocks = FENCED.findall((ROOT / "README.md").read_text())
    session = next(block for block in blocks if block.startswith("$ "))
    for name in ("assets", "engine", *(path.name for path in ROOT.glob("*.py"))):
        (tmp_path / name).symlink_to(ROOT / name)
    printed: list[str] = []
    for line in session.splitlines():
        if line.startswith("$ "):
            assert not printed
            command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", line[2:])
            settings = dict(cwd=tmp_path, capture_output=True, text=True)
            done = subprocess.run(["bash", "-c", command], **settings)
            assert done.returncode == 0, done.stderr
            printed = done.stdout.splitlines()
        else:
            assert printed.pop(0) == line
    assert not printed


@pytest.mark.parametrize(
    "page, command, text",
    [
        ("README.md", 'python -m lab.explain --config demo "The cat sat on the mat ."', "loss ="),
        ("EXERCISES.md", "pytest exercises -k ex01", "not written yet"),
        ("EXERCISES.md", "pytest exercises -k bug1", "bug 1"),
    ],
)
def test_quick_commands_run_as_printed(page, command, text):
    assert command in (ROOT / page).read_text()
    program, *words = shlex.split(command)
    words = ["-m", "pytest", *words] if program == "pytest" else words
    settings = dict(cwd=ROOT, capture_output=True, text=True)
    done = subprocess.run([sys.executable, *words], **settings)
    assert done.returncode == (program == "pytest"), done.stdout + done.stderr  # exercises fail
    assert text in done.stdout and "INTERNALERROR" not in done.stdout


def details() -> str:
    text = (ROOT / "README.md").read_text()
    return text[text.index("## Implementation details") : text.index("## What is not here")]


def test_every_name_and_flag_of_the_details_exists():
    for module, name in re.findall(r"`(diffcse|data|bert|eval_sts|embed)\.([\w.]+)`", details()):
        node = ast.parse((ROOT / f"{module}.py").read_text())
        for part in name.split("."):
            inner = [n for n in ast.walk(node) if getattr(n, "name", None) == part]
            assert inner, f"{module}.{name}"
            node = inner[0]
    known = {flag(field.name) for field in fields(Config)}
    assert set(re.findall(r"`(--[a-z][a-z-]*)", details())) <= known
    numbers = re.findall(r"^\| (\d+) \| [^`]", details(), re.MULTILINE)
    assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))


def test_the_switches_of_the_details_are_the_configs_values():
    for name, code, paper in re.findall(r"`(--[\w-]+) ([\w-]+)` or `([\w-]+)`", details()):
        default = getattr(Config(), name[2:].replace("-", "_"))
        assert {True: "on", False: "off"}.get(default, default) == code
        parse(Config, PRESETS, ["--config", "demo", name, paper])


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]*))?\)", text):
        file = ROOT / (target or page)
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, anchor
    for path in re.findall(r"`((?:results|assets|lab|engine|tests|exercises)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or any(ROOT.glob(path + "*")), path


# ------------------------------------------------------------------------------------------------
# The size of the code

MAX_LAB_LINES = 3513
MAX_LINES = {"diffcse": 480, "bert": 480, "data": 260, "embed": 300, "eval_sts": 310}


def count_lines(pattern: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in ROOT.glob(pattern))


def test_the_printed_line_counts_and_the_caps():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| \d \| `(\w+)\.py` \| (\d+) \|", text, re.MULTILINE)
    assert {name for name, _ in rows} == MAX_LINES.keys() == {p.stem for p in ROOT.glob("*.py")}
    for name, printed in rows:
        assert count_lines(f"{name}.py") == int(printed) <= MAX_LINES[name], name
    assert f"five files of {count_lines('*.py'):,} lines" in " ".join(text.split())
    assert count_lines("lab/*.py") <= MAX_LAB_LINES


def test_no_line_is_longer_than_100_columns_and_no_function_than_65_lines():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("lab/*.py")]:
        text = path.read_text()
        assert max(map(len, text.splitlines()), default=0) <= 100, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 65, (path, node.name)


# ------------------------------------------------------------------------------------------------
# The figures


def read_result(path: str) -> dict:
    return json.loads((ROOT / "results" / path).read_text())


def spread(values: list[float]) -> str:
    std = f" ± {np.std(values, ddof=1):.2f}" if len(set(values)) > 1 else ""
    return f"{np.mean(values):.2f}{std}"


def test_the_readmes_table():
    """Ours is the mean over the seeds; the other rows are as published."""
    text, published = (ROOT / "README.md").read_text(), read_result("published.json")["rows"]
    runs = read_result("same_settings.json")["runs"]
    averages = [
        [run["after"]["average"] for run in runs if (run["lam"] == 0) == is_simcse]
        for is_simcse in (True, False)
    ]
    assert list(map(len, averages)) == [5, 5]
    assert f"| {' | '.join(map(spread, averages))} |" in text
    for row in published[:4]:
        figures = f"| {row['parameters']} | {row['SimCSE']:.2f} | {row['DiffCSE']:.2f} |"
        assert re.search(rf"^\| {row['model']}.*{re.escape(figures)}$", text, re.MULTILINE), row
    assert f"{published[4]['SimCSE']:.2f} ± {published[4]['sd']:.2f}" in text


def test_same_settings_differ_in_lambda_alone():
    runs = read_result("same_settings.json")["runs"]
    rest = re.compile(r" --lam \S+| --seed \d| --out-dir \S+")
    assert len({rest.sub("", run["command"]) for run in runs}) == 1
    assert len({(run["lam"], run["seed"]) for run in runs}) == 10


def test_the_demos_table_is_that_of_its_runs():
    """results/demo: five seeds, each with its lam = 0 twin."""
    diffcse, simcse = (
        [read_result(f"demo/{kind}seed{seed}/results.json") for seed in range(5)]
        for kind in ("", "simcse-")
    )
    assert all(r["after"]["captions-test"] > r["before"]["captions-test"] for r in diffcse + simcse)
    rows = {
        "first-last average, before": [run["before_first_last"] for run in diffcse],
        "[CLS], before": [run["before"] for run in diffcse],
        "SimCSE with BatchNorm (λ = 0)": [run["after"] for run in simcse],
        "DiffCSE, as published": [run["after"] for run in diffcse],
    }
    text = (ROOT / "RESULTS.md").read_text()
    for label, scores in rows.items():
        cells = [
            spread([score[f"captions-{split}"] for score in scores]) for split in ("dev", "test")
        ]
        assert f"| {label} | {' | '.join(cells)} |" in text, (label, cells)


GIVEN = {"own": "its own h", "other": "another's h", "detached": "h, detached", "none": "no h"}


def with_errors(x: np.ndarray) -> list[str]:
    """Mean ± standard error of each column's differences; one seed has no error."""
    errors = x.std(0, ddof=1) / len(x) ** 0.5 if len(x) > 1 else None
    cells = [f"{mean:+.2f}".replace("-", "−") for mean in x.mean(0)]
    return cells if errors is None else [f"{c} ± {e:.2f}" for c, e in zip(cells, errors)]


def test_the_arms_are_those_of_the_runs():
    """RESULTS' table of what D is given: differences from λ = 0, seed by seed, ± standard error."""
    text, arms = (ROOT / "RESULTS.md").read_text(), {}
    for run in read_result("reads_h/runs.json")["runs"]:
        if run["trained"] == "all":
            key = run["steps"], run["objective"], run["edit_scope"], f"{run['lam']:g}", run["given"]
            scores = run["dev"][-1][1], run["best"]["SICKR"], run["best"]["average"]
            arms.setdefault(key, {})[run["seed"]] = *scores, (run["h_gap"] or [[0, 0]])[-1][1]
    tasks = {("replaced", "masked"): "replaced", ("masked", "all"): "masked LM"}
    for (steps, *task, lam, whose), runs in arms.items():
        reference = arms[steps, "replaced", "all", "0", "own"]
        if runs is reference:
            cells = [f"*{mean:.2f}*" for mean in np.mean(list(runs.values()), 0)[:3]]
            expected = f"| {steps:,}, λ = 0 | | {len(runs)} | {' | '.join(cells)} | |"
        else:
            x = np.array([np.subtract(runs[seed], reference[seed]) for seed in sorted(runs)])
            name = tasks.get(tuple(task), "as published")
            gap = f"{x.mean(0)[3]:.{4 if name == 'as published' else 3}f}"
            cells = [*with_errors(x)[:3], gap]
            row = [f"{steps:,}, {name}, {lam}", GIVEN[whose], str(len(runs)), *cells]
            expected = f"| {' | '.join(row)} |"
        assert expected in text, expected


def test_the_transfer_of_the_arms():
    """The arms on a CPU: STS-B dev at the last step, transfer of the best checkpoint."""
    text, arms = (ROOT / "RESULTS.md").read_text(), {}
    for run in read_result("reads_h/transfer.json")["runs"]:
        key = run["steps"], f"{run['lam']:g}", run["given"]
        accuracies = [run[part]["average"] for part in ("dev", "test")] if "dev" in run else []
        arms.setdefault(key, {})[run["seed"]] = run["last"], *accuracies
    for (steps, lam, given), runs in arms.items():
        reference = arms[steps, "0", "own"]
        if lam == "0":
            cells = [f"*{mean:.2f}*" for mean in np.mean(list(runs.values()), 0)]
            row = [f"{steps}, λ = 0", "", *cells]
        else:
            x = np.array([np.subtract(runs[seed], reference[seed]) for seed in range(3)])
            row = [f"{steps}, λ = {lam}", GIVEN[given], *with_errors(x)]
        expected = f"| {' | '.join(row)} |{' |' * (5 - len(row))}".replace("|  |", "| |")
        assert expected in text, expected


def test_tables_3_and_5():
    """RESULTS' table: mean ± standard deviation over five seeds, beside the paper's figures."""
    text, rows = (ROOT / "RESULTS.md").read_text(), {}
    for number in (3, 5):
        rows |= {r["name"]: r for r in read_result(f"tables/table_{number}_small.json")["rows"]}
    names = {"SimCSE": "SimCSE (tanh)", "DiffCSE without": "DiffCSE with tanh"}
    names |= {"SimCSE with BatchNorm": "SimCSE with BatchNorm: the same recipe"}
    for shared in ("SimCSE, the same recipe", "DiffCSE with BatchNorm", "SimCSE without"):
        del rows[shared]  # the runs of another row
    for row in rows.values():
        scores = [[run[c] for run in row["runs"]] for c in ("STSB-dev", "transfer-dev")]
        cells = [f"{np.mean(values):.2f} ± {np.std(values):.2f}" for values in scores]
        cells += [f"{figure:.2f}" for figure in row["paper"]]
        expected = f"| {names.get(row['name'], row['name'])} | {' | '.join(cells)} |"
        assert expected in text, expected
        assert [run["seed"] for run in row["runs"]] == [0, 1, 2, 3, 4]
    untrained = read_result("reads_h/transfer.json")["untrained"]["dev"]["average"]
    assert f"before training they are 74.20 and {untrained:.2f}" in " ".join(text.split())


def test_the_demos_output_is_that_of_its_run():
    text, results = (ROOT / "README.md").read_text(), read_result("demo/seed42/results.json")
    for line in (ROOT / "results/demo/seed42/log.jsonl").read_text().splitlines():
        row = json.loads(line)
        printed = f"step {row['step']:>6}  captions dev, Spearman x 100: {row.get('score', 0):.2f}"
        assert "score" not in row or printed in text
    assert f"{results['minutes']:.1f} minutes. The model of step {results['best_step']}" in text
