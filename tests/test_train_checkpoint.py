"""Checkpoint files: nothing damaged or foreign gets in, and a good one is always left."""

import io
import os
from pathlib import Path

import pytest
import torch
from xxhash import xxh3_128_hexdigest

from shards.errors import InputError
from train.checkpoint import (
    MAGIC,
    CheckpointWriter,
    DamagedCheckpoint,
    checkpoint_name,
    encode,
    list_checkpoints,
    newest_good,
    prune,
    read_checkpoint,
    read_verified,
)


def payload(step: int) -> dict:
    """Something like a checkpoint, small."""
    return {"step": step, "model": {"w": torch.arange(5.0) + step}, "best_loss": 0.1, "config": {"lr": [1, None, "x"]}}


def write(folder: Path, step: int) -> Path:
    """A good file."""
    path = folder / checkpoint_name(step)
    path.write_bytes(encode(payload(step)))
    return path


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    back = read_checkpoint(write(tmp_path, 3))
    assert back["model"].pop("w").equal(torch.arange(5.0) + 3)
    assert back == {"step": 3, "model": {}, "best_loss": 0.1, "config": {"lr": [1, None, "x"]}}


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    content = path.read_bytes()
    places = [*range(120), *range(120, len(content), 13), len(content) - 1]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(DamagedCheckpoint):
            read_verified(path)


def test_every_cut_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    content = path.read_bytes()
    for length in [*range(0, len(content), len(content) // 100), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(DamagedCheckpoint):
            read_checkpoint(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(DamagedCheckpoint):
        read_checkpoint(path)


def test_a_later_version_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    path.write_bytes(path.read_bytes().replace(f"{MAGIC} 1".encode(), f"{MAGIC} 2".encode(), 1))
    with pytest.raises(DamagedCheckpoint, match="version 2"):
        read_checkpoint(path)


class _Payload:
    """Unpickled, it would leave a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_payload_does_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / checkpoint_name(1)
    buffer = io.BytesIO()
    torch.save({"step": 1, "model": _Payload(marker)}, buffer)
    content = buffer.getvalue()
    path.write_bytes(f"{MAGIC} 1 {xxh3_128_hexdigest(content)} {len(content)}\n".encode() + content)
    with pytest.raises(DamagedCheckpoint, match="more than tensors"):
        read_checkpoint(path)
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="not a checkpoint"):
        read_checkpoint(path)
    assert not marker.exists()


def test_newest_good_falls_back_and_says_so(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "absent", warn=lambda _: None) is None
    write(tmp_path, 10)
    write(tmp_path, 20)
    write(tmp_path, 30).write_bytes(b"")
    (tmp_path / ".tmp-step-0000040.pt").write_bytes(b"half")
    warnings: list[str] = []
    found = newest_good(tmp_path, warnings.append)
    assert found is not None and found[1]["step"] == 20
    assert len(warnings) == 1 and "step-0000030.pt" in warnings[0]


def test_none_good_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10).write_bytes(b"x")
    with pytest.raises(InputError, match="none of the 1 checkpoints"):
        newest_good(tmp_path, warn=lambda _: None)


def test_pruning_counts_good_ones_only(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    (tmp_path / checkpoint_name(40)).write_bytes(b"damaged")
    prune(tmp_path, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [40, 30, 20]


def test_the_writer_keeps_newest_and_best(tmp_path: Path) -> None:
    folder, best = tmp_path / "checkpoints", tmp_path / "best.pt"
    folder.mkdir()
    writer = CheckpointWriter(folder, keep=2, best=best)
    for step in (1, 2, 3, 4):
        writer.write(payload(step), is_best=step == 2)
    writer.close()
    assert [step for step, _ in list_checkpoints(folder)] == [4, 3]
    assert read_checkpoint(best)["step"] == 2
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_failed_write_is_said_and_leaves_the_older_ones(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    write(folder, 1)
    (folder / ".tmp-step-0000002.pt").mkdir()  # where the temporary file would go
    writer = CheckpointWriter(folder, keep=1, best=tmp_path / "best.pt")
    writer.write(payload(2), is_best=False)
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*step-0000002"):
        writer.close()
    assert [step for step, _ in list_checkpoints(folder)] == [1]
