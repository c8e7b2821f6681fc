"""Bag files: what is written can be read, also after a full disk and a kill; what cannot be read is said clearly."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bag_fixtures import episode, padded_image, toy_topics, write_bag
from rclpy.serialization import serialize_message
from robot_fixtures import PERIOD_NS, T0

from omega_qvla_core.errors import RecordingError
from omega_qvla_ros.bags.reader import Bag, resolve_topic
from omega_qvla_ros.bags.recorder import BagRecorder, RecorderState
from omega_qvla_ros.bags.salvage import mend
from omega_qvla_ros.bags.writer import BagWriter

IMAGE = "sensor_msgs/msg/Image"
FRONT = "/front/image_raw"


def image_bytes(number: int, size_px: int = 64) -> bytes:
    return serialize_message(padded_image(T0 + number * PERIOD_NS, "rgb8", 0, number, size_px))


def recorded(path: Path, topic: str = FRONT) -> list[int]:
    """Receive times of one topic's messages."""
    with Bag(path) as bag:
        return [message.log_ns for message in bag.messages({topic})]


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_messages_come_back_as_they_were(tmp_path: Path, storage: str) -> None:
    sent = episode(4)
    with Bag(write_bag(tmp_path / "bag", sent, storage)) as bag:
        back = list(bag.messages(set(bag.topics)))
        assert [(m.topic, m.log_ns) for m in back] == [(topic, log_ns) for topic, log_ns, _ in sent]
        assert bag.topics[FRONT].count == 4 and bag.topics[FRONT].msgtype == IMAGE
        assert bag.duration_s == pytest.approx(0.159) and bag.start_ns == T0
    images = [(m.message, s[2]) for m, s in zip(back, sent) if m.topic == FRONT]
    for ours, theirs in images:
        assert (ours.encoding, ours.step, ours.height) == (theirs.encoding, theirs.step, theirs.height)
        np.testing.assert_array_equal(np.asarray(ours.data), np.asarray(theirs.data))


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_recorder_counts_what_it_drops_and_keeps_the_rest(tmp_path: Path, storage: str) -> None:
    data = image_bytes(0)
    recorder = BagRecorder(tmp_path / "bag", toy_topics(), storage, max_queued_bytes=3 * len(data))
    taken = [recorder.put(0, T0 + k, data) for k in range(200)]
    recorder.close()
    assert recorder.state is RecorderState.STOPPED and not recorder.reason
    assert not all(taken) and recorder.dropped[FRONT] == taken.count(False)
    assert recorder.written[FRONT] == taken.count(True)
    assert recorded(tmp_path / "bag") == [T0 + k for k, ok in enumerate(taken) if ok]
    assert not recorder.put(0, T0, data), "a closed recorder takes nothing"


def test_recording_ends_with_a_complete_bag_before_the_disk_is_full(tmp_path: Path) -> None:
    free = iter([10_000_000, 1_000])
    recorder = BagRecorder(
        tmp_path / "bag", toy_topics(), min_free_bytes=5_000_000, free_bytes=lambda _: next(free, 1_000)
    )
    deadline_s, sent = time.monotonic() + 30.0, 0
    while recorder.state is RecorderState.RECORDING and time.monotonic() < deadline_s:
        sent += recorder.put(0, T0 + sent, image_bytes(sent))
        time.sleep(0.02)
    recorder.close()
    assert recorder.state is RecorderState.DEGRADED and "min_free_mb" in recorder.reason
    assert (tmp_path / "bag" / "metadata.yaml").is_file()
    assert len(recorded(tmp_path / "bag")) == recorder.written[FRONT] > 0


FULL_DISK = """
import resource, sys, time
from pathlib import Path
from bag_fixtures import toy_topics
from test_bag_files import image_bytes
from omega_qvla_ros.bags.recorder import BagRecorder, RecorderState
resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, resource.RLIM_INFINITY))
recorder = BagRecorder(Path(sys.argv[1]), toy_topics(), sys.argv[2])
data = image_bytes(0)
sent = 0
while recorder.state is RecorderState.RECORDING and sent < 1000:
    recorder.put(0, sent, data)
    sent += 1
    time.sleep(0.01)
for _ in range(10):
    assert not recorder.put(0, sent, data)
recorder.close()
print(recorder.state.value, recorder.reason)
"""


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_full_disk_keeps_what_was_written(tmp_path: Path, storage: str) -> None:
    """A file that cannot grow any more, which to the writer is a full disk: the write itself fails."""
    folder = tmp_path / "bag"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder), storage],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"degraded the bag {folder} cannot be written:"), done.stdout
    kept = recorded(folder)
    assert kept == list(range(len(kept))) and len(kept) >= 50


