"""Settings: presets, the command line, and a resolved config read back."""

import dataclasses
import json
from pathlib import Path

import pytest

from shards.atomic import write_json
from shards.errors import InputError
from train.commandline import parse_config, read_config, to_fields
from train.config import TrainConfig, loader_config
from train.presets import PRESETS
from train.rows import read_rows, trim

PATHS = ("--shards", "a", "--out", "b")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_but_for_the_paths(name: str) -> None:
    config = parse_config("x", [*PATHS, "--preset", name])
    assert config == dataclasses.replace(PRESETS[name](), shards=Path("a"), out=Path("b"))
    assert config.preset == name


def test_flags_change_single_values() -> None:
    config = parse_config("x", [*PATHS, "--preset=tiny", "--optim.lr", "0.1", "--steps", "7", "--data.streams", "6"])
    assert (config.optim.lr, config.steps, config.data.streams) == (0.1, 7, 6)
    assert config.data.flip_guard


def test_a_resolved_config_reads_back(tmp_path: Path) -> None:
    config = parse_config("x", [*PATHS, "--optim.lr", "0.1", "--data.scale", "0.8", "0.9", "--h5", "c.h5"])
    write_json(tmp_path / "config.json", to_fields(config))
    assert read_config(tmp_path / "config.json") == config
    again = parse_config("x", ["--config", str(tmp_path / "config.json"), "--seed", "4"])
    assert again == dataclasses.replace(config, seed=4)
    write_json(tmp_path / "forced.json", to_fields(dataclasses.replace(config, force=True, stop_at=5)))
    assert parse_config("x", ["--config", str(tmp_path / "forced.json")]) == config, "it was said to one start alone"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--preset",), "preset"),
        (("--preset", "nosuch"), "valid: tiny"),
        (("--preset", "tiny", "--config", "x.json"), "name one of them"),
        (("--config", "/nosuch.json"), "cannot read the config"),
        (("--stepz", "3"), "stepz"),
        (("--resume", "always"), "always"),
        (("--keep", "0"), "keep is 0"),
        (("--threads", "100000"), "threads is 100000"),
        (("--seed", "99999999999999999999"), "seed is 99999999999999999999"),
        (("--optim.lr", "nan"), "--optim.lr nan"),
        (("--optim.lr", "inf"), "--optim.lr inf"),
        (("--optim.lr", "0"), "--optim.lr 0"),
        (("--optim.clip", "-1"), "--optim.clip -1"),
        (("--optim.eps", "-1"), "--optim.eps -1"),
        (("--optim.betas", "2", "3"), "--optim.betas 2.0 3.0"),
        (("--optim.betas", "0.9", "nan"), "--optim.betas 0.9 nan"),
        (("--optim.warmup", "-1"), "--optim.warmup -1"),
        (("--optim.weight-decay", "nan"), "--optim.weight-decay nan"),
        (("--model.widths", "0", "-1", "3", "4"), "--model.widths 0 -1 3 4"),
        (("--model.widths", "16", "16", "16", "33"), "--model.widths 16 16 16 33"),
        (("--model.embed-dim", "0"), "--model.embed-dim 0"),
        (("--model.text-heads", "0"), "--model.text-heads 0"),
        (("--model.temperature", "nan"), "--model.temperature nan"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_config("x", [*PATHS, *arguments])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": {"lrr": 1}}, "lrr"),
        ({"resume": "yes"}, "yes"),
        ({"steps": "ten"}, "x.json"),
        ({"out": None}, "x.json"),
        ({"steps": True}, "steps is 'True'"),
        ({"batch_size": 8.5}, "batch_size is '8.5'"),
        ({"data": {"where": [1]}}, "where is"),
        ({"data": {"mean": ["a", "b", "c"]}}, "mean is 'a'"),
        ({"data": {"image_size": "64"}}, "image_size is '64'"),
        ({"data": None}, "DataConfig has to be a table"),
        ({"model": {"widths": [16]}}, "widths is"),
        ({"model": {"embed_dim": 10**11}}, "--model.embed-dim 100000000000 does not lie between"),
        ({"model": {"text_layers": 10**8}}, "--model.text-layers 100000000 does not lie between"),
        ({"optim": {"lr": 10**400}}, "lr is '1000"),
    ],
)
def test_a_config_file_is_checked(tmp_path: Path, change: dict, words: str) -> None:
    fields = to_fields(parse_config("x", list(PATHS)))
    (tmp_path / "x.json").write_text(json.dumps(fields | change))
    with pytest.raises(InputError, match=words):
        read_config(tmp_path / "x.json")


@pytest.mark.parametrize("content", ["[]", "null", "[" * 100_000, ""])
def test_a_config_file_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"x\.json is not a config"):
        read_config(tmp_path / "x.json")
    with pytest.raises(InputError, match="/dev/zero is not a config"):
        read_config(Path("/dev/zero"))


def test_every_data_setting_reaches_the_loader() -> None:
    config = TrainConfig(shards=Path("a"), out=Path("b"), batch_size=6, seed=3, backend="cpu", dataset="films")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, flip=0.1, image_size=64, streams=2))
    loader = loader_config(config, split="val", mode="eval")
    assert (loader.batch_size, loader.seed, loader.split, loader.mode, loader.backend) == (6, 3, "val", "eval", "cpu")
    assert (loader.flip, loader.image_size, loader.streams, loader.h5_dataset) == (0.1, 64, 2, "films")


def test_metrics_are_cut_back_to_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    trim(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
