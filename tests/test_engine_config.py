"""What the engine sets up, and what it refuses, before anything is built."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm import SamplingParams
from vllm.config.compilation import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

import engine_patches
import memlong_vllm
from engine_patches import vllm_0_32, vllm_0_32_config
from memlong_vllm.request_settings import RequestSettingsError


def config(model: Path, **options: Any) -> Any:
    return EngineArgs(model=str(model), max_model_len=2048, **options).create_engine_config()


def test_defaults(model: Path) -> None:
    resolved = config(model)
    assert resolved.scheduler_config.scheduler_cls.endswith("MemLongScheduler")
    assert resolved.scheduler_config.async_scheduling is False
    assert resolved.cache_config.enable_prefix_caching is True


MULTIPROCESSING = {"distributed_executor_backend": "mp"}
# What is refused and what to do instead, as patterns, with what asks for it.
REFUSED = {
    "pipeline parallelism: use --tensor-parallel-size": {"pipeline_parallel_size": 2} | MULTIPROCESSING,
    "decode context parallelism: remove": {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
    | MULTIPROCESSING,
    "prefill context parallelism: remove": {"prefill_context_parallel_size": 2} | MULTIPROCESSING,
    "runner 'pooling': use --runner generate": {"runner": "pooling"},
    "LoRA at run time: merge the adapter when converting": {"enable_lora": True},
    "speculative decoding: remove": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "KV connectors: remove": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "encoder cache connectors: remove": {"ec_transfer_config": {"ec_connector": "ECExample", "ec_role": "ec_both"}},
    "kv_cache_dtype 'fp8' .*: use 'auto'": {"kv_cache_dtype": "fp8"},
    "kv_cache_dtype 'bfloat16' with weights in torch.float32: use 'auto'": {
        "kv_cache_dtype": "bfloat16",
        "dtype": "float32",
    },
    "prompt embeddings.*: remove": {"enable_prompt_embeds": True},
    "dual batch overlap: remove": {"enable_dbo": True},
    "--disable-sliding-window: remove": {"disable_sliding_window": True},
    "another scheduler .*: remove": {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
    "another worker class .*: remove": {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
    "asynchronous scheduling: remove": {"async_scheduling": True},
    "--skip-tokenizer-init: remove": {"skip_tokenizer_init": True},
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(model: Path, what: str) -> None:
    with pytest.raises(ValueError, match=f"MemLong does not support {what}"):
        config(model, **REFUSED[what])


def test_adapters_need_a_head_for_each_rank(checkpoints: Any) -> None:
    model = checkpoints.memlong(memory_adapter="linear")
    config(model, tensor_parallel_size=2, **MULTIPROCESSING)
    with pytest.raises(ValueError, match=r"memory_adapter with more ranks than .* --tensor-parallel-size 2 or less"):
        config(model, tensor_parallel_size=4, **MULTIPROCESSING)


def test_quantised_weights_cannot_be_padded(checkpoints: Any) -> None:
    model = checkpoints.memlong(shape={"head_dim": 20})
    with pytest.raises(ValueError, match="head_dim 20 must be padded to 32, which quantized weights do not allow"):
        vllm.LLM(str(model), quantization="fp8", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=2**26)


def test_sleep_is_refused(model: Path) -> None:
    engine_config = config(model)
    engine_config.model_config.enable_sleep_mode = True  # CPUs have none: vLLM itself would refuse it here.
    with pytest.raises(ValueError, match=r"MemLong does not support sleep mode.*remove --enable-sleep-mode"):
        vllm_0_32_config.MemLongEngineConfig.verify_and_update_config(engine_config)


@pytest.mark.parametrize("name", ["VLLM_BATCH_INVARIANT", "VLLM_USE_BREAKABLE_CUDAGRAPH"])
def test_refused_variables(model: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"MemLong does not support .*{name}.*: unset"):
        config(model)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_rotates_anew_is_refused(checkpoints: Any, tmp_path: Path, rope_type: str) -> None:
    """Also in a checkpoint that was edited after its conversion."""
    edited = tmp_path / "edited"
    shutil.copytree(checkpoints.memlong(), edited)
    values = json.loads((edited / "config.json").read_text())
    factors = {"short_factor": [1.0] * 16, "long_factor": [1.0] * 16, "original_max_position_embeddings": 512}
    values["rope_parameters"] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0} | factors
    (edited / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="MemLong does not support RoPE scaling of the types"):
        config(edited)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, r"memlong\.top_k = 0"),
        ({"topk": 4}, r"memlong\.topk = 4: unknown field"),
        ({"local_window": 100}, r"memlong\.local_window = 100: must be a multiple of chunk_size"),
        ({"retrieval_layers": [4, 9]}, "the backbone has layers 0 to 4"),
        ({"bank_gib": 1e-6}, r"memlong\.bank_gib = 1e-06"),
        ({"retriever_path": "./nowhere"}, "no such folder"),
    ],
)
def test_invalid_settings_are_named(model: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(model, additional_config={"memlong": settings})


def test_a_window_beyond_the_training_length_warns(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("engine_patches.vllm_0_32_config")
    logger.addHandler(caplog.handler)
    config(model, additional_config={"memlong": {"local_window": 1024}})
    logger.removeHandler(caplog.handler)
    assert "local_window = 1024 exceeds the 512 tokens the backbone was trained on" in caplog.text


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        (None, "PIECEWISE"),
        ("FULL", "PIECEWISE"),
        ("FULL_DECODE_ONLY", "PIECEWISE"),
        ("FULL_AND_PIECEWISE", "PIECEWISE"),
        ("PIECEWISE", "PIECEWISE"),
        ("NONE", "NONE"),
    ],
)
@pytest.mark.parametrize("listed", [None, [], ["vllm::unified_attention_with_output", "vllm::another"]])
def test_on_cuda_graphs_leave_out_attention_and_memory(
    asked: str | None, served: str, listed: list[str] | None
) -> None:
    """What vLLM splits at by default is split at too; full graphs would replay one step's reads."""
    compilation = CompilationConfig(splitting_ops=listed)
    compilation.cudagraph_mode = None if asked is None else CUDAGraphMode[asked]
    compilation.pass_config.fuse_attn_quant = True  # As vLLM has it for quantised weights; it would empty the list.
    vllm_0_32_config._split_graphs(SimpleNamespace(compilation_config=compilation))
    assert compilation.cudagraph_mode == CUDAGraphMode[served]
    assert compilation.splitting_ops is not None
    expected = listed or [*CompilationConfig._attention_ops, "vllm::unified_kv_cache_update"]
    assert {*expected, *vllm_0_32_config.OPERATIONS} <= set(compilation.splitting_ops)
    before = list(compilation.splitting_ops)
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.set_splitting_ops_for_v1(all2all_backend="none")
    assert compilation.splitting_ops == before, "vLLM resolves its settings after the hook"
    assert compilation.cudagraph_mode == CUDAGraphMode[served]


