"""What is measured: workloads, and for each the lengths and batches."""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, int]
"""(length, batch)"""


@dataclass(frozen=True)
class Cell:
    """One workload at one size.

    Attributes:
        length: tokens of each prompt (``document``: of the document).
        batch: requests at once (``document``: questions).
        answer: tokens of each answer.
    """

    workload: str
    length: int
    batch: int
    answer: int

    @property
    def longest(self) -> int:
        """Tokens that a sequence has at most; a question takes part of a chunk."""
        return self.length + self.answer + (QUESTION_TOKENS if self.workload == "document" else 0)

    @property
    def kv_tokens(self) -> int:
        """Tokens that full attention keeps for all sequences at once."""
        if self.workload == "document":
            return self.length + self.batch * (QUESTION_TOKENS + self.answer)
        return self.batch * self.longest

    @property
    def key(self) -> dict[str, object]:
        return {"workload": self.workload, "length": self.length, "batch": self.batch}

    def __str__(self) -> str:
        return f"{self.workload} {self.length:,} x {self.batch}"


QUESTION_TOKENS = 48


def parse_size(text: str) -> Size:
    """``LENGTHxBATCH`` as the command line has it, ``32768x4``."""
    length, _, batch = text.partition("x")
    return int(length), int(batch)
