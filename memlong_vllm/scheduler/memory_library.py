"""The library of named memories of an engine."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from memlong_vllm.config import GIB, resolve
from memlong_vllm.memories.fingerprint import model_fingerprint
from memlong_vllm.memories.memory_format import MemoryFormat
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.quota import Quota

UNLIMITED = 1 << 62


def memory_format(vllm_config: Any, probe: np.ndarray) -> MemoryFormat:
    """What the memories of an engine look like.

    Args:
        vllm_config: vLLM's ``VllmConfig``.
        probe: the retriever's embedding of ``PROBE_TEXT``, [dimension] float32.

    Raises:
        FingerprintError: if the checkpoint has no weights on this machine's disk.
    """
    model = vllm_config.model_config
    memory, _ = resolve(model.hf_config, vllm_config.additional_config)
    return MemoryFormat(
        model_fingerprint=model_fingerprint(model.model, memory.memory_layer, memory.local_window),
        pooling=memory.retriever.pooling,
        max_length=memory.retriever.max_length,
        query_instruction=memory.retriever.query_instruction,
        dimension=len(probe),
        probe=tuple(probe.tolist()),
        chunk_size=memory.chunk_size,
        memory_layer=memory.memory_layer,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.hf_config.head_dim,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def open_library(vllm_config: Any, probe: np.ndarray) -> MemoryLibrary:
    """The library in ``memory_dir``, or one in a temporary folder that ends with this process.

    Raises:
        MemoryLibraryError: if the folder cannot be used or another engine uses it.
    """
    _, deployment = resolve(vllm_config.model_config.hf_config, vllm_config.additional_config)
    quota = Quota(
        max_bytes=int(deployment.memory_quota_gib * GIB) if deployment.memory_quota_gib else UNLIMITED,
        max_names=deployment.memory_quota_names or UNLIMITED,
    )
    made = memory_format(vllm_config, probe)
    if deployment.memory_dir is not None:
        return MemoryLibrary(Path(deployment.memory_dir), made, quota)
    folder = tempfile.TemporaryDirectory(prefix="memlong-memories-", ignore_cleanup_errors=True)
    library = MemoryLibrary(Path(folder.name), made, quota)
    weakref.finalize(library, folder.cleanup)
    return library
