"""`python -m train.export --checkpoint RUN --to open_clip|safetensors|onnx --out FOLDER`: a trained model goes out.

open_clip: a folder that `open_clip.create_model("local-dir:FOLDER")` loads, weights and preprocessing. safetensors: our
own names. onnx: one file a tower (train/onnx_export.py). Each is loaded again and must give the model's embeddings;
only then does the folder get its name.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shards.atomic import TEMPORARY_PREFIX, sync_folder, write_atomic, write_json
from shards.cli import main_guard, parse, say
from shards.errors import InputError
from train.architecture import ModelConfig
from train.commandline import to_fields
from train.config import TrainConfig
from train.ensemble import Member, Weights, build_member, find_checkpoints, read_member
from train.model import ClipModel
from train.nonfinite import all_finite
from train.towers import CausalTextTower, Headed

PROG = "train.export"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
"""What open_clip looks for in a folder."""
TOLERANCE = 1e-5
"""Largest difference between two embeddings of unit length that count as the same, in float32 on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write a trained model for other programs."""

    checkpoint: Path
    """A run's folder (its best checkpoint, or the newest where none was validated), or a checkpoint file."""
    to: Literal["open_clip", "safetensors", "onnx"]
    """Format; onnx needs the extra `export`."""
    out: Path
    """Folder to make."""
    weights: Weights = "auto"
    """auto: the averaged weights where the run has any; ema: those; model: the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A model to be written."""

    model: ClipModel
    """On the CPU, in evaluation mode."""
    settings: TrainConfig
    step: int
    context: int
    """Tokens of a text."""
    vocab_size: int

    def samples(self, count: int = 2) -> tuple[Tensor, Tensor]:
        """Made-up images (count, 3, H, W) and token ids (count, context), to compare models on."""
        size, random = self.settings.data.image_size, torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, size, size, generator=random)
        tokens = torch.randint(1, self.vocab_size - 1, (count, self.context), generator=random)
        tokens[:, self.context // 2] = self.vocab_size - 1  # the end token has the largest id
        tokens[:, self.context // 2 + 1 :] = 0
        return images, tokens

    def preprocessing(self) -> dict[str, Any]:
        """How images come to the model, in open_clip's words."""
        data = self.settings.data
        look = {"mean": list(data.mean), "std": list(data.std), "interpolation": "bicubic", "resize_mode": "squash"}
        return {"size": data.image_size, "mode": "RGB", **look}


def export(config: ExportConfig) -> Path:
    """Write, load again and compare, then give the folder its name. InputError where the format cannot hold it."""
    if config.out.exists():
        raise InputError(f"{config.out} is there already; choose another --out")
    (path,) = find_checkpoints([config.checkpoint])
    trained = rebuild(read_member(path, config.weights))
    temporary = config.out.with_name(f"{TEMPORARY_PREFIX}{config.out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        writer(config.to)(trained, temporary)
        temporary.rename(config.out)
        sync_folder(config.out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{config.out}: step {trained.step}, image {config.to}, checked against the checkpoint's own embeddings")
    return config.out


_LENGTHS = ("token_embedding.weight", "positional_embedding")
"""Of the text tower: as long as its vocabulary, and as its context."""


def rebuild(member: Member) -> Trained:
    """The model of a checkpoint, without the shards it was trained on: its weights tell vocabulary and context."""
    text = "text." if "text.token_embedding.weight" in member.state else "text.trunk."
    try:
        vocab_size, context = (len(member.state[f"{text}{name}"]) for name in _LENGTHS)
    except (KeyError, TypeError):
        raise InputError(f"{member.path} does not hold the text tower of a run") from None
    model = build_member(member, vocab_size=vocab_size, context=context)
    if not all_finite(model):
        raise InputError(f"{member.path}: a weight is no number, its training ran away; export an earlier checkpoint")
    settings, step = member.settings, member.step
    return Trained(model=model.eval(), settings=settings, step=step, context=context, vocab_size=vocab_size)


def writer(name: str) -> Callable[[Trained, Path], None]:
    """The function that writes a format into an empty folder, and checks it."""
    if name == "onnx":
        from train.onnx_export import write_onnx

        return write_onnx
    return write_open_clip if name == "open_clip" else write_safetensors


def write_safetensors(trained: Trained, folder: Path) -> None:
    """model.safetensors under our own names, which --vision-weights and --text-weights take, and config.json."""
    from safetensors.torch import load_file

    state = trained.model.state_dict()
    write_weights(state, folder / "model.safetensors")
    about: dict[str, Any] = {"step": trained.step, "context": trained.context, "vocab_size": trained.vocab_size}
    about |= {"model": to_fields(trained.settings.model), "preprocess": trained.preprocessing()}
    write_json(folder / "config.json", about)
    found = load_file(folder / "model.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def write_weights(state: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, with the permissions of any other: safetensors' own writer keeps it from everybody else."""
    from safetensors.torch import save

    write_atomic(path, save({name: tensor.contiguous() for name, tensor in state.items()}, {"format": "pt"}))


def write_open_clip(trained: Trained, folder: Path) -> None:
    """open_clip's config and weights. InputError for a model that has no equal there."""
    from open_clip import create_model

    config = trained.settings.model
    fields = open_clip_config(trained)
    write_weights(open_clip_state(trained.model, custom_text="custom_text" in fields), folder / WEIGHTS)
    write_json(folder / CONFIG, {"model_cfg": fields, "preprocess_cfg": trained.preprocessing()})
    try:
        theirs = create_model(f"local-dir:{folder}", require_pretrained=True).eval()
        compare(trained, theirs.encode_image, theirs.encode_text, tolerance=TOLERANCE)
    except (RuntimeError, AssertionError, TypeError) as error:  # such as a tower built for images of another size
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"open_clip cannot build this model with the tower {config.tower} ({reason}); {_INSTEAD}"
        ) from None


_INSTEAD = "use --to safetensors or --to onnx"


def open_clip_config(trained: Trained) -> dict[str, Any]:
    """open_clip's `model_cfg`. InputError where it has no words for a part."""
    config = trained.settings.model
    if config.tower == "tiny":
        raise InputError(f"open_clip has no equal of the image tower tiny; {_INSTEAD}")
    if config.text_head != "none":
        raise InputError(f"open_clip's text tower takes no head, this one has {config.text_head}; {_INSTEAD}")
    if config.image_head == "mlp" and config.head_width != 2 * config.embed_dim:
        raise InputError(
            f"open_clip's MLP head is {2 * config.embed_dim} wide inside, this one {config.head_width}; {_INSTEAD}"
        )
    text = {"context_length": trained.context, "vocab_size": trained.vocab_size}
    text |= {"width": config.text_width, "heads": config.text_heads, "layers": config.text_layers}
    sizes = {"embed_dim": config.embed_dim, "quick_gelu": config.quick_gelu}
    if config.tower == "clip-vit":
        return {**sizes, "vision_cfg": _clip_vision(config, trained.settings.data.image_size), "text_cfg": text}
    vision = _timm_vision(config, trained.settings.data.image_size)
    return {**sizes, "custom_text": True, "vision_cfg": vision, "text_cfg": text}


def _clip_vision(config: ModelConfig, image_size: int) -> dict[str, Any]:
    sizes = {"image_size": image_size, "patch_size": config.patch_size, "width": config.image_width}
    return {**sizes, "layers": config.image_layers, "head_width": config.image_width // config.image_heads}


def _timm_vision(config: ModelConfig, image_size: int) -> dict[str, Any]:
    head = {"timm_proj": config.image_head, "timm_proj_bias": True, "timm_drop": config.head_dropout}
    name = {"timm_model_name": config.tower, "timm_model_pretrained": False, "timm_pool": config.image_pool}
    return {"image_size": image_size, **name, **head}


def open_clip_state(model: ClipModel, *, custom_text: bool) -> dict[str, Tensor]:
    """The weights under open_clip's names: the text tower's at the top, or below `text.` with another image tower."""
    assert isinstance(model.text, CausalTextTower) and not isinstance(model.text, Headed)
    text = "text." if custom_text else ""
    state = {f"visual.{name}": tensor for name, tensor in model.image.state_dict().items()}
    state |= {f"{text}{name}": tensor for name, tensor in model.text.state_dict().items()}
    return {**state, "logit_scale": model.logit_scale.data}


Encode = Callable[[Tensor], Tensor]


def compare(trained: Trained, encode_image: Encode, encode_text: Encode, *, tolerance: float, rows: int = 2) -> None:
    """AssertionError where another model's embeddings, brought to unit length, differ by more than a tolerance."""
    images, tokens = trained.samples(rows)
    with torch.inference_mode():
        for inputs, ours, theirs in (
            (images, trained.model.encode_image, encode_image),
            (tokens, trained.model.encode_text, encode_text),
        ):
            wanted, found = (nn.functional.normalize(encode(inputs), dim=-1) for encode in (ours, theirs))
            difference = (wanted - found).abs().max().item()
            if not difference <= tolerance:
                raise AssertionError(f"embeddings differ by {difference:.1e}")


def main(argv: list[str] | None = None) -> None:
    """Export as the command line says. Exit code 2 for a user's mistake."""
    with main_guard(PROG):
        export(parse(ExportConfig, argv, prog=PROG))


if __name__ == "__main__":
    main()
