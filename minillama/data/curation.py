"""LLaMA's data recipe: for each source a list of rules, through which its documents stream.

    for document in curate("c4", read_jsonl("raw/c4.jsonl"), report=report):
        ...
    print(report)

One document at a time is in memory. What grows with the corpus are the hashes by which duplicates
are known: one for each line of commoncrawl, each sentence of c4, each file of github, and each word
of the books that stay. A hash has 8 bytes, and in Python's sets some 100 (in those of books, 8).

Source: Touvron et al. 2023a, sec. 2.1 (arXiv:2302.13971). Shown in notebooks/07_data.ipynb.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import islice
from typing import Any

from matplotlib.figure import Figure

from minillama.data import (
    duplicates,
    github,
    heuristics,
    language,
    latex,
    raw_web,
    raw_web_pages,
    stackexchange,
    tales,
    wikipedia,
)
from minillama.data.documents import SOURCES, Document
from minillama.data.ngram import QualityFilter
from minillama.data.reference import ReferenceClassifier

N_EXAMPLES, EXAMPLE_LENGTH = 3, 200  # of dropped documents, in the report; characters

# --- Rules ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A name, and what to do with a document: give it back, as it is or changed, or None.

    A rule that asks what was there before shares its memory ``seen`` with ``change``; one that has
    another kind of memory must see its source from one end to the other (``whole``).
    """

    name: str
    change: Callable[[Document], Document | None]
    seen: set[int] | None = None
    whole: bool = False

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that stay, as they come."""
        return (changed for document in documents if (changed := self.change(document)) is not None)


def on_text(name: str, change: Callable[[str], str | None]) -> Rule:
    """A rule that looks at the text alone; a document of which nothing is left is dropped."""

    def change_document(document: Document) -> Document | None:
        text = change(document.text)
        return document.with_text(text) if text and not text.isspace() else None

    return Rule(name, change_document)


def on_new_text(name: str, change: Callable[[str, set[int]], str | None]) -> Rule:
    """A rule that also knows the hashes of what was there before, and adds to them."""
    seen = set[int]()
    return replace(on_text(name, lambda text: change(text, seen)), seen=seen)


def when(name: str, keep: Callable[[Document], bool]) -> Rule:
    """A rule that keeps the documents of which something is true."""
    return Rule(name, lambda document: document if keep(document) else None)


# --- The recipe ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Criteria:
    """What the rules must learn, or be told, before they can judge."""

    quality: QualityFilter | None = None  # needed for commoncrawl
    references: ReferenceClassifier | None = None  # needed for commoncrawl
    bad_words: Collection[str] = ()
    language: str = "en"  # of web pages
    sites: Collection[str] | None = None  # of Stack Exchange; None: all of them

    @classmethod
    def fit(cls, reference: Sequence[str], random_pages: Sequence[str], **told: Any) -> "Criteria":
        """Learn from good texts, such as an encyclopedia cites, and from pages as they come.

        Raises ValueError if there are fewer than ten good texts, or no page.
        """
        quality = QualityFilter.fit(reference)
        return cls(quality, ReferenceClassifier.fit(reference, random_pages), **told)


@cache
def toy_criteria() -> Criteria:
    """For the raw web of the toy world: good text is three of its tales."""
    told = tales.stories(3000, tales.SEED)
    reference = ["\n".join(islice(told, 3)) for _ in range(1000)]
    seeds = range(tales.SEED + 1, tales.SEED + 3)
    pages = [page.text for seed in seeds for page in raw_web.raw("commoncrawl", seed)]
    return Criteria.fit(
        reference, pages, bad_words=raw_web_pages.BAD_WORDS, sites=raw_web_pages.SITES
    )


def commoncrawl_rules(criteria: Criteria) -> tuple[Rule, ...]:
    """CCNet's three steps, and the classifier that LLaMA added."""
    if criteria.quality is None or criteria.references is None:
        raise ValueError(
            "pages of commoncrawl are compared with good text, and there is none to compare with. "
            "Give criteria that have seen some: Criteria.fit(reference, random_pages)."
        )
    return (
        on_new_text("lines said before", duplicates.duplicate_lines),
        _language_rule(criteria),
        on_text("unlikely text", criteria.quality.keep),
        on_text("unlike references", criteria.references.keep),
    )


def c4_rules(criteria: Criteria) -> tuple[Rule, ...]:
    """C4's heuristics: first what is wrong with a line, then what is wrong with the page."""
    bad_words = partial(heuristics.without_words, bad_words=criteria.bad_words)
    return (
        on_text("lines without an end", heuristics.ended_lines),
        on_text("lines under 5 words", heuristics.long_lines),
        on_text("JavaScript warnings", heuristics.lines_without_javascript),
        on_text("lorem ipsum", heuristics.without_placeholder),
        on_text("curly brackets", heuristics.without_code),
        on_text("bad words", bad_words),
        _language_rule(criteria),
        on_new_text("spans said before", duplicates.repeated_spans),
        on_text("under 3 sentences", heuristics.enough_sentences),
    )


