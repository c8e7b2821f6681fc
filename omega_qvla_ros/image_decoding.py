"""Image messages -> RGB without ROS: the same code for a message from a topic and for one from a recorded bag."""

from __future__ import annotations

import io
from typing import Any, Protocol

import cv2
import numpy as np
from PIL import Image as PillowImage

from omega_qvla_core.errors import ObservationError

CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}
"""Encodings that are understood, with their bytes per pixel."""
_RGB_ORDER = {"rgb8": (0, 1, 2), "bgr8": (2, 1, 0), "rgba8": (0, 1, 2), "bgra8": (2, 1, 0), "mono8": (0, 0, 0)}
MAX_IMAGE_PIXELS = 64 * 1024 * 1024
"""An 8192x8192 image; a header that claims more is damaged."""

MAX_COMPRESSED_BYTES = 32 * 1024 * 1024
"""A PNG of 4096x2160 noise has 27 MB."""


class CompressedFields(Protocol):
    """The fields of ``sensor_msgs/CompressedImage`` that are read."""

    format: str
    data: Any


class ImageFields(Protocol):
    """The fields of ``sensor_msgs/Image`` that are read; ``data`` is any buffer of bytes."""

    height: int
    width: int
    encoding: str
    step: int
    data: Any


def check_image(message: ImageFields, topic: str, min_height: int = 1, min_width: int = 1) -> None:
    """Check an image's header against its data, without touching the pixels.

    Args:
        message: The message.
        topic: Its topic, for error messages.
        min_height: The network's image height.
        min_width: The network's image width.

    Raises:
        ObservationError: Encoding not understood, rows shorter than the width, too little data, or too small.
    """
    channels = CHANNELS.get(message.encoding)
    if channels is None:
        raise ObservationError(
            f"{topic!r}: encoding {message.encoding!r} is not understood; publish one of {', '.join(CHANNELS)}"
        )
    if message.height < min_height or message.width < min_width:
        raise ObservationError(
            f"{topic!r}: {message.width}x{message.height} px, the policy needs at least {min_width}x{min_height}; "
            "raise the camera's resolution"
        )
    if message.height * message.width > MAX_IMAGE_PIXELS:
        raise ObservationError(f"{topic!r}: {message.width}x{message.height} px cannot be; the header is damaged")
    row = message.width * channels
    if message.step < row:
        raise ObservationError(
            f"{topic!r}: step {message.step} is less than the {row} bytes of a row of {message.width} "
            f"{message.encoding} pixels"
        )
    needed = message.step * (message.height - 1) + row
    if len(message.data) < needed:
        raise ObservationError(
            f"{topic!r}: {len(message.data)} bytes of data, {needed} needed for {message.width}x{message.height} "
            f"{message.encoding} with step {message.step}; the image is cut off"
        )


def image_to_rgb(message: ImageFields, topic: str = "image") -> np.ndarray:
    """Decode an image.

    Args:
        message: ``rgb8``, ``bgr8``, ``rgba8``, ``bgra8`` or ``mono8``, with or without row padding. Its
            ``is_bigendian`` does not matter: 8-bit samples have no byte order.
        topic: Its topic, for error messages.

    Returns:
        uint8 ``[height, width, 3]`` RGB, contiguous and writable.

    Raises:
        ObservationError: See ``check_image``.
    """
    check_image(message, topic)
    channels = CHANNELS[message.encoding]
    row = message.width * channels
    data = np.frombuffer(message.data, dtype=np.uint8)
    # The last row may come without its padding.
    pixels = np.lib.stride_tricks.as_strided(
        data, shape=(message.height, row), strides=(message.step, 1), writeable=False
    )
    return np.ascontiguousarray(
        pixels.reshape(message.height, message.width, channels)[:, :, _RGB_ORDER[message.encoding]]
    )


def check_encoding(encoding: str, expected: str | None, topic: str) -> None:
    """Compare an image's encoding with the contract's.

    Raises:
        ObservationError: The contract names another one.
    """
    if expected is not None and encoding != expected:
        raise ObservationError(
            f"{topic!r}: encoding {encoding!r}, the contract expects {expected!r}; correct the driver or the contract"
        )


def compressed_to_rgb(message: CompressedFields, topic: str, min_height: int = 1, min_width: int = 1) -> np.ndarray:
    """Decode a JPEG or PNG. Pillow reads the size before anything is decoded and refuses a picture that is cut off.

    Args:
        message: ``sensor_msgs/CompressedImage``.
        topic: Its topic, for error messages.
        min_height: The network's image height.
        min_width: The network's image width.

    Returns:
        uint8 ``[height, width, 3]`` RGB, contiguous and writable.

    Raises:
        ObservationError: No JPEG or PNG, damaged, too many bytes or pixels, or too small.
    """
    if len(message.data) > MAX_COMPRESSED_BYTES:
        raise ObservationError(f"{topic!r}: {len(message.data)} bytes, more than {MAX_COMPRESSED_BYTES}; is it a JPEG?")
    try:
        picture = PillowImage.open(io.BytesIO(bytes(message.data)), formats=("JPEG", "PNG"))
        width, height = picture.size
        if width * height > MAX_IMAGE_PIXELS:
            raise ObservationError(f"{topic!r}: {width}x{height} px cannot be; the header is damaged")
        if height < min_height or width < min_width:
            raise ObservationError(
                f"{topic!r}: {width}x{height} px, the policy needs at least {min_width}x{min_height}; "
                "raise the camera's resolution"
            )
        return np.array(picture.convert("RGB"), dtype=np.uint8, order="C")
    except (OSError, SyntaxError, ValueError, EOFError, PillowImage.DecompressionBombError) as error:
        raise ObservationError(
            f"{topic!r}: a compressed image ({message.format!r}) cannot be decoded: {error}; it is damaged or no JPEG "
            "or PNG"
        ) from error


def to_aspect(rgb: np.ndarray, rule: str, height: int, width: int) -> np.ndarray:
    """Bring an image to the aspect ratio of the network by the contract's rule; the checkpoint's processing scales it.

    Args:
        rgb: uint8 ``[H, W, 3]``.
        rule: ``checkpoint`` (as it is), ``stretch``, ``pad`` or ``crop``.
        height: The network's image height.
        width: The network's image width.

    Returns:
        uint8 ``[H', W', 3]``, contiguous.
    """
    have_height, have_width = rgb.shape[:2]
    if rule == "checkpoint" or have_height * width == have_width * height:
        return rgb
    if rule == "stretch":
        return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
    too_wide = have_width * height > have_height * width
    if rule == "crop":
        keep_height = have_height if too_wide else round(have_width * height / width)
        keep_width = round(have_height * width / height) if too_wide else have_width
        top, left = (have_height - keep_height) // 2, (have_width - keep_width) // 2
        return np.ascontiguousarray(rgb[top : top + keep_height, left : left + keep_width])
    full_height = round(have_width * height / width) if too_wide else have_height
    full_width = have_width if too_wide else round(have_height * width / height)
    padded = np.zeros((full_height, full_width, 3), dtype=np.uint8)
    top, left = (full_height - have_height) // 2, (full_width - have_width) // 2
    padded[top : top + have_height, left : left + have_width] = rgb
    return padded
