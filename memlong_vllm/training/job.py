"""What a fine-tuning run reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FinetuneJob:
    """What a run reads and writes.

    Attributes:
        model: folder of a MemLong checkpoint.
        output: the adapter file to write; the run's folder is ``output`` with ``.run`` appended.
        cache_dir: of frozen features, if they are kept.
        retriever_path: in place of the checkpoint's retriever.
        start: adapter that training goes on from, of the same base and with the same parts; None: afresh.
        cpu: use the CPU even where there is a GPU.
        restart: forget an interrupted run with this output.
        notes: put into the adapter's metadata as they are.
    """

    model: Path
    output: Path
    cache_dir: Path
    retriever_path: str | None = None
    start: Path | None = None
    cpu: bool = False
    restart: bool = False
    notes: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return self.output.with_name(self.output.name + ".run")
