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
        ({"limits": {"mode": "ignore"}}, "must be one of clamp, reject"),
        ({"chunk": {"blend_time": 0.1}}, "did you mean 'blend_time_s'"),
        ({"chunk": {"execution_horizon_steps": 0}}, "execution_horizon_steps is 0"),
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
    with pytest.raises(ConfigError, match="shipped: .*tabletop"):
        resolve_contract("table_top")


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
