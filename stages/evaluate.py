"""evaluate: samples, couplings, teacher and students → every number of the report, and its same-seed images."""

import io
import time
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor, nn

from nfm.models.fields import Guided
from nfm.models.metrics import PixelFeatures, curvature, frechet_metric, z_space
from nfm.models.sit import SiT
from nfm.models.solvers import Sampler, parse_sampler
from nfm.models.tarflow import TarFlow, bits_per_dim
from nfm.stages.checkpoint import load_network, weights_sha256
from nfm.stages.errors import StageError
from nfm.stages.progress import Progress
from nfm.stages.section import Section
from nfm.storage_specs.format.noise import standard_normal
from nfm.storage_specs.format.pixels import to_float, to_uint8
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.files import Root

Positive = Annotated[int, Field(ge=1)]
ROUNDTRIP_IMAGES = 2048  # held-out images that the teacher encodes and decodes again


class EvaluateConfig(Section):
    """`samplers` as the paper names them: heun31, euler5, optionally with a schedule (euler128:t; t² otherwise).

    `features` is what the Fréchet distance is taken over: "inception" (then it is FID), or "pixels".
    """

    samples: Positive
    samplers: list[str]
    features: Literal["pixels", "inception"]
    guidance: Annotated[float, Field(ge=0)] = 1.0
    batch_size: Positive = 512
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    grid_columns: Positive = 20
    grid_samplers: list[str]

    @field_validator("samplers", "grid_samplers")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            parse_sampler(name)
        return names


class FrechetDistance:
    """Fréchet distance of images in [-1, 1] to those of a store."""

    def __init__(self, config: EvaluateConfig, reference: Store, device: torch.device) -> None:
        self.pixels = config.features == "pixels"
        features: nn.Module | int = PixelFeatures(reference.spec.dim) if self.pixels else 2048
        try:
            self.metric = frechet_metric(features).to(device)
        except ModuleNotFoundError as error:
            raise StageError(
                f"evaluate.features = 'inception' needs torch-fidelity ({error}); install it, or use 'pixels'"
            ) from error
        self.batch_size, self.device = config.batch_size, device
        self.update_store(reference, all_rows(reference), real=True)

    def update_store(self, store: Store, rows: NDArray[np.int64], real: bool) -> None:
        """Images of a store, a batch at a time: it may be larger than memory."""
        for start in range(0, len(rows), self.batch_size):
            self._update(images_of(store, rows[start : start + self.batch_size]), real)

    def of_store(self, store: Store, rows: NDArray[np.int64]) -> float:
        self.metric.reset()
        self.update_store(store, rows, real=False)
        return float(self.metric.compute())

    def _update(self, images: Tensor, real: bool) -> None:
        for part in images.split(self.batch_size):
            if not self.pixels:
                part = torch.from_numpy(to_uint8(part)).expand(-1, 3, -1, -1)
            self.metric.update(part.to(self.device), real=real)

    def __call__(self, images: Tensor) -> float:
        self.metric.reset()  # keeps the reference
        self._update(images.clamp(-1, 1), real=False)
        return float(self.metric.compute())


def images_of(store: Store, rows: NDArray[np.int64]) -> Tensor:
    """x of some rows, (len(rows), C, H, W) in [-1, 1]."""
    return to_float(store.images(rows))


def all_rows(store: Store) -> NDArray[np.int64]:
    return np.arange(store.spec.rows, dtype=np.int64)


