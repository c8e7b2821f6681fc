"""A bag gives the policy exactly what the live node would have given it, and calibration finds it without ROS."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from bag_fixtures import episode, joints, padded_image, string, told, write_bag
from robot_fixtures import CONTRACT, PERIOD_NS, T0, toy_contract, toy_spec
from sensor_msgs.msg import CompressedImage

from omega_qvla_core.errors import ConfigError, ObservationError, RecordingError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.runtime.observation_sources import ObservationRequest, read_observations, remaps_from
from omega_qvla_ros import msgs
from omega_qvla_ros.bags.playback import Playback, PlaybackOptions
from omega_qvla_ros.bags.reader import Bag
from omega_qvla_ros.contract import RobotContract, check_policy
from omega_qvla_ros.intake import Intake
from omega_qvla_ros.nodes.policy_node import decoder
from omega_qvla_ros.notices import Notices
from omega_qvla_ros.observation import NotReady, ObservationBuffer

PERIODS = 12
CAMERAS = toy_contract(
    cameras=[
        {"key": "front", "topic": "front/image_raw", "resize": "crop"},
        {"key": "wrist", "topic": "wrist/image_raw"},
    ]
)
"""The toy robot; its cameras are raw, one of them resized by the contract's rule."""


def live_observations(
    messages: list[tuple[str, int, Any]], instruction: str, contract: RobotContract = CAMERAS
) -> list[Observation]:
    """What the node makes of the same messages: its buffer, its decoding with cv_bridge, its joint order."""
    spec = toy_spec()
    binding, buffer, decode = check_policy(contract, spec), ObservationBuffer(contract), decoder(contract, spec)
    intake = Intake(contract, {"front": (64, 64), "wrist": (64, 64)}, buffer, Notices(), threaded=False)
    keys = {f"/{camera.topic}": camera.key for camera in contract.cameras}
    found: list[Observation] = []
    newest_ns = -1
    for topic, now_ns, message in messages:
        if topic == "/joint_states":
            intake.on_joint_states(message, now_ns)
        if topic not in keys:
            continue
        intake.on_image(keys[topic], message, now_ns)
        snapshot = buffer.assemble(now_ns)
        if isinstance(snapshot, NotReady) or snapshot.stamp_ns <= newest_ns:
            continue
        newest_ns = snapshot.stamp_ns
        images = {key: decode(sample, key) for key, sample in snapshot.images.items()}
        found.append(snapshot.observation(images, instruction, binding))
    return found


def assert_equal(ours: list[Observation], theirs: list[Observation]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs):
        assert one.instruction == other.instruction and set(one.images) == set(other.images) == {"front", "wrist"}
        np.testing.assert_array_equal(one.state, other.state)
        for key in one.images:
            assert one.images[key].dtype == other.images[key].dtype == np.uint8
            np.testing.assert_array_equal(one.images[key], other.images[key])


def played(path: Path, **options: Any) -> list[Observation]:
    with Bag(path) as bag:
        playback = Playback(bag, CAMERAS, toy_spec(), PlaybackOptions(**options))
        return [playback.observation(moment) for moment in playback.moments()]


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("log_offset_ns", [0, 1_700_000_000 * 10**9], ids=["same clock", "recorded in wall time"])
def test_bag_and_live_path_give_equal_observations(tmp_path: Path, storage: str, log_offset_ns: int) -> None:
    """Every encoding, padded rows, joints in another order, an old image and a camera that skips one included."""
    messages = episode(PERIODS + 1)
    late = messages[-1][1]
    messages[-1] = ("/front/image_raw", late, padded_image(T0, "rgb8", 0, 99))  # for the last wrist image: too old
    live = live_observations(messages, "touch the red cube")
    bag = write_bag(tmp_path / "bag", messages, storage, log_offset_ns=log_offset_ns)
    assert_equal(played(bag), live)
    assert len(live) == PERIODS


def test_joint_with_a_topic_of_its_own_is_recorded_and_played_from_there(tmp_path: Path) -> None:
    source = {"topic": "hand/joint_states", "joints": ["finger"], "timeout_s": 0.3}
    contract = toy_contract(sensors={"joint_sources": [source]})
    messages = episode(PERIODS)
    # Once in three periods: slower than streams have to be in step, faster than its own timeout.
    slow = [
        ("/hand/joint_states", ns, joints(ns - 1_000_000, 9.0, 0.001 * k))
        for k, (topic, ns, _) in enumerate(messages)
        if topic == "/joint_states" and k % 3 == 1
    ]
    messages = sorted([*messages, *slow], key=lambda message: message[1])
    with Bag(write_bag(tmp_path / "bag", messages, contract=contract)) as bag:
        playback = Playback(bag, contract, toy_spec())
        states = [playback.observation(moment).state for moment in playback.moments()]
    assert len(states) == PERIODS
    told_by_hand = {round(0.001 * k, 6) for k in range(len(messages))}
    assert all(0.0 <= shoulder < 1.0 for _, shoulder in states)
    assert (
        len({finger for finger, _ in states}) > 2 and {round(float(finger), 6) for finger, _ in states} <= told_by_hand
    )
    assert 0.02 not in {finger for finger, _ in states}  # what the other topic says of it
    without = write_bag(tmp_path / "without", episode(3))
    with Bag(without) as bag, pytest.raises(RecordingError, match="no topic '/hand/joint_states'"):
        Playback(bag, contract, toy_spec())


