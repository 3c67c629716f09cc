from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.data.packing import IGNORE, Batch, as_batch, batches, pack

DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=12), min_size=1, max_size=8)


def seen(rows: np.ndarray, n_batches: int, batch_size: int, seed: int) -> list[int]:
    """The first id of every row that the first batches hold, in order."""
    taken = islice(batches(rows, batch_size, seed), n_batches)
    return [first for batch in taken for first in batch.tokens[:, 0].tolist()]


# --- Rows ----------------------------------------------------------------------------------------


def test_rows_by_hand():
    """Eight ids, rows of 3 + 1: neighbours share an id, and the last one fills no row."""
    rows = pack([[1, 5, 6, 2], [1, 7, 2], [1]], seq_len=3, vocab_size=10)
    assert rows.tolist() == [[1, 5, 6, 2], [2, 1, 7, 2]]


@given(documents=DOCUMENTS, seq_len=st.integers(1, 10))
@settings(deadline=None)
def test_every_id_but_the_first_is_a_target_once(documents, seq_len):
    stream = [token for document in documents for token in document]
    if len(stream) <= seq_len:
        with pytest.raises(ValueError, match=f"{len(stream)} tokens"):
            pack(documents, seq_len, 100)
        return
    rows = pack(documents, seq_len, 100)
    batch = as_batch(rows)
    dropped = (len(stream) - 1) % seq_len
    whole = stream[: len(stream) - dropped]
    assert batch.tokens.flatten().tolist() == whole[:-1]
    assert batch.targets.flatten().tolist() == whole[1:]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32), (32_000, np.uint16)]
)
def test_ids_take_as_few_bytes_as_the_vocabulary_allows(vocab_size, dtype):
    rows = pack([[0, vocab_size - 1]], seq_len=1, vocab_size=vocab_size)
    assert rows.dtype == dtype
    assert rows.tolist() == [[0, vocab_size - 1]]


def test_a_text_of_exactly_one_row_is_enough():
    assert pack([[1, 2, 3]], seq_len=2, vocab_size=4).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("documents", "n"), [([], 0), ([[]], 0), ([[1]], 1), ([[1, 2], [3]], 3)])
def test_a_text_shorter_than_one_row(documents, n):
    message = rf"has {n} tokens, but one row takes 4 .* a seq_len of at most {max(n - 1, 1)}\."
    with pytest.raises(ValueError, match=message):
        pack(documents, seq_len=3, vocab_size=4)


def test_the_way_out_that_the_error_names_works():
    with pytest.raises(ValueError, match="a seq_len of at most 2"):
        pack([[1, 2, 3]], seq_len=3, vocab_size=4)
    assert len(pack([[1, 2, 3]], seq_len=2, vocab_size=4)) == 1


@pytest.mark.parametrize(("document", "span"), [([0, 1, 4], "0 and 4"), ([2, -1, 3], "-1 and 3")])
def test_ids_outside_the_vocabulary(document, span):
    with pytest.raises(ValueError, match=f"between {span}, .* ids 0 to 3.*model's own tokenizer"):
        pack([document], seq_len=1, vocab_size=4)


# --- Batches -------------------------------------------------------------------------------------


def test_the_target_is_the_next_token():
    batch = as_batch(np.array([[1, 5, 6, 2], [2, 1, 7, 2]], dtype=np.uint16))
    assert batch.tokens.tolist() == [[1, 5, 6], [2, 1, 7]]
    assert batch.targets.tolist() == [[5, 6, 2], [1, 7, 2]]
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64


def test_targets_that_are_ignored_do_not_count():
    assert Batch(torch.ones(1, 3).long(), torch.tensor([[IGNORE, 0, IGNORE]])).n_targets == 1


@given(n_rows=st.integers(1, 20), batch_size=st.integers(1, 25), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_each_epoch_shows_every_row_once(n_rows, batch_size, seed):
    rows = np.stack([np.arange(n_rows), np.arange(n_rows)], axis=1).astype(np.uint16)
    epochs = 3
    order = seen(rows, -(-epochs * n_rows // batch_size), batch_size, seed)
    for epoch in range(epochs):
        assert sorted(order[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    rows = np.stack([np.arange(50), np.arange(50)], axis=1).astype(np.uint16)
    order = seen(rows, 20, batch_size=5, seed=3)
    assert seen(rows, 10, batch_size=10, seed=3) == order  # the same, cut otherwise
    torch.manual_seed(1)
    np.random.default_rng(1)
    assert seen(rows, 20, batch_size=5, seed=3) == order
    assert seen(rows, 20, batch_size=5, seed=4) != order
    assert order[:50] != order[50:]  # the second epoch has an order of its own
    assert order[:50] != list(range(50))


def test_rows_stay_whole():
    rows = np.arange(40, dtype=np.uint16).reshape(8, 5)
    for batch in islice(batches(rows, batch_size=3, seed=0), 10):
        whole = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1)
        assert all(row in rows.tolist() for row in whole.tolist())
