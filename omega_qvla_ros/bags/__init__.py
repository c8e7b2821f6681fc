"""Recorded bags (MCAP and sqlite3) without ROS: writing, reading, mending, and what a policy would have seen in them.

The file formats are those of ``ros2 bag``; the library ``rosbags`` reads and writes them.
"""
