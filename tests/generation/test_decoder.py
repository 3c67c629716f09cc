from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_llama
from torch.testing import assert_close

from minillama.generation import Decoder

MODEL = small_llama()
TEXTS = st.lists(st.integers(0, 299), min_size=1, max_size=16)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def alone(ids: list[int]) -> torch.Tensor:
    """The logits behind the last token, without a cache."""
    return MODEL(torch.tensor([ids]))[0, -1]


def close(found: torch.Tensor, texts: list[list[int]]) -> None:
    assert_close(found, torch.stack([alone(ids) for ids in texts]), rtol=1e-4, atol=1e-4)


@given(texts=st.lists(TEXTS, min_size=1, max_size=4), more=TEXTS, data=st.data())
@settings(deadline=None, max_examples=12)
def test_however_texts_are_read_the_logits_are_those_of_each_alone(texts, more, data):
    decoder = Decoder(MODEL, rows=len(texts), max_len=48)
    for row, ids in enumerate(texts):
        cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)))) | {len(ids)})
        for start, end in pairwise([0, *cuts]):
            logits = decoder.prefill(row, [ids[start:end]])
        close(logits, [ids])
    for token in more[:8]:
        texts = [[*ids, token] for ids in texts]
        close(decoder.step([token] * len(texts)), texts)
    last = decoder.extend([more] * len(texts))
    assert last.shape == (len(texts), len(more), 300)
    for i in range(len(more)):
        close(last[:, i], [ids + more[: i + 1] for ids in texts])
    assert decoder.lengths == [len(ids) + len(more) for ids in texts]


@given(texts=st.lists(TEXTS, min_size=1, max_size=5), first=st.integers(0, 2))
@settings(deadline=None, max_examples=15)
def test_prompts_of_any_lengths_are_read_at_once(texts, first):
    decoder = Decoder(MODEL, rows=8, max_len=48)
    close(decoder.prefill(first, texts), texts)
    after = [0] * (8 - first - len(texts))
    assert decoder.lengths == [*[0] * first, *map(len, texts), *after]


def test_the_first_rows_go_on_without_the_others():
    texts = [[1, 5, 7], [1, 9], [1, 2, 3, 4]]
    decoder = Decoder(MODEL, rows=4, max_len=16)
    decoder.prefill(0, texts)
    close(decoder.step([20, 21]), [[1, 5, 7, 20], [1, 9, 21]])
    assert decoder.lengths == [4, 3, 4, 0]
    close(decoder.step([22, 23, 24]), [[1, 5, 7, 20, 22], [1, 9, 21, 23], [1, 2, 3, 4, 24]])


def test_rows_that_have_changed_places_go_on():
    decoder = Decoder(MODEL, rows=3, max_len=16)
    decoder.prefill(0, [[1, 5, 7], [1, 9], [1, 2, 3, 4]])
    decoder.swap(2, 0)
    assert decoder.lengths == [4, 2, 3]
    close(decoder.step([20, 21]), [[1, 2, 3, 4, 20], [1, 9, 21]])
    decoder.copy(0, 1, 2)
    assert decoder.lengths == [5, 2, 3]
    close(decoder.step([22, 23, 24]), [[1, 2, 3, 4, 20, 22], [1, 2, 23], [1, 5, 7, 24]])


def test_tokens_that_are_taken_back_leave_no_trace():
    decoder = Decoder(MODEL, rows=2, max_len=16)
    decoder.prefill(0, [[1, 5, 7], [1, 9]])
    decoder.extend([[30, 31, 32], [33, 34, 35]])
    decoder.lengths[:] = [4, 2]
    close(decoder.step([40, 41]), [[1, 5, 7, 30, 40], [1, 9, 41]])
