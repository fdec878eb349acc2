"""The loader bench: what it counts, how it compares, that cold is cold and slow is slow. No test looks at a speed."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, assert_refused, run_module

from bench.case import Case, Task, convert
from bench.loader import LoaderBenchConfig, _told, main, run_bench
from bench.machine import _TELLING, file_system, look
from bench.page import to_text
from bench.peers import LOADERS, WRITERS, missing
from bench.processes import tree, usage
from bench.shapes import read_results, tables_of
from bench.storage import Counts, SlowSettings, counts, evict, resident_bytes, slow_file_system
from bench.summary import summarise, verdict
from pipeline.buffers import AHEAD_BYTES
from shards.errors import InputError

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")
MEASURED = ("hdf5", "hdf5 uint8", "webdataset", "dali reader", "cpu")


def printed(result: dict[str, Any]) -> str:
    """The tables that a command prints."""
    return "\n".join(line for table in tables_of({"bench": "loader", **result}) for line in to_text(table))


# --- one run, whole ---


@pytest.fixture(scope="module")
def slow_run(source: tuple[Path, Path], shards_dir: Path) -> tuple[dict[str, Any], str]:
    """Every kind of case once on a slow file system: the JSON and the table."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler for the slow file system")
    h5, csv = source
    config = LoaderBenchConfig(
        shards=shards_dir, h5=h5, csv=(csv,), uint8=True, peers=True, only=(*MEASURED, "ffcv", "litdata"),
        rounds=1, seconds=0.3, memory_s=0.2, warmup_batches=1, batch_size=16, threads=2,
        latency_ms=(1.0,), bandwidth_mb=400, jitter=0.1, readahead_kb=0,
    )  # fmt: skip
    result = run_bench(config)
    return json.loads(json.dumps(result)), printed(result)


def test_a_run_has_every_case_with_every_figure(slow_run: tuple[dict[str, Any], str]) -> None:
    result, said = slow_run
    cases = {case["name"]: case for case in result["cases"]}
    assert set(cases) >= set(MEASURED)
    for name in MEASURED:
        case, (taken,) = cases[name], cases[name]["rounds"]
        assert case["latency_ms"] == 1 and case.get("peer", False) == (name in ("webdataset", "dali reader"))
        assert taken["images"] > 0 and taken["images"] % 16 == 0
        assert case["images_per_s"] == taken["images_per_s"] == case["lowest"] == case["highest"] > 0
        assert case["ratio_to_hdf5"] == taken["images_per_s"] / cases["hdf5"]["rounds"][0]["images_per_s"]
        assert case["first_batch_s"] > 0 and 0 < case["cpu_s_per_1000"] < 1000
        assert 50 << 20 < case["pss_bytes"] < 20 << 30  # torch alone is more than that
        assert name in said
    assert result["bench"] == "loader" and result["settings"]["latency_ms"] == [1.0]
    assert set(result["environment"]["file_system"]) == {"shards", "h5"}
    assert "memory, MiB" in said and "CPU s a 1,000 films" in said and "cpu, 1 ms" in said


