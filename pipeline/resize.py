"""The compiled resize: bicubic with antialias, torch's uint8 kernel bit for bit, and everything after it in one go.

    pixels -> transpose the crop -> weigh rows (along x; flipped by writing backwards) -> transpose back
        -> weigh rows (along y) -> normalise, three channels -> straight into the batch

A resize along x gathers grey pixels within a row, which vector units are bad at. Between two transposes both passes
weigh whole rows, 32 pixels at once. The first rounds to uint8, as aten and Pillow do, whose weights `kernels.axis` has.

Loops are numba's; the innermost steps are LLVM vector code, because LLVM makes no shuffles of such loops on its own
(it transposes a film in 80 us, this does in 7). The batch does not fit into a cache, so it is written past it, which
halves the traffic.

Addresses instead of arrays: unboxing a dozen arrays takes longer than a pass over some of them. `kernels` owns the
memory and checks the sizes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from pipeline.compiled import compiled, emitted, load, stamp_of

TILE = 16
"""Edge of the squares of a transpose, and pixels that are expanded at once."""
LANES = 32
"""Pixels of a row that are weighed at once."""
ALIGNED = 64
"""Bytes: writes past the cache need this alignment."""
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""Output dtype -> its number in compiled code."""


# What follows is compiled: vectors first, then the loops over them. All arguments are integers, addresses in bytes.
_I8, _I16, _I32, _HALF, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()
_ONE = ir.Constant(ir.IntType(64), 1)


def _shuffle(indices: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(indices)), indices)


def _store(builder: ir.IRBuilder, vector: Any, address: Any, past_cache: bool = False) -> None:
    size = vector.type.count * {_FLOAT: 4, _HALF: 2, _I16: 2, _I8: 1}[vector.type.element]
    stored = builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=size if past_cache else 1)
    if past_cache:
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))


def _splat(builder: ir.IRBuilder, value: Any, count: int) -> Any:
    one = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, count), ir.Undefined), value, ir.Constant(_I32, 0)
    )
    return builder.shuffle_vector(one, one, _shuffle([0] * count))


def _at(builder: ir.IRBuilder, base: Any, number: int, step: Any) -> Any:
    return builder.add(base, builder.mul(step, ir.Constant(base.type, number)))


