"""The loader's tuner, and `--loader-config`, which takes what it writes."""

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

from pipeline.batch import World
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
from shards.errors import InputError
from train.commandline import parse_config
from train.config import DataConfig, loader_config
from train.state import READING
from train.tuned import SETTINGS, to_toml

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


def test_only_streams_of_the_settings_change_samples() -> None:
    """And all are settings of `train.config.DataConfig`: a run of another loader.toml resumes."""
    assert set(SETTINGS) - set(READING) == {"streams"}
    assert set(SETTINGS) <= set(DataConfig.__slots__)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("seed = 3\n", "'seed'"),
        ("[data]\nflip = 0.0\n", "data.flip"),
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
    with pytest.raises(InputError, match="no file"):
        parse_config("x", [*PATHS, "--loader-config", "/nosuch.toml"])


def test_settings_that_are_tuned_change_no_pixel(shards_dir: Path) -> None:
    """And the number of reading threads is what was asked for."""
    plain = LoaderConfig(shards=shards_dir, batch_size=8, backend="cpu")
    other = {"threads": 3, "memory_mb": 64, "read_threads": 7, "ahead": 4, "own_jpeg": False}
    assert set(other) == set(SETTINGS) - {"streams"}
    with build_loader(plain, World()) as one, build_loader(dataclasses.replace(plain, **other), World()) as two:
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("shardclip-read")]
        assert len(names) == plain.read_threads + 7
        for _ in range(12):
            first, second = next(one), next(two)
            assert torch.equal(first.samples, second.samples) and torch.equal(first.images, second.images)
