"""What fine-tuning learns, as one file: made by training, merged by ``memlong-vllm convert``."""

from memlong_vllm.adapters.adapter import Adapter, LoraSettings
from memlong_vllm.adapters.adapter_file import load_adapter, save_adapter
from memlong_vllm.adapters.base_identity import BaseIdentity, backbone_identity
from memlong_vllm.adapters.errors import AdapterError
from memlong_vllm.adapters.merge import merge_adapter

__all__ = [
    "Adapter",
    "AdapterError",
    "BaseIdentity",
    "LoraSettings",
    "backbone_identity",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
]
