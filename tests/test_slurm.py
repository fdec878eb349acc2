"""The sbatch scripts: clean shell, and a job with `srun` played by a few lines of shell."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, made_up_images, write_csv, write_h5

from shards.verify import verify

SCRIPTS = sorted(REPOSITORY.glob("*/slurm/*.sbatch"))
SRUN = """#!/usr/bin/env bash
# As far as our scripts need it: the command --ntasks times, each with a log of its own, ended with it.
set -eu
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 143' TERM
while [[ $1 == --* ]]; do
    case $1 in --ntasks=*) ntasks=${1#*=} ;; --output=*) output=${1#*=} ;; esac
    shift
done
for ((task = 0; task < ntasks; task++)); do "$@" >>"${output/\\%t/$task}" 2>&1 & done
wait
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
            line = path.read_bytes().replace(b"\0", b" ").decode()
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
    srun.write_text(SRUN)
    srun.chmod(0o755)
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": "7", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "1"}
    path = f"{srun.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHON": sys.executable, **{f"SLURM_{name}": slurm[name] for name in slurm}}


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
    with open(tmp_path / "first.log", "wb") as log:
        first = subprocess.Popen(command, cwd=REPOSITORY, env=job, stdout=log, stderr=log)
    try:
        while not list(out.glob(".ingest/[0-9]*.spill")):
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.02)
        assert [path.stat().st_mode & 0o077 for path in (tmp_path / "shardclip-ingest-7").glob("*.pem")] == [0, 0]
    finally:
        first.terminate()
        first.wait(timeout=240)
    assert first.returncode == 128 + signal.SIGTERM
    assert not (out / ".ingest" / "lock").exists()
    assert not (out / "manifest.json").exists()

    second = subprocess.run(command, cwd=REPOSITORY, env=job, capture_output=True, text=True, timeout=240)
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
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, env=job, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "scheduler did not start" in done.stderr
