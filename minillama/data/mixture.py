"""Several sources in given proportions: which row is learned next, and how LLaMA mixed its seven.

A mixture is stated in shares: of 1,000 rows, 670 from the web, 45 from the encyclopedia. As all
rows are equally long, shares of rows are shares of tokens. A small source with a large share is
seen several times over: its number of epochs says how often.

Source: Touvron et al. 2023a (arXiv:2302.13971), sec. 2.1 and table 1.
Built in notebooks/07_data.ipynb.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from minillama.data.packing import Batch, as_batch

# --- LLaMA's mixture ------------------------------------------------------------------------------

LLAMA_1_TOKENS = 1_400_000_000_000  # drawn for the 33B and the 65B; the smaller two drew 1.0T


@dataclass(frozen=True)
class Source:
    """A row of the paper's table, and what follows from it."""

    share: float  # of the tokens drawn
    epochs: float  # in 1.4T tokens
    disk_bytes: float

    @property
    def drawn_tokens(self) -> float:
        """Tokens that the model sees of it, in 1.4T."""
        return self.share * LLAMA_1_TOKENS

    @property
    def unique_tokens(self) -> float:
        """Tokens that there are of it: those drawn are so many epochs of them."""
        return self.drawn_tokens / self.epochs


# Touvron et al. 2023a, table 1. The runs over 1.0T tokens have the same shares and fewer epochs.
LLAMA_1: dict[str, Source] = {
    "commoncrawl": Source(share=0.670, epochs=1.10, disk_bytes=3.3e12),
    "c4": Source(share=0.150, epochs=1.06, disk_bytes=783e9),
    "github": Source(share=0.045, epochs=0.64, disk_bytes=328e9),
    "wikipedia": Source(share=0.045, epochs=2.45, disk_bytes=83e9),
    "books": Source(share=0.045, epochs=2.23, disk_bytes=85e9),
    "arxiv": Source(share=0.025, epochs=1.06, disk_bytes=92e9),
    "stackexchange": Source(share=0.020, epochs=1.03, disk_bytes=78e9),
}


# --- An order without a list ----------------------------------------------------------------------

N_ROUNDS = 6


def shuffled(
    positions: Int[np.ndarray, " n"], n_rows: int, seed: Sequence[int]
) -> Int[np.ndarray, " n"]:
    """Where each of these positions of 0 ... n_rows - 1 goes in a random-looking permutation.

    A shuffled list of a billion rows takes 8 GB; this takes nothing, for it computes each entry. It
    is a Feistel network, the idea behind many block ciphers. Write the position as two digits in
    base ⌈√n_rows⌉. A round replaces (left, right) by (right, left + f(right)), where f is any
    function whatever: whoever knows the new pair knows right, hence f(right), hence left. So every
    round is a permutation of the pairs, and a few rounds with an f that scatters well mix both
    digits thoroughly. The pairs are a few more than the rows. Where one comes out that is no row,
    it goes through the network again, until it is one ("cycle walking"): following the cycle that
    the permutation has drawn skips the surplus, and leaves a permutation of the rows.

    ``seed`` is one or several integers; with each the permutation is another.
    Sources: Luby & Rackoff 1988 (the rounds); Black & Rogaway 2002, sec. 5 (any size, cycle
    walking); Steele et al. 2014, fig. 17 (SplitMix64, our f). Built in notebooks/07_data.ipynb.
    """
    base = np.uint64(isqrt(n_rows - 1) + 1)
    keys = np.random.SeedSequence(seed).generate_state(N_ROUNDS, np.uint64)
    x = positions.astype(np.uint64)
    walking = np.ones(len(x), dtype=bool)
    while walking.any():
        left, right = np.divmod(x[walking], base)
        for key in keys:
            left, right = right, (left + _scatter(right, key) % base) % base
        x[walking] = left * base + right
        walking = x >= n_rows
    return x.astype(np.int64)


