"""Image sizes: the one resize that training data and the runtime share."""

from __future__ import annotations

import cv2
import numpy as np

from omega_qvla_core.errors import ObservationError


def resize_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes by averaging the covered area (OpenCV ``INTER_AREA``), without low-pass artefacts when shrinking.

    For an integer factor this is the mean over blocks, rounded: 128 px to 64 px averages 2 x 2 pixels. Demonstrations
    are stored through this function and the runtime calls it too, so a policy sees the same pixels in both.

    Args:
        image: uint8 ``[H, W, 3]`` RGB.
        height: Height of the result in pixels.
        width: Width of the result in pixels.

    Returns:
        uint8 ``[height, width, 3]``; the input itself when it has that size already.

    Raises:
        ObservationError: The image is not uint8 ``[H, W, 3]``, or is smaller than the result.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ObservationError(f"image has dtype {image.dtype} and shape {image.shape}; give uint8 [H, W, 3] RGB")
    if image.shape[0] < height or image.shape[1] < width:
        raise ObservationError(
            f"image is {image.shape[0]} x {image.shape[1]} pixels, the policy needs at least {height} x {width}; "
            "publish a larger image"
        )
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
