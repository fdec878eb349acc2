"""Objectives: a batch in, loss and metrics out. The loop and the step know nothing else of what is trained.

`Contrastive` is CLIP's: symmetric InfoNCE over the global batch, open_clip's `ClipLoss` with local loss (each rank
scores its own rows against all columns) and features gathered with their gradient.

For validation a split is embedded once: rank r embeds the rows r, r + R, r + 2R, ...; gathered and interleaved they
stand in row order again. The loss is the mean over consecutive groups of GROUP rows, weighted by their size: the same
number for any ranks and any batch size.
"""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import nn

from pipeline.batch import Batch
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
from shards.counter import permutation
from shards.errors import InputError
from train.device import Precision
from train.optim import clamp_logit_scale
from train.ranks import Ranks

Tensors = tuple[torch.Tensor, ...]
Forward = Callable[..., Tensors]
"""The model under autocast and DDP: an objective's inputs (B, ...) -> the model's outputs, (B, ...) or of the model
itself (). Here: images (B, 3, H, W), tokens (B, L) -> two of unit length (B, D) and the logit scale ()."""

_SHUFFLE_WORD = 32
"""First word after the seed; pipeline.order and pipeline.augment have those below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What an objective says about one batch. Tensors stay on the device; nothing has waited for it."""

    loss: torch.Tensor
    """() float32; the mean over the ranks is the loss of the global batch."""
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name -> () tensor, logged as it is on rank 0."""
    rows: torch.Tensor | None = None
    """(B,) a number for each sample that is finite where all of the model's outputs for it are: it finds the samples
    behind a loss that is no number."""


class Objective(Protocol):
    """The seam between the loop and what it trains.

    Between `inputs` and `loss` the step takes the inputs through the model, whole or in parts.
    """

    def inputs(self, batch: Batch) -> Tensors:
        """What of this rank's share of a batch goes through the model, each (B, ...). May talk to the other ranks."""
        ...

    def loss(self, outputs: Tensors, batch: Batch) -> Output:
        """Loss and metrics of this rank's share, from the model's outputs for all of it. May talk to the others."""
        ...

    def constrain(self, model: nn.Module) -> None:
        """Put weights back into their bounds after an update; no host sync."""
        ...

    def validate(self, model: nn.Module, loader: LoaderConfig, precision: Precision, ranks: Ranks) -> float:
        """The loss of a split, the same on all ranks; all have to call it."""
        ...


class Contrastive:
    """Symmetric InfoNCE over all ranks."""

    def __init__(self, ranks: Ranks, *, label_smoothing: float = 0.0, shuffle_seed: int | None = None) -> None:
        """`label_smoothing`: share of each row's target that is spread evenly over all columns of the global batch.
        `shuffle_seed`: the control that pairs each image with some report of its global batch."""
        # open_clip 3.3 gathers by a function that torch 2.14 calls deprecated; it says so on every rank.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"open_clip\.loss")
        self._ranks, self._smoothing, self._shuffle_seed = ranks, label_smoothing, shuffle_seed
        self._clip = ClipLoss(local_loss=True, gather_with_grad=True, rank=ranks.rank, world_size=ranks.size)

    def inputs(self, batch: Batch) -> Tensors:
        """Images (B, 3, H, W) and tokens (B, L), cut to the longest report."""
        if self._shuffle_seed is not None:
            batch = shuffle_reports(batch, self._ranks, self._shuffle_seed)
        return batch.images, cut_tokens(batch.tokens, batch.text_length)

    def loss(self, outputs: Tensors, batch: Batch) -> Output:  # noqa: ARG002
        """Loss over the global batch; logs the logit scale."""
        image, text, scale = (output.float() for output in outputs)
        logits = self._clip.get_logits(image, text, scale)  # (B, global B), by image and by report
        right = self._clip.get_ground_truth(image.device, len(image))
        rows, columns = (F.cross_entropy(each, right, label_smoothing=self._smoothing) for each in logits)
        with torch.no_grad():
            finite = image.sum(dim=1) + text.sum(dim=1)
        return Output(loss=(rows + columns) / 2, metrics={"logit_scale": scale.detach()}, rows=finite)

    def constrain(self, model: nn.Module) -> None:
        """A temperature of at least 0.01."""
        clamp_logit_scale(model)

    def validate(self, model: nn.Module, loader: LoaderConfig, precision: Precision, ranks: Ranks) -> float:
        """The same loss, unsmoothed, within groups of rows."""
        return validation_loss(model, loader, precision, ranks)


