"""Seed ranges of the tabletop environment, in one place so that a test can prove them disjoint.

A seed fixes the colours, the start poses and the wording of one episode.
"""

from __future__ import annotations

DEMONSTRATIONS = range(100_000)
"""Behaviour-cloning demonstrations."""
VALIDATION = range(100_000, 110_000)
"""Held-out demonstrations for the validation loss, and rollouts looked at while developing."""
CALIBRATION = range(200_000, 210_000)
"""Rollouts from which calibration observations are taken."""
EVALUATION = range(300_000, 310_000)
"""Synchronous rollouts of the README's tables. Never used to choose anything."""
ROS_EVALUATION = range(400_000, 410_000)
"""Rollouts over ROS topics: demo and README's latency rows."""
EXPERT = range(500_000, 510_000)
"""The scripted expert's own success rate."""

ALL_RANGES = {
    "demonstrations": DEMONSTRATIONS,
    "validation": VALIDATION,
    "calibration": CALIBRATION,
    "evaluation": EVALUATION,
    "ros_evaluation": ROS_EVALUATION,
    "expert": EXPERT,
}
