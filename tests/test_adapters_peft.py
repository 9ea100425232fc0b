"""Adapters to and from the PEFT library, held against what the library itself makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from memlong_vllm.adapters import AdapterError, merge_adapter
from memlong_vllm.adapters.peft_format import read_adapter, read_peft, write_peft
from tests.test_adapters import GATE, NORM, llama, make_adapter, memlong

TOKENS = torch.arange(3, 15)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def trained(folder: Path, model: Any = None, **settings: Any) -> torch.Tensor:
    """Logits of a PEFT model of random weights, saved to ``folder`` by the library."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    peft_model = get_peft_model(model or llama(), LoraConfig(**options))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name or "modules_to_save" in name or "bias" in name
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    peft_model.save_pretrained(folder)
    return logits(peft_model)


def merged_logits(adapter: Any, **shape: Any) -> torch.Tensor:
    base = llama(**shape)
    base.load_state_dict(merge_adapter(adapter, base.state_dict(), base.config))
    return logits(base)


RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all_projections": {"target_modules": "all-linear"},
    "modules_to_save": {"modules_to_save": ["norm", "embed_tokens", "lm_head"]},
    "whole_mlp": {"modules_to_save": ["mlp"]},
    "rank_pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 5, "v_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {r"model\.layers\.\d\.self_attn\.v_proj": 11}, "rank_pattern": {"q_proj": 4}},
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "some_layers": {"layers_to_transform": [2], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_the_library_saves_is_read(tmp_path: Path, recipe: str) -> None:
    expected = trained(tmp_path, **RECIPES[recipe])
    adapter = read_adapter(tmp_path)
    assert adapter.base is None
    assert not adapter.memlong
    torch.testing.assert_close(merged_logits(adapter), expected, rtol=0, atol=1e-5)
    assert (merged_logits(adapter) - logits(llama())).abs().max() > 1e-2


def test_biases(tmp_path: Path) -> None:
    expected = trained(tmp_path, llama(attention_bias=True), bias="all")
    adapter = read_peft(tmp_path)
    assert "model.layers.0.self_attn.o_proj.bias" in adapter.tensors
    torch.testing.assert_close(merged_logits(adapter, attention_bias=True), expected, rtol=0, atol=1e-5)


def test_tied_embeddings(tmp_path: Path) -> None:
    tied = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    expected = trained(tmp_path, llama(tie_word_embeddings=True), **tied)
    merged = merged_logits(read_peft(tmp_path), tie_word_embeddings=True)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_old_weight_files(tmp_path: Path) -> None:
    expected = trained(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(merged_logits(read_peft(tmp_path)), expected, rtol=0, atol=1e-5)


def test_code_in_old_weight_files_is_not_run(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"weight": Path}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="the weights cannot be read"):
        read_peft(tmp_path)


# Ours, in the library's format.


def test_a_written_adapter_comes_back_whole(tmp_path: Path) -> None:
    adapter = make_adapter(llama())
    write_peft(adapter, tmp_path / "folder")
    loaded = read_adapter(tmp_path / "folder")
    assert loaded.digest() == adapter.digest()
    with pytest.raises(AdapterError, match="not an empty folder"):
        write_peft(adapter, tmp_path / "folder")


def test_the_library_loads_a_written_adapter_over_the_reference_model(tmp_path: Path) -> None:
    base = llama()
    adapter, model = make_adapter(base), memlong(base)
    write_peft(adapter, tmp_path / "folder")
    loaded = PeftModel.from_pretrained(memlong(base), tmp_path / "folder")
    model.load_state_dict(merge_adapter(adapter, model.state_dict(), model.config))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    weights = loaded.merge_and_unload().state_dict()
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)
    assert torch.equal(weights[GATE], adapter.tensors[GATE])


@pytest.mark.parametrize("tie", [False, True])
def test_the_library_loads_a_written_adapter_over_a_plain_llama(tmp_path: Path, tie: bool) -> None:
    base = llama(tie_word_embeddings=tie)
    embeddings = {"model.embed_tokens.weight": torch.randn(96, 32)}
    adapter = make_adapter(base, tensors=make_adapter(base).tensors | embeddings)
    write_peft(adapter, tmp_path / "folder")
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=tie), tmp_path / "folder")
    merged = merge_adapter(adapter, memlong(base).state_dict(), base.config)
    base.load_state_dict({name: tensor for name, tensor in merged.items() if ".memory_" not in name})
    torch.testing.assert_close(logits(loaded), logits(base), rtol=0, atol=1e-5)


