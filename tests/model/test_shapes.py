"""docs/shapes.md is the glossary: no signature uses a word that is not in it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import minillama

PACKAGE = Path(minillama.__file__).parent
GLOSSARY = Path(__file__).parents[2] / "docs" / "shapes.md"


DTYPES = {"Bool", "Complex", "Float", "Int", "Integer", "Num", "Shaped", "UInt"}  # jaxtyping's


def axis_words(source: str) -> Iterator[str]:
    """The words in jaxtyping's shapes: "*#batch 1 seq" has batch and seq."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(
                value=ast.Name(id=dtype), slice=ast.Tuple(elts=[_, ast.Constant(value=shape)])
            ) if dtype in DTYPES:
                yield from re.findall(r"[a-z]\w*", shape)


def test_words_are_read_off_the_signatures():
    source = """def f(x: Float[Tensor, "*#batch 1 seq"] | None, y: Literal["a", "b"]) -> None:
    z: UInt[np.ndarray, " k_len"]"""
    assert set(axis_words(source)) == {"batch", "seq", "k_len"}


def test_every_axis_word_stands_in_the_glossary():
    table = GLOSSARY.read_text(encoding="utf-8").split("## Axes")[1].split("##")[0]
    explained = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    used = {
        (word, str(path.relative_to(PACKAGE)))
        for path in PACKAGE.rglob("*.py")
        for word in axis_words(path.read_text(encoding="utf-8"))
    }
    assert ("kv_heads", "model/cache.py") in used
    unknown = sorted((word, path) for word, path in used if word not in explained)
    assert not unknown, f"Use a word of docs/shapes.md, or add a line there for these: {unknown}"
