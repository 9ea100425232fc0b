"""vLLM's scheduler with a retrieval step: decides what each engine step writes and retrieves."""

from __future__ import annotations

import copy
import time
from dataclasses import fields
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from memlong_vllm.config import bank_slots, resolve
from memlong_vllm.plan import StepPlan
from memlong_vllm.retriever.embedder import load_embedder
from memlong_vllm.retriever.service import RetrieverService
from memlong_vllm.scheduler.ledger import Ledger
from memlong_vllm.scheduler.output import MemLongSchedulerOutput
from memlong_vllm.scheduler.sequence_retriever import SequenceRetriever
from memlong_vllm.scheduler.trace import RetrievalTrace

logger = init_logger(__name__)

# While every request waits for embeddings there is nothing to run; a short wait keeps the engine
# from spinning and still lets it take new requests and aborts.
_IDLE_WAIT_S = 0.02


class MemLongScheduler(Scheduler):
    """Scheduling as in vLLM, with each step's memory plan on its output.

    A request is admitted once the bank has room for all it can hold, and takes part in a step
    only when the retrievals of that step's tokens are ready; meanwhile the others go on.

    Attributes:
        ledger: owner of the bank's slots.
        num_holds: how often a request was kept out of a step because it waited for embeddings.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        model_config = vllm_config.model_config
        self._memory, deployment = resolve(model_config.hf_config, vllm_config.additional_config)
        self.ledger = Ledger(self._memory, bank_slots(vllm_config), self.max_num_scheduled_tokens)
        self.num_holds = 0
        self._sequences: dict[str, SequenceRetriever] = {}
        self._failures: dict[str, str] = {}
        self._admission_blocked = False
        self._trace = RetrievalTrace(deployment.trace_file) if deployment.trace_file else None
        retriever = self._memory.retriever
        # A copy of its own: a tokenizer must not be used by two threads at once.
        tokenizer = copy.deepcopy(cached_tokenizer_from_config(model_config))
        self._service = RetrieverService(
            load_embedder(retriever, model_config.model, deployment.retriever_device),
            lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False),
            retriever.query_instruction,
            deployment.retriever_batch_size or (1 if deployment.retriever_device == "cpu" else 32),
            deployment.retriever_cache_size,
        )

    # Requests come and go.

    def add_request(self, request: Request) -> None:
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if not is_new:
            return
        if refusal := self._refusal(request):
            self._failures[request.request_id] = refusal
            return
        sequence = SequenceRetriever(
            request.request_id, request.num_prompt_tokens, self._max_tokens(request), self._memory, self._service
        )
        self._sequences[request.request_id] = sequence
        sequence.observe(request.all_token_ids)

    @staticmethod
    def _refusal(request: Request) -> str | None:
        """Why a request cannot be served, if so."""
        if request.resumable:
            return "streaming input sessions are not supported by MemLong"
        arguments = (request.sampling_params and request.sampling_params.extra_args) or {}
        unknown = sorted(name for name in arguments if name.startswith(("memlong", "memory_")))
        return f"extra_args {unknown}: MemLong has no settings per request" if unknown else None

    def _max_tokens(self, request: Request) -> int:
        return min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.ledger.close(request.request_id)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.ledger.close(request.request_id)
        self._failures.pop(request.request_id, None)
        self._sequences.pop(request.request_id, None)
        self._service.cancel(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    # The step.

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._collect_failures()
        self.ledger.free_retired()
        self._admission_blocked = False
        num_holds = self.num_holds
        for request in self.running:
            if not self._is_ready(request):
                # Skips the request in this step only (checked in Scheduler.schedule).
                request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens == 0 and self.num_holds > num_holds:
            self._service.wait(_IDLE_WAIT_S)
        return self._with_plan(output)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting request may be admitted in this step (vLLM asks for each)."""
        if not super()._handle_blocked_waiting_request(request):
            return False
        if request.request_id in self._failures:
            return False
        if self.ledger.is_open(request.request_id):
            return self._is_ready(request)
        # No overtaking: the first request that waits for slots is the next to get some.
        max_tokens = self._max_tokens(request)
        self._admission_blocked = self._admission_blocked or not self.ledger.can_open(max_tokens)
        if self._admission_blocked or not self._is_ready(request):
            return False
        self.ledger.open(request.request_id, request.num_prompt_tokens, max_tokens)
        return True

    def _is_ready(self, request: Request) -> bool:
        """Whether whatever this step can schedule of a request has its retrievals ready."""
        sequence = self._sequences.get(request.request_id)
        start = request.num_computed_tokens
        end = min(request.num_tokens, start + self.max_num_scheduled_tokens)
        ready = sequence is not None and sequence.is_ready(start, end)
        self.num_holds += not ready
        return ready

    def _with_plan(self, output: SchedulerOutput) -> MemLongSchedulerOutput:
        plans = []
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            # super().schedule() has advanced num_computed_tokens past the step already.
            end = self.requests[request_id].num_computed_tokens
            search = self._sequences[request_id].search
            plan, events = self.ledger.advance(request_id, end - num_tokens, end, search)
            plans.append(plan)
            if self._trace is not None:
                for event in events:
                    self._trace.write(request_id, event)
        values = {f.name: getattr(output, f.name) for f in fields(SchedulerOutput)}
        return MemLongSchedulerOutput(**values, step_plan=StepPlan(tuple(plans)))

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            if request is not None and request_id in self._sequences:
                self._sequences[request_id].observe(request.all_token_ids)
        self._collect_failures()
        self._finish_failed(outputs)
        return outputs

    # Failures.

    def _collect_failures(self) -> None:
        for request_id, reason in self._service.take_failures().items():
            if request_id in self.requests:
                self._failures[request_id] = f"the retriever failed: {reason}"
                self._sequences.pop(request_id, None)

    def _finish_failed(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """End failed requests with an error; nothing else is touched."""
        failures = dict(self._failures)
        for request in self.finish_requests(list(failures), RequestStatus.FINISHED_ERROR):
            reason = failures[request.request_id]
            logger.error("Request %s failed: %s", request.request_id, reason)
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=reason,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            group = outputs.setdefault(request.client_index, EngineCoreOutputs(timestamp=time.monotonic()))
            group.outputs.append(output)
        self._failures.clear()

    def memory_stats(self) -> dict[str, int]:
        """What is in use now; all zero but the capacities while no request is alive."""
        pool = self.kv_cache_manager.block_pool
        num_running, num_waiting = self.get_request_counts()
        return {
            "running": num_running,
            "waiting": num_waiting,
            "sequences": len(self._sequences),
            "slots_used": self.ledger.num_slots - self.ledger.num_free_slots,
            "slots_total": self.ledger.num_slots,
            # One block is vLLM's placeholder for positions without a block.
            "kv_blocks_used": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "kv_blocks_total": pool.num_gpu_blocks - 1,
            "pending_embeddings": self._service.num_pending(),
            "holds": self.num_holds,
        }

    def shutdown(self) -> None:
        self._service.shutdown()
        if self._trace is not None:
            self._trace.close()
        super().shutdown()
