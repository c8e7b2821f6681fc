"""The scripted expert solves every task, and so does its kinematics."""

from __future__ import annotations

import numpy as np
import pytest

from omega_qvla_core.envs.tabletop import COLOURS, HOME, KINDS, POSITION_LIMITS, TabletopEnv, Task
from omega_qvla_core.envs.tabletop.expert import Expert
from omega_qvla_core.envs.tabletop.kinematics import ArmKinematics, rotation_error
from omega_qvla_core.envs.tabletop.privileged import yaw_of
from omega_qvla_core.envs.tabletop.seeds import EXPERT


@pytest.fixture(scope="module")
def env():
    environment = TabletopEnv()
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def expert():
    return Expert()


def _solve(env: TabletopEnv, expert: Expert, seed: int, task: Task):
    env.reset(seed, task)
    while not (status := env.step(expert.action(env.privileged(), task))).done:
        pass
    return status


@pytest.mark.parametrize("kind", KINDS)
def test_expert_succeeds(env, expert, kind):
    for seed in EXPERT[:12]:
        task = Task(kind, COLOURS[seed % 3])
        status = _solve(env, expert, seed, task)
        assert status.success and not status.wrong_colour, f"seed {seed}, {task}: {status}"
        assert status.stage == task.stages[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_expert_succeeds_on_95_of_100_fresh_seeds(env, expert, kind):
    solved = sum(_solve(env, expert, seed, Task(kind, COLOURS[seed % 3])).success for seed in EXPERT[:100])
    assert solved >= 95


@pytest.mark.parametrize("kind", KINDS)
def test_expert_comes_to_rest_after_success(env, expert, kind):
    task = Task(kind, "green")
    assert _solve(env, expert, EXPERT[0], task).success
    for _ in range(25):
        status = env.step(expert.action(env.privileged(), task))
    assert status.success
    assert np.abs(env.joint_velocities()).max() < 0.02
    cube = env.privileged().cube_positions[task.colour_index]
    if kind == "lift":
        assert cube[2] > 0.10
    else:
        assert cube[2] == pytest.approx(0.02, abs=2e-3)


def test_expert_has_no_memory(env, expert):
    task = Task("place", "blue")
    env.reset(EXPERT[1], task)
    states = []
    for _ in range(30):
        states.append(env.privileged())
        env.step(expert.action(states[-1], task))
    forward = [expert.action(state, task) for state in states]
    backward = [expert.action(state, task) for state in reversed(states)]
    np.testing.assert_array_equal(forward, backward[::-1])


def test_expert_tries_again_when_the_cube_is_taken_away(env, expert):
    task = Task("place", "red")
    env.reset(EXPERT[2], task)
    for _ in range(400):
        env.step(expert.action(env.privileged(), task))
        if env.status().stage == "lifted":
            break
    spot = sample_free_spot(env)
    env.move_cube("red", spot)
    for _ in range(80):
        status = env.step(expert.action(env.privileged(), task))
    assert status.success


def sample_free_spot(env: TabletopEnv) -> np.ndarray:
    """A place on the table away from cubes, plate and tool."""
    state = env.privileged()
    taken = np.concatenate([state.cube_positions, state.plate_position[None], state.tool_position[None]])[:, :2]
    grid = [np.array([x, y]) for x in np.linspace(0.28, 0.42, 8) for y in np.linspace(-0.2, 0.2, 9)]
    best = max(grid, key=lambda point: np.linalg.norm(taken - point, axis=1).min())
    return np.array([*best, 0.02])


def test_inverse_kinematics_finds_the_way_back():
    kinematics = ArmKinematics()
    rng = np.random.default_rng(0)
    for _ in range(20):
        joints = HOME[:6] + rng.uniform(-0.3, 0.3, size=6)
        position, rotation = kinematics.forward(joints)
        solution = kinematics.inverse(HOME, position, rotation)
        found, orientation = kinematics.forward(solution)
        np.testing.assert_allclose(found, position, atol=1e-4)
        assert np.abs(rotation_error(orientation, rotation)).max() < 1e-3


def test_inverse_kinematics_stays_in_limits_when_out_of_reach():
    kinematics = ArmKinematics()
    _, rotation = kinematics.forward(HOME)
    solution = kinematics.inverse(HOME, np.array([2.0, 0.0, 0.1]), rotation)
    assert np.isfinite(solution).all()
    assert (solution >= POSITION_LIMITS[:6, 0]).all() and (solution <= POSITION_LIMITS[:6, 1]).all()


def test_yaw_of_a_tipped_cube_is_the_heading_of_a_level_axis():
    cosine, sine = np.cos(0.3), np.sin(0.3)
    upright = np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])
    on_its_side = upright @ np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    for rotation in (upright, on_its_side):
        assert (yaw_of(rotation) - 0.3 + np.pi / 4) % (np.pi / 2) - np.pi / 4 == pytest.approx(0.0, abs=1e-9)
