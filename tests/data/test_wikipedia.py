import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillama.data.wikipedia import LANGUAGES, MAX_DEPTH, plain_text


def test_twenty_languages_and_no_japanese():
    assert len(set(LANGUAGES)) == len(LANGUAGES) == 20
    assert sorted(LANGUAGES) == list(LANGUAGES)
    assert "ja" not in LANGUAGES


def test_an_article_by_hand():
    article = """\
{{Infobox town
| name = Red Mill
| image = [[File:Mill.jpg|thumb|A {{small|red}} mill]]
}}<!-- please
update -->
'''Red Mill''' ([[English language|English]]: {{IPA|x}}) is a [[town]] by the ''river''.<ref>{{cite
web|url=https://a.b/c|title=Mills}}</ref> It has {{convert|3|km}} 3&nbsp;kites.<ref name="a" />

[[Datei:Mühle.jpg|mini|Die [[Mühle]] von [https://a.b Leo]]]
== History ==
=== Early ===
* A [https://a.b/c?d=e mill] was built.
*# Then it broke.
== See also ==
{{Portal}}
== Notes ==
<references />
{| class="wikitable"
! Kite !! Colour
|-
| {{flag|x}} || red
|}
__NOTOC__
[[Category:Towns]] [[Kategorie:Städte|Red]] [[de:Rote Mühle]]
"""
    assert plain_text(article) == (
        "Red Mill (English: ) is a town by the river. It has 3 kites.\n\n"
        "History\nEarly\nA mill was built.\nThen it broke."
    )


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("the [[river]]", "the river"),
        ("the [[river|big river]]", "the big river"),
        ("[[mill]]s", "mills"),
        ("[[river#Source|its source]]", "its source"),
        ("[[ river ]]", "river"),
        ("[[river|]]", "river"),
        ("[[:Category:Towns]]", "Category:Towns"),
        ("[[:de:Mühle|mill]]", "mill"),
        ("[[fr:Moulin]]a", "a"),
        ("[[fr:Moulin|a mill]]", "a mill"),
        ("[[Star Wars: The Kite]]", "Star Wars: The Kite"),
        ("[[a|''b'' [[c|d]] e]]", "b d e"),
        ("[https://a.b the kite]", "the kite"),
        ("[//a.b the kite]", "the kite"),
        ("[mailto:a@b.c Ada]", "Ada"),
        ("a [https://a.b] b", "a b"),
        ("see https://a.b/c?d=e for it", "see for it"),
        ("the array[1] and [sic]", "the array[1] and [sic]"),
    ],
)
def test_the_words_of_links_stay(wikitext, text):
    assert plain_text(wikitext) == text


@pytest.mark.parametrize(
    "names",
    [
        "File Image Файл Fitxer Imatge Soubor Fil Billede Datei Bild Archivo Imagen Fichier",
        "Datoteka Fájl Kép Immagine Bestand Afbeelding Plik Grafika Ficheiro Fișier Slika Датотека",
        "Слика Категория Categoria Kategorie Kategori Category Categoría Catégorie Kategorija",
        "Kategória Categorie Kategoria Категорија Категорія",
    ],
)
def test_files_and_categories_go_in_all_twenty_languages(names):
    for spelt in [*names.split(), *names.lower().split(), " Fil "]:
        assert plain_text(f"a [[{spelt}:x.jpg|thumb|a [[b|c]] {{{{d}}}} e]]f") == "a f"


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("a{{b}}c", "ac"),
        ("a{{b|{{c|{{d}}}}|[[e|f]]}}g", "ag"),
        ("a{{{1|b}}}c", "ac"),
        ("a{{b|{c}}}d", "ad"),
        ("a{{{{b}}}}c", "ac"),
        ("a{{b\n|c\n|}}d", "ad"),
        ("a (; {{b}}) c", "a c"),
        ("a\n{|\n| b\n{|\n| c\n|}\n| d\n|}\ne", "a\n\ne"),
        ("a\n:{| x\n| {{b|c}}\n|}\ne", "a\n\ne"),
        ("f(x) = {|x|} here", "f(x) = {|x|} here"),  # a table begins a line
        ("{a} }b{", "{a} }b{"),
    ],
)
def test_templates_and_tables_go_with_all_that_is_in_them(wikitext, text):
    assert plain_text(wikitext) == text


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("''a'' '''b''' '''''c'''''", "a b c"),
        ("l''''Elbe'''", "l'Elbe"),
        ("l'Elbe d'Ada", "l'Elbe d'Ada"),
        ("''''''a", "'a"),
        ("* a\n** b\n# c\n: d\n; e", "a\nb\nc\nd\ne"),
        ("a\n----\nb", "a\n\nb"),
        ("a<br>b<br />c", "a\nb\nc"),
        ("H<sub>2</sub>O <span style='x'>is</span> wet", "H2O is wet"),
        ("a &amp; b &lt;b&gt; &#233; &amp;lt;", "a & b <b> é &lt;"),
        ("a<ref>b</ref>c<ref name=d/>e<ref name='f'>g</ref>h", "aceh"),
        ("a<ref name=b/>c<ref>d</ref>e", "ace"),
        ("a<gallery>\nb.jpg|c\n</gallery>d", "ad"),
        ("a<!-- b -->c<!---->d", "acd"),
        ("__TOC__a __KEIN_INHALTSVERZEICHNIS__b __БЕЗ_ЗМІСТУ__c", "a b c"),
        ("def __init__(self)", "def __init__(self)"),
        ("-{Mlin}- je star", "Mlin je star"),
        ("a\n\n\n\nb   c", "a\n\nb c"),
        ("#REDIRECT [[Mill]]", ""),
        ("#WEITERLEITUNG [[Mühle]]", ""),
        ("#перенаправление: [[Мельница]]", ""),
        ("# the [[mill]]", "the mill"),
        ("", ""),
    ],
)
def test_signs_go_and_words_stay(wikitext, text):
    assert plain_text(wikitext) == text


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("== a ==\nb", "a\nb"),
        ("a\n== b ==\nc", "a\n\nb\nc"),
        ("a\n== b ==\n\n== c ==\nd\n== e ==", "a\n\nc\nd"),
        ("== a ==\n=== b ===\nc", "a\nb\nc"),
        ("== a ==\n=== b ===\n== c ==\nd", "c\nd"),
        ("==a = b==\nc", "a = b\nc"),
        ("x = 1\n= x", "x = 1\n= x"),
    ],
)
def test_a_heading_stays_if_words_stand_below_it(wikitext, text):
    assert plain_text(wikitext) == text


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("<nowiki>[[a]] ''b'' {{c}} <ref>d</ref></nowiki>e", "[[a]] ''b'' {{c}} <ref>d</ref>e"),
        ("<math>x_{{1}} < y</math>", "x_{{1}} < y"),
        ("<pre>\n* a\n\n\n  b &lt;\n</pre>", "* a\n\n\n  b &lt;"),
        ('<syntaxhighlight lang="c">a[[1]] = {{0}};</syntaxhighlight>', "a[[1]] = {{0}};"),
        ("a<nowiki />b", "ab"),
        ("a<nowiki />[[b]]<nowiki>[[c]]</nowiki>", "ab[[c]]"),
        ("a<nowiki>b [[c]]", "ab c"),  # never closes
    ],
)
def test_what_is_meant_literally_stays_to_the_letter(wikitext, text):
    assert plain_text(wikitext) == text


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("a [[b", "a [[b"),
        ("a {{b", "a {{b"),
        ("a {{b [[c]] d", "a {{b c d"),
        ("a]] b}} c", "a]] b}} c"),
        ("a {{b|[[c}} d", "a d"),
        ("a [[b|{{c]] d", "a {{c d"),
        ("a <ref>b", "a b"),
        ("a <!-- b", "a <!-- b"),
        ("\n{| a\n| b", "{| a\n| b"),
        ("[[a\n\nb|c\n\nd]]", "[[a\n\nb|c\n\nd]]"),
    ],
)
def test_markup_that_never_closes_is_text(wikitext, text):
    assert plain_text(wikitext) == text


