"""The real 135M model: parity with the reference, and the demo command itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memlong_vllm.adapters import Adapter, LoraSettings, backbone_identity, save_adapter
from memlong_vllm.config import MemLongConfig
from memlong_vllm.conversion import load_base
from memlong_vllm.demo.prompts import NOVEL_QUESTIONS
from memlong_vllm.demo_model import (
    BACKBONE,
    DemoModelError,
    build,
    demo_checkpoint,
    locate,
    recipe_digest,
    shipped_adapter,
)
from tests.checkpoints import novel
from tests.engines import Engine, Reference, assert_parity


@pytest.fixture(scope="module")
def demo() -> Path:
    """The checkpoint with the adapter that the package ships."""
    assert shipped_adapter() is not None
    return demo_checkpoint()


def test_parity(start_engine: Any, demo: Path) -> None:
    engine: Engine = start_engine(demo, max_model_len=4096, max_num_batched_tokens=600, max_num_seqs=4,
                                  kv_cache_memory_bytes=512 << 20, memlong={"bank_gib": 0.5})  # fmt: skip
    tokens = engine.llm.get_tokenizer()(novel()[5000:30000])["input_ids"]
    (output,) = engine.generate([tokens[:1300]], max_tokens=8)
    assert_parity(output, Reference(demo), 1e-3)
    engine.assert_empty()


def prompt_end_sets(engine: Engine) -> list[list[int]]:
    """Chunks that each prompt's end retrieved."""
    return [line["chunk_ids"] for line in engine.trace() if line["kind"] == "prompt_end"]


@pytest.mark.slow
@pytest.mark.parametrize(("document_len", "num_questions"), [(2590, 2), (8000, 3)])
def test_a_later_question_on_a_shared_document(
    start_engine: Any, demo: Path, document_len: int, num_questions: int
) -> None:
    """Served from the prefix cache, its answer is that of an engine that computes the whole prompt."""
    options = {"max_model_len": document_len + 100, "max_num_batched_tokens": 2048, "max_num_seqs": 1,
               "kv_cache_memory_bytes": 512 << 20, "memlong": {"bank_gib": 0.5}}  # fmt: skip
    engine: Engine = start_engine(demo, **options)
    tokenizer = engine.llm.get_tokenizer()
    document = tokenizer(novel()[5000:60000])["input_ids"][:document_len]
    prompts = [document + tokenizer(f"\n\nQuestion: {text}\nAnswer:")["input_ids"] for text in NOVEL_QUESTIONS]
    prompts = prompts[:num_questions]

    def ask_one_by_one(engine: Engine, prompts: list[list[int]]) -> list[Any]:
        sampling = {"max_tokens": 24, "logprobs": 10, "prompt_logprobs": None}
        return [engine.generate([prompt], **sampling)[0] for prompt in prompts]

    outputs = ask_one_by_one(engine, prompts)[1:]
    engine.assert_empty()
    sets = prompt_end_sets(engine)[1:]
    engine = start_engine(demo, enable_prefix_caching=False, **options)
    cold_outputs = ask_one_by_one(engine, prompts[1:])
    assert sets == prompt_end_sets(engine)
    assert [len(chunk_ids) for chunk_ids in sets] == [8] * (num_questions - 1)
    for output, cold_output in zip(outputs, cold_outputs, strict=True):
        assert output.num_cached_tokens > 0.8 * len(output.prompt_token_ids)
        assert not cold_output.num_cached_tokens
        answer, cold_answer = output.outputs[0], cold_output.outputs[0]
        assert answer.token_ids == cold_answer.token_ids
        for entry, cold_entry in zip(answer.logprobs, cold_answer.logprobs, strict=True):
            for token in entry.keys() & cold_entry.keys():
                assert abs(entry[token].logprob - cold_entry[token].logprob) <= 1e-3


def make_adapter(checkpoint: Path, **changes: Any) -> Adapter:
    """An adapter for the demo's backbone, as identified by a checkpoint made of it."""
    config, weights = MemLongConfig.from_pretrained(checkpoint), load_file(checkpoint / "model.safetensors")
    query, layers = "model.layers.20.self_attn.q_proj", config.memory.retrieval_layers
    tensors = {f"{query}.lora_A": torch.randn(4, 576) * 0.1, f"{query}.lora_B": torch.randn(576, 4) * 0.1}
    tensors |= {f"model.layers.{layer}.self_attn.memory_bias": torch.full((9,), 0.5) for layer in layers}
    values = {
        "tensors": tensors,
        "lora": LoraSettings(4, 4.0),
        "memlong": config.memory.to_dict(),
        "base": backbone_identity(weights, config),
    }
    return Adapter(**values | changes)


def test_the_recipe_covers_the_adapter(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes(b"one")
    digests = [recipe_digest(None), recipe_digest(adapter)]
    adapter.write_bytes(b"two")
    assert len({*digests, recipe_digest(adapter)}) == 3


@pytest.mark.slow
def test_an_adapter_is_merged(tmp_path: Path) -> None:
    """It is trained on the checkpoint and merged into the GGUF file that was made of."""
    plain = demo_checkpoint(adapted=False)
    adapter = make_adapter(plain)
    model, _ = load_base(locate(BACKBONE, tmp_path), "auto")
    assert backbone_identity(model.state_dict(), model.config) == adapter.base
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    (tmp_path / "first").mkdir()
    made = build(tmp_path / "first", tmp_path / "adapter.safetensors")
    before, after = load_file(plain / "model.safetensors"), load_file(made / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    biases = {name for name in adapter.tensors if name.endswith("memory_bias")}
    assert changed == biases | {"model.layers.20.self_attn.q_proj.weight"}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    config = MemLongConfig.from_pretrained(made)
    assert config.memory == MemLongConfig.from_pretrained(plain).memory
    assert config.memlong_adapter["digest"] == adapter.digest()
    other = backbone_identity({"model.norm.weight": torch.ones(576)}, config)
    save_adapter(make_adapter(plain, base=other), tmp_path / "adapter.safetensors")
    (tmp_path / "second").mkdir()
    with pytest.raises(DemoModelError, match="another base model"):
        build(tmp_path / "second", tmp_path / "adapter.safetensors")


@pytest.mark.slow
def test_demo_command(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "memlong-vllm"), "demo", "--questions", "3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("score") >= 3
    right = re.search(r"^  right: with memory (\d) of 4, without (\d) of 4$", result.stdout, re.MULTILINE)
    assert right is not None, result.stdout
    assert int(right[1]) >= 2, result.stdout  # Three where this was written.
    assert right[2] == "0"
