"""Contract and checkpoint together: what fits, in which units, and that nothing is lost on the way and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from robot_fixtures import contract_dict, toy_contract, toy_spec

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.contract import RobotContract, check_policy, contract_from_dict, requirements

HALF_OPEN = np.array([0.5, 0.02])


def contract_with(shoulder: dict | None = None, finger: dict | None = None, **changes: object) -> RobotContract:
    data = contract_dict(**changes)
    data["joints"][0].update(shoulder or {})
    data["joints"][1].update(finger or {})
    return contract_from_dict(data)


def test_without_a_conversion_the_numbers_are_the_same_bit_for_bit() -> None:
    binding = check_policy(toy_contract(), toy_spec())
    positions = np.array([0.1234567890123, 0.0399999999])
    np.testing.assert_array_equal(binding.state(positions), positions[::-1])
    np.testing.assert_array_equal(binding.targets(positions[None, ::-1], HALF_OPEN), positions[None])


def test_sign_offset_and_degrees() -> None:
    contract = contract_with(shoulder={"sign": -1, "offset": np.pi / 2, "checkpoint_unit": "deg"})
    binding = check_policy(contract, toy_spec())
    # checkpoint = -(robot - 90 deg): a joint at 30 deg is at 60 for the checkpoint.
    assert binding.state(np.array([np.pi / 6, 0.02]))[1] == pytest.approx(60.0)
    assert binding.targets(np.array([[0.02, 0.0]]), HALF_OPEN)[0, 0] == pytest.approx(np.pi / 2)


def test_percent_between_two_calibrated_ends() -> None:
    binding = check_policy(contract_with(shoulder={"end_points": {"robot": [-0.5, 1.0]}}), toy_spec())
    for robot, percent in ((-0.5, -100.0), (1.0, 100.0), (0.25, 0.0)):
        assert binding.state(np.array([robot, 0.02]))[1] == pytest.approx(percent)
        assert binding.targets(np.array([[0.02, percent]]), HALF_OPEN)[0, 0] == pytest.approx(robot)


def test_gripper_whose_state_and_action_have_other_numbers() -> None:
    """LIBERO: the state is the finger's position, the action is -1 for open and 1 for closed."""
    ends = {"robot_open": 0.04, "robot_closed": 0.0, "checkpoint_open": 1.0, "checkpoint_closed": 0.0}
    binding = check_policy(contract_with(finger={"gripper": ends}), toy_spec())
    assert binding.state(np.array([0.0, 0.03]))[0] == pytest.approx(0.75)
    assert binding.targets(np.array([[0.75, 0.0]]), HALF_OPEN)[0, 1] == pytest.approx(0.03)
    binding = check_policy(
        contract_with(finger={"gripper": {**ends, "action_open": -1.0, "action_closed": 1.0}}), toy_spec()
    )
    assert binding.state(np.array([0.0, 0.03]))[0] == pytest.approx(0.75)
    assert binding.targets(np.array([[-1.0, 0.0]]), HALF_OPEN)[0, 1] == pytest.approx(0.04)
    assert binding.targets(np.array([[1.0, 0.0]]), HALF_OPEN)[0, 1] == pytest.approx(0.0)


def test_deltas_are_added_to_the_position_at_the_observation_except_for_the_gripper() -> None:
    contract = contract_with(
        shoulder={"checkpoint_unit": "deg", "offset": 0.3},
        finger={"action_mode": "absolute"},
        checkpoint={"action_mode": "delta"},
    )
    binding = check_policy(contract, toy_spec())
    targets = binding.targets(np.array([[0.04, 10.0], [0.0, 20.0]]), HALF_OPEN)
    # The same reference for every step of the chunk, and the offset of the zero does not matter for a difference.
    np.testing.assert_allclose(targets, [[0.5 + np.radians(10), 0.04], [0.5 + np.radians(20), 0.0]])
    assert requirements(contract).delta_names == ("shoulder",)


