"""A chain of a URDF against positions that can be computed by hand, and descriptions that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.kinematics import chain_from_urdf

URDF = """<robot name="toy">
  <link name="base"/><link name="upper"/><link name="lower"/><link name="slide"/><link name="tool"/>
  <joint name="shoulder" type="revolute">
    <origin xyz="0 0 0.5"/><parent link="base"/><child link="upper"/><axis xyz="0 0 1"/>
  </joint>
  <joint name="elbow" type="continuous">
    <origin xyz="1 0 0" rpy="1.5707963267948966 0 0"/><parent link="upper"/><child link="lower"/><axis xyz="0 0 2"/>
  </joint>
  <joint name="lift" type="prismatic">
    <origin xyz="1 0 0"/><parent link="lower"/><child link="slide"/><axis xyz="0 1 0"/>
  </joint>
  <joint name="mount" type="fixed"><origin xyz="0 0 0.1"/><parent link="slide"/><child link="tool"/></joint>
  <link name="finger"/>
  <joint name="follower" type="prismatic">
    <parent link="base"/><child link="finger"/><axis xyz="1 0 0"/><mimic joint="lift" multiplier="-2" offset="0.1"/>
  </joint>
</robot>"""
NAMES = ("shoulder", "elbow", "lift")


def test_default_tip_is_behind_the_last_joint_of_the_contract() -> None:
    chain = chain_from_urdf(URDF, NAMES)
    assert (chain.root, chain.tip) == ("base", "slide")
    assert [joint.name for joint in chain.joints] == ["shoulder", "elbow", "lift"]


@pytest.mark.parametrize(
    ("positions", "place"),
    [
        ({}, [2.0, 0.0, 0.5]),
        ({"shoulder": np.pi / 2}, [0.0, 2.0, 0.5]),
        ({"elbow": np.pi / 2}, [1.0, 0.0, 1.5]),  # roll of 90 degrees turns the elbow's axis to -y: it lifts
        ({"lift": 0.25}, [2.0, 0.0, 0.75]),
        ({"shoulder": np.pi / 2, "elbow": np.pi / 2, "lift": 0.25}, [0.0, 0.75, 1.5]),
    ],
)
def test_tip_position(positions: dict[str, float], place: list[float]) -> None:
    np.testing.assert_allclose(chain_from_urdf(URDF, NAMES).tip_position(positions), place, atol=1e-12)


def test_fixed_joints_and_mimics_count() -> None:
    # The tool is 0.1 m along the slide's z, which the elbow's roll has turned to -y.
    tool = chain_from_urdf(URDF, NAMES, "tool").tip_position({})
    np.testing.assert_allclose(tool, [2.0, -0.1, 0.5], atol=1e-12)
    finger = chain_from_urdf(URDF, NAMES, "finger").tip_position({"lift": 0.05})
    np.testing.assert_allclose(finger, [0.0, 0.0, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "tip", "words"),
    [
        (lambda xml: xml, "hand", "no link 'hand'"),
        (lambda xml: xml.replace('name="', 'name="other_'), "", "none of the joints shoulder"),
        (lambda xml: xml.replace('type="continuous"', 'type="floating"'), "", "of type 'floating'"),
        (lambda xml: xml.replace('xyz="0 0 2"', 'xyz="0 0 0"'), "", "axis of length 0"),
        (lambda xml: xml.replace('xyz="1 0 0"/><parent', 'xyz="1 nan 0"/><parent'), "", "three numbers"),
        (lambda xml: xml.replace('<parent link="base"/><child link="upper"/>', '<parent link="slide"/>'
                                 '<child link="upper"/>'), "", "form a circle"),
        (lambda xml: '<!DOCTYPE a [<!ENTITY b "c">]>' + xml, "", "document type"),
    ],
)  # fmt: skip
def test_description_that_cannot_be_used_is_named(change, tip: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        chain_from_urdf(change(URDF), NAMES, tip)
