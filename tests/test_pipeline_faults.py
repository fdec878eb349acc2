"""Shards that change, hang or go bad while a loader runs: one clear line, or the same samples in every run alike."""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import FINDINGS, REPOSITORY, write_source

from ingest.config import IngestConfig
from ingest.run import ingest
from pipeline import handles, read, stall, visits
from pipeline.batch import World, digest_batch
from pipeline.config import LoaderConfig
from pipeline.loader import Loader, build_loader, make_order
from pipeline.order import Layout
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import Rows, ShardReader
from shards.verify import verify
from train.checkpoint import list_checkpoints, read_checkpoint
from train.main import main

BACKENDS = ("cpu", "dali")
Place = tuple[int, int]
Change = Callable[[Path], object]


@pytest.fixture
def copy(shards_dir: Path, tmp_path: Path) -> Path:
    """A copy of the made-up shards, to be damaged."""
    return Path(shutil.copytree(shards_dir, tmp_path / "set"))


def settings(root: Path, **more: object) -> LoaderConfig:
    """A small loader; 1 stream and 2 MiB, so that little is read ahead."""
    values = {"shards": root, "backend": "cpu", "batch_size": 8, "threads": 1, "streams": 2, "memory_mb": 2, **more}
    return LoaderConfig(**values)  # type: ignore[arg-type]


def table(root: Path, shard: int) -> list[Rows]:
    """The rows of each block of a training shard."""
    manifest = read_manifest(root)
    with ShardReader(root, manifest, manifest.splits["train"][shard]) as reader:
        return [reader.read_rows(block) for block in range(reader.blocks)]


def digest(loader: Loader, batches: int) -> int:
    """The order digest of so many batches."""
    return sum(digest_batch(next(loader), World()) for _ in range(batches))


# Files that change. The made-up set has a few training shards of some 15 samples each.


def truncate(size: Callable[[Rows, int], int]) -> Change:
    return lambda root: os.truncate(root / "train-000001.tar", size(table(root, 1)[0], 1536))


def other_set(root: Path) -> Path:
    """Shards of other films under the same names."""
    h5, csv = write_source(root.parent / "source", seed=1)
    out = root.parent / "other"
    ingest(
        IngestConfig(
            to_shards=out, h5=(h5,), csv=(csv,), label_columns=FINDINGS, group_column="patient", val_fraction=0.2,
            test_fraction=0.15, workers=1, shard_mb=0.5,
        )
    )  # fmt: skip
    return out


def replace(root: Path) -> None:
    """A new version of the shard, put in place by rename as tools do."""
    other = other_set(root)
    for suffix in ("tar", "idx", "parquet"):
        os.replace(other / f"train-000001.{suffix}", root / f"train-000001.{suffix}")


def same_size(root: Path) -> None:
    """Another tar of the same size in its place: bytes alone can tell."""
    tar = root / "train-000001.tar"
    (root / "new").write_bytes(tar.read_bytes()[::-1])
    os.replace(root / "new", tar)


def fifo(root: Path) -> None:
    (root / "train-000001.tar").unlink()
    os.mkfifo(root / "train-000001.tar")


TRUNCATED: dict[str, Change] = {
    "at a boundary": truncate(lambda rows, _: int(rows.offset[3]) - 512),
    "within a header": truncate(lambda rows, _: int(rows.offset[3]) - 200),
    "within an image": truncate(lambda rows, _: int(rows.offset[3]) + 1000),
    "to nothing": truncate(lambda *_: 0),
}
MOVED: dict[str, Change] = {
    "deleted": lambda root: [path.unlink() for path in root.glob("train-000001.*")],
    "renamed": lambda root: (root / "train-000001.tar").rename(root / "elsewhere.tar"),
    "replaced": replace,
    "replaced, same size": same_size,
    "a pipe": fifo,
}


@pytest.mark.parametrize("change", [*TRUNCATED, *MOVED])
def test_a_shard_that_changed_before_the_run_ends_it(copy: Path, change: str) -> None:
    (TRUNCATED | MOVED)[change](copy)
    with build_loader(settings(copy), World()) as loader, pytest.raises(InputError, match="train-000001") as error:
        digest(loader, 20)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", TRUNCATED)