def test_one_saved_again_by_the_library(tmp_path: Path) -> None:
    """The library knows nothing of gates and metadata: pairs and whole modules are what is left."""
    adapter = make_adapter(llama())
    write_peft(adapter, tmp_path / "ours")
    PeftModel.from_pretrained(llama(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    loaded = read_peft(tmp_path / "theirs")
    assert loaded.tensors.keys() == adapter.tensors.keys() - {GATE}
    assert all(torch.equal(loaded.tensors[name], adapter.tensors[name]) for name in loaded.tensors)
    assert (loaded.lora, loaded.base) == (adapter.lora, None)


def test_without_pairs_there_is_no_peft_adapter(tmp_path: Path) -> None:
    adapter = make_adapter(llama(), tensors={GATE: torch.ones(4)}, lora=None)
    with pytest.raises(AdapterError, match="without LoRA pairs"):
        write_peft(adapter, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# The authors' script: PEFT's keys, their gates, and their config.json beside them.


class RetGate(torch.nn.Module):
    """Stands for theirs: what it computes does not matter here, but its parameter's name and shape."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.output_gate = torch.nn.Parameter(torch.zeros(1, num_heads, 1, 1))


def released(folder: Path, gate: float, config: dict[str, Any] | None) -> None:
    """Saved by the library from a model with their gates in the memory layer 0 and layers 1 and 2."""
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.ret_gate = RetGate(4)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = LoraConfig(r=2, lora_alpha=8, target_modules=targets, modules_to_save=["ret_gate", "norm", "embed"])
    peft_model = get_peft_model(model, settings)
    for name, parameter in peft_model.named_parameters():
        if "ret_gate.modules_to_save" in name and "layers.0." not in name:
            parameter.data += gate
    peft_model.save_pretrained(folder)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def test_an_adapter_of_the_released_script(tmp_path: Path) -> None:
    config = {"mem_layer": 0, "ret_attn_layers": [1, 2], "use_gate": True, "mem_group_size": 8, "memory_size": 64}
    released(tmp_path, 0.25, config | {"ret_group_size": 4, "position_type": "Zero"})
    adapter = read_adapter(tmp_path)
    gates = {name: tensor for name, tensor in adapter.tensors.items() if "gate" in name and "mlp" not in name}
    assert gates.keys() == {f"model.layers.{layer}.self_attn.memory_gate" for layer in (1, 2)}
    assert all(torch.equal(gate, torch.full((4,), 0.25)) for gate in gates.values())
    assert adapter.memlong == {
        "memory_layer": 0, "retrieval_layers": [1, 2], "fusion": "scaled_logits", "chunk_size": 8,
        "retrieval_stride": 8, "query_tokens": 8, "memory_size": 64, "top_k": 4,
    }  # fmt: skip
    assert adapter.training["position_type"] == "Zero"
    assert {"model.norm.weight", NORM, "model.layers.2.post_attention_layernorm.weight"} <= adapter.tensors.keys()
    model = memlong(llama(), **adapter.memlong)
    merged = merge_adapter(adapter, model.state_dict(), model.config)
    assert torch.equal(merged[GATE], gates[GATE])


def test_the_released_script_without_gates_or_configuration(tmp_path: Path) -> None:
    released(tmp_path / "gates", 0.25, None)
    assert read_peft(tmp_path / "gates").memlong == {"fusion": "scaled_logits"}
    released(tmp_path / "untrained", 0.0, {"mem_layer": 0, "ret_attn_layers": [1], "mem_group_size": 16})
    untrained = read_peft(tmp_path / "untrained")
    assert untrained.memlong["fusion"] == "scaled_logits"
    assert not [name for name in untrained.tensors if "memory" in name]
    trained(tmp_path / "joint")
    (tmp_path / "joint" / "config.json").write_text(json.dumps({"mem_layer": 0, "ret_attn_layers": [2, 1]}))
    joint = read_peft(tmp_path / "joint").memlong
    assert (joint["fusion"], joint["retrieval_layers"], joint["chunk_size"]) == ("joint", [1, 2], 32)
    released(tmp_path / "contradiction", 0.25, {"mem_layer": 0, "ret_attn_layers": [1, 2], "use_gate": False})
    with pytest.raises(AdapterError, match="use_gate false, but the adapter has gates"):
        read_peft(tmp_path / "contradiction")
    released(tmp_path / "number", 0.25, {"mem_layer": 0, "ret_attn_layers": 5})
    with pytest.raises(AdapterError, match="ret_attn_layers = 5: must be a list of layers"):
        read_peft(tmp_path / "number")


# What cannot be read.

REFUSED = [
    ({"use_dora": True}, "use_dora = True is not supported"),
    ({"lora_bias": True}, "lora_bias"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"init_lora_weights": "pissa"}, "takes part of the base's weights"),
    ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow = 1 is not supported"),
    ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
    ({"r": 4}, r"says rank 4 \(r, rank_pattern\)"),
    ({"r": 0}, "r = 0"),
    ({"lora_alpha": 0}, "lora_alpha = 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_is_not_plain_lora_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    trained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AdapterError, match=message) as raised:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_tensors_without_a_place_are_refused_by_name(tmp_path: Path) -> None:
    trained(tmp_path / "embedding", target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match="lora_embedding_A"):
        read_peft(tmp_path / "embedding")
    trained(tmp_path / "other")
    path = tmp_path / "other" / "adapter_model.safetensors"
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(AdapterError, match="'weight' does not begin with"):
        read_peft(tmp_path / "other")
    path.unlink()
    with pytest.raises(AdapterError, match="neither adapter_model"):
        read_peft(tmp_path / "other")
    with pytest.raises(AdapterError, match="no such file or folder"):
        read_adapter(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="no readable adapter_config"):
        read_adapter(tmp_path / "empty")
