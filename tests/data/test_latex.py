import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillama.data.latex import MAX_DEPTH, MAX_OPTIONAL, plain_latex


def body(source: str) -> str:
    """What a section with this source becomes."""
    return plain_latex(rf"\section{{s}} {source}").removeprefix(r"\section{s} ")


def test_a_paper_by_hand():
    paper = r"""\documentclass{article}  % as always
\newcommand{\R}{\mathbb{R}}
\newcommand{\norm}[1]{\lVert #1 \rVert}
\newcommand{\kite}[2][red]{#1 #2}
\begin{document}
\title{On \R}
\maketitle
\begin{abstract} \kite{kites} \end{abstract}

\section{Kites in $\R^2$}\label{kites}
We fly a \kite{kite}, % the first
  then a \kite[blue]{kite}.
% nobody reads this
At 100\% wind, $\norm{x + \norm{y}} < \infty$.
\begin{verbatim}
\R % stays
\end{verbatim}

\section*{Thanks}
To Ada.
\bibliographystyle{plain}
\bibliography{kites}
\appendix \section{More}
\end{document}
"""
    assert plain_latex(paper) == (
        r"""\section{Kites in $\mathbb{R}^2$}\label{kites}
We fly a red kite, then a blue kite.
At 100\% wind, $\lVert x + \lVert y \rVert \rVert < \infty$.
\begin{verbatim}
\R % stays
\end{verbatim}

\section*{Thanks}
To Ada."""
    )


# --- What is cut ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"a \begin{document} b \section{c} d \end{document} e", r"\section{c} d"),
        (r"a \begin{document} b \section*{c} d", r"\section*{c} d"),
        (r"a \begin{document} b \section[e]{c} d", r"\section[e]{c} d"),
        (r"a \begin{document} b \subsection{c} \section{d}", r"\section{d}"),
        (r"\section{a} b \section{c} d", r"\section{a} b \section{c} d"),
        (r"a \begin{document} b \end{document} c", "b"),  # no section: the document
        ("a b", "a b"),  # no document either
        (r"a \sectionmark{b} \section{c}", r"\section{c}"),
        (r"\verb|\section| a \section{b}", r"\section{b}"),
        (r"% \section{a}" + "\n" + r"b \section{c}", r"\section{c}"),
        ("", ""),
    ],
)
def test_everything_before_the_first_section_goes(source, text):
    assert plain_latex(source) == text


@pytest.mark.parametrize(
    "end",
    [
        r"\bibliography{refs} b",
        r"\printbibliography[heading=none] b",
        r"\begin{thebibliography}{9} \bibitem{b} c \end{thebibliography} d",
        r"\bibliographystyle{plain} \bibliography{refs}",
        r"\end{document} b",
    ],
)
def test_the_bibliography_goes_and_all_after_it(end):
    assert body(f"a {end}") == "a"


def test_a_bibliography_before_the_first_section_does_not_count():
    assert plain_latex(r"\bibliography{a} \section{b} c") == r"\section{b} c"


def test_a_bibliography_that_is_talked_about_stays():
    assert body(r"\verb|\bibliography{x}| a") == r"\verb|\bibliography{x}| a"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a % b\nc", "a c"),
        ("a%b\n  c", "ac"),
        ("a\n% b\nc", "a\nc"),
        ("a % b\n\nc", "a \n\nc"),  # the paragraph still ends
        ("a % b\n  \n c", "a \n\n c"),
        (r"a \% b", r"a \% b"),
        (r"a \\% b" + "\nc", r"a \\c"),
        (r"a \\\% b", r"a \\\% b"),
        ("a %", "a"),
        ("a\r\n% b\r\nc", "a\nc"),
        ("a\\begin{comment} b \\end{comment}\nc", "ac"),
        ("a\n\n\n \nb", "a\n\nb"),
    ],
)
def test_comments_go_with_the_line_end_that_tex_skips(source, text):
    assert body(source) == text


@pytest.mark.parametrize(
    "source",
    [
        "\\begin{verbatim}\n% a\n\n\n\\x \\section{b}\n\\end{verbatim}",
        "\\begin{lstlisting}[language=C]\n#define x 1 % 2\n\\end{lstlisting}",
        "\\begin{minted}{python}\n1 % \\x\n\\end{minted}",
        "\\begin{verbatim*} % \\x \\end{verbatim} \\end{verbatim*}",
        r"\verb|% \x|",
        r"\verb*+% \x+ and \verb!\x!",
        "\\begin{verbatim} % never closes \\x",
    ],
)
def test_verbatim_stays_verbatim(source):
    assert body(rf"\newcommand{{\x}}{{no}}{source}") == source


