"""The toy world: a grammar that writes short stories, and a reader that checks them.

A language model is convincing when the end of its text still agrees with the beginning. Here that
can be measured: every story has a cast (who, what, where), each member of it comes back later, and
`check` tells whether all of them agree. One set of tables serves both ways: `tell` fills the slots
of a plot's sentences, `check` turns the same sentences into patterns and reads the slots back.

To add a plot, add an entry to PLOTS; to add a name, a thing or a place, add a word. A plot obeys
two rules. The tests hold the first: whatever the wordings, at least two of its steps name each
slot, so that no word of the cast can be exchanged unnoticed. The second is the old storytellers':
say a word again soon after its first mention ("lived Mia. Mia had a red, red kite. The kite ...").
Small models learn to copy over a distance of three tokens first, and over a whole story only then;
without these echoes they stay for a long time at guessing names at random.

Shown in notebooks/00_tour.ipynb.
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


def _people(girls: str, boys: str) -> tuple[Person, ...]:
    return (
        *(Person(name, "girl", "she", "her", "her") for name in _words(girls)),
        *(Person(name, "boy", "he", "him", "his") for name in _words(boys)),
    )


HEROES = _people("Anna Ida Mia", "Ben Finn Leo")
FRIENDS = _people("Clara Nora Rosa", "Hugo Max Tom")
OWNERS = _people("Ada Emma", "Otto Paul")
# Any word of a kind fits any sentence: each thing can be carried, lost, broken and mended.
THINGS = _words("basket bell boat cup drum flute kite lamp")
TREASURES = _words("book clock mirror ring scarf")
COLOURS = _words("blue green red white yellow")
HOMES = _words("castle farm harbour mill tower")
PLACES = _words("beach bridge church market river")
SPOTS = _words("bench cart tree")
ANIMALS = _words("bear dog fox goat hare")
TOOLS = _words("ladder net rope")
FOODS = _words("bread honey pie soup")
DAYS = _words("afternoon evening morning Friday Sunday")

# What may fill a slot. Each slot has words of its own: no hero can be the friend by accident.
SLOTS: dict[str, tuple[Word, ...]] = {
    "hero": HEROES,
    "friend": FRIENDS,
    "owner": OWNERS,
    "thing": THINGS,
    "other": TREASURES,
    "colour": COLOURS,
    "place": PLACES,
    "home": HOMES,
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
            "Far away was a {home}. The {home} was small, and there lived {hero}.",
            "Long ago there was a {home}. The {home} was old, and there lived {hero}.",
            "There was a {home}. The {home} was home to a {hero.child} called {hero}.",
        ),
        (
            "{hero} had a {colour}, {colour} {thing}.",
            "{hero} loved a {colour}, {colour} {thing}.",
            "{hero} went nowhere without {hero.their} {colour}, {colour} {thing}.",
        ),
        (
            "The {thing} was gone one {day}, one fine {day}.",
            "The {thing} was not there one {day}, one cold {day}.",
            "The {thing} could not be found one {day}, one fine {day}.",
        ),
        (
            '"Where is my {colour} {thing}?" {hero} asked {friend}.',
            '"Have you seen my {colour} {thing}?" {hero} asked {friend}.',
            '"My {colour} {thing} is gone," {hero} told {friend}.',
        ),
        (
            "{friend} had seen it at the {place}.",
            "{friend} had seen something {colour} at the {place}.",
            "{friend} knew of a {thing} at the {place}.",
        ),
        (
            "The {place} was far, but {hero} and {friend} walked all the way.",
            "The {place} was near, so {hero} and {friend} went to see.",
            "The {place} was not far, so {hero} ran, and {friend} ran too.",
        ),
        (
            "There was a {spot}, and under the {spot} lay the {thing}.",
            "There stood a {spot}, and what was under the {spot}? It was the {thing}.",
            "They saw a {spot}, and there, under the {spot}, was the {thing}.",
        ),
        (
            '"I forgot it under the {spot}," said {hero}.',
            '"I played under the {spot} and forgot it," said {hero}.',
            '"Who put it under the {spot}?" asked {hero}.',
        ),
        (
            "{hero} took the {colour}, {colour} {thing} home to the {home} that {day}.",
            "{hero} came home to the {home} with the {colour}, {colour} {thing} that {day}.",
            "{hero} told the {colour}, {colour} {thing} to stay by the {home} after that {day}.",
        ),
    ),
    "trade": (  # two things change hands
        (
            "There were two friends, {hero} and {friend}.",
            "{hero} had a good friend, and {hero.their} friend was {friend}.",
            "Long ago there lived two friends, {hero} and {friend}.",
        ),
        (
            "{hero} had a {thing}, and {friend} had a {other}.",
            "{hero} loved a {thing}, and {friend} loved a {other}.",
        ),
        (
            "The {other} was fine, and the {thing} was fine too.",
            "The {other} was old, but the {thing} was new.",
            "The {other} was small, and the {thing} was not.",
        ),
        (
            "One {day}, one fine {day}, they met at the {place}.",
            "One {day}, one cold {day}, they met at the {place}.",
            "One {day}, one fine {day}, both came to the {place}.",
        ),
        (
            'The {place} was quiet. "I like your {other}," said {hero}.',
            'The {place} was empty. "What a good {other}," said {hero}.',
            'The {place} was dark. "I often think of your {other}," said {hero}.',
        ),
        (
            '"And I like your {thing}," said {friend}.',
            '"And I have always wanted a {thing}," said {friend}.',
            '"And what a good {thing} you have," said {friend}.',
        ),
        (
            "{friend} took the {thing}, and {hero} took the {other}.",
            "{friend} gave the {other} to {hero}, and {hero} gave the {thing} to {friend}.",
        ),
        (
            "The {thing} went home with {friend}, and the {other} went home with {hero}.",
            "Now the {thing} was with {friend}, and the {other} was with {hero}.",
        ),
        (
            "{hero} and {friend} still talk about that {day} at the {place}.",
            "{hero} and {friend} often think of that {day} at the {place}.",
            "{hero} and {friend} slept well after that {day} at the {place}.",
        ),
    ),
    "gift": (  # what was left behind comes after its owner
        (
            "Far away was a {home}. The {home} was small, and there lived {friend}.",
            "Long ago there was a {home}. The {home} was old, and there lived {friend}.",
            "There was a {home}. The {home} was home to a {friend.child} called {friend}.",
        ),
        (
            "{friend} had a birthday, and nobody knew it but {hero}.",
            "{friend} had a birthday and a good friend called {hero}.",
            "{friend} had a birthday and looked down the road for {hero}.",
        ),
        (
            "{hero} had a {colour}, {colour} {thing} for {friend}.",
            "{hero} had made a {colour}, {colour} {thing} for {friend}.",
            "{hero} wanted to bring a {colour}, {colour} {thing} to {friend}.",
        ),
        (
            "First came the {place}, and at the {place} {hero} slept.",
            "First came the {place}, and at the {place} {hero} looked at the birds.",
            "On the way was the {place}, and at the {place} {hero} sat down.",
        ),
        (
            "{hero} came to the {home}, but the {colour} {thing} did not.",
            "{hero} went on to the {home}, but the {colour} {thing} was gone.",
            "{hero} saw the {home} and only then thought of the {colour} {thing}.",
        ),
        (
            "The {thing} came down the road with a {animal}.",
            "The {thing} came after, on the back of a {animal}.",
            "The {thing} was not lost. It came with a {animal}.",
        ),
        (
            'The {animal} said, "You left it at the {place}."',
            "The {animal} had found it at the {place}.",
            "The {animal} had seen it all alone at the {place}.",
        ),
        (
            "Then {hero} and the {animal} knocked, and out came {friend}.",
            "Then {hero} thanked the {animal} and ran to {friend}.",
        ),
        (
            "{friend} took the {colour}, {colour} {thing} in both hands.",
            "{friend} loved the {colour}, {colour} {thing} at once.",
            "{friend} held the {colour}, {colour} {thing} and danced.",
        ),
        (
            "There was cake by the {home} for {hero}, for {friend} and for the {animal}.",
            "Then {hero}, {friend} and the {animal} ate cake by the {home}.",
            "Then {hero}, {friend} and the {animal} danced by the {home}.",
        ),
    ),
    "rescue": (  # the friend has what the hero needs
        (
            "One {day}, one fine {day}, {hero} came to the {place}.",
            "One {day}, one cold {day}, {hero} walked to the {place}.",
            "One {day}, one fine {day}, {hero} was on the way to the {place}.",
        ),
        (
            "The {place} was quiet, but then came the cry of a {animal}.",
            "The {place} was dark, and in a hole sat a {animal}.",
            "The {place} was empty, but in the mud sat a {animal}.",
        ),
        (
            "The {animal} could not get out and looked at {hero}.",
            "The {animal} was cold and wet and looked at {hero}.",
            "The {animal} needed help, and nobody was there but {hero}.",
        ),
        (
            "{hero} was too small, and so {hero.they} ran to {friend}.",
            "{hero} could not reach it, and so {hero.they} ran to {friend}.",
            "{hero} pulled and pulled, and then {hero.they} thought of {friend}.",
        ),
        (
            "{friend} had a {tool}.",
            "{friend} owned a {tool}.",
            "{friend} was at home and had a {tool}.",
        ),
        (
            'The {tool} was long. "The {animal} needs it!" cried {hero}.',
            'The {tool} was old but good. "The {animal} needs us!" cried {hero}.',
            'The {tool} was by the door. "Bring it for the {animal}!" cried {hero}.',
        ),
        (
            "So {hero} ran, and {friend} ran, back to the {place}.",
            "{friend} asked nothing and ran with {hero} to the {place}.",
            "{friend} was out of the door at once and ran with {hero} to the {place}.",
        ),
        (
            "{hero} held the {tool}, and {friend} pulled out the {animal}.",
            "{friend} held the {tool}, and {hero} pulled out the {animal}.",
            "With the {tool} {hero} and {friend} pulled out the {animal}.",
        ),
        (
            "The {animal} waits for {hero} and {friend} at the {place} since that {day}.",
            "The {animal}, {hero} and {friend} still talk about that {day} at the {place}.",
            "The {animal} often met {hero} and {friend} at the {place} after that {day}.",
        ),
    ),
    "broken": (  # a hard truth is told, and the thing is mended
        (
            "There was a {hero.child} called {hero}.",
            "Long ago there lived a {hero.child} called {hero}.",
            "There was a {hero.child}, and {hero.their} name was {hero}.",
        ),
        (
            "{hero} had a {colour}, {colour} {thing}.",
            "{hero} loved a {colour}, {colour} {thing}.",
            "{hero} went nowhere without {hero.their} {colour}, {colour} {thing}.",
        ),
        (
            "The {thing} was for one day with {friend}.",
            "The {thing} went for one day to {friend}.",
            "The {thing} could stay for one day with {friend}.",
        ),
        (
            "{friend} played at the {place}, and at the {place} the {thing} broke.",
            "{friend} took it to the {place}, and at the {place} it broke.",
            "{friend} ran to the {place}, and at the {place} the {thing} fell and broke.",
        ),
        (
            "There was a {spot}, and under the {spot} {friend} put the {thing}.",
            "There stood a {spot}, and under the {spot} {friend} hid the {thing}.",
        ),
        (
            '"Where is my {colour} {thing}?" {hero} asked {friend}.',
            '"Have you seen my {colour} {thing}?" {hero} asked {friend}.',
            '"Do you still have my {colour} {thing}?" {hero} asked {friend}.',
        ),
        (
            "{friend} looked down.",
            "{friend} wanted to cry.",
            "{friend} was quiet for a while.",
        ),
        (
            '"I broke it at the {place} and hid it under the {spot}," said {friend}.',
            '"It broke at the {place}, and now it is under the {spot}," said {friend}.',
        ),
        (
            '"Then we will mend it," said {hero}.',
            '"Two can mend it," said {hero}.',
            '"It is good that you told me," said {hero}.',
        ),
        (
            "{hero} held the {thing}, and {friend} did the rest.",
            "{hero} and {friend} worked until the {thing} was well.",
            "{hero} did one half of the {thing}, and {friend} did the rest.",
        ),
        (
            "Now {hero} and {friend} both have the {colour}, {colour} {thing}.",
            "The {colour}, {colour} {thing} is old now, but {hero} and {friend} love it more.",
            "The {colour}, {colour} {thing} often goes from {hero} to {friend} and back.",
        ),
    ),
    "owner": (  # something found goes back to whom it belongs
        (
            "One {day}, one fine {day}, {hero} came to the {place}.",
            "One {day}, one cold {day}, {hero} walked to the {place}.",
            "One {day}, one fine {day}, {hero} was on the way to the {place}.",
        ),
        (
            "The {place} was quiet, and there lay a {colour}, {colour} {thing}.",
            "The {place} was dark, but {hero} saw a {colour}, {colour} {thing}.",
            "The {place} was empty but for a {colour}, {colour} {thing}.",
        ),
        (
            "The {thing} was lost, so {hero} took it to {friend}.",
            "The {thing} looked so alone that {hero} took it to {friend}.",
            "The {thing} was not alone for long, for {hero} took it to {friend}.",
        ),
        (
            "{friend} thought that it belonged to {owner}.",
            "{friend} had seen it in the hands of {owner}.",
            "{friend} knew at once that it belonged to {owner}.",
        ),
        (
            "{owner} lived by a {home}. The {home} was old.",
            "{owner} had a small house by a {home}. The {home} was far away.",
            "{owner} was always by a {home}. The {home} was not far.",
        ),
        (
            "So {hero} and {friend} brought the {colour} {thing} to {owner}.",
            "So {hero} and {friend} walked there with the {colour} {thing} for {owner}.",
            '"Is this your {colour} {thing}?" {hero} and {friend} asked {owner}.',
        ),
        (
            '{owner} cried, "My {colour}, {colour} {thing}! I left it at the {place}."',
            "{owner} had lost the {colour}, {colour} {thing} at the {place}.",
            "{owner} had left the {colour}, {colour} {thing} at the {place}.",
        ),
        (
            "Then {owner} gave them {food}, and the {food} was good.",
            "Then {owner} gave them {food}, and the {food} was warm.",
            "Then there was {food} on the table, {food} for everyone.",
        ),
        (
            "{hero} ate some of the {food}, and {friend} ate the rest.",
            "{friend} ate some of the {food}, and {hero} ate the rest.",
            "{hero} and {friend} talked until the {food} was gone.",
        ),
        (
            "{owner} and the {thing} were home by the {home} that {day}.",
            "{owner} still talks by the {home} about that {day} and the {thing}.",
            "{owner} never left the {home} without the {thing} after that {day}.",
        ),
    ),
}

# --- Writing -------------------------------------------------------------------------------------

Cast = dict[str, Word]  # slot -> the word that fills it in one story
FIELD = re.compile(r"\{(\w+)\.?(\w*)\}")  # {hero} or {hero.they}, as str.format reads them


def tell(rng: Random) -> str:
    """One story, on one line: chance picks a plot, a cast and a wording for each step."""
    plot = _pick(rng, list(PLOTS.values()))
    cast = {slot: _pick(rng, SLOTS[slot]) for slot in slots(plot)}
    return " ".join(_pick(rng, step).format(**cast) for step in plot)


def stories(n: int, seed: int) -> Iterator[str]:
    """``n`` stories, no two alike; the same for the same seed on every machine."""
    rng, told = Random(seed), set[str]()
    while len(told) < n:
        story = tell(rng)
        if story not in told:
            told.add(story)
            yield story


@cache
def slots(plot: Plot) -> tuple[str, ...]:
    """The slots of a plot, in the order in which they are first named."""
    return tuple(dict.fromkeys(slot for step in plot for way in step for slot, _ in _fields(way)))


def _fields(wording: str) -> list[tuple[str, str]]:
    """The (slot, form) of each field; the form is empty where the word itself is meant."""
    return FIELD.findall(wording)


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
    slot keeps the word that filled it first, and pronouns agree with it.
    """
    return max((_read(story, plot) for plot in PLOTS), key=lambda found: (found.ok, found.read))


