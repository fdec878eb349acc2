"""Faults injected into training by real means: kills, signals, hangs, two runs at once (rows T1 to T5 and T10).

Runs are forks of one process that has imported everything (see injected/train_server.py), real torchruns where torchrun
is what is tested. What has to come out is always the same: the run that was never interrupted, bit by bit.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, state
from soak_train import SMALL, Life, Server, arguments, differing, outcome, soak_once

from shards import lock
from shards.errors import InputError
from train.checkpoint import list_checkpoints
from train.rundir import NAME, LeaseLost, check_lease, leased
from train.saving import GRACE_S

SOAK = bool(os.environ.get("SHARDCLIP_SOAK"))
"""Every durable step and system call instead of a dozen: hours."""
STEPS = ("--steps", "14", "--ema", "0.8", "--optim.schedule", "plateau", "--optim.plateau-patience", "0")
"""With all that has a state of its own."""
ENDLESS = (*STEPS, "--steps", "1000000")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(server: Server, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs on 1 and 2 ranks, never interrupted. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        codes, errors = server.run(arguments(shards_dir, folder / str(ranks), *STEPS), ranks=ranks)
        assert not any(codes), errors
    return {ranks: folder / str(ranks) for ranks in (1, 2)}


def rows(out: Path) -> list[dict]:
    """A run's metrics so far."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(out: Path, step: int, running: Callable[[], bool]) -> None:
    """Return when a run has told of a step."""
    deadline = time.monotonic() + 300
    while not any(row["step"] >= step for row in rows(out)):
        assert running() and time.monotonic() < deadline, "no rows"
        time.sleep(0.01)


def finish(server: Server, shards: Path, out: Path, whole: dict[int, Path], ranks: int = 1) -> str:
    """Go on to the end; the outcome is that of the run that was never interrupted. Returns stderr."""
    codes, errors = server.run(arguments(shards, out, *STEPS), ranks=ranks)
    assert not any(codes), errors
    assert differing(outcome(out), outcome(whole[ranks])) == []
    assert not list(out.rglob(".tmp-*")) and not (out / NAME).exists() and not (out / "requeue").exists()
    return errors


# T1: kill -9


