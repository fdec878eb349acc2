"""The compiled kernels against torch's and libjpeg-turbo's: to the bit, on any shape, within their memory."""

import ctypes
import io
import json
import mmap
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import REPOSITORY, made_up_images
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from pipeline import kernels
from pipeline.augment import crop_boxes, flips
from pipeline.batch import World
from pipeline.compiled import compiled as compile_function
from pipeline.config import CLIP_MEAN, CLIP_STD, LoaderConfig
from pipeline.decode import MOST_HEADERS, CompiledDecode, TurboDecode
from pipeline.kernels import (
    CompiledResize,
    ImageKernel,
    Normalise,
    TorchResize,
    compiled_functions,
    make_resize,
)
from pipeline.loader import build_loader
from shards.schema import ImageSpec

Box = list[int]
DTYPES = ("float32", "float16", "bfloat16")
NORMALISE = Normalise(CLIP_MEAN, CLIP_STD)


def compiled(shape: tuple[int, int], size: int, dtype: str = "float32") -> CompiledResize:
    """The compiled resize for images of a shape; fails where it cannot be compiled."""
    spec = ImageSpec(height=shape[0], width=shape[1], codec="raw")
    resize = make_resize(spec, size=size, normalise=NORMALISE, dtype=dtype)
    assert isinstance(resize, CompiledResize)
    return resize


def both(pixels: np.ndarray, box: Box, size: int, flipped: bool, dtype: str = "float32") -> tuple[torch.Tensor, ...]:
    """(size, size, 3) by the compiled resize and by torch's operators."""
    outs = [torch.full((size, size, 3), torch.nan, dtype=getattr(torch, dtype)) for _ in range(2)]
    compiled(pixels.shape, size, dtype).run([(pixels, box, flipped, outs[0])])
    TorchResize(size=size, normalise=NORMALISE).run([(pixels, box, flipped, outs[1])])
    return tuple(outs)


@st.composite
def crops(draw: st.DrawFn) -> tuple[np.ndarray, Box, int, bool]:
    """An image of noise, of any contrast up to bare black and white, a crop of it, a size, a flip."""
    height, width = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
    box = [draw(st.integers(0, height - h)), draw(st.integers(0, width - w)), h, w]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    pixels = rng.integers(0, 256, (height, width), dtype=np.uint8)
    if draw(st.booleans()):
        pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
    size = draw(st.sampled_from([16, 17, 31, 64, 96, 224, 225]))
    return pixels, box, size, draw(st.booleans())


@settings(max_examples=150)
@given(crops(), st.sampled_from(DTYPES))
def test_equals_torch_to_the_bit_on_any_crop(crop: tuple[np.ndarray, Box, int, bool], dtype: str) -> None:
    """Resize, rounding, clipping, flip, normalisation (one fused multiply-add) and rounding to half precision."""
    ours, expected = both(*crop, dtype)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", [224, 256, 518])
def test_equals_torch_for_every_length_of_a_side(size: int) -> None:
    """Each length has its own weights, rounded to int16: 1 to 700, both ways."""
    pixels = np.random.default_rng(3).integers(0, 256, (700, 40), dtype=np.uint8)
    resize, other = compiled((700, 40), size), TorchResize(size=size, normalise=NORMALISE)
    out, expected = torch.empty(size, size, 3), torch.empty(size, size, 3)
    for length in [*range(1, 40), *range(40, 700, 13), 320, 700]:
        resize.run([(pixels, [700 - length, 0, length, 40], False, out)])
        other.run([(pixels, [700 - length, 0, length, 40], False, expected)])
        assert torch.equal(out, expected), length
    pixels = np.ascontiguousarray(pixels.T)
    resize = compiled((40, 700), size)
    for length in [*range(1, 40, 5), *range(40, 700, 29), 320, 700]:
        resize.run([(pixels, [0, 700 - length, 40, length], True, out)])
        other.run([(pixels, [0, 700 - length, 40, length], True, expected)])
        assert torch.equal(out, expected), length


def real_films(real_data: Path, count: int) -> list[np.ndarray]:
    paths = sorted((real_data / "nih" / "images").glob("*.png"))[:count]
    bicubic = Image.Resampling.BICUBIC
    return [np.array(Image.open(path).convert("L").resize((320, 320), bicubic)) for path in paths]


