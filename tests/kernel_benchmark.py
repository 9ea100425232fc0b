"""What the benchmark of the attention kernel measures, tiny and under Triton's interpreter. Prints a JSON
object: by cell, the difference to float32, and PyTorch's attention to plain arithmetic. See
test_attention_kernel.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from attention_kernel import FUSIONS, Cell, Model

from memlong_vllm.memory_attention import attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {"head20": Model(4, 4, 20, 32, 64, 128, 1), "head32_group2": Model(4, 2, 32, 32, 64, 128, 1)}


def sdpa_difference(cell: Cell) -> float:
    """PyTorch's attention gets the same question as the kernel, but for rotations and what is merged."""
    answer = next(cell.sdpa_calls())()
    grouped = answer.unflatten(2, (cell.span_len, -1)).transpose(1, 2).flatten(2, 3)
    expected = attend(cell._spans_of(cell.query), *cell.gathered(0), cell.model.head_dim**-0.5)
    return float((grouped - expected).abs().max() / expected.abs().max())


def main() -> None:
    torch.manual_seed(0)
    found = {}
    for name, model in MODELS.items():
        for fusion in FUSIONS:
            for span_len in (1, 3):
                cell = Cell(model, torch.float32, fusion, 2, span_len, DEVICE)
                found[f"{name}_{fusion}_{span_len}"] = [cell.difference(), sdpa_difference(cell)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
