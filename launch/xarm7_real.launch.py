"""The real UFACTORY xArm 7 with the xArm gripper.

Vendor's driver with ros2_control, controllers, cameras and policy. NOT RUN: no arm was there.

    ros2 launch omega_qvla_ros xarm7_real.launch.py robot_ip:=192.168.1.200 checkpoint:=/path/to/pack \
      cameras:=realsense front_device:=123 wrist_device:=456
    ros2 lifecycle set /policy_node activate

Needs xarm_ros2 (branch jazzy). mock_hardware:=true tries everything without the arm. docs/robots.md
"""

from __future__ import annotations

from launch import LaunchDescription

from omega_qvla_ros.bringup.real import real_robot


def generate_launch_description() -> LaunchDescription:
    return real_robot("xarm7")
