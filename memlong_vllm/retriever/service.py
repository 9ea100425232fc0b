"""The retriever service: embeds token spans of many sequences on its own thread."""

from __future__ import annotations

import heapq
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from memlong_vllm.process_cpus import use_process_cpus
from memlong_vllm.retriever.embedder import Embedder

Span = tuple[int, int]
Decode = Callable[[Sequence[int]], str]
_Key = tuple[str, bytes]

_MAX_OVERTAKEN = 32
_SHUTDOWN_TIMEOUT_S = 10.0


@dataclass(order=True, slots=True)
class _Job:
    """One span to embed, kept under ``key``. Jobs of lower ``rank`` go first."""

    rank: int
    request_id: str = field(compare=False)
    span: Span = field(compare=False)
    token_ids: tuple[int, ...] = field(compare=False)
    key: _Key = field(compare=False)


@dataclass(slots=True)
class RetrieverCounters:
    """What was done since the start.

    Attributes:
        num_spans: spans asked for; ``num_known``: those whose embedding was kept from earlier.
        num_batches: calls of the embedder; ``num_embedded``: texts in them.
        largest_batch: texts.
        embed_seconds: spent in the embedder, on its own thread.
    """

    num_spans: int = 0
    num_known: int = 0
    num_batches: int = 0
    num_embedded: int = 0
    largest_batch: int = 0
    embed_seconds: float = 0.0


