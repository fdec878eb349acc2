"""Settings that cannot work are refused in one line that holds the arithmetic."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import simplejpeg
from conftest import write_h5

from pipeline import hdf5
from pipeline.batch import World
from pipeline.config import LoaderConfig, available_cpus, stream_count, thread_count
from pipeline.loader import build_loader
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.schema import ImageSpec

NAN, INF = float("nan"), float("inf")


def config(shards: Path = Path("nowhere"), **settings: object) -> LoaderConfig:
    return LoaderConfig(shards=shards, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "gpu"}, "unknown backend 'gpu'; valid: auto, cpu, dali, hdf5, hdf5-tuned"),
        ({"mode": "test"}, "unknown mode 'test'"),
        ({"dtype": "float64"}, "unknown dtype 'float64'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"streams": -1}, "streams is -1"),
        ({"scale": (0.0, 1.0)}, "crop scale"),
        ({"flip": 1.5}, "flip 1.5"),
        ({"flip": NAN}, "flip nan"),
        ({"scale": (NAN, 1.0)}, "crop scale (nan, 1.0)"),
        ({"std": (1.0, NAN, 1.0)}, "std (1.0, nan, 1.0)"),
        ({"std": (1.0, INF, 1.0)}, "std (1.0, inf, 1.0)"),
        ({"mean": (0.0, 0.0, INF)}, "mean (0.0, 0.0, inf)"),
        ({"image_size": 10**8}, "image_size is 100000000"),
        ({"ahead": 10**9}, "ahead is 1000000000; it has to be at least 1 and at most 256"),
        ({"threads": 10**6}, "threads is 1000000"),
        ({"streams": 10**9}, "streams is 1000000000"),
        ({"backend": "hdf5"}, "--h5"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as error:
        config(**settings)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "ranks", "words"),
    [
        ({"batch_size": 50}, 4, "batch size 50 cannot be shared by 4 ranks: 50 = 12 x 4 + 2; use 48 or 52"),
        ({"batch_size": 3}, 4, "batch size 3 cannot be shared by 4 ranks: 3 = 0 x 4 + 3; use 4"),
        ({"batch_size": 60, "streams": 48}, 5, "48 streams cannot be shared by 5 ranks: 48 = 9 x 5 + 3; use 45 or 50"),
    ],
)
def test_what_ranks_cannot_share_is_refused_with_the_arithmetic(
    settings: dict[str, object], ranks: int, words: str
) -> None:
    with pytest.raises(InputError, match=words.replace("+", r"\+")):
        build_loader(config(**settings), World(size=ranks))


@pytest.mark.parametrize(("ranks", "streams"), [(1, 48), (2, 48), (3, 48), (5, 50), (7, 49), (16, 48), (64, 64)])
def test_streams_default_to_48_or_the_next_multiple_of_the_ranks(ranks: int, streams: int) -> None:
    assert stream_count(config(batch_size=ranks * 2), World(size=ranks)) == streams


def test_threads_come_from_the_affinity_mask_and_are_shared_by_the_ranks_of_a_machine() -> None:
    assert thread_count(config(), World()) == available_cpus()
    assert thread_count(config(), World(size=2 * available_cpus())) == 1
    assert thread_count(config(), World(size=2 * available_cpus(), local_size=1)) == available_cpus()
    assert thread_count(config(threads=5), World(size=2)) == 5


def test_missing_sets_splits_and_odd_positions_are_refused(shards_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no shards here"):
        build_loader(config(tmp_path), World())
    with pytest.raises(InputError, match="no split 'testing'; it has: train, val, test"):
        build_loader(config(shards_dir, split="testing"), World())
    for position in (-64, 32):
        with pytest.raises(InputError, match=f"position {position} is not a multiple of the batch size 64"):
            build_loader(config(shards_dir), World(), position=position)


def test_an_hdf5_file_of_another_shape_is_refused(shards_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["cxr"] = np.zeros((3, 320, 320), dtype=np.float32)
    with pytest.raises(InputError, match=r"\(3, 320, 320\), the shards were made from \(96, 320, 320\)"):
        build_loader(config(shards_dir, backend="hdf5", h5=path), World())
    with pytest.raises(InputError, match="no HDF5 file"):
        build_loader(config(shards_dir, backend="hdf5", h5=tmp_path / "missing.h5"), World())


def other_films(images: np.ndarray, kind: str) -> np.ndarray:
    """A file of the same shape that the shards were not made from."""
    return {
        "random": lambda: np.random.default_rng(0).integers(0, 256, images.shape).astype(np.float32),
        "shifted": lambda: np.roll(images, 1, axis=0),
        "scaled": lambda: images / 255,
        "flipped": lambda: images[:, :, ::-1],
    }[kind]()


@pytest.mark.parametrize("kind", ["random", "shifted", "scaled", "flipped"])
def test_an_hdf5_file_of_other_films_is_refused(
    source: tuple[Path, Path], shards_dir: Path, tmp_path: Path, kind: str
) -> None:
    """The same shape is not enough; films are compared with the shards' before any is trained on."""
    with h5py.File(source[0]) as file:
        images = file["cxr"][:]
    path = write_h5(tmp_path / "other.h5", other_films(images, kind))
    with pytest.raises(InputError, match="row [0-9]+ of .*whole grey" if kind == "scaled" else "is not the film"):
        build_loader(config(shards_dir, backend="hdf5", h5=path), World())


def test_another_version_of_the_encoder_is_no_other_film(
    source: tuple[Path, Path], shards_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """simplejpeg's fast DCT in place of Pillow's gives other bytes of the same films."""

    def encode(pixels: np.ndarray, spec: ImageSpec) -> bytes:
        return simplejpeg.encode_jpeg(pixels[..., None], quality=spec.quality, colorspace="GRAY", fastdct=True)

    manifest = read_manifest(shards_dir)
    settings = config(shards_dir, backend="hdf5", h5=source[0])
    table = hdf5.read_split(settings, manifest)
    monkeypatch.setattr(hdf5, "encode", encode)
    compared = []
    monkeypatch.setattr(hdf5, "_alike", lambda *given, real=hdf5._alike: compared.append(real(*given)) or compared[-1])
    hdf5.check_films(settings, manifest, table)
    assert compared == [True] * hdf5.CHECKED_FILMS


def test_images_that_the_backends_do_not_read_are_refused(shards_dir: Path, tmp_path: Path) -> None:
    import shutil

    root = Path(shutil.copytree(shards_dir, tmp_path / "set"))
    manifest = root / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"channels": 1', '"channels": 3'))
    with pytest.raises(InputError, match="images of 3 channels"):
        build_loader(config(root), World())
