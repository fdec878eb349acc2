"""All backends: the same samples, tokens, labels and crops, and from the same bytes the same image."""

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from pipeline.augment import crop_boxes, flips
from pipeline.batch import Batch, World, digest_batch
from pipeline.config import CLIP_MEAN, CLIP_STD, LoaderConfig
from pipeline.loader import build_loader
from shards.manifest import read_manifest
from shards.reader import ShardReader
from shards.schema import ImageSpec, Manifest, SourceInfo, TokenizerSpec, shard_name
from shards.writer import Sample, ShardWriter

BACKENDS = ("cpu", "dali", "hdf5", "hdf5-tuned")
OURS = BACKENDS[:2]


@pytest.fixture(scope="module")
def films(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 48 real films, 320 px, q95, two shards with short last blocks."""
    out = tmp_path_factory.mktemp("films")
    image = ImageSpec()
    paths = sorted((real_data / "nih" / "images").glob("*.png"))[:48]
    infos = []
    for number, part in enumerate((paths[:30], paths[30:])):
        writer = ShardWriter(
            out, shard_name("train", number), image=image, context=77, labels=("Effusion",), block_rows=8
        )
        with writer:
            for path in part:
                row = paths.index(path)
                tokens = np.zeros(77, dtype=np.uint16)
                tokens[: 4 + row] = np.arange(1, 5 + row)
                sample = Sample(
                    source=0, row=row, image=film(path), text="film", tokens=tokens, token_count=4 + row,
                    truncated=False, side_words=row % 2 == 0, labels=(float(row) if row % 3 else None,),
                )  # fmt: skip
                writer.add(sample)
        infos.append(writer.info)
    write_set(out, image, infos, ("Effusion",), 8)
    return out


def film(path: Path) -> bytes:
    """A real film as ingest would encode it."""
    stream = io.BytesIO()
    Image.open(path).convert("L").resize((320, 320), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_set(out: Path, image: ImageSpec, infos: list, labels: tuple[str, ...], block_rows: int) -> None:
    from shards.manifest import write_manifest

    rows = sum(info.rows for info in infos)
    write_manifest(
        out,
        Manifest(
            schema_version=1,
            image=image,
            tokenizer=TokenizerSpec(name="test", digest="0" * 32, context=77, vocab_size=49408),
            labels=labels,
            block_rows=block_rows,
            seed=0,
            sources=(SourceInfo(kind="hdf5", rows=rows, samples=rows, digest="0" * 32),),
            splits={"train": tuple(infos)},
        ),
    )


def batches(config: LoaderConfig, world: World, count: int, position: int = 0) -> Iterator[Batch]:
    """The first batches, each valid until the next."""
    with build_loader(config, world, position=position) as loader:
        for _ in range(count):
            yield next(loader)


def digest(config: LoaderConfig, ranks: int, count: int, position: int = 0) -> int:
    """Order digest of the global batches of all ranks."""
    worlds = [World(rank=rank, size=ranks) for rank in range(ranks)]
    total = sum(digest_batch(batch, world) for world in worlds for batch in batches(config, world, count, position))
    return total % 2**64


def grey_levels(images: torch.Tensor, mean=CLIP_MEAN, std=CLIP_STD) -> torch.Tensor:
    """(B, 3, H, W) normalised back to 0..255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (images.float() * std + mean) * 255


def reference(root: Path, config: LoaderConfig, batch: Batch, world: World) -> torch.Tensor:
    """The batch's images (B, 1, S, S) by Pillow's decoder and torchvision, grey levels."""
    manifest = read_manifest(root)
    positions = np.arange(batch.position + world.rank, batch.position + config.batch_size, world.size)
    boxes = crop_boxes(config.seed, positions, height=320, width=320, scale=config.scale)
    flipped = flips(config.seed, positions, probability=config.flip)
    if config.mode == "eval":
        boxes[:], flipped[:] = (0, 0, 320, 320), False
    images = []
    for (shard, row), (y, x, h, w), flip in zip(batch.samples.tolist(), boxes.tolist(), flipped, strict=False):
        with ShardReader(root, manifest, manifest.splits[config.split][shard]) as reader:
            rows = reader.read_rows(row // manifest.block_rows)
            index = row % manifest.block_rows
            jpeg = os.pread(reader.fd, int(rows.size[index]), int(rows.offset[index]))
            side = bool(rows.side_words[index])
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg))))[None]
        size = [config.image_size] * 2
        small = transforms.resized_crop(pixels, y, x, h, w, size, InterpolationMode.BICUBIC, antialias=True)
        images.append(small.flip(-1) if flip and not (config.flip_guard and side) else small)
    return torch.stack(images).float()


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("guard", [False, True])
def test_images_equal_the_torchvision_reference_on_real_films(films: Path, backend: str, guard: bool) -> None:
    config = LoaderConfig(shards=films, backend=backend, batch_size=32, flip_guard=guard, seed=9)
    world = World(rank=1, size=2)
    for batch in batches(config, world, 3):
        assert batch.images.shape == (16, 3, 224, 224) and batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        difference = (grey_levels(batch.images) - reference(films, config, batch, world)).abs()
        assert difference.mean() <= 0.25
        assert (difference <= 1.001).float().mean() >= 0.999
        if backend == "cpu":  # the same kernel as the reference: rounding of the normalisation alone
            assert difference.max() < 0.01


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_statistics_and_size_are_as_asked(films: Path, backend: str, dtype: str) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config = LoaderConfig(
        shards=films, backend=backend, batch_size=8, dtype=dtype, image_size=160, mean=mean, std=std, flip=0.0
    )
    (batch,) = batches(config, World(), 1)
    assert batch.images.dtype == getattr(torch, dtype) and batch.images.shape == (8, 3, 160, 160)
    difference = (grey_levels(batch.images, mean, std) - reference(films, config, batch, World())).abs()
    assert difference.mean() < 0.6 and difference.max() < 8


