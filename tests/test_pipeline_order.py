"""The order of samples: a permutation each epoch, the same for any ranks and start, local in its reads."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch import World
from pipeline.order import Layout, Order, RowOrder, ShuffledOrder
from pipeline.selection import RowBits

shard_rows = st.lists(st.integers(1, 90), min_size=1, max_size=5).map(tuple)
block_rows = st.integers(1, 40)
seeds = st.integers(0, 2**63)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Shards of any size in blocks of any size; half of them with only some of their rows selected, at least one."""
    rows, block = draw(shard_rows), draw(block_rows)
    if draw(st.booleans()):
        return Layout(rows, block)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.02, 0.3, 0.9, 1.0]))
    masks = [rng.random(count) < share for count in rows]
    masks[rng.integers(len(rows))][0] = True
    return Layout(rows, block, RowBits(np.packbits(mask) for mask in masks))


def everything(layout: Layout) -> list[tuple[int, int]]:
    """(shard, row) of all rows that are selected, in order."""
    masks = [
        np.ones(rows, bool) if layout.selected is None else layout.selected.of(shard, 0, rows)
        for shard, rows in enumerate(layout.rows.tolist())
    ]
    return [(shard, row) for shard, mask in enumerate(masks) for row in np.flatnonzero(mask).tolist()]


def used_blocks(layout: Layout) -> int:
    """Blocks that hold a selected row."""
    return int((layout.length(np.arange(layout.blocks)) > 0).sum())


def places(order: Order, first: int, end: int) -> list[tuple[int, int, int]]:
    """(epoch, shard, row) of positions first..end by the pure function."""
    found = order.locate(np.arange(first, end))
    return list(zip(found.epoch.tolist(), found.shard.tolist(), found.row.tolist(), strict=True))


def visited(order: Order, block_rows: int, first: int, end: int, ranks: int) -> dict[int, tuple[int, int]]:
    """Position -> (shard, row) for positions first..end as all ranks' visits say; each position once."""
    found: dict[int, tuple[int, int]] = {}
    for rank in range(ranks):
        visits = order.visits(first, World(rank=rank, size=ranks))
        starts = []
        for visit in itertools.takewhile(lambda visit: visit.first < end, visits):
            starts.append(visit.first)
            for index, row in enumerate(visit.rows.tolist()):
                position = visit.first + index * visit.step
                assert position not in found and position % ranks == rank
                found[position] = visit.shard, visit.block * block_rows + row
        assert starts == sorted(starts)
    return {position: place for position, place in found.items() if position < end}


@given(layouts(), seeds, st.integers(1, 60), st.integers(0, 50))
def test_every_epoch_is_a_permutation(layout: Layout, seed: int, streams: int, epoch: int) -> None:
    order = ShuffledOrder(layout, seed=seed, streams=streams)
    expected = [(epoch, *place) for place in everything(layout)]
    assert sorted(places(order, epoch * order.samples, (epoch + 1) * order.samples)) == expected
    assert order.samples == len(expected)


@settings(max_examples=80)
@given(layouts(), seeds, st.integers(1, 4), st.integers(1, 6), st.data())
def test_visits_agree_with_positions_for_any_ranks_and_start(
    layout: Layout, seed: int, ranks: int, streams_a_rank: int, data: st.DataObject
) -> None:
    order = ShuffledOrder(layout, seed=seed, streams=ranks * streams_a_rank)
    first = data.draw(st.integers(0, 3 * order.samples))
    end = first + order.samples + 7
    expected = {first + index: place[1:] for index, place in enumerate(places(order, first, end))}
    assert visited(order, layout.block_rows, first, end, ranks) == expected


