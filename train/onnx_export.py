"""A trained model as ONNX: image.onnx and text.onnx, any number of rows, embeddings of unit length."""

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shards.atomic import write_json
from shards.errors import InputError

if TYPE_CHECKING:
    from train.export import Trained

OPSET = 18
TOLERANCE = 1e-4
"""Largest difference between embeddings of onnxruntime and torch, whose kernels sum in other orders."""
NAMES = {"image": "images", "text": "tokens"}
"""Tower -> its input: float32 (rows, 3, H, W), normalised; int64 (rows, context). All give `embeddings` (rows, D)."""


class _Unit(nn.Module):
    """A tower whose output has unit length."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.normalize(self.tower(inputs), dim=-1)


def write_onnx(trained: "Trained", folder: Path) -> None:
    """One file a tower, and config.json. InputError where a package is missing, or onnxruntime does not agree."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"--to onnx needs the package {error.name}: pip install -e '.[export]'") from None
    from train.export import compare

    images, tokens = trained.samples()
    for tower, example in (("image", images), ("text", tokens)):
        _write(_Unit(getattr(trained.model, tower)).eval(), example, folder / f"{tower}.onnx", NAMES[tower])
    about = {"step": trained.step, "context": trained.context, "preprocess": trained.preprocessing()}
    about |= {"logit_scale": trained.model.logit_scale.item(), "inputs": NAMES, "output": "embeddings"}
    write_json(folder / "config.json", about)
    sessions = {
        tower: onnxruntime.InferenceSession(folder / f"{tower}.onnx", providers=["CPUExecutionProvider"])
        for tower in NAMES
    }

    def encode(tower: str, inputs: Tensor) -> Tensor:
        return torch.from_numpy(sessions[tower].run(["embeddings"], {NAMES[tower]: inputs.numpy()})[0])

    try:  # on another number of rows than the files were made with
        compare(trained, partial(encode, "image"), partial(encode, "text"), tolerance=TOLERANCE, rows=3)
    except AssertionError as error:
        raise InputError(f"onnxruntime does not agree with torch ({error}); use --to safetensors") from None


def _write(model: nn.Module, example: Tensor, path: Path, name: str) -> None:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # an operator of torch's own that ONNX has not
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (example,),
                path,
                input_names=[name],
                output_names=["embeddings"],
                dynamic_shapes=({0: torch.export.Dim("rows")},),
                opset_version=OPSET,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
