"""Quality of service of every topic, in one place for both of its ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy

IMAGE = QoSProfile(reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST, depth=1)
"""Cameras: only the newest image matters, and a best-effort subscriber hears every kind of publisher."""
JOINT_STATE = QoSProfile(reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST, depth=10)
"""Joint states: a burst is taken whole, so that states split over messages are complete."""
COMMAND = QoSProfile(reliability=ReliabilityPolicy.RELIABLE, history=HistoryPolicy.KEEP_LAST, depth=1)
"""Commands as they are sent: every window is self-contained, so an older one is worth nothing."""
COMMAND_RECEIVED = QoSProfile(reliability=ReliabilityPolicy.RELIABLE, history=HistoryPolicy.KEEP_LAST, depth=10)
"""Commands in the simulator: no trajectory is overwritten before it was judged; a stock controller keeps one."""
INSTRUCTION = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
)
RESULT = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    history=HistoryPolicy.KEEP_LAST,
    depth=10,
)
"""Results of episodes: who comes late gets the last ones."""
CLOCK = QoSProfile(reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST, depth=1)
SWITCH = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=10,
)
"""The emergency stop as it happens, from publishers of either durability."""
SWITCH_BEFORE = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
)
"""The emergency stop as it was when the node came, from publishers that keep it. Also ``robot_description``."""
LATCHED = SWITCH_BEFORE
STATUS = SWITCH_BEFORE
"""``~/status``: who comes late gets the present one."""
DEBUG = QoSProfile(reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST, depth=1)
"""Pictures for people: never retransmitted."""

OnIncompatible = Callable[[str, QoSPolicyKind], None]
"""Topic, the policy that does not fit."""


def own(profile: QoSProfile) -> QoSProfile:
    """A profile of one subscription's own: rclpy writes the overrides of a user into the object that it is given."""
    return copy.copy(profile)


def subscription_events(topic: str, on_incompatible: OnIncompatible) -> SubscriptionEventCallbacks:
    """Callbacks that tell of publishers which this subscription cannot hear."""
    return SubscriptionEventCallbacks(incompatible_qos=_handler(topic, on_incompatible))


def publisher_events(topic: str, on_incompatible: OnIncompatible) -> PublisherEventCallbacks:
    """Callbacks that tell of subscribers which cannot hear this publisher."""
    return PublisherEventCallbacks(incompatible_qos=_handler(topic, on_incompatible))


def _handler(topic: str, on_incompatible: OnIncompatible) -> Callable[[Any], None]:
    return lambda event: on_incompatible(topic, QoSPolicyKind(event.last_policy_kind))
