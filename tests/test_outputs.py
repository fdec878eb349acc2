"""Outputs that cannot be: one line and exit code 2, before the work where that is long. By real mounts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, assert_refused, run_module

from ingest.config import IngestConfig, SourceConfig
from ingest.run import ingest
from shards import verify
from shards.atomic import check_writable, write_atomic, write_json
from shards.cli import check_own, main_guard, parse, say
from shards.errors import InputError
from shards.export import ExportConfig
from shards.progress import progress
from shards.verify import VerifyConfig
from train.config import TrainConfig

_MOUNTS = """
mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder that is read-only inside `mounted`, and one that holds 1 MB there."""
    root = tmp_path_factory.mktemp("mounts")
    for name in ("ro", "small"):
        (root / name).mkdir()
    if shutil.which("unshare") is None or mounted((root / "ro", root / "small"), "--version").returncode:
        pytest.skip("no mount namespaces here (unshare -Urm)")
    return root / "ro", root / "small"


def mounted(places: tuple[Path, Path], *python: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the two folders mounted: root ignores permission bits, not mounts."""
    command = ["unshare", "-Urm", "sh", "-c", _MOUNTS, *places, sys.executable, *python]
    return subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("command", "out", "word"),
    [
        ("shards preview SET", "ro/p.png", "Read-only"),
        ("shards preview SET --count 96", "small/nodir/p.png", "no folder"),
        ("shards export SET --where row>=0", "ro/x", "Read-only"),
        ("shards export SET --where row>=0", "small/x", "1 MB free"),
        ("shards export SET --where row>=0 --to files", "small/x", "1 MB free"),
        ("ingest.phantom --samples 3", "ro", "Read-only"),
        ("ingest.phantom --samples 3", "small", "MB free"),
        ("bench.demo", "ro/x", "Read-only"),
    ],
)
def test_a_folder_that_takes_nothing(
    places: tuple[Path, Path], shards_dir: Path, command: str, out: str, word: str
) -> None:
    root = places[0].parent
    words = [str(shards_dir) if each == "SET" else each.replace(">=", " >= ") for each in command.split()]
    assert_refused(mounted(places, "-m", *words, "--out", root / out), word, str(root / out.split("/")[0]))
    assert sorted(root.iterdir()) == [places[0], places[1]] and not any(map(any, map(Path.iterdir, places)))


def test_a_disk_that_fills_during_the_work(places: tuple[Path, Path], shards_dir: Path) -> None:
    """What no check before can see: somebody else's file takes the room."""
    script = f"""
import shutil, sys
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9)
from shards.__main__ import main
main(["export", {str(shards_dir)!r}, "--where", "row >= 0", "--out", {str(places[1] / "x")!r}])
"""
    assert_refused(mounted(places, "-c", script), "No space left on device", str(places[1]))


def test_the_bench_does_not_measure_for_nothing(shards_dir: Path, tmp_path: Path) -> None:
    """`--json` into no folder is refused before the first batch; the refused path is named, not a temporary one."""
    for path in (tmp_path / "nodir" / "b.json", tmp_path):
        done = run_module("bench.loader", "--shards", shards_dir, "--json", path)
        assert_refused(done, f"cannot read or write {path} (")
        assert "round 1" not in done.stdout


def test_the_demo_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_refused(run_module("bench.demo", "--out", tmp_path / "file"), "Not a directory")


