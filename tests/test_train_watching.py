"""Watching a run: what is recorded, shown, drawn and compared; and that no watcher can end it or give anything away."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY

from shards.atomic import write_json
from shards.cli import say
from shards.errors import InputError
from shards.progress import clock
from train.commandline import preset, to_fields
from train.compare import asked, compare, table
from train.compare import draw as draw_all
from train.compare import main as lay_out
from train.config import TrainConfig
from train.curves import draw_loss, new_figure, trend
from train.curves import main as draw
from train.metrics import MetricsLog, ProgressDisplay
from train.ranks import StopRequest
from train.rows import read_rows, trim
from train.rundir import RunFolder, versions
from train.tracking import WatchConfig, check_installed, harmless, lasting_output

CANARY = "CANARY4711"
ALL_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


def config(out: Path, **more) -> TrainConfig:
    """A run's settings whose every path and query holds the canary."""
    base = replace(preset("tiny"), shards=Path(f"/data/{CANARY}"), out=out, steps=100, **more)
    data = replace(base.data, where=f"patient == '{CANARY}'", exclude=Path(f"{CANARY}.txt"))
    return replace(base, h5=Path(f"{CANARY}.h5"), vision_weights=f"/w/{CANARY}", data=data)


def row(step: int, **more) -> dict:
    """A row as the loop writes it."""
    digest = f"{step * 7919:016x}"
    return {
        **{"step": step, "loss": 4.0 - step / 100, "lr": 1e-3, "images_per_s": 640.0},
        **{"step_ms": 100.0, "loader_wait_ms": 2.5, "order_digest": digest, **more},
    }


def write_run(folder: Path, rows: list[dict], **settings) -> Path:
    """A run's folder as train.main leaves it."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", to_fields(replace(config(folder), **settings)))
    (folder / "versions.json").write_text(json.dumps({"torch": "2.14.1", "kernel": folder.name}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def log_rows(out: Path, rows: list[dict], *, done: int = 0, **more) -> None:
    """Write rows through MetricsLog."""
    out.mkdir(exist_ok=True)
    log = MetricsLog(RunFolder(root=out), config=config(out, **more), done=done)
    for before, each in pairwise([{"step": done}, *rows]):
        for _ in range(before["step"], each["step"]):
            log.advance()
        log.write(each)
    log.close()


def test_rows_go_to_jsonl_and_tensorboard_and_a_resumed_run_writes_them_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_rows(tmp_path, [row(10), row(20, val_loss=3.0), row(30)])
    log_rows(tmp_path, [row(30, loss=9.0)], done=20)
    assert [(found["step"], found["loss"]) for found in read_rows(tmp_path / "metrics.jsonl")] == [
        (10, 3.9),
        (20, 3.8),
        (30, 9.0),
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [10, 20, 30]
    assert board.Scalars("loss")[-1].value == 9.0
    assert [event.step for event in board.Scalars("val_loss")] == [20]


def test_a_number_that_is_none_is_null_and_every_reader_bears_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    log_rows(run, [row(10, loss=float("nan"), grad_norm=float("inf")), row(20)])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert first["loss"] is None and first["grad_norm"] is None and len(lines) == 2
    assert compare([run])["figures"]["run"]["loss"] == 3.8
    draw([str(run)])
    assert (run / "curves.png").stat().st_size > 5000


def test_curves_of_a_run_that_is_still_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [])
    log = MetricsLog(RunFolder(root=run), config=config(run), done=0)
    for step in (10, 20):
        log.write(row(step))
    draw([str(run), "--out", str(tmp_path / "now.png")])
    log.close()
    assert "up to step 20" in capsys.readouterr().out
    assert (tmp_path / "now.png").read_bytes().startswith(b"\x89PNG") and not (run / "curves.png").exists()


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(10)) + "\n" + json.dumps(row(20)) + "\n" + json.dumps(row(30))[:25])
    assert [found["step"] for found in read_rows(path)] == [10, 20]
    trim(path, 10)
    assert path.read_text() == json.dumps(row(10)) + "\n"


def test_a_full_disk_ends_no_run_and_loses_no_row(tmp_path: Path) -> None:
    """On a file system of 256 KiB: rows that do not fit are written once there is room."""
    script = f"""
