from collections import Counter

import pytest

from minillama.data.curation import Criteria, curate, recipe
from minillama.data.documents import Document
from minillama.data.raw_web import raw
from minillama.data.raw_web_markup import HTML, MARKUP, PAPERS
from minillama.data.raw_web_pages import SITES
from minillama.data.tales import check

SOURCES = ("github", "wikipedia", "arxiv", "stackexchange")
CRITERIA = Criteria(sites=SITES)

# For each source, which rule drops which kinds; all others stay.
DROPPED = {
    "github": {
        "other licences": {"other licence"},
        "long lines": {"minified", "data"},
        "few letters": {"drawing"},
        "files said before": {"copy", "copy with a header"},
    },
    "wikipedia": {"other languages": {"no such language"}, "mark-up": {"redirect"}},
    "arxiv": {"preamble and macros": {"explosion"}},
    "stackexchange": {"small sites": {"small site"}},
}
# And which kinds come out of which rule with another text.
CHANGED = {
    "github": {"licence headers": {"licence header", "shebang", "copy with a header"}},
    "wikipedia": {"mark-up": {*MARKUP, "another language"}},
    "arxiv": {"preamble and macros": {*PAPERS, "verbatim", "own body"}},
    "stackexchange": {"HTML and order": {*HTML, "code", "no answer"}},
}


def kinds(documents: list[Document]) -> set[str]:
    return {document.meta["planted"] for document in documents}


@pytest.mark.parametrize("source", SOURCES)
def test_each_rule_removes_what_was_planted_for_it_and_nothing_else(source):
    documents = list(raw(source, seed=0))
    due = {d.id: d.meta.get("expected", d.text) for d in documents if d.meta["keep"]}
    dropped, changed = {}, {}
    for rule in recipe(source, CRITERIA):
        texts = {document.id: document.text for document in documents}
        left = list(rule(documents))
        gone = texts.keys() - {document.id for document in left}
        dropped[rule.name] = kinds([d for d in documents if d.id in gone])
        changed[rule.name] = kinds([d for d in left if d.text != texts[d.id]])
        documents = left
    assert {document.id: document.text for document in left} == due
    assert {rule: found for rule, found in dropped.items() if found} == DROPPED[source]
    assert {rule: found for rule, found in changed.items() if found} == CHANGED[source]


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_is_planted_at_least_three_times(source):
    counts = Counter(document.meta["planted"] for document in raw(source))
    assert min(counts.values()) >= 3


@pytest.mark.parametrize("source", SOURCES)
def test_dirt_and_what_should_come_of_it_differ(source):
    for document in raw(source):
        assert document.meta.get("expected") != document.text
        assert document.meta["keep"] or "expected" not in document.meta


def test_what_is_left_of_an_english_article_is_a_tale():
    articles = curate("wikipedia", raw("wikipedia"), CRITERIA)
    tales = [article.text for article in articles if article.meta["language"] == "en"]
    assert len(tales) > 50
    assert all(map(check, tales))


def test_papers_use_the_macros_that_they_define():
    bodies = Counter(
        command
        for paper in raw("arxiv")
        for command in (r"\chapter", r"\twice", r"\oneday[cold]", r"\oneday{", r"\same", r"\emph{")
        if command in paper.text.partition(r"\maketitle")[2]
    )
    assert len(bodies) == 6
    assert min(bodies.values()) >= 3
