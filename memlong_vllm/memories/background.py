"""The library's thread, on which all work that takes time is done."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Hashable
from typing import Protocol

from memlong_vllm.process_cpus import use_process_cpus

logger = logging.getLogger(__name__)


class Job(Protocol):
    """Something to do.

    Attributes:
        is_awaited: whether :meth:`Background.flush` waits for it.
    """

    is_awaited: bool

    def delay(self, now: float) -> float:
        """Seconds from ``now`` (of the monotonic clock) until it is worth asking again; 0 if the
        job can run."""

    def run(self) -> None:
        """Do it."""

    def fail(self, error: Exception) -> None:
        """:meth:`run` raised this, or the job will never run. Must not raise."""


class Background:
    """Runs jobs one at a time. Those of a lane run in their order; lanes overtake each other."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._lanes: dict[Hashable, deque[Job]] = {}
        self._running: Job | None = None
        self._stopping: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job, lane: Hashable = None) -> None:
        """Queue a job behind the others of its lane; without one, behind none."""
        with self._changed:
            if self._stopping is None:
                self._lanes.setdefault(object() if lane is None else lane, deque()).append(job)
                self._changed.notify_all()
                return
        job.fail(self._stopping)

    def num_jobs(self, lane: Hashable) -> int:
        """Jobs of a lane that are not done."""
        with self._changed:
            return len(self._lanes.get(lane, ()))

    def flush(self, timeout: float) -> bool:
        """Wait until no awaited job is left, ``timeout`` seconds at most. Returns whether so."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout)

    def stop(self, reason: Exception, timeout: float) -> bool:
        """Run no further job; the rest fail with ``reason``.

        Returns:
            Whether the thread ended within ``timeout`` seconds.
        """
        with self._changed:
            self._stopping = reason
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _is_idle(self) -> bool:
        return not any(job.is_awaited for jobs in self._lanes.values() for job in jobs)

    def _serve(self) -> None:
        use_process_cpus()
        while True:
            with self._changed:
                heads = [(lane, jobs[0]) for lane, jobs in self._lanes.items()]
                if self._stopping is not None:
                    break
                if not heads:
                    self._changed.wait()
                    continue
            wait = self._run_first(heads)
            if wait > 0:
                with self._changed:
                    if self._stopping is None and len(self._lanes) == len(heads):
                        self._changed.wait(wait)
        for _, jobs in list(self._lanes.items()):
            for job in jobs:
                job.fail(self._stopping)

    def _run_first(self, heads: list[tuple[Hashable, Job]]) -> float:
        """Run the first job that can. Returns how long to wait if none can."""
        shortest = float("inf")
        for lane, job in heads:
            delay = job.delay(time.monotonic())
            if delay <= 0:
                self._run(job)
                self._end(lane)
                return 0.0
            shortest = min(shortest, delay)
        return shortest

    def _run(self, job: Job) -> None:
        try:
            job.run()
        except Exception as error:
            logger.debug("a job of the memory library failed", exc_info=True)
            try:
                job.fail(error)
            except Exception:  # All that comes later waits for this thread.
                logger.exception("a job of the memory library failed and could not say so")

    def _end(self, lane: Hashable) -> None:
        with self._changed:
            self._lanes[lane].popleft()
            if not self._lanes[lane]:
                del self._lanes[lane]
            self._changed.notify_all()
