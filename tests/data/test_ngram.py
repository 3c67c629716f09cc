"""The model against the textbook's formula, its properties, and a simpler model."""

import math
from collections import Counter
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.data.ngram import BEGIN, DISCOUNT, END, UNKNOWN, KneserNey, QualityFilter, words_of
from minillama.data.tales import stories

CORPORA = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=6
)


def padded_lines(lines: list[str], order: int) -> list[list[str]]:
    return [[BEGIN] * (order - 1) + line.split() + [END] for line in lines]


def textbook(lines: list[str], order: int, word: str, context: tuple[str, ...]) -> float:
    """Chen & Goodman 1999, written down as it stands there: every count is counted anew."""
    ends = [
        (line, end) for line in padded_lines(lines, order) for end in range(order - 1, len(line))
    ]

    def grams(n: int) -> list[tuple[str, ...]]:
        return [tuple(line[end - n + 1 : end + 1]) for line, end in ends]

    def count(gram: tuple[str, ...]) -> int:
        if len(gram) == order:
            return grams(order).count(gram)
        return len({longer for longer in grams(len(gram) + 1) if longer[1:] == gram})

    vocabulary = [*sorted({gram[0] for gram in grams(1)}), UNKNOWN]

    def p(word: str, context: tuple[str, ...] | None) -> float:
        if context is None:
            return 1 / len(vocabulary)
        lower = p(word, context[1:] if context else None)
        total = sum(count((*context, w)) for w in vocabulary)
        if total == 0:
            return lower
        followers = sum(count((*context, w)) > 0 for w in vocabulary)
        return (max(count((*context, word)) - DISCOUNT, 0) + DISCOUNT * followers * lower) / total

    return p(word, context)


# --- By hand -------------------------------------------------------------------------------------


def test_a_bigram_model_by_hand():
    """ "a b", "a c". In front of a, b and c stood one word, in front of the end two: 5 in all."""
    model = KneserNey.train(["a b", "a c"], order=2)
    shared = 0.75 * 4 / 5 / 5  # what 4 words gave up, for each of 5 (with <unk>)
    b, end = 0.25 / 5 + shared, 1.25 / 5 + shared
    assert model.probability("b", ()) == pytest.approx(b)
    assert model.probability(END, ()) == pytest.approx(end)
    assert model.probability("b", ("a",)) == pytest.approx(0.25 / 2 + 0.75 * 2 / 2 * b)
    assert model.probability("z", ("a",)) == pytest.approx(0.75 * shared)
    assert model.probability("b", ("z",)) == pytest.approx(b)  # a context never seen


def test_perplexity_by_hand():
    model = KneserNey.train(["a b", "a c"], order=2)
    steps = [("a", BEGIN), ("b", "a"), (END, "b")]
    product = math.prod(model.probability(word, (context,)) for word, context in steps)
    assert model.perplexity("A b\n\n") == pytest.approx(product ** (-1 / 3))


def test_a_word_that_follows_one_other_only_is_a_bad_guess_elsewhere():
    lines = ["in san francisco"] * 5 + ["a glass", "the glass", "my glass"]
    model = KneserNey.train(lines, order=2)
    assert model.probability("glass", ("your",)) > 2 * model.probability("francisco", ("your",))
    assert model.probability("francisco", ("san",)) > 0.8


def test_words_are_lower_case_and_punctuation_stands_alone():
    assert words_of('"Ada," he said.') == ['"', "ada", ",", '"', "he", "said", "."]


# --- Properties ----------------------------------------------------------------------------------


@given(
    lines=CORPORA, order=st.integers(1, 4), context=st.lists(st.sampled_from("abcz"), max_size=4)
)
@settings(deadline=None)
def test_after_every_context_the_probabilities_sum_to_1(lines, order, context):
    model = KneserNey.train(lines, order)
    contexts = [tuple(context), *(c for level in model.counts for c in level)]
    for seen in contexts:
        total = sum(model.probability(word, seen) for word in model.vocabulary)
        assert total == pytest.approx(1)
        assert min(model.probability(word, seen) for word in model.vocabulary) > 0


