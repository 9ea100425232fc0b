"""The trained half: from the memory layer's input to the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from memlong_vllm.training.layer_stack import LayerStack
from memlong_vllm.training.segment_memory import Carried
from memlong_vllm.training.streams import SegmentBatch


@dataclass(frozen=True)
class SegmentLoss:
    """Sums over a batch, so that they add up over batches and processes.

    Attributes:
        weighted: sum of weight x negative log-likelihood (nats), with gradient.
        weight: sum of weights.
        nll: [B, T] float32, detached; 0 where the weight is 0.
    """

    weighted: torch.Tensor
    weight: torch.Tensor
    nll: torch.Tensor


class UpperHalf(nn.Module):
    """Layers from the memory layer up, final norm and head of ``model``."""

    def __init__(self, model: MemLongForCausalLM, checkpointing: bool = False) -> None:
        super().__init__()
        config = model.config
        self.stack = LayerStack(model, range(config.memory.memory_layer, config.num_hidden_layers), checkpointing)
        self.norm, self.lm_head = model.model.norm, model.lm_head

    def forward(self, batch: SegmentBatch, carried: Carried) -> tuple[SegmentLoss, Carried]:
        """Loss of a batch of segments, and what its rows carry on."""
        hidden, carried = self.stack(batch.hidden, carried.restarted(batch.restarts), batch.memory)
        counts = batch.weights > 0
        # The head is a large part of the work: only for tokens that count.
        logits = self.lm_head(self.norm(hidden[counts])).float()
        losses = cross_entropy(logits, batch.labels[counts], reduction="none")
        weights = batch.weights[counts]
        nll = torch.zeros_like(batch.weights)
        nll[counts] = losses.detach()
        return SegmentLoss((losses * weights).sum(), weights.sum(), nll), carried
