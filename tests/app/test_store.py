"""Conversations in SQLite: a tree that loses nothing, a file that survives, and no other's."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillama.app import store as module
from minillama.app.store import NewMessage, NotFoundError, Store, data_folder, title_of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "conversations.sqlite"


@pytest.fixture
def store(path):
    store = Store(path)
    yield store
    store.close()


def said(conversation) -> list[str]:
    return [message.content for message in conversation.shown()]


def talk(store, *contents: str):
    """A conversation in which the contents follow each other."""
    messages = [
        NewMessage("assistant" if place % 2 else "user", content, place - 1 if place else None)
        for place, content in enumerate(contents)
    ]
    return store.create(messages=messages)


def test_what_was_said_is_there_after_a_new_start(path):
    store = Store(path)
    first = store.create("Of llamas", "Be short.", {"temperature": 0.6}, [NewMessage("user", "Hi")])
    answer = store.add(first.id, first.head, "assistant", "Hello 🦙\0!", {"tokens": 3})
    store.close()
    store.close()
    again = Store(path)
    saved = again.read(first.id)
    assert (saved.title, saved.system, saved.settings) == (
        "Of llamas",
        "Be short.",
        {"temperature": 0.6},
    )
    assert said(saved) == ["Hi", "Hello 🦙\0!"]
    assert saved.messages[1] == answer
    assert answer.detail == {"tokens": 3}
    again.close()


def test_an_edit_and_a_second_answer_stand_beside_what_was_there(store):
    first = talk(store, "one", "a", "two", "b")
    question = first.messages[0].id
    store.add(first.id, question, "assistant", "another a")
    assert said(store.read(first.id)) == ["one", "another a"]
    edited = store.add(first.id, None, "user", "one, edited")
    assert said(store.read(first.id)) == ["one, edited"]
    assert edited.parent is None
    store.update(first.id, head=first.head)
    saved = store.read(first.id)
    assert said(saved) == ["one", "a", "two", "b"]
    assert len(saved.messages) == 6


def test_an_answer_grows_and_nothing_that_was_said_is_overwritten(store, monkeypatch):
    first = talk(store, "one", "a 🦙")
    question, answer = (message.id for message in first.messages)

    def told() -> tuple[str, dict]:
        return store.read(first.id).messages[1].content, store.read(first.id).messages[1].detail

    store.extend(first.id, answer, 3, " b", {"seconds": 1})
    assert told() == ("a 🦙 b", {"seconds": 1})
    for begin, content in ((3, " b c"), (3, " b c"), (2, "🦙 b c"), (5, " c"), (7, "")):
        store.extend(first.id, answer, begin, content, {"seconds": 2})  # again: as once
        assert told() == ("a 🦙 b c", {"seconds": 2})
    store.extend(first.id, answer, 3, " b", {"seconds": 1})  # late
    assert told() == ("a 🦙 b c", {"seconds": 2})
    for begin, content in ((0, "b"), (3, " x and more"), (8, " d"), (0, "A 🦙 b c d")):
        with pytest.raises(ValueError, match="does not go on like this from character"):
            store.extend(first.id, answer, begin, content)
    with pytest.raises(ValueError, match="only an answer grows"):
        store.extend(first.id, question, 3, "!")
    with pytest.raises(ValueError, match="no message 99"):
        store.extend(first.id, 99, 0, "!")
    with pytest.raises(NotFoundError):
        store.extend(99, answer, 0, "!")
    monkeypatch.setattr(module, "MAX_CONVERSATION", 12)
    store.extend(first.id, answer, 7, " d")
    with pytest.raises(ValueError, match="The conversation is full"):
        store.extend(first.id, answer, 9, "e")
    monkeypatch.setattr(module, "MAX_CONTENT", 9)
    with pytest.raises(ValueError, match="shorten it"):
        store.extend(first.id, answer, 9, "e")
    assert told()[0] == "a 🦙 b c d"
    assert len(store.read(first.id).messages) == 2


def test_user_and_assistant_take_turns(store):
    first = talk(store, "one", "a")
    question, answer = (message.id for message in first.messages)
    with pytest.raises(ValueError, match="'assistant' follows nothing, but must be of role 'user'"):
        store.add(first.id, None, "assistant", "a")
    with pytest.raises(ValueError, match="'user' follows a message of role 'user'"):
        store.add(first.id, question, "user", "two")
    with pytest.raises(ValueError, match="is empty: there is nothing to answer"):
        store.add(first.id, answer, "user", " \n")
    other = talk(store, "one")
    for parent in (other.head, 12345):
        with pytest.raises(ValueError, match=f"Conversation {first.id} has no message {parent}"):
            store.add(first.id, parent, "assistant", "b")
        with pytest.raises(ValueError, match=f"Conversation {first.id} has no message {parent}"):
            store.update(first.id, head=parent)
    assert store.read(first.id) == first


def test_a_conversation_is_taken_over_wholly_or_not_at_all(store):
    good, bad = NewMessage("user", "one"), NewMessage("user", "two", 0)
    with pytest.raises(ValueError, match="follows a message of role 'user'"):
        store.create(messages=[good, bad])
    with pytest.raises(ValueError, match="Message 1 follows message 2"):
        store.create(messages=[NewMessage("user", "one", 1), good])
    with pytest.raises(ValueError, match="Message 3 is to be shown, but there are only 1"):
        store.create(messages=[good], head=2)
    assert store.summaries() == []


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choices=st.lists(st.integers(0, 10**6), max_size=20), seed=st.integers(0, 9))
def test_any_tree_comes_back(store, choices, seed):
    """Each message follows a random one before it, or begins anew; one of them is shown."""
    messages: list[NewMessage] = []
    for choice in choices:
        parent = choice % (len(messages) + 1) - 1
        answers = parent >= 0 and messages[parent].role == "user"
        role = "assistant" if answers else "user"
        messages.append(NewMessage(role, f"text {choice}", parent if parent >= 0 else None))
    head = random.Random(seed).randrange(len(messages)) if messages else None
    saved = store.create(messages=messages, head=head)
    assert saved == store.read(saved.id)
    ids = [message.id for message in saved.messages]
    assert [m.content for m in saved.messages] == [m.content for m in messages]
    assert [m.parent for m in saved.messages] == [
        None if m.parent is None else ids[m.parent] for m in messages
    ]
    path, place = [], head
    while place is not None:
        path.append(messages[place].content)
        place = messages[place].parent
    assert said(saved) == path[::-1]


def test_the_latest_comes_first_and_search_finds_any_alphabet(store):
    one = talk(store, "Größe 100% of a_b", "ÜBER Größe")
    two = talk(store, "Η ΖΩΗ", "nothing")
    three = store.create(title="Of O'Hara; DROP TABLE message")

    def found(text):
        return [summary.id for summary in store.summaries(text)]

    assert found("") == [three.id, two.id, one.id]
    assert found("über GRÖSSE") == [one.id]
    assert found("ζωη") == [two.id]
    assert found("o'hara; drop") == [three.id]
    assert found("100%") == [one.id]
    assert found("a_b") == [one.id]
    assert found("1%0") == found("axb") == found('" OR 1=1 --') == []
    store.add(one.id, one.head, "user", "more")
    assert found("") == [one.id, three.id, two.id]
    assert [summary.n_messages for summary in store.summaries()] == [3, 0, 2]
    assert [summary.id for summary in store.summaries(limit=1)] == [one.id]
    store.update(two.id, title="  Life ")
    assert found("LIFE") == [two.id]
    assert found("")[0] == one.id  # a new name is no news


def test_a_conversation_without_a_name_is_called_as_it_begins(store):
    assert talk(store, "What is\n a llama?").title == "What is a llama?"
    assert store.create().title == "New conversation"
    assert title_of("word " * 30) == "word " * 11 + "word…"
    assert title_of("x" * 100) == "x" * 59 + "…"
    with pytest.raises(ValueError, match="The title is empty"):
        store.update(1, title=" ")


def test_what_was_deleted_is_nowhere_in_the_files(store, path):
    kept = talk(store, "keep this")
    gone = talk(store, "a secret " * 2000, "another secret")
    files = [path, path.with_name(path.name + "-wal")]
    assert any(b"secret" in file.read_bytes() for file in files)
    store.delete(gone.id)
    assert not any(b"secret" in file.read_bytes() for file in files if file.exists())
    assert store.read(kept.id) == kept
    for forgotten in (store.read, store.delete, store.update):
        with pytest.raises(NotFoundError, match=f"There is no conversation {gone.id}"):
            forgotten(gone.id)
    assert talk(store, "new").id > gone.id  # no address leads to another conversation


def reader(path) -> sqlite3.Connection:
    """Another process in the middle of reading, such as a copy being made."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN")
    connection.execute("SELECT count(*) FROM message").fetchall()
    return connection


