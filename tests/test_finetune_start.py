"""Training that goes on from what an adapter learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memlong_vllm.adapters.adapter_file import load_adapter
from memlong_vllm.training.run_state import ResumeError
from memlong_vllm.training.trainable import SettingsError, TrainedParts
from tests.checkpoints import Checkpoints
from tests.training_run import PARTS, train

JOINT = {"fusion": "joint", "memory_bias": True, "memory_adapter": "linear"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def first(checkpoints: Checkpoints, cache: Path, tmp_path_factory: pytest.TempPathFactory, tokens: list[int]) -> Path:
    """An adapter, of a run whose last step was its best."""
    output = tmp_path_factory.mktemp("first") / "adapter.safetensors"
    folder = checkpoints.memlong(gates=0.0, **JOINT)
    adapter = train(folder, output, tokens, cache, steps=3, validate_every=0, calibrate_tokens=256, bias_start=-0.5)
    assert adapter.training["step"] == 3
    assert "start" not in adapter.training
    return output


def test_it_begins_where_the_adapter_was(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, first: Path, tmp_path: Path
) -> None:
    folder, output, start = checkpoints.memlong(gates=0.0, **JOINT), tmp_path / "b.safetensors", load_adapter(first)
    adapter = train(folder, output, tokens, cache, start=first, steps=2, calibrate_tokens=256, bias_start=-0.5)
    assert adapter.training["start"] == {"digest": start.digest(), "training": start.training}
    log = [json.loads(line) for line in (tmp_path / "b.safetensors.run" / "log.jsonl").read_text().splitlines()]
    assert log[0]["step"] == 0
    # The file holds bfloat16. A run that starts afresh is 0.017 away with memory.
    for name in ("nll", "nll_without_memory"):
        assert log[0]["validation"][name] == pytest.approx(start.training["validation"][name], abs=2e-3)
    assert any((adapter.tensors[name] != start.tensors[name]).any() for name in start.tensors)
    with pytest.raises(ResumeError, match="start"):
        train(folder, output, tokens, cache, steps=2, calibrate_tokens=256, bias_start=-0.5)


def test_what_does_not_fit_is_refused(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, first: Path, tmp_path: Path
) -> None:
    folder, output = checkpoints.memlong(gates=0.0, **JOINT), tmp_path / "b.safetensors"

    def refused(message: str, model: Path = folder, **settings: object) -> None:
        with pytest.raises(SettingsError, match=message):
            train(model, output, tokens, cache, start=first, **settings)

    refused(r"rank=2.*rank=3.*give the same rank", parts=TrainedParts(rank=3, alpha=4.0))
    refused("parameters learn in one of", parts=TrainedParts(PARTS.rank, PARTS.alpha, targets=("q_proj",)))
    refused("parameters learn in one of", with_memory=False)
    refused("another base model's", checkpoints.memlong(gates=0.0, shape={"intermediate_size": 160}, **JOINT))
    wide = checkpoints.memlong(gates=0.0, **JOINT, memory_adapter_width=2)
    refused("memory_k_adapter is .* in the adapter", wide)
