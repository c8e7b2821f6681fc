"""A session with an injected clock, a policy that can do everything wrong, and an arm that follows its command."""

from __future__ import annotations

import threading

import numpy as np
from robot_fixtures import PERIOD_NS, T0, ramp, toy_contract, toy_spec

from omega_qvla_core.policy_types import ActionChunk, Observation
from omega_qvla_ros import jtc
from omega_qvla_ros.contract import RobotContract
from omega_qvla_ros.safety_state import State
from omega_qvla_ros.session import PolicySession, SessionOptions
from omega_qvla_ros.trace import ChunkRecord
from omega_qvla_ros.trajectory import JointTrajectory

DEADLINE_S = 30.0
NAMES = ("shoulder", "finger")


class FakePolicy:
    """Moves the shoulder by ``step`` rad per period from where it was seen, unless told to misbehave."""

    def __init__(self) -> None:
        self.spec = toy_spec()
        self.step = 0.02
        self.fault: object = None
        self.block: threading.Event | None = None
        self.seen: list[tuple[Observation, int]] = []

    def infer(self, observation: Observation, noise: np.ndarray | None = None, seed: int = 0) -> ActionChunk:
        self.seen.append((observation, seed))
        if self.block is not None:
            assert self.block.wait(DEADLINE_S)
        if isinstance(self.fault, Exception):
            raise self.fault
        actions = ramp(observation.state[1], self.step)
        if self.fault is not None:
            actions[2, 0] = self.fault
        return ActionChunk(actions[:, ::-1], 0.05, 0.05)


class Rig:
    """A session, its clock, and sensors that send every 50 ms unless stopped."""

    def __init__(self, contract: RobotContract | None = None, **options: object) -> None:
        self.policy = FakePolicy()
        self.done = threading.Semaphore(0)
        self.records: list[ChunkRecord] = []
        self.session = PolicySession(
            contract or toy_contract(),
            self.policy,
            SessionOptions(**{"execution_horizon_steps": 2, "blend_time_s": 0.1, **options}),
            lambda message, key: np.full((64, 64, 3), 7, np.uint8),
            self.done.release,
            trace=self.records.append,
        )
        self.now = T0
        self.age_ns = 0
        """How old a message is at the last look before it leaves."""
        self.stands_at = [0.0, 0.02]
        self.sensors = {"front", "wrist", "joints"}
        self.sent: list[tuple[int, JointTrajectory]] = []
        self.session.set_instruction("go", self.now)
        self.session.activate()
        self.session.start(self.now)

    def tick(self) -> JointTrajectory | None:
        """One control period later: sensors, then the control timer, then whatever inference it started."""
        self.now += PERIOD_NS
        self.feed()
        message = self.step()
        if message is not None:
            assert jtc.validate(message, self.now, NAMES) is None
            self.sent.append((self.now, message))
        if self.session.worker.busy and self.policy.block is None:
            self.wait()
        return message

    def step(self) -> JointTrajectory | None:
        """One control period as the node has it: what is left of the message after the last look, then a request."""
        message = self.session.step(self.now)
        if message is not None:
            message = self.session.in_time(message, self.now, self.age_ns)
        self.session.request(self.now)
        return message

    def feed(self) -> None:
        for key in ("front", "wrist"):
            if key in self.sensors:
                self.session.buffer.add_image(key, "image", self.now, self.now)
        if "joints" in self.sensors:
            self.session.buffer.add_joints(list(NAMES), self.position(), self.now, self.now)

    def position(self) -> list[float]:
        """The arm follows its command exactly, and stays where it is without one."""
        plan = self.session.motion.plan
        if plan is not None:
            self.stands_at = list(plan.sample(self.now)[0])
        return self.stands_at

    def wait(self) -> None:
        assert self.done.acquire(timeout=DEADLINE_S)

    def run(self, ticks: int) -> list[JointTrajectory | None]:
        return [self.tick() for _ in range(ticks)]

    @property
    def state(self) -> State:
        return self.session.safety.state

    @property
    def speed(self) -> float:
        plan = self.session.motion.plan
        return 0.0 if plan is None else float(np.abs(plan.sample(self.now)[1]).max())

    def close(self) -> None:
        if self.policy.block is not None:
            self.policy.block.set()
        self.session.close()
