"""Conversations that outlive the server, in one SQLite file.

A conversation is a tree: an edited question and a regenerated answer stand beside the ones that
were there, and `head` says which branch is shown. So nothing that was said is ever overwritten.
"""

import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Speaker = Literal["user", "assistant"]

MAX_TITLE = 200  # characters
MAX_CONTENT = 1_000_000  # characters of a message, or of the system message
MAX_MESSAGES = 10_000  # of a conversation
MAX_CONVERSATION = 16_000_000  # characters of all its messages
MAX_DETAIL = 16_384  # characters of JSON
MAX_FILE = 2**30  # bytes
BUSY_TIMEOUT = 5.0  # seconds that another server may keep the file to itself
ERASE_TIMEOUT = 0.1  # seconds that a deletion waits for those who read the log

# Bytes 68 to 71 of an SQLite file say whose it is, 60 to 63 which version of it.
MAGIC = b"SQLite format 3\0"
APPLICATION_ID = 0x6D6C6C6D
VERSION = 1

SCHEMA = (
    """CREATE TABLE conversation (
        id INTEGER PRIMARY KEY AUTOINCREMENT,  -- the address of a deleted one leads nowhere
        title TEXT NOT NULL,
        system TEXT NOT NULL,
        settings TEXT NOT NULL,
        head INTEGER REFERENCES message (id),
        created REAL NOT NULL,
        changed REAL NOT NULL
    )""",
    """CREATE TABLE message (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation INTEGER NOT NULL REFERENCES conversation (id) ON DELETE CASCADE,
        parent INTEGER REFERENCES message (id),
        role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
        content TEXT NOT NULL,
        detail TEXT NOT NULL,
        created REAL NOT NULL
    )""",
    "CREATE INDEX message_of ON message (conversation)",
    "CREATE INDEX message_after ON message (parent)",
)


@dataclass(frozen=True)
class NewMessage:
    """A message to be kept. ``parent`` is the place in the sequence of the one that it follows."""

    role: Speaker
    content: str
    parent: int | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)  # what made an answer, for the reader
    created: float | None = None  # seconds since 1970; None: now


@dataclass(frozen=True)
class SavedMessage:
    """A message of a conversation's tree."""

    id: int
    parent: int | None  # the id of the message that it follows
    role: Speaker
    content: str
    detail: dict[str, Any]
    created: float  # seconds since 1970


@dataclass(frozen=True)
class Summary:
    """A line of the list of conversations."""

    id: int
    title: str
    created: float  # seconds since 1970
    changed: float  # when the last message came
    n_messages: int


@dataclass(frozen=True)
class SavedConversation:
    """A conversation with all that was ever said in it, in the order in which it was said."""

    id: int
    title: str
    system: str
    settings: dict[str, Any]
    head: int | None  # the id of the last message that is shown
    created: float  # seconds since 1970
    changed: float  # when the last message came
    messages: list[SavedMessage]

    def shown(self) -> list[SavedMessage]:
        """The messages from the first to `head`: one path through the tree."""
        by_id = {message.id: message for message in self.messages}
        path, place = [], self.head
        while place is not None:
            path.append(by_id[place])
            place = by_id[place].parent
        return path[::-1]


class NotFoundError(LookupError):
    """There is no such conversation."""


