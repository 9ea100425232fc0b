"""``memlong-vllm plan``: which models it reads, what it prints, what it refuses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from memlong_vllm.cli import main
from memlong_vllm.config import GIB
from tests.checkpoints import Checkpoints

VARIANTS = [
    "full attention",
    "full attention, fp8 KV",
    "window alone",
    "MemLong, bank on device",
    "MemLong, bank on host",
]


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["memlong-vllm", "plan", *map(str, arguments)])
    return main.main()


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> dict[str, Any]:
        assert plan(monkeypatch, *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("name", ["openllama-3b", "llama-3-8b"])
def test_a_known_shape_needs_no_files(planned: Any, name: str) -> None:
    found = planned("--model", name, "--context", 80_000)
    assert [variant["name"] for variant in found["variants"]] == VARIANTS
    assert found["setup"]["context"] == 80_000
    assert found["setup"]["card_bytes"] == 24 * GIB
    assert found["model"]["memory_parameters"] == 32 * len(found["model"]["memlong"]["retrieval_layers"])


def test_a_checkpoint_brings_its_own_memory(planned: Any, checkpoints: Checkpoints) -> None:
    model = checkpoints.memlong(retrieval_layers=[2, 3])
    options = ("--context", 4096, "--dtype", "float32", "--card-gib", 1, "--reserve-gib", 0.1)
    found = planned("--model", model, *options)
    assert found["model"]["memlong"]["retrieval_layers"] == [2, 3]
    assert found["setup"]["embedding_dimension"] == 384
    assert found["setup"]["reserve_bytes"] == int(0.1 * GIB)
    assert found == planned("--model", model / "config.json", "--embedding-dimension", 384, *options)
    changed = planned("--model", model, "--set", "memory_size=1024", *options)
    assert changed["model"]["memlong"]["memory_size"] == 1024


def test_a_plain_llama_takes_a_preset(planned: Any, checkpoints: Checkpoints) -> None:
    model = checkpoints.base(max_position_embeddings=2048)
    found = planned("--model", model, "--context", 4096, "--preset", "released", "--set", "top_k=3")
    assert (found["model"]["memlong"]["fusion"], found["model"]["memlong"]["top_k"]) == ("joint", 3)


def test_the_table_has_every_variant_and_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", "openllama-3b", "--context", 80_000, "--set", "memory_size=81920", "--kv-head-dim", 100)
    assert plan(monkeypatch, *options) == 0
    table = capsys.readouterr().out
    rows = {line[:18].strip(): re.split(r"\s{2,}", line[18:].strip()) for line in table.splitlines()}
    assert rows["KV in decode"][0] == "24.80 GiB"
    assert rows["working set"][-2:] != rows["bank"][-2:]
    assert all(len(rows[name]) == 5 for name in ("KV in prefill", "weights", "KV cache", "sequences at once"))
    assert rows["limited by"] == ["card"] * 5
    assert max(len(line) for line in table.splitlines()) <= 130
    advice = re.findall(r"--max-num-seqs (\d+) --additional-config '(.*)'", table)
    settings = [json.loads(text)["memlong"] for _, text in advice]
    places = [(int(number), setting["bank_device"]) for (number, _), setting in zip(advice, settings, strict=True)]
    assert places == [
        (int(rows["sequences at once"][3]), "device"),
        (int(rows["sequences at once"][4]), "cpu"),
    ]
    for (number, _), setting in zip(places, settings, strict=True):
        least = number * 625 * 128 * 2 * 3200 * 2 / GIB
        assert least <= setting["bank_gib"] <= least + 0.001


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, (), "no folder with a config.json, and none of openllama-3b, llama-3-8b"),
        ("nonsense", (), "no folder with a config.json"),
        ('{"model_type": "gpt2"}', (), "model_type must be one of memlong, llama"),
        ("[]", (), "model_type must be one of"),
        ('{"model_type": "memlong"}', (), "no 'memlong' block"),
        ('{"model_type": "llama", "hidden_size": "big"}', (), "hidden_size"),
        ('{"model_type": "llama"}', ("--set", "top_k=0"), "memlong.top_k = 0"),
        ('{"model_type": "llama"}', ("--set", "retriever.model=own/one"), "give --embedding-dimension"),
        ('{"model_type": "llama"}', ("--context", 0), "context = 0 must be positive"),
        ('{"model_type": "llama"}', ("--tensor-parallel-size", 5), "cannot be split over 5 ranks"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: str | None,
    options: tuple[object, ...],
    message: str,
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert plan(monkeypatch, "--model", tmp_path, "--context", 4096, *options) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("memlong-vllm plan: ")
    assert message in errors
    assert len(errors.splitlines()) == 1
