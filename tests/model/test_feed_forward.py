import torch
from torch.testing import assert_close

from minillama.config import LlamaConfig
from minillama.model import FeedForward


def gated_unit() -> FeedForward:
    """One hidden unit: its gate is x[0], its value x[1]; it writes to both channels."""
    config = LlamaConfig(
        dim=2, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=1, vocab_size=1, max_seq_len=1
    )
    layer = FeedForward(config)
    layer.w1.weight.data = torch.tensor([[1.0, 0.0]])
    layer.w3.weight.data = torch.tensor([[0.0, 1.0]])
    layer.w2.weight.data = torch.tensor([[1.0], [10.0]])
    return layer


def test_by_hand():  # silu(1) = 0.731059, silu(-1) = -0.268941
    x = torch.tensor([[1.0, 3.0], [-1.0, 3.0]])
    expected = torch.tensor([[2.193177, 21.93177], [-0.806823, -8.06823]])
    assert_close(gated_unit()(x), expected)


def test_a_closed_gate_lets_nothing_through():
    assert_close(gated_unit()(torch.tensor([-100.0, 3.0])), torch.zeros(2))


def test_w3_is_the_linear_side_and_w1_is_not():
    layer, x = gated_unit(), torch.tensor([1.0, 3.0])
    y = layer(x)
    assert_close(layer(x * torch.tensor([1.0, 2.0])), 2 * y)
    assert not torch.allclose(layer(x * torch.tensor([2.0, 1.0])), 2 * y)
