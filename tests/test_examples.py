"""The examples run as programs, with a tiny checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import novel

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.slow


def printed(*words: str | Path) -> str:
    """As a user calls them: the engine has a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [sys.executable, *map(str, words)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def test_offline_batch(model: Path, tmp_path: Path) -> None:
    texts = [tmp_path / f"{i}.txt" for i in range(2)]
    for i, text in enumerate(texts):
        text.write_text(novel()[i * 5000 : i * 5000 + 3000 * (i + 1)])
    first, second = [line for line in printed(EXAMPLES / "offline_batch.py", model, *texts).splitlines() if "…" in line]
    assert 500 < int(first.split()[0]) < int(second.split()[0])


def test_custom_retriever(model: Path) -> None:
    text = printed(EXAMPLES / "custom_retriever.py", model)
    assert "retrievals; the last one of the prompt" in text
    assert text.count("  chunk ") == 4


def test_serve_and_query(model: Path) -> None:
    text = printed(EXAMPLES / "serve_and_query.py", model)
    assert "chat about" in text
    (streamed,) = [line for line in text.splitlines() if line.startswith("streamed: ")]
    assert streamed.count("|") > 1
    assert "server stopped" in text
