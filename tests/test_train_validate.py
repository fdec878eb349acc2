"""Validation: rows in row order whatever the batch, the loss as it is defined."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.config import LoaderConfig
from shards.manifest import read_manifest
from shards.reader import ShardReader
from train import objective
from train.device import Precision
from train.model import ModelConfig, build_model
from train.objective import contrastive_loss, embed_split, validation_loss
from train.ranks import Ranks

CPU = Precision(name="fp32", device=torch.device("cpu"))


def loader(shards: Path, batch_size: int, split: str = "val") -> LoaderConfig:
    """Small images of a whole split."""
    return LoaderConfig(shards=shards, split=split, mode="eval", backend="cpu", batch_size=batch_size, threads=1)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """The tiny model, untrained."""
    torch.manual_seed(0)
    return build_model(ModelConfig(widths=(16, 16, 16, 16)), vocab_size=49408, context=77)


def test_groups_are_weighted_by_their_size() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(70, 8, generator=generator), dim=-1) for _ in range(2))
    scale = torch.tensor(10.0)

    def group(rows: slice) -> float:
        logits, right = scale * images[rows] @ texts[rows].T, torch.arange(len(images[rows]))
        return float(F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

    expected = (64 * group(slice(0, 64)) + 6 * group(slice(64, 70))) / 70
    assert contrastive_loss(images, texts, scale).item() == pytest.approx(expected, rel=1e-6)


def test_every_row_once_in_row_order(model: torch.nn.Module, shards_dir: Path) -> None:
    manifest = read_manifest(shards_dir)
    embedded = embed_split(model, loader(shards_dir, 5, "train"), CPU, Ranks())
    expected = []
    for info in manifest.splits["train"]:
        with ShardReader(shards_dir, manifest, info) as reader:
            expected += [reader.read_rows(block).labels for block in range(reader.blocks)]
    np.testing.assert_array_equal(embedded.labels.numpy(), np.concatenate(expected))
    assert len(embedded) == manifest.rows("train") == len(embedded.texts)
    torch.testing.assert_close(embedded.images.norm(dim=1), torch.ones(len(embedded)))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_loss_does_not_depend_on_the_batch(model: torch.nn.Module, shards_dir: Path, batch_size: int) -> None:
    model.train()
    loss = validation_loss(model, loader(shards_dir, batch_size), CPU, Ranks())
    assert loss == pytest.approx(validation_loss(model, loader(shards_dir, 16), CPU, Ranks()), rel=1e-5)
    assert model.training


def test_the_loss_does_not_depend_on_the_cut_of_texts(
    model: torch.nn.Module, shards_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = validation_loss(model, loader(shards_dir, 16), CPU, Ranks())
    widths = []

    def whole(tokens: torch.Tensor, length: int) -> torch.Tensor:
        widths.append((tokens.shape[1], length))
        return tokens

    monkeypatch.setattr(objective, "cut_tokens", whole)
    assert validation_loss(model, loader(shards_dir, 16), CPU, Ranks()) == pytest.approx(cut, rel=1e-5)
    assert widths and all(width == 77 and 2 < length < 60 for width, length in widths)
