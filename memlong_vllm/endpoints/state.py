"""What the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass

from memlong_vllm.endpoints.archives import ArchiveTransfers
from memlong_vllm.endpoints.engine import EngineMemories
from memlong_vllm.endpoints.tenants import KeyRing, Tenancy


@dataclass(frozen=True)
class MemLongState:
    """Attributes:
    api_keys: those that vLLM itself was given for its routes.
    """

    engine: EngineMemories
    tenancy: Tenancy
    api_keys: KeyRing
    archives: ArchiveTransfers
