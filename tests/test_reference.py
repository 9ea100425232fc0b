"""The reference model: one pass, cuts, generation, and the backbone it must equal without memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlong_vllm.config import MemLongConfig
from memlong_vllm.reference.modeling_memlong import MemLongAttention, MemLongForCausalLM, text_embedder
from memlong_vllm.reference.retrieval import AttendedSpan, SequenceMemory

LENGTH, PROMPT, WINDOW, CHUNK = 61, 45, 12, 4
SIZES = {
    "vocab_size": 59,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
MEMORY: dict[str, Any] = {
    "memory_layer": 1,
    "retrieval_layers": [1, 3],
    "chunk_size": CHUNK,
    "top_k": 2,
    "memory_size": 24,
    "local_window": WINDOW,
    "retrieval_stride": CHUNK,
    "query_tokens": CHUNK,
}
# Float32: the same sums in another order, over logits around 1 in size.
TOLERANCE = 1e-5
FUSIONS = {
    "gated": {},
    "gated per chunk": {"memory_softmax": "chunk"},
    "joint": {"fusion": "joint", "memory_bias": True},
    "scaled logits": {"fusion": "scaled_logits"},
    "adapter": {"memory_adapter": "linear"},
    "wide adapter": {"memory_adapter": "linear", "memory_adapter_width": 3},
    "long segments": {"retrieval_stride": 3 * CHUNK, "query_tokens": 7, "prompt_query_tokens": 11},
}


def embed(token_ids: list[int]) -> torch.Tensor:
    generator = random.Random(str(token_ids))
    return torch.nn.functional.normalize(torch.tensor([generator.gauss() for _ in range(8)]), dim=0)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights of which attention is sharp and logits are moderate; norms as they are."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".memory_" not in name:
            std = 0.2 if "self_attn" in name else 0.15
            parameter.data = std * torch.randn(parameter.shape, generator=generator)


def make_model(gates: float = 0.8, *, retriever: bool = True, **memory: Any) -> MemLongForCausalLM:
    """The same backbone each time; memory parameters are off their start by random numbers of scale
    ``gates``, adapters by a tenth of that."""
    model = MemLongForCausalLM(MemLongConfig(**SIZES, memlong={**MEMORY, **memory})).eval()
    randomise(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".memory_" in name:
            scale = gates if parameter.dim() == 1 else gates / 10
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    if retriever:
        model.set_retriever(embed)
    return model


def make_llama() -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")).eval()
    randomise(model)
    return model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only cost time where tensors are this small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def in_pieces(
    model: MemLongForCausalLM, token_ids: torch.Tensor, borders: list[int], prompt_len: int | None
) -> torch.Tensor:
    cache = model.new_cache(prompt_len)
    pieces = [token_ids[:, start:end] for start, end in pairwise(borders)]
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Per token, how far logits are apart."""
    return (one - other).abs().amax(dim=(0, 2))


@pytest.mark.parametrize("settings", FUSIONS.values(), ids=FUSIONS)
@pytest.mark.parametrize("prompt_len", [LENGTH, PROMPT, None])
def test_cuts_do_not_change_logits(token_ids: torch.Tensor, settings: dict[str, Any], prompt_len: int | None) -> None:
    model = make_model(**settings)
    whole = in_pieces(model, token_ids, [0, LENGTH], prompt_len)
    chance = random.Random(str(settings))
    for borders in ([*range(LENGTH + 1)], sorted({0, LENGTH, *(chance.randrange(LENGTH) for _ in range(6))})):
        assert_close(in_pieces(model, token_ids, borders, prompt_len), whole)


def test_cuts_do_not_change_logits_where_segments_ask_with_their_own_text(token_ids: torch.Tensor) -> None:
    """The prompt is one piece: a segment's own text must be there when the segment begins."""
    model = make_model(query_scope="current")
    whole = in_pieces(model, token_ids, [0, LENGTH], PROMPT)
    assert_close(in_pieces(model, token_ids, [0, PROMPT, *range(PROMPT + 1, LENGTH + 1)], PROMPT), whole)
    preceding = in_pieces(make_model(), token_ids, [0, LENGTH], PROMPT)
    assert distances(whole, preceding).max() > 100 * TOLERANCE


@torch.no_grad()
def test_a_call_without_a_cache_takes_its_tokens_as_a_prompt(token_ids: torch.Tensor) -> None:
    model = make_model()
    logits = model(token_ids).logits
    assert torch.equal(logits, in_pieces(model, token_ids, [0, LENGTH], LENGTH))
    assert distances(logits, in_pieces(model, token_ids, [0, LENGTH], None))[-1] > 100 * TOLERANCE


