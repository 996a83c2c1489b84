"""prepare: images → two sample stores, `train` and `val` (x as uint8, label, index)."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from nfm.stages.errors import StageError
from nfm.stages.progress import Progress
from nfm.stages.section import Section
from nfm.storage_specs.format.schema import LayoutName, Spec
from nfm.storage_specs.reading.order import permutation
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.files import Root, sha256
from nfm.storage_specs.writing.writer import StoreWriter

SUFFIXES = {".jpg", ".jpeg", ".png"}
QUARANTINE = "quarantine.json"
LISTED = 20  # names of bad images in an error message
SPLITS = ("train", "val")


class DataConfig(Section):
    """Which images `prepare` writes to sample stores, and in which size."""

    source: Literal["digits", "folder"] = Field(
        description='"digits": scikit-learn\'s 1,797 images of 8×8 pixels. "folder": the image folder of --data, with '
        "`train/<class>/*.jpg` (or .jpeg, .png) and optionally `val/<class>/*.jpg`.",
    )
    image_size: int = Field(
        ge=2,
        le=4096,
        description="Height and width of the stored images, in pixels. Images of another size are resized with PIL's "
        "box filter (NFM paper section 4); one that is not square is stretched, not cropped.",
    )
    channels: Literal[1, 3] = Field(description="Colour channels of the stored images: 1 is grey, 3 is RGB.")
    holdout: float = Field(
        gt=0,
        lt=1,
        description="Share of the images of each class held out as val. Not used if the image folder has `val/`.",
    )
    block_rows: int = Field(
        ge=1,
        le=1 << 20,
        description="Images in a block. A block of one column is one file, and encode works block by block.",
    )
    layout: LayoutName = Field(default="webdataset", description="File layout of the sample stores.")

    def given(self, data: Path | None) -> "DataConfig":
        """This config for the images in `data`, where the user named a folder."""
        return self if data is None else self.model_copy(update={"source": "folder"})


@dataclass(frozen=True)
class Images:
    """A split before it is a store: image i is `load(i)`, uint8 (C, H, W), with label `labels[i]` and name `names[i]`.

    `identity` is JSON that tells data sets apart: a digest of the values, or of the names and sizes of the files.
    """

    load: Callable[[int], NDArray[np.uint8]]
    names: list[str]
    labels: NDArray[np.int64]
    class_names: list[str]
    identity: dict[str, Any]

    def subset(self, rows: NDArray[np.int64]) -> "Images":
        kept = rows.tolist()
        return Images(
            lambda i: self.load(kept[i]),
            [self.names[i] for i in kept],
            self.labels[rows],
            self.class_names,
            self.identity,
        )


class BadImageError(StageError):
    """An image that does not decode."""


def digits(config: DataConfig) -> Images:
    """scikit-learn's 1,797 images of 8×8 with 17 grey levels, spread over 0 … 255."""
    if (config.image_size, config.channels) != (8, 1):
        raise StageError(
            f"got digits at {config.channels}×{config.image_size}×{config.image_size}; they are 1×8×8 images"
        )
    from sklearn.datasets import load_digits  # takes seconds to import, and only this needs it

    bundle = load_digits()
    x = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bundle.target.astype(np.int64)
    identity = {"name": "scikit-learn digits", "sha256": sha256(x.tobytes() + labels.tobytes())}
    names = [f"digit {i}" for i in range(len(x))]
    return Images(lambda i: x[i], names, labels, [str(label) for label in range(10)], identity)


