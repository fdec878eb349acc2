"""From an encoded image to normalised pixels on the CPU, without an allocation an image.

    bytes -> grey pixels -> crop -> bicubic resize with antialias (uint8) -> flip, normalise, three channels

Grey stays one channel until the last step, which writes straight into the batch. Both steps are there twice, with the
same result to the bit: compiled (`jpeg` and `resize`), and by libjpeg-turbo and torch's operators, where numba is
missing or cannot compile. On one core of an EPYC 9xx5, a 320 px q95 film of 22 KB: 125 and 38 us against 200 and 300.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.decode import CompiledDecode, TurboDecode
from shards.encodings import decode
from shards.schema import ImageSpec

if TYPE_CHECKING:
    from pipeline.films import Films

_resize = torch.ops.aten._upsample_bicubic2d_aa
SMALLEST = 16
"""Edge in pixels below which the compiled resize has not enough for one vector."""


class Normalise:
    """(x / 255 - mean) / std as one multiply-add a channel: x * gain + bias, x in 0..255."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        self.gain = [1 / (255 * each) for each in std]
        self.bias = [torch.tensor(-m / s) for m, s in zip(mean, std, strict=True)]

    def write(self, grey: torch.Tensor, out: torch.Tensor) -> None:
        """grey (H, W) float32 in 0..255 -> out (H, W, 3), any float dtype."""
        for channel, (gain, bias) in enumerate(zip(self.gain, self.bias, strict=True)):
            torch.add(bias, grey, alpha=gain, out=out[:, :, channel])

    def table(self) -> NDArray[np.float32]:
        """(2, 48): gains and biases of 16 pixels of three channels."""
        return np.array([np.tile(self.gain, 16), np.tile([float(bias) for bias in self.bias], 16)], dtype=np.float32)


Crop = tuple[NDArray[np.uint8], list[int], bool, torch.Tensor]
"""Grey pixels (H, W); the box (y, x, h, w) of them that counts; whether flipped; where (size, size, 3) it goes."""


