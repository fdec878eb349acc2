"""Which loaders a bench measures, what each of them reads, and one measurement in a process of its own.

Of its own (`bench.measure`), because memory, CPU time and bytes read are counted by process, because one loader's
threads and compiled code must not be there for the next, and because a slow file system is put under a process as it
starts. The parent stays small: it imports neither torch nor DALI, whose pages it would share with the child.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bench.processes import REPOSITORY
from shards.cli import say
from shards.errors import InputError

BASELINE, TUNED = "hdf5", "hdf5-tuned"
FLOOR = "floor"
"""The kernels of the `cpu` backend alone."""
FLOORS = {"cpu": "cpu floor", "cpu raw": "cpu raw floor"}
"""Case -> its kernels alone."""
UINT8_FILE = "cxr-uint8.h5"
PEERS = ("spdl", "streaming", "litdata", "ffcv")
CONVERTED = ("streaming", "litdata", "ffcv")
"""Peers that need the films in a form of their own."""
NOTES = {
    "webdataset": "shards with replacement, libjpeg-turbo, torchvision on one channel",
    "dali reader": "fn.readers.webdataset, the crop decoded only, shuffled in a buffer",
    "spdl": "its tar reader and threads, shuffled by shard only, libjpeg-turbo, aten's resize on one channel",
    "streaming": "MDS shards, libjpeg-turbo, torchvision on one channel",
    "litdata": "its chunks, libjpeg-turbo, torchvision on one channel",
    "ffcv": "raw RGB at 12 times the bytes; its resize is OpenCV's area filter, it has no bicubic with antialias",
}
UNDELAYED = {"litdata": "maps its files into memory, which a slow file system here cannot delay; measured without one"}
"""Why a peer is not measured on a slow file system."""
_PATIENCE_S = 300.0
"""Longest that a child may take for a round, beside ten times what it is to measure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a child does. Paths are absolute."""

    action: str = "measure"
    """measure; write: make the data of a loader of others; look: what runs here; profile: where the time goes;
    together: what the loader costs training."""
    loader: str = ""
    """A backend (`auto` for `together`), FLOOR, or the name of a loader of others."""
    shards: str
    """Folder of shards."""
    h5: str | None = None
    """The HDF5 file they were made from."""
    dataset: str = "cxr"
    """Path of its films in it."""
    raw_shards: str | None = None
    csv: tuple[str, ...] = ()
    text_column: str = ""
    """What `look` compares with the shards."""
    data: str = ""
    """Folder of what `write` makes for this loader."""
    peers_path: str | None = None
    """Folder of further packages."""
    device: str = "cpu"
    """Where images go."""
    batch_size: int = 64
    threads: int | None = None
    seed: int = 0
    own_jpeg: bool = True
    """See `LoaderConfig`."""
    warmup_batches: int = 0
    rounds: int = 1
    """Of `together`; all else is measured once."""
    seconds: float = 0.0
    memory_s: float = 0.0
    most_images: int | None = None
    """See `measure.measure`."""


def run_child(task: Task, variables: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """What the task gives. InputError, with the last line that the child said, where it fails or hangs.

    What the child and its workers put into the folder for temporary files goes with them, however they end.
    """
    with tempfile.TemporaryDirectory(prefix="shardclip-case-", ignore_cleanup_errors=True) as folder:
        result = Path(folder, "result.json")
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.measure", json.dumps(asdict(task)), str(result), str(os.getpid())],
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": folder, **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        limit = task.rounds * (_PATIENCE_S + 10 * (task.seconds + task.memory_s))
        try:
            _, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise InputError(f"not done after {limit:.0f} s, stopped") from None
        finally:
            _end(process)
        if process.returncode:
            raise InputError(_last_line(said.decode(errors="replace"), process.returncode))
        return json.loads(result.read_bytes())


def _last_line(said: str, code: int) -> str:
    """Of what a child that failed said; libraries may have filled it with warnings before."""
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    lines = said.strip().splitlines() or [f"exit code {code}"]
    return lines[-1].removeprefix("bench.measure: ")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Of the child and its workers, whatever is left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One loader on one device."""

    name: str
    loader: str
    """A backend, FLOOR, or the name of a loader of others."""
    device: str = "cpu"
    raw: bool = False
    """Reads the raw shards."""
    uint8: bool = False
    """Reads the uint8 copy of the HDF5 file."""
    own_jpeg: bool = True
    """See `LoaderConfig`."""
    peer: bool = False
    """Somebody else's."""

    def made(self, scratch: Path) -> Path | None:
        """The file or folder of what has to be made for it."""
        return scratch / (UINT8_FILE if self.uint8 else self.loader) if self.uint8 or self.loader in CONVERTED else None

    def places(self, config: Any, scratch: Path) -> list[Path]:
        """Files and folders that it reads films from; the HDF5 baselines take tokens and labels from the shards."""
        if self.loader in (BASELINE, TUNED):
            return [self.made(scratch) or config.h5, config.shards]
        return [self.made(scratch) or (config.raw_shards if self.raw else config.shards)]

    def task(self, config: Any, scratch: Path, seed: int) -> Task:
        """What a child does to measure it."""
        made = self.made(scratch)
        return Task(
            loader=self.loader,
            shards=str(absolute(config.raw_shards if self.raw else config.shards)),
            h5=absolute(made if self.uint8 else config.h5),
            dataset="cxr" if self.uint8 else config.dataset,
            data=absolute(made) or "",
            peers_path=absolute(config.peers_path),
            device=self.device,
            batch_size=config.batch_size,
            threads=config.threads,
            seed=seed,
            own_jpeg=self.own_jpeg,
            warmup_batches=config.warmup_batches,
            seconds=config.seconds,
            memory_s=config.memory_s,
        )


