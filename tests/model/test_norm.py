import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from minillama.model import RMSNorm


def test_by_hand():  # mean(1, 4, 9, 16) = 7.5
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert_close(RMSNorm(4, eps=1e-5)(x), torch.tensor([0.365148, 0.730296, 1.095444, 1.460593]))


def test_eps_stands_under_the_root():  # mean(3^2, 4^2) + 12.5 = 25
    x = torch.tensor([3.0, 4.0])
    assert_close(RMSNorm(2, eps=12.5)(x), x / 5)


def test_eps_keeps_zero_finite():
    assert_close(RMSNorm(2, eps=1e-5)(torch.zeros(2)), torch.zeros(2))


def test_equals_torch():
    x, norm = torch.randn(2, 5, 16), RMSNorm(16, eps=1e-3)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    assert_close(norm(x), torch.nn.functional.rms_norm(x, (16,), norm.weight, eps=1e-3))


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_the_scale_of_the_input_does_not_matter(scale, seed):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    norm = RMSNorm(8, eps=0.0)
    assert_close(norm(scale * x), norm(x))


def test_every_row_is_normalised_for_itself():
    x, norm = torch.randn(4, 8), RMSNorm(8, eps=1e-5)
    assert_close(norm(x)[2], norm(x[2]))


def test_the_weight_starts_at_one_and_scales_each_channel():
    norm = RMSNorm(2, eps=12.5)
    assert_close(norm.weight.data, torch.ones(2))
    norm.weight.data = torch.tensor([10.0, 100.0])
    assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([6.0, 80.0]))


def test_bfloat16_is_rounded_before_the_weight():
    # 3 / 5 = 0.6 -> bfloat16 0.6015625; times 3 = 1.8046875, which bfloat16 can hold.
    # The other order gives 3 * 0.6 = 1.8 -> bfloat16 1.796875.
    norm = RMSNorm(2, eps=12.5).bfloat16()
    torch.nn.init.constant_(norm.weight, 3.0)
    y = norm(torch.tensor([3.0, 4.0]).bfloat16())
    assert y.dtype == torch.bfloat16
    assert y[0].item() == 1.8046875


def test_half_precision_is_squared_in_float32():
    x = torch.randn(64, 256).bfloat16()
    in_float32 = RMSNorm(256, eps=1e-5)(x.float())
    assert_close(RMSNorm(256, eps=1e-5).bfloat16()(x), in_float32.bfloat16(), rtol=0, atol=0)
    # 1000^2 is more than float16 can hold (65504)
    huge = torch.full((4,), 1000.0, dtype=torch.float16)
    assert_close(RMSNorm(4, eps=1e-5).half()(huge), torch.ones(4, dtype=torch.float16))