def test_nesting_has_a_limit():
    deep = MAX_DEPTH * "{{" + "a" + MAX_DEPTH * "}}"
    assert plain_text(f"x{deep}y") == "xy"
    deeper = "{{b" * (MAX_DEPTH + 1) + "a" + "}}" * (MAX_DEPTH + 1)
    assert plain_text(f"x{deeper}y") == "x}}y"


WORDS = st.text(alphabet="abc éж,.", min_size=1, max_size=8)


@given(st.lists(WORDS, max_size=5).map("\n\n".join))
def test_text_without_markup_stays(text):
    def words(string: str) -> list[str]:
        return re.sub(r"\([\s,;]*\)", "", string).split()

    assert words(plain_text(text)) == words(text)


# Wikitext together with the words that should be left of it.
PIECES = st.recursive(
    WORDS.map(lambda words: (words, words)),
    lambda inner: st.one_of(
        inner.map(lambda piece: (f" ''{piece[0]} '' ", f" {piece[1]} ")),
        inner.map(lambda piece: (f"[[x|y{piece[0]}]]", f"y{piece[1]}")),
        inner.map(lambda piece: (f"{{{{x|{piece[0]}|y=z}}}}", "")),
        inner.map(lambda piece: (f"<ref name='x'>{piece[0]}</ref>", "")),
        inner.map(lambda piece: (f"<!--{piece[0]}-->", "")),
        inner.map(lambda piece: (f"<small>{piece[0]}</small>", piece[1])),
        inner.map(lambda piece: (f"[[Fil:x.png|thumb|{piece[0]}]]", "")),
        st.tuples(inner, inner).map(lambda two: (two[0][0] + two[1][0], two[0][1] + two[1][1])),
    ),
    max_leaves=10,
)


@given(PIECES)
def test_words_in_any_nesting_of_markup(piece):
    wikitext, words = piece
    if wikitext.count("<!--") < 2 and wikitext.count("<ref") < 2:  # these two do not nest
        assert plain_text(f"a {wikitext} b").split() == f"a {words} b".split()


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "{{",
            "[[",
            "{{a|",
            "[[a|",
            "[[a|b]]",
            "}}",
            "]]",
            "{{}}",
            "[",
            "[http://a",
            "http://",
            "=",
        ),
        *(
            "'",
            "<",
            "<a",
            "<ref>",
            "<ref ",
            "<!--",
            "<nowiki>",
            "\n{|",
            "\n|}",
            "|",
            "__A",
            "_",
            "(",
        ),
        *(" ", "= ", "\n==a", "&", "\n* ", "-{", ":", "#", "( ", "{{[[", "<math>", "</ref"),
    ],
)
def test_a_long_page_of_one_thing_takes_no_time(unit):
    page = (unit * 100_000)[:100_000]
    start = time.process_time()
    plain_text(page)
    assert time.process_time() - start < 2
