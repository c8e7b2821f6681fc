"""Messages of Python's ``logging``, which the ROS-free modules use, go to the node's ROS log."""

from __future__ import annotations

import logging

from rclpy.impl.rcutils_logger import RcutilsLogger

THROTTLE_S = 1.0
"""The same line of code speaks at most once per second: a fault can repeat at the control rate."""


class RosHandler(logging.Handler):
    """Forwards records to a node's logger, repeated ones throttled by their place in the code.

    Args:
        logger: The node's logger.
    """

    def __init__(self, logger: RcutilsLogger) -> None:
        super().__init__()
        self._logger = logger
        self._last_s: dict[tuple[str, int], float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Forward one record."""
        place = (record.pathname, record.lineno)
        if record.created - self._last_s.get(place, 0.0) < THROTTLE_S:
            return
        self._last_s[place] = record.created
        text = self.format(record)
        # rclpy ties a call's place in the code to one severity, so each severity has a line of its own.
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        elif record.levelno >= logging.INFO:
            self._logger.info(text)
        else:
            self._logger.debug(text)


def forward_logging(logger: RcutilsLogger) -> None:
    """Send what the package's own modules log to ``logger``."""
    for name in ("omega_qvla_core", "omega_qvla_ros"):
        source = logging.getLogger(name)
        source.addHandler(RosHandler(logger))
        source.setLevel(logging.INFO)
        source.propagate = False
