r"""arXiv: from the LaTeX source of a paper to its body, with the author's own macros written out.

Source: Touvron et al. 2023a, sec. 2.1 (arXiv:2302.13971), after Lewkowycz et al. 2022
(arXiv:2206.14858): everything before the first section goes, and the bibliography; comments go; and
macros that authors defined are expanded inline, which makes papers more alike. Shown in
notebooks/07_data.ipynb.
"""

import re
from collections.abc import Collection, Sequence
from itertools import groupby, islice, pairwise
from typing import NamedTuple

MAX_DEPTH = 100  # macros in the bodies of each other
MAX_STEPS = 50_000  # tokens that expansion may handle, besides 20 for each token of the paper
MAX_OPTIONAL = 1000  # tokens of an optional argument: so far an unpaired "[" is looked after

TOKEN = re.compile(
    r"""
    (?P<verbatim> \\begin\{(?P<name>verbatim\*?|Verbatim|lstlisting|minted)\}
                  .*? (?: \\end\{(?P=name)\} | \Z )
                | \\verb\*? (?P<quote>[^\sa-zA-Z*]) [^\n]{0,1000}? (?P=quote) )
  | (?P<comment>  % [^\n]*+ (?: \n [ \t]*+ (?!\n) )?
                | \\begin\{comment\} .*? (?: \\end\{comment\} [ \t]*+ \n? | \Z ) )
  | (?P<edge>     \\(?:begin|end)\{(?:document|thebibliography)\} )
  | (?P<word>     \\[a-zA-Z@]+ )
  | (?P<sign>     \\. )
  | (?P<open>     \{ )
  | (?P<close>    \} )
  | (?P<param>    \#+[1-9] )
  | (?P<space>    \s+ )
  | (?P<text>     [^\\%{}\[\]\#\s]+ | . )
    """,
    re.VERBOSE | re.DOTALL,
)
SECTION = r"\section"
BIBLIOGRAPHY = (r"\bibliography", r"\printbibliography", r"\begin{thebibliography}")
# What this module looks for, and LaTeX needs: a paper may redefine it, but it stays what it is.
FIXED = frozenset({SECTION, *BIBLIOGRAPHY, r"\begin", r"\end"})
NEW = frozenset({r"\newcommand", r"\renewcommand", r"\providecommand", r"\DeclareRobustCommand"})
DEF = frozenset({r"\def", r"\gdef"})
OPERATOR = r"\DeclareMathOperator"
DEFINITIONS = NEW | DEF | {OPERATOR}


class Token(NamedTuple):
    """A piece of LaTeX."""

    text: str
    kind: str  # a group of TOKEN; "open" and "close" are the braces that have a partner
    inside: frozenset[str] = frozenset()  # the macros in whose bodies it was written


class Macro(NamedTuple):
    """What a command stands for."""

    n_args: int
    default: Sequence[Token] | None  # of the first argument, which then is optional
    body: Sequence[Token]


def plain_latex(source: str) -> str:
    r"""The body of a paper: first section to bibliography, macros expanded, without comments.

    The author's commands (\newcommand, \renewcommand, \providecommand, \DeclareRobustCommand, \def,
    \gdef, \DeclareMathOperator), with their arguments and a default for the first, are replaced by
    what they stand for, again and again until none is left. They hold from their definition to the
    end of the paper, those of the preamble too; groups are not looked at. Left as they stand are
    commands whose arguments end at other text (\def\x#1;{...}), calls that lack an argument, and a
    command inside its own body, directly or by way of others: real papers end such a recursion by
    a condition, and only TeX can decide it.

    Everything before the first \section goes, the bibliography (thebibliography, \bibliography,
    \printbibliography) and all after it, and comments with the line end and indent that TeX skips
    with them. A paper without a section begins with its document. Verbatim text stays verbatim.
    One string is one paper: put the files of its \input in before.

    Raises ValueError if expansion comes to no end, as when macros double each other: after
    `MAX_STEPS` tokens and 20 for each of the paper's, or with `MAX_DEPTH` macros in each other.
    """
    tokens = _tokens(source.replace("\r\n", "\n"))
    expander = _Expander(len(tokens))
    begin = _find([r"\begin{document}"], tokens)
    if begin < len(tokens):
        expander.run(tokens[:begin], calls=False)
        tokens = tokens[begin + 1 :]
    tokens = expander.run(tokens)
    tokens = tokens[_find([SECTION], tokens) :] or tokens
    return _join(tokens[: _find([*BIBLIOGRAPHY, r"\end{document}"], tokens)])