def shuffle_reports(batch: Batch, ranks: Ranks, seed: int) -> Batch:
    """The batch with the reports of the *global* batch in an order drawn by (seed, position).

    Every permutation is equally likely, the identity included: were images kept from their own report, or given one of
    their own rank's, the pairing would still tell something about the right one.
    """
    parts = ranks.gather(batch.tokens)
    everyone = torch.stack(parts, dim=1).flatten(0, 1)  # (B x ranks, context), in the order of positions
    order = permutation(len(everyone), seed, _SHUFFLE_WORD, batch.position)
    tokens = everyone[torch.from_numpy(order[ranks.rank :: ranks.size])]
    # The end token has the highest id, so its place is the report's length less one. A host sync, in a control only.
    return dataclasses.replace(batch, tokens=tokens, text_length=int(tokens.argmax(dim=1).max()) + 1)


GROUP = 64
"""Rows that are contrasted with each other in the validation loss."""
TOKEN_STEP = 16


class OtherRankFailed(InputError):
    """Another rank could not read its share of a split, and says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """A whole split, in row order, on the device; the same on every rank."""

    images: torch.Tensor
    """(N, D) float32 of unit length."""
    texts: torch.Tensor
    """(N, D) float32 of unit length."""
    labels: torch.Tensor
    """(N, labels) float32: 1 present, 0 absent, -1 uncertain, NaN unknown."""

    def __len__(self) -> int:
        return len(self.images)


def embed_split(model: nn.Module, loader: LoaderConfig, precision: Precision, ranks: Ranks) -> Embedded:
    """Embed every row of a split once. `loader` has mode `eval`; all ranks have to call it.

    InputError, on all of them, where a rank cannot read its share.
    """
    columns: list[torch.Tensor] = []
    rows, failure = 0, None
    try:
        columns, rows = _embed_share(model, loader, precision, ranks)
    except InputError as error:
        failure = error
    if ranks.any(failure is not None):
        raise failure or OtherRankFailed("another rank cannot read its share of the split")
    images, texts, labels = _gather_rows(columns, rows, precision.device, ranks)
    return Embedded(images=images, texts=texts, labels=labels)


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The validation loss () of unit vectors (N, D): symmetric InfoNCE within groups of GROUP consecutive rows."""
    total = torch.zeros((), dtype=torch.float64, device=images.device)
    for image, text in zip(images.split(GROUP), texts.split(GROUP), strict=True):
        logits = scale * image @ text.T  # (rows, rows)
        right = torch.arange(len(image), device=images.device)
        total += (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)).double() / 2 * len(image)
    return total / len(images)


def validation_loss(model: nn.Module, loader: LoaderConfig, precision: Precision, ranks: Ranks) -> float:
    """The loss of a split, on all ranks."""
    embedded = embed_split(model, loader, precision, ranks)
    with torch.inference_mode():
        scale = model.logit_scale.float().exp()  # type: ignore[operator]
        return contrastive_loss(embedded.images, embedded.texts, scale).item()


def cut_tokens(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """tokens (B, context) cut to the longest report, `length` tokens, rounded up to steps of TOKEN_STEP: (B, L).

    Exact, because the text tower is causal and all that is cut off follows every end token. Steps keep the number of
    shapes small.
    """
    wanted = -(-max(length, 1) // TOKEN_STEP) * TOKEN_STEP
    return tokens[:, : min(wanted, tokens.shape[1])]


def _embed_share(
    model: nn.Module, loader: LoaderConfig, precision: Precision, ranks: Ranks
) -> tuple[list[torch.Tensor], int]:
    """This rank's columns of images, texts and labels, none where it has no row; and the rows of all ranks."""
    was_training = model.training
    model.eval()
    with build_loader(loader, ranks.world(precision.device)) as batches, torch.inference_mode():
        parts = [_embed_batch(model, batch, precision) for batch in batches if len(batch)]
        rows = batches.samples
    model.train(was_training)
    return [torch.cat(column) for column in zip(*parts, strict=True)], rows


def _embed_batch(model: nn.Module, batch: Batch, precision: Precision) -> tuple[torch.Tensor, ...]:
    with precision.autocast():
        images = model.encode_image(batch.images)  # type: ignore[operator]
        texts = model.encode_text(cut_tokens(batch.tokens, batch.text_length))  # type: ignore[operator]
    return F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1), batch.labels.clone()


def _gather_rows(
    columns: list[torch.Tensor], rows: int, device: torch.device, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each rank's columns of images, texts and labels, padded, gathered and interleaved to `rows` rows."""
    # A rank without a row (a split smaller than the ranks) does not know the widths; rank 0 always has a row.
    widths = ranks.gather_objects([column.shape[1] for column in columns])[0]
    share = -(-rows // ranks.size)
    whole = []
    for number, width in enumerate(widths):
        padded = torch.zeros(share, width, device=device)
        if columns:
            padded[: len(columns[number])] = columns[number]
        whole.append(torch.stack(ranks.gather(padded), dim=1).flatten(0, 1)[:rows])
    return whole[0], whole[1], whole[2]
