"""Objectives: a batch in, loss and metrics out. The loop knows nothing else of what is trained.

`Contrastive` is CLIP's: symmetric InfoNCE over the global batch, open_clip's `ClipLoss` with local loss (each rank
scores its own rows against all columns) and features gathered with their gradient.
"""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from open_clip.loss import ClipLoss

from pipeline.batch import Batch
from shards.counter import permutation
from train.ranks import Ranks

Forward = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Model under autocast and DDP: images (B, 3, H, W), tokens (B, L) -> two normalised (B, D) and the logit scale ()."""

TOKEN_STEP = 16
_SHUFFLE_WORD = 32
"""First word after the seed; pipeline.order and pipeline.augment have those below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What an objective says about one batch. Tensors stay on the device; nothing has waited for it."""

    loss: torch.Tensor
    """() float32; the mean over the ranks is the loss of the global batch."""
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name -> () tensor, logged as it is on rank 0."""


class Objective(Protocol):
    """The seam between the loop and what it trains."""

    def __call__(self, forward: Forward, batch: Batch) -> Output:
        """Loss and metrics of this rank's share of a batch."""
        ...


class Contrastive:
    """Symmetric InfoNCE over all ranks."""

    def __init__(self, ranks: Ranks, *, shuffle_seed: int | None = None) -> None:
        """`shuffle_seed`: the control that pairs each image with some report of its global batch."""
        # open_clip 3.3 gathers by a function that torch 2.14 calls deprecated; it says so on every rank.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"open_clip\.loss")
        self._ranks, self._shuffle_seed = ranks, shuffle_seed
        self._loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=ranks.rank, world_size=ranks.size)

    def __call__(self, forward: Forward, batch: Batch) -> Output:
        """Loss over the global batch; logs the logit scale."""
        if self._shuffle_seed is not None:
            batch = shuffle_reports(batch, self._ranks, self._shuffle_seed)
        image, text, scale = forward(batch.images, cut_tokens(batch.tokens, batch.text_length))
        loss = self._loss(image.float(), text.float(), scale.float())
        return Output(loss=loss, metrics={"logit_scale": scale.detach()})


def cut_tokens(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """tokens (B, context) cut to the longest report, `length` tokens, rounded up to steps of TOKEN_STEP: (B, L).

    Exact, because the text tower is causal and all that is cut off follows every end token. Steps keep the number of
    shapes small.
    """
    wanted = -(-max(length, 1) // TOKEN_STEP) * TOKEN_STEP
    return tokens[:, : min(wanted, tokens.shape[1])]


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
