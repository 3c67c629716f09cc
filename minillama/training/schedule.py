"""The learning rate over the run: a warm-up, then half a cosine."""

import math

from minillama.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of optimiser step 1, 2, ... config.steps.

    Rises in a straight line to the peak at step `warmup_steps`, while AdamW's averages are still
    poor; then falls along a cosine to exactly `min_lr_ratio` of the peak at the last step.

    Source: Touvron et al. 2023a, sec. 2.3 (arXiv:2302.13971). Built in
    notebooks/08_pretraining.ipynb.
    """
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2  # 1 at the peak, 0 at the end
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
