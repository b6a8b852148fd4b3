"""What the pages say can be done can be done: every command is one that its program takes, the fast ones print what stands there, every name is there."""

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

import pytest

from config import Config, parse_args

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "GUIDE.md", "RESULTS.md", "EXERCISES.md"]
PROGRAMS = ("python", "pytest", "torchrun", "pip", "python3", ".venv/bin/python", ".venv/bin/pip")
SHELL = re.compile(r"(\$ |" + "|".join(re.escape(p) for p in PROGRAMS) + r"|for |mkdir |printf )")


def blocks(page: str) -> list[str]:
    """The shell of a page: fenced and indented code that begins with a command; of what begins with $ only those lines."""
    text = (ROOT / page).read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in re.findall(r"(?:^ {4}\S.*\n?)+", outside, re.MULTILINE)]
    found = [block for block in fenced + indented if SHELL.match(block)]
    return ["\n".join(line[2:] for line in block.splitlines() if line.startswith("$ ")) if block.startswith("$ ") else block for block in found]


def commands(page: str, tmp_path: Path) -> list[list[str]]:
    """What the shell would start, loops and variables gone through: the programs are stand-ins that write down how they were called."""
    stand_in = f"#!{sys.executable}\nimport json, os, sys\nopen({str(tmp_path / 'called')!r}, 'a').write(json.dumps(sys.argv) + '\\n')\n"
    (tmp_path / "bin").mkdir()
    (tmp_path / "cwd/.venv/bin").mkdir(parents=True)
    for name in PROGRAMS:
        file = (tmp_path / "cwd" if "/" in name else tmp_path / "bin") / name
        file.write_text(stand_in)
        file.chmod(0o755)
    (tmp_path / "cwd/.venv/bin/activate").touch()
    for block in blocks(page):
        done = subprocess.run(["bash", "-eu", "-c", block], cwd=tmp_path / "cwd", capture_output=True, text=True, stdin=subprocess.DEVNULL,
                              env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})  # fmt: skip
        assert done.returncode == 0, (block, done.stderr)
    return [json.loads(line) for line in (tmp_path / "called").read_text().splitlines()]


@cache
def flags_of(*program: str) -> str:
    """What the program's -h says. In this process: most of a program's time is its imports."""
    name, *words = program[1:] if program[0] == "-m" else (program[0].removesuffix(".py").replace("/", "."), *program[1:])
    said = io.StringIO()
    with patch.object(sys, "argv", [name, *words, "-h"]), contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main()
    assert not stopped.value.code, program
    return said.getvalue()


def check(words: list[str]) -> str:
    """Raises where the program would not take these words. Returns which program it is."""
    program, *words = words
    name = Path(program).name
    if name == "torchrun":
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    if name in ("pip", "python3", "source") or words[:2] == ["-m", "pytest"] or words[0] == "-c":
        return name
    if name == "pytest":
        assert words[0].split("/")[0] == "exercises" and (ROOT / words[0]).exists(), words[0]
        return name
    if words[0] in ("diffcse.py", "exercises/detached.py"):
        if "--resume" not in words and "-h" not in words:  # what is resumed must be there
            parse_args(words[1:])
        return name if name == "torchrun" else words[0]
    program, rest = (words[:2], words[2:]) if words[0] == "-m" else (words[:1], words[1:])
    assert (ROOT / (program[-1].replace(".", "/") + ".py" if program[0] == "-m" else program[0])).is_file(), program
    if rest and re.fullmatch(r"[a-z]+", rest[0]) and re.search(rf"[{{,\s]{rest[0]}[,}}\s]", flags_of(*program).partition("positional")[2] or flags_of(*program)):
        program, rest = [*program, rest[0]], rest[1:]
    for word in rest:
        if word.startswith("--"):
            own = flags_of(*program) + (flags_of("diffcse.py") if "is one of diffcse.py" in flags_of(*program) else "")
            assert re.search(rf"(^|[\s,\[]){re.escape(word.split('=')[0])}\b", own), (program, word)
    return program[-1]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_its_program_takes(page, tmp_path):
    seen = {check(words) for words in commands(page, tmp_path)}
    wanted = {"README.md": {"diffcse.py", "search", "eval_sts.py", "lab.report", "lab.reproduce", "python3"},
              "GUIDE.md": {"diffcse.py", "search", "eval_sts.py", "lab.report", "torchrun"}, "RESULTS.md": {"lab.pretrain", "lab.reproduce"},
              "EXERCISES.md": {"diffcse.py", "exercises/detached.py", "pytest", "lab.report", "lab.pretrain"}}  # fmt: skip
    assert wanted[page] <= seen, seen


