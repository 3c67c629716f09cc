"""The models of a server: each has an engine in a thread of its own, and many clients at a time."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from minillama.adapt.lora import Adapter, Adapters
from minillama.app.limits import Limits
from minillama.app.protocol import ApiError, ChatForm, CompletionForm, Token
from minillama.chat.dialog import (
    DialogTokens,
    Message,
    encode_dialog,
    end_of_answer,
    fit,
    neutralise,
    recognise,
)
from minillama.config import LLAMA_2_CHAT, Sampling
from minillama.generation import Engine, Request
from minillama.generation.request import FinishReason, Ticket
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def closing() -> ApiError:
    return ApiError(503, "The server is shutting down. Ask again when it is back.", "closing")


# --- One engine, one thread ----------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """What is new about one of the requests that were asked together."""

    index: int
    text: str
    tokens: Sequence[Token] = ()  # where logprobs were asked for
    n_tokens: int = 0  # of the answer so far
    finish_reason: FinishReason | None = None


class Job:
    """What one client waits for: updates go from the engine's thread to the client's event loop."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.tickets: list[Ticket] = []
        self.n_prompt = 0  # tokens of all prompts
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Update] | Exception] = asyncio.Queue()

    def post(self, news: list[Update] | Exception) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, news)

    @property
    def n_kept(self) -> int:
        """Tokens of the prompts that the engine had read before."""
        return sum(ticket.n_kept for ticket in self.tickets)

    async def news(self) -> list[Update]:
        """Waits for the next updates. Raises what became of the engine instead."""
        news = await self._queue.get()
        if isinstance(news, Exception):
            raise news
        return news

    async def updates(self) -> AsyncIterator[Update]:
        """Until all requests have ended."""
        n_open = len(self.requests)
        while n_open:
            for update in await self.news():
                n_open -= update.finish_reason is not None
                yield update


class EngineThread:
    """An engine that steps while somebody waits for an answer.

    Whoever asks gets the engine's ear between two steps. Where a step fails, those whose rows are
    broken are told; where it is not known whose, all are, and a new engine takes the next requests.
    """

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self._make_engine = make_engine
        self._engine: Engine | None = make_engine()
        self._open: dict[Ticket, tuple[Job, int]] = {}
        self._told: dict[Ticket, int] = {}  # how many tokens the client knows of
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._ending = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def n_open(self) -> int:
        """Requests that run or wait."""
        return len(self._open)

    @asynccontextmanager
    async def answering(self, requests: Sequence[Request]) -> AsyncIterator[Job]:
        """The requests are on their way; at the end of the block they are cancelled.

        Raises ValueError, before the block, as `Engine.submit` does.
        """
        if not self._thread.is_alive():
            raise closing()
        job = Job(requests)
        self._commands.put(partial(self._submit, job))
        try:
            await job.news()  # the engine has taken them
            yield job
        finally:
            self._commands.put(partial(self._cancel, job))

    def interrupt(self, error: Exception) -> None:
        """Tell everybody who waits this error."""
        self._commands.put(partial(self._fail, self._open, error))

    def close(self) -> None:
        """Wait for the step that is going on, and end. Those who wait are told."""
        self.interrupt(closing())
        self._commands.put(self._end)
        self._thread.join()

    # What follows runs in the thread.

    def _run(self) -> None:
        while not self._ending:
            self._obey(wait=not self._open)
            if self._open:
                self._step()

    def _obey(self, wait: bool) -> None:
        """Do what was asked for since the last step; with `wait`, until something is."""
        with suppress(Empty):
            while not self._ending:
                self._commands.get(block=wait)()
                wait = False

    def _end(self) -> None:
        self._ending = True

    def _submit(self, job: Job) -> None:
        try:
            self._engine = self._engine or self._make_engine()
            for request in job.requests:
                job.tickets.append(self._engine.submit(request))
        except Exception as error:
            self._cancel(job)
            job.post(error if isinstance(error, ValueError) else _failure(error))
            return
        job.n_prompt = sum(ticket.n_prompt for ticket in job.tickets)
        for index, ticket in enumerate(job.tickets):
            self._open[ticket], self._told[ticket] = (job, index), 0
        job.post([])

    def _cancel(self, job: Job) -> None:
        for ticket in job.tickets:
            self._forget(ticket)
            if self._engine is not None:
                self._engine.cancel(ticket)

    def _forget(self, ticket: Ticket) -> None:
        self._open.pop(ticket, None)
        self._told.pop(ticket, None)

    def _step(self) -> None:
        assert self._engine is not None
        try:
            self._tell(self._engine.step())
        except Exception as error:
            broken = [ticket for ticket in self._open if ticket.finish_reason == "error"]
            if broken:
                self._fail(broken, ApiError(500, str(error), "damaged_model"))
                self._tell(self._open)
            else:
                self._engine = None
                self._fail(self._open, _failure(error))

    def _tell(self, tickets: Iterable[Ticket]) -> None:
        """What is new about these, to those who asked."""
        news: dict[Job, list[Update]] = {}
        for ticket in [ticket for ticket in tickets if ticket in self._open]:
            job, index = self._open[ticket]
            news.setdefault(job, []).append(self._update(ticket, index))
            if ticket.finish_reason is not None:
                self._forget(ticket)
        for job, updates in news.items():
            job.post(updates)

    def _update(self, ticket: Ticket, index: int) -> Update:
        assert self._engine is not None
        told, n_tokens = self._told[ticket], len(ticket.ids) - ticket.n_prompt
        self._told[ticket] = n_tokens
        tokens = []
        if ticket.request.logprobs:
            tokens = [
                _token(self._engine.tokenizer, ticket, place) for place in range(told, n_tokens)
            ]
        return Update(index, ticket.read(), tokens, n_tokens, ticket.finish_reason)

    def _fail(self, tickets: Iterable[Ticket], error: Exception) -> None:
        for job in {self._open[ticket][0] for ticket in tickets}:
            self._cancel(job)
            job.post(error)


