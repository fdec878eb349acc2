"""Copies of shards on the node: made once, verified, used when complete, and never a reason for a run to end."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline import blocks, stage
from pipeline.batch import World, digest_batch
from pipeline.config import LoaderConfig
from pipeline.loader import Loader, build_loader
from pipeline.stage import Stage
from shards import lock
from shards.digest import file_digest
from shards.errors import InputError
from shards.manifest import read_manifest, write_manifest
from train.main import main

BATCHES = 30
"""Some three epochs of the made-up set."""


@pytest.fixture
def copy(shards_dir: Path, tmp_path: Path) -> Path:
    """A copy of the made-up shards, to be damaged: the shared folder."""
    return Path(shutil.copytree(shards_dir, tmp_path / "set"))


def settings(root: Path, node: Path | None, **more: object) -> LoaderConfig:
    values = {"shards": root, "backend": "cpu", "batch_size": 8, "threads": 1, "streams": 2, "memory_mb": 2, **more}
    return LoaderConfig(stage_dir=node, **values)  # type: ignore[arg-type]


def digest(loader: Loader, batches: int = BATCHES) -> int:
    """The order digest of so many batches."""
    return sum(digest_batch(next(loader), World()) for _ in range(batches))


@pytest.fixture
def expected(shards_dir: Path) -> int:
    """The digest of a run without copies."""
    with build_loader(settings(shards_dir, None), World()) as loader:
        return digest(loader)


def folder(root: Path, node: Path) -> Path:
    """Where a set's copies lie."""
    return node / f"shardclip-{read_manifest(root).digest}"


def wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_all(loader: Loader, root: Path) -> None:
    """Until the copies of all shards are there."""
    wait(lambda: loader.stats()["staged"] == len(read_manifest(root).splits["train"]))


def assert_whole(root: Path, node: Path) -> None:
    """Every file of the split is there, byte by byte, and nothing else."""
    there = {path.name: file_digest(path) for path in folder(root, node).iterdir()}
    wanted = {path.name: file_digest(path) for path in root.glob("train-*")}
    assert there == wanted


def test_copies_are_used_as_soon_as_they_are_there(copy: Path, tmp_path: Path, expected: int) -> None:
    """Once they are, the shared folder is not needed any more; the samples are the same all along."""
    with build_loader(settings(copy, tmp_path / "node"), World()) as loader:
        found = digest(loader, 10)
        wait_for_all(loader, copy)
        found += digest(loader, 10)
        for path in copy.glob("train-*"):
            path.unlink()
        assert found + digest(loader, BATCHES - 20) == expected
    assert not [path for path in folder_content(tmp_path / "node") if path.name.startswith(".")]


def folder_content(node: Path) -> list[Path]:
    return [path for each in node.iterdir() for path in each.iterdir()]


