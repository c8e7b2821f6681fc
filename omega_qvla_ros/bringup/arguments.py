"""Launch arguments that several launch files offer, each described once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.actions import DeclareLaunchArgument
from launch.substitutions import PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

SHARE = FindPackageShare("omega_qvla_ros")
BOOLEAN = ("true", "false")


@dataclass(frozen=True)
class Argument:
    """One launch argument.

    Attributes:
        name: As on the command line.
        default: None: it must be given.
        description: One sentence or two.
        choices: All values, where they can be listed.
    """

    name: str
    default: str | PathJoinSubstitution | None
    description: str
    choices: Sequence[str] = ()

    def declare(self) -> DeclareLaunchArgument:
        """The action that declares it."""
        return DeclareLaunchArgument(
            self.name,
            default_value=self.default,
            description=self.description,
            choices=list(self.choices) or None,
        )

    def but(self, **changes: object) -> Argument:
        """The same argument with another default or description."""
        return replace(self, **changes)  # type: ignore[arg-type]


CHECKPOINT = Argument(
    "checkpoint",
    "tabletop_w4a4",
    "Checkpoint folder, quantized pack folder, or the name of a shipped policy.",
)
CONTRACT = Argument(
    "contract",
    "tabletop",
    "Robot contract: a YAML file (joints, limits, cameras, topics), or the name of a shipped robot.",
)
INSTRUCTION = Argument(
    "instruction",
    "",
    "What the arm is told, in words. Empty: the contract's default; without one the arm waits.",
)
DEVICE = Argument("device", "cpu", "Where the policy computes: cpu, cuda or cuda:<n>.")
INFERENCE_THREADS = Argument(
    "inference_threads",
    "0",
    "CPU threads of one inference; 0 leaves it to torch, 1 is best beside other work on few cores.",
)
PARAMS_FILE = Argument(
    "params_file",
    PathJoinSubstitution([SHARE, "config", "policy_node.yaml"]),
    "Parameters of the node that have no argument here (YAML).",
)
NAMESPACE = Argument("namespace", "", "Namespace of every node and its topics.")
ACTIVATE = Argument(
    "activate",
    "false",
    "Move as soon as the policy is configured, instead of waiting for ros2 lifecycle set.",
    BOOLEAN,
)
LOG_LEVEL = Argument("log_level", "info", "Log level of the policy node.", ("debug", "info", "warn", "error"))

POLICY = (CHECKPOINT, CONTRACT, INSTRUCTION, DEVICE, INFERENCE_THREADS, PARAMS_FILE, NAMESPACE, ACTIVATE, LOG_LEVEL)
"""Of the policy node, wherever it runs."""
