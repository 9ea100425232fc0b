"""``memlong-vllm demo``: ask a small real model questions about a novel, through vLLM.

Everything that is printed is measured in this run or computed from the checkpoint's shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoTokenizer

import memlong_vllm
from memlong_vllm.cli.model_argument import DEMO, ModelArgumentError, resolve_model
from memlong_vllm.config import MemLongConfig, MemoryConfigError

NOVEL = Path(memlong_vllm.__file__).parents[1] / "examples" / "data" / "doyle_lost_world.txt"
NOVEL_QUESTIONS = (
    "Who was Maple White, how did he die, and what was found in the sketch-book that he left behind?",
    "What does Tarp Henry, the bacteriologist of Nature, tell Malone about the zoologist George Edward Challenger?",
    "What kind of man does Gladys want to love and to marry? What must a man do before she would be his wife?",
    "What does the news editor McArdle tell Malone about Professor Challenger's expedition to South America?",
)
GENERAL_QUESTIONS = (
    "Who is the most important person in this text, and how is this person described when first mentioned?",
    "Where do the events of this text take place, and how is that place described?",
    "What do the people in this text argue about, and who disagrees with whom?",
    "What problem is described at the beginning of this text, and what is planned to solve it?",
)
DEFAULT_TOKENS = 16384
# About a question's length. With the checkpoint's 128, most of the query at the prompt's end
# would be the last lines of the text, and those would be found, not what was asked for.
QUERY_TOKENS = 64
MAX_STEP_TOKENS = 1024
MIB = 1 << 20
WIDTH = 100


class DemoError(ValueError):
    """The demo cannot run as asked. The message is one line for the user."""


@dataclass
class Question:
    """A question, its whole prompt as tokens, and the answer. Times are seconds since the batch began."""

    text: str
    token_ids: list[int]
    answer: str = ""
    num_tokens: int = 0
    first_token_at: float = 0.0
    last_token_at: float = 0.0


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


# Preparing.


def read_document(path: Path | None) -> str:
    if path is None and not NOVEL.is_file():
        raise DemoError("the novel is in the source checkout only (examples/data): name a text with --document FILE")
    try:
        return (path or NOVEL).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise DemoError(f"--document {path or NOVEL}: {reason}") from error


def build_prompts(
    tokenizer: Any, config: MemLongConfig, document: str, num_tokens: int | None, questions: Sequence[str]
) -> list[Question]:
    """One prompt a question: the document's first ``num_tokens`` tokens, then the question, as a
    user's message in the model's chat format. All share their tokens up to the question.

    Raises:
        DemoError: if the document has fewer tokens, or so few are asked for that all stay in the window.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    document_ids = encode(document)
    if num_tokens is not None and num_tokens > len(document_ids):
        raise DemoError(f"the document has {len(document_ids)} tokens; --tokens {num_tokens} is more")
    num_tokens = num_tokens or min(DEFAULT_TOKENS, len(document_ids))
    least = config.memory.local_window + 2 * config.memory.chunk_size
    if num_tokens < least:
        raise DemoError(
            f"{num_tokens} tokens are too few: with less than {least}, nothing has left the local window "
            f"of {config.memory.local_window} tokens, so there is nothing to retrieve"
        )
    before, after = "", "\nAnswer:"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": "\x00"}]
        before, _, after = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).partition(
            "\x00"
        )
    shared = encode(before) + document_ids[:num_tokens]
    return [Question(q, shared + encode(f"\n\n{q} Answer in one sentence.{after}")) for q in questions]


def gates_are_zero(checkpoint: Path) -> bool:
    """Whether every ``memory_gate`` of the checkpoint is zero, as conversion leaves them."""
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith(".memory_gate")]  # noqa: SIM118
            if any(bool(tensors.get_tensor(name).any()) for name in names):
                return False
    return True


# Running.


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
    settings = {"trace_file": str(trace), "query_tokens": min(QUERY_TOKENS, config.memory.query_tokens)}
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
    # Greedy, so that runs agree; without the penalty so small a model repeats itself.
    parameters = SamplingParams(temperature=0.0, frequency_penalty=0.5, max_tokens=max_tokens)
    for number, question in enumerate(questions):
        inputs = {"prompt_token_ids": question.token_ids}
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


# Reporting.


def print_answers(run: Run, config: MemLongConfig, tokenizer: Any, retrieved: dict[str, dict[str, Any]]) -> None:
    size = config.memory.chunk_size
    for number, (request_id, question) in enumerate(run.questions.items(), start=1):
        found = retrieved[request_id]
        print(f"\nQuestion {number}: {question.text}")
        print(f"  retrieved at the prompt's end (position {found['position']:,}), ", end="")
        print(f"{len(found['chunk_ids'])} of {found['eligible']} chunks outside the window:")
        for score, chunk in sorted(zip(found["scores"], found["chunk_ids"], strict=True), reverse=True):
            first = chunk * size
            text = tokenizer.decode(question.token_ids[first : first + size], skip_special_tokens=True)
            passage = " ".join(text.split())[:150]
            print(f"    chunk {chunk:3}, tokens {first:,}-{first + size - 1:,}, score {score:.3f}")
            print(textwrap.fill(passage + " …", WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8))
        print(textwrap.fill(f"  answer: {question.answer.strip()}", WIDTH, subsequent_indent=" " * 10))
        elapsed = question.last_token_at - question.first_token_at
        speed = f", then {(question.num_tokens - 1) / elapsed:.1f} tokens/s" if elapsed > 0 else ""
        beside = " (beside the other prompts)" if question.first_token_at < run.prompt_seconds else ""
        print(f"  {question.num_tokens} tokens, the first after {question.first_token_at:.1f} s{speed}{beside}")


