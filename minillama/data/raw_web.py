"""A raw web for the toy world: its tales, under the dirt that LLaMA's data recipe removes.

Each source of the recipe has a planter, which writes documents as they would come from there. Every
document says in its meta what was planted:

    meta["planted"]     the kind: "good", "duplicate line", "foreign", "gibberish", ...
    meta["keep"]        whether it should survive its source's recipe
    meta["expected"]    its text afterwards, where the recipe should change it

The rules never read these; the tests do, and the notebook counts with them. What survives are tales
again, so that a model trained on the curated mixture learns the toy world.

Shown in notebooks/07_data.ipynb.
"""

from collections.abc import Callable, Iterator
from random import Random

from minillama.data.documents import Document
from minillama.data.tales import SEED

Planter = Callable[[Random], Iterator[Document]]

PLANTERS: dict[str, Planter] = {}


def raw(source: str, seed: int = SEED) -> Iterator[Document]:
    """The raw documents of a source; the same for the same seed on every machine.

    Raises ValueError for a source that the recipe does not know.
    """
    if source not in PLANTERS:
        raise ValueError(f"there is no source {source!r}: it is one of {', '.join(PLANTERS)}.")
    return PLANTERS[source](Random(f"{seed} {source}"))
