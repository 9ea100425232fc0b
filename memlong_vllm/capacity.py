"""How many sequences of a length a card serves: bytes by kind for each way to attend.

Bytes of the KV cache come from vLLM's own cache specifications, slots of the bank from
:func:`memlong_vllm.config.max_sequence_slots`, weights from the shapes in the configuration. What
cannot be computed, vLLM's activations, is the *reserve*: an estimate that can be replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from transformers import LlamaConfig
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
    get_kv_quant_mode,
)

from memlong_vllm.config import (
    DEFAULT_ADAPTED_TOKENS,
    DEFAULT_STAGING_TOKENS,
    GIB,
    MemoryConfig,
    max_sequence_slots,
    step_buffer_bytes,
    working_set_tokens,
)

# vLLM pads vocabularies to a multiple of this, and keeps one block of the pool for itself.
_VOCABULARY_MULTIPLE = 64
_NULL_BLOCKS = 1
# FlashAttention takes heads of any multiple of 8.
_HEAD_MULTIPLE = 8
# CUDA context, communication buffers, a kernel's partial results (1 MiB or so) and what the
# allocator cannot use, in the estimated reserve.
_FIXED_RESERVE = GIB // 2
_DEFAULT_LOGIT_ROWS = 256
_MOST_SEQUENCES = 1 << 20


class CapacityError(ValueError):
    """A model cannot be laid out as asked. The message says why."""


@dataclass(frozen=True)
class Setup:
    """Where and how a model is to be served. Sizes are bytes, of one rank unless said otherwise.

    Attributes:
        context: tokens of a sequence, prompt and answer.
        card_bytes: memory of one card; every tensor-parallel rank has one.
        host_bytes: memory of the host for the bank and the search index, all ranks together.
        dtype: of weights, KV cache and bank.
        projection_dtype: of the layers' projections where these are quantised, as by vLLM's
            ``quantization="fp8"``, which leaves embeddings and norms as they are; None for ``dtype``.
            Its scales, one a projection, are not counted.
        kv_cache_dtype: vLLM's, for attention without a memory; with one it is always ``dtype``.
        max_concurrent_batches: engine steps under way at once, 2 with asynchronous scheduling.
        max_num_seqs: sequences at once, or None for as many as fit.
        reserve_bytes: for all but weights, KV cache and bank; None for :func:`estimated_reserve`.
        kv_head_dim: heads as the attention backend pads them in weights and KV cache; None for
            the next multiple of 8, as on CUDA.
        embedding_dimension: components of a chunk's embedding.
    """

    context: int
    card_bytes: int = 24 * GIB
    host_bytes: int = 64 * GIB
    dtype: torch.dtype = torch.bfloat16
    projection_dtype: torch.dtype | None = None
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_num_batched_tokens: int = 2048
    max_concurrent_batches: int = 1
    block_size: int = 16
    max_num_seqs: int | None = None
    reserve_bytes: int | None = None
    kv_head_dim: int | None = None
    embedding_dimension: int = 1024


@dataclass(frozen=True)
class Variant:
    """A way to attend, and what one rank and the host need for it.

    Attributes:
        spec: vLLM's cache specification of one layer.
        layers: how many there are of it.
        fixed: device bytes by kind, whatever the number of sequences.
        each: device bytes by kind a sequence, beside its KV cache.
        host_each: host bytes by kind a sequence, all ranks together.
    """

    name: str
    spec: AttentionSpec
    layers: int
    fixed: dict[str, int]
    each: dict[str, int] = field(default_factory=dict)
    host_each: dict[str, int] = field(default_factory=dict)

    @property
    def block_bytes(self) -> int:
        """A block of the KV cache, all layers."""
        return self.layers * self.spec.page_size_bytes


@dataclass(frozen=True)
class Capacity:
    """What fits. Bytes are of one rank; host bytes of all ranks together.

    Attributes:
        sequences: how many are served at once: all but one decode, one's prompt is computed.
        limited_by: ``"card"``, ``"host memory"`` or ``"max_num_seqs"``.
        max_concurrency: vLLM's own figure for the KV cache, ``Maximum concurrency`` in its log: as
            if every sequence's prompt were computed at the same time.
        num_blocks: of the KV cache, vLLM's null block included.
        blocks_prefill, blocks_decode: what a sequence holds at most in its prompt and afterwards.
        device, host: bytes by kind for ``sequences`` sequences; the KV cache is all that is left.
        sequence: bytes by kind of one sequence, on the device unless the kind says ``host``.
    """

    name: str
    sequences: int
    limited_by: str
    max_concurrency: float
    num_blocks: int
    blocks_prefill: int
    blocks_decode: int
    device: dict[str, int]
    host: dict[str, int]
    sequence: dict[str, int]


def plan(config: LlamaConfig, memory: MemoryConfig, setup: Setup) -> list[Capacity]:
    """The capacity of every variant, in the order of :func:`variants`.

    Raises:
        CapacityError: if the model cannot be split over the ranks or a setting makes no sense.
    """
    _check(config, setup)
    return [fit(variant, setup) for variant in variants(config, memory, setup)]


def variants(config: LlamaConfig, memory: MemoryConfig, setup: Setup) -> list[Variant]:
    """Full attention, the same with an FP8 cache, the window alone, and MemLong with its bank on
    the device and on the host."""
    layers = config.num_hidden_layers
    plain, remembering = ({"weights": weight_bytes(config, part, setup)} for part in (None, memory))
    common = {"RoPE table": rope_bytes(config, setup), "reserve": reserve_bytes(config, setup)}
    bank = max_sequence_slots(memory, setup.context, setup.max_num_batched_tokens) * slot_bytes(config, memory, setup)
    index = {"search index": -(-setup.context // memory.chunk_size) * setup.embedding_dimension * 4}
    retrieved = working_set_tokens(memory) * token_bytes(config, setup)
    staged = max(memory.top_k * memory.chunk_size, DEFAULT_STAGING_TOKENS)
    kept = 0 if memory.memory_adapter is None else max(staged, DEFAULT_ADAPTED_TOKENS) * len(memory.retrieval_layers)
    staging = {
        "staging": staged * token_bytes(config, setup),
        "adapted chunks": kept * token_bytes(config, setup),
        "step buffers": step_buffer_bytes(setup.max_num_batched_tokens, memory.top_k),
    }
    full, window = full_spec(config, setup, setup.kv_cache_dtype), window_spec(config, memory, setup)
    return [
        Variant("full attention", full, layers, plain | common),
        Variant("full attention, fp8 KV", full_spec(config, setup, "fp8"), layers, plain | common),
        Variant("window alone", window_spec(config, memory, setup, setup.kv_cache_dtype), layers, plain | common),
        Variant(
            "MemLong, bank on device",
            window,
            layers,
            remembering | common | staging,
            {"bank": bank, "working set": retrieved},
            index,
        ),
        Variant(
            "MemLong, bank on host",
            window,
            layers,
            remembering | common | staging,
            {"working set": retrieved},
            {"bank": bank * setup.tensor_parallel_size} | index,
        ),
    ]


def fit(variant: Variant, setup: Setup) -> Capacity:
    """How many sequences a variant serves at once, and where the bytes go then."""
    limits = {"card": _most_on_card(variant, setup)}
    if variant.host_each:
        limits["host memory"] = setup.host_bytes // sum(variant.host_each.values())
    if setup.max_num_seqs is not None:
        limits["max_num_seqs"] = setup.max_num_seqs
    limited_by = min(limits, key=lambda name: limits[name])
    sequences, num_blocks = limits[limited_by], _num_blocks(variant, setup, limits[limited_by])
    prefill, decode = _blocks_held(variant.spec, setup)
    kv = {"KV in prefill": prefill * variant.block_bytes, "KV in decode": decode * variant.block_bytes}
    return Capacity(
        name=variant.name,
        sequences=sequences,
        limited_by=limited_by,
        max_concurrency=max_concurrency(variant.spec, setup, num_blocks),
        num_blocks=num_blocks,
        blocks_prefill=prefill,
        blocks_decode=decode,
        device=variant.fixed
        | {name: sequences * size for name, size in variant.each.items()}
        | {"KV cache": num_blocks * variant.block_bytes},
        host={name: sequences * size for name, size in variant.host_each.items()},
        sequence=kv | variant.each | {f"{name}, host": size for name, size in variant.host_each.items()},
    )


def _most_on_card(variant: Variant, setup: Setup) -> int:
    prefill, decode = _blocks_held(variant.spec, setup)

    def fits(sequences: int) -> bool:
        needed = prefill + (sequences - 1) * decode + _NULL_BLOCKS
        return needed <= _num_blocks(variant, setup, sequences)

    least, most = 0, _MOST_SEQUENCES
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _num_blocks(variant: Variant, setup: Setup, sequences: int) -> int:
    """Blocks of the KV cache in what the rest leaves of the card's usable part."""
    usable = int(setup.card_bytes * setup.gpu_memory_utilization)
    others = sum(variant.fixed.values()) + sequences * sum(variant.each.values())
    return max(0, usable - others) // variant.block_bytes


