"""`--encoding auto`: what it picks, that it is the same everywhere and after a kill, and that it says why."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, SIZE, assert_refused, made_up_images, run_module, write_csv, write_h5
from PIL import Image, ImageFilter

from ingest.config import IngestConfig
from ingest.inputs import Inputs, read_inputs
from ingest.run import ingest
from ingest.trial import FILMS, LOSSLESS, Trial, pick, sample, settle, try_codec
from shards.encodings import ENCODINGS, Loss, loss
from shards.errors import InputError
from shards.manifest import read_manifest

INJECTED = Path(__file__).parent / "injected"


def film_like(count: int) -> np.ndarray:
    """(count, 320, 320) uint8: soft shapes with fine noise, no more than a film has after it was made smaller."""
    blur = ImageFilter.GaussianBlur(1)
    return np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in made_up_images(count)])


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE), dtype=np.uint8)


def two_levels(count: int) -> np.ndarray:
    """White dots at random on black: every codec without loss beats JPEG."""
    return (np.random.default_rng(0).integers(0, 8, (count, SIZE, SIZE)) == 0).astype(np.uint8) * 255


def drawn(count: int) -> np.ndarray:
    """Flat shapes with sharp edges."""
    row, column = np.indices((SIZE, SIZE)) // 16
    return np.stack([((row * 37 + column * 11 * (number + 1)) % 251).astype(np.uint8) for number in range(count)])


def command_of(folder: Path, images: np.ndarray) -> list[str]:
    h5 = write_h5(folder / "a.h5", images)
    table = write_csv(folder / "a.csv", ["impression"], [[f"Film {row}"] for row in range(len(images))])
    return ["--h5", str(h5), "--csv", str(table), "--encoding", "auto"]


def config_of(folder: Path, images: np.ndarray, **changes) -> IngestConfig:
    folder.mkdir(parents=True, exist_ok=True)
    _, h5, _, table, *_ = command_of(folder, images)
    fields = {"to_shards": folder / "out", "h5": (Path(h5),), "csv": (Path(table),), "encoding": "auto", "workers": 1}
    return IngestConfig(**fields | changes)


def picked(config: IngestConfig) -> tuple[str, list[str]]:
    settled, lines = settle(config, read_inputs(config))
    return settled.encoding, lines


class TestPick:
    @pytest.mark.parametrize(
        ("make", "codec", "why"),
        [
            (film_like, "jpeg", "of what"),
            (noise, "raw", "jpeg would"),
            (two_levels, "webp", "jpeg would take"),
            (drawn, "webp", "jpeg would take"),
        ],
    )
    def test_of_pixels(self, tmp_path: Path, make, codec: str, why: str) -> None:
        found, lines = picked(config_of(tmp_path, make(6)))
        assert found == codec
        assert lines[-1].startswith(f"--encoding auto takes {codec}: ") and why in lines[-1]
        assert [line.split()[0] for line in lines[2:-1]] == ["jpeg", *LOSSLESS]

    def test_of_real_films(self, real_data: Path) -> None:
        films = real_data / "chexzero"
        settings = {"to_shards": films / "none", "h5": (films / "cxr.h5",), "csv": (films / "impressions.csv",)}
        assert picked(IngestConfig(**settings, encoding="auto"))[0] == "jpeg"
        found, lines = picked(IngestConfig(**settings, encoding="auto", quality=75))
        assert found == "webp" and "grey levels on average" in lines[-1]

    def test_time_does_not_count(self) -> None:
        """However slow a codec was, the pick is that of bytes and pixels."""
        for slow in ("jpeg", *LOSSLESS):
            trials = {codec: trial(codec, encode_s=9 if codec == slow else 0) for codec in ("jpeg", *LOSSLESS)}
            assert pick(trials)[0] == "jpeg"

    @pytest.mark.parametrize(
        ("sizes", "codec"),
        [
            ({"raw": 100, "png": 91, "webp": 88, "jpeg2k": 67}, "raw"),
            ({"raw": 100, "png": 90, "webp": 90, "jpeg2k": 90}, "png"),
            ({"raw": 100, "png": 40, "webp": 39, "jpeg2k": 31}, "png"),
            ({"raw": 100, "png": 40, "webp": 38, "jpeg2k": 30}, "webp"),
            ({"raw": 100, "png": 40, "webp": 38, "jpeg2k": 28}, "jpeg2k"),
        ],
    )
    def test_a_codec_that_decodes_slower_has_to_save(self, sizes: dict[str, int], codec: str) -> None:
        trials = {name: trial(name, size=size) for name, size in sizes.items()}
        assert pick(trials | {"jpeg": trial("jpeg", size=99)})[0] == codec
        assert pick(trials | {"jpeg": trial("jpeg", size=sizes[codec] * 0.75)})[0] == "jpeg"

    @pytest.mark.parametrize(("moved", "codec"), [((0.4, 0.6), "jpeg"), ((0.4, 0.62), "webp"), ((0, 0, 1.1), "webp")])
    def test_jpeg_must_not_move_pixels(self, moved: tuple[float, ...], codec: str) -> None:
        losses = tuple(Loss(error=1, resized_error=1, resized_difference=each) for each in moved)
        trials = {name: trial(name) for name in LOSSLESS} | {"jpeg": trial("jpeg", losses=losses)}
        assert pick(trials)[0] == codec


def trial(codec: str, **changes) -> Trial:
    sizes = {"jpeg": 20, "raw": 100, "png": 40, "webp": 36, "jpeg2k": 35}
    nothing = (Loss(error=0, resized_error=0, resized_difference=0),)
    return Trial(**{"codec": codec, "size": sizes[codec], "encode_s": 0, "decode_s": 0, "losses": nothing} | changes)


class TestSample:
    def test_evenly_over_all_sources(self, tmp_path: Path) -> None:
        """Rows without a report and films that show nothing are left out; each source has its share."""
        images = np.zeros((300, 8, 8), dtype=np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.arange(300) // 256, np.arange(300) % 256
        images[:, 1, 1] = 255
        images[299] = 0
        write_h5(tmp_path / "a.h5", images[:100])
        write_h5(tmp_path / "b.h5", images[100:])
        write_csv(tmp_path / "a.csv", ["impression"], [[f"Film {row}"] for row in range(100)])
        write_csv(
            tmp_path / "b.csv", ["impression"], [["Film" if row < 100 or row == 199 else ""] for row in range(200)]
        )
        (tmp_path / "s.toml").write_text("".join(f'[[source]]\nh5 = "{n}.h5"\ncsv = "{n}.csv"\n' for n in "ab"))
        inputs = read_inputs(IngestConfig(to_shards=tmp_path / "out", sources=tmp_path / "s.toml"))
        rows = rows_of(inputs)
        assert rows == rows_of(inputs) and len(rows) == len(set(rows)) == FILMS
        assert max(rows) < 200 and max(np.diff(rows)) <= 5
        assert sum(row < 100 for row in rows) == FILMS // 2

    def test_of_a_folder(self, tmp_path: Path) -> None:
        """Missing and damaged files are left out; the same films come out whatever the file holds besides."""
        for number, image in enumerate(made_up_images(4)):
            Image.fromarray(image).save(tmp_path / f"{number}.png")
        (tmp_path / "2.png").write_bytes(b"no film")
        names = ["0.png", "1.png", "2.png", "3.png", "4.png"]
        table = write_csv(tmp_path / "a.csv", ["Path", "impression"], [[name, "Film"] for name in names])
        config = IngestConfig(to_shards=tmp_path / "out", images=tmp_path, csv=(table,))
        found = list(sample(read_inputs(config)))
        assert len(found) == 3 and all(
            (film == made_up_images(4)[row]).all() for film, row in zip(found, (0, 1, 3), strict=True)
        )

    def test_nothing_to_try(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="name an encoding"):
            picked(config_of(tmp_path, np.zeros((4, SIZE, SIZE), dtype=np.uint8)))


def rows_of(inputs: Inputs) -> list[int]:
    return [int(film[0, 0]) * 256 + int(film[0, 1]) for film in sample(inputs)]


def test_a_named_encoding_is_left_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path, noise(2), encoding="png")
    assert settle(config, read_inputs(config)) == (config, [])


def test_trials_tell_the_truth() -> None:
    films = list(film_like(3))
    for codec in ("jpeg", *LOSSLESS):
        found = try_codec(codec, films, 95)
        assert (found.psnr == np.inf) == ENCODINGS[codec].lossless == (found.worst == 0)
        assert found.size > 0 and found.encode_s > 0 and found.decode_s > 0
    assert try_codec("raw", films, 95).size == SIZE * SIZE


def test_loss() -> None:
    grey = np.full((SIZE, SIZE), 100, dtype=np.uint8)
    assert loss(grey, grey) == Loss(error=0, resized_error=0, resized_difference=0)
    assert loss(grey, grey - 3) == loss(grey - 3, grey) == Loss(error=9, resized_error=9, resized_difference=3)


def test_worker_count_and_auto_change_nothing(tmp_path: Path) -> None:
    """The shards are those of the codec, named by hand, whatever the worker count."""
    sets = {}
    for name, changes in {"1": {}, "2": {"workers": 2}, "named": {"encoding": "jpeg"}}.items():
        config = config_of(tmp_path, film_like(24), to_shards=tmp_path / name, **changes)
        ingest(config)
        sets[name] = read_manifest(config.to_shards)
    assert sets["1"] == sets["2"] == sets["named"] and sets["1"].image.codec == "jpeg"


def test_said_by_dry_run_and_run(tmp_path: Path) -> None:
    command = ["ingest", "--to-shards", tmp_path / "out", *command_of(tmp_path, two_levels(6))]
    for done in (run_module(*command, "--dry-run"), run_module(*command)):
        assert done.returncode == 0, done.stderr
        assert "tried on 6 films" in done.stdout
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("--encoding auto takes")]
        assert line.startswith("--encoding auto takes webp: jpeg would take ")
    assert read_manifest(tmp_path / "out").image.codec == "webp"


def test_goes_on_after_a_kill(tmp_path: Path) -> None:
    """What was begun with `auto` goes on with it, or with the codec by name, and with no other."""
    config = config_of(tmp_path, film_like(24), to_shards=tmp_path / "whole")
    ingest(config)
    expected = (tmp_path / "whole" / "manifest.json").read_bytes()
    command = ["ingest", *command_of(tmp_path, film_like(24)), "--workers", "1"]
    out = tmp_path / "auto"
    environment = {"PYTHONPATH": str(INJECTED), "SHARDCLIP_FAULT": "kill:6", "SHARDCLIP_COUNT": str(tmp_path / "count")}
    killed = subprocess.run(
        [sys.executable, "-m", *command, "--to-shards", str(out)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        start_new_session=True,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    assert json.loads((out / ".ingest" / "inputs.json").read_bytes())["encoding"] == "jpeg"
    (out / ".ingest" / "0000000000.spill").touch()  # as a kill a moment later and a power loss leave it
    assert_refused(run_module(*command, "--to-shards", out, "--encoding", "png"), "another --encoding")
    shutil.copytree(out, tmp_path / "jpeg")
    for encoding in ("auto", "jpeg"):
        done = run_module(*command, "--to-shards", tmp_path / encoding, "--encoding", encoding)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / encoding / "manifest.json").read_bytes() == expected
