"""The published mixture, the order without a list, the sampler and its batches."""

import json
from collections import Counter
from itertools import islice, permutations
from math import isqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.data.mixture import (
    LLAMA_1,
    LLAMA_1_TOKENS,
    N_ROUNDS,
    Batches,
    MixtureSampler,
    shuffled,
)
from minillama.data.packing import batches, open_rows, pack, write_tokens
from tests.small import STORIES, small_tokenizer

# Upper 0.001 points of the chi-square distribution, by degrees of freedom: NIST/SEMATECH e-Handbook
# of Statistical Methods, sec. 1.3.6.7.4.
CHI_SQUARE = {1: 10.828, 2: 13.816, 5: 20.515, 6: 22.458, 99: 148.230}

SHARES = {"web": 0.7, "code": 0.2, "books": 0.1}
SIZES = {"web": 50, "code": 7, "books": 3}


def chi_square(counts, expected) -> float:
    return sum((n - e) ** 2 / e for n, e in zip(counts, expected, strict=True))


def sampler(seed: int = 0, **changes) -> MixtureSampler:
    return MixtureSampler(**({"n_rows": SIZES, "shares": SHARES, "seed": seed} | changes))


# --- LLaMA's mixture -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "percent", "epochs", "gigabytes", "drawn", "unique"),
    [
        ("commoncrawl", 67.0, 1.10, 3300, 938, 853),
        ("c4", 15.0, 1.06, 783, 210, 198),
        ("github", 4.5, 0.64, 328, 63, 98),
        ("wikipedia", 4.5, 2.45, 83, 63, 26),
        ("books", 4.5, 2.23, 85, 63, 28),
        ("arxiv", 2.5, 1.06, 92, 35, 33),
        ("stackexchange", 2.0, 1.03, 78, 28, 27),
    ],
)
def test_the_table_of_the_paper(source, percent, epochs, gigabytes, drawn, unique):
    row = LLAMA_1[source]
    assert (100 * row.share, row.epochs, row.disk_bytes / 1e9) == (percent, epochs, gigabytes)
    assert (round(row.drawn_tokens / 1e9), round(row.unique_tokens / 1e9)) == (drawn, unique)


def test_the_table_is_whole():
    assert len(LLAMA_1) == 7
    assert sum(source.share for source in LLAMA_1.values()) == pytest.approx(1, abs=1e-12)
    total = sum(source.drawn_tokens for source in LLAMA_1.values())
    assert total == pytest.approx(LLAMA_1_TOKENS)


def test_llama_1_is_drawn_in_the_proportions_and_epochs_of_the_paper():
    # In rows of a million tokens: 1.4 million draws, as many as plan makes in a moment.
    rows = {name: round(source.unique_tokens / 1e6) for name, source in LLAMA_1.items()}
    shares = {name: source.share for name, source in LLAMA_1.items()}
    epochs = MixtureSampler(rows, shares, seed=0).plan(1_400_000)
    for name, source in LLAMA_1.items():
        assert epochs[name] == pytest.approx(source.epochs, abs=0.02)
    drawn = [epochs[name] * rows[name] for name in LLAMA_1]
    assert chi_square(drawn, [1_400_000 * shares[name] for name in LLAMA_1]) < CHI_SQUARE[6]


# --- An order without a list ---------------------------------------------------------------------


def by_hand(position: int, n_rows: int, seed: list[int]) -> int:
    """The same network for one position, in whole numbers of Python."""
    base = isqrt(n_rows - 1) + 1
    keys = [int(k) for k in np.random.SeedSequence(seed).generate_state(N_ROUNDS, np.uint64)]
    while True:
        left, right = divmod(position, base)
        for key in keys:
            x = (right * 0x9E3779B97F4A7C15 + key) % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, (left + (x ^ x >> 31)) % base
        position = left * base + right
        if position < n_rows:
            return position


@given(n_rows=st.integers(1, 10**12), seed=st.integers(0, 2**32), data=st.data())
@settings(deadline=None, max_examples=30)
def test_the_network_by_hand(n_rows, seed, data):
    positions = data.draw(st.lists(st.integers(0, n_rows - 1), min_size=1, max_size=5))
    expected = [by_hand(position, n_rows, [seed, 1]) for position in positions]
    assert shuffled(np.array(positions), n_rows, [seed, 1]).tolist() == expected