def _blocks_held(spec: AttentionSpec, setup: Setup) -> tuple[int, int]:
    """Blocks a sequence holds at most while its prompt is computed, and while it decodes."""
    prefill = blocks_per_request(spec, setup)
    if isinstance(spec, SlidingWindowSpec):
        return prefill, min(prefill, spec.max_admission_blocks_per_request(1, setup.context))
    return prefill, prefill


def blocks_per_request(spec: AttentionSpec, setup: Setup) -> int:
    """Blocks of a layer that vLLM counts for a sequence of the full length when it admits one."""
    # All that the specifications read of a vLLM configuration.
    engine = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=setup.context),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=setup.max_concurrent_batches * setup.max_num_batched_tokens,
    )
    return -(-spec.max_memory_usage_bytes(engine) // spec.page_size_bytes)


def max_concurrency(spec: AttentionSpec, setup: Setup, num_blocks: int) -> float:
    """What vLLM reports as maximum concurrency of a model whose layers are all alike."""
    return num_blocks / blocks_per_request(spec, setup)


def full_spec(config: LlamaConfig, setup: Setup, kv_cache_dtype: str = "auto") -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=setup.block_size,
        num_kv_heads=rank_kv_heads(config, setup),
        head_size=padded_head_dim(config, setup),
        dtype=_cache_dtype(setup, kv_cache_dtype),
        kv_quant_mode=get_kv_quant_mode(kv_cache_dtype),
    )


