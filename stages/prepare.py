"""prepare: images → two sample stores, `train` and `val` (x as uint8, label, index).

Images are resized to squares with PIL's box filter (NFM paper section 4). One that is not square is stretched to the
square as a whole: nothing is cropped or padded.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nfm.stages.attribution import AttributionConfig, update_attribution
from nfm.stages.errors import StageError
from nfm.stages.image_files import (
    DECODING,
    BadImageError,
    SourceImage,
    SquareNotice,
    read_image,
    without_pillow_warnings,
)
from nfm.stages.image_folder import check_classes_have_images, list_images, print_unused
from nfm.stages.progress import Progress, print_line
from nfm.stages.section import Section
from nfm.stages.splits import SPLITS
from nfm.storage_specs.format.image_names import ImageName
from nfm.storage_specs.format.schema import ImageView, LayoutName, PixelSpec, Sha256, Spec
from nfm.storage_specs.reading.order import permutation
from nfm.storage_specs.storage.documents import StrictModel, canonical_json, make_document, parse_json
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import Root, expand_home, sha256
from nfm.storage_specs.writing.claims import check_output
from nfm.storage_specs.writing.writer import StoreWriter

QUARANTINE_FILE = "quarantine.json"
MAX_QUARANTINE_BYTES = 1 << 28
MAX_NAMED = 20  # bad images, or classes, that an error message names
MIN_ROWS = 2  # images of a split
VIEWS: list[ImageView] = ["plain", "mirrored"]
CHECK_ROWS = 1024  # images between two updates of the check's progress


class DataConfig(Section):
    """Which images `prepare` writes to sample stores, and in which size."""

    source: Literal["digits", "folder"] = Field(
        description='"digits": scikit-learn\'s 1,797 images of 8×8 pixels. '
        '"folder": the image folder of --data, '
        "with `train/<class>/*.jpg` (or .jpeg, .png, .webp, .gif, .bmp) and optionally `val/<class>/*.jpg`.",
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
        description="Share of the images of each class held out as val, rounded; at least one stays in train. "
        "Not used if the image folder has `val/`.",
    )
    block_rows: int = Field(
        ge=1,
        le=1 << 20,
        description="Images in a block. A block of one column is one file, and encode works block by block.",
    )
    layout: LayoutName = Field(default="webdataset", description="File layout of the sample stores.")
    views: Literal[1, 2] = Field(
        default=1,
        description="2: networks see each image and its mirror image, left to right, in turn. "
        "encode then needs an even number of draws.",
    )

    def with_folder(self, data: Path | None) -> "DataConfig":
        """This config for the image folder `data`; the same config if it is None."""
        return self if data is None else self.model_copy(update={"source": "folder"})


@dataclass(frozen=True)
class Images:
    """The images of a split: image i is `load(i)`, with label `labels[i]` and name `names[i]`.

    `identity` is JSON that tells data sets apart: a hash of the pixels, or of the names and sizes of the files.
    `quarantined` is the number of images of that data set that do not decode and were left out.
    """

    load: Callable[[int], SourceImage]
    names: list[str]
    labels: NDArray[np.int64]
    class_names: list[str]
    identity: dict[str, Any]
    quarantined: int = 0

    def select(self, rows: NDArray[np.int64]) -> "Images":
        """The images of these rows, in their order."""
        numbers = rows.tolist()
        return replace(
            self,
            load=lambda i: self.load(numbers[i]),
            names=[self.names[number] for number in numbers],
            labels=self.labels[rows],
        )


class Quarantine(StrictModel):
    """`quarantine.json` beside the sample stores: the images of a source that do not decode, each with the reason."""

    source: Sha256  # of what was checked, and of how it is decoded
    images: dict[str, str]  # by split and name: train/<class>/<file>


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
    return Images(lambda i: SourceImage(x[i], sha256(x[i].tobytes())), names, labels, class_names, identity)


def open_folder(config: DataConfig, path: Path, notice: SquareNotice) -> Images:
    """The images in a folder that has one folder per class, in the order of their names. Raises StageError as
    `list_images` does."""
    class_names, files = list_images(path)
    lines = [f"{file.name} {file.bytes}" for file in files]
    identity = {
        "name": "image folder",
        "files": len(files),
        "listing_sha256": sha256("\n".join(lines).encode()),
    }
    return Images(
        lambda i: read_image(files[i].path, config.channels, config.image_size, notice),
        [file.name for file in files],
        np.array([file.label for file in files], dtype=np.int64),
        class_names,
        identity,
    )


def open_folders(config: DataConfig, out: str, data: Path | None, skip_bad_images: bool) -> dict[str, Images]:
    """The images of the folder `<data>/train`, and of `<data>/val` if there is one, that decode.

    Raises StageError if a folder cannot be used, and unless `skip_bad_images` if some images do not decode.
    """
    if data is None:
        raise StageError("data.source is 'folder', but no folder was given; say where with --data (with make: DATA=…)")
    data = Path(expand_home(str(data)))
    notice = SquareNotice(config.image_size)
    splits = [split for split in SPLITS if split == "train" or (data / split).is_dir()]
    folders = {split: open_folder(config, data / split, notice) for split in splits}
    print_unused(data, splits)
    train = folders["train"]
    for split, images in folders.items():
        differing = sorted(set(images.class_names) ^ set(train.class_names))
        if differing:
            raise StageError(
                f"{data}: got class folders in train or {split} alone ({', '.join(differing[:MAX_NAMED])}); "
                "expected the same in both"
            )
    bad = find_bad_images(Root(out), folders, skip_bad_images)
    for split, images in folders.items():
        is_good = np.array([f"{split}/{name}" not in bad for name in images.names])
        good = replace(images.select(np.flatnonzero(is_good)), quarantined=int((~is_good).sum()))
        check_classes_have_images(data / split, good.class_names, good.labels.tolist())
        folders[split] = good
    return folders


def hold_out(config: DataConfig, images: Images) -> dict[str, Images]:
    """Split images into train and val: of each class, the share `holdout` is val, rounded, but at least one image is
    train. Raises StageError if that leaves too few images in a split."""
    counts = np.bincount(images.labels, minlength=len(images.class_names))

    def count_held_out(share: float) -> NDArray[np.int64]:
        held_out: NDArray[np.int64] = np.minimum(np.rint(counts * share).astype(np.int64), counts - 1)
        return held_out

    def is_enough(share: float) -> bool:
        num_val = count_held_out(share).sum()
        return bool(MIN_ROWS <= num_val <= len(images.names) - MIN_ROWS)

    if not is_enough(config.holdout):
        working = [percent / 100 for percent in range(1, 100) if is_enough(percent / 100)]
        advice = (
            f"data.holdout = {min(working, key=lambda share: abs(share - config.holdout))} does"
            if working
            else "no share does, as each class keeps one in train: add images, or a folder val/"
        )
        raise StageError(
            f"got {len(images.names)} images in {len(counts)} classes, the largest of {counts.max()}: "
            f"data.holdout = {config.holdout} holds out {count_held_out(config.holdout).sum()} of them; "
            f"expected at least {MIN_ROWS} images in each of train and val; {advice}"
        )
    order = random_order(images)
    is_val = np.zeros(len(order), dtype=bool)
    for label, count in enumerate(count_held_out(config.holdout)):
        rows = order[images.labels[order] == label]
        is_val[rows[:count]] = True
    return {"train": images.select(order[~is_val[order]]), "val": images.select(order[is_val[order]])}


def random_order(images: Images) -> NDArray[np.int64]:
    """The fixed random order in which images are written, so that a block holds a mix of classes."""
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
    for split in SPLITS:  # before images are decoded for nothing
        check_output(Root(f"{out}/{split}"))
        if data is not None:
            check_outside(out, data / split)
    with without_pillow_warnings():
        if config.source == "digits":
            images_of_split = hold_out(config, digits(config))
        else:
            folders = open_folders(config, out, data, skip_bad_images)
            images_of_split = (
                {split: images.select(random_order(images)) for split, images in folders.items()}
                if "val" in folders
                else hold_out(config, folders["train"])
            )
        for split, images in images_of_split.items():
            if len(images.names) < MIN_ROWS:
                raise StageError(f"got {len(images.names)} images for {split}; expected at least {MIN_ROWS}")
        for split, images in images_of_split.items():
            write_store(config, f"{out}/{split}", split, images, attribution or AttributionConfig())


def check_outside(out: str, images: Path) -> None:
    """Raise StageError if stores would be written into a folder of images: later they would be taken for a class."""
    root = Root(out)
    if root.local and Path(root.path).resolve().is_relative_to(images.expanduser().resolve()):
        raise StageError(f"{out}: lies inside {images}, whose folders are classes; write to another folder")


def write_store(config: DataConfig, url: str, split: str, images: Images, attribution: AttributionConfig) -> None:
    """Write the sample store of a split, or what is missing of it."""
    values = {
        "kind": "samples",
        "layout": config.layout,
        "rows": len(images.names),
        "block_rows": config.block_rows,
        "shape": (config.channels, config.image_size, config.image_size),
        "x": PixelSpec(dtype="uint8"),
        "views": VIEWS[: config.views],
        "num_classes": len(images.class_names),
        "class_names": images.class_names,
        "names": True,
        "preprocessing": {
            "source": images.identity,
            "split": split,
            **({"resize": "none"} if config.source == "digits" else {"decoding": DECODING, "resize": "PIL box"}),
            "quarantined": images.quarantined,
        },
    }
    spec = make_document(Spec, values, url)
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
            loaded = list(pool.map(images.load, rows.tolist()))
            x = np.stack([image.pixels for image in loaded])
            names = [ImageName(images.names[row], image.sha256) for row, image in zip(rows, loaded, strict=True)]
            writer.write_block(unit.block, {"x": x, "label": images.labels[rows]}, z=None, noise=None, names=names)
            progress.advance(len(rows))
        with progress.step("write the manifest and dataset.json"):
            writer.finalize(attribution=attribution.to_attribution())


def find_bad_images(root: Root, folders: Mapping[str, Images], skip_bad_images: bool) -> dict[str, str]:
    """All images that do not decode, as `<split>/<name>`, each with the reason. The result is kept in the folder
    `root`, and read from there by later calls for the same images.

    Raises StageError naming them if there are any, unless `skip_bad_images`.
    """
    identities = {split: images.identity for split, images in folders.items()}
    source = sha256(canonical_json({"decoding": DECODING, "folders": identities}))
    quarantine = read_quarantine(root)
    if quarantine is not None and quarantine.source == source and (skip_bad_images or not quarantine.images):
        return quarantine.images
    root.check_writable()
    bad: dict[str, str] = {}
    total = sum(len(images.names) for images in folders.values())
    with Progress("check", total, "image") as progress, ThreadPoolExecutor() as pool:
        for split, images in folders.items():
            for start in range(0, len(images.names), CHECK_ROWS):
                rows = range(start, min(start + CHECK_ROWS, len(images.names)))
                reasons = pool.map(lambda row, images=images: find_fault(images, row), rows)
                for row, reason in zip(rows, reasons, strict=True):
                    if reason is not None:
                        bad[f"{split}/{images.names[row]}"] = reason
                progress.advance(len(rows))
    if bad and not skip_bad_images:
        named = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:MAX_NAMED])
        if len(bad) > MAX_NAMED:
            named += f"; and {len(bad) - MAX_NAMED} more"
        raise StageError(
            f"{len(bad)} of {total} images do not decode: {named}. Fix or remove them, or pass --skip-bad-images"
        )
    root.write(QUARANTINE_FILE, canonical_json(Quarantine(source=source, images=bad).model_dump(mode="json")))
    if bad:
        print_line(f"{len(bad)} of {total} images left out, listed in {root.url}/{QUARANTINE_FILE}")
    return bad


def read_quarantine(root: Root) -> Quarantine | None:
    """What an earlier call found; None if there is no file of it or a damaged one, so that all is checked again."""
    if not root.exists(QUARANTINE_FILE):
        return None
    try:
        data = root.read(QUARANTINE_FILE, MAX_QUARANTINE_BYTES)
        return parse_json(Quarantine, data, f"{root.url}/{QUARANTINE_FILE}")
    except StorageError:
        raise
    except StoreError:
        return None


def find_fault(images: Images, row: int) -> str | None:
    """Why image `row` does not decode; None if it does."""
    try:
        images.load(row)
    except BadImageError as error:
        return error.reason
    return None