def test_a_full_stdout(shards_dir: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "shards", "inspect", str(shards_dir)],
            cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "shards: cannot read or write (No space left on device); make room, or give another path"
    ]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(shards_dir: Path, closed: str) -> None:
    """No traceback, and no file of ours takes the number of a stream."""
    command = f"{sys.executable} -m shards verify {shards_dir} {closed}"
    assert subprocess.run(["sh", "-c", command], cwd=REPOSITORY, stdin=subprocess.DEVNULL).returncode == 0
    done = subprocess.run(["sh", "-c", f"{command} --frob"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_lists_given_twice_are_refused() -> None:
    for flags in (["--h5", "a", "b", "--h5", "c"], ["--csv=a", "--csv=b"]):
        with pytest.raises(InputError, match=f"{flags[0][:4].rstrip('=')}.* is given 2 times"):
            parse(IngestConfig, ["--to-shards", "x", *flags], prog="ingest")
    assert parse(IngestConfig, ["--to-shards", "x", "--seed", "1", "--seed", "2"], prog="ingest").seed == 2


def test_a_path_that_a_shell_left_empty_is_refused() -> None:
    """It would be the folder that one is in: a run's or a whole set's files there."""
    good = ["--shards", "s", "--out", "o"]
    for flags in (["--data.stage-dir", ""], ["--data.stage-dir="], ["--out", ""], ["--data.more-shards", "a", ""]):
        with pytest.raises(InputError, match=f"^{flags[0].rstrip('=')} is empty"):
            parse(TrainConfig, [*good, *flags], prog="train.main")
    found = parse(TrainConfig, [*good, "--data.stage-dir", ".", "--data.exclude", "a="], prog="train.main")
    assert (found.data.stage_dir, found.data.exclude) == (Path(), Path("a="))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--quality", "0"], "--quality 0 is not in 1..100"),
        (["--seed", "q"], "--seed takes a whole number, not 'q'"),
        (["--val-fraction", "q"], "--val-fraction takes a number, not 'q'"),
        (["--value-range", "1"], "--value-range takes {FLOAT FLOAT}, not '1'"),
        (["--workers", "two"], "--workers takes a whole number, not 'two'"),
        (["--seed"], "--seed lacks its value"),
        (["--frob"], "unknown: --frob"),
        (
            ["--label-column", "c", "--val-frac", "0.1"],
            "unknown: --label-column c --val-frac 0.1; "
            "perhaps --label-columns or --label-list-column or --val-fraction",
        ),
    ],
)
def test_a_wrong_flag_is_said_in_few_words(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(IngestConfig, ["--to-shards", "x", *flags], prog="ingest")
    assert capsys.readouterr().err == f"ingest: {said} (see --help)\n"


@pytest.mark.parametrize(
    ("flags", "said"), [([], "missing: --to-shards"), (["--sed", "3"], "missing: --to-shards; unknown: --sed 3")]
)
def test_a_missing_flag_is_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(IngestConfig, flags, prog="ingest")
    assert capsys.readouterr().err == f"ingest: {said} (see --help)\n"


def test_a_bug_keeps_its_traceback() -> None:
    """Errors of the system that name no path, and say nothing of a disk, are not the user's."""
    for error in (OSError("no errno"), OSError(2, "No such file or directory"), ConnectionResetError(104, "reset")):
        with pytest.raises(OSError) as found, main_guard("p"):
            raise error
        assert found.value is error


def test_a_link_that_leads_to_itself_is_a_line(tmp_path: Path, shards_dir: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    done = run_module("shards", "export", shards_dir, "--where", "Cardiomegaly == 1", "--out", loop)
    assert_refused(done, "link", "give another path")


@pytest.mark.parametrize("command", ["stats --json {}/train-000000.tar", "preview --out {}/p.png"])
def test_a_result_into_the_set_itself(shards_dir: Path, command: str) -> None:
    name, *flags = command.format(shards_dir).split()
    before = {path.name: path.stat().st_mtime_ns for path in shards_dir.iterdir()}
    assert_refused(run_module("shards", name, shards_dir, *flags), flags[0], "lies in the data set")
    assert {path.name: path.stat().st_mtime_ns for path in shards_dir.iterdir()} == before


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/no-such-device")):  # as root a rename would take /dev/null away
        for write in (check_writable, lambda path: write_atomic(path, b"x")):
            with pytest.raises(OSError, match="it is a device or a pipe"):
                write(path)
    assert (tmp_path / "pipe").is_fifo()


def test_a_log_has_a_line_a_minute(
    shards_dir: Path,
    source: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where stderr is no terminal; an ingest says both its phases."""
    now = iter(range(0, 10**6, 15))
    monkeypatch.setattr("shards.progress.time", SimpleNamespace(monotonic=lambda: next(now)))
    with progress("embed", 1000, "film") as advance:
        for _ in range(9):
            advance(100)
    said = ["embed: 400 of 1,000 films, 7 a second, 1:30 left", "embed: 800 of 1,000 films, 7 a second, 0:30 left"]
    assert capsys.readouterr().err.splitlines() == said
    monkeypatch.setattr("shards.progress.LINE_S", 0)
    with monkeypatch.context() as patched:  # a log on a full disk, which has cost nobody an ingest of hours
        patched.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False, write=lambda _: os.close(-1)))
        with progress("embed", 2, "film") as advance:
            advance(1)
    verify.run(VerifyConfig(root=shards_dir))
    assert capsys.readouterr().err.startswith("verify: ")
    ingest(IngestConfig(to_shards=tmp_path / "set", h5=source[:1], csv=source[1:]))
    assert {line.split(":")[0] for line in capsys.readouterr().err.splitlines()} == {"encode", "assemble"}


def test_nothing_said_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Names out of a file from elsewhere may hold anything."""
    say("a\x1b[2Jb\rc\x9bd\té\n")
    with pytest.raises(SystemExit), main_guard("x"):
        raise InputError("no\x1b]0;label\x07")
    assert capsys.readouterr() == ("a\\x1b[2Jb\\x0dc\\x9bd\té\n\n", "x: no\\x1b]0;label\\x07\n")


def test_json_keeps_letters_and_whatever_a_file_may_be_called(tmp_path: Path) -> None:
    content = {"Herzgröße": ["心", Path(os.fsdecode(b"films-\xe4.h5")).name, "\\udce4", None, 1.5]}
    write_json(tmp_path / "a.json", content)
    written = (tmp_path / "a.json").read_bytes()
    assert json.loads(written) == content
    assert "Herzgröße" in written.decode() and "心" in written.decode() and written.count(b"\n") == 9


def test_json_is_not_written_over_what_is_no_such_result(tmp_path: Path) -> None:
    """A slip with --json would cost an evaluation, say, that took an hour."""
    path = tmp_path / "x.json"
    check_own(path, {"runs"}, "--json")
    path.touch()
    check_own(path, {"runs"}, "--json")  # as mktemp leaves it
    write_json(path, {"runs": [], "figures": {}})
    check_own(path, {"runs"}, "--json")
    for content in (b'{"mean_auroc": 0.5}', b'["runs"]', b"{", b"\xff", b"[" * 10**5):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"^--json {path} is there and is no such result"):
            check_own(path, {"runs"}, "--json")


def test_every_command_asks_before_it_writes_json(shards_dir: Path, tmp_path: Path) -> None:
    (path := tmp_path / "x.json").write_text('{"mean_auroc": 0.5}')
    (other := tmp_path / "other.json").write_text('{"bench": "x"}')
    for *command, flag in (
        ("shards", "stats", shards_dir, "--json"),
        ("bench.scale", "--json"),
        ("bench.report", other, "--bundle"),
        ("train.compare", tmp_path, "--json"),
    ):
        assert_refused(run_module(*command, flag, path), f"{flag} {path} is there and is no such result")
    assert path.read_text() == '{"mean_auroc": 0.5}'
    assert_refused(run_module("bench.report", path, "--bundle", other), "other.json is there and is no such result")


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", folder=True)
    check_writable(tmp_path / "a" / "x.json")
    write_atomic(tmp_path / "there", b"1")
    check_writable(tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == b"1"
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "b", "there"]
    with pytest.raises(OSError):
        check_writable(tmp_path / "there", folder=True)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-9, float("nan"), float("inf")])
def test_sizes_that_no_shard_can_have(value: float) -> None:
    for make in (
        lambda: IngestConfig(to_shards=Path("o"), shard_mb=value),
        lambda: ExportConfig(root=Path("r"), where="row >= 0", out=Path("o"), shard_mb=value),
    ):
        with pytest.raises(InputError, match=f"--shard-mb {value}"):
            make()


@pytest.mark.parametrize("low_high", [(1.0, 1.0), (float("nan"), 1.0), (0.0, float("inf")), (float("-inf"), 0.0)])
def test_value_ranges_that_are_none(low_high: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=r"--value-range .* is not a range"):
        SourceConfig(h5=(Path("a"),), csv=(Path("b"),), value_range=low_high).check()