def window_spec(
    config: LlamaConfig, memory: MemoryConfig, setup: Setup, kv_cache_dtype: str = "auto"
) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=setup.block_size,
        num_kv_heads=rank_kv_heads(config, setup),
        head_size=padded_head_dim(config, setup),
        dtype=_cache_dtype(setup, kv_cache_dtype),
        kv_quant_mode=get_kv_quant_mode(kv_cache_dtype),
        sliding_window=memory.local_window,
    )


def _cache_dtype(setup: Setup, kv_cache_dtype: str) -> torch.dtype:
    return setup.dtype if kv_cache_dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[kv_cache_dtype]


def rank_kv_heads(config: LlamaConfig, setup: Setup) -> int:
    """Key-value heads of a rank; with more ranks than heads, ranks hold copies."""
    return max(1, config.num_key_value_heads // setup.tensor_parallel_size)


def padded_head_dim(config: LlamaConfig, setup: Setup) -> int:
    return setup.kv_head_dim or -(-config.head_dim // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


def token_bytes(config: LlamaConfig, setup: Setup) -> int:
    """Key and value of one token in the bank of one rank; heads are not padded there."""
    return 2 * rank_kv_heads(config, setup) * config.head_dim * setup.dtype.itemsize


def slot_bytes(config: LlamaConfig, memory: MemoryConfig, setup: Setup) -> int:
    """A chunk in the bank of one rank."""
    return memory.chunk_size * token_bytes(config, setup)


def weight_bytes(config: LlamaConfig, memory: MemoryConfig | None, setup: Setup) -> int:
    """Weights of one rank as vLLM holds them, with padded heads and vocabulary."""
    vocabulary = -(-config.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    tp_size, head_dim = setup.tensor_parallel_size, padded_head_dim(config, setup)
    whole = setup.dtype.itemsize * num_parameters(config, memory, head_dim, vocabulary, tp_size)
    if setup.projection_dtype is None:
        return whole
    saved = setup.dtype.itemsize - setup.projection_dtype.itemsize
    return whole - saved * config.num_hidden_layers * _projection_parameters(config, head_dim, tp_size)


def _projection_parameters(config: LlamaConfig, head_dim: int, tensor_parallel_size: int) -> int:
    """Of a layer's seven projections on one rank, without biases."""
    hidden, heads = config.hidden_size, config.num_attention_heads // tensor_parallel_size
    kv_heads = max(1, config.num_key_value_heads // tensor_parallel_size)
    inner = config.intermediate_size // tensor_parallel_size
    return hidden * (2 * heads + 2 * kv_heads) * head_dim + 3 * hidden * inner


def num_parameters(
    config: LlamaConfig,
    memory: MemoryConfig | None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    tensor_parallel_size: int = 1,
) -> int:
    """Parameters of one rank; by default those of the checkpoint.

    Args:
        memory: for the memory's own parameters, or None without one.
        head_dim, vocab_size: in place of the configuration's, where they are padded.
    """
    head_dim, vocab_size = head_dim or config.head_dim, vocab_size or config.vocab_size
    hidden, heads = config.hidden_size, config.num_attention_heads // tensor_parallel_size
    kv_heads = max(1, config.num_key_value_heads // tensor_parallel_size)
    inner = config.intermediate_size // tensor_parallel_size
    projected = (heads + 2 * kv_heads) * head_dim
    layer = _projection_parameters(config, head_dim, tensor_parallel_size) + 2 * hidden
    layer += config.attention_bias * (projected + hidden) + config.mlp_bias * (2 * inner + hidden)
    embedding = vocab_size // tensor_parallel_size * hidden
    backbone = (1 if config.tie_word_embeddings else 2) * embedding + config.num_hidden_layers * layer + hidden
    if memory is None:
        return backbone
    stored = config.num_key_value_heads * config.head_dim
    width = memory.memory_adapter_width if memory.memory_adapter == "linear" else 0
    adapters = 2 * stored * width * 2 * stored  # Whole on every rank.
    return backbone + len(memory.retrieval_layers) * ((1 + memory.memory_bias) * heads + adapters)


def rope_bytes(config: LlamaConfig, setup: Setup) -> int:
    """The table of cosines and sines that all layers share."""
    positions = max(setup.context, config.max_position_embeddings)
    return positions * config.head_dim * setup.dtype.itemsize


def reserve_bytes(config: LlamaConfig, setup: Setup) -> int:
    return estimated_reserve(config, setup) if setup.reserve_bytes is None else setup.reserve_bytes


def estimated_reserve(config: LlamaConfig, setup: Setup) -> int:
    """What vLLM needs beside weights and KV cache, roughly: it measures this when it starts.

    Half a GiB, and of a full engine step four rows of the hidden size and three of the MLP's a
    token, and logits in the model's type and twice in float32 a sequence (256 unless limited).
    """
    token = 4 * config.hidden_size + 3 * config.intermediate_size // setup.tensor_parallel_size
    activations = setup.max_num_batched_tokens * token * setup.dtype.itemsize
    rows = min(setup.max_num_seqs or _DEFAULT_LOGIT_ROWS, setup.max_num_batched_tokens)
    return _FIXED_RESERVE + activations + rows * config.vocab_size * (setup.dtype.itemsize + 8)


def _check(config: LlamaConfig, setup: Setup) -> None:
    tp_size, kv_heads = setup.tensor_parallel_size, config.num_key_value_heads
    counts = ("context", "tensor_parallel_size", "max_num_batched_tokens", "block_size", "card_bytes")
    for name in (*counts, "embedding_dimension", "max_concurrent_batches"):
        if getattr(setup, name) < 1:
            raise CapacityError(f"{name} = {getattr(setup, name)} must be positive")
    if not 0 < setup.gpu_memory_utilization <= 1:
        raise CapacityError(f"gpu_memory_utilization = {setup.gpu_memory_utilization} must be above 0 and at most 1")
    if config.num_attention_heads % tp_size or max(tp_size, kv_heads) % min(tp_size, kv_heads):
        heads = f"{config.num_attention_heads} heads with {kv_heads} key-value heads"
        raise CapacityError(f"{heads} cannot be split over {tp_size} ranks")
    if setup.kv_head_dim is not None and setup.kv_head_dim < config.head_dim:
        raise CapacityError(f"kv_head_dim = {setup.kv_head_dim} is less than the model's head_dim {config.head_dim}")
