"""Locks, streams and atomic files on a file system that does what GPFS, Lustre and NFS may: tests/fuse_storage.py."""

import contextlib
import errno
import json
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fuse_storage import mounted

from shards.atomic import write_atomic
from shards.lock import Held, exclusive
from shards.stream import atomic_stream, read_extents

MIB = 1 << 20
ELSEWHERE = json.dumps({"host": "elsewhere", "boot": "b", "pid": 1, "started": "1"})


def leave_lock(path: Path, *, age_s: float) -> None:
    """The lock of a process on another machine, whose heart beat so long ago by the server's clock."""
    path.write_text(ELSEWHERE)
    os.utime(path, (time.time() - age_s,) * 2)


def claims(first: Path, others: Path, stands_still: Callable[[], bool]) -> list[str]:
    """What comes of three claims: a second while the first stands still, a third when one of them has come to its end,
    or holds the lock; whoever gets it holds it until all have."""
    over, settled = threading.Event(), threading.Semaphore(0)

    def claim(path: Path) -> str:
        try:
            with exclusive(path, "taken"):
                settled.release()
                assert over.wait(600)
                return "held"
        except Held:
            settled.release()
            return "refused"

    with ThreadPoolExecutor(3) as threads:
        pending = [threads.submit(claim, first)]
        while not (stands_still() or pending[0].done()):
            time.sleep(0.01)
        for _ in range(2):
            pending.append(threads.submit(claim, others))
            assert settled.acquire(timeout=600)
        assert settled.acquire(timeout=600)
        over.set()
        return [each.result() for each in pending]


@pytest.mark.parametrize("links", [True, False])
def test_one_of_several_nodes_takes_over_a_dead_holders_lock(tmp_path: Path, links: bool) -> None:
    """One node stands still just before it takes the lock over: it must not take it from who did so meanwhile."""
    slow = [["rename", r"/lock", "hang 1", 0, 1], ["link", "/lock$", "hang 1", 0, 1]]
    with (
        mounted(tmp_path / "disk", tmp_path / "a", links=links) as quick,
        mounted(tmp_path / "disk", tmp_path / "b", links=links, rules=slow) as slow_node,
    ):
        leave_lock(tmp_path / "disk" / "lock", age_s=100)
        came = claims(slow_node.root / "lock", quick.root / "lock", lambda: slow_node.fired()["rename hang"] == 1)
        assert sorted(came) == ["held", "refused", "refused"], came
        assert slow_node.fired()["rename hang"] == 1
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize("clock_s", [-600, 600])
def test_the_clock_of_the_server_says_how_old_a_heartbeat_is(tmp_path: Path, clock_s: float) -> None:
    with mounted(tmp_path / "disk", tmp_path / "a", clock_s=clock_s) as node:
        leave_lock(tmp_path / "disk" / "lock", age_s=10)
        with pytest.raises(Held, match=r"on elsewhere, last seen 1[0-9] s ago"), exclusive(node.root / "lock", "taken"):
            pass
        leave_lock(tmp_path / "disk" / "lock", age_s=100)
        with exclusive(node.root / "lock", "taken") as lease:
            assert lease.mine()


@pytest.mark.parametrize("answer", ["EEXIST", "EIO"])
def test_a_lock_that_nfs_says_it_could_not_make_is_ours(tmp_path: Path, answer: str) -> None:
    """The first answer was lost, NFS asked again."""
    with mounted(tmp_path / "disk", tmp_path / "a", rules=[["link", "/lock$", f"done {answer}", 0, 1]]) as node:
        with exclusive(node.root / "lock", "taken") as lease:
            assert lease.mine() and node.fired() == {f"link done {answer}": 1}
            with pytest.raises(Held), exclusive(node.root / "lock", "taken"):
                pass
        assert list(node.root.iterdir()) == []


def test_a_full_disk_leaves_no_lock_of_nobodys(tmp_path: Path) -> None:
    rules = [["write", "/lock$", "ENOSPC", 0, 1]]
    with mounted(tmp_path / "disk", tmp_path / "a", links=False, rules=rules) as node:
        with pytest.raises(OSError, match="No space left"), exclusive(node.root / "lock", "taken"):
            pass
        assert node.fired()["write ENOSPC"] == 1 and list(node.root.iterdir()) == []


def test_a_lock_that_cannot_be_removed_is_no_error(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", tmp_path / "a", rules=[["unlink", "/lock$", "EIO", 0, 1]]) as node:
        with exclusive(node.root / "lock", "taken"):
            pass
        assert node.fired() == {"unlink EIO": 1}


@pytest.mark.parametrize(
    "faults, fault",
    [
        ({"direct": "transfer"}, "direct transfer"),
        ({"direct": "alignment", "alignment": 1 << 16}, "direct transfer"),
        ({"most_bytes": 70_001}, "short read"),
        ({"rules": [["write", ".", "EINTR", 1, 2], ["read", ".", "EINTR", 0, 2]]}, "read EINTR"),
    ],
)
def test_what_is_streamed_is_in_the_file(tmp_path: Path, faults: dict, fault: str) -> None:
    content = np.random.default_rng(0).bytes(5 * MIB + 5)
    with mounted(tmp_path / "disk", tmp_path / "a", **faults) as node:
        with atomic_stream(node.root / "file") as stream:
            for first in range(0, len(content), MIB // 3):
                stream.write(content[first : first + MIB // 3])
        target = mmap.mmap(-1, MIB + 4096)
        read_extents(node.root / "file", [(MIB, MIB), (0, 4096)], memoryview(target))
        assert target[:] == content[MIB : 2 * MIB] + content[:4096]
        assert node.fired()[fault]
    assert (tmp_path / "disk" / "file").read_bytes() == content


def test_a_folder_that_cannot_be_synced(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", tmp_path / "a", sync_folders=False) as node:
        write_atomic(node.root / "file", b"content")
        assert node.fired() == {"sync_folder EINVAL": 1} and (node.root / "file").read_bytes() == b"content"


@pytest.mark.parametrize(
    "rule", [["write", ".", "EDQUOT"], ["sync", ".", "ENOSPC"], ["close", ".", "EDQUOT"], ["rename", ".", "EIO"]]
)
def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, rule: list[str]) -> None:
    """Also where a quota is noticed when the file is closed."""
    with mounted(tmp_path / "disk", tmp_path / "a", rules=[[*rule, 1, 1]]) as node:
        write_atomic(node.root / "file", b"first")
        with pytest.raises(OSError) as caught:
            write_atomic(node.root / "file", b"second")
        assert caught.value.errno == getattr(errno, rule[2]) and caught.value.filename == str(node.root / "file")
        assert [path.name for path in node.root.iterdir()] == ["file"]
        assert (node.root / "file").read_bytes() == b"first"


def test_an_open_file_that_is_removed_leaves_a_name(tmp_path: Path) -> None:
    """What these tests stand on: names in a folder that is thought empty, as of NFS."""
    with mounted(tmp_path / "disk", tmp_path / "a") as node:
        (node.root / "folder").mkdir()
        with open(node.root / "folder" / "file", "wb"):
            (node.root / "folder" / "file").unlink()
            with pytest.raises(OSError, match="not empty"):
                (node.root / "folder").rmdir()
        with contextlib.suppress(FileNotFoundError):
            (node.root / "folder").rmdir()
        assert list(node.root.iterdir()) == []
