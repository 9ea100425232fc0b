"""What the engine sets up, and what it refuses, before anything is built."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.config.compilation import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

import engine_patches
import memlong_vllm
from engine_patches import vllm_0_32_config


def config(model: Path, **options: Any) -> Any:
    return EngineArgs(model=str(model), max_model_len=2048, **options).create_engine_config()


def test_defaults(model: Path) -> None:
    resolved = config(model)
    assert resolved.scheduler_config.scheduler_cls.endswith("MemLongScheduler")
    assert resolved.scheduler_config.async_scheduling is False
    assert resolved.cache_config.enable_prefix_caching is True


REFUSED = {
    "pipeline parallelism": {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
    "LoRA": {"enable_lora": True},
    "speculative decoding": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "KV connectors": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "kv_cache_dtype 'fp8'": {"kv_cache_dtype": "fp8"},
    "kv_cache_dtype 'bfloat16' with weights in torch.float32": {"kv_cache_dtype": "bfloat16", "dtype": "float32"},
    "prompt embeddings": {"enable_prompt_embeds": True},
    "dual batch overlap": {"enable_dbo": True},
    "disable-sliding-window": {"disable_sliding_window": True},
    "another scheduler": {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
    "another worker class": {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
    "asynchronous scheduling": {"async_scheduling": True},
    "skip-tokenizer-init": {"skip_tokenizer_init": True},
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(model: Path, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        config(model, **REFUSED[what])


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


@pytest.mark.parametrize("settings", [{"tenant_header": "X-Team"}, {"tenant_keys": "keys.json"}])
def test_tenants_need_the_routes_that_tell_them_apart(
    model: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
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
