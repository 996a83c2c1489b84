import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nfm.models.sit import SiTConfig
from nfm.models.tarflow import (
    Guide,
    TarFlow,
    TarFlowConfig,
    bits_per_dim,
    drop_attention_masks,
    forward_flops,
    nll,
    parse_notation,
)

REFERENCE = np.load(Path(__file__).parent / "data" / "tarflow_reference.npz")
MODELS = ("nvp_cond", "nvp_uncond", "vp_cond")


def reference(model: str, name: str) -> Tensor | None:
    key = f"{model}/{name}"
    return torch.from_numpy(REFERENCE[key]) if key in REFERENCE.files else None


def published(model: str) -> TarFlow:
    """The reference network, loaded from its state dict in the published naming."""
    prefix = f"{model}/state_dict/"
    state = {
        key.removeprefix(prefix): torch.from_numpy(REFERENCE[key]) for key in REFERENCE.files if key.startswith(prefix)
    }
    assert any(name.endswith("attn_mask") for name in state)
    classes = 0 if "uncond" in model else 5
    flow = TarFlow(
        TarFlowConfig(
            channels=3,
            image_size=8,
            patch=2,
            width=64,
            depths=(2, 2, 2),
            num_classes=classes,
            nvp=model.startswith("nvp"),
        )
    )
    flow.load_state_dict(drop_attention_masks(state))
    return flow.requires_grad_(False)


def guide_of(name: str) -> Guide:
    """`reverse_cfg1.5_b_annealed`, `reverse_cfg0.8_temp1.4_annealed`, … as a Guide."""
    weight, temperature = re.search(r"cfg([\d.]+)", name), re.search(r"temp([\d.]+)", name)
    what = re.search(r"_(ab|a|b)(_|$)", name)
    return Guide(
        weight=float(weight[1]) if weight else 0.0,
        what=what[1] if what else "ab",  # type: ignore[arg-type]  # the pattern gives one of its values
        attn_temp=float(temperature[1]) if temperature else 1.0,
        annealed="annealed" in name,
    )


def small(num_classes: int = 3, nvp: bool = True, dtype: torch.dtype = torch.float32) -> TarFlow:
    """A random flow far from the identity."""
    torch.manual_seed(0)
    flow = TarFlow(TarFlowConfig(2, 4, 2, 16, (1, 2, 1), num_classes=num_classes, head_dim=8, nvp=nvp))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return flow.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("model", MODELS)
def test_forward_agrees_with_the_published_implementation(model: str) -> None:
    flow = published(model)
    x, y = reference(model, "x"), reference(model, "y")
    z, logdet, loss = (reference(model, name) for name in ("z", "logdet", "loss"))
    assert x is not None and z is not None and logdet is not None and loss is not None
    encoded = flow(x, y)
    torch.testing.assert_close(flow.patchify(encoded.z), z, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded.logdet, logdet, atol=1e-5, rtol=0)
    torch.testing.assert_close(nll(encoded).mean(), loss, atol=1e-5, rtol=0)


SAMPLES = sorted(key for key in REFERENCE.files if key.split("/")[1].startswith("reverse"))


@pytest.mark.parametrize("key", SAMPLES)
def test_sampling_agrees_with_the_published_implementation(key: str) -> None:
    model, name = key.split("/")
    flow, z, y = published(model), reference(model, "z_sample"), reference(model, "y_sample")
    assert z is not None
    images = flow.sample(flow.unpatchify(z), y, guide_of(name))
    torch.testing.assert_close(images, torch.from_numpy(REFERENCE[key]), atol=1e-4, rtol=0)


def test_the_reference_covers_every_kind_of_guidance() -> None:
    guides = [guide_of(key) for key in SAMPLES]
    assert {guide.what for guide in guides} == {"a", "b", "ab"}
    assert any(guide.annealed for guide in guides)
    assert any(guide.attn_temp != 1 for guide in guides)


