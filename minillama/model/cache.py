"""The KV cache: keys and values of the tokens already read, so that none is read twice."""

import copy

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillama.config import LlamaConfig


class KVCache:
    """Room for the keys and values of `max_len` tokens of `batch` rows, allocated once.

    Rows may have different lengths. They are filled from position 0 without a gap, and a query
    sees a key if the key's position is not later than its own: this one rule is the causal mask,
    and it also hides whatever lies behind a row's end. Prompts are therefore padded on the
    *right*; the padding's keys stand at positions that the row has not reached yet, and are
    overwritten when it gets there. No mask for padding exists, and every row sits at the positions
    it would have alone.

    `lengths[row]` is the number of tokens stored; set it after a padded call. For use without
    gradients: `torch.inference_mode()` or `no_grad`. `dtype` is that of the model's weights.
    Memory: 2 * n_layers * batch * n_kv_heads * max_len * head_dim numbers.
    Built in notebooks/05_gqa_attention.ipynb.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
        self.keys: Float[Tensor, "n_layers batch kv_heads max_len head_dim"]
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * batch
        self.max_len = max_len

    def positions(self, seq: int) -> Int[Tensor, "batch seq"]:
        """Where the next `seq` tokens of each row will stand."""
        start = torch.tensor(self.lengths, device=self.keys.device)
        return start[:, None] + torch.arange(seq, device=self.keys.device)

    def visible(self, seq: int) -> Bool[Tensor, "batch 1 seq k_len"] | None:
        """Which of the first k_len keys the next `seq` tokens see (True = may look).

        None where plain causal attention says the same: on an empty cache, or for one new token
        in rows of equal length.
        """
        if max(self.lengths) == 0 or (seq == 1 and len(set(self.lengths)) == 1):
            return None
        key_positions = torch.arange(max(self.lengths) + seq, device=self.keys.device)
        return key_positions <= self.positions(seq)[:, None, :, None]

    def layer(self, index: int) -> "LayerCache":
        """One layer's share."""
        return LayerCache(self, index)

    def advance(self, seq: int) -> None:
        """Count the tokens that every layer has appended."""
        self.lengths = [length + seq for length in self.lengths]

    def part(self, first: int, last: int) -> "KVCache":
        """The rows from `first` to before `last` as a cache that shares this one's memory.

        Its lengths are its own: what is read through it is to be counted here, too.
        """
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, first:last], self.values[:, first:last]
        part.lengths = self.lengths[first:last]
        return part

    def swap(self, row: int, other: int) -> None:
        """Let two rows change places."""
        lengths = self.lengths
        for stored in (self.keys, self.values):
            aside = stored[:, row, :, : lengths[row]].clone()
            stored[:, row, :, : lengths[other]] = stored[:, other, :, : lengths[other]]
            stored[:, other, :, : lengths[row]] = aside
        lengths[row], lengths[other] = lengths[other], lengths[row]

    def copy(self, source: int, target: int, length: int) -> None:
        """Put the first `length` tokens of one row in the place of all that another holds."""
        for stored in (self.keys, self.values):
            stored[:, target, :, :length] = stored[:, source, :, :length]
        self.lengths[target] = length

    def clear(self, row: int) -> None:
        """Empty a row for good: NaN behind a row's end would be seen, since 0 * NaN is NaN."""
        self.keys[:, row] = 0
        self.values[:, row] = 0
        self.lengths[row] = 0


class LayerCache:
    """What one attention layer sees of a `KVCache`."""

    def __init__(self, cache: KVCache, index: int) -> None:
        self.cache = cache
        self.keys, self.values = cache.keys[index], cache.values[index]

    def append(
        self,
        k: Float[Tensor, "batch kv_heads seq head_dim"],
        v: Float[Tensor, "batch kv_heads seq head_dim"],
    ) -> tuple[
        Float[Tensor, "batch kv_heads k_len head_dim"],
        Float[Tensor, "batch kv_heads k_len head_dim"],
    ]:
        """Store k and v behind each row's tokens; give back all keys and values so far."""
        lengths, seq = self.cache.lengths, k.shape[2]
        end = max(lengths) + seq
        for stored, new in ((self.keys, k), (self.values, v)):
            if len(set(lengths)) == 1:
                stored[:, :, end - seq : end] = new
            else:
                rows = torch.arange(len(lengths), device=new.device)[:, None]
                stored[rows, :, self.cache.positions(seq)] = rearrange(
                    new, "batch kv_heads seq head_dim -> batch seq kv_heads head_dim"
                )
        return self.keys[:, :, :end], self.values[:, :, :end]
