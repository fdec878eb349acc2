"""The encodings bench: its bytes are those of real shards, its losses follow from the codec."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_module

from bench.encodings import EncodingsBenchConfig, read_films, summary
from ingest.trial import try_codec
from shards.encodings import ENCODINGS
from shards.errors import InputError
from shards.schema import CODEC_EXTENSIONS


@pytest.fixture(scope="module")
def result(source: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The command's JSON for a file."""
    path = tmp_path_factory.mktemp("bench") / "r.json"
    flags = ["--films", "8", "--rounds", "1", "--qualities", "50", "95", "--json", path]
    done = run_module("bench.encodings", "--h5", source[0], "--names", "file", *flags)
    assert done.returncode == 0, done.stderr
    assert "file: 8 films" in done.stdout and "jpeg 50" in done.stdout
    return json.loads(path.read_bytes())


def test_every_codec_of_every_input(result: dict[str, Any]) -> None:
    names = ["jpeg 50", "jpeg 95", *(codec for codec in CODEC_EXTENSIONS if ENCODINGS[codec].lossless)]
    for found in result["inputs"]:
        assert [row["name"] for row in found["encodings"]] == names
        for row in found["encodings"]:
            assert row["encode_ms"] >= 0 and row["decode_ms"] >= 0
            assert row["bytes"] + 512 + 2048 <= row["tar_bytes"] <= row["bytes"] + 1024 + 2048


def test_what_is_lost(result: dict[str, Any]) -> None:
    for found in result["inputs"]:
        rows = {row["name"]: row for row in found["encodings"]}
        assert rows["raw"]["bytes"] == 320 * 320
        assert all(
            rows[name]["psnr"] is None and rows[name]["resized_difference"] == 0 for name in ("png", "webp", "jpeg2k")
        )
        coarse, fine = rows["jpeg 50"], rows["jpeg 95"]
        assert coarse["bytes"] < fine["bytes"] < rows["png"]["bytes"]
        assert coarse["psnr"] < fine["psnr"] and coarse["resized_psnr"] < fine["resized_psnr"]
        assert coarse["resized_difference"] > fine["resized_difference"] > 0
        assert fine["resized_difference"] <= fine["resized_difference_worst"]


def test_bytes_are_those_of_shards(source: tuple[Path, Path], shards_dir: Path) -> None:
    """What the bench counts for a sample in the tar is what ingested tars hold, end and all."""
    from shards.manifest import read_manifest

    manifest = read_manifest(shards_dir)
    infos = [info for shards in manifest.splits.values() for info in shards]
    given = read_films(source[0], 96)
    jpeg = summary([try_codec("jpeg", given, 95)])
    assert len(given) == sum(info.rows for info in infos) == 96
    assert jpeg["tar_bytes"] * 96 == pytest.approx(sum(info.tar.bytes - 1024 for info in infos), rel=0.01)


def test_films_are_spread(source: tuple[Path, Path]) -> None:
    few, all_of_them = (read_films(source[0], wanted) for wanted in (4, 1000))
    assert len(all_of_them) == 96
    assert all((film == all_of_them[row]).all() for film, row in zip(few, (0, 24, 48, 72), strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "name the files of films"),
        ({"h5": (Path("a.h5"),), "names": ("a", "b")}, "2 names to 1"),
        ({"h5": (Path("a.h5"),), "rounds": 0}, "--rounds 0"),
        ({"h5": (Path("a.h5"),), "qualities": (101,)}, "--qualities 101"),
    ],
)
def test_mistakes(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        EncodingsBenchConfig(**settings)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InputError, match="no HDF5 file"):
        read_films(Path("no-such.h5"), 1)
