"""The towers: `tiny`'s CNN, CLIP's vision transformer, plain ones of timm's, CLIP's causal text tower.

Parameters are named as open_clip names them (`trunk`, `head.proj`, `head.mlp`), so that weights come in and go out by
their names.
"""

from collections import OrderedDict
from functools import partial

import timm
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from timm.layers import Mlp
from torch import Tensor, arange, cat, nn
from torch.utils.checkpoint import checkpoint

from shards.errors import InputError
from train.architecture import Head, groups

_PLACES = 7


class CausalTextTower(TextTransformer):
    """open_clip's text tower, its weights and names; takes tokens cut below the context too, as its own does not."""

    def forward(self, tokens: Tensor) -> Tensor:
        length, rows = tokens.shape[1], arange(tokens.shape[0], device=tokens.device)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]  # (B, L, width)
        x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        return self.ln_final(x[rows, tokens.argmax(dim=-1)]) @ self.text_projection


class Headed(nn.Module):
    """A tower and what stands on it: (B, ...) to (B, D). Names are those of open_clip's `TimmModel`."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the trunk computes its activations again in the backward pass."""
        self.trunk.set_grad_checkpointing(enable)  # type: ignore[operator]


def make_head(kind: Head, inside: int, outside: int, *, width: int, dropout: float) -> nn.Sequential:
    """(B, inside) to (B, outside): nothing; one linear layer; or linear to `width`, GELU, dropout, linear."""
    if kind == "linear":
        return nn.Sequential(OrderedDict(proj=nn.Linear(inside, outside)))
    if kind == "mlp":
        return nn.Sequential(OrderedDict(mlp=Mlp(inside, width, outside, drop=(dropout, 0.0))))
    return nn.Sequential()


def activation(quick_gelu: bool) -> type[nn.Module]:
    """What CLIP's towers have between their layers: x sigmoid(1.702 x) in OpenAI's, else GELU."""
    return QuickGELU if quick_gelu else nn.GELU


def clip_image_tower(
    *, image_size: int, patch_size: int, width: int, layers: int, heads: int, embed_dim: int, quick_gelu: bool
) -> VisionTransformer:
    """CLIP's vision transformer, class token and projection: (B, 3, image_size, image_size) to (B, embed_dim)."""
    _check_patches(image_size, patch_size)
    return VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        layers=layers,
        heads=heads,
        mlp_ratio=4.0,
        output_dim=embed_dim,
        act_layer=activation(quick_gelu),
    )


def timm_trunk(name: str, *, image_size: int, pool: str) -> tuple[nn.Module, int]:
    """timm's model of a name, untrained and without its classifier, and its features D: (B, 3, H, W) to (B, D).

    The size is fixed, so that position embeddings are made once and not in every step. InputError for a model that is
    no plain vision transformer, or one with batch normalisation: its running statistics would differ between ranks.
    """
    try:
        trunk = timm.create_model(name, img_size=image_size, num_classes=0, global_pool=pool, dynamic_img_size=False)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"--model.tower {name} cannot be built as a vision transformer for {image_size} x {image_size} pixels, "
            f"pooled by {pool!r} ({reason}); take another, such as vit_base_patch16_dinov3"
        ) from None
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in trunk.modules()):
        raise InputError(f"--model.tower {name} has batch normalisation, which ranks and resumed runs would not share")
    _check_patches(image_size, trunk.patch_embed.patch_size[0])  # type: ignore[index, union-attr, arg-type]
    return trunk, trunk.num_features  # type: ignore[return-value]


def _check_patches(image_size: int, patch_size: int) -> None:
    if image_size % patch_size:
        raise InputError(f"images of {image_size} pixels cannot be cut into patches of {patch_size}: choose a multiple")


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
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether each level computes its activations again in the backward pass."""
        self.grad_checkpointing = enable

    def forward(self, images: Tensor) -> Tensor:
        again = self.grad_checkpointing and self.training
        fine, body, coarse = (
            partial(checkpoint, level, use_reentrant=False) if again else level
            for level in (self.fine, self.body, self.coarse)
        )
        small = fine(images)  # (B, c, 28, 28)
        grid = body(small)  # (B, d, 14, 14)
        where = F.adaptive_avg_pool2d(coarse(grid), _PLACES).flatten(1)  # (B, c * 7 * 7)
        what = [pooled for x in (small, grid) for pooled in (x.mean((2, 3)), x.amax((2, 3)))]
        return self.project(cat([where, *what], dim=1))


class _Down(nn.Sequential):
    """Halve the grid."""

    def __init__(self, inside: int, outside: int) -> None:
        conv = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
        super().__init__(conv, nn.GroupNorm(groups(outside), outside), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    """x + norm(conv(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups(width), width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))