def _read(story: str, plot: str) -> Verdict:
    """How far a story follows one plot."""
    text, start, cast = story + " ", 0, Cast()
    for number, step in enumerate(PLOTS[plot], 1):
        fits = [
            (match, *_bind(cast, _fields(wording), match.groups()))
            for wording in step
            if (match := _pattern(wording).match(text, start))
        ]
        if not fits:
            rest = f'reads "{story[start : start + 60]}"' if story[start:] else "is missing"
            problem = f"step {number} of the plot {plot!r} {rest}; it may read, e.g.: {step[0]}"
            return Verdict(plot, cast, start, problem)
        match, cast, conflict = min(fits, key=lambda fit: fit[2] != "")
        start = match.end()
        if conflict:
            return Verdict(plot, cast, start, f'step {number}, "{match[0].strip()}": {conflict}')
    surplus = f'the plot {plot!r} has ended, but "{story[start : start + 60]}" follows'
    return Verdict(plot, cast, start, surplus if start < len(text) else "")


def _bind(cast: Cast, fields: list[tuple[str, str]], texts: Sequence[str]) -> tuple[Cast, str]:
    """The cast and what these fields add to it; the first conflict between the two, or ""."""
    cast = dict(cast)
    # Names first: in "a {hero.child} called {hero}" the form comes before the name it agrees with.
    for (slot, form), text in sorted(zip(fields, texts, strict=True), key=lambda pair: pair[0][1]):
        if slot not in cast:
            cast[slot] = next(word for word in SLOTS[slot] if str(word) == text)
        if text != (due := _say(cast[slot], form)):
            return cast, f'the {slot} is {cast[slot]}, so "{due}" was to be said, not "{text}"'
    return cast, ""


@cache
def _pattern(wording: str) -> re.Pattern[str]:
    """A wording turned around: each field is a group that matches any word of its kind."""
    literals = [re.escape(literal) for literal in FIELD.split(wording)[::3]]
    choices = [{_say(word, form) for word in SLOTS[slot]} for slot, form in _fields(wording)]
    groups = [*(f"({'|'.join(words)})" for words in choices), " "]
    return re.compile("".join(map("".join, zip(literals, groups, strict=True))))


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

Short stories from a toy world, one a line, in plain English. Some 240 words are enough for all of
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