import os, sys
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
from pathlib import Path
from test_train_watching import config, row
from train.metrics import MetricsLog
from train.rundir import RunFolder
run = Path({str(tmp_path / "disk")!r})
log = MetricsLog(RunFolder(root=run), config=config(run), done=0)
log.write(row(1))
hog = os.open(run / "hog", os.O_CREAT | os.O_WRONLY)
try:
    while os.write(hog, bytes(512)):
        pass
except OSError:
    pass
for step in range(2, 40):
    log.write(row(step, filler="x" * 500))
os.truncate(run / "hog", 0)
log.write(row(40))
log.close()
"""
    (tmp_path / "disk").mkdir()
    mount = f'mount -t tmpfs -o size=256k tmpfs {tmp_path}/disk && "$0" -c "$1" && cat {tmp_path}/disk/metrics.jsonl'
    inside = ["unshare", "-Urm", "sh", "-c", mount, sys.executable, script]
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here, so no small file system to fill")
    done = subprocess.run(inside, capture_output=True, text=True, cwd=REPOSITORY, timeout=600)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["step"] for line in done.stdout.splitlines() if line.startswith("{")]
    assert found == list(range(1, 41))
    assert done.stderr.count("cannot write metrics.jsonl (No space left on device)") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_wandb_is_told_numbers_and_no_path_query_host_or_command_line(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    script = (
        "import sys; from pathlib import Path; from test_train_watching import *; "
        f"log_rows(Path({str(run)!r}), [row(10), row(20, val_loss=2.25)], "
        f"watch=WatchConfig(wandb='offline', project='films')); print('{CANARY}')"
    )
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    command = [sys.executable, "-c", script, f"--token={CANARY}"]
    # No network: the real package, in a namespace without any.
    alone = (
        ["unshare", "-Urn"] if subprocess.run(["unshare", "-Urn", "true"], capture_output=True).returncode == 0 else []
    )
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [*alone, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    (record,) = run.glob("wandb/offline-run-*/run-*.wandb")
    told = record.read_bytes()
    for known in (b"val_loss", b"2.25", b"films", b"batch_size", b'"adamw"'):
        assert known in told, known
    sent = [path for path in run.glob("wandb/offline-run-*/**/*") if path.is_file() and "logs" not in path.parts]
    assert record in sent
    for path in sent:
        for secret in (CANARY, str(tmp_path), os.uname().nodename + "\n", "patient"):
            assert secret.encode() not in path.read_bytes(), (path, secret)
    assert (run / "wandb-id").read_text() in record.name


def test_a_run_goes_on_without_a_watcher_that_fails(tmp_path: Path, capsys, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError(f"no login in {CANARY}")))
    log_rows(tmp_path / "run", [row(10), row(20)], watch=WatchConfig(wandb="online"))
    told = capsys.readouterr().err
    assert told.count("warning: W&B failed (RuntimeError)") == 1 and CANARY not in told
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == 2


def test_wandb_that_is_asked_for_and_not_installed_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_installed(WatchConfig())
    with pytest.raises(InputError, match=r"--watch.wandb offline needs .*wandb"):
        check_installed(WatchConfig(wandb="offline"))


def test_what_is_harmless_in_a_config(tmp_path: Path) -> None:
    told = harmless(config(tmp_path))
    assert CANARY not in json.dumps(told)
    assert told["batch_size"] == 64 and told["preset"] == "tiny" and told["optim"]["optimizer"] == "adamw"
    assert told["model"]["tower"] == "tiny" and told["data"]["mean"] and "shards" not in told


def test_lines_without_a_terminal_come_every_so_often_and_at_validations(tmp_path: Path, capsys) -> None:
    rows = [row(step, **({"val_loss": 3.21} if step == 35 else {})) for step in range(5, 101, 5)]
    log_rows(tmp_path, rows, watch=WatchConfig(line_every=25))
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.match(r"step (\d+)/100", line)[1]) for line in lines] == [5, 30, 35, 60, 85, 100]
    assert "loss 3.9500  640 films/s  2.5 % wait" in lines[0] and lines[0].endswith("0:00 left")
    assert "validation loss 3.2100" in lines[2] and "0:00 left" in lines[-1]


def test_the_time_left_forgets_what_only_the_first_steps_took(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 and 2 compile for 300 and 100 s, the others take a second each; a validation of 9 s counts."""
    seconds = iter([0.0, 300.0, 400.0, *(400.0 + step for step in range(1, 8)), 416.0])
    monkeypatch.setattr("train.metrics.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    display = ProgressDisplay(steps=100, done=0, line_every=1)
    monkeypatch.setattr(display._bar, "update", lambda: None)  # it looks at the clock as well
    display.advance()
    display.show(row(1))
    for _ in range(8):
        display.advance()
    display.show(row(9))
    first, ninth = capsys.readouterr().out.splitlines()
    assert "left" not in first
    assert ninth.endswith(f"{clock((416 - 402) / 5 * 91)} left")


@pytest.mark.parametrize("size", [(40, 80), (0, 0), (0, 80)])
def test_a_terminal_gets_a_bar(size: tuple[int, int]) -> None:
    """On the narrowest that are common all of it is seen; one that a container makes says that it has no size. What is
    said meanwhile has a line of its own."""
    script = """
from test_train_watching import *
display = ProgressDisplay(steps=100, done=0, line_every=1)
for step in range(1, 101):
    display.advance()
    display.show(row(step, val_loss=3.25))
    if step == 50:
        sys.stderr.write("warning: a disk is full\\n")
        print("in pieces", file=sys.stderr)
        kept = sys.stderr
        kept.write("begun, ")
display.close()
kept.write("ended\\n")
sys.stderr.write("the end\\n")
kept.write("the last ")
sys.stderr.write("word")
"""
    primary, secondary = pty.openpty()
    termios.tcsetwinsize(secondary, size)
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=secondary)
    os.close(secondary)
    shown = b""
    with contextlib.suppress(OSError):  # what Linux says when the other end is closed
        while piece := os.read(primary, 1 << 16):
            shown += piece
    os.close(primary)
    printed, _ = process.communicate(timeout=600)
    shown = shown.decode()
    assert process.returncode == 0 and printed == b"", shown
    whole = r"\rstep 100/100 \|\S+\s*\| loss 3\.0000  640 films/s  2\.5 % wait  0:00 left  val 3\.2500"
    assert re.search(whole, shown), shown
    assert re.search(r"\r +\rwarning: a disk is full\r\n", shown), "behind the bar"
    assert re.search(r"warning: a disk is full\r\n\rstep 50/100 \|", shown), "no bar after it"
    assert re.search(r"\r +\rin pieces\r\n\rstep 50/100 \|", shown), "the bar is drawn over it"
    assert shown.endswith("\r\nbegun, ended\r\nthe end\r\nthe last word") and "begun" not in shown[:-43]
    assert max(map(len, re.split("[\r\n]", shown))) <= (size[1] or 100)


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 125, 3723)] == ["0:00", "1:00", "2:05", "1:02:03"]


