"""The package is read from the bottom up: a module imports only what lies below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import minillama

PACKAGE = Path(minillama.__file__).parent

# From the top down. Modules of one layer (a folder) may import each other.
LAYERS = [
    "__main__",
    "cli",
    "app",
    "__init__",  # the names that `from minillama import ...` offers, for users and the two above
    "evaluation",
    "rlhf",
    "chat",
    "generation",
    "training",
    "checkpoint",
    "adapt",
    "data",
    "model",
    "tokenizer",
    "plan",
    "config",
]


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of every module that the source imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "minillama":
            # `from minillama import model` names a layer, `from minillama import Llama` the top.
            yield from ((node.lineno, f"minillama.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def wrong_imports(path: Path, source: str) -> Iterator[str]:
    """What is wrong with the imports of the module at `path` in the package, a line for each."""
    layer = path.parts[0].removesuffix(".py")
    if layer not in LAYERS:
        yield f"{path}: no layer is called {layer!r}. Give it its place in LAYERS of {__file__}."
        return
    for line, module in imported_modules(source):
        if module.startswith("."):
            if (
                module.startswith("..") or len(path.parts) == 1
            ):  # a neighbour's is of the same layer
                yield f"{path}, line {line}: write out what {module} means, from minillama on."
            continue
        package, *rest = module.split(".")
        imported = rest[0] if rest and rest[0] in LAYERS else "__init__"
        if package == "minillama" and LAYERS.index(imported) < LAYERS.index(layer):
            yield (
                f"{path}, line {line}: {layer} imports {imported}, which lies above it. "
                f"Move what both need down into {layer} or below, or pass it in as an argument."
            )


def test_imports_point_down_only():
    paths = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "model" / "llama.py" in paths
    wrong = [
        message
        for path in paths
        for message in wrong_imports(path.relative_to(PACKAGE), path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "from minillama.training.loop import train",
        "import minillama.training",
        "import torch, minillama.training.loop as loop",
        "from minillama import training",
        "from minillama import Llama",  # the top, which imports everything
        "import minillama",
        "def late():\n    from minillama.training import train",
    ],
)
def test_an_import_that_points_up_is_found(source):
    (message,) = wrong_imports(Path("model/llama.py"), source)
    assert message.startswith("model/llama.py, line ")
    assert "lies above it. Move what both need down into model or below" in message


@pytest.mark.parametrize(
    "source",
    [
        "from minillama.config import LlamaConfig",
        "from minillama import config",
        "from minillama.model.norm import RMSNorm",
        "from .norm import RMSNorm",
        "import torch, minillamas_cousin",
    ],
)
def test_an_import_that_points_down_or_aside_is_not(source):
    assert not list(wrong_imports(Path("model/llama.py"), source))


@pytest.mark.parametrize("path", ["model/llama.py", "cli.py"])
def test_a_relative_import_of_another_layer_is_to_be_written_out(path):
    source = "from ..training import train" if "/" in path else "from .training import train"
    (message,) = wrong_imports(Path(path), source)
    assert "from minillama on" in message


def test_a_new_folder_must_take_its_place():
    (message,) = wrong_imports(Path("utils/misc.py"), "")
    assert "no layer is called 'utils'" in message
