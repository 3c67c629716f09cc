"""Ghost Attention: an instruction of the first turn that holds to the last.

An assistant obeys what it was told just now, and forgets what it was told ten turns ago. Ghost
Attention has it teach itself. It is told the instruction on every turn, and obeys (`hold`); then it
learns those answers from dialogues where the instruction stands in the first turn alone (`ghost`).

The loss counts answers that obey. Some of the earlier answers in an example are those that the
dialogue had before, without any instruction: they carry no loss, and keep the model from copying an
answer's manner from the answer before, where one mistake would be handed on for ever.

Source: Touvron et al. 2023b, sec. 3.3 (arXiv:2307.09288). Built in notebooks/11_gatt.ipynb.
"""

import copy
import os
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from random import Random
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from minillama.chat.dialog import (
    DialogTokens,
    Message,
    check_format,
    check_messages,
    encode_dialog,
    end_of_answer,
    neutralise,
    recognise,
)
from minillama.chat.jsonl import Faults
from minillama.config import Sampling
from minillama.data.dialogues import dialogue, instructions
from minillama.generation import Decoder, sample
from minillama.generation.decoder import n_shared
from minillama.model import Llama, apply_rope, rope_angles
from minillama.model.llama import Block
from minillama.tokenizer import Tokenizer

TOY_ANSWER = 32  # tokens that an answer of the toy world has at most
TOY_CONTEXT = 1536  # tokens that 23 of its turns have at most, with an instruction in each


@runtime_checkable
class Instruction(Protocol):
    """What can hold over a dialogue, such as `minillama.data.dialogues.instructions` gives."""

    @property
    def kind(self) -> str:
        """What it is about: two of one kind contradict each other."""

    @property
    def text(self) -> str: ...

    @property
    def short(self) -> str:
        """The same in fewer words."""

    def obeys(self, answer: str) -> bool:
        """Whether an answer does what it says; True where no function can tell."""


@dataclass(frozen=True)
class Rule:
    """What is said to the model, in these words, and what it asks for: one thing or several."""

    text: str
    instructions: tuple[Instruction, ...]

    @property
    def short(self) -> str:
        """The same in few words, to remind of it."""
        return " ".join(instruction.short for instruction in self.instructions)

    def obeys(self, answer: str) -> bool:
        """Whether an answer does all that it says."""
        return all(instruction.obeys(answer) for instruction in self.instructions)


@dataclass(frozen=True)
class Talk:
    """A dialogue that a model has answered under a rule; the messages do not say the rule."""

    rule: Rule
    messages: list[Message]  # the user's and the assistant's in turns
    finished: list[bool]  # for each answer: did it come to its end?
    own: Sequence[str] = ()  # the answers that the dialogue had before, if it had any

    @property
    def obeyed(self) -> list[bool]:
        """For each answer: was it finished, and did it obey?"""
        answers = [message.content for message in self.messages[1::2]]
        return [
            done and self.rule.obeys(answer)
            for done, answer in zip(self.finished, answers, strict=True)
        ]


# --- Rules ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spoken:
    """An instruction that no function can check, as those of the paper: all answers pass."""

    text: str
    short: str

    @property
    def kind(self) -> str:
        """What stands before the colon of the short form: "Figure" of "Figure: Napoleon."."""
        return self.short.partition(":")[0]

    def obeys(self, answer: str) -> bool:
        return True


def read_instructions(path: str | os.PathLike[str]) -> list[Spoken]:
    """Instructions out of a text file: one a line, its long form, a tab, its short form.

    Raises OSError, or ValueError naming the file and the line.
    """
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is no text in UTF-8: {error}.") from None
    for number, line in enumerate(lines, 1):
        text, _, short = (part.strip() for part in line.partition("\t"))
        if line.strip() and not (text and short):
            raise ValueError(
                f"{os.fspath(path)}, line {number}: {reprlib.repr(line)} is not an instruction, a "
                f"tab and the same in short, such as Always act as Napoleon.<tab>Figure: Napoleon."
            )
        if line.strip():
            found.append(Spoken(text, short))
    if not found:
        raise ValueError(f"{os.fspath(path)} has no instruction: write one a line.")
    return found


