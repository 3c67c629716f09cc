"""A dialogue becomes token ids: whose text each is, and which of them a model learns.

Everything is built from segments, never found in text: who may write "[INST]" into a message could
otherwise speak for somebody else.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from minillama.config import known_name
from minillama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
GUARD = "\0"  # no vocabulary of LLaMA's kind has a piece with it: what follows is in mid-text


@dataclass(frozen=True)
class Message:
    """What somebody says in a dialogue."""

    role: Role
    content: str


@dataclass(frozen=True)
class Piece:
    """A control piece of the vocabulary: an id of its own, which no text makes."""

    name: str


BOS, EOS = Piece("BOS"), Piece("EOS")  # whatever they are called
NEW_TEXT = Piece("")  # no id: what follows is encoded as a text of its own
Template: TypeAlias = tuple[str | Piece, ...]  # {} stands for the message


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a dialogue is written down for a model that was trained on this form.

    A string behind a control piece is encoded as a text of its own, any other goes on where the one
    before ended. So it is cut only where no piece of a vocabulary reaches across, and the ids are
    those of the whole.
    """

    begin: Template = ()
    system: Template
    no_system: Template = ()  # instead, where a dialogue has none
    user: Template
    user_after_system: Template | None = None  # where the system message is a part of the first
    reply: Template = ()  # before an answer
    cue: Template | None = None  # instead, where the answer is yet to come
    answer: Template  # what is learned: the answer, and the piece that ends it
    after: Template = ()
    markers: tuple[str, ...] = ()  # what no message may contain, beside the control pieces' names
    strips: bool = False  # messages lose outer white space
    max_turns: int | None = None


START, END, STEP = Piece("<|im_start|>"), Piece("<|im_end|>"), Piece("<step>")
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_END = (
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{}\n\n"
)

FORMATS: dict[str, ChatFormat] = {
    # Llama 2's chat_completion; the system message stands within the first user message.
    "llama2": ChatFormat(
        system=(BOS, "[INST] <<SYS>>\n{}\n<</SYS>>\n\n"),
        user=(BOS, "[INST] {} [/INST]"),
        user_after_system=("{} [/INST]",),
        answer=(" {} ", EOS),
        markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>"),
        strips=True,
    ),
    # Taori et al. 2023. A system message is the instruction; then the user gives the input.
    "alpaca": ChatFormat(
        system=(
            BOS,
            ALPACA_TASK + ", paired with an input that provides further context. " + ALPACA_END,
        ),
        user=(BOS, ALPACA_TASK + ". " + ALPACA_END + "### Response:"),
        user_after_system=("### Input:\n{}\n\n### Response:",),
        answer=("{}", EOS),
        markers=("### Instruction:", "### Input:", "### Response:", "<s>", "</s>"),
        max_turns=1,
    ),
    # SmolLM2 and many others.
    "chatml": ChatFormat(
        system=(START, "system\n{}", END, "\n"),
        user=(START, "user\n{}", END, "\n"),
        reply=(START, "assistant\n"),
        answer=("{}", END),
        after=("\n",),
        markers=(START.name, END.name),
    ),
    # Code Llama 70B Instruct; its smaller siblings use llama2.
    "code-llama-70b": ChatFormat(
        begin=(BOS,),
        system=(" Source: system", NEW_TEXT, "\n\n", " {}", STEP),
        no_system=(" Source: system", STEP),
        user=(" Source: user", NEW_TEXT, "\n\n", " {}", STEP),
        reply=(" Source: assistant\nDestination: user", NEW_TEXT, "\n\n"),
        cue=(" Source: assistant\nDestination: user", NEW_TEXT, "\n\n "),
        answer=(" {}", STEP),
        markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", STEP.name),
        strips=True,
    ),
}


@dataclass(frozen=True)
class DialogTokens:
    """A dialogue in token ids. The three lists are equally long."""

    ids: list[int] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)  # whose text it is, or frames
    learned: list[bool] = field(default_factory=list)  # answers, and the pieces that end them


