import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from minillama.config import Sampling
from minillama.generation import keep_top_k, keep_top_p, sample

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30).map(torch.tensor)
WORKED = torch.tensor([0.5, 0.3, 0.15, 0.05])  # probabilities


def draw(logits: torch.Tensor, seed: int = 0, **settings) -> int:
    return sample(logits, Sampling(**settings), torch.Generator().manual_seed(seed))


def draws(logits: torch.Tensor, n: int, **settings) -> Counter:
    generator, sampling = torch.Generator().manual_seed(0), Sampling(**settings)
    return Counter(sample(logits, sampling, generator) for _ in range(n))


# --- Top-p ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.0, [1.0, 0, 0, 0]),
        (0.75, [0.625, 0.375, 0, 0]),
        (0.9, [0.52632, 0.31579, 0.15789, 0]),
        (1.0, [0.5, 0.3, 0.15, 0.05]),
    ],
)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_top_p_worked_example(top_p, expected, order):
    kept = keep_top_p(WORKED.log()[order], top_p).softmax(-1)
    assert_close(kept, torch.tensor(expected)[order], rtol=0, atol=1e-5)


def test_a_token_whose_predecessors_have_exactly_top_p_stays():
    logits = torch.zeros(4)  # four times 1/4, exact in binary
    assert keep_top_p(logits, 0.5).isfinite().sum() == 3
    assert keep_top_p(logits, 0.49).isfinite().sum() == 2


@given(logits=LOGITS, top_p=st.floats(0, 1))
def test_top_p_keeps_the_fewest_that_are_enough(logits, top_p):
    kept = keep_top_p(logits, top_p).isfinite()
    p = logits.double().softmax(-1)
    assert kept.any()
    assert p[kept].sum() >= top_p - 1e-5
    if (~kept).any():
        assert logits[kept].min() >= logits[~kept].max()
    without_the_last = p[kept].sum() - p[kept].min()
    assert without_the_last <= top_p + 1e-5


@given(logits=LOGITS)
def test_top_p_of_zero_is_greedy(logits):
    kept = keep_top_p(logits, 0.0).isfinite().nonzero()
    assert kept.flatten().tolist() == [logits.argmax().item()]


def test_top_p_of_one_keeps_all_of_a_large_vocabulary():
    logits = torch.randn(32_000, generator=torch.Generator().manual_seed(0)) * 3
    assert keep_top_p(logits, 1.0).isfinite().all()


def test_rows_are_cut_one_by_one():
    logits = torch.stack([WORKED.log(), torch.tensor([-9.0, 9.0, -9.0, -9.0])])
    kept = keep_top_p(logits, 0.75).isfinite()
    assert kept.tolist() == [[True, True, False, False], [False, True, False, False]]
    kept = keep_top_k(logits, 2).isfinite()
    assert kept.sum(-1).tolist() == [2, 2]


# --- Top-k ---------------------------------------------------------------------------------------


@given(logits=LOGITS, top_k=st.integers(1, 40))
def test_top_k_keeps_k_of_the_likeliest_as_they_are(logits, top_k):
    kept = keep_top_k(logits, top_k)
    stays = kept.isfinite()
    assert stays.sum() == min(top_k, len(logits))  # exactly, even if several are equal
    assert torch.equal(kept[stays], logits[stays])
    if not stays.all():
        assert logits[stays].min() >= logits[~stays].max()


def test_top_k_of_one_is_greedy():
    logits = WORKED.log()[[2, 0, 1, 3]]
    assert draws(logits, 50, temperature=1.0, top_k=1) == {1: 50}


# --- Drawing -------------------------------------------------------------------------------------


def test_temperature_zero_is_argmax():
    logits = torch.tensor([0.0, 3.0, 2.999, 1.0])
    assert draws(logits, 20, temperature=0.0) == {1: 20}


def test_temperature_one_draws_the_models_own_distribution():
    n = 4000
    counts = draws(WORKED.log(), n, temperature=1.0)
    for token, p in enumerate(WORKED.tolist()):
        assert abs(counts[token] - n * p) < 4 * math.sqrt(n * p * (1 - p))  # 4 sigma


@pytest.mark.parametrize(("temperature", "power"), [(0.5, 2.0), (2.0, 0.5)])
def test_temperature_raises_the_probabilities_to_a_power(temperature, power):
    n, expected = 4000, WORKED**power / (WORKED**power).sum()
    counts = draws(WORKED.log(), n, temperature=temperature)
    for token, p in enumerate(expected.tolist()):
        assert abs(counts[token] - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_temperature_comes_before_the_cuts():
    """At temperature 2 the first two have 0.376 + 0.291 = 0.667 of all: 0.7 takes a third."""
    assert set(draws(WORKED.log(), 500, temperature=1.0, top_p=0.7)) == {0, 1}
    assert set(draws(WORKED.log(), 500, temperature=2.0, top_p=0.7)) == {0, 1, 2}


def test_top_p_measures_what_top_k_has_left():
    """Of the first two 0.5 is 0.625, more than 0.6: with top_k = 2, one is enough."""
    assert set(draws(WORKED.log(), 500, temperature=1.0, top_p=0.6)) == {0, 1}
    assert set(draws(WORKED.log(), 500, temperature=1.0, top_p=0.6, top_k=2)) == {0}


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-40, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.tensor([-100.0, 99.0, 100.0, 0.0])
    assert draws(logits, 20, temperature=temperature, top_p=0.9, top_k=3) == {2: 20}


@pytest.mark.parametrize("temperature", [1e6, 1e40, 1e308])
def test_a_huge_temperature_is_a_die(temperature):
    counts = draws(torch.tensor([-10.0, 0.0, 10.0]), 3000, temperature=temperature)
    assert all(900 < counts[token] < 1100 for token in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_precision_can_be_drawn_from(dtype):
    assert draw(torch.tensor([0.0, 50.0]).to(dtype), temperature=0.7, top_p=0.9) == 1


def test_the_seed_decides():
    logits = torch.zeros(1000)
    assert draw(logits, seed=1, temperature=1.0) == draw(logits, seed=1, temperature=1.0)
    assert draw(logits, seed=1, temperature=1.0) != draw(logits, seed=2, temperature=1.0)


# --- Settings that mean nothing ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1, but must be at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0, but must be at least 1: .* Leave it out to keep all"),
        ({"top_k": -5}, "top_k is -5"),
        ({"top_p": -0.1}, r"top_p is -0\.1, but must be within \[0, 1\]"),
        ({"top_p": 1.1}, r"top_p is 1\.1, .* a probability, not a percentage"),
        ({"top_p": 90}, "top_p is 90"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
