"""Faults injected into ingests by real means: kills at durable steps, full disks, two at once, dead workers.

The numbers are the rows of the fault table (I1, I3, I4, I5, I11, I14).
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import REPOSITORY, assert_refused, made_up_images, run_module, write_csv, write_h5

from shards.verify import verify

INJECTED = Path(__file__).parent / "injected"


def tree(root: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir()) if path.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """The command of a small ingest, without its output folder."""
    folder = tmp_path_factory.mktemp("small")
    h5 = write_h5(folder / "a.h5", made_up_images(24))
    table = write_csv(folder / "a.csv", ["impression"], [[f"Film {i}"] for i in range(24)])
    return ["ingest", "--h5", h5, "--csv", table, "--workers", "1", "--val-fraction", "0.25", "--shard-mb", "0.25"]


def injected(command: list[str | Path], out: Path, *, fault: str = "", count: Path) -> subprocess.CompletedProcess[str]:
    """Run an ingest in a process group of its own, with a fault at one durable step."""
    count.unlink(missing_ok=True)
    environment = {"PYTHONPATH": str(INJECTED), "SHARDCLIP_FAULT": fault, "SHARDCLIP_COUNT": str(count)}
    return subprocess.run(
        [sys.executable, "-m", *map(str, command), "--to-shards", str(out)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def whole(small: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """Digests of what an uninterrupted ingest makes, and how many durable steps it takes."""
    folder = tmp_path_factory.mktemp("whole")
    assert injected(small, folder / "out", count=folder / "count").returncode == 0
    return tree(folder / "out"), (folder / "count").stat().st_size


@pytest.mark.slow
def test_killed_at_any_durable_step_then_rerun(
    small: list[str | Path], whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    """I1: whatever step the power goes at, no partial file has a final name, and the rerun ends with the same bytes."""
    count = tmp_path / "count"
    expected, steps = whole
    assert steps > 40
    every = 1 if os.environ.get("SHARDCLIP_SOAK") else 12
    for number in range(1, steps + 1, every):
        out = tmp_path / f"killed-{number}"
        assert injected(small, out, fault=f"kill:{number}", count=count).returncode == -signal.SIGKILL
        visible = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.exists() else set()
        assert all(tree(out)[name] == expected[name] for name in visible), number
        done = injected(small, out, count=count)
        assert done.returncode == 0 or "finished data set" in done.stderr, done.stderr
        assert tree(out) == expected, number
        shutil.rmtree(out)


def test_a_rerun_keeps_finished_shards(
    small: list[str | Path], whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    count, out = tmp_path / "count", tmp_path / "out"
    expected, steps = whole
    injected(small, out, fault=f"kill:{steps * 2 // 3}", count=count)
    notes = {path.stem for path in (out / ".ingest").glob("*-0*.json")}
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if path.stem in notes}
    assert before
    assert injected(small, out, count=count).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert tree(out) == expected


@pytest.mark.parametrize(("kind", "share"), [("enospc", 0.1), ("eio", 0.5), ("enospc", 0.9)])
def test_a_disk_that_fails(
    small: list[str | Path], whole: tuple[dict[str, str], int], tmp_path: Path, kind: str, share: float
) -> None:
    """I3: the step that fails ends the ingest in one line; the rerun completes it."""
    count, out = tmp_path / "count", tmp_path / "out"
    expected, steps = whole
    number = int(steps * share)
    assert_refused(injected(small, out, fault=f"{kind}:{number}", count=count), "cannot write", "MB are free")
    assert not (out / "manifest.json").exists()
    assert injected(small, out, count=count).returncode == 0
    assert tree(out) == expected


def test_a_file_size_limit(small: list[str | Path], tmp_path: Path) -> None:
    """I3 by the real limit: writes beyond 100 kB fail with EFBIG."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", *map(str, small), "--to-shards", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=limit)
    assert_refused(done, "cannot write", "spill-")
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    assert run_module(*small, "--to-shards", tmp_path / "out").returncode == 0


def test_two_ingests_into_one_folder(small: list[str | Path], tmp_path: Path) -> None:
    """I4: the second is refused and changes nothing; a dead holder's lock is taken over."""
    out = tmp_path / "out"
    from ingest.lock import exclusive

    work = out / ".ingest"
    work.mkdir(parents=True)
    with exclusive(work / "lock"):
        before = tree(work)
        assert_refused(run_module(*small, "--to-shards", out), "another ingest is writing", str(os.getpid()))
        assert tree(work) == before
    assert not (work / "lock").exists()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    holder = {"host": os.uname().nodename, "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    (work / "lock").write_text(json.dumps({**holder, "pid": int(dead.stdout)}))
    assert run_module(*small, "--to-shards", out).returncode == 0
    assert [problem for _, problem in verify(out) if problem] == []


def test_a_silent_holder_elsewhere_is_dead_after_a_while(tmp_path: Path) -> None:
    from ingest.lock import DEAD_AFTER_S, exclusive
    from shards.errors import InputError

    lock = tmp_path / "set" / ".ingest" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"host": "another-node", "boot": "x", "pid": 1}))
    with pytest.raises(InputError, match="another-node"), exclusive(lock):
        pass
    long_ago = time.time() - DEAD_AFTER_S - 1
    os.utime(lock, (long_ago, long_ago))
    with exclusive(lock):
        assert json.loads(lock.read_bytes())["pid"] == os.getpid()


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    """I14: no writer survives a kill of the parent; a killed worker ends the run with one line."""
    h5 = write_h5(tmp_path / "a.h5", np.repeat(made_up_images(50), 60, axis=0))
    table = write_csv(tmp_path / "a.csv", ["impression"], [[f"Film {i}"] for i in range(3000)])
    command = [sys.executable, "-m", "ingest", "--h5", str(h5), "--csv", str(table), "--workers", "2"]
    for victim in ("parent", "worker"):
        out = tmp_path / victim
        process = subprocess.Popen(
            [*command, "--to-shards", str(out)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
        )
        while not list(out.glob(".ingest/*spill*")):
            time.sleep(0.02)
        workers = _children(process.pid)
        assert workers
        os.kill(process.pid if victim == "parent" else workers[-1], signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() and _state(pid) != "Z" for pid in workers):
            assert time.monotonic() < deadline, "a worker survived"
            time.sleep(0.05)
        if victim == "worker":
            assert process.returncode == 2
            assert "a worker process was killed" in stderr and "Traceback" not in stderr


def _children(parent: int) -> list[int]:
    """Spawned workers of a process: those that multiprocessing started, not its resource tracker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"spawn_main" in command:
            found.append(int(path.parent.name))
    return found


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_no_foreign_file_is_opened(tmp_path: Path) -> None:
    """I11: strace sees every open; an HDF5 file that points at /etc/hostname does not get it read."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file.create_dataset("cxr", (10**6, 320, 320), "u1", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])
    table = write_csv(tmp_path / "a.csv", ["impression"], [["x"]])
    log = tmp_path / "log"
    command = ["strace", "-f", "-qq", "-e", "trace=openat,open", "-o", str(log), sys.executable, "-m", "ingest"]
    command += ["--to-shards", str(tmp_path / "out"), "--h5", str(tmp_path / "e.h5"), "--csv", str(table)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if "ptrace" in done.stderr or not log.exists() or "e.h5" not in log.read_text():
        pytest.skip("strace cannot trace here")
    assert_refused(done, "external")
    assert "/etc/hostname" not in log.read_text()
    assert not (tmp_path / "out").exists()