def test_runs_side_by_side(tmp_path: Path) -> None:
    optim = replace(preset("tiny").optim, lr=0.25)
    rows = [row(step, images_per_s=float(step)) for step in (10, 20, 30)]
    first = write_run(tmp_path / "a/run", [*rows, row(40, val_loss=2.5, images_per_s=40.0), row(50, val_loss=2.75)])
    second = write_run(tmp_path / "b/run", rows[:2], optim=optim, out=Path("/elsewhere"))
    (first / "evaluation-test.json").write_text('{"mean_auroc": 0.8125}')
    record = compare([first, second])
    assert record["runs"] == ["a/run", "b/run"]
    assert record["differences"] == {"optim.lr": {"a/run": 3e-3, "b/run": 0.25}}
    figures = record["figures"]["a/run"]
    assert (figures["best_val_loss"], figures["best_step"], figures["auroc"]) == (2.5, 40, {asked({}): 0.8125})
    assert figures["images_per_s"] == 35.0 and figures["wait_share"] == pytest.approx(0.025)
    assert record["samples"] == {"step": 20, "same": True}
    text = "\n".join(table(record))
    assert "0.8125" not in text and "0.812" in text and "50 of 100" in text and "the same samples up to step 20" in text


def test_only_evaluations_of_the_same_films_and_prompts_share_a_line(tmp_path: Path) -> None:
    same = {"split": "test", "shards": "aaaaaaaa11", "where": None, "excluded": None, "uncertain": "ignore"}
    same |= {"prompts": {"style": "reports"}, "checkpoints": [{"step": 1}], "resamples": 1000, "seed": 0}
    others = [{"shards": "bbbbbbbb22"}, {"where": "View == 1"}, {"excluded": "cccccccc33"}, {"uncertain": "negative"}]
    others += [{"prompts": {"style": "chexzero"}}, {"checkpoints": [{"step": 1}, {"step": 2}]}, {"split": "val"}]
    runs = [write_run(tmp_path / name, [row(10)]) for name in "ab"]
    (runs[0] / "evaluation-test.json").write_text(json.dumps({**same, "mean_auroc": 0.75}))
    for number, other in enumerate([{"resamples": 0, "seed": 7}, *others]):
        path = runs[1] / f"evaluation-test-{number}.json"
        path.write_text(json.dumps({**same, **other, "mean_auroc": 0.25 + number / 100}))
    lines = [line.rsplit(maxsplit=2) for line in table(compare(runs)) if line.startswith("AUROC")]
    assert [figures for _, *figures in lines] == [["0.750", "0.250"], *(["-", f"0.{26 + n}0"] for n in range(7))]
    assert len({title.strip() for title, *_ in lines}) == 8
    assert lines[0][0].startswith("AUROC test (shards aaaaaaaa, prompts ")
    assert "bbbbbbbb" in lines[1][0] and "where View == 1" in lines[2][0] and "of 2" in lines[6][0]


