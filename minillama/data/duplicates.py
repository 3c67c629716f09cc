"""Said before: files, lines and spans that occur more than once, and books that nearly do.

Of what is the same the first stays. To know what was there before, 8 bytes of each text's SHA-1 are
remembered and never the text: with a billion of them, the chance that any two that differ have the
same is 3%, and what is lost then is one line. This memory, ``seen``, is the only thing in the data
recipe that grows with the corpus.

Shown in notebooks/07_data.ipynb.
"""

import hashlib
import re

import numpy as np
from jaxtyping import UInt64

from minillama.data.documents import Document
from minillama.data.heuristics import sentences


def hash64(text: str) -> int:
    """The first 64 bits of a text's SHA-1: the same on every machine, unlike Python's `hash`."""
    return int.from_bytes(hashlib.sha1(text.encode(), usedforsecurity=False).digest()[:8])


def exact_duplicates(text: str, seen: set[int]) -> str | None:
    """The text, or None if the very same one was there before.

    Source: Touvron et al. 2023a, sec. 2.1: GitHub's files, "at the file level, with exact matches".
    """
    return text if _is_new(text, seen) else None


def duplicate_lines(text: str, seen: set[int]) -> str | None:
    """The lines that were not there before, in this text or an earlier one; None if all were.

    Menus, cookie banners and licence notices stand on a million pages, with another date or another
    number of visitors on each. So lines count as the same if they are after `normalise`. Lines that
    have no letter and no digit are layout and stay.

    Source: Wenzek et al. 2020, CCNet (arXiv:1911.00359), sec. 3.1.
    """
    kept = [line for line in text.split("\n") if not (n := normalise(line)) or _is_new(n, seen)]
    return "\n".join(kept) if any(map(normalise, kept)) else None


def normalise(line: str) -> str:
    """Lower case, every digit a 0, no punctuation, single spaces: "1,204 Visits!" is "0000 visits".

    Source: Wenzek et al. 2020, CCNet (arXiv:1911.00359), sec. 3.1.
    """
    return " ".join(re.sub(r"[^\w\s]|_", "", re.sub(r"\d", "0", line.lower())).split())


def repeated_spans(text: str, seen: set[int]) -> str | None:
    """The text without the spans of three sentences that were there before; None if none is left.

    Source: Raffel et al. 2020, C4 (arXiv:1910.10683), sec. 2.2.
    """
    lines = [sentences(line) for line in text.split("\n")]
    places = [(i, j) for i, line in enumerate(lines) for j in range(len(line))]
    repeated = set[tuple[int, int]]()
    for first in range(len(places) - 2):
        span = places[first : first + 3]
        if not _is_new(" ".join(normalise(lines[i][j]) for i, j in span), seen):
            repeated.update(span)
    if not repeated:
        return text
    kept = [
        " ".join(sentence for j, sentence in enumerate(line) if (i, j) not in repeated)
        for i, line in enumerate(lines)
    ]
    return "\n".join(line for line in kept if line) or None


class NearDuplicates:
    """A book, or None if an earlier one overlaps with it by more than ``overlap``.

    The overlap of two books is the share of their shingles that both have: a shingle is five words
    in a row, whatever their case and punctuation. (LLaMA's authors drop books "with more than 90%
    content overlap" and do not say how they measure it.)

    Every book against every other would take a year. MinHash makes it a look-up: a random order of
    all shingles is drawn, and each book shows the first of its own; two books show the same one
    with a probability of exactly their overlap. 32 bands of 4 such draws find a pair at 90% but
    once in 10^15, and many pairs with less; so for every pair found the shingles themselves are
    compared, and no book is lost to chance.

    Of each book that stays, 8 bytes a shingle are remembered. The library is `rensa`; ValueError
    where it is not installed. Source: Broder 1997; Touvron et al. 2023a, sec. 2.1.
    """

    N_BANDS, BAND_SIZE, SHINGLE_WORDS = 32, 4, 5

    def __init__(self, overlap: float = 0.9) -> None:
        try:
            from rensa import RMinHashLSH
        except ImportError:
            raise ValueError(
                "Near-duplicates are found with the library rensa, which is not installed: "
                "pip install 'minillama[data]'"
            ) from None
        if not 0 < overlap <= 1:
            raise ValueError(f"overlap is {overlap}, but is a share: above 0, and at most 1.")
        self.overlap = overlap
        self.n_draws = self.N_BANDS * self.BAND_SIZE
        self.index = RMinHashLSH(overlap, self.n_draws, self.N_BANDS)
        self.books: list[UInt64[np.ndarray, " shingles"]] = []  # the shingles of those that stayed

    def __call__(self, book: Document) -> Document | None:
        from rensa import RMinHash

        shingles = shingle_hashes(book.text, self.SHINGLE_WORDS)
        draws = RMinHash(self.n_draws, seed=1)
        draws.update([str(shingle) for shingle in shingles])
        for found in self.index.query(draws):
            if jaccard(shingles, self.books[found]) > self.overlap:
                return None
        self.index.insert(len(self.books), draws)
        self.books.append(shingles)
        return book


def shingle_hashes(text: str, n_words: int) -> UInt64[np.ndarray, " shingles"]:
    """The different runs of ``n_words`` words, hashed and sorted; a shorter text is one run."""
    words = normalise(text).split()
    starts = range(max(len(words) - n_words + 1, 1))
    hashes = {hash64(" ".join(words[start : start + n_words])) for start in starts}
    return np.array(sorted(hashes), dtype=np.uint64)


def jaccard(a: UInt64[np.ndarray, " n"], b: UInt64[np.ndarray, " m"]) -> float:
    """How much two sets overlap: what both have, as a share of what either has."""
    n_both = len(np.intersect1d(a, b, assume_unique=True))
    return n_both / (len(a) + len(b) - n_both)


def _is_new(text: str, seen: set[int]) -> bool:
    """Was nothing like it there before? From now on it was."""
    n_before = len(seen)
    seen.add(hash64(text))
    return len(seen) > n_before
