"""The parameters of every node in a table: name, default, range, description, origin of the number.

The policy node's table is in ``policy_parameters``.

``config/<node>.yaml`` repeats the defaults with the descriptions as comments; a test compares both.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from omega_qvla_core.envs.tabletop.seeds import ROS_EVALUATION

QOS_OVERRIDES = "qos_overrides."
"""Beginning of the names of ROS's own parameters for the quality of service of a topic."""
Value = bool | int | float | str | list[str]


class When(Enum):
    """When a parameter may change."""

    LIVE = "live"
    CONFIGURE = "at configure"
    START = "at start"


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Attributes:
        name: snake_case.
        default: Its type is the parameter's type.
        description: One sentence, with the unit.
        origin: Where the default comes from.
        when: When it may change.
        minimum: Smallest value, for numbers.
        maximum: Largest value, for numbers.
        choices: All values that there are, for words.
    """

    name: str
    default: Value
    description: str
    origin: str = ""
    when: When = When.START
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def problem(self, given: object) -> str | None:
        """Why a value of the right type is none of the choices, None if it is."""
        if not self.choices or given in self.choices:
            return None
        near = difflib.get_close_matches(str(given), self.choices, n=1, cutoff=0.0)
        return f"{self.name} is {given!r}; choose {' or '.join(map(repr, self.choices))} (nearest: {near[0]!r})"

    def descriptor(self) -> ParameterDescriptor:
        """The ROS descriptor; parameters that are fixed at start are read-only."""
        descriptor = ParameterDescriptor(
            description=self.description,
            additional_constraints="; ".join(
                text
                for text in (
                    f"one of {', '.join(self.choices)}" if self.choices else "",
                    f"changes {self.when.value}",
                    self.origin,
                )
                if text
            ),
            read_only=self.when is When.START,
        )
        if self.minimum is not None and self.maximum is not None:
            if isinstance(self.default, int):
                span = IntegerRange(from_value=int(self.minimum), to_value=int(self.maximum), step=1)
                descriptor.integer_range = [span]
            else:
                descriptor.floating_point_range = [
                    FloatingPointRange(from_value=float(self.minimum), to_value=float(self.maximum))
                ]
        return descriptor


MUJOCO_BRIDGE_NODE = (
    ParameterSpec(
        "seed",
        ROS_EVALUATION.start,
        "Seed of the next episode's start poses; read by ~/reset.",
        "first seed of the range that is kept for runs over topics",
        when=When.LIVE,
        minimum=0,
        maximum=2**31 - 1,
    ),
    ParameterSpec("task", "place:blue", "Task of the next episode as kind:colour; read by ~/reset.", when=When.LIVE),
    ParameterSpec(
        "image_size",
        128,
        "Height and width of the camera images in px; the policy resizes them.",
        "twice what the shipped policy sees",
        minimum=128,
        maximum=1024,
    ),
    ParameterSpec(
        "camera_rate_hz",
        20.0,
        "Rate of front and wrist images in simulated time, in Hz.",
        "the control rate, so that an image is never older than one control period",
        minimum=0.5,
        maximum=100.0,
    ),
    ParameterSpec(
        "joint_state_rate_hz",
        100.0,
        "Rate of joint_states in simulated time, in Hz.",
        "a joint_state_broadcaster at the usual 100 Hz update rate",
        minimum=1.0,
        maximum=100.0,
    ),
    ParameterSpec(
        "real_time_factor",
        1.0,
        "Simulated seconds per second; the simulation slows down by itself when the machine cannot follow.",
        minimum=0.01,
        maximum=100.0,
    ),
    ParameterSpec(
        "interpolate_from_desired_state",
        False,
        "The controller's option of the same name.",
        "default of the joint_trajectory_controller",
    ),
    ParameterSpec(
        "episode_limit_s",
        0.0,
        "Simulated time after the first command at which an episode has failed, in s; 0 is the task's own limit.",
        when=When.LIVE,
        minimum=0.0,
        maximum=3600.0,
    ),
    ParameterSpec(
        "auto_reset",
        False,
        "After an episode's end begin the next one with the next seed, one second later.",
        when=When.LIVE,
    ),
    ParameterSpec("overview", False, "Publish overview/image_raw as well, for people."),
    ParameterSpec(
        "overview_width",
        480,
        "Width of the overview image in px.",
        "a multiple of 16, for H.264",
        minimum=64,
        maximum=960,
    ),
    ParameterSpec(
        "overview_height",
        368,
        "Height of the overview image in px.",
        "a multiple of 16, for H.264",
        minimum=64,
        maximum=720,
    ),
    ParameterSpec(
        "overview_rate_hz", 10.0, "Rate of the overview image in simulated time, in Hz.", minimum=0.1, maximum=50.0
    ),
    ParameterSpec("viewer", False, "Open MuJoCo's viewer window; needs a display. Not run on the build machine."),
)

EPISODE_RUNNER_NODE = (
    ParameterSpec("episodes", 9, "Number of episodes.", "each task with each colour once", minimum=1, maximum=100000),
    ParameterSpec(
        "first_seed",
        ROS_EVALUATION.start,
        "Seed of the first episode; the others follow.",
        "the range that is kept for runs over topics",
        minimum=0,
        maximum=2**31 - 1,
    ),
    ParameterSpec("tasks", ["touch", "lift", "place"], "Kinds of task, taken in turn; colours rotate as well."),
    ParameterSpec("bridge", "mujoco_bridge_node", "Name of the bridge node, relative to the namespace."),
    ParameterSpec("policy", "policy_node", "Name of the policy node, relative to the namespace."),
    ParameterSpec(
        "episode_timeout_s",
        120.0,
        "Wall time after which an episode without a result is an error, in s.",
        "the longest task takes 7.5 s of simulated time",
        minimum=1.0,
        maximum=3600.0,
    ),
    ParameterSpec(
        "startup_timeout_s",
        120.0,
        "Wall time to wait for both nodes, in s.",
        "loading a policy on a busy machine",
        minimum=1.0,
        maximum=3600.0,
    ),
)

RECORDER_NODE = (
    ParameterSpec("contract", "tabletop", "Robot contract: a YAML file or a shipped robot's name."),
    ParameterSpec(
        "bag",
        "",
        "Folder of the bag; empty is the robot's name with the time. One that exists gets a number behind its name.",
        when=When.LIVE,
    ),
    ParameterSpec("storage", "mcap", "File format of the bag.", choices=("mcap", "sqlite3")),
    ParameterSpec("policy_node", "policy_node", "Name of the policy node, relative to the namespace."),
    ParameterSpec("record_on_start", True, "Begin at once; false waits for ~/start."),
    ParameterSpec(
        "max_queued_mb",
        256,
        "Messages that may wait for the disk, in MB; what comes beyond is dropped and counted.",
        "4.6 s of two raw cameras with 640x480 px at 30 Hz",
        minimum=1,
        maximum=16384,
    ),
    ParameterSpec(
        "min_free_mb",
        500,
        "Recording ends, with a complete bag, when the disk has less left, in MB.",
        "9 s of the same cameras, and room for the system's own logs",
        minimum=1,
        maximum=1000000,
    ),
)


def declare(node: Node, specs: Sequence[ParameterSpec]) -> list[str]:
    """Declare every parameter of a table; values from files and the command line are checked against the ranges.

    Returns:
        One message per given value that is none of the choices, and per given parameter that the table does not have,
        with the nearest name. ROS ignores such a parameter silently, and the default in its place moves the arm.
    """
    for spec in specs:
        node.declare_parameter(spec.name, spec.default, spec.descriptor())
    messages = [text for spec in specs if (text := spec.problem(node.get_parameter(spec.name).value))]
    for name in sorted(set(getattr(node, "_parameter_overrides", {}))):
        if not node.has_parameter(name) and not name.startswith(QOS_OVERRIDES):
            near = difflib.get_close_matches(name, [spec.name for spec in specs], n=1, cutoff=0.0)
            messages.append(f"unknown parameter {name!r}; did you mean {near[0]!r}?")
    return messages


def unused_qos_overrides(node: Node) -> list[str]:
    """One message per given ``qos_overrides`` that no topic of the node took, with the nearest name that one would.

    To be called when the node's topics are there: rclpy declares these parameters with them.
    """
    given = [name for name in getattr(node, "_parameter_overrides", {}) if name.startswith(QOS_OVERRIDES)]
    taken = [name for name in node.get_parameters_by_prefix("") if name.startswith(QOS_OVERRIDES)]
    messages = []
    # Without simulated time nobody subscribes to the clock; a file for both cases is no mistake.
    for name in sorted(set(given) - set(taken)):
        if not name.startswith(f"{QOS_OVERRIDES}/clock."):
            near = difflib.get_close_matches(name, taken, n=1, cutoff=0.0) or ["none"]
            messages.append(f"parameter {name!r} belongs to no topic; did you mean {near[0]!r}?")
    return messages


def value(node: Node, name: str) -> Value:
    """Present value of a declared parameter."""
    found = node.get_parameter(name).value
    return list(found) if isinstance(found, (list, tuple)) else found


def checker(
    specs: Sequence[ParameterSpec],
    configured: Callable[[], bool],
    checks: dict[str, Callable[[Value], str | None]],
) -> Callable[[list[Parameter]], SetParametersResult]:
    """A callback that refuses changes at the wrong time and values that only the node can judge.

    Args:
        specs: The node's table.
        configured: Whether parameters of ``When.CONFIGURE`` are in use now.
        checks: Name -> function that returns the reason for refusing a value, or None.
    """
    when = {spec.name: spec.when for spec in specs}
    by_name = {spec.name: spec for spec in specs}

    def check(parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            if when.get(parameter.name) is When.CONFIGURE and configured():
                return SetParametersResult(
                    successful=False, reason=f"{parameter.name!r} is read at configure; clean up the node first"
                )
            spec = by_name.get(parameter.name)
            reason = spec.problem(parameter.value) if spec is not None else None
            if reason is None and parameter.name in checks:
                reason = checks[parameter.name](parameter.value)
            if reason is not None:
                return SetParametersResult(successful=False, reason=reason)
        return SetParametersResult(successful=True)

    return check
