"""The tabletop environment: determinism, limits, pictures, success and wrong-colour checks."""

from __future__ import annotations

import numpy as np
import pytest

from omega_qvla_core.envs import rendering
from omega_qvla_core.envs.tabletop import (
    CAMERAS,
    COLOURS,
    COMMAND_PERIOD_S,
    CONTROL_PERIOD_S,
    HOME,
    JOINT_NAMES,
    POSITION_LIMITS,
    TIMESTEP_S,
    VELOCITY_LIMITS,
    TabletopEnv,
    Task,
)
from omega_qvla_core.envs.tabletop.scene import load_model, sample_start
from omega_qvla_core.errors import ConfigError


@pytest.fixture(scope="module")
def env():
    environment = TabletopEnv()
    yield environment
    environment.close()


def _random_actions(count: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.uniform(POSITION_LIMITS[:, 0], POSITION_LIMITS[:, 1], size=(count, 7)) * 0.3 + HOME * 0.7


def test_constants_agree_with_the_scene():
    model = load_model()
    assert model.opt.timestep == TIMESTEP_S
    for name, limits in zip(JOINT_NAMES, POSITION_LIMITS, strict=True):
        np.testing.assert_allclose(model.joint(name).range, limits)
        np.testing.assert_allclose(model.actuator(name).ctrlrange, limits)
    assert model.vis.quality.offsamples == 0
    assert not model.light_castshadow.any()
    assert (HOME >= POSITION_LIMITS[:, 0]).all() and (HOME <= POSITION_LIMITS[:, 1]).all()


def test_episode_is_deterministic(env):
    def run():
        env.reset(11, Task("lift", "red"))
        statuses = [env.step(action) for action in _random_actions(10)]
        return env.joint_positions(), env.privileged().cube_positions, env.render("front"), statuses

    first, second = run(), run()
    for one, other in zip(first[:3], second[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    assert first[3] == second[3]


def test_scene_follows_the_seed_not_the_task(env):
    env.reset(5, Task("touch", "red"))
    cubes = env.privileged().cube_positions
    env.reset(5, Task("place", "blue"))
    np.testing.assert_array_equal(env.privileged().cube_positions, cubes)
    env.reset(6, Task("place", "blue"))
    assert np.abs(env.privileged().cube_positions - cubes).max() > 0.01


def test_start_states_are_apart_and_in_reach():
    for seed in range(200):
        start = sample_start(np.random.default_rng(seed))
        points = np.concatenate([start.cube_xy, start.plate_xy[None]])
        radii = np.linalg.norm(points, axis=1)
        assert radii.min() >= 0.27 and radii.max() <= 0.48
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)
        assert gaps[:3, :3][np.triu_indices(3, k=1)].min() >= 0.08
        assert gaps[3, :3].min() >= 0.105


def test_resting_arm_stays_where_it_is(env):
    env.reset(0, Task("touch", "red"))
    before, cubes = env.joint_positions(), env.privileged().cube_positions
    for _ in range(20):
        env.step(before)
    np.testing.assert_allclose(env.joint_positions(), before, atol=2e-3)
    np.testing.assert_allclose(env.privileged().cube_positions, cubes, atol=1e-3)
    assert env.time_s == pytest.approx(1.0)


def test_step_limits_speed_and_position(env):
    env.reset(1, Task("lift", "red"))
    for action in (np.full(7, 50.0), np.full(7, -50.0)):
        for _ in range(12):
            before = env.command()
            commands = env.begin_period(action)
            env.step(action)
            reach = VELOCITY_LIMITS * CONTROL_PERIOD_S
            assert (np.abs(env.command() - before) <= reach + 1e-12).all()
            np.testing.assert_allclose(commands[-1], env.command())
            assert (env.command() >= POSITION_LIMITS[:, 0]).all() and (env.command() <= POSITION_LIMITS[:, 1]).all()


def test_command_is_reached_at_the_end_of_its_period_up_to_the_servo_lag(env):
    env.reset(1, Task("lift", "red"))
    target = env.joint_positions()
    target[0] += 0.05
    env.step(target)
    assert env.command() == pytest.approx(target)
    for _ in range(5):
        env.step(target)
    np.testing.assert_allclose(env.joint_positions(), target, atol=2e-3)


def test_finer_interface_gives_the_same_motion(env):
    actions = _random_actions(6)
    env.reset(2, Task("lift", "red"))
    for action in actions:
        env.step(action)
    by_step = env.joint_positions()
    env.reset(2, Task("lift", "red"))
    for action in actions:
        for command in env.begin_period(action):
            env.set_command(command)
            env.advance(COMMAND_PERIOD_S)
    np.testing.assert_array_equal(env.joint_positions(), by_step)


def test_second_finger_mirrors_the_first(env):
    env.reset(0, Task("lift", "red"))
    target = env.joint_positions()
    target[6] = 0.0
    for _ in range(15):
        env.step(target)
    qpos = env._data.qpos
    assert env.joint_positions()[6] == pytest.approx(0.0, abs=1e-3)
    assert qpos[env._addresses.mirror_qpos] == pytest.approx(env.joint_positions()[6], abs=1e-3)


@pytest.mark.parametrize("bad", [np.zeros(6), np.full(7, np.nan), np.array([0, 0, 0, 0, 0, 0, np.inf])])
def test_bad_actions_move_nothing(env, bad):
    env.reset(0, Task("touch", "red"))
    before, time_s = env.command(), env.time_s
    with pytest.raises(ConfigError):
        env.step(bad)
    with pytest.raises(ConfigError):
        env.set_command(bad)
    np.testing.assert_array_equal(env.command(), before)
    assert env.time_s == time_s


def test_bad_arguments_are_named(env):
    with pytest.raises(ConfigError, match="0.007"):
        env.advance(0.007)
    with pytest.raises(ConfigError, match="side"):
        env.render("side")
    with pytest.raises(ConfigError, match="4000"):
        env.render("front", 4000, 4000)
    with pytest.raises(ConfigError, match="-1"):
        env.reset(-1, Task("touch", "red"))


def _count(image: np.ndarray, colour: str) -> int:
    channel = COLOURS.index(colour)
    values = image.astype(int)
    others = [values[..., other] for other in range(3) if other != channel]
    return int((values[..., channel] > 1.6 * np.maximum(*others)).sum())


def test_pictures_show_all_cubes_where_the_labels_say(env):
    for seed in range(4):
        env.reset(seed, Task("touch", "red"))
        image = env.render("front")
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8
        state = env.privileged()
        uv, inside = state.cameras["front"].project(state.cube_positions)
        assert inside.all()
        for index, colour in enumerate(COLOURS):
            assert _count(image, colour) >= 20
            column, row = (uv[index] * 128).astype(int)
            patch = image[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            assert _count(patch, colour) >= 5, f"seed {seed}, {colour}"


def test_wrist_camera_sees_a_cube_under_the_fingers(env):
    env.reset(0, Task("touch", "red"))
    env.move_cube("green", np.array([*env.privileged().tool_position[:2], 0.02]))
    assert _count(env.render("wrist", 64, 64), "green") > 20
    assert env.line_of_sight("wrist")[COLOURS.index("green")]


def test_line_of_sight_is_blocked_by_a_cube_in_front(env):
    env.reset(0, Task("touch", "red"))
    camera = env.privileged().cameras["front"]
    red = env.privileged().cube_positions[0]
    towards = (camera.position - red) / np.linalg.norm(camera.position - red)
    assert env.line_of_sight("front")[0]
    env.move_cube("blue", red + 0.06 * towards)
    assert not env.line_of_sight("front")[0]


def test_overview_is_for_humans_and_any_size(env):
    assert env.render("overview", 120, 160).shape == (120, 160, 3)
    assert "overview" not in CAMERAS


def _hold(env: TabletopEnv, periods: int):
    for _ in range(periods):
        status = env.step(env.command())
    return status


def _hold_cube(env: TabletopEnv, colour: str, position: np.ndarray, periods: int):
    """Keeps a cube in the air by putting it back before each period."""
    for _ in range(periods):
        env.move_cube(colour, position)
        status = env.step(env.command())
    return status


def test_place_succeeds_after_three_periods_on_the_plate(env):
    task = Task("place", "green")
    env.reset(3, task)
    plate = env.privileged().plate_position
    env.move_cube("green", plate + [0.01, 0.01, 0.02])
    assert not _hold(env, 2).success
    status = _hold(env, 1)
    assert status.success and status.stage == "placed" and not status.wrong_colour and status.done


def test_place_needs_an_open_gripper_and_the_right_place(env):
    env.reset(3, Task("place", "green"))
    plate = env.privileged().plate_position
    closed = env.joint_positions()
    closed[6] = 0.0
    for _ in range(8):
        env.step(closed)
    env.move_cube("green", plate + [0.0, 0.0, 0.02])
    assert not _hold(env, 5).success
    env.reset(3, Task("place", "green"))
    env.move_cube("green", plate + [0.045, 0.0, 0.02])
    assert not _hold(env, 5).success


def test_wrong_cube_on_the_plate_is_a_wrong_colour_and_never_a_success(env):
    env.reset(3, Task("place", "green"))
    plate = env.privileged().plate_position
    env.move_cube("red", plate + [0.0, 0.0, 0.02])
    assert _hold(env, 1).wrong_colour
    env.move_cube("red", np.array([0.3, 0.3, 0.02]))
    env.move_cube("green", plate + [0.0, 0.0, 0.02])
    status = _hold(env, 5)
    assert status.wrong_colour and not status.success


def test_lift_needs_height_and_time(env):
    env.reset(4, Task("lift", "blue"))
    spot = np.array([0.45, 0.25, 0.0])
    status = _hold_cube(env, "blue", spot + [0, 0, 0.08], 4)
    assert not status.success and status.stage == "lifted"
    env.reset(4, Task("lift", "blue"))
    # A free cube falls 1.2 cm in one period.
    status = _hold_cube(env, "blue", spot + [0, 0, 0.13], 2)
    assert not status.success
    status = _hold_cube(env, "blue", spot + [0, 0, 0.13], 1)
    assert status.success and status.stage == "lifted"


def test_lifting_another_cube_is_a_wrong_colour(env):
    env.reset(4, Task("lift", "blue"))
    status = _hold_cube(env, "red", np.array([0.45, 0.25, 0.15]), 4)
    assert status.wrong_colour and not status.success


def _put_under_finger(env: TabletopEnv, colour: str) -> None:
    """A cube just inside the left fingertip, so that the next physics step finds contact."""
    tip = env.privileged().tool_position + env.privileged().tool_rotation @ [0.0, env.joint_positions()[6], 0.0]
    env.move_cube(colour, tip + [0.0, 0.0, -0.012 - 0.0195])


def test_touch_succeeds_at_once_with_the_named_cube(env):
    env.reset(0, Task("touch", "red"))
    _put_under_finger(env, "red")
    status = _hold(env, 1)
    assert status.success and status.stage == "touched"


def test_touching_another_cube_first_fails_for_good(env):
    env.reset(0, Task("touch", "red"))
    _put_under_finger(env, "blue")
    status = _hold(env, 1)
    assert status.wrong_colour and not status.success
    env.move_cube("blue", np.array([0.3, 0.4, 0.02]))
    _put_under_finger(env, "red")
    status = _hold(env, 3)
    assert not status.success and status.stage == "reached"


def test_time_runs_out(env):
    task = Task("touch", "red")
    env.reset(0, task)
    assert not _hold(env, task.max_steps - 1).timed_out
    status = _hold(env, 1)
    assert status.timed_out and status.done and not status.success and status.steps == task.max_steps


def test_close_can_be_repeated_and_rendering_resumes():
    environment = TabletopEnv(image_size=64)
    before = environment.render("wrist")
    environment.close()
    environment.close()
    np.testing.assert_array_equal(environment.render("wrist"), before)
    environment.close()


def test_no_context_is_a_clear_error(monkeypatch):
    def fail(*_):
        raise rendering.mujoco.FatalError("no display")

    monkeypatch.setattr(rendering.mujoco, "GLContext", fail)
    with pytest.raises(ConfigError, match="MUJOCO_GL"):
        TabletopEnv().render("front")
