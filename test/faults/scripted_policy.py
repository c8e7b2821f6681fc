"""The policy node with a policy that misbehaves on demand: ``python -m scripted_policy --ros-args ...``.

The checkpoint is a real one; the policy sweeps the arm to and fro. What it does wrong is read from
``behaviour.json`` beside the checkpoint folder at every inference and every load, so that a test changes it while the
node runs. Every inference adds a line to ``inferences.txt``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch

from omega_qvla_core.policy_types import ActionChunk, Observation, PolicySpec
from omega_qvla_ros.nodes import loading, policy_node

FAR_RAD = 0.3
"""How far away the pose is that mode ``far`` asks for at once; the arm's ``max_jump`` is 0.4 rad."""
STEP_RAD = 0.01
"""Per control period of 50 ms: 0.2 rad/s, a tenth of the arm's limit."""
TURN_RAD = 0.4
FILES = ("behaviour.json", "inferences.txt", "hanging")
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free."
)


class Script:
    """The files beside a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.behaviour_file, self.log_file, self._hanging_file = (folder.parent / name for name in FILES)

    def read(self) -> dict:
        try:
            return json.loads(self.behaviour_file.read_text())
        except FileNotFoundError:
            return {}

    def write(self, **behaviour: object) -> None:
        """Replaced in one step: the node may read at any moment."""
        new = self.behaviour_file.with_suffix(".new")
        new.write_text(json.dumps(behaviour))
        new.replace(self.behaviour_file)

    @property
    def inferences(self) -> int:
        try:
            return len(self.log_file.read_text().splitlines())
        except FileNotFoundError:
            return 0

    @property
    def hanging(self) -> bool:
        """An inference hangs now."""
        return self._hanging_file.exists()

    def hang(self) -> None:
        """Do not return before the behaviour is another one."""
        self._hanging_file.touch()
        while self.read().get("mode") == "hang":
            time.sleep(0.01)
        self._hanging_file.unlink(missing_ok=True)

    def note(self, instruction: str) -> None:
        with self.log_file.open("a") as log:
            log.write(instruction + "\n")


class ScriptedPolicy:
    """Sweeps six joints between -``TURN_RAD`` and ``TURN_RAD`` from wherever they are."""

    def __init__(self, spec: PolicySpec, script: Script) -> None:
        self.spec = spec
        self._script = script
        self._direction = 1.0

    def warm_up(self) -> float:
        started_s = time.monotonic()
        time.sleep(float(self._script.read().get("warm_up_s", 0.0)))
        return time.monotonic() - started_s

    def infer(self, observation: Observation, *args: object, **kwargs: object) -> ActionChunk:
        self._script.note(observation.instruction)
        behaviour = self._script.read()
        mode = behaviour.get("mode", "ok")
        if mode == "slow":
            time.sleep(float(behaviour["seconds"]))
        if mode == "hang":
            self._script.hang()
        if mode == "raise":
            raise ValueError("the script says so")
        actions = self._actions(observation.state, mode, float(behaviour.get("gripper", 0.02)))
        return ActionChunk(actions, 1.0 / self.spec.control_hz, 0.05)

    def _actions(self, state: np.ndarray, mode: str, gripper: float) -> np.ndarray:
        if abs(state[0]) > TURN_RAD:
            self._direction = -float(np.sign(state[0]))
        steps = np.arange(1, self.spec.horizon + 1)[:, None]
        actions = state[None, :] + steps * STEP_RAD * self._direction
        actions[:, -1] = gripper
        if mode == "far":
            actions[:, 0] = state[0] - np.copysign(FAR_RAD, state[0])
        if mode in ("nan", "inf"):
            actions[3, 1] = float(mode)
        if mode == "jump":
            actions[4:, 0] += 1.5 * self._direction
        return actions


def load(folder: Path, options: loading.PolicyOptions) -> ScriptedPolicy:
    """Read the checkpoint as the node does; its spec is real."""
    script = Script(folder)
    if script.read().get("load") == "oom":
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)
    return ScriptedPolicy(loading.load_policy(folder, options).spec, script)


if __name__ == "__main__":
    policy_node.main(policy_loader=load)