def _tokens(source: str) -> list[Token]:
    """The pieces of the source but its comments; a brace without a partner is text."""
    found = [(m[0], str(m.lastgroup)) for m in TOKEN.finditer(source) if m.lastgroup != "comment"]
    opened, alone = list[int](), set[int]()
    for number, (_, kind) in enumerate(found):
        if kind == "open":
            opened.append(number)
        elif kind == "close" and opened:
            opened.pop()
        elif kind == "close":
            alone.add(number)
    alone.update(opened)
    return [Token(text, "text" if i in alone else kind) for i, (text, kind) in enumerate(found)]


def _find(commands: Collection[str], tokens: Sequence[Token]) -> int:
    """Where the first of these commands stands; behind the end if there is none."""
    return next((i for i, token in enumerate(tokens) if token.text in commands), len(tokens))


def _join(tokens: Sequence[Token]) -> str:
    r"""The text of tokens; "\eps" + "x" is "\eps x", and runs of blank lines become one."""
    parts = []
    for is_verbatim, group in groupby(tokens, key=lambda token: token.kind == "verbatim"):
        run = [Token("", "text"), *group]
        text = "".join(
            " " + token.text if last.kind == "word" and _goes_on(token) else token.text
            for last, token in pairwise(run)
        )
        parts.append(text if is_verbatim else re.sub(r"\n(?:[ \t]*+\n)++", "\n\n", text))
    return "".join(parts).strip()


def _goes_on(token: Token) -> bool:
    return re.match("[a-zA-Z@]", token.text) is not None


class _Incomplete(Exception):
    """A definition or a call that cannot be read: it stays as it stands."""


