"""Tensors out of a file that came from elsewhere, by name, without running anything in it.

Taken: safetensors; a torch archive (open_clip's, timm's, CheXzero's checkpoints), by `torch.load` with
`weights_only=True`; a TorchScript archive (OpenAI's), by train/torchscript.py; a checkpoint of a run of ours.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.errors import InputError
from train.checkpoint import MAGIC, read_checkpoint
from train.torchscript import read_torchscript

HEADER_LIMIT = 16 * 1024**2
"""Bytes of a safetensors header; those of the models here have some ten thousand."""
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Where checkpoints of trainers keep the weights, among their other things."""
PREFIXES = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before every name."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor on the CPU, dense, no larger than its bytes in the file. InputError, in one line, otherwise."""
    if not path.is_file():
        raise InputError(f"{path} is no file")
    try:
        found = _read(path)
    except InputError:
        raise
    except Exception as error:  # a parser that is fed a hostile or damaged file may end in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is refused: it holds more than tensors, or is damaged ({reason})") from None
    if not found:
        raise InputError(f"{path} holds no tensors")
    for name, tensor in found.items():
        _check_plain(path, name, tensor)
    return _without_prefix(found)


def _read(path: Path) -> dict[str, Tensor]:
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


def _read_safetensors(path: Path, *, header: int) -> dict[str, Tensor]:
    from safetensors import safe_open

    if header > min(HEADER_LIMIT, path.stat().st_size):
        raise InputError(f"{path} is refused: a header of {header:,} bytes, of which {HEADER_LIMIT:,} are enough")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _read_archive(path: Path) -> dict[str, Tensor]:
    """torch's zip, or TorchScript's, which has code beside the data."""
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return read_torchscript(path, archive)
        entries = archive.infolist()
    # torch packs nothing; entries that are packed, or share bytes, unpack to more than the file has.
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InputError(f"{path} is refused: it unpacks to more than its size, which no file of torch does")
    return _tensors(path, torch.load(path, map_location="cpu", weights_only=True))


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
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


def _without_prefix(found: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found
