"""Would an encyclopedia cite this page? A linear classifier, trained on cited and random pages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from zlib import crc32

import numpy as np
from jaxtyping import Float, Int

from minillama.data.ngram import words_of

N_FEATURES = 2**16
STEPS, LEARNING_RATE, DECAY = 60, 0.3, 1e-3
CITED_WEIGHT = 2 / 3  # of the cited pages in training; the random ones have the rest


@dataclass(frozen=True)
class ReferenceClassifier:
    """Logistic regression on hashed n-grams: p = sigmoid(weights · features(page)).

    A feature is a word or a pair of neighbours that the page has; its number is a hash, so no
    vocabulary is kept, and what collides shares a weight. A page's features have length 1 in all,
    so that long pages count no more than short ones.

    Random pages are good ones, too, now and then: what the classifier can learn is what is *more*
    frequent among the cited. Losing a good page is worse than keeping a bad one, and so the cited
    pages weigh twice as much as the random ones, however many there are of each.

    Source: Touvron et al. 2023a, sec. 2.1 ("a linear model to classify pages used as references in
    Wikipedia vs. randomly sampled pages"); hashing: Weinberger et al. 2009 (arXiv:0902.2206).
    Shown in notebooks/07_data.ipynb.
    """

    weights: Float[np.ndarray, " features"] = field(repr=False)

    @classmethod
    def fit(cls, cited: Sequence[str], random_pages: Sequence[str]) -> "ReferenceClassifier":
        """Gradient descent over all pages at once: the same pages, the same weights.

        Raises ValueError if either kind of page is missing.
        """
        if not cited or not random_pages:
            raise ValueError(
                f"There are {len(cited)} cited and {len(random_pages)} random pages, but a "
                f"classifier learns from the difference: give some of both."
            )
        labels = np.repeat([1.0, 0.0], [len(cited), len(random_pages)])
        shares = [CITED_WEIGHT / len(cited), (1 - CITED_WEIGHT) / len(random_pages)]
        balance = np.repeat(shares, [len(cited), len(random_pages)])
        found = [features(page) for page in [*cited, *random_pages]]
        pages = np.repeat(np.arange(len(found)), [len(ids) for ids, _ in found])
        ids = np.concatenate([ids for ids, _ in found])
        values = np.concatenate([values for _, values in found])
        weights, squares = np.zeros(N_FEATURES), np.zeros(N_FEATURES)
        for _ in range(STEPS):  # AdaGrad: rare features take larger steps
            scores = np.bincount(pages, values * weights[ids], len(found))
            errors = balance * (sigmoid(scores) - labels)
            gradient = np.bincount(ids, values * errors[pages], N_FEATURES) + DECAY * weights
            squares += gradient**2
            weights -= LEARNING_RATE * gradient / np.sqrt(squares + 1e-12)
        return cls(weights)

    def probability(self, page: str) -> float:
        """How likely it is that the page is a cited one."""
        ids, values = features(page)
        return sigmoid(values @ self.weights[ids, None]).item()

    def keep(self, page: str) -> str | None:
        """The page, or None if it is rather one of the random ones."""
        return page if self.probability(page) >= 0.5 else None


def features(page: str) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The numbers of the words and pairs that a page has, and their values: 1 / sqrt(n) each."""
    words = words_of(page)
    found = sorted({*words, *map(" ".join, pairwise(words))})
    ids = np.array([crc32(text.encode()) % N_FEATURES for text in found], dtype=np.int64)
    return ids, np.full(len(ids), max(len(ids), 1) ** -0.5)


def sigmoid(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """1 / (1 + exp(-x)); beyond 500, where exp overflows, it is 0 or 1 anyway."""
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
