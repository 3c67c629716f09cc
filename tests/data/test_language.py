import sys

import pytest

from minillama.data import language
from minillama.data.language import only
from minillama.data.raw_web_pages import FOREIGN
from minillama.data.tales import stories

OTHERS = ["de", "fr", "es", "it", "pl", "ja"]


@pytest.mark.parametrize(("wordings", "name"), list(zip(FOREIGN, OTHERS, strict=True)), ids=OTHERS)
def test_a_page_of_each_language_is_recognised(wordings, name):
    page = " ".join(wordings).format(hero="Mia")
    found, probability = language.language(page)
    assert found == name
    assert probability > 0.9
    assert only(page, "en") is None
    assert only(page, name) == page


def test_the_tales_are_english():
    assert all(only(story, "en") for story in stories(100, seed=3))


def test_a_text_without_words_is_in_no_language():
    assert language.language("12 + 7")[1] < 0.5
    assert only("", "en") is None


def test_the_threshold_counts():
    text = "The name of the hotel is Anna."
    probability = language.language(text)[1]
    assert only(text, "en", probability) == text
    assert only(text, "en", probability + 1e-6) is None


def test_a_language_that_is_none():
    with pytest.raises(ValueError, match=r"The language 'english' .* ISO 639 codes .*\ben\b"):
        language.check_known("english")
    language.check_known("uk")


def test_a_missing_library_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language._identifier.cache_clear()
    with pytest.raises(ValueError, match=r"py3langid, .* pip install 'minillama\[data\]'"):
        only("Ada", "en")
