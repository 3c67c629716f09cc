import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from minillama.config import Sampling
from minillama.generation import draw, keep_min_p, keep_top_k, keep_top_p, penalize, sample
from minillama.generation.sampling import distribution

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30).map(torch.tensor)
WORKED = torch.tensor([0.5, 0.3, 0.15, 0.05])  # probabilities


def drawn(logits: torch.Tensor, seed: int = 0, **settings) -> int:
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


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.99, 1.0])
def test_a_large_vocabulary_is_cut_as_if_it_were_sorted(scale, top_p):
    """Whether the likeliest 1,024 tokens are enough (large scale) or not."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5000, generator=generator) * scale
    for row, kept in zip(logits, keep_top_p(logits, top_p), strict=True):
        mass, stays = 0.0, set()
        for p, token in sorted(zip(row.softmax(-1).tolist(), range(5000), strict=True))[::-1]:
            if mass > top_p + 1e-5:
                break
            stays.add(token)
            mass += p
        assert len(stays ^ set(kept.isfinite().nonzero()[:, 0].tolist())) <= 1  # rounding
        assert torch.equal(kept[kept.isfinite()], row[kept.isfinite()])


# --- Min-p ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("min_p", "stays"),
    [(0.0, [0, 1, 2, 3]), (0.09, [0, 1, 2, 3]), (0.11, [0, 1, 2]), (0.5, [0, 1]), (1.0, [0])],
)
def test_min_p_worked_example(min_p, stays):  # a share of 0.5: 0.1 of it is 0.05
    assert keep_min_p(WORKED.log(), min_p).isfinite().nonzero()[:, 0].tolist() == stays


def test_min_p_keeps_many_where_the_model_is_unsure():
    sure, unsure = torch.tensor([9.0, 0, 0, 0]), torch.zeros(4)
    assert keep_min_p(torch.stack([sure, unsure]), 0.1).isfinite().sum(-1).tolist() == [1, 4]


def test_min_p_is_measured_after_the_temperature():
    assert set(draws(WORKED.log(), 300, temperature=1.0, min_p=0.65)) == {0}
    assert set(draws(WORKED.log(), 300, temperature=2.0, min_p=0.65)) == {0, 1}  # sqrt(0.6)


# --- The repetition penalty ----------------------------------------------------------------------


def test_the_penalty_by_hand():
    logits = torch.tensor([4.0, -4.0, 2.0, 0.0])
    assert penalize(logits, [0, 1, 3, 0], 2.0).tolist() == [2.0, -8.0, 2.0, 0.0]
    assert penalize(logits, [0, 1], 0.5).tolist() == [8.0, -2.0, 2.0, 0.0]
    assert logits.tolist() == [4.0, -4.0, 2.0, 0.0]


@given(logits=LOGITS, penalty=st.floats(1, 5), data=st.data())
def test_the_penalty_makes_what_was_seen_no_likelier(logits, penalty, data):
    seen = data.draw(st.sets(st.integers(0, len(logits) - 1)))
    changed = penalize(logits, seen, penalty)
    for token, (old, new) in enumerate(zip(logits.tolist(), changed.tolist(), strict=True)):
        assert new <= old if token in seen else new == old


def test_a_penalty_of_one_and_an_empty_text_change_nothing():
    logits = torch.randn(10)
    assert penalize(logits, [1, 2], 1.0) is logits
    assert penalize(logits, [], 2.0) is logits


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_the_penalty_counts_for_greedy_decoding_too(temperature):
    settings = Sampling(temperature=temperature, repetition_penalty=1.5)
    logits = torch.tensor([3.0, 2.5, 1.0])
    generator = torch.Generator()
    assert [sample(logits, settings, generator, seen) for seen in ([], [0], [0, 1])] == [0, 1, 0]


# --- Parity --------------------------------------------------------------------------------------


@given(
    logits=st.lists(st.floats(-8, 8, width=16), min_size=4, max_size=30, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 3, 10]),
    top_p=st.sampled_from([None, 0.21, 0.77, 0.93]),
    min_p=st.sampled_from([None, 0.013, 0.27]),
    penalty=st.sampled_from([1.0, 1.3, 0.7]),
)
@settings(deadline=None, max_examples=60)
def test_the_distribution_is_that_of_transformers(
    logits, temperature, top_k, top_p, min_p, penalty
):
    from transformers.generation import logits_process as theirs

    seen, row = [0, 2, 2], torch.tensor([logits])
    steps = [
        theirs.RepetitionPenaltyLogitsProcessor(penalty),
        theirs.TemperatureLogitsWarper(temperature),
        *([theirs.TopKLogitsWarper(top_k)] if top_k else []),
        *([theirs.TopPLogitsWarper(top_p)] if top_p else []),
        *([theirs.MinPLogitsWarper(min_p)] if min_p else []),
    ]
    scores = row
    for step in steps:
        scores = step(torch.tensor([seen]), scores)
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    assert_close(distribution(row[0], sampling, seen), scores.softmax(-1)[0])


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


@pytest.mark.parametrize(
    ("point", "token"), [(0.0, 3), (0.04, 3), (0.06, 2), (0.3, 1), (0.6, 0), (1 - 2**-53, 0)]
)
def test_a_draw_is_a_point_on_a_line(monkeypatch, point, token):
    """The line from its end to its beginning: 0.05, 0.15, 0.3, 0.5."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(point, dtype=torch.float64))
    assert draw(WORKED, torch.Generator()) == token
    assert draw(WORKED * 7, torch.Generator()) == token


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-53])
def test_what_has_no_probability_is_never_drawn(monkeypatch, point):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(point, dtype=torch.float64))
    assert draw(torch.tensor([0.0, 0.0, 0.3, 0.0]), torch.Generator()) == 2


def test_greedy_decoding_neither_sorts_nor_draws(monkeypatch):
    generator = torch.Generator()
    before = generator.get_state()
    for name in ("sort", "topk", "softmax", "argsort"):
        monkeypatch.setattr(torch.Tensor, name, None, raising=False)
    assert sample(WORKED, Sampling(top_p=0.9, top_k=3), generator) == 0
    assert torch.equal(generator.get_state(), before)


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
    assert drawn(torch.tensor([0.0, 50.0]).to(dtype), temperature=0.7, top_p=0.9) == 1


def test_the_seed_decides():
    logits = torch.zeros(1000)
    assert drawn(logits, seed=1, temperature=1.0) == drawn(logits, seed=1, temperature=1.0)
    assert drawn(logits, seed=1, temperature=1.0) != drawn(logits, seed=2, temperature=1.0)


# --- Settings that mean nothing ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1, but must be at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0, but must be at least 1: .* Leave it out to keep all"),
        ({"top_k": -5}, "top_k is -5"),
        ({"top_k": 2.5}, r"top_k is 2\.5, but must be a whole number"),
        ({"temperature": "0.5"}, r"temperature is '0\.5', but must be a number"),
        ({"min_p": "much"}, "min_p is 'much', but must be a number"),
        ({"top_p": -0.1}, r"top_p is -0\.1, but must be within \[0, 1\]"),
        ({"top_p": 1.1}, r"top_p is 1\.1, .* a probability, not a percentage"),
        ({"top_p": 90}, "top_p is 90"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": 1.5}, r"min_p is 1\.5, but must be within \[0, 1\]: it is a share"),
        ({"min_p": -0.1}, r"min_p is -0\.1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0, but must be above 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
