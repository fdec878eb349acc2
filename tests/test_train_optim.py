"""The optimizers, their weight decay, updates left out; the bound on the logit scale; the moving average."""

import pytest
import torch

from shards.errors import InputError
from train.architecture import ModelConfig
from train.config import OptimConfig
from train.model import build_model
from train.optim import (
    MAX_LOGIT_SCALE,
    build_average,
    build_optimizer,
    clamp_logit_scale,
    ramped,
    update,
    update_average,
)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(InputError, match="-1"):
        OptimConfig(lr=-1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_matrices_alone_decay_and_the_scale_is_bounded(optimizer: str) -> None:
    model = build_model(ModelConfig(), vocab_size=100, context=16)
    groups = build_optimizer(model, OptimConfig(optimizer=optimizer, weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert all(decay[id(p)] == (0.3 if p.ndim >= 2 else 0) for p in model.parameters())
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    clamp_logit_scale(model)
    assert model.logit_scale.exp().item() == pytest.approx(100.0)
    assert model.logit_scale.item() <= MAX_LOGIT_SCALE + 1e-6
    with torch.no_grad():
        model.logit_scale.fill_(-1.0)
    clamp_logit_scale(model)
    assert model.logit_scale.exp().item() == 1.0


def linear(seed: int = 0) -> torch.nn.Linear:
    """Five inputs, three outputs."""
    torch.manual_seed(seed)
    return torch.nn.Linear(5, 3)


OPTIMIZERS = [
    OptimConfig(lr=0.1, weight_decay=0.01),
    OptimConfig(lr=0.1, optimizer="sgd", weight_decay=0.01),
    OptimConfig(lr=0.1, optimizer="sgd", weight_decay=0.0, momentum=0.0),
    OptimConfig(lr=0.1, optimizer="sgd", weight_decay=0.0, nesterov=True),
]


def train(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, steps: int, bad: tuple[int, ...] = ()) -> None:
    """So many updates by gradients that depend on the step and the weights, those of `bad` steps no numbers."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    kept = [step for step in range(steps) if step not in bad]
    for step in range(steps):
        number = kept.index(step) if step in kept else 0
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        loss = model(inputs).square().sum() * (float("nan") if step in bad else 1.0)
        loss.backward()
        if optimizer.defaults["fused"]:
            update(optimizer, scaler, torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
        else:
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("config", OPTIMIZERS)
def test_updates_are_torchs_plain_ones(config: OptimConfig) -> None:
    """The fused kernels, and SGD's momentum that starts as zeros, against the loops over tensors."""
    mine, theirs = linear(), linear()
    groups = [{"params": [theirs.weight], "weight_decay": config.weight_decay}, {"params": [theirs.bias]}]
    if config.optimizer == "adamw":
        plain: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=0.1, betas=config.betas, eps=config.eps, weight_decay=0.0, foreach=False
        )
    else:
        plain = torch.optim.SGD(groups, lr=0.1, momentum=config.momentum, nesterov=config.nesterov, foreach=False)
    train(mine, build_optimizer(mine, config), 5)
    train(theirs, plain, 5)
    torch.testing.assert_close(mine.weight, theirs.weight)
    torch.testing.assert_close(mine.bias, theirs.bias)


@pytest.mark.parametrize("config", OPTIMIZERS)
@pytest.mark.parametrize("bad", [(0,), (2,), (0, 1, 4, 6)])
def test_an_update_without_a_number_is_as_if_it_had_not_been(config: OptimConfig, bad: tuple[int, ...]) -> None:
    """The very first one too, before momentum and moments are there."""
    whole, holed = linear(), linear()
    train(whole, build_optimizer(whole, config), 7 - len(bad))
    optimizer = build_optimizer(holed, config)
    train(holed, optimizer, 7, bad)
    assert holed.weight.equal(whole.weight) and holed.bias.equal(whole.bias)


def test_the_average_follows_the_weights_along_a_ramp() -> None:
    assert [ramped(0.9, step) for step in (1, 2, 80, 81, 1000)] == pytest.approx([2 / 11, 3 / 12, 0.9, 0.9, 0.9])
    model = linear()
    average, expected = build_average(model, 0.9), model.weight.detach().double()
    assert build_average(model, None) is None
    for step in range(1, 30):
        with torch.no_grad():
            model.weight += 0.1 * step
        update_average(average, model, 0.9, step)
        expected = ramped(0.9, step) * expected + (1 - ramped(0.9, step)) * model.weight.detach().double()
    torch.testing.assert_close(average.weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert average.state_dict().keys() == model.state_dict().keys() and not average.weight.requires_grad
