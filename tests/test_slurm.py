"""The sbatch scripts: clean shell, and a job with `srun` played by a few lines of shell."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, made_up_images, write_csv, write_h5
from soak_train import SMALL

from shards.verify import verify
from train.lead_time import UNKNOWN_S, lead_time, main

SCRIPTS = sorted(REPOSITORY.glob("*/slurm/*.sbatch"))
TRAIN = REPOSITORY / "train" / "slurm" / "train.sbatch"
INJECTED = Path(__file__).parent / "injected"
SRUN = """#!/usr/bin/env bash
# As far as our scripts need it: the command --ntasks times, each with a log of its own, ended with it.
set -eu
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 143' TERM
trap 'kill -USR2 $(jobs -p) 2>/dev/null' USR2
while [[ $1 == --* ]]; do
    case $1 in --ntasks=*) ntasks=${1#*=} ;; --output=*) output=${1#*=} ;; esac
    shift
done
tasks=()
for ((task = 0; task < ntasks; task++)); do "$@" >>"${output/\\%t/$task}" 2>&1 & tasks+=("$!"); done
status=0
for job in "${tasks[@]}"; do
    wait "$job" || status=$?
    while kill -0 "$job" 2>/dev/null; do wait "$job" && status=0 || status=$?; done
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in "show hostnames") echo localhost ;; *) echo "$@" >>"$(dirname "$0")/../scontrol.log" ;; esac
"""


SQUEUE = """#!/usr/bin/env bash
case ${SLURM_TIME_FORMAT:-standard}$* in
    standard*%e*) echo "${FAKE_END:-N/A}" ;;
    *%e*) echo "Tomorr 09:00" ;;
    *) echo "${FAKE_STATE:-RUNNING None}" ;;
esac
"""
DATE = """#!/usr/bin/env bash
# Stands still where a test says when: a job has as long as it says however late it looks.
[[ $* == +%s && -n ${FAKE_NOW:-} ]] && echo "$FAKE_NOW" || command -p date "$@"
"""
STOPPED = """#!/usr/bin/env bash
mkdir -p run && [[ "$*" != *torch.distributed.run* ]] || echo 7 >run/requeue
"""
NOTHING_TO_SAVE = """#!/usr/bin/env bash
[[ "$*" == *torch.distributed.run* ]] || exit 1
trap 'exit 1' USR2
touch started
while :; do sleep 0.1; done
"""
FINISHED = """#!/usr/bin/env bash
[[ "$*" == *torch.distributed.run* ]] || exit 1
touch started && sleep 2 && mkdir -p run/checkpoints && touch run/checkpoints/step-0000009.pt
"""
SLOW_TO_START = """#!/usr/bin/env bash
touch asking
sleep 1
exit 1
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "--shell=bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """Environment of a job on two nodes of one CPU each."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    for name, text in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("squeue", SQUEUE),
        ("date", DATE),
        ("stopped", STOPPED),
        ("nothing", NOTHING_TO_SAVE),
        ("slow", SLOW_TO_START),
        ("finished", FINISHED),
    ):
        path = srun.with_name(name)
        path.write_text(text)
        path.chmod(0o755)
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": "7", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "1"}
    slurm |= {"JOB_NODELIST": "localhost"}
    search = f"{srun.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": search, "PYTHON": sys.executable, **{f"SLURM_{name}": slurm[name] for name in slurm}}


