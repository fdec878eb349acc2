"""Grey JPEG to pixels on the CPU: by the compiled decoder of `jpeg` where a film is like the others, else by
libjpeg-turbo. Both have the same pixels to the bit."""

from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.jpeg_header import Header, parse_header
from shards.encodings import check_header, decode
from shards.schema import ImageSpec

MOST_HEADERS = 8
"""Headers that a decoder reads, 10 ms each."""


class TurboDecode:
    """JPEG by libjpeg-turbo, into a buffer that is used again."""

    def __init__(self, spec: ImageSpec) -> None:
        self._shape = spec.height, spec.width
        self._pixels = np.empty((*self._shape, 1), dtype=np.uint8)

    def run(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A JPEG -> (H, W), valid until the next. ValueError where it is none or of another size."""
        check_jpeg(image, self._shape)
        return simplejpeg.decode_jpeg(image, "GRAY", buffer=self._pixels)[..., 0]


def check_jpeg(image: NDArray[np.uint8], shape: tuple[int, int]) -> None:
    """ValueError where the header shows an image of another size, or one whose grey levels are a matter of taste."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    if (height, width) != shape:
        raise ValueError(f"the image is {height}x{width}, not {shape[0]}x{shape[1]}")
    if colours in ("CMYK", "YCCK"):
        raise ValueError(f"the image is {colours}")


def check_image(image: NDArray[np.uint8], spec: ImageSpec) -> None:
    """ValueError where an encoded image is not what the data set says, as far as its header or its size shows."""
    if spec.codec == "jpeg":
        check_jpeg(image, (spec.height, spec.width))
    elif spec.codec == "raw":
        decode(image.data, spec)
    else:
        check_header(image.data, spec)


class CompiledDecode:
    """JPEG by the compiled function of `jpeg`; what that does not take goes to libjpeg-turbo.

    Films that ingest wrote have one header for all: it is read once, and taken for known if the film's pixels then are
    those of libjpeg-turbo. Where headers differ (Huffman tables made for each film), reading them would take longer
    than it saves: after MOST_HEADERS of them, libjpeg-turbo gets whatever has not the last one.
    """

    def __init__(self, function: Callable[..., bool], spec: ImageSpec) -> None:
        from pipeline.dct import LANES, SCRATCH
        from pipeline.jpeg import DUMMY, PLACES, SLACK
        from pipeline.jpeg_header import ZIGZAG

        self._function, self._shape, self._turbo = function, (spec.height, spec.width), TurboDecode(spec)
        self.header: Header | None = None
        """The films', once it is known."""
        self._headers = 0
        rows, columns = -(-spec.height // 8), -(-spec.width // 8)
        stride = -(-columns // LANES) * LANES
        self._blocks = rows, columns
        self._places = np.full(PLACES, DUMMY * stride, dtype=np.uint64)
        self._places[:64] = ZIGZAG * stride
        self._stuffed, self._slack = np.empty(0, dtype=np.uint8), SLACK
        self._coefficients = np.empty((DUMMY + 1) * stride, dtype=np.int16)
        self._scratch = np.empty(SCRATCH, dtype=np.uint8)
        self._pixels = np.empty((8 * rows, 8 * stride), dtype=np.uint8)
        self._film = self._pixels[: spec.height, : spec.width]

    def run(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See `TurboDecode`."""
        header = self._known(image)
        if header is None:
            return self._turbo.run(image)
        return self._film if self._decode(image, header) else self._turbo.run(image)

    @property
    def space(self) -> tuple[int, ...]:
        """What compiled code takes: rows and columns of blocks, addresses of pixels, bytes between their rows, address
        to work at."""
        return *self._blocks, self._pixels.ctypes.data, self._pixels.strides[0], self._scratch.ctypes.data

    def arrays(self, header: Header) -> tuple[object, ...]:
        """And these: quantisation, codes, places of coefficients, space for coded pixels and for coefficients."""
        tables = header.codes, header.pairs, header.long_codes, header.symbols
        return header.quant, tables, self._places, self._stuffed, self._coefficients

    def _decode(self, image: NDArray[np.uint8], header: Header) -> bool:
        """A JPEG with this header -> `_film`; whether it is sound."""
        begin = len(header.content)
        size = len(image) - begin
        if len(self._stuffed) < size + self._slack:
            self._stuffed = np.empty(2 * size + self._slack, dtype=np.uint8)
        return self._function(image.ctypes.data + begin, size, *self.space, *self.arrays(header))

    def _known(self, image: NDArray[np.uint8]) -> Header | None:
        """The image's header, if it is the last one, or one that may be read and that libjpeg-turbo reads alike."""
        header = self.header
        if header is not None and image[: len(header.content)].tobytes() == header.content:
            return header
        if self._headers == MOST_HEADERS:
            return None
        self._headers += 1
        header = parse_header(image.tobytes())
        if header is None or (header.height, header.width) != self._shape:
            return None
        if not self._decode(image, header) or not np.array_equal(self._film, self._turbo.run(image)):
            return None
        self.header = header
        return header
