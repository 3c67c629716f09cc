"""AdamW with the papers' settings."""

import torch
from torch import nn

from minillama.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only.

    The papers give beta1 0.9, beta2 0.95, weight decay 0.1 and, for Llama 2, eps 1e-5. They do not
    say what is decayed; we follow the usual choice: matrices yes, the norms' weights no, because
    pulling those towards zero would only rescale the stream.

    Source: Touvron et al. 2023a, sec. 2.3, and 2023b, sec. 2.2; Loshchilov & Hutter 2017
    (arXiv:1711.05101). Built in notebooks/08_pretraining.ipynb.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
