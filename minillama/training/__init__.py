"""Pretraining, in reading order: schedule, optimizer, loss, step, loop."""

# ruff: noqa: I001  (reading order)
from minillama.training.schedule import learning_rate
from minillama.training.optimizer import make_optimizer
from minillama.training.loss import fused_next_token_loss, next_token_loss
from minillama.training.step import StepStats, train_step
from minillama.training.loop import evaluate, train

__all__ = [
    "StepStats",
    "evaluate",
    "fused_next_token_loss",
    "learning_rate",
    "make_optimizer",
    "next_token_loss",
    "train",
    "train_step",
]