def test_what_was_said_of_other_films_is_no_figure_of_these(tmp_path: Path) -> None:
    """A run that --force took to other films after step 20, and one that it did not."""
    rows = [row(step, val_loss=step / 10, **({"films_since": 20} if step > 20 else {})) for step in (10, 20, 30, 40)]
    runs = [write_run(tmp_path / name, found) for name, found in (("a", rows), ("b", rows[:2]))]
    figures = compare(runs)["figures"]
    assert [figures[name]["best_val_loss"] for name in "ab"] == [3.0, 1.0]
    assert figures["a"]["loss"] == (rows[2]["loss"] + rows[3]["loss"]) / 2
    assert any(line.startswith("steps done") and "20 of 100" in line for line in table(compare(runs)))
    assert any("40 of 100, the first 20 on other films" in line for line in table(compare(runs)))
    for found, best in ((rows, "3.000 at step 30"), (rows[:2], "1.000 at step 10")):
        axes = new_figure(4, 4).subplots()
        draw_loss(axes, found)
        assert axes.get_title() == f"InfoNCE loss; best validation {best}"
        lines = [text.get_text() for text in axes.get_legend().get_texts()]
        assert ("other films from here" in lines) is (found is rows)


def test_compare_says_when_samples_differ_and_draws(tmp_path: Path, capsys) -> None:
    first = write_run(tmp_path / "a", [row(10), row(20, val_loss=1.0)])
    second = write_run(tmp_path / "b", [row(10), row(20, order_digest="f" * 16)], seed=3)
    lay_out([str(first), str(second), "--png", str(tmp_path / "c.png"), "--json", str(tmp_path / "c.json")])
    told = capsys.readouterr().out
    assert re.search(r"^seed +0 +3$", told, re.M) and "other samples up to step 20" in told
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "c.json").read_text())["samples"] == {"step": 20, "same": False}


def test_places_of_other_shards_are_other_samples(tmp_path: Path) -> None:
    """The order digest is the same for any two sets of one shape."""
    runs = [write_run(tmp_path / name, [row(10)]) for name in "abc"]
    for run, shards in zip(runs, ("1f", "2f", "1f"), strict=True):
        (run / "versions.json").write_text(json.dumps({"shards": shards}))
    found = compare(runs[:2])
    assert found["samples"] == {"step": 10, "same": False}
    assert found["differences"] == {"version of shards": {"a": "1f", "b": "2f"}}
    assert compare([runs[0], runs[2]])["samples"] == {"step": 10, "same": True}


