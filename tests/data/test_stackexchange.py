import re
import time
from html import escape
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillama.data.stackexchange import (
    N_SITES,
    largest_sites,
    question_and_answers,
    strip_html,
)

# --- HTML ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>Where is my <b>red</b> kite?</p>", "Where is my red kite?"),
        ("<p>one</p><p>two</p>", "one\ntwo"),
        ("<p>one\n  line</p>\n\n<p>two</p>\n", "one line\ntwo"),
        ("<ul><li>net</li><li>rope</li></ul>", "net\nrope"),
        ("up<br>down<BR/>out", "up\ndown\nout"),
        ("un<i>believ</i>able", "unbelievable"),
        ('<a href="https://a.b/c?d=e&f=g" rel="x">the bridge</a>', "the bridge"),
        ('a <img src="x.png" alt="1 > 0"> b', "a b"),
        ("a <img alt='it\"s > that'> b", "a b"),
        ('a <b title="never closed>b</b> c', "a b c"),
        ("a<!-- not\nthis <b> -->b", "ab"),
        ("a<script>if (a < b) { c }</script>b<STYLE>p {}</STYLE>c", "abc"),
        ("<!DOCTYPE html><?xml version='1.0'?><p>a</p>", "a"),
        ("1 < 2, 2 > 1 and a<", "1 < 2, 2 > 1 and a<"),
        ("I <3 you", "I <3 you"),
        ("", ""),
        ("<p> </p>", ""),
    ],
)
def test_by_hand(html, text):
    assert strip_html(html) == text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("&lt;b&gt; is bold", "<b> is bold"),
        ("&amp;lt; is written so", "&lt; is written so"),  # decoded once
        ("caf&eacute; &#233;&#xE9;", "café éé"),
        ("a &amp b &unknown; c", "a & b &unknown; c"),
        ("a&nbsp;b", "a\xa0b"),
        ("&lt;script&gt;kept&lt;/script&gt;", "<script>kept</script>"),
    ],
)
def test_entities_are_decoded_once_and_last(html, text):
    assert strip_html(html) == text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        (
            "<p>Try  this:</p>\n<pre><code>for x in y:\n    if x &lt; 1:\n\n        go()\n"
            "</code></pre>\n<p>It  works.</p>",
            "Try this:\nfor x in y:\n    if x < 1:\n\n        go()\nIt works.",
        ),
        ("<pre class='lang-py'><code>    indented\n</code></pre>", "    indented"),
        ("<PRE>a\nb</PRE>c", "a\nb\nc"),
        ("a<pre>b\n  c", "a\nb\n  c"),  # never closes
        ("<pre>a<br>b</pre>", "a\nb"),
        ("use <code>a  b</code>", "use a b"),  # inline code is no <pre>
    ],
)
def test_code_keeps_its_lines_and_indents(html, text):
    assert strip_html(html) == text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<div><p>one<p>two <b>three", "one\ntwo three"),
        ("one <b", "one <b"),
        ("one <!-- two", "one <!-- two"),
        ("one <script> two", "one two"),
        ("one <style>two <b>three</b>", "one two three"),
        ("</p></div>one", "one"),
        ('one <a href="two three <b>four</b>', 'one <a href="two three four'),
    ],
)
def test_html_that_never_closes_loses_no_word(html, text):
    assert strip_html(html) == text


@given(st.text())
def test_escaped_text_comes_back(text):
    squeezed = re.sub(r"[ \t\r\n\f]+", " ", text).strip(" ")
    assert strip_html(f"<p>{escape(text)}</p>") == (squeezed if squeezed.strip() else "")


@given(st.text(alphabet=st.sampled_from("ab <>&\"' \n#;"), min_size=1))
def test_escaped_code_comes_back_to_the_letter(code):
    expected = code.strip("\n") if code.strip() else ""
    assert strip_html(f"<pre><code>{escape(code)}</code></pre>") == expected


@given(st.text(alphabet=st.sampled_from("ab</!-=\"' p\n")))
def test_without_a_single_closing_bracket_all_is_text(soup):
    assert strip_html(soup) == re.sub(r"[ \n]+", " ", soup).strip(" ")


class TheirText(HTMLParser):
    """The text between the tags, by Python's own parser."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_data(self, data: str) -> None:
        self.text += data


WORDS = st.text(alphabet="ab <>&'\"é", max_size=6).map(escape)
ATTRIBUTES = st.sampled_from(["", ' class="a > b"', " id='x'", " hidden", ' href="?a=1&b=2"'])
PAGES = st.recursive(
    WORDS,
    lambda inner: st.builds(
        lambda tag, attributes, parts: f"<{tag}{attributes}>{' '.join(parts)}</{tag}>",
        st.sampled_from(["p", "b", "div", "a", "code", "PRE", "h1"]),
        ATTRIBUTES,
        st.lists(inner, max_size=3),
    ),
    max_leaves=8,
)


@given(PAGES)
def test_the_characters_are_those_that_an_independent_parser_finds(page):
    assert "".join(strip_html(page).split()) == "".join(TheirText(page).text.split())


@pytest.mark.parametrize(
    "unit",
    [
        "<",
        "<a",
        "<a ",
        '<a "',
        "<a '",
        "<!--",
        "<div>",
        "<script>",
        "<pre>",
        "</",
        "&",
        "&#",
        "a\n",
        "<a \"'",
        "<a =\"<a ='",
        "</script",
        "<pre",
        "&lt;",
        " ",
    ],
)
def test_a_long_page_of_one_thing_takes_no_time(unit):
    page = (unit * 200_000)[:200_000]
    start = time.process_time()
    strip_html(page)
    assert time.process_time() - start < 1


# --- Threads -------------------------------------------------------------------------------------


def test_the_best_answer_comes_first():
    text = question_and_answers(
        "Where is the <thing>?",
        "<p>It is gone.</p>",
        [(1, "<p>Here.</p>"), (7, "There &amp; then")],
    )
    assert text == "Q: Where is the <thing>?\nIt is gone.\n\nA: There & then\n\nA: Here."


def test_answers_of_equal_score_keep_their_order():
    answers = [(0, "a"), (2, "b"), (0, "c"), (-1, "d"), (2, "e")]
    assert re.findall("A: (.)", question_and_answers("t", "q", answers)) == list("beacd")


@given(st.lists(st.integers(-3, 3)))
def test_the_order_is_stable_for_any_scores(scores):
    text = question_and_answers("t", "q", [(s, f"{i}") for i, s in enumerate(scores)])
    order = [int(i) for i in re.findall(r"A: (\d+)", text)]
    assert order == sorted(range(len(scores)), key=lambda i: (-scores[i], i))


@pytest.mark.parametrize("answers", [[], [(3, "")], [(3, "<p> </p>")]])
def test_a_question_without_answers_stands_alone(answers):
    assert question_and_answers("Why?", "<p>Tell me.</p>", answers) == "Q: Why?\nTell me."


# --- Sites ---------------------------------------------------------------------------------------


def test_the_largest_sites_by_posts():
    posts = {"cooking": 5, "math": 90, "chess": 5, "code": 100, "latin": 1}
    assert largest_sites(posts, 3) == ("code", "math", "chess")
    assert largest_sites(posts) == ("code", "math", "chess", "cooking", "latin")


def test_the_paper_takes_28():
    assert len(largest_sites({f"site{i}": i for i in range(50)})) == N_SITES == 28


@pytest.mark.parametrize("n", [0, -1])
def test_no_site_at_all(n):
    with pytest.raises(ValueError, match=rf"n is {n}: at least one site"):
        largest_sites({"math": 1}, n)
