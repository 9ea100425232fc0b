"""Sequences with equal beginnings share blocks and memory, and nothing about their results changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm import RequestOutput

from tests.engines import Engine, Reference, assert_answer

TINY = 1e-5
BLOCK = 32
CHUNK_BYTES = 16 * 2 * 2 * 32 * 4


def ask(engine: Engine, prompt: list[int], **sampling: Any) -> str:
    """A request that may read the prefix cache, which prompt_logprobs does not."""
    return engine.add(prompt, prompt_logprobs=None, **({"max_tokens": 12} | sampling))


def cached(output: RequestOutput) -> int:
    return output.num_cached_tokens or 0


def test_a_second_question_takes_over_the_document(
    start_engine: Any, model: Any, reference: Reference, tokens: list[int]
) -> None:
    engine: Engine = start_engine(model, block_size=BLOCK)
    document = tokens[:1000]
    questions = [tokens[5000 + i * 500 : 5020 + i * 560] for i in (2, 0, 1)]  # The first is longer than the window.
    first = ask(engine, document + questions[0])
    outputs = engine.run()
    assert cached(outputs[first]) == 0
    before = engine.scheduler.memory_stats()
    assert before["slots_kept"] >= 1000 // 16
    others = [ask(engine, document + question) for question in questions[1:]]
    outputs |= engine.run()
    after = engine.scheduler.memory_stats()
    for request_id in others:
        assert cached(outputs[request_id]) == 992
    # Of the document, nothing is embedded again: only what lies beyond the shared blocks.
    embedded = after["embedded_texts"] - before["embedded_texts"]
    assert embedded <= sum((len(question) + 12) // 16 + 3 for question in questions[1:])
    for output in outputs.values():
        assert_answer(output, reference, TINY)
    engine.assert_empty()


def test_nothing_from_the_prompts_end_on_is_taken_over(
    start_engine: Any, model: Any, reference: Reference, tokens: list[int]
) -> None:
    """Later tokens of the first request attend to what its prompt's end retrieved."""
    engine: Engine = start_engine(model, block_size=BLOCK)
    first = ask(engine, tokens[:330], max_tokens=100)
    outputs = engine.run()
    follow_up = tokens[:330] + list(outputs[first].outputs[0].token_ids) + tokens[900:930]
    again, second = ask(engine, tokens[:330]), ask(engine, follow_up)
    outputs |= engine.run()
    # 329 lies in the segment [320, 336).
    assert cached(outputs[again]) == cached(outputs[second]) == 320
    for output in outputs.values():
        assert_answer(output, reference, TINY)


def test_salts_and_settings_keep_requests_apart(start_engine: Any, model: Any, tokens: list[int]) -> None:
    engine: Engine = start_engine(model, block_size=BLOCK)
    prompt = tokens[:600]
    variants = [({}, None), ({}, "tenant"), ({"top_k": 1}, None), ({"memory_size": 256}, None), ({"top_k": 1}, "b")]
    for extra_args, salt in variants:
        for expected in (0, 576):
            embedded = engine.scheduler.memory_stats()["embedded_texts"]
            request = ask(engine, prompt, extra_args=extra_args, salt=salt)
            assert cached(engine.run()[request]) == expected
            news = engine.scheduler.memory_stats()["embedded_texts"] - embedded
            first_of_its_salt = expected == 0 and (extra_args, salt) in (variants[0], variants[1], variants[4])
            assert (news > 30) == first_of_its_salt
    engine.assert_empty()


def test_settings_per_request(start_engine: Any, model: Any, checkpoints: Any, tokens: list[int]) -> None:
    """A request with settings of its own gets what a server configured like that would answer."""
    engine: Engine = start_engine(model, block_size=BLOCK, memlong={"max_top_k": 5, "max_memory_size": 1024})
    prompt = tokens[:900]
    settings = [{}, {"top_k": 5}, {"memory_size": 128}, {"memory_size": 1024, "top_k": 1}, {"memory_size": 0}]
    for _ in range(2):  # The second time, on shared prefixes.
        requests = [ask(engine, prompt, extra_args=extra_args) for extra_args in settings]
        outputs = engine.run()
        for request, extra_args in zip(requests, settings, strict=True):
            assert_answer(outputs[request], Reference(checkpoints.memlong(**extra_args)), TINY)
    assert cached(outputs[requests[0]]) > 0
    engine.assert_empty()


