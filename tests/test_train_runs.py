"""Whole training runs, on real processes where several ranks are needed: what was promised about resuming them."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from soak_train import Life, Server

from shards.errors import InputError
from shards.manifest import read_manifest
from train.checkpoint import list_checkpoints, read_checkpoint
from train.main import main
from train.ranks import Ranks

SMALL = (
    *("--steps", "60", "--batch-size", "8", "--model.widths", *("16",) * 4, "--device", "cpu", "--threads", "1"),
    *("--log-every", "1", "--validate-every", "20", "--save-every", "20", "--optim.warmup", "5", "--optim.lr", "1e-4"),
)

pytestmark = pytest.mark.slow


def command(ranks: int, shards: Path, out: Path, *more: str) -> list[str]:
    """The command line of a run on so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "train.main", "--shards", str(shards), "--out", str(out), *SMALL, *more]


def start(arguments: list[str], **more) -> subprocess.Popen:
    """A process of its own, as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def train(ranks: int, shards: Path, out: Path, *more: str) -> tuple[int, str]:
    """Run to the end; exit code and stderr."""
    process = start(command(ranks, shards, out, *more))
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors


def rows(out: Path) -> list[dict]:
    """The rows of a run's metrics."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def column(out: Path, name: str) -> dict[int, float]:
    """One figure by step."""
    return {row["step"]: row[name] for row in rows(out) if name in row}


