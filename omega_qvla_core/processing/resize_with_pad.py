"""Resizing to the network's input as the reference frameworks do it: padded squares for Pi 0.5, centre crops for GR00T.

The frameworks differ in what a policy was trained on: openpi resizes uint8 with PIL, which averages over the area that
a pixel covers; LeRobot interpolates floats without that average, which moves single pixels by up to 0.37 of the value
range on fine patterns. A checkpoint therefore gets the path of the framework that it comes from.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from omega_qvla_core.errors import ObservationError

CROP_SCALE = 0.95
"""Side of the centre crop of GR00T, as a share of the image's side."""


def check_image(image: np.ndarray) -> None:
    """Refuse anything but uint8 ``[H, W, 3]`` with at least one pixel.

    Raises:
        ObservationError: Naming dtype and shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ObservationError(f"image has dtype {image.dtype} and shape {image.shape}; give uint8 [H, W, 3] RGB")


def content_size(height: int, width: int, out_height: int, out_width: int) -> tuple[int, int]:
    """Height and width that an image takes within the padded result; its aspect ratio is kept."""
    ratio = max(width / out_width, height / out_height)
    return int(height / ratio), int(width / ratio)


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize as openpi's inference does: PIL bilinear (area-averaging) on uint8, black bars, content centred.

    Args:
        image: uint8 ``[H, W, 3]``.
        height: Of the result.
        width: Of the result.

    Returns:
        uint8 ``[height, width, 3]``.

    Raises:
        ObservationError: The image is not uint8 ``[H, W, 3]``, or is too narrow to leave a pixel.
    """
    check_image(image)
    if image.shape[:2] == (height, width):
        return image
    rows, columns = _content(image.shape[0], image.shape[1], height, width)
    resized = Image.fromarray(image).resize((columns, rows), resample=Image.Resampling.BILINEAR)
    result = np.zeros((height, width, 3), np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    result[top : top + rows, left : left + columns] = np.asarray(resized)
    return result


def interpolate_with_pad(image: Tensor, height: int, width: int, low: float, high: float) -> Tensor:
    """Resize by plain bilinear interpolation, without averaging; ``low`` is also the value of the bars.

    LeRobot does this to floats in [0, 1]; openpi's model does it to images that reach it in another size than its own:
    floats in [-1, 1], or uint8.

    Args:
        image: float or uint8 ``[C, H, W]``.
        height: Of the result.
        width: Of the result.
        low: Smallest value, and the value of the padding.
        high: Largest value.

    Returns:
        Same type as ``image``, ``[C, height, width]``.

    Raises:
        ObservationError: The image is too narrow to leave a pixel.
    """
    rows, columns = _content(image.shape[1], image.shape[2], height, width)
    # uint8 is interpolated as such: torch's integer path rounds otherwise than floats that are rounded afterwards.
    values = F.interpolate(image[None], (rows, columns), mode="bilinear", align_corners=False)[0]
    values = values.clamp(low, high)
    top, left = (height - rows) // 2, (width - columns) // 2
    bars = (left, width - columns - left, top, height - rows - top)
    return F.pad(values, bars, value=int(low) if image.dtype == torch.uint8 else low)


def centre_crop_resize(image: np.ndarray, size: int, scale: float = CROP_SCALE) -> np.ndarray:
    """Resize as GR00T does: centre crop, then an averaging bilinear resize of floats that squeezes the aspect ratio.

    Args:
        image: uint8 ``[H, W, 3]``.
        size: Height and width of the result.
        scale: Side of the crop as a share of the image's side; 1 for no crop.

    Returns:
        uint8 ``[size, size, 3]``; values are truncated, not rounded, as the reference does.

    Raises:
        ObservationError: The image is not uint8 ``[H, W, 3]``.
    """
    check_image(image)
    # Python rounds halves to even, and so does the reference.
    height, width = (int(side * scale) for side in image.shape[:2])
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    values = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).to(torch.float32) / 255.0
    cropped = values[:, top : top + height, left : left + width]
    resized = F.interpolate(cropped[None], (size, size), mode="bilinear", align_corners=False, antialias=True)[0]
    return (resized * 255).to(torch.uint8).permute(1, 2, 0).numpy()


def eagle_pixels(image: np.ndarray) -> Tensor:
    """uint8 ``[H, W, 3]`` -> float32 ``[3, H, W]``: ``(x - 127.5) / 127.5``."""
    values = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).to(torch.float32)
    return (values - 127.5) / 127.5


def _content(height: int, width: int, out_height: int, out_width: int) -> tuple[int, int]:
    rows, columns = content_size(height, width, out_height, out_width)
    if rows < 1 or columns < 1:
        raise ObservationError(f"image is {height} x {width} pixels, too narrow for {out_height} x {out_width}")
    return rows, columns
