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

CASES = (
    *("gated", "gated_chunk", "joint", "joint_bias", "scaled", "scaled_bias"),
    *(
        f"{fusion}_{heads}"
        for fusion in ("gated", "joint")
        for heads in ("head100", "head64_group3", "head128_group4", "partly_rotated")
    ),
    *(
        f"{fusion}_{variant}"
        for fusion in ("gated", "gated_chunk", "joint")
        for variant in ("bfloat16", "float16", "blocks", "gathered", "staged", "adapted")
    ),
)
# Results are rounded to the type they are written in, weights and queries to that of the chunks.
TOLERANCES = {"bfloat16": 4e-2, "float16": 5e-3}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """All cases of tests/kernel_check.py."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(not torch.cuda.is_available()))}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernel_check"],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_all_cases_are_measured(measured: dict[str, Any]) -> None:
    assert sorted(measured) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_agrees_with_the_plain_arithmetic(measured: dict[str, Any], case: str) -> None:
    tolerance = next((t for name, t in TOLERANCES.items() if name in case), 1e-5)
    assert measured[case]["difference"] <= tolerance
    assert measured[case]["changed"] > 0.1
    assert measured[case]["rest_is_untouched"]
