"""Are the tests good enough? Each classic mistake, made on purpose, must be caught.

Every mistake below gives a model of the same shapes that runs without complaint. It is written
into a copy of the package, and the tests run on the copy. See the table: pytest -s -m slow.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

import minillama

TESTS = Path(__file__).parent
META = "test_parity.py::test_logits_equal_metas_equations[grouped-8-2]"
CACHE = "test_parity.py::test_logits_through_the_cache_equal_metas_equations[grouped-8-2]"
TRANSFORMERS = "test_parity.py::test_logits_equal_transformers[grouped-8-2]"
BFLOAT16 = "test_norm.py::test_bfloat16_is_rounded_before_the_weight"


class Mutation(NamedTuple):
    file: str
    changes: list[tuple[str, str]]  # right -> wrong
    caught_by: str


ATTEND = "scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=True)"
NORMALISED = "(x_float * inv_rms).type_as(x) * self.weight"

MUTATIONS = {
    "RoPE turns halves, not pairs": Mutation(
        "model/rope.py",
        [
            (".unflatten(-1, (-1, 2))", ".unflatten(-1, (2, -1)).mT.contiguous()"),
            (".flatten(-2)", ".mT.flatten(-2)"),
        ],
        META,
    ),
    "wk is permuted with n_heads": Mutation(
        "checkpoint/huggingface.py",
        [('"wk": config.n_kv_heads', '"wk": config.n_heads')],
        TRANSFORMERS,
    ),
    "eps stands outside the root": Mutation(
        "model/norm.py",
        [
            (
                "torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)",
                "1 / (x_float.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)",
            )
        ],
        META,
    ),
    "the norm's weight comes before the cast": Mutation(
        "model/norm.py",
        [(NORMALISED, "(x_float * inv_rms * self.weight).type_as(x)")],
        BFLOAT16,
    ),
    "the causal mask shows one token of the future": Mutation(
        "model/attention.py",
        [
            ("causal = visible", "import torch; causal = visible"),
            (
                ATTEND,
                "scaled_dot_product_attention(q, k, v, torch.ones(q.shape[2], k.shape[2]).tril(1)"
                ".bool() if causal else visible, enable_gqa=True)",
            ),
        ],
        META,
    ),
    "the cache hides a token from itself": Mutation(
        "model/cache.py",
        [("key_positions <= self.positions", "key_positions < self.positions")],
        CACHE,
    ),
    "the cache shows one token of the future": Mutation(
        "model/cache.py",
        [("key_positions <= self.positions(seq)", "key_positions <= 1 + self.positions(seq)")],
        CACHE,
    ),
    "KV heads are tiled, not repeated": Mutation(
        "model/attention.py",
        [
            ("causal = visible", "g = q.shape[1] // k.shape[1]; causal = visible"),
            (
                ATTEND,
                "scaled_dot_product_attention(q, k.repeat(1, g, 1, 1), v.repeat(1, g, 1, 1), "
                "visible, is_causal=causal)",
            ),
        ],
        META,
    ),
    "w1 and w3 are swapped": Mutation(
        "model/feed_forward.py",
        [("silu(self.w1(x)) * self.w3(x)", "silu(self.w3(x)) * self.w1(x)")],
        META,
    ),
}

RUN = """
import sys
from pathlib import Path
import minillama, pytest
assert Path(minillama.__file__).is_relative_to(Path.cwd()), "this is not the copy"
options = ["-p", "pytest_timeout", "-p", "no:cacheprovider", "--junit-xml=report.xml"]
sys.exit(pytest.main(options + sys.argv[1:]))
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # plugins that these tests do not need cost a second
}


def failures(copy: Path, *tests: str) -> dict[str, str]:
    """Which of the tests fail on a copy of the package, and how."""
    run = subprocess.run(
        [sys.executable, "-c", RUN, *(str(TESTS / test) for test in tests)],
        cwd=copy,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr  # 1: tests failed; else: none ran
    cases = list(ElementTree.parse(copy / "report.xml").iter("testcase"))
    assert len(cases) == len(tests), run.stdout
    return {case.get("name"): fail.get("message") for case in cases for fail in case}


def copy_with(folder: Path, file: str, changes: list[tuple[str, str]]) -> Path:
    """A copy of the package in `folder`, with the changes made in one file."""
    shutil.copytree(Path(minillama.__file__).parent, folder / "minillama")
    path = folder / "minillama" / file
    source = path.read_text()
    for right, wrong in changes:
        assert source.count(right) == 1, f"{file} has {right!r} {source.count(right)} times, not 1"
        source = source.replace(right, wrong)
    path.write_text(source)
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict[str, str]]:
    """For each mistake: the test that fails, and how."""

    def outcome(mutation: Mutation) -> dict[str, str]:
        copy = copy_with(tmp_path_factory.mktemp("copy"), mutation.file, mutation.changes)
        return failures(copy, mutation.caught_by)

    with ThreadPoolExecutor(max_workers=2) as pool:
        found = dict(zip(MUTATIONS, pool.map(outcome, MUTATIONS.values()), strict=True))
    print()
    for name, failed in found.items():
        print(f"{name:<46} {', '.join(failed) or 'NOT CAUGHT'}")
    return found


@pytest.mark.slow
def test_the_unchanged_copy_passes(tmp_path):
    copy = copy_with(tmp_path, "model/norm.py", [])
    assert failures(copy, META, CACHE, TRANSFORMERS, BFLOAT16) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_mistake_is_caught(outcomes, name):
    assert outcomes[name], f"{MUTATIONS[name].caught_by} passes all the same"
    (how,) = outcomes[name].values()
    assert how.startswith(("AssertionError", "assert"))  # by a wrong number, not by a crash