@given(n_rows=st.integers(1, 2000), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_every_row_comes_once(n_rows, seed):
    order = shuffled(np.arange(n_rows), n_rows, [seed])
    assert sorted(order.tolist()) == list(range(n_rows))


@given(n_rows=st.integers(1, 300), data=st.data())
@settings(deadline=None, max_examples=30)
def test_a_part_of_the_order_needs_no_other_part(n_rows, data):
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, n_rows)] * 2)))
    part = shuffled(np.arange(start, end), n_rows, [5])
    assert part.tolist() == shuffled(np.arange(n_rows), n_rows, [5])[start:end].tolist()


def test_another_seed_is_another_order():
    orders = {tuple(shuffled(np.arange(20), 20, [seed, k])) for seed in range(30) for k in range(3)}
    assert len(orders) == 90


def test_all_orders_of_three_rows_are_equally_likely():
    seen = Counter(tuple(shuffled(np.arange(3), 3, [seed]).tolist()) for seed in range(3000))
    assert chi_square([seen[order] for order in permutations(range(3))], [500] * 6) < CHI_SQUARE[5]


@pytest.mark.parametrize("n_rows", [2, 10, 100, 1000])
def test_the_first_row_may_be_any(n_rows):
    n_bins = min(n_rows, 100)
    first = np.array([shuffled(np.arange(1), n_rows, [seed, 7])[0] for seed in range(2000)])
    counts = np.bincount(first * n_bins // n_rows, minlength=n_bins)
    limit = {2: CHI_SQUARE[1], 10: 27.877, 100: CHI_SQUARE[99], 1000: CHI_SQUARE[99]}[n_rows]
    assert chi_square(counts, [2000 / n_bins] * n_bins) < limit


@pytest.mark.parametrize("n_rows", [1000, 10_007, 2**16, 100_000])
def test_the_order_looks_random(n_rows):
    """No trace of the place in the row, of one row in the next, or of one order in the other."""
    places = np.arange(n_rows)
    for seed in range(5):
        order, other = shuffled(places, n_rows, [seed]), shuffled(places, n_rows, [seed + 1])
        limit = 4 / n_rows**0.5  # four standard deviations of the correlation of random orders
        for one, two in [(places, order), (order[:-1], order[1:]), (order, other)]:
            assert abs(np.corrcoef(one, two)[0, 1]) < limit
        rises = np.count_nonzero(np.diff(order) > 0)
        assert abs(rises - n_rows / 2) < 4 * (n_rows / 12) ** 0.5


# --- The sampler ---------------------------------------------------------------------------------


def test_one_source_is_plain_training():
    draws = list(islice(MixtureSampler({"text": 5}, {"text": 1.0}, seed=3), 15))
    assert {source for source, _ in draws} == {"text"}
    for epoch in range(3):
        rows = [row for _, row in draws[5 * epoch : 5 * epoch + 5]]
        assert rows == [by_hand(position, 5, [3, 1, epoch]) for position in range(5)]
        assert sorted(rows) == list(range(5))


def test_the_sources_by_hand():
    uniform = np.random.Generator(np.random.PCG64(4))
    expected = []
    for _ in range(200):
        u = uniform.random()  # the sources in the order of the alphabet
        expected.append("books" if u < 0.1 else "code" if u < 0.1 + 0.2 else "web")
    assert [source for source, _ in islice(sampler(4), 200)] == expected


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=5)
def test_within_a_source_every_row_comes_once_an_epoch(seed):
    rows = {source: [] for source in SIZES}
    for source, row in islice(sampler(seed), 500):
        rows[source].append(row)
    for source, n_rows in SIZES.items():
        epochs = [rows[source][i : i + n_rows] for i in range(0, len(rows[source]), n_rows)]
        assert all(sorted(epoch) == list(range(n_rows)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
    assert rows["web"][:50] != rows["web"][50:100]


@pytest.mark.parametrize("seed", range(5))
def test_the_proportions_are_those_asked_for(seed):
    numbers, _ = sampler(seed).draw(20_000)
    expected = [20_000 * SHARES[source] for source in sorted(SHARES)]
    assert chi_square(np.bincount(numbers), expected) < CHI_SQUARE[2]


def test_a_share_of_zero_is_never_drawn():
    for last in ("code", "zoo"):  # the middle of the alphabet, and its end
        shares = {"books": 0.5, "maps": 0.5, last: 0.0}
        mixed = MixtureSampler(dict.fromkeys(shares, 9), shares, seed=0)
        mixed.draw(1000)
        assert mixed.drawn[last] == 0


def test_shares_that_add_up_to_one_but_for_rounding():
    less = SHARES | {"web": 0.6999991}  # 9 draws in 10 million would be nobody's
    epochs = sampler(shares=less).plan(5_000_000)
    assert sum(epochs[source] * SIZES[source] for source in SIZES) == pytest.approx(5_000_000)


@given(cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_any_cut_gives_the_same_sequence(cuts, seed):
    whole, cut = sampler(seed), sampler(seed)
    parts = [cut.draw(n) for n in cuts]
    rest = list(islice(cut, 5))
    numbers, rows = whole.draw(sum(cuts))
    assert [*numbers, *rows] == [part for i in (0, 1) for pair in parts for part in pair[i]]
    assert list(islice(whole, 5)) == rest


@given(n=st.integers(0, 300), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_a_resumed_sampler_goes_on_exactly(n, seed):
    whole, resumed = sampler(seed), sampler(seed)
    whole.draw(n)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert resumed.position == whole.position == n
    assert list(islice(resumed, 20)) == list(islice(whole, 20))


def test_a_state_does_not_change_afterwards():
    mixed = sampler()
    state = mixed.state_dict()
    mixed.draw(10)
    assert sum(state["drawn"].values()) == 0


def test_the_order_in_which_sources_are_listed_does_not_matter():
    turned = {"n_rows": dict(reversed(SIZES.items())), "shares": dict(reversed(SHARES.items()))}
    assert list(islice(sampler(**turned), 50)) == list(islice(sampler(), 50))
    sampler(**turned).load_state_dict(sampler().state_dict())


def test_sources_of_equal_size_have_orders_of_their_own():
    mixed = MixtureSampler({"a": 20, "b": 20}, {"a": 0.5, "b": 0.5}, seed=0)
    rows = {"a": [], "b": []}
    for source, row in islice(mixed, 100):
        rows[source].append(row)
    assert rows["a"][:20] != rows["b"][:20]


def test_memory_does_not_grow_with_the_rows():
    trillion = MixtureSampler({"web": 10**12}, {"web": 1.0}, seed=0)
    _, rows = trillion.draw(1000)  # a list of all rows would take 8 TB
    assert len(set(rows.tolist())) == 1000
    assert rows.max() > 9 * 10**11


# --- Epochs --------------------------------------------------------------------------------------


@given(start=st.integers(0, 100), n=st.integers(0, 300), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_the_plan_is_what_happens(start, n, seed):
    mixed = sampler(seed)
    mixed.draw(start)
    plan = mixed.plan(n)
    assert mixed.position == start  # nothing was drawn
    mixed.draw(n)
    assert plan == {source: mixed.drawn[source] / SIZES[source] for source in SIZES}


def test_a_long_plan_is_what_happens():  # longer than one of its blocks
    mixed = sampler(n_rows=dict.fromkeys(SIZES, 10_000))
    plan = mixed.plan(150_000)
    mixed.draw(150_000)
    assert plan == {source: n / 10_000 for source, n in mixed.drawn.items()}


def test_a_source_seen_too_often_is_refused_before_training_and_when_drawing():
    mixed = sampler(max_epochs={"books": 4})
    n = next(n for n in range(1000) if sampler().plan(n + 1)["books"] > 4)
    assert mixed.plan(n)["books"] == 4  # 12 rows of 3: just allowed
    message = (
        r"The source 'books' would be seen 4\.333 times \(row 13 of its 3\), but max_epochs allows "
        r"4\. Train for fewer steps, lower its share \(now 0\.1\), give more text of it, or raise"
    )
    with pytest.raises(ValueError, match=message):
        mixed.plan(n + 1)
    mixed.draw(n)
    before = mixed.state_dict()
    with pytest.raises(ValueError, match=message):
        mixed.draw(1)
    assert mixed.state_dict() == before


def test_epochs_may_be_a_fraction():
    mixed = MixtureSampler({"code": 100}, {"code": 1.0}, 0, max_epochs={"code": 1.15})
    assert mixed.plan(115) == {"code": 1.15}
    with pytest.raises(ValueError, match=r"1\.16 times"):
        mixed.plan(116)


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": SHARES | {"web": 0.6}}, r"add up to 0\.9, but must add up to 1.* Divide each"),
        ({"shares": SHARES | {"web": 0.700002}}, r"add up to 1\.000002, but must"),
        ({"shares": SHARES | {"web": -0.1}}, "share of 'web' is -0.1, but must be at least 0"),
        ({"shares": SHARES | {"web": float("nan")}}, "share of 'web' is nan, but must be"),
        ({"shares": SHARES | {"wbe": 0.0}}, "names wbe, but there are rows of web, code, books"),
        ({"shares": {"web": 0.8, "code": 0.2}}, "books has no share .* 0 leaves it out"),
        ({"n_rows": SIZES | {"code": 0}}, "source 'code' is empty: there is no row to draw"),
        ({"n_rows": {}, "shares": SHARES}, "rows of no source only"),
        ({"n_rows": {}, "shares": {}}, "add up to 0, but"),
        ({"max_epochs": {"book": 2.0}}, "names book, but"),
        ({"max_epochs": {"books": 0.0}}, "max_epochs of 'books' is 0.0, but must be above 0"),
        ({"max_epochs": {"books": float("nan")}}, "max_epochs of 'books' is nan"),
    ],
)
def test_a_mixture_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        sampler(**changes)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"n_rows": SIZES | {"code": 8}}, "n_rows was .*'code': 7.* and is .*'code': 8"),
        ({"shares": {"web": 0.6, "code": 0.3, "books": 0.1}}, "shares was .*0.7.* and is .*0.6"),
        ({"n_rows": {"web": 50}, "shares": {"web": 1.0}}, "n_rows was .* and is {'web': 50}"),
    ],
)
def test_the_state_of_another_mixture_is_refused(changes, what):
    mixed = sampler()
    mixed.draw(10)
    with pytest.raises(ValueError, match=f"another mixture: its {what}.* or start anew"):
        sampler(**changes).load_state_dict(mixed.state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("drawn"),
        lambda state: state.pop("mixture"),
        lambda state: state["drawn"].pop("web"),
        lambda state: state["drawn"].update(zoo=1),
        lambda state: state["drawn"].update(web=-1),
        lambda state: state["drawn"].update(web=1.5),
        lambda state: state.update(drawn=[1, 2, 3]),
        lambda state: state["mixture"].pop("n_rows"),
    ],
)
def test_a_damaged_state_is_refused(damage):
    state = sampler().state_dict()
    damage(state)
    with pytest.raises(ValueError, match="no position in a mixture, or a damaged one"):
        sampler().load_state_dict(state)


