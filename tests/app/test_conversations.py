"""The page's routes: what they keep, what they give back, and what they refuse."""

import json

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from minillama.app.conversations import NewConversation, router
from minillama.app.endpoints import Endpoint
from minillama.app.server import create_app
from minillama.app.store import Store
from minillama.chat.conversation import read_messages

PATH = "/api/conversations"


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "conversations.sqlite")
    yield store
    store.close()


@pytest.fixture
def client(store):
    nobody = Endpoint("nobody", "http://127.0.0.1:9/v1")  # a server must have something to serve
    app = create_app([], [nobody], conversations=router(store))
    return TestClient(app, base_url="http://127.0.0.1")


def begun(client, *contents: str, **fields) -> dict:
    """A conversation in which user and assistant say the contents in turns."""
    roles = ("user", "assistant") * len(contents)
    said = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]
    answer = client.post(PATH, json={"messages": said} | fields)
    assert answer.status_code == 201, answer.text
    return answer.json()


def error_of(answer) -> str:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


def test_a_conversation_from_its_first_question_to_its_end(client):
    first = begun(client, "What is a llama?", settings={"model": "tiny", "temperature": 0.5})
    assert first["title"] == "What is a llama?"
    detail = {"settings": {"model": "tiny"}, "finish_reason": "stop", "completion_tokens": 3}
    answer = client.post(
        f"{PATH}/{first['id']}/messages",
        json={
            "parent": first["head"],
            "role": "assistant",
            "content": "<script>alert(1)</script>",
            "detail": detail,
        },
    )
    assert answer.status_code == 201
    saved = client.get(f"{PATH}/{first['id']}").json()
    assert saved["head"] == answer.json()["id"]
    assert saved["messages"] == [first["messages"][0], answer.json()]
    assert saved["messages"][1]["content"] == "<script>alert(1)</script>"
    assert saved["messages"][1]["detail"] == detail
    change = {"title": "Llamas", "system": "Be short.", "head": first["head"]}
    assert client.patch(f"{PATH}/{first['id']}", json=change).status_code == 204
    changed = client.get(f"{PATH}/{first['id']}").json()
    assert changed == saved | change
    (summary,) = client.get(PATH, params={"search": "SCRIPT"}).json()
    assert summary == {
        "id": first["id"],
        "title": "Llamas",
        "created": saved["created"],
        "changed": saved["changed"],
        "n_messages": 2,
    }
    assert client.get(PATH, params={"search": "alpaca"}).json() == []
    assert client.delete(f"{PATH}/{first['id']}").status_code == 204
    assert client.get(f"{PATH}/{first['id']}").status_code == 404
    assert client.get(PATH).json() == []


def test_an_answer_is_kept_while_it_grows(client):
    first = begun(client, "one", "a")
    path = f"{PATH}/{first['id']}/messages/{first['head']}"
    detail = {"settings": {"top_k": 3, "min_p": 0.1, "neutralise": True}, "finish_reason": "stop"}
    more = {"begin": 1, "content": " b", "detail": detail}
    for _ in range(2):
        assert client.patch(path, json=more).status_code == 204
    (_, answer) = client.get(f"{PATH}/{first['id']}").json()["messages"]
    assert (answer["content"], answer["detail"]) == ("a b", detail)
    refused = client.patch(path, json={"begin": 0, "content": "x"})
    assert refused.status_code == 400
    assert "does not go on like this" in error_of(refused)
    assert client.patch(path, json={"begin": -1, "content": "x"}).status_code == 400
    assert client.patch(f"{PATH}/99/messages/1", json=more).status_code == 404


def branched(client) -> dict:
    """one -> a | a2 -> two -> b, and "uno" beside "one"; shown is the path to b."""
    first = begun(client, "one", "a", settings={"seed": 1, "stop": ["x"]}, title="Branches")
    path = f"{PATH}/{first['id']}/messages"

    def add(parent, role, content):
        return client.post(path, json={"parent": parent, "role": role, "content": content}).json()

    second = add(first["messages"][0]["id"], "assistant", "a2")
    add(None, "user", "uno")
    add(add(second["id"], "user", "two")["id"], "assistant", "b\n```py\nx = 1\n```")
    client.patch(f"{PATH}/{first['id']}", json={"system": "Be short.\nBe kind."})
    return client.get(f"{PATH}/{first['id']}").json()


