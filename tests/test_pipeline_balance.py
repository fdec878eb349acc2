"""Classes in equal shares: each row as often as its weight, and still a pure function, read block by block."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline_order import everything, layouts, places, visited
from test_pipeline_selection import QUERY, config, delivered, meant, table

from pipeline.balance import BalancedOrder, Classes
from pipeline.batch import World
from pipeline.loader import build_loader
from pipeline.order import Layout
from shards.errors import InputError

seeds = st.integers(0, 2**63)


def classes_of(values: list[np.ndarray]) -> Classes:
    """Classes of shards from each row's value."""
    shards = []
    for each in values:
        found, local = np.unique(each.astype(np.float32), return_inverse=True)
        shards.append((found, [np.packbits(local >> bit & 1) for bit in range(max(1, (len(found) - 1).bit_length()))]))
    return Classes(shards)


@st.composite
def orders(draw: st.DrawFn, ranks: int = 1) -> tuple[BalancedOrder, list[np.ndarray]]:
    """An order over rows of two to five classes, blank among them, and the rows' values."""
    layout = draw(layouts().filter(lambda layout: layout.samples > 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    choices = np.array([1, 0, np.nan, -1, 7])[: draw(st.integers(2, 5))]
    values = [choices[np.minimum(rng.geometric(0.6, rows) - 1, len(choices) - 1)] for rows in layout.rows.tolist()]
    used = everything(layout)
    for (shard, row), value in zip((used[0], used[-1]), choices, strict=False):
        values[shard][row] = value
    streams = ranks * draw(st.integers(1, 6))
    return BalancedOrder(layout, classes_of(values), seed=draw(seeds), streams=streams), values


def test_numbers_of_classes_are_those_of_the_values() -> None:
    values = [np.array([1, 0, np.nan, 1, -1, np.nan, 0, 0, 1]), np.array([np.nan] * 3), np.array([7, 0])]
    classes = classes_of(values)
    assert classes.values[:-1].tolist() == [-1, 0, 1, 7] and np.isnan(classes.values[-1])
    for shard, each in enumerate(values):
        assert np.array_equal(classes.values[classes.of(shard, 0, len(each))], each, equal_nan=True)
        assert np.array_equal(classes.values[classes.of(shard, 1, 2)], each[1:2], equal_nan=True)


@settings(max_examples=80)
@given(orders(), st.integers(0, 30))
def test_an_epoch_uses_each_row_as_often_as_its_weight_rounded(
    drawn: tuple[BalancedOrder, list[np.ndarray]], epoch: int
) -> None:
    order, values = drawn
    used = everything(order.layout)
    assert order.samples == len(used)
    found = places(order, epoch * order.samples, (epoch + 1) * order.samples)
    assert {place[1:] for place in found} <= set(used)
    counts = dict.fromkeys(used, 0)
    for place in found:
        counts[place[1:]] += 1
    for (shard, row), count in counts.items():
        value = values[shard][row]
        index = np.flatnonzero((order._classes.values == value) | (np.isnan(order._classes.values) & np.isnan(value)))
        assert abs(count - order.weights[index[0]]) < 1 + 1e-6


@settings(max_examples=60)
@given(st.sampled_from([1, 2, 4]).flatmap(lambda ranks: st.tuples(st.just(ranks), orders(ranks))), st.data())
def test_visits_agree_with_positions_and_stay_within_the_reads(
    given: tuple[int, tuple[BalancedOrder, list[np.ndarray]]], data: st.DataObject
) -> None:
    ranks, (order, _) = given
    first = data.draw(st.integers(0, 2 * order.samples))
    end = first + order.samples + 5
    expected = {first + index: place[1:] for index, place in enumerate(places(order, first, end))}
    assert visited(order, order.layout.block_rows, first, end, ranks) == expected
    reads = 0
    for rank in range(ranks):
        visits = order.visits(0, World(rank=rank, size=ranks))
        reads += sum(1 for _ in itertools.takewhile(lambda visit: visit.first < order.samples, visits))
    assert reads <= order.layout.blocks + order.streams - 1


def test_classes_get_equal_shares_of_every_epoch_and_rows_their_turn() -> None:
    """1 % of 4,000 rows are of a rare class, 30 % of a second: a third each of all draws, in every epoch."""
    layout = Layout((1000,) * 4, 50)
    values = [np.digitize(np.random.default_rng(shard).random(1000), [0.01, 0.31]) for shard in range(4)]
    order = BalancedOrder(layout, classes_of(values), seed=5, streams=48)
    flat = np.concatenate(values)
    often = np.zeros(4000)
    for epoch in range(40):
        found = order.locate(np.arange(epoch * 4000, (epoch + 1) * 4000))
        rows = found.shard * 1000 + found.row
        shares = np.bincount(flat[rows], minlength=3) / 4000
        assert np.abs(shares - 1 / 3).max() < 0.01
        often += np.bincount(rows, minlength=4000)
    # Over 40 epochs a row of the common class is used 0.48 times an epoch: 19 of 40, none of them left out.
    common = often[flat == 2] / 40
    assert abs(common.mean() - order.weights[2]) < 0.01 and common.min() > 0.1 and common.max() < 0.9


def test_the_draws_stay_what_they_are() -> None:
    """Golden: a resumed run goes on with the draws it began with."""
    layout = Layout((5, 4), 2)
    classes = classes_of([np.array([1, 0, 0, 0, 0]), np.array([0, 0, 1, 0])])
    order = BalancedOrder(layout, classes, seed=7, streams=3)
    golden = [(0, 0), (1, 0), (1, 2), (0, 0), (1, 2), (0, 3), (1, 1), (1, 2), (0, 2), (0, 2), (0, 0), (1, 2)]
    assert [place[1:] for place in places(order, 0, 12)] == golden


def test_a_label_is_balanced_on_every_backend_and_rank(shards_dir: Path, source: tuple[Path, Path]) -> None:
    """Four values of a label, blank among them, each a quarter of the epoch."""
    rows = {row["place"]: row for row in table(shards_dir)}
    loader_config = config(shards_dir, balance="Pleural Effusion")
    count = -(-len(rows) // 8)
    found = delivered(loader_config, count)
    values = [rows[found[position]]["label:Pleural Effusion"] for position in range(len(rows))]
    assert all(abs(values.count(value) - len(rows) / 4) <= 2 for value in (None, 1, 0, -1))
    assert delivered(loader_config, count, ranks=4) == found
    for backend in ("dali", "hdf5-tuned"):
        assert delivered(replace(loader_config, backend=backend, h5=source[0]), count) == found, backend


def test_a_query_is_balanced_within_a_selection(shards_dir: Path) -> None:
    rows = {row["place"]: row for row in table(shards_dir)}
    used = [place for place, row in rows.items() if row["label:Cardiomegaly"] == 1]
    found = delivered(config(shards_dir, where="Cardiomegaly == 1", balance=QUERY), 8)
    half = [meant(rows[found[position]]) for position in range(len(used))]
    assert set(found.values()) <= set(used) and abs(sum(half) - len(used) / 2) <= 1


def test_evaluation_is_not_balanced(shards_dir: Path) -> None:
    plain, balanced = (config(shards_dir, mode="eval", balance=each) for each in (None, "Cardiomegaly"))
    assert delivered(plain, 99) == delivered(balanced, 99)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"balance": "Oedema"}, "balance 'Oedema': no column 'Oedema'"),
        ({"balance": "Cardiomegaly == 5"}, "nothing to balance"),
        ({"balance": "Cardiomegaly", "where": "Cardiomegaly == 1"}, "nothing to balance"),
    ],
)
def test_what_cannot_be_balanced_is_one_line(shards_dir: Path, more: dict, words: str) -> None:
    with pytest.raises(InputError) as error:
        build_loader(config(shards_dir, **more), World())
    assert words in str(error.value) and "\n" not in str(error.value)
