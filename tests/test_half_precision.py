"""The engine in bfloat16 and float16, as near to the reference in float32 as the types are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import RequestOutput

from memlong_vllm.reference.retrieval import NamedMemory
from tests.engines import Engine, Reference

HEAD_100 = {"head_dim": 100}  # OpenLLaMA's; half of it is not a multiple of eight.
ADAPTER = {"fusion": "joint", "memory_bias": True, "memory_adapter": "linear"}


def assert_near(output: RequestOutput, reference: Reference, named: Sequence[NamedMemory] = ()) -> None:
    """bfloat16 moves these log-probabilities by 0.03 at most, memory by some 0.2 on average."""
    prompt, completion = list(output.prompt_token_ids), output.outputs[0]
    assert completion.finish_reason == "length", completion.stop_reason
    tokens = prompt + list(completion.token_ids)
    entries = [*(output.prompt_logprobs or [])[1:], *completion.logprobs]
    scored = slice(-len(entries), None)
    measured = torch.tensor([entry[token].logprob for entry, token in zip(entries, tokens[scored], strict=True)])
    expected = reference.logprobs(tokens, len(prompt), named=named)[scored]
    without = reference.logprobs(tokens, len(prompt), with_memory=False)[scored]
    difference = (measured - expected).abs()
    assert difference.max() < 0.1
    assert difference.mean() < (measured - without).abs().mean() / 10


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [({}, "bfloat16"), (HEAD_100, "bfloat16"), (HEAD_100, "float16")],
    ids=["head_32-bfloat16", "head_100-bfloat16", "head_100-float16"],
)
@pytest.mark.parametrize("fusion", ["gated", "joint", "scaled_logits"])
def test_fusions(
    start_engine: Any, checkpoints: Any, tokens: list[int], fusion: str, shape: dict[str, Any], dtype: str
) -> None:
    model = checkpoints.memlong(shape=shape, fusion=fusion)
    engine: Engine = start_engine(model, dtype=dtype)
    reference = Reference(model)
    for output in engine.generate([tokens[:401], tokens[900:1156]], max_tokens=20):
        assert_near(output, reference)
    engine.assert_empty()


@pytest.mark.parametrize("bank_device", ["device", "cpu"])
@pytest.mark.parametrize(("shape", "settings"), [({}, {}), (HEAD_100, ADAPTER)], ids=["gated", "adapter"])
def test_named_memories_and_shared_prefixes(
    start_engine: Any,
    checkpoints: Any,
    tokens: list[int],
    tmp_path: Path,
    shape: dict[str, Any],
    settings: dict[str, Any],
    bank_device: str,
) -> None:
    model = checkpoints.memlong(shape=shape, **settings)
    memlong = {"memory_dir": str(tmp_path / "memories"), "bank_device": bank_device}
    engine: Engine = start_engine(model, dtype="bfloat16", block_size=32, memlong=memlong)
    engine.generate([tokens[2000:2700]], max_tokens=1, prompt_logprobs=None, extra_args={"memory_write": "book"})
    reference = Reference(model)
    named = [reference.memorize(tokens[2000:2700])]
    question = {"max_tokens": 20, "prompt_logprobs": None}
    for extra_args, read in (({}, []), ({"memory_read": ["book"]}, named)):
        for is_again in (False, True):
            output = engine.generate([tokens[100:500]], extra_args=extra_args, **question)[0]
            assert (output.num_cached_tokens > 0) is is_again
            assert_near(output, reference, read)
    engine.assert_empty()
