"""Which loaders a bench measures, what each of them reads, and whether those files belong together."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.case import FLOOR, UINT8_FILE, Task, run_child
from shards.cli import say
from shards.errors import InputError

BASELINE, TUNED = "hdf5", "hdf5-tuned"
FLOORS = {"cpu": "cpu floor", "cpu raw": "cpu raw floor"}
"""Case -> its kernels alone."""
PEERS = ("spdl", "streaming", "litdata", "ffcv")
NOTES = {
    "webdataset": "shards with replacement, libjpeg-turbo, torchvision on one channel",
    "dali reader": "fn.readers.webdataset, the crop decoded only, shuffled in a buffer",
    "spdl": "its tar reader and threads, shuffled by shard only, libjpeg-turbo, aten's resize on one channel",
    "streaming": "MDS shards, libjpeg-turbo, torchvision on one channel",
    "litdata": "its chunks, libjpeg-turbo, torchvision on one channel",
    "ffcv": "raw RGB at 12 times the bytes; its resize is OpenCV's area filter, it has no bicubic with antialias",
}
UNDELAYED = {"litdata": "maps its files into memory, which a slow file system here cannot delay; measured without one"}
"""Why a peer is not measured on a slow file system."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One loader on one device."""

    name: str
    loader: str
    """A backend, FLOOR, or the name of a loader of others."""
    device: str = "cpu"
    raw: bool = False
    """Reads the raw shards."""
    uint8: bool = False
    """Reads the uint8 copy of the HDF5 file."""
    own_jpeg: bool = True
    """See `LoaderConfig`."""
    peer: bool = False
    """Somebody else's."""

    @property
    def writes(self) -> bool:
        """Whether it needs data of its own."""
        return self.uint8 or self.loader in ("streaming", "litdata", "ffcv")

    def places(self, config: Any, scratch: Path) -> list[Path]:
        """Files and folders that it reads films from; the HDF5 baselines take tokens and labels from the shards."""
        if self.loader in (BASELINE, TUNED):
            return [scratch / UINT8_FILE if self.uint8 else config.h5, config.shards]
        if self.writes:
            return [scratch / self.loader]
        return [config.raw_shards if self.raw else config.shards]


def cases(config: Any, found: dict[str, Any]) -> tuple[list[Case], dict[str, str]]:
    """What to measure, and why the rest of what was asked for cannot be. `found`: what `look` says of this machine."""
    device = "cuda" if found["cuda"] else "cpu"
    listed = [*_baselines(config, device), *_others(config, found, device), *_ours(config, found, device)]
    absent = {name: why for name, why in found["missing"].items() if config.peers and why}
    if any(config.slow_settings()) and config.peers:
        absent |= {name: why for name, why in UNDELAYED.items() if name not in absent}
        listed = [case for case in listed if case.name not in absent]
    if config.only:
        known = {case.name for case in listed} | set(absent)
        if unknown := [name for name in config.only if name not in known]:
            raise InputError(f"--only {unknown[0]!r} is none of the cases here: {', '.join(sorted(known))}")
        listed = [case for case in listed if case.name in config.only]
        absent = {name: why for name, why in absent.items() if name in config.only}
    return listed, absent


def _baselines(config: Any, device: str) -> list[Case]:
    files = ([False] if config.h5 else []) + ([True] if config.h5 and config.uint8 else [])
    return [
        Case(name=f"{name} uint8" if uint8 else name, loader=name, device=device, uint8=uint8)
        for uint8 in files
        for name in (BASELINE, TUNED)
    ]


def _others(config: Any, found: dict[str, Any], device: str) -> list[Case]:
    """All of them are given JPEG."""
    if found["codec"] != "jpeg":
        return []
    names = ["webdataset"] + (["dali reader"] if found["dali"] else [])
    names += [name for name in PEERS if config.peers and found["missing"][name] is None]
    return [Case(name=name, loader=name, device=device, peer=True) for name in names]


def _ours(config: Any, found: dict[str, Any], device: str) -> list[Case]:
    listed = [Case(name="cpu", loader="cpu", device=device)]
    if config.floor:
        listed.append(Case(name="cpu libjpeg-turbo", loader="cpu", device=device, own_jpeg=False))
        listed.append(Case(name="cpu floor", loader=FLOOR))
    if config.raw_shards:
        listed.append(Case(name="cpu raw", loader="cpu", device=device, raw=True))
        if config.floor:
            listed.append(Case(name="cpu raw floor", loader=FLOOR, raw=True))
    if found["dali"]:
        listed.append(Case(name=f"dali ({'GPU' if found['cuda'] else 'CPU'})", loader="dali", device=device))
    return listed