def test_a_wrong_command_is_seen(tmp_path):
    for words, error in ((["python", "diffcse.py", "--config", "demo", "--lamda", "1"], "unknown flag"), (["python", "eval_sts.py", "M", "--no-such"], "no-such"),
                         (["python", "-m", "lab.nothing"], "lab.nothing"), (["pytest", "nowhere"], "nowhere")):  # fmt: skip
        with pytest.raises((AssertionError, ValueError), match=error):
            check(words)


def test_sessions_print_what_stands_there(tmp_path):
    """Of README: every `$` command, and the lines after it."""
    session = next(block for block in re.findall(r"^```\n(\$.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL))
    for file in ROOT.glob("*.py"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    printed = []
    for line in session.splitlines():
        if line.startswith("$ "):
            words = line[2:].replace("python ", f"{shlex.quote(sys.executable)} ", 1) if line.startswith("$ python ") else line[2:]
            done = subprocess.run(["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert not printed, (line, printed)
            printed = done.stdout.splitlines()
        else:
            assert printed.pop(0) == line
    assert not printed


# What takes seconds and needs neither network nor data, as printed. (Others: the demo in test_docs, runs and scores in their own tests.)
FAST = {"README.md": ['python diffcse.py --config demo --explain "The cat sat on the mat ."'], "EXERCISES.md": ["pytest exercises -k ex01", "pytest exercises -k bug1"]}


@pytest.mark.parametrize("page, command", [(page, command) for page, several in FAST.items() for command in several])
def test_fast_commands_run_as_printed(page, command):
    assert command in (ROOT / page).read_text()
    program, *words = shlex.split(command)
    done = subprocess.run([sys.executable, *(["-m", "pytest"] if program == "pytest" else []), *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (1 if program == "pytest" else 0) and "Traceback" not in done.stderr, done.stdout + done.stderr  # as shipped an exercise fails
    assert "INTERNALERROR" not in done.stdout and ("not written yet" in done.stdout or "bug 1" in done.stdout or "Difference prediction" in done.stdout)


def test_every_name_in_the_details_is_there():
    text = (ROOT / "README.md").read_text()
    details = text[text.index("## Implementation details") : text.index("## What is not here")]
    for module, name in re.findall(r"`(diffcse|data|bert|eval_sts|embed|run)\.([\w.]+)`", details):
        tree = ast.parse((ROOT / f"{module}.py").read_text())
        for part in name.split("."):
            tree = next((node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part), None)
            assert tree is not None, f"{module}.{name}"
    known = {f"--{field.name.replace('_', '-')}" for field in fields(Config)} | {"--config", "--pooler"}
    assert set(re.findall(r"`(--[a-z][a-z-]*)", text)) <= known | {"--top-k", "--out"}
    for number, row in enumerate(re.findall(r"^\| (\d+) \| [^`]", details, re.MULTILINE), 1):
        assert int(row) == number


def test_the_switches_of_the_table_are_config_s_values():
    text = (ROOT / "README.md").read_text()
    for flag, code, paper in re.findall(r"`(--[\w-]+) ([\w-]+)` or `([\w-]+)`", text):
        name = flag[2:].replace("-", "_")
        default = {True: "on", False: "off"}.get(getattr(Config(), name), getattr(Config(), name))
        assert default == code and parse_args(["--config", "demo", flag, paper])[1].check(), flag


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]*))?\)", text):
        file = ROOT / (target[0] or page)
        assert file.exists(), target
        if target[1]:
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)}
            assert target[1] in slugs, target
    for path in re.findall(r"`((?:results|assets|lab|tests|exercises)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or any(ROOT.glob(path + "*")), path


def test_the_tour_s_files_are_as_long_as_it_says():
    rows = re.findall(r"^\| \d+ \| (`[^|]*) \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 8
    for files, lines in rows:
        there = sum(len((ROOT / file).read_text().splitlines()) for file in re.findall(r"`([\w.]+)`", files))
        assert abs(there - int(lines)) <= 0.05 * there, (files, there)
