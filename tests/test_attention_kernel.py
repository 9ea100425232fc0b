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

from memlong_vllm.kernels import launcher
from tests import kernel_check
from tests.kernel_check import Run

FUSIONS = ("gated", "gated_chunk", "joint", "joint_bias", "scaled", "scaled_bias")
VARIANTS = ("blocks", "decode_slots", "decode_slots_split", "gathered", "staged", "adapted", "adapted_gathered")
CASES = (
    *FUSIONS,
    *(f"{fusion}_{dtype}" for fusion in FUSIONS for dtype in ("bfloat16", "float16")),
    *(
        f"{fusion}_{heads}"
        for fusion in ("gated", "joint")
        for heads in ("head100", "head64_group3", "head128_group4", "partly_rotated")
    ),
    *(f"{fusion}_{variant}" for fusion in ("gated", "gated_chunk", "joint") for variant in VARIANTS),
)
CLOSED = ("gated_closed", "gated_closed_bfloat16")
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
    assert sorted(measured) == sorted((*CASES, *CLOSED))


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_agrees_with_the_plain_arithmetic(measured: dict[str, Any], case: str) -> None:
    tolerance = next((t for name, t in TOLERANCES.items() if name in case), 1e-5)
    assert measured[case]["difference"] <= tolerance
    assert measured[case]["changed"] > 0.1
    assert measured[case]["rest_is_untouched"]


@pytest.mark.parametrize("case", CLOSED)
def test_gates_of_zero_leave_the_local_output_as_it_is(measured: dict[str, Any], case: str) -> None:
    assert measured[case] == {"difference": 0.0, "changed": 0.0, "rest_is_untouched": True}


class Launches:
    """In the kernel's place: what it would have been compiled for, launch by launch."""

    def __init__(self) -> None:
        self.found: set[tuple[tuple[str, Any], ...]] = set()
        self._parameters = launcher.retrieval_attention.params

    def __getitem__(self, grid: tuple[int, ...]) -> Launches:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        given = zip(self._parameters, args, strict=False)
        self.found.add((*((p.name, self._seen(p, value)) for p, value in given), *sorted(kwargs.items())))

    @staticmethod
    def _seen(parameter: Any, value: Any) -> Any:
        """Of an argument, what Triton compiles programs of their own for."""
        if isinstance(value, torch.Tensor):
            return value.dtype, parameter.do_not_specialize_on_alignment or value.data_ptr() % 16 == 0
        if parameter.do_not_specialize or isinstance(value, float):
            return type(value)
        return 1 if value == 1 else value % 16 == 0


def launched(
    monkeypatch: pytest.MonkeyPatch, run: Run, kernel: Any, reads: Any, lse: torch.Tensor
) -> set[tuple[tuple[str, Any], ...]]:
    launches = Launches()
    bias = run.bias if run.config.memory_bias else None
    local_lse = None if run.config.fusion == "gated" else lse
    with monkeypatch.context() as patched:
        patched.setattr(launcher, "retrieval_attention", launches)
        for spans, stored in reads:
            kernel.attend(run.query, run.output, spans, stored, run.cos_sin, run.gate, bias, local_lse)
    return launches.found


WARMED_UP = ("gated", "gated_bfloat16", "gated_gathered", "gated_decode_slots", "gated_decode_slots_split")
WARMED_UP += ("joint_bias", "joint_head100", "joint_adapted", "joint_adapted_gathered", "joint_staged", "scaled")


@pytest.mark.parametrize("name", WARMED_UP)
def test_steps_launch_what_the_warm_up_has_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So no request waits for a compiler."""
    run = Run(kernel_check.CASES[name])
    kernel = run.begin_step()
    step = launched(monkeypatch, run, kernel, run.memory.stored(1), run.lse)
    assert step
    # As the layer does, it has none yet.
    no_lse = run.query.new_empty((1, run.case.heads.num_heads), dtype=torch.float32)
    reads = run.memory.nothing_stored(kernel.take_warm_up_spans())
    assert step <= launched(monkeypatch, run, kernel, reads, no_lse)
    assert kernel.take_warm_up_spans() == ()


def test_the_kernel_compiles_for_gpus() -> None:
    """Also without one: into tensor core products (but for float32), chunks copied ahead in the
    widest pieces that their rows allow, and all of it in the shared memory of a consumer card."""
    compiled = run("tests.kernel_compile", interpreted=False)
    assert len(compiled) == 13
    for name, facts in compiled.items():
        assert facts["shared_bytes"] <= 99 << 10, name
        assert facts["spilled_bytes"] == 0, name
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
