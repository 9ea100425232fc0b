"""Vector operations for kernels that Numba compiles.

Loops over a head's elements become fast only if their number is known and nothing they read may
be what they write. Numba can promise the compiler neither, so these operations are written in its
intermediate language. They read float32, and bfloat16 as its bits, and calculate in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from memlong_vllm.kernels.numba_threads import cgutils, intrinsic, types

_FLOAT, _INDEX = ir.FloatType(), ir.IntType(32)
_WIDTHS = (16, 8, 4, 2)
_NAN = 0x7FC0

VECTOR = 16
"""Elements of the vectors that kernels reckon with."""

MAX_SUMS = 24
"""Vectors that AVX-512 has registers for, beside what is added to them."""


def shape_of(head_size: int) -> tuple[float, ...]:
    """A head size as an argument that kernels are compiled for, which they are for types alone.

    Returns:
        As many floats as a head has vectors of 16, or else as many integers as it has pairs.
    """
    if head_size % 2:
        raise ValueError(f"heads have an even number of elements, for RoPE; these have {head_size}")
    return (0.0,) * (head_size // 16) if head_size % 16 == 0 else (0,) * (head_size // 2)


def num_vectors(head_size: int) -> int:
    """That a head has, the last of them perhaps a part."""
    return -(-head_size // VECTOR)


def heads_at_once(group: int, sums: int) -> tuple[float, ...]:
    """Of ``group`` heads that share keys and values, how many a kernel takes at once, as an argument that
    kernels are compiled for.

    Args:
        sums: vectors that are kept of each.
    """
    most = max(1, MAX_SUMS // sums)
    return (0.0,) * max(number for number in range(1, group + 1) if group % number == 0 and number <= most)


@intrinsic
def dot(typing_context: Any, query: Any, query_at: Any, stored: Any, stored_at: Any, shape: Any) -> Any:
    """Product of two heads, each from an element of an array on, counted as if it were flat."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        row = element(context, builder, kinds[0], *arguments[0:2])
        other = element(context, builder, kinds[2], *arguments[2:4])
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
    weights_stride: Any,
    stored: Any,
    stored_at: Any,
    stride: Any,
    count: Any,
    output: Any,
    output_at: Any,
    output_stride: Any,
    shape: Any,
    heads: Any,
) -> Any:
    """Add ``count`` heads, ``stride`` elements apart, times their weights, to some heads of ``output``,
    each with weights of its own.

    Args:
        heads: as many floats as there are heads of ``output``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, numbers = signature.args, range(len(heads))
        first_weight = element(context, builder, kinds[0], *arguments[0:2])
        first_row = element(context, builder, kinds[3], *arguments[3:5])
        first_target = element(context, builder, kinds[7], *arguments[7:9])
        weights = [_apart(builder, first_weight, number, arguments[2]) for number in numbers]
        targets = [_apart(builder, first_target, number, arguments[9]) for number in numbers]
        parts = list(_parts(shape))
        sums = [
            [cgutils.alloca_once_value(builder, _load(builder, target, *part)) for part in parts] for target in targets
        ]
        with cgutils.for_range(builder, arguments[6]) as loop:
            row = builder.gep(first_row, [builder.mul(loop.index, arguments[5])])
            values = [_load(builder, row, *part) for part in parts]
            for weight, totals in zip(weights, sums, strict=True):
                factor = builder.load(builder.gep(weight, [loop.index]))
                for (_, width), value, total in zip(parts, values, totals, strict=True):
                    product = builder.fmul(repeated(builder, factor, width), value, flags=("fast",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("fast",)), total)
        for target, totals in zip(targets, sums, strict=True):
            for (first, width), total in zip(parts, totals, strict=True):
                place = builder.gep(target, [_INDEX(first)])
                pointer = builder.bitcast(place, ir.VectorType(_FLOAT, width).as_pointer())
                builder.store(builder.load(total), pointer, align=4)
        return context.get_dummy_value()

    index = types.int64
    kinds = weights, index, index, stored, index, index, index, output, index, index, shape, heads
    return types.void(*kinds), generate


@intrinsic
def score_columns(
    typing_context: Any,
    query: Any,
    query_at: Any,
    query_stride: Any,
    size: Any,
    stored: Any,
    stored_at: Any,
    stride: Any,
    scores: Any,
    scores_at: Any,
    scores_stride: Any,
    heads: Any,
    columns: Any,
) -> Any:
    """Products of some query heads and of keys that are columns: a key's elements lie ``stride`` apart,
    and the first elements of all keys are adjacent.

    Args:
        size: elements of a head.
        scores: float32, overwritten, those of a head ``scores_stride`` after those of the one before.
        heads: as many floats as there are query heads, which lie ``query_stride`` apart.
        columns: as many floats as there are vectors of 16 keys.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, vector, firsts = signature.args, ir.VectorType(_FLOAT, 16), range(0, 16 * len(columns), 16)
        first_query = element(context, builder, kinds[0], *arguments[0:2])
        column = element(context, builder, kinds[4], *arguments[4:6])
        first_score = element(context, builder, kinds[7], *arguments[7:9])
        zero = ir.Constant(vector, [0.0] * 16)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in firsts] for _ in range(len(heads))]
        queries = [_apart(builder, first_query, number, arguments[2]) for number in range(len(heads))]
        with cgutils.for_range(builder, arguments[3]) as loop:
            row = builder.gep(column, [builder.mul(loop.index, arguments[6])])
            keys = [_load(builder, row, first, 16) for first in firsts]
            for head, totals in zip(queries, sums, strict=True):
                factor = repeated(builder, _load_one(builder, builder.gep(head, [loop.index])), 16)
                for key, total in zip(keys, totals, strict=True):
                    product = builder.fmul(factor, key, flags=("fast",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("fast",)), total)
        for number, totals in enumerate(sums):
            target = _apart(builder, first_score, number, arguments[9])
            for first, total in zip(firsts, totals, strict=True):
                pointer = builder.bitcast(builder.gep(target, [_INDEX(first)]), vector.as_pointer())
                builder.store(builder.load(total), pointer, align=4)
        return context.get_dummy_value()

    index = types.int64
    kinds = query, index, index, index, stored, index, index, scores, index, index, heads, columns
    return types.void(*kinds), generate


