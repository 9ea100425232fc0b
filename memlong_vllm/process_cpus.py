"""The CPUs this process may use, as they were before vLLM's CPU worker pinned its thread.

Threads inherit the affinity of the one that makes them. In the engine's process that is a thread
pinned to a single core, and whatever else is done there, as embedding, stalls every step of the model. This module is
imported when the plugin registers, which is before any worker exists.
"""

from __future__ import annotations

import os

_PROCESS_CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def use_process_cpus() -> None:
    """Let the calling thread run wherever the process was allowed to at first."""
    if _PROCESS_CPUS is not None:
        os.sched_setaffinity(0, _PROCESS_CPUS)
