"""What the scheduler sends to the workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.core.sched.output import SchedulerOutput

from memlong_vllm.plan import StepPlan


@dataclass
class MemLongSchedulerOutput(SchedulerOutput):
    """vLLM's scheduler output with the step's plan. A subclass, because ad-hoc attributes are
    lost where vLLM copies its output with ``dataclasses.replace``."""

    step_plan: StepPlan = field(default_factory=lambda: StepPlan(()))
