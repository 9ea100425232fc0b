"""vLLM's scheduler with a retrieval step: decides what each engine step writes and retrieves."""

from __future__ import annotations

import copy
import secrets
import time
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from memlong_vllm.config import bank_slots, request_limits, resolve
from memlong_vllm.memories.memory_format import PROBE_TEXT
from memlong_vllm.memories.names import tenant_folder
from memlong_vllm.memories.operations import perform
from memlong_vllm.plan import StepPlan
from memlong_vllm.request_settings import RequestSettings, RequestSettingsError
from memlong_vllm.retriever.embedder import load_embedder
from memlong_vllm.retriever.service import RetrieverService
from memlong_vllm.scheduler.counters import SchedulerCounters
from memlong_vllm.scheduler.ledger import Ledger
from memlong_vllm.scheduler.memory_library import open_library
from memlong_vllm.scheduler.named_memories import NamedMemories
from memlong_vllm.scheduler.output import MemLongSchedulerOutput
from memlong_vllm.scheduler.prefix_cache import PrefixCache, PrefixHit
from memlong_vllm.scheduler.request_memory import RequestMemory
from memlong_vllm.scheduler.sequence_retriever import SequenceRetriever
from memlong_vllm.scheduler.stats import bytes_by_kind, usage
from memlong_vllm.scheduler.trace import RetrievalTrace

logger = init_logger(__name__)

ENDED_WELL = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)
# While every request waits for embeddings there is nothing to run; a short wait keeps the engine
# from spinning and still lets it take new requests and aborts.
_IDLE_WAIT_S = 0.02