def test_bad_settings_are_refused_before_the_engine(start_engine: Any, model: Any, tokens: list[int]) -> None:
    engine: Engine = start_engine(model)
    bad_settings: list[dict[str, Any]] = [
        *({"top_k": 3}, {"top_k": 0}, {"memory_size": 1024}, {"memory_size": 100}, {"memory_sise": 16}),
        *({"memory_size": "16"}, {"memory_read": "../etc"}),
    ]
    for bad in bad_settings:
        with pytest.raises(ValueError, match=next(iter(bad))):
            ask(engine, tokens[:50], extra_args=bad)
        engine.assert_empty()


@pytest.mark.parametrize("scope", ["preceding", "current"])
def test_segments_longer_than_blocks(start_engine: Any, checkpoints: Any, tokens: list[int], scope: str) -> None:
    """Under "current" a block's contents depend on text behind it: then nothing is shared."""
    settings = {"retrieval_stride": 64, "local_window": 128, "query_tokens": 64, "query_scope": scope}
    model = checkpoints.memlong(**settings)
    engine: Engine = start_engine(model, block_size=BLOCK)
    document, end = tokens[:600], tokens[900:940]
    other = document[:544] + tokens[2000:2100]  # Shares half a segment with the document.
    reference = Reference(model)
    for prompt in (other, document + end, document + tokens[1000:1020]):
        request = ask(engine, prompt)
        output = engine.run()[request]
        assert_answer(output, reference, TINY)
    assert (cached(output) > 500) == (scope == "preceding")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_any_order_of_arrivals_hits_evictions_and_preemptions(
    start_engine: Any, checkpoints: Any, tokens: list[int], seed: int
) -> None:
    """Few documents, many questions, a bank and a block pool that are far too small for them."""
    memory = [{}, {"memory_size": 128, "top_k": 3}, {"query_scope": "current", "fusion": "joint"}][seed]
    model = checkpoints.memlong(**memory)
    one = 1100 // 16 if seed != 1 else 128 // 16 + 128 // 16
    engine: Engine = start_engine(
        model, block_size=BLOCK, max_model_len=1024, num_gpu_blocks_override=40, max_num_batched_tokens=96 + 32 * seed,
        memlong={"bank_gib": (one + (24, 70, 24)[seed]) * CHUNK_BYTES / 2**30}, max_num_seqs=6,
    )  # fmt: skip
    generator = random.Random(seed)
    documents = [tokens[i * 1500 : i * 1500 + length] for i, length in enumerate((700, 350, 500))]

    def prompt() -> list[int]:
        document = generator.choice(documents)
        cut = generator.choice([len(document), len(document), generator.randrange(100, len(document))])
        first = generator.randrange(6000, 7000)
        return document[:cut] + tokens[first : first + generator.randrange(1, 60)]

    pending = [prompt() for _ in range(22)]

    def arrive(step: int) -> None:
        engine.scheduler.ledger.check()
        if pending and (step % 7 == 0 or generator.random() < 0.2):
            ask(engine, pending.pop(), max_tokens=generator.randrange(1, 90))
        if step and step % 41 == 0:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        if generator.random() < 0.03 and len(engine.scheduler.running) > 1:
            victim = engine.scheduler.running.pop()
            engine.scheduler._preempt_request(victim, 0.0)

    ask(engine, pending.pop())
    outputs = engine.run(arrive)
    while pending:
        ask(engine, pending.pop())
        outputs |= engine.run(arrive)
    assert len(outputs) == 22
    reference = Reference(model)
    for output in outputs.values():
        assert_answer(output, reference, TINY)
    stats = engine.scheduler.memory_stats()
    assert stats["prefix_hit_tokens"] > 300
    assert stats["slot_evictions"] > 50
    assert any(cached(output) for output in outputs.values())
    engine.assert_empty()
