"""The image and the text tower, and the temperature that ties them.

`tiny`, for CPU demos and tests: a small residual CNN with group normalisation (no running statistics, so ranks, resumed
runs and evaluation all compute the same thing) and open_clip's causal text tower.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from shards.errors import InputError

TOWERS = ("tiny",)
_PLACES = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which towers, and how large."""

    tower: str = "tiny"
    """The image tower: tiny."""
    widths: tuple[int, int, int, int] = (16, 32, 64, 128)
    """Channels of the image tower at 1/2, 1/4, 1/8 and 1/16 of the image's size."""
    embed_dim: int = 64
    """Width of the shared embedding."""
    text_width: int = 64
    text_layers: int = 2
    text_heads: int = 2
    temperature: float = 0.07
    """Where the learnable temperature starts."""

    def __post_init__(self) -> None:
        if self.tower not in TOWERS:
            raise InputError(f"--model.tower is {self.tower}: choose one of {', '.join(TOWERS)}")
        for name in ("embed_dim", "text_width", "text_layers", "text_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"--model.{name.replace('_', '-')} {getattr(self, name)} is not at least 1")
        if not all(width > 0 and width % _groups(width) == 0 for width in self.widths):
            raise InputError(
                f"--model.widths {' '.join(map(str, self.widths))}: each has to lie in 1..31 or to be a multiple of 16"
            )
        if not 0 < self.temperature < math.inf:
            raise InputError(f"--model.temperature {self.temperature} is not a number above 0")
        if self.text_width % self.text_heads:
            raise InputError(
                f"--model.text-width {self.text_width} is not a multiple of --model.text-heads {self.text_heads}"
            )


def build_model(config: ModelConfig, *, vocab_size: int, context: int) -> "ClipModel":
    """The model of a config, freshly initialised from torch's global generator."""
    image = TinyImageTower(config.widths, config.embed_dim)
    text = CausalTextTower(
        context_length=context,
        vocab_size=vocab_size,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
        output_dim=config.embed_dim,
    )
    return ClipModel(image, text, config.temperature)


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


class CausalTextTower(TextTransformer):
    """open_clip's text tower, its weights and names; takes tokens cut below the context too, as its own does not."""

    def forward(self, tokens: Tensor) -> Tensor:
        length, rows = tokens.shape[1], torch.arange(tokens.shape[0], device=tokens.device)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]  # (B, L, width)
        x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        return self.ln_final(x[rows, tokens.argmax(dim=-1)]) @ self.text_projection


class TinyImageTower(nn.Module):
    """A CNN down to 1/16, read out twice: means and maxima of two levels say what is there, a coarse grid says where.

    About 80 million multiply-adds at 224 x 224, where the coarse grid is 7 x 7 by itself; other sizes are pooled to it.
    """

    def __init__(self, widths: tuple[int, int, int, int], embed_dim: int) -> None:
        super().__init__()
        a, b, c, d = widths
        self.fine = nn.Sequential(_Down(3, a), _Down(a, b), _Down(b, c))
        self.body = nn.Sequential(_Down(c, d), _Residual(d))
        self.coarse = _Down(d, c)
        self.project = nn.Linear(_PLACES**2 * c + 2 * (c + d), embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)  # (B, c, 28, 28)
        grid = self.body(fine)  # (B, d, 14, 14)
        where = F.adaptive_avg_pool2d(self.coarse(grid), _PLACES).flatten(1)  # (B, c * 7 * 7)
        what = [pooled for x in (fine, grid) for pooled in (x.mean((2, 3)), x.amax((2, 3)))]
        return self.project(torch.cat([where, *what], dim=1))


def _groups(width: int) -> int:
    """Groups of about 16 channels; they have to divide the width."""
    return max(1, width // 16)


class _Down(nn.Sequential):
    """Halve the grid."""

    def __init__(self, inside: int, outside: int) -> None:
        conv = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
        super().__init__(conv, nn.GroupNorm(_groups(outside), outside), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    """x + norm(conv(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(_groups(width), width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))
