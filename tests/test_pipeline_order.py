"""The order of samples: a permutation each epoch, the same for any ranks and start, local in its reads."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch import World
from pipeline.order import Layout, Order, RowOrder, ShuffledOrder

shard_rows = st.lists(st.integers(1, 90), min_size=1, max_size=5).map(tuple)
block_rows = st.integers(1, 40)
seeds = st.integers(0, 2**63)


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


@given(shard_rows, block_rows, seeds, st.integers(1, 60), st.integers(0, 50))
def test_every_epoch_is_a_permutation(rows: tuple[int, ...], block: int, seed: int, streams: int, epoch: int) -> None:
    order = ShuffledOrder(Layout(rows, block), seed=seed, streams=streams)
    everything = {(epoch, shard, row) for shard, count in enumerate(rows) for row in range(count)}
    found = places(order, epoch * order.samples, (epoch + 1) * order.samples)
    assert len(found) == len(everything) and set(found) == everything


@settings(max_examples=60, deadline=None)
@given(shard_rows, block_rows, seeds, st.integers(1, 4), st.integers(1, 6), st.data())
def test_visits_agree_with_positions_for_any_ranks_and_start(
    rows: tuple[int, ...], block: int, seed: int, ranks: int, streams_a_rank: int, data: st.DataObject
) -> None:
    order = ShuffledOrder(Layout(rows, block), seed=seed, streams=ranks * streams_a_rank)
    first = data.draw(st.integers(0, 3 * order.samples))
    end = first + order.samples + 7
    expected = {first + index: place[1:] for index, place in enumerate(places(order, first, end))}
    assert visited(order, block, first, end, ranks) == expected


@settings(max_examples=60, deadline=None)
@given(shard_rows, block_rows, seeds, st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 6), st.integers(0, 4))
def test_an_epoch_costs_at_most_a_read_a_block_and_one_a_stream(
    rows: tuple[int, ...], block: int, seed: int, ranks: int, streams_a_rank: int, epoch: int
) -> None:
    layout = Layout(rows, block)
    order = ShuffledOrder(layout, seed=seed, streams=ranks * streams_a_rank)
    first, end = epoch * layout.samples, (epoch + 1) * layout.samples
    visits = [
        visit
        for rank in range(ranks)
        for visit in itertools.takewhile(
            lambda visit: visit.first < end, order.visits(first, World(rank=rank, size=ranks))
        )
    ]
    assert len(visits) <= layout.blocks + order.streams - 1
    # One live block a stream: at no position are more visits open on all ranks than there are streams.
    for position in range(first, end, max(1, layout.samples // 7)):
        assert sum(visit.first <= position <= visit.last for visit in visits) <= order.streams


@given(shard_rows, block_rows, seeds, st.integers(1, 48), st.lists(st.integers(0, 10_000), min_size=1, max_size=20))
def test_positions_are_found_alone_and_in_any_order(
    rows: tuple[int, ...], block: int, seed: int, streams: int, positions: list[int]
) -> None:
    together = ShuffledOrder(Layout(rows, block), seed=seed, streams=streams).locate(np.array(positions))
    for index, position in enumerate(positions):
        alone = ShuffledOrder(Layout(rows, block), seed=seed, streams=streams).locate(np.array([position]))
        assert (alone.epoch[0], alone.shard[0], alone.row[0]) == (
            together.epoch[index],
            together.shard[index],
            together.row[index],
        )


@given(shard_rows, block_rows, st.integers(1, 4), st.data())
def test_evaluation_goes_row_by_row_once(rows: tuple[int, ...], block: int, ranks: int, data: st.DataObject) -> None:
    order = RowOrder(Layout(rows, block))
    first = data.draw(st.integers(0, order.samples))
    expected = [(shard, row) for shard, count in enumerate(rows) for row in range(count)]
    found = visited(order, block, first, order.samples, ranks)
    assert [found[position] for position in range(first, order.samples)] == expected[first:]
    assert [place[1:] for place in places(order, 0, order.samples)] == expected


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


@pytest.mark.parametrize("samples", [462_000, 100_000_000])
def test_huge_sets_start_at_once_and_stay_small(samples: int) -> None:
    """Half a million blocks: a first batch far into the run within a second or two, 12 bytes a block."""
    begin = time.perf_counter()
    layout = Layout((10_000,) * (samples // 10_000), 190)
    order = ShuffledOrder(layout, seed=0, streams=48)
    position = 3 * layout.samples + 12_345 * 64
    found = order.locate(np.arange(position, position + 64))
    visit = next(order.visits(position, World(rank=1, size=8)))
    assert time.perf_counter() - begin < 4  # 0.2 s alone on one core for 100 million samples
    assert len(set(zip(found.shard.tolist(), found.row.tolist(), strict=True))) == 64
    assert visit.first in range(position, position + 48)
    table = order._epoch(3)
    assert table.block.nbytes + table.start.nbytes <= 12 * layout.blocks + 8
