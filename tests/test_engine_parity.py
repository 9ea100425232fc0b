"""The engine against the reference: the same log-probabilities, however the work is cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.model_executor.layers.attention import Attention

from memlong_vllm.local_attention_cpu import CPUWindowBackend
from tests.checkpoints import MEMORY
from tests.engines import Engine, Reference, assert_parity

TINY = 1e-5
CHUNK = MEMORY["chunk_size"]


def ragged(tokens: list[int]) -> list[list[int]]:
    """Prompts that end inside, at and just past segment borders."""
    return [
        tokens[start : start + length] for start, length in ((0, 401), (900, 256), (2000, 337), (5000, 97), (6000, 160))
    ]


def test_one_shot_prefill(start_engine: Any, model: Any, reference: Reference, tokens: list[int]) -> None:
    engine: Engine = start_engine(model, max_num_batched_tokens=2048)
    outputs = engine.generate([tokens[:700]], max_tokens=4)
    assert_parity(outputs[0], reference, TINY)
    engine.assert_empty()


@pytest.mark.parametrize("step_tokens", [37, 100])
def test_prefill_cut_off_the_chunk_grid(
    start_engine: Any, model: Any, reference: Reference, tokens: list[int], step_tokens: int
) -> None:
    engine: Engine = start_engine(model, max_num_batched_tokens=step_tokens)
    for output in engine.generate(ragged(tokens)[:3], max_tokens=8):
        assert_parity(output, reference, TINY)
    engine.assert_empty()


def test_sequences_join_and_leave(start_engine: Any, model: Any, reference: Reference, tokens: list[int]) -> None:
    engine: Engine = start_engine(model, max_num_seqs=3)
    waiting = [(prompt, 10 + 9 * i) for i, prompt in enumerate(ragged(tokens) * 2)]

    def join(step: int) -> None:
        if step % 4 == 0 and waiting:
            prompt, max_tokens = waiting.pop()
            engine.add(prompt, max_tokens=max_tokens)

    join(0)
    finished: dict[str, Any] = {}
    while waiting or engine.llm.llm_engine.has_unfinished_requests():
        finished |= engine.run(join)
        join(0)
    assert len(finished) == 10
    for output in finished.values():
        assert_parity(output, reference, TINY)
    engine.assert_empty()


def test_300_tokens_across_segments(start_engine: Any, model: Any, reference: Reference, tokens: list[int]) -> None:
    engine: Engine = start_engine(model)
    for output in engine.generate([tokens[:150], tokens[500:717]], max_tokens=300):
        assert_parity(output, reference, TINY)
    engine.assert_empty()


def test_forced_preemption(start_engine: Any, model: Any, reference: Reference, tokens: list[int]) -> None:
    engine: Engine = start_engine(model)
    preempted: list[int] = []
    last = 0

    def preempt(step: int) -> None:
        nonlocal last
        if len(engine.scheduler.running) >= 2 and step > last + 12 and len(preempted) < 3:
            last = step
            preempted.append(len(engine.scheduler.running))
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    for prompt in ragged(tokens):
        engine.add(prompt, max_tokens=60)
    finished = engine.run(preempt)
    assert len(preempted) == 3
    assert len(finished) == len(ragged(tokens))
    for output in finished.values():
        assert_parity(output, reference, TINY)
    engine.assert_empty()


def test_holds_of_random_length(start_engine: Any, model: Any, reference: Reference, tokens: list[int]) -> None:
    """Retrievals become ready late and in any order; requests wait for them, one by one."""
    engine: Engine = start_engine(model)
    generator, scheduler = random.Random(0), engine.scheduler
    is_ready, schedule = scheduler._is_ready, scheduler.schedule
    left: dict[str, int] = {}
    held_now: set[str] = set()
    num_held_decodes = 0

    def hold_longer(request: Any, start: int) -> bool:
        remaining = left.get(request.request_id, 0)
        left[request.request_id] = remaining - 1 if remaining > 0 else generator.choice([0, 0, 1, 2, 5])
        if remaining > 0:
            held_now.add(request.request_id)
        return is_ready(request, start) and remaining <= 0

    def schedule_and_look(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_held_decodes
        held_now.clear()
        output = schedule(*args, **kwargs)
        assert not held_now & output.num_scheduled_tokens.keys()
        num_held_decodes += bool(held_now) and bool(output.num_scheduled_tokens)
        return output

    scheduler._is_ready, scheduler.schedule = hold_longer, schedule_and_look
    outputs = engine.generate(ragged(tokens), max_tokens=50)
    assert num_held_decodes > 20, "some were to be held while others went on"
    for output in outputs:
        assert_parity(output, reference, TINY)
    engine.assert_empty()


def test_preemption_by_pressure(start_engine: Any, model: Any, reference: Reference, tokens: list[int]) -> None:
    """Too few KV blocks for all that run: vLLM itself preempts, again and again."""
    engine: Engine = start_engine(model, block_size=32, num_gpu_blocks_override=10, max_num_batched_tokens=64)
    for prompt in ragged(tokens):
        engine.add(prompt, max_tokens=40)
    preemptions = 0

    def count(_: int) -> None:
        nonlocal preemptions
        preemptions = max(preemptions, sum(request.num_preemptions for request in engine.scheduler.requests.values()))

    finished = engine.run(count)
    assert preemptions > 0
    assert len(finished) == len(ragged(tokens))
    for output in finished.values():
        assert_parity(output, reference, TINY)
    engine.assert_empty()


def test_two_completions_of_a_prompt(start_engine: Any, model: Any, reference: Reference, tokens: list[int]) -> None:
    engine: Engine = start_engine(model)
    outputs = engine.generate([tokens[:333]], n=2, temperature=1.0, max_tokens=60)
    assert outputs[0].outputs[0].token_ids != outputs[0].outputs[1].token_ids
    assert_parity(outputs[0], reference, TINY, greedy=False)
    engine.assert_empty()


def test_special_tokens_have_no_text(start_engine: Any, checkpoints: Any, tokens: list[int]) -> None:
    """They are left out of chunks and queries; a chunk of nothing else is never retrieved."""
    model, special = checkpoints.memlong(top_k=32), checkpoints.tokenizer.all_special_ids[0]
    prompt = tokens[:64] + CHUNK * [special] + tokens[64:250]
    prompt[5] = prompt[100] = prompt[-3] = special
    engine: Engine = start_engine(model)
    (output,) = engine.generate([prompt], max_tokens=40)
    assert_parity(output, Reference(model), TINY)
    segments = {line["position"]: line["chunk_ids"] for line in engine.trace() if line["kind"] == "segment"}
    # All that lie outside the window, but for the fifth.
    assert segments[256] == [0, 1, 2, 3, *range(5, (256 - MEMORY["local_window"]) // CHUNK + 1)]
    engine.assert_empty()


VARIANTS = {
    "joint": {"fusion": "joint"},
    "scaled_logits": {"fusion": "scaled_logits"},
    "per_chunk": {"memory_softmax": "chunk"},
    "current": {"query_scope": "current"},
    "wide_segments": {"retrieval_stride": 48, "query_tokens": 24, "prompt_query_tokens": 40, "local_window": 96},
    "current_wide_segments": {"query_scope": "current", "retrieval_stride": 32, "query_tokens": 40},
    "forgetting": {"memory_size": 160},
    "forgetting_wide_segments": {"memory_size": 96, "retrieval_stride": 32},
    "bias_and_adapter": {"fusion": "joint", "memory_bias": True, "memory_adapter": "linear"},
    "gated_adapter": {"memory_adapter": "linear"},
    "scaled_logits_bias_adapter": {"fusion": "scaled_logits", "memory_bias": True, "memory_adapter": "linear"},
    "wide_adapter": {"fusion": "joint", "memory_adapter": "linear", "memory_adapter_width": 3},
    "instructed": {"retriever.query_instruction": "Represent this sentence for searching relevant passages: "},
    "memory_layer_not_read": {"memory_layer": 0, "retrieval_layers": [2, 3]},
}


def assert_forgotten_for_good(trace: list[dict[str, Any]]) -> None:
    """Chunks are forgotten once, when they are complete, and not retrieved any more."""
    forgotten: dict[str, set[int]] = {}
    for line in trace:
        gone = forgotten.setdefault(line["request_id"], set())
        assert not gone & set(line["chunk_ids"])
        if line["kind"] == "forget":
            assert all(0 <= chunk < line["position"] // CHUNK for chunk in line["chunk_ids"])
            gone |= set(line["chunk_ids"])
    assert any(forgotten.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(start_engine: Any, checkpoints: Any, tokens: list[int], variant: str) -> None:
    model = checkpoints.memlong(**VARIANTS[variant])
    engine: Engine = start_engine(model, max_num_batched_tokens=90)
    reference = Reference(model)
    for output in engine.generate(ragged(tokens)[:3], max_tokens=40):
        assert_parity(output, reference, TINY)
    if "forgetting" in variant:
        assert_forgotten_for_good(engine.trace())
    engine.assert_empty()


HEADS = {
    "multi_head": {"num_key_value_heads": 4},
    "multi_query": {"num_key_value_heads": 1},
    "head_dim_100": {"head_dim": 100, "num_key_value_heads": 4},
    "head_dim_48": {"head_dim": 48},
}
SHAPES = HEADS | {
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    # YaRN's table ends at 256 positions in vLLM; the prompts reach 421.
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
        }
    },
    "scaled_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}


# Heads matter to how memory is fused, embeddings and rotation do not.
@pytest.mark.parametrize(
    ("shape", "fusion"),
    [*((shape, "gated") for shape in SHAPES), *((shape, "joint") for shape in HEADS)],
)
def test_backbones(start_engine: Any, checkpoints: Any, tokens: list[int], shape: str, fusion: str) -> None:
    model = checkpoints.memlong(shape=SHAPES[shape], fusion=fusion)
    engine: Engine = start_engine(model)
    reference = Reference(model)
    for output in engine.generate(ragged(tokens)[:2], max_tokens=20):
        assert_parity(output, reference, TINY)
    engine.assert_empty()


def test_without_avx512(
    monkeypatch: pytest.MonkeyPatch, start_engine: Any, model: Any, reference: Reference, tokens: list[int]
) -> None:
    """What this package chooses on other processors: its own local attention in every layer, PyTorch's
    operations for prompts' attention to memory."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    engine: Engine = start_engine(model, max_num_batched_tokens=90)
    layers = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    backends = {layer.attn_backend for layer in layers if isinstance(layer, Attention)}
    assert backends == {CPUWindowBackend}
    for output in engine.generate(ragged(tokens)[:3], max_tokens=40):
        assert_parity(output, reference, TINY)
    engine.assert_empty()
