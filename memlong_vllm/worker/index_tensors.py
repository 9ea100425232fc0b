"""How indices get to the device."""

from __future__ import annotations

import numpy as np
import torch


def index_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a new tensor of ``device``, without waiting for what the device still does."""
    return host_tensor(array, device).to(device, non_blocking=True)


def host_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor of the host from which a copy to ``device`` need not be waited for.

    PyTorch does not reuse pinned memory before copies from it are done.
    """
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory()
