"""A run before it runs: everything that a config asks for, built and checked. Nothing here talks to other ranks."""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.batch import World
from pipeline.loader import Loader, build_loader, make_layout
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.schema import Manifest
from train.checkpoint import newest_good
from train.config import TrainConfig, loader_config
from train.device import Precision, choose_device, choose_precision, pin_threads
from train.model import build_model
from train.optim import build_optimizer
from train.ranks import Ranks
from train.rundir import RunFolder
from train.state import Learner, check_fingerprint, fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The parts of a run on one rank."""

    config: TrainConfig
    ranks: Ranks
    manifest: Manifest
    folder: RunFolder
    precision: Precision
    learner: Learner
    fingerprint: dict[str, Any]
    loader: Loader
    """Training batches, from where the run goes on."""
    checkpoint: dict[str, Any] | None
    """The payload to go on from; None at the beginning."""

    @property
    def world(self) -> World:
        """This rank as the loader sees it."""
        return self.ranks.world(self.precision.device)

    @property
    def done(self) -> int:
        """Steps already done when this process starts."""
        return self.checkpoint["step"] if self.checkpoint else 0


def build_job(config: TrainConfig, ranks: Ranks) -> Job:
    """Check a config against what is there, and build its parts. InputError for a mistake of the user's."""
    device = choose_device(config.device, ranks)
    precision = choose_precision(config.precision, device)
    pin_threads(config.threads, ranks)
    manifest, folder = read_manifest(config.shards), RunFolder(root=config.out)
    if config.validate_every and not manifest.rows("val"):
        raise InputError(
            f"{config.shards} has no val split to validate on; ingest with --val-fraction, or add --validate-every 0"
        )
    if config.validate_every:
        make_layout(loader_config(config, split="val", mode="eval"), manifest)  # a query may leave nothing of it
    prints = fingerprint(config, manifest, ranks, precision)
    checkpoint = _find_checkpoint(config, folder, prints, ranks)
    return Job(
        config=config,
        ranks=ranks,
        manifest=manifest,
        folder=folder,
        precision=precision,
        learner=_build_learner(config, manifest, precision, ranks),
        fingerprint=prints,
        loader=build_loader(
            loader_config(config, split="train", mode="train"),
            ranks.world(device),
            position=checkpoint["position"] if checkpoint else 0,
            bad_samples=checkpoint.get("bad_samples", ()) if checkpoint else (),
        ),
        checkpoint=checkpoint,
    )


def prepare_folder(job: Job) -> None:
    """Make the run's folder, which rank 0 alone does. InputError where it cannot be written."""
    if job.ranks.first:
        job.folder.prepare(job.config)


def _find_checkpoint(
    config: TrainConfig, folder: RunFolder, prints: dict[str, Any], ranks: Ranks
) -> dict[str, Any] | None:
    """The payload to go on from, checked against this run."""
    if config.resume == "never":
        folder.check_free()
        return None
    found = newest_good(folder.checkpoints, warn=lambda text: _tell(ranks, f"warning: {text}; trying the one before"))
    if found is None:
        _tell(ranks, f"no checkpoint in {folder.checkpoints} yet: starting at step 0")
        return None
    path, payload = found
    check_fingerprint(payload["fingerprint"], prints)
    if config.stop_at is not None and config.stop_at <= payload["step"]:
        raise InputError(f"--stop-at {config.stop_at}: {path} is at step {payload['step']} already; name a later one")
    _tell(ranks, f"going on after step {payload['step']}, from {path}")
    return payload


def _build_learner(config: TrainConfig, manifest: Manifest, precision: Precision, ranks: Ranks) -> Learner:
    torch.manual_seed(config.seed)  # the same weights on every rank
    model = build_model(config.model, vocab_size=manifest.tokenizer.vocab_size, context=manifest.tokenizer.context)
    torch.manual_seed(config.seed + 1 + ranks.rank)  # and chance of its own while training
    model = model.to(device=precision.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Learner(model=model, optimizer=build_optimizer(model, config.optim), scaler=precision.scaler())


def _tell(ranks: Ranks, text: str) -> None:
    if ranks.first:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
