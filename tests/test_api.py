"""The names that `from minillama import ...` promises, and how light the promise is."""

import inspect
import os
import subprocess
import sys

import pytest

import minillama

PUBLIC = ["Completion", "Llama", "LlamaConfig", "Tokenizer", "generate", "load", "save", "stream"]


def python(code: str) -> str:
    """What the code prints in a process of its own, where nothing is imported yet."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_public_names():
    assert sorted(minillama.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(minillama))
    for name in PUBLIC:
        assert getattr(minillama, name).__name__ == name
        assert inspect.getdoc(getattr(minillama, name))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("load", "path tokenizer device dtype quantize"),
        ("save", "folder model tokenizer format options"),
        (
            "generate",
            "model tokenizer prompts max_new_tokens temperature top_k top_p seed stop logprobs "
            "min_p repetition_penalty draft n_draft rows compile",
        ),
        (
            "stream",
            "model tokenizer prompt max_new_tokens temperature top_k top_p seed stop "
            "min_p repetition_penalty draft n_draft compile",
        ),
    ],
)
def test_the_parameters_in_their_order(name, parameters):
    assert list(inspect.signature(getattr(minillama, name)).parameters) == parameters.split()


def test_defaults_that_others_rely_on():
    defaults = inspect.signature(minillama.generate).parameters
    assert defaults["max_new_tokens"].default == 200
    assert defaults["temperature"].default == 0.0
    for name in ("top_k", "top_p", "seed"):
        assert defaults[name].default is None
    assert inspect.signature(minillama.save).parameters["format"].default == "native"


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"has no attribute 'Lama'; it has .*'Llama'"):
        _ = minillama.Lama
    with pytest.raises(ImportError, match="Lama"):
        from minillama import Lama  # noqa: F401


def test_star_import_gives_the_public_names():
    code = "from minillama import *; print(*sorted(n for n in dir() if not n.startswith('_')))"
    assert python(code).split() == PUBLIC


def test_importing_the_package_imports_no_heavy_library():
    code = "import sys, minillama; dir(minillama); print(*sys.modules)"
    modules = set(python(code).split())
    assert "minillama" in modules
    assert not modules & {"torch", "numpy", "sentencepiece", "matplotlib", "tyro"}


def test_presets_need_no_torch():
    code = (
        "import sys, minillama; minillama.LlamaConfig.preset('toy'); print('torch' in sys.modules)"
    )
    assert python(code) == "False\n"


def test_a_name_is_imported_when_it_is_asked_for_and_only_then():
    code = """
import sys, minillama
assert "torch" not in sys.modules and "Llama" not in vars(minillama)
minillama.Llama
assert "torch" in sys.modules and "Llama" in vars(minillama)
"""
    python(code)


def test_import_takes_a_tenth_of_a_second():
    """In processor time, whatever else the machine does: what the import adds to Python's start."""

    def seconds(code: str) -> float:
        before = os.times()
        python(code)
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])  # user and system, of children

    # Neighbours on the machine slow a run down and never speed it up: one good run is proof.
    bare = min(seconds("") for _ in range(5))
    assert any(seconds("import minillama") - bare < 0.1 for _ in range(20))
