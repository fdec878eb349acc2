"""Training on a file system that does what GPFS, Lustre and NFS may: the same run, or a line and one that goes on."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuse_storage import mounted
from soak_train import Server, arguments, differing, outcome

pytestmark = pytest.mark.slow
STEPS = ("--steps", "8")


@pytest.fixture(scope="module")
def whole(server: Server, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a run on the local disk comes to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    codes, errors = server.run(arguments(shards_dir, out, *STEPS))
    assert codes == [0], errors
    return outcome(out)


@pytest.fixture
def disk(tmp_path: Path, shards_dir: Path) -> Path:
    """A folder with shards in it, to be mounted."""
    shutil.copytree(shards_dir, tmp_path / "disk" / "set")
    return tmp_path / "disk"


def until(happened: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


POOR = {"links": False, "locks": False, "sync_folders": False, "whole_seconds": True, "steady_inodes": False}
PASSING = [
    *(["read", r"\.tar$", "ESTALE", 1, 3], ["open", r"\.tar$", "ESTALE", 1, 1], ["read", r"\.parquet$", "EIO", 3, 2]),
    *(["stat", r"\.idx$", "ETIMEDOUT", 0, 2], ["read", r"run/lock$", "ESTALE", 0, 2]),
]
LYING = [
    *(["rename", r"step-0000004\.pt$", "done EIO", 0, 1], ["rename", r"best\.pt$", "done ESTALE", 0, 1]),
    *(["link", r"lock$", "done EEXIST", 0, 1], ["link", r"\.pt$", "done EIO", 0, 1]),
]


@pytest.mark.parametrize(
    "faults, fault",
    [
        (POOR, "link EPERM"),
        ({"most_bytes": 20_001}, "short read"),
        ({"cache_s": 2, "rules": PASSING}, "read ESTALE"),
        ({"rules": LYING}, "rename done EIO"),
        ({"rules": [["close", r"step-.*\.pt$", "EDQUOT", 0, 2]]}, "close EDQUOT"),
    ],
)
def test_the_same_run(
    server: Server, disk: Path, tmp_path: Path, whole: dict[str, object], faults: dict, fault: str
) -> None:
    with mounted(disk, tmp_path / "node", **faults) as node:
        codes, errors = server.run(arguments(node.root / "set", node.root / "run", *STEPS))
        assert codes == [0], errors
        assert node.fired()[fault]
    assert differing(outcome(disk / "run"), whole) == []


def test_an_old_checkpoint_that_cannot_be_removed(
    server: Server, disk: Path, tmp_path: Path, whole: dict[str, object]
) -> None:
    with mounted(disk, tmp_path / "node", rules=[["unlink", r"step-0000002\.pt$", "EBUSY", 0, 1]]) as node:
        codes, errors = server.run(arguments(node.root / "set", node.root / "run", *STEPS))
        assert codes == [0] and "cannot write" not in errors, errors
        assert node.fired() == {"unlink EBUSY": 1}
    assert differing(outcome(disk / "run"), whole) == []


def test_a_server_that_goes_away_ends_the_run(server: Server, disk: Path, tmp_path: Path) -> None:
    with mounted(disk, tmp_path / "node") as node:
        pids = server.start(arguments(node.root / "set", node.root / "run", "--steps", "100000"))
        until(lambda: any((disk / "run").glob("checkpoints/step-*.pt")))
        os.kill(node.daemon, 9)
        codes, errors = server.wait(pids)
    assert codes == [2] and "Traceback" not in errors and "not connected" in errors.splitlines()[-1], errors


def test_another_node_goes_on_where_one_was_killed(
    server: Server, disk: Path, tmp_path: Path, whole: dict[str, object]
) -> None:
    with mounted(disk, tmp_path / "a", links=False, rules=[["sync", r"0000004\.pt$", "hang 60", 0, 1]]) as node:
        pids = server.start(arguments(node.root / "set", node.root / "run", *STEPS))
        until(lambda: node.fired()["sync hang"] == 1)
        os.kill(node.daemon, 9)  # what hangs in it ends with it
        os.kill(pids[0], 9)
        assert server.wait(pids)[0] == [-9]
    with mounted(disk, tmp_path / "b", links=False, cache_s=2) as node:
        codes, errors = server.run(arguments(node.root / "set", node.root / "run", *STEPS))
        assert codes == [0] and "going on after step 2" in errors, errors
    assert differing(outcome(disk / "run"), whole) == []


def test_staging_from_it(server: Server, disk: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    rules = [["read", r"\.tar$", "EIO", 2, 4], ["read", r"\.parquet$", "ESTALE", 2, 2]]
    with mounted(disk, tmp_path / "node", rules=rules) as node:
        staged = ("--data.stage-dir", str(tmp_path / "stage"))
        codes, errors = server.run(arguments(node.root / "set", tmp_path / "run", *STEPS, *staged))
        assert codes == [0], errors
        assert node.fired()["read EIO"] == 4
    assert differing(outcome(tmp_path / "run"), whole) == []
    (copies,) = (tmp_path / "stage").iterdir()
    for path in copies.iterdir():
        assert path.read_bytes() == (disk / "set" / path.name).read_bytes()