def test_runs_whose_files_are_broken_are_compared_all_the_same(tmp_path: Path) -> None:
    odd = {"val_loss": "low", "step_ms": [1], "loader_wait_ms": None, "images_per_s": "x", "order_digest": [1]}
    runs = [
        write_run(tmp_path / name, [row(10, val_loss=2.0), row(20, **more)]) for name, more in (("a", {}), ("b", odd))
    ]
    (runs[1] / "evaluation-test.json").write_text('{"mean_auroc": NaN}')
    found = compare(runs)["figures"]["b"]
    assert (found["best_val_loss"], found["step"], found["auroc"]) == (2.0, 20, {})
    draw_all(runs, tmp_path / "c.png")
    (runs[1] / "versions.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"versions\.json is not JSON"):
        compare(runs)


def test_mistakes_are_one_line(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "run", [])
    with pytest.raises(SystemExit) as stop:
        draw([str(run)])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "no rows yet" in told and told.count("\n") == 1
    (run / "best.pt").touch()
    (tmp_path / "manifest.json").touch()  # that of a data set
    for main, arguments in (
        (lay_out, ("--json", "../ingest.json")),
        (lay_out, ("--png", "best.pt")),
        (lay_out, ("--json", "config.json")),
        (draw, ("--out", "best.pt")),
    ):
        with pytest.raises(SystemExit) as stop:
            (run / "metrics.jsonl").write_text(json.dumps(row(10)) + "\n")
            main([str(run), arguments[0], str(run / arguments[1])])
        told = capsys.readouterr().err
        assert stop.value.code == 2 and ("does not end in .png" in told or "would write over" in told), told
    assert not (run / "best.pt").read_bytes() and read_rows(run / "metrics.jsonl")
    with pytest.raises(InputError, match=r"config.json .*give folders of runs"):
        compare([tmp_path])
    with pytest.raises(InputError, match="named twice"):
        compare([run, run])
    with pytest.raises(InputError, match="line-every 0"):
        WatchConfig(line_every=0)


def test_a_trend_keeps_the_mean_and_the_steps() -> None:
    points = [(float(step), float(step % 2)) for step in range(1000)]
    smooth = trend(points)
    assert [step for step, _ in smooth] == [step for step, _ in points]
    assert all(abs(value - 0.5) < 0.1 for _, value in smooth)


def test_versions_name_the_commit_and_nobody() -> None:
    found = versions()
    assert {"python", "torch", "open_clip_torch", "kernel", "cpus"} <= found.keys()
    if (REPOSITORY / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}", found["commit"])
    assert os.uname().nodename not in found.values()


def test_a_reader_that_goes_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `| head -1` does, and a full disk under a log."""
    reader, writer = os.pipe()
    os.close(reader)
    for broken in (writer, os.open("/dev/full", os.O_WRONLY)):
        with open(broken, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            with lasting_output():
                say("one")
                say("two")
                assert sys.stdout.fileno() == broken and not sys.stdout.isatty()
            assert sys.stdout is stream
            stream.write("three")  # nor does the interpreter's last flush
            stream.flush()


def hear(number: signal.Signals) -> StopRequest:
    """This process after it has been sent a signal."""
    with StopRequest().listening() as stop:
        signal.raise_signal(number)
        return stop


@pytest.mark.parametrize("number", ALL_SIGNALS)
def test_signals_ask_for_an_end(number: signal.Signals) -> None:
    assert hear(number).asked
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_at_once_but_not_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment, outcome in (
        ({}, pytest.raises(KeyboardInterrupt)),
        ({"TORCHELASTIC_RUN_ID": "x"}, contextlib.nullcontext()),
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with outcome, StopRequest().listening() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.asked
            signal.raise_signal(signal.SIGINT)


def test_what_is_ignored_stays_ignored() -> None:
    """SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not hear(signal.SIGHUP).asked
    finally:
        signal.signal(signal.SIGHUP, before)
