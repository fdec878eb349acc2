"""Ingest on a real Dask cluster: `dask scheduler` and `dask worker` processes that the tests start, and kill."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import FINDINGS, REPOSITORY, assert_refused, made_up_images, run_module, write_csv, write_h5
from PIL import Image

from ingest.cluster import open_cluster
from ingest.config import IngestConfig
from ingest.fingerprint import fingerprint
from ingest.remote import Errand, Failure, Sealed, Surroundings, no_task, run_sealed
from ingest.spill import spill_path
from shards.atomic import atomic_file, remove_temporary, writing_as
from shards.errors import InputError

pytest.importorskip("distributed", reason="distributed is not installed (extra `cluster`)")
pytestmark = pytest.mark.slow

INJECTED = Path(__file__).parent / "injected"
WAIT_S = 240
"""A guard against waiting for ever."""


class DaskCluster:
    """A scheduler and its workers, each a process with a log file and a session of its own."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder, self._settings = folder, settings
        self.file = folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--port", "0", "--scheduler-file", str(self.file))
        self.workers: list[subprocess.Popen[bytes]] = []

    def add_worker(self, *prefix: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker of one thread, in a folder of its own and without a nanny that would replace it."""
        name = f"worker-{len(self.workers)}"
        options = ("--scheduler-file", str(self.file), "--nthreads", "1", "--no-nanny")
        self.workers.append(self._start(name, *options, prefix=prefix, **environment))
        return self.workers[-1]

    def ready(self) -> "DaskCluster":
        """Wait until all workers are registered."""
        deadline = time.monotonic() + WAIT_S
        for number in range(len(self.workers)):
            log = self.folder / f"worker-{number}.log"
            while "Registered to" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        return self

    def add_stuck_worker(self) -> Path:
        """Start a worker that never ends its first spill; the file that says when it has come so far."""
        stuck = self.folder / f"stuck-{len(self.workers)}"
        fault = {"SHARDCLIP_FAULT": "hold:.spill", "SHARDCLIP_COUNT": str(stuck)}
        self.add_worker(PYTHONPATH=os.pathsep.join([str(INJECTED), str(REPOSITORY)]), **fault)
        return stuck

    def logs(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.log"))

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(
        self, name: str, *options: str, prefix: tuple[str, ...] = (), **environment: str
    ) -> subprocess.Popen[bytes]:
        place = self.folder / name
        place.mkdir()
        with open(self.folder / f"{name}.log", "wb") as log:
            return subprocess.Popen(
                [
                    *prefix,
                    sys.executable,
                    "-m",
                    "dask",
                    name.split("-")[0],
                    "--host",
                    "127.0.0.1",
                    "--no-dashboard",
                    *options,
                ],
                cwd=place,
                env={**os.environ, "DASK_TEMPORARY_DIRECTORY": str(place), **self._settings, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


@contextlib.contextmanager
def started(folder: Path, workers: int, **settings: str) -> Iterator[DaskCluster]:
    cluster = DaskCluster(folder, **settings)
    try:
        for _ in range(workers):
            cluster.add_worker()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    """Two workers that log all they can."""
    folder = tmp_path_factory.mktemp("cluster")
    with started(folder, 2, DASK_LOGGING__DISTRIBUTED="debug") as running:
        yield running.ready()


def on(cluster: DaskCluster) -> list[str | Path]:
    return ["--scheduler", cluster.file]


def tree(root: Path) -> dict[str, str]:
    """Digest of everything in a folder, hidden files too; there may be no folder in it."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir())}


@pytest.fixture(scope="module")
def small(source: tuple[Path, Path]) -> list[str | Path]:
    ours = ["ingest", "--h5", source[0], "--csv", source[1], "--group-column", "patient", "--label-columns", *FINDINGS]
    return [*ours, "--val-fraction", "0.25", "--shard-mb", "0.5"]


@pytest.fixture(scope="module")
def expected(small: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What processes make."""
    out = tmp_path_factory.mktemp("processes") / "out"
    assert run_module(*small, "--to-shards", out, "--workers", "1").returncode == 0
    return tree(out)


def test_same_bytes_as_with_processes(
    cluster: DaskCluster, small: list[str | Path], expected: dict[str, str], tmp_path: Path
) -> None:
    """Paths are given relative to a folder that no worker works in, the scheduler by its address."""
    relative = [os.path.relpath(each, REPOSITORY) if isinstance(each, Path) else each for each in small]
    address = json.loads(cluster.file.read_text())["address"]
    out = Path(os.path.relpath(tmp_path / "out", REPOSITORY))
    done = run_module(*relative, "--to-shards", out, "--scheduler", address)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert tree(tmp_path / "out") == expected


def test_goes_on_where_processes_were_killed(
    cluster: DaskCluster, small: list[str | Path], expected: dict[str, str], tmp_path: Path
) -> None:
    out, count = tmp_path / "out", tmp_path / "count"
    killed = subprocess.run(
        [sys.executable, "-m", *map(str, small), "--workers", "1", "--to-shards", str(out)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(INJECTED), "SHARDCLIP_FAULT": "kill:40", "SHARDCLIP_COUNT": str(count)},
        capture_output=True,
        start_new_session=True,
    )
    assert killed.returncode == -signal.SIGKILL
    notes = {path.stem for path in (out / ".ingest").glob("*-0*.json")}
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if path.stem in notes}
    assert before
    done = run_module(*small, "--to-shards", out, *on(cluster))
    assert done.returncode == 0, done.stderr
    assert tree(out) == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before


CANARY = "Kanarienvogel"


def test_logs_know_no_patient(cluster: DaskCluster, tmp_path: Path) -> None:
    """Tasks that fail in each phase, by a folder where a file should go, with reports and film names as arguments."""
    from distributed import Client

    folder, out = tmp_path / "films", tmp_path / "out"
    (folder / CANARY).mkdir(parents=True)
    names = [f"{CANARY}/{i}.png" for i in range(8)]
    for name, pixels in zip(names, made_up_images(8), strict=True):
        Image.fromarray(pixels).save(folder / name)
    rows = [[name, f"{CANARY} {i}", f"{CANARY}{i}", i % 2] for i, name in enumerate(names)]
    table = write_csv(tmp_path / "a.csv", ["Path", "impression", "patient", "Edema"], rows)
    ours = ["ingest", "--images", folder, "--csv", table, "--group-column", "patient", "--label-columns", "Edema"]
    obstacles = (spill_path(out / ".ingest", 0), out / "train-000000.tar")
    # Who finds a spill asks of which ingest it is.
    config = IngestConfig(to_shards=out, images=folder, csv=(table,), group_column="patient", label_columns=("Edema",))
    (out / ".ingest").mkdir(parents=True)
    (out / ".ingest" / "inputs.json").write_text(json.dumps(fingerprint(config)))
    for obstacle in obstacles:
        (obstacle / "in-the-way").mkdir(parents=True)
        done = run_module(*ours, "--to-shards", out, *on(cluster))
        assert_refused(done, "cannot write", obstacle.name)
        assert CANARY not in done.stderr
        shutil.rmtree(obstacle)
    assert run_module(*ours, "--to-shards", out, *on(cluster)).returncode == 0

    def fail(word: str) -> None:  # not sealed: this check can fail
        raise ValueError(word)

    with Client(scheduler_file=str(cluster.file), set_as_default=False) as client:
        assert client.submit(fail, "Kontrolle").exception() is not None
    logs = cluster.logs()
    assert "Kontrolle" in logs
    assert "shardclip-encode" in logs
    assert CANARY not in logs


def hidden(folder: Path) -> tuple[str, ...]:
    """Prefix of a command that sees an empty folder there: a mount of its own."""
    prefix = ("unshare", "-Urm", "sh", "-c", f'mount -t tmpfs none "{folder}" && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("unshare cannot make a mount namespace here")
    return prefix


@pytest.mark.parametrize("fault", ["versions", "output", "films"])
def test_a_worker_elsewhere_is_refused(
    cluster: DaskCluster, source: tuple[Path, Path], tmp_path: Path, fault: str
) -> None:
    """One worker beside two good ones has another simplejpeg, or does not see a folder."""
    h5 = tmp_path / "films" / "MRN77.h5"
    h5.parent.mkdir()
    shutil.copy(source[0], h5)
    (tmp_path / "shards").mkdir()
    metadata = tmp_path / "simplejpeg-0.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: simplejpeg\nVersion: 0.0.1\n")
    if fault == "versions":
        worker = cluster.add_worker(PYTHONPATH=str(tmp_path))
    else:
        worker = cluster.add_worker(*hidden(tmp_path / ("shards" if fault == "output" else "films")))
    try:
        cluster.ready()
        done = run_module(
            "ingest", "--h5", h5, "--csv", source[1], "--to-shards", tmp_path / "shards" / "out", *on(cluster)
        )
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    words = {"versions": "has simplejpeg 0.0.1", "output": "output folder", "films": "films of source 0"}
    assert_refused(done, os.uname().nodename, words[fault])
    assert "MRN77" not in done.stderr


def test_a_worker_that_joins_late_is_checked_with_its_task(source: tuple[Path, Path], tmp_path: Path) -> None:
    sources = IngestConfig(to_shards=tmp_path, h5=(source[0],), csv=(source[1],)).source_list()
    here = Surroundings.here(sources, tmp_path)
    assert run_sealed(Sealed(Errand(surroundings=here, function=no_task, task=None))).open() is None
    number, path, size = here.films[0]
    others = (
        dataclasses.replace(here, versions={**here.versions, "shardclip's code": "0"}),
        dataclasses.replace(here, marker=tmp_path / "elsewhere" / "marker"),
        dataclasses.replace(here, films=((number, path, size + 1),)),
    )
    for surroundings in others:
        failure = run_sealed(Sealed(Errand(surroundings=surroundings, function=no_task, task=None))).open()
        assert isinstance(failure, Failure) and isinstance(failure.error, InputError)


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """A worker given up for dead is still at a file that another has begun again; it fails, and takes nothing away."""
    path = tmp_path / "spill.bin"
    with contextlib.ExitStack() as lost:
        with writing_as("lost-"):
            lost.enter_context(atomic_file(path)).write(b"half")
        with writing_as("second-"), atomic_file(path) as second:
            second.write(b"whole")
            with pytest.raises(RuntimeError), lost:
                raise RuntimeError
            assert not path.exists()
    assert path.read_bytes() == b"whole"
    (tmp_path / ".tmp-dead-spill.bin").write_bytes(b"")
    remove_temporary(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["spill.bin"]


def test_no_scheduler(small: list[str | Path], tmp_path: Path) -> None:
    done = run_module(*small, "--to-shards", tmp_path / "out", "--scheduler", "127.0.0.1:1", "--scheduler-wait", "1")
    assert_refused(done, "no Dask scheduler answers at 127.0.0.1:1 within 1 s")
    for scheduler in ("nowhere.json", "tls://127.0.0.1:1", "nonsense", "flying://pigs:1"):
        with pytest.raises(InputError, match=scheduler), open_cluster(scheduler, 0.5, (), tmp_path):
            pass


def test_settings_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--workers"):
        IngestConfig(to_shards=tmp_path, scheduler="127.0.0.1:8786", workers=2)
    with pytest.raises(InputError, match="--scheduler-wait"):
        IngestConfig(to_shards=tmp_path, scheduler="127.0.0.1:8786", scheduler_wait=0)


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """An ingest of several spills."""
    folder = tmp_path_factory.mktemp("longer")
    h5 = write_h5(folder / "a.h5", np.repeat(made_up_images(50), 20, axis=0))
    table = write_csv(folder / "a.csv", ["impression"], [[f"Film {i}"] for i in range(1000)])
    return ["ingest", "--h5", h5, "--csv", table, "--val-fraction", "0.25", "--shard-mb", "16"]


@pytest.fixture(scope="module")
def longer_expected(longer: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("processes") / "out"
    assert run_module(*longer, "--to-shards", out, "--workers", "2").returncode == 0
    return tree(out)


def begin(ours: list[str | Path], out: Path, cluster: DaskCluster, stuck: Path) -> subprocess.Popen[str]:
    """Start an ingest and wait until a worker is stuck."""
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, ours), "--to-shards", str(out), *map(str, on(cluster))],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not stuck.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    stdout, stderr = process.communicate(timeout=WAIT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def test_a_worker_is_killed(longer: list[str | Path], longer_expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(tmp_path, 1) as cluster:
        stuck = cluster.add_stuck_worker()
        process = begin(longer, out, cluster.ready(), stuck)
        cluster.workers[1].kill()
        done = finished(process)
        assert done.returncode == 0, done.stderr
        assert "Removing worker" in cluster.logs() or "Remove worker" in cluster.logs()
    assert tree(out) == longer_expected


def test_all_is_killed(longer: list[str | Path], longer_expected: dict[str, str], tmp_path: Path) -> None:
    """A task that ends workers, then the scheduler: a line each; processes go on with what is there."""
    out = tmp_path / "out"
    with started(tmp_path, 0, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0") as cluster:
        stuck = cluster.add_stuck_worker()
        process = begin(longer, out, cluster.ready(), stuck)
        cluster.workers[0].kill()
        assert_refused(finished(process), "ended 1 workers", "run the command again")
        stuck = cluster.add_stuck_worker()
        process = begin(longer, out, cluster.ready(), stuck)
        cluster.scheduler.kill()
        assert_refused(finished(process), "scheduler is lost", "run the command again")
    done = run_module(*longer, "--to-shards", out, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert tree(out) == longer_expected


def test_no_worker(small: list[str | Path], tmp_path: Path) -> None:
    with started(tmp_path, 0) as cluster:
        while not cluster.file.exists():
            time.sleep(0.05)
        out = ["--to-shards", tmp_path / "out", "--scheduler-wait", "5"]
        assert_refused(run_module(*small, *out, *on(cluster)), "no worker for 5 s")