# --- Batches -------------------------------------------------------------------------------------


def numbered(**sizes: int) -> dict[str, np.ndarray]:
    """Rows whose ids say whose they are: 1000 times the source's number, plus the row's."""
    return {
        source: (1000 * number + np.arange(n))[:, None].repeat(4, axis=1).astype(np.uint16)
        for number, (source, n) in enumerate(sizes.items())
    }


ROWS = numbered(books=3, code=7, web=50)


def firsts(source, n: int) -> list[list[int]]:
    return [batch.tokens[:, 0].tolist() for batch in islice(source, n)]


def test_batches_hold_the_rows_that_are_drawn():
    draws = sampler(seed=2)
    expected = [[ROWS[source][row, 0] for source, row in islice(draws, 6)] for _ in range(20)]
    assert firsts(Batches(ROWS, SHARES, 6, seed=2), 20) == expected


def test_rows_stay_whole_and_targets_follow_their_tokens():
    rows = {"a": np.arange(40, dtype=np.uint16).reshape(8, 5)}
    for batch in islice(Batches(rows, {"a": 1.0}, batch_size=3, seed=0), 10):
        whole = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1)
        assert all(row in rows["a"].tolist() for row in whole.tolist())
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64


@pytest.mark.parametrize("world", [1, 2, 3, 4, 12])
def test_the_parts_of_all_processes_make_up_the_batch_of_one(world):
    parts = [firsts(Batches(ROWS, SHARES, 12, 0, rank, world), 10) for rank in range(world)]
    together = [[row for part in batch for row in part] for batch in zip(*parts, strict=True)]
    assert together == firsts(Batches(ROWS, SHARES, 12, seed=0), 10)


