"""One optimizer step: forward, backward, update. The only place where gradients are made, and free of host syncs."""

import math
import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.batch import Batch
from train.device import Precision
from train.objective import Objective, Output
from train.optim import clamp_logit_scale, set_learning_rate
from train.ranks import Ranks
from train.state import Learner


class Step:
    """Trains a learner in place, one batch a call."""

    def __init__(
        self, learner: Learner, objective: Objective, precision: Precision, ranks: Ranks, *, clip: float | None = None
    ) -> None:
        """`clip`: largest norm of the gradient; None: no limit."""
        self._model, self._optimizer, self._scaler = learner.model, learner.optimizer, learner.scaler
        self._objective, self._precision = objective, precision
        self._clip = math.inf if clip is None else clip
        self._wrapped = distribute(learner.model, precision.device, ranks)

    def __call__(self, batch: Batch, lr: float) -> Output:
        """Train on one batch; what comes back is still being computed where the device is a GPU."""
        output = self._backward(batch)
        output.metrics["grad_norm"] = self._clip_gradients()
        set_learning_rate(self._optimizer, lr)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        clamp_logit_scale(self._model)
        return output

    def warm_up(self, batch: Batch) -> None:
        """Forward and backward on a batch that teaches nothing: no weight changes.

        DDP sorts its gradient buckets anew after the first backward, and from three ranks on another bucket means
        another order of summation. Done before the first step of every run, fresh or resumed, both see the same sums.
        """
        device = self._precision.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._backward(batch)
        self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch) -> Output:
        output = self._objective(self._forward, batch)
        self._scaler.scale(output.loss).backward()
        return output

    def _clip_gradients(self) -> torch.Tensor:
        """Bound the gradient's norm; returns the norm () before, still on the device."""
        self._scaler.unscale_(self._optimizer)
        return nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)

    def _forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with self._precision.autocast():
            return self._wrapped(images, tokens)


def distribute(model: nn.Module, device: torch.device, ranks: Ranks) -> nn.Module:
    """The model under DDP where there are several ranks. Buffers are constants here and are not broadcast."""
    if ranks.size == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.14 wants another name for broadcast_buffers, which the older versions that we allow do not have.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
