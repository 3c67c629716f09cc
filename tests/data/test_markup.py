import time

import pytest

from minillama.data.markup import cut_spans


def test_by_hand():
    assert cut_spans("a<!--b-->c<!--d-->e", "<!--", "-->") == "ace"


def test_a_span_ends_at_its_first_closing_and_may_have_lines():
    assert cut_spans("a<!--b<!--\n-->c-->d", "<!--", "-->") == "ac-->d"


def test_an_opening_that_never_closes_is_text():
    assert cut_spans("a<!--b-->c<!--d", "<!--", "-->") == "ac<!--d"


def test_upper_and_lower_case_are_one():
    assert cut_spans("a<REF>b</Ref>c", "<ref>", "</ref>") == "ac"


@pytest.mark.parametrize("page", ["<!--" * 250_000, "-->" + "<!--" * 250_000, "<!--x-->" * 125_000])
def test_the_time_is_linear(page):
    start = time.process_time()
    cut_spans(page, "<!--", "-->")
    assert time.process_time() - start < 2
