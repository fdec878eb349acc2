"""Lossless shards through the loader: every codec and backend hands out what the pixels themselves would give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import made_up_images, write_csv, write_h5

from ingest.config import IngestConfig
from ingest.run import ingest
from pipeline.batch import World
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
from shards.encodings import ENCODINGS
from shards.errors import InputError

LOSSLESS = [name for name, encoding in ENCODINGS.items() if encoding.lossless]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("source")
    table = write_csv(folder / "a.csv", ["impression"], [[f"Film {i}"] for i in range(24)])
    return write_h5(folder / "a.h5", made_up_images(24).astype(np.float32)), table


@pytest.fixture(scope="module")
def sets(source: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    for codec in LOSSLESS:
        config = IngestConfig(to_shards=folder / codec, h5=(source[0],), csv=(source[1],), workers=1, encoding=codec)
        ingest(config)
    return {codec: folder / codec for codec in LOSSLESS}


def images(root: Path, backend: str, h5: Path | None = None) -> torch.Tensor:
    config = LoaderConfig(shards=root, backend=backend, batch_size=24, threads=1, h5=h5)
    with build_loader(config, World()) as loader:
        return next(loader).images.clone()


@pytest.mark.parametrize("codec", LOSSLESS)
def test_cpu_equals_the_hdf5_file_exactly(sets: dict[str, Path], source: tuple[Path, Path], codec: str) -> None:
    """`hdf5-tuned` takes the same way from the same grey levels, so nothing may differ but the order of sums."""
    difference = (images(sets[codec], "cpu") - images(sets[codec], "hdf5-tuned", source[0])).abs().max()
    assert difference <= 1e-5


@pytest.mark.parametrize("codec", LOSSLESS)
def test_dali_reads_it_too(sets: dict[str, Path], codec: str) -> None:
    pytest.importorskip("nvidia.dali")
    grey = (images(sets[codec], "dali") - images(sets[codec], "cpu")).abs() * 255 * 0.27
    assert grey.mean() <= 0.25 and (grey <= 1.05).float().mean() >= 0.999


def test_a_raw_image_of_another_size_is_named(sets: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    root = Path(shutil.copytree(sets["raw"], tmp_path / "set"))
    manifest = root / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"height": 320', '"height": 300'))
    for backend in ("cpu", "dali"):
        with pytest.raises(InputError, match="train-000000: image 00-"):
            images(root, backend)