@pytest.mark.parametrize("after", ["summaries", "close"])
def test_a_reader_delays_the_erasing_and_not_the_caller(path, after):
    store = Store(path)
    gone = talk(store, "a secret")
    files = [path, path.with_name(path.name + "-wal")]
    other = reader(path)
    start = time.monotonic()
    store.delete(gone.id)
    store.summaries()
    assert time.monotonic() - start < module.BUSY_TIMEOUT / 2
    assert any(b"secret" in file.read_bytes() for file in files)  # the reader's
    (timeout,) = store._connection.execute("PRAGMA busy_timeout").fetchone()
    assert timeout == 1000 * module.BUSY_TIMEOUT
    other.execute("ROLLBACK")
    getattr(store, after)()
    assert not any(b"secret" in file.read_bytes() for file in files if file.exists())
    store.close()
    other.close()


def test_a_deletion_that_cannot_be_erased_says_so_and_is_tried_again(store, path, monkeypatch):
    gone = talk(store, "a secret")
    files = [path, path.with_name(path.name + "-wal")]

    def broken(timeout):
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_erase", broken)
        with pytest.raises(OSError, match=r"cannot be read or written \(disk I/O error\)"):
            store.delete(gone.id)
        assert store.summaries() == []
    assert any(b"secret" in file.read_bytes() for file in files)
    talk(store, "new")
    assert not any(b"secret" in file.read_bytes() for file in files)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_what_a_killed_server_had_deleted_goes_with_the_first_call(path):
    if (child := os.fork()) == 0:
        store = Store(path)
        gone = talk(store, "a secret")
        store._erase = lambda timeout: os._exit(9)
        store.delete(gone.id)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    files = [path, path.with_name(path.name + "-wal")]
    assert any(b"secret" in file.read_bytes() for file in files)
    store = Store(path)
    assert store.summaries() == []
    assert not any(b"secret" in file.read_bytes() for file in files)
    store.close()


