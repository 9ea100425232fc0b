"""``memlong-vllm convert --adapter`` and ``memlong-vllm adapter``: from what was learned to a model that is served."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from memlong_vllm.adapters import Adapter, AdapterError, LoraSettings, backbone_identity, load_adapter, save_adapter
from memlong_vllm.adapters.peft_format import write_peft
from memlong_vllm.cli import main
from memlong_vllm.config import MemLongConfig, MemoryConfig, MemoryConfigError
from memlong_vllm.conversion import ConversionError, adapted_block, convert, memlong_config
from tests.checkpoints import MEMORY, SHAPE, Checkpoints
from tests.engines import Engine, Reference, assert_parity

QUERY = "model.layers.2.self_attn.q_proj"
GATES = [f"model.layers.{layer}.self_attn.memory_gate" for layer in MEMORY["retrieval_layers"]]


def block(checkpoints: Checkpoints, **changes: Any) -> dict[str, Any]:
    values = MEMORY | {"retriever": {"model": str(checkpoints.retriever), "pooling": "mean"}} | changes
    return MemoryConfig.from_dict(values, SHAPE["num_hidden_layers"]).to_dict()


def make_adapter(checkpoints: Checkpoints, **changes: Any) -> Adapter:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    base = LlamaForCausalLM.from_pretrained(checkpoints.base())
    tensors = {f"{QUERY}.lora_A": random(4, 64), f"{QUERY}.lora_B": random(128, 4)}
    tensors |= {name: random(4) + 0.7 for name in GATES}
    values = {
        "tensors": tensors,
        "lora": LoraSettings(4, 8.0),
        "memlong": block(checkpoints),
        "base": backbone_identity(base.state_dict(), base.config),
        "training": {"data": "a novel", "steps": 3},
    }
    return Adapter(**values | changes)


@pytest.fixture
def adapter(checkpoints: Checkpoints) -> Adapter:
    return make_adapter(checkpoints)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr("sys.argv", ["memlong-vllm", *map(str, arguments)])
    return main.main()


def test_the_merged_checkpoint(checkpoints: Checkpoints, adapter: Adapter, tmp_path: Path) -> None:
    convert(checkpoints.base(), tmp_path / "made", adapter=adapter, max_length=2048)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["memlong"] == adapter.memlong
    assert config["memlong_adapter"] == {"digest": adapter.digest(), "training": {"data": "a novel", "steps": 3}}
    base, made = (load_file(folder / "model.safetensors") for folder in (checkpoints.base(), tmp_path / "made"))
    assert {name for name in base if not torch.equal(base[name], made[name])} == {f"{QUERY}.weight"}
    learned = 2.0 * (adapter.tensors[f"{QUERY}.lora_B"] @ adapter.tensors[f"{QUERY}.lora_A"])
    torch.testing.assert_close(made[f"{QUERY}.weight"], base[f"{QUERY}.weight"] + learned, rtol=0, atol=1e-6)
    assert all(torch.equal(made[name], adapter.tensors[name]) for name in GATES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", trust_remote_code=True)
    assert model.config.memlong_adapter["digest"] == adapter.digest()


def test_it_is_served(
    start_engine: Any, checkpoints: Checkpoints, adapter: Adapter, tokens: list[int], tmp_path: Path
) -> None:
    convert(checkpoints.base(), tmp_path / "made", adapter=adapter, max_length=2048)
    engine: Engine = start_engine(tmp_path / "made")
    (output,) = engine.generate([tokens[:400]], max_tokens=8)
    assert_parity(output, Reference(tmp_path / "made"), 1e-5)


def test_settings_beside_an_adapter(checkpoints: Checkpoints, adapter: Adapter, tmp_path: Path) -> None:
    free = {"top_k": 1, "memory_size": 256, "retriever.model": "elsewhere", "memory_bias": False}
    made = convert(checkpoints.base(), tmp_path / "made", settings=free, adapter=adapter, preset_name="released")
    assert (made.memory.top_k, made.memory.memory_size, made.memory.retriever.model) == (1, 256, "elsewhere")
    assert made.memory.fusion == "gated"
    for name, value in {
        "memory_layer": 0, "retrieval_layers": [2, 4], "fusion": "joint", "memory_softmax": "chunk",
        "memory_bias": True, "memory_adapter": "linear",
    }.items():  # fmt: skip
        with pytest.raises(ConversionError, match=f"--set {name}=.* contradicts the adapter"):
            convert(checkpoints.base(), tmp_path / "out", settings={name: value}, adapter=adapter)
    with pytest.raises(MemoryConfigError, match=r"memlong\.colour"):
        convert(checkpoints.base(), tmp_path / "out", settings={"colour": 1}, adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_a_control_is_made_without_memory(checkpoints: Checkpoints) -> None:
    control = make_adapter(checkpoints, training={"settings": {"with_memory": False}})
    assert adapted_block(block(checkpoints), control, {})["memory_size"] == 0
    assert adapted_block(block(checkpoints), control, {"memory_size": 256})["memory_size"] == 256
    # As far as the model that it is measured beside.
    base = MemLongConfig.from_pretrained(checkpoints.memlong())
    made = memlong_config(base, base.memory.to_dict() | {"memory_size": 0}, None)
    assert made.max_position_embeddings == base.max_position_embeddings
    elsewhere = make_adapter(checkpoints, training={"settings": "as in the paper"})
    assert adapted_block(block(checkpoints), elsewhere, {})["memory_size"] > 0


def test_a_partly_known_block(checkpoints: Checkpoints, adapter: Adapter) -> None:
    """What the adapter does not tell is the preset's, or what is set."""
    partly = make_adapter(checkpoints, memlong={"fusion": "scaled_logits"}, base=None)
    made = adapted_block(block(checkpoints, top_k=7), partly, {"retrieval_layers": [2]})
    assert (made["fusion"], made["retrieval_layers"], made["top_k"]) == ("scaled_logits", [2], 7)
    with pytest.raises(ConversionError, match='trained with "scaled_logits"'):
        adapted_block(block(checkpoints), partly, {"fusion": "joint"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_after_merging(
    checkpoints: Checkpoints, adapter: Adapter, tmp_path: Path, dtype: str
) -> None:
    convert(checkpoints.base(), tmp_path / "exact", adapter=adapter)
    convert(checkpoints.base(), tmp_path / "made", adapter=adapter, dtype=dtype)
    exact, made = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "made"))
    assert all(torch.equal(made[name], exact[name].to(getattr(torch, dtype))) for name in exact)


