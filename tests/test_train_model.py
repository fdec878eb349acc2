"""train.model, towers and presets: cutting tokens is exact, the text is causal, sizes and recipes are as designed."""

import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from pipeline.config import CLIP_MEAN, CLIP_STD
from shards.errors import InputError
from train.architecture import ModelConfig
from train.config import TrainConfig
from train.model import ClipModel, build_model
from train.presets import PRESETS

VOCAB, CONTEXT, START, END = 49408, 77, 49406, 49407


@pytest.fixture(scope="module")
def model() -> ClipModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(), vocab_size=VOCAB, context=CONTEXT).eval()


def reports(lengths: list[int]) -> torch.Tensor:
    """Token ids (len(lengths), CONTEXT): start, words, end at the given token count, pads."""
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, 0], tokens[row, length - 1] = START, END
        words = torch.randint(1, START, (length - 2,), generator=torch.Generator().manual_seed(row))
        tokens[row, 1 : length - 1] = words
    return tokens


def test_shapes_and_unit_length(model):
    images, tokens = torch.randn(3, 3, 224, 224), reports([5, 30, 77])
    assert model.encode_image(images).shape == model.encode_text(tokens).shape == (3, ModelConfig().embed_dim)
    image, text, scale = model(images, tokens)
    ones = torch.ones(3)
    assert torch.allclose(image.norm(dim=1), ones, atol=1e-5) and torch.allclose(text.norm(dim=1), ones, atol=1e-5)
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert model.logit_scale.item() == pytest.approx(-math.log(0.07))


@pytest.mark.parametrize("cut", [16, 20, 48, 76])
def test_cutting_pads_is_exact(model, cut):
    tokens = reports([3, 9, cut])
    with torch.inference_mode():
        assert torch.allclose(model.encode_text(tokens[:, :cut]), model.encode_text(tokens), rtol=0, atol=2e-6)


def test_text_is_causal(model):
    """What follows the end token has no influence, what stands before it has."""
    tokens = reports([10])
    after, before = tokens.clone(), tokens.clone()
    after[0, 10:] = 123
    before[0, 4] += 1
    with torch.inference_mode():
        told = model.encode_text(tokens)
        assert torch.allclose(told, model.encode_text(after), rtol=0, atol=2e-6)
        assert not torch.allclose(told, model.encode_text(before), rtol=0, atol=1e-3)


def test_agrees_with_open_clips_own_forward(model):
    """The same weights in open_clip's unchanged TextTransformer give the same embedding at full context."""
    tokens = reports([7, 40, 77])
    with torch.inference_mode():
        theirs = super(type(model.text), model.text).forward(tokens)
        assert torch.allclose(model.encode_text(tokens), theirs, rtol=0, atol=2e-6)


def multiply_adds(model: nn.Module, images: torch.Tensor) -> int:
    """Of all convolutions and linear layers, for one image."""
    total = 0

    def count(layer: nn.Module, _: tuple, out: torch.Tensor) -> None:
        nonlocal total
        total += layer.weight[0].numel() * out[0].numel()  # type: ignore[index]

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return total


def test_image_tower_is_about_75_million_multiply_adds(model):
    assert 65e6 < multiply_adds(model.image, torch.zeros(1, 3, 224, 224)) < 90e6


def test_an_image_does_not_depend_on_its_batch(model):
    """No statistics across a batch: one rank and several compute the same, resumed runs go on bit by bit."""
    images = torch.randn(4, 3, 224, 224)
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
    with torch.inference_mode():
        assert torch.allclose(model.encode_image(images)[1:2], model.encode_image(images[1:2]), rtol=0, atol=1e-4)


def test_forward_changes_no_buffer(model):
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()(torch.randn(2, 3, 224, 224), reports([5, 6]))
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_same_seed_same_weights():
    def weights() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return list(build_model(ModelConfig(), vocab_size=100, context=8).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))


CLIP_SMALL = ModelConfig(
    tower="clip-vit", patch_size=16, image_width=64, image_layers=2, image_heads=2, embed_dim=32, quick_gelu=True
)
DINO_SMALL = ModelConfig(tower="vit_tiny_patch16_dinov3_qkvb", image_head="linear", embed_dim=32)
MLP_SMALL = ModelConfig(
    tower="test_vit", image_head="mlp", text_head="mlp", head_width=48, head_dropout=0.5, embed_dim=24
)
KINDS = {"tiny": ModelConfig(widths=(16,) * 4), "clip": CLIP_SMALL, "dino": DINO_SMALL, "mlp": MLP_SMALL}


