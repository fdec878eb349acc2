"""The machine: what a figure was measured on, to stand beside it; and what processes take of it, by the kernel's count:
memory, CPU time and bytes read of one with all its descendants, and a command run to its end, watched from outside."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shards.errors import InputError

PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "webdataset",
    "simplejpeg",
    "pillow",
    "h5py",
    "pyarrow",
    "numpy",
)


_TELLING = re.compile(
    r"[a-z_]+|(vers|proto|sec|data|errors|lookupcache|local_lock)=[\w.-]+|(?!\w*[ug]id)[a-z_]+=\d+[kKmMgG]?"
)
"""Mount options that say how a file system behaves; others may hold paths, hosts or names."""


def environment(places: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Machine, versions, state of the repository, the file systems of `places`. No host name, no user, no path."""
    found = {name: file_system(path) for name, path in (places or {}).items()}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        **({"file_system": found} if found else {}),
    }


def file_system(path: Path) -> dict[str, str]:
    """Type and mount options of the file system that a path lies on."""
    wanted = os.stat(path).st_dev
    number = f"{os.major(wanted)}:{os.minor(wanted)}"
    best = ("", "unknown", "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        own, _, rest = line.partition(" - ")
        fields, kind = own.split(), rest.split()
        inside = Path(path).resolve().is_relative_to(fields[4])
        if inside and len(fields[4]) >= len(best[0]) and (fields[2] == number or best[1] == "unknown"):
            best = fields[4], kind[0], f"{fields[5]},{kind[2]}"
    options = dict.fromkeys(option for option in best[2].split(",") if _TELLING.fullmatch(option))
    return {"type": best[1], "options": ",".join(options)}


def one_line(found: dict[str, Any]) -> str:
    """The machine in a few words."""
    gpu = f", {found['gpu']}" if found["gpu"] else ", no GPU"
    return f"{found['cpus']} CPUs of {found['cpu']}, {found['memory_gib']:.0f} GiB{gpu}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


_LOOK_EVERY_S, _SAMPLE_EVERY_S = 0.02, 0.2

REPOSITORY = Path(__file__).resolve().parent.parent


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


def run_watched(command: Sequence[str | Path], marks: Sequence[Callable[[], bool]] = (), *, memory: bool) -> Run:
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
            found = path.read_text().split()
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
    asked_bytes: int
    """Asked for by read calls, of pipes too; what a mapped file is read by is not in it (`rchar`)."""


def usage(pid: int) -> Usage:
    """Of a process tree, now."""
    processes = list(tree(pid))
    counts = [_io(each) for each in processes]
    return Usage(
        cpu_s=sum(map(_cpu_ns, processes)) / 1e9,
        storage_bytes=sum(each.get("read_bytes", 0) for each in counts),
        asked_bytes=sum(each.get("rchar", 0) for each in counts),
    )


def _cpu_ns(pid: int) -> int:
    """Of all threads of a process, those that ended included; 0 for a process that has gone."""
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)  # clock_getcpuclockid(3), for which Python has no name
    except OSError:
        return 0


def _io(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value in (line.split(":") for line in lines)}


def _pss(pid: int) -> int:
    """Bytes; 0 for a process that has gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
