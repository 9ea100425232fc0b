"""What the engine promises beside numbers: memory in use, failures, aborts, the trace."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams

from memlong_vllm.config import RetrieverConfig
from memlong_vllm.kernels import few_tokens_cpu, many_tokens_cpu, retrieval_cpu, vllm_blocks_cpu
from memlong_vllm.retriever.embedder import FlagEmbedder, RetrieverLoadError
from tests.checkpoints import MEMORY, SHAPE
from tests.engines import Engine, Reference, assert_parity, logprobs_of

# Keys and values of a chunk in float32.
SLOT_BYTES = MEMORY["chunk_size"] * 2 * SHAPE["num_key_value_heads"] * SHAPE["head_dim"] * 4


class FussyEmbedder(FlagEmbedder):
    """The real embedder of ``folder``, except that it cannot bear one word."""

    folder: ClassVar[Path]

    def __init__(self, config: RetrieverConfig, device: str) -> None:
        super().__init__(RetrieverConfig(str(self.folder), "mean", config.max_length), device)

    def embed(self, texts: list[str]) -> np.ndarray:
        if any("Zambo" in text for text in texts):
            raise ValueError("not that word")
        return super().embed(texts)


def test_zero_gates_are_the_sliding_window_backbone(
    start_engine: Any, checkpoints: Any, tokens: list[int], tmp_path: Path
) -> None:
    prompts = [tokens[:300], tokens[400:525]]
    engine: Engine = start_engine(checkpoints.memlong(gates=0.0))
    ours = engine.generate(prompts, max_tokens=80)
    engine.shutdown()
    windowed = tmp_path / "windowed"
    windowed.mkdir()
    base = checkpoints.base()
    for file in base.iterdir():
        (windowed / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text())
    config |= {"sliding_window": MEMORY["local_window"], "max_position_embeddings": 2048}
    config["layer_types"] = ["sliding_attention"] * SHAPE["num_hidden_layers"]
    (windowed / "config.json").unlink()
    (windowed / "config.json").write_text(json.dumps(config))
    stock = LLM(str(windowed), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=2048)
    greedy = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    theirs = stock.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
    stock.llm_engine.engine_core.shutdown()
    assert type(stock.llm_engine.engine_core.engine_core.scheduler).__name__ == "Scheduler"
    for output, wanted in zip(ours, theirs, strict=True):
        (token_ids, measured), (wanted_ids, expected) = logprobs_of(output), logprobs_of(wanted)
        assert token_ids == wanted_ids
        torch.testing.assert_close(measured, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("fusion", "head_dim"), [("gated", 32), ("joint", 32), ("gated", 80)])
def test_cpus_use_their_kernels(
    start_engine: Any,
    checkpoints: Any,
    tokens: list[int],
    monkeypatch: pytest.MonkeyPatch,
    fusion: str,
    head_dim: int,
) -> None:
    """Each in all steps and layers that it is for; that results are right is shown elsewhere. Of heads of 80
    elements vLLM's cache has an order that is left to vLLM."""
    engine: Engine = start_engine(checkpoints.memlong(fusion=fusion, shape={"head_dim": head_dim}))
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[f"{owner.__name__.rpartition('.')[2]}.{name}"] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(retrieval_cpu, "attend_rows")
    count(retrieval_cpu, "attend_spans")
    count(few_tokens_cpu, "attend_windows")
    count(many_tokens_cpu, "attend_windows")
    count(vllm_blocks_cpu, "attend_vllm_blocks")
    engine.generate([tokens[:200]], max_tokens=11)
    num_layers, num_reading = SHAPE["num_hidden_layers"], len(MEMORY["retrieval_layers"])
    prompt_steps, decode_steps = 2, 10
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    ours = num_layers if not has_avx512 else num_reading if fusion == "joint" else 0
    assert calls["retrieval_cpu.attend_rows"] == decode_steps * num_reading
    assert calls["retrieval_cpu.attend_spans"] == (prompt_steps * num_reading if has_avx512 else 0)
    assert calls["few_tokens_cpu.attend_windows"] == decode_steps * ours
    assert calls["many_tokens_cpu.attend_windows"] == (prompt_steps * ours if has_avx512 else 0)
    is_known = head_dim % 32 == 0
    assert calls["vllm_blocks_cpu.attend_vllm_blocks"] == (decode_steps * (num_layers - ours) if is_known else 0)


