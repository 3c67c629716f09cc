"""From logits to one token: repetition penalty, temperature, top-k, top-p, min-p, and the draw."""

import math
from collections.abc import Collection

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minillama.config import Sampling


def sample(
    logits: Float[Tensor, " vocab"],
    sampling: Sampling,
    generator: torch.Generator,
    seen: Collection[int] = (),
) -> int:
    """Draw one token id; `seen` are the ids of prompt and answer, for the repetition penalty.

    At temperature 0 the likeliest token is taken (the first of several equal ones), and the
    generator stays where it is. It lives on the CPU, so that a seed means the same on every device.
    Built in notebooks/09_generation.ipynb.
    """
    if sampling.temperature == 0:
        return int(penalize(logits, seen, sampling.repetition_penalty).max(-1).indices)
    return draw(distribution(logits, sampling, seen), generator)


def distribution(
    logits: Float[Tensor, " vocab"], sampling: Sampling, seen: Collection[int] = ()
) -> Float[Tensor, " vocab"]:
    """The probabilities that a token is drawn with, at a temperature above 0.

    The order matters and is that of the other libraries: the repetition penalty, then the
    temperature, then the cuts, each of which measures what the one before has left.
    Built in notebooks/09_generation.ipynb.
    """
    logits = penalize(logits.float(), seen, sampling.repetition_penalty)
    logits = logits / max(sampling.temperature, 1e-30)  # less would overflow float32
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.softmax(-1)


def draw(probabilities: Float[Tensor, " vocab"], generator: torch.Generator) -> int:
    """One index, with these probabilities; they need not add up to 1.

    A point on a line of this length is drawn; the index is the interval it falls into. (PyTorch's
    `multinomial` draws a random number for each of the 32,000 tokens, and takes 1.3 ms.)
    """
    ends = probabilities.double().cpu().cumsum(-1)
    point = (1 - torch.rand((), generator=generator, dtype=torch.float64)) * ends[-1]
    return int(torch.searchsorted(ends, point))  # the first end that is not before the point


def are_numbers(logits: Float[Tensor, "*batch vocab"]) -> Bool[Tensor, "*batch"]:
    """Whether a token can be drawn: no logit is NaN or +inf, and one at least is above -inf."""
    return logits.max(-1).values.isfinite()


def penalize(
    logits: Float[Tensor, " vocab"], seen: Collection[int], penalty: float
) -> Float[Tensor, " vocab"]:
    """Make the tokens that were seen less likely: their logits are divided by `penalty`.

    Negative ones are multiplied: a division would make them likelier. (The paper's formula divides
    all; multiplying is what every library has made of it.)
    Source: Keskar et al. 2019, sec. 4.1 (CTRL, arXiv:1909.05858). Built in
    notebooks/09_generation.ipynb.
    """
    if penalty == 1 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    old = logits[ids]
    return logits.index_copy(0, ids, torch.where(old > 0, old / penalty, old * penalty))


def keep_top_k(logits: Float[Tensor, "*batch vocab"], top_k: int) -> Float[Tensor, "*batch vocab"]:
    """Keep the `top_k` likeliest tokens; -inf for the rest.

    Source: Fan et al. 2018, sec. 5.4 (arXiv:1805.04833). Built in notebooks/09_generation.ipynb.
    """
    chosen = logits.topk(min(top_k, logits.shape[-1])).indices
    return torch.full_like(logits, -torch.inf).scatter(-1, chosen, logits.gather(-1, chosen))


def keep_top_p(
    logits: Float[Tensor, "*batch vocab"], top_p: float
) -> Float[Tensor, "*batch vocab"]:
    """Keep the fewest tokens that together have probability `top_p`; -inf for the rest.

    A token goes if those before it already have more than `top_p`; so the likeliest always stays,
    and top_p = 0 is greedy decoding.

    Source: Holtzman et al. 2020, sec. 3.1 (arXiv:1904.09751). Built in
    notebooks/09_generation.ipynb.
    """
    vocab = logits.shape[-1]
    total = logits.logsumexp(-1, keepdim=True)
    for n in (min(1024, vocab), vocab):  # the likeliest 1,024 are nearly always enough to look at
        order = logits.topk(n).indices.sort().values  # ties stay in the order of the vocabulary
        likeliest, by_size = logits.gather(-1, order).sort(descending=True, stable=True)
        probabilities = (likeliest - total).exp()
        mass_before = (probabilities.cumsum(-1) - probabilities).clamp(max=1)  # but for rounding
        if (mass_before[..., -1] > top_p).all():
            break
    kept = likeliest.masked_fill(mass_before > top_p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, order.gather(-1, by_size), kept)


def keep_min_p(
    logits: Float[Tensor, "*batch vocab"], min_p: float
) -> Float[Tensor, "*batch vocab"]:
    """Keep the tokens at least `min_p` times as probable as the likeliest; -inf for the rest.

    Where the model is sure, few tokens stay; where it is not, many. min_p = 1 is greedy decoding.
    Source: Nguyen et al. 2024, sec. 3 (arXiv:2407.01082). Built in notebooks/09_generation.ipynb.
    """
    if min_p == 0:
        return logits
    least = logits.max(-1, keepdim=True).values + math.log(min_p)
    return logits.masked_fill(logits < least, -torch.inf)
