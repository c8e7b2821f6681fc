"""Ω-QVLA core: 4-bit vision-language-action policies, without ROS.

Models, quantizer, packs, processing, simulation environments, evaluation and the ``omega-qvla`` command.
Nothing in this package imports ROS.
"""

__version__ = "0.1.0"
