"""Numba with PyTorch's tensors and as many threads as PyTorch has. What kernels need of it is taken from here,
where its threads are counted before it is imported."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Numba would count the cores that this thread may use. vLLM gives it a core of its own, and the
# other OpenMP threads the others. It counts again whenever it compiles, so what was imported before
# keeps its number in this way too.
os.environ.setdefault(
    "NUMBA_NUM_THREADS",
    str(sys.modules["numba"].config.NUMBA_NUM_THREADS if "numba" in sys.modules else torch.get_num_threads()),
)

import numba
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["cgutils", "flat", "intrinsic", "njit", "prange", "types", "use_threads"]

logger = logging.getLogger(__name__)


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Numba's decorator, with its cache on disk where one can be kept: beside the package or in the
    user's cache folder. Divisions by 0 are as in NumPy.

    Numba would use what is cached until the kernel's own file changes; this also notices changes of
    what a kernel calls or takes constants from. Where that cannot be had, for want of a folder or
    in a Numba that is made otherwise, nothing is cached.
    """

    options["error_model"] = "numpy"

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            kernel = numba.njit(cache=True, **options)(function)
            cached = kernel._cache._cache_file
            cached._source_stamp = cached._source_stamp, _sources_digest()
            return kernel
        except (RuntimeError, AttributeError) as error:
            logger.warning("%s is compiled at every start: %s. Set NUMBA_CACHE_DIR", function.__name__, error)
            return numba.njit(**options)(function)

    return decorate


@functools.cache
def _sources_digest() -> str:
    """Of all files that kernels are compiled from."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("*.py")), folder.parent / "worker" / "step_buffers.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def use_threads() -> None:
    """Use as many threads as PyTorch does."""
    _launch_threads()
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@functools.cache
def _launch_threads() -> None:
    # Launching sets the number of OpenMP threads of the thread that does it, and vLLM's kernels
    # must find that of this one unchanged.
    launching = threading.Thread(target=numba.get_num_threads)
    launching.start()
    launching.join()


def flat(tensor: torch.Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The first element, and the strides of all dimensions but the last: kernels, which check no
    bounds, find the others by them. So a kernel is compiled once for all shapes and layouts.

    Args:
        tensor: the elements of its last dimension follow each other. 16-bit numbers become their bits.
    """
    assert tensor.stride(-1) == 1
    first = tensor.as_strided((1,), (1,))
    return (first.view(torch.uint16) if tensor.itemsize == 2 else first).numpy(), tensor.stride()[:-1]
