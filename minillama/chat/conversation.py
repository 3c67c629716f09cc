"""A dialogue with a model, which forgets the oldest turns where its context ends."""

import json
import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from minillama.chat.dialog import (
    Message,
    Role,
    check_order,
    end_of_answer,
    fit,
    neutralise,
    recognise,
)
from minillama.config import LLAMA_2_CHAT, Sampling
from minillama.generation import Engine, Request
from minillama.model import Llama
from minillama.tokenizer import Tokenizer


class Conversation:
    """Ask, and the model answers with all that was said before in mind.

    >>> conversation = Conversation(model, tokenizer, system="Answer in one sentence.")
    >>> print("".join(conversation.ask("What is a llama?")))

    `messages` is what was said. Where it does not fit into the context any more, with room for
    `max_new_tokens` (at most half of the context) left for the answer, the oldest turns are left
    out of what the model reads; `n_forgotten` counts their messages. `cut_off` tells whether the
    last answer met its limit. A turn reads what is new; those before it stay in the cache.
    `chat_format` None takes the one that the vocabulary speaks for (see
    `recognise`).
    Raises ValueError as `encode_dialog` and `Request` do.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        system: str = "",
        chat_format: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling = LLAMA_2_CHAT,
        seed: int | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.chat_format = chat_format or recognise(tokenizer)
        Request("", max_new_tokens, sampling, seed)  # refuses what means nothing
        self.max_new_tokens, self.sampling, self.seed = max_new_tokens, sampling, seed
        self.compile = compile
        self._end_ids = [tokenizer.eos_id, end_of_answer(tokenizer, self.chat_format)]
        self._engine: Engine | None = None  # which knows what it has read
        self.messages: list[Message] = []
        self.n_forgotten, self.cut_off = 0, False
        self.reset(system)

    def change_model(
        self, model: Llama, tokenizer: Tokenizer, chat_format: str | None = None
    ) -> None:
        """Go on with another model, which reads what was said so far as if it had said it.

        Raises ValueError, and keeps the one before, where its format or context has no room for
        that.
        """
        other = Conversation(model, tokenizer, "", chat_format, self.max_new_tokens)
        other._fit(self.messages, Message("user", "?"))
        self.model, self.tokenizer, self.chat_format = model, tokenizer, other.chat_format
        self._end_ids, self._engine = other._end_ids, None

    def reset(self, system: str | None = None) -> None:
        """Forget what was said; ``system`` None keeps the system message.

        Raises ValueError for one that leaves no room for a question, and changes nothing then.
        """
        kept = [m for m in self.messages if m.role == "system"]
        if system is not None:
            kept = [Message("system", system)] if system else []
        self._fit(kept, Message("user", "?"))
        self.messages, self.n_forgotten = kept, 0

    def ask(self, question: str) -> Generator[str, None, None]:
        """The pieces of the answer as they come; question and answer are then part of `messages`.

        An answer that is not taken to its end is remembered as far as it came.
        Raises ValueError before the first piece, or for logits that are no numbers, and remembers
        nothing then.
        """
        messages = [*self.messages, Message("user", question)]
        context = self.model.config.max_seq_len
        kept, ids = self._fit(self.messages, messages[-1])
        self.n_forgotten = len(messages) - len(kept)
        limit = min(self.max_new_tokens, context - len(ids))
        seed = None if self.seed is None else self.seed + len(messages)
        request = Request(ids, limit, self.sampling, seed, end_ids=self._end_ids, lstrip=True)
        engine = self._engine_for(len(ids) + limit)
        ticket = engine.submit(request)

        def pieces() -> Generator[str, None, None]:
            answer = ""
            try:
                while ticket.finish_reason is None:
                    engine.step()
                    piece = ticket.read()
                    answer += piece
                    if piece:
                        yield piece
            finally:
                engine.cancel(ticket)
                if ticket.finish_reason != "error":
                    self.messages = [*messages, Message("assistant", answer.rstrip())]
                self.cut_off = ticket.finish_reason == "length"

        return pieces()

    def _engine_for(self, n: int) -> Engine:
        """The engine of the turns before, if it has room for n tokens and nothing else to do.

        A new one has room for more, so that few turns need another.
        """
        if self._engine is None or self._engine.context < n or self._engine.busy:
            room = min(max(2 * n, 1024), self.model.config.max_seq_len)
            self._engine = Engine(
                self.model, self.tokenizer, 1, max_len=room, compile=self.compile, keep=True
            )
        return self._engine

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the messages as JSON. FileExistsError where something stands already."""
        if os.path.exists(path):
            raise FileExistsError(f"{os.fspath(path)} exists and is not overwritten: name another.")
        fields = [{"role": m.role, "content": m.content} for m in self.messages]
        text = json.dumps({"messages": fields}, ensure_ascii=False, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with messages that `save` wrote. Raises OSError, or ValueError naming the file."""
        messages = read_messages(path)
        self._fit(messages, Message("user", "?"))
        self.messages, self.n_forgotten = messages, 0

    def _fit(
        self, messages: Sequence[Message], question: Message
    ) -> tuple[list[Message], list[int]]:
        """What the model reads. Its own answers may have said anything; the user may not."""
        context = self.model.config.max_seq_len
        room = context - min(self.max_new_tokens, context // 2)
        safe = [
            replace(m, content=neutralise(m.content, self.tokenizer, self.chat_format))
            if m.role == "assistant"
            else m
            for m in messages
        ]
        return fit([*safe, question], self.tokenizer, room, self.chat_format)


def read_messages(path: str | os.PathLike[str]) -> list[Message]:
    """The messages of a dialogue in a JSON file: {"messages": [{"role": ..., "content": ...}]}.

    Raises OSError if it cannot be read, ValueError, naming it and the place, for anything else.
    """
    name = os.fspath(path)
    try:
        fields = json.loads(Path(path).read_bytes())
        said = [(each["role"], each["content"]) for each in fields["messages"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{name} holds no dialogue ({error!r}): it must be JSON of the form {{"messages": '
            f'[{{"role": "user", "content": "Hello"}}, ...]}}.'
        ) from None
    for place, (role, content) in enumerate(said, 1):
        if role not in get_args(Role) or not isinstance(content, str):
            raise ValueError(
                f"{name}: message {place} has the role {role!r} and content of type "
                f"{type(content).__name__}; roles are {', '.join(get_args(Role))}, and content is "
                f"a string."
            )
    messages = [Message(role, content) for role, content in said]
    if messages[-1:] and messages[-1].role == "user":
        raise ValueError(f"{name} ends with a question of the user's that has no answer.")
    if any(message.role != "system" for message in messages):
        check_order(messages, "llama2")
    return messages
