"""What a rank's model knows of the memory during a step: where chunks are and what is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from memlong_vllm.plan import StepPlan
from memlong_vllm.worker.adaptation import Adaptation
from memlong_vllm.worker.adapted_chunks import AdaptedChunks
from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.staging import Staging
from memlong_vllm.worker.step_buffers import Spans, StepBuffers, Stored
from memlong_vllm.worker.step_metadata import RowSource, SlotSource, StepMetadata, build_step_metadata
from memlong_vllm.worker.transfer import ChunkTransfer, RankHeads
from memlong_vllm.worker.working_set import WorkingSet, decode_reads


class StepMemory:
    """Joins the plan, which arrives first, with the batch, whose order is known only later.

    The runner stages the plan before it prepares a step, calls :meth:`begin_step` when the
    batch is laid out, and :meth:`end_step` when the step is over. Dummy and profiling runs do
    neither: then ``metadata`` is None and attention is local only.

    Args:
        num_rows: sequences that the working set has room for.
        top_k: chunks of the largest retrieved set.
        max_tokens: that a step computes.
        staging_tokens: tokens gathered at once; at least those of the largest set.
        heads: this rank's place among the ranks, which decides its part of a shard.
        adaptation: what retrieval layers make of the stored keys and values; None: nothing.
        num_adapted_chunks: that are kept as they were made, for each of these layers.
    """

    def __init__(
        self,
        bank: MemoryBank,
        num_rows: int,
        top_k: int,
        max_tokens: int,
        staging_tokens: int,
        heads: RankHeads,
        adaptation: Adaptation | None = None,
        num_adapted_chunks: int = 0,
    ) -> None:
        self.bank = bank
        self.staging = Staging(bank, staging_tokens)
        self.adaptation = adaptation
        self.adapted: AdaptedChunks | None = None
        if adaptation is not None:
            self.adapted = AdaptedChunks(bank, self.staging, adaptation, num_adapted_chunks)
        self.working_set = WorkingSet(bank, num_rows, top_k, self.adapted)
        self.buffers = StepBuffers(max_tokens, top_k, bank.device)
        self.metadata: StepMetadata | None = None
        self._transfer = ChunkTransfer(bank, self.staging, heads)
        self._plan: StepPlan | None = None

    def num_bytes(self) -> dict[str, int]:
        """Bytes this rank holds. See :func:`memlong_vllm.config.memory_bytes`."""
        return {
            "bank": self.bank.num_bytes,
            "working_set": self.working_set.num_bytes,
            "staging": self.staging.num_bytes,
            "adapted": 0 if self.adapted is None else self.adapted.num_bytes,
            "step_buffers": self.buffers.num_bytes,
        }

    def weights_changed(self) -> None:
        """The model's weights are other ones from the next step on: forget what was made with these.

        What the bank holds stays as it is.
        """
        self.working_set.forget()
        if self.adaptation is not None and self.adapted is not None:
            self.adaptation.weights_changed()
            self.adapted.forget()

    def stage(self, plan: StepPlan) -> None:
        """Take the plan of the next step and load what it loads, also if it computes no token."""
        self._plan = plan
        self._transfer.load(plan.loads)
        if self.adapted is not None:
            self.adapted.written(load.slot for load in plan.loads)
            self.adapted.written(slot for sequence in plan.sequences for slot in sequence.write_slots)

    def begin_step(self, req_ids: Sequence[str], query_start_loc: np.ndarray) -> None:
        """See :func:`build_step_metadata`; does nothing without a staged plan."""
        if self._plan is None:
            return
        if self.adaptation is not None:
            self.adaptation.prepare()
        rows = self.working_set.prepare_rows(decode_reads(self._plan))
        if self.adapted is not None:
            self.adapted.begin_round()
        self.metadata = build_step_metadata(
            self._plan,
            req_ids,
            query_start_loc,
            rows,
            self.bank.chunk_size,
            self.staging.num_chunks,
            self.buffers,
            None if self.adapted is None else self.adapted.places,
        )

    def read(self, source: SlotSource | RowSource, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a group of this step, to be used before the next call.

        Args:
            layer: the one that reads, counting retrieval layers.

        Returns:
            [num_spans, num_kv_heads, num_chunks * chunk_size, head_dim], not to be written to.
        """
        self._complete()
        if isinstance(source, RowSource):
            return self.working_set.read(source.rows, source.num_chunks, layer)
        if self.adapted is not None and source.is_kept:
            keys, values = self.staging.buffers(*source.slots.shape)
            self.adapted.layers[layer].gather(source.slots, keys, values)
            return keys, values
        keys, values = self.staging.gather(source.slots)
        if self.adaptation is not None:
            # The step reads more than is kept: these are made anew for each layer that reads them.
            self.adaptation.adapt(keys, values, layer)
        return keys, values

    def _complete(self) -> None:
        """See to it that rows and adapted chunks are there. What the step writes is in the bank by now:
        no layer reads before the memory layer."""
        self.working_set.wait()
        if self.adapted is not None:
            self.adapted.fill()

    def stored(self, layer: int, with_slots: bool = True) -> Iterator[tuple[Spans, Stored]]:
        """All that a layer reads in this step, where it lies; each to be used before the next.

        Without ``with_slots`` only what lies in rows.

        A bank of the host is not read in place: a kernel may read a chunk several times, and
        copies to staging come from there once.
        """
        if self.metadata is None:
            return
        self._complete()
        if self.metadata.in_rows is not None:
            yield self.metadata.in_rows, self.working_set.stored(layer)
        if self.metadata.in_bank is None or not with_slots:
            return
        from_slots = [(g.spans, g.source) for g in self.metadata.groups if not isinstance(g.source, RowSource)]
        bank = self.bank if self.adapted is None else self.adapted.layers[layer]
        in_place = Stored(bank.keys, bank.values, self.buffers.slots)
        is_all_in_place = (
            self.bank.is_on_device if self.adapted is None else all(source.is_kept for _, source in from_slots)
        )
        if is_all_in_place:
            yield self.metadata.in_bank, in_place
            return
        for spans, source in from_slots:
            yield spans, in_place if source.is_kept else Stored(*self.read(source, layer), None)

    def nothing_stored(self, nums_spans: Sequence[int]) -> Iterator[tuple[Spans, Stored]]:
        """Reads by which nothing is read: so many spans of one token and of several, without any."""
        buffers = self.buffers
        for stored in (self.working_set.stored(0), Stored(self.bank.keys, self.bank.values, buffers.slots)):
            for num_spans in nums_spans:
                table = torch.zeros(num_spans, buffers.spans.shape[1], dtype=torch.int32, device=self.bank.device)
                for max_tokens in (1, 2):
                    yield Spans(table, buffers.token_idx, buffers.positions, max_tokens), stored

    def end_step(self) -> None:
        """Save what the staged plan saves, if a plan is staged; the step is over."""
        plan = self._plan
        self.abandon_step()
        if plan is not None:
            self._transfer.save(plan.saves)

    def abandon_step(self) -> None:
        """The step is over, and what it has left in the bank is not worth saving."""
        self.working_set.wait()
        if self.adapted is not None:
            self.adapted.abandon()
        self._plan = None
        self.metadata = None

    def flush(self) -> None:
        """Wait until all saves so far are on disk or have failed."""
        self._transfer.flush()
