"""The retrieval trace: one JSON line a retrieval or forgetting, to check sets from outside."""

from __future__ import annotations

import json
from pathlib import Path

from memlong_vllm.scheduler.ledger import Forgotten, Retrieved


class RetrievalTrace:
    """Appends to ``path``. A preempted request's events are written again when it is replayed."""

    def __init__(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the engine)

    def write(self, request_id: str, event: Retrieved | Forgotten) -> None:
        line: dict[str, object] = {"request_id": request_id}
        if isinstance(event, Forgotten):
            line |= {"position": event.position, "kind": "forget", "chunk_ids": event.chunk_ids}
        else:
            retrieval = event.retrieval
            line |= {"position": retrieval.position, "kind": retrieval.kind, "query": retrieval.query}
            line |= {"eligible": event.num_eligible, "chunk_ids": event.chunk_ids, "scores": event.scores}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
