"""Writing text, in reading order: sampling, stop, decoder, engine."""

# ruff: noqa: I001  (reading order)
from minillama.generation.sampling import keep_top_k, keep_top_p, sample
from minillama.generation.stop import StopFilter
from minillama.generation.decoder import Decoder
from minillama.generation.engine import Completion, generate, stream

__all__ = [
    "Completion",
    "Decoder",
    "StopFilter",
    "generate",
    "keep_top_k",
    "keep_top_p",
    "sample",
    "stream",
]