class MemLongScheduler(Scheduler):
    """Scheduling as in vLLM, with each step's memory plan on its output.

    A request takes part in a step only when the retrievals of that step's tokens are ready;
    meanwhile the others go on. It is admitted when the bank has room for its text so far beside
    what the running ones still need for theirs; if their answers outgrow the bank, the last of
    them is preempted, as vLLM does when blocks run short.

    Attributes:
        ledger: owner of the bank's slots.
        counters: what happened since the start.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        model_config = vllm_config.model_config
        self._memory, deployment = resolve(model_config.hf_config, vllm_config.additional_config)
        self._limits = request_limits(self._memory, deployment)
        self.ledger = Ledger(self._memory, bank_slots(vllm_config), self.max_num_scheduled_tokens)
        self.counters = SchedulerCounters()
        self._prefix_cache = PrefixCache(self.kv_cache_manager, self.ledger)
        self._memories: dict[str, RequestMemory] = {}
        self._failures: dict[str, str] = {}
        self._hits: dict[str, PrefixHit] = {}
        self._secret = secrets.token_hex(16)
        self._is_admission_closed = False
        self._trace = RetrievalTrace(deployment.trace_file) if deployment.trace_file else None
        retriever = self._memory.retriever
        # A copy of its own: a tokenizer must not be used by two threads at once.
        tokenizer = copy.deepcopy(cached_tokenizer_from_config(model_config))
        embedder = load_embedder(retriever, model_config.model, deployment.retriever_device)
        self._service = RetrieverService(
            embedder,
            lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False),
            retriever.query_instruction,
            deployment.retriever_batch_size or (1 if deployment.retriever_device == "cpu" else 32),
            deployment.retriever_cache_size,
        )
        # Here, while the service's thread has nothing to do: embedders need not be thread-safe.
        probe = embedder.embed([(retriever.query_instruction or "") + PROBE_TEXT])[0]
        library = partial(open_library, vllm_config, probe)
        self._named = NamedMemories(
            library, self.ledger.pool, self._memory.chunk_size, vllm_config.parallel_config.tensor_parallel_size
        )
        if deployment.memory_dir is not None:
            self._named.named_library  # noqa: B018 (a folder that cannot be used is told of at the start)

    # Requests come and go.

    def add_request(self, request: Request) -> None:
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if not is_new:
            return
        try:
            memory = self._make_memory(request)
        except Exception as error:  # noqa: BLE001 (whatever it is, it ends this request and not the engine)
            self._failures[request.request_id] = str(error)
            return
        self._memories[request.request_id] = memory
        memory.retriever.observe(request.all_token_ids)

    def _make_memory(self, request: Request) -> RequestMemory:
        if request.resumable:
            raise RequestSettingsError("streaming input sessions are not supported by MemLong")
        arguments = request.sampling_params and request.sampling_params.extra_args
        settings = RequestSettings.from_extra_args(arguments, self._limits)
        config, max_tokens = settings.apply(self._memory), self._max_tokens(request)
        reads = bool(settings.memory_read)
        most = self.ledger.slots_at_most(max_tokens, config, reads)
        if most > self.ledger.pool.num_slots:
            has = self.ledger.pool.num_slots
            raise RequestSettingsError(f"the request may need {most} slots, but the bank has {has}: raise bank_gib")
        retriever = SequenceRetriever(
            request.request_id,
            request.num_prompt_tokens,
            max_tokens,
            config,
            self._service,
            namespace=request.cache_salt or "",
            reads_named=reads,
            every_chunk=settings.memory_write is not None,
        )
        tenant = tenant_folder(request.cache_salt)
        named = self._named.begin(settings, tenant, max_tokens // config.chunk_size)
        memory = RequestMemory(settings, config, retriever, named)
        if not reads:
            memory.address(request, self._secret)
        return memory

    def _max_tokens(self, request: Request) -> int:
        return min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.ledger.close(request.request_id)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.ledger.close(request.request_id)
        self._failures.pop(request.request_id, None)
        memory = self._memories.pop(request.request_id, None)
        if memory is not None:
            self.counters.end_hold(memory)
        if memory is None or not self._end_named(request, memory):
            self._service.cancel(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def _end_named(self, request: Request, memory: RequestMemory) -> bool:
        """End what a request had to do with named memories. Returns whether embeddings of it are
        still wanted."""
        if memory.named is None:
            return False
        has_ended_well = request.status in ENDED_WELL
        num_chunks, retriever = memory.named.num_saved, memory.retriever

        def embeddings() -> np.ndarray:
            try:
                return retriever.wait_for_embeddings(num_chunks)
            finally:
                self._service.cancel(request.request_id)

        return self._named.end(memory.named, request.all_token_ids if has_ended_well else None, embeddings)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        is_reset = super().reset_prefix_cache(*args, **kwargs)
        if is_reset:
            self.ledger.pool.clear()
        return is_reset

    # The step.

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._collect_failures()
        self.ledger.free_retired()
        num_holds = self.counters.holds
        ready = []
        for request in self.running:
            if self._is_ready(request, request.num_computed_tokens):
                ready.append(request)
            else:
                # Skips the request in this step only (checked in Scheduler.schedule).
                request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
        self._is_admission_closed = self._make_room(ready)
        output = super().schedule(*args, **kwargs)
        self._settle_admissions(output)
        if output.total_num_scheduled_tokens == 0 and self.counters.holds > num_holds:
            self._service.wait(_IDLE_WAIT_S)
        return self._with_plan(output)

    def _is_ready(self, request: Request, start: int) -> bool:
        """Whether whatever this step can schedule of a request has its retrievals ready."""
        memory = self._memories.get(request.request_id)
        if memory is None or request.request_id in self._failures:
            return False
        is_ready = memory.retriever.is_ready(start, start + self._most_tokens(request, start))
        self.counters.note_hold(memory, is_held=not is_ready)
        return is_ready

    def _most_tokens(self, request: Request, start: int) -> int:
        return min(request.num_tokens - start, self.max_num_scheduled_tokens)

    def _make_room(self, ready: list[Request]) -> bool:
        """Preempt the last requests until the bank has what this step of the others takes.

        The first of them (of the highest priority) is never preempted and can always go on alone
        (``bank_slots`` sees to that), so every request is served in the end.

        Returns:
            Whether any was preempted.
        """
        needs = {
            request.request_id: self.ledger.slots_to_advance(
                request.request_id, self._most_tokens(request, request.num_computed_tokens)
            )
            for request in ready
        }
        needed, was_short = sum(needs.values()), False
        while len(self.running) > 1 and needed > self.ledger.pool.num_available:
            was_short = True
            self.counters.preemptions += 1
            victim = self._choose_victim()
            self.running.remove(victim)
            self._preempt_request(victim, time.monotonic())
            needed -= needs.pop(victim.request_id, 0)
        return was_short

    def _choose_victim(self) -> Request:
        """As vLLM chooses when blocks run short."""
        if self.policy == SchedulingPolicy.PRIORITY:
            return max(self.running, key=lambda request: (request.priority, request.arrival_time))
        return self.running[-1]

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting request may be admitted in this step (vLLM asks for each)."""
        if not super()._handle_blocked_waiting_request(request):
            return False
        memory = self._memories.get(request.request_id)
        # No overtaking: the first request that waits for slots is the next to get some.
        if memory is None or self._is_admission_closed or not self._open_named(request, memory):
            return False
        # What it shares takes longer to find than to see that embeddings are still missing behind it.
        if memory.waits_at is not None and not self._is_ready(request, memory.waits_at):
            return False
        hit = self._prefix_cache.find(request, memory.config, memory.keys, every_chunk=memory.writes_named)
        if hit.prefix is not None and hit.prefix.forgotten and not self._fits(request, memory, hit):
            # Forgotten chunks are held for a moment beside what the request may need alone.
            hit = self._prefix_cache.nothing
        memory.waits_at = hit.num_tokens
        if not self._is_ready(request, hit.num_tokens):
            return False
        if not self._fits(request, memory, hit):
            self._is_admission_closed = True
            return False
        borrow = partial(self._named.borrow, memory.named) if memory.reads_named and memory.named else None
        self.ledger.open(request.request_id, request.num_prompt_tokens, memory.config, memory.keys, hit.prefix, borrow)
        self._hits[request.request_id] = hit
        memory.waits_at = None
        return True

    def _open_named(self, request: Request, memory: RequestMemory) -> bool:
        """Whether the named memories a request reads are open; it then knows its addresses."""
        if memory.is_addressed:
            return True
        assert memory.named is not None
        try:
            if not self._named.is_ready(memory.named):
                self.counters.note_hold(memory, is_held=True)
                return False
            memory.retriever.named = self._named.indexes(memory.named)
        except Exception as error:  # noqa: BLE001 (an index may fail in any way; that ends its readers)
            self._failures[request.request_id] = str(error)
            return False
        memory.address(request, self._secret)
        return True

    def _fits(self, request: Request, memory: RequestMemory, hit: PrefixHit) -> bool:
        """Whether the bank has room for the request's text and for what the running ones need."""
        needed = self.ledger.slots_at_most(request.num_tokens + 1, memory.config, memory.reads_named)
        if hit.prefix is not None:
            needed += hit.prefix.num_unheld - len(hit.prefix.chunks)
        for other in self.running:
            # One more each, for the answer to grow by.
            needed += self.ledger.slots_to_come(other.request_id, other.num_tokens + 1) + 1
        return needed <= self.ledger.pool.num_available

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[Any, int, int, bool]:
        hit = self._hits[request.request_id]
        return hit.blocks, hit.num_tokens, 0, False

    def _settle_admissions(self, output: SchedulerOutput) -> None:
        """Take back the memory of requests that vLLM, short of blocks, did not admit after all."""
        for request_id, hit in self._hits.items():
            if request_id not in output.num_scheduled_tokens:
                self.ledger.close(request_id)
                continue
            self.counters.prefix_hit_tokens += hit.num_tokens
            if hit.prefix is None:
                continue
            self._save(request_id, hit.prefix.slots())
            if self._trace is not None:
                for event in hit.prefix.events:
                    self._trace.write(request_id, event, shared=True)
        self._hits.clear()

    def _save(self, request_id: str, completed: dict[int, int]) -> None:
        """Save completed chunks ({chunk id: slot}) if the request writes to a named memory."""
        memory = self._memories[request_id]
        if memory.writes_named and memory.named is not None:
            self._named.save(memory.named, completed)

    def _with_plan(self, output: SchedulerOutput) -> MemLongSchedulerOutput:
        plans = []
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            # super().schedule() has advanced num_computed_tokens past the step already.
            end = self.requests[request_id].num_computed_tokens
            search = self.counters.timed(self._memories[request_id].retriever.search)
            advance = self.ledger.advance(request_id, end - num_tokens, end, search)
            plans.append(advance.plan)
            if (memory := self._memories[request_id]).named is not None and memory.named.damage is not None:
                self._failures[request_id] = memory.named.damage
            self._save(request_id, advance.completed)
            if self._trace is not None:
                for event in advance.events:
                    self._trace.write(request_id, event)
        values = {f.name: getattr(output, f.name) for f in fields(SchedulerOutput)}
        return MemLongSchedulerOutput(**values, step_plan=StepPlan(tuple(plans), *self._named.take_transfers()))

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            if request is not None and request_id in self._memories:
                self._memories[request_id].retriever.observe(request.all_token_ids)
        self._collect_failures()
        self._finish_failed(outputs)
        return outputs

    # Failures.

    def _collect_failures(self) -> None:
        for request_id, reason in self._service.take_failures().items():
            if request_id in self.requests:
                self._failures[request_id] = f"the retriever failed: {reason}"

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

    def memory_stats(self) -> dict[str, float]:
        """What is in use now, capacities, and what was done since the start."""
        index_bytes = sum(memory.retriever.num_index_bytes for memory in self._memories.values())
        return {
            **usage(self),
            "sequences": len(self._memories),
            "pending_embeddings": self._service.num_pending(),
            **bytes_by_kind(self, index_bytes),
            **self.counters.as_dict(),
            **self._service.counters_as_dict(),
            **self._named.stats(),
        }

    def memory_operation(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return perform(self._named.named_library, operation, arguments)

    def shutdown(self) -> None:
        self._named.shutdown()
        self._service.shutdown()
        if self._trace is not None:
            self._trace.close()
        super().shutdown()
