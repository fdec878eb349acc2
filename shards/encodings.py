"""How an image's pixels become bytes: one pair of functions a codec, the registry that names them, what JPEG loses.

All but JPEG give back exactly what went in.
"""

import io
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from shards.schema import ImageSpec

_PILLOW = {"png": "PNG", "webp": "WEBP", "jpeg2k": "JPEG2000"}
"""Codec -> Pillow's name of it."""
_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
"""Pillow's kinds of images of 8 bits; it cuts off what others have more."""
Pixels = NDArray[np.uint8]
"""(H, W) grey levels."""
MODEL_SIZE = 224
"""Side of what a model sees, at which a loss is measured too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """One codec."""

    encode: Callable[[Pixels, ImageSpec], bytes]
    decode: Callable[[bytes | memoryview, ImageSpec], Pixels]
    lossless: bool


def encode(pixels: Pixels, spec: ImageSpec) -> bytes:
    """(H, W) grey levels to bytes. ValueError where the shape is not the spec's."""
    if pixels.shape != (spec.height, spec.width) or pixels.dtype != np.uint8:
        raise ValueError(f"pixels {pixels.dtype}{pixels.shape} are not uint8({spec.height}, {spec.width})")
    return ENCODINGS[spec.codec].encode(np.ascontiguousarray(pixels), spec)


def decode(content: bytes | memoryview, spec: ImageSpec) -> Pixels:
    """Bytes to (H, W) grey levels. ValueError where they are damaged or of another size."""
    pixels = ENCODINGS[spec.codec].decode(content, spec)
    if pixels.shape != (spec.height, spec.width):
        raise ValueError(f"an image of {pixels.shape[0]} x {pixels.shape[1]}, not {spec.height} x {spec.width}")
    return pixels


def check_header(content: bytes | memoryview, spec: ImageSpec) -> None:
    """ValueError where the header alone, in a codec of Pillow's, shows what `decode` would refuse."""
    _open(content, _PILLOW[spec.codec], spec).close()


def decode_image(content: bytes, spec: ImageSpec) -> Pixels:
    """`decode` of bytes from anywhere. ValueError, saying why, where they are not what our encoders make of the spec.

    A lie about the size costs nothing: it is seen before any pixel is decoded.
    """
    try:
        if spec.codec != "raw":
            # WebP knows no grey: it stores three equal channels.
            kind = "L" if spec.channels == 1 and spec.codec != "webp" else "RGB"
            _open(content, _PILLOW.get(spec.codec, "JPEG"), spec, frozenset({kind})).close()
        return decode(content, spec)
    except (ValueError, OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"it does not decode as {spec.codec}: {' '.join(str(error).split())[:120]}") from None


def _encode_jpeg(pixels: Pixels, spec: ImageSpec) -> bytes:
    # Pillow asks libjpeg-turbo for the accurate DCT. simplejpeg gets the fast one below quality 96, whatever its
    # `fastdct` says (as TurboJPEG's old interface does): at 95, 0.8 dB worse in 1.5 % more bytes, for 0.03 ms less.
    return _save(pixels, "JPEG", quality=spec.quality)


def _decode_jpeg(content: bytes | memoryview, spec: ImageSpec) -> Pixels:  # noqa: ARG001  (the header holds the size)
    return simplejpeg.decode_jpeg(content, "GRAY")[..., 0]


def _pillow(name: str, **options: object) -> Encoding:
    def encode_image(pixels: Pixels, spec: ImageSpec) -> bytes:  # noqa: ARG001
        return _save(pixels, name, **options)

    def decode_image(content: bytes | memoryview, spec: ImageSpec) -> Pixels:
        with _open(content, name, spec) as image:
            try:
                return np.asarray(image.convert("L"))
            except Exception as error:  # of all the kinds that Pillow's decoders raise
                raise ValueError(f"not a whole {name} image ({' '.join(str(error).split())[:80]})") from None

    return Encoding(encode=encode_image, decode=decode_image, lossless=True)


def _open(content: bytes | memoryview, name: str, spec: ImageSpec, kinds: frozenset[str] = _MODES) -> Image.Image:
    """An image of which the header alone was read. ValueError where it is of another size, or of none of the kinds."""
    try:
        image = Image.open(io.BytesIO(content), formats=(name,))
    except Exception:  # of many kinds, and their texts hold addresses in memory
        raise ValueError(f"not a {name} image") from None
    if image.size != (spec.width, spec.height):
        raise ValueError(f"an image of {image.height} x {image.width}, not {spec.height} x {spec.width}")
    if image.mode not in kinds:
        raise ValueError(f"a {name} image of kind {image.mode}, not {' or '.join(sorted(kinds))}")
    return image


def _save(pixels: Pixels, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=name, **options)
    return buffer.getvalue()


def _encode_raw(pixels: Pixels, spec: ImageSpec) -> bytes:  # noqa: ARG001
    return pixels.tobytes()


def _decode_raw(content: bytes | memoryview, spec: ImageSpec) -> Pixels:
    if len(content) != spec.height * spec.width:
        raise ValueError(f"{len(content):,} bytes are not {spec.height} x {spec.width} pixels")
    return np.frombuffer(content, dtype=np.uint8).reshape(spec.height, spec.width)


ENCODINGS = {
    "jpeg": Encoding(encode=_encode_jpeg, decode=_decode_jpeg, lossless=False),
    # Films seldom repeat themselves: looking for runs only is 5 times as fast as looking for matches, and 5 % smaller.
    "png": _pillow(_PILLOW["png"], compress_type=zlib.Z_RLE),
    # Quality is effort here: 50 takes half as long again for the same bytes, method 6 a hundred times for 5 % less.
    "webp": _pillow(_PILLOW["webp"], lossless=True, quality=25, method=4),
    "jpeg2k": _pillow(_PILLOW["jpeg2k"], irreversible=False),
    "raw": Encoding(encode=_encode_raw, decode=_decode_raw, lossless=True),
}
"""Codec -> its pair; the keys are those of `schema.CODEC_EXTENSIONS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """One film against itself, encoded and decoded."""

    error: float
    """Mean squared error, grey levels^2."""
    resized_error: float
    """The same after the bicubic resize of both to 224 x 224."""
    resized_difference: float
    """Mean absolute difference after that resize, grey levels."""


def loss(before: Pixels, after: Pixels) -> Loss:
    """Compare two films (H, W)."""
    resized = _difference(_resize(before), _resize(after))
    return Loss(
        error=float((_difference(before, after) ** 2).mean()),
        resized_error=float((resized**2).mean()),
        resized_difference=float(np.abs(resized).mean()),
    )


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 255; infinite without loss."""
    return 10 * math.log10(255**2 / mean_squared_error) if mean_squared_error else math.inf


def _resize(pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((MODEL_SIZE, MODEL_SIZE), Image.Resampling.BICUBIC))


def _difference(before: Pixels, after: Pixels) -> NDArray[np.int32]:
    # Whole numbers: their sums are exact, so that no CPU's order of adding shows in what --encoding auto picks.
    return before.astype(np.int32) - after
