"""Perplexity of held-out documents with memory and without, in the training's own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch

from memlong_vllm.config import MemoryConfig
from memlong_vllm.training.documents import TextsError
from memlong_vllm.training.features import DocumentFeatures
from memlong_vllm.training.streams import SegmentReader
from memlong_vllm.training.upper_half import UpperHalf


@dataclass(frozen=True)
class Validation:
    """Mean negative log-likelihoods in nats a token, over tokens that had something to retrieve.

    Attributes:
        nll: as trained. nll_without_memory: the same weights, nothing retrieved; None for a control.
        num_tokens: tokens that count.
    """

    nll: float
    nll_without_memory: float | None
    num_tokens: int

    def to_dict(self) -> dict[str, float | int | None]:
        without = self.nll_without_memory
        perplexities = {"ppl": math.exp(self.nll), "ppl_without_memory": None if without is None else math.exp(without)}
        return asdict(self) | perplexities


@torch.no_grad()
def validate(
    upper: UpperHalf,
    documents: Sequence[DocumentFeatures],
    config: MemoryConfig,
    segment_tokens: int,
    head_dim: int,
    with_memory: bool,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Validation:
    """Read every document once, one at a time, as training does.

    Raises:
        TextsError: if nothing is retrieved for any token.
    """
    was_training = upper.training
    upper.eval()
    device = next(upper.parameters()).device
    totals, counted = {True: 0.0, False: 0.0}, 0
    for features in documents:
        has_memory = _has_memory(features, config.retrieval_stride)
        for mode in (True, False) if with_memory else (False,):
            reader = SegmentReader(config, segment_tokens, head_dim, mode)
            carried = None
            for segment in range(reader.num_segments(features)):
                batch = reader.read([(features, segment)]).to(device)
                carried = upper.stack.empty(1, batch.hidden) if carried is None else carried
                with autocast():
                    loss, carried = upper(batch, carried)
                rows = slice(segment * segment_tokens, (segment + 1) * segment_tokens)
                counts = has_memory[rows] & (batch.weights[0].cpu() > 0)
                totals[mode] += float(loss.nll[0].cpu()[counts].sum())
                counted += int(counts.sum()) if mode is False else 0
    upper.train(was_training)
    if not counted:
        raise TextsError("nothing is retrieved in the validation texts: their chunks have no text")
    without = totals[False] / counted
    if not with_memory:
        return Validation(without, None, counted)
    return Validation(totals[True] / counted, without, counted)


def _has_memory(features: DocumentFeatures, stride: int) -> torch.Tensor:
    """[T] bool: whether something was retrieved for the token."""
    return torch.tensor([len(span.chunk_ids) > 0 for span in features.spans]).repeat_interleave(stride)
