"""Command lines from dataclasses (tyro), with mistakes reported as one plain line and exit code 2."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

import tyro

from shards.errors import InputError

Config = TypeVar("Config")

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
"""What a disk alone can say: nobody's bug even where the error names no file, as those of `write` do not."""
_PATH = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.ETXTBSY, errno.EXDEV, errno.EMFILE, errno.ENFILE),
}
"""What may be wrong with a path, where the error names one."""

_BOX = re.compile(r"[╭╮╰╯│─]+")


def say(text: str = "") -> None:
    """Write one line to stdout at once, so that logs of several processes keep their order."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parse(
    config_type: type[Config], argv: Sequence[str] | None = None, *, prog: str, default: Config | None = None
) -> Config:
    """Parse `argv` (the process's arguments when None) into a frozen config dataclass.

    Every field is a flag of the same name with dashes, nested dataclasses give `--optim.lr`. A mistake prints one line
    on stderr and raises SystemExit(2); `--help` prints the help and raises SystemExit(0).
    """
    captured = io.StringIO()
    kwargs = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(config_type, args=argv, prog=prog, **kwargs)  # type: ignore[call-overload]
    except SystemExit as stop:
        if stop.code:
            sys.stderr.write(f"{prog}: {_one_line(captured.getvalue())}\n")
            raise SystemExit(2) from None
        raise


def _one_line(boxed: str) -> str:
    """The message of tyro's error box without the box, its wrapping, or the pointer to --help."""
    rows = [_BOX.sub(" ", row).strip() for row in boxed.splitlines()]
    text = " ".join(row for row in rows if row)
    return re.split(r"\s*For full helptext", text)[0].strip() + " (see --help)"


@contextlib.contextmanager
def main_guard(prog: str) -> Iterator[None]:
    """Turn an InputError into one line on stderr and exit code 2, Ctrl-C into 130, a closed pipe into silence.

    So, too, an OSError that is the doing of a path or a disk; any other is a bug and keeps its traceback. Code that
    opens files with patients' names has to catch its own: the line names the file.
    """
    if sys.platform != "linux":
        sys.stderr.write(f"{prog}: shardclip runs on Linux only, this is {sys.platform}\n")
        raise SystemExit(2)
    for stream in (sys.stdout, sys.stderr):  # a path of other letters must not end work that is done
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"{prog}: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # a reader such as `head` has gone
        _drop_output()
        raise SystemExit(1) from None
    except OSError as error:
        if (line := _blame(error)) is None:
            raise
        sys.stderr.write(f"{prog}: {line}\n")
        _drop_output()
        raise SystemExit(2) from None


def _blame(error: OSError) -> str | None:
    """What an error of the system says for people, or None where it may be a bug."""
    if error.filename is not None and error.errno in _PATH | _DISK:
        named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        return f"cannot read or write {' '.join(named.split())} ({error.strerror}); mend that, or give another path"
    if error.errno in _DISK:
        return f"cannot read or write ({' '.join(str(error.strerror).split())}); make room, or give another path"
    return None


def _drop_output() -> None:
    """Where stdout takes nothing more, point it elsewhere, so that the interpreter's last flush is quiet too."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