def test_sums_are_not_rounded_to_the_type_of_the_base(
    checkpoints: Checkpoints, adapter: Adapter, tmp_path: Path
) -> None:
    rounded = tmp_path / "rounded"
    convert(checkpoints.base(), rounded, dtype="bfloat16")
    convert(rounded, tmp_path / "made", adapter=adapter, dtype="float32", force=True)
    base, made = (load_file(folder / "model.safetensors") for folder in (rounded, tmp_path / "made"))
    learned = 2.0 * (adapter.tensors[f"{QUERY}.lora_B"] @ adapter.tensors[f"{QUERY}.lora_A"])
    exact = base[f"{QUERY}.weight"].float() + learned
    torch.testing.assert_close(made[f"{QUERY}.weight"], exact, rtol=0, atol=1e-6)


def test_another_base(checkpoints: Checkpoints, adapter: Adapter, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = LlamaForCausalLM.from_pretrained(checkpoints.base())
    model.model.embed_tokens.weight.data.mul_(1.1)
    model.save_pretrained(other)
    checkpoints.tokenizer.save_pretrained(other)
    with pytest.raises(AdapterError, match="another base model: the same shape but other weights"):
        convert(other, tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()
    convert(other, tmp_path / "out", adapter=adapter, force=True)
    assert (tmp_path / "out" / "config.json").is_file()


# A MemLong checkpoint as the base.


def test_a_fresh_checkpoint_is_as_good_as_its_base(checkpoints: Checkpoints, adapter: Adapter, tmp_path: Path) -> None:
    convert(checkpoints.base(), tmp_path / "plain", adapter=adapter, max_length=2048)
    fresh = checkpoints.memlong(gates=0.0, memory_adapter="linear", retrieval_layers=[3])
    convert(fresh, tmp_path / "made", adapter=adapter, max_length=2048)
    plain, made = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "made"))
    assert plain.keys() == made.keys()
    assert all(torch.equal(plain[name], made[name]) for name in plain)
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "made" / "config.json").read_text()
    with pytest.raises(ConversionError, match="is a MemLong checkpoint already"):
        convert(fresh, tmp_path / "out")


