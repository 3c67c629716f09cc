"""The toy world: a grammar that writes short stories, and a reader that checks them.

A language model is convincing when the end of its text still agrees with the beginning. Here that
can be measured: every story has a cast (who, what, where), each member of it comes back later, and
`check` tells whether all of them agree. One set of tables serves both ways: `tell` fills the slots
of a plot's sentences, `check` turns the same sentences into patterns and reads the slots back.

To add a plot, add an entry to PLOTS; to add a name, a thing or a place, add a word. A plot obeys
one rule, which the tests hold: whatever the wordings, at least two of its steps name each slot, so
that no word of the cast can be exchanged unnoticed.

Built in notebooks/07_data.ipynb.
"""

import argparse
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from string import Formatter
from typing import TypeVar

# --- The words -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """A name and the words for it: {hero} is "Mia", {hero.they} "she", {hero.their} "her"."""

    name: str
    child: str
    they: str
    them: str
    their: str

    def __str__(self) -> str:
        return self.name

    @property
    def They(self) -> str:
        return self.they.capitalize()

    @property
    def Their(self) -> str:
        return self.their.capitalize()


Word = str | Person
T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = _words("Ada Anna Clara Eva Ida Lena Mia Nora Rosa Zoe")
BOYS = _words("Ben Emil Finn Hugo Jon Leo Max Otto Paul Tom")
PEOPLE = (
    *(Person(name, "girl", "she", "her", "her") for name in GIRLS),
    *(Person(name, "boy", "he", "him", "his") for name in BOYS),
)
# Any word of a kind fits any sentence: each thing can be carried, lost, broken and mended.
THINGS = _words("basket bell boat box clock cup drum fiddle flute jug kite lamp puppet whistle")
COLOURS = _words("black blue brown green red silver white yellow")
PLACES = _words(
    "barn beach bridge church farm harbour lake market mill river school station tower well"
)
SPOTS = (
    "behind a tree",
    "behind a wall",
    "beside the path",
    "between two stones",
    "in the tall grass",
    "under a bench",
)
ANIMALS = _words("badger bear cat dog donkey fox goat goose hare pony")
TOOLS = _words("ladder net plank pole rope")
FOODS = _words("bread cheese fish honey jam pie porridge soup")
DAYS = _words("afternoon evening morning Friday Sunday")

# What may fill a slot. No two slots of a story share a word: the hero is not the friend.
SLOTS: dict[str, tuple[Word, ...]] = {
    "hero": PEOPLE,
    "friend": PEOPLE,
    "owner": PEOPLE,
    "thing": THINGS,
    "other": THINGS,
    "colour": COLOURS,
    "shade": COLOURS,
    "place": PLACES,
    "home": PLACES,
    "spot": SPOTS,
    "animal": ANIMALS,
    "tool": TOOLS,
    "food": FOODS,
    "day": DAYS,
}

# --- The plots -----------------------------------------------------------------------------------

Step = tuple[str, ...]  # wordings of one step of a story: exactly one of them is told
Plot = tuple[Step, ...]

