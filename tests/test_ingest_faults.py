"""Faults injected into ingests by real means: kills at durable steps, full disks, two at once, dead workers.

The numbers are the rows of the fault table (I1, I3, I4, I5, I11, I13, I14).
"""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, assert_refused, made_up_images, run_module, state, write_csv, write_h5

from shards.errors import InputError
from shards.processes import Processes
from shards.verify import verify

INJECTED = Path(__file__).parent / "injected"
SOAK = bool(os.environ.get("SHARDCLIP_SOAK"))
"""Every step instead of a few, every call instead of a handful: half an hour."""


def tree(root: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir()) if path.is_file()
    }


def finished(out: Path) -> dict[Path, tuple[int, int]]:
    """Files of the shards that an interrupted ingest has noted as finished -> inode and time of change."""
    notes = [path.stem for path in (out / ".ingest").glob("*-0*.json")]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for name in notes for path in out.glob(f"{name}.*")}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a small ingest, without its output folder."""
    folder = tmp_path_factory.mktemp("small")
    h5 = write_h5(folder / "a.h5", made_up_images(24))
    table = write_csv(folder / "a.csv", ["impression"], [[f"Film {i}"] for i in range(24)])
    command = ["ingest", "--h5", h5, "--csv", table, "--workers", "1", "--val-fraction", "0.25", "--shard-mb", "0.25"]
    return list(map(str, command))


Ingest = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def forked(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingest]:
    """Runs the small ingest in a fork of a process that has imported everything, with a fault at a durable step."""
    count = tmp_path_factory.mktemp("count") / "count"
    server = subprocess.Popen(
        [sys.executable, INJECTED / "server.py"],
        cwd=REPOSITORY,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdin and server.stdout

    def ingest(out: Path, fault: str = "") -> subprocess.CompletedProcess[str]:
        count.unlink(missing_ok=True)
        command = {"arguments": [*small[1:], "--to-shards", str(out)], "fault": fault, "count": str(count)}
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        done = subprocess.CompletedProcess(command["arguments"], answer["code"], "", answer["stderr"])
        done.steps = count.stat().st_size if count.exists() else 0
        return done

    yield ingest
    server.stdin.close()
    assert server.wait(600) == 0


@pytest.fixture(scope="module")
def whole(small: list[str], forked: Ingest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """Digests of what the real command makes, uninterrupted; how many durable steps it takes."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_module(*small, "--to-shards", folder / "real").returncode == 0
    steps = forked(folder / "fork").steps
    assert tree(folder / "fork") == tree(folder / "real") and steps > 20
    return tree(folder / "real"), steps


def check_rerun(forked: Ingest, out: Path, expected: dict[str, str]) -> int:
    """After any fault: names of final files are true, the rerun ends with the same bytes and keeps finished shards.

    Returns how many files it kept.
    """
    out.mkdir(exist_ok=True)
    visible = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert all(tree(out)[name] == expected[name] for name in visible)
    before = finished(out)
    done = forked(out)
    assert done.returncode == 0 or "finished data set" in done.stderr, done.stderr
    assert tree(out) == expected and not (out / ".ingest").exists()
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before
    return len(before)


