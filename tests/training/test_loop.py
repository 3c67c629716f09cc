from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, repeat

import numpy as np
import pytest
import torch
from small import small_config

from minillama.config import TrainingConfig
from minillama.data.packing import IGNORE, Batch, batches
from minillama.model import Llama
from minillama.training import StepStats, evaluate, learning_rate, make_optimizer, train

CONFIG = TrainingConfig(
    steps=6, batch_size=2, accumulation=3, warmup_steps=2, learning_rate=1e-2, seq_len=5
)
ROWS = np.random.default_rng(0).integers(0, 20, (4, 6)).astype(np.uint16)


def new_model() -> Llama:
    return Llama(small_config(n_layers=1, vocab_size=20), torch.Generator().manual_seed(0))


def run(model: Llama, source: Iterator[Batch] | list[Batch], config=CONFIG) -> Iterator[StepStats]:
    return train(model, make_optimizer(model, config), source, config)


def test_it_takes_the_steps_and_the_rates_that_the_config_says():
    stats = list(run(new_model(), batches(ROWS, 2, seed=0)))
    assert [s.step for s in stats] == [1, 2, 3, 4, 5, 6]
    assert [s.learning_rate for s in stats] == [learning_rate(n, CONFIG) for n in range(1, 7)]
    assert {s.n_targets for s in stats} == {3 * 2 * 5}  # micro-batches, rows, tokens


def test_it_is_a_generator_that_works_only_when_asked():
    model = new_model()
    before = model.output.weight.detach().clone()
    source = (batch for batch in batches(ROWS, 2, seed=0))
    steps = run(model, source)
    assert torch.equal(model.output.weight, before)
    next(steps)
    assert not torch.equal(model.output.weight, before)
    taken = next(source)  # the first step has taken three batches, and no more
    assert torch.equal(taken.tokens, next(islice(batches(ROWS, 2, seed=0), 3, None)).tokens)


def test_the_loss_falls_on_what_is_seen_again_and_again():
    config = replace(CONFIG, steps=40, accumulation=1, batch_size=4)
    losses = [s.loss for s in run(new_model(), batches(ROWS, 4, seed=0), config)]
    assert losses[0] == pytest.approx(np.log(20), abs=0.2)  # a new model guesses
    assert losses[-1] < 0.5 * losses[0]


def test_clipping_is_what_the_config_says():
    def distance(max_grad_norm: float) -> float:
        config = replace(CONFIG, steps=1, warmup_steps=0, max_grad_norm=max_grad_norm, eps=1.0)
        model = new_model()
        before = model.output.weight.detach().clone()
        list(run(model, batches(ROWS, 2, seed=0), config))
        return float((model.output.weight - before).detach().norm())

    # With eps = 1 AdamW's first step grows with the gradient: a clipped one goes less far.
    assert distance(1e-3) < 0.5 * distance(1e3)


def test_a_list_of_batches_is_taken_one_after_the_other():
    source = list(islice(batches(ROWS, 2, seed=0), 18))
    from_list = [s.loss for s in run(new_model(), source)]
    assert from_list == [s.loss for s in run(new_model(), iter(source))]


def test_batches_that_run_out_are_an_error():
    source = islice(batches(ROWS, 2, seed=0), 7)  # two steps of three, and one more
    steps = run(new_model(), source)
    assert [next(steps).step, next(steps).step] == [1, 2]
    with pytest.raises(ValueError, match="ended in step 3 of 6; each step takes 3"):
        next(steps)


def test_evaluate_weighs_every_target_alike():
    model = new_model()
    full = Batch(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
    sparse = Batch(torch.tensor([[5, 6, 7]]), torch.tensor([[IGNORE, IGNORE, 8]]))
    one, other = evaluate(model, [full]), evaluate(model, [sparse])
    assert one != pytest.approx(other, rel=1e-3)
    assert evaluate(model, [full, sparse]) == pytest.approx((3 * one + other) / 4)
    log_p = model(full.tokens).log_softmax(-1)[0, range(3), [2, 3, 4]]
    assert one == pytest.approx(-log_p.mean().item())


def test_evaluate_leaves_the_model_as_it_was():
    model = new_model()
    evaluate(model, islice(batches(ROWS, 2, seed=0), 2))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("n", [0, 2])
def test_there_is_no_loss_without_targets(n):
    ignored = Batch(torch.zeros(1, 3, dtype=torch.long), torch.full((1, 3), IGNORE))
    with pytest.raises(ValueError, match="no target to evaluate on"):
        evaluate(new_model(), repeat(ignored, n))
