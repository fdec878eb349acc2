"""The learning rate over the steps, against torch's own schedules, and what validations change about it."""

import functools
import math

import pytest
import torch
from torch.optim import lr_scheduler

from train.config import OptimConfig
from train.optim import Patience, Plateau, learning_rate, momentum, set_rates


def rates(config: OptimConfig, steps: int) -> list[float]:
    """The learning rate of every step."""
    return [learning_rate(config, step, steps) for step in range(steps)]


def torchs(make, steps: int, lr: float = 0.1) -> list[float]:
    """What a scheduler of torch gives."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warm_up_then_cosine() -> None:
    config = OptimConfig(lr=1.0, warmup=10, schedule="cosine")
    assert [learning_rate(config, step, 110) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(config, 60, 110) == pytest.approx(0.5)
    assert learning_rate(config, 109, 110) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


def test_cosine_and_linear_are_torchs() -> None:
    cosine = torchs(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=40), 40)
    assert rates(OptimConfig(lr=0.1, warmup=0, schedule="cosine"), 40) == pytest.approx(cosine, abs=1e-12)
    line = torchs(lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=40), 40)
    assert rates(OptimConfig(lr=0.1, warmup=0, schedule="linear"), 40) == pytest.approx(line, abs=1e-12)


@pytest.mark.parametrize("warmup", [4, 12])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_cycle_is_torchs(warmup: int, optimizer: str) -> None:
    """Rate and momentum."""
    make = {"sgd": functools.partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}[optimizer]
    theirs = make([torch.zeros(1, requires_grad=True)], lr=0.1)
    ours = make([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = lr_scheduler.OneCycleLR(theirs, max_lr=0.1, total_steps=40, pct_start=warmup / 40)
    config = OptimConfig(lr=0.1, warmup=warmup, schedule="one-cycle", optimizer=optimizer)  # type: ignore[arg-type]
    for step in range(40):
        set_rates(ours, learning_rate(config, step, 40), momentum(config, step, 40))
        for name in ("lr", "momentum", "betas"):
            group, expected = ours.param_groups[0], theirs.param_groups[0]
            assert group.get(name) == pytest.approx(expected.get(name), abs=1e-12), (step, name)
        theirs.step()
        scheduler.step()


def test_other_schedules_leave_momentum_alone() -> None:
    assert momentum(OptimConfig(schedule="cosine"), 3, 40) is None
    assert momentum(OptimConfig(schedule="one-cycle", optimizer="sgd", momentum=0.0), 3, 40) is None


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "one-cycle", "plateau"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (5, 3), (0, 7), (7, 7)])
def test_every_length_has_a_rate(schedule: str, warmup: int, steps: int) -> None:
    found = rates(OptimConfig(lr=0.5, warmup=warmup, schedule=schedule), steps)  # type: ignore[arg-type]
    assert all(0 <= rate <= 0.5 for rate in found) and found[0] > 0


def test_constant_and_plateau_stay_after_the_warm_up() -> None:
    for schedule in ("constant", "plateau"):
        found = rates(OptimConfig(lr=0.5, warmup=2, schedule=schedule), 6)
        assert found == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_a_plateau_lowers_as_torchs_does() -> None:
    """Losses that improve, stand still, improve by too little; a loss that is no number is no improvement."""
    losses = [3.0, 2.0, 2.0, 1.95, 2.1, 1.99, 1.5, 1.5, math.nan, 1.5, 1.6, 1.6, 1.6, 1.0]
    config = OptimConfig(lr=0.4, warmup=0, schedule="plateau", plateau_factor=0.5, plateau_patience=2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=2, threshold=0.1, threshold_mode="abs", eps=0
    )
    ours = Plateau()
    for step, loss in enumerate(losses):
        ours.note(loss, 0.1, config)
        theirs.step(loss)
        assert learning_rate(config, step, 100, ours.cuts) == optimizer.param_groups[0]["lr"], step
    assert ours.cuts == 3


def test_patience_counts_what_is_not_lower_by_enough() -> None:
    patience = Patience()
    counts = []
    for loss in (math.nan, 2.0, 1.95, 1.9, 1.89, math.inf, 1.0):
        patience.note(loss, 0.1)
        counts.append(patience.bad)
    assert counts == [1, 0, 1, 2, 0, 1, 0] and patience.best == 1.0
