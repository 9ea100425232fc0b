"""The private surfaces of vLLM 0.32.0 that MemLong relies on.

Patches, each with its reason and the change in vLLM that would make it needless:

* ``MODELS_CONFIG_MAP``: an entry, so that MemLong configures its engine and refuses what it
  cannot serve before anything is built. Until plugins may register such a hook.
* ``InputProcessor._validate_params``: also validates what a request asks of its memory, so that
  a bad request is refused before it reaches the engine. Until models may validate parameters.
* ``GPUModelRunner.execute_model`` (V1 and V2) takes the plan off the scheduler's output, and
  V1's ``_model_forward`` begins the memory's step once the batch is laid out. (V2 has a hook for
  the latter: the model state.) Until a runner passes extra scheduler output to the model.
  Their ``reload_weights`` tells the memory, as ``load_weights`` does: it does not call that for
  weights in a kernel's own format. Until models are told.
* ``EngineCore.memlong_stats`` and ``memlong_memory``: new utility methods, for the HTTP routes.
  Until schedulers can answer utility calls themselves.
* ``triton_utils.dispatcher``: its search of all modules for kernels fails on objects of llvmlite,
  which Numba loads, whose ``__dict__`` is none. Until it looks at dictionaries only.
* ``to_beam_search_params`` of completion and chat requests: refuses what the request asks of its
  memory, which the beams would not get. Until they get ``extra_args``.
* ``AsyncLLM._add_streaming_input_request``: refuses a session before it reaches the engine, which
  would otherwise take each later piece for a request of its own. Until sessions are supported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMClientError
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.sampling_params import SamplingParams
from vllm.triton_utils import dispatcher
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor

from engine_patches.vllm_0_32_config import MemLongEngineConfig
from memlong_vllm.config import ARCHITECTURE, request_limits, resolve
from memlong_vllm.request_settings import OURS, RequestSettings, RequestSettingsError
from memlong_vllm.scheduler.output import MemLongSchedulerOutput

_applied = False


class BadRequestError(RequestSettingsError, VLLMClientError):
    """As vLLM's server wants it: a ValueError raised so late is answered with 500, this with 400."""


def apply() -> None:
    """Install the patches once a process."""
    global _applied
    if _applied:
        return
    MODELS_CONFIG_MAP[ARCHITECTURE] = MemLongEngineConfig
    _patch_request_validation()
    _patch_beam_search()
    _patch_v1_runner()
    _patch_v2_runner()
    _patch_streaming_input()
    dispatcher.vars = _own_attributes
    EngineCore.memlong_stats = lambda self: self.scheduler.memory_stats()
    EngineCore.memlong_memory = lambda self, operation, arguments: self.scheduler.memory_operation(operation, arguments)
    _applied = True


def _own_attributes(value: object) -> dict[str, Any]:
    """As the built-in ``vars``, but nothing where that is no dictionary."""
    attributes: object = vars(value)
    return attributes if isinstance(attributes, dict) else {}


def _patch_request_validation() -> None:
    original = InputProcessor._validate_params

    @functools.wraps(original)
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_memlong(self) and isinstance(params, SamplingParams):
            try:
                _check_settings(self.vllm_config, params)
            except RequestSettingsError as error:
                raise BadRequestError(str(error)) from error
        return original(self, params, *args, **kwargs)

    InputProcessor._validate_params = _validate_params


def _check_settings(vllm_config: Any, params: SamplingParams) -> None:
    memory, deployment = resolve(vllm_config.model_config.hf_config, vllm_config.additional_config)
    settings = RequestSettings.from_extra_args(params.extra_args, request_limits(memory, deployment))
    num_engines = vllm_config.parallel_config.data_parallel_size
    if num_engines > 1 and (settings.memory_read or settings.memory_write is not None):
        raise RequestSettingsError(
            f"memory_read and memory_write are for servers of one engine, and this has {num_engines}: each would "
            "have memories of its own. Serve without --data-parallel-size"
        )
    if settings.memory_write is not None and params.n > 1:
        raise RequestSettingsError("memory_write: n must be 1, or the prompt would be written several times")
    if settings.memory_write is not None and params.stop:
        # The front end finds them, and all the engine hears of it is an abort.
        raise RequestSettingsError("memory_write does not go with stop strings: use stop_token_ids or max_tokens")


def _patch_beam_search() -> None:
    for request_class in (CompletionRequest, ChatCompletionRequest):
        request_class.to_beam_search_params = _without_settings(request_class.to_beam_search_params)


def _without_settings(to_params: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to_params)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if lost := sorted(name for name in self.vllm_xargs or {} if name.startswith(OURS)):
            raise BadRequestError(
                f"use_beam_search: beams get no vllm_xargs, and {lost} would be lost. Leave either out"
            )
        return to_params(self, *args, **kwargs)

    return wrapper


def _is_memlong(runner: Any) -> bool:
    return ARCHITECTURE in runner.model_config.architectures


def _with_plan(execute_model: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(execute_model)
    def wrapper(self: Any, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        # Warm-up and dummy runs make their own output, without a plan.
        if not isinstance(scheduler_output, MemLongSchedulerOutput):
            return execute_model(self, scheduler_output, *args, **kwargs)
        memory = self.get_model().step_memory
        memory.stage(scheduler_output.step_plan)
        try:
            result = execute_model(self, scheduler_output, *args, **kwargs)
        except BaseException:
            memory.abandon_step()
            raise
        memory.end_step()
        return result

    return wrapper


def _with_notice(reload_weights: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reload_weights)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            reload_weights(self, *args, **kwargs)
        finally:
            if _is_memlong(self):
                self.get_model().step_memory.weights_changed()

    return wrapper


def _patch_v1_runner() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    forward = GPUModelRunner._model_forward

    @functools.wraps(forward)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_memlong(self):
            req_ids = self.input_batch.req_ids
            self.get_model().step_memory.begin_step(req_ids, self.query_start_loc.np[: len(req_ids) + 1])
        return forward(self, *args, **kwargs)

    GPUModelRunner._model_forward = _model_forward
    GPUModelRunner.execute_model = _with_plan(GPUModelRunner.execute_model)
    GPUModelRunner.reload_weights = _with_notice(GPUModelRunner.reload_weights)


def _patch_v2_runner() -> None:
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:  # The V2 runner cannot even be imported without it.
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        GPUModelRunner.execute_model = _with_plan(GPUModelRunner.execute_model)
        GPUModelRunner.reload_weights = _with_notice(GPUModelRunner.reload_weights)


def _patch_streaming_input() -> None:
    original = AsyncLLM._add_streaming_input_request

    @functools.wraps(original)
    async def _add_streaming_input_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        if ARCHITECTURE in self.model_config.architectures:
            raise ValueError("MemLong does not support streaming input: send the whole prompt at once")
        return await original(self, *args, **kwargs)

    AsyncLLM._add_streaming_input_request = _add_streaming_input_request