def draw_rules(
    given: Sequence[Instruction], n: int, rng: Random, combined: float = 0.25
) -> list[Rule]:
    """`n` rules at random: each kind of instruction as often as the others, half of them short.

    The share `combined` of them are two instructions of different kinds in one, in the order in
    which the kinds were given.
    Source: Touvron et al. 2023b, sec. 3.3: "randomly combining", "half of the time".
    """
    kinds: dict[str, list[Instruction]] = {}
    for instruction in given:
        kinds.setdefault(instruction.kind, []).append(instruction)
    rules = []
    for _ in range(n):
        # Of all methods of Random, only random() is promised to stay as it is.
        chosen = sorted(kinds, key=lambda _: rng.random())[: 2 if rng.random() < combined else 1]
        parts = tuple(
            of_kind[int(rng.random() * len(of_kind))]
            for kind, of_kind in kinds.items()
            if kind in chosen
        )
        is_short = rng.random() < 0.5
        text = " ".join(part.short if is_short else part.text for part in parts)
        rules.append(Rule(text, parts))
    return rules


# --- Dialogues under a rule -----------------------------------------------------------------------


def instructed(messages: Sequence[Message], instruction: str, reminder: str = "") -> list[Message]:
    """The messages with an instruction in front of the user's first one.

    In front of the user's later ones stands the reminder, where there is one.
    """
    said, told = [], iter([instruction])
    for message in messages:
        if message.role == "user":
            content = f"{next(told, reminder)} {message.content}".removeprefix(" ")
            message = replace(message, content=content)
        said.append(message)
    return said


def turns_of(
    dialogues: Mapping[str, Sequence[Message]], tokenizer: Tokenizer, chat_format: str
) -> tuple[list[list[str]], list[list[str]]]:
    """What the users of dialogues ask, and what they are answered there: questions, own answers.

    System messages are left out, for the rule takes their place; a warning tells how many.
    Raises ValueError, naming up to ten places at once, for dialogues whose messages are out of turn
    or contain a marker of the format; and for a vocabulary without its pieces.
    """
    check_format(tokenizer, chat_format)
    faults = Faults()
    for place, messages in dialogues.items():
        with faults.at(place):
            check_messages(messages, tokenizer, chat_format)
    faults.check()
    told = [place for place, messages in dialogues.items() if messages[0].role == "system"]
    if told:
        warnings.warn(
            f"Of {len(dialogues)} dialogues, {len(told)} have a system message, the first in "
            f"{told[0]}: it is left out, for a rule takes its place.",
            stacklevel=2,
        )
    questions, answers = (
        [
            [each.content for each in messages if each.role == role]
            for messages in dialogues.values()
        ]
        for role in ("user", "assistant")
    )
    return questions, answers


def hold(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[Sequence[str]],
    rules: Sequence[Rule],
    every_turn: bool = True,
    max_new_tokens: int = 48,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    seed: int = 0,
    rows: int = 64,
    chat_format: str | None = None,
    own: Sequence[Sequence[str]] | None = None,
    context: int | None = None,
) -> list[Talk]:
    """Ask a model the questions of many dialogues, each under its rule; it answers turn by turn.

    The rule stands in front of the first question. With ``every_turn`` its short form stands in
    front of each later one, as it does where training data is made; without, the model is on its
    own, as where somebody uses it. What it has answered before is part of what it reads. ``own``
    are the answers that the dialogues had before, for `examples`.

    `rows` dialogues are computed at a time, and each token is read once. `max_new_tokens` limits an
    answer; one that met its limit is not `finished`. A dialogue ends where its next turn would not
    fit into the model's context. It draws with a seed of its own, which follows from `seed` and its
    place. `chat_format` None takes the one that the vocabulary speaks for.
    `context` is in tokens; None is the model's own. More is possible, as RoPE has angles for every
    position; the training data, without the reminders, is shorter.
    Raises ValueError before the first answer where not even a first turn fits, and what
    `encode_dialog` raises.
    """
    if len(questions) != len(rules):
        raise ValueError(
            f"There are {len(questions)} dialogues and {len(rules)} rules: give one for each."
        )
    chat_format = chat_format or recognise(tokenizer)
    if context is not None:
        model = copy.copy(model)  # in the same memory
        model.config = replace(model.config, max_seq_len=context)
    room = model.config.max_seq_len - max_new_tokens

    def prompt(i: int) -> list[int]:
        """The ids of a dialogue up to its next question; none where it has come to its end."""
        talk, turn = talks[i], len(talks[i].finished)
        if turn == len(questions[i]):
            return []
        messages = [*talk.messages, Message("user", questions[i][turn])]
        said = instructed(messages, talk.rule.text, talk.rule.short if every_turn else "")
        ids = encode_dialog(said, tokenizer, chat_format).ids
        if len(ids) > room and turn == 0:
            raise ValueError(
                f"A first question takes {len(ids)} tokens with its instruction, but there is room "
                f"for {room} beside the {max_new_tokens} of an answer. Shorten it, or lower "
                f"max_new_tokens."
            )
        return ids if len(ids) <= room else []

    talks = [Talk(rule, [], [], own[i] if own else ()) for i, rule in enumerate(rules)]
    faults = Faults()
    for i in range(len(talks)):  # now, and not after hours
        with faults.at(f"Dialogue {i + 1}"):
            prompt(i)
    faults.check()
    for start in range(0, len(talks), rows):
        talking = list(range(start, min(start + rows, len(talks))))  # who stands in each row
        generators = [torch.Generator().manual_seed(seed + i) for i in talking]
        reader = _Reader(model, tokenizer, chat_format, sampling, max_new_tokens, generators)
        while True:
            prompts = [prompt(i) for i in talking]
            for row in reversed(range(len(talking))):
                if not prompts[row]:  # the last row takes its place
                    reader.leave(row)
                    talking[row], prompts[row] = talking[-1], prompts[-1]
                    del talking[-1], prompts[-1]
            if not talking:
                break
            for i, (answer, finished) in zip(talking, reader.answers(prompts), strict=True):
                question = questions[i][len(talks[i].finished)]
                talks[i].messages.extend([Message("user", question), Message("assistant", answer)])
                talks[i].finished.append(finished)
    return talks


