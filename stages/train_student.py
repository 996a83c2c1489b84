"""train-student: coupling store → SiT checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from nfm.models.couplings import COUPLINGS, CouplingName
from nfm.models.labels import drop_labels
from nfm.models.paths import flow_matching_loss, linear_path, logit_normal
from nfm.models.sit import SIZE_GRAMMAR, SiT, SiTConfig, parse_size
from nfm.stages.errors import StageError
from nfm.stages.section import Section
from nfm.stages.training import TrainConfig, Trainer, open_stream, world
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import Source


class StudentConfig(Section):
    """The SiT student and its training."""

    size: str = Field(description="Sizes of the SiT.", json_schema_extra={"grammar": SIZE_GRAMMAR})
    coupling: CouplingName = Field(
        default="nfm",
        description='The noise ε that an image is paired with. "nfm": the z that the teacher made of the image. '
        '"independent": a new random draw each time, which is plain flow matching.',
    )
    label_drop: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Probability that an image is trained without its class label, for classifier-free guidance.",
    )
    t_mean: float = Field(
        default=-0.2, description="Mean a of logit(t): training times t are logit-normal (NFM paper section 4)."
    )
    t_std: float = Field(default=1.0, gt=0, description="Standard deviation b of logit(t).")
    train: TrainConfig = Field(description="Training of the student.")

    @field_validator("size")
    @classmethod
    def _parses(cls, size: str) -> str:
        parse_size(size)
        return size


def student_network(config: StudentConfig, store: Store) -> SiT:
    channels, size, _ = store.spec.shape
    try:
        parsed = parse_size(config.size)
        return SiT(SiTConfig(channels=channels, image_size=size, num_classes=store.spec.num_classes, **parsed))
    except ValueError as error:
        raise StageError(f"student: {error}") from error


def train_student(config: StudentConfig, couplings: str | Sequence[Source], out: str) -> dict[str, Any]:
    """Flow matching on the pairs of a coupling store, or of a mixture; returns the finished model's document.

    Two couplings with the same config see the same network, images, times and dropped labels: only ε differs.
    """
    sources = [Source(couplings)] if isinstance(couplings, str) else couplings
    stores = [Store(source.url, "couplings", source.options) for source in sources]
    store = stores[0]
    seen: Any = store.dataset.id
    if len(stores) > 1:
        seen = [{"id": part.dataset.id, "weight": source.weight} for part, source in zip(stores, sources, strict=True)]
    torch.manual_seed(config.train.seed)
    network = student_network(config, store)
    couple = COUPLINGS[config.coupling]

    def loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        t = logit_normal(len(batch.x), generator, config.t_mean, config.t_std).to(batch.x.device)
        y = drop_labels(batch.label, config.label_drop, generator)
        epsilon = couple(batch.x, batch.z, generator)  # last: what it draws must not shift t and y
        return flow_matching_loss(model, linear_path(batch.x, epsilon, t), y)

    with world() as here:
        stream = open_stream(sources, "pairs", config.train, here)
        trainer = Trainer(
            f"train-student {config.coupling}",
            network,
            loss,
            stream,
            config.train,
            out,
            {"student": config.model_dump(mode="json"), "couplings": seen},
            here,
        )
        return trainer.run()
