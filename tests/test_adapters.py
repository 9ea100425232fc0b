"""Adapter files: what is kept, what is refused, and what merging makes of a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from memlong_vllm.adapters import (
    Adapter,
    AdapterError,
    LoraSettings,
    backbone_identity,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from memlong_vllm.config import MemLongConfig
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
BLOCK = {"memory_layer": 0, "retrieval_layers": [1, 2], "chunk_size": 8, "memory_size": 64, "local_window": 16,
         "retrieval_stride": 8, "query_tokens": 8}  # fmt: skip
QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
GATE, NORM = "model.layers.2.self_attn.memory_gate", "model.layers.1.input_layernorm.weight"


def llama(seed: int = 0, **shape: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | shape))


def memlong(base: LlamaForCausalLM, **block: Any) -> MemLongForCausalLM:
    """A MemLong model of a base's weights."""
    shape = {name: value for name, value in base.config.to_dict().items() if name in (*SHAPE, "tie_word_embeddings")}
    model = MemLongForCausalLM(MemLongConfig(**shape, memlong=BLOCK | block))
    model.load_state_dict(base.state_dict(), strict=False)
    return model


def make_adapter(base: LlamaForCausalLM, **changes: Any) -> Adapter:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    tensors = {
        f"{QUERY}.lora_A": random(2, 32), f"{QUERY}.lora_B": random(32, 2),
        f"{DOWN}.lora_A": random(2, 48), f"{DOWN}.lora_B": random(32, 2),
        GATE: random(4), NORM: 1 + random(32),
    }  # fmt: skip
    values = {
        "tensors": tensors,
        "lora": LoraSettings(rank=2, alpha=6.0),
        "memlong": BLOCK,
        "base": backbone_identity(base.state_dict(), base.config),
        "training": {"data": "a novel", "steps": 10, "results": {"loss": [3.5, 3.25]}},
    }
    return Adapter(**values | changes)


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    adapter = make_adapter(llama())
    save_adapter(adapter, tmp_path / "new" / "adapter.safetensors")
    loaded = load_adapter(tmp_path / "new" / "adapter.safetensors")
    assert loaded.metadata() == adapter.metadata()
    assert loaded.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], adapter.tensors[name]) for name in adapter.tensors)
    assert loaded.digest() == adapter.digest()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["adapter.safetensors"]
    assert (tmp_path / "new" / "adapter.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_digest_sees_all_of_it() -> None:
    adapter = make_adapter(llama())
    changed = adapter.tensors | {GATE: adapter.tensors[GATE] + 1e-6}
    others = [
        replace(adapter, tensors=changed), replace(adapter, lora=LoraSettings(2, 7.0)),
        replace(adapter, memlong=BLOCK | {"top_k": 1}), replace(adapter, training={}), replace(adapter, base=None),
    ]  # fmt: skip
    assert len({other.digest() for other in [adapter, *others]}) == len(others) + 1


# The base.


def test_one_base_has_one_identity() -> None:
    base = llama()
    identity = backbone_identity(base.state_dict(), base.config)
    converted = memlong(base)
    assert backbone_identity(converted.state_dict(), converted.config) == identity
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in base.state_dict().items()}
    assert backbone_identity(halved, base.config) == identity
    tied = llama(tie_word_embeddings=True)
    left_out = {name: tensor for name, tensor in tied.state_dict().items() if name != "lm_head.weight"}
    assert backbone_identity(left_out, tied.config) == backbone_identity(tied.state_dict(), tied.config)


def test_another_base_has_another_identity() -> None:
    base = llama()
    identity = backbone_identity(base.state_dict(), base.config)
    same_shape, deeper = llama(seed=1), llama(num_hidden_layers=4)
    (difference,) = identity.differences(backbone_identity(same_shape.state_dict(), same_shape.config))
    assert "other weights" in difference
    differences = identity.differences(backbone_identity(deeper.state_dict(), deeper.config))
    assert differences == ["num_hidden_layers 3 against 4"]
    with pytest.raises(AdapterError, match="no weights"):
        backbone_identity({}, base.config)
    with pytest.raises(AdapterError, match="meta device"):
        backbone_identity(base.to("meta").state_dict(), base.config)


# Merging.


