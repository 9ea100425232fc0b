"""A real vLLM engine in this process, driven step by step, and the reference to compare it with."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.sampling_params import RequestOutputKind

from memlong_vllm.config import MemLongConfig
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM, text_embedder
from memlong_vllm.reference.retrieval import NamedMemory
from memlong_vllm.retriever.embedder import load_embedder

Prompt = list[int]


class Engine:
    """vLLM with a MemLong checkpoint in float32.

    Args:
        memlong: entries of ``additional_config["memlong"]``.
        options: of ``vllm.LLM``.
    """

    def __init__(self, model: Path, trace_file: Path, memlong: dict[str, Any] | None = None, **options: Any) -> None:
        self.trace_file = trace_file
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "kv_cache_memory_bytes": 64 << 20,
            "max_num_batched_tokens": 128,
            "max_num_seqs": 8,
            "disable_log_stats": True,
        }
        settings = {"bank_gib": 0.1, "trace_file": str(trace_file)} | (memlong or {})
        options = defaults | options
        self.llm: Any = LLM(model=str(model), additional_config={"memlong": settings}, **options)
        self._num_requests = 0

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def add(self, prompt: Prompt, salt: str | None = None, **sampling: Any) -> str:
        """Add a request with logprobs of all its tokens; returns its id."""
        self._num_requests += 1
        request_id = f"request{self._num_requests}"
        defaults = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}
        parameters = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **(defaults | sampling))
        inputs = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
        self.llm.llm_engine.add_request(request_id, inputs, parameters)
        return request_id

    def step(self) -> list[RequestOutput]:
        return self.llm.llm_engine.step()

    def wait_for_embeddings(self) -> None:
        """Return when no sequence waits for its texts: who runs in a step then depends on no clock."""
        service = self.scheduler._service
        while service.num_pending() + service.num_at_work():
            service.wait(0.1)

    def run(self, before_step: Callable[[int], None] = lambda step: None) -> dict[str, RequestOutput]:
        """Step until every request has finished; ``before_step`` gets the number of the step."""
        finished, step = {}, 0
        while self.llm.llm_engine.has_unfinished_requests():
            before_step(step)
            finished |= {output.request_id: output for output in self.step() if output.finished}
            step += 1
        return finished

    def generate(self, prompts: list[Prompt], **sampling: Any) -> list[RequestOutput]:
        request_ids = [self.add(prompt, **sampling) for prompt in prompts]
        finished = self.run()
        return [finished[request_id] for request_id in request_ids]

    def trace(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.trace_file.read_text().splitlines()]

    def assert_empty(self) -> None:
        """No request left anything behind."""
        self.scheduler.ledger.check()
        stats = self.scheduler.memory_stats()
        names = ("running", "waiting", "sequences", "slots_used", "kv_blocks_used", "pending_embeddings")
        assert {name: stats[name] for name in names} == dict.fromkeys(names, 0)

    def shutdown(self) -> None:
        """May be called again."""
        if self.llm is None:
            return
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


def logprobs_of(output: RequestOutput, index: int = 0) -> tuple[list[int], torch.Tensor]:
    """Token ids of prompt and completion ``index``, and the log-probability of each but the first."""
    completion = output.outputs[index]
    tokens = list(output.prompt_token_ids) + list(completion.token_ids)
    entries = [*output.prompt_logprobs[1:], *completion.logprobs]
    return tokens, torch.tensor([entry[token].logprob for entry, token in zip(entries, tokens[1:], strict=True)])


class Reference:
    """The reference model of a checkpoint with the checkpoint's own retriever."""

    def __init__(self, model: Path) -> None:
        self.model = MemLongForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        config: MemLongConfig = self.model.config
        embedder = load_embedder(config.memory.retriever, str(model), "cpu")
        tokenizer = AutoTokenizer.from_pretrained(model, config=config)
        self.embed = text_embedder(tokenizer, embedder.embed, config.memory.retriever.query_instruction)

    def memorize(self, tokens: list[int]) -> NamedMemory:
        self.model.embed = self.embed
        return self.model.memorize(tokens)

    @torch.inference_mode()
    def logits(
        self,
        tokens: list[int],
        prompt_len: int,
        with_memory: bool = True,
        piece: int | None = None,
        named: Sequence[NamedMemory] = (),
    ) -> Any:
        """[len(tokens), vocabulary]; in one dense pass, or continued in pieces of ``piece`` tokens."""
        self.model.embed = self.embed if with_memory else None
        cache, piece = self.model.new_cache(prompt_len, named), piece or len(tokens)
        parts = [
            self.model(torch.tensor([tokens[i : i + piece]]), past_key_values=cache).logits[0]
            for i in range(0, len(tokens), piece)
        ]
        return torch.cat(parts)

    def logprobs(self, tokens: list[int], prompt_len: int, **options: Any) -> torch.Tensor:
        logits = self.logits(tokens, prompt_len, **options).log_softmax(-1)
        return logits[torch.arange(len(tokens) - 1), tokens[1:]]


def assert_parity(output: RequestOutput, reference: Reference, tolerance: float, greedy: bool = True) -> None:
    """Engine and reference agree on every token, up to the longest answer asked for; and memory is
    what makes them agree.

    Args:
        tolerance: largest difference of log-probabilities.
        greedy: whether the completion must be the reference's argmax.
    """
    prompt_len = len(output.prompt_token_ids)
    for index, completion in enumerate(output.outputs):
        assert completion.finish_reason == "length", completion.stop_reason
        tokens, measured = logprobs_of(output, index)
        logits = reference.logits(tokens, prompt_len)
        expected = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
        difference = (measured - expected).abs().max().item()
        assert difference <= tolerance, f"log-probabilities differ by {difference}"
        if greedy:
            assert tokens[prompt_len:] == logits.argmax(-1)[prompt_len - 1 : -1].tolist()
        without = reference.logprobs(tokens, prompt_len, with_memory=False)
        assert (measured - without).abs().max() > 100 * tolerance, "memory makes no difference here"


def assert_answer(
    output: RequestOutput,
    reference: Reference,
    tolerance: float,
    named: Sequence[NamedMemory] = (),
    index: int = 0,
    greedy: bool = True,
) -> None:
    """Completion ``index`` is as long as asked for, and its log-probabilities are those of the reference,
    which shares nothing."""
    prompt, completion = list(output.prompt_token_ids), output.outputs[index]
    assert completion.finish_reason == "length", completion.stop_reason
    answer = list(completion.token_ids)
    logits = reference.logits(prompt + answer, len(prompt), named=named)[len(prompt) - 1 : -1]
    assert not greedy or answer == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1)[torch.arange(len(answer)), answer]
    measured = torch.tensor([entry[token].logprob for entry, token in zip(completion.logprobs, answer, strict=True)])
    difference = (measured - expected).abs().max().item()
    assert difference <= tolerance, f"log-probabilities differ by {difference}"
