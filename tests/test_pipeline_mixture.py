"""Several sets at once: each has its share of every stretch and its own epochs; the same for any ranks."""

import dataclasses
import itertools
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_source
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline_order import everything, layouts, places, used_blocks
from test_pipeline_selection import config, delivered, table

from pipeline import handles, visits
from pipeline.batch import World
from pipeline.buffers import memory_for
from pipeline.handles import OpenShards
from pipeline.loader import build_loader, make_order
from pipeline.mixture import MixedOrder, deal_streams, set_seed
from pipeline.order import ShuffledOrder
from pipeline.selection import Layout
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import ShardReader
from train.checkpoint import list_checkpoints, read_checkpoint
from train.evaluate import EvaluateConfig, evaluate
from train.main import main as train


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[int, MixedOrder]:
    """A number of ranks and an order over two or three sets of any shape."""
    sets = draw(st.lists(layouts(), min_size=2, max_size=3))
    ranks = draw(st.sampled_from([1, 2, 3]))
    streams = ranks * draw(st.integers(-(-len(sets) // ranks), 6))
    mix = draw(st.lists(st.floats(1, 2), min_size=len(sets), max_size=len(sets)))
    try:
        owner = deal_streams(mix, streams)
    except InputError:
        owner = np.arange(streams) % len(sets)
    seed = draw(st.integers(0, 2**63))
    orders = [
        ShuffledOrder(layout, seed=set_seed(seed, number), streams=int((owner == number).sum()))
        for number, layout in enumerate(sets)
    ]
    return ranks, MixedOrder(orders, owner)


def set_of(order: MixedOrder, shard: int) -> tuple[int, int]:
    """The set of a shard of the mixture, and the shard's number in it."""
    number = max(index for index, first in enumerate(order.first_shard) if first <= shard)
    return number, shard - order.first_shard[number]


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.data())
def test_visits_agree_with_positions_for_any_ranks_and_start(
    mixture: tuple[int, MixedOrder], data: st.DataObject
) -> None:
    ranks, order = mixture
    first = data.draw(st.integers(0, 3 * order.samples))
    end = first + order.samples + 5
    found: dict[int, tuple[int, int]] = {}
    for rank in range(ranks):
        visits = order.visits(first, World(rank=rank, size=ranks))
        for visit in itertools.takewhile(lambda visit: visit.first < end, visits):
            block_rows = order.orders[set_of(order, visit.shard)[0]].layout.block_rows
            for index, row in enumerate(visit.rows.tolist()):
                position = visit.first + index * visit.step
                assert position >= first and position not in found and position % ranks == rank
                found[position] = visit.shard, visit.block * block_rows + row
    expected = {first + index: place[1:] for index, place in enumerate(places(order, first, end))}
    assert {position: place for position, place in found.items() if position < end} == expected


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(1, 3))
def test_every_set_goes_through_its_own_epochs(mixture: tuple[int, MixedOrder], epochs: int) -> None:
    """Whatever of a set is delivered is a run of its epochs, each a permutation."""
    _, order = mixture
    streams = len(order._owner)
    count = max(-(-each.samples // each.streams) for each in order.orders) * streams * epochs
    found = places(order, 0, count)
    for number, each in enumerate(order.orders):
        mine = [(epoch, *set_of(order, shard), row) for epoch, shard, row in found]
        rows = [(epoch, shard, row) for epoch, owner, shard, row in mine if owner == number]
        assert len(rows) == count // streams * each.streams >= each.samples
        for epoch in range(len(rows) // each.samples):
            epoch_rows = [(shard, row) for at, shard, row in rows if at == epoch]
            assert sorted(epoch_rows) == everything(each.layout)


@settings(max_examples=40, deadline=None)
@given(mixtures())
def test_reads_stay_within_the_bound(mixture: tuple[int, MixedOrder]) -> None:
    ranks, order = mixture
    for number, each in enumerate(order.orders):
        end = each.samples // each.streams * len(order._owner)
        reads = 0
        for rank in range(ranks):
            firsts = (visit.first for visit in order.set_visits(number, 0, World(rank=rank, size=ranks)))
            reads += sum(1 for _ in itertools.takewhile(end.__gt__, firsts))
        assert reads <= used_blocks(each.layout) + each.streams - 1


@pytest.mark.parametrize(
    ("mix", "streams", "expected"),
    [((0.7, 0.3), 50, [35, 15]), ((0.7, 0.3), 48, [34, 14]), ((1, 1, 1), 48, [16, 16, 16]), ((9000, 200), 48, [47, 1])],
)
def test_streams_are_dealt_by_the_mix_and_evenly(mix: tuple, streams: int, expected: list[int]) -> None:
    owner = deal_streams(mix, streams)
    assert np.bincount(owner).tolist() == expected
    for number, count in enumerate(expected):  # any stretch of the streams has its share, to two streams
        for first, end in itertools.combinations(range(streams + 1), 2):
            assert abs((owner[first:end] == number).sum() - (end - first) * count / streams) < 2


def test_a_set_without_a_stream_is_refused_with_what_would_do() -> None:
    with pytest.raises(InputError, match=r"leaves a set none of 48 streams; use 1000 streams or more"):
        deal_streams((0.999, 0.001), 48)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second set, of 36 films in other blocks and shards."""
    from conftest import FINDINGS

    from ingest.config import IngestConfig
    from ingest.run import ingest

    folder = tmp_path_factory.mktemp("other")
    h5, csv = write_source(folder / "source", 36, seed=5)
    ingest(IngestConfig(to_shards=folder / "set", h5=(h5,), csv=(csv,), label_columns=FINDINGS, workers=1))
    return folder / "set"


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_samples_of_both_sets_are_what_their_shards_hold(shards_dir: Path, other: Path, backend: str) -> None:
    sets = [{row["place"]: row for row in table(root)} for root in (shards_dir, other)]
    shards = len(read_manifest(shards_dir).splits["train"])
    settings_ = config(shards_dir, more_shards=(other,), mix=(0.75, 0.25), batch_size=48, backend=backend)
    with build_loader(settings_, World()) as loader:
        assert loader.samples == len(sets[0]) + len(sets[1])
        seen: Counter = Counter()
        for batch, _ in zip(loader, range(6), strict=False):
            numbers = [int(shard >= shards) for shard, _ in batch.samples.tolist()]
            assert numbers.count(1) == 12  # exactly, batch by batch: a batch has each stream once
            for (shard, row), number, tokens in zip(batch.samples.tolist(), numbers, batch.tokens, strict=True):
                seen[number, shard - shards * number, row] += 1
                assert tokens.tolist() == sets[number][shard - shards * number, row]["tokens"]
        stats = loader.stats()
    assert stats["blocks"] > 6 and stats["buffer_bytes"] > 0
    assert {key[1:] for key in seen if key[0] == 1} == set(sets[1])
    assert all(count == 2 for key, count in seen.items() if key[0] == 1)  # 72 draws of 36 rows: two whole epochs


def test_ranks_and_resumed_runs_see_the_same(shards_dir: Path, other: Path) -> None:
    settings_ = config(shards_dir, more_shards=(other,), where="token_count > 1", balance="Cardiomegaly", batch_size=16)
    whole = delivered(settings_, 9)
    assert delivered(settings_, 9, ranks=4) == whole
    assert delivered(settings_, 3, ranks=2, position=96) == {p: place for p, place in whole.items() if p >= 96}


def test_evaluation_is_of_the_first_set(shards_dir: Path, other: Path) -> None:
    plain, mixed = (config(shards_dir, mode="eval", more_shards=more) for more in ((), (other,)))
    assert delivered(plain, 99) == delivered(mixed, 99)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mix": (1.0, 2.0, 3.0)}, "mix has 3 shares for 2 data sets"),
        ({"mix": (1.0, 0.0)}, "numbers above 0"),
        ({"backend": "hdf5", "h5": Path("x.h5")}, "reads one HDF5 file"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(shards_dir: Path, other: Path, more: dict, words: str) -> None:
    with pytest.raises(InputError) as error:
        config(shards_dir, more_shards=(other,), **more)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_exclusion_list_names_samples_of_each_set(shards_dir: Path, other: Path, tmp_path: Path) -> None:
    keys, shards = tmp_path / "keys.txt", len(read_manifest(shards_dir).splits["train"])
    rows = [{(row["place"]): row["key"] for row in table(root)} for root in (shards_dir, other)]
    first, second = (list(row.items())[7] for row in rows)
    settings_ = config(shards_dir, more_shards=(other,), mix=(0.5, 0.5), exclude=keys)
    keys.write_text(f"{first[1]}\n2:{second[1]}\n")
    seen = set(delivered(settings_, 12).values())
    left_out = {first[0], (shards + second[0][0], second[0][1])}
    assert not left_out & seen
    assert len([place for place in seen if place[0] >= shards]) == len(rows[1]) - 1
    keys.write_text(f"3:{second[1]}\n")
    with pytest.raises(InputError, match="names a sample of data set 3; there are 2"):
        build_loader(settings_, World())


@pytest.mark.parametrize("backend", ["cpu", "dali"])
@pytest.mark.parametrize("damage", ["bytes", "film"])
def test_a_bad_sample_of_either_set_is_named_and_replaced(
    shards_dir: Path, other: Path, tmp_path: Path, backend: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sets have a row of that number in a shard of that number; only the second set's is bad."""
    copy = Path(shutil.copytree(other, tmp_path / "set"))
    manifest, first = read_manifest(copy), len(read_manifest(shards_dir).splits["train"])
    row = manifest.block_rows + 1
    with ShardReader(copy, manifest, manifest.splits["train"][0]) as reader:
        rows = reader.read_rows(1)
    at, size = int(rows.offset[1]), int(rows.size[1])
    content = bytearray((copy / "train-000000.tar").read_bytes())
    content[at : at + size] = bytes(size)
    (copy / "train-000000.tar").write_bytes(content)
    if damage == "film":  # what was ingested is no film: its digest holds
        found = visits.find_damaged
        monkeypatch.setattr(
            visits,
            "find_damaged",
            lambda shard, images, *more: [index for index in found(shard, images, *more) if images[index].any()],
        )
    settings_ = config(shards_dir, more_shards=(copy,), mix=(0.5, 0.5), batch_size=16, backend=backend)
    with (
        build_loader(settings_, World()) as loader,
        pytest.raises(InputError, match="train-000000 of data set 2: image"),
    ):
        for _ in zip(range(8), loader, strict=False):
            pass
    tolerant = dataclasses.replace(settings_, max_bad=1)
    whole, plain = delivered(tolerant, 8), delivered(dataclasses.replace(settings_, more_shards=(other,)), 8)
    changed = {position for position, place in plain.items() if place == (first, row)}
    assert changed and {position for position in plain if plain[position] != whole[position]} == changed
    assert {whole[position] for position in changed} == {(first, row + 1)}
    assert delivered(tolerant, 8, ranks=2) == whole


def test_blocks_are_counted_by_the_rows_of_their_own_set() -> None:
    sets = [
        SimpleNamespace(
            shards=names,
            rows=200 * len(names),
            manifest=SimpleNamespace(block_rows=rows),
            layout=Layout((200,) * len(names), rows),
        )
        for names, rows in (("abc", 16), ("abcdefg", 190))
    ]
    shards = OpenShards(sets)  # type: ignore[arg-type]
    assert [shards.block_rows(shard) for shard in (0, 2, 3, 9)] == [16, 16, 190, 190]
    assert [shards.info(shard) for shard in (0, 2, 3, 9)] == ["a", "c", "a", "g"]
    assert [len(shards.candidates(*place)) for place in ((0, 0), (2, 12), (3, 0), (9, 1))] == [16, 8, 190, 10]


def test_rows_of_small_sets_are_kept_and_those_of_large_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a set is mixed with."""
    read: Counter = Counter()

    def make(_: object, manifest: SimpleNamespace, first: int) -> np.ndarray:
        read[manifest.block_rows, first] += 1
        return np.zeros(manifest.block_rows)

    monkeypatch.setattr(handles, "ROWS_KEPT", 200)
    monkeypatch.setattr(handles, "block_records", make)
    sets = [SimpleNamespace(shards="a", rows=200, manifest=SimpleNamespace(block_rows=rows)) for rows in (2, 100)]
    sets[1].rows = 201
    shards, shard = OpenShards(sets), SimpleNamespace(read_rows=lambda _: None)  # type: ignore[arg-type]
    for _ in range(3):
        for number, block in [(0, block) for block in range(100)] + [(1, 0), (1, 1)]:
            assert len(shards.records(shard, number, block)) == (2, 100)[number]  # type: ignore[arg-type]
    assert {key: count for key, count in read.items() if count != 1} == {(100, 0): 3, (100, 100): 3}
    assert sum(map(len, shards._rows.values())) == 200
    # Together they are no more than one set alone may be: the smallest first.
    assert [OpenShards([*sets, SimpleNamespace(shards="a", rows=rows)])._most_kept for rows in (1, 199, 0)] == [
        1,
        199,
        200,
    ]


def test_memory_is_what_the_streams_of_each_set_hold() -> None:
    """A set of large blocks and few streams does not ask for as much as if all streams were its own, and streams that
    begin their blocks together ask for whole ones."""

    def shard_set(rows: int, block_rows: int) -> SimpleNamespace:
        shards = (SimpleNamespace(tar=SimpleNamespace(bytes=rows * 25_000), rows=rows),)
        return SimpleNamespace(shards=shards, layout=Layout((rows,), block_rows))

    def memory(mix: tuple[float, ...], sets: list[SimpleNamespace], asked: int | None = None) -> int:
        owner = deal_streams(mix, 48)
        orders = [
            ShuffledOrder(each.layout, seed=0, streams=int((owner == number).sum())) for number, each in enumerate(sets)
        ]
        return memory_for(sets, MixedOrder(orders, owner).live(World()), 4, asked)  # type: ignore[arg-type]

    small, large = shard_set(10_001, 16), shard_set(100_001, 400)
    assert memory((47, 1), [small, large], 40 << 20) == 40 << 20
    with pytest.raises(InputError, match="memory_mb 40 is too little: the 48 streams of this rank hold"):
        memory((1, 47), [small, large], 40 << 20)
    huge = shard_set(100_001, 1600)  # 40 MB a block, which nobody asked to fit into less
    assert 48 * 20 * 10**6 < memory((1,), [huge]) < 1.2 * (48 * 20 + 40) * 10**6
    together, apart = shard_set(48 * 100 * 20, 100), shard_set(48 * 100 * 20 - 71 * 48, 100)
    assert memory((1,), [together]) > 48 * 100 * 25_000 > 1.2 * memory((1,), [apart])


def test_sets_that_lie_alike_are_shuffled_differently(shards_dir: Path) -> None:
    manifest = read_manifest(shards_dir)
    order = make_order(config(shards_dir, more_shards=(shards_dir,)), [manifest] * 2, 4)
    one, two = (each.locate(np.arange(60)) for each in order.orders)  # type: ignore[attr-defined]
    assert (one.row != two.row).sum() > 30


def test_sets_that_differ_are_refused(shards_dir: Path, other: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(other, tmp_path / "set"))
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"quality": 95', '"quality": 80'))
    with pytest.raises(InputError, match="differs from --shards in its image"):
        build_loader(config(shards_dir, more_shards=(copy,)), World())


def test_a_set_that_is_named_twice_is_refused(shards_dir: Path, other: Path, tmp_path: Path) -> None:
    """Its samples would come twice as often, and nothing would say so."""
    (tmp_path / "link").symlink_to(shards_dir)
    copy = Path(shutil.copytree(other, tmp_path / "copy"))
    for more in ((shards_dir,), (tmp_path / "link",), (other, copy)):
        with pytest.raises(InputError, match=f"^{more[-1]} is the same data set as ") as caught:
            build_loader(config(shards_dir, more_shards=more), World())
        assert str(other if copy in more else shards_dir) in str(caught.value)
    known = config(shards_dir, more_shards=(shards_dir,))
    build_loader(known, World(), position=known.batch_size).close()  # a run that began before this was refused goes on


def test_a_run_on_two_sets_resumes_on_the_same_two_and_is_evaluated(
    shards_dir: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sets are part of the fingerprint by their digests; where they lie is not, nor is it in the checkpoint."""
    out = tmp_path / "run"
    small = ["--shards", str(shards_dir), "--out", str(out), "--batch-size", "8", "--model.widths", *("16",) * 4]
    small += ["--device", "cpu", "--threads", "1", "--steps", "4", "--validate-every", "4", "--resume", "auto"]

    def run(*more: str) -> int:
        try:
            train([*small, *more])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run("--data.more-shards", str(other), "--data.mix", "3", "1", "--stop-at", "2") == 0
    capsys.readouterr()
    assert run() == 2
    assert "data.more_shards was" in capsys.readouterr().err
    moved = Path(shutil.copytree(other, tmp_path / "moved"))
    assert run("--data.more-shards", str(moved), "--data.mix", "3", "1") == 0
    payload = read_checkpoint(list_checkpoints(out / "checkpoints")[0][1])
    assert payload["step"] == 4 and "more_shards" not in payload["config"]["data"]
    evaluate(EvaluateConfig(checkpoint=(out,), shards=shards_dir, device="cpu", where="token_count > 1"))