KILLED = """
import sys, time
from pathlib import Path
from bag_fixtures import toy_topics
from test_bag_files import image_bytes
from omega_qvla_ros.bags.recorder import BagRecorder
recorder = BagRecorder(Path(sys.argv[1]), toy_topics(), sys.argv[2])
data = image_bytes(0)
for sent in range(100000):
    recorder.put(0, sent, data)
    print(sent, flush=True)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_killed_recorder_loses_the_last_second_and_repair_keeps_the_rest(tmp_path: Path, storage: str) -> None:
    folder = tmp_path / "bag"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), storage],
        cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while int(process.stdout.readline()) < 250:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    if storage == "mcap":
        with pytest.raises(RecordingError, match=f"cannot be read as a bag .*omega-qvla-ros repair {folder}"):
            Bag(folder)
    (done,) = mend(folder)
    assert done.path.is_file()
    # Whether sqlite3 had begun to write its transaction is chance.
    assert storage == "sqlite3" or not done.was_whole
    kept = recorded(folder)
    assert kept == list(range(len(kept))) and len(kept) >= 50
    before = (folder / f"bag.{'mcap' if storage == 'mcap' else 'db3'}").read_bytes()
    assert [(done.cut_bytes, done.was_whole) for done in mend(folder)] == [(0, True)]
    assert (folder / f"bag.{'mcap' if storage == 'mcap' else 'db3'}").read_bytes() == before, "mending twice changes it"


def test_mcap_cut_anywhere_is_refused_or_mended_to_whole_messages(tmp_path: Path) -> None:
    whole = write_bag(tmp_path / "bag", episode(130)) / "bag.mcap"
    times, data = recorded(whole), whole.read_bytes()
    cut = tmp_path / "cut.mcap"
    for size in [len(data) - 1, len(data) - 30, len(data) - 2000, len(data) // 2, 1_100_000]:
        cut.write_bytes(data[:size])
        with pytest.raises(RecordingError, match="cannot be read as a bag"):
            recorded(cut)
        (done,) = mend(cut)
        assert done.kept_bytes + done.cut_bytes == size
        kept = recorded(cut)
        assert kept == times[: len(kept)] and len(kept) > 20
    cut.write_bytes(data[:500])
    mend(cut)
    assert recorded(cut) == []
    cut.write_bytes(b"\x00" * 4000)
    with pytest.raises(RecordingError, match="no MCAP file"):
        mend(cut)


@pytest.mark.parametrize("damage", [b"", b"not a bag at all" * 10, b"\x89MCAP0\r\n", b"\x89MCAP0\r\n" + b"\xff" * 60])
@pytest.mark.parametrize("suffix", [".mcap", ".db3"])
def test_garbage_is_one_clear_error(tmp_path: Path, damage: bytes, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(damage)
    with pytest.raises(RecordingError, match=rf"{path} cannot be read as a bag"):
        Bag(path)


def test_what_is_no_bag_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="does not exist"):
        Bag(tmp_path / "gone")
    with pytest.raises(RecordingError, match="is no bag"):
        Bag(tmp_path)
    (tmp_path / "old.bag").write_bytes(b"#ROSBAG V2.0")
    with pytest.raises(RecordingError, match="ROS 1 bag; convert it"):
        Bag(tmp_path / "old.bag")
    write_bag(tmp_path / "bag", episode(1))
    with pytest.raises(RecordingError, match="cannot be made: .*exists already"):
        BagWriter(tmp_path / "bag", toy_topics())


def test_folder_without_metadata_is_read_from_its_file(tmp_path: Path) -> None:
    folder = write_bag(tmp_path / "bag", episode(3))
    (folder / "metadata.yaml").unlink()
    assert len(recorded(folder)) == 3
    shutil.copy(folder / "bag.mcap", folder / "bag_1.mcap")
    with pytest.raises(RecordingError, match="2 files and no metadata.yaml; run `ros2 bag reindex"):
        Bag(folder)


def test_topics_are_found_by_namespace_and_remapping(tmp_path: Path) -> None:
    with Bag(write_bag(tmp_path / "left", episode(2), prefix="/left")) as bag:
        assert resolve_topic(bag, "front/image_raw", IMAGE, "a test") == "/left/front/image_raw"
        assert resolve_topic(bag, "front/image_raw", IMAGE, "a test", "left") == "/left/front/image_raw"
        assert resolve_topic(bag, "cam", IMAGE, "a test", remaps={"cam": "/left/wrist/image_raw"}) == (
            "/left/wrist/image_raw"
        )
        with pytest.raises(RecordingError, match=r"no topic '/right/front/image_raw'.*nearest is '/left/front/image"):
            resolve_topic(bag, "front/image_raw", IMAGE, "a test", "right")
        with pytest.raises(RecordingError, match=r"no topic '/frnt/image_raw', which a test needs; .*image_raw \(2\)"):
            resolve_topic(bag, "frnt/image_raw", IMAGE, "a test")
        with pytest.raises(RecordingError, match="is of type sensor_msgs/msg/Image, a test needs .*JointState"):
            resolve_topic(bag, "/left/front/image_raw", "sensor_msgs/msg/JointState", "a test")
        with pytest.raises(RecordingError, match="without a single message"):
            resolve_topic(bag, "joint_trajectory", "trajectory_msgs/msg/JointTrajectory", "a test")


def test_rlimit_is_what_the_full_disk_test_needs() -> None:
    """The limit must be one that this process may set; else the test above would prove nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert soft == resource.RLIM_INFINITY or soft > 2_500_000
    assert hard == resource.RLIM_INFINITY or hard > 2_500_000


def test_database_with_half_a_transaction_is_mended_once(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", episode(20), storage="sqlite3")
    times = recorded(bag)
    script = (
        "import os, signal, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1])\n"
        "c.execute('PRAGMA cache_size = 1')  # so that pages go to the database before the transaction ends\n"
        "c.execute('DELETE FROM messages')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(bag / "bag.db3")], check=False, timeout=30)
    assert [done.was_whole for done in mend(bag)] == [False]
    assert recorded(bag) == times
    assert [done.was_whole for done in mend(bag)] == [True]