def test_a_shard_that_is_cut_during_the_run_ends_it(copy: Path, change: str, backend: str) -> None:
    with build_loader(settings(copy, backend=backend), World()) as loader:
        digest(loader, 8)
        TRUNCATED[change](copy)
        with pytest.raises(InputError, match=r"train-000001.* changed while in use"):
            digest(loader, 40)


@pytest.mark.parametrize("change", MOVED)
def test_an_open_shard_that_is_moved_is_read_to_the_end_as_it_was(copy: Path, shards_dir: Path, change: str) -> None:
    with build_loader(settings(shards_dir), World()) as loader:
        expected = digest(loader, 30)
    with build_loader(settings(copy), World()) as loader:
        found = digest(loader, 10)
        MOVED[change](copy)
        assert found + digest(loader, 20) == expected


@pytest.mark.parametrize("change", MOVED)
def test_a_moved_shard_that_has_to_be_opened_again_ends_the_run(
    copy: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "MAX_OPEN_SHARDS", 1)
    with build_loader(settings(copy), World()) as loader:
        digest(loader, 10)
        MOVED[change](copy)
        with pytest.raises(InputError, match="train-000001"):
            digest(loader, 40)


INDEX: dict[str, Callable[[list[str], list[str]], list[str]]] = {
    "shifted by a sample": lambda lines, _: [lines[0], *lines[4:], *lines[1:4]],
    "one sample less": lambda lines, _: lines[:-3],
    "a lower count": lambda lines, _: ["v1.2 3", *lines[1:]],
    "of another shard": lambda _, other: other,
    "empty": lambda *_: [],
}


@pytest.mark.parametrize("kind", [*INDEX, "missing"])
def test_an_index_that_is_not_the_tars_is_found(copy: Path, shards_dir: Path, kind: str) -> None:
    """Training reads no index: it notices a size or an absence, and is right whatever it says; `verify` finds all."""
    path = copy / "train-000001.idx"
    lines, before = path.read_text().splitlines(), path.stat().st_size
    path.unlink()
    if kind != "missing":
        path.write_text("".join(line + "\n" for line in INDEX[kind](lines, other_lines(copy))))
    problems = [problem for _, problem in verify(copy) if problem]
    assert len(problems) == 1 and "train-000001" in problems[0]
    if kind != "missing" and path.stat().st_size == before:
        with build_loader(settings(copy), World()) as loader, build_loader(settings(shards_dir), World()) as sound:
            assert digest(loader, 20) == digest(sound, 20)
        return
    with build_loader(settings(copy), World()) as loader, pytest.raises(InputError, match="train-000001"):
        digest(loader, 20)


def other_lines(root: Path) -> list[str]:
    return (root / "train-000000.idx").read_text().splitlines()


def test_pipes_are_never_waited_for(copy: Path) -> None:
    for name in ("train-000001.parquet", "train-000001.idx", "manifest.json"):
        (copy / name).unlink()
        os.mkfifo(copy / name)
        with pytest.raises(InputError, match=r"not a regular file|no shards here"):
            with build_loader(settings(copy), World()) as loader:
                digest(loader, 20)


# Reads that hang.


class Hang:
    """os.preadv whose Nth call does not come back until `release`."""

    def __init__(self, number: int) -> None:
        self.calls, self.number, self.preadv = 0, number, os.preadv
        self.lock, self.release, self.reached = threading.Lock(), threading.Event(), threading.Event()

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        with self.lock:
            self.calls += 1
            hangs = self.calls == self.number
        if hangs:
            self.reached.set()
            assert self.release.wait(600)
        return self.preadv(descriptor, buffers, offset)


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    """The 6th read hangs; a wait is told of after 50 ms."""
    hang = Hang(6)
    monkeypatch.setattr(read.os, "preadv", hang)
    monkeypatch.setattr(stall, "STALL_REPORT_S", 0.05)
    monkeypatch.setattr(stall, "TICK_S", 0.02)
    yield hang
    hang.release.set()


