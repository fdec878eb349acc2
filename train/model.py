"""The image and the text tower, and the temperature that ties them, built from chance."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import InputError
from train.architecture import Head, ModelConfig
from train.towers import (
    CausalTextTower,
    Headed,
    TinyImageTower,
    activation,
    clip_image_tower,
    make_head,
    timm_trunk,
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
