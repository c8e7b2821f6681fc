"""Action error: zero for the policy itself, larger for coarser recipes."""

from omega_qvla_core.commands.quantize import SHIPPED_CALIBRATION
from omega_qvla_core.evaluate.action_error import action_error
from omega_qvla_core.runtime import Policy
from omega_qvla_core.runtime.observation_file import load_observations


def test_error_is_zero_against_itself_and_moderate_for_the_shipped_pack():
    observations = load_observations(SHIPPED_CALIBRATION).observations[:24]
    reference = Policy.load("tabletop")
    assert action_error(reference, reference, observations) == 0
    assert 0.01 < action_error(Policy.load("tabletop_w4a4"), reference, observations) < 0.5
