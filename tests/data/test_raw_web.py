"""The raw web: deterministic, dirty in every way that the recipe knows, and full of tales."""

from collections import Counter
from functools import cache
from itertools import islice
from random import Random

import pytest

from minillama.data.documents import SOURCES, Document
from minillama.data.heuristics import sentences
from minillama.data.raw_web import PLANTERS, raw
from minillama.data.raw_web_pages import fresh_stories, shuffled
from minillama.data.tales import check


def test_there_is_a_planter_for_each_source_of_the_table():
    assert tuple(PLANTERS) == SOURCES


@cache
def web(source: str) -> list[Document]:
    return list(raw(source))


@pytest.mark.parametrize("source", PLANTERS)
def test_the_same_seed_plants_the_same_web(source):
    first, again, other = (list(islice(raw(source, seed), 20)) for seed in (5, 5, 6))
    assert first == again
    assert [d.text for d in first] != [d.text for d in other]


@pytest.mark.parametrize("source", PLANTERS)
def test_every_document_says_what_was_planted_and_has_a_name_of_its_own(source):
    documents = web(source)
    assert all(d.source == source for d in documents)
    assert all(isinstance(d.meta["planted"], str) for d in documents)
    assert all(isinstance(d.meta["keep"], bool) for d in documents)
    assert len({d.id for d in documents}) == len(documents)
    assert {d.meta["keep"] for d in documents} == {True, False}


@pytest.mark.parametrize("source", ["commoncrawl", "c4"])
def test_what_is_to_be_kept_are_tales(source):
    kept = [d.meta.get("expected", d.text) for d in web(source) if d.meta["keep"]]
    assert all(check(line) for page in kept[:50] for line in page.split("\n"))


@pytest.mark.parametrize("source", ["commoncrawl", "c4", "books"])
def test_each_kind_is_there_at_least_three_times(source):
    counts = Counter(d.meta["planted"] for d in web(source))
    assert counts.pop("notices", 1) == 1
    assert min(counts.values()) >= 3


def test_fresh_stories_have_no_three_sentences_in_a_row_in_common():
    told = list(islice(fresh_stories(Random(1)), 300))
    seen = set[tuple[str, ...]]()
    for story in told:
        parts = sentences(story)
        spans = {tuple(parts[i : i + 3]) for i in range(len(parts) - 2)}
        assert not spans & seen
        seen |= spans
        assert check(story)


def test_shuffled_is_every_item_once():
    items = list(range(50))
    assert sorted(shuffled(Random(1), items)) == items != shuffled(Random(1), items)


def test_an_unknown_source():
    with pytest.raises(ValueError, match="no source 'usenet': it is one of commoncrawl, c4"):
        next(raw("usenet"))