def test_limits(store, monkeypatch):
    first = talk(store, "one", "a")
    monkeypatch.setattr(module, "MAX_CONTENT", 10)
    with pytest.raises(
        ValueError, match=r"The message \(user\) has 11 characters, and may have 10"
    ):
        store.add(first.id, first.head, "user", "x" * 11)
    with pytest.raises(ValueError, match="The system message has 11 characters"):
        store.update(first.id, system="x" * 11)
    with pytest.raises(ValueError, match="The title has 201 characters"):
        store.update(first.id, title="x" * 201)
    with pytest.raises(ValueError, match="The JSON of the detail has 16,395 characters"):
        store.add(first.id, first.head, "user", "two", {"x": "y" * 16_386})
    monkeypatch.setattr(module, "MAX_MESSAGES", 3)
    third = store.add(first.id, first.head, "user", "two")
    with pytest.raises(ValueError, match="is full: it would have 4 messages of 8 characters"):
        store.add(first.id, third.id, "assistant", "b")
    monkeypatch.setattr(module, "MAX_MESSAGES", 4)
    monkeypatch.setattr(module, "MAX_CONVERSATION", 8)
    with pytest.raises(ValueError, match="may have 4 of 8"):
        store.add(first.id, third.id, "assistant", "bb")
    store.add(first.id, third.id, "assistant", "b")


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_character_is_refused(store, text):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        talk(store, text)
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        store.summaries(text)
    for unreadable in ({"model": text}, {"stop": [text]}, {text: 1}):
        with pytest.raises(ValueError, match="JSON of the settings contains half of a surrogate"):
            store.create(settings=unreadable)
        with pytest.raises(
            ValueError, match="JSON of the detail contains half of a surrogate pair"
        ):
            store.create(messages=[NewMessage("user", "x", detail=unreadable)])
    with pytest.raises(ValueError, match="JSON compliant"):
        store.create(settings={"temperature": float("nan")})
    assert store.summaries() == []


def test_a_full_file_says_so_and_stays_whole(store, monkeypatch):
    first = talk(store, "one", "a")
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages + 2}").fetchall()
    with pytest.raises(OSError, match=r"is full\). They may take 1 GiB; delete some"):
        store.add(first.id, first.head, "user", "x" * 50_000)
    assert store.read(first.id) == first


