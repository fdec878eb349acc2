"""`python -m train.weights show|fetch PRESET`: which weight files a preset starts from, where they are, and get them.

Training never touches a network. `fetch` fills the Hugging Face cache on a machine that has one, a login node say.
"""

import sys
from dataclasses import dataclass

import tyro

from shards.cli import main_guard, parse, say
from shards.digest import file_digest
from shards.errors import InputError
from train.hub import HubFile, cache_folder, fetch, parse_hub
from train.presets import PRESETS
from train.weightfile import read_tensors

PROG = "train.weights"
COMMANDS = ("show", "fetch")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """Weight files of a preset: where they were looked for (show), or into the Hugging Face cache (fetch)."""

    what: tyro.conf.Positional[str]
    """A preset, or hub:ORG/REPO/FILE."""


def files_of(what: str) -> list[HubFile]:
    """The files of the hub that a preset starts from, or the one that is named. InputError for an unknown name."""
    if (named := parse_hub(what)) is not None:
        return [named]
    if what not in PRESETS:
        raise InputError(f"unknown preset {what!r}; valid: {', '.join(PRESETS)}, or hub:ORG/REPO/FILE")
    config = PRESETS[what]()
    files = [parse_hub(source) for source in (config.vision_weights, config.text_weights)]
    return list(dict.fromkeys(file for file in files if file is not None))


def show(what: str) -> None:
    """Say of each file whether it is in the cache."""
    files = files_of(what)
    say(f"the Hugging Face cache is {cache_folder()}")
    if not files:
        say(f"{what} starts from chance: it needs no weights")
    for file in files:
        found = file.cached()
        say(f"{file}: {f'{found}, {found.stat().st_size:,} bytes' if found else 'missing'}")
    if any(file.cached() is None for file in files):
        say(f"where there is network: python -m {PROG} fetch {what}")


def fetch_all(what: str) -> None:
    """Download what is missing, and read each file once, as training will."""
    for file in files_of(what):
        path = fetch(file)
        tensors = read_tensors(path)
        say(f"{file}: {path}, {len(tensors)} tensors, {path.stat().st_size:,} bytes, xxh3 {file_digest(path)}")


def main(argv: list[str] | None = None) -> None:
    """Run one command. Exit code 2 for a user's mistake."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    with main_guard(PROG):
        if name in ("-h", "--help"):
            say(f"usage: python -m {PROG} {{{','.join(COMMANDS)}}} PRESET   (PRESET: {', '.join(PRESETS)})")
            return
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}; valid: show, fetch (python -m {PROG} show cxr-dinov3-clip)")
        config = parse(WeightsConfig, rest, prog=f"python -m {PROG} {name}")
        (show if name == "show" else fetch_all)(config.what)


if __name__ == "__main__":
    main()
