"""The toy world's dialogues: questions with a judge, and instructions with a check.

Who fine-tunes an assistant wants to know whether its answers are right and whether it does as it
was told. In the toy world a function knows both: questions come from a table of wordings, filled
with the words of the tales (`FACTS`, `ABOUT`), and so does what an instruction makes of an answer
(`KINDS`). Of the
questions of each kind a tenth is held out for validation and another for testing.

An instruction holds for the answer to the message that it stands in, and for no other: in the
corpus the turns after it are answered as if it had never been given. That is the assistant which
Ghost Attention starts from (Touvron et al. 2023b, sec. 3.3, arXiv:2307.09288). The corpus has
instructions of all words, since that assistant can obey any; which of them it learns to keep, and
which it was never shown to keep, is what `instructions` tells apart.

Shown in notebooks/10_sft.ipynb and notebooks/11_gatt.ipynb.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import TypeVar

from minillama.data import tales
from minillama.data.tales import (
    ANIMALS,
    COLOURS,
    FIELD,
    FOODS,
    HOMES,
    PLACES,
    PLOTS,
    SLOTS,
    SPOTS,
    THINGS,
    TOOLS,
    TREASURES,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """One turn: a question and its right answer."""

    question: str
    answer: str
    story: str = ""  # the tale that the question is about, told in this turn or an earlier one


Dialogue = list[Exchange]
SEED = 2307_09288  # Llama 2: arXiv:2307.09288

# --- Questions ------------------------------------------------------------------------------------

FILLINGS = {**SLOTS, "look": ("fine", "new", "old", "small", "warm", "wet")}

# kind -> (question, answer), with slots to fill; everything that is asked is in the question.
FACTS: dict[str, tuple[tuple[str, str], ...]] = {
    "having": (
        (
            "{hero} had a {thing}, and {friend} had a {other}. Who had the {thing}?",
            "{hero} had the {thing}.",
        ),
        (
            "{hero} had a {thing}, and {friend} had a {other}. Who had the {other}?",
            "{friend} had the {other}.",
        ),
        (
            "{friend} had a {other}, and {hero} had a {thing}. What did {hero} have?",
            "{hero} had a {thing}.",
        ),
        (
            "{friend} had a {other}, and {hero} had a {thing}. What did {friend} have?",
            "{friend} had a {other}.",
        ),
    ),
    "going": (
        (
            "{hero} went to the {place}, and {friend} to the {home}. Where is {hero}?",
            "{hero} is at the {place}.",
        ),
        (
            "{hero} went to the {place}, and {friend} to the {home}. Where is {friend}?",
            "{friend} is at the {home}.",
        ),
        (
            "{friend} went to the {home}, and {hero} to the {place}. Who is at the {place}?",
            "{hero} is at the {place}.",
        ),
        (
            "{friend} went to the {home}, and {hero} to the {place}. Who is at the {home}?",
            "{friend} is at the {home}.",
        ),
    ),
    "looking": (
        (
            "The {thing} is {colour}, the {other} is {look}. What is {look}?",
            "The {other} is {look}.",
        ),
        (
            "The {thing} is {colour}, the {other} is {look}. What is {colour}?",
            "The {thing} is {colour}.",
        ),
        (
            "The {other} is {look}, the {thing} is {colour}. What is {colour}?",
            "The {thing} is {colour}.",
        ),
        (
            "The {other} is {look}, the {thing} is {colour}. What is {look}?",
            "The {other} is {look}.",
        ),
    ),
    "nature": (
        ("What can run, a {thing} or a {animal}?", "A {animal} can run."),
        ("What can run, a {animal} or a {thing}?", "A {animal} can run."),
        ("What can we eat, the {food} or the {thing}?", "We can eat the {food}."),
        ("What can we eat, the {thing} or the {food}?", "We can eat the {food}."),
    ),
    "people": tuple(
        wording
        for who in ("hero", "friend", "owner")
        for wording in (
            (f"Who is {{{who}}}?", f"{{{who}}} is a {{{who}.child}}."),
            (f"Is {{{who}}} a girl or a boy?", f"{{{who}}} is a {{{who}.child}}."),
            (f"Hello, I am {{{who}}}.", f"Hello, {{{who}}}."),
            (f"My name is {{{who}}}. What is my name?", f"Your name is {{{who}}}."),
        )
    ),
}

# plot -> (question, answer) about a story of that plot.
ABOUT: dict[str, tuple[tuple[str, str], ...]] = {
    "lost": (
        ("Who lost the {thing}?", "{hero} lost the {thing}."),
        ("What was {colour}?", "The {thing} was {colour}."),
        ("Who had seen it?", "{friend} had seen it."),
        ("Where did {hero} live?", "{hero} lived at the {home}."),
        ("Where was the {thing}?", "The {thing} was under the {spot}."),
    ),
    "trade": (
        ("Who had the {thing} first?", "{hero} had the {thing}."),
        ("Who had the {other} first?", "{friend} had the {other}."),
        ("Who has the {thing} now?", "{friend} has the {thing}."),
        ("Who has the {other} now?", "{hero} has the {other}."),
        ("Where did they meet?", "They met at the {place}."),
    ),
    "gift": (
        ("Who had a birthday?", "{friend} had a birthday."),
        ("What was {colour}?", "The {thing} was {colour}."),
        ("Where did {friend} live?", "{friend} lived at the {home}."),
        ("Who brought the {thing}?", "The {animal} brought the {thing}."),
        ("Where did {hero} leave the {thing}?", "{hero} left it at the {place}."),
    ),
    "rescue": (
        ("Who needed help?", "The {animal} needed help."),
        ("Where was the {animal}?", "The {animal} was at the {place}."),
        ("What did {friend} have?", "{friend} had a {tool}."),
        ("Who found the {animal}?", "{hero} found the {animal}."),
    ),
    "broken": (
        ("Who broke the {thing}?", "{friend} broke the {thing}."),
        ("What was {colour}?", "The {thing} was {colour}."),
        ("Where did it break?", "It broke at the {place}."),
        ("Where was the {thing}?", "The {thing} was under the {spot}."),
    ),
    "owner": (
        ("Who found the {thing}?", "{hero} found the {thing}."),
        ("What was {colour}?", "The {thing} was {colour}."),
        ("Who lost the {thing}?", "{owner} lost the {thing}."),
        ("Where did {owner} live?", "{owner} lived at the {home}."),
        ("What did they eat?", "They ate {food}."),
    ),
}

TELL = re.compile(r"Tell a story(?: about (\w+))?\.")  # about a hero
SPLITS = ("train", "valid", "test")


def dialogue(rng: Random, n_turns: int, split: str = "train") -> Dialogue:
    """Questions of the toy world that have nothing to do with each other, and their answers.

    Each takes 3 to 20 words with its answer: twenty turns fit a context of 1,024 tokens of the
    toy's. Raises ValueError for a split that there is not.
    """
    facts = _facts(_known(split))
    return [Exchange(*_pick(rng, _pick(rng, facts))) for _ in range(n_turns)]


def story_dialogue(rng: Random, n_turns: int) -> Dialogue:
    """A tale with a question behind it, then more questions about it, at most as many as it has."""
    story = tales.tell(rng)
    found = tales.check(story)
    wordings = _shuffled(rng, ABOUT[found.plot])[:n_turns]
    asked = [(q.format(**found.cast), a.format(**found.cast)) for q, a in wordings]
    first, *others = [Exchange(question, answer, story) for question, answer in asked]
    return [Exchange(f"{story} {first.question}", first.answer, story), *others]


def telling(rng: Random, named: bool = False) -> Dialogue:
    """A tale on request; ``named``, one about a hero that the request names.

    That is harder: in "There was a girl called Mia" the girl comes before the name.
    """
    story = tales.tell(rng)
    hero = f" about {tales.check(story).cast['hero']}" if named else ""
    return [Exchange(f"Tell a story{hero}.", story)]


def is_right(question: str, answer: str, story: str = "") -> bool:
    """Whether this is the right answer to a question of the toy world.

    The question alone decides, and the ``story`` where it is about one; that may also stand in
    front of the question. A tale that was asked for is right if it is consistent (`tales.check`),
    and about whom it was asked for if anybody was named.
    Raises ValueError for a question that the toy world does not have.
    """
    if asked := TELL.fullmatch(question):
        verdict = tales.check(answer)
        return verdict.ok and asked[1] in (None, str(verdict.cast["hero"]))
    if question in (facts := _answers()):
        return answer == facts[question]
    if not story:  # it stands in front of the question, which is one sentence
        told, _, question = question.rpartition(". ")
        story = f"{told}."
    question = question.removeprefix(story).strip()
    verdict = tales.check(story)
    for wording, right in ABOUT[verdict.plot] if verdict else ():
        if wording.format(**verdict.cast) == question:
            return answer == right.format(**verdict.cast)
    raise ValueError(
        f"The toy world does not have the question {question!r}: its wordings stand in FACTS, and "
        f"in ABOUT for those about a story, which is given with it."
    )


@cache
def _facts(split: str) -> list[list[tuple[str, str]]]:
    """The questions of a split with their answers, by kind."""
    tenths = {"train": range(8), "valid": (8,), "test": (9,)}[split]
    kinds = [_shuffled(Random(SEED), _filled(wordings)) for wordings in FACTS.values()]
    return [[pair for i, pair in enumerate(pairs) if i % 10 in tenths] for pairs in kinds]


def _filled(wordings: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Questions and their answers, with all words that fit."""
    pairs = []
    for question, answer in wordings:
        names = list(dict.fromkeys(slot for slot, _ in FIELD.findall(question)))
        for words in product(*(FILLINGS[name] for name in names)):
            cast = dict(zip(names, words, strict=True))
            pairs.append((question.format(**cast), answer.format(**cast)))
    return pairs