def hdf5(config: LoaderConfig, backend: str, source: tuple[Path, Path]) -> LoaderConfig:
    return replace(config, backend=backend, h5=source[0])


def test_all_backends_deliver_the_same(shards_dir: Path, source: tuple[Path, Path]) -> None:
    """Samples, tokens, labels and lengths exactly; images up to the rounding of the resize and, for HDF5, the JPEG."""
    config = LoaderConfig(shards=shards_dir, batch_size=24, flip_guard=True, threads=2)
    both = {
        backend: [replace(batch, images=batch.images.clone()) for batch in batches(one, World(), 4)]
        for backend in BACKENDS
        for one in [hdf5(config, backend, source)]
    }
    for backend in BACKENDS[1:]:
        for batch, expected in zip(both[backend], both["cpu"], strict=True):
            for name in ("tokens", "labels", "samples"):
                one, two = getattr(batch, name), getattr(expected, name)
                assert one.dtype == two.dtype and torch.equal(one.nan_to_num(7.5), two.nan_to_num(7.5)), name
            assert (batch.position, batch.text_length) == (expected.position, expected.text_length)
            assert batch.text_length == int((batch.tokens > 0).sum(1).max())
            difference = (grey_levels(batch.images) - grey_levels(expected.images)).abs().mean((1, 2, 3))
            assert difference.max() < (0.25 if backend == "dali" else 1.5), backend


def test_labels_and_tokens_are_those_of_the_sample(films: Path) -> None:
    config = LoaderConfig(shards=films, backend="cpu", batch_size=16)
    for batch in batches(config, World(), 3):
        for (shard, row), tokens, labels in zip(batch.samples.tolist(), batch.tokens, batch.labels, strict=True):
            number = shard * 30 + row
            assert tokens.tolist() == [*range(1, 5 + number), *[0] * (73 - number)]
            assert labels.tolist() == [number] if number % 3 else labels.isnan().all()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_order_digest_is_the_same_for_all_ranks_and_backends(
    shards_dir: Path, source: tuple[Path, Path], mode: str
) -> None:
    config = LoaderConfig(shards=shards_dir, batch_size=16, backend="cpu", mode=mode, threads=1)
    samples = read_manifest(shards_dir).rows("train")
    count = 6 if mode == "train" else -(-samples // 16)
    expected = digest(config, 1, count)
    assert [digest(config, ranks, count) for ranks in (2, 4)] == [expected, expected]
    for backend in BACKENDS[1:]:
        assert digest(hdf5(config, backend, source), 1, count) == expected, backend
    assert digest(replace(config, backend="dali"), 2, count) == expected
    if mode == "train":
        assert digest(replace(config, seed=1), 1, count) != expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_at_a_position_on_any_ranks(shards_dir: Path, source: tuple[Path, Path], backend: str) -> None:
    config = hdf5(LoaderConfig(shards=shards_dir, batch_size=12, threads=1), backend, source)
    with build_loader(config, World()) as loader:
        whole = [
            (digest_batch(batch, World()), batch.images.sum().item())
            for batch, _ in zip(loader, range(9), strict=False)
        ]
        assert loader.position == 9 * 12 or loader.position == 10 * 12
    with build_loader(config, World(), position=7 * 12) as loader:
        assert loader.position == 7 * 12
        again = [
            (digest_batch(batch, World()), batch.images.sum().item())
            for batch, _ in zip(loader, range(2), strict=False)
        ]
    assert again == whole[7:9]
    two = digest(config, 2, 2, position=7 * 12)
    assert two == (whole[7][0] + whole[8][0]) % 2**64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 4])
