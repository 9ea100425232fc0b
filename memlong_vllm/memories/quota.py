"""What a tenant may keep."""

from __future__ import annotations

from dataclasses import dataclass

from memlong_vllm.memories.errors import QuotaExceededError


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one tenant.

    Attributes:
        max_bytes: of data files: what memories hold, what was deleted but is still being read,
            and what writes under way have reserved. A write reserves by contents, so what is kept
            can exceed this by file headers and by ranks' copies of replicated heads.
        max_names: memories, those that a write is about to make included.
    """

    max_bytes: int
    max_names: int

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_names"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"quota {name} = {value!r}: must be a whole number")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant has: of ``num_bytes``, ``reserved`` belong to writes under way."""

    num_bytes: int
    reserved: int
    num_names: int

    def check(self, quota: Quota, more_bytes: int, more_names: int) -> None:
        """Check that there is room.

        Raises:
            QuotaExceededError: with the numbers.
        """
        if self.num_names + more_names > quota.max_names:
            held = f"there are {self.num_names} memories and {quota.max_names} are allowed"
            raise QuotaExceededError(f"the quota of names is used up: {held}")
        if self.num_bytes + more_bytes > quota.max_bytes:
            held = f"{self.num_bytes} bytes are in use ({self.reserved} of them reserved by writes under way)"
            held += f" and {quota.max_bytes} are allowed"
            raise QuotaExceededError(f"{more_bytes} more bytes exceed the quota: {held}")
