"""Few samples, odd numbers of shards, more ranks than there is of either: equal steps, each sample once an epoch."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.batch import World
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
from shards.errors import InputError
from shards.manifest import write_manifest
from shards.schema import ImageSpec, Manifest, SourceInfo, TokenizerSpec, shard_name
from shards.writer import Sample, ShardWriter

Place = tuple[int, int]


def settings(root: Path, **more: object) -> LoaderConfig:
    values = {"shards": root, "backend": "cpu", "batch_size": 8, "threads": 1, "image_size": 16, **more}
    return LoaderConfig(**values)  # type: ignore[arg-type]


def write_set(root: Path, shards: tuple[int, ...], block_rows: int) -> Path:
    """A set of raw images of 32 x 32 in training shards of so many samples."""
    spec = ImageSpec(height=32, width=32, codec="raw")
    root.mkdir()
    infos, rows = [], 0
    for number, count in enumerate(shards):
        with ShardWriter(
            root, shard_name("train", number), image=spec, context=8, labels=(), block_rows=block_rows
        ) as writer:
            for row in range(rows, rows + count):
                tokens = np.array([1, 2, 3, 0, 0, 0, 0, 0], dtype=np.uint16)
                image = np.full((32, 32), row % 256, dtype=np.uint8).tobytes()
                writer.add(
                    Sample(
                        source=0, row=row, image=image, text="a", tokens=tokens, token_count=3, truncated=False,
                        side_words=False,
                    )
                )  # fmt: skip
        rows += count
        infos.append(writer.info)
    write_manifest(
        root,
        Manifest(
            schema_version=1, image=spec, labels=(), block_rows=block_rows, seed=0, splits={"train": tuple(infos)},
            tokenizer=TokenizerSpec(name="none", digest="0" * 32, context=8, vocab_size=4),
            sources=(SourceInfo(kind="images", rows=rows, samples=rows, digest="0" * 32),),
        ),
    )  # fmt: skip
    return root


SHARDS = [(21,), (7, 9, 5), (1, 2, 3, 4, 5, 6, 7), (3,), (1,)]


@pytest.mark.parametrize("shards", SHARDS)
def test_every_rank_gets_equal_steps_and_every_epoch_each_sample_once(shards: tuple[int, ...], tmp_path: Path) -> None:
    """D6: 1, 3, 7 shards at 1, 2, 4 ranks, among them fewer samples than ranks, and than a batch holds."""
    root, samples = write_set(tmp_path / "set", shards, block_rows=4), sum(shards)
    steps = -(-3 * samples // 8)
    runs = []
    for ranks in (1, 2, 4):
        places: dict[int, Place] = {}
        for rank in range(ranks):
            with build_loader(settings(root, streams=4), World(rank=rank, size=ranks)) as loader:
                batches = [next(loader) for _ in range(steps)]
            assert [len(batch) for batch in batches] == [8 // ranks] * steps
            for batch in batches:
                for index, place in enumerate(batch.samples.tolist()):
                    places[batch.position + rank + index * ranks] = tuple(place)
        runs.append(places)
        for epoch in range(3):
            seen = [places[position] for position in range(epoch * samples, (epoch + 1) * samples)]
            assert sorted(seen) == [(shard, row) for shard, count in enumerate(shards) for row in range(count)]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("shards", SHARDS)
def test_an_evaluation_on_many_ranks_has_each_sample_once(shards: tuple[int, ...], tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", shards, block_rows=4)
    for ranks in (2, 4):
        seen = []
        for rank in range(ranks):
            world = World(rank=rank, size=ranks)
            with build_loader(settings(root, mode="eval", streams=4), world) as loader:
                batches = list(loader)
            assert len(batches) == -(-sum(shards) // 8)
            seen += [tuple(place) for batch in batches for place in batch.samples.tolist()]
        assert sorted(seen) == [(shard, row) for shard, count in enumerate(shards) for row in range(count)]


def test_empty_shards_are_refused(tmp_path: Path) -> None:
    """The writer makes none, and a manifest that names one is no manifest."""
    with pytest.raises(ValueError, match="train-000001 has no samples"):
        write_set(tmp_path / "none", (2, 0), block_rows=4)
    root = write_set(tmp_path / "set", (2, 3), block_rows=4)
    manifest = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(manifest.replace('"rows": 3', '"rows": 0'))
    with pytest.raises(InputError, match="0 is not a positive count"):
        build_loader(settings(root), World())


@pytest.mark.parametrize(
    ("more", "ranks", "words"),
    [
        ({"batch_size": 6}, 4, r"batch size 6 cannot be shared by 4 ranks: 6 = 1 x 4 \+ 2; use 4 or 8"),
        ({"streams": 2}, 4, r"2 streams cannot be shared by 4 ranks: 2 = 0 x 4 \+ 2; use 4"),
    ],
)
def test_what_cannot_be_shared_is_refused(shards_dir: Path, more: dict, ranks: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_loader(settings(shards_dir, **more), World(size=ranks))
