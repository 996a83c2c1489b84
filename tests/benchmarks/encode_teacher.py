"""The teacher's forward pass beside the plain published one: images per second, FLOP/s and rounding error of z.

`Published` below is the formulation of apple/ml-tarflow, written out as the baseline: a stored causal mask for every
attention, and a host sync for dropped labels. It loads the same weights, and its z is held against ours before
anything is timed. Both run without gradients, take turns within one process, and see the batches of the encode stage.

    python -m tests.benchmarks.encode_teacher [--quick] [--parts gpu]
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfm.models.tarflow import Encoded, TarFlow, TarFlowConfig, forward_flops, parse_notation
from nfm.stages.encode import BATCH_TOKENS, batch_rows

AGREEMENT = 1e-4  # largest |Δz| between the two formulations in float32, in units of rms(z)
PRECISIONS = ("float32", "TF32", "bfloat16")
# Dense matrix peaks in TFLOP/s by the name of the device: NVIDIA's data sheets of H100 (SXM), H200 (SXM) and A100
# (SXM), half of what they give "with sparsity". float32 matrix products run on the CUDA cores.
HOPPER_SXM = {"float32": 67.0, "TF32": 494.5, "bfloat16": 989.5}
AMPERE_SXM = {"float32": 19.5, "TF32": 156.0, "bfloat16": 312.0}
PEAKS = {
    "NVIDIA H100 80GB HBM3": HOPPER_SXM,
    "NVIDIA H200": HOPPER_SXM,
    "NVIDIA A100-SXM4-40GB": AMPERE_SXM,
    "NVIDIA A100-SXM4-80GB": AMPERE_SXM,
}


def case(shape: tuple[int, int], notation: str, num_classes: int, head_dim: int = 64) -> tuple[str, TarFlowConfig]:
    """A teacher for images of shape (C, H = W), with its name."""
    config = TarFlowConfig(*shape, num_classes=num_classes, head_dim=head_dim, **parse_notation(notation))
    return f"{shape[0]}×{shape[1]}×{shape[1]} {notation}", config


DIGITS = case((1, 8), "TF-4×2-48/2", 10, head_dim=24)  # the digits preset
SMALL = case((3, 32), "TF-4×4-256/4", 10)
CIFAR10 = case((3, 32), "TF-4×4-512/2", 10)  # the cifar10 preset
NARROW = case(
    (3, 64), "TF-6×2+2×26-128/2", 1000
)  # blocks and tokens of the imagenet64 preset at an eighth of its width
IMAGENET64 = case((3, 64), "TF-6×2+2×26-1024/2", 1000)  # the imagenet64 preset


class PublishedAttention(nn.Module):
    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.heads, self.scale = config.width // config.head_dim, config.head_dim**-0.5

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, d = x.shape
        h = self.norm(x.float()).type(x.dtype)
        q, k, v = self.qkv(h).reshape(b, t, 3 * self.heads, -1).transpose(1, 2).chunk(3, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool(), scale=self.scale)
        result: Tensor = self.proj(out.transpose(1, 2).reshape(b, t, d))  # (B, T, D)
        return result


class PublishedMLP(nn.Module):
    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        inner = config.width * config.expansion
        self.norm = nn.LayerNorm(config.width)
        self.main = nn.Sequential(nn.Linear(config.width, inner), nn.GELU(), nn.Linear(inner, config.width))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.main(self.norm(x.float()).type(x.dtype))
        return result


class PublishedLayer(nn.Module):
    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.attention, self.mlp = PublishedAttention(config), PublishedMLP(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(x, mask)  # (B, T, D)
        result: Tensor = x + self.mlp(x)
        return result


class PublishedBlock(nn.Module):
    attn_mask: Tensor

    def __init__(self, config: TarFlowConfig, depth: int, flip: bool) -> None:
        super().__init__()
        self.flip, self.nvp = flip, config.nvp
        self.proj_in = nn.Linear(config.token_dim, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.tokens, config.width))
        classes = config.num_classes
        self.class_embed = nn.Parameter(torch.empty(classes, 1, config.width)) if classes else None
        self.attn_blocks = nn.ModuleList(PublishedLayer(config) for _ in range(depth))
        self.proj_out = nn.Linear(config.width, config.token_dim * (2 if config.nvp else 1))
        self.register_buffer("attn_mask", torch.tril(torch.ones(config.tokens, config.tokens)), persistent=False)

    def permute(self, x: Tensor, dim: int = 1) -> Tensor:
        return x.flip(dims=[dim]) if self.flip else x

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        x_in = self.permute(x)
        h = self.proj_in(x_in) + self.permute(self.pos_embed, 0)  # (B, T, D)
        if self.class_embed is not None:
            if y is None:
                h = h + self.class_embed.mean(dim=0)
            elif (y < 0).any():
                dropped = (y < 0).float().view(-1, 1, 1)
                h = h + (1 - dropped) * self.class_embed[y] + dropped * self.class_embed.mean(dim=0)
            else:
                h = h + self.class_embed[y]
        for layer in self.attn_blocks:
            h = layer(h, self.attn_mask)
        out = self.proj_out(h)
        out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)
        xa, xb = out.chunk(2, dim=-1) if self.nvp else (torch.zeros_like(out), out)
        scale = (-xa.float()).exp().type(xa.dtype)
        return self.permute((x_in - xb) * scale), -xa.mean(dim=[1, 2])


class Published(nn.Module):
    """z as tokens (B, T, P), as published: the last reshuffle to images is ours alone."""

    def __init__(self, flow: TarFlow) -> None:
        super().__init__()
        self.patch = flow.config.patch
        self.blocks = nn.ModuleList(
            PublishedBlock(flow.config, d, i % 2 == 1) for i, d in enumerate(flow.config.depths)
        )
        self.register_buffer("var", torch.empty_like(flow.var))
        self.load_state_dict(flow.state_dict())

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        u = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (B, T, P)
        logdet = torch.zeros((), device=x.device)
        for block in self.blocks:
            u, block_logdet = block(u, y)
            logdet = logdet + block_logdet
        return u, logdet


Output = Encoded | tuple[Tensor, Tensor]


def tokens(flow: TarFlow, out: Output) -> Tensor:
    """z as (B, T, P), whichever network gave it."""
    return out[0] if isinstance(out, tuple) else flow.patchify(out.z)


def random_teacher(config: TarFlowConfig, device: torch.device) -> TarFlow:
    """Random weights, whose z is clearly not x: `proj_out`, zero at the start of training, is drawn too."""
    torch.manual_seed(0)
    flow = TarFlow(config)
    for name, parameter in flow.named_parameters():
        if "proj_out" in name:
            nn.init.normal_(parameter, std=0.2 / (config.width**0.5 if name.endswith("weight") else 1))
    return flow.requires_grad_(False).to(device)


def inputs(config: TarFlowConfig, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] with noise of η = 0.1, (rows, C, H, W), and their labels (rows,)."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, config.channels, *config.image_sides)
    x = torch.rand(shape, generator=generator) * 2 - 1 + 0.1 * torch.randn(shape, generator=generator)
    y = torch.randint(config.num_classes, (rows,), generator=generator)
    return x.to(device), y.to(device)


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Matrix products in float32, TF32 or (by autocast) bfloat16."""
    previous = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = previous


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def error(z: Tensor, exact: Tensor) -> dict[str, float]:
    """Root mean square and maximum of z - exact, in units of rms(exact)."""
    difference = z.double() - exact
    scale = rms(exact)
    return {"rms": rms(difference) / scale, "max": difference.abs().max().item() / scale}


