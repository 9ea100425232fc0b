"""MemLong (Liu et al. 2024, arXiv 2408.16967) inside the vLLM engine."""

from importlib.metadata import version

from memlong_vllm.config import ARCHITECTURE, MemLongConfig, MemoryConfig, RetrieverConfig
from memlong_vllm.named import delete_memory, list_memories, memorize, memory_params

__all__ = [
    "MemLongConfig",
    "MemoryConfig",
    "RetrieverConfig",
    "delete_memory",
    "list_memories",
    "memorize",
    "memory_params",
    "register",
]
__version__ = version("memlong-vllm")


def register() -> None:
    """Make vLLM serve MemLong checkpoints.

    vLLM calls this in every process (entry point ``vllm.general_plugins``); calling it again
    changes nothing.

    Raises:
        engine_patches.UnsupportedVllmError: if the installed vLLM is not a tested version.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    import engine_patches
    import memlong_vllm.process_cpus  # noqa: F401 (remembers the CPUs of this process)

    engine_patches.apply()
    AutoConfig.register(MemLongConfig.model_type, MemLongConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "memlong_vllm.model:MemLongForCausalLM")