def test_a_shard_is_read_from_the_shared_folder_until_its_copy_is_whole(
    copy: Path, tmp_path: Path, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be copied here: the lock is another's."""
    place = folder(copy, tmp_path / "node")
    place.mkdir(parents=True)
    monkeypatch.setattr(stage, "RETRY_S", 0.01)
    monkeypatch.setattr(lock, "DEAD_AFTER_S", float("inf"))  # however long the digest takes
    (place / ".lock").write_text(json.dumps({"host": "another-node", "boot": "x", "pid": 1}))
    (place / ".tmp-train-000000.tar").write_bytes(b"half of it")
    with build_loader(settings(copy, tmp_path / "node"), World()) as loader:
        assert digest(loader) == expected and loader.stats()["staged"] == 0


def test_what_a_killed_copier_left_is_finished(copy: Path, tmp_path: Path, expected: int) -> None:
    place = folder(copy, tmp_path / "node")
    place.mkdir(parents=True)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    holder = {"host": os.uname().nodename, "boot": boot, "pid": int(dead.stdout)}
    (place / ".lock").write_text(json.dumps(holder))
    (place / ".tmp-train-000001.tar").write_bytes(b"half of it")
    shutil.copy(copy / "train-000001.parquet", place)
    with build_loader(settings(copy, tmp_path / "node"), World()) as loader:
        wait_for_all(loader, copy)
        assert digest(loader) == expected
    assert_whole(copy, tmp_path / "node")


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline import stage
from shards.manifest import read_manifest
from train.main import main
manifest = read_manifest(Path(sys.argv[1]))
copy, calls = stage.Stage._copy_file, []
def kill(self, source, file, info):
    copy(self, source, file, info)
    calls.append(source)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
stage.Stage._copy_file = kill
stage.Stage(Path(sys.argv[1]), Path(sys.argv[2]), manifest, manifest.splits["train"])._thread.join()
"""


@pytest.mark.parametrize("number", [2, 6])
def test_a_copier_that_is_killed_leaves_nothing_in_the_way(copy: Path, tmp_path: Path, number: int) -> None:
    node = tmp_path / "node"
    command = [sys.executable, "-c", KILLED, str(copy), str(node), str(number)]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=600).returncode == -9
    names = {path.name for path in folder_content(node)}
    assert ".lock" in names and any(name.startswith(".tmp-") for name in names)
    manifest = read_manifest(copy)
    again = Stage(copy, node, manifest, manifest.splits["train"])
    wait(lambda: again.count() == len(manifest.splits["train"]))
    again.close()
    assert_whole(copy, node)


def test_copies_of_another_set_are_not_used(copy: Path, shards_dir: Path, tmp_path: Path, expected: int) -> None:
    """The folder carries the manifest's digest: a set that was made anew gets a new one."""
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text + " ")
    node = tmp_path / "node"
    for root in (copy, shards_dir):
        with build_loader(settings(root, node), World()) as loader:
            wait_for_all(loader, root)
            assert digest(loader) == expected
    assert folder(copy, node) != folder(shards_dir, node)
    assert_whole(copy, node)
    assert_whole(shards_dir, node)


