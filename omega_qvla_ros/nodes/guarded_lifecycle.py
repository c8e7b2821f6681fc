"""A lifecycle node whose transitions report their errors: rclpy of Jazzy and Kilted swallows exceptions there."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn

from omega_qvla_core.errors import OmegaQVLAError

AFTER = {
    "configure": "inactive",
    "activate": "active",
    "deactivate": "inactive",
    "cleanup": "unconfigured",
    "shutdown": "finalized",
    "error": "unconfigured",
}
"""Lifecycle state after a transition that succeeded."""


def nothing() -> None:
    """A transition's step that is empty."""


class GuardedLifecycleNode(LifecycleNode):
    """See the module's text."""

    def __init__(self, node_name: str, **kwargs: object) -> None:
        super().__init__(node_name, **kwargs)
        self._lifecycle = "unconfigured"

    @property
    def lifecycle(self) -> str:
        """Present lifecycle state: unconfigured, inactive, active or finalized."""
        return self._lifecycle

    def _transition(
        self,
        name: str,
        before: Callable[[], None],
        entities: Callable[[], TransitionCallbackReturn],
        after: Callable[[], None] = nothing,
        on_failure: Callable[[str], None] = lambda text: None,
    ) -> TransitionCallbackReturn:
        """Run one transition.

        Args:
            name: Of the transition.
            before: Work while the managed entities are as they were.
            entities: The base class's part: switches the managed entities.
            after: Work with the entities switched.
            on_failure: Called with the reason when something raised.
        """
        try:
            before()
            result = entities()
            if result is TransitionCallbackReturn.SUCCESS:
                after()
                self._lifecycle = AFTER[name]
            return result
        except OmegaQVLAError as error:
            reason = str(error)
            self.get_logger().error(f"{name} failed: {error}")
        except Exception as error:  # noqa: BLE001 - rclpy would swallow it without a word
            reason = f"{type(error).__name__}: {error}"
            self.get_logger().error(f"{name} failed:\n{traceback.format_exc()}")
        on_failure(reason)
        return TransitionCallbackReturn.FAILURE
