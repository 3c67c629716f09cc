"""The routes by which the chat page keeps its conversations: /api/conversations, in JSON.

A conversation that is exported is JSON in the common form, {"messages": [{"role", "content"}]}, as
it is shown; so `minillama chat` and others read it. Beside it, in "aside", lie the messages of the
other branches, so that an import brings everything back.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from minillama.app.protocol import ApiError
from minillama.app.store import (
    MAX_MESSAGES,
    MAX_TITLE,
    NewMessage,
    NotFoundError,
    SavedConversation,
    SavedMessage,
    Speaker,
    Store,
    Summary,
)

Id = Annotated[int, Field(ge=1, lt=2**63)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
PathId = Annotated[int, Path(ge=1, lt=2**63)]


class Form(BaseModel):
    """What a request may hold: these fields, of these types, and numbers that are numbers.

    The first thing wrong is enough: pydantic's list of half a million takes a gigabyte.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            for name in fields:
                if name not in cls.model_fields:
                    readable = name[:100].encode(errors="replace").decode()
                    raise PydanticCustomError(
                        "unknown",
                        "There is no such field. Is it misspelt? Leave it out otherwise.",
                        {"field": readable},
                    )
        return fields


class Settings(Form):
    """How answers are sampled: the fields of a chat completion that the page has controls for."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: Number | None = None
    seed: int | None = None
    top_k: Number | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    neutralise: bool | None = None
    stop: Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None


class Detail(Form):
    """What an answer was made with, and what it took."""

    settings: Settings | None = None
    finish_reason: str | None = None
    prompt_tokens: Number | None = None
    completion_tokens: Number | None = None
    first_token: float | None = None  # seconds
    seconds: float | None = None


class Turn(Form):
    """A message of a conversation that comes from a file. One without a parent follows the last."""

    role: Literal["system", "user", "assistant"]
    content: str
    id: Id | None = None
    parent: Id | None = None
    detail: Detail = Detail()
    created: float | None = None


class NewConversation(Form):
    """A conversation to begin, or one that was exported."""

    title: str = ""
    settings: Settings = Settings()
    messages: list[Turn] = Field(default=[], max_length=MAX_MESSAGES, fail_fast=True)
    aside: list[Turn] = Field(default=[], max_length=MAX_MESSAGES, fail_fast=True)


class Change(Form):
    """What is to change of a conversation."""

    title: str | None = None
    system: str | None = None
    settings: Settings | None = None
    head: Id | None = None


class NewTurn(Form):
    """A message, and the id of the one that it follows."""

    parent: Id | None
    role: Speaker
    content: str
    detail: Detail = Detail()


class More(Form):
    """How an answer that is being written goes on, from the character ``begin``."""

    begin: Number
    content: str
    detail: Detail = Detail()


def router(store: Store) -> APIRouter:
    """The routes over a store; whoever mounts them sees to tokens and the size of bodies.

    They are plain functions, so that FastAPI runs them beside its event loop: a commit waits for
    the disk, and nobody's answer waits for that.
    """
    routes = APIRouter(prefix="/api/conversations")

    @routes.get("")
    def summaries(
        search: Annotated[str, Query(max_length=MAX_TITLE)] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 500,
    ) -> list[Summary]:
        with refusals():
            return store.summaries(search, limit)

    @routes.post("", status_code=201)
    def create(new: NewConversation) -> SavedConversation:
        with refusals():
            return taken_over(store, new)

    @routes.get("/{conversation}")
    def read(conversation: PathId) -> SavedConversation:
        with refusals():
            return store.read(conversation)

    @routes.patch("/{conversation}", status_code=204)
    def update(conversation: PathId, change: Change) -> None:
        settings = None if change.settings is None else _fields(change.settings)
        with refusals():
            store.update(conversation, change.title, change.system, settings, change.head)

    @routes.delete("/{conversation}", status_code=204)
    def delete(conversation: PathId) -> None:
        with refusals():
            store.delete(conversation)

    @routes.post("/{conversation}/messages", status_code=201)
    def add(conversation: PathId, new: NewTurn) -> SavedMessage:
        detail = _fields(new.detail)
        with refusals():
            return store.add(conversation, new.parent, new.role, new.content, detail)

    @routes.patch("/{conversation}/messages/{message}", status_code=204)
    def extend(conversation: PathId, message: PathId, more: More) -> None:
        with refusals():
            store.extend(conversation, message, more.begin, more.content, _fields(more.detail))

    @routes.get("/{conversation}/export")
    def export(conversation: PathId, form: Literal["json", "markdown"] = "json") -> Response:
        with refusals():
            saved = store.read(conversation)
        if form == "markdown":
            return Response(as_markdown(saved), media_type="text/markdown")
        text = json.dumps(as_json(saved), ensure_ascii=False, indent=1)
        return Response(text + "\n", media_type="application/json")

    return routes


@contextmanager
def refusals() -> Iterator[None]:
    """What a store refuses, as the error objects of the protocol."""
    try:
        yield
    except NotFoundError as error:
        raise ApiError(404, str(error), code="not_found") from None
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    except OSError as error:
        raise ApiError(507, str(error), code="storage_failed") from error


def as_json(saved: SavedConversation) -> dict[str, Any]:
    """All of a conversation; "messages" is what is shown, with the system message first."""
    shown = saved.shown()
    on_path = {message.id for message in shown}
    system = [{"role": "system", "content": saved.system}] if saved.system else []
    return {
        "title": saved.title,
        "settings": saved.settings,
        "messages": [*system, *map(asdict, shown)],
        "aside": [asdict(message) for message in saved.messages if message.id not in on_path],
    }


def as_markdown(saved: SavedConversation) -> str:
    """What is shown of a conversation, to read."""
    parts = [f"# {saved.title}"]
    if saved.system:
        parts.append("\n".join(f"> {line}".rstrip() for line in saved.system.splitlines()))
    for message in saved.shown():
        made_with = message.detail.get("settings", {})
        name = "You" if message.role == "user" else made_with.get("model", "Assistant")
        parts += [f"## {name}", message.content.strip()]
    return "\n\n".join(parts) + "\n"


def taken_over(store: Store, new: NewConversation) -> SavedConversation:
    """Keep a conversation in a store: a new one, or what `as_json` gave of another.

    Without ids the messages follow each other; with ids, each follows its parent.
    Raises ValueError for ids or parents that lead nowhere, and as `Store.create` does.
    """
    system = ""
    shown = list(new.messages)
    if shown and shown[0].role == "system":
        system = shown.pop(0).content
    turns = [*shown, *new.aside]
    if not any(turn.id for turn in shown) and not new.aside:
        parents = [None, *range(len(turns) - 1)]
        head = len(turns) - 1
    else:
        turns.sort(key=lambda turn: turn.id or 0)
        places = {turn.id: place for place, turn in enumerate(turns)}
        if len(places) < len(turns) or None in places:
            raise ValueError("Some messages have an id of their own, so every message needs one.")
        for turn in turns:
            if turn.parent is not None and turn.parent not in places:
                raise ValueError(
                    f"Message {turn.id} follows message {turn.parent}, which is not there: a "
                    f"conversation is taken over with all its branches."
                )
        parents = [None if turn.parent is None else places[turn.parent] for turn in turns]
        head = places[shown[-1].id] if shown else len(turns) - 1
    messages = []
    for place, (turn, parent) in enumerate(zip(turns, parents, strict=False), 1):
        if turn.role == "system":
            raise ValueError(
                f"Message {place} is of role 'system', which only the first message can be."
            )
        messages.append(
            NewMessage(turn.role, turn.content, parent, _fields(turn.detail), turn.created)
        )
    return store.create(
        new.title, system, _fields(new.settings), messages, head if messages else None
    )


def _fields(form: Form) -> dict[str, Any]:
    return form.model_dump(exclude_none=True)