@pytest.mark.parametrize("how", ["image", "table", "shorter", "gone"])
def test_a_damaged_copy_is_no_bad_sample(
    copy: Path, tmp_path: Path, expected: int, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = tmp_path / "node"
    with build_loader(settings(copy, node), World()) as loader:
        wait_for_all(loader, copy)
    for path in folder(copy, node).glob("*.parquet" if how == "table" else "*.tar"):
        content = bytearray(path.read_bytes())
        for place in range(8, len(content) // 2, 64):
            content[place] ^= 1
        path.write_bytes(content if how in ("image", "table") else content[:-512])
        if how == "gone":
            path.unlink()
    with build_loader(settings(copy, node), World()) as loader:
        assert digest(loader) == expected and not loader.bad_samples()
    if how != "gone":
        assert "is read no more" in caplog.text


def test_another_process_that_wants_the_lock_does_not_end_the_copying(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: int
) -> None:
    """Its draft of a lock file goes after the folder is listed, before it is looked at."""
    place = folder(copy, tmp_path / "node")
    place.mkdir(parents=True)
    (place / ".tmp-.lock.1").symlink_to("gone")
    monkeypatch.setattr(stage, "remove_temporary", lambda _: None)
    with build_loader(settings(copy, tmp_path / "node"), World()) as loader:
        wait_for_all(loader, copy)
        assert digest(loader) == expected


def test_a_holder_lives_whatever_it_is_called() -> None:
    """The kernel cuts names after 15 bytes, in the middle of a letter if need be."""
    comm = Path("/proc/self/comm")
    name, since = comm.read_bytes().strip(), lock._started(os.getpid())
    comm.write_bytes(b"\xc3(\xff")
    try:
        assert since is not None and lock._started(os.getpid()) == since
    finally:
        comm.write_bytes(name)


def test_a_damaged_shard_is_not_copied(copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is named while copying, and training finds what it reads of it."""
    content = bytearray((copy / "train-000001.tar").read_bytes())
    for place in range(4096, len(content), 512):
        content[place] ^= 1
    (copy / "train-000001.tar").write_bytes(content)
    manifest = read_manifest(copy)
    copies = Stage(copy, tmp_path / "node", manifest, manifest.splits["train"])
    copies._thread.join(600)
    copies.close()
    assert copies.count() == len(manifest.splits["train"]) - 1 and not copies.has(1)
    assert "shard train-000001 is not copied" in caplog.text and "not the file that the manifest" in caplog.text
    with build_loader(settings(copy, tmp_path / "node"), World()) as loader:
        with pytest.raises(InputError, match="train-000001: image"):
            digest(loader)


def test_the_limit_holds(copy: Path, tmp_path: Path, expected: int, caplog: pytest.LogCaptureFixture) -> None:
    limit = 1_000_000
    node = tmp_path / "node"
    with build_loader(settings(copy, node, stage_gb=limit / 1e9), World()) as loader:
        wait(lambda: "no more copies" in caplog.text)
        assert digest(loader) == expected and loader.stats()["staged"] >= 1
    assert sum(path.stat().st_size for path in folder_content(node)) <= limit
    assert "the limit of 0.001 GB is reached" in caplog.text


@pytest.mark.parametrize("node", ["x", "x/y", "x/y/z"])
def test_a_folder_that_is_a_file_is_refused(copy: Path, tmp_path: Path, node: str) -> None:
    """A slip of the user's, who waits for copies that never come, where all else goes on in a run of days."""
    (tmp_path / "x").write_text("precious")
    with pytest.raises(InputError, match=f"^stage_dir {tmp_path / node} is no folder"):
        build_loader(settings(copy, tmp_path / node), World())
    assert (tmp_path / "x").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_done_without(
    copy: Path, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    with build_loader(settings(copy, Path("/proc/nowhere")), World()) as loader:
        wait(lambda: "no more copies" in caplog.text)
        assert digest(loader) == expected


def test_a_copier_that_is_stopped_leaves_whole_files_only(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_PIECE", 1024)
    manifest = read_manifest(copy)
    copies = Stage(copy, tmp_path / "node", manifest, manifest.splits["train"])
    wait(lambda: folder(copy, tmp_path / "node").exists() and bool(folder_content(tmp_path / "node")))
    copies.close()
    for path in folder_content(tmp_path / "node"):
        assert file_digest(path) == file_digest(copy / path.name)


def test_copying_ends_where_no_loader_can_be_made(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More memory than there is is found after copying began, of both sets."""
    begun: list[Stage] = []
    copies = Stage._copy_in_turn

    def wait(self: Stage) -> None:
        begun.append(self)
        assert self._stopped.wait(600)
        copies(self)

    def refuse(limit: int) -> None:
        raise InputError(f"{limit >> 20} MiB for encoded blocks are more than this machine has")

    monkeypatch.setattr(Stage, "_copy_in_turn", wait)
    monkeypatch.setattr(blocks, "Buffers", refuse)
    second = Path(shutil.copytree(copy, tmp_path / "second"))
    write_manifest(second, replace(manifest := read_manifest(second), seed=manifest.seed + 1))
    with pytest.raises(InputError, match="more than this machine has"):
        build_loader(settings(copy, tmp_path / "node", more_shards=(second,)), World())
    assert len(begun) == 2 and not any(each._thread.is_alive() for each in begun)


@pytest.mark.slow
def test_training_with_copies(copy: Path, tmp_path: Path) -> None:
    """The same run with and without; where copies lie is in no checkpoint, and a resume may do without."""
    runs = {}
    for name, more in (("plain", ()), ("staged", ("--data.stage-dir", str(tmp_path / "node-local")))):
        main(training(copy, tmp_path / name, "--steps", "8", *more))
        runs[name] = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    digests = {name: [json.loads(line)["order_digest"] for line in lines] for name, lines in runs.items()}
    assert digests["plain"] == digests["staged"]
    early, last = sorted((tmp_path / "staged" / "checkpoints").glob("*.pt"))
    assert b"node-local" not in early.read_bytes() + last.read_bytes()
    shutil.copy(early, tmp_path / "plain" / "checkpoints")
    (tmp_path / "plain" / "checkpoints" / last.name).unlink()
    main(training(copy, tmp_path / "plain", "--steps", "8", "--resume", "auto"))
    assert json.loads(runs["staged"][-1])["order_digest"] in (tmp_path / "plain" / "metrics.jsonl").read_text()


def training(root: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--shards", str(root), "--out", str(out), "--batch-size", "8", "--model.widths", *("16",) * 4),
        *("--device", "cpu", "--threads", "1", "--log-every", "2", "--validate-every", "4", *more),
    ]


FULL = """
import sys
from pathlib import Path
from pipeline import stage
from pipeline.batch import World, digest_batch
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
if sys.argv[3] == "write":
    stage.SPARE = -10.0
config = LoaderConfig(shards=sys.argv[1], backend="cpu", batch_size=8, threads=1, streams=2, memory_mb=2,
                      stage_dir=Path(sys.argv[2]))
with build_loader(config, World()) as loader:
    print(sum(digest_batch(next(loader), World()) for _ in range(30)))
    loader._reader.loader.shards.sets[0].copies._thread.join(600)
    print(loader.stats()["staged"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("notice", ["room", "write"])
def test_a_full_disk_is_done_without(shards_dir: Path, tmp_path: Path, expected: int, notice: str) -> None:
    """1 MB on the node: noticed before a shard is begun, and, should others fill the disk meanwhile, by its errors."""
    (tmp_path / "node").mkdir()
    mount = 'mount -t tmpfs -o size=1m t "$0" && exec "$@"'
    if subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mount, tmp_path / "node", "true"], capture_output=True
    ).returncode:
        pytest.skip("no mounts here")
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mount, str(tmp_path / "node"), sys.executable, "-c", FULL, str(shards_dir),
         str(tmp_path / "node"), notice],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    order, staged = done.stdout.split()
    assert int(order) == expected and int(staged) >= 1
    assert len(done.stderr.splitlines()) == 1 and "no more copies" in done.stderr
    assert ("No space left" if notice == "write" else "stay so") in done.stderr


RANK = """
import os, sys, time
from pathlib import Path
from pipeline import stage
from pipeline.batch import World, digest_batch
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
rank, log = int(os.environ["RANK"]), Path(sys.argv[3])
copy = stage.Stage._copy
def noted(self, shard):
    with open(log, "a") as file:
        file.write(f"{rank} {shard.name}\\n")
    copy(self, shard)
stage.Stage._copy, stage.RETRY_S = noted, 0.05
world = World(rank=rank, size=2)
config = LoaderConfig(shards=sys.argv[1], backend="cpu", batch_size=8, threads=1, streams=2, memory_mb=2,
                      stage_dir=Path(sys.argv[2]))
with build_loader(config, world) as loader:
    total = sum(digest_batch(next(loader), world) for _ in range(15))
    while loader.stats()["staged"] < int(sys.argv[4]):
        time.sleep(0.01)
    total += sum(digest_batch(next(loader), world) for _ in range(15))
Path(f"{log}.{rank}").write_text(str(total))
"""


@pytest.mark.slow
def test_two_ranks_have_one_copier(shards_dir: Path, tmp_path: Path, expected: int) -> None:
    count = len(read_manifest(shards_dir).splits["train"])
    (tmp_path / "rank.py").write_text(RANK)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "rank.py"),
         str(shards_dir), str(tmp_path / "node"), str(tmp_path / "log"), str(count)],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == count and len({line.split()[1] for line in lines}) == count
    assert len({line.split()[0] for line in lines}) == 1
    assert sum(int((tmp_path / f"log.{rank}").read_text()) for rank in range(2)) % 2**64 == expected % 2**64
    assert_whole(shards_dir, tmp_path / "node")
