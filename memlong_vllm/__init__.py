"""MemLong (Liu et al. 2024, arXiv 2408.16967) inside the vLLM engine."""

from memlong_vllm.config import ARCHITECTURE, MemLongConfig, MemoryConfig, RetrieverConfig

__all__ = ["MemLongConfig", "MemoryConfig", "RetrieverConfig", "register"]
__version__ = "0.1.0"


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

    engine_patches.apply()
    AutoConfig.register(MemLongConfig.model_type, MemLongConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "memlong_vllm.model:MemLongForCausalLM")
