"""The optimizer, in one fused kernel, and the bound on the logit scale."""

import math

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
