"""Models run by a vLLM engine in this process."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from memlong_vllm.config import MemLongConfig, resolve
from memlong_vllm.evaluation.models import ModelSpec, end_ids_of
from memlong_vllm.evaluation.scoring import RANDOM_EMBEDDER, Continuation, EvaluationError, Prompt, ScorerSettings
from memlong_vllm.memories.errors import MemoryLibraryError
from memlong_vllm.named import delete_memory, memorize_tokens, memory_params
from memlong_vllm.retriever.embedder import RetrieverLoadError

MIN_KV_BYTES = 32 << 20


class VllmScorer:
    """A :class:`~memlong_vllm.evaluation.scoring.Scorer` with a real engine.

    Args:
        spec: the model; its folder as :mod:`memlong_vllm.evaluation.opening` made it.

    Raises:
        EvaluationError: if vLLM refuses the model or the settings.
    """

    def __init__(self, spec: ModelSpec, settings: ScorerSettings) -> None:
        # In this process: a failure is raised where it happens, and nothing is left running.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        self._spec, self._batch = spec, settings.batch
        self._trace = settings.scratch / f"trace-{spec.label}.jsonl"
        self._trace_offset = 0
        try:
            self._llm: Any = LLM(model=str(spec.path), **self._options(spec, settings))
        except (ValueError, RetrieverLoadError) as error:
            raise EvaluationError(f"the engine of '{spec.label}' does not start: {_reason(error)}") from error
        self.tokenizer: Any = self._llm.get_tokenizer()
        self.end_ids = end_ids_of(spec.path, self.tokenizer)

    def _options(self, spec: ModelSpec, settings: ScorerSettings) -> dict[str, Any]:
        from vllm.platforms import current_platform

        config = spec.config
        options: dict[str, Any] = {
            "dtype": settings.dtype,
            "enforce_eager": True,
            "max_model_len": settings.max_length,
            "max_num_seqs": settings.batch,
            "max_num_batched_tokens": max(settings.piece, settings.batch),
            "enable_chunked_prefill": True,
            "use_tqdm_on_load": False,
        }
        if settings.max_length > config["max_position_embeddings"]:
            options["hf_overrides"] = {"max_position_embeddings": settings.max_length}
        if spec.kind == "memlong":
            options["additional_config"] = {"memlong": self._memlong(spec, settings)}
        if current_platform.is_cpu():  # On a GPU vLLM takes what the weights leave.
            options["kv_cache_memory_bytes"] = self._kv_bytes(spec, settings)
        return options

    def _memlong(self, spec: ModelSpec, settings: ScorerSettings) -> dict[str, Any]:
        memory, _ = resolve(MemLongConfig.from_pretrained(spec.path), {"memlong": settings.memlong})
        entry = dict(settings.memlong) | {"trace_file": str(self._trace)}
        if (most := max(settings.memory_size or 0, memory.memory_size)) > 0:  # A control's memory is off.
            entry |= {"max_memory_size": most}
        entry |= {"max_top_k": max(settings.top_k or 0, memory.top_k)}
        if spec.random_retrieval:
            entry["retriever"] = dict(entry.get("retriever") or {}) | {"model": RANDOM_EMBEDDER}
            entry.pop("retriever_path", None)
        return entry

    @staticmethod
    def _kv_bytes(spec: ModelSpec, settings: ScorerSettings) -> int:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        config = spec.config
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        num_kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        # MemLong pads heads to a size that vLLM's attention takes.
        sizes = CPUAttentionBackend.get_supported_head_sizes()
        head_dim = min((size for size in sizes if size >= head_dim), default=head_dim)
        itemsize = 4 if settings.dtype == "float32" else 2
        token_bytes = config["num_hidden_layers"] * 2 * num_kv_heads * head_dim * itemsize
        # Blocks are of up to 128 tokens; a window needs one more at either end.
        window = settings.max_length if spec.window is None else spec.window + settings.piece + 256
        tokens = min(settings.max_length, window) + 256
        return max(MIN_KV_BYTES, int(1.25 * settings.batch * tokens * token_bytes))

    def logprobs(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        results = []
        for output in self._generate(prompts, max_tokens=1, prompt_logprobs=0):
            entries = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            results.append(np.array([entry[token].logprob for entry, token in entries], dtype=np.float64))
        return results

    def continuations(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Continuation]:
        outputs = self._generate(prompts, max_tokens=max_tokens, stop_token_ids=sorted(self.end_ids))
        retrievals = self._read_retrievals()
        results = []
        for output in outputs:
            token_ids = list(output.outputs[0].token_ids)
            if token_ids and token_ids[-1] in self.end_ids:
                token_ids.pop()
            found = retrievals.get(output.request_id, {})
            retrieved = tuple(found.get("chunk_ids", ())) if self._spec.kind == "memlong" else None
            results.append(Continuation(token_ids, retrieved, len(found.get("named", ()))))
        return results

    def candidates(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

        most = max(map(len, token_ids), default=0)
        if most > MAX_LOGPROB_TOKEN_IDS:
            raise EvaluationError(f"{most} candidates: vLLM scores at most {MAX_LOGPROB_TOKEN_IDS}; use fewer labels")
        each = [{"logprob_token_ids": list(ids)} for ids in token_ids]
        results = []
        for output, ids in zip(self._generate(prompts, each, max_tokens=1), token_ids, strict=True):
            entry = output.outputs[0].logprobs[0]
            results.append(np.array([entry[token].logprob for token in ids], dtype=np.float64))
        return results

    def memorize(self, name: str, texts: Sequence[Sequence[int]]) -> int:
        if self._spec.kind != "memlong":
            raise EvaluationError(f"the model '{self._spec.label}' has no memory to write '{name}' to")
        try:
            # One by one: which of the texts of a call comes first is not fixed.
            memories = [memorize_tokens(self._llm, name, [text]) for text in texts]
            return int(memories[-1]["num_chunks"])
        except MemoryLibraryError as error:
            raise EvaluationError(f"memory '{name}': {error}") from error

    def forget(self, name: str) -> None:
        delete_memory(self._llm, name)

    def _generate(
        self, prompts: Sequence[Prompt], each: Sequence[dict[str, Any]] | None = None, **sampling: Any
    ) -> list[Any]:
        """Answer the prompts greedily. ``each``: sampling parameters of single prompts."""
        from vllm import SamplingParams

        parameters = []
        for prompt, own in zip(prompts, each or [{}] * len(prompts), strict=True):
            memory = prompt.memory
            extra = memory_params(memory.read, memory_size=memory.size, top_k=memory.top_k)
            if self._spec.kind != "memlong" and extra:
                raise EvaluationError(f"the model '{self._spec.label}' has no memory, but a prompt asks for {extra}")
            parameters.append(
                SamplingParams(
                    temperature=0, ignore_eos=True, detokenize=False, extra_args=extra or None, **sampling, **own
                )
            )
        inputs = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        for output in outputs:
            if output.outputs[0].finish_reason == "error":
                raise EvaluationError(f"the engine failed on a prompt: {output.outputs[0].stop_reason}")
        return outputs

    def _read_retrievals(self) -> dict[str, dict[str, Any]]:
        """By request, the retrieval at its prompt's end, of what the trace got since the last call."""
        if not self._trace.exists():
            return {}
        with self._trace.open(encoding="utf-8") as file:
            file.seek(self._trace_offset)
            lines = [json.loads(line) for line in file.read().splitlines()]
            self._trace_offset = file.tell()
        # vLLM appends a random suffix to the ids it works with.
        return {line["request_id"].rpartition("-")[0]: line for line in lines if line["kind"] == "prompt_end"}

    def close(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reason(error: Exception) -> str:
    """What an error says, without the object that pydantic prints after it."""
    errors = getattr(error, "errors", None)
    return "; ".join(entry["msg"] for entry in errors()) if callable(errors) else str(error)


def supported_head_sizes() -> list[int] | None:
    """Of vLLM's own attention where it has one backend only, on CPUs; None: it chooses one that fits."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return list(CPUAttentionBackend.get_supported_head_sizes())
