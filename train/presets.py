"""Named presets: functions that return a whole config. `shards` and `out` are left for the command line.

Sources: R is this group's own notes on the recipes they train; C is CheXzero's repository, rajpurkarlab/CheXzero on
GitHub: the defaults of `run_train.py` (at commit 0eb642c) and the transforms of `load_data` in `train.py` (at 490051d);
O is OpenAI's CLIP ViT-B/32.
"""

from collections.abc import Callable

import tyro

from pipeline.config import DataConfig
from train.architecture import DINOV2, DINOV3, ModelConfig
from train.config import OptimConfig, TrainConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHEXZERO_MEAN, CHEXZERO_STD = (101.48761 / 255,) * 3, (83.43944 / 255,) * 3
"""C's, which are of 255. It subtracts them before its resize; the resize is linear and keeps constants, so the order
changes nothing but the rounding between."""

CLIP_WEIGHTS = "hub:timm/vit_base_patch32_clip_224.openai/open_clip_model.safetensors"
"""O's weights, both towers; OpenAI's own archive ViT-B-32.pt serves as well."""
DINOV3_WEIGHTS = "hub:timm/vit_base_patch16_dinov3.lvd1689m/model.safetensors"
DINOV2_WEIGHTS = "hub:timm/vit_base_patch14_dinov2.lvd142m/model.safetensors"


def tiny() -> TrainConfig:
    """A small CNN and a two-layer text tower, the defaults: learns the phantom in minutes on two CPU cores."""
    return TrainConfig(
        shards=tyro.MISSING,
        out=tyro.MISSING,
        preset="tiny",
        steps=800,
        data=DataConfig(flip_guard=True),
        optim=OptimConfig(lr=3e-3, schedule="cosine", warmup=50, weight_decay=0.2, clip=1.0),
    )


def cxr_dinov3_clip() -> TrainConfig:
    """The current recipe: DINOv3's ViT-B/16, one linear layer, CLIP's text tower; 15 to 20 hours on a V100 once.

    R: towers, head, statistics (CLIP's, the default), crop of 0.9 to 1.0, flip of 0.5, batch 64, 25,000 steps (3.46
    epochs of 462,195 films), validation and checkpoint every 500, SGD 1e-4 with momentum 0.9, temperature 0.07.
    C: a constant rate without warm-up, decay or clipping, which R takes over.
    """
    return TrainConfig(
        shards=tyro.MISSING,
        out=tyro.MISSING,
        preset="cxr-dinov3-clip",
        steps=25_000,
        batch_size=64,
        log_every=10,
        validate_every=500,
        save_every=500,
        vision_weights=DINOV3_WEIGHTS,
        text_weights=CLIP_WEIGHTS,
        data=DataConfig(image_size=224, scale=(0.9, 1.0), flip=0.5, flip_guard=False),
        model=ModelConfig(tower=DINOV3, image_pool="token", image_head="linear", embed_dim=512, **_CLIP_TEXT),
        optim=_plain_sgd(),
    )


def cxr_dinov3_mlp768() -> TrainConfig:
    """Its predecessor: a ViT-B/14 (DINOv2's, DINOv3 has none), MLP heads to 768 on both towers.

    R: towers, heads (linear to 1536, GELU, dropout 0.1, linear to 768), ImageNet's statistics, no augmentation, batch
    16, 4 epochs of 462,195 films (115,549 steps), validation every 50, checkpoint every 100, SGD 1e-4 with momentum
    0.9, temperature 0.07. C: the rest of the optimizer, as above.
    """
    return TrainConfig(
        shards=tyro.MISSING,
        out=tyro.MISSING,
        preset="cxr-dinov3-mlp768",
        steps=115_549,
        batch_size=16,
        log_every=10,
        validate_every=50,
        save_every=100,
        vision_weights=DINOV2_WEIGHTS,
        text_weights=CLIP_WEIGHTS,
        data=DataConfig(
            image_size=224, scale=(1.0, 1.0), flip=0.0, flip_guard=False, mean=IMAGENET_MEAN, std=IMAGENET_STD
        ),
        model=ModelConfig(
            tower=DINOV2,
            image_pool="token",
            image_head="mlp",
            text_head="mlp",
            head_width=1536,
            head_dropout=0.1,
            embed_dim=768,
            **_CLIP_TEXT,
        ),
        optim=_plain_sgd(),
    )


def chexzero() -> TrainConfig:
    """CLIP's ViT-B/32 whole, trained as CheXzero's authors did.

    C: both towers of O as they are, film statistics, resize to 224 alone, batch 16, SGD 1e-4 with momentum 0.9,
    constant, a checkpoint every 100 steps, a log line every 10. Steps: C's 4 epochs of the 377,110 films of MIMIC-CXR
    (Johnson et al. 2019), 94,280 steps in C, where each epoch ends in a shorter batch.
    O: the temperature, which C trains on from where it stood, 0.01. Ours: validation with each checkpoint, of which
    C's code has none.
    """
    return TrainConfig(
        shards=tyro.MISSING,
        out=tyro.MISSING,
        preset="chexzero",
        steps=94_278,
        batch_size=16,
        log_every=10,
        validate_every=100,
        save_every=100,
        vision_weights=CLIP_WEIGHTS,
        text_weights=CLIP_WEIGHTS,
        data=DataConfig(
            image_size=224, scale=(1.0, 1.0), flip=0.0, flip_guard=False, mean=CHEXZERO_MEAN, std=CHEXZERO_STD
        ),
        model=ModelConfig(
            tower="clip-vit",
            patch_size=32,
            image_width=768,
            image_layers=12,
            image_heads=12,
            embed_dim=512,
            temperature=0.01,
            **_CLIP_TEXT,
        ),
        optim=_plain_sgd(),
    )


_CLIP_TEXT: dict = {"text_width": 512, "text_layers": 12, "text_heads": 8, "quick_gelu": True}
"""O's text tower; its context of 77 comes with the shards."""


def _plain_sgd() -> OptimConfig:
    return OptimConfig(
        optimizer="sgd", lr=1e-4, momentum=0.9, schedule="constant", warmup=0, weight_decay=0.0, clip=None
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "tiny": tiny,
    "cxr-dinov3-clip": cxr_dinov3_clip,
    "cxr-dinov3-mlp768": cxr_dinov3_mlp768,
    "chexzero": chexzero,
}
"""Name on the command line -> the function."""
