"""The engine's numbers in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# Numbers of MemLongScheduler.memory_stats that only grow while the engine lives, and what they
# count. All others are what there is now.
COUNTERS = {
    "holds": "Times a request was kept out of a step because it waited for embeddings.",
    "held_seconds": "Seconds that requests were kept out of steps, summed over requests.",
    "preemptions": "Preemptions of requests because the bank was short of slots.",
    "prefix_hit_tokens": "Prompt tokens taken over from earlier requests.",
    "searches": "Retrievals made.",
    "search_seconds": "Seconds spent searching.",
    "slot_evictions": "Kept chunks that made room for others.",
    "embedding_requests": "Texts whose embedding was asked for.",
    "embedding_cache_hits": "Embeddings that were known already.",
    "embedding_batches": "Batches embedded.",
    "embedded_texts": "Texts embedded.",
    "embed_seconds": "Seconds spent embedding.",
    "named_chunks_loaded": "Chunks of named memories brought into the bank.",
    "named_chunks_saved": "Chunks saved to named memories.",
    "failed_memory_writes": "Writes to named memories that were lost after their request had ended.",
}
GAUGES = {
    "running": "Requests running.",
    "waiting": "Requests waiting.",
    "sequences": "Requests with a memory.",
    "slots_used": "Slots of the bank that requests hold.",
    "slots_kept": "Slots of the bank kept for later requests.",
    "slots_total": "Slots of the bank.",
    "kv_blocks_used": "Blocks of the KV cache in use.",
    "kv_blocks_total": "Blocks of the KV cache.",
    "pending_embeddings": "Texts waiting to be embedded.",
    "largest_embedding_batch": "Texts in the largest batch embedded so far.",
    "bytes_window_kv": "Bytes of each rank's KV cache.",
    "bytes_bank": "Bytes of each rank's bank.",
    "bytes_working_set": "Bytes of each rank's retrieved keys and values of decoding requests.",
    "bytes_staging": "Bytes of each rank's retrieved keys and values of prefills.",
    "bytes_adapted": "Bytes of each rank's chunks as adapters made them.",
    "bytes_step_buffers": "Bytes of each rank's index tensors of a step.",
    "bytes_index": "Bytes of the embeddings that running requests search.",
    "named_chunks_resident": "Chunks of named memories in the bank.",
}


class _Stats(Collector):
    def __init__(self, stats: Mapping[str, float]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        for name, value in self._stats.items():
            if name in COUNTERS:
                yield CounterMetricFamily(f"memlong_{name}", COUNTERS[name], value=value)
            else:
                text = GAUGES.get(name, f"The number {name} of the engine's memory.")
                yield GaugeMetricFamily(f"memlong_{name}", text, value=value)


def render(stats: Mapping[str, float]) -> bytes:
    """Prometheus's text format; counters get the suffix ``_total``."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Stats(stats))
    return generate_latest(registry)
