"""A small text, tokenizer and model, made in no time, that all tests of the upper layers share."""

from functools import cache

import torch

from minillama.config import LlamaConfig
from minillama.model import Llama
from minillama.tokenizer import Tokenizer, train_tokenizer

NAMES = ("Ada", "Ben", "Clara", "Emil", "Ida", "Jon")
THINGS = ("boat", "clock", "drum", "kite", "lamp")
STORIES = [
    f"{name} had {n} of these: a {thing}, and another {thing}. {name} took the {thing} home.\n"
    for n, name in enumerate(NAMES)
    for thing in THINGS
]


@cache
def small_tokenizer(vocab_size: int = 300) -> Tokenizer:
    """41 pieces are learned; the other 259 are those of every Llama tokenizer."""
    return train_tokenizer(STORIES, vocab_size)


def small_config(**changes) -> LlamaConfig:
    """Grouped heads (4 query heads, 2 KV heads) and 8 channels each."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64}
    return LlamaConfig(**(sizes | {"vocab_size": 300, "max_seq_len": 64} | changes))


def small_llama(seed: int = 0, **changes) -> Llama:
    """Weights so large that the model is sure of what it says, and says more than one thing."""
    model = Llama(small_config(**changes), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 10
    return model.requires_grad_(False)
