"""The raw web's pages and books: the toy world's tales under the dirt of a crawl.

See `minillama.data.raw_web` for what each document says in its meta. Shown in
notebooks/07_data.ipynb.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import TypeVar

from minillama.data.documents import Document
from minillama.data.duplicates import normalise
from minillama.data.heuristics import sentences
from minillama.data.tales import HEROES, THINGS, tell

T = TypeVar("T")

# --- What the dirt is made of --------------------------------------------------------------------

NOTICES = (  # stand on many pages, each time with other numbers
    "You are visitor number {n} of this page.",
    "All rights reserved, 2023, page {n}.",
    "Share this page with {n} of your friends!",
)

FOREIGN = (
    (
        "Am Morgen ging {hero} allein an den Fluss hinunter.",
        "Das Wasser war kalt und ganz still.",
        "Unter der alten Brücke schlief eine graue Katze.",
        "{hero} setzte sich daneben und wartete auf die Sonne.",
        "Später kamen noch zwei Kinder mit einem Boot.",
    ),
    (
        "Ce matin, {hero} est descendue seule vers la rivière.",
        "L'eau était froide et tout à fait calme.",
        "Sous le vieux pont dormait un chat gris.",
        "{hero} s'est assise à côté pour attendre le soleil.",
        "Plus tard, deux enfants sont arrivés avec un bateau.",
    ),
    (
        "Por la mañana {hero} bajó sola hasta el río.",
        "El agua estaba fría y muy tranquila.",
        "Debajo del puente viejo dormía un gato gris.",
        "{hero} se sentó a su lado para esperar el sol.",
        "Más tarde llegaron dos niños con una barca.",
    ),
    (
        "La mattina {hero} scese da sola fino al fiume.",
        "L'acqua era fredda e molto tranquilla.",
        "Sotto il vecchio ponte dormiva un gatto grigio.",
        "{hero} si sedette lì vicino ad aspettare il sole.",
        "Più tardi arrivarono due bambini con una barca.",
    ),
    (
        "Rano {hero} zeszła sama nad rzekę.",
        "Woda była zimna i zupełnie spokojna.",
        "Pod starym mostem spał szary kot.",
        "{hero} usiadła obok i czekała na słońce.",
        "Później przyszło jeszcze dwoje dzieci z łódką.",
    ),
    (
        "朝、{hero}はひとりで川まで歩いた。",
        "水は冷たくて、とても静かだった。",
        "古い橋の下で灰色の猫が眠っていた。",
        "{hero}はそのそばに座って、日の出を待った。",
        "やがて子どもが二人、小さな舟に乗ってやって来た。",
    ),
)

PRAISE = ("amazing", "brilliant", "cheap", "deluxe", "exclusive", "gorgeous", "superb", "unique")
ADVERTS = (
    "Buy our {praise} {thing} plus an extra {praise} {thing}, and pay half price!",
    "Sale: {praise} {thing}, {praise} {thing}, free delivery within hours!",
    "Click here to order your {praise} {thing} or {praise} {thing} online!",
    "Our customers rate this {praise} {thing} above any {praise} {thing}!",
)

MENU = ("Home | Stories | About", "Log in to leave a comment", "Next page »", "Top 10 tales")
SHORT = ("Read more here.", "Sign up now!", "Is this you?", "All done.")
JAVASCRIPT = (
    "Please enable JavaScript to read the comments on this page.",
    "This page needs Javascript to show you all of its pictures.",
)
PLACEHOLDER = "Lorem ipsum dolor sit amet, consectetur adipiscing elit."
CODE = 'Write "{" before the first line of it and "}" behind the last.'
BAD_WORDS = frozenset({"blasted", "dratted"})  # as bad as words get in the toy world
SITES = frozenset({"farm", "harbour", "kitchen"})  # the largest of the toy world's Stack Exchange
CURSE = "That {word} {thing} was not worth the walk."


# --- The planters --------------------------------------------------------------------------------


def commoncrawl(rng: Random) -> Iterator[Document]:
    """Pages of a crawl, a paragraph a line: what CCNet's steps and the two classifiers are for."""
    stories, pages, printed = fresh_stories(rng), list[str](), set[str]()
    # The first of each notice is no duplicate; its page has nothing else.
    notices = "\n".join(notice.format(n=100) for notice in NOTICES)
    yield _plant(notices, "commoncrawl", "notices", keep=False)
    kinds = {"good": 120, "duplicate line": 30, "duplicate page": 20}
    kinds |= {"foreign": 60, "gibberish": 50, "advertisement": 80}
    for kind in _kinds(rng, kinds):
        page = "\n".join(next(stories) for _ in range(2 + int(rng.random() * 3)))
        if kind == "good":
            pages.append(page)
            yield _plant(page, "commoncrawl", kind)
        elif kind == "duplicate line":
            notice = pick(rng, NOTICES).format(n=100 + int(rng.random() * 900))
            yield _plant(f"{page}\n{notice}", "commoncrawl", kind, expected=page)
        elif kind == "duplicate page":
            copy = pick(rng, pages).upper().replace(".", " .")
            yield _plant(copy, "commoncrawl", kind, keep=False)
        elif kind == "foreign":
            wordings = shuffled(rng, pick(rng, FOREIGN))
            foreign = " ".join(wordings).format(hero=f"{pick(rng, HEROES)} {pick(rng, HEROES)}")
            yield _plant(foreign, "commoncrawl", kind, keep=False)
        elif kind == "gibberish":
            salad = "\n".join(" ".join(shuffled(rng, line.split())) for line in page.split("\n"))
            yield _plant(salad, "commoncrawl", kind, keep=False)
        else:
            adverts = [_fill(rng, advert, printed) for advert in shuffled(rng, ADVERTS)]
            advertised = "\n".join([*page.split("\n")[:2], *adverts[:3]])
            yield _plant(advertised, "commoncrawl", kind, keep=False)