def test_memory_in_use_while_30k_tokens_run(start_engine: Any, checkpoints: Any, tokens: list[int]) -> None:
    shape = {"num_hidden_layers": 5}
    model = checkpoints.memlong(shape=shape, chunk_size=128, local_window=256, retrieval_stride=128, query_tokens=128,
                                memory_size=32768)  # fmt: skip
    engine: Engine = start_engine(model, max_model_len=32000, max_num_batched_tokens=1024, max_num_seqs=1)
    prompt = tokens[:30000]
    engine.add(prompt, max_tokens=2, prompt_logprobs=None)
    blocks, slots = [], []

    def observe(_: int) -> None:
        stats = engine.scheduler.memory_stats()
        blocks.append(stats["kv_blocks_used"])
        slots.append(stats["slots_used"])

    engine.run(observe)
    block_size = engine.scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    # The window, one step's tokens, and a partial block at either end.
    assert 0 < max(blocks) <= (256 + 1024) // block_size + 2
    assert max(slots) == -(-30000 // 128)
    bank = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.step_memory.bank
    chunk_bytes = 128 * 2 * SHAPE["num_key_value_heads"] * SHAPE["head_dim"] * 4
    assert bank.num_bytes == engine.scheduler.ledger.pool.num_slots * chunk_bytes
    engine.assert_empty()


def test_bank_too_small_for_all_at_once(start_engine: Any, model: Path, tokens: list[int]) -> None:
    """Requests that do not fit wait for slots; none fails, and results do not change."""
    memlong = {"bank_gib": 60 * SLOT_BYTES / 2**30}
    engine: Engine = start_engine(model, max_model_len=512, max_num_seqs=8, memlong=memlong)
    for i in range(6):
        engine.add(tokens[i * 400 : i * 400 + 300], max_tokens=30)
    used, waited = [], []

    def observe(_: int) -> None:
        stats = engine.scheduler.memory_stats()
        used.append(stats["slots_used"])
        waited.append(stats["waiting"] > 0 and stats["running"] > 0)

    outputs = engine.run(observe).values()
    assert max(used) <= engine.scheduler.ledger.pool.num_slots == 60
    assert sum(waited) > 30
    reference = Reference(model)
    for output in outputs:
        assert_parity(output, reference, 1e-5)
    engine.assert_empty()


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_answers_that_outgrow_the_bank(start_engine: Any, model: Path, tokens: list[int], policy: str) -> None:
    """All prompts fit at once; their answers do not: the last are preempted and replayed, the first never."""
    memlong = {"bank_gib": 40 * SLOT_BYTES / 2**30}
    engine: Engine = start_engine(model, max_model_len=512, memlong=memlong, scheduling_policy=policy)
    for i in range(4):
        engine.add(tokens[i * 400 : i * 400 + 100], max_tokens=250)
    running, preempted = [], set()

    def observe(_: int) -> None:
        engine.wait_for_embeddings()
        running.append(len(engine.scheduler.running))
        preempted.update(r.arrival_time for r in engine.scheduler.requests.values() if r.num_preemptions)

    first = min(request.arrival_time for request in engine.scheduler.requests.values())
    outputs = engine.run(observe)
    assert max(running) == 4
    assert engine.scheduler.counters.preemptions > 0
    assert preempted
    assert first not in preempted
    reference = Reference(model)
    assert len(outputs) == 4
    for output in outputs.values():
        assert_parity(output, reference, 1e-5)
    engine.assert_empty()


def test_a_failing_embedder_ends_only_the_requests_that_needed_it(
    start_engine: Any, model: Path, tokens: list[int], checkpoints: Any
) -> None:
    FussyEmbedder.folder = checkpoints.retriever
    retriever = {"model": f"{__name__}:FussyEmbedder"}
    engine: Engine = start_engine(model, memlong={"retriever": retriever, "retriever_batch_size": 8})
    bad = checkpoints.tokenizer("And then Zambo came running. " * 30)["input_ids"]
    outputs = engine.generate([tokens[:300], bad, tokens[1000:1250]], max_tokens=20)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert "not that word" in outputs[1].outputs[0].stop_reason
    again = engine.generate([tokens[:300]], max_tokens=20)
    assert again[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    engine.assert_empty()


def test_what_is_never_retrieved_is_never_embedded(start_engine: Any, model: Path, checkpoints: Any) -> None:
    """A sequence within its window needs no retriever, so a failing one does not end it."""
    FussyEmbedder.folder = checkpoints.retriever
    engine: Engine = start_engine(model, memlong={"retriever": {"model": f"{__name__}:FussyEmbedder"}})
    prompt = checkpoints.tokenizer("And then Zambo came running. " * 4)["input_ids"][:32]
    assert len(prompt) == 32
    assert engine.generate([prompt], max_tokens=30)[0].outputs[0].finish_reason == "length"
    engine.assert_empty()


def test_a_request_for_an_unknown_memory_fails_alone(start_engine: Any, model: Path, tokens: list[int]) -> None:
    engine: Engine = start_engine(model)
    refused = engine.add(tokens[:100], extra_args={"memory_read": ["book"]})
    served = engine.add(tokens[:100], max_tokens=5)
    outputs = engine.run()
    assert outputs[refused].outputs[0].finish_reason == "error"
    assert "no memory named 'book'" in outputs[refused].outputs[0].stop_reason
    assert outputs[served].outputs[0].finish_reason == "length"
    engine.assert_empty()


def test_abort_at_any_time_leaves_nothing(start_engine: Any, model: Path, tokens: list[int]) -> None:
    engine: Engine = start_engine(model)
    request_ids = [engine.add(tokens[i * 300 : i * 300 + 250], max_tokens=50) for i in range(6)]
    aborted: dict[str, str] = {}
    held: list[int] = []

    def abort(step: int) -> None:
        """The oldest request: before its first step, while embedded, within its prompt, in its answer."""
        stats, running = engine.scheduler.memory_stats(), engine.scheduler.running
        moments = {
            "before": step == 0,
            "embedded": stats["pending_embeddings"] > 0 and not running,
            "prompt": any(0 < request.num_computed_tokens < 250 for request in running),
            "answer": any(request.num_computed_tokens > 250 for request in running),
        }
        moment = next((name for name, reached in moments.items() if reached and name not in aborted), None)
        if moment is not None:
            held.append(stats["slots_used"])
            aborted[moment] = running[0].request_id.rsplit("-", 1)[0] if running else request_ids[len(aborted)]
            engine.llm.llm_engine.abort_request([aborted[moment]])

    finished = engine.run(abort)
    assert list(aborted) == ["before", "embedded", "prompt", "answer"]
    assert held[-1] > 0
    assert set(finished) == set(request_ids) - set(aborted.values())
    engine.step()
    engine.assert_empty()


def test_stop_string(start_engine: Any, model: Path, tokens: list[int]) -> None:
    engine: Engine = start_engine(model)
    whole = engine.generate([tokens[:200]], max_tokens=40)[0].outputs[0].text
    stop = whole[12:15]
    output = engine.generate([tokens[:200]], max_tokens=40, stop=[stop], ignore_eos=False)[0].outputs[0]
    assert output.finish_reason == "stop"
    assert output.text == whole[: whole.index(stop)]
    engine.assert_empty()


def test_trace_tells_each_retrieval(start_engine: Any, model: Path, tokens: list[int]) -> None:
    engine: Engine = start_engine(model)
    prompt = tokens[:215]
    engine.generate([prompt], max_tokens=30)
    lines = engine.trace()
    assert {line["request_id"].rsplit("-", 1)[0] for line in lines} == {"request1"}
    # The window is 64: at b = 80 the first chunk, [0, 16), lies outside that of token 95.
    segments = {line["position"]: line for line in lines if line["kind"] == "segment"}
    assert sorted(segments) == list(range(64, 215 + 29, 16))
    assert segments[64]["query"] == [48, 64]
    assert (segments[64]["eligible"], segments[64]["chunk_ids"]) == (1, [0])
    ends = [line for line in lines if line["kind"] == "prompt_end"]
    assert [(line["position"], line["query"]) for line in ends] == [(214, [199, 215])]
    assert ends[0]["eligible"] == segments[208]["eligible"] == 10
    embed = Reference(model).embed
    for line in lines:
        query = embed(prompt[slice(*line["query"])]) if line["query"][1] <= len(prompt) else None
        assert line["chunk_ids"] == sorted(line["chunk_ids"])
        if query is not None:
            scores = [float(embed(prompt[c * 16 : c * 16 + 16]) @ query) for c in range(line["eligible"])]
            assert line["scores"] == pytest.approx([scores[c] for c in line["chunk_ids"]], abs=1e-5)
            assert min(line["scores"]) >= sorted(scores)[-2:][0] - 1e-5


def test_a_checkpoint_without_gates_is_refused(start_engine: Any, checkpoints: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = checkpoints.memlong()
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (broken / file.name).symlink_to(file)
    weights = load_file(source / "model.safetensors")
    kept = {name: weights[name] for name in weights if ".memory_gate" not in name}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 3 memory parameters.*memory_gate"):
        start_engine(broken)


def test_a_retriever_that_cannot_be_loaded_is_refused(start_engine: Any, model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "no-model-in-here"
    empty.mkdir()
    with pytest.raises(RetrieverLoadError, match="no-model-in-here"):
        start_engine(model, memlong={"retriever_path": str(empty)})
