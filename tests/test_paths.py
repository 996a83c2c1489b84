"""Path, loss, couplings, metrics and EMA on closed forms."""

import pytest
import torch
from torch import nn

from nfm.models.couplings import COUPLINGS
from nfm.models.ema import EMA
from nfm.models.labels import NULL_LABEL, class_rows, drop_labels
from nfm.models.metrics import PixelFeatures, frechet_metric, rms_distance, z_space_distances
from nfm.models.paths import flow_matching_loss, linear_path, logit_normal


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_path_runs_from_data_to_noise() -> None:
    x, epsilon = torch.randn(3, 2, 4, 4, generator=generator()), torch.randn(3, 2, 4, 4, generator=generator(1))
    path = linear_path(x, epsilon, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(path.x_t[0], x[0])
    assert torch.equal(path.x_t[2], epsilon[2])
    torch.testing.assert_close(path.x_t[1], 0.75 * x[1] + 0.25 * epsilon[1])
    assert torch.equal(path.v, epsilon - x)


def test_loss_is_zero_for_the_true_velocity_and_the_mean_square_otherwise() -> None:
    x, epsilon = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    path = linear_path(x, epsilon, torch.tensor([0.2, 0.8]))
    y = torch.zeros(2, dtype=torch.int64)
    assert not flow_matching_loss(lambda x, t, y: torch.ones_like(x), path, y).any()
    torch.testing.assert_close(
        flow_matching_loss(lambda x, t, y: torch.full_like(x, 3.0), path, y), torch.full((2,), 4.0)
    )


def test_logit_normal_is_the_sigmoid_of_a_normal() -> None:
    t = logit_normal(200_000, generator())
    logit = torch.logit(t)
    assert logit.mean().item() == pytest.approx(-0.2, abs=0.01)
    assert logit.std().item() == pytest.approx(1.0, abs=0.01)


def test_couplings_differ_only_in_epsilon() -> None:
    x, z = torch.zeros(5, 1, 2, 2), torch.full((5, 1, 2, 2), 7.0)
    assert torch.equal(COUPLINGS["nfm"](x, z, generator()), z)
    drawn = COUPLINGS["independent"](x, z, generator())
    assert drawn.shape == x.shape
    assert drawn.std() > 0
    assert torch.equal(drawn, COUPLINGS["independent"](x + 1, z, generator()))


def test_labels_are_dropped_with_probability_p() -> None:
    y = drop_labels(torch.arange(5).repeat(20_000), 0.1, generator())
    assert (y == NULL_LABEL).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert torch.equal(
        class_rows(torch.arange(6.0)[:, None], torch.tensor([0, 4, -1]))[:, 0], torch.tensor([0.0, 4, 5])
    )


def test_rms_distance_of_independent_normals_is_one() -> None:
    a, b = torch.randn(2000, 1, 16, 16, generator=generator()), torch.randn(2000, 1, 16, 16, generator=generator(1))
    assert rms_distance(a, b).mean().item() == pytest.approx(1.0, abs=0.01)
    structure = z_space_distances(a, a, b, b)  # representations that ignore the noise
    assert structure.same_x_different_noise == 0
    assert structure.different_x_same_noise == pytest.approx(structure.different_x_different_noise)


def test_frechet_distance_of_two_gaussians() -> None:
    """For equal covariances it is the squared distance of the means; for N(0, I) and N(0, 4 I) it is n."""
    metric = frechet_metric(PixelFeatures(4))
    x = torch.randn(40_000, 1, 2, 2, generator=generator())
    metric.update(x, real=True)
    for fake, expected in ((x + 0.5, 4 * 0.25), (2 * x, 4.0), (x, 0.0)):
        metric.reset()
        metric.update(fake, real=False)
        assert metric.compute().item() == pytest.approx(expected, abs=0.03)


def test_ema_of_a_known_sequence() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ema = EMA(network, decay=0.5)
    nn.init.ones_(network.weight)
    ema.update(network, step=0)  # warm-up: β = 1/10
    (average,) = ema.network.parameters()
    assert average.item() == pytest.approx(0.9)
    ema.update(network, step=1000)  # β = 0.5
    assert average.item() == pytest.approx(0.95)