class Store:
    """The conversations of one file; any thread may call, and any number of servers share a file.

    What a method has returned survives a kill of the process and a cut of the power: a write-ahead
    log, synchronised at every commit. What was deleted is overwritten with zeros. The file is
    readable for its owner alone.

    Raises ValueError, and leaves the file as it is, where it is not ours, is damaged, or comes from
    a newer minillama; OSError where it cannot be opened or written; both name the file. Texts
    beyond the limits of this module, and texts that are no Unicode, are a ValueError that says
    which.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        is_new = self._is_new()
        # One connection and a lock: a call takes a millisecond, and SQLite has one writer anyway.
        self._lock = threading.RLock()
        self._to_erase = True  # the log may hold what was deleted: so may that of a killed server
        self._connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        try:
            if is_new:
                self._create_schema()
            self._check()
            self._configure()
        except sqlite3.Error as error:
            self._connection.close()
            raise ValueError(self._damaged(str(error))) from None
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Write the log into the file and let go of it. A second call does nothing."""
        with self._lock:
            if self._to_erase:
                with suppress(sqlite3.Error):
                    self._erase(ERASE_TIMEOUT)
            self._connection.close()

    def summaries(self, search: str = "", limit: int = 500) -> list[Summary]:
        """The conversations, the latest first; with ``search`` those that contain it.

        Capitals and small letters are the same, in title and messages, in any alphabet.
        """
        with self._transaction("DEFERRED") as connection:
            rows = connection.execute(
                """SELECT id, title, created, changed,
                    (SELECT count(*) FROM message WHERE conversation = conversation.id)
                FROM conversation
                WHERE ? = '' OR contains(title, ?) OR EXISTS (
                    SELECT 1 FROM message
                    WHERE conversation = conversation.id AND contains(content, ?))
                ORDER BY changed DESC, id DESC LIMIT ?""",
                (*[_text(search, "The search", MAX_TITLE).casefold()] * 3, limit),
            ).fetchall()
        return [Summary(*row) for row in rows]

    def create(
        self,
        title: str = "",
        system: str = "",
        settings: Mapping[str, Any] | None = None,
        messages: Sequence[NewMessage] = (),
        head: int | None = None,
    ) -> SavedConversation:
        """Begin a conversation, or take over one that was kept elsewhere, wholly or not at all.

        Without a title it is called as it begins. ``head`` is the place of the last message that is
        shown; None: the last of all.
        Raises ValueError, naming the place, for messages out of turn.
        """
        if not title.strip():
            title = title_of(messages[0].content) if messages else "New conversation"
        _check_room(len(messages), sum(len(message.content) for message in messages))
        now = time.time()
        with self._transaction() as connection:
            cursor = connection.execute(
                "INSERT INTO conversation (title, system, settings, created, changed)"
                " VALUES (?, ?, ?, ?, ?)",
                (
                    _text(title.strip(), "The title", MAX_TITLE),
                    _text(system, "The system message", MAX_CONTENT),
                    _json(settings or {}, "the settings"),
                    now,
                    now,
                ),
            )
            conversation = _row_id(cursor)
            ids: list[int] = []
            for place, message in enumerate(messages):
                if message.parent is not None and not 0 <= message.parent < place:
                    raise ValueError(
                        f"Message {place + 1} follows message {message.parent + 1}, but must "
                        f"follow one that stands before it."
                    )
                parent = None if message.parent is None else ids[message.parent]
                ids.append(self._insert(connection, conversation, parent, message))
            if head is not None and not 0 <= head < len(ids):
                raise ValueError(
                    f"Message {head + 1} is to be shown, but there are only {len(ids)}."
                )
            if head is not None:
                self._set(connection, conversation, "head", ids[head])
        return self.read(conversation)

    def read(self, conversation: int) -> SavedConversation:
        """A conversation with all its messages. Raises NotFoundError where there is none.

        Raises OSError where it is damaged. In one that is returned, the way from a message to the
        one that it follows has an end.
        """
        with self._transaction("DEFERRED") as connection:
            row = connection.execute(
                "SELECT title, system, settings, head, created, changed"
                " FROM conversation WHERE id = ?",
                (conversation,),
            ).fetchone()
            if row is None:
                raise NotFoundError(f"There is no conversation {conversation}. Was it deleted?")
            messages = connection.execute(
                "SELECT id, parent, role, content, detail, created"
                " FROM message WHERE conversation = ? ORDER BY id",
                (conversation,),
            ).fetchall()
        title, system, settings, head, created, changed = row
        earlier: set[int | None] = {None}
        for number, parent, *_ in messages:
            if parent not in earlier:
                raise OSError(
                    self._damaged(f"message {number} follows {parent}, not one before it")
                )
            earlier.add(number)
        if head not in earlier:
            raise OSError(self._damaged(f"conversation {conversation} has no message {head}"))
        return SavedConversation(
            id=conversation,
            title=title,
            system=system,
            settings=self._fields(settings),
            head=head,
            created=created,
            changed=changed,
            messages=[
                SavedMessage(number, parent, role, content, self._fields(detail), said)
                for number, parent, role, content, detail, said in messages
            ],
        )

    def update(
        self,
        conversation: int,
        title: str | None = None,
        system: str | None = None,
        settings: Mapping[str, Any] | None = None,
        head: int | None = None,
    ) -> None:
        """Change what is not None: the name, what later answers are made with, what is shown.

        Raises NotFoundError, and ValueError for a title without letters and for a ``head`` that is
        no message of this conversation.
        """
        with self._transaction() as connection:
            self._must_exist(connection, conversation)
            if title is not None:
                if not title.strip():
                    raise ValueError("The title is empty: a conversation needs a name in the list.")
                value = _text(title.strip(), "The title", MAX_TITLE)
                self._set(connection, conversation, "title", value)
            if system is not None:
                value = _text(system, "The system message", MAX_CONTENT)
                self._set(connection, conversation, "system", value)
            if settings is not None:
                value = _json(settings, "the settings")
                self._set(connection, conversation, "settings", value)
            if head is not None:
                self._role(connection, conversation, head)
                self._set(connection, conversation, "head", head)

    def add(
        self,
        conversation: int,
        parent: int | None,
        role: Speaker,
        content: str,
        detail: Mapping[str, Any] | None = None,
    ) -> SavedMessage:
        """Append a message behind the one with the id ``parent``, and show it.

        Behind a message may stand any number of others: that is how an edit keeps what was there.
        Raises NotFoundError, and ValueError for a message out of turn.
        """
        with self._transaction() as connection:
            self._must_exist(connection, conversation)
            number, size = self._size(connection, conversation)
            _check_room(number + 1, size + len(content))
            message = NewMessage(role, content, detail=detail or {})
            added = self._insert(connection, conversation, parent, message)
            (created,) = connection.execute(
                "SELECT created FROM message WHERE id = ?", (added,)
            ).fetchone()
        return SavedMessage(added, parent, role, content, dict(message.detail), created)

    def extend(
        self,
        conversation: int,
        message: int,
        begin: int,
        content: str,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Let an answer that is being written go on: from character ``begin`` it is ``content``.

        The same twice is as once, and less than is there, which comes late, changes nothing.
        Raises NotFoundError, and ValueError for what is no answer and for a text that says
        something else than is there: nothing that was said is overwritten.
        """
        with self._transaction() as connection:
            self._must_exist(connection, conversation)
            if self._role(connection, conversation, message) != "assistant":
                raise ValueError(f"Message {message} is a question, and only an answer grows.")
            (before,) = connection.execute(
                "SELECT content FROM message WHERE id = ?", (message,)
            ).fetchone()
            if before[begin:].startswith(content) and before[begin:] != content:
                return
            if begin > len(before) or not content.startswith(before[begin:]):
                raise ValueError(
                    f"Message {message} does not go on like this from character {begin}: its "
                    f"{len(before):,} characters stay as they are. Add another answer instead."
                )
            number, size = self._size(connection, conversation)
            whole = _text(before[:begin] + content, "The message (assistant)", MAX_CONTENT)
            _check_room(number, size + len(whole) - len(before))
            connection.execute(
                "UPDATE message SET content = ?, detail = ? WHERE id = ?",
                (whole, _json(detail or {}, "the detail"), message),
            )

    def delete(self, conversation: int) -> None:
        """Forget a conversation for good: its bytes are overwritten.

        In the log they stand as long as another process reads it; they go with the first call after
        that, or with `close`.
        Raises NotFoundError.
        """
        with self._lock:
            with self._transaction() as connection:
                self._must_exist(connection, conversation)
                self._set(connection, conversation, "head", None)
                connection.execute("DELETE FROM conversation WHERE id = ?", (conversation,))
            self._to_erase = True
            try:
                self._erase(ERASE_TIMEOUT)
            except sqlite3.Error as error:
                raise self._failed(error) from error

    def _erase(self, timeout: float) -> None:
        """Move the log into the file, over what was deleted, and empty it, if nobody reads it."""
        self._connection.execute(f"PRAGMA busy_timeout = {round(1000 * timeout)}").fetchall()
        try:
            ((busy, _, _),) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self._to_erase = bool(busy)
        finally:
            usual = round(1000 * BUSY_TIMEOUT)
            self._connection.execute(f"PRAGMA busy_timeout = {usual}").fetchall()

    def _insert(
        self,
        connection: sqlite3.Connection,
        conversation: int,
        parent: int | None,
        message: NewMessage,
    ) -> int:
        before = None if parent is None else self._role(connection, conversation, parent)
        expected = "assistant" if before == "user" else "user"
        if message.role != expected:
            follows = f"a message of role {before!r}" if before else "nothing"
            raise ValueError(
                f"A message of role {message.role!r} follows {follows}, but must be of role "
                f"{expected!r}: user and assistant take turns, and the user begins."
            )
        content = _text(message.content, f"The message ({message.role})", MAX_CONTENT)
        if message.role == "user" and not content.strip():
            raise ValueError("The message (user) is empty: there is nothing to answer.")
        now = time.time()
        created = now if message.created is None else message.created
        cursor = connection.execute(
            "INSERT INTO message (conversation, parent, role, content, detail, created)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (
                conversation,
                parent,
                message.role,
                content,
                _json(message.detail, "the detail"),
                created,
            ),
        )
        added = _row_id(cursor)
        connection.execute(
            "UPDATE conversation SET head = ?, changed = ? WHERE id = ?",
            (added, now, conversation),
        )
        return added

    def _size(self, connection: sqlite3.Connection, conversation: int) -> tuple[int, int]:
        """How many messages it has, and how many characters."""
        number, size = connection.execute(
            "SELECT count(*), total(length(content)) FROM message WHERE conversation = ?",
            (conversation,),
        ).fetchone()
        return number, int(size)

    def _role(self, connection: sqlite3.Connection, conversation: int, message: int) -> Speaker:
        row = connection.execute(
            "SELECT role FROM message WHERE id = ? AND conversation = ?", (message, conversation)
        ).fetchone()
        if row is None:
            raise ValueError(f"Conversation {conversation} has no message {message}.")
        role: Speaker = row[0]
        return role

    def _must_exist(self, connection: sqlite3.Connection, conversation: int) -> None:
        if not connection.execute(
            "SELECT 1 FROM conversation WHERE id = ?", (conversation,)
        ).fetchone():
            raise NotFoundError(f"There is no conversation {conversation}. Was it deleted?")

    def _set(
        self,
        connection: sqlite3.Connection,
        conversation: int,
        column: Literal["title", "system", "settings", "head"],
        value: str | int | None,
    ) -> None:
        connection.execute(
            f"UPDATE conversation SET {column} = ? WHERE id = ?", (value, conversation)
        )

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute(f"BEGIN {kind}")
                yield self._connection
                self._connection.execute("COMMIT")
                if self._to_erase:
                    with suppress(sqlite3.Error):  # what was asked is done; the next call tries
                        self._erase(0)
            except BaseException as error:
                if self._connection.in_transaction:  # a full disk has rolled back already
                    self._connection.execute("ROLLBACK")
                if not isinstance(error, sqlite3.Error):
                    raise
                raise self._failed(error) from error

    def _is_new(self) -> bool:
        """Looks at the first bytes, without SQLite, which might mend a file that is not ours."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            with open(descriptor, "rb") as file:
                header = file.read(100)
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be opened ({error.strerror}), so conversations cannot be "
                f"kept there: name another file."
            ) from None
        if not header:
            return True
        if not header.startswith(MAGIC) or header[68:72] != APPLICATION_ID.to_bytes(4, "big"):
            raise ValueError(
                f"{self.path} is not a file of minillama's conversations, and is left as it is: "
                f"name another, or none that exists."
            )
        version = int.from_bytes(header[60:64], "big")
        if version != VERSION:
            raise ValueError(
                f"{self.path} has version {version} of the conversations' tables, and this "
                f"minillama reads version {VERSION}: use the minillama that wrote it, or name "
                f"another file."
            )
        return False

    def _create_schema(self) -> None:
        # Not yet with a log: whoever looks at the file finds whose it is in its first bytes.
        self._connection.execute("BEGIN EXCLUSIVE")
        if not self._connection.execute("PRAGMA application_id").fetchone()[0]:
            for statement in SCHEMA:
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {VERSION}")
        self._connection.execute("COMMIT")

    def _check(self) -> None:
        (found,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise ValueError(self._damaged(" ".join(found.split())))
        for table, columns in (("conversation", 7), ("message", 7)):
            found = len(self._connection.execute(f"PRAGMA table_info({table})").fetchall())
            if found != columns:
                raise ValueError(self._damaged(f"{found} columns of table {table}"))

    def _configure(self) -> None:
        (page_size,) = self._connection.execute("PRAGMA page_size").fetchone()
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "secure_delete = ON",
            f"max_page_count = {MAX_FILE // page_size}",
        ):
            self._connection.execute(f"PRAGMA {pragma}").fetchall()
        self._connection.create_function(
            "contains", 2, lambda text, wanted: wanted in text.casefold(), deterministic=True
        )

    def _fields(self, text: str) -> dict[str, Any]:
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise OSError(self._damaged(f"{text[:40]!r} is no JSON object"))
        return fields

    def _failed(self, error: sqlite3.Error) -> OSError:
        return OSError(
            f"The conversations in {self.path} cannot be read or written ({error}). They may take "
            f"{MAX_FILE / 2**30:.0f} GiB; delete some, or make room on the disk."
        )

    def _damaged(self, reason: str) -> str:
        return (
            f"{self.path} is damaged ({reason}), and is left as it is: name another file, or put a "
            f"copy of it in its place. `sqlite3 FILE .recover` saves what can be saved."
        )


