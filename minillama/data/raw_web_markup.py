"""The raw web's sources with mark-up: code, wikitext, LaTeX and HTML around the toy world's tales.

Each document says in its meta what was planted, as `minillama.data.raw_web` has it. What is
expected afterwards is composed beside the dirt, never by the rules themselves.

Shown in notebooks/07_data.ipynb.
"""

import json
import re
from collections.abc import Callable, Iterator
from html import escape
from random import Random
from typing import Any

from minillama.data.documents import Document
from minillama.data.heuristics import sentences
from minillama.data.raw_web_pages import SITES, fresh_stories, pick, shuffled
from minillama.data.tales import ANIMALS, COLOURS, HOMES, PLACES, THINGS, TREASURES

NOUN = re.compile(rf"\b({'|'.join((*ANIMALS, *HOMES, *PLACES, *THINGS, *TREASURES))})\b")

# --- GitHub: programs that print tales -----------------------------------------------------------

LICENCES = ("apache-2.0", "bsd-2-clause", "bsd-3-clause", "mit")
OTHER_LICENCES = ("gpl-3.0", "agpl-3.0", "lgpl-2.1", "mpl-2.0", "cc0-1.0", "")
NOTICE = (
    "Copyright {year} The Tellers of Tales",
    "",
    "Licensed under the Apache License, Version 2.0; you may not use this file",
    "except in compliance with the License.",
)


def _python(story: str) -> str:
    lines = "".join(f"    {json.dumps(sentence)},\n" for sentence in sentences(story))
    return f"STORY = [\n{lines}]\n\nfor sentence in STORY:\n    print(sentence)\n"


def _javascript(story: str) -> str:
    lines = "".join(f"  {json.dumps(sentence)},\n" for sentence in sentences(story))
    return f"const story = [\n{lines}];\n\nstory.forEach((sentence) => console.log(sentence));\n"


def _c(story: str) -> str:
    lines = "".join(f"    puts({json.dumps(sentence)});\n" for sentence in sentences(story))
    return f"#include <stdio.h>\n\nint main(void)\n{{\n{lines}    return 0;\n}}\n"


def _sql(story: str) -> str:
    values = (f"  ('{sentence.replace(chr(39), chr(39) * 2)}')" for sentence in sentences(story))
    return "INSERT INTO story (sentence) VALUES\n" + ",\n".join(values) + ";\n"


LANGUAGES: dict[str, tuple[Callable[[str], str], str]] = {  # how to print a tale, how to comment
    "py": (_python, "# {}"),
    "js": (_javascript, "// {}"),
    "c": (_c, " * {}"),
    "sql": (_sql, "-- {}"),
}


def github(rng: Random) -> Iterator[Document]:
    """Files of many repositories: small programs that print a tale, and what else lies about."""
    stories, files = fresh_stories(rng), list[str]()
    counts = {"good": 30, "licence header": 8, "shebang": 4, "other licence": 8, "minified": 5}
    counts |= {"data": 5, "drawing": 5, "copy": 5, "copy with a header": 5}
    for number, kind in enumerate(_kinds(rng, counts)):
        suffix = "py" if kind == "shebang" else pick(rng, list(LANGUAGES))
        write, comment = LANGUAGES[suffix]
        code, header = write(next(stories)), _header(rng, comment)
        fate: dict[str, Any] = {"licence": pick(rng, LICENCES), "path": f"story_{number}.{suffix}"}
        if kind == "good":
            files.append(code)
        elif kind == "licence header":
            code, fate["expected"] = f"{header}\n{code}", code
        elif kind == "shebang":
            top = "#!/usr/bin/env python3\n"
            code, fate["expected"] = f"{top}{header}\n{code}", f"{top}{code}"
        else:
            fate["keep"] = False
        if kind == "other licence":
            fate["licence"] = pick(rng, OTHER_LICENCES)
        elif kind == "minified":
            fate["path"], code = f"story_{number}.min.js", ""
            while len(code) <= 1000:
                code += f"console.log({json.dumps(next(stories))});"
        elif kind == "data":
            rows = (" ".join(f"{rng.random():.6f}" for _ in range(20)) for _ in range(10))
            fate["path"], code = f"story_{number}.csv", "\n".join(rows)
        elif kind == "drawing":
            rows = ("".join(pick(rng, " |/\\_-+") for _ in range(60)) for _ in range(12))
            fate["path"], code = f"story_{number}.txt", "\n".join(rows)
        elif kind == "copy":
            code = pick(rng, files)
        elif kind == "copy with a header":
            original = pick(rng, files)
            code = f"{_header(rng, '// {}' if original.startswith('#') else '-- {}')}\n{original}"
        yield _plant(code, kind, **fate)