class _Reader:
    """A model in many dialogues at once, which reads only what is new since the turn before."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        chat_format: str,
        sampling: Sampling,
        max_new_tokens: int,
        generators: list[torch.Generator],
    ) -> None:
        self.decoder = Decoder(model, len(generators), model.config.max_seq_len)
        self.tokenizer, self.chat_format = tokenizer, chat_format
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.generators = generators
        self._ends = [end_of_answer(tokenizer, chat_format), tokenizer.eos_id]
        self._read: list[list[int]] = [[] for _ in generators]  # the ids in each row of the cache

    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        self.decoder.swap(len(self._read) - 1, row)
        self._read[row], self.generators[row] = self._read[-1], self.generators[-1]
        del self._read[-1], self.generators[-1]

    @torch.inference_mode()
    def answers(self, prompts: Sequence[list[int]]) -> list[tuple[str, bool]]:
        """The answer to each row's prompt, and whether it came to its end."""
        new = []
        for row, ids in enumerate(prompts):
            known = n_shared(ids[:-1], self._read[row])
            self.decoder.lengths[row], self._read[row] = known, list(ids)
            new.append(ids[known:])
        drawn: list[list[int]] = [[] for _ in prompts]
        finished = [False for _ in prompts]
        logits = self.decoder.prefill(0, new)
        for _ in range(self.max_new_tokens):
            tokens = [self._ends[0] for _ in prompts]  # those that are finished wait for the others
            for row in range(len(prompts)):
                if not finished[row]:
                    tokens[row] = sample(logits[row], self.sampling, self.generators[row])
                    finished[row] = tokens[row] in self._ends
                    drawn[row] += [tokens[row]] * (not finished[row])
                    self._read[row].append(tokens[row])
            if all(finished):
                break
            logits = self.decoder.step(tokens)
        texts = [self.tokenizer.decode(ids).strip() for ids in drawn]
        safe = [neutralise(text, self.tokenizer, self.chat_format) for text in texts]
        return list(zip(safe, finished, strict=True))


def toy_talks(
    model: Llama,
    tokenizer: Tokenizer,
    n: int,
    n_turns: int = 20,
    split: str = "train",
    every_turn: bool = True,
    seed: int = 0,
    shortest: int | None = None,
    chat_format: str | None = None,
) -> list[Talk]:
    """`n` dialogues of the toy world, held by a model, as `hold` gives them.

    The instructions are those of a split, "train" or "held-out" (see `draw_rules`); the questions
    were learned from or not, accordingly. With `shortest` a dialogue has from so many turns up to
    `n_turns`, each number as often.
    """
    rng = Random(seed)
    part = "train" if split == "train" else "test"
    least = n_turns if shortest is None else min(shortest, n_turns)
    dialogues = [
        dialogue(rng, least + int(rng.random() * (n_turns - least + 1)), part) for _ in range(n)
    ]
    asked, own = (
        [[getattr(turn, of) for turn in each] for each in dialogues]
        for of in ("question", "answer")
    )
    rules = draw_rules(instructions(split), n, rng)
    context = TOY_CONTEXT if every_turn else None
    return hold(
        model,
        tokenizer,
        asked,
        rules,
        every_turn,
        TOY_ANSWER,
        seed=seed,
        chat_format=chat_format,
        own=own,
        context=context,
    )


