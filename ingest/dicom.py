"""One film out of a DICOM file, as a viewer first shows it (DICOM PS3.3 C.11; the first view where there are several).

    stored values -> modality LUT or rescale -> VOI LUT, or window -> MONOCHROME1 turned over -> 8 bits

Films hold whole numbers of at most 16 bits, so that chain is worked out in float64 once for each value from the least
to the greatest that appears, rounded once, and looked up: exact, and no float copy of 20 million pixels. The 8 bits
come before the resize, as in a lab's PNG of the same film; after the resize both differ by less than its own rounding.
Without a usable window the film's least value becomes black and its greatest white, padding left out, which is how
MIMIC-CXR-JPG was made.

pydicom reads the tags named here and no other: no name, no id, no date enters this process. It also gives NumPy the
uncompressed and RLE pixels; Pillow decodes JPEG and JPEG 2000, gdcm, in a process of its own, what only gdcm can.
"""

import importlib
import logging
import struct
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ingest.gdcm_process import GdcmProcess
from ingest.images import MAX_PIXELS, Fault
from shards.errors import InputError

MAX_BYTES = 1 << 30
"""A file; 100 million pixels of 16 bits take a fifth of it."""

DECODERS = {
    "1.2.840.10008.1.2": "",  # implicit, little endian
    "1.2.840.10008.1.2.1": "",  # explicit, little endian
    "1.2.840.10008.1.2.2": "",  # explicit, big endian
    "1.2.840.10008.1.2.5": "pydicom",  # RLE
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG, 8 bits
    "1.2.840.10008.1.2.4.51": "pillow",  # JPEG extended; nobody here reads more than 8 bits of it
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG lossless
    "1.2.840.10008.1.2.4.70": "gdcm",  # JPEG lossless, first order: what most X-ray systems write
    "1.2.840.10008.1.2.4.80": "gdcm",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81": "gdcm",  # JPEG-LS
    "1.2.840.10008.1.2.4.90": "pillow",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91": "pillow",  # JPEG 2000
}
"""Transfer syntax -> what decodes it. Absent is what no film has, or what a small file can blow up with (deflate)."""

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")

_TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    "VOILUTSequence", "PixelData",
]  # fmt: skip

_GDCM = GdcmProcess()


def read_dicom(file: BinaryIO) -> Image.Image | Fault:
    """The film of an open DICOM file, 8-bit grey or RGB, or why there is none. InputError where pydicom is missing."""
    _need("pydicom")
    # Its warnings quote values.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    try:
        return _read(file)
    except (InputError, OSError, MemoryError):
        raise
    except Exception:  # damaged files make pydicom raise nearly anything, from AttributeError to RecursionError
        return Fault.UNREADABLE