def _failure(error: Exception) -> ApiError:
    """What a client is told of a failure that is none of his; the log has it all."""
    log.error("The engine failed; a new one takes the next requests.", exc_info=error)
    return ApiError(
        500,
        f"The engine failed ({type(error).__name__}), and a new one has taken its place. The "
        f"server's log says more.",
        "engine_failure",
    )


def _token(tokenizer: Tokenizer, ticket: Ticket, place: int) -> Token:
    return Token(
        text_of(tokenizer, ticket.ids[ticket.n_prompt + place]),
        ticket.logprobs[place],
        [(text_of(tokenizer, i), logprob) for i, logprob in ticket.top_logprobs[place]],
    )


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """What a token adds in the middle of a text; U+FFFD for a part of a character."""
    decoder = tokenizer.decoder()
    for i in tokenizer.encode("a"):
        decoder.push(i)
    return decoder.push(token) + decoder.flush()


# --- Models by name ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A name that clients ask for: a model, or one of its adapters."""

    name: str
    thread: EngineThread
    tokenizer: Tokenizer
    context: int  # tokens
    chat_format: str
    sampling: Sampling = LLAMA_2_CHAT  # where the client does not say
    parent: str | None = None  # of an adapter: the model's name

    def requests(self, form: ChatForm | CompletionForm, limits: Limits) -> list[Request]:
        """What the engine is to do. Raises ApiError for a dialogue that the model cannot read."""
        if isinstance(form, CompletionForm):
            return self._requests(form, form.prompt, form.limit)
        if form.messages[-1].role != "user":
            said = "The last message must be of the role user: it is what is answered."
            raise ApiError(400, said, "invalid_value", "messages")
        limit = form.limit or limits.max_tokens
        ids = self.prompt(form, limit)[1].ids
        end_ids = (self.tokenizer.eos_id, end_of_answer(self.tokenizer, self.chat_format))
        return self._requests(form, [ids], limit, end_ids)

    def shown(self, form: ChatForm, limits: Limits) -> dict[str, Any]:
        """What the model reads, id by id; the ids under `control` are made by no text."""
        kept, tokens = self.prompt(form, form.limit or limits.max_tokens)
        tokenizer = self.tokenizer
        control = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.special_ids.values()}
        return {
            "ids": tokens.ids,
            "pieces": [tokenizer.pieces[i] for i in tokens.ids],
            "texts": [text_of(tokenizer, i) for i in tokens.ids],
            "roles": tokens.roles,
            "control": [i in control for i in tokens.ids],
            "context": self.context,
            "forgotten": len(form.messages) - len(kept),
        }

    def prompt(self, form: ChatForm, limit: int) -> tuple[list[Message], DialogTokens]:
        """The messages that the model reads, and their ids.

        With truncation "auto" as much room as in a `Conversation` is left for an answer of `limit`
        tokens. Raises ApiError for a dialogue that cannot be written down, or does not fit.
        """
        messages = [
            Message("system" if each.role == "developer" else each.role, each.content)
            for each in form.messages
        ]
        # Its own answers may have said anything; a user may not.
        safe = [
            replace(each, content=neutralise(each.content, self.tokenizer, self.chat_format))
            if form.neutralise or each.role == "assistant"
            else each
            for each in messages
        ]
        try:
            if form.truncation == "auto":
                room = self.context - min(limit, self.context // 2)
                safe, _ = fit(safe, self.tokenizer, room, self.chat_format)
            tokens = encode_dialog(safe, self.tokenizer, self.chat_format)
        except ValueError as error:
            marked = any(
                neutralise(each.content, self.tokenizer, self.chat_format) != each.content
                for each in safe
            )
            code = "control_marker" if marked else "invalid_value"
            way_out = ' Or have that done: "neutralise": true.' if marked else ""
            raise ApiError(400, str(error) + way_out, code, "messages") from None
        if len(tokens.ids) >= self.context:
            raise ApiError(
                400,
                f"The dialogue takes {len(tokens.ids):,} tokens, and the context of {self.name} "
                f"holds {self.context:,}, the answer included. Leave out the oldest turns, or have "
                f'that done: "truncation": "auto".',
                "context_length_exceeded",
                "messages",
            )
        return safe, tokens

    def _requests(
        self,
        form: ChatForm | CompletionForm,
        prompts: Sequence[str | list[int]],
        limit: int,
        end_ids: Sequence[int] | None = None,
    ) -> list[Request]:
        """`n` for each prompt; if there is a seed, theirs follow it one by one."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(form, name) for name in names if getattr(form, name) is not None}
        return [
            Request(
                prompt,
                limit,
                replace(self.sampling, **given),
                None if form.seed is None else form.seed + number,
                form.stop,
                form.wants_logprobs,
                top_logprobs=form.top_logprobs,
                end_ids=end_ids,
                adapter=None if self.parent is None else self.name,
                lstrip=isinstance(form, ChatForm),
            )
            for prompt in prompts
            for number in range(form.n)
        ]

    def card(self) -> dict[str, Any]:
        """How the model is listed. `context`, `chat_format` and `parent` are not OpenAI's."""
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "minillama",
            "context": self.context,
            "chat_format": self.chat_format,
            "parent": self.parent,
        }


