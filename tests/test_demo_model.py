"""The real 135M model: parity with the reference, and the demo command itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memlong_vllm.demo_model import demo_checkpoint
from tests.checkpoints import novel
from tests.engines import Engine, Reference, assert_parity


@pytest.fixture(scope="module")
def gated_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with random gates instead of zero ones."""
    source, path = demo_checkpoint(), tmp_path_factory.mktemp("gated")
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (path / file.name).symlink_to(file)
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in sorted(weights):
        if name.endswith(".memory_gate"):
            weights[name] = torch.randn(weights[name].shape, generator=generator) * 0.3
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_parity(start_engine: Any, gated_demo: Path) -> None:
    engine: Engine = start_engine(gated_demo, max_model_len=4096, max_num_batched_tokens=600, max_num_seqs=4,
                                  kv_cache_memory_bytes=512 << 20, memlong={"bank_gib": 0.5})  # fmt: skip
    tokens = engine.llm.get_tokenizer()(novel()[5000:30000])["input_ids"]
    outputs = engine.generate([tokens[:1700], tokens[2000:3290]], max_tokens=12)
    reference = Reference(gated_demo)
    for output in outputs:
        assert_parity(output, reference, 1e-3)
    engine.assert_empty()


@pytest.mark.slow
def test_demo_command(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "memlong-vllm"), "demo", "--questions", "3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("score") >= 3
