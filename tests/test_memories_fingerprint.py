"""What counts as the same model: all that the stored keys and values are computed from, no more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memlong_vllm.memories.errors import FingerprintError
from memlong_vllm.memories.fingerprint import model_fingerprint
from tests.checkpoints import Checkpoints

LAYER = 2
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(checkpoints: Checkpoints) -> Path:
    return checkpoints.memlong(memory_layer=LAYER, retrieval_layers=[2, 4])


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit_weights(folder: Path, edit: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


COUNTING = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.2.input_layernorm.weight",
    "model.layers.2.self_attn.k_proj.weight",
    "model.layers.2.self_attn.v_proj.weight",
]
OTHERS = [
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.2.self_attn.o_proj.weight",
    "model.layers.2.self_attn.memory_gate",
    "model.layers.2.mlp.up_proj.weight",
    "model.layers.3.self_attn.k_proj.weight",
    "model.layers.4.self_attn.memory_gate",
    "model.norm.weight",
]


@pytest.mark.parametrize("name", COUNTING + OTHERS)
def test_the_weights_that_make_keys_and_values_count(original: Path, folder: Path, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors[name].add_(0.25))
    assert (model_fingerprint(folder, LAYER) != model_fingerprint(original, LAYER)) == (name in COUNTING)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rms_norm_eps", 1e-3), ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}), ("hidden_act", "relu")],
)
def test_settings_of_the_layers_count(original: Path, folder: Path, field: str, value: object) -> None:
    edit_config(folder, lambda config: config.update({field: value}))
    assert model_fingerprint(folder, LAYER) != model_fingerprint(original, LAYER)


def test_the_window_counts_and_what_else_concerns_retrieval_does_not(original: Path, folder: Path) -> None:
    plain = model_fingerprint(original, LAYER)
    edit_config(folder, lambda config: config["memlong"].update({"top_k": 5, "retrieval_layers": [2, 3]}))
    edit_config(folder, lambda config: config.update({"max_position_embeddings": 1 << 20}))
    assert model_fingerprint(folder, LAYER) == plain
    assert model_fingerprint(folder, LAYER, local_window=64) == plain
    assert model_fingerprint(folder, LAYER, local_window=128) != plain
    edit_config(folder, lambda config: config["memlong"].update({"local_window": 128}))
    assert model_fingerprint(folder, LAYER) == model_fingerprint(original, LAYER, local_window=128)


def test_the_layer_counts(original: Path) -> None:
    assert len({model_fingerprint(original, layer) for layer in range(5)}) == 5


def test_how_tensors_are_spread_over_files_does_not_count(original: Path, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        weight_map |= dict.fromkeys(names[i::2], file)
        save_file({name: tensors[name] for name in names[i::2]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"model.embed_tokens.weight": torch.zeros(2)}, folder / "unrelated.safetensors")
    assert model_fingerprint(folder, LAYER) == model_fingerprint(original, LAYER)


def test_large_tensors_are_sampled_over_their_whole_length(original: Path, folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.arange(1 << 20, dtype=torch.float32)}))
    plain = model_fingerprint(folder, LAYER)
    for place in (0, 1 << 19, (1 << 20) - 1):

        def edit(tensors: Tensors, place: int = place) -> None:
            tensors[name][max(0, place - 40_000) : place + 40_000] += 1

        changed = Path(shutil.copytree(folder, folder.parent / f"changed-{place}"))
        edit_weights(changed, edit)
        assert model_fingerprint(changed, LAYER) != plain


def test_what_is_missing_is_said(folder: Path) -> None:
    with pytest.raises(FingerprintError, match="layer 5, layer 6"):
        model_fingerprint(folder, 6)
    edit_weights(folder, lambda tensors: tensors.update({"x": tensors.pop("model.embed_tokens.weight")}))
    with pytest.raises(FingerprintError, match="embed_tokens"):
        model_fingerprint(folder, LAYER)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(FingerprintError):
        model_fingerprint(folder, LAYER)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FingerprintError, match="safetensors"):
        model_fingerprint(folder, LAYER)
    (folder / "config.json").write_text("{}")
    with pytest.raises(FingerprintError):
        model_fingerprint(folder, LAYER)
    for name in ("nobody/no-such-model", "/no/such/folder"):
        with pytest.raises(FingerprintError, match=r"neither a folder nor"):
            model_fingerprint(name, LAYER)
