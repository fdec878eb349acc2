"""From arguments to a config, and a config to JSON and back.

`--preset NAME` or `--config FILE` is read first and gives every value, `--loader-config FILE` then those of reading and
decoding; the other flags then change single ones.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from shards.cli import parse
from shards.errors import InputError
from train.config import TrainConfig
from train.presets import PRESETS

Config = TypeVar("Config")
MAX_BYTES = 1 << 20
"""Of a file of settings; configs that runs write have some 5,000."""
BACKENDS = ("auto", "cpu", "dali")
SETTINGS = {"threads": int, "memory_mb": int, "read_threads": int, "ahead": int, "own_jpeg": bool}
"""What a --loader-config may set of `pipeline.config.DataConfig`: name -> type. A whole number is at least 1."""
SAID = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun says in the environment besides."""


def started_ranks() -> int:
    """Processes that torchrun started for this run; 1 without it. InputError where WORLD_SIZE is there and not all else
    that torchrun says: a job's script sets it for other programs."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise InputError(f"WORLD_SIZE is {size!r} in the environment; start with torchrun, which sets it, or unset it")
    if int(size) > 1 and (missing := [name for name in SAID if not os.environ.get(name)]):
        raise InputError(
            f"WORLD_SIZE is {size} in the environment, but there is no {missing[0]}; start with torchrun, which sets "
            "both, or unset WORLD_SIZE"
        )
    return int(size)


def parse_config(prog: str, argv: Sequence[str] | None = None) -> TrainConfig:
    """The run's config from the command line. InputError for a mistake; `--help` prints and ends the process."""
    first = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", default=None)
    first.add_argument("--config", type=Path, default=None)
    first.add_argument("--loader-config", type=Path, default=None)
    try:
        known, rest = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    if known.preset and known.config:
        raise InputError("--preset and --config both give every value; name one of them")
    default = read_config(known.config) if known.config else preset(known.preset or "tiny")
    default = replace(default, force=False, stop_at=None)  # said to one start of the run that wrote the file
    if known.loader_config:
        default = tuned(default, known.loader_config)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return parse(TrainConfig, rest, prog=prog, default=default)
    except SystemExit as stop:
        if stop.code:
            raise InputError(captured.getvalue().removeprefix(f"{prog}: ")) from None
        raise


def preset(name: str) -> TrainConfig:
    """The preset's config. InputError, with the valid names, for another name."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; valid: {', '.join(PRESETS)}")
    return PRESETS[name]()


def read_config(path: Path) -> TrainConfig:
    """A resolved config back from the JSON of its fields. InputError names the file and the setting."""

    def parsed(text: str) -> TrainConfig:
        return from_fields(TrainConfig, json.loads(text))

    return read_text(path, parsed, "the config", "a config of this program")


def read_text(path: Path, parse: Callable[[str], Any], which: str, kind: str) -> Any:
    """What `parse` makes of a small file. InputError, in one line, where it is none, or not of its `kind`."""
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > MAX_BYTES):
            raise ValueError(f"no file of at most {MAX_BYTES:,} bytes")
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {which} {path} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not {kind} ({error})") from None


def to_fields(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values: paths as strings, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_fields(kind: type[Config], fields: Any) -> Config:
    """The dataclass from plain values. ValueError for an unknown setting, so that a typing error cannot pass, and for a
    value of another type, which would fail somewhere later or count as something else."""
    if not isinstance(fields, dict):
        raise ValueError(f"{kind.__name__} has to be a table of settings")
    hints = typing.get_type_hints(kind)
    unknown = [name for name in fields if name not in hints]
    if unknown:
        raise ValueError(f"{kind.__name__} has no setting {unknown[0]!r}")
    return kind(**{name: _decode(name, hints[name], value) for name, value in fields.items()})


def _decode(name: str, hint: Any, value: Any) -> Any:
    """The value of a setting from its plain form. ValueError where its type hint does not take it."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # of one type and None
        return None if value is None else _decode(name, options[0], value)
    if dataclasses.is_dataclass(hint):
        return from_fields(typing.cast(type, hint), value)
    if origin is tuple and isinstance(value, list):
        kinds = options[:1] * len(value) if options[-1] is ... else options
        if len(kinds) == len(value):
            return tuple(_decode(name, *pair) for pair in zip(kinds, value, strict=True))
    if value in options if origin is typing.Literal else type(value) is hint:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int and abs(value) < 2**63:
        return value
    raise ValueError(f"{name} is {str(value)[:60]!r}, which is none of its values")


def tuned(config: TrainConfig, path: Path) -> TrainConfig:
    """The config with the settings of a --loader-config, `bench.loader --tune`'s: how to read and decode here.

    Only what changes no sample may stand there. InputError, with its name, for another setting.
    """
    fields = read_text(path, tomllib.loads, "--loader-config", "TOML; make it with bench.loader --tune")
    data = fields.pop("data", {})
    if not isinstance(data, dict):
        raise InputError(f"{path}: data is {data!r}; it has to be a table: [data], then a setting a line")
    backend = fields.pop("backend", config.backend)
    for name in (*fields, *(f"data.{name}" for name in data if name not in SETTINGS)):
        raise InputError(
            f"{path} has {name!r}; it takes backend and, under [data], {', '.join(SETTINGS)}; give others as flags"
        )
    if backend not in BACKENDS:
        raise InputError(f"{path}: unknown backend {backend!r}; valid: {', '.join(BACKENDS)}")
    for name, value in data.items():
        if type(value) is not SETTINGS[name] or (type(value) is int and value < 1):
            wanted = "a whole number of at least 1" if SETTINGS[name] is int else "true or false"
            raise InputError(f"{path}: data.{name} is {value!r}; it has to be {wanted}")
    return replace(config, backend=backend, data=replace(config.data, **data))


def to_toml(backend: str, data: dict[str, Any], comments: list[str]) -> str:
    """A file that `tuned` reads, with comments at its top."""
    lines = [f"# {' '.join(comment.split())}" for comment in comments]
    lines += [f'backend = "{backend}"', "", "[data]"]
    return "\n".join([*lines, *(f"{name} = {str(value).lower()}" for name, value in data.items())]) + "\n"