PLOTS: dict[str, Plot] = {
    "lost": (  # what was lost is where the friend saw it
        (
            "{hero} lived in a small house by the {home}.",
            "In a small house by the {home} lived a {hero.child} called {hero}.",
            "There was once a {hero.child} called {hero}, who lived by the {home}.",
        ),
        (
            "{hero.They} had a {colour} {thing} and took it everywhere.",
            "Of all {hero.their} things {hero.they} loved a {colour} {thing} best.",
            "{hero.Their} best friend was a {colour} {thing}.",
        ),
        (
            "One {day} the {thing} was gone.",
            "But one {day} {hero.they} could not find the {thing}.",
            "One {day} {hero.they} looked for the {thing}, but it was gone.",
        ),
        (
            '"Have you seen my {thing}?" {hero.they} asked {friend}.',
            'So {hero.they} asked {friend}, "Have you seen my {thing}?"',
        ),
        (
            '"I saw something {colour} at the {place}," said {friend}.',
            '"There is something {colour} at the {place}," said {friend}.',
            '"No," said {friend}, "but I saw something {colour} at the {place}."',
        ),
        (
            "So they walked to the {place}.",
            "Together they went to the {place}.",
            "They took the long road to the {place}.",
        ),
        (
            "There, {spot}, lay the {thing}.",
            "They looked and looked, and there, {spot}, was the {thing}.",
            "And what lay there, {spot}? It was the {thing}.",
        ),
        (
            '"Now I know," said {hero}. "I played {spot} and forgot it."',
            '"I played {spot} and forgot it," said {hero}.',
            '"Who put it {spot}?" asked {hero}, but {hero.they} knew.',
        ),
        (
            "That {day} {hero} came home to the {home} with the {colour} {thing}.",
            "So, that {day}, {hero} brought the {colour} {thing} home to the {home}.",
            "By the {home}, that {day}, {hero} told the {colour} {thing} to stay at home.",
        ),
    ),
    "trade": (  # two things change hands
        (
            "{hero} and {friend} had been friends for years.",
            "{hero} had a good friend called {friend}.",
            "There were once two friends, {hero} and {friend}.",
        ),
        (
            "{hero} had a {colour} {thing}, and {friend} had a {shade} {other}.",
            "{hero} loved a {colour} {thing}, and {friend} loved a {shade} {other}.",
        ),
        (
            "One {day} they met at the {place}.",
            "One {day} they sat together at the {place}.",
            "They were at the {place} one {day}, and there was not much to do.",
        ),
        (
            "{hero} looked at the {other}, and {friend} looked at the {thing}.",
            "{hero} held the {other} for a while, and {friend} held the {thing}.",
        ),
        (
            '"I like your {other}," said {hero}.',
            '"What a good {other} you have," said {hero}.',
            '"I often think of your {other}," said {hero}.',
        ),
        (
            '"And I like your {thing}," said {friend}.',
            '"I have always wanted a {thing}," said {friend}.',
            '"And I would love to have your {thing}," said {friend}.',
        ),
        (
            "Then {hero} gave {friend} the {thing}, and {friend} gave {hero} the {other}.",
            "Then {friend} took the {thing}, and {hero} took the {other}.",
        ),
        (
            "So the {colour} {thing} went home with {friend}, and the {shade} {other} with {hero}.",
            "Now the {colour} {thing} was with {friend}, and the {shade} {other} was with {hero}.",
        ),
        (
            "They still talk about that {day} at the {place}.",
            "It was a good {day} at the {place}, and both slept well.",
            "Both often came back to the {place} to talk about that {day}.",
        ),
    ),
    "gift": (  # what was left behind comes after its owner
        (
            "{friend}, who lived by the {home}, had a birthday.",
            "It was a big day by the {home}, for {friend} had a birthday.",
            "By the {home} lived {friend}, and one day {friend.they} had a birthday.",
        ),
        (
            "{hero} had a {colour} {thing} for {friend.them}.",
            "{hero} wanted to bring {friend.them} a {colour} {thing}.",
            "{hero} had made {friend.them} a {colour} {thing}.",
        ),
        (
            "It was a long way, and at the {place} {hero.they} sat down and slept.",
            "Half way, at the {place}, {hero.they} sat down and looked at the birds.",
            "At the {place} {hero.they} met an old woman, and they talked and talked.",
        ),
        (
            "Only when {hero} saw the {home} did {hero.they} think of the {thing}.",
            "Then {hero} went on, but at the {home} the {thing} was gone.",
            "When {hero} came to the {home}, {hero.they} did not have the {thing}.",
        ),
        (
            "But who came down the road with the {thing}? It was a {animal}.",
            "Then a {animal} came down the road with the {thing}.",
            "Then a {animal} came, and it had the {thing}.",
        ),
        (
            '"You left this at the {place}," said the {animal}.',
            '"This was at the {place}, all alone," said the {animal}.',
        ),
        (
            "{hero} thanked the {animal} and knocked at the door.",
            "{hero} was so happy that the {animal} had to knock at the door.",
        ),
        (
            '"A {colour} {thing}!" cried {friend}. "I have always wanted one."',
            '"For me?" asked {friend}, and took the {colour} {thing} in both hands.',
        ),
        (
            "Then {hero}, {friend} and the {animal} ate cake by the {home}.",
            "So {hero} and {friend} danced by the {home}, and the {animal} danced too.",
            "By the {home} there was cake for {friend}, for {hero} and for the {animal}.",
        ),
    ),
    "rescue": (  # the friend has what the hero needs
        (
            "One {day} {hero} heard a small cry from the {place}.",
            "{hero} was at the {place} one {day} and heard a small cry.",
            "There was a cry from the {place} one {day}, and {hero} ran to see.",
        ),
        (
            "A young {animal} had fallen into a hole.",
            "A young {animal} sat in the mud and could not get out.",
            "There was a young {animal} in the cold water.",
        ),
        (
            "{hero} could not reach it.",
            "{hero} was too small to help it alone.",
            "{hero} did all {hero.they} could, but it was not enough.",
        ),
        (
            "So {hero.they} ran to {friend}, who had a long {tool}.",
            "So {hero.they} thought of {friend}, who had a long {tool}, and ran.",
        ),
        (
            '"Bring your {tool}!" called {hero}. "The {animal} needs us."',
            '"Quick," called {hero}, "the {animal} needs you and your {tool}!"',
        ),
        (
            "{friend} asked nothing and ran with {hero.them} to the {place}.",
            "{friend} left {friend.their} cake on the table and ran to the {place}.",
            "{friend} was out of the door at once, and they ran to the {place}.",
        ),
        (
            "{friend} held the {tool}, and {hero} pulled the {animal} out.",
            "{hero} held the {tool}, and {friend} pulled the {animal} out.",
            "With the {tool} they pulled and pulled, and out came the {animal}.",
        ),
        (
            "It was cold and wet, but it was happy.",
            "It looked at them for a long time.",
            "First it slept, and then it danced.",
        ),
        (
            "Since that {day} the {animal} waits for {hero} and {friend} at the {place}.",
            "From that {day} on {hero}, {friend} and the {animal} often met at the {place}.",
            "At the {place} {hero}, {friend} and the {animal} still talk about that {day}.",
        ),
    ),
    "broken": (  # a hard truth is told, and the thing is mended
        (
            "{hero} had a {colour} {thing} and gave it to {friend} for a day.",
            "For one day {friend} could have the {colour} {thing} that {hero} loved.",
            "{hero} let {friend} have {hero.their} {colour} {thing} for a day.",
        ),
        (
            "{friend} took it to the {place}, and there it fell and broke.",
            "{friend} played with it at the {place} until it broke.",
            "At the {place} it fell out of {friend.their} hands and broke.",
        ),
        (
            "{friend} was so sad that {friend.they} hid the {thing} {spot}.",
            "{friend} did not know what to do, and hid the {thing} {spot}.",
        ),
        (
            'Then {hero} came and asked, "Where is my {thing}?"',
            '"Where is my {thing}?" asked {hero}.',
        ),
        (
            "{friend} looked down.",
            "{friend} wanted to cry.",
            "For a while {friend} did not say a word.",
        ),
        (
            '"It broke at the {place}," {friend.they} said then, "and I hid it {spot}."',
            '"I broke it," {friend.they} said then. "It is at the {place}, {spot}."',
        ),
        (
            '"Then we will mend it," said {hero}.',
            '"Two can mend it," said {hero}.',
            '"Thank you for telling me," said {hero}. "We can mend it."',
        ),
        (
            "They found the {thing} {spot} and took it home.",
            "There it was, {spot}, and they brought the {thing} home.",
        ),
        (
            "{hero} held it, and {friend} did the rest.",
            "{friend} held it, and {hero} did the rest.",
        ),
        (
            "The {colour} {thing} is not so fine now, but {hero} and {friend} love it more.",
            "Now {hero} and {friend} both have the old {colour} {thing}.",
            "It is an old {colour} {thing} now, and {hero} often gives it to {friend}.",
        ),
    ),
    "owner": (  # something found goes back to whom it belongs
        (
            "One {day} {hero} found a {colour} {thing} at the {place}.",
            "{hero} walked to the {place} one {day} and found a {colour} {thing}.",
            "A {colour} {thing} lay at the {place} one {day}, and {hero} found it.",
        ),
        (
            '"Whose {thing} is this?" {hero.they} asked {friend}.',
            'So {hero.they} asked {friend}, "Is this {thing} yours?"',
        ),
        (
            '"Not mine," said {friend}. "Ask {owner}."',
            '"No," said {friend}, "but {owner} has lost something."',
            '"It must be the one that {owner} lost," said {friend}.',
        ),
        (
            "{owner} lived by the {home}, so they walked there together.",
            "So they took the long road to the {home}, where {owner} lived.",
        ),
        (
            '"Is this your {thing}?" asked {hero}.',
            '"Look," said {hero}, "a {thing}. Is it yours?"',
        ),
        (
            '"My {colour} {thing}!" cried {owner}. "I lost it at the {place}."',
            '"Yes!" cried {owner}. "I left my {colour} {thing} at the {place}."',
        ),
        (
            "{owner} was so happy that {owner.they} gave them some {food}.",
            "To thank them, {owner} put some {food} on the table.",
        ),
        (
            "They ate the {food} and talked about everything.",
            "There was more {food} than they could eat.",
            "{friend} ate most of the {food}.",
        ),
        (
            "That {day} the {thing} was home by the {home} with {owner}.",
            "By the {home} they still talk about {owner}, the {thing} and that {day}.",
        ),
    ),
}

