"""The course's files: in step with their sources, clean, complete, and solvable.

What the notebooks compute is nbval's business (`make test`); this file never starts a kernel.
"""

import json
import re
from pathlib import Path
from typing import Any

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
# Notebooks with cells whose output cannot be compared, and how many; such a cell asserts a range.
# 11: shares of a few dozen dialogues, where rounding decides some.
# 16, 17: what SmolLM2 says, or where it was not fetched, the toy.
NOT_COMPARED: dict[str, int] = {"11_gatt": 4, "16_real_weights": 11, "17_quantization": 4}

UNWANTED_OUTPUT = {
    "more than 4 decimals": r"\d\.\d{5}",
    "a negative zero": r"(?<![\w.])-0\.0*(?!\d)",
    "a memory address": r"0x[0-9a-fA-F]{6}",
    "a time": r"\d ?(s|ms|µs|ns|sec|it/s)\b|Wall time|CPU times",
    "a path": r"(?<![\w.:/<])(~|[A-Z]:)?[/\\][\w.-]+[/\\][\w.-]+",
    "colours": r"\x1b\[",
}

each_notebook = pytest.mark.parametrize("name", NAMES)


def read(name: str) -> list[dict[str, Any]]:
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def read_script(path: Path) -> list[dict[str, Any]]:
    return jupytext.read(path, fmt="py:percent").cells


def code(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["cell_type"] == "code"]


def tags(cell: dict[str, Any]) -> list[str]:
    return cell["metadata"].get("tags", [])


def exercise(cell: dict[str, Any], kind: str = "exercise") -> str | None:
    """K where the cell is tagged exercise-K (or check-K)."""
    found = [tag.removeprefix(f"{kind}-") for tag in tags(cell) if tag.startswith(f"{kind}-")]
    return found[0] if found else None


def texts(cell: dict[str, Any]) -> list[str]:
    """Everything that a reader sees below a code cell, but the figures."""
    shown = []
    for output in cell["outputs"]:
        shown += ["".join(output.get("text", [])), *output.get("traceback", [])]
        data = output.get("data", {})
        shown += ["".join(data[kind]) for kind in data if kind.startswith("text/")]
    return shown


def test_every_notebook_has_a_source_and_solutions():
    assert NAMES
    for folder in ("src", "solutions"):
        assert sorted(path.stem for path in (FOLDER / folder).glob("*.py")) == NAMES


@each_notebook
def test_is_in_step_with_its_source(name):
    def parts(cells):
        return [(cell["cell_type"], cell["source"], tags(cell)) for cell in cells]

    source = read_script(FOLDER / "src" / f"{name}.py")
    assert parts(read(name)) == parts(source), "run `make notebooks`"


@each_notebook
def test_file_is_clean(name):
    path = FOLDER / f"{name}.ipynb"
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size <= 500_000
    not_compared = 0
    for index, cell in enumerate(read(name)):
        where = f"cell {index}: {cell['source'][:60]!r}"
        if cell["cell_type"] == "markdown":
            assert not re.search(r"!\[[^]]*\]\(http|<img", cell["source"]), f"remote image, {where}"
            continue
        assert cell["execution_count"], f"not run, {where}"
        assert not re.search(r";\s*$", cell["source"], re.M), f"a line ends in ;, {where}"
        assert not re.search(r"^\s*[!%]", cell["source"], re.M), f"not plain Python, {where}"
        assert "nbval-skip" not in tags(cell), f"never run by the tests, {where}"
        for output in cell["outputs"]:
            assert output.get("name") != "stderr", f"stderr, {where}"
            assert "image/svg+xml" not in output.get("data", {}), f"SVG differs each time, {where}"
        if "nbval-ignore-output" in tags(cell):
            not_compared += 1
            continue
        for text in texts(cell):
            for what, pattern in UNWANTED_OUTPUT.items():
                found = re.search(pattern, text)
                assert not found, f"{what} ({found[0]!r}) in the output of {where}"
    assert not_compared == NOT_COMPARED.get(name, 0)


@each_notebook
def test_has_the_parts_of_a_lesson(name):
    cells = read(name)
    head, *_, tail = cells
    assert head["cell_type"] == tail["cell_type"] == "markdown"
    assert re.match(rf"# {int(name[:2])} · \S+.*: \S+", head["source"]), "# N · Title: subtitle"
    for part in ("**Question.**", "**You need**", "**It takes**", "**Module**"):
        assert part in head["source"]
    for module in re.findall(r"`(minillama/[\w/.]+)`", head["source"] + tail["source"]):
        assert (FOLDER.parent / module).exists(), f"{module} does not exist"
    assert "## Where it lives" in tail["source"]

    figures = sum("image/png" in o.get("data", {}) for c in code(cells) for o in c["outputs"])
    assert figures >= 2
    ties = [c for c in code(cells) if re.search(r"(?s)from minillama.*assert", c["source"])]
    assert ties, "no cell imports the package's version and asserts that it is the same"


@each_notebook
def test_every_exercise_has_a_check_and_a_solution(name):
    cells = code(read(name))
    stubs = [exercise(cell) for cell in cells if exercise(cell)]
    assert stubs == [str(k) for k in range(1, len(stubs) + 1)]
    assert 2 <= len(stubs) <= 4
    solved = [exercise(cell) for cell in code(read_script(FOLDER / "solutions" / f"{name}.py"))]
    assert solved == stubs
    for stub, check in zip(cells, [*cells[1:], {"metadata": {}}], strict=True):
        if k := exercise(stub):
            assert f'raise NotImplementedError("exercise {k}: yours to write")' in stub["source"]
            assert {f"check-{k}", "raises-exception"} <= set(tags(check))
            assert check["source"].endswith(f'print("exercise {k}: correct")')


@pytest.fixture
def alone(monkeypatch):
    """Run as a notebook does: in its folder; nothing it sets up stays."""
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    plt.switch_backend("agg")
    with plt.rc_context(), torch.random.fork_rng(), torch.enable_grad():
        yield
    torch.set_printoptions(profile="default")


@pytest.mark.slow
# torch's own, for each tensor that matplotlib copies; notebooks do not show it.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@each_notebook
def test_checks_fail_without_the_solutions_and_pass_with_them(name, alone):
    script = code(read_script(FOLDER / "src" / f"{name}.py"))
    solutions = {
        exercise(cell): cell for cell in code(read_script(FOLDER / "solutions" / f"{name}.py"))
    }
    # display: what a cell's last expression would be shown with.
    namespace: dict[str, Any] = {"__name__": "__main__", "display": print}

    def run(cell: dict[str, Any]) -> None:
        first_line = cell["source"].partition("\n")[0]
        exec(compile(cell["source"], f"<{name}: {first_line}>", "exec"), namespace)

    for cell in script:
        if k := exercise(cell, "check"):
            with pytest.raises((NotImplementedError, AssertionError)):
                run(cell)
            run(solutions[k])
            run(cell)
        elif "raises-exception" in tags(cell):
            with pytest.raises(Exception):  # noqa: B017, PT011  (whatever it shows; nbval compares)
                run(cell)
        else:
            run(cell)
