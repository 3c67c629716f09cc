from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_llama import random_llama, random_tokens, small_config
from torch.testing import assert_close

from minillama.model import KVCache, LayerCache

CONFIG = small_config(max_seq_len=64)
MODEL = random_llama(CONFIG).requires_grad_(False)
T, F = True, False


def cache_of(lengths: list[int], max_len: int = 8) -> KVCache:
    cache = KVCache(CONFIG, batch=len(lengths), max_len=max_len)
    cache.lengths = list(lengths)
    return cache


def test_positions_go_on_where_each_row_ends():
    assert cache_of([1, 3]).positions(2).tolist() == [[1, 2], [3, 4]]


def test_visible_by_hand():  # keys 0 to 4; the short row's keys 3 and 4 are not its own
    short, long = cache_of([1, 3]).visible(2)[:, 0].tolist()
    assert short == [[T, T, F, F, F], [T, T, T, F, F]]
    assert long == [[T, T, T, T, F], [T, T, T, T, T]]


def test_one_token_in_rows_of_different_lengths_needs_a_mask():
    assert cache_of([1, 3]).visible(1)[:, 0].tolist() == [[[T, T, F, F]], [[T, T, T, T]]]


def test_no_mask_where_plain_causal_attention_says_the_same():
    assert cache_of([0, 0]).visible(5) is None
    assert cache_of([3, 3]).visible(1) is None
    assert cache_of([3, 3]).visible(2) is not None


def test_append_stores_behind_each_row_and_returns_all():
    cache = cache_of([1, 3])
    layer = cache.layer(1)
    assert isinstance(layer, LayerCache)
    k = torch.arange(1.0, 5.0).view(2, 1, 2, 1).expand(2, 2, 2, 8)  # row 0: 1 2, row 1: 3 4
    keys, values = layer.append(k, 10 * k)
    assert keys.shape == (2, 2, 5, 8)
    assert keys[:, 0, :, 0].tolist() == [[0, 1, 2, 0, 0], [0, 0, 0, 3, 4]]
    assert_close(values, 10 * keys)
    assert cache.lengths == [1, 3]  # the model counts, once, after its last layer
    assert not cache.keys[0].any()  # the other layer's share


def test_it_takes_the_memory_that_the_config_says():
    cache = KVCache(CONFIG, batch=3, max_len=10, dtype=torch.bfloat16)
    assert cache.keys.numel() + cache.values.numel() == 30 * CONFIG.cache_elements_per_token
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16


def pieces_of(seq: int) -> st.SearchStrategy[list[int]]:
    """Any way to cut a sequence of `seq` tokens into pieces, as their lengths."""
    cuts = st.sets(st.integers(1, seq - 1))
    return cuts.map(lambda cuts: [b - a for a, b in pairwise([0, *sorted(cuts), seq])])


@given(steps=pieces_of(24))
@settings(deadline=None, max_examples=40)
def test_any_split_gives_the_logits_of_the_whole(steps):
    tokens = random_tokens(CONFIG, batch=2, seq=24)
    cache = KVCache(CONFIG, batch=2, max_len=24)
    parts = [MODEL(part, cache) for part in tokens.split(steps, dim=1)]
    assert cache.lengths == [24, 24]
    assert_close(torch.cat(parts, dim=1), MODEL(tokens), rtol=1e-5, atol=1e-5)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    steps=st.lists(st.integers(1, 4), max_size=4),
    padding=st.integers(0, CONFIG.vocab_size - 1),
)
@settings(deadline=None, max_examples=40)
def test_padded_rows_give_what_each_gives_alone(lengths, steps, padding):
    longest, more = max(lengths), sum(steps)
    tokens = random_tokens(CONFIG, batch=len(lengths), seq=longest + more)
    prompts = tokens[:, :longest].clone()
    for row, length in enumerate(lengths):
        prompts[row, length:] = padding
    continuation = tokens[:, longest:]

    cache = KVCache(CONFIG, batch=len(lengths), max_len=longest + more)
    first = MODEL(prompts, cache)
    cache.lengths = list(lengths)
    parts = [MODEL(part, cache) for part in continuation.split(steps, dim=1)] if steps else []

    for row, length in enumerate(lengths):
        alone = MODEL(torch.cat([tokens[row, :length], continuation[row]])[None])[0]
        together = torch.cat([first[row, :length], *(part[row] for part in parts)])
        assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_part_shares_the_memory_but_not_the_lengths():
    tokens = random_tokens(CONFIG, batch=1, seq=7)
    cache = cache_of([3, 0, 5])
    part = cache.part(1, 2)
    MODEL(tokens, part)
    assert (part.lengths, cache.lengths) == ([7], [3, 0, 5])
    assert cache.keys[:, 1, :, :7].all()
    assert not cache.keys[:, [0, 2]].any()