def encode_dialog(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    chat_format: str = "llama2",
    neutralised: bool = False,
) -> DialogTokens:
    """The ids of a dialogue: a system message where there is one, then user and assistant in turns.

    Behind a last message of the user's, the ids are what a model is to go on from; a dialogue that
    ends with an answer is complete, for learning. Learned are the answers and the pieces that end
    them; in llama2 also the space that Meta puts in between, without which nothing leads to the
    end.

    A dialogue's ids begin with those of its first turns, question and answer together.

    Control pieces come from the format alone: their number depends on the number of turns, whatever
    the messages say. A message that contains the name of one, or a marker like "[INST]", is an
    error; ``neutralised`` puts a space into it instead (see `neutralise`).

    Raises ValueError for such a message, with its place and the marker; for messages out of turn;
    for a user who says nothing; for more turns than the format has (Alpaca's has one); and for a
    vocabulary that lacks the format's pieces.
    Source: Llama 2's and Code Llama's released code (`chat_completion`), whose ids these are, and
    the formats of Alpaca and ChatML.
    """
    form = FORMATS[known_name("chat format", chat_format, FORMATS)]
    if neutralised:
        messages = neutralise_messages(messages, tokenizer, chat_format)
    check_messages(messages, tokenizer, chat_format)
    writer, strip = _Writer(tokenizer, chat_format), str.strip if form.strips else str
    writer.write(form.begin, "system")
    head, cue = messages[0], form.reply if form.cue is None else form.cue
    first_user, strip_first = form.user, strip
    if head.role == "system" and form.user_after_system is not None:
        writer.write(form.system, "system", head.content)
        # Meta strips the whole of system message and question: at the end, that is.
        first_user, strip_first = form.user_after_system, str.rstrip if form.strips else str
    elif head.role == "system" and (head.content or not form.no_system):
        writer.write(form.system, "system", strip(head.content))
    else:
        writer.write(form.no_system, "system")
    turns = messages[head.role == "system" :]
    for place, message in enumerate(turns):
        if message.role == "assistant":
            writer.write(form.answer, "assistant", strip(message.content), learned=True)
            writer.write(form.after, "assistant")
            continue
        if place == 0:
            writer.write(first_user, "user", strip_first(message.content))
        else:
            writer.write(form.user, "user", strip(message.content))
        writer.write(cue if place == len(turns) - 1 else form.reply, "assistant")
    return writer.tokens


def end_of_answer(tokenizer: Tokenizer, chat_format: str) -> int:
    """The id with which a model ends its answer."""
    *_, last = FORMATS[known_name("chat format", chat_format, FORMATS)].answer
    assert isinstance(last, Piece)
    return _id_of(last, tokenizer, chat_format)


def recognise(tokenizer: Tokenizer) -> str:
    """The format that the model has learned, where its checkpoint says so (`chat_format`).

    Else the one whose control pieces this vocabulary has; "llama2" needs none but BOS and EOS.
    """
    if tokenizer.chat_format:
        return tokenizer.chat_format
    for name, piece in (("chatml", START), ("code-llama-70b", STEP)):
        if piece.name in tokenizer.pieces:
            return name
    return "llama2"


def neutralise(text: str, tokenizer: Tokenizer, chat_format: str = "llama2") -> str:
    """The text with a space in every marker of the format: "[INST]" becomes "[ INST]"."""
    return _markers(tokenizer, chat_format).sub(_spaced, text)


def neutralise_messages(
    messages: Iterable[Message], tokenizer: Tokenizer, chat_format: str = "llama2"
) -> list[Message]:
    """The messages with their texts neutralised (see `neutralise`)."""
    return [replace(m, content=neutralise(m.content, tokenizer, chat_format)) for m in messages]


def fit(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    room: int,
    chat_format: str = "llama2",
) -> tuple[list[Message], list[int]]:
    """The newest turns that take no more than ``room`` tokens, and their ids.

    The system message stays; of the rest the oldest turns go, question and answer together.
    Raises ValueError where not even the last message fits, and as `encode_dialog` does.
    """
    kept = list(messages)
    first = int(kept[0].role == "system") if kept else 0
    turns = FORMATS[known_name("chat format", chat_format, FORMATS)].max_turns
    if turns is not None:
        n_users = sum(message.role == "user" for message in kept)
        del kept[first : first + 2 * max(n_users - turns, 0)]

    def without(n_turns: int) -> list[Message]:
        return [*kept[:first], *kept[first + 2 * n_turns :]]

    def ids_without(n_turns: int) -> list[int]:
        return encode_dialog(without(n_turns), tokenizer, chat_format).ids

    ids, dropped = ids_without(0), 0
    if len(ids) > room:  # each turn takes tokens, so the number to leave out is found by halving
        most = (len(kept) - first - 1) // 2
        dropped = bisect_left(range(most), True, key=lambda n: len(ids_without(n)) <= room)
        ids = ids_without(dropped)
    if len(ids) > room:
        raise ValueError(
            f"The message takes {len(ids)} tokens with what frames it, but there is room for "
            f"{room}, the answer not included. Shorten the message or the system message."
        )
    return without(dropped), ids


