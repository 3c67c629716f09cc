"""The executable form of the LLaMA papers.

>>> from minillama import Llama, LlamaConfig, Tokenizer, load, save, generate, stream

Importing the package is quick: torch is loaded with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillama.checkpoint import load, save
    from minillama.config import LlamaConfig
    from minillama.generation import Completion, generate, stream
    from minillama.model import Llama
    from minillama.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "Completion": "generation",
    "Llama": "model",
    "LlamaConfig": "config",
    "Tokenizer": "tokenizer",
    "generate": "generation",
    "load": "checkpoint",
    "save": "checkpoint",
    "stream": "generation",
}
__all__ = [
    "Completion",
    "Llama",
    "LlamaConfig",
    "Tokenizer",
    "generate",
    "load",
    "save",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minillama' has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(f"minillama.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
