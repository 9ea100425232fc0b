"""One batch of questions through vLLM, step by step, and what it took."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from memlong_vllm.config import MemLongConfig
from memlong_vllm.demo.prompts import DemoError, Question

# About a question's length: of a longer query most would be the last lines of the text, and those
# would be found, not what was asked for; a shorter one would be the chat format's end.
QUERY_TOKENS = 32
MAX_STEP_TOKENS = 1024
KEY_TOKENS = 7  # Five digits, what is before and what is after them.


@dataclass
class Run:
    """What one batch did.

    Attributes:
        questions: by the engine's own request id, which is also the trace's.
        block_bytes: a KV cache block, all layers together. itemsize: bytes of a number in it.
        prompt_seconds: until the last prompt was computed; earlier prompts' answers began meanwhile.
        decode_seconds, decode_tokens: of the time after that.
        peak_blocks, peak_slots, peak_tokens: most KV cache blocks, bank slots and tokens of
            unfinished sequences there were after any step.
    """

    questions: dict[str, Question]
    block_bytes: int
    itemsize: int
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    peak_blocks: int = 0
    peak_slots: int = 0
    peak_tokens: int = 0
    shared_tokens: int = 0


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what libraries, also native ones, write to stderr; show it if the block fails."""
    if os.environ["VLLM_LOGGING_LEVEL"] != "ERROR":
        yield
        return
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


def start_engine(checkpoint: Path, config: MemLongConfig, num_sequences: int, max_length: int, trace: Path) -> Any:
    """A vLLM engine in this process, with room for the sequences' windows rather than all of them."""
    from vllm import LLM
    from vllm.platforms import current_platform

    window_tokens = config.memory.local_window + MAX_STEP_TOKENS + 2 * config.memory.chunk_size
    token_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    settings = {"trace_file": str(trace), "prompt_query_tokens": QUERY_TOKENS}
    return LLM(
        model=str(checkpoint),
        # "auto" would serve a float32 checkpoint in bfloat16, which many CPUs only emulate.
        dtype=config.dtype if current_platform.is_cpu() and config.dtype else "auto",
        enforce_eager=True,
        max_model_len=max_length,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=MAX_STEP_TOKENS,
        kv_cache_memory_bytes=int(1.25 * num_sequences * window_tokens * token_bytes),
        use_tqdm_on_load=False,
        additional_config={"memlong": settings},
    )


def answer_all(llm: Any, questions: list[Question], max_tokens: int) -> Run:
    """Compute all prompts in one batch, step by step, and measure.

    Raises:
        DemoError: if the engine ended a request with an error.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    cache = scheduler.kv_cache_config
    block_bytes = sum(tensor.size for tensor in cache.kv_cache_tensors) // cache.num_blocks
    run = Run({}, block_bytes, engine.model_config.dtype.itemsize)
    for number, question in enumerate(questions):
        inputs = {"prompt_token_ids": question.token_ids}
        # Greedy, so that runs agree; without the penalty so small a model repeats itself.
        penalty, length = (0.0, KEY_TOKENS) if question.key else (0.5, max_tokens)
        reads = None if question.with_memory else {"memory_size": 0}
        parameters = SamplingParams(temperature=0.0, frequency_penalty=penalty, max_tokens=length, extra_args=reads)
        run.questions[engine.add_request(str(number), inputs, parameters)] = question
    total = sum(len(question.token_ids) for question in questions)
    start, interactive = time.perf_counter(), sys.stderr.isatty()
    with tqdm(total=total, desc="prompts", unit=" tokens", mininterval=0.2 if interactive else 15) as bar:
        while engine.has_unfinished_requests():
            num_before = sum(question.num_tokens for question in questions)
            outputs, now = engine.step(), time.perf_counter() - start
            for output in outputs:
                record_answer(questions[int(output.request_id)], output.outputs[0], now)
            num_answered = sum(question.num_tokens for question in questions)
            if bar.n < total:
                run.prompt_seconds = now
            else:
                run.decode_tokens += num_answered - num_before
                run.decode_seconds = now - run.prompt_seconds
            bar.set_postfix_str(f"{num_answered} answer tokens", refresh=interactive)
            bar.update(num_prompt_tokens_computed(run, scheduler) - bar.n)
            record_peaks(run, scheduler)
    return run


def record_answer(question: Question, completion: Any, now: float) -> None:
    if completion.finish_reason == "error":
        raise DemoError(f"the engine failed on {question.text!r}: {completion.stop_reason}")
    if question.num_tokens == 0:
        question.first_token_at = now
    question.answer, question.num_tokens, question.last_token_at = completion.text, len(completion.token_ids), now


def record_peaks(run: Run, scheduler: Any) -> None:
    pool, ledger = scheduler.kv_cache_manager.block_pool, scheduler.ledger
    num_blocks = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # One is vLLM's null block.
    run.peak_blocks = max(run.peak_blocks, num_blocks)
    run.peak_slots = max(run.peak_slots, ledger.pool.num_slots - ledger.pool.num_available)
    # Tokens that a sequence took over from another are held once, here and with full attention.
    run.shared_tokens = scheduler.counters.prefix_hit_tokens
    num_computed = sum(request.num_computed_tokens for request in scheduler.requests.values())
    run.peak_tokens = max(run.peak_tokens, num_computed - run.shared_tokens)


def num_prompt_tokens_computed(run: Run, scheduler: Any) -> int:
    """Of all requests together; one that the scheduler does not know any more is done."""
    computed = {request_id: request.num_computed_tokens for request_id, request in scheduler.requests.items()}
    lengths = {request_id: len(question.token_ids) for request_id, question in run.questions.items()}
    return sum(min(length, computed.get(request_id, length)) for request_id, length in lengths.items())


def read_prompt_end_retrievals(trace: Path) -> dict[str, dict[str, Any]]:
    """The trace's lines of kind ``prompt_end``, by request id."""
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    return {line["request_id"]: line for line in lines if line["kind"] == "prompt_end"}