def c4(rng: Random) -> Iterator[Document]:
    """Pages of a crawl again: what C4's heuristics are for."""
    stories, pages = fresh_stories(rng), list[str]()
    kinds = [
        *("menu line", "short line", "javascript line", "repeated span", "foreign"),
        *("placeholder", "code", "bad word", "too short"),
    ]
    for kind in _kinds(rng, {"good": 60} | dict.fromkeys(kinds, 5)):
        lines = [next(stories) for _ in range(2)]
        page = "\n".join(lines)
        dirt = {
            "menu line": pick(rng, MENU),
            "short line": pick(rng, SHORT),
            "javascript line": pick(rng, JAVASCRIPT),
        }
        if kind == "good":
            pages.append(page)
            yield _plant(page, "c4", kind)
        elif kind in dirt:
            dirty = "\n".join([lines[0], dirt[kind], lines[1]])
            yield _plant(dirty, "c4", kind, expected=page)
        elif kind == "repeated span":
            told = sentences(pick(rng, pages).split("\n")[0])
            start = int(rng.random() * (len(told) - 3))  # not the end: what follows may repeat too
            dirty = "\n".join([lines[0], " ".join(told[start : start + 3]), lines[1]])
            yield _plant(dirty, "c4", kind, expected=page)
        elif kind == "foreign":
            foreign = " ".join(pick(rng, FOREIGN[:5])).format(hero=pick(rng, HEROES))
            yield _plant(foreign, "c4", kind, keep=False)
        elif kind == "too short":
            yield _plant(" ".join(sentences(lines[0])[:2]), "c4", kind, keep=False)
        else:
            curse = CURSE.format(word=pick(rng, sorted(BAD_WORDS)), thing=pick(rng, THINGS))
            added = {"placeholder": PLACEHOLDER, "code": CODE, "bad word": curse}[kind]
            yield _plant(f"{page}\n{added}", "c4", kind, keep=False)


def books(rng: Random) -> Iterator[Document]:
    """Books of thirty tales: some appear again in another edition, some share half with another."""
    stories, written = fresh_stories(rng), list[list[str]]()
    for kind in _kinds(rng, {"good": 16, "near copy": 5, "half copy": 4}):
        tales = [next(stories) for _ in range(30)]
        if kind == "good":
            written.append(tales)
            yield _plant("\n\n".join(tales), "books", kind)
        elif kind == "near copy":  # a word in 150, and a line in front
            words = "\n\n".join(pick(rng, written)).split(" ")
            for _ in range(len(words) // 150):
                words[int(rng.random() * len(words))] = "indeed"
            copy = f"The second edition, {1900 + int(rng.random() * 100)}.\n\n{' '.join(words)}"
            yield _plant(copy, "books", kind, keep=False)
        else:
            half = pick(rng, written)[:15]
            yield _plant("\n\n".join([*half, *tales[:15]]), "books", kind)


# --- Their tools ---------------------------------------------------------------------------------


def fresh_stories(rng: Random) -> Iterator[str]:
    """Tales without end, of which no two have three sentences in a row in common."""
    told = set[str]()
    while True:
        story = tell(rng)
        parts = [normalise(sentence) for sentence in sentences(story)]
        spans = {" ".join(parts[start : start + 3]) for start in range(len(parts) - 2)}
        if told.isdisjoint(spans):
            told |= spans
            yield story


def pick(rng: Random, options: Sequence[T]) -> T:
    """One of them, by chance."""
    # Of all methods of Random, only random() is promised to repeat its numbers in later Pythons.
    return options[int(rng.random() * len(options))]


def shuffled(rng: Random, items: Iterable[T]) -> list[T]:
    """All of them, in an order of chance."""
    options = list(items)
    order = sorted((rng.random(), place) for place in range(len(options)))
    return [options[place] for _, place in order]


def _kinds(rng: Random, counts: dict[str, int]) -> list[str]:
    """Each kind as often as it counts, in an order of chance; but a good document comes first."""
    kinds = shuffled(rng, [kind for kind, n in counts.items() for _ in range(n)])
    kinds.remove("good")
    return ["good", *kinds]


def _fill(rng: Random, wording: str, printed: set[str]) -> str:
    """Each {field} becomes a word of its kind, until the line is none that was printed before."""
    words, line = {"thing": THINGS, "praise": PRAISE}, ""
    while not line or line in printed:
        line = re.sub(r"\{(\w+)\}", lambda field: pick(rng, words[field[1]]), wording)
    printed.add(line)
    return line


def _plant(
    text: str, source: str, planted: str, keep: bool = True, expected: str | None = None
) -> Document:
    meta = {"planted": planted, "keep": keep}
    return Document(text, source, meta=meta | ({} if expected is None else {"expected": expected}))