def _scatter(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 bits, each of which depends on every bit of x and of the key."""
    x = x * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- Which row is next ----------------------------------------------------------------------------


class MixtureSampler:
    """An endless iterator of (source, row): which row of which source is learned next.

    The source of each draw is random, with the given shares. Within a source every row comes once
    per epoch, in an order that is a function of seed, source and epoch (`shuffled`). So the whole
    sequence is a function of the arguments and can be entered anywhere: the state is how many rows
    of each source have been drawn, and memory is constant, however many rows there are. The order
    in which the sources are listed does not matter.

    ``max_epochs`` limits how often a source may be seen, for those that it names. One draw more is
    a ValueError, which `plan` raises before training.

    Raises ValueError for a source without rows or with a negative share, for a name that only one
    of the arguments knows, and for shares that do not add up to 1 within 1e-6.
    Source: Touvron et al. 2023a, sec. 2.1. Built in notebooks/07_data.ipynb.
    """

    def __init__(
        self,
        n_rows: Mapping[str, int],
        shares: Mapping[str, float],
        seed: int,
        max_epochs: Mapping[str, float] | None = None,
    ) -> None:
        _check_mixture(n_rows, shares, max_epochs or {})
        self.n_rows = dict(sorted(n_rows.items()))
        self.shares = dict(sorted(shares.items()))
        self.max_epochs = dict(max_epochs or {})
        self.seed = seed
        self.sources = list(self.n_rows)
        self.drawn = dict.fromkeys(self.sources, 0)  # rows so far, over all epochs

    @property
    def position(self) -> int:
        """Rows drawn so far, of all sources."""
        return sum(self.drawn.values())

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return self

    def __next__(self) -> tuple[str, int]:
        (number,), (row,) = self.draw(1)
        return self.sources[number], int(row)

    def draw(self, n: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The next n draws at once: each one's source, as its number in `sources`, and its row.

        Raises ValueError, and draws nothing, if a source would be seen more than its `max_epochs`.
        """
        numbers = self._numbers(self.position, n)
        drawn = self._add(np.bincount(numbers, minlength=len(self.sources)))
        rows = np.empty(n, dtype=np.int64)
        for number, source in enumerate(self.sources):
            places = np.arange(self.drawn[source], drawn[source])
            rows[numbers == number] = self._rows(number, places)
        self.drawn = drawn
        return numbers, rows

    def plan(self, n: int) -> dict[str, float]:
        """How many epochs of each source will have been drawn, once n more rows are.

        Exact, for the sources are drawn ahead: what passes here does not fail in training. It takes
        a second per 50 million rows.

        Raises ValueError if a source would be seen more than its `max_epochs`.
        """
        counts = np.zeros(len(self.sources), dtype=np.int64)
        for start in range(0, n, 2**16):
            numbers = self._numbers(self.position + start, min(2**16, n - start))
            counts += np.bincount(numbers, minlength=len(self.sources))
        drawn = self._add(counts)
        return {source: drawn[source] / self.n_rows[source] for source in self.sources}

    def state_dict(self) -> dict[str, Any]:
        """What a new sampler of the same mixture needs to go on from here; fit for JSON."""
        return {"mixture": self._mixture(), "drawn": dict(self.drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the sampler was that gave this state.

        Raises ValueError if that was a sampler of another mixture (sources, rows, shares or seed):
        its draws were other rows than those of the same number here.
        """
        theirs, ours, drawn = state.get("mixture"), self._mixture(), state.get("drawn")
        if not (
            isinstance(theirs, dict)
            and isinstance(drawn, dict)
            and drawn.keys() == theirs.get("n_rows", {}).keys()
            and all(isinstance(n, int) and n >= 0 for n in drawn.values())
        ):
            raise ValueError(
                f"This is no position in a mixture, or a damaged one: {dict(state)}. Give what "
                f"state_dict() returned."
            )
        for name in ours:
            if theirs.get(name) != ours[name]:
                raise ValueError(
                    f"The saved position is one in another mixture: its {name} was "
                    f"{theirs.get(name)} and is {ours[name]} now, so the rows already seen cannot "
                    f"be told from the others. Resume with the same data, shares and seed, or "
                    f"start anew."
                )
        self.drawn = {source: drawn[source] for source in self.sources}

    def _mixture(self) -> dict[str, Any]:
        return {"seed": self.seed, "n_rows": dict(self.n_rows), "shares": dict(self.shares)}

    def _numbers(self, position: int, n: int) -> np.ndarray:
        """The sources of draws number position, position + 1, ..., as numbers in `sources`."""
        # Each draw takes one step of the generator, so it can be set to any position.
        generator = np.random.Generator(np.random.PCG64(self.seed).advance(position))
        bounds = np.cumsum(list(self.shares.values()))  # each source owns a part of [0, 1)
        return np.searchsorted(bounds / bounds[-1], generator.random(n), side="right")

    def _rows(self, number: int, places: np.ndarray) -> np.ndarray:
        """The rows of a source at these places of its sequence, in which epoch follows epoch."""
        n_rows = self.n_rows[self.sources[number]]
        epochs, positions = np.divmod(places, n_rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            # 1 + number: numpy takes [seed, 0, 0] for seed alone, which is the draws' own.
            rows[now] = shuffled(positions[now], n_rows, [self.seed, 1 + number, int(epoch)])
        return rows

    def _add(self, counts: np.ndarray) -> dict[str, int]:
        """What has been drawn, once `counts` more rows are."""
        drawn = {
            source: self.drawn[source] + int(count)
            for source, count in zip(self.sources, counts, strict=True)
        }
        for source, limit in self.max_epochs.items():
            epochs = drawn[source] / self.n_rows[source]
            if epochs > limit:
                raise ValueError(
                    f"The source {source!r} would be seen {epochs:.4g} times (row "
                    f"{drawn[source]:,} of its {self.n_rows[source]:,}), but max_epochs allows "
                    f"{limit:g}. Train for fewer steps, lower its share (now "
                    f"{self.shares[source]:g}), give more text of it, or raise its max_epochs."
                )
        return drawn


def _check_mixture(
    n_rows: Mapping[str, int], shares: Mapping[str, float], max_epochs: Mapping[str, float]
) -> None:
    if unknown := sorted({*shares, *max_epochs} - {*n_rows}):
        raise ValueError(
            f"The mixture names {', '.join(unknown)}, but there are rows of "
            f"{', '.join(n_rows) or 'no source'} only. Give rows under that name, or take the name "
            f"out."
        )
    if missing := sorted({*n_rows} - {*shares}):
        raise ValueError(
            f"{', '.join(missing)} has no share in the mixture, so it is not known how often to "
            f"draw from it. Give each source a share; 0 leaves it out."
        )
    for source in n_rows:
        if n_rows[source] < 1:
            raise ValueError(
                f"The source {source!r} is empty: there is no row to draw. Give it text, or take "
                f"it out of the mixture."
            )
        if not shares[source] >= 0:
            raise ValueError(
                f"The share of {source!r} is {shares[source]}, but must be at least 0: it is the "
                f"part of the draws that come from this source."
            )
    for source, limit in max_epochs.items():
        if not limit > 0:
            raise ValueError(
                f"max_epochs of {source!r} is {limit}, but must be above 0. A share of 0 leaves a "
                f"source out."
            )
    if not abs(sum(shares.values()) - 1) <= 1e-6:
        raise ValueError(
            f"The shares add up to {sum(shares.values()):.9g}, but must add up to 1: they are the "
            f"parts of one whole. Divide each by that sum."
        )


# --- Batches of a mixture -------------------------------------------------------------------------


class Batches:
    """Batches without end, mixed from several sources: a `MixtureSampler` that fetches its rows.

    ``rows`` may lie in memory (`pack`) or on disk (`open_rows`): only the rows of a batch are read.
    ``batch_size`` is that of all ``world`` processes together: all draw the same, and process
    ``rank`` takes its part of each batch. So the parts make up the batch that one process would
    have, and a run saved by four is continued by two. `sampler` counts and plans the epochs.
    ``to_batch`` says what rows mean: by default they are `seq_len` + 1 ids of a stream.

    Raises ValueError as `MixtureSampler` does; for rows of different lengths; and for a batch that
    `world` processes cannot share equally.
    Built in notebooks/07_data.ipynb.
    """

    def __init__(
        self,
        rows: Mapping[str, Integer[np.ndarray, "_ ... row_len"]],
        shares: Mapping[str, float],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        max_epochs: Mapping[str, float] | None = None,
        to_batch: Callable[[np.ndarray], Batch] = as_batch,
    ) -> None:
        n_rows = {source: len(found) for source, found in rows.items()}
        self.sampler = MixtureSampler(n_rows, shares, seed, max_epochs)
        lengths = {source: found.shape[-1] for source, found in rows.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"The rows are of different lengths: {lengths}. Cut all sources with one seq_len."
            )
        if not 0 <= rank < world:
            raise ValueError(
                f"rank is {rank}, but the {world} processes are numbered from 0 to {world - 1}."
            )
        if batch_size < 1 or batch_size % world:
            raise ValueError(
                f"batch_size is {batch_size}, but must be a multiple of world ({world}), at least "
                f"{world}: each process takes equally many rows."
            )
        self.batch_size = batch_size
        share = batch_size // world
        self._slice = slice(rank * share, (rank + 1) * share)
        self._sources = [rows[source] for source in self.sampler.sources]
        self._dtype = np.result_type(*self._sources)
        self._to_batch = to_batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        numbers, places = (drawn[self._slice] for drawn in self.sampler.draw(self.batch_size))
        rows = np.empty((len(places), *self._sources[0].shape[1:]), self._dtype)
        for number, source in enumerate(self._sources):
            here = numbers == number
            rows[here] = source[places[here]]
        return self._to_batch(rows)

    def state_dict(self) -> dict[str, Any]:
        """What new `Batches` of the same mixture need to go on from here; fit for JSON."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the batches were that gave this state, of whatever size and on any rank.

        Raises ValueError if theirs was another mixture: see `MixtureSampler.load_state_dict`.
        """
        self.sampler.load_state_dict(state)
