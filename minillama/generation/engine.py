"""The engine: requests of any kind share the rows of a batch; each gets what it would alone."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from minillama.adapt.lora import Adapters
from minillama.config import Sampling, known_name
from minillama.generation.compiled import CompiledDecoder
from minillama.generation.decoder import Decoder, n_shared
from minillama.generation.request import (
    Completion,
    Prompt,
    Request,
    Ticket,
    each_prompt,
    prompt_ids,
)
from minillama.generation.sampling import are_numbers, sample
from minillama.generation.speculative import speculate
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

T = TypeVar("T")
Each: TypeAlias = T | Sequence[T]  # a setting: one value for all prompts, or one for each

# A pass that reads one token takes about as long as one that reads this many: shorter beginnings
# are read again, many prompts at once.
WORTH_KEEPING = 16


class Held(NamedTuple):
    """What a row without a request has read, for the one that ended there."""

    ids: Sequence[int] = ()
    adapter: str | None = None
    since: int = 0  # how many requests had ended then


class Engine:
    """Continues many prompts at once: `submit` them, and call `step` until none is `busy`.

    Up to `rows` requests are computed together. As soon as one ends, the next that waits takes its
    row (continuous batching); nobody waits for the longest. A prompt is read in chunks of at most
    `prefill_chunk` tokens, between two tokens of the others, so a long one holds up nobody and
    needs no more memory; short ones are read together.

    With a `draft`, a small model of the same tokenizer, every step gives a row up to `n_draft` + 1
    tokens (see `speculate`).

    With `compile`, one token of all rows is one compiled function (see `CompiledDecoder`): the
    first takes 10 to 30 seconds, the others are faster.

    With `adapters`, which stand beside the model's layers, each request goes through the one that
    it names, or through none.

    With `keep`, the rows remember what they have read: a prompt that begins as one of them does is
    read from where they part (`Ticket.n_kept` tells). A dialogue repeats itself so, turn by turn,
    and many dialogues share a system message. What was computed token by token then stands where a
    prompt is read at once, so an answer equals the one without `keep` but for rounding. Another
    prompt takes the row whose text ended the longest ago.

    `max_len` limits prompt and answer together, in tokens; None is the model's context. The cache
    takes rows * max_len * config.cache_elements_per_token numbers, at once.
    Raises ValueError for a tokenizer or draft of another model, for adapters together with
    `compile`, and for a draft together with `keep`.
    Source of continuous batching: Yu et al. 2022, sec. 3 (Orca, OSDI); of chunks: Agrawal et al.
    2023 (arXiv:2308.16369); of beginnings that are shared: Zheng et al. 2023, sec. 3 (SGLang,
    arXiv:2312.07104). Built in notebooks/09_generation.ipynb.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        rows: int = 8,
        prefill_chunk: int = 512,
        max_len: int | None = None,
        draft: Llama | None = None,
        n_draft: int = 4,
        compile: bool = False,
        adapters: Adapters | None = None,
        keep: bool = False,
    ) -> None:
        numbers = {
            "rows": rows,
            "prefill_chunk": prefill_chunk,
            "n_draft": n_draft,
            "max_len": max_len,
        }
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}, but must be at least 1.")
        models = [model] if draft is None else [model, draft]
        for kind, size in zip(("model", "draft model"), models, strict=False):
            if tokenizer.vocab_size != size.config.vocab_size:
                raise ValueError(
                    f"The tokenizer has {tokenizer.vocab_size} tokens and the {kind} "
                    f"{size.config.vocab_size}: they do not belong together."
                )
        context = min(each.config.max_seq_len for each in models)
        self.context = context if max_len is None else min(max_len, context)
        if draft is not None and n_draft >= self.context:
            raise ValueError(
                f"n_draft is {n_draft}, but must be less than the {self.context} tokens of the "
                f"context. 4 is a good number."
            )
        if adapters is not None and compile:
            raise ValueError(
                "A compiled step has one function for all rows, while adapters differ from row to "
                "row: leave out compile, or `merge` one adapter into the weights."
            )
        if keep and draft is not None:
            raise ValueError(
                "A draft and keep do not go together: a draft is behind by what was proposed and "
                "taken back, so its rows hold other tokens. Leave out one of them."
            )
        self.tokenizer = tokenizer
        self.adapters = adapters
        self._keep = keep
        self._held = [Held()] * rows
        self._n_ended = 0
        self.prefill_chunk = prefill_chunk
        self.n_draft = n_draft
        self._rows = rows
        decoder = CompiledDecoder if compile else Decoder
        self._decoders = [decoder(each, rows, self.context) for each in models]
        self._running: list[Ticket] = []  # those in rows 0, 1, ...: each has its first token
        self._reading: list[Ticket] = []  # those in the rows behind: their prompts are being read
        self._waiting: deque[Ticket] = deque()

    @property
    def busy(self) -> bool:
        """Whether some request has not ended."""
        return bool(self._running or self._reading or self._waiting)

    def submit(self, request: Request) -> Ticket:
        """Take a request; the ticket tells how it goes.

        Raises ValueError as `Ticket` says, and for an adapter that the engine does not have.
        """
        if request.adapter is not None:
            known_name("adapter", request.adapter, self.adapters.names if self.adapters else [])
        ticket = Ticket(request, self.tokenizer, self.context)
        self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request with what it has; its row is free. Nothing happens if it has ended."""
        if ticket.finish_reason is None:
            ticket.end("cancelled")
            self._sweep()

    @torch.inference_mode()
    def step(self) -> list[Ticket]:
        """Go on by one pass: the tickets that have new tokens, or have ended, come back.

        Every running request gets its next token, and then one chunk of a waiting prompt is read.
        Raises ValueError where a model gives logits that are no numbers; the requests concerned
        have then ended with "error", and the others can go on.
        """
        advanced = [*self._running]
        target, *draft = self._decoders
        self._choose_adapters(self._running)
        if self._running and draft:
            speculate(target, draft[0], self._running, self.n_draft)
        elif self._running:
            _take(self._running, target.step([ticket.ids[-1] for ticket in self._running]))
        self._sweep()
        first_tokens = self._read_chunk()
        self._sweep()
        advanced += first_tokens
        failed = sum(ticket.finish_reason == "error" for ticket in advanced)
        if failed:
            whose = "model's or the draft model's" if draft else "model's"
            raise ValueError(
                f"The {whose} logits are no numbers (NaN or infinity) in {failed} of "
                f"{len(advanced)} rows, so no token can be drawn. Its weights are damaged: "
                f"`minillama verify PATH` checks them. Or they are too large for float16: load "
                f"them with dtype=torch.float32 (--dtype float32)."
            )
        return advanced

    def _read_chunk(self) -> list[Ticket]:
        """Read on in the prompts that wait; those that are read have their first token."""
        if not self._reading:
            self._admit()
        if not self._reading:
            return []
        first = len(self._running)
        start = self._decoders[0].lengths[first]
        chunk = [ticket.ids[start : start + self.prefill_chunk] for ticket in self._reading]
        self._choose_adapters(self._reading)
        logits, *_ = [decoder.prefill(first, chunk) for decoder in self._decoders]
        if start + len(chunk[0]) < len(self._reading[0].ids):
            return []  # a long prompt, which is alone
        ready, self._reading = self._reading, []
        _take(ready, logits)
        self._running += ready
        return ready

    def _choose_adapters(self, tickets: Sequence[Ticket]) -> None:
        if self.adapters is not None:
            self.adapters.choose([ticket.request.adapter for ticket in tickets])

    def _admit(self) -> None:
        """Choose whose prompts are read next: one, or several if they fit into one chunk."""
        longest = 0
        while self._waiting and len(self._running) + len(self._reading) < self._rows:
            ticket = self._waiting[0]
            source, known = self._known(ticket) if self._keep else (0, 0)
            longest = max(longest, len(ticket.ids))
            together = longest * (len(self._reading) + 1) <= self.prefill_chunk and not known
            if self._reading and not together:
                return
            self._seat(self._waiting.popleft(), source, known)
            if not together:
                return

    def _known(self, ticket: Ticket) -> tuple[int, int]:
        """The row that has read most of a prompt's beginning, and how many tokens of it."""
        lengths, adapter = self._decoders[0].lengths, ticket.request.adapter
        held = [
            Held(each.ids[:n], each.request.adapter)
            for each, n in zip(self._running, lengths, strict=False)
        ]
        held += self._held[len(held) :]
        shared = [
            n_shared(ticket.ids[:-1], each.ids) if each.adapter == adapter else 0 for each in held
        ]  # the last token gives the logits
        source = max(range(self._rows), key=shared.__getitem__)
        return source, shared[source] if shared[source] >= WORTH_KEEPING else 0

    def _seat(self, ticket: Ticket, source: int, known: int) -> None:
        """Give a request the first free row, and what `source` knows of its prompt.

        That row itself, if it is free and what it holds goes on as the prompt does; else a copy.
        """
        first = len(self._running) + len(self._reading)
        row = min(range(first, self._rows), key=lambda row: self._held[row].since)
        if known and source >= first and 2 * known >= len(self._held[source].ids):
            row = source
        for decoder in self._decoders:
            if known and row != source:
                decoder.copy(source, row, known)
            decoder.lengths[row] = known
        self._held[row] = Held()
        self._swap(row, first)
        ticket.n_kept = known
        self._reading.append(ticket)

    def _sweep(self) -> None:
        """Forget the requests that have ended. The last running row takes the place of each."""
        self._waiting = deque(ticket for ticket in self._waiting if ticket.finish_reason is None)
        if self._reading and self._reading[0].finish_reason is not None:
            self._leave(len(self._running), self._reading.pop())
        for row in reversed(range(len(self._running))):
            if self._running[row].finish_reason is None:
                continue
            self._leave(row, self._running[row])
            last = len(self._running) - 1
            self._running[row] = self._running[last]
            self._running.pop()
            self._swap(last, row)
            if self._reading:  # it stands behind the running rows
                self._swap(last + 1, last)

    def _leave(self, row: int, ticket: Ticket) -> None:
        """A request has ended, and its row is free."""
        for decoder in self._decoders:
            if ticket.finish_reason == "error":
                decoder.clear(row)
            elif not self._keep:
                decoder.lengths[row] = 0
        self._n_ended += 1
        ids = ticket.ids[: self._decoders[0].lengths[row]]
        self._held[row] = Held(ids, ticket.request.adapter, self._n_ended)

    def _swap(self, row: int, other: int) -> None:
        if row != other:
            held = self._held
            held[row], held[other] = held[other], held[row]
            for decoder in self._decoders:
                decoder.swap(row, other)


