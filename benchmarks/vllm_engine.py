"""A vLLM engine inside its process: answers batches and notes when each token came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from example_text import ExampleText, Piece
from token_times import TokenTimes

# Buffers whose size nothing changes.
FIXED = ("working_set", "staging", "adapted")
COUNTERS = ("holds", "held_seconds", "preemptions", "prefix_hit_tokens", "searches", "search_seconds")
COUNTERS += ("embedding_requests", "embedding_cache_hits", "embedded_texts", "embed_seconds")


def load(model: Path, settings: dict[str, Any]) -> VllmEngine:
    """Args: settings: of ``vllm.LLM``.

    Raises:
        ValueError: if vLLM starts with a type of KV cache that its attention does not list.
    """
    from vllm import LLM

    llm = LLM(model=str(model), disable_log_stats=True, **settings)
    if "kv_cache_dtype" in settings:
        _check_kv_cache(llm.llm_engine.vllm_config, settings["kv_cache_dtype"])
    return VllmEngine(llm)


def _check_kv_cache(config: Any, wanted: str) -> None:
    for layer in config.compilation_config.static_forward_context.values():
        backend = layer.attn_backend
        if wanted not in backend.supported_kv_cache_dtypes:
            known = ", ".join(backend.supported_kv_cache_dtypes)
            raise ValueError(f"{backend.get_name()} lists KV caches of {known}, not of {wanted}")


class VllmEngine:
    def __init__(self, llm: Any) -> None:
        self._llm, self._engine = llm, llm.llm_engine
        self._scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._is_memlong = hasattr(self._scheduler, "memory_stats")
        vocab_size = llm.llm_engine.model_config.get_vocab_size()
        self._text = ExampleText(llm.get_tokenizer(), vocab_size)
        self._steps: list[dict[str, Any]] = []
        self._num_requests = 0
        pool, config = self._scheduler.kv_cache_manager.block_pool, self._scheduler.kv_cache_config
        self._block_bytes = sum(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
        self._pool = pool
        self._fixed_bytes: dict[str, int] = {}
        observe_steps(self._scheduler, self._steps)
        if self._is_memlong:
            stats = self._scheduler.memory_stats()
            self._fixed_bytes = {name: stats[f"bytes_{name}"] for name in ("bank", *FIXED)}

    def describe(self) -> dict[str, Any]:
        cache = self._llm.llm_engine.vllm_config.cache_config
        facts = {
            "shares_prefixes": True,
            "kv_cache_dtype": str(cache.cache_dtype),
            "kv_block_tokens": cache.block_size,
            "kv_blocks": self._pool.num_gpu_blocks - 1,
            "kv_block_bytes": self._block_bytes,
        }
        return facts | {f"{name}_bytes": size for name, size in self._fixed_bytes.items()}

    def answer(
        self,
        prompts: Sequence[Sequence[Piece]],
        max_tokens: int,
        salts: Sequence[str],
        forget_prefixes: bool = False,
        with_steps: bool = False,
    ) -> dict[str, Any]:
        """Answer all prompts in one batch, greedily, to ``max_tokens`` tokens each.

        Args:
            prompts: the pieces of the example text that each consists of.
            salts: requests share prefixes and embeddings with those of the same salt only.
            forget_prefixes: compute all prompts anew; embeddings that are known stay known.
            with_steps: return what the scheduler did in each step.
        """
        if forget_prefixes and not self._llm.reset_prefix_cache():
            raise RuntimeError("prefixes cannot be forgotten while requests are under way")
        token_ids = [self._text.prompt(pieces) for pieces in prompts]
        before = self._counters()
        self._steps.clear()
        result = TokenTimes([len(ids) for ids in token_ids], [0] * len(prompts), [[] for _ in prompts])
        began = time.perf_counter()
        rows = self._add(token_ids, max_tokens, salts)
        while self._engine.has_unfinished_requests():
            outputs, now = self._engine.step(), time.perf_counter() - began
            for output in outputs:
                row = rows[output.request_id]
                new = len(output.outputs[0].token_ids) - len(result.times[row])
                result.times[row] += [now] * new
                result.num_cached[row] = output.num_cached_tokens or 0
                if output.finished and len(result.times[row]) < max_tokens:
                    ended = output.outputs[0]
                    raise RuntimeError(f"a request failed: {ended.finish_reason} {ended.stop_reason or ''}")
            result.total_s = now
            self._note_bytes(result.peak_bytes)
            result.peak_running = max(result.peak_running or 0, self._steps[-1]["num_running"])
        result.counters = {name: value - before[name] for name, value in self._counters().items()}
        if with_steps:
            ended = time.perf_counter()
            result.steps = whole_steps(self._steps, ended)
        return result.as_dict()

    def _add(self, token_ids: Sequence[list[int]], max_tokens: int, salts: Sequence[str]) -> dict[str, int]:
        """Add requests; {request id: row}."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        rows = {}
        for row, (ids, salt) in enumerate(zip(token_ids, salts, strict=True)):
            self._num_requests += 1
            request_id = str(self._num_requests)
            self._engine.add_request(request_id, {"prompt_token_ids": ids, "cache_salt": salt}, parameters)
            rows[request_id] = row
        return rows

    def _counters(self) -> dict[str, float]:
        if not self._is_memlong:
            return {}
        stats = self._scheduler.memory_stats()
        return {name: stats[name] for name in COUNTERS}

    def _note_bytes(self, peak: dict[str, int]) -> None:
        """What is in use now, if it is more than before. Called in every step, so nothing here may take long."""
        used = {"KV": (self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks()) * self._block_bytes}
        if self._is_memlong:
            slots, memories = self._scheduler.ledger.pool, self._scheduler._memories.values()
            used["bank"] = (slots.num_slots - slots.num_available) * self._fixed_bytes["bank"] // slots.num_slots
            used["index"] = sum(memory.retriever.num_index_bytes for memory in memories)
            used |= {name: self._fixed_bytes[name] for name in FIXED}
        if sum(used.values()) > sum(peak.values()):
            peak.update(used)