def test_equal_observations_are_equal_tensors(tmp_path: Path) -> None:
    """Through the checkpoint's own processing too: what calibration sees is what inference sees."""
    torch = pytest.importorskip("torch")
    from omega_qvla_core.runtime.random_policy import random_policy
    from omega_qvla_ros.contract import load_contract
    from omega_qvla_ros.resources import resolve_contract

    policy = random_policy()
    contract = load_contract(resolve_contract("tabletop"))
    names = contract.joint_names
    messages: list[tuple[str, int, Any]] = []
    for k in range(4):
        stamp_ns = T0 + k * PERIOD_NS
        positions = np.linspace(0.0, 0.03, len(names)) + 0.01 * k
        messages.append(("/joint_states", stamp_ns, msgs.joint_state(names, positions, 0 * positions, stamp_ns)))
        messages.append(("/front/image_raw", stamp_ns + 1, padded_image(stamp_ns, "bgr8", 2, k, 96)))
        messages.append(("/wrist/image_raw", stamp_ns + 2, padded_image(stamp_ns, "rgb8", 0, 50 + k, 96)))
    binding, buffer = check_policy(contract, policy.spec), ObservationBuffer(contract)
    live = []
    for topic, now_ns, message in messages:
        stamp_ns = msgs.stamp_to_ns(message.header.stamp)
        if topic == "/joint_states":
            buffer.add_joints(message.name, message.position, stamp_ns, now_ns)
            continue
        buffer.add_image(topic.split("/")[1], message, stamp_ns, now_ns)
        snapshot = buffer.assemble(now_ns)
        if topic == "/wrist/image_raw" and not isinstance(snapshot, NotReady):
            images = {key: msgs.image_to_rgb(image, key) for key, image in snapshot.images.items()}
            live.append(snapshot.observation(images, "lift the green cube", binding))
    request = ObservationRequest(policy.spec, contract="tabletop", instruction="lift the green cube")
    found = read_observations(write_bag(tmp_path / "bag", messages), request).observations
    by_state = {tuple(o.state): o for o in found}
    assert len(found) == 4 and tuple(live[0].state) in by_state
    ours = policy.processor.prepare([found[0]], policy.device)
    theirs = policy.processor.prepare([live[0]], policy.device)
    tensors = [name for name, value in vars(ours).items() if isinstance(value, torch.Tensor)]
    assert tensors
    for name in tensors:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_instruction_comes_from_the_bag_and_changes_with_it(tmp_path: Path) -> None:
    messages = episode(4, "lift the green cube")
    messages.insert(7, ("/policy_node/instruction", messages[6][1] + 1, string("touch the blue cube")))
    messages.insert(8, ("/policy_node/instruction", messages[6][1] + 2, string("  ")))  # the node refuses it, too
    told_then = [o.instruction for o in played(write_bag(tmp_path / "bag", messages))]
    assert told_then == ["lift the green cube"] * 2 + ["touch the blue cube"] * 2
    given = played(tmp_path / "bag", instruction="something else")
    assert {o.instruction for o in given} == {"something else"}
    silent = [message for message in episode(4) if "policy_node" not in message[0]]
    with pytest.raises(RecordingError, match="does not say what the arm was told.*give --instruction"):
        played(write_bag(tmp_path / "silent", silent))
    with Bag(tmp_path / "silent") as bag:
        contract = replace(toy_contract(), default_instruction="touch the red cube")
        assert len(list(Playback(bag, contract, toy_spec()).moments())) > 0


def test_two_robots_in_one_bag_are_told_apart(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", episode(3), prefix="/left")
    assert len(played(bag, namespace="left", instruction="go")) > 0
    with pytest.raises(
        RecordingError, match=r"no topic '/right/front/image_raw', which camera 'front' of the contract"
    ):
        played(bag, namespace="right")
    # The status inside is that of "policy_node", not of "left/policy_node".
    with pytest.raises(RecordingError, match="give --instruction"):
        played(bag, namespace="left")


@pytest.fixture
def toy_file(tmp_path: Path) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(CONTRACT), encoding="utf-8")
    return str(path)


