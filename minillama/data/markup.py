"""Spans of mark-up: what stands between an opening and its closing, found in linear time."""

import re


def cut_spans(text: str, opening: str, closing: str) -> str:
    r"""The text without its spans from `opening` to the next `closing`, both regular expressions.

    An opening that never closes stays as text: a page that lost its last ``-->`` loses nothing
    more. The obvious ``re.sub("<!--.*?-->", ...)`` takes quadratic time there, for each opening
    searches to the end of the page in vain; so the search ends with the last closing.
    """
    ends = [match.end() for match in re.finditer(closing, text, re.IGNORECASE)]
    last = ends[-1] if ends else 0
    span = f"(?is:{opening}.*?{closing})"
    return re.sub(span, "", text[:last]) + text[last:]
