"""Wikipedia: from wikitext to the words of an article.

Links, files, comments, references, templates, tables and formatting go; what a reader reads as text
stays. Nothing is looked up, so what a template would have written is lost with it.

Source: Touvron et al. 2023a, sec. 2.1 (arXiv:2302.13971): dumps of June to August 2022, of which
"hyperlinks, comments and other formatting boilerplate" were removed. Shown in
notebooks/07_data.ipynb.
"""

import re
from html import unescape

from minillama.data.markup import cut_spans

# The 20 languages of LLaMA 1, in Latin or Cyrillic script: no Arabic, no Chinese, no Japanese.
# fmt: off
LANGUAGES = (
    "bg", "ca", "cs", "da", "de", "en", "es", "fr", "hr", "hu",
    "it", "nl", "pl", "pt", "ro", "ru", "sl", "sr", "sv", "uk",
)
# fmt: on

# What files and categories are called in these languages; English works in all of them.
NAMESPACE = re.compile(
    "file|image|media|category|Файл|Картинка|Категория|fitxer|imatge|categoria|soubor|kategorie"
    "|fil|billede|kategori|datei|bild|archivo|imagen|categoría|fichier|catégorie|datoteka|slika"
    "|kategorija|fájl|kép|kategória|immagine|bestand|afbeelding|categorie|plik|grafika|kategoria"
    "|ficheiro|arquivo|imagem|fișier|fişier|imagine|Изображение|Датотека|Слика|Категорија"
    "|Зображення|Категорія",
    re.IGNORECASE,
)
LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*|simple")  # the prefix of a link to its Wikipedia

MAX_DEPTH = 100  # of templates, links and tables in each other; MediaWiki itself stops at 40

# Their content is shown as it stands: no mark-up is looked for in it.
LITERAL = ("nowiki", "pre", "math", "syntaxhighlight", "source")
# Their content is no part of the running text.
ASIDE = ("ref", "gallery", "timeline", "imagemap", "score", "templatestyles")

NESTED = re.compile(r"\{{2,}|\}{2,}|\[\[|\]{2,}|^[ \t:]*\{\|(?!\})|^[ \t]*\|\}(?!\})", re.MULTILINE)
CLOSES = {"}}": "{{", "]]": "[[", "|}": "{|"}
EXTERNAL_LINK = re.compile(
    r"\[(?:(?:(?:https?|ftp):)?//|mailto:)[^\s\[\]<>]*[ \t]*([^\[\]\n]*)\]", re.IGNORECASE
)
BARE_LINK = re.compile(r"\bhttps?://[^\s\[\]<>{}|\"]+", re.IGNORECASE)
REDIRECT = re.compile(r"\s*#[^\W\d_]+[ \t]*:?[ \t]*\[\[[^\[\]\n]*\]\]")
LINE_BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
MAGIC_WORD = re.compile(r"__[^\W_][^\W]{1,40}?__")
EMPTY_BRACKETS = re.compile(r"[ \t]?\([\s,;]{0,20}\)")  # a template stood in them


def plain_text(wikitext: str) -> str:
    """The words of an article: of each link those that are shown, and of everything else but text.

    Out go comments, references, templates, tables, files, categories and links to other languages,
    galleries, magic words, HTML tags and bare addresses; of bold, lists and headings the signs. A
    heading with nothing left below it goes, too. The content of <nowiki>, <pre>, <math> and code
    stays to the letter. A redirect page has no words: "".

    Mark-up that never closes is text, also where it stands inside of mark-up that does. Linear in
    the length of the page; openings nested deeper than `MAX_DEPTH` are text.
    """
    if REDIRECT.match(wikitext):
        return ""
    text = cut_spans(wikitext, "<!--", "-->")
    for name in LITERAL:
        text = _keep_literally(text, name)
    text = re.sub(rf"(?i)<(?:{'|'.join(ASIDE)})\b[^<>]*/>", "", text)
    for name in ASIDE:
        text = cut_spans(text, rf"<{name}\b[^<>]*>", rf"</{name}\s*>")
    text = EXTERNAL_LINK.sub(r"\1", text)
    text = _unnest(text)
    text = BARE_LINK.sub("", text)
    text = MAGIC_WORD.sub(lambda word: "" if word[0].isupper() else word[0], text)
    text = re.sub("'{2,}", _apostrophes, text)
    text = re.sub(r"-\{|\}-", "", text)  # Serbian: -{what no converter of scripts may touch}-
    text = TAG.sub("", LINE_BREAK.sub("\n", text))
    text = EMPTY_BRACKETS.sub("", text)
    return unescape(_lines(text)).replace("\xa0", " ").strip()


