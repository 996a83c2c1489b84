"""Sound folders that the fuzzer changes: stores of every schema, unfinished ones, conversions, copies and exports that
were interrupted, prepared images, checkpoints, states of trainings, caches."""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from nfm.models.sit import SiT, SiTConfig
from nfm.models.tarflow import TarFlow, TarFlowConfig
from nfm.pipeline.config import load_config
from nfm.stages import training
from nfm.stages.checkpoint import Checkpoint, add_prefix, architecture, save
from nfm.stages.prepare import prepare
from nfm.stages.train_student import train_student
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.versions import list_versions
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.writing.transfer import convert_store, copy_store
from nfm.storage_specs.writing.tuples import export_tuples
from tests.tools.fuzz_content import Content, read_content
from tests.tools.fuzz_files import Files, read_files
from tests.tools.kinds import Kind
from tests.tools.make_fixtures import FIXTURES, from_arrays, write_store
from tests.tools.small_run import encode_in_process
from tests.tools.stores import LAYOUT_NAMES, ignore_progress

FROZEN = Path(__file__).parents[1] / "fixtures"
NAMES_1_0 = ("samples", "float16-stored", "float32-derived", "bfloat16-derived", "int8-stored")
SQUARE = Kind(shape=(1, 4, 4), rows=7, block_rows=3, names=True)  # of samples that SETTINGS fit
SETTINGS = (
    *("data.image_size=4", "data.channels=1", "data.block_rows=3", "data.holdout=0.4", "student.size=SiT-1x8h2/2"),
    *("student.train.images=16", "student.train.batch_size=8", "student.train.checkpoint_images=8"),
    *("student.train.log_images=8", "encode.draws=2"),
)
CONFIG = load_config("digits", SETTINGS)
SOURCES = ("float16-stored", "latents-views", "samples-names", "int8-derived")  # of conversions, copies and exports


@dataclass(frozen=True)
class Subject:
    """A sound folder. `contents` is what each version of its store holds, by id."""

    role: str
    files: Files
    contents: dict[str, Content]
    final_id: str | None = None  # of the store, once it is complete
    source: str | None = None  # the URL of what it was made from
    teacher: str | None = None
    complete: Callable[[str], object] | None = None  # what the command does that wrote the folder


def subject_names() -> list[str]:
    """The names of all subjects. Those that find most stand there more than once."""
    names = [f"1.1 {layout} {name}" for layout in LAYOUT_NAMES for name in FIXTURES] * 3
    names += [f"1.0 {layout} {name}" for layout in LAYOUT_NAMES for name in NAMES_1_0]
    names += [f"unfinished {layout} {name}" for layout in LAYOUT_NAMES for name in FIXTURES]
    for role in ("converted", "copied", "exported"):
        names += [f"{role} {layout} {name}" for layout in LAYOUT_NAMES for name in SOURCES]
    for layout in LAYOUT_NAMES:
        names += [f"{role} {layout} square" for role in ("encoded", "encoding", "samples", "cache")] * 2
    return names + [f"{role} webdataset square" for role in ("prepared", "teacher", "student", "state")] * 5


