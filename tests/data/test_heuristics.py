import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillama.data import heuristics
from minillama.data.heuristics import sentences

PAGE = "Home | About\nAda had a kite once.\nSee you!\nIs this the end of it?"
CHANGES = [
    heuristics.ended_lines,
    heuristics.long_lines,
    heuristics.lines_without_javascript,
    heuristics.without_placeholder,
    heuristics.without_code,
    heuristics.enough_sentences,
]


def test_sentences_by_hand():
    assert sentences('"Is it here?" asked Ben. It was! Then') == [
        '"Is it here?"',
        "asked Ben.",
        "It was!",
        "Then",
    ]
    assert sentences("(So it is.) Wait... what?!") == ["(So it is.)", "Wait...", "what?!"]
    assert sentences("  ") == []


@given(st.text(st.sampled_from('ab .!?")\n'), max_size=30))
def test_no_word_is_lost_between_sentences(text):
    cut = [sentence for line in text.split("\n") for sentence in sentences(line)]
    assert "".join("".join(cut).split()) == "".join(text.split())


def test_lines_that_do_not_end_like_a_sentence_go():
    assert heuristics.ended_lines(PAGE) == PAGE.split("\n", 1)[1]
    assert heuristics.ended_lines('He said: "So it is"\nNo; ') == 'He said: "So it is"'
    assert heuristics.ended_lines("Menu\nImprint") is None


def test_lines_of_fewer_than_five_words_go():
    assert heuristics.long_lines(PAGE) == "Ada had a kite once.\nIs this the end of it?"
    assert heuristics.long_lines("one two three four") is None
    assert heuristics.long_lines("one two three four five") == "one two three four five"


def test_lines_that_ask_for_javascript_go():
    page = "Please enable JavaScript.\nAda drank coffee from Java.\nJAVASCRIPT is off."
    assert heuristics.lines_without_javascript(page) == "Ada drank coffee from Java."


@pytest.mark.parametrize("mark", ["Lorem ipsum dolor", "and LOREM IPSUM"])
def test_pages_of_placeholder_text_go(mark):
    assert heuristics.without_placeholder(f"Ada.\n{mark}") is None
    assert heuristics.without_placeholder("Lorem and ipsum.") == "Lorem and ipsum."


def test_pages_with_a_curly_bracket_go():
    assert heuristics.without_code("if (x) { y }") is None
    assert heuristics.without_code("(x) [y]") == "(x) [y]"


def test_a_bad_word_is_one_of_its_own():
    assert heuristics.without_words("A Darn, hole.", {"darn"}) is None
    assert heuristics.without_words("She darned a sock.", {"darn"}) == "She darned a sock."
    assert heuristics.without_words("Whatever.", ()) == "Whatever."


def test_pages_of_fewer_than_three_sentences_go():
    assert heuristics.enough_sentences("One. Two.") is None
    assert heuristics.enough_sentences("One. Two.\nThree!") == "One. Two.\nThree!"


@pytest.mark.parametrize("change", CHANGES)
@given(page=st.text(max_size=60))
def test_a_rule_only_takes_lines_away_and_a_second_time_none(change, page):
    left = change(page)
    if left is not None:
        lines = iter(page.split("\n"))
        assert all(line in lines for line in left.split("\n"))  # in order
        assert change(left) == left


@pytest.mark.parametrize("text", ["word " * 200_000, "." * 10**6, '"' * 10**6, "a." * 500_000])
def test_a_line_of_a_megabyte_takes_no_time(text):
    assert heuristics.enough_sentences(text) in (None, text)