def test_killed_at_any_touch_of_a_file(
    server: Server, shards_dir: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    """In the pieces of a checkpoint, at an fsync, a rename, a link, in pruning, in validation."""
    count = tmp_path / "count"

    def killed(out: Path, number: int) -> bool:
        count.unlink(missing_ok=True)
        codes, errors = server.run(arguments(shards_dir, out, *STEPS), fault=f"kill:{number}", count=str(count))
        assert codes in ([-signal.SIGKILL], [0]), errors
        return codes != [0]

    kills = sum(killed(tmp_path / "run", number) for number in (3, 180, 75, 433, 290, 31, 333, 512))
    assert kills >= 6, "the run was over before the kills"
    finish(server, shards_dir, tmp_path / "run", whole)
    if SOAK:
        number = 1
        while killed(tmp_path / f"{number}", number):
            finish(server, shards_dir, tmp_path / f"{number}", whole)
            shutil.rmtree(tmp_path / f"{number}")
            number += 1
        assert number > 500


@pytest.fixture(scope="module")
def strace() -> str:
    """The program's path; skips where it cannot trace."""
    found = shutil.which("strace")
    if found is None or subprocess.run([found, "-qq", "-o", "/dev/null", "true"], capture_output=True).returncode:
        pytest.skip("strace is missing, or cannot trace here")
    return found


CALLS = {
    "write": "write,pwrite64",
    "fsync": "fsync",
    "rename": "rename,renameat,renameat2",
    "unlink": "unlink,unlinkat",
}


def test_killed_at_a_system_call(
    strace: str, server: Server, shards_dir: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    kills = [("write", 25), ("fsync", 5), ("rename", 3), ("unlink", 2)]
    if SOAK:
        kills = [(call, number) for call in CALLS for number in range(1, 80)]
    hit = 0
    for call, number in kills:
        go = tmp_path / f"{call}-{number}"
        pids = server.start(arguments(shards_dir, tmp_path / "run", *STEPS), hold=[0, 1, str(go)])
        inject = f"inject={CALLS[call]}:signal=KILL:when={number}"
        options = ["-f", "-qq", "-o", "/dev/null", "-e", f"trace={CALLS[call]}", "-e", inject]
        tracer = subprocess.Popen([strace, *options, "-p", str(pids[0])], stderr=subprocess.PIPE, text=True)
        while tracer.poll() is None and "TracerPid:\t0\n" in Path(f"/proc/{pids[0]}/status").read_text():
            time.sleep(0.01)
        go.touch()
        codes, errors = server.wait(pids)
        _, complaints = tracer.communicate(timeout=600)
        if "not permitted" in complaints:
            pytest.skip("strace may not attach to processes here")
        assert codes in ([-signal.SIGKILL], [0]), errors
        hit += codes != [0]
        if codes == [0]:
            shutil.rmtree(tmp_path / "run")
    assert hit >= 2, "the run was over before the kills"
    finish(server, shards_dir, tmp_path / "run", whole)


def test_a_short_soak(server: Server, shards_dir: Path, whole: dict[int, Path], tmp_path: Path) -> None:
    """Random kills, as `make soak` has them; the seed is new each time, and shown where it fails."""
    seed = random.SystemRandom().randrange(10**6)
    luck, counts = random.Random(seed), Counter()
    until = time.monotonic() + 12
    for ranks in (2, 1):
        soak_once(
            server, shards_dir, tmp_path / str(ranks), outcome(whole[ranks]), luck, counts,
            ranks=ranks, more=STEPS, until=until if ranks == 1 else until - 4, real_share=0,
        )  # fmt: skip
    assert counts["runs compared"] == 2, f"seed {seed}"


# T2: signals


@pytest.mark.parametrize("case", ["one rank", "all, twice", "while it saves"])
def test_signals_save_and_ask_for_the_rest(
    server: Server, shards_dir: Path, whole: dict[int, Path], tmp_path: Path, case: str
) -> None:
    out, go = tmp_path / "run", tmp_path / "go"
    slow_save = str(go) if case == "while it saves" else ""
    command = arguments(shards_dir, out, *STEPS)
    life = Life(server, command, 2, real=False, hold=[-1, 4, str(go)], slow_save=slow_save)
    wait_for_step(out, 3, life.running)
    if case == "one rank":
        life.send(life.ranks()[1:], signal.SIGUSR2)
    elif case == "all, twice":
        life.send(life.ranks(), signal.SIGTERM)
        time.sleep(0.02)
        life.send(life.ranks(), signal.SIGTERM)
    else:
        while not list(out.rglob(".tmp-step-*")):
            assert life.running()
            time.sleep(0.01)
        life.send(life.ranks(), signal.SIGUSR1)
    asked_at = rows(out)[-1]["step"]
    go.touch()
    codes, errors = life.join()
    assert codes == [0, 0], errors
    done = int((out / "requeue").read_text())
    assert asked_at <= done <= asked_at + 3 < 14
    assert list_checkpoints(out / "checkpoints")[0][0] == done == rows(out)[-1]["step"]
    finish(server, shards_dir, out, whole, ranks=2)


def test_a_signal_before_the_first_step(
    server: Server, shards_dir: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    """As soon as there is a run, it is one that asks for the rest."""
    out, go = tmp_path / "run", tmp_path / "go"
    life = Life(server, arguments(shards_dir, out, *STEPS), 1, real=False, hold=[0, 1, str(go)])
    while not (out / NAME).exists():
        assert life.running()
        time.sleep(0.001)
    life.send(life.ranks(), signal.SIGTERM)
    go.touch()
    codes, errors = life.join()
    assert codes == [0], errors
    assert (out / "requeue").read_text() == "1\n" and list_checkpoints(out / "checkpoints")[0][0] == 1
    finish(server, shards_dir, out, whole)


def test_signals_to_torchrun_and_its_whole_group(server: Server, shards_dir: Path, tmp_path: Path) -> None:
    """SIGTERM to all processes at once, and again; then torchrun itself is killed: its ranks save and leave."""
    out = tmp_path / "run"
    life = Life(server, arguments(shards_dir, out, *ENDLESS), 2, real=True)
    assert life.agent is not None
    wait_for_step(out, 2, life.running)
    os.killpg(life.agent.pid, signal.SIGTERM)
    time.sleep(0.2)
    os.killpg(life.agent.pid, signal.SIGTERM)
    life.join()
    done = int((out / "requeue").read_text())
    assert list_checkpoints(out / "checkpoints")[0][0] == done == rows(out)[-1]["step"]

    life = Life(server, arguments(shards_dir, out, *ENDLESS), 2, real=True)
    assert life.agent is not None
    wait_for_step(out, done + 2, life.running)
    life.agent.kill()
    life.join()  # which waits for the orphans
    again = int((out / "requeue").read_text())
    assert again >= done + 2 and list_checkpoints(out / "checkpoints")[0][0] == again
    assert not (out / NAME).exists()


# T3: one rank dies, hangs, raises


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_others(server: Server, shards_dir: Path, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    life = Life(server, arguments(shards_dir, out, *ENDLESS), 2, real=False, sleep=[-1, -1, 0.05])
    wait_for_step(out, 3, life.running)
    begin = time.monotonic()
    life.send([life.ranks()[rank]], signal.SIGKILL)
    codes, errors = life.join()
    assert time.monotonic() - begin < 600
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, errors
    assert errors.count("another rank ended, so this one stops") == 1 and "Traceback" not in errors


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hung_rank_ends_the_others(server: Server, shards_dir: Path, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    command = arguments(shards_dir, out, *ENDLESS, "--rank-timeout-s", "5")  # which no busy machine keeps one waiting
    life = Life(server, command, 2, real=False, sleep=[-1, -1, 0.05])
    wait_for_step(out, 3, life.running)
    stopped, other = life.ranks()[rank], life.ranks()[1 - rank]
    begin = time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    while state(other) not in ("Z", ""):
        assert time.monotonic() - begin < 600
        time.sleep(0.02)
    assert time.monotonic() - begin >= 3.5
    os.kill(stopped, signal.SIGKILL)
    codes, errors = life.join()
    assert codes[1 - rank] == 1
    assert errors.count(f"no sign of life from rank {rank} for 5 s") == 1, errors


def test_who_keeps_the_store_may_be_the_one_that_hangs() -> None:
    """What was going to be said is said, though the store takes longer than a judge may be held up otherwise."""
    script = """
import time
from train.alive import Watch
from train.ranks import Ranks

class Store:
    def set(self, *_): pass
    def multi_get(self, names): return [b"1"]
    def add(self, *_):
        time.sleep(1.0)
        raise RuntimeError("timed out")

Watch(Ranks(rank=1, size=2), 0.4, Store()).start()
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stderr.startswith("train.main: no sign of life from rank 0"), done.stderr


def test_the_default_ends_a_hung_job_within_a_minute() -> None:
    """torchrun leaves a stopped rank its time of grace before it kills it."""
    from train.presets import PRESETS

    assert 10 <= PRESETS["tiny"]().rank_timeout_s and PRESETS["tiny"]().rank_timeout_s + GRACE_S <= 58


def test_a_slow_rank_is_not_taken_for_dead(server: Server, shards_dir: Path, tmp_path: Path) -> None:
    """A step, a validation, a save may take longer than the timeout."""
    command = arguments(shards_dir, tmp_path / "run", *STEPS, "--rank-timeout-s", "4", "--steps", "3")
    codes, errors = server.run(command, ranks=2, sleep=[1, 2, 6])
    assert codes == [0, 0], errors


def test_a_rank_that_raises_ends_the_others(server: Server, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    codes, errors = server.run(arguments(shards_dir, out, *STEPS), ranks=2, **{"raise": [1, 6]})
    assert codes == [1, 1] and errors.count("RuntimeError: made to fail") == 1, errors
    assert errors.count("another rank ended") == 1
    assert list_checkpoints(out / "checkpoints")[0][0] == 5


# T4: two runs, one folder


def test_a_second_run_is_refused(server: Server, shards_dir: Path, whole: dict[int, Path], tmp_path: Path) -> None:
    out, go = tmp_path / "run", tmp_path / "go"
    first = Life(server, arguments(shards_dir, out, *STEPS), 1, real=False, hold=[0, 3, str(go)])
    wait_for_step(out, 2, first.running)
    fresh = ["--shards", str(shards_dir), "--out", str(out), *SMALL]
    codes, errors = server.run(fresh)
    assert codes == [2] and f"process {first.ranks()[0]}" in errors and "another run is writing" in errors
    assert len(errors.splitlines()) == 1
    second = server.start(arguments(shards_dir, out, *STEPS))  # a job that was queued again waits for the first
    while not list(out.glob(f".tmp-{NAME}.*")):  # what it would have held the folder by
        assert state(second[0]) not in ("Z", "")
    go.touch()
    codes, errors = first.join()
    assert codes == [0], errors
    codes, errors = server.wait(second)
    assert codes == [0] and "going on after step 14" in errors, errors
    assert differing(outcome(out), outcome(whole[1])) == []


def test_a_run_that_was_stopped_and_replaced_writes_nothing_more(
    server: Server, shards_dir: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    out, go = tmp_path / "run", tmp_path / "go"
    zombie = Life(server, arguments(shards_dir, out, *STEPS), 1, real=False, hold=[0, 6, str(go)])
    wait_for_step(out, 5, zombie.running)
    zombie.send(zombie.ranks(), signal.SIGSTOP)
    holder = json.loads((out / NAME).read_text())
    assert holder["pid"] == zombie.ranks()[0]
    (out / NAME).write_text(json.dumps({**holder, "host": "gone", "boot": "x"}))  # held on a node that went away
    os.utime(out / NAME, (1, 1))
    (out / NAME).unlink()
    finish(server, shards_dir, out, whole)
    go.touch()
    zombie.send(zombie.ranks(), signal.SIGCONT)
    codes, errors = zombie.join()
    assert codes == [2] and "belongs to another run by now" in errors, errors
    assert differing(outcome(out), outcome(whole[1])) == []


def test_a_dead_holder_elsewhere_is_replaced_after_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock may be a day off: what counts is that its heartbeat stands still while we look."""
    path = tmp_path / NAME
    path.write_text(json.dumps({"host": "another-node", "boot": "x", "pid": 1}))
    os.utime(path, (time.time() + 86400,) * 2)
    clock = Clock(lambda: None)
    monkeypatch.setattr(lock, "time", clock)
    with leased(tmp_path, wait_s=90) as lease:
        assert 60 <= clock.now < 62 and lease.mine()
    assert not path.exists()


class Clock:
    """Goes on only when somebody sleeps."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.now, self._meanwhile = 0.0, meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._meanwhile()


def test_a_living_holder_elsewhere_is_waited_for_then_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / NAME
    path.write_text(json.dumps({"host": "another-node", "boot": "x", "pid": 1}))
    os.utime(path, (1, 1))  # its clock is behind

    def beat() -> None:
        if clock.now % 30 == 0:
            os.utime(path, (clock.now,) * 2)

    clock = Clock(beat)
    monkeypatch.setattr(lock, "time", clock)
    with pytest.raises(InputError, match="another-node"), leased(tmp_path, wait_s=200):
        pass
    assert clock.now >= 200 and json.loads(path.read_text())["host"] == "another-node"


def test_a_start_that_fails_leaves_no_folders(tmp_path: Path) -> None:
    with leased(tmp_path / "a" / "b", wait_s=0):
        assert (tmp_path / "a" / "b" / NAME).exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with leased(tmp_path / "mine", wait_s=0):
        pass
    assert (tmp_path / "mine").exists()


def test_a_holder_that_was_replaced_leaves_the_new_one_alone(tmp_path: Path) -> None:
    with leased(tmp_path, wait_s=0) as lease:
        (tmp_path / NAME).unlink()
        (tmp_path / NAME).write_text("somebody else")
        with pytest.raises(LeaseLost):
            check_lease(lease)
    assert (tmp_path / NAME).read_text() == "somebody else"


# T5: other numbers of ranks


def test_two_ranks_then_one_then_four(server: Server, shards_dir: Path, tmp_path: Path) -> None:
    """The same samples at each step. SGD, because AdamW divides by the gradient's size and lets rounding grow."""
    settings = ("--steps", "12", "--optim.optimizer", "sgd", "--optim.lr", "1e-2", "--validate-every", "4")
    codes, errors = server.run(arguments(shards_dir, tmp_path / "whole", *settings), ranks=2)
    assert not any(codes), errors
    for ranks, more in ((2, ("--stop-at", "4")), (1, ("--stop-at", "8")), (4, ())):
        codes, errors = server.run(arguments(shards_dir, tmp_path / "run", *settings, *more), ranks=ranks)
        assert not any(codes), errors
    run, uncut = rows(tmp_path / "run"), rows(tmp_path / "whole")
    assert [row["order_digest"] for row in run] == [row["order_digest"] for row in uncut] and len(run) == 12
    for name in ("loss", "val_loss"):
        assert [row[name] for row in run if name in row] == pytest.approx(
            [row[name] for row in uncut if name in row], rel=1e-5
        )
    codes, errors = server.run(arguments(shards_dir, tmp_path / "run", *settings), ranks=3)
    assert codes == [2, 2, 2] and "8 = 2 x 3 + 2" in errors, errors


def test_three_ranks_resume_bit_by_bit(server: Server, shards_dir: Path, tmp_path: Path) -> None:
    """DDP rebuilds its buckets after the first step; without the warm-up this differs by 1e-7 at step 5."""
    more = ("--steps", "6", "--batch-size", "12", "--validate-every", "0", "--save-every", "3")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    codes, errors = server.run(arguments(shards_dir, whole, *more), ranks=3)
    assert codes == [0, 0, 0], errors
    shutil.copytree(whole, cut)
    (cut / "checkpoints/step-0000006.pt").unlink()
    codes, errors = server.run(arguments(shards_dir, cut, *more), ranks=3)
    assert codes == [0, 0, 0] and "going on after step 3" in errors, errors
    assert differing(outcome(cut), outcome(whole)) == []


# T10: the clock


def test_a_clock_that_jumps_changes_nothing(
    server: Server, shards_dir: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    codes, errors = server.run(arguments(shards_dir, out, *STEPS, "--stop-at", "7"), clock=True)
    assert codes == [0], errors
    for age, (_, path) in enumerate(list_checkpoints(out / "checkpoints")):
        os.utime(path, (1e9 - age * 86400,) * 2 if age else (1, 1))  # the newest looks oldest
    codes, errors = server.run(arguments(shards_dir, out, *STEPS), clock=True)
    assert codes == [0] and "going on after step 7" in errors, errors
    assert differing(outcome(out), outcome(whole[1])) == []
    for row in rows(out):
        assert all(0 <= row.get(name, 0) < 3600 for name in ("save_s", "save_wait_s", "validate_s"))
        assert 0 <= row["loader_wait_ms"] <= row["step_ms"] < 3_600_000


def test_saves_are_timed(whole: dict[int, Path]) -> None:
    figures = [row["save_s"] for row in rows(whole[1]) if "save_s" in row]
    assert len(figures) >= 4 and all(figure > 0 for figure in figures)


def test_workers_of_the_hdf5_backends_die_with_their_rank(shards_dir: Path, source: tuple[Path, Path]) -> None:
    """Also one that is still being set up when its parent is killed: torch's own watch would take init for it."""
    code = """if True:
        import multiprocessing, os, signal, sys
        from pathlib import Path
        from pipeline.batch import World
        from pipeline.config import LoaderConfig
        from pipeline.loader import build_loader
        parent = os.getpid()
        def wait():
            while os.getppid() == parent: pass
        os.register_at_fork(after_in_child=wait)
        config = LoaderConfig(shards=Path(sys.argv[1]), h5=Path(sys.argv[2]), backend="hdf5", batch_size=8, threads=1)
        loader = build_loader(config, World())
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
        os.kill(parent, signal.SIGKILL)"""
    command = [sys.executable, "-c", code, str(shards_dir), str(source[0])]
    with open(os.devnull, "w") as nothing:  # a pipe would be held by workers that live
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=nothing, timeout=600)
    assert done.returncode == -signal.SIGKILL
    workers = [int(word) for word in done.stdout.split()]
    assert workers
    deadline = time.monotonic() + 300
    while any(state(pid) not in ("Z", "") for pid in workers):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.05)


def test_workers_of_the_hdf5_backends_may_come_from_a_fork_server(shards_dir: Path, source: tuple[Path, Path]) -> None:
    """Whose children they are then: what Python 3.14 takes where nobody asks."""
    code = """if True:
        import multiprocessing, sys
        from pathlib import Path
        from pipeline.batch import World
        from pipeline.config import LoaderConfig
        from pipeline.loader import build_loader
        multiprocessing.set_start_method("forkserver")
        config = LoaderConfig(shards=Path(sys.argv[1]), h5=Path(sys.argv[2]), backend="hdf5", batch_size=8, threads=1)
        with build_loader(config, World()) as loader:
            print(len(next(loader)))"""
    command = [sys.executable, "-c", code, str(shards_dir), str(source[0])]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.stdout == "8\n", done.stderr
