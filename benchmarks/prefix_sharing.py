"""What later questions about one long document cost, with and without prefix caching.

    python benchmarks/prefix_sharing.py --check --output benchmarks/results/prefix_sharing_cpu_135m.json

Each repetition takes another stretch of the novel as the document and asks its questions one after
another. Each engine lives in a process of its own; they take turns at every question. Engines:
``shared`` (MemLong, prefix caching), ``cold`` (MemLong, ``enable_prefix_caching=False``; it still
keeps embeddings by text), ``full`` (stock vLLM, same backbone, full attention, prefix caching).
``--check`` compares the log-probabilities of ``shared`` with those of ``cold``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from answers import PreparedEngine, generate, observe_embedder, scheduler_of, tokens_of
from engine_process import EngineProcess
from result_file import write_result

from memlong_vllm.config import MemLongConfig
from memlong_vllm.demo.prompts import NOVEL_QUESTIONS
from memlong_vllm.demo_model import demo_checkpoint
from memlong_vllm.evaluation.plain_backbone import plain_backbone

ENGINES = ("shared", "cold", "full")
LIKELIEST = 20  # Log-probabilities compared of every token.


def load(model: Path, settings: dict[str, Any]) -> PreparedEngine:
    return PreparedEngine(prepare, model, settings)


def prepare(llm: Any) -> Callable[..., dict[str, Any]]:
    tokenizer, novel = llm.get_tokenizer(), tokens_of(llm)
    is_memlong = hasattr(scheduler_of(llm), "memory_stats")
    calls = observe_embedder(llm) if is_memlong else []

    def answer(start: int, length: int, question: str, max_tokens: int, chunk_size: int) -> dict[str, Any]:
        document = novel[start : start + length]
        asked = tokenizer(f"\n\nQuestion: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
        calls.clear()
        result = generate(llm, [document + asked], max_tokens, logprobs=LIKELIEST).answers[0]
        chunks = {
            tokenizer.decode(document[i : i + chunk_size], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for i in range(0, length - chunk_size + 1, chunk_size)
        }
        embedded = [text for call in calls for text in call.texts]
        prompt_len = length + len(asked)
        computed = prompt_len - result.num_cached
        return {
            "prompt_tokens": prompt_len,
            "computed_tokens": computed,
            "computed_percent": 100 * computed / prompt_len,
            "embedded_texts": len(embedded) if is_memlong else None,
            "embedded_document_chunks": sum(text in chunks for text in embedded) if is_memlong else None,
            "first_token_s": result.first_token_s,
            "token_ids": result.token_ids,
            "logprobs": result.logprobs,
        }

    return answer


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of two completions: the largest difference of log-probabilities that both state, as long as
    what came before is the same."""
    same, largest, compared = 0, 0.0, 0
    for place, (mine, theirs) in enumerate(zip(one["logprobs"], other["logprobs"], strict=True)):
        common = mine.keys() & theirs.keys()
        largest = max([largest, *(abs(mine[token] - theirs[token]) for token in common)])
        compared += len(common)
        if one["token_ids"][place] != other["token_ids"][place]:
            break
        same += 1
    return {"equal_tokens": same, "of": len(one["token_ids"]), "compared": compared, "max_difference": largest}


