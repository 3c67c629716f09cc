"""Each rule takes away what was planted for it, and nothing else."""

import re
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from random import Random

import pytest
from matplotlib.figure import Figure

from minillama.data.curation import (
    RECIPES,
    Criteria,
    Report,
    Row,
    Rule,
    card,
    curate,
    on_new_text,
    on_text,
    recipe,
    toy_criteria,
    when,
)
from minillama.data.documents import SOURCES, Document
from minillama.data.duplicates import exact_duplicates
from minillama.data.raw_web import raw
from minillama.data.raw_web_pages import fresh_stories
from minillama.data.tales import SEED

# What is planted, and the rule that must find it: by dropping the document or changing it.
FOUND_BY = {
    "commoncrawl": {
        "duplicate line": "lines said before",
        "duplicate page": "lines said before",
        "foreign": "other languages",
        "gibberish": "unlikely text",
        "notices": "unlikely text",
        "advertisement": "unlike references",
    },
    "c4": {
        "menu line": "lines without an end",
        "short line": "lines under 5 words",
        "javascript line": "JavaScript warnings",
        "placeholder": "lorem ipsum",
        "code": "curly brackets",
        "bad word": "bad words",
        "foreign": "other languages",
        "repeated span": "spans said before",
        "too short": "under 3 sentences",
    },
    "books": {"near copy": "over 90% the same"},
    "github": {
        "other licence": "other licences",
        "minified": "long lines",
        "data": "long lines",
        "drawing": "few letters",
        "licence header": "licence headers",
        "copy": "files said before",
    },
    "wikipedia": {"no such language": "other languages", "redirect": "mark-up"},
    "arxiv": {"explosion": "preamble and macros"},
    "stackexchange": {"small site": "small sites"},
}


SLOW = ("commoncrawl", "arxiv")  # to curate twice


@pytest.fixture(scope="module")
def criteria() -> Criteria:
    return toy_criteria()


@dataclass
class Run:
    """One source, curated rule by rule."""

    raw: list[Document]
    out: list[Document]
    report: Report
    changed_by: dict[str, list[str]]  # document's id -> rules
    dropped_by: dict[str, str]


def run(source: str, rules: Sequence[Rule], seed: int = SEED) -> Run:
    documents = list(raw(source, seed))
    done = Run(documents, documents, Report(), {}, {})
    for rule in rules:
        before = {document.id: document.text for document in done.out}
        done.out = list(curate(source, done.out, report=done.report, rules=[rule]))
        after = {document.id: document.text for document in done.out}
        done.dropped_by |= dict.fromkeys(before.keys() - after.keys(), rule.name)
        for name in after:
            if after[name] != before[name]:
                done.changed_by.setdefault(name, []).append(rule.name)
    return done


@pytest.fixture(scope="module")
def runs(criteria) -> dict[str, Run]:
    return {source: run(source, recipe(source, criteria)) for source in SOURCES}


def mistakes(done: Run) -> Counter[str]:
    """Kinds of documents that are not as planted: kept, dropped or changed by mistake."""
    out = {document.id: document.text for document in done.out}
    wrong = Counter[str]()
    for document in done.raw:
        expected = document.meta.get("expected", document.text) if document.meta["keep"] else None
        wrong[document.meta["planted"]] += out.get(document.id) != expected
    return +wrong


# --- What was planted ----------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_every_defect_is_removed_and_every_good_document_kept(runs, source):
    assert not mistakes(runs[source])


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_another_web_is_cleaned_as_well(criteria, source):
    for seed in range(3):
        assert not mistakes(run(source, recipe(source, criteria), seed))


@pytest.mark.parametrize("source", SOURCES)
def test_each_kind_is_found_by_the_rule_that_is_meant_for_it(runs, source):
    done, kinds = runs[source], set()
    for document in done.raw:
        kind = document.meta["planted"]
        if rule := FOUND_BY[source].get(kind):
            kinds.add(kind)
            if document.meta["keep"]:
                assert done.changed_by[document.id] == [rule], kind
            else:
                assert done.dropped_by[document.id] == rule, kind
        elif kind == "good":
            assert set(done.changed_by.get(document.id, ())) <= {"HTML and order"}
    assert kinds == set(FOUND_BY[source])