@emitted(types.void(types.intp, types.intp, types.intp, types.intp))
def _transpose_tile(builder, source, step, target, target_step):
    """16 x 16 bytes, rows `step` bytes apart, to their transpose: four perfect shuffles of the rows."""
    row = ir.VectorType(_I8, TILE)
    halves = [_shuffle([first + i // 2 + TILE * (i % 2) for i in range(TILE)]) for first in (0, TILE // 2)]
    rows = [load(builder, _at(builder, source, i, step), row) for i in range(TILE)]
    for _ in range(4):
        rows = [builder.shuffle_vector(rows[i // 2], rows[i // 2 + 8], halves[i % 2]) for i in range(TILE)]
    for i in range(TILE):
        _store(builder, rows[i], _at(builder, target, i, target_step))


@emitted(types.void(*[types.intp] * 6))
def _weigh(builder, source, step, entry, taps, shift, target):
    """32 columns of `taps` rows, `step` bytes apart, weighed, rounded and clipped to bytes. `entry`: the line in the
    axis' table, int32, the first row's number and the weights."""
    columns = ir.VectorType(_I32, LANES)
    first = builder.sext(load(builder, entry, _I32), entry.type)
    source = builder.add(source, builder.mul(step, first))
    shift = builder.trunc(shift, _I32)
    half = builder.shl(ir.Constant(_I32, 1), builder.sub(shift, ir.Constant(_I32, 1)))
    total = cgutils.alloca_once_value(builder, _splat(builder, half, LANES))
    with cgutils.for_range(builder, taps) as loop:
        weight = load(builder, builder.add(_at(builder, entry, 4, loop.index), ir.Constant(entry.type, 4)), _I32)
        row = load(builder, builder.add(source, builder.mul(step, loop.index)), ir.VectorType(_I8, LANES))
        product = builder.mul(builder.zext(row, columns), _splat(builder, weight, LANES))
        builder.store(builder.add(builder.load(total), product), total)
    value = builder.ashr(builder.load(total), _splat(builder, shift, LANES))
    low, high = ir.Constant(columns, [0] * LANES), ir.Constant(columns, [255] * LANES)
    value = builder.select(builder.icmp_signed("<", value, low), low, value)
    value = builder.select(builder.icmp_signed(">", value, high), high, value)
    _store(builder, builder.trunc(value, ir.VectorType(_I8, LANES)), target)


@emitted(types.void(*[types.intp] * 4, types.boolean))
def _expand(builder, grey, normalise, target, dtype, past_cache):
    """16 bytes at `grey` to 48 values of a dtype, by its number. `normalise` has 48 gains, then 48 biases, float32."""
    third = ir.VectorType(_FLOAT, TILE)
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(third, [third] * 3), f"llvm.fma.v{TILE}f32")
    values, thirds = builder.uitofp(load(builder, grey, ir.VectorType(_I8, TILE)), third), []
    for part in range(3):
        pixels = builder.shuffle_vector(values, values, _shuffle([(TILE * part + i) // 3 for i in range(TILE)]))
        gain = load(builder, _at(builder, normalise, 64 * part, _ONE), third)
        bias = load(builder, _at(builder, normalise, 64 * part + 192, _ONE), third)
        thirds.append(builder.call(fma, [pixels, gain, bias]))
    for name, number in DTYPES.items():
        with builder.if_then(builder.icmp_signed("==", dtype, ir.Constant(dtype.type, number))):
            _store_thirds(builder, [_convert(builder, each, name) for each in thirds], target, past_cache)


def _store_thirds(builder: ir.IRBuilder, thirds: list[Any], target: Any, past_cache: Any) -> None:
    with builder.if_else(past_cache) as branches:
        for branch, past in zip(branches, (True, False), strict=True):
            with branch:
                for part, values in enumerate(thirds):
                    step = TILE * (4 if values.type.element == _FLOAT else 2)
                    _store(builder, values, _at(builder, target, part * step, _ONE), past)


def _convert(builder: ir.IRBuilder, values: Any, dtype: str) -> Any:
    """float32 to the dtype, rounded to nearest even. LLVM's own bfloat16 is beyond llvmlite: in integers, then."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        return builder.fptrunc(values, ir.VectorType(_HALF, TILE))
    words = ir.VectorType(_I32, TILE)
    bits, sixteen = builder.bitcast(values, words), ir.Constant(words, [16] * TILE)
    odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(words, [1] * TILE))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(words, [0x7FFF] * TILE)))
    return builder.trunc(builder.lshr(rounded, sixteen), ir.VectorType(_I16, TILE))


@emitted(types.void())
def _fence(builder):
    """Writes past the cache are seen by other threads before what is written after this."""
    builder.fence("seq_cst")


@njit(nogil=True)
def _transpose(source, step, rows, columns, target, target_step, overlap):
    """rows x columns bytes to columns x rows; whole tiles, unless the last may not reach beyond: then they overlap."""
    for y in range(0, rows, TILE):
        row = min(y, rows - TILE) if overlap else y
        for x in range(0, columns, TILE):
            column = min(x, columns - TILE) if overlap else x
            _transpose_tile(source + row * step + column, step, target + column * target_step + row, target_step)


@njit(nogil=True)
def _weigh_row(source, step, entry, taps, shift, columns, target):
    """One row of a pass."""
    for column in range(0, columns, LANES):
        _weigh(source + column, step, entry, taps, shift, target + column)


@njit(nogil=True)
def _resize_one(source, step, height, width, padded, flipped, x_axis, y_axis, size, scratch, normalise, target, dtype):
    """A crop (height, width) to `size` squared and on to `target` (size, size, 3)."""
    table, taps, shift = x_axis
    tall = _padded(height)
    wide = _padded(size)
    turned = scratch
    narrow = turned + _padded(width + taps) * tall
    upright = narrow + wide * tall
    row = upright + _padded(height + y_axis[1]) * wide
    _transpose(source, step, height, width, turned, tall, not padded)
    for x in range(size):
        place = size - 1 - x if flipped else x
        _weigh_row(turned, tall, table + x * 4 * (1 + taps), taps, shift, height, narrow + place * tall)
    _transpose(narrow, tall, size, height, upright, wide, False)
    table, taps, shift = y_axis
    pixel = 12 if dtype == 0 else 6
    past_cache = size % TILE == 0 and target % ALIGNED == 0
    for y in range(size):
        _weigh_row(upright, wide, table + y * 4 * (1 + taps), taps, shift, size, row)
        for x in range(0, size, TILE):
            column = min(x, size - TILE)
            _expand(row + column, normalise, target + (y * size + column) * pixel, dtype, past_cache)
    if past_cache:
        _fence()


@njit(nogil=True)
def _padded(count):
    """Up to a whole number of vectors, with one to spare."""
    return (count + 2 * LANES - 1) // LANES * LANES


def scratch_bytes(height: int, width: int, size: int) -> int:
    """What a resize of any crop of so many pixels needs."""
    padded = _padded.py_func
    tall, wide = padded(height), padded(size)
    taps = [2 * -(-2 * max(n, size) // size) + 1 for n in (width, height)]
    return padded(width + taps[0]) * tall + wide * tall + padded(height + taps[1]) * wide + wide


def _make(stamp: int) -> Callable[..., None]:
    """The function, for compiling, see `stamp_of`."""

    def run(crops, size, scratch, normalise, dtype):
        """Crops to `size` squared images (size, size, 3), each to its own place.

        crops: (n, CROP) int64, for each: source, an address; bytes between its rows; height; width; whether it is
        padded; whether it is flipped; address, taps and shift of the tables of x and of y; target, an address.
        `scratch_bytes` says how much there has to be at the address `scratch`. `size` is TILE at least, and so are
        heights and widths, unless the crop is padded: whole TILEs may be read from its start on.
        """
        if stamp == 0:  # so that it is part of the function
            return
        for n in range(len(crops)):
            x_axis, y_axis = (crops[n, 6], crops[n, 7], crops[n, 8]), (crops[n, 9], crops[n, 10], crops[n, 11])
            _resize_one(
                crops[n, 0], crops[n, 1], crops[n, 2], crops[n, 3], crops[n, 4], crops[n, 5], x_axis, y_axis, size,
                scratch, normalise, crops[n, 12], dtype,
            )  # fmt: skip

    return run


@cache
def resize_function() -> Callable[..., None]:
    """`run` above, compiled. Seconds the first time on a machine, 0.1 s from the cache on disk."""
    return compiled(_make(stamp_of()), types.void(types.int64[:, ::1], *[types.intp] * 4))
