"""Batches hold what the demonstrations show, and nothing that must not be imitated."""

import pytest
import torch

from omega_qvla_core.envs.tabletop import COLOURS, KINDS, Task
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.train.config import HORIZON, TrainConfig
from omega_qvla_core.train.dataset import ARM_JOINTS, Demonstrations, prompt_table, tabletop_tokenizer
from omega_qvla_core.train.losses import READOUT_DIM


@pytest.fixture(scope="module")
def data(demos):
    return Demonstrations(demos, "cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_batches_have_the_documented_shapes_and_depend_on_the_generator_only(data):
    config = TrainConfig(batch=24)
    batch, again = data.sample(config, generator()), data.sample(config, generator())
    other = data.sample(config, generator(1))
    assert [tuple(image.shape) for image in batch.images] == [(24, 3, 64, 64)] * 2
    assert batch.tokens.shape == batch.token_mask.shape == (24, data.max_tokens)
    assert batch.state.shape == (24, 7) and batch.actions.shape == (24, HORIZON, 7)
    assert batch.readout.shape == (24, READOUT_DIM)
    assert torch.equal(batch.images[0], again.images[0]) and torch.equal(batch.actions, again.actions)
    assert not torch.equal(batch.actions, other.actions)
    assert all(image.min() >= -1 and image.max() <= 1 for image in batch.images)


def test_chunks_are_deltas_of_the_arm_and_absolute_for_the_gripper(data):
    index = torch.tensor([3])
    actions, _ = data._chunks(index)
    expected = data.targets[3 : 3 + HORIZON].clone()
    expected[:, :ARM_JOINTS] -= data.state[3, :ARM_JOINTS]
    steps = min(HORIZON, int(data.last[3]) - 3 + 1)
    torch.testing.assert_close(actions[0, :steps], expected[:steps])


def test_chunks_stay_at_the_last_target_past_the_end_of_an_episode(data):
    last = data.last[:1]
    actions, _ = data._chunks(last)
    assert torch.equal(actions[0], actions[0, :1].expand_as(actions[0]))


def test_steps_from_a_disturbance_on_are_masked_and_disturbed_frames_are_never_drawn(data):
    start = int(torch.nonzero(data.burst)[0])
    before = torch.tensor([start - 2])
    _, mask = data._chunks(before)
    assert mask[0].tolist() == [1.0, 1.0] + [0.0] * (HORIZON - 2)
    weights = torch.diff(data._frame_weights(TrainConfig()), prepend=torch.zeros(1, dtype=torch.float64))
    assert (weights[data.burst] == 0).all() and (weights[~data.burst] > 0).all()


def test_counterfactual_text_masks_the_flow_loss_just_where_the_colour_changed(data):
    config = TrainConfig(batch=256, counterfactual=1.0)
    index = torch.randint(len(data), (256,), generator=generator())
    told, imitate = data._instructed_colour(index, config, generator(), augment=True)
    assert torch.equal(imitate == 1, told == data.colour[index])
    assert 0.2 < imitate.mean() < 0.5  # a random colour is the right one in a third of the cases
    told, imitate = data._instructed_colour(index, config, generator(), augment=False)
    assert torch.equal(told, data.colour[index]) and imitate.all()


def test_every_wording_fits_the_prompt_and_is_known(data):
    tokenizer = tabletop_tokenizer()
    tokens, masks = prompt_table(tokenizer, data.max_tokens)
    assert tokens.shape[:2] == (len(KINDS), len(COLOURS)) and masks.any(dim=-1).all()
    for kind in KINDS:
        for colour in COLOURS:
            for text in Task(kind, colour).wordings:
                assert not tokenizer.unknown_words(text)


def test_an_empty_folder_names_the_command_that_fills_it(tmp_path):
    with pytest.raises(ConfigError, match="omega-qvla tabletop demos"):
        Demonstrations(tmp_path, "cpu")
