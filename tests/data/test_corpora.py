import codecs
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillama.data.corpora import hold_out, read_documents, read_text

TEXT = "Ada lost a kite.\r\n\r\n  日本 🦙\n"


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT.encode())
    return path


# --- What is read --------------------------------------------------------------------------------


def test_the_text_is_what_the_file_holds(book):
    assert read_text(book) == TEXT  # line ends, too
    assert read_text(str(book)) == TEXT


def test_a_byte_order_mark_is_no_part_of_the_text(book):
    book.write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    assert read_text(book) == TEXT


def test_each_file_is_a_document(book, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Ben")
    assert read_documents([book, other, book]) == [TEXT, "Ben", TEXT]


def test_or_each_line_that_is_not_blank(book):
    assert read_documents([book], by_line=True) == ["Ada lost a kite.", "  日本 🦙"]


# --- What is not ---------------------------------------------------------------------------------


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text file .*book\.txt"):
        read_text(tmp_path / "book.txt")


def test_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder; name the text files in it, .*\*"):
        read_text(tmp_path)


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", codecs.BOM_UTF8])
def test_a_file_with_nothing_in_it(book, content):
    book.write_bytes(content)
    with pytest.raises(ValueError, match=r"book\.txt is empty"):
        read_text(book)


def test_a_binary_file(book):
    book.write_bytes(b"text\0\1\2")
    with pytest.raises(ValueError, match=r"book\.txt is a binary file, not text: character 4"):
        read_text(book)


@pytest.mark.skipif(not shutil.which("iconv"), reason="the way out it names is not installed")
def test_text_in_another_encoding_names_the_byte_and_the_way_out(book):
    book.write_bytes("naïve café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"book\.txt is not UTF-8 text: byte 2 is 0xef") as error:
        read_text(book)
    command = str(error.value).rsplit("convert it: ", 1)[1]
    converted = subprocess.run(command.split(), cwd=book.parent, capture_output=True, check=True)
    assert converted.stdout.decode() == "naïve café"


def test_utf_16_is_no_utf_8(book):
    book.write_bytes("Ada".encode("utf-16"))
    with pytest.raises(ValueError, match=r"book\.txt is not UTF-8 text: byte 0 is 0xff"):
        read_text(book)


def test_one_bad_file_among_many_is_named(book, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bad\.txt"):
        read_documents([book, bad])


# --- Validation ----------------------------------------------------------------------------------


def test_the_last_tenth_by_hand():
    assert hold_out(["0123456789", "abcdefghij"], 0.1) == (["0123456789", "abcdefgh"], ["ij"])
    assert hold_out(["0123456789", "ab", "cd"], 0.2) == (["0123456789", "a"], ["b", "cd"])


@given(documents=st.lists(st.text(max_size=20), max_size=8), share=st.floats(0, 1))
def test_nothing_is_lost_and_nothing_is_seen_twice(documents, share):
    kept, held_out = hold_out(documents, share)
    assert "".join([*kept, *held_out]) == "".join(documents)
    assert len("".join(held_out)) == round(len("".join(documents)) * share)


def test_the_documents_given_stay_as_they_are():
    documents = ["abc", "def"]
    hold_out(documents, 0.5)
    assert documents == ["abc", "def"]
