"""`python tests/fuzz_jpeg.py FILMS SEED`: damaged JPEGs through the compiled decoder, all its memory between walls.

Every array that it reads or writes (film, tables, space to work in, pixels) begins right after or ends right before a
page that cannot be touched, so that one byte too far is a SIGSEGV: run it in a process of its own. Whatever the bytes,
the outcome has to be libjpeg-turbo's: the same pixels, or the same refusal. Prints counts; exit code 1 on a difference.
"""

import ctypes
import io
import json
import mmap
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.decode import CompiledDecode
from pipeline.jpeg_header import Header, parse_header
from pipeline.kernels import compiled_functions
from shards.schema import ImageSpec

Bytes = NDArray[np.uint8]
SIZE = 64, 88


class Walled:
    """Memory with a wall before and behind; reused."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        self._size = -(-size // page) * page
        memory = np.frombuffer(mmap.mmap(-1, self._size + 2 * page), dtype=np.uint8)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for wall in (0, page + self._size):
            if protect(ctypes.c_void_p(memory.ctypes.data + wall), page, 0):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._inside = memory[page : page + self._size]

    def take(self, size: int, late: bool) -> Bytes:
        """`size` bytes that end at the wall behind (late) or begin at the one before."""
        return self._inside[self._size - size :] if late else self._inside[:size]


class Fuzz:
    """One decoder between walls, and what became of what it was given."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.counts: Counter[str] = Counter()
        self._walls: dict[str, Walled] = {}
        functions = compiled_functions()
        assert functions is not None
        self._function = functions[1]
        qualities = (95, 95, 95, 90, 75, 50, 100, 95, 30, 85, 5, 99)
        self.films = [encode(self._film(kind), quality) for kind, quality in enumerate(qualities)]
        self.headers = [parse_header(film.tobytes()) for film in self.films]

    def _film(self, kind: int) -> NDArray[np.uint8]:
        steps = self.rng.normal(0, 2 + 3 * kind, SIZE)
        return np.clip(np.cumsum(steps, axis=kind % 2) + 128, 0, 255).astype(np.uint8)

    def walled(self, name: str, array: np.ndarray) -> np.ndarray:
        """A copy of an array at a wall."""
        if name not in self._walls:
            self._walls[name] = Walled(max(array.nbytes, 1 << 16))
        place = self._walls[name].take(array.nbytes, bool(self.rng.integers(2)))
        copy = place.view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    def damaged(self, number: int) -> Bytes:
        """A film with some bytes changed, cut, doubled or taken from another one; now and then as it was."""
        one, other = self.films[number].copy(), self.films[self.rng.integers(len(self.films))]
        header = len(self.headers[number].content)
        kind = self.rng.integers(0, 8)
        first = 0 if kind < 2 else header
        for _ in range(self.rng.integers(0, 9) if kind < 7 else 0):
            place = self.rng.integers(first, len(one))
            some = self.rng.integers(0, 256), 0, 255, one[place] ^ (1 << self.rng.integers(0, 8))
            one[place] = self.rng.choice(some)
        if kind in (1, 4):
            one = one[: self.rng.integers(0, len(one) + 1)]
        if kind == 5:
            cut, behind = self.rng.integers(header, len(one)), self.rng.integers(0, len(other))
            one = np.concatenate([one[:cut], other[behind:]])
        if kind == 6:
            begin, end = sorted(self.rng.integers(header, len(one), 2))
            one = np.concatenate([one[:end], one[begin:]])
        return one

    def one(self) -> None:
        """Decode one damaged film."""
        number = int(self.rng.integers(len(self.films)))
        film, decoder = self.damaged(number), self._decoder()
        image = self.walled("film", film) if len(film) else film
        begin = len(self.headers[number].content)
        if film[:begin].tobytes() == self.headers[number].content:
            decoder.header = self._tables(self.headers[number])
        elif (header := parse_header(film.tobytes())) and (header.height, header.width) == SIZE:
            begin = len(header.content)
            decoder._stuffed = self._room(decoder, len(film) - begin)
            decoder._decode(image, self._tables(header))  # which `run` would do and then ask libjpeg-turbo
            self.counts["other headers"] += 1
        decoder._stuffed = self._room(decoder, max(0, len(film) - begin))
        ours, expected = outcome(lambda: decoder.run(image)), outcome(lambda: turbo(film))
        self.counts["left to libjpeg-turbo" if decoder.asked else "decoded alone"] += 1
        self.counts["films"] += 1
        self.counts["different"] += not same(ours, expected)

    def _decoder(self) -> "Watched":
        made = Watched(self._function, ImageSpec(height=SIZE[0], width=SIZE[1]))
        for name in ("_places", "_coefficients", "_scratch", "_pixels"):
            setattr(made, name, self.walled(name, getattr(made, name)))
        made._film = made._pixels[: SIZE[0], : SIZE[1]]
        return made

    def _tables(self, header: Header) -> Header:
        arrays = {each.name: getattr(header, each.name) for each in fields(header)}
        walled = {name: self.walled(name, array) for name, array in arrays.items() if isinstance(array, np.ndarray)}
        return replace(header, **walled)

    def _room(self, decoder: CompiledDecode, size: int) -> Bytes:
        return self.walled("stuffed", np.zeros(size + decoder._slack, dtype=np.uint8))


class Watched(CompiledDecode):
    """Counts how often libjpeg-turbo is asked."""

    def __init__(self, function: Any, spec: ImageSpec) -> None:
        super().__init__(function, spec)
        self.asked, self._run = 0, self._turbo.run
        self._turbo.run = self._ask

    def _ask(self, image: Bytes) -> Bytes:
        self.asked += 1
        return self._run(image)


def encode(film: NDArray[np.uint8], quality: int) -> Bytes:
    """A JPEG as ingest makes it."""
    stream = io.BytesIO()
    Image.fromarray(film).save(stream, "JPEG", quality=quality)
    return np.frombuffer(stream.getvalue(), dtype=np.uint8)


def turbo(film: Bytes) -> Bytes:
    """What the loader does without our decoder."""
    pixels = simplejpeg.decode_jpeg(film, "GRAY")[..., 0]
    if pixels.shape != SIZE:
        raise ValueError("another size")
    return pixels


def outcome(decode: Callable[[], Bytes]) -> Bytes | None:
    """A copy of the pixels, None where the bytes are refused."""
    try:
        return decode().copy()
    except ValueError:
        return None


def same(one: Bytes | None, other: Bytes | None) -> bool:
    """Whether two outcomes are one."""
    return one is other if one is None or other is None else np.array_equal(one, other)


def main(films: int, seed: int) -> int:
    """Decode so many films; 1 where one differs."""
    fuzz = Fuzz(seed)
    for _ in range(films):
        fuzz.one()
    sys.stdout.write(json.dumps(fuzz.counts) + "\n")
    return int(fuzz.counts["different"] > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
