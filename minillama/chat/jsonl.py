"""Dialogues on disk: JSON lines, a dialogue a line, in either of the two common forms.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"instruction": "Translate.", "input": "Bonjour", "output": "Hello"}

The second is Alpaca's (Taori et al. 2023); its input may be missing or empty, and a "system" may
stand beside it. A data set of the Hugging Face hub becomes such a file with its own library,
`pip install datasets`:

    datasets.load_dataset("tatsu-lab/alpaca", split="train").to_json("alpaca.jsonl")
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

from minillama.chat.dialog import Message, Role
from minillama.data.documents import MAX_LINE_BYTES

FORMS = '{"messages": [{"role": "user", "content": "..."}, ...]} or {"instruction", "output"}'


class Faults:
    """What is refused in which places: the first ten are told at once, not one after the other.

    >>> faults = Faults()
    >>> for place, dialogue in dialogues.items():
    ...     with faults.at(place):
    ...         check_messages(dialogue, tokenizer, chat_format)
    >>> faults.check()
    """

    TOLD: ClassVar[int] = 10

    def __init__(self) -> None:
        self.n = 0
        self._told: list[str] = []

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Note a ValueError of what is done within, and go on."""
        try:
            yield
        except ValueError as error:
            self.n += 1
            if self.n <= self.TOLD:
                self._told.append(f"{place}: {error}")

    def check(self) -> None:
        """Raises ValueError, naming places and reasons, if anything was refused."""
        if self.n == 1:
            raise ValueError(self._told[0])
        if self.n:
            first = f"; the first {self.TOLD}" * (self.n > self.TOLD)
            raise ValueError(
                f"{self.n:,} dialogues cannot be used{first}:\n" + "\n".join(self._told)
            )


def read_dialogues(
    paths: Iterable[str | os.PathLike[str]], chat_format: str = "llama2"
) -> dict[str, list[Message]]:
    """The dialogues of JSON-lines files by their places, such as "chat.jsonl, line 3".

    Of Alpaca's form the instruction is what the user says, with the input behind an empty line. In
    the format alpaca, whose template has a place for each, the instruction is the system message
    where there is an input. What stands under "system" is the system message; that format has no
    place for it. Blank lines are skipped; other keys are not looked at.

    Raises OSError or ValueError, naming file and line, for a file that is missing or holds no
    dialogue, and for lines that are no such objects, up to ten at once. Whether a dialogue can be
    learned from is for `tokenise` to say, which names the place as well.
    """
    dialogues, faults = dict[str, list[Message]](), Faults()
    for path in map(Path, paths):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name the JSON-lines file in it.")
        if not path.exists():
            raise FileNotFoundError(f"There is no file {path}.")
        n_before = len(dialogues)
        with path.open("rb") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), 1):
                place = f"{path}, line {number}"
                with faults.at(place):
                    fields = _fields(line)
                    if fields is not None:
                        dialogues[place] = _messages(fields, chat_format)
                if len(line) > MAX_LINE_BYTES:  # where the next one begins is not known
                    break
        if len(dialogues) == n_before and not faults.n:
            raise ValueError(f"{path} holds no dialogue. Put one object a line into it: {FORMS}.")
    faults.check()
    return dialogues


def _fields(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if it is blank."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"it is longer than {MAX_LINE_BYTES:,} bytes: no dialogue is.")
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not UTF-8 text: byte {error.start} is 0x{line[error.start]:02x}. Convert the "
            f"file: iconv -f LATIN1 -t UTF-8 FILE"
        ) from None
    if not text.strip():
        return None
    try:
        fields = json.loads(text)
    except RecursionError:
        raise ValueError("it is no dialogue: its brackets are nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"it is no JSON ({error.msg} at character {error.pos}). Each line is one object: "
            f"{FORMS}. A file with one list of all: jq -c '.[]' FILE"
        ) from None
    if not isinstance(fields, dict):
        raise ValueError(f"it is {fields!r:.40}, but must be an object: {FORMS}.")
    return fields


def _messages(fields: dict[str, Any], chat_format: str) -> list[Message]:
    if "messages" in fields:
        if not isinstance(fields["messages"], list):
            raise ValueError(f"its messages are {fields['messages']!r:.40}, but must be a list.")
        return [_message(each, place) for place, each in enumerate(fields["messages"], 1)]
    if not {"instruction", "output"} <= fields.keys():
        found = ", ".join(fields) or "none"
        raise ValueError(f"its keys are {found}, but must be those of a dialogue: {FORMS}.")
    instruction, output = _text("instruction", fields), _text("output", fields)
    given, system = _optional("input", fields), _optional("system", fields)
    if system and chat_format == "alpaca":
        raise ValueError(
            f"its system message is {system!r:.40}, but the format alpaca has no place for one. "
            f"Take another format, or put it into the instruction."
        )
    if given and chat_format == "alpaca":
        asked = [Message("system", instruction), Message("user", given)]
    else:
        asked = [Message("user", f"{instruction}\n\n{given}".rstrip())]
    told = [Message("system", system)] if system else []
    return [*told, *asked, Message("assistant", output)]


def _message(fields: Any, place: int) -> Message:
    if not isinstance(fields, dict) or fields.get("role") not in get_args(Role):
        raise ValueError(
            f"message {place} is {fields!r:.60}, but must have a role: {', '.join(get_args(Role))}."
        )
    return Message(fields["role"], _text("content", fields, f" of message {place}"))


def _optional(key: str, fields: dict[str, Any]) -> str:
    """A text that may be missing; one of nothing but white space is empty."""
    text = _text(key, fields) if fields.get(key) else ""
    return text if text.strip() else ""


def _text(key: str, fields: dict[str, Any], where: str = "") -> str:
    text = fields.get(key)
    if not isinstance(text, str):
        raise ValueError(f"the {key}{where} is {text!r:.40}, but must be a text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {key}{where} has half a character (a lone surrogate) at {error.start}. Write it "
            f"again with the whole characters."
        ) from None
    return text
