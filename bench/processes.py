"""Processes: an end that leaves nothing behind; a command run, or watched from outside; memory, CPU time and bytes read
of one with all its descendants, by the kernel's count."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.cli import main_guard
from shards.errors import InputError
from shards.processes import die_with_parent

REPOSITORY = Path(__file__).resolve().parent.parent
_LOOK_EVERY_S, _SAMPLE_EVERY_S, _GRACE_S = 0.02, 0.2, 10.0
_ENDINGS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def bench_guard(prog: str) -> Iterator[None]:
    """`main_guard`, and an end by a signal (`timeout`, `scancel`, a closed terminal) is an end as any other: what was
    started is ended, temporary folders go."""
    before = {each: signal.getsignal(each) for each in _ENDINGS}
    for each, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(each, _leave)
    try:
        with main_guard(prog):
            yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _leave(number: int, _frame: object) -> None:
    for each in _ENDINGS:
        signal.signal(each, signal.SIG_IGN)  # a second one does not stop the tidying
    raise SystemExit(128 + number)


def forks_die_too() -> None:
    """From now on whatever this process forks, and they fork, dies with its parent.

    A DataLoader's worker looks for its parent every 5 s, but takes whoever is its parent once it is set up: one whose
    parent was killed before that would live for ever.
    """
    parent = 0

    def note() -> None:
        nonlocal parent
        parent = os.getpid()

    def follow() -> None:
        die_with_parent()
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    os.register_at_fork(before=note, after_in_child=follow)


@contextmanager
def pinned(cpus: tuple[int, ...]) -> Iterator[None]:
    """This process, and what it starts, on some CPUs only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_module(command: Sequence[object], *, seconds: float | None = None, **how: Any) -> int:
    """Run `python -m COMMAND` in the repository: its exit code; 124 where it was ended after so many seconds.

    Asked before it is killed, and asked too where this process ends: it has children and folders of its own.
    """
    process = subprocess.Popen([sys.executable, "-m", *map(str, command)], cwd=REPOSITORY, **how)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        _ask_to_end(process)


def _ask_to_end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a command took."""

    seconds: float
    cpu_s: float
    """User and system time of the process and of all it waited for."""
    marks: tuple[float, ...]
    """Seconds after the start at which each of the things looked for was first there."""
    peak: "Footprint"
    """Of all processes together at the worst moment; zero where memory was not sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Memory of a process tree: proportional set size, in which a page that n processes share counts 1/n for each."""

    total: int = 0
    """Bytes."""
    parent: int = 0
    """Bytes of the process that was started."""
    children: tuple[int, ...] = field(default=())
    """Bytes of each of its descendants, largest first."""


def run_watched(command: Sequence[object], marks: Sequence[Callable[[], bool]] = (), *, memory: bool) -> Run:
    """Run `python -m COMMAND`; `marks` are asked, in order, until they say yes. InputError where the command fails."""
    seen: list[float] = []
    peak, sampled = Footprint(), 0.0
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.perf_counter()
            if done:
                break
            while len(seen) < len(marks) and marks[len(seen)]():
                seen.append(now - started)
            if memory and now - sampled >= min(_SAMPLE_EVERY_S, (now - started) / 5):  # short runs too have some
                peak, sampled = max(peak, footprint(process.pid), key=lambda found: found.total), now
            time.sleep(_LOOK_EVERY_S)
    except BaseException:
        process.kill()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)  # reaped here, for its usage
    _check(process)
    seen += [now - started] * (len(marks) - len(seen))
    return Run(seconds=now - started, cpu_s=usage.ru_utime + usage.ru_stime, marks=tuple(seen), peak=peak)


def _check(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        said = stream.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        raise InputError(f"a measured run ended with exit code {process.returncode}: {said[-1] if said else 'silent'}")


def footprint(pid: int) -> Footprint:
    """Memory of a process and its descendants now."""
    sizes = [_pss(each) for each in tree(pid)]
    return Footprint(total=sum(sizes), parent=sizes[0], children=tuple(sorted(sizes[1:], reverse=True)))


def tree(pid: int) -> Iterator[int]:
    """A process and its descendants, as far as they are still there."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = path.read_text("utf-8").split()
        except OSError:
            continue
        for child in found:
            yield from tree(int(child))


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a process and its descendants have used so far; of those that ended, if they were waited for, bytes only."""

    cpu_s: float
    """User and system time."""
    storage_bytes: int
    """Fetched from storage, because the page cache did not have them (`read_bytes` of /proc/PID/io)."""


def usage(pid: int) -> Usage:
    """Of a process tree, now."""
    processes = list(tree(pid))
    return Usage(cpu_s=sum(map(_cpu_ns, processes)) / 1e9, storage_bytes=sum(map(_storage_bytes, processes)))


def _cpu_ns(pid: int) -> int:
    """Of all threads of a process, those that ended included; 0 for a process that has gone."""
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)  # clock_getcpuclockid(3), for which Python has no name
    except OSError:
        return 0


def _storage_bytes(pid: int) -> int:
    return _field(Path(f"/proc/{pid}/io"), "read_bytes:")


def _pss(pid: int) -> int:
    return _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") * 1024


def _field(file: Path, name: str) -> int:
    """The number of a line; 0 for a process that has gone."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)
