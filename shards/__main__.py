"""`python -m shards verify|inspect DIR`."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from tyro.conf import Positional

from shards.cli import main_guard, parse, say
from shards.errors import InputError
from shards.inspect import describe, show_sample
from shards.manifest import read_manifest
from shards.verify import verify


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Check every byte of a data set against its manifest."""

    root: Positional[Path]
    """Folder of shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Say what a data set holds, or show one sample."""

    root: Positional[Path]
    """Folder of shards."""
    sample: str | None = None
    """Key of a sample to show, its report included."""


def run_verify(config: VerifyConfig) -> None:
    """Print each problem; InputError at the end if there was one."""
    manifest = read_manifest(config.root)
    shards = sum(len(split) for split in manifest.splits.values())
    problems = []
    progress = tqdm(verify(config.root), total=shards, unit="shard", disable=None, leave=False)
    for _, problem in progress:
        if problem:
            problems.append(problem)
            progress.write(problem, file=sys.stdout)
    progress.close()
    if problems:
        raise InputError(f"{len(problems)} problems in {config.root}, the first: {problems[0]}")
    say(f"{config.root}: {shards} shards, {sum(map(manifest.rows, manifest.splits)):,} samples, every byte as ingested")


def run_inspect(config: InspectConfig) -> None:
    """Print the page."""
    for line in show_sample(config.root, config.sample) if config.sample else describe(config.root):
        say(line)


COMMANDS = {"verify": (VerifyConfig, run_verify), "inspect": (InspectConfig, run_inspect)}


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    with main_guard("shards"):
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}; valid: {', '.join(COMMANDS)} (python -m shards verify DIR)")
        config_type, command = COMMANDS[name]
        command(parse(config_type, rest, prog=f"python -m shards {name}"))  # type: ignore[operator]


if __name__ == "__main__":
    main()
