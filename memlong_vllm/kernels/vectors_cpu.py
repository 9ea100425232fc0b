"""Vector operations for kernels that Numba compiles.

Loops over a head's elements become fast only if their number is known and nothing they read may
be what they write. Numba can promise the compiler neither, so these operations are written in its
intermediate language. They read float32, and bfloat16 as its bits, and calculate in float32.

Numba's cache of compiled kernels does not notice changes of this file: remove it (``*.nbi``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT, _INDEX = ir.FloatType(), ir.IntType(32)
_WIDTHS = (16, 8, 4, 2)


def shape_of(head_size: int) -> tuple[float, ...]:
    """A head size as an argument that kernels are compiled for, which they are for types alone.

    Returns:
        As many floats as a head has vectors of 16, or else as many integers as it has pairs.
    """
    if head_size % 2:
        raise ValueError(f"heads have an even number of elements, for RoPE; these have {head_size}")
    return (0.0,) * (head_size // 16) if head_size % 16 == 0 else (0,) * (head_size // 2)


@intrinsic
def dot(typing_context: Any, query: Any, query_at: Any, stored: Any, stored_at: Any, shape: Any) -> Any:
    """Product of two heads, each from an element of an array on, counted as if it were flat."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        row = _element(context, builder, kinds[0], *arguments[0:2])
        other = _element(context, builder, kinds[2], *arguments[2:4])
        sums: dict[int, Any] = {}
        for first, width in _parts(shape):
            factors = _load(builder, row, first, width), _load(builder, other, first, width)
            product = builder.fmul(*factors, flags=("fast",))
            sums[width] = builder.fadd(sums[width], product, flags=("fast",)) if width in sums else product
        total = _FLOAT(0.0)
        for width, products in sums.items():
            kind = ir.FunctionType(_FLOAT, [_FLOAT, products.type])
            add_up = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{width}f32")
            total = builder.call(add_up, [total, products], fastmath=("fast",))
        return total

    return types.float32(query, types.int64, stored, types.int64, shape), generate


@intrinsic
def add_weighted(
    typing_context: Any,
    weights: Any,
    weights_at: Any,
    stored: Any,
    stored_at: Any,
    stride: Any,
    count: Any,
    output: Any,
    output_at: Any,
    shape: Any,
) -> Any:
    """Add ``count`` heads, ``stride`` elements apart, times their weights, to a head of ``output``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        weight = _element(context, builder, kinds[0], *arguments[0:2])
        head = _element(context, builder, kinds[2], *arguments[2:4])
        target = _element(context, builder, kinds[6], *arguments[6:8])
        sums = []
        for first, width in _parts(shape):
            sums.append(cgutils.alloca_once_value(builder, _load(builder, target, first, width)))
        with cgutils.for_range(builder, arguments[5]) as loop:
            factor = builder.load(builder.gep(weight, [loop.index]))
            row = builder.gep(head, [builder.mul(loop.index, arguments[4])])
            for (first, width), total in zip(_parts(shape), sums, strict=True):
                product = builder.fmul(
                    _repeat(builder, factor, width), _load(builder, row, first, width), flags=("fast",)
                )
                builder.store(builder.fadd(builder.load(total), product, flags=("fast",)), total)
        for (first, width), total in zip(_parts(shape), sums, strict=True):
            pointer = builder.bitcast(builder.gep(target, [_INDEX(first)]), ir.VectorType(_FLOAT, width).as_pointer())
            builder.store(builder.load(total), pointer, align=4)
        return context.get_dummy_value()

    index = types.int64
    return types.void(weights, index, stored, index, index, index, output, index, shape), generate


@intrinsic
def copy(typing_context: Any, stored: Any, stored_at: Any, target: Any, target_at: Any, shape: Any) -> Any:
    """Copy a head between arrays of one type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        source = _element(context, builder, kinds[0], *arguments[0:2])
        place = _element(context, builder, kinds[2], *arguments[2:4])
        for first, width in _parts(shape):
            vector, align = ir.VectorType(source.type.pointee, width), kinds[0].dtype.bitwidth // 8
            pointers = [builder.bitcast(builder.gep(p, [_INDEX(first)]), vector.as_pointer()) for p in (source, place)]
            builder.store(builder.load(pointers[0], align=align), pointers[1], align=align)
        return context.get_dummy_value()

    return types.void(stored, types.int64, stored, types.int64, shape), generate


@intrinsic
def power_of_two(typing_context: Any, exponent: Any) -> Any:
    """2 to the power of an int32 from -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.shl(builder.add(arguments[0], ir.IntType(32)(127)), ir.IntType(32)(23))
        return builder.bitcast(bits, _FLOAT)

    return types.float32(types.int32), generate


def _parts(shape: Any) -> Iterator[tuple[int, int]]:
    """First element and width of the vectors that make up a head."""
    first, size = 0, len(shape) * (16 if isinstance(shape.dtype, types.Float) else 2)
    while first < size:
        width = next(width for width in _WIDTHS if width <= size - first)
        yield first, width
        first += width


def _element(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Pointer to an element of an array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _load(builder: Any, pointer: Any, first: int, width: int) -> Any:
    """Elements from ``first`` on, as float32."""
    stored = pointer.type.pointee
    vector = ir.VectorType(stored, width)
    place = builder.bitcast(builder.gep(pointer, [_INDEX(first)]), vector.as_pointer())
    loaded = builder.load(place, align=stored.width // 8 if isinstance(stored, ir.IntType) else 4)
    if not isinstance(stored, ir.IntType):
        return loaded
    bits = ir.VectorType(ir.IntType(32), width)
    shifted = builder.shl(builder.zext(loaded, bits), ir.Constant(bits, [16] * width))
    return builder.bitcast(shifted, ir.VectorType(_FLOAT, width))


def _repeat(builder: Any, number: Any, width: int) -> Any:
    anything = ir.Constant(ir.VectorType(number.type, width), ir.Undefined)
    first = builder.insert_element(anything, number, _INDEX(0))
    return builder.shuffle_vector(first, anything, ir.Constant(ir.VectorType(_INDEX, width), [0] * width))