# --- Macros --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"\newcommand{\x}{a}\x", "a"),
        (r"\newcommand\x{a}\x", "a"),
        (r"\newcommand*{\x}{a}\x", "a"),
        (r"\newcommand*\x{a}\x", "a"),
        (r"\newcommand { \x } [1] {a#1}\x{b}", "ab"),
        (r"\providecommand{\x}{a}\x", "a"),
        (r"\DeclareRobustCommand{\x}{a}\x", "a"),
        (r"\def\x{a}\x", "a"),
        (r"\gdef\x{a}\x", "a"),
        (r"\def\x#1#2{#2#1}\x{a}{b}", "ba"),
        (r"\newcommand{\x}{a}\newcommand{\y}{\x\x}\newcommand{\z}{\y\x}\z", "aaa"),
        (r"\newcommand{\y}{\x b}\newcommand{\x}{a}\y", "ab"),  # defined later, known when called
        (r"\newcommand{\x}[1]{a#1}\x{\x{\x b}}", "aaab"),  # in its own argument: no recursion
        (r"\newcommand{\|}{a}b\|", "ba"),  # a sign
        (r"\newcommand{\x}{a}\xy \x y", r"\xy ay"),
        (r"\newcommand{\x}[9]{#9#1}\x123456789", "91"),
        (r"\newcommand{\be}{\begin{eq}}\newcommand{\ee}{\end{eq}}\be a\ee", r"\begin{eq}a\end{eq}"),
        (r"\newcommand{\x}{\vec}\newcommand{\y}[1]{(#1)}\renewcommand{\x}{\y}\x{a}", "(a)"),
        (r"\DeclareMathOperator{\x}{arg}$\x a$", r"$\operatorname{arg}a$"),
        (r"\DeclareMathOperator*{\x}{arg}$\x_a$", r"$\operatorname*{arg}_a$"),
    ],
)
def test_every_way_to_define_a_command(source, text):
    assert body(source) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"\x{a}\x{b}", "(r,a)(r,b)"),
        (r"\x[s]{a}", "(s,a)"),
        (r"\x[]{a}", "(,a)"),
        (r"\x [s] {a}", "(s,a)"),
        (r"\x[{]}]{a}", "({]},a)"),
        (r"\x[\x{b}]{a}", "((r,b),a)"),
        (r"\x ab", "(r,a)b"),
        (r"\x\alpha b", r"(r,\alpha) b"),
        (r"\x[never closed", "(r,[)never closed"),
    ],
)
def test_the_first_argument_may_have_a_default(source, text):
    definition = r"\newcommand{\x}[2][r]{(#1,#2)}"
    if "never" in source:  # without its "]" it cannot be read: it stays
        text = source
    assert body(definition + source) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"\x a", "ba"),  # TeX takes one space for the end of the name
        (r"\x\ a", r"b\ a"),
        (r"\x{} a", "b{} a"),
        ("\\x\na", "ba"),
        ("\\x\n\na", "b\n\na"),  # but not the end of a paragraph
        (r"\y a", r"\eps a"),  # nothing is glued together
        (r"\y1", r"\eps1"),
        (r"\z{a}", r"\eps a"),
        (r"\z\z a", r"\eps\eps a"),
    ],
)
def test_spaces_are_those_of_tex(source, text):
    definitions = r"\newcommand{\x}{b}\newcommand{\y}{\eps}\newcommand{\z}[1]{\eps#1}"
    assert body(definitions + source) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"\def\x{a}\x\def\x{b}\x", "ab"),
        (r"\newcommand{\x}{a}\renewcommand{\x}{b}\x", "b"),
        (r"\newcommand{\x}{a}\providecommand{\x}{b}\x", "a"),
        (r"\newcommand{\x}[1]{\newcommand{\y}[1]{#1##1}}\x{a}\y{b}", "ab"),
        (r"\x\newcommand{\x}{a}\x", r"\x a"),  # TeX would not know it yet
    ],
)
def test_the_last_definition_counts(source, text):
    assert body(source) == text


