"""The architecture, in reading order: norm, rope, cache, packed, attention, feed_forward, llama."""

# ruff: noqa: I001  (reading order)
from minillama.model.norm import RMSNorm
from minillama.model.rope import apply_rope, rope_angles
from minillama.model.cache import KVCache, LayerCache
from minillama.model.packed import Packed
from minillama.model.attention import Attention, attend
from minillama.model.feed_forward import FeedForward
from minillama.model.llama import Block, Llama

__all__ = [
    "Attention",
    "Block",
    "FeedForward",
    "KVCache",
    "LayerCache",
    "Llama",
    "Packed",
    "RMSNorm",
    "apply_rope",
    "attend",
    "rope_angles",
]
