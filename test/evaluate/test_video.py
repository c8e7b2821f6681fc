"""Videos and contact sheets hold every clip, at sizes that players accept."""

import imageio.v2 as imageio
import numpy as np
import pytest

from omega_qvla_core.evaluate.video import CAPTION_HEIGHT_PX, Clip, write_contact_sheet, write_video


def clip(frames, success=True):
    images = [np.full((70, 100, 3), 40 + 10 * i, np.uint8) for i in range(frames)]
    return Clip(images, "lift the red cube", success)


def test_video_can_be_read_back_with_every_frame(tmp_path):
    path = tmp_path / "demo.mp4"
    write_video(path, [clip(6), clip(4, success=False)], fps=10, hold_s=0.5)
    frames = [frame for frame in imageio.get_reader(path)]  # list() would ask the reader for its (infinite) length
    assert len(frames) == 6 + 5 + 4 + 5
    assert frames[0].shape == (64 + CAPTION_HEIGHT_PX, 96, 3)


def test_contact_sheet_has_one_row_per_clip(tmp_path):
    path = tmp_path / "sheet.png"
    write_contact_sheet(path, [clip(9), clip(1)], columns=3)
    assert imageio.imread(path).shape == (2 * (64 + CAPTION_HEIGHT_PX), 3 * 96, 3)


def test_no_frames_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "demo.mp4", [clip(0)], fps=10)
    assert not (tmp_path / "demo.mp4").exists()
