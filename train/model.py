"""The image and the text tower, and the temperature that ties them: which, how large, and built from chance."""

import math
from dataclasses import dataclass
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import InputError
from train.towers import (
    CausalTextTower,
    Head,
    Headed,
    TinyImageTower,
    activation,
    clip_image_tower,
    groups,
    make_head,
    timm_trunk,
)

TOWERS = ("tiny", "clip-vit")
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
        if self.tower not in TOWERS and not timm.is_model(self.tower):
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


def build_model(config: ModelConfig, *, vocab_size: int, context: int, image_size: int = 224) -> "ClipModel":
    """The model of a config for images of `image_size` pixels, freshly initialised from torch's global generator.

    Touches neither network nor weight files; see train/weights.py for those.
    """
    image = _image_tower(config, image_size)
    return ClipModel(image, _text_tower(config, vocab_size, context), config.temperature)


class ClipModel(nn.Module):
    """Two towers into one space. `logit_scale` is the logarithm of the scale, 1 / temperature; the loop clamps it."""

    def __init__(self, image: nn.Module, text: nn.Module, temperature: float) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised pixels (B, 3, H, W) to (B, D), not yet of unit length."""
        return self.image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L), any L up to the context that keeps every end token, to (B, D), not yet of unit length.

        Cutting pads off the end changes nothing: attention is causal and the pool is at the end token, the largest id.
        """
        return self.text(tokens)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-length image and text embeddings (B, D), and the scale of their products (scalar)."""
        image, text = self.encode_image(images), self.encode_text(tokens)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1), self.logit_scale.exp()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether both towers compute their activations again in the backward pass instead of keeping them."""
        for tower in (self.image, self.text):
            tower.set_grad_checkpointing(enable)  # type: ignore[operator]


def _image_tower(config: ModelConfig, image_size: int) -> nn.Module:
    if config.tower == "tiny":
        return TinyImageTower(config.widths, config.embed_dim)
    if config.tower == "clip-vit":
        return clip_image_tower(
            image_size=image_size,
            patch_size=config.patch_size,
            width=config.image_width,
            layers=config.image_layers,
            heads=config.image_heads,
            embed_dim=config.embed_dim,
            quick_gelu=config.quick_gelu,
        )
    trunk, features = timm_trunk(config.tower, image_size=image_size, pool=config.image_pool)
    if config.image_head == "none" and features != config.embed_dim:
        raise InputError(
            f"--model.embed-dim is {config.embed_dim}, the tower {config.tower} gives {features}: "
            "make them equal, or choose --model.image-head linear"
        )
    return Headed(trunk, _head(config, config.image_head, features))


def _text_tower(config: ModelConfig, vocab_size: int, context: int) -> nn.Module:
    bare = config.text_head == "none"
    tower = CausalTextTower(
        context_length=context,
        vocab_size=vocab_size,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
        output_dim=config.embed_dim if bare else config.text_width,
        act_layer=activation(config.quick_gelu),
    )
    return tower if bare else Headed(tower, _head(config, config.text_head, config.text_width))


def _head(config: ModelConfig, kind: Head, inside: int) -> nn.Module:
    return make_head(kind, inside, config.embed_dim, width=config.head_width, dropout=config.head_dropout)