@pytest.mark.slow
def test_ingest_is_preempted_and_goes_on(job: dict[str, str], tmp_path: Path) -> None:
    """SIGTERM ends everything at once; the same job again ends with verified shards, and the logs name no patient."""
    pytest.importorskip("distributed", reason="distributed is not installed (extra `cluster`)")
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    out = tmp_path / "out"
    h5 = write_h5(tmp_path / "a.h5", np.repeat(made_up_images(50), 20, axis=0))
    rows = [[f"Kanarienvogel {i}", f"MRN{i // 3}"] for i in range(1000)]
    table = write_csv(tmp_path / "a.csv", ["impression", "patient"], rows)
    command = ["bash", str(REPOSITORY / "ingest" / "slurm" / "ingest.sbatch"), "--to-shards", str(out), "--h5", str(h5)]
    command += ["--csv", str(table), "--group-column", "patient", "--val-fraction", "0.25", "--shard-mb", "16"]
    stuck = {"PYTHONPATH": str(INJECTED), "SHARDCLIP_FAULT": "hold:.tar", "SHARDCLIP_COUNT": str(tmp_path / "stuck")}
    with open(tmp_path / "first.log", "wb") as log:
        first = subprocess.Popen(command, cwd=REPOSITORY, env={**job, **stuck}, stdout=log, stderr=log)
    try:
        while not (tmp_path / "stuck").exists():  # spills are there, and no shard
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.02)
        assert [path.stat().st_mode & 0o077 for path in (tmp_path / "shardclip-ingest-7").glob("*.pem")] == [0, 0]
    finally:
        first.terminate()
        first.wait(timeout=600)
    assert first.returncode == 128 + signal.SIGTERM
    assert not (out / ".ingest" / "lock").exists()
    assert not (out / "manifest.json").exists()

    second = subprocess.run(command, cwd=REPOSITORY, env=job, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stderr
    assert [problem for _, problem in verify(out) if problem] == []
    assert processes_of(tmp_path) == []
    state = tmp_path / "shardclip-ingest-7"
    assert sorted(path.name for path in state.iterdir()) == ["scheduler.log", "worker-0.log", "worker-1.log"]
    logs = "".join(path.read_text() for path in state.iterdir()) + second.stdout + second.stderr
    assert "tls://" in logs and "tcp://" not in logs
    assert "Kanarienvogel" not in logs and "MRN" not in logs


def test_ingest_says_what_it_lacks(job: dict[str, str], tmp_path: Path) -> None:
    """A Python without Dask ends the job in one line."""
    job["PYTHON"] = shutil.which("false") or "/bin/false"
    script = REPOSITORY / "ingest" / "slurm" / "ingest.sbatch"
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, env=job, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "scheduler did not start" in done.stderr


def training(job: dict[str, str], tmp_path: Path, shards: Path, *more: str) -> subprocess.Popen:
    """The training job, as its nodes run it."""
    command = ["bash", str(TRAIN), "--shards", str(shards), "--out", str(tmp_path / "run"), *SMALL, *more]
    with open(tmp_path / "job.log", "ab") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, env=job, stdout=log, stderr=log)


def wait_for(job: subprocess.Popen, tmp_path: Path, done: Callable[[], bool]) -> None:
    """Return when something is the case, while the job runs."""
    logs = tmp_path / "shardclip-train-7"
    while not done():
        assert job.poll() is None, "".join(path.read_text() for path in [tmp_path / "job.log", *logs.iterdir()])
        time.sleep(0.02)


def ranks_of(run: Path) -> list[int]:
    """Process ids of a run's ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[1:3] == [b"-m", b"train.main"] and str(run).encode() in words:
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_training_queues_itself_again(job: dict[str, str], tmp_path: Path, shards_dir: Path) -> None:
    """A rank is killed after a save: queued again. Then USR2, as before the time is up: saved, queued again."""
    run, calls = tmp_path / "run", tmp_path / "scontrol.log"
    job |= {"RANKS_PER_NODE": "1", "STAGE_DIR": str(tmp_path / "stage")}
    long = ("--steps", "100000", "--save-every", "2", "--validate-every", "0")
    first = training(job, tmp_path, shards_dir, *long)
    wait_for(first, tmp_path, lambda: (run / "checkpoints" / "step-0000004.pt").exists())
    ranks = ranks_of(run)
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGKILL)
    assert first.wait(600) == 0
    assert calls.read_text() == "requeue 7\n" and not (run / "requeue").exists()
    assert "after it had saved" in (tmp_path / "job.log").read_text()

    newest = max(path.name for path in (run / "checkpoints").iterdir())
    second = training({**job, "SLURM_RESTART_COUNT": "1"}, tmp_path, shards_dir, *long)
    wait_for(second, tmp_path, lambda: max(path.name for path in (run / "checkpoints").glob("step*")) > newest)
    second.send_signal(signal.SIGUSR2)
    assert second.wait(600) == 0
    assert calls.read_text() == "requeue 7\n" * 2
    done = int((run / "requeue").read_text())
    assert (run / "checkpoints" / f"step-{done:07d}.pt").exists()
    assert f"stopped after step {done}; queued again" in (tmp_path / "job.log").read_text()
    logs = tmp_path / "shardclip-train-7"
    assert sorted(path.name for path in logs.iterdir()) == [
        *("rank-0.log", "rank-1.log", "torchrun-0.log", "torchrun-1.log")
    ]
    assert "going on after step" in (logs / "rank-0.log").read_text()
    assert list((tmp_path / "stage").glob("shardclip-*/*.tar")), "nothing was copied to the node"
    assert ranks_of(run) == []


@pytest.mark.slow
def test_a_mistake_is_not_queued_again(job: dict[str, str], tmp_path: Path) -> None:
    """Not even where an earlier start had left its wish to go on."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "requeue").write_text("7\n")
    job |= {"SLURM_JOB_NUM_NODES": "1", "RANKS_PER_NODE": "1"}
    failed = training(job, tmp_path, tmp_path / "no-shards")
    assert failed.wait(600) != 0
    assert not (tmp_path / "scontrol.log").exists()
    assert "no shards here" in (tmp_path / "shardclip-train-7" / "rank-0.log").read_text()


