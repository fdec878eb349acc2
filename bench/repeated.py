"""The same films and reports many times over: real ones are few, and a bench has to run for a while."""

import csv
from pathlib import Path

from shards.errors import InputError


def store_repeated(path: Path, dataset: str, times: int, target: Path) -> Path:
    """The films of an HDF5 file so many times over in one file, stored as they were."""
    import h5py

    with h5py.File(path) as source, h5py.File(target, "w") as file:
        data = source[dataset]
        kept = {name: getattr(data, name) for name in ("chunks", "compression", "compression_opts", "shuffle")}
        made = file.create_dataset(dataset, (times * len(data), *data.shape[1:]), data.dtype, **kept)
        step = data.chunks[0] if data.chunks else 64
        for first in range(0, len(data), step):
            films = data[first : first + step]
            for start in range(first, len(made), len(data)):
                made[start : start + len(films)] = films
    return target


def repeat_csv(path: Path, target: Path, times: int) -> Path:
    """The rows of a CSV file so many times over."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error})") from None
    with open(target, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows * times])
    return target
