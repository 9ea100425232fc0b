"""The Triton kernel of retrieval attention, under the interpreter unless there is a GPU; in a
process of its own, since Triton decides at its import how kernels run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

FUSIONS = ("gated", "gated_chunk", "joint", "joint_bias", "scaled", "scaled_bias")
CASES = (
    *FUSIONS,
    *(f"{fusion}_{dtype}" for fusion in FUSIONS for dtype in ("bfloat16", "float16")),
    *(
        f"{fusion}_{heads}"
        for fusion in ("gated", "joint")
        for heads in ("head100", "head64_group3", "head128_group4", "partly_rotated")
    ),
    *(
        f"{fusion}_{variant}"
        for fusion in ("gated", "gated_chunk", "joint")
        for variant in ("blocks", "gathered", "staged", "adapted", "adapted_gathered")
    ),
)
# Results are rounded to the type they are written in, weights and queries to that of the chunks.
TOLERANCES = {"bfloat16": 4e-2, "float16": 5e-3}


def run(module: str, *, interpreted: bool) -> dict[str, Any]:
    """What a program of the tests prints in its last line."""
    result = subprocess.run(
        [sys.executable, "-m", module],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": str(int(interpreted))},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """All cases of tests/kernel_check.py."""
    return run("tests.kernel_check", interpreted=not torch.cuda.is_available())


def test_the_benchmark_asks_kernel_and_pytorch_the_same() -> None:
    found = run("tests.kernel_benchmark", interpreted=not torch.cuda.is_available())
    assert len(found) == 8
    for name, (kernel, sdpa) in found.items():
        assert kernel < 1e-4, name
        assert sdpa < 1e-4, name


def test_all_cases_are_measured(measured: dict[str, Any]) -> None:
    assert sorted(measured) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_agrees_with_the_plain_arithmetic(measured: dict[str, Any], case: str) -> None:
    tolerance = next((t for name, t in TOLERANCES.items() if name in case), 1e-5)
    assert measured[case]["difference"] <= tolerance
    assert measured[case]["changed"] > 0.1
    assert measured[case]["rest_is_untouched"]


def test_the_kernel_compiles_for_gpus() -> None:
    """Also without one: into tensor core products (but for float32), chunks copied ahead in the
    widest pieces that their rows allow, and all of it in the shared memory of a consumer card."""
    compiled = run("tests.kernel_compile", interpreted=False)
    assert len(compiled) == 8
    for name, facts in compiled.items():
        assert facts["shared_bytes"] <= 99 << 10, name
        assert not facts["has_spills"], name
        assert max(facts["copy_bytes"]) == (8 if "3b" in name and "float32" not in name else 16), name
        assert (facts["matrix_products"] > 0) == ("float32" not in name), name
        assert facts["is_split"] == (name.startswith("decode") and "float32" not in name), name


def test_the_benchmark_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "attention_kernel.py"
    command = [sys.executable, str(script), "--output", str(tmp_path / "result.json")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 1
    assert "needs CUDA" in result.stderr
    assert not list(tmp_path.iterdir())
