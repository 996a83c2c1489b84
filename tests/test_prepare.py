"""Images to sample stores, and what happens to images that are none."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from nfm.stages.errors import StageError
from nfm.stages.prepare import DataConfig, prepare
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage.errors import StoreError

DIGITS = DataConfig(source="digits", image_size=8, channels=1, holdout=0.165, block_rows=128)
FOLDER = DataConfig(source="folder", image_size=12, channels=3, holdout=0.34, block_rows=4)


def test_digits_are_all_there_once_in_equal_shares(tmp_path: Path) -> None:
    prepare(DIGITS, str(tmp_path))
    train, val = Store(f"{tmp_path}/train"), Store(f"{tmp_path}/val")
    assert (train.spec.rows, val.spec.rows) == (1500, 297)
    images = np.concatenate([store.images(np.arange(store.spec.rows)) for store in (train, val)])
    labels = np.concatenate([train.labels(), val.labels()])
    bundle = load_digits()
    expected = {
        (int(label), np.rint(image * 255 / 16).astype(np.uint8).tobytes())
        for image, label in zip(bundle.images, bundle.target, strict=True)
    }
    assert {(int(label), image.tobytes()) for image, label in zip(images, labels, strict=True)} == expected
    share = np.bincount(val.labels()) / np.bincount(labels)
    assert share.min() > 0.155
    assert share.max() < 0.175
    first = np.bincount(train.column("label", 0), minlength=10)
    assert first.min() > 0, "a block holds a mix of classes"


def test_a_folder_is_resized_with_the_box_filter(images: Path, tmp_path: Path) -> None:
    prepare(FOLDER, f"{tmp_path}/out", images)
    train, val = Store(f"{tmp_path}/out/train"), Store(f"{tmp_path}/out/val")
    assert train.spec.class_names == ["cat", "dog"]
    assert (train.spec.rows, val.spec.rows) == (8, 4)
    stored = {image.tobytes() for store in (train, val) for image in store.images(np.arange(store.spec.rows))}
    for path in images.rglob("*.*"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((12, 12), Image.Resampling.BOX))
        assert pixels.transpose(2, 0, 1).tobytes() in stored


def test_how_images_become_square_is_said_once(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (images / "val" / name).mkdir(parents=True)
        Image.new("RGB", (9, 6), "red").save(images / "val" / name / "0.png")
    prepare(FOLDER, f"{tmp_path}/out", images)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "images that are not square are stretched to 12×12 as a whole, without a crop (PIL's box filter" in notes[0]


def test_nothing_is_said_of_square_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (20 + i, 20 + i)).save(tmp_path / "images" / "train" / name / f"{i}.png")
    prepare(FOLDER, f"{tmp_path}/out", tmp_path / "images")
    assert "note: " not in capsys.readouterr().err


def test_a_val_folder_is_used_when_there_is_one(images: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (images / "val" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), "red").save(images / "val" / name / "0.png")
    prepare(FOLDER, f"{tmp_path}/out", images)
    assert Store(f"{tmp_path}/out/train").spec.rows == 12
    assert Store(f"{tmp_path}/out/val").spec.rows == 2


def bad_images(images: Path) -> None:
    (images / "train" / "cat" / "text.jpg").write_text("no image")
    whole = (images / "train" / "dog" / "0.jpg").read_bytes()
    (images / "train" / "dog" / "cut.jpg").write_bytes(whole[: len(whole) // 2])


def test_images_that_do_not_decode_are_named_and_nothing_is_written(images: Path, tmp_path: Path) -> None:
    bad_images(images)
    with pytest.raises(
        StageError, match=r"of 1\d images do not decode.*Fix or remove them, or pass --skip-bad-images"
    ) as caught:
        prepare(FOLDER.model_copy(update={"holdout": 0.1}), f"{tmp_path}/out", images)
    assert "cat/text.jpg" in str(caught.value)
    assert "dog/cut.jpg" in str(caught.value)
    assert not (tmp_path / "out" / "train" / "dataset.json").exists()


def test_skipped_images_are_counted(images: Path, tmp_path: Path) -> None:
    bad_images(images)
    prepare(FOLDER, f"{tmp_path}/out", images, skip_bad_images=True)
    stores = [Store(f"{tmp_path}/out/{split}") for split in ("train", "val")]
    assert sum(store.spec.rows for store in stores) == 12
    assert sum(store.spec.preprocessing["quarantined"] for store in stores) == 2
    prepare(FOLDER, f"{tmp_path}/out", images, skip_bad_images=True)  # the same command again
    with pytest.raises(StageError, match="do not decode"):
        prepare(FOLDER, f"{tmp_path}/out", images)  # without the flag they are an error again


def test_the_digits_have_no_bad_images_to_skip(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="--skip-bad-images for the digits"):
        prepare(DIGITS, f"{tmp_path}/out", skip_bad_images=True)
    assert not (tmp_path / "out").exists()


def test_a_bad_image_in_val_stops_before_anything_is_complete(images: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (images / "val" / name).mkdir(parents=True)
        (images / "val" / name / "0.png").write_text("no image")
    with pytest.raises(StageError, match=r"val/cat/0\.png"):
        prepare(FOLDER, f"{tmp_path}/out", images)
    assert not list((tmp_path / "out").rglob("dataset.json"))


def test_what_only_looks_like_an_image(images: Path, tmp_path: Path) -> None:
    """A 16-bit PNG would be clipped to white; other formats reach decoders that nobody asked for."""
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(images / "train" / "cat" / "deep.png")
    Image.new("RGB", (9, 9)).save(images / "train" / "dog" / "other.bmp")
    (images / "train" / "dog" / "other.bmp").rename(images / "train" / "dog" / "other.jpg")
    prepare(FOLDER, f"{tmp_path}/out", images, skip_bad_images=True)
    stores = [Store(f"{tmp_path}/out/{split}") for split in ("train", "val")]
    assert sum(store.spec.preprocessing["quarantined"] for store in stores) == 2


def test_changed_images_are_refused(images: Path, tmp_path: Path) -> None:
    prepare(FOLDER, f"{tmp_path}/out", images)
    Image.new("RGB", (9, 9)).save(images / "train" / "cat" / "new.png")
    with pytest.raises(StoreError, match="holds another store"):
        prepare(FOLDER, f"{tmp_path}/out", images)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no such folder"):
        prepare(FOLDER, f"{tmp_path}/out", tmp_path / "nothing")
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(StageError, match="got no images"):
        prepare(FOLDER, f"{tmp_path}/out", tmp_path / "data")
    with pytest.raises(StageError, match="no folder was given"):
        prepare(FOLDER, f"{tmp_path}/out")


def test_real_photographs_when_they_are_at_hand(tmp_path: Path) -> None:
    """200 ImageNet images, some greyscale, if a copy lies beside the checkout."""
    import tarfile

    archive = Path(__file__).parents[2] / "shared" / "data" / "imagenet_sample.tar"
    if not archive.exists():
        pytest.skip("no ImageNet sample here")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "raw", filter="data")
    folders = sorted({path.parent for path in (tmp_path / "raw").rglob("*.*") if path.is_file()})
    (tmp_path / "images" / "train").mkdir(parents=True)
    for folder in folders:
        folder.rename(tmp_path / "images" / "train" / folder.name)
    config = DataConfig(source="folder", image_size=64, channels=3, holdout=0.5, block_rows=64)
    (tmp_path / "images" / "val").symlink_to(tmp_path / "images" / "train")
    prepare(config, f"{tmp_path}/out", tmp_path / "images")
    assert Store(f"{tmp_path}/out/train").spec.rows == 200
    assert list(find_faults(Store(f"{tmp_path}/out/train"))) == []