def test_evaluation_sees_every_row_once_in_order(
    shards_dir: Path, source: tuple[Path, Path], backend: str, ranks: int
) -> None:
    """Last batch short, and empty on ranks that have no row of it."""
    if ranks == 4 and backend.startswith("hdf5"):
        backend = "hdf5-tuned"
    manifest = read_manifest(shards_dir)
    rows = [(shard, row) for shard, info in enumerate(manifest.splits["train"]) for row in range(info.rows)]
    batch_size = 4 * ((len(rows) - 1) // 4) if ranks == 4 else 16
    config = LoaderConfig(shards=shards_dir, mode="eval", batch_size=batch_size, threads=1)
    config = hdf5(config, backend, source)
    found: dict[int, tuple[int, int]] = {}
    lengths = []
    for rank in range(ranks):
        world = World(rank=rank, size=ranks)
        with build_loader(config, world) as loader:
            for batch in loader:
                lengths.append(len(batch))
                assert batch.images.shape == (len(batch), 3, 224, 224)
                assert batch.tokens.shape == (len(batch), 77) and batch.labels.shape == (len(batch), 2)
                places = [tuple(sample) for sample in batch.samples.tolist()]
                found |= {batch.position + rank + ranks * i: place for i, place in enumerate(places)}
            with pytest.raises(StopIteration):
                next(loader)
    assert [found[position] for position in range(len(rows))] == rows
    assert sum(lengths) == len(rows) and len(lengths) % ranks == 0
    if ranks == 4:
        assert 0 in lengths


def test_evaluation_is_not_augmented(films: Path) -> None:
    config = LoaderConfig(shards=films, backend="cpu", mode="eval", batch_size=20)
    for batch in batches(config, World(), 3):
        assert (grey_levels(batch.images) - reference(films, config, batch, World())).abs().max() < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_crop_size_and_no_crop(shards_dir: Path, source: tuple[Path, Path], backend: str) -> None:
    config = LoaderConfig(shards=shards_dir, batch_size=4, image_size=96, scale=(0.2, 0.3), threads=1, flip=1.0)
    (batch,) = batches(hdf5(config, backend, source), World(), 1)
    assert batch.images.shape == (4, 3, 96, 96)


def test_intra_op_threads_are_left_as_they_were(shards_dir: Path) -> None:
    import threading

    before = torch.get_num_threads()
    with build_loader(LoaderConfig(shards=shards_dir, backend="cpu", batch_size=4, threads=2), World()) as loader:
        next(loader)
        assert torch.get_num_threads() == before
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [before]


@pytest.mark.parametrize("backend", OURS)
def test_a_closed_loader_leaves_no_thread_and_no_file(shards_dir: Path, backend: str) -> None:
    import threading

    def files() -> list[str]:
        return [name for name in map(_target, os.listdir("/proc/self/fd")) if str(shards_dir) in name]

    before = set(threading.enumerate())  # a test before may have left one behind on purpose
    for batch in batches(LoaderConfig(shards=shards_dir, backend=backend, batch_size=4), World(), 2):
        assert len(batch) == 4 and files()
    assert not files()
    assert not [each.name for each in set(threading.enumerate()) - before if each.name.startswith("shardclip")]


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def test_a_closed_dali_graph_is_gone(shards_dir: Path) -> None:
    """Left to the garbage collector it may be destroyed in a forked worker, which then hangs (seen with DALI 2.4)."""
    import gc

    from nvidia.dali import Pipeline

    config = LoaderConfig(shards=shards_dir, backend="dali", batch_size=4)
    with build_loader(config, World()) as loader:
        next(loader)
        assert [each for each in gc.get_objects() if issubclass(type(each), Pipeline)]
    assert not [each for each in gc.get_objects() if issubclass(type(each), Pipeline)]
