"""exercises/tour.ipynb: each cell runs, and its stored outputs are those of this code."""

import ast
import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, fake_ipython

TOUR = ROOT / "exercises" / "tour.ipynb"
STEPS = 4


def code_cells() -> list[dict]:
    cells = json.loads(TOUR.read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if "outputs" in cell]


def stored_text(cell: dict) -> str:
    streams = [o for o in cell["outputs"] if o.get("name") == "stdout"]
    return "".join("".join(output["text"]) for output in streams)


def run_cells() -> None:
    """In the test's subprocess: run the cells as Jupyter would, with a stand-in for IPython.

    Prints JSON: of each cell what it prints, and how many figures it draws; and the contrastive
    loss at a temperature of 1.
    """
    drawn = []

    def draw(figure) -> None:
        figure.savefig(io.BytesIO(), format="png")
        drawn.append(figure)

    display = lambda figure, display_id: SimpleNamespace(update=draw)  # noqa: E731
    sys.modules |= fake_ipython(display, SimpleNamespace(set_custom_exc=lambda *args: None))
    names, results = {"__name__": "__main__"}, []
    for cell in code_cells():
        source = re.sub(r"^STEPS = \d+", f"STEPS = {STEPS}", cell["source"], flags=re.M)
        tree, last = ast.parse(source.replace("%matplotlib inline", "")), None
        if isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        before, out = len(drawn), io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(tree, "cell", "exec"), names)
            value = eval(compile(last, "cell", "eval"), names) if last else None
            if hasattr(value, "savefig"):
                draw(value)
        results.append([out.getvalue(), len(drawn) - before])
    loss, _ = names["contrastive_loss"](names["views"], 1.0)
    print(json.dumps([results, loss.item()]))


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[list[list], float]:
    """In a folder that looks like a clone, so that no run is written to this one."""
    pytest.importorskip("matplotlib", reason="pip install -r requirements-dev.txt")
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in ("exercises", "runs"):
            (folder / path.name).symlink_to(path)
    (folder / "exercises").mkdir()
    code = "import test_tour; test_tour.run_cells()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder / "exercises",
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=600,  # 40 s on two cores: no endless loop
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def results(ran) -> list[list]:
    return ran[0]


def test_every_cell_runs_and_draws_what_is_stored(results):
    cells = code_cells()
    assert len(results) == len(cells)
    for cell, (_, figures) in zip(cells, results):
        stored = ["image/png" in output.get("data", {}) for output in cell["outputs"]]
        assert bool(figures) == any(stored), cell["source"]


def test_the_first_cell_installs_what_the_project_needs():
    dependencies = re.search("dependencies = (.*)", (ROOT / "pyproject.toml").read_text())[1]
    needed = json.dumps([*json.loads(dependencies), "matplotlib"])
    assert f"needed = {needed}\n" in code_cells()[0]["source"]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def test_stored_outputs_are_those_of_this_code(results):
    """Cells that do not depend on training print the same, to the rounding of another machine."""
    compared = 0
    for cell, (printed, _) in zip(code_cells(), results):
        if not re.search("importlib|models|readers|runs/tour|DiffCSE", cell["source"]):
            stored = stored_text(cell)
            assert re.sub(r"[\d.-]+", "", printed) == re.sub(r"[\d.-]+", "", stored)
            assert numbers(printed) == pytest.approx(numbers(stored), rel=0.02, abs=2e-3)
            compared += len(numbers(stored))
    assert compared >= 15


def test_the_numbers_of_the_text(ran):
    """Of the answer on the temperature, for the sentence that is there."""
    text = "".join("".join(cell["source"]) for cell in json.loads(TOUR.read_text())["cells"])
    lowest = math.log(1 + 7 / math.e**2)  # the right view at a cosine of 1, the others at -1
    assert f"it is {ran[1]:.2f} at a temperature of 1" in text
    assert f"(log 8 = {math.log(8):.2f})" in text and f"log(1 + 7/e²) = {lowest:.2f}" in text


def test_the_stored_training_is_the_demo():
    """Its scores are those of results/demo, which the README shows."""
    demo = json.loads((ROOT / "results" / "demo" / "seed42" / "results.json").read_text())
    (train,) = (cell for cell in code_cells() if 'out_dir="runs/tour")' in cell["source"])
    (plot,) = (cell for cell in code_cells() if "plot_ridges" in cell["source"])
    text = stored_text(train)
    for key in ("before", "after"):
        assert f"{demo[key]['captions-test']:.2f}" in text
    assert "STEPS = 60" in "".join(cell["source"] for cell in code_cells())
    assert any("image/png" in output.get("data", {}) for output in plot["outputs"])


def test_the_notebook_is_as_it_was_run_from_top_to_bottom():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert TOUR.stat().st_size < 1_000_000
    text = TOUR.read_text()
    assert "/home/" not in text and "/tmp/" not in text and "Traceback" not in text