def test_merged_is_what_was_trained() -> None:
    base = llama()
    adapter, model = make_adapter(base), memlong(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merge_adapter(adapter, model.state_dict(), model.config)
    assert merged.keys() == before.keys()
    for name, tensor in merged.items():
        expected = before[name]
        if name.removesuffix(".weight") in (QUERY, DOWN):
            a, b = (adapter.tensors[f"{name.removesuffix('.weight')}.lora_{half}"] for half in "AB")
            expected = expected + 3.0 * (b @ a)
        torch.testing.assert_close(tensor, adapter.tensors.get(name, expected), rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merging_keeps_the_weights_dtype() -> None:
    base = llama()
    adapter, model = make_adapter(base), memlong(base).to(torch.bfloat16)
    merged = merge_adapter(adapter, model.state_dict(), model.config)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    a, b = (adapter.tensors[f"{QUERY}.lora_{half}"] for half in "AB")
    exact = model.state_dict()[f"{QUERY}.weight"].float() + 3.0 * (b @ a)
    assert torch.equal(merged[f"{QUERY}.weight"], exact.to(torch.bfloat16))


def test_a_tied_output_follows_the_embeddings() -> None:
    base = llama(tie_word_embeddings=True)
    embeddings = {"model.embed_tokens.weight": torch.randn(96, 32)}
    adapter = make_adapter(base, tensors=embeddings, lora=None)
    model = memlong(base)
    merged = merge_adapter(adapter, model.state_dict(), model.config)
    assert torch.equal(merged["lm_head.weight"], embeddings["model.embed_tokens.weight"])
    apart = make_adapter(base, tensors={"lm_head.weight": torch.randn(96, 32)}, lora=None)
    with pytest.raises(AdapterError, match="the model ties them"):
        merge_adapter(apart, model.state_dict(), model.config)


def test_another_base_is_refused_unless_forced() -> None:
    adapter, other = make_adapter(llama()), memlong(llama(seed=1))
    with pytest.raises(AdapterError, match="another base model: the same shape but other weights"):
        merge_adapter(adapter, other.state_dict(), other.config)
    merged = merge_adapter(adapter, other.state_dict(), other.config, force=True)
    assert torch.equal(merged[GATE], adapter.tensors[GATE])


def test_weights_that_do_not_fit_are_refused() -> None:
    base = llama()
    adapter, model = make_adapter(base), memlong(base, retrieval_layers=[1])
    with pytest.raises(AdapterError, match=rf"no weight {GATE}: its memlong block must name"):
        merge_adapter(adapter, model.state_dict(), model.config)
    narrow = make_adapter(base, tensors=adapter.tensors | {GATE: torch.ones(3)})
    model = memlong(base)
    with pytest.raises(AdapterError, match=rf"{GATE} has shape \[4\] in the model and \[3\] in the adapter"):
        merge_adapter(narrow, model.state_dict(), model.config)


# What an adapter cannot be.

BAD_TENSORS = [
    ({f"{QUERY}.lora_B": None}, f"{QUERY}.lora_B is missing"),
    ({f"{QUERY}.lora_A": torch.ones(3, 32)}, r"has shape \[3, 32\]: must be \[rank, in\] with rank 2"),
    ({GATE: torch.tensor([1.0, float("nan")])}, "not finite"),
    ({GATE: torch.ones(2, 2)}, "must have 1 dimensions"),
    ({GATE: torch.ones(4, dtype=torch.int32)}, "torch.int32: must be float32, bfloat16 or float16"),
    ({"model.layers.1.self_attn.rotary.weight": torch.ones(4)}, "not a parameter an adapter can hold"),
    ({"model.layers.0.self_attn.memory_gate": torch.ones(4)}, r"retrieval_layers is \[1, 2\]"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_TENSORS)
def test_tensors_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    base = llama()
    tensors = {name: t for name, t in (make_adapter(base).tensors | changes).items() if t is not None}
    with pytest.raises(AdapterError, match=message):
        make_adapter(base, tensors=tensors)


BAD_FIELDS = [
    ({"tensors": {}}, "no tensors"),
    ({"lora": None}, "without LoRA settings"),
    ({"tensors": {GATE: torch.ones(4)}}, "no LoRA pairs"),
    ({"memlong": BLOCK | {"fusion": "sum"}}, r"memlong\.fusion = 'sum'"),
    ({"memlong": BLOCK | {"colour": 1}}, r"memlong\.colour"),
    ({"memlong": BLOCK | {"retrieval_layers": [1, 2, 3]}}, "layers 0 to 2"),
    ({"memlong": []}, "must be an object"),
    (
        {
            "memlong": BLOCK | {"memory_adapter": "linear", "memory_adapter_width": 2},
            "lora": None,
            "tensors": {"model.layers.2.self_attn.memory_k_adapter": torch.ones(16, 32)},
        },
        r"has shape \[16, 32\]: must have 2 x 2 times as many columns",
    ),
    ({"training": {"loss": float("nan")}}, "training cannot be written as JSON"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS)
def test_fields_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make_adapter(llama(), **changes)


BAD_METADATA = [
    ({"format": "pt"}, "not an adapter"),
    ({"version": "2"}, "version '2'"),
    ({"lora": None}, "lacks the block 'lora'"),
    ({"colour": "red"}, "unknown field 'colour'"),
    ({"training": "{"}, "'training' of its metadata is not JSON"),
    ({"training": "3"}, "training must be an object"),
    ({"base": '{"digest": ""}'}, "is missing"),
    ({"lora": '{"rank": 0, "alpha": 1}'}, r"lora\.rank = 0"),
    ({"lora": '{"rank": 2}'}, "must be null or an object"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_METADATA)
def test_files_that_cannot_be(tmp_path: Path, changes: dict[str, str | None], message: str) -> None:
    adapter, path = make_adapter(llama()), tmp_path / "adapter.safetensors"
    metadata = {"format": "memlong_vllm.adapter", "version": "1"}
    metadata |= {name: json.dumps(value) for name, value in adapter.metadata().items()}
    values = {name: value for name, value in (metadata | changes).items() if value is not None}
    save_file(adapter.tensors, path, metadata=values)
    with pytest.raises(AdapterError, match=message) as raised:
        load_adapter(path)
    assert str(path) in str(raised.value)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(AdapterError, match="no such file"):
        load_adapter(path)
    save_adapter(make_adapter(llama()), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AdapterError, match="cut short"):
        load_adapter(path)
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(AdapterError, match="not an adapter"):
        load_adapter(path)
