"""Work that takes too long to wait for: started on a thread, asked about by ticket."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from memlong_vllm.memories.errors import MemoryLibraryBusyError, MemoryLibraryError
from memlong_vllm.process_cpus import use_process_cpus

logger = logging.getLogger(__name__)

MAX_RUNNING = 16
MAX_FINISHED = 1024

Work = Callable[[], dict[str, Any]]


class Tickets:
    """Runs each piece of work on a thread of its own. Thread-safe.

    The result of one waits for whoever has the ticket, once; of results that nobody asks for, the
    latest 1024 are kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, threading.Thread] = {}
        self._finished: dict[str, dict[str, Any] | MemoryLibraryError] = {}
        self._is_stopped = False

    def start(self, work: Work) -> str:
        """Start work. Returns its ticket.

        Raises:
            MemoryLibraryBusyError: if 16 pieces of work are running, or the system has no thread left.
            MemoryLibraryError: after :meth:`stop`.
        """
        ticket = secrets.token_hex(16)
        thread = threading.Thread(target=self._run, args=(ticket, work), name="memlong-ticket", daemon=True)
        with self._lock:
            if self._is_stopped:
                raise MemoryLibraryError("the memory library was closed")
            if len(self._running) >= MAX_RUNNING:
                raise MemoryLibraryBusyError(f"{MAX_RUNNING} operations on memories are under way: try again later")
            try:
                thread.start()  # With the lock held: the work may end at once.
            except RuntimeError as error:
                raise MemoryLibraryBusyError(f"no thread can be started ({error}): try again later") from error
            self._running[ticket] = thread
        return ticket

    def take_result(self, ticket: str) -> dict[str, Any] | None:
        """What the work returned, or None while it runs.

        Raises:
            MemoryLibraryError: what the work raised; or that there is no such ticket.
        """
        with self._lock:
            if ticket in self._running:
                return None
            result = self._finished.pop(ticket, MemoryLibraryError("no such ticket"))
        if isinstance(result, MemoryLibraryError):
            raise result
        return result

    def stop(self, timeout: float) -> bool:
        """Start nothing more. Returns whether all work ended within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._is_stopped = True
            threads = list(self._running.values())
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _run(self, ticket: str, work: Work) -> None:
        use_process_cpus()
        result: dict[str, Any] | MemoryLibraryError
        try:
            result = work()
        except MemoryLibraryError as error:
            result = error
        except Exception as error:
            logger.exception("an operation on a memory failed")
            result = MemoryLibraryError(f"the operation failed ({type(error).__name__}: {error})")
        with self._lock:
            del self._running[ticket]
            self._finished[ticket] = result
            while len(self._finished) > MAX_FINISHED:
                del self._finished[next(iter(self._finished))]
