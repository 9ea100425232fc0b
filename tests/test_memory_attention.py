"""Attention to memory: the engine's arithmetic against loops, both implementations against the
authors' own layer (inputs and outputs in ``data/reference_attention``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from memlong_vllm.config import MemLongConfig
from memlong_vllm.memory_attention import attend, attend_chunks, attend_with_lse, fold_heads, merge, unfold_heads
from memlong_vllm.reference.modeling_memlong import MemLongAttention, MemLongCache
from memlong_vllm.reference.retrieval import AttendedSpan

SPANS, TOKENS, SIZE, CHUNK, CHUNKS = 3, 5, 8, 4, 3
MEMORY = CHUNK * CHUNKS
HEADS = [pytest.param(4, 4, id="MHA"), pytest.param(6, 2, id="GQA"), pytest.param(4, 1, id="MQA")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only cost time where tensors are this small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, keys and values of scores that matter: a softmax over them is far from uniform."""
    query = 2 * draw(SPANS, TOKENS, heads, SIZE, seed=1)
    return query, draw(SPANS, kv_heads, MEMORY, SIZE, seed=2), draw(SPANS, kv_heads, MEMORY, SIZE, seed=3)


def scores_of(query: torch.Tensor, keys: torch.Tensor, span: int, token: int, head: int) -> torch.Tensor:
    """One row of plain products, in float64."""
    group = query.shape[2] // keys.shape[1]
    row = [query[span, token, head].double() @ keys[span, head // group, m].double() for m in range(keys.shape[2])]
    return torch.stack(row)


def looped(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, weigh: Any) -> torch.Tensor:
    """[G, n, H, d] by loops; ``weigh`` turns a row of products of a head into weights."""
    output = torch.empty(query.shape, dtype=torch.float64)
    group = query.shape[2] // keys.shape[1]
    for span, token, head in np.ndindex(*query.shape[:3]):
        weights = weigh(scores_of(query, keys, span, token, head), head)
        output[span, token, head] = weights @ values[span, head // group].double()
    return output


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_one_softmax_over_all_memory(heads: int, kv_heads: int) -> None:
    query, keys, values = inputs(heads, kv_heads)
    expected = looped(query, keys, values, lambda row, head: (0.3 * row).softmax(0))
    assert_close(attend(query, keys, values, 0.3), expected)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_one_softmax_per_chunk(heads: int, kv_heads: int) -> None:
    query, keys, values = inputs(heads, kv_heads)
    expected = looped(query, keys, values, lambda row, head: (0.3 * row).view(CHUNKS, CHUNK).softmax(1).flatten())
    actual = attend_chunks(query, keys, values, 0.3, CHUNK)
    assert_close(actual, expected)
    assert not torch.allclose(actual, attend(query, keys, values, 0.3), atol=0.1)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_scores_scaled_and_shifted_per_head_with_their_sum(heads: int, kv_heads: int) -> None:
    query, keys, values = inputs(heads, kv_heads)
    scale, bias = draw(heads, seed=4).abs() / 3, draw(heads, seed=5)
    output, lse = attend_with_lse(query, keys, values, scale, bias)
    assert_close(output, looped(query, keys, values, lambda row, head: (scale[head] * row + bias[head]).softmax(0)))
    for span, token, head in np.ndindex(SPANS, TOKENS, heads):
        row = scale[head] * scores_of(query, keys, span, token, head) + bias[head]
        assert float(lse[span, token, head]) == pytest.approx(math.log(sum(math.exp(s) for s in row)), abs=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_folding_heads_keeps_each_with_its_keys(heads: int, kv_heads: int) -> None:
    query, _, _ = inputs(heads, kv_heads)
    folded = fold_heads(query, kv_heads)
    assert folded.shape == (SPANS, kv_heads, heads // kv_heads * TOKENS, SIZE)
    for head in range(heads):
        first = head % (heads // kv_heads) * TOKENS
        kept = folded[:, head // (heads // kv_heads), first : first + TOKENS]
        assert torch.equal(kept, query[:, :, head])
    assert torch.equal(unfold_heads(folded, TOKENS), query)
    assert torch.equal(unfold_heads(folded[..., 0], TOKENS), query[..., 0])


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("split", [1, 5, MEMORY - 1])
def test_merging_two_parts_is_one_softmax_over_both(heads: int, kv_heads: int, split: int) -> None:
    query, keys, values = inputs(heads, kv_heads)
    ones, zeros = torch.full((heads,), 0.3), torch.zeros(heads)
    left = attend_with_lse(query, keys[:, :, :split], values[:, :, :split], ones, zeros)
    right = attend_with_lse(query, keys[:, :, split:], values[:, :, split:], ones, zeros)
    assert_close(merge(*left, *right), attend(query, keys, values, 0.3))


@pytest.mark.parametrize("difference", [200.0, -200.0])
def test_merging_parts_of_very_different_weight(difference: float) -> None:
    local, memory, lse = draw(2, 3, SIZE, seed=1), draw(2, 3, SIZE, seed=2), draw(2, 3, seed=3)
    merged = merge(local, lse, memory, lse + difference)
    assert torch.equal(merged, memory if difference > 0 else local)


def test_merging_keeps_the_type_of_the_local_output() -> None:
    local, memory, lse = draw(2, SIZE).bfloat16(), draw(2, SIZE, seed=1).bfloat16(), torch.zeros(2)
    merged = merge(local, lse, memory, lse)
    assert merged.dtype == torch.bfloat16
    assert_close(merged, (local.float() + memory.float()) / 2, 1e-2)


# The authors' own layer.

FOLDER = Path(__file__).parent / "data" / "reference_attention"
CASES = ["joint_small", "joint_head100", "scaled_logits_small", "scaled_logits_head100"]
# Float32 sums of up to 200 products in another order, of outputs below 0.5 in size: rounding is
# about 1e-7, and 1e-5 leaves room for other kernels without hiding a wrong position or scale.
TOLERANCE = 1e-5


class AuthorsCase:
    """One file: their inputs, weights and output, and configuration of ours that fits.

    Attributes:
        fusion: ``"joint"`` or ``"scaled_logits"``.
        gate: [heads] before the sigmoid; zeros where the fusion has none.
    """

    def __init__(self, name: str) -> None:
        arrays = np.load(FOLDER / f"{name}.npz")
        self.fusion = name.rsplit("_", 1)[0]
        self.heads = int(arrays["num_heads"])
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].ndim > 0}
        self.hidden, self.output = tensors["hidden_states"], tensors["output"]
        self.keys, self.values = tensors["memory_keys"], tensors["memory_values"]
        self.projections = {f"{p}_proj.weight": tensors[f"{p}_proj"] for p in "qkvo"}
        self.gate = tensors.get("gate", torch.zeros(self.heads))
        self.size = self.keys.shape[-1]
        self.config = MemLongConfig(
            hidden_size=self.hidden.shape[1],
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.size,
            num_hidden_layers=2,
            rope_parameters={"rope_type": "default", "rope_theta": float(arrays["rope_theta"])},
            memlong={
                "memory_layer": 0,
                "retrieval_layers": [1],
                "fusion": self.fusion,
                "chunk_size": CHUNK,
                "local_window": 64,
                "memory_size": 64,
                "retrieval_stride": CHUNK,
            },
        )
        self.rotary = LlamaRotaryEmbedding(self.config)

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    def spans(self) -> list[AttendedSpan]:
        """All tokens attend to all memory. They are at absolute positions 0 to T-1 and, which is
        all that memory depends on, at local positions 1 to T."""
        return [AttendedSpan(0, self.tokens, tuple(range(self.keys.shape[1] // CHUNK)), origin=-1)]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> AuthorsCase:
    return AuthorsCase(request.param)


@torch.no_grad()
def reference_output(case: AuthorsCase, spans: list[AttendedSpan]) -> torch.Tensor:
    """The reference model's retrieval layer over a memory stored by hand."""
    layer = MemLongAttention(case.config, layer_idx=1)
    layer.load_state_dict({**case.projections, "memory_gate": case.gate})
    cache = MemLongCache(2, case.config.memory.local_window, None)
    cache.store(case.keys, case.values)
    return layer(case.hidden, case.rotary, cache, spans)


@torch.no_grad()
def engine_output(case: AuthorsCase, first_position: int = 1) -> torch.Tensor:
    """The same with the engine's functions, beside local attention with a log-sum-exp."""
    query, key, value = (
        (case.hidden @ case.projections[f"{p}_proj.weight"].T).view(case.tokens, case.heads, case.size) for p in "qkv"
    )
    cos, sin = case.rotary(query, torch.arange(first_position, first_position + case.tokens)[None])
    query, key = (t[0] for t in apply_rotary_pos_emb(query[None], key[None], cos, sin, unsqueeze_dim=2))
    weight = torch.sigmoid(case.gate) if case.fusion == "scaled_logits" else torch.ones(case.heads)
    local_weight = 1 - weight if case.fusion == "scaled_logits" else weight
    scores = torch.einsum("thd,shd->ths", query, key) * local_weight[None, :, None] * case.size**-0.5
    visible = torch.ones(case.tokens, case.tokens).tril().bool()
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    local = torch.einsum("ths,shd->thd", scores.softmax(-1), value)
    memory = attend_with_lse(
        query[None], case.keys[None], case.values[None], weight * case.size**-0.5, torch.zeros(case.heads)
    )
    merged = merge(local, scores.logsumexp(-1), memory[0][0], memory[1][0])
    return merged.flatten(1) @ case.projections["o_proj.weight"].T


def test_reference_layer_equals_the_authors(case: AuthorsCase) -> None:
    assert_close(reference_output(case, case.spans()), case.output, TOLERANCE)


def test_engine_arithmetic_equals_the_authors(case: AuthorsCase) -> None:
    assert_close(engine_output(case), case.output, TOLERANCE)


def distance(actual: torch.Tensor, case: AuthorsCase) -> float:
    return float((actual - case.output).abs().max())


def test_without_memory_the_authors_output_is_missed(case: AuthorsCase) -> None:
    assert distance(reference_output(case, []), case) > 1000 * TOLERANCE


def test_one_position_off_the_authors_output_is_missed(case: AuthorsCase) -> None:
    (span,) = case.spans()
    shifted = AttendedSpan(span.start, span.end, span.chunk_ids, origin=span.origin + 1)
    assert distance(reference_output(case, [shifted]), case) > 100 * TOLERANCE
    assert distance(engine_output(case, first_position=0), case) > 100 * TOLERANCE


def test_one_chunk_less_the_authors_output_is_missed(case: AuthorsCase) -> None:
    (span,) = case.spans()
    fewer = AttendedSpan(span.start, span.end, span.chunk_ids[:-1], span.origin)
    assert distance(reference_output(case, [fewer]), case) > 100 * TOLERANCE


def test_the_other_fusion_misses_the_authors_output(case: AuthorsCase) -> None:
    other = "joint" if case.fusion == "scaled_logits" else "scaled_logits"
    case.config.memlong = {**case.config.memlong, "fusion": other}
    assert distance(reference_output(case, case.spans()), case) > 100 * TOLERANCE


# The reference's fusions that the authors' layer does not have, spelled out.


@torch.no_grad()
def fuse(scores: tuple[torch.Tensor, ...], gate: torch.Tensor, **memory: object) -> torch.Tensor:
    """The reference's fusion alone: its inputs are scores and values already. Biases are 0.5."""
    block = {"memory_layer": 0, "retrieval_layers": [0], "chunk_size": CHUNK, **memory}
    sizes = {"hidden_size": 2 * SIZE, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": SIZE}
    layer = MemLongAttention(MemLongConfig(num_hidden_layers=1, memlong=block, **sizes), layer_idx=0)
    layer.memory_gate.copy_(gate)
    if layer.memory.memory_bias:
        layer.memory_bias.fill_(0.5)
    return layer._fuse(*scores)


@pytest.fixture
def scores() -> tuple[torch.Tensor, ...]:
    """Local scores and values, memory scores and values of 2 heads."""
    return draw(2, TOKENS, 7), draw(2, 7, SIZE, seed=1), draw(2, TOKENS, MEMORY, seed=2), draw(2, MEMORY, SIZE, seed=3)


def test_gated_fusion_adds_memory_by_tanh_of_the_gate(scores: tuple[torch.Tensor, ...]) -> None:
    local_scores, local_values, memory_scores, memory_values = scores
    gate = torch.tensor([0.7, -0.2])
    local = local_scores.softmax(-1) @ local_values
    chunks = memory_scores.view(2, TOKENS, CHUNKS, CHUNK).softmax(-1).view(2, TOKENS, MEMORY)
    for softmax, weights in (("all", memory_scores.softmax(-1)), ("chunk", chunks)):
        expected = local + gate.tanh()[:, None, None] * (weights @ memory_values)
        assert_close(fuse(scores, gate, memory_softmax=softmax), expected)


def test_a_closed_gate_leaves_exactly_the_local_output(scores: tuple[torch.Tensor, ...]) -> None:
    local = scores[0].softmax(-1) @ scores[1]
    assert torch.equal(fuse(scores, torch.zeros(2)), local)


def test_bias_shifts_the_memory_scores_of_joint_softmaxes(scores: tuple[torch.Tensor, ...]) -> None:
    gate = torch.tensor([0.7, -0.2])
    shifted = (*scores[:2], scores[2] + 0.5, scores[3])
    for fusion in ("joint", "scaled_logits"):
        biased = fuse(scores, gate, fusion=fusion, memory_bias=True)
        assert_close(biased, fuse(shifted, gate, fusion=fusion))
        assert not torch.allclose(biased, fuse(scores, gate, fusion=fusion), atol=1e-2)
