"""Where else the rows of a run go: TensorBoard beside it, and Weights & Biases if asked.

Neither can end a run: what fails to be recorded there is said once, and training goes on; nor can a screen or a log
that takes no more. W&B is told numbers and names of choices, never a path, a query or a text, and nothing of the
machine: a run may be watched from outside the hospital.
"""

import contextlib
import importlib.util
import os
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from shards.atomic import write_atomic
from shards.errors import InputError
from train.rows import Row, is_number

_NAMES = ("preset", "tower")
"""Settings that are text and harmless: names out of lists of ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """How a run is watched besides metrics.jsonl."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: offline writes into RUN/wandb, for `wandb sync` where there is network; online: logged in."""
    project: str = "shardclip"
    """The run's project there."""
    line_every: int = 10
    """Steps between lines of text where there is no terminal; a validation always gets one."""

    def __post_init__(self) -> None:
        if self.line_every < 1:
            raise InputError(f"--watch.line-every {self.line_every} is not at least 1")


class Board:
    """TensorBoard's event files."""

    def __init__(self, folder: Path, done: int) -> None:
        """`done`: steps of an earlier start; what it said of later ones is purged."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        _quiet_board_threads()
        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, row: Row) -> None:
        """Every number of a row, under its name."""
        for name, value in numbers(row):
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """One W&B run for all starts of a run: its id lies in RUN/wandb-id."""

    def __init__(self, root: Path, config: Any, done: int) -> None:
        """`config`: the run's settings, with a `watch`. Raises what wandb raises, where it cannot begin."""
        import wandb

        # Without these W&B sends the command line (paths), host and user names, the git remote and all that is printed.
        settings = wandb.Settings(
            console="off", disable_git=True, disable_code=True, save_code=False, silent=True, host="", username="",
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True,
        )  # fmt: skip
        self._run = wandb.init(
            project=config.watch.project,
            id=_run_id(root),
            resume="allow",
            mode=config.watch.wandb,
            dir=str(root),
            config=harmless(config),
            settings=settings,
        )
        # Its own step counts what was logged, and would refuse the rows that a resumed run writes again.
        self._run.define_metric("*", step_metric="step")
        self._run.config.update({"started_after_step": done}, allow_val_change=True)

    def write(self, row: Row) -> None:
        """Every number of a row."""
        self._run.log({"step": row["step"], **dict(numbers(row))})

    def close(self) -> None:
        """Finish; online this waits for what is still to be sent."""
        self._run.finish()


class Guarded:
    """A sink that is given up when it fails, in one line."""

    def __init__(self, name: str, build: Callable[[], "Board | Wandb"]) -> None:
        self._name = name
        self._sink: Board | Wandb | None = None
        with self._forgiving():
            self._sink = build()

    def write(self, row: Row) -> None:
        """Hand a row on."""
        if self._sink is not None:
            with self._forgiving():
                self._sink.write(row)

    def close(self) -> None:
        """Close what is still there."""
        if self._sink is not None:
            with self._forgiving():
                self._sink.close()

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Around a call to the sink. Said without the error's own words, which may hold a path."""
        try:
            yield
        except Exception as error:
            self._sink = None
            sys.stderr.write(f"warning: {self._name} failed ({type(error).__name__}); the run goes on without it\n")
            sys.stderr.flush()


def _quiet_board_threads() -> None:
    """No traceback from TensorBoard's thread on a full disk: the next call to the writer raises the same error here."""
    before = threading.excepthook

    def hook(told: threading.ExceptHookArgs) -> None:
        if type(told.thread).__name__ != "_AsyncWriterThread":
            before(told)

    threading.excepthook = hook


def check_installed(watch: WatchConfig) -> None:
    """InputError where W&B is asked for and not installed."""
    if watch.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise InputError(f"--watch.wandb {watch.wandb} needs the package wandb: pip install -e '.[wandb]'")


def numbers(row: Row) -> Iterator[tuple[str, float]]:
    """The finite numbers of a row, without its step."""
    for name, value in row.items():
        if name != "step" and is_number(value):
            yield name, value


def harmless(config: Any) -> dict[str, Any]:
    """A config's numbers, switches and names of choices, nested as they are; no path, query, file name or free text."""
    hints = typing.get_type_hints(type(config))
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found[field.name] = harmless(value)
        elif _is_harmless(value) or field.name in _NAMES or _is_choice(hints[field.name], value):
            found[field.name] = value
    return found


def _is_harmless(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_harmless(part) for part in value)
    return value is None or isinstance(value, bool | int | float)


def _is_choice(hint: Any, value: Any) -> bool:
    """Whether a setting takes words of a list only."""
    return typing.get_origin(hint) is Literal and value in typing.get_args(hint)


def _run_id(root: Path) -> str:
    """The run's id at W&B, drawn at its first start."""
    import secrets

    path = root / "wandb-id"
    if not path.exists():
        write_atomic(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="ascii").strip()


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside the block nothing that is said ends the run: neither a reader that has gone, as `| head` does, nor a full
    disk under a log. What stdout or stderr does not take is dropped, and all that comes after it."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        if stream is not None:
            setattr(sys, name, _Lasting(stream))
    try:
        yield
    finally:
        for name, stream in streams.items():
            setattr(sys, name, stream)


class _Lasting:
    """A stream whose errors are nobody's; the rest is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # from here on into nothing, what is still in the stream's buffer as well
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
