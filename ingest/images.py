"""One film out of an image file: 8/16-bit PNG, JPEG, WebP, TIFF; grey, RGB, RGBA, palette; DICOM by `ingest.dicom`.

What a file is called says nothing; its first bytes do.

The way to 320 x 320 is CheXzero's (`preprocess` of its `data_process.py`): colours first, the long side to 320 by
Lanczos, centred on black, grey last. Equal to its HDF5 pixel for pixel on all 94 films of the test data.
"""

import enum
import errno
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from shards.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")
"""What Pillow may sniff; the file's extension says nothing."""
MAX_PIXELS = 100_000_000
"""A film has 20 million; far more is a decompression bomb."""
STORAGE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""What the system says when a film may be sound and cannot be had right now."""


class Fault(enum.IntEnum):
    """Why a film cannot become a sample; the values stand in spills."""

    NONE = 0
    ALL_ZERO = 1
    CONSTANT = 2
    MISSING = 3
    UNREADABLE = 4
    TOO_LARGE = 5
    FRAMES = 6
    NO_PIXELS = 7
    UNSUPPORTED = 8
    NO_RANGE = 9
    DENIED = 10

    @property
    def reason(self) -> str:
        """What rejects.csv says."""
        return {
            Fault.NONE: "",
            Fault.ALL_ZERO: "film is all zero",
            Fault.CONSTANT: "film is constant",
            Fault.MISSING: "film file is missing or outside the folder",
            Fault.UNREADABLE: "film file cannot be decoded",
            Fault.TOO_LARGE: "film file declares too many pixels",
            Fault.FRAMES: "film file holds several frames",
            Fault.NO_PIXELS: "film file holds no pixels",
            Fault.UNSUPPORTED: "film file is DICOM of a kind that is not read",
            Fault.NO_RANGE: "film file has more than 8 bits and does not fill 16: --value-range says what is white "
            "(0 65535 if it is a dark one of 16)",
            Fault.DENIED: "film file may not be read: look at its permissions",
        }[self]


def read_film(path: Path, size: int, value_range: tuple[float, float] | None = None) -> NDArray[np.uint8] | Fault:
    """(size, size) grey levels of an image file, or why there are none. OSError where the fault is not the film's.

    `value_range` as `scaled` takes it; DICOM's films say themselves what is black and white.
    """
    try:
        if not path.is_file():  # a pipe would never end
            return Fault.MISSING
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open(path, "rb") as file:
                if _is_dicom(file):
                    from ingest.dicom import read_dicom  # pydicom is an extra

                    image = read_dicom(file)
                else:
                    image = _open_image(file, value_range)
                return image if isinstance(image, Fault) else fit(image, size)
    except InputError:  # a ValueError, but not about the film
        raise
    except FileNotFoundError:
        return Fault.MISSING
    except PermissionError:
        return Fault.DENIED
    except Image.DecompressionBombError:
        return Fault.TOO_LARGE
    except MemoryError:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from None
    except (OSError, SyntaxError, ValueError, TypeError) as error:  # Pillow's ways to say that a file is damaged
        if isinstance(error, OSError) and error.errno in STORAGE:
            raise
        return Fault.UNREADABLE


def _is_dicom(file: BinaryIO) -> bool:
    """Where a DICOM file says so. Files that do not are not guessed at."""
    return file.read(132)[128:] == b"DICM"


def _open_image(file: BinaryIO, value_range: tuple[float, float] | None) -> Image.Image | Fault:
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            return Fault.TOO_LARGE
        if _has_frames(image):
            return Fault.FRAMES
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):
            return _from_wide(np.asarray(upright), value_range)
        # Alpha is dropped, not blended, as OpenCV's reader does.
        narrow = upright if upright.mode == "L" else upright.convert("RGB")
        return narrow if value_range is None else Image.fromarray(scaled(np.asarray(narrow), value_range))


def _has_frames(image: Image.Image) -> bool:
    """Whether there is more than one film; the preview in a camera's JPEG (MPO) is none."""
    if image.format != "TIFF":
        return image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    try:
        image.seek(1)  # counting pages takes the square of their number
    except EOFError:
        return False
    return True


def _from_wide(wide: NDArray, value_range: tuple[float, float] | None) -> Image.Image | Fault:
    """Grey levels of a film of more than 8 bits: from `value_range`, else the upper 8 of 16, as OpenCV's reader gives.

    Without a range 16 bits must be full. They may hold 12 or 14, as from a DICOM film that was not brought to the full
    scale; which ones, the file does not say, and the upper 8 of them are nearly black.
    """
    if value_range is not None:
        return Image.fromarray(scaled(wide, value_range)) if np.isfinite(wide).all() else Fault.UNREADABLE
    whole = np.issubdtype(wide.dtype, np.integer) and wide.min() >= 0
    if whole and (32768 <= wide.max() <= 65535 or not wide.any()):
        return Image.fromarray((wide >> 8).astype(np.uint8))
    return Fault.NO_RANGE


def scaled(film: NDArray, value_range: tuple[float, float]) -> NDArray[np.uint8]:
    """Grey levels: LO becomes 0, HI 255, rounded, clipped. What a film of 8 bits cannot hold is said of wider ones,
    which may lie beside it: it is kept as it is.
    """
    low, high = value_range
    if film.dtype == np.uint8 and not 0 <= low < high <= 255:
        return film
    with np.errstate(over="ignore"):
        levels = (film.astype(np.float64) - low) * (255 / (high - low))
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def fit(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """(size, size): long side to `size`, centred, black around it."""
    ratio = size / max(image.size)
    width, height = (max(1, int(side * ratio)) for side in image.size)
    canvas = Image.new("L", (size, size))
    canvas.paste(image.resize((width, height), Image.Resampling.LANCZOS), ((size - width) // 2, (size - height) // 2))
    return np.asarray(canvas)