@pytest.mark.parametrize("nvp", [True, False])
def test_logdet_is_that_of_the_jacobian(nvp: bool) -> None:
    flow = small(nvp=nvp, dtype=torch.float64)
    x = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([1])

    def encode(flat: Tensor) -> Tensor:
        return flow(flat.view(1, 2, 4, 4), y).z.flatten()  # type: ignore[no-any-return]  # a module's call is untyped

    jacobian = torch.autograd.functional.jacobian(encode, x.flatten())
    assert isinstance(jacobian, Tensor)
    torch.testing.assert_close(flow(x[None], y).logdet[0] * x.numel(), torch.linalg.slogdet(jacobian)[1])


def test_under_autocast_the_affine_map_keeps_float32() -> None:
    flow = small()
    x = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    with torch.autocast("cpu", torch.bfloat16):
        encoded = flow(x, None)
    assert encoded.z.dtype == encoded.logdet.dtype == torch.float32
    torch.testing.assert_close(encoded.z, flow(x, None).z, atol=0.05, rtol=0.05)


def rectangular(num_classes: int = 3) -> TarFlow:
    """A random flow over images of 5 channels and 4×6 pixels."""
    torch.manual_seed(0)
    flow = TarFlow(TarFlowConfig(5, (4, 6), 2, 16, (1, 2), num_classes=num_classes, head_dim=8))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return flow.requires_grad_(False)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_images_need_not_be_square(num_classes: int) -> None:
    """Token 3·r + c is the patch in row r and column c, for f and its inverse, with and without classes."""
    flow = rectangular(num_classes)
    assert (flow.config.tokens, flow.config.grid) == (6, (2, 3))
    x = torch.rand(2, 5, 4, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1
    tokens = flow.patchify(x)
    for r, c in ((0, 0), (0, 2), (1, 0), (1, 2)):
        assert torch.equal(tokens[:, 3 * r + c], x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(1))
    assert torch.equal(flow.unpatchify(tokens), x)
    y = torch.tensor([-1, min(1, num_classes - 1)])
    encoded = flow(x, y)
    torch.testing.assert_close(flow.decode(encoded.z, y), x, atol=1e-4, rtol=0)
    assert flow.sample(torch.zeros_like(x), y).shape == flow.denoise(x, y, 0.1).shape == x.shape


def test_equal_sides_are_one_number() -> None:
    """So that a network has one config, and one document, however its size was given."""
    square, rectangle = TarFlowConfig(3, (8, 8), 2, 64, (1,)), TarFlowConfig(3, (8, 4), 2, 64, (1,))
    assert square == TarFlowConfig(3, 8, 2, 64, (1,)) and square.image_size == 8 and square.image_sides == (8, 8)
    assert rectangle.image_size == rectangle.image_sides == (8, 4)


@pytest.mark.parametrize("size", [9, (8, 9), (9, 8), (9, 9), (8, 0), (-2, 8)])
def test_a_patch_divides_both_sides(size: int | tuple[int, int]) -> None:
    message = "got image size (9|8×9|9×8) and patch 2; the patch must divide the image|got a size below 1"
    with pytest.raises(ValueError, match=message):
        TarFlowConfig(3, size, 2, 64, (1,))
    with pytest.raises(ValueError, match=message):
        SiTConfig(3, size, 2, 8, 1, 2, 3)


@pytest.mark.parametrize("y", [torch.tensor([0, 2, -1, 1]), torch.full((4,), -1), None])
def test_decode_inverts_encode(y: Tensor | None) -> None:
    flow = small()
    x = torch.rand(4, 2, 4, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    torch.testing.assert_close(flow.decode(flow(x, y).z, y), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guide", [Guide(), Guide(weight=0.5)])
def test_decoding_reports_each_of_its_steps(guide: Guide) -> None:
    flow = small()
    steps: list[int] = []
    flow.sample(torch.zeros(3, 2, 4, 4), torch.tensor([0, 1, 2]), guide, steps.append)
    assert sum(steps) == flow.config.decode_steps == 3 * (4 - 1)


def test_a_dropped_label_is_the_mean_class_in_both_directions() -> None:
    flow = small()
    x = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    dropped = torch.full((2,), -1)
    assert torch.equal(flow(x, dropped).z, flow(x, None).z)
    assert torch.equal(flow.decode(x, dropped), flow.decode(x, None))
    assert not torch.allclose(flow.decode(x, dropped), flow.decode(x, torch.full((2,), 2)))


def test_nothing_of_size_tokens_squared_is_kept() -> None:
    flow = TarFlow(TarFlowConfig(1, 16, 2, 8, (1,), head_dim=8))
    assert all(buffer.numel() < flow.config.tokens**2 for buffer in flow.buffers())
    assert not [name for name, _ in flow.named_buffers() if "cache" in name or "mask" in name]


def test_a_token_depends_only_on_those_before_it() -> None:
    block = small().blocks[0]
    u = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(4))
    changed = u.clone()
    changed[:, 2] += 1
    first, second = block(u, torch.tensor([0]))[0], block(changed, torch.tensor([0]))[0]
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 3], second[:, 3])


