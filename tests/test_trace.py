"""The file of retrievals: what its lines say, and that it cannot end the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memlong_vllm.scheduler.events import Forgotten, NamedChunk, Retrieved
from memlong_vllm.scheduler.segments import Retrieval
from memlong_vllm.scheduler.trace import RetrievalTrace

RETRIEVAL = Retrieval(position=64, kind="segment", query=(48, 64), num_reachable=1, origin=0)


def test_lines(tmp_path: Path) -> None:
    trace = RetrievalTrace(str(tmp_path / "new" / "trace.jsonl"))
    trace.write("a", Retrieved(RETRIEVAL, 3, (0, 2), (0.5, 0.25)))
    trace.write("a", Retrieved(RETRIEVAL, 5, (), (), (NamedChunk(1, 7),), (0.75,)), shared=True)
    trace.write("b", Forgotten(160, (0, 1)))
    trace.close()
    made = {"position": 64, "kind": "segment", "query": [48, 64]}
    assert [json.loads(line) for line in (tmp_path / "new" / "trace.jsonl").read_text().splitlines()] == [
        {"request_id": "a", **made, "eligible": 3, "chunk_ids": [0, 2], "scores": [0.5, 0.25]},
        {"request_id": "a", **made, "eligible": 5, "chunk_ids": [], "scores": [], "named": [[1, 7]],
         "named_scores": [0.75], "shared": True},
        {"request_id": "b", "position": 160, "kind": "forget", "chunk_ids": [0, 1]},
    ]  # fmt: skip


def test_a_full_disk_ends_the_trace_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    trace = RetrievalTrace("/dev/full")
    for _ in range(3):
        trace.write("a", Forgotten(160, (0, 1)))
    trace.close()
    assert caplog.text.count("the retrieval trace ends here") == 1
