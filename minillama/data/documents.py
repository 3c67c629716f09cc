"""Documents on disk: JSON lines, one document a line, read and written one at a time."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

# The sources of LLaMA's mixture, in the order of its table (Touvron et al. 2023a, table 1).
SOURCES = ("commoncrawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange")

MAX_LINE_BYTES = 2**26  # 64 MiB: a long book has 10; a longer line is a file without line ends


@dataclass(frozen=True)
class Document:
    """A text and what is known about it: where it is from, its language, licence, URL, score."""

    text: str
    source: str = ""  # one of SOURCES
    id: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)  # whatever JSON can say

    @property
    def n_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())

    def with_text(self, text: str) -> "Document":
        """The same document with another text."""
        return replace(self, text=text)


@dataclass(frozen=True)
class Shard:
    """The lines of a file that begin at or after byte ``start`` and before byte ``stop``."""

    path: Path
    start: int = 0
    stop: int | None = None  # None: to the end


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[Document]:
    """The documents of a JSON-lines file; one of them at a time is in memory.

    A line is an object with at least "text". "source" is else the file's name, "id" the number of
    the byte where the line begins; "meta" holds the rest, and keys that are none of these four join
    it. Blank lines are skipped.

    Raises OSError or ValueError, naming file and line, for a file that is missing or holds no
    document, for a line that is no such object, no UTF-8, or longer than `MAX_LINE_BYTES`.
    """
    path = Path(path)
    empty = True
    for document in read_shard(Shard(path)):
        empty = False
        yield document
    if empty:
        raise ValueError(
            f"{path} holds no document. Put one JSON object a line into it, "
            f'{{"text": "..."}}, or remove the file if there is nothing of this source.'
        )


def read_shard(shard: Shard) -> Iterator[Document]:
    """The documents of a part of a file, as `read_jsonl` reads the whole; there may be none."""
    path = shard.path
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the JSON-lines file in it.")
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    with path.open("rb") as file:
        if shard.start:
            file.seek(shard.start - 1)
            _skip_line(file)  # it began before; unless it ended just there
        while shard.stop is None or file.tell() < shard.stop:
            position = file.tell()
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            try:
                document = _parse(line, path, position)
            except ValueError as error:
                where = f"{path}, line {_line_number(path, position)}"
                raise ValueError(f"{where}: {error}") from None
            if document:
                yield document


def shards(path: str | os.PathLike[str], n: int) -> list[Shard]:
    """``n`` parts of about equally many bytes: together, in order, they hold every line once."""
    path = Path(path)
    cuts = [path.stat().st_size * i // n for i in range(n)]
    return [Shard(path, *pair) for pair in zip(cuts, [*cuts[1:], None], strict=True)]


def write_jsonl(path: str | os.PathLike[str], documents: Iterable[Document]) -> int:
    """Write the documents, one a line, as they come; returns how many.

    The file appears when all are written: a crash or an error in between leaves what stood there.
    """
    n_written = 0
    with replacing(Path(path)) as file:
        for n_written, document in enumerate(documents, start=1):  # noqa: B007
            file.write(json.dumps(_record(document), ensure_ascii=False).encode() + b"\n")
    return n_written


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write; at the end it takes the place of ``path``, or nothing has changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _record(document: Document) -> dict[str, Any]:
    return {
        "text": document.text,
        "source": document.source,
        "id": document.id,
        "meta": dict(document.meta),
    }


def _parse(line: bytes, path: Path, position: int) -> Document | None:
    """The document of a line; None if it is blank. ValueError says what is wrong with it."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(
            f"it is longer than {MAX_LINE_BYTES:,} bytes and would fill the memory. A document is "
            f"one line: cut it into several, or give the file line ends."
        )
    try:
        text = line.decode("utf-8-sig" if position == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not UTF-8 text: byte {error.start} is 0x{line[error.start]:02x}. Texts of "
            f"several encodings were joined; convert each before: iconv -f LATIN1 -t UTF-8 FILE"
        ) from None
    if not text.strip():
        return None
    try:
        record = json.loads(text)
    except RecursionError:
        raise ValueError("it is no document: its brackets are nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"it is no JSON ({error.msg} at character {error.pos}). "
            f'Each line is one object: {{"text": "..."}}'
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = f"the keys {', '.join(record)}" if isinstance(record, dict) else repr(record)[:40]
        raise ValueError(f'it has no text, but {found}. Each line needs {{"text": "..."}}')
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"its text has half a character (a lone surrogate) at {error.start}. "
            f"Write the text again with the whole characters."
        ) from None
    meta = record.pop("meta", None) or {}
    if not isinstance(meta, dict):
        raise ValueError(f"its meta is {meta!r:.40}, but must be an object.")
    return Document(
        text=record.pop("text"),
        source=str(record.pop("source", path.stem)),
        id=str(record.pop("id", position)),
        meta={**record, **meta},
    )


def _skip_line(file: BinaryIO) -> None:
    while part := file.readline(2**20):
        if part.endswith(b"\n"):
            return


def _line_number(path: Path, position: int) -> int:
    """Which line, from 1 on, begins at that byte."""
    n_lines, left = 1, position
    with path.open("rb") as file:
        while part := file.read(min(left, 2**20)):
            n_lines += part.count(b"\n")
            left -= len(part)
    return n_lines