def convert(config: Any, listed: list[Case], scratch: Path) -> dict[str, str]:
    """Make what cases read that is not there; why, by name, where a peer cannot. What is there is whole."""
    unfit: dict[str, str] = {}
    for case in listed:
        made = scratch / (UINT8_FILE if case.uint8 else case.loader)
        if not case.writes or made.exists():
            continue
        say(f"converting the films for {case.name}")
        partial = scratch / f"partial-{case.loader}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        task = case_task(config, case, scratch, 0)
        try:
            run_child(replace(task, action="write", h5=_absolute(config.h5), data=str(partial.resolve())))
        except InputError as error:
            if not case.peer:
                raise
            unfit[case.name] = f"its data could not be made: {error}"
        else:
            os.replace(partial / UINT8_FILE if case.uint8 else partial, made)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return unfit


def case_task(config: Any, case: Case, scratch: Path, seed: int) -> Task:
    """What a child does to measure a case."""
    return Task(
        loader=case.loader,
        shards=str(_absolute(config.raw_shards if case.raw else config.shards)),
        h5=_absolute(scratch / UINT8_FILE if case.uint8 else config.h5),
        data=str(_absolute(scratch if case.uint8 else scratch / case.loader)),
        peers_path=_absolute(config.peers_path),
        device="cpu" if case.loader == FLOOR else case.device,
        batch_size=config.batch_size,
        threads=config.threads,
        seed=seed,
        own_jpeg=case.own_jpeg,
        warmup_batches=config.warmup_batches,
        seconds=config.seconds,
        memory_s=config.memory_s,
    )


def look_task(config: Any) -> Task:
    """What a child does to see what there is to measure."""
    return Task(
        action="look",
        shards=str(_absolute(config.shards)),
        h5=_absolute(config.h5),
        raw_shards=_absolute(config.raw_shards),
        csv=tuple(str(path.resolve()) for path in config.csv),
        text_column=config.text_column,
        peers_path=_absolute(config.peers_path),
    )


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def look(task: Any) -> dict[str, Any]:
    """What runs on this machine, and what the shards hold; InputError where the files do not belong together."""
    from bench.machine import has_dali
    from bench.peers import missing
    from shards.digest import file_digest
    from shards.manifest import read_manifest
    from shards.schema import MANIFEST_NAME

    check_pairs(
        Path(task.shards),
        raw_shards=Path(task.raw_shards) if task.raw_shards else None,
        h5=Path(task.h5) if task.h5 else None,
        csv=tuple(map(Path, task.csv)),
        text_column=task.text_column,
    )
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


def check_pairs(
    shards: Path, *, raw_shards: Path | None, h5: Path | None, csv: tuple[Path, ...], text_column: str
) -> None:
    """InputError where the HDF5 or CSV files are not those that the shards were made from, as far as a look tells."""
    from ingest.reports import read_columns
    from ingest.source import H5Source
    from shards.manifest import read_manifest
    from shards.reader import ShardReader

    manifest = read_manifest(shards)
    if raw_shards:
        raw = read_manifest(raw_shards)
        _check_rows(f"{raw_shards}", raw.sources[0].rows, manifest.sources[0].rows)
        if raw.image.codec != "raw":
            raise InputError(f"{raw_shards} holds {raw.image.codec} images; ingest with --encoding raw")
    if h5:
        with H5Source(h5) as source:
            _check_rows(f"{h5}", source.rows, manifest.sources[0].rows)
    if csv:
        texts = read_columns(csv, (text_column,))[text_column]
        _check_rows("the CSV", len(texts), manifest.sources[0].rows)
        info = next(iter(manifest.splits.values()))[0]
        with ShardReader(shards, manifest, info) as reader:
            ours, rows = reader.read_text(0), reader.read_rows(0).source_row
        if ours != texts.take(rows).to_pylist():
            raise InputError(
                f"the reports of {info.name} are not those of the CSV; give the files the shards were made from"
            )


def _check_rows(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise InputError(
            f"{what} has {found:,} rows, the shards were made from {expected:,}; give the files they were made from"
        )
