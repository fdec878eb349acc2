"""Which loaders a bench measures, what each of them reads, and whether those files belong together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.case import FLOOR, UINT8_FILE
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
