from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nfm.models.fields import Guided
from nfm.models.labels import NULL_LABEL
from nfm.models.sit import SiT, SiTConfig, forward_flops, parse_size, training_flops

REFERENCE = np.load(Path(__file__).parent / "data" / "sit_reference.npz")
CONFIG = SiTConfig(channels=4, image_size=8, patch=2, width=48, depth=3, heads=3, num_classes=5, learn_sigma=True)


def reference(name: str) -> Tensor:
    return torch.from_numpy(REFERENCE[name])


def labels(name: str) -> Tensor:
    """The published code writes the dropped label as the number of classes."""
    y = reference(name)
    return torch.where(y == CONFIG.num_classes, NULL_LABEL, y)


@pytest.fixture(scope="module")
def published() -> SiT:
    prefix = "state_dict/"
    state = {key.removeprefix(prefix): reference(key) for key in REFERENCE.files if key.startswith(prefix)}
    network = SiT(CONFIG)
    torch.testing.assert_close(network.pos_embed, state["pos_embed"], atol=1e-6, rtol=0)
    network.load_state_dict(state)
    return network.requires_grad_(False)


def test_velocity_agrees_with_the_published_implementation(published: SiT) -> None:
    v = published(reference("x"), reference("t"), labels("y"))
    torch.testing.assert_close(v, reference("v"), atol=1e-5, rtol=0)


def test_legacy_guidance_agrees_with_the_published_implementation(published: SiT) -> None:
    """Its first half is the guided batch; it guides three channels and leaves the fourth conditional."""
    half = len(reference("cfg_x")) // 2
    x, t, y = (tensor[:half] for tensor in (reference("cfg_x"), reference("cfg_t"), labels("cfg_y")))
    guided = Guided(published, 2.5, guided_channels=3)(x, t, y)
    torch.testing.assert_close(guided, reference("v_cfg2.5")[:half], atol=1e-5, rtol=0)
    every = Guided(published, 2.5)(x, t, y)
    torch.testing.assert_close(every[:, :3], guided[:, :3])
    assert not torch.allclose(every[:, 3], guided[:, 3])


def test_guidance_is_linear_between_the_two_fields(published: SiT) -> None:
    x, t, y = reference("x"), reference("t"), labels("y")
    conditional = published(x, t, y)
    unconditional = published(x, t, torch.full_like(y, NULL_LABEL))
    for weight in (0.0, 1.0, 3.0):
        expected = unconditional + weight * (conditional - unconditional)
        torch.testing.assert_close(Guided(published, weight)(x, t, y), expected, atol=1e-5, rtol=1e-5)


def test_reversed_time(published: SiT) -> None:
    """With `reversed_time`, the published weights are a field of this project: t = 0 is data, and v = ε - x."""
    network = SiT(replace(CONFIG, reversed_time=True))
    network.load_state_dict(published.state_dict())
    x, t, y = reference("x"), reference("t"), labels("y")
    torch.testing.assert_close(network(x, 1 - t, y), -reference("v"), atol=1e-5, rtol=0)


def test_a_fresh_network_predicts_zero() -> None:
    network = SiT(SiTConfig(1, 8, 2, 16, 2, 2, 3))
    assert not network(torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([0, -1])).any()


def test_images_need_not_be_square() -> None:
    """Token 3·r + c is the patch in row r and column c, which has the position (c, r)."""
    network = SiT(SiTConfig(channels=5, image_size=(4, 6), patch=2, width=16, depth=1, heads=2, num_classes=0))
    x = torch.rand(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    assert network.config.grid == (2, 3)
    embedded = network.x_embedder(x)
    for r, c in ((0, 0), (0, 2), (1, 0), (1, 2)):
        patch = x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
        torch.testing.assert_close(network.x_embedder(patch)[:, 0], embedded[:, 3 * r + c])
        omega = 10000.0 ** (-torch.arange(4) / 4)
        position = torch.cat([(c * omega).sin(), (c * omega).cos(), (r * omega).sin(), (r * omega).cos()])
        torch.testing.assert_close(network.pos_embed[0, 3 * r + c], position)
    tokens = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(2, 6, -1)  # channels last in a patch
    assert torch.equal(network.unpatchify(tokens), x)
    assert network(x, torch.tensor([0.1, 0.9]), torch.tensor([-1, -1])).shape == x.shape


def test_a_network_without_classes_has_no_table_and_does_not_look_at_labels() -> None:
    torch.manual_seed(0)
    network = SiT(SiTConfig(1, 8, 2, 16, 1, 2, num_classes=0)).requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert not [name for name in network.state_dict() if name.startswith("y_embedder")]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.9])
    assert torch.equal(network(x, t, torch.tensor([-1, -1])), network(x, t, torch.tensor([5, 0])))


@pytest.mark.parametrize(("name", "millions"), [("SiT-S/2", 33), ("SiT-B/4", 130), ("SiT-L/8", 458), ("SiT-XL/2", 675)])
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = SiT(SiTConfig(channels=4, image_size=32, num_classes=1000, learn_sigma=True, **parse_size(name)))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


def test_free_sizes() -> None:
    assert parse_size("SiT-4x64h2/2") == {"depth": 4, "width": 64, "heads": 2, "patch": 2}


@pytest.mark.parametrize(
    "name",
    ["SiT", "SiT-M/2", "SiT-XL", "SiT-XL/0", "SiT-4x64/2", "DiT-XL/2", "SiT-XL/²", "SiT-4x٣h2/2", "SiT-9999999x4h1/2"],
)
def test_unknown_sizes(name: str) -> None:
    with pytest.raises(ValueError, match="expected SiT"):
        parse_size(name)


@pytest.mark.parametrize(("learn_sigma", "mlp_ratio", "width"), [(False, 4, 8), (True, 3, 12)])
def test_flops_are_those_that_torch_counts(learn_sigma: bool, mlp_ratio: int, width: int) -> None:
    network = SiT(SiTConfig(3, (8, width), 2, 24, 3, 2, num_classes=5, mlp_ratio=mlp_ratio, learn_sigma=learn_sigma))
    x = torch.zeros(2, 3, 8, width)
    t, y = torch.tensor([0.1, 0.9]), torch.tensor([0, -1])
    # torch's counter has no formula for the fused attention of the CPU; the unfused is matrix products, which it counts
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        network(x, t, y)
    assert forward.get_total_flops() == 2 * forward_flops(network.config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as training:
        network(x.requires_grad_(), t, y).sum().backward()
    assert training.get_total_flops() == pytest.approx(2 * training_flops(network.config), rel=0.01)
