from itertools import combinations, product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.generation import StopFilter

WORDS = ["".join(letters) for n in (1, 2, 3) for letters in product("ab", repeat=n)]


def cut(text: str, stops: tuple[str, ...]) -> str | None:
    """What is left, by the definition: the first prefix that ends in a stop string, without it."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


def filtered(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text that comes through, and whether it stopped."""
    stop, shown = StopFilter(stops), ""
    for piece in pieces:
        shown += stop.push(piece)
        if stop.stopped:
            break
    return shown + stop.flush(), stop.stopped


def cuttings(text: str, rng: Random, n: int):
    """The text letter by letter, as a whole, and cut at n random sets of places."""
    yield list(text)
    yield [text]
    for _ in range(n):
        cuts = sorted(rng.sample(range(len(text) + 1), rng.randint(0, len(text))))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def check_all(texts: list[str], all_stops: list[tuple[str, ...]], n_cuttings: int) -> None:
    rng = Random(0)
    for stops in all_stops:
        for text in texts:
            expected = cut(text, stops)
            for pieces in cuttings(text, rng, n_cuttings):
                found = (text, False) if expected is None else (expected, True)
                assert filtered(pieces, stops) == found, (stops, pieces)


def texts_up_to(length: int) -> list[str]:
    """All strings over three letters; every stop string is made of two of them."""
    return ["".join(text) for n in range(length + 1) for text in product("abc", repeat=n)]


def test_every_short_text_and_every_pair_of_stop_strings():
    pairs = [*combinations(WORDS, 2), *((word,) for word in WORDS)]
    check_all(texts_up_to(4), pairs, n_cuttings=1)


@pytest.mark.slow
def test_every_text_of_up_to_eight_letters():
    all_stops = [("ab",), ("aa",), ("aab",), ("aba",), ("abab",), ("ab", "ba"), ("aab", "ab")]
    all_stops += [("a", "ab"), ("abb", "b"), ("aabb", "ab", "bc"), ("abca", "bc"), ("cc", "abc")]
    check_all(texts_up_to(8), all_stops, n_cuttings=1)


@given(
    pieces=st.lists(st.text("ab日", max_size=4), max_size=8),
    stops=st.lists(st.text("ab日", min_size=1, max_size=5), max_size=4).map(tuple),
)
@settings(deadline=None)
def test_the_pieces_do_not_matter(pieces, stops):
    assert filtered(pieces, stops) == filtered(["".join(pieces)], stops)


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4).map(tuple),
)
@settings(deadline=None)
def test_no_more_is_held_back_than_could_become_a_stop_string(pieces, stops):
    stop, text, shown = StopFilter(stops), "", ""
    for piece in pieces:
        shown += stop.push(piece)
        text += piece
        if stop.stopped:
            return
        held = text[len(shown) :]
        assert text == shown + held
        assert not held or any(s != held and s.startswith(held) for s in stops)


def test_by_hand():
    stop = StopFilter(["END", "\n\n"])
    assert [stop.push(piece) for piece in ("one E", "N", "two\n", "three E", "ND four")] == [
        "one ",
        "",
        "ENtwo",
        "\nthree ",
        "",
    ]
    assert stop.stopped
    assert stop.push("more") == stop.flush() == ""


def test_what_was_held_back_comes_at_the_end():
    stop = StopFilter(["END"])
    assert (stop.push("the EN"), stop.flush(), stop.flush()) == ("the ", "EN", "")
    assert not stop.stopped


def test_the_longest_of_those_that_end_at_once():
    assert filtered(["xab"], ("b", "ab")) == ("x", True)


def test_the_first_to_be_complete_even_if_another_began_before():
    assert filtered(["xabc"], ("abcd", "bc")) == ("xa", True)


def test_one_string_is_one_stop_string_not_its_letters():
    assert filtered(["bad"], "ad") == filtered(["bad"], ("ad",)) == ("b", True)  # type: ignore


def test_without_stop_strings_all_comes_at_once():
    stop = StopFilter(())
    assert stop.push("all") == "all"


@pytest.mark.parametrize("stops", [("",), ("END", ""), ""])
def test_an_empty_stop_string_is_refused(stops):
    with pytest.raises(ValueError, match=r"stop string is empty.* Leave it out"):
        StopFilter(stops)
