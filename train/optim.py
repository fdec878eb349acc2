"""The optimizer, in one fused kernel; its learning rate over the steps; a moving average of the weights.

All schedules but `plateau` are pure functions of the step, so there is nothing of them to save. `plateau`, and the end
of a run that no longer improves, count validations; their counts are part of a checkpoint.
"""

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import nn

from train.config import OptimConfig

MAX_LOGIT_SCALE = math.log(100.0)
"""CLIP's bound: a temperature of at least 0.01."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay on parameters with two dimensions or more."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    if config.momentum:
        # torch 2.14 leaves the momentum uninitialised where the very first update is skipped; zeros give the same sums.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None = None) -> None:
    """Give all parameter groups a learning rate, and a momentum (AdamW's first beta) where there is one to give."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if momentum is not None:
            group |= {"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum}


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, norm: torch.Tensor) -> None:
    """One update, not made where the gradient's norm () is no number: decided on the device, without waiting for it.

    The fused kernels look at a flag first, as they do for a scaler, which sets the flag itself where it is in use.
    """
    if not scaler.is_enabled():
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    scaler.step(optimizer)
    scaler.update()


def clamp_logit_scale(model: nn.Module) -> None:
    """Keep the model's `logit_scale` (a logarithm) within [0, MAX_LOGIT_SCALE], as open_clip does; no host sync."""
    with torch.no_grad():
        model.logit_scale.clamp_(min=0.0, max=MAX_LOGIT_SCALE)  # type: ignore[operator]


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


def build_average(model: nn.Module, decay: float | None) -> nn.Module | None:
    """A copy of the model, with its names, that holds the average; None where there is no decay."""
    return None if decay is None else copy.deepcopy(model).requires_grad_(False).eval()


def ramped(decay: float, step: int) -> float:
    """The decay in step `step`, 1 is the first."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Take the weights after step `step` in; no host sync. Buffers are copied as they are."""
    averaged, weights = ([parameter.data for parameter in each.parameters()] for each in (average, model))
    torch._foreach_lerp_(averaged, weights, 1 - ramped(decay, step))
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