@pytest.mark.parametrize(
    ("source", "rule"),
    [(source, rule) for source in ("c4", "books", "github") for rule in FOUND_BY[source].values()],
)
def test_without_a_rule_what_was_planted_for_it_is_left(criteria, source, rule):
    rules = recipe(source, criteria)
    kept = [r for r in rules if r.name != rule]
    assert len(kept) == len(rules) - 1
    meant = {kind for kind, name in FOUND_BY[source].items() if name == rule}
    assert meant <= set(mistakes(run(source, kept)))


def test_every_rule_changes_or_drops_at_least_three_documents(runs):
    for done in runs.values():
        for row in done.report.rows:
            assert row.changed + row.documents_in - row.documents_out >= 3, row.rule


# --- The pipeline --------------------------------------------------------------------------------


def test_there_is_a_recipe_for_each_source_in_the_order_of_the_table():
    assert tuple(RECIPES) == SOURCES


def test_a_recipe_has_no_two_rules_of_one_name_and_at_most_one_memory(criteria):
    for source in SOURCES:
        rules = recipe(source, criteria)
        assert len({rule.name for rule in rules}) == len(rules)
        assert sum(rule.seen is not None or rule.whole for rule in rules) <= 1


def test_each_run_begins_with_an_empty_memory():
    texts = [Document("Ada"), Document("Ada")]
    for _ in range(2):
        rules = (on_new_text("copies", exact_duplicates),)
        assert list(curate("c4", texts, rules=rules)) == texts[:1]
    rules = recipe("github", Criteria())
    assert not any(rule.seen for rule in rules)


def test_documents_stream_one_by_one():
    def pages() -> Iterator[Document]:
        for number in range(100):
            taken.append(number)
            yield Document(f"Page {number} is here. It is long. It is good.")

    taken: list[int] = []
    rules = tuple(rule for rule in recipe("c4", Criteria()) if rule.name != "spans said before")
    stream = curate("c4", pages(), rules=rules)
    assert taken == []  # nothing is read before it is asked for
    next(stream)
    assert taken == [0]


def test_what_a_rule_leaves_empty_is_dropped():
    rule = on_text("blank", lambda text: text.replace("x", " "))
    assert [d.text for d in rule([Document("xx"), Document("ax"), Document("")])] == ["a "]


def test_a_condition_looks_at_the_whole_document():
    rule = when("scores", lambda document: document.meta["score"] > 1)
    assert [d.text for d in rule([Document("a", meta={"score": n}) for n in (1, 2)])] == ["a"]


@pytest.mark.parametrize("source", [source for source in SOURCES if source not in SLOW])
def test_the_rules_never_read_what_was_planted(criteria, runs, source):
    told = ("planted", "keep", "expected")
    blind = (
        replace(d, meta={k: v for k, v in d.meta.items() if k not in told})
        for d in runs[source].raw
    )
    out = [(d.id, d.text) for d in curate(source, blind, criteria)]
    assert out == [(d.id, d.text) for d in runs[source].out]


def peak_and_hashes(n: int) -> tuple[int, int]:
    """Bytes at the peak while n pages stream by, and hashes at the end."""
    page = "\n".join(islice(fresh_stories(Random(1)), 3))
    rules = recipe("c4", Criteria())
    (seen,) = (rule.seen for rule in rules if rule.seen is not None)
    documents = (Document(f"This page has the number {i:04}.\n{page}") for i in range(n))
    tracemalloc.start()
    n_kept = sum(1 for _ in curate("c4", documents, report=Report(), rules=rules))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_kept == 1
    return peak, len(seen)


def test_memory_does_not_grow_with_the_corpus_but_for_the_hashes():
    """Ten times the pages, all with the same sentences: the same hashes, and the same peak."""
    peak_and_hashes(1)  # what is loaded once
    (few, hashes), (many, more_hashes) = peak_and_hashes(3), peak_and_hashes(30)
    assert more_hashes == hashes
    assert many < 1.1 * few


# --- The report ----------------------------------------------------------------------------------


def small_report() -> Report:
    report = Report()
    texts = ["Ada", "Bé!", "Ada", "Ben"]
    rules = (
        on_new_text("copies", exact_duplicates),
        on_text("marks", lambda text: text.rstrip("!")),
        when("Ben", lambda document: document.text != "Ben"),
    )
    out = curate("c4", [Document(text) for text in texts], report=report, rules=rules)
    assert [document.text for document in out] == ["Ada", "Bé"]
    return report


