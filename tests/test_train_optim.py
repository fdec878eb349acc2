"""Learning rate, weight decay, the bound on the logit scale."""

import math

import pytest
import torch

from shards.errors import InputError
from train.config import OptimConfig
from train.model import ModelConfig, build_model
from train.optim import MAX_LOGIT_SCALE, build_optimizer, clamp_logit_scale, learning_rate


def test_warm_up_then_cosine() -> None:
    config = OptimConfig(lr=1.0, warmup=10, schedule="cosine")
    assert [learning_rate(config, step, 110) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(config, 60, 110) == pytest.approx(0.5)
    assert learning_rate(config, 109, 110) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


def test_constant_stays() -> None:
    config = OptimConfig(lr=0.5, warmup=0, schedule="constant")
    assert {learning_rate(config, step, 100) for step in range(100)} == {0.5}


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(InputError, match="-1"):
        OptimConfig(lr=-1)


def test_matrices_alone_decay_and_the_scale_is_bounded() -> None:
    model = build_model(ModelConfig(), vocab_size=100, context=16)
    groups = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert all(decay[id(p)] == (0.3 if p.ndim >= 2 else 0) for p in model.parameters())
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    clamp_logit_scale(model)
    assert model.logit_scale.exp().item() == pytest.approx(100.0)
    assert model.logit_scale.item() <= MAX_LOGIT_SCALE + 1e-6