class TorchResize:
    """Pixels to the batch with torch's operators, which write a few intermediate images; one thread's scratch space."""

    def __init__(self, *, size: int, normalise: Normalise) -> None:
        self._size = [size, size]
        self._normalise = normalise
        self._small_tensor = torch.empty(1, 1, size, size, dtype=torch.uint8)
        self._small = self._small_tensor.numpy()[0, 0]
        self._grey = np.empty((size, size), dtype=np.float32)
        self._grey_tensor = torch.from_numpy(self._grey)

    def run(self, crops: Sequence[Crop]) -> None:
        """Write every crop to its place: resized, flipped, normalised."""
        for crop in crops:
            self._run(*crop)

    def _run(self, pixels: NDArray[np.uint8], box: list[int], flipped: bool, out: torch.Tensor) -> None:
        y, x, h, w = box
        if not pixels.flags.writeable:  # Pillow's; torch would warn
            pixels = pixels.copy()
        crop = torch.from_numpy(pixels)[None, None, y : y + h, x : x + w]
        _resize.out(crop, self._size, False, None, None, out=self._small_tensor)
        np.copyto(self._grey, self._small[:, ::-1] if flipped else self._small)
        self._normalise.write(self._grey_tensor, out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """How n pixels of a row or column become `size`."""

    table: NDArray[np.int32]
    """(size, 1 + taps): first input pixel, then the weights; a weight beyond the input is 0."""
    shift: int
    """The weights are multiples of 2 ** -shift."""
    address: tuple[int, int, int]
    """Address of the table, taps, shift: what compiled code takes. Valid as long as the object is."""


@lru_cache(maxsize=4096)
def axis(n: int, size: int) -> Axis:
    """The weights of torch's uint8 bicubic resize with antialias of n pixels to `size`, bit for bit.

    As `_upsample_bicubic2d_aa` has them (UpSampleKernel.cpp; Pillow's Resample.c before it): the cubic with a = -0.5,
    stretched over the input where that is larger, as int16 of the highest precision that fits.
    """
    scale = n / size
    stretch = max(scale, 1.0)
    support = 2 * stretch
    center = scale * (np.arange(size) + 0.5)
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), n) - first
    tap = np.arange(int(count.max()))
    weights = _cubic((tap + first[:, None] - center[:, None] + 0.5) / stretch) * (tap < count[:, None])
    weights /= np.add.accumulate(weights, axis=1)[:, -1:]  # summed in order, as aten does
    shift = _precision(float(weights.max()))
    whole = np.trunc(np.copysign(0.5, weights) + weights * (1 << shift))
    table = np.concatenate([first[:, None], whole], axis=1).astype(np.int32)
    return Axis(table=table, shift=shift, address=(table.ctypes.data, len(tap), shift))


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic with a = -0.5."""
    a, x = -0.5, np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _precision(largest: float) -> int:
    """The most bits with which the largest weight is still an int16."""
    return next((bits for bits in range(22) if int(0.5 + largest * (1 << (bits + 1))) >= 1 << 15), 22)


class CompiledResize:
    """With the compiled function of `resize`: this checks what that cannot, and owns the memory it works in."""

    def __init__(
        self, function: Callable[..., None], spec: ImageSpec, *, size: int, normalise: Normalise, dtype: str
    ) -> None:
        from pipeline.resize import DTYPES, scratch_bytes

        self._function, self.size, self._shape = function, size, (spec.height, spec.width)
        self.dtype = getattr(torch, dtype)
        self._table = normalise.table()
        self._scratch = np.empty(scratch_bytes(spec.height, spec.width, size), dtype=np.uint8)
        self.space = self._scratch.ctypes.data, self._table.ctypes.data, DTYPES[dtype]
        """What compiled code takes: address to work at, address of gains and biases, number of the output's dtype."""

    def run(self, crops: Sequence[Crop]) -> None:
        """See `TorchResize`."""
        # Addresses keep nothing alive. Nor does the cache of `axis` surely hold what it returned: where two threads ask
        # for the same at once, one of them gets what the cache has not kept.
        alive: list[object] = []
        numbers = np.array([self._numbers(crop, alive) for crop in crops], dtype=np.int64)
        self._function(numbers, self.size, *self.space)
        del alive

    def _numbers(self, crop: Crop, alive: list[object]) -> tuple[int, ...]:
        """A crop as compiled code takes it; `alive` gets what has to live as long as the numbers."""
        pixels, (y, x, h, w), flipped, out = crop
        height, width = self._shape
        assert pixels.shape == self._shape and pixels.dtype == np.uint8 and pixels.strides[1] == 1
        assert 0 <= y < y + h <= height and 0 <= x < x + w <= width
        assert out.shape == (self.size, self.size, 3) and out.dtype == self.dtype and out.is_contiguous()
        step = pixels.strides[0]
        source = pixels.ctypes.data + y * step + x
        if padded := min(h, w) < SMALLEST:
            room = np.zeros([-(-n // SMALLEST) * SMALLEST for n in (h, w)], dtype=np.uint8)
            room[:h, :w] = pixels[y : y + h, x : x + w]
            alive.append(room)
            source, step = room.ctypes.data, room.strides[0]
        along_x, along_y = axis(w, self.size), axis(h, self.size)
        alive += along_x, along_y
        return source, step, h, w, padded, flipped, *along_x.address, *along_y.address, out.data_ptr()


def make_resize(spec: ImageSpec, *, size: int, normalise: Normalise, dtype: str) -> "TorchResize | CompiledResize":
    """The fastest that works here."""
    functions = compiled_functions()
    if functions is None or size < SMALLEST:
        return TorchResize(size=size, normalise=normalise)
    return CompiledResize(functions[0], spec, size=size, normalise=normalise, dtype=dtype)


@cache
def compiled_functions() -> tuple[Callable[..., None], Callable[..., bool], Callable[..., int]] | None:
    """The functions of `resize`, `jpeg` and `films`, compiled or from the cache on disk; else a warning and None."""
    try:
        from pipeline.films import films_function
        from pipeline.jpeg import decode_function
        from pipeline.resize import resize_function

        return resize_function(), decode_function(), films_function()
    except Exception as error:  # numba is missing, or anything that its compiler says
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"the compiled kernels do not work here ({reason}); slower ones are used", stacklevel=2)
        return None


class ImageKernel:
    """Turns encoded images into those of a batch; holds the scratch space of one thread."""

    def __init__(
        self, spec: ImageSpec, *, size: int, normalise: Normalise, dtype: str = "float32", own_jpeg: bool = True
    ) -> None:
        self._spec = spec
        self._resize = make_resize(spec, size=size, normalise=normalise, dtype=dtype)
        functions = compiled_functions()
        self._jpeg = CompiledDecode(functions[1], spec) if functions and own_jpeg else TurboDecode(spec)
        self._films: Films | None = None
        if functions and isinstance(self._resize, CompiledResize) and own_jpeg and spec.codec in ("jpeg", "raw"):
            from pipeline import films

            decode = self._jpeg if isinstance(self._jpeg, CompiledDecode) else CompiledDecode(functions[1], spec)
            self._films = films.Films(functions[2], spec, self._resize, decode)

    def run(
        self,
        spans: NDArray[np.int64],
        boxes: NDArray[np.int64],
        flipped: NDArray[np.bool_],
        out: torch.Tensor,
        first: int,
        end: int,
    ) -> int:
        """Encoded images number first .. end - 1 -> where they go; number of the first that has to go one by one.

        spans: (n, 2) address and bytes of each; what is there has to stay. boxes: (views * n, 4) crops y, x, h, w, of
        view v of image i at v * n + i; flipped: (views * n,) too. out: (views * n or more, size, size, 3).
        """
        return first if self._films is None else self._films.run(spans, boxes, flipped, out, first, end)

    def resize(self, crops: Sequence[Crop]) -> None:
        """See `TorchResize.run`."""
        self._resize.run(crops)
        if self._films is not None:
            for _, box, _, _ in crops:
                self._films.learn(box)

    def decode(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One encoded image -> its pixels (H, W), valid until the next; those of `raw` are the bytes themselves.

        ValueError where it is not an image of the expected size.
        """
        return self._jpeg.run(image) if self._spec.codec == "jpeg" else decode(image.data, self._spec)
