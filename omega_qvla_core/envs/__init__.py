"""Simulation environments.

Importing this package chooses MuJoCo's OpenGL backend (see ``rendering``), so import it before ``mujoco``.
"""

from __future__ import annotations

from omega_qvla_core.envs import rendering as rendering
