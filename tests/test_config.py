"""Validation and composition of all configuration."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from memlong_vllm.config import (
    DeploymentConfig,
    MemLongConfig,
    MemoryConfig,
    MemoryConfigError,
    RetrieverConfig,
    resolve,
)

NUM_LAYERS = 26
BLOCK: dict[str, Any] = {
    "memory_layer": 12,
    "retrieval_layers": [13, 17, 21, 25],
    "chunk_size": 64,
    "top_k": 4,
    "memory_size": 4096,
    "local_window": 1024,
    "retrieval_stride": 128,
    "query_tokens": 100,
    "prompt_query_tokens": 24,
    "query_scope": "current",
    "fusion": "joint",
    "memory_softmax": "all",
    "memory_bias": True,
    "memory_adapter": "linear",
    "memory_adapter_width": 3,
    "retriever": {"model": "some/model", "pooling": "mean", "max_length": 256, "query_instruction": "find: "},
}
REQUIRED = {"memory_layer": 12, "retrieval_layers": [13, 17, 21, 25]}


def hf_config(**block: Any) -> MemLongConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return MemLongConfig(num_hidden_layers=NUM_LAYERS, vocab_size=10, memlong={**BLOCK, **block}, **sizes)


def expect_refusal(error: MemoryConfigError, name: str, value: object) -> None:
    named, _, rule = str(error).partition(f"memlong.{name} = {value!r}: ")
    assert not named
    assert len(rule.split()) > 1


# The checkpoint's block.

NOT_COUNTS = (0, -1, 1.0, "8", None, True)
COUNTS = ("chunk_size", "top_k", "memory_size", "local_window", "retrieval_stride", "query_tokens")
BAD_FIELDS = [
    *((name, value) for name in COUNTS for value in NOT_COUNTS if (name, value) != ("memory_size", 0)),
    *((name, 1000) for name in ("memory_size", "local_window", "retrieval_stride")),
    ("local_window", 64),
    *(("prompt_query_tokens", value) for value in (0, -1, 1.0, "8", True)),
    *(("memory_layer", value) for value in (-1, 1.0, "12", None, True)),
    *(("retrieval_layers", value) for value in ([], [13.0], ["13"], [True], "13", 13, None)),
    *(("retrieval_layers", value) for value in ([17, 13], [13, 13], [11, 13], [-1, 13], [13, 26])),
    *(("query_scope", value) for value in ("all", "", None, 1)),
    *(("fusion", value) for value in ("sum", "", None, False)),
    *(("memory_softmax", value) for value in ("token", None, True)),
    *(("memory_bias", value) for value in ("true", None, 2, 1, 0.0)),
    *(("memory_adapter", value) for value in ("lora", "", False)),
    *(("memory_adapter_width", value) for value in (0, 65, -1, 2.0, "2", None, True)),
    ("retriever", None),
    ("retriever", "BAAI/bge-m3"),
    ("retriever", ["BAAI/bge-m3"]),
    ("unknown_field", 1),
]
BAD_RETRIEVER_FIELDS = [
    *(("model", value) for value in ("", None, 3)),
    *(("pooling", value) for value in ("max", "", None)),
    *(("max_length", value) for value in NOT_COUNTS),
    *(("query_instruction", value) for value in (3, False, ["find"])),
    ("device", "cpu"),
]


def as_held(name: str, value: object) -> object:
    """Lists of layers are held, and shown where they are wrong, as tuples."""
    is_checked_late = name == "retrieval_layers" and isinstance(value, list) and value != [13, 26]
    return tuple(value) if is_checked_late else value  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_a_bad_field_is_named_with_its_value(name: str, value: object) -> None:
    with pytest.raises(MemoryConfigError) as raised:
        MemoryConfig.from_dict({**BLOCK, name: value}, NUM_LAYERS)
    expect_refusal(raised.value, name, as_held(name, value))


@pytest.mark.parametrize(("name", "value"), BAD_RETRIEVER_FIELDS)
def test_a_bad_retriever_field_is_named_with_its_value(name: str, value: object) -> None:
    with pytest.raises(MemoryConfigError) as raised:
        MemoryConfig.from_dict({**BLOCK, "retriever": {**BLOCK["retriever"], name: value}}, NUM_LAYERS)
    expect_refusal(raised.value, f"retriever.{name}", value)


@pytest.mark.parametrize("name", REQUIRED)
def test_layers_have_no_default(name: str) -> None:
    with pytest.raises(MemoryConfigError, match=rf"memlong\.{name} = None: is required"):
        MemoryConfig.from_dict({key: value for key, value in BLOCK.items() if key != name}, NUM_LAYERS)


def test_only_an_adapter_has_a_width() -> None:
    with pytest.raises(MemoryConfigError, match=r"memlong\.memory_adapter_width = 3: .*memory_adapter is null"):
        MemoryConfig.from_dict({**BLOCK, "memory_adapter": None}, NUM_LAYERS)
    assert MemoryConfig.from_dict(REQUIRED, NUM_LAYERS).memory_adapter_width == 1


@pytest.mark.parametrize("fusion", ["joint", "scaled_logits"])
def test_softmax_per_chunk_goes_with_gated_only(fusion: str) -> None:
    with pytest.raises(MemoryConfigError, match=rf"memlong\.memory_softmax = 'chunk': .*'gated' only, not '{fusion}'"):
        MemoryConfig.from_dict({**BLOCK, "fusion": fusion, "memory_softmax": "chunk"}, NUM_LAYERS)
    config = MemoryConfig.from_dict({**BLOCK, "fusion": "gated", "memory_softmax": "chunk"}, NUM_LAYERS)
    assert config.memory_softmax == "chunk"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("memory_size", 100, "multiple of chunk_size (64)"),
        ("local_window", 64, "at least retrieval_stride (128)"),
        ("retrieval_layers", [3], "memory_layer (12)"),
        ("retrieval_layers", [13, 26], "layers 0 to 25"),
        ("unknown_field", 1, "unknown field; known are ['chunk_size', 'fusion',"),
    ],
)
def test_rules_say_what_would_be_right(name: str, value: object, rule: str) -> None:
    with pytest.raises(MemoryConfigError) as raised:
        MemoryConfig.from_dict({**BLOCK, name: value}, NUM_LAYERS)
    assert rule in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"retrieval_layers": [12, 25]},
        {"local_window": 128},
        {"memory_layer": 0, "retrieval_layers": [0]},
        {
            "chunk_size": 1,
            "memory_adapter_width": 1,
            "memory_size": 1,
            "local_window": 1,
            "retrieval_stride": 1,
            "query_tokens": 1,
            "top_k": 1,
        },
        {"memory_size": 0},
        {"retriever": {}},
        {"retriever": {"query_instruction": ""}},
    ],
)
def test_the_edges_of_what_is_allowed(change: dict[str, Any]) -> None:
    config = MemoryConfig.from_dict({**BLOCK, **change}, NUM_LAYERS)
    written = config.to_dict()
    assert {name: written[name] for name in change if name != "retriever"} == {
        name: value for name, value in change.items() if name != "retriever"
    }


def test_defaults_are_those_of_the_paper() -> None:
    config = MemoryConfig.from_dict(REQUIRED, NUM_LAYERS)
    assert config == MemoryConfig(12, (13, 17, 21, 25))
    assert (config.chunk_size, config.top_k, config.memory_size, config.local_window) == (128, 8, 32768, 2048)
    assert (config.retrieval_stride, config.query_tokens, config.query_scope) == (128, 128, "preceding")
    assert (config.fusion, config.memory_softmax, config.memory_bias, config.memory_adapter) == (
        "gated",
        "all",
        False,
        None,
    )
    assert config.retriever == RetrieverConfig("BAAI/bge-m3", "cls", 512, None)
    assert config.capacity == 256


def test_a_block_survives_json() -> None:
    config = MemoryConfig.from_dict(BLOCK, NUM_LAYERS)
    written = json.loads(json.dumps(config.to_dict()))
    assert written == BLOCK
    assert MemoryConfig.from_dict(written, NUM_LAYERS) == config
    assert set(BLOCK) == {f.name for f in dataclasses.fields(MemoryConfig)}, "the block above must name every field"


def test_configurations_do_not_change() -> None:
    config = MemoryConfig.from_dict(BLOCK, NUM_LAYERS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 1  # type: ignore[misc]


def test_from_dict_leaves_its_argument_alone() -> None:
    block = json.loads(json.dumps(BLOCK))
    MemoryConfig.from_dict(block, NUM_LAYERS)
    assert block == BLOCK


def test_the_model_configuration_survives_saving(tmp_path: Any) -> None:
    saved = hf_config()
    saved.save_pretrained(tmp_path)
    loaded = MemLongConfig.from_pretrained(tmp_path)
    assert loaded.memlong == BLOCK
    assert loaded.memory == MemoryConfig.from_dict(BLOCK, NUM_LAYERS)


def test_the_model_configuration_checks_layers_against_its_depth() -> None:
    with pytest.raises(MemoryConfigError, match=r"memlong\.retrieval_layers = \[13, 26\]"):
        _ = hf_config(retrieval_layers=[13, 26]).memory


def test_a_model_configuration_without_a_block_says_how_to_get_one() -> None:
    with pytest.raises(ValueError, match="memlong-vllm convert"):
        _ = MemLongConfig().memory


# The deployment's.

BAD_DEPLOYMENT_FIELDS = [
    *(("bank_gib", value) for value in (0, -1.5, "4", None, True, math.inf, math.nan)),
    *(("bank_device", value) for value in ("cuda", "", None, 1, ["cpu"])),
    *(("retriever_cache_size", value) for value in NOT_COUNTS),
    *(
        (name, value)
        for name in ("retriever_batch_size", "staging_tokens", "adapted_tokens", "max_memory_size", "max_top_k")
        for value in NOT_COUNTS
        if value is not None
    ),
    *(("memory_quota_names", value) for value in NOT_COUNTS if value is not None),
    *(("retriever_device", value) for value in (None, 0)),
    *(("memory_quota_gib", value) for value in (0, -1.5, "4", True, math.inf, math.nan)),
    *(
        (name, value)
        for name in ("trace_file", "retriever_path", "memory_dir", "tenant_header", "tenant_keys")
        for value in (3, False, ["a"])
    ),
]


@pytest.mark.parametrize(("name", "value"), BAD_DEPLOYMENT_FIELDS)
def test_a_bad_deployment_field_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(MemoryConfigError) as direct:
        DeploymentConfig(**{name: value})
    expect_refusal(direct.value, name, value)
    with pytest.raises(MemoryConfigError) as resolved:
        resolve(hf_config(), {"memlong": {name: value}})
    assert str(resolved.value) == str(direct.value)


@pytest.mark.parametrize("additional", [{}, {"memlong": None}, {"memlong": {}}, {"other": {"top_k": 1}}])
def test_nothing_to_override(additional: dict[str, Any]) -> None:
    assert resolve(hf_config(), additional) == (MemoryConfig.from_dict(BLOCK, NUM_LAYERS), DeploymentConfig())


def test_deployment_fields_and_overrides_stand_side_by_side() -> None:
    own = {
        "bank_gib": 2,
        "bank_device": "cpu",
        "staging_tokens": 10_000,
        "adapted_tokens": 20_000,
        "retriever_path": "/models/own",
        "retriever_device": "cuda:1",
        "retriever_batch_size": 16,
        "retriever_cache_size": 10,
        "trace_file": "trace.jsonl",
        "max_memory_size": 8192,
        "max_top_k": 9,
        "memory_dir": "/memories",
        "memory_quota_gib": 1.5,
        "memory_quota_names": 7,
        "tenant_header": "X-Tenant",
        "tenant_keys": "keys.json",
    }
    memory, deployment = resolve(hf_config(), {"memlong": {**own, "top_k": 7, "retrieval_layers": [14]}})
    assert dataclasses.asdict(deployment) == own
    expected = MemoryConfig.from_dict({**BLOCK, "top_k": 7, "retrieval_layers": [14]}, NUM_LAYERS)
    retriever = dataclasses.replace(expected.retriever, model="/models/own")
    assert memory == dataclasses.replace(expected, retriever=retriever)


def test_part_of_the_retriever_overrides_part() -> None:
    memory, _ = resolve(hf_config(), {"memlong": {"retriever": {"max_length": 99}}})
    assert memory.retriever == RetrieverConfig("some/model", "mean", 99, "find: ")


def test_the_retriever_path_wins_over_an_override() -> None:
    additional = {"memlong": {"retriever": {"model": "a", "pooling": "cls"}, "retriever_path": "b"}}
    memory, _ = resolve(hf_config(), additional)
    assert memory.retriever == RetrieverConfig("b", "cls", 256, "find: ")


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"top_k": 0}, "top_k", 0),
        ({"chunk_size": 48}, "memory_size", 4096),
        ({"bank_gb": 4}, "bank_gb", 4),
        ({"retriever": {"modle": "a"}}, "retriever.modle", "a"),
        ({"retriever": "a"}, "retriever", "a"),
        ({"retriever": "a", "retriever_path": "b"}, "retriever", "a"),
        ({"retrieval_stride": 2048}, "local_window", 1024),
        ({"staging_tokens": 4 * 64 - 1}, "staging_tokens", 255),
        ({"staging_tokens": 512, "top_k": 9}, "staging_tokens", 512),
        ({"adapted_tokens": 8191}, "adapted_tokens", 8191),
        ({"staging_tokens": 512, "adapted_tokens": 511}, "adapted_tokens", 511),
        ({"retriever_path": ""}, "retriever.model", ""),
        ({"retrieval_layers": [26]}, "retrieval_layers", [26]),
    ],
)
def test_overrides_are_validated(settings: dict[str, Any], name: str, value: object) -> None:
    with pytest.raises(MemoryConfigError) as raised:
        resolve(hf_config(), {"memlong": settings})
    expect_refusal(raised.value, name, value)


@pytest.mark.parametrize("entry", ["top_k=1", ["top_k"], 3])
def test_the_entry_must_be_an_object(entry: object) -> None:
    with pytest.raises(MemoryConfigError) as raised:
        resolve(hf_config(), {"memlong": entry})
    expect_refusal(raised.value, "additional_config", entry)


def test_resolve_changes_neither_checkpoint_nor_settings() -> None:
    config, additional = hf_config(), {"memlong": {"retriever": {"max_length": 9}, "retriever_path": "b", "top_k": 1}}
    before = json.dumps(additional)
    resolve(config, additional)
    assert config.memlong == BLOCK
    assert json.dumps(additional) == before