def observe_steps(scheduler: Any, steps: list[dict[str, Any]]) -> None:
    """Note every call of a scheduler in ``steps``. Times in ms.

    A step has ``began_s`` (of ``time.perf_counter``), ``num_tokens``, ``num_sequences``,
    ``num_running`` (all that are under way, of which a step need not serve each), ``num_searches``, ``num_holds`` and
    ``num_embedding``, texts that are being embedded beside the step (0 in stock vLLM); ``schedule_ms``, of
    ``schedule()``; ``stock_ms``, the part of vLLM's own scheduler in it; ``update_ms`` and ``stock_update_ms``
    likewise of ``update_from_output()``.
    """
    spent = {"schedule": 0.0, "update_from_output": 0.0}
    stock = next(cls for cls in type(scheduler).__mro__ if cls.__module__.startswith("vllm."))
    for name in spent:
        _time_stock(stock, name, spent)
    schedule, update = scheduler.schedule, scheduler.update_from_output
    is_memlong = hasattr(scheduler, "memory_stats")
    counters = scheduler.counters if is_memlong else SimpleNamespace(searches=0, holds=0)

    def schedule_and_note(*args: Any, **kwargs: Any) -> Any:
        searches, holds, began = counters.searches, counters.holds, time.perf_counter()
        output = schedule(*args, **kwargs)
        num_embedding = 0
        if is_memlong:
            num_embedding = scheduler._service.num_pending() + scheduler._service.num_at_work()
        steps.append(
            {
                "began_s": began,
                "schedule_ms": 1000 * (time.perf_counter() - began),
                "stock_ms": 1000 * spent["schedule"],
                "num_tokens": output.total_num_scheduled_tokens,
                "num_sequences": len(output.num_scheduled_tokens),
                "num_running": len(scheduler.running),
                "num_searches": counters.searches - searches,
                "num_holds": counters.holds - holds,
                "num_embedding": num_embedding,
            }
        )
        return output

    def update_and_note(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        outputs = update(*args, **kwargs)
        with suppress(IndexError):  # The step began before it was asked for.
            steps[-1] |= {"update_ms": 1000 * (time.perf_counter() - began)}
            steps[-1] |= {"stock_update_ms": 1000 * spent["update_from_output"]}
        return outputs

    scheduler.schedule, scheduler.update_from_output = schedule_and_note, update_and_note


def _time_stock(stock: type, name: str, spent: dict[str, float]) -> None:
    method = getattr(stock, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            spent[name] = time.perf_counter() - began

    setattr(stock, name, timed)


def whole_steps(steps: Sequence[dict[str, Any]], ended: float) -> list[dict[str, Any]]:
    """Steps with ``whole_ms``, from the beginning of each to that of the next."""
    ends = [*(step["began_s"] for step in steps[1:]), ended]
    return [step | {"whole_ms": 1000 * (end - step["began_s"])} for step, end in zip(steps, ends, strict=True)]