# --- Writing -------------------------------------------------------------------------------------

Cast = dict[str, Word]  # slot -> the word that fills it in one story


def tell(rng: Random) -> str:
    """One story, on one line: chance picks a plot, a cast and a wording for each step."""
    plot = _pick(rng, list(PLOTS.values()))
    cast: Cast = {}
    for slot in slots(plot):
        cast[slot] = _pick(rng, [word for word in SLOTS[slot] if word not in cast.values()])
    return " ".join(_pick(rng, step).format(**cast) for step in plot)


def stories(n: int, seed: int) -> Iterator[str]:
    """``n`` stories, no two alike; the same for the same seed on every machine."""
    rng, told = Random(seed), set[str]()
    while len(told) < n:
        story = tell(rng)
        if story not in told:
            told.add(story)
            yield story


def slots(plot: Plot) -> list[str]:
    """The slots of a plot, in the order in which they are first named."""
    return list(dict.fromkeys(slot for step in plot for way in step for slot, _ in _fields(way)))


@cache
def _fields(wording: str) -> list[tuple[str, str]]:
    """The (slot, form) of each field: "{hero} lost {hero.their} {thing}" has three."""
    fields = (field for _, field, _, _ in Formatter().parse(wording) if field is not None)
    return [(slot, form) for slot, _, form in (field.partition(".") for field in fields)]