def absolute(path: Path | None) -> str | None:
    """As a child, which has another working folder, has to be given it."""
    return str(path.resolve()) if path else None


def cases(config: Any, found: dict[str, Any]) -> tuple[list[Case], dict[str, str]]:
    """What to measure, and why the rest of what was asked for cannot be. `found`: what `look` says of this machine."""
    listed = list(_runnable(config, found))
    listed = [replace(case, device="cuda") if found["cuda"] and case.loader != FLOOR else case for case in listed]
    absent = {name: why for name, why in found["missing"].items() if config.peers and why}
    if any(config.slow_settings()) and config.peers:
        absent = UNDELAYED | absent
        listed = [case for case in listed if case.name not in absent]
    if config.only:
        known = {case.name for case in listed} | set(absent)
        if unknown := [name for name in config.only if name not in known]:
            raise InputError(f"--only {unknown[0]!r} is none of the cases here: {', '.join(sorted(known))}")
        listed = [case for case in listed if case.name in config.only]
        absent = {name: why for name, why in absent.items() if name in config.only}
    return listed, absent


def _runnable(config: Any, found: dict[str, Any]) -> Iterator[Case]:
    """All that runs here: the baselines, loaders of others (they are given JPEG), ours."""
    files = ([("", False)] if config.h5 else []) + ([(" uint8", True)] if config.uint8 else [])
    yield from (Case(name=name + form, loader=name, uint8=uint8) for form, uint8 in files for name in (BASELINE, TUNED))
    names = ["webdataset"] + (["dali reader"] if found["dali"] else [])
    names += [name for name in PEERS if config.peers and found["missing"][name] is None]
    yield from (Case(name=name, loader=name, peer=True) for name in names if found["codec"] == "jpeg")
    yield Case(name="cpu", loader="cpu")
    if config.floor:
        yield Case(name="cpu libjpeg-turbo", loader="cpu", own_jpeg=False)
        yield Case(name=FLOORS["cpu"], loader=FLOOR)
    if config.raw_shards:
        yield Case(name="cpu raw", loader="cpu", raw=True)
        if config.floor:
            yield Case(name=FLOORS["cpu raw"], loader=FLOOR, raw=True)
    if found["dali"]:
        yield Case(name=f"dali ({'GPU' if found['cuda'] else 'CPU'})", loader="dali")


def convert(config: Any, listed: list[Case], scratch: Path) -> dict[str, str]:
    """Make what cases read that is not there; why, by name, where a peer cannot. What is there is whole."""
    unfit: dict[str, str] = {}
    for case in listed:
        made = case.made(scratch)
        if made is None or made.exists():
            continue
        say(f"converting the films for {case.name}")
        partial = scratch / f"partial-{case.loader}"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        task = replace(case.task(config, scratch, 0), action="write", data=str(partial.resolve()))
        try:
            run_child(replace(task, h5=absolute(config.h5), dataset=config.dataset))
        except InputError as error:
            if not case.peer:
                raise
            unfit[case.name] = f"its data could not be made: {error}"
        else:
            os.replace(partial / UINT8_FILE if case.uint8 else partial, made)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return unfit
