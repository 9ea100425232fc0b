"""All configuration: the checkpoint's (re-exported) and the deployment's."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from memlong_vllm.reference.configuration_memlong import (
    MemLongConfig,
    MemoryConfig,
    MemoryConfigError,
    RetrieverConfig,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["DeploymentConfig", "MemLongConfig", "MemoryConfig", "MemoryConfigError", "RetrieverConfig"]

GIB = 1 << 30
ARCHITECTURE = "MemLongForCausalLM"
BANK_DEVICES = ("device", "cpu")
DEFAULT_STAGING_TOKENS = 8192
DEFAULT_ADAPTED_TOKENS = 32768
# Frequencies that depend on the length: stored keys would have to be rotated anew as it grows.
UNSUPPORTED_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class DeploymentConfig:
    """``--additional-config '{"memlong": {...}}'``: how a checkpoint is served.

    Fields of the checkpoint's ``memlong`` block may stand beside these and override it.

    Attributes:
        bank_gib: size of each rank's bank, in GiB (2**30 bytes), for all sequences together.
        bank_device: where the bank is: ``"device"``, or ``"cpu"`` for the host's memory, pinned and
            accessed in place by a GPU.
        staging_tokens: tokens whose keys and values prefills copy out of the bank at once, at
            least ``top_k * chunk_size``; by default that or 8192, whichever is more.
        adapted_tokens: tokens whose keys and values are kept as ``memory_adapter`` made them, for each
            retrieval layer, at least as many as staging holds; by default that or 32768.
        retriever_path: folder or hub name that takes the place of ``retriever.model``.
        retriever_device: torch device of the embedder, for example ``"cpu"`` or ``"cuda:0"``.
        retriever_batch_size: texts embedded in one forward pass. By default 1 on a CPU, where
            batches are no faster a text, and 32 elsewhere.
        retriever_cache_size: embeddings kept by text, across requests.
        trace_file: JSON lines, one a retrieval and one a forgetting, or None.
        memory_dir: folder of named memories, which outlive the engine there; None: they end with it.
        memory_quota_gib, memory_quota_names: what a tenant's named memories may take and how many
            they may be; None: no limit.
        tenant_header: HTTP header that names the tenant of a call.
        tenant_keys: JSON file {API key: tenant}; calls without one of these keys are refused.
        max_memory_size, max_top_k: the most a request may ask for; by default what the checkpoint
            says, so that requests can ask for less only.
    """

    bank_gib: float = 4.0
    bank_device: str = "device"
    staging_tokens: int | None = None
    adapted_tokens: int | None = None
    retriever_path: str | None = None
    retriever_device: str = "cpu"
    retriever_batch_size: int | None = None
    retriever_cache_size: int = 65536
    trace_file: str | None = None
    memory_dir: str | None = None
    memory_quota_gib: float | None = None
    memory_quota_names: int | None = None
    tenant_header: str | None = None
    tenant_keys: str | None = None
    max_memory_size: int | None = None
    max_top_k: int | None = None

    def __post_init__(self) -> None:
        for name in ("bank_gib", "memory_quota_gib"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if (value is not None or name == "bank_gib") and not (is_number and math.isfinite(value) and value > 0):
                raise MemoryConfigError(name, value, "must be a positive number of GiB")
        if self.bank_device not in BANK_DEVICES:
            raise MemoryConfigError("bank_device", self.bank_device, f"must be one of {BANK_DEVICES}")
        counts = ("retriever_batch_size", "retriever_cache_size", "staging_tokens", "adapted_tokens", "max_memory_size")
        for name in (*counts, "max_top_k", "memory_quota_names"):
            value = getattr(self, name)
            by_default = name != "retriever_cache_size" and value is None
            if not by_default and (type(value) is not int or value < 1):
                raise MemoryConfigError(name, value, "must be a positive integer")
        if not isinstance(self.retriever_device, str):
            raise MemoryConfigError("retriever_device", self.retriever_device, "must be a torch device")
        for name in ("trace_file", "retriever_path", "memory_dir", "tenant_keys", "tenant_header"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise MemoryConfigError(
                    name, value, f"must be a {'name' if name == 'tenant_header' else 'path'} or null"
                )


def resolve(hf_config: MemLongConfig, additional_config: dict[str, Any]) -> tuple[MemoryConfig, DeploymentConfig]:
    """Apply the deployment's settings to a checkpoint's.

    Args:
        additional_config: vLLM's; only its ``"memlong"`` entry is read.

    Raises:
        MemoryConfigError: naming the field, its value and the rule.
    """
    entry = additional_config.get("memlong") or {}
    if not isinstance(entry, dict):
        raise MemoryConfigError("additional_config", entry, "must be an object of settings")
    settings = dict(entry)
    known = {f.name for f in fields(DeploymentConfig)}
    deployment = DeploymentConfig(**{name: settings.pop(name) for name in known & settings.keys()})
    block = {**hf_config.memory.to_dict(), **settings}
    if isinstance(settings.get("retriever"), dict):
        block["retriever"] = {**hf_config.memory.to_dict()["retriever"], **settings["retriever"]}
    if deployment.retriever_path is not None and isinstance(block["retriever"], dict):
        block["retriever"]["model"] = deployment.retriever_path
    memory = MemoryConfig.from_dict(block, hf_config.num_hidden_layers)
    num_adapted_tokens(request_limits(memory, deployment), deployment)
    return memory, deployment


def num_staging_tokens(memory: MemoryConfig, deployment: DeploymentConfig) -> int:
    """Tokens that the staging buffers hold.

    Args:
        memory: the settings of a request that asks for as much as it may.

    Raises:
        MemoryConfigError: if the deployment's number is below the largest retrieved set.
    """
    largest_set = memory.top_k * memory.chunk_size
    if deployment.staging_tokens is None:
        return max(largest_set, DEFAULT_STAGING_TOKENS)
    if deployment.staging_tokens < largest_set:
        rule = f"must be at least top_k * chunk_size ({largest_set})"
        raise MemoryConfigError("staging_tokens", deployment.staging_tokens, rule)
    return deployment.staging_tokens


def num_adapted_tokens(memory: MemoryConfig, deployment: DeploymentConfig) -> int:
    """Tokens that are kept as each retrieval layer's adapter made them; 0 without adapters. The bank may have fewer.

    Args:
        memory: the settings of a request that asks for as much as it may.

    Raises:
        MemoryConfigError: if the deployment's number is below what staging holds, or that is too small.
    """
    staged = num_staging_tokens(memory, deployment)
    asked = deployment.adapted_tokens
    if asked is not None and asked < staged:
        raise MemoryConfigError("adapted_tokens", asked, f"must be at least staging_tokens ({staged})")
    return 0 if memory.memory_adapter is None else asked or max(staged, DEFAULT_ADAPTED_TOKENS)


def request_limits(memory: MemoryConfig, deployment: DeploymentConfig) -> MemoryConfig:
    """The settings of a request that asks for as much as it may.

    Raises:
        MemoryConfigError: if a limit is below what requests get without asking.
    """
    limits = {"memory_size": deployment.max_memory_size, "top_k": deployment.max_top_k}
    for name, most in limits.items():
        if most is not None and most < getattr(memory, name):
            raise MemoryConfigError(f"max_{name}", most, f"must be at least {name} ({getattr(memory, name)})")
    return replace(
        memory,
        memory_size=deployment.max_memory_size or memory.memory_size,
        top_k=deployment.max_top_k or memory.top_k,
    )


def max_sequence_slots(memory: MemoryConfig, max_tokens: int, max_step_tokens: int) -> int:
    """Bank slots that a sequence can hold at once.

    Beside the capacity: the chunks that one step writes before any slot it frees returns, and
    forgotten chunks that the current set still reads where a segment spans several chunks.

    Args:
        max_tokens: the longest the sequence can become.
        max_step_tokens: tokens one engine step computes at most.
    """
    total = -(-max_tokens // memory.chunk_size)
    writing = -(-max_step_tokens // memory.chunk_size) + 1
    lingering = memory.top_k if memory.retrieval_stride > memory.chunk_size else 0
    return min(total, max(1, memory.capacity) + writing + lingering)


def max_named_slots(memory: MemoryConfig, max_tokens: int, max_step_tokens: int) -> int:
    """Bank slots that chunks of named memories can take for one sequence, beside its own: the sets
    of all retrievals of a step, and the ones before and after. Arguments as above."""
    return (min(max_tokens, max_step_tokens) // memory.retrieval_stride + 3) * memory.top_k


def bank_slots(vllm_config: VllmConfig) -> int:
    """Slots of each rank's bank: as many as ``bank_gib`` holds, none that could never be used.

    Scheduler and workers each call this with the same configuration and so agree.

    Raises:
        MemoryConfigError: if not even one sequence of the full length fits.
    """
    model_config, scheduler_config = vllm_config.model_config, vllm_config.scheduler_config
    hf_config = model_config.hf_config
    memory, deployment = resolve(hf_config, vllm_config.additional_config)
    memory = request_limits(memory, deployment)
    chunk_bytes = memory.chunk_size * _token_bytes(vllm_config)
    one = max_sequence_slots(memory, model_config.max_model_len, scheduler_config.max_num_batched_tokens)
    fitting = int(deployment.bank_gib * GIB) // chunk_bytes
    if fitting < one:
        rule = f"a sequence of max_model_len ({model_config.max_model_len}) may need {one * chunk_bytes / GIB:.2f} GiB"
        raise MemoryConfigError("bank_gib", deployment.bank_gib, rule)
    named = max_named_slots(memory, model_config.max_model_len, scheduler_config.max_num_batched_tokens)
    return min(fitting, (one + named) * scheduler_config.max_num_seqs)


def num_adapted_chunks(vllm_config: VllmConfig) -> int:
    """Chunks that each retrieval layer keeps as its adapter made them."""
    memory, deployment = resolve(vllm_config.model_config.hf_config, vllm_config.additional_config)
    kept = num_adapted_tokens(request_limits(memory, deployment), deployment) // memory.chunk_size
    return min(kept, bank_slots(vllm_config))


def working_set_tokens(memory: MemoryConfig) -> int:
    """Tokens whose keys and values the working set holds for one sequence: a retrieved set, once
    for each retrieval layer if these make their own of it."""
    copies = 1 if memory.memory_adapter is None else len(memory.retrieval_layers)
    return copies * memory.top_k * memory.chunk_size


def step_buffer_bytes(max_tokens: int, top_k: int) -> int:
    """Bytes of the index tensors of a step that computes at most ``max_tokens``: 8 a token for its
    place, row and position, 8 a slot and 20 a span, of which there are no more than tokens."""
    return max_tokens * (3 * 8 + 8 * top_k + 20)


def memory_bytes(vllm_config: VllmConfig) -> dict[str, int]:
    """Bytes of each rank's keys and values, and of what indexes them, without allocating any.

    Returns:
        ``bank``, in the place ``bank_device`` says; ``working_set``, the retrieved chunks of
        ``max_num_seqs`` decoding sequences, ``staging``, ``adapted`` and ``step_buffers``, on the device.
    """
    memory, deployment = resolve(vllm_config.model_config.hf_config, vllm_config.additional_config)
    memory = request_limits(memory, deployment)
    tokens = {
        "bank": bank_slots(vllm_config) * memory.chunk_size,
        "working_set": vllm_config.scheduler_config.max_num_seqs * working_set_tokens(memory),
        "staging": num_staging_tokens(memory, deployment),
        "adapted": num_adapted_chunks(vllm_config) * memory.chunk_size * len(memory.retrieval_layers),
    }
    step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    kept = {name: count * _token_bytes(vllm_config) for name, count in tokens.items()}
    return kept | {"step_buffers": step_buffer_bytes(step_tokens, memory.top_k)}


def _token_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of a token's keys and values on one rank."""
    model_config = vllm_config.model_config
    num_kv_heads = model_config.get_num_kv_heads(vllm_config.parallel_config)
    return 2 * num_kv_heads * model_config.hf_config.head_dim * model_config.dtype.itemsize
