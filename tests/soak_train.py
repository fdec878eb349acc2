"""`python tests/soak_train.py --minutes 10`: runs killed at random moments and resumed, against one never interrupted.

Each run is started over and over until it has finished. A life is ended by SIGKILL of one rank, of all, or of torchrun,
by SIGTERM of one rank or of all, or by SIGKILL while a checkpoint is being written. Most lives are forks of a process
that has imported everything, every fifth is a real torchrun. At the end all rows of the metrics, the checkpoints and
the best one have to be those of the uninterrupted run, bit by bit. A row's order digest covers every sample up to its
step: equal digests mean that none was lost and none doubled.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from conftest import state  # noqa: E402  (it is run as a script)

from train.checkpoint import read_checkpoint  # noqa: E402

SERVER = Path(__file__).parent / "injected" / "train_server.py"
COLUMNS = ("loss", "val_loss", "order_digest", "logit_scale", "grad_norm", "lr", "bad_samples", "skipped_steps")
"""Everything in a row that is no time and no size."""
SMALL = (
    *("--batch-size", "8", "--model.widths", *("16",) * 4, "--device", "cpu", "--threads", "1", "--data.threads", "1"),
    *("--log-every", "1", "--validate-every", "5", "--save-every", "2", "--optim.warmup", "5", "--optim.lr", "1e-4"),
    *("--data.image-size", "64", "--model.text-width", "8", "--model.text-layers", "1", "--model.embed-dim", "8"),
)
KINDS = ("one", "all", "all-term", "one-term", "in-save", "in-save", "agent")


class Server:
    """Starts runs in forks; see train_server.py."""

    def __init__(self, *prefix: str) -> None:
        """`prefix`: a command that runs the server, in a mount namespace say."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(SERVER)], cwd=REPOSITORY, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def start(self, arguments: Sequence[str], *, ranks: int = 1, **more: object) -> list[int]:
        """The process ids of a run's ranks."""
        return self._ask({"start": list(map(str, arguments)), "ranks": ranks, **more})["pids"]

    def wait(self, pids: list[int]) -> tuple[list[int], str]:
        """Exit codes, and all that was written to stderr. What does not end is killed, for a test that hangs says
        nothing."""
        patience = threading.Timer(600, _kill, [pids])
        patience.start()
        answer = self._ask({"wait": pids})
        patience.cancel()
        return answer["codes"], "".join(answer["stderr"])

    def run(self, arguments: Sequence[str], *, ranks: int = 1, **more: object) -> tuple[list[int], str]:
        """Run to the end."""
        return self.wait(self.start(arguments, ranks=ranks, **more))

    def close(self) -> None:
        """End the process, and the runs that a test which failed has left behind, stopped ones among them."""
        assert self._process.stdin is not None
        _kill(children(self.pid))
        self._process.stdin.close()
        self._process.wait(600)

    def _ask(self, command: dict) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def arguments(shards: Path, out: Path, *more: str) -> list[str]:
    """A small run's command line; goes on where one was begun."""
    return ["--shards", str(shards), "--out", str(out), *SMALL, "--resume", "auto", *more]


def outcome(out: Path) -> dict[str, object]:
    """All of a run that has to be the same however often it was interrupted: rows, checkpoints, and what they hold."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    files = [path for path in (out / "best.pt", *(out / "checkpoints").iterdir()) if path.exists()]
    return {
        "rows": [{name: row.get(name) for name in ("step", *COLUMNS)} for row in rows],
        **{part: value for path in files for part, value in flat(path.name, read_checkpoint(path))},
        **{f"{path.name} bytes": path.read_bytes() for path in files},
    }


def flat(name: str, tree: object) -> Iterator[tuple[str, object]]:
    """Names and values of nested dicts and lists; of tensors type, shape and bytes."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flat(f"{name}/{key}", value)
    else:
        yield name, (tree.dtype, tree.shape, tree.numpy().tobytes()) if isinstance(tree, Tensor) else tree


def differing(run: dict[str, object], whole: dict[str, object]) -> list[str]:
    """The parts of two outcomes that are not the same."""
    return [name for name in sorted({**run, **whole}) if run.get(name) != whole.get(name)]


