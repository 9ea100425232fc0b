"""The capacity planner against engines that really run, vLLM's own figures and known numbers."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

from memlong_vllm.capacity import (
    Capacity,
    CapacityError,
    Setup,
    blocks_per_request,
    fit,
    full_spec,
    max_concurrency,
    num_parameters,
    plan,
    rope_bytes,
    slot_bytes,
    token_bytes,
    variants,
    weight_bytes,
    window_spec,
)
from memlong_vllm.cli.plan import SHAPES
from memlong_vllm.config import GIB, MemLongConfig, MemoryConfig, max_named_slots, max_sequence_slots
from memlong_vllm.conversion import preset
from memlong_vllm.model import MemLongForCausalLM
from tests.checkpoints import Checkpoints
from tests.engines import Engine

MIB = 1 << 20
StartEngine = Callable[..., Engine]
# Each pads to 32 on a CPU, and some to what is no multiple of 8.
HEAD_DIMS = (32, 20)


def openllama() -> tuple[LlamaConfig, MemoryConfig]:
    config = LlamaConfig(**SHAPES["openllama-3b"])
    return config, MemoryConfig.from_dict(preset("paper", 26, 2048) | {"memory_size": 81920}, 26)


def capacities(setup: Setup, config: LlamaConfig | None = None, **memory: Any) -> dict[str, Capacity]:
    shape, block = openllama()
    return {c.name: c for c in plan(config or shape, dataclasses.replace(block, **memory), setup)}


def setup_of(engine: Engine, **fields: Any) -> Setup:
    """What an engine on a CPU was started with."""
    vllm_config = engine.llm.llm_engine.vllm_config
    return Setup(
        context=vllm_config.model_config.max_model_len,
        dtype=vllm_config.model_config.dtype,
        block_size=vllm_config.cache_config.block_size,
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        kv_head_dim=32,
        **fields,
    )


def model_of(engine: Engine) -> Any:
    core = engine.llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.model


def pool_bytes(engine: Engine) -> int:
    return engine.scheduler.kv_cache_config.kv_cache_tensors[0].size


def blocks_in_use(engine: Engine) -> int:
    pool = engine.scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # One is vLLM's null block.


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(2, 590) for _ in range(length)]


# Against engines.


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_memlong_engine_holds_what_is_planned(
    checkpoints: Checkpoints, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch, head_dim: int
) -> None:
    parameter_bytes: list[int] = []
    load_weights = MemLongForCausalLM.load_weights

    def counting(self: MemLongForCausalLM, weights: Any) -> set[str]:
        parameter_bytes.append(sum(parameter.nbytes for parameter in self.parameters()))
        return load_weights(self, weights)  # Afterwards the CPU's matrices are packed elsewhere.

    monkeypatch.setattr(MemLongForCausalLM, "load_weights", counting)
    model = checkpoints.memlong(
        shape={"head_dim": head_dim}, memory_bias=True, memory_adapter="linear", memory_adapter_width=2
    )
    engine = start_engine(model, block_size=32)
    config, setup = MemLongConfig.from_pretrained(model), setup_of(engine)
    memory, cache = config.memory, engine.scheduler.kv_cache_config
    spec, group = window_spec(config, memory, setup), cache.kv_cache_groups[0]
    assert [group.kv_cache_spec] == [spec]
    assert pool_bytes(engine) == cache.num_blocks * config.num_hidden_layers * spec.page_size_bytes
    expected = get_max_concurrency_for_kv_cache_config(engine.llm.llm_engine.vllm_config, cache)
    assert max_concurrency(spec, setup, cache.num_blocks) == expected
    assert [weight_bytes(config, memory, setup)] == parameter_bytes
    table = {name: buffer for name, buffer in model_of(engine).named_buffers() if "cos_sin_cache" in name}
    assert [rope_bytes(config, setup)] == [buffer.nbytes for buffer in table.values()]
    slots = max_sequence_slots(memory, setup.context, setup.max_num_batched_tokens)
    planned = {c.name: c for c in plan(config, memory, setup)}["MemLong, bank on device"]
    assert setup.max_num_seqs is not None
    assert planned.sequence["bank"] == slots * slot_bytes(config, memory, setup)
    held = model_of(engine).step_memory.working_set.num_bytes
    assert planned.sequence["working set"] * setup.max_num_seqs == held
    assert planned.device["step buffers"] == model_of(engine).step_memory.buffers.num_bytes
    # A bank that is not limited also has room for what named memories may bring in.
    named = max_named_slots(memory, setup.context, setup.max_num_batched_tokens) * slot_bytes(config, memory, setup)
    bank_bytes = (planned.sequence["bank"] + named) * setup.max_num_seqs
    assert bank_bytes == model_of(engine).step_memory.bank.num_bytes


def test_full_attention_is_vllms_own_figure(checkpoints: Checkpoints, start_engine: StartEngine) -> None:
    model = checkpoints.base(max_position_embeddings=2048)
    engine = start_engine(model, block_size=32, enable_prefix_caching=False)
    config, setup, cache = LlamaConfig.from_pretrained(model), setup_of(engine), engine.scheduler.kv_cache_config
    spec = full_spec(config, setup)
    assert cache.kv_cache_groups[0].kv_cache_spec == spec
    assert pool_bytes(engine) == cache.num_blocks * config.num_hidden_layers * spec.page_size_bytes
    vllm_config = engine.llm.llm_engine.vllm_config
    expected = get_max_concurrency_for_kv_cache_config(vllm_config, cache)
    assert max_concurrency(spec, setup, cache.num_blocks) == expected
    assert expected == vllm_config.cache_config.kv_cache_max_concurrency
    engine.add(prompt(1, 2000), max_tokens=48, prompt_logprobs=None)
    peak = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        peak = max(peak, blocks_in_use(engine))
    assert peak == blocks_per_request(spec, setup) == 64


def test_a_long_prompt_holds_the_planned_blocks(checkpoints: Checkpoints, start_engine: StartEngine) -> None:
    model = checkpoints.memlong()
    engine = start_engine(model, block_size=32)
    config = MemLongConfig.from_pretrained(model)
    planned = {c.name: c for c in plan(config, config.memory, setup_of(engine))}["MemLong, bank on device"]
    engine.add(prompt(2, 1500), max_tokens=200, prompt_logprobs=None)
    peaks = {True: 0, False: 0}
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        request = next(iter(engine.scheduler.requests.values()), None)
        if request is not None:
            decodes = request.num_computed_tokens > 1500
            peaks[decodes] = max(peaks[decodes], blocks_in_use(engine))
    # vLLM's bound has a block for a step that begins within one; these steps begin at blocks.
    assert planned.blocks_prefill - 1 <= peaks[False] <= planned.blocks_prefill
    assert peaks[True] == planned.blocks_decode < planned.blocks_prefill


@pytest.mark.parametrize("limited_by", ["bank", "KV cache"])
def test_as_many_sequences_run_at_once_as_planned(
    checkpoints: Checkpoints, start_engine: StartEngine, limited_by: str
) -> None:
    """An engine with the planned KV cache and bank runs that many to their ends without preemption.

    It may admit more for a while, since it admits whatever fits at the moment, and preempt later.
    """
    model = checkpoints.memlong()
    config = MemLongConfig.from_pretrained(model)
    setup = Setup(512, 3 * MIB, GIB, torch.float32, kv_head_dim=32, block_size=32, reserve_bytes=0)
    setup = dataclasses.replace(setup, max_num_batched_tokens=128, gpu_memory_utilization=1.0)
    name = "MemLong, bank on device" if limited_by == "bank" else "window alone"
    (variant,) = [variant for variant in variants(config, config.memory, setup) if variant.name == name]
    planned = fit(dataclasses.replace(variant, fixed={}), setup)
    assert 5 <= planned.sequences <= 12
    engine = start_engine(
        model,
        block_size=32,
        max_model_len=512,
        max_num_seqs=32,
        num_gpu_blocks_override=planned.num_blocks,
        memlong={"bank_gib": planned.device.get("bank", GIB) / GIB},
    )
    for seed in range(planned.sequences):
        engine.add(prompt(seed, 300), max_tokens=200, prompt_logprobs=None, logprobs=None)
    running, preempted = 0, 0
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.wait_for_embeddings()
        engine.step()
        running = max(running, len(engine.scheduler.running))
        preempted += sum(request.num_preemptions for request in engine.scheduler.requests.values())
    assert (running, preempted) == (planned.sequences, 0)
    engine.assert_empty()


# Against checkpoints and known numbers.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("memory", [{}, {"memory_bias": True, "memory_adapter": "linear", "memory_adapter_width": 3}])
def test_parameters_are_those_of_the_checkpoint(checkpoints: Checkpoints, tied: bool, memory: dict[str, Any]) -> None:
    shape = {"tie_word_embeddings": tied, "head_dim": 20, "attention_bias": tied, "mlp_bias": tied}
    model = checkpoints.memlong(shape=shape, **memory)
    config = MemLongConfig.from_pretrained(model)
    held = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert num_parameters(config, config.memory) == held
    plain = load_file(checkpoints.base(**shape) / "model.safetensors")
    assert num_parameters(config, None) == sum(tensor.numel() for tensor in plain.values())


@pytest.mark.parametrize(("name", "published"), [("openllama-3b", 3_426_473_600), ("llama-3-8b", 8_030_261_248)])
def test_shapes_have_the_published_number_of_parameters(name: str, published: int) -> None:
    assert num_parameters(LlamaConfig(**SHAPES[name]), None) == published


def test_the_figures_of_80k_tokens() -> None:
    """Of the design: 24.8 GiB, 0.63 GiB, 0.95 GiB and 13 MiB; its heads are not padded."""
    planned = capacities(Setup(80_000, kv_head_dim=100))
    full, device = planned["full attention"].sequence, planned["MemLong, bank on device"].sequence
    assert full["KV in decode"] == 80_000 * 26 * 2 * 32 * 100 * 2
    assert full["KV in decode"] / GIB == pytest.approx(24.8, abs=0.05)
    one_block = 16 * 26 * 2 * 32 * 100 * 2
    assert device["KV in decode"] - one_block == 2048 * 26 * 2 * 32 * 100 * 2
    assert (device["KV in decode"] - one_block) / GIB == pytest.approx(0.635, abs=0.005)
    assert device["bank"] == 625 * 128 * 2 * 32 * 100 * 2
    assert device["bank"] / GIB == pytest.approx(0.95, abs=0.005)
    assert device["working set"] == 8 * 128 * 2 * 32 * 100 * 2
    assert device["working set"] / 1e6 == pytest.approx(13, abs=0.2)


def test_heads_are_padded_in_the_kv_cache_alone() -> None:
    config, memory = openllama()
    padded, plain = Setup(80_000), Setup(80_000, kv_head_dim=100)
    ratio = full_spec(config, padded).page_size_bytes / full_spec(config, plain).page_size_bytes
    assert ratio == 104 / 100
    assert slot_bytes(config, memory, padded) == slot_bytes(config, memory, plain) == 128 * 2 * 32 * 100 * 2


# What the variants have to do with each other.


def test_fp8_halves_the_kv_cache() -> None:
    planned = capacities(Setup(8192))
    plain, fp8 = planned["full attention"], planned["full attention, fp8 KV"]
    assert 2 * fp8.sequence["KV in decode"] == plain.sequence["KV in decode"]
    both = capacities(Setup(8192, kv_cache_dtype="fp8"))
    assert dataclasses.replace(both["full attention"], name=fp8.name) == fp8 == both[fp8.name]
    assert both["MemLong, bank on host"] == planned["MemLong, bank on host"]
    assert 2 * both["window alone"].sequence["KV in decode"] == planned["window alone"].sequence["KV in decode"]


def test_a_host_bank_leaves_the_card_to_the_window() -> None:
    planned = capacities(Setup(80_000))
    sequences = {name: capacity.sequences for name, capacity in planned.items()}
    assert sequences["full attention"] == 0
    assert sequences["MemLong, bank on device"] < sequences["MemLong, bank on host"] <= sequences["window alone"]
    host = planned["MemLong, bank on host"]
    assert (host.host["bank"], "bank" in host.device) == (host.sequences * host.sequence["bank, host"], False)
    config, _ = openllama()
    staging = 8192 * token_bytes(config, Setup(80_000))
    assert host.device["staging"] == planned["MemLong, bank on device"].device["staging"] == staging
    assert host.host["search index"] == host.sequences * 625 * 1024 * 4


@pytest.mark.parametrize("context", [1000, 5000, 80_000])
@pytest.mark.parametrize("card_gib", [1, 8, 16, 80])
def test_one_sequence_more_would_not_fit(context: int, card_gib: int) -> None:
    setup = Setup(context, card_gib * GIB, 10_000 * GIB)
    config, memory = openllama()
    for variant in variants(config, memory, setup):
        capacity = fit(variant, setup)
        used = sum(capacity.device.values())
        if capacity.sequences:
            assert capacity.limited_by == "card"
            assert used <= setup.card_bytes * setup.gpu_memory_utilization < used + variant.block_bytes
        held = capacity.blocks_prefill + capacity.sequences * capacity.blocks_decode + 1
        others = sum(variant.fixed.values()) + (capacity.sequences + 1) * sum(variant.each.values())
        assert others + held * variant.block_bytes > setup.card_bytes * setup.gpu_memory_utilization


@pytest.mark.parametrize(
    ("fields", "limit", "sequences"),
    [({"host_bytes": 3 * GIB}, "host memory", 3), ({"max_num_seqs": 2}, "max_num_seqs", 2), ({}, "card", 20)],
)
def test_what_limits_is_named(fields: dict[str, int], limit: str, sequences: int) -> None:
    host = capacities(Setup(80_000, **fields))["MemLong, bank on host"]
    assert (host.limited_by, host.sequences) == (limit, sequences)


def test_ranks_share_heads_and_the_host() -> None:
    one, two = (capacities(Setup(80_000, tensor_parallel_size=n)) for n in (1, 2))
    for name, capacity in two.items():
        for kind in ("KV in prefill", "bank", "working set"):
            if kind in capacity.sequence:
                assert 2 * capacity.sequence[kind] == one[name].sequence[kind]
        assert capacity.device["weights"] < 0.51 * one[name].device["weights"]
    name = "MemLong, bank on host"
    assert two[name].sequence["bank, host"] == one[name].sequence["bank, host"]
    copies = LlamaConfig(**SHAPES["openllama-3b"] | {"num_key_value_heads": 1})
    doubled = capacities(Setup(80_000, tensor_parallel_size=2), copies)[name].sequence["bank, host"]
    assert doubled == 2 * capacities(Setup(80_000), copies)[name].sequence["bank, host"]


def test_a_capacity_below_the_context_bounds_the_bank() -> None:
    bank = capacities(Setup(80_000), memory_size=8192)["MemLong, bank on device"].sequence["bank"]
    config, memory = openllama()
    writing = 2048 // 128 + 1
    assert bank == (8192 // 128 + writing) * slot_bytes(config, memory, Setup(80_000))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 0}, "context = 0 must be positive"),
        ({"block_size": 0}, "block_size = 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization = 1.5"),
        ({"tensor_parallel_size": 3}, "32 heads with 32 key-value heads cannot be split over 3 ranks"),
        ({"kv_head_dim": 96}, "kv_head_dim = 96 is less than the model's head_dim 100"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        capacities(Setup(**{"context": 4096} | fields))


def test_weights_that_do_not_fit_leave_nothing() -> None:
    for capacity in capacities(Setup(4096, 4 * GIB)).values():
        assert (capacity.sequences, capacity.num_blocks, capacity.limited_by) == (0, 0, "card")


def test_quantised_projections_leave_embeddings_and_norms_as_they_are() -> None:
    """Llama-3-8B has 8,030,261,248 parameters, 1,050,939,392 of them embeddings and norms."""
    config = LlamaConfig(**SHAPES["llama-3-8b"], tie_word_embeddings=False)
    setup = Setup(80_000, projection_dtype=torch.float8_e4m3fn)
    assert weight_bytes(config, None, setup) == 8_030_261_248 + 1_050_939_392