def test_the_operations_to_split_at_are_those_that_exist() -> None:
    importlib.import_module("memlong_vllm.retrieval_attention")
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vllm::memlong_")}
    assert set(vllm_0_32_config.OPERATIONS) == registered


def test_another_vllm_version_is_refused() -> None:
    with pytest.raises(engine_patches.UnsupportedVllmError, match=r"0\.33\.1.*tested with: 0\.32\.0"):
        engine_patches.module_name("0.33.1")
    assert engine_patches.module_name("0.32.0+cpu") == "engine_patches.vllm_0_32"


def test_an_untested_version_stops_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(vllm, "__version__", "0.31.0")
        with pytest.raises(RuntimeError, match=r"does not support vLLM 0\.31\.0"):
            importlib.reload(engine_patches)
    importlib.reload(engine_patches)


def test_registering_twice_changes_nothing() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    memlong_vllm.register()
    patched = GPUModelRunner.execute_model
    memlong_vllm.register()
    assert GPUModelRunner.execute_model is patched


def test_named_memories_are_for_one_engine(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memlong\.memory_dir .* --data-parallel-size"):
        config(model, data_parallel_size=2, additional_config={"memlong": {"memory_dir": str(tmp_path)}})
    parameters = SamplingParams(extra_args={"memory_read": "book"})
    vllm_0_32._check_settings(config(model), parameters)
    with pytest.raises(RequestSettingsError, match="memory_read and memory_write are for servers of one engine"):
        vllm_0_32._check_settings(config(model, data_parallel_size=2), parameters)


@pytest.mark.parametrize("settings", [{"tenant_header": "X Team"}, {"tenant_keys": "none.json"}])
def test_tenants_that_cannot_be_told_apart_stop_the_start(
    model: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "memlong,memlong_endpoints")
    with pytest.raises(ValueError, match=next(iter(settings))):
        config(model, additional_config={"memlong": settings})


@pytest.mark.parametrize("settings", [{"tenant_header": "X-Team"}, {"tenant_keys": "keys.json"}])
def test_tenants_need_the_routes_that_tell_them_apart(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys.json").write_text(json.dumps({"key": "tenant"}))
    for plugins in (None, "memlong"):
        if plugins is not None:
            monkeypatch.setenv("VLLM_PLUGINS", plugins)
        with pytest.raises(ValueError, match="VLLM_PLUGINS=memlong,memlong_endpoints"):
            config(model, additional_config={"memlong": settings})
    monkeypatch.setenv("VLLM_PLUGINS", "memlong,memlong_endpoints")
    config(model, additional_config={"memlong": settings})
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND"):
        config(model, additional_config={"memlong": settings})
