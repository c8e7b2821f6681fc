"""The UR5e with a Robotiq 2F-85 at the tool connector in Gazebo.

World with two cameras, arm, bridge, controllers and policy. NOT RUN: Gazebo was not there.

    ros2 launch omega_qvla_ros ur5e_sim.launch.py checkpoint:=/path/to/pack headless:=false

Needs ros_gz_sim, ros_gz_bridge, gz_ros2_control and ur_description and robotiq_description. docs/robots.md
"""

from __future__ import annotations

from launch import LaunchDescription

from omega_qvla_ros.bringup.gazebo import simulated_robot


def generate_launch_description() -> LaunchDescription:
    return simulated_robot("ur5e")
