"""`--loader-config FILE`: how to read and decode on this machine, as `python -m bench.loader --tune` writes it.

    backend = "cpu"
    [data]
    threads = 8
    memory_mb = 512

Only settings that change no sample may stand there, and `streams`, which the tuner tries if it is asked to: the same
films in another order. The values replace those of the preset or of --config; flags on the command line replace them.
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from shards.errors import InputError
from train.config import TrainConfig

BACKENDS = ("auto", "cpu", "dali")
SETTINGS: dict[str, type] = {
    "threads": int,
    "memory_mb": int,
    "read_threads": int,
    "ahead": int,
    "own_jpeg": bool,
    "streams": int,
}
"""Of `train.config.DataConfig`: name -> type. A whole number is at least 1."""
MAX_BYTES = 1 << 16


def apply(config: TrainConfig, path: Path) -> TrainConfig:
    """The config with the settings of a file. InputError, with its name, for a setting that does not belong there."""
    fields = _read(path)
    data = fields.pop("data", {})
    if not isinstance(data, dict):
        raise InputError(f"{path}: data is {data!r}; it has to be a table: [data], then a setting a line")
    backend = fields.pop("backend", config.backend)
    if fields or backend not in BACKENDS:
        raise InputError(_refusal(path, next(iter(fields), ""), backend))
    for name, value in data.items():
        _check(path, name, value)
    return dataclasses.replace(config, backend=backend, data=dataclasses.replace(config.data, **data))


def to_toml(backend: str, data: dict[str, Any], comments: list[str]) -> str:
    """A file that `apply` reads, with comments at its top."""
    lines = [f"# {' '.join(comment.split())}" for comment in comments]
    lines += [f'backend = "{backend}"', "", "[data]"]
    return "\n".join([*lines, *(f"{name} = {str(value).lower()}" for name, value in data.items())]) + "\n"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise InputError(f"--loader-config {path} is no file of at most {MAX_BYTES:,} bytes")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read --loader-config {path} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--loader-config {path} is not TOML ({error}); make it with bench.loader --tune") from None


def _refusal(path: Path, name: str, backend: Any) -> str:
    if name:
        return f"{path} has {name!r}; it takes backend and, under [data], {', '.join(SETTINGS)}; give others as flags"
    return f"{path}: unknown backend {backend!r}; valid: {', '.join(BACKENDS)}"


def _check(path: Path, name: str, value: Any) -> None:
    kind = SETTINGS.get(name)
    if kind is None:
        raise InputError(_refusal(path, f"data.{name}", None))
    if type(value) is not kind or (isinstance(value, int) and kind is int and value < 1):
        wanted = "true or false" if kind is bool else "a whole number of at least 1"
        raise InputError(f"{path}: data.{name} is {value!r}; it has to be {wanted}")
