"""Camera images as the vision encoders read them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def image_tensor(images: np.ndarray | Tensor) -> Tensor:
    """uint8 ``[..., H, W, 3]`` -> float32 ``[..., 3, H, W]`` in [-1, 1] (``x / 255 * 2 - 1``), on the same device."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
    return tensor.movedim(-1, -3).to(torch.float32) / 255.0 * 2.0 - 1.0
