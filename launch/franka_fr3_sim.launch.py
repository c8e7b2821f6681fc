"""The Franka Research 3 with the Franka Hand in Gazebo.

World with two cameras, arm, bridge, controllers and policy. NOT RUN: Gazebo was not there.

    ros2 launch omega_qvla_ros franka_fr3_sim.launch.py checkpoint:=/path/to/pack headless:=false

Needs ros_gz_sim, ros_gz_bridge, gz_ros2_control and franka_description. docs/robots.md
"""

from __future__ import annotations

from launch import LaunchDescription

from omega_qvla_ros.bringup.gazebo import simulated_robot


def generate_launch_description() -> LaunchDescription:
    return simulated_robot("franka_fr3")
