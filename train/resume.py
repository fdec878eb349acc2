"""Which checkpoint a run goes on from: the newest that is whole, ours and of the same settings; one for all ranks."""

import time
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.quarantine import BadSample
from shards.errors import InputError
from train.checkpoint import DamagedCheckpoint, checkpoint_name, newest_good, read_checkpoint
from train.config import TrainConfig
from train.fingerprint import differences
from train.ranks import Ranks, tell, together
from train.rundir import RunFolder

SHOWN_AFTER_S = 90.0
"""Longer than NFS believes by default that a file is not there, or is what it was."""
FIELDS: dict[str, type | tuple[type, ...]] = {
    **{"step": int, "position": int, "order_digest": str, "bad_samples": list, "config": dict, "fingerprint": dict},
    **{"model": dict, "optimizer": dict, "scaler": dict, "rng": list, "device_rng": list},
    **{"best_loss": (float, type(None)), "best_step": (int, type(None)), "skipped": int, "schedule": dict},
}
"""What every payload holds; others may stand beside them."""
_BAD_SAMPLE = {field.name for field in fields(BadSample)}


def agree_on_checkpoint(
    config: TrainConfig, folder: RunFolder, prints: dict[str, Any], ranks: Ranks, *, prog: str
) -> dict[str, Any] | None:
    """The payload that all ranks go on from; None at the beginning. All ranks have to call it.

    Rank 0 looks, and the others read the file that it names: a shared file system does not show all nodes the same at
    the same time.
    """
    found = together(ranks, prog, lambda: find_checkpoint(config, folder, prints, ranks) if ranks.first else None)
    step = ranks.gather_objects(found and found["step"])[0]
    if step is None:
        return None
    path = folder.checkpoints / checkpoint_name(step)
    return together(ranks, prog, lambda: found or _read_when_shown(path))


def _read_when_shown(path: Path) -> dict[str, Any]:
    """A file that rank 0 has read; this node may be shown it a little later."""
    deadline = time.monotonic() + SHOWN_AFTER_S
    while True:
        try:
            return read_checkpoint(path)
        except DamagedCheckpoint:
            if time.monotonic() >= deadline:
                raise
            time.sleep(1)


def find_checkpoint(
    config: TrainConfig, folder: RunFolder, prints: dict[str, Any], ranks: Ranks
) -> dict[str, Any] | None:
    """The payload to go on from, checked against this run. InputError where there are checkpoints and none will do."""
    if config.resume == "never":
        folder.check_free()
        return None

    def check(payload: dict[str, Any]) -> None:
        check_progress(payload)
        if not config.force:
            check_same(payload["fingerprint"], prints)

    found = newest_good(folder.checkpoints, warn=lambda text: tell(ranks, f"warning: {text}"), check=check)
    if found is None:
        tell(ranks, f"no checkpoint in {folder.checkpoints} yet: starting at step 0")
        return None
    path, payload = found
    if path.name != checkpoint_name(payload["step"]):
        raise InputError(f"{path} holds step {payload['step']}; give it back its name, or remove it")
    if config.stop_at is not None and config.stop_at <= payload["step"]:
        raise InputError(f"--stop-at {config.stop_at}: {path} is at step {payload['step']} already; name a later one")
    tell(ranks, f"going on after step {payload['step']}, from {path}")
    return payload


def check_progress(payload: dict[str, Any]) -> None:
    """DamagedCheckpoint where a payload is not of the kind that `train.state.capture` makes."""
    check_fields(payload)
    fine = {
        "step, position or order_digest": payload["step"] >= 0 <= payload["position"] < 2**62
        and _is_digest(payload["order_digest"]),
        "rng": all(isinstance(rng, torch.Tensor) and rng.dtype == torch.uint8 for rng in payload["rng"]),
        "fingerprint": all(isinstance(name, str) for name in payload["fingerprint"]),
        "bad_samples": all(isinstance(bad, dict) and set(bad) == _BAD_SAMPLE for bad in payload["bad_samples"]),
    }
    if wrong := [name for name in fine if not fine[name]]:
        raise _damaged(wrong[0])


def check_fields(payload: dict[str, Any], names: Collection[str] = FIELDS) -> None:
    """DamagedCheckpoint where one of these fields is missing, or of another type."""
    if wrong := [name for name in names if not isinstance(payload.get(name, ...), FIELDS[name])]:
        raise _damaged(wrong[0])


def _damaged(name: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"a checkpoint is refused: its {name} is missing, or not what a run writes")


def check_same(then: dict[str, Any], now: dict[str, Any]) -> None:
    """InputError that names each setting, data set or version in which a checkpoint differs from this run."""
    if differ := differences(then, now):
        raise InputError(
            f"the checkpoint is of another run: {'; '.join(differ)}; give the same settings, or another --out, "
            "or go on as it is with --force"
        )


def check_weights(theirs: dict[str, Any], model: nn.Module) -> None:
    """InputError where a checkpoint's weights are not those of this model, by name, shape and type."""
    ours = model.state_dict()
    if missing := [name for name in ours if not isinstance(theirs.get(name), torch.Tensor)]:
        raise InputError(f"the checkpoint holds another model: it lacks {missing[0]} ({len(missing)} in all)")
    if unknown := [name for name in theirs if name not in ours]:
        raise InputError(f"the checkpoint holds another model: this one has no {unknown[0]} ({len(unknown)} in all)")
    for name, tensor in ours.items():
        if theirs[name].shape != tensor.shape or theirs[name].dtype != tensor.dtype:
            raise InputError(
                f"the checkpoint holds another model: {name} is {_kind(theirs[name])} there, {_kind(tensor)} here"
            )


def check_optimizer(theirs: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """InputError where a checkpoint's optimizer state is not of this optimizer and these weights."""
    try:
        groups, state = theirs["param_groups"], theirs["state"]
        same = list(map(_traits, groups)) == list(map(_traits, optimizer.state_dict()["param_groups"]))
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        fits = all(
            value.shape in (torch.Size(), weights[number].shape)
            for number, values in state.items()
            for value in values.values()
        )
    except (KeyError, TypeError, AttributeError, IndexError):
        same = fits = False
    if not (same and fits):
        raise InputError(
            "the checkpoint's optimizer state is not of this optimizer; --force does not help: give it the same "
            "--optim.optimizer, or start anew from its weights (--vision-weights, --text-weights) in another --out"
        )


def _traits(group: dict[str, Any]) -> tuple[Any, ...]:
    """What tells AdamW's groups from SGD's, and how many weights a group has."""
    return "betas" in group, "momentum" in group, group["params"]


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'number'}"


def _is_digest(text: str) -> bool:
    return len(text) == 16 and not text.strip("0123456789abcdef")