def _language_rule(criteria: Criteria) -> Rule:
    language.check_known(criteria.language)
    return on_text("other languages", partial(language.only, wanted=criteria.language))


def github_rules(criteria: Criteria) -> tuple[Rule, ...]:
    """Code that may be taken, that people wrote, without its headers, once."""
    return (
        when("other licences", lambda file: github.is_permissive(file.meta.get("licence") or "")),
        when("long lines", lambda file: github.has_short_lines(file.text)),
        when("few letters", lambda file: github.is_alphanumeric(file.text)),
        on_text("licence headers", github.strip_header),
        on_new_text("files said before", duplicates.exact_duplicates),
    )


def wikipedia_rules(criteria: Criteria) -> tuple[Rule, ...]:
    """Articles in twenty languages, without their mark-up."""
    return (
        when("other languages", lambda page: page.meta.get("language") in wikipedia.LANGUAGES),
        on_text("mark-up", wikipedia.plain_text),
    )


def books_rules(criteria: Criteria) -> tuple[Rule, ...]:
    """No book twice."""
    return (Rule("over 90% the same", duplicates.NearDuplicates(0.9), whole=True),)


def arxiv_rules(criteria: Criteria) -> tuple[Rule, ...]:
    """Papers from the first section to the bibliography; without one whose macros never end."""

    def body(source: str) -> str | None:
        try:
            return latex.plain_latex(source)
        except ValueError:
            return None

    return (on_text("preamble and macros", body),)


def stackexchange_rules(criteria: Criteria) -> tuple[Rule, ...]:
    """Threads of the largest sites, without HTML, the best answer first."""

    def thread(question: Document) -> Document:
        meta = dict(question.meta)
        try:
            answers = [(int(score), str(html)) for score, html in meta.pop("answers", ())]
        except (TypeError, ValueError):
            raise ValueError(
                f"the question {question.id} of {question.source} has answers that are no list of "
                f"[score, HTML] pairs, by which they could be sorted. Write them so in its meta."
            ) from None
        text = stackexchange.question_and_answers(
            str(meta.get("title", "")), question.text, answers
        )
        return replace(question, text=text, meta=meta)

    sites = criteria.sites
    return (
        when("small sites", lambda page: sites is None or page.meta.get("site") in sites),
        Rule("HTML and order", thread),
    )


# For each source what makes its rules: anew for each run, for some of them remember.
RECIPES: dict[str, Callable[[Criteria], tuple[Rule, ...]]] = {
    "commoncrawl": commoncrawl_rules,
    "c4": c4_rules,
    "github": github_rules,
    "wikipedia": wikipedia_rules,
    "books": books_rules,
    "arxiv": arxiv_rules,
    "stackexchange": stackexchange_rules,
}


def recipe(source: str, criteria: Criteria) -> tuple[Rule, ...]:
    """The rules for a source, which have seen nothing yet.

    Raises ValueError for an unknown source, for commoncrawl without criteria that were fitted, and
    where a library of the extra `data` is missing.
    """
    if source not in RECIPES:
        raise ValueError(
            f"there is no recipe for the source {source!r}. There is one for each of "
            f"{', '.join(RECIPES)}: rename the file to what its documents are like."
        )
    return RECIPES[source](criteria)


def curate(
    source: str,
    documents: Iterable[Document],
    criteria: Criteria | None = None,
    report: "Report | None" = None,
    rules: Sequence[Rule] | None = None,
) -> Iterator[Document]:
    """The documents that survive the source's recipe, as they come; the report counts them.

    Only commoncrawl must have criteria: see `recipe` for what else is raised. ``rules`` replace the
    recipe.
    """
    stream = iter(documents)
    for rule in recipe(source, criteria or Criteria()) if rules is None else rules:
        row = Row(source, rule.name)
        if report is not None:
            report.rows.append(row)
        stream = _counted(rule, stream, row)
    return stream


def _counted(rule: Rule, documents: Iterator[Document], row: "Row") -> Iterator[Document]:
    for document in documents:
        changed = rule.change(document)
        row.count(document, changed)
        if changed is not None:
            yield changed


# --- The report ----------------------------------------------------------------------------------


@dataclass
class Row:
    """What one rule did to one source."""

    source: str
    rule: str
    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    changed: int = 0  # documents that came out with another text
    dropped: list[str] = field(default_factory=list)  # how the first few of them begin

    def count(self, document: Document, changed: Document | None) -> None:
        """One document that the rule has seen, and what it made of it."""
        self.documents_in += 1
        self.bytes_in += document.n_bytes
        if changed is None:
            if len(self.dropped) < N_EXAMPLES:
                self.dropped.append(document.text[:EXAMPLE_LENGTH])
            return
        self.documents_out += 1
        self.bytes_out += changed.n_bytes
        self.changed += changed.text != document.text

    def __add__(self, other: "Row") -> "Row":
        """Of two parts of a source, one after the other."""
        return Row(
            self.source,
            self.rule,
            self.documents_in + other.documents_in,
            self.documents_out + other.documents_out,
            self.bytes_in + other.bytes_in,
            self.bytes_out + other.bytes_out,
            self.changed + other.changed,
            [*self.dropped, *other.dropped][:N_EXAMPLES],
        )