def test_definitions_of_the_preamble_hold_although_it_goes():
    preamble = r"\newcommand{\x}{a} \x \newcommand{\broken \input{y} { \def\y#1{b#1}"
    assert plain_latex(preamble + r"\begin{document}\section{\x}\y{c}") == r"\section{a}bc"


def test_what_the_preamble_does_with_its_macros_is_left_to_tex():
    source = r"\def\x#1{#1#1}\x\x\begin{document}\section{a}\x b"
    assert plain_latex(source) == r"\section{a}bb"


def test_an_optional_argument_has_a_limit():
    definition = r"\newcommand{\x}[1][b]{#1}"
    fits, too_long = r"\$" * (MAX_OPTIONAL - 1), r"\$" * (MAX_OPTIONAL + 1)
    assert body(rf"{definition}\x[{fits}]") == fits
    assert body(rf"{definition}\x[{too_long}]") == rf"\x[{too_long}]"


@pytest.mark.parametrize(
    "source",
    [
        r"\def\x#1;{a#1}\x b;",  # an argument that ends at other text
        r"\def\x;{a}\x;",
        r"\newcommand{\x}",
        r"\newcommand{\x}[two]{a}",
        r"\newcommand{\x}[12]{a}",
        r"\newcommand{\x}[][b]{a}",
        r"\newcommand{xy}{a}",
        r"\newcommand",
        r"\def",
        r"\undefined{a}",
        "}{ a }{",
    ],
)
def test_what_is_not_understood_stays_as_it_stands(source):
    assert body(source) == source


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"\newcommand{\x}[1]{a#1}{\x}", r"{\x}"),
        (r"\newcommand{\x}[1]{a#1}\x", r"\x"),
        ("\\newcommand{\\x}[1]{a#1}\\x\n\nb", "\\x\n\nb"),
        (r"\newcommand{\x}[1]{a#1}\x{b", "a{b"),  # an unpaired brace is text
        (r"\newcommand{\x}[1]{a#1#2}\x b", "ab#2"),
    ],
)
def test_a_call_that_lacks_an_argument_stays(source, text):
    assert body(source) == text


def test_the_commands_this_module_looks_for_cannot_be_redefined():
    source = r"\renewcommand{\section}{\stop}\def\bibliography#1{#1}\section{a} b \bibliography{c}"
    assert plain_latex(source) == r"\section{a} b"


# --- Macros without end --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"\newcommand{\x}{a\x}\x", r"a\x"),
        (r"\renewcommand{\emph}[1]{\textit{\emph{#1}}}\emph{a}", r"\textit{\emph{a}}"),
        (r"\def\x{a\y}\def\y{b\x}\x \y", r"ab\x ba\y"),
        (r"\def\x#1{\x{#1}}\x{\x{a}}", r"\x{\x{a}}"),
        (r"\newcommand{\x}[1][\x]{#1}\x", r"\x"),
    ],
)
def test_a_command_inside_its_own_body_is_left_there(source, text):
    assert body(source) == text


def growth(levels: int, times: int) -> str:
    names = [rf"\x{'i' * level}" for level in range(levels + 1)]
    return "".join(rf"\def{a}{{{b * times}}}" for a, b in pairwise(names)) + names[0]


@pytest.mark.parametrize(
    "source",
    [
        growth(levels=9, times=20),
        r"\def\x#1{#1#1}\x\x",
        r"\def\x#1{#1#1#1}\x{\x{\x{\x{\x{\x{\x{\x{\x{\x{\x{\x{a}}}}}}}}}}}}",
        r"\newcommand{\x}[1]{a#1}" + r"\x{" * 3000 + "}" * 3000,
        r"\newcommand{\x}[2]{a#1}" + r"\x{" * 3000 + "}" * 3000,  # each lacks its second argument
    ],
)
def test_a_paper_whose_macros_explode_is_refused(source):
    start = time.process_time()
    with pytest.raises(
        ValueError, match=r"macros .* after [\d,]+ tokens there is no end to it.*out"
    ):
        body(source)
    assert time.process_time() - start < 5


def test_doubling_a_few_times_is_fine():
    assert body(growth(levels=5, times=2)).count("x") == 2**5


def test_macros_in_the_bodies_of_each_other_have_a_limit():
    def chain(levels: int) -> str:
        names = [rf"\x{'i' * level}" for level in range(levels)]
        pairs = zip(names, [*names[1:], "end"], strict=True)
        return "".join(rf"\def{a}{{{b}}}" for a, b in pairs) + names[0]

    assert body(chain(MAX_DEPTH)) == "end"
    with pytest.raises(ValueError, match=f"{MAX_DEPTH + 1} macros stand in each other's bodies"):
        body(chain(MAX_DEPTH + 1))


