import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_config
from torch import nn
from torch.testing import assert_close

from minillama.config import TrainingConfig
from minillama.data.packing import IGNORE, Batch
from minillama.model import Llama
from minillama.training import make_optimizer, train_step

CONFIG = small_config(n_layers=1, vocab_size=20)


def new_model() -> Llama:
    return Llama(CONFIG, torch.Generator().manual_seed(0)).double()


def batch_of(tokens: list[list[int]], targets: list[list[int]]) -> Batch:
    return Batch(torch.tensor(tokens), torch.tensor(targets))


def random_batch(rows: int = 8, seq: int = 6, ignored: float = 0.0, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(20, (2, rows, seq), generator=generator)
    targets[torch.rand(rows, seq, generator=generator) < ignored] = IGNORE
    return Batch(tokens, targets)


class Gradient(nn.Module):
    """A model whose logits for token 0 and 1 are its two weights."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, tokens):
        return self.weights.expand(*tokens.shape, 2)


# --- The step ------------------------------------------------------------------------------------


def test_one_step_of_gradient_descent_by_hand():
    """p = (1/2, 1/2), targets 0 0 0 1: the mean gradient is (2 - 3, 2 - 1) / 4 = (-1/4, 1/4)."""
    model = Gradient([0.0, 0.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    stats = train_step(model, [batch_of([[0] * 4], [[0, 0, 0, 1]])], optimizer, 10.0, step=7)
    assert_close(model.weights.detach(), torch.tensor([0.5, -0.5]))
    assert (stats.step, stats.n_targets, stats.learning_rate) == (7, 4, 2.0)
    assert stats.loss == pytest.approx(math.log(2))
    assert stats.grad_norm == pytest.approx(0.5**0.5 / 2)
    assert model.weights.grad is None  # nothing is left over for the next step


@pytest.mark.parametrize(("max_norm", "factor"), [(0.1, 0.1 / (0.5**0.5 / 2)), (1.0, 1.0)])
def test_clipping_shortens_a_long_gradient_and_leaves_a_short_one(max_norm, factor):
    model = Gradient([0.0, 0.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = train_step(model, [batch_of([[0] * 4], [[0, 0, 0, 1]])], optimizer, max_norm)
    assert stats.grad_norm == pytest.approx(0.5**0.5 / 2)  # as it was before clipping
    assert_close(model.weights.detach(), factor * torch.tensor([0.25, -0.25]), rtol=1e-4, atol=0)


def update(batches: list[Batch]) -> tuple[list[torch.Tensor], float, float]:
    """The weights, the loss and the gradient's norm after one step on these micro-batches."""
    model = new_model()
    stats = train_step(model, batches, make_optimizer(model, TrainingConfig()), 0.5)
    return [p.detach() for p in model.parameters()], stats.loss, stats.grad_norm


@given(
    cuts=st.sets(st.integers(1, 7)),
    ignored=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_micro_batches_equal_the_big_batch(cuts, ignored, seed):
    big = random_batch(8, ignored=ignored, seed=seed)
    sizes = [end - start for start, end in pairwise([0, *sorted(cuts), 8])]
    parts = zip(big.tokens.split(sizes), big.targets.split(sizes), strict=True)
    weights, loss, norm = update([Batch(*part) for part in parts])
    expected, big_loss, big_norm = update([big])
    assert loss == pytest.approx(big_loss, rel=1e-6)
    assert norm == pytest.approx(big_norm, rel=1e-6)
    for one, other in zip(weights, expected, strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-12)


def test_ignored_targets_change_nothing():
    batch = random_batch(ignored=0.5)
    other = Batch(batch.tokens, batch.targets.clone())
    padded = Batch(  # two more rows, all of them ignored
        torch.cat([other.tokens, torch.full((2, 6), 3)]),
        torch.cat([other.targets, torch.full((2, 6), IGNORE)]),
    )
    assert padded.n_targets == batch.n_targets < batch.targets.numel()
    (weights, loss, _), (expected, expected_loss, _) = update([padded]), update([batch])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for one, two in zip(weights, expected, strict=True):
        assert_close(one, two, rtol=1e-6, atol=1e-12)


# --- What must not happen ------------------------------------------------------------------------


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [t for s in optimizer.state.values() for t in s.values()]
    return [t.detach().clone() for t in (*model.parameters(), *moments)]


def after_one_step() -> tuple[Llama, torch.optim.Optimizer]:
    model = new_model()
    optimizer = make_optimizer(model, TrainingConfig())
    train_step(model, [random_batch()], optimizer, 1.0)
    return model, optimizer


def test_a_step_without_targets_is_refused_and_changes_nothing():
    model, optimizer = after_one_step()
    before = state(model, optimizer)
    with pytest.raises(ValueError, match=r"Step 2 has no target: .* 2 micro-batches .* masks"):
        train_step(model, [random_batch(ignored=1.0)] * 2, optimizer, 1.0, step=2)
    assert_close(state(model, optimizer), before, rtol=0, atol=0)


class Breaks(nn.Module):
    """The loss, or the gradient alone, is not finite for micro-batches with token `bad`."""

    def __init__(self, model: nn.Module, bad: int, loss: float, gradient: float) -> None:
        super().__init__()
        self.model, self.bad, self.loss, self.gradient = model, bad, loss, gradient

    def forward(self, tokens):
        logits = self.model(tokens)
        if (tokens == self.bad).any():
            logits = logits * self.loss
            logits.register_hook(lambda gradient: gradient * self.gradient)
        return logits


@pytest.mark.parametrize(
    ("loss", "gradient"),
    [(math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)],
    ids=["NaN in the loss", "NaN in the gradient", "infinite gradient"],
)
@pytest.mark.parametrize("bad_first", [True, False])
def test_a_loss_that_is_not_finite_stops_training_before_the_update(loss, gradient, bad_first):
    model, optimizer = after_one_step()
    before = state(model, optimizer)
    bad = batch_of([[19, 1]], [[1, 2]])
    good = batch_of([[3, 4]], [[4, 5]])
    batches = [bad, good] if bad_first else [good, bad]
    with pytest.raises(ValueError, match=r"Step 5: .* diverged; .* Lower the learning rate"):
        train_step(Breaks(model, 19, loss, gradient), batches, optimizer, 1.0, step=5)
    assert_close(state(model, optimizer), before, rtol=0, atol=0)
    # A caller who goes on does not carry the bad gradient along.
    assert all(p.grad is None for p in model.parameters())
    assert math.isfinite(train_step(model, [good], optimizer, 1.0).loss)
