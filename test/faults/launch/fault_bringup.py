"""launch_testing description: the scripted policy node, a fake robot in this process, and the row in $FAULT_ROW.

Run by test_faults_with_launch.py in a process of its own, because launch writes into the environment of its process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import unittest
from collections.abc import Callable

import launch_testing
import launch_testing.actions
import launch_testing.asserts
import numpy as np
from fake_robot import FakeRobot
from launch import LaunchDescription
from launch.actions import ExecuteProcess
from stage import check_hold_message

ROW = os.environ["FAULT_ROW"]
CHECKPOINT = os.environ["FAULT_CHECKPOINT"]
CONTRACT = os.environ["FAULT_CONTRACT"]
PATIENCE_S = 90.0


def generate_test_description() -> tuple[LaunchDescription, dict[str, object]]:
    parameters = {
        "checkpoint": CHECKPOINT,
        "contract": CONTRACT,
        "auto_activate": "true",
        "inference_threads": "1",
        "instruction": "touch the red cube",
    }
    arguments = [item for name, value in parameters.items() for item in ("-p", f"{name}:={value}")]
    policy = ExecuteProcess(
        cmd=[sys.executable, "-m", "scripted_policy", "--ros-args", *arguments],
        sigterm_timeout=str(PATIENCE_S),  # a busy machine is slow to end a process that has torch in it
    )
    # A launch without processes ends, and its tests with it: row 45 goes on when the node is dead.
    companion = ExecuteProcess(cmd=[sys.executable, "-c", "import signal; signal.pause()"])
    return LaunchDescription([policy, companion, launch_testing.actions.ReadyToTest()]), {"policy": policy}


ROBOT = FakeRobot(int(os.environ["ROS_DOMAIN_ID"]))


def wait(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"waited for: {what}; {ROBOT.state}: {ROBOT.reasons}")
        time.sleep(0.05)


def wait_moving() -> None:
    start = ROBOT.arm
    wait(lambda: np.abs(ROBOT.arm - start).max() > 0.01, "the arm moves")


class WhileItRuns(unittest.TestCase):
    def test_row(self, policy: ExecuteProcess) -> None:
        wait_moving()
        if ROW == "02":
            self.camera_stops()
        if ROW == "45":
            self.killed(policy)

    def camera_stops(self) -> None:
        at_s = time.monotonic()
        ROBOT.wrist.silent = True
        wait(
            lambda: ROBOT.first(lambda s: s.state == "HOLD" and "'wrist/image_raw' is stale" in s.reasons, at_s), "HOLD"
        )
        wait(lambda: ROBOT.speed == 0.0, "rest")
        ROBOT.mend()
        wait_moving()
        self.assertEqual(ROBOT.refused, [])

    def killed(self, policy: ExecuteProcess) -> None:
        os.kill(policy.process_details["pid"], signal.SIGKILL)
        wait(lambda: ROBOT.speed == 0.0, "rest")
        last = ROBOT.commands[-1].trajectory
        np.testing.assert_array_equal(last.points[-1].velocities, 0.0)
        np.testing.assert_allclose(ROBOT.arm, last.points[-1].positions[:6], atol=1e-6)
        self.assertEqual(ROBOT.refused, [])


@launch_testing.post_shutdown_test()
class AfterTheEnd(unittest.TestCase):
    """launch ends the node with SIGINT."""

    @classmethod
    def tearDownClass(cls) -> None:
        ROBOT.close()

    def test_row(self, proc_info, policy: ExecuteProcess) -> None:
        if ROW == "45":
            launch_testing.asserts.assertExitCodes(proc_info, [-signal.SIGKILL], process=policy)
        else:
            launch_testing.asserts.assertExitCodes(proc_info, [0], process=policy)
            wait(lambda: ROBOT.speed == 0.0, "rest")
            check_hold_message(ROBOT.commands[-1].trajectory)
            self.assertEqual(ROBOT.refused, [])
