"""Off-screen rendering of a MuJoCo model, with one OpenGL context for every camera and image size.

This is the one place that chooses MuJoCo's OpenGL backend. MuJoCo reads the variable ``MUJOCO_GL`` when it is first
imported; a headless machine needs ``egl`` (or ``osmesa``). A value that the user has set is left alone.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref

if sys.platform.startswith("linux"):
    os.environ.setdefault("MUJOCO_GL", "egl")

import mujoco
import numpy as np

from omega_qvla_core.errors import ConfigError


class OffscreenRenderer:
    """Renders a model's cameras into uint8 RGB images of any size up to the model's off-screen buffer.

    ``mujoco.Renderer`` fixes the size and opens a context per instance; here the 128 px network images and the
    larger pictures for humans share one context, so that one process holds one context.

    The context belongs to the thread that created the object: render and close from that thread only.

    Args:
        model: Compiled model. ``model.vis.global_.offwidth`` and ``offheight`` bound the image size.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        self._max_width = int(model.vis.global_.offwidth)
        self._max_height = int(model.vis.global_.offheight)
        try:
            self._gl = mujoco.GLContext(self._max_width, self._max_height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except (mujoco.FatalError, RuntimeError, ImportError, AttributeError) as error:
            raise ConfigError(
                f"no off-screen OpenGL context with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r} ({error}); "
                "install EGL (libegl1 and libgl1-mesa-dri) or set MUJOCO_GL=osmesa, "
                "and import omega_qvla_core.envs before mujoco"
            ) from error
        # Also at exit, before the OpenGL library is torn down: a context freed after that prints a traceback. Hooks run
        # last come first, and MuJoCo registered its own when the context was made; weakref's own hook may be older.
        self._finalizer = weakref.finalize(self, _free, self._gl, self._context)
        self._finalizer.atexit = False
        atexit.register(self._finalizer)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=500)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._scene.flags[mujoco.mjtRndFlag.mjRND_HAZE] = False
        self._option = mujoco.MjvOption()
        self._perturb = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def render(self, data: mujoco.MjData, camera_id: int, height: int, width: int) -> np.ndarray:
        """Renders one camera.

        Args:
            data: State to draw; its kinematics must be up to date.
            camera_id: Index of a fixed camera of the model.
            height: Image height in pixels.
            width: Image width in pixels.

        Returns:
            uint8 ``[height, width, 3]`` RGB, row 0 at the top.

        Raises:
            ConfigError: The size does not fit the off-screen buffer.
        """
        if not (0 < height <= self._max_height and 0 < width <= self._max_width):
            raise ConfigError(
                f"image size {height} x {width}: choose at least 1 x 1 and at most "
                f"{self._max_height} x {self._max_width} pixels (the scene's off-screen buffer)"
            )
        self._gl.make_current()
        self._camera.fixedcamid = camera_id
        mujoco.mjv_updateScene(
            self._model, data, self._option, self._perturb, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self._scene, self._context)
        image = np.empty((height, width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(image, None, viewport, self._context)
        return np.ascontiguousarray(image[::-1])

    def close(self) -> None:
        """Frees the context. Safe to call twice; also done when the process ends."""
        self._finalizer()


def _free(gl: mujoco.GLContext, context: mujoco.MjrContext) -> None:
    gl.make_current()
    context.free()
    gl.free()
