from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillama.config import TrainingConfig
from minillama.training import learning_rate

PAPER = TrainingConfig(steps=500_000, warmup_steps=2000, learning_rate=3e-4, min_lr_ratio=0.1)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (1, 1.5e-7),
        (1000, 1.5e-4),
        (2000, 3e-4),
        (126_500, 3e-5 + 2.7e-4 * (2 + 2**0.5) / 4),  # a quarter of the way: cos 45°
        (251_000, 1.65e-4),
        (500_000, 3e-5),
    ],
)
def test_the_papers_numbers(step, rate):
    assert learning_rate(step, PAPER) == pytest.approx(rate, rel=1e-12)


@st.composite
def configs(draw) -> TrainingConfig:
    steps = draw(st.integers(1, 10**7))
    return TrainingConfig(
        steps=steps,
        warmup_steps=draw(st.integers(0, steps - 1)),
        learning_rate=draw(st.floats(1e-6, 1)),
        min_lr_ratio=draw(st.floats(0, 1)),
    )


@given(config=configs())
def test_it_ends_at_exactly_its_share_of_the_peak(config):
    end = config.learning_rate * config.min_lr_ratio  # 10% in the papers
    assert learning_rate(config.steps, config) == end


@given(config=configs())
def test_the_warm_up_ends_at_exactly_the_peak(config):
    assert learning_rate(config.warmup_steps, config) == config.learning_rate


def test_it_rises_in_a_straight_line_and_then_only_falls():
    config = replace(PAPER, steps=200, warmup_steps=20)
    rates = [learning_rate(step, config) for step in range(1, 201)]
    assert rates[:20] == pytest.approx([step / 20 * 3e-4 for step in range(1, 21)])
    assert all(later < earlier for earlier, later in pairwise(rates[19:]))


def test_without_a_warm_up_the_first_step_is_already_on_the_cosine():
    config = replace(PAPER, steps=2, warmup_steps=0)
    assert learning_rate(1, config) == pytest.approx(1.65e-4)