def _take(tickets: Sequence[Ticket], logits: Float[Tensor, "batch vocab"]) -> None:
    """Give each request a token of its own; the likeliest ones are found for all at once."""
    likeliest, usable = logits.max(-1).indices.tolist(), are_numbers(logits).tolist()
    for row, ticket in enumerate(tickets):
        sampling = ticket.request.sampling
        if not usable[row]:
            ticket.end("error")
        elif sampling.temperature == 0 and sampling.repetition_penalty == 1:
            ticket.take(likeliest[row], logits[row])
        else:
            token = sample(logits[row], sampling, ticket.generator, ticket.ids)
            ticket.take(token, logits[row])


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Prompt | Iterable[Prompt],
    max_new_tokens: Each[int] = 200,
    temperature: Each[float] = 0.0,
    top_k: Each[int | None] = None,
    top_p: Each[float | None] = None,
    seed: Each[int | None] = None,
    stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
    logprobs: Each[bool] = False,
    min_p: Each[float | None] = None,
    repetition_penalty: Each[float] = 1.0,
    draft: Llama | None = None,
    n_draft: int = 4,
    rows: int = 64,
    compile: bool = False,
) -> list[Completion]:
    """Continue each prompt; an empty one starts from BOS alone.

    A prompt is a text, or token ids (a list or 1-D tensor) that are taken as they are. A completion
    depends on its own prompt and settings and never on its neighbours: prompts of any lengths can
    share a call, and a setting is one value for all or a list with one for each. One `seed` serves
    every prompt; to sample one prompt several times, give a seed for each. None draws fresh ones. A
    completion also ends, with reason "length", where the model's context is full.

    `rows` prompts are computed at a time; the others wait for a row to become free. A small `draft`
    model that proposes `n_draft` tokens at a time makes a large one faster (see `speculate`).
    `compile` is worth its 10 to 30 seconds for thousands of tokens (see `CompiledDecoder`).

    Raises ValueError for a prompt that leaves no room in the context, for a tokenizer of another
    model, for settings that mean nothing, and for logits that are no numbers.
    Built in notebooks/09_generation.ipynb.
    """
    texts = each_prompt(prompts)
    if isinstance(stop, str) or all(isinstance(string, str) for string in stop):
        stop = [cast(Sequence[str], stop)] * len(texts)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "logprobs": logprobs,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    for name, values in settings.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            settings[name] = [values] * len(texts)
        elif len(values) != len(texts):
            raise ValueError(
                f"There are {len(texts)} prompts, but {len(values)} values for {name}: give one "
                f"each, or one for all."
            )
    requests = [
        _request(tokenizer, prompt, **dict(zip(settings, values, strict=True)))
        for prompt, *values in zip(texts, *settings.values(), strict=True)
    ]
    if not requests:
        return []
    engine = _engine_for(requests, model, tokenizer, draft, n_draft, rows, compile)
    tickets = [engine.submit(request) for request in requests]
    while engine.busy:
        engine.step()
    return [ticket.completion() for ticket in tickets]


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    draft: Llama | None = None,
    n_draft: int = 4,
    compile: bool = False,
) -> Iterator[str]:
    """The pieces of `generate`'s text, each as soon as it is certain; together they are the text.

    Raises as `generate` does; for all but logits that are no numbers, before the first piece.
    """
    request = _request(
        tokenizer,
        prompt,
        max_new_tokens,
        seed=seed,
        stop=stop,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    engine = _engine_for([request], model, tokenizer, draft, n_draft, 1, compile)
    ticket = engine.submit(request)

    def pieces() -> Iterator[str]:
        while engine.busy:
            engine.step()
            if piece := ticket.read():
                yield piece

    return pieces()


def _request(
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_new_tokens: int,
    seed: int | None,
    stop: str | Sequence[str],
    logprobs: bool = False,
    **sampling: Any,
) -> Request:
    ids = prompt_ids(prompt, tokenizer)
    return Request(ids, max_new_tokens, Sampling(**sampling), seed, stop, logprobs)


def _engine_for(
    requests: Sequence[Request],
    model: Llama,
    tokenizer: Tokenizer,
    draft: Llama | None,
    n_draft: int,
    rows: int,
    compile: bool,
) -> Engine:
    """An engine with no more room than these requests can use."""
    rows = min(rows, len(requests))
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    room = longest + n_draft if draft else longest
    return Engine(model, tokenizer, rows, 512, room, draft, n_draft, compile)
