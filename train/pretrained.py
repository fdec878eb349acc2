"""A run's first weights: tensors of a file to those of a tower, by their names, all of them or none.

The files' own names are understood: timm's, and Meta's of DINOv2 and DINOv3 (by timm's filters, which resize position
embeddings too), OpenAI's and open_clip's of CLIP, our own. The temperature never comes from a file: it is a setting.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from open_clip.model import resize_pos_embed
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from shards.errors import InputError
from train.config import TrainConfig
from train.model import ClipModel
from train.towers import CausalTextTower, Headed
from train.weightfile import read_tensors
from train.weights import find_weights

Tensors = dict[str, Tensor]

NONE = "none"
IMAGE = ("image.", "visual.")
TEXT = ("text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
"""What names of a CLIP model's text tower begin with; OpenAI's stand at the top, with nothing before them."""
OTHER = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size")
"""Of no tower."""
_SHOWN = 3


def load_pretrained(model: ClipModel, config: TrainConfig) -> list[str]:
    """Give each tower the weights that its setting names; a line on each, for people. For a run's beginning only.

    InputError where a file is missing, is refused, or does not fit: no weight has changed in a tower then.
    """
    told, read = [], dict[Path, Tensors]()
    for name, option, source in (
        ("image", "--vision-weights", config.vision_weights),
        ("text", "--text-weights", config.text_weights),
    ):
        if source == NONE:
            continue
        path = find_weights(source, option=option, preset=config.preset)
        if path not in read:
            read = {path: read_tensors(path)}  # at most one file in memory
        count = load_tower(getattr(model, name), read[path], text=name == "text", what=f"{option} {path}")
        told.append(f"{name} tower: {count} tensors from {path}")
    return told


def load_tower(tower: nn.Module, found: Tensors, *, text: bool, what: str) -> int:
    """Copy a file's tensors into a tower; how many. `what` names the file in an InputError."""
    try:
        fitted = _text_weights(tower, found) if text else _image_weights(tower, found)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    except Exception as error:  # timm's and open_clip's filters meet names and shapes they were not made for
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{what} does not fit the {'text' if text else 'image'} tower ({reason})") from None
    wanted = tower.state_dict()
    _check(wanted, fitted, what)
    with torch.no_grad():
        for name, tensor in fitted.items():
            wanted[name].copy_(tensor)
    return len(fitted)


def _own(found: Tensors, own: tuple[str, ...], others: tuple[str, ...]) -> Tensors:
    """The tensors of one tower, its prefix off; what is of neither tower stays, to be told of."""
    prefix = next((p for p in own if p.endswith(".") and any(name.startswith(p) for name in found)), "")
    rest = {name: tensor for name, tensor in found.items() if name not in OTHER and not name.endswith("attn_mask")}
    if not prefix:
        return rest
    return {name.removeprefix(prefix): tensor for name, tensor in rest.items() if not name.startswith(others)}


def _image_weights(tower: nn.Module, found: Tensors) -> Tensors:
    found = _own(found, IMAGE, TEXT)
    if isinstance(tower, VisionTransformer):
        renamed = {f"visual.{name}": tensor for name, tensor in found.items()}
        resize_pos_embed(renamed, SimpleNamespace(visual=tower))
        return {name.removeprefix("visual."): tensor for name, tensor in renamed.items()}
    if not isinstance(tower, Headed):
        return found
    if not any(name.startswith("trunk.") for name in found):  # timm's own file: the trunk, and its classifier
        found = {f"trunk.{name}": tensor for name, tensor in found.items() if not _classifies(tower.trunk, name)}
    trunk = {name.removeprefix("trunk."): tensor for name, tensor in found.items() if name.startswith("trunk.")}
    head = {name: tensor for name, tensor in found.items() if not name.startswith("trunk.")}
    return {f"trunk.{name}": tensor for name, tensor in _filter(tower.trunk, trunk).items()} | head


def _classifies(trunk: nn.Module, name: str) -> bool:
    layers = trunk.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    return name.rpartition(".")[0] in ((layers,) if isinstance(layers, str) else layers)


def _filter(trunk: nn.Module, found: Tensors) -> Tensors:
    """timm's own conversion for a family of models: foreign names, position embeddings of another grid."""
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    return convert(found, trunk) if convert else found


def _text_weights(tower: nn.Module, found: Tensors) -> Tensors:
    found = {name: t for name, t in _own(found, ("text.",), IMAGE).items() if not name.startswith(IMAGE)}
    bare = tower.trunk if isinstance(tower, Headed) else tower
    assert isinstance(bare, CausalTextTower)
    if isinstance(tower, Headed) and not any(name.startswith("trunk.") for name in found):
        found = {f"trunk.{name}": tensor for name, tensor in found.items()}
    name = "positional_embedding" if bare is tower else "trunk.positional_embedding"
    if name in found and len(found[name]) > bare.context_length:
        # A position's embedding does not depend on how many follow: cut, it means the same.
        found[name] = found[name][: bare.context_length]
    return found


def _check(wanted: Tensors, found: Tensors, what: str) -> None:
    """InputError where names, shapes or kinds differ, or a weight is no number. A head may be missing as a whole."""
    new_head = not any(name.startswith("head.") for name in found)
    missing = [name for name in wanted if name not in found and not (new_head and name.startswith("head."))]
    unknown = [name for name in found if name not in wanted]
    wrong = [
        f"{name} is {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}"
        for name, tensor in found.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    sick = [n for n, t in found.items() if not (t.is_floating_point() and bool(t.isfinite().all()))]
    faults = [
        f"{len(names)} {fault} ({', '.join(name[:80] for name in names[:_SHOWN])}{', ...' if names[_SHOWN:] else ''})"
        for names, fault in (
            (missing, "tensors missing"),
            (unknown, "unknown"),
            (wrong, "of another shape"),
            (sick, "not finite numbers"),
        )
        if names
    ]
    if faults:
        raise InputError(f"{what} does not fit this model: {'; '.join(faults)}; name weights of the same architecture")