def wait_for_rows(process: subprocess.Popen, out: Path, count: int) -> None:
    """Return as soon as a run has written so many rows."""
    while len(rows(out)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def pair(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 steps on two ranks, never interrupted. Read only."""
    out = tmp_path_factory.mktemp("runs") / "pair"
    code, errors = train(2, shards_dir, out)
    assert code == 0, errors
    return out


@pytest.fixture(scope="module")
def alone(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 steps on one rank, never interrupted. Read only."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    main(["--shards", str(shards_dir), "--out", str(out), *SMALL])
    return out


@pytest.fixture(scope="module")
def stopped(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, stopped after step 30 of 60. Read only: copy before going on."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    code, errors = train(2, shards_dir, out, "--stop-at", "30")
    assert code == 0, errors
    return out


def assert_alike(run: Path, other: Path, *, until: int) -> None:
    """Losses of the same samples on other ranks: 1e-5 up to a step; then rounding has grown, as in any training.

    AdamW divides by the gradient's size, so rounding grows tenfold every two steps here: 5e-8 at first, 3e-5 at step 7.
    """
    losses, others = column(run, "loss"), column(other, "loss")
    assert losses == pytest.approx(others, rel=1e-2)
    early = [step for step in losses if step <= until]
    assert [losses[step] for step in early] == pytest.approx([others[step] for step in early], rel=1e-5)


def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of a run to go on with."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def go_on(shards: Path, out: Path, *more: str) -> None:
    """Resume on one rank, in this process."""
    main(["--shards", str(shards), "--out", str(out), *SMALL, "--resume", "auto", *more])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake gets, after exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, *arguments])
    assert stop.value.code == 2
    told = ("warning", "going on after")
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(told)]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_leaves_what_it_promises(pair: Path, shards_dir: Path) -> None:
    assert [row["step"] for row in rows(pair)] == list(range(1, 61))
    for row in rows(pair):
        assert {"loss", "lr", "images_per_s", "loader_wait_ms", "step_ms", "memory_mb", "order_digest"} <= row.keys()
        assert 0 <= row["loader_wait_ms"] <= row["step_ms"]
    validated = column(pair, "val_loss")
    assert list(validated) == [20, 40, 60]
    assert [step for step, _ in list_checkpoints(pair / "checkpoints")] == [60, 40]
    assert read_checkpoint(pair / "best.pt")["step"] == min(validated, key=lambda step: validated[step])
    chances = read_checkpoint(pair / "best.pt")["rng"]  # were they one, both ranks would drop the same hidden values
    assert len(chances) == 2 and not chances[0].equal(chances[1])
    assert (pair / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (pair / "config.json").exists()
    assert json.loads((pair / "versions.json").read_text())["shards"] == read_manifest(shards_dir).digest
    assert any((pair / "tensorboard").iterdir()) and not (pair / "requeue").exists()


def test_stopped_and_resumed_equals_uninterrupted_bit_by_bit(
    pair: Path, stopped: Path, shards_dir: Path, tmp_path: Path
) -> None:
    assert (stopped / "requeue").exists() and rows(stopped)[-1]["step"] == 30
    run = copy(stopped, tmp_path)
    code, errors = train(2, shards_dir, run, "--resume", "auto")
    assert code == 0, errors
    assert not (run / "requeue").exists()
    for name in ("loss", "val_loss", "order_digest", "logit_scale", "lr"):
        assert column(run, name) == column(pair, name), name
    for name in ("best.pt", "checkpoints/step-0000060.pt"):
        assert (run / name).read_bytes() == (pair / name).read_bytes(), name


def test_one_rank_and_two_train_on_the_same_samples(pair: Path, alone: Path) -> None:
    assert column(alone, "order_digest") == column(pair, "order_digest")
    assert_alike(alone, pair, until=5)
    assert column(alone, "val_loss")[20] == pytest.approx(column(pair, "val_loss")[20], rel=1e-2)


def test_resumed_on_another_number_of_ranks(pair: Path, stopped: Path, shards_dir: Path, tmp_path: Path) -> None:
    run = copy(stopped, tmp_path)
    go_on(shards_dir, run)
    assert column(run, "order_digest") == column(pair, "order_digest")
    assert_alike(run, pair, until=34)


def test_sigterm_saves_and_asks_for_the_rest(shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(command(2, shards_dir, out, "--steps", "100000", "--validate-every", "0"))
    wait_for_rows(process, out, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    done = rows(out)[-1]["step"]
    assert (out / "requeue").read_text() == f"{done}\n"
    assert read_checkpoint(list_checkpoints(out / "checkpoints")[0][1])["step"] == done


def test_sigkill_loses_no_sample(server: Server, alone: Path, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ("--shards", str(shards_dir), "--out", str(out), *SMALL, "--save-every", "2")
    life = Life(server, [*more], 1, real=False, hold=[0, 7, str(tmp_path / "never")])
    while len(rows(out)) < 6 or not list_checkpoints(out / "checkpoints"):
        assert life.running()
        time.sleep(0.05)
    life.send(life.ranks(), signal.SIGKILL)
    assert life.join()[0] == [-signal.SIGKILL]
    go_on(shards_dir, out)
    assert [row["step"] for row in rows(out)] == list(range(1, 61))
    for name in ("loss", "val_loss", "order_digest"):
        assert column(out, name) == column(alone, name), name


def test_a_damaged_newest_checkpoint_falls_back(
    alone: Path, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(alone, tmp_path)
    newest = list_checkpoints(run / "checkpoints")[0][1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    go_on(shards_dir, run)
    errors = capsys.readouterr().err
    assert "warning" in errors and newest.name in errors and "going on after step 40" in errors
    assert column(run, "loss") == column(alone, "loss")
    assert read_checkpoint(newest)["step"] == 60


def test_no_good_checkpoint_is_refused(
    alone: Path, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(alone, tmp_path)
    for _, path in list_checkpoints(run / "checkpoints"):
        path.write_bytes(b"")
    line = refused(capsys, "--shards", str(shards_dir), "--out", str(run), "--resume", "auto")
    assert "none of the 2 checkpoints" in line
    assert rows(run) == rows(alone)


def test_settings_that_differ_are_named(
    alone: Path, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--shards", str(shards_dir), "--out", str(alone), "--resume", "auto")
    line = refused(capsys, *arguments, "--seed", "7", "--batch-size", "4", "--data.flip", "0.25")
    assert "seed was 0, is now 7" in line and "batch_size was 8, is now 4" in line and "data.flip was 0.5" in line
    other = Path(shutil.copytree(shards_dir, tmp_path / "set"))
    manifest = (other / "manifest.json").read_text()
    (other / "manifest.json").write_text(manifest.replace('"seed": 0', '"seed": 1'))
    line = refused(capsys, "--shards", str(other), "--out", str(alone), "--resume", "auto")
    assert f"shards was {read_manifest(shards_dir).digest}, is now {read_manifest(other).digest}" in line


def test_mistakes_are_one_line(
    alone: Path, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = ("--shards", str(shards_dir)), ("--out", str(tmp_path / "run"))
    assert "holds a run already" in refused(capsys, *shards, "--out", str(alone))
    assert "no shards here" in refused(capsys, "--shards", str(tmp_path), *out)
    assert "--shards" in refused(capsys, *out)
    assert "warp" in refused(capsys, *shards, *out, "--backend", "warp")
    assert "unknown preset 'huge'; valid: tiny" in refused(capsys, *shards, *out, "--preset", "huge")
    assert "--steps" in refused(capsys, *shards, *out, "--steps", "many")
    assert "steps is 0" in refused(capsys, *shards, *out, "--steps", "0")
    assert "--h5" in refused(capsys, *shards, *out, "--backend", "hdf5")
    assert "is at step 60 already" in refused(
        capsys, *shards, "--out", str(alone), "--resume", "auto", "--stop-at", "20"
    )
    assert "optimizer state is not of this optimizer" in refused(
        capsys, *shards, "--out", str(alone), "--resume", "auto", "--force", "--optim.optimizer", "sgd"
    )
    assert not (alone / "forced.txt").exists(), "refused, and yet noted"
    assert "is a data set's folder" in refused(capsys, *shards, "--out", str(shards_dir), "--resume", "auto")
    assert "lies in the data set" in refused(capsys, *shards, "--out", str(shards_dir / "run"))
    stage = ("--data.stage-dir", str(shards_dir / "stage"))
    assert "--data.stage-dir" in refused(capsys, *shards, *out, *stage)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    assert "cannot write" in refused(capsys, *shards, "--out", str(tmp_path / "file" / "run"))


def test_missing_validation_split_is_named(
    shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path(shutil.copytree(shards_dir, tmp_path / "set"))
    fields = json.loads((bare / "manifest.json").read_text())
    del fields["splits"]["val"]
    (bare / "manifest.json").write_text(json.dumps(fields))
    assert "no val split" in refused(capsys, "--shards", str(bare), "--out", str(tmp_path / "run"))


def test_a_shard_damaged_after_ingest_is_named(
    shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(shards_dir, tmp_path / "set"))
    tar = damaged / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(content)
    line = refused(capsys, "--shards", str(damaged), "--out", str(tmp_path / "run"), "--validate-every", "0")
    assert "train-000001" in line and "damaged" in line


@pytest.mark.parametrize("name", ["train-000002.tar", "train-000001.parquet", "val-000000.tar"])
def test_half_a_copy_of_a_set_is_refused_before_the_first_step(
    name: str, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = Path(shutil.copytree(shards_dir, tmp_path / "set"))
    os.truncate(half / name, 1000)
    arguments = ("--out", str(tmp_path / "run"))
    assert f"{name} has 1,000 bytes" in refused(capsys, "--shards", str(half), *arguments)
    (half / name).unlink()
    assert f"cannot read {name}" in refused(capsys, "--shards", str(half), *arguments)
    more = ("--data.more-shards", str(half), "--validate-every", "0")
    if name.startswith("train"):
        assert f"cannot read {name}" in refused(capsys, "--shards", str(shards_dir), *arguments, *more)
    assert not (tmp_path / "run").exists()


def test_a_run_that_lies_in_a_data_set_goes_on(alone: Path, stopped: Path, shards_dir: Path, tmp_path: Path) -> None:
    """A new one is refused there; and what a network file system says once is no half a copy."""
    own = Path(shutil.copytree(shards_dir, tmp_path / "set"))
    out = Path(shutil.copytree(stopped, own / "run"))
    stat, failures = Path.stat, iter([errno.ESTALE, errno.EIO])

    def failing(path: Path, **more: bool) -> os.stat_result:
        if path.suffix == ".tar" and (number := next(failures, 0)):
            raise OSError(number, os.strerror(number), str(path))
        return stat(path, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "stat", failing)
        go_on(own, out)
    assert next(failures, None) is None
    assert column(out, "order_digest") == column(alone, "order_digest")


def test_a_slow_file_system_is_asked_for_several_shards_at_once(
    shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, three = [], threading.Event()

    def slow(path: Path, _: object) -> None:
        asked.append(path)
        if len(asked) >= 3:
            three.set()
        if not three.wait(300):
            raise InputError("one at a time")
        raise InputError(f"{path.name} is gone")

    monkeypatch.setattr("train.job.check_file", slow)
    assert "train-000000.tar is gone" in refused(capsys, "--shards", str(shards_dir), "--out", str(tmp_path / "run"))


def test_a_file_system_that_hangs_at_the_start_is_named(
    shards_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ranks wait for it, and nothing else would say so."""

    def hanging(path: Path, _: object) -> None:
        deadline = time.monotonic() + 300
        while "waiting for" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        raise InputError(f"{path.name} is gone")

    monkeypatch.setattr("train.job.check_file", hanging)
    monkeypatch.setattr("pipeline.stall.TICK_S", 0.01)
    monkeypatch.setattr("pipeline.stall.STALL_REPORT_S", 0.02)
    assert "is gone" in refused(capsys, "--shards", str(shards_dir), "--out", str(tmp_path / "run"))
    assert f"waiting for the files of the shards since 0 s (a thread is at {shards_dir}" in caplog.text
    assert " came after " not in caplog.text, "it did not"


@pytest.mark.parametrize(
    ("size", "words"), [("4", "is 4 in the environment, but there is no RANK"), ("", "is ''"), ("0", "is '0'")]
)
def test_ranks_that_torchrun_did_not_start_are_refused(
    size: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's script sets WORLD_SIZE for other programs, or a shell left it empty."""
    monkeypatch.setenv("WORLD_SIZE", size)
    line = refused(capsys, "--shards", "s", "--out", "o")
    assert line.startswith("train.main: WORLD_SIZE ") and words in line and "start with torchrun" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_help_on_several_ranks_comes_once(
    rank: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**said, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("train.session.joined", lambda: contextlib.nullcontext(Ranks(rank=rank, size=2)))
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert not stop.value.code and ("--shards" in capsys.readouterr().out) is (rank == 0)


def test_a_mistake_on_two_ranks_is_said_once(shards_dir: Path, tmp_path: Path) -> None:
    code, errors = train(2, shards_dir, tmp_path / "run", "--batch-size", "9")
    said = [line for line in errors.splitlines() if line.startswith("train.main: ")]
    assert code != 0 and len(said) == 1 and "9 = 4 x 2 + 1" in said[0], errors
    assert "InputError" not in errors and "train/" not in errors  # torchrun's own summary follows the line


def test_shuffled_reports_change_the_loss(shards_dir: Path, tmp_path: Path, alone: Path) -> None:
    main(["--shards", str(shards_dir), "--out", str(tmp_path), *SMALL, "--steps", "4", "--shuffle-reports"])
    losses = column(tmp_path, "loss")
    assert len(losses) == 4 and all(abs(losses[step] - column(alone, "loss")[step]) > 1e-4 for step in losses)
