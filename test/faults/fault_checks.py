"""What the rows of the fault matrix have in common: what a hold looks like, and how long it takes to come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from robot_fixtures import PERIOD_NS
from session_rig import Rig

from omega_qvla_ros.motion import HOLD_REPEATS
from omega_qvla_ros.safety_state import State
from omega_qvla_ros.trajectory import REST_NS, JointTrajectory

IMAGE_TIMEOUT_NS = 250_000_000
JOINT_TIMEOUT_NS = 100_000_000
"""The matrix's numbers, written out again: a contract whose defaults change must fail here."""


def check_hold(messages: Sequence[JointTrajectory], sent_ns: Sequence[int] | None = None) -> None:
    """A decelerating hold: the same message in three control periods, ends at rest, never sent after its own end."""
    assert len(messages) == HOLD_REPEATS == 3
    assert len({message.stamp_ns for message in messages}) == 1
    assert len({message.end_ns for message in messages}) == 1
    for message in messages:
        check_ends_at_rest(message)
    for message, now_ns in zip(messages, sent_ns or ()):
        assert message.stamp_ns == 0 or now_ns <= message.end_ns - REST_NS


def check_ends_at_rest(message: JointTrajectory) -> None:
    """Two equal last points, the last without velocity: the arm has stopped before the message's end."""
    np.testing.assert_array_equal(message.points[-1].velocities, 0.0)
    np.testing.assert_allclose(message.points[-1].positions, message.points[-2].positions)


def run_until(rig: Rig, state: State, limit: int = 400) -> list[tuple[int, JointTrajectory | None]]:
    """Tick until the state is reached; time and message of every tick, the last one is the first in that state."""
    ticks = []
    for _ in range(limit):
        message = rig.tick()
        ticks.append((rig.now, message))
        if rig.state is state:
            return ticks
    raise AssertionError(
        f"no {state.name} in {limit} control periods, but {rig.state.name}: {rig.session.safety.reasons}"
    )


def first_tick_after(time_ns: int, tick_ns: int) -> int:
    """Time of the first control tick strictly after ``time_ns``, for a timer that ticked at ``tick_ns``."""
    return tick_ns + ((time_ns - tick_ns) // PERIOD_NS + 1) * PERIOD_NS


def hold_after(rig: Rig, messages: int = HOLD_REPEATS + 5) -> list[JointTrajectory]:
    """What is sent in the next control periods, with the one that was just sent."""
    present = [rig.sent[-1][1]] if rig.sent and rig.sent[-1][0] == rig.now else []
    return [*present, *(message for message in rig.run(messages) if message is not None)]