def shape(saved: dict) -> tuple:
    """A conversation without its numbers."""
    content = {message["id"]: message["content"] for message in saved["messages"]}
    tree = [
        (m["role"], m["content"], content.get(m["parent"]), m["detail"], m["created"])
        for m in saved["messages"]
    ]
    return saved["title"], saved["system"], saved["settings"], content[saved["head"]], tree


def test_what_is_exported_comes_back_with_all_its_branches(client, tmp_path):
    saved = branched(client)
    exported = client.get(f"{PATH}/{saved['id']}/export")
    assert [m["content"] for m in exported.json()["messages"]][:3] == [
        "Be short.\nBe kind.",
        "one",
        "a2",
    ]
    assert [m["content"] for m in exported.json()["aside"]] == ["a", "uno"]
    begun(client, "in between")  # so that the numbers differ
    again = client.post(PATH, json=exported.json()).json()
    assert again["id"] != saved["id"]
    assert again["messages"][0]["id"] != saved["messages"][0]["id"]
    assert shape(again) == shape(saved)


def test_what_is_exported_is_what_the_terminal_reads_and_the_other_way_round(client, tmp_path):
    saved, file = branched(client), tmp_path / "talk.json"
    file.write_bytes(client.get(f"{PATH}/{saved['id']}/export").content)
    messages = read_messages(file)
    assert [m.role for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    fields = {"messages": [{"role": m.role, "content": m.content} for m in messages]}
    again = client.post(PATH, json=fields).json()
    assert again["system"] == "Be short.\nBe kind."
    assert [m["content"] for m in again["messages"]] == [m.content for m in messages[1:]]


def test_messages_that_say_the_same_are_told_apart(client):
    saved = begun(client, "yes", "yes", "yes")
    assert saved["head"] == saved["messages"][2]["id"]
    exported = client.get(f"{PATH}/{saved['id']}/export").json()
    again = client.post(PATH, json=exported).json()
    assert again["head"] == again["messages"][2]["id"]


def test_the_export_to_read(client):
    saved = branched(client)
    page = client.get(f"{PATH}/{saved['id']}/export", params={"form": "markdown"})
    assert page.headers["content-type"].startswith("text/markdown")
    assert page.text == (
        "# Branches\n\n> Be short.\n> Be kind.\n\n## You\n\none\n\n## Assistant\n\na2\n\n"
        "## You\n\ntwo\n\n## Assistant\n\nb\n```py\nx = 1\n```\n"
    )


TURN = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "aside", "reason"),
    [
        ([TURN, TURN], [], "'user' follows a message of role 'user'"),
        ([TURN, {"role": "system", "content": "x"}], [], "only the first message can be"),
        ([TURN | {"id": 2}], [TURN], "every message needs one"),
        ([TURN | {"id": 2}], [TURN | {"id": 2}], "every message needs one"),
        ([TURN], [TURN], "every message needs one"),
        ([TURN | {"id": 2, "parent": 9}], [], "follows message 9, which is not there"),
        ([TURN | {"id": 2, "parent": 2}], [], "must follow one that stands before it"),
    ],
)
def test_an_import_that_does_not_hang_together_keeps_nothing(client, messages, aside, reason):
    answer = client.post(PATH, json={"messages": messages, "aside": aside})
    assert answer.status_code == 400
    assert reason in error_of(answer)
    assert client.get(PATH).json() == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "", {"messages": "x"}),
        ("POST", "", {"messages": [{"role": "tool", "content": "x"}]}),
        ("POST", "", {"messages": [{"role": "user", "content": None}]}),
        ("POST", "", {"messages": [{"role": "user", "content": 7}]}),
        ("POST", "", {"messages": [TURN] * 10_001}),
        ("POST", "", {"settings": {"temperature": "hot"}}),
        ("POST", "", {"settings": {"other": 1}}),
        ("POST", "", {"settings": {"stop": ["x"] * 17}}),
        ("POST", "", {"nonsense": 1}),
        ("POST", "", []),
        ("PATCH", "/1", {"head": 10**30}),
        ("PATCH", "/1", {"head": "1"}),
        ("PATCH", "/1", {"settings": {"max_tokens": 10**30}}),
        ("POST", "/1/messages", {"role": "user", "content": "x"}),
        ("POST", "/1/messages", {"parent": None, "role": "system", "content": "x"}),
        ("GET", f"/{10**30}", None),
        ("GET", "/0", None),
        ("GET", "/1%20OR%201=1", None),
        ("GET", "/../../etc/passwd", None),
        ("GET", "/1/export?form=html", None),
        ("GET", "?limit=0", None),
        ("GET", "?search=" + "x" * 201, None),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(client, method, path, body):
    saved = begun(client, "one", "a")
    answer = client.request(method, PATH + path, json=body)
    assert answer.status_code in (400, 404), answer.text
    assert client.get(f"{PATH}/1").json() == saved
    assert len(client.get(PATH).json()) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"settings": {"stop": [1] * 9}},
        {"settings": {"stop": ["x"] * 16 + [1] * 9}},
        {"settings": dict.fromkeys("abcdefghi", 1)},
        {"messages": [1] * 9},
        {"messages": [TURN | {"detail": dict.fromkeys("abcdefghi", 1)}]},
        {"aside": [1] * 9},
        dict.fromkeys("abcdefghi", 1),
    ],
)
def test_the_first_of_many_faults_is_all_that_is_kept(fields):
    """pydantic keeps a kilobyte for each, and a body has room for millions."""
    with pytest.raises(ValidationError) as caught:
        NewConversation.model_validate(fields)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("settings", [{"model": "\ud800"}, {"stop": ["a", "\udfff"]}])
