"""Limits of a URDF: read as data from a stranger, and never loosened by a contract."""

from __future__ import annotations

import numpy as np
import pytest
from robot_fixtures import contract_dict

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.contract import RobotContract, UrdfLimits, contract_from_dict, limits_from_urdf, with_urdf_limits

URDF = """<?xml version="1.0"?>
<robot name="toy">
  <link name="base"/><link name="arm"/><link name="tip"/>
  <joint name="shoulder" type="revolute">
    <parent link="base"/><child link="arm"/>
    <limit lower="-1.0" upper="1.0" velocity="2.0" effort="10"/>
  </joint>
  <joint name="finger" type="prismatic">
    <parent link="arm"/><child link="tip"/>
    <limit upper="0.04" velocity="0.2" effort="10"/>
  </joint>
  <joint name="wrist" type="continuous"><limit velocity="3.0" effort="1"/></joint>
  <joint name="mount" type="fixed"/>
</robot>
"""
SOFT = URDF.replace(
    'velocity="2.0" effort="10"/>\n',
    'velocity="2.0" effort="10"/><safety_controller soft_lower_limit="-0.9" soft_upper_limit="2.0" k_velocity="1"/>\n',
)


def contract(shoulder: dict | None = None, drop: tuple[str, ...] = ()) -> RobotContract:
    data = contract_dict()
    data["joints"][0].update(shoulder or {})
    for joint in data["joints"]:
        for key in drop:
            del joint[key]
    return contract_from_dict(data)


def test_limits_are_read_by_name() -> None:
    limits = limits_from_urdf(URDF, ["finger", "wrist", "shoulder"])
    assert list(limits) == ["finger", "wrist", "shoulder"]
    assert limits["shoulder"] == UrdfLimits("shoulder", "rad", -1.0, 1.0, 2.0)
    assert limits["finger"] == UrdfLimits("finger", "m", 0.0, 0.04, 0.2)  # lower left out: 0, by the format
    assert limits["wrist"] == UrdfLimits("wrist", "rad", None, None, 3.0)


def test_soft_limits_count_where_they_are_tighter() -> None:
    shoulder = limits_from_urdf(SOFT, ["shoulder"])["shoulder"]
    assert (shoulder.position_min, shoulder.position_max) == (-0.9, 1.0)


@pytest.mark.parametrize(
    ("xml", "joint", "message"),
    [
        (URDF, "sholder", "no joint 'sholder'; did you mean 'shoulder'"),
        (URDF, "mount", "'mount' of the URDF is of type 'fixed'; the contract may name joints that move only"),
        (URDF.replace('"-1.0"', '"low"'), "shoulder", "lower='low'; it must be a number"),
        (URDF.replace('"-1.0"', '"nan"'), "shoulder", "lower='nan'; it must be finite"),
        (URDF.replace('"-1.0"', '"1.0"'), "shoulder", "limits 1.0 to 1.0; lower must be below upper"),
        ("<robot", "shoulder", "not valid XML"),
        ("", "shoulder", "not valid XML"),
        ("<sdf/>", "shoulder", "a <sdf>, not a URDF's <robot>"),
    ],
    ids=["misspelt", "fixed", "no number", "nan", "empty range", "cut off", "empty", "sdf"],
)
def test_wrong_descriptions_are_refused(xml: str, joint: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        limits_from_urdf(xml, [joint])


@pytest.mark.parametrize(
    "doctype",
    [
        '<!DOCTYPE robot [<!ENTITY secret SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE robot SYSTEM "http://localhost/robot.dtd">',
        '<!DOCTYPE r [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>',
    ],
    ids=["external entity", "external dtd", "billion laughs"],
)
def test_no_entity_is_ever_expanded(doctype: str) -> None:
    with pytest.raises(ConfigError, match="declares a document type or entities"):
        limits_from_urdf(URDF.replace("<robot", f"{doctype}<robot"), ["shoulder"])


def test_size_is_bounded() -> None:
    with pytest.raises(ConfigError, match="is it a URDF"):
        limits_from_urdf(URDF + " " * (16 * 1024 * 1024), ["shoulder"])


def test_contract_may_be_tighter_and_leave_out_what_the_urdf_has() -> None:
    limits = limits_from_urdf(URDF, ["shoulder", "finger"])
    tight = with_urdf_limits(contract({"position_max": 0.5, "max_velocity": 1.0}), limits).joint_limits()
    np.testing.assert_array_equal(tight.position_max, [0.5, 0.04])
    np.testing.assert_array_equal(tight.max_velocity, [1.0, 0.2])
    silent = contract(drop=("position_min", "position_max", "max_velocity"))
    with pytest.raises(ConfigError, match="'shoulder' has no max_velocity"):
        silent.joint_limits()
    filled = with_urdf_limits(silent, limits).joint_limits()
    np.testing.assert_array_equal(filled.position_min, [-1.0, 0.0])
    np.testing.assert_array_equal(filled.position_max, [1.0, 0.04])
    np.testing.assert_array_equal(filled.max_velocity, [2.0, 0.2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"position_min": -1.01},
            "position_min of joint 'shoulder' is -1.01, looser than the URDF's -1.0; set it to -1.0",
        ),
        ({"position_max": 1.01}, "position_max .* looser"),
        ({"max_velocity": 2.1}, "max_velocity .* looser"),
        ({"unit": "m"}, "is in m, the URDF's is in rad; set its unit to rad"),
    ],
)
def test_contract_may_not_be_looser(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_urdf_limits(contract(change), limits_from_urdf(URDF, ["shoulder", "finger"]))


def test_rounding_is_no_loosening_but_is_not_kept_either() -> None:
    merged = with_urdf_limits(contract({"position_max": 1.0000001}), limits_from_urdf(URDF, ["shoulder", "finger"]))
    assert merged.joints[0].position_max == 1.0


def test_limit_that_nobody_gives() -> None:
    limits = limits_from_urdf(URDF.replace('name="shoulder" type="revolute"', 'name="shoulder" type="continuous"'),
                              ["shoulder", "finger"])  # fmt: skip
    with pytest.raises(ConfigError, match="neither the contract 'toy' nor the URDF has position_min of 'shoulder'"):
        with_urdf_limits(contract(drop=("position_min", "position_max")), limits)
