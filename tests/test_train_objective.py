"""The objective: its loss by hand, the exact cut of texts, the control that breaks the pairing; validation: rows in row
order whatever the batch, the loss as it is defined."""

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.batch import Batch
from pipeline.config import LoaderConfig
from shards.manifest import read_manifest
from shards.reader import ShardReader
from train import objective
from train.architecture import ModelConfig
from train.device import Precision
from train.model import build_model
from train.objective import Contrastive, contrastive_loss, cut_tokens, embed_split, shuffle_reports, validation_loss
from train.ranks import Ranks

START, END, CONTEXT = 49406, 49407, 77


def reports(lengths: list[int], seed: int = 0) -> torch.Tensor:
    """Token ids (n, 77) of made-up reports of so many tokens, start and end included."""
    rng = np.random.default_rng(seed)
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, 0], tokens[row, length - 1] = START, END
        tokens[row, 1 : length - 1] = torch.from_numpy(rng.integers(0, 40000, length - 2))
    return tokens


def batch_of(tokens: torch.Tensor, position: int = 0) -> Batch:
    """A batch with these reports and random images."""
    count = len(tokens)
    return Batch(
        images=torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(1)),
        tokens=tokens,
        labels=torch.zeros(count, 0),
        samples=torch.zeros(count, 2, dtype=torch.int64),
        position=position,
        text_length=int(tokens.argmax(dim=1).max()) + 1,
    )


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """The tiny model."""
    torch.manual_seed(0)
    return build_model(ModelConfig(widths=(16, 16, 16, 16)), vocab_size=49408, context=CONTEXT).eval()


@pytest.mark.parametrize(
    ("length", "width"), [(0, 16), (2, 16), (16, 16), (17, 32), (64, 64), (65, 77), (76, 77), (77, 77)]
)
def test_texts_are_cut_in_steps(length: int, width: int) -> None:
    assert cut_tokens(torch.zeros(3, CONTEXT), length).shape == (3, width)


@pytest.mark.parametrize("longest", [2, 15, 16, 17, 40, 64, 77])
def test_the_cut_is_exact(model: torch.nn.Module, longest: int) -> None:
    tokens = reports([2, max(2, longest - 1), longest])
    with torch.inference_mode():
        whole, cut = model.encode_text(tokens), model.encode_text(cut_tokens(tokens, longest))
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


def test_the_loss_is_symmetric_infonce(model: torch.nn.Module) -> None:
    batch, objective = batch_of(reports([5, 9, 20, 33])), Contrastive(Ranks())
    output = objective.loss(model(*objective.inputs(batch)), batch)
    image, text, scale = model(batch.images, batch.tokens)
    logits, right = scale * image @ text.T, torch.arange(4)
    expected = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.metrics["logit_scale"], torch.tensor(1 / 0.07))


def test_smoothing_spreads_the_target_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    batch = batch_of(reports([5] * 5))
    output = Contrastive(Ranks(), label_smoothing=0.2).loss((image, text, torch.tensor(10.0)), batch)
    target = 0.8 * torch.eye(5) + 0.2 / 5
    logits = 10.0 * image @ text.T
    expected = -sum((target * each.log_softmax(1)).sum(1).mean() for each in (logits, logits.T)) / 2
    torch.testing.assert_close(output.loss, expected)


def test_rows_point_at_samples_without_a_number() -> None:
    image, text = torch.ones(5, 8), torch.ones(5, 8)
    image[1, 3], text[4, 0] = float("nan"), float("inf")
    output = Contrastive(Ranks()).loss((image, text, torch.tensor(10.0)), batch_of(reports([5] * 5)))
    assert output.rows.isfinite().tolist() == [True, False, True, True, False]


@dataclasses.dataclass(frozen=True)
class _FakeRanks:
    """Two ranks played one after the other."""

    rank: int
    parts: list[torch.Tensor]

    @property
    def size(self) -> int:
        return len(self.parts)

    def gather(self, _: torch.Tensor) -> list[torch.Tensor]:
        return self.parts


def test_shuffling_permutes_the_global_batch_alike_on_any_ranks() -> None:
    tokens = reports(list(range(3, 15)))
    one = shuffle_reports(batch_of(tokens, position=24), Ranks(), seed=5)
    parts = [tokens[0::2], tokens[1::2]]
    two = [
        shuffle_reports(batch_of(parts[rank], position=24), _FakeRanks(rank, parts), seed=5)  # type: ignore[arg-type]
        for rank in (0, 1)
    ]
    assert torch.stack([two[0].tokens, two[1].tokens], dim=1).flatten(0, 1).equal(one.tokens)
    assert sorted(map(tuple, one.tokens.tolist())) == sorted(map(tuple, tokens.tolist()))
    assert two[0].text_length == int(two[0].tokens.argmax(1).max()) + 1
    other = shuffle_reports(batch_of(tokens, position=36), Ranks(), seed=5)
    assert not other.tokens.equal(one.tokens)


def test_shuffling_prefers_no_report() -> None:
    """Every image meets every report of the batch equally often, its own too: nothing is left to learn."""
    tokens = reports([3, 4, 5, 6])
    met = Counter()
    for position in range(0, 4000, 4):
        shuffled = shuffle_reports(batch_of(tokens, position=position), Ranks(), seed=1).tokens
        met.update((image, int(length)) for image, length in enumerate(shuffled.argmax(1)))
    assert len(met) == 16
    assert all(190 < count < 310 for count in met.values()), met  # 250 expected, standard deviation 14


CPU = Precision(name="fp32", device=torch.device("cpu"))


def loader(shards: Path, batch_size: int, split: str = "val") -> LoaderConfig:
    """Small images of a whole split."""
    return LoaderConfig(shards=shards, split=split, mode="eval", backend="cpu", batch_size=batch_size, threads=1)


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


def test_rows_of_two_ranks_stand_in_row_order_again() -> None:
    """Rank 1 has one less, and pads its share."""
    rows, two = torch.arange(1.0, 8.0)[:, None], torch.zeros(8, 1)
    two[:7] = rows
    ranks = SimpleNamespace(
        size=2, gather_objects=lambda widths: [widths, widths], gather=lambda _: [two[::2], two[1::2]]
    )
    for found in objective._gather_rows([rows[::2]] * 3, 7, CPU.device, ranks):  # type: ignore[arg-type]
        assert found.equal(rows)


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
