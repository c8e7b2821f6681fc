"""Real-time chunking: the correction itself, both families, quantized weights, and the way through the processing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla_core.checkpoints.families import build_model
from omega_qvla_core.checkpoints.strict_loading import load_model
from omega_qvla_core.checkpoints.weight_files import find_weights
from omega_qvla_core.commands.guidance_check import compare_guidance, field_of, round_weights
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.flow import integrate
from omega_qvla_core.parity.fixture import read_fixture
from omega_qvla_core.runtime import CommittedPrefix, Policy
from omega_qvla_core.runtime.realtime_chunking import PrefixGuidance, guidance, guidance_weight, prefix_weights

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def test_weights_are_one_for_the_delay_and_fall_to_zero_where_nothing_is_committed() -> None:
    weights = prefix_weights(10, delay_steps=3, committed_steps=8)
    np.testing.assert_array_equal(weights[:3], 1.0)
    np.testing.assert_array_equal(weights[8:], 0.0)
    assert (np.diff(weights[2:9]) < 0).all()
    c = (8 - 3) / (8 - 3 + 1)
    assert weights[3] == pytest.approx(c * np.expm1(c) / np.expm1(1.0))
    np.testing.assert_array_equal(prefix_weights(4, 4, 4), 1.0)


def test_guidance_weight_is_the_papers_and_bounded() -> None:
    assert guidance_weight(0.0, 5.0) == 5.0 and guidance_weight(1.0, 5.0) == 0.0
    assert guidance_weight(0.5, 5.0) == pytest.approx(2.0)  # (1 - t) / t * (t^2 + (1 - t)^2) / (1 - t)^2
    assert guidance_weight(0.5, 1.5) == 1.5


def test_nothing_committed_changes_nothing_and_nan_stays_visible() -> None:
    x, u = torch.zeros(1, 4, 2), torch.full((1, 4, 2), torch.nan)
    guide = PrefixGuidance(torch.ones(1, 4, 2), torch.zeros(1, 4, 2), 5.0)
    assert guide(x, u, 0.5).isnan().all()
    u = torch.randn(1, 4, 2)
    assert torch.equal(guide(x, u, 0.0), u)


def test_prefix_that_is_not_finite_is_left_out_entry_by_entry() -> None:
    actions = np.array([[1.0, np.nan], [np.inf, 2.0]])
    guide = guidance([None, CommittedPrefix(actions, 1)], [None, actions], (2, 4, 3))
    assert guide is not None and guide.targets.isfinite().all()
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, float(prefix_weights(4, 1, 2)[1]), 0.0]])
    torch.testing.assert_close(guide.weights[1, :2], expected)
    assert not guide.weights[0].any() and not guide.weights[1, 2:].any()
    assert guidance([None], [None], (1, 4, 3)) is None


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_guide_sees_the_same_direction_in_both_conventions_of_time(sign: float) -> None:
    seen = []

    def guide(x: torch.Tensor, u: torch.Tensor, tau: float) -> torch.Tensor:
        seen.append((tau, float(u[0, 0, 0])))
        return u + 1.0

    noise = torch.zeros(1, 1, 1)
    steps = list(integrate(noise, 4, sign / 4, lambda x, i: sign * torch.full_like(x, 3.0), guide))
    assert seen == [(0.0, 3.0), (0.25, 3.0), (0.5, 3.0), (0.75, 3.0)]
    assert float(steps[-1].actions) == pytest.approx(4.0)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("folder", ["pi05/tiny", "gr00t/tiny"])
def test_closed_form_is_lerobots_correction_and_not_the_papers(folder: str, bits: int) -> None:
    fixture = read_fixture(GOLDEN / folder)
    weights = find_weights(GOLDEN / folder)
    model = load_model(lambda: build_model(fixture.config), weights, fixture.family, torch.float32).requires_grad_(
        False
    )
    if bits:
        round_weights(model, bits)
    case = min(name for name in fixture.inputs if name != "train")
    found = compare_guidance(field_of(fixture, model, case, 5), 5)
    assert found.lerobot == 0.0
    assert found.jacobian > 0.1 and found.cosine < 0.99
    assert found.prefix_ours < 0.1 * found.prefix_free


@pytest.fixture(scope="module", params=["tabletop", "tabletop_w4a4"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return Policy.load(request.param)


def test_chunk_of_a_policy_continues_the_committed_one(policy: Policy) -> None:
    observation = policy.description.blank_observation()
    before = policy.infer(observation, seed=1).actions
    free = policy.infer(observation, seed=2).actions
    prefix = CommittedPrefix(before[:12], delay_steps=4)
    guided = policy.infer(observation, seed=2, committed=prefix).actions
    scale = np.abs(before).max(axis=0) + 1e-3

    def distance(actions: np.ndarray, steps: slice) -> float:
        return float(np.sqrt(np.mean(((actions - before)[steps] / scale) ** 2)))

    assert distance(guided, slice(0, 4)) < 0.3 * distance(free, slice(0, 4))
    assert distance(guided, slice(4, 12)) < distance(free, slice(4, 12))
    assert np.array_equal(policy.infer(observation, seed=2).actions, free)
    assert np.array_equal(policy.infer(observation, seed=2, committed=None).actions, free)


def test_rows_of_a_batch_have_prefixes_of_their_own(policy: Policy) -> None:
    observation = policy.description.blank_observation()
    prefix = CommittedPrefix(policy.infer(observation, seed=1).actions[:6], delay_steps=2)
    both = policy.infer_batch([observation, observation], seeds=[2, 2], committed=[None, prefix])
    np.testing.assert_allclose(both[0].actions, policy.infer(observation, seed=2).actions, atol=1e-4)
    alone = policy.infer(observation, seed=2, committed=prefix).actions
    np.testing.assert_allclose(both[1].actions, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (CommittedPrefix(np.zeros((99, 7)), 1), "needs 1 to"),
        (CommittedPrefix(np.zeros((4, 3)), 1), "of 7 actions"),
        (CommittedPrefix(np.zeros((4, 7)), 5), "delay_steps is 5"),
        (CommittedPrefix(np.zeros((4, 7)), 1, max_weight=np.inf), "max_weight is inf"),
    ],
)
def test_prefix_that_does_not_fit_is_refused(prefix: CommittedPrefix, words: str) -> None:
    loaded = Policy.load("tabletop")
    with pytest.raises(ConfigError, match=words):
        loaded.infer(loaded.description.blank_observation(), committed=prefix)


def test_predictions_are_the_inverse_of_targets(policy: Policy) -> None:
    observation = policy.description.blank_observation()
    measured = np.asarray(observation.state) + 0.05
    targets = policy.infer(observation, seed=3).actions[:5]
    predicted = policy.processor.predictions(targets, measured)
    whole = np.zeros((policy.spec.horizon, predicted.shape[1]))
    whole[:5] = predicted
    np.testing.assert_allclose(policy.processor.targets(whole, measured)[:5], targets, atol=1e-9)
