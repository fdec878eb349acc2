"""Command lines from dataclasses (tyro), with mistakes reported as one plain line and exit code 2."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from shards.errors import InputError

Config = TypeVar("Config")

_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT),
    # A file system whose server is gone.
    *(errno.ENOTCONN, errno.ECONNABORTED, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.ENODEV),
}
"""What a disk alone can say: nobody's bug even where the error names no file, as those of `write` do not."""
_PATH = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.ETXTBSY, errno.EXDEV, errno.EMFILE, errno.ENFILE),
}
"""What may be wrong with a path, where the error names one."""

_BOX = re.compile(r"[╭╮╰╯│─]+|^[+|]|[+|]$|-{4,}")
"""The second half where the terminal has no letters for lines."""
_PLAINER = (
    (r"\s*(?:For full helptext|Argument helptext:).*", ""),
    (r"^(?:Value error |Invalid choice |Unrecognized options |Missing argument )?(?:Error parsing [\w.]+: )?", ""),
    (r"^Value error ", ""),
    (r"^Error parsing (--[\w.-]+): invalid literal for int\(\) with base 10: (.*)", r"\1 takes a whole number, not \2"),
    (r"^Error parsing (--[\w.-]+): could not convert string to float: (.*)", r"\1 takes a number, not \2"),
    (
        r"^Error parsing (--[\w.-]+): no type matching (?:\{None\}\|)?(.*?) could be instantiated from \[(.*?)\]\..*",
        r"\1 takes \2, not \3",
    ),
    (r"^Missing value for argument '(.*?)'\. Expected \d+ values?\.", r"\1 lacks its value"),
    (r"^(\S+) takes INT,", r"\1 takes a whole number,"),
    (r"^(\S+) takes FLOAT,", r"\1 takes a number,"),
    (r"^Required options Missing from .*?: ", "missing: "),
)
"""What tyro says, and the same in fewer words."""
_CONTROLS = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160)) if chr(number) not in "\n\t"}
"""Names and reports out of files may hold what would steer a terminal."""


def say(text: str = "") -> None:
    """Write one line to stdout at once, so that logs of several processes keep their order."""
    sys.stdout.write(text.translate(_CONTROLS) + "\n")
    sys.stdout.flush()


def check_outside(path: Path, root: Path, flag: str) -> None:
    """InputError where a result would go into a data set: over one of its files, or beside them."""
    if path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{flag} {path} lies in the data set {root}; give a place outside of it")


def check_own(path: Path, keys: set[str], flag: str) -> None:
    """InputError where JSON would be written over a file that is no earlier result of its kind, which has these keys.
    Over an empty one it may."""
    if not path.is_file() or not (size := path.stat().st_size):
        return
    try:
        found = json.loads(path.read_bytes()) if size <= _RESULT_BYTES else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not keys <= found.keys():
        raise InputError(f"{flag} {path} is there and is no such result; choose another name, or remove it")


_RESULT_BYTES = 256 << 20
"""More than any result has."""


def parse(
    config_type: type[Config], argv: Sequence[str] | None = None, *, prog: str, default: Config | None = None
) -> Config:
    """Parse `argv` (the process's arguments when None) into a frozen config dataclass.

    Every field is a flag of the same name with dashes, nested dataclasses give `--optim.lr`. A mistake prints one line
    on stderr and raises SystemExit(2); `--help` prints the help and raises SystemExit(0). Of a flag given twice the
    last counts, as usual; InputError where that would drop items of a list, or a path is empty.
    """
    captured = io.StringIO()
    kwargs = {} if default is None else {"default": default}
    argv = sys.argv[1:] if argv is None else argv
    try:
        with contextlib.redirect_stderr(captured):
            config = tyro.cli(config_type, args=argv, prog=prog, **kwargs)  # type: ignore[call-overload]
        _check_lists(config, argv)
        _check_paths(config, argv)
        return config
    except SystemExit as stop:
        if stop.code:
            sys.stderr.write(f"{prog}: {_one_line(captured.getvalue())}\n")
            raise SystemExit(2) from None
        raise


def _check_lists(config: object, argv: Sequence[str]) -> None:
    """InputError for `--csv a.csv --csv b.csv`, which would be `--csv b.csv`."""
    given = Counter(word.split("=")[0] for word in argv if word.startswith("--"))
    for flag, times in given.items():
        if times > 1 and isinstance(_setting(config, flag), tuple):
            raise InputError(f"{flag} is given {times} times; write {flag} once and all its values after it")