def _need(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        raise InputError(f"a film is a DICOM file of a kind that needs {name}: pip install -e '.[dicom]'") from None


def _read(file: BinaryIO) -> Image.Image | Fault:
    from pydicom import dcmread
    from pydicom.pixels import pixel_array

    fault = _check_file(file) or _check_header(file)
    if fault:
        return fault
    file.seek(0)
    data = dcmread(file, specific_tags=_TAGS)
    decoder = DECODERS[data.file_meta.TransferSyntaxUID]
    if decoder in ("gdcm", "pillow") and _coded_size(data) != (data.Rows, data.Columns):
        return Fault.UNREADABLE
    if decoder and len(data.PixelData) > 2 * _raw_bytes(data) + 65_536:  # no encoder does that
        return Fault.UNREADABLE
    pixels = _by_gdcm(data) if decoder == "gdcm" else pixel_array(data, decoding_plugin=decoder)
    return Image.fromarray(to_grey(pixels, data) if data.SamplesPerPixel == 1 else pixels)


def _check_file(file: BinaryIO) -> Fault:
    """What can be said before the data set is touched: inflating it could fill the memory."""
    from pydicom.filereader import read_file_meta_info

    if file.seek(0, 2) > MAX_BYTES:
        return Fault.TOO_LARGE
    syntax = read_file_meta_info(file.name).get("TransferSyntaxUID")
    return Fault.NONE if syntax in DECODERS else Fault.UNSUPPORTED


def _check_header(file: BinaryIO) -> Fault:
    """What can be said before the pixels are read."""
    from pydicom import dcmread

    file.seek(0)
    header = dcmread(file, specific_tags=_TAGS, stop_before_pixels=True)
    if not file.read(1) or "Rows" not in header:
        return Fault.NO_PIXELS
    if int(header.get("NumberOfFrames") or 1) > 1:
        return Fault.FRAMES
    if header.Rows * header.Columns > MAX_PIXELS:
        return Fault.TOO_LARGE
    colour = header.SamplesPerPixel == 3
    bits, names = ((8,), COLOUR) if colour else ((8, 16), GREY)
    known = header.SamplesPerPixel in (1, 3) and header.PhotometricInterpretation in names
    return Fault.NONE if known and header.BitsAllocated in bits else Fault.UNSUPPORTED


def _raw_bytes(data: Any) -> int:
    return data.Rows * data.Columns * data.SamplesPerPixel * data.BitsAllocated // 8


def _by_gdcm(data: Any) -> NDArray[np.integer]:
    """(rows, columns) or (rows, columns, 3) stored values."""
    from pydicom.pixels.utils import as_pixel_options

    _need("gdcm")
    shape = (data.Rows, data.Columns, data.SamplesPerPixel)[: 2 if data.SamplesPerPixel == 1 else 3]
    syntax = str(data.file_meta.TransferSyntaxUID)
    return _GDCM.decode(syntax, as_pixel_options(data), data.PixelData).reshape(shape)


def _coded_size(data: Any) -> tuple[int, int]:
    """Rows and columns that the compressed frame declares itself: decoders allocate by it, whatever the tags say."""
    from pydicom.encaps import get_frame

    frame = get_frame(data.PixelData, 0, number_of_frames=1)
    if (start := frame.find(b"\xff\x4f\xff\x51")) >= 0 and not frame.startswith(b"\xff\xd8"):  # JPEG 2000: SOC, SIZ
        width, height, left, top = struct.unpack_from(">4I", frame, start + 8)
        return height - top, width - left
    place = 2
    while not (0xC0 <= frame[place + 1] <= 0xCF and frame[place + 1] not in (0xC4, 0xC8, 0xCC)):  # DHT, JPG, DAC
        if frame[place + 1] == 0xF7:  # JPEG-LS's own start of frame
            break
        place += 2 + struct.unpack_from(">H", frame, place + 2)[0]
    return struct.unpack_from(">2H", frame, place + 5)


def to_grey(stored: NDArray[np.integer], data: Any) -> NDArray[np.uint8]:
    """(H, W) stored values, 8 or 16 bits, to grey levels, 0 black."""
    low, high = int(stored.min()), int(stored.max())
    values = np.arange(low, high + 1)
    places = np.subtract(stored, low, dtype=np.int32)
    shown = _shown(_modality(values, data), data)
    if shown is None:
        present = (np.bincount(places.ravel(), minlength=len(values)) > 0) & ~_padding(values, data)
        shown = _stretch(_modality(values, data), present)
    if data.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    return np.rint(shown * 255).astype(np.uint8)[places]


def _modality(values: NDArray[np.int64], data: Any) -> NDArray[np.float64]:
    """(n,) stored values to what the modality means by them: C.11.1."""
    if data.get("ModalityLUTSequence"):
        return _look_up(values, data.ModalityLUTSequence[0], data)[0]
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    if slope is None or intercept is None:
        return values.astype(np.float64)
    return values.astype(np.float64) * float(slope) + float(intercept)


def _shown(values: NDArray[np.float64], data: Any) -> NDArray[np.float64] | None:
    """(n,) values to brightness, 0 to 1, by the first VOI LUT or window: C.11.2. None without a usable one."""
    if data.get("VOILUTSequence"):
        shown, bits = _look_up(values, data.VOILUTSequence[0], data)
        return np.clip(shown / (2**bits - 1), 0, 1)
    center, width = _first(data.get("WindowCenter")), _first(data.get("WindowWidth"))
    function = str(data.get("VOILUTFunction") or "LINEAR").upper()
    if not (np.isfinite(center) and np.isfinite(width)) or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700), dtype=np.float64))
    if function == "LINEAR":  # C.11.2.1.2.1: a width of 1 is a threshold
        center, width = center - 0.5, width - 1
    ramp = (values - center) / width + 0.5 if width else values > center
    return np.clip(np.asarray(ramp, dtype=np.float64), 0, 1)


def _look_up(values: NDArray[Any], item: Any, data: Any) -> tuple[NDArray[np.float64], int]:
    """(n,) values through a LUT, and the bits of its entries. Values beyond its ends take the first or last entry."""
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    entries = entries or 1 << 16
    content = item.LUTData
    if isinstance(content, bytes):
        wide = len(content) >= 2 * entries
        content = np.frombuffer(content, ("<u2" if data.original_encoding[1] else ">u2") if wide else "u1")
    table = np.asarray(content, dtype=np.float64).ravel()[:entries]
    return table[np.clip(np.rint(values) - first, 0, len(table) - 1).astype(np.int64)], bits


def _first(value: Any) -> float:
    """The first of a tag's numbers, NaN where it has none."""
    if value is None or isinstance(value, str):
        return np.nan
    return float(value) if not hasattr(value, "__len__") else float(value[0]) if len(value) else np.nan


def _padding(values: NDArray[np.int64], data: Any) -> NDArray[np.bool_]:
    """(n,) which stored values stand for no tissue: C.7.5.1.1.2."""
    first = data.get("PixelPaddingValue")
    if first is None:
        return np.zeros(len(values), dtype=bool)
    last = data.get("PixelPaddingRangeLimit")
    low, high = sorted((int(first), int(first if last is None else last)))
    return (values >= low) & (values <= high)


def _stretch(values: NDArray[np.float64], present: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(n,) values to 0..1 from the least to the greatest that is present; all black where only one is."""
    if not present.any():
        return np.zeros(len(values))
    black, white = values[present].min(), values[present].max()
    return np.clip((values - black) / (white - black), 0, 1) if white > black else np.zeros(len(values))
