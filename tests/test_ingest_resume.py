"""What a rerun believes of what an interrupted ingest left: digests, not names and sizes (I2); the same films (I12)."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, assert_refused, made_up_images, run_module, write_csv, write_h5
from PIL import Image

from ingest.config import IngestConfig
from ingest.run import ingest
from ingest.trial import dry_run
from shards.errors import InputError

INJECTED = Path(__file__).parent / "injected"


def config(folder: Path, out: Path) -> IngestConfig:
    return IngestConfig(
        to_shards=out, h5=(folder / "a.h5",), csv=(folder / "a.csv",), val_fraction=0.25, shard_mb=0.25, workers=1
    )


def content(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


def everything(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def killed(folder: Path, out: Path, step: int) -> None:
    """An ingest that dies, with all its processes, at a durable step."""
    (folder / "count").unlink(missing_ok=True)
    command = "ingest", "--h5", "a.h5", "--csv", "a.csv", "--val-fraction", "0.25", "--shard-mb", "0.25"
    done = subprocess.run(
        [sys.executable, "-m", *command, "--workers", "1", "--to-shards", str(out)],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": f"{INJECTED}:{REPOSITORY}",
            "SHARDCLIP_FAULT": f"kill:{step}",
            "SHARDCLIP_COUNT": str(folder / "count"),
        },
        start_new_session=True,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """Folder of the inputs, what an ingest killed in its last shard left, and what it should have made."""
    folder = tmp_path_factory.mktemp("left")
    write_h5(folder / "a.h5", made_up_images(96))
    write_csv(folder / "a.csv", ["impression"], [[f"Film {i}, no effusion."] for i in range(96)])
    ingest(config(folder, folder / "whole"))
    killed(folder, folder / "out", 44)
    names = {path.name for path in (folder / "out" / ".ingest").iterdir()}
    assert {"0000000000.spill", "0000000064.spill", "rows.bin", "rows.json", "texts.bin", "train-000000.json"} <= names
    assert not (folder / "out" / "manifest.json").exists()
    return folder, folder / "out", content(folder / "whole")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [zero, cut, empty])
@pytest.mark.parametrize(
    "name",
    [
        ".ingest/0000000064.spill",
        ".ingest/rows.bin",
        ".ingest/texts.bin",
        ".ingest/rows.json",
        ".ingest/train-000000.json",
        "train-000000.tar",
        "train-000000.parquet",
        "train-000000.idx",
    ],
)
def test_power_loss(
    left: tuple[Path, Path, dict[str, bytes]], tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """I2: a file that lost its content is made again, the others are kept, the result is the same."""
    folder, out, expected = left
    again = shutil.copytree(out, tmp_path / "again")
    damage(again / name)
    shards = {path.name: path.stat().st_mtime_ns for path in again.glob("t*.tar")}
    ingest(config(folder, again))
    assert content(again) == expected
    kept = {path.name for path in again.glob("t*.tar") if shards.get(path.name) == path.stat().st_mtime_ns}
    lost = {"train-000000.tar"} if "train-000000" in name else set()
    assert kept == set(shards) - lost


def test_only_the_damaged_spill_is_made_again(left: tuple[Path, Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, out, _ = left
    again = shutil.copytree(out, tmp_path / "again")
    spills = sorted((again / ".ingest").glob("0*.spill"))
    zero(spills[1])
    before = [path.stat().st_mtime_ns for path in spills]
    killed(folder, again, 9)  # after the spill, before the end
    assert [path.stat().st_mtime_ns == time for path, time in zip(spills, before, strict=True)] == [True, False]


def test_dry_run_says_whether_the_ingest_would_go_on(left: tuple[Path, Path, dict[str, bytes]], tmp_path: Path) -> None:
    """By the encoding that `auto` takes, too, which is another one here."""
    folder, out, _ = left
    again = shutil.copytree(out, tmp_path / "again")
    before, same = everything(again), config(folder, again)
    assert f"{again} holds this same ingest, unfinished" in next(dry_run(same))
    assert not any("unfinished" in line for line in dry_run(config(folder, tmp_path / "new")))
    others = {"--seed": {"seed": 1}, "--val-fraction": {"val_fraction": 0.5}, "--encoding": {"encoding": "auto"}}
    for flag, other in others.items():
        with pytest.raises(InputError, match=f"holds an interrupted ingest with another {flag};") as refused:
            list(dry_run(replace(same, **other)))
        assert everything(again) == before
        copy = shutil.copytree(again, tmp_path / flag)
        with pytest.raises(InputError, match=re.escape(str(refused.value).replace(str(again), str(copy)))):
            ingest(replace(same, to_shards=copy, **other))
    (tmp_path / "refused" / ".ingest").mkdir(parents=True)
    (tmp_path / "refused" / ".ingest" / "inputs.json").write_text("{}")  # of one that was refused before a film
    assert not any("unfinished" in line for line in dry_run(config(folder, tmp_path / "refused")))


def test_a_film_that_changes_is_noticed(tmp_path: Path) -> None:
    """I12: another image file under the same name is no longer the same ingest."""
    images = made_up_images(80)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    table = write_csv(tmp_path / "a.csv", ["Path", "impression"], [[f"{i}.png", f"Film {i}"] for i in range(80)])
    command = "ingest", "--images", tmp_path, "--csv", table, "--workers", "1", "--to-shards", tmp_path / "out"
    environment = {"PYTHONPATH": str(INJECTED), "SHARDCLIP_FAULT": "eio:25", "SHARDCLIP_COUNT": str(tmp_path / "count")}
    assert_refused(run_module(*command, **environment), "cannot write")
    assert list((tmp_path / "out" / ".ingest").glob("*.spill"))
    Image.fromarray(255 - images[3]).save(tmp_path / "3.png")
    assert_refused(run_module(*command), "image files of rows 0 to 63 changed")
    Image.fromarray(np.zeros((320, 320), np.uint8)).save(tmp_path / "3.png")
    shutil.rmtree(tmp_path / "out")
    assert run_module(*command).returncode == 0


def test_a_file_of_reports_that_changes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I12: shards that are finished hold the old report."""
    for row in range(8):
        (tmp_path / f"{row}.txt").write_text(f"Film {row}, no effusion.")
    settings = IngestConfig(
        to_shards=tmp_path / "out",
        h5=(write_h5(tmp_path / "a.h5", made_up_images(8)),),
        csv=(write_csv(tmp_path / "a.csv", ["file"], [[f"{row}.txt"] for row in range(8)]),),
        text_column="file",
        text_folder=tmp_path,
        workers=1,
    )

    def stop(*_: object) -> None:
        raise InputError("stopped between the phases")

    with monkeypatch.context() as patched, pytest.raises(InputError, match="between the phases"):
        patched.setattr("ingest.run.shard_tasks", stop)
        ingest(settings)
    (tmp_path / "3.txt").write_text("Film 3, large effusion.")
    with pytest.raises(InputError, match="reports changed since this ingest was begun"):
        ingest(settings)
    (tmp_path / "3.txt").write_text("Film 3, no effusion.")
    assert ingest(settings).samples == 8
