"""train-teacher: sample store → TarFlow checkpoint."""

from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from nfm.models.labels import drop_labels
from nfm.models.tarflow import NOTATION_GRAMMAR, TarFlow, TarFlowConfig, bits_per_dim, nll, parse_notation
from nfm.stages.errors import StageError
from nfm.stages.section import Section
from nfm.stages.training import TrainConfig, Trainer, open_stream, world
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream

VAL_IMAGES = 4096  # at most
VAL_DRAWS = 4  # η-noise draws of the held-out images in one validation
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
        description="η, the amount of noise added to the data: the teacher sees x + η·ε′, with x in [-1, 1] and ε′ "
        "standard normal.",
    )
    label_drop: float = Field(
        default=0.1, ge=0, lt=1, description="Probability that an image is trained without its class label."
    )
    train: TrainConfig = Field(description="Training of the teacher.")

    @field_validator("notation")
    @classmethod
    def _parses(cls, notation: str) -> str:
        parse_notation(notation)
        return notation


def teacher_network(config: TeacherConfig, store: Store) -> TarFlow:
    channels, size, _ = store.spec.shape
    try:
        parsed = parse_notation(config.notation)
        return TarFlow(
            TarFlowConfig(
                channels=channels,
                image_size=size,
                num_classes=store.spec.num_classes,
                head_dim=config.head_dim,
                **parsed,
            )
        )
    except ValueError as error:
        raise StageError(f"teacher: {error}") from error


def train_teacher(config: TeacherConfig, samples: str, out: str) -> dict[str, Any]:
    """Train on `<samples>/train`, choose the checkpoint by the NLL of `<samples>/val`; returns the model's document."""
    train, val = Store(f"{samples}/train", kind="samples"), Store(f"{samples}/val", kind="samples")
    torch.manual_seed(config.train.seed)
    network = teacher_network(config, train)

    def loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        noise = torch.randn(batch.x.shape, generator=generator).to(batch.x.device)
        y = drop_labels(batch.label, config.label_drop, generator)
        return nll(model(batch.x + config.eta * noise, y))

    with world() as here:
        stream = open_stream(train.url, "samples", config.train, here)
        trainer = Trainer(
            "train-teacher",
            network,
            loss,
            stream,
            config.train,
            out,
            {"teacher": config.model_dump(mode="json"), "samples": train.dataset.id},
            here,
            validate=lambda model: held_out_nll(model, val, config.eta, here.device),
        )
        document = trainer.run()
    return document | {"bpd": bits_per_dim(document["training"]["val"])}


@torch.no_grad()
def held_out_nll(model: nn.Module, store: Store, eta: float, device: torch.device) -> float:
    """Mean NLL per dimension in nats, of fixed held-out images under a few fixed draws of η-noise."""
    generator = torch.Generator().manual_seed(0)
    count = min(store.spec.rows, VAL_IMAGES)
    batch = next(CouplingStream(store.url, count, 0, "samples"))
    total = 0.0
    for _ in range(VAL_DRAWS):
        for x, y in zip(batch.x.split(VAL_BATCH), batch.label.split(VAL_BATCH), strict=True):
            noisy = x + eta * torch.randn(x.shape, generator=generator)
            total += nll(model(noisy.to(device), y.to(device))).sum().item()
    return total / (VAL_DRAWS * count)