@pytest.mark.parametrize(
    ("state", "again"),
    [("RUNNING None", True), ("COMPLETING TimeLimit", True), ("COMPLETING None", False), ("PENDING BeginTime", False)],
)
def test_a_cancelled_job_does_not_come_back(job: dict[str, str], tmp_path: Path, state: str, again: bool) -> None:
    """Nor is one queued again twice that Slurm has queued again itself; one that ran out of its time is."""
    job |= {"PYTHON": str(tmp_path / "bin" / "stopped"), "FAKE_STATE": state, "SLURM_SUBMIT_DIR": str(tmp_path)}
    command = ["bash", str(TRAIN), "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=job, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scontrol.log").exists() == again, done.stdout
    assert ("queued again by Slurm" not in done.stdout) == again


def test_a_time_that_saves_nothing_is_refused(job: dict[str, str], tmp_path: Path) -> None:
    """--time below the 120 s that an unknown run is given for its save; also for one who likes to read other times."""
    job |= {"PYTHON": str(tmp_path / "bin" / "nothing"), "SLURM_TIME_FORMAT": "relative", **ends_in(60)}
    command = ["bash", str(TRAIN), "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=job, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "--time leaves 60 s, and the run needs 120 s" in done.stderr
    assert not (tmp_path / "started").exists()


def test_a_job_that_is_preempted_as_it_starts_comes_back(job: dict[str, str], tmp_path: Path) -> None:
    """What squeue says is left is its grace then, and no --time that is too short."""
    running = begin(["bash", str(TRAIN), "--out", "run"], job, tmp_path, "slow", 30)
    wait_until((tmp_path / "asking").exists)
    running.send_signal(signal.SIGTERM)
    assert running.wait(600) == 0, (tmp_path / "job.log").read_text()
    assert (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize(("end", "again"), [(121, False), (600, False), (9000, True)])
def test_a_job_whose_whole_time_saved_nothing_does_not_come_back(
    job: dict[str, str], tmp_path: Path, end: int, again: bool
) -> None:
    """Another start would be as short. One that was told before its time, to make room, is queued again."""
    command = ["bash", "-c", f"SECONDS={0 if again else end - 120}; . {TRAIN} --out run"]
    running = begin(command, job, tmp_path, "nothing", end)
    wait_until((tmp_path / "started").exists)
    running.send_signal(signal.SIGUSR2)
    if end == 600:  # of its 600 s the 480 that no save needs are spare
        time.sleep(1)
        assert running.poll() is None
        running.send_signal(signal.SIGTERM)
    assert running.wait(600) == (0 if again else 2), (tmp_path / "job.log").read_text()
    assert (tmp_path / "scontrol.log").exists() == again


def test_a_run_that_finishes_after_it_was_told_is_done(job: dict[str, str], tmp_path: Path) -> None:
    """USR2 comes, it has 480 s to spare and needs two: nothing has failed, and nothing is left to go on with."""
    running = begin(["bash", str(TRAIN), "--out", "run"], job, tmp_path, "finished", 600)
    wait_until((tmp_path / "started").exists)
    time.sleep(0.5)
    running.send_signal(signal.SIGUSR2)
    assert running.wait(600) == 0, (tmp_path / "job.log").read_text()
    assert not (tmp_path / "scontrol.log").exists(), (tmp_path / "job.log").read_text()


def begin(command: list[str], job: dict[str, str], tmp_path: Path, python: str, end: int) -> subprocess.Popen:
    """A job on one node whose time is up in `end` seconds, with that fake `python`; its log is `job.log`."""
    job = job | {"PYTHON": str(tmp_path / "bin" / python), "SLURM_JOB_NUM_NODES": "1", **ends_in(end)}
    with open(tmp_path / "job.log", "wb") as log:
        return subprocess.Popen(command, cwd=tmp_path, env=job, stdout=log, stderr=log)


def ends_in(seconds: int) -> dict[str, str]:
    """The time now, which stands still, and a time to come as squeue says it."""
    now = int(time.time())
    return {"FAKE_NOW": str(now), "FAKE_END": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now + seconds))}


def wait_until(done: Callable[[], bool]) -> None:
    """Return when something is the case."""
    deadline = time.monotonic() + 300
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_training_says_what_it_lacks(job: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(TRAIN)], cwd=tmp_path, env=job, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "--out RUN" in done.stderr


def test_the_lead_time_follows_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": step, "step_ms": 50} for step in range(10)]
    assert lead_time([]) == lead_time(rows) == UNKNOWN_S
    rows += [{"step": 10, "step_ms": 50, "save_s": 4.0}, {"step": 11, "save_s": 6.0, "validate_s": 20.0}]
    assert lead_time(rows) == pytest.approx(2 * (2 * 6 + 20 + 0.05) + 20)
    damaged = b'\xff\xfe{"save_s": 1}\n[1]\n{"step": 2, "save_s": 5.0}\n{"save_s": "x"}\n{"step": 3, "sav'
    damaged = b'{"step": 1, "save_s": 1%s}\n' % (b"0" * 400) + damaged
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    main([str(tmp_path)])
    assert capsys.readouterr().out == "40\n"
