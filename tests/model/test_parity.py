"""The model against two independent statements of it: transformers, and Meta's equations.

Logits are of order 1 and 1e-5 is what float32 leaves of them after a few hundred additions. The
comparison covers the whole context: a rotation that is slightly off shows at position 500.
"""

import meta_equations
import numpy as np
import pytest
import torch
from random_llama import random_llama, random_tokens, small_config
from torch.testing import assert_close
from transformers_llama import transformers_copy

from minillama.model import KVCache, Llama, RMSNorm

CONFIGS = {
    "multi-head": small_config(n_heads=8, n_kv_heads=8),
    "grouped-8-2": small_config(n_heads=8, n_kv_heads=2),
    "grouped-6-2": small_config(n_heads=6, n_kv_heads=2),
    "multi-query": small_config(n_heads=4, n_kv_heads=1),
    "code-llama": small_config(n_heads=8, n_kv_heads=2, rope_theta=1e6),
}
over_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def metas_logits(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    state = model.state_dict()
    rows = [meta_equations.logits(state, model.config, row.numpy()) for row in tokens]
    return torch.from_numpy(np.stack(rows)).float()


def transformers_logits(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    return transformers_copy(model)(tokens).logits


@over_configs
@torch.no_grad()
def test_logits_equal_metas_equations(config):
    model, tokens = random_llama(config), random_tokens(config, batch=2, seq=512)
    assert_close(model(tokens), metas_logits(model, tokens), rtol=1e-5, atol=1e-5)


@over_configs
@torch.no_grad()
def test_logits_through_the_cache_equal_metas_equations(config):
    model, tokens = random_llama(config), random_tokens(config, batch=2, seq=512)
    cache = KVCache(config, batch=2, max_len=512)
    parts = [model(part, cache) for part in tokens.split([200, 1, 300, 1, 10], dim=1)]
    assert_close(torch.cat(parts, dim=1), metas_logits(model, tokens), rtol=1e-5, atol=1e-5)


@over_configs
@torch.no_grad()
def test_logits_equal_transformers(config):
    model, tokens = random_llama(config), random_tokens(config, batch=2, seq=512)
    assert_close(model(tokens), transformers_logits(model, tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_equal_transformers_with_tied_embeddings():
    config = small_config(tie_embeddings=True)
    model, tokens = random_llama(config), random_tokens(config, batch=1, seq=32)
    # One matrix serves both ends, so the logits are of order sqrt(dim) = 8.
    assert_close(model(tokens), transformers_logits(model, tokens), rtol=1e-5, atol=8e-5)


@torch.no_grad()
def test_the_random_weights_leave_nothing_undecided():
    # Logits near 0 or attention that looks everywhere alike would agree whatever the model does.
    config = CONFIGS["grouped-8-2"]
    model, tokens = random_llama(config), random_tokens(config, batch=1, seq=512)
    assert 0.5 < model(tokens).std() < 2
    layer = model.layers[0]
    x = layer.attention_norm(model.tok_embeddings(tokens[0]))
    q = layer.attention.wq(x).view(512, 8, 8).double().numpy()
    k = layer.attention.wk(x).view(512, 2, 8).double().numpy().repeat(4, axis=1)
    weights = meta_equations.attention_weights(q, k)  # (heads, q_len, k_len)
    times_uniform = weights.max(-1) * np.arange(1, 513)  # query i sees i + 1 keys
    assert (times_uniform[:, 100:].mean(-1) > 5).all()


@torch.no_grad()
def test_rms_norm_in_bfloat16_equals_transformers_to_the_bit():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = RMSNorm(64, eps=1e-5).bfloat16(), LlamaRMSNorm(64, eps=1e-5).bfloat16()
    ours.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    theirs.weight.copy_(ours.weight)
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert_close(ours(x), theirs(x), rtol=0, atol=0)
    weight_first = torch.nn.functional.rms_norm(x.float(), (64,), ours.weight.float(), eps=1e-5)
    assert not torch.equal(ours(x), weight_first.bfloat16())  # the order shows on these numbers
