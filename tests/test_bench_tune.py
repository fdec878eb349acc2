"""The loader's tuner, and `--loader-config`, which takes what it writes."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import tune
from bench.search import Choice, make_space
from bench.shapes import read_results
from bench.storage import Counts, SlowSettings
from bench.tables import tune_tables
from bench.tune import TuneConfig, run_tune, toml_of
from pipeline.batch import World
from pipeline.config import DataConfig, LoaderConfig, available_cpus
from pipeline.loader import build_loader
from shards.errors import InputError
from train.commandline import SETTINGS, parse_config, to_toml
from train.config import loader_config
from train.fingerprint import READING

PATHS = ("--shards", "a", "--out", "b")


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_a_loader_config_replaces_preset_and_flags_replace_it(tmp_path: Path) -> None:
    values = {"threads": 3, "memory_mb": 512, "ahead": 4, "own_jpeg": False}
    path = write(tmp_path / "loader.toml", to_toml("cpu", values, ["a comment\nof two lines"]))
    config = parse_config("x", [*PATHS, "--loader-config", str(path), "--data.threads", "5"])
    assert config.backend == "cpu"
    loader = loader_config(config, split="train", mode="train")
    assert (loader.threads, loader.memory_mb, loader.ahead, loader.own_jpeg) == (5, 512, 4, False)
    assert parse_config("x", [*PATHS, "--loader-config", str(path), "--backend", "dali"]).backend == "dali"


def test_no_setting_changes_a_sample() -> None:
    """And all are settings of `pipeline.config.DataConfig`: a run of another loader.toml resumes."""
    assert set(SETTINGS) <= set(READING) & set(DataConfig.__slots__)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("seed = 3\n", "'seed'"),
        ("[data]\nflip = 0.0\n", "data.flip"),
        ("[data]\nstreams = 6\n", "data.streams"),
        ("[data]\nthreads = 0\n", "data.threads is 0"),
        ("[data]\nthreads = true\n", "data.threads is True"),
        ("[data]\nown_jpeg = 1\n", "data.own_jpeg is 1"),
        ('backend = "hdf5"\n', "unknown backend 'hdf5'"),
        ("backend = [1]\n", r"unknown backend \[1\]"),
        ("data = 3\n", "data is 3"),
        ("threads =\n", "not TOML"),
    ],
)
def test_what_does_not_belong_is_refused_by_name(content: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "loader.toml", content)
    with pytest.raises(InputError, match=words):
        parse_config("x", [*PATHS, "--loader-config", str(path)])


def test_a_loader_config_that_is_not_there() -> None:
    with pytest.raises(InputError, match="No such file"):
        parse_config("x", [*PATHS, "--loader-config", "/nosuch.toml"])


def test_settings_that_are_tuned_change_no_pixel(shards_dir: Path) -> None:
    """And the number of reading threads is what was asked for."""
    plain = LoaderConfig(shards=shards_dir, batch_size=8, backend="cpu")
    other = {"threads": 3, "memory_mb": 64, "read_threads": 7, "ahead": 4, "own_jpeg": False}
    assert set(other) == set(SETTINGS)
    with build_loader(plain, World()) as one, build_loader(dataclasses.replace(plain, **other), World()) as two:
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("shardclip-read")]
        assert len(names) == plain.read_threads + 7
        for _ in range(12):
            first, second = next(one), next(two)
            assert torch.equal(first.samples, second.samples) and torch.equal(first.images, second.images)


def machine(gains: dict[str, dict], noise: float) -> Callable[..., Callable[[Choice], float]]:
    """A stand-in for measuring: each choice is worth a factor, and every measurement is off by chance."""
    rng = np.random.default_rng(0)

    def rate(choice: Choice) -> float:
        worth = 1000.0
        for name, factors in gains.items():
            worth *= factors.get(choice[name], 1.0)
        return worth * float(rng.lognormal(0, noise))

    return lambda *_: rate


def tuned(monkeypatch: pytest.MonkeyPatch, shards: Path, gains: dict[str, dict], trials: int = 120) -> dict:
    monkeypatch.setattr(tune, "_rater", machine(gains, noise=0.02))
    monkeypatch.setattr(tune, "_enough", lambda *_: lambda done: done >= trials)
    return run_tune(TuneConfig(shards=(shards,), minutes=1e-6, batch_size=8))


def test_what_buys_something_is_kept_and_said(
    shards_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reading threads matter here, own_jpeg off costs, the rest does nothing and stays as it is."""
    gains = {"read_threads": {1: 0.3, 2: 0.6, 8: 1.3, 16: 1.6, 32: 1.6, 64: 1.6}, "own_jpeg": {False: 0.7}}
    result = tuned(monkeypatch, shards_dir, gains)
    assert set(result["chosen"]) == {"read_threads"} and result["chosen"]["read_threads"] >= 16
    (row,) = [row for row in result["choices"] if row["setting"] == "read_threads"]
    assert row["kept"] and row["lowest"] <= row["ratio"] <= row["highest"] and 1.5 < row["ratio"] < 1.7
    assert "read_threads" in result["verdict"] and "1.6" in result["verdict"]
    first = result["trials"][0]
    assert (first["read_threads"], first["memory_mb"], first["ahead"], first["own_jpeg"]) == (4, None, 2, True)
    path = write(tmp_path / "loader.toml", toml_of(result))
    config = parse_config("x", [*PATHS, "--loader-config", str(path)])
    assert config.data.read_threads == result["chosen"]["read_threads"]
    assert dataclasses.replace(config.data, read_threads=4) == parse_config("x", PATHS).data


