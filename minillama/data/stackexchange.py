"""Stack Exchange: questions and answers from HTML to text, the best answer first.

Source: Touvron et al. 2023a, sec. 2.1 (arXiv:2302.13971). Shown in notebooks/07_data.ipynb.
"""

import re
from collections.abc import Mapping, Sequence
from html import unescape

from minillama.data.markup import cut_spans

# The paper keeps the 28 largest sites and does not name them: see `largest_sites`.
N_SITES = 28

# The rest of a tag. A quoted value may hold ">", but nothing in it "<": so a tag that never closes
# is given up at the next one, and a page of nothing but "<a" is read in linear time.
REST = r"""(?:(?:[^<>"']|"[^"<]*"|'[^'<]*')*+>|[^<>]*>)"""
TAG = re.compile(f"<[/!?]?([a-zA-Z][a-zA-Z0-9]*){REST}")
PRE = re.compile(rf"(?is)<pre\b{REST}(.*?)(?:</pre\s*>|\Z)")
BLOCK = re.compile(
    "address|article|aside|blockquote|br|d[dlt]|div|figure|footer|form|h[1-6r]|header|li|main|nav"
    "|[ou]l|p|pre|section|table|t(?:body|d|foot|h|head|r)",
    re.IGNORECASE,
)


def strip_html(html: str) -> str:
    """The text of a page: a block's words on a line of their own, inline tags gone without a trace.

    Scripts, styles and comments vanish with their content. Runs of white space become one space,
    except in <pre>, whose lines and indents stay: they are code. Entities are decoded once and
    last, so what was written to be read as ``<b>`` stays to be read.

    Broken HTML loses no word: a script, style or comment that never closes keeps what follows it,
    a <pre> goes on to the end, and a tag without its ``>`` is text.
    """
    for name in ("script", "style"):
        html = cut_spans(html, rf"<{name}\b{REST}", rf"</{name}\s*>")
    html = cut_spans(html, "<!--", "-->")
    parts = PRE.split(html)
    parts[::2] = map(_flow, parts[::2])  # every second part is the inside of a <pre>
    parts[1::2] = [_untag(code).strip("\r\n") for code in parts[1::2]]
    return unescape("\n".join(part for part in parts if part.strip()))


def question_and_answers(title: str, body: str, answers: Sequence[tuple[int, str]]) -> str:
    """A thread as one document: the question, then its answers by score, the highest first.

    `title` is plain text, `body` and the answers (score, HTML) are stripped. Answers of equal score
    stay in the given order; one without a word is left out. That "Q:" and "A:" tell where each
    begins is our choice: the paper only says how answers are sorted.
    """
    ranked = sorted(answers, key=lambda answer: -answer[0])
    texts = [f"Q: {title.strip()}\n{strip_html(body)}".rstrip()]
    texts += [f"A: {text}" for _, html in ranked if (text := strip_html(html))]
    return "\n\n".join(texts)


def largest_sites(posts: Mapping[str, int], n: int = N_SITES) -> tuple[str, ...]:
    """The `n` sites with the most posts, the largest first; of equals the first by name.

    The paper took 28 and lists none of them, so a corpus states its sites by this count. Fewer
    than `n` are all taken. Raises ValueError unless n >= 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}: at least one site is needed, or no thread would be left.")
    return tuple(sorted(posts, key=lambda site: (-posts[site], site))[:n])


def _untag(html: str) -> str:
    return TAG.sub(lambda tag: "\n" if BLOCK.fullmatch(tag[1]) else "", html)


def _flow(html: str) -> str:
    """Text outside of <pre>, its entities still encoded: a decoded line break is no white space."""
    lines = _untag(re.sub(r"[ \t\r\n\f]+", " ", html)).split("\n")
    return "\n".join(re.sub(" +", " ", line).strip(" ") for line in lines if line.strip(" "))
