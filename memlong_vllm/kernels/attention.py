"""Attention to retrieved chunks, fused into the output of local attention (section 3.3).

One program serves a tile of a span's tokens, all query heads that share a key-value head, and all
of the span's chunks or, where there are few spans of one token, a part of them. The rows of its
matrices are (token, head) pairs. Softmaxes are computed block by block, in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memlong_vllm.worker import step_buffers

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Columns of the span table.
FIRST_ENTRY = tl.constexpr(step_buffers.FIRST_ENTRY)
NUM_TOKENS = tl.constexpr(step_buffers.NUM_TOKENS)
NUM_CHUNKS = tl.constexpr(step_buffers.NUM_CHUNKS)
FIRST_SLOT = tl.constexpr(step_buffers.FIRST_SLOT)
ROW = tl.constexpr(step_buffers.ROW)
NUM_COLUMNS = tl.constexpr(step_buffers.NUM_COLUMNS)


# These change from step to step, and nothing is faster for what they are divisible by; and the spans
# of a step begin at any row of their table.
@triton.jit(
    do_not_specialize=[
        "num_splits",
        "tiles_per_span",
        "lse_token_stride",
        "lse_head_stride",
        "row_stride",
        "head_stride",
    ],
    do_not_specialize_on_alignment=["spans"],
)
def retrieval_attention(
    query,
    output,
    local_lse,
    gate,
    bias,
    cos_sin,
    keys,
    values,
    slots,
    spans,
    token_idx,
    positions,
    partial,
    partial_stats,
    arrivals,
    scale,
    num_splits,
    tiles_per_span,
    query_stride,
    output_stride,
    lse_token_stride,
    lse_head_stride,
    row_stride,
    head_stride,
    FUSION: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FROM_SLOTS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_MEMORY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """See :class:`memlong_vllm.kernels.launcher.RetrievalKernel`, which says what the tensors are.

    Args:
        row_stride, head_stride: of keys and values, in chunks; chunks are contiguous.
        FUSION: 0 gated, 1 joint, 2 scaled_logits.
        FROM_SLOTS: chunks are at ``slots``; otherwise one after the other in a span's row.
        IS_SPLIT: ``num_splits`` programs share a span; they must be of one token.
    """
    tile = tl.program_id(0) % tiles_per_span
    kv_head = tl.program_id(1)
    span = spans + (tl.program_id(0) // tiles_per_span) * NUM_COLUMNS
    first_token = tile * BLOCK_TOKENS
    num_tokens = tl.load(span + NUM_TOKENS) - first_token
    num_chunks = tl.load(span + NUM_CHUNKS)
    if (num_tokens <= 0) | (num_chunks <= 0):
        return

    token = tl.arange(0, BLOCK_TOKENS * BLOCK_GROUP) // BLOCK_GROUP
    head_in_group = tl.arange(0, BLOCK_TOKENS * BLOCK_GROUP) % BLOCK_GROUP
    head = kv_head * GROUP + head_in_group
    is_row = (token < num_tokens) & (head_in_group < GROUP)
    entry = tl.load(span + FIRST_ENTRY) + first_token + token
    idx = tl.load(token_idx + entry, mask=is_row, other=0)
    position = tl.load(positions + entry, mask=is_row, other=0)

    head_gate = tl.load(gate + head, mask=is_row, other=0.0).to(tl.float32)
    weight = _sigmoid(head_gate) if FUSION == 2 else tl.full(head.shape, 1.0, tl.float32)
    shift = tl.zeros(head.shape, tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + head, mask=is_row, other=0.0).to(tl.float32) * weight * LOG2E
    rows = query + idx * query_stride + head * PADDED_DIM
    rotated = _load_rotated(rows, position, cos_sin, is_row, HEAD_DIM, ROTARY_DIM, BLOCK_DIM)
    first_chunk = tl.load(span + ROW).to(tl.int64) * row_stride
    if FROM_SLOTS:
        first_chunk = tl.zeros_like(first_chunk)
    peak, total, attended = _attend(
        rotated.to(tl.float32 if FLOAT32_DOT else keys.dtype.element_ty),
        weight * scale * LOG2E,
        shift,
        keys,
        values,
        slots + tl.load(span + FIRST_SLOT),
        first_chunk + kv_head * head_stride,
        num_chunks,
        tl.program_id(2),
        num_splits,
        PER_CHUNK,
        FROM_SLOTS,
        FLOAT32_DOT,
        HEAD_DIM,
        CHUNK,
        BLOCK_MEMORY,
        BLOCK_DIM,
    )
    rows = output + idx * output_stride + head * PADDED_DIM
    lse_rows = local_lse + idx * lse_token_stride + head * lse_head_stride
    if IS_SPLIT:
        item = tl.program_id(0) * tl.num_programs(1) + kv_head
        place = (item * num_splits + tl.program_id(2)) * GROUP + head_in_group
        dims = tl.arange(0, BLOCK_DIM)
        tl.store(partial_stats + 2 * place, peak, mask=is_row)
        tl.store(partial_stats + 2 * place + 1, total, mask=is_row)
        tl.store(partial + place[:, None] * BLOCK_DIM + dims[None, :], attended, mask=is_row[:, None])
        # All of this program's stores come before its arrival, and all arrivals before the last.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + item, 1, sem="acq_rel")
        if arrived == num_splits - 1:
            tl.debug_barrier()
            place = item * num_splits * GROUP + head_in_group
            peak, total, attended = _join(
                partial, partial_stats, place, is_row, num_splits, PER_CHUNK, GROUP, BLOCK_DIM
            )
            _fuse(rows, lse_rows, head_gate, peak, total, attended, is_row, FUSION, PER_CHUNK, HEAD_DIM, BLOCK_DIM)
            tl.store(arrivals + item, 0)
    else:
        _fuse(rows, lse_rows, head_gate, peak, total, attended, is_row, FUSION, PER_CHUNK, HEAD_DIM, BLOCK_DIM)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _load_rotated(
    rows, position, cos_sin, is_row, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Query rows, rotated to their positions: dimension i pairs with i + ROTARY_DIM / 2."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    dims = tl.arange(0, BLOCK_DIM)
    is_first, is_rotary = dims < HALF, dims < ROTARY_DIM
    partner = tl.where(is_first, dims + HALF, dims - HALF)
    angle = tl.where(is_first, dims, dims - HALF)
    mask, rotary_mask = is_row[:, None] & (dims < HEAD_DIM)[None, :], is_row[:, None] & is_rotary[None, :]
    table = cos_sin + position[:, None] * ROTARY_DIM + angle[None, :]
    cos = tl.load(table, mask=rotary_mask, other=1.0).to(tl.float32)
    sin = tl.load(table + HALF, mask=rotary_mask, other=0.0).to(tl.float32)
    own = tl.load(rows[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(rows[:, None] + partner[None, :], mask=rotary_mask, other=0.0).to(tl.float32)
    return own * cos + tl.where(is_first[None, :], -other, other) * sin


@triton.jit
def _attend(
    query,
    scale,
    shift,
    keys,
    values,
    slots,
    first_chunk,
    num_chunks,
    split,
    num_splits,
    PER_CHUNK: tl.constexpr,
    FROM_SLOTS: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_MEMORY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Of one split's blocks: each row's largest score, sum of powers and weighted values.

    The weighted values are still to be divided by the sum; with PER_CHUNK they are complete, and
    the other two mean nothing. No block is of two chunks.
    """
    BLOCKS: tl.constexpr = (CHUNK + BLOCK_MEMORY - 1) // BLOCK_MEMORY
    UNIT: tl.constexpr = BLOCKS if PER_CHUNK else 1
    units = num_chunks * (BLOCKS // UNIT)
    first = split * tl.cdiv(units, num_splits)
    last = tl.minimum(first + tl.cdiv(units, num_splits), units)
    dims, token = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_MEMORY)
    peak = tl.full([query.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([query.shape[0]], tl.float32)
    attended = tl.zeros([query.shape[0], BLOCK_DIM], tl.float32)
    complete = tl.zeros([query.shape[0], BLOCK_DIM], tl.float32)
    for block in range(first * UNIT, last * UNIT):
        chunk, offset = block // BLOCKS, (block % BLOCKS) * BLOCK_MEMORY + token
        place = first_chunk + (tl.load(slots + chunk) if FROM_SLOTS else chunk)
        where = place.to(tl.int64) * (CHUNK * HEAD_DIM) + offset[:, None] * HEAD_DIM + dims[None, :]
        mask = (offset < CHUNK)[:, None] & (dims < HEAD_DIM)[None, :]
        key = tl.load(keys + where, mask=mask, other=0.0)
        value = tl.load(values + where, mask=mask, other=0.0)
        if FLOAT32_DOT:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale[:, None] + shift[:, None]
        if CHUNK % BLOCK_MEMORY:
            scores = tl.where((offset < CHUNK)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        kept, powers = tl.exp2(peak - new_peak), tl.exp2(scores - new_peak[:, None])
        total = total * kept + tl.sum(powers, axis=1)
        attended = attended * kept[:, None] + tl.dot(powers.to(value.dtype), value, input_precision="ieee")
        peak = new_peak
        if PER_CHUNK:
            ends = (block % BLOCKS) == BLOCKS - 1
            complete += tl.where(ends, attended / total[:, None], 0.0)
            attended, total = tl.where(ends, 0.0, attended), tl.where(ends, 0.0, total)
            peak = tl.where(ends, float("-inf"), peak)
    return peak, total, complete if PER_CHUNK else attended


@triton.jit
def _join(
    partial, stats, place, is_row, num_splits, PER_CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """What all splits of a span have left, as if one program had attended to everything."""
    dims = tl.arange(0, BLOCK_DIM)
    peak = tl.full(place.shape, float("-inf"), tl.float32)
    total = tl.zeros(place.shape, tl.float32)
    attended = tl.zeros([place.shape[0], BLOCK_DIM], tl.float32)
    for split in range(num_splits):
        row = place + split * GROUP
        part = tl.load(
            partial + row[:, None] * BLOCK_DIM + dims[None, :], mask=is_row[:, None], other=0.0, cache_modifier=".cg"
        )
        if PER_CHUNK:
            attended += part
        else:
            part_peak = tl.load(stats + 2 * row, mask=is_row, other=0.0, cache_modifier=".cg")
            part_total = tl.load(stats + 2 * row + 1, mask=is_row, other=1.0, cache_modifier=".cg")
            new_peak = tl.maximum(peak, part_peak)
            kept, weight = tl.exp2(peak - new_peak), tl.exp2(part_peak - new_peak)
            total = total * kept + part_total * weight
            attended = attended * kept[:, None] + part * weight[:, None]
            peak = new_peak
    return peak, total, attended


@triton.jit
def _fuse(
    rows,
    lse_rows,
    gate,
    peak,
    total,
    attended,
    is_row,
    FUSION: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Join with the local output, in its place: Eq. 4-5, or one softmax over memory and window."""
    dims = tl.arange(0, BLOCK_DIM)
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    targets = rows[:, None] + dims[None, :]
    local = tl.load(targets, mask=mask, other=0.0).to(tl.float32)
    memory = attended if PER_CHUNK else attended / total[:, None]
    if FUSION == 0:
        # tanh; exactly 0 at a gate of 0, however division is rounded.
        power = tl.exp(-2.0 * tl.abs(gate))
        weight = (1.0 - power) / (1.0 + power)
        weight = tl.where(gate < 0.0, -weight, weight)
        fused = local + weight[:, None] * memory
    else:
        lse = (peak + tl.log2(total)) * LN2
        weight = _sigmoid(lse - tl.load(lse_rows, mask=is_row, other=0.0))
        fused = (1.0 - weight)[:, None] * local + weight[:, None] * memory
    tl.store(targets, fused.to(rows.dtype.element_ty), mask=mask)