def _keep_literally(text: str, name: str) -> str:
    """Write every sign in <name> as an entity, so that it means nothing until the very end."""
    closing = f"</{name}>"
    parts = re.split(rf"(?i)<{name}(?:\s[^<>]*)?>", text)
    for number, part in enumerate(parts[1:], start=1):
        inside, found, outside = part.partition(closing)
        if found:
            parts[number] = re.sub(r"\W|_", lambda c: f"&#{ord(c[0])};", inside) + outside
    return "".join(parts)


def _unnest(text: str) -> str:
    """Templates and tables out, links replaced by what they show, from the inside out."""
    stack: list[tuple[str, list[str]]] = [("", [])]  # what was opened, and what came after it
    n_open = dict.fromkeys(CLOSES.values(), 0)
    position = 0
    for match in NESTED.finditer(text):
        stack[-1][1].append(text[position : match.start()])
        position = match.end()
        sign = match[0].strip(" \t:")
        for mark in _marks(sign):
            opening = CLOSES.get(mark)
            if mark in n_open and len(stack) <= MAX_DEPTH:
                n_open[mark] += 1
                stack.append((mark, []))
            elif opening and n_open[opening]:
                while stack[-1][0] != opening:  # it never closes: it is text
                    _leave_open(stack, n_open)
                content = "".join(stack.pop()[1])
                n_open[opening] -= 1
                stack[-1][1].append(_shown(content) if opening == "[[" else "")
            else:
                stack[-1][1].append(mark)
    stack[-1][1].append(text[position:])
    while len(stack) > 1:
        _leave_open(stack, n_open)
    return "".join(stack[0][1])


def _leave_open(stack: list[tuple[str, list[str]]], n_open: dict[str, int]) -> None:
    opening, parts = stack.pop()
    n_open[opening] -= 1
    stack[-1][1].append(opening)
    stack[-1][1].extend(parts)


def _marks(sign: str) -> list[str]:
    """A run of brackets as pairs: of an odd one, the single bracket belongs to the inside."""
    if sign[0] not in "{}]" or sign in ("{|", "|}"):
        return [sign]
    pairs, single = [sign[:2]] * (len(sign) // 2), [sign[0]] * (len(sign) % 2)
    return pairs + single if sign[0] == "{" else single + pairs


def _shown(link: str) -> str:
    """What a reader sees of [[link]]."""
    target, *labels = link.split("|")
    label = labels[-1] if labels else ""
    if "\n" in target:
        return f"[[{link}]]"  # an opening and a closing that never met: text
    prefix = target.partition(":")[0].strip() if ":" in target else ""
    if NAMESPACE.fullmatch(prefix) or (LANGUAGE.fullmatch(prefix) and not label):
        return ""
    return label if label.strip() else target.strip().lstrip(":")


def _apostrophes(run: re.Match[str]) -> str:
    """What italics (2), bold (3) or both (5) leave of a run: l''''Elbe''' is 1 + 3."""
    return "'" if len(run[0]) == 4 else run[0][5:]


def _lines(text: str) -> str:
    """Lists and headings without their signs, headings over nothing out, one blank line at most."""
    kept = [""]
    above: list[tuple[int, str]] = []  # headings with no words below them yet, their levels rising
    for line in text.split("\n"):
        line = re.sub(r"[ \t]+", " ", line).strip()
        if title := _heading(line):
            level = min(len(line) - len(line.lstrip("=")), 6)
            above = [(upper, words) for upper, words in above if upper < level] + [(level, title)]
            continue
        line = "" if line.startswith("----") else line.lstrip("*#:; ")
        if line and above:
            kept += [*([""] if kept[-1] else []), *(words for _, words in above)]
            above = []
        if line or kept[-1]:
            kept.append(line)
    return "\n".join(kept)


def _heading(line: str) -> str:
    return line.strip("= ") if line.startswith("=") and line.endswith("=") else ""
