"""Formulas of the losses by their properties."""

import torch

from omega_qvla_core.train.losses import (
    LENGTH_SCALE_M,
    READOUT_DIM,
    bilinear_labels,
    flow_targets,
    grounding_loss,
    masked_mean,
    named_cube_error_m,
    readout_targets,
    sample_time,
)


def test_flow_path_ends_in_action_and_noise_and_its_velocity_is_their_difference():
    actions, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    at_end, velocity = flow_targets(actions, noise, torch.zeros(2))
    assert torch.equal(at_end, actions) and torch.equal(velocity, noise - actions)
    assert torch.equal(flow_targets(actions, noise, torch.ones(2))[0], noise)
    early, _ = flow_targets(actions, noise, torch.full((2,), 0.25))
    torch.testing.assert_close(early + 0.5 * velocity, flow_targets(actions, noise, torch.full((2,), 0.75))[0])


def test_flow_times_follow_the_beta_distribution():
    time = sample_time(200_000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert time.min() > 0 and time.max() <= 1
    # Mean of Beta(1.5, 1) is 0.6; its median is 0.5 ** (1 / 1.5) = 0.63.
    torch.testing.assert_close(time.mean(), torch.tensor(0.6), atol=3e-3, rtol=0)
    torch.testing.assert_close(time.median(), torch.tensor(0.63), atol=5e-3, rtol=0)


def test_bilinear_labels_sum_to_one_and_have_the_point_as_their_mean():
    pixels = torch.tensor([[0.31, 0.77], [0.5, 0.5], [0.04, 0.96]])
    labels = bilinear_labels(pixels, 16)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(3))
    centre = (torch.arange(16) + 0.5) / 16
    grid = labels.view(3, 16, 16)
    mean = torch.stack([(grid.sum(dim=1) * centre).sum(dim=1), (grid.sum(dim=2) * centre).sum(dim=1)], dim=1)
    torch.testing.assert_close(mean, pixels)


def test_points_outside_the_image_are_clamped_and_invisible_ones_do_not_count():
    labels = bilinear_labels(torch.tensor([[1.7, -0.2]]), 8)
    assert labels.view(8, 8)[0, 7] == 1
    logits = torch.randn(2, 64)
    pixels = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    only_first = grounding_loss(logits, pixels, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(only_first, grounding_loss(logits[:1], pixels[:1], torch.ones(1)))


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.ones(3), torch.zeros(3)) == 0


def test_readout_targets_put_the_named_cube_first_in_base_and_tool_frame():
    cubes = torch.tensor([[[0.3, 0.1, 0.02], [0.4, -0.1, 0.02], [0.35, 0.0, 0.02]]])
    tool = torch.tensor([[0.3, 0.0, 0.2]])
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])  # tool turned by 90 degrees
    target = readout_targets(cubes, torch.zeros(1, 3), torch.tensor([[0.5, 0, 0]]), tool, quarter, torch.tensor([1]))
    assert target.shape == (1, READOUT_DIM)
    torch.testing.assert_close(target[0, :3] * LENGTH_SCALE_M, cubes[0, 1])
    # Seen from the tool, base (0.1, -0.1) is at (-0.1, -0.1): x_tool points along base y, y_tool along minus base x.
    torch.testing.assert_close(target[0, 15:18] * LENGTH_SCALE_M, torch.tensor([-0.1, -0.1, -0.18]))
    # A quarter turn does not change how a cube looks: sine 0, cosine 1.
    torch.testing.assert_close(target[0, -2:], torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)
    assert named_cube_error_m(target, target) == 0
