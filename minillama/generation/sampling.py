"""From logits to one token: temperature, top-k, top-p."""

import torch
from jaxtyping import Float
from torch import Tensor

from minillama.config import Sampling


def sample(logits: Float[Tensor, " vocab"], sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token id; `generator` lives on the CPU, so a seed means the same on every device."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits.float() / max(sampling.temperature, 1e-30)  # less would overflow float32
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    probabilities = logits.softmax(-1).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))


def keep_top_k(logits: Float[Tensor, "*batch vocab"], top_k: int) -> Float[Tensor, "*batch vocab"]:
    """Keep the `top_k` likeliest tokens; -inf for the rest.

    Source: Fan et al. 2018, sec. 5.4 (arXiv:1805.04833). Shown in notebooks/00_tour.ipynb.
    """
    chosen = logits.topk(min(top_k, logits.shape[-1])).indices
    return torch.full_like(logits, -torch.inf).scatter(-1, chosen, logits.gather(-1, chosen))


def keep_top_p(
    logits: Float[Tensor, "*batch vocab"], top_p: float
) -> Float[Tensor, "*batch vocab"]:
    """Keep the fewest tokens that together have probability `top_p`; -inf for the rest.

    A token goes if those before it already have more than `top_p`; so the likeliest always stays,
    and top_p = 0 is greedy decoding.

    Source: Holtzman et al. 2020, sec. 3.1 (arXiv:1904.09751). Shown in
    notebooks/00_tour.ipynb.
    """
    sorted_logits, order = logits.sort(descending=True, stable=True)
    probabilities = sorted_logits.softmax(-1)
    mass_before = (probabilities.cumsum(-1) - probabilities).clamp(max=1)  # rounding may exceed 1
    sorted_logits = sorted_logits.masked_fill(mass_before > top_p, -torch.inf)
    return sorted_logits.gather(-1, order.argsort())
