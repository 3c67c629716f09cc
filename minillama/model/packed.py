"""Several documents in one row, none of which sees another."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """How long the documents of each row are, in tokens: `attend` takes one after the other."""

    lengths: list[list[int]]


class Packed:
    """Where the tokens of packed rows stand, in the place of a cache that would hold their past.

    `positions` count the tokens of each document from 0 on, so they say both by how much a token is
    turned and where its document begins: a token sees no key before that. The model computes for
    each document what it computes for that document alone.

    On a CPU, attention goes from document to document, and is faster than in one long text. A GPU
    would wait for so many small products: there a mask keeps the documents apart, and attention
    takes about three times as long. A row of one document costs nothing more.
    Source: Krell et al. 2021 (arXiv:2107.02027). Built in notebooks/10_sft.ipynb.
    """

    def __init__(self, positions: Int[Tensor, "batch seq"]) -> None:
        self._positions = positions
        batch, self.max_len = positions.shape
        self.lengths = [0] * batch  # nothing was read before

    def positions(self, seq: int) -> Int[Tensor, "batch seq"]:
        """Where each token stands in its document."""
        return self._positions

    def visible(self, seq: int) -> Bool[Tensor, "batch 1 seq k_len"] | Documents | None:
        """What says to `attend` which keys each token sees; None where a row is one document."""
        first = torch.arange(seq, device=self._positions.device) - self._positions
        if not first.any():
            return None
        if first.device.type != "cpu":
            return self.mask()
        runs = (row.unique_consecutive(return_counts=True) for row in first)
        return Documents([lengths.tolist() for _, lengths in runs])

    def mask(self) -> Bool[Tensor, "batch 1 seq k_len"]:
        """Which keys each token sees (True = may look)."""
        places = torch.arange(self.max_len, device=self._positions.device)
        first = (places - self._positions)[:, None, :, None]  # of each token's document
        return (first <= places) & (places <= places[:, None])

    def layer(self, index: int) -> None:
        """No layer stores anything."""

    def advance(self, seq: int) -> None:
        """Nor is anything counted."""
