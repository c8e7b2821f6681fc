"""The UFACTORY xArm 7 with the xArm gripper in Gazebo.

World with two cameras, arm, bridge, controllers and policy. NOT RUN: Gazebo was not there.

    ros2 launch omega_qvla_ros xarm7_sim.launch.py checkpoint:=/path/to/pack headless:=false

Needs ros_gz_sim, ros_gz_bridge, gz_ros2_control and xarm_description (branch jazzy). docs/robots.md
"""

from __future__ import annotations

from launch import LaunchDescription

from omega_qvla_ros.bringup.gazebo import simulated_robot


def generate_launch_description() -> LaunchDescription:
    return simulated_robot("xarm7")
