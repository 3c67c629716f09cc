import meta_equations
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_llama import random_llama, random_tokens, small_config
from torch.testing import assert_close

from minillama.model import apply_rope, rope_angles

POSITIONS = st.integers(0, 4095)


def vectors(count: int, head_dim: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, head_dim, generator=torch.Generator().manual_seed(seed))


def turn(x, position, theta=10_000.0):  # (head_dim,) at one position
    angles = rope_angles(torch.tensor([position]), len(x), theta)
    return apply_rope(x[None], angles)[0]


def test_by_hand():  # pair 0 turns by 1 radian, pair 1 by 10000^(-1/2) = 0.01
    turned = turn(torch.tensor([1.0, 0.0, 1.0, 0.0]), position=1)
    assert_close(turned, torch.tensor([0.540302, 0.841471, 0.999950, 0.00999983]))


def test_a_quarter_turn_takes_the_first_channel_to_the_second():
    quarter = torch.tensor([[torch.pi / 2]])
    assert_close(apply_rope(torch.tensor([[1.0, 0.0]]), quarter), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize(
    ("theta", "second", "last"),
    [(1e4, 0.865964323, 1.15478198e-4), (1e6, 0.805842188, 1.24093776e-6)],
)
def test_the_angles_of_llama_and_code_llama(theta, second, last):
    first_position = rope_angles(torch.tensor([1]), head_dim=128, theta=theta)[0]
    assert first_position.shape == (64,)
    assert_close(first_position[[0, 1, 63]], torch.tensor([1.0, second, last]))


def test_position_zero_is_not_turned():
    x = vectors(1)[0]
    assert_close(turn(x, position=0), x, rtol=0, atol=0)


@given(position=POSITIONS, seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_lengths_stay(position, seed):
    x = vectors(1, seed=seed)[0]
    assert_close(turn(x, position).norm(), x.norm())


@given(m=POSITIONS, n=POSITIONS, shift=st.integers(0, 4096))
@settings(deadline=None)
def test_scores_depend_on_the_distance_only(m, n, shift):
    q, k = vectors(2)
    moved = turn(q, m + shift) @ turn(k, n + shift)
    # Angles up to 8192 radians in float32 are exact to 8192 * 2^-24 = 0.0005.
    assert_close(moved, turn(q, m) @ turn(k, n), rtol=0, atol=2e-3 * (q.norm() * k.norm()).item())


def test_scores_do_depend_on_the_distance():
    q, k = vectors(2)
    scores = torch.stack([turn(q, 20) @ turn(k, n) for n in range(20)])
    assert scores.std() > 0.5


@given(rows=st.lists(POSITIONS, min_size=1, max_size=4))
@settings(deadline=None)
def test_each_row_has_its_own_positions(rows):
    x = vectors(2 * len(rows)).view(len(rows), 2, 1, 16)  # (batch, heads, seq, head_dim)
    angles = rope_angles(torch.tensor(rows)[:, None], 16, 10_000.0)[:, None]
    for row, position in enumerate(rows):
        assert_close(apply_rope(x, angles)[row, 1, 0], turn(x[row, 1, 0], position))


def test_angles_are_float32_and_the_rotation_rounds_once():
    angles = rope_angles(torch.arange(600), 16, 10_000.0)
    assert angles.dtype == torch.float32
    x = vectors(600).bfloat16()
    turned = apply_rope(x, angles)
    assert turned.dtype == torch.bfloat16
    assert_close(turned, apply_rope(x.float(), angles).bfloat16(), rtol=0, atol=0)


def test_position_257_exists():  # bfloat16 counts ... 254, 255, 256, 258, 260
    positions = torch.arange(255, 600)
    first_pair = rope_angles(positions, 16, 10_000.0)[:, 0]  # turns by 1 radian a position
    assert_close(first_pair, positions.float(), rtol=0, atol=0)


def test_a_bfloat16_model_is_as_exact_at_the_end_as_at_the_beginning():
    model = random_llama(small_config()).bfloat16()
    tokens = random_tokens(model.config, batch=1, seq=512)
    exact = meta_equations.logits(model.state_dict(), model.config, tokens[0].numpy())
    with torch.no_grad():
        error = model(tokens)[0] - torch.from_numpy(exact)
    typical = error.pow(2).mean(-1).sqrt()  # at each position
    assert typical[:256].mean() < 0.02
    assert typical[257:].mean() < 1.5 * typical[:256].mean()
    assert not list(model.buffers())  # nothing that .bfloat16() could round
