"""Tensors out of a file that came from elsewhere to those of a tower, by their names, all of them or none.

Nothing in a file is run. Taken: safetensors; a torch archive (open_clip's, timm's, CheXzero's checkpoints), by
`torch.load` with `weights_only=True`; a TorchScript archive (OpenAI's), by train/torchscript.py; a checkpoint of a run.

The files' own names are understood: timm's, and Meta's of DINOv2 and DINOv3 (by timm's filters, which resize position
embeddings too), OpenAI's and open_clip's of CLIP, our own. The temperature never comes from a file: it is a setting.
"""

import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.model import resize_pos_embed
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from shards.errors import InputError
from train.checkpoint import MAGIC, read_checkpoint, why
from train.torchscript import read_torchscript
from train.towers import CausalTextTower, Headed

Tensors = dict[str, Tensor]

IMAGE = ("image.", "visual.")
TEXT = ("text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
"""What names of a CLIP model's text tower begin with; OpenAI's stand at the top, with nothing before them."""
OTHER = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size")
"""Of no tower."""
_SHOWN = 3


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


HEADER_LIMIT = 16 * 1024**2
"""Bytes of a safetensors header; those of the models here have some ten thousand."""
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Where checkpoints of trainers keep the weights, among their other things."""
PREFIXES = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before every name."""


def read_tensors(path: Path) -> Tensors:
    """Name -> tensor on the CPU, dense, no larger than its bytes in the file. InputError, in one line, otherwise."""
    if not path.is_file():
        raise InputError(f"{path} is no file")
    try:
        found = _read(path)
    except InputError:
        raise
    except Exception as error:  # a parser that is fed a hostile or damaged file may end in any way
        raise InputError(f"{path} is refused: it holds more than tensors, or is damaged ({why(error)})") from None
    if not found:
        raise InputError(f"{path} holds no tensors")
    for name, tensor in found.items():
        _check_plain(path, name, tensor)
    return _without_prefix(found)


def _read(path: Path) -> Tensors:
    with open(path, "rb") as file:
        start = file.read(max(len(MAGIC), 16))
    if start.startswith(MAGIC.encode()):
        payload = read_checkpoint(path)
        return _tensors(path, payload.get("ema") or payload["model"])
    if start.startswith(b"PK\x03\x04"):
        return _read_archive(path)
    if start[8:9] == b"{":
        return _read_safetensors(path, header=int.from_bytes(start[:8], "little"))
    if start.startswith(b"\x80"):  # a pickle, as torch wrote before 1.6
        return _tensors(path, torch.load(path, map_location="cpu", weights_only=True))
    raise InputError(f"{path} is neither safetensors nor a file of torch")


def _read_safetensors(path: Path, *, header: int) -> Tensors:
    from safetensors import safe_open

    if header > min(HEADER_LIMIT, path.stat().st_size):
        raise InputError(f"{path} is refused: a header of {header:,} bytes, of which {HEADER_LIMIT:,} are enough")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _read_archive(path: Path) -> Tensors:
    """torch's zip, or TorchScript's, which has code beside the data."""
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return read_torchscript(path, archive)
        entries = archive.infolist()
    # torch packs nothing; entries that are packed, or share bytes, unpack to more than the file has.
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InputError(f"{path} is refused: it unpacks to more than its size, which no file of torch does")
    return _tensors(path, torch.load(path, map_location="cpu", weights_only=True))


def _tensors(path: Path, content: Any) -> Tensors:
    """The weights among what a checkpoint holds."""
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    """InputError for a tensor of a kind that weights do not have, or one that repeats few bytes without end."""
    kind = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.is_cpu
    if not kind or tensor.is_quantized or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{path} is refused: the tensor {name[:60]!r} is no plain array of numbers")


def _without_prefix(found: Tensors) -> Tensors:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found