def test_half_a_character_makes_no_conversation_unreadable(client, settings):
    saved = begun(client, "one")
    for method, path, body in (
        ("POST", "", {"settings": settings}),
        ("PATCH", "/1", {"settings": settings}),
        ("POST", "", {"messages": [TURN | {"detail": {"finish_reason": "\ud800"}}]}),
        (
            "POST",
            "/1/messages",
            {"parent": 1, "role": "assistant", "content": "a", "detail": {"settings": settings}},
        ),
    ):
        headers = {"content-type": "application/json"}
        answer = client.request(method, PATH + path, content=json.dumps(body), headers=headers)
        assert answer.status_code == 400, answer.text
        assert "half of a surrogate pair" in error_of(answer)
    assert client.get(f"{PATH}/1").json() == saved
    assert len(client.get(PATH).json()) == 1


def test_an_unknown_field_is_named_whatever_it_is_called(client):
    for name, named in (("nonsense", "nonsense"), ("\ud800", "?"), ("x" * 101, "x" * 100)):
        body = json.dumps({"settings": {name: 1}})
        answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert error_of(answer).startswith(f"body.settings.{named}: There is no such field")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "fields",
    [
        '"settings": {"temperature": %s}',
        '"messages": [{"role": "user", "content": "x", "created": %s}]',
    ],
)
def test_a_number_that_is_none_is_refused(client, fields, number):
    body = "{" + fields % number + "}"
    answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert client.get(PATH).json() == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [
        ("GET", "/9", None, 404, "There is no conversation 9"),
        ("DELETE", "/9", None, 404, "There is no conversation 9"),
        ("PATCH", "/9", {"title": "x"}, 404, "There is no conversation 9"),
        ("GET", "/9/export", None, 404, "There is no conversation 9"),
        ("POST", "/9/messages", TURN | {"parent": None}, 404, "There is no conversation 9"),
        ("POST", "/1/messages", TURN | {"parent": 9}, 400, "has no message 9"),
        ("POST", "/1/messages", TURN | {"parent": 1}, 400, "'user' follows a message of role"),
        ("PATCH", "/1", {"title": " "}, 400, "The title is empty"),
        ("PATCH", "/1", {"title": "\ud800"}, 400, "half of a surrogate pair"),
        ("PATCH", "/1", {"head": 9}, 400, "has no message 9"),
    ],
)
def test_refusals_are_the_protocols(client, method, path, body, status, reason):
    begun(client, "one")
    content = None if body is None else json.dumps(body)
    headers = {"content-type": "application/json"}
    answer = client.request(method, PATH + path, content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert reason in error_of(answer)


def test_a_disk_that_is_full_is_no_fault_of_the_clients(client, store):
    begun(client, "one")
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    answer = client.post(PATH, json={"messages": [TURN | {"content": "x" * 50_000}]})
    assert answer.status_code == 507
    assert "delete some, or make room on the disk" in error_of(answer)


@pytest.mark.parametrize(
    "damage",
    ["UPDATE message SET parent = id", "UPDATE conversation SET settings = '{'"],
)
def test_damage_is_no_fault_of_the_clients_and_has_an_end(client, store, damage):
    begun(client, "one")
    store._connection.execute(damage)
    for path in ("/1", "/1/export", "/1/export?form=markdown"):
        answer = client.get(PATH + path)
        assert answer.status_code == 507, answer.text
        assert "is damaged" in error_of(answer)
