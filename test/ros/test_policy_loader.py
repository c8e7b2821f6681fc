"""What configure does with the parameters about the policy, and a loader of the caller's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

from omega_qvla_core.checkpoints.folder import resolve_folder
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_ros.nodes import loading
from omega_qvla_ros.nodes.policy_node import PolicyNode
from omega_qvla_ros.process_environment import free_domain_id


@pytest.fixture
def context():
    made = Context()
    rclpy.init(context=made, args=[], domain_id=free_domain_id(51))
    yield made
    rclpy.try_shutdown(context=made)


def test_given_loader_gets_folder_and_options_and_gives_the_policy(context: Context, checkpoint: str) -> None:
    asked = []

    def load(folder: Path, options: loading.PolicyOptions) -> loading.LoadedPolicy:
        asked.append((folder, options.device, options.engine))
        return loading.load_policy(folder, options)

    given = [Parameter("checkpoint", value=checkpoint), Parameter("engine", value="off")]
    node = PolicyNode(context=context, policy_loader=load, parameter_overrides=given)
    assert node.trigger_configure() is TransitionCallbackReturn.SUCCESS
    assert asked == [(Path(checkpoint), "cpu", "off")]
    assert node.trigger_cleanup() is TransitionCallbackReturn.SUCCESS
    node.destroy_node()


PACK = "tabletop_w4a4"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_steps": 7}, "num_steps is 7, {name} was made for {steps} denoise steps; set num_steps to 0"),
        ({"recipe": "no_such"}, "recipe is 'no_such', the checkpoint {name} was made with '{made_with}'"),
        ({"backend": "refrence"}, "backend is 'refrence'; choose 'auto' or 'cpu' or 'reference' or 'triton'"),
        ({"backend": "triton"}, "backend 'triton' computes on an NVIDIA GPU"),
        ({"engine": "of"}, "engine is 'of'; choose 'auto' or 'off' (nearest: 'off')"),
        ({"device": "cdua"}, "cdua"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pack_that_was_not_made_for_what_is_asked_is_refused_at_configure(
    context: Context, given: dict, words: str
) -> None:
    spec = loading.load_policy(resolve_folder(PACK), loading.PolicyOptions()).spec
    overrides = [Parameter(name, value=value) for name, value in {"checkpoint": PACK, **given}.items()]
    node = PolicyNode(context=context, parameter_overrides=overrides)
    assert node.trigger_configure() is TransitionCallbackReturn.FAILURE
    expected = words.format(name=repr(spec.name), steps=spec.num_steps, made_with=spec.quantization)
    assert expected in node._reporter.configure_error
    node.destroy_node()


@pytest.mark.parametrize("own", [0, 1], ids=["zero", "the pack's number"])
def test_pack_is_taken_with_the_steps_and_the_recipe_that_it_was_made_with(context: Context, own: int) -> None:
    spec = loading.load_policy(resolve_folder(PACK), loading.PolicyOptions()).spec
    given = {"num_steps": own * spec.num_steps, "recipe": spec.quantization, "require_quantization": True}
    overrides = [Parameter(name, value=value) for name, value in {"checkpoint": PACK, **given}.items()]
    node = PolicyNode(context=context, parameter_overrides=overrides)
    assert node.trigger_configure() is TransitionCallbackReturn.SUCCESS
    node.destroy_node()


def test_backend_is_that_of_every_layer_and_gives_the_same_chunk() -> None:
    fast = loading.load_policy(resolve_folder(PACK), loading.PolicyOptions(engine="off"))
    slow = loading.load_policy(resolve_folder(PACK), loading.PolicyOptions(engine="off", backend="reference"))
    assert {site.backend for site in quantized_sites(slow.model)} == {"reference"}
    assert "cpu" in {site.backend for site in quantized_sites(fast.model)}
    size = {camera.key: (camera.height, camera.width) for camera in fast.spec.cameras}
    images = {key: np.full((*size[key], 3), 90, np.uint8) for key in size}
    observation = Observation(images, np.zeros(len(fast.spec.state_names), np.float32), "touch the red cube")
    np.testing.assert_allclose(slow.infer(observation).actions, fast.infer(observation).actions, atol=1e-3)


def test_backend_without_a_quantized_layer_is_refused(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match="backend is 'reference', but .* holds no quantized layer; set it to auto"):
        loading.load_policy(Path(checkpoint), loading.PolicyOptions(backend="reference"))
