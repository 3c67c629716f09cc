import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.checkpoint.huggingface import (
    halves_from_pairs,
    huggingface_name,
    pairs_from_halves,
    to_huggingface,
)
from minillama.config import LlamaConfig
from minillama.model import Llama


def numbered_rows(n_rows: int) -> torch.Tensor:
    return torch.arange(float(n_rows))[:, None].expand(n_rows, 3)


def test_by_hand():  # two heads of six channels; the pairs were (0, 1), (2, 3), (4, 5)
    reordered = halves_from_pairs(numbered_rows(12), n_heads=2)
    assert reordered[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_a_llama_head_goes_to_evens_then_odds():
    rows = halves_from_pairs(numbered_rows(128), n_heads=1)[:, 0].tolist()
    assert rows == [*range(0, 128, 2), *range(1, 128, 2)]


def test_the_wrong_number_of_heads_fits_and_is_wrong():
    weight = numbered_rows(16)
    assert not torch.equal(halves_from_pairs(weight, 2), halves_from_pairs(weight, 4))


@given(n_heads=st.integers(1, 6), half=st.integers(1, 8))
@settings(deadline=None)
def test_there_and_back_is_the_identity(n_heads, half):
    weight = numbered_rows(n_heads * half * 2)
    assert torch.equal(pairs_from_halves(halves_from_pairs(weight, n_heads), n_heads), weight)
    assert torch.equal(halves_from_pairs(pairs_from_halves(weight, n_heads), n_heads), weight)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("tok_embeddings", "model.embed_tokens"),
        ("layers.3.attention_norm", "model.layers.3.input_layernorm"),
        ("layers.3.attention.wq", "model.layers.3.self_attn.q_proj"),
        ("layers.3.attention.wk", "model.layers.3.self_attn.k_proj"),
        ("layers.3.attention.wv", "model.layers.3.self_attn.v_proj"),
        ("layers.3.attention.wo", "model.layers.3.self_attn.o_proj"),
        ("layers.3.ffn_norm", "model.layers.3.post_attention_layernorm"),
        ("layers.31.feed_forward.w1", "model.layers.31.mlp.gate_proj"),
        ("layers.31.feed_forward.w2", "model.layers.31.mlp.down_proj"),
        ("layers.31.feed_forward.w3", "model.layers.31.mlp.up_proj"),
        ("norm", "model.norm"),
        ("output", "lm_head"),
    ],
)
def test_names(ours, theirs):
    assert huggingface_name(f"{ours}.weight") == f"{theirs}.weight"


def test_only_wq_and_wk_are_reordered_each_by_its_own_heads():
    config = LlamaConfig(
        dim=64, n_layers=1, n_heads=8, n_kv_heads=2, hidden_dim=32, vocab_size=16, max_seq_len=8
    )
    ours = Llama(config).state_dict()
    theirs = to_huggingface(ours, config)
    assert len(theirs) == len(ours)
    for name, weight in ours.items():
        if name.endswith("wq.weight"):
            weight = halves_from_pairs(weight, 8)
        elif name.endswith("wk.weight"):
            weight = halves_from_pairs(weight, 2)
        assert torch.equal(theirs[huggingface_name(name)], weight), name
