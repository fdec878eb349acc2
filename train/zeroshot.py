"""CheXzero's zero-shot method (Tiu et al., Nature Biomedical Engineering 2022): findings by their names alone.

An image is compared with a prompt that names the finding and one that denies it, and the softmax of the two
similarities is the finding's probability. Images are resized as in training and not augmented.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from pipeline.config import LoaderConfig
from shards.errors import InputError
from shards.schema import Manifest
from train.device import choose_precision
from train.prompts import Wording
from train.ranks import Ranks
from train.scores import Floats, auroc, truth_of
from train.validate import contrastive_loss, embed_split

TOKENIZER = "clip-bpe"
"""The manifest's name for open_clip's tokenizer, which the prompts need as well."""
_WORDING = Wording()


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What one model, or several, make of a split's N rows, in row order."""

    probabilities: Floats
    """(N, K) of the data set's labels."""
    labels: NDArray[np.float32]
    """(N, K): 1 present, 0 absent, -1 uncertain, NaN unknown."""
    images: torch.Tensor
    """(N, D) float32 of unit length, on the device."""
    texts: torch.Tensor
    """(N, D) float32 of unit length, on the device."""
    loss: float
    """Validation loss, as in the loop."""

    def __len__(self) -> int:
        return len(self.labels)


def predict(
    model: nn.Module,
    loader: LoaderConfig,
    *,
    manifest: Manifest,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    wording: Wording = _WORDING,
) -> Predicted:
    """Embed the split that `loader` (mode `eval`) names, once, and compare it with the prompts.

    InputError where the vectors are not finite.
    """
    place = torch.device(device)
    embedded = embed_split(model, loader, choose_precision(precision, place), Ranks())
    if not (embedded.images.isfinite().all() and embedded.texts.isfinite().all()):  # which would sort somehow
        raise InputError("the model's vectors are not finite: its training ran away; evaluate an earlier checkpoint")
    columns = [
        probabilities(embedded.images, *embed_prompts(model, label, manifest, place, wording)).cpu().numpy()
        for label in manifest.labels
    ]
    scale = model.logit_scale.detach().float().exp()  # type: ignore[operator]
    return Predicted(
        probabilities=np.stack(columns, axis=1) if columns else np.empty((len(embedded), 0)),
        labels=embedded.labels.cpu().numpy(),
        images=embedded.images,
        texts=embedded.texts,
        loss=contrastive_loss(embedded.images, embedded.texts, scale).item(),
    )


def zero_shot(
    model: nn.Module,
    loader: LoaderConfig,
    *,
    manifest: Manifest,
    device: torch.device | str = "cpu",
    wording: Wording = _WORDING,
) -> dict[str, float | None]:
    """AUROC by label of any model, trained or not, over the rows where the label is known for certain."""
    found = predict(model, loader, manifest=manifest, device=device, wording=wording)
    truth = truth_of(found.labels)
    return {name: auroc(found.probabilities[:, n], truth[:, n]) for n, name in enumerate(manifest.labels)}


def probabilities(images: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """CheXzero's softmax over the similarities of images (N, D) with two prompts (D,), all of unit length: (N,).

    There is no temperature in it, so they stay near 0.5, where float32 would make ties of unequal ones: float64.
    """
    pair = images @ torch.stack([positive, negative], dim=1)  # (N, 2)
    return pair.double().softmax(dim=1)[:, 0]


def embed_prompts(
    model: nn.Module, label: str, manifest: Manifest, device: torch.device, wording: Wording = _WORDING
) -> tuple[torch.Tensor, torch.Tensor]:
    """The label's positive and negative prompt as unit vectors (D,) on the device; several phrasings are averaged."""
    prompt = wording.prompt(label, manifest.labels)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        sides = []
        for texts in prompt.sides:
            tokens = tokenize(texts, manifest).to(device)
            vectors = F.normalize(model.encode_text(tokens).float(), dim=-1)  # type: ignore[operator]
            sides.append(F.normalize(vectors.mean(dim=0), dim=-1))
    model.train(was_training)
    return sides[0], sides[1]


def tokenize(texts: Sequence[str], manifest: Manifest) -> torch.Tensor:
    """Token ids (texts, context) int64, as ingest made those of the reports."""
    from open_clip.tokenizer import SimpleTokenizer

    spec = manifest.tokenizer
    if spec.name != TOKENIZER:
        raise InputError(f"the shards' tokens are from {spec.name!r}; prompts can be made with {TOKENIZER!r} only")
    return SimpleTokenizer(context_length=spec.context)(list(texts))
