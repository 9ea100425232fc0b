"""The model state of vLLM's V2 runner (GPU default): hands the batch's layout to the memory."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class MemLongModelState(DefaultModelState):
    """Default model state that begins the memory's step for every real batch."""

    supports_prompt_embeds = False

    def preprocess_state(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> None:
        super().preprocess_state(input_batch, *args, **kwargs)
        self.model.step_memory.begin_step(input_batch.req_ids, input_batch.query_start_loc_np)
