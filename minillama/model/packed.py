"""Several documents in one row, none of which sees another."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Packed:
    """Where the tokens of packed rows stand, in the place of a cache that would hold their past.

    `positions` count the tokens of each document from 0 on, so they say both by how much a token is
    turned and where its document begins: a token sees no key before that. The model computes for
    each document what it computes for that document alone.

    A row of one document costs nothing more than without. Several are kept apart by a mask: at
    1,024 tokens, attention then takes about twice the time on a CPU, and three times on a GPU.
    Source: Krell et al. 2021 (arXiv:2107.02027). Built in notebooks/10_sft.ipynb.
    """

    def __init__(self, positions: Int[Tensor, "batch seq"]) -> None:
        self._positions = positions
        batch, self.max_len = positions.shape
        self.lengths = [0] * batch  # nothing was read before

    def positions(self, seq: int) -> Int[Tensor, "batch seq"]:
        """Where each token stands in its document."""
        return self._positions

    def visible(self, seq: int) -> Bool[Tensor, "batch 1 seq k_len"] | None:
        """Which keys each token sees; None where every row is one document."""
        places = torch.arange(seq, device=self._positions.device)
        first = (places - self._positions)[:, None, :, None]  # of each token's document
        if not first.any():
            return None
        return (first <= places) & (places <= places[:, None])

    def layer(self, index: int) -> None:
        """No layer stores anything."""

    def advance(self, seq: int) -> None:
        """Nor is anything counted."""
