"""What an engine's memory has in use and what was done: the numbers behind ``/memlong/stats``."""

from __future__ import annotations

from typing import Any

from memlong_vllm.config import memory_bytes


def usage(scheduler: Any) -> dict[str, int]:
    """Slots and blocks.

    Args:
        scheduler: a :class:`memlong_vllm.scheduler.scheduler.MemLongScheduler`.

    Returns:
        ``*_used``, zero while no request is alive; ``slots_kept``, held by nobody but with contents
        that may be wanted again; ``*_total``; ``slot_evictions`` of such contents so far.
    """
    pool, slots = scheduler.kv_cache_manager.block_pool, scheduler.ledger.pool
    num_running, num_waiting = scheduler.get_request_counts()
    return {
        "running": num_running,
        "waiting": num_waiting,
        "slots_used": slots.num_slots - slots.num_available,
        "slots_kept": slots.num_kept,
        "slots_total": slots.num_slots,
        "slot_evictions": slots.num_evictions,
        # One block is vLLM's placeholder for positions without a block.
        "kv_blocks_used": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "kv_blocks_total": pool.num_gpu_blocks - 1,
    }


def bytes_by_kind(scheduler: Any, index_bytes: int) -> dict[str, int]:
    """``bytes_*``: of each rank's keys and values, and of embeddings in the scheduler's process.

    Args:
        index_bytes: embeddings that living requests search.
    """
    window_kv = sum(tensor.size for tensor in scheduler.kv_cache_config.kv_cache_tensors)
    kinds = {"window_kv": window_kv, **memory_bytes(scheduler.vllm_config), "index": index_bytes}
    return {f"bytes_{name}": size for name, size in kinds.items()}