def serve_model(
    name: str,
    model: Llama,
    tokenizer: Tokenizer,
    adapters: Mapping[str, Adapter] | None = None,
    chat_format: str | None = None,
    sampling: Sampling = LLAMA_2_CHAT,
    rows: int = 8,
    max_len: int | None = None,
    compile: bool = False,
) -> list[ServedModel]:
    """A model that answers under its name, and under those of its adapters.

    `rows` requests are computed at a time, the others wait; what was read for one is not read again
    for another that begins alike, such as the next turn of a dialogue (see `Engine`'s `keep`).
    `max_len` bounds prompt and answer, in tokens: the cache of rows * max_len tokens is made at
    once. `chat_format` None is the one that `recognise` finds. Raises ValueError as `Engine` and
    `Adapters` do.
    """
    chat_format = chat_format or recognise(tokenizer)
    end_of_answer(tokenizer, chat_format)  # refuses a format that this vocabulary does not have
    by_row = Adapters(model, adapters) if adapters else None

    def make_engine() -> Engine:
        return Engine(
            model, tokenizer, rows, max_len=max_len, compile=compile, adapters=by_row, keep=True
        )

    thread = EngineThread(make_engine)
    served = ServedModel(
        name=name,
        thread=thread,
        tokenizer=tokenizer,
        context=min(max_len or model.config.max_seq_len, model.config.max_seq_len),
        chat_format=chat_format,
        sampling=sampling,
    )
    return [served, *(replace(served, name=each, parent=name) for each in adapters or {})]
