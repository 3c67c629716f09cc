"""Every forward pass of generation goes through one object: prompts in, next logits out."""

from collections.abc import Sequence
from itertools import takewhile
from operator import eq

import torch
from jaxtyping import Float
from torch import Tensor

from minillama.generation.vector import for_one_row
from minillama.model import KVCache, Llama


class Decoder:
    """A model, and room for `rows` texts of up to `max_len` tokens that it has read.

    The texts stand in rows 0, 1, 2, ... without a gap, and a pass over the first n of them works on
    views of the cache: nothing is copied, and no row is computed that nobody needs. What a row
    gives never depends on the others.

    `lengths[row]` is how many tokens of a row are stored. Setting it back forgets the last ones
    (what stands behind a row's end is never seen, see `KVCache`).
    For use without gradients: `torch.inference_mode()` or `no_grad`.
    Built in notebooks/09_generation.ipynb.
    """

    def __init__(self, model: Llama, rows: int, max_len: int) -> None:
        weight = model.tok_embeddings.weight  # the head may be quantised
        self.model = model
        self._one = for_one_row(model) if rows == 1 else model
        self.cache = KVCache(model.config, rows, max_len, weight.device, weight.dtype)

    @property
    def lengths(self) -> list[int]:
        """Tokens stored in each row."""
        return self.cache.lengths

    def prefill(self, first: int, ids: Sequence[Sequence[int]]) -> Float[Tensor, "batch vocab"]:
        """Read texts into the rows `first`, `first` + 1, ...; the logits behind the last of each.

        The texts go on behind what the rows hold, so a long prompt can be read in chunks. They may
        have different lengths; the head is computed for their last tokens only.
        """
        longest = max(map(len, ids))
        padded = [[*row, *[0] * (longest - len(row))] for row in ids]
        last = torch.tensor([len(row) - 1 for row in ids])
        hidden = self._read(first, padded, [len(row) for row in ids])
        return self.model.output(hidden[torch.arange(len(ids)), last]).float()

    def step(self, ids: Sequence[int]) -> Float[Tensor, "batch vocab"]:
        """Read one token more in each of the first rows; the logits behind it."""
        hidden = self._read(0, [[token] for token in ids], [1] * len(ids), self._one)
        return self._one.output(hidden[:, -1]).float()

    def extend(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "batch seq vocab"]:
        """Read equally many tokens more in each of the first rows; the logits behind every one."""
        return self.model.output(self._read(0, ids, list(map(len, ids)))).float()

    def swap(self, row: int, other: int) -> None:
        """Let two rows change places."""
        self.cache.swap(row, other)

    def copy(self, source: int, target: int, length: int) -> None:
        """Put the first `length` tokens of one row in the place of all that another holds."""
        self.cache.copy(source, target, length)

    def clear(self, row: int) -> None:
        """Empty a row whose hidden states are no numbers, see `KVCache.clear`."""
        self.cache.clear(row)

    def _read(
        self,
        first: int,
        ids: Sequence[Sequence[int]],
        lengths: list[int],
        model: Llama | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """The hidden states of these tokens; each row grows by its length."""
        last = first + len(ids)
        rows = self.cache.part(first, last)
        hidden = (model or self.model).hidden(
            torch.tensor(ids, device=self.cache.keys.device), rows
        )
        grown = zip(self.lengths[first:last], lengths, strict=True)
        self.lengths[first:last] = [old + new for old, new in grown]
        return hidden


def n_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts have in common before they part."""
    pairs = zip(ids, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: eq(*pair), pairs))