@given(n=st.integers(0, 30), before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=10)
def test_a_run_saved_by_some_processes_is_continued_by_others(n, before, after):
    whole = firsts(Batches(ROWS, SHARES, 4, seed=0), n + 5)[n:]
    saving = Batches(ROWS, SHARES, 4, 0, rank=before - 1, world=before)
    firsts(saving, n)
    state = json.loads(json.dumps(saving.state_dict()))
    parts = []
    for rank in range(after):
        resumed = Batches(ROWS, SHARES, 4, 0, rank, after)
        resumed.load_state_dict(state)
        parts.append(firsts(resumed, 5))
    assert [[i for part in batch for i in part] for batch in zip(*parts, strict=True)] == whole


def test_plain_batches_are_a_mixture_of_one_source():
    assert firsts(batches(ROWS["web"], 6, seed=5), 20) == firsts(
        Batches({"any name": ROWS["web"]}, {"any name": 1.0}, 6, seed=5), 20
    )


def test_sources_with_ids_of_two_widths_mix():
    few, many = np.full((5, 4), 7, dtype=np.uint16), np.full((5, 4), 70_000, dtype=np.uint32)
    batch = next(Batches({"a": few, "b": many}, {"a": 0.5, "b": 0.5}, 64, seed=0))
    assert set(batch.tokens.flatten().tolist()) == {7, 70_000}


