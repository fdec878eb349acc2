"""Which checkpoint a run goes on from: the newest that is whole, ours and of the same settings; one for all ranks."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shards.errors import InputError
from train.checkpoint import DamagedCheckpoint, checkpoint_name, newest_good, read_checkpoint
from train.config import TrainConfig
from train.ranks import Ranks, tell, together
from train.rundir import RunFolder
from train.state import differences

SHOWN_AFTER_S = 90.0
"""Longer than NFS believes by default that a file is not there, or is what it was."""
FIELDS: dict[str, type | tuple[type, ...]] = {
    **{"step": int, "position": int, "order_digest": str, "bad_samples": list, "config": dict, "fingerprint": dict},
    **{"model": dict, "optimizer": dict, "scaler": dict, "rng": list, "device_rng": list},
    **{"best_loss": (float, type(None)), "best_step": (int, type(None))},
}
"""What every payload holds; others may stand beside them."""


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
        check_fields(payload)
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
    for line in differences(payload["fingerprint"], prints):
        tell(ranks, f"warning: going on by --force although {line}")
        folder.note_forced(payload["step"], line)
    return payload


def check_fields(payload: dict[str, Any]) -> None:
    """DamagedCheckpoint where a payload is not of the kind that `train.state.capture` makes."""
    wrong = [name for name, kind in FIELDS.items() if not isinstance(payload.get(name, ...), kind)]
    if not wrong and not (payload["step"] >= 0 <= payload["position"] < 2**62 and _is_digest(payload["order_digest"])):
        wrong = ["step, position or order_digest"]
    if not wrong and not all(isinstance(rng, torch.Tensor) and rng.dtype == torch.uint8 for rng in payload["rng"]):
        wrong = ["rng"]
    if wrong:
        raise DamagedCheckpoint(f"a checkpoint is refused: its {wrong[0]} is missing, or not what a run writes")


def check_same(then: dict[str, Any], now: dict[str, Any]) -> None:
    """InputError that names each setting, data set or version in which a checkpoint differs from this run."""
    if differ := differences(then, now):
        raise InputError(
            f"the checkpoint is of another run: {'; '.join(differ)}; give the same settings, or another --out, "
            "or go on as it is with --force"
        )


def check_model(payload: dict[str, Any], model: nn.Module) -> None:
    """InputError where a payload's weights are not those of this model, by name, shape and type."""
    ours, theirs = model.state_dict(), payload["model"]
    if missing := [name for name in ours if not isinstance(theirs.get(name), torch.Tensor)]:
        raise InputError(f"the checkpoint holds another model: it lacks {missing[0]} ({len(missing)} in all)")
    if unknown := [name for name in theirs if name not in ours]:
        raise InputError(f"the checkpoint holds another model: this one has no {unknown[0]} ({len(unknown)} in all)")
    for name, tensor in ours.items():
        if theirs[name].shape != tensor.shape or theirs[name].dtype != tensor.dtype:
            raise InputError(
                f"the checkpoint holds another model: {name} is {_kind(theirs[name])} there, {_kind(tensor)} here"
            )


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'number'}"


def _is_digest(text: str) -> bool:
    return len(text) == 16 and not text.strip("0123456789abcdef")
