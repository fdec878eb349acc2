"""The seam: the objectives of the supervised and the self-supervised recipe through the one loop and the one step."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_train_loop import SMALL, column, newest
from torch import nn

from pipeline.batch import Batch, World
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
from train.architecture import ModelConfig
from train.checkpoint import list_checkpoints
from train.config import OptimConfig
from train.device import Precision
from train.main import main
from train.model import build_model
from train.objective import Output, Tensors
from train.optim import build_optimizer
from train.ranks import Ranks
from train.state import Learner
from train.step import Step

CPU = Precision(name="fp32", device=torch.device("cpu"))
FINDINGS = 2
"""Labels of the fixture `shards_dir`."""


class Classifier(nn.Module):
    """An image tower, and a logit for each finding."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower, self.head = tower, nn.Linear(width, FINDINGS)

    def forward(self, images: torch.Tensor) -> Tensors:
        return (self.head(self.tower(images)),)


class Supervised:
    """Binary cross entropy over the labels that are known, smoothed: y (1 - a) + a / 2."""

    def __init__(self, ranks: Ranks, *, label_smoothing: float = 0.0, shuffle_seed: int | None = None) -> None:
        assert shuffle_seed is None
        self._ranks, self._smoothing = ranks, label_smoothing

    def inputs(self, batch: Batch) -> Tensors:
        return (batch.images,)

    def loss(self, outputs: Tensors, batch: Batch) -> Output:
        (logits,) = (each.float() for each in outputs)
        known = (batch.labels >= 0).float()  # neither uncertain nor NaN
        targets = batch.labels.nan_to_num().clamp(min=0) * (1 - self._smoothing) + self._smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logits, targets, known)
        return Output(loss=loss, metrics={"known": known.mean()}, rows=logits.detach().sum(dim=1))

    def constrain(self, model: nn.Module) -> None: ...

    def validate(self, model: nn.Module, loader: LoaderConfig, precision: Precision, ranks: Ranks) -> float:
        model.eval()
        with build_loader(loader, ranks.world(precision.device)) as batches, torch.inference_mode():
            losses = [self.loss(model(batch.images), batch).loss * len(batch) for batch in batches]
            rows = batches.samples
        model.train()
        return ranks.sums([torch.stack(losses).sum().item()])[0] / rows


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    """train.main trains a classifier."""

    def build(config: ModelConfig, **_: int) -> nn.Module:
        tower = build_model(config, vocab_size=49408, context=77, image_size=64).image
        return Classifier(tower, config.embed_dim)

    monkeypatch.setattr("train.job.build_model", build)
    monkeypatch.setattr("train.step.Contrastive", Supervised)


@pytest.mark.usefixtures("supervised")
def test_a_supervised_run_needs_no_other_loop(shards_dir: Path, tmp_path: Path) -> None:
    """Validated, averaged, in parts; stopped and gone on with, it ends with the same bytes."""
    options = ("--accumulate", "4", "--ema", "0.8", "--label-smoothing", "0.1", "--validate-every", "4")
    runs = {"whole": (("--steps", "12"),), "cut": (("--stop-at", "7"), ("--resume", "auto"))}
    for name, lives in runs.items():
        for more in lives:
            main(["--shards", str(shards_dir), "--out", str(tmp_path / name), *SMALL, *options, *more])
    losses, known = (column(tmp_path / "whole", each) for each in ("val_loss", "known"))
    assert list(losses) == [4, 8, 12] and losses[12] < losses[4]
    assert all(0.5 < share < 1 for share in known.values())
    files = [list_checkpoints(tmp_path / name / "checkpoints")[0][1] for name in runs]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "head.weight" in newest(tmp_path / "cut")["ema"]


class TwoViews(nn.Module):
    """An image tower and SimCLR's projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = ModelConfig(widths=(16, 16, 16, 16))
        self.tower = build_model(config, vocab_size=49408, context=77, image_size=64).image
        self.project = nn.Linear(config.embed_dim, 16)

    def forward(self, images: torch.Tensor) -> Tensors:
        return (F.normalize(self.project(self.tower(images)), dim=-1),)


class SelfSupervised(Supervised):
    """SimCLR's NT-Xent (Chen et al. 2020, equation 1): each view has to find the other view of its film."""

    def loss(self, outputs: Tensors, batch: Batch) -> Output:
        (features,) = outputs  # (2 B, D): view v of film i is row v B + i
        likeness = features @ features.T / 0.07
        likeness = likeness.masked_fill(torch.eye(len(features), dtype=torch.bool), -torch.inf)
        right = torch.arange(len(features)).roll(len(batch))
        return Output(loss=F.cross_entropy(likeness, right), rows=features.detach().sum(dim=1))


def test_two_views_of_a_film_train_in_parts_as_at_once(shards_dir: Path) -> None:
    config = LoaderConfig(shards=shards_dir, views=2, batch_size=8, image_size=64, scale=(0.2, 1.0), backend="cpu")
    with build_loader(config, World()) as loader:
        batch = next(loader)
        batch = dataclasses.replace(batch, images=batch.images.clone())
    assert batch.images.shape == (16, 3, 64, 64) and not batch.images[:8].equal(batch.images[8:])
    losses, weights = [], []
    for parts in (1, 4):
        model = TwoViews().to(memory_format=torch.channels_last)
        optimizer = build_optimizer(model, OptimConfig(optimizer="sgd", momentum=0.0))
        learner = Learner(model=model, optimizer=optimizer, scaler=CPU.scaler())
        step = Step(learner, SelfSupervised(Ranks()), CPU, Ranks(), parts=parts)
        losses.append([step(batch, 0.1).loss.item() for _ in range(3)])
        weights.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][2] < losses[0][0]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
