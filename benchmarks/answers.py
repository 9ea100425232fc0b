"""What a vLLM engine in this process answers, token by token, with log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from example_text import DOCUMENT


@dataclass
class Answer:
    """What one request got, and when. Times are seconds since its batch was added.

    Attributes:
        num_cached: prompt tokens that were not computed.
        logprobs: of every token of the completion, {token id: log-probability} of the likeliest.
    """

    first_token_s: float = 0.0
    num_cached: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)


@dataclass
class Batch:
    """What a batch of requests got.

    Attributes:
        answers: in the order of the prompts.
        prompts_s: until every request had its first token; ``total_s``: until the last token.
        num_decoded: tokens that came after ``prompts_s``.
    """

    answers: list[Answer]
    prompts_s: float = 0.0
    total_s: float = 0.0
    num_decoded: int = 0


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def tokens_of(llm: Any) -> list[int]:
    """The example text."""
    return llm.get_tokenizer()(DOCUMENT.read_text(encoding="utf-8"))["input_ids"]


def generate(
    llm: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    after_prompts: Callable[[], None] = lambda: None,
    **sampling: Any,
) -> Batch:
    """Answer all prompts in one batch, greedily, step by step.

    Args:
        after_prompts: called once, when every request has its first token.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **sampling)
    engine, batch = llm.llm_engine, Batch([Answer() for _ in prompts])
    began = time.perf_counter()
    for row, prompt in enumerate(prompts):
        engine.add_request(str(row), {"prompt_token_ids": prompt}, parameters)
    has_prompts = False
    while engine.has_unfinished_requests():
        outputs, now = engine.step(), time.perf_counter() - began
        for output in outputs:
            answer, completion = batch.answers[int(output.request_id)], output.outputs[0]
            batch.num_decoded += (len(completion.token_ids) - len(answer.token_ids)) * has_prompts
            answer.first_token_s = answer.first_token_s or now
            answer.num_cached = output.num_cached_tokens or 0
            answer.token_ids = list(completion.token_ids)
            answer.logprobs = [{t: e.logprob for t, e in entry.items()} for entry in completion.logprobs or ()]
        batch.total_s = now
        if not has_prompts and all(answer.token_ids for answer in batch.answers):
            has_prompts, batch.prompts_s = True, now
            after_prompts()
    return batch


@dataclass(frozen=True)
class EmbedderCall:
    texts: list[str]
    seconds: float


def observe_embedder(llm: Any) -> list[EmbedderCall]:
    """The calls of a MemLong engine's embedder from now on, as they come."""
    calls: list[EmbedderCall] = []
    embedder = scheduler_of(llm)._service._embedder
    embed = embedder.embed

    def embed_and_note(texts: list[str]) -> Any:
        began = time.perf_counter()
        vectors = embed(texts)
        calls.append(EmbedderCall(list(texts), time.perf_counter() - began))
        return vectors

    embedder.embed = embed_and_note
    return calls


class PreparedEngine:
    """An engine for :class:`engine_process.EngineProcess` that a benchmark's function answers for.

    Args:
        prepare: gets the ``vllm.LLM``, returns what answers a request's fields with a measurement.
    """

    def __init__(self, prepare: Callable[[Any], Callable[..., dict[str, Any]]], model: Path, settings: Any) -> None:
        from vllm import LLM

        self.answer = prepare(LLM(model=str(model), **settings))

    def describe(self) -> dict[str, Any]:
        return {}
