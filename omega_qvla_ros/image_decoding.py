"""Image messages -> RGB without ROS: the same code for a message from a topic and for one from a recorded bag."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from omega_qvla_core.errors import ObservationError

CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}
"""Encodings that are understood, with their bytes per pixel."""
_RGB_ORDER = {"rgb8": (0, 1, 2), "bgr8": (2, 1, 0), "rgba8": (0, 1, 2), "bgra8": (2, 1, 0), "mono8": (0, 0, 0)}
MAX_IMAGE_PIXELS = 64 * 1024 * 1024
"""An 8192x8192 image; a header that claims more is damaged."""


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
