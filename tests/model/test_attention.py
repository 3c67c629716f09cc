import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_llama import random_llama, random_tokens, small_config
from torch.testing import assert_close

from minillama.model import attend


def test_by_hand():
    # The second query scores 0 on the first key and 2 ln 3 / sqrt(4) = ln 3 on its own: weights
    # 1/4 and 3/4. The first query sees its own key alone.
    q = torch.tensor([[5.0, 0, 0, 0], [2 * math.log(3), 0, 0, 0]])[None, None]
    k = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]])[None, None]
    v = torch.tensor([[0.0, 4, 8, 0], [4, 0, 8, 0]])[None, None]
    assert_close(attend(q, k, v)[0, 0], torch.tensor([[0.0, 4, 8, 0], [3, 1, 8, 0]]))


def test_neighbouring_queries_share_a_key_value_head():
    q, k = torch.randn(1, 6, 3, 4), torch.randn(1, 2, 3, 4)
    v = torch.tensor([10.0, 20.0])[None, :, None, None].expand(1, 2, 3, 4)
    assert_close(attend(q, k, v)[0, :, 0, 0], torch.tensor([10.0, 10, 10, 20, 20, 20]))


def test_one_query_sees_all_that_is_stored():
    q, k, v = torch.zeros(1, 1, 1, 2), torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 2)
    assert_close(attend(q, k, v)[0, 0, 0], v[0, 0].mean(0))  # equal scores: the plain mean


def test_visible_says_who_sees_what():
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    assert_close(attend(q, k, v, causal), attend(q, k, v))
    only_itself = torch.eye(5, dtype=torch.bool)[None, None]
    assert_close(attend(q, k, v, only_itself), v)


@given(seq=st.integers(2, 24), data=st.data())
@settings(deadline=None, max_examples=30)
def test_the_future_never_changes_the_past(seq, data):
    model = random_llama(small_config())
    first_changed = data.draw(st.integers(1, seq - 1))
    tokens = random_tokens(model.config, batch=2, seq=seq)
    other = tokens.clone()
    other[:, first_changed:] = (other[:, first_changed:] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert_close(after[:, :first_changed], before[:, :first_changed])
    assert not torch.allclose(after[:, first_changed:], before[:, first_changed:])


@pytest.mark.parametrize("position", [0, 5, 11])
def test_the_gradient_reaches_all_of_the_past_and_none_of_the_future(position):
    model = random_llama(small_config())
    embedded = []
    model.tok_embeddings.register_forward_hook(lambda module, ids, x: embedded.append(x))
    logits = model(random_tokens(model.config, batch=1, seq=12))
    (gradient,) = torch.autograd.grad(logits[0, position].square().sum(), embedded)
    size = gradient[0].norm(dim=-1)  # (seq,)
    assert (size[: position + 1] > 0).all()
    assert (size[position + 1 :] == 0).all()


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_grouped_queries_with_tied_heads_are_multi_head_attention(n_kv_heads):
    grouped = random_llama(small_config(n_heads=8, n_kv_heads=n_kv_heads))
    state = grouped.state_dict()
    for name, weight in state.items():
        if name.endswith(("wk.weight", "wv.weight")):
            heads = weight.view(n_kv_heads, 8, 64)  # (kv_heads, head_dim, dim)
            state[name] = heads.repeat_interleave(8 // n_kv_heads, dim=0).flatten(0, 1)
    multi_head = random_llama(small_config(n_heads=8, n_kv_heads=8), seed=1)
    multi_head.load_state_dict(state)
    tokens = random_tokens(grouped.config, batch=2, seq=16)
    # Two orders of the same float32 sums.
    assert_close(grouped(tokens), multi_head(tokens), rtol=1e-5, atol=1e-5)


def test_a_slice_of_the_heads_is_attention_too():
    # Heads do not mix before wo: two halves of them, added up, are the whole layer.
    config = small_config(n_heads=8, n_kv_heads=2)
    model = random_llama(config)
    x, angles = torch.randn(1, 5, 64), torch.randn(1, 1, 5, 4)
    with torch.no_grad():
        whole = model.layers[0].attention(x, angles)
        parts = torch.zeros_like(whole)
        for half in (0, 1):
            part = random_llama(config).layers[0].attention
            for linear in (part.wq, part.wk, part.wv):
                linear.weight.data = linear.weight.chunk(2)[half]
            part.wo.weight.data = part.wo.weight.chunk(2, dim=1)[half]
            parts += part(x, angles)
    assert_close(parts, whole, rtol=1e-5, atol=1e-5)
