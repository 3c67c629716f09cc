"""C4's rules of thumb for web pages: what is prose, told by punctuation and length.

Each is a function from a page to what is left of it, or None. They need no model and no other page,
and they are blunt: poems, code and dialects go with the menus. A list of bad words is blunter
still: C4's own was found to remove pages by and about minorities (Dodge et al. 2021,
arXiv:2104.08758), so here the list is an argument, and none is built in.

Source: Raffel et al. 2020 (arXiv:1910.10683), sec. 2.2. Shown in notebooks/07_data.ipynb.
"""

import re
from collections.abc import Callable, Collection

MIN_WORDS = 5  # per line
MIN_SENTENCES = 3  # per page
# What may stand after the last word of a sentence: a mark, and quotes or brackets that close.
SENTENCE = re.compile(r"""[^.!?]*[.!?]+["'”’)\]]*|[^.!?]+$""")
SENTENCE_END = (".", "!", "?", '"', "”")


def sentences(line: str) -> list[str]:
    """A line, cut behind each ., ! or ? and the quotes that follow it."""
    return [found for match in SENTENCE.finditer(line) if (found := match[0].strip())]


def ended_lines(page: str) -> str | None:
    """The lines that end like a sentence; menus, headings and buttons do not."""
    return _lines(page, lambda line: line.rstrip().endswith(SENTENCE_END))


def long_lines(page: str) -> str | None:
    """The lines of at least five words."""
    return _lines(page, lambda line: len(line.split()) >= MIN_WORDS)


def lines_without_javascript(page: str) -> str | None:
    """The lines that do not ask to switch on JavaScript."""
    return _lines(page, lambda line: "javascript" not in line.lower())


def without_placeholder(page: str) -> str | None:
    """None for a page that is filled with "lorem ipsum"."""
    return None if "lorem ipsum" in page.lower() else page


def without_code(page: str) -> str | None:
    """None for a page with a curly bracket: programs have them, and prose has not."""
    return None if "{" in page else page


def without_words(page: str, bad_words: Collection[str]) -> str | None:
    """None for a page with one of these words (in lower case) as a word of its own."""
    return None if not set(bad_words).isdisjoint(re.findall(r"\w+", page.lower())) else page


def enough_sentences(page: str) -> str | None:
    """None for a page of fewer than three sentences."""
    n_sentences = sum(len(sentences(line)) for line in page.split("\n"))
    return page if n_sentences >= MIN_SENTENCES else None


def _lines(page: str, keep: Callable[[str], bool]) -> str | None:
    return "\n".join(line for line in page.split("\n") if keep(line)) or None
