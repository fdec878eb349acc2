"""The files of a run: RUN/config.json, versions.json, metrics.jsonl, checkpoints/, best.pt, requeue, forced.txt, lock,
curves.png, tensorboard/; and who may write them.

One run at a time, on any node: rank 0 holds RUN/lock while the run lasts (see `shards.lock`). Ranks that outlive a
killed torchrun save what is done and leave; a job that is queued again starts beside them. So who goes on with a run
waits for a living holder, and a holder that does not live is replaced.
"""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards import lock
from shards.atomic import check_writable, remove_temporary, write_json
from shards.cli import check_own
from shards.errors import InputError
from shards.schema import MANIFEST_NAME
from train.commandline import to_fields
from train.config import TrainConfig

PACKAGES = (
    *("torch", "torchvision", "open_clip_torch", "timm", "nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    *("numpy", "numba", "pyarrow", "simplejpeg", "h5py"),
)
"""Whose versions a run records."""
_PATIENCE_S = 20


def versions() -> dict[str, Any]:
    """Name -> version: Python, kernel, libraries, commit, GPU, driver, CUDA. What there is none of is absent."""
    found: dict[str, Any] = {"python": platform.python_version(), "kernel": platform.release()}
    found |= {name: version for name in PACKAGES if (version := package_version(name))}
    found |= {"cpus": len(os.sched_getaffinity(0))}
    return {**found, **_commit(), **_gpu()}


def package_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The repository's commit, and whether files differ from it; nothing where the code is installed without one."""
    commit = _ask("git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD")
    if commit is None:
        return {}
    changes = _ask("git", "-C", str(Path(__file__).resolve().parent.parent), "status", "--porcelain", "-uno")
    return {"commit": commit, "uncommitted_changes": bool(changes)}


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {}
    found = {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    driver = _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {**found, **({"driver": driver.splitlines()[0]} if driver else {})}


def _ask(*command: str) -> str | None:
    """What a program says; None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class RunFolder:
    """Names within a run's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        """Folder of step-NNNNNNN.pt."""
        self.best = root / "best.pt"
        """The checkpoint with the lowest validation loss."""
        self.metrics = root / "metrics.jsonl"
        """One JSON object a line."""
        self.config = root / "config.json"
        """The resolved settings; `--config` reads them back."""
        self.requeue = root / "requeue"
        """There when the run was stopped before its end and wants to be started again with --resume auto."""
        self.curves = root / "curves.png"
        """Loss and speed over the steps."""
        self.tensorboard = root / "tensorboard"
        """Folder of TensorBoard's event files."""
        self.forced = root / "forced.txt"
        """What --force went over, a line each."""

    def check_free(self) -> None:
        """InputError where a run is here already: a second one would mix its files with the first one's."""
        if self.config.exists() or self.checkpoints.exists() or self.metrics.exists():
            raise InputError(f"{self.root} holds a run already; add --resume auto to go on, or choose another --out")

    def prepare(self, config: TrainConfig, shards: Sequence[str], forced: Sequence[str]) -> None:
        """Make the folder and write settings, versions (of the `shards` too, a digest a set) and what --force went
        over; clears what a stopped or killed run left."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            remove_temporary(self.root, self.checkpoints)
            write_json(self.config, to_fields(config))
            write_json(self.root / "versions.json", versions() | {"shards": " ".join(shards)})
            if forced:
                with open(self.forced, "a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in forced)
            self.requeue.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to the run's folder {self.root} ({error.strerror})") from None


def check_result(path: Path, ending: str, flag: str, keys: set[str] | None = None) -> None:
    """Before work whose result goes to `path`: InputError where its name does not end so, or is that of a file which a
    run cannot do without, or it lies among a data set's, or there is other JSON than that which has `keys`; OSError
    where it cannot be written."""
    if path.suffix.lower() != ending:
        raise InputError(f"{flag} {path} does not end in {ending}; give such a name")
    if (path.name in _KEPT and path.exists()) or (path.parent / MANIFEST_NAME).exists():
        raise InputError(f"{flag} {path} would write over a file of a run or into a data set; choose another name")
    if keys is not None:
        check_own(path, keys, flag)
    check_writable(path)


_KEPT = {"config.json", "versions.json"}
NAME = "lock"
WAIT_S = 90.0
"""A heartbeat that has stopped is believed to have after 60 s; what a save takes at the end of a run."""


@contextlib.contextmanager
def leased(root: Path, *, wait_s: float) -> Iterator[lock.Lease]:
    """Hold a run's folder inside the block, which is made and, where nothing was put into it, removed again.

    InputError where another run holds it for longer than `wait_s`, or it cannot be made.
    """
    made = [folder for folder in (root, *root.absolute().parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        holding = lock.exclusive(root / NAME, f"another run is writing to {root}", wait_s=wait_s)
        lease = holding.__enter__()
    except OSError as error:
        raise InputError(f"cannot write to the run's folder {root} ({error.strerror})") from None
    try:
        yield lease
    finally:
        holding.__exit__(None, None, None)
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


class LeaseLost(InputError):
    """Another run has taken over the folder."""


def check_lease(lease: lock.Lease) -> None:
    """LeaseLost where another run has taken the folder over, because this process was stopped, or cut off, for long."""
    if not lease.mine():
        raise LeaseLost(
            f"{lease.path.parent} belongs to another run by now, because this one stood still for more than "
            f"{lock.DEAD_AFTER_S:.0f} s; it ends without writing more there"
        )
