"""The OpenAI protocol: what a client may ask, what comes back, and how errors look.

A field that would change the answer and that minillama does not have is refused by name, as is one
that nobody knows: it may be a misspelt one. Fields that change nothing are accepted and ignored.
Source: the protocol's public description, of chat completions, completions and models.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from minillama.app.limits import Limits

F = TypeVar("F", bound="ChatForm | CompletionForm")

# --- Errors --------------------------------------------------------------------------------------

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """What a client is told instead of an answer: a status and the protocol's error object.

    `code` is for programs, `param` names the field at fault.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, usual),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def refusal(errors: Sequence[Any]) -> ApiError:
    """The first of the things that pydantic finds wrong with a form."""
    first = errors[0]
    context = first.get("ctx", {})
    place = [*first["loc"], *([context["field"]] if "field" in context else [])]
    param = ".".join(map(str, place))
    said = str(context["error"]) if "error" in context else first["msg"]
    return ApiError(400, f"{param}: {said}" if param else said, "invalid_value", param or None)


# --- What is asked -------------------------------------------------------------------------------


class Form(BaseModel):
    """A JSON object of the protocol. A field that is null counts as left out.

    `HARMLESS` fields are ignored. `NEUTRAL` ones, which minillama does not have, may have the
    values that leave the answer as it is.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", frozen=True)
    HARMLESS: ClassVar[frozenset[str]] = frozenset()
    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            raise PydanticCustomError("form", "This must be an object: {...}.")
        kept = {}
        for name, value in fields.items():
            if value is None or name in cls.HARMLESS:
                continue
            if name in cls.NEUTRAL:
                if value not in cls.NEUTRAL[name]:
                    raise PydanticCustomError(
                        "unsupported",
                        "minillama does not have this. Leave it out.",
                        {"field": name},
                    )
            elif name not in cls.model_fields:
                raise PydanticCustomError(
                    "unknown",
                    "There is no such field. Is it misspelt? Leave it out otherwise.",
                    {"field": name[:100]},
                )
            else:
                kept[name] = value
        return kept


def _joined(content: Any) -> Any:
    """The text of a message that comes in parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                'A part of the content is not {"type": "text", "text": "..."}: the models here '
                "read text only."
            )
    return "".join(part["text"] for part in content)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """One prompt or many, as a list."""
    prompts = value if isinstance(value, list) and not _is_prompt(value) else [value]
    if not (prompts and all(map(_is_prompt, prompts))):
        raise ValueError("A prompt must be a text or a list of token ids; or a list of prompts.")
    return prompts


def _is_prompt(value: Any) -> bool:
    ids = isinstance(value, list) and value and all(type(i) is int for i in value)
    return isinstance(value, str) or bool(ids)


Text = Annotated[str, BeforeValidator(_joined)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=200)]],
    Field(max_length=16),
    BeforeValidator(_listed),
]


class ChatMessage(Form):
    """Who says what. Names of speakers are taken and not shown to the model."""

    HARMLESS = frozenset({"name"})
    NEUTRAL: ClassVar = {
        "tool_calls": ([],),
        "function_call": (),
        "tool_call_id": (),
        "refusal": ("",),
        "audio": (),
        "annotations": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Text = ""  # an answer may be empty; `check_order` refuses a user who says nothing


class StreamOptions(Form):
    HARMLESS = frozenset({"include_obfuscation"})

    include_usage: bool = False


class Settings(Form):
    """What a chat completion and a completion have in common.

    `top_k`, `min_p` and `repetition_penalty` are not OpenAI's; they mean what they mean in
    `generate`. What is left out is as the server's command line says.
    """

    HARMLESS = frozenset(
        {
            "metadata",
            "parallel_tool_calls",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        }
    )
    NEUTRAL: ClassVar = {
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "presence_penalty": (0,),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        # of completions
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }

    model: str = Field(min_length=1, max_length=300)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)  # beyond, float32 overflows
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    stop: Stops = []


class ChatForm(Settings):
    """POST /v1/chat/completions.

    With `truncation` "auto", the oldest turns are left out where the context is full; with
    `neutralise`, a marker such as [INST] in a user's text gets a space and is no error. Neither is
    OpenAI's.
    """

    messages: Annotated[list[ChatMessage], FailFast()] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # its newer name
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    truncation: Literal["auto", "disabled"] = "disabled"
    neutralise: bool = False

    @property
    def texts(self) -> Sequence[str]:
        return [message.content for message in self.messages]

    @property
    def limit(self) -> int | None:
        """Tokens of an answer, if the client says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def n_choices(self) -> int:
        return self.n

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    @model_validator(mode="after")
    def _consistent(self) -> "ChatForm":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top", "top_logprobs needs logprobs: true.")
        return self


class CompletionForm(Settings):
    """POST /v1/completions: prompts as texts or token ids, without the frame of a dialogue."""

    prompt: Annotated[list[Any], Field(min_length=1), BeforeValidator(_prompts)] = [""]
    max_tokens: int = Field(16, ge=1)  # the protocol's own
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def texts(self) -> Sequence[str | list[int]]:
        return self.prompt

    @property
    def limit(self) -> int:
        return self.max_tokens

    @property
    def n_choices(self) -> int:
        return self.n * len(self.prompt)

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None  # 0: of the tokens alone

    @property
    def top_logprobs(self) -> int:
        return self.logprobs or 0


def parse(form: type[F], fields: Mapping[str, Any]) -> F:
    """A form out of the JSON object that a client sent. Raises ApiError, naming the field."""
    try:
        return cast(F, form.model_validate(fields))
    except ValidationError as error:
        raise refusal(error.errors(include_url=False, include_input=False)) from None


def parse_json(body: bytes) -> dict[str, Any]:
    """Raises ApiError unless this is a JSON object, without NaN, and not nested without end."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is no JSON: {error}.", "invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object: {...}.", "invalid_json")
    return fields


