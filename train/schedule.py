"""The learning rate of a step, and what validations have to say about it.

All schedules but `plateau` are pure functions of the step, so there is nothing of them to save. `plateau`, and the end
of a run that no longer improves, count validations; their counts are part of a checkpoint.
"""

import math
from dataclasses import dataclass, field

from train.config import OptimConfig

START_DIVISOR, END_DIVISOR = 25.0, 1e4
"""one-cycle starts at peak / 25 and ends at 1 / 10,000 of that, as torch's `OneCycleLR` does."""
MOMENTUM, MOMENTUM_AT_PEAK = 0.95, 0.85
"""Its momentum, too, at the ends and at the peak."""


@dataclass(kw_only=True, slots=True)
class Patience:
    """How many validations in a row brought no lower loss."""

    best: float | None = None
    """The lowest loss so far, of those that were lower by enough."""
    bad: int = 0
    """Validations since then."""

    def note(self, loss: float, min_delta: float) -> None:
        """Count a validation; a loss that is no number is no lower."""
        if math.isfinite(loss) and (self.best is None or loss < self.best - min_delta):
            self.best, self.bad = loss, 0
        else:
            self.bad += 1


@dataclass(kw_only=True, slots=True)
class Plateau:
    """How often the plateau schedule has lowered the learning rate, as torch's `ReduceLROnPlateau` does."""

    patience: Patience = field(default_factory=Patience)
    cuts: int = 0
    """Times it was lowered."""

    def note(self, loss: float, min_delta: float, config: OptimConfig) -> None:
        """Count a validation; lower the learning rate after one too many."""
        self.patience.note(loss, min_delta)
        if self.patience.bad > config.plateau_patience:
            self.cuts += 1
            self.patience.bad = 0


def learning_rate(config: OptimConfig, step: int, steps: int, cuts: int = 0) -> float:
    """Learning rate of step `step` (0 is the first) of `steps`; `cuts` of the plateau schedule, which alone has any."""
    if config.schedule == "one-cycle":
        start = config.lr / START_DIVISOR
        return _one_cycle((start, config.lr, start / END_DIVISOR), config.warmup, step, steps)
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "plateau":
        return config.lr * config.plateau_factor**cuts
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def momentum(config: OptimConfig, step: int, steps: int) -> float | None:
    """SGD's momentum or AdamW's first beta in a step, which one-cycle alone moves; None: as it is set."""
    if config.schedule != "one-cycle" or (config.optimizer == "sgd" and not config.momentum):
        return None
    return _one_cycle((MOMENTUM, MOMENTUM_AT_PEAK, MOMENTUM), config.warmup, step, steps)


def _one_cycle(values: tuple[float, float, float], warmup: int, step: int, steps: int) -> float:
    """From the first value to the second in step `warmup`, then to the third in the last step, along cosines."""
    begin, peak, end = values
    top = max(0, warmup - 1)
    if step < top:
        return _along_cosine(begin, peak, step / top)
    return _along_cosine(peak, end, (step - top) / max(1, steps - 1 - top))


def _along_cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * share))