def _pick(rng: Random, options: Sequence[T]) -> T:
    # Of all methods of Random, only random() is promised to repeat its numbers in later Pythons.
    return options[int(rng.random() * len(options))]


# --- Checking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What `check` found out; it is truthy exactly when the story is consistent."""

    plot: str  # the plot that fits furthest
    cast: Cast  # what filled its slots, up to the problem
    read: int  # characters that fit the plot
    problem: str  # the first thing that is wrong, and where; empty if nothing is

    @property
    def ok(self) -> bool:
        return not self.problem

    def __bool__(self) -> bool:
        return self.ok


def check(story: str) -> Verdict:
    """Is this a story of the toy world, and does its end agree with its beginning?

    It must tell each step of one plot, in order, in one of its wordings, and nothing more. Each
    slot keeps the word that filled it first, pronouns agree with it, no two slots share a word.
    """
    return max(
        (_read(name, story) for name in PLOTS), key=lambda verdict: (verdict.ok, verdict.read)
    )


def _read(name: str, story: str) -> Verdict:
    text, start, cast = story + " ", 0, Cast()
    for number, step in enumerate(PLOTS[name], 1):
        matches = [
            (match, fields)
            for pattern, fields in map(_pattern, step)
            if (match := pattern.match(text, start))
        ]
        if not matches:
            rest = f'reads "{story[start : start + 60]}"' if story[start:] else "is missing"
            problem = (
                f"step {number} of the plot {name!r} {rest}; it may read, for example: {step[0]}"
            )
            return Verdict(name, cast, start, problem)
        bindings = [(match, *_bind(cast, fields, match.groups())) for match, fields in matches]
        match, cast, conflict = min(bindings, key=lambda binding: bool(binding[2]))
        if conflict:
            return Verdict(
                name, cast, match.end(), f'step {number}, "{match[0].strip()}": {conflict}'
            )
        start = match.end()
    surplus = f'the plot {name!r} has ended, but "{text[start : start + 60]}" follows'
    return Verdict(name, cast, start, surplus if text[start:] else "")


