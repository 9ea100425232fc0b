"""Memory of the workers' buffers, and of the host's where a GPU reads and writes it in place.

Nothing of this has been run on a GPU yet.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of whatever contents, whose memory is taken now.

    Of the host's memory the system would hand out each page when it is first written: steps would
    wait for it, and vLLM, which on CPUs leaves to the KV cache what the process does not use yet,
    would count it as free.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    return tensor.zero_() if device.type == "cpu" else tensor


def allocate_host(
    shape: tuple[int, ...], dtype: torch.dtype, view: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    """A tensor of whatever contents in host memory, which is taken now.

    With ``view``, its pages are pinned by ``cudaHostRegister``: PyTorch's own allocator of pinned
    memory would round the size up to a power of two.

    Args:
        view: from a pinned tensor of the host to one of the device over the same memory, as
            ``vllm.utils.torch_utils.get_accelerator_view_from_cpu_tensor``; None where the
            device is the host itself. Operations on the result are ordered by streams.

    Raises:
        RuntimeError: if the memory cannot be pinned.
    """
    if view is None:
        return allocate(shape, dtype, torch.device("cpu"))
    tensor = torch.empty(math.prod(shape), dtype=dtype, device="cpu")
    runtime = torch.cuda.cudart()
    address = tensor.data_ptr()
    error = runtime.cudaHostRegister(address, tensor.nbytes, 0)
    if error.value != 0:
        raise RuntimeError(f"cannot pin {tensor.nbytes} bytes of host memory for the memory bank: {error}")
    # A view of memory that is not pinned would silently be a view of a copy.
    if not tensor.is_pinned():
        raise RuntimeError("host memory for the memory bank was registered, but is not pinned")
    on_device = view(tensor).view(shape)
    # The finalizer keeps the host's tensor until its view is gone, then unpins and drops it.
    weakref.finalize(on_device, _release, tensor).atexit = False
    return on_device


def _release(tensor: torch.Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
