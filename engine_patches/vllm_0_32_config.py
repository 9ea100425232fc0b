"""How MemLong configures a vLLM 0.32.0 engine, and what it refuses to run with."""

from __future__ import annotations

from pathlib import Path

from vllm import envs
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from memlong_vllm.config import UNSUPPORTED_ROPE, DeploymentConfig, MemoryConfig, bank_slots, resolve

logger = init_logger(__name__)

SCHEDULER = "memlong_vllm.scheduler.scheduler.MemLongScheduler"
ENDPOINTS = "memlong_endpoints"
# The operations of memlong_vllm.retrieval_attention; that module cannot be imported so early.
OPERATIONS = ("vllm::memlong_store", "vllm::memlong_scale_query", "vllm::memlong_retrieve")


class MemLongEngineConfig(VerifyAndUpdateConfig):
    """vLLM calls this once, in the front-end process, before it resolves platform and executor."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raises:
        ValueError: naming a setting that cannot be served, and what to do instead.
        """
        memory, deployment = resolve(vllm_config.model_config.hf_config, vllm_config.additional_config)
        _check_tenants(deployment)
        if deployment.memory_dir is not None and vllm_config.parallel_config.data_parallel_size > 1:
            raise ValueError("memlong.memory_dir is one engine's: remove it or --data-parallel-size")
        for unsupported, message in _refusals(vllm_config, memory):
            if unsupported:
                raise ValueError(f"MemLong does not support {message}")
        _check_retriever(memory, vllm_config.model_config.model)
        bank_slots(vllm_config)
        _warn(vllm_config, memory)
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        vllm_config.scheduler_config.async_scheduling = False
        # vLLM's default keeps, of a windowed prompt, only the blocks at its very end: of use to the
        # same prompt again, not to another question about the same document.
        vllm_config.cache_config.prefix_cache_retention_interval = (
            vllm_config.cache_config.prefix_cache_retention_interval or None
        )
        if current_platform.is_cuda_alike():
            _split_graphs(vllm_config)


def _refusals(vllm_config: VllmConfig, memory: MemoryConfig) -> list[tuple[bool, str]]:
    """(is it so, what it is) of everything vLLM would accept silently and serve wrongly."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    scheduler, num_kv_heads = vllm_config.scheduler_config, model.get_total_num_kv_heads()
    return [
        (model.runner_type != "generate", f"runner {model.runner_type!r}: use --runner generate"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism: use --tensor-parallel-size"),
        (
            memory.memory_adapter is not None and parallel.tensor_parallel_size > num_kv_heads,
            f"memory_adapter with more ranks than key-value heads: use --tensor-parallel-size {num_kv_heads} or less",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "decode context parallelism: remove --decode-context-parallel-size",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "prefill context parallelism: remove --prefill-context-parallel-size",
        ),
        (parallel.use_ubatching, "dual batch overlap: remove --enable-dbo"),
        (model.enable_sleep_mode, "sleep mode, which does not restore the memory: remove --enable-sleep-mode"),
        (vllm_config.lora_config is not None, "LoRA at run time: merge the adapter when converting"),
        (vllm_config.speculative_config is not None, "speculative decoding: remove --speculative-config"),
        (vllm_config.kv_transfer_config is not None, "KV connectors: remove --kv-transfer-config"),
        (vllm_config.ec_transfer_config is not None, "encoder cache connectors: remove --ec-transfer-config"),
        (
            cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
            f"kv_cache_dtype {cache.cache_dtype!r} with weights in {model.dtype}: use 'auto'",
        ),
        (model.enable_prompt_embeds, "prompt embeddings (they have no text): remove --enable-prompt-embeds"),
        (model.disable_sliding_window, "--disable-sliding-window: remove it, the local window is part of the model"),
        (model.skip_tokenizer_init, "--skip-tokenizer-init: remove it, chunks are retrieved by their text"),
        (
            scheduler.scheduler_cls is not None,
            f"another scheduler ({scheduler.scheduler_cls}): remove --scheduler-cls",
        ),
        (parallel.worker_cls != "auto", f"another worker class ({parallel.worker_cls}): remove --worker-cls"),
        (
            envs.VLLM_USE_BREAKABLE_CUDAGRAPH or envs.VLLM_BATCH_INVARIANT,
            "VLLM_USE_BREAKABLE_CUDAGRAPH and VLLM_BATCH_INVARIANT: unset them, retrieval cannot be captured",
        ),
        (
            model.hf_config.rope_parameters.get("rope_type", "default") in UNSUPPORTED_ROPE,
            f"RoPE scaling of the types {UNSUPPORTED_ROPE}, which rotate keys anew as a sequence grows",
        ),
        (bool(scheduler.async_scheduling), "asynchronous scheduling: remove --async-scheduling"),
    ]


def _check_tenants(deployment: DeploymentConfig) -> None:
    """Tenants are told apart by the middleware of the HTTP routes, which vLLM loads only by name."""
    if deployment.tenant_keys is None and deployment.tenant_header is None:
        return
    if ENDPOINTS not in (envs.VLLM_PLUGINS or ()):
        raise ValueError(
            f"memlong.tenant_keys and tenant_header take effect only with VLLM_PLUGINS=memlong,{ENDPOINTS}"
        )
    if envs.VLLM_USE_RUST_FRONTEND:
        raise ValueError("memlong.tenant_keys and tenant_header exclude VLLM_USE_RUST_FRONTEND, which has no plugins")
    from memlong_vllm.endpoints.tenants import tenancy_of  # Not needed by engines without tenants.

    tenancy_of(deployment)


def _check_retriever(memory: MemoryConfig, checkpoint: str) -> None:
    """A retriever given as a path must exist; hub names are tried when the engine starts."""
    model = memory.retriever.model
    looks_local = model.startswith(("/", "./", "../"))
    if looks_local and not Path(model).is_dir() and not (Path(checkpoint) / model).is_dir():
        raise ValueError(
            f"memlong.retriever.model = {model!r}: no such folder, here or in {checkpoint}. "
            "Set retriever_path in --additional-config '{\"memlong\": {…}}'"
        )


def _warn(vllm_config: VllmConfig, memory: MemoryConfig) -> None:
    trained = vllm_config.model_config.hf_config.backbone_max_position_embeddings
    if trained is not None and memory.local_window > trained:
        logger.warning(
            "memlong.local_window = %d exceeds the %d tokens the backbone was trained on: expect poor text beyond them",
            memory.local_window,
            trained,
        )


def _split_graphs(vllm_config: VllmConfig) -> None:
    """On CUDA, keep attention and the memory's operations out of captured graphs.

    They are Python: a full graph would replay what they did in the step it was captured in, so
    graphs are piecewise, whatever was asked for. (What they read lies in buffers that are
    refreshed in place, see :mod:`memlong_vllm.worker.step_buffers`.)

    Setting ``splitting_ops`` drops vLLM's defaults, so they are listed as well. Fusing attention
    with quantization would empty the list and ask for full graphs.
    """
    compilation = vllm_config.compilation_config
    cache_updates = ["vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update"]
    attention = compilation.splitting_ops or [*compilation._attention_ops, *cache_updates]
    compilation.splitting_ops = list(dict.fromkeys([*attention, *OPERATIONS]))
    compilation.pass_config.fuse_attn_quant = False
    mode = compilation.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        logger.info("MemLong runs with piecewise CUDA graphs, not %s", mode.name)
    if mode is None or mode.has_full_cudagraphs():
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
