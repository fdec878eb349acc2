"""Named presets: functions that return a whole config. `shards` and `out` are left for the command line."""

from collections.abc import Callable

import tyro

from train.config import DataConfig, OptimConfig, TrainConfig
from train.model import ModelConfig


def tiny() -> TrainConfig:
    """A small CNN and a two-layer text tower: learns the phantom in minutes on two CPU cores."""
    return TrainConfig(
        shards=tyro.MISSING,
        out=tyro.MISSING,
        preset="tiny",
        steps=800,
        batch_size=64,
        log_every=10,
        validate_every=100,
        save_every=100,
        data=DataConfig(flip_guard=True),
        model=ModelConfig(),
        optim=OptimConfig(lr=3e-3, schedule="cosine", warmup=50, weight_decay=0.2, clip=1.0),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {"tiny": tiny}
"""Name on the command line -> the function."""
