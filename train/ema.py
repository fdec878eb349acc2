"""A moving average of the weights, which validates and evaluates better than the last weights do.

    average <- d average + (1 - d) weights,    d = min(decay, (1 + step) / (10 + step))

The ramp is TensorFlow's `ExponentialMovingAverage`: without it a decay of 0.9999 would hold the random weights of the
beginning for ten thousands of steps. It is a function of the step, so a resumed run goes on bit by bit. A step whose
update was not made counts: the same weights enter once more.
"""

import copy

import torch
from torch import nn


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