def summarise(rows: list[dict[str, Any]], checks: list[dict[str, Any]]) -> dict[str, Any]:
    """By engine, the first question and the later ones: medians and ranges; and the check's worst."""
    table: dict[str, Any] = {}
    for engine in ENGINES:
        for name, is_later in (("first question", False), ("later questions", True)):
            mine = [row for row in rows if row["engine"] == engine and (row["question"] > 0) == is_later]
            seconds = [row["first_token_s"] for row in mine]
            table[f"{engine}, {name}"] = {
                "answers": len(mine),
                "first_token_s": statistics.median(seconds),
                "first_token_s_range": [min(seconds), max(seconds)],
            } | {
                f"most_{name}": max((row[name] for row in mine if row[name] is not None), default=None)
                for name in ("computed_percent", "computed_tokens", "embedded_texts", "embedded_document_chunks")
            }
    shared, cold = table["shared, later questions"], table["cold, later questions"]
    summary = {"table": table, "cold_over_shared_first_token": cold["first_token_s"] / shared["first_token_s"]}
    summary["accepted"] = shared["most_computed_percent"] < 5 and shared["most_embedded_document_chunks"] == 0
    if checks:
        summary["check"] = {
            "answers": len(checks),
            "of_hits": sum(check["is_hit"] for check in checks),
            "max_difference": max(check["max_difference"] for check in checks),
            "equal_completions": sum(check["equal_tokens"] == check["of"] for check in checks),
        }
    return summary


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="MemLong checkpoint; the demo model by default")
    parser.add_argument("--length", type=int, default=16_300, help="tokens of the document")
    parser.add_argument("--questions", type=int, default=4, choices=range(2, 5))
    parser.add_argument("--cold-questions", type=int, default=2, help="of them, asked of the cold engine too")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--full-repetitions", type=int, default=2, help="of them, those with the full engine")
    parser.add_argument("--check", action="store_true", help="compare log-probabilities of shared and cold")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def engine_settings(arguments: argparse.Namespace, config: MemLongConfig) -> dict[str, dict[str, Any]]:
    """By engine, of ``vllm.LLM``. MemLong's KV cache holds a window and a step, not the document."""
    common = {"dtype": "float32", "max_model_len": arguments.length + 200, "max_num_seqs": 1, "enforce_eager": True}
    common |= {"max_num_batched_tokens": 2048, "max_logprobs": LIKELIEST}
    token_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    cache_bytes = {"shared": 384 << 20, "cold": 384 << 20, "full": (arguments.length + 1000) * token_bytes}
    return {
        name: common | {"enable_prefix_caching": name != "cold", "kv_cache_memory_bytes": size}
        for name, size in cache_bytes.items()
    }


def measure(
    engines: dict[str, EngineProcess], arguments: argparse.Namespace, chunk_size: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of measurements and, if asked for, of checks."""
    rows, checks = [], []
    for engine in engines.values():  # Kernels are compiled and threads started.
        engine.ask(start=90_000, length=arguments.length // 4, question="", max_tokens=2, chunk_size=chunk_size)
    for repetition, number in product(range(arguments.repetitions), range(arguments.questions)):
        answers = {}
        for name in ENGINES[:: 1 if repetition % 2 == 0 else -1]:
            if name == "cold" and number >= arguments.cold_questions:
                continue
            if name == "full" and repetition >= arguments.full_repetitions:
                continue
            answers[name] = engines[name].ask(
                start=20_000 * repetition,
                length=arguments.length,
                question=NOVEL_QUESTIONS[number],
                max_tokens=arguments.max_tokens,
                chunk_size=chunk_size,
            )
            kept = {key: value for key, value in answers[name].items() if key != "logprobs"}
            rows.append({"engine": name, "repetition": repetition, "question": number, **kept})
            print(rows[-1], flush=True)
        if arguments.check and "cold" in answers:
            found = difference(answers["shared"], answers["cold"])
            is_hit = answers["shared"]["computed_tokens"] < answers["cold"]["computed_tokens"]
            checks.append({"repetition": repetition, "question": number, "is_hit": is_hit, **found})
            print(checks[-1], flush=True)
    return rows, checks


def main() -> None:
    arguments = parse_arguments()
    checkpoint = arguments.model or demo_checkpoint()
    config = MemLongConfig.from_pretrained(checkpoint)
    settings = engine_settings(arguments, config)
    with tempfile.TemporaryDirectory() as folder:
        plain = plain_backbone(checkpoint, Path(folder) / "full")
        models = {"shared": checkpoint, "cold": checkpoint, "full": plain}
        engines = {name: EngineProcess(load, models[name], settings[name]) for name in ENGINES}
        rows, checks = measure(engines, arguments, config.memory.chunk_size)
        for engine in engines.values():
            engine.stop()
    summary = summarise(rows, checks)
    write_result(arguments.output, settings, [*rows, *({"check": check} for check in checks)], summary)


if __name__ == "__main__":
    main()
