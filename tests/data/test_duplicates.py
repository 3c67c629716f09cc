import hashlib
from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillama.data.documents import Document
from minillama.data.duplicates import (
    NearDuplicates,
    duplicate_lines,
    exact_duplicates,
    hash64,
    jaccard,
    normalise,
    repeated_spans,
    shingle_hashes,
)

LINES = st.lists(st.text(st.sampled_from("abA1!\n "), max_size=6), max_size=8)


def curated(change, texts: list[str]) -> list[str | None]:
    seen = set[int]()
    return [change(text, seen) for text in texts]


def test_the_hash_is_the_beginning_of_sha_1():
    assert hash64("Ada") == int(hashlib.sha1(b"Ada").hexdigest()[:16], 16)
    assert 0 <= hash64("") < 2**64


# --- Files, lines, spans -------------------------------------------------------------------------


def test_of_equal_files_the_first_stays():
    assert curated(exact_duplicates, ["a", "b", "a", "a "]) == ["a", "b", None, "a "]


def test_lines_are_the_same_whatever_their_digits_case_and_punctuation():
    assert (
        normalise("  1,204 Visits -- today! ")
        == normalise("7_318 visits today")
        == "0000 visits today"
    )
    assert normalise("ÉTÉ №5") == "été 0"
    assert normalise("***") == ""


def test_lines_said_before_go_by_hand():
    pages = ["A b.\nVisitor 17\n\nC d.", "Visitor 23!\nE f.", "a B\n\n", "E f.\nG\nG"]
    assert curated(duplicate_lines, pages) == ["A b.\nVisitor 17\n\nC d.", "E f.", None, "G"]


@given(pages=LINES)
def test_each_line_stays_exactly_once(pages):
    kept = [page for page in curated(duplicate_lines, pages) if page is not None]
    left = [n for page in kept for line in page.split("\n") if (n := normalise(line))]
    every = {n for page in pages for line in page.split("\n") if (n := normalise(line))}
    assert len(left) == len(set(left))
    assert set(left) == every


@given(pages=LINES)
def test_what_stays_is_kept_as_it_was_written(pages):
    for before, after in zip(pages, curated(duplicate_lines, pages), strict=True):
        lines = iter(before.split("\n"))
        assert after is None or all(line in lines for line in after.split("\n"))


def test_spans_said_before_go_by_hand():
    pages = ["A. B. C. D.", "X.\nb! C? D. Y.", "A. B. X. C.", "A. B. C."]
    assert curated(repeated_spans, pages) == ["A. B. C. D.", "X.\nY.", "A. B. X. C.", None]


def test_two_sentences_are_no_span():
    assert curated(repeated_spans, ["A. B.", "A. B."]) == ["A. B.", "A. B."]


def test_a_text_without_repetition_keeps_its_spaces():
    assert curated(repeated_spans, ["A.  B.\n\n  C. D"]) == ["A.  B.\n\n  C. D"]


@given(pages=st.lists(st.text(st.sampled_from("abc. "), max_size=16), max_size=6))
def test_what_is_left_repeats_no_span_of_an_earlier_page(pages):
    def spans(text: str) -> set[str]:
        parts = [normalise(part) for part in text.split(".") if part.strip()]
        return {" ".join(parts[i : i + 3]) for i in range(len(parts) - 2)}

    seen = set[int]()
    for n, page in enumerate(pages):
        left = repeated_spans(page, seen)
        if left == page:
            assert not spans(page) & {span for earlier in pages[:n] for span in spans(earlier)}


# --- Books ---------------------------------------------------------------------------------------


def book(*parts: tuple[str, int, int]) -> Document:
    """Words p0, p1, ... of each part (p, first, last)."""
    return Document(" ".join(f"{p}{i}" for p, first, last in parts for i in range(first, last)))


def letters(text: str) -> str:
    """Digits are all the same to the rule: let these be letters."""
    return text.translate(str.maketrans("0123456789", "abcdefghij"))


def overlap(a: str, b: str) -> float:
    """The definition, with sets of strings."""
    shingles = [
        {" ".join(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}
        for words in (a.lower().split(), b.lower().split())
    ]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


def changed(rng: Random, words: list[str], n: int) -> str:
    words = list(words)
    for place in rng.sample(range(len(words)), n):
        words[place] = "other" + letters(str(rng.random())[2:])
    return " ".join(words)


def test_overlap_by_hand():
    a, b = shingle_hashes("a b c d e f", 5), shingle_hashes("A b, c d e -- g", 5)
    assert len(a) == len(b) == 2
    assert jaccard(a, b) == 1 / 3
    assert jaccard(a, a) == 1
    assert len(shingle_hashes("too short", 5)) == 1
    assert a.dtype == np.uint64


def test_exactly_the_books_that_overlap_by_more_than_90_percent_go():
    rng = Random(0)
    words = [letters(f"w{i}") for i in range(600)]
    original = " ".join(words)
    found = {True: 0, False: 0}
    for n in range(2, 16):
        copy = changed(rng, words, n)
        same = overlap(copy, original) > 0.9
        fresh = NearDuplicates(0.9)
        fresh(Document(original))
        assert (fresh(Document(copy)) is None) == same, overlap(copy, original)
        found[same] += 1
    assert min(found.values()) > 3  # both sides of the boundary


def test_a_copy_with_half_of_it_new_stays():
    words = [letters(f"w{i}") for i in range(4000)]
    kept = NearDuplicates(0.9)
    assert kept(Document(" ".join(words[:2000])))
    assert kept(Document(" ".join(words[1000:3000])))
    assert kept(Document(" ".join(words[3000:])))
    assert len(kept.books) == 3


def test_case_punctuation_and_layout_do_not_make_another_book():
    words = [letters(f"w{i}") for i in range(300)]
    kept = NearDuplicates()
    assert kept(Document(" ".join(words)))
    assert kept(Document("\n\n".join(words).upper() + ".")) is None
    assert len(kept.books) == 1  # what was dropped is not remembered


def test_no_book_is_lost_because_minhash_guessed():
    """Many books that share a half: the look-up finds most pairs, and none is dropped."""
    words = [letters(f"w{i}") for i in range(600)]
    books = [
        " ".join([*words, *(letters(f"b{number}x{i}") for i in range(300))]) for number in range(40)
    ]
    assert all(0.45 < overlap(a, b) < 0.55 for a, b in combinations(books[:5], 2))
    kept = NearDuplicates(0.9)
    assert all(kept(Document(text)) for text in books)


def test_real_editions(assets):
    """Shakespeare with another spelling of "thee" is the same book, every second line is not."""
    text = (assets / "tinyshakespeare.txt").read_text()[:200_000]
    kept = NearDuplicates()
    assert kept(Document(text))
    assert kept(Document("Printed anew.\n" + text.replace("thee", "thée"))) is None
    assert kept(Document("\n".join(text.splitlines()[::2])))


@pytest.mark.parametrize("share", [0.0, -1.0, 90.0])
def test_an_overlap_is_a_share(share):
    with pytest.raises(ValueError, match="is a share"):
        NearDuplicates(share)


def test_a_missing_library_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(ValueError, match=r"rensa, .* pip install 'minillama\[data\]'"):
        NearDuplicates()
