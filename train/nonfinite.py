"""Losses and gradients that are no numbers: found on log steps and before saves; in between nobody asks the device.

The step leaves such an update out by itself, on all ranks alike (`train.optim.update`), so the weights stay good. What
each step said is kept on the device until the loop looks; then it stops, or counts and goes on, and names the samples:
those whose own outputs are no numbers, or the whole batch where all are.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from pipeline.config import LoaderConfig
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import ShardReader
from train.config import TrainConfig
from train.objective import Output
from train.ranks import Ranks

REPORT = "nonfinite.jsonl"
"""File in the run's folder; a line for each step without a number."""
GIVE_UP = 50
"""Updates in a row that were left out after which a run ends, whatever it was told to do."""
_NAMED = 4
"""Keys in a line; all are in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bad:
    """A step whose loss or gradient was no number."""

    step: int
    loss: float
    grad_norm: float
    keys: list[str] = field(default_factory=list)
    """Opaque keys of the samples behind it; on rank 0 only."""
    whole_batch: bool = False
    """Whether no single sample stood out, so that they are all of the batch."""

    def describe(self) -> str:
        """One line for people."""
        which = "the batch" if self.whole_batch else "images or reports whose embedding is no number"
        more = f" and {len(self.keys) - _NAMED} more" if len(self.keys) > _NAMED else ""
        what = f"the loss is {self.loss}" if not math.isfinite(self.loss) else f"the gradient is {self.grad_norm}"
        return f"{what} at step {self.step}; {which}: {', '.join(self.keys[:_NAMED])}{more}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the steps since the last look have said; the same on all ranks, but for the keys."""

    loss: float | None
    """The global batch's loss in the newest step that had one; None: none had."""
    skipped: int
    """Updates that were left out, those included with which a scaler searches its scale."""
    bad: list[Bad]
    """Steps whose loss or gradient was no number, but for what a scaler's scale explains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Said:
    """One step's, on this rank."""

    step: int
    figures: torch.Tensor
    """(2,) loss and gradient's norm, on the device."""
    rows: torch.Tensor | None
    """(B,) finite where a sample's outputs are, on the device."""
    samples: torch.Tensor
    """(B, 2) shard and row, on the host."""


class Recorder:
    """What each step said, kept until somebody looks."""

    def __init__(self, ranks: Ranks, *, scaled: bool) -> None:
        """`scaled`: gradients overflow now and then because a scaler tries how far it can go."""
        self._ranks, self._scaled = ranks, scaled
        self._steps: list[_Said] = []
        self._in_a_row = 0

    @property
    def hopeless(self) -> bool:
        """Whether so many updates in a row were left out that no good one can be expected."""
        return self._in_a_row >= GIVE_UP

    def note(self, step: int, output: Output, samples: torch.Tensor) -> None:
        """Keep what step `step` said of its samples (B, 2); does not wait for the device."""
        figures = torch.stack([output.loss.detach().float(), output.metrics["grad_norm"].float()])
        self._steps.append(_Said(step=step, figures=figures, rows=output.rows, samples=samples.clone()))

    def read(self, loader: LoaderConfig) -> Reading:
        """Look, and forget. All ranks have to call it; it waits for the device once. `loader`: for the keys."""
        steps, self._steps = self._steps, []
        if not steps:
            return Reading(loss=None, skipped=0, bad=[])
        losses, norms = torch.stack([said.figures for said in steps], dim=1).tolist()
        losses = [total / self._ranks.size for total in self._ranks.sums(losses)]
        left_out = [not math.isfinite(norm) for norm in norms]
        self._in_a_row = left_out[::-1].index(False) if False in left_out else self._in_a_row + len(left_out)
        bad = [
            self._explain(said, loss, norm, loader)
            for said, loss, norm in zip(steps, losses, norms, strict=True)
            if not math.isfinite(loss) or not (math.isfinite(norm) or self._scaled)
        ]
        good = [loss for loss in losses if math.isfinite(loss)]
        return Reading(loss=good[-1] if good else None, skipped=sum(left_out), bad=bad)

    def _explain(self, said: "_Said", loss: float, norm: float, loader: LoaderConfig) -> Bad:
        """Whose fault a step was. All ranks have to call it."""
        fine = torch.ones(len(said.samples)) if said.rows is None else said.rows.cpu()
        suspects = self._everybodys(said.samples[~fine.isfinite()])
        whole = not suspects
        places = self._everybodys(said.samples) if whole else suspects
        keys = _keys_if_readable(loader, places) if self._ranks.first else []
        return Bad(step=said.step, loss=loss, grad_norm=norm, keys=keys, whole_batch=whole)

    def _everybodys(self, samples: torch.Tensor) -> list[tuple[int, int]]:
        parts = self._ranks.gather_objects([tuple(place) for place in samples.tolist()])
        return sorted({place for part in parts for place in part})


def keys_of(loader: LoaderConfig, places: list[tuple[int, int]]) -> list[str]:
    """Opaque keys of (shard, row) as a loader numbers them, through all its sets. Reads the shards' tables."""
    shards = []
    for root in (loader.shards, *loader.more_shards):
        manifest = read_manifest(Path(root))
        shards += [(Path(root), manifest, info) for info in manifest.splits[loader.split]]
    keys = []
    for number in sorted({shard for shard, _ in places}):
        with ShardReader(*shards[number]) as reader:
            for row in (row for shard, row in places if shard == number):
                block = row // reader.manifest.block_rows
                keys.append(reader.read_rows(block).keys()[row - reader.block_span(block)[0]])
    return keys


def _keys_if_readable(loader: LoaderConfig, places: list[tuple[int, int]]) -> list[str]:
    """The keys, or where the samples stand: a shard that is gone by now must not hide what is to be told."""
    try:
        return keys_of(loader, places)
    except InputError:
        return [f"shard {shard} row {row}" for shard, row in places]


def append_report(path: Path, bad: list[Bad]) -> None:
    """Add steps to RUN/nonfinite.jsonl: step, loss, gradient's norm (as words: JSON has no NaN), keys."""
    rows = [asdict(each) | {"loss": str(each.loss), "grad_norm": str(each.grad_norm)} for each in bad]
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def complain(reading: Reading, recorder: Recorder, config: TrainConfig, report: Path | None) -> None:
    """Report the steps without a number, on rank 0 (which alone has `report`); InputError where the run has to end."""
    if report is not None and reading.bad:
        append_report(report, reading.bad)
        sys.stderr.write("".join(f"warning: {bad.describe()}; its update was not made\n" for bad in reading.bad))
        sys.stderr.flush()
    if recorder.hopeless:
        raise InputError(
            f"no update could be made in the last {GIVE_UP} steps; lower --optim.lr, or look at RUN/{REPORT}"
        )
    if reading.bad and config.on_nonfinite == "stop":
        raise InputError(
            f"{reading.bad[0].describe()} (all in RUN/{REPORT}); its update was not made and nothing was saved since. "
            "Lower --optim.lr, or leave images out with --data.exclude, or go on with --resume auto --on-nonfinite skip"
        )


@torch.no_grad()
def all_finite(model: nn.Module | None) -> bool:
    """Whether every weight is a number; waits for the device. An update can overflow where no gradient has."""
    if model is None:
        return True
    norms = torch._foreach_norm(list(model.parameters()))
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())
