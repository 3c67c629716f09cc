import math
import re

import pytest
import torch
from random_llama import random_llama, random_tokens, small_config
from torch.testing import assert_close

from minillama.model import Llama


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_parameters_have_metas_names_and_shapes():
    config = small_config(n_heads=6, n_kv_heads=2, n_layers=1)
    shapes = {name: tuple(weight.shape) for name, weight in Llama(config).state_dict().items()}
    assert shapes == {
        "tok_embeddings.weight": (128, 48),
        "layers.0.attention_norm.weight": (48,),
        "layers.0.attention.wq.weight": (48, 48),
        "layers.0.attention.wk.weight": (16, 48),
        "layers.0.attention.wv.weight": (16, 48),
        "layers.0.attention.wo.weight": (48, 48),
        "layers.0.ffn_norm.weight": (48,),
        "layers.0.feed_forward.w1.weight": (96, 48),
        "layers.0.feed_forward.w2.weight": (48, 96),
        "layers.0.feed_forward.w3.weight": (96, 48),
        "norm.weight": (48,),
        "output.weight": (128, 48),
    }


def test_the_logits_are_the_head_on_the_body():
    model = random_llama(small_config())
    tokens = random_tokens(model.config, batch=2, seq=7)
    assert model(tokens).shape == (2, 7, 128)
    assert model.hidden(tokens).shape == (2, 7, 64)
    assert_close(model(tokens), model.output(model.hidden(tokens)))


def test_rows_do_not_see_each_other():
    model = random_llama(small_config())
    tokens = random_tokens(model.config, batch=3, seq=9)
    assert_close(model(tokens)[1:2], model(tokens[1:2]), rtol=1e-5, atol=1e-5)


def test_logits_are_float32_whatever_the_weights_are():
    model = random_llama(small_config()).bfloat16()
    tokens = random_tokens(model.config, batch=1, seq=4)
    assert model.hidden(tokens).dtype == torch.bfloat16
    assert model(tokens).dtype == torch.float32


def test_tied_embeddings_are_one_matrix():
    tied = Llama(small_config(tie_embeddings=True))
    assert tied.output.weight is tied.tok_embeddings.weight
    separate = Llama(small_config())
    assert separate.output.weight is not separate.tok_embeddings.weight
    assert count(separate) - count(tied) == 128 * 64
    assert count(tied) == tied.config.n_parameters
    assert count(separate) == separate.config.n_parameters


def count(model: Llama) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_initial_weights_are_normal_and_residual_writers_are_smaller():
    n_layers = 8
    model = Llama(
        small_config(n_heads=16, n_layers=n_layers, hidden_dim=256, vocab_size=512), seeded(0)
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert_close(parameter.data, torch.ones_like(parameter))
            continue
        writes_to_the_stream = name.endswith(("wo.weight", "w2.weight"))
        std = 0.02 / math.sqrt(2 * n_layers) if writes_to_the_stream else 0.02
        # n samples give the std to std / sqrt(2n) and the mean to std / sqrt(n): five times that.
        n = parameter.numel()
        assert parameter.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * n)), name
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(n), name


def test_an_untrained_model_is_undecided():  # every token about equally likely: ln(vocab) nats
    model = Llama(small_config(), seeded(0))
    tokens = random_tokens(model.config, batch=4, seq=64)
    logits, targets = model(tokens)[:, :-1], tokens[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(math.log(128), abs=0.05)


def test_the_generator_decides_the_weights():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))  # of no influence
        states.append(Llama(small_config(), seeded(seed)).state_dict())
    one, again, other = states
    for name, weight in one.items():
        assert torch.equal(weight, again[name])
        assert weight.dim() == 1 or not torch.equal(weight, other[name])


def test_the_whole_context_fits_and_no_token_more():
    model = random_llama(small_config(max_seq_len=16))
    assert model(random_tokens(model.config, batch=1, seq=16)).shape == (1, 16, 128)
    with pytest.raises(ValueError, match=r"0 tokens read and 17 more are 17, .* room for 16"):
        model(random_tokens(model.config, batch=1, seq=17))


@pytest.mark.parametrize("wrong", [-1, 128, 10**6])
def test_a_token_outside_the_vocabulary_is_named(wrong):
    model = random_llama(small_config())
    expected = re.escape(f"between {min(3, wrong)} and {max(3, wrong)}") + ".*ids 0 to 127"
    with pytest.raises(ValueError, match=expected):
        model(torch.tensor([[3, wrong]]))