class Life:
    """A run's processes from a start to their end, by whatever means."""

    def __init__(self, server: Server, command: list[str], ranks: int, *, real: bool, **more: object) -> None:
        """`real`: under torchrun; else `more` may break it, see train_server.py."""
        self._server, self.real, self.agent = server, real, None
        if real:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            self.agent = subprocess.Popen(
                [*launcher, "-m", "train.main", *command], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
        else:
            self._pids = server.start(command, ranks=ranks, **more)

    def ranks(self) -> list[int]:
        """Process ids of the ranks; of a real start there may be none yet."""
        return self._pids if self.agent is None else children(self.agent.pid)

    def running(self) -> bool:
        """Whether any process is left."""
        if self.agent is not None:
            return self.agent.poll() is None
        return any(state(pid) not in ("Z", "") for pid in self._pids)

    def send(self, pids: list[int], number: int) -> None:
        """Send a signal to processes that may be gone."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def join(self) -> tuple[list[int], str]:
        """Wait for the end: exit codes and stderr."""
        if self.agent is None:
            return self._server.wait(self._pids)
        orphans = self.ranks()
        _, errors = self.agent.communicate(timeout=600)
        deadline = time.monotonic() + 300
        while any(state(pid) for pid in orphans) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [self.agent.returncode], errors


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def last_step(out: Path) -> int:
    """The last step that a run has told of; 0 before."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return json.loads((out / "metrics.jsonl").read_bytes().splitlines()[-1])["step"]
    return 0


def end(life: Life, kind: str, out: Path, luck: random.Random) -> None:
    """End a life: one in five while it starts, the others some time after a step, or in a save."""
    early, begun, deadline = luck.random() < 0.2, last_step(out), time.monotonic() + 60
    after_s = luck.uniform(0.0, (10.0 if life.real else 2.0) if early else 1.0)
    while life.running() and not (early or last_step(out) > begun or time.monotonic() > deadline):
        time.sleep(0.005)
    deadline = time.monotonic() + after_s
    while life.running() and time.monotonic() < deadline:
        time.sleep(0.002)
    while kind == "in-save" and life.running() and not list(out.rglob(".tmp-*")) and time.monotonic() < deadline + 20:
        time.sleep(0.0005)
    ranks = life.ranks()
    number = signal.SIGTERM if kind.endswith("term") else signal.SIGKILL
    if kind == "agent" and life.agent is not None:
        return life.send([life.agent.pid], signal.SIGKILL)
    return life.send(ranks if kind.startswith("all") else ranks and [luck.choice(ranks)], number)


def soak_once(
    server: Server, shards: Path, out: Path, whole: dict[str, object], luck: random.Random, counts: Counter, *,
    ranks: int, more: Sequence[str], until: float, real_share: float = 0.2,
) -> None:  # fmt: skip
    """One run through many lives. AssertionError where its outcome differs; `counts` gains what was done."""
    while True:
        life = Life(server, arguments(shards, out, *more), ranks, real=luck.random() < real_share)
        kind = luck.choice(KINDS)
        if time.monotonic() < until:
            end(life, kind, out, luck)
        codes, errors = life.join()
        done = not any(codes) and not (out / "requeue").exists()
        counts[f"{'torchrun' if life.real else 'forked'} {'finished' if done else kind}"] += 1
        assert "Traceback" not in errors or "torch/distributed" in errors, errors
        if done:
            break
    differ = differing(outcome(out), whole)
    counts["runs compared"] += 1
    assert not differ, f"{out}: {differ} of the run that was killed differ"
    assert not list(out.rglob(".tmp-*")) and not (out / "lock").exists()


@contextlib.contextmanager
def serving(*prefix: str) -> Iterator[Server]:
    """A server inside the block."""
    server = Server(*prefix)
    try:
        yield server
    finally:
        server.close()


def soak(shards: Path, folder: Path, *, minutes: float, seed: int, steps: int, more: Sequence[str]) -> Counter:
    """Runs on one rank and two in turn, for so long; what was counted."""
    counts: Counter = Counter()
    luck = random.Random(seed)
    until = time.monotonic() + minutes * 60
    settings = ("--steps", str(steps), *more)
    with serving() as server:
        whole = {}
        for ranks in (1, 2):
            out = folder / f"whole-{ranks}"
            codes, errors = server.run(arguments(shards, out, *settings), ranks=ranks)
            assert not any(codes), errors
            whole[ranks] = outcome(out)
        while time.monotonic() < until:
            ranks = luck.choice((1, 2))
            out = folder / f"run-{counts['runs compared']}"
            soak_once(server, shards, out, whole[ranks], luck, counts, ranks=ranks, more=settings, until=until)
            sys.stdout.write(f"{dict(counts)}\n")
            sys.stdout.flush()
    return counts


def kills(counts: Counter) -> int:
    """Lives that were ended before they had finished."""
    return sum(number for name, number in counts.items() if name != "runs compared" and not name.endswith("finished"))


def main() -> None:
    """Soak on made-up films, and say what came of it."""
    from conftest import write_source

    from ingest.config import IngestConfig
    from ingest.run import ingest

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("more", nargs="*", help="flags of train.main, after --")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        h5, table = write_source(Path(folder) / "source")
        shards = Path(folder) / "shards"
        ingest(IngestConfig(to_shards=shards, h5=(h5,), csv=(table,), val_fraction=0.2, workers=1, shard_mb=0.5))
        sys.stdout.write(f"seed {seed}\n")
        counts = soak(shards, Path(folder), minutes=options.minutes, seed=seed, steps=options.steps, more=options.more)
    sys.stdout.write(
        f"{kills(counts)} lives ended early, {counts['runs compared']} runs of {options.steps} steps compared: "
        "0 samples lost, 0 doubled, every bit the same\n"
    )


if __name__ == "__main__":
    main()
