"""Files of dialogues, and what is wrong with a bad line."""

import json
from pathlib import Path

import pytest

from minillama.chat.dialog import Message
from minillama.chat.jsonl import read_dialogues
from minillama.chat.sft import tokenise
from minillama.data.documents import MAX_LINE_BYTES

TASK = "Below is an instruction that describes a task"
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ada."}]}


def file_of(folder: Path, *lines: object) -> Path:
    """A line is bytes as they are, or anything that JSON can hold."""
    path = folder / "chat.jsonl"
    parts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(parts))
    return path


def test_messages_are_read_with_their_places(tmp_path):
    system = {"role": "system", "content": "Be brief.", "name": "what else is there"}
    path = file_of(tmp_path, GOOD, b"", {"messages": [system, *GOOD["messages"]], "id": 7}, b"")
    turn = [Message("user", "Hi"), Message("assistant", "Ada.")]
    assert read_dialogues([path]) == {
        f"{path}, line 1": turn,
        f"{path}, line 3": [Message("system", "Be brief."), *turn],
    }


def test_several_files_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a").mkdir()
    first = file_of(tmp_path / "a", GOOD)
    second = file_of(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert list(read_dialogues([first, second])) == [f"{first}, line 1", f"{second}, line 1"]


@pytest.mark.parametrize(
    "given",
    [{}, {"input": ""}, {"input": None}, {"input": " \n"}, {"system": " "}, {"system": None}],
)
def test_alpacas_form_without_an_input(tmp_path, given, tok):
    path = file_of(tmp_path, {"instruction": "Name a boat.", "output": "Ada.", **given})
    expected = [Message("user", "Name a boat."), Message("assistant", "Ada.")]
    for chat_format in ("llama2", "alpaca"):
        (dialogue,) = read_dialogues([path], chat_format).values()
        assert dialogue == expected
    (example,) = tokenise([dialogue], tok, "alpaca")
    assert tok.decode(example.ids) == (
        f"{TASK}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a boat.\n\n### Response:Ada."
    )


def test_alpacas_form_with_an_input(tmp_path, tok):
    path = file_of(tmp_path, {"instruction": "Name it.", "input": "A boat", "output": "Ada."})
    (dialogue,) = read_dialogues([path]).values()
    assert dialogue == [Message("user", "Name it.\n\nA boat"), Message("assistant", "Ada.")]
    (dialogue,) = read_dialogues([path], "alpaca").values()
    (example,) = tokenise([dialogue], tok, "alpaca")
    assert tok.decode(example.ids) == (
        f"{TASK}, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nName it.\n\n"
        "### Input:\nA boat\n\n### Response:Ada."
    )


def test_alpacas_form_with_a_system_message(tmp_path):
    line = {"instruction": "Name it.", "input": "A boat", "output": "Ada.", "system": "Be brief."}
    path = file_of(tmp_path, GOOD, line)
    told, *others = read_dialogues([path])[f"{path}, line 2"]
    assert told == Message("system", "Be brief.")
    assert others == [Message("user", "Name it.\n\nA boat"), Message("assistant", "Ada.")]
    with pytest.raises(ValueError, match=r"line 2: its system message .* alpaca has no place for"):
        read_dialogues([path], "alpaca")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "it is no JSON .*Each line is one object"),
        (b"[\n]", "it is no JSON .*jq -c"),
        (b"[" * 200_000, "nested too deeply"),
        (b'"Hi"', "it is 'Hi', but must be an object"),
        (b'{"messages": "\xe4"}', "it is not UTF-8 text: byte 14 is 0xe4"),
        (b"x" * (MAX_LINE_BYTES + 1), "longer than 67,108,864 bytes"),
        ({"text": "Hi"}, "its keys are text, but must be those of a dialogue"),
        ({}, "its keys are none"),
        ({"messages": {"role": "user"}}, "its messages are .*must be a list"),
        ({"messages": ["Hi"]}, "message 1 is 'Hi', but must have a role: system, user, assistant"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "message 1 is .*must have a role"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "message 1 is .*must have a role"),
        ({"messages": [{"role": "user"}]}, "the content of message 1 is None, but must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]},
            "the content of message 1 is .*must be a text",
        ),
        (
            b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
            "the content of message 1 has half a character",
        ),
        ({"instruction": "Name it.", "output": 3}, "the output is 3, but must be a text"),
        ({"instruction": "Name it.", "input": 3, "output": "Ada"}, "the input is 3, but must be"),
    ],
)
def test_a_bad_line_is_named_with_file_and_reason(tmp_path, line, reason):
    path = file_of(tmp_path, GOOD, line)
    with pytest.raises(ValueError, match=rf"chat\.jsonl, line 2: .*{reason}"):
        read_dialogues([path])


def test_the_first_ten_bad_lines_are_named_at_once(tmp_path):
    (tmp_path / "a").mkdir()
    first = file_of(tmp_path / "a", GOOD, b"{", GOOD, {"text": "Hi"})
    with pytest.raises(ValueError, match="cannot be used") as found:
        read_dialogues([first, file_of(tmp_path, GOOD, b"[]")])
    count, *lines = str(found.value).splitlines()
    assert count == "3 dialogues cannot be used:"
    places = [f"{first}, line 2", f"{first}, line 4", f"{tmp_path / 'chat.jsonl'}, line 2"]
    assert [line.partition(": ")[0] for line in lines] == places
    assert "it is no JSON" in lines[0]
    assert "its keys are text" in lines[1]
    with pytest.raises(ValueError, match=r"^1,012 dialogues .*; the first 10:\n") as found:
        read_dialogues([file_of(tmp_path, *[b"{"] * 1012)])
    assert len(str(found.value).splitlines()) == 11


def test_behind_a_line_that_is_too_long_nothing_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("minillama.chat.jsonl.MAX_LINE_BYTES", 200)
    path = file_of(tmp_path, b"{", b"x" * 1000, GOOD)
    with pytest.raises(ValueError, match=r"^2 dialogues .*\n.*line 1: .*\n.*line 2: .*longer than"):
        read_dialogues([path])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (GOOD["messages"][:1], "does not end with an answer"),
        ([], "does not end with an answer"),
        ([*GOOD["messages"], *GOOD["messages"][1:]], "Message 3 is of role 'assistant'"),
        (
            [GOOD["messages"][0], {"role": "assistant", "content": "</s>"}],
            r"Message 2 \(assistant\) contains '</s>'",
        ),
    ],
)
def test_a_line_that_teaches_nothing_is_named_before_training(tmp_path, messages, reason, tok):
    path = file_of(tmp_path, GOOD, {"messages": messages})
    with pytest.raises(ValueError, match=rf"chat\.jsonl, line 2: .*{reason}"):
        tokenise(read_dialogues([path]), tok)


def test_what_is_no_file_of_dialogues(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_dialogues([tmp_path / "nothing"])
    with pytest.raises(IsADirectoryError, match="is a folder; name the JSON-lines file"):
        read_dialogues([tmp_path])
    with pytest.raises(ValueError, match=r"chat\.jsonl holds no dialogue\. Put one object a line"):
        read_dialogues([file_of(tmp_path, b"", b" ")])
