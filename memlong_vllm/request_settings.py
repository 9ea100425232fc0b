"""What a single request may ask of its memory: ``SamplingParams(extra_args=…)``, ``vllm_xargs``.

Validated in the front end, before the request reaches the engine, and read by the scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from memlong_vllm.config import MemoryConfig
from memlong_vllm.memories.names import validate_name

OURS = ("memory_", "memlong", "top_k")


class RequestSettingsError(ValueError):
    """A request asks for something it cannot have; the message names the field and the fix."""


@dataclass(frozen=True)
class RequestSettings:
    """Per-request settings; None or empty: as the server is configured.

    Attributes:
        memory_size: capacity of the request's own memory in tokens; 0: nothing of its own text
            is retrieved.
        top_k: chunks a retrieval takes at most.
        memory_read: named memories whose chunks join the request's own in every retrieval.
        memory_write: named memory that gets the request's complete chunks when it has ended well.
    """

    memory_size: int | None = None
    top_k: int | None = None
    memory_read: tuple[str, ...] = ()
    memory_write: str | None = None

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None, limits: MemoryConfig) -> RequestSettings:
        """Parse and validate.

        Args:
            limits: the most that ``memory_size`` and ``top_k`` may be.

        Raises:
            RequestSettingsError: naming the field, its value and the rule.
        """
        arguments = dict(extra_args or {})
        known = {f.name for f in fields(cls)}
        unknown = sorted(name for name in arguments if name.startswith(OURS) and name not in known)
        if unknown:
            raise RequestSettingsError(f"extra_args {unknown}: MemLong's are {sorted(known)}")
        read = arguments.get("memory_read") or ()
        settings = cls(
            arguments.get("memory_size"),
            arguments.get("top_k"),
            (read,) if isinstance(read, str) else tuple(read) if isinstance(read, list | tuple) else (read,),
            arguments.get("memory_write"),
        )
        settings._check_numbers(limits)
        settings._check_names()
        return settings

    def _check_numbers(self, limits: MemoryConfig) -> None:
        for name, least, most in (("memory_size", 0, limits.memory_size), ("top_k", 1, limits.top_k)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value <= most):
                rule = f"must be an integer from {least} to {most} (raise max_{name} on the server for more)"
                raise RequestSettingsError(f"{name} = {value!r}: {rule}")
        if self.memory_size is not None and self.memory_size % limits.chunk_size:
            rule = f"must be a multiple of chunk_size ({limits.chunk_size})"
            raise RequestSettingsError(f"memory_size = {self.memory_size}: {rule}")

    def _check_names(self) -> None:
        named = [("memory_read", name) for name in self.memory_read]
        named += [("memory_write", self.memory_write)] if self.memory_write is not None else []
        for field, name in named:
            if not isinstance(name, str):
                raise RequestSettingsError(f"{field} = {name!r}: must be a name")
            try:
                validate_name(name)
            except ValueError as error:
                raise RequestSettingsError(f"{field}: {error}") from None
        if len(set(self.memory_read)) < len(self.memory_read):
            raise RequestSettingsError(f"memory_read = {list(self.memory_read)}: names a memory twice")

    def apply(self, config: MemoryConfig) -> MemoryConfig:
        """The server's memory settings with the request's."""
        memory_size = config.memory_size if self.memory_size is None else self.memory_size
        return replace(config, memory_size=memory_size, top_k=self.top_k or config.top_k)

    def salt(self, cache_salt: str | None, secret: str, versions: tuple[str, ...] = ()) -> str | None:
        """What keeps this request's blocks apart from those computed with another memory.

        Args:
            secret: of the engine, so that no client can send such a salt.
            versions: of the memories read, which say what is in them.

        Returns:
            ``cache_salt`` itself for a request that asks for nothing.
        """
        if self.memory_size is None and self.top_k is None and not self.memory_read:
            return cache_salt
        return secret + json.dumps([cache_salt, self.memory_size, self.top_k, versions])
