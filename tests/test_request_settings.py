"""What a request may ask of its memory."""

from __future__ import annotations

from typing import Any

import pytest

from memlong_vllm.config import DeploymentConfig, MemoryConfig, MemoryConfigError, request_limits
from memlong_vllm.request_settings import RequestSettings, RequestSettingsError

CONFIG = MemoryConfig(12, (13, 17), chunk_size=64, top_k=4, memory_size=4096, local_window=1024, retrieval_stride=64)
LIMITS = request_limits(CONFIG, DeploymentConfig(max_memory_size=8192, max_top_k=16))


def parse(**extra_args: Any) -> RequestSettings:
    return RequestSettings.from_extra_args(extra_args, LIMITS)


def test_nothing_asked_changes_nothing() -> None:
    for extra_args in (None, {}, {"kv_transfer_params": {}, "someone_elses": 3}):
        settings = RequestSettings.from_extra_args(extra_args, LIMITS)
        assert settings == RequestSettings()
        assert settings.apply(CONFIG) == CONFIG
        assert settings.salt("salt", "") == "salt"
        assert settings.salt(None, "") is None


def test_all_of_it() -> None:
    settings = parse(memory_size=8192, top_k=16, memory_read=["a", "b.c"], memory_write="d-1")
    assert settings == RequestSettings(8192, 16, ("a", "b.c"), "d-1")
    changed = settings.apply(CONFIG)
    assert (changed.memory_size, changed.top_k, changed.chunk_size) == (8192, 16, 64)
    assert parse(memory_read="one").memory_read == ("one",)
    assert parse(memory_size=0).apply(CONFIG).capacity == 0


BAD = [
    {"memory_size": 8256},
    {"memory_size": 100},
    {"memory_size": -64},
    {"memory_size": True},
    {"memory_size": 64.0},
    {"memory_size": "64"},
    {"memory_size": 10**400},
    {"top_k": 0},
    {"top_k": 17},
    {"top_k": None, "memory_read": ["../x"]},
    {"top_k": [1]},
    {"memory_read": ["a", "a"]},
    {"memory_read": [["a"]]},
    {"memory_read": [3]},
    {"memory_read": 3},
    {"memory_read": {"a": 1, "b/c": 2}},
    {"memory_read": ["a" * 65]},
    {"memory_write": ""},
    {"memory_write": ["a"]},
    {"memory_write": "a/b"},
    {"memory_write": "..a"},
    {"memory_write": "a\0"},
    {"memory_raed": "a"},
    {"memlong": {}},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_values_are_refused_and_named(bad: dict[str, Any]) -> None:
    with pytest.raises(RequestSettingsError) as raised:
        parse(**bad)
    assert any(name in str(raised.value) for name in bad)


def test_salts_tell_apart_what_is_computed_differently() -> None:
    cases = [
        parse().salt(None, "x"),
        parse().salt("s", "x"),
        parse(top_k=2).salt(None, "x"),
        parse(top_k=2).salt("s", "x"),
        parse(memory_size=64).salt(None, "x"),
        parse(memory_read="a").salt(None, "x", ("v1",)),
        parse(memory_read="a").salt(None, "x", ("v2",)),
        parse(memory_read=["a", "b"]).salt(None, "x", ("v1", "v2")),
        parse(memory_read=["b", "a"]).salt(None, "x", ("v2", "v1")),
        parse(memory_read="a", top_k=2).salt(None, "x", ("v1",)),
    ]
    assert len(set(cases)) == len(cases)
    assert parse(memory_write="a").salt("s", "x") == "s"


def test_a_salt_with_settings_cannot_be_sent_by_a_client() -> None:
    settings = parse(top_k=2)
    assert settings.salt(None, "secret") not in (settings.salt(None, ""), settings.salt(None, "guess"))


@pytest.mark.parametrize("limits", [{"max_memory_size": 64}, {"max_top_k": 3}])
def test_limits_below_the_default_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(MemoryConfigError, match=next(iter(limits))):
        request_limits(CONFIG, DeploymentConfig(**limits))
