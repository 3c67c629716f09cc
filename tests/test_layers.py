"""The package is read from the bottom up: a module imports only what lies below it."""

import ast
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
    "adapt",
    "checkpoint",
    "data",
    "model",
    "tokenizer",
    "plan",
    "config",
]


def imported_layers(source: str, inside: str) -> list[tuple[int, str]]:
    """(line, layer) of every import of minillama, wherever it stands in the source of a module
    that lies in the package `inside`, e.g. "minillama.model".
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = inside.split(".")[: len(inside.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            # `from minillama import model` names a layer, `from minillama import Llama` the top.
            names = (
                [f"{base}.{alias.name}" for alias in node.names] if base == "minillama" else [base]
            )
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "minillama":
                layer = rest.split(".")[0]
                found.append((node.lineno, layer if layer in LAYERS else "__init__"))
    return found


def upward_imports(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of the module at `path` in the package, a line for each."""
    layer = path.parts[0].removesuffix(".py")
    if layer not in LAYERS:
        return [f"{path}: no layer is called {layer!r}. Give it its place in LAYERS of {__file__}."]
    inside = ".".join(["minillama", *path.parts[:-1]])
    return [
        f"minillama/{path}, line {line}: {layer} imports {imported}, which lies above it. "
        f"Move what both need down into {layer} or below, or pass it in as an argument."
        for line, imported in imported_layers(source, inside)
        if LAYERS.index(imported) < LAYERS.index(layer)
    ]


def test_imports_point_down_only():
    paths = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "model" / "llama.py" in paths
    wrong = [
        line
        for path in paths
        for line in upward_imports(path.relative_to(PACKAGE), path.read_text())
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
        "from .. import training",
        "from ..training.loop import train",
        "def late():\n    from minillama.training import train",
    ],
)
def test_an_import_that_points_up_is_found(source):
    (message,) = upward_imports(Path("model/llama.py"), source)
    assert message.startswith("minillama/model/llama.py, line ")
    assert "lies above it. Move" in message


@pytest.mark.parametrize(
    "source",
    [
        "from minillama.config import LlamaConfig",
        "from minillama import config",
        "from minillama.model.norm import RMSNorm",
        "from .norm import RMSNorm",
        "from . import norm",
        "import torch, minillamas_cousin",
    ],
)
def test_an_import_that_points_down_or_aside_is_not(source):
    assert upward_imports(Path("model/llama.py"), source) == []


def test_a_new_folder_must_take_its_place():
    (message,) = upward_imports(Path("utils/misc.py"), "")
    assert "no layer is called 'utils'" in message
