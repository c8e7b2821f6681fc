"""A small robot for the tests of the plain-Python part: two joints, two cameras, round numbers."""

from __future__ import annotations

import copy

import numpy as np

from omega_qvla_core.policy_types import CameraSpec, PolicySpec
from omega_qvla_ros.contract import RobotContract, contract_from_dict

PERIOD_NS = 50_000_000
T0 = 1_000_000_000_000

CONTRACT = {
    "format_version": 1,
    "name": "toy",
    "control_rate_hz": 20.0,
    "cameras": [
        {"key": "front", "topic": "front/image_raw", "timeout_s": 0.25},
        {"key": "wrist", "topic": "wrist/image_raw", "timeout_s": 0.25},
    ],
    "joints": [
        {
            "name": "shoulder",
            "position_min": -1.0,
            "position_max": 1.0,
            "max_velocity": 2.0,
            "max_acceleration": 10.0,
            "max_tracking_error": 0.3,
        },
        {
            "name": "finger",
            "unit": "m",
            "position_min": 0.0,
            "position_max": 0.04,
            "max_velocity": 0.2,
            "max_acceleration": 2.0,
            "max_jump": 0.04,
        },
    ],
}


def contract_dict(**changes: object) -> dict:
    """The toy contract as a dictionary, with changed top-level keys."""
    return {**copy.deepcopy(CONTRACT), **changes}


def toy_contract(**changes: object) -> RobotContract:
    """The toy contract."""
    return contract_from_dict(contract_dict(**changes))


def toy_spec(**changes: object) -> PolicySpec:
    """A checkpoint that fits the toy contract; its vectors have the joints in the other order."""
    values: dict = {
        "name": "toy",
        "family": "pi05",
        "cameras": (CameraSpec("front", 64, 64), CameraSpec("wrist", 64, 64)),
        "state_names": ("finger", "shoulder"),
        "action_names": ("finger", "shoulder"),
        "horizon": 8,
        "control_hz": 20.0,
        "first_action_delay_s": 0.05,
        "num_steps": 4,
        "max_tokens": 16,
    }
    return PolicySpec(**{**values, **changes})


def ramp(start: float, step: float, count: int = 8, finger: float = 0.02) -> np.ndarray:
    """Actions in contract order, ``[count, 2]``: the shoulder moves by ``step`` per period, the finger stands."""
    return np.stack([start + step * np.arange(1, count + 1), np.full(count, finger)], axis=1)
