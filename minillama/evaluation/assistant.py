"""How good an assistant of the toy world is: are its answers right, and does it obey?"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random

from minillama.chat import Message, encode_dialog
from minillama.config import Sampling
from minillama.data.dialogues import (
    Dialogue,
    Exchange,
    Instruction,
    as_messages,
    dialogue,
    instructions,
    is_right,
    story_dialogue,
    telling,
    under,
)
from minillama.generation import Engine, Request
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

MAX_TURNS = 8  # of the dialogues at whose end something is asked


@dataclass(frozen=True)
class Answered:
    """The last question of a dialogue, and what the model said."""

    exchange: Exchange
    answer: str
    ok: bool


@dataclass(frozen=True)
class AssistantReport:
    """What a model answered, one list for each thing that is expected of it."""

    facts: list[Answered]  # held-out questions: right?
    about_tales: list[Answered]  # questions about a new tale: right?
    tales: list[Answered]  # tales on request, sampled at 0.8: consistent?
    named_tales: list[Answered]  # and about whom the request names?
    told_now: list[Answered]  # an instruction in front of the question: obeyed?
    told_before: list[Answered]  # an instruction one turn earlier: obeyed still?

    def share(self, name: str) -> float:
        """The share of one of the lists that is as it is called."""
        answers = getattr(self, name)
        return sum(answered.ok for answered in answers) / len(answers)

    @property
    def summary(self) -> str:
        """All shares, in words."""
        share = {field.name: f"{self.share(field.name):.0%}" for field in fields(self)}
        return (
            f"{share['facts']} of its answers to new questions are right, {share['about_tales']} "
            f"of those about a new tale. Of the tales that it tells on request {share['tales']} "
            f"are consistent, {share['named_tales']} where the request names the hero. It obeys "
            f"{share['told_now']} of the instructions in front of a question, and "
            f"{share['told_before']} of those that were given a turn ago."
        )


def examine(model: Llama, tokenizer: Tokenizer, n: int = 100, seed: int = 0) -> AssistantReport:
    """Ask ``n`` questions of each sort, behind up to seven others with their right answers.

    What is asked about facts was held out of training (`minillama.data.dialogues`); the tales are
    new. Answers are greedy, but for the tales that the model tells.
    Raises ValueError for dialogues that are too long for the model's context.
    Shown in notebooks/10_sft.ipynb.
    """
    rng = Random(seed)
    told = [rng.choice(instructions()) for _ in range(n)]

    def facts(least: int = 1) -> Dialogue:
        return dialogue(rng, rng.randint(least, MAX_TURNS), "test")

    asked = [facts() for _ in range(n)]
    about = [story_dialogue(rng, rng.randint(1, 4)) for _ in range(n)]
    on_request, named = ([telling(rng, each) for _ in range(n)] for each in (False, True))
    now = [
        [*turns[:-1], under(turns[-1], one)]
        for turns, one in zip([facts() for _ in range(n)], told, strict=True)
    ]
    before = [
        [*turns[:-2], under(turns[-2], one), turns[-1]]
        for turns, one in zip([facts(2) for _ in range(n)], told, strict=True)
    ]
    return AssistantReport(
        facts=_judged(model, tokenizer, asked),
        about_tales=_judged(model, tokenizer, about),
        tales=_judged(model, tokenizer, on_request, temperature=0.8, seed=seed),
        named_tales=_judged(model, tokenizer, named, temperature=0.8, seed=seed),
        told_now=_judged(model, tokenizer, now, told),
        told_before=_judged(model, tokenizer, before, told),
    )


def answers(
    model: Llama,
    tokenizer: Tokenizer,
    dialogues: Sequence[Dialogue],
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 256,
) -> list[str]:
    """What the model answers to the last question of each, behind the right answers before it.

    Greedily unless a ``temperature`` is given; the longest tale takes less than 256 tokens.
    """
    engine = Engine(model, tokenizer, rows=32)
    tickets = []
    for number, turns in enumerate(dialogues):
        messages = [Message(**message) for message in as_messages(turns)[:-1]]  # type: ignore[arg-type]
        request = Request(
            encode_dialog(messages, tokenizer).ids,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature),
            seed=seed + number,
        )
        tickets.append(engine.submit(request))
    while engine.busy:
        engine.step()
    return [ticket.completion().text.strip() for ticket in tickets]


def _judged(
    model: Llama,
    tokenizer: Tokenizer,
    dialogues: Sequence[Dialogue],
    told: Sequence[Instruction] = (),
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Answered]:
    """By the instructions that were given, or else by whether the answers are right."""
    said = answers(model, tokenizer, dialogues, temperature, seed)
    asked = [turns[-1] for turns in dialogues]
    if told:
        ok = [one.obeys(answer) for one, answer in zip(told, said, strict=True)]
    else:
        ok = [is_right(q.question, answer, q.story) for q, answer in zip(asked, said, strict=True)]
    return [Answered(*each) for each in zip(asked, said, ok, strict=True)]