def seconds_per_call(call: Callable[[], Output], count: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def take_turns(
    calls: dict[str, Callable[[], Output]], rounds: int, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per call by name: in each round one measurement of about `seconds` of every call, first to last in even
    rounds and last to first in odd ones."""
    counts = {}
    for name, call in calls.items():
        seconds_per_call(call, 1, device)
        counts[name] = max(1, round(seconds / seconds_per_call(call, 1, device)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)
        if number % 2:
            names.reverse()
        for name in names:
            times[name].append(seconds_per_call(calls[name], counts[name], device))
    return times


@torch.no_grad()
def measure_cpu(cases: dict[str, TarFlowConfig], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Images per second in float32, on one thread and on all. `ratio`, ours over published, is the rounds' median."""
    device = torch.device("cpu")
    previous_threads = torch.get_num_threads()
    results: list[dict[str, Any]] = []
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        torch.set_num_threads(threads)
        for name, config in cases.items():
            flow, rows = random_teacher(config, device), batch_rows(config, "cpu")
            x, y = inputs(config, rows, device)
            calls: dict[str, Callable[[], Output]] = {
                "ours": partial(flow, x, y),
                "published": partial(Published(flow), x, y),
            }
            z = {key: tokens(flow, call()) for key, call in calls.items()}
            difference = error(z["published"], z["ours"].double())["max"]
            assert difference < AGREEMENT, f"{name}: z differs by {difference:.1e} rms(z)"
            times = take_turns(calls, rounds, seconds, device)
            ratios = [published / ours for ours, published in zip(times["ours"], times["published"], strict=True)]
            rates = {key: rows / statistics.median(seconds_of_key) for key, seconds_of_key in times.items()}
            results.append(
                {
                    "case": name,
                    "rows": rows,
                    "threads": threads,
                    "ours_images_per_s": rates["ours"],
                    "published_images_per_s": rates["published"],
                    "ratio": statistics.median(ratios),
                    "ratio_low": min(ratios),
                    "ratio_high": max(ratios),
                    "ours_flop_per_s": rates["ours"] * forward_flops(config),
                    "largest_difference": difference,
                }
            )
    torch.set_num_threads(previous_threads)
    return results


@torch.no_grad()
def measure_gpu(cases: dict[str, TarFlowConfig], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Both formulations, as they are and compiled, in every precision: images per second, FLOP/s and their share of
    the device's peak (None: unknown), and the error of z against float64 on the first images of the batch timed."""
    device = torch.device("cuda")
    results: list[dict[str, Any]] = []
    peaks = PEAKS.get(torch.cuda.get_device_name(), {})
    for name, config in cases.items():
        flow, rows = random_teacher(config, device), batch_rows(config, "cuda")
        networks = {"ours": flow, "published": Published(flow).to(device)}
        x, y = inputs(config, rows, device)
        first = slice(min(rows, 4))  # images whose error is measured
        exact = flow.patchify(copy.deepcopy(flow).double()(x[first].double(), y[first]).z)  # (≤ 4, T, P)
        for mode in PRECISIONS:
            torch.compiler.reset()  # each precision compiles anew; none may run into the limit on recompiling
            calls: dict[str, Callable[[], Output]] = {}
            for key, network in networks.items():
                calls[key] = partial(network, x, y)
                calls[f"{key}, compiled"] = partial(torch.compile(network), x, y)
            with precision(mode, device):
                first_call_seconds = {key: seconds_per_call(call, 1, device) for key, call in calls.items()}
                errors = {key: error(tokens(flow, call())[first], exact) for key, call in calls.items()}
                if mode == "float32":
                    assert max(error_of_key["max"] for error_of_key in errors.values()) < AGREEMENT, errors
                times = take_turns(calls, rounds, seconds, device)
            for key, seconds_of_key in times.items():
                rate = rows / statistics.median(seconds_of_key)
                flop_per_s = rate * forward_flops(config)
                results.append(
                    {
                        "case": name,
                        "rows": rows,
                        "network": key,
                        "precision": mode,
                        "images_per_s": rate,
                        "low": rows / max(seconds_of_key),
                        "high": rows / min(seconds_of_key),
                        "flop_per_s": flop_per_s,
                        "of_peak": flop_per_s / (peaks[mode] * 1e12) if peaks else None,
                        "first_call_s": first_call_seconds[key],
                        "error": errors[key],
                    }
                )
    return results


@torch.no_grad()
def measure_errors(device: torch.device, case: tuple[str, TarFlowConfig] = SMALL) -> dict[str, Any]:
    """Rounding of z against float64 in units of rms(z), in each precision, beside that of storing the exact z as
    float16; and the largest differences in float32 between batches of 1, 7 and 64 images and, on CPU, 1 and 2
    threads."""
    name, config = case
    flow = random_teacher(config, device)
    x, y = inputs(config, 64, device)
    first = slice(8)  # images whose error is measured: bfloat16 is slow on a CPU without units for it
    exact = copy.deepcopy(flow).double()(x[first].double(), y[first]).z
    errors = {"exact z stored as float16": error(exact.half(), exact)}
    for mode in PRECISIONS if device.type == "cuda" else ("float32", "bfloat16"):
        with precision(mode, device):
            errors[mode] = error(flow(x[first], y[first]).z, exact)

    def encode(batch: int) -> Tensor:
        pairs = zip(x.split(batch), y.split(batch), strict=True)
        return torch.cat([flow(part, labels).z for part, labels in pairs])

    def spread(z: list[Tensor]) -> float:
        """The largest difference between several z of the same images, in units of rms(z)."""
        stacked = torch.stack(z)
        return (stacked.amax(0) - stacked.amin(0)).max().item() / rms(exact)

    result: dict[str, Any] = {
        "case": name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "rms_z": rms(exact),
        "rms_z_minus_x": rms(exact - x[first]),
        "errors": errors,
    }
    with precision("float32", device):
        result["batches"] = spread([encode(batch) for batch in (1, 7, 64)])
    if device.type == "cpu":
        previous_threads = torch.get_num_threads()
        z: list[Tensor] = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            z.append(encode(64))
        torch.set_num_threads(previous_threads)
        result["threads"] = spread(z)
    return result


PARTS = ("cpu", "errors", "gpu")


def measure(quick: bool, parts: Collection[str] = PARTS) -> dict[str, Any]:
    """About 3 minutes on two CPU cores; `quick`: half a minute. What needs a GPU is left out where there is none."""
    results: dict[str, Any] = {}
    rounds, seconds = (3, 0.1) if quick else (9, 0.3)
    cuda = torch.cuda.is_available()
    if "cpu" in parts:
        cases = [DIGITS, SMALL, NARROW] if quick else [DIGITS, SMALL, CIFAR10, NARROW]
        results["cpu"] = measure_cpu(dict(cases), rounds, seconds)
    if "errors" in parts:
        devices = [torch.device(name) for name in (["cpu", "cuda"] if cuda else ["cpu"])]
        cases = [DIGITS] if quick else [DIGITS, SMALL]
        results["errors"] = [measure_errors(device, case) for device in devices for case in cases]
    if "gpu" in parts and cuda:
        results["gpu"] = measure_gpu(dict([CIFAR10] if quick else [CIFAR10, IMAGENET64]), rounds, seconds)
        results["device"] = torch.cuda.get_device_name()
    return results


def table(results: dict[str, Any]) -> list[str]:
    """Markdown of what `measure` gave."""
    lines: list[str] = []
    if "cpu" in results:
        lines += [
            f"Forward pass on CPU, float32, batches of {BATCH_TOKENS['cpu']:,} tokens. The formulations take turns; "
            "the ratio is the median of the rounds'. "
            "FLOP/s count attention as dense, of which ours skips the masked half.",
            "",
            "| teacher | batch | threads | ours, images/s | published, images/s | ours / published | range "
            "| ours, GFLOP/s | largest Δz / rms(z) |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *(
                f"| {row['case']} | {row['rows']} | {row['threads']} | {row['ours_images_per_s']:,.4g} "
                f"| {row['published_images_per_s']:,.4g} | {row['ratio']:.2f} "
                f"| {row['ratio_low']:.2f} to {row['ratio_high']:.2f} | {row['ours_flop_per_s'] / 1e9:.0f} "
                f"| {row['largest_difference']:.0e} |"
                for row in results["cpu"]
            ),
            "",
        ]
    if "errors" in results:
        lines += [
            "Error of z against float64, in units of rms(z), and its largest difference in float32 "
            "between batches of 1, 7 and 64 images and between 1 and 2 threads. Weights are random.",
            "",
            "| teacher | device | rms(z) | rms(z − x) | z | rms error | largest error | batches | threads |",
            "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for result in results["errors"]:
            for name, row in result["errors"].items():
                differences = {"batches": "", "threads": ""}
                if name == "float32":
                    differences |= {key: f"{result[key]:.0e}" for key in differences if key in result}
                lines.append(
                    f"| {result['case']} | {result['device']} | {result['rms_z']:.2f} | {result['rms_z_minus_x']:.2f} "
                    f"| {name} | {row['rms']:.1e} | {row['max']:.1e} | {differences['batches']} "
                    f"| {differences['threads']} |"
                )
        lines.append("")
    if "gpu" in results:
        lines += [
            f"Forward pass on {results['device']}, batches of {BATCH_TOKENS['cuda']:,} tokens, "
            "and the error of z against float64 in units of rms(z). "
            "Peaks are those of dense matrix products in the vendor's data sheet.",
            "",
            "| teacher | batch | precision | network | images/s | range | TFLOP/s | of peak | first call, s "
            "| rms error | largest error |",
            "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *(
                f"| {row['case']} | {row['rows']} | {row['precision']} | {row['network']} | {row['images_per_s']:,.4g} "
                f"| {row['low']:,.4g} to {row['high']:,.4g} | {row['flop_per_s'] / 1e12:.1f} "
                f"| {'unknown' if row['of_peak'] is None else format(row['of_peak'], '.0%')} "
                f"| {row['first_call_s']:.1f} | {row['error']['rms']:.1e} | {row['error']['max']:.1e} |"
                for row in results["gpu"]
            ),
            "",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and teachers")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    print("\n".join(table(measure(args.quick, args.parts))))


if __name__ == "__main__":
    main()