def test_denoising_a_gaussian_is_tweedies_formula() -> None:
    """A flow that is the identity has p(x) = N(0, I), whose score is -x: one step gives (1 - η²)·x."""
    flow = TarFlow(TarFlowConfig(1, 4, 2, 8, (1, 1), head_dim=8)).requires_grad_(False)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(flow.denoise(x, None, eta=0.5), 0.75 * x)


def test_bits_per_dim_of_a_uniform_density() -> None:
    """Density ½ on [-1, 1], 256 levels spaced 2/255: log2(255) bits (0.5·log 2π is added back to `nll`)."""
    nats = np.log(2) - 0.5 * np.log(2 * np.pi)
    assert bits_per_dim(nats) == pytest.approx(np.log2(255))


def test_bits_per_dim_of_a_continuous_density() -> None:
    """Of N(0, I), whose `nll` at the average is ½ and its entropy ½·log2(2πe) bits."""
    assert bits_per_dim(0.5, levels=None) == pytest.approx(0.5 * np.log2(2 * np.pi * np.e))


def test_notation() -> None:
    assert parse_notation("TF-6×2+2×26-1024/2") == {"depths": (2,) * 6 + (26,) * 2, "width": 1024, "patch": 2}
    assert parse_notation("TF-8x8-768/2") == {"depths": (8,) * 8, "width": 768, "patch": 2}


@pytest.mark.parametrize(
    "text",
    ["", "TF-8-768/2", "TF-8×8-768", "SiT-XL/2", "TF-8×8+-768/2", "TF-8×٣-768/2", "TF-0×8-768/2", "TF-9999999×8-8/2"],
)
def test_notation_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="expected one like"):
        parse_notation(text)


def test_parameters_of_the_papers_teacher() -> None:
    """Table 9 gives 823 (million) for TF-6×2+2×26-1024/2 at 64×64 and 460 for TF-8×8-768/2."""
    for notation, millions in (("TF-6×2+2×26-1024/2", 823), ("TF-8×8-768/2", 460)):
        with torch.device("meta"):
            flow = TarFlow(TarFlowConfig(3, 64, num_classes=1000, **parse_notation(notation)))
        count = sum(parameter.numel() for parameter in flow.parameters()) / 1e6
        assert count == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize(("nvp", "num_classes", "expansion"), [(True, 5, 4), (False, 0, 3)])
def test_forward_flops_are_those_that_torch_counts(nvp: bool, num_classes: int, expansion: int) -> None:
    flow = TarFlow(
        TarFlowConfig(3, 8, 2, 24, (1, 3), num_classes=num_classes, head_dim=8, expansion=expansion, nvp=nvp)
    )
    y = torch.tensor([0, -1]) if num_classes else None
    # torch's counter has no formula for the fused attention of the CPU; the unfused is matrix products, which it counts
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        flow(torch.zeros(2, 3, 8, 8), y)
    assert counter.get_total_flops() == 2 * forward_flops(flow.config)
