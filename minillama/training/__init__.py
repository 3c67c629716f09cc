"""Pretraining, in reading order: schedule, optimizer, step, loop."""

# ruff: noqa: I001  (reading order)
from minillama.training.schedule import learning_rate
from minillama.training.optimizer import make_optimizer
from minillama.training.step import StepStats, next_token_loss, train_step
from minillama.training.loop import evaluate, train

__all__ = [
    "StepStats",
    "evaluate",
    "learning_rate",
    "make_optimizer",
    "next_token_loss",
    "train",
    "train_step",
]