def test_killed_at_any_durable_step_then_rerun(
    forked: Ingest, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    """I1: whatever fsync or rename the power goes at, no partial file has a final name; the rerun is the same."""
    expected, steps = whole
    kept = []
    for number in range(1, steps + 1, 1 if SOAK else 4):
        out = tmp_path / f"killed-{number}"
        assert forked(out, f"kill:{number}").returncode == -signal.SIGKILL
        kept.append(check_rerun(forked, out, expected))
        shutil.rmtree(out)
    assert max(kept) >= 6, "no kill came after two finished shards"


@pytest.mark.parametrize("kind", ["enospc", "eio"])
def test_a_disk_that_fails(forked: Ingest, whole: tuple[dict[str, str], int], tmp_path: Path, kind: str) -> None:
    """I3: the step that fails ends the ingest in one line; the rerun completes it."""
    expected, steps = whole
    # The last two come after the manifest.
    for number in sorted({*range(1 + (kind == "eio"), steps + 1, 1 if SOAK else 11), steps - 1, steps}):
        out = tmp_path / f"{kind}-{number}"
        assert_refused(forked(out, f"{kind}:{number}"), "cannot write", "MB are free", str(out))
        assert not list(out.rglob(".tmp-*")), "a temporary file was left"
        check_rerun(forked, out, expected)


@pytest.fixture(scope="module")
def strace() -> str:
    """The program's path; skips where it cannot trace."""
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed")
    if subprocess.run([found, "-qq", "-o", "/dev/null", "true"], capture_output=True).returncode:
        pytest.skip("strace cannot trace here")
    return found


def traced(
    strace: str, command: list[str], out: Path, *options: str, log: Path | str = "/dev/null"
) -> subprocess.CompletedProcess[str]:
    """The real command with its worker, under strace."""
    return subprocess.run(
        [strace, "-f", "-qq", "-o", str(log), *options, sys.executable, "-m", *command, "--to-shards", str(out)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


CALLS = {"write": "write,pwrite64", "fsync": "fsync", "rename": "rename,renameat,renameat2"}


@pytest.mark.slow
def test_killed_at_a_system_call(
    strace: str, small: list[str], forked: Ingest, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    """I1 on the real command: a process of it, parent or worker, dies at its Nth write, fsync or rename."""
    kills = [("write", 1), ("write", 3), ("write", 25), ("fsync", 12), ("rename", 4), ("rename", 9)]
    if SOAK:
        kills = [(call, number) for call in CALLS for number in range(1, 60)]
    hit = 0
    for call, number in kills:
        out = tmp_path / f"{call}-{number}"
        inject = f"inject={CALLS[call]}:signal=KILL:when={number}"
        done = traced(strace, small, out, "-e", f"trace={CALLS[call]}", "-e", inject)
        hit += done.returncode != 0
        if done.returncode not in (0, -signal.SIGKILL):
            assert_refused(done, "a worker process was killed")
        check_finished_or_rerun(forked, out, whole[0], done)
    assert hit >= 4


def check_finished_or_rerun(
    forked: Ingest, out: Path, expected: dict[str, str], done: subprocess.CompletedProcess[str]
) -> None:
    if done.returncode:
        check_rerun(forked, out, expected)
    else:
        assert tree(out) == expected


TAR, SPILL, MANIFEST = "train-000001.tar", ".ingest/0000000000.spill", "manifest.json"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        (SPILL, "write:error=ENOSPC", "No space left on device"),
        (SPILL, "close:error=EIO", "Input/output error"),
        (TAR, "fsync:error=EIO", "Input/output error"),
        (TAR, "close:error=EDQUOT", "Disk quota exceeded"),
        (MANIFEST, "rename:error=EROFS", "Read-only file system"),
    ],
)
def test_a_system_call_that_fails(
    strace: str,
    small: list[str],
    forked: Ingest,
    whole: tuple[dict[str, str], int],
    tmp_path: Path,
    name: str,
    fault: str,
    words: str,
) -> None:
    """I3 on the real command: one file's write, fsync, close or rename fails."""
    out = tmp_path / "out"
    path = out / name
    options = ["-P", str(path.with_name(f".tmp-{path.name}")), "-P", str(path), "-e", f"trace={fault.split(':')[0]}"]
    done = traced(strace, small, out, *options, "-e", f"inject={fault}")
    assert_refused(done, "cannot write", words, str(out), path.name)
    assert not list(out.rglob(".tmp-*")), "a temporary file was left"
    check_rerun(forked, out, whole[0])


def test_a_file_size_limit(small: list[str], forked: Ingest, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    """I3 by the real limit: writes beyond 100 kB fail with EFBIG."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", *small, "--to-shards", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=limit)
    assert_refused(done, "cannot write", "0000000000.spill", "File too large")
    check_rerun(forked, tmp_path / "out", whole[0])


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ("mount -t tmpfs -o size=1m none", ("No space left on device", "MB are free", "--dry-run")),
        ('mount --bind "$0" "$0" && mount -o remount,bind,ro', ("Read-only file system",)),
    ],
)
def test_a_mount_that_takes_nothing(small: list[str], tmp_path: Path, mount: str, words: tuple[str, ...]) -> None:
    """I3 and I5 by real mounts: a disk of 1 MB, a read-only one."""
    prefix = ["unshare", "-Urm", "sh", "-c", f'{mount} "$0" && exec "$@"', str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here (unshare -Urm)")
    command = [*prefix, sys.executable, "-m", *small, "--to-shards", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert_refused(done, "cannot write", str(tmp_path / "out"), *words)
    assert ("make room" in done.stderr) == ("tmpfs" in mount)
    assert not list(tmp_path.iterdir())
    if "tmpfs" in mount:
        tried = subprocess.run([*command, "--dry-run"], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
        assert "1 MB are free there, which is TOO LITTLE" in tried.stdout


def test_clock_and_umask_do_not_enter(small: list[str], whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    """I13: the same bytes in 1970 and 2099, in another place, for a user who shares nothing, by two workers."""
    for year, seconds in (("1970", 5), ("2099", 4_100_000_000)):
        environment = {"PYTHONPATH": str(INJECTED), "SHARDCLIP_CLOCK": str(seconds), "TZ": "Pacific/Apia"}
        done = subprocess.run(
            [sys.executable, "-m", *small, "--workers", year[0], "--to-shards", str(tmp_path / year)],
            cwd=REPOSITORY, env={**os.environ, **environment, "LC_ALL": "C", "PYTHONHASHSEED": year},
            capture_output=True, text=True, umask=0o077,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert tree(tmp_path / year) == whole[0]


def test_two_ingests_into_one_folder(small: list[str], forked: Ingest, tmp_path: Path) -> None:
    """I4: the second is refused and changes nothing; a dead holder's lock is taken over."""
    out = tmp_path / "out"
    from shards.lock import exclusive

    work = out / ".ingest"
    work.mkdir(parents=True)
    with exclusive(work / "lock", "another ingest is writing here"):
        before = tree(work)
        assert_refused(run_module(*small, "--to-shards", out), "another ingest is writing", str(os.getpid()))
        assert tree(work) == before
    assert not (work / "lock").exists()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    holder = {"host": os.uname().nodename, "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    (work / "lock").write_text(json.dumps({**holder, "pid": int(dead.stdout)}))
    assert forked(out).returncode == 0
    assert [problem for _, problem in verify(out) if problem] == []
    lock = tmp_path / "set" / ".ingest" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({**holder, "pid": os.getpid(), "started": "1"}))  # of a process that had our number
    with exclusive(lock, "taken"):
        assert json.loads(lock.read_bytes())["started"] != "1"


def test_a_holder_that_was_killed_is_dead_before_its_parent_asks(tmp_path: Path) -> None:
    from shards.lock import Held, exclusive

    holds = (
        "import pathlib, sys, time, shards.lock; lock = shards.lock.exclusive(pathlib.Path(sys.argv[1]), sys.argv[1])"
    )
    command = [
        sys.executable,
        "-c",
        f"{holds}; lock.__enter__(); print(flush=True); time.sleep(600)",
        tmp_path / "lock",
    ]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline()
        with pytest.raises(Held), exclusive(tmp_path / "lock", "taken"):
            pass
        holder.kill()
        while state(holder.pid) != "Z" or len(list(Path(f"/proc/{holder.pid}/task").iterdir())) > 1:
            time.sleep(0.01)
        with exclusive(tmp_path / "lock", "taken"):
            pass


def test_a_holder_whose_number_is_anothers_by_now_is_dead(tmp_path: Path) -> None:
    from shards.lock import Held, exclusive

    with exclusive(tmp_path / "lock", "taken"):
        holder = json.loads((tmp_path / "lock").read_bytes())
    (tmp_path / "lock").write_text(json.dumps(holder))
    with pytest.raises(Held), exclusive(tmp_path / "lock", "taken"):
        pass
    (tmp_path / "lock").write_text(json.dumps({**holder, "started": f"{holder['started']}0"}))
    with exclusive(tmp_path / "lock", "taken") as lease:
        assert lease.mine()


def test_a_dead_holders_lock_is_not_taken_from_who_took_it_over_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found it dead; the other one is done with it before this one begins."""
    from shards import lock

    other, is_alive = lock.exclusive(tmp_path / "lock", "taken"), lock._is_alive
    (tmp_path / "lock").write_text("nobody's")
    os.utime(tmp_path / "lock", (1, 1))

    def look(holder: dict, age: float) -> bool:
        monkeypatch.setattr(lock, "_is_alive", is_alive)
        found = is_alive(holder, age)
        other.__enter__()
        return found

    monkeypatch.setattr(lock, "_is_alive", look)
    with pytest.raises(lock.Held, match="taken"), lock.exclusive(tmp_path / "lock", "taken"):
        pass
    other.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_silent_holder_elsewhere_is_dead_after_a_while(tmp_path: Path) -> None:
    from shards.lock import DEAD_AFTER_S, exclusive

    lock = tmp_path / "set" / ".ingest" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"host": "another-node", "boot": "x", "pid": 1}))
    os.utime(lock, (time.time() + 20,) * 2)  # its last heartbeat came after ours was made
    with pytest.raises(InputError, match="another-node, last seen 0 s ago"), exclusive(lock, "taken"):
        pass
    long_ago = time.time() - DEAD_AFTER_S - 1
    os.utime(lock, (long_ago, long_ago))
    with exclusive(lock, "taken"):
        assert json.loads(lock.read_bytes())["pid"] == os.getpid()


def test_a_worker_that_ends_at_its_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a disk that is full, to whoever writes there meanwhile."""

    def broken(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with Processes(1) as processes:
        monkeypatch.setattr(processes._executor, "submit", broken)
        with pytest.raises(InputError, match="a worker process was killed"):
            list(processes.map(len, ["x"]))


def test_a_worker_is_born_deaf_to_interrupts() -> None:
    """One that is hit while it imports would print a traceback beside the parent's line."""
    held = []

    def tasks() -> Iterator[int]:
        yield -1
        for process in pool._executor._processes.values():  # just started
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            held.extend(int(line.split()[1], 16) for line in lines if line.startswith(("SigBlk", "SigIgn")))
        yield -2

    with Processes(1) as pool:
        assert sorted(pool.map_unordered(abs, tasks())) == [1, 2]
    assert len(held) == 2 and any(mask >> (signal.SIGINT - 1) & 1 for mask in held)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_few_results_wait_for_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of phantom's films each is 100 KB, and one worker may be stopped."""

    class Slow(Future[int]):
        def result(self, *_: object, **__: object) -> int:
            self.drawn = len(futures)
            return 0

    def submit(_: object, task: int) -> Future[int]:
        future = Future[int]() if futures else Slow()
        futures.append(future)
        if futures[1:]:
            future.set_result(task)
        if task == 99 and not futures[0].done():
            futures[0].set_result(0)
        return future

    futures: list[Any] = []
    with Processes(2) as pool:
        monkeypatch.setattr(pool, "_executor", SimpleNamespace(submit=submit, shutdown=pool._executor.shutdown))
        assert list(pool.map(abs, range(100))) == list(range(100))
    assert futures[0].drawn == 5


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    """I14: no writer survives a kill of the parent; a killed worker ends the run with one line."""
    h5 = write_h5(tmp_path / "a.h5", np.repeat(made_up_images(50), 60, axis=0))
    table = write_csv(tmp_path / "a.csv", ["impression"], [[f"Film {i}"] for i in range(3000)])
    command = [sys.executable, "-m", "ingest", "--h5", str(h5), "--csv", str(table), "--workers", "2"]
    for victim in ("parent", "worker"):
        out = tmp_path / victim
        stuck = {"PYTHONPATH": str(INJECTED), "SHARDCLIP_FAULT": "hold:.spill", "SHARDCLIP_COUNT": f"{out}-is-stuck"}
        process = subprocess.Popen(
            [*command, "--to-shards", str(out)], cwd=REPOSITORY, env={**os.environ, **stuck}, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        while not Path(stuck["SHARDCLIP_COUNT"]).exists():
            assert process.poll() is None
            time.sleep(0.02)
        workers = _children(process.pid)
        assert workers
        os.kill(process.pid if victim == "parent" else workers[-1], signal.SIGKILL)
        _, stderr = process.communicate(timeout=600)
        deadline = time.monotonic() + 300
        while any(state(pid) not in ("Z", "") for pid in workers):
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
