"""What the launch files share. Imports ``launch`` and ``launch_ros``, so nothing but launch files imports this."""