def test_stays_within_a_rounding_of_torchvisions_float_resize(real_data: Path) -> None:
    """The bound that the design sets, on real films, against float32 throughout."""
    films = real_films(real_data, 24)
    boxes = crop_boxes(5, np.arange(len(films)), height=320, width=320, scale=(0.9, 1.0)).tolist()
    flipped = flips(5, np.arange(len(films)), probability=0.5).tolist()
    unit = Normalise((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    resize = make_resize(ImageSpec(), size=224, normalise=unit, dtype="float32")
    out = torch.empty(224, 224, 3)
    differences = []
    for film, (y, x, h, w), flip in zip(films, boxes, flipped, strict=True):
        resize.run([(film, [y, x, h, w], flip, out)])
        pixels = torch.from_numpy(film)[None].float()
        small = transforms.resized_crop(pixels, y, x, h, w, [224, 224], InterpolationMode.BICUBIC, antialias=True)
        expected = (small.flip(-1) if flip else small).clamp(0, 255)
        assert torch.equal(out[..., 0], out[..., 1]) and torch.equal(out[..., 0], out[..., 2])
        differences.append((out[..., 0] - expected[0]).abs())
    assert (difference := torch.stack(differences)).max() > 0
    assert difference.mean() <= 0.3  # the reference is not rounded to whole levels: that alone is 0.25
    assert (difference <= 1).float().mean() >= 0.999


@contextmanager
def before_a_wall(size: int) -> Iterator[np.ndarray]:
    """`size` bytes that end where memory can no longer be read: a step beyond kills the process."""
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, pages + mmap.PAGESIZE), dtype=np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    wall = ctypes.c_void_p(memory.ctypes.data + pages)
    assert protect(wall, mmap.PAGESIZE, 0) == 0, os.strerror(ctypes.get_errno())
    try:
        yield memory[pages - size : pages]
    finally:
        protect(wall, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("shape", [(16, 16), (320, 320), (100, 333), (7, 50)])
def test_reads_and_writes_nothing_beyond_its_memory(shape: tuple[int, int]) -> None:
    """Raw shards are read where they lie; the result has borders."""
    with before_a_wall(shape[0] * shape[1]) as memory:
        pixels = memory.reshape(shape)
        pixels[:] = made_up_images(2)[1, : shape[0], : shape[1]] if shape[1] <= 320 else 99
        for size, dtype in [(224, "float32"), (17, "float32"), (224, "float16"), (33, "bfloat16")]:
            border = torch.full((size + 2, size, 3), 7.0, dtype=getattr(torch, dtype))
            compiled(shape, size, dtype).run([(pixels, [0, 0, *shape], False, border[1:-1])])
            assert (border[0] == 7).all() and (border[-1] == 7).all() and not (border[1:-1] == 7).any()


def test_what_would_leave_the_image_is_refused() -> None:
    resize, out = compiled((40, 50), 32), torch.empty(32, 32, 3)
    pixels = np.zeros((40, 50), dtype=np.uint8)
    for box in ([0, 0, 41, 50], [1, 0, 40, 50], [0, 1, 40, 50], [-1, 0, 40, 50], [0, 0, 0, 50]):
        with pytest.raises(AssertionError):
            resize.run([(pixels, box, False, out)])
    with pytest.raises(AssertionError):
        resize.run([(pixels[:, :49], [0, 0, 10, 10], False, out)])
    with pytest.raises(AssertionError):
        resize.run([(pixels, [0, 0, 10, 10], False, torch.empty(31, 32, 3))])
    with pytest.raises(AssertionError):
        resize.run([(pixels, [0, 0, 10, 10], False, torch.empty(32, 32, 3, dtype=torch.float64))])


class Untouched:
    """Stands in for libjpeg-turbo where it is not to be asked."""

    def run(self, image: np.ndarray) -> np.ndarray:
        raise LookupError(f"{len(image)} bytes were left to libjpeg-turbo")


def decoder(height: int, width: int, known: np.ndarray | None = None) -> CompiledDecode:
    """The compiled decoder; one that knows the header of a film has no libjpeg-turbo to fall back upon."""
    functions = compiled_functions()
    assert functions is not None
    made = CompiledDecode(functions[1], ImageSpec(height=height, width=width))
    if known is not None:
        made.run(known)
        made._turbo = Untouched()  # type: ignore[assignment]
    return made


def jpeg(pixels: np.ndarray, **options: object) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **options)
    return np.frombuffer(stream.getvalue(), dtype=np.uint8)


def turbo(image: np.ndarray) -> np.ndarray:
    return simplejpeg.decode_jpeg(image, "GRAY")[..., 0]


@settings(max_examples=150)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 100), st.booleans(), st.integers(0, 5))
def test_decodes_as_libjpeg_turbo_does(height: int, width: int, quality: int, optimize: bool, kind: int) -> None:
    """Any shape, any quality, smooth fields, noise; black and white noise has larger coefficients than it takes."""
    rng = np.random.default_rng(kind)
    pixels = rng.integers(0, 256, (height, width)).astype(np.uint8)
    if kind < 2:
        pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
    elif kind < 4:
        pixels = made_up_images(1, kind)[0, :height, :width]
    image = jpeg(pixels, quality=quality, optimize=optimize)
    assert np.array_equal(decoder(height, width).run(image), turbo(image))
    if kind >= 2:
        assert np.array_equal(decoder(height, width, image).run(image), turbo(image))


