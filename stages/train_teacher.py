"""train-teacher: sample store → TarFlow checkpoint."""

from contextlib import closing
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from nfm.models.labels import drop_labels
from nfm.models.tarflow import NOTATION_GRAMMAR, TarFlow, TarFlowConfig, bits_per_dim, nll, parse_notation
from nfm.stages.errors import StageError
from nfm.stages.progress import Progress
from nfm.stages.section import Section
from nfm.stages.splits import open_splits
from nfm.stages.support import levels_of
from nfm.stages.training import TrainConfig, Trainer, join_world, open_stream
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream

VAL_IMAGES = 4096  # largest number of held-out images in one validation
VAL_DRAWS = 4  # noise draws of each of them
VAL_BATCH = 512


class TeacherConfig(Section):
    """The TarFlow teacher and its training."""

    notation: str = Field(
        description="Sizes of the TarFlow in the paper's notation (NFM paper section 4).",
        json_schema_extra={"grammar": NOTATION_GRAMMAR},
    )
    head_dim: int = Field(
        default=64, ge=1, description="Channels of one attention head. Must divide the width in `notation`."
    )
    eta: float = Field(
        gt=0,
        description="η, the amount of noise added to the data: "
        "the teacher sees x + η·ε′, with x in [-1, 1], or scaled latents, and ε′ standard normal.",
    )
    label_drop: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Probability that an image is trained without its class label, for classifier-free guidance.",
    )
    train: TrainConfig = Field(description="Training of the teacher.")

    @field_validator("notation")
    @classmethod
    def _check_notation(cls, notation: str) -> str:
        parse_notation(notation)
        return notation


def teacher_network(config: TeacherConfig, store: Store) -> TarFlow:
    channels, height, width = store.spec.shape
    try:
        parsed = parse_notation(config.notation)
        return TarFlow(
            TarFlowConfig(
                channels=channels,
                image_size=(height, width),
                num_classes=store.spec.num_classes,
                head_dim=config.head_dim,
                **parsed,
            )
        )
    except ValueError as error:
        raise StageError(f"teacher: {error}") from error


def train_teacher(config: TeacherConfig, samples: str, out: str) -> dict[str, Any]:
    """Train a teacher in the folder `out` on the samples in `<samples>/train`, where `samples` is what prepare wrote.

    Of the checkpoints, the one with the lowest NLL of `<samples>/val` is kept. Returns the document of the finished
    model, with its held-out bits per dimension as "bpd" (of latents: those of their density). Raises StageError or
    StoreError for samples, sizes or a folder that do not fit, FloatingPointError if training becomes not finite.
    """
    train, val = open_splits(samples)

    def loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """-log p(x + η·ε′) per dimension (NFM paper equation 3), with labels dropped."""
        noise = torch.randn(batch.x.shape, generator=generator).to(batch.x.device)
        y = drop_labels(batch.label, config.label_drop, generator)
        return nll(model(batch.x + config.eta * noise, y))

    with join_world() as world:
        stream = open_stream(train.version_url, "samples", config.train, world)  # first: are its files there?
        with Progress("build the network", enabled=world.is_first_rank):
            torch.manual_seed(config.train.seed)
            network = teacher_network(config, train)
        trainer = Trainer(
            "train-teacher",
            network,
            loss,
            stream,
            config.train,
            out,
            {"teacher": config.model_dump(mode="json"), "samples": train.dataset.id},
            world,
            validate=lambda model, progress: held_out_nll(model, val, config.eta, world.device, progress),
        )
        document = trainer.run()
    return document | {"bpd": bits_per_dim(document["training"]["val"], levels_of(train.spec.x))}


@torch.no_grad()
def held_out_nll(model: nn.Module, store: Store, eta: float, device: torch.device, progress: Progress) -> float:
    """Mean NLL per dimension, in nats, of held-out images with η-noise. Images and noise are the same in each call.

    The views of a store take turns, as they do in its draws. It is shown as a step of `progress`.
    """
    generator = torch.Generator().manual_seed(0)
    images = min(store.spec.rows, VAL_IMAGES)
    total = 0.0
    with progress.step("validate", VAL_DRAWS * images, "image") as step:
        with closing(CouplingStream(store.version_url, batch_size=images, seed=0, view="samples")) as stream:
            batches = [next(stream) for _ in store.spec.views]
        for draw in range(VAL_DRAWS):
            batch = batches[draw % len(batches)]
            for x, y in zip(batch.x.split(VAL_BATCH), batch.label.split(VAL_BATCH), strict=True):
                noisy = x + eta * torch.randn(x.shape, generator=generator)
                total += nll(model(noisy.to(device), y.to(device))).sum().item()
                step.advance(len(x))
    return total / (VAL_DRAWS * images)