def test_calibration_thins_out_evenly_and_says_where_each_came_from(tmp_path: Path, toy_file: str) -> None:
    bag = write_bag(tmp_path / "bag", episode(21))
    seen: list[tuple[int, int]] = []
    request = ObservationRequest(toy_spec(), toy_file, progress=lambda done, total: seen.append((done, total)))
    everything = read_observations(bag, request)
    assert_equal(list(everything.observations), played(bag))
    assert seen and seen[-1][0] <= seen[-1][1] and len(everything.sources) == len(everything.observations) == 21
    few = read_observations(bag, replace(request, max_observations=5))
    assert few.sources == tuple(everything.sources[k] for k in (2, 6, 10, 14, 18))
    every = read_observations(bag, replace(request, every=7))
    assert every.sources == tuple(everything.sources[k] for k in (0, 7, 14))


def test_calibration_refuses_what_cannot_be(tmp_path: Path, toy_file: str) -> None:
    bag = write_bag(tmp_path / "bag", episode(3))
    with pytest.raises(ConfigError, match="is a bag: --contract FILE says which of its topics"):
        read_observations(bag, ObservationRequest(toy_spec()))
    with pytest.raises(ConfigError, match="every is 0"):
        ObservationRequest(toy_spec(), every=0)
    with pytest.raises(ConfigError, match=r"action names.*differ"):
        read_observations(bag, ObservationRequest(toy_spec(action_names=("finger", "elbow")), toy_file))
    far_apart = [m for m in episode(3) if m[0] != "/wrist/image_raw"]
    far_apart.append(("/wrist/image_raw", T0 + 2**35, padded_image(T0 + 2**35, "rgb8", 0, 0)))
    with pytest.raises(RecordingError, match="no moment at which all cameras and joints of 'toy'"):
        read_observations(write_bag(tmp_path / "apart", far_apart), ObservationRequest(toy_spec(), toy_file))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ObservationError, match=r"not an observation file.*none of the installed readers.*\(bag\)"):
        read_observations(tmp_path / "notes.txt", ObservationRequest(toy_spec()))
    with pytest.raises(ConfigError, match="must be CONTRACT_TOPIC:=RECORDED_TOPIC"):
        remaps_from(["front"])
    assert remaps_from(["front/image_raw:=/cam"]) == {"front/image_raw": "/cam"}


NO_ROS = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"rclpy", "sensor_msgs", "cv_bridge", "std_msgs", "builtin_interfaces"}:
            raise ImportError(f"{name} is hidden")
sys.meta_path.insert(0, Block())
from pathlib import Path
from omega_qvla_core.policy_types import CameraSpec, PolicySpec
from omega_qvla_core.runtime.observation_sources import ObservationRequest, read_observations
cameras = (CameraSpec("front", 64, 64), CameraSpec("wrist", 64, 64))
names = ("finger", "shoulder")
spec = PolicySpec("toy", "pi05", cameras, names, names, 8, 20.0, 0.05, 4, 16)
found = read_observations(Path(sys.argv[1]), ObservationRequest(spec, sys.argv[2]))
print(len(found.observations))
"""


def test_calibration_from_a_bag_needs_no_ros(tmp_path: Path, toy_file: str) -> None:
    bag = write_bag(tmp_path / "bag", episode(5))
    done = subprocess.run(
        [sys.executable, "-c", NO_ROS, str(bag), toy_file], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5"


def test_status_array_tells_the_instruction_too(tmp_path: Path) -> None:
    from diagnostic_msgs.msg import DiagnosticArray

    messages = [m for m in episode(3) if "policy_node" not in m[0]]
    status = told("touch the green cube")
    status.name = "policy_node: policy"
    messages.insert(0, ("/diagnostics", T0, DiagnosticArray(status=[status])))
    assert {o.instruction for o in played(write_bag(tmp_path / "bag", messages))} == {"touch the green cube"}


def jpeg(stamp_ns: int, seed: int) -> CompressedImage:
    """A JPEG of smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    done, data = cv2.imencode(".jpg", cv2.resize(small, (80, 64)))
    assert done
    return CompressedImage(header=msgs.header(stamp_ns), format="jpeg", data=data.tobytes())


def test_compressed_cameras_are_decoded_as_in_the_node(tmp_path: Path) -> None:
    cameras = [
        {"key": "front", "topic": "front/image/compressed", "transport": "compressed", "resize": "pad"},
        {"key": "wrist", "topic": "wrist/image_raw"},
    ]
    contract = toy_contract(cameras=cameras)
    messages = [
        ("/front/image/compressed", now_ns, jpeg(msgs.stamp_to_ns(message.header.stamp), k))
        if topic == "/front/image_raw"
        else (topic, now_ns, message)
        for k, (topic, now_ns, message) in enumerate(episode(6))
    ]
    bag = write_bag(tmp_path / "bag", messages, contract=contract)
    with Bag(bag) as opened:
        playback = Playback(opened, contract, toy_spec())
        ours = [playback.observation(moment) for moment in playback.moments()]
    assert_equal(ours, live_observations(messages, "touch the red cube", contract))
    assert ours[0].images["front"].shape == (80, 80, 3)
