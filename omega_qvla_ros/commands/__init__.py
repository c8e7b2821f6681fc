"""The verbs of ``omega-qvla-ros``; none of them needs ROS."""
