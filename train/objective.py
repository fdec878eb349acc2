"""Objectives: a batch in, loss and metrics out. The loop and the step know nothing else of what is trained.

`Contrastive` is CLIP's: symmetric InfoNCE over the global batch, open_clip's `ClipLoss` with local loss (each rank
scores its own rows against all columns) and features gathered with their gradient.
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
from shards.counter import permutation
from train.device import Precision
from train.optim import clamp_logit_scale
from train.ranks import Ranks
from train.validate import cut_tokens, validation_loss

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
        """The same loss, unsmoothed, within groups of rows; see `train.validate`."""
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
