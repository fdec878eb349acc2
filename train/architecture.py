"""Which towers a model has, and how large: the settings alone, which cost no import of torch."""

import math
from dataclasses import dataclass
from typing import Literal

from shards.errors import InputError

Head = Literal["none", "linear", "mlp"]
TOWERS = ("tiny", "clip-vit")
DINOV3, DINOV2 = "vit_base_patch16_dinov3", "vit_base_patch14_dinov2"
"""timm's that presets take; to ask timm for a name imports torch, which takes seconds."""
MOST, MOST_LAYERS = 1 << 16, 1000
"""Largest sizes, several times those of any model that was trained; a slip of the finger would fill the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which towers, and how large."""

    tower: str = "tiny"
    """The image tower: tiny (a small CNN), clip-vit (CLIP's vision transformer, of the sizes below), or the name of a
    plain vision transformer of timm's, e.g. vit_base_patch16_dinov3."""
    widths: tuple[int, int, int, int] = (16, 32, 64, 128)
    """tiny: channels at 1/2, 1/4, 1/8 and 1/16 of the image's size."""
    patch_size: int = 32
    """clip-vit: height and width of a patch, pixels."""
    image_width: int = 768
    """clip-vit: width."""
    image_layers: int = 12
    """clip-vit: layers."""
    image_heads: int = 12
    """clip-vit: attention heads."""
    image_pool: Literal["token", "avg"] = "token"
    """timm's: what stands for an image, its class token or the mean over patches."""
    image_head: Head = "none"
    """timm's: none, one linear layer to embed-dim, or an MLP: linear to head-width, GELU, dropout, linear."""
    text_head: Head = "none"
    """The same on the text tower, which then projects to its own width."""
    head_width: int = 1536
    """Hidden width of an MLP head."""
    head_dropout: float = 0.0
    """Share of an MLP head's hidden values that are zeroed in training."""
    embed_dim: int = 64
    """Width of the shared embedding."""
    text_width: int = 64
    """Width of the text tower."""
    text_layers: int = 2
    """Layers of the text tower."""
    text_heads: int = 2
    """Attention heads of the text tower."""
    quick_gelu: bool = False
    """The towers of CLIP have OpenAI's x sigmoid(1.702 x) where GELU would stand; its weights want it."""
    temperature: float = 0.07
    """Where the learnable temperature starts."""

    def __post_init__(self) -> None:
        if self.tower not in TOWERS and not _known_to_timm(self.tower):
            raise InputError(
                f"--model.tower is {self.tower}: choose one of {', '.join(TOWERS)}, or a name that timm knows"
            )
        self._check_sizes()
        if not all(0 < width <= MOST and width % groups(width) == 0 for width in self.widths):
            raise InputError(
                f"--model.widths {' '.join(map(str, self.widths))}: each has to lie in 1..31 or to be a multiple of 16"
            )
        if not 0 < self.temperature < math.inf:
            raise InputError(f"--model.temperature {self.temperature} is not a number above 0")
        if not 0 <= self.head_dropout < 1:
            raise InputError(f"--model.head-dropout {self.head_dropout} does not lie in [0, 1)")
        if self.tower in TOWERS and self.image_head != "none":
            raise InputError(f"--model.image-head {self.image_head}: the tower {self.tower} projects by itself")

    def _check_sizes(self) -> None:
        for name in _SIZES:
            most = MOST_LAYERS if name.endswith("layers") else MOST
            if not 1 <= getattr(self, name) <= most:
                raise InputError(
                    f"--model.{name.replace('_', '-')} {getattr(self, name)} does not lie between 1 and {most:,}"
                )
        for tower in ("text", "image"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise InputError(f"--model.{tower}-width {width} is not a multiple of --model.{tower}-heads {heads}")


_SIZES = (
    *("embed_dim", "head_width", "text_width", "text_layers", "text_heads"),
    *("patch_size", "image_width", "image_layers", "image_heads"),
)


def _known_to_timm(name: str) -> bool:
    if name in (DINOV3, DINOV2):
        return True
    import timm

    return timm.is_model(name)


def groups(width: int) -> int:
    """Groups of about 16 channels; they have to divide the width."""
    return max(1, width // 16)