@cache
def _answers() -> dict[str, str]:
    """All questions about facts, and their answers."""
    return {q: a for split in SPLITS for kind in _facts(split) for q, a in kind}


# --- Instructions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What an instruction can ask for: {word} is its word, {answer} an answer without its dot."""

    text: str
    short: str  # as the paper shortens half of its instructions
    obeying: str
    sign: str  # the pattern that an answer must have somewhere if it obeys


# In the order in which they are applied.
KINDS: dict[str, Kind] = {
    "first name": Kind(
        "Always begin your answers with the name {word}.",
        "First: {word}.",
        "{word}. {answer}.",
        r"^\W*{word}\b",
    ),
    "love": Kind(
        "Always say that you love the {word}.",
        "Love: {word}.",
        "{answer}. I love the {word}.",
        r"\blove the {word}\b",
    ),
    "last word": Kind(
        "Always end your answers with the word {word}.",
        "Last: {word}.",
        "{answer}, {word}.",
        r"\b{word}\W*$",
    ),
}
# What the paper's instructions ask for. Text and shortened form; no function can check these.
PAPERS_KINDS = {
    "figure": ("Always act as {} from now on.", "Figure: {}."),
    "language": ("Always speak in {} from now on.", "Language: {}."),
    "hobby": ("From now on, you enjoy {}.", "Hobby: {}."),
}

