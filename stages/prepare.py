"""prepare: images → two sample stores, `train` and `val` (x as uint8, label, index).

Images are resized to squares with PIL's box filter (NFM paper section 4). One that is not square is stretched to the
square as a whole: nothing is cropped or padded.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from nfm.stages.attribution import AttributionConfig, update_attribution
from nfm.stages.errors import StageError
from nfm.stages.progress import Progress, print_line
from nfm.stages.section import Section
from nfm.stages.splits import SPLITS
from nfm.storage_specs.format.image_names import MAX_NAME_BYTES, ImageName
from nfm.storage_specs.format.schema import LayoutName, PixelSpec, Spec
from nfm.storage_specs.reading.order import permutation
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.files import Root, sha256
from nfm.storage_specs.writing.writer import StoreWriter

SUFFIXES = {".jpg", ".jpeg", ".png"}
QUARANTINE_FILE = "quarantine.json"
MAX_QUARANTINE_BYTES = 1 << 28
MAX_NAMED = 20  # bad images that an error message names
CHECK_ROWS = 1024  # images between two updates of the check's progress


class DataConfig(Section):
    """Which images `prepare` writes to sample stores, and in which size."""

    source: Literal["digits", "folder"] = Field(
        description='"digits": scikit-learn\'s 1,797 images of 8×8 pixels. '
        '"folder": the image folder of --data, '
        "with `train/<class>/*.jpg` (or .jpeg, .png) and optionally `val/<class>/*.jpg`.",
    )
    image_size: int = Field(
        ge=2,
        le=4096,
        description="Height and width of the stored images, in pixels. "
        "Images of another size are resized with PIL's box filter (NFM paper section 4); "
        "one that is not square is stretched, not cropped.",
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

    def with_folder(self, data: Path | None) -> "DataConfig":
        """This config for the image folder `data`; the same config if it is None."""
        return self if data is None else self.model_copy(update={"source": "folder"})


@dataclass(frozen=True)
class Images:
    """The images of a split: image i is `load(i)`, uint8 (C, H, W), with label `labels[i]` and name `names[i]`, decoded
    from bytes with the sha256 `hash_source(i)`.

    `identity` is JSON that tells data sets apart: a hash of the pixels, or of the names and sizes of the files.
    """

    load: Callable[[int], NDArray[np.uint8]]
    hash_source: Callable[[int], str]
    names: list[str]
    labels: NDArray[np.int64]
    class_names: list[str]
    identity: dict[str, Any]

    def select(self, rows: NDArray[np.int64]) -> "Images":
        """The images of these rows, in their order."""
        numbers = rows.tolist()
        return Images(
            lambda i: self.load(numbers[i]),
            lambda i: self.hash_source(numbers[i]),
            [self.names[number] for number in numbers],
            self.labels[rows],
            self.class_names,
            self.identity,
        )


class BadImageError(StageError):
    """An image does not decode."""


class SquareNotice:
    """Says once, on stderr, how images that are not square become square."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.is_printed = False
        self.lock = Lock()  # images are decoded by several threads

    def print_once(self, path: Path, width: int, height: int) -> None:
        """Print the notice, if this is the first image that is not square."""
        if width == height:
            return
        with self.lock:
            if self.is_printed:
                return
            self.is_printed = True
        print_line(
            f"note: {path} is {width}×{height}; "
            f"images that are not square are stretched to {self.image_size}×{self.image_size} as a whole, "
            "without a crop (PIL's box filter, as in the paper)"
        )


def digits(config: DataConfig) -> Images:
    """scikit-learn's 1,797 images of 8×8 pixels, with their 17 grey levels spread over 0 … 255."""
    if (config.image_size, config.channels) != (8, 1):
        raise StageError(
            f"got digits at {config.channels}×{config.image_size}×{config.image_size}; they are 1×8×8 images"
        )
    from sklearn.datasets import load_digits  # takes seconds to import; only this function needs it

    bundle = load_digits()
    x = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bundle.target.astype(np.int64)
    identity = {"name": "scikit-learn digits", "sha256": sha256(x.tobytes() + labels.tobytes())}
    names = [f"digit {i}" for i in range(len(x))]
    class_names = [str(label) for label in range(10)]
    return Images(lambda i: x[i], lambda i: sha256(x[i].tobytes()), names, labels, class_names, identity)


