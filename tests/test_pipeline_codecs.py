"""Lossless shards through the loader: every codec and backend hands out what the pixels themselves would give."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import made_up_images, write_csv, write_h5
from PIL import Image

from ingest.config import IngestConfig
from ingest.run import ingest
from pipeline import visits
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
    for codec in ENCODINGS:
        config = IngestConfig(to_shards=folder / codec, h5=(source[0],), csv=(source[1],), workers=1, encoding=codec)
        ingest(config)
    return {codec: folder / codec for codec in ENCODINGS}


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


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts bytes in the place of each shard's row 2, as if ingest had written them: the digest is right."""
    read, bytes_ = visits.read_images, [np.empty(0, dtype=np.uint8)]

    def swapped(*arguments: object) -> tuple[np.ndarray, list[np.ndarray]]:
        buffer, images = read(*arguments)  # type: ignore[arg-type]
        for index in np.flatnonzero(arguments[1]["row"] == 2).tolist():  # type: ignore[index]
            images[index] = bytes_[0]
            arguments[1]["address"][index] = bytes_[0].ctypes.data  # type: ignore[index]
            arguments[1]["size"][index] = len(bytes_[0])  # type: ignore[index]
        return buffer, images

    def put(content: bytes) -> None:
        bytes_[0] = np.frombuffer(content, dtype=np.uint8)

    monkeypatch.setattr(visits, "read_images", swapped)
    monkeypatch.setattr(visits, "find_damaged", lambda *_: [])
    return put


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels, it says."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000)))]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [*parts, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


FILM = Image.fromarray(made_up_images(1)[0])
STRANGE = {
    "png of 16 bits": ("png", saved(Image.fromarray(np.asarray(FILM, np.uint16) * 257), "PNG")),
    "larger png": ("png", saved(FILM.resize((400, 400)), "PNG")),
    "smaller png": ("png", saved(FILM.resize((160, 160)), "PNG")),
    "png bomb": ("png", bomb()),
    "jpeg for png": ("png", saved(FILM, "JPEG")),
    "smaller webp": ("webp", saved(FILM.resize((160, 160)), "WEBP")),
    "smaller jpeg2k": ("jpeg2k", saved(FILM.resize((160, 160)), "JPEG2000")),
    "CMYK jpeg": ("jpeg", saved(FILM.convert("CMYK"), "JPEG")),
    "huge jpeg": ("jpeg", saved(FILM, "JPEG").replace(struct.pack(">HH", 320, 320), b"\xff\xdc" * 2, 1)),
}


@pytest.mark.parametrize("backend", ["cpu", "dali"])
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_film_of_the_set_is_named(
    sets: dict[str, Path], swap: Callable[[bytes], None], kind: str, backend: str
) -> None:
    """A larger PNG was cropped by DALI as if it were a film, one of 16 bits was white on the CPU; smaller ones and
    bombs ended in tracebacks."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    codec, content = STRANGE[kind]
    swap(content)
    with pytest.raises(InputError, match=r"train-000000: image 00-\d+ .*cannot be decoded") as error:
        images(sets[codec], backend)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_the_reason_why_a_sample_is_bad_is_the_same_in_every_run(
    sets: dict[str, Path], swap: Callable[[bytes], None], backend: str
) -> None:
    """It goes into checkpoints. Pillow's had an address in memory."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    swap(bytes(500))
    config = LoaderConfig(shards=sets["png"], backend=backend, batch_size=24, threads=1, max_bad=1)
    found = []
    for _ in range(2):
        with build_loader(config, World()) as loader:
            next(loader)
            found.append(loader.bad_samples())
    assert [bad["why"] for bad in found[0]] == ["cannot be decoded (not a PNG image)"] and found[0] == found[1]
