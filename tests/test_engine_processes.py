"""Parity in set-ups that need processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


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


@pytest.mark.parametrize("fusion", ["gated", pytest.param("joint", marks=pytest.mark.slow)])
def test_v2_runner(checkpoints: Any, tmp_path: Path, fusion: str) -> None:
    """The runner that is the default on GPUs, and the attention kernel that GPUs use, under
    Triton's interpreter; with a preemption. Every step finds the same buffers, with its own plan."""
    rows = check(checkpoints.memlong(fusion=fusion), tmp_path, "--v2")
    assert rows[-1]["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert rows[-1]["steps"] > 40
    assert rows[-1]["launches"] > 3 * 40


def test_compiled(checkpoints: Any, tmp_path: Path) -> None:
    rows = check(checkpoints.memlong(), tmp_path, "--options", json.dumps({"enforce_eager": False}))
    assert rows[-1]["steps"] > 40
    assert rows[-1]["launches"] == 0


def test_tensor_parallel(checkpoints: Any, tmp_path: Path) -> None:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    options = json.dumps({"tensor_parallel_size": 2})
    check(checkpoints.memlong(), tmp_path, "--options", options, environment=environment)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"fusion": "joint", "memory_bias": True, "memory_adapter": "linear"}])
def test_tensor_parallel_adapter(checkpoints: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    options = json.dumps({"tensor_parallel_size": 2})
    check(checkpoints.memlong(**settings), tmp_path, "--options", options, environment=environment)
