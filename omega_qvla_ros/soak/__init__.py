"""Soak: the closed loop for a stated time under load and random faults, watched by something independent.

``python -m omega_qvla_ros.soak --minutes 30 --out out/soak`` or ``make soak``.
"""