def test_what_buys_nothing_leaves_the_defaults(shards_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of 120 noisy trials is always faster than the one trial of the default; that is no gain."""
    result = tuned(monkeypatch, shards_dir, {})
    assert max(trial["films_per_s"] for trial in result["trials"]) > 1030
    assert result["chosen"] == {} and "no more than the noise" in result["verdict"]
    assert "[data]" in toml_of(result) and "=" not in toml_of(result).split("[data]")[1]


class Reading(contextlib.nullcontext):
    """A loader that reads ahead: ten films at a time, decoded half as fast while it fills its room."""

    def __init__(self, held: float, room: float, reads: float) -> None:
        """Films, films, and films/s; it decodes 1,000/s."""
        super().__init__(self)
        self.held, self.room, self.reads, self.now = held, room, reads, 0.0

    def perf_counter(self) -> float:
        return self.now

    def __next__(self) -> range:
        took = 10 / (1000 if self.held >= self.room else 500)
        took = took if self.held >= 10 else max(took, 10 / self.reads)
        self.now += took
        self.held = min(self.room, self.held + self.reads * took - 10)
        return range(10)

    def stats(self) -> dict[str, float]:
        return {"held_bytes": self.held * 20_000}


@pytest.mark.parametrize(
    ("loader", "rate"), [(Reading(3000, 3000, 100), 100), (Reading(0, 40_000, 10_000), 1000)], ids=["empties", "fills"]
)
def test_a_trial_counts_once_the_read_ahead_is_level(
    loader: Reading, rate: float, shards_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what was read before would count for speed, and what is read for later against it."""
    monkeypatch.setattr("bench.measure.time", loader)
    monkeypatch.setattr("pipeline.loader.build_loader", lambda *_, **__: loader)
    measured = tune._rater(TuneConfig(shards=(shards_dir,), seconds=1), LoaderConfig(shards=shards_dir), "cpu")
    assert measured({}) == pytest.approx(rate, rel=0.1)


def test_a_loader_says_what_it_holds(shards_dir: Path) -> None:
    with build_loader(LoaderConfig(shards=shards_dir, batch_size=8, backend="cpu"), World()) as loader:
        next(loader)
        assert 0 < loader.stats()["held_bytes"] <= loader.stats()["buffer_bytes"] + (1 << 20)


def test_what_was_found_on_a_simulated_file_system_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowSettings(latency_ms=20, bandwidth_mb=200)
    assert tune._where(slow) == ""  # nothing of it lies under this process
    monkeypatch.setattr(tune, "counts", lambda: Counts(requests=1, bytes=1, refused_maps=0))
    assert tune._where(slow) == "Simulated, 20 ms a request and 200 MB/s: "


def test_what_was_faster_in_each_round_but_is_no_sure_gain_asks_for_more_time() -> None:
    row = {"setting": "ahead", "default": 2, "chosen": 8, "ratio": 1.5, "highest": 2.0, "kept": False}
    for lowest, words in ((1.1, "more --minutes"), (0.9, "no more than the noise")):
        (table,) = tune_tables({"choices": [row | {"lowest": lowest}], "chosen": {}})
        assert table.rows[0][-1].endswith(words)


def test_what_may_be_chosen(shards_dir: Path) -> None:
    """The defaults are those of a loader; settings that a backend ignores are no choice."""
    base = LoaderConfig(shards=shards_dir, backend="cpu")
    space = make_space(base, [shards_dir], dali=False)
    assert "streams" not in space.values and space.values["backend"] == ("cpu",)
    assert space.default == {"backend": "cpu", "threads": available_cpus()} | {
        name: getattr(base, name) for name in ("memory_mb", "read_threads", "ahead", "own_jpeg")
    }
    asked = make_space(base, [shards_dir, shards_dir], dali=True)
    assert asked.values["backend"] == ("dali", "cpu")
    assert asked.changed(asked.default | {"own_jpeg": False}) == []  # dali does not heed it


def test_the_command(shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real measurements, as few as it makes; what it writes is read by training and by the report."""
    out, table = tmp_path / "loader.toml", tmp_path / "tune.json"
    flags = ["--minutes", "0.001", "--seconds", "0.02", "--batch-size", "8", "--json", str(table), "--out", str(out)]
    tune.main(["--shards", str(shards_dir), *flags])
    result = json.loads(table.read_bytes())
    said = capsys.readouterr().out
    assert result["verdict"] in said and "trials of " in said and len(result["trials"]) >= 10
    assert [len(case["rounds"]) for case in result["cases"]] == [5, 5]
    config = parse_config("x", [*PATHS, "--loader-config", str(out)])
    chosen = {name: value for name, value in result["chosen"].items() if name != "backend"}
    assert {name: getattr(config.data, name) for name in chosen} == chosen
    (found,) = read_results(table)
    assert found.kind == "tune" and found.said == (result["verdict"],)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--minutes 0"):
        TuneConfig(shards=(tmp_path,), minutes=0)
    with pytest.raises(InputError, match=r"no shards here.*nosuch"):
        run_tune(TuneConfig(shards=(tmp_path / "nosuch",)))