@torch.no_grad()
def test_only_the_last_logits_and_the_loss(token_ids: torch.Tensor) -> None:
    model = make_model()
    logits = model(token_ids).logits
    assert_close(model(token_ids, logits_to_keep=3).logits, logits[:, -3:])
    log_probabilities = logits[0, :-1].log_softmax(-1)
    expected = -log_probabilities[torch.arange(LENGTH - 1), token_ids[0, 1:]].mean()
    assert_close(model(token_ids, labels=token_ids).loss, expected)


# The whole model once more, written token by token in float64 from the paper's equations.


def rotate(vector: torch.Tensor, position: int) -> torch.Tensor:
    """RoPE: component i and i + d/2 turn by ``position / 10000^(2i/d)``."""
    half = vector.shape[-1] // 2
    angles = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    left, right = vector[..., :half], vector[..., half:]
    return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], dim=-1)


def spelled_out(model: MemLongForCausalLM, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of fusions ``gated`` (one softmax) and ``joint`` (without bias)."""
    memory = SequenceMemory(model.config.memory, embed, token_ids.shape[1])
    spans = {t: span for span in memory.extend(token_ids[0].tolist()) for t in range(span.start, span.end)}
    hidden = model.model.embed_tokens(token_ids[0])
    stored = None
    for number, layer in enumerate(model.model.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).view(len(hidden), -1, SIZES["head_dim"])
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if number == MEMORY["memory_layer"]:
            stored = key, value
        reads = spans if number in MEMORY["retrieval_layers"] else {}
        rows = [attended(t, query, key, value, stored, reads.get(t), attention) for t in range(len(hidden))]
        hidden = hidden + attention.o_proj(torch.stack(rows).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


def attended(
    token: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    stored: tuple[torch.Tensor, torch.Tensor] | None,
    span: AttendedSpan | None,
    attention: MemLongAttention,
) -> torch.Tensor:
    """[heads, d] of one token."""
    window = range(max(0, token - WINDOW + 1), token + 1)
    memory = [chunk * CHUNK + i for chunk in span.chunk_ids for i in range(CHUNK)] if span else []
    heads = []
    for head in range(SIZES["num_attention_heads"]):
        group, scale = head // 2, SIZES["head_dim"] ** -0.5
        local_scores = [scale * rotate(query[token, head], token) @ rotate(key[t, group], t) for t in window]
        local_values = value[window.start : window.stop, group]
        if span is None or stored is None:
            heads.append(torch.stack(local_scores).softmax(0) @ local_values)
            continue
        local_query = rotate(query[token, head], token - span.origin)
        memory_scores = [scale * local_query @ stored[0][t, group] for t in memory]
        memory_values = stored[1][memory, group]
        if attention.memory.fusion == "joint":
            weights = torch.stack(memory_scores + local_scores).softmax(0)
            heads.append(weights @ torch.cat([memory_values, local_values]))
        else:
            local = torch.stack(local_scores).softmax(0) @ local_values
            share = attention.memory_gate[head].tanh()
            heads.append(local + share * (torch.stack(memory_scores).softmax(0) @ memory_values))
    return torch.stack(heads)


@pytest.mark.parametrize("settings", [{}, {"fusion": "joint"}, {"retrieval_stride": 8}], ids=str)
@torch.no_grad()
def test_the_whole_model_is_what_the_equations_say(token_ids: torch.Tensor, settings: dict[str, Any]) -> None:
    model = make_model(**settings)
    actual = model(token_ids).logits[0]
    assert_close(actual.double(), spelled_out(model.double(), token_ids))


@pytest.mark.parametrize("settings", FUSIONS.values(), ids=FUSIONS)
@torch.no_grad()
def test_memory_changes_the_tokens_that_have_some_and_no_other(
    token_ids: torch.Tensor, settings: dict[str, Any]
) -> None:
    model, local = make_model(**settings), make_model(retriever=False, **settings)
    apart = distances(in_pieces(model, token_ids, [0, LENGTH], None), local(token_ids).logits)
    stride = settings.get("retrieval_stride", CHUNK)
    # A token's own segment or one in its window, in the layer below, must have reached a chunk.
    first = min(b for b in range(0, LENGTH, stride) if b + stride - WINDOW >= CHUNK)
    assert apart[:first].max() < TOLERANCE
    assert apart[first:].min() > 100 * TOLERANCE


@torch.no_grad()
def test_gates_matter(token_ids: torch.Tensor) -> None:
    by_gate = [in_pieces(make_model(gates), token_ids, [0, LENGTH], None) for gates in (0.0, 0.4, 0.8, -0.8)]
    for i, one in enumerate(by_gate):
        for other in by_gate[:i]:
            assert distances(one, other)[2 * WINDOW :].min() > 100 * TOLERANCE


@torch.no_grad()
def test_what_is_retrieved_matters(token_ids: torch.Tensor) -> None:
    model = make_model(top_k=1)
    logits = in_pieces(model, token_ids, [0, LENGTH], None)
    # All queries and chunks alike: the oldest chunk held wins.
    model.set_retriever(lambda _: torch.ones(1))
    assert distances(logits, in_pieces(model, token_ids, [0, LENGTH], None)).max() > 100 * TOLERANCE


def window_mask() -> torch.Tensor:
    """[1, 1, tokens, tokens], added to scores: a causal window."""
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    visible = (distance >= 0) & (distance < WINDOW)
    return torch.zeros(LENGTH, LENGTH).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


@torch.no_grad()
def test_within_the_window_the_backbone_is_llama(token_ids: torch.Tensor) -> None:
    short = token_ids[:, :WINDOW]
    expected = make_llama()(short).logits
    assert_close(make_model(gates=0.0)(short).logits, expected)
    assert_close(make_model(gates=0.8)(short).logits, expected)


@torch.no_grad()
def test_with_closed_gates_it_is_llama_with_a_sliding_window(token_ids: torch.Tensor) -> None:
    llama = make_llama()
    expected = llama(token_ids, attention_mask=window_mask()).logits
    assert_close(make_model(gates=0.0)(token_ids).logits, expected)
    assert distances(llama(token_ids).logits, expected)[WINDOW:].max() > 100 * TOLERANCE


@pytest.mark.parametrize("fusion", ["gated", "joint", "scaled_logits"])
@torch.no_grad()
def test_without_a_retriever_it_is_llama_with_a_sliding_window(token_ids: torch.Tensor, fusion: str) -> None:
    model = make_model(retriever=False, fusion=fusion)
    assert model.new_cache().memory is None
    expected = make_llama()(token_ids, attention_mask=window_mask()).logits
    assert_close(model(token_ids).logits, expected)
    assert_close(in_pieces(model, token_ids, [0, 7, 30, LENGTH], None), expected)


@pytest.mark.parametrize("settings", [FUSIONS["gated"], FUSIONS["joint"]], ids=["gated", "joint"])
@torch.no_grad()
def test_greedy_generation_is_the_likeliest_token_each_time(token_ids: torch.Tensor, settings: dict[str, Any]) -> None:
    """Each token by a pass over the whole sequence so far, without a cache from before."""
    model, prompt = make_model(**settings), token_ids[:, :PROMPT]
    sequence = prompt
    for _ in range(20):
        logits = in_pieces(model, sequence, [0, sequence.shape[1]], PROMPT)
        sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert generated.tolist() == sequence.tolist()
    local = make_model(retriever=False, **settings).generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert local.tolist() != sequence.tolist()


def test_batches_and_padding_are_refused(token_ids: torch.Tensor) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="one sequence at a time"):
        model(token_ids.repeat(2, 1))
    with pytest.raises(ValueError, match="without padding"):
        model(token_ids, attention_mask=(torch.arange(LENGTH) > 0)[None])


def test_new_models_have_closed_gates_and_plain_adapters() -> None:
    model = MemLongForCausalLM(MemLongConfig(**SIZES, memlong={**MEMORY, "memory_adapter": "linear"}))
    layers = model.model.layers
    assert [hasattr(layer.self_attn, "memory_gate") for layer in layers] == [False, True, False, True]
    attention, size = layers[1].self_attn, 2 * 8
    assert not attention.memory_gate.any()
    both = torch.cat([attention.memory_k_adapter, attention.memory_v_adapter])
    assert torch.equal(both, torch.eye(2 * size))


class Letters:
    """A tokenizer of letters, of which 0 is special."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return "".join(chr(96 + token_id) for token_id in token_ids if token_id)


def test_text_embedder_embeds_each_text_once_and_empty_ones_as_zero() -> None:
    asked: list[str] = []

    def embed_texts(texts: list[str]) -> list[list[float]]:
        assert all(texts), "an embedder need not take empty texts"
        asked.extend(texts)
        return [[1.0, 0.0] for _ in texts]

    embedder = text_embedder(Letters(), embed_texts)
    assert embedder([1, 2]).tolist() == [1.0, 0.0]
    assert embedder([1, 0, 2]).tolist() == [1.0, 0.0]
    assert embedder([0]).tolist() == [0.0, 0.0]
    assert embedder([]).tolist() == [0.0, 0.0]
    assert [text for text in asked if text.strip()] == ["ab"]


def test_text_embedder_puts_the_instruction_first() -> None:
    asked: list[str] = []

    def embed_texts(texts: list[str]) -> list[list[float]]:
        asked.extend(texts)
        return [[1.0, 0.0] for _ in texts]

    embedder = text_embedder(Letters(), embed_texts, "find: ")
    assert embedder([1, 2]).tolist() == [1.0, 0.0]
    assert embedder([0]).tolist() == [0.0, 0.0]
    assert asked[0] == "find: ab"
