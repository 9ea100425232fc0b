"""The retrieval trace: one JSON line a retrieval or forgetting, to check sets from outside."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

from memlong_vllm.scheduler.events import Event, Forgotten

logger = logging.getLogger(__name__)


class RetrievalTrace:
    """Appends to ``path``. A write that fails ends the trace, never the engine.

    A preempted request's events are written again when it is replayed. ``request_id`` is vLLM's
    internal one: the request's own with a random suffix after the last ``-``. What a request took
    over with a shared prefix has ``"shared": true``; chunks of named memories that were attended
    before its own stand as [memory, row] in ``named``.
    """

    def __init__(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the engine)

    def write(self, request_id: str, event: Event, shared: bool = False) -> None:
        line: dict[str, object] = {"request_id": request_id}
        if isinstance(event, Forgotten):
            line |= {"position": event.position, "kind": "forget", "chunk_ids": event.chunk_ids}
        else:
            retrieval = event.retrieval
            line |= {"position": retrieval.position, "kind": retrieval.kind, "query": retrieval.query}
            line |= {"eligible": event.num_eligible, "chunk_ids": event.chunk_ids, "scores": event.scores}
            if event.named:
                line |= {"named": event.named, "named_scores": event.named_scores}
        if shared:
            line["shared"] = True
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except (OSError, ValueError) as error:  # A full disk, or closed for an earlier one.
            if not self._file.closed:
                logger.error("the retrieval trace ends here: %s", error)
                self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