def test_the_slow_file_system_is_under_every_case(slow_run: tuple[dict[str, Any], str]) -> None:
    """Requests counted in the measured stretch: a film each from HDF5, of its size; less than a film from shards. Where
    little was measured, on a busy machine, all of it may have been read before."""
    cases = {case["name"]: case for case in slow_run[0]["cases"]}
    film = 320 * 320
    for name, size in (("hdf5", 4 * film), ("hdf5 uint8", film)):
        (taken,) = cases[name]["rounds"]
        assert taken["requests"] >= taken["images"] - 16 * 3 * 2  # two workers, each at a batch and two ahead
        assert taken["requests"] * size <= taken["request_bytes"] <= taken["requests"] * 1.1 * size
    for name, ahead in (("webdataset", 64), ("dali reader", 64), ("cpu", AHEAD_BYTES // 20_000)):
        (taken,) = cases[name]["rounds"]
        assert taken["images"] <= ahead or (taken["requests"] > 0 and taken["request_bytes"] > 0)


def test_a_peer_that_is_absent_is_a_row_with_the_reason(slow_run: tuple[dict[str, Any], str]) -> None:
    if missing("ffcv") is None:
        pytest.skip("FFCV is installed here")
    rows = [case for case in slow_run[0]["cases"] if case["name"] == "ffcv"]
    assert rows and "not installed" in rows[0]["note"] and "rounds" not in rows[0] and "images_per_s" not in rows[0]
    assert "not installed (pip install ffcv)" in slow_run[1]


def test_results_name_no_path(slow_run: tuple[dict[str, Any], str], source: tuple[Path, Path]) -> None:
    text = json.dumps(slow_run[0])
    assert str(source[0].parent) not in text and "/tmp" not in text and os.uname().nodename not in text


def test_the_parent_stays_small() -> None:
    """Pages that parent and child share count half for each: what the child needs must not be in the parent."""
    code = "import sys, bench.loader; print([m for m in ('torch', 'numpy', 'pyarrow', 'nvidia') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_cold_run_evicts_and_says_so(shards_dir: Path, tmp_path: Path) -> None:
    if file_system(tmp_path)["type"] == "tmpfs":
        pytest.skip("the tests' folder is in memory, which cannot be evicted")
    copy = shutil.copytree(shards_dir, tmp_path / "shards")
    cpu = min(os.sched_getaffinity(0))
    config = LoaderBenchConfig(
        shards=copy, rounds=1, seconds=0.01, memory_s=0, batch_size=16, only=("cpu",), cold=True, cpus=(cpu,)
    )
    result = run_bench(config)
    assert result["settings"]["cpus"] == [cpu] and result["settings"]["threads"] == 1 and result["settings"]["cold"]
    assert os.sched_getaffinity(0) >= {cpu}
    (case,) = result["cases"]
    (taken,) = case["rounds"]
    tars = sum(path.stat().st_size for path in copy.glob("train-*.tar"))
    assert taken["resident_share"] <= 0.01
    assert 60 <= taken["images"] < 60 + 2 * 16  # one epoch, in whole batches
    assert taken["read_bytes"] >= 0.9 * tars  # from storage: nothing else had them


def test_what_maps_its_files_is_not_measured_as_if_it_were_slow(slow_run: tuple[dict[str, Any], str]) -> None:
    (row,) = [case for case in slow_run[0]["cases"] if case["name"] == "litdata"]
    assert "rounds" not in row and ("maps its files" in row["note"] or "not installed" in row["note"])


# --- arithmetic ---


def rounds(*rates: float, **others: float) -> list[dict[str, Any]]:
    base = {"first_batch_s": 0.5, "images": 200, "cpu_s_per_1000": 2.0, "read_bytes": 50}
    return [base | {"images_per_s": rate} | others for rate in rates]


def test_ratios_are_taken_within_a_round() -> None:
    """A round in which the machine was slow falls on both: 4, 2, 3, and not 120 / 60, a median by a median."""
    cases = [
        Case(name=name, loader=name, peer=name in ("webdataset", "spdl")) for name in ("hdf5", "cpu", "webdataset")
    ]
    taken: dict[Any, Any] = {
        ("hdf5", None): rounds(100, 60, 10, pss_bytes=7),
        ("cpu", None): rounds(400, 120, 30, pss_bytes=5),
        ("cpu floor", None): rounds(800, 240, 60),
        ("webdataset", None): rounds(50, 20, 10),
        ("spdl", None): [],
    }
    found = {row["name"]: row for row in summarise(cases, taken, {("spdl", None): "not installed"})}
    cpu = found["cpu"]
    assert (cpu["ratio_to_hdf5"], cpu["ratio_lowest"], cpu["ratio_highest"]) == (3, 2, 4)
    assert cpu["share_of_floor"] == 0.5 and cpu["ratio_to_best_peer"] == 6
    assert (cpu["images_per_s"], cpu["lowest"], cpu["highest"], cpu["pss_bytes"]) == (120, 30, 400, 5)
    assert cpu["read_bytes_per_1000"] == 250 and cpu["rounds"] == taken["cpu", None]
    assert found["spdl"]["note"] == "not installed" and "images_per_s" not in found["spdl"]
    assert "spdl: not installed" in printed({"cases": list(found.values())})


def test_a_peer_that_fails_midway_is_no_peer_to_compare_with() -> None:
    cases = [Case(name=name, loader=name, peer=name != "cpu") for name in ("cpu", "spdl", "webdataset")]
    taken: dict[Any, Any] = {("cpu", None): rounds(400, 120), ("spdl", None): rounds(300)}
    taken["webdataset", None] = rounds(100, 60)
    found = {row["name"]: row for row in summarise(cases, taken, {("spdl", None): "failed: it hung"})}
    assert found["cpu"]["ratio_to_best_peer"] == 3 and "images_per_s" not in found["spdl"]


def test_each_latency_is_compared_with_its_own_baseline() -> None:
    cases = [Case(name="hdf5", loader="hdf5"), Case(name="cpu", loader="cpu")]
    taken: dict[Any, Any] = {("hdf5", 0.0): rounds(100), ("cpu", 0.0): rounds(400)}
    taken |= {("hdf5", 20.0): rounds(10), ("cpu", 20.0): rounds(300)}
    found = {(row["name"], row["latency_ms"]): row for row in summarise(cases, taken, {})}
    assert found["cpu", 0.0]["ratio_to_hdf5"] == 4 and found["cpu", 20.0]["ratio_to_hdf5"] == 30


def test_the_figures_end_in_what_to_do() -> None:
    """0.2 CPU seconds for 1,000 films: 9,000 films/s keep 1.8 CPUs busy, 1,500 keep 0.3, which wait for files."""
    cases = [Case(name=name, loader=name.split()[0]) for name in ("hdf5", "cpu", "cpu floor", "dali (CPU)")]
    taken: dict[Any, Any] = {}
    for ms, rate in ((0.0, 9000), (20.0, 1500)):
        taken |= {("hdf5", ms): rounds(500, 750), ("cpu", ms): rounds(rate, rate, cpu_s_per_1000=0.2)}
        taken |= {("cpu floor", ms): rounds(99_999, 99_999), ("dali (CPU)", ms): rounds(1000, 1000)}
    settings = {"cold": False, "threads": 2, "films": 9000}
    fast, slow = verdict(summarise(cases, taken, {}), settings).split(" At ")
    assert fast.startswith("At 0 ms a request cpu gives 9,000 films/s, 15.0x hdf5 (12.0 to 18.0): a step that takes")
    assert slow.startswith("20 ms a request cpu gives 1,500 films/s, 2.5x hdf5 (2.0 to 3.0); 0.3 of 2 CPUs busy")
    assert "--tune --latency-ms 20, and train.main --loader-config" in slow
    cold = summarise(cases, {("cpu", None): rounds(3000, first_batch_s=2.0)}, {})
    assert "67% of the epoch is its start" in verdict(cold, settings | {"cold": True})
    assert verdict([{"name": "cpu", "note": "failed"}], settings) == ""
    assert "" not in _told({"cases": [{"name": "cpu", "note": "failed"}], "verdict": ""})
    # What is to be tuned is what was measured.
    found = summarise(cases, {("cpu", 0.0): rounds(900, cpu_s_per_1000=0.2)}, {})
    said = verdict(found, settings | {"cold": True, "bandwidth_mb": 20.0})
    assert "bench.loader --tune --cold --bandwidth-mb 20, and" in said


def fake_children(monkeypatch: pytest.MonkeyPatch, failing: str, shards: Path) -> list[str]:
    """`run_child` that measures nothing and fails for one loader; the loaders it was called for."""
    called: list[str] = []

    def run_child(task: Task, variables: Any = None) -> dict[str, Any]:
        assert not variables
        if task.action == "look":
            absent = dict.fromkeys(("spdl", "streaming", "litdata", "ffcv"), "not installed")
            return {
                **{"cuda": False, "dali": failing == "dali", "films": 60, "block_rows": 1, "codec": "jpeg"},
                **{"missing": absent, "digest": "0"},
            }
        called.append(task.loader)
        if task.action == "together":
            assert (task.rounds, task.shards) == (3, str(shards))
            return {"verdict": "Step-bound: a sentence.", "settings": {}}
        if task.loader == failing:
            raise InputError("it broke")
        return rounds(100.0)[0]

    monkeypatch.setattr("bench.loader.run_child", run_child)
    return called


def test_a_loader_of_others_that_fails_is_a_row_and_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, shards_dir: Path
) -> None:
    called = fake_children(monkeypatch, "webdataset", shards_dir)
    result = run_bench(LoaderBenchConfig(shards=shards_dir, rounds=3))
    found = {case["name"]: case for case in result["cases"]}
    assert found["webdataset"]["note"] == "failed: it broke" and "rounds" not in found["webdataset"]
    assert called.count("webdataset") == 1 and len(found["cpu"]["rounds"]) == 3
    assert result["together"]["the file system as it is"]["verdict"].startswith("Step-bound")
    assert "together" not in run_bench(LoaderBenchConfig(shards=shards_dir, rounds=1, only=("cpu",)))


def test_dali_that_does_not_run_costs_no_other_figure(monkeypatch: pytest.MonkeyPatch, shards_dir: Path) -> None:
    called = fake_children(monkeypatch, "dali", shards_dir)
    found = {case["name"]: case for case in run_bench(LoaderBenchConfig(shards=shards_dir, rounds=3))["cases"]}
    assert found["dali (CPU)"]["note"] == "failed: it broke" and called.count("dali") == 1
    assert len(found["cpu"]["rounds"]) == len(found["dali reader"]["rounds"]) == 3


def test_a_run_says_what_the_loader_costs_training(
    monkeypatch: pytest.MonkeyPatch, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last words are the verdict, and a report shows it as a result of its own."""
    fake_children(monkeypatch, "", shards_dir)
    main(["--shards", str(shards_dir), "--rounds", "3", "--json", str(tmp_path / "x.json")])
    said = capsys.readouterr().out
    assert "cpu gives 100 films/s" in said and "On the file system as it is: Step-bound: a sentence." in said
    content = json.loads((tmp_path / "x.json").read_bytes())
    (together,) = content["together"].values()
    together |= {"bench": "together", "cases": [{"name": "live", "rounds": [{"step_s": 0.1, "images_per_s": 640}]}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    loader, training = read_results(tmp_path / "x.json")
    assert (
        loader.said
        and (loader.kind, training.kind) == ("loader", "together")
        and training.said == ("Step-bound: a sentence.",)
    )


def born(pid: int) -> int | None:
    """When a process began: its number may be another's later. None for one that has ended, taken note of or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def with_workers(pid: int) -> dict[int, int | None]:
    """All processes of a bench, once the child that measures has forked its two workers; before that none."""
    found = {each: born(each) for each in tree(pid)}
    measuring = [each for each in found if b'"measure"' in _command(each)]
    return found if len(measuring) == 3 else {}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def until(holds: Callable[[], Any], seconds: float) -> Any:
    """What `holds` says once it says yes; after so many seconds, what it says then."""
    deadline = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process_and_no_folder(number: int, shards_dir: Path, tmp_path: Path) -> None:
    """Only after SIGKILL do folders stay: nobody is left to remove them."""
    command = [sys.executable, "-m", "bench.loader", "--shards", str(shards_dir), "--only", "webdataset"]
    run = subprocess.Popen(
        [*command, "--threads", "2", "--seconds", "60"], cwd=REPOSITORY, env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        found = until(lambda: with_workers(run.pid) or run.poll() is not None, 600)
        assert found is not True, run.communicate()[1]  # it ended by itself
        assert found and list(tmp_path.iterdir())
        run.send_signal(number)
        _, said = run.communicate(timeout=600)
    finally:
        run.kill()
    assert run.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert said.decode().count("\n") <= 1 and "Traceback" not in said.decode()
    assert until(lambda: all(born(pid) != began for pid, began in found.items()), 300)
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())


@pytest.mark.parametrize("late", [False, True])
def test_what_a_killed_child_has_forked_dies_with_it(late: bool) -> None:
    """Also a worker that is still being set up, or has hardly begun: a DataLoader's would outlive it for ever."""
    code = """if True:
        import os, signal, sys, time
        from bench.processes import forks_die_too
        parent = os.getpid()
        def wait():
            while os.getppid() == parent: time.sleep(0.001)
        if sys.argv[1] == "True": os.register_at_fork(after_in_child=wait)
        forks_die_too()
        worker = os.fork()
        if not worker:
            os.close(1)  # or who reads it would wait for our end
            os.close(2)
            signal.alarm(120)
            signal.pause()
        print(worker, flush=True)
        os.kill(parent, signal.SIGKILL)"""
    done = subprocess.run([sys.executable, "-c", code, str(late)], cwd=REPOSITORY, capture_output=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert until(lambda: born(int(done.stdout)) is None, 60)


def test_films_that_were_converted_by_half_are_converted_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards_dir: Path, source: tuple[Path, Path]
) -> None:
    """A folder for converted films that is kept holds whole ones only, and those of other shards apart."""
    config = LoaderBenchConfig(shards=shards_dir, h5=source[0], uint8=True)
    case = Case(name="hdf5 uint8", loader="hdf5", uint8=True)

    def half(task: Task) -> dict[str, Any]:
        Path(task.data, "cxr-uint8.h5").write_bytes(b"half")
        raise InputError("interrupted")

    monkeypatch.setattr("bench.case.run_child", half)
    with pytest.raises(InputError):
        convert(config, [case], tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert convert(config, [case], tmp_path) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["cxr-uint8.h5"]


def test_films_under_another_name_are_measured_and_unfit_ones_say_what_to_leave_out(
    tmp_path: Path, source: tuple[Path, Path], shards_dir: Path
) -> None:
    import h5py

    with h5py.File(source[0]) as file, h5py.File(tmp_path / "deep.h5", "w") as deep:
        deep["a/films"], deep["wide"] = file["cxr"][:], file["cxr"][:].astype("u2")
    flags = ("--shards", shards_dir, "--h5", tmp_path / "deep.h5", "--csv", source[1], "--uint8", "--rounds", "1")
    few = ("--seconds", "0.1", "--warmup-batches", "1", "--memory-s", "0", "--batch-size", "16", "--only", "hdf5 uint8")
    done = run_module("bench.loader", *flags, *few, "--dataset", "a/films")
    assert done.returncode == 0 and "hdf5 uint8" in done.stdout, done.stderr
    only = (*few[:-2], "--only", "hdf5")
    assert_refused(run_module("bench.loader", *flags, *only, "--dataset", "wide"), "uint16", "without --h5 the others")


def test_ours_has_to_run(monkeypatch: pytest.MonkeyPatch, shards_dir: Path) -> None:
    fake_children(monkeypatch, "cpu", shards_dir)
    with pytest.raises(InputError, match="it broke"):
        run_bench(LoaderBenchConfig(shards=shards_dir, rounds=1))


def test_what_cannot_be_is_refused(shards_dir: Path) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "--uint8 copies": {"uint8": True},
        "--latency-ms -1": {"latency_ms": (-1.0,)},
        "--bandwidth-mb 0": {"bandwidth_mb": 0.0},
        "--jitter 0.1": {"jitter": 0.1},
        "--cold-s 0": {"cold_s": 0.0},
        "--cpus 9999": {"cpus": (9999,)},
    }
    for words, settings in wrong.items():
        with pytest.raises(InputError, match=words):
            LoaderBenchConfig(shards=shards_dir, **settings)


def test_other_films_than_those_of_the_shards_are_refused(shards_dir: Path, tmp_path: Path) -> None:
    """The HDF5 file and the CSV, by their rows: nobody compares two data sets."""
    (tmp_path / "one.csv").write_text("impression\nClear.\n")
    with pytest.raises(InputError, match="the CSV has 1 rows, the shards were made from 96"):
        look(Task(action="look", shards=str(shards_dir), csv=(str(tmp_path / "one.csv"),), text_column="impression"))


# --- counted by the kernel ---


def test_usage_counts_the_tree() -> None:
    """CPU time of a child that is still there is counted; and never more than all CPUs could give."""
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before, started = usage(os.getpid()).cpu_s, time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    spent = usage(os.getpid()).cpu_s - before
    child.communicate(b"\n")
    assert 0.3 <= spent <= (time.perf_counter() - started) * (os.cpu_count() or 1)


def test_eviction_is_verified(tmp_path: Path) -> None:
    if file_system(tmp_path)["type"] == "tmpfs":
        pytest.skip("the tests' folder is in memory, which cannot be evicted")
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "film"
    file.write_bytes(os.urandom(1_000_003))
    assert resident_bytes(file) == 1_000_003
    assert evict([tmp_path / "folder"]) <= 0.01 and resident_bytes(file) < 10_004
    before = usage(os.getpid()).storage_bytes
    file.read_bytes()
    assert usage(os.getpid()).storage_bytes - before >= 990_000
    assert resident_bytes(file) == 1_000_003


def test_what_cannot_be_evicted_is_refused() -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or file_system(memory)["type"] != "tmpfs":
        pytest.skip("no file system in memory here")
    file = memory / f"shardclip-test-{os.getpid()}"
    file.write_bytes(bytes(100_000))
    try:
        with pytest.raises(InputError, match=r"100\.0% of the bytes .* still in memory"):
            evict([file])
    finally:
        file.unlink()


def test_mount_options_tell_no_names() -> None:
    told = ["rw", "vers=4.2", "rsize=1048576", "size=24684092k", "data=ordered"]
    kept = [
        "addr=10.0.0.1",
        "lowerdir=/home/x",
        "dev=fs1",
        "uid=1000",
        "resgid=65534",
        "username=jane",
        "clientaddr=1.2.3.4",
    ]
    assert [option for option in told + kept if _TELLING.fullmatch(option)] == told
    assert file_system(Path("/proc"))["type"] == "proc"


# --- a slow file system ---


def under(slow: dict[str, str], code: str, *arguments: object) -> Counts:
    """What a Python process asks of it."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | slow, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = counts(slow)
    assert found is not None
    return found


WAYS = {
    "read": "os.read(fd, 4096)",
    "pread": "os.pread(fd, 4096, 0)",
    "readv": "os.readv(fd, [bytearray(2048), bytearray(2048)])",
    "preadv": "os.preadv(fd, [bytearray(4096)], 0)",
    "fread": "libc.fread(ctypes.create_string_buffer(4096), 1, 4096, ctypes.c_void_p(libc.fopen(name, b'rb')))",
    "preadv64": "libc.preadv64(fd, (ctypes.c_void_p * 2)(ctypes.addressof(room), 4096), 1, ctypes.c_long(0))",
    "pread64": "libc.pread64(fd, ctypes.create_string_buffer(4096), 4096, 0)",
}
OPENED = """import ctypes, os, sys
name = sys.argv[1].encode()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
fd, room = os.open(name, os.O_RDONLY), ctypes.create_string_buffer(4096)
"""


@needs_compiler
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_read_is_delayed(way: str, tmp_path: Path) -> None:
    (tmp_path / "film").write_bytes(bytes(100_000))
    with slow_file_system(SlowSettings(latency_ms=1), [tmp_path]) as slow:
        found = under(slow, OPENED + WAYS[way], tmp_path / "film")
    assert found.requests == 1 and found.bytes == 4096


@needs_compiler
def test_a_request_waits_and_other_files_do_not(tmp_path: Path) -> None:
    """A lower bound on time, which no busy machine can break; files elsewhere cost no request."""
    for name in ("slow", "slower", "fast"):
        (tmp_path / name).write_bytes(bytes(1_000_000))
    code = OPENED + "for at in range(10): os.pread(fd, 1000, at * 7 % 10 * 81920 + 512)"
    with slow_file_system(SlowSettings(latency_ms=20), [tmp_path / "slow"]) as slow:
        started = time.perf_counter()
        assert under(slow, code, tmp_path / "slow") == Counts(requests=10, bytes=40_960, refused_maps=0)
        assert time.perf_counter() - started >= 0.2
        for other in ("slower", "fast"):  # "slower" begins with the same letters
            assert under(slow, code, tmp_path / other).requests == 10


@needs_compiler
def test_bandwidth_is_shared_by_processes(tmp_path: Path) -> None:
    (tmp_path / "film").write_bytes(bytes(1_000_000))
    code = OPENED + "child = os.fork()\nos.pread(fd, 1_000_000, 0)\nchild and os.wait()"
    with slow_file_system(SlowSettings(bandwidth_mb=5), [tmp_path]) as slow:
        started = time.perf_counter()
        assert under(slow, code, tmp_path / "film").bytes == 2_000_000  # whole, twice: no cache between processes
        assert time.perf_counter() - started >= 0.4


@needs_compiler
def test_reading_in_order_fetches_ahead(tmp_path: Path) -> None:
    """10 KiB at a time, as tarfile does it: the first in whole pages, then 40 KiB ahead, then the limit of 64; all anew
    for a second pass, and none at the end of the file."""
    (tmp_path / "film").write_bytes(bytes(300 << 10))
    code = OPENED + "for _ in range(2):\n    while os.read(fd, 10 << 10): pass\n    os.lseek(fd, 0, 0)"
    with slow_file_system(SlowSettings(latency_ms=1, readahead_kb=64), [tmp_path]) as slow:
        found = under(slow, code, tmp_path / "film")
    windows = [12, 40, 64, 64, 64, 300 - 244]
    assert found == Counts(requests=2 * len(windows), bytes=2 * sum(windows) << 10, refused_maps=0)


@needs_compiler
def test_small_reads_within_a_page_are_one_request(tmp_path: Path) -> None:
    """As pyarrow reads the columns of a row group."""
    (tmp_path / "film").write_bytes(bytes(300 << 10))
    code = OPENED + "for at in range(7000, 8000, 100): os.pread(fd, 100, at)"
    with slow_file_system(SlowSettings(latency_ms=1), [tmp_path]) as slow:
        assert under(slow, code, tmp_path / "film") == Counts(requests=1, bytes=4096, refused_maps=0)


@needs_compiler
def test_mapping_a_slow_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "film").write_bytes(bytes(10_000))
    code = (
        OPENED + "import errno, mmap\ntry: mmap.mmap(fd, 10_000, prot=mmap.PROT_READ)\n"
        "except OSError as error: assert error.errno == errno.ENODEV\nelse: raise SystemExit('mapped')\n"
        "mmap.mmap(-1, 4096)"
    )
    with slow_file_system(SlowSettings(latency_ms=1), [tmp_path]) as slow:
        assert under(slow, code, tmp_path / "film").refused_maps == 1


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="C compiler"), slow_file_system(SlowSettings(latency_ms=1), [tmp_path]):
        pass


# --- peers ---


@pytest.mark.parametrize("name", LOADERS)
def test_peers_that_are_installed_give_batches(name: str, shards_dir: Path, tmp_path: Path) -> None:
    if (why := missing(name)) is not None:
        pytest.skip(f"{name}: {why}")
    data = tmp_path / "data"
    data.mkdir()
    for action in (["write"] if name in WRITERS else []) + ["measure"]:
        task = Task(action=action, loader=name, shards=str(shards_dir), data=str(data), batch_size=16, seconds=0.1)
        done = run_module("bench.measure", json.dumps(asdict(task)), tmp_path / "result")
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result").read_text())["images"] % 16 == 0


def test_libc_is_glibc() -> None:
    """`slow.c` looks into a stream's buffer as glibc has it."""
    assert hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