class Subjects:
    """Makes each subject once, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Subject] = {}

    def __call__(self, name: str) -> Subject:
        if name not in self.made:
            role, layout, rest = name.split(" ", 2)
            make: dict[str, Callable[[LayoutName, str], Subject]] = {
                "1.0": partial(self._frozen, "1.0"),
                "1.1": partial(self._frozen, "1.1"),
                "unfinished": self._unfinished,
                "converted": self._converted,
                "copied": self._copied,
                "exported": self._exported,
                "encoded": partial(self._encoded, "store"),
                "encoding": partial(self._encoded, "unfinished"),
                "samples": self._samples,
                "cache": self._cache,
                "prepared": self._prepared,
                "teacher": self._checkpoint,
                "student": self._checkpoint,
                "state": self._state,
            }
            subject = make[role]("zarr" if layout == "zarr" else "webdataset", rest)
            self.made[name] = replace(subject, role=role) if role in ("teacher", "student") else subject
        return self.made[name]

    def _once(self, name: str, make: Callable[[str], object]) -> str:
        """The path of what `make` writes."""
        path = str(self.folder / name)
        if not Path(path).exists():
            make(path)
        return path

    def _frozen_url(self, schema: str, layout: str, name: str) -> str:
        def unpack(path: str) -> None:
            with tarfile.open(FROZEN / f"format-{schema}" / f"{layout}-{name}.tar.gz") as tar:
                tar.extractall(path, filter="data")

        return self._once(f"{schema}-{layout}-{name}", unpack)

    def _frozen(self, schema: str, layout: LayoutName, name: str) -> Subject:
        url = self._frozen_url(schema, layout, name)
        if schema == "1.0":
            return Subject("store", read_files(Path(url)), _contents(url))
        return Subject(
            "store", read_files(Path(url)), _contents(url), Store(url).dataset.id, complete=_writes(url, name)
        )

    def _unfinished(self, layout: LayoutName, name: str) -> Subject:
        """Without the newest documents, and without one commit record."""
        whole = self._frozen("1.1", layout, name)
        return replace(whole, role="unfinished", files=_without_end(whole.files))

    def _converted(self, layout: LayoutName, name: str) -> Subject:
        """The conversion of a store to a layout, without its last documents and one commit record."""
        source = self._frozen_url("1.1", "zarr" if layout == "webdataset" else "webdataset", name)

        def convert(url: str) -> object:
            return convert_store(Store(source), url, layout, ignore_progress, None)

        out = self._once(f"converted-{layout}-{name}", convert)
        files = _without_end(read_files(Path(out)))
        return Subject("target", files, _contents(out), Store(out).dataset.id, source, complete=convert)

    def _copied(self, layout: LayoutName, name: str) -> Subject:
        """An unfinished copy of a store."""
        source = self._frozen_url("1.1", layout, name)

        def interrupted_copy(path: str) -> None:
            with_claim: Files = {}

            def interrupt(_bytes: int) -> None:
                if not with_claim:
                    with_claim.update({"copy.json": Path(path, "copy.json").read_bytes()})

            copy_store(Store(source), path, interrupt, None)
            Path(path, "dataset.json").unlink()
            Path(path, "copy.json").write_bytes(bytes(with_claim["copy.json"]))  # type: ignore[arg-type]  # are bytes

        files = read_files(Path(self._once(f"copied-{layout}-{name}", interrupted_copy)))
        return Subject(
            "target",
            {path: data for path, data in files.items() if "000001" not in path},
            _contents(source),
            Store(source).dataset.id,
            source,
            complete=lambda url: copy_store(Store(source), url, ignore_progress, None),
        )

    def _exported(self, layout: LayoutName, name: str) -> Subject:
        """An unfinished export of tuples."""
        name = "float16-stored" if name == "samples-names" else name
        source = self._frozen_url("1.1", layout, name)

        def export(url: str) -> object:
            return export_tuples(Store(source), url, ignore_progress, None)

        files = read_files(Path(self._once(f"exported-{layout}-{name}", export)))
        del files["k001/000001.tar"]
        return Subject("tuples", files, _contents(source), source=source, complete=export)

    def _samples_url(self, layout: LayoutName) -> str:
        return self._once(f"samples-{layout}", lambda path: SQUARE.write(path, layout))

    def _samples(self, layout: LayoutName, _name: str) -> Subject:
        url = self._samples_url(layout)
        return Subject(
            "store",
            read_files(Path(url)),
            _contents(url),
            Store(url).dataset.id,
            teacher=self._model("teacher"),
            complete=_writes_kind(SQUARE, layout),
        )

    def _model(self, name: str) -> str:
        """A teacher or a student that was never trained."""
        sizes: dict[str, Any] = {"channels": 1, "image_size": 4, "num_classes": 3, "patch": 2, "width": 8}

        def write(url: str) -> None:
            torch.manual_seed(0)
            network: SiT | TarFlow = SiT(SiTConfig(**sizes, depth=1, heads=2))
            run: dict[str, Any] = {"student": CONFIG.student.model_dump(mode="json"), "couplings": "0" * 64}
            if name == "teacher":
                network = TarFlow(TarFlowConfig(**sizes, depths=(1, 1), head_dim=8))
                run = {"teacher": CONFIG.teacher.model_dump(mode="json"), "samples": "0" * 64}
            for parameter in network.parameters():  # zero weights would make z the noise
                torch.nn.init.normal_(parameter, std=0.1)
            document = {
                "run": run,
                "architecture": architecture(network),
                "training": {"images": 640, "val": 1.5, "chosen_at": 640, "seconds": 1.0},
                "curves": {"images": [640], "loss": [1.5], "val_images": [640], "val": [1.5]},
            }
            save(url, Checkpoint(add_prefix("model", network.state_dict()), document))

        return self._once(f"{name}.safetensors", write)

    def _checkpoint(self, layout: LayoutName, name: str) -> Subject:
        """Both models beside each other: the role says which is used."""
        files: Files = {f"{kind}.safetensors": Path(self._model(kind)).read_bytes() for kind in ("teacher", "student")}
        return Subject("model", files, {}, source=self._encode(layout))

    def _encode(self, layout: LayoutName) -> str:
        samples, teacher = self._samples_url("webdataset"), self._model("teacher")
        return self._once(f"encoded-{layout}", lambda url: encode_in_process(CONFIG, samples, teacher, url, layout))

    def _encoded(self, role: str, layout: LayoutName, _name: str) -> Subject:
        """Couplings of the samples."""
        url, samples, teacher = self._encode(layout), self._samples_url("webdataset"), self._model("teacher")
        files = read_files(Path(url))
        return Subject(
            role,
            files if role == "store" else _without_end(files),
            _contents(url),
            Store(url).dataset.id,
            samples,
            teacher,
            lambda out: encode_in_process(CONFIG, samples, teacher, out, layout),
        )

    def _cache(self, layout: LayoutName, _name: str) -> Subject:
        """The cache of a store of the file system "memory", which is filled by a trial."""
        source, place = self._encode(layout), f"/fuzz-{layout}"
        MemoryFileSystem().pipe({f"{place}/{path}": data for path, data in read_files(Path(source)).items()})
        return Subject("cache", {}, _contents(source), source=f"memory:/{place}")

    def _prepared(self, _layout: LayoutName, _name: str) -> Subject:
        """The sample stores of an image folder, unfinished."""

        def draw(path: str) -> None:
            rng = np.random.default_rng(0)
            for number in range(12):
                image = Image.fromarray(rng.integers(0, 256, (5, 4), dtype=np.uint8))
                target = Path(path, "train", f"class{number % 2}", f"{number}.png")
                target.parent.mkdir(parents=True, exist_ok=True)
                image.save(target)

        images = Path(self._once("images", draw))

        def run(out: str) -> None:
            prepare(CONFIG.data.with_folder(images), out, images, False, None)

        url = self._once("prepared", run)
        files = {path: data for path, data in read_files(Path(url)).items() if path != "train/dataset.json"}
        contents = _contents(f"{url}/train") | _contents(f"{url}/val")
        return Subject("prepared", files, contents, Store(f"{url}/train").dataset.id, complete=run)

    def _state(self, layout: LayoutName, _name: str) -> Subject:
        """The folder of a training that was interrupted after its first checkpoint."""
        couplings = self._encode(layout)

        class InterruptedError_(Exception):  # noqa: N801, N818
            pass

        def interrupted_training(out: str) -> None:
            def save_and_stop(url: str, checkpoint: Checkpoint) -> None:
                save(url, checkpoint)
                raise InterruptedError_

            training.save = save_and_stop  # type: ignore[attr-defined]  # the name that the trainer calls
            try:
                train_student(CONFIG.student, couplings, out)
            except InterruptedError_:
                pass
            finally:
                training.save = save  # type: ignore[attr-defined]  # as it was

        files = read_files(Path(self._once("state", interrupted_training)))
        return Subject(
            "state", files, {}, source=couplings, complete=lambda out: train_student(CONFIG.student, couplings, out)
        )


def _contents(url: str) -> dict[str, Content]:
    """What each version of a sound store holds."""
    versions = [f"{url}@v{version}" for version in list_versions(Root(url))] or [url]
    deliveries = [read_content(version) for version in versions]
    assert not any(delivery.refusals for delivery in deliveries)
    return {delivery.store.dataset.id: delivery.content for delivery in deliveries}


def _without_end(files: Files) -> Files:
    """The files of a store that was interrupted before its last unit was committed."""
    commits = sorted(path for path in files if path.startswith("commits/0"))
    left_out = {"dataset.json", "README.md", "croissant.json", "versions/0001.json", commits[-1]}
    return {path: data for path, data in files.items() if path not in left_out}


def _writes(url: str, name: str) -> Callable[[str], object]:
    """Writes what is missing of a frozen store."""
    with np.load(FROZEN / "format-1.1" / "values.npz", allow_pickle=False) as file:
        values = from_arrays(name, dict(file))
    spec = Store(url).spec
    return lambda out: write_store(out, spec, values)


def _writes_kind(kind: Kind, layout: LayoutName) -> Callable[[str], object]:
    return lambda out: kind.write(out, layout)
