"""A trained model as ONNX: image.onnx and text.onnx, any number of rows, embeddings of unit length."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from shards.atomic import write_atomic
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
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"--to onnx needs the package {error.name}: pip install -e '.[export]'") from None
    images, tokens = trained.samples()
    for tower, example in (("image", images), ("text", tokens)):
        _write(_Unit(getattr(trained.model, tower)).eval(), example, folder / f"{tower}.onnx", NAMES[tower])
    about = {"step": trained.step, "context": trained.context, "preprocess": trained.preprocessing()}
    about |= {"logit_scale": trained.model.logit_scale.item(), "inputs": NAMES, "output": "embeddings"}
    write_atomic(folder / "config.json", (json.dumps(about, indent=1) + "\n").encode())
    for tower, inputs in zip(("image", "text"), trained.samples(count=3), strict=True):
        _check(_Unit(getattr(trained.model, tower)), inputs, folder / f"{tower}.onnx", NAMES[tower])


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


def _check(model: nn.Module, inputs: Tensor, path: Path, name: str) -> None:
    """On another number of rows than the file was made with. InputError where onnxruntime does not agree with torch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["embeddings"], {name: inputs.numpy()})
    with torch.inference_mode():
        difference = np.abs(model(inputs).numpy() - found).max().item()
    if not difference <= TOLERANCE:
        raise InputError(f"onnxruntime's embeddings of {path.name} differ from torch's by {difference:.1e}")