@pytest.mark.parametrize("quality", [40, 75, 90, 95, 100])
def test_decodes_real_films_as_libjpeg_turbo_does(real_data: Path, quality: int) -> None:
    images = [jpeg(film, quality=quality) for film in real_films(real_data, 16)]
    ours = decoder(320, 320, images[0])
    for image in images:
        assert np.array_equal(ours.run(image), turbo(image))


def test_other_jpegs_are_left_to_libjpeg_turbo() -> None:
    grey = made_up_images(1)[0]
    others = [
        jpeg(grey, progressive=True),
        jpeg(grey, restart_marker_blocks=7),
        jpeg(np.dstack([grey, grey, 255 - grey])),
    ]
    for image in others:
        assert np.array_equal(decoder(320, 320).run(image), turbo(image))
        with pytest.raises(LookupError):
            decoder(320, 320, jpeg(grey, quality=95)).run(image)
    with pytest.raises(ValueError, match="160x320, not 320x320"):
        decoder(320, 320).run(jpeg(grey[:160]))
    for nothing in (b"", b"no film", jpeg(grey).tobytes()[:200]):
        with pytest.raises(ValueError):
            decoder(320, 320).run(np.frombuffer(nothing, dtype=np.uint8))


def test_headers_that_differ_from_film_to_film_cost_speed_only() -> None:
    images = [jpeg(film, quality=95, optimize=True) for film in made_up_images(24)]
    assert len({image[:300].tobytes() for image in images}) > MOST_HEADERS
    ours = decoder(320, 320)
    for image in images + images:
        assert np.array_equal(ours.run(image), turbo(image))
    assert ours._headers == MOST_HEADERS


def test_damaged_films_end_as_with_libjpeg_turbo_and_within_their_memory() -> None:
    """In a process of its own: a byte too far would kill it. 120,000 films went through on the day it was written."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz_jpeg.py")), "2500", "7"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    counts = json.loads(done.stdout)
    assert counts["films"] == 2500 and counts["different"] == 0
    assert min(counts["decoded alone"], counts["left to libjpeg-turbo"], counts["other headers"]) > 50, counts


def images(config: LoaderConfig, count: int = 3) -> torch.Tensor:
    """The images of the first batches, (n, 3, S, S)."""
    with build_loader(config, World()) as loader:
        return torch.cat([next(loader).images.clone() for _ in range(count)])


def test_threads_do_not_change_a_bit(shards_dir: Path) -> None:
    ways = [images(LoaderConfig(shards=shards_dir, backend="cpu", batch_size=20, threads=n)) for n in (1, 2, 5)]
    assert torch.equal(ways[0], ways[1]) and torch.equal(ways[0], ways[2])


def test_without_numba_torch_gives_the_same_and_a_warning(shards_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoaderConfig(shards=shards_dir, backend="cpu", batch_size=20, threads=2)
    expected = images(config)
    for name in ("pipeline.resize", "pipeline.jpeg", "numba"):
        monkeypatch.setitem(sys.modules, name, None)
    compiled_functions.cache_clear()
    try:
        with pytest.warns(UserWarning, match="slower"):
            assert torch.equal(images(config), expected)
        kernel = ImageKernel(ImageSpec(), size=32, normalise=NORMALISE)
        assert isinstance(kernel._resize, TorchResize) and isinstance(kernel._jpeg, TurboDecode)
    finally:
        compiled_functions.cache_clear()


def test_the_decoder_has_a_switch(shards_dir: Path) -> None:
    config = LoaderConfig(shards=shards_dir, backend="cpu", batch_size=20, threads=2)
    assert torch.equal(images(config), images(replace(config, own_jpeg=False)))
    assert isinstance(ImageKernel(ImageSpec(), size=32, normalise=NORMALISE, own_jpeg=False)._jpeg, TurboDecode)
    assert isinstance(ImageKernel(ImageSpec(), size=32, normalise=NORMALISE)._jpeg, CompiledDecode)


def test_tables_live_as_long_as_compiled_code_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of `axis` does not keep what it returns where two threads ask for the same at once: here it never does.

    Was a wrong image, or a crash, in the first batches of one process in three.
    """
    films = made_up_images(4)
    crops = [
        (film, [n, 2 * n, 250 + 9 * n, 299 - 7 * n], False, torch.empty(224, 224, 3)) for n, film in enumerate(films)
    ]
    expected = [torch.empty(224, 224, 3) for _ in crops]
    other = TorchResize(size=224, normalise=NORMALISE)
    other.run([(film, box, flip, out) for (film, box, flip, _), out in zip(crops, expected, strict=True)])
    monkeypatch.setattr(kernels, "axis", kernels.axis.__wrapped__)
    resize = compiled((320, 320), 224)
    for _ in range(20):
        resize.run(crops)
        assert all(torch.equal(crop[3], out) for crop, out in zip(crops, expected, strict=True))