def test_the_retriever_within_a_base_comes_along(checkpoints: Checkpoints, adapter: Adapter, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoints.memlong(gates=0.0), base)
    values = json.loads((base / "config.json").read_text())
    values["memlong"]["retriever"]["model"] = "inside/retriever"
    (base / "config.json").write_text(json.dumps(values))
    shutil.copytree(checkpoints.retriever, base / "inside" / "retriever", copy_function=os.link)
    convert(base, tmp_path / "made", adapter=replace(adapter, memlong=values["memlong"]), force=True)
    made = {path.name for path in (tmp_path / "made" / "inside" / "retriever").iterdir()}
    assert made == {path.name for path in checkpoints.retriever.iterdir()}


def test_a_second_adapter(checkpoints: Checkpoints, adapter: Adapter, tmp_path: Path) -> None:
    """As the authors' second stage: trained on the base with the first adapter merged."""
    convert(checkpoints.base(), tmp_path / "first", adapter=adapter)
    with pytest.raises(AdapterError, match="other weights"):
        convert(tmp_path / "first", tmp_path / "out", adapter=adapter)
    second = make_adapter(checkpoints, base=None, training={"stage": 2})
    convert(tmp_path / "first", tmp_path / "made", adapter=second)
    history = json.loads((tmp_path / "made" / "config.json").read_text())["memlong_adapter"]
    assert (history["training"], history["merged_before"]["digest"]) == ({"stage": 2}, adapter.digest())
    pairs = {name: tensor for name, tensor in second.tensors.items() if "lora" in name}
    with pytest.raises(ConversionError, match=r"has a trained .*memory_gate, which the adapter does not"):
        convert(tmp_path / "first", tmp_path / "out", adapter=make_adapter(checkpoints, tensors=pairs, base=None))


# The commands.


@pytest.mark.parametrize("kind", ["file", "peft"])
def test_convert_command(
    checkpoints: Checkpoints, adapter: Adapter, tmp_path: Path, kind: str, monkeypatch: Any, capsys: Any
) -> None:
    path = tmp_path / kind
    save_adapter(adapter, path) if kind == "file" else write_peft(adapter, path)
    assert command(monkeypatch, "convert", checkpoints.base(), tmp_path / "made", "--adapter", path) == 0
    printed = capsys.readouterr().out
    assert f"adapter {adapter.digest()[:12]} is merged (1 LoRA pairs, 3 whole parameters)" in printed
    assert "gates are zero" not in printed
    assert command(monkeypatch, "convert", checkpoints.base(), tmp_path / "out", "--adapter", tmp_path / "none") == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_what_is_said_of_untrained_parts(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    pairs = {name: tensor for name, tensor in make_adapter(checkpoints).tensors.items() if "lora" in name}
    trained = {"position_type": "Continual"}
    save_adapter(make_adapter(checkpoints, tensors=pairs, base=None, training=trained), tmp_path / "pairs")
    assert command(monkeypatch, "convert", checkpoints.base(), tmp_path / "a", "--adapter", tmp_path / "pairs") == 0
    printed = capsys.readouterr().out
    assert "does not say which base" in printed
    assert "with memory before the window's positions" in printed
    assert "gates are zero" in printed
    assert command(monkeypatch, "convert", checkpoints.base(), tmp_path / "b", "--preset", "released") == 0
    printed = capsys.readouterr().out
    assert "nothing is trained yet" in printed
    assert "gates are zero" not in printed


def test_adapter_commands(adapter: Adapter, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file, folder, again = tmp_path / "adapter.safetensors", tmp_path / "peft", tmp_path / "again.safetensors"
    save_adapter(adapter, file)
    assert command(monkeypatch, "adapter", "show", file) == 0
    printed = capsys.readouterr().out
    for shown in (adapter.digest(), "rank 4, alpha 8", "5 layers", "q_proj", "memory_gate", "steps"):
        assert shown in printed
    assert command(monkeypatch, "adapter", "show", file, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["tensors"][f"{QUERY}.lora_A"] == {"dtype": "float32", "shape": [4, 64]}
    assert (shown["memlong"], shown["digest"]) == (adapter.memlong, adapter.digest())
    assert command(monkeypatch, "adapter", "export", file, folder) == 0
    assert command(monkeypatch, "adapter", "import", folder, again) == 0
    assert load_adapter(again).digest() == adapter.digest()
    capsys.readouterr()
    assert command(monkeypatch, "adapter", "import", folder, again) == 2
    assert "exists" in capsys.readouterr().err
    assert command(monkeypatch, "adapter", "show", tmp_path / "none") == 2
    assert "no such file" in capsys.readouterr().err