def _bind(cast: Cast, fields: list[tuple[str, str]], texts: Sequence[str]) -> tuple[Cast, str]:
    """The cast and what these fields add to it; the first conflict between the two, or ""."""
    cast = dict(cast)
    # Names first: in "a {hero.child} called {hero}" the form comes before the name it agrees with.
    for (slot, form), text in sorted(zip(fields, texts, strict=True), key=lambda pair: pair[0][1]):
        if slot in cast:
            if text != _say(cast[slot], form):
                was = _say(cast[slot], form)
                return cast, f'the {slot} is {cast[slot]}, so "{was}" was to be said, not "{text}"'
        else:
            taken = [other for other, word in cast.items() if str(word) == text]
            if taken:
                return cast, f"{text} cannot be the {slot}, being the {taken[0]} already"
            cast[slot] = next(word for word in SLOTS[slot] if str(word) == text)
    return cast, ""


@cache
def _pattern(wording: str) -> tuple[re.Pattern[str], list[tuple[str, str]]]:
    """A wording turned around: a pattern in which each field is a group, open to all its words."""
    fields = _fields(wording)
    literals = [re.escape(literal) for literal, *_ in Formatter().parse(wording)]
    groups = ["|".join({_say(word, form) for word in SLOTS[slot]}) for slot, form in fields]
    pattern = "".join(
        f"{literal}({group})" for literal, group in zip(literals, groups, strict=False)
    )
    return re.compile(pattern + "".join(literals[len(groups) :]) + " "), fields


def _say(word: Word, form: str) -> str:
    return getattr(word, form) if form else str(word)


# --- The corpus ----------------------------------------------------------------------------------

SEED = 2302_13971  # LLaMA: arXiv:2302.13971
SPLITS = {"train": (0, 4700), "valid": (4700, 4930)}  # first and last of the stories from SEED


def corpus(split: str) -> list[str]:
    """The stories of data/tales/``split``.txt, told anew: "train" (2 MB) or "valid" (100 kB).

    Raises ValueError for any other split.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r} of the tales: it is {' or '.join(SPLITS)}.")
    first, last = SPLITS[split]
    return list(islice(stories(last, SEED), first, None))


def write(folder: Path) -> None:
    """Write the corpus and its data card to ``folder``/tales: the same bytes on every machine.

    Raises OSError where the folder cannot be written.
    """
    target = folder / "tales"
    target.mkdir(parents=True, exist_ok=True)
    rows = []
    for split in SPLITS:
        told = corpus(split)
        content = "".join(f"{story}\n" for story in told).encode()
        (target / f"{split}.txt").write_bytes(content)
        words = re.findall(r"\w+", content.decode().lower())
        counts = f"{len(told):,} | {len(words):,} | {len(set(words))} | {len(content):,}"
        rows.append(f"| {split}.txt | {counts} | `{hashlib.sha256(content).hexdigest()}` |")
    (target / "README.md").write_bytes(CARD.format(rows="\n".join(rows)).encode())


CARD = """\
# Tales

Short stories from a toy world, one a line, in plain English. Some 300 words are enough for all of
them, and yet each story keeps its promises: who lost what, where it lay and to whom it went agree
from the first sentence to the last. A model of half a million parameters learns this in minutes,
and `minillama.data.tales.check` tells how well it did.

| file | stories | words | distinct words | bytes | SHA-256 |
|---|---:|---:|---:|---:|---|
{rows}

**How it was made.** The grammar in `minillama/data/tales.py` told them, from a fixed seed;
`make data` rebuilds this folder bit for bit. No story stands twice, within a file or in both.

**Licence.** MIT, like the package. Nothing was collected anywhere; the names mean nobody.

**What it is not.** Natural text. A model trained on it knows a handful of plots and nothing of the
world, and its loss can be compared with that of other models on this corpus only.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild the toy world's corpus, bit for bit.")
    parser.add_argument("folder", type=Path, help="tales/ is made in it")
    try:
        write(parser.parse_args().folder)
    except OSError as error:
        parser.error(f"the corpus cannot be written: {error}")
