"""Slots and bytes that a memory takes, by configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memlong_vllm.config import (
    MemoryConfig,
    MemoryConfigError,
    bank_slots,
    max_sequence_slots,
    memory_bytes,
)
from tests.test_config import expect_refusal, hf_config


def sized(**fields: Any) -> MemoryConfig:
    base = {"chunk_size": 10, "memory_size": 100, "local_window": 20, "retrieval_stride": 10, "top_k": 3}
    return MemoryConfig(0, (0,), **{**base, **fields})


@pytest.mark.parametrize(
    ("max_tokens", "max_step_tokens", "fields", "slots"),
    [
        (1, 50, {}, 1),
        (95, 50, {}, 10),
        (1000, 50, {}, 10 + 6),
        (1000, 51, {}, 10 + 7),
        (1000, 50, {"retrieval_stride": 20}, 10 + 6 + 3),
        (180, 50, {"retrieval_stride": 20}, 18),
    ],
    ids=["a token", "part of a chunk", "capacity and a step", "a longer step", "long segments", "never full"],
)
def test_slots_of_a_sequence(max_tokens: int, max_step_tokens: int, fields: dict[str, Any], slots: int) -> None:
    assert max_sequence_slots(sized(**fields), max_tokens, max_step_tokens) == slots


def engine(bank_gib: float, max_num_seqs: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    """What :func:`bank_slots` reads of an engine's configuration, with 2 key-value heads of 8."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=hf_config(retrieval_stride=64),
            max_model_len=10_000,
            dtype=dtype,
            get_num_kv_heads=lambda parallel_config: 2 // parallel_config.tensor_parallel_size,
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=640, max_num_seqs=max_num_seqs),
        additional_config={"memlong": {"bank_gib": bank_gib}},
    )


A_SEQUENCE = 4096 // 64 + 640 // 64 + 1
CHUNK_GIB = 2 * 64 * 2 * 8 * 4 / 2**30  # keys and values, tokens, heads, head size, bytes


def test_the_bank_is_as_large_as_it_may_be() -> None:
    assert bank_slots(engine(CHUNK_GIB * 100.5)) == 100


def test_the_bank_has_no_slot_that_cannot_be_used() -> None:
    # Beside its own, a sequence may hold the sets of a step's ten segments, and of three more.
    assert bank_slots(engine(1.0)) == 4 * (A_SEQUENCE + 13 * 4)
    assert bank_slots(engine(1.0, max_num_seqs=1)) == A_SEQUENCE + 13 * 4


def test_half_the_bytes_make_twice_the_slots() -> None:
    assert bank_slots(engine(CHUNK_GIB * 80, dtype=torch.bfloat16)) == 160
    shared = engine(CHUNK_GIB * 80)
    shared.parallel_config.tensor_parallel_size = 2
    assert bank_slots(shared) == 160


def test_a_bank_too_small_for_one_sequence_is_refused() -> None:
    assert bank_slots(engine(CHUNK_GIB * A_SEQUENCE)) == A_SEQUENCE
    size = CHUNK_GIB * (A_SEQUENCE - 0.5)
    with pytest.raises(MemoryConfigError, match=r"max_model_len \(10000\) may need 0\.00 GiB") as raised:
        bank_slots(engine(size))
    expect_refusal(raised.value, "bank_gib", size)


def test_bytes_are_those_of_slots_rows_and_staging() -> None:
    token = 2 * 2 * 8 * 4
    config = engine(CHUNK_GIB * 100.5, max_num_seqs=3)
    # Three sequences, and for each a set of every layer.
    rows = 3 * 4 * 256
    # A token's place, row and position, its span, and the slots of four chunks.
    buffers = 640 * (3 * 8 + 5 * 4 + 4 * 8)
    kept = {"bank": 6400 * token, "working_set": rows * token, "staging": 8192 * token}
    # Of four layers, and of no more chunks than the bank has.
    kept |= {"adapted": 4 * 6400 * token}
    assert memory_bytes(config) == kept | {"step_buffers": buffers}
    config.additional_config["memlong"] |= {"top_k": 200}
    assert memory_bytes(config)["staging"] == 12_800 * token
    assert memory_bytes(config)["step_buffers"] == buffers + 640 * 196 * 8
    config.additional_config["memlong"] |= {"top_k": 4, "staging_tokens": 256}
    assert memory_bytes(config)["staging"] == 256 * token
    config.additional_config["memlong"] |= {"adapted_tokens": 1300}
    assert memory_bytes(config)["adapted"] == 4 * 20 * 64 * token
    config.additional_config["memlong"] |= {"memory_adapter": None, "memory_adapter_width": 1}
    assert memory_bytes(config)["working_set"] == 3 * 256 * token
    assert memory_bytes(config)["adapted"] == 0
