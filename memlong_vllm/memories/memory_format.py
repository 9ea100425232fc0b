"""What made a memory: the model whose keys and values it holds and the retriever of its embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

PROBE_TEXT = "A memory is found again by what was said, not by where it was said."
MIN_PROBE_COSINE = 0.999
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DESCRIPTIONS = {
    "model_fingerprint": "the weights or settings below the memory layer",
    "pooling": "the retriever's pooling",
    "max_length": "the retriever's max_length",
    "query_instruction": "the retriever's query_instruction",
    "dimension": "the dimension of embeddings",
    "chunk_size": "chunk_size",
    "memory_layer": "memory_layer",
    "num_kv_heads": "the number of key-value heads",
    "head_dim": "head_dim",
    "dtype": "the dtype of keys and values",
}


@dataclass(frozen=True)
class MemoryFormat:
    """Two memories of one format hold the same numbers for the same text.

    Attributes:
        model_fingerprint: of :func:`memlong_vllm.memories.fingerprint.model_fingerprint`.
        pooling, max_length, query_instruction: the retriever's settings, see ``RetrieverConfig``.
        dimension: components of an embedding.
        probe: the retriever's embedding of ``PROBE_TEXT``, [dimension]. It tells embedders apart
            where a path would not: the same embedder in another folder is the same.
        chunk_size: tokens a chunk.
        memory_layer: the layer whose un-rotated keys and values are stored.
        num_kv_heads: of all tensor-parallel ranks together.
        dtype: of keys and values: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    """

    model_fingerprint: str
    pooling: str
    max_length: int
    query_instruction: str | None
    dimension: int
    probe: tuple[float, ...]
    chunk_size: int
    memory_layer: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_SIZES:
            raise ValueError(f"dtype = {self.dtype!r}: must be one of {sorted(ITEM_SIZES)}")
        for name in ("dimension", "chunk_size", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be positive")
        if len(self.probe) != self.dimension or not all(map(math.isfinite, self.probe)):
            raise ValueError(f"probe: must be {self.dimension} finite numbers")

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's keys and values, token ids and embedding."""
        kv = 2 * self.num_kv_heads * self.chunk_size * self.head_dim * ITEM_SIZES[self.dtype]
        return kv + 4 * self.chunk_size + 4 * self.dimension

    def mismatches(self, other: MemoryFormat) -> list[str]:
        """What differs in ``other``, in words; empty if memories may be exchanged."""
        found = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name != "probe" and mine != theirs:
                found.append(f"{_DESCRIPTIONS[field.name]}: {_shown(mine)} and {_shown(theirs)}")
        if self.dimension == other.dimension:
            cosine = _cosine(self.probe, other.probe)
            if not cosine >= MIN_PROBE_COSINE:
                found.append(f"the retriever: it embeds the same sentence differently (cosine {cosine:.4f})")
        return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _cosine(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    norm = math.hypot(*a) * math.hypot(*b)
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0
