"""Ω-QVLA for ROS 2: the policy node, the simulator bridge, and the plain-Python safety logic between them.

rclpy is imported in ``nodes/`` and ``msgs.py`` only; everything else is numpy and testable without a ROS graph.
"""