def data_folder() -> Path:
    """Where a user's own things lie: $MINILLAMA_DATA, or minillama's folder where such go."""
    if chosen := os.environ.get("MINILLAMA_DATA"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "minillama"
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "minillama"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "minillama"


def title_of(question: str, length: int = 60) -> str:
    """What a conversation is called: its first question, in one line, cut behind a word."""
    line = " ".join(question.split())
    if len(line) <= length:
        return line
    return (line[:length].rpartition(" ")[0] or line[: length - 1]) + "…"


def _check_room(n_messages: int, characters: int) -> None:
    if n_messages > MAX_MESSAGES or characters > MAX_CONVERSATION:
        raise ValueError(
            f"The conversation is full: it would have {n_messages:,} messages of {characters:,} "
            f"characters, and may have {MAX_MESSAGES:,} of {MAX_CONVERSATION:,}. Begin a new one."
        )


def _text(text: str, name: str, limit: int) -> str:
    if len(text) > limit:
        raise ValueError(
            f"{name} has {len(text):,} characters, and may have {limit:,}: shorten it."
        )
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{name} contains half of a surrogate pair, which is no character.")
    return text


def _json(value: Mapping[str, Any], name: str) -> str:
    # Without escapes, which would hide half of a surrogate pair until somebody reads it.
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    return _text(text, f"The JSON of {name}", MAX_DETAIL)


def _row_id(cursor: sqlite3.Cursor) -> int:
    assert cursor.lastrowid is not None
    return cursor.lastrowid