@intrinsic
def copy(typing_context: Any, stored: Any, stored_at: Any, target: Any, target_at: Any, shape: Any) -> Any:
    """Copy a head between arrays of one type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        source = element(context, builder, kinds[0], *arguments[0:2])
        place = element(context, builder, kinds[2], *arguments[2:4])
        for first, width in _parts(shape):
            vector, align = ir.VectorType(source.type.pointee, width), kinds[0].dtype.bitwidth // 8
            pointers = [builder.bitcast(builder.gep(p, [_INDEX(first)]), vector.as_pointer()) for p in (source, place)]
            builder.store(builder.load(pointers[0], align=align), pointers[1], align=align)
        return context.get_dummy_value()

    return types.void(stored, types.int64, stored, types.int64, shape), generate


@intrinsic
def get(typing_context: Any, array: Any, at: Any) -> Any:
    """An element as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load_one(builder, element(context, builder, signature.args[0], *arguments))

    return types.float32(array, types.int64), generate


@intrinsic
def put(typing_context: Any, array: Any, at: Any, number: Any) -> Any:
    """Overwrite an element; to bfloat16 the number is rounded, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = element(context, builder, signature.args[0], *arguments[:2]), arguments[2]
        if isinstance(pointer.type.pointee, ir.IntType):
            bits, half = builder.bitcast(number, ir.IntType(32)), ir.IntType(32)(0x7FFF)
            last = builder.and_(builder.lshr(bits, ir.IntType(32)(16)), ir.IntType(32)(1))
            rounded = builder.lshr(builder.add(bits, builder.add(half, last)), ir.IntType(32)(16))
            is_nan = builder.fcmp_unordered("uno", number, number)
            rounded = builder.select(is_nan, ir.IntType(32)(_NAN), rounded)
            number = builder.trunc(rounded, ir.IntType(16))
        builder.store(number, pointer)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.float32), generate


def _parts(shape: Any) -> Iterator[tuple[int, int]]:
    """First element and width of the vectors that make up a head."""
    first, size = 0, len(shape) * (16 if isinstance(shape.dtype, types.Float) else 2)
    while first < size:
        width = next(width for width in _WIDTHS if width <= size - first)
        yield first, width
        first += width


def element(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Pointer to an element of an array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _apart(builder: Any, pointer: Any, number: int, stride: Any) -> Any:
    """The pointer to an element ``number`` strides further."""
    return builder.gep(pointer, [builder.mul(ir.IntType(64)(number), stride)])


def _load_one(builder: Any, pointer: Any) -> Any:
    """An element as float32."""
    loaded = builder.load(pointer)
    if not isinstance(loaded.type, ir.IntType):
        return loaded
    bits = ir.IntType(32)
    return builder.bitcast(builder.shl(builder.zext(loaded, bits), bits(16)), _FLOAT)


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


def repeated(builder: Any, number: Any, width: int) -> Any:
    anything = ir.Constant(ir.VectorType(number.type, width), ir.Undefined)
    first = builder.insert_element(anything, number, _INDEX(0))
    return builder.shuffle_vector(first, anything, ir.Constant(ir.VectorType(_INDEX, width), [0] * width))
