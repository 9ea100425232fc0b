"""Chunks that leave the bank for shards and come back, through real files."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from memlong_vllm.memories.shards import ShardReader, shard_file, write_shard
from memlong_vllm.plan import ChunkLoad, ChunkSave, StepPlan
from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.step_memory import StepMemory
from memlong_vllm.worker.transfer import MAX_WAITING_SAVES, RankHeads
from tests.test_working_set import begin, counters, decoding, expect

SLOTS, CHUNK, SIZE = 12, 2, 3


def make_memory(heads: int = 2, rank: RankHeads | None = None, dtype: torch.dtype = torch.float32) -> StepMemory:
    """A bank of random numbers and staging for two chunks."""
    bank = MemoryBank(SLOTS, CHUNK, heads, SIZE, dtype, torch.device("cpu"))
    bank.keys.copy_(torch.rand(bank.keys.shape))
    bank.values.copy_(torch.rand(bank.values.shape))
    return StepMemory(bank, 2, 2, 64, 2 * CHUNK, rank or RankHeads(0, 1, 0))


def save(memory: StepMemory, path: Path, *slots: int) -> None:
    memory.stage(StepPlan((), saves=(ChunkSave(slots, str(path)),)))
    memory.end_step()


def load(memory: StepMemory, path: Path, slots_and_rows: dict[int, int]) -> None:
    memory.stage(StepPlan((), loads=tuple(ChunkLoad(slot, str(path), row) for slot, row in slots_and_rows.items())))
    memory.end_step()


def chunk(memory: StepMemory, slot: int) -> torch.Tensor:
    """[2, heads, CHUNK, SIZE]."""
    return torch.stack((memory.bank.keys[:, slot], memory.bank.values[:, slot]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_come_back_as_they_left(tmp_path: Path, dtype: torch.dtype) -> None:
    """More of them than staging holds, in another order and into another engine's bank."""
    first, second = make_memory(dtype=dtype), make_memory(dtype=dtype)
    save(first, tmp_path / "a", 7, 2, 9, 4, 1)
    first.flush()
    before = {slot: chunk(second, slot) for slot in range(SLOTS)}
    load(second, tmp_path / "a", {0: 4, 3: 1, 11: 0, 5: 2, 6: 3})
    for slot, origin in {0: 1, 3: 2, 11: 7, 5: 9, 6: 4}.items():
        assert torch.equal(chunk(second, slot), chunk(first, origin))
    for slot in {1, 2, 4, 7, 8, 9, 10}:
        assert torch.equal(chunk(second, slot), before[slot])


def test_ranks_share_shards_in_any_number(tmp_path: Path) -> None:
    """Two ranks write; one of all heads, and four of half as many, read."""
    whole = make_memory(heads=4)
    for rank in range(2):
        part = make_memory(rank=RankHeads(rank, 2, 2 * rank))
        part.bank.keys.copy_(whole.bank.keys[2 * rank : 2 * rank + 2])
        part.bank.values.copy_(whole.bank.values[2 * rank : 2 * rank + 2])
        save(part, tmp_path / "a", 5, 6)
        part.flush()
    alone = make_memory(heads=4)
    load(alone, tmp_path / "a", {1: 1})
    assert torch.equal(chunk(alone, 1), chunk(whole, 6))
    for rank in range(4):
        quarter = make_memory(heads=1, rank=RankHeads(rank, 4, rank))
        load(quarter, tmp_path / "a", {1: 0})
        assert torch.equal(chunk(quarter, 1), chunk(whole, 5)[:, rank : rank + 1])


def test_loaded_chunks_are_there_for_the_first_token(tmp_path: Path) -> None:
    kv = torch.rand(2, 2, 2, CHUNK, SIZE)
    write_shard(str(tmp_path / "a"), 0, 1, 0, kv)
    memory = make_memory()
    plan = StepPlan((), loads=(ChunkLoad(3, str(tmp_path / "a"), 0), ChunkLoad(8, str(tmp_path / "a"), 1)))
    memory.stage(plan)
    (group,) = begin(memory, decoding("a", 9, (3, 8), 1))
    assert counters(memory) == (1, 0)
    expect(memory, group, (3, 8))
    assert torch.equal(memory.read(group.source, 0)[0][0], kv[:, 0].transpose(0, 1).flatten(1, 2))


def test_a_save_is_of_the_end_of_its_step(tmp_path: Path) -> None:
    """What the step writes is in it; what the next steps write is not."""
    memory = make_memory()
    memory.stage(StepPlan((), saves=(ChunkSave((4,), str(tmp_path / "a")),)))
    memory.bank.keys[:, 4] = 5
    kept = chunk(memory, 4)
    memory.end_step()
    memory.bank.keys[:, 4] = -1
    memory.flush()
    assert torch.equal(ShardReader().read(str(tmp_path / "a"), 0, 0, 2), kept)


def test_many_saves_wait_for_the_disk(tmp_path: Path) -> None:
    memory = make_memory()
    for i in range(3 * MAX_WAITING_SAVES):
        save(memory, tmp_path / str(i), i % SLOTS)
    memory.flush()
    reader = ShardReader()
    for i in range(3 * MAX_WAITING_SAVES):
        assert torch.equal(reader.read(str(tmp_path / str(i)), 0, 0, 2), chunk(memory, i % SLOTS))


def test_a_step_that_failed_saves_nothing(tmp_path: Path) -> None:
    memory = make_memory()
    memory.stage(StepPlan((), saves=(ChunkSave((4,), str(tmp_path / "a")),)))
    memory.abandon_step()
    memory.end_step()
    memory.flush()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "cut short", "other heads", "other chunk size", "no such row"])
def test_what_cannot_be_loaded_becomes_zeros(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a"
    shape = (1, 2, 1 if damage == "other heads" else 2, 3 if damage == "other chunk size" else CHUNK, SIZE)
    write_shard(str(path), 0, 1, 0, torch.rand(shape))
    write_shard(str(tmp_path / "good"), 0, 1, 0, torch.ones(1, 2, 2, CHUNK, SIZE))
    file = Path(shard_file(str(path), 0, 1))
    if damage == "missing":
        file.unlink()
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-7])
    memory = make_memory()
    row = 3 if damage == "no such row" else 0
    with caplog.at_level(logging.ERROR):
        memory.stage(StepPlan((), loads=(ChunkLoad(3, str(path), row), ChunkLoad(4, str(tmp_path / "good"), 0))))
    assert not chunk(memory, 3).any()
    assert torch.equal(chunk(memory, 4), torch.ones(2, 2, CHUNK, SIZE))
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


def test_what_cannot_be_saved_stays_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = make_memory()
    with caplog.at_level(logging.ERROR):
        save(memory, tmp_path / "no folder" / "a", 1)
        save(memory, tmp_path / "b", 2)
        memory.flush()
    assert [str(tmp_path / "no folder" / "a") in record.getMessage() for record in caplog.records] == [True]
    assert [path.name for path in tmp_path.iterdir()] == [Path(shard_file("b", 0, 1)).name]