def _header(rng: Random, comment: str) -> str:
    notice = (line.format(year=1990 + int(rng.random() * 30)) for line in NOTICE)
    lines = "".join(f"{comment.format(line).rstrip()}\n" for line in notice)
    return f"/*\n{lines} */\n" if comment.startswith(" *") else lines


# --- Wikipedia: articles about tales -------------------------------------------------------------

# A sentence with two {links} in some of the languages, and words for them.
FOREIGN_ARTICLES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "de": (
        "In der {0} am Fluss lebte einst ein {1}, den alle Kinder kannten.",
        ("Mühle", "Burg", "Kirche"),
        ("Fuchs", "Bär", "Hund"),
    ),
    "es": (
        "Junto al río, en la {0}, vivía un {1} que todos los niños conocían.",
        ("torre", "granja", "iglesia"),
        ("zorro", "oso", "perro"),
    ),
    "fr": (
        "Près de la rivière, dans la {0}, vivait un {1} que tous les enfants aimaient.",
        ("ferme", "tour", "maison"),
        ("renard", "chien", "lièvre"),
    ),
    "it": (
        "Nella {0} vicino al fiume viveva un {1} amico di tutti i bambini.",
        ("torre", "fattoria", "chiesa"),
        ("cane", "gatto", "lupo"),
    ),
    "pl": (
        "W miejscu zwanym {0} nad rzeką mieszkał {1}, którego znały wszystkie dzieci.",
        ("Młyn", "Zamek", "Most"),
        ("lis", "pies", "zając"),
    ),
    "ru": (
        "У реки стояла {0}, а рядом жил {1}, которого знали все дети.",
        ("башня", "ферма", "церковь"),
        ("медведь", "заяц", "пёс"),
    ),
    "sv": (
        "I byns {0} vid ån bodde en {1} som alla barn kände.",
        ("kvarn", "kyrka", "borg"),
        ("räv", "björn", "hund"),
    ),
}
JAPANESE = "川のそばの[[村]]には、'''年老いた熊'''と子どもたちが住んでいた。"


def _linked(story: str) -> str:
    places = list(NOUN.finditer(story))[:3]
    for number, noun in reversed(list(enumerate(places))):
        word = noun[0]
        link = (f"[[{word}]]", f"[[The {word}|{word}]]", f"[https://example.org {word}]")
        story = story[: noun.start()] + link[number] + story[noun.end() :]
    return story


def _referenced(story: str) -> str:
    first, *rest = sentences(story)
    note = '<ref name="a">{{cite book|title=Tales|year={{start date|1900}}}}</ref>'
    return " ".join([f"{first}{note}", *(f'{sentence}<ref name="a" />' for sentence in rest)])


# Each way to mark up a tale leaves the tale, once it is taken off.
MARKUP: dict[str, Callable[[str], str]] = {
    "links": _linked,
    "references": _referenced,
    "templates": lambda story: (
        "{{Infobox tale\n| world = [[toy world]]\n| length = {{small|{{short|1}}}}\n}}\n"
        f"{story}{{{{citation needed|date={{{{today}}}}}}}}"
    ),
    "table": lambda story: (
        f'{story}\n{{| class="wikitable"\n! Who !! [[Where]]\n|-\n| {{{{hero}}}} || there\n|}}\n'
    ),
    "files": lambda story: (
        f"[[File:Tale.jpg|thumb|A [[tale]] of {{{{small|old}}}} times]]\n{story}\n"
        "<gallery>\nTale.png|The [[end]]\n</gallery>"
    ),
    "comments": lambda story: f"<!-- Please\n[[improve]] me. -->{story}<!-- {{{{stub}}}} -->",
    "formatting": lambda story: re.sub(
        NOUN, lambda noun: f"'''''{noun[0]}'''''<small></small>", story, count=2
    ),
    "list": lambda story: f"* {story}",
    "categories": lambda story: (
        f"__NOTOC__{story}\n\n[[Category:Tales]]\n[[Kategorie:Märchen|T]]\n[[de:Märchen]]"
    ),
    "headings": lambda story: (
        f"{story}\n== See also ==\n{{{{portal}}}}\n=== Notes ===\n<references />"
    ),
    "entities": lambda story: f"<p>{escape(story)}</p>&nbsp;",
    "never closed": lambda story: f"<div>{story}<ref><small>",
}


