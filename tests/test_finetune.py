"""Fine-tuning runs over a tiny checkpoint: what they learn, keep, repeat and refuse."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from memlong_vllm.adapters.adapter_file import load_adapter
from memlong_vllm.conversion import convert
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from memlong_vllm.reference.retrieval import SequenceMemory
from memlong_vllm.training.documents import TextsError
from memlong_vllm.training.features import FrozenHalf, least_tokens
from memlong_vllm.training.finetune import finetune
from memlong_vllm.training.job import FinetuneJob
from memlong_vllm.training.settings import PRESETS, FinetuneSettings, with_overrides
from memlong_vllm.training.trainable import SettingsError, TrainedParts, select_trained
from memlong_vllm.training.trainer import DivergedError, learning_rate_factor
from tests.checkpoints import Checkpoints
from tests.engines import Reference
from tests.training_run import JOINT, SETTINGS, documents, log_of, train


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


def test_the_merged_adapter_is_the_model_that_was_validated(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path
) -> None:
    """Trainer, adapter file, conversion and reference agree on the likelihood of a text."""
    folder, output = checkpoints.memlong(gates=0.0, **JOINT), tmp_path / "adapter.safetensors"
    adapter = train(folder, output, tokens, cache, steps=6, calibrate_tokens=256, bias_start=-0.5)
    best = min((entry for entry in log_of(output) if "validation" in entry), key=lambda e: e["validation"]["nll"])
    assert adapter.training["step"] == best["step"]
    merged = tmp_path / "merged"
    convert(checkpoints.base(), merged, adapter=load_adapter(output), max_length=32768)
    reference, valid = Reference(merged), documents(tokens, (400, 330, 270, 300))[-1]
    # Validation reads whole segments and counts what could be retrieved for.
    first, last = 64, 256
    for with_memory, key in ((True, "nll"), (False, "nll_without_memory")):
        found = -reference.logprobs(list(valid.token_ids[: last + 1]), None, with_memory=with_memory)[first:last].mean()
        assert best["validation"][key] == pytest.approx(float(found), abs=2e-3)  # The file holds bfloat16.
    assert best["validation"]["nll"] != pytest.approx(best["validation"]["nll_without_memory"], abs=1e-2)


def test_loss_falls_and_only_the_upper_half_learns(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.safetensors"
    adapter = train(checkpoints.memlong(), output, tokens, cache, steps=30, validate_every=10)
    losses = [entry["loss"] for entry in log_of(output) if "loss" in entry]
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    layers = {int(name.split(".")[2]) for name in adapter.tensors}
    assert layers == {1, 2, 3, 4}
    assert "model.layers.1.self_attn.q_proj.lora_A" in adapter.tensors
    assert not any(
        name.startswith(("model.layers.1.self_attn.k_", "model.layers.1.self_attn.v_")) for name in adapter.tensors
    )
    assert "model.layers.4.self_attn.memory_gate" in adapter.tensors
    assert adapter.digest() == load_adapter(output).digest()


def test_each_part_learns_at_its_own_rate(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path
) -> None:
    """Adam moves a number by about the rate in a step. The first step reads nothing yet."""
    rates = {"learning_rate": 1e-3, "memory_learning_rate": 1e-2, "adapter_learning_rate": 1e-5, "warmup_steps": 0}
    folder = checkpoints.memlong(gates=0.0, **JOINT)
    adapter = train(folder, tmp_path / "a.safetensors", tokens, cache, steps=4, validate_every=0, **rates)
    moved = {
        kind: max(
            float((tensor.float() - torch.eye(*tensor.shape) if kind == "k_adapter" else tensor).abs().max())
            for name, tensor in adapter.tensors.items()
            if name.endswith(kind) and not (kind == "k_adapter" and ".1." in name)
        )
        for kind in ("lora_B", "memory_bias", "k_adapter")
    }
    for kind, rate in (("lora_B", 1e-3), ("memory_bias", 1e-1), ("k_adapter", 1e-5)):
        assert rate <= moved[kind] * 1.01 <= 4.1 * rate, kind


@pytest.mark.parametrize(("window", "stride"), [(64, 16), (64, 32), (48, 48)])
def test_how_long_a_text_must_be(checkpoints: Checkpoints, tokens: list[int], window: int, stride: int) -> None:
    """Exactly as long as the reference needs to retrieve something."""
    memory = MemLongForCausalLM.config_class.from_pretrained(checkpoints.memlong()).memory
    memory = replace(memory, local_window=window, retrieval_stride=stride, query_tokens=16)
    least = least_tokens(memory)
    spans = SequenceMemory(memory, lambda ids: torch.ones(4)).extend(tokens[:least])
    assert [(span.start, span.end) for span in spans] == [(least - stride, least)]


def test_features_that_are_not_kept_are_the_same(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 6, "calibrate_tokens": 2048, "bias_start": -0.5}
    folder = checkpoints.memlong(gates=0.0, **JOINT)
    kept = train(folder, tmp_path / "kept.safetensors", tokens, cache, **options)
    empty, made_of, run_lower = tmp_path / "cache", [], FrozenHalf._run_lower
    monkeypatch.setattr(FrozenHalf, "_run_lower", lambda half, ids: made_of.append(len(ids)) or run_lower(half, ids))
    made = train(folder, tmp_path / "made.safetensors", tokens, empty, keep_features=False, **options)
    assert not empty.exists()
    # To calibrate, to validate, and when one of the three texts, of 6, 5 and 4 segments, is taken by one of two rows.
    assert len(made_of) == 3 + 1 + 3
    assert all(torch.equal(made.tensors[name], tensor) for name, tensor in kept.tensors.items())


def test_divergence_is_an_error(checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(DivergedError, match=r"step \d+: the loss is (nan|inf)"):
        train(checkpoints.memlong(gates=float("nan")), output, tokens, cache)
    assert not output.exists()


def test_a_memory_layer_that_does_not_read_is_frozen(checkpoints: Checkpoints) -> None:
    for layers, first in (([1, 3], 1), ([3], 2)):
        folder = checkpoints.memlong(memory_layer=1, retrieval_layers=layers)
        model = MemLongForCausalLM.from_pretrained(folder, dtype=torch.float32)
        trained = select_trained(model, TrainedParts(rank=2, alpha=4.0, full=("norms",)), with_memory=True)
        assert min(int(name.split(".")[2]) for name in trained if "layers." in name) == first


def test_tied_embeddings_cannot_be_trained(checkpoints: Checkpoints) -> None:
    folder = checkpoints.memlong(shape={"tie_word_embeddings": True})
    model = MemLongForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(SettingsError, match="train_whole = 'embeddings': must be left out"):
        select_trained(model, TrainedParts(full=("embeddings",)), with_memory=True)


def test_another_retriever_means_other_features(
    checkpoints: Checkpoints, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, retriever = tmp_path / "cache", tmp_path / "retriever"
    shutil.copytree(checkpoints.retriever, retriever, copy_function=os.link)
    folder = checkpoints.memlong(**{"retriever.model": str(retriever)})
    train(folder, tmp_path / "a.safetensors", tokens, cache, steps=1)
    (retriever / "another.txt").touch()
    monkeypatch.delattr(FrozenHalf, "_embed")
    with pytest.raises(AttributeError, match="_embed"):
        train(folder, tmp_path / "b.safetensors", tokens, cache, steps=1)


def test_validation_needs_texts_that_retrieve(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path
) -> None:
    model = checkpoints.memlong(local_window=320)  # The longest text for training has 400 tokens, that for this 300.
    with pytest.raises(TextsError, match=r"--valid-tokens: nothing is retrieved"):
        train(model, tmp_path / "a.safetensors", tokens, cache, steps=1)


def test_training_needs_texts_that_retrieve(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path
) -> None:
    model = checkpoints.memlong(local_window=512)
    with pytest.raises(TextsError, match=r"long enough to retrieve anything: the longest has 384 tokens, and 528 "):
        train(model, tmp_path / "a.safetensors", tokens, cache, steps=1)
    for size in (0, 48):
        with pytest.raises(TextsError, match=rf"memory_size \({size}\) holds nothing that the window does not: .* 64"):
            train(checkpoints.memlong(memory_size=size), tmp_path / "a.safetensors", tokens, cache, steps=1)


def test_a_cache_must_fit_on_its_disk(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr("memlong_vllm.training.features.shutil.disk_usage", lambda folder: free)
        with pytest.raises(TextsError, match=r"of 4 texts takes 0\.0 GiB, .*name another --cache-dir"):
            train(checkpoints.memlong(), tmp_path / "a.safetensors", tokens, tmp_path / "cache", steps=1)
    train(checkpoints.memlong(), tmp_path / "a.safetensors", tokens, tmp_path / "cache", steps=1)
    monkeypatch.setattr("memlong_vllm.training.features.shutil.disk_usage", lambda folder: free)
    train(checkpoints.memlong(), tmp_path / "b.safetensors", tokens, tmp_path / "cache", steps=1)  # Nothing to compute.


def test_something_must_learn(checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path) -> None:
    model, parts = checkpoints.memlong(fusion="joint"), TrainedParts(rank=0)
    with pytest.raises(SettingsError, match=r"lora_rank = 0: leaves nothing that learns"):
        train(model, tmp_path / "a.safetensors", tokens, cache, parts=parts)


def test_in_half_precision_with_accumulation(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path
) -> None:
    half, full = tmp_path / "half.safetensors", tmp_path / "full.safetensors"
    AcceleratorState._reset_state()  # A process has one precision.
    train(checkpoints.memlong(), half, tokens, cache, steps=30, precision="bf16", rows=1, accumulation=2)
    AcceleratorState._reset_state()
    train(checkpoints.memlong(), full, tokens, cache, steps=1, rows=1, accumulation=2)
    losses = [entry["loss"] for entry in log_of(half) if "loss" in entry]
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    # The same tokens, two batches of them.
    (exact,) = [entry["loss"] for entry in log_of(full) if "loss" in entry]
    assert losses[0] == pytest.approx(exact, rel=1e-2)
    assert losses[0] != exact
    state = torch.load(Path(f"{full}.run") / "state" / "rank0.pt", weights_only=True)
    assert state["streams"]["places"][0][1] == 2


def test_parts_of_an_update_weigh_as_their_tokens(checkpoints: Checkpoints, tokens: list[int], tmp_path: Path) -> None:
    """The same segments, one after the other or as rows: the same gradient."""
    pieces = documents(tokens, (100, 100))
    pieces[1] = replace(pieces[1], loss_weights=tuple(0.0 if idx < 48 else 2.0 for idx in range(100)))
    norms = []
    for rows, accumulation in ((2, 1), (1, 2)):
        output = tmp_path / f"{rows}.safetensors"
        parts = {"rows": rows, "accumulation": accumulation, "steps": 1, "with_memory": False}
        job = FinetuneJob(checkpoints.memlong(), output, tmp_path / "cache", cpu=True)
        finetune(job, FinetuneSettings(**(SETTINGS | parts)), lambda *_: (pieces, []), lambda text: None)
        norms += [entry["grad_norm"] for entry in log_of(output)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] > 0


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_a_processor_without_bfloat16_is_told_of(
    checkpoints: Checkpoints, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    said: dict[str, list[str]] = {"bf16": [], "fp32": []}
    for precision, lines in said.items():
        AcceleratorState._reset_state()
        settings = {"precision": precision, "segment_tokens": 96, "rows": 4}
        with pytest.raises(TextsError, match="too few for 4 rows"):
            train(checkpoints.memlong(), tmp_path / "a.safetensors", tokens, tmp_path, say=lines.append, **settings)
    AcceleratorState._reset_state()
    assert [line for line in said["bf16"] if "--precision fp32" in line] == said["bf16"]
    assert len(said["bf16"]) == (capability == "AVX2")
    assert not said["fp32"]


def test_the_control_learns_nothing_of_memory(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path
) -> None:
    adapter = train(checkpoints.memlong(), tmp_path / "a.safetensors", tokens, cache, with_memory=False)
    assert not any(".memory_" in name for name in adapter.tensors)
    assert adapter.training["validation"]["nll_without_memory"] is None


def test_features_are_computed_once(
    checkpoints: Checkpoints, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(checkpoints.memlong(), tmp_path / "a.safetensors", tokens, tmp_path / "cache", steps=2)
    monkeypatch.delattr(FrozenHalf, "_run_lower")
    monkeypatch.delattr(FrozenHalf, "_embed")
    again = train(checkpoints.memlong(), tmp_path / "b.safetensors", tokens, tmp_path / "cache", steps=2)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"schedule": "step"}, "schedule = 'step'"),
        ({"precision": "fp16"}, "precision = 'fp16'"),
        ({"parts": {"dropout": 1.0}}, "lora_dropout = 1.0"),
        ({"memory_learning_rate": 0.0}, "memory_learning_rate = 0.0"),
        ({"adapter_learning_rate": 0.0}, "adapter_learning_rate = 0.0"),
        ({"steps": 40}, r"warmup_steps = 50: must not exceed steps \(40\)"),
    ],
)
def test_bad_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        with_overrides(FinetuneSettings(), values.pop("parts", values))


def test_a_segment_must_hold_whole_strides(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"segment_tokens = 72: .*retrieval_stride \(16\)"):
        train(checkpoints.memlong(), tmp_path / "a.safetensors", tokens, cache, segment_tokens=72)


def test_learning_rates() -> None:
    settings = FinetuneSettings(steps=10, warmup_steps=4, schedule="linear")
    assert [learning_rate_factor(settings, step) for step in (0, 3, 4, 7)] == [0.25, 1.0, 1.0, 0.5]
    cosine = FinetuneSettings(steps=10, warmup_steps=0, schedule="cosine")
    assert learning_rate_factor(cosine, 5) == pytest.approx(0.5)


def test_overrides_reach_the_parts() -> None:
    settings = with_overrides(PRESETS["paper"], {"rank": 4, "steps": 7000, "rows": None})
    assert (settings.parts.rank, settings.steps, settings.rows) == (4, 7000, PRESETS["paper"].rows)
    assert settings.warmup_steps == 1000
