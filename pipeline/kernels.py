"""From an encoded image to normalised pixels on the CPU, without an allocation an image.

    bytes -> grey pixels -> crop -> bicubic resize with antialias (uint8) -> flip, normalise, three channels

Measured on one core of an EPYC 9xx5, a 320 px q95 film of 21 KB: decode 190 us, resize to 224 px 188 us, the rest
95 us. Grey stays one channel until the last step, which writes straight into the batch.
"""

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from shards.encodings import decode
from shards.schema import ImageSpec

_resize = torch.ops.aten._upsample_bicubic2d_aa


class Normalise:
    """(x / 255 - mean) / std as one multiply-add a channel: x * gain + bias, x in 0..255."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        self.gain = [1 / (255 * each) for each in std]
        self.bias = [torch.tensor(-m / s) for m, s in zip(mean, std, strict=True)]

    def write(self, grey: torch.Tensor, out: torch.Tensor) -> None:
        """grey (H, W) float32 in 0..255 -> out (H, W, 3), any float dtype."""
        for channel, (gain, bias) in enumerate(zip(self.gain, self.bias, strict=True)):
            torch.add(bias, grey, alpha=gain, out=out[:, :, channel])


class ImageKernel:
    """Turns one image at a time; holds the scratch space of one thread."""

    def __init__(self, spec: ImageSpec, *, size: int, normalise: Normalise) -> None:
        height, width = self._shape = spec.height, spec.width
        self._spec = spec
        self._size = [size, size]
        self._normalise = normalise
        self._pixels = np.empty((height, width, 1), dtype=np.uint8)
        self._pixels_tensor = torch.from_numpy(self._pixels)[None, None, :, :, 0]
        self._small_tensor = torch.empty(1, 1, size, size, dtype=torch.uint8)
        self._small = self._small_tensor.numpy()[0, 0]
        self._grey = np.empty((size, size), dtype=np.float32)
        self._grey_tensor = torch.from_numpy(self._grey)

    def run(self, image: NDArray[np.uint8], box: list[int], flipped: bool, out: torch.Tensor) -> None:
        """One encoded image -> out (size, size, 3). ValueError where it is not an image of the expected size."""
        self._decode(image)
        y, x, h, w = box
        crop = self._pixels_tensor[:, :, y : y + h, x : x + w]
        _resize.out(crop, self._size, False, None, None, out=self._small_tensor)
        np.copyto(self._grey, self._small[:, ::-1] if flipped else self._small)
        self._normalise.write(self._grey_tensor, out)

    def _decode(self, image: NDArray[np.uint8]) -> None:
        if self._spec.codec != "jpeg":
            self._pixels[..., 0] = decode(image.data, self._spec)
            return
        pixels = simplejpeg.decode_jpeg(image, "GRAY", buffer=self._pixels)
        if pixels.shape[:2] != self._shape:
            raise ValueError(f"the image is {pixels.shape[0]}x{pixels.shape[1]}, not {self._shape[0]}x{self._shape[1]}")
