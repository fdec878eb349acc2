"""Checkpoint files: nothing damaged or foreign gets in, and a good one is always left."""

import io
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from xxhash import xxh3_128_hexdigest

from shards.errors import InputError
from train.checkpoint import (
    MAGIC,
    VERSION,
    DamagedCheckpoint,
    checkpoint_name,
    list_checkpoints,
    newest_good,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from train.config import OptimConfig, TrainConfig
from train.optim import build_optimizer
from train.ranks import Ranks
from train.resume import check_optimizer, check_progress, check_weights
from train.rundir import LeaseLost
from train.saving import CheckpointWriter, Shelf
from train.state import Learner, Progress, capture, restore


def payload(step: int) -> dict:
    """Something like a checkpoint, small."""
    return {"step": step, "model": {"w": torch.arange(5.0) + step}, "best_loss": 0.1, "config": {"lr": [1, None, "x"]}}


def write(folder: Path, step: int) -> Path:
    """A good file."""
    path = folder / checkpoint_name(step)
    write_checkpoint(path, payload(step))
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
            verify_checkpoint(path)


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


def test_another_version_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    content = path.read_bytes()
    for other in (VERSION + 1, VERSION - 1):
        path.write_bytes(content.replace(f"{MAGIC} {VERSION}".encode(), f"{MAGIC} {other}".encode(), 1))
        with pytest.raises(DamagedCheckpoint, match=f"version {other}"):
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
    path.write_bytes(f"{MAGIC} {VERSION} {xxh3_128_hexdigest(content)} {len(content):020d}\n".encode() + content)
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
    assert len(warnings) == 1 and "step-0000030.pt" in warnings[0] and "an older one is taken" in warnings[0]


def test_none_good_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10).write_bytes(b"x")
    with pytest.raises(InputError, match="none of the 1 checkpoints"):
        newest_good(tmp_path, warn=lambda _: None)


def test_an_older_one_is_taken_where_check_refuses(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path, step)

    def only_10(payload: dict) -> None:
        if payload["step"] != 10:
            raise InputError("of another run")

    warnings: list[str] = []
    found = newest_good(tmp_path, warnings.append, check=only_10)
    assert found is not None and found[1]["step"] == 10 and "of another run" in warnings[0]
    (tmp_path / checkpoint_name(10)).write_bytes(b"")
    with pytest.raises(InputError, match=r"step-0000020.*of another run"):
        newest_good(tmp_path, warnings.append, check=only_10)
    assert len(warnings) == 1


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """Two checkpoints are kept in checkpoints/, the best as best.pt."""
    (tmp_path / "checkpoints").mkdir()
    return Shelf(tmp_path / "checkpoints", keep=2, best=tmp_path / "best.pt")


def steps(tmp_path: Path) -> list[int]:
    """What lies there, newest first."""
    return [step for step, _ in list_checkpoints(tmp_path / "checkpoints")]