class Released(logging.Handler):
    """Lets the hanging read go as soon as somebody complains of it; of others he may have to complain first."""

    def __init__(self, hang: Hang) -> None:
        super().__init__()
        self.hang = hang

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        if self.hang.reached.is_set():
            self.hang.release.set()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hanging_read_is_told_of_and_changes_nothing(
    shards_dir: Path, hang: Hang, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Released(hang)
    stall.log.addHandler(handler)
    try:
        with build_loader(settings(shards_dir, backend=backend), World()) as loader:
            found = digest(loader, 20)
    finally:
        stall.log.removeHandler(handler)
    assert hang.reached.is_set()
    with build_loader(settings(shards_dir, backend=backend), World()) as loader:
        assert digest(loader, 20) == found
    assert "waiting for shard train-00000" in caplog.text and ".tar" in caplog.text
    assert "came after" in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_read_that_hangs_for_too_long_ends_the_run(
    copy: Path, hang: Hang, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for the thread that hangs; should that ever come back, it closes the files."""
    monkeypatch.setattr("pipeline.blocks.CLOSE_WAIT_S", 0.1)
    # Until then nobody waits for too long, however busy the machine.
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() if hang.reached.is_set() else 0.0)
    monkeypatch.setattr(stall, "time", clock)
    with build_loader(settings(copy, backend=backend, stall_abort_s=0.3), World()) as loader:
        with pytest.raises(InputError, match=r"shard train-00000\d did not come within 0.3 s \(a thread is at train-"):
            digest(loader, 40)
        assert not hang.release.is_set()
    assert open_files(copy)
    hang.release.set()
    deadline = time.monotonic() + 300
    while open_files(copy):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def open_files(root: Path) -> list[str]:
    """This process's open files of a set."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            names.append(os.readlink(link))
    return [name for name in names if str(root) in name]


def test_a_hang_while_opening_holds_up_that_shard_alone(shards_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are opened and read in the meantime."""
    release = threading.Event()
    reader = handles.ShardReader

    def open_slowly(root: Path, manifest: object, info: object) -> ShardReader:
        if info.name == "train-000001":  # type: ignore[attr-defined]
            assert release.wait(600)
        return reader(root, manifest, info)  # type: ignore[arg-type]

    monkeypatch.setattr(handles, "ShardReader", open_slowly)
    manifest = read_manifest(shards_dir)
    infos = manifest.splits["train"]
    layout = Layout(tuple(info.rows for info in infos), manifest.block_rows)
    shards = handles.OpenShards([handles.ShardSet(root=shards_dir, manifest=manifest, shards=infos, layout=layout)])

    def hang() -> None:
        with shards.use(1):
            pass

    thread = threading.Thread(target=hang)
    thread.start()
    while "opening train-000001" not in shards.busy.longest():
        time.sleep(0.001)
    with shards.use(0) as other:
        assert len(other.read_rows(0))
    release.set()
    thread.join()
    shards.close()


def test_time_in_which_the_process_stood_still_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP, then SIGCONT an hour later: the clock has moved, nobody has waited."""
    now = [100.0]
    monkeypatch.setattr(stall.time, "monotonic", lambda: now[0])
    patience = stall.Patience("shard train-000000", stall.Busy(), 30)
    now[0] += 3600
    patience.look()
    for _ in range(27):
        now[0] += 1
        patience.look()
    now[0] += 1
    with pytest.raises(InputError, match="train-000000 did not come within 30 s"):
        patience.look()


SLOW_READ = """
import os, sys, threading
from pipeline import stall
from pipeline.batch import World
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
from shards.cli import main_guard
stall.STALL_REPORT_S = 0.5
awaited, preadv = threading.Event(), os.preadv

class Patience(stall.Patience):
    def __init__(self, *how):
        super().__init__(*how)
        awaited.set()

def preadv_when_awaited(*how):  # a read that is done before anybody waits for it shows nothing, however slow it was
    awaited.wait()
    return preadv(*how)

stall.Patience, os.preadv = Patience, preadv_when_awaited
with main_guard("slow"):
    config = LoaderConfig(shards=sys.argv[1], backend="cpu", batch_size=8, threads=1, stall_abort_s=float(sys.argv[2]))
    with build_loader(config, World()) as loader:
        for _ in range(10):
            next(loader)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("abort", "code"), [("60", 0), ("1", 2)])
def test_a_read_that_the_system_delays(shards_dir: Path, tmp_path: Path, abort: str, code: int) -> None:
    """D8 by strace: the first read of each thread takes 4 seconds longer, of which the batches wait for all."""
    found = shutil.which("strace")
    if found is None or subprocess.run([found, "-qq", "-o", "/dev/null", "true"], capture_output=True).returncode:
        pytest.skip("strace cannot trace here")
    calls = "preadv,preadv2"
    done = subprocess.run(
        [found, "-f", "--seccomp-bpf", "-qq", "-o", str(tmp_path / "log"), "-e", f"trace={calls}", "-e",
         f"inject={calls}:delay_enter=4000000:when=1", sys.executable, "-c", SLOW_READ, str(shards_dir), abort],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert "DELAYED" in (tmp_path / "log").read_text()
    assert done.returncode == code, done.stderr
    assert "waiting for shard train-00000" in done.stderr and "Traceback" not in done.stderr
    assert ("did not come within 1 s" in done.stderr) == (code == 2)


# Bad samples.


@pytest.fixture
def bad(copy: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Place, str]:
    """Rows of `copy` that are bad, and why: flipped bits, and images of zeros that pass for what ingest wrote.

    Rows 2 and 3 of shard 0 are neighbours, one of each kind; after the last of shard 1 its block begins again.
    """
    last = sum(map(len, table(copy, 1))) - 1
    places = {(0, 2): "digest", (0, 3): "decode", (1, last): "decode", (1, 0): "digest", (2, 5): "digest"}
    for (shard, row), kind in places.items():
        block = table(copy, shard)[row // 16]
        offset, size = int(block.offset[row % 16]), int(block.size[row % 16])
        with open(copy / f"train-{shard:06d}.tar", "r+b") as file:
            file.seek(offset)
            content = bytearray(file.read(size))
            content[size // 2] ^= 16
            file.seek(offset)
            file.write(content if kind == "digest" else bytes(size))
    found = visits.find_damaged
    monkeypatch.setattr(
        visits, "find_damaged", lambda shard, images, *more: [i for i in found(shard, images, *more) if images[i].any()]
    )
    return places


def expected_places(root: Path, bad: dict[Place, str], end: int) -> dict[int, Place]:
    """Position -> (shard, row), by the order and the rule, without any of the code under test but the order."""
    manifest = read_manifest(root)
    order = make_order(settings(root), [manifest], 2)
    found = order.locate(np.arange(end))
    expected = {}
    for position, (shard, row) in enumerate(zip(found.shard.tolist(), found.row.tolist(), strict=True)):
        first = row // manifest.block_rows * manifest.block_rows
        length = min(manifest.block_rows, manifest.splits["train"][shard].rows - first)
        turn = (first + (row - first + step) % length for step in range(length))
        expected[position] = shard, next(each for each in turn if (shard, each) not in bad)
    return expected


def deliver(
    config: LoaderConfig, ranks: int, *, position: int = 0, end: int = 160, known: tuple = ()
) -> dict[int, Place]:
    """Position -> (shard, row) over all ranks; tokens and labels have to be those of the delivered row."""
    places = {}
    tables = [table(config.shards, shard) for shard in range(len(read_manifest(config.shards).splits["train"]))]
    for rank in range(ranks):
        with build_loader(config, World(rank=rank, size=ranks), position=position, bad_samples=known) as loader:
            while loader.position < end:
                batch = next(loader)
                for index, (shard, row) in enumerate(batch.samples.tolist()):
                    places[batch.position + rank + index * ranks] = shard, row
                    rows, at = tables[shard][row // 16], row % 16
                    assert batch.tokens[index].tolist() == rows.tokens[at].tolist()
                    np.testing.assert_array_equal(batch.labels[index].numpy(), rows.labels[at])
    return places


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ranks", "threads"), [(1, 1), (2, 2)])
def test_bad_samples_are_replaced_alike_in_every_run(
    copy: Path, bad: dict[Place, str], backend: str, ranks: int, threads: int
) -> None:
    config = settings(copy, backend=backend, threads=threads, max_bad=5)
    expected = expected_places(copy, bad, 160)
    assert deliver(config, ranks) == expected
    late = {position: place for position, place in expected.items() if position >= 72}
    assert deliver(config, ranks, position=72) == late


def test_bad_samples_are_listed_and_stay_bad(copy: Path, shards_dir: Path, bad: dict[Place, str]) -> None:
    """What a run is given as bad it replaces, though the files were restored since."""
    with build_loader(settings(copy, max_bad=5), World()) as loader:
        digest(loader, 20)
        known, stats = loader.bad_samples(), loader.stats()
    assert [(each["shard"], each["row"]) for each in known] == sorted(bad) and stats["bad_samples"] == 5
    for each in known:
        rows, at = table(shards_dir, each["shard"])[each["row"] // 16], each["row"] % 16
        assert each["key"] == rows.keys()[at] and each["offset"] == int(rows.offset[at])
        assert ("xxh3" if bad[each["shard"], each["row"]] == "digest" else "decode") in each["why"]
    restored = deliver(settings(shards_dir, max_bad=5), 1, known=tuple(known))
    assert restored == expected_places(shards_dir, bad, 160)


@pytest.mark.usefixtures("bad")
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_images_of_replaced_samples_are_those_of_their_rows(copy: Path, shards_dir: Path, flip: float) -> None:
    """Without chance an image depends on its row alone, whose report may name a side and so forbid the flip: each is
    the one that an undamaged set gives."""
    plain = {"scale": (1.0, 1.0), "flip": flip, "flip_guard": True}
    whole = {}
    with build_loader(settings(shards_dir, **plain), World()) as loader:
        for batch in (next(loader) for _ in range(20)):
            whole |= {
                tuple(place): image.clone() for place, image in zip(batch.samples.tolist(), batch.images, strict=True)
            }
    with build_loader(settings(copy, max_bad=5, **plain), World()) as loader:
        for batch in (next(loader) for _ in range(20)):
            for place, image in zip(batch.samples.tolist(), batch.images, strict=True):
                assert image.equal(whole[tuple(place)])


@pytest.mark.parametrize("ahead", [2, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bad_sample_too_many_ends_the_run_at_its_batch(
    copy: Path, bad: dict[Place, str], backend: str, ahead: int
) -> None:
    """At the batch that would have held it, however far ahead the damage was read."""
    order = make_order(settings(copy), [read_manifest(copy)], 2)
    found = order.locate(np.arange(160))
    due = [place in bad for place in zip(found.shard.tolist(), found.row.tolist(), strict=True)]
    batch = int(np.flatnonzero(due)[2]) // 8
    before = int(np.sum(due[: batch * 8]))
    with build_loader(settings(copy, backend=backend, max_bad=before, memory_mb=ahead), World()) as loader:
        digest(loader, batch)
        with pytest.raises(InputError, match=f"bad samples in split train, {before} are tolerated"):
            next(loader)


def test_a_block_without_a_good_image_ends_the_run(copy: Path) -> None:
    rows = table(copy, 1)[0]
    with open(copy / "train-000001.tar", "r+b") as file:
        for offset in rows.offset.tolist():
            file.seek(offset)
            file.write(b"bad")
    with build_loader(settings(copy, max_bad=100), World()) as loader:
        with pytest.raises(InputError, match="train-000001: no image of the block at row 0 is good"):
            digest(loader, 20)


def test_a_read_that_was_damaged_on_its_way_is_no_bad_sample(shards_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second reading decides."""
    preadv, calls = os.preadv, [0]

    def flaky(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        calls[0] += 1
        if calls[0] % 5 == 0:
            buffers[0][len(buffers[0]) // 2] ^= 1
        return count

    monkeypatch.setattr(read.os, "preadv", flaky)
    with build_loader(settings(shards_dir), World()) as loader:
        digest(loader, 20)
        assert loader.stats()["retries"] and not loader.bad_samples()


@pytest.mark.usefixtures("bad")
def test_evaluation_and_baselines_take_no_bad_samples(copy: Path) -> None:
    with build_loader(settings(copy, mode="eval", max_bad=5), World()) as loader:
        with pytest.raises(InputError, match="train-000000: image"):
            list(loader)
    with pytest.raises(InputError, match="reads no shards"):
        settings(copy, backend="hdf5", h5=copy, max_bad=1)


def spoil(root: Path, shard: int, row: int) -> None:
    """Flip a bit of an image."""
    rows = table(root, shard)[row // 16]
    with open(root / f"train-{shard:06d}.tar", "r+b") as file:
        file.seek(int(rows.offset[row % 16]) + 99)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 2]))


def start(ranks: int, root: Path, out: Path, *more: str) -> str:
    """20 steps, saved at the end, on one rank in this process; what stderr has where others end before."""
    arguments = [
        *("--shards", str(root), "--out", str(out), "--steps", "20", "--batch-size", "8", "--model.widths"),
        *("16",) * 4, "--device", "cpu", "--threads", "1", "--log-every", "1", "--validate-every", "0",
        *("--save-every", "20", "--optim.warmup", "5", *more),
    ]  # fmt: skip
    if ranks == 1:
        main(arguments)
        return ""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "train.main",
         *arguments],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.stderr if done.returncode else ""


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def saved(out: Path) -> dict:
    """The newest checkpoint."""
    return read_checkpoint(list_checkpoints(out / "checkpoints")[0][1])


def train(ranks: int, root: Path, out: Path, *more: str) -> tuple[list[dict], list[dict]]:
    """A run that tolerates 2 bad samples: its metrics, and the bad samples of the last checkpoint."""
    errors = start(ranks, root, out, "--data.max-bad", "2", *more)
    assert not errors, errors
    return metrics(out), saved(out)["bad_samples"]


@pytest.mark.slow
def test_training_without_bad_samples_is_the_same_on_other_ranks_and_after_a_resume(copy: Path, tmp_path: Path) -> None:
    spoil(copy, 0, 2)
    spoil(copy, 2, 9)
    rows, bad = train(2, copy, tmp_path / "pair")
    assert [(each["shard"], each["row"]) for each in bad] == [(0, 2), (2, 9)] and rows[-1]["bad_samples"] == 2
    _, early = train(1, copy, tmp_path / "alone", "--stop-at", "10")
    assert early
    again, all_bad = train(1, copy, tmp_path / "alone", "--resume", "auto")
    assert all_bad == bad
    for name in ("order_digest", "bad_samples"):
        assert [row[name] for row in again] == [row[name] for row in rows]


@pytest.mark.slow
def test_a_loader_that_fails_on_one_rank_costs_no_step(copy: Path, shards_dir: Path, tmp_path: Path) -> None:
    """D4: one line, and a checkpoint of the step before; with the shard restored the run goes on as if nothing was."""
    spoil(copy, 0, 2)
    order = make_order(settings(copy, streams=48), [read_manifest(copy)], 48)
    found = order.locate(np.arange(160))
    step = int(np.flatnonzero((found.shard == 0) & (found.row == 2))[0]) // 8
    errors = start(2, copy, tmp_path / "run")
    (line,) = (line for line in errors.splitlines() if line.startswith("train.main: "))
    assert "train-000000: image" in line and f"stopped after step {step}, which is saved" in line
    assert step > 0 and saved(tmp_path / "run")["step"] == step
    shutil.copy(shards_dir / "train-000000.tar", copy)
    start(1, copy, tmp_path / "run", "--resume", "auto")
    with build_loader(settings(shards_dir, streams=None, memory_mb=256), World()) as loader:
        assert saved(tmp_path / "run")["order_digest"] == f"{digest(loader, 20) % 2**64:016x}"
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 21))
