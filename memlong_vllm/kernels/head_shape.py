"""What kernels of retrieval attention are told of the model's heads, and the fusions by number."""

from __future__ import annotations

from dataclasses import dataclass

FUSIONS = ("gated", "joint", "scaled_logits")


@dataclass(frozen=True)
class HeadShape:
    """This rank's heads: of ``padded_dim`` in rows of queries and outputs, ``head_dim`` in chunks.

    ``rotary_dim``: dimensions that RoPE rotates, the first ones, as pairs (i, i + rotary_dim / 2).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    padded_dim: int
    rotary_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_heads // self.num_kv_heads