def check_limits(form: "ChatForm | CompletionForm", limits: Limits) -> None:
    """Before anything is computed. Raises ApiError, naming the field and the limit."""
    texts = form.texts
    param = "messages" if isinstance(form, ChatForm) else "prompt"
    for name, value, limit, what in (
        (param, len(texts), limits.max_messages, "entries"),
        (param, sum(map(len, texts)), limits.max_characters, "characters"),
        ("max_tokens", form.limit or 0, limits.max_tokens, "tokens of an answer"),
        ("n", form.n_choices, limits.max_choices, "answers at once"),
    ):
        _check_limit(name, value, limit, what)
    if form.wants_logprobs:
        n_each = min(form.limit or limits.max_tokens, limits.max_tokens) * (1 + form.top_logprobs)
        n = form.n_choices * n_each
        _check_limit("logprobs", n, limits.max_logprobs, "in an answer")


def check_sizes(fields: Mapping[str, Any], limits: Limits) -> None:
    """The same of a request that another server reads. Raises ApiError."""
    for name, limit, what in (
        ("messages", limits.max_messages, "entries"),
        ("max_tokens", limits.max_tokens, "tokens of an answer"),
        ("max_completion_tokens", limits.max_tokens, "tokens of an answer"),
        ("n", limits.max_choices, "answers at once"),
    ):
        value = fields.get(name)
        size = len(value) if isinstance(value, list) else value
        if isinstance(size, int):
            _check_limit(name, size, limit, what)


def _check_limit(name: str, value: int, limit: int, what: str) -> None:
    if value > limit:
        raise ApiError(
            400,
            f"{name}: {value:,} {what}, but this server takes at most {limit:,}.",
            "limit_exceeded",
            name,
        )


# --- What comes back -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """A token of an answer: its text, how likely it was, and what else was likely."""

    text: str
    logprob: float  # nats, before penalty, temperature and cuts
    top: Sequence[tuple[str, float]] = ()  # the likeliest, the first first


class Reply:
    """Makes the objects of one answer: the whole, or the chunks of a stream."""

    def __init__(self, model: str, chat: bool, stream: bool) -> None:
        kind = "chat.completion" + ".chunk" * stream if chat else "text_completion"
        self._chat, self._stream = chat, stream
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._lengths: dict[int, int] = {}  # of the texts so far, by choice

    def choice(
        self, index: int, text: str, tokens: Sequence[Token] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        """What is new in an answer, or all of it; `tokens` None says nothing of likelihoods."""
        first = index not in self._lengths
        start = self._lengths.setdefault(index, 0)
        self._lengths[index] += len(text)
        content: dict[str, Any] = {"text": text}
        if self._chat and self._stream:
            content = {"delta": {"role": "assistant", "content": text} if first else {}}
            if text:
                content["delta"]["content"] = text
        elif self._chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        logprobs = None
        if tokens is not None:
            logprobs = _of_chat(tokens) if self._chat else _of_completion(tokens, start)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def object(
        self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {**self._head, "choices": choices, "usage": usage}


def usage(n_prompt: int, n_kept: int, n_answer: int) -> dict[str, Any]:
    """Tokens read, of them those that had been read before, and written; no end of an answer."""
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": {"cached_tokens": n_kept},
    }


def event(value: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {as_json(value)}\n\n"


DONE = "data: [DONE]\n\n"
EVENTS = "text/event-stream"


def as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _of_chat(tokens: Sequence[Token]) -> dict[str, Any]:
    def one(text: str, logprob: float) -> dict[str, Any]:
        # A part of a character is no text; its bytes are not known here.
        whole = "\ufffd" not in text
        n_bytes = list(text.encode()) if whole else None
        return {"token": text, "logprob": _finite(logprob), "bytes": n_bytes}

    content = [
        one(token.text, token.logprob) | {"top_logprobs": [one(*each) for each in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _of_completion(tokens: Sequence[Token], start: int) -> dict[str, Any]:
    """The older form; `start` is how much of the text was sent before."""
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            {text: _finite(logprob) for text, logprob in reversed(token.top)} for token in tokens
        ],
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity; the protocol says so where it needs one