def _check_paths(config: object, argv: Sequence[str]) -> None:
    """InputError for `--data.stage-dir "$NONE"`, which would be the folder that one happens to be in."""
    flag = ""
    for word in argv:
        if word.startswith("--"):
            flag = word.split("=")[0]
        if word in ("", f"{flag}="):
            found = _setting(config, flag)
            if isinstance(found[0] if isinstance(found, tuple) and found else found, Path):
                raise InputError(f"{flag} is empty; give it a value, or leave it out")


def _setting(config: object, flag: str) -> object:
    """The value that a flag such as `--optim.lr` has set; None for a flag that is no setting."""
    for name in flag.removeprefix("--").replace("-", "_").split("."):
        config = getattr(config, name, None)
    return config


def _one_line(boxed: str) -> str:
    """The message of tyro's error box without the box, its wrapping, or the pointer to --help."""
    rows = [_BOX.sub(" ", row.strip()).strip() for row in boxed.splitlines()]
    text = " ".join(row for row in rows if row)
    for wordy, plain in _PLAINER:
        text = re.sub(wordy, plain, text).strip()
    if text.startswith("missing: "):
        *missing, rest = text.removeprefix("missing: ").split("(required)")
        text = "; ".join(filter(None, (f"missing: {', '.join(each.split()[0] for each in missing)}", _unknown(rest))))
    return _unknown(text) + " (see --help)"


def _unknown(text: str) -> str:
    """Flags that there are not, and like ones that there are, without the help of those."""
    match = re.match(r"\s*Unrecognized options:? (.*?)(?= Perhaps you meant:| Arguments similar to |$)", text)
    if match is None:
        return text.strip()
    unknown = match[1].replace(",", "")
    near = sorted(set(re.findall(r"(?<= )--[\w.-]+(?= [A-Z{\[])", text[match.end() :])))
    return f"unknown: {unknown}" + (f"; perhaps {' or '.join(near)}" if near else "")


@contextlib.contextmanager
def main_guard(prog: str) -> Iterator[None]:
    """Turn an InputError into one line on stderr and exit code 2, Ctrl-C into 130, a closed pipe into silence.

    A KeyboardInterrupt raised with a text has it in the line.

    So, too, an OSError that is the doing of a path or a disk; any other is a bug and keeps its traceback. Code that
    opens files with patients' names has to catch its own: the line names the file.
    """
    _open_closed_streams()
    if sys.platform != "linux":
        sys.stderr.write(f"{prog}: shardclip runs on Linux only, this is {sys.platform}\n")
        raise SystemExit(2)
    for stream in (sys.stdout, sys.stderr):  # a path of other letters must not end work that is done
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"{prog}: {' '.join(str(error).split()).translate(_CONTROLS)}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        sys.stderr.write("; ".join([f"{prog}: interrupted", *map(str, error.args)]) + "\n")
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # a reader such as `head` has gone
        _drop_output()
        raise SystemExit(1) from None
    except (OSError, RuntimeError) as error:
        if (line := _blame(error)) is None:
            raise
        sys.stderr.write(f"{prog}: {line}\n")
        _drop_output()
        raise SystemExit(2) from None


def _blame(error: OSError | RuntimeError) -> str | None:
    """What an error of the system says for people, or None where it may be a bug."""
    if isinstance(error, RuntimeError):  # what Path.resolve raises of such a link before Python 3.13
        loop = "Symlink loop" in str(error)
        return "a link leads to itself (" + " ".join(str(error).split()) + "); give another path" if loop else None
    if error.filename is not None and error.errno in _PATH | _DISK:
        named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        return f"cannot read or write {' '.join(named.split())} ({error.strerror}); mend that, or give another path"
    if error.errno in _DISK:
        return f"cannot read or write ({' '.join(str(error.strerror).split())}); make room, or give another path"
    return None


def _open_closed_streams() -> None:
    """A stream that the caller closed (`2>&-`) becomes /dev/null: else the next file takes its number and its lines."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: that of the stream
            os.set_inheritable(handle, True)
            setattr(sys, name, open(handle, mode, encoding="utf-8"))


def _drop_output() -> None:
    """Where stdout takes nothing more, point it elsewhere, so that the interpreter's last flush is quiet too."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
