"""A part of a split without writing its shards anew: the rows that are meant, all of them, each once an epoch."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.batch import World, digest_batch
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
from pipeline.selection import Selection, select_rows
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import ShardReader
from train.main import main

QUERY = "Cardiomegaly == 1 and side_words"


def table(root: Path, split: str = "train") -> list[dict]:
    """Every row of a split in order, with the shard and the row in it."""
    manifest = read_manifest(root)
    found = []
    for shard, info in enumerate(manifest.splits[split]):
        with ShardReader(root, manifest, info) as reader:
            rows = reader.read_table().to_pylist()
        found += [{"place": (shard, number), **row} for number, row in enumerate(rows)]
    return found


def meant(row: dict) -> bool:
    """QUERY, in Python."""
    return row["label:Cardiomegaly"] == 1 and row["side_words"]


def config(root: Path, **settings: object) -> LoaderConfig:
    return LoaderConfig(shards=root, **{"batch_size": 8, "threads": 1, "backend": "cpu", **settings})  # type: ignore[arg-type]


def delivered(loader_config: LoaderConfig, count: int, *, ranks: int = 1, position: int = 0) -> dict[int, tuple]:
    """Position -> (shard, row) of the first batches of all ranks from a position on."""
    found: dict[int, tuple] = {}
    for rank in range(ranks):
        with build_loader(loader_config, World(rank=rank, size=ranks), position=position) as loader:
            for batch, _ in zip(loader, range(count), strict=False):
                places = [tuple(place) for place in batch.samples.tolist()]
                found |= {batch.position + rank + ranks * index: place for index, place in enumerate(places)}
    return found


def keys_file(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(row["key"] + "\n" for row in rows))
    return path


def test_an_epoch_is_a_permutation_of_what_is_meant(shards_dir: Path) -> None:
    expected = [row["place"] for row in table(shards_dir) if meant(row)]
    assert 8 < len(expected) < 40
    settings = config(shards_dir, where=QUERY)
    batches = -(-3 * len(expected) // 8)
    found = delivered(settings, batches)
    for epoch in range(3):
        positions = range(epoch * len(expected), (epoch + 1) * len(expected))
        assert sorted(found[position] for position in positions) == expected
    with build_loader(settings, World()) as loader:
        assert loader.samples == len(expected)


def test_ranks_and_resumed_runs_see_the_same(shards_dir: Path, source: tuple[Path, Path]) -> None:
    settings = config(shards_dir, where=QUERY)
    whole = delivered(settings, 12)
    assert delivered(settings, 12, ranks=4) == whole
    assert delivered(settings, 5, ranks=2, position=56) == {p: place for p, place in whole.items() if p >= 56}
    for backend in ("dali", "hdf5"):
        assert delivered(replace(settings, backend=backend, h5=source[0]), 12) == whole, backend


@pytest.mark.parametrize("backend", ["cpu", "dali", "hdf5-tuned"])
def test_evaluation_sees_each_meant_row_once_in_order(
    shards_dir: Path, source: tuple[Path, Path], tmp_path: Path, backend: str
) -> None:
    rows = table(shards_dir)
    left_out = [row for row in rows if meant(row)][::3]
    expected = [row["place"] for row in rows if meant(row) and row not in left_out]
    settings = config(
        shards_dir, mode="eval", where=QUERY, exclude=keys_file(tmp_path / "keys", left_out), backend=backend,
        h5=source[0],
    )  # fmt: skip
    for ranks in (1, 2):
        found = delivered(settings, 100, ranks=ranks)
        assert [found[position] for position in range(len(found))] == expected


def test_labels_and_tokens_stay_with_their_sample(shards_dir: Path) -> None:
    rows = {row["place"]: row for row in table(shards_dir)}
    with build_loader(config(shards_dir, where=QUERY), World()) as loader:
        for batch, _ in zip(loader, range(6), strict=False):
            for place, tokens, label in zip(batch.samples.tolist(), batch.tokens, batch.labels, strict=True):
                assert tokens.tolist() == rows[tuple(place)]["tokens"] and label[0] == 1


def test_excluding_and_asking_are_two_ways_to_the_same(shards_dir: Path, tmp_path: Path) -> None:
    """The order digest depends on what is selected, not on how it was said or where the list lies."""
    others = [row for row in table(shards_dir) if not meant(row)]
    one, two = config(shards_dir, where=QUERY), config(shards_dir, exclude=keys_file(tmp_path / "keys", others[::-1]))
    assert delivered(one, 9) == delivered(two, 9)
    everything = config(shards_dir, where="token_count >= 0")
    with build_loader(config(shards_dir), World()) as loader, build_loader(everything, World()) as same:
        for _ in range(9):
            assert digest_batch(next(loader), World()) == digest_batch(next(same), World())


def test_the_bits_are_those_of_the_query_and_one_a_row(shards_dir: Path) -> None:
    manifest, rows = read_manifest(shards_dir), table(shards_dir)
    bits = select_rows(shards_dir, manifest, "train", Selection(where=QUERY))
    assert bits is not None
    infos = manifest.splits["train"]
    found = [bit for shard, info in enumerate(infos) for bit in bits.of(shard, 0, info.rows).tolist()]
    assert found == [meant(row) for row in rows]
    assert bits.of(1, 3, 11).tolist() == [meant(row) for row in rows if row["place"][0] == 1][3:11]
    assert bits.nbytes == sum(-(-info.rows // 8) for info in infos)
    assert select_rows(shards_dir, manifest, "train", Selection()) is None


def test_an_error_that_passes_is_tried_again(shards_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parallel file system that hiccups must not end a run before it starts."""
    failures = {"read": 2}
    real = ShardReader.read_columns

    def read_columns(self: ShardReader, block: int, columns: list[str], count: int) -> object:
        if failures["read"]:
            failures["read"] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(self, block, columns, count)

    monkeypatch.setattr(ShardReader, "read_columns", read_columns)
    bits = select_rows(shards_dir, read_manifest(shards_dir), "train", Selection(where=QUERY))
    assert bits is not None and failures["read"] == 0


