"""What makes a run the run that it is, and what it has to share with a checkpoint to go on from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.batch import World
from pipeline.config import stream_count
from pipeline.loader import resolve_backend
from pipeline.selection import Selection
from shards.manifest import read_manifest
from shards.schema import Manifest
from train.commandline import SETTINGS, to_fields
from train.config import TrainConfig, loader_config
from train.device import Precision
from train.ranks import Ranks
from train.rundir import package_version

VERSIONS = ("torch", "open_clip_torch", "timm")
DALI_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
"""A newer one of these gives other last digits, or other pixels. Not so the others: order, crops and the backend `cpu`
are this program's own, and libjpeg-turbo's pixels are fixed."""

SETS = ("shards", "data.more_shards")
"""What shard numbers are of."""
JUDGED_ON = ("shards", "tokenizer", *(f"data.{name}" for name in ("where", "exclude", "image_size", "mean", "std")))
"""What makes the films of a validation, and so its loss, others."""

READING = (*SETTINGS, "max_bad", "stage_dir", "stage_gb", "stall_abort_s")
"""Settings of `data` that a run may change on its way: they change no sample."""


def fingerprint(config: TrainConfig, manifest: Manifest, ranks: Ranks, precision: Precision) -> dict[str, Any]:
    """What has to be the same for a checkpoint to go on as if nothing had been, by the names of the settings.

    Not in it: the number of ranks, the backend and the threads, which change no sample; how often to log, validate,
    save; where things lie.
    """
    prints: dict[str, Any] = {"shards": manifest.digest, "tokenizer": manifest.tokenizer.digest}
    prints |= {
        name: getattr(config, name)
        for name in ("seed", "batch_size", "steps", "shuffle_reports", "label_smoothing", "ema", "min_delta")
    } | {"precision": precision.name}
    for group in ("data", "model", "optim"):
        fields = to_fields(getattr(config, group))
        prints |= {f"{group}.{name}": value for name, value in fields.items()}
    prints["data.streams"] = stream_count(
        loader_config(config, split="train", mode="train"), ranks.world(precision.device)
    )
    # Which samples are left out, not where the list of them lies.
    prints["data.exclude"] = Selection(exclude=config.data.exclude).keys_digest()
    prints["data.more_shards"] = [read_manifest(Path(root)).digest for root in config.data.more_shards]
    for name in ("effects", "more_shards", "mix"):
        if not getattr(config.data, name):
            del prints[f"data.{name}"]  # as in checkpoints from before there were any
    for name in READING:
        del prints[f"data.{name}"]
    return prints | _versions(config, ranks.world(precision.device))


def _versions(config: TrainConfig, world: World) -> dict[str, str]:
    """Versions of what makes the numbers: arithmetic, towers, and the decoder where it is DALI's."""
    dali = resolve_backend(loader_config(config, split="train", mode="train"), world) == "dali"
    packages = VERSIONS + DALI_PACKAGES if dali else VERSIONS
    return {f"versions.{name}": version for name in packages if (version := package_version(name))}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each setting in which two fingerprints differ, in words. A version that only one of them has is none."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return [
        f"{name} was {then.get(name)}, is now {now.get(name)}"
        for name in names
        if not name.startswith("versions.") or (name in then and name in now)
    ]


def alike(then: dict[str, Any], now: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether two fingerprints say the same of these names."""
    return all(then.get(name) == now.get(name) for name in names)
