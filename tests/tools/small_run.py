"""A run that is as small as one can be: its settings, the paths of its artifacts, and encoding without Ray."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nfm.pipeline.config import Config
from nfm.stages.checkpoint import Checkpoint, load, save
from nfm.stages.encode import UnitEncoder, output_spec
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.writing.writer import StoreWriter

Nfm = Callable[..., tuple[int, str, str]]  # runs `nfm …`, and returns exit code, stdout and stderr
SMALL = (
    "data.holdout=0.9",
    "data.block_rows=32",
    "teacher.notation=TF-2×1-16/2",
    "teacher.head_dim=8",
    "teacher.train.images=640",
    "teacher.train.checkpoint_images=320",
    "teacher.train.log_images=128",
    "encode.draws=3",
    "encode.workers=1",
    "student.size=SiT-1x16h2/2",
    "student.train.images=640",
    "student.train.checkpoint_images=320",
    "student.train.log_images=128",
    "evaluate.samples=300",
    "evaluate.grid_columns=10",
)


@dataclass(frozen=True)
class Run:
    """Paths of a small finished run up to its couplings."""

    config: Config
    samples: str
    teacher: str
    couplings: dict[LayoutName, str]


def encode_in_process(config: Config, samples: str, teacher: str, out: str, layout: LayoutName) -> None:
    """The encode stage without Ray, unit after unit: the job on a cluster must write the same bytes."""
    encode = config.encode.model_copy(update={"layout": layout})
    spec, z_scale = output_spec(encode, Store(samples), teacher, out)
    writer = StoreWriter(out, spec)
    writer.initialize(z_scale)
    encoder = UnitEncoder(samples, teacher, out, spec.model_dump(mode="json"))
    for unit in writer.list_missing_units():
        encoder.encode(unit)
    writer.finalize()


def infinite_teacher(run: Run, folder: Path, label: int) -> str:
    """A checkpoint of the teacher of `run` whose z is infinite for one class. Its weights are finite."""
    checkpoint, url = load(run.teacher), f"{folder}/infinite/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    tensors["model.blocks.0.class_embed"][label] = 1e38  # the log-scales that follow from it are beyond what exp takes
    save(url, Checkpoint(tensors, checkpoint.document))
    return url
