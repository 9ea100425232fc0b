"""``memlong-vllm convert``: what it makes loads anywhere, and is the backbone as long as gates are 0."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from memlong_vllm.cli.convert import parse_setting
from memlong_vllm.config import MemLongConfig, MemoryConfig, MemoryConfigError
from memlong_vllm.conversion import ConversionError, convert, memlong_config, preset
from tests.checkpoints import MEMORY

SHAPES = {
    "grouped_query": {},
    "multi_query_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "multi_head_biased": {"num_key_value_heads": 4, "attention_bias": True},
}
# Runs where our package cannot be imported: the checkpoint must bring all it needs.
LOAD_ALONE = """
import sys
sys.modules["memlong_vllm"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
prompt = torch.arange(2, 42)[None]
generated = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
print(type(model).__module__, generated[0, 40:].tolist())
"""


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_gates_are_the_backbone(checkpoints: Any, shape: str) -> None:
    converted = AutoModelForCausalLM.from_pretrained(
        checkpoints.memlong(gates=0.0, shape=SHAPES[shape]), trust_remote_code=True
    )
    base = AutoModelForCausalLM.from_pretrained(checkpoints.base(**SHAPES[shape]))
    tokens = torch.arange(2, 2 + MEMORY["local_window"])[None]
    torch.testing.assert_close(converted(tokens).logits, base(tokens).logits, rtol=0, atol=1e-5)


def test_loads_without_this_package(checkpoints: Any, tmp_path: Path) -> None:
    model = checkpoints.memlong(gates=0.0)
    command = [sys.executable, "-c", LOAD_ALONE, str(model)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    module, _, generated = result.stdout.strip().splitlines()[-1].partition(" ")
    assert module.startswith("transformers_modules.")
    base = AutoModelForCausalLM.from_pretrained(checkpoints.base())
    expected = base.generate(torch.arange(2, 42)[None], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert json.loads(generated) == expected[0, 40:].tolist()


def test_what_is_written(checkpoints: Any) -> None:
    path = checkpoints.memlong(gates=0.0)
    config = json.loads((path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("memlong", ["MemLongForCausalLM"])
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_memlong.MemLongForCausalLM"
    assert config["memlong"]["retriever"]["pooling"] == "mean"
    assert config["backbone_max_position_embeddings"] == 512
    weights = load_file(path / "model.safetensors")
    gates = {name for name in weights if "memory" in name}
    assert gates == {f"model.layers.{n}.self_attn.memory_gate" for n in MEMORY["retrieval_layers"]}
    assert not any(weights[name].any() for name in gates)
    base = load_file(checkpoints.base() / "model.safetensors")
    assert weights.keys() - gates == base.keys()
    assert all(torch.equal(weights[name], base[name]) for name in base)


def test_generation_settings_are_kept(checkpoints: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoints.base(), base)
    settings = {"eos_token_id": [1, 5], "temperature": 0.6, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(settings))
    convert(base, tmp_path / "made", settings=MEMORY)
    kept = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    assert {name: kept[name] for name in settings} == settings


@pytest.mark.parametrize("name", ["paper", "released", "small"])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 5, 22, 26, 30, 32, 80])
def test_presets_fit_any_depth(name: str, num_layers: int) -> None:
    memory = MemoryConfig.from_dict(preset(name, num_layers, 2048), num_layers)
    assert memory.retrieval_layers[-1] == num_layers - 1


def test_presets_of_the_paper_and_the_released_script() -> None:
    paper, released = preset("paper", 26, 2048), preset("released", 26, 2048)
    assert (paper["memory_layer"], paper["retrieval_layers"]) == (12, [13, 17, 21, 25])
    assert (released["memory_layer"], released["retrieval_layers"]) == (13, [13, 17, 21, 25])
    assert paper["local_window"] == 2048


def test_rope_scaling_is_carried_over() -> None:
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    base = LlamaConfig(num_hidden_layers=4, rope_parameters=rope)
    config = memlong_config(base, preset("paper", 4, 2048), None)
    assert isinstance(config, MemLongConfig)
    assert {name: config.rope_parameters[name] for name in rope} == rope
    assert config.max_position_embeddings == 32768 + 2048


def test_refusals(checkpoints: Any, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no such folder"):
        convert(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConversionError, match="not an empty folder"):
        convert(checkpoints.base(), tmp_path / "full")
    with pytest.raises(MemoryConfigError, match=r"memlong\.top_k = 'many'"):
        convert(checkpoints.base(), tmp_path / "out", settings=MEMORY | {"top_k": "many"})
    for length in (0, -5):
        with pytest.raises(ConversionError, match=f"--max-length {length}: must be positive"):
            convert(checkpoints.base(), tmp_path / "out", settings=MEMORY, max_length=length)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConversionError, match="dynamic"):
        memlong_config(LlamaConfig(rope_parameters=dynamic), preset("paper", 32, 2048), None)
    other = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=len(checkpoints.tokenizer))
    GPT2LMHeadModel(other).save_pretrained(tmp_path / "gpt2")
    checkpoints.tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConversionError, match="'gpt2' is not of the Llama architecture"):
        convert(tmp_path / "gpt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_are_json_or_text() -> None:
    assert parse_setting("top_k=4") == ("top_k", 4)
    assert parse_setting("retrieval_layers=[1, 2]") == ("retrieval_layers", [1, 2])
    assert parse_setting("retriever.model=/a/b=c") == ("retriever.model", "/a/b=c")


def test_command_line(checkpoints: Any, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "memlong-vllm"), "convert", str(checkpoints.base())]
    settings = [f"--set={name}={json.dumps(value)}" for name, value in MEMORY.items()]
    result = subprocess.run([*command, str(tmp_path / "made"), *settings], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "made" / "config.json").read_text())["memlong"]["top_k"] == MEMORY["top_k"]
    result = subprocess.run([*command, str(tmp_path / "made")], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "not an empty folder" in result.stdout + result.stderr