class _Expander:
    """TeX's way: what a macro stands for is put back in front of the input, and read again."""

    def __init__(self, n_tokens: int) -> None:
        # The paper's own style of citing goes without a trace.
        self.macros = {r"\bibliographystyle": Macro(1, None, ())}
        self.rest = list[Token]()  # the input, last token first
        self.taken = list[Token]()  # from it, by the call or definition that is being read
        self.n_tokens = n_tokens
        self.steps = 0

    def run(self, tokens: Sequence[Token], calls: bool = True) -> list[Token]:
        """The tokens without their definitions and, unless `calls` is False, their calls."""
        self.rest = list(tokens[::-1])
        settled = list[Token]()
        while self.rest:
            token = self.rest.pop()
            known = token.text in DEFINITIONS or (calls and token.text in self.macros)
            if not known or token.text in token.inside:
                settled.append(token)
                continue
            self.taken = [token]
            try:
                self._define(token.text) if token.text in DEFINITIONS else self._call(token)
            except _Incomplete:
                settled.append(token)
                self.rest += self.taken[:0:-1]
        return settled

    # --- Definitions and calls -------------------------------------------------------------------

    def _define(self, command: str) -> None:
        if command in DEF:
            name, macro = self._def()
        else:
            star = self._optional_star()
            name = self._name()
            if command == OPERATOR:
                words = (Token("\\operatorname" + star, "word"), Token("{", "open"))
                macro = Macro(0, None, (*words, *self._argument(), Token("}", "close")))
            else:
                macro = self._new_command()
        if name not in FIXED and not (command == r"\providecommand" and name in self.macros):
            self.macros[name] = macro

    def _new_command(self) -> Macro:
        """[number of arguments][default of the first]{body}"""
        number, default = self._optional(), self._optional()
        digits = "".join(token.text for token in number or ()).strip() or "0"
        if not re.fullmatch("[0-9]", digits) or (default is not None and digits == "0"):
            raise _Incomplete
        return Macro(int(digits), default, self._argument())

    def _def(self) -> tuple[str, Macro]:
        r"""\name#1#2{body}; other text between the arguments is not understood."""
        name, n_args = self._name(), 0
        while self._next().text == f"#{n_args + 1}":
            self._take()
            n_args += 1
        if self._next().kind != "open":
            self.macros.pop(name, None)  # from here on it means what we do not know
            raise _Incomplete
        return name, Macro(n_args, None, self._argument())

    def _call(self, token: Token) -> None:
        macro, inside = self.macros[token.text], token.inside | {token.text}
        if len(inside) > MAX_DEPTH:
            self._refuse(f"{len(inside)} macros stand in each other's bodies")
        arguments = list[Sequence[Token]]()
        if macro.default is not None:
            given = self._optional()
            arguments.append(_fill(macro.default, (), inside) if given is None else given)
        while len(arguments) < macro.n_args:
            arguments.append(self._argument())
        if not macro.n_args:
            self._skip_space()  # TeX takes the space behind a command for its end
        body = _fill(macro.body, arguments, inside)
        self._count(len(body))
        self.rest += body[::-1]

    # --- Reading ---------------------------------------------------------------------------------

    def _take(self) -> Token:
        if not self.rest:
            raise _Incomplete
        self._count(1)
        self.taken.append(self.rest.pop())
        return self.taken[-1]

    def _next(self) -> Token:
        return self.rest[-1] if self.rest else Token("", "end")

    def _skip_space(self) -> None:
        if self._next().kind == "space" and self._next().text.count("\n") < 2:
            self._take()

    def _optional_star(self) -> str:
        self._skip_space()
        return self._take().text if self._next().text == "*" else ""

    def _name(self) -> str:
        r"""A command that is to be defined: \name or {\name}."""
        name = [token for token in self._argument() if token.kind != "space"]
        if len(name) != 1 or name[0].kind not in ("word", "sign"):
            raise _Incomplete
        return name[0].text

    def _argument(self) -> list[Token]:
        """A group without its braces, or a single token: of text, one character."""
        self._skip_space()
        token = self._take()
        if token.kind == "text":
            first, rest = token._replace(text=token.text[0]), token._replace(text=token.text[1:])
            self.taken[-1] = first
            self.rest += [rest] if rest.text else []
            return [first]
        if token.kind != "open":
            if token.kind in ("close", "space"):  # the group around, or the paragraph, is over
                raise _Incomplete
            return [token]
        return self._until("}")

    def _optional(self) -> list[Token] | None:
        """[...] without its brackets, or None if none follows."""
        self._skip_space()
        if self._next().text != "[":
            return None
        self._take()
        return self._until("]", MAX_OPTIONAL)

    def _until(self, end: str, limit: int | None = None) -> list[Token]:
        """What comes before the closing brace, or bracket, that belongs to what was opened."""
        found, depth, token = list[Token](), 0, self._next()
        for token in islice(reversed(self.rest), limit):
            depth += (token.kind == "open") - (token.kind == "close")
            if depth < 0 or (depth == 0 and token.text == end == "]"):
                break
            found.append(token)
        self._count(len(found) + 1)
        if token.text != end or len(found) == limit:
            raise _Incomplete
        del self.rest[-len(found) - 1 :]
        self.taken += [*found, token]
        return found

    def _count(self, n_tokens: int) -> None:
        self.steps += n_tokens
        if self.steps > MAX_STEPS + 20 * self.n_tokens:
            self._refuse(f"after {self.steps:,} tokens there is no end to it")

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"the macros of this paper cannot be written out: {what}. The paper has "
            f"{self.n_tokens:,} tokens, and macros that double each other would fill the memory. "
            f"Leave it out, or define them otherwise."
        )


def _fill(
    body: Sequence[Token], arguments: Sequence[Sequence[Token]], inside: frozenset[str]
) -> list[Token]:
    """A macro's body in a call: for #1 the argument, for ##1 the #1 of an inner definition."""
    filled = list[Token]()
    for text, kind, within in body:
        n_signs = text.count("#") if kind == "param" else 0
        if n_signs == 1 and int(text[-1]) <= len(arguments):
            filled += arguments[int(text[-1]) - 1]
        else:
            text = text[n_signs // 2 :] if n_signs > 1 else text
            filled.append(Token(text, kind, within | inside if within else inside))
    return filled