def test_rows_on_the_disk_are_those_in_memory(tmp_path):
    tokenizer = small_tokenizer()
    halves = {"first": STORIES[::2], "second": STORIES[1::2]}
    on_disk, in_memory = {}, {}
    for source, stories in halves.items():
        write_tokens(tmp_path / source, stories, tokenizer)
        on_disk[source] = open_rows(tmp_path / source, 16, tokenizer.vocab_size)
        ids = tokenizer.encode_batch(stories, bos=True, eos=True)
        in_memory[source] = pack(ids, 16, tokenizer.vocab_size)
    shares = {"first": 0.25, "second": 0.75}
    one, other = Batches(on_disk, shares, 8, seed=0), Batches(in_memory, shares, 8, seed=0)
    for batch, expected in islice(zip(one, other, strict=True), 50):
        assert torch.equal(batch.tokens, expected.tokens)
        assert torch.equal(batch.targets, expected.targets)


def test_batches_stop_at_the_epochs_that_are_allowed():
    limited = Batches(ROWS, SHARES, 5, seed=0, max_epochs={"books": 2})
    with pytest.raises(ValueError, match="'books' would be seen"):
        firsts(limited, 1000)
    assert limited.sampler.drawn["books"] <= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2, "world": 2}, r"rank is 2, but the 2 processes are numbered from 0 to 1\."),
        ({"rank": -1}, "rank is -1"),
        ({"batch_size": 5, "world": 2}, r"batch_size is 5, but must be a multiple of world \(2\)"),
        ({"batch_size": 0}, r"batch_size is 0, but must be a multiple of world \(1\), at least 1"),
        ({"rows": ROWS | {"web": np.zeros((9, 5), np.uint16)}}, "different lengths: .*'web': 5"),
        ({"rows": ROWS | {"web": np.zeros((0, 4), np.uint16)}}, "source 'web' is empty"),
        ({"shares": {"web": 1.0}}, "books, code has no share"),
    ],
)
def test_batches_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(**({"rows": ROWS, "shares": SHARES, "batch_size": 4, "seed": 0} | arguments))
