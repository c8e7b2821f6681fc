"""Images, proprioception and instructions -> tensors, and actions back to the robot's units."""
