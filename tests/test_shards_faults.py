"""Damage of every kind to a data set: `verify` finds all of it, opening a shard what shows without reading it all."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from conftest import assert_refused, run_module

from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import ShardReader
from shards.verify import verify


@pytest.fixture
def copy(shards_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards_dir, tmp_path / "set"))


def problems(root: Path) -> list[str]:
    return [problem for _, problem in verify(root) if problem]


def test_whole_set_is_sound(shards_dir: Path) -> None:
    assert problems(shards_dir) == []
    assert len(read_manifest(shards_dir).splits["train"]) >= 3


@pytest.mark.parametrize("suffix", ["tar", "idx", "parquet"])
@pytest.mark.parametrize("place", [0.0, 0.1, 0.35, 0.5, 0.77, 0.999])
def test_any_flipped_bit_is_found(copy: Path, suffix: str, place: float) -> None:
    path = copy / f"train-000001.{suffix}"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)
    found = problems(copy)
    assert len(found) == 1 and "train-000001" in found[0]


def test_consistent_lies_are_found(copy: Path) -> None:
    """A tar swapped for another shard's, digests and all, still does not hold what the table says."""
    for suffix in ("tar", "idx"):
        shutil.copy(copy / f"val-000000.{suffix}", copy / f"test-000000.{suffix}")
    text = (copy / "manifest.json").read_text()
    manifest = read_manifest(copy)
    val, test = manifest.splits["val"][0], manifest.splits["test"][0]
    for mine, theirs in ((test.tar, val.tar), (test.idx, val.idx)):
        text = text.replace(
            f'"bytes": {mine.bytes},\n     "xxh3": "{mine.xxh3}"',
            f'"bytes": {theirs.bytes},\n     "xxh3": "{theirs.xxh3}"',
        )
    (copy / "manifest.json").write_text(text)
    assert read_manifest(copy).splits["test"][0].tar == val.tar
    assert any("test-000000" in problem for problem in problems(copy))


@pytest.mark.parametrize("suffix", ["tar", "idx", "parquet"])
def test_a_digest_that_is_not_its_files_is_found(copy: Path, suffix: str) -> None:
    """The files are right, but whoever goes by the manifest, as a copier to a node does, takes none of them."""
    digest = getattr(read_manifest(copy).splits["train"][0], suffix).xxh3
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace(digest, digest[::-1]))
    [found] = problems(copy)
    assert f"train-000000.{suffix} changed after ingest" in found


def test_stray_and_missing_files_are_found(copy: Path) -> None:
    (copy / "train-000099.tar").write_bytes(b"")
    (copy / "train-000000.idx").unlink()
    found = problems(copy)
    assert any("train-000099.tar" in problem for problem in found)
    assert any("cannot read train-000000.idx" in problem for problem in found)


@pytest.mark.parametrize("suffix", ["tar", "idx", "parquet"])
def test_opening_notices_a_changed_size(copy: Path, suffix: str) -> None:
    with open(copy / f"train-000000.{suffix}", "ab") as file:
        file.write(b"x")
    manifest = read_manifest(copy)
    with pytest.raises(InputError, match=r"train-000000.*changed after ingest"):
        ShardReader(copy, manifest, manifest.splits["train"][0])


def test_reading_notices_a_patient_of_another_split(shards_dir: Path) -> None:
    """By the manifest's ranges, so that no loader trains on a patient of val."""
    manifest = read_manifest(shards_dir)
    first, end = manifest.groups["train"]
    narrower = dataclasses.replace(manifest, groups={**manifest.groups, "train": (first + 1, end)})
    with pytest.raises(InputError, match="holds a group of another split"):
        for info in narrower.splits["train"]:
            with ShardReader(shards_dir, narrower, info) as reader:
                for block in range(reader.blocks):
                    reader.read_rows(block)


def test_opening_notices_another_footer(copy: Path) -> None:
    path = copy / "train-000000.parquet"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    manifest = read_manifest(copy)
    with pytest.raises(InputError, match=r"train-000000.*footer"):
        ShardReader(copy, manifest, manifest.splits["train"][0])


def test_reading_notices_a_flipped_bit_in_a_page(copy: Path) -> None:
    path = copy / "train-000000.parquet"
    content = bytearray(path.read_bytes())
    manifest = read_manifest(copy)
    info = manifest.splits["train"][0]
    # Flip a bit in every 97th byte of the pages: whichever page it hits, its checksum must say so.
    for place in range(8, len(content) - info.footer_bytes, 97):
        content[place] ^= 16
    path.write_bytes(content)
    with ShardReader(copy, manifest, info) as reader, pytest.raises(InputError, match="train-000000: block 0"):
        reader.read_rows(0)


def test_commands(copy: Path) -> None:
    done = run_module("shards", "verify", copy)
    assert done.returncode == 0 and "every byte as ingested" in done.stdout, done.stderr
    done = run_module("shards", "inspect", copy)
    assert "320 x 320 x 1" in done.stdout and "Cardiomegaly" in done.stdout
    key = "00-0000000001"
    done = run_module("shards", "inspect", copy, "--sample", key)
    assert key in done.stdout and "right effusion" in done.stdout
    content = bytearray((copy / "val-000000.tar").read_bytes())
    content[700] ^= 1
    (copy / "val-000000.tar").write_bytes(content)
    assert_refused(run_module("shards", "verify", copy), "val-000000")
    assert_refused(run_module("shards", "verify", copy / "nowhere"), "manifest.json")
    assert_refused(run_module("shards", "frobnicate", copy), "unknown command 'frobnicate'")
    assert_refused(run_module("shards", "inspect", copy, "--sample", "nope"), "no sample 'nope'")