def test_a_query_of_the_split_alone(shards_dir: Path) -> None:
    """No column of the table is named by it."""
    manifest = read_manifest(shards_dir)
    bits = select_rows(shards_dir, manifest, "val", Selection(where="split != 'train'"))
    assert bits is not None and bits.of(0, 0, manifest.splits["val"][0].rows).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"where": "Cardiomegaly == 7"}, ("where 'Cardiomegaly == 7' leaves 0 of the", "split 'train'")),
        (
            {"where": QUERY, "batch_size": 40},
            ("leaves 21 of the 63", "batch takes 40", "lower the batch size"),
        ),
        ({"where": "Cardiomegaly = 1"}, ("it cannot be read",)),
        ({"where": "Oedema == 1"}, ("no column 'Oedema'",)),
    ],
)
def test_what_cannot_be_is_one_line(shards_dir: Path, settings: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        build_loader(config(shards_dir, **settings), World())
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_fewer_than_a_batch_will_do_for_an_evaluation(shards_dir: Path) -> None:
    assert delivered(config(shards_dir, where=QUERY, batch_size=40, mode="eval"), 9)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"00-0000000001\nDoe, John\n", ("line 2", "is no key", "00-0000000123")),
        (b"00-0000000001\n00-0000000096\n", ("00-0000000096", "no source", "another data set")),
        (b"01-0000000001\n", ("01-0000000001", "no source")),
        (b"\xff\xfe\x00", ("is not text",)),
        (None, ("cannot read the exclusion list", "No such file")),
    ],
)
def test_a_list_that_cannot_be_is_one_line(
    shards_dir: Path, tmp_path: Path, content: bytes | None, words: tuple[str, ...]
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        build_loader(config(shards_dir, exclude=path), World())
    assert "\n" not in str(error.value) and "Doe" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_an_empty_list_leaves_nothing_out(shards_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n \r\n")
    assert delivered(config(shards_dir, exclude=tmp_path / "keys"), 8) == delivered(config(shards_dir), 8)


def test_a_run_goes_on_with_the_same_samples_alone(
    shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Query and keys are part of the fingerprint; where the list of keys lies is not, nor is it in the checkpoint."""
    rows = table(shards_dir)
    out, keys = tmp_path / "run", keys_file(tmp_path / "keys", rows[:3])
    small = [
        *("train.main", "--shards", str(shards_dir), "--out", str(out), "--batch-size", "8", "--model.widths"),
        *("16",) * 4, *("--device", "cpu", "--threads", "1", "--resume", "auto", "--validate-every", "0"),
    ]  # fmt: skip

    def run(*more: str) -> int:
        try:
            main([*small[1:], "--steps", "6", *more])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    selected = ["--data.where", "token_count > 1", "--data.exclude"]
    assert run(*selected, str(keys), "--stop-at", "3") == 0
    capsys.readouterr()
    other = keys_file(tmp_path / "other", rows[:4])
    assert run(*selected, str(other)) == 2
    assert "data.exclude was" in capsys.readouterr().err
    assert run("--data.exclude", str(keys)) == 2
    assert "data.where was token_count > 1, is now None" in capsys.readouterr().err
    moved = keys_file(tmp_path / "moved", rows[2::-1])
    assert run(*selected, str(moved)) == 0
    from train.checkpoint import list_checkpoints, read_checkpoint

    payload = read_checkpoint(list_checkpoints(out / "checkpoints")[0][1])
    assert payload["step"] == 6 and str(tmp_path) not in repr({**payload, "model": 0, "optimizer": 0})
    assert "exclude" not in payload["config"]["data"]


def test_a_query_that_leaves_no_validation_is_said_before_training(
    shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--shards", str(shards_dir), "--out", str(tmp_path / "run"), "--data.where", "split == 'train'"])
    assert "split 'val'" in capsys.readouterr().err and not (tmp_path / "run" / "metrics.jsonl").exists()
