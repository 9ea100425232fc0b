"""``memlong-vllm demo``: ask a small real model questions about a novel, through vLLM."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from memlong_vllm.cli.model_argument import DEMO, ModelArgumentError, resolve_model
from memlong_vllm.config import MemLongConfig, MemoryConfigError
from memlong_vllm.demo.prompts import (
    DEFAULT_TOKENS,
    GENERAL_QUESTIONS,
    NOVEL,
    NOVEL_QUESTIONS,
    DemoError,
    build_prompts,
    read_document,
)
from memlong_vllm.demo.report import print_answers, print_gate_note, print_keys, print_measurements
from memlong_vllm.demo.session import answer_all, quiet_stderr, read_prompt_end_retrievals, start_engine


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
    parser.add_argument(
        "--path",
        action="store_true",
        help="only print where the model's folder is, once it is made: vllm serve $(memlong-vllm demo --path)",
    )
    parser.add_argument("--max-tokens", type=_positive, default=48, metavar="N", help="of an answer (default: 48)")


def run(arguments: argparse.Namespace) -> int:
    # In this process, so that the scheduler can be looked at; set before vLLM is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        checkpoint = resolve_model(arguments.model)
        if arguments.path:
            print(checkpoint)
            return 0
        document = read_document(arguments.document)
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
    print_keys(result)
    print_measurements(result, config)
    print_gate_note(checkpoint, config)
