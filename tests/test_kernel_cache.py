"""Kernels compiled by Numba are kept on disk until anything they are made of changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import memlong_vllm

STORE = """
import torch
from memlong_vllm.kernels import kv_cache_cpu
kv_cache_cpu.store(torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.zeros(1, 1, 4, 8), torch.tensor([0]))
stats = kv_cache_cpu._store.stats
print(stats.cache_hits.total(), "from disk,", stats.cache_misses.total(), "compiled")
"""


@pytest.mark.slow
def test_what_a_kernel_calls_counts(tmp_path: Path) -> None:
    package = tmp_path / "memlong_vllm"
    shutil.copytree(Path(memlong_vllm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)

    def store() -> str:
        command = [sys.executable, "-c", STORE]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    assert [store(), store()] == ["0 from disk, 1 compiled", "1 from disk, 0 compiled"]
    with (package / "kernels" / "vectors_cpu.py").open("a") as file:
        file.write("# Changed.\n")
    assert store() == "0 from disk, 1 compiled"
