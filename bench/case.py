"""One measurement in a process of its own: `python -m bench.case TASK`, started by `bench.loader`.

Of its own, because memory, CPU time and bytes read are counted by process, because one loader's threads and compiled
code must not be there for the next, and because a slow file system is put under a process as it starts. The parent
stays small: it imports neither torch nor DALI, whose pages it would share with the child.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.processes import REPOSITORY, forks_die_too
from shards.cli import main_guard
from shards.errors import InputError
from shards.processes import die_with_parent

FLOOR = "floor"
"""The kernels of the `cpu` backend alone."""
UINT8_FILE = "cxr-uint8.h5"
_PATIENCE_S = 300.0
"""Longest that a child may take, beside ten times what it is to measure."""


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
    """See `measure`."""
    slow: bool = False
    """Whether a slow file system is under it."""


def run_child(task: Task, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the task gives. InputError, with the last line that the child said, where it fails or hangs.

    What the child and its workers put into the folder for temporary files goes with them, however they end.
    """
    with tempfile.TemporaryDirectory(prefix="shardclip-case-", ignore_cleanup_errors=True) as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "bench.case", json.dumps(asdict(task)), str(result), str(os.getpid())]
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": folder, **(environment or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        limit = _PATIENCE_S + 10 * task.rounds * (task.seconds + task.memory_s)
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
    lines = said.strip().splitlines()
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return lines[-1].removeprefix("bench.case: ") if lines else f"exit code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Of the child and its workers, whatever is left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_task(task: Task) -> dict[str, Any]:
    """In the child."""
    if task.peers_path:
        sys.path.append(task.peers_path)  # after everything that is installed here
    actions = {"measure": _measure, "write": _write, "look": _look, "profile": _profile, "together": _together}
    return actions[task.action](task)


def _look(task: Task) -> dict[str, Any]:
    from bench.cases import look

    return look(task)


def _measure(task: Task) -> dict[str, Any]:
    import torch

    from bench.measure import measure

    if task.slow:
        forget_rows()
    taken = measure(
        _builder(task),
        warmup_batches=task.warmup_batches,
        seconds=task.seconds,
        device=torch.device(task.device),
        memory_s=task.memory_s,
        most_images=task.most_images,
    )
    return {name: value for name, value in asdict(taken).items() if value is not None}


def forget_rows() -> None:
    """A slow file system stands for one whose data are larger than memory: rows are read at every visit, as there."""
    from pipeline import handles

    handles.ROWS_KEPT = 0


def _settings(task: Task) -> Any:
    from pipeline.config import LoaderConfig

    ours = task.loader in ("cpu", "dali", "hdf5", "hdf5-tuned")
    return LoaderConfig(
        shards=Path(task.shards),
        h5=Path(task.h5) if task.h5 else None,
        backend=task.loader if ours else "cpu",
        batch_size=task.batch_size,
        threads=task.threads,
        seed=task.seed,
        own_jpeg=task.own_jpeg,
    )


def _builder(task: Task) -> Any:
    from bench import others, peers

    settings = _settings(task)
    if task.loader == FLOOR:
        from bench.kernels import Floor

        return lambda: Floor(settings)
    theirs = others.LOADERS | peers.LOADERS
    if task.loader in theirs:
        return lambda: theirs[task.loader](_job(task))
    from pipeline.batch import World
    from pipeline.loader import build_loader

    return lambda: build_loader(settings, World(device=task.device))


def _job(task: Task) -> Any:
    import torch

    from bench.others import Job

    device = torch.device(task.device)
    return Job(settings=_settings(task), data=Path(task.data), device=device, mapped=not task.slow)


def _write(task: Task) -> dict[str, Any]:
    from bench import peers
    from bench.sizes import write_uint8

    if task.loader in peers.WRITERS:
        peers.WRITERS[task.loader](_job(task))
    elif task.loader.startswith("hdf5"):
        write_uint8(Path(str(task.h5)), Path(task.data) / UINT8_FILE)
    return {}


def _together(task: Task) -> dict[str, Any]:
    from bench.together import TogetherConfig, run_together

    if task.slow:
        forget_rows()
    wanted = TogetherConfig(
        shards=Path(task.shards),
        backend="cpu" if task.loader == "cpu" else "auto",
        batch_size=task.batch_size,
        rounds=task.rounds,
        seconds=task.seconds,
        threads=task.threads,
    )
    return run_together(wanted)


def _profile(task: Task) -> dict[str, Any]:
    from bench.stages import stages

    return stages(_settings(task), task.seconds)


def main() -> None:
    """Do the task of the command line; the result goes into the file named after it."""
    with main_guard("bench.case"):
        die_with_parent()
        if len(sys.argv) > 3 and os.getppid() != int(sys.argv[3]):  # it died before we asked
            raise SystemExit(1)
        forks_die_too()
        task = Task(**json.loads(sys.argv[1]))
        Path(sys.argv[2]).write_text(json.dumps(run_task(task)))


if __name__ == "__main__":
    main()
