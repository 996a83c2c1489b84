"""All stages on tiny stores of any kind, in this process."""

from dataclasses import dataclass, replace
from functools import cached_property

from nfm.pipeline.config import Config, load_config
from nfm.stages.train_student import train_student
from nfm.stages.train_teacher import train_teacher
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from tests.tools.kinds import Kind
from tests.tools.small_run import encode_in_process

TINY = (
    "teacher.notation=TF-2×1-8/1",
    "teacher.head_dim=8",
    "student.size=SiT-1x8h2/1",
    *(
        f"{network}.train.{setting}"
        for network in ("teacher", "student")
        for setting in ("images=24", "batch_size=8", "warmup_images=0", "log_images=8", "checkpoint_images=16")
    ),
    "evaluate.samples=6",
    "evaluate.samplers=['euler2']",
    "evaluate.grid_samplers=['euler2']",
    "evaluate.grid_columns=3",
)


@dataclass(frozen=True)
class KindRun:
    """The stages on samples of a kind, in a folder. Each artifact is made when it is first asked for."""

    kind: Kind
    layout: LayoutName
    folder: str
    settings: tuple[str, ...] = ()

    @cached_property
    def config(self) -> Config:
        """As small as the stages can be; z and noise are those of the kind."""
        noise = "stored" if self.kind.stored else "derived"
        encode = (f"encode.draws={self.kind.draws}", f"encode.noise={noise}", f"encode.noise_dtype={self.kind.noise}")
        z_dtype = f"encode.z_dtype={self.kind.z or 'float16'}"
        return load_config("digits", [*TINY, *encode, z_dtype, f"encode.layout={self.layout}", *self.settings])

    @cached_property
    def samples(self) -> str:
        """The folder of two sample stores of other images each."""
        url = f"{self.folder}/samples"
        for split, seed in (("train", self.kind.seed), ("val", self.kind.seed + 1)):
            replace(self.kind, z=None, seed=seed).write(f"{url}/{split}", self.layout)
        return url

    @cached_property
    def teacher(self) -> str:
        """model.safetensors of the teacher."""
        train_teacher(self.config.teacher, self.samples, f"{self.folder}/teacher")
        return f"{self.folder}/teacher/model.safetensors"

    @cached_property
    def couplings(self) -> Store:
        """The pairs of the teacher."""
        url = f"{self.folder}/couplings"
        encode_in_process(self.config, f"{self.samples}/train", self.teacher, url, self.layout)
        return Store(url)

    @cached_property
    def student(self) -> str:
        """model.safetensors of a student."""
        train_student(self.config.student, self.couplings.url, f"{self.folder}/student")
        return f"{self.folder}/student/model.safetensors"
