"""A raw web for the toy world: its tales, under the dirt that LLaMA's data recipe removes.

Each source of the recipe has a planter, which writes documents as they would come from there. Every
document says in its meta what was planted:

    meta["planted"]     the kind: "good", "duplicate line", "foreign", "gibberish", ...
    meta["keep"]        whether it should survive its source's recipe
    meta["expected"]    its text afterwards, where the recipe should change it

The rules never read these; the tests do, and the notebook counts with them. What they do read is
"licence" in github, "language" in wikipedia, and "title", "site" and "answers", a list
of [score, HTML], in stackexchange, where the text is the question's HTML. What survives are tales
again, so that a model trained on the curated mixture learns the toy world.

Shown in notebooks/07_data.ipynb.
"""

from collections.abc import Callable, Iterator
from random import Random

from minillama.data import raw_web_markup, raw_web_pages
from minillama.data.documents import Document
from minillama.data.tales import SEED

# In the order of LLaMA's table.
PLANTERS: dict[str, Callable[[Random], Iterator[Document]]] = {
    "commoncrawl": raw_web_pages.commoncrawl,
    "c4": raw_web_pages.c4,
    "github": raw_web_markup.github,
    "wikipedia": raw_web_markup.wikipedia,
    "books": raw_web_pages.books,
    "arxiv": raw_web_markup.arxiv,
    "stackexchange": raw_web_markup.stackexchange,
}


def raw(source: str, seed: int = SEED) -> Iterator[Document]:
    """The raw documents of a source; the same for the same seed on every machine.

    Raises ValueError for a source that the recipe does not know.
    """
    if source not in PLANTERS:
        raise ValueError(f"there is no source {source!r}: it is one of {', '.join(PLANTERS)}.")
    for number, document in enumerate(PLANTERS[source](Random(f"{seed} {source}"))):
        yield Document(document.text, source, f"{source}-{number:04}", document.meta)
