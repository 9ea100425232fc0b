"""The trained arithmetic against the reference: same weights, same texts, same likelihoods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memlong_vllm.reference.modeling_memlong import MemLongCache, MemLongForCausalLM
from memlong_vllm.training.features import DocumentFeatures, TextMemory
from memlong_vllm.training.segment_memory import SegmentMemory
from memlong_vllm.training.streams import SegmentReader, Streams
from memlong_vllm.training.upper_half import UpperHalf
from tests.checkpoints import Checkpoints
from tests.engines import Reference
from tests.training_run import documents, frozen_half

CASES: dict[str, dict[str, Any]] = {
    "gated": {},
    "gated_chunk": {"memory_softmax": "chunk", "retrieval_stride": 32},
    "joint": {"fusion": "joint", "memory_bias": True},
    "adapter": {"fusion": "joint", "memory_bias": True, "memory_adapter": "linear"},
    "wide_adapter": {"memory_adapter": "linear", "memory_adapter_width": 3, "retrieval_stride": 32},
    "scaled_logits": {"fusion": "scaled_logits", "memory_bias": True, "memory_layer": 2, "retrieval_layers": [3]},
    "current": {"query_scope": "current", "query_tokens": 24},
    "forgetting": {"memory_size": 96},
}


def nll_of_training(
    folder: Path, cache: Path, tokens: list[int], sizes: tuple[int, ...], questions: tuple[int, ...] = ()
) -> list[torch.Tensor]:
    """Per-token negative log-likelihood of documents read side by side, in segments of 64 tokens."""
    model = MemLongForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    frozen, upper = frozen_half(folder, model, cache), UpperHalf(model).eval()
    texts = [replace(document, questions=questions) for document in documents(tokens, sizes)]
    features = [frozen.features(document) for document in texts]
    reader = SegmentReader(model.config.memory, 64, model.config.head_dim, with_memory=True)
    parts: list[list[torch.Tensor]] = [[] for _ in features]
    carried = None
    with torch.no_grad():
        for segment in range(min(reader.num_segments(f) for f in features)):
            batch = reader.read([(f, segment) for f in features])
            carried = carried or upper.stack.empty(len(features), batch.hidden)
            loss, carried = upper(batch, carried)
            for row, nll in zip(parts, loss.nll, strict=True):
                row.append(nll)
    return [torch.cat(row) for row in parts]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, checkpoints: Checkpoints, tokens: list[int], tmp_path: Path) -> None:
    folder, sizes = checkpoints.memlong(**CASES[name]), (320, 384)
    found = nll_of_training(folder, tmp_path, tokens, sizes)
    reference = Reference(folder)
    for nll, document in zip(found, documents(tokens, sizes), strict=True):
        # The last segment's last token has no label; with "current", the length of a text matters.
        wanted = -reference.logprobs(list(document.token_ids), prompt_len=None)[: len(nll) - 1]
        without = -reference.logprobs(list(document.token_ids), prompt_len=None, with_memory=False)[: len(nll) - 1]
        torch.testing.assert_close(nll[: len(wanted)], wanted, atol=2e-5, rtol=0)
        assert (wanted - without).abs().max() > 1e-2  # Memory does matter here.


@pytest.mark.parametrize("fusion", ["gated", "joint", "scaled_logits"])
def test_memory_is_read_from_a_question_on(
    fusion: str, checkpoints: Checkpoints, tokens: list[int], tmp_path: Path
) -> None:
    """One question opens a stride, and what follows is what follows a prompt; one ends within another."""
    folder, questions = checkpoints.memlong(fusion=fusion, prompt_query_tokens=5), (256, 298)
    (found,) = nll_of_training(folder, tmp_path, tokens, (320,), questions)
    (document,), reference = documents(tokens, (320,)), Reference(folder)
    memory = reference.model.config.memory
    reads = TextMemory(memory, reference.embed, questions)
    cache = MemLongCache(reference.model.config.num_hidden_layers, memory.local_window, reads)
    with torch.inference_mode():
        logits = reference.model(torch.tensor([document.token_ids]), past_key_values=cache).logits[0].log_softmax(-1)
    wanted = -logits[torch.arange(319), document.token_ids[1:]]
    torch.testing.assert_close(found[:319], wanted, atol=2e-5, rtol=0)
    as_text, as_prompt = (
        -reference.logprobs(list(document.token_ids), prompt_len=prompt_len) for prompt_len in (None, 257)
    )
    torch.testing.assert_close(found[:272], as_prompt[:272], atol=2e-5, rtol=0)
    assert (as_text[256:272] - as_prompt[256:272]).abs().max() > 1e-2


def test_checkpointing_gives_the_same_gradients(checkpoints: Checkpoints, tokens: list[int], tmp_path: Path) -> None:
    folder = checkpoints.memlong(fusion="joint", memory_bias=True, memory_adapter="linear")
    gradients = []
    for checkpointing in (False, True):
        model = MemLongForCausalLM.from_pretrained(folder, dtype=torch.float32)
        features = [frozen_half(folder, model, tmp_path).features(documents(tokens, (256,))[0])]
        upper = UpperHalf(model, checkpointing).train()
        reader = SegmentReader(model.config.memory, 128, model.config.head_dim, with_memory=True)
        batch = reader.read([(features[0], 1)])
        assert isinstance(batch.memory, SegmentMemory)
        upper(batch, upper.stack.empty(1, batch.hidden))[0].weighted.backward()
        gradients.append({name: p.grad for name, p in upper.named_parameters() if p.grad is not None})
    assert any("memory_k_adapter" in name for name in gradients[0])
    assert any("memory_bias" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def features_and_reader(
    folder: Path, cache: Path, tokens: list[int], sizes: tuple[int, ...]
) -> tuple[list[DocumentFeatures], SegmentReader]:
    """Documents of these sizes, to be read in segments of 64 tokens."""
    model = MemLongForCausalLM.from_pretrained(folder, dtype=torch.float32)
    frozen = frozen_half(folder, model, cache)
    reader = SegmentReader(model.config.memory, 64, model.config.head_dim, with_memory=True)
    return [frozen.features(document) for document in documents(tokens, sizes)], reader


def test_streams_read_every_document_in_order(checkpoints: Checkpoints, tokens: list[int], tmp_path: Path) -> None:
    features, reader = features_and_reader(checkpoints.memlong(), tmp_path, tokens, (200, 130, 64, 270))
    streams = Streams(features, reader, num_rows=2, seed=3)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for step in range(6):
        if step == 3:  # A copy that goes on from here reads the same.
            state = streams.state()
            streams = Streams(features, reader, num_rows=2, seed=3)
            streams.restore(state)
        batch = streams.next_batch()
        for row in (0, 1):
            labels = batch.labels[row].tolist()
            document, segment = next(
                (d, s)
                for d, f in enumerate(features)
                for s in range(reader.num_segments(f))
                if labels[:63] == list(f.document.token_ids[s * 64 + 1 : s * 64 + 64])
            )
            assert bool(batch.restarts[row]) == (segment == 0)
            seen[row].append(document * 10 + segment)
    whole = [[d * 10 + s for s in range(reader.num_segments(f))] for d, f in enumerate(features)]
    begun = [place for row in seen.values() for place in row if place % 10 == 0]
    assert sorted(begun[: len(features)]) == [0, 10, 20, 30]  # An epoch has every document once.
    for row in seen.values():
        while row:
            assert row[0] % 10 == 0
            document = whole[row[0] // 10]
            assert row[: len(document)] == document[: len(row)]
            row[:] = row[len(document) :]


def test_processes_share_the_documents(checkpoints: Checkpoints, tokens: list[int], tmp_path: Path) -> None:
    features, reader = features_and_reader(checkpoints.memlong(), tmp_path, tokens, (64, 64, 64, 64))
    taken = []
    for rank in (0, 1):
        streams = Streams(features, reader, num_rows=1, seed=0, rank=rank, num_ranks=2)
        taken += [streams.next_batch().labels[0].tolist() for _ in range(2)]
    firsts = sorted(labels[0] for labels in taken)
    assert firsts == sorted(f.document.token_ids[1] for f in features)


@pytest.mark.parametrize("fusion", ["gated", "scaled_logits", "joint"])
def test_everything_that_reads_has_a_gradient(
    fusion: str, checkpoints: Checkpoints, tokens: list[int], tmp_path: Path
) -> None:
    folder = checkpoints.memlong(fusion=fusion, memory_bias=fusion != "gated")
    model = MemLongForCausalLM.from_pretrained(folder, dtype=torch.float32)
    frozen, upper = frozen_half(folder, model, tmp_path), UpperHalf(model)
    (features,) = [frozen.features(document) for document in documents(tokens, (256,))]
    reader = SegmentReader(model.config.memory, 256, model.config.head_dim, with_memory=True)
    batch = reader.read([(features, 0)])
    loss, _ = upper(batch, upper.stack.empty(1, batch.hidden))
    loss.weighted.backward()
    gradients = {name: p.grad for name, p in upper.named_parameters() if p.grad is not None}
    wanted = "memory_bias" if fusion == "joint" else "memory_gate"
    assert any(name.endswith(wanted) and gradient.any() for name, gradient in gradients.items())
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