def wikipedia(rng: Random) -> Iterator[Document]:
    """Articles that tell a tale, marked up in every way; some in other languages."""
    stories = fresh_stories(rng)
    counts = {"good": 20, "another language": 20, "no such language": 5, "redirect": 4}
    for kind in _kinds(rng, counts | dict.fromkeys(MARKUP, 4)):
        story = next(stories)
        if kind == "good":
            yield _plant(story, kind, language="en")
        elif kind == "another language":
            language = pick(rng, sorted(FOREIGN_ARTICLES))
            sentence, *words = FOREIGN_ARTICLES[language]
            chosen = [pick(rng, options) for options in words]
            links = f"[[{chosen[0]}]]", f"'''[[{chosen[0]}|{chosen[1]}]]'''"
            text = f"{sentence.format(*links)} {sentence.format(*links)}"
            expected = f"{sentence.format(*chosen)} {sentence.format(*chosen)}"
            yield _plant(text, kind, language=language, expected=expected)
        elif kind == "no such language":
            yield _plant(JAPANESE, kind, keep=False, language="ja")
        elif kind == "redirect":
            yield _plant("#REDIRECT [[The tale]]", kind, keep=False, language="en")
        else:
            yield _plant(MARKUP[kind](story), kind, language="en", expected=story)


# --- arXiv: papers about tales -------------------------------------------------------------------

FRONT = "\\title{Tales}\n\\maketitle\n\\begin{abstract}\nThree tales.\n\\end{abstract}\n\n"
BIBLIOGRAPHIES = (
    "\\bibliographystyle{plain}\n\\bibliography{tales}\n\\appendix\n\\section{More}\nNothing.\n",
    "\\printbibliography\n",
    "\\begin{thebibliography}{9}\n\\bibitem{a} Ada. Tales.\n\\end{thebibliography}\n",
)
TWICE = re.compile(rf"\b({'|'.join(COLOURS)}), \1 (\w+)")  # "a red, red kite"
ONE_DAY = re.compile(r"\b([Oo])ne (\w+), one (fine|cold) \2")  # "one Sunday, one fine Sunday"
EXPLOSION = "".join(
    f"\\newcommand{{\\tale{a}}}{{{10 * b}}}\n"
    for a, b in zip("abcdefgh", map(r"\tale{}".format, "bcdefghi"), strict=True)
)
CODE = "\n\n\\begin{verbatim}\n% \\twice{red}{kite}\n\\end{verbatim}"

# For each kind of paper the author's definitions, and the body written with their help.
PAPERS: dict[str, tuple[str, Callable[[str], str]]] = {
    "preamble": (r"\newcommand{\unused}[1]{#1}", lambda body: body),
    "names": (
        r"\newcommand{\tale}{Tale}\def\chapter{\section}",
        lambda body: body.replace("Tale}", r"\tale}").replace(r"\section", r"\chapter"),
    ),
    "arguments": (
        r"\newcommand{\twice}[2]{#1, #1 #2}",
        lambda body: TWICE.sub(r"\\twice{\1}{\2}", body),
    ),
    "default": (
        r"\newcommand*\oneday[3][fine]{#2ne #3, one #1 #3}",
        lambda body: ONE_DAY.sub(r"\\oneday[\3]{\1}{\2}", body).replace("[fine]", ""),
    ),
    "macros in macros": (
        r"\def\twice#1#2{#1, \pair{#1}{#2}}\providecommand\pair[2]{#1 \same{#2}}\gdef\same#1{#1}",
        lambda body: TWICE.sub(r"\\same{\\twice{\1}{\\same{\2}}}", body),
    ),
    "defined late": (
        r"\newcommand{\twice}[2]{no}",
        lambda body: (
            "\\renewcommand{\\twice}[2]{#1, #1 #2}\n" + TWICE.sub(r"\\twice {\1} {\2}", body)
        ),
    ),
    "comments": ("", lambda body: body.replace("\n\n", "% fine\n\n% TODO: 100\\% of it\n  ")),
}


