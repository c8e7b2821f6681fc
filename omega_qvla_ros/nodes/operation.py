"""What an operator does with a running policy node: start, stop, restart, reset, enable, emergency stop, tell.

The services exist from the node's construction on and answer with the reason where they refuse. The emergency stop is
heard in every lifecycle state.
"""

from __future__ import annotations

from collections.abc import Callable

from rclpy.node import Node
from rclpy.qos import QoSPolicyKind
from rclpy.subscription import Subscription
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from omega_qvla_ros.emergency_stop import EmergencyStop, Refused
from omega_qvla_ros.nodes import qos
from omega_qvla_ros.session import PolicySession

E_STOP_TOPIC = "~/e_stop"
INSTRUCTION_TOPIC = "~/instruction"


class Operation:
    """Services and topics of the operator.

    Args:
        node: Their owner.
        session: The configured session, None while there is none.
        active: Whether the node is active.
        preempt: Whether ``~/start`` while running begins anew instead of being refused.
        check_outputs: Looks at the outputs and tells the session, before a start is judged.
        now: The node's time in ns.
        send: Sends what the session wants to be sent now.
        set_instruction: Text -> reason for refusing it, None if it was taken.
        on_incompatible: Told of publishers that cannot be heard.
    """

    def __init__(
        self,
        node: Node,
        session: Callable[[], PolicySession | None],
        active: Callable[[], bool],
        preempt: Callable[[], bool],
        check_outputs: Callable[[], None],
        now: Callable[[], int],
        send: Callable[[], None],
        set_instruction: Callable[[str], str | None],
        on_incompatible: qos.OnIncompatible,
    ) -> None:
        self._node = node
        self._session = session
        self._active = active
        self._preempt = preempt
        self._check_outputs = check_outputs
        self._now = now
        self._send = send
        self._set_instruction = set_instruction
        self._on_incompatible = on_incompatible
        self.emergency_stop = EmergencyStop()
        self.enabled = True
        self._contract_switch: list[Subscription] = []
        node.create_subscription(
            String,
            INSTRUCTION_TOPIC,
            self._on_instruction,
            qos.INSTRUCTION,
            event_callbacks=qos.subscription_events(INSTRUCTION_TOPIC, on_incompatible),
        )
        self._subscribe_switch(E_STOP_TOPIC)
        for action in (self._start, self._stop, self._restart, self._reset_fault):
            name = action.__name__.lstrip("_")
            node.create_service(Trigger, f"~/{name}", lambda _, response, action=action: self._answer(response, action))
        node.create_service(SetBool, "~/enable", self._on_enable)

    # Emergency stop.

    def use_contract_switch(self, topic: str | None) -> None:
        """Hear another switch too, as the contract names it; None for none."""
        for subscription in self._contract_switch:
            self._node.destroy_subscription(subscription)
        self._contract_switch = self._subscribe_switch(topic) if topic else []

    def _subscribe_switch(self, topic: str) -> list[Subscription]:
        """Twice: a subscription that asks for the kept message does not hear publishers that keep none."""

        def on_incompatible(name: str, policy: QoSPolicyKind) -> None:
            if policy is not QoSPolicyKind.DURABILITY:
                self._switch_unheard(name, policy)

        return [
            self._node.create_subscription(
                Bool,
                topic,
                lambda message: self._on_switch(topic, message.data),
                profile,
                event_callbacks=qos.subscription_events(topic, on_incompatible),
            )
            for profile in (qos.SWITCH, qos.SWITCH_BEFORE)
        ]

    def _switch_unheard(self, topic: str, policy: QoSPolicyKind) -> None:
        self._on_incompatible(topic, policy)
        session = self._session()
        if session is not None:
            reason = f"a publisher of the emergency stop {topic!r} cannot be heard ({policy.name}); publish reliable"
            session.safety.latch("e_stop_qos", reason)

    def _on_switch(self, topic: str, pressed: bool) -> None:
        was = self.emergency_stop.pressed
        session = self._session()
        if session is None:
            self.emergency_stop.set(topic, pressed)
        else:
            session.press_emergency_stop(topic, pressed, self._now())
        if pressed and not was:
            # Once: a switch may repeat itself at any rate, and the hold's repetitions belong to the control timer.
            self._send()
            self._node.get_logger().error(f"emergency stop on {topic!r}")

    # Instruction and services.

    def _on_instruction(self, message: String) -> None:
        reason = self._set_instruction(message.data)
        if reason is not None:
            self._node.get_logger().warning(f"instruction ignored: {reason}")

    def _start(self, session: PolicySession) -> str:
        self._check_outputs()
        if session.running and not self._preempt():
            raise Refused("running already; call ~/stop first, or set second_goal to 'preempt'")
        refusal = session.start_refusal()
        if refusal is not None:
            raise Refused(refusal)
        session.start(self._now())
        return f"started, task {session.scheduler.task}: {session.instruction!r}"

    def _stop(self, session: PolicySession) -> str:
        session.stop(self._now())
        return "stopped; ~/start begins anew"

    def _restart(self, session: PolicySession) -> str:
        session.restart(self._now())
        return f"epoch {session.scheduler.epoch}"

    def _reset_fault(self, session: PolicySession) -> str:
        return "cleared: " + ("; ".join(session.reset_fault()) or "nothing")

    def _answer(self, response: Trigger.Response, action: Callable[[PolicySession], str]) -> Trigger.Response:
        session = self._session()
        try:
            if session is None or not self._active():
                raise Refused("the node must be activated first (lifecycle)")
            response.message = action(session)
            response.success = True
            self._send()
        except Refused as error:
            response.success, response.message = False, str(error)
        return response

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        """Answered in every lifecycle state: a gate that was closed stays so until it is opened."""
        self.enabled = bool(request.data)
        session = self._session()
        if session is not None:
            session.enable(self.enabled, self._now())
            self._send()
        response.success, response.message = True, "enabled" if self.enabled else "disabled: the arm holds"
        return response
