"""MemLong as a vLLM model: Llama with a local window, a memory layer and retrieval layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.communication_op import tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

from memlong_vllm.config import (
    MemLongConfig,
    MemoryConfig,
    bank_slots,
    num_adapted_chunks,
    num_staging_tokens,
    request_limits,
    resolve,
)
from memlong_vllm.kernels.head_shape import HeadShape
from memlong_vllm.local_attention import choose_backend, window_backend
from memlong_vllm.retrieval_attention import MemoryStore, RetrievalAttention
from memlong_vllm.worker.adaptation import Adaptation
from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.host_memory import allocate_host
from memlong_vllm.worker.step_memory import StepMemory
from memlong_vllm.worker.transfer import RankHeads

if TYPE_CHECKING:
    from memlong_vllm.kernels.launcher import RetrievalKernel
    from memlong_vllm.kernels.retrieval_cpu import CPURetrievalKernel

logger = init_logger(__name__)


def rotary_embedding(config: MemLongConfig, padded_dim: int, max_position: int) -> RotaryEmbedding:
    """RoPE of a checkpoint on the first ``head_dim`` of ``padded_dim`` dimensions.

    Args:
        max_position: positions the table must have.

    Raises:
        ValueError: if vLLM's table of this RoPE type ends before ``max_position``.
    """
    parameters = {**config.rope_parameters, "rope_dim": config.head_dim}
    rotary = get_rope(padded_dim, max_position=max_position, rope_parameters=parameters)
    if isinstance(rotary, YaRNScalingRotaryEmbedding) and rotary.cos_sin_cache.shape[0] < max_position:
        # vLLM ends YaRN's table at the scaled training length; its formula does not end there.
        positions = torch.arange(max_position, dtype=torch.float32)
        angles = torch.outer(positions, rotary._compute_inv_freq(rotary.scaling_factor))
        table = torch.cat((angles.cos(), angles.sin()), dim=-1) * rotary.mscale
        rotary.cos_sin_cache = table.to(rotary.cos_sin_cache)
    if rotary.cos_sin_cache.shape[0] < max_position:
        reach = rotary.cos_sin_cache.shape[0]
        raise ValueError(f"RoPE {parameters} reaches {reach} positions, not {max_position}: lower --max-model-len")
    if current_platform.is_cpu() and not _is_rotated_by_cpu_kernel(rotary):
        rotary.__dict__["forward_cpu"] = rotary.__dict__["_forward_method"] = rotary.forward_native
    return rotary


def _is_rotated_by_cpu_kernel(rotary: RotaryEmbedding) -> bool:
    """vLLM's kernel for CPUs writes eight numbers of 16 bits at once, and the process ends with a segmentation
    fault where the second half of a row does not begin at a multiple of these 16 bytes: in bfloat16, and in
    float16 but for what its compiler made of the same store."""
    return rotary.dtype.itemsize != 2 or rotary.rotary_dim // 2 % 8 == 0


class MemLongAttention(nn.Module):
    """Self-attention of one layer, with whatever part that layer has in the memory."""

    def __init__(
        self,
        config: MemLongConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: QuantizationConfig | None = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        *,
        cache_config: CacheConfig,
        prefix: str = "",
        attn_type: str = "decoder",
    ) -> None:
        super().__init__()
        vllm_config = get_current_vllm_config()
        memory, _ = resolve(config, vllm_config.additional_config)
        head_dim, dtype = config.head_dim, torch.get_default_dtype()
        backend, padded = choose_backend(head_dim, dtype, cache_config.cache_dtype)
        if padded != head_dim and quant_config is not None:
            raise ValueError(f"head_dim {head_dim} must be padded to {padded}, which quantized weights do not allow")
        self._add_projections(hidden_size, padded, (num_heads, num_kv_heads), (bias, bias_o_proj), quant_config, prefix)
        max_position = max(max_position_embeddings, vllm_config.model_config.max_model_len)
        self.rotary_emb = rotary_embedding(config, padded, max_position)
        layer_idx = extract_layer_index(prefix)
        self.is_retrieval_layer = layer_idx in memory.retrieval_layers
        self.fusion = memory.fusion
        keeps_lse = self.is_retrieval_layer and memory.fusion != "gated"
        self.attn = Attention(
            self.num_heads,
            padded,
            head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=memory.local_window,
            prefix=f"{prefix}.attn",
            attn_backend=window_backend(backend, dtype, keeps_lse),
        )
        self._add_memory_parts(memory, layer_idx, num_kv_heads, head_dim, prefix)

    def _add_projections(
        self,
        hidden_size: int,
        head_dim: int,
        nums_heads: tuple[int, int],
        biases: tuple[bool, bool],
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        """Projections of all ranks' ``nums_heads`` (of queries, of keys and values), and this rank's part of them.

        Args:
            head_dim: with padding.
            biases: of q, k and v; of o.
        """
        (num_heads, num_kv_heads), tp_size = nums_heads, get_tensor_model_parallel_world_size()
        self.num_heads, self.num_kv_heads = num_heads // tp_size, max(1, num_kv_heads // tp_size)
        self.q_size, self.kv_size = self.num_heads * head_dim, self.num_kv_heads * head_dim
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            head_dim,
            num_heads,
            num_kv_heads,
            bias=biases[0],
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_dim, hidden_size, bias=biases[1], quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )

    def _add_memory_parts(
        self, memory: MemoryConfig, layer_idx: int, total_num_kv_heads: int, head_dim: int, prefix: str
    ) -> None:
        """The part this layer has in the memory, findable by name in the forward context."""
        layers = get_current_vllm_config().compilation_config.static_forward_context
        padded = self.attn.head_size
        self.store_name, self.memory_name = f"{prefix}.store", f"{prefix}.memory"
        self.store: MemoryStore | None = None
        if layer_idx == memory.memory_layer:
            self.store = MemoryStore(self.num_kv_heads, head_dim, padded)
            layers[self.store_name] = self.store
        if self.is_retrieval_layer:
            self.memory = RetrievalAttention(
                memory,
                self.num_heads,
                self.num_kv_heads,
                total_num_kv_heads,
                head_dim,
                padded,
                self.rotary_emb,
                memory.retrieval_layers.index(layer_idx),
            )
            self.memory.local_impl = self.attn.impl
            layers[self.memory_name] = self.memory

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.store is not None:
            torch.ops.vllm.memlong_store(key, value, self.store_name)
        unrotated = query.clone() if self.is_retrieval_layer else query
        query, key = self.rotary_emb(positions, query, key)
        if self.is_retrieval_layer and self.fusion == "scaled_logits":
            torch.ops.vllm.memlong_scale_query(query, self.memory_name)
        attended = self.attn(query, key, value)
        if self.is_retrieval_layer:
            torch.ops.vllm.memlong_retrieve(unrotated, attended, self.memory_name)
        output, _ = self.o_proj(attended)
        return output


class MemLongDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: MemLongConfig | None = None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=MemLongAttention)


def make_step_memory(vllm_config: VllmConfig, layers: Sequence[RetrievalAttention], device: torch.device) -> StepMemory:
    """This rank's bank and all buffers of the memory. Nothing is allocated later on the device
    but what a step's attention needs for a moment, so vLLM's memory profile sees it all.

    Args:
        layers: the retrieval layers, in their order.
    """
    model_config = vllm_config.model_config
    memory, deployment = resolve(model_config.hf_config, vllm_config.additional_config)
    limits = request_limits(memory, deployment)
    num_kv_heads = model_config.get_num_kv_heads(vllm_config.parallel_config)
    view = get_accelerator_view_from_cpu_tensor if device.type != "cpu" else None
    bank = MemoryBank(
        bank_slots(vllm_config),
        memory.chunk_size,
        num_kv_heads,
        model_config.hf_config.head_dim,
        model_config.dtype,
        device,
        partial(allocate_host, view=view) if deployment.bank_device == "cpu" else None,
    )
    heads = rank_heads(model_config.get_total_num_kv_heads(), num_kv_heads)
    staging_tokens = num_staging_tokens(limits, deployment)
    adaptation = None
    if memory.memory_adapter is not None:
        adaptation = Adaptation(layers, heads, staging_tokens, tensor_model_parallel_all_gather, memory.chunk_size)
    scheduler = vllm_config.scheduler_config
    return StepMemory(
        bank,
        scheduler.max_num_seqs,
        limits.top_k,
        scheduler.max_num_batched_tokens,
        staging_tokens,
        heads,
        adaptation,
        num_adapted_chunks(vllm_config),
    )


def make_kernel(
    vllm_config: VllmConfig, layer: RetrievalAttention, device: torch.device
) -> RetrievalKernel | CPURetrievalKernel | None:
    """What retrieval layers like ``layer`` attend with; None where that is PyTorch.

    Triton's kernel runs on GPUs, and for tests under its interpreter (``TRITON_INTERPRET=1``).
    """
    rotary, dtype = layer.rotary_emb, vllm_config.model_config.dtype
    if type(rotary).forward_native is not RotaryEmbedding.forward_native or not rotary.is_neox_style:
        return None
    dims = layer.head_dim, layer.padded_dim, rotary.rotary_dim
    heads = HeadShape(layer.num_heads, layer.num_kv_heads, *dims)
    # Only where they are used: there may be no Triton, or no Numba.
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from memlong_vllm.kernels.launcher import RetrievalKernel

        _, deployment = resolve(vllm_config.model_config.hf_config, vllm_config.additional_config)
        return RetrievalKernel(heads, layer.config, request_limits(layer.config, deployment).top_k, dtype, device)
    if device.type == "cpu":
        from memlong_vllm.kernels.retrieval_cpu import CPURetrievalKernel

        if CPURetrievalKernel.suits(layer.config, dtype):
            return CPURetrievalKernel(heads, layer.config, dtype)
    return None


def rank_heads(total_num_kv_heads: int, num_kv_heads: int) -> RankHeads:
    """The key-value heads that QKVParallelLinear gives this rank. Where ranks outnumber heads,
    neighbours have the same."""
    rank, num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    num_replicas = max(1, num_ranks // total_num_kv_heads)
    return RankHeads(rank, num_ranks, rank // num_replicas * num_kv_heads)


class MemLongForCausalLM(LlamaForCausalLM):
    """Llama with a MemLong memory.

    Attributes:
        step_memory: this rank's bank and, during a step, what the step does with it.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=MemLongDecoderLayer)
        retrieval_layers = [module for module in self.modules() if isinstance(module, RetrievalAttention)]
        device = next(self.parameters()).device
        self.step_memory = make_step_memory(vllm_config, retrieval_layers, device)
        kernel = make_kernel(vllm_config, retrieval_layers[0], device)
        self._is_loaded = False
        for module in self.modules():
            if isinstance(module, RetrievalAttention | MemoryStore):
                module.step_memory = self.step_memory
            if isinstance(module, RetrievalAttention):
                module.kernel = kernel
        sizes = {name: f"{size / 2**30:.2f} GiB" for name, size in self.step_memory.num_bytes().items()}
        logger.info("Memory: %d chunks a rank, %s", self.step_memory.bank.keys.shape[1], sizes)

    @staticmethod
    def get_model_state_cls() -> type:
        from memlong_vllm.worker.model_state import MemLongModelState

        return MemLongModelState

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint of :mod:`memlong_vllm.conversion`, padding heads where needed.

        Later calls may bring any part of the weights. Decoding sequences then read their retrieved
        chunks anew, as adapted by these weights; what is stored stays what it was.

        Raises:
            ValueError: if memory parameters (gates at least) are missing at the first call.
        """
        self.step_memory.weights_changed()
        loaded = super().load_weights(self._engine_weight(name, tensor) for name, tensor in weights)
        wanted = {name for name, _ in self.named_parameters() if ".memory." in name}
        missing = [] if self._is_loaded else sorted(wanted - loaded)
        if missing:
            shown = ", ".join(name.replace(".memory.", ".") for name in missing[:3])
            raise ValueError(
                f"the checkpoint lacks {len(missing)} memory parameters ({shown}, …): it was not made for these "
                "retrieval_layers and fusion settings; make one with 'memlong-vllm convert'"
            )
        self._is_loaded = True
        return loaded

    def _engine_weight(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """A checkpoint's weight under its name and in its shape here."""
        head, _, leaf = name.rpartition(".")
        if leaf.startswith("memory_"):
            return f"{head}.memory.{leaf}", tensor
        if any(f".{projection}_proj." in name for projection in "qkv"):
            return name, self._pad_heads(tensor)
        if name.endswith(".o_proj.weight"):
            return name, self._pad_heads(tensor.T).T
        return name, tensor

    def _pad_heads(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [heads·head_dim, ...] -> [heads·padded_dim, ...], zeros at the end of each head."""
        head_dim = self.config.head_dim
        padding = self.model.layers[0].self_attn.attn.head_size - head_dim
        if padding == 0:
            return rows
        heads = rows.reshape(rows.shape[0] // head_dim, head_dim, -1)
        return F.pad(heads, (0, 0, 0, padding)).reshape(-1, *rows.shape[1:])
