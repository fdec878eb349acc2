"""What a run is at a step boundary, to a checkpoint's payload and back."""

import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.batch import DIGEST_MODULUS
from pipeline.loader import Loader
from pipeline.quarantine import check_count
from shards.errors import InputError
from train.commandline import to_fields
from train.config import TrainConfig
from train.optim import Patience, Plateau
from train.ranks import Ranks

LEFT_OUT = (*("shards", "out", "h5", "dataset", "vision_weights", "text_weights"), *("resume", "stop_at", "force"))
"""Settings that stay out of checkpoints: where files lie is nobody's business elsewhere, and how often a run was
started makes it no other."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is. The only thing that the loop itself changes."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Where the next batch starts."""
    digest: int = 0
    """This rank's share of the order digest; the sum over the ranks modulo 2^64 is the run's."""
    best_loss: float | None = None
    """Lowest validation loss so far."""
    best_step: int | None = None
    """Where it was reached."""
    films_since: int = 0
    """The step after which the run went on with other films (--force); the losses so far are of those since."""
    skipped: int = 0
    """Steps whose update was left out because loss or gradient was no number."""
    patience: Patience = field(default_factory=Patience)
    """What --patience has counted."""
    plateau: Plateau = field(default_factory=Plateau)
    """What the plateau schedule has counted."""

    def judge_anew(self) -> None:
        """Forget the losses so far: those to come are of other films, and none of them might ever be lower."""
        self.films_since = self.step
        self.best_loss = self.best_step = None
        self.patience, self.plateau.patience = Patience(), Patience()


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """What is trained, and what trains it; all change in place."""

    model: nn.Module
    """The bare model, without DDP around it."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: nn.Module | None = None
    """The moving average of the weights, where one is kept."""

    @property
    def judged(self) -> nn.Module:
        """What is validated: the average where there is one."""
        return self.model if self.ema is None else self.ema


def order_digest(progress: Progress, ranks: Ranks) -> str:
    """The run's order digest over all ranks, 16 hex digits."""
    # Halves, because a sum of float64 or int64 cannot hold 64 bits.
    halves = ranks.gather(torch.tensor([progress.digest >> 32, progress.digest & 0xFFFFFFFF]))
    total = sum((int(high) << 32) + int(low) for high, low in halves)
    return f"{total % DIGEST_MODULUS:016x}"


def gather_bad(loader: Loader, ranks: Ranks) -> list[dict[str, Any]]:
    """The bad samples that were replaced so far on any rank, in shard and row order. All ranks have to call it.

    InputError, on all ranks, where they are more than tolerated.
    """
    if not loader.config.max_bad:
        return []
    told = {(bad["shard"], bad["row"]): bad for some in ranks.gather_objects(loader.bad_samples()) for bad in some}
    check_count(loader.config.split, len(told), loader.config.max_bad)
    return [told[place] for place in sorted(told)]


def capture(
    config: TrainConfig,
    prints: dict[str, Any],
    progress: Progress,
    learner: Learner,
    bad_samples: list[dict[str, Any]],
    ranks: Ranks,
) -> dict[str, Any]:
    """A checkpoint's payload, copied to host memory so that training may go on. All ranks have to call it."""
    digest, random = order_digest(progress, ranks), ranks.gather(torch.get_rng_state())
    device_random = ranks.gather_objects(_device_rng())
    if not ranks.first:
        return {}
    settings = {name: value for name, value in to_fields(config).items() if name not in LEFT_OUT}
    for name in ("exclude", "stage_dir", "more_shards"):
        del settings["data"][name]
    payload = {
        "step": progress.step,
        "position": progress.position,
        "order_digest": digest,
        "bad_samples": bad_samples,
        "best_loss": progress.best_loss,
        "best_step": progress.best_step,
        **({"films_since": progress.films_since} if progress.films_since else {}),
        "skipped": progress.skipped,
        "schedule": {"patience": asdict(progress.patience), "plateau": asdict(progress.plateau)},
        "config": settings,
        "fingerprint": prints,
        "model": learner.model.state_dict(),
        **({} if learner.ema is None else {"ema": learner.ema.state_dict()}),
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "rng": random,
        "device_rng": device_random,
    }
    return to_host(payload)


def restore(payload: dict[str, Any], learner: Learner, ranks: Ranks) -> Progress:
    """Put a payload back in place; returns the progress. Fingerprint, weights and optimizer have been checked.

    InputError where something else in it is not what `capture` writes.
    """
    try:
        return _restore(payload, learner, ranks)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"the checkpoint is not what a run writes ({type(error).__name__}: {reason})") from None


def _restore(payload: dict[str, Any], learner: Learner, ranks: Ranks) -> Progress:
    learner.model.load_state_dict(payload["model"])
    if learner.ema is not None:
        learner.ema.load_state_dict(payload.get("ema", payload["model"]))  # --force may have turned it on
    # The settings of its groups are this run's: those of the file would undo what --force has changed.
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": payload["optimizer"]["state"], "param_groups": groups})
    if payload["scaler"]:  # --force may have turned it on, too
        learner.scaler.load_state_dict(payload["scaler"])
    if len(payload["rng"]) == ranks.size:
        torch.set_rng_state(payload["rng"][ranks.rank])
        if torch.cuda.is_initialized() and payload["device_rng"][ranks.rank] is not None:
            torch.cuda.set_rng_state(payload["device_rng"][ranks.rank])
    plateau = payload["schedule"]["plateau"]
    return Progress(
        step=payload["step"],
        position=payload["position"],
        digest=int(payload["order_digest"], 16) if ranks.first else 0,
        best_loss=payload["best_loss"],
        best_step=payload["best_step"],
        films_since=int(payload.get("films_since", 0)),
        skipped=payload["skipped"],
        patience=_patience(payload["schedule"]["patience"]),
        plateau=Plateau(patience=_patience(plateau["patience"]), cuts=int(plateau["cuts"])),
    )


def _patience(counts: dict[str, Any]) -> Patience:
    return Patience(best=None if counts["best"] is None else float(counts["best"]), bad=int(counts["bad"]))


def to_host(tree: Any) -> Any:
    """A copy of nested dicts and lists whose tensors are copies in host memory.

    Equal contents make equal files: pickle writes a string once and points to it where the very same object comes
    again, which it does not in a run that has read its state from a file, unless equal strings are made one.
    """
    copied = _copy(tree)
    if torch.cuda.is_initialized():  # not with --device cpu on a machine that has one
        torch.cuda.synchronize()  # until here copies from a GPU are on their way
    return copied


def _copy(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        if tree.is_cuda:  # into pinned memory several times as fast, and all at once; torch keeps it for the next save
            host = torch.empty_like(tree.detach(), device="cpu", pin_memory=True)
            return host.copy_(tree.detach(), non_blocking=True)
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {_copy(name): _copy(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copy(value) for value in tree]
    return sys.intern(tree) if isinstance(tree, str) else tree


def _device_rng() -> torch.Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