# --- Properties ----------------------------------------------------------------------------------

TEXT = st.text(alphabet="ab. $_^&~\n", max_size=8)
PARTS = st.recursive(
    TEXT | st.sampled_from([r"\alpha ", r"\%", r"\\", "[a]", r"\verb|%|", "% c\n", r"\section{b}"]),
    lambda inner: st.lists(inner, max_size=4).map(lambda parts: f"{{{''.join(parts)}}}"),
    max_leaves=10,
)


@given(st.lists(PARTS, max_size=6).map("".join))
def test_without_macros_a_second_time_changes_nothing(source):
    once = plain_latex(source)
    assert plain_latex(once) == once


@given(st.text(alphabet=r"ab\{}[]#1%*$ " + "\n", max_size=40))
def test_any_soup_is_read(soup):
    assert isinstance(plain_latex(r"\newcommand{\a}[1][b]{#1}\def\b#1#2{#2\a}" + soup), str)


N_ARGS = {"\\zero": 0, "\\one": 1, "\\two": 2, "\\opt": 2}  # \opt: the first is optional


@st.composite
def programs(draw: st.DrawFn) -> tuple[str, str]:
    """A source with macros that call each other, and the text it stands for.

    The text is found by evaluating calls as functions of strings: no tokens, no stack.
    """
    meaning: dict[str, Callable[[str, str], str]] = {}
    definitions = []

    def part(depth: int, n_args: int) -> tuple[str, Callable[[str, str], str]]:
        kinds = ["text"] + ["param"] * (n_args > 0) + ["call"] * (depth > 0 and bool(meaning))
        kind = draw(st.sampled_from(kinds))
        if kind == "text":
            words = draw(st.sampled_from(["k", "m.", "(n)", "{o}"]))
            return words, lambda a, b: words
        if kind == "param":
            number = draw(st.integers(1, n_args))
            return f"#{number}", lambda a, b: (a, b)[number - 1]
        name = draw(st.sampled_from(sorted(meaning)))
        (first, first_of), (second, second_of) = (parts(depth - 1, n_args) for _ in range(2))
        function = meaning[name]
        if name == "\\opt" and draw(st.booleans()):
            return f"{name}{{{second}}}", lambda a, b: function("d", second_of(a, b))
        source = {
            "\\zero": f"{name} ",
            "\\one": f"{name}{{{first}}}",
            "\\two": f"{name}{{{first}}}{{{second}}}",
            "\\opt": f"{name}[{{{first}}}]{{{second}}}",
        }[name]
        wrap = "{%s}" if name == "\\opt" else "%s"
        return source, lambda a, b: function(wrap % first_of(a, b), second_of(a, b))

    def parts(depth: int, n_args: int) -> tuple[str, Callable[[str, str], str]]:
        found = [part(depth, n_args) for _ in range(draw(st.integers(1, 3)))]
        return "".join(s for s, _ in found), lambda a, b: "".join(f(a, b) for _, f in found)

    for name, n_args in N_ARGS.items():
        source, meaning[name] = parts(2, n_args)
        head = "" if not n_args else f"[{n_args}]" + ("[d]" if name == "\\opt" else "")
        definitions.append(rf"\newcommand{{{name}}}{head}{{{source}}}")
    source, function = parts(2, 0)
    return "".join(definitions) + source, function("", "")


@given(programs())
def test_macros_are_functions_of_their_arguments(program):
    source, text = program
    assert body(source) == text.strip()


UNITS = r"""
\a { } {} [ #1 % \ $ \x{ \x[ \o[ \newcommand \newcommand{\y} \def\y#1 \verb \verb| \verb!a \section
\begin{verbatim} \begin{comment} \begin{document}
"""


@pytest.mark.parametrize("unit", [*UNITS.split(), " ", "\n", "% \n", "\n ", "a "])
def test_a_long_paper_of_one_thing_takes_no_time(unit):
    source = (unit * 30_000)[:30_000]
    start = time.process_time()
    with suppress(ValueError) if unit == "\\o[" else nullcontext():  # all look ahead for a "]"
        plain_latex(r"\newcommand{\x}[1]{#1}\newcommand{\o}[1][a]{#1}\section{a}" + source)
    assert time.process_time() - start < 3
