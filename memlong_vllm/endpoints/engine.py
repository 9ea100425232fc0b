"""The engine as the HTTP routes see it."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from memlong_vllm.endpoints.errors import library_error

_FIRST_POLL_S = 0.01
_LONGEST_POLL_S = 0.5


class EngineCore(Protocol):
    """Of vLLM's ``AsyncMPClient``: calls a method of the engine's process."""

    async def call_utility_async(self, method: str, *args: Any) -> Any: ...


class EngineMemories:
    """The engine's library of memories, in another process.

    Args:
        core: of vLLM's ``EngineClient``.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core

    async def stats(self) -> dict[str, float]:
        """``MemLongScheduler.memory_stats``."""
        return await self._core.call_utility_async("memlong_stats")

    async def perform(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """An operation of :func:`memlong_vllm.memories.operations.perform`, waited for if it takes time.

        Raises:
            EndpointError: if it fails.
        """
        answer = await self._ask(operation, arguments)
        if "ticket" not in answer:
            return answer
        delay = _FIRST_POLL_S
        while True:
            await asyncio.sleep(delay)
            state = await self._ask("poll", {"ticket": answer["ticket"]})
            if state["done"]:
                return state["result"]
            delay = min(2 * delay, _LONGEST_POLL_S)

    async def _ask(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        answer = await self._core.call_utility_async("memlong_memory", operation, arguments)
        if "error" in answer and "kind" in answer:
            raise library_error(answer["error"], answer["kind"])
        return answer
