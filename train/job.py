"""A run before it runs: everything that a config asks for, built and checked. Nothing here talks to other ranks."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.batch import World
from pipeline.loader import Loader, build_loader, make_layout
from pipeline.read import ReadStats, retried
from pipeline.stall import Busy, told
from shards.cli import check_outside
from shards.errors import InputError
from shards.lock import Lease
from shards.manifest import read_manifest
from shards.reader import check_file
from shards.schema import MANIFEST_NAME, Manifest, ShardInfo
from train.config import TrainConfig, loader_config
from train.device import Precision, choose_device, choose_precision, pin_threads
from train.fingerprint import JUDGED_ON, SETS, alike, differences, fingerprint
from train.model import build_model
from train.optim import build_average, build_optimizer
from train.ranks import Ranks, tell
from train.resume import check_optimizer, check_weights
from train.rundir import RunFolder, check_lease
from train.state import Learner
from train.step import check_parts
from train.tracking import check_installed
from train.weights import load_pretrained


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a run is made of, before any of it is built."""

    config: TrainConfig
    ranks: Ranks
    manifest: Manifest
    folder: RunFolder
    precision: Precision
    fingerprint: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(Setting):
    """The parts of a run on one rank."""

    learner: Learner
    loader: Loader
    """Training batches, from where the run goes on."""
    checkpoint: dict[str, Any] | None
    """The payload to go on from; None at the beginning."""
    lease: Lease | None
    """Rank 0's hold on the run's folder."""

    @property
    def world(self) -> World:
        """This rank as the loader sees it."""
        return self.ranks.world(self.precision.device)

    @property
    def done(self) -> int:
        """Steps already done when this process starts."""
        return self.checkpoint["step"] if self.checkpoint else 0

    @property
    def on_other_films(self) -> bool:
        """Whether the losses so far are of other films than those to come, which --force alone allows."""
        return self.checkpoint is not None and not alike(self.checkpoint["fingerprint"], self.fingerprint, JUDGED_ON)

    def warn(self, text: str) -> None:
        """A line for people, from rank 0."""
        tell(self.ranks, f"warning: {text}")

    def check_lease(self) -> None:
        """InputError where the folder is another run's by now."""
        if self.lease is not None:
            check_lease(self.lease)


def build_setting(config: TrainConfig, ranks: Ranks) -> Setting:
    """Check a config against the machine and the data. InputError for a mistake of the user's."""
    check_installed(config.watch)
    if (config.out / MANIFEST_NAME).exists():
        raise InputError(f"--out {config.out} is a data set's folder; a run needs one of its own")
    precision = choose_precision(config.precision, choose_device(config.device, ranks))
    pin_threads(config.threads, ranks)
    check_parts(config.batch_size, ranks.size, config.accumulate)
    busy = Busy()
    with told("the files of the shards", busy):  # a file system may hang, and all ranks with it
        with busy.doing(f"at {config.shards / MANIFEST_NAME}"):
            manifest = read_manifest(config.shards)
        if ranks.first:  # alone: a file system is asked thousands of times
            _check_places(config, busy)
    if config.validate_every and not manifest.rows("val"):
        raise InputError(
            f"{config.shards} has no val split to validate on; ingest with --val-fraction, or add --validate-every 0"
        )
    if config.validate_every:
        make_layout(loader_config(config, split="val", mode="eval"), manifest)  # a query may leave nothing of it
    return Setting(
        config=config,
        ranks=ranks,
        manifest=manifest,
        folder=RunFolder(root=config.out),
        precision=precision,
        fingerprint=fingerprint(config, manifest, ranks, precision),
    )


def _check_places(config: TrainConfig, busy: Busy) -> None:
    """InputError where a new run would write into a data set, or a shard is missing or cut short, as half a copy is:
    the loader would find it hours later."""
    new = not RunFolder(root=config.out).config.exists()  # one that lies there already may be gone on with
    splits = ("train", "val") if config.validate_every else ("train",)
    for root in (config.shards, *config.data.more_shards):
        if new:
            check_outside(config.out, root, "--out")
        if config.data.stage_dir:
            check_outside(config.data.stage_dir, root, "--data.stage-dir")
        with busy.doing(f"at {root / MANIFEST_NAME}"):
            found = read_manifest(root).splits
        shards = [info for split in splits for info in found.get(split, ())]
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            list(pool.map(partial(_check_shard, root, busy), shards))