def test_images_too_small_for_a_vector_take_torchs_way() -> None:
    assert isinstance(make_resize(ImageSpec(), size=15, normalise=NORMALISE, dtype="float32"), TorchResize)


USE = "from pipeline.resize import resize_function; resize_function()"
"""Without torch, which takes seconds to import."""


def use(**environment: str) -> subprocess.Popen[str]:
    """A process that needs the compiled resize."""
    pipe, there = subprocess.PIPE, {**os.environ, **environment}
    return subprocess.Popen([sys.executable, "-c", USE], cwd=REPOSITORY, env=there, stderr=pipe, text=True)


def test_several_processes_may_start_with_an_empty_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    processes = [use(NUMBA_CACHE_DIR=str(folder)) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == [""] * 2
    assert [process.returncode for process in processes] == [0] * 2
    assert list(folder.rglob("*.nbc"))


@pytest.mark.parametrize("kind", ["nowhere", "damaged"])
def test_a_cache_that_cannot_be_used_costs_time_only(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "cache"
    if kind == "nowhere":
        tmp_path.joinpath("cache").write_text("a file where the folder should be")
    else:
        use(NUMBA_CACHE_DIR=str(folder)).communicate()
        for entry in [*folder.rglob("*.nbi"), *folder.rglob("*.nbc")]:
            entry.write_bytes(entry.read_bytes()[:40])
    process = use(NUMBA_CACHE_DIR=str(folder))
    assert process.communicate()[1] == "" and process.returncode == 0


@pytest.mark.parametrize("reason", ["NUMBA_DISABLE_JIT", "f16c"])
def test_what_keeps_the_compiler_from_working_is_named(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    if reason == "f16c":  # as in virtual machines with a plain CPU model
        features = {"avx2": True, "fma": True, "f16c": False}
        monkeypatch.setattr("pipeline.compiled.get_host_cpu_features", lambda: features)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
    else:
        monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    for name in ("pipeline.resize", "pipeline.jpeg"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    compiled_functions.cache_clear()
    try:
        with pytest.warns(UserWarning, match=reason):
            assert compiled_functions() is None
    finally:
        compiled_functions.cache_clear()


def test_raw_pixels_are_not_copied() -> None:
    stored = np.frombuffer(bytearray(made_up_images(1)[0].tobytes()), dtype=np.uint8)
    spec = ImageSpec(codec="raw")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel = kernels.ImageKernel(spec, size=224, normalise=NORMALISE)
        assert np.shares_memory(kernel.decode(stored), stored)
        kernel.resize([(kernel.decode(stored), [0, 0, 320, 320], False, torch.empty(224, 224, 3))])


def one_by_one(kernel: ImageKernel, films: list[np.ndarray], boxes: np.ndarray, flipped: np.ndarray) -> torch.Tensor:
    """(views * n, 224, 224, 3) of films, each of which is decoded and resized on its own."""
    out = torch.full((len(boxes), 224, 224, 3), torch.nan)
    for number, film in enumerate(films):
        pixels = kernel.decode(film).copy()
        for image in range(number, len(boxes), len(films)):
            kernel.resize([(pixels, boxes[image].tolist(), bool(flipped[image]), out[image])])
    return out


def spans_of(films: list[np.ndarray]) -> np.ndarray:
    return np.array([(film.ctypes.data, len(film)) for film in films], dtype=np.int64)


@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_many_films_in_one_call_become_what_each_becomes_alone(codec: str) -> None:
    pixels = made_up_images(6)
    films = [jpeg(each, quality=95) if codec == "jpeg" else each.ravel() for each in pixels]
    boxes = crop_boxes(3, np.arange(12), height=320, width=320, scale=(0.9, 1.0))
    flipped = flips(3, np.arange(12), probability=0.5)
    kernel, spans = ImageKernel(ImageSpec(codec=codec), size=224, normalise=NORMALISE), spans_of(films)
    out = torch.full((12, 224, 224, 3), torch.nan)
    assert kernel.run(spans, boxes, flipped, out, 0, 6) == 0  # it knows neither the header nor a crop's length
    expected = one_by_one(kernel, films, boxes, flipped)
    assert kernel.run(spans, boxes, flipped, out, 2, 5) == 5
    assert torch.equal(out[2:5], expected[2:5]) and torch.equal(out[8:11], expected[8:11])
    assert out[[0, 1, 5, 6, 7, 11]].isnan().all()
    assert kernel.run(spans, boxes, flipped, out, 0, 6) == 6 and torch.equal(out, expected)


@pytest.mark.parametrize("kind", ["cut", "damaged", "another header", "too large", "tiny crop", "box outside", "new"])
def test_a_film_that_is_not_like_the_others_stops_the_call(kind: str) -> None:
    """Nothing of it is written, and the next call may go on behind it."""
    films = [jpeg(each, quality=95) for each in made_up_images(4)]
    boxes, flipped = np.array([[4, 4, 300, 310]] * 4, dtype=np.int64), np.zeros(4, dtype=bool)
    kernel = ImageKernel(ImageSpec(), size=224, normalise=NORMALISE)
    expected = one_by_one(kernel, films, boxes, flipped)
    if kind == "cut":
        films[2] = films[2][:300].copy()
    elif kind == "damaged":
        films[2] = films[2].copy()
        films[2][-1] = 0  # no end-of-image marker
    elif kind == "another header":
        films[2] = jpeg(made_up_images(4)[2], quality=94)
    elif kind == "too large":
        films[2] = np.concatenate([films[2], np.zeros(1 << 20, dtype=np.uint8)])
    else:
        boxes[2] = {"tiny crop": (0, 0, 300, 9), "box outside": (30, 4, 300, 310), "new": (0, 0, 301, 310)}[kind]
    out = torch.full((4, 224, 224, 3), torch.nan)
    assert kernel.run(spans_of(films), boxes, flipped, out, 0, 4) == 2
    assert torch.equal(out[:2], expected[:2]) and out[2:].isnan().all()
    assert kernel.run(spans_of(films), boxes, flipped, out, 3, 4) == 4 and torch.equal(out[3], expected[3])


def test_numbas_cache_tells_functions_apart_by_what_they_close_over() -> None:
    """`films` relies on it: its function is made of other files too, at which that cache does not look."""

    def make(stamp: int):  # type: ignore[no-untyped-def]
        def add(number):  # type: ignore[no-untyped-def]
            return number + stamp

        return add

    for stamp in (1, 2, 1):
        function = compile_function(make(stamp), types.int64(types.int64))
        assert function(5) == 5 + stamp
    assert function.stats.cache_hits  # type: ignore[attr-defined]


def test_the_bench_measures_the_floor_and_says_where_the_time_goes(shards_dir: Path) -> None:
    from bench.loader import LoaderBenchConfig, run_bench
    from bench.shapes import tables_of

    only = ("cpu", "cpu libjpeg-turbo", "cpu floor")
    config = LoaderBenchConfig(
        shards=shards_dir, floor=True, rounds=1, seconds=0.2, warmup_batches=1, batch_size=16, threads=2, only=only
    )
    result = run_bench(config)
    cases = {case["name"]: case for case in result["cases"]}
    assert set(only) == set(cases)
    assert cases["cpu"]["share_of_floor"] == cases["cpu"]["images_per_s"] / cases["cpu floor"]["images_per_s"]
    profile = result["profile"]["cpu"]
    assert {"decode_us", "resize_normalise_us", "feed_us", "main_us", "read_us"} <= set(profile)
    # Not of what is left when others are taken off, which a busy machine may make less than nothing.
    assert all(profile[f"{name}_us"] >= 0 for name in ("fetch", "verify", "rows", "plan", "feed", "main", "read"))
    assert profile["resize_normalise_us"] > 0
    assert any(row[0] == "resize + normalise" for table in tables_of(result) for row in table.rows)
