"""train.model: the tiny towers. Cutting tokens is exact, the text is causal, the sizes are what DESIGN says."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from shards.errors import InputError
from train.model import ClipModel, ModelConfig, build_model

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


def test_impossible_configs_are_refused():
    with pytest.raises(InputError, match=r"tower is vit: choose one of tiny"):
        ModelConfig(tower="vit")
    with pytest.raises(InputError, match=r"text-width 64 is not a multiple of --model\.text-heads 5"):
        replace(ModelConfig(), text_width=64, text_heads=5)