def print_measurements(run: Run, config: MemLongConfig) -> None:
    kv_bytes = 2 * config.num_key_value_heads * config.head_dim * run.itemsize  # A token in one layer.
    slot_bytes = config.memory.chunk_size * kv_bytes
    cache, bank = run.peak_blocks * run.block_bytes, run.peak_slots * slot_bytes
    full = config.num_hidden_layers * run.peak_tokens * kv_bytes
    rows = [
        ("KV cache", cache, f"{run.peak_blocks} blocks of {run.block_bytes / MIB:.2f} MiB (all layers)"),
        ("memory bank", bank, f"{run.peak_slots} chunks of {slot_bytes / MIB:.2f} MiB (one layer)"),
        ("both", cache + bank, f"{(cache + bank) / full:.1%} of the next line"),
        ("full attention", full, f"KV of {run.peak_tokens:,} tokens in {config.num_hidden_layers} layers (computed)"),
    ]
    print(f"\nThe run: {len(run.questions)} sequences in one batch; memory at its peak")
    for name, num_bytes, note in rows:
        print(f"  {name:<16}{num_bytes / MIB:>9,.1f} MiB        {note}")
    num_prompt_tokens = sum(len(question.token_ids) for question in run.questions.values()) - run.shared_tokens
    print(f"  {'prefill':<16}{num_prompt_tokens / run.prompt_seconds:>9,.0f} tokens/s", end="")
    print(f"   {num_prompt_tokens:,} tokens in {run.prompt_seconds:.1f} s, embedding and retrieval included")
    print(f"  {'':<35}and {run.shared_tokens:,} tokens taken over from the first prompt")
    if run.decode_seconds > 0:
        print(f"  {'decode':<16}{run.decode_tokens / run.decode_seconds:>9,.0f} tokens/s", end="")
        print(f"   {run.decode_tokens} tokens after the last prompt was computed")


def print_gate_note(checkpoint: Path, config: MemLongConfig) -> None:
    if config.memory.fusion == "gated" and gates_are_zero(checkpoint):
        note = (
            "Note: every memory gate of this checkpoint is zero, as conversion leaves them. What is "
            "retrieved is attended to with weight 0, so the answers come from the last "
            f"{config.memory.local_window:,} tokens alone until trained gates (an adapter) are loaded."
        )
        print("\n" + textwrap.fill(note, WIDTH))


# The command.


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEMO, metavar="DIR", help="MemLong checkpoint (default: demo, a small one)")
    parser.add_argument("--document", type=Path, metavar="FILE", help="UTF-8 text (default: The Lost World, 1912)")
    parser.add_argument(
        "--tokens",
        type=_positive,
        metavar="N",
        help=f"how much of the text each prompt has (default: {DEFAULT_TOKENS})",
    )
    parser.add_argument(
        "--questions",
        type=int,
        choices=range(1, 5),
        default=4,
        metavar="N",
        help="how many to ask, 1 to 4 (default: 4)",
    )
    parser.add_argument("--ask", action="append", metavar="TEXT", help="ask this instead; may be given several times")
    parser.add_argument("--max-tokens", type=_positive, default=48, metavar="N", help="of an answer (default: 48)")


def run(arguments: argparse.Namespace) -> int:
    # In this process, so that the scheduler can be looked at; set before vLLM is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        document = read_document(arguments.document)
        checkpoint = resolve_model(arguments.model)
        if not (checkpoint / "modeling_memlong.py").is_file():
            raise DemoError(f"--model {arguments.model} is no MemLong checkpoint: make one with memlong-vllm convert")
        demonstrate(arguments, checkpoint, document)
    except (DemoError, ModelArgumentError, MemoryConfigError) as error:
        print(f"memlong-vllm demo: {error}", file=sys.stderr)
        return 2
    return 0


def demonstrate(arguments: argparse.Namespace, checkpoint: Path, document: str) -> None:
    config = MemLongConfig.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, config=config)
    built_in = NOVEL_QUESTIONS if arguments.document is None else GENERAL_QUESTIONS
    texts = arguments.ask or built_in[: arguments.questions]
    questions = build_prompts(tokenizer, config, document, arguments.tokens, texts)
    longest, reach = max(len(question.token_ids) for question in questions), config.max_position_embeddings
    max_length = longest + arguments.max_tokens
    if max_length > reach:
        raise DemoError(f"prompt and answer are {max_length} tokens; this checkpoint reaches {reach}: lower --tokens")
    print(f"model     {checkpoint}")
    print(f"document  {arguments.document or NOVEL}")
    print(f"batch     {len(questions)} prompts of up to {longest:,} tokens; ", end="")
    print(
        f"local window {config.memory.local_window:,}, top {config.memory.top_k} chunks of {config.memory.chunk_size}"
    )
    with tempfile.TemporaryDirectory(prefix="memlong-demo-") as folder:
        trace, start = Path(folder) / "trace.jsonl", time.perf_counter()
        with quiet_stderr():
            llm = start_engine(checkpoint, config, len(questions), max_length, trace)
        print(f"engine    vLLM started in {time.perf_counter() - start:.1f} s", flush=True)
        try:
            result = answer_all(llm, questions, arguments.max_tokens)
        finally:
            llm.llm_engine.engine_core.shutdown()
        retrieved = read_prompt_end_retrievals(trace)
    print_answers(result, config, tokenizer, retrieved)
    print_measurements(result, config)
    print_gate_note(checkpoint, config)
