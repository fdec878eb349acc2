"""What a figure was measured on, to stand beside it; what there is to measure; a bench from its command line to its
JSON."""

import importlib.util
import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.case import PEERS, Task
from bench.processes import bench_guard
from shards.cli import check_own, parse, say
from shards.errors import InputError

COMMIT = "SHARDCLIP_COMMIT"
"""Variable that names the commit where the code was copied without its repository."""
_TELLING = re.compile(
    r"[a-z_]+|(vers|proto|sec|data|errors|lookupcache|local_lock)=[\w.-]+|(?!\w*[ug]id)[a-z_]+=\d+[kKmMgG]?"
)
"""Mount options that say how a file system behaves; others may hold paths, hosts or names."""


def environment(places: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Machine, versions, state of the repository, the file systems of `places`. No host name, no user, no path."""
    from train.rundir import PACKAGES, package_version, versions

    systems = {name: file_system(path) for name, path in (places or {}).items()}
    known = versions()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpus": known["cpus"],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **{name: known.get(name) for name in ("gpu", "driver", "cuda", "kernel", "python")},
        "packages": {name: found for name in (*PACKAGES, "webdataset", "pillow") if (found := package_version(name))},
        "commit": known.get("commit", os.environ.get(COMMIT)),
        "uncommitted_changes": known.get("uncommitted_changes"),
        **({"file_system": systems} if systems else {}),
    }


def has_dali() -> bool:
    """Whether DALI is installed; whether it runs is another question, and takes seconds."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def file_system(path: Path) -> dict[str, str]:
    """Type and mount options of the file system that a path lies on."""
    wanted = os.stat(path).st_dev
    number = f"{os.major(wanted)}:{os.minor(wanted)}"
    best = ("", "unknown", "")
    for line in Path("/proc/self/mountinfo").read_text("utf-8", errors="replace").splitlines():
        own, _, rest = line.partition(" - ")
        fields, kind = own.split(), rest.split()
        inside = Path(path).resolve().is_relative_to(fields[4])
        if inside and len(fields[4]) >= len(best[0]) and (fields[2] == number or best[1] == "unknown"):
            best = fields[4], kind[0], f"{fields[5]},{kind[2]}"
    options = dict.fromkeys(option for option in best[2].split(",") if _TELLING.fullmatch(option))
    return {"type": best[1], "options": ",".join(options)}


def one_line(found: dict[str, Any]) -> str:
    """The machine in a few words."""
    gpu = f", {found['gpu']}" if found["gpu"] else ", no GPU"
    return f"{found['cpus']} CPUs of {found['cpu']}, {found['memory_gib']:.0f} GiB{gpu}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def look(task: Task) -> dict[str, Any]:
    """What runs on this machine, and what the shards hold; InputError where the files do not belong together."""
    from bench.peers import missing
    from shards.digest import file_digest
    from shards.manifest import read_manifest
    from shards.schema import MANIFEST_NAME

    _check_pairs(task)
    import torch  # seconds, that a mistake need not wait for

    manifest = read_manifest(Path(task.shards))
    return {
        "digest": file_digest(Path(task.shards, MANIFEST_NAME))[:12],
        "cuda": torch.cuda.is_available(),
        "dali": has_dali(),
        "films": manifest.rows("train"),
        "block_rows": manifest.block_rows,
        "codec": manifest.image.codec,
        "missing": {name: missing(name) for name in PEERS},
    }


def _check_pairs(task: Task) -> None:
    """InputError where the HDF5 or CSV files are not those that the shards were made from, as far as a look tells."""
    from ingest.reports import read_columns
    from ingest.source import H5Source
    from shards.manifest import read_manifest
    from shards.reader import ShardReader

    manifest = read_manifest(Path(task.shards))
    expected, found = manifest.sources[0].rows, {}
    if task.raw_shards:
        raw = read_manifest(Path(task.raw_shards))
        found[task.raw_shards] = raw.sources[0].rows
        if raw.image.codec != "raw":
            raise InputError(f"{task.raw_shards} holds {raw.image.codec} images; ingest with --encoding raw")
    if task.h5:
        with H5Source(Path(task.h5), task.dataset) as source:
            found[task.h5] = source.rows
    if task.csv:
        texts = read_columns(tuple(map(Path, task.csv)), (task.text_column,))[task.text_column]
        found["the CSV"] = len(texts)
    for what, rows in found.items():
        if rows != expected:
            raise InputError(
                f"{what} has {rows:,} rows, the shards were made from {expected:,}; give the files they were made from"
            )
    if task.csv:
        info = next(iter(manifest.splits.values()))[0]
        with ShardReader(Path(task.shards), manifest, info) as reader:
            ours, taken = reader.read_text(0), texts.take(reader.read_rows(0).source_row)
        if ours != taken.to_pylist():
            raise InputError(f"the reports of {info.name} are not those of the CSV; give the file they were made from")


def check_positive(config: Any, *names: str) -> None:
    """InputError where a value of one of these settings is not a positive number."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if not all(0 < each < math.inf for each in values):
            raise InputError(f"--{name.replace('_', '-')} {' '.join(map(str, values))} is not a positive number")


def bench_main(
    prog: str,
    kind: type[Any],
    argv: Sequence[str] | None,
    run: Callable[[Any], dict[str, Any]],
    told: Callable[[dict[str, Any]], Iterable[str]] = lambda result: filter(None, [result.get("verdict")]),
) -> None:
    """Parse a configuration of this kind, which has `json`; measure, print tables, write JSON, and end in what the
    figures mean.

    Exit code 2 for a user's mistake, also where the JSON cannot be written, which is seen before anything is measured.
    """
    with bench_guard(prog):
        config = parse(kind, argv, prog=f"python -m {prog}")
        from bench.page import to_text
        from bench.shapes import tables_of
        from shards.atomic import check_writable, write_json

        if config.json:
            check_own(config.json, {"bench"}, "--json")
            check_writable(config.json)
        result = run(config)
        for table in tables_of(result):  # all that the report's page would show of it
            say("\n".join(to_text(table)))
        say(f"on {one_line(result['environment'])}")
        if config.json:
            write_json(config.json, result)
            say(f"written to {config.json}")
        for line in told(result):
            say(line)
