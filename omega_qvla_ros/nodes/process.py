"""What every node's ``main`` does: rclpy without its signal handlers, a start that fails with one line, a quick end.

rclpy's own handlers shut the context down at once; then nothing can be published any more, and the last message of
the policy node has to be a hold.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from typing import TypeVar

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from omega_qvla_core.errors import OmegaQVLAError

AnyNode = TypeVar("AnyNode", bound=Node)


def start(args: list[str] | None, name: str, factory: Callable[[], AnyNode]) -> tuple[AnyNode, list[int]]:
    """Initialize rclpy and make the node.

    Args:
        args: Command line, None for the process's own.
        name: Name for the log if the node cannot be made.
        factory: Makes the node.

    Returns:
        The node, and a list that has an element from the first SIGINT or SIGTERM on.

    Raises:
        SystemExit: With 1, after a message: a parameter is unknown, has the wrong type or is out of range.
    """
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda caught, _: stopping.append(caught))
    try:
        return factory(), stopping
    except (OmegaQVLAError, ParameterException) as error:
        get_logger(name).fatal(str(error))
        rclpy.try_shutdown()
        raise SystemExit(1) from error


def finish() -> None:
    """Shut rclpy down, as the last thing that ``main`` does.

    What is there is not collected any more: with torch that takes the interpreter a second, and several on a busy
    machine, where ``launch`` kills a process five seconds after its SIGINT.
    """
    rclpy.try_shutdown()
    gc.freeze()