def test_pruning_counts_good_ones_only(shelf: Shelf, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        shelf.put(payload(step), is_best=False)
    assert steps(tmp_path) == [30, 20]
    damaged = tmp_path / "checkpoints" / checkpoint_name(30)
    damaged.write_bytes(damaged.read_bytes()[:-1])  # after it was found good
    shelf.put(payload(40), is_best=False)
    assert steps(tmp_path) == [40, 30, 20]
    shelf.put(payload(50), is_best=False)
    assert steps(tmp_path) == [50, 40]


def test_the_writer_keeps_newest_and_best(shelf: Shelf, tmp_path: Path) -> None:
    writer = CheckpointWriter(shelf, retries=0, warn=pytest.fail)
    for step in (1, 2, 3, 4):
        writer.write(payload(step), is_best=step == 2)
    writer.close()
    assert steps(tmp_path) == [4, 3]
    assert [read_checkpoint(path)["step"] for _, path in list_checkpoints(tmp_path / "checkpoints")] == [4, 3]
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 2
    assert not list(tmp_path.rglob(".tmp-*"))
    assert writer.figures().keys() == {"save_s", "save_wait_s"} and not writer.figures()


def test_the_metrics_are_on_disk_before_the_checkpoint(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power loss must not leave a run beyond rows that it has lost."""
    synced, fsync = list[str](), os.fsync

    def note(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    metrics = tmp_path.resolve() / "metrics.jsonl"
    metrics.touch()
    monkeypatch.setattr(os, "fsync", note)
    writer = CheckpointWriter(shelf, retries=0, warn=pytest.fail, before=metrics)
    writer.write(payload(1), is_best=False)
    writer.close()
    assert synced[0] == str(metrics)


def test_without_hard_links_the_best_is_written_twice(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    shelf.put(payload(1), is_best=True)
    assert (tmp_path / "best.pt").samefile(tmp_path / "checkpoints" / checkpoint_name(1))
    monkeypatch.setattr(os, "link", refuse)
    shelf.put(payload(2), is_best=True)
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 2 and steps(tmp_path) == [2, 1]


def block(tmp_path: Path, step: int) -> Path:
    """Something in the place of the temporary file, so that the checkpoint cannot be written."""
    path = tmp_path / "checkpoints" / f".tmp-{checkpoint_name(step)}"
    path.mkdir()
    return path


def test_saves_may_fail_a_few_times(shelf: Shelf, tmp_path: Path) -> None:
    """Older files stay, the next save is the retry, and one failure too many is raised."""
    warnings: list[str] = []
    writer = CheckpointWriter(shelf, retries=1, warn=warnings.append)
    writer.write(payload(1), is_best=True)
    for step in (2, 4, 5):
        block(tmp_path, step)
    writer.write(payload(2), is_best=False)
    writer.write(payload(3), is_best=False)  # and here the failure of 2 shows
    writer.write(payload(4), is_best=False)
    assert steps(tmp_path) == [3, 1] and len(warnings) == 1
    writer.write(payload(5), is_best=False)
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*step-0000005.*older ones are whole"):
        writer.write(payload(6), is_best=False)
    assert len(warnings) == 2 and "0 more in a row may fail" in warnings[1]
    assert steps(tmp_path) == [3, 1] and read_checkpoint(tmp_path / "best.pt")["step"] == 1


def test_a_best_one_that_failed_is_not_lost(shelf: Shelf, tmp_path: Path) -> None:
    warnings: list[str] = []
    blocked = tmp_path / ".tmp-best.pt"
    blocked.mkdir()

    def warn(text: str) -> None:
        warnings.append(text)
        blocked.rmdir()

    writer = CheckpointWriter(shelf, retries=1, warn=warn)
    writer.write(payload(1), is_best=True)
    writer.write(payload(2), is_best=False)
    writer.close()
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 1 and steps(tmp_path) == [2] and len(warnings) == 1


def test_the_last_save_is_tried_again(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No later one would replace it."""
    blocked, warnings = block(tmp_path, 1), []
    monkeypatch.setattr("train.saving.time.sleep", lambda _: blocked.rmdir())
    writer = CheckpointWriter(shelf, retries=2, warn=warnings.append)
    writer.write(payload(1), is_best=False)
    writer.close()
    assert steps(tmp_path) == [1] and len(warnings) == 1 and "trying again" in warnings[0]


def test_a_lost_lease_ends_it_and_writes_nothing(shelf: Shelf, tmp_path: Path) -> None:
    def check() -> None:
        raise LeaseLost("another run's")

    writer = CheckpointWriter(shelf, retries=9, warn=pytest.fail, check=check)
    writer.write(payload(1), is_best=True)
    with pytest.raises(LeaseLost):
        writer.close()
    assert not list(tmp_path.rglob("*.pt"))


def test_a_disk_that_fills_up_in_the_middle_is_an_error_of_the_disk(tmp_path: Path) -> None:
    """torch closes its archive on the way out and complains of that, which would hide why."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(tmp_path / "x.pt", {"w": torch.zeros(1 << 19), "v": torch.zeros(1 << 19)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


def test_what_reads_back_wrong_gets_no_name(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that takes the bytes and keeps others."""
    sync = os.fsync

    def spoil(handle: int) -> None:
        os.pwrite(handle, b"x", 200)
        sync(handle)

    shelf.put(payload(1), is_best=False)
    monkeypatch.setattr(os, "fsync", spoil)
    writer = CheckpointWriter(shelf, retries=0, warn=pytest.fail)
    writer.write(payload(2), is_best=False)
    with pytest.raises(InputError, match="read back, it was not what had been written"):
        writer.close()
    assert steps(tmp_path) == [1] and not list(tmp_path.rglob(".tmp-*"))


def learner() -> Learner:
    """One layer and its optimizer, an update old."""
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig(optimizer="sgd"))
    return Learner(model=model, optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))


def check_and_restore(payload: dict) -> Progress:
    """What a run does with a checkpoint."""
    fresh = learner()
    check_progress(payload)
    check_weights(payload["model"], fresh.model)
    check_optimizer(payload["optimizer"], fresh.optimizer)
    return restore(payload, fresh, Ranks())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schedule",), None),
        (("schedule",), {}),
        (("schedule", "plateau"), {"patience": {"worst": 1}, "cuts": 0}),
        (("schedule", "plateau", "cuts"), "x"),
        (("schedule", "patience", "bad"), "x"),
        (("skipped",), "x"),
        (("step",), -1),
        (("position",), 2**70),
        (("order_digest",), "x"),
        (("rng",), [torch.zeros(3, dtype=torch.uint8)]),
        (("rng",), [1]),
        (("fingerprint",), {1: 2}),
        (("bad_samples",), [1]),
        (("bad_samples",), [{"shard": 1}]),
        (("model", "weight"), torch.zeros(3)),
        (("model", "weight"), 3),
        (("optimizer",), {}),
        (("optimizer", "param_groups"), []),
        (("optimizer", "param_groups"), [{"params": [0], "betas": 1}, {"params": [1]}]),
        (("optimizer", "state"), {0: "x"}),
        (("optimizer", "state"), {0: {"momentum_buffer": torch.zeros(7)}}),
        (("optimizer", "state"), {9: {"momentum_buffer": torch.zeros(2)}}),
    ],
)
def test_a_whole_file_of_wrong_content_is_refused(place: tuple[str, ...], value: object) -> None:
    """With a digest that is right: in one line, by what is wrong with it."""
    config, progress = TrainConfig(shards=Path(), out=Path()), Progress(step=5, position=40)
    payload = capture(config, {"seed": 0}, progress, learner(), [], Ranks())
    assert check_and_restore(payload) == progress
    part = payload
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    with pytest.raises(InputError):
        check_and_restore(payload)
