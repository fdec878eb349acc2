"""The tensors of a TorchScript archive, as OpenAI ships CLIP (ViT-B-32.pt), without running any of it.

`torch.jit.load` compiles the archive's own code, and a plain unpickler would call whatever it names. Here the archive's
`data.pkl` meets an unpickler that knows the few opcodes TorchScript writes and the few names below, each an object of
ours: modules become bags of attributes, tensors views of the archive's stored bytes. Anything else is refused.
Source: torch/csrc/jit/serialization/pickler.cpp and export_module.cpp.
"""

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from shards.errors import InputError

PICKLE_LIMIT = 16 * 1024**2
"""Bytes of data.pkl; that of CLIP ViT-B/32 has some hundred thousand."""
NODE_LIMIT = 20_000
"""Modules and tensors that are walked: one module may stand at many places."""
_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_OPCODES = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST),
    *(pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.BINPERSID),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
)


def read_torchscript(path: Path, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Parameters, buffers and tensor attributes by their dotted names, on the CPU. InputError where it holds more."""
    root = _root(path, archive)
    content = _entry(path, archive, f"{root}/data.pkl", limit=PICKLE_LIMIT)
    tree = _Unpickler(content, _Storages(path, archive, root)).load()
    if not isinstance(tree, _Module):
        raise InputError(f"{path} holds no module at its top")
    return _walk(path, tree)


def _root(path: Path, archive: zipfile.ZipFile) -> str:
    """The archive's one top folder; its name is the file's when it was written."""
    roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise InputError(f"{path} is no TorchScript archive: it has {len(roots)} files data.pkl")
    return roots[0]


def _entry(path: Path, archive: zipfile.ZipFile, name: str, *, limit: int) -> bytes:
    """A file of the archive, which must lie there as it is: packed bytes may unpack to any size."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.file_size > limit:
        raise InputError(f"{path} is refused: {name[-40:]!r} in it is compressed, or larger than {limit:,} bytes")
    return archive.read(info)


@dataclass(slots=True)
class _Module:
    """What stands for a module of the archive."""

    attributes: dict[Any, Any]


class _Storages:
    """The archive's data/N as flat tensors, each read once, no more bytes in all than the file has."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str) -> None:
        self._path, self._archive, self._root = path, archive, root
        self._left = path.stat().st_size
        self._read: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, dtype: torch.dtype, key: str) -> Tensor:
        """(elements,) of a type."""
        if (key, dtype) not in self._read:
            content = _entry(self._path, self._archive, f"{self._root}/data/{key}", limit=self._left)
            self._left -= len(content)
            flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
            self._read[key, dtype] = flat
        return self._read[key, dtype]


class _Unpickler(pickle._Unpickler):
    """Python's own, with the opcodes of `_OPCODES` alone, and those that make or change things narrowed to ours.

    The one in C would not do: it cannot be kept from opcodes, some of which ask for memory before they look for bytes.
    """

    stack: list[Any]

    def __init__(self, content: bytes, storages: _Storages) -> None:
        super().__init__(io.BytesIO(content))
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name. UnpicklingError for one that no archive of weights has."""
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _CALLS:
            return _CALLS[module, name]
        raise pickle.UnpicklingError(f"it names {f'{module}.{name}'[:80]!r}")

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage: ("storage", dtype, key, device, elements)."""
        kind, dtype, key, _, elements = pid
        flat = self._storages(dtype, key)
        if kind != "storage" or elements != len(flat):
            raise pickle.UnpicklingError(f"a storage of {elements} elements has {len(flat)}")
        return flat

    def make(self) -> None:
        """NEWOBJ: a module without attributes."""
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind is not _Module or arguments != ():
            raise pickle.UnpicklingError("it makes an object that is no module")
        self.stack.append(_Module({}))

    def fill(self) -> None:
        """BUILD: a module's attributes."""
        state, module = self.stack.pop(), self.stack[-1]
        if not isinstance(module, _Module) or not isinstance(state, dict):
            raise pickle.UnpicklingError("it gives a state to an object that is no module")
        module.attributes = state

    def call(self) -> None:
        """REDUCE: one of `_CALLS`."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not any(function is known for known in _CALLS.values()):
            raise pickle.UnpicklingError("it calls what is no function of its format")
        self.stack.append(function(*arguments))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES},
        **{pickle.NEWOBJ[0]: make, pickle.BUILD[0]: fill, pickle.REDUCE[0]: call},
    }


def _tensor(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage; torch checks that it lies within. More elements than the storage has are a bomb."""
    if not isinstance(flat, Tensor) or torch.Size(size).numel() > flat.numel():
        raise pickle.UnpicklingError(f"a tensor of size {size} has a smaller storage")
    return flat.as_strided(size, stride, offset)


def _nothing(*_: Any) -> None:
    return None


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): _nothing,  # hooks: always empty
    ("torch", "device"): _nothing,
    **{("torch.jit._pickle", f"build_{kind}list"): _nothing for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): _nothing,
}
"""A list among a module's attributes is no weight."""


def _walk(path: Path, tree: _Module) -> dict[str, Tensor]:
    """Dotted name -> tensor. A module that contains itself, or stands in very many places, is refused."""
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, _Module]] = [("", tree)]
    for visited, (prefix, module) in enumerate(waiting):
        if visited + len(found) > NODE_LIMIT:
            raise InputError(f"{path} is refused: more than {NODE_LIMIT:,} modules and tensors")
        for name, value in module.attributes.items():
            if isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value))
            elif isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
    return found
