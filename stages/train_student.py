"""train-student: coupling store → SiT checkpoint."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from nfm.models.couplings import COUPLINGS, CouplingName
from nfm.models.labels import drop_labels
from nfm.models.paths import flow_matching_loss, linear_path, logit_normal
from nfm.models.sit import SIZE_GRAMMAR, SiT, SiTConfig, parse_size
from nfm.stages.checkpoint import exists, load_document, trained_on
from nfm.stages.errors import StageError
from nfm.stages.progress import Progress, print_line
from nfm.stages.section import Section
from nfm.stages.training import TrainConfig, Trainer, checkpoint_urls, join_world, open_stream
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import Source
from nfm.storage_specs.reading.versions import find_version


class StudentConfig(Section):
    """The SiT student and its training."""

    size: str = Field(
        description="Sizes of the SiT: layers, channels, attention heads and patch.",
        json_schema_extra={"grammar": SIZE_GRAMMAR},
    )
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
        default=-0.2, description="Mean of logit(t), the paper's a: the times t of training are logit-normal."
    )
    t_std: float = Field(default=1.0, gt=0, description="Standard deviation of logit(t), the paper's b.")
    train: TrainConfig = Field(description="Training of the student.")

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: str) -> str:
        parse_size(size)
        return size


def sit_config(config: StudentConfig, spec: Spec) -> SiTConfig:
    """The shapes of a student for the images of a store. Raises StageError if it cannot take them."""
    channels, height, width = spec.shape
    try:
        parsed = parse_size(config.size)
        return SiTConfig(channels=channels, image_size=(height, width), num_classes=spec.num_classes, **parsed)
    except ValueError as error:
        raise StageError(f"student: {error}") from error


def find_trained_versions(sources: list[Source], out: str) -> list[Source]:
    """The sources of the training in the folder `out`, in the versions with which it began: a store may have got draws
    since. Without a training in the folder, the sources as they are."""
    document = next((load_document(url) for url in checkpoint_urls(out) if exists(url)), None)
    ids = trained_on(document) if document else []
    if len(ids) != len(sources):
        return sources  # no training, or another one, which the trainer refuses
    return [
        replace(source, url=find_version(source.url, content_id, source.options)) if content_id else source
        for source, content_id in zip(sources, ids, strict=True)
    ]


def train_student(config: StudentConfig, couplings: str | Sequence[Source], out: str) -> dict[str, Any]:
    """Train a student in the folder `out` by flow matching (NFM paper section 3.2) on the pairs of a coupling store, or
    of a mixture of several. Returns the document of the finished model.

    Runs that differ only in `config.coupling` have the same first weights, images, times and dropped labels: only ε
    differs. Raises StageError or StoreError for stores, sizes or a folder that do not fit, FloatingPointError if
    training becomes not finite.
    """
    given = [Source(couplings)] if isinstance(couplings, str) else list(couplings)
    sources = find_trained_versions(given, out)
    stores = [Store(source.url, "couplings", source.options) for source in sources]
    older = [(source.url, before.url) for source, before in zip(sources, given, strict=True) if source != before]
    # The stream opens the same versions, also if a store gets a newer one in this moment.
    sources = [replace(source, url=opened.version_url) for source, opened in zip(sources, stores, strict=True)]
    store = stores[0]
    couplings_identity: Any = store.dataset.id
    if len(stores) > 1:
        couplings_identity = [
            {"id": mixed.dataset.id, "weight": source.weight} for mixed, source in zip(stores, sources, strict=True)
        ]
    sizes = sit_config(config, store.spec)
    couple = COUPLINGS[config.coupling]

    def loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """‖g(x_t, c, t) - v‖² / n (NFM paper equation 1), with labels dropped."""
        t = logit_normal(len(batch.x), generator, config.t_mean, config.t_std).to(batch.x.device)
        y = drop_labels(batch.label, config.label_drop, generator)
        # batch.z is z / σ_f: the stream has divided it. This is last, as its draws must not change those of t and y.
        epsilon = couple(batch.x, batch.z, generator)
        return flow_matching_loss(model, linear_path(batch.x, epsilon, t), y)

    with join_world() as world:
        for trained, newest in older if world.is_first_rank else ():
            print_line(f"{out} stays on {trained}, on which it was begun; another folder would take the newer {newest}")
        stream = open_stream(sources, "pairs", config.train, world)  # first: are its files there?
        with Progress("build the network", enabled=world.is_first_rank):
            torch.manual_seed(config.train.seed)
            network = SiT(sizes)
        trainer = Trainer(
            f"train-student {config.coupling}",
            network,
            loss,
            stream,
            config.train,
            out,
            {"student": config.model_dump(mode="json"), "couplings": couplings_identity},
            world,
        )
        return trainer.run()