def arxiv(rng: Random) -> Iterator[Document]:
    """Papers of three tales, a section each, in the LaTeX of authors who define their own words."""
    stories = fresh_stories(rng)
    counts = dict.fromkeys(PAPERS, 6) | {"verbatim": 4, "own body": 4, "explosion": 3}
    for kind in _kinds(rng, counts):
        tales = (f"\\section{{The {place} Tale}}\n\n{next(stories)}" for place in PLACES[:3])
        expected = "\n\n".join(tales)
        definitions, write = PAPERS.get(kind, ("", str))
        body, keep = write(expected), kind != "explosion"
        if kind == "verbatim":
            definitions, body, expected = PAPERS["arguments"][0], body + CODE, expected + CODE
        elif kind == "own body":
            definitions = r"\renewcommand{\emph}[1]{\emph{#1}}"
            body = expected = NOUN.sub(r"\\emph{\1}", body)
        elif kind == "explosion":
            definitions, body = EXPLOSION, f"{body}\n\n\\talea"
        paper = (
            f"\\documentclass{{article}}  % two columns\n{definitions}\n\\begin{{document}}\n"
            f"{FRONT}{body}\n\n{pick(rng, BIBLIOGRAPHIES)}\\end{{document}}\n"
        )
        yield _plant(paper, kind, keep, expected if keep else None)


# --- Stack Exchange: who knows how it ends? ------------------------------------------------------

SMALL_SITES = ("attic", "cellar")


def _paragraph(text: str) -> str:
    return f"<p>{text}</p>\n"


# Each way to write a text in HTML; read again, it is the same.
HTML: dict[str, Callable[[str], str]] = {
    "paragraph": _paragraph,
    "inline tags": lambda text: _paragraph(
        NOUN.sub(r'<a href="https://example.org/?q=\1&amp;n=1" title="a > b"><b>\1</b></a>', text)
    ),
    "entities": lambda text: _paragraph(re.sub("[aeT]", lambda c: f"&#{ord(c[0])};", escape(text))),
    "white space": lambda text: _paragraph(text.replace(" ", "\n   ")),
    "script": lambda text: (
        f"<script>if (a < b) alert('<p>')</script>{_paragraph(text)}<style>p {{ }}</style>"
    ),
    "comment": lambda text: f"<!-- <p>first</p> -->{_paragraph(text)}<!-- last -->",
    "never closed": lambda text: f"<div><p>{text}<b><script>",
}


def stackexchange(rng: Random) -> Iterator[Document]:
    """Threads: the question is how a tale goes on, one answer knows, and one tells another tale."""
    stories = fresh_stories(rng)
    counts = dict.fromkeys(HTML, 6) | {"code": 5, "no answer": 4, "small site": 6}
    for kind in _kinds(rng, counts):
        told, other = sentences(next(stories)), sentences(next(stories))
        question, ending = " ".join(told[:5]), " ".join(told[5:])
        title, write = f"What came after {told[0][:-1]}?", HTML.get(kind, _paragraph)
        score = 1 + int(rng.random() * 50)
        answers = [[score, write(ending)], [score - 1, write(" ".join(other[5:]))]]
        expected = f"Q: {title}\n{question}\n\nA: {ending}\n\nA: {' '.join(other[5:])}"
        if kind == "code":
            code = _python(ending)
            answers[0][1] = f"<p>Run it:</p>\n<pre><code>{escape(code)}</code></pre>"
            expected = expected.replace(f"A: {ending}", f"A: Run it:\n{code.rstrip()}")
        elif kind == "no answer":
            answers, expected = [], expected.partition("\n\nA: ")[0]
        keep = kind != "small site"
        yield _plant(
            write(question),
            kind,
            keep,
            expected if keep else None,
            title=title,
            site=pick(rng, sorted(SITES) if keep else SMALL_SITES),
            answers=shuffled(rng, answers),
        )


def _kinds(rng: Random, counts: dict[str, int]) -> list[str]:
    """Each kind as often as it counts, in an order of chance; but the first of all comes first."""
    first, *rest = (kind for kind, n in counts.items() for _ in range(n))
    return [first, *shuffled(rng, rest)]


def _plant(
    text: str, planted: str, keep: bool = True, expected: str | None = None, **known: Any
) -> Document:
    fate = {"planted": planted, "keep": keep}
    return Document(text, meta=known | fate | ({} if expected is None else {"expected": expected}))
