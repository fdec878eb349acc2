"""Which checkpoints are evaluated, and several as one: the mean of their probabilities, as CheXzero does it.

A run keeps its newest checkpoints and its best one (`--keep`), and no others. The top k of them are those with the
lowest validation loss, worked out anew on the films that are evaluated: a choice that uses no label.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pipeline.config import LoaderConfig
from shards.cli import say
from shards.errors import InputError
from shards.schema import Manifest
from train.checkpoint import (
    DamagedCheckpoint,
    header_digest,
    list_checkpoints,
    newest_good,
    read_checkpoint,
    verify_checkpoint,
)
from train.commandline import from_fields
from train.config import TrainConfig, loader_config
from train.model import ClipModel, build_model
from train.resume import check_fields, check_weights
from train.rundir import RunFolder
from train.zeroshot import Predicted

Weights = Literal["auto", "ema", "model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A checkpoint, read."""

    path: Path
    step: int
    weights: str
    """Whose these are: `model`, or `ema`, its average over the steps."""
    settings: TrainConfig
    """What it was trained with; its paths are placeholders."""
    state: dict[str, torch.Tensor]
    """Parameters and buffers, on the CPU."""
    tokenizer: str
    """Digest of the tokenizer it was trained with."""


def find_checkpoints(paths: Sequence[Path], *, every: bool = False) -> list[Path]:
    """The files that --checkpoint means, each content once: a run's best one is often one of its newest, too.

    Of a run's folder the best, or the newest where none was validated; or every. InputError where one holds none, or is
    named twice.
    """
    files = [file for path in paths for file in ([path] if path.is_file() else _of_run(path, every))]
    known: set[Path] = set()
    for file in files:
        if file.resolve() in known:
            raise InputError(f"--checkpoint names {file} twice")
        known.add(file.resolve())
    distinct: dict[str, Path] = {}
    for file in files:
        content = header_digest(file) or str(file)
        first = distinct.setdefault(content, file)
        if first is not file and _is_damaged_beside(first, file):
            distinct[content] = file
        elif first is not file and not every:
            say(f"{file} holds what {first} does, and counts once")
    return list(distinct.values())


def _is_damaged_beside(first: Path, file: Path) -> bool:
    """Whether the first of two files with one digest in their headers is damaged, and the other may not be: a run's
    best checkpoint and one of its newest are one file, but two in a copy of its folder."""
    if first.samefile(file):
        return False
    try:
        verify_checkpoint(first)
    except DamagedCheckpoint as error:
        say(f"warning: {error}; {file} is taken for it")
        return True
    return False


def _of_run(root: Path, every: bool) -> list[Path]:
    folder = RunFolder(root=root)
    best = [folder.best] if folder.best.exists() else []
    if every:
        found = [*best, *(path for _, path in list_checkpoints(folder.checkpoints))]
    else:
        newest = None if best else newest_good(folder.checkpoints, warn=say)
        found = best or ([newest[0]] if newest else [])
    if not found:
        raise InputError(f"{root} holds no checkpoint; give a run's folder or a file of its checkpoints")
    return found


def run_folder(path: Path) -> Path:
    """The folder of the run that a --checkpoint belongs to."""
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def result_path(files: Sequence[Path], split: str, manifest: Manifest, *, of: int) -> Path:
    """Where the results of `of` checkpoints go: evaluation-SPLIT.json in the first one's run; under a name of its own
    where that holds the results on another data set."""
    name = f"evaluation-{split}" + (f"-of-{of}" if of > 1 else "")
    path = run_folder(files[0]) / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):  # none there, or nothing of ours
        if json.loads(path.read_bytes()).get("shards") != manifest.digest:
            return path.with_name(f"{name}-{manifest.digest[:8]}.json")
    return path


def read_member(path: Path, weights: Weights = "auto") -> Member:
    """A checkpoint's weights and settings; auto: the averaged weights where it has any. InputError for others."""
    payload = read_checkpoint(path)
    check_fields(payload, ("step", "config", "fingerprint", "model"))
    name = ("ema" if "ema" in payload else "model") if weights == "auto" else weights
    if not isinstance(payload.get(name), dict):
        raise InputError(f"{path} holds no averaged weights; give --weights model, or train with --ema")
    return Member(
        path=path,
        step=payload["step"],
        weights=name,
        settings=_settings(path, payload),
        state=payload[name],
        tokenizer=payload["fingerprint"].get("tokenizer", ""),
    )


