"""The compiled step, in processes of their own: it cannot be compiled under checks of shapes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGINNING = """
import torch
from small import small_llama, small_tokenizer
from torch.testing import assert_close
from minillama.adapt.quantize import quantize
from minillama.generation import CompiledDecoder, Decoder, generate
torch.set_num_threads(1)
torch.set_grad_enabled(False)

def both(model, texts, steps, rows):
    # greedy logits of the plain and of the compiled decoder, and the latter itself
    logits = []
    for kind in (Decoder, CompiledDecoder):
        decoder = kind(model, rows, max_len=32)
        last = decoder.prefill(0, texts)
        found = [last]
        for _ in range(steps):
            last = decoder.step(last.argmax(-1).tolist())
            found.append(last)
        logits.append(torch.stack(found))
    assert decoder.lengths[: len(texts)] == [len(text) + steps for text in texts]
    return (*logits, decoder)
"""
EXACTNESS = """
model = small_llama()
for texts, rows in (([[1, 5, 7]], 1), ([[1], [1, 9, 3], [1, 2]], 4)):
    plain, compiled, _ = both(model, texts, 24, rows)
    assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(compiled.argmax(-1), plain.argmax(-1))
compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
assert compilations == 2, compilations  # one for each number of rows, whatever the lengths

other = small_llama(seed=1, n_layers=1, dim=64)  # another model shares nothing with the first
plain, compiled, _ = both(other, [[1, 5, 7]], 24, 1)
assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
"""
NEIGHBOURS = """
decoder = both(small_llama(), [[1, 5, 7], [1, 9]], 1, rows=3)[2]
decoder.prefill(2, [[1, *range(10, 41)]])  # the third row is full, and nobody asks for its next
kept = [stored[:, 2].clone() for stored in (decoder.cache.keys, decoder.cache.values)]
decoder.step([4, 4])
assert decoder.lengths == [5, 4, 32]
for stored, before in zip((decoder.cache.keys, decoder.cache.values), kept):
    assert torch.equal(stored[:, 2, :, :32], before[:, :, :32])
try:
    decoder.step([4, 4, 4])
except ValueError as error:
    assert "32 tokens read and 1 more are 33, but there is room for 32" in str(error)
else:
    raise AssertionError("a row of 32 places took 33 tokens")
decoder.cache.keys.fill_(3)
assert all((layer == 3).all() for layer in decoder._keys), "the cache is held twice"
"""
LOW_PRECISION = """
for kind, tolerance in (("bfloat16", 3e-2), ("int8", 3e-2), ("int4", 3e-2)):
    model = small_llama()
    model = model.bfloat16() if kind == "bfloat16" else quantize(model, kind)
    text = [[1, 5, 7]]
    for rows in (1, 2):
        plain, compiled, _ = both(model, text, 2, rows)
        assert_close(compiled[:3], plain[:3], rtol=tolerance, atol=tolerance * plain.abs().max())
"""
ENGINE = """
prompts = ["Ada had", "Ben", "Clara took the"]
plain, compiled = (
    generate(small_llama(), small_tokenizer(), prompts, 20, rows=2, compile=compile)
    for compile in (False, True)
)
assert plain == compiled and any(completion.token_ids for completion in plain)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(EXACTNESS, id="equals_the_plain_step_and_is_compiled_once"),
        pytest.param(NEIGHBOURS, id="leaves_rows_alone_that_nobody_asks_for"),
        pytest.param(LOW_PRECISION, id="equals_the_plain_step_in_low_precision"),
        pytest.param(ENGINE, id="writes_what_the_plain_engine_writes"),
    ],
)
def test_the_compiled_step(script):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-W", "error::UserWarning", "-c", BEGINNING + script]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