@settings(max_examples=80)
@given(layouts(), seeds, st.integers(1, 3), st.integers(1, 6))
def test_rows_left_are_those_of_the_visits(layout: Layout, seed: int, ranks: int, streams_a_rank: int) -> None:
    order = ShuffledOrder(layout, seed=seed, streams=ranks * streams_a_rank)
    for rank in range(ranks):
        residues = range(rank, order.streams, ranks)
        visits = order.visits(0, World(rank=rank, size=ranks))
        left: dict[int, int] = dict.fromkeys(range(0, 2 * layout.block_rows, max(1, layout.block_rows // 32)), 0)
        for visit in itertools.takewhile(lambda visit: visit.first < order.samples, visits):
            first = visit.first // order.streams
            for item in left:
                if first <= item < first + len(visit.rows):
                    left[item] += first + len(visit.rows) - item
        assert order.rows_left(np.array(residues)) == max(left.values())


@settings(max_examples=80)
@given(layouts(), seeds, st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 6), st.integers(0, 4))
def test_an_epoch_costs_at_most_a_read_a_block_and_one_a_stream(
    layout: Layout, seed: int, ranks: int, streams_a_rank: int, epoch: int
) -> None:
    order = ShuffledOrder(layout, seed=seed, streams=ranks * streams_a_rank)
    first, end = epoch * layout.samples, (epoch + 1) * layout.samples
    visits = [
        visit
        for rank in range(ranks)
        for visit in itertools.takewhile(
            lambda visit: visit.first < end, order.visits(first, World(rank=rank, size=ranks))
        )
    ]
    assert len(visits) <= used_blocks(layout) + order.streams - 1
    # One live block a stream: at no position are more visits open on all ranks than there are streams.
    for position in range(first, end, max(1, layout.samples // 7)):
        assert sum(visit.first <= position <= visit.last for visit in visits) <= order.streams


@given(layouts(), seeds, st.integers(1, 48), st.lists(st.integers(0, 10_000), min_size=1, max_size=20))
def test_positions_are_found_alone_and_in_any_order(
    layout: Layout, seed: int, streams: int, positions: list[int]
) -> None:
    together = ShuffledOrder(layout, seed=seed, streams=streams).locate(np.array(positions))
    for index, position in enumerate(positions):
        alone = ShuffledOrder(layout, seed=seed, streams=streams).locate(np.array([position]))
        assert (alone.epoch[0], alone.shard[0], alone.row[0]) == (
            together.epoch[index],
            together.shard[index],
            together.row[index],
        )


@given(layouts(), st.integers(1, 4), st.data())
def test_evaluation_goes_row_by_row_once(layout: Layout, ranks: int, data: st.DataObject) -> None:
    order = RowOrder(layout)
    first = data.draw(st.integers(0, order.samples))
    expected = everything(layout)
    found = visited(order, layout.block_rows, first, order.samples, ranks)
    assert [found[position] for position in range(first, order.samples)] == expected[first:]
    assert [place[1:] for place in places(order, 0, order.samples)] == expected


@given(shard_rows, block_rows, seeds, st.integers(1, 48), st.integers(0, 5000))
def test_selecting_every_row_changes_nothing(
    rows: tuple[int, ...], block: int, seed: int, streams: int, first: int
) -> None:
    selected = RowBits(np.packbits(np.ones(count, dtype=bool)) for count in rows)
    plain, all_of_it = (
        ShuffledOrder(Layout(rows, block, bits), seed=seed, streams=streams) for bits in (None, selected)
    )
    assert places(plain, first, first + 50) == places(all_of_it, first, first + 50)


def test_seeds_and_epochs_differ_and_neighbours_come_from_different_blocks() -> None:
    layout = Layout((400, 400), 16)
    order = ShuffledOrder(layout, seed=1, streams=12)
    epochs = [[place[1:] for place in places(order, epoch * 800, (epoch + 1) * 800)] for epoch in range(2)]
    other = [place[1:] for place in places(ShuffledOrder(layout, seed=2, streams=12), 0, 800)]
    for one, two in ((epochs[0], epochs[1]), (epochs[0], other)):
        assert sum(a == b for a, b in zip(one, two, strict=True)) < 20
    batch = {(shard, row // 16) for shard, row in epochs[0][:12]}
    assert len(batch) == 12


def test_the_order_stays_what_it_is() -> None:
    """Golden: a resumed run continues the order it began with, whatever version of this program it began with."""
    order = ShuffledOrder(Layout((5, 4), 2), seed=7, streams=3)
    assert [place[1:] for place in places(order, 0, 12)] == [
        (0, 1),
        (1, 0),
        (1, 2),
        (0, 0),
        (0, 4),
        (0, 2),
        (1, 1),
        (1, 3),
        (0, 3),
        (0, 2),
        (0, 0),
        (1, 2),
    ]


def test_a_batch_is_as_good_as_random() -> None:
    """What `order` states of its shuffle: neighbours from different blocks, rows far from where they lie."""
    layout = Layout((10_000,) * 10, 190)
    order = ShuffledOrder(layout, seed=3, streams=48)
    epochs = [order.locate(np.arange(epoch * layout.samples, (epoch + 1) * layout.samples)) for epoch in range(2)]
    row = [each.shard * 10_000 + each.row for each in epochs]
    block = epochs[0].shard * 53 + epochs[0].row // 190
    # A batch of 64 draws on 48 streams: 16 of its 2016 pairs share a block, never three of a batch.
    for first in range(0, 64_000, 640):
        most = np.unique(block[first : first + 64], return_counts=True)[1]
        assert most.max() <= 3 and len(most) >= 46
    # A third of the set lies between where a row is stored and where it is used, as in a perfect shuffle.
    assert abs(np.abs(row[0] - np.arange(layout.samples)).mean() / layout.samples - 1 / 3) < 0.01
    for lag in (1, 2, 7, 47):
        assert abs(np.corrcoef(row[0][:-lag], row[0][lag:])[0, 1]) < 0.15
    # Rows that meet in a batch are no likelier to meet in the next epoch: 63 of 99,999 by chance.
    batch = np.empty((2, layout.samples), dtype=np.int64)
    for epoch in range(2):
        batch[epoch, row[epoch]] = np.arange(layout.samples) // 64
    again = same_pairs(batch[0], batch[1])
    assert again < 6 * 63 / layout.samples


def same_pairs(one: np.ndarray, two: np.ndarray) -> float:
    """Of the pairs that share a value of `one`, the share that also share that of `two`."""
    together = np.unique(one * (two.max() + 1) + two, return_counts=True)[1]
    apart = np.unique(one, return_counts=True)[1]
    return float((together * (together - 1)).sum() / (apart * (apart - 1)).sum())


@pytest.mark.parametrize("samples", [462_000, 100_000_000])
@pytest.mark.parametrize("selected", [False, True])
def test_huge_sets_stay_small(samples: int, selected: bool) -> None:
    """Half a million blocks: a batch far into the run costs memory for the blocks, and a bit a sample of a selection.

    `bench.scale` has the times.
    """
    shards = samples // 10_000
    bits = RowBits(itertools.repeat(np.packbits(np.arange(10_000) % 3 > 0), shards)) if selected else None
    ShuffledOrder(Layout((10,), 5), seed=0, streams=1).locate(np.arange(4))  # what numpy imports at its first use
    tracemalloc.start()
    try:
        layout = Layout((10_000,) * shards, 190, bits)
        order = ShuffledOrder(layout, seed=0, streams=48)
        position = 3 * layout.samples + 12_345 * 64
        found = order.locate(np.arange(position, position + 64))
        visit = next(order.visits(position, World(rank=1, size=8)))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(set(zip(found.shard.tolist(), found.row.tolist(), strict=True))) == 64
    assert visit.first in range(position, position + 48)
    fixed = 100_000 + 32 * shards
    assert kept <= (12 + 8 * selected) * layout.blocks + fixed
    assert peak <= 100 * layout.blocks + 2 * fixed
    assert bits is None or bits.nbytes == 10_000 * shards // 8
