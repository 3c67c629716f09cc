import codecs
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillama.data import documents
from minillama.data.documents import (
    Document,
    Shard,
    read_jsonl,
    read_shard,
    shards,
    write_jsonl,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), TEXTS, st.lists(TEXTS, max_size=2))
DOCUMENTS = st.lists(
    st.builds(Document, TEXTS, TEXTS, TEXTS, st.dictionaries(TEXTS, VALUES, max_size=2)),
    min_size=1,
    max_size=5,
)
# The folder is the same for all examples, and each writes its file anew.
ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c4.jsonl"


def read(path, content: bytes) -> list[Document]:
    path.write_bytes(content)
    return list(read_jsonl(path))


# --- What is read and written --------------------------------------------------------------------


@given(written=DOCUMENTS)
@ONE_FOLDER
def test_what_is_written_is_read_back(path, written):
    assert write_jsonl(path, written) == len(written)
    assert list(read_jsonl(path)) == written


def test_a_file_by_hand(path):
    content = '{"text": "Ada", "id": 7, "meta": {"score": 1}, "url": "x.org"}\n\n{"text": "Bé"}'
    assert read(path, content.encode()) == [
        Document("Ada", "c4", "7", {"score": 1, "url": "x.org"}),
        Document("Bé", "c4", "64", {}),
    ]


def test_a_byte_order_mark_is_no_part_of_the_json(path):
    assert read(path, codecs.BOM_UTF8 + b'{"text": "Ada"}\r\n')[0].text == "Ada"


def test_bytes_are_those_of_utf_8():
    assert Document("Bé").n_bytes == 3


@given(written=DOCUMENTS, n=st.integers(1, 12), ends=st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
@ONE_FOLDER
def test_shards_hold_every_document_once_and_in_order(path, written, n, ends):
    write_jsonl(path, written)
    path.write_bytes(path.read_bytes().replace(b"\n", ends))
    parts = [list(read_shard(shard)) for shard in shards(path, n)]
    assert [document for part in parts for document in part] == written


def test_shards_are_about_equally_long(path):
    write_jsonl(path, [Document("word " * 20)] * 100)
    assert {len(list(read_shard(shard))) for shard in shards(path, 10)} <= {9, 10, 11}


def test_documents_are_read_one_at_a_time(path):
    """Of 20 MB, no more than a few are ever in memory."""
    write_jsonl(path, (Document("x" * 10**5) for _ in range(200)))
    tracemalloc.start()
    assert sum(document.n_bytes for document in read_jsonl(path)) == 2 * 10**7
    assert tracemalloc.get_traced_memory()[1] < 2 * 10**6
    tracemalloc.stop()


def test_an_error_while_writing_leaves_what_was_there(path):
    write_jsonl(path, [Document("before")])

    def broken():
        yield Document("after")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_jsonl(path, broken())
    assert [document.text for document in read_jsonl(path)] == ["before"]
    assert list(path.parent.iterdir()) == [path]


# --- What is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_source_without_a_document(path, content):
    with pytest.raises(ValueError, match=r"c4\.jsonl holds no document"):
        read(path, content)


def test_a_file_that_is_missing(path):
    with pytest.raises(FileNotFoundError, match=r"no file .*c4\.jsonl"):
        list(read_jsonl(path))


def test_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        list(read_jsonl(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"it is no JSON \(.*\. Each line is one object"),
        (b"plain text", "it is no JSON"),
        (b'["Ada"]', r"it has no text, but \['Ada'\]"),
        (b'{"content": "Ada", "n": 1}', "it has no text, but the keys content, n"),
        (b'{"text": null}', "it has no text"),
        (b'{"text": "\xe9"}', r"it is not UTF-8 text: byte 10 is 0xe9\. Texts of several enco"),
        (rb'{"text": "a\ud800"}', "half a character .* at 1"),
        (b'{"text": "Ada", "meta": "x"}', "its meta is 'x'"),
        (b"[" * 10**6, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_document_is_named(path, line, message):
    with pytest.raises(ValueError, match=rf"c4\.jsonl, line 3: .*{message}"):
        read(path, b'{"text": "Ada"}\n\n' + line + b'\n{"text": "Ben"}\n')


def test_the_documents_before_a_bad_line_are_read(path):
    path.write_bytes(b'{"text": "Ada"}\n{')
    reader = read_jsonl(path)
    assert next(reader).text == "Ada"
    with pytest.raises(ValueError, match="line 2"):
        next(reader)


def test_a_line_of_a_gigabyte_is_refused_and_never_read(path):
    with path.open("wb") as file:
        file.write(b'{"text": "Ada"}\n')
        file.truncate(2**30)
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 2: it is longer than 67,108,864 bytes and would"):
        list(read_jsonl(path))
    assert tracemalloc.get_traced_memory()[1] < 3 * documents.MAX_LINE_BYTES
    tracemalloc.stop()


def test_a_shard_within_a_line_of_a_gigabyte_is_empty(path):
    with path.open("wb") as file:
        file.truncate(2**28)
    assert list(read_shard(Shard(path, 2**27, None))) == []


def test_the_longest_line_that_is_allowed(path, monkeypatch):
    line = json.dumps({"text": "x" * 30}).encode()
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", len(line) + 1)
    assert len(read(path, line + b"\n" + line)) == 2
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", len(line) - 1)
    with pytest.raises(ValueError, match="line 1: it is longer"):
        read(path, line)