@given(
    lines=CORPORA,
    order=st.integers(1, 3),
    word=st.sampled_from(["a", "b", "c", END, UNKNOWN]),
    context=st.lists(st.sampled_from(["a", "b", "c", "z", BEGIN]), max_size=2),
)
@settings(deadline=None)
def test_equals_the_textbook(lines, order, word, context):
    context = tuple(context)[max(len(context) - order + 1, 0) :]
    model = KneserNey.train(lines, order)
    expected = textbook(lines, order, word, context)
    assert model.probability(word, context) == pytest.approx(expected)


def test_only_the_last_words_of_a_context_count():
    model = KneserNey.train(["a b c d"], order=3)
    assert model.probability("d", ("a", "b", "c")) == model.probability("d", ("b", "c"))


@pytest.mark.parametrize("order", [2, 3, 4])
def test_beats_adding_one_on_text_that_was_not_seen(order):
    told = list(stories(330, seed=1))
    model = KneserNey.train(told[:300], order)
    grams, contexts, words = Counter(), Counter(), set()
    for line in told[:300]:
        padded = [BEGIN] * (order - 1) + words_of(line) + [END]
        words.update(padded)
        for end in range(order - 1, len(padded)):
            grams[tuple(padded[end - order + 1 : end + 1])] += 1
            contexts[tuple(padded[end - order + 1 : end])] += 1
    nats = []
    for line in told[300:]:
        padded = [BEGIN] * (order - 1) + words_of(line) + [END]
        for end in range(order - 1, len(padded)):
            gram = tuple(padded[end - order + 1 : end + 1])
            nats.append(-math.log((grams[gram] + 1) / (contexts[gram[:-1]] + len(words))))
    add_one = math.exp(sum(nats) / len(nats))
    assert model.perplexity("\n".join(told[300:])) < 0.8 * add_one


def test_longer_contexts_help():
    told = list(stories(330, seed=1))
    text = "\n".join(told[300:])
    perplexities = [KneserNey.train(told[:300], order).perplexity(text) for order in (1, 2, 3, 4)]
    assert perplexities == sorted(perplexities, reverse=True)


def test_real_prose_is_likelier_than_the_same_words_in_another_order(assets):
    """On Shakespeare, trained on 5,000 lines: 300 others, and their words shuffled."""
    text = (assets / "tinyshakespeare.txt").read_text()
    lines = [line for line in text.splitlines() if line][:5300]
    model, unseen = KneserNey.train(lines[:5000]), lines[5000:]
    words = " ".join(unseen).split()
    shuffled = " ".join(Random(0).sample(words, len(words)))
    assert model.perplexity("\n".join(unseen)) < 350
    assert model.perplexity(shuffled) > 1.5 * model.perplexity(" ".join(unseen))


# --- The filter ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quality() -> QualityFilter:
    return QualityFilter.fit(list(stories(300, seed=1)))


def test_good_text_is_head_or_middle_and_gibberish_is_tail(quality):
    buckets = Counter(quality.bucket(story) for story in islice(stories(200, seed=2), 100))
    assert buckets["tail"] == 0
    assert 25 < buckets["head"] < 75
    assert quality.bucket("kite the of Mia under, ran had. river a") == "tail"
    assert quality.bucket("Kauf jetzt das rote Boot!") == "tail"


def test_the_boundaries_are_those_of_good_text_that_was_held_out(quality):
    reference = list(stories(300, seed=1))
    found = sorted(quality.model.perplexity(text) for text in reference[9::10])
    assert (quality.head, quality.middle) == (found[15], 3 * found[29])


def test_a_page_stays_as_it_is_or_goes(quality):
    page = next(stories(1, seed=9))
    assert quality.keep(page) == page
    assert quality.keep("zzz qqq") is None
    assert quality.keep(" \n ") is None


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_no_text_to_count_in(lines):
    with pytest.raises(ValueError, match="no text to count words in"):
        KneserNey.train(lines)


def test_an_order_below_one():
    with pytest.raises(ValueError, match="order is 0"):
        KneserNey.train(["a"], order=0)


def test_a_text_without_words_has_no_perplexity():
    with pytest.raises(ValueError, match="has no words"):
        KneserNey.train(["a"]).perplexity("\n \n")


def test_too_few_good_texts_for_a_boundary():
    with pytest.raises(ValueError, match=r"There are 9 texts .* at least 10"):
        QualityFilter.fit(["a b"] * 9)
    assert QualityFilter.fit(["a b"] * 10).keep("a b") == "a b"