def test_counts_by_hand():
    rows = small_report().rows
    assert rows == [
        Row("c4", "copies", 4, 3, 13, 10, 0, ["Ada"]),
        Row("c4", "marks", 3, 3, 10, 9, 1, []),
        Row("c4", "Ben", 3, 2, 9, 6, 0, ["Ben"]),
    ]


def test_what_comes_out_of_a_rule_goes_into_the_next(runs):
    for done in runs.values():
        rows = done.report.rows
        for before, after in pairwise(rows):
            assert before.documents_out == after.documents_in
            assert before.bytes_out == after.bytes_in
        assert rows[0].documents_in == len(done.raw)
        assert rows[0].bytes_in == sum(len(d.text.encode()) for d in done.raw)
        assert rows[-1].documents_out == len(done.out)
        assert rows[-1].bytes_out == sum(len(d.text.encode()) for d in done.out)


def test_no_more_than_three_examples_are_kept_and_only_their_beginning():
    report = Report()
    documents = [Document(f"{i}" * 1000) for i in range(5)]
    list(curate("c4", documents, report=report, rules=(when("none", lambda _: False),)))
    assert report.rows[0].dropped == [f"{i}" * 200 for i in range(3)]


def test_the_table_says_every_rule_and_number():
    lines = str(small_report()).splitlines()
    assert [line.split() for line in lines] == [
        ["rule", "documents", "changed", "bytes"],
        ["c4", "copies", "4", ">", "3", "0", "13", ">", "10"],
        ["marks", "3", ">", "3", "1", "10", ">", "9"],
        ["Ben", "3", ">", "2", "0", "9", ">", "6"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_reports_of_parts_add_up():
    documents = list(raw("wikipedia"))
    parts = []
    for half in (documents[:40], documents[40:]):
        report = Report()
        list(curate("wikipedia", half, report=report))
        parts.append(report.to_dict())
    whole = Report()
    list(curate("wikipedia", documents, report=whole))
    assert Report.merged(parts) == whole


def test_the_waterfall_shows_what_is_left_and_what_was_taken_away():
    figure = small_report().waterfall()
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    left, taken = axes.patches[::2], axes.patches[1::2]
    assert [bar.get_width() * 13 for bar in left] == pytest.approx([10, 9, 6])
    assert [bar.get_width() * 13 for bar in taken] == pytest.approx([3, 1, 3])
    assert [bar.get_x() * 13 for bar in taken] == pytest.approx([10, 9, 6])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["c4: copies", "c4: marks", "c4: Ben"]


def test_a_report_of_nothing_has_no_figure():
    with pytest.raises(ValueError, match="nothing to draw"):
        Report().waterfall()


def test_the_card_has_every_number_and_what_to_be_careful_about():
    text = card(small_report())
    assert "| c4 | 4 | 2 | 13 | 6 |" in text
    assert "| c4 | copies | 1 | 0 | 3 |" in text
    assert "| c4 | marks | 0 | 1 | 1 |" in text
    for word in ("**Licence.**", "**Personal data.**", "**Bias.**"):
        assert word in text
    assert not re.search(r"20[234]\d-\d\d", text)  # no date: the same every time
    assert text == card(small_report())


# --- Bad input -----------------------------------------------------------------------------------


def test_a_source_without_a_recipe():
    with pytest.raises(
        ValueError, match=r"no recipe for the source 'usenet'. There is one for each"
    ):
        curate("usenet", [])


def test_a_crawl_needs_good_text_to_compare_with():
    with pytest.raises(ValueError, match=r"commoncrawl are compared with good text.*Criteria\.fit"):
        curate("commoncrawl", [])


def test_a_language_that_is_none():
    with pytest.raises(ValueError, match="The language 'english'"):
        curate("c4", [], Criteria(language="english"))


@pytest.mark.parametrize("answers", [3, ["text"], [["many", "text"]], [[1, "a", "b"]]])
def test_answers_that_cannot_be_sorted(answers):
    thread = Document("How?", "stackexchange", "17", {"answers": answers})
    with pytest.raises(ValueError, match=r"question 17 of stackexchange .* \[score, HTML\] pairs"):
        list(curate("stackexchange", [thread]))


def test_a_document_that_says_nothing_of_itself_is_judged_by_that():
    assert not list(curate("github", [Document("print(1)")]))  # no licence
    assert not list(curate("wikipedia", [Document("Text.")]))  # no language
    assert [d.text for d in curate("stackexchange", [Document("<p>How?</p>")])] == ["Q: \nHow?"]