@pytest.mark.parametrize("lengths", [[6, 6, 3], [3, 6, 6], [6, 6, 0]])
def test_rows_that_have_changed_places_go_on_where_they_were(lengths):
    tokens = random_tokens(CONFIG, batch=3, seq=7)
    cache = KVCache(CONFIG, batch=3, max_len=8)
    MODEL(tokens[:, :6], cache)
    cache.lengths = [*lengths]
    cache.swap(2, 0)
    assert cache.lengths == lengths[::-1]
    next_ones = torch.stack([tokens[row, lengths[row]] for row in (2, 1, 0)])
    logits = MODEL(next_ones[:, None], cache)[:, 0]
    for place, row in enumerate((2, 1, 0)):
        alone = MODEL(tokens[[row], : lengths[row] + 1])[0, -1]
        assert_close(logits[place], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [0, 2, 5])
def test_a_copied_beginning_goes_on_in_both_rows(length):
    tokens = random_tokens(CONFIG, batch=2, seq=6)
    cache = KVCache(CONFIG, batch=2, max_len=8)
    MODEL(tokens[:, :5], cache)
    cache.copy(0, 1, length)
    assert cache.lengths == [5, length]
    logits = MODEL(tokens[:, 5:], cache)[:, 0]
    assert_close(logits[0], MODEL(tokens[:1])[0, -1], rtol=1e-5, atol=1e-5)
    both = torch.cat([tokens[:1, :length], tokens[1:, 5:]], dim=1)
    assert_close(logits[1], MODEL(both)[0, -1], rtol=1e-5, atol=1e-5)


def test_a_cleared_row_forgets_even_nan():
    tokens = random_tokens(CONFIG, batch=2, seq=4)
    cache = KVCache(CONFIG, batch=2, max_len=8)
    cache.keys[:, 0], cache.values[:, 0] = torch.nan, torch.nan
    cache.clear(0)
    assert_close(MODEL(tokens, cache), MODEL(tokens), rtol=1e-5, atol=1e-5)
    cache.clear(1)
    assert cache.lengths == [4, 0]
    assert not cache.keys[:, 1].any()
    assert cache.keys[:, 0].any()


def test_a_full_cache_says_so_and_keeps_what_it_has():
    tokens = random_tokens(CONFIG, batch=1, seq=9)
    cache = KVCache(CONFIG, batch=1, max_len=8)
    MODEL(tokens[:, :8], cache)
    keys = cache.keys.clone()
    with pytest.raises(ValueError, match="8 tokens read and 1 more are 9, but there is room for 8"):
        MODEL(tokens[:, 8:], cache)
    assert cache.lengths == [8]
    assert_close(cache.keys, keys, rtol=0, atol=0)


def test_the_longest_row_must_fit():
    cache = cache_of([2, 7])
    with pytest.raises(ValueError, match="7 tokens read and 2 more are 9"):
        MODEL(random_tokens(CONFIG, batch=2, seq=2), cache)


def test_a_wrong_token_leaves_the_cache_as_it_was():
    cache = KVCache(CONFIG, batch=1, max_len=8)
    with pytest.raises(ValueError, match="vocabulary"):
        MODEL(torch.tensor([[CONFIG.vocab_size]]), cache)
    assert cache.lengths == [0]
    assert not cache.keys.any()
