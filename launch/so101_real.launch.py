"""The real SO-101 follower arm.

Vendor's driver with ros2_control, controllers, cameras and policy. NOT RUN: no arm was there.

    ros2 launch omega_qvla_ros so101_real.launch.py joint_config_file:=follower.yaml checkpoint:=/path/to/pack \
      cameras:=realsense front_device:=123 wrist_device:=456
    ros2 lifecycle set /policy_node activate

Needs so101_bringup and feetech_ros2_driver. mock_hardware:=true tries everything without the arm. docs/robots.md
"""

from __future__ import annotations

from launch import LaunchDescription

from omega_qvla_ros.bringup.real import real_robot


def generate_launch_description() -> LaunchDescription:
    return real_robot("so101")
