"""Writing text: sampling, stop, decoder, compiled, request, speculative, engine, in this order."""

# ruff: noqa: I001  (reading order)
from minillama.generation.sampling import draw, keep_min_p, keep_top_k, keep_top_p, penalize, sample
from minillama.generation.stop import StopFilter
from minillama.generation.decoder import Decoder
from minillama.generation.compiled import CompiledDecoder
from minillama.generation.request import Completion, Request, Ticket
from minillama.generation.speculative import speculate, verify
from minillama.generation.engine import Engine, generate, stream

__all__ = [
    "CompiledDecoder",
    "Completion",
    "Decoder",
    "Engine",
    "Request",
    "StopFilter",
    "Ticket",
    "draw",
    "generate",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalize",
    "sample",
    "speculate",
    "stream",
    "verify",
]
