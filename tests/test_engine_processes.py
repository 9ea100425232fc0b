"""Parity in set-ups that need processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FUSED = ("joint", "scaled_logits")
TWO_RANKS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, sorted(os.sched_getaffinity(0))[:2])),
}


def check(model: Path, tmp_path: Path, *arguments: str, environment: dict[str, str] | None = None) -> list[Any]:
    """Run tests/runner_check.py; returns its rows after checking the differences in them."""
    command = [sys.executable, "-m", "tests.runner_check", str(model), *arguments]
    variables = os.environ | {"TRACE_FILE": str(tmp_path / "trace.jsonl")} | (environment or {})
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = json.loads(result.stdout.strip().splitlines()[-1])
    differences = [row for row in rows if "with" in row]
    assert len(differences) == 5
    for row in differences:
        assert row["with"] <= 1e-5
        assert row["without"] > 1e-3
    return rows


@pytest.mark.parametrize("fusion", ["gated", *(pytest.param(f, marks=pytest.mark.slow) for f in FUSED)])
def test_v2_runner(checkpoints: Any, tmp_path: Path, fusion: str) -> None:
    """The runner that is the default on GPUs, and the attention kernel that GPUs use, under
    Triton's interpreter; with a preemption. Every step finds the same buffers, with its own plan."""
    rows = check(checkpoints.memlong(fusion=fusion), tmp_path, "--v2")
    assert rows[-1]["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert rows[-1]["steps"] > 40
    assert rows[-1]["launches"] > 3 * 40


@pytest.mark.parametrize("fusion", ["gated", pytest.param("scaled_logits", marks=pytest.mark.slow)])
def test_compiled(checkpoints: Any, tmp_path: Path, fusion: str) -> None:
    options = json.dumps({"enforce_eager": False})
    rows = check(checkpoints.memlong(fusion=fusion), tmp_path, "--options", options)
    assert rows[-1]["steps"] > 40
    assert rows[-1]["launches"] > 40


def test_tensor_parallel(checkpoints: Any, tmp_path: Path) -> None:
    options = json.dumps({"tensor_parallel_size": 2})
    check(checkpoints.memlong(), tmp_path, "--options", options, environment=TWO_RANKS)


@pytest.mark.slow
def test_tensor_parallel_adapter(checkpoints: Any, tmp_path: Path) -> None:
    model = checkpoints.memlong(fusion="joint", memory_bias=True, memory_adapter="linear")
    check(model, tmp_path, "--options", json.dumps({"tensor_parallel_size": 2}), environment=TWO_RANKS)


@pytest.mark.slow
def test_tensor_parallel_with_one_key_value_head(checkpoints: Any, tmp_path: Path) -> None:
    """Both ranks have a copy of it."""
    model = checkpoints.memlong(shape={"num_key_value_heads": 1})
    check(model, tmp_path, "--options", json.dumps({"tensor_parallel_size": 2}), environment=TWO_RANKS)
