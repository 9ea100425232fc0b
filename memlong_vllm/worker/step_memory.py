"""What a rank's model knows of the memory during a step: the bank and the step's metadata."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memlong_vllm.plan import StepPlan
from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.step_metadata import StepMetadata, build_step_metadata


class StepMemory:
    """Joins the plan, which arrives first, with the batch, whose order is known only later.

    The runner stages the plan before it prepares a step, calls :meth:`begin_step` when the
    batch is laid out, and :meth:`end_step` when the step is over. Dummy and profiling runs do
    neither: then ``metadata`` is None and attention is local only.
    """

    def __init__(self, bank: MemoryBank) -> None:
        self.bank = bank
        self.metadata: StepMetadata | None = None
        self._plan: StepPlan | None = None

    def stage(self, plan: StepPlan) -> None:
        self._plan = plan

    def begin_step(self, req_ids: Sequence[str], query_start_loc: np.ndarray) -> None:
        """See :func:`build_step_metadata`; does nothing without a staged plan."""
        if self._plan is not None:
            self.metadata = build_step_metadata(
                self._plan, req_ids, query_start_loc, self.bank.chunk_size, self.bank.keys.device
            )

    def end_step(self) -> None:
        self._plan = None
        self.metadata = None