def small(config: ModelConfig, *, image_size: int = 32) -> ClipModel:
    torch.manual_seed(0)
    return build_model(config, vocab_size=VOCAB, context=CONTEXT, image_size=image_size)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_tower_trains_whole(name):
    """Every parameter gets a gradient, as DDP asks; cut tokens give what whole ones do; an image stands by itself."""
    model, tokens, images = small(KINDS[name]), reports([3, 9, 16]), torch.randn(3, 3, 32, 32)
    image, text, scale = model(images, tokens[:, :16])
    assert image.shape == text.shape == (3, KINDS[name].embed_dim)
    nn.functional.cross_entropy(scale * image @ text.T, torch.arange(3)).backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    model.eval()
    with torch.inference_mode():
        assert torch.allclose(model.encode_text(tokens[:, :16]), model.encode_text(tokens), rtol=0, atol=2e-6)
        assert torch.allclose(model.encode_image(images)[1:2], model.encode_image(images[1:2]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_activation_checkpointing_changes_no_gradient_and_no_name(name):
    def gradients(again: bool) -> dict[str, torch.Tensor]:
        model = small(replace(KINDS[name], head_dropout=0.0)).train()
        names = list(model.state_dict())
        model.set_grad_checkpointing(again)
        assert list(model.state_dict()) == names
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            image, text, scale = model(images, tokens)
            loss = nn.functional.cross_entropy(scale * image @ text.T, torch.arange(3))
        loss.backward()
        sizes[again] = sum(kept)
        return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}

    kept: list[int] = []
    sizes: dict[bool, int] = {}
    images, tokens = torch.randn(3, 3, 32, 32), reports([3, 9, 16])[:, :16]
    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys() and all(torch.equal(plain[key], again[key]) for key in plain)
    assert sizes[True] < 0.7 * sizes[False]  # and it does keep less


def test_an_mlp_head_is_what_the_recipe_says():
    """Linear to the hidden width, GELU, dropout, linear; dropout in training alone."""
    model = small(MLP_SMALL)
    head = model.image.head.mlp
    x = torch.randn(4, 64)
    by_hand = head.fc2(nn.functional.gelu(head.fc1(x)))
    assert (head.fc1.out_features, head.fc2.out_features) == (48, 24)
    assert torch.allclose(model.image.head.eval()(x), by_hand, atol=1e-6)
    assert not torch.allclose(model.image.head.train()(x), by_hand, atol=1e-3)
    assert (head.drop1.p, head.drop2.p) == (MLP_SMALL.head_dropout, 0.0)  # of the hidden values alone
    assert model.text.trunk.text_projection.shape == (64, 64)  # CLIP's own projection stays under the head


def test_dinov3_gives_its_class_token():
    """timm's own model of that name, at its own defaults but for the pool, which it would average."""
    model = small(DINO_SMALL).eval()
    theirs = timm.create_model(DINO_SMALL.tower, num_classes=0).eval()
    assert theirs.global_pool == "avg"
    theirs.load_state_dict(model.image.trunk.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = theirs.forward_features(images)  # (2, 1 class + 4 registers + 4 patches, 192)
        assert tokens.shape[1] == 9
        assert torch.allclose(model.image.trunk(images), tokens[:, 0], atol=1e-5)
        assert torch.allclose(model.encode_image(images), model.image.head(tokens[:, 0]), atol=1e-5)
        mean = small(replace(DINO_SMALL, image_pool="avg")).eval()
        assert torch.allclose(mean.image.trunk(images), theirs(images), atol=1e-5)


def recipe(name: str) -> TrainConfig:
    return replace(PRESETS[name](), shards=".", out=".")


@pytest.mark.parametrize("name", ["cxr-dinov3-clip", "cxr-dinov3-mlp768", "chexzero"])
def test_recipes_share_their_optimizer_and_text_tower(name):
    config = recipe(name)
    optim, model = config.optim, config.model
    assert (optim.optimizer, optim.lr, optim.momentum, optim.nesterov) == ("sgd", 1e-4, 0.9, False)
    assert (optim.schedule, optim.warmup, optim.weight_decay, optim.clip) == ("constant", 0, 0.0, None)
    assert (model.text_width, model.text_layers, model.text_heads, model.quick_gelu) == (512, 12, 8, True)
    assert (config.data.image_size, config.data.flip_guard) == (224, False)
    assert (config.preset, config.accumulate, config.ema, config.patience) == (name, 1, None, None)


def test_the_current_recipe():
    """RECIPES (1), first column."""
    config = recipe("cxr-dinov3-clip")
    model, data = config.model, config.data
    assert (model.tower, model.image_pool, model.image_head) == ("vit_base_patch16_dinov3", "token", "linear")
    assert (model.text_head, model.embed_dim, model.temperature) == ("none", 512, 0.07)
    assert (data.mean, data.std, data.scale, data.flip) == (CLIP_MEAN, CLIP_STD, (0.9, 1.0), 0.5)
    assert (config.batch_size, config.steps, config.validate_every, config.save_every) == (64, 25_000, 500, 500)
    assert round(config.steps * config.batch_size / 462_195, 2) == 3.46


def test_its_predecessor():
    """RECIPES (1), second column."""
    config = recipe("cxr-dinov3-mlp768")
    model, data = config.model, config.data
    assert (model.tower, model.image_pool, model.temperature) == ("vit_base_patch14_dinov2", "token", 0.07)
    assert (model.image_head, model.text_head, model.head_width) == ("mlp", "mlp", 1536)
    assert (model.head_dropout, model.embed_dim) == (0.1, 768)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (data.scale, data.flip) == ((1.0, 1.0), 0.0)
    assert (config.batch_size, config.validate_every, config.save_every) == (16, 50, 100)
    assert config.steps == math.ceil(4 * 462_195 / 16)


def test_chexzeros_own():
    config = recipe("chexzero")
    model, data = config.model, config.data
    assert (model.tower, model.patch_size, model.image_width) == ("clip-vit", 32, 768)
    assert (model.image_layers, model.image_heads, model.embed_dim) == (12, 12, 512)
    assert data.mean == pytest.approx([101.48761 / 255] * 3) and data.std == pytest.approx([83.43944 / 255] * 3)
    assert (data.scale, data.flip, config.batch_size, config.save_every) == ((1.0, 1.0), 0.0, 16, 100)
    assert config.steps == math.ceil(4 * 377_110 / 16) and model.temperature == 0.01


def test_the_temperature_starts_where_it_is_told_to():
    assert small(ModelConfig(temperature=0.02)).logit_scale.item() == pytest.approx(math.log(50))


def test_the_tiny_tower_reads_means_and_maxima_of_two_levels(model):
    tower, seen = model.image, {}
    tower.project.register_forward_pre_hook(lambda _, inputs: seen.update(read=inputs[0]))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        tower(images)
        small = tower.fine(images)
        grid = tower.body(small)
        what = [small.mean((2, 3)), small.amax((2, 3)), grid.mean((2, 3)), grid.amax((2, 3))]
        expected = torch.cat([tower.coarse(grid).flatten(1), *what], dim=1)
    assert torch.equal(seen["read"], expected)


def test_impossible_configs_are_refused():
    with pytest.raises(InputError, match=r"tower is vit: choose one of tiny, clip-vit, or a name that timm knows"):
        ModelConfig(tower="vit")
    for elsewhere in ("hf-hub:timm/test_vit", "local-dir:/tmp", "../test_vit"):  # a checkpoint's settings may say so
        with pytest.raises(InputError, match="a name that timm knows"):
            ModelConfig(tower=elsewhere)
    with pytest.raises(InputError, match=r"text-width 64 is not a multiple of --model\.text-heads 5"):
        replace(ModelConfig(), text_width=64, text_heads=5)
    with pytest.raises(InputError, match=r"image-width 768 is not a multiple of --model\.image-heads 5"):
        replace(ModelConfig(), image_heads=5)
    with pytest.raises(InputError, match="image-head linear: the tower clip-vit projects by itself"):
        replace(CLIP_SMALL, image_head="linear")
    with pytest.raises(InputError, match=r"head-dropout 1\.5 does not lie"):
        replace(MLP_SMALL, head_dropout=1.5)


def test_impossible_towers_are_refused():
    for tower, words in (
        ("resnet18", "cannot be built as a vision transformer"),
        (
            "vit_base_patch16_siglip_224",
            "cannot be built as a vision transformer .* pooled by 'token'",
        ),  # no class token
        ("levit_128s", "cannot be built as a vision transformer"),
        ("vit_small_resnet26d_224", "batch normalisation"),
    ):
        with pytest.raises(InputError, match=words), torch.device("meta"):
            small(replace(DINO_SMALL, tower=tower))
    with pytest.raises(InputError, match=r"embed-dim is 32, the tower test_vit gives 64"):
        small(ModelConfig(tower="test_vit", embed_dim=32))
    for config in (CLIP_SMALL, DINO_SMALL):
        with pytest.raises(InputError, match="images of 40 pixels cannot be cut into patches of 16"):
            small(config, image_size=40)
