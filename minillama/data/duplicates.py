"""Said before: documents, lines and spans that occur more than once, and books that nearly do.

Of what is the same the first stays. To know what was there before, 8 bytes of each text's SHA-1 are
remembered, never the text: with a billion of them, the chance that any two differing texts share
theirs is 3%, and what is lost then is one line.
"""

import hashlib


def hash64(text: str) -> int:
    """The first 64 bits of a text's SHA-1: the same on every machine, unlike Python's `hash`."""
    return int.from_bytes(hashlib.sha1(text.encode(), usedforsecurity=False).digest()[:8])


def exact_duplicates(text: str, seen: set[int]) -> str | None:
    """The text, or None if the very same one was there before; ``seen`` remembers it.

    Source: Touvron et al. 2023a, sec. 2.1, GitHub ("at the file level, with exact matches").
    Shown in notebooks/07_data.ipynb.
    """
    key = hash64(text)
    if key in seen:
        return None
    seen.add(key)
    return text