@pytest.mark.parametrize(
    ("contract_mode", "checkpoint_mode", "message"),
    [
        ("absolute", "absolute", None),
        ("absolute", "relative", "'shoulder' of the checkpoint 'toy' is relative.*says absolute; use a checkpoint"),
        ("absolute", "velocity", "is velocity.*says absolute"),
        ("delta", "relative", None),
        ("delta", "absolute", "is absolute.*says delta; set action_mode of the contract to absolute"),
        ("delta", "velocity", "is velocity.*says delta"),
    ],
)
def test_the_meaning_of_an_action_is_compared(contract_mode, checkpoint_mode, message) -> None:
    contract = contract_with(shoulder={"action_mode": contract_mode})
    spec = toy_spec(action_modes=("absolute", checkpoint_mode))
    if message is None:
        check_policy(contract, spec)
    else:
        with pytest.raises(ConfigError, match=message):
            check_policy(contract, spec)


def test_stated_order_is_compared_with_the_checkpoint() -> None:
    check_policy(contract_with(checkpoint={"state_order": ["finger", "shoulder"]}), toy_spec())
    with pytest.raises(ConfigError, match=r"action_order of the contract is \[shoulder, finger\], the checkpoint has"):
        check_policy(contract_with(checkpoint={"action_order": ["shoulder", "finger"]}), toy_spec())


def test_joint_that_the_checkpoint_does_not_see() -> None:
    binding = check_policy(contract_with(finger={"in_state": False}), toy_spec(state_names=("shoulder",)))
    np.testing.assert_array_equal(binding.state(HALF_OPEN), [0.5])
    assert binding.targets(np.zeros((3, 2)), HALF_OPEN).shape == (3, 2)


def test_chunk_rate_may_differ_from_the_control_rate() -> None:
    contract = contract_with(control_rate_hz=100.0, chunk={"rate_hz": 20.0})
    check_policy(contract, toy_spec())
    assert contract.period_s == 0.01 and requirements(contract).control_hz == 20.0
    with pytest.raises(ConfigError, match="trained at 10.0 Hz; set chunk.rate_hz of the contract to 10.0"):
        check_policy(contract, toy_spec(control_hz=10.0))


def test_actions_of_another_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \[8, 3\] are no \[steps, 2\]"):
        check_policy(toy_contract(), toy_spec()).targets(np.zeros((8, 3)), HALF_OPEN)


def test_values_that_are_not_finite_stay_visible_to_the_guard() -> None:
    targets = check_policy(toy_contract(), toy_spec()).targets(np.array([[0.0, np.nan], [np.inf, 0.0]]), HALF_OPEN)
    assert np.isnan(targets[0, 0]) and np.isinf(targets[1, 1])


numbers = st.floats(-10.0, 10.0)
points = st.tuples(numbers, numbers).filter(lambda pair: abs(pair[0] - pair[1]) > 1e-3)


@st.composite
def conversions(draw: st.DrawFn) -> dict:
    """Any conversion that a joint in rad may have."""
    kind = draw(st.sampled_from(["plain", "end_points", "gripper"]))
    if kind == "plain":
        return {
            "sign": draw(st.sampled_from([1, -1])),
            "offset": draw(numbers),
            "checkpoint_unit": draw(st.sampled_from(["rad", "deg"])),
        }
    robot, checkpoint, action = draw(points), draw(points), draw(points)
    if kind == "end_points":
        return {"end_points": {"robot": list(robot), "checkpoint": list(checkpoint)}}
    names = ("robot_open", "robot_closed", "checkpoint_open", "checkpoint_closed", "action_open", "action_closed")
    return {"gripper": dict(zip(names, (*robot, *checkpoint, *action)))}


@given(
    convert=conversions(),
    mode=st.sampled_from(["absolute", "delta"]),
    targets=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5),
    observed=st.tuples(numbers, numbers),
)
def test_targets_and_actions_are_inverse_whatever_the_conversion(convert, mode, targets, observed) -> None:
    contract = contract_with(shoulder={**convert, "action_mode": mode})
    binding = check_policy(contract, toy_spec())
    wanted, start = np.array(targets), np.array(observed)
    actions = binding.actions(wanted, start)
    # The gain is between 2e-4 and 2e4 here, the numbers below 1e6: ten digits of sixteen are left.
    np.testing.assert_allclose(binding.targets(actions, start), wanted, atol=1e-6)


@given(convert=conversions(), position=numbers)
def test_state_is_inverted_by_its_own_conversion(convert, position) -> None:
    contract = contract_with(shoulder=convert)
    binding = check_policy(contract, replace(toy_spec(), state_names=("shoulder", "finger")))
    positions = np.array([position, 0.02])
    np.testing.assert_allclose(binding.state_units.to_robot(binding.state(positions)), positions, atol=1e-6)
