"""Instructions that are empty, far too long, or no text at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import rclpy
from rclpy.context import Context
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from session_rig import Rig
from std_msgs.msg import String

from omega_qvla_core.errors import InstructionError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.runtime.policy import Policy
from omega_qvla_core.runtime.random_policy import random_policy
from omega_qvla_ros.nodes.policy_node import PolicyNode
from omega_qvla_ros.process_environment import free_domain_id
from omega_qvla_ros.safety_state import State

LONG = "touch the red cube " * 550
"""10 kB."""


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.run(10)
    yield made
    made.close()


@pytest.fixture(scope="module")
def node(checkpoint: Path) -> Iterator[PolicyNode]:
    """A configured policy node that nobody spins."""
    context = Context()
    rclpy.init(context=context, args=[], domain_id=free_domain_id(71))
    given = {"checkpoint": str(checkpoint), "instruction": "go"}
    made = PolicyNode(context=context, parameter_overrides=[Parameter(key, value=given[key]) for key in given])
    assert made.trigger_configure() is TransitionCallbackReturn.SUCCESS
    yield made
    made.trigger_shutdown()
    made.destroy_node()
    rclpy.try_shutdown(context=context)


def told(policy: Policy, rig: Rig, text: str) -> None:
    """Run the session with the real policy's own reading of the instruction."""

    def infer(observation: Observation, **kwargs: object):
        policy.processor.tokenizer.encode(observation.instruction, policy.spec.max_tokens)
        return original(observation, **kwargs)

    original = rig.policy.infer
    rig.policy.infer = infer
    rig.session.set_instruction(text, rig.now)
    rig.run(20)


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u3000"])
def test_fault_17_empty_instruction_is_refused_and_the_old_one_stays(
    node: PolicyNode, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    session = node._session
    assert session is not None and session.instruction == "go"
    task = session.scheduler.task
    capfd.readouterr()
    node._operation._on_instruction(String(data=text))  # the topic's callback
    warnings = [line for line in "".join(capfd.readouterr()).splitlines() if "instruction ignored" in line]
    assert len(warnings) == 1 and "[WARN]" in warnings[0] and "an empty instruction is refused" in warnings[0]
    result = node.set_parameters([Parameter("instruction", value=text)])[0]
    assert not result.successful and "an empty instruction is refused" in result.reason
    assert (session.instruction, session.scheduler.task) == ("go", task)
    assert node.get_parameter("instruction").value == "go"


def test_fault_17_topic_with_words_is_taken(node: PolicyNode) -> None:
    """Otherwise the test above would hold for a topic that nobody hears."""
    for text in ("wave", "go"):
        node._operation._on_instruction(String(data=text))
        assert node._session is not None and node._session.instruction == text


def test_fault_17_session_without_an_instruction_never_moves() -> None:
    rig = Rig()
    rig.session.instruction = ""
    assert rig.run(30) == [None] * 30 and rig.policy.seen == []
    assert rig.state is State.DEGRADED and "no instruction yet" in rig.session.safety.reasons[0]
    assert "no instruction" in rig.session.start_refusal()
    rig.close()


def test_fault_18_ten_kilobytes_are_rejected_with_the_limit_and_hold(policy: Policy, rig: Rig) -> None:
    told(policy, rig, LONG)
    assert rig.state is State.HOLD and rig.speed == 0.0
    assert "2200 words" in rig.session.safety.reasons[0] and "shorten" in rig.session.safety.reasons[0]
    assert rig.session.safety.consecutive_errors == 0  # no fault of the policy: it never latches
    rig.session.set_instruction("touch the red cube", rig.now)
    rig.run(10)
    assert rig.state is State.OK and rig.speed > 0.0


@pytest.mark.parametrize("text", ["\ufffd\ufffd", "\x00\x01", "бери красный куб", "🦾", "12 34"])
def test_fault_18_text_that_the_tokenizer_cannot_read_is_refused_never_a_crash(
    policy: Policy, rig: Rig, text: str
) -> None:
    told(policy, rig, text)
    assert rig.state is State.HOLD and "instruction" in rig.session.safety.reasons[0]


def test_fault_18_prompt_that_is_one_token_too_long_is_refused(policy: Policy) -> None:
    tokenizer, limit = policy.processor.tokenizer, policy.spec.max_tokens
    tokenizer.encode(" ".join(["red"] * (limit - 1)), limit)
    with pytest.raises(InstructionError, match=f"the instruction has {limit} words, the policy's prompt holds"):
        tokenizer.encode(" ".join(["red"] * limit), limit)


def test_fault_18_bytes_that_are_no_utf8_arrive_as_replacement_characters() -> None:
    """What rclpy makes of them; a message like that must not raise in the callback."""
    from rclpy.serialization import deserialize_message, serialize_message

    raw = bytearray(serialize_message(String(data="touch the red cube")))
    position = raw.index(b"red")
    raw[position : position + 3] = b"\xff\xfe\xc0"
    text = deserialize_message(bytes(raw), String).data
    assert "\ufffd" in text and text.startswith("touch the ")
