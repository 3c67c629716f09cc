"""Documents to rows of equal length, rows to batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice

import numpy as np
import torch
from jaxtyping import Int, UInt
from torch import Tensor

IGNORE = -100  # a target that does not count: the one masking mechanism of all training here


@dataclass(frozen=True)
class Batch:
    """Token ids and, at each position, the id that should come next (or `IGNORE`)."""

    tokens: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]

    @property
    def n_targets(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(self.tokens.to(device), self.targets.to(device))


def pack(
    documents: Iterable[Sequence[int]], seq_len: int, vocab_size: int
) -> UInt[np.ndarray, "rows row_len"]:
    """Join the documents to one stream and cut it into rows of seq_len + 1 ids.

    Neighbouring rows share one id: the last target of a row is the first token of the next, so
    every id of the stream but the first is a target exactly once. Nothing is padded; documents are
    told apart by their BOS and EOS alone, as in the papers' pretraining. The rest that fills no row
    is dropped.

    Raises ValueError if the stream is shorter than one row, or holds ids outside the vocabulary.
    Source: Touvron et al. 2023a, sec. 2. Shown in notebooks/00_tour.ipynb.
    """
    stream = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
    n_rows = (len(stream) - 1) // seq_len
    if n_rows < 1:
        raise ValueError(
            f"The text has {len(stream)} tokens, but one row takes {seq_len + 1} (seq_len + 1). "
            f"Give more text, or a seq_len of at most {max(len(stream) - 1, 1)}."
        )
    if stream.min() < 0 or stream.max() >= vocab_size:
        raise ValueError(
            f"The token ids lie between {stream.min()} and {stream.max()}, but the vocabulary has "
            f"the ids 0 to {vocab_size - 1}. Encode the text with the model's own tokenizer."
        )
    stream = stream.astype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    starts = np.arange(n_rows) * seq_len
    return stream[starts[:, None] + np.arange(seq_len + 1)]


def batches(rows: UInt[np.ndarray, "rows row_len"], batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of rows without end; each epoch shows every row once, in an order of its own.

    The order is a function of the seed and the epoch alone. A batch may reach into the next epoch,
    so no row is left out.
    """
    epochs = (np.random.default_rng([seed, epoch]).permutation(len(rows)) for epoch in count())
    order = chain.from_iterable(epochs)
    while True:
        yield as_batch(rows[list(islice(order, batch_size))])


def as_batch(rows: UInt[np.ndarray, "batch row_len"]) -> Batch:
    """Rows of seq_len + 1 ids as seq_len tokens and, one place on, their targets."""
    ids = torch.from_numpy(rows.astype(np.int64))
    return Batch(tokens=ids[:, :-1], targets=ids[:, 1:])
