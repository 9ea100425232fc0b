"""Where keys and values are kept changes no result: bank in host memory, working set, staging."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memlong_vllm.config import memory_bytes
from memlong_vllm.plan import ChunkLoad, ChunkSave, StepPlan
from memlong_vllm.worker.step_memory import StepMemory
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bank_may_be_in_host_memory(
    start_engine: Callable[..., Engine], checkpoints: Any, tokens: list[int], variant: str
) -> None:
    """Not one bit differs; and it is the reference's answer, alone and in batches."""
    model = checkpoints.memlong(**VARIANTS[variant])
    prompts = [tokens[:211], tokens[300:390], tokens[900:1301]]
    expected = one_after_the_other(start_engine(model), prompts)
    engine = start_engine(model, memlong={"bank_device": "cpu"})
    for (ids, logprobs), (expected_ids, expected_logprobs) in zip(
        one_after_the_other(engine, prompts), expected, strict=True
    ):
        assert ids == expected_ids
        assert torch.equal(logprobs, expected_logprobs)
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


@pytest.mark.slow
def test_the_v2_runner_with_a_bank_in_host_memory(checkpoints: Any, tmp_path: Path) -> None:
    options = json.dumps({"memlong": {"bank_device": "cpu", "staging_tokens": 32}})
    rows = check(checkpoints.memlong(), tmp_path, "--v2", "--options", options)
    assert rows[-1]["runner"] == "vllm.v1.worker.cpu.model_runner"