# --- Training data --------------------------------------------------------------------------------


def ghost(
    messages: Sequence[Message],
    instruction: str,
    tokenizer: Tokenizer,
    learned: Sequence[bool] | None = None,
    chat_format: str | None = None,
) -> DialogTokens:
    """A training example: the instruction stands in the first turn, the last answer is learned.

    All else, the earlier answers included, is context and carries no loss.

    ``learned`` says of each answer whether it is learned, instead. What a causal model makes of an
    answer depends only on what stands before it: so the loss of one example with many answers is
    the sum of the losses of the examples that end with each of them, and is computed in one pass.

    Raises ValueError as `encode_dialog` does, and for a dialogue that does not end with an answer.
    """
    if not messages or messages[-1].role != "assistant":
        raise ValueError("The dialogue does not end with an answer, so there is nothing to learn.")
    said = instructed(messages, instruction)
    tokens = encode_dialog(said, tokenizer, chat_format or recognise(tokenizer))
    n_answers = sum(message.role == "assistant" for message in messages)
    counted = [False] * (n_answers - 1) + [True] if learned is None else learned
    # What frames a question parts two answers: each begins where what is learned begins.
    begins = (now and not before for before, now in pairwise([False, *tokens.learned]))
    answer = accumulate(begins, initial=-1)
    next(answer)
    kept = [now and counted[i] for now, i in zip(tokens.learned, answer, strict=True)]
    return replace(tokens, learned=kept)


def examples(
    talks: Sequence[Talk],
    tokenizer: Tokenizer,
    rng: Random,
    last_only: bool = False,
    own: float = 1.0,
    chat_format: str | None = None,
) -> list[DialogTokens]:
    """Training examples out of dialogues that were held under a rule, one of each.

    Up to the share `own` of its answers are those that the dialogue had before, where it had any;
    they do not obey and are not learned. Chance picks them, and how many. Each other answer is, if
    it obeyed and came to its end, as if the dialogue ended with it (see `ghost`): that teaches most
    for the time it takes. With ``last_only`` chance picks one of them, which is learned alone, and
    nothing stands behind.
    A dialogue without such an answer gives none.
    """
    found = []
    for talk in talks:
        messages, learned, share = list(talk.messages), talk.obeyed, own * rng.random()
        for turn, answer in enumerate(talk.own[: len(learned)]):
            if rng.random() < share:
                messages[2 * turn + 1] = Message("assistant", answer)
                learned[turn] = False
        turns = [turn for turn, good in enumerate(learned, 1) if good]
        if not turns:
            continue
        last = turns[int(rng.random() * len(turns))] if last_only else turns[-1]
        counted = None if last_only else learned[:last]
        text = talk.rule.text
        found.append(ghost(messages[: 2 * last], text, tokenizer, counted, chat_format))
    return found


# --- What came of it ------------------------------------------------------------------------------


def obedience(talks: Sequence[Talk]) -> list[float]:
    """For each turn, the share of the dialogues in which the answer obeys; from turn 1 on."""
    turns = zip_longest(*(talk.obeyed for talk in talks))
    reached = [[obeyed for obeyed in turn if obeyed is not None] for turn in turns]
    return [sum(turn) / len(turn) for turn in reached]


@torch.inference_mode()
def strongest_attention(model: Llama, tokens: Int[Tensor, " seq"]) -> Float[Tensor, "q_len k_len"]:
    """How much each token looks at each earlier one: the most that any head of any layer does.

    Source: Touvron et al. 2023b, sec. 3.3; its figure bins neighbouring tokens of this.
    """
    config, seq = model.config, len(tokens)
    angles = rope_angles(
        torch.arange(seq, device=tokens.device), config.head_dim, config.rope_theta
    )
    later = torch.ones(seq, seq, dtype=torch.bool, device=tokens.device).triu(1)
    x, strongest = model.tok_embeddings(tokens[None]), torch.zeros(seq, seq, device=tokens.device)
    for layer in model.layers:
        assert isinstance(layer, Block)
        normed = layer.attention_norm(x)
        heads = "1 seq (heads channels) -> heads seq channels"
        q, k = (
            apply_rope(rearrange(w(normed), heads, channels=config.head_dim), angles)
            for w in (layer.attention.wq, layer.attention.wk)
        )
        k = k.repeat_interleave(len(q) // len(k), dim=0)
        scores = (q @ k.mT / config.head_dim**0.5).masked_fill(later, float("-inf"))
        strongest = torch.maximum(strongest, reduce(scores.softmax(-1), "heads q k -> q k", "max"))
        x = layer(x, angles[None, None])
    return strongest
