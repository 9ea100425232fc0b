"""The private surfaces of vLLM 0.32.0 that MemLong relies on.

Patches, each with its reason and the change in vLLM that would make it needless:

* ``MODELS_CONFIG_MAP``: an entry, so that MemLong configures its engine and refuses what it
  cannot serve before anything is built. Until plugins may register such a hook.
* ``ModelConfig.is_prefix_caching_supported``: False for MemLong, so that prefix caching is off
  by default and, if on, was asked for. Until the answer can come from the model class.
* ``GPUModelRunner.execute_model`` (V1 and V2) takes the plan off the scheduler's output, and
  V1's ``_model_forward`` begins the memory's step once the batch is laid out. (V2 has a hook for
  the latter: the model state.) Until a runner passes extra scheduler output to the model.
* ``EngineCore.memlong_stats``: a new utility method, for the HTTP route. Until schedulers can
  answer utility calls themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm.config import ModelConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import EngineCore

from engine_patches.vllm_0_32_config import MemLongEngineConfig
from memlong_vllm.config import ARCHITECTURE
from memlong_vllm.plan import StepPlan

_applied = False


@dataclass
class MemLongSchedulerOutput(SchedulerOutput):
    """vLLM's scheduler output with the step's plan. A subclass, because ad-hoc attributes are
    lost where vLLM copies its output with ``dataclasses.replace``."""

    step_plan: StepPlan = field(default_factory=lambda: StepPlan(()))


def apply() -> None:
    """Install the patches once a process."""
    global _applied
    if _applied:
        return
    _applied = True
    MODELS_CONFIG_MAP[ARCHITECTURE] = MemLongEngineConfig
    _patch_prefix_caching_support()
    _patch_v1_runner()
    _patch_v2_runner()
    EngineCore.memlong_stats = lambda self: self.scheduler.memory_stats()


def _patch_prefix_caching_support() -> None:
    original = ModelConfig.is_prefix_caching_supported.fget

    def is_prefix_caching_supported(self: ModelConfig) -> bool:
        return ARCHITECTURE not in self.architectures and original(self)

    ModelConfig.is_prefix_caching_supported = property(is_prefix_caching_supported)


def _step_memory(runner: Any) -> Any:
    """The memory of a runner's model, or None if that is another model."""
    from memlong_vllm.model import MemLongForCausalLM

    model = runner.get_model()
    return model.step_memory if isinstance(model, MemLongForCausalLM) else None


def _with_plan(execute_model: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(execute_model)
    def wrapper(self: Any, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        # Warm-up and dummy runs make their own output, without a plan.
        memory = _step_memory(self) if isinstance(scheduler_output, MemLongSchedulerOutput) else None
        if memory is None:
            return execute_model(self, scheduler_output, *args, **kwargs)
        memory.stage(scheduler_output.step_plan)
        try:
            return execute_model(self, scheduler_output, *args, **kwargs)
        finally:
            memory.end_step()

    return wrapper


def _patch_v1_runner() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    forward = GPUModelRunner._model_forward

    @functools.wraps(forward)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (memory := _step_memory(self)) is not None:
            req_ids = self.input_batch.req_ids
            memory.begin_step(req_ids, self.query_start_loc.np[: len(req_ids) + 1])
        return forward(self, *args, **kwargs)

    GPUModelRunner._model_forward = _model_forward
    GPUModelRunner.execute_model = _with_plan(GPUModelRunner.execute_model)


def _patch_v2_runner() -> None:
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:  # The V2 runner cannot even be imported without it.
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        GPUModelRunner.execute_model = _with_plan(GPUModelRunner.execute_model)
