"""Text to learn from and text to encode: every script and every character that has its own rule."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# How many random texts: quickly in every run, and as many as the project promises.
FEW_AND_MANY = [300, pytest.param(10_000, marks=pytest.mark.slow)]

TEXT = (
    """Once upon a time there was a llama. The llama went to the old town, and the town was old.
Die größten Äpfel kosten 12,50 €; naïve cafés – déjà vu! It's 100% sure: 3 + 4 = 7, 1999 or 2023.
Ελληνικά και Αγγλικά, Ελληνικά και Λατινικά. Привет, мир! Привет всем, мир прекрасен.
吾輩は猫である。名前はまだ無い。コンピューターは速い。日本語とEnglishが混ざる。東京の日本語。
안녕하세요 세계 안녕 · हिन्दी में लिखा है, हिन्दी · שלום עולם שלום · مرحبا بالعالم مرحبا
def double(x):
    return 2 * x  # twice
\tif double(x) == 10:    y[3] -= 0x1F
😀😀 🦙 ❤️ a\u0301e\u0301 a\u0301 x² ½ ａｂ １２ <s> </s> <0x0A> ▁ a▁b
"""
    * 3
)

SNIPPETS = [
    *(
        "llama",
        "The ",
        " the",
        "old town",
        "größten",
        "Ελληνικά",
        "мир",
        "吾輩は猫",
        "コンピューター",
    ),
    *(" ", "  ", "    ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028", "a b", "a  b"),
    *("0", "12", "2023", "3.14", "١٢", "１２", "½", "x²"),
    *("😀", "🦙", "❤️", "👩\u200d🚀", "🇯🇵", "e\u0301", "ﬁ", "\u200b", "\ufeff", "\ufffd"),
    *("\0", "\x01", "\x07", "\x1b[0m", "\x7f", "\u2585", "\U0010ffff", "\ue000"),
    *("<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "<pad>"),
]


def texts(pieces: tuple[str, ...] = (), spaced: str = "") -> st.SearchStrategy[str]:
    """Any Unicode, mixed with the snippets above and with pieces of a vocabulary.

    ``spaced`` names what may not occur: a U+2581 that is part of a piece becomes a space.
    """
    words = [piece.replace("▁", " ") for piece in pieces] or SNIPPETS
    any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=spaced))
    part = st.one_of(st.sampled_from(words), st.sampled_from(SNIPPETS), any_text)
    return st.lists(part, max_size=8).map("".join)


def for_many(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Run the check on so many examples; the number is a parameter of the test."""
    many = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    many(given(strategy)(check))()
