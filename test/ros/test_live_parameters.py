"""Parameters that change while the node is configured: each takes effect at once, or is refused and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

from omega_qvla_ros.nodes.parameters import When, value
from omega_qvla_ros.nodes.policy_node import PolicyNode
from omega_qvla_ros.nodes.policy_parameters import POLICY_NODE
from omega_qvla_ros.process_environment import free_domain_id
from omega_qvla_ros.session import PolicySession


@pytest.fixture(scope="module")
def node(checkpoint: str) -> Iterator[PolicyNode]:
    """Configured and not active, never spun: parameters need no executor."""
    context = Context()
    rclpy.init(context=context, args=[], domain_id=free_domain_id(52))
    made = PolicyNode(
        context=context,
        parameter_overrides=[Parameter("checkpoint", value=checkpoint), Parameter("instruction", value="touch it")],
    )
    assert made.trigger_configure() is TransitionCallbackReturn.SUCCESS
    yield made
    made.trigger_shutdown()
    made.destroy_node()
    rclpy.try_shutdown(context=context)


def session_of(node: PolicyNode) -> PolicySession:
    assert node._session is not None
    return node._session


def change(node: PolicyNode, name: str, new: object) -> str | None:
    """The reason for refusing it, None if it was taken."""
    result = node.set_parameters([Parameter(name, value=new)])[0]
    return None if result.successful else str(result.reason)


# Parameter -> a value, what in the session must follow it, and what that must be.
EFFECTS: dict[str, tuple[object, Callable[[PolicyNode, PolicySession], object], object]] = {
    "control_rate_hz": (40.0, lambda node, session: node._control_timer.timer_period_ns, 25_000_000),
    "instruction": ("lift it", lambda node, session: session.instruction, "lift it"),
    "execution_horizon": (3, lambda node, session: session.scheduler.execution_horizon_steps, 3),
    "chunk_rate_hz": (10.0, lambda node, session: session.scheduler.execution_horizon_steps, 2),
    "blend_time_s": (0.25, lambda node, session: session.scheduler.blend_time_s, 0.25),
    "noise_seed": (11, lambda node, session: session.noise_seed, 11),
    "position_limit_scale": (0.5, lambda node, session: session.guard.limits.position_max[0], 1.0),
    "velocity_limit_scale": (0.25, lambda node, session: session.guard.limits.max_velocity[0], 0.5),
    "acceleration_limit_scale": (0.1, lambda node, session: session.guard.limits.max_acceleration[0], 2.0),
    "inference_timeout_s": (0.7, lambda node, session: session.options.inference_timeout_s, 0.7),
    "retry_delay_s": (0.1, lambda node, session: session.safety._retry_ns, 100_000_000),
    "max_consecutive_errors": (5, lambda node, session: session.safety._max_errors, 5),
    "startup_warn_s": (1.5, lambda node, session: session.options.startup_warn_s, 1.5),
    "start_timeout_s": (4.0, lambda node, session: session.options.start_timeout_s, 4.0),
    "image_timeout_s": (0.2, lambda node, session: session.buffer._streams["front"].timeout_ns, 200_000_000),
    "joint_states_timeout_s": (
        0.05,
        lambda node, session: session.buffer._joint_streams["joint_states"].timeout_ns,
        50_000_000,
    ),
    "second_goal": ("preempt", lambda node, session: value(node, "second_goal"), "preempt"),
    "debug_image": (True, lambda node, session: value(node, "debug_image"), True),
}


def test_every_live_parameter_is_in_this_file() -> None:
    assert set(EFFECTS) == {spec.name for spec in POLICY_NODE if spec.when is When.LIVE}


@pytest.mark.parametrize("name", EFFECTS)
def test_live_parameter_takes_effect_at_once_and_can_be_taken_back(node: PolicyNode, name: str) -> None:
    new, effect, expected = EFFECTS[name]
    before, shown_before = value(node, name), effect(node, session_of(node))
    assert shown_before != expected
    assert change(node, name, new) is None
    assert effect(node, session_of(node)) == pytest.approx(expected)
    assert change(node, name, before) is None
    assert effect(node, session_of(node)) == shown_before


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("position_limit_scale", 1.01),
        ("velocity_limit_scale", 1.5),
        ("velocity_limit_scale", 0.0),
        ("acceleration_limit_scale", -1.0),
        ("acceleration_limit_scale", float("nan")),
        ("control_rate_hz", 10.0),
        ("control_rate_hz", float("inf")),
        ("chunk_rate_hz", 0.5),
        ("second_goal", "prempt"),
        ("inference_timeout_s", "soon"),
    ],
)
def test_value_that_would_loosen_or_break_something_is_refused(node: PolicyNode, name: str, bad: object) -> None:
    limits, before = session_of(node).guard.limits, value(node, name)
    assert change(node, name, bad)
    assert value(node, name) == before and session_of(node).guard.limits is limits


@pytest.mark.parametrize("timeout", ["image_timeout_s", "joint_states_timeout_s"])
def test_timeout_longer_than_the_contracts_has_no_effect(node: PolicyNode, timeout: str) -> None:
    _, effect, _ = EFFECTS[timeout]
    before = effect(node, session_of(node))
    assert change(node, timeout, 30.0) is None
    assert effect(node, session_of(node)) == before
    assert change(node, timeout, 0.0) is None


def test_limits_of_a_set_that_is_refused_stay(node: PolicyNode) -> None:
    """One parameter of the set is wrong, so none of it is taken."""
    limits = session_of(node).guard.limits
    wrong = [Parameter("velocity_limit_scale", value=0.5), Parameter("execution_horizon", value=1000)]
    assert not node.set_parameters_atomically(wrong).successful
    assert value(node, "velocity_limit_scale") == 1.0
    np.testing.assert_array_equal(session_of(node).guard.limits.max_velocity, limits.max_velocity)
