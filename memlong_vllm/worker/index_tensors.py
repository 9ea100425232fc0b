"""How indices get to the device."""

from __future__ import annotations

import numpy as np
import torch


def index_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An int64 array as a tensor of ``device``, without waiting for what the device still does."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
