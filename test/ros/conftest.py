"""Environment of the ROS tests. Set on import: Fast DDS reads its profile once, when a process first uses it."""

from __future__ import annotations

from omega_qvla_ros.process_environment import enter_ros_environment, free_domain_id

enter_ros_environment(free_domain_id())
