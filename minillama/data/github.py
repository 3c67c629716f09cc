"""GitHub: which code may be taken, which files are code, and what stands above it.

Source: Touvron et al. 2023a, sec. 2.1 (arXiv:2302.13971). The same file twice is a matter of
`minillama.data.duplicates`. Shown in notebooks/07_data.ipynb.
"""

import re

# The paper says "Apache, BSD and MIT": these are the identifiers under which its source, the public
# dump of GitHub on BigQuery, lists them.
PERMISSIVE = frozenset({"apache-2.0", "bsd-2-clause", "bsd-3-clause", "mit"})

# The paper names its heuristics ("line length, proportion of alphanumeric characters") without
# their thresholds. The first two are those of Chen et al. 2021, sec. 3.1 (arXiv:2107.03374), the
# third is that of Li et al. 2023, sec. 3 (arXiv:2305.06161).
LONGEST_LINE = 1000  # characters
MEAN_LINE = 100  # characters
ALPHANUMERIC = 0.25  # of all characters

# A sentence of each licence that no other has: lower case, white space squeezed, no commas.
MARKS = {
    "Apache-2.0": "apache license version 2.0",
    "MIT": "permission is hereby granted free of charge to any person obtaining a copy of this "
    "software and associated documentation files",
    "BSD-2-Clause": "redistribution and use in source and binary forms with or without "
    "modification are permitted",
}
NO_ENDORSEMENT = re.compile(r"\bneither the names?\b|\bmay not be used to endorse\b")
ADVERTISING = "all advertising materials mentioning features"
COPYLEFT = re.compile(
    r"\bgnu (affero |lesser |library )?general public|\bmozilla public|\beclipse public"
)


def licence(text: str) -> str | None:
    """The SPDX identifier of a LICENSE file's text, or None if it is none that may be taken.

    Apache-2.0, MIT, BSD-2-Clause and BSD-3-Clause are recognised by their own sentences, whatever
    the line breaks. A text that speaks of a copyleft licence, or of two of the four, is None: what
    holds for which file is for a lawyer to say.
    """
    words = re.sub(r"[\s,]+", " ", text.lower())
    found = [name for name, mark in MARKS.items() if mark in words]
    if len(found) != 1 or COPYLEFT.search(words) or ADVERTISING in words:
        return None
    if found == ["BSD-2-Clause"] and NO_ENDORSEMENT.search(words):
        return "BSD-3-Clause"
    return found[0]


def is_permissive(spdx: str) -> bool:
    """May code under this licence be taken? An SPDX expression of Apache, BSD and MIT, else not.

    Of licences joined by OR one suffices, joined by AND all are needed. Anything else, brackets and
    no licence at all included, is not permissive: no licence means all rights reserved.
    """
    return any(
        all(term.strip() in PERMISSIVE for term in option.split(" and "))
        for option in spdx.lower().split(" or ")
    )


def has_short_lines(code: str, longest: int = LONGEST_LINE, mean: float | int = MEAN_LINE) -> bool:
    """Is no line longer than `longest`, and the average one no longer than `mean` characters?

    What fails was written by a program: minified scripts, data in the clothes of code. A file
    without a line has none too long.
    """
    lengths = [len(line) for line in code.splitlines()] or [0]
    return max(lengths) <= longest and sum(lengths) <= mean * len(lengths)


def is_alphanumeric(code: str, share: float = ALPHANUMERIC) -> bool:
    """Are letters and digits at least this share of all characters, white space included?

    What fails says little in words: tables of symbols, drawings. An empty file fails.
    """
    return sum(map(str.isalnum, code)) >= share * max(len(code), 1)


# --- Headers -------------------------------------------------------------------------------------

# Lines that a machine reads although they look like comments; they stay where they were, on top.
MAGIC = re.compile(
    r"\ufeff?(?:#!|<\?xml\b|<\?php\b|<!doctype\b)"
    r"|[ \t]*#.*?(?:coding[:=][ \t]*[-\w.]|frozen_string_literal:)",
    re.IGNORECASE,
)
BLANK = re.compile(r"[ \t\r\n]+")
# One comment: a run of lines with the same marker, or a block that ends its line. A marker must be
# set apart, for "#define", "--x" and "//go:build" are code; a block that holds its own opening may
# be nested, and is left alone.
LINES = (r"#[#*=~-]*", r"//[/*=~-]*(?![ \t]*\+build)", "--[=~-]*", ";;+")
BLOCKS = (
    (r"/\*", r"\*/"),
    (r"<!--(?!\[)", "-->"),  # <!--[if IE]> is read by a machine
    (r"\(\*(?!\$)", r"\*\)"),
    (r"\{-(?!#)", r"-\}"),  # as is {-# LANGUAGE
)
COMMENTS = [
    *(re.compile(rf"(?:[ \t]*{marker}(?:[ \t\r][^\n]*)?(?:\n|\Z))+") for marker in LINES),
    *(re.compile(rf"(?s:{a}(?:(?!{a}|{b}).)*{b}[ \t\r]*(?:\n|\Z))") for a, b in BLOCKS),
]
# "# define", "# include": with white space after the "#" still C, and no comment.
DIRECTIVE = re.compile(
    r"^[ \t]*#[ \t]*(?:include[ \t]*[<\"]|define[ \t]+[A-Z_]|if(?:n?def)[ \t]+\w|pragma[ \t]"
    r"|if[ \t]+(?:defined|[!(\d])|endif\b)",
    re.MULTILINE,
)
BOILERPLATE = re.compile(
    r"copyright[ \t]*(?:\(c\)|©|:|\d|by\b|notice\b|the\b)|©[ \t]*\d|\(c\)[ \t]*\d{4}"
    r"|all rights reserved|spdx-license-identifier|licensed (?:under|to)\b|permission is hereby"
    r"|redistribution and use in|(?:general public|apache|mit|bsd) licen[sc]e",
    re.IGNORECASE,
)


def strip_header(code: str) -> str:
    """The code without the licence and copyright comments above its first line of code.

    Each comment up there is looked at: it goes, whole, if it speaks of copyright or of a licence,
    and stays if it does not. A shebang, an encoding line, <?php, <?xml and <!DOCTYPE stay on top.
    Comments are known by their regular expressions: lines of ``# // -- ;;`` and blocks of
    ``/* */  <!-- -->  (* *)  {- -}``. Where one of these may be code, it is taken for code: no line
    of code is ever removed, and a header in a docstring, which a program can read, stays.
    """
    lines = code.splitlines(keepends=True)[:2]
    magic = [line for line in lines if MAGIC.match(line)]
    plain = "".join(line for line in lines if not MAGIC.match(line))
    rest = plain + code[sum(map(len, lines)) :]
    comments = COMMENTS[1:] if DIRECTIVE.search(code) else COMMENTS
    kept, position, found = [], 0, False
    while comment := _match([BLANK, *comments], rest, position):
        position = comment.end()
        if BOILERPLATE.search(comment[0]):
            found = True
        else:
            kept.append(comment[0])
    if not found:
        return code
    return "".join(magic) + ("".join(kept) + rest[position:]).lstrip("\r\n")


def _match(patterns: list[re.Pattern[str]], text: str, position: int) -> re.Match[str] | None:
    found = (pattern.match(text, position) for pattern in patterns)
    return next(filter(None, found), None)
