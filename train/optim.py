"""AdamW and the learning rate, which is a pure function of the step: a schedule has no state to save."""

import math

import torch
from torch import nn

from train.config import OptimConfig

MAX_LOGIT_SCALE = math.log(100.0)
"""CLIP's bound: a temperature of at least 0.01."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in one fused kernel, weight decay on parameters with two dimensions or more."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (0 is the first) of `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all parameter groups the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clamp_logit_scale(model: nn.Module) -> None:
    """Keep the model's `logit_scale` (a logarithm) at or below MAX_LOGIT_SCALE; no host sync."""
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)  # type: ignore[operator]