@dataclass
class Report:
    """Documents and bytes, rule by rule; print it, or draw the `waterfall`."""

    rows: list[Row] = field(default_factory=list)

    @property
    def sources(self) -> list[str]:
        """The sources, in the order in which they were curated."""
        return list(dict.fromkeys(row.source for row in self.rows))

    def of(self, source: str) -> list[Row]:
        """The rows of one source, from raw to curated."""
        return [row for row in self.rows if row.source == source]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can say it."""
        return {"rows": [asdict(row) for row in self.rows]}

    @classmethod
    def merged(cls, parts: Iterable[dict[str, Any]]) -> "Report":
        """One report of many, each of a part of the sources and as `to_dict` has it, in order."""
        rows: dict[tuple[str, str], Row] = {}
        for part in parts:
            for row in (Row(**fields) for fields in part["rows"]):
                key = (row.source, row.rule)
                rows[key] = rows[key] + row if key in rows else row
        return cls(list(rows.values()))

    def __str__(self) -> str:
        head = f"{'':15}{'rule':<23}{'documents':>16}{'changed':>9}{'bytes':>25}"
        lines = [head]
        for source in self.sources:
            for i, row in enumerate(self.of(source)):
                n_documents = f"{row.documents_in:,} > {row.documents_out:,}"
                n_bytes = f"{row.bytes_in:,} > {row.bytes_out:,}"
                name = source if i == 0 else ""
                lines.append(
                    f"{name:<15}{row.rule:<23}{n_documents:>16}{row.changed:>9,}{n_bytes:>25}"
                )
        return "\n".join(lines)

    def waterfall(self, sources: Sequence[str] | None = None) -> Figure:
        """What is left of each source's bytes after each rule, and what the rule took away.

        Raises ValueError if there is nothing to draw.
        """
        drawn = [row for source in sources or self.sources for row in self.of(source)]
        if not drawn:
            raise ValueError("there is nothing to draw: no document was curated.")
        figure = Figure(figsize=(6, 0.8 + 0.22 * len(drawn)), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(drawn):
            whole = max(n for r in self.of(row.source) for n in (r.bytes_in, r.bytes_out, 1))
            left = row.bytes_out / whole
            taken = max(row.bytes_in - row.bytes_out, 0) / whole  # where answers join, it grows
            first = place == 0
            axes.barh(place, left, color="C0", label="left" if first else None)
            axes.barh(place, taken, left=left, color="C1", label="taken away" if first else None)
        labels = [f"{row.source}: {row.rule}" for row in drawn]
        axes.set_yticks(range(len(drawn)), labels, fontsize=8)
        axes.set(xlabel="share of the source's bytes", xlim=(0, 1), ylim=(len(drawn) - 0.4, -0.6))
        figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False)
        return figure


def licences(documents: Iterable[Document]) -> Counter[str]:
    """How many documents say in their meta which licence they are under."""
    return Counter(str(document.meta.get("licence", "not stated")) for document in documents)


def card(report: Report) -> str:
    """A data card in Markdown: what is there, how it came about, and what to be careful about."""
    tables = []
    for source in (name for name in SOURCES if name in report.sources):
        rows = report.of(source)
        tables.append(
            f"| {source} | {rows[0].documents_in:,} | {rows[-1].documents_out:,} "
            f"| {rows[0].bytes_in:,} | {rows[-1].bytes_out:,} |"
        )
    rules = [
        f"| {row.source} | {row.rule} | {row.documents_in - row.documents_out:,} "
        f"| {row.changed:,} | {row.bytes_in - row.bytes_out:,} |"
        for row in report.rows
    ]
    return CARD.format(sources="\n".join(tables), rules="\n".join(rules))


CARD = """\
# Curated text

Text for pretraining, cleaned source by source with the rules of LLaMA's data recipe (Touvron et
al. 2023, arXiv:2302.13971, sec. 2.1) by `minillama curate`. Each source is a file of JSON lines:
the text, its source, an id, and what was known about it.

| source | documents before | after | bytes before | after |
|---|---:|---:|---:|---:|
{sources}

## The rules

In this order; what a rule takes away, the next does not see. Where it takes a negative number of
bytes, answers joined their question. `report.json` has examples of what was dropped.

| source | rule | documents dropped | changed | bytes taken away |
|---|---|---:|---:|---:|
{rules}

## Before you use it

**Licence.** Curation changes no licence: each text keeps the one it came with. Of the rules, only
GitHub's asks for it; web pages and books are under their authors' copyright unless they say
otherwise. Find out before you share this folder, or a model that can recite it.

**Personal data.** No rule looks for names, addresses, telephone numbers or opinions of living
people, and the web is full of them. Whoever trains on it should be able to say why, to find a
person's data again (keep the ids), and to take it out.

**Bias.** "Like the reference texts" and "likely under a language model" also mean: by the people
and in the language of those who wrote them. What was dropped deserves a look.
"""