def _settings(path: Path, payload: dict[str, Any]) -> TrainConfig:
    try:
        return from_fields(TrainConfig, {**payload["config"], "shards": "", "out": "", "h5": None})  # no path is in it
    except ValueError as error:
        raise InputError(f"{path} has settings that this version does not know ({error})") from None


def read_members(paths: Sequence[Path], weights: Weights) -> Iterator[Member]:
    """One after another; a damaged file is left out with a warning."""
    for path in paths:
        try:
            yield read_member(path, weights)
        except DamagedCheckpoint as error:
            say(f"warning: {error}; left out")


def _check_enough(count: int, top: int) -> None:
    if count < top:
        kept = "a run keeps its best and its newest --keep"
        raise InputError(
            f"--top {top}: here are {count} checkpoints; {kept}; name more runs, or train with more --keep"
        )


def model_of(member: Member, manifest: Manifest) -> nn.Module:
    """The model, on the CPU. InputError where it was trained on other tokens than the shards have."""
    spec = manifest.tokenizer
    if member.tokenizer != spec.digest:
        raise InputError(f"{member.path} was trained on tokens of another tokenizer than these shards have")
    return build_member(member, vocab_size=spec.vocab_size, context=spec.context)


def build_member(member: Member, *, vocab_size: int, context: int) -> ClipModel:
    """The model that a checkpoint's settings describe, with its weights. InputError where these are of another one."""
    settings = member.settings
    sizes = {"vocab_size": vocab_size, "context": context, "image_size": settings.data.image_size}
    try:
        with torch.device("meta"):  # what a file asks for may be larger than any memory
            check_weights(member.state, build_model(settings.model, **sizes))
    except InputError as error:
        raise InputError(f"{member.path}: {error}") from None
    model = build_model(settings.model, **sizes)
    model.load_state_dict(member.state)
    return model


def predict_as_one(
    files: Sequence[Path],
    weights: Weights,
    predict: Callable[[Member, str], Predicted],
    *,
    top: int | None,
    splits: Sequence[str],
) -> tuple[list[dict[str, Any]], dict[str, Predicted]]:
    """Step and weights of each checkpoint, and what all of them, or the `top` of them, make of each split.

    `predict` tells what one makes of one split.
    """
    if top is not None:
        _check_enough(len(files), top)  # before anything is embedded
        losses = {member.path: predict(member, "val").loss for member in read_members(files, weights)}
        _check_enough(len(losses), top)
        files = sorted(losses, key=losses.__getitem__)[:top]
    told, parts = [], []
    for file in files:
        member = read_member(file, weights)
        told.append({"step": member.step, "weights": member.weights})
        parts.append({split: predict(member, split) for split in dict.fromkeys(splits)})
    return told, {split: average([part[split] for part in parts]) for split in parts[0]}


def eval_loader(trained: TrainConfig, rows: LoaderConfig) -> LoaderConfig:
    """Images as a checkpoint was trained on them; of the data set, and the films of it, that `rows` names."""
    data = replace(trained.data, where=rows.where, exclude=rows.exclude, mix=())  # nor the training's further sets
    # Where the run's own films were, and what read them then, says nothing of here.
    here = replace(trained, data=data, shards=rows.shards, backend="auto", h5=None)
    loader = loader_config(here, split=rows.split, mode="eval")
    return replace(loader, backend=rows.backend, batch_size=rows.batch_size, h5=rows.h5, h5_dataset=rows.h5_dataset)


def average(parts: Sequence[Predicted]) -> Predicted:
    """Several models' predictions as one: mean probabilities, mean similarities, mean loss.

    Unit vectors of M models side by side, divided by sqrt(M), are unit vectors whose products are the mean of theirs.
    """
    scale = len(parts) ** -0.5
    return Predicted(
        probabilities=np.mean([part.probabilities for part in parts], axis=0),
        labels=parts[0].labels,
        images=torch.cat([part.images for part in parts], dim=1) * scale,
        texts=torch.cat([part.texts for part in parts], dim=1) * scale,
        loss=float(np.mean([part.loss for part in parts])),
    )