def evaluate(
    config: EvaluateConfig, samples: str, couplings: str, teacher: str, students: dict[str, str]
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """All metrics, and uint8 image arrays for the grids: "real", "teacher", "<coupling> <sampler>"."""
    train, val = Store(f"{samples}/train", kind="samples"), Store(f"{samples}/val", kind="samples")
    pairs = Store(couplings, kind="couplings")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, document = load_network(teacher, "TarFlow")
    assert isinstance(network, TarFlow) and pairs.spec.coupling is not None
    if pairs.spec.coupling.source != train.dataset.id:
        raise StageError(
            f"{couplings}: got a store encoded from other samples than {train.url}; give the samples it was made from"
        )
    if weights_sha256(network.state_dict()) != pairs.spec.coupling.teacher.sha256:
        raise StageError(f"{teacher}: got another teacher than the one that encoded {couplings}; give that one")
    loaded = {name: load_student(url, pairs) for name, url in students.items()}
    evaluation = Evaluation(config, train, val, pairs, network.to(device), device)
    metrics: dict[str, Any] = {
        "fd": {
            "features": config.features,
            "samples": config.samples,
            "reference": train.spec.rows,
            "floor": {"fd": evaluation.fd.of_store(val, all_rows(val)), "samples": val.spec.rows},
            "resampled": {"fd": evaluation.fd.of_store(train, evaluation.resampled()), "samples": config.samples},
        },
        "teacher": {"bpd": bits_per_dim(document["training"]["val"])},
        "students": {},
        "zspace": evaluation.z_space(),
        "encode": evaluation.encode_totals(),
        "curves": {"teacher": document["curves"]},
    }
    evaluation.start(len(students) * len(config.samplers) + 1)
    with evaluation.progress:
        metrics["teacher"] |= evaluation.teacher_metrics()
        for name, (student, document) in loaded.items():
            metrics["students"][name] = {"loss": final_loss(document["curves"])} | evaluation.student(
                name, student.to(device)
            )
            metrics["curves"][name] = document["curves"]
    return metrics, evaluation.grids


def load_student(url: str, pairs: Store) -> tuple[SiT, dict[str, Any]]:
    student, document = load_network(url, "SiT")
    assert isinstance(student, SiT)
    seen = document["run"].get("couplings")
    if pairs.dataset.id not in ([store["id"] for store in seen] if isinstance(seen, list) else [seen]):
        raise StageError(f"{url}: got a student of other couplings than {pairs.url}; give the ones it saw")
    return student, document


def save_evaluation(root: Root, metrics: dict[str, Any], grids: dict[str, np.ndarray[Any, Any]]) -> None:
    """`grids.npz`, then `metrics.json`, whose presence means that the evaluation is complete."""
    buffer = io.BytesIO()
    # NumPy types every keyword as if it might be allow_pickle, which no grid is called.
    np.savez_compressed(buffer, **grids)  # type: ignore[arg-type]
    root.write("grids.npz", buffer.getvalue())
    root.write("metrics.json", canonical_json(metrics))


def final_loss(curves: dict[str, list[float]]) -> float:
    """Mean training loss over the last tenth of the run."""
    images, loss = curves["images"], curves["loss"]
    last = [value for at, value in zip(images, loss, strict=True) if at > 0.9 * images[-1]]
    return sum(last) / len(last)


class Evaluation:
    """Everything the measurements share: the same noise and labels for teacher and students alike."""

    progress: Progress

    def __init__(
        self, config: EvaluateConfig, train: Store, val: Store, pairs: Store, teacher: TarFlow, device: torch.device
    ) -> None:
        assert pairs.spec.coupling is not None
        self.config, self.train, self.val, self.pairs, self.device = config, train, val, pairs, device
        self.teacher, self.eta = teacher, pairs.spec.coupling.eta
        self.fd = FrechetDistance(config, train, device)
        generator = torch.Generator().manual_seed(config.seed)
        labels = torch.from_numpy(train.labels())
        self.y = labels[torch.randint(len(labels), (config.samples,), generator=generator)]
        self.noise = torch.randn((config.samples, *train.spec.shape), generator=generator)
        columns = config.grid_columns
        self.grid_y = torch.arange(columns) % train.spec.num_classes
        self.grid_noise = torch.randn((columns, *train.spec.shape), generator=generator)
        self.grids = {"real": self._real_row()}

    def start(self, steps: int) -> None:
        self.progress = Progress("evaluate", steps, "sampler")

    def _real_row(self) -> np.ndarray[Any, Any]:
        """One image of each class in turn, for comparison."""
        labels = self.train.labels()
        rows = [np.flatnonzero(labels == y) for y in self.grid_y.tolist()]
        chosen = [int(of_class[i % len(of_class)]) if len(of_class) else 0 for i, of_class in enumerate(rows)]
        return self.train.images(np.array(chosen, dtype=np.int64))

    def resampled(self) -> NDArray[np.int64]:
        """As many training images as there are generated ones, drawn with replacement: sampling noise alone."""
        generator = torch.Generator().manual_seed(self.config.seed)
        rows: NDArray[np.int64] = torch.randint(
            self.train.spec.rows, (self.config.samples,), generator=generator
        ).numpy()
        return rows

    def _now(self) -> float:
        """The clock, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def _batches(self, noise: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = self.config.batch_size
        return [(n.to(self.device), c.to(self.device)) for n, c in zip(noise.split(size), y.split(size), strict=True)]

    @torch.no_grad()
    def _teacher_samples(self, noise: Tensor, y: Tensor) -> Tensor:
        """f⁻¹(σ_f·ε), so that the student and its teacher start from the same point; η-noise removed by a score
        step.
        """
        sigma_f = torch.from_numpy(self.pairs.sigma_f.copy()).to(self.device)
        images = [
            self.teacher.denoise(self.teacher.decode(n * sigma_f, c), c, self.eta) for n, c in self._batches(noise, y)
        ]
        return torch.cat(images).cpu()

    @torch.no_grad()
    def teacher_metrics(self) -> dict[str, float]:
        rows = all_rows(self.val)[:ROUNDTRIP_IMAGES]
        x = images_of(self.val, rows).to(self.device)
        y = torch.from_numpy(self.val.labels()[rows]).to(self.device)
        error = 0.0
        for part, label in zip(x.split(self.config.batch_size), y.split(self.config.batch_size), strict=True):
            error = max(error, (self.teacher.decode(self.teacher(part, label).z, label) - part).abs().max().item())
        start = self._now()
        images = self._teacher_samples(self.noise, self.y)
        seconds = self._now() - start
        self.grids["teacher"] = to_uint8(self._teacher_samples(self.grid_noise, self.grid_y))
        self.progress.advance(1)
        return self._fds(images) | {
            "roundtrip_max_abs": error,
            "seconds_per_1000": 1000 * seconds / len(images),
            "parameters": sum(p.numel() for p in self.teacher.parameters()),
        }

    def _fds(self, images: Tensor) -> dict[str, float]:
        """FD of all samples, and of as many as the held-out split has, which compares with the noise floor."""
        return {"fd": self.fd(images), "fd_at_floor_samples": self.fd(images[: self.val.spec.rows])}

    @torch.no_grad()
    def student(self, name: str, network: SiT) -> dict[str, Any]:
        field = Guided(network, self.config.guidance)
        results: dict[str, Any] = {"parameters": sum(p.numel() for p in network.parameters())}
        for text in self.config.samplers:
            sampler = parse_sampler(text)
            kappas, images, start = [], [], self._now()
            for n, c in self._batches(self.noise, self.y):
                trajectory = sampler(field, n, c)
                images.append(trajectory.x)
                kappas.append(curvature(trajectory))
            seconds = self._now() - start
            x = torch.cat(images)
            if not torch.isfinite(x).all():
                raise FloatingPointError(f"student {name} with {text} made samples that are not finite")
            results[sampler.name] = self._fds(x.cpu()) | {
                "curvature": torch.cat(kappas).mean().item(),
                "seconds_per_1000": 1000 * seconds / len(x),
            }
            self.progress.advance(1, f"{name} {sampler.name}")
        for text in self.config.grid_samplers:
            self.grids[f"{name} {text}"] = self._grid(field, parse_sampler(text))
        return results

    def _grid(self, field: Guided, sampler: Sampler) -> np.ndarray[Any, Any]:
        return to_uint8(sampler(field, self.grid_noise.to(self.device), self.grid_y.to(self.device)).x)

    @torch.no_grad()
    def z_space(self) -> dict[str, dict[str, float]]:
        """Table 1: distances of noisy images and of their representations, over up to `samples` pairs of images."""
        count = min(self.train.spec.rows, self.config.samples)
        first = np.arange(count, dtype=np.int64)
        second = np.roll(first, 1)
        x, labels = images_of(self.train, first), torch.from_numpy(self.train.labels()[first])
        noises = [torch.from_numpy(standard_normal(self.config.seed, first, k, self.train.spec.shape)) for k in (0, 1)]
        inputs, outputs = [], []
        for rows, e in ((first, 0), (first, 1), (second, 0), (second, 1)):
            noisy = x[rows] + self.eta * noises[e]
            inputs.append(noisy)
            outputs.append(torch.cat([self.teacher(n, c).z.cpu() for n, c in self._batches(noisy, labels[rows])]))
        return {"dx": asdict(z_space(*inputs)), "dz": asdict(z_space(*outputs))}

    def encode_totals(self) -> dict[str, float]:
        spec = self.pairs.spec
        return {
            "images": spec.rows,
            "draws": spec.draws,
            "shards": self.pairs.dataset.totals.files,
            "seconds": self.pairs.cost.total if self.pairs.cost else 0.0,
        }
