"""Pictures of rollouts: an MP4 and a contact sheet, with the instruction and the result written on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import imageio.v2 as imageio
import numpy as np

CAPTION_HEIGHT_PX = 32
MACRO_BLOCK_PX = 16
"""H.264 wants sides that are multiples of this."""
GREEN_RGB, RED_RGB, WHITE_RGB = (120, 220, 120), (240, 110, 100), (235, 235, 235)


@dataclass(frozen=True)
class Clip:
    """Frames of one episode.

    Attributes:
        frames: uint8 ``[H, W, 3]`` RGB images in order.
        caption: What the arm was told.
        success: How it ended.
    """

    frames: Sequence[np.ndarray]
    caption: str
    success: bool


def _captioned(frame: np.ndarray, caption: str, success: bool | None) -> np.ndarray:
    """The frame above a strip with its caption; the sides are made multiples of the macro block."""
    height, width = (side - side % MACRO_BLOCK_PX for side in frame.shape[:2])
    strip = np.full((CAPTION_HEIGHT_PX, width, 3), 24, np.uint8)
    colour = WHITE_RGB if success is None else GREEN_RGB if success else RED_RGB
    mark = "" if success is None else "  done" if success else "  failed"
    scale = min(0.5, 0.5 * width / (8.5 * max(1, len(caption + mark))))
    cv2.putText(strip, caption + mark, (8, 21), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)
    return np.concatenate([frame[:height, :width], strip])


def write_video(path: Path, clips: Sequence[Clip], fps: float, hold_s: float = 0.7) -> None:
    """Write all clips one after the other; the last frame of each stays for ``hold_s`` with the result.

    Raises:
        ValueError: There is no frame.
    """
    if not any(clip.frames for clip in clips):
        raise ValueError(f"{path}: no frames were recorded; is the overview camera published?")
    path.parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(path, fps=fps, codec="libx264", macro_block_size=MACRO_BLOCK_PX) as writer:
        for clip in clips:
            for frame in clip.frames:
                writer.append_data(_captioned(frame, clip.caption, None))
            for _ in range(round(hold_s * fps) if clip.frames else 0):
                writer.append_data(_captioned(clip.frames[-1], clip.caption, clip.success))


def write_contact_sheet(path: Path, clips: Sequence[Clip], columns: int = 5) -> None:
    """Write one row of evenly spaced frames per clip, the first and the last included.

    Raises:
        ValueError: There is no frame.
    """
    rows = []
    for clip in clips:
        if clip.frames:
            chosen = [clip.frames[i] for i in np.linspace(0, len(clip.frames) - 1, columns).round().astype(int)]
            last = columns - 1
            rows.append(
                np.concatenate(
                    [
                        _captioned(f, clip.caption if i in (0, last) else "", clip.success if i == last else None)
                        for i, f in enumerate(chosen)
                    ],
                    axis=1,
                )
            )
    if not rows:
        raise ValueError(f"{path}: no frames were recorded; is the overview camera published?")
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, np.concatenate(rows))