NAMES = tuple(str(person) for slot in ("hero", "friend", "owner") for person in SLOTS[slot])
NOUNS = (*THINGS, *TREASURES, *ANIMALS, *SPOTS, *TOOLS, *FOODS)
# All words of the tales that are no names, but for those of one or two letters.
PLAIN = " ".join(FIELD.sub("", way) for plot in PLOTS.values() for step in plot for way in step)
ALL = sorted({*re.findall(r"\b[a-z]{3,}\b", PLAIN), *NOUNS, *PLACES, *HOMES, *COLOURS})
WORDS: dict[str, Sequence[str]] = {"first name": NAMES, "love": NOUNS, "last word": ALL}
# Words of instructions that Ghost Attention is tested with, and never trained on.
HELD_OUT = frozenset(
    """Ida Max Otto Rosa boat fox goat kite ladder mirror soup tree
    alone beach cold door green harbour mill road small under warm yellow""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Instruction:
    """What an assistant is told to do, e.g. to end its answers with a word; or several of these."""

    parts: tuple[tuple[str, str], ...]  # (kind, word)

    @property
    def kind(self) -> str:
        return " + ".join(kind for kind, _ in self.parts)

    @property
    def text(self) -> str:
        return " ".join(KINDS[kind].text.format(word=word) for kind, word in self.parts)

    @property
    def short(self) -> str:
        """The same in fewer words."""
        return " ".join(KINDS[kind].short.format(word=word) for kind, word in self.parts)

    def apply(self, answer: str) -> str:
        """The answer as somebody gives it who obeys."""
        for kind, word in self.parts:
            answer = KINDS[kind].obeying.format(word=word, answer=answer.rstrip("."))
        return answer

    def obeys(self, answer: str) -> bool:
        """Whether an answer, right or wrong, does what it is told to."""
        return all(
            re.search(KINDS[kind].sign.format(word=word), answer) for kind, word in self.parts
        )


def instructions(split: str | None = None, kind: str | None = None) -> list[Instruction]:
    """All instructions, or those for training Ghost Attention ("train") or its test ("held-out").

    No word of a held-out one stands in any of the training split. ``kind`` is one of `KINDS`.
    Raises ValueError for a split or kind that there is not.
    """
    if split not in (None, "train", "held-out"):
        raise ValueError(
            f"There is no split {split!r} of the instructions: it is train or held-out."
        )
    if kind not in (None, *KINDS):
        raise ValueError(f"There is no kind of instruction {kind!r}: it is {', '.join(KINDS)}.")
    return [
        instruction
        for name in ([kind] if kind else KINDS)
        for instruction in _of_kind(name)
        if split is None or (instruction.parts[0][1] in HELD_OUT) == (split == "held-out")
    ]


@cache
def _of_kind(kind: str) -> list[Instruction]:
    return [Instruction(((kind, word),)) for word in WORDS[kind]]


def combine(first: Instruction, second: Instruction) -> Instruction:
    """Both at once. Raises ValueError where both are of one kind: nobody can obey both then."""
    parts = sorted(first.parts + second.parts, key=lambda part: list(KINDS).index(part[0]))
    kinds = [kind for kind, _ in parts]
    if len(set(kinds)) < len(kinds):
        raise ValueError(
            f"{first.text!r} and {second.text!r} cannot both be obeyed: combine instructions of "
            f"different kinds."
        )
    return Instruction(tuple(parts))


def under(exchange: Exchange, instruction: Instruction, short: bool = False) -> Exchange:
    """The exchange with an instruction in front of its question, and an answer that obeys."""
    text = instruction.short if short else instruction.text
    return replace(
        exchange,
        question=f"{text} {exchange.question}",
        answer=instruction.apply(exchange.answer),
    )


# --- The corpus -----------------------------------------------------------------------------------

SIZES = {"train": 800, "valid": 50, "test": 100}  # dialogues in the files


def corpus(split: str, n: int | None = None) -> list[Dialogue]:
    """The dialogues of data/dialogues/``split``.jsonl, made anew; or the first ``n``, also more.

    Of ten dialogues four ask for a tale, two are about one, and four of unrelated questions. Three
    of five questions have an instruction in front, which the answer obeys.
    Raises ValueError for any split but "train", "valid" and "test".
    """
    rng = Random(SEED + 1 + SPLITS.index(_known(split)))
    return [_any_dialogue(rng, number, split) for number in range(n or SIZES[split])]


def _any_dialogue(rng: Random, number: int, split: str) -> Dialogue:
    kind = number % 10
    if kind < 4:
        return telling(rng, named=kind == 0)
    about_a_tale = kind < 6
    n_turns = 1 + _below(rng, 4 if about_a_tale else 16)
    made = story_dialogue(rng, n_turns) if about_a_tale else dialogue(rng, n_turns, split)
    return [
        under(exchange, _any_instruction(rng), short=_below(rng, 2) == 0)
        if _below(rng, 5) < 3
        else exchange
        for exchange in made
    ]


def _any_instruction(rng: Random) -> Instruction:
    """One, or in half of the cases two; the last word, of which there are many, twice as often."""
    kinds = _shuffled(rng, [*KINDS, "last word"])
    first, second = (_pick(rng, _of_kind(kind)) for kind in kinds[:2])
    return first if _below(rng, 2) or first.kind == second.kind else combine(first, second)


def as_messages(dialogue: Dialogue) -> list[dict[str, str]]:
    """A dialogue in the common form: who says it, and what."""
    return [
        {"role": role, "content": content}
        for exchange in dialogue
        for role, content in (("user", exchange.question), ("assistant", exchange.answer))
    ]


def write(folder: Path) -> None:
    """Write the corpus and its data card to ``folder``/dialogues: equal bytes on every machine.

    Raises OSError where the folder cannot be written.
    """
    target = folder / "dialogues"
    target.mkdir(parents=True, exist_ok=True)
    rows = []
    for split in SPLITS:
        made = corpus(split)
        lines = [json.dumps({"messages": as_messages(each)}) + "\n" for each in made]
        content = "".join(lines).encode()
        (target / f"{split}.jsonl").write_bytes(content)
        counts = f"{len(made):,} | {sum(map(len, made)):,} | {len(content):,}"
        rows.append(f"| {split}.jsonl | {counts} | `{hashlib.sha256(content).hexdigest()}` |")
    (target / "README.md").write_bytes(CARD.format(rows="\n".join(rows)).encode())


CARD = """\
# Dialogues

Short dialogues of the toy world, one a line: {{"messages": [{{"role": ..., "content": ...}}]}}. A
user asks who has what and who went where, tells a tale and asks about it, or asks for one; an
assistant answers in a sentence. Often the user says how to answer (end with a word, begin with a
name, say what you love), and the assistant does so for that answer alone.

`minillama.data.dialogues.is_right` knows whether an answer is right, and `Instruction.obeys`
whether it does as it was told.

| file | dialogues | turns | bytes | SHA-256 |
|---|---:|---:|---:|---|
{rows}

**What is held out.** No question about facts that valid or test asks stands in another file. The
tales are others in each, but the questions about them have the same wordings. No word is held out,
neither of questions nor of instructions.

**How it was made.** `minillama/data/dialogues.py` made them, from a fixed seed; `make data`
rebuilds this folder bit for bit.

**Licence.** MIT, like the package. Nothing was collected anywhere; the names mean nobody.

**What it is not.** Natural dialogue. An assistant trained on it knows nothing of the world.
"""


def _known(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(
            f"There is no split {split!r} of the dialogues: it is {', '.join(SPLITS)}."
        )
    return split


def _shuffled(rng: Random, options: Sequence[T]) -> list[T]:
    return [
        option for _, option in sorted(((rng.random(), o) for o in options), key=lambda p: p[0])
    ]


def _pick(rng: Random, options: Sequence[T]) -> T:
    return options[_below(rng, len(options))]


def _below(rng: Random, n: int) -> int:
    # Of all methods of Random, only random() is promised to repeat its numbers in later Pythons.
    return int(rng.random() * n)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild the toy world's dialogues, bit for bit.")
    parser.add_argument("folder", type=Path, help="dialogues/ is made in it")
    try:
        write(parser.parse_args().folder)
    except OSError as error:
        parser.error(f"the dialogues cannot be written: {error}")
