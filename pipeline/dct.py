"""The inverse DCT of `jpeg`: libjpeg-turbo's accurate one (jidctint.c) to the bit, a block in each of 16 lanes.

    coefficients of a row of blocks -> columns of 16 blocks -> their rows -> 128 neighbouring pixels

A block in each lane needs no transpose. LLVM vector code, because LLVM makes no such shuffles of loops on its own.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types

from pipeline.compiled import emitted, load

LANES = 16
"""Blocks that are transformed at once."""
SCRATCH = 4 * LANES * (64 + 1)
"""Bytes of the space that 16 blocks are transformed in, and the sums of their coefficients' sizes."""
MOST = 5900
"""Sum of a block's coefficients, each without its sign, from which on 16 bits may be too few in libjpeg-turbo's inverse
DCT (5900 * 1.387 * 4 < 2 ** 15), so that what it makes of them is its own. Nothing but damage and noise has as much."""

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_WORDS = ir.VectorType(_I32, LANES)


class _Lanes:
    """A vector of int32 in LLVM's code with Python's operators."""

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder, self.value = builder, value

    def _with(self, other: "_Lanes | int") -> Any:
        return other.value if isinstance(other, _Lanes) else ir.Constant(_WORDS, [other] * LANES)

    def __add__(self, other: "_Lanes | int") -> "_Lanes":
        return _Lanes(self.builder, self.builder.add(self.value, self._with(other)))

    def __sub__(self, other: "_Lanes | int") -> "_Lanes":
        return _Lanes(self.builder, self.builder.sub(self.value, self._with(other)))

    def __mul__(self, other: "_Lanes | int") -> "_Lanes":
        return _Lanes(self.builder, self.builder.mul(self.value, self._with(other)))

    def __lshift__(self, other: int) -> "_Lanes":
        return _Lanes(self.builder, self.builder.shl(self.value, self._with(other)))

    def __rshift__(self, other: int) -> "_Lanes":
        return _Lanes(self.builder, self.builder.ashr(self.value, self._with(other)))


def inverse_dct(x: list[Any], shift: int) -> list[Any]:
    """Eight values (anything with + - * << >>) through jidctint.c's inverse DCT, scaled down by `shift` bits."""
    z1 = (x[2] + x[6]) * 4433
    low, high = z1 - x[6] * 15137, z1 + x[2] * 6270
    plus, minus = (x[0] + x[4]) << 13, (x[0] - x[4]) << 13
    even = [plus + high, minus + low, minus - low, plus - high]
    z5 = (x[7] + x[3] + x[5] + x[1]) * 9633
    z1, z2 = (x[7] + x[1]) * -7373, (x[5] + x[3]) * -20995
    z3, z4 = (x[7] + x[3]) * -16069 + z5, (x[5] + x[1]) * -3196 + z5
    odd = [x[1] * 12299 + z1 + z4, x[3] * 25172 + z2 + z3, x[5] * 16819 + z2 + z4, x[7] * 2446 + z1 + z3]
    half = 1 << shift - 1
    sums = [each + half for each in even]
    return [(sums[i] + odd[i]) >> shift for i in range(4)] + [(sums[i] - odd[i]) >> shift for i in (3, 2, 1, 0)]


def _store(builder: ir.IRBuilder, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _at(builder: ir.IRBuilder, base: Any, offset: int) -> Any:
    return builder.add(base, ir.Constant(base.type, offset))


@emitted(types.void(*[types.intp] * 5))
def _transform_columns(builder, source, step, quant, target, sums):
    """Column of 16 blocks: eight int16 coefficients, 8 * step bytes apart, to eight int32, 8 * 64 bytes apart.

    The 64 bytes after the 4096 of the columns gain the sums of the coefficients' sizes.
    """
    values, total = [], load(builder, sums, _WORDS)
    for i in range(8):
        place = builder.add(source, builder.mul(step, ir.Constant(step.type, 8 * i)))
        stored = builder.sext(load(builder, place, ir.VectorType(_I16, LANES)), _WORDS)
        factor = builder.insert_element(
            ir.Constant(_WORDS, ir.Undefined),
            load(builder, _at(builder, quant, 32 * i), _I32),
            ir.Constant(_I32, 0),
        )
        same = builder.shuffle_vector(factor, factor, ir.Constant(_WORDS, [0] * LANES))
        values.append(_Lanes(builder, builder.mul(stored, same)))
        total = builder.add(total, _size(builder, values[-1].value))
    _store(builder, total, sums)
    for i, each in enumerate(inverse_dct(values, 11)):
        _store(builder, each.value, _at(builder, target, 8 * 4 * LANES * i))


def _size(builder: ir.IRBuilder, value: Any) -> Any:
    zero = ir.Constant(_WORDS, [0] * LANES)
    return builder.select(builder.icmp_signed("<", value, zero), builder.sub(zero, value), value)


@emitted(types.void(types.intp))
def _clear(builder, sums):
    """Set 16 int32 to 0."""
    _store(builder, ir.Constant(_WORDS, [0] * LANES), sums)


@emitted(types.boolean(types.intp))
def _within(builder, sums):
    """Whether all of 16 int32 are at most MOST."""
    above = builder.icmp_signed(">", load(builder, sums, _WORDS), ir.Constant(_WORDS, [MOST] * LANES))
    return builder.icmp_unsigned("==", builder.bitcast(above, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0))


@emitted(types.void(types.intp, types.intp))
def _transform_row(builder, source, target):
    """A row of 16 blocks: eight int32 values each, 64 bytes apart, to 128 neighbouring pixels."""
    values = [_Lanes(builder, load(builder, _at(builder, source, 4 * LANES * i), _WORDS)) for i in range(8)]
    zero, top = ir.Constant(_WORDS, [0] * LANES), ir.Constant(_WORDS, [255] * LANES)
    pixels = []
    for each in inverse_dct(values, 18):
        level = (each + 128).value
        level = builder.select(builder.icmp_signed("<", level, zero), zero, level)
        level = builder.select(builder.icmp_signed(">", level, top), top, level)
        pixels.append(builder.trunc(level, ir.VectorType(_I8, LANES)))
    while len(pixels) > 1:  # interleave: 0 with 4, 1 with 5 ..., until one vector has the pixels in order
        half = len(pixels) // 2
        pixels = [_interleave(builder, pixels[i], pixels[i + half]) for i in range(half)]
    _store(builder, pixels[0], target)


def _interleave(builder: ir.IRBuilder, one: Any, two: Any) -> Any:
    count = one.type.count
    order = [i // 2 + count * (i % 2) for i in range(2 * count)]
    return builder.shuffle_vector(one, two, ir.Constant(ir.VectorType(_I32, 2 * count), order))


@njit(nogil=True)
def _transform(coefficients, stride, quant, scratch, target, step):
    """Coefficients of a row of blocks to eight rows of pixels, 16 blocks at a time. False where they are too large."""
    sums = scratch + 8 * 8 * 4 * LANES
    for first in range(0, stride, LANES):
        _clear(sums)
        for column in range(8):
            source = coefficients + 2 * (column * stride + first)
            _transform_columns(source, 2 * stride, quant + 4 * column, scratch + 4 * LANES * column, sums)
        if not _within(sums):
            return False
        for row in range(8):
            _transform_row(scratch + 8 * 4 * LANES * row, target + row * step + 8 * first)
    return True
