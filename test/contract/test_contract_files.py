"""The robot contract: what is read, what is refused, and that the shipped robot agrees with its simulation."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from robot_fixtures import contract_dict, toy_contract, toy_spec

from omega_qvla_core.envs.tabletop import CAMERAS, CONTROL_HZ, JOINT_NAMES, POSITION_LIMITS, VELOCITY_LIMITS
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import CameraSpec
from omega_qvla_ros.contract import check_policy, contract_from_dict, load_contract
from omega_qvla_ros.resources import config_file, resolve_contract


def sources(*given: tuple[str, list[str]], **more: object) -> dict:
    """Top-level keys with sources of joints: topic and joints of each."""
    return {"sensors": {"joint_sources": [{"topic": topic, "joints": joints, **more} for topic, joints in given]}}


def test_shipped_tabletop_agrees_with_the_environment() -> None:
    contract = load_contract(config_file("robots/tabletop.yaml"))
    limits = contract.joint_limits()
    assert contract.joint_names == JOINT_NAMES
    assert contract.control_rate_hz == CONTROL_HZ
    assert [camera.key for camera in contract.cameras] == list(CAMERAS)
    np.testing.assert_array_equal(limits.position_min, POSITION_LIMITS[:, 0])
    np.testing.assert_array_equal(limits.position_max, POSITION_LIMITS[:, 1])
    np.testing.assert_array_equal(limits.max_velocity, VELOCITY_LIMITS)


def test_default_jump_is_one_and_a_half_periods_at_full_speed() -> None:
    limits = toy_contract().joint_limits()
    np.testing.assert_allclose(limits.max_jump, [2.0 * 0.05 * 1.5, 0.04])
    assert limits.max_tracking_error[1] == np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"camras": []}, "did you mean 'cameras'"),
        ({"format_version": 2}, "format_version is 2"),
        ({"control_rate_hz": 0.0}, "control_rate_hz is 0.0; it must be greater than 0"),
        ({"control_rate_hz": "fast"}, "must be of type float"),
        ({"cameras": []}, "at least one camera"),
        ({"limits": {"mode": "ignore"}}, "must be one of clamp, scale, reject"),
        ({"chunk": {"blend_time": 0.1}}, "did you mean 'blend_time_s'"),
        ({"chunk": {"min_remaining_s": 0.0}}, "chunk.min_remaining_s is 0.0; it must be greater than 0"),
        ({"chunk": {"switch_lead_s": -0.01}}, "chunk.switch_lead_s is -0.01; at least 0"),
        ({"chunk": {"switch_lead_s": 0.1}}, r"switch_lead_s is 0.1; .* below min_remaining_s \(0.1\)"),
        ({"limits": {"max_slowdown": 0.5}}, "limits.max_slowdown is 0.5; at least 1"),
        ({"safety": {"max_late_chunks": 0}}, "safety.max_late_chunks is 0; it must be greater than 0"),
        ({"safety": {"stall_time": 1.0}}, "did you mean 'stall_time_s'"),
        ({"sensors": {"max_clock_skew_s": -0.1}}, "sensors.max_clock_skew_s is -0.1; it must be greater than 0"),
        ({"chunk": {"execution_horizon_steps": 0}}, "execution_horizon_steps is 0"),
        ({"chunk": {"rate_hz": 0}}, "chunk.rate_hz is 0.0; it must be greater than 0"),
        ({"safety": {"inference_timeout_s": 0}}, "safety.inference_timeout_s is 0.0; it must be greater than 0"),
        ({"safety": {"retry_delay_s": -1}}, "safety.retry_delay_s is -1.0; it must not be negative"),
        ({"safety": {"estop_topic": "e stop"}}, "estop_topic is 'e stop', which is no ROS name"),
        ({"sensors": {"joint_states_topic": "/joint_states"}}, "give a relative name"),
        (sources(("hand/states", ["fingr"])), r"'fingr' is none of the contract's joints; did you mean 'finger'\?"),
        (sources(("hand/states", ["finger"]), ("b", ["finger"])), "'finger' comes from 'hand/states' already"),
        (sources(("hand/states", ["finger"]), ("b", ["shoulder"])), "names every joint"),
        (sources(("hand/states", [])), "joints is empty"),
        (sources(("joint_states", ["finger"])), "topic of joint states 'joint_states' occurs 2 times"),
        (sources(("/hand/states", ["finger"])), "give a relative name"),
        (sources(("hand/states", ["finger"]), timeout_s=0.0), "timeout_s is 0.0; it must be greater than 0"),
        (sources(("hand/states", ["finger"]), timeout=0.1), "timeout_s"),
        ({"robot_description": {"use": "yes"}}, "must be one of ignore, optional, required"),
        ({"checkpoint": {"action_mod": "delta"}}, "did you mean 'action_mode'"),
        ({"outputs": []}, "outputs is empty"),
        ({"outputs": [{"name": "a"}, {"name": "b"}]}, "'a' and 'b' both name no joints"),
        ({"outputs": [{"joints": ["shoulder"]}]}, "no output takes the joint 'finger'"),
        ({"outputs": [{"joints": ["shouldr", "finger"]}]}, "did you mean 'shoulder'"),
        (
            {"outputs": [{"name": "a", "joints": ["shoulder", "finger"]}, {"name": "b"}]},
            "joints is empty and the other",
        ),
        (
            {"outputs": [{"name": "a", "joints": ["shoulder", "finger"]}, {"name": "b", "joints": ["finger"]}]},
            "'finger' is commanded by 'a' already",
        ),
        (
            {"outputs": [{"type": "gripper_command", "name": "g"}]},
            "gripper_command moves one joint, not shoulder, finger",
        ),
        ({"outputs": [{"type": "joint_trajectory", "max_effort": 1.0}]}, "max_effort is for grippers"),
        ({"outputs": [{"type": "trajectory"}]}, "must be one of joint_trajectory, float64_multi_array"),
    ],
)
def test_wrong_contract_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        contract_from_dict(contract_dict(**change))


def test_wrong_joints_are_refused() -> None:
    data = contract_dict()
    data["joints"][0]["position_min"] = 2.0
    with pytest.raises(ConfigError, match="shoulder.*position_min 2.0 must be below"):
        contract_from_dict(data)
    data = contract_dict()
    data["joints"][1]["name"] = "shoulder"
    with pytest.raises(ConfigError, match="'shoulder' occurs 2 times"):
        contract_from_dict(data)
    data = contract_dict()
    data["joints"][0]["max_velocty"] = 1.0
    with pytest.raises(ConfigError, match="did you mean 'max_velocity'"):
        contract_from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topic": "/front"}, r"cameras\[front\].topic is '/front'; give a relative name"),
        ({"topic": "front//image"}, "no ROS name"),
        ({"transport": "theora"}, "must be one of raw, compressed"),
        ({"encoding": "yuv422"}, "must be one of rgb8"),
        ({"transport": "compressed", "encoding": "mono8"}, "leave encoding out"),
        ({"resize": "squash"}, "must be one of checkpoint, stretch, pad, crop"),
        ({"timeout_s": -0.1}, "timeout_s is -0.1; it must be greater than 0"),
    ],
)
def test_wrong_camera_is_refused(change: dict, message: str) -> None:
    data = contract_dict()
    data["cameras"][0].update(change)
    with pytest.raises(ConfigError, match=message):
        contract_from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sign": 0}, "sign is 0; it must be one of 1, -1"),
        ({"checkpoint_unit": "m"}, "checkpoint_unit is 'm' for a joint in rad"),
        (
            {"sign": -1, "end_points": {"robot": [0, 1]}},
            "two conversions, sign, offset and checkpoint_unit and end_points",
        ),
        ({"end_points": {"robot": [1, 1]}}, "end_points.robot are both 1.0"),
        ({"gripper": {"robot_open": 0.04}}, "lacks the key 'robot_closed'"),
        (
            {"gripper": {"robot_open": 1, "robot_closed": 0, "checkpoint_open": 1, "checkpoint_closed": 1}},
            "checkpoint_open and checkpoint_closed are both 1.0",
        ),
        (
            {
                "gripper": {
                    "robot_open": 1,
                    "robot_closed": 0,
                    "checkpoint_open": 1,
                    "checkpoint_closed": 0,
                    "action_open": 1,
                }
            },
            "both of action_open and action_closed",
        ),
        ({"max_acceleration": None}, "lacks the key 'max_acceleration'"),
        ({"max_velocity": ".inf"}, "must be of type float"),
        ({"max_velocity": float("inf")}, "must be a finite number"),
        ({"action_name": "finger"}, "action_name 'finger' occurs 2 times"),
    ],
)
def test_wrong_joint_is_refused(change: dict, message: str) -> None:
    data = contract_dict()
    data["joints"][0].update(change)
    with pytest.raises(ConfigError, match=message):
        contract_from_dict(data)


def test_joints_that_no_output_names_go_to_the_one_that_names_none() -> None:
    gripper = {"type": "gripper_command", "name": "gripper/cmd", "joints": ["finger"]}
    contract = toy_contract(outputs=[gripper, {"name": "arm"}])
    assert [output.joints for output in contract.outputs] == [("finger",), ("shoulder",)]
    assert toy_contract().outputs[0].joints == ("shoulder", "finger")


def test_contract_may_build_on_another_one(tmp_path) -> None:
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(contract_dict()))
    simulated = tmp_path / "arm_sim.yaml"
    simulated.write_text("base: arm.yaml\nname: arm_sim\noutputs: [{name: sim/joint_trajectory}]\n")
    contract = load_contract(simulated)
    assert contract.name == "arm_sim" and contract.outputs[0].name == "sim/joint_trajectory"
    assert contract.joints == toy_contract().joints
    for text, message in (
        ("base: ../arm.yaml", "a file in the same folder"),
        ("base: none.yaml", "none.yaml does not exist"),
        ("base: arm_sim.yaml", "has a base itself"),
    ):
        other = tmp_path / "other.yaml"
        other.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_contract(other)


def test_yaml_without_its_traps(tmp_path) -> None:
    path = tmp_path / "robot.yaml"
    text = yaml.safe_dump(contract_dict())
    path.write_text(text + "name: other\n")
    with pytest.raises(ConfigError, match="the key 'name' occurs twice"):
        load_contract(path)
    path.write_text("a: &a [1, 2]\nb: [*a, *a]\n")
    with pytest.raises(ConfigError, match="aliases .* are not read"):
        load_contract(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_contract(path)
    path.write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_contract(path)


def test_files_that_are_no_contract(tmp_path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_contract(tmp_path / "none.yaml")
    path = tmp_path / "broken.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_contract(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="broken.yaml"):
        load_contract(path)
    path.write_text(yaml.safe_dump(contract_dict()))
    assert load_contract(path) == toy_contract()


def test_resolve_contract_by_name_and_path(tmp_path) -> None:
    assert resolve_contract("tabletop") == config_file("robots/tabletop.yaml")
    path = tmp_path / "mine.yaml"
    path.touch()
    assert resolve_contract(str(path)) == path
    with pytest.raises(ConfigError, match="shipped: .*tabletop.*; did you mean 'tabletop'"):
        resolve_contract("table_top")
    with pytest.raises(ConfigError, match="shipped: .*xarm7_sim$"):
        resolve_contract("nothing like it")


def test_binding_maps_by_name() -> None:
    binding = check_policy(toy_contract(), toy_spec())
    np.testing.assert_array_equal(binding.state_joints, [1, 0])
    np.testing.assert_array_equal(binding.action_entries, [1, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cameras": (CameraSpec("front", 64, 64), CameraSpec("hand", 64, 64))},
            r"contract \[front, wrist\].*\[front, hand\]",
        ),
        ({"cameras": (CameraSpec("front", 64, 64),)}, "camera keys of contract and checkpoint differ"),
        ({"state_names": ("finger", "elbow")}, "state names.*nearest to 'shoulder' is 'elbow'"),
        ({"action_names": ("finger", "shoulder", "extra")}, r"action names.*\[finger, shoulder, extra\]"),
        ({"control_hz": 10.0}, "set control_rate_hz of the contract to 10.0"),
        ({"horizon": 3}, "choose at most 3"),
    ],
)
def test_checkpoint_for_another_robot_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_policy(toy_contract(), toy_spec(**change))


def test_names_in_the_checkpoint_may_differ_from_the_joints() -> None:
    data = contract_dict()
    data["joints"][0].update(state_name="s0", action_name="a0")
    spec = toy_spec(state_names=("s0", "finger"), action_names=("finger", "a0"))
    binding = check_policy(contract_from_dict(data), spec)
    np.testing.assert_array_equal(binding.state_joints, [0, 1])
    np.testing.assert_array_equal(binding.action_entries, [1, 0])
