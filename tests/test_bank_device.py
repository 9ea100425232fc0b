"""Where keys and values are kept changes no result: bank in host memory, working set, staging."""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memlong_vllm.config import MemLongConfig, memory_bytes
from memlong_vllm.plan import ChunkLoad, ChunkSave, StepPlan
from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.step_memory import StepMemory
from memlong_vllm.worker.transfer import RankHeads
from tests.checkpoints import novel
from tests.engines import Engine, Reference, assert_parity, logprobs_of
from tests.test_engine_processes import check

TINY = 1e-5
VARIANTS = {
    "gated": {},
    "joint": {"fusion": "joint"},
    "joint_adapter": {"fusion": "joint", "memory_bias": True, "memory_adapter": "linear"},
}


@pytest.fixture(scope="module")
def tokens(checkpoints: Any) -> list[int]:
    return checkpoints.tokenizer(novel()[3000:20000])["input_ids"]


def step_memory(engine: Engine) -> StepMemory:
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model().step_memory


def one_after_the_other(engine: Engine, prompts: list[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
    """Batches, and with them roundings, do not depend on when retrievals are ready."""
    return [logprobs_of(engine.generate([prompt], max_tokens=50)[0]) for prompt in prompts]


NUM_LAYERS = 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bank_may_be_in_host_memory(
    start_engine: Callable[..., Engine], checkpoints: Any, tokens: list[int], variant: str
) -> None:
    """The same tokens, and log-probabilities but for roundings: kernels on CPUs read a bank in place and
    gathered chunks in other orders. And it is the reference's answer, alone and in batches."""
    model = checkpoints.memlong(**VARIANTS[variant])
    prompts = [tokens[:211], tokens[300:390], tokens[900:1301]]
    expected = one_after_the_other(start_engine(model), prompts)
    engine = start_engine(model, memlong={"bank_device": "cpu"})
    for (ids, logprobs), (expected_ids, expected_logprobs) in zip(
        one_after_the_other(engine, prompts), expected, strict=True
    ):
        assert ids == expected_ids
        assert (logprobs - expected_logprobs).abs().max() <= TINY
    reference = Reference(model)
    for output in engine.generate(prompts, max_tokens=50):
        assert_parity(output, reference, TINY)
    engine.assert_empty()


def observe_decoding(memory: StepMemory) -> list[tuple[str, int]]:
    """(request, retrieval) of every token computed alone that attends to memory, as plans come in."""
    seen: list[tuple[str, int]] = []
    stage = memory.stage

    def stage_and_look(plan: StepPlan) -> None:
        for sequence in plan.sequences:
            if sequence.end - sequence.start == 1:
                seen.extend((sequence.request_id, span.retrieval_id) for span in sequence.reads)
        stage(plan)

    memory.stage = stage_and_look  # type: ignore[method-assign]
    return seen


def test_decoding_gathers_once_a_retrieval(
    start_engine: Callable[..., Engine], checkpoints: Any, tokens: list[int]
) -> None:
    """Not once a step, and not once a layer; also where requests wait, are preempted and replayed."""
    model = checkpoints.memlong()
    engine = start_engine(model, max_num_seqs=3)
    memory = step_memory(engine)
    seen = observe_decoding(memory)
    gathers: list[int] = []
    gather = memory.bank.gather
    memory.bank.gather = lambda slots, *out: (gathers.append(len(slots)), gather(slots, *out))  # type: ignore
    preempted: list[int] = []

    def preempt(step: int) -> None:
        if len(engine.scheduler.running) > 1 and step >= 30 and not preempted:
            preempted.append(step)
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    for start in (0, 500, 1000, 1500):
        engine.add(tokens[start : start + 150 + start // 20], max_tokens=70)
    outputs = engine.run(preempt)
    assert preempted
    working_set = memory.working_set
    assert working_set.num_gathers == len(set(seen))
    assert working_set.num_reuses == len(seen) - len(set(seen)) > 5 * len(set(seen))
    # Prefills gather in every layer; decoding has not gathered beside its rows.
    assert len(gathers) < len(seen)
    reference = Reference(model)
    for output in outputs.values():
        assert_parity(output, reference, TINY)
    engine.assert_empty()


def adapter_weights(model: Path, seed: int) -> dict[str, torch.Tensor]:
    """Others than the checkpoint's, by its names; the memory layer's are the identity."""
    generator = torch.Generator().manual_seed(seed)
    config = MemLongConfig.from_pretrained(model)
    size = config.num_key_value_heads * config.head_dim
    identity, weights = torch.eye(2 * size), {}
    for layer in config.memory.retrieval_layers:
        name = f"model.layers.{layer}.self_attn.memory_%s_adapter"
        noise = torch.randn(2 * size, 2 * size, generator=generator) * (layer > config.memory.memory_layer) / 20
        weights |= {name % "k": (identity + noise)[:size].clone(), name % "v": (identity + noise)[size:].clone()}
    return weights


def adapting_engine(start_engine: Callable[..., Engine], model: Path) -> tuple[Engine, StepMemory]:
    engine = start_engine(model, max_num_seqs=2)
    memory = step_memory(engine)
    assert memory.adaptation is not None
    return engine, memory


def counts(memory: StepMemory) -> tuple[int, int, int]:
    assert memory.adaptation is not None
    return memory.working_set.num_gathers, memory.adaptation.num_adapted, memory.working_set.num_reuses


def decode_all_from(engine: Engine, position: int) -> None:
    """Until every sequence has computed so many tokens."""
    while any(request.num_computed_tokens < position for request in engine.scheduler.requests.values()):
        engine.step()


def test_chunks_are_adapted_once(start_engine: Callable[..., Engine], checkpoints: Any, tokens: list[int]) -> None:
    model = checkpoints.memlong(**VARIANTS["joint_adapter"])
    engine, memory = adapting_engine(start_engine, model)
    for start in (0, 500):
        engine.add(tokens[start : start + 150], max_tokens=60)
    # From here on everyone decodes; the one that waited longest for its retrievals from its first token.
    decode_all_from(engine, 150)
    gathers, _, reuses = counts(memory)
    reference = Reference(model)
    for output in engine.run().values():
        assert_parity(output, reference, TINY)
    assert counts(memory)[0] - gathers > 3
    assert counts(memory)[2] - reuses > 5 * (counts(memory)[0] - gathers)
    # Each chunk once, whichever retrievals found it, of prefill and of decoding.
    found = {(line["request_id"], chunk) for line in engine.trace() for chunk in line.get("chunk_ids", ())}
    assert counts(memory)[1] == NUM_LAYERS * len(found)
    engine.assert_empty()


@pytest.mark.parametrize("way", ["load_weights", "reload_weights"])
def test_chunks_are_adapted_anew_with_new_weights(
    start_engine: Callable[..., Engine], checkpoints: Any, tokens: list[int], way: str
) -> None:
    """Also if they come in vLLM's own format, which no loader sees."""
    model = checkpoints.memlong(**VARIANTS["joint_adapter"])
    engine, memory = adapting_engine(start_engine, model)
    engine.add(tokens[2000:2150], max_tokens=12)
    decode_all_from(engine, 153)
    weights, before = adapter_weights(model, seed=2), counts(memory)
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    if way == "load_weights":
        runner.get_model().load_weights(weights.items())
    else:
        named = {name.replace(".memory_", ".memory.memory_"): tensor for name, tensor in weights.items()}
        runner.reload_weights(weights_iterator=iter(named.items()), is_checkpoint_format=False)
    engine.step()
    # The retrieval is the one of the step before. The memory layer's adapter is the identity now.
    in_force = len(engine.trace()[-1]["chunk_ids"])
    assert counts(memory) == (before[0] + 1, before[1] + (NUM_LAYERS - 1) * in_force, before[2])
    engine.run()
    reference = Reference(model)
    reference.model.load_state_dict(weights, strict=False)
    (output,) = engine.generate([tokens[3000:3200]], max_tokens=30)
    assert_parity(output, reference, TINY)
    engine.assert_empty()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_least_staging_gives_the_same_answer(
    start_engine: Callable[..., Engine], checkpoints: Any, tokens: list[int], variant: str
) -> None:
    """Prefills of many segments, of which one is gathered at a time, and decoding in batches."""
    model = checkpoints.memlong(**VARIANTS[variant])
    engine = start_engine(model, memlong={"staging_tokens": 32, "bank_device": "cpu"}, max_num_batched_tokens=1024)
    reference = Reference(model)
    for output in engine.generate([tokens[:500], tokens[600:811], tokens[1000:1160]], max_tokens=20):
        assert_parity(output, reference, TINY)
    engine.assert_empty()


def test_bytes_are_known_before_and_loads_work_in_an_engine(
    start_engine: Callable[..., Engine], checkpoints: Any, tokens: list[int], tmp_path: Path
) -> None:
    engine = start_engine(checkpoints.memlong(), memlong={"staging_tokens": 100}, max_num_seqs=5)
    memory = step_memory(engine)
    assert memory.num_bytes() == memory_bytes(engine.llm.llm_engine.vllm_config)
    engine.generate([tokens[:300]], max_tokens=2)
    path = str(tmp_path / "shard")
    memory.stage(StepPlan((), saves=(ChunkSave((2, 0), path),)))
    memory.end_step()
    memory.flush()
    memory.stage(StepPlan((), loads=(ChunkLoad(9, path, 0),)))
    memory.end_step()
    assert torch.equal(memory.bank.keys[:, 9], memory.bank.keys[:, 2])
    assert torch.equal(memory.bank.values[:, 9], memory.bank.values[:, 2])


def test_each_layer_has_rows_of_its_own_if_it_adapts(start_engine: Callable[..., Engine], checkpoints: Any) -> None:
    engine = start_engine(checkpoints.memlong(**VARIANTS["joint_adapter"]), max_num_seqs=5)
    bytes_by_kind = step_memory(engine).num_bytes()
    assert bytes_by_kind == memory_bytes(engine.llm.llm_engine.vllm_config)
    a_set = 2 * 16 * 2 * 2 * 32 * 4
    assert bytes_by_kind["working_set"] == 5 * 3 * a_set
    assert engine.scheduler.memory_stats()["bytes_working_set"] == bytes_by_kind["working_set"]


@pytest.mark.slow
def test_the_v2_runner_with_a_bank_in_host_memory(checkpoints: Any, tmp_path: Path) -> None:
    options = json.dumps({"memlong": {"bank_device": "cpu", "staging_tokens": 32}})
    rows = check(checkpoints.memlong(), tmp_path, "--v2", "--options", options)
    assert rows[-1]["runner"] == "vllm.v1.worker.cpu.model_runner"


def num_pages_in_memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Of the pages that lie wholly in a tensor's storage: how many the system has handed out, and all."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    num_pages = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE
    flags = (ctypes.c_ubyte * num_pages)()
    library = ctypes.CDLL(None, use_errno=True)
    if library.mincore(ctypes.c_void_p(start), ctypes.c_size_t(num_pages * mmap.PAGESIZE), flags) != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(flag & 1 for flag in flags), num_pages


def test_memory_is_taken_at_the_start() -> None:
    """vLLM gives the KV cache what a worker does not have in use by then."""
    bank = MemoryBank(400, 128, 4, 64, torch.float32, torch.device("cpu"))
    memory = StepMemory(bank, 50, 8, 64, 400 * 128, RankHeads(0, 1, 0))
    parts = {"bank": memory.bank, "working_set": memory.working_set, "staging": memory.staging}
    for name, part in parts.items():
        storage = [
            tensor for tensor in vars(part).values() if isinstance(tensor, torch.Tensor) and tensor.nbytes > 1 << 20
        ]
        num_bytes = sum(tensor.nbytes for tensor in storage)
        assert num_bytes == memory.num_bytes()[name]
        assert num_bytes > 80 << 20  # So much that it comes from the system, not from what was freed before.
        for tensor in storage:
            taken, num_pages = num_pages_in_memory(tensor)
            assert taken == num_pages
    taken, num_pages = num_pages_in_memory(torch.empty(32 << 20))
    assert taken < num_pages // 2  # So the system does not hand out everything anyway.
