"""The two passes of a softmax over a part's scores, as vectors: the largest score, and the powers.

Numba does not make vectors of the first, and of the second only if the number of scores is known.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from memlong_vllm.kernels.numba_threads import cgutils, intrinsic, types
from memlong_vllm.kernels.vectors_cpu import element, repeated

PART = 128
"""Scores of a query head that are taken at a time: those of so many tokens, whose keys and values stay in the cache
of a core meanwhile."""

HIDDEN = -1e30
"""The score of what is not attended to, and the least that there is."""

LEAST_EXPONENT = -100.0
"""Of the least power of two. Were it -126, the least of float32, products with values would be denormal numbers, which
take processors of Intel a hundred cycles and more."""

_WIDTH = 16
_FLOAT, _INDEX = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTEGERS = ir.VectorType(_FLOAT, _WIDTH), ir.VectorType(_INDEX, _WIDTH)
_LOG2_E = 1.4426950408889634
# 2**part from -0.5 to 0.5: Taylor's series, whose next term is below 2e-8.
_SERIES = (
    1.5252733804059840e-05,
    1.5403530393381609e-04,
    1.3333558146428443e-03,
    9.6181291076284772e-03,
    5.5504108664821580e-02,
    2.4022650695910071e-01,
    6.9314718055994531e-01,
    1.0,
)


@intrinsic
def largest(typing_context: Any, scores: Any, at: Any, least: Any) -> Any:
    """The largest of ``PART`` scores, or ``least`` if that is larger."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointers = _vectors(builder, element(context, builder, signature.args[0], *arguments[:2]))
        found = repeated(builder, arguments[2], _WIDTH)
        for pointer in pointers:
            loaded = builder.load(pointer, align=4)
            found = builder.select(builder.fcmp_ordered(">", loaded, found), loaded, found)
        kind = ir.FunctionType(_FLOAT, [_VECTOR])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fmax.v{_WIDTH}f32")
        return builder.call(reduce, [found], fastmath=("fast",))

    return types.float32(scores, types.int64, types.float32), generate


@intrinsic
def powers(typing_context: Any, scores: Any, at: Any, peak: Any, scale: Any) -> Any:
    """Replace ``PART`` scores by exp(scale · (score - peak)), to float32's precision, and return their sum.

    Args:
        peak: no less than any of them. What is below 2**-100 becomes that, nothing beside the peak's 1.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        factor = repeated(builder, builder.fmul(arguments[3], ir.Constant(_FLOAT, _LOG2_E)), _WIDTH)
        top, total = repeated(builder, arguments[2], _WIDTH), None
        for pointer in _vectors(builder, element(context, builder, signature.args[0], *arguments[:2])):
            below = builder.fsub(builder.load(pointer, align=4), top, flags=("fast",))
            power = _power_of_two(builder, builder.fmul(below, factor, flags=("fast",)))
            builder.store(power, pointer, align=4)
            total = power if total is None else builder.fadd(total, power, flags=("fast",))
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{_WIDTH}f32")
        return builder.call(reduce, [_FLOAT(0.0), total], fastmath=("fast",))

    return types.float32(scores, types.int64, types.float32, types.float32), generate


def _vectors(builder: Any, first: Any) -> list[Any]:
    """Pointers to the vectors of a part."""
    places = [builder.gep(first, [_INDEX(offset)]) for offset in range(0, PART, _WIDTH)]
    return [builder.bitcast(place, _VECTOR.as_pointer()) for place in places]


def _power_of_two(builder: Any, exponent: Any) -> Any:
    """2 to the power of each number, which are at most 0."""
    least = _constant(LEAST_EXPONENT)
    exponent = builder.select(builder.fcmp_ordered("<", exponent, least), least, exponent)
    floor = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR]), f"llvm.floor.v{_WIDTH}f32"
    )
    whole = builder.call(floor, [builder.fadd(exponent, _constant(0.5), flags=("fast",))])
    part, power = builder.fsub(exponent, whole, flags=("fast",)), _constant(_SERIES[0])
    for coefficient in _SERIES[1:]:
        product = builder.fmul(power, part, flags=("fast",))
        power = builder.fadd(product, _constant(coefficient), flags=("fast",))
    bits = builder.add(builder.fptosi(whole, _INTEGERS), ir.Constant(_INTEGERS, [127] * _WIDTH))
    factor = builder.bitcast(builder.shl(bits, ir.Constant(_INTEGERS, [23] * _WIDTH)), _VECTOR)
    return builder.fmul(power, factor, flags=("fast",))


def _constant(number: float) -> Any:
    return ir.Constant(_VECTOR, [number] * _WIDTH)
