"""What the probe reads, against models that do it in their own way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from memlong_vllm.probe.backbone import Backbone, read_passage
from memlong_vllm.probe.maps import ReaderMap
from memlong_vllm.probe.reading import Memory, QuestionReader, own_memory, window_context
from tests.checkpoints import MEMORY, Checkpoints
from tests.engines import Reference

CHUNK, STRIDE, WINDOW = 16, 48, 96
# Chunks become eligible in the last segment only, so that nothing before it has read any.
START, QUESTION = 96, 30
BLOCK: dict[str, Any] = {
    "local_window": WINDOW,
    "retrieval_stride": STRIDE,
    "query_tokens": STRIDE,
    "fusion": "joint",
    "top_k": 2,
}
SHAPES = ({}, {"num_key_value_heads": 4, "head_dim": 100})
TOLERANCE = 1e-5


def read_last_segment(backbone: Backbone, tokens: list[int], memories: Mapping[int, Memory]) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] after each of the tokens from START on."""
    passage = read_passage(backbone, torch.tensor(tokens[:START]), WINDOW)
    reader = QuestionReader(backbone, window_context(passage, START, WINDOW), [tokens[START:]], WINDOW, STRIDE - 1)
    return backbone.log_probabilities(reader.read(memories)[-1][0])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=["grouped", "head_dim 100"])
def test_reading_nothing_is_the_model_with_a_window(
    checkpoints: Checkpoints, tokens: list[int], shape: dict[str, Any]
) -> None:
    model = LlamaForCausalLM.from_pretrained(checkpoints.base(**shape), dtype=torch.float32).eval()
    tokens = tokens[: START + QUESTION]
    distance = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
    visible = (distance >= 0) & (distance < WINDOW)
    mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[None, None]
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens]), attention_mask=mask).logits[0, START:].log_softmax(dim=-1)
        unlimited = model(torch.tensor([tokens])).logits[0, START:].log_softmax(dim=-1)
    found = read_last_segment(Backbone(model), tokens, {})
    assert difference(found, wanted) <= TOLERANCE
    assert difference(found, unlimited) > 100 * TOLERANCE


def reference_segment(path: Path, tokens: list[int]) -> tuple[Reference, torch.Tensor, tuple[int, ...]]:
    """The checkpoint's reference, its log-probabilities from START on, and the chunks that it read there."""
    reference = Reference(path)
    reference.model.embed = reference.embed
    cache = reference.model.new_cache()
    with torch.inference_mode():
        logits = reference.model(torch.tensor([tokens]), past_key_values=cache).logits[0, START:]
    assert cache.memory is not None
    assert len(cache.memory.retrieved) == BLOCK["top_k"]
    assert sum(cache.memory.counts.values()) == BLOCK["top_k"], "chunks were read before the last segment"
    return reference, logits.log_softmax(dim=-1), cache.memory.retrieved


@pytest.mark.parametrize("shape", SHAPES, ids=["grouped", "head_dim 100"])
def test_one_layer_reading_itself_is_the_reference(
    checkpoints: Checkpoints, tokens: list[int], shape: dict[str, Any]
) -> None:
    tokens = tokens[: START + QUESTION]
    path = checkpoints.memlong(shape=shape, memory_layer=2, retrieval_layers=[2], **BLOCK)
    reference, wanted, chunk_ids = reference_segment(path, tokens)
    backbone = Backbone(reference.model)
    passage = read_passage(backbone, torch.tensor(tokens[:START]), WINDOW)
    found = read_last_segment(backbone, tokens, {2: own_memory(passage[2], chunk_ids, CHUNK)})
    assert difference(found, wanted) <= TOLERANCE
    assert difference(read_last_segment(backbone, tokens, {}), wanted) > 100 * TOLERANCE


@pytest.mark.parametrize("width", [1, 3])
def test_mapped_layers_are_the_reference_with_adapters(checkpoints: Checkpoints, tokens: list[int], width: int) -> None:
    tokens = tokens[: START + QUESTION]
    block = BLOCK | {"memory_layer": 1, "retrieval_layers": [3, 4], "memory_adapter": "linear"}
    block["memory_adapter_width"] = width
    reference, wanted, chunk_ids = reference_segment(checkpoints.memlong(**block), tokens)
    backbone = Backbone(reference.model)
    stored = own_memory(read_passage(backbone, torch.tensor(tokens[:START]), WINDOW)[1], chunk_ids, CHUNK)
    memories = {}
    for layer in (3, 4):
        attention = reference.model.model.layers[layer].self_attn
        with torch.inference_mode():
            reader = ReaderMap(attention.memory_k_adapter, attention.memory_v_adapter, CHUNK, 0, 0)
            memories[layer] = reader.apply(stored)
    assert difference(read_last_segment(backbone, tokens, memories), wanted) <= TOLERANCE
    with torch.inference_mode():
        unmapped = read_last_segment(backbone, tokens, {3: stored, 4: stored})
    assert difference(unmapped, wanted) > 100 * TOLERANCE


def test_questions_of_a_batch_are_read_each_by_itself(checkpoints: Checkpoints, tokens: list[int]) -> None:
    """Of several lengths; started in the middle; and with chunks that a question does not read."""
    backbone = Backbone(LlamaForCausalLM.from_pretrained(checkpoints.base(), dtype=torch.float32))
    passage = read_passage(backbone, torch.tensor(tokens[:START]), WINDOW)
    context, questions = window_context(passage, START, WINDOW), [tokens[200:220], tokens[300:331]]
    chunks = [(0, 2), (2,)]
    unread = torch.tensor([[False, False], [True, False]]).repeat_interleave(CHUNK, dim=1)
    reader = QuestionReader(backbone, context, questions, WINDOW, STRIDE - 1, unread)
    both = {layer: own_memory(passage[layer], chunks[0], CHUNK) for layer in (1, 3)}
    batch = reader.read(both)
    resumed = reader.read(both, reader.read({1: both[1]}), 3)
    assert len(batch) == len(resumed) == backbone.num_layers + 1
    assert torch.equal(batch[-1], resumed[-1])
    for row, (question, chunk_ids) in enumerate(zip(questions, chunks, strict=True)):
        alone = QuestionReader(backbone, context, [question], WINDOW, STRIDE - 1)
        states = alone.read({layer: own_memory(passage[layer], chunk_ids, CHUNK) for layer in (1, 3)})
        assert difference(states[-1][0], batch[-1][row, : len(question)]) <= TOLERANCE


def test_the_sizes_are_those_of_the_checkpoints() -> None:
    assert MEMORY["chunk_size"] == CHUNK
