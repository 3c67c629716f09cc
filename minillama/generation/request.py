"""What is asked of an engine, what comes back, and what lies between: a ticket."""

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal, SupportsIndex, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from minillama.config import Sampling, check_whole
from minillama.generation.stop import StopFilter
from minillama.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "error"]
# A text, or token ids that are taken as they are: a list of whole numbers, or a 1-D tensor.
Prompt: TypeAlias = str | Sequence[SupportsIndex] | Tensor


@dataclass(frozen=True)
class Completion:
    """What the model wrote behind one prompt."""

    text: str  # without the prompt, and without the stop string
    token_ids: list[int]  # as drawn, without what ends it
    finish_reason: FinishReason  # "stop": an id or string that ends it; "length": the limit
    logprobs: list[float] | None = None  # of the tokens, in nats, before penalty, temperature, cuts
    acceptance: float | None = None  # the share of a draft model's proposals that stood


@dataclass(frozen=True)
class Request:
    """One prompt, and how to go on with it; the settings mean what they mean in `generate`.

    `end_ids` end the answer and are no part of it; None is the tokenizer's EOS alone, while a chat
    also ends its answers with `end_of_answer`. `adapter` names one of the engine's adapters.
    `top_logprobs` is how many of the likeliest tokens a ticket keeps at each place. With `lstrip`
    the text begins at its first character that is no white space, as a chat's answer does.
    Raises ValueError for settings that mean nothing.
    """

    prompt: Prompt
    max_new_tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: bool = False
    end_ids: Sequence[int] | None = None
    adapter: str | None = None
    top_logprobs: int = 0
    lstrip: bool = False

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, but must be at least 1.")
        check_whole("top_logprobs", self.top_logprobs)
        if self.top_logprobs < 0:
            raise ValueError(f"top_logprobs is {self.top_logprobs}, but must be at least 0.")
        if self.seed is not None:
            check_whole("seed", self.seed)
            if not 0 <= self.seed < 2**63:
                raise ValueError(f"seed is {self.seed}, but must be at least 0 and below 2**63.")
        StopFilter(self.stop)  # refuses empty strings


class Ticket:
    """A request on its way: what was drawn for it, and the text that is certain so far.

    `Engine.submit` makes it. `finish_reason` is None until it has ended. `n_kept` counts the tokens
    of the prompt that the engine had read before, for others.
    Raises ValueError for a prompt without a token, with ids outside the vocabulary, or so long that
    it leaves no room among the `context` tokens.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, context: int) -> None:
        self.request = request
        self.ids = prompt_ids(request.prompt, tokenizer)  # of the prompt, then of the answer
        self.n_prompt, self.n_kept = len(self.ids), 0
        if self.n_prompt >= context:
            raise ValueError(
                f"The prompt has {self.n_prompt} tokens, but the model's context holds {context}, "
                f"the answer included. Shorten the prompt to less than {context} tokens."
            )
        self.limit = min(request.max_new_tokens, context - self.n_prompt)
        self.generator = torch.Generator()
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(index(request.seed))
        self.finish_reason: FinishReason | None = None
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []  # (id, logprob), likeliest first
        self.n_proposed = self.n_accepted = 0  # tokens of a draft model
        self._pieces: list[str] = []
        self._n_read = 0
        end_ids = request.end_ids
        self._end_ids = {tokenizer.eos_id} if end_ids is None else set(end_ids)
        self._decoder = tokenizer.decoder()
        for token in self.ids:  # the answer's first space is then not taken for the text's
            self._decoder.push(token)
        self._begun = not request.lstrip
        self._stop = StopFilter(request.stop)

    @property
    def token_ids(self) -> list[int]:
        """The answer's ids so far."""
        return self.ids[self.n_prompt :]

    def read(self) -> str:
        """The text that has become certain since the last call; all of these are the answer."""
        new, self._n_read = self._pieces[self._n_read :], len(self._pieces)
        return "".join(new)

    def completion(self) -> Completion:
        """The answer. Raises ValueError while it is not complete."""
        if self.finish_reason is None:
            raise ValueError(
                f"The answer has {len(self.token_ids)} tokens and is not complete: call the "
                f"engine's step() until finish_reason is set."
            )
        return Completion(
            "".join(self._pieces),
            self.token_ids,
            self.finish_reason,
            self.logprobs if self.request.logprobs else None,
            self.n_accepted / self.n_proposed if self.n_proposed else None,
        )

    def take(self, token: int, logits: Float[Tensor, " vocab"]) -> None:
        """Append a token that was drawn with these logits, or end the answer."""
        if token in self._end_ids:
            self.end("stop")
            return
        self.ids.append(token)
        if self.request.logprobs:
            logprobs = logits.log_softmax(-1)
            self.logprobs.append(logprobs[token].item())
            top = logprobs.topk(min(self.request.top_logprobs, len(logprobs))).indices.tolist()
            self.top_logprobs.append([(i, logprobs[i].item()) for i in top])
        self._push(self._decoder.push(token))
        if self._stop.stopped or len(self.ids) - self.n_prompt == self.limit:
            self.end("length")

    def end(self, reason: FinishReason) -> None:
        """End the answer here. What was held back is text now, or completes a stop string."""
        self._push(self._decoder.flush())
        self._pieces.append(self._stop.flush())
        self.finish_reason = "stop" if self._stop.stopped else reason

    def _push(self, piece: str) -> None:
        """Stop strings are looked for in what is written, so not in what `lstrip` takes away."""
        if not self._begun:
            piece = piece.lstrip()
            self._begun = bool(piece)
        self._pieces.append(self._stop.push(piece))


def each_prompt(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list. What begins with a whole number is the ids of one."""
    prompts = _plain(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"The prompts are {prompts!r}, but must be a text, token ids, or a list.")
    each = [_plain(prompt) for prompt in prompts]
    return [cast(Prompt, each)] if each and hasattr(each[0], "__index__") else each


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt: those of a text start with BOS, if this model's texts do.

    An empty text is BOS alone. Raises ValueError for no ids, for what is none, and for ids outside
    the vocabulary.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos or not prompt)
    else:
        try:
            ids = [index(token) for token in _plain(prompt)]
        except TypeError:
            raise ValueError(
                f"A prompt is {reprlib.repr(_plain(prompt))}, but must be a text, or token ids: "
                f"whole numbers in one list."
            ) from None
    if not ids:
        raise ValueError(
            f"The prompt has no token, but a model needs one to go on from: [{tokenizer.bos_id}] "
            f"is BOS."
        )
    wrong = [token for token in ids if not 0 <= token < tokenizer.vocab_size]
    if wrong:
        raise ValueError(
            f"The prompt has the token id {wrong[0]}, but the vocabulary has the ids 0 to "
            f"{tokenizer.vocab_size - 1}. Was it encoded with the tokenizer of another model?"
        )
    return ids


def _plain(value: Any) -> Any:
    """A tensor or array as lists of Python's numbers."""
    return value.tolist() if hasattr(value, "tolist") else value