def test_many_threads_and_two_servers_share_a_file(path, store):
    other = Store(path)
    threads = [
        threading.Thread(target=lambda s=s: [talk(s, "one", "a") for _ in range(10)])
        for s in (store, other) * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(other.summaries()) == 40
    assert store.summaries() == other.summaries()
    assert all(summary.n_messages == 2 for summary in store.summaries())
    other.close()


def test_a_locked_file_is_an_error_after_a_while(path, monkeypatch):
    monkeypatch.setattr(module, "BUSY_TIMEOUT", 0.05)
    store = Store(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(OSError, match=r"cannot be read or written \(database is locked"):
        talk(store, "one")
    other.execute("ROLLBACK")
    other.close()
    talk(store, "one")
    store.close()


WRITER = """
import sys
from minillama.app.store import NewMessage, Store
store = Store(sys.argv[1])
conversation = store.create(messages=[NewMessage("user", "0")])
parent = conversation.head
for n in range(1, 100_000):
    role = "assistant" if n % 2 else "user"
    parent = store.add(conversation.id, parent, role, str(n)).id
    print(n, flush=True)
"""


def test_what_was_kept_survives_a_kill(path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "50\n":
            break
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().splitlines()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    promised = int(rest[-1]) if rest else 50
    store = Store(path)
    kept = [int(text) for text in said(store.read(1))]
    assert kept == list(range(len(kept)))
    assert promised <= kept[-1] <= promised + 1
    store.add(1, store.read(1).head, "assistant" if len(kept) % 2 else "user", "on")
    store.close()


def foreign(path) -> bytes:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE conversation (id INTEGER)")
    connection.commit()
    connection.close()
    return path.read_bytes()


def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "file"
    for content in (b"my diary", b"SQLite format 3\0" + b"\0" * 100, foreign(path)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a file of minillama's conversations, and is"):
            Store(path)
        assert path.read_bytes() == content
        assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(OSError, match=r"cannot be opened \(Is a directory"):
        Store(tmp_path)
    with pytest.raises(OSError, match="so conversations cannot be kept there: name another"):
        Store(path / "below")


def test_a_file_of_another_version_is_refused(path):
    Store(path).close()
    content = bytearray(path.read_bytes())
    content[60:64] = (2).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="has version 2 of the conversations' tables, and this"):
        Store(path)
    assert path.read_bytes() == content


def test_a_damaged_file_is_refused_and_left_as_it_is(path):
    store = Store(path)
    for n in range(30):
        talk(store, f"question {n} " * 50, "answer " * 200)
    store.close()
    whole = path.read_bytes()
    for content in (
        whole[: len(whole) // 2],
        whole[:4096],
        whole[:4096] + b"\xff" * 4096 + whole[8192:],
        whole[:100] + b"\0" * 4000 + whole[4100:],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged \(.*\), and is left as it is"):
            Store(path)
        assert path.read_bytes() == content
    path.write_bytes(whole)
    store = Store(path)
    assert len(store.summaries()) == 30
    store.close()


def test_damage_that_shows_later_is_an_error_that_names_the_file(path):
    store = Store(path)
    first = talk(store, *"x" * 100)
    store.close()
    store = Store(path)
    path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(OSError, match=r"conversations in .* cannot be read or written"):
        store.read(first.id)
    store.close()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("UPDATE message SET parent = id WHERE id = 2", "message 2 follows 2, not one before it"),
        ("UPDATE message SET parent = 2 WHERE id = 1", "message 1 follows 2, not one before it"),
        ("UPDATE message SET parent = 99 WHERE id = 2", "message 2 follows 99, not one before it"),
        ("UPDATE conversation SET head = 99", "conversation 1 has no message 99"),
        ("UPDATE conversation SET settings = '{'", "'{' is no JSON object"),
        ("UPDATE message SET detail = '[]'", r"'\[\]' is no JSON object"),
    ],
)
def test_a_conversation_that_does_not_hang_together_is_an_error(store, path, damage, reason):
    first = talk(store, "one", "a")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute(damage)
    other.close()
    with pytest.raises(OSError, match=rf"is damaged \({reason}\), and is left as it is"):
        store.read(first.id)
    store.delete(first.id)
    assert store.summaries() == []


def test_nobody_else_can_read_the_file(store, path):
    talk(store, "one")
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o077 == 0


def test_the_folder_is_the_systems(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILLAMA_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.delenv("MINILLAMA_DATA")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert data_folder() == tmp_path / "minillama"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data_folder().parts[-3:] == ("Library", "Application Support", "minillama")
