"""``composed_node``: policy node and simulator in one process.

Each node keeps an executor and a thread of its own, because each was written for one thread; the main thread belongs
to physics and rendering, which need its OpenGL context. Parameters are given per node
(``-p policy_node:checkpoint:=...``), or in a parameter file with both names.
"""

from __future__ import annotations

import sys
import threading

from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.logging import get_logger
from rclpy.node import Node

from omega_qvla_ros.nodes import loading, process
from omega_qvla_ros.nodes.logging_bridge import forward_logging
from omega_qvla_ros.nodes.mujoco_bridge_node import MujocoBridgeNode
from omega_qvla_ros.nodes.policy_node import SWITCH_INTERVAL_S, PolicyNode, bring_up

JOIN_S = 5.0


class NodeThread:
    """Spins one node on a thread of its own; its end ends the process, because a deaf robot must not look alive.

    Args:
        node: The node.
        stopping: Gets an element when the executor dies.
    """

    def __init__(self, node: Node, stopping: list[int]) -> None:
        self.node = node
        self.died: Exception | None = None
        self._stopping = stopping
        self._executor = SingleThreadedExecutor(context=node.context)
        self._executor.add_node(node)
        self._thread = threading.Thread(target=self._spin, name=node.get_name(), daemon=True)

    def start(self) -> None:
        """Begin to spin."""
        self._thread.start()

    def call(self, work: object) -> object:
        """Run something on the node's thread and wait for its result."""
        task = self._executor.create_task(work)
        done = threading.Event()
        task.add_done_callback(lambda _: done.set())
        while not done.wait(0.1):
            if not self._thread.is_alive():
                return None
        return task.result()

    def join(self) -> None:
        """Stop spinning."""
        self._executor.shutdown(timeout_sec=JOIN_S)
        self._thread.join(JOIN_S)

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            pass
        except Exception as error:  # noqa: BLE001 - whatever a callback raises
            get_logger(self.node.get_name()).fatal(f"the executor died: {type(error).__name__}: {error}")
            self.died = error
            self._stopping.append(0)


def main(args: list[str] | None = None, policy_loader: loading.PolicyLoader = loading.load_policy) -> None:
    """Run both nodes until SIGINT or SIGTERM; then hold the arm, and exit with 0, with 1 if an executor died."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    (bridge, policy), stopping = process.start(
        args, "composed_node", lambda: (MujocoBridgeNode(), PolicyNode(policy_loader=policy_loader))
    )
    forward_logging(policy.get_logger())
    threads = [NodeThread(bridge, stopping), NodeThread(policy, stopping)]
    for thread in threads:
        thread.start()
    # Loading takes seconds and the simulation should go on meanwhile, so the policy's own thread does it.
    threading.Thread(target=lambda: threads[1].call(lambda: bring_up(policy)), name="bring_up", daemon=True).start()
    try:
        bridge.run(stopping)
    finally:
        if policy.lifecycle != "finalized":
            threads[1].call(policy.trigger_shutdown)
        for thread in reversed(threads):
            thread.join()
        bridge.close()
        for node in (policy, bridge):
            node.destroy_node()
        process.finish()
    if any(thread.died for thread in threads):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