_ASKED_AT_ONCE = 16
"""Shards: a file system may take 50 ms to say how large a file is, and a set has thousands."""


def _check_shard(root: Path, busy: Busy, info: ShardInfo) -> None:
    for kind in ("tar", "idx", "parquet"):
        path = root / f"{info.name}.{kind}"
        with busy.doing(f"at {path}"):
            retried(partial(check_file, path, getattr(info, kind)), ReadStats())


def build_job(setting: Setting, checkpoint: dict[str, Any] | None, lease: Lease | None) -> Job:
    """Build what a run needs, to begin or to go on from a checkpoint's payload. InputError where they do not fit."""
    config, ranks, precision = setting.config, setting.ranks, setting.precision
    learner = _build_learner(config, setting.manifest, precision, ranks, fresh=checkpoint is None)
    if checkpoint is not None:
        check_weights(checkpoint["model"], learner.model)
        check_optimizer(checkpoint["optimizer"], learner.optimizer)
    same_sets = checkpoint is not None and alike(checkpoint["fingerprint"], setting.fingerprint, SETS)
    loader = build_loader(
        loader_config(config, split="train", mode="train"),
        ranks.world(precision.device),
        position=checkpoint["position"] if checkpoint else 0,
        bad_samples=checkpoint["bad_samples"] if checkpoint and same_sets else (),
    )
    parts = {name: getattr(setting, name) for name in Setting.__slots__}
    return Job(**parts, learner=learner, loader=loader, checkpoint=checkpoint, lease=lease)


def prepare_folder(job: Job) -> None:
    """Make the run's folder, which rank 0 alone does, and note what --force went over. InputError where it cannot be
    written."""
    if not job.ranks.first:
        return
    forced = differences(job.checkpoint["fingerprint"], job.fingerprint) if job.checkpoint else []
    for line in forced:
        job.warn(f"going on by --force although {line}")
    if job.on_other_films:
        left = max(0, job.config.steps - job.done)
        job.warn(f"--steps {job.config.steps} counts the {job.done} on other films, too: {left} are left for these")
    shards = [job.fingerprint["shards"], *job.fingerprint.get("data.more_shards", [])]
    job.folder.prepare(job.config, shards, [f"after step {job.done}: {line}" for line in forced])
    set_best_aside(job)


def set_best_aside(job: Job) -> None:
    """The best model on other films is the best one no more; it is again where a run goes back to those films before
    any other was saved."""
    best = job.folder.best
    aside = best.with_name(f"best-until-{job.done}.pt")
    if job.on_other_films and best.exists() and not aside.exists():
        best.replace(aside)
        job.warn(f"the best model on the other films is {aside} from now on")
    elif job.checkpoint and job.checkpoint["best_step"] and not job.on_other_films and not best.exists():
        with contextlib.suppress(FileNotFoundError):
            aside.replace(best)


def _build_learner(
    config: TrainConfig, manifest: Manifest, precision: Precision, ranks: Ranks, *, fresh: bool
) -> Learner:
    """`fresh`: the run begins, so that weights come from where the config says; a checkpoint brings its own."""
    torch.manual_seed(config.seed)  # the same weights on every rank
    tokens = manifest.tokenizer
    model = build_model(
        config.model, vocab_size=tokens.vocab_size, context=tokens.context, image_size=config.data.image_size
    )
    for line in load_pretrained(model, config) if fresh else ():
        tell(ranks, line)
    torch.manual_seed(config.seed + 1 + ranks.rank)  # and chance of its own while training
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device=precision.device, memory_format=layout)  # type: ignore[call-overload]
    return Learner(
        model=model,
        optimizer=build_optimizer(model, config.optim),
        scaler=precision.scaler(),
        ema=build_average(model, config.ema),
    )