def folder(config: DataConfig, path: Path) -> Images:
    """Images of one folder per class, in the order of their names."""
    if not path.is_dir():
        raise StageError(
            f"{path}: no such folder; expected one folder per class in it, with {', '.join(sorted(SUFFIXES))} files"
        )
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [
        (label, file)
        for label, name in enumerate(classes)
        for file in sorted((path / name).iterdir())
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    if not files:
        raise StageError(f"{path}: got no images; expected <class>/*.jpg, .jpeg or .png in it")
    names = [f"{file.parent.name}/{file.name}" for _, file in files]
    listing = "\n".join(f"{name} {file.stat().st_size}" for name, (_, file) in zip(names, files, strict=True))
    identity = {"name": "image folder", "files": len(files), "listing_sha256": sha256(listing.encode())}

    def load(i: int) -> NDArray[np.uint8]:
        return decode_image(files[i][1], config)

    return Images(load, names, np.array([label for label, _ in files], dtype=np.int64), classes, identity)


def decode_image(path: Path, config: DataConfig) -> NDArray[np.uint8]:
    """uint8 (C, H, W). Raises BadImageError for a file that is no whole image of a sane size."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as opened:
            if opened.mode.startswith("I"):
                raise BadImageError(f"{path}: 16 bits a channel; expected 8")
            image = opened.convert("L" if config.channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, BadImageError) or getattr(error, "errno", None) is not None:
            raise  # the disk's fault, not the image's
        raise BadImageError(f"{path}: {error}") from error
    pixels = np.asarray(image.resize((config.image_size, config.image_size), Image.Resampling.BOX))
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def splits(config: DataConfig, data: Path | None) -> dict[str, Images]:
    """Train and held-out images, each in a fixed random order so that a block holds a mix of classes."""
    if config.source == "digits":
        every = digits(config)
    else:
        if data is None:
            raise StageError("data.source is 'folder', but no folder was given; say where with --data (make: DATA=)")
        every = folder(config, data / "train")
        if (data / "val").is_dir():
            held_out = folder(config, data / "val")
            if held_out.class_names != every.class_names:
                raise StageError(f"{data}: got different class folders in train and val; expected the same ones")
            return {"train": _shuffled(every), "val": _shuffled(held_out)}
    order = permutation(len(every.names), seed=0, stream=0, counter=0)
    held = np.zeros(len(order), dtype=bool)
    for label in range(len(every.class_names)):  # the same share of every class
        of_class = order[every.labels[order] == label]
        held[of_class[: round(len(of_class) * config.holdout)]] = True
    if held.all() or not held.any():
        raise StageError(
            f"got {len(order)} images and data.holdout = {config.holdout}; expected at least one image in each split"
        )
    return {"train": every.subset(order[~held[order]]), "val": every.subset(order[held[order]])}


def _shuffled(images: Images) -> Images:
    return images.subset(permutation(len(images.names), seed=0, stream=0, counter=0))


def prepare(config: DataConfig, out: str, data: Path | None = None, skip_bad_images: bool = False) -> None:
    """Write `<out>/train` and `<out>/val`. The same call again continues, or does nothing when they are complete."""
    config = config.given(data)
    found = splits(config, data)
    bad = {name: _quarantine(f"{out}/{name}", images, skip_bad_images) for name, images in found.items()}
    for name, images in found.items():
        good = [i for i, image in enumerate(images.names) if image not in bad[name]]
        if len(good) < 2:
            raise StageError(f"got {len(good)} images for {name}; expected at least 2 (see data.holdout)")
        _write(config, f"{out}/{name}", name, images.subset(np.array(good, dtype=np.int64)), len(bad[name]))


def _write(config: DataConfig, url: str, split: str, images: Images, quarantined: int) -> None:
    spec = Spec(
        kind="samples",
        layout=config.layout,
        rows=len(images.names),
        block_rows=config.block_rows,
        shape=(config.channels, config.image_size, config.image_size),
        num_classes=len(images.class_names),
        class_names=images.class_names,
        preprocessing={
            "source": images.identity,
            "split": split,
            "resize": "none" if config.source == "digits" else "PIL box",
            "quarantined": quarantined,
        },
    )
    writer = StoreWriter(url, spec)
    writer.initialize()
    if writer.is_complete():
        return
    todo = writer.list_missing_units()
    done = spec.rows - sum(spec.rows_of(unit.block) for unit in todo)
    with Progress(f"prepare {split}", spec.rows, "img", done=done) as progress:
        for unit in todo:
            rows = spec.indices(unit.block)
            x = np.stack(list(_decoded(images, rows.tolist())))
            writer.write_block(unit.block, {"x": x, "label": images.labels[rows]}, None, None)
            progress.advance(len(rows))
    writer.finalize()


def _decoded(images: Images, rows: list[int]) -> Iterator[NDArray[np.uint8]]:
    with ThreadPoolExecutor() as pool:
        yield from pool.map(images.load, rows)


def _quarantine(url: str, images: Images, skip: bool) -> dict[str, str]:
    """Names of the images that do not decode, with the reason; found once and kept beside the store."""
    root, listing = Root(url), sha256(canonical_json(images.identity))
    if root.exists(QUARANTINE):
        known = json.loads(root.read(QUARANTINE, 1 << 28))
        if known["listing"] == listing and (skip or not known["images"]):
            bad: dict[str, str] = known["images"]
            return bad
    bad = {}
    total = len(images.names)
    with Progress(f"check {url.rpartition('/')[2]}", total, "img") as progress, ThreadPoolExecutor() as pool:
        rows = iter(range(total))
        while chunk := list(islice(rows, 1024)):
            for i, reason in zip(chunk, pool.map(lambda i: _fault(images, i), chunk), strict=True):
                if reason is not None:
                    bad[images.names[i]] = reason
            progress.advance(len(chunk))
    if bad and not skip:
        shown = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:LISTED])
        more = f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise StageError(
            f"{len(bad)} of {total} images do not decode: {shown}{more}. Mend them, or pass --skip-bad-images"
        )
    root.write(QUARANTINE, canonical_json({"listing": listing, "images": bad}))
    if bad:
        print(f"{len(bad)} of {total} images left out, listed in {url}/{QUARANTINE}", file=sys.stderr)
    return bad


def _fault(images: Images, i: int) -> str | None:
    try:
        images.load(i)
    except BadImageError as error:
        return str(error)
    return None
