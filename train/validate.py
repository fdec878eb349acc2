"""Embed a split once, whatever the ranks, and the validation loss made from it.

Rank r embeds the rows r, r + R, r + 2R, ...; gathered and interleaved they stand in row order again. The loss is the
mean over consecutive groups of GROUP rows, weighted by their size: the same number for any ranks and any batch size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.batch import Batch
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
from shards.errors import InputError
from train.device import Precision
from train.ranks import Ranks

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
