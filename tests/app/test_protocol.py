"""What may be asked, and what answers look like; the `openai` package's own types judge them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from minillama.app.limits import Limits
from minillama.app.protocol import (
    ApiError,
    ChatForm,
    ChatMessage,
    CompletionForm,
    Reply,
    Settings,
    Token,
    as_json,
    check_limits,
    event,
    parse,
    parse_json,
    usage,
)

CHAT = {"model": "small", "messages": [{"role": "user", "content": "Ben?"}]}
TEXT = {"model": "small", "prompt": "Ada had"}


def refused(fields: dict, form: type = ChatForm) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(form, fields)
    assert caught.value.status == 400
    return caught.value


# --- What is asked -------------------------------------------------------------------------------


def test_a_chat_completion_in_full():
    form = parse(
        ChatForm,
        {
            "model": "small",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "name": "ben", "content": "Hello"},
                {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "b"}],
                },
            ],
            "max_completion_tokens": 5,
            "temperature": 1,
            "top_p": 0.5,
            "n": 2,
            "seed": 7,
            "stop": "END",
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 3,
            "user": "somebody",
            "metadata": {"run": "1"},
            "tools": [],
            "response_format": {"type": "text"},
            "frequency_penalty": 0.0,
        },
    )
    assert [m.content for m in form.messages] == ["Be brief.", "Hello", "Hi", "Ab"]
    assert (form.limit, form.stop, form.n_choices) == (5, ["END"], 2)
    assert form.stream_options.include_usage


@pytest.mark.parametrize("name", [*ChatForm.model_fields])
def test_null_is_the_same_as_leaving_a_field_out(name):
    if name in CHAT:
        assert refused(CHAT | {name: None}).param == name
    else:
        assert parse(ChatForm, CHAT | {name: None}) == parse(ChatForm, CHAT)


@pytest.mark.parametrize("name", sorted(Settings.HARMLESS))
def test_what_changes_nothing_is_ignored(name):
    assert parse(ChatForm, CHAT | {name: {"any": ["thing"]}}) == parse(ChatForm, CHAT)


@pytest.mark.parametrize("name", sorted(Settings.NEUTRAL))
def test_what_would_change_the_answer_is_refused_by_name(name):
    for neutral in (*Settings.NEUTRAL[name], None):
        assert parse(CompletionForm, TEXT | {name: neutral}) == parse(CompletionForm, TEXT)
    error = refused(CHAT | {name: {"other": 1}})
    assert (error.param, error.message) == (
        name,
        f"{name}: minillama does not have this. Leave it out.",
    )


def test_of_a_message_too():
    message = {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}
    assert refused(CHAT | {"messages": [message]}).param == "messages.0.tool_calls"
    for name, values in ChatMessage.NEUTRAL.items():
        for value in values:
            parse(ChatForm, CHAT | {"messages": [{"role": "user", "content": "a", name: value}]})


def test_a_misspelt_field_is_not_ignored():
    error = refused(CHAT | {"temprature": 0})
    assert error.param == "temprature"
    assert "There is no such field. Is it misspelt?" in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("model", 1),
        ("model", "a" * 301),
        ("messages", []),
        ("messages", "Ben?"),
        ("messages", {}),
        ("temperature", "0"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("inf")),
        ("temperature", True),
        ("top_p", 1.1),
        ("top_k", 0),
        ("min_p", -1),
        ("repetition_penalty", 0),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_completion_tokens", -1),
        ("n", 0),
        ("seed", -1),
        ("seed", 2**62),
        ("stop", ""),
        ("stop", 1),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", "a" * 201),
        ("stream", "yes"),
        ("stream_options", {"include_usage": 1}),
        ("logprobs", 1),
        ("top_logprobs", 3),  # without logprobs
        ("truncation", "oldest"),
    ],
)
def test_values_that_cannot_be(field, value):
    error = refused(CHAT | {field: value})
    assert (error.param or "top_logprobs").split(".")[0] == field


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("Ben?", "messages.0"),
        ({"content": "a"}, "messages.0.role"),
        ({"role": "king", "content": "a"}, "messages.0.role"),
        ({"role": "tool", "content": "a"}, "messages.0.role"),
        ({"role": "user", "content": 1}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content"),
        ({"role": "user", "content": ["a"]}, "messages.0.content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages.0.content",
        ),
        ({"role": "user", "content": "a", "colour": 1}, "messages.0.colour"),
    ],
)
def test_messages_that_cannot_be(message, param):
    assert refused(CHAT | {"messages": [message]}).param == param


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [""]),
        ("Ada", ["Ada"]),
        ([1, 2], [[1, 2]]),
        (["Ada", "Ben"], ["Ada", "Ben"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_one_prompt_or_many_texts_or_ids(prompt, prompts):
    form = parse(CompletionForm, TEXT | {"prompt": prompt, "n": 3})
    assert (form.prompt, form.n_choices) == (prompts, 3 * len(prompts))


@pytest.mark.parametrize("prompt", [1, [], [[]], [1.5], [True], {"a": 1}, [{"a": 1}], [["a"]]])
def test_prompts_that_cannot_be(prompt):
    assert refused(TEXT | {"prompt": prompt}, CompletionForm).param == "prompt"


def test_a_completion_has_the_protocols_16_tokens():
    assert parse(CompletionForm, TEXT).limit == 16


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
NAMES = [*ChatForm.model_fields, "prompt", "echo", "tools", "user", "other"]


@settings(max_examples=150, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
def test_whatever_is_sent_is_a_form_or_refused(fields):
    for form, whole in ((ChatForm, CHAT), (CompletionForm, TEXT)):
        try:
            check_limits(parse(form, whole | fields), Limits())
        except ApiError as error:
            json.dumps([error.status, error.body()], allow_nan=False)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"a"',
        b"\xff",
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
    ],
)
def test_bodies_that_are_no_json_object(body):
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (CHAT | {"messages": CHAT["messages"] * 4}, "messages"),
        (CHAT | {"messages": [{"role": "user", "content": "a" * 21}]}, "messages"),
        (CHAT | {"max_tokens": 9}, "max_tokens"),
        (CHAT | {"max_completion_tokens": 10**30}, "max_tokens"),
        (CHAT | {"n": 3}, "n"),
        (TEXT | {"prompt": ["a"] * 4}, "prompt"),
        (TEXT | {"prompt": [1] * 21}, "prompt"),
        (TEXT | {"prompt": ["a", "b"], "n": 2}, "n"),
    ],
)
def test_each_limit_is_refused_by_name(fields, param):
    limits = Limits(max_messages=3, max_characters=20, max_tokens=8, max_choices=2)
    form = CompletionForm if "prompt" in fields else ChatForm
    check_limits(
        parse(form, {"max_tokens": 8} | CHAT if form is ChatForm else TEXT | {"max_tokens": 8}),
        limits,
    )
    with pytest.raises(ApiError, match=f"{param}: .* at most") as caught:
        check_limits(parse(form, ({"max_tokens": 8} | fields)), limits)
    assert (caught.value.param, caught.value.code) == (param, "limit_exceeded")


def test_limits_below_one():
    with pytest.raises(ValueError, match="max_requests is 0, but must be at least 1"):
        Limits(max_requests=0)


# --- What comes back -----------------------------------------------------------------------------

TOKENS = [Token(" boat", -0.5, [(" boat", -0.5), (" kite", -1.5)]), Token("\ufffd", -float("inf"))]


def test_an_answer_is_what_the_openai_package_expects():
    reply = Reply("small", chat=True, stream=False)
    choices = [reply.choice(0, "Hi", TOKENS, "stop"), reply.choice(1, "Ho", None, "length")]
    answer = ChatCompletion.model_validate_json(
        as_json(reply.object(choices, usage(3, 1, 2))), strict=True
    )
    assert [choice.message.content for choice in answer.choices] == ["Hi", "Ho"]
    first, second = answer.choices[0].logprobs.content
    assert (first.token, first.bytes, first.logprob) == (" boat", list(b" boat"), -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [
        (" boat", -0.5),
        (" kite", -1.5),
    ]
    assert (second.bytes, second.logprob) == (None, -9999.0)
    assert answer.choices[1].logprobs is None
    assert answer.usage.total_tokens == 5
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_a_stream_says_once_who_speaks():
    reply = Reply("small", chat=True, stream=True)
    sent = [("", None), ("Hi", None), ("", "stop")]
    events = [event(reply.object([reply.choice(0, text, None, end)])) for text, end in sent]
    assert all(each.startswith("data: {") and each.endswith("}\n\n") for each in events)
    chunks = [ChatCompletionChunk.model_validate_json(each[6:], strict=True) for each in events]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [(delta.role, delta.content) for delta in deltas] == [
        ("assistant", ""),
        (None, "Hi"),
        (None, None),
    ]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_completion_counts_its_offsets_through_the_stream():
    reply = Reply("small", chat=False, stream=True)
    pieces = [
        reply.choice(0, " boat", TOKENS[:1], None),
        reply.choice(0, "\ufffd", TOKENS[1:], "stop"),
    ]
    first, second = (piece["logprobs"] for piece in pieces)
    whole = reply.object([pieces[1]], usage(1, 0, 2))
    assert Completion.model_validate_json(as_json(whole), strict=True).usage.total_tokens == 3
    assert (first["tokens"], first["text_offset"]) == ([" boat"], [0])
    assert (second["tokens"], second["text_offset"]) == (["\ufffd"], [5])
    assert first["top_logprobs"] == [{" boat": -0.5, " kite": -1.5}]


def test_errors_have_the_protocols_form():
    error = ApiError(404, "There is none.", "model_not_found", "model")
    assert error.body() == {
        "error": {
            "message": "There is none.",
            "type": "not_found_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert ApiError(503, "Later.").body()["error"]["type"] == "server_error"
    assert ApiError(413, "Less.").body()["error"]["type"] == "invalid_request_error"
