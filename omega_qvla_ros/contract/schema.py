"""The fields of a robot contract. Every class is one mapping of the YAML file, every attribute one key.

The "Attributes" sections are the reference of ``docs/contract.md``; a test compares both. A number whose origin is not
obvious says where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omega_qvla_ros.contract.joints import JointContract, JointLimits, joint_limits

FORMAT_VERSION = 1


@dataclass(frozen=True)
class CameraContract:
    """One camera stream.

    Attributes:
        key: Name that the checkpoint uses (``front``).
        topic: Relative topic. For ``compressed`` the topic of the compressed image itself (``front/image/compressed``).
        transport: ``raw`` is ``sensor_msgs/Image``, ``compressed`` is ``sensor_msgs/CompressedImage`` (JPEG or PNG).
        encoding: The only encoding that is taken, as in ``sensor_msgs/Image`` (``rgb8``, ``bgr8``, ...). Not given:
            every encoding that the node understands. State it where red and blue have been mixed up before.
        resize: How an image comes to the aspect ratio of the network: ``checkpoint`` leaves it to the checkpoint's own
            processing, ``stretch`` scales both sides, ``pad`` adds black borders, ``crop`` cuts the middle out. Only
            what the training data went through gives the same pictures.
        timeout_s: An image older than this holds the arm. Origin: five frames at 20 Hz.
        frame_id: Optical frame that the headers must name; another one is warned about, as after swapped cables. Not
            given: any.
    """

    key: str
    topic: str
    transport: Literal["raw", "compressed"] = "raw"
    encoding: Literal["rgb8", "bgr8", "rgba8", "bgra8", "mono8"] | None = None
    resize: Literal["checkpoint", "stretch", "pad", "crop"] = "checkpoint"
    timeout_s: float = 0.25
    frame_id: str | None = None


@dataclass(frozen=True)
class JointSourceContract:
    """Joints whose states come on a topic of their own, such as a gripper with a driver of its own.

    Attributes:
        topic: Relative topic of ``sensor_msgs/JointState``.
        joints: Joints that are taken from there and from nowhere else. Other joints in its messages are ignored.
        timeout_s: A position older than this holds the arm; it may be that old in an observation, too. Origin: as
            ``joint_states_timeout_s``.
    """

    topic: str
    joints: tuple[str, ...]
    timeout_s: float = 0.1


@dataclass(frozen=True)
class SensorContract:
    """Joint states and how streams are put together.

    Attributes:
        joint_states_topic: Relative topic of ``sensor_msgs/JointState``. Name the topic of whoever measures, a
            ``joint_state_broadcaster`` or a driver: a ``joint_state_publisher`` stamps what it heard long ago, or made
            up before it heard anything, with the present time, and no timeout sees that.
        joint_sources: Joints that come on topics of their own. Not given: every joint comes on ``joint_states_topic``.
        joint_states_timeout_s: A joint position older than this holds the arm. Origin: MoveIt Servo's incoming command
            timeout.
        sync_tolerance_s: Largest difference between the stamps within one observation. Origin: one camera period at
            20 Hz.
        max_future_stamp_s: A stamp further ahead of the node's clock than this is dropped. Origin: the clocks of one
            host agree far better.
        max_clock_skew_s: A stream whose stamps keep this far from the node's clock has another clock, or a delay that
            no policy was trained with; activation is refused. Origin: twice the timeout of an image.
        resume_after_samples: Fresh samples that a stream must give after it was stale. Origin: a single one may be the
            last one of a dying stream.
    """

    joint_states_topic: str = "joint_states"
    joint_sources: tuple[JointSourceContract, ...] = ()
    joint_states_timeout_s: float = 0.1
    sync_tolerance_s: float = 0.05
    max_future_stamp_s: float = 0.05
    max_clock_skew_s: float = 0.5
    resume_after_samples: int = 3

    @property
    def joint_topics(self) -> tuple[str, ...]:
        """Every topic with joint states, the one of most joints first."""
        return (self.joint_states_topic, *(source.topic for source in self.joint_sources))


@dataclass(frozen=True)
class RobotDescriptionContract:
    """Whether the URDF on a topic gives limits. The contract's own limits may then only be tighter.

    Attributes:
        use: ``ignore`` takes this file's limits alone. ``optional`` waits ``timeout_s`` for a URDF and goes on with
            this file's limits. ``required`` refuses to configure without one.
        topic: Relative topic of ``std_msgs/String`` (transient local), which ``robot_state_publisher`` serves.
        timeout_s: Longest wait for it while configuring.
    """

    use: Literal["ignore", "optional", "required"] = "ignore"
    topic: str = "robot_description"
    timeout_s: float = 5.0


@dataclass(frozen=True)
class CheckpointContract:
    """What the checkpoint's vectors mean to this robot.

    Attributes:
        action_mode: ``absolute``: an action is a position target. ``delta``: it is the difference to the joint's
            position measured at the observation, for every step of the chunk; a joint may say otherwise. Choose
            ``delta`` only where the checkpoint's own processing does not add the position already; it is compared with
            what the checkpoint says.
        state_order: State names in the checkpoint's order, to be compared with the checkpoint. Not given: the
            checkpoint's own order is taken. Entries are matched by name in both cases.
        action_order: Action names in the checkpoint's order, likewise.
    """

    action_mode: Literal["absolute", "delta"] = "absolute"
    state_order: tuple[str, ...] | None = None
    action_order: tuple[str, ...] | None = None


OutputType = Literal[
    "joint_trajectory", "float64_multi_array", "follow_joint_trajectory", "gripper_command", "parallel_gripper_command"
]
TRAJECTORY_OUTPUTS: tuple[OutputType, ...] = ("joint_trajectory", "follow_joint_trajectory")
GRIPPER_OUTPUTS: tuple[OutputType, ...] = ("gripper_command", "parallel_gripper_command")


@dataclass(frozen=True)
class OutputContract:
    """One place where commands go. Every joint belongs to exactly one output.

    Attributes:
        type: ``joint_trajectory``: rolling windows on a topic of a joint_trajectory_controller.
            ``float64_multi_array``: the position of each control period on the topic of a forward position controller,
            in the order of ``joints``. ``follow_joint_trajectory``: windows as goals of the controller's action.
            ``gripper_command``, ``parallel_gripper_command``: goals of a gripper's action, for one joint. Actions need
            the package ``control_msgs``.
        name: Relative topic or action name; remap it in launch to the controller's.
        joints: Names of the joints that go there. Empty: all joints that no other output takes.
        max_effort: Highest effort of a gripper goal, in N or N m as the driver takes it. Not given: the driver's own.
        min_change: A gripper goal is sent when the target has moved by more than this since the last one, in the
            joint's unit. Origin: well above the noise of a policy, well below a cube's width.
    """

    type: OutputType = "joint_trajectory"
    name: str = "joint_trajectory"
    joints: tuple[str, ...] = ()
    max_effort: float | None = None
    min_change: float = 0.002


@dataclass(frozen=True)
class LimitContract:
    """What happens with a plan outside the limits.

    Attributes:
        mode: ``clamp`` limits and counts it; ``scale`` follows the same path more slowly where speed or acceleration
            is too high, and clamps positions; ``reject`` refuses the whole chunk.
        reject_beyond_range: With ``clamp`` and ``scale``, a target further outside than this fraction of the joint's
            range is no inaccuracy but a fault: the chunk is refused. ``null``: everything is clamped.
        max_slowdown: ``scale`` slows a chunk down by at most this factor; one that would still be too fast is no plan
            for this arm and is refused. Origin: at a quarter of its speed a chunk ends long after its successor came.
    """

    mode: Literal["clamp", "scale", "reject"] = "clamp"
    reject_beyond_range: float | None = 0.25
    max_slowdown: float = 4.0


@dataclass(frozen=True)
class ChunkContract:
    """How chunks are used.

    Attributes:
        rate_hz: Rate of a chunk's steps, which is that of the checkpoint's training data. Not given: the control rate.
        execution_horizon_steps: Steps of a chunk after which the next inference starts.
        blend_time_s: Time over which a new chunk replaces the committed one.
        min_remaining_s: A chunk of which less than this lies ahead is late and dropped; half of a short chunk is
            enough. Origin: the arm would begin to brake before the next chunk can be there.
        switch_lead_s: A new chunk, or a hold, replaces the committed motion so long after its message leaves: one that
            the controller receives later makes a step from the one to the other. The time that planning takes is
            measured and comes on top. Origin: covers transport on one host; a robot on a network needs what its
            messages take.
        method: ``blend``: chunks are planned freely and blended. ``rtc``: each is planned to continue the committed one
            (real-time chunking), and what is left of the difference is blended.
    """

    rate_hz: float | None = None
    execution_horizon_steps: int = 4
    blend_time_s: float = 0.1
    min_remaining_s: float = 0.1
    switch_lead_s: float = 0.01
    method: Literal["blend", "rtc"] = "blend"


@dataclass(frozen=True)
class SafetyContract:
    """Times and counts after which the arm is held or latched.

    Attributes:
        inference_timeout_s: An inference that has not returned after this wall time holds the arm; its result is
            dropped. Origin: the longest that an arm may stand without anybody being told.
        retry_delay_s: Hold after a failed inference or a refused chunk before the next attempt. Origin: LeRobot's
            real-time chunking engine.
        max_consecutive_errors: Failed inferences or refused chunks in a row that latch the arm. Origin: LeRobot's 10
            are too many for an arm.
        max_late_chunks: Chunks in a row that come after their own end, or are not planned in time, and latch: the
            policy or the processor is too slow for this robot.
            Origin: LeRobot's engine gives up after as many unusable ones.
        stall_time_s: A joint that stands away from its command for so long is blocked. Origin: a servo's lag ends
            within a tenth of that.
        startup_warn_s: After this time without usable sensor data the state says which topic and what to check.
        start_timeout_s: A start that has not led to motion after this time is given up. Origin: as embodied-agents.
        stop_budget_s: Longest time from a stop, a deactivation or SIGINT to the last message. Origin: as rosetta.
        estop_topic: Topic of ``std_msgs/Bool``; true holds and latches. May be absolute, one switch for all robots.
            Not given: none.
        estop_reset_delay_s: A latch by the e-stop can be reset so long after it was released. Origin: as OpenRAL.
    """

    inference_timeout_s: float = 2.0
    retry_delay_s: float = 0.5
    max_consecutive_errors: int = 3
    max_late_chunks: int = 5
    stall_time_s: float = 2.0
    startup_warn_s: float = 5.0
    start_timeout_s: float = 30.0
    stop_budget_s: float = 5.0
    estop_topic: str | None = None
    estop_reset_delay_s: float = 0.5


@dataclass(frozen=True)
class RobotContract:
    """One robot, as read from ``config/robots/<name>.yaml``.

    Attributes:
        format_version: 1.
        name: Of the robot, for people.
        control_rate_hz: Rate at which the arm is watched, guarded and commanded. A chunk of another rate is resampled
            by the trajectory's cubic.
        cameras: Every camera of the checkpoint, at least one.
        joints: Every commanded joint, in the order of the published trajectory. Matched by name everywhere.
        sensors: See below; may be left out, as all that follow.
        robot_description: See below.
        checkpoint: See below.
        outputs: Where commands go; by default all joints to the topic ``joint_trajectory``.
        limits: See below.
        chunk: See below.
        safety: See below.
        default_instruction: Used when the node's parameter ``instruction`` is empty. Empty here: wait for one.
    """

    format_version: int
    name: str
    control_rate_hz: float
    cameras: tuple[CameraContract, ...]
    joints: tuple[JointContract, ...]
    sensors: SensorContract = field(default_factory=SensorContract)
    robot_description: RobotDescriptionContract = field(default_factory=RobotDescriptionContract)
    checkpoint: CheckpointContract = field(default_factory=CheckpointContract)
    outputs: tuple[OutputContract, ...] = (OutputContract(),)
    limits: LimitContract = field(default_factory=LimitContract)
    chunk: ChunkContract = field(default_factory=ChunkContract)
    safety: SafetyContract = field(default_factory=SafetyContract)
    default_instruction: str = ""

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Joint names in contract order, which is the order of every array in this package."""
        return tuple(joint.name for joint in self.joints)

    @property
    def period_s(self) -> float:
        """One control period."""
        return 1.0 / self.control_rate_hz

    @property
    def chunk_rate_hz(self) -> float:
        """Rate of a chunk's steps."""
        return self.control_rate_hz if self.chunk.rate_hz is None else self.chunk.rate_hz

    def joint_limits(self) -> JointLimits:
        """Limits as arrays.

        Raises:
            ConfigError: A limit is neither in the file nor taken from a URDF (``with_urdf_limits``).
        """
        return joint_limits(self.joints, self.period_s)
