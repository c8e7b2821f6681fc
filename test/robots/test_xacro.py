"""Our xacro files, expanded by the real xacro around stand-ins for the vendors' files.

The stand-ins are the URDF excerpts of test/data/urdf as packages; what the vendors' own files contain is not tested.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from omega_qvla_ros.bringup.robots import ROBOTS
from omega_qvla_ros.contract import limits_from_urdf, load_contract
from omega_qvla_ros.resources import config_file

xacro = pytest.importorskip("xacro", reason="xacro comes with a ROS installation only")

URDFS = Path(__file__).resolve().parents[1] / "data" / "urdf"
OPEN = '<robot xmlns:xacro="http://www.ros.org/wiki/xacro">'


def excerpt(name: str, joints: tuple[str, ...] | None = None) -> str:
    """The elements of an excerpt, for the joints that are named."""
    elements = ElementTree.fromstring((URDFS / f"{name}.urdf").read_text())
    chosen = [e for e in elements if joints is None or e.get("name", "").removesuffix("_link") in joints]
    return "".join(ElementTree.tostring(element, encoding="unicode") for element in chosen)


def files(name: str) -> dict[str, str]:
    """Stand-ins for what our xacro includes: path in a package -> text."""
    if name == "franka_fr3":
        return {"franka_description/robots/fr3/fr3.urdf.xacro": f'{OPEN}{excerpt(name)}<link name="fr3_hand"/></robot>'}
    if name == "xarm7":
        control = "".join(f'<joint name="{joint}"/>' for joint in joints_of(name))  # its own ros2_control block
        return {
            "xarm_description/urdf/xarm_device.urdf.xacro": f'{OPEN}<xacro:arg name="ros2_control_params" default=""/>'
            f'{excerpt(name)}<link name="link_eef"/><ros2_control name="x" type="system">{control}</ros2_control>'
            "<gazebo><plugin><parameters>$(arg ros2_control_params)</parameters></plugin></gazebo></robot>"
        }
    if name == "so101":
        return {
            "so101_description/urdf/so101_arm.urdf.xacro": f'{OPEN}{excerpt(name)}<link name="gripper_link"/></robot>'
        }
    knuckle = "robotiq_85_left_knuckle_joint"
    arm = excerpt(name, ("base", *(joint for joint in joints_of(name) if joint != knuckle)))
    arguments = (
        "name tf_prefix parent joint_limits_parameters_file kinematics_parameters_file physical_parameters_file "
        "visual_parameters_file safety_limits safety_pos_margin safety_k_position force_abs_paths *origin"
    )
    gripper = '<xacro:macro name="robotiq_gripper" params="name prefix parent *origin include_ros2_control:=true {}">'
    return {
        "ur_description/urdf/ur_macro.xacro": f'{OPEN}<xacro:macro name="ur_robot" params="{arguments}">{arm}'
        '<link name="tool0"/></xacro:macro></robot>',
        "ur_robot_driver/urdf/ur.urdf.xacro": f'{OPEN}<xacro:arg name="use_mock_hardware" default="false"/>{arm}'
        '<link name="tool0"/></robot>',
        "robotiq_description/urdf/robotiq_2f_85_macro.urdf.xacro": OPEN
        + gripper.format("use_fake_hardware:=false com_port:=''")
        + f"{excerpt(name, (knuckle,))}</xacro:macro></robot>",
    }


def joints_of(name: str) -> tuple[str, ...]:
    return tuple(
        joint.get("name", "") for joint in ElementTree.fromstring((URDFS / f"{name}.urdf").read_text()).iter("joint")
    )


@pytest.fixture()
def expand(tmp_path, monkeypatch):
    """Expands a file of config/urdf with stand-ins for one robot's vendor."""

    def run(name: str, file: str, **arguments: str) -> str:
        for path, text in files(name).items():
            package = path.split("/")[0]
            marker = tmp_path / "share/ament_index/resource_index/packages" / package
            target = tmp_path / "share" / path
            for folder in (marker.parent, target.parent):
                folder.mkdir(parents=True, exist_ok=True)
            marker.touch()
            target.write_text(text)
        monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
        return xacro.process_file(str(config_file(f"urdf/{file}")), mappings=arguments).toprettyxml()

    return run


@pytest.mark.parametrize("name", ROBOTS)
def test_the_simulated_arm_has_every_joint_controllers_and_a_camera(name, expand) -> None:
    simulation = ROBOTS[name].simulation
    controllers = str(config_file(f"controllers/{name}_sim.yaml"))
    arguments = {key: value.replace("@controllers", controllers) for key, value in simulation.arguments.items()}
    text = expand(name, simulation.xacro, **arguments)
    joints = load_contract(config_file(f"robots/{simulation.contract}.yaml")).joint_names
    assert set(limits_from_urdf(text, joints)) == set(joints)
    robot = ElementTree.fromstring(text)
    controlled = [joint.get("name") for joint in robot.find("ros2_control").iter("joint")]
    assert sorted(controlled) == sorted(joints)
    assert [element.text for element in robot.iter("parameters")] == [controllers]
    bridged = {entry["gz_topic_name"] for entry in yaml.safe_load(config_file("gz/bridge.yaml").read_text())}
    assert {topic.text for topic in robot.iter("topic")} <= bridged
    links = {link.get("name") for link in robot.findall("link")}
    for joint in robot.findall("joint"):
        assert joint.find("parent").get("link") in links and joint.find("child").get("link") in links


def test_the_real_ur5e_has_its_gripper(expand) -> None:
    joints = load_contract(config_file("robots/ur5e.yaml")).joint_names
    text = expand("ur5e", "ur5e_robotiq.urdf.xacro", use_mock_hardware="true")
    assert set(limits_from_urdf(text, joints)) == set(joints)
