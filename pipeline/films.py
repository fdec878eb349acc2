"""Whole films in one compiled call: from the coded pixels to the batch, one film after the other.

A film goes through decoder (`jpeg`) and resize (`resize`) before the next one is touched, so that it never leaves the
core's cache; and a thread that has the interpreter's lock once for many films seldom waits for it. Whatever is not as
it nearly always is (another header, damage, a crop of a size that is new or tiny) is left to the caller, film by film.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import njit, types
from numpy.typing import NDArray

from pipeline import dct, jpeg, jpeg_header, resize
from pipeline.compiled import compiled, stamp_of
from pipeline.decode import CompiledDecode
from pipeline.jpeg import ARRAYS, SLACK, _decode_one, _load_word
from pipeline.jpeg_header import NO_HEADER
from pipeline.kernels import SMALLEST, CompiledResize, axis
from pipeline.resize import _resize_one
from shards.schema import ImageSpec

RAW, HEIGHT, WIDTH, SIZE, ROWS, COLUMNS, PIXELS, STEP, DECODING, RESIZING, NORMALISE, DTYPE = range(12)
"""Places in the array of what is the same for all films: whether they are bare pixels; their height and width; height
and width of the images; then `space` of the decoder and of the resize in `kernels`."""


@njit(nogil=True)
def _begins(source, size, content, count):
    """Whether the bytes at an address, `size` of them, begin with the `count` at `content`, which are 8 at least."""
    if size < count:
        return False
    for at in range(0, count - 7, 8):
        if _load_word(source + at) != _load_word(content + at):
            return False
    return _load_word(source + count - 8) == _load_word(content + count - 8)


@njit(nogil=True)
def _fit(boxes, axes, number, count, height, width):
    """Whether the crops of a film lie within it and the tables of their sizes are there."""
    for image in range(number, len(boxes), count):
        y, x, h, w = boxes[image, 0], boxes[image, 1], boxes[image, 2], boxes[image, 3]
        if not (0 <= y and 0 <= x and 0 < h <= height - y and 0 < w <= width - x and axes[h, 0] and axes[w, 0]):
            return False
    return True


def _make(stamp: int) -> Callable[..., int]:
    """The function, for compiling, see `stamp_of`."""

    def run(spans, boxes, flipped, first, end, out, fixed, axes, content, quant, header, places, stuffed, coefficients):
        """Films number first .. end - 1 -> their images; number of the first that is not done.

        spans: (n, 2) int64, address and bytes of each. boxes: (views * n, 4) int64 y, x, h, w; flipped: (views * n,).
        out: address of (views * n, size, size, 3). fixed: see RAW. axes: (longest edge + 1, 3) int64, address, taps
        and shift of the table of each length, 0 where it is not known or too short. content: the header; what follows
        are arguments of `jpeg._decode_one`.
        """
        if stamp == 0:  # so that it is part of the function
            return 0
        count, size, step = len(spans), fixed[SIZE], fixed[STEP]
        image_bytes = size * size * 3 * (4 if fixed[DTYPE] == 0 else 2)
        begin = len(content)
        for number in range(first, end):
            source, coded = spans[number, 0], spans[number, 1]
            if not _fit(boxes, axes, number, count, fixed[HEIGHT], fixed[WIDTH]):
                return number
            if fixed[RAW]:
                pixels, step = source, fixed[WIDTH]
                if coded != fixed[HEIGHT] * fixed[WIDTH]:
                    return number
            else:
                pixels = fixed[PIXELS]
                if not _begins(source, coded, content.ctypes.data, begin) or coded - begin > len(stuffed) - SLACK:
                    return number
                if not _decode_one(
                    source + begin, coded - begin, fixed[ROWS], fixed[COLUMNS], pixels, step, fixed[DECODING],
                    quant, header, places, stuffed, coefficients,
                ):  # fmt: skip
                    return number
            for image in range(number, len(boxes), count):
                y, x, h, w = boxes[image, 0], boxes[image, 1], boxes[image, 2], boxes[image, 3]
                _resize_one(
                    pixels + y * step + x, step, h, w, False, flipped[image],
                    (axes[w, 0], axes[w, 1], axes[w, 2]), (axes[h, 0], axes[h, 1], axes[h, 2]),
                    size, fixed[RESIZING], fixed[NORMALISE], out + image * image_bytes, fixed[DTYPE],
                )  # fmt: skip
        return end

    return run


@cache
def films_function() -> Callable[..., int]:
    """`run` above, compiled. Seconds the first time on a machine, 0.1 s from the cache on disk."""
    pairs, table, size = types.int64[:, ::1], types.int64[::1], types.intp
    content = types.Array(types.uint8, 1, "C", readonly=True)
    arguments = pairs, pairs, types.boolean[::1], size, size, size, table, pairs, content, *ARRAYS
    return compiled(_make(stamp_of(dct, jpeg, jpeg_header, resize)), types.intp(*arguments))


class Films:
    """Both in one compiled call for many films, with the memory of a `CompiledResize` and of a `CompiledDecode`."""

    def __init__(
        self, function: Callable[..., int], spec: ImageSpec, resize: CompiledResize, decode: CompiledDecode
    ) -> None:
        self._function, self._decode, self._size, self._dtype = function, decode, resize.size, resize.dtype
        raw = spec.codec == "raw"
        self._blank = NO_HEADER if raw else None
        numbers = [raw, spec.height, spec.width, resize.size, *decode.space, *resize.space]
        self._fixed = np.array(numbers, dtype=np.int64)
        self._axes = np.zeros((max(spec.height, spec.width) + 1, 3), dtype=np.int64)
        self._alive: list[object] = []

    def run(
        self,
        spans: NDArray[np.int64],
        boxes: NDArray[np.int64],
        flipped: NDArray[np.bool_],
        out: torch.Tensor,
        first: int,
        end: int,
    ) -> int:
        """See `ImageKernel.run`."""
        header = self._blank or self._decode.header
        if header is None:
            return first
        assert out.shape[1:] == (self._size, self._size, 3) and out.dtype == self._dtype and out.is_contiguous()
        assert len(spans) <= len(boxes) == len(flipped) <= len(out)
        return self._function(
            spans,
            boxes,
            flipped,
            first,
            end,
            out.data_ptr(),
            self._fixed,
            self._axes,
            np.frombuffer(header.content, dtype=np.uint8),
            *self._decode.arrays(header),
        )

    def learn(self, box: list[int]) -> None:
        """Take crops of this size from now on, if they are not too small."""
        for length in box[2:]:
            if length >= SMALLEST and not self._axes[length, 0]:
                table = axis(length, self._size)
                self._alive.append(table)
                self._axes[length] = table.address
