"""Two trainers on the same towers, the same batch and the same optimizer: ours, and open_clip's as its authors run it.

What each gets:

    ours        the `Step` that train.main runs: channels_last where the config says so, text cut to the longest report
                of the batch, fused optimizer, no host sync, norm of the gradient taken in every step
    open_clip   its `train_one_epoch`, unchanged, reading losses back every 100 steps as it does by default; the
                optimizer that its main would build (AdamW in its two groups, `--opt timm/momentum` for SGD);
                contiguous images and the whole context of tokens, as its loader delivers them; they lie on the device
                already, so that copying costs it nothing; `--precision amp_bf16` where ours is bf16, `amp` where fp16;
                `--torchcompile` wraps the model in torch.compile, with nothing else around it
    both        start from equal weights, at the same learning rate, and clip the gradient alike (not at all in the
                recipes); TF32 and cuDNN settings are torch's defaults for both
"""

import argparse
import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.batch import Batch
from train.config import TrainConfig
from train.device import Precision
from train.optim import build_optimizer
from train.ranks import Ranks
from train.state import Learner
from train.step import build_step

LOG_EVERY = 100
"""open_clip's --log-every-n-steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What all trainers of a bench share."""

    config: TrainConfig
    """Optimizer, precision, clipping; `compile` is set by each case."""
    model: nn.Module
    """The towers as they begin, on the device; every trainer takes a copy."""
    precision: Precision


class Ours:
    """Our step, on one resident batch."""

    def __init__(self, setup: Setup, batch: Batch, *, compiled: bool) -> None:
        config = replace(setup.config, compile=compiled, ema=None, accumulate=1, batch_size=len(batch))
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = copy.deepcopy(setup.model).to(memory_format=layout)
        self.learner = Learner(
            model=model, optimizer=build_optimizer(model, config.optim), scaler=setup.precision.scaler(), ema=None
        )
        self.step = build_step(config, self.learner, setup.precision, Ranks())
        self._batch, self._lr = batch, config.optim.lr

    def run(self, steps: int) -> None:
        """Launch so many steps."""
        for _ in range(steps):
            self.step(self._batch, self._lr)


class OpenClip:
    """open_clip's trainer over an epoch of the same batch."""

    def __init__(self, setup: Setup, batch: Batch, *, compiled: bool) -> None:
        from open_clip.loss import ClipLoss
        from open_clip_train.scheduler import const_lr

        optim = setup.config.optim
        model = copy.deepcopy(setup.model).to(memory_format=torch.contiguous_format)
        original = AsOpenClip(model)
        self._optimizer = _optimizer(original, setup.config)
        self._model = torch.compile(original) if compiled else original
        self._scaler = setup.precision.scaler() if setup.precision.name == "fp16" else None
        self._loss = ClipLoss(local_loss=False, gather_with_grad=False, rank=0, world_size=1)
        self._schedule = const_lr(self._optimizer, optim.lr, 0, 0)
        self._batch = batch.images.contiguous(), batch.tokens
        self._args = _arguments(setup, len(batch))

    def run(self, steps: int) -> None:
        """Run its loop over an epoch of so many batches."""
        from open_clip_train.train import train_one_epoch

        data = {"train": Epoch([self._batch] * steps)}
        train_one_epoch(
            self._model, data, self._loss, 0, self._optimizer, self._scaler, self._schedule, None, self._args
        )


class AsOpenClip(nn.Module):
    """Our towers behind the face of open_clip's models: a dict comes out, and `logit_scale` can be clamped."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def logit_scale(self) -> Tensor:
        """The parameter itself."""
        return self.model.logit_scale  # type: ignore[return-value]

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Unit vectors (B, D) of both sides and the scale ()."""
        image, text, scale = self.model(images, tokens)
        return {"image_features": image, "text_features": text, "logit_scale": scale}


class Epoch(list[tuple[Tensor, Tensor]]):
    """What open_clip calls data["train"], and its `dataloader` in one: batches with their number."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__(batches)
        self.dataloader, self.num_batches = self, len(batches)
        self.num_samples = sum(len(images) for images, _ in batches)

    def set_epoch(self, epoch: int) -> None:
        """All epochs are alike."""


def _arguments(setup: Setup, batch_size: int) -> argparse.Namespace:
    """The part of open_clip's command line that its training loop reads."""
    names = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}
    return argparse.Namespace(
        device=str(setup.precision.device),
        precision=names[setup.precision.name],
        grad_clip_norm=setup.config.optim.clip,
        batch_size=batch_size,
        log_every_n_steps=LOG_EVERY,
        accum_freq=1,
        world_size=1,
        rank=0,
        local_rank=0,
        distill=False,
        skip_scheduler=False,
        horovod=False,
        wandb=False,
    )


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """As open_clip_train.main builds it: `--opt adamw` in two groups, or `--opt timm/momentum` (timm's plain SGD)."""
    optim = config.optim
    if optim.optimizer == "sgd":
        from timm.optim import create_optimizer_v2

        name = "sgd" if optim.nesterov else "momentum"
        return create_optimizer_v2(model, name, lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = [p for n, p in named if p.ndim < 2 or any(part in n for part in ("bn", "ln", "bias", "logit_scale"))]
    chosen = {id(parameter) for parameter in plain}
    rest = [parameter for _, parameter in named if id(parameter) not in chosen]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": optim.weight_decay}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
