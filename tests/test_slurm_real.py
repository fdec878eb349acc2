"""The batch scripts under a real Slurm: slurmctld and two slurmd on this machine, without systemd, munge or cgroups."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, write_source
from soak_train import SMALL
from test_slurm import ranks_of

from shards.verify import verify

CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
# A job that is queued again waits until its old credentials have expired, two minutes by default.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
KillWait=20
SlurmdParameters=config_overrides
NodeName=node[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=1 RealMemory=4000 Gres=gpu:1
PartitionName=main Nodes=node[1-2] Default=YES
"""


class Cluster:
    """What a user of it would type, with the environment that names it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self._environment = folder, environment

    def call(self, *command: str | Path) -> str:
        """What a command of Slurm's says."""
        environment = self._environment
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600)
        return done.stdout or done.stderr

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, ..."""
        return self.call("squeue", "--noheader", "--states=all", "--format=%T", "--job", job).strip()

    def wait(self, done: Callable[[], bool], seconds: float = 300) -> None:
        """Return when something is the case."""
        deadline = time.monotonic() + seconds
        while not done():
            logs = [*self.folder.glob("*.log"), *self.folder.glob("shardclip-*/*.log")]
            assert time.monotonic() < deadline, "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in logs)
            time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes of a CPU and a GPU each, the GPU being /dev/null."""
    for program in ("slurmctld", "slurmd", "sbatch"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs for others: it needs root")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here: the nodes' names could not be resolved")
    controller, first = free_port(1), free_port(2)
    (tmp_path / "state").mkdir()
    conf = tmp_path / "slurm.conf"
    conf.write_text(CONF.format(folder=tmp_path, controller=controller, first=first, second=first + 1))
    (tmp_path / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (tmp_path / "hosts").write_text(Path("/etc/hosts").read_text() + "127.0.0.1 node1 node2\n")
    environment = {**os.environ, "SLURM_CONF": str(conf), "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    node = ["unshare", "--mount", "sh", "-c", 'mount --bind hosts /etc/hosts && exec slurmd -D -N "$0"']
    commands = [["slurmctld", "-D", "-c"], [*node, "node1"], [*node, "node2"]]
    with contextlib.ExitStack() as ends:
        for command in commands:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            daemon = subprocess.Popen(command, env=environment, cwd=tmp_path, **quiet)  # type: ignore[call-overload]
            ends.callback(daemon.wait, 60)
            ends.callback(daemon.terminate)
        found = Cluster(tmp_path, environment)
        found.wait(lambda: "idle 2" in found.call("sinfo", "--noheader", "--format=%t %D"))
        try:
            yield found
        finally:  # a job outlives the daemons
            found.wait(lambda: not (found.call("scancel", "--user=root") or found.call("squeue", "--noheader")))


def free_port(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on now."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError, OverflowError):
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            for number in range(1, count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", first.getsockname()[1] + number))
            return first.getsockname()[1]


def submit(cluster: Cluster, shards: Path, *more: str) -> str:
    """The number of a training job on both nodes."""
    asked = ["--parsable", "--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=2G", "--time=120"]
    script = REPOSITORY / "train" / "slurm" / "train.sbatch"
    options = ["--shards", str(shards), "--out", str(cluster.folder / "run"), *SMALL, "--validate-every", "0", *more]
    return cluster.call("sbatch", *asked, script, *options).strip()


def newest(run: Path) -> str:
    """The newest checkpoint's name."""
    return max((path.name for path in run.glob("checkpoints/step-*.pt")), default="")


@pytest.mark.slow
def test_a_job_is_stopped_goes_on_and_is_cancelled(cluster: Cluster, shards_dir: Path) -> None:
    """USR2 to the batch script, as before the time is up: saved, queued again, gone on. scancel: saved, and gone."""
    run = cluster.folder / "run"
    job = submit(cluster, shards_dir, "--steps", "1000000", "--save-every", "2")
    cluster.wait(lambda: newest(run) >= "step-0000004.pt")
    logs = cluster.folder / f"shardclip-train-{job}"
    cluster.call("scancel", "--signal=USR2", "--batch", job)
    cluster.wait((run / "requeue").exists)
    done = int((run / "requeue").read_text())  # Slurm leaves a job that was queued again for some time
    cluster.wait(lambda: newest(run) > f"step-{done:07d}.pt")
    assert f"going on after step {done}," in (logs / "rank-0.log").read_text()
    assert sorted(path.name for path in logs.iterdir()) == [
        *("rank-0.log", "rank-1.log", "torchrun-0.log", "torchrun-1.log")
    ]

    cluster.call("scancel", job)
    cluster.wait(lambda: cluster.state(job) == "CANCELLED" and not ranks_of(run))
    time.sleep(3)
    assert cluster.state(job) == "CANCELLED", "it queued itself again"
    last = int((run / "requeue").read_text())
    assert newest(run) == f"step-{last:07d}.pt" and last > done


@pytest.mark.slow
def test_an_ingest_ends_quietly(cluster: Cluster, tmp_path: Path) -> None:
    """Two nodes' workers: the set is whole, and nobody was killed for its good end."""
    h5, table = write_source(tmp_path / "source")
    asked = ["--parsable", "--nodes=2", "--cpus-per-task=1", "--mem-per-cpu=2G", "--time=30"]
    script = REPOSITORY / "ingest" / "slurm" / "ingest.sbatch"
    options = ["--to-shards", tmp_path / "out", "--h5", h5, "--csv", table, "--val-fraction", "0.25"]
    job = cluster.call("sbatch", *asked, script, *options).strip()
    cluster.wait(lambda: cluster.state(job) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"))
    log = (tmp_path / f"shardclip-ingest-{job}.log").read_text()
    assert cluster.state(job) == "COMPLETED", log
    assert [problem for _, problem in verify(tmp_path / "out") if problem] == []
    assert not re.search("killed|cancel|terminat|error", log, re.IGNORECASE), log