def list_folder(config: DataConfig, path: Path, notice: SquareNotice) -> Images:
    """The images in a folder that has one folder per class, in the order of their names.

    Raises StageError if the folder is missing or holds no images.
    """
    if not path.is_dir():
        raise StageError(
            f"{path}: no such folder; expected one folder per class in it, with {', '.join(sorted(SUFFIXES))} files"
        )
    class_names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files: list[Path] = []
    labels: list[int] = []
    names: list[str] = []
    lines: list[str] = []
    with Progress(f"list {path}") as progress:
        for label, class_name in enumerate(class_names):
            for file in sorted((path / class_name).iterdir()):
                if file.suffix.lower() not in SUFFIXES or not file.is_file():
                    continue
                name = f"{class_name}/{file.name}"
                if len(name.encode()) > MAX_NAME_BYTES:
                    raise StageError(
                        f"{file}: got a name of {len(name.encode())} bytes; expected at most {MAX_NAME_BYTES}"
                    )
                files.append(file)
                labels.append(label)
                names.append(name)
                lines.append(f"{name} {file.stat().st_size}")
            progress.set_note(f"{len(files)} images")
    if not files:
        raise StageError(f"{path}: got no images; expected <class>/*.jpg, .jpeg or .png in it")
    listing_sha256 = sha256("\n".join(lines).encode())
    identity = {"name": "image folder", "files": len(files), "listing_sha256": listing_sha256}

    def load(i: int) -> NDArray[np.uint8]:
        return decode_image(files[i], config, notice)

    def hash_source(i: int) -> str:
        with open(files[i], "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return Images(load, hash_source, names, np.array(labels, dtype=np.int64), class_names, identity)


def decode_image(path: Path, config: DataConfig, notice: SquareNotice) -> NDArray[np.uint8]:
    """The image in a file, resized, as uint8 (C, H, W).

    Raises BadImageError if the file is not a whole JPEG or PNG image of at most 8 bits a channel and of a sane size,
    OSError if it cannot be read.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as opened:
            if opened.mode.startswith("I"):
                raise BadImageError(f"{path}: 16 bits a channel; expected 8")
            image = opened.convert("L" if config.channels == 1 else "RGB")
    except BadImageError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk failed, not the decoder
        raise BadImageError(f"{path}: {error}") from error
    notice.print_once(path, *image.size)
    pixels = np.asarray(image.resize((config.image_size, config.image_size), Image.Resampling.BOX))
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def read_splits(config: DataConfig, data: Path | None) -> dict[str, Images]:
    """The images of train and val, each in a fixed random order, so that a block holds a mix of classes.

    val is a folder of its own, or a share of each class of train. Raises StageError if there are no such images.
    """
    if config.source == "digits":
        return hold_out(config, digits(config))
    if data is None:
        raise StageError("data.source is 'folder', but no folder was given; say where with --data (with make: DATA=…)")
    notice = SquareNotice(config.image_size)
    train = list_folder(config, data / "train", notice)
    if not (data / "val").is_dir():
        return hold_out(config, train)
    val = list_folder(config, data / "val", notice)
    if val.class_names != train.class_names:
        raise StageError(f"{data}: got different class folders in train and val; expected the same ones")
    return {"train": train.select(random_order(train)), "val": val.select(random_order(val))}


def hold_out(config: DataConfig, images: Images) -> dict[str, Images]:
    """Split images into train and val: the share `holdout` of each class is val. Both are in a fixed random order."""
    order = random_order(images)
    is_val = np.zeros(len(order), dtype=bool)
    for label in range(len(images.class_names)):
        rows = order[images.labels[order] == label]
        is_val[rows[: round(len(rows) * config.holdout)]] = True
    if is_val.all() or not is_val.any():
        raise StageError(
            f"got {len(order)} images and data.holdout = {config.holdout}; expected at least one image in each split"
        )
    return {"train": images.select(order[~is_val[order]]), "val": images.select(order[is_val[order]])}


def random_order(images: Images) -> NDArray[np.int64]:
    """The fixed random order in which images are written."""
    return permutation(len(images.names), seed=0, stream=0, counter=0)


def prepare(
    config: DataConfig,
    out: str,
    data: Path | None = None,
    skip_bad_images: bool = False,
    attribution: AttributionConfig | None = None,
) -> None:
    """Write the sample stores `<out>/train` and `<out>/val`, from the image folder `data`, or from the digits.

    The same call again continues, or does nothing if both stores are complete. Raises StageError for images that cannot
    be used; with `skip_bad_images`, those that do not decode are left out instead. Raises StoreError if `out` holds
    other stores.
    """
    config = config.with_folder(data)
    if skip_bad_images and config.source == "digits":
        raise StageError("got --skip-bad-images for the digits, which are all good; it needs an image folder (--data)")
    images_of_split = read_splits(config, data)
    bad_of_split = {
        split: find_bad_images(f"{out}/{split}", images, skip_bad_images) for split, images in images_of_split.items()
    }
    for split in SPLITS:
        images = images_of_split[split]
        bad = bad_of_split[split]
        good_rows = [row for row, name in enumerate(images.names) if name not in bad]
        if len(good_rows) < 2:
            raise StageError(f"got {len(good_rows)} images for {split}; expected at least 2 (see data.holdout)")
        good_images = images.select(np.array(good_rows, dtype=np.int64))
        write_store(config, f"{out}/{split}", split, good_images, len(bad), attribution or AttributionConfig())


def write_store(
    config: DataConfig, url: str, split: str, images: Images, quarantined: int, attribution: AttributionConfig
) -> None:
    """Write the sample store of a split, or what is missing of it. `quarantined` is the number of images left out."""
    spec = Spec(
        kind="samples",
        layout=config.layout,
        rows=len(images.names),
        block_rows=config.block_rows,
        shape=(config.channels, config.image_size, config.image_size),
        x=PixelSpec(dtype="uint8"),
        views=["plain"],
        num_classes=len(images.class_names),
        class_names=images.class_names,
        names=True,
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
        update_attribution(url, attribution)
        return
    missing_units = writer.list_missing_units()
    if len(missing_units) < spec.num_blocks:  # an earlier call wrote some
        missing_units = writer.read_back()
    missing_rows = sum(spec.rows_of(unit.block) for unit in missing_units)
    name = f"prepare {split}"
    with Progress(name, spec.rows, "image", spec.rows - missing_rows) as progress, ThreadPoolExecutor() as pool:
        for unit in missing_units:
            rows = spec.indices(unit.block)
            x = np.stack(list(pool.map(images.load, rows.tolist())))
            hashes = pool.map(images.hash_source, rows.tolist())
            names = [ImageName(images.names[row], digest) for row, digest in zip(rows, hashes, strict=True)]
            writer.write_block(unit.block, {"x": x, "label": images.labels[rows]}, z=None, noise=None, names=names)
            progress.advance(len(rows))
        with progress.step("write the manifest and dataset.json"):
            writer.finalize(attribution=attribution.to_attribution())


def find_bad_images(url: str, images: Images, skip_bad_images: bool) -> dict[str, str]:
    """The names of all images that do not decode, with the reason. The result is kept in a file beside the store at
    `url`, and read from there by later calls for the same images.

    Raises StageError naming them if there are any, unless `skip_bad_images`.
    """
    root = Root(url)
    identity_sha256 = sha256(canonical_json(images.identity))
    if root.exists(QUARANTINE_FILE):
        quarantine = json.loads(root.read(QUARANTINE_FILE, MAX_QUARANTINE_BYTES))
        bad: dict[str, str] = quarantine["images"]
        if quarantine["listing"] == identity_sha256 and (skip_bad_images or not bad):
            return bad
    bad = {}
    total = len(images.names)
    with Progress(f"check {url.rpartition('/')[2]}", total, "image") as progress, ThreadPoolExecutor() as pool:
        for start in range(0, total, CHECK_ROWS):
            rows = range(start, min(start + CHECK_ROWS, total))
            errors = list(pool.map(lambda row: try_to_load(images, row), rows))
            for row, error in zip(rows, errors, strict=True):
                if error is not None:
                    bad[images.names[row]] = str(error)
            progress.advance(len(rows))
    if bad and not skip_bad_images:
        named = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:MAX_NAMED])
        if len(bad) > MAX_NAMED:
            named += f"; and {len(bad) - MAX_NAMED} more"
        raise StageError(
            f"{len(bad)} of {total} images do not decode: {named}. Fix or remove them, or pass --skip-bad-images"
        )
    root.write(QUARANTINE_FILE, canonical_json({"listing": identity_sha256, "images": bad}))
    if bad:
        print_line(f"{len(bad)} of {total} images left out, listed in {url}/{QUARANTINE_FILE}")
    return bad


def try_to_load(images: Images, row: int) -> BadImageError | None:
    """The error that image `row` does not decode with; None if it does."""
    try:
        images.load(row)
    except BadImageError as error:
        return error
    return None
