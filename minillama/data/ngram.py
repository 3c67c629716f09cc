"""Before Transformers: a language model that counts, with Kneser-Ney smoothing.

The probability of a word after its last n - 1 words is how often it followed them. Where that was
never, or only once, counts say little; the art is how to fall back on shorter contexts. CCNet's
pipeline, and with it LLaMA's, still judges pages by such a model: it is fast, and what it finds
unlikely is often no prose.

Built in notebooks/07_data.ipynb.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
DISCOUNT = 0.75  # taken off each count: close to what unseen texts of any size and order suggest

Context = tuple[str, ...]


def words_of(line: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", line.lower())


@dataclass(frozen=True)
class KneserNey:
    r"""An n-gram language model with interpolated Kneser-Ney smoothing.

    $$ P_k(w \mid c) = \frac{\max(N(cw) - D, 0)}{N(c\,\cdot)}
       + \frac{D \, |\{v : N(cv) > 0\}|}{N(c\,\cdot)} \, P_{k-1}(w \mid c') $$

    Each count gives up D, and what was given up is shared out by the model of the context c' that
    is one word shorter; below the shortest stands 1 / (size of the vocabulary), in which <unk> is
    a word, too. So no word is impossible, and after every context the probabilities sum to 1.

    The idea of Kneser and Ney: for the longest contexts, N counts occurrences; for shorter ones,
    *how many different words* stood in front. "Francisco" may be frequent, but it follows "San"
    alone, and so it is a bad guess after anything else.

    Source: Kneser & Ney 1995; interpolated: Chen & Goodman 1999, sec. 2.7.
    """

    order: int  # words of an n-gram: the word and order - 1 before it
    # By length of the context: N(cw) and N(c .)
    counts: tuple[dict[Context, dict[str, int]], ...] = field(repr=False)
    totals: tuple[dict[Context, int], ...] = field(repr=False)

    @classmethod
    def train(cls, lines: Iterable[str], order: int = 3) -> "KneserNey":
        """Count the n-grams of the lines; each line begins anew. ValueError if there are none."""
        if order < 1:
            raise ValueError(f"order is {order}, but an n-gram has at least one word.")
        counts: list[defaultdict[Context, dict[str, int]]] = [
            defaultdict(dict) for _ in range(order)
        ]
        for line in lines:
            for context, word in _ngrams(words_of(line), order):
                followers = counts[-1][context]
                followers[word] = followers.get(word, 0) + 1
        if not counts[-1]:
            raise ValueError("there is no text to count words in: give at least one line.")
        for longer, shorter in zip(counts[:0:-1], counts[-2::-1], strict=True):
            for context, followers in longer.items():
                shortened = shorter[context[1:]]
                for word in followers:  # once for each different word in front
                    shortened[word] = shortened.get(word, 0) + 1
        totals = tuple({c: sum(n.values()) for c, n in level.items()} for level in counts)
        return cls(order, tuple(map(dict, counts)), totals)

    @property
    def vocabulary(self) -> set[str]:
        """All words that have a probability; <unk> stands for each that was not seen."""
        return {*self.counts[0][()], UNKNOWN}

    def probability(self, word: str, context: Sequence[str]) -> float:
        """P(word | context), of which the last order - 1 words count."""
        context = tuple(context)
        p = 1 / (len(self.counts[0][()]) + 1)
        for level in range(min(self.order, len(context) + 1)):
            suffix = context[len(context) - level :]
            followers = self.counts[level].get(suffix)
            if followers is None:
                break  # then the longer contexts were not seen, either
            kept = max(followers.get(word, 0) - DISCOUNT, 0)
            p = (kept + DISCOUNT * len(followers) * p) / self.totals[level][suffix]
        return p

    def perplexity(self, text: str) -> float:
        """exp of the mean of -log P over the text's words and ends of lines.

        Read it as: so many words are equally likely, on average, to come next. Blank lines are
        skipped. ValueError for a text of nothing else.
        """
        nats = [
            -math.log(self.probability(word, context))
            for line in text.split("\n")
            if (words := words_of(line))
            for context, word in _ngrams(words, self.order)
        ]
        if not nats:
            raise ValueError("the text has no words: nothing can be said about how likely it is.")
        return math.exp(sum(nats) / len(nats))


def _ngrams(words: Sequence[str], order: int) -> Iterable[tuple[Context, str]]:
    """(the order - 1 words before it, word) for each word of a line and for its end."""
    if not words:
        return
    padded = (*[BEGIN] * (order - 1), *words, END)
    for end in range(order - 1, len(padded)):
        yield padded[end - order + 1 : end], padded[end]


@dataclass(frozen=True)
class QualityFilter:
    """Pages by their perplexity under a model of good text: head, middle or tail.

    The boundaries come from good text that the model has not seen: up to its median is the head; up
    to three times what 99 of 100 good texts have, the middle. LLaMA keeps both. CCNet draws the
    lines at quantiles of the pages themselves instead, so that a fixed share of any crawl is lost;
    here the verdict on a page depends on no other page, and is the same on one machine or on many.

    Source: Wenzek et al. 2020, CCNet (arXiv:1911.00359), sec. 3.3.
    """

    model: KneserNey
    head: float  # the perplexity up to which a page is of the head
    middle: float  # ... and of the middle

    @classmethod
    def fit(cls, reference: Sequence[str], order: int = 3) -> "QualityFilter":
        """Nine tenths of the good texts train the model, and one tenth sets the boundaries.

        Raises ValueError for fewer than ten texts.
        """
        if len(reference) < 10:
            raise ValueError(
                f"There are {len(reference)} texts to compare pages with, but at least 10 are "
                f"needed: each tenth tells how likely good text is. A file gives a text a line."
            )
        held_out = reference[9::10]
        trained_on = [text for i, text in enumerate(reference) if i % 10 != 9]
        model = KneserNey.train((line for text in trained_on for line in text.split("\n")), order)
        good = sorted(model.perplexity(text) for text in held_out)
        return cls(model, good[len(good) // 2], 3 * good[len(good) * 99 // 100])

    def bucket(self, page: str) -> str:
        """ "head", "middle" or "tail"."""
        perplexity = self.model.perplexity(page) if words_of(page) else math.inf
        return (
            "head" if perplexity <= self.head else "middle" if perplexity <= self.middle else "tail"
        )

    def keep(self, page: str) -> str | None:
        """The page, or None if it is of the tail."""
        return None if self.bucket(page) == "tail" else page
