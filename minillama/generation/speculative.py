"""Speculative decoding: a small model guesses several tokens, the large one checks them at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from minillama.config import Sampling
from minillama.generation.decoder import Decoder
from minillama.generation.request import Ticket
from minillama.generation.sampling import are_numbers, distribution, draw, penalize


def speculate(target: Decoder, draft: Decoder, tickets: Sequence[Ticket], n_draft: int) -> None:
    """Give each of the first rows 1 to n_draft + 1 tokens, in one pass of the target.

    Reading five tokens costs a large model hardly more than reading one, since its weights are
    fetched once. So the draft proposes `n_draft` tokens one by one, and the target reads them all.
    At temperature 0 the text is the one that the target writes alone; above, it has the same
    distribution. How good the draft is decides the speed and nothing else.

    A row whose logits, the draft's or the target's, are no numbers ends with "error".

    Source: Leviathan et al. 2023, algorithm 1 (arXiv:2211.17192); Chen et al. 2023, algorithm 2
    (arXiv:2302.01318). Built in notebooks/09_generation.ipynb.
    """
    room = min(target.cache.max_len, draft.cache.max_len)
    counts = [min(n_draft, room - len(ticket.ids)) for ticket in tickets]
    proposals, chances = _propose(draft, tickets, counts)
    texts = [ticket.ids + ids for ticket, ids in zip(tickets, proposals, strict=True)]
    logits = _read(target, texts, max(counts) + 1)
    for row, ticket in enumerate(tickets):
        if ticket.finish_reason is not None:  # the draft's logits are no numbers
            continue
        behind = logits[row, -counts[row] - 1 :]  # the newest token, and behind each proposal
        if not are_numbers(behind).all():
            ticket.end("error")
            continue
        sampling, generator = ticket.request.sampling, ticket.generator
        tokens = verify(proposals[row], chances[row], behind, sampling, generator, ticket.ids)
        ticket.n_proposed += counts[row]
        ticket.n_accepted += len(tokens) - 1
        target.lengths[row] = len(ticket.ids) + len(tokens) - 1  # the last one is not read yet
        draft.lengths[row] = min(draft.lengths[row], target.lengths[row])
        for token, token_logits in zip(tokens, behind, strict=False):
            if ticket.finish_reason is None:
                ticket.take(token, token_logits)


def verify(
    proposed: Sequence[int],
    chances: Sequence[Float[Tensor, " vocab"]],
    logits: Float[Tensor, "seq vocab"],
    sampling: Sampling,
    generator: torch.Generator,
    seen: Sequence[int] = (),
) -> list[int]:
    """The proposals that stand, and one token more.

    Proposal x was drawn with the probability q(x) of `chances`; the target, whose `logits` have one
    row more, gives it p(x). It stands with probability min(1, p(x) / q(x)). The first that does not
    is replaced by a draw from what p has more than q, max(0, p - q), and the rest are dropped. So
    x comes out with probability min(p, q) + max(0, p - q) = p(x), whatever q is.

    At temperature 0, where `chances` is empty, a proposal stands if it is the likeliest token.
    Source: Leviathan et al. 2023, algorithm 1 and appendix A.1 (arXiv:2211.17192). Built in
    notebooks/09_generation.ipynb.
    """
    text = [*seen]
    for i, token in enumerate(proposed):
        if sampling.temperature == 0:
            likeliest = _likeliest(logits[i], sampling, text)
            if token != likeliest:
                return [*proposed[:i], likeliest]
        else:
            p, q = distribution(logits[i], sampling, text), chances[i]
            if torch.rand((), generator=generator).item() * q[token] >= p[token]:
                left = (p - q).clamp(min=0)  # nothing, by rounding, only where p and q are equal
                return [*proposed[:i], draw(left if left.any() else p, generator)]
        text.append(token)
    if sampling.temperature == 0:
        return [*proposed, _likeliest(logits[-1], sampling, text)]
    return [*proposed, draw(distribution(logits[-1], sampling, text), generator)]


def _propose(
    draft: Decoder, tickets: Sequence[Ticket], counts: Sequence[int]
) -> tuple[list[list[int]], list[list[Float[Tensor, " vocab"]]]]:
    """The draft's next tokens for each row, and the distributions from which they were drawn."""
    proposals: list[list[int]] = [[] for _ in tickets]
    chances: list[list[Tensor]] = [[] for _ in tickets]
    for step in range(max(counts)):
        texts = [ticket.ids + ids for ticket, ids in zip(tickets, proposals, strict=True)]
        unread = max(len(text) - n for text, n in zip(texts, draft.lengths, strict=False))
        logits = _read(draft, texts, unread)[:, -1]
        usable = are_numbers(logits).tolist()
        for row, ticket in enumerate(tickets):
            if step >= counts[row]:
                continue
            if not usable[row]:
                ticket.end("error")
            if ticket.finish_reason is not None:
                proposals[row].append(0)  # the rows beside it go on: any token will do
                continue
            sampling = ticket.request.sampling
            if sampling.temperature == 0:
                proposals[row].append(_likeliest(logits[row], sampling, texts[row]))
            else:
                chances[row].append(distribution(logits[row], sampling, texts[row]))
                proposals[row].append(draw(chances[row][-1], ticket.generator))
    return proposals, chances


def _read(
    decoder: Decoder, texts: Sequence[Sequence[int]], n: int
) -> Float[Tensor, "batch seq vocab"]:
    """The logits behind the last n tokens of each text.

    Rows of which fewer are new read some tokens again: then all read equally many, none reads
    padding, and none needs room behind the end of the context.
    """
    decoder.lengths[: len(texts)] = [len(text) - n for text in texts]
    if n == 1:
        return decoder.step([text[-1] for text in texts])[:, None]
    return decoder.extend([text[-n:] for text in texts])


def _likeliest(logits: Float[Tensor, " vocab"], sampling: Sampling, text: Sequence[int]) -> int:
    return int(penalize(logits, text, sampling.repetition_penalty).max(-1).indices)
