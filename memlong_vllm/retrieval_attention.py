"""Attention of a retrieval layer to the bank, as an opaque operation beside vLLM's attention.

Three operations are registered with PyTorch, so that compiled graphs call them as they are:
``memlong_store`` (memory layer), ``memlong_scale_query`` (fusion ``scaled_logits`` only) and
``memlong_retrieve``. Each finds its layer by name in vLLM's forward context.

On GPUs all that the layer does is one Triton kernel (:mod:`memlong_vllm.kernels`), and so it is on CPUs
with AVX-512; on others only for decoding sequences. What no kernel does, and everything in a layer whose
``kernel`` is set to None to compare the two, is :mod:`memlong_vllm.memory_attention` or PyTorch's flash attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from memlong_vllm.config import MemoryConfig
from memlong_vllm.memory_attention import attend, attend_chunks, attend_with_lse, merge
from memlong_vllm.worker.step_memory import StepMemory
from memlong_vllm.worker.step_metadata import StepMetadata

if TYPE_CHECKING:
    from memlong_vllm.kernels.launcher import RetrievalKernel
    from memlong_vllm.kernels.retrieval_cpu import CPURetrievalKernel

# So many tokens of a span are attended at once, which bounds the scores that exist at a time; how
# many spans there are at once is bounded by what the group's chunks are read into.
_MAX_SPAN_TOKENS = 128


class RetrievalAttention(nn.Module):
    """What one retrieval layer adds to its local attention. One a layer and rank.

    Parameters carry the checkpoint's names in the layer that owns them:

    * ``memory_gate`` [H], 0 at first (gated: tanh of it weighs memory, Eq. 4-5);
    * ``memory_bias`` [H], with ``memory_bias``: added to the memory scores;
    * ``memory_k_adapter``, ``memory_v_adapter`` [R·d, w·2·R·d] over all ranks' heads, with
      ``memory_adapter`` of width w: make this layer's keys and values of the stored ones
      (:class:`memlong_vllm.worker.adaptation.Adaptation`).

    Args:
        num_heads, num_kv_heads: this rank's.
        head_dim: the model's; ``padded_dim`` is what query and output rows have.

    Attributes:
        step_memory: the rank's; set when the model is complete.
        retrieval_idx: which of the retrieval layers this is, counted from 0.
        kernel: the rank's, set with ``step_memory``; None: attend with PyTorch.
        local_impl: the implementation of local attention, whose ``lse`` the joint fusions read.
    """

    def __init__(
        self,
        config: MemoryConfig,
        num_heads: int,
        num_kv_heads: int,
        total_num_kv_heads: int,
        head_dim: int,
        padded_dim: int,
        rotary_emb: RotaryEmbedding,
        retrieval_idx: int,
    ) -> None:
        super().__init__()
        self.config, self.retrieval_idx = config, retrieval_idx
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.padded_dim = head_dim, padded_dim
        self.rotary_emb = rotary_emb
        # Not its call, which in compiled models would compile again while requests are served.
        is_plain = type(rotary_emb).forward_native is RotaryEmbedding.forward_native
        is_kernel_used = is_plain and current_platform.is_cpu()
        self._rotate = rotary_emb.forward_cpu if is_kernel_used else rotary_emb.forward_native
        self.step_memory: StepMemory | None = None
        self.kernel: RetrievalKernel | CPURetrievalKernel | None = None
        self.local_impl: Any = None
        self.memory_gate = self._head_parameter()
        if config.memory_bias:
            self.memory_bias = self._head_parameter()
        if config.memory_adapter == "linear":
            size = total_num_kv_heads * head_dim
            shape = (size, config.memory_adapter_width * 2 * size)
            self.memory_k_adapter = nn.Parameter(torch.zeros(shape), requires_grad=False)
            self.memory_v_adapter = nn.Parameter(torch.zeros(shape), requires_grad=False)

    def _head_parameter(self) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(self.num_heads), requires_grad=False)

        def load(target: nn.Parameter, loaded: torch.Tensor) -> None:
            first = get_tensor_model_parallel_rank() * self.num_heads
            target.data.copy_(loaded.narrow(0, first, self.num_heads))

        set_weight_attrs(parameter, {"weight_loader": load})
        return parameter

    def scale_query(self, query: torch.Tensor) -> None:
        """Fusion ``scaled_logits``: weigh the local scores of tokens that have memory, in place.

        Args:
            query: [num_tokens, H·padded_dim], rotated.
        """
        rows = query.view(query.shape[0], self.num_heads, self.padded_dim)
        weight = 1 - torch.sigmoid(self.memory_gate.float())
        metadata = self._metadata()
        if metadata is not None:
            token_idx = metadata.token_idx
            rows[token_idx] = (rows[token_idx] * weight[:, None]).to(rows.dtype)

    def retrieve(self, query: torch.Tensor, output: torch.Tensor) -> None:
        """Fuse memory into the local attention's output, in place.

        Args:
            query: [num_tokens, H·padded_dim], un-rotated.
            output: [num_tokens, H·padded_dim], the output of local attention.
        """
        metadata = self._metadata()
        if self.kernel is not None:
            self._launch(self.kernel, query, output)
            if self.kernel.reads_all:
                return
        if metadata is None:
            return
        assert self.step_memory is not None
        groups = metadata.groups if self.kernel is None else metadata.groups_of_slots
        rows = output.view(output.shape[0], self.num_heads, self.padded_dim)
        for group in groups:
            keys, values = self.step_memory.read(group.source, self.retrieval_idx)
            for first in range(0, group.token_idx.shape[1], _MAX_SPAN_TOKENS):
                part = slice(first, first + _MAX_SPAN_TOKENS)
                self._retrieve(query, rows, group.token_idx[:, part], group.positions[:, part], keys, values)

    def _metadata(self) -> StepMetadata | None:
        assert self.step_memory is not None, "the model was used before its bank was attached"
        return self.step_memory.metadata

    def _launch(self, kernel: RetrievalKernel | CPURetrievalKernel, query: torch.Tensor, output: torch.Tensor) -> None:
        assert self.step_memory is not None
        is_dummy_run = self._metadata() is None
        if is_dummy_run:
            reads = self.step_memory.nothing_stored(kernel.take_warm_up_spans())
        else:
            reads = self.step_memory.stored(self.retrieval_idx, kernel.reads_all)
        local_lse = None
        if self.config.fusion != "gated":
            no_lse = (1, self.num_heads)
            local_lse = query.new_empty(no_lse, dtype=torch.float32) if is_dummy_run else self.local_impl.lse
        parameters = self._kernel_parameters()
        for spans, stored in reads:
            kernel.attend(query, output, spans, stored, *parameters, local_lse)

    def _kernel_parameters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Cosines and sines, gate and bias, as kernels take them."""
        bias = self.memory_bias if self.config.memory_bias else None
        return self.rotary_emb.cos_sin_cache, self.memory_gate, bias

    def _retrieve(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Tokens [G, n] of the batch, at local positions [G, n], attend to [G, R, M, d]."""
        token_idx = tokens.flatten()
        rotated, _ = self._rotate(positions.flatten(), query[token_idx])
        local_query = rotated.view(*tokens.shape, self.num_heads, self.padded_dim)[..., : self.head_dim]
        local = rows[token_idx, :, : self.head_dim]
        fused = self._fuse(local_query, keys, values, local, token_idx)
        rows[token_idx, :, : self.head_dim] = fused.to(rows.dtype)

    def _fuse(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        local: torch.Tensor,
        token_idx: torch.Tensor,
    ) -> torch.Tensor:
        """Local and memory attention of tokens [G·n], joined: [G·n, H, d]."""
        scale = self.head_dim**-0.5
        if self.config.fusion == "gated":
            # A bias on all memory scores of a head leaves this softmax as it is.
            if self.config.memory_softmax == "chunk":
                memory = attend_chunks(query, keys, values, scale, self.config.chunk_size)
            else:
                memory = self._attend(query, keys, values, scale)
            gate = torch.tanh(self.memory_gate.float())[:, None]
            return local + (gate * memory.flatten(0, 1)).to(local.dtype)
        weight = torch.ones_like(self.memory_gate, dtype=torch.float32)
        if self.config.fusion == "scaled_logits":
            weight = torch.sigmoid(self.memory_gate.float())
        bias = self.memory_bias.float() if self.config.memory_bias else torch.zeros_like(weight)
        memory, memory_lse = _attend_with_lse(query, keys, values, scale * weight, bias * weight)
        return merge(local, self.local_impl.lse[token_idx], memory.flatten(0, 1), memory_lse.flatten(0, 1))

    def _attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        if query.device.type != "cpu":
            return attend(query, keys, values, scale)
        scales = torch.full((self.num_heads,), scale)
        return _attend_with_lse(query, keys, values, scales, torch.zeros_like(scales))[0]


def _attend_with_lse(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if query.device.type != "cpu":
        return attend_with_lse(query, keys, values, scale, bias)
    from memlong_vllm.kernels import flash_cpu

    return flash_cpu.attend_scaled(query, keys, values, scale, bias)


class MemoryStore(nn.Module):
    """Writes the memory layer's un-rotated keys and values to the bank."""

    def __init__(self, num_kv_heads: int, head_dim: int, padded_dim: int) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim, self.padded_dim = num_kv_heads, head_dim, padded_dim
        self.step_memory: StepMemory | None = None

    def store(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Args: key, value: [num_tokens or more (padding), R·padded_dim]."""
        assert self.step_memory is not None, "the model was used before its bank was attached"
        metadata = self.step_memory.metadata
        if metadata is not None:
            num_tokens = metadata.token_places.shape[0]
            keys, values = (
                t[:num_tokens].unflatten(-1, (self.num_kv_heads, self.padded_dim))[..., : self.head_dim]
                for t in (key, value)
            )
            self.step_memory.bank.write(metadata.token_places, keys, values)


def _store(key: torch.Tensor, value: torch.Tensor, layer_name: str) -> None:
    # ``key`` is declared as mutated though it is not: whatever comes later depends on it, so no
    # compiler may move a read of the bank before this write or drop it.
    get_forward_context().no_compile_layers[layer_name].store(key, value)


def _scale_query(query: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].scale_query(query)


def _retrieve(query: torch.Tensor, output: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].retrieve(query, output)


direct_register_custom_op("memlong_store", _store, ["key"], lambda key, value, layer_name: None)
direct_register_custom_op("memlong_scale_query", _scale_query, ["query"], lambda query, layer_name: None)
direct_register_custom_op("memlong_retrieve", _retrieve, ["output"], lambda query, output, layer_name: None)