class RetrieverService:
    """Embeddings of token spans, made ahead of their use.

    Public methods may be called by any thread; the embedder and the tokenizer are used by the
    service's own only. A span is embedded once as long as its embedding stays
    among the ``cache_size`` last used, whoever asks for it within a namespace: then the answer is
    there at once. Namespaces share nothing, so that none can tell by the time what others embed.

    Args:
        decode: token ids to text.
        instruction: put before every text.
        batch_size: texts in one call of the embedder.
        cache_size: embeddings kept.

    Attributes:
        counters: see :class:`RetrieverCounters`.
    """

    def __init__(
        self, embedder: Embedder, decode: Decode, instruction: str | None, batch_size: int, cache_size: int
    ) -> None:
        self.dimension = embedder.dimension
        self._embedder = embedder
        self._decode = decode
        self._instruction = instruction or ""
        self._batch_size = batch_size
        self._cache_size = cache_size
        self._cache: OrderedDict[_Key, np.ndarray] = OrderedDict()
        self.counters = RetrieverCounters()
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._num_jobs = 0
        self._num_at_work = 0
        self._results: dict[str, dict[Span, np.ndarray]] = {}
        self._failures: dict[str, str] = {}
        self._stopping = False
        self._broken: str | None = None
        self._thread = threading.Thread(target=self._run, name="memlong-retriever", daemon=True)
        self._thread.start()

    def submit(self, request_id: str, spans: dict[Span, tuple[int, ...]], urgent: bool, namespace: str = "") -> None:
        """Queue spans ({(start, end): token ids}) of a sequence, in the order given.

        Args:
            urgent: a decoding sequence waits for them. They overtake a bounded number of others,
                so that neither long prompts stall decoding nor decoding starves prompts.
        """
        with self._changed:
            if self._broken is not None:
                self._failures[request_id] = self._broken
                return
            results = self._results.setdefault(request_id, {})
            for span, token_ids in spans.items():
                key = namespace, array("q", token_ids).tobytes()
                self.counters.num_spans += 1
                if (vector := self._known(key)) is not None:
                    results[span] = vector
                    continue
                rank = self._num_jobs - (_MAX_OVERTAKEN if urgent else 0)
                heapq.heappush(self._jobs, _Job(rank, request_id, span, token_ids, key))
                self._num_jobs += 1
            self._changed.notify_all()

    def take_results(self, request_id: str) -> dict[Span, np.ndarray]:
        """Embeddings finished since the last call, each [dimension] float32."""
        with self._changed:
            results = self._results.get(request_id)
            if not results:
                return {}
            self._results[request_id] = {}
            return results

    def take_failures(self) -> dict[str, str]:
        """Sequences whose texts could not be embedded since the last call, with the reason."""
        with self._changed:
            failures, self._failures = self._failures, {}
            return failures

    def cancel(self, request_id: str) -> None:
        """Forget a sequence, its queued spans and its results."""
        with self._changed:
            self._drop(request_id)

    def _drop(self, request_id: str) -> bool:
        """Forget a sequence, with the lock held. Returns whether there was one."""
        if self._results.pop(request_id, None) is None:
            return False
        self._jobs = [job for job in self._jobs if job.request_id != request_id]
        heapq.heapify(self._jobs)
        return True

    def is_serving(self, request_id: str) -> bool:
        """Whether what a sequence has submitted is, or will be, embedded."""
        with self._changed:
            return self._broken is None and not self._stopping and request_id in self._results

    def wait(self, timeout: float) -> None:
        """Block until something finishes, ``timeout`` seconds at most."""
        with self._changed:
            self._changed.wait(timeout)

    def num_pending(self) -> int:
        """Spans queued and not embedded yet."""
        with self._changed:
            return len(self._jobs)

    def num_at_work(self) -> int:
        """Spans that are being embedded now."""
        with self._changed:
            return self._num_at_work

    def counters_as_dict(self) -> dict[str, float]:
        """:class:`RetrieverCounters` by names that say what they count."""
        c = self.counters
        return {
            "embedding_requests": c.num_spans,
            "embedding_cache_hits": c.num_known,
            "embedding_batches": c.num_batches,
            "embedded_texts": c.num_embedded,
            "largest_embedding_batch": c.largest_batch,
            "embed_seconds": c.embed_seconds,
        }

    def shutdown(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        # The thread is a daemon: an embedder that hangs does not keep the engine from ending.
        self._thread.join(_SHUTDOWN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            use_process_cpus()
            self._serve()
        except BaseException as error:  # noqa: BLE001 (nobody may wait for a thread that has ended)
            with self._changed:
                self._broken = f"the retriever's thread ended ({type(error).__name__}: {error})"
                self._failures.update(dict.fromkeys(self._results, self._broken))
                self._jobs.clear()
                self._num_at_work = 0
                self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
            self._embed_queued()

    def _embed_queued(self) -> None:
        """Embed until nothing is queued, on a thread that ends then, and its OpenMP threads with it.

        While they existed, there would be more of these threads than cores, and GNU's OpenMP would
        have the model's wait for each other asleep: waking them costs more than most of what they do.
        """
        errors: list[BaseException] = []

        def embed() -> None:
            try:
                while batch := self._next_batch():
                    self._finish(*self._embed_jobs(batch))
            except BaseException as error:  # noqa: BLE001 (raised below)
                errors.append(error)

        thread = threading.Thread(target=embed, name="memlong-embedder", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # The system has no thread left for now: slower is better than not at all.
            embed()
        else:
            thread.join()
        for error in errors:
            raise error

    def _next_batch(self) -> list[_Job]:
        """Jobs to embed together; none at the end of the queue or of the service."""
        with self._changed:
            size = 0 if self._stopping else min(self._batch_size, len(self._jobs))
            self._num_at_work = size
            return [heapq.heappop(self._jobs) for _ in range(size)]

    def _finish(self, vectors: list[tuple[_Job, np.ndarray]], failures: dict[str, str]) -> None:
        with self._changed:
            self._num_at_work = 0
            for owner, why in failures.items():
                if self._drop(owner):
                    self._failures[owner] = why
            for job, vector in vectors:
                if job.request_id in self._results:
                    self._results[job.request_id][job.span] = vector
            self._changed.notify_all()

    def _embed_jobs(self, jobs: list[_Job]) -> tuple[list[tuple[_Job, np.ndarray]], dict[str, str]]:
        """Embed together; if that fails, one by one, so that only the culprits' owners fail."""
        try:
            return list(zip(jobs, self._embed(jobs), strict=True)), {}
        except Exception as error:  # noqa: BLE001 (whatever an embedder raises ends requests, not the engine)
            if len(jobs) == 1:
                return [], {jobs[0].request_id: f"{type(error).__name__}: {error}"}
        parts = [self._embed_jobs([job]) for job in jobs]
        failures = {request_id: reason for _, failed in parts for request_id, reason in failed.items()}
        return [pair for vectors, _ in parts for pair in vectors], failures

    def _embed(self, jobs: list[_Job]) -> list[np.ndarray]:
        with self._changed:
            found = {job.key: self._known(job.key) for job in jobs}
        vectors = {key: vector for key, vector in found.items() if vector is not None}
        texts = {job.key: self._decode(job.token_ids) for job in jobs if job.key not in vectors}
        vectors |= {key: np.zeros(self.dimension, np.float32) for key, text in texts.items() if not text}
        missing = {key: self._instruction + text for key, text in texts.items() if text}
        if missing:
            vectors |= zip(missing, self._embed_texts(list(missing.values())), strict=True)
        with self._changed:
            self._cache.update((key, vectors[key]) for key in texts)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return [vectors[job.key] for job in jobs]

    def _embed_texts(self, texts: list[str]) -> np.ndarray:
        """[len(texts), dimension] float32; equal texts are embedded once."""
        distinct = list(dict.fromkeys(texts))
        started = time.perf_counter()
        vectors = self._embedder.embed(distinct)
        if vectors.shape != (len(distinct), self.dimension):
            raise ValueError(f"the embedder returned shape {vectors.shape} for {len(distinct)} texts")
        if not np.isfinite(vectors).all():
            raise ValueError("the embedder returned a vector that is not finite")
        counters = self.counters
        counters.embed_seconds += time.perf_counter() - started
        counters.num_batches += 1
        counters.num_embedded += len(distinct)
        counters.largest_batch = max(counters.largest_batch, len(distinct))
        rows = {text: row for row, text in enumerate(distinct)}
        return vectors.astype(np.float32)[[rows[text] for text in texts]]

    def _known(self, key: _Key) -> np.ndarray | None:
        vector = self._cache.get(key)
        if vector is not None:
            self._cache.move_to_end(key)
            self.counters.num_known += 1
        return vector