def check_format(tokenizer: Tokenizer, chat_format: str) -> None:
    """Raises ValueError for an unknown format, or a vocabulary that lacks one of its pieces."""
    form = FORMATS[known_name("chat format", chat_format, FORMATS)]
    for template in vars(form).values():
        for part in template if isinstance(template, tuple) else ():
            if isinstance(part, Piece) and part != NEW_TEXT:
                _id_of(part, tokenizer, chat_format)


def check_messages(messages: Sequence[Message], tokenizer: Tokenizer, chat_format: str) -> None:
    """Raises ValueError for messages out of turn, or one that contains a marker of the format."""
    check_order(messages, chat_format)
    marker = _markers(tokenizer, chat_format)
    for place, message in enumerate(messages, 1):
        if found := marker.search(message.content):
            raise ValueError(
                f"Message {place} ({message.role}) contains {found[0]!r}, which marks the turns of "
                f"a dialogue in the format {chat_format}: a text with it could speak for somebody "
                f"else. Put a space into it, {_spaced(found)!r}, as `neutralise` of minillama.chat "
                f"and `minillama sft --neutralise` do."
            )


def check_order(messages: Iterable[Message], chat_format: str) -> None:
    """Raises ValueError unless user and assistant take turns behind at most one system message."""
    form, turns = FORMATS[chat_format], 0
    expected: tuple[Role, ...] = ("system", "user")
    for place, message in enumerate(messages, 1):
        if message.role not in expected:
            raise ValueError(
                f"Message {place} is of role {message.role!r}, but must be of "
                f"{' or '.join(map(repr, expected))}: behind at most one system message, user and "
                f"assistant take turns."
            )
        if message.role == "user" and not message.content.strip():
            raise ValueError(f"Message {place} (user) is empty: there is nothing to answer.")
        turns += message.role == "user"
        expected = ("assistant",) if message.role == "user" else ("user",)
    if not turns:
        raise ValueError("There is no message of the user's, so there is nothing to answer.")
    if form.max_turns is not None and turns > form.max_turns:
        raise ValueError(
            f"The dialogue has {turns} turns, but the format {chat_format} has {form.max_turns}. "
            f"Leave out the earlier ones, or choose another format."
        )


class _Writer:
    """Appends templates to the ids."""

    def __init__(self, tokenizer: Tokenizer, chat_format: str) -> None:
        self.tokens = DialogTokens()
        self._tokenizer, self._format = tokenizer, chat_format
        self._fresh = True  # does the next string begin a text?

    def write(
        self, template: Template, role: Role, content: str = "", learned: bool = False
    ) -> None:
        for part in template:
            if isinstance(part, Piece):
                ids = [_id_of(part, self._tokenizer, self._format)] if part != NEW_TEXT else []
                self._fresh = True
            else:
                ids = self._encode(part.replace("{}", content))
                self._fresh &= not ids
            self.tokens.ids.extend(ids)
            self.tokens.roles.extend([role] * len(ids))
            self.tokens.learned.extend([learned] * len(ids))

    def _encode(self, text: str) -> list[int]:
        if self._fresh or not self._tokenizer.dummy_prefix:
            return self._tokenizer.encode(text)
        return self._tokenizer.encode(GUARD + text)[len(self._tokenizer.encode(GUARD)) :]


def _id_of(piece: Piece, tokenizer: Tokenizer, chat_format: str) -> int:
    if piece in (BOS, EOS):
        i = tokenizer.bos_id if piece == BOS else tokenizer.eos_id
    elif piece.name in tokenizer.special_ids:
        i = tokenizer.special_ids[piece.name]
    else:  # an ordinary piece of this name serves too: no message may contain it
        i = tokenizer.pieces.index(piece.name) if piece.name in tokenizer.pieces else -1
    if i < 0:
        raise ValueError(
            f"The chat format {chat_format} needs the piece {piece.name}, and this vocabulary has "
            f"none. Its own is probably {recognise(tokenizer)}; there are {', '.join(FORMATS)}."
        )
    return i


def _markers(tokenizer: Tokenizer, chat_format: str) -> re.Pattern[str]:
    form = FORMATS[known_name("chat format", chat_format, FORMATS)]
    names = {*form.markers, *tokenizer.special_ids}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _spaced(marker: re.Match[str]) -> str:
    return f"{marker[0][0]} {marker[0][1:]}"
