"""Decoding with a compiler: one token through all layers as one function."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillama.generation.decoder import Decoder
from minillama.generation.vector import for_one_row
from minillama.model import Llama, rope_angles


class CompiledDecoder(Decoder):
    """A `Decoder` whose `step` is compiled as a whole: hardly any time passes between two products.

    torch.compile does that once, in the second step, and takes 10 to 30 seconds; later decoders of
    this process use the same code if they have equally many rows. All `rows` are always computed,
    so make no more than you need. `prefill` and `extend` are not compiled: they spend their time in
    large matrix products.

    In float32 a row's logits are those of the plain decoder but for rounding. Weights of 16 bits
    are multiplied and added up in float32.

    On a GPU the step is recorded as a CUDA graph, which always reads the whole cache.
    Built in notebooks/09_generation.ipynb.
    """

    def __init__(self, model: Llama, rows: int, max_len: int) -> None:
        # One place more than anyone may use: there the rows write that nobody asks for.
        super().__init__(model, rows, max_len + 1)
        self.cache.max_len = max_len
        # Each layer's share of the cache as a tensor of its own, in the same memory: torch.compile
        # would copy all of a tensor if its views are written to.
        self._keys = [torch.from_dlpack(layer) for layer in self.cache.keys]
        self._values = [torch.from_dlpack(layer) for layer in self.cache.values]
        self._cuda = self.cache.keys.device.type == "cuda"
        for layer in (*self._keys, *self._values):
            if self._cuda:
                torch._dynamo.mark_static_address(layer)
            else:
                torch._dynamo.mark_dynamic(layer, 2)
        self._twin = for_one_row(model, compiled=True) if rows == 1 else model
        self._step = torch.compile(_step, options={"triton.cudagraphs": self._cuda})
        self._started = False

    def step(self, ids: Sequence[int]) -> Float[Tensor, "batch vocab"]:
        """Read one token more in each of the first rows; the logits behind it."""
        if not self._started:  # the plain step puts quantised weights into their kernel's order
            self._started = True
            return super().step(ids)
        cache, n = self.cache, len(ids)
        longest = max(cache.lengths[:n])
        if longest >= cache.max_len:
            raise ValueError(
                f"{longest} tokens read and 1 more are {longest + 1}, but there is room for "
                f"{cache.max_len}. Shorten the text, or make a decoder with more room."
            )
        tokens = torch.zeros(len(cache.lengths), dtype=torch.int64)
        tokens[:n] = torch.tensor(ids)
        positions = cache.positions(1)[:, 0]
        k_len = cache.keys.shape[3] if self._cuda else max(2, longest + 1)
        visible = torch.arange(k_len, device=positions.device) <= positions[:, None]
        if not self._cuda:
            torch._dynamo.mark_dynamic(visible, 1)
        tokens = tokens.to(positions.device)
        logits = self._step(self._twin, tokens, positions, visible, self._keys, self._values)
        cache.lengths[:n] = [length + 1 for length in cache.lengths[:n]]
        return logits[:n].clone()  # a CUDA graph writes its next ones to the same place


def _step(
    model: Llama,
    tokens: Int[Tensor, " batch"],
    positions: Int[Tensor, " batch"],
    visible: Bool[Tensor, "batch k_len"],
    keys: list[Tensor],
    values: list[Tensor],
) -> Float[Tensor, "batch vocab"]:
    """`Llama.forward` for one token of each row. How long the rows are stands in tensors, not in
    numbers, which a compiler would take for constants."""
    angles = rope_angles(positions[:, None], model.config.head_dim, model.config.rope_theta)
    x = model.tok_embeddings(tokens[:, None])
    for layer, k, v in zip(model.layers, keys, values, strict=True):
        place = _Place(k, v, positions, visible.shape[1])
        x = layer(x, angles[:, None], visible[:, None, None], place)
    return model.output(model.norm(x))[:, 0].float()


class _Place:
    """The `LayerCache` of a compiled step: where each row writes its next key and value."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, k_len: int) -> None:
        self.keys, self.values = keys, values
        self.positions, self.k_len = positions, k_len

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(self.positions), device=k.device)
        self.keys[rows, :, self.positions] = k[:, :, 0]
        self.values[rows, :, self.positions] = v[:, :, 0]
        return self.keys[:, :, : self.k_len], self.values[:, :, : self.k_len]
